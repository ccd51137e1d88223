"""What `suite.py` runs: each benchmark of docs/benchmarks.md with its command, and what it needs of GPUs and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from rowcast.runtime.checkpoint.shipped import DEFAULT_DRAFT

MODEL: Final = "SmolLM2-135M-Instruct"
SHOWN: Final = {
    "python": "python",
    "model": MODEL,
    "texts": "--text A.txt --text B.txt",
    "held_out": "C.txt",
    "work": "RUN",
    "minutes": "9",
}
"""What stands in a command that is shown, in place of a machine's paths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`command`: a line for bash, with places: {python}, {model}, {texts}, {held_out}, {work} (the run's folder) and {minutes}
    (of a part)."""

    name: str
    title: str = ""
    """Of its section in docs/benchmarks.md; without one it is not kept there."""
    command: str
    gpus: int = 1
    memory: float = 75
    """GiB that each GPU has to have: a card of 80 GB has 79.6."""
    seconds: float
    """What it takes on an H100 that has compiled nothing yet. Of a job in parts: its longest part."""
    in_parts: bool = False
    """Whether it takes `--part-minutes {minutes}` and goes on where it was."""
    makes: str = ""
    """Of a job in parts: what stands in the run's folder when all of it is done."""
    tells: str = ""
    """What a page tells in place of the command."""
    after: tuple[str, ...] = ()
    """Jobs whose output it takes."""

    @property
    def shown(self) -> str:
        """The command as a page tells it."""
        return self.tells or self.line(SHOWN).replace("python -m rowcast", "rowcast")

    @property
    def needs_text(self) -> bool:
        return "{texts}" in self.command or "{held_out}" in self.command

    def line(self, places: Mapping[str, str]) -> str:
        return self.command.format_map(places)


ROWCAST: Final = "{python} -m rowcast"
TWO_CARDS: Final = "--ranks 2 --gpu-memory 24GiB"
"""A card that stands in for one of 24 GiB: the cap holds by the driver's count."""
LEARN: Final = "{texts} --held-out {held_out} --part-minutes {minutes}"

JOBS: Final = (
    # Kernels and decoding on one GPU.
    Job(name="tests", command="{python} -m pytest -q -m gpu -n 16 --dist worksteal tests", seconds=340),
    Job(
        name="sanitizer",
        command="compute-sanitizer --tool memcheck --report-api-errors no --target-processes all --error-exitcode 9 "
        "{python} -m pytest -q -m gpu --every 1000 tests/test_gpu_*.py",
        seconds=260,
    ),
    Job(name="kernels-h100", title="Kernels", command=f"{ROWCAST} bench kernels --json", seconds=90),
    Job(
        name="latency-llama-2-7b", title="A Llama-2-7B shape behind 1,024 tokens",
        command=f"{ROWCAST} bench latency --shape llama-2-7b --dtype bfloat16 --context 1024 --against transformers "
        "--repeat 1 --max-tokens 96",
        seconds=60,
    ),
    Job(
        name="latency-smollm2-h100", title="SmolLM2 on one GPU, beside Transformers",
        command=f"{ROWCAST} bench latency --model {{model}} --dtype bfloat16 --against transformers --repeat 1 --max-tokens 128",
        seconds=80,
    ),
    Job(
        name="exact-smollm2-h100", title="SmolLM2: a GPU's tokens are the CPU's",
        command="{python} benchmarks/gpu_equals_cpu.py --model {model} --prompts 8 --ladder plain "
        '--ladder "ngram:gamma=5 / self:kv=128,recent=32,gamma=4 / plain"',
        seconds=110,
    ),
    Job(name="hire-1b", title="HiRE end to end: 1 B gated parameters", command="{python} benchmarks/hire.py", seconds=70),
    Job(
        name="real-text", title="Real text on one GPU: plain and each ladder",
        command="{python} benchmarks/real_text.py --model {model} --text {held_out} --compiled", seconds=170,
    ),
    # TriForce: the paper's length takes a GPU of 141 GB; what 80 GB hold beside it.
    Job(
        name="triforce-on-chip", title="TriForce on chip: Llama-2-7B-128K, 124,928 tokens",
        command="{python} benchmarks/triforce.py --case on-chip", memory=130, seconds=150,
    ),
    Job(
        name="triforce-98304", title="TriForce on chip: Llama-2-7B-128K, 98,304 tokens",
        command="{python} benchmarks/triforce.py --case on-chip --prompt 98304 --gammas 2,6 4,8 --middle bits=4", seconds=80,
    ),
    Job(
        name="triforce-8b", title="TriForce on chip: a Llama-3.1-8B shape, 129,024 tokens",
        command="{python} benchmarks/triforce.py --case llama-3.1-8b --gammas 2,6 4,6 4,8", seconds=120,
    ),
    Job(
        name="triforce-batches", title="TriForce on chip: batches",
        command="{python} benchmarks/triforce.py --case batches", memory=130, seconds=200,
    ),
    # Tensor parallelism.
    Job(
        name="tp-opt-66b", title="Deja Vu's points: an OPT-66B shape on two GPUs",
        command="{python} benchmarks/tensor_parallel.py --model opt-66b --transformers --speed-up 2.5", gpus=2, seconds=90,
    ),
    Job(
        name="tp-opt-30b", title="Deja Vu's points: an OPT-30B shape on two GPUs",
        command="{python} benchmarks/tensor_parallel.py --model opt-30b", gpus=2, seconds=75,
    ),
    Job(
        name="opt175b-half", title="Half of OPT-175B's layers",
        command="{python} benchmarks/opt_175b.py --layers 48 --launcher local --parts dense sparse plan batch transformers",
        gpus=4, seconds=420,
    ),
    Job(
        name="opt175b-whole", title="OPT-175B, whole, on four GPUs",
        command="unset RAY_ADDRESS; export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n'); "
        "RAY='{python} -m ray.scripts.scripts'; AT=http://127.0.0.1:8299; "
        "$RAY start --head --block --port=6399 --dashboard-port=8299 --disable-usage-stats >&2 & head=$!; "
        "until $RAY job list --address $AT >/dev/null 2>&1; do sleep 1; done; "
        "$RAY job submit --address $AT --working-dir . -- {python} benchmarks/opt_175b.py --seconds 480 --points 1; "
        "ended=$?; kill $head; wait $head; exit $ended",
        tells="ray start --head && ray job submit --working-dir . -- python benchmarks/opt_175b.py --seconds 480 --points 1",
        gpus=4, memory=130, seconds=300,
    ),
    Job(name="all-reduce", title="Sums over two GPUs", command="{python} benchmarks/all_reduce.py", gpus=2, seconds=25),
    Job(
        name="loading", title="Loading 26 GB by two ranks",
        command="{python} benchmarks/loading.py --folder {work}/loading", gpus=2, seconds=150,
    ),
    Job(
        name="requests-1000", title="1,000 requests of mixed lengths over two ranks",
        command="{python} benchmarks/cluster_requests.py --model random:opt-6.7b --dtype bfloat16 --launcher local",
        gpus=2, seconds=120,
    ),
    # Two cards of 24 GiB, the rest in host memory.
    Job(
        name="offload-streamed", title="Full streaming: a Llama-2-7B shape on two cards",
        command=f"{{python}} benchmarks/offload.py --case streamed --model llama-2-7b {TWO_CARDS}", gpus=2, seconds=40,
    ),
    Job(
        name="offload-opt-66b", title="OPT-66B on two cards of 24 GiB",
        command=f"{{python}} benchmarks/offload.py --case filled rows accelerate --model opt-66b {TWO_CARDS} --heads 0.5 "
        "--cache 0.02 --prompt 32 --tokens 12",
        gpus=2, seconds=130,
    ),
    Job(
        name="offload-70b-exact", title="A 70B shape, exact: 4 bits draft, 16 bits are streamed",
        command=f"{{python}} benchmarks/offload.py --case lowbit --model llama-2-70b {TWO_CARDS} --rates 0.8 0.9 --tokens 8",
        gpus=2, seconds=130,
    ),
    Job(
        name="offload-kv-7b", title="KV in host memory: Llama-2-7B-128K, 127,000 tokens, two cards",
        command=f"{{python}} benchmarks/offload.py --case kv {TWO_CARDS} --gammas 2,20", gpus=2, seconds=100,
    ),
    Job(
        name="offload-kv-13b", title="KV in host memory: Llama-2-13B-128K, 127,000 tokens, two cards",
        command=f"{{python}} benchmarks/offload.py --case kv --model yarn-llama-2-13b-128k {TWO_CARDS} --gammas 2,20 "
        "--kv-rounds 8 --inner 0.6 0.8",
        gpus=2, seconds=130,
    ),
    Job(
        name="offload-peer", title="Cold rows on another GPU",
        command="{python} benchmarks/offload.py --case rows peer --model opt-6.7b", gpus=2, seconds=50,
    ),
    Job(
        name="peer-rows", title="Rows of another GPU's memory, by size", command="{python} benchmarks/peer_rows.py",
        gpus=2, seconds=60,
    ),
    Job(
        name="offload-exact", title="SmolLM2 under a cap: the same tokens, 1,000 requests",
        command="{python} benchmarks/offload_exact.py --model {model} --gpu-memory 1100MiB 1350MiB 1500MiB", seconds=330,
    ),
    Job(
        name="offload-disk", title="Layers on disk",
        command="{python} benchmarks/offload_disk.py --folder {work}/disk", seconds=70,
    ),
    Job(
        name="planned", title="Planned and measured: a Llama-2-7B shape",
        command="{python} benchmarks/plan_against_measured.py", seconds=260,
    ),
    # Copies that are trained: 18 minutes of one GPU each.
    Job(
        name="distill",
        command=f"{ROWCAST} distill {{model}} {LEARN} -o {{work}}/draft --json --hidden 224 --layers 4 --steps 4800 "
        "--written 18000000 --prompt-tokens 128 --compile",
        seconds=540, in_parts=True, makes="draft/rowcast.json",
    ),
    Job(
        name="adapt",
        command=f"{ROWCAST} adapt {{model}} {LEARN} -o {{work}}/adapted --json --steps 7000 --written 12000000 --prompt-tokens 128 "
        "--text-share 0.15 --compile",
        seconds=540, in_parts=True, makes="adapted/rowcast.json",
    ),
    Job(
        name="real-text-draft", title="Real text with the draft that comes along: three rungs",
        command=f"{{python}} benchmarks/real_text.py --model {{model}} --text {{held_out}} --draft {DEFAULT_DRAFT} "
        '--prompt-tokens 4000 --ladder plain "ngram:gamma=5 / plain" auto', seconds=300,
    ),
    Job(
        name="adapted", title="SmolLM2 adapted to 15% of its neurons, by density", after=("adapt",),
        command="{python} benchmarks/adapted.py {work}/adapted --original {model} --text {held_out} --density 0.1 --density 0.15 "
        "--density 0.2 --density 0.25 --density 0.35 --density 0.5",
        seconds=240,
    ),
    Job(
        name="pruned", title="SmolLM2 pruned to 80%",
        command="{python} benchmarks/pruned.py {model} {texts} --held-out {held_out} --keep 0.8 --steps 500 -o {work}/pruned",
        seconds=480,
    ),
    Job(
        name="quantized", title="GPTQ-class rounding against nearest",
        command="{python} benchmarks/quantized.py {model} {texts} --held-out {held_out} --bits 3 --bits 4 --group 64", seconds=110,
    ),
)  # fmt: skip
"""In the order in which they begin."""

"""What `rowcast bench latency` measures.

Both sides run in this process with the same dtype, threads, device and token ids, one in memory at a time, in turn: ours, theirs,
ours, theirs. One visit loads the model, warms up, then times prefill and decode `SAMPLES` times. The peer's side is a bare greedy
loop over its forward pass with a KV cache, which is lighter than its `generate`; ours is the whole engine with scheduler and sampler.
Neither side makes text of the tokens.
"""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rowcast import LLM, SamplingParams
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.device import DTYPES, choose_device, choose_dtype
from rowcast.runtime.tokenizer import load_tokenizer

SAMPLES = 2
DECODE_PROMPT = """The harbour lay quiet in the early morning, and the boats had not yet left. An old man sat on the wall, mended
a net and told the children, as he did every day, how the town had looked when he was a boy."""
DECODE_PROMPT_TOKENS = 32


class Subject(Protocol):
    """A loaded model with its tokenizer."""

    def prefill(self, ids: list[int]) -> None:
        """Read the prompt and choose one token."""
        ...

    def decode(self, ids: list[int], tokens: int) -> list[float]:
        """Generate `tokens` tokens greedily, end tokens ignored; the clock at each."""
        ...


class Rowcast:
    """Ours, as a user calls it."""

    def __init__(self, model: str, dtype: torch.dtype, device: Literal["cpu", "cuda"]) -> None:
        self.llm = LLM(model, ladder="plain", dtype=_name(dtype), device=device, progress=False)

    def prefill(self, ids: list[int]) -> None:
        self.llm.generate(ids, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))

    def decode(self, ids: list[int], tokens: int) -> list[float]:
        # Text is held back while it may still change, and special tokens have none: chunks come token by token without it.
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        return [time.perf_counter() for _ in self.llm.stream(ids, params)]


class Transformers:
    """The peer, from the same file."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: Literal["cpu", "cuda"]) -> None:
        from transformers import AutoTokenizer

        folder, file = peer_files(checkpoint)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **file)
        self.model = load_peer(checkpoint, dtype, device)

    def _next(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:  # [1, T] -> [1, 1]
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        token.item()  # A user sees each token: the host waits for it.
        return token, out.past_key_values

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> None:
        self._next(torch.tensor([ids], device=self.model.device))

    @torch.inference_mode()
    def decode(self, ids: list[int], tokens: int) -> list[float]:
        token, cache = torch.tensor([ids], device=self.model.device), None
        times = []
        for _ in range(tokens):
            token, cache = self._next(token, cache)
            times.append(time.perf_counter())
        return times


def peer_files(checkpoint: Checkpoint) -> tuple[str, dict[str, str]]:
    """How Transformers calls the checkpoint: a folder, and the GGUF file in it."""
    path = Path(checkpoint.path)
    return (str(path.parent), {"gguf_file": path.name}) if path.is_file() else (str(path), {})


def load_peer(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> Any:
    """The checkpoint as a Transformers model."""
    from transformers import AutoModelForCausalLM

    folder, file = peer_files(checkpoint)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **file).to(device).eval()


def run(
    model: str, dtype: str, device: str, against_transformers: bool, prompt_tokens: int, max_tokens: int, repeat: int
) -> dict[str, Any]:
    """Measure and return the report: medians of each side, the floor of decode, and ratios (above 1: ours is faster).

    Raises UserError for a device that is not there and for a model that cannot be loaded or whose context is too short.
    """
    chosen, _ = choose_device(device)
    where: Literal["cpu", "cuda"] = "cuda" if chosen.type == "cuda" else "cpu"
    checkpoint = open_checkpoint(model)
    vocabulary = spec_from_config(checkpoint.config).vocab_size
    kind = DTYPES[choose_dtype(dtype, checkpoint.stored_dtype, chosen)[0]]
    sides: dict[str, Callable[[], Subject]] = {"rowcast": lambda: Rowcast(model, kind, where)}
    if against_transformers:
        prepare_peer(checkpoint)
        sides["transformers"] = lambda: Transformers(checkpoint, kind, where)

    decode_prompt = load_tokenizer(checkpoint).encode(DECODE_PROMPT)[:DECODE_PROMPT_TOKENS]
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    weight_bytes = 0
    for visit in range(repeat):
        for name, load in sides.items():
            # Fresh ids at each visit, so that no cache of prefixes helps; the same for both sides.
            draw = random.Random(visit)
            prompts = [draw.choices(range(vocabulary), k=prompt_tokens) for _ in range(1 + SAMPLES)]
            subject, measured = _visit(load, prompts, decode_prompt, max_tokens, where)
            if isinstance(subject, Rowcast):
                weight_bytes = subject.llm.plan.pass_bytes
            for key, values in measured.items():
                samples[name].setdefault(key, []).extend(values)
            del subject
            gc.collect()

    report: dict[str, Any] = {
        "benchmark": "latency",
        "model": model,
        "dtype": _name(kind),
        "device": where,
        "threads": torch.get_num_threads(),
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "repeat": repeat,
    }
    for name in sides:
        report[name] = {key: median(values) for key, values in samples[name].items()}
    bandwidth = read_bandwidth(where)
    report["floor"] = {
        "weight_bytes": weight_bytes,
        "bandwidth_bytes_per_s": bandwidth,
        "decode_tokens_per_s": bandwidth / weight_bytes,
    }
    if against_transformers:
        ours, theirs = report["rowcast"], report["transformers"]
        report["ratio"] = {
            "load": theirs["load_s"] / ours["load_s"],
            "prefill": theirs["prefill_s"] / ours["prefill_s"],
            "decode": ours["decode_tokens_per_s"] / theirs["decode_tokens_per_s"],
        }
    return report


def _visit(
    load: Callable[[], Subject], prompts: list[list[int]], decode_prompt: list[int], max_tokens: int, device: str
) -> tuple[Subject, dict[str, list[float]]]:
    """Load one side and time it. The first of `prompts` warms up, each other one is a sample."""
    memory = PeakMemory(device)
    start = time.perf_counter()
    subject = load()
    measured: dict[str, list[float]] = {"load_s": [time.perf_counter() - start], "prefill_s": [], "decode_tokens_per_s": []}
    subject.prefill(prompts[0])
    subject.decode(decode_prompt, 4)
    for prompt in prompts[1:]:
        start = time.perf_counter()
        subject.prefill(prompt)
        measured["prefill_s"].append(time.perf_counter() - start)
        times = subject.decode(decode_prompt, max_tokens)
        if len(times) < 2:
            raise UserError(
                f"the model wrote {len(times)} tokens after a prompt of {len(decode_prompt)}, decode speed needs 2: use a model with a "
                "longer context"
            )
        measured["decode_tokens_per_s"].append((len(times) - 1) / (times[-1] - times[0]))
    peak = memory.peak_bytes()
    if peak is not None:
        measured["peak_bytes"] = [peak]
    return subject, measured


class PeakMemory:
    """The most memory taken since this object was made, beyond what was held then."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.base: int | None = None
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            with suppress(AttributeError, OSError):  # A C library without malloc_trim, or a /proc that cannot be written to.
                ctypes.CDLL(None).malloc_trim(0)  # Freed memory that the C library keeps would hide what comes next.
                Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM (man 5 proc).
                self.base = _status_bytes("VmRSS")

    def peak_bytes(self) -> int | None:
        """None where the operating system does not tell."""
        if self.base is None:
            return None
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else _status_bytes("VmHWM")
        return None if peak is None else peak - self.base


def _status_bytes(field: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def read_bandwidth(device: str) -> float:
    """Bytes a second of the fastest of several sums over 512 MiB: what reading the weights once cannot beat."""
    x = torch.ones(1 << 27, device=device)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def prepare_peer(*checkpoints: Checkpoint) -> None:
    """Import the peer before any clock runs, and keep its progress bars off standard error. Raises UserError if it cannot read them."""
    if any(checkpoint.format == "gguf" for checkpoint in checkpoints) and find_spec("accelerate") is None:
        raise UserError("Transformers reads a GGUF file with accelerate, which is not installed: pip install accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def print_table(report: dict[str, Any]) -> None:
    """The report for people, on standard error."""
    from rich.console import Console
    from rich.table import Table

    sides = [name for name in ("rowcast", "transformers") if name in report]
    title = f"{report['model']}, {report['dtype']} on {report['device']}, {report['threads']} threads, batch 1"
    table = Table(title=title)
    for heading in ("", *sides, *(["ratio"] if "ratio" in report else [])):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = (
        ("load, s", "load_s", "load", 1.0),
        (f"prefill of {report['prompt_tokens']}, s", "prefill_s", "prefill", 1.0),
        ("decode, tokens/s", "decode_tokens_per_s", "decode", 1.0),
        ("peak memory, MiB", "peak_bytes", "", 2.0**20),
    )
    for label, key, ratio, unit in rows:
        cells = [f"{report[side][key] / unit:.2f}" if key in report[side] else "unknown" for side in sides]
        if "ratio" in report:
            cells.append(f"{report['ratio'][ratio]:.2f}x" if ratio else "")
        table.add_row(label, *cells)
    console = Console(stderr=True)
    console.print(table)
    floor = report["floor"]
    share = report["rowcast"]["decode_tokens_per_s"] / floor["decode_tokens_per_s"]
    console.print(
        f"decode floor: {floor['weight_bytes'] / 2**20:.0f} MiB of weights at {floor['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s "
        f"= {floor['decode_tokens_per_s']:.1f} tokens/s; reached {share:.0%}"
    )

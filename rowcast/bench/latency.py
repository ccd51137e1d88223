"""What `rowcast bench latency` measures.

Both sides run in this process with the same dtype, threads, device and token ids, one in memory at a time, in turn: ours, theirs,
ours, theirs. One visit loads the model, warms up, then times prefill and decode `SAMPLES` times. The peer's side is a bare greedy
loop over its forward pass with a KV cache, which is lighter than its `generate`; ours is the whole engine with scheduler and sampler.
Neither side makes text of the tokens. A shape has random weights on both sides, each side's own.
"""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rowcast import LLM, SamplingParams
from rowcast.bench.gpu_timing import copy_bandwidth
from rowcast.bench.shapes import open_shape
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.device import DTYPES, choose_device, choose_dtype
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token
from rowcast.runtime.tokenizer import load_tokenizer

SAMPLES = 2
WARM_UP_TOKENS = 8
DECODE_PROMPT = """The harbour lay quiet in the early morning, and the boats had not yet left. An old man sat on the wall, mended
a net and told the children, as he did every day, how the town had looked when he was a boy."""
DECODE_PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure."""

    model: str | None = None
    shape: str | None = None
    """Instead of a model."""
    dtype: str = "auto"
    device: str = "auto"
    eager: bool = False
    against_transformers: bool = False
    prompt_tokens: int = 1024
    """Of the prefill."""
    context: int | None = None
    """Tokens of the prompt, drawn at random, before decoding; None: a short text."""
    max_tokens: int = 64
    repeat: int = 3


class Subject(Protocol):
    """A loaded model."""

    def prefill(self, ids: list[int]) -> None:
        """Read the prompt and choose one token."""
        ...

    def decode(self, ids: list[int], tokens: int) -> list[float]:
        """Generate `tokens` tokens greedily, end tokens ignored; the clock at each."""
        ...


class Rowcast:
    """Ours, as a user calls it."""

    def __init__(self, model: str | Checkpoint, dtype: torch.dtype, device: Literal["cpu", "cuda"], eager: bool) -> None:
        self.llm = LLM(
            model,
            ladder="plain",
            dtype=_name(dtype),
            weights="unpacked",  # the peer's are
            device=device,
            eager=eager,
            prefix_cache=False,  # the peer runs each prompt, too
            progress=False,
        )

    def prefill(self, ids: list[int]) -> None:
        self.llm.generate(ids, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False))

    def decode(self, ids: list[int], tokens: int) -> list[float]:
        # Text is held back while it may still change, and special tokens have none: chunks come token by token without it.
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        return [time.perf_counter() for _ in self.llm.stream(ids, params)]


class Transformers:
    """The peer, from the same file or, of a shape, with random weights. It runs eagerly, with its own choice of attention."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: Literal["cpu", "cuda"], shape: bool) -> None:
        if shape:
            self.model = random_peer(checkpoint.config, dtype, device)
            return
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


def random_peer(config: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """A Transformers model of this config, its weights drawn on the device. Raises UserError where Transformers does not know it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        known = AutoConfig.for_model(**config)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(known, dtype=dtype).eval()
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"Transformers makes no model of this config ({str(error).splitlines()[0]:.200})") from error


def run(settings: Settings) -> dict[str, Any]:
    """Measure and return the report: medians of each side, the floor of decode, and ratios (above 1: ours is faster).

    Raises UserError for settings that contradict each other, for a device that is not there and for a model that cannot be loaded or
    whose context is too short.
    """
    if settings.model is not None and settings.shape is not None:
        raise UserError(f"--shape {settings.shape} has random weights and --model {settings.model} its own: give one of them")
    device, _ = choose_device(settings.device)
    where: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    checkpoint = _open(settings, device)
    spec = spec_from_config(checkpoint.config)
    kind = DTYPES[choose_dtype(settings.dtype, checkpoint.stored_dtype, device)[0]]
    source = checkpoint if settings.model is None else settings.model
    sides: dict[str, Callable[[], Subject]] = {"rowcast": lambda: Rowcast(source, kind, where, settings.eager)}
    if settings.against_transformers:
        prepare_peer(*(() if settings.shape else (checkpoint,)))
        sides["transformers"] = lambda: Transformers(checkpoint, kind, where, settings.shape is not None)

    decode_prompt = _decode_prompt(settings, checkpoint, spec)
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    weight_bytes = 0
    for visit in range(settings.repeat):
        for name, load in sides.items():
            # Fresh ids at each visit, so that no cache of prefixes helps; the same for both sides.
            draw = random.Random(visit)
            prompts = [draw.choices(range(spec.vocab_size), k=settings.prompt_tokens) for _ in range(1 + SAMPLES)]
            subject, measured = _visit(load, prompts, decode_prompt, settings.max_tokens, where)
            if isinstance(subject, Rowcast):
                weight_bytes = subject.llm.plan.pass_bytes
            for key, values in measured.items():
                samples[name].setdefault(key, []).extend(values)
            del subject
            gc.collect()

    report: dict[str, Any] = {
        "benchmark": "latency",
        "model": settings.shape or settings.model,
        "random_weights": settings.shape is not None,
        "dtype": _name(kind),
        "device": where,
        "device_name": torch.cuda.get_device_name(device) if where == "cuda" else None,
        "eager": settings.eager,
        "threads": torch.get_num_threads(),
        "prompt_tokens": settings.prompt_tokens,
        "context": len(decode_prompt),
        "max_tokens": settings.max_tokens,
        "repeat": settings.repeat,
    }
    for name in sides:
        report[name] = {key: median(values) for key, values in samples[name].items()}
        report[name]["decode_ms_per_token"] = 1e3 / report[name]["decode_tokens_per_s"]
    # The k-th token of n is timed from the one before it: on average half of them stand behind the prompt.
    kv_bytes = kv_bytes_read(spec, kind.itemsize, len(decode_prompt) + settings.max_tokens // 2)
    bandwidth = copy_bandwidth() if where == "cuda" else read_bandwidth(where)
    decode = bandwidth / (weight_bytes + kv_bytes)
    report["floor"] = {
        "weight_bytes": weight_bytes,
        "kv_bytes": kv_bytes,
        "bandwidth_bytes_per_s": bandwidth,
        "decode_tokens_per_s": decode,
        "share": report["rowcast"]["decode_tokens_per_s"] / decode,
    }
    if settings.against_transformers:
        ours, theirs = report["rowcast"], report["transformers"]
        report["ratio"] = {
            "load": theirs["load_s"] / ours["load_s"],
            "prefill": theirs["prefill_s"] / ours["prefill_s"],
            "decode": ours["decode_tokens_per_s"] / theirs["decode_tokens_per_s"],
        }
    return report


def _open(settings: Settings, device: torch.device) -> Checkpoint:
    if settings.shape is not None:
        return open_shape(settings.shape, device=device)
    assert settings.model is not None
    return open_checkpoint(settings.model)


def _decode_prompt(settings: Settings, checkpoint: Checkpoint, spec: ModelSpec) -> list[int]:
    if settings.context is None and settings.shape is None:
        return load_tokenizer(checkpoint).encode(DECODE_PROMPT)[:DECODE_PROMPT_TOKENS]
    return random.Random(0).choices(range(spec.vocab_size), k=settings.context or DECODE_PROMPT_TOKENS)


def kv_bytes_read(spec: ModelSpec, width: int, entries: int) -> int:
    """Bytes of K and V that a token behind `entries` others reads in all layers, each within its window."""
    layer_bytes = kv_bytes_per_token(spec, width) // spec.num_layers
    windows = spec.windows or (None,) * spec.num_layers
    return sum(layer_bytes * min(entries, window or entries) for window in windows)


def _visit(
    load: Callable[[], Subject], prompts: list[list[int]], decode_prompt: list[int], max_tokens: int, device: str
) -> tuple[Subject, dict[str, list[float]]]:
    """Load one side and time it. The first of `prompts` warms up, each other one is a sample."""
    memory = PeakMemory(device)
    start = time.perf_counter()
    subject = load()
    measured: dict[str, list[float]] = {"load_s": [time.perf_counter() - start], "prefill_s": [], "decode_tokens_per_s": []}
    subject.prefill(prompts[0])
    subject.decode(decode_prompt, WARM_UP_TOKENS)
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
    where = report["device_name"] or f"{report['device']}, {report['threads']} threads"
    weights = ", random weights" if report["random_weights"] else ""
    title = f"{report['model']}{weights}, {report['dtype']} on {where}, batch 1{', eager' if report['eager'] else ''}"
    table = Table(title=title)
    for heading in ("", *sides, *(["ratio"] if "ratio" in report else [])):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = (
        ("load, s", "load_s", "load", 1.0),
        (f"prefill of {report['prompt_tokens']}, s", "prefill_s", "prefill", 1.0),
        (f"decode after {report['context']}, tokens/s", "decode_tokens_per_s", "decode", 1.0),
        ("  ms a token", "decode_ms_per_token", "", 1.0),
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
    console.print(
        f"decode floor: {floor['weight_bytes'] / 2**20:.0f} MiB of weights and {floor['kv_bytes'] / 2**20:.0f} MiB of KV at "
        f"{floor['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s = {floor['decode_tokens_per_s']:.1f} tokens/s "
        f"({1e3 / floor['decode_tokens_per_s']:.3f} ms); reached {floor['share']:.0%}"
    )

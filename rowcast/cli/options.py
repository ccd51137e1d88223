"""The options that several verbs share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""`runtime.checkpoint.DEFAULT_MODEL`, which would take seconds to import."""

_MODEL = "Model"
_SAMPLING = "Sampling"

Model = Annotated[str, typer.Option("--model", "-m", help="A directory, a GGUF file or a hub id.", rich_help_panel=_MODEL)]
DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Number format of weights and KV.", rich_help_panel=_MODEL),
]
Weights = Annotated[
    Literal["auto", "packed", "unpacked"],
    typer.Option(
        "--weights",
        help="How those of a quantised checkpoint are held: in its few bits, or in the number format of passes.",
        rich_help_panel=_MODEL,
    ),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where to run.", rich_help_panel=_MODEL)]
Ladder = Annotated[
    str,
    typer.Option(
        "--ladder",
        help="Who drafts: auto, plain, ngram, triforce, dejavu, hire, or rungs as in 'ngram / self:kv=512 / plain'.",
        rich_help_panel=_MODEL,
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        help="A small model with the same vocabulary that drafts, such as smollm2-draft, or ngram.",
        rich_help_panel=_MODEL,
    ),
]
DraftDevice = Annotated[
    str | None,
    typer.Option(
        "--draft-device",
        help="Of several ranks' driver, for a draft with at=driver, as in cuda:2. [a GPU that the ranks leave, else cpu]",
        rich_help_panel=_MODEL,
    ),
]
KVBudget = Annotated[
    int | None,
    typer.Option("--kv-budget", help="KV entries that the model sees when it drafts for itself.", rich_help_panel=_MODEL),
]
Verification = Annotated[
    Literal["coupled", "maximal"],
    typer.Option(
        "--verification",
        help="coupled: token for token what plain decoding gives. maximal: the same law, more drafts accepted.",
        rich_help_panel=_MODEL,
    ),
]
Mode = Annotated[
    Literal["exact", "approximate"],
    typer.Option("--mode", help="Who has the last word: the exact model or a sparse or low-bit rung.", rich_help_panel=_MODEL),
]
TensorParallel = Annotated[int, typer.Option("--tp", help="Tensor-parallel ranks.", rich_help_panel=_MODEL)]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory", help="Most GPU memory to take, context and libraries included, as in 24GiB.", rich_help_panel=_MODEL
    ),
]
HostMemory = Annotated[
    str | None, typer.Option("--host-memory", help="Most host memory to take, as in 64GiB.", rich_help_panel=_MODEL)
]
MaxModelLen = Annotated[
    int | None, typer.Option("--max-model-len", help="Longest sequence, prompt and output.", rich_help_panel=_MODEL)
]
Density = Annotated[
    float | None,
    typer.Option("--density", help="Share of the neurons that dejavu, hire and auto let a token use.", rich_help_panel=_MODEL),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="What rowcast calibrate wrote: predictors, density, best scorer; left out: the model's own.",
        rich_help_panel=_MODEL,
    ),
]

Eager = Annotated[
    bool,
    typer.Option(
        "--eager", help="Launch a GPU's passes call by call, not as captured graphs; a CPU has none.", rich_help_panel=_MODEL
    ),
]

Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0 takes the most likely token.", rich_help_panel=_SAMPLING)
]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from the smallest set of this mass.", rich_help_panel=_SAMPLING)]
TopK = Annotated[int, typer.Option("--top-k", help="Sample from the K likeliest tokens; 0: all.", rich_help_panel=_SAMPLING)]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens below this share of the likeliest.", rich_help_panel=_SAMPLING)]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="Text that ends the output; repeatable.", rich_help_panel=_SAMPLING)
]

_ARGUMENTS = {
    name: f"--{name.replace('_', '-')}"
    for name in (
        "ladder", "draft", "draft_device", "kv_budget", "verification", "mode", "density", "calibration", "dtype", "weights", "device",
        "gpu_memory", "host_memory", "max_model_len", "plan", "gpus", "link", "inter_node", "context", "prompt", "batch", "acceptance",
        "hit_rate", "groups", "picture", "host", "port", "max_waiting", "deadline", "drain_timeout", "max_num_seqs",
    )
} | {"tensor_parallel_size": "--tp", "tensor_parallel": "--tp", "prefill_stall_s": "--prefill-stall"}  # fmt: skip
"""Arguments of `LLM` and `plan_for`, and the options that they come from."""


def as_typed(sentence: str) -> str:
    """The library's sentence about an argument, as in kv_budget=64, with the option's name: --kv-budget 64."""
    return re.sub(rf"\b({'|'.join(_ARGUMENTS)})=", lambda found: _ARGUMENTS[found[1]] + " ", sentence)

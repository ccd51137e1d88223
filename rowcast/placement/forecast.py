"""What a plan foretells: memory by device, time by stage and link, the bottleneck, what was rejected, what would help. Torch-free.

Plain numbers and texts, so that a plan file holds them as they are and a table or a picture needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rowcast.placement.workload import Input

MEMORY_CLASSES = ("weights", "draft", "rung weights", "KV", "rung KV", "buffers", "work", "graphs", "margin")
"""Of a device's memory, in the order in which tables and pictures show them. margin: what stays free."""

LINKS = ("GPU memory", "compute", "bus", "host memory", "CPU", "peers", "network", "launches", "disk")
"""What a stage's time may be spent on."""

TIERS = ("resident", "streamed", "rows", "cpu", "peer", "host", "disk")
"""Where a part of the weights or the KV lies, and how it is read.

resident: in the memory next to the compute. streamed: in pinned host memory, whole layers copied ahead of their pass. rows: likewise,
but only the rows that a token needs. cpu: in host memory, computed there. peer: in another GPU's memory, read over their link. host: in
host memory, looked up and never computed with (embeddings). disk: in the checkpoint's files, whole layers read ahead of their pass;
the planner does not use it, what a model that is too large for all memory falls back to does.
"""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """One device, or one host's memory."""

    device: str
    """Such as "GPU 0" or "host of node 0"."""
    card: str
    """What it is: a card's name, "host"."""
    budget_bytes: int
    classes: dict[str, int]
    """By `MEMORY_CLASSES`, margin included: they add up to the budget. On a host weights and KV are pinned."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What one rung's passes take of a committed token's time."""

    rung: str
    name: str
    """attention, neurons, LM head, KV, draft, collectives, launches: what it does."""
    bytes: dict[str, float]
    """By `LINKS`, of all ranks together, for each committed token."""
    seconds: dict[str, float]
    """By `LINKS`, of the slowest rank, for each committed token, as if nothing overlapped."""


@dataclass(frozen=True, slots=True)
class RungTime:
    """One rung's passes."""

    rung: str
    passes_per_token: float
    """For each committed token of one sequence."""
    pass_s: float
    """Seconds of one pass, everything that overlaps overlapped."""
    bound_by: str
    """Of `LINKS`, what a pass waits for."""
    overlap: str
    """What hides under what, in words."""


@dataclass(frozen=True, slots=True)
class Share:
    """A part of the model and where it lies."""

    ranks: list[int]
    """Those that hold equal shares of their own heads, neurons or table rows."""
    part: str
    """attention, neurons, LM head, embeddings or KV."""
    layer: int
    """-1: of no layer."""
    tier: str
    """Of `TIERS`."""
    first: int
    count: int
    of: int
    """Groups first .. first + count of the layer's `of` groups of that part; of neurons, most frequent first."""
    bytes: int
    """On each of the ranks."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """What was looked at and not taken."""

    what: str
    seconds_per_token: float | None
    """None: it does not fit."""
    reason: str


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The best plan for a machine that is a little different."""

    change: str
    """Such as "1 GiB more on each GPU"."""
    seconds_per_token: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What to expect of a plan. Seconds and bytes are for each committed token of one sequence unless they say otherwise."""

    model: str
    machine: str
    gpus: list[str]
    """The card of each rank."""
    layout: str
    """Such as "tensor parallel over 4 GPUs"."""
    tensor_parallel: int
    pipeline_stages: int
    context: int
    prompt: int
    batch: int
    ladder: str
    seconds_per_token: float
    """For one sequence; a batch commits as many tokens as it has sequences in that time."""
    tokens_per_s: float
    """Of all sequences together."""
    tokens_per_s_range: list[float]
    """Least and most: acceptances and efficiencies at the ends of what their sources allow."""
    first_token_s: float
    """From the prompt's arrival to the first token: the prefill."""
    tokens_per_round: float
    bottleneck: str
    """Of `LINKS`: where most of a token's time is waited."""
    bottleneck_share: float
    """Of a token's time."""
    gap: float
    """How far the placement may be from the best one: (seconds - proven lower bound) / seconds."""
    solver_s: float
    greedy_seconds_per_token: float | None
    """Of the greedy placement, most often read first; None where it finds none."""
    groups: int
    """That the solver placed, of all ranks."""
    memory: list[DeviceMemory]
    rungs: list[RungTime]
    stages: list[Stage]
    shares: list[Share]
    alternatives: list[Alternative]
    what_if: list[WhatIf]
    inputs: list[Input]
    notes: list[str] = field(default_factory=list)

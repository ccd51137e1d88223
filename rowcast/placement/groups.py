"""What a planner places: parts of a model in groups of rows, with their bytes and how much of them each rung reads. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rowcast.placement.layout import Layout
from rowcast.placement.workload import LadderUse, Workload, united, writes_late
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token, parameter_count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

PARTS = ("attention", "neurons", "LM head", "embeddings", "KV")
ATTENTION, NEURONS, HEAD, EMBEDDINGS, KV = range(5)

PIECES = {ATTENTION: 4, HEAD: 32, EMBEDDINGS: 1, KV: 8}
"""Parts that a layer's attention and KV and a rank's table are placed in, where they can be divided."""

NEURONS_TOGETHER = 16
"""Of one group, at least: what a kernel's block takes."""


@dataclass(frozen=True, slots=True)
class Groups:
    """What is placed, a row each: arrays of [G]."""

    site: NDArray[np.int64]
    part: NDArray[np.int64]
    layer: NDArray[np.int64]
    index: NDArray[np.int64]
    """Of its part in its layer."""
    of: NDArray[np.int64]
    """Groups that the part has in the layer."""
    bytes: Floats
    """On one rank."""
    reads: Floats
    """[K, G]: share of its bytes that a pass of each rung reads."""

    def __len__(self) -> int:
        return len(self.bytes)


def mlp_bytes(spec: ModelSpec, width: int) -> float:
    return ((2 if spec.gated else 1) + 1) * spec.hidden_size * spec.intermediate_size * width


def _attention_bytes(spec: ModelSpec, width: int, tp: int) -> tuple[float, float]:
    """Of one layer on one rank: what belongs to query heads, and what to KV heads."""
    kv_heads = max(1.0, spec.num_kv_heads / tp)
    queries = 2 * spec.hidden_size * spec.num_heads / tp * spec.head_dim * width
    return queries, 2 * spec.hidden_size * kv_heads * spec.head_dim * width


def unplaced_bytes(spec: ModelSpec, width: int, layers: int) -> int:
    """Weights of so many layers that no group holds, and that every rank holds whole: norms, biases, the table of positions."""
    queries, keys = _attention_bytes(spec, 1, 1)
    matrices = round(queries + keys + mlp_bytes(spec, 1))
    tables = spec.vocab_size * spec.embed_size * (1 if spec.tied_embeddings else 2)
    others = parameter_count(spec) - tables - spec.num_layers * matrices
    return others * width * layers // spec.num_layers


def make_groups(work: Workload, ladder: LadderUse, layout: Layout, wanted: int) -> Groups:
    import numpy as np

    spec, width, tp = work.spec, work.width, layout.tensor_parallel
    rungs = ladder.rungs
    columns: dict[str, list[NDArray[np.generic]]] = {name: [] for name in ("site", "part", "layer", "index", "of", "bytes")}
    read: list[Floats] = []

    def add(site: int, part: int, layers: Sequence[int], pieces: int, total: float, reads: Floats) -> None:
        """`total`: bytes of the part in one layer. `reads`: [K, layers, pieces] or what broadcasts to it."""
        count = len(layers) * pieces
        columns["site"].append(np.full(count, site))
        columns["part"].append(np.full(count, part))
        columns["layer"].append(np.repeat(np.array(layers), pieces))
        columns["index"].append(np.tile(np.arange(pieces), len(layers)))
        columns["of"].append(np.full(count, pieces))
        columns["bytes"].append(np.full(count, total / pieces))
        read.append(np.broadcast_to(reads, (len(rungs), len(layers), pieces)).reshape(len(rungs), count))

    tokens = np.array([max(1, round(rung.tokens * rung.sequences * work.batch)) for rung in rungs])
    uses = np.array([1.0 if ladder.reads_placed(rung) else 0.0 for rung in rungs])
    placed = ladder.placed_share
    heads = np.array([united(rung.heads, int(n)) for rung, n in zip(rungs, tokens, strict=True)])
    written = [rung.kv_heads if layout.on_cpu else rung.gpu_kv_heads for rung in rungs]
    late = np.array([united(share, int(n)) for share, n in zip(written, tokens, strict=True)])
    lm = np.array(
        [united(rung.head_share, int(n)) if rung.head_share < 1 else 1.0 for rung, n in zip(rungs, tokens, strict=True)]
    )
    shown = [min(1.0, (rung.kv_entries or work.context) / work.context) * rung.sequences for rung in rungs]
    kv = np.array([0.0 if rung.model is not None else part for rung, part in zip(rungs, shown, strict=True)])
    hot = np.array(work.hotness.layers)
    for i, site in enumerate(layout.sites):
        stage = layout.stages[site.stage]
        layers = list(stage.layers)
        most = max(1, spec.intermediate_size // tp // NEURONS_TOGETHER)
        pieces = min(most, max(1, -(-wanted // spec.num_layers) - PIECES[ATTENTION] - PIECES[KV]))
        chances = _regrouped(hot[layers], pieces)
        need = np.empty((len(rungs), len(layers), pieces))
        for k, rung in enumerate(rungs):
            if rung.neurons >= 1:
                need[k] = uses[k]
                continue
            down = _united(_with_mean(chances, rung.neurons), int(tokens[k]))
            inner = _united(_with_mean(chances, max(rung.candidates, rung.neurons)), int(tokens[k]))
            parts = 2 if spec.gated else 1
            need[k] = uses[k] * (parts * inner + down) / (parts + 1)
        queries, keys = _attention_bytes(spec, width, tp)
        kv_heads = late if layout.on_cpu or writes_late(spec, work.batch, keys) else 1.0
        attended = uses * (heads * queries + kv_heads * keys) / (queries + keys)
        add(i, ATTENTION, layers, PIECES[ATTENTION], (queries + keys) * placed, attended[:, None, None])
        add(i, NEURONS, layers, pieces, mlp_bytes(spec, width) / tp * placed, need)
        kv_layer = kv_bytes_per_token(spec, width) / spec.num_layers * max(1, tp // spec.num_kv_heads) / tp
        add(i, KV, layers, PIECES[KV], kv_layer * work.context * work.batch, kv[:, None, None])
        table = spec.vocab_size * spec.embed_size * width / tp
        if site.stage == len(layout.stages) - 1:
            add(i, HEAD, [-1], PIECES[HEAD], table * placed, (uses * lm)[:, None, None])
        if site.stage == 0 and (not spec.tied_embeddings or len(layout.stages) > 1 or (ladder.alone_bits and ladder.own_head)):
            add(i, EMBEDDINGS, [-1], PIECES[EMBEDDINGS], table, np.zeros((len(rungs), 1, 1)))
    merged = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Groups(**merged, reads=np.concatenate(read, axis=1))


def _united(probability: Floats, tokens: int) -> Floats:
    """`united`, of an array."""
    found: Floats = 1.0 - (1.0 - probability) ** tokens
    return found


def _with_mean(chances: Floats, mean: float) -> Floats:
    """Probabilities in proportion to `chances` [L, H], none above 1, each layer's share of the whole as it was, with this mean."""
    import numpy as np

    wanted = np.minimum(1.0, mean * chances.mean(axis=1, keepdims=True) / max(chances.mean(), 1e-12))
    low, high = np.zeros_like(wanted), 1 / np.maximum(chances.min(axis=1, keepdims=True), 1e-9)
    for _ in range(40):
        middle = (low + high) / 2
        short = np.minimum(1.0, middle * chances).mean(axis=1, keepdims=True) < wanted
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    found: Floats = np.minimum(1.0, high * chances)
    return found


def _regrouped(hot: Floats, pieces: int) -> Floats:
    """[L, H] probabilities of equal groups as [L, pieces]: means of neighbours."""
    import numpy as np

    ends = np.linspace(0, hot.shape[1], pieces + 1)
    summed = np.concatenate([np.zeros((len(hot), 1)), np.cumsum(hot, axis=1)], axis=1)
    grid = np.arange(hot.shape[1] + 1)
    at = np.stack([np.interp(ends, grid, row) for row in summed])
    found: Floats = np.diff(at, axis=1) / np.diff(ends)
    return found

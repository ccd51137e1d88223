"""What a sparse rung takes beside the model's weights, and what a pass of any rung reads, before anything is loaded. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from rowcast.kernels.lowbit_sizes import stored_bytes, work_bytes
from rowcast.placement.resident import pass_bytes
from rowcast.runtime.ladder.spec import Rung
from rowcast.runtime.lowbit_sizes import replaced_bytes, rounded_bytes
from rowcast.runtime.packed_sizes import PackedSizes
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.checks import AHEAD, BITS, DIRECTIONS, FITTED, head_bits
from rowcast.runtime.spec import ModelSpec, layer_parameters

_SCORE_BYTES = 20
"""For each token and neuron while a selector works: estimates, scores, and what is kept of them."""

LATE_TOKENS = 16
"""Every so many tokens all heads that were skipped are filled in (`lazy`)."""

_REFINED = 1 / 4
"""Share of the LM head's rows that its first stage leaves to the second, where nobody measured it."""


def bank_bytes(spec: ModelSpec, width: int) -> int:
    """The layers in the bank layout: their products' weights, and each neuron's place and column length."""
    return spec.num_layers * (layer_parameters(spec) * width + 12 * spec.intermediate_size)


def copied_bytes(spec: ModelSpec, width: int) -> int:
    """Most that a library product copies at once: a layer's up, down or output table. `width`: bytes of an element."""
    return max(spec.intermediate_size, spec.num_heads * spec.head_dim) * spec.hidden_size * width


def late_bytes(spec: ModelSpec, width: int) -> int:
    """One sequence's kept inputs, on every rank; `width`: bytes of an element. None for grouped heads, whose K/V are never late."""
    return spec.num_layers * LATE_TOKENS * spec.hidden_size * width if spec.group_size == 1 else 0


def layer_shares(mean: float, layers: int, calibration: Calibration | None, by: str | None = None) -> list[float]:
    """The share of neurons that each layer keeps where they keep `mean` on average, from the calibration's `shares` [G, L].

    `by`: with cut=threshold, the scorer, whose levels decide where there are some.
    """
    if calibration is None or mean >= 1:
        return [mean] * layers
    grid, table = calibration.densities, calibration.shares(layers, by)
    above = next(i for i, density in enumerate(grid) if density >= mean)
    if above == 0:
        return [float(share) * (mean / grid[0]) for share in table[0]]
    weight = (mean - grid[above - 1]) / (grid[above] - grid[above - 1])
    return [float(low) * (1 - weight) + float(high) * weight for low, high in zip(table[above - 1], table[above], strict=True)]


def rung_shares(rung: Rung, layers: int, calibration: Calibration | None) -> list[float]:
    """`layer_shares` of a rung. Precondition: it chooses neurons."""
    assert rung.mlp is not None
    return layer_shares(rung.mlp, layers, calibration, (rung.by or "q4") if rung.cut == "threshold" else None)


def fetched_share(rung: Rung, spec: ModelSpec, calibration: Calibration | None) -> float:
    """Of a layer's neurons, those that the buffer for one call's fetched rows has room for; 0: the rung chooses none.

    Twice what a token needs of the layer that keeps most, on average, as several tokens need more. With cut=threshold a token's list
    may have all of them, and a graph has calls for as many: with room for half they are two at most.
    """
    if rung.mlp is None:
        return 0.0
    least = 0.5 if rung.cut == "threshold" else 0.0
    return min(1.0, max(least, 2 * max(rung_shares(rung, spec.num_layers, calibration))))


def kept_neurons(share: float, neurons: int) -> int:
    """Of a layer's neurons, those that a token keeps."""
    return min(neurons, max(1, round(share * neurons)))


def asks(shares: Sequence[float], neurons: int) -> list[bool]:
    """By layer, whether a token's neurons are asked for: a layer that keeps all asks nobody, unless all layers do."""
    found = [kept_neurons(share, neurons) < neurons for share in shares]
    return found if any(found) else [True] * len(found)


def asking_layers(spec: ModelSpec, rung: Rung, calibration: Calibration | None) -> int:
    """Layers of which a rung's tokens are asked for their neurons."""
    if rung.mlp is None:
        return 0
    return sum(asks(rung_shares(rung, spec.num_layers, calibration), spec.intermediate_size))


def late_share(heads: float) -> float:
    """Of all heads' keys and values, what a token's pass writes, and reads rows for, where skipped heads are filled in later."""
    return heads + (1 - heads) / LATE_TOKENS


def rounds_write_late(lookahead: int, *, last: bool) -> bool:
    """Whether rounds that the device runs, of `lookahead` drafted tokens at most, keep inputs of enough tokens to leave keys and values
    to later passes: a lower rung's to those of the round; the last one's to later rounds, so that two rounds' inputs are kept."""
    return (2 if last else 1) * (lookahead + 1) <= LATE_TOKENS


def predictor_bytes(spec: ModelSpec, rung: Rung, calibration: Calibration | None) -> int:
    """Proxies and predictors of a rung: of its neurons, with what their columns count for, its heads and its LM head."""
    lengths = 4 * spec.intermediate_size if calibration is not None and "layers.0.sensitivity" in calibration else 0
    found = asking_layers(spec, rung, calibration) * (_scorer_bytes(spec, rung, calibration) + lengths)
    if rung.heads is not None:
        found += spec.num_layers * _head_selector_bytes(spec)
    if rung.lm == "hire":
        found += sum(_head_stage_bytes(spec, stage, calibration) for stage in range(len(head_bits(calibration))))
    return found


def _scorer_bytes(spec: ModelSpec, rung: Rung, calibration: Calibration | None) -> int:
    """One layer's; a pass reads it all."""
    name = (rung.by or "").removesuffix(AHEAD)
    hidden, rows = spec.hidden_size, spec.intermediate_size * (2 if spec.gated else 1)
    if rung.mlp is None or name not in (*BITS, *FITTED):
        return 0
    if name in BITS:
        each = stored_bytes(rows, hidden, BITS[name]) + 4 * rows * spec.mlp_bias
        if rung.by != name:
            each += stored_bytes(hidden, hidden, 8)
    else:
        assert calibration is not None
        rank = calibration.shape(f"layers.0.{rung.by}.a")[0]
        each = stored_bytes(rank, hidden, 8) + stored_bytes(rows, rank, 8) + 4 * rows
    return each


def making_bytes(spec: ModelSpec, rung: Rung, width: int, calibration: Calibration | None) -> int:
    """Most that making its proxies takes for a while: of a layer, what is rounded, twice where tables are put together of parts that
    lie elsewhere, and a piece of it in float32."""
    name = (rung.by or "").removesuffix(AHEAD)
    rows = spec.intermediate_size * (2 if spec.gated else 1)
    if rung.mlp is None or name not in (*BITS, *FITTED):
        return 0
    if name in BITS:
        return 2 * rows * spec.hidden_size * width + work_bytes(rows * spec.hidden_size)
    assert calibration is not None
    rank = calibration.shape(f"layers.0.{rung.by}.a")[0]
    return 2 * rows * rank * 4 + work_bytes(rows * rank)


def score_bytes(spec: ModelSpec) -> int:
    """For each token of a pass: scores and choices."""
    return _SCORE_BYTES * spec.intermediate_size


def expected_bytes(
    spec: ModelSpec, rung: Rung, width: int, calibration: Calibration | None, packed: PackedSizes | None = None
) -> int:
    """Weights that a pass of a rung self or plain over one token reads, where the native part runs it. `packed`: as which the model's
    weights are held.

    Of lm=hire what the calibration measured; without one its first stage and `_REFINED` of the second, a guess.
    """
    if rung.bits is not None:
        return pass_bytes(spec, width) - replaced_bytes(spec, width) + rounded_bytes(spec, rung.bits)
    if packed is not None and not rung.sparse:
        return packed.pass_bytes(spec, width)
    found = pass_bytes(spec, width) + proxy_bytes(spec, rung, calibration)
    row = spec.num_layers * spec.hidden_size * width
    if rung.mlp is not None:
        products = 2 if spec.gated else 1
        unread = spec.num_layers * spec.intermediate_size * products * (1 - inner_share(spec, rung))
        found -= round(unread * (spec.hidden_size + spec.mlp_bias) * width)
        found -= round(spec.intermediate_size * row * (1 - rung.mlp))
    if rung.heads is not None:
        found -= round(2 * spec.num_heads * spec.head_dim * row * (1 - rung.heads))
    if rung.lm == "hire":
        found += round((head_share(spec, calibration, width) - 1) * spec.vocab_size * spec.embed_size * width)
    return found


def proxy_bytes(spec: ModelSpec, rung: Rung, calibration: Calibration | None) -> int:
    """Of that, proxies and predictors of neurons and heads, and the lengths of neurons' columns."""
    found = asking_layers(spec, rung, calibration) * layer_proxy_bytes(spec, rung, calibration)
    if rung.heads is not None:
        found += spec.num_layers * _head_selector_bytes(spec)
    return found


def layer_proxy_bytes(spec: ModelSpec, rung: Rung, calibration: Calibration | None) -> int:
    """Of one layer whose neurons are asked for: their proxy or predictor, and the lengths of their columns."""
    lengths = 4 * spec.intermediate_size if rung.mlp is not None and rung.by != "gate" else 0
    return _scorer_bytes(spec, rung, calibration) + lengths


def inner_share(spec: ModelSpec, rung: Rung) -> float:
    """Of the rows of the MLP's first products, those that a rung reads for one token: candidates, and what a scorer needs exactly."""
    if rung.mlp is None:
        return 1.0
    products = 2 if spec.gated else 1
    exact = {"oracle": products, "gate": 1}.get(rung.by or "", 0)
    return (exact + (products - exact) * min(1.0, rung.mlp * rung.over)) / products


def head_share(spec: ModelSpec, calibration: Calibration | None, width: int) -> float:
    """Bytes that lm=hire reads for one token, over those of all rows of the LM head."""
    measured: float | None = None if calibration is None else calibration.description.get("lm_head_share")
    if measured is not None:
        return measured
    first, *others = (_head_stage_bytes(spec, stage, calibration) for stage in range(len(head_bits(calibration))))
    return (first + _REFINED * sum(others)) / (spec.vocab_size * spec.embed_size * width)


def _head_selector_bytes(spec: ModelSpec) -> int:
    """One layer's predictor of heads: a linear map in float32."""
    return 4 * spec.num_heads * (spec.hidden_size + 1)


def _head_stage_bytes(spec: ModelSpec, stage: int, calibration: Calibration | None) -> int:
    """One of the LM head's proxies with its radii; the first has the directions and a correction along them."""
    found = stored_bytes(spec.vocab_size, spec.embed_size, head_bits(calibration)[stage]) + 8 * spec.vocab_size
    if stage or calibration is None or DIRECTIONS not in calibration:
        return found
    count = calibration.shape(DIRECTIONS)[0]
    return found + stored_bytes(spec.vocab_size, count, head_bits(calibration)[0]) + 4 * count * spec.embed_size

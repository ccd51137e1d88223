"""What `opt_175b.py` holds its figures against: a token's bytes by part."""

from __future__ import annotations

from collections.abc import Sequence

from rowcast.calibration.fitting import default_rank
from rowcast.placement.workload import writes_late
from rowcast.runtime.sparse.sizes import late_share
from rowcast.runtime.spec import ModelSpec

DENSE_SHARE = 10 / 96
"""Of the layers, the last ones, that keep all neurons."""
NEURONS = 5000 / 49152
WIDTH = 2


class Bytes:
    """What a rank reads for a token, by part; of one sequence."""

    def __init__(self, spec: ModelSpec, ranks: int, context: int, kept: Sequence[float] | None, heads: float) -> None:
        """`kept`: share of the neurons by layer; None: dense. `heads`: share of the heads; all of them write their keys and
        values, most of them late where `writes_late` says so."""
        hidden, layers = spec.hidden_size, spec.num_layers
        rank = default_rank(hidden, spec.activation == "relu")
        neurons = sum(kept) if kept is not None else layers
        square = hidden * hidden * WIDTH / ranks
        written = late_share(heads) if writes_late(spec, 1, 2 * square) else 1.0
        kv = 2 * layers * spec.num_kv_heads * spec.head_dim * WIDTH * context
        own = 0.0 if kept is None else sum(share < 1 for share in kept) * (rank * hidden + rank * spec.intermediate_size / ranks)
        chooses = 0.0 if kept is None else 4 * layers * hidden * spec.num_heads / ranks
        self.parts = {
            "attention": 2 * layers * square * (heads + written) + kv * heads / ranks,
            "MLP": 2 * hidden * spec.intermediate_size * WIDTH * neurons / ranks,
            "predictors": own + chooses,
            "all-reduce": 0.0,
            "LM head": spec.vocab_size * spec.embed_size * WIDTH / ranks,
            "gaps": 0.0,
        }

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def kept(layers: int) -> list[float]:
    """By layer, the share of its neurons."""
    whole = max(1, round(DENSE_SHARE * layers))
    return [NEURONS] * (layers - whole) + [1.0] * whole


def mean_kept(layers: int) -> float:
    return round(sum(kept(layers)) / layers, 4)

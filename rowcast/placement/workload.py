"""What is to be run: a model, a ladder as its passes, context and batch. Torch-free.

What the cost model knows of a ladder, and nothing of how it runs. `runtime/forecast.py` makes these from a ladder's text; the cost
model does not know rungs by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rowcast.placement.hardware import Origin
from rowcast.runtime.spec import ModelSpec

PUBLISHED_RELU_HOT = 0.26
"""Share of an OPT-30B's neurons that take 80% of the activations (PowerInfer, arXiv 2312.12456, section 3.1, figure 5)."""
LATE_BYTES = 1 << 25
"""Of a layer's rows of keys and values on a GPU: with fewer, leaving some out saves less time than its launches take."""


@dataclass(frozen=True, slots=True)
class Input:
    """One figure that a prediction rests on."""

    name: str
    value: float
    origin: Origin
    source: str = ""
    """Paper and section, datasheet, calibration or file; empty where the user gave it."""


@dataclass(frozen=True, slots=True)
class Hotness:
    """How often neurons are needed, most frequent first: what decides which of them are worth memory next to the compute.

    `layers[i][g]`: probability that one token needs a neuron of group g of layer i; groups of equal size. All layers have equally many.
    """

    layers: tuple[tuple[float, ...], ...]
    origin: Origin
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RungUse:
    """One rung of a ladder as the cost model sees it. Bytes are those of the whole model, not of a rank."""

    name: str
    """As a user writes it."""
    passes: float
    """In a round."""
    tokens: float
    """Of one sequence in a pass, on average: 1 while it drafts, proposals and the pending token while it verifies."""
    sequences: float = 1.0
    """Share of the sequences that take part in a pass: below the last rung those that speculate."""
    model: ModelSpec | None = None
    """Of a draft, which lies whole on every rank that runs it; None: the target."""
    at: str = "ranks"
    """Which ranks run the draft: ranks (all of them), first, or driver (none)."""
    asked: float = 0.0
    """Times in a round that ranks which do not run it wait for its proposals."""
    kv_entries: int | None = None
    """Entries that its attention reads at most; None: the whole context."""
    renewed: float = 0.0
    """Of these, those that a round copies anew where the KV lies elsewhere."""
    neurons: float = 1.0
    """Share that one token needs."""
    fetched: float = 0.0
    """Share of a layer's neurons that the buffer for one call's fetched rows has room for."""
    candidates: float = 1.0
    """Share whose inner rows are read: more than `neurons` where candidates are ranked again."""
    heads: float = 1.0
    """Share of query heads that one token needs."""
    kv_heads: float = 1.0
    """Share of the heads whose keys and values a token's pass writes, where it may leave some to later ones."""
    gpu_kv_heads: float = 1.0
    """The same in rounds that a GPU runs, which have to draft few enough tokens for that."""
    head_share: float = 1.0
    """Bytes that the LM head reads over those of all its rows."""
    own_weights_bytes: int = 0
    """Weights of its own that it reads in place of the target's (a low-bit copy); 0: it reads the target's."""
    own_bits: int = 0
    """Bits of those."""
    own_weights_share: float = 1.0
    """Their bytes over those of the same matrices in the target's own format."""
    proxy_bytes: int = 0
    """Proxies and predictors that a pass reads beside them."""
    whole_proxy_bytes: int = 0
    """The same of layers that keep all their neurons: needed only where rows of them are fetched."""
    asking: float = 1.0
    """Share of the layers whose neurons are chosen; others keep all."""
    ahead: bool = False
    """Neurons are known one sub-layer before they are needed, so that choosing and fetching them hides under attention."""
    heads_ahead: bool = False
    """Likewise heads, so that choosing them hides under the MLP of the layer before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderUse:
    """A ladder with what it takes, resolved."""

    name: str
    """As a user writes it, gammas included."""
    family: str = ""
    """The same for ladders that differ in their gammas only."""
    rungs: tuple[RungUse, ...]
    """Cheapest first; the last decides."""
    tokens_per_round: float
    """Committed for one sequence, on average."""
    tokens_per_round_range: tuple[float, float]
    """The same where acceptance is as low and as high as its source allows."""
    fixed_bytes: int = 0
    """Weights that lie on every rank whole: drafts, but those in the driver."""
    shared_bytes: int = 0
    """Proxies, predictors, low-bit copies: divided among ranks."""
    speculating: float = 1.0
    """Share of the sequences that have room in the caches of the rungs below the last."""
    draft_kv_bytes: int = 0
    """KV of drafts for one sequence, whole on every rank that runs them."""
    slot_bytes: int = 0
    """Caches of the rungs below the last, for one sequence, divided among ranks, where the KV that they show a part of is elsewhere."""
    listed_slot_bytes: int = 0
    """The same where the whole KV lies next to the compute and rungs read their part of it where it lies."""
    kv_share: float = 0.0
    """Chunk summaries, over the bytes of the target's KV."""
    work_bytes: int = 0
    """Work space of the largest step, on every rank, beyond what a plain model takes."""
    listed_work_bytes: int = 0
    """The same where rungs read their part of the KV where it lies: with what they choose it in."""
    alone_bits: int = 0
    """Bits of the weights that its rungs read where none of them reads the target's own: these are placed, and the target's products
    are not held. 0: the target's own are."""
    packed: bool = False
    """Those are the target's own, as its checkpoint packs them."""
    own_head: bool = True
    """The LM head is among them; else it is the embeddings' table."""
    inputs: tuple[Input, ...] = ()
    """Acceptances, densities, hit rates and where they are from."""

    @property
    def apart(self) -> bool:
        """Whether a draft does not run on every rank, so that the host drives rounds."""
        return any(rung.at != "ranks" for rung in self.rungs)

    def reads_placed(self, rung: RungUse) -> bool:
        """Whether a rung's passes read the weights that are placed: the target's own, or the only ones that there are."""
        return rung.model is None and rung.own_bits == self.alone_bits

    @property
    def placed_share(self) -> float:
        """Bytes of the layers' and the LM head's matrices that are placed, over those in the target's own format."""
        return self.rungs[-1].own_weights_share if self.alone_bits else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a plan is for."""

    model: str
    """As the user named it."""
    spec: ModelSpec
    width: int
    """Bytes of an element of weights and KV."""
    context: int
    """Tokens of a sequence at which speed is predicted, and of the longest that has to fit."""
    prompt: int
    """Tokens of the prompt whose first output token is waited for."""
    batch: int
    """Sequences that run together, each of `context` tokens."""
    ladders: tuple[LadderUse, ...]
    """To choose from."""
    fallbacks: tuple[LadderUse, ...] = ()
    """What the user did not ask for, to be named where nothing else fits."""
    hotness: Hotness
    hit_rate: float = 0.0
    """Of rows fetched from the host, the share that the GPU's row cache already holds."""
    work_bytes: int = 0
    """Work space of a plain step, one rank's."""
    inputs: tuple[Input, ...] = ()


def assumed_hotness(spec: ModelSpec, density: float, groups: int) -> Hotness:
    """Where nobody measured: for ReLU the published concentration, for other activations none at all.

    The hottest share f of the neurons takes f ** a of the activations, with a from `PUBLISHED_RELU_HOT`; probabilities are its slope,
    scaled to a mean of `density` and cut at 1.
    """
    origin: Origin = "assumed"
    if density >= 1:
        flat, source = (1.0,) * groups, "all neurons are read"
    elif spec.activation != "relu":
        flat, source = (density,) * groups, f"no hot set: {spec.activation} models were not found to have one"
    else:
        power = math.log(0.8) / math.log(PUBLISHED_RELU_HOT)
        flat = _scaled([((g + 1) / groups) ** power - (g / groups) ** power for g in range(groups)], density)
        source = "PowerInfer, arXiv 2312.12456, figure 5: 26% of OPT-30B's neurons take 80% of the activations"
    return Hotness((flat,) * spec.num_layers, origin, source)


def _scaled(weights: list[float], mean: float) -> tuple[float, ...]:
    """Probabilities in proportion to `weights`, none above 1, with this mean."""
    low, high = 0.0, len(weights) / min(weights)
    for _ in range(60):
        middle = (low + high) / 2
        if sum(min(1.0, middle * weight) for weight in weights) < mean * len(weights):
            low = middle
        else:
            high = middle
    return tuple(min(1.0, high * weight) for weight in weights)


def writes_late(spec: ModelSpec, batch: int, row_bytes: float) -> bool:
    """Whether a GPU's rounds may leave keys and values to later passes: of a single sequence, if each query head has its own and they
    are products of its inputs. `row_bytes`: of a layer's rows of them on one rank."""
    products = spec.group_size == 1 and spec.rope is None and spec.qk_norm == "none"
    return batch == 1 and products and row_bytes >= LATE_BYTES


def united(probability: float, tokens: int) -> float:
    """That at least one of so many tokens needs a row, if they need it independently.

    Neighbouring tokens share rows, so this is what is read at most (Polar Sparsity, arXiv 2505.14884, section 3).
    """
    return 1.0 - (1.0 - probability) ** tokens

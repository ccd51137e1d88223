"""Plans that place a shape's weights by force, for `offload.py`: the runtime is timed, not the planner. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rowcast.placement.constants import STREAM_BYTES, Constants
from rowcast.placement.forecast import Forecast, Share
from rowcast.placement.plan import Plan
from rowcast.placement.resident import BLOCK_SIZE, MAX_BATCH_TOKENS, rank_share, resident_plan
from rowcast.runtime.forecast import spec_digest
from rowcast.runtime.ladder.memory import ladder_needs
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.offloaded.sizes import Buffers
from rowcast.runtime.offloaded.tiers import ROWS, Tiers
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token, layer_parameters, parameter_count

WIDTH = 2
GROUPS = 1024
"""Of a layer's neurons."""
SLACK, MEASURED_SLACK = 0.01, 0.004
"""Of the cap, left to the allocator where caches take all else; the second where what lies beside tensors was measured."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a benchmark may take."""

    cap_bytes: int
    """Of the GPU, its context included."""
    cache: float
    """Share of the room for neurons that keeps fetched ones."""
    context: int
    """Tokens."""
    device: str
    step: int = MAX_BATCH_TOKENS
    """Most tokens of a pass."""
    world: int = 1
    """Ranks, each with so much of a GPU of its own."""
    outside: int | None = None
    """As `outside_bytes`, where it was measured."""

    @property
    def outside_bytes(self) -> int:
        """What a rank takes beside tensors and graphs."""
        if self.device != "cuda" or self.outside is not None:
            return self.outside or 0
        return Constants().outside_bytes(self.world, nvlink_peers=self.world - 1)

    @property
    def tensor_bytes(self) -> int:
        """What is left to tensors and graphs."""
        slack = SLACK if self.outside is None else MEASURED_SLACK
        return self.cap_bytes - self.outside_bytes - round(slack * self.cap_bytes)


def placed(case: str, spec: ModelSpec, budget: Budget, ladder: str, calibration: Calibration | None) -> Plan:
    """The plan of a case of `offload.py`."""
    if case in ("rows", "peer"):
        return rows(spec, budget, ladder, calibration, case)
    return {"streamed": streamed, "filled": filled}[case](spec, budget) if ladder == "plain" else low_bits(spec, budget, ladder)


def planned_bytes(plan: Plan, spec: ModelSpec, budget: Budget) -> int:
    """What a rank takes of its GPU by the plan: fetched rows are kept in what this leaves."""
    tiers = Tiers.of(plan, 0, spec.num_layers)
    assert tiers is not None
    tensors = plan.budget_bytes - plan.margin_bytes
    if any(ROWS in part.tiers for part in tiers.neurons.values()):
        buffers = Buffers.of(plan, tiers, spec)
        tensors += buffers.ring_bytes + buffers.cache_bytes
    return budget.outside_bytes + tensors


def streamed(spec: ModelSpec, budget: Budget) -> Plan:
    """All weights in host memory, but embeddings that are looked up there anyway."""
    return _plan(spec, budget, "plain", None, "streamed", "streamed", 0)


def low_bits(spec: ModelSpec, budget: Budget, ladder: str) -> Plan:
    """As `streamed`, for a ladder with all weights in a few bits, which stay."""
    return _plan(spec, budget, ladder, None, "streamed", "streamed", 0)


def filled(spec: ModelSpec, budget: Budget) -> Plan:
    """As much as fits stays, the same of every layer; attention first."""
    for layers in range(spec.num_layers, 0, -1):
        free = _plan(spec, budget, "plain", None, "resident", "streamed", 0, layers).margin_bytes
        if free >= 0:
            groups = _groups(rank_share(spec, budget.world), free) if layers == spec.num_layers else 0
            return _plan(spec, budget, "plain", None, "resident", "streamed", groups, layers)
    return streamed(spec, budget)


def rows(spec: ModelSpec, budget: Budget, ladder: str, calibration: Calibration | None, tier: str = "rows") -> Plan:
    """Attention and the LM head stay, and of the neurons the most frequent that fit beside the cache of those that are fetched from
    `tier`: rows of host memory, or peer, another GPU's."""
    plan = _plan(spec, budget, ladder, calibration, "resident", tier, 0)
    stay = _groups(rank_share(spec, budget.world), plan.margin_bytes * (1 - budget.cache))
    return _plan(spec, budget, ladder, calibration, "resident", tier, stay)


def with_kv_away(spec: ModelSpec, draft: ModelSpec, budget: Budget, ladder: str) -> Plan:
    """All weights stay, all KV lies in host memory; `draft`: of every draft in the ladder."""
    parsed, world = Ladder.parse(ladder), budget.world
    drafts = {rung.model: _Draft(draft, spec_digest(draft)) for rung in parsed.lower if rung.model is not None}
    whole = _whole(spec, budget, ladder, None, drafts, world)
    ranks, each = list(range(world)), whole.kv_bytes // spec.num_layers
    # Attention reads the ring's buffers: no sequence's keys and values of a layer are gathered.
    gathered = budget.context * kv_bytes_per_token(rank_share(spec, world), WIDTH) // spec.num_layers
    shares = [Share(ranks, "KV", layer, "streamed", 0, 1, 1, each) for layer in range(spec.num_layers)]
    return replace(
        whole,
        spec=spec_digest(spec),
        budget_bytes=budget.tensor_bytes,
        kv_bytes=0,
        work_bytes=whole.work_bytes - gathered + 2 * STREAM_BYTES + _graphs_bytes(budget),
        forecast=_forecast(shares, budget, ladder),
    )


@dataclass(frozen=True, slots=True)
class _Draft:
    spec: ModelSpec
    fingerprint: str


def _groups(spec: ModelSpec, free: float) -> int:
    """Of each layer's neurons, those for which there are so many bytes."""
    whole = spec.num_layers * _neuron_bytes(spec)
    if free < 0 or free > whole:
        raise SystemExit(
            f"--gpu-memory leaves {free / 1e9:.2f} GB for {whole / 1e9:.2f} GB of neurons: give some, but not for all"
        )
    return int(GROUPS * free / whole)


def _graphs_bytes(budget: Budget) -> int:
    return Constants().graphs_bytes if budget.device == "cuda" else 0


def _neuron_bytes(spec: ModelSpec) -> int:
    """Of a layer."""
    return (3 if spec.gated else 2) * spec.hidden_size * spec.intermediate_size * WIDTH


def _plan(
    spec: ModelSpec,
    budget: Budget,
    ladder: str,
    calibration: Calibration | None,
    outer: str,
    others: str,
    resident: int,
    layers: int | None = None,
) -> Plan:
    """`outer`: where attention and the LM head lie. `resident`: groups of each layer's neurons that stay, of the others `others`.
    `layers`: those after so many have their attention streamed."""
    parsed, world = Ladder.parse(ladder), budget.world
    whole, share, ranks = _whole(spec, budget, ladder, calibration, {}, world), rank_share(spec, world), list(range(world))
    neurons, head = _neuron_bytes(share), share.vocab_size * spec.embed_size * WIDTH
    attention = layer_parameters(share) * WIDTH - neurons
    rest = parameter_count(share) * WIDTH - spec.num_layers * (attention + neurons) - head * (1 if spec.tied_embeddings else 2)
    shares = []
    for layer in range(spec.num_layers):
        where = "streamed" if layers is not None and layer >= layers else outer
        shares.append(Share(ranks, "attention", layer, where, 0, 1, 1, attention))
        for tier, first, count in (("resident", 0, resident), (others, resident, GROUPS - resident)):
            if count:
                shares.append(Share(ranks, "neurons", layer, tier, first, count, GROUPS, neurons * count // GROUPS))
        shares.append(Share(ranks, "KV", layer, "resident", 0, 1, 1, whole.kv_bytes // spec.num_layers))
    shares.append(Share(ranks, "LM head", -1, outer, 0, 1, 1, head))
    if not spec.tied_embeddings:
        shares.append(Share(ranks, "embeddings", -1, "host", 0, 1, 1, head))
    held = rest + sum(share.bytes for share in shares if share.tier == "resident" and share.part != "KV")
    # Where nothing is streamed but by long passes, buffers come out of what is left.
    ring = 2 * min(layer_parameters(share) * WIDTH, STREAM_BYTES) if "streamed" in (outer, others) else 0
    fetched = 0
    if others in ("rows", "peer"):
        fetched = round(2 * neurons * min(0.5, max(rung.mlp for rung in parsed.rungs if rung.mlp is not None)))
    return replace(
        whole,
        spec=spec_digest(spec),
        budget_bytes=budget.tensor_bytes,
        weight_bytes=held,
        work_bytes=whole.work_bytes + ring + fetched + _graphs_bytes(budget),
        forecast=_forecast(shares, budget, ladder),
    )


def _whole(
    spec: ModelSpec, budget: Budget, ladder: str, calibration: Calibration | None, drafts: Mapping[str, _Draft], world: int = 1
) -> Plan:
    """With everything on devices that have room for it."""
    needs = ladder_needs(
        Ladder.parse(ladder),
        rank_share(spec, world),
        drafts,
        adaptive=False,
        verification="coupled",
        calibration=calibration,
        dense_copy=False,
        listed=False,
        width=WIDTH,
        block_size=BLOCK_SIZE,
        max_context=budget.context,
        head_copy_bytes=lambda model: 0,
    )
    return resident_plan(
        spec,
        fingerprint="",
        dtype="bfloat16" if budget.device == "cuda" else "float32",
        device=budget.device,
        budget_bytes=1 << 40,
        max_model_len=budget.context,
        max_num_seqs=1,
        max_num_batched_tokens=budget.step,
        world=world,
        needs=replace(needs, mode="exact" if ladder.endswith("plain") else "approximate"),
    )


def _forecast(shares: list[Share], budget: Budget, ladder: str) -> Forecast:
    """Nothing is foretold."""
    return Forecast(
        model="a shape", machine="this one", gpus=["a GPU"] * budget.world, layout="by force", tensor_parallel=budget.world,
        pipeline_stages=1,
        context=budget.context, prompt=1, batch=1, ladder=ladder, seconds_per_token=1.0, tokens_per_s=1.0,
        tokens_per_s_range=[1.0, 1.0], first_token_s=1.0, tokens_per_round=1.0, bottleneck="bus", bottleneck_share=1.0, gap=0.0,
        solver_s=0.0, greedy_seconds_per_token=None, groups=1, memory=[], rungs=[], stages=[], shares=shares, alternatives=[],
        what_if=[], inputs=[],
    )  # fmt: skip

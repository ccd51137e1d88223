"""The systems of `published_points.py` as the cost model sees them: models, machines, rungs and what lay where. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rowcast.placement.constants import Constants
from rowcast.placement.costs import RESIDENT, STREAMED, CostModel, Mode
from rowcast.placement.groups import ATTENTION, KV, Groups
from rowcast.placement.hardware import GIB, machine_from
from rowcast.placement.layout import layouts
from rowcast.placement.models import find_config
from rowcast.placement.workload import Hotness, LadderUse, RungUse, Workload
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token, parameter_count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WIDTH = 2
PLAIN = RungUse(name="plain", passes=1, tokens=1)

LLAMA_68M: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 768, "intermediate_size": 3072,
    "num_attention_heads": 12, "num_key_value_heads": 12, "num_hidden_layers": 2, "vocab_size": 32000, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
OPT_LAYERS: dict[str, Any] = find_config("facebook/opt-66b") | {
    "hidden_size": 8192, "word_embed_proj_dim": 8192, "ffn_dim": 32768, "num_attention_heads": 64,
}  # fmt: skip
"""Layers that were timed one by one."""

YARN_7B, YARN_13B = "NousResearch/Yarn-Llama-2-7b-128k", "NousResearch/Yarn-Llama-2-13b-128k"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is priced, and what lies where."""

    model: str | dict[str, Any]
    """A known id, or a config."""
    gpus: str
    context: int
    rungs: tuple[RungUse, ...] = (PLAIN,)
    tokens_per_round: float = 1.0
    batch: int = 1
    eager: bool = False
    kv_on_chip: int | None = None
    """Layers, from the first, whose KV lies next to the compute; the others' is streamed. None: all."""
    weights_on_chip: float = 1.0
    """Share of the layers, from the first, whose weights do; below 1 the LM head's are streamed, too."""
    attention_reads: float | None = None
    """Share of the attention's weights that a pass reads, where a system reads less than this runtime would."""


@dataclass(frozen=True, slots=True)
class Times:
    pass_s: tuple[float, ...]
    """Of each rung."""
    token_s: float
    """Of a committed token, the round's host work included."""
    fits: bool
    """Whether the planner would allow that placement."""


def spec_of(model: str | Mapping[str, Any]) -> ModelSpec:
    return spec_from_config(find_config(model) if isinstance(model, str) else dict(model))


def price(case: Case, constants: Constants) -> Times:
    spec = spec_of(case.model)
    ladder = LadderUse(
        name="as published",
        rungs=case.rungs,
        tokens_per_round=case.tokens_per_round,
        tokens_per_round_range=(case.tokens_per_round,) * 2,
        fixed_bytes=sum(parameter_count(rung.model) * WIDTH for rung in case.rungs if rung.model is not None),
        shared_bytes=sum(rung.proxy_bytes for rung in case.rungs),
        slot_bytes=sum(
            rung.kv_entries * kv_bytes_per_token(spec, WIDTH) for rung in case.rungs if rung.kv_entries and not rung.model
        ),
    )
    density = min(rung.neurons for rung in case.rungs)
    work = Workload(
        model=case.model if isinstance(case.model, str) else "",
        spec=spec,
        width=WIDTH,
        context=case.context,
        prompt=case.context,
        batch=case.batch,
        ladders=(ladder,),
        hotness=Hotness(((density,),) * spec.num_layers, "given", "every neuron as often as any other"),
    )
    layout = layouts(machine_from(case.gpus, 768 * GIB), spec)[0]
    model = CostModel(work, ladder, layout, replace(constants, eager=case.eager), 16 * spec.num_layers)
    if case.attention_reads is not None:
        model.groups = _reading(model.groups, case.attention_reads)
    priced = model.price(Mode(streamed=case.weights_on_chip < 1, kv_away=case.kv_on_chip is not None))
    tiers = _tiers(case, priced.groups, spec.num_layers)
    slowest = priced.problem.pass_seconds(tiers)
    passes = tuple(float(chain) + sum(lost) for chain, lost in zip(slowest, priced.launches, strict=True))
    return Times(passes, priced.problem.cost(tiers), priced.problem.fits(tiers))


def _tiers(case: Case, groups: Groups, layers: int) -> NDArray[np.int64]:
    import numpy as np

    tiers = np.full(len(groups), RESIDENT)
    if case.kv_on_chip is not None:
        tiers[(groups.part == KV) & (groups.layer >= case.kv_on_chip)] = STREAMED
    if case.weights_on_chip < 1:
        away = (groups.layer < 0) | (groups.layer >= round(layers * case.weights_on_chip))
        tiers[(groups.part != KV) & away] = STREAMED
    return tiers


def _reading(groups: Groups, share: float) -> Groups:
    reads = groups.reads.copy()
    reads[:, groups.part == ATTENTION] = share
    return replace(groups, reads=reads)


def token_ms(case: Case, constants: Constants) -> float:
    return price(case, constants).token_s * 1e3


def pass_ms(case: Case, rung: int, constants: Constants) -> float:
    return price(case, constants).pass_s[rung] * 1e3


def triforce(
    model: str, gpus: str, context: int, budget: int, gamma: int, *, outer: float, inner: float, on_chip: int | None
) -> Case:
    """A round drafts gamma tokens by a retrieval rung over `budget` entries, one of the 68M draft's for each of its passes.

    `outer`: that a token of the retrieval rung stands, `inner`: that one of the draft does.
    """
    passes = gamma / (1 + inner)
    rungs = (
        RungUse(name="68M draft", passes=passes, tokens=1, model=spec_of(LLAMA_68M), kv_entries=256),
        RungUse(name="retrieval", passes=passes, tokens=2, kv_entries=budget),
        RungUse(name="full", passes=1, tokens=gamma + 1),
    )
    tokens = (1 - outer ** (gamma + 1)) / (1 - outer)
    return Case(
        model=model, gpus=gpus, context=context, rungs=rungs, tokens_per_round=tokens, eager=True, kv_on_chip=on_chip
    )  # fmt: skip


A100_TRIFORCE = triforce(YARN_7B, "A100-80GB", 124_928, 4096, 6, outer=0.9234, inner=0.4649, on_chip=None)
RTX4090 = partial(triforce, context=130_048, outer=0.9137, inner=0.4036)
TRIFORCE_7B = RTX4090(YARN_7B, "2xRTX4090", budget=12_288, gamma=16, on_chip=9)
TRIFORCE_13B = RTX4090(YARN_13B, "2xRTX4090", budget=12_288, gamma=16, on_chip=2)

OPT_175B = Case(model="facebook/opt-175b", gpus="8xA100-80GB", context=178)
_OPT = spec_of("facebook/opt-175b")
_PREDICTORS = (
    _OPT.num_layers * WIDTH * (8 * _OPT.hidden_size * (1000 + 512) + 1000 * _OPT.intermediate_size + 512 * _OPT.num_heads)
)
"""Bytes on all eight: the first factors, of rank 1000 and 512, lie whole on each."""
DEJA_VU = replace(
    OPT_175B,
    rungs=(replace(PLAIN, name="sparse", neurons=0.1, candidates=0.1, heads=5 / 12, proxy_bytes=_PREDICTORS),),
    attention_reads=5 / 12,
)

STREAMED_30B = Case(
    model="facebook/opt-30b", gpus="T4", context=528, batch=8, eager=True, weights_on_chip=0,
    rungs=(PLAIN, RungUse(name="prompt", passes=1, tokens=512)),
)  # fmt: skip


def triforce_gain(constants: Constants) -> float:
    times = price(A100_TRIFORCE, constants)
    plain = token_ms(replace(A100_TRIFORCE, rungs=(PLAIN,), tokens_per_round=1.0), constants) / 1e3
    return plain / times.token_s


def dejavu_gain(constants: Constants) -> float:
    return price(OPT_175B, constants).token_s / price(DEJA_VU, constants).token_s


def streamed_30b_s(constants: Constants) -> float:
    step, prompt = price(STREAMED_30B, constants).pass_s
    return prompt + 31 * step


def layer_us(rung: RungUse, predictor_bytes: int, constants: Constants) -> float:
    """Of one layer: forty less twenty of them. `predictor_bytes`: of one layer."""
    few, many = 20, 40
    seconds = [
        price(
            Case(
                model=OPT_LAYERS | {"num_hidden_layers": layers},
                gpus="H100",
                context=1024,
                rungs=(replace(rung, proxy_bytes=layers * predictor_bytes),),
            ),
            constants,
        ).pass_s[0]
        for layers in (few, many)
    ]
    return (seconds[1] - seconds[0]) / (many - few) * 1e6


def copy_tb_s(constants: Constants) -> float:
    return machine_from("H100").cards[0].memory_rate.value * constants.copy_share / 1e12

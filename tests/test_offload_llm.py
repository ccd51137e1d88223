"""Plans with parts in host memory, end to end: the tokens are those of the model that lies next to the compute."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_samples import FORECAST
from test_speculation import GREEDY, PARAMS, SEEDED, ids, prompts
from tiny import tiny_model

from rowcast import LLM, OutOfMemoryError, Plan, SamplingParams, UserError
from rowcast.offload.host_store import HostStore
from rowcast.placement.executable import not_yet
from rowcast.placement.forecast import Share
from rowcast.runtime.checkpoint import DEFAULT_MODEL, open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.kv.hosted import HostedKV
from rowcast.runtime.offloaded.sparse import OffloadedSparse
from rowcast.runtime.offloaded.tiers import Tiers
from rowcast.runtime.offloaded.weights import OffloadedBanks
from rowcast.runtime.planning import Target, Wish, make_plan
from rowcast.runtime.step import Moved
from rowcast.runtime.tokenizer import load_tokenizer

VIEW = "chunk=4,sinks=4,recent=8"
PARTS = {"attention": 4, "neurons": 6, "LM head": 8, "embeddings": 1, "KV": 8}
WAYS = {
    "attention": ("resident", "streamed"),
    "neurons": ("resident", "streamed", "rows", "cpu"),
    "LM head": ("resident", "streamed"),
    "embeddings": ("resident", "host"),
    "KV": ("resident", "streamed"),
}


def shares(seed: int | None, layers: int, **ways: Sequence[str]) -> list[Share]:
    """Groups anywhere that `ways` allow; None: in the first of these."""
    rng, found = random.Random(seed), []
    for part, groups in PARTS.items():
        among = ways.get(part.replace(" ", "_"), WAYS[part])
        for layer in range(layers) if part in ("attention", "neurons", "KV") else [-1]:
            for group in range(groups):
                tier = among[0] if seed is None else rng.choice(among)
                found.append(Share([0], part, layer, tier, group, 1, groups, 1))
    return found


def away(plan: Plan, given: list[Share]) -> Plan:
    """The plan with parts elsewhere."""
    return replace(plan, forecast=replace(FORECAST, shares=given, tensor_parallel=1, gpus=["a GPU"], context=plan.max_context))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    tiny_model("llama-gqa", path)
    return path


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(target: Path, ladder: str, device: str = "cpu", **keywords: Any) -> LLM:
    return LLM(target, ladder=ladder, dtype="float32", device=device, block_size=4, progress=False, **keywords)


@pytest.fixture(scope="module")
def plain(target: Path, device: str) -> dict[str, list[list[int]]]:
    llm = make(target, "plain", device)
    return {name: ids(llm.generate(prompts(6), params)) for name, params in PARAMS.items()}


LADDERS = {
    "plain": "plain",
    "retrieval": f"self:kv=24,{VIEW},gamma=3 / plain",
    "eviction": "self:kv=24,view=eviction,sinks=4,recent=8,gamma=3 / plain",
    "neurons": "self:mlp=0.5,gamma=3 / plain",
    "re-ranked": "self:mlp=0.3,by=q2,over=1.5,gamma=4 / plain",
    "neurons and KV": f"self:mlp=0.3,kv=24,{VIEW},gamma=3 / plain",
    "low bits": "self:bits=4,gamma=3 / plain",
    "two": f"ngram:gamma=2 / self:kv=24,{VIEW},gamma=3 / plain",
}


@pytest.mark.parametrize("ladder", LADDERS)
def test_no_token_depends_on_where_parts_lie(target: Path, device: str, plain: dict[str, list[list[int]]], ladder: str) -> None:
    plan = make(target, LADDERS[ladder], device).plan
    for seed in (1, 2):
        llm = LLM(target, plan=away(plan, shares(seed, 2)), progress=False)
        for name in ("greedy", "penalised") if seed == 1 else ("seeded",):
            assert ids(llm.generate(prompts(6), PARAMS[name])) == plain[name], name
        llm.engine.check()


@pytest.mark.parametrize("ladder", ["plain", f"self:kv=24,{VIEW},gamma=3 / plain", "self:mlp=0.5,gamma=2 / plain"])
def test_preemption_changes_nothing(target: Path, device: str, ladder: str) -> None:
    params = replace(SEEDED, max_tokens=40)
    llm = make(target, ladder, device)
    undisturbed = ids(llm.generate(prompts(6, 20, 60), params))
    tight = replace(away(llm.plan, shares(3, 2, KV=("streamed",))), num_blocks=60, max_context=128)
    squeezed = LLM(target, plan=tight, progress=False)
    outputs = squeezed.generate(prompts(6, 20, 60), params)
    assert sum(output.metrics.preemptions for output in outputs) > 0
    assert ids(outputs) == undisturbed
    squeezed.engine.check()


@pytest.mark.parametrize("ladder", ["plain", f"self:kv=24,{VIEW},gamma=3 / plain"])
def test_prompts_run_layer_by_layer(target: Path, device: str, ladder: str) -> None:
    """In parts of a few tokens, each layer over all of them: the same tokens; streamed weights and KV cross once."""
    params = replace(SEEDED, prompt_logprobs=1)
    plan = make(target, ladder, device).plan
    expected = LLM(target, plan=plan, progress=False).generate(prompts(5, 40, 60), params)
    given = shares(None, 2, neurons=("streamed",), KV=("streamed",), attention=("streamed",))
    llm = LLM(target, plan=away(plan, given), progress=False)
    top = llm.engine._executor._top  # type: ignore[attr-defined]
    top.view._part_tokens = 20
    top.view.counts()
    found = llm.generate(prompts(5, 40, 60), params)
    assert ids(found) == ids(expected)
    for mine, other in zip(found, expected, strict=True):
        assert mine.prompt_logprobs is not None and other.prompt_logprobs is not None
        for one, two in zip(mine.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert one is not None and two is not None
            assert all(abs(one[token].logprob - two[token].logprob) < 1e-4 for token in one)
    llm.engine.check()


@pytest.mark.parametrize("ladder", ["self:mlp=0.5", "self:mlp=0.3,by=q2,over=1.5", "self:mlp=0.2,by=oracle"])
def test_an_approximate_law_does_not_depend_on_places(target: Path, device: str, ladder: str) -> None:
    """Rows are chosen by neurons' numbers, not by where they lie: the same tokens, alone and in a batch."""
    llm = make(target, ladder, device, mode="approximate")
    expected = [ids(llm.generate(prompt, GREEDY))[0] for prompt in prompts(4)]
    places = [shares(None, 2, neurons=("rows",), KV=("streamed",)), shares(5, 2)]
    if device == "cpu" or torch.cuda.device_count() > 1:
        places += [shares(None, 2, neurons=("peer",)), shares(6, 2, neurons=("resident", "streamed", "peer", "cpu"))]
    for given in places:
        there = LLM(target, plan=away(llm.plan, given), progress=False)
        assert [ids(there.generate(prompt, GREEDY))[0] for prompt in prompts(4)] == expected
        assert ids(there.generate(prompts(4), GREEDY)) == expected


def test_an_untied_table_and_every_family(tmp_path: Path) -> None:
    """ALiBi, parallel sub-layers, biases, projections of embeddings, windows: with KV, rows and tables away."""
    for name in ("opt-350m", "bloom", "falcon-40b", "mistral-window", "qwen3", "mpt-clip"):
        path = tmp_path / name
        tiny_model(name, path)
        llm = make(path, "plain")
        expected = ids(llm.generate(prompts(3), SEEDED))
        there = LLM(path, plan=away(llm.plan, shares(7, llm.spec.num_layers)), progress=False)
        assert ids(there.generate(prompts(3), SEEDED)) == expected, name


def test_views_are_those_of_the_plan(target: Path) -> None:
    plan = make(target, "self:mlp=0.5,gamma=3 / plain").plan
    llm = LLM(
        target, plan=away(plan, shares(None, 2, neurons=("rows",), KV=("streamed",), attention=("streamed",))), progress=False
    )
    lower, top = llm.engine._executor._lower[0], llm.engine._executor._top  # type: ignore[attr-defined]
    assert isinstance(top.view, HostedKV) and isinstance(top.decoder.weights, OffloadedBanks)
    assert isinstance(lower.decoder.weights, OffloadedSparse)
    outputs = llm.generate(prompts(2), GREEDY)
    elsewhere = llm.engine._executor.elsewhere  # type: ignore[attr-defined]
    counts = elsewhere.counts()
    assert counts.weights.bytes > 0 and counts.rows.wanted > 0 and counts.kv.bytes > 0
    told = Moved()
    for output in outputs:
        assert output.metrics.moved is not None
        told.add(output.metrics.moved)
    assert (told.weight_bytes, told.kv_bytes) == (counts.weights.bytes, counts.kv.bytes)
    assert (told.rows_wanted, told.rows_hit, told.rows_moved) == (counts.rows.wanted, counts.rows.hit, counts.rows.moved)
    assert told.row_bytes == told.rows_moved * 3 * llm.spec.hidden_size * 4 and told.kv_out_bytes > 0
    assert told.stalled_s == pytest.approx(counts.weights.stalled_s + counts.kv.stalled_s)
    assert elsewhere.counts().weights.bytes == 0
    assert elsewhere.host_bytes == top.view.store.bytes + top.decoder.weights.store.bytes
    elsewhere.close()
    assert elsewhere.host_bytes == 0


def test_host_memory_goes_with_the_model(target: Path) -> None:
    plan = make(target, "plain").plan
    llm = LLM(target, plan=away(plan, shares(None, 2, neurons=("streamed",), KV=("streamed",))), progress=False)
    llm.generate(prompts(2), GREEDY)
    held = [weakref.ref(store._held[0]) for store in stores()]
    assert held
    del llm
    gc.collect()
    assert not any(ref() is not None for ref in held)


def stores() -> list[HostStore]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is HostStore and each.bytes]


def test_parts_that_no_engine_has_elsewhere(target: Path) -> None:
    plan = make(target, "plain").plan
    for part, tier in (("attention", "peer"), ("KV", "peer"), ("attention", "rows"), ("LM head", "cpu"), ("KV", "cpu")):
        told = not_yet(away(plan, [Share([0], part, 0, tier, 0, 1, 1, 1)]))
        assert len(told) == 1 and told[0].startswith(part)
    for rung, part in (("self:heads=0.5", "attention"), ("self:mlp=0.5,by=gate", "neurons"), ("self:lm=hire", "LM head")):
        given = [Share([0], part, 0, "streamed", 0, 1, 1, 1)]
        assert "under a rung that" in not_yet(replace(away(plan, given), ladder=[rung, "plain"]))[0]
        assert not not_yet(away(plan, given))
    both = [Share([0], "neurons", 1, tier, place, 1, 2, 1) for place, tier in enumerate(("rows", "peer"))]
    assert not_yet(away(plan, both)) == ["rows of one layer both in host memory and held by another GPU"]
    assert not not_yet(away(plan, [both[0], replace(both[1], layer=0)]))
    alone = replace(away(plan, [Share([0], "neurons", 0, "streamed", 0, 1, 1, 1)]), ladder=["self:bits=4"])
    assert "low-bit weights" in not_yet(alone)[0]


def test_kv_is_placed_by_whole_layers(target: Path) -> None:
    """A plan that divides layers' KV has room for as many whole ones as these parts make."""
    plan = make(target, "plain").plan
    given = [Share([0], "KV", layer, "resident", 0, 5, 8, 1) for layer in range(4)]
    given += [Share([0], "KV", layer, "streamed", 5, 3, 8, 1) for layer in range(4)]
    found = Tiers.of(away(plan, given), 0, 4)
    assert found is not None and found.kv_away == {2, 3} and found.weights_resident
    assert Tiers.of(away(plan, given), 1, 4) is None


# The real model, with the CPU in the place of a GPU.

CAP = 380 << 20
"""Bytes. The weights are 513 MiB in float32, KV of the context 360 MiB, work space 244 MiB."""
TEXTS = ["The capital of France is", "def fibonacci(n):\n    if n < 2:\n        return n\n"]
PARAMETERS = {
    "plain": SamplingParams(temperature=0.8, seed=7, max_tokens=12, ignore_eos=True),
    "self:kv=256,gamma=4 / plain": SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWCAST_CPU_AS_GPU", "1")


def planned(ladder: str, **wishes: Any) -> Plan:
    """The plan that an LLM makes, without the model."""
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    target = Target(checkpoint, spec_from_config(checkpoint.config), checkpoint.source.fingerprint(), load_tokenizer(checkpoint))
    return make_plan(
        target, Wish(ladder=ladder, dtype="float32", weights="unpacked", device="cpu", max_model_len=8192, **wishes), {}
    ).plan


@pytest.fixture(scope="module")
def smollm2() -> dict[str, list[list[int]]]:
    llm = LLM(dtype="float32", ladder="plain", device="cpu", progress=False, max_model_len=8192, max_num_seqs=2)
    return {ladder: ids(llm.generate(TEXTS, params)) for ladder, params in PARAMETERS.items()}


def device_bytes() -> int:
    """Of all tensors that are not in host memory, as a GPU would hold them."""
    gc.collect()
    there = [(held.data_ptr(), held.data_ptr() + held.nbytes) for s in stores() for held in s._held]
    sizes: dict[int, int] = {}
    for each in gc.get_objects():
        if type(each) is torch.Tensor and each.device.type == "cpu":
            storage = each.untyped_storage()
            if not any(start <= storage.data_ptr() < end for start, end in there):
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("ladder", PARAMETERS)
def test_smollm2_under_a_cap(smollm2: dict[str, list[list[int]]], ladder: str, tmp_path: Path) -> None:
    """By a plan file, and by what LLM plans itself: nearly all rows and all KV lie in host memory."""
    before = device_bytes()
    if ladder == "plain":
        planned(ladder, gpu_memory=CAP).save(tmp_path / "plan")
        llm = LLM(plan=tmp_path / "plan", progress=False)
    else:
        llm = LLM(
            ladder=ladder, dtype="float32", weights="unpacked", device="cpu", gpu_memory=CAP, max_model_len=8192, progress=False
        )
    forecast = llm.plan.forecast
    assert forecast is not None and llm.plan.device == "cpu"
    assert {share.tier for share in forecast.shares if share.part == "KV"} == {"streamed"}
    weights = [share for share in forecast.shares if share.part != "KV"]
    assert sum(share.bytes for share in weights if share.tier != "resident") > 0.75 * sum(share.bytes for share in weights)
    held, classes = device_bytes() - before, forecast.memory[0].classes
    counted = sum(classes[name] for name in ("weights", "KV", "rung KV", "buffers"))
    assert held == pytest.approx(counted, rel=0.02) and held <= counted + classes["margin"]
    assert ids(llm.generate(TEXTS, PARAMETERS[ladder])) == smollm2[ladder]
    assert device_bytes() - before <= CAP
    llm.engine.check()


@pytest.mark.usefixtures("stand_in")
def test_smollm2_fetches_rows(smollm2: dict[str, list[list[int]]]) -> None:
    """A draft that uses half of the neurons, all of which lie in host memory, and the KV with them."""
    plan = planned("self:mlp=0.5,by=q4,gamma=3 / plain", max_num_seqs=1, host_memory="1700MiB")
    given = shares(None, 30, neurons=("rows",), KV=("streamed",), embeddings=("resident",))
    there = LLM(plan=away(plan, given), progress=False)
    [output] = there.generate(TEXTS[0], PARAMETERS["plain"])
    assert output.outputs[0].token_ids == smollm2["plain"][0]
    rows = there.engine._executor.elsewhere.counts().rows  # type: ignore[attr-defined]
    assert rows.wanted > 0 and rows.hit > 0 and rows.moved == rows.wanted - rows.hit


def test_the_cap_of_a_gpu_that_is_not_there(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="the model runs on the CPU: give host_memory=400MiB instead"):
        make(target, "plain", gpu_memory="400MiB")
    monkeypatch.setenv("ROWCAST_CPU_AS_GPU", "1")
    resident = make(target, "plain", gpu_memory="400MiB")
    assert resident.plan.forecast is None and resident.plan.budget_bytes == 400 << 20
    with pytest.raises(OutOfMemoryError, match="more on each GPU"):
        make(target, "plain", gpu_memory="1MiB")

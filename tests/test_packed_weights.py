"""A quantised checkpoint's weights held as they are packed: the model that the unpacked ones are, on any ranks, counted to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_samples import FORECAST
from test_offload_llm import away, shares
from thread_comm import ThreadComm, run_ranks
from torch import Tensor

from rowcast import LLM, OutOfMemoryError, Plan, SamplingParams, UserError
from rowcast.placement.executable import not_yet
from rowcast.placement.forecast import Share
from rowcast.placement.resident import rank_share
from rowcast.runtime.checkpoint import DEFAULT_MODEL, open_checkpoint
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.packed_sizes import PackedForms, forms_of_tensors
from rowcast.runtime.packed_weights import PackedWeights
from rowcast.runtime.plan_for import MachineWish, plan_for
from rowcast.runtime.planning import Target, Wish, make_plan
from rowcast.runtime.protocols import Comm, PackedTensors, WeightView
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep
from rowcast.runtime.weights import DenseWeights

MADE = Path(__file__).parent / "data" / "quantised"
FOLDERS = sorted(path.name for path in MADE.iterdir() if path.is_dir())
CPU = torch.device("cpu")
HOW: dict[str, Any] = {"dtype": torch.float32, "device": CPU}
IDS = [i * 5 % 64 for i in range(20)]


def opened(folder: str) -> tuple[ModelSpec, Any, PackedForms]:
    checkpoint = open_checkpoint(folder if folder == DEFAULT_MODEL else str(MADE / folder))
    spec, source = spec_from_config(checkpoint.config), checkpoint.source
    assert isinstance(source, PackedTensors)
    return spec, source, forms_of_tensors(source.form, list(source.names()), spec)


def logits(view: WeightView, comm: Comm, dtype: torch.dtype = torch.float32) -> Tensor:
    kv = PagedKV(view.spec, Shard(comm.rank, comm.world), num_blocks=8, block_size=4, dtype=dtype, device=CPU)
    decoder = Decoder(view, comm, CPU)
    return decoder.logits(decoder.run([SeqStep(0, IDS, 0, list(range(8)), len(IDS), sample=True)], kv))


@pytest.mark.parametrize("folder", FOLDERS)
def test_it_is_the_unpacked_model(folder: str) -> None:
    spec, source, forms = opened(folder)
    assert forms.any is (folder != "gptq-4-act-order")
    view = PackedWeights(spec, source, SoloComm(), forms, **HOW)
    expected = logits(DenseWeights(spec, source, SoloComm(), **HOW), SoloComm())
    torch.testing.assert_close(logits(view, SoloComm()), expected, atol=2e-4, rtol=1e-4)
    assert view.bytes == forms.sizes(spec, 4).pass_bytes(spec, 4)
    assert view.reads().bytes == view.bytes and view.reads().bytes == 0


def test_ranks_hold_whole_groups(tmp_path: Path) -> None:
    """Two ranks' shares, 45 of 90 neurons and 32 of 64 columns of heads, cut groups of 32."""
    spec, source, forms = opened("awq-4")
    alone = logits(PackedWeights(spec, source, SoloComm(), forms, **HOW), SoloComm())

    def rank(comm: ThreadComm) -> tuple[Tensor, int]:
        view = PackedWeights(spec, source, comm, forms, **HOW)
        return logits(view, comm), view.bytes

    (left, size), (right, other) = run_ranks(2, rank)
    torch.testing.assert_close(torch.cat([left, right], 1)[:, : spec.vocab_size], alone, atol=1e-5, rtol=1e-5)
    assert max(size, other) == forms.sizes(spec, 4, 2).pass_bytes(rank_share(spec, 2), 4)


def made(folder: str, ladder: str = "plain", **keywords: Any) -> LLM:
    how = {"dtype": "float32", "device": "cpu", "block_size": 4, "max_model_len": 64, "progress": False, **keywords}
    return LLM(MADE / folder, ladder=ladder, **how)


def tokens(llm: LLM, params: SamplingParams) -> list[list[int]]:
    prompts = [IDS[:9], IDS[4:15], IDS[2:5]]
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


GREEDY = SamplingParams(max_tokens=16, ignore_eos=True, detokenize=False)
SEEDED = replace(GREEDY, temperature=0.8, seed=3)


RETRIEVAL = "self:kv=24,chunk=4,sinks=4,recent=8,gamma=3 / plain"


@pytest.mark.parametrize("ladder", ["ngram / plain", RETRIEVAL, "self:bits=8,gamma=2 / plain"])
def test_drafts_change_no_token(ladder: str) -> None:
    plain, drafted = made("gptq-3", weights="packed"), made("gptq-3", ladder, weights="packed")
    assert plain.plan.weights == drafted.plan.weights == "packed"
    for params in (GREEDY, SEEDED):
        assert tokens(drafted, params) == tokens(plain, params)


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made("awq-4").plan.weights == "unpacked"
    act_order = made("gptq-4-act-order")
    assert act_order.plan.weights == "unpacked"
    assert any("7 matrices are unpacked: its inputs are grouped" in note for note in act_order.plan.notes)
    with pytest.raises(UserError, match=r"none of this checkpoint's can be held packed \(7 matrices"):
        made("gptq-4-act-order", weights="packed")
    with pytest.raises(UserError, match="weights='4' is not known"):
        made("awq-4", weights="4")
    with pytest.raises(UserError, match=r"rung self:mlp=0.5.* chooses rows of weights"):
        made("awq-4", "self:mlp=0.5 / plain", weights="packed")
    whole, few = made("awq-4").plan, made("awq-4", weights="packed").plan
    assert few.weight_bytes < whole.weight_bytes and few.pass_bytes < whole.pass_bytes
    monkeypatch.setenv("ROWCAST_CPU_AS_GPU", "1")
    llm = made("awq-4", gpu_memory="1GiB")
    assert llm.plan.weights == "packed" and tokens(llm, GREEDY) == tokens(made("awq-4"), GREEDY)
    assert made("awq-4", "self:mlp=0.5 / plain", gpu_memory="1GiB").plan.weights == "unpacked"


def smollm2(**wish: Any) -> Plan:
    """A plan for the packaged model, whose weights are Q4_1 and Q8_0. Loads none."""
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    target = Target(checkpoint, spec_from_config(checkpoint.config), checkpoint.source.fingerprint(), None)
    how = {"ladder": "plain", "dtype": "float32", "device": "cpu", "max_model_len": 256, "max_num_seqs": 1}
    return make_plan(target, Wish(**{**how, **wish}), {}).plan


def test_packed_where_a_cpus_memory_is_short() -> None:
    whole, few = smollm2(), smollm2(weights="packed")
    assert (whole.weights, few.weights) == ("unpacked", "packed") and few.pass_bytes < 0.2 * whole.pass_bytes
    short = few.budget_bytes - few.margin_bytes
    assert smollm2(host_memory=short).weights == "packed"
    with pytest.raises(OutOfMemoryError):
        smollm2(host_memory=short, weights="unpacked")
    with pytest.raises(OutOfMemoryError):
        smollm2(host_memory=short - (1 << 20))


def test_what_is_too_large_is_told_of_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked weights do not fit, and packed ones, for which nobody asked, cannot be had with the ladder: by how much they do not."""
    monkeypatch.setenv("ROWCAST_CPU_AS_GPU", "1")
    ladder = "ngram:gamma=3 / self:mlp=0.5,by=q4,gamma=2 / plain"
    with pytest.raises(OutOfMemoryError, match=r"it would with \d+ MiB more") as told:
        smollm2(ladder=ladder, gpu_memory="60MiB")
    assert "packed" not in str(told.value)
    with pytest.raises(UserError, match=r"weights=packed was given, and rung self:mlp=0.5.* chooses rows of weights"):
        smollm2(ladder=ladder, gpu_memory="60MiB", weights="packed")


def test_a_plan_file(tmp_path: Path) -> None:
    plan = made("awq-4", weights="packed").plan
    plan.save(tmp_path / "plan")
    llm = LLM(MADE / "awq-4", plan=tmp_path / "plan", progress=False)
    assert llm.plan == plan and tokens(llm, GREEDY) == tokens(made("awq-4", weights="packed"), GREEDY)
    whole = replace(made("gptq-4-act-order").plan, weights="packed")
    with pytest.raises(UserError, match="the plan holds weights packed, and not all"):
        LLM(MADE / "gptq-4-act-order", plan=whole, progress=False)


WAYS = {
    "attention": ("streamed", "resident"),
    "neurons": ("streamed", "resident"),
    "LM head": ("streamed", "resident"),
    "embeddings": ("host", "resident"),
    "KV": ("resident", "streamed"),
}


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_parts_in_host_memory(seed: int | None) -> None:
    for folder in ("awq-4", "compressed-8-channel"):
        here = made(folder, weights="packed")
        ways = {part.replace(" ", "_"): way for part, way in WAYS.items()}
        plan = away(here.plan, shares(seed, here.spec.num_layers, **ways))
        assert not not_yet(plan)
        for ladder in ("plain", RETRIEVAL):
            llm = LLM(
                MADE / folder, plan=replace(plan, ladder=ladder.split(" / "), lookahead=3, speculating_seqs=3), progress=False
            )
            assert tokens(llm, SEEDED) == tokens(here, SEEDED)
            executor: Any = llm.engine._executor
            moved = executor.elsewhere.counts().weights.bytes
            assert moved > 0 or seed is not None
    rows = replace(plan, forecast=replace(FORECAST, shares=[Share([0], "neurons", 0, "rows", 0, 1, 1, 1)], tensor_parallel=1))
    assert not_yet(rows) == ["neurons fetched by rows from host memory"]


def test_a_plan_for_a_small_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's own, with parts streamed, counts them as they are packed."""
    monkeypatch.setenv("ROWCAST_CPU_AS_GPU", "1")
    few = smollm2(weights="packed")
    plan = smollm2(gpu_memory=few.budget_bytes - few.margin_bytes - few.weight_bytes // 3, host_memory="1GiB")
    places = plan.places()
    assert plan.weights == "packed" and places["streamed"] and not not_yet(plan)
    spec, _, forms = opened(DEFAULT_MODEL)
    held = sum(tier.get(part, 0) for tier in places.values() for part in ("attention", "neurons", "LM head"))
    assert held == pytest.approx(replace(forms, head=None).sizes(spec, 4).products_bytes, rel=0.01)


def test_a_plan_of_a_config_alone(tmp_path: Path) -> None:
    """It counts what the checkpoint's tensors take; one GPU of a machine that is not there."""
    (tmp_path / "config.json").write_bytes((MADE / "awq-4" / "config.json").read_bytes())
    spec, _, forms = opened("awq-4")
    card = MachineWish(gpus="1xRTX4090")
    packed, whole = (
        plan_for(str(tmp_path), card, ladder="plain", weights=weights, groups=100) for weights in ("auto", "unpacked")
    )
    assert (packed.weights, whole.weights) == ("packed", "unpacked") and not not_yet(packed)
    sizes = forms.sizes(spec, 2)
    assert packed.pass_bytes == sizes.pass_bytes(spec, 2)
    assert whole.weight_bytes - packed.weight_bytes == sizes.spared_bytes > 0
    assert packed.forecast is not None and whole.forecast is not None
    assert packed.forecast.tokens_per_s > whole.forecast.tokens_per_s
    gguf = str(open_checkpoint(DEFAULT_MODEL).path)
    for weights, held in (("auto", "unpacked"), ("packed", "packed")):
        assert plan_for(gguf, card, ladder="plain", weights=weights, groups=100).weights == held
    assert plan_for(str(tmp_path), card, ladder="self:mlp=0.5 / plain", groups=100).weights == "unpacked"


@pytest.mark.gpu
@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "gptq-4-act-order"])
def test_on_a_gpu(folder: str) -> None:
    """Packed by itself; log-probabilities are the CPU's, whatever drafts and wherever parts lie the tokens are the same."""
    scored = replace(GREEDY, prompt_logprobs=0)
    found = []
    for how in ({"device": "cpu", "weights": "unpacked"}, {"device": "cuda"}):
        llm = made(folder, **how)
        [output] = llm.generate([IDS], scored)
        assert output.prompt_logprobs is not None
        found.append([next(iter(each.values())).logprob for each in output.prompt_logprobs if each is not None])
    assert llm.plan.weights == "packed" and found[1] == pytest.approx(found[0], abs=1e-3)
    expected = tokens(llm, SEEDED)
    assert tokens(made(folder, device="cuda", eager=True), SEEDED) == expected
    assert tokens(made(folder, RETRIEVAL, device="cuda"), SEEDED) == expected
    ways = {part.replace(" ", "_"): way for part, way in WAYS.items()}
    plan = away(llm.plan, shares(1, llm.spec.num_layers, **ways))
    assert tokens(LLM(MADE / folder, plan=plan, progress=False), SEEDED) == expected


@pytest.mark.gpu
def test_sixteen_bits_on_a_gpu() -> None:
    for folder in ("awq-4", "compressed-4-symmetric"):
        few, whole = (made(folder, device="cuda", dtype="bfloat16", weights=weights) for weights in ("packed", "unpacked"))
        ours, theirs = tokens(few, GREEDY), tokens(whole, GREEDY)
        assert [row[0] for row in ours] == [row[0] for row in theirs]
        assert tokens(made(folder, RETRIEVAL, device="cuda", dtype="bfloat16", weights="packed"), GREEDY) == ours

"""Ladders with sparse rungs on tiny models: as drafts they change no token, as last rungs each token's law is its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_speculation import GREEDY, PARAMS, SEEDED, ids, prompts
from tiny import tiny_model

from rowcast import LLM, RequestOutput, SamplingParams
from rowcast.errors import UserError
from rowcast.kernels import native
from rowcast.runtime.checkpoint import opening
from rowcast.runtime.ladder.spec import Rung
from rowcast.runtime.plan_for import plan_for
from rowcast.runtime.sparse.artefact import DESCRIPTION, FORMAT, TENSORS, Calibration
from rowcast.runtime.sparse.sizes import copied_bytes, expected_bytes
from rowcast.runtime.spec import layer_parameters

VIEW = "chunk=4,sinks=4,recent=8"
DRAFTS = {
    "neurons": "self:mlp=0.5,gamma=3 / plain",
    "neurons and KV": f"self:mlp=0.5,kv=24,{VIEW},gamma=3 / plain",
    "re-ranked": "self:mlp=0.3,by=q2,over=1.5,gamma=4 / plain",
    "oracle": "self:mlp=0.4,by=oracle,gamma=2 / plain",
    "gate": "self:mlp=0.4,by=gate,gamma=2 / plain",
    "head": "self:mlp=0.5,by=q8,lm=hire,gamma=3 / plain",
    "only the head": "self:lm=hire,gamma=2 / plain",
    "two sparse": "self:mlp=0.25,gamma=2 / self:mlp=0.6,gamma=4 / plain",
    "sparse under retrieval": f"ngram:gamma=2 / self:mlp=0.5,gamma=3 / self:kv=24,{VIEW},gamma=5 / plain",
    "hire": "hire",
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    tiny_model("llama-gqa", path)
    return path


def make(target: Path, ladder: str, **keywords: Any) -> LLM:
    return LLM(target, ladder=ladder, dtype="float32", device="cpu", block_size=4, progress=False, **keywords)


def approximate(target: Path, ladder: str, **keywords: Any) -> LLM:
    return make(target, ladder, mode="approximate", **keywords)


@pytest.fixture(scope="module")
def plain(target: Path) -> dict[str, list[list[int]]]:
    llm = make(target, "plain")
    return {name: ids(llm.generate(prompts(6), params)) for name, params in PARAMS.items()}


@pytest.mark.parametrize("ladder", DRAFTS)
def test_sparse_drafts_change_no_token(target: Path, plain: dict[str, list[list[int]]], ladder: str) -> None:
    llm = make(target, DRAFTS[ladder])
    for name in ("greedy", "seeded", "penalised"):
        outputs = llm.generate(prompts(6), PARAMS[name])
        assert ids(outputs) == plain[name], name
        llm.engine.check()
    assert ids(llm.generate(prompts(6)[3], SEEDED)) == [plain["seeded"][3]]


@pytest.mark.parametrize("verification", ["coupled", "maximal"])
def test_several_views_share_the_store(target: Path, plain: dict[str, list[list[int]]], verification: str) -> None:
    """Greedy output is the same under both rules."""
    llm = make(target, DRAFTS["two sparse"], verification=verification)
    outputs = llm.generate(prompts(6), GREEDY)
    assert ids(outputs) == plain["greedy"]
    for name in llm.engine._ladder.names[:-1]:
        assert all(output.metrics.rungs[name].tokens > 0 for output in outputs)


def density(outputs: list[RequestOutput], name: str) -> float:
    counts = [output.metrics.rungs[name] for output in outputs]
    return sum(c.neurons for c in counts) / sum(c.neurons_of for c in counts)


@pytest.mark.parametrize(("by", "share"), [("q4", 0.5), ("oracle", 0.25), ("gate", 0.7), ("q2,over=1.5", 0.4)])
def test_density_is_reached_and_told(target: Path, by: str, share: float) -> None:
    llm = make(target, f"self:mlp={share},by={by},gamma=3 / plain")
    outputs = llm.generate(prompts(4), GREEDY)
    assert density(outputs, "self") == pytest.approx(share, abs=0.01)
    for output in outputs:
        told = output.to_json()["stats"]
        assert told["density"]["plain"] == 1.0 and told["density"]["self"] == pytest.approx(share, abs=0.01)
        json.dumps(told)


def test_fewer_neurons_are_fewer_bytes(target: Path) -> None:
    """Of single sequences, whose passes read their own rows only."""
    read = []
    for ladder in ("self:mlp=1,by=q8", "self:mlp=0.5,by=q8", "self:mlp=0.25,by=q8"):
        [output] = approximate(target, ladder).generate([[1, 2, 3]], GREEDY)
        read.append(output.metrics.rungs["self"].bytes_read)
    row = 3 * 64 * 4 * 2 * (24 - 1)  # rows of a neuron, hidden size, bytes, layers, tokens; the first comes of the prefill
    assert read[0] - read[1] == 45 * row and read[0] - read[2] == (90 - 22) * row


@pytest.mark.parametrize("ladder", ["self:mlp=0.5,by=q4", "self:mlp=0.3,by=q2,over=2", "self:mlp=1,by=q8"])
def test_a_pass_reads_what_was_expected(target: Path, ladder: str) -> None:
    if "over" in ladder and native.library() is None:
        pytest.skip("library products read the down rows of all candidates")
    llm = approximate(target, ladder)
    [output] = llm.generate([[1, 2, 3]], GREEDY)
    entries = sum(range(4, 4 + 23))
    assert output.metrics.rungs["self"].bytes_read == 23 * llm.plan.pass_bytes + entries * llm.plan.kv_token_bytes


APPROXIMATE = {
    "neurons": "self:mlp=0.5",
    "re-ranked": "self:mlp=0.3,by=q2,over=1.5",
    "head": "self:mlp=0.4,by=q8,lm=hire",
    "oracle": "self:mlp=0.2,by=oracle",
}


@pytest.mark.parametrize("ladder", APPROXIMATE.values(), ids=APPROXIMATE)
def test_approximate_output_depends_on_the_request_alone(target: Path, plain: dict[str, list[list[int]]], ladder: str) -> None:
    """In a batch, preempted, and with rungs below that draft."""
    for params in (GREEDY, SEEDED):
        llm = approximate(target, ladder)
        alone = [ids(llm.generate(prompt, params))[0] for prompt in prompts(6)]
        assert ids(llm.generate(prompts(6), params)) == alone
        assert alone != plain["greedy" if params is GREEDY else "seeded"]
        for below in ("ngram:gamma=4", f"self:kv=24,{VIEW},gamma=3", "self:mlp=0.25,by=q4,gamma=3"):
            assert ids(approximate(target, f"{below} / {ladder}").generate(prompts(6), params)) == alone, below


def test_preempted_sequences_run_through_the_same_rung(target: Path) -> None:
    llm = approximate(target, "ngram:gamma=2 / self:mlp=0.3,by=q4")
    params = replace(SEEDED, max_tokens=40)
    undisturbed = ids(llm.generate(prompts(6, 20, 60), params))
    tight = replace(llm.plan, num_blocks=60, max_context=128)
    squeezed = LLM(target, plan=tight, progress=False)
    outputs = squeezed.generate(prompts(6, 20, 60), params)
    assert sum(output.metrics.preemptions for output in outputs) > 0
    assert ids(outputs) == undisturbed
    squeezed.engine.check()


def test_all_neurons_are_the_whole_model(target: Path, plain: dict[str, list[list[int]]]) -> None:
    for name, params in (("greedy", GREEDY), ("seeded", SEEDED)):
        assert ids(approximate(target, "self:mlp=1").generate(prompts(6), params)) == plain[name]


def test_auto_takes_a_sparse_rung_where_a_density_is_given(target: Path, plain: dict[str, list[list[int]]]) -> None:
    llm = make(target, "auto", density=0.4)
    assert llm.plan.ladder == ["ngram", "self:mlp=0.4,by=q4", "plain"]
    assert ids(llm.generate(prompts(6), SEEDED)) == plain["seeded"]
    assert "self" not in make(target, "auto").plan.ladder_text


def test_what_the_plan_counts_is_what_is_allocated(target: Path) -> None:
    whole = make(target, "plain").plan
    for ladder in (
        "self:mlp=0.5,by=q4 / plain",
        "self:mlp=0.5,by=q3,lm=hire / plain",
        "self:mlp=0.5 / self:mlp=0.2,by=q2 / plain",
        f"self:kv=24,{VIEW} / self:mlp=0.5,by=q4 / plain",
    ):
        llm = make(target, ladder)
        assert llm.plan.weight_bytes == whole.weight_bytes
        assert llm.plan.rung_weight_bytes == added_bytes(llm, banks=True), ladder
    llm = approximate(target, "self:mlp=0.5,by=q4")
    assert llm.plan.rung_weight_bytes == added_bytes(llm, banks=False)
    assert llm.plan.pass_bytes < whole.pass_bytes
    both = approximate(target, f"self:kv=24,{VIEW} / self:mlp=0.5,by=q4")
    views = [rung.decoder.weights for rung in (both.engine._executor._top, *both.engine._executor._lower)]  # type: ignore[attr-defined]
    assert {type(view).__name__ for view in views} == {"SparseWeights", "DenseWeights"}
    assert both.plan.rung_weight_bytes - llm.plan.rung_weight_bytes == both.spec.num_layers * layer_parameters(both.spec) * 4
    assert both.plan.work_bytes - make(target, "plain").plan.work_bytes >= copied_bytes(both.spec, 4) > 0


def test_fallbacks_are_counted_once(target: Path) -> None:
    """Each row of logits is one of one sequence's, the prompt's last included, alone or in a batch."""

    def fallbacks(outputs: list[RequestOutput]) -> list[int]:
        return [output.metrics.rungs["self"].fallbacks + output.metrics.rungs["prefill"].fallbacks for output in outputs]

    llm = approximate(target, "self:mlp=0.5,by=q4,lm=hire", prefix_cache=False)
    llm.engine._executor._top.decoder.weights._lm._capacity = 0  # type: ignore[attr-defined]
    params = replace(GREEDY, max_tokens=5)
    alone = [fallbacks(llm.generate([prompt], params))[0] for prompt in prompts(4)]
    assert alone == [5] * 4
    assert sum(fallbacks(llm.generate(prompts(4), params))) == 20


def added_bytes(llm: LLM, *, banks: bool) -> int:
    """Of tensors that hang on sparse views and on no dense one: `banks`: with the layers' rows."""
    executor = llm.engine._executor
    rungs = [executor._top, *executor._lower]  # type: ignore[attr-defined]
    views = [rung.decoder.weights for rung in rungs]
    seen = tensors([view for view in views if type(view).__name__ == "DenseWeights"])
    if not banks:
        rows = views[0]._banks
        seen = tensors([rows.outer, rows.attention, [(bank.gate, bank.up_down) for bank in rows.ffn]])
    found = tensors([view for view in views if type(view).__name__ == "SparseWeights"])
    return sum(tensor.nbytes for key, tensor in found.items() if key not in seen)


def tensors(root: object) -> dict[int, torch.Tensor]:
    """All storages reachable from an object of ours, by address."""
    found: dict[int, torch.Tensor] = {}
    visited: set[int] = set()
    todo = [root]
    while todo:
        item = todo.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, torch.Tensor):
            if not item.is_mkldnn and item.untyped_storage().nbytes():
                found[item.untyped_storage().data_ptr()] = torch.empty(0, dtype=torch.uint8, device=item.device).set_(
                    item.untyped_storage()
                )
        elif isinstance(item, (list, tuple, set)):
            todo += item
        elif isinstance(item, dict):
            todo += item.values()
        elif type(item).__module__.startswith("rowcast"):
            slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
            todo += [getattr(item, name) for name in slots if hasattr(item, name)] + list(getattr(item, "__dict__", {}).values())
    return found


@pytest.mark.parametrize(
    ("ladder", "keywords", "said"),
    [
        ("self:mlp=0.5", {}, "mode=approximate"),
        ("plain", {"mode": "approximate"}, "ends in plain"),
        ("auto", {"mode": "approximate"}, "'auto' ends in plain"),
        ("hire", {"mode": "sloppy"}, "mode='sloppy'"),
        ("dejavu", {}, "needs a calibration"),
        ("self:mlp=0.5,by=dejavu / plain", {}, "needs a calibration"),
        ("self:mlp=0.5 / plain", {"density": 0.3}, "density=0.3 has no place"),
        ("hire", {"density": 1.5}, "density=1.5"),
        ("hire", {"calibration": "no-such-folder"}, "no-such-folder holds no calibration"),
        ("self:mlp=0.5,kv=128 / plain", {}, "kv=128"),
    ],
)
def test_mistakes_are_one_sentence(target: Path, ladder: str, keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        make(target, ladder, **keywords)
    assert "\n" not in str(error.value)


def test_quality_is_told_before_anything_is_generated(
    target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    approximate(target, "self:mlp=0.5,by=q4")
    run = f"run rowcast eval {target} --text FILE --ladder self:mlp=0.5,by=q4"
    assert f"the quality of self:mlp=0.5,by=q4 was not measured: {run}" in caplog.text
    caplog.clear()
    make(target, "self:mlp=0.5,by=q4 / plain")
    assert not caplog.text
    monkeypatch.setattr(opening, "_open_hub", lambda name: opening._open(str(target)))
    approximate(Path("owner/name"), "self:mlp=0.5,by=q4")
    assert "run rowcast eval owner/name --text FILE" in caplog.text, "as it was called"


def test_parameters_reach_sparse_rungs(target: Path) -> None:
    """Log-probabilities of an approximate rung are its own."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=2)
    entries = [
        approximate(target, ladder).generate([[5, 6, 7]], params)[0].outputs[0].logprobs
        for ladder in ("self:mlp=1", "self:mlp=0.3")
    ]
    first, second = entries
    assert first is not None and second is not None and first[0] == second[0]  # the prompt runs dense
    assert first[1] != second[1]


def calibrate(model: Path, path: Path, seed: int = 0) -> Path:
    """A calibration that knows nothing, but has all that rungs read."""
    llm = LLM(model, ladder="plain", progress=False)
    spec, generator = llm.spec, torch.Generator().manual_seed(seed)
    rows = spec.intermediate_size * (2 if spec.gated else 1)
    tensors = {"densities": torch.tensor([[0.3] * spec.num_layers, [1.0] * spec.num_layers])}
    for layer in range(spec.num_layers):
        shapes = {"dejavu.a": (16, spec.hidden_size), "dejavu.b": (rows, 16), "dejavu.bias": (rows,)}
        shapes |= {"frequency": (spec.intermediate_size,)}
        shapes |= {"heads.own.weight": (spec.num_heads, spec.hidden_size), "heads.own.bias": (spec.num_heads,)}
        tensors |= {f"layers.{layer}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        tensors[f"layers.{layer}.q4.thresholds"] = torch.tensor([0.05, 0.0])
    generator.manual_seed(seed + 100)
    for layer in range(1, spec.num_layers):
        shapes = {"heads.ahead.weight": (spec.num_heads, spec.hidden_size), "heads.ahead.bias": (spec.num_heads,)}
        tensors |= {f"layers.{layer}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    path.mkdir(exist_ok=True)
    save_file(tensors, path / TENSORS, metadata={"fingerprint": llm.plan.fingerprint})
    quality = {
        "dense": {"perplexity": 10.0, "acceptance": 1.0, "bytes": 1.0},
        "self:mlp=0.6,by=dejavu,heads=0.67": {"perplexity": 12.5, "acceptance": 0.9, "bytes": 0.7},
    }
    description = {
        "format": FORMAT,
        "fingerprint": llm.plan.fingerprint,
        "densities": [0.3, 1.0],
        "density": 0.6,
        "quality": quality,
        "scorers": {},
    }
    (path / DESCRIPTION).write_text(json.dumps(description))
    return path


@pytest.fixture(scope="module")
def calibration(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(target, tmp_path_factory.mktemp("calibration"))


def test_deja_vu_drafts_and_decides(
    target: Path, calibration: Path, plain: dict[str, list[list[int]]], caplog: pytest.LogCaptureFixture
) -> None:
    llm = make(target, "dejavu", calibration=calibration)
    assert llm.plan.ladder == ["self:mlp=0.6,by=dejavu,heads=0.67", "plain"]
    assert llm.plan.rung_weight_bytes == added_bytes(llm, banks=True)
    outputs = llm.generate(prompts(6), SEEDED)
    assert ids(outputs) == plain["seeded"]
    caplog.clear()
    last = approximate(target, "dejavu", calibration=calibration)
    assert "perplexity 12.50, with all weights 10.00, and acceptance 0.900" in caplog.text
    assert last.plan.rung_weight_bytes == added_bytes(last, banks=False)
    alone = [last.generate(prompt, SEEDED)[0] for prompt in prompts(6)]
    assert ids(last.generate(prompts(6), SEEDED)) == ids(alone) != plain["seeded"]
    for output in alone:
        assert output.metrics.density["self"] == pytest.approx(0.6, abs=0.01)
        assert output.metrics.head_density["self"] == pytest.approx(0.67, abs=0.1)


def test_a_calibration_decides_what_was_left_open(target: Path, tmp_path: Path) -> None:
    """The scorer by what was measured nearest to its density, and how many candidates hire ranks again, up to twice as many."""
    path = calibrate(target, tmp_path / "calibration")
    description = json.loads((path / DESCRIPTION).read_text())
    quality = {
        "self:mlp=0.5,by=q4": 0.8,
        "self:mlp=0.5,by=dejavu": 0.7,
        "self:mlp=0.5,by=oracle": 0.95,
        "self:mlp=0.9,by=dejavu": 0.99,
        "self:mlp=0.6,by=dejavu,over=1.5": 0.99,
    }
    fitted = {"self:mlp=0.5,by=q4": 0.6, "self:mlp=0.5,by=dejavu": 0.7}
    for measured, over, expected in (
        ({}, 1.204, ("q4", 1.21)),
        (quality, 1.2, ("q4", 1.2)),
        (fitted, 2.5, ("dejavu", 1.5)),
    ):
        description |= {
            "quality": {rung: {"perplexity": 1.0, "acceptance": figure, "bytes": 1.0} for rung, figure in measured.items()},
            "judged": [0.1, 0.5],
            "scorers": {"q4": {"over": [3.0, over]}},
        }
        (path / DESCRIPTION).write_text(json.dumps(description))
        by, hire = expected
        assert make(target, "self:mlp=0.5 / plain", calibration=path).plan.ladder[0] == f"self:mlp=0.5,by={by}"
        assert make(target, "hire", calibration=path).plan.ladder[0] == f"self:mlp=0.6,by=q4,over={hire:g},lm=hire"


def test_shares_that_are_not_reached_are_told(target: Path, calibration: Path) -> None:
    plan = make(target, "self:mlp=0.001,heads=0.6,by=q4 / plain", calibration=calibration).plan
    told = [note for note in plan.notes if note.startswith("rung self:mlp=0.001")]
    spec = make(target, "plain").spec
    heads = round(0.6 * spec.num_heads)
    assert any(f"heads=0.6 of {spec.num_heads} is {heads}, a share of {heads / spec.num_heads:.3g}" in note for note in told)
    assert any("mlp=0.001 of" in note and "is 1, a share of" in note for note in told)


CUTS = {
    "threshold": "self:mlp=0.4,by=q4,cut=threshold",
    "common": "self:mlp=0.4,by=q4,common=0.2",
    "common, re-ranked": "self:mlp=0.4,by=q2,over=1.5,common=0.2",
    "groups": "self:mlp=0.4,by=q4,group=4",
}


@pytest.mark.parametrize("ladder", CUTS.values(), ids=CUTS)
def test_other_cuts_depend_on_the_request_alone(
    target: Path, calibration: Path, plain: dict[str, list[list[int]]], ladder: str
) -> None:
    keywords = {} if "group" in ladder else {"calibration": calibration}
    drafting = make(target, f"{ladder},gamma=3 / plain", **keywords).generate(prompts(6), SEEDED)
    assert ids(drafting) == plain["seeded"]
    llm = approximate(target, ladder, **keywords)
    alone = [llm.generate(prompt, SEEDED)[0] for prompt in prompts(6)]
    assert ids(llm.generate(prompts(6), SEEDED)) == ids(alone) != plain["seeded"]
    assert ids(alone) != ids(approximate(target, ladder.split(",")[0], **keywords).generate(prompts(6), SEEDED))
    density = [output.metrics.density["self"] for output in alone]
    assert len(set(density)) > 1 if "threshold" in ladder else density == pytest.approx([0.4] * 6, abs=0.07)


def test_cuts_need_what_a_calibration_has(target: Path, calibration: Path) -> None:
    for ladder, given, said in (
        ("self:mlp=0.4,cut=threshold / plain", None, "cut=threshold needs a calibration"),
        ("self:mlp=0.4,common=0.2 / plain", None, "common=0.2 needs a calibration"),
        ("self:mlp=0.4,by=q3,cut=threshold / plain", calibration, "no thresholds of q3"),
        ("self:mlp=0.2,by=q4,cut=threshold / plain", calibration, "mlp=0.2 is below 0.3"),
    ):
        with pytest.raises(UserError, match=said) as error:
            make(target, ladder, calibration=given)
        assert "\n" not in str(error.value)


def test_heads_chosen_ahead_need_predictors_of_their_own(target: Path, calibration: Path, tmp_path: Path) -> None:
    """A calibration from before them serves other rungs."""
    older = Path(shutil.copytree(calibration, tmp_path / "older"))
    tables = {name: each for name, each in load_file(older / TENSORS).items() if "heads.ahead" not in name}
    save_file(tables, older / TENSORS, {"fingerprint": json.loads((older / DESCRIPTION).read_text())["fingerprint"]})
    for ladder, given, said in (
        ("self:heads=0.5,heads_by=ahead / plain", None, "heads=0.5 needs a calibration"),
        ("self:heads=0.5,heads_by=ahead / plain", older, "by the layer before; run rowcast calibrate again, or use heads_by=own"),
    ):
        with pytest.raises(UserError, match=said) as error:
            make(target, ladder, calibration=given)
        assert "\n" not in str(error.value)
    found = [
        ids(approximate(target, f"self:heads=0.5{by}", calibration=folder).generate(prompts(2), GREEDY))
        for by, folder in (("", older), ("", calibration), (",heads_by=ahead", calibration))
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("densities", None),
        ("densities", "x"),
        ("densities", [0.25, 0.5]),
        ("densities", [0.5, 0.25, 1.0]),
        ("densities", [0.5, "a", 1.0]),
        ("quality", None),
        ("quality", {"dense": {"perplexity": 3.0}}),
        ("scorers", []),
        ("density", 0.0),
        ("density", True),
        ("lm_head_share", "much"),
    ],
)
def test_a_damaged_calibration_is_one_sentence(target: Path, calibration: Path, tmp_path: Path, key: str, value: object) -> None:
    folder = Path(shutil.copytree(calibration, tmp_path / "damaged"))
    description = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(description | {key: value}))
    with pytest.raises(UserError, match=f"is damaged, its {key} is .* run rowcast calibrate again") as error:
        Calibration.open(folder, description["fingerprint"])
    assert "\n" not in str(error.value)


def test_tensors_of_another_calibration_are_refused(target: Path, calibration: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(calibration, tmp_path / "mixed"))
    tables = load_file(folder / TENSORS)
    fingerprint = json.loads((folder / DESCRIPTION).read_text())["fingerprint"]
    for metadata in (None, {"fingerprint": "other"}):
        save_file(tables, folder / TENSORS, metadata)
        with pytest.raises(UserError, match="was made for other weights"):
            Calibration.open(folder, fingerprint)
    for name, ladder in (
        ("densities", "self:mlp=0.5,by=q4"),
        ("layers.1.dejavu.b", "self:mlp=0.5,by=dejavu"),
        ("layers.0.frequency", "self:mlp=0.5,by=q4,common=0.2"),
        ("layers.0.q4.thresholds", "self:mlp=0.5,by=q4,cut=threshold"),
        ("layers.0.heads.own.bias", "self:heads=0.5"),
    ):
        save_file(tables | {name: tables[name][1:]}, folder / TENSORS, {"fingerprint": fingerprint})
        with pytest.raises(UserError, match=f"{name} of the calibration .* has the shape"):
            make(target, f"{ladder} / plain", calibration=folder)


def test_the_heads_share_is_the_measured_one(target: Path, calibration: Path, tmp_path: Path) -> None:
    """Of lm=hire a pass reads more than the first stage; what it reads is measured by a calibration."""
    folder = Path(shutil.copytree(calibration, tmp_path / "measured"))
    description = json.loads((folder / DESCRIPTION).read_text())
    spec = LLM(target, ladder="plain", progress=False).spec
    expected = {}
    for share in (0.4, 0.6):
        (folder / DESCRIPTION).write_text(json.dumps(description | {"lm_head_share": share}))
        found = Calibration.open(folder, description["fingerprint"])
        expected[share] = expected_bytes(spec, Rung(kind="self", lm="hire"), 4, found)
    whole = expected_bytes(spec, Rung(kind="plain"), 4, None)
    rows = spec.vocab_size * spec.embed_size * 4
    assert [whole - expected[share] for share in (0.4, 0.6)] == pytest.approx([0.6 * rows, 0.4 * rows], abs=1)


@pytest.mark.parametrize(
    "ladder",
    ["dejavu", "self:heads=0.5,heads_by=ahead,gamma=3 / self:mlp=0.5,by=q4,heads=0.5,kv=24,recent=8,sinks=4,gamma=5"],
)
def test_skipped_heads_of_ungrouped_attention(tmp_path: Path, ladder: str) -> None:
    """Their K/V are late; as a last rung they depend on the request alone, as drafts they change nothing."""
    tiny_model("opt", tmp_path / "opt")
    found = calibrate(tmp_path / "opt", tmp_path / "calibration")
    asked = [prompt[:20] for prompt in prompts(4)]
    exact = make(tmp_path / "opt", ladder if ladder == "dejavu" else f"{ladder},chunk=4 / plain", calibration=found)
    assert ids(exact.generate(asked, SEEDED)) == ids(make(tmp_path / "opt", "plain").generate(asked, SEEDED))
    if ladder == "dejavu":
        last = approximate(tmp_path / "opt", ladder, calibration=found)
        alone = [ids(last.generate(prompt, SEEDED))[0] for prompt in asked]
        assert ids(last.generate(asked, SEEDED)) == alone
        last.engine.check()


def test_a_plan_knows_its_calibration(target: Path, calibration: Path, tmp_path: Path) -> None:
    llm = make(target, "dejavu", calibration=calibration)
    llm.plan.save(tmp_path / "plan")
    again = LLM(target, plan=tmp_path / "plan", calibration=calibration, progress=False)
    assert ids(again.generate([[1, 2, 3]], GREEDY)) == ids(llm.generate([[1, 2, 3]], GREEDY))
    other = calibrate(target, tmp_path / "other", seed=1)
    bare = make(target, "hire").plan
    for plan, given, said in (
        (llm.plan, None, "made with a calibration"),
        (llm.plan, other, "made with another calibration"),
        (bare, other, "made with no calibration"),
    ):
        with pytest.raises(UserError, match=said):
            LLM(target, plan=plan, calibration=given, progress=False)
    with pytest.raises(UserError, match="has no place in the ladder 'ngram / plain'"):
        make(target, "ngram", calibration=calibration)
    plan = make(target, "auto", calibration=calibration).plan
    assert (plan.ladder, plan.calibration) == (["ngram", "plain"], "")
    assert any(note.startswith("no rung self:mlp=0.6,by=q4: it reads") for note in plan.notes)  # so small are the matrices


def add_levels(folder: Path) -> Path:
    """Sensitivities and levels for the calibration there."""
    tables, generator = load_file(folder / TENSORS), torch.Generator().manual_seed(40)
    for name in [name for name in tables if name.endswith(".frequency")]:
        sensitivity = torch.rand(tables[name].shape, generator=generator) * 4 + 0.2
        tables[name.replace("frequency", "sensitivity")] = sensitivity
    tables |= {"levels.q4": torch.tensor([0.1, 0.0]), "levels.oracle": torch.tensor([0.1, 0.0])}
    tables["levels.densities"] = tables["densities"].flip(1) * 0.9
    save_file(tables, folder / TENSORS, {"fingerprint": json.loads((folder / DESCRIPTION).read_text())["fingerprint"]})
    return folder


def test_a_ladder_by_levels(target: Path, plain: dict[str, list[list[int]]], tmp_path: Path) -> None:
    """As a draft it changes no token, as the last rung each token's set is its own, and the plan counts what it takes."""
    found = add_levels(calibrate(target, tmp_path))
    llm = make(target, "hire", calibration=found)
    assert llm.plan.ladder == ["self:mlp=0.6,by=q4,cut=threshold,lm=hire", "plain"]
    assert ids(llm.generate(prompts(6), SEEDED)) == plain["seeded"]
    assert llm.plan.rung_weight_bytes == added_bytes(llm, banks=True)
    for ladder in (
        "hire",
        "self:mlp=0.4,by=oracle,cut=threshold",
        "self:mlp=0.4,by=q2,over=1.5",
        "self:mlp=0.5,by=gate",
        "dejavu",
    ):
        last = approximate(target, ladder, calibration=found)
        assert last.plan.rung_weight_bytes == added_bytes(last, banks=False)
        alone = [last.generate(prompt, SEEDED)[0] for prompt in prompts(6)]
        assert ids(last.generate(prompts(6), SEEDED)) == ids(alone) != plain["seeded"]
        shares = [output.metrics.density["self"] for output in alone]
        assert (len(set(shares)) == 6) == ("threshold" in str(last.plan.ladder)) and all(0.02 < share < 0.98 for share in shares)
        assert all(output.metrics.rungs["self"].overflows == 0 for output in alone)


@pytest.fixture
def own(target: Path, tmp_path: Path) -> Path:
    """A model with a calibration in its directory."""
    model = Path(shutil.copytree(target, tmp_path / "model"))
    calibrate(model, model / "calibration")
    return model


def test_a_models_own_calibration_is_used_by_itself(own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = make(own, "dejavu", calibration=own / "calibration")
    llm = make(own, "dejavu")
    assert (llm.plan.ladder, llm.plan.calibration) == (given.plan.ladder, given.plan.calibration) and llm.plan.calibration
    told = f"calibration: the model's own ({own / 'calibration'})"
    assert told in llm.plan.notes and told not in given.plan.notes and told not in make(own, "ngram").plan.notes
    assert told in plan_for(str(own), ladder="dejavu").notes
    assert told not in plan_for(str(own), ladder="dejavu", calibration=own / "calibration").notes
    tokens = ids(llm.generate([[1, 2, 3]], GREEDY))
    assert tokens == ids(given.generate([[1, 2, 3]], GREEDY))
    llm.plan.save(tmp_path / "plan")
    again = LLM(own, plan=tmp_path / "plan", progress=False)
    assert ids(again.generate([[1, 2, 3]], GREEDY)) == tokens
    for ladder in ("plain", "ngram"):
        bare = make(own, ladder).plan
        assert bare.calibration == "" and LLM(own, plan=bare, progress=False).plan.ladder == bare.ladder
    other = calibrate(own, tmp_path / "other", seed=1)
    assert make(own, "dejavu", calibration=other).plan.calibration not in ("", llm.plan.calibration), "what is given comes first"
    shutil.copytree(other, own / "calibration", dirs_exist_ok=True)
    with pytest.raises(UserError, match="the model has a calibration of its own, but the plan was made with another calibration"):
        LLM(own, plan=tmp_path / "plan", progress=False)
    assert "calibration is left out" not in caplog.text


@pytest.mark.parametrize("damage", ["cut off", "other weights"])
def test_a_models_own_calibration_that_cannot_be_used(own: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is told why; ladders that need one are refused as without, and so is a plan that was made with it."""
    planned = make(own, "dejavu").plan
    tables = own / "calibration" / TENSORS
    if damage == "cut off":
        tables.write_bytes(tables.read_bytes()[:100])
    else:
        description = json.loads((own / "calibration" / DESCRIPTION).read_text())
        save_file(load_file(tables), tables, {"fingerprint": "0" * 16})
        (own / "calibration" / DESCRIPTION).write_text(json.dumps(description | {"fingerprint": "0" * 16}))
    assert make(own, "auto").plan.ladder == ["ngram", "plain"]
    assert caplog.text.count("the model's own calibration is left out") == 1
    with pytest.raises(UserError, match="the ladder dejavu needs a calibration"):
        make(own, "dejavu")
    said = "was made for weights '0000" if damage == "other weights" else TENSORS
    with pytest.raises(UserError, match=said):
        make(own, "dejavu", calibration=own / "calibration")
    assert not plan_for(str(own), ladder="hire").calibration, "a plan is made of what the model can use"
    with pytest.raises(UserError, match="the ladder dejavu needs a calibration"):
        plan_for(str(own), ladder="dejavu")
    with pytest.raises(UserError, match=said):
        plan_for(str(own), ladder="dejavu", calibration=own / "calibration")
    with pytest.raises(UserError, match=f"a calibration, and the model's own cannot be used .*{said}.*give calibration=DIR"):
        LLM(own, plan=planned, progress=False)


def test_levels_stand_for_thresholds(target: Path, tmp_path: Path) -> None:
    found = add_levels(calibrate(target, tmp_path))
    tables = {name: each for name, each in load_file(found / TENSORS).items() if not name.endswith(".thresholds")}
    save_file(tables, found / TENSORS, {"fingerprint": json.loads((found / DESCRIPTION).read_text())["fingerprint"]})
    assert make(target, "self:mlp=0.4,by=q4,cut=threshold / plain", calibration=found).plan.calibration
    for rung, said in (("mlp=0.4,by=q8", "no thresholds of q8"), ("mlp=0.2,by=q4", "mlp=0.2 is below 0.3")):
        with pytest.raises(UserError, match=said):
            make(target, f"self:{rung},cut=threshold / plain", calibration=found)

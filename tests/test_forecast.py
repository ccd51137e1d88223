"""What the planner is asked: passes, bytes and acceptances of ladders from a config alone, with torch absent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rowcast.errors import UserError
from rowcast.placement.models import known_config
from rowcast.placement.workload import LadderUse
from rowcast.runtime.acceptances import Acceptance, Acceptances
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.forecast import LadderWish as Wish
from rowcast.runtime.forecast import candidates, gamma_grid, ladder_use, open_spec, spec_digest, with_gammas, workload
from rowcast.runtime.hotness import hotness
from rowcast.runtime.kv.sizes import ListWork, listed_bytes, policy_sizes
from rowcast.runtime.ladder.memory import kv_heads, ladder_needs, selected_bytes, streaming_bytes
from rowcast.runtime.ladder.spec import Ladder, Rung
from rowcast.runtime.ladder.uses import DraftConfig
from rowcast.runtime.lowbit_sizes import rounded_bytes
from rowcast.runtime.sparse.artefact import DESCRIPTION, FORMAT, TENSORS, Calibration
from rowcast.runtime.sparse.sizes import asking_layers, expected_bytes, layer_shares, predictor_bytes, rung_shares
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token, parameter_count

YARN, DRAFT = "NousResearch/Yarn-Llama-2-7b-128k", "JackFram/llama-68m"
TRIFORCE = f"draft:model={DRAFT},gamma=2 / self:kv=4096,gamma=3 / plain"


def spec_of(name: str) -> ModelSpec:
    config = known_config(name)
    assert config is not None
    return spec_from_config(config)


LLAMA, OPT, SMALL = spec_of(YARN), spec_of("facebook/opt-6.7b"), spec_of(DRAFT)


def use(text: str, spec: ModelSpec = LLAMA, acceptance: str | float | None = None, **changes: Any) -> LadderUse:
    calibration = changes.pop("calibration", None)
    how: dict[str, Any] = {"width": 2, "context": 32768, "drafts": {DRAFT: SMALL}} | changes
    return ladder_use(
        Ladder.parse(text), spec, calibration=calibration, acceptance=Acceptances.of(acceptance, spec, calibration), **how
    )


def needs_of(text: str, listed: bool, spec: ModelSpec = LLAMA) -> Any:
    return ladder_needs(
        Ladder.parse(text),
        spec,
        {DRAFT: DraftConfig(SMALL)} if DRAFT in text else {},
        adaptive=False,
        verification="coupled",
        calibration=None,
        dense_copy=False,
        listed=listed,
        width=2,
        block_size=16,
        max_context=32768,
        head_copy_bytes=lambda _: 0,
    )


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    """Of a model of SMALL's shape, where neuron n of layer i is needed with frequency (n + 1) / (N + 1), in a shuffled order."""
    neurons, rng = SMALL.intermediate_size, np.random.default_rng(0)
    line = (np.arange(neurons, dtype=np.float32) + 1) / (neurons + 1)
    tensors = {f"layers.{i}.frequency": rng.permutation(line) for i in range(SMALL.num_layers)}
    tensors["densities"] = np.array([[0.3] * SMALL.num_layers, [1.0] * SMALL.num_layers], np.float32)
    folder = tmp_path / "calibration"
    folder.mkdir()
    save_file(tensors, folder / TENSORS, metadata={"fingerprint": "0" * 16})
    quality = {"dense": (9.0, 1.0), "self:mlp=0.3,by=q4": (9.5, 0.87)}
    description = {
        "format": FORMAT,
        "fingerprint": "0" * 16,
        "density": 0.3,
        "densities": [0.3, 1.0],
        "scorers": {},
        "lm_head_share": 0.2,
        "quality": {name: {"perplexity": p, "acceptance": a} for name, (p, a) in quality.items()},
    }
    (folder / DESCRIPTION).write_text(json.dumps(description))
    return Calibration.open(folder, None)


def test_a_config_is_enough_and_torch_may_be_absent(calibration: Calibration) -> None:
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "safetensors"):
            raise ImportError(name, name=name)
sys.meta_path.insert(0, Blocked())
from rowcast.runtime.forecast import workload
found = workload(model={YARN!r}, ladder="triforce", draft={DRAFT!r}, context=122880)
sparse = workload(model={DRAFT!r}, calibration={str(calibration.path)!r}, context=512)
print(len(found.ladders), found.ladders[0].rungs[0].model.hidden_size, sparse.hotness.origin)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["24", "768", "measured"], ran.stderr


def test_a_round_of_triforce() -> None:
    """The rung self has to add 3 tokens, 2 at a time are proposed, .5 of them stand. With 3 missing a pass adds 1, 2 or 3 with .5,
    .25 and .25; with 2 missing it is asked for one proposal and adds 1 or 2; with 1 missing it adds that. So 2 passes and 2 + .5 * 1
    tokens of the draft; then the last rung sees 3 and the pending one."""
    found = use(TRIFORCE, acceptance="self:kv=4096=0.9,draft=0.5")
    assert [(rung.passes, rung.tokens) for rung in found.rungs] == [(2.5, 1), (2.0, 2), (1.0, 4)]
    assert found.tokens_per_round == pytest.approx(1 + 0.9 + 0.9**2 + 0.9**3)
    assert found.tokens_per_round_range == (found.tokens_per_round,) * 2
    assert [(rung.kv_entries, rung.model) for rung in found.rungs] == [(256, SMALL), (4096, None), (None, None)]
    assert [found.reads_placed(rung) for rung in found.rungs] == [False, True, True]
    assert found.family == f"draft:model={DRAFT} / self:kv=4096 / plain"


@pytest.mark.parametrize(
    ("text", "rungs", "tokens"),
    [
        ("plain", 1, 1.0),
        ("ngram / plain", 1, 1.0),
        ("ngram / self:kv=512,gamma=2 / plain", 2, 1 + 0.5 + 0.25),
        ("ngram:gamma=4 / plain", 1, 1 + 0.5 + 0.25 + 0.125 + 0.0625),
    ],
)
def test_a_lookup_takes_no_time(text: str, rungs: int, tokens: float) -> None:
    found = use(text, acceptance=0.5 if "gamma" in text else None)
    assert len(found.rungs) == rungs and found.tokens_per_round == pytest.approx(tokens)
    assert found.rungs[-1].tokens == (1 if tokens == 1 else 3 if rungs == 2 else 5)


def test_a_lookup_helps_where_its_acceptance_is_given() -> None:
    text = "ngram:gamma=2 / self:kv=512,gamma=3 / plain"
    idle, helped = use(text, acceptance="self=0.9"), use(text, acceptance="self=0.9,ngram=0.5")
    assert idle.rungs[0].passes == 3 > helped.rungs[0].passes == 2


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("plain", LLAMA),
        (TRIFORCE, LLAMA),
        ("self:kv=2048,view=streaming,gamma=4 / plain", LLAMA),
        ("self:mlp=0.3,by=q4,over=1.5,lm=hire,gamma=4 / plain", OPT),
        ("self:mlp=0.3,by=gate,kv=1024,score=mean,gamma=2 / plain", LLAMA),
        ("self:bits=8,gamma=4 / plain", OPT),
        ("self:bits=4,kv=1024,gamma=2 / self:bits=8,gamma=4 / plain", LLAMA),
        ("self:bits=4", LLAMA),
        (f"draft:model={DRAFT},kv=full,gamma=3 / plain", LLAMA),
    ],
)
def test_bytes_are_those_that_the_engine_takes(text: str, spec: ModelSpec) -> None:
    found, listed, copied = use(text, spec), needs_of(text, True, spec), needs_of(text, False, spec)
    alone = rounded_bytes(spec, found.alone_bits) if found.alone_bits else 0  # which the planner places
    assert found.alone_bits == (4 if text == "self:bits=4" else 0)
    assert found.fixed_bytes + found.shared_bytes + alone == listed.weight_bytes == copied.weight_bytes
    drafts, context = found.draft_kv_bytes, 32768
    streams, beside = (0, drafts) if "kv=full" in text else (drafts, 0)
    assert (drafts > 0) == ("draft" in text)
    assert found.slot_bytes + streams == copied.slot_bytes + copied.query_bytes
    assert found.listed_slot_bytes + streams == listed.slot_bytes + listed.row_bytes + listed.query_bytes
    assert found.kv_share * 16 * kv_bytes_per_token(spec, 2) + beside / context * 16 == pytest.approx(listed.block_bytes)
    assert (found.work_bytes == 0) == (text == "plain")


def test_bytes_by_their_parts() -> None:
    neurons = LLAMA.num_layers * LLAMA.intermediate_size
    found, view = use(TRIFORCE), Rung(kind="self", kv=4096)
    assert found.fixed_bytes == 2 * parameter_count(SMALL)
    assert found.shared_bytes == 12 * neurons
    queries = 16 * LLAMA.num_layers * LLAMA.hidden_size * 2
    stream = streaming_bytes(SMALL, 256, 16, 3, 2)
    assert found.draft_kv_bytes == stream
    assert found.slot_bytes == selected_bytes(LLAMA, policy_sizes(view), 4096, 3, 2) + queries
    assert found.listed_slot_bytes == 2 * listed_bytes(LLAMA, 4096, 8) + queries
    assert found.listed_work_bytes - found.work_bytes == ListWork.of(LLAMA, 16, 2).bytes(4096)[1]  # 32Ki entries, chunks of 8
    assert found.kv_share == 1 / 8  # two bounds of eight keys; values have none
    low = use("self:bits=4,gamma=2 / plain")
    assert low.shared_bytes == 12 * neurons + rounded_bytes(LLAMA, 4)
    sparse = Rung.parse("self:mlp=0.3,by=q4,lm=hire")
    assert use(f"{sparse} / plain").shared_bytes == 12 * neurons + predictor_bytes(LLAMA, sparse, None)


def test_a_layer_that_keeps_all_neurons_has_no_predictor(tmp_path: Path) -> None:
    """Of SMALL's two layers the last one keeps all: half of what is loaded and read for scores, half of the layers that choose."""
    spec, fingerprint = SMALL, {"fingerprint": "0" * 16}
    save_file({"densities": np.array([[0.1, 1.0], [1.0, 1.0]], np.float32)}, tmp_path / TENSORS, metadata=fingerprint)
    description = {"format": FORMAT, **fingerprint, "density": 0.55, "densities": [0.55, 1.0], "scorers": {}, "quality": {}}
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    learnt, rung = Calibration.open(tmp_path, None), Rung.parse("self:mlp=0.55,by=q4")
    assert spec.num_layers == 2 and layer_shares(0.55, 2, learnt) == pytest.approx([0.1, 1.0])
    assert layer_shares(0.7, 2, learnt) == pytest.approx([0.1 * 2 / 3 + 1 / 3, 1.0])
    assert 2 * predictor_bytes(spec, rung, learnt) == predictor_bytes(spec, rung, None) > 0
    own, alike = (use(f"{rung},gamma=2 / plain", spec, calibration=each, context=2048) for each in (learnt, None))
    assert (own.rungs[0].asking, alike.rungs[0].asking) == (0.5, 1.0)
    assert own.rungs[0].proxy_bytes == own.rungs[0].whole_proxy_bytes == alike.rungs[0].proxy_bytes // 2
    assert alike.shared_bytes - own.shared_bytes == predictor_bytes(spec, rung, learnt) and alike.rungs[0].whole_proxy_bytes == 0
    assert expected_bytes(spec, rung, 2, None) - expected_bytes(spec, rung, 2, learnt) == own.rungs[0].proxy_bytes
    everywhere = Rung.parse("self:mlp=1.0,by=q4")  # then it is asked for, as someone wants to know what that takes
    assert predictor_bytes(spec, everywhere, learnt) == predictor_bytes(spec, rung, None)


def test_levels_decide_the_layers_shares(tmp_path: Path) -> None:
    """Of cut=threshold by a scorer that has some; sensitivities are held for layers that choose, and then there are two lengths."""
    spec, fingerprint = SMALL, {"fingerprint": "0" * 16}
    tensors = {"densities": np.array([[0.1, 1.0], [1.0, 1.0]], np.float32), "levels.q4": np.array([1.0, 0.0], np.float32)}
    tensors["levels.densities"] = np.array([[0.9, 0.2], [1.0, 1.0]], np.float32)
    description = {"format": FORMAT, **fingerprint, "density": 0.55, "densities": [0.55, 1.0], "scorers": {}, "quality": {}}
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))

    def opened() -> Calibration:
        save_file(tensors, tmp_path / TENSORS, metadata=fingerprint)
        return Calibration.open(tmp_path, None)

    older, best, above = opened(), *(Rung.parse(f"self:mlp=0.55,by=q4{cut}") for cut in ("", ",cut=threshold"))
    assert rung_shares(best, 2, older) == rung_shares(replace(above, by="q8"), 2, older) == pytest.approx([0.1, 1.0])
    assert rung_shares(above, 2, older) == pytest.approx([0.9, 0.2])
    assert predictor_bytes(spec, above, older) == 2 * predictor_bytes(spec, best, older)
    assert [asking_layers(spec, rung, older) for rung in (best, above)] == [1, 2]
    tensors["layers.0.sensitivity"] = np.ones(spec.intermediate_size, np.float32)
    for rung in (best, above):
        more = predictor_bytes(spec, rung, opened()) - predictor_bytes(spec, rung, older)
        assert more == 4 * spec.intermediate_size * asking_layers(spec, rung, older)
    named = [str(ladder) for ladder in candidates(spec, Wish(context=512, calibration=older))]
    assert "self:mlp=0.55,by=q4,cut=threshold / plain" in named and "self:mlp=0.55,by=q4 / plain" not in named


def test_a_models_own_calibration_is_found(calibration: Calibration, caplog: pytest.LogCaptureFixture) -> None:
    """In its directory, for any ladder; what cannot be used is told once, and left out."""
    model = calibration.path.parent
    config = known_config(DRAFT)
    assert config is not None
    (model / "config.json").write_text(json.dumps(config))
    given = workload(model=str(model), calibration=calibration.path, context=512)
    assert workload(model=str(model), context=512) == given and given.hotness.origin == "measured"
    assert workload(model=str(model), ladder="plain", context=512).hotness.origin == "assumed"
    assert workload(model=f"random:{DRAFT}", context=512).hotness.origin == "assumed" and not caplog.text
    (calibration.path / DESCRIPTION).write_text("{")
    for _ in range(2):
        assert workload(model=str(model), context=512).hotness.origin == "assumed"
    assert caplog.text.count("the model's own calibration is left out") == 1 and "is damaged" in caplog.text
    with pytest.raises(UserError, match="dejavu needs a calibration"):
        workload(model=str(model), ladder="dejavu", context=512)


def test_late_keys_and_values() -> None:
    """All heads of a token write them within 16 tokens; below a last rung that writes all, only those that are chosen do."""
    spec = spec_of("facebook/opt-175b")

    def shares(text: str, spec: ModelSpec = spec) -> list[float]:
        ladder = Ladder.parse(text)
        return [kv_heads(ladder, rung, spec, on_gpu=False) for rung in ladder.rungs]

    assert shares("self:heads=0.25") == [0.25 + 0.75 / 16]
    assert shares("self:heads=0.25 / plain") == [0.25, 1.0]
    assert shares("self:kv=256 / self:heads=0.25") == [1.0, 1.0]  # whose entries another rung reads
    assert shares("self:heads=0.25", spec_of("meta-llama/Llama-3.1-8B")) == [1.0]  # grouped heads share theirs


@pytest.mark.parametrize(
    ("text", "rung", "on_gpu"),
    [
        ("self:heads=0.25", 0, 0.25 + 0.75 / 16),
        ("ngram:gamma=7 / self:heads=0.25", -1, 0.25 + 0.75 / 16),
        ("ngram:gamma=8 / self:heads=0.25", -1, 1.0),
        ("ngram / self:heads=0.25", -1, 1.0),  # which may draft 16
        ("self:heads=0.25,gamma=15 / plain", 0, 0.25),
        ("self:heads=0.25,gamma=16 / plain", 0, 1.0),
        ("ngram:gamma=16 / self:heads=0.25,gamma=2 / plain", 0, 1.0),
    ],
)
def test_a_gpu_s_rounds_write_late_as_long_as_they_keep_the_inputs(text: str, rung: int, on_gpu: float) -> None:
    """Of 16 tokens: a round's, of a last rung two rounds'. A CPU, which fills in before places run out, has no such bound."""
    found = use(text, OPT).rungs[rung]
    last = rung == -1 or "/" not in text
    assert found.gpu_kv_heads == on_gpu and found.kv_heads == (0.25 + 0.75 / 16 if last else 0.25)


@pytest.mark.parametrize("spec", [LLAMA, OPT], ids=["gated", "not gated"])
@pytest.mark.parametrize(
    "text",
    [
        "self:mlp=0.3,by=q4",
        "self:mlp=0.3,by=q2,over=1.5",
        "self:mlp=0.3,by=oracle",
        "self:mlp=0.3,by=gate",
        "self:mlp=0.5,by=q8,lm=hire",
        "self:heads=0.5",
        "self:lm=hire",
        "self:bits=8",
        "self:bits=4",
    ],
)
def test_shares_give_the_bytes_of_a_pass(text: str, spec: ModelSpec) -> None:
    if "gate" in text and not spec.gated:
        pytest.skip("has no gate")
    rung, found = Rung.parse(text), use(f"{text},gamma=2 / plain", spec).rungs[0]
    whole, expected = expected_bytes(spec, Rung(kind="plain"), 2, None), expected_bytes(spec, rung, 2, None)
    if rung.bits is not None:
        assert whole - found.own_weights_bytes / found.own_weights_share + found.own_weights_bytes == pytest.approx(expected)
        assert found.own_bits == rung.bits and found.own_weights_share < 0.54
        return
    inner = (2 if spec.gated else 1) * spec.intermediate_size * (spec.hidden_size + spec.mlp_bias)
    outer, heads = spec.intermediate_size * spec.hidden_size, 2 * spec.num_heads * spec.head_dim * spec.hidden_size
    saved = inner * (1 - found.candidates) + outer * (1 - found.neurons) + heads * (1 - found.heads)
    saved = spec.num_layers * saved + spec.vocab_size * spec.embed_size * (1 - found.head_share)
    assert whole - 2 * saved + found.proxy_bytes == pytest.approx(expected, abs=4)
    assert found.own_bits == 0 and found.proxy_bytes < whole


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("groups", [64, 100])
def test_hotness_has_the_mean_that_was_asked_for(calibration: Calibration, density: float, groups: int) -> None:
    """3,072 neurons: 100 groups do not divide them."""
    found = hotness(SMALL, calibration, density, groups)
    assert [len(layer) for layer in found.layers] == [groups] * SMALL.num_layers
    assert [sum(layer) / groups for layer in found.layers] == pytest.approx([density] * SMALL.num_layers, abs=1e-6)
    assert all(list(layer) == sorted(layer, reverse=True) and 0 < layer[-1] <= layer[0] <= 1 for layer in found.layers)
    assert found.origin == ("measured" if density < 1 else "assumed")


def test_hotness_is_what_was_counted(calibration: Calibration) -> None:
    """Frequencies are a line from 0 to 1 with a mean of one half: nothing to shift."""
    found = hotness(SMALL, calibration, 0.5, 4)
    assert found.layers[1] == pytest.approx((0.875, 0.625, 0.375, 0.125), abs=1e-3)


def test_hotness_by_layer(calibration: Calibration) -> None:
    """What decides a layer's share, densities or levels, decides how often its neurons are needed."""
    found = hotness(SMALL, calibration, 0.3, 4, [0.1, 0.5])
    assert [sum(layer) / 4 for layer in found.layers] == pytest.approx([0.1, 0.5], abs=1e-6)
    tensors = load_file(calibration.path / TENSORS)
    tensors |= {"levels.q4": np.array([0.1, 0], np.float32), "levels.densities": np.array([[0.1, 0.5], [1, 1]], np.float32)}
    save_file(tensors, calibration.path / TENSORS, metadata={"fingerprint": "0" * 16})
    for cut, shares in (("", [0.3, 0.3]), (",cut=threshold", [0.1, 0.5])):
        ladder = f"self:mlp=0.3,by=q4{cut} / self:mlp=0.9,by=q4{cut} / plain"
        asked = workload(model=DRAFT, ladder=ladder, calibration=calibration.path, context=512)
        assert [sum(layer) / len(layer) for layer in asked.hotness.layers] == pytest.approx(shares, abs=1e-6)
        assert [rung.fetched for rung in asked.ladders[0].rungs] == pytest.approx([max(shares) * 2, 1, 0], abs=1e-6)


def test_where_acceptances_are_from(calibration: Calibration) -> None:
    def of(text: str, acceptance: str | float | None = None, spec: ModelSpec = SMALL, learnt: bool = True) -> tuple[str, float]:
        found = use(f"{text} / plain", spec, acceptance, calibration=calibration if learnt else None, context=1024)
        last = [each for each in found.inputs if each.name.startswith("acceptance")][-1]
        assert last.source or last.origin == "given"
        assert found.tokens_per_round_range[0] <= found.tokens_per_round <= found.tokens_per_round_range[1]
        return last.origin, round(last.value, 4)

    assert of("self:mlp=0.3,by=q4") == ("measured", 0.87)
    assert of("self:mlp=0.3,by=q4", 0.5) == ("given", 0.5)
    assert of("self:mlp=0.3,by=q4", "self=0.6,self:mlp=0.3=0.7") == ("given", 0.7)
    assert of("self:mlp=0.3,by=q4", "self:mlp=0.3,by=q2=0.7") == ("measured", 0.87)
    assert of("self:mlp=0.5,by=q4", learnt=False) == ("assumed", 0.896)
    assert of("self:mlp=0.6,by=q4", learnt=False) == ("assumed", 0.924)
    assert of("self:mlp=0.1,by=q4", learnt=False, spec=OPT) == ("assumed", 0.982)
    assert of("self:mlp=1,by=q4", learnt=False) == ("assumed", 1.0)
    assert of("self:lm=hire") == ("assumed", 1.0)
    assert of("self:kv=512") == ("assumed", 0.9234)
    assert of("self:mlp=0.3,by=q4,kv=512") == ("assumed", round(0.87 * 0.9234, 4))
    assert of("self:bits=8") == ("assumed", 0.976)
    assert of("ngram") == ("assumed", 0.0)
    # A lone number is that of the rung which the last one verifies.
    below = use(TRIFORCE, acceptance=0.8).inputs
    assert [(each.origin, each.value) for each in below] == [("assumed", 0.55), ("given", 0.8)]
    # The same weights over a part of the KV lose by that part only.
    same = use("self:bits=4,kv=512,gamma=2 / self:bits=4").inputs
    assert same[0].value == 0.9234


def test_a_calibration_tells_what_a_rung_is_worth_as_a_draft(calibration: Calibration) -> None:
    """Its mean over a run, and at most that of a run's first token; older ones tell acceptance by itself alone."""
    rung = Rung.parse("self:mlp=0.3,by=q4")

    def found(**figures: float) -> Acceptance:
        quality = {str(rung): {"perplexity": 9.5, **figures}}
        learnt = replace(calibration, description={**calibration.description, "quality": quality})
        return Acceptances({}, learnt, relu=False).find(rung, Rung.parse("plain"), top=True)

    def at(text: str) -> Acceptance:
        return Acceptances({}, calibration, relu=False).find(Rung.parse(text), Rung.parse("plain"), top=True)

    quality: dict[str, dict[str, float]] = calibration.description["quality"]
    drafts, older = found(acceptance=0.8, draft_acceptance=0.9), found(acceptance=0.8)
    assert drafts.origin == "measured" and drafts.value == 0.9 > drafts.low and drafts.high == pytest.approx(0.95)
    assert (older.value, older.high) == (0.8, 0.8)
    assert "as a draft in runs of four" in drafts.source and "by itself" in older.source
    assert at("self:mlp=0.65,by=q4").origin == "measured" and at("self:mlp=0.65,by=q4").value == pytest.approx((0.87 + 1) / 2)
    assert at("self:mlp=0.65,by=q4,cut=threshold").origin == "assumed"
    quality["self:mlp=0.3,by=q4,cut=threshold"] = {"perplexity": 9.4, "acceptance": 0.91}
    assert [at(f"self:mlp={mlp},by=q4,cut=threshold").value for mlp in (0.3, 0.65)] == pytest.approx([0.91, (0.91 + 1) / 2])
    assert at("self:mlp=0.65,by=q4").value == pytest.approx((0.87 + 1) / 2)
    for text in (
        "self:mlp=0.2,by=q4",
        "self:mlp=0.65,by=q2",
        "self:mlp=0.65,by=q4,heads=0.5",
    ):  # below, another scorer, more than it
        assert at(text).origin == "assumed"


def test_candidates_of_auto() -> None:
    def named(**wish: Any) -> list[str]:
        return [str(ladder) for ladder in candidates(LLAMA, Wish(**{"context": 32768} | wish))]

    light = [f"self:bits={bits}{kv} / plain" for bits in (8, 4) for kv in ("", ",kv=4096")]
    assert named() == ["plain", "self:kv=4096 / plain", *light]
    assert named(context=256) == ["plain", "self:bits=8 / plain", "self:bits=4 / plain"]
    places = {f"draft:model={DRAFT}{at} / self:kv=4096 / plain" for at in ("", ",at=first", ",at=driver")}
    assert places <= set(named(draft=DRAFT))
    assert {"self:mlp=0.2,by=q4 / plain", "self:mlp=0.2,by=q4,kv=1000 / plain"} <= set(named(density=0.2, kv_budget=1000))
    assert named(ladder="triforce", draft=DRAFT) == [f"draft:model={DRAFT} / self:kv=4096 / plain"]
    loose = [Ladder.parse(text) for text in named(mode="approximate")]
    assert all(ladder.approximate for ladder in loose) and Ladder.parse("self:bits=4") in loose


def test_gammas() -> None:
    ladder = Ladder.parse(f"ngram / draft:model={DRAFT},gamma=3 / self:kv=512 / self:kv=4096 / plain")
    grid = gamma_grid(ladder)
    assert len(grid) == 3 * 8 and {(0, 3)} == {gammas[:2] for gammas in grid}
    chosen = with_gammas(ladder, grid[0])
    assert [rung.gamma for rung in chosen.rungs] == [None, 3, 1, 1, None] and gamma_grid(chosen) == [(0, 3, 1, 1)]


def test_open_spec(tmp_path: Path) -> None:
    config = known_config("facebook/opt-6.7b")
    assert config is not None
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    assert open_spec(str(tmp_path)) == open_spec(str(tmp_path / "config.json")) == (OPT, "float16")
    assert open_spec("facebook/opt-6.7b")[0] == open_spec("random:opt-6.7b")[0] == OPT
    assert spec_digest(OPT) == spec_digest(open_spec(str(tmp_path))[0]) != spec_digest(replace(OPT, norm_eps=2e-5))
    code = "from rowcast.runtime.forecast import *; print(spec_digest(open_spec('facebook/opt-6.7b')[0]))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == spec_digest(OPT)


def test_a_workload_says_what_it_rests_on(calibration: Calibration) -> None:
    found = workload(model=DRAFT, calibration=calibration.path, batch=3, hit_rate=0.5)
    assert (found.context, found.prompt, found.batch, found.width) == (2048, 2048, 3, 2)
    origins = {each.name: (each.value, each.origin) for each in found.inputs}
    assert origins == {"context": (2048, "assumed"), "density": (0.3, "measured"), "hit rate": (0.5, "given")}
    assert sum(found.hotness.layers[0]) / len(found.hotness.layers[0]) == pytest.approx(0.3)
    names = [ladder.name for ladder in found.ladders]
    assert len(set(names)) == len(names) and names[0] == "plain" and "self:mlp=0.3,by=q4,gamma=4 / plain" in names
    assert [ladder.name for ladder in found.fallbacks] == ["self:bits=8", "self:bits=4"]
    assert found.work_bytes > workload(model=DRAFT).work_bytes > 0


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"model": "facebook/opt-6.7"}, "is not known here: .*facebook/opt-6.7b"),
        ({"context": 10**6}, "context=1000000 has to be from 2 to the 131072 tokens"),
        ({"context": 4096, "prompt": 4097}, "prompt=4097 has to be from 1 to 4096"),
        ({"batch": 0}, "batch=0 has to be from 1"),
        ({"dtype": "int8"}, "dtype='int8' is not known"),
        ({"hit_rate": 1.5}, "hit_rate=1.5 is not a share"),
        ({"density": 0.0}, "density=0.0 is not a share"),
        ({"kv_budget": 5}, "kv_budget=5"),
        ({"mode": "loose"}, "mode='loose' is not known"),
        ({"ladder": "self:kv=4096 / plain"}, "kv=4096 of the rung self is not less than the context of 4096"),
        ({"ladder": "self:bits=4"}, "mode=approximate"),
        ({"ladder": "triforce"}, "give draft=MODEL"),
        ({"ladder": "triforce", "draft": "facebook/opt-125m"}, "vocabulary of 50272 tokens and the model one of 32000"),
        ({"draft": "nobody/nothing"}, "the draft nobody/nothing cannot be used"),
        ({"ladder": "dejavu"}, "needs a calibration"),
        ({"acceptance": "1.0"}, "acceptance='1.0' is not understood"),
        ({"acceptance": "selfish=0.5"}, "is not understood at 'selfish=0.5'"),
        ({"acceptance": "draft=0.5"}, "acceptance=draft is of no rung of the ladder: its rungs are self:kv=512"),
        ({"calibration": "/nowhere"}, "/nowhere holds no calibration"),
    ],
)
def test_bad_wishes(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        workload(**{"model": YARN} | wish)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "has no config.json"),
        (lambda path: path.write_text("{"), "is not valid JSON"),
        (lambda path: path.write_text("[1]"), "has to be a JSON object"),
        (lambda path: path.write_text("{}"), "model_type None is not supported"),
    ],
)
def test_bad_configs(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "some.json")
    with pytest.raises(UserError, match=message):
        open_spec(str(tmp_path / "some.json"))


def test_a_calibration_of_other_weights_or_another_shape(calibration: Calibration) -> None:
    with pytest.raises(UserError, match="was made for weights '0000000000000000', the model's are 'ffff'"):
        workload(model=DRAFT, calibration=calibration.path, fingerprint="ffff")
    with pytest.raises(UserError, match=r"densities of .* has the shape \[2, 2\] instead of \[2, 32\]"):
        workload(model=YARN, calibration=calibration.path)
    with pytest.raises(UserError, match=r"has the shape \[3072\] instead of \[11008\]"):
        hotness(LLAMA, calibration, 0.3, 4)


def test_a_calibration_without_densities_is_refused(calibration: Calibration) -> None:
    """As it is when a model is loaded."""
    save_file({"densities.": np.zeros(1, np.float32)}, calibration.path / TENSORS, metadata={"fingerprint": "0" * 16})
    with pytest.raises(UserError, match="has no densities: run rowcast calibrate again"):
        workload(model=DRAFT, calibration=calibration.path)

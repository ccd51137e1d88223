"""Ladders as users write them: canonical text, presets, and one sentence for every mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from rowcast.calibration.levels import LEVELLED
from rowcast.errors import UserError
from rowcast.runtime.ladder.presets import Calibrated, Circumstances, resolve
from rowcast.runtime.ladder.spec import Ladder, Rung


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("plain", "plain"),
        ("full", "plain"),
        ("ngram/full", "ngram / plain"),
        ("ngram / self:kv=512,gamma=4 / full", "ngram / self:kv=512,gamma=4 / plain"),
        ("self: kv = 512 , chunk=8 / plain", "self:kv=512 / plain"),
        ("draft:kv=full / self:kv=1024,view=eviction,refresh=0 / plain", None),
        ("draft:model=/a, b/c,kv=64,sinks=4 / self:kv=128,score=mean,chunk=16 / plain", None),
        ("draft:model=hub/id / self:kv=256,view=streaming / self:kv=1024 / plain", None),
        ("self:mlp=0.5,by=q4,over=1.5,heads=0.67,lm=hire,kv=512 / plain", None),
        ("self:mlp=.50,kv=full,over=1 / plain", "self:mlp=0.5 / plain"),
        ("self:mlp=0.5,by=q4,cut=threshold,kv=512 / self:mlp=0.5,group=8 / plain", None),
        ("self:mlp=0.5,over=2,common=0.2", None),
        ("self:mlp=.5,common=0.20,cut=top,group=1", "self:mlp=0.5,common=0.2"),
        ("self:heads=1 / self:lm=hire,gamma=2 / plain", None),
        (
            "self:heads_by=ahead , heads=0.5,kv=512 / self:heads=0.5 / plain",
            "self:heads=0.5,heads_by=ahead,kv=512 / self:heads=0.5 / plain",
        ),
        ("self:heads=0.5,heads_by=own", "self:heads=0.5"),
        ("ngram / self:mlp=1e-3,by=q4-ahead", "ngram / self:mlp=0.001,by=q4-ahead"),
        ("self:mlp=0.30000000000000004", None),
        ("self:bits=4,kv=4096 / plain", None),
        (
            "self:kv=full, bits = 8,gamma=3 / self:bits=4,kv=512,view=streaming / plain",
            "self:bits=8,gamma=3 / self:bits=4,kv=512,view=streaming / plain",
        ),
        ("ngram / self:bits=4", None),
    ],
)
def test_text_round_trips(text: str, canonical: str | None) -> None:
    ladder = Ladder.parse(text)
    assert str(ladder) == (canonical or text)
    assert Ladder.parse(str(ladder)) == ladder
    assert Ladder(tuple(Rung.parse(str(rung)) for rung in ladder.rungs)) == ladder


def test_defaults() -> None:
    draft, self_rung, plain = Ladder.parse("draft / self:kv=512 / plain").rungs
    assert (draft.kv, draft.view, draft.sinks, draft.gamma) == (256, "streaming", 16, None)
    assert (self_rung.kv, self_rung.view, self_rung.score) == (512, "retrieval", "bounds")
    assert (self_rung.chunk, self_rung.sinks, self_rung.recent, self_rung.refresh) == (8, 16, 64, 1)
    assert (plain.kv, plain.view) == (None, None)
    whole = Rung.parse("draft:kv=full")
    assert (whole.kv, whole.view) == (None, None)
    assert replace(whole, gamma=3).kv is None
    assert replace(draft, kv=None).view is None
    sparse = Rung.parse("self:mlp=0.5")
    assert (sparse.kv, sparse.view, sparse.by, sparse.over, sparse.heads, sparse.lm) == (None, None, None, 1.0, None, "full")
    assert Rung.parse("self:mlp=0.5,kv=512").view == "retrieval"


def test_sparsity_is_what_weights_are_shared_by() -> None:
    one, other, thin, whole = (
        Rung.parse(text) for text in ("self:mlp=0.5", "self:mlp=0.5,kv=512,gamma=3", "self:mlp=0.4", "self:kv=512")
    )
    assert one.weights == other.weights == one and thin.weights != one.weights and whole.weights is None
    assert [rung.pays_from for rung in (one, other, whole)] == [0, 0, 1024]
    for text in ("self:mlp=0.5,cut=threshold", "self:mlp=0.5,common=0.2", "self:mlp=0.5,group=8"):
        assert str(Rung.parse(f"{text},kv=512,gamma=3").weights) == text
    assert [Ladder.parse(text).approximate for text in ("self:mlp=0.5", "self:mlp=0.5 / plain")] == [True, False]
    assert str(Rung.parse("self:heads=0.5,heads_by=ahead,gamma=3").weights) == "self:heads=0.5,heads_by=ahead"


def test_bits_are_weights_of_their_own() -> None:
    one, other, eight = (Rung.parse(text) for text in ("self:bits=4", "self:bits=4,kv=512,gamma=3", "self:bits=8"))
    assert one.weights == other.weights == one and eight.weights == eight != one
    assert [(rung.light, rung.sparse, rung.pays_from) for rung in (one, other)] == [(True, False, 0)] * 2
    assert (one.kv, one.view, other.view) == (None, None, "retrieval")
    assert [Ladder.parse(text).approximate for text in ("self:bits=4", "self:bits=4 / plain")] == [True, False]
    assert Ladder.parse("self:bits=4 / self:bits=8 / plain").names == ("self:bits=4", "self:bits=8", "plain")


def test_names_tell_rungs_of_a_kind_apart() -> None:
    assert Ladder.parse("ngram / self:kv=512,gamma=2 / plain").names == ("ngram", "self", "plain")
    assert Ladder.parse("self:kv=256,gamma=2 / self:kv=512 / plain").names == ("self:kv=256", "self:kv=512", "plain")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ngrm / plain", "unknown rung 'ngrm'"),
        ("triforce / plain", "stands alone"),
        ("ngram:kv=3 / plain", "'kv' in 'ngram:kv=3'"),
        ("plain:gamma=2", "it has none"),
        ("self / plain", "needs kv"),
        ("self:kv=full / plain", "from 1 to 16777216"),
        ("self:kv=9x / plain", "kv='9x'"),
        ("self:kv=0 / plain", "kv=0"),
        ("self:kv=94 / plain", r"kv=94 .* \(16\) \+ recent \(64\) \+ a chunk .* \(15\) = 95"),
        ("draft:kv=48 / plain", r"kv=48 .* = 49"),
        ("self:kv=512,view=foo / plain", "retrieval, streaming, eviction"),
        ("self:kv=512,score=max / plain", "mean, bounds"),
        ("self:kv=512,view=streaming,recent=8 / plain", "view streaming"),
        ("self:kv=512,kv=1 / plain", "twice"),
        ("self:kv= / plain", "no value"),
        ("self:512 / plain", "settings are mlp"),
        ("self:mlp=0 / plain", "mlp=0.0 .* above 0 and up to 1"),
        ("self:mlp=1.1 / plain", "mlp=1.1 .* above 0 and up to 1"),
        ("self:mlp=nan / plain", "mlp='nan'"),
        ("self:mlp=0.5,over=0.9 / plain", "over=0.9 .* from 1 to 8"),
        ("self:heads=0.5,over=2 / plain", "over=2.0 .* add mlp"),
        ("self:lm=hire,by=q4 / plain", "by=q4 .* add mlp"),
        ("self:mlp=0.5,by=q5 / plain", "q2, q3, q4, q8"),
        ("self:mlp=0.5,cut=bottom / plain", "cut='bottom' .* top, threshold"),
        ("self:mlp=0.5,group=65 / plain", "group=65 .* from 1 to 64"),
        ("self:mlp=0.5,group=0 / plain", "group=0 .* from 1 to 64"),
        ("self:mlp=0.5,common=0 / plain", "common=0.0 .* above 0 and up to 1"),
        ("self:mlp=0.5,common=0.6 / plain", "common=0.6 .* more than mlp=0.5"),
        ("self:mlp=0.5,over=2,group=4 / plain", "group=4 and over=2.0 .* leave one out"),
        ("self:mlp=0.5,common=0.2,group=4 / plain", "group=4 and common=0.2 .* leave one out"),
        ("self:mlp=0.5,cut=threshold,over=2 / plain", "cut=threshold and over=2.0 .* leave one out"),
        ("self:mlp=0.5,cut=threshold,common=0.1 / plain", "cut=threshold and common=0.1 .* leave one out"),
        ("self:heads=0.5,cut=threshold / plain", "cut=threshold .* add mlp"),
        ("self:heads=0.5,group=2 / plain", "group=2 .* add mlp"),
        ("self:mlp=0.5,heads_by=ahead / plain", "heads_by=ahead .* add heads=0.5"),
        ("self:heads=0.5,heads_by=behind / plain", "heads_by='behind' .* own, ahead"),
        ("draft:heads_by=ahead / plain", "'heads_by' in 'draft:heads_by=ahead'"),
        ("self:mlp=0.5,view=streaming / plain", "view='streaming' .* add kv"),
        ("self:mlp=0.5,sinks=4 / plain", "sinks=4 .* add kv"),
        ("self:mlp=0.5,kv=512", "ends in self.* kv=full"),
        ("self:bits=4,kv=512", "ends in self.* kv=full"),
        ("self:bits=3 / plain", "bits=3 .* 4, 8"),
        ("self:bits=four / plain", "bits='four' .* 4, 8"),
        ("self:bits=4,mlp=0.5 / plain", "mlp=0.5 and bits=4 .* leave one out"),
        ("self:bits=4,heads=0.5 / plain", "heads=0.5 and bits=4 .* leave one out"),
        ("self:bits=8,lm=hire / plain", "lm=hire and bits=8 .* leave one out"),
        ("self:bits=8,by=q4 / plain", "by=q4 .* add mlp"),
        ("self:bits=4,recent=8 / plain", "recent=8 .* add kv"),
        ("draft:bits=4 / plain", "'bits' in 'draft:bits=4'"),
        ("self:gamma=2 / plain", "needs kv, .* self:bits=4"),
        ("self:kv=512", "ends in self"),
        ("self:mlp=0.5,gamma=2", "gamma=2 .* is the last"),
        ("plain:mlp=0.5", "it has none"),
        ("self:kv=512,gamma=65 / plain", "gamma=65 .* from 1 to 64"),
        ("ngram:gamma=0 / plain", "gamma=0"),
        ("", "empty rung"),
        ("ngram / / plain", "empty rung"),
        ("draft:model=/a / / plain", "empty rung"),
        ("ngram", "ends in ngram"),
        ("plain / plain", "plain below"),
        ("draft / ngram / plain", "ngram above"),
        ("self:kv=512,gamma=1 / self:kv=512 / plain", "self:kv=512 twice"),
        (" / ".join(f"self:kv={kv}" for kv in range(100, 105)) + " / plain", "at most 4"),
    ],
)
def test_mistakes_are_one_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        Ladder.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rung(kind="ngram", model="x"),
        lambda: Rung(kind="plain", kv=512),
        lambda: Rung(kind="draft", kv=256, view="retrieval"),
        lambda: Rung(kind="self", kv=512, gamma=True),
        lambda: Rung(kind="self", mlp=True),
        lambda: Rung(kind="plain", mlp=0.5),
        lambda: Rung(kind="draft", lm="hire"),
        lambda: Rung(kind="draft", bits=4),
        lambda: Rung(kind="self", bits=True),  # type: ignore[arg-type]
        lambda: Rung(kind="self", bits=4.0),  # type: ignore[arg-type]
        lambda: Rung(kind="draft", model="a / b"),
        lambda: Rung(kind="draft", model="a,kv=3"),
        lambda: Ladder(()),
    ],
)
def test_wrong_values_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UserError):
        make()


def settle(
    ladder: str | Ladder, draft: str | None = None, kv_budget: int | None = None, *, context: int = 8192, token_bytes: int = 1
) -> tuple[str, bool, list[str]]:
    here = Circumstances(max_context=context, kv_bytes_per_token=token_bytes, pass_bytes=lambda _: 8192)
    found, adaptive, reasons = resolve(ladder, here, draft=draft, kv_budget=kv_budget)
    return str(found), adaptive, reasons


@pytest.mark.parametrize(
    ("ladder", "draft", "kv_budget", "found"),
    [
        ("plain", None, None, "plain"),
        ("ngram", "ngram", None, "ngram / plain"),
        ("triforce", "/m", None, "draft:model=/m / self:kv=1024 / plain"),
        ("triforce", "/m", 512, "draft:model=/m / self:kv=512 / plain"),
        ("triforce", "ngram", 512, "ngram / self:kv=512 / plain"),
        ("draft:gamma=3 / plain", "/m", None, "draft:model=/m,gamma=3 / plain"),
        ("ngram / draft / plain", "/m", None, "ngram / draft:model=/m / plain"),
        (Ladder.parse("self:kv=99 / plain"), None, None, "self:kv=99 / plain"),
    ],
)
def test_named_and_spelled_ladders(ladder: str | Ladder, draft: str | None, kv_budget: int | None, found: str) -> None:
    assert settle(ladder, draft, kv_budget)[:2] == (found, False)


@pytest.mark.parametrize(
    ("ladder", "draft", "kv_budget", "said"),
    [
        ("triforce", None, None, "draft=MODEL"),
        ("draft / plain", None, None, "draft=MODEL"),
        ("plain", "/m", None, "no place .* triforce"),
        ("plain", "ngram", None, "no place .* ngram"),
        ("ngram", "/m", None, "no place"),
        ("draft:model=a / plain", "/m", None, "no place"),
        ("self:kv=512 / plain", None, 256, "kv_budget=256 has no place"),
        ("triforce", "/m", 10, "kv=10"),
    ],
)
def test_what_has_no_place_is_refused(ladder: str, draft: str | None, kv_budget: int | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        settle(ladder, draft, kv_budget)


def test_auto_takes_what_there_is() -> None:
    assert settle("auto")[:2] == ("ngram / self:kv=1024 / plain", True)
    assert settle("auto", context=4095)[0] == "ngram / plain"
    assert settle("auto", context=4096)[0] == "ngram / self:kv=512 / plain"
    assert settle("auto", "/m", 300, context=600)[0] == "ngram / draft:model=/m / self:kv=300 / plain"
    assert settle("auto", "ngram", context=2048)[0] == "ngram / plain"
    assert settle("auto", context=131072, token_bytes=8)[0] == "ngram / self:kv=4096 / plain"
    assert settle("auto", context=400, token_bytes=1000)[0] == "ngram / plain"
    assert len(settle("auto")[2]) == 3


FITTED = Calibrated(("dejavu", "lowrank"), 0.4, heads=True)


def sparse(ladder: str, calibrated: Calibrated | None = None, *, mode: str = "exact", density: float | None = None) -> str:
    """Sparse passes read three quarters of the bytes of a plain one."""
    here = Circumstances(
        max_context=100, kv_bytes_per_token=1, pass_bytes=lambda rung: 750 if rung.sparse else 1000, calibrated=calibrated
    )
    return str(resolve(ladder, here, mode=mode, density=density)[0])


def test_sparse_presets() -> None:
    assert sparse("hire") == "self:mlp=0.5,by=q4,over=1.5,lm=hire / plain"
    assert sparse("hire", FITTED) == "self:mlp=0.4,by=q4,over=1.5,lm=hire / plain"
    assert sparse("hire", density=0.25, mode="approximate") == "self:mlp=0.25,by=q4,over=1.5,lm=hire"
    assert sparse("dejavu", FITTED) == "self:mlp=0.4,by=dejavu,heads=0.67 / plain"
    assert sparse("dejavu", replace(FITTED, heads=False), mode="approximate") == "self:mlp=0.4,by=dejavu"
    assert sparse("self:mlp=0.5 / plain") == "self:mlp=0.5,by=q4 / plain"
    assert sparse("self:mlp=0.5 / plain", replace(FITTED, scorers=("lowrank",))) == "self:mlp=0.5,by=lowrank / plain"
    assert sparse("auto", FITTED) == "ngram / self:mlp=0.4,by=dejavu / plain"
    assert sparse("auto", density=0.9) == "ngram / self:mlp=0.9,by=q4 / plain"
    assert sparse("auto") == "ngram / plain"


def test_sparse_presets_choose_by_levels() -> None:
    """Of the scorer that runs and for its density, then without candidates that are ranked again; not in what the user writes."""
    levels = replace(FITTED, scorers=("q4", "dejavu"), over=1.3, levels=LEVELLED, least=0.3)
    assert sparse("auto", levels) == "ngram / self:mlp=0.4,by=q4,cut=threshold / plain"
    assert sparse("auto", replace(levels, scorers=("dejavu", "q4"))) == "ngram / self:mlp=0.4,by=dejavu / plain"
    assert sparse("dejavu", levels) == "self:mlp=0.4,by=dejavu,heads=0.67 / plain"
    assert sparse("hire", levels) == "self:mlp=0.4,by=q4,cut=threshold,lm=hire / plain"
    assert sparse("hire", replace(levels, levels=())) == "self:mlp=0.4,by=q4,over=1.3,lm=hire / plain"
    for density in (0.25, 1.0):
        assert sparse("auto", levels, density=density) == f"ngram / self:mlp={density:g},by=q4 / plain"
        assert sparse("hire", levels, density=density) == f"self:mlp={density:g},by=q4,over=1.3,lm=hire / plain"
    assert sparse("self:mlp=0.5 / plain", levels) == "self:mlp=0.5,by=q4 / plain"
    with pytest.raises(UserError, match=r"the ladder dejavu needs a calibration with predictors; make one .* or use hire"):
        sparse("dejavu", replace(levels, predictors=False))


@pytest.mark.parametrize(
    ("ladder", "arguments", "said"),
    [
        ("hire", {"density": 0.0}, "mlp=0.0"),
        ("plain", {"density": 0.5}, "density=0.5 has no place"),
        ("dejavu", {}, "needs a calibration"),
        ("plain", {"mode": "approximate"}, "'plain' ends in plain"),
        ("auto", {"mode": "approximate"}, "'auto' ends in plain"),
        ("self:mlp=0.5", {}, "use mode=approximate"),
    ],
)
def test_sparse_presets_refuse(ladder: str, arguments: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sparse(ladder, **arguments)  # type: ignore[arg-type]

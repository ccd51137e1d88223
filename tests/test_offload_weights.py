"""Weights over tiers: wherever rows lie, the products are those of the model that lies next to the compute."""

from __future__ import annotations

import gc
import json
import random
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_sparse_ladder import calibrate
from test_sparse_weights import levelled
from thread_comm import ThreadComm, run_ranks
from tiny import CASES, VOCAB, tiny_model
from torch import Tensor

from rowcast.offload.host_store import HostStore
from rowcast.placement.constants import Constants
from rowcast.placement.costs import CostModel, Mode
from rowcast.placement.hardware import Machine, machine_from
from rowcast.placement.layout import Site, layouts
from rowcast.placement.models import known_config
from rowcast.placement.workload import Workload, assumed_hotness
from rowcast.runtime.acceptances import Acceptances
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.checkpoint.random_source import RandomSource
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.ladder.spec import Ladder, Rung
from rowcast.runtime.ladder.uses import ladder_use
from rowcast.runtime.offloaded import ffn
from rowcast.runtime.offloaded.ffn import PlacedFfn, _staged
from rowcast.runtime.offloaded.sizes import Buffers
from rowcast.runtime.offloaded.sparse import OffloadedSparse
from rowcast.runtime.offloaded.tiers import Spans, Tiers
from rowcast.runtime.offloaded.weights import CPU_TOKENS, OffloadedBanks, _Pieces
from rowcast.runtime.protocols import WeightView
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse import build, sizes
from rowcast.runtime.sparse.artefact import DESCRIPTION, FORMAT, TENSORS, Calibration
from rowcast.runtime.sparse.build import build_neurons
from rowcast.runtime.sparse.heads import HeadSelector
from rowcast.runtime.sparse.weights import SparseWeights
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep

TOLERANCE = 2e-5
"""Of logits of size 1 to 10 in float32: sums are cut where tiers meet."""
PROMPT, NEW = 19, 5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GROUPS = {"attention": 4, "neurons": 6, "LM head": 8, "embeddings": 1}


class Model:
    def __init__(self, name: str, path: Path, device: str = "cpu") -> None:
        tiny_model(name, path)
        self.device = torch.device(device)
        self.spec: ModelSpec = spec_from_config(json.loads((path / "config.json").read_text()))
        self.source = SafetensorsSource.open(path)
        self.how: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        self.banks = BankWeights(self.spec, self.source, SoloComm(), **self.how)
        self.tokens = torch.randint(VOCAB, (PROMPT + NEW,), generator=torch.Generator().manual_seed(3)).tolist()
        self.expected = self.logits(self.banks)

    def logits(self, view: WeightView) -> Tensor:
        """A prompt, three tokens as one verification, then one by one: [T, V]."""
        kv = PagedKV(self.spec, Shard(), num_blocks=8, block_size=4, **self.how)
        decoder, rows, start = Decoder(view, SoloComm(), self.device), [], 0
        for end in (PROMPT, PROMPT + 3, PROMPT + 4, PROMPT + 5):
            step = SeqStep(0, self.tokens[start:end], start, list(range(8)), PROMPT, sample=True)
            rows.append(decoder.logits(decoder.run([step], kv)))
            kv.commit(0, end - start)
            start = end
        return torch.cat(rows)

    def placed(self, tiers: Tiers, ring_bytes: int = 1 << 14, **buffers: int) -> OffloadedBanks:
        return OffloadedBanks(self.spec, self.source, SoloComm(), tiers, Buffers(ring_bytes, **buffers), **self.how)


@pytest.fixture(scope="module", params=CASES)
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=DEVICES)
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model("llama-bias", tmp_path_factory.mktemp("llama"), request.param)


def mixed(rng: random.Random, layers: int, kv_away: frozenset[int] = frozenset()) -> Tiers:
    """Any groups anywhere."""

    def spans(part: str, among: tuple[str, ...]) -> Spans:
        return Spans(tuple((rng.choice(among), g, 1, GROUPS[part]) for g in range(GROUPS[part])))

    return Tiers(
        attention={i: spans("attention", ("resident", "streamed")) for i in range(layers)},
        neurons={i: spans("neurons", ("resident", "streamed", "rows", "cpu")) for i in range(layers)},
        head=spans("LM head", ("resident", "streamed")),
        embeddings=spans("embeddings", ("resident", "host")),
        kv_away=kv_away,
    )


def everything(tier: str, layers: int) -> Tiers:
    """Of the parts that may lie there."""
    weights, matrices = Spans((("streamed", 0, 1, 1),)), Spans(((tier, 0, 1, 1),))
    return Tiers(
        attention=dict.fromkeys(range(layers), weights),
        neurons=dict.fromkeys(range(layers), matrices),
        head=weights,
        embeddings=Spans((("host", 0, 1, 1),)),
        kv_away=frozenset(),
    )


def test_every_family_in_any_places(any_model: Model) -> None:
    rng = random.Random(any_model.spec.num_heads)
    for tiers in (mixed(rng, any_model.spec.num_layers), everything("streamed", any_model.spec.num_layers)):
        view = any_model.placed(tiers)
        assert view.bytes == any_model.banks.bytes
        torch.testing.assert_close(any_model.logits(view), any_model.expected, atol=TOLERANCE, rtol=1e-5)
        view.streamer.check()
        view.close()


@pytest.mark.parametrize("seed", range(8))
def test_any_places_at_any_ring(llama: Model, seed: int) -> None:
    rng = random.Random(seed)
    view = llama.placed(mixed(rng, llama.spec.num_layers), ring_bytes=rng.choice([1, 5000, 30_000, 1 << 20]))
    found = llama.logits(view)
    torch.testing.assert_close(found, llama.expected, atol=TOLERANCE, rtol=1e-5)
    if llama.device.type == "cpu":
        assert torch.equal(llama.logits(view), found)


@pytest.mark.parametrize("tier", ["streamed", "rows", "cpu"])
def test_a_pass_streams_each_piece_once(llama: Model, tier: str) -> None:
    """Whatever its number of tokens; the CPU's neurons with many tokens only, and not at all where the plan has no ring."""
    spec, hidden = llama.spec, llama.spec.hidden_size
    neurons = spec.num_layers * 3 * spec.intermediate_size * hidden * 4
    others = spec.num_layers * (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim * hidden * 4
    others += spec.vocab_size * hidden * 4
    for ring_bytes in (1 << 14, 0):
        view = llama.placed(everything(tier, spec.num_layers), ring_bytes)
        many = view._pieces(_Pieces.ALL if ring_bytes else _Pieces.DEVICE)
        few = view._pieces(_Pieces.DEVICE)
        llama.logits(view)
        view.counts()
        llama.logits(view)
        counts, _ = view.counts()
        assert PROMPT > CPU_TOKENS and counts.taken == len(many) + 3 * len(few)
        assert len(many) != len(few) or counts.pieces == counts.taken
        assert sum(piece.nbytes for piece in few) == others + (neurons if tier != "cpu" else 0)
        assert sum(piece.nbytes for piece in many) == others + (neurons if tier != "cpu" or ring_bytes else 0)
        assert view.store.bytes >= others + neurons


def planner(spec: ModelSpec, ladder: Ladder, machine: Machine, calibration: Calibration | None = None) -> tuple[CostModel, Site]:
    """The planner's figures, and a rank's place on all GPUs of the machine."""
    acceptance = Acceptances.of(None, spec, None)
    use = ladder_use(ladder, spec, width=4, context=64, calibration=calibration, acceptance=acceptance, drafts={})
    work = Workload(
        model="a model",
        spec=spec,
        width=4,
        context=64,
        prompt=32,
        batch=1,
        ladders=(use,),
        hotness=assumed_hotness(spec, 0.75, 8),
    )
    model = CostModel(work, use, layouts(machine, spec, sum(len(node.cards) for node in machine.nodes))[0], Constants(), 100)
    return model, model.layout.sites[0]


def counted(spec: ModelSpec, rung: Rung, tier: str) -> tuple[float, float]:
    """By the planner, of a rung's own weights on all ranks: bytes held, and read by a pass, where rows may lie in that tier."""
    machine = machine_from("1xA100-80GB+1xA100-40GB" if tier == "peer" else "2xA100-40GB", link="nvlink")
    model, site = planner(spec, Ladder((rung,)), machine)
    mode = Mode(streamed=tier == "streamed", rows=tier == "rows", cpu=tier == "cpu")
    return 2.0 * model.fixed_bytes(site, mode)["rung weights"], 2 * model.fixed_reads(site, model.ladder.rungs[0], mode)[0][0]


@pytest.mark.parametrize("tier", ["resident", "rows", "peer", "streamed", "cpu"])
def test_a_layer_that_keeps_all_neurons_is_asked_for_rows_only(llama: Model, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one that chooses: where the device reaches rows of it, it does so by a selector, which plans count. The output is that of
    all weights next to the compute."""
    if tier == "peer" and llama.device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs another GPU")
    for module in (build, sizes):
        monkeypatch.setattr(module, "layer_shares", lambda *_: [0.5, 1.0])
    rung, row = Rung(kind="self", mlp=0.75, by="q8"), 3 * llama.spec.hidden_size * 4
    tiers = replace(
        everything("rows" if tier == "peer" else tier, 2),
        attention=dict.fromkeys(range(2), Spans()),
        head=Spans(),
        embeddings=Spans(),
        peers=frozenset(range(2) if tier == "peer" else ()),
    )
    banks: Any = llama.placed(tiers, rows_bytes=90 * row)
    view = build.build_view(banks, rung, None, OffloadedSparse)
    fetched = tier in ("rows", "peer")
    reached = fetched and banks.ffn[1].on_device
    assert [selector is not None for selector in view._neurons] == [True, reached]
    if reached or not fetched:  # plans count on pinned memory
        held, read = counted(llama.spec, rung, tier)
        assert held - counted(llama.spec, rung, "resident")[0] == reached * (read / 2)
        assert read == sum(selector.scorer.bytes for selector in view._neurons if selector is not None)
    expected = llama.logits(build.build_view(llama.banks, rung, None))
    torch.testing.assert_close(llama.logits(view), expected, atol=TOLERANCE, rtol=1e-5)
    banks.close()


@pytest.mark.parametrize(
    ("ladder", "room"),
    [
        ("self:mlp=0.2,by=q4", 2 * 0.25),
        ("self:mlp=0.2,by=q4,cut=threshold", 2 * 0.35),
        ("self:mlp=0.1,by=q4,cut=threshold", 0.5),
        ("self:mlp=0.2,by=q4,cut=threshold / self:mlp=0.6,by=q4", 1),
        ("self:mlp=0.2,by=q8,cut=threshold", 2 * 0.25),
        ("self:mlp=0.1,by=q4 / self:mlp=1,by=q4,heads=0.5", 1),
    ],
)
def test_fetched_rows_have_room_by_the_layer_that_needs_most(llama: Model, ladder: str, room: float, tmp_path: Path) -> None:
    """Levels of q4 give layers other shares than the densities do; a plan counts what is allocated."""
    calibration = with_shares(0.2, [0.15, 0.25], [0.05, 0.35], tmp_path)
    assert room_for_rows(llama.spec, ladder, calibration) == pytest.approx(room, abs=1e-3)


@pytest.mark.parametrize(("kept", "room"), [(0.12, 0.5), (0.3, 0.6)])
def test_fetched_rows_have_room_by_what_levels_keep_at_most(kept: float, room: float, tmp_path: Path) -> None:
    """Of ReLU's neurons: those that are not 0 are fewer than were asked for."""
    spec = spec_from_config(known_config("facebook/opt-125m") or {})
    calibration = with_shares(0.4, [0.4] * 12, [kept] * 12, tmp_path)
    assert room_for_rows(spec, "self:mlp=0.4,by=q4,cut=threshold", calibration) == pytest.approx(room, abs=1e-3)


def with_shares(mean: float, densities: list[float], by_level: list[float], path: Path) -> Calibration:
    """Of layers that keep so much where all keep `mean`, with cut=threshold by q4 what its level keeps."""
    made, ones = {"fingerprint": "0" * 16}, [1.0] * len(densities)
    tables = {"densities": torch.tensor([densities, ones]), "levels.densities": torch.tensor([by_level, ones])}
    save_file(tables | {"levels.q4": torch.tensor([0.1, 0.0])}, path / TENSORS, made)
    about = {"format": FORMAT, **made, "density": mean, "densities": [mean, 1.0], "quality": {}, "scorers": {}}
    (path / DESCRIPTION).write_text(json.dumps(about))
    return Calibration.open(path, None)


def room_for_rows(spec: ModelSpec, ladder: str, calibration: Calibration) -> float:
    """Share of a layer's neurons that the buffer is made for, which has to be what a plan counts."""
    plan: Any = SimpleNamespace(dtype="float32", world=1, margin_bytes=1 << 20, ladder_text=ladder)
    found = Buffers.of(plan, everything("rows", spec.num_layers), spec, calibration)
    model, site = planner(spec, Ladder.parse(ladder), machine_from("A100-40GB"), calibration)
    assert model.fixed_bytes(site, Mode(rows=True))["buffers"] == found.rows_bytes
    return found.rows_bytes / ((3 if spec.gated else 2) * spec.intermediate_size * spec.hidden_size * 4)


@pytest.mark.parametrize(("by", "rows"), [("dejavu", []), ("q4", [0, -2])])
def test_a_view_puts_no_rows_together_but_those_that_it_rounds(
    by: Any, rows: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for their shape: a card that is nearly full has no room for a whole matrix. Few bits are of gate and up, once each."""
    model = Model("llama-bias", tmp_path)
    calibration = Calibration.open(calibrate(tmp_path, tmp_path / "calibration"), None)
    banks: Any = model.placed(everything("rows", 2), rows_bytes=90 * 3 * model.spec.hidden_size * 4)
    real, found = PlacedFfn._assembled, []

    def counted(bank: PlacedFfn, row: int) -> Tensor:
        found.append(row)
        return real(bank, row)

    monkeypatch.setattr(PlacedFfn, "_assembled", counted)
    view = build.build_view(banks, Rung(kind="self", mlp=0.5, by=by), calibration, OffloadedSparse)
    assert all(view._neurons) and found == 2 * rows
    banks.close()


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("how", ["by=q8,cut=threshold", "by=q2,over=1.5", "by=oracle,cut=threshold"])
def test_sensitivities_and_levels_hold_wherever_rows_lie(how: str, seed: int | None, tmp_path: Path) -> None:
    model = Model("llama-bias", tmp_path)
    found, rung = levelled(model, tmp_path), Rung.parse(f"self:mlp=0.3,{how}")  # type: ignore[arg-type]
    tiers = everything("rows", 2) if seed is None else mixed(random.Random(seed), 2)
    tiers = replace(tiers, attention=dict.fromkeys(range(2), Spans()), head=Spans(), embeddings=Spans())
    row = 3 * model.spec.hidden_size * 4
    banks: Any = model.placed(
        tiers, rows_bytes=(90 if seed is None else 20) * row
    )  # of those that are fetched, all or few have room
    expected = model.logits(build.build_view(model.banks, rung, found))
    without = model.logits(build.build_view(model.banks, rung, unsensitive(found, tmp_path)))
    assert not torch.allclose(expected, without, atol=1e-3)
    torch.testing.assert_close(
        model.logits(build.build_view(banks, rung, found, OffloadedSparse)), expected, atol=TOLERANCE, rtol=1e-5
    )
    banks.close()


def unsensitive(calibration: Calibration, path: Path) -> Calibration:
    """A copy without sensitivities."""
    tables = {name: each for name, each in load_file(calibration.path / TENSORS).items() if not name.endswith("sensitivity")}
    (path / "without").mkdir()
    save_file(tables, path / "without" / TENSORS, {"fingerprint": calibration.fingerprint})
    shutil.copy(calibration.path / DESCRIPTION, path / "without" / DESCRIPTION)
    return Calibration.open(path / "without", None)


@pytest.mark.parametrize("full_at", [None, 1, 2])
def test_a_layer_is_put_together_on_the_device_where_all_of_it_has_room(
    full_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what that itself takes. Else none of it, and what had room is given back."""
    cpu = torch.device("cpu")
    made: list[weakref.ref[Tensor]] = []
    banks = {tier: HostStore(cpu).bank((rows, 3, 8), torch.float32) for tier, rows in (("streamed", 5), ("rows", 7))}

    def on_card(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **how: Any) -> Tensor:
            if len(made) == full_at:
                raise torch.OutOfMemoryError
            made.append(weakref.ref(found := real(*args, **how)))
            return found

        return make

    for name in ("empty_like", "empty"):
        monkeypatch.setattr(torch, name, on_card(getattr(torch, name)))
    tables = _staged(banks, cpu)
    shapes = {tier: bank.tensor.shape for tier, bank in banks.items()}
    assert {tier: table.shape for tier, table in tables.items()} == (shapes if full_at is None else {})
    assert [table() is not None for table in made] == ([True, True, False] if full_at is None else [False] * full_at)


@pytest.mark.gpu
def test_where_a_layer_is_put_together_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = Model("llama-bias", tmp_path, "cuda"), []
    source: Any = RandomSource(model.spec, device=model.device)
    model.source = source
    for room in (True, False):
        if not room:
            monkeypatch.setattr(ffn, "_staged", lambda *_: {})
        view = model.placed(mixed(random.Random(2), 2))
        found.append(model.logits(view))
        view.close()
    assert torch.equal(*found)


def test_candidates_are_fetched_once(tmp_path: Path) -> None:
    """For the exact ranking and for what is kept of it."""
    model = Model("llama-gqa", tmp_path)
    banks = model.placed(everything("rows", 2), rows_bytes=90 * 3 * 64 * 4)
    view = OffloadedSparse(banks, build_neurons(banks, mlp=0.2, by="q2", over=2.0))
    kv = PagedKV(model.spec, Shard(), num_blocks=8, block_size=4, **model.how)
    Decoder(view, SoloComm(), model.device).run([SeqStep(0, [5], 0, list(range(8)), 0, sample=True)], kv)
    assert banks.counts()[1].moved == 2 * build_neurons(banks, mlp=0.2, by="q2", over=2.0)[0].candidates


def test_ranks_add_up(tmp_path: Path) -> None:
    """Two ranks, each with places of its own for its share: logits of the whole model."""
    model = Model("llama-bias", tmp_path)

    def rank(comm: ThreadComm) -> Tensor:
        tiers = mixed(random.Random(comm.rank), 2)
        view = OffloadedBanks(model.spec, model.source, comm, tiers, Buffers(1 << 14), **model.how)
        kv = PagedKV(model.spec, Shard(comm.rank, 2), num_blocks=8, block_size=4, **model.how)
        decoder = Decoder(view, comm, model.device)
        step = SeqStep(0, model.tokens, 0, list(range(8)), PROMPT, sample=True)
        return decoder.logits(decoder.run([step], kv))

    for found in run_ranks(2, rank):
        torch.testing.assert_close(found, model.expected, atol=TOLERANCE, rtol=1e-5)


def test_a_pass_that_was_broken_off_leaves_nothing_behind(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while pieces are in use and on their way: the next pass computes what it should."""
    view = llama.placed(everything("streamed", llama.spec.num_layers))
    real, calls = view.mlp, 0

    def interrupted(layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            view.streamer.take(view._layer(0, _Pieces.ALL)[0])
            raise KeyboardInterrupt
        return real(layer, x, residual)

    monkeypatch.setattr(view, "mlp", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llama.logits(view)
    torch.testing.assert_close(llama.logits(view), llama.expected, atol=TOLERANCE, rtol=1e-5)
    view.streamer.check()


def test_host_memory_is_given_back(llama: Model) -> None:
    view = llama.placed(everything("streamed", llama.spec.num_layers))
    held = weakref.ref(view.store._held[0])
    bank = weakref.ref(view)
    view.close()
    del view
    gc.collect()
    assert held() is None and bank() is None


SELECTORS: dict[str, dict[str, Any]] = {
    "top": {"mlp": 0.4, "by": "q4"},
    "few": {"mlp": 0.1, "by": "q8"},
    "re-ranked": {"mlp": 0.2, "by": "q2", "over": 2.0},
    "oracle": {"mlp": 0.3, "by": "oracle"},
}


@pytest.mark.parametrize("how", SELECTORS)
@pytest.mark.parametrize("name", ["llama-bias", "opt", "falcon-7b"])
def test_chosen_rows_anywhere(name: str, how: str, tmp_path: Path) -> None:
    """A token uses the neurons that it would use of the resident model, whatever is fetched, kept or too much for the buffer."""
    model, rng = Model(name, tmp_path), random.Random(7)
    expected = model.logits(SparseWeights(model.banks, build_neurons(model.banks, **SELECTORS[how])))
    overflows = 0
    row = (3 if model.spec.gated else 2) * model.spec.hidden_size * 4
    for rows, cache, tiers in [
        (90, 0, everything("rows", 2)),
        (40, 20, everything("rows", 2)),
        (12, 200, mixed(rng, 2)),
        (4, 9, mixed(rng, 2)),
    ]:
        banks = model.placed(tiers, rows_bytes=rows * row, cache_bytes=cache * row)
        view = OffloadedSparse(banks, build_neurons(banks, **SELECTORS[how]))
        for _ in range(2):
            torch.testing.assert_close(model.logits(view), expected, atol=TOLERANCE, rtol=1e-5)
        (_, counts), reads = banks.counts(), view.reads()
        overflows += reads.overflows
        assert counts.wanted == counts.hit + counts.moved
        assert reads.neurons == reads.neurons_of * build_neurons(banks, **SELECTORS[how])[0].keep // model.spec.intermediate_size
        if banks.pool is not None:
            banks.pool.rows.check()
        banks.streamer.check()
    assert overflows or how == "few"


def test_heads_are_chosen_ahead_of_layers_that_fetch(llama: Model) -> None:
    """The host tells them of the MLP's input, whatever that MLP is computed from."""
    spec, generator = llama.spec, torch.Generator().manual_seed(4)
    weights = torch.randn(2, spec.num_heads, spec.hidden_size, generator=generator).to(llama.device)
    heads = [
        HeadSelector(weight, weight[:, 0], keep=2, reads="ahead" if layer else "own") for layer, weight in enumerate(weights)
    ]
    views = [SparseWeights(llama.banks, build_neurons(llama.banks, mlp=0.4, by="q4"), heads=heads)]
    tiers = replace(everything("rows", 2), attention=dict.fromkeys(range(2), Spans()), head=Spans(), embeddings=Spans())
    banks = llama.placed(tiers, rows_bytes=90 * 3 * spec.hidden_size * 4)
    views.append(OffloadedSparse(banks, build_neurons(banks, mlp=0.4, by="q4"), heads=heads))
    expected, found = map(llama.logits, views)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=1e-5)
    assert not torch.allclose(expected, llama.expected, atol=0.1)


def test_only_wanted_rows_are_moved(llama: Model) -> None:
    """One token: its rows cross, and nothing else of the neurons; what was kept does not cross again."""
    spec, row = llama.spec, 3 * llama.spec.hidden_size * 4
    for cache in (0, 2 * spec.num_layers * spec.intermediate_size):
        tiers = Tiers(
            attention=dict.fromkeys(range(2), Spans()),
            neurons=dict.fromkeys(range(2), Spans((("resident", 0, 1, 3), ("rows", 1, 2, 3)))),
            head=Spans(),
            embeddings=Spans(),
            kv_away=frozenset(),
        )
        banks = llama.placed(tiers, rows_bytes=90 * row, cache_bytes=cache * row)
        view = OffloadedSparse(banks, build_neurons(banks, mlp=0.3, by="q8"))
        kv = PagedKV(spec, Shard(), num_blocks=8, block_size=4, **llama.how)
        decoder = Decoder(view, SoloComm(), llama.device)
        for start in range(3):
            banks.counts()
            decoder.run([SeqStep(0, [5], start, list(range(8)), 0, sample=True)], kv)
            kv.commit(0, 1)
            pieces, rows = banks.counts()
            assert pieces.bytes == 0 and rows.wanted > 0
            assert rows.moved == (0 if cache else rows.wanted)
        assert view.reads().neurons == 3 * 2 * 27

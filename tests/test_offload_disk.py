"""Weights that neither GPU nor host memory holds: read from the checkpoint's files in every pass, with the same tokens."""

from __future__ import annotations

import gc
import os
import random
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_offload_llm import CAP, away, make, planned, shares
from test_offload_weights import TOLERANCE, Model, everything
from test_speculation import GREEDY, SEEDED, ids, prompts
from tiny import CASES, tiny_model
from torch import Tensor

from rowcast import LLM, OutOfMemoryError, UserError
from rowcast.offload.disk import BUFFERS, DiskPiece, DiskReader, sequential_rate
from rowcast.offload.host_store import HostStore
from rowcast.offload.streamer import Order, Streamer
from rowcast.placement.executable import not_yet
from rowcast.placement.forecast import Share
from rowcast.placement.plan import Plan
from rowcast.runtime.checkpoint.ranged_file import RangedFile
from rowcast.runtime.offloaded.disk import UnchangedFile
from rowcast.runtime.offloaded.tiers import Spans

BOTH = [pytest.param(torch.device("cpu"), id="cpu"), pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.gpu)]
DISK = Spans((("disk", 0, 1, 1),))


class Pieces:
    """Of a file of random bytes."""

    def __init__(self, path: Path, device: torch.device, count: int, size: int = 700) -> None:
        path.write_bytes(random.Random(1).randbytes(count * size))
        self.file = UnchangedFile(RangedFile(path))
        self.reader = DiskReader(HostStore(device), size)
        self.all = [DiskPiece(i, self.file, i * size, size, self.reader) for i in range(count)]
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).view(count, size)
        self.data = list(data)


def use(ring: Streamer, piece: DiskPiece) -> Tensor:
    found = ring.take(piece).clone().cpu()
    ring.release(piece)
    return found


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize(("count", "slots"), [(1, 1), (2, 2), (9, 1), (9, 4), (3, 8)])
def test_passes_see_the_files_bytes(tmp_path: Path, device: torch.device, count: int, slots: int) -> None:
    pieces = Pieces(tmp_path / "file", device, count)
    pieces.reader.begin(pieces.all)
    ring, order = Streamer(device, slots=slots, slot_bytes=700), Order(pieces.all)
    for _ in range(3):
        ring.begin(order)
        for piece, data in zip(pieces.all, pieces.data, strict=True):
            assert torch.equal(use(ring, piece), data)
    copied = ring.counts().pieces
    assert pieces.reader.read_bytes == copied * 700
    assert copied == count if slots >= count else copied <= 3 * count + slots
    ring.check()
    ring.close()
    pieces.reader.close()


@pytest.mark.parametrize("device", BOTH)
def test_any_order(tmp_path: Path, device: torch.device) -> None:
    """Out of turn, again, with what was read ahead in the way."""
    pieces, rng = Pieces(tmp_path / "file", device, 12), random.Random(3)
    pieces.reader.begin(pieces.all)
    out = torch.empty(700, dtype=torch.uint8, device=device)
    for _ in range(80):
        piece = rng.choice(pieces.all)
        assert piece.load(out) == 700
        assert torch.equal(out.cpu(), pieces.data[piece.offset // 700])
    pieces.reader.close()
    pieces.reader.close()


class Slow:
    """A file whose reads wait until they may go on."""

    def __init__(self) -> None:
        self.go, self.begun, self.offsets = threading.Event(), threading.Semaphore(0), list[int]()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.offsets.append(offset)
        self.begun.release()
        assert self.go.wait(10)
        buffer[:] = bytes([offset]) * len(buffer)


def test_reads_run_ahead() -> None:
    """As many as there are buffers, before anything is asked for; then one for each that was taken."""
    file, reader = Slow(), DiskReader(HostStore(torch.device("cpu")), 8)
    all_of_them = [DiskPiece(i, file, i, 8, reader) for i in range(7)]
    reader.begin(all_of_them)
    for _ in range(BUFFERS):
        assert file.begun.acquire(timeout=10)
    assert sorted(file.offsets) == list(range(BUFFERS))
    file.go.set()
    out = torch.empty(8, dtype=torch.uint8)
    for turn in range(2 * len(all_of_them)):
        all_of_them[turn % 7].load(out)
        assert bool((out == turn % 7).all())
    reader.close()
    assert 14 <= len(file.offsets) <= BUFFERS + 14


def test_a_reader_goes_with_its_owner(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path / "file", torch.device("cpu"), 5)
    pieces.reader.begin(pieces.all)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("rowcast-disk")]
    held = weakref.ref(pieces.reader)
    del pieces
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert threads and held() is None and not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("device", BOTH)
def test_a_file_that_shrinks(tmp_path: Path, device: torch.device) -> None:
    """An error, and again one; what could not be read is never taken for a piece."""
    pieces = Pieces(tmp_path / "file", device, 6)
    pieces.reader.begin(pieces.all)
    ring = Streamer(device, slots=2, slot_bytes=700)
    ring.begin(Order(pieces.all))
    assert torch.equal(use(ring, pieces.all[0]), pieces.data[0])
    os.truncate(tmp_path / "file", 5 * 700 + 10)

    def a_pass() -> None:
        ring.begin(Order(pieces.all))
        for piece in pieces.all:
            use(ring, piece)

    for _ in range(2):
        with pytest.raises(UserError, match="file was changed while the model reads its weights from it: start again"):
            a_pass()
        for piece, data in zip(pieces.all, pieces.data, strict=True):
            assert not ring.holds(piece) or torch.equal(ring._held[piece.key].buffer[:700].cpu(), data)
    pieces.reader.close()


def test_what_else_happens_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    ranged = RangedFile(tmp_path / "file")
    file, buffer = UnchangedFile(ranged), memoryview(bytearray(10))
    file.read_into(buffer, 90)
    with pytest.raises(UserError, match="truncated"):
        file.read_into(buffer, 95)
    os.utime(tmp_path / "file", (1, 1))
    with pytest.raises(UserError, match="was changed"):
        file.read_into(buffer, 0)

    def broken(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    file = UnchangedFile(ranged)
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(UserError, match=r"file cannot be read any more \(Input/output error\): check the disk"):
        file.read_into(buffer, 0)


def test_the_rate_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    assert sequential_rate(tmp_path / "file", seconds=0.05) > 1e6
    with pytest.raises(FileNotFoundError):
        sequential_rate(tmp_path / "none")
    real, opened = os.open, list[int]()

    def buffered_only(path: Any, flags: int) -> int:
        opened.append(flags)
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags)

    monkeypatch.setattr(os, "open", buffered_only)
    assert sequential_rate(tmp_path / "file", seconds=0.05) > 1e6 and len(opened) == 2


@pytest.fixture(scope="module", params=CASES)
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param))


def test_every_family(any_model: Model) -> None:
    """However its files order queries, keys and values: the last layer on disk, then both, at any size of buffers."""
    layers = any_model.spec.num_layers
    base = everything("streamed", layers)
    for first, ring_bytes in ((layers - 1, 1 << 14), (0, 1)):
        tiers = replace(
            base,
            attention={**base.attention, **dict.fromkeys(range(first, layers), DISK)},
            neurons={**base.neurons, **dict.fromkeys(range(first, layers), DISK)},
        )
        view = any_model.placed(tiers, ring_bytes)
        assert view.bytes == any_model.banks.bytes
        torch.testing.assert_close(any_model.logits(view), any_model.expected, atol=TOLERANCE, rtol=1e-5)
        assert view.disk is not None and view.disk.read_bytes > 0
        view.streamer.check()
        view.close()


# Through the driver API.

WIDE: dict[str, Any] = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 2048}
GPU, HOST = 240 << 20, 60 << 20
"""Bytes, for 120 MiB of weights, 208 MiB of work space and 52 MiB of buffers."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    tiny_model("llama-gqa", path, **WIDE)
    return path


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWCAST_CPU_AS_GPU", "1")


def on_disk(plan: Plan) -> list[int]:
    assert plan.forecast is not None
    return sorted({share.layer for share in plan.forecast.shares if share.tier == "disk"})


SHORT = replace(GREEDY, max_tokens=12)
SMALL: dict[str, Any] = {"ladder": "plain", "device": "cpu", "dtype": "float32", "max_model_len": 64, "progress": False}


@pytest.fixture(scope="module")
def expected(target: Path) -> list[list[int]]:
    return ids(LLM(target, **SMALL).generate(prompts(2), SHORT))


@pytest.mark.usefixtures("stand_in")
def test_a_host_that_is_too_small(
    target: Path, expected: list[list[int]], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The last layers are read from disk, with a warning of what that will be like; the tokens are the unconstrained run's."""
    llm = LLM(target, gpu_memory=GPU, host_memory=HOST, **SMALL)
    away_layers = on_disk(llm.plan)
    assert away_layers and away_layers == list(range(away_layers[0], 8))
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"the last {len(away_layers)} of 8 layers, have no room in host memory and are read from disk" in warning
    assert "tokens/s" in warning and warning in llm.plan.notes
    outputs = llm.generate(prompts(2), SHORT)
    assert ids(outputs) == expected
    moved, forecast = outputs[0].metrics.moved, llm.plan.forecast
    assert moved is not None and moved.disk_bytes > 0 and moved.weight_bytes >= moved.disk_bytes
    assert forecast is not None and forecast.machine == llm.plan.machine
    assert outputs[0].to_json()["stats"]["offload"]["bytes"]["disk"] == {"weights": moved.disk_bytes}
    held = llm.engine._executor.elsewhere.host_bytes  # type: ignore[attr-defined]
    memory = next(each for each in forecast.memory if each.card == "host")
    assert held <= HOST == memory.budget_bytes and memory.classes["margin"] >= 0
    assert "disk" in llm.plan.places() and "disk" in llm.plan.places_text()
    llm.plan.save(tmp_path / "plan")
    assert ids(LLM(target, plan=tmp_path / "plan", progress=False).generate(prompts(2), SHORT)) == expected
    llm.engine.check()


@pytest.mark.usefixtures("stand_in")
def test_host_memory_decides_how_many_layers(target: Path, caplog: pytest.LogCaptureFixture) -> None:
    counts = []
    for host in (40, 60, 200):
        counts.append(len(on_disk(LLM(target, gpu_memory=GPU, host_memory=host << 20, **SMALL).plan)))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[1] > counts[-1] == 0
    with pytest.raises(OutOfMemoryError, match="more on each GPU"):  # the disk does not help
        LLM(target, gpu_memory=100 << 20, host_memory=HOST, **SMALL)


@pytest.mark.usefixtures("stand_in")
def test_a_file_that_shrinks_under_a_model(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path, **WIDE)
    llm = LLM(tmp_path, gpu_memory=GPU, host_memory=HOST, **SMALL)
    first = ids(llm.generate(prompts(2), SHORT))
    content = (tmp_path / "model.safetensors").read_bytes()
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(UserError, match=r"model\.safetensors was changed while the model reads its weights from it"):
        llm.generate(prompts(2), SHORT)
    llm.engine.check()
    assert len(first) == 2 and len(content) > 1000


@pytest.mark.usefixtures("stand_in")
def test_what_cannot_be_read_from_disk(target: Path) -> None:
    """One sentence that says what is short, and why the disk does not help."""
    short, why = "^.* does not fit on 1 x .*", "rung self:mlp=.* chooses rows, which cannot be read from disk"
    with pytest.raises(OutOfMemoryError, match=rf"{short}; {why}: use --ladder plain\.$"):
        LLM(target, gpu_memory=340 << 20, host_memory=20 << 20, **SMALL | {"ladder": "self:mlp=0.5,gamma=2 / plain"})
    with pytest.raises(OutOfMemoryError, match=f"{short}; the rest cannot be read from disk: only weights in safetensors files"):
        planned("plain", gpu_memory=CAP, host_memory="600MiB")
    plan = make(target, "plain", max_model_len=64).plan
    given = [Share([0], "neurons", 7, "disk", 0, 1, 1, 1)]
    with pytest.raises(
        UserError, match=r"^model.* is stored as float32 and would have to be converted to bfloat16 .* --dtype float32\.$"
    ):
        LLM(target, plan=replace(away(plan, given), dtype="bfloat16"), progress=False)


def test_plans_with_layers_on_disk(target: Path) -> None:
    plan = make(target, "plain").plan
    whole = [Share([0], part, layer, "disk", 0, 4, 4, 1) for part in ("attention", "neurons") for layer in (4, 5)]
    assert not not_yet(away(plan, whole))
    assert not_yet(replace(away(plan, whole), ladder=["self:lm=hire", "plain"])) == [
        f"{part} read from disk under a rung that chooses rows" for part in ("attention", "neurons")
    ]
    assert not_yet(away(plan, [replace(whole[0], count=2)])) == ["a layer's attention in part read from disk"]
    assert not_yet(away(plan, [replace(whole[0], part="LM head", layer=-1)])) == ["LM head read from disk"]
    two = replace(away(plan, whole[:1]), world=2)
    assert not_yet(two, 2) == ["attention read from disk by 2 ranks"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "ladder", ["plain", "ngram:gamma=3 / self:kv=24,chunk=4,sinks=4,recent=8,gamma=3 / plain", "self:bits=4,gamma=2 / plain"]
)
def test_ladders_over_layers_on_disk(tmp_path: Path, device: str, ladder: str) -> None:
    """Some layers there, some streamed, some resident, KV away: the same tokens."""
    tiny_model("llama-gqa", tmp_path, num_hidden_layers=8)
    llm = make(tmp_path, ladder, device)
    given = [share for share in shares(2, 8) if share.layer < 5 or share.part == "KV"]
    given += [Share([0], part, layer, "disk", 0, 1, 1, 1) for part in ("attention", "neurons") for layer in (5, 6, 7)]
    there = LLM(tmp_path, plan=away(llm.plan, given), progress=False)
    for params in (GREEDY, SEEDED):
        assert ids(there.generate(prompts(4), params)) == ids(llm.generate(prompts(4), params))
    there.engine.check()


def test_ctrl_c_while_the_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next pass computes what it should."""
    model = Model("llama-gqa", tmp_path)
    tiers = replace(everything("streamed", 2), neurons=dict.fromkeys(range(2), DISK))
    view = model.placed(tiers)
    real, calls = DiskReader.load, 0

    def interrupted(reader: DiskReader, piece: DiskPiece, out: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            out.fill_(77)
            raise KeyboardInterrupt
        real(reader, piece, out)

    monkeypatch.setattr(DiskReader, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.logits(view)
    torch.testing.assert_close(model.logits(view), model.expected, atol=TOLERANCE, rtol=1e-5)
    view.streamer.check()
    view.close()

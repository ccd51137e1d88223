"""Offloading when something goes wrong: one sentence, no wrong token afterwards, and all memory back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_offload_llm import away, make, shares
from test_speculation import GREEDY, SEEDED, ids, prompts
from tiny import tiny_model

from rowcast import LLM, OutOfMemoryError, UserError
from rowcast.offload import host_store
from rowcast.offload.host_store import HostBank, HostStore
from rowcast.offload.outbox import Outbox
from rowcast.offload.row_cache import CachedBank
from rowcast.offload.streamer import HostPiece, Order, Streamer
from rowcast.placement import host
from rowcast.placement.plan import Plan

SPARSE: dict[str, Any] = {"ladder": "self:mlp=0.5", "mode": "approximate"}
"""Fetches rows and, for prompts, streams layers; what it fetches decides the output."""


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    tiny_model("llama-gqa", path)
    return path


@pytest.fixture(scope="module")
def plan(target: Path, device: str) -> Plan:
    """Everything elsewhere, with room for 30 kept rows in each layer."""
    found = make(target, device=device, **SPARSE).plan
    found = replace(found, budget_bytes=found.budget_bytes - found.margin_bytes + 2 * 30 * 3 * 64 * 4)
    tiers = {"attention": "streamed", "neurons": "rows", "LM_head": "streamed", "embeddings": "host", "KV": "streamed"}
    return away(found, shares(None, 2, **{part: (tier,) for part, tier in tiers.items()}))


@pytest.fixture(scope="module")
def expected(target: Path, device: str) -> list[list[int]]:
    return ids(make(target, device=device, **SPARSE).generate(prompts(4), SEEDED))


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Bytes of all stores that were made since and are still there."""
    made: list[int] = []
    real = HostStore.__init__

    def noted(store: HostStore, device: torch.device) -> None:
        real(store, device)
        made.append(id(store))

    monkeypatch.setattr(HostStore, "__init__", noted)

    def held() -> int:
        return sum(each.bytes for each in gc.get_objects() if type(each) is HostStore and id(each) in made)

    return held


def fail_at(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    error: Callable[[], BaseException],
    *,
    after: bool = False,
) -> list[int]:
    """The `call`-th call of a method raises, once; `after`: it has done its work then. Returns what counts the calls."""
    real, calls = getattr(owner, name), [0]

    def failing(*args: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] != call:
            return real(*args, **named)
        if after:
            real(*args, **named)
        raise error()

    monkeypatch.setattr(owner, name, failing)
    return calls


@pytest.mark.parametrize("call", [1, 4, 7])
def test_host_memory_that_runs_out(
    target: Path, plan: Plan, stores: Callable[[], int], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """While a model is loaded: what was taken is given back while the error is still looked at."""
    short = OutOfMemoryError("no 3 GiB of host memory are free: use a lower --host-memory")
    fail_at(monkeypatch, HostStore, "bank", call, lambda: short)
    with pytest.raises(OutOfMemoryError, match=r"^no 3 GiB of host memory are free: use a lower --host-memory\.$") as caught:
        LLM(target, plan=plan, progress=False)
    assert caught.value is short and stores() == 0


def test_the_system_is_asked_before_it_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux promises more memory than it has."""
    facts = replace(host.read(), available_bytes=1 << 30)
    monkeypatch.setattr(host, "read", lambda: facts)
    store = HostStore(torch.device("cpu"))
    store.bank((1 << 20,), torch.uint8)
    with pytest.raises(
        OutOfMemoryError, match=r"^no 2\.00 GiB of host memory are free, but 1\.00: use a lower --host-memory, or end"
    ):
        store.bank((2 << 30,), torch.uint8)


@pytest.mark.gpu
@pytest.mark.parametrize("away_too", [("streamed",), ("resident",)])
@pytest.mark.parametrize("after", [0, 3])
def test_memory_that_is_not_pinned(
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    after: int,
    away_too: tuple[str, ...],
) -> None:
    """From some bank on the system refuses: the same tokens from ordinary pages, with one warning a store; also where passes could be
    captured if the pages were pinned."""
    resident = make(target, device="cuda", **SPARSE)
    expected = ids(resident.generate(prompts(4), SEEDED))
    real, calls = host_store.pinned_pages, [0]

    def refusing(size: int, device: torch.device) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise UserError("the system refuses to pin 1 GiB of host memory for the GPU (none left): allow more locked memory")
        return real(size, device)

    monkeypatch.setattr(host_store, "pinned_pages", refusing)
    given = shares(None, 2, attention=away_too, neurons=("rows",), KV=away_too)
    llm = LLM(target, plan=away(resident.plan, given), progress=False)
    told = [record.getMessage() for record in caplog.records if "pinned" in record.getMessage()]
    assert bool(told) is (calls[0] > after)
    assert all("are not pinned, which is slower: the system refuses to pin" in message for message in told)
    for _ in range(2):
        assert ids(llm.generate(prompts(4), SEEDED)) == expected


def test_the_host_is_asked_for_what_the_device_does_not_see() -> None:
    pages = torch.zeros(4, 4)
    assert HostBank(pages, None, torch.device("cuda")).asks_host
    assert not HostBank(pages, None, torch.device("cpu")).asks_host


TRANSFERS: dict[str, tuple[Any, str, bool]] = {
    "a piece": (Streamer, "_copy", False),
    "a piece, half way": (HostPiece, "load", True),
    "a piece in use": (Streamer, "release", False),
    "rows": (HostBank, "gather", False),
    "rows on their way": (HostBank, "gather", True),
    "rows that are chosen": (CachedBank, "_reach", True),
    "new KV": (Outbox, "post", False),
    "new KV, half way": (Outbox, "post", True),
}


@pytest.mark.parametrize("call", [2, 9])
@pytest.mark.parametrize("transfer", TRANSFERS)
def test_ctrl_c_in_a_transfer(
    target: Path,
    plan: Plan,
    expected: list[list[int]],
    stores: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    transfer: str,
    call: int,
) -> None:
    """What comes afterwards is what it should be, and then the memory goes with the model."""
    owner, name, after = TRANSFERS[transfer]
    if transfer == "rows that are chosen" and plan.device != "cpu":
        from rowcast.kernels.gpu import row_cache

        owner, name = row_cache, "reach"
    llm = LLM(target, plan=plan, progress=False, eager=True)
    llm.generate(prompts(2), GREEDY)
    calls = fail_at(monkeypatch, owner, name, call, KeyboardInterrupt, after=after)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts(4), SEEDED)
    assert ids(llm.generate(prompts(4), SEEDED)) == expected and calls[0] > call
    llm.engine.check()
    elsewhere = llm.engine._executor.elsewhere  # type: ignore[attr-defined]
    elsewhere.weights.streamer.check()
    elsewhere.weights.pool.rows.check()
    assert stores() == elsewhere.host_bytes > 0
    del llm, elsewhere
    gc.collect()
    assert stores() == 0


def test_what_was_broken_off_is_not_held() -> None:
    """A piece whose copy did not end is copied again; its buffer held another one before."""
    store = HostStore(torch.device("cpu"))
    bank = store.bank((4, 64), torch.uint8)
    bank.tensor.copy_(torch.arange(4, dtype=torch.uint8)[:, None])
    pieces = [HostPiece(i, bank.piece(slice(i, i + 1))) for i in range(4)]
    ring = Streamer(store.device, slots=2, slot_bytes=64)
    ring.begin(Order(pieces))
    real, calls = HostPiece.load, [0]

    def failing(piece: HostPiece, out: torch.Tensor) -> int:
        calls[0] += 1
        out.fill_(99)
        if calls[0] == 1:
            raise KeyboardInterrupt
        return real(piece, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostPiece, "load", failing)
        with pytest.raises(KeyboardInterrupt):
            ring.take(pieces[2])
    for _ in range(2):
        ring.begin(Order(pieces[2:] + pieces[:2]))
        for number in (2, 3, 0, 1):
            assert bool((ring.take(pieces[number]) == number).all())
            ring.release(pieces[number])
    ring.check()

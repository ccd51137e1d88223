"""The ring of buffers: what is copied, when, and into which buffer; on a CPU with copies made at once."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from rowcast.offload.host_store import HostStore
from rowcast.offload.streamer import HostPiece, Order, Streamer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOTH = [pytest.param(torch.device("cpu"), id="cpu"), pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.gpu)]


def pieces(device: torch.device, count: int, size: int = 512) -> list[HostPiece]:
    bank = HostStore(device).bank((count, size), torch.uint8)
    bank.tensor.copy_(torch.randint(0, 256, (count, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)))
    return [HostPiece(i, bank.piece(slice(i, i + 1))) for i in range(count)]


def use(ring: Streamer, piece: HostPiece) -> Tensor:
    found = ring.take(piece).clone()
    ring.release(piece)
    return found


@pytest.mark.parametrize("device", BOTH)
@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_every_pass_sees_the_pieces_and_copies_each_once(device: torch.device, slots: int) -> None:
    all_of_them = pieces(device, 7)
    ring, order = Streamer(device, slots=slots, slot_bytes=512), Order(all_of_them)
    for turn in range(3):
        ring.begin(order)
        for piece in all_of_them:
            assert torch.equal(use(ring, piece).cpu(), piece.data)
        counts = ring.counts()
        ahead = slots if turn == 0 else 0  # the first pass also brings the second one's first pieces
        assert counts.pieces == 7 + ahead and counts.bytes == counts.pieces * 512 and counts.taken == 7
        assert counts.stalled_s >= 0
    ring.check()
    ring.close()


@pytest.mark.parametrize("slots", [7, 9])
def test_what_has_room_is_copied_once_for_all(slots: int) -> None:
    all_of_them = pieces(DEVICE, 7)
    ring, order = Streamer(DEVICE, slots=slots, slot_bytes=512), Order(all_of_them)
    for _ in range(3):
        ring.begin(order)
        for piece in all_of_them:
            use(ring, piece)
    assert ring.counts().pieces == 7


def test_copies_run_ahead_of_use() -> None:
    """While one piece is in use the next two are held, at the end the first ones of the next pass."""
    all_of_them = pieces(DEVICE, 5)
    ring = Streamer(DEVICE, slots=3, slot_bytes=512)
    ring.begin(Order(all_of_them))
    for i, piece in enumerate(all_of_them):
        ring.take(piece)
        assert set(ring._held) == {i, (i + 1) % 5, (i + 2) % 5}
        ring.release(piece)
        assert set(ring._held) == {(i + 1) % 5, (i + 2) % 5, (i + 3) % 5}


def test_an_order_that_ends_copies_nothing_behind_its_end() -> None:
    all_of_them = pieces(DEVICE, 4)
    ring, order = Streamer(DEVICE, slots=2, slot_bytes=512), Order(all_of_them, cyclic=False)
    for _ in range(2):
        ring.begin(order, fresh=True)
        for piece in all_of_them:
            use(ring, piece)
        assert ring.counts().pieces == 4


def test_fresh_content_is_copied_again() -> None:
    all_of_them = pieces(DEVICE, 2)
    ring, order = Streamer(DEVICE, slots=4, slot_bytes=512), Order(all_of_them)
    ring.begin(order)
    use(ring, all_of_them[0])
    all_of_them[0].data.fill_(9)
    ring.begin(order, fresh=True)
    assert bool((use(ring, all_of_them[0]) == 9).all())


@pytest.mark.parametrize("device", BOTH)
def test_any_pieces_in_any_order(device: torch.device) -> None:
    """Out of turn, skipped, several at once, orders that change: the bytes are always the piece's."""
    rng, all_of_them = random.Random(5), pieces(device, 9)
    ring = Streamer(device, slots=4, slot_bytes=600)
    orders = [Order(all_of_them), Order(all_of_them[::2]), Order(all_of_them[3:], cyclic=False), Order(())]
    for _ in range(60):
        ring.begin(rng.choice(orders))
        for _ in range(rng.randrange(6)):
            chosen = rng.sample(all_of_them, rng.randrange(1, 5))
            views = [ring.take(piece) for piece in chosen]
            for piece, view in zip(chosen, views, strict=True):
                assert torch.equal(view.cpu(), piece.data)
            for piece in chosen:
                ring.release(piece)
        ring.check()


def test_pieces_that_come_again_stay() -> None:
    """Each layer's two pieces are used three times before the next one's."""
    all_of_them = pieces(DEVICE, 8)
    uses = [piece for layer in range(4) for _ in range(3) for piece in all_of_them[2 * layer : 2 * layer + 2]]
    order = Order(uses)
    for slots in (2, 3, 4):
        ring = Streamer(DEVICE, slots=slots, slot_bytes=512)
        for turn in range(2):
            ring.begin(order)
            for piece in uses:
                assert torch.equal(use(ring, piece), piece.data)
            assert ring.counts().pieces == 8 + (slots if turn == 0 else 0)
        ring.check()


def test_misuse_is_seen() -> None:
    all_of_them = pieces(DEVICE, 3)
    ring = Streamer(DEVICE, slots=1, slot_bytes=512)
    ring.begin(Order(all_of_them))
    ring.take(all_of_them[0])
    with pytest.raises(AssertionError, match="all buffers are taken"):
        ring.take(all_of_them[1])
    ring.begin(Order(all_of_them))  # as after a pass that was broken off
    assert torch.equal(use(ring, all_of_them[1]), all_of_them[1].data)
    with pytest.raises(AssertionError, match="do not go into"):
        Streamer(DEVICE, slots=1, slot_bytes=256).take(all_of_them[0])


@pytest.mark.gpu
def test_a_buffer_is_not_overwritten_while_it_is_read() -> None:
    """Long kernels read each piece, while its successors wait for the buffer."""
    device = torch.device("cuda")
    all_of_them = pieces(device, 12, 1 << 22)
    ring = Streamer(device, slots=2, slot_bytes=1 << 22)
    slow = torch.randn(4096, 4096, device=device)
    for _ in range(3):
        ring.begin(Order(all_of_them))
        sums = []
        for piece in all_of_them:
            view = ring.take(piece)
            for _ in range(4):
                slow = slow @ slow * 1e-3
            sums.append(view.to(torch.int64).sum())
            ring.release(piece)
        for piece, found in zip(all_of_them, sums, strict=True):
            assert int(found) == int(piece.data.to(torch.int64).sum())
    ring.close()


def test_a_bank_of_ordinary_memory_where_pinning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from rowcast.errors import UserError
    from rowcast.offload import host_store

    refused = torch.device("meta")

    def refuse(size: int, device: torch.device) -> object:
        raise UserError("the system refuses to pin")

    monkeypatch.setattr(host_store, "pinned_pages", refuse)
    store = HostStore(refused)
    bank = store.bank((3, 5), torch.float32)
    assert store.unpinned == "the system refuses to pin." and bank.tensor.shape == (3, 5) and not bank.tensor.any()
    assert store.bytes == 64
    store.close()
    assert store.bytes == 0


def test_more_memory_than_there_is() -> None:
    from rowcast.errors import OutOfMemoryError

    with pytest.raises(OutOfMemoryError, match="of host memory are free"):
        HostStore(torch.device("cpu")).bank((1 << 30, 1 << 30), torch.uint8)

"""Rows of host memory over the bus: the kernel against its reference, pinning, and what is said where pinning is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels.gpu.host_rows import Fetch, gather, gather_reference
from rowcast.offload import host_memory
from rowcast.offload.host_memory import HostTensor, pinned_bank

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Fetch(programs=3, tile=128, piece=64, warps=1)
"""Several tiles for each program even where there are few rows."""


def _bank(rows: int, row_bytes: int, seed: int = 0) -> HostTensor:
    bank = pinned_bank((rows, row_bytes), torch.uint8, DEVICE)
    bank.tensor.copy_(torch.randint(0, 256, bank.tensor.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    return bank


def _ids(rows: int, capacity: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, rows, (capacity,), dtype=torch.int32, generator=generator).to(DEVICE)


def _count(count: int) -> Tensor:
    return torch.tensor([count], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("row_bytes", [16, 48, 64, 208, 1040])
@pytest.mark.parametrize("count", [0, 1, 6, 13, 40])
def test_rows_are_the_references(row_bytes: int, count: int) -> None:
    """Counts up to the capacity of 13, and one beyond it. Rows behind the count stay as they are."""
    with _bank(29, row_bytes) as bank:
        ids, out = _ids(29, 13, seed=count), torch.full((13, row_bytes), 77, dtype=torch.uint8, device=DEVICE)
        expected = out.clone()
        gather(bank.address, row_bytes, ids, _count(count), out, SMALL)
        gather_reference(bank.tensor, ids, _count(count), expected)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_usual_cut(dtype: torch.dtype) -> None:
    """Rows of 4128 bytes and more: whole pieces, the last one short."""
    with pinned_bank((11, 2, 1032), dtype, DEVICE) as bank:
        bank.tensor.copy_(torch.randn(bank.tensor.shape))
        ids, out = _ids(11, 9), torch.zeros(9, 2, 1032, dtype=dtype, device=DEVICE)
        bank.gather(ids, _count(7), out)
        assert torch.equal(out[:7].cpu(), bank.tensor[ids[:7].long().cpu()])
        assert not out[7:].any()


def test_the_beginning_of_each_row() -> None:
    """From bundles of rows, the first alone; from an address within them, the second."""
    with _bank(12, 3 * 80) as bank:
        ids, out = _ids(12, 5), torch.zeros(5, 80, dtype=torch.uint8, device=DEVICE)
        bank.gather(ids, _count(5), out)
        assert torch.equal(out.cpu(), bank.tensor[ids.long().cpu(), :80])
        gather(bank.address + 80, bank.row_bytes, ids, _count(5), out, SMALL)
        assert torch.equal(out.cpu(), bank.tensor[ids.long().cpu(), 80:160])


def test_no_ids() -> None:
    with _bank(4, 64) as bank:
        bank.gather(_ids(4, 0), _count(3), torch.zeros(0, 64, dtype=torch.uint8, device=DEVICE))


@pytest.mark.parametrize("row_bytes", [24, 100])
def test_rows_that_are_not_whole_units(row_bytes: int) -> None:
    with _bank(16, row_bytes) as bank, pytest.raises(AssertionError):
        bank.gather(_ids(16, 3), _count(3), torch.zeros(3, row_bytes, dtype=torch.uint8, device=DEVICE))


def test_closing_twice() -> None:
    bank = _bank(4, 64)
    bank.close()
    bank.close()
    assert bank.tensor.shape == (4, 64)


def test_no_memory() -> None:
    with pytest.raises(UserError, match=r"no [\d.]+ GiB of host memory are free \(Cannot allocate memory\)"):
        pinned_bank((1 << 30, 1 << 30), torch.uint8, DEVICE)


def test_pinning_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with the runtime's words; nothing is left to unpin."""
    runtime = SimpleNamespace(
        cudaError=SimpleNamespace(success=0),
        cudaHostRegister=lambda address, size, flags: 801,
        cudaGetErrorString=lambda code: {801: "operation not supported"}[code],
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(UserError, match=r"refuses to pin 0\.00 GiB .* \(operation not supported\): allow more") as caught:
        host_memory._register(torch.zeros(64), torch.device("cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_a_refusal_by_the_runtime_spoils_nothing() -> None:
    """The same pages twice: the second time is refused, and kernels run on."""
    with _bank(4, 4096) as bank:
        with pytest.raises(UserError, match="refuses to pin"):
            HostTensor(bank.tensor, DEVICE)
        assert torch.ones(3, device=DEVICE).sum().item() == 3
        out = torch.zeros(4, 4096, dtype=torch.uint8, device=DEVICE)
        bank.gather(torch.arange(4, dtype=torch.int32, device=DEVICE), _count(4), out)
        assert torch.equal(out.cpu(), bank.tensor)
    with HostTensor(bank.tensor, DEVICE) as again:
        assert again.tensor is bank.tensor


@pytest.mark.gpu
@pytest.mark.parametrize("row_bytes", [4096, 8192, 24576, 147456, 5008])
def test_replays_with_other_ids_counts_and_content(row_bytes: int) -> None:
    with _bank(300, row_bytes) as bank:
        ids, count = _ids(300, 64), _count(64)
        out = torch.zeros(64, row_bytes, dtype=torch.uint8, device=DEVICE)
        bank.gather(ids, count, out)  # Compiled outside the graph.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            bank.gather(ids, count, out)
        for seed, wanted in enumerate((64, 0, 1, 37, 63, 1000)):
            ids.copy_(_ids(300, 64, seed))
            count.fill_(wanted)
            bank.tensor[seed].add_(1)
            expected = out.clone()
            gather_reference(bank.tensor, ids, count, expected)
            graph.replay()
            assert torch.equal(out, expected)


@pytest.mark.gpu
def test_a_wrong_address_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device reads other memory than the host writes: another bank's."""
    with _bank(4, 4096) as other, monkeypatch.context() as patch:
        patch.setattr(host_memory, "_device_address", lambda address: other.address)
        with pytest.raises(UserError, match="does not see what is written"):
            _bank(4, 4096)

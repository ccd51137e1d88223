"""Rows read ahead into a few buffers: all of them, in order, and no buffer is read into while something is copied out of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rowcast.errors import UserError
from rowcast.runtime import row_blocks as module
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.row_blocks import row_blocks

CPU = torch.device("cpu")
READERS = [0, 1, 4]


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SafetensorsSource, Tensor]:
    """A matrix [100, 6] of float32 in a file, read three rows at a time."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 3 * 6 * 4 + 5)
    matrix = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    save_file({"m": matrix, "v": matrix[:, 0].contiguous()}, tmp_path / "model.safetensors")
    return SafetensorsSource.open(tmp_path), matrix


def loading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("rowcast-load")]


@pytest.mark.parametrize("readers", READERS)
@pytest.mark.parametrize("rows", [slice(0, 100), slice(7, 9), slice(7, 11), slice(50, 50)])
def test_all_rows_in_order(stored: tuple[SafetensorsSource, Tensor], rows: slice, readers: int) -> None:
    source, matrix = stored
    for name, cols, whole in (("m", None, matrix), ("m", slice(1, 5), matrix[:, 1:5]), ("v", None, matrix[:, 0])):
        at = rows.start
        for span, block in row_blocks(
            source, name, rows, cols, tuple(whole.shape[1:]), dtype=torch.bfloat16, device=CPU, readers=readers
        ):
            assert span.start == at
            assert block.nbytes <= module.BLOCK_BYTES
            assert torch.equal(block, whole[span].bfloat16())
            at = span.stop
        assert at == rows.stop
    assert not loading()


@pytest.mark.parametrize("readers", READERS)
def test_models_may_be_loaded_in_inference_mode(stored: tuple[SafetensorsSource, Tensor], readers: int) -> None:
    """Threads have modes of their own."""
    source, matrix = stored
    with torch.inference_mode():
        blocks = row_blocks(source, "m", slice(0, 100), None, (6,), dtype=torch.bfloat16, device=CPU, readers=readers)
        found = [block.clone() for _, block in blocks]
    assert torch.equal(torch.cat(found), matrix.bfloat16())


def test_a_row_longer_than_a_block(stored: tuple[SafetensorsSource, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    source, matrix = stored
    monkeypatch.setattr(module, "BLOCK_BYTES", 5)
    found = [
        block.clone() for _, block in row_blocks(source, "m", slice(2, 9), None, (6,), dtype=matrix.dtype, device=CPU, readers=2)
    ]
    assert [len(block) for block in found] == [1] * 7
    assert torch.equal(torch.cat(found), matrix[2:9])


@pytest.mark.parametrize("readers", READERS)
def test_a_file_that_ends_early_is_named(stored: tuple[SafetensorsSource, Tensor], tmp_path: Path, readers: int) -> None:
    source, matrix = stored
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
        list(row_blocks(source, "m", slice(0, 100), None, (6,), dtype=matrix.dtype, device=CPU, readers=readers))
    assert not loading()


def test_whoever_stops_asking_ends_the_threads(stored: tuple[SafetensorsSource, Tensor]) -> None:
    source, matrix = stored
    blocks = row_blocks(source, "m", slice(0, 100), None, (6,), dtype=matrix.dtype, device=CPU, readers=4)
    next(iter(blocks))
    assert loading()
    blocks.close()  # type: ignore[attr-defined]
    assert not loading()


class LateStream:
    """Copies nothing before somebody waits for it."""

    def __init__(self) -> None:
        self.copies: list[Callable[[], object]] = []

    def record_event(self) -> LateStream:
        return self

    def synchronize(self) -> None:
        while self.copies:
            self.copies.pop(0)()


def test_no_buffer_is_read_into_before_its_copies_are_made(
    stored: tuple[SafetensorsSource, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, matrix = stored
    stream, empty = LateStream(), torch.empty
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    def unpinned(*shape: Any, pin_memory: bool, **how: Any) -> Tensor:
        assert pin_memory
        return empty(*shape, **how)

    monkeypatch.setattr(torch, "empty", unpinned)
    out, buffers = torch.zeros_like(matrix), set()
    gpu = torch.device("cuda", 0)
    for span, block in row_blocks(source, "m", slice(0, 100), None, (6,), dtype=matrix.dtype, device=CPU, readers=4, gpus=[gpu]):
        buffers.add(block.data_ptr())
        stream.copies.append(lambda span=span, block=block: out[span].copy_(block))  # type: ignore[misc]
    assert len(buffers) == 4 + 2
    stream.synchronize()
    assert torch.equal(out, matrix)


@pytest.mark.gpu
def test_a_gpu_that_lags_behind_gets_every_row(tmp_path: Path) -> None:
    matrix = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"m": matrix}, tmp_path / "model.safetensors")
    device = torch.device("cuda", torch.cuda.current_device())
    out = torch.zeros_like(matrix, device=device)
    torch.cuda._sleep(1 << 28)  # type: ignore[no-untyped-call]  # the first copies wait for it
    for span, block in row_blocks(
        SafetensorsSource.open(tmp_path),
        "m",
        slice(0, 4096),
        None,
        (4096,),
        dtype=matrix.dtype,
        device=CPU,
        readers=4,
        gpus=[device],
    ):
        assert block.is_pinned()
        out[span].copy_(block, non_blocking=True)
    assert torch.equal(out.cpu(), matrix)

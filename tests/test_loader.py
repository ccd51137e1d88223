"""What the loader tells of its progress: the bytes that it places, however much of the checkpoint it reads for them. And that what it
places does not depend on how it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from thread_comm import run_ranks
from tiny import tiny_model
from torch import Tensor

from rowcast.runtime import row_blocks
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.loader import Loader
from rowcast.runtime.protocols import Comm
from rowcast.runtime.shard import Shard

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


@pytest.fixture
def banks(tmp_path: Path) -> Callable[[Comm, torch.device, list[int]], BankWeights]:
    """Loads a tiny model's share for a rank on a device, and notes what is told of progress."""
    tiny_model("llama-tied", tmp_path)
    spec = spec_from_config(json.loads((tmp_path / "config.json").read_text()))

    def load(comm: Comm, device: torch.device, placed: list[int]) -> BankWeights:
        source = SafetensorsSource.open(tmp_path)
        return BankWeights(spec, source, comm, dtype=torch.float32, device=device, progress=placed.append)

    return load


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_bytes", [row_blocks.BLOCK_BYTES, 1000])
def test_progress_counts_what_a_rank_places(
    banks: Callable[[Comm, torch.device, list[int]], BankWeights],
    block_bytes: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", block_bytes)

    def work(comm: Comm) -> tuple[int, int]:
        placed: list[int] = []
        return banks(comm, device, placed).bytes, sum(placed)

    for held, placed in run_ranks(2, work):
        assert placed == held


@pytest.mark.parametrize("device", DEVICES)
def test_weights_are_the_same_bits_in_blocks_of_any_size(
    banks: Callable[[Comm, torch.device, list[int]], BankWeights], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(comm: Comm) -> list[Tensor]:
        weights = banks(comm, device, [])
        attention = [table for bank in weights.attention for table in (bank.qkv, bank.o)]
        ffn = [table for bank in weights.ffn for table in (bank.gate, bank.up_down) if table is not None]
        assert weights.outer.head_rows is not None
        return [table.cpu() for table in (weights.outer.head_rows, *attention, *ffn)]

    whole = run_ranks(2, work)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 1000)
    for tables, others in zip(whole, run_ranks(2, work), strict=True):
        assert all(torch.equal(table, other) for table, other in zip(tables, others, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [False, True])
def test_a_matrix_is_dealt_to_tables_anywhere(
    columns: bool, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama-tied", tmp_path)
    spec = spec_from_config(json.loads((tmp_path / "config.json").read_text()))
    source = SafetensorsSource.open(tmp_path)
    load = Loader(spec, source, Shard(), torch.float32, device, None)
    stem = load.names.up.format(1)
    matrix = source.read(load.name(f"{stem}.weight"))
    expected = matrix.T if columns else matrix
    order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))
    few, none, many = order[:3], order[:0], order[3:-2]
    canvas = torch.full((len(many), 2, expected.shape[1]), 7.0, device=device)
    outs = [
        (torch.empty(3, expected.shape[1]), few),
        (torch.empty(0, expected.shape[1], device=device), none),
        (canvas[:, 1], many),
    ]
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 1000)
    load.deal(stem, outs, tuple(matrix.shape), columns=columns)  # type: ignore[arg-type]
    for out, ids in outs:
        assert torch.equal(out.cpu(), expected[ids])
    assert bool((canvas[:, 0] == 7).all()), "memory beside the table was written"

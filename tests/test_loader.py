"""What the loader tells of its progress: the bytes that it places, however much of the checkpoint it reads for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from thread_comm import run_ranks
from tiny import tiny_model

from rowcast.runtime.banks import BankWeights
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.protocols import Comm


def test_progress_counts_what_a_rank_places(tmp_path: Path) -> None:
    tiny_model("llama-tied", tmp_path)
    spec = spec_from_config(json.loads((tmp_path / "config.json").read_text()))

    def work(comm: Comm) -> tuple[int, int]:
        placed: list[int] = []
        banks = BankWeights(
            spec,
            SafetensorsSource.open(tmp_path),
            comm,
            dtype=torch.float32,
            device=torch.device("cpu"),
            progress=placed.append,
        )
        return sum(placed), banks.bytes

    for placed, held in run_ranks(2, work):
        assert placed == held

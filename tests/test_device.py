"""Memory that may be taken."""

from __future__ import annotations

from pathlib import Path

import torch

from rowcast.runtime.device import _control_group_bytes, available_bytes


def test_cached_file_pages_of_the_control_group_count_as_free(tmp_path: Path) -> None:
    assert _control_group_bytes(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 700\n")
    assert _control_group_bytes(tmp_path) == [800]
    (tmp_path / "memory.max").write_text("max\n")
    assert _control_group_bytes(tmp_path) == []


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("5000")
    (folder / "memory.usage_in_bytes").write_text("2000")
    (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 500")
    assert _control_group_bytes(tmp_path) == [3500]


def test_this_machine_has_some() -> None:
    assert available_bytes(torch.device("cpu")) > 1 << 28

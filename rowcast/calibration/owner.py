"""Which command made a folder, or works in it: what a command may remove is its own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from rowcast.errors import UserError
from rowcast.runtime.sparse.artefact import DESCRIPTION as CALIBRATION

CALIBRATE = "calibrate"
COMMANDS = (CALIBRATE, "distill", "adapt", "prune", "quantize")
CARRIED_BY = "rowcast adapt"
"""`made_by` in the description of the calibration that an adapted model carries."""
SETTINGS = "settings.json"
"""In what is worked in: what the command was called with."""
REMOVED = "removed.json"
"""The same where the rest is being removed, so that nothing goes on with a part of it."""
CALIBRATION_STATE = "state"
"""In a calibration under way: what is worked in."""
DESCRIPTION = "rowcast.json"
"""In the finished output of the others: how it was made, and its figures."""


def state_of(output: Path) -> Path:
    """What all commands but calibrate work in until `output` is whole. Raises UserError where that is no folder to write."""
    if output.name in ("", ".."):
        output = output.resolve()
    if not output.name:
        raise UserError(f"{output} is no folder to write: give one of its own with -o")
    return output.with_name(f"{output.name}.state")


def made_by(folder: Path) -> str | None:
    """The command whose result `folder` is; None: of none of ours, or damaged."""
    if {"format", "fingerprint", "settings"} <= _read(folder / CALIBRATION).keys():
        return CALIBRATE
    return _command(_read(folder / DESCRIPTION).get("settings"))


def is_carried(folder: Path) -> bool:
    """Whether `folder` is the calibration that `rowcast adapt` left in a model's directory, which `made_by` does not count."""
    found = _read(folder / CALIBRATION)
    return {"format", "fingerprint"} <= found.keys() and found.get("made_by") == CARRIED_BY


def worked_in_by(folder: Path) -> str | None:
    """The command that works in `folder`; None: none of ours, or it is damaged."""
    if {"format", "fingerprint", "recall"} <= _settings(folder / CALIBRATION_STATE).keys():
        return CALIBRATE
    return _command(_settings(folder))


def check_owner(folder: Path, command: str) -> None:
    """Raise UserError where another command of ours made `folder` or works in it."""
    for found, how in ((made_by(folder), "was made by `rowcast {}`"), (worked_in_by(folder), "is what `rowcast {}` works in")):
        if found not in (None, command):
            raise UserError(f"{folder} {how.format(found)}: give another folder with -o")


def remove_work(folder: Path) -> None:
    """Remove what a command works in. Killed on the way, what is left is still its own, and `REMOVED`. A link or a mount
    stays, empty. Raises OSError."""
    if not folder.is_dir():
        return
    removed = folder / REMOVED
    if (folder / SETTINGS).exists():
        os.replace(folder / SETTINGS, removed)
    for path in sorted(folder.iterdir(), key=lambda path: path == removed):  # which says whose the others are
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not folder.is_symlink() and not os.path.ismount(folder):
        folder.rmdir()


def _settings(folder: Path) -> dict[str, Any]:
    return _read(folder / SETTINGS) or _read(folder / REMOVED)


def _command(settings: Any) -> str | None:
    found = settings.get("command") if isinstance(settings, dict) else None
    return found if found in COMMANDS else None


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

"""What a calibration under way keeps on disk, so that it can be killed and go on: a folder inside the one that it writes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rowcast.calibration.owner import (
    CALIBRATE,
    CALIBRATION_STATE,
    REMOVED,
    SETTINGS,
    check_owner,
    is_carried,
    made_by,
    remove_work,
    state_of,
    worked_in_by,
)
from rowcast.errors import UserError
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.checkpoint.safetensors_header import read_header
from rowcast.runtime.sparse.artefact import DESCRIPTION, TENSORS

DRAFT, REPORT = "draft", "report.html"
OURS = {CALIBRATION_STATE, TENSORS, DESCRIPTION, REPORT, "calibration.part", "report.part"}
OURS_IN_STATE = re.compile(
    rf"(settings|residual-[01]|carried-[01]|layer-\d+|sensitivity)\.(json|bin|safetensors|part)|{DRAFT}|{REMOVED}"
)
BEGUN = {"settings.part"}
"""What may be in a state before it says whose it is."""


class State:
    """Results of the layers that are done, and the residual stream behind the last of them.

    The residual stream lies in two files that take turns, read before a layer and written behind it: one of them is always whole.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], *, restart: bool) -> None:
        """Go on where the same settings were left, or begin. What `rowcast adapt` left in `output` stays until `publish`.

        Raises UserError where `output` holds other things, where it or the folder that other commands would work in is another
        command's, where it cannot be written, or was left or finished with other settings, or by `rowcast adapt`, without `restart`.
        """
        self._folder = output / CALIBRATION_STATE
        try:
            for folder in (output, state_of(output)):
                check_owner(folder, CALIBRATE)
            if foreign := _foreign(output):
                raise UserError(f"{output} holds other files ({foreign}): give a folder of its own with -o")
            adapted = is_carried(output)
            if adapted and not restart and worked_in_by(output) != CALIBRATE:
                raise UserError(
                    f"{output} holds the calibration that `rowcast adapt` left: add --restart to take its place, or give another "
                    "folder with -o"
                )
            if restart and not adapted:
                for name in (REPORT, TENSORS, DESCRIPTION):  # the last says whose the others are
                    (output / name).unlink(missing_ok=True)
            if restart or (self._folder / REMOVED).exists():
                remove_work(self._folder)
            settings = json.loads(json.dumps(settings))
            self.finished = not adapted and all((output / name).exists() for name in (DESCRIPTION, TENSORS))
            """Whether the calibration with these settings is there."""
            if self.finished:
                _check(output, output / DESCRIPTION, "settings", settings)
            self._folder.mkdir(parents=True, exist_ok=True)
            if (self._folder / SETTINGS).exists():
                _check(output, self._folder / SETTINGS, None, settings)
            else:
                _replace(self._folder / SETTINGS, json.dumps(settings).encode())
        except OSError as error:
            raise UserError(f"{output} cannot be written ({error.strerror}): give another folder with -o") from None

    @property
    def layers_done(self) -> int:
        count = 0
        while self._layer(count).exists():
            count += 1
        return count

    def residual(self, layer: int, tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """What enters `layer`, [tokens, hidden], mapped from disk: what is written to it stays."""
        path = self._folder / f"residual-{layer % 2}.bin"
        return torch.from_file(str(path), shared=True, size=tokens * hidden, dtype=dtype).view(tokens, hidden)

    def save(self, layer: int, tensors: Mapping[str, Tensor], figures: Mapping[str, Any], carried: Mapping[str, Tensor]) -> None:
        """`layer` is done. `carried`: what the next one reads of it."""
        _save(self._folder / f"carried-{layer % 2}.safetensors", carried)
        _save(self._layer(layer), {f"layers.{layer}.{name}": tensor for name, tensor in tensors.items()}, figures)

    def carried(self, layer: int) -> dict[str, Tensor]:
        """What `layer` left for the next one."""
        return _load(self._folder / f"carried-{layer % 2}.safetensors")

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """By their full names."""
        return _load(self._layer(layer))

    def figures(self, layer: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._layer(layer).with_suffix(".json").read_bytes())
        return found

    def save_sensitivity(self, tensors: Mapping[str, Tensor], figures: Mapping[str, Any]) -> None:
        """By their full names; none where the model has none, and why in `figures`."""
        _save(self._sensitivity, tensors, figures)

    def sensitivity(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `save_sensitivity` has left."""
        if not self._sensitivity.exists():
            return None
        return _load(self._sensitivity), json.loads(self._sensitivity.with_suffix(".json").read_bytes())

    def draft(self, tensors: Mapping[str, Tensor], description: Mapping[str, Any], beside: str = "") -> Path:
        """A calibration to measure with, in a folder of its own; with a name `beside` the one to publish."""
        folder = self._folder / DRAFT / beside
        folder.mkdir(parents=True, exist_ok=True)
        _save(folder / TENSORS, tensors, metadata={"fingerprint": description["fingerprint"]})
        _replace(folder / DESCRIPTION, json.dumps(description).encode())
        return folder

    def publish(self, output: Path, description: Mapping[str, Any], report: str) -> None:
        """Put the last draft's tensors in place with its finished description, which makes it a calibration and comes last."""
        (output / DESCRIPTION).unlink(missing_ok=True)  # of tensors that are gone
        os.replace(self._folder / DRAFT / TENSORS, output / TENSORS)
        _replace(output / REPORT, report.encode())
        _replace(output / DESCRIPTION, json.dumps(description).encode())
        self.remove()

    def remove(self) -> None:
        with suppress(OSError):
            remove_work(self._folder)

    @property
    def _sensitivity(self) -> Path:
        return self._folder / "sensitivity.safetensors"

    def _layer(self, layer: int) -> Path:
        return self._folder / f"layer-{layer}.safetensors"


def _foreign(output: Path) -> str | None:
    """Something in a folder that is not a calibration's."""
    found = {path.name for path in output.iterdir()} if output.exists() else set[str]()
    state = output / CALIBRATION_STATE
    inside = {path.name for path in state.iterdir()} if CALIBRATION_STATE in found else set[str]()
    foreign, foreign_inside = found - OURS, {name for name in inside if not OURS_IN_STATE.fullmatch(name)}
    if worked_in_by(output) != CALIBRATE:
        foreign_inside = inside - BEGUN
        if made_by(output) != CALIBRATE and not is_carried(output):
            foreign = found - {CALIBRATION_STATE}
    return min({*foreign, *(f"{CALIBRATION_STATE}/{name}" for name in foreign_inside)}, default=None)


def _check(output: Path, path: Path, field: str | None, settings: Mapping[str, Any]) -> None:
    """Raise UserError where the settings in the JSON file `path`, or in a field of it, are others."""
    try:
        found = json.loads(path.read_bytes())
        left = found if field is None else found[field]
        changed = [name for name in {**settings, **left} if left.get(name) != settings.get(name)]
    except (ValueError, KeyError, TypeError, AttributeError):
        changed = [f"{path.name} is damaged"]
    if changed:
        raise UserError(
            f"{output} holds a calibration with other settings ({', '.join(changed)}): add --restart to begin anew, or give the same "
            "settings to go on"
        )


def _save(
    path: Path,
    tensors: Mapping[str, Tensor],
    figures: Mapping[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Whole or not at all; the same tensors make the same bytes."""
    if figures is not None:
        _replace(path.with_suffix(".json"), json.dumps(figures).encode())
    part = path.with_suffix(".part")
    save_file(dict(tensors), part, metadata)
    os.replace(part, path)


def _load(path: Path) -> dict[str, Tensor]:
    source = SafetensorsSource(read_header(path))
    return {name: source.read(name) for name in source.names()}


def _replace(path: Path, data: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(data)
    os.replace(part, path)

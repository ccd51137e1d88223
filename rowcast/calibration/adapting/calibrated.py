"""What an adapted model carries for its sparse rungs: sensitivities and levels, as the calibration in its own folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rowcast.calibration.fitting import DENSITIES
from rowcast.calibration.levels import LEVELLED, find_levels
from rowcast.calibration.owner import CARRIED_BY
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.checkpoint import Checkpoint
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.sparse.artefact import DESCRIPTION, FORMAT, TENSORS, Calibration


@dataclass(slots=True)
class Carried:
    """A calibration of sensitivities that are known and of levels: nothing is fitted, no predictor is in it."""

    folder: Path
    model: Checkpoint
    """As stored."""
    density: float
    sensitivities: Sequence[Tensor]
    grid: list[float] = field(init=False)
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.grid = sorted({*DENSITIES, round(self.density * 2 / 3, 4), self.density})
        self.tensors = {name_of(layer): tensor for layer, tensor in enumerate(self.sensitivities)}
        self.tensors["densities"] = torch.tensor(self.grid)[:, None].expand(-1, len(self.sensitivities)).contiguous()

    def write(self, quality: Mapping[str, Any]) -> Calibration:
        """`quality`: by a rung's text, as of a calibration."""
        self.folder.mkdir(exist_ok=True)
        fingerprint = self.model.source.fingerprint()
        description = {
            "format": FORMAT, "fingerprint": fingerprint, "model": self.model.path.name, "made_by": CARRIED_BY,
            "density": self.density, "densities": self.grid, "layer_densities": self.tensors["densities"].tolist(),
            "judged": [], "scorers": {}, "layers": [], "quality": dict(quality),
        }  # fmt: skip
        save_file(self.tensors, self.folder / TENSORS, {"fingerprint": fingerprint})
        (self.folder / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
        return Calibration.open(self.folder, fingerprint)

    def find(self, windows: Tensor, *, dtype: torch.dtype, device: torch.device) -> Calibration:
        """Levels of the scorers that have any, over windows [W, n] of token ids, and the calibration with them."""
        calibration = self.write({})
        banks = BankWeights(spec_from_config(self.model.config), self.model.source, SoloComm(), dtype=dtype, device=device)
        for by in LEVELLED:
            found = find_levels(banks, calibration, by, windows, dtype=dtype, device=device)
            self.tensors[f"levels.{by}"] = found.scores
            if by == LEVELLED[0]:
                self.tensors["levels.densities"] = found.shares
        return self.write({})


def name_of(layer: int) -> str:
    """Of a layer's sensitivities."""
    return f"layers.{layer}.sensitivity"

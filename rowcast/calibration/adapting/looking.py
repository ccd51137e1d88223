"""How training goes: acceptance against the original and perplexity by density, on held-out text; on standard error and on disk."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.calibration.adapting.divergence import divergence
from rowcast.calibration.adapting.neurons import Neurons
from rowcast.calibration.learning.judge import hidden_states
from rowcast.calibration.learning.state import write_whole

LOOKS = "looks.json"
LOOK_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Held-out tokens of a look, at most, by device."""
WINDOWS_AT_ONCE = 8
LOGIT_ROWS = 1024


@dataclass(slots=True)
class Looks:
    """Judges every so many steps; a step that is run again is judged again, and found the same."""

    folder: Path
    windows: Tensor
    """[W, T] int64, held out."""
    densities: Sequence[float]
    every: int
    """Steps; 0: never."""
    show: bool
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By step: acceptance and perplexity by density, and the density that passes use by the mask and by zeros."""

    def __post_init__(self) -> None:
        path = self.folder / LOOKS
        if path.exists():
            self.found = json.loads(path.read_bytes())

    def due(self, step: int) -> bool:
        return bool(self.every) and step % self.every == 0

    @torch.no_grad()
    def look(self, step: int, teacher: Any, student: Any, neurons: Neurons) -> None:
        """Into the file and onto standard error. Draws nothing, leaves `student` and `neurons` as they are."""
        sums = {density: _Sums() for density in self.densities}
        with _resting(student, neurons):
            for ids in torch.split(self.windows.to(student.device), WINDOWS_AT_ONCE):
                with torch.autocast("cuda", enabled=False):  # in its own format
                    theirs = hidden_states(teacher, ids)[:, :-1].flatten(0, 1)
                for density, found in sums.items():
                    neurons.densities = [density] * len(ids)
                    neurons.used = neurons.passes = 0
                    ours = hidden_states(student, ids)[:, :-1].flatten(0, 1)
                    found.add(ours, theirs, teacher.get_output_embeddings().weight, ids[:, 1:].flatten())
                    found.used += neurons.used / neurons.passes * ours.shape[0]
        one = {
            "acceptance": {f"{density:g}": found.overlap / found.tokens for density, found in sums.items()},
            "perplexity": {f"{density:g}": math.exp(found.nll / found.tokens) for density, found in sums.items()},
            "used": {f"{density:g}": found.used / found.tokens for density, found in sums.items()},
        }
        self.found[str(step)] = one
        write_whole(self.folder / LOOKS, json.dumps(self.found, indent=1).encode())
        if self.show:
            told = [
                f"{float(key):.0%} of the neurons (used {one['used'][key]:.2f}): acceptance {one['acceptance'][key]:.3f}, "
                f"perplexity {one['perplexity'][key]:.2f}"
                for key in one["acceptance"]
            ]
            print(f"step {step}: " + "; ".join(told), file=sys.stderr, flush=True)


@dataclass(slots=True)
class _Sums:
    """Over tokens."""

    tokens: int = 0
    overlap: float = 0.0
    nll: float = 0.0
    used: float = 0.0

    def add(self, ours: Tensor, theirs: Tensor, head: Tensor, targets: Tensor) -> None:
        """What the head reads of the student and the teacher [T, D], and the tokens that came [T]."""
        self.overlap += float(divergence(ours, head, theirs, head)[1].sum())
        for rows, wanted in zip(torch.split(ours, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True):
            logits = F.linear(rows.to(head.dtype), head).float()
            self.nll += float(F.cross_entropy(logits, wanted, reduction="sum"))
        self.tokens += len(targets)


@contextmanager
def _resting(student: Any, neurons: Neurons) -> Iterator[None]:
    training, densities, follows, at_once = student.training, neurons.densities, neurons.follows, neurons.at_once
    student.eval()
    neurons.counts, neurons.follows, neurons.at_once = True, False, False
    try:
        # Other shapes, seldom: not worth compiling for. Weights that are cast here have no gradients: the step is not to have them.
        mixed = torch.autocast("cuda", torch.bfloat16, enabled=student.device.type == "cuda", cache_enabled=False)
        with torch.compiler.set_stance("force_eager"), mixed:
            yield
    finally:
        student.train(training)
        neurons.counts, neurons.follows, neurons.at_once = False, follows, at_once
        neurons.densities = densities

"""Gradient descent that can be killed: AdamW or Muon with warm-up and linear decay in steps; weights, moments and step on disk.

What a step does is a function of its number, the settings and the weights: killed and started again, training gives the same bits on
a CPU. Several processes (`part.World`) share each batch and average gradients.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rowcast.calibration.learning.muon import Muon, hidden_matrices
from rowcast.calibration.learning.part import Part, World
from rowcast.calibration.learning.progress import LearningProgress
from rowcast.calibration.learning.settings import TrainSettings
from rowcast.calibration.learning.state import load_tensors, save_tensors
from rowcast.errors import UserError

STATE = "training.safetensors"
READ_EVERY = 20
"""Steps between looks at the loss: a GPU is asked no more often."""
LOWER = "--steps, --batch or --window"
"""Where it takes long."""

LossOf = Callable[[int, int, int], Tensor]
"""(step, part, parts) -> the mean loss of the windows `part`, `part + parts`, ... of the step's batch, a scalar with a gradient."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training came to."""

    steps: int
    tokens: int
    seconds: float
    """All parts together, without loading and saving."""
    loss: float
    """Mean of the last READ_EVERY steps, or of all where there are fewer; nan for no steps."""
    recent_tokens_per_s: float
    """Between the last two looks at the loss: without what the first steps take for compiling and tuning. 0 where there were none."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "loss": self.loss if math.isfinite(self.loss) else None, "tokens_per_s": self.tokens_per_s}


class Trainer:
    """Trains those parameters of a module that want gradients, which have to be float32."""

    def __init__(
        self,
        module: nn.Module,
        loss_of: LossOf,
        settings: TrainSettings,
        folder: Path,
        *,
        device: torch.device,
        batch_tokens: int,
        world: World | None = None,
        part: Part | None = None,
        save_seconds: float = 60.0,
        name: str = "training",
        show: bool | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Goes on from the state in `folder`, if there is one: the module then has its weights.

        `batch_tokens`: of a step, over all processes, for speed only. `show`: progress on standard error; None: if that is a terminal,
        otherwise a line now and then. `kept`: what else steps change, in place; averaged over processes and saved with the weights.
        Raises UserError for a state of another module.
        """
        settings.check()
        self.module, self.loss_of, self.settings, self.device = module, loss_of, settings, device
        self.world, self.part = world or World(), part or Part()
        self._path, self._save_seconds, self._batch_tokens = folder / STATE, save_seconds, batch_tokens
        self._name, self._show = name, show
        self._kept = dict(kept or {})
        self._named = {key: value for key, value in module.named_parameters() if value.requires_grad}
        assert all(value.dtype == torch.float32 for value in self._named.values()), "weights that are trained have to be float32"
        self._muon = Muon(hidden_matrices(module) if settings.optimizer == "muon" else (), settings.weight_decay)
        rest = [value for value in self._named.values() if value not in self._muon.momentum]
        matrices = [value for value in rest if value.dim() > 1]
        others = [value for value in rest if value.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=1e-8,
            fused=device.type == "cuda",
        )
        self.step = 0
        """Steps that are done."""
        self._seconds, self._losses, self._recent = 0.0, list[float](), 0.0
        self._look = (0, 0.0)
        if self._path.exists():
            self._load()

    def run(self) -> Trained:
        """All steps that are left. Raises Unfinished where the part is over, with everything saved; UserError where the loss is no
        number any more."""
        pending: list[Tensor] = []
        saved = begun = time.monotonic()
        before = self._seconds
        self.module.eval()  # no dropout: it would draw, and a law is to be learnt as it is
        lower = LOWER if self.device.type == "cpu" and self.world.leads else ""
        with LearningProgress(self._name, self.settings.steps * self._batch_tokens, self._shown(), lower=lower) as bar:
            if 0 < self.step < self.settings.steps:
                bar.tell(f"going on at step {self.step + 1} of {self.settings.steps}")
            bar.advance(self.step * self._batch_tokens, new=False)
            while self.step < self.settings.steps:
                pending.append(self._move())
                self.step += 1
                last = self.step == self.settings.steps
                if len(pending) == READ_EVERY or last or self.device.type == "cpu":
                    self._read(pending)
                    bar.say(f"loss {self._losses[-1]:.3f}")
                bar.advance(self._batch_tokens)
                now = time.monotonic()
                self._seconds = before + now - begun
                over = self.world.agree(int(self.part.over and not last) + 2 * int(now - saved > self._save_seconds), self.device)
                if over or last:
                    self._read(pending)
                    self._save()
                    saved = time.monotonic()
                    begun += saved - now
                if over & 1:
                    raise self.part.stop()
        return self.trained

    @property
    def trained(self) -> Trained:
        """So far."""
        loss = sum(self._losses) / len(self._losses) if self._losses else math.nan
        return Trained(self.step, self.step * self._batch_tokens, self._seconds, loss, self._recent)

    def _shown(self) -> bool | None:
        return self._show if self.world.leads else False

    def _move(self) -> Tensor:
        """One step; its loss, still on the device."""
        settings, world = self.settings, self.world
        parts = settings.accumulate * world.size
        total = torch.zeros((), device=self.device)
        mixed = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        for number in range(settings.accumulate):
            with mixed:
                loss = self.loss_of(self.step, number * world.size + world.rank, parts)
            (loss / settings.accumulate).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() / settings.accumulate
        for value in self._named.values():
            if value.grad is None:
                value.grad = torch.zeros_like(value)
        world.average([value.grad for value in self._named.values() if value.grad is not None])
        world.average([total])
        nn.utils.clip_grad_norm_(self._named.values(), settings.clip)
        share = settings.share(self.step)
        for group in self._adamw.param_groups:
            group["lr"] = share * settings.learning_rate
        self._adamw.step()
        self._muon.step(share * settings.muon_rate)
        for value in self._named.values():
            value.grad = None
        world.average(list(self._kept.values()))
        return total

    def _read(self, pending: list[Tensor]) -> None:
        if not pending:
            return
        found = torch.stack(pending).tolist()
        pending.clear()
        step, then = self._look
        self._look = (self.step, time.monotonic())
        if then and self.step > step:
            self._recent = (self.step - step) * self._batch_tokens / max(1e-9, self._look[1] - then)
        if not all(math.isfinite(loss) for loss in found):
            raise UserError(
                f"the loss is not a number any more at step {self.step}: lower {self.settings.rates} and begin anew with --restart"
            )
        self._losses = (self._losses + found)[-READ_EVERY:]

    def _save(self) -> None:
        if self.world.leads:
            tensors: dict[str, Tensor] = {}
            for key, value in self._named.items():
                tensors[f"weight.{key}"] = value
                if value in self._muon.momentum:
                    tensors[f"momentum.{key}"] = self._muon.momentum[value]
                else:
                    moments = self._adamw.state[value]
                    tensors |= {f"first.{key}": moments["exp_avg"], f"second.{key}": moments["exp_avg_sq"]}
            tensors |= {f"kept.{key}": value for key, value in self._kept.items()}
            told = {"step": self.step, "seconds": self._seconds, "losses": self._losses}
            save_tensors(self._path, tensors, {"training": json.dumps(told)})
        self.world.wait()

    def _load(self) -> None:
        tensors, metadata = load_tensors(self._path)
        wanted: dict[str, torch.Size] = {}
        for key, value in self._named.items():
            kept = ("weight", "momentum") if value in self._muon.momentum else ("weight", "first", "second")
            wanted |= {f"{kind}.{key}": value.shape for kind in kept}
        wanted |= {f"kept.{key}": value.shape for key, value in self._kept.items()}
        if {key: tensor.shape for key, tensor in tensors.items()} != wanted:
            raise UserError(f"{self._path} is the state of another training: add --restart to begin anew")
        told = json.loads(metadata["training"])
        self.step, self._seconds, self._losses = told["step"], told["seconds"], told["losses"]
        numbers = {id(value): key for key, value in self._named.items()}
        with torch.no_grad():
            for key, other in self._kept.items():
                other.copy_(tensors[f"kept.{key}"])
            for key, value in self._named.items():
                value.copy_(tensors[f"weight.{key}"])
                if value in self._muon.momentum:
                    self._muon.momentum[value].copy_(tensors[f"momentum.{key}"])
        ordered = [numbers[id(value)] for group in self._adamw.param_groups for value in group["params"]]
        self._adamw.load_state_dict(
            {
                "state": {
                    place: {
                        "step": torch.tensor(float(self.step)),
                        "exp_avg": tensors[f"first.{key}"],
                        "exp_avg_sq": tensors[f"second.{key}"],
                    }
                    for place, key in enumerate(ordered)
                },
                "param_groups": self._adamw.state_dict()["param_groups"],
            }
        )

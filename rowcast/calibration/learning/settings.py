"""Settings that all commands have which train a copy of a model, and what of them makes no sense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from rowcast.errors import UserError
from rowcast.runtime.spec import ModelSpec

Optimizer = Literal["adamw", "muon"]
"""muon: of matrices of hidden layers; AdamW moves the rest."""


def check_least(*options: tuple[str, int | None, int]) -> None:
    """Raise UserError for an option --name, (name, value, least value), that is too low; None: it was not given."""
    for name, value, least in options:
        if value is not None and value < least:
            raise UserError(f"--{name} {value} is too low: give {least} or more")


def check_share(name: str, share: float) -> None:
    """Raise UserError for an option --name that is not between 0 and 1."""
    if not 0 <= share <= 1:
        raise UserError(f"--{name} {share:g} is not a share: give a number from 0 to 1")


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How weights are moved."""

    steps: int
    learning_rate: float = 1e-3
    """Of AdamW."""
    warmup_steps: int = 100
    final_share: float = 0.0
    """Of the rates, at the last step."""
    weight_decay: float = 0.01
    """Of matrices."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """Most length of the gradient."""
    accumulate: int = 1
    """Parts that a batch is cut into on each process, where memory is short."""
    optimizer: Optimizer = "adamw"
    muon_rate: float = 4e-3
    """Of Muon, in place of the learning rate; in the same unit (`muon.SCALE`)."""

    @property
    def rates(self) -> str:
        """The options that say how far a step goes."""
        return "--learning-rate" if self.optimizer == "adamw" else "--muon-rate and --learning-rate"

    def check(self) -> None:
        """Raise UserError for what cannot be."""
        check_least(("steps", self.steps, 0), ("accumulate", self.accumulate, 1), ("warmup", self.warmup_steps, 0))
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"--learning-rate {self.learning_rate:g} moves nothing: give a number above 0")
        if not 0 < self.muon_rate < math.inf:
            raise UserError(f"--muon-rate {self.muon_rate:g} moves nothing: give a number above 0")
        if self.optimizer not in get_args(Optimizer):
            raise UserError(f"--optimizer {self.optimizer!r:.60} is none: use {' or '.join(get_args(Optimizer))}")

    def share(self, step: int) -> float:
        """Of the rates, at a step: up to the whole, then down in a straight line."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = (self.steps - step) / max(1, self.steps - self.warmup_steps)
        return self.final_share + (1 - self.final_share) * left


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningSettings:
    """What distilling, adapting and pruning are told alike, each with defaults of its own. The same settings and texts make the same
    model, bit for bit on a CPU."""

    weight_decay: ClassVar[float] = 0.01
    """Of matrices; no option."""
    window: int
    """Tokens of a training window: those that see each other."""
    batch: int
    """Windows of a step, over all processes."""
    steps: int
    """Of the optimiser; 0: none."""
    learning_rate: float
    """After the warm-up; it falls to 0."""
    optimizer: Optimizer = "adamw"
    muon_rate: float = 5e-4
    """As the learning rate, of the matrices of hidden layers where Muon moves them."""
    warmup: int = 100
    """Steps of the warm-up."""
    accumulate: int = 1
    """Parts of a batch, where memory is short."""
    written_tokens: int
    """That the model writes to learn from; 0: text given alone."""
    prompt_tokens: int = 32
    """Of a text, that it writes on from."""
    text_share: float
    """Of the windows, from texts as they are."""
    judged_tokens: int
    """Held-out tokens, at most, that the result is measured on."""
    seed: int = 0

    def check_learning(self, spec: ModelSpec) -> None:
        """Raise UserError for what cannot be, of a model like this."""
        if self.window > spec.max_context:
            raise UserError(f"--window {self.window} is longer than the model's context of {spec.max_context}: lower it")
        check_least(
            ("batch", self.batch, 1), ("accumulate", self.accumulate, 1), ("written", self.written_tokens, 0),
            ("judged", self.judged_tokens, 1), ("seed", self.seed, 0),
        )  # fmt: skip
        check_share("text-share", self.text_share)
        if self.seed >> 32:
            raise UserError(f"--seed {self.seed} is too high: give a number below 2^32")
        if self.batch % self.accumulate:
            raise UserError(f"--accumulate {self.accumulate} does not divide --batch {self.batch}: give a divisor")
        self.training.check()

    @property
    def training(self) -> TrainSettings:
        """Of the optimiser."""
        return TrainSettings(
            self.steps, self.learning_rate, self.warmup, weight_decay=self.weight_decay, accumulate=self.accumulate,
            optimizer=self.optimizer, muon_rate=self.muon_rate,
        )  # fmt: skip

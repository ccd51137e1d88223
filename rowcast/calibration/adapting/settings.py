"""What a model is adapted with, and what of it makes no sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rowcast.calibration.learning.trainer import TrainSettings
from rowcast.errors import UserError
from rowcast.runtime.lowbit_sizes import HEAD_BITS
from rowcast.runtime.spec import ModelSpec

Choice = Literal["top", "threshold", "relu"]
"""top: as many neurons for every token. threshold: as many on average, above the token's mean and so many standard deviations. relu: as
top, and the activation becomes ReLU."""

ACTIVATION_KEYS = {
    "llama": "hidden_act", "mistral": "hidden_act", "qwen2": "hidden_act", "qwen3": "hidden_act", "opt": "activation_function",
    "falcon": "activation",
}  # fmt: skip
"""Where a family's config names the activation; others have theirs built in."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The same settings and text make the same model."""

    density: float = 0.15
    """Share of the neurons that the model is to hold up at; its sparse rungs use it by default."""
    choice: Choice = "top"
    bits: int | None = None
    """Of weights in every third step, as the rung self:bits= rounds them; None: never rounded."""
    window: int = 512
    """Tokens of a training window."""
    batch: int = 48
    """Windows of a step, over all processes; of 16, four use all neurons."""
    steps: int = 4000
    learning_rate: float = 4e-4
    warmup: int = 100
    accumulate: int = 1
    dense_weight: float = 1.0
    """Of the windows with all neurons in the loss, beside those with a part."""
    written_tokens: int = 16_000_000
    """That the model writes; 0: text given alone."""
    prompt_tokens: int = 32
    text_share: float = 0.05
    """Of the windows, from texts as they are."""
    judged_tokens: int = 8192
    """Held-out tokens, at most, that the result is measured on."""
    looks: int = 20
    """Times that held-out text judges on the way."""
    seed: int = 0

    def check(self, spec: ModelSpec) -> None:
        """Raise UserError for what cannot be, of a model like this."""
        if not 0 < self.density < 1:
            raise UserError(f"--density {self.density:g} is no part of the neurons: give a number above 0 and below 1")
        if self.window > spec.max_context:
            raise UserError(f"--window {self.window} is longer than the model's context of {spec.max_context}: lower it")
        if self.bits is not None and self.bits not in HEAD_BITS:
            raise UserError(f"--bits {self.bits} is no rung's: use {' or '.join(map(str, sorted(HEAD_BITS)))}")
        if self.choice == "relu" and spec.family not in ACTIVATION_KEYS:
            raise UserError(f"--choice relu cannot be had of a {spec.family}, whose activation no config names: use top")
        for name, count, least in (
            ("batch", self.batch, 1), ("accumulate", self.accumulate, 1), ("written", self.written_tokens, 0), ("seed", self.seed, 0),
            ("judged", self.judged_tokens, 1), ("looks", self.looks, 0),
        ):  # fmt: skip
            if count < least:
                raise UserError(f"--{name} {count} is too low: give {least} or more")
        if not 0 <= self.text_share <= 1:
            raise UserError(f"--text-share {self.text_share:g} is not a share: give a number from 0 to 1")
        if not 0 < self.dense_weight < 1e6:
            raise UserError(f"--dense-weight {self.dense_weight:g} weighs nothing: give a number above 0")
        if self.batch % self.accumulate:
            raise UserError(f"--accumulate {self.accumulate} does not divide --batch {self.batch}: give a divisor")
        self.training.check()

    @property
    def training(self) -> TrainSettings:
        """Of the optimiser. Weights are where they should be but for what is learnt: they do not decay."""
        return TrainSettings(self.steps, self.learning_rate, self.warmup, weight_decay=0.0, accumulate=self.accumulate)

    def config(self, spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the model that is trained."""
        return {**config, ACTIVATION_KEYS[spec.family]: "relu"} if self.choice == "relu" else dict(config)

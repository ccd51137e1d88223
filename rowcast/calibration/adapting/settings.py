"""What a model is adapted with, and what of it makes no sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rowcast.calibration.learning.settings import LearningSettings, check_least
from rowcast.errors import UserError
from rowcast.runtime.lowbit_sizes import HEAD_BITS
from rowcast.runtime.spec import ModelSpec

Choice = Literal["top", "threshold", "relu"]
"""threshold: those that matter more than one level for all layers and tokens, as many on average. top: as many for every token and
layer. relu: as top, and the activation becomes ReLU."""

ACTIVATION_KEYS = {
    "llama": "hidden_act", "mistral": "hidden_act", "qwen2": "hidden_act", "qwen3": "hidden_act", "opt": "activation_function",
    "falcon": "activation",
}  # fmt: skip
"""Where a family's config names the activation; others have theirs built in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(LearningSettings):
    """What a model is adapted with."""

    weight_decay: ClassVar[float] = 0.0
    """Weights are where they should be but for what is learnt."""
    density: float = 0.15
    """Share of the neurons that the model is to hold up at; its sparse rungs use it by default."""
    choice: Choice = "threshold"
    bits: int | None = None
    """Of weights in every third step, as the rung self:bits= rounds them; None: never rounded."""
    window: int = 512
    batch: int = 48
    """Of 16 windows four use all neurons."""
    steps: int = 4000
    learning_rate: float = 2e-4
    dense_weight: float = 2.0
    """Of the windows with all neurons in the loss, beside those with a part."""
    stream_weight: float = 0.5
    """Of how far the residual streams are from the original's, beside its laws; 0: they are free."""
    written_tokens: int = 16_000_000
    text_share: float = 0.05
    judged_tokens: int = 8192
    looks: int = 20
    """Times that held-out text judges on the way."""

    def check(self, spec: ModelSpec) -> None:
        """Raise UserError for what cannot be, of a model like this."""
        if not 0 < self.density < 1:
            raise UserError(f"--density {self.density:g} is no part of the neurons: give a number above 0 and below 1")
        if self.bits is not None and self.bits not in HEAD_BITS:
            raise UserError(f"--bits {self.bits} is no rung's: use {' or '.join(map(str, sorted(HEAD_BITS)))}")
        if self.choice == "relu" and spec.family not in ACTIVATION_KEYS:
            raise UserError(f"--choice relu cannot be had of a {spec.family}, whose activation no config names: use top")
        check_least(("looks", self.looks, 0))
        if not 0 < self.dense_weight < 1e6:
            raise UserError(f"--dense-weight {self.dense_weight:g} weighs nothing: give a number above 0")
        if not 0 <= self.stream_weight < 1e6:
            raise UserError(f"--stream-weight {self.stream_weight:g} is no weight: give 0 or more")
        self.check_learning(spec)

    def config(self, spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the model that is trained."""
        return {**config, ACTIVATION_KEYS[spec.family]: "relu"} if self.choice == "relu" else dict(config)

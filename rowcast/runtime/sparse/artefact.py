"""What a calibration leaves behind: a folder with tensors (safetensors) and their description (JSON), tied to one model's weights.

Torch-free.

Written by `rowcast.calibration`, read here. Neurons stand in the checkpoint's order, whatever order a bank holds them in.

Tensors, for layer i, N neurons, H heads, D hidden (all float32 or float16, whole model, no shard):

    layers.{i}.frequency            [N]       share of tokens that have the neuron among their most contributing half; ReLU: active
    layers.{i}.lost                 [G]       mean share of |MLP output|^2 that the oracle loses at each density of `densities`
    layers.{i}.ahead.matrix         [D, D]    least-squares map from the attention's input to the MLP's
    layers.{i}.{name}.a             [r, D]    low-rank scorers, `name` as in `scorers`:
    layers.{i}.{name}.b             [J N, r]  pre-activations are b (a x) + bias; gate rows first where the MLP is gated
    layers.{i}.{name}.bias          [J N]
    layers.{i}.{name}.thresholds    [G]       score that a mean density of `densities` exceeds on fitted tokens, the
                                              least for density 1; any of `scorers`, as it runs
    layers.{i}.heads.{reads}.weight [H, D]    heads' scores are weight x + bias; `reads` is own (the attention's input) or ahead
    layers.{i}.heads.{reads}.bias   [H]
    densities                       [G, L]    for each mean density of the grid, each layer's share of kept neurons
    layers.{i}.sensitivity          [N]       above 0, float32: how much the log likelihood of the next tokens changes, in nats, by each
                                              unit of length that the neuron adds, root mean square
    levels.{name}                   [G]       float32: score that a mean density of `densities` exceeds, of all layers' neurons
                                              together; any of `scorers`, as it runs; the last may be -inf
    levels.densities                [G, L]    float32: for each level, each layer's mean share of neurons above it
    head.directions                 [m, E]    orthonormal rows: mean and main directions of the LM head's input

`heads.ahead` reads the MLP's input of the layer before and is missing in layer 0. It serves rungs with heads_by=ahead, `heads.own`
others and layer 0.
Sensitivities and levels are missing in older calibrations. Where there are sensitivities, a neuron's column counts for its length times
its sensitivity in all scores but those of `gate`. Where there are levels of a scorer, they are the thresholds of cut=threshold in all
layers, in place of `thresholds`, and `levels.densities` are the layers' shares, in place of `densities`.
The file's metadata has the weights' fingerprint, too.

The description, beside format, fingerprint, model, texts, settings and tokens:

    density         default share of kept neurons, on average over layers
    densities       the grid G of curves by density
    layer_densities the tensor `densities`
    layerwise       the oracle's acceptance at `density` with layers that lose equally much at the margin (filled) and with layers that
                    all keep the same share (alike): the better ones are `densities`
    judged          densities J at which scorers were judged on held-out tokens
    scorers         by name and for each of J: recall (mean), recall_p1 (1st percentile of tokens in the worst layer) and over, the
                    candidates over kept neurons with which 99% of the tokens of each layer reach the settings' recall
    held_out        windows of held-out text that densities were chosen by (choosing) and that quality is of (reporting), and whether
                    they are different ones (disjoint)
    lm_head_share   bytes that the certified LM head reads for a held-out token's 64 best logits, over those of all its rows; missing
                    where the number format has no rows
    layers          for each layer: lost, active, hot (share of contributions by share of the most frequent neurons), scorers (as above,
                    its own), trained (lost output after and before training, by what is read), heads (recall by heads kept, 1..H)
    sensitivity     tokens that sensitivities were found on (0: there are none), and missing, why they could not be; not in older
                    calibrations, nor in those of `rowcast adapt`
    quality         by a rung's text, and for "dense": perplexity, acceptance by itself, draft_acceptance as a rung (older versions did
                    not tell it) and share of the bytes, on held-out tokens
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rowcast.errors import UserError
from rowcast.runtime.checkpoint.safetensors_header import (
    TYPE_NAMES,
    StoredTensor,
    read_header,
    read_metadata,
    tensors_fingerprint,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

log = logging.getLogger("rowcast")

FORMAT = 1
"""Raised when a tensor or a field changes its meaning; folders of another format are refused."""

TENSORS, DESCRIPTION = "calibration.safetensors", "calibration.json"
BESIDE = "calibration"
"""Folder in a model's directory that holds the model's own."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """An opened calibration. Tensors are read when they are asked for."""

    path: Path
    fingerprint: str
    """Of the model's weights (`Source.fingerprint`)."""
    description: Mapping[str, Any]
    """The JSON: format, fingerprint, model, texts, settings, densities, scorers, quality and what else the report shows."""
    _tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: str | Path, fingerprint: str | None) -> Calibration:
        """`fingerprint`: of the model's weights; None where they are not known, and any will do.

        Raises UserError where there is none, it is damaged, of another version, or of other weights than `fingerprint`'s.
        """
        folder = Path(path)
        again = "run rowcast calibrate again"
        try:
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{folder} holds no calibration ({DESCRIPTION}: {error.strerror}): give another folder, or run rowcast calibrate with "
                f"-o {folder}, which goes on where it was stopped"
            ) from None
        except ValueError:
            raise UserError(f"{folder / DESCRIPTION} is damaged: {again}") from None
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            found = description.get("format") if isinstance(description, dict) else None
            raise UserError(f"{folder} has calibration format {found!r:.20}, this version reads format {FORMAT}: {again}")
        made_for = description.get("fingerprint")
        if not isinstance(made_for, str) or fingerprint not in (None, made_for):
            raise UserError(
                f"the calibration {folder} was made for weights {made_for!r:.20}, the model's are "
                f"{fingerprint or 'unknown'!r}: {again} for this model"
            )
        if not (folder / TENSORS).is_file():
            raise UserError(f"{folder} lacks {TENSORS}: {again}")
        tensors = read_header(folder / TENSORS)
        if read_metadata(folder / TENSORS).get("fingerprint") != made_for:
            raise UserError(f"{folder / TENSORS} was made for other weights than {DESCRIPTION} beside it: {again} for this model")
        for key, check in _FIELDS.items():
            if not check(description.get(key)):
                raise UserError(f"{folder / DESCRIPTION} is damaged, its {key} is {description.get(key)!r:.60}: {again}")
        found = cls(folder, made_for, description, tensors)
        for name in tensors:
            if name.startswith("levels.") and name != "levels.densities":
                found.levels(name.removeprefix("levels."))
        return found

    @classmethod
    def find(cls, given: str | Path | None, model: str | Path, fingerprint: str | None) -> Calibration | None:
        """The one that was given; else that in the model's own directory, None where there is none.

        Where the model's own cannot be used, as it is damaged or of other weights, a warning says why. Raises UserError as `open`,
        for one that was given.
        """
        if given is not None:
            return cls.open(given, fingerprint)
        if (folder := beside(model)) is None:
            return None
        try:
            return cls.open(folder, fingerprint)
        except UserError as error:
            _leave_out(str(error))
            return None

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises UserError where there is none of that name."""
        return self._stored(name).shape

    def tensor(self, name: str, shape: Sequence[int | None] | None = None) -> Tensor:
        """On the CPU. `shape`: what it has to have, None for any size. Raises UserError where there is none of that name and shape."""
        from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource

        self._stored(name, shape)
        return SafetensorsSource(self._tensors).read(name)

    def array(self, name: str, shape: Sequence[int | None] | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
        """As `tensor`, without torch: values of a float tensor in float32. Raises UserError for another type, too."""
        import numpy as np

        stored = self._stored(name, shape)
        if stored.kind not in ("F16", "F32", "F64"):
            raise UserError(
                f"{name} of the calibration {self.path} is of type {stored.kind}, not float: run rowcast calibrate again"
            )
        values = np.frombuffer(
            stored.file.read(stored.offset, stored.nbytes), np.dtype(TYPE_NAMES[stored.kind]).newbyteorder("<")
        )
        return values.astype(np.float32).reshape(stored.shape)

    def _stored(self, name: str, shape: Sequence[int | None] | None = None) -> StoredTensor:
        found = self._tensors.get(name)
        if found is None:
            raise UserError(f"the calibration {self.path} has no {name}: run rowcast calibrate again")
        if shape is not None and (
            len(found.shape) != len(shape)
            or any(size not in (None, there) for size, there in zip(shape, found.shape, strict=True))
        ):
            wanted = ["any" if size is None else size for size in shape]
            raise UserError(
                f"{name} of the calibration {self.path} has the shape {list(found.shape)} instead of {wanted}: run rowcast calibrate "
                "again"
            )
        return found

    def sensitivity(self, layer: int, neurons: int) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        """Of one layer's neurons, [N] above 0; None where it has none. Raises UserError as `array`, and for other values."""
        if (name := f"layers.{layer}.sensitivity") not in self:
            return None
        found = self.array(name, (neurons,))
        if not ((found > 0) & (found < math.inf)).all():
            raise UserError(f"{name} of the calibration {self.path} is not finite and above 0: run rowcast calibrate again")
        return found

    def levels(self, by: str) -> list[float] | None:
        """Of a scorer, by density of the grid; None where it has none. Raises UserError as `array`, and where they rise."""
        if (name := f"levels.{by}") not in self:
            return None
        found: list[float] = self.array(name, (len(self.densities),)).tolist()
        if (
            not all(map(math.isfinite, found[:-1]))
            or not found[-1] < math.inf
            or any(low < high for low, high in pairwise(found))
        ):
            raise UserError(f"{name} of the calibration {self.path} does not fall, or is not finite: run rowcast calibrate again")
        return found

    def shares(self, layers: int, by: str | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[G, L]: each layer's share of neurons by density of the grid; `by`: those above the levels of that scorer, where it has
        some. Raises UserError as `array`, and for what is no share."""
        name = "densities" if by is None or f"levels.{by}" not in self else "levels.densities"
        found = self.array(name, (len(self.densities), layers))
        if not ((found >= 0) & (found < 1 + 1e-3)).all():
            raise UserError(f"{name} of the calibration {self.path} are not shares from 0 to 1: run rowcast calibrate again")
        return found

    @property
    def identity(self) -> str:
        """16 hex digits that tell calibrations apart, as `Source.fingerprint` does."""
        return tensors_fingerprint(self._tensors)

    @property
    def densities(self) -> list[float]:
        """The grid that curves by density have, ascending, the last 1."""
        return list(self.description["densities"])


def beside(model: str | Path) -> Path | None:
    """The folder in a model's directory, which has a config.json, that holds the model's own calibration; None where there is none."""
    folder = Path(model) / BESIDE
    # `isfile` is False, too, where it may not look.
    return folder if isfile(folder.parent / "config.json") and isfile(folder / DESCRIPTION) else None


@cache
def _leave_out(reason: str) -> None:
    """Once for each reason: planning opens calibrations several times."""
    log.warning("the model's own calibration is left out: %s", reason)


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _share(value: object) -> bool:
    return _number(value) and 0 < value <= 1  # type: ignore[operator]


def _grid(value: object) -> bool:
    if not isinstance(value, list) or not value or not all(map(_share, value)):
        return False
    return value[-1] == 1 and all(low < high for low, high in pairwise(value))


def _measured(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, dict) and all(_number(entry.get(key)) for key in ("perplexity", "acceptance"))
        for entry in value.values()
    )


_FIELDS: dict[str, Callable[[object], bool]] = {
    "density": _share,
    "densities": _grid,
    "quality": _measured,
    "scorers": lambda value: isinstance(value, dict),
    "lm_head_share": lambda value: value is None or (_number(value) and value > 0),  # type: ignore[operator]
}
"""What the description has to hold for those who run a model."""

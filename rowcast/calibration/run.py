"""`calibrate`: one pass over text, layer by layer, then what the layers need to know of each other, then the files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from rowcast.calibration.densities import water_fill
from rowcast.calibration.fitting import DENSITIES, JUDGED, Wish, default_rank, fit_layer
from rowcast.calibration.learning.module import load_module
from rowcast.calibration.levels import LEVELLED, find_levels, pieces
from rowcast.calibration.mlp import Mlp
from rowcast.calibration.moments import Moments
from rowcast.calibration.progress import CalibrationProgress
from rowcast.calibration.recording import RecordingWeights
from rowcast.calibration.report import report
from rowcast.calibration.sensitivity import needed_bytes, sensitivities
from rowcast.calibration.state import State
from rowcast.calibration.stream import BATCH_TOKENS, FIT_BYTES, Stream
from rowcast.calibration.targets import Judge, choose_density, shown_rungs
from rowcast.calibration.text import Windows, read_windows, spread
from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement.units import format_bytes
from rowcast.runtime import device as devices
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.ladder.spec import ScorerName
from rowcast.runtime.progress import LoadProgress
from rowcast.runtime.sparse.artefact import FORMAT, Calibration
from rowcast.runtime.sparse.checks import DIRECTIONS, check_scorer, needs_calibration
from rowcast.runtime.sparse.lm_head import TOP, CertifiedHead, directions
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token, parameter_count
from rowcast.runtime.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

HEAD_DIRECTIONS = 64
HEAD_TOKENS = 64
"""Held-out tokens that the LM head's bytes are measured on."""
MOST_SEED = 2**32 - 1
LOST_AT_MOST = 0.01
"""Of the MLPs' outputs at the default density of ReLU models."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a calibration is made with. The same settings and text make the same files."""

    tokens: int = 200_000
    """Most tokens of the text that are run."""
    window: int = 1024
    """Tokens that see each other."""
    recall: float = 0.99
    """That over-selection reaches for all but 1% of the tokens."""
    accept: float | None = None
    """The default density is the smallest with this acceptance as a draft, ..."""
    bytes_share: float | None = None
    """... or the one at which a token reads this share of the dense model's bytes."""
    by: ScorerName | None = None
    """The scorer that these two are reached with; None: q4."""
    rank: int | None = None
    """Of low-rank scorers; None: half of the hidden size, a quarter within 128..256 for ReLU models."""
    train_steps: int = 32
    """Gradient steps of each predictor; 0: the closed-form fit stands."""
    sensitivity_tokens: int = 8192
    """Tokens of the text that neurons' sensitivities are found on; 0: none, scores are contributions' lengths."""
    measured_tokens: int = 2048
    """Held-out tokens that perplexity and acceptance are measured on, and as many others that densities are chosen by."""
    seed: int = 0

    def check(self, spec: ModelSpec) -> None:
        """Raise UserError for what cannot be, of a model like this."""
        if self.window > spec.max_context:
            raise UserError(f"--window {self.window} is longer than the model's context of {spec.max_context}: lower it")
        if self.accept is not None and self.bytes_share is not None:
            raise UserError(f"--accept {self.accept} and --bytes {self.bytes_share} both choose the density: give one of them")
        if self.by is not None:
            if self.by not in get_args(ScorerName):
                raise UserError(f"--by {self.by!r:.60} is not a scorer: choose one of {', '.join(get_args(ScorerName))}")
            if self.accept is None and self.bytes_share is None:
                raise UserError(f"--by {self.by} is what --accept and --bytes are about: give one of them, or leave --by out")
            if not needs_calibration(self.by):
                check_scorer(self.by, spec, None)
        for name, value in (("recall", self.recall), ("accept", self.accept), ("bytes", self.bytes_share)):
            if value is not None and not 0 < value <= 1:
                raise UserError(f"--{name} {value} is not a share: give a number above 0 and up to 1")
        for name, count, least in (
            ("rank", self.rank, 1),
            ("train-steps", self.train_steps, 0),
            ("sensitivity-tokens", self.sensitivity_tokens, 0),
            ("measure", self.measured_tokens, 1),
            ("seed", self.seed, 0),
        ):
            if count is not None and count < least:
                raise UserError(f"--{name} {count} is too low: give {least} or more")
        if self.seed > MOST_SEED:
            raise UserError(f"--seed {self.seed} is too high: give {MOST_SEED} or less")


def calibrate(
    model: str | Path | Checkpoint,
    texts: Sequence[str | Path],
    output: str | Path,
    settings: Settings | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    restart: bool = False,
    progress: bool | None = None,
) -> Calibration:
    """Calibrate a model on text files and write the folder `output`: tensors, description and report.html.

    Killed and called again in the same way it goes on at the layer where it was, and finished it does nothing; `restart` begins anew.
    Until all is done `output` opens as no calibration. `progress`: show a bar on standard error; None: if that is a terminal, else a
    line every half a minute. Raises UserError for bad input, OutOfMemoryError where memory is short.
    """
    settings = settings or Settings()
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(str(model))
    spec = spec_from_config(checkpoint.config)
    settings.check(spec)
    windows = read_windows(
        [Path(text) for text in texts], load_tokenizer(checkpoint), tokens=settings.tokens, window=settings.window
    )
    chosen_device, _ = devices.choose_device(device)
    dtype_name, _ = devices.choose_dtype(dtype, checkpoint.stored_dtype, chosen_device)
    _check_memory(spec, devices.DTYPES[dtype_name], chosen_device, windows.fit.shape[1])
    fingerprint = checkpoint.source.fingerprint()
    begun_with = {
        "format": FORMAT, "fingerprint": fingerprint, "texts": windows.texts, "dtype": dtype_name, "device": chosen_device.type,
        **windows.settings, **asdict(settings),
    }  # fmt: skip
    state = State(Path(output), begun_with, restart=restart)
    if state.finished:
        state.remove()
        return Calibration.open(output, fingerprint)
    job = _Job(checkpoint, spec, windows, settings, state, chosen_device, devices.DTYPES[dtype_name])
    return job.run(Path(output), fingerprint, begun_with, progress)


@dataclass(slots=True)
class _Job:
    checkpoint: Checkpoint
    spec: ModelSpec
    windows: Windows
    settings: Settings
    state: State
    device: torch.device
    dtype: torch.dtype
    weights: RecordingWeights = field(init=False)

    def run(self, output: Path, fingerprint: str, begun_with: dict[str, Any], show: bool | None) -> Calibration:
        sensitivity, found = self._sensitivity(show)
        total = parameter_count(self.spec) * self.dtype.itemsize
        with LoadProgress(self.checkpoint.path.name, total, show) as bar:
            self.weights = RecordingWeights(
                self.spec, self.checkpoint.source, SoloComm(), dtype=self.dtype, device=self.device, progress=bar.advance
            )
        stream = Stream(self.weights, self.windows, self.device, self.dtype, self.settings.seed)
        with CalibrationProgress(stream.tokens * self.spec.num_layers, show) as bar:
            self._layers(stream, bar, sensitivity)
            bar.say("LM head")
            tensors = {DIRECTIONS: self._head_directions(stream), **sensitivity}
            figures = [self.state.figures(layer) for layer in range(self.spec.num_layers)]
            lost = [layer["lost"] for layer in figures]
            layer_densities = [water_fill(DENSITIES, lost, mean) for mean in DENSITIES]
            tensors["densities"] = torch.tensor(layer_densities)
            for layer in range(self.spec.num_layers):
                tensors |= self.state.tensors(layer)
            description: dict[str, Any] = {
                "format": FORMAT,
                "fingerprint": fingerprint,
                "model": {"name": self.checkpoint.path.name, "family": self.spec.family, "layers": self.spec.num_layers},
                "texts": self.windows.texts,
                "settings": begun_with,
                "tokens": stream.tokens,
                "densities": list(DENSITIES),
                "layer_densities": layer_densities,
                "judged": list(JUDGED),
                "density": _default_density(self.spec, lost),
                "scorers": _scorers(figures),
                "layers": figures,
                "quality": {},
                "sensitivity": found,
                **self._head_share(stream, tensors[DIRECTIONS]),
            }
            bar.say("quality")
            choosing, reporting = self._held_out()
            alone = len(self.windows.held) == 1
            description["held_out"] = {"choosing": len(choosing), "reporting": len(reporting), "disjoint": not alone}
            learnt = self._draft(tensors, description)
            if sensitivity:
                tensors |= self._levels(learnt, bar)
                learnt = self._draft(tensors, description)
                bar.say("quality")
            same = [[mean] * self.spec.num_layers for mean in DENSITIES]
            other = self._draft({"densities": torch.tensor(same), **sensitivity}, description, "alike")
            filled, alike = self._judge(learnt, choosing).layerwise(description["density"], other)
            description["layerwise"] = {"filled": filled, "alike": alike}
            if filled <= alike:
                description["layer_densities"] = same
                tensors["densities"] = torch.tensor(same)
                learnt = self._draft(tensors, description)
            accept, share = self.settings.accept, self.settings.bytes_share
            if accept is not None or share is not None:
                by = self.settings.by or "q4"
                description["density"] = choose_density(self._judge(learnt, choosing), by, accept=accept, bytes_share=share)
            judge = self._judge(replace(learnt, description=description), reporting)
            description["quality"] = judge.quality(shown_rungs(judge), bar.say)
        self.state.publish(output, description, report(description))
        return Calibration.open(output, fingerprint)

    def _sensitivity(self, show: bool | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, none where the model's cannot be had here, and what the description says of it.

        The whole model is in memory as a module of Transformers', before the engine's weights are.
        """
        before = self.state.sensitivity()
        if before is not None:
            return before
        tensors: dict[str, Tensor] = {}
        found: dict[str, Any] = {"tokens": 0}
        if self.settings.sensitivity_tokens:
            windows = self.windows.fit
            windows = spread(windows, min(len(windows), -(-self.settings.sensitivity_tokens // windows.shape[1])))
            try:
                tensors = self._sensitivities(windows, show)
                found = {"tokens": windows.numel()}
            except (UserError, OutOfMemoryError, torch.OutOfMemoryError) as error:
                found["missing"] = str(error).partition("\n")[0]
                log.warning("no sensitivities, neurons are chosen by the length of what they add: %s", found["missing"])
        self.state.save_sensitivity(tensors, found)
        return tensors, found

    def _sensitivities(self, windows: Tensor, show: bool | None) -> dict[str, Tensor]:
        needed = needed_bytes(self.spec, self.dtype, windows.shape[1])
        free = devices.available_bytes(self.device)
        if needed > free:
            raise OutOfMemoryError(
                f"finding them takes about {format_bytes(needed)} on {self.device}, {format_bytes(free)} are free"
            )
        module = load_module(self.checkpoint, self.dtype, self.device)
        with CalibrationProgress(windows.numel(), show) as bar:
            bar.say("sensitivities")
            by_layer = sensitivities(
                module, self.spec, windows, device=self.device, seed=self.settings.seed, begins=len(self.windows.begins),
                advance=bar.advance,
            )  # fmt: skip
        return {f"layers.{layer}.sensitivity": tensor for layer, tensor in enumerate(by_layer)}

    def _levels(self, learnt: Calibration, bar: CalibrationProgress) -> dict[str, Tensor]:
        tensors, windows = {}, pieces(self.windows.fit, self.windows.begins)
        for by in LEVELLED:
            bar.say(f"levels of {by}")
            found = find_levels(self.weights, learnt, by, windows, dtype=self.dtype, device=self.device)
            tensors[f"levels.{by}"] = found.scores
            if by == "oracle":
                tensors["levels.densities"] = found.shares
        return tensors

    def _layers(self, stream: Stream, bar: CalibrationProgress, sensitivity: Mapping[str, Tensor]) -> None:
        spec, state = self.spec, self.state
        bar.advance(stream.tokens * state.layers_done)
        for layer in range(state.layers_done, spec.num_layers):
            bar.say(f"layer {layer + 1} of {spec.num_layers}")
            collected = stream.run(layer, self._residual(stream, layer), self._residual(stream, layer + 1), bar.advance)
            before = {name: tensor.to(self.device) for name, tensor in state.carried(layer - 1).items()} if layer else None
            mlp = Mlp.of(self.weights.ffn[layer], sensitivity.get(f"layers.{layer}.sensitivity"))
            result = fit_layer(mlp, collected.moments, collected.rows, before, self._wish(mlp, layer))
            carried = {"fit": collected.rows.fit.mlp, "held": collected.rows.held.mlp}
            state.save(layer, result.tensors, result.figures, {name: tensor.cpu() for name, tensor in carried.items()})

    def _wish(self, mlp: Mlp, layer: int) -> Wish:
        rank = self.settings.rank or default_rank(self.spec.hidden_size, mlp.signed)
        seed = self.settings.seed + layer
        return Wish(rank=rank, recall=self.settings.recall, train_steps=self.settings.train_steps, seed=seed)

    def _residual(self, stream: Stream, layer: int) -> Tensor:
        return self.state.residual(layer, stream.tokens, self.spec.hidden_size, self.dtype)

    def _head_input(self, rows: Tensor) -> Tensor:
        """What the LM head reads where the last layer leaves `rows`: [T, D] -> [T, E]."""
        x = rows.to(self.device)
        return self.weights.outer.head_input(self.weights.norm_of(0, "final")(x) if self.spec.final_norm else x)

    @torch.inference_mode()
    def _head_share(self, stream: Stream, along: Tensor) -> dict[str, float]:
        """`lm_head_share`, where the LM head is held in rows."""
        rows = self.weights.outer.head_rows
        if rows is None:
            return {}
        held = self._residual(stream, self.spec.num_layers)[spread(stream.held_tokens, HEAD_TOKENS)]
        found = CertifiedHead(rows, directions=along).top(self._head_input(held), min(TOP, len(rows)))
        return {"lm_head_share": float(found.bytes.double().mean()) / rows.nbytes}

    @torch.inference_mode()
    def _head_directions(self, stream: Stream) -> Tensor:
        size = self.spec.embed_size
        moments = Moments.zero(size, 0, self.device)
        residual = self._residual(stream, self.spec.num_layers)
        for places in torch.split(stream.fit_tokens, BATCH_TOKENS):
            x = self._head_input(residual[places])
            moments.add(x, x[:, :0])
        return directions((moments.xx / moments.count).float(), moments.x_mean.float(), min(HEAD_DIRECTIONS, size)).cpu()

    def _held_out(self) -> tuple[Tensor, Tensor]:
        """Windows to choose by and others to report on, both spread over all texts; the same one where there is but one."""
        held, count = self.windows.held, max(1, self.settings.measured_tokens // self.settings.window)
        some = spread(held, min(len(held), 2 * count))
        return (some, some) if len(some) == 1 else (some[::2], some[1::2])

    def _draft(self, tensors: Mapping[str, Tensor], description: Mapping[str, Any], beside: str = "") -> Calibration:
        return Calibration.open(self.state.draft(tensors, description, beside), description["fingerprint"])

    def _judge(self, calibration: Calibration, windows: Tensor) -> Judge:
        return Judge(self.weights, calibration, windows, self.dtype, self.device)


def _default_density(spec: ModelSpec, lost: list[list[float]]) -> float:
    """What the model was adapted to; else half, or for ReLU models the first of the grid at which the MLPs lose little on average."""
    if spec.adapted is not None:
        return spec.adapted.density
    if spec.gated or spec.activation != "relu":
        return 0.5
    means = [sum(values) / len(lost) for values in zip(*lost, strict=True)]
    return next(density for density, mean in zip(DENSITIES, means, strict=True) if mean <= LOST_AT_MOST)


def _scorers(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over layers of each scorer's figures, by judged density; over-selection is what the worst layer needs."""
    scorers = {}
    for name in figures[0]["scorers"]:
        of_layers = [layer["scorers"][name] for layer in figures]
        scorers[name] = {
            "recall": [sum(values) / len(values) for values in zip(*(f["recall"] for f in of_layers), strict=True)],
            "recall_p1": [min(values) for values in zip(*(f["recall_p1"] for f in of_layers), strict=True)],
            "over": [max(values) for values in zip(*(f["over"] for f in of_layers), strict=True)],
        }
    return scorers


def _check_memory(spec: ModelSpec, dtype: torch.dtype, device: torch.device, window: int) -> None:
    """Raise OutOfMemoryError where weights, a layer's moments and fits, and the rows that they read do not fit, or K/V of two windows
    beside weights."""
    layer = 4 * spec.hidden_size * spec.intermediate_size * (3 if spec.gated else 2)
    moments = 8 * 16 * spec.hidden_size**2
    entries = 2 * window * kv_bytes_per_token(spec, dtype.itemsize)
    needed = parameter_count(spec) * dtype.itemsize + max(4 * layer + moments + 6 * FIT_BYTES, entries)
    free = devices.available_bytes(device)
    if needed > free:
        raise OutOfMemoryError(
            f"calibrating takes about {format_bytes(needed)} on {device}, {format_bytes(free)} are free: free memory, use a 16-bit "
            "--dtype or a smaller model"
        )

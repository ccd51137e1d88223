"""`adapt`: a model that holds up at a part of its neurons, taught by itself as it was.

All weights but embeddings and LM head are trained, on text that the model writes and text that is given, to have the original's laws
with all neurons and with several shares of them in every batch (`mix`). A token's neurons are those whose contributions, weighed by the
original's sensitivities, are above one level in all layers: what the engine's cut=threshold uses. The loss is the mean over densities
of the root of the mean KL divergence: acceptance falls with the root (Pinsker's inequality), so that no end outweighs the other. Beside
it stands how far the residual stream behind each layer is from the original's (`streams`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowcast.calibration.adapting.calibrated import Carried, name_of
from rowcast.calibration.adapting.compiling import compile_layers
from rowcast.calibration.adapting.divergence import mean_divergences
from rowcast.calibration.adapting.looking import LOOK_TOKENS, Looks
from rowcast.calibration.adapting.mix import DENSE, Mix
from rowcast.calibration.adapting.neurons import FOLLOWS, Neurons, runs
from rowcast.calibration.adapting.rounding import Rounding
from rowcast.calibration.adapting.settings import Settings
from rowcast.calibration.adapting.streams import Streams
from rowcast.calibration.adapting.table import Row, measure, passes, quality, to_json
from rowcast.calibration.learning.job import How, Job, Lesson, Opened, learn
from rowcast.calibration.learning.judge import hidden_states
from rowcast.calibration.learning.losses import mixed_term
from rowcast.calibration.learning.module import load_module, stored_dtype, write_module
from rowcast.calibration.learning.state import load_tensors, save_tensors
from rowcast.calibration.learning.trainer import STATE, Trained
from rowcast.calibration.levels import pieces
from rowcast.calibration.sensitivity import sensitivities
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.config import ADAPTED
from rowcast.runtime.sparse.artefact import BESIDE

ROUNDED_EVERY = 3
"""Steps of which one, with `bits`, has all weights rounded, and all neurons."""
SMALL = 1e-3
"""Nats, added to a mean divergence before its root: where it is less, its gradient no longer grows."""
SMALL_ERROR = 1e-4
"""The same of a relative square error of the residual stream."""
STORED = "stored"
SENSITIVITIES = "sensitivities.safetensors"
SENSITIVITY_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""That they are found on, at most, by device."""
LEVEL_WINDOWS = 24
"""That levels are found on."""


def adapt(
    model: str | Checkpoint,
    texts: Sequence[Path],
    output: Path,
    settings: Settings,
    how: How | None = None,
    *,
    held_out: Sequence[Path] = (),
    compiled: bool = False,
) -> dict[str, Any]:
    """Adapt a model and write it to the folder `output`: an ordinary checkpoint of its family that names its density in config.json,
    with rowcast.json, how it was made and its figures, which are returned.

    Killed and called again in the same way it goes on where it was. `held_out`: texts that only judge. `compiled`: with
    torch.compile, which is faster after a minute and changes the last bits; it compiles once where 16 divides a part's windows. Raises
    UserError for bad input, Unfinished where `how.part_minutes` are over or a signal came, with everything saved.
    """
    opened = Opened.of(model, settings.check)
    return learn(
        "adapt", opened, settings, texts, output, how, lambda job: _Adapting(job, settings, compiled).run(), held_out=held_out,
        begun_with={"compiled": compiled},
    )  # fmt: skip


def balanced(divergences: Tensor, densities: Sequence[float], dense_weight: float, small: float = SMALL) -> Tensor:
    """The loss of sequences with the mean divergences [..., B], by their densities, equal ones side by side: [...].

    Of a part of a batch it is the part's own: the mean over parts is at most the whole batch's loss, and not the same.
    """
    total, weights, start = divergences.new_zeros(divergences.shape[:-1]), 0.0, 0
    for density, count in runs(densities):
        weight = count * (dense_weight if density == DENSE else 1.0)
        total = total + weight * ((divergences[..., start : start + count].mean(-1) + small).sqrt() - small**0.5)
        weights, start = weights + weight, start + count
    return total / weights


@dataclass(frozen=True, slots=True)
class _Adapting:
    job: Job
    settings: Settings
    compiled: bool

    def run(self) -> dict[str, Any]:
        job, mix = self.job, Mix.around(self.settings.density)
        student, trained, looks = self._train(mix)
        description: dict[str, Any] = {
            "model": job.opened.checkpoint.path.name,
            "density": self.settings.density,
            "choice": self.settings.choice,
            "densities": list(mix.densities),
            **job.describe(trained),
            "looks": looks.found,
        }

        def finish() -> None:
            stored = self._store(student)
            rows = self._measure(open_checkpoint(str(stored)), mix)
            description["table"] = to_json(rows)
            job.folder.publish(lambda folder: self._finish(stored, folder, rows), description)

        job.lead(finish)
        return description

    def _train(self, mix: Mix) -> tuple[Any, Trained, Looks]:
        job, settings, device = self.job, self.settings, self.job.device
        checkpoint, spec = job.opened.checkpoint, job.opened.spec
        teacher = load_module(checkpoint, job.dtype, device).requires_grad_(False)
        changed = replace(checkpoint, config=settings.config(spec, checkpoint.config))
        student = load_module(changed, torch.float32, device)
        for outer in (student.get_input_embeddings(), student.get_output_embeddings()):
            outer.requires_grad_(False)
        weighed = self._sensitivities(teacher) if self.levelled else None
        neurons = Neurons(student, spec, "threshold" if self.levelled else "top", sensitivities=weighed, densities=mix.densities)
        neurons.permute()
        neurons.hook()
        if self.levelled and not (job.folder.path / STATE).exists():
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
                neurons.find_levels(
                    job.corpus.batch(0, LEVEL_WINDOWS).to(device), settings.batch // (settings.accumulate * job.world.size)
                )
        rounding = None if settings.bits is None else Rounding(student, spec, settings.bits, stored_dtype(checkpoint))
        streams = Streams(teacher, student, spec)
        if settings.stream_weight:
            streams.watch()
        if self.compiled:
            compile_layers(teacher, spec)
            compile_layers(student, spec)
        head, kl = teacher.get_output_embeddings().weight, mixed_term(0.0)
        rounded_head = None if rounding is None else rounding.head.to(head.dtype)
        every = max(1, ceil(settings.steps / settings.looks)) if settings.looks and job.world.leads else 0
        held = job.corpus.held(settings.window, max(1, LOOK_TOKENS[device.type] // settings.window))
        looks = Looks(job.folder.path, held, mix.shown(settings.density), every, show=job.show is not False)

        def rounds(step: int) -> bool:
            return rounding is not None and step % ROUNDED_EVERY == ROUNDED_EVERY - 1

        def densities_of(step: int, part: int, parts: int) -> tuple[float, ...]:
            count = settings.batch // parts
            return (DENSE,) * count if rounds(step) else tuple(mix.of(step * settings.batch, settings.batch)[part::parts])

        def form(step: int, part: int, parts: int) -> tuple[Any, ...]:
            return rounds(step), densities_of(step, part, parts)

        def before(step: int) -> None:
            if looks.due(step):
                looks.look(step, teacher, student, neurons)

        def loss_of(lesson: Lesson) -> Tensor:
            whole = rounds(lesson.step)
            neurons.densities = densities_of(lesson.step, lesson.part, lesson.parts)
            with rounding.on() if rounding is not None and whole else nullcontext():
                ours = hidden_states(student, lesson.ids).flatten(0, 1)
            if self.levelled:
                neurons.follow(FOLLOWS / settings.accumulate)
            used = rounded_head if rounded_head is not None and whole else head
            sizes = [count for _, count in runs(neurons.densities)]
            tokens = [count * lesson.ids.shape[1] for count in sizes]
            means = mean_divergences(ours, used, lesson.known.flatten(0, 1), head, tokens, kl)
            by_window = torch.cat([mean.expand(count) for mean, count in zip(means, sizes, strict=True)])
            loss = balanced(by_window, neurons.densities, settings.dense_weight)
            if settings.stream_weight:
                errors = balanced(streams.errors(), neurons.densities, settings.dense_weight, SMALL_ERROR)
                loss = loss + settings.stream_weight * errors.mean()
            return loss

        neurons.follows = self.levelled
        kept = {"levels": neurons.levels} if self.levelled else None
        trained = job.train(student, teacher, loss_of, "adapting", form=form, before=before, kept=kept)
        neurons.follows = False
        streams.unwatch()
        job.pause()
        if every:
            looks.look(settings.steps, teacher, student, neurons)
        if rounding is not None:
            rounding.remove()
        neurons.unhook()
        neurons.permute(back=True)
        return student, trained, looks

    @property
    def levelled(self) -> bool:
        """Whether neurons are chosen by levels."""
        return self.settings.choice == "threshold"

    def _sensitivities(self, teacher: Any | None = None) -> list[Tensor]:
        """Of the original, found once. `teacher`: the original, where they may not be on disk yet."""
        layers = self.job.opened.spec.num_layers
        if teacher is not None:
            self.job.lead(lambda: self._find_sensitivities(teacher))
        tensors, _ = load_tensors(self.job.folder.path / SENSITIVITIES)
        return [tensors[name_of(layer)] for layer in range(layers)]

    def _find_sensitivities(self, teacher: Any) -> None:
        job, path = self.job, self.job.folder.path / SENSITIVITIES
        if path.exists():
            return
        windows = job.corpus.batch(0, max(1, SENSITIVITY_TOKENS[job.device.type] // self.settings.window))
        with job.bar("sensitivities", windows.numel()) as advance:
            found = sensitivities(teacher, job.opened.spec, windows, device=job.device, seed=self.settings.seed, advance=advance)
        save_tensors(path, {name_of(layer): tensor for layer, tensor in enumerate(found)}, {})

    def _store(self, student: Any) -> Path:
        """The model as it will stand, but for what is still to be measured."""
        checkpoint, density = self.job.opened.checkpoint, self.settings.density
        stored = self.job.folder.path / STORED
        shutil.rmtree(stored, ignore_errors=True)
        stored.mkdir()
        metadata = {"adapted_to": f"{density:g}", "adapted_from": checkpoint.path.name}
        setattr(student.config, ADAPTED, {"density": density})
        write_module(student, checkpoint, stored, metadata, stored_dtype(checkpoint))
        return stored

    def _measure(self, adapted: Checkpoint, mix: Mix) -> list[Row]:
        job, settings = self.job, self.settings
        carried: Carried | None = None
        if self.levelled:
            carried = Carried(adapted.path / BESIDE, adapted, settings.density, self._sensitivities())
            calibration = carried.find(pieces(job.corpus.batch(0, LEVEL_WINDOWS)), dtype=job.dtype, device=job.device)
        windows = job.corpus.held(settings.window, max(1, settings.judged_tokens // settings.window)).tolist()
        densities = sorted(mix.densities, reverse=True)
        with job.bar("measuring", passes(densities, len(windows), settings.bits) * settings.window) as advance:
            rows = measure(
                job.opened.checkpoint, adapted, densities, windows, dtype=job.dtype, device=job.device, bits=settings.bits,
                calibration=None if carried is None else calibration, advance=lambda: advance(settings.window),
            )  # fmt: skip
        if carried is not None:
            carried.write(quality(rows))
        return rows

    def _finish(self, stored: Path, folder: Path, rows: Sequence[Row]) -> None:
        """Move what is stored to `folder`, with what q4's choice was found to be worth."""
        for path in stored.iterdir():
            shutil.move(path, folder / path.name)
        config = json.loads((folder / "config.json").read_bytes())
        found = {f"{row.density:g}": round(row.draft, 4) for row in rows if row.model == "adapted" and row.by == "q4"}
        config[ADAPTED] |= {"acceptance": found, "cut": "threshold" if self.levelled else "top"}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

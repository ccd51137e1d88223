"""`adapt`: a model that holds up at a part of its neurons, taught by itself as it was.

All weights but embeddings and LM head are trained, on text that the model writes and text that is given, to have the original's laws
with all neurons and with several shares of them in every batch (`mix`). The loss is the mean over densities of the root of the mean
KL divergence: acceptance falls with the root (Pinsker's inequality), so that no end outweighs the other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowcast.calibration.adapting.compiling import compile_layers
from rowcast.calibration.adapting.divergence import divergence
from rowcast.calibration.adapting.looking import LOOK_TOKENS, Looks
from rowcast.calibration.adapting.mix import DENSE, Mix
from rowcast.calibration.adapting.neurons import Neurons, runs
from rowcast.calibration.adapting.rounding import Rounding
from rowcast.calibration.adapting.settings import Settings
from rowcast.calibration.adapting.table import Row, measure, passes, to_json
from rowcast.calibration.learning.corpus import Corpus
from rowcast.calibration.learning.judge import hidden_states
from rowcast.calibration.learning.module import load_module, write_module
from rowcast.calibration.learning.part import Part, World
from rowcast.calibration.learning.progress import LearningProgress
from rowcast.calibration.learning.state import WorkFolder
from rowcast.calibration.learning.trainer import Trained, Trainer
from rowcast.calibration.learning.writing import Writing, write
from rowcast.calibration.text import read_text
from rowcast.runtime import device as devices
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.config import ADAPTED, spec_from_config
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
ROUNDED_EVERY = 3
"""Steps of which one, with `bits`, has all weights rounded, and all neurons."""
SMALL = 1e-3
"""Nats, added to a mean divergence before its root: where it is less, its gradient no longer grows."""
STORED = "stored"


def adapt(
    model: str | Checkpoint,
    texts: Sequence[Path],
    output: Path,
    settings: Settings,
    *,
    held_out: Sequence[Path] = (),
    dtype: str = "auto",
    device: str = "auto",
    compiled: bool = False,
    part_minutes: float | None = None,
    save_seconds: float = 60.0,
    restart: bool = False,
    show: bool | None = None,
) -> dict[str, Any]:
    """Adapt a model and write it to the folder `output`: an ordinary checkpoint of its family that names its density in config.json,
    with rowcast.json, how it was made and its figures, which are returned.

    Killed and called again in the same way it goes on where it was. `held_out`: texts that only judge. `compiled`: with
    torch.compile, which is faster after a minute and changes the last bits; it compiles once where 16 divides a part's windows. Raises
    UserError for bad input, Unfinished where `part_minutes` are over or a signal came, with everything saved.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    spec, tokenizer = spec_from_config(checkpoint.config), load_tokenizer(checkpoint)
    settings.check(spec)
    read = [{"name": path.name, "sha256": read_text(path)[1]} for path in (*texts, *held_out)]
    world = World(device)
    world.check_shares(settings.batch, settings.accumulate)
    where = world.device or devices.choose_device(device)[0]
    kind = devices.DTYPES[devices.choose_dtype(dtype, checkpoint.stored_dtype, where)[0]]
    begun_with = {
        "format": FORMAT, "command": "adapt", "model": checkpoint.path.name, "fingerprint": checkpoint.source.fingerprint(),
        "texts": read[: len(texts)], "held_out": read[len(texts) :], "dtype": str(kind).removeprefix("torch."),
        "processes": world.size, "compiled": compiled, **asdict(settings),
    }  # fmt: skip
    with Part(part_minutes) as part:
        folder = WorkFolder(output, begun_with, restart=restart, leads=world.leads)
        world.wait()
        if folder.finished:
            return folder.description()
        return _Job(checkpoint, spec, settings, folder, world, part, where, kind, compiled, show).run(
            tokenizer, texts, held_out, save_seconds
        )


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Of the result: the checkpoint's own; 16 bits where it was packed in fewer."""
    return torch.bfloat16 if checkpoint.format == "gguf" else devices.DTYPES.get(checkpoint.stored_dtype, torch.float32)


def balanced(divergences: Tensor, densities: Sequence[float], dense_weight: float) -> Tensor:
    """The loss of sequences with the mean divergences [B], by their densities, equal ones side by side.

    Of a part of a batch it is the part's own: the mean over parts is at most the whole batch's loss, and not the same.
    """
    total, weights, start = divergences.new_zeros(()), 0.0, 0
    for density, count in runs(densities):
        weight = count * (dense_weight if density == DENSE else 1.0)
        total = total + weight * ((divergences[start : start + count].mean() + SMALL).sqrt() - SMALL**0.5)
        weights, start = weights + weight, start + count
    return total / weights


@dataclass(slots=True)
class _Job:
    checkpoint: Checkpoint
    spec: ModelSpec
    settings: Settings
    folder: WorkFolder
    world: World
    part: Part
    device: torch.device
    dtype: torch.dtype
    compiled: bool
    show: bool | None

    def run(self, tokenizer: Tokenizer, texts: Sequence[Path], held_out: Sequence[Path], save_seconds: float) -> dict[str, Any]:
        settings = self.settings
        corpus = self._corpus(texts, held_out, tokenizer)
        speed = 0.0
        if settings.written_tokens:
            speed = write(
                self.checkpoint, corpus, self.folder.path, Writing(settings.written_tokens, settings.window, settings.prompt_tokens),
                dtype=self.dtype, device=self.device, world=self.world, part=self.part, show=self.show,
            )  # fmt: skip
        mix = Mix.around(settings.density)
        student, trained, looks = self._train(mix, corpus, save_seconds)
        description: dict[str, Any] = {
            "model": self.checkpoint.path.name,
            "density": settings.density,
            "densities": list(mix.densities),
            "texts": corpus.describe(),
            "written_tokens": corpus.written_tokens,
            "writing_tokens_per_s": speed or None,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "training": trained.to_json(),
            "looks": looks.found,
        }
        if self.world.leads:
            stored = self._store(student)
            del student
            rows = self._measure(open_checkpoint(str(stored)), mix, corpus)
            description["table"] = to_json(rows)
            self.folder.publish(lambda part: self._finish(stored, part, rows), description)
        self.world.wait()
        return {**description, "settings": self.folder.settings}

    def _corpus(self, texts: Sequence[Path], held_out: Sequence[Path], tokenizer: Tokenizer) -> Corpus:
        def opened() -> Corpus:
            return Corpus.open(
                self.folder.path, texts, tokenizer, self.spec.vocab_size, window=self.settings.window, seed=self.settings.seed,
                held_out=held_out, text_share=self.settings.text_share,
            )  # fmt: skip

        found = opened() if self.world.leads else None  # it writes the ids, which the others map
        self.world.wait()
        return found or opened()

    def _train(self, mix: Mix, corpus: Corpus, save_seconds: float) -> tuple[Any, Trained, Looks]:
        settings, leads = self.settings, self.world.leads
        teacher = load_module(self.checkpoint, self.dtype, self.device).requires_grad_(False)
        changed = replace(self.checkpoint, config=settings.config(self.spec, self.checkpoint.config))
        student = load_module(changed, torch.float32, self.device)
        for outer in (student.get_input_embeddings(), student.get_output_embeddings()):
            outer.requires_grad_(False)
        neurons = Neurons(student, self.spec, "threshold" if settings.choice == "threshold" else "top")
        neurons.permute()
        neurons.hook()
        rounding = None
        if settings.bits is not None:
            rounding = Rounding(student, self.spec, settings.bits, stored_dtype(self.checkpoint))
        if self.compiled:
            compile_layers(teacher, self.spec)
            compile_layers(student, self.spec)
        head = teacher.get_output_embeddings().weight
        rounded_head = None if rounding is None else rounding.head.to(head.dtype)
        every = max(1, settings.steps // settings.looks) if settings.looks and leads else 0
        held = corpus.held(settings.window, max(1, LOOK_TOKENS[self.device.type] // settings.window))
        looks = Looks(self.folder.path, held, mix.shown(settings.density), every, show=self.show is not False)

        def loss_of(step: int, part: int, parts: int) -> Tensor:
            if student.training:
                student.eval()  # no dropout: it would draw, and a law is to be learnt as it is
            if looks.due(step) and part == 0:
                looks.look(step, teacher, student, neurons)
            ids = corpus.batch(step, settings.batch)[part::parts].to(self.device, non_blocking=True)
            whole = rounding is not None and step % ROUNDED_EVERY == ROUNDED_EVERY - 1
            neurons.densities = [DENSE] * len(ids) if whole else mix.of(step * settings.batch, settings.batch)[part::parts]
            with torch.no_grad(), torch.autocast("cuda", enabled=False):  # in its own format, as when it judges
                known = hidden_states(teacher, ids).flatten(0, 1)
            with rounding.on() if rounding is not None and whole else nullcontext():
                ours = hidden_states(student, ids).flatten(0, 1)
            used = rounded_head if rounded_head is not None and whole else head
            found = divergence(ours, used, known, head)[0].view(len(ids), -1).mean(1)
            return balanced(found, neurons.densities, settings.dense_weight)

        trainer = Trainer(
            student, loss_of, settings.training, self.folder.path, device=self.device,
            batch_tokens=settings.batch * settings.window, world=self.world, part=self.part, save_seconds=save_seconds,
            name="adapting", show=self.show,
        )  # fmt: skip
        trained = trainer.run()
        if every:
            looks.look(settings.steps, teacher, student, neurons)
        if rounding is not None:
            rounding.remove()
        neurons.unhook()
        neurons.permute(back=True)
        return student, trained, looks

    def _store(self, student: Any) -> Path:
        """The model as it will stand, but for what is still to be measured."""
        stored = self.folder.path / STORED
        shutil.rmtree(stored, ignore_errors=True)
        stored.mkdir()
        metadata = {"adapted_to": f"{self.settings.density:g}", "adapted_from": self.checkpoint.path.name}
        setattr(student.config, ADAPTED, {"density": self.settings.density})
        write_module(student, self.checkpoint, stored, metadata, stored_dtype(self.checkpoint))
        return stored

    def _measure(self, adapted: Checkpoint, mix: Mix, corpus: Corpus) -> list[Row]:
        settings = self.settings
        windows = corpus.held(settings.window, max(1, settings.judged_tokens // settings.window)).tolist()
        densities = sorted(mix.densities, reverse=True)
        with LearningProgress("measuring", passes(densities, len(windows), settings.bits) * settings.window, self.show) as bar:
            return measure(
                self.checkpoint, adapted, densities, windows, dtype=self.dtype, device=self.device, bits=settings.bits,
                advance=lambda: bar.advance(settings.window),
            )  # fmt: skip

    def _finish(self, stored: Path, folder: Path, rows: Sequence[Row]) -> None:
        """Move what is stored to `folder`, with what q4's choice was found to be worth."""
        for path in stored.iterdir():
            shutil.move(path, folder / path.name)
        config = json.loads((folder / "config.json").read_bytes())
        found = {f"{row.density:g}": round(row.own, 4) for row in rows if row.model == "adapted" and row.by == "q4"}
        config[ADAPTED]["acceptance"] = found
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

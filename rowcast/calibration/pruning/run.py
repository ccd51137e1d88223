"""`prune`: importance, the cut, the refit, recovery by distillation from the original, then an ordinary checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from rowcast.calibration.learning.corpus import Corpus
from rowcast.calibration.learning.judge import ModuleSubject, hidden_states, judge
from rowcast.calibration.learning.losses import head_divergence
from rowcast.calibration.learning.module import load_module, write_module
from rowcast.calibration.learning.part import Part, World
from rowcast.calibration.learning.progress import LearningProgress
from rowcast.calibration.learning.state import WorkFolder, load_tensors, save_tensors, write_whole
from rowcast.calibration.learning.trainer import Trained, Trainer, TrainSettings
from rowcast.calibration.learning.writing import Writing, write
from rowcast.calibration.pruning.cut import choose, cut, smaller_config
from rowcast.calibration.pruning.importance import By, Importance, measure
from rowcast.calibration.pruning.refit import refit
from rowcast.calibration.pruning.sizes import Sizes, Target, candidates, tensor_parallel
from rowcast.calibration.text import read_text
from rowcast.errors import UserError
from rowcast.runtime import device as devices
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.spec import ModelSpec, parameter_count
from rowcast.runtime.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
BATCH_TOKENS = 4096
"""Run at a time, without gradients; a quarter with them."""
CUT, FIGURES, IMPORTANCE = "cut", "figures.json", "importance.safetensors"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is pruned, and how. The same settings and texts make the same model, bit for bit on a CPU."""

    keep: float | None = None
    """Of the parameters outside embeddings; neurons and heads are then chosen by what they are worth, ..."""
    neurons: float | None = None
    """... or of the neurons ..."""
    heads: float | None = None
    """... and of the query heads; None: all stay."""
    tp: int = 1
    """Ranks that the KV heads and neurons that are left have to divide among."""
    by: By = "taylor"
    tokens: int = 16384
    """Of the text, at most, that importance is measured on, ..."""
    refit_tokens: int = 65536
    """... and that the products behind the cut are fitted to; 0: they stay as they are."""
    window: int = 512
    """Tokens that see each other."""
    steps: int = 500
    """Of recovery; 0: the cut model as it is."""
    batch: int = 16
    """Windows of a step, over all processes."""
    learning_rate: float = 3e-4
    warmup: int = 50
    accumulate: int = 1
    written_tokens: int = 0
    """That the model writes itself, to recover on."""
    text_share: float = 0.5
    """Of a step's windows, from texts as they are, where the model writes, too."""
    judged_tokens: int = 16384
    """Held-out tokens, at most, that the figures are measured on."""
    seed: int = 0

    @property
    def target(self) -> Target:
        return Target(self.keep, self.neurons, self.heads, self.tp)

    def check(self, spec: ModelSpec) -> None:
        """Raise UserError for what cannot be, of a model like this."""
        self.target.check(spec)
        for name, count, least in (
            ("tokens", self.tokens, 2), ("refit-tokens", self.refit_tokens, 0), ("steps", self.steps, 0), ("batch", self.batch, 1),
            ("written", self.written_tokens, 0), ("judged", self.judged_tokens, 1), ("seed", self.seed, 0),
            ("accumulate", self.accumulate, 1),
        ):  # fmt: skip
            if count < least:
                raise UserError(f"--{name} {count} is too low: give {least} or more")
        if self.by not in get_args(By):
            raise UserError(f"--by {self.by!r:.60} is no measure: choose one of {', '.join(get_args(By))}")
        if not 0 <= self.text_share <= 1:
            raise UserError(f"--text-share {self.text_share:g} is not a share: give a number from 0 to 1")
        if self.batch % self.accumulate:
            raise UserError(f"--accumulate {self.accumulate} does not divide --batch {self.batch}: give a divisor")
        if self.window > spec.max_context:
            raise UserError(f"--window {self.window} is longer than the model's context of {spec.max_context}: lower it")
        self.training.check()

    @property
    def training(self) -> TrainSettings:
        return TrainSettings(self.steps, self.learning_rate, self.warmup, accumulate=self.accumulate)


def prune(
    model: str | Checkpoint,
    texts: Sequence[Path],
    output: Path,
    settings: Settings,
    *,
    held_out: Sequence[Path] = (),
    dtype: str = "auto",
    device: str = "auto",
    part_minutes: float | None = None,
    save_seconds: float = 60.0,
    restart: bool = False,
    show: bool | None = None,
) -> dict[str, Any]:
    """Prune a model and write a smaller one of the same family to the folder `output`, with rowcast.json: how it was made and its
    figures, returned.

    Killed and called again in the same way it goes on where it was. `held_out`: texts that only judge. Raises UserError for bad
    input, Unfinished where `part_minutes` are over or a signal came, with everything saved.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    spec = spec_from_config(checkpoint.config)
    settings.check(spec)
    fitting = candidates(spec, settings.target)
    if fitting == [Sizes.of(spec)]:
        raise UserError("those shares keep all neurons and heads: lower one of them")
    tokenizer = load_tokenizer(checkpoint)
    read = [{"name": path.name, "sha256": read_text(path)[1]} for path in (*texts, *held_out)]
    world = World(device)
    world.check_shares(settings.batch, settings.accumulate)
    where = world.device or devices.choose_device(device)[0]
    kind = devices.DTYPES[devices.choose_dtype(dtype, checkpoint.stored_dtype, where)[0]]
    begun_with = {
        "format": FORMAT, "command": "prune", "model": checkpoint.path.name, "fingerprint": checkpoint.source.fingerprint(),
        "texts": read[: len(texts)], "held_out": read[len(texts) :], "dtype": str(kind).removeprefix("torch."),
        "processes": world.size, **asdict(settings),
    }  # fmt: skip
    with Part(part_minutes) as part:
        folder = WorkFolder(output, begun_with, restart=restart, leads=world.leads)
        world.wait()
        if folder.finished:
            return folder.description()
        job = _Job(checkpoint, spec, settings, folder, world, part, where, kind, show if world.leads else False)
        return job.run(fitting, tokenizer, texts, held_out, save_seconds)


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
    show: bool | None

    def run(
        self,
        fitting: Sequence[Sizes],
        tokenizer: Tokenizer,
        texts: Sequence[Path],
        held_out: Sequence[Path],
        save_seconds: float,
    ) -> dict[str, Any]:
        settings, world = self.settings, self.world
        corpus = self._corpus(texts, held_out, tokenizer)
        if settings.steps and settings.written_tokens:
            writing = Writing(settings.written_tokens, settings.window)
            write(
                self.checkpoint, corpus, self.folder.path, writing,
                dtype=self.dtype, device=self.device, world=world, part=self.part, show=self.show,
            )  # fmt: skip
        original = load_module(self.checkpoint, self.dtype, self.device).requires_grad_(False)
        smaller_at = self.folder.path / CUT
        if world.leads and not smaller_at.exists():
            self._cut(original, fitting, corpus, smaller_at)
        world.wait()
        figures: dict[str, Any] = json.loads((smaller_at / FIGURES).read_bytes())
        smaller = load_module(open_checkpoint(str(smaller_at)), torch.float32, self.device)
        trained = self._recover(smaller, original, corpus, save_seconds)
        description = {**figures, "texts": corpus.describe(), "written_tokens": corpus.written_tokens}
        description["device"] = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        smaller = smaller.to(self.dtype)
        if world.leads:
            if trained is not None:
                description["training"] = trained.to_json()
                description["held_out"]["recovered"] = self._judge(original, smaller, corpus, "recovered")
            metadata = {"pruned_from": self.checkpoint.path.name}
            self.folder.publish(lambda part: write_module(smaller, self.checkpoint, part, metadata, self.dtype), description)
        world.wait()
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

    def _cut(self, original: Any, fitting: Sequence[Sizes], corpus: Corpus, output: Path) -> None:
        """Choose, cut and refit; the smaller model in single precision, with its figures, at `output`."""
        settings, spec = self.settings, self.spec
        kept = choose(spec, self._importance(original, corpus), fitting)
        smaller = cut(original, self.checkpoint.config, spec, kept, torch.float32)
        smaller_spec = spec_from_config(smaller_config(self.checkpoint.config, spec, kept.sizes))
        held = {"cut": self._judge(original, smaller, corpus, "as cut")}
        left: list[tuple[float, float]] = []
        if settings.refit_tokens:
            windows = _windows(corpus, settings.refit_tokens)
            with LearningProgress("fitting", windows.numel() * spec.num_layers, self.show) as bar:
                left = refit(
                    original, smaller, spec, smaller_spec, windows, device=self.device,
                    folder=self.folder.path, batch_tokens=BATCH_TOKENS, advance=self._advance(bar), saved=self._saved,
                )  # fmt: skip
            held["refitted"] = self._judge(original, smaller, corpus, "as refitted")
        figures = {
            "model": self.checkpoint.path.name,
            "neurons": [spec.intermediate_size, smaller_spec.intermediate_size],
            "heads": [spec.num_heads, smaller_spec.num_heads],
            "kv_heads": [spec.num_kv_heads, smaller_spec.num_kv_heads],
            "parameters": [parameter_count(spec), parameter_count(smaller_spec)],
            "kept": kept.sizes.share(spec),
            "importance_lost": kept.lost,
            "tensor_parallel": [tensor_parallel(spec), tensor_parallel(smaller_spec)],
            "fit_left": [{"attention": attention, "mlp": mlp} for attention, mlp in left],
            "held_out": held,
        }
        part = output.with_name(f"{output.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write_module(smaller, None, part, {}, torch.float32)
        write_whole(part / FIGURES, json.dumps(figures).encode())
        os.replace(part, output)

    def _importance(self, original: Any, corpus: Corpus) -> Importance:
        """Sums over passes; those of a part that is over are kept, with the number of passes."""
        path, spec = self.folder.path / IMPORTANCE, self.spec
        sums, done = {"neurons": torch.zeros(()), "heads": torch.zeros(())}, 0
        if path.exists():
            sums, metadata = load_tensors(path)
            done = int(metadata["passes"])
        windows = _windows(corpus, self.settings.tokens)
        passes = torch.split(windows, max(1, BATCH_TOKENS // 4 // windows.shape[1]))
        with LearningProgress("weighing", windows.numel(), self.show) as bar:
            bar.advance(sum(ids.numel() for ids in passes[:done]), new=False)
            for number, ids in enumerate(passes[done:], start=done + 1):
                found = measure(original, spec, ids, self.settings.by, device=self.device, batch_tokens=ids.numel())
                sums["neurons"] = sums["neurons"] + found.neurons * ids.numel()
                sums["heads"] = sums["heads"] + found.heads * ids.numel()
                bar.advance(ids.numel())
                over = self.part.over
                if over or number == len(passes):
                    save_tensors(path, sums, {"passes": str(number)})
                if over:
                    raise self.part.stop()
        return Importance(sums["neurons"] / windows.numel(), sums["heads"] / windows.numel())

    def _advance(self, bar: LearningProgress) -> Callable[[int], None]:
        def advance(tokens: int) -> None:
            bar.advance(tokens)
            if self.part.asked:
                raise self.part.stop()

        return advance

    def _saved(self) -> None:
        """Something is on disk that was not. A part that is over ends here alone, so that each gets further, however short it is."""
        if self.part.over:
            raise self.part.stop()

    def _recover(self, smaller: Any, original: Any, corpus: Corpus, save_seconds: float) -> Trained | None:
        settings = self.settings
        if not settings.steps:
            return None
        head, original_head = smaller.get_output_embeddings().weight, original.get_output_embeddings().weight

        def loss_of(step: int, part: int, parts: int) -> Tensor:
            ids = corpus.batch(step, settings.batch)[part::parts].to(self.device, non_blocking=True)
            with torch.no_grad(), torch.autocast("cuda", enabled=False):  # in its own format, as when it judges
                known = hidden_states(original, ids).flatten(0, 1)
            return head_divergence(hidden_states(smaller, ids).flatten(0, 1), head, known, original_head)

        trainer = Trainer(
            smaller, loss_of, settings.training, self.folder.path, device=self.device,
            batch_tokens=settings.batch * settings.window, world=self.world, part=self.part, save_seconds=save_seconds,
            name="recovering", show=self.show,
        )  # fmt: skip
        return trainer.run()

    def _judge(self, original: Any, smaller: Any, corpus: Corpus, name: str) -> dict[str, Any]:
        """Over held-out windows, in the original's number format."""
        windows = corpus.held(self.settings.window, max(1, self.settings.judged_tokens // self.settings.window))
        with LearningProgress(f"judging {name}", windows.numel(), self.show) as bar:
            copies = {name: ModuleSubject(smaller)}
            found = judge(ModuleSubject(original), copies, windows, device=self.device, temperatures=(1.0,), advance=bar.advance)
        return found[name].to_json()


def _windows(corpus: Corpus, tokens: int) -> Tensor:
    """So many tokens to calibrate on, as far as the texts have them, from all over them: [W, window], at least two windows."""
    there = sum(text.held - text.start for text in corpus.texts)
    return corpus.batch(0, max(2, min(tokens, there) // corpus.window))

"""`prune`: importance, the cut, the refit, recovery by distillation from the original, then an ordinary checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from rowcast.calibration.learning.corpus import Corpus
from rowcast.calibration.learning.job import How, Job, Lesson, Opened, learn
from rowcast.calibration.learning.judge import ModuleSubject, hidden_states, judge
from rowcast.calibration.learning.losses import head_divergence
from rowcast.calibration.learning.module import load_module, stored_dtype, write_module
from rowcast.calibration.learning.progress import LearningProgress
from rowcast.calibration.learning.settings import LearningSettings, check_least
from rowcast.calibration.learning.state import load_tensors, save_tensors, write_whole
from rowcast.calibration.learning.trainer import Trained
from rowcast.calibration.pruning.cut import choose, cut, smaller_config
from rowcast.calibration.pruning.importance import By, Importance, measure
from rowcast.calibration.pruning.refit import refit
from rowcast.calibration.pruning.sizes import Sizes, Target, candidates, tensor_parallel
from rowcast.errors import UserError
from rowcast.runtime import device as devices
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.spec import ModelSpec, parameter_count

BATCH_TOKENS, GPU_BATCH_TOKENS = 4096, 32768
"""Run at a time, without gradients, on a CPU and on a GPU; a quarter with them."""
BATCH, GPU_BATCH = 16, 48
"""Windows of a step of recovery, where none are given."""
CUT, FIGURES, IMPORTANCE = "cut", "figures.json", "importance.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(LearningSettings):
    """What is pruned, and how."""

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
    batch: int = BATCH
    steps: int = 500
    """Of recovery; 0: the cut model as it is."""
    learning_rate: float = 3e-4
    warmup: int = 50
    written_tokens: int = 0
    text_share: float = 0.5
    judged_tokens: int = 16384

    @property
    def target(self) -> Target:
        return Target(self.keep, self.neurons, self.heads, self.tp)

    def check(self, spec: ModelSpec) -> None:
        """Raise UserError for what cannot be, of a model like this."""
        self.target.check(spec)
        check_least(("tokens", self.tokens, 2), ("refit-tokens", self.refit_tokens, 0))
        if self.by not in get_args(By):
            raise UserError(f"--by {self.by!r:.60} is no measure: choose one of {', '.join(get_args(By))}")
        self.check_learning(spec)


def prune(
    model: str | Checkpoint,
    texts: Sequence[Path],
    output: Path,
    settings: Settings,
    how: How | None = None,
    *,
    held_out: Sequence[Path] = (),
) -> dict[str, Any]:
    """Prune a model and write a smaller one of the same family to the folder `output`, with rowcast.json: how it was made and its
    figures, returned.

    Killed and called again in the same way it goes on where it was. `held_out`: texts that only judge. Raises UserError for bad
    input, Unfinished where `how.part_minutes` are over or a signal came, with everything saved.
    """
    opened = Opened.of(model, settings.check)
    fitting = candidates(opened.spec, settings.target)
    if fitting == [Sizes.of(opened.spec)]:
        raise UserError("those shares keep all neurons and heads: lower one of them")
    return learn(
        "prune", opened, settings, texts, output, how, lambda job: _Pruning(job, settings, fitting).run(), held_out=held_out
    )


@dataclass(frozen=True, slots=True)
class _Pruning:
    job: Job
    settings: Settings
    fitting: Sequence[Sizes]

    def run(self) -> dict[str, Any]:
        job, checkpoint = self.job, self.job.opened.checkpoint
        original = load_module(checkpoint, job.dtype, job.device).requires_grad_(False)
        smaller_at = job.folder.path / CUT
        job.lead(lambda: None if smaller_at.exists() else self._cut(original, smaller_at))
        figures: dict[str, Any] = json.loads((smaller_at / FIGURES).read_bytes())
        smaller = load_module(open_checkpoint(str(smaller_at)), torch.float32, job.device)
        trained = self._recover(smaller, original) if self.settings.steps else None
        stored = stored_dtype(checkpoint)
        smaller = smaller.to(stored).to(job.dtype)
        description = {**figures, **job.describe(trained)}

        def finish() -> None:
            if trained is not None:
                description["held_out"]["recovered"] = self._judge(original, smaller, "recovered")
            metadata = {"pruned_from": checkpoint.path.name}
            job.folder.publish(lambda folder: write_module(smaller, checkpoint, folder, metadata, stored), description)

        job.lead(finish)
        return description

    def _cut(self, original: Any, output: Path) -> None:
        """Choose, cut and refit; the smaller model in single precision, with its figures, at `output`."""
        job, checkpoint, spec = self.job, self.job.opened.checkpoint, self.job.opened.spec
        kept = choose(spec, self._importance(original), self.fitting)
        smaller = cut(original, checkpoint.config, spec, kept, torch.float32)
        smaller_spec = spec_from_config(smaller_config(checkpoint.config, spec, kept.sizes))
        held = {"cut": self._judge(original, smaller, "as cut")}
        left: list[tuple[float, float]] = []
        if self.settings.refit_tokens:
            windows = _windows(job.corpus, self.settings.refit_tokens)
            at_once = _batch_tokens(job.device)
            with job.bar("fitting", windows.numel() * spec.num_layers) as advance:
                left = refit(
                    original, smaller, spec, smaller_spec, windows, device=job.device,
                    folder=job.folder.path, batch_tokens=at_once, advance=advance, saved=self._saved,
                )  # fmt: skip
            held["refitted"] = self._judge(original, smaller, "as refitted")
        figures = {
            "model": checkpoint.path.name,
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

    def _importance(self, original: Any) -> Importance:
        """Sums over passes; those of a part that is over are kept, with the number of passes."""
        job, path = self.job, self.job.folder.path / IMPORTANCE
        sums, done = {"neurons": torch.zeros(()), "heads": torch.zeros(())}, 0
        if path.exists():
            sums, metadata = load_tensors(path)
            done = int(metadata["passes"])
        windows = _windows(job.corpus, self.settings.tokens)
        passes = torch.split(windows, max(1, _batch_tokens(job.device) // 4 // windows.shape[1]))
        with LearningProgress("weighing", windows.numel(), job.show) as bar:
            bar.advance(sum(ids.numel() for ids in passes[:done]), new=False)
            for number, ids in enumerate(passes[done:], start=done + 1):
                found = measure(original, job.opened.spec, ids, self.settings.by, device=job.device, batch_tokens=ids.numel())
                sums["neurons"] = sums["neurons"] + found.neurons * ids.numel()
                sums["heads"] = sums["heads"] + found.heads * ids.numel()
                bar.advance(ids.numel())
                over = job.part.over
                if over or number == len(passes):
                    save_tensors(path, sums, {"passes": str(number)})
                if over:
                    raise job.part.stop()
        return Importance(sums["neurons"] / windows.numel(), sums["heads"] / windows.numel())

    def _saved(self) -> None:
        """Something is on disk that was not. A part that is over ends here alone, so that each gets further, however short it is."""
        if self.job.part.over:
            raise self.job.part.stop()

    def _recover(self, smaller: Any, original: Any) -> Trained:
        head, original_head = smaller.get_output_embeddings().weight, original.get_output_embeddings().weight

        def loss_of(lesson: Lesson) -> Tensor:
            ours = hidden_states(smaller, lesson.ids)
            return head_divergence(ours.flatten(0, 1), head, lesson.known.flatten(0, 1), original_head)

        return self.job.train(smaller, original, loss_of, "recovering", form=lambda step, part, parts: None)

    def _judge(self, original: Any, smaller: Any, name: str) -> dict[str, Any]:
        """Over held-out windows, in the original's number format."""
        job, window = self.job, self.settings.window
        windows = job.corpus.held(window, max(1, self.settings.judged_tokens // window))
        with job.bar(f"judging {name}", windows.numel()) as advance:
            copies = {name: ModuleSubject(smaller)}
            found = judge(ModuleSubject(original), copies, windows, device=job.device, temperatures=(1.0,), advance=advance)
        return found[name].to_json()


def default_batch(device: str) -> int:
    """Windows of a step of recovery: what fills the device of that name (of `How`). Raises UserError where there is none."""
    return GPU_BATCH if devices.choose_device(device)[0].type == "cuda" else BATCH


def _batch_tokens(device: torch.device) -> int:
    return GPU_BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS


def _windows(corpus: Corpus, tokens: int) -> Tensor:
    """So many tokens to calibrate on, as far as the texts have them, from all over them: [W, window], at least two windows."""
    there = sum(text.held - text.start for text in corpus.texts)
    return corpus.batch(0, max(2, min(tokens, there) // corpus.window))

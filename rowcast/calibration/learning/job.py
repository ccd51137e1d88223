"""What distilling, adapting and pruning share: how they begin, their text, the original's laws, training, and what one process does
alone while the others wait."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowcast.calibration.learning.capturing import Captured
from rowcast.calibration.learning.corpus import Corpus
from rowcast.calibration.learning.judge import hidden_states
from rowcast.calibration.learning.part import Part, Unfinished, World
from rowcast.calibration.learning.progress import LearningProgress
from rowcast.calibration.learning.settings import LearningSettings
from rowcast.calibration.learning.state import WorkFolder
from rowcast.calibration.learning.trainer import Trained, Trainer
from rowcast.calibration.learning.writing import Writing, write
from rowcast.calibration.text import read_text
from rowcast.runtime import device as devices
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.tokenizer import Tokenizer, load_tokenizer

FORMAT = 4
"""Of a state: 2 since windows begin as a prompt does, 3 since an optimiser is chosen, 4 since `adapt` goes by levels."""


@dataclass(frozen=True, slots=True)
class How:
    """How a command runs. Of this only the number format and the device have a say in what it makes."""

    dtype: str = "auto"
    """Of the original and of what is judged; what is trained is float32."""
    device: str = "auto"
    part_minutes: float | None = None
    """Save and stop after so many; None: go on to the end."""
    save_seconds: float = 60.0
    """Between savings of the training's state."""
    restart: bool = False
    """Begin anew where the folder holds something of other settings."""
    show: bool | None = None
    """Progress on standard error; None: where that is a terminal, otherwise a line now and then."""
    captured: bool = True
    """On a GPU replay a step's forward and backward as a CUDA graph, where a command's steps allow it."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The model that a copy is made of."""

    checkpoint: Checkpoint
    spec: ModelSpec
    tokenizer: Tokenizer

    @classmethod
    def of(cls, model: str | Checkpoint, check: Callable[[ModelSpec], None]) -> Opened:
        """By its name or path. `check`: whether settings suit it.

        Raises UserError where there is none, or none that the engine runs, where `check` does, and where it has no tokenizer.
        """
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        spec = spec_from_config(checkpoint.config)
        check(spec)
        return cls(checkpoint, spec, load_tokenizer(checkpoint))


@dataclass(frozen=True, slots=True)
class Lesson:
    """What this process learns from at once."""

    step: int
    part: int
    parts: int
    """It has the windows `part`, `part + parts`, ... of the step's batch."""
    ids: Tensor
    """[B, W] int64: the windows."""
    known: Tensor
    """[B, W, D]: what the original's LM head reads after each of their tokens."""


def learn(
    command: str,
    opened: Opened,
    settings: LearningSettings,
    texts: Sequence[Path],
    output: Path,
    how: How | None,
    work: Callable[[Job], dict[str, Any]],
    *,
    held_out: Sequence[Path] = (),
    begun_with: Mapping[str, Any] | None = None,
    reads: Sequence[Path] = (),
) -> dict[str, Any]:
    """Let `work` put the result at `output` and return its description, in the folder where the same command left it.

    `begun_with`: plain JSON values that have to be the same beside the settings, the model, the texts and the number of processes.
    `reads`: what else is read, so that `output` must not take its place. A result that is there is described again and nothing else
    is done. Precondition: the settings are checked. Raises UserError for bad input, Unfinished where `how.part_minutes` are over or a
    signal came, with everything saved.
    """
    how, checkpoint = how or How(), opened.checkpoint
    read = [{"name": path.name, "sha256": read_text(path)[1]} for path in (*texts, *held_out)]
    world = World(how.device)
    world.check_shares(settings.batch, settings.accumulate)
    device = world.device or devices.choose_device(how.device)[0]
    dtype = devices.DTYPES[devices.choose_dtype(how.dtype, checkpoint.stored_dtype, device)[0]]
    begun = {
        "format": FORMAT, "command": command, "model": checkpoint.path.name, "fingerprint": checkpoint.source.fingerprint(),
        "texts": read[: len(texts)], "held_out": read[len(texts) :], "dtype": str(dtype).removeprefix("torch."),
        "processes": world.size, **asdict(settings), **(begun_with or {}),
    }  # fmt: skip
    with Part(how.part_minutes) as part:
        inputs = (checkpoint.path, *texts, *held_out, *reads)
        folder = WorkFolder.together(world, output, begun, restart=how.restart, reads=inputs)
        if folder.finished:
            return folder.description()
        show = how.show if world.leads else False
        with folder.worked_in():
            corpus = _corpus(opened, settings, texts, held_out, folder.path, world)
            speed = 0.0
            if settings.steps and settings.written_tokens:
                writing = Writing(settings.written_tokens, settings.window, settings.prompt_tokens)
                speed = write(
                    checkpoint, corpus, folder.path, writing, dtype=dtype, device=device, world=world, part=part, show=show
                )
            job = Job(opened, settings, corpus, folder, world, part, device, dtype, show, how.save_seconds, speed, how.captured)
            return {**work(job), "settings": folder.settings}


@dataclass(slots=True)
class Job:
    """A command over its folder, with its text whole."""

    opened: Opened
    settings: LearningSettings
    corpus: Corpus
    folder: WorkFolder
    world: World
    part: Part
    device: torch.device
    dtype: torch.dtype
    show: bool | None
    """False where another process leads."""
    save_seconds: float
    writing_tokens_per_s: float
    """0 where nothing was written in this part."""
    captured: bool = False
    """Whether steps may be replayed."""
    trained_here: bool = False
    """Whether this part has trained anything."""
    replayed: int = 0
    """Steps of this part that were replayed."""

    def train(
        self,
        student: Any,
        teacher: Any,
        loss_of: Callable[[Lesson], Tensor],
        name: str,
        hidden: Callable[[Any, Tensor], Tensor] | None = None,
        form: Callable[[int, int, int], Hashable] | None = None,
        before: Callable[[int], None] = lambda step: None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> Trained:
        """All steps that are left. `hidden`: what the teacher's LM head reads, as `hidden_states`, which is the default.

        `form`: of (step, part, parts), all that `loss_of` goes by but ids and laws. On a GPU steps of one form are recorded once and
        replayed (`capturing`); None: none are. `before`: called before each step, never replayed. `kept`: as of `Trainer`.
        Raises Unfinished where the part is over, with everything saved: with at least one step more than before.
        """
        settings = self.settings
        hidden = hidden or hidden_states

        def learnt(place: tuple[int, int, int], ids: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast("cuda", enabled=False):  # in its own format, as when it judges
                known = hidden(teacher, ids)
            return loss_of(Lesson(*place, ids, known))

        places: dict[Hashable, tuple[int, int, int]] = {}  # the first of each form
        parameters = [value for value in student.parameters() if value.requires_grad]
        replaying = self.captured and form is not None and self.device.type == "cuda"
        captured = Captured(lambda key, ids: learnt(places[key], ids), parameters, replaying)

        def loss(step: int, part: int, parts: int) -> Tensor:
            if part < self.world.size:
                before(step)
            ids = self.corpus.batch(step, settings.batch)[part::parts].to(self.device, non_blocking=True)
            if form is None:
                return learnt((step, part, parts), ids)
            key = form(step, part, parts)
            places.setdefault(key, (step, part, parts))
            return captured(key, ids)

        trainer = Trainer(
            student, loss, settings.training, self.folder.path, device=self.device,
            batch_tokens=settings.batch * settings.window, world=self.world, part=self.part, save_seconds=self.save_seconds,
            name=name, show=self.show, kept=kept,
        )  # fmt: skip
        first = trainer.step
        try:
            return trainer.run()
        finally:
            self.trained_here, self.replayed = trainer.step > first, captured.steps

    def pause(self) -> None:
        """Stop before what takes long and is not saved half done, so that it has a part of its own: where a signal came, and where the
        part is over and has trained something. One that had no time to begin with goes on, since the next would not have more.

        Raises Unfinished.
        """
        over = self.part.asked or (self.part.over and self.trained_here)
        self.world.stop_together(self.part.stop() if over else None, self.device)

    def lead(self, work: Callable[[], None]) -> None:
        """`work` in the process that leads, while the others wait. Raises Unfinished in all of them where `work` does."""
        stopped: Unfinished | None = None
        if self.world.leads:
            try:
                work()
            except Unfinished as error:
                stopped = error
        self.world.stop_together(stopped, self.device)

    @contextmanager
    def bar(self, doing: str, tokens: int) -> Iterator[Callable[[int], None]]:
        """A bar over so many tokens, which is told of those that are done. Telling it raises Unfinished where a signal came."""
        with LearningProgress(doing, tokens, self.show) as bar:

            def advance(done: int) -> None:
                bar.advance(done)
                if self.part.asked:
                    raise self.part.stop()

            yield advance

    def describe(self, trained: Trained | None) -> dict[str, Any]:
        """Of a result's description, what all have: its texts, the device and the training, if there was any."""
        return {
            "texts": self.corpus.describe(),
            "written_tokens": self.corpus.written_tokens,
            "writing_tokens_per_s": self.writing_tokens_per_s or None,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            **({} if trained is None else {"training": {**trained.to_json(), "replayed_steps": self.replayed}}),
        }


def _corpus(
    opened: Opened, settings: LearningSettings, texts: Sequence[Path], held_out: Sequence[Path], folder: Path, world: World
) -> Corpus:
    def open_it() -> Corpus:
        return Corpus.open(
            folder, texts, opened.tokenizer, opened.spec.vocab_size, window=settings.window, seed=settings.seed, held_out=held_out,
            text_share=settings.text_share,
        )  # fmt: skip

    found = open_it() if world.leads else None  # it writes the ids, which the others map
    world.wait()
    return found or open_it()

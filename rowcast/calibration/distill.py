"""`distill`: a small draft that learns a target's laws, from text that the target writes and text that is given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowcast.calibration.learning.corpus import Corpus
from rowcast.calibration.learning.gguf_export import GROUP, check_exportable, q8_bytes, write_gguf
from rowcast.calibration.learning.judge import Figures, ModuleSubject, hidden_states, judge
from rowcast.calibration.learning.losses import head_divergence, mixed_term
from rowcast.calibration.learning.module import load_module, make_module, write_module
from rowcast.calibration.learning.part import Part, World
from rowcast.calibration.learning.progress import LearningProgress
from rowcast.calibration.learning.state import WorkFolder
from rowcast.calibration.learning.streaming import check_streams, stream
from rowcast.calibration.learning.trainer import Trained, Trainer, TrainSettings
from rowcast.calibration.learning.writing import Writing, write
from rowcast.calibration.text import read_text
from rowcast.errors import UserError
from rowcast.runtime import device as devices
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.ladder.drafts import Draft, check_vocabulary
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

FORMAT = 1
HEAD_DIM = 64
CONTEXTS = (512, 7936)
GRAM_ROWS = 1 << 14
"""Of embeddings, that are held in float64 at a time."""
JUDGED_LAST = 1024
"""Of a long context, so many last tokens are judged: those that have it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a draft is made with."""

    hidden: int | None = None
    """Its width; None: the greatest multiple of 32 with which the draft takes at most `most_bytes` in 8 bits."""
    layers: int = 4
    heads: int = 4
    neurons: int | None = None
    """None: 4 times the width."""
    most_bytes: int = 16_000_000
    streaming: int = 256
    """KV entries that it sees, as in the ladder draft:kv=256; 0: all."""
    start: str | None = None
    """A draft to go on from; sizes are then its own."""
    window: int = 1024
    """Tokens of a training window: several times what it sees, so that most of its tokens see a window that has moved on."""
    batch: int = 64
    """Windows of a step, over all processes."""
    steps: int = 4000
    learning_rate: float = 2e-3
    warmup: int = 100
    accumulate: int = 1
    variation: float = 0.0
    """Weight of total variation in the loss beside KL, at the last step. It rises up to there: far from the target it says little."""
    written_tokens: int = 20_000_000
    """That the target writes; 0: text given alone."""
    prompt_tokens: int = 32
    text_share: float = 0.15
    """Of the windows, from texts as they are."""
    bits: int = 8
    """Of the weights as they are stored: 8, or 16."""
    judged_tokens: int = 32768
    """Held-out tokens, at most, that acceptance is measured on at each context."""
    contexts: tuple[int, ...] = CONTEXTS
    """Tokens of context to measure at, as far as the target and the held-out text have them."""
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for what cannot be."""
        for name, count, least in (
            ("hidden", self.hidden, GROUP), ("layers", self.layers, 1), ("heads", self.heads, 1), ("neurons", self.neurons, 1),
            ("batch", self.batch, 1), ("written", self.written_tokens, 0), ("streaming", self.streaming, 0), ("seed", self.seed, 0),
            ("judged", self.judged_tokens, 1), ("context", min(self.contexts, default=2), 2), ("accumulate", self.accumulate, 1),
        ):  # fmt: skip
            if count is not None and count < least:
                raise UserError(f"--{name} {count} is too low: give {least} or more")
        for name, share in (("text-share", self.text_share), ("variation", self.variation)):
            if not 0 <= share <= 1:
                raise UserError(f"--{name} {share:g} is not a share: give a number from 0 to 1")
        if self.bits not in (8, 16):
            raise UserError(f"--bits {self.bits} is no way to store a draft: use 8 or 16")
        if self.hidden is not None and self.hidden % 2:
            raise UserError(f"--hidden {self.hidden} is odd: give an even width")
        if self.batch % self.accumulate:
            raise UserError(f"--accumulate {self.accumulate} does not divide --batch {self.batch}: give a divisor")
        if self.seed >> 32:
            raise UserError(f"--seed {self.seed} is too high: give a number below 2^32")
        self.training.check()

    @property
    def training(self) -> TrainSettings:
        return TrainSettings(self.steps, self.learning_rate, self.warmup, accumulate=self.accumulate)


def distill(
    target: str | Checkpoint,
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
    """Train a draft for `target` and write it to the folder `output`, with rowcast.json: how it was made and its figures, returned.

    Killed and called again in the same way it goes on where it was. `held_out`: texts that only judge. `compiled`: the target with
    torch.compile, which takes a minute and is faster then; it changes the last bits. Raises UserError for bad input, Unfinished where
    `part_minutes` are over or a signal came, with everything saved.
    """
    settings.check()
    checkpoint = target if isinstance(target, Checkpoint) else open_checkpoint(target)
    spec, tokenizer = spec_from_config(checkpoint.config), load_tokenizer(checkpoint)
    if settings.window > spec.max_context:
        raise UserError(f"--window {settings.window} is longer than the model's context of {spec.max_context}: lower it")
    start = None if settings.start is None else _open_start(settings.start, spec, tokenizer)
    config = draft_config(checkpoint, spec, settings) if start is None else start.config
    if settings.bits == 8:
        check_exportable({**config, "rope_parameters": _rope(config)})
    if settings.streaming:
        check_streams(spec_from_config(config), settings.streaming)
    read = [{"name": path.name, "sha256": read_text(path)[1]} for path in (*texts, *held_out)]
    world = World(device)
    world.check_shares(settings.batch, settings.accumulate)
    where = world.device or devices.choose_device(device)[0]
    kind = devices.DTYPES[devices.choose_dtype(dtype, checkpoint.stored_dtype, where)[0]]
    begun_with = {
        "format": FORMAT, "command": "distill", "target": checkpoint.path.name, "fingerprint": checkpoint.source.fingerprint(),
        "texts": read[: len(texts)], "held_out": read[len(texts) :], "dtype": str(kind).removeprefix("torch."),
        "processes": world.size, "compiled": compiled, **asdict(settings),
        **({} if start is None else {"start_fingerprint": start.source.fingerprint()}),
    }  # fmt: skip
    with Part(part_minutes) as part:
        folder = WorkFolder(output, begun_with, restart=restart, leads=world.leads)
        world.wait()
        if folder.finished:
            return folder.description()
        job = _Job(checkpoint, spec, settings, folder, world, part, where, kind, compiled, show)
        return job.run(config, start, tokenizer, texts, held_out, save_seconds)


def draft_config(checkpoint: Checkpoint, spec: ModelSpec, settings: Settings) -> dict[str, Any]:
    """config.json of a new draft: a Llama with the target's vocabulary and special tokens. Raises UserError where no width fits."""
    hidden = settings.hidden or _width(spec.vocab_size, settings)
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": spec.vocab_size,
        "hidden_size": hidden,
        "intermediate_size": settings.neurons or 4 * hidden,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "head_dim": HEAD_DIM if hidden >= HEAD_DIM else hidden // 2 * 2,
        "max_position_embeddings": spec.max_context,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }
    special = {**checkpoint.config, **checkpoint.generation_config}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = special.get(key)
        value = value[0] if isinstance(value, list) and value else value
        config[key] = value if isinstance(value, int) else None
    return config


def parameters(vocab_size: int, hidden: int, settings: Settings) -> int:
    """Of a draft of that width."""
    head_dim = HEAD_DIM if hidden >= HEAD_DIM else hidden // 2 * 2
    layer = 4 * hidden * settings.heads * head_dim + 3 * hidden * (settings.neurons or 4 * hidden) + 2 * hidden
    return vocab_size * hidden + settings.layers * layer + hidden


def _width(vocab_size: int, settings: Settings) -> int:
    fits = [
        hidden
        for hidden in range(GROUP, 4096, GROUP)
        if q8_bytes(parameters(vocab_size, hidden, settings)) <= settings.most_bytes
    ]
    if not fits:
        least = q8_bytes(parameters(vocab_size, GROUP, settings)) / 1e6
        raise UserError(
            f"a draft of {vocab_size} tokens and {settings.layers} layers takes {least:.1f} MB at least, --size allows "
            f"{settings.most_bytes / 1e6:.1f}: raise it"
        )
    return max(fits)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta"), **found}


def _open_start(name: str, spec: ModelSpec, tokenizer: Tokenizer) -> Checkpoint:
    found = open_checkpoint(name)
    draft = Draft(found, spec_from_config(found.config), found.source.fingerprint())
    check_vocabulary(name, draft, spec, tokenizer)
    return found


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

    def run(
        self,
        config: Mapping[str, Any],
        start: Checkpoint | None,
        tokenizer: Tokenizer,
        texts: Sequence[Path],
        held_out: Sequence[Path],
        save_seconds: float,
    ) -> dict[str, Any]:
        settings, world = self.settings, self.world
        corpus = self._corpus(texts, held_out, tokenizer)
        speed = 0.0
        if settings.written_tokens:
            writing = Writing(settings.written_tokens, settings.window, settings.prompt_tokens)
            speed = write(
                self.checkpoint, corpus, self.folder.path, writing,
                dtype=self.dtype, device=self.device, world=world, part=self.part, show=self.show,
            )  # fmt: skip
        teacher = load_module(self.checkpoint, self.dtype, self.device).requires_grad_(False)
        student = self._student(config, start, teacher)
        trained = self._train(student, teacher, corpus, save_seconds)
        if world.agree(int(self.part.over), self.device):
            raise self.part.stop()
        description: dict[str, Any] = {
            "target": self.checkpoint.path.name,
            "parameters": sum(value.numel() for value in student.parameters()),
            "config": {key: config.get(key) for key in _SIZES},
            "texts": corpus.describe(),
            "written_tokens": corpus.written_tokens,
            "writing_tokens_per_s": speed or None,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "training": trained.to_json(),
        }
        if world.leads:
            stored = self.folder.path / "stored"
            stored.mkdir(exist_ok=True)
            self._store(student, stored)
            description["bytes"] = sum(
                path.stat().st_size for path in stored.iterdir() if path.suffix in (".gguf", ".safetensors")
            )
            figures = self._judge(open_checkpoint(str(stored)), teacher, corpus)
            description["held_out"] = {str(context): found.to_json() for context, found in figures.items()}
            self.folder.publish(lambda part: self._store(student, part), description)
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

    def _student(self, config: Mapping[str, Any], start: Checkpoint | None, teacher: Any) -> Any:
        if start is not None:
            student = load_module(start, torch.float32, self.device)
        else:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(self.settings.seed)
                student = make_module(config, torch.float32, "cpu").to(self.device)
            student.get_input_embeddings().weight.data.copy_(
                reduced(teacher.get_input_embeddings().weight, config["hidden_size"])
            )
        if self.settings.streaming:
            stream(student, self.settings.streaming)
        return student

    def _train(self, student: Any, teacher: Any, corpus: Corpus, save_seconds: float) -> Trained:
        settings = self.settings
        # The teacher alone: it has most of the time, and inductor does not take the student's attention.
        theirs: Callable[[Any, Tensor], Tensor] = _Compiled(hidden_states) if self.compiled else hidden_states
        head, teacher_head = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight

        def loss_of(step: int, part: int, parts: int) -> Tensor:
            ids = corpus.batch(step, settings.batch)[part::parts].to(self.device, non_blocking=True)
            with torch.no_grad(), torch.autocast("cuda", enabled=False):  # in its own format, as when it judges
                known = theirs(teacher, ids)
            term = mixed_term(settings.variation * step / settings.steps)
            return head_divergence(hidden_states(student, ids).flatten(0, 1), head, known.flatten(0, 1), teacher_head, term=term)

        trainer = Trainer(
            student, loss_of, settings.training, self.folder.path, device=self.device,
            batch_tokens=settings.batch * settings.window, world=self.world, part=self.part, save_seconds=save_seconds,
            name="distilling", show=self.show,
        )  # fmt: skip
        return trainer.run()

    def _store(self, student: Any, folder: Path) -> None:
        if self.settings.bits == 8:
            write_gguf(student, folder, f"draft for {self.checkpoint.path.name}")
        else:
            write_module(student, self.checkpoint, folder, {"target": self.checkpoint.path.name}, torch.float16)

    def _judge(self, stored: Checkpoint, teacher: Any, corpus: Corpus) -> dict[int, Figures]:
        """The draft as it is stored, over held-out windows of each context."""
        draft = load_module(stored, self.dtype, self.device)
        if self.settings.streaming:
            stream(draft, self.settings.streaming)
        found: dict[int, Figures] = {}
        for context in self.settings.contexts:
            size = min(context, self.spec.max_context)
            skip = max(0, size - 1 - JUDGED_LAST) if size > 2 * JUDGED_LAST else 0
            windows = corpus.held(size, max(1, self.settings.judged_tokens // (size - skip)))
            if not len(windows) or size in found:
                log.warning("no held-out text has %d tokens: acceptance is not measured at that context", size)
                continue
            with LearningProgress(f"judging at {size}", windows.numel(), self.show if self.world.leads else False) as bar:
                found[size] = judge(
                    ModuleSubject(teacher), {"draft": ModuleSubject(draft)}, windows, device=self.device, skip=skip,
                    advance=lambda tokens: self._judged(bar, tokens),
                )["draft"]  # fmt: skip
        return found

    def _judged(self, bar: LearningProgress, tokens: int) -> None:
        bar.advance(tokens)
        if self.part.asked and self.world.size == 1:  # of several, the others wait for this one
            raise self.part.stop()


_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
)  # fmt: skip


def reduced(embeddings: Tensor, width: int) -> Tensor:
    """Embeddings [V, D] along their `width` main directions (uncentred), [V, width] float32; zeros beyond D.

    U S of their singular value decomposition, by the eigenvectors of E^T E, each with the sign that makes its greatest entry positive.
    """
    rows = embeddings.detach().float()
    gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), GRAM_ROWS):
        part = rows[start : start + GRAM_ROWS].double()
        gram += part.T @ part
    directions = torch.linalg.eigh(gram.cpu()).eigenvectors.flip(1)[:, :width]
    greatest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    along = rows @ (directions * greatest.sign()).float().to(rows.device)
    return torch.nn.functional.pad(along, (0, width - along.shape[1]))


class _Compiled:
    """A function by torch.compile; as it is, with a warning, where that fails."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._plain = function
        self._function: Callable[..., Any] = torch.compile(function, dynamic=False)

    def __call__(self, *args: Any) -> Any:
        if self._function is self._plain:
            return self._plain(*args)
        try:
            return self._function(*args)
        except Exception as error:  # of the compiler, its code generators and drivers
            log.warning(
                "torch.compile fails (%s: %s): going on without it", type(error).__name__, str(error).split("\n")[0][:200]
            )
            self._function = self._plain
            return self._plain(*args)

"""`distill`: a small draft that learns a target's laws, from text that the target writes and text that is given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowcast.calibration.learning.gguf_export import GROUP, check_exportable, q8_bytes, write_gguf
from rowcast.calibration.learning.job import How, Job, Lesson, Opened, learn
from rowcast.calibration.learning.judge import Figures, ModuleSubject, hidden_states, judge
from rowcast.calibration.learning.losses import head_divergence, mixed_term
from rowcast.calibration.learning.module import load_module, make_module, write_module
from rowcast.calibration.learning.settings import LearningSettings, Optimizer, check_least, check_share
from rowcast.calibration.learning.streaming import check_streams, stream
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.ladder.drafts import Draft, check_vocabulary
from rowcast.runtime.spec import ModelSpec

log = logging.getLogger(__name__)

HEAD_DIM = 64
CONTEXTS = (512, 7936)
GRAM_ROWS = 1 << 14
"""Of embeddings, that are held in float64 at a time."""
JUDGED_LAST = 1024
"""Of a long context, so many last tokens are judged: those that have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(LearningSettings):
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
    bits: int = 8
    """Of the weights as they are stored: 8, or 16."""
    window: int = 1024
    """Several times what it sees, so that most of its tokens see a window that has moved on."""
    batch: int = 64
    steps: int = 4000
    learning_rate: float = 5e-3
    optimizer: Optimizer = "muon"
    muon_rate: float = 4e-3
    variation: float = 0.0
    """Weight of total variation in the loss beside KL, at the last step. It rises up to there: far from the target it says little."""
    written_tokens: int = 20_000_000
    text_share: float = 0.15
    judged_tokens: int = 32768
    """At each context."""
    contexts: tuple[int, ...] = CONTEXTS
    """Tokens of context to measure at, as far as the target and the held-out text have them."""

    def check(self, spec: ModelSpec) -> None:
        """Raise UserError for what cannot be, of a target like this."""
        self.check_learning(spec)
        check_least(
            ("hidden", self.hidden, GROUP), ("layers", self.layers, 1), ("heads", self.heads, 1), ("neurons", self.neurons, 1),
            ("streaming", self.streaming, 0), ("context", min(self.contexts, default=2), 2),
        )  # fmt: skip
        check_share("variation", self.variation)
        if self.bits not in (8, 16):
            raise UserError(f"--bits {self.bits} is no way to store a draft: use 8 or 16")
        if self.hidden is not None and self.hidden % 2:
            raise UserError(f"--hidden {self.hidden} is odd: give an even width")


def distill(
    target: str | Checkpoint,
    texts: Sequence[Path],
    output: Path,
    settings: Settings,
    how: How | None = None,
    *,
    held_out: Sequence[Path] = (),
    compiled: bool = False,
) -> dict[str, Any]:
    """Train a draft for `target` and write it to the folder `output`, with rowcast.json: how it was made and its figures, returned.

    Killed and called again in the same way it goes on where it was. `held_out`: texts that only judge. `compiled`: the target with
    torch.compile, which takes a minute and is faster then; it changes the last bits. Raises UserError for bad input, Unfinished where
    `how.part_minutes` are over or a signal came, with everything saved.
    """
    opened = Opened.of(target, settings.check)
    start = None if settings.start is None else _open_start(settings.start, opened)
    config = draft_config(opened.checkpoint, opened.spec, settings) if start is None else start.config
    if settings.bits == 8:
        check_exportable({**config, "rope_parameters": _rope(config)})
    if settings.streaming:
        check_streams(spec_from_config(config), settings.streaming)
    begun_with: dict[str, Any] = {"compiled": compiled}
    if start is not None:
        begun_with["start_fingerprint"] = start.source.fingerprint()
    return learn(
        "distill", opened, settings, texts, output, how, lambda job: _Distilling(job, settings, config, start, compiled).run(),
        held_out=held_out, begun_with=begun_with, reads=() if start is None else (start.path,),
    )  # fmt: skip


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


def _open_start(name: str, opened: Opened) -> Checkpoint:
    found = open_checkpoint(name)
    draft = Draft(found, spec_from_config(found.config), found.source.fingerprint())
    check_vocabulary(name, draft, opened.spec, opened.tokenizer)
    return found


@dataclass(frozen=True, slots=True)
class _Distilling:
    job: Job
    settings: Settings
    config: Mapping[str, Any]
    """The draft's."""
    start: Checkpoint | None
    compiled: bool

    def run(self) -> dict[str, Any]:
        job, settings = self.job, self.settings
        teacher = load_module(job.opened.checkpoint, job.dtype, job.device).requires_grad_(False)
        student = self._student(teacher)
        head, teacher_head = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight

        def loss_of(lesson: Lesson) -> Tensor:
            term = mixed_term(settings.variation * lesson.step / settings.steps)
            ours = hidden_states(student, lesson.ids)
            return head_divergence(ours.flatten(0, 1), head, lesson.known.flatten(0, 1), teacher_head, term=term)

        # The teacher alone: it has most of the time, and inductor does not take the student's attention.
        hidden = _Compiled(hidden_states) if self.compiled else None
        trained = job.train(student, teacher, loss_of, "distilling", hidden)
        job.pause()
        description: dict[str, Any] = {
            "target": job.opened.checkpoint.path.name,
            "parameters": sum(value.numel() for value in student.parameters()),
            "config": {key: self.config.get(key) for key in _SIZES},
            **job.describe(trained),
        }

        def finish() -> None:
            stored = job.folder.path / "stored"
            stored.mkdir(exist_ok=True)
            self._store(student, stored)
            weights = (path for path in stored.iterdir() if path.suffix in (".gguf", ".safetensors"))
            description["bytes"] = sum(path.stat().st_size for path in weights)
            figures = self._judge(open_checkpoint(str(stored)), teacher)
            description["held_out"] = {str(context): found.to_json() for context, found in figures.items()}
            job.folder.publish(lambda folder: self._store(student, folder), description)

        job.lead(finish)
        return description

    def _student(self, teacher: Any) -> Any:
        device = self.job.device
        if self.start is not None:
            student = load_module(self.start, torch.float32, device)
        else:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(self.settings.seed)
                student = make_module(self.config, torch.float32, "cpu").to(device)
            student.get_input_embeddings().weight.data.copy_(
                reduced(teacher.get_input_embeddings().weight, self.config["hidden_size"])
            )
        if self.settings.streaming:
            stream(student, self.settings.streaming)
        return student

    def _store(self, student: Any, folder: Path) -> None:
        target = self.job.opened.checkpoint
        if self.settings.bits == 8:
            write_gguf(student, folder, f"draft for {target.path.name}")
        else:
            write_module(student, target, folder, {"target": target.path.name}, torch.float16)

    def _judge(self, stored: Checkpoint, teacher: Any) -> dict[int, Figures]:
        """The draft as it is stored, over held-out windows of each context."""
        job = self.job
        draft = load_module(stored, job.dtype, job.device)
        if self.settings.streaming:
            stream(draft, self.settings.streaming)
        found: dict[int, Figures] = {}
        for context in self.settings.contexts:
            size = min(context, job.opened.spec.max_context)
            skip = max(0, size - 1 - JUDGED_LAST) if size > 2 * JUDGED_LAST else 0
            windows = job.corpus.held(size, max(1, self.settings.judged_tokens // (size - skip)))
            if not len(windows) or size in found:
                log.warning("no held-out text has %d tokens: acceptance is not measured at that context", size)
                continue
            with job.bar(f"judging at {size}", windows.numel()) as advance:
                found[size] = judge(
                    ModuleSubject(teacher),
                    {"draft": ModuleSubject(draft)},
                    windows,
                    device=job.device,
                    skip=skip,
                    advance=advance,
                )["draft"]
        return found


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

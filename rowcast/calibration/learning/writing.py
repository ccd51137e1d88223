"""Text that the model writes itself, to learn its laws from: many sequences at once, all at the same position.

The decoder and the weights are the engine's; its scheduler, sampler and paged KV are made for requests that come and go, and run at
most 64 sequences in one captured round (`device_round/program.py`). A thousand sequences in lock step need none of that: one position
for all, K/V in one block, one captured graph for each length of it. Files of whole sequences stay when the run is cut off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.calibration.learning.corpus import Corpus, id_type
from rowcast.calibration.learning.part import Part, World
from rowcast.calibration.learning.progress import LearningProgress
from rowcast.calibration.learning.state import write_whole
from rowcast.errors import UserError
from rowcast.runtime import device as devices
from rowcast.runtime.checkpoint import Checkpoint
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv.paged import alibi
from rowcast.runtime.protocols import Tokens
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token, parameter_count
from rowcast.runtime.weights import DenseWeights

SIZES = "writing.json"
GPU_SEQUENCES, CPU_SEQUENCES = 1024, 32
BUCKET = 128
"""K/V is read up to a multiple of so many entries: each has a graph of its own."""
KV_SHARE = 0.5
"""Of the memory that is free beside the weights, at most, that K/V of all sequences takes."""
LOOK_STEPS = 64
"""Between looks at whether the part is over, and what a bar is told."""
LOWER = "--written; training after it is made shorter by --steps, --batch and --window"
"""Where it takes long."""


@dataclass(frozen=True, slots=True)
class Writing:
    """What is to be written."""

    tokens: int
    """In all, prompts included; rounded up to whole sequences."""
    length: int
    """Of a sequence, its prompt included."""
    prompt_tokens: int = 32
    """From a text, at a place of its own."""
    free_share: float = 0.1
    """Of the sequences, which begin with the BOS token alone and are the model's own from there on."""
    temperature: float = 1.0

    def check(self, context: int) -> None:
        """Raise UserError for what cannot be, of a model of this context."""
        if self.length > context:
            raise UserError(f"sequences of {self.length} tokens are longer than the model's context of {context}: lower --window")
        if not 0 < self.prompt_tokens < self.length:
            raise UserError(
                f"--prompt-tokens {self.prompt_tokens} leaves nothing to write of a --window of {self.length}: give a number from 1 to "
                f"{self.length - 1}"
            )
        if not 0 <= self.free_share <= 1:
            raise UserError(f"a share of {self.free_share:g} sequences is none: give a number from 0 to 1")


def write(
    checkpoint: Checkpoint,
    corpus: Corpus,
    folder: Path,
    writing: Writing,
    *,
    dtype: torch.dtype,
    device: torch.device,
    world: World | None = None,
    part: Part | None = None,
    show: bool | None = None,
) -> float:
    """Write what is missing into `folder` and add all to `corpus`. Returns this call's tokens a second, over all processes; 0 where
    nothing was missing.

    Raises Unfinished where the part is over: whole files stay. There is one more at least than before, however short the part is; only
    a signal ends it sooner.
    """
    spec = spec_from_config(checkpoint.config)
    writing.check(spec.max_context)
    world, part = world or World(), part or Part()
    sequences = _sequences(folder, spec, writing, dtype, device, world)
    count = math.ceil(writing.tokens / (sequences * writing.length))
    files = [folder / f"written-{number:05}.bin" for number in range(count)]
    per_file, speed = sequences * writing.length, 0.0
    shown = show if world.leads else False
    if not all(file.exists() for file in files):
        lower = LOWER if device.type == "cpu" and world.leads else ""
        with LearningProgress("writing", count * per_file, shown, lower=lower) as bar:
            bar.advance(sum(file.exists() for file in files) * per_file, new=False)
            writer = Writer(checkpoint, spec, sequences, writing.length, dtype=dtype, device=device)
            first = True
            while missing := [number for number, file in enumerate(files) if not file.exists()]:
                world.wait()  # all have looked before the first one writes
                mine, at_once = missing[world.rank : world.rank + 1], min(world.size, len(missing))
                for number in mine:
                    begins = _begins(checkpoint, corpus, writing, sequences, number)
                    ids = writer.write(
                        *begins, writing.temperature, corpus.seed + number, part, whole=first,
                        advance=lambda tokens, files=at_once: bar.advance(files * tokens),  # type: ignore[misc]
                    )  # fmt: skip
                    if ids is not None:
                        write_whole(files[number], ids.numpy().astype(id_type(spec.vocab_size)).tobytes())
                first = False
                world.wait()
                world.stop_together(part.stop() if part.over else None, device)
            speed = bar.tokens_per_s
        del writer
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for file in files:
        corpus.add_written(file, writing.length)
    return speed


class Writer:
    """A model that writes `sequences` texts of `length` tokens at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        sequences: int,
        length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        weights = DenseWeights(spec, checkpoint.source, SoloComm(), dtype=dtype, device=device)
        self._decoder = Decoder(weights, SoloComm(), device)
        self._kv: Any = LockstepKV(spec, sequences, length, dtype=dtype, device=device)
        self._device, self._length = device, length
        self._ids = torch.zeros(sequences, length, dtype=torch.int64, device=device)
        self._prompts = torch.zeros(sequences, dtype=torch.int64, device=device)
        """Tokens that each row was given."""
        self._temperature = 1.0
        self._pool: Any = None
        self._steps: dict[int, Callable[[], None]] = {}
        """By how much of the K/V is read, for one temperature."""

    def write(
        self,
        ids: Tensor,
        prompts: Tensor,
        temperature: float,
        seed: int,
        part: Part,
        *,
        whole: bool = False,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> Tensor | None:
        """Go on from ids [S, P], the first prompts[i] of row i: [S, L], on the CPU.

        None where the part is over before the end, or with `whole` a signal came. `advance` is told of tokens that are done, and of
        as many below 0 where None makes them vain.
        """
        if temperature != self._temperature:
            self._temperature, self._steps = temperature, {}
        self._ids.zero_()
        self._ids[:, : ids.shape[1]] = ids.to(self._device)
        self._prompts.copy_(prompts)
        self._kv.position.zero_()
        with _seeded(seed, self._device):
            for place in range(self._length - 1):
                if place % LOOK_STEPS == 0:
                    if place:
                        if self._device.type == "cuda":  # steps are launched long before they have run
                            torch.cuda.current_stream(self._device).synchronize()
                        advance(LOOK_STEPS * len(ids))
                    if part.over and (part.asked or not whole):
                        advance(-place * len(ids))
                        return None
                self._step(min(self._length, place // BUCKET * BUCKET + BUCKET))()
        written = self._ids.cpu()
        advance((self._length - (self._length - 2) // LOOK_STEPS * LOOK_STEPS) * len(ids))
        return written

    def _step(self, bound: int) -> Callable[[], None]:
        if bound not in self._steps:
            self._steps[bound] = self._captured(bound) if self._device.type == "cuda" else lambda: self._move(bound)
        return self._steps[bound]

    def _captured(self, bound: int) -> Callable[[], None]:
        """The step as a graph. Making it moves nothing on."""
        place, ids, draws = self._kv.position.clone(), self._ids.clone(), torch.cuda.get_rng_state(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._kv.position.copy_(place)
                self._move(bound)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._kv.position.copy_(place)
        self._ids.copy_(ids)
        torch.cuda.set_rng_state(draws, self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._move(bound)
        self._pool = graph.pool()
        return graph.replay

    @torch.inference_mode()
    def _move(self, bound: int) -> None:
        """Run the token at the position of all sequences, and put the next one in its place where none was given."""
        kv, at = self._kv, self._kv.position
        kv.bound = bound
        ids = self._ids.index_select(1, at)[:, 0]
        positions = at.expand(len(ids))
        hidden = self._decoder.forward(Tokens(ids, positions, self._prompts, ()), kv)
        drawn = self._draw(self._decoder.logits(hidden))
        following = at + 1
        given = self._ids.index_select(1, following)[:, 0]
        chosen = torch.where(following < self._prompts, given, drawn)
        self._ids.index_copy_(1, following, chosen[:, None])
        at.add_(1)

    def _draw(self, logits: Tensor) -> Tensor:
        # [S, V] -> [S]: p / e with e exponential is greatest at i with probability p_i
        if self._temperature == 0:
            return logits.argmax(-1)
        p = F.softmax(logits.float() / self._temperature, -1)
        return p.div_(torch.empty_like(p).exponential_()).argmax(-1)


class LockstepKV:
    """K/V of sequences that all stand at `position`, [layers, S, K, L, d] each: of a `KVView`, what a pass asks."""

    def __init__(self, spec: ModelSpec, sequences: int, length: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.bound = spec, length
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        shape = (spec.num_layers, sequences, spec.num_kv_heads, length, spec.head_dim)
        self._keys, self._values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self._slopes, self._absolute = alibi(spec, Shard(), device)
        self._places = torch.arange(length, device=device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:  # [S, K, d] each
        self._keys[layer].index_copy_(2, self.position, k[:, :, None])
        self._values[layer].index_copy_(2, self.position, v[:, :, None])

    def attend(self, layer: int, q: Tensor, heads: Tensor | None = None) -> Tensor:  # [S, H, d] -> [S, H, d]
        assert heads is None
        count, all_heads, size = q.shape
        groups = self.spec.num_kv_heads
        k, v = self._keys[layer, :, :, : self.bound], self._values[layer, :, :, : self.bound]
        mask = self._mask(layer, q.dtype).expand(count, groups, all_heads // groups, self.bound)
        queries = q.view(count, groups, all_heads // groups, size)
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=self.spec.attention_scale)
        return out.reshape(count, all_heads, size)

    def _mask(self, layer: int, dtype: torch.dtype) -> Tensor:
        # bool [1, 1, 1, bound], or with slopes additive [1, K, H / K, bound]
        places, window = self._places[: self.bound], self.spec.windows[layer]
        seen = places <= self.position
        if window is not None:
            seen = seen & (places > self.position - window)
        if self._slopes is None:
            return seen[None, None, None]
        slopes = self._slopes.view(1, self.spec.num_kv_heads, -1, 1)
        if self._absolute is None:
            bias = slopes.float() * (places - self.position)
        else:
            bias = (slopes.bfloat16() * places.bfloat16()).float() * self._absolute
        return torch.where(seen, bias, float("-inf")).to(dtype)


def _sequences(folder: Path, spec: ModelSpec, writing: Writing, dtype: torch.dtype, device: torch.device, world: World) -> int:
    """How many are written at a time: as many as when it began."""
    path = folder / SIZES
    settings = json.loads(json.dumps(asdict(writing)))
    if not world.agree(int(path.exists()), device):  # the leader's look: another's may come after it has written
        kv_bytes = kv_bytes_per_token(spec, dtype.itemsize) * writing.length
        free = devices.available_bytes(device) - parameter_count(spec) * dtype.itemsize
        fit = int(max(0, free) * KV_SHARE / kv_bytes)
        most = GPU_SEQUENCES if device.type == "cuda" else CPU_SEQUENCES
        sequences = max(1, min(most, fit, math.ceil(writing.tokens / writing.length)))
        sequences = world.agree(sequences, device)
        if world.leads:
            write_whole(path, json.dumps({"sequences": sequences, **settings}).encode())
        world.wait()
    found = json.loads(path.read_bytes())
    if {key: found.get(key) for key in settings} != settings:
        raise UserError(f"{folder} holds text of other settings: add --restart to begin anew")
    return int(found["sequences"])


def _begins(checkpoint: Checkpoint, corpus: Corpus, writing: Writing, sequences: int, number: int) -> tuple[Tensor, Tensor]:
    """What the sequences of one file begin with: ids [S, P], and how many of them each row is given [S]."""
    ids = corpus.prompts(sequences, writing.prompt_tokens, number)
    given = torch.full((sequences,), writing.prompt_tokens)
    bos = checkpoint.generation_config.get("bos_token_id", checkpoint.config.get("bos_token_id"))
    if isinstance(bos, int) and (free := round(sequences * writing.free_share)):
        ids[:free, 0], given[:free] = bos, 1
    return ids, given


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.default_rng([seed, 3]).integers(1 << 62)))
        yield

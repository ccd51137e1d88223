"""The seams between packages: who computes, who holds KV, who talks to other ranks, who reads weights from disk.

Torch types only. `runtime` offers one plain implementation of each; `offload`, `cluster` and `calibration` add others, which are
injected from outside, so the decoder's maths never learns where bytes are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from rowcast.kernels.packed import Packed
from rowcast.kernels.packed_sizes import Form
from rowcast.runtime.norm import Norm
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a forward pass reads of T tokens; tensors are [T] int64, on the device."""

    ids: Tensor
    positions: Tensor
    prompt_lengths: Tensor
    """Of each token's request; dynamic NTK scaling reads it."""
    steps: Sequence[SeqStep]
    """Whose they are, in order: what the host knows of them without asking the device. Empty in a pass of the device's own round, all
    of whose tokens are generated ones."""

    @property
    def generated(self) -> list[bool]:
        """For each token, whether it lies behind its request's prompt."""
        if not self.steps:
            return [True] * len(self.ids)
        return [p >= s.prompt_length for s in self.steps for p in range(s.start, s.start + len(s.tokens))]


@dataclass(slots=True)
class Reads:
    """What a weight view read, and of how much: sums over passes, layers and tokens."""

    bytes: int = 0
    neurons: int = 0
    """Rows of neurons that tokens used, each token its own."""
    neurons_of: int = 0
    """Those that the same tokens would have used of a dense model."""
    heads: int = 0
    heads_of: int = 0
    overflows: int = 0
    """Choices that were larger than their buffer: everything was read instead."""
    fallbacks: int = 0
    """Rows of logits for which the certificate failed: the whole LM head was read."""
    neurons_by_layer: list[int] = field(default_factory=list)
    """`neurons`, layer by layer; layers behind the end have none. Empty for views that leave none out."""
    heads_by_layer: list[int] = field(default_factory=list)
    """Likewise, of `heads`."""

    def use(self, what: Literal["neurons", "heads"], count: int, layer: int | None) -> None:
        """Count what the tokens used of a layer. None: of a view that leaves none out."""
        setattr(self, what, getattr(self, what) + count)
        if layer is not None:
            by_layer = self.neurons_by_layer if what == "neurons" else self.heads_by_layer
            by_layer.extend([0] * (layer + 1 - len(by_layer)))
            by_layer[layer] += count

    def numbers(self, layers: int) -> list[int]:
        """All of it, for `of`: the sums, then so many layers' neurons and heads."""
        found = [getattr(self, name) for name in SUMS]
        for by_layer in (self.neurons_by_layer, self.heads_by_layer):
            found += by_layer + [0] * (layers - len(by_layer))
        return found

    @classmethod
    def of(cls, numbers: Sequence[int], layers: int) -> Reads:
        """From `numbers`."""
        neurons, heads = list(numbers[len(SUMS) : len(SUMS) + layers]), list(numbers[len(SUMS) + layers :])
        found = cls(neurons_by_layer=neurons if any(neurons) else [], heads_by_layer=heads if any(heads) else [])
        for name, number in zip(SUMS, numbers, strict=False):
            setattr(found, name, number)
        return found


SUMS: Final = ("bytes", "neurons", "neurons_of", "heads", "heads_of", "overflows", "fallbacks")
"""Fields of `Reads` that are sums over layers, in order."""


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens of one sequence."""

    seq_id: int
    positions: range


@dataclass(frozen=True, slots=True)
class Late:
    """K/V of L tokens of earlier passes, for heads that those skipped and the bound tokens use."""

    heads: Tensor | None
    """[C] int64, this rank's KV heads; None: all."""
    spans: Sequence[Span]
    """Whose they are, in order."""
    positions: Tensor
    """[L] int64."""
    prompt_lengths: Tensor
    """[L] int64, of their requests."""
    k: Tensor
    """[L, C, d]."""
    v: Tensor
    """[L, C, d]."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one layer that a pass computes."""

    queries: Tensor | None = None
    """[C] int64, ascending, this rank's query heads; None: all."""
    late: Late | None = None
    """To be written before the pass attends; k before RoPE."""


ALL_HEADS: Final = Heads()

Rotation: TypeAlias = tuple[Tensor, Tensor] | None
"""cos and sin [T, 1, d] of a pass, in its number format; None where positions are not rotated."""


class Comm(Protocol):
    """Tensor-parallel communication. Every rank makes the same calls in the same order."""

    rank: int
    world: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum `x` over all ranks. May overwrite `x`; the result is the same on every rank."""
        ...

    def all_reduce_norm(self, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """The sum of x [T, D] as `all_reduce` gives it, and its norm, whose last bits may be others than `norm` alone gives. May
        overwrite `x`; both are the same on every rank, and a token's do not depend on how many there are, up to 16."""
        ...

    def exchange(self, x: Tensor) -> Tensor:
        """Gather equal shapes from all ranks: [...] -> [world, ...], rank order, the same on every rank. Does not modify `x`."""
        ...


class Decisions(Protocol):
    """What may come out differently on each rank, as it depends on the clock, is decided by one of them for all."""

    leads: bool
    """Whether this rank decides."""

    def share(self, numbers: Sequence[int]) -> list[int]:
        """The deciding rank's numbers, on every rank. Each gives as many; those of the others do not count."""
        ...

    def share_tensor(self, x: Tensor) -> Tensor:
        """The deciding rank's tensor, on every rank. Each gives one of its shape and kind, which may be overwritten."""
        ...


class Source(Protocol):
    """Named tensors of one checkpoint, read by slice. Names are Hugging Face's, whatever the file format."""

    def names(self) -> Sequence[str]:
        """All tensor names, in file order."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor. Raises KeyError for an unknown name."""
        ...

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        """A slice of one tensor, rows along dimension 0 and columns along dimension 1, on the CPU.

        Reads the bytes of that slice only (for block-quantised files: of the blocks that hold it). With `out` the values are
        converted into it and `out` is returned: any floating dtype, the shape of the slice, any strides (a transposed view
        included). Without, a new contiguous tensor in the file's own dtype (float32 for quantised tensors). Memory beside the result
        stays within some megabytes. `read` is safe from several threads at once.

        Raises KeyError for an unknown name and UserError when the file is damaged.
        """
        ...

    def fingerprint(self) -> str:
        """16 hex digits of names, shapes, dtypes and four samples of each tensor's bytes: it tells models apart, it is no checksum."""
        ...


@runtime_checkable
class PackedTensors(Protocol):
    """What a `Source` of a quantised checkpoint has beside: its matrices as they are stored."""

    def form(self, name: str) -> Form | str:
        """How a matrix is packed, where `kernels.packed` can hold it so; else why not, half a sentence. Raises KeyError."""
        ...

    def packed(self, name: str, rows: slice, cols: slice) -> Packed:
        """A part of such a matrix, on the CPU: what `read` of it gives, but nothing is unpacked. Columns begin and end where groups
        do, or at the matrix's edges."""
        ...


class WeightView(Protocol):
    """The products of one rank's share of the weights. Shapes: T tokens, D hidden, H and K local query and KV heads, d head size."""

    spec: ModelSpec
    on_device: bool
    """Whether a pass over few generated tokens asks the device nothing, so that it can be captured in a graph."""

    def begin(self, tokens: Tokens, kv: KVView) -> None:
        """A pass over these tokens, which are bound to `kv`, starts; the calls up to the next `begin` are its.

        Sparse views read all rows for prompts. What they keep of a sequence they keep as long as `kv` has it.
        """
        ...

    def reads(self) -> Reads:
        """What was read since the last call of this. May wait for the device."""
        ...

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids [T], positions [T] (int64) -> [T, D], complete on every rank."""
        ...

    def norm_of(self, layer: int, which: str) -> Norm:
        """A map [T, D] -> [T, D]. `which` is attn, mlp, embed or final (layer 0 for the last two)."""
        ...

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> q [T, H, d], k [T, K, d], v [T, K, d], with bias, clip and q/k norm, before RoPE. Skipped heads are 0."""
        ...

    def heads(self, layer: int) -> Heads:
        """Which heads the layer's `qkv`, the last one called, has computed."""
        ...

    def out(self, layer: int, heads: Tensor, residual: Tensor | None = None) -> Tensor:
        """Of the C query heads that `heads` names, [T, C, d] -> this rank's part of the sum, [T, D]. The bias is in one rank's part
        only, and so is the `residual` [T, D], which is not modified."""
        ...

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[T, D] -> this rank's part of the sum, [T, D]. Bias and `residual` as in `out`."""
        ...

    def head(self, x: Tensor) -> Tensor:
        """[T, D] -> logits of this rank's vocabulary rows, [T, V_local], equal sizes on all ranks (padding rows are -inf)."""
        ...


@runtime_checkable
class ChoosesOnDevice(Protocol):
    """A weight view whose passes in the device's own rounds read more or less, as tokens need it."""

    @property
    def reads_more_at_random(self) -> bool:
        """Whether passes differ where some tokens are not just those of the largest logits."""
        ...

    def begin_round(self, view: KVView, seq_ids: Sequence[int], late: bool, random: bool) -> None:
        """Such passes over these sequences of `view` follow. `late`: they leave entries of the only one for those of later rounds, if
        the view is lazy; else they find all complete. `random`: some tokens are not just those of the largest logits. May wait for the
        device."""
        ...

    def send_reads(self) -> None:
        """Have the device tell, behind the passes that were launched so far, what they read."""
        ...

    def device_reads(self) -> Reads:
        """What these passes read up to the last `send_reads`, since those of the last call of this, replays of captured ones included;
        `reads` has the others.

        Does not wait for the device: precondition: the passes are over, of those since `send_reads` none need be.
        """
        ...


@runtime_checkable
class RunsByLayer(Protocol):
    """A weight view whose layers may be called for some of a pass's tokens at a time."""

    def repeat(self, times: int) -> None:
        """Each layer of the pass that has begun is called so many times in a row, before the next one is."""
        ...


@runtime_checkable
class KeepsLayer(Protocol):
    """A KV view of which a pass over many tokens sees each layer's entries at once, so that they cross a bus once."""

    def parts(self) -> Sequence[Sequence[SeqStep]]:
        """The bound tokens in order, so many at a time that a layer is run over them; a single part where that is all of them."""
        ...

    def part(self, number: int) -> None:
        """Until the next call of this, or `bind`, `append` and `attend` refer to the tokens of this part. Calls come layer by layer,
        and in each part by part."""
        ...


class KVView(Protocol):
    """Keys and values of all running sequences, as one rung sees them.

    A sequence has `length` committed entries and, behind them, proposals, which are dropped as a number is: rollback costs nothing.
    """

    @property
    def seq_ids(self) -> set[int]:
        """Sequences that hold entries or a place for them."""
        ...

    def admit(self, seq_id: int) -> bool:
        """Give the sequence a place, which it keeps until it is freed; False where there is none left. True if it has one."""
        ...

    def length(self, seq_id: int) -> int:
        """Committed tokens of a sequence, 0 for an unknown one."""
        ...

    def end(self, seq_id: int) -> int:
        """`length` and the proposals behind it: the position that its next token may be appended at."""
        ...

    def bind(self, steps: Sequence[SeqStep]) -> None:
        """Start a forward pass over `steps`; later `append` and `attend` calls refer to their tokens, in order.

        Precondition: for each step length <= `start` <= `end` (both 0 for a sequence not seen before) and its block table covers
        start + len(tokens) positions. Proposals at `start` and later are dropped; the bound tokens take their place.
        """
        ...

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write k, v [T, K, d] (k after RoPE) of the bound tokens, as proposals: lengths do not change."""
        ...

    def late_from(self, seq_id: int) -> int | None:
        """The first position that `fill` can write; earlier entries are none of this view's passes. None: entries have to be complete
        when they are appended. Valid for bound sequences."""
        ...

    def fill(self, layer: int, late: Late) -> None:
        """Write what entries of earlier passes lacked (k after RoPE), before the bound tokens' are appended.

        Precondition: the positions lie between the sequence's `late_from` and its first bound token.
        """
        ...

    def attend(self, layer: int, q: Tensor, heads: Tensor | None = None) -> Tensor:
        """q [T, H, d] -> [T, C, d], the outputs of the query heads `heads` [C] (ascending; None: all H). Token i sees its own
        sequence's entries at positions <= its own that the view shows, within the layer's window."""
        ...

    def commit(self, seq_id: int, tokens: int) -> None:
        """The first `tokens` proposals are now part of the sequence: its length grows by that many; the others stay proposals.

        Raises ValueError if there are not so many.
        """
        ...

    def rollback(self, seq_id: int, length: int) -> None:
        """Drop all entries at `length` and later, proposals first, O(1). Raises ValueError if the sequence is shorter."""
        ...

    def free(self, seq_id: int) -> None:
        """Forget the sequence. Its blocks belong to the caller again. Unknown ids are ignored."""
        ...

    def bytes_read(self, seq_id: int) -> int:
        """Bytes of K/V that attention reads in one pass for this sequence, up to `end`."""
        ...

    def refreshes(self, seq_id: int) -> int:
        """How often the view has chosen anew which entries to show; 0 for views that do not choose."""
        ...


class DeviceKV(ABC):
    """What a pass of a round on the device asks of a view, which is bound by device tensors alone. See `KVView`."""

    @abstractmethod
    def rotate_append(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        """q [T, H, d], k, v [T, K, d], before RoPE and at any strides between tokens: rotate q and k, `append` k and v. Returns q."""
        ...

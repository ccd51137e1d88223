"""The seam between the engine, which decides, and the ranks, which compute. Torch-free.

What crosses it is plain data, so that an executor may live in this process or be a gang of ranks elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from operator import add
from typing import Protocol

from rowcast.runtime.params import SamplingParams


@dataclass(frozen=True, slots=True)
class SeqStep:
    """The tokens of one sequence to run in one step."""

    seq_id: int
    tokens: list[int]
    start: int
    """Position of the first token = tokens of this sequence already in the KV cache."""
    blocks: list[int]
    """Block table: block i holds positions [i * block_size, (i + 1) * block_size)."""
    prompt_length: int
    """Tokens of the request's prompt. Dynamic NTK scaling reads it."""
    sample: bool
    """Whether the last token's logits are sampled from. False for all but the last chunk of a prefill."""
    prompt_logprobs: int | None = None
    """Return the log-probabilities of the *next* prompt token at each of `tokens` whose successor is a prompt token."""
    room: int = 0
    """Tokens that the round may draft beyond `tokens`: the blocks hold that many more, and the request does not end before them."""
    left: int = 1
    """Most tokens that the request may still generate."""
    adopts: bool = False
    """The sequence begins with this step, at `start`: entries before it are in the blocks, whole ones, which other sequences filled and
    may share. Nobody writes to them."""

    @property
    def decodes(self) -> bool:
        """Whether this is a round of the ladder: one pending token, and the next ones are wanted. Else it is a part of a prefill."""
        return self.sample and len(self.tokens) == 1


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The chosen token's log-probability and the most likely ones, from the unprocessed logits."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top_ids: list[int]
    top_logprobs: list[float]


_SUMS = (
    "tokens", "refreshes", "neurons", "neurons_of", "heads", "heads_of", "overflows", "fallbacks", "seconds", "bytes_read",
)  # fmt: skip
"""Fields of `RungCounts` that add up."""
_LISTS = ("proposed", "judged", "accepted", "neurons_by_layer", "heads_by_layer")
"""Those that add up place by place."""

PREFILL = "prefill"
"""Stands for the last rung where it runs a prompt, so that what a rung took to decode is not mixed with that."""


@dataclass(slots=True)
class RungCounts:
    """What one rung did for one sequence. Adds up over steps, and over the samples of a request.

    Verdicts count as they fell, also of tokens behind a stop, which the request does not get.
    """

    proposed: list[int] = field(default_factory=list)
    """Proposals that reached their verifier, by position in the proposal, the first at 0. Empty for the last rung."""
    judged: list[int] = field(default_factory=list)
    """Those of them before which all stood: what comes after a rejection is dropped unseen."""
    accepted: list[int] = field(default_factory=list)
    """Those of the judged ones that stood."""
    tokens: int = 0
    """Tokens run through the rung's model, drafts and catching up included."""
    refreshes: int = 0
    """Times that its KV view chose its entries anew."""
    neurons: int = 0
    """Neurons that generated tokens used, each token its own, over layers. Rungs that use all do not count."""
    neurons_of: int = 0
    """Those that a dense model uses."""
    heads: int = 0
    """Likewise, query heads."""
    heads_of: int = 0
    overflows: int = 0
    """Passes' choices that were larger than their buffer, so that everything was read."""
    fallbacks: int = 0
    """Rows of logits that took the whole LM head, as their certificate failed."""
    seconds: float = 0.0
    """This sequence's share of the time of the rung's passes, by tokens."""
    bytes_read: int = 0
    """Weights (an even share) and KV."""
    neurons_by_layer: list[int] = field(default_factory=list)
    """`neurons`, layer by layer, each of an even part of `neurons_of`. Empty where the rung does not count."""
    heads_by_layer: list[int] = field(default_factory=list)
    """Likewise, of `heads`."""

    def add(self, other: RungCounts) -> None:
        """Add `other` to this, in place."""
        for name in _LISTS:
            theirs: list[int] = getattr(other, name)
            if theirs:
                mine: list[int] = getattr(self, name)
                mine += [0] * (len(theirs) - len(mine))
                mine[: len(theirs)] = map(add, mine, theirs)
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def note(self, proposed: int, accepted: int) -> None:
        """One verdict: of `proposed` tokens the first `accepted` stood."""
        for mine, count in (
            (self.proposed, proposed), (self.judged, min(accepted + 1, proposed)), (self.accepted, accepted),
        ):  # fmt: skip
            mine += [0] * (count - len(mine))
            for place in range(count):
                mine[place] += 1

    @property
    def acceptance(self) -> float | None:
        """Share of the judged proposals that stood: the alpha of speculative decoding (arXiv 2211.17192, section 3.1). None where
        nothing was proposed."""
        return sum(self.accepted) / sum(self.judged) if self.judged else None


@dataclass(slots=True)
class Moved:
    """What one rank brought to the compute from elsewhere for one sequence, which has an even share of what its steps moved. Adds up
    over steps."""

    weight_bytes: int = 0
    """Whole pieces of weights, over the bus."""
    rows_wanted: int = 0
    """Neurons that lie in host memory and were asked for alone."""
    rows_moved: int = 0
    """Those of them that no earlier pass had left next to the compute."""
    row_bytes: int = 0
    """Of `rows_moved`."""
    kv_bytes: int = 0
    kv_out_bytes: int = 0
    """New entries, to host memory."""
    disk_bytes: int = 0
    """Weights read from the checkpoint's files; on their way they count among `weight_bytes`, too."""
    stalled_s: float = 0.0
    """Seconds that computing waited for copies of pieces and KV; on a CPU, all of theirs."""

    @property
    def by_link(self) -> dict[str, int]:
        """Bytes by the link that they came over, or left over."""
        return {"bus": self.weight_bytes + self.row_bytes + self.kv_bytes + self.kv_out_bytes, "disk": self.disk_bytes}

    @property
    def rows_hit(self) -> int:
        """The others."""
        return self.rows_wanted - self.rows_moved

    def add(self, other: Moved) -> None:
        """Add `other` to this, in place."""
        for name in _MOVED:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def split(self, parts: int) -> list[Moved]:
        """Even shares, whose sum this is."""
        counts = {name: getattr(self, name) for name in _MOVED if name != "stalled_s"}
        return [
            Moved(
                **{name: total * (i + 1) // parts - total * i // parts for name, total in counts.items()},
                stalled_s=self.stalled_s / parts,
            )
            for i in range(parts)
        ]


_MOVED = tuple(field.name for field in fields(Moved))


@dataclass(frozen=True, slots=True)
class SeqResult:
    """What one sequence gained in one step. `tokens` is empty where nothing was sampled."""

    seq_id: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    rungs: dict[str, RungCounts] = field(default_factory=dict)
    """By rung; PREFILL for what a prefill took. Rungs that did nothing may be missing."""
    moved: Moved | None = None
    """None where nothing lies elsewhere, and in a step of prompts only: what that moved is told with the next tokens."""


@dataclass(frozen=True, slots=True)
class SeqSetup:
    """What an executor has to know about a sequence before its first step."""

    seq_id: int
    params: SamplingParams
    seed: int
    sample_index: int
    prompt_ids: list[int]
    eos_ids: list[int]
    bad_word_ids: list[list[int]]
    output_ids: list[int] = field(default_factory=list)
    """Tokens it has generated before, when it is announced to a new executor: noise and penalties go on from there."""
    group: int = 0
    """Sequences of one group (one request's samples) share their measured acceptance."""
    drafters: list[str] | None = None
    """Names of the rungs that may draft for it; None: all below its last one."""
    last: str | None = None
    """Name of the rung that decides; None: the ladder's last one."""


class StepLost(Exception):
    """A step came to nothing, and so did all K/V: the executor has begun anew, and remembers its sequences.

    Nothing of the step was committed. The caller frees all sequences' K/V, forgets what any block held and runs them again from their
    tokens.
    """


class Executor(Protocol):
    """One or many ranks. Not thread-safe: one engine drives it."""

    def add(self, setup: SeqSetup) -> None:
        """Announce a sequence. Precondition: its id is not in use. Raises UserError, and forgets it, where its parameters contradict
        each other or the vocabulary."""
        ...

    def step(self, steps: Sequence[SeqStep]) -> list[SeqResult]:
        """Run one ladder round over `steps` and commit what it emitted to KV and sampler. Results come in the order of `steps`.

        If it raises, the caller has to `free_kv` all sequences, may let none adopt blocks that were filled before, and may run them
        again; after StepLost it should, as no request is to blame.
        """
        ...

    def free_kv(self, seq_id: int, length: int) -> None:
        """The sequence was preempted: its KV is void. It has `length` tokens, prompt and output; its sampling state goes on from there,
        whatever a step that failed had made of it."""
        ...

    def remove(self, seq_id: int) -> None:
        """Forget the sequence altogether. Unknown ids are ignored."""
        ...

    def check(self, seq_ids: Collection[int]) -> None:
        """Assert that it remembers these sequences and no others."""
        ...

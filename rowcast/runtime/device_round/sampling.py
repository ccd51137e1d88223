"""Sampling in a round on the device: parameters as numbers in its state, and the draw from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rowcast.kernels import rounds
from rowcast.kernels.gpu import drawing
from rowcast.kernels.rounds import HISTORY
from rowcast.runtime.device_round.state import RoundState
from rowcast.runtime.logits import keep_min_p_, keep_top_
from rowcast.runtime.philox import Purpose
from rowcast.runtime.sampling_batch import SampledSequence
from rowcast.runtime.sharded_logits import Logits, whole


@dataclass(frozen=True, slots=True)
class Sampling:
    """What sampling parameters ask of a pass beside numbers."""

    min_p: bool = False
    """Some sequence has min_p."""
    truncates: bool = False
    """Some sequence has top_k or top_p."""
    random: bool = False
    """Some sequence has a temperature, and weights read more for it (`ChoosesOnDevice.reads_more_at_random`)."""

    def __or__(self, other: Sampling) -> Sampling:
        return Sampling(self.min_p or other.min_p, self.truncates or other.truncates, self.random or other.random)


def is_served(sequence: SampledSequence) -> bool:
    """Whether the sequence's parameters are numbers alone: no penalties, biases, log-probabilities."""
    params = sequence.params
    edits = params.penalises or params.logit_bias or params.allowed_token_ids or sequence.bad_words
    return not edits and params.logprobs is None and not (params.min_tokens and sequence.stop_ids)


def fill(fields: dict[str, Any], row: int, sequence: SampledSequence, vocab_size: int) -> Sampling:
    """Put a sequence's parameters into a row of the state's fields on the host."""
    params, random = sequence.params, not sequence.params.greedy
    top_k = params.top_k if random and 0 < params.top_k < vocab_size else vocab_size
    top_p = params.top_p if random and params.top_p < 1 else math.inf
    min_p = params.min_p if random else 0.0
    fields["temperature"][row] = params.temperature if random else 0.0
    fields["log_min_p"][row] = math.log(min_p) if min_p else -math.inf
    fields["top_k"][row], fields["top_p"][row] = top_k, top_p
    fields["seeds"][row], fields["sample_index"][row] = sequence.seed, sequence.sample_index
    return Sampling(min_p > 0, top_k < vocab_size or top_p < math.inf)


def draw(state: RoundState, logits: Logits, at: rounds.Pass, first: int, sampling: Sampling) -> Tensor:
    """Each row's own next token: logits [n, V] of rows first, first + 1, ..., of whole sequences -> [n].

    Ranks that share logits exchange a (value, id) a row, with min_p each row's largest logit, too. Where top_k or top_p is asked for
    the logits themselves are gathered: that costs less than a question to the device.
    """
    some, tokens = slice(first, first + len(logits)), at.tokens
    of = slice(first // tokens, (first + len(logits)) // tokens)
    temperature = state["temperature"][of]
    log_min_p: Tensor | None = state["log_min_p"][of] if sampling.min_p else None
    if sampling.truncates:
        logits, temperature, log_min_p = _truncated(state, whole(logits), of, tokens), (temperature != 0).float(), None
    noise = state["seeds"][of], state["sample_index"][of], at.positions[some]
    how: dict[str, Any] = {"rows": at.wanted[some], "group": tokens, "offset": 1}
    if isinstance(logits, Tensor):
        return drawing.draw(logits, temperature, log_min_p, *noise, **how)
    comm, local = logits.comm, logits.local
    highest = None if log_min_p is None else comm.exchange(local.float().amax(-1)).amax(0)
    pairs = drawing.draw_best(local, temperature, log_min_p, *noise, first_token=logits.first, highest=highest, **how)
    return drawing.winners(comm.exchange(pairs))


def simulated(state: RoundState, drawn: Tensor, at: rounds.Pass, first: int, rate: float) -> Tensor:
    """Let each proposal stand with that chance: then the draw behind a token is the next token of the path, else another one.

    `drawn`, `first`: as `draw` returns and takes them. What stands depends on seeds, positions and the rung, as draws do: ranks agree.
    """
    tokens, some = at.tokens, slice(first, first + len(drawn))
    of = slice(first // tokens, (first + len(drawn)) // tokens)
    path = state.round.path[of]
    following = HISTORY + 1 + state.round.have[at.rung, of, None] + torch.arange(tokens, device=drawn.device)
    proposed = path.gather(1, following.clamp(0, path.shape[1] - 1).long()).flatten()
    chances = torch.full((len(drawn), 2), 1 - rate, dtype=torch.float32, device=drawn.device)
    chances[:, 0] = rate
    noise = state["seeds"][of], state["sample_index"][of], at.positions[some]
    how: dict[str, Any] = {"purpose": Purpose.ACCEPT, "rung": at.rung, "group": tokens, "offset": 1}
    stands = drawing.draw(chances.log(), torch.ones_like(state["temperature"][of]), None, *noise, **how) == 0
    return torch.where(stands, proposed, torch.where(drawn == proposed, (drawn + 1) % 2, drawn))


def _truncated(state: RoundState, logits: Tensor, of: slice, tokens: int) -> Tensor:
    """The laws of rows of which some have top_k or top_p, to be drawn from at temperature 1; greedy rows stay as they are."""

    def each(name: str) -> Tensor:
        return state[name][of].repeat_interleave(tokens, output_size=len(logits))[:, None]

    temperature = each("temperature")
    law = logits.float() / torch.where(temperature == 0, 1.0, temperature)
    keep_min_p_(law, each("log_min_p"))
    keep_top_(law, each("top_k"), each("top_p"), logits.shape[1])
    return law

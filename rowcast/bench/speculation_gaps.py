"""Where ladders' outputs leave plain decoding's, and how near a tie that was: for `rowcast bench speculation`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from rowcast import LLM, SamplingParams
from rowcast.runtime.philox import gumbel

Outputs = Sequence[Sequence[Sequence[int]]]
"""Token ids by visit and prompt."""


def find_gaps(
    outputs: Mapping[str, Outputs], prompts: Sequence[list[int]], temperature: float, seed: int, load_plain: Callable[[], LLM]
) -> dict[str, list[dict[str, Any]]]:
    """By ladder: where its outputs leave plain's of the same round, and by how much plain prefers its own token there.

    That is the gap between the two tokens' scores, log-probability over temperature plus noise: near 0, a tie that two ways of
    summing break differently. `seed`: of the first prompt; the next one has the next. `load_plain` is called where anything differs.
    """
    found: dict[str, list[dict[str, Any]]] = {ladder: [] for ladder in outputs}
    llm: LLM | None = None
    for ladder, visits in outputs.items():
        for round_, (ours, plain) in enumerate(zip(visits, outputs["plain"], strict=True)):
            for i, (mine, theirs) in enumerate(zip(ours, plain, strict=True)):
                if mine == theirs:
                    continue
                at = next(j for j, (a, b) in enumerate(zip_longest(mine, theirs)) if a != b)
                llm = llm or load_plain()
                scores = _scores(llm, [*prompts[i], *theirs[:at]], temperature, seed + i)
                gap = float(scores[theirs[at]] - scores[mine[at]])
                found[ladder].append({"round": round_, "prompt": i, "position": at, "gap": gap})
    return found


def _scores(llm: LLM, ids: list[int], temperature: float, seed: int) -> torch.Tensor:
    """What the next token is the argmax of, [V] float64: log-probabilities over temperature, plus the noise of plain decoding."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=-1, detokenize=False)
    [entry] = llm.generate(ids, params)[0].outputs[0].logprobs or []
    scores = torch.tensor([entry[token].logprob for token in range(llm.spec.vocab_size)], dtype=torch.float64)
    if temperature == 0:
        return scores
    noise = gumbel(torch.tensor([seed]), torch.tensor([0]), torch.tensor([len(ids)]), range(llm.spec.vocab_size))
    return scores / temperature + noise[0]

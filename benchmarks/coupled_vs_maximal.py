"""What each verification rule accepts, beside its closed form, on the same text with the same draft.

    python benchmarks/coupled_vs_maximal.py FILE [--ladder "draft:model=DIR,gamma=4 / plain"] [--prompts 8] [--tokens 128]

A proposal drawn from q and judged by p stands with probability sum_i min(p_i, q_i) under `maximal`, and with sum_i 1 / sum_j
max(p_j / p_i, q_j / q_i) under `coupled`. Each rule continues the same prompts, pieces of FILE; both forms are averaged over the
positions that it judged. `z`: how many standard errors its acceptance lies from its own form; given the past each verdict is a coin of
that bias, so it is normal. The ladder has two rungs, both of which run a model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowcast import LLM, SamplingParams
from rowcast.runtime.ladder.coupled import judging_rows
from rowcast.runtime.ladder.rule import Proposal, Rule, Verdict
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.sharded_logits import Logits


def maximal_acceptance(p: Tensor, q: Tensor) -> Tensor:  # [n, V] float64 each -> [n]
    return torch.minimum(p, q).sum(-1)


def coupled_acceptance(p: Tensor, q: Tensor) -> Tensor:  # [n, V] float64 each -> [n]
    # p_j / p_i is the larger ratio where p_j / q_j >= p_i / q_i: with tokens in that order, a sum of p from i on and one of q before i.
    order = (p.log() - q.log()).nan_to_num(nan=0.0).argsort(-1)
    p, q = p.gather(-1, order), q.gather(-1, order)
    above = p.flip(-1).cumsum(-1).flip(-1)
    below = q.cumsum(-1) - q
    each = p * q / (above * q + below * p)
    return each.nan_to_num(nan=0.0).sum(-1)


class Observer:
    """Implements `Rule`: hands on what `rule` decides and notes, for each judged proposal, the two closed forms."""

    def __init__(self, rule: Rule, sampler: Sampler) -> None:
        self.stood = 0
        self.maximal: list[float] = []
        self.coupled: list[float] = []
        self._rule = rule
        self._sampler = sampler
        self._drawn: dict[tuple[int, int], Tensor] = {}
        """The draft's last law [V] for a sequence's token at a place behind the committed ones."""

    def verify(self, rung: int, proposals: Sequence[Proposal], logits: Logits) -> list[Verdict]:
        verdicts = self._rule.verify(rung, proposals, logits)
        rows = [row for proposal in proposals for row in judging_rows(proposal)]
        laws = iter(self._sampler.process(rows, logits).double().softmax(-1))
        for proposal, verdict in zip(proposals, verdicts, strict=True):
            seq_id, first = proposal.seq_id, len(proposal.drafted)
            own = [next(laws) for _ in range(len(proposal.tokens) + 1)]
            if rung == 0:
                self._drawn[seq_id, first] = own[0]
                continue
            judged = min(verdict.accepted + 1, len(proposal.tokens))
            self.stood += verdict.accepted
            if judged:
                p, q = torch.stack(own[:judged]), torch.stack([self._drawn[seq_id, first + j] for j in range(judged)])
                self.maximal += maximal_acceptance(p, q).tolist()
                self.coupled += coupled_acceptance(p, q).tolist()
        return verdicts


class ObservedLLM(LLM):
    """Keeps its rule's observer."""

    observer: Observer

    def _rule(self, sampler: Sampler) -> Rule:
        self.observer = Observer(super()._rule(sampler), sampler)
        return self.observer


def measure(rule: str, args: argparse.Namespace) -> dict[str, Any]:
    """Continue the prompts under one rule."""
    llm = ObservedLLM(
        args.model,
        ladder=args.ladder,
        verification=rule,
        dtype="float32",
        max_num_seqs=args.prompts,
        max_model_len=args.prompt_tokens + args.tokens,
        progress=False,
    )
    ids = llm.tokenizer.encode(args.file.read_text(encoding="utf-8"))
    step = len(ids) // args.prompts
    prompts = [ids[i * step : i * step + args.prompt_tokens] for i in range(args.prompts)]
    params = [
        SamplingParams(temperature=args.temperature, seed=i, max_tokens=args.tokens, ignore_eos=True, detokenize=False)
        for i in range(args.prompts)
    ]
    outputs = llm.generate(prompts, params)
    seen = llm.observer
    forms = {"maximal": seen.maximal, "coupled": seen.coupled}
    judged, own = len(seen.maximal), forms[rule]
    return {
        "judged": judged,
        "acceptance": seen.stood / judged,
        "forms": {name: sum(values) / judged for name, values in forms.items()},
        "z": (seen.stood - sum(own)) / math.sqrt(sum(a * (1 - a) for a in own)),
        "tokens_per_round": sum(o.metrics.round_tokens for o in outputs) / sum(o.metrics.rounds for o in outputs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--ladder", default="self:kv=96,recent=32,gamma=4 / plain")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()

    rules = {}
    for rule in ("coupled", "maximal"):
        rules[rule] = measure(rule, args)
        print(rule, rules[rule])
        gc.collect()
    print(json.dumps({"ladder": args.ladder, "temperature": args.temperature, "rules": rules}))


if __name__ == "__main__":
    main()

"""How often a model's own draft over a part of its KV cache is right: retrieval, streaming and eviction at several budgets.

    python benchmarks/kv_acceptance.py FILE [--prompt-tokens 7900] [--tokens 256] [--gamma 8] [--budgets 256 512 1024]
    python benchmarks/kv_acceptance.py FILE --free [--temperature 0]

Teacher-forced: the text after the prompt is run `--gamma` tokens at a time, by every view and then by the full cache, which is
committed. `accept` is the mean of sum(min(p, q)), the acceptance of the maximal rule at temperature 1; `greedy` is the share of
positions where both have the same most likely token. With --free each view drafts for real instead, under the coupled rule, gamma
pinned: measured acceptance, tokens a round, and whether the output is plain decoding's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch

from rowcast import LLM, SamplingParams
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import HeavyHitters, PagedKV, Policy, Retrieval, SelectedKV, Streaming
from rowcast.runtime.model import load_decoder
from rowcast.runtime.shard import Shard
from rowcast.runtime.step import SeqStep
from rowcast.runtime.tokenizer import load_tokenizer

BLOCK = 16
PREFILL = 1024
VIEWS = ("retrieval,score=mean", "retrieval,score=bounds", "streaming", "eviction")
SEQ = 0


def rungs(args: argparse.Namespace) -> list[str]:
    """Settings of a rung self, as a ladder's text has them: each view at each budget, with refresh and, where it has any, without."""
    found = []
    for budget in args.budgets:
        for view in args.views:
            found.append(f"kv={budget},view={view}")
            if view != "streaming":
                found.append(f"{found[-1]},refresh=0")
    return found


def make_view(rung: str, parent: PagedKV, gamma: int) -> SelectedKV:
    settings = dict(part.split("=") for part in rung.split(","))
    policies: dict[str, Policy] = {"streaming": Streaming(), "eviction": HeavyHitters()}
    policy = policies.get(settings["view"]) or Retrieval("bounds" if settings["score"] == "bounds" else "mean")
    refresh = int(settings.get("refresh", 1))
    return SelectedKV(parent, policy, budget=int(settings["kv"]), refresh=refresh, slots=1, room=gamma)


@torch.inference_mode()
def teacher_forced(decoder: Decoder, ids: list[int], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By rung: `accept` and `greedy` over the tokens after the prompt."""
    blocks = list(range(-(-len(ids) // BLOCK)))
    parent = PagedKV(
        decoder.spec,
        Shard(),
        num_blocks=len(blocks),
        block_size=BLOCK,
        dtype=torch.float32,
        device=decoder.device,
        keep_queries=args.queries,
        summaries=[Retrieval("mean").summary, Retrieval("bounds").summary],
    )

    def step(start: int, end: int) -> SeqStep:
        return SeqStep(SEQ, ids[start:end], start, blocks, args.prompt_tokens, sample=False)

    for start in range(0, args.prompt_tokens, PREFILL):
        end = min(start + PREFILL, args.prompt_tokens)
        decoder.run([step(start, end)], parent)
        parent.commit(SEQ, end - start)
    views = {rung: make_view(rung, parent, args.gamma) for rung in rungs(args)}
    totals = {rung: [0.0, 0.0] for rung in views}
    for view in views.values():
        assert view.admit(SEQ)
    for start in range(args.prompt_tokens, len(ids), args.gamma):
        now = step(start, min(start + args.gamma, len(ids)))
        drafts = {rung: decoder.logits(decoder.run([now], view)) for rung, view in views.items()}
        full = decoder.logits(decoder.run([now], parent))
        p = full.softmax(-1)
        for rung, draft in drafts.items():
            totals[rung][0] += float(torch.minimum(p, draft.softmax(-1)).sum())
            totals[rung][1] += float((draft.argmax(-1) == full.argmax(-1)).sum())
        parent.commit(SEQ, len(now.tokens))
    count = len(ids) - args.prompt_tokens
    return {rung: {"accept": accept / count, "greedy": greedy / count} for rung, (accept, greedy) in totals.items()}


def free_running(prompt: list[int], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By rung: what a ladder of it and plain measures on this prompt."""
    params = SamplingParams(temperature=args.temperature, seed=1, max_tokens=args.tokens, ignore_eos=True, detokenize=False)
    found: dict[str, dict[str, Any]] = {}
    plain: list[int] = []
    for rung in ["", *rungs(args)]:
        ladder = f"self:{rung},gamma={args.gamma} / plain" if rung else "plain"
        context = len(prompt) + args.tokens
        llm = LLM(args.model, ladder=ladder, dtype="float32", max_model_len=context, max_num_seqs=2, progress=False)
        [output] = llm.generate(prompt, params)
        tokens = output.outputs[0].token_ids
        if not rung:
            plain = tokens
            continue
        found[rung] = {
            "acceptance": output.metrics.acceptance["self"],
            "tokens_per_round": output.metrics.tokens_per_round,
            "refreshes": output.metrics.rungs["self"].refreshes,
            "identical": tokens == plain,
        }
        print(rung, found[rung], flush=True)
        del llm
        gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--prompt-tokens", type=int, default=7900)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--gamma", type=int, default=8)
    parser.add_argument("--queries", type=int, default=16, help="queries of a pass that choose entries, teacher-forced")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--views", nargs="+", default=list(VIEWS))
    parser.add_argument("--free", action="store_true", help="draft for real")
    parser.add_argument("--temperature", type=float, default=0.0, help="with --free")
    args = parser.parse_args()

    checkpoint = open_checkpoint(args.model)
    ids = load_tokenizer(checkpoint).encode(args.file.read_text(encoding="utf-8"))
    ids = ids[: args.prompt_tokens + args.tokens]
    settings = {key: value for key, value in vars(args).items() if key != "file"}
    if args.free:
        print(json.dumps({"settings": settings, "free_running": free_running(ids[: args.prompt_tokens], args)}))
        return
    decoder = load_decoder(spec_from_config(checkpoint.config), checkpoint.source)
    forced = teacher_forced(decoder, ids, args)
    for rung, shares in forced.items():
        print(f"{rung:40} accept {shares['accept']:.3f}  greedy {shares['greedy']:.3f}")
    print(json.dumps({"settings": settings, "teacher_forced": forced}))


if __name__ == "__main__":
    main()

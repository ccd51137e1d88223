"""Whether every ladder gives plain decoding's tokens: prompts of many lengths, alone by plain decoding, in one batch by the ladder.

    python benchmarks/exactness.py --draft path/to/draft

Coupled verification, seeded: each output is compared with plain decoding's of that prompt, token by token. The first difference of an
output, if there is one, is printed with the gap between the two tokens' scores (processed logits plus noise) in the plain model: a gap
below 1e-4 is a tie that two ways of summing in float32 may break differently.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

from rowcast import LLM, RequestOutput, SamplingParams
from rowcast.runtime.philox import gumbel

TEXT = Path(__file__).parents[1] / "tests/data/news-from-nowhere.txt"
SELF = "self:kv=128,recent=32"
LADDERS = (
    "ngram / plain",
    f"{SELF} / plain",
    "self:kv=128,view=streaming / plain",
    "self:kv=128,view=eviction,recent=32 / plain",
    f"ngram / {SELF} / plain",
    "draft / plain",
    f"draft / {SELF} / plain",
    f"ngram / draft / {SELF} / plain",
    "self:mlp=0.5,kv=512 / plain",
    "self:mlp=0.5 / plain",
    "ngram / self:mlp=0.5,by=q2,over=1.5,lm=hire / plain",
    "auto",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--draft", help="a small model with the same vocabulary; ladders with a draft are left out without it")
    parser.add_argument("--ladder", action="append", help="instead of the list's; repeatable")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8)
    options = parser.parse_args()

    plain = LLM(options.model, ladder="plain", dtype="float32", progress=False)
    ids = plain.tokenizer.encode(TEXT.read_text())
    rng = random.Random(0)
    prompts = []
    for _ in range(options.prompts):
        start = rng.randrange(len(ids) - 700)
        prompts.append(ids[start : start + rng.randint(8, 700)])
    params = [
        SamplingParams(temperature=options.temperature, seed=i, max_tokens=options.max_tokens, ignore_eos=True)
        for i in range(len(prompts))
    ]
    expected = [plain.generate(prompt, each)[0] for prompt, each in zip(prompts, params, strict=True)]
    for ladder in options.ladder or LADDERS:
        if "draft" in ladder and options.draft is None:
            continue
        pinned = ladder if ladder == "auto" else " / ".join(with_gamma(rung) for rung in ladder.split(" / "))
        drafting = "draft" in ladder or ladder == "auto"
        llm = LLM(options.model, ladder=pinned, draft=options.draft if drafting else None, dtype="float32", progress=False)
        outputs = llm.generate(prompts, params)
        pairs = enumerate(zip(expected, outputs, strict=True))
        differing = [(i, *difference(plain, a, b, options.temperature)) for i, (a, b) in pairs if tokens(a) != tokens(b)]
        report = {
            "ladder": " / ".join(llm.plan.ladder),
            "temperature": options.temperature,
            "outputs": len(outputs),
            "tokens": sum(len(tokens(output)) for output in outputs),
            "equal": len(outputs) - len(differing),
            "differences": [{"prompt": i, "at": at, "gap": gap} for i, at, gap in differing],
            "acceptance": acceptance(outputs),
            "tokens_per_round": sum(o.metrics.round_tokens for o in outputs) / sum(o.metrics.rounds for o in outputs),
        }
        print(json.dumps(report), flush=True)


def with_gamma(rung: str) -> str:
    if rung == "plain":
        return rung
    gamma = {"ngram": 6, "draft": 2, "self": 5}[rung.split(":")[0]]
    return f"{rung}{',' if ':' in rung else ':'}gamma={gamma}"


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def acceptance(outputs: list[RequestOutput]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for output in outputs for name in output.metrics.rungs):
        counts = [output.metrics.rungs[name] for output in outputs if name in output.metrics.rungs]
        judged = sum(sum(count.judged) for count in counts)
        if judged:
            found[name] = sum(sum(count.accepted) for count in counts) / judged
    return found


def difference(plain: LLM, expected: RequestOutput, found: RequestOutput, temperature: float) -> tuple[int, float]:
    """Where two outputs part, and by how much plain decoding preferred its own token there."""
    ours, theirs = tokens(expected), tokens(found)
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    prompt = expected.prompt_token_ids + ours[:at]
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, ignore_eos=True)
    [entry] = plain.generate(prompt, params)[0].outputs[0].logprobs or []
    pair = torch.tensor([[ours[at], theirs[at]]])
    noise = gumbel(torch.tensor([expected.metrics.seed]), torch.tensor([0]), torch.tensor([len(prompt)]), pair)[0]
    scores = [
        entry[int(token)].logprob / (temperature or 1.0) + (float(noise[i]) if temperature else 0.0)
        for i, token in enumerate(pair[0])
    ]
    return at, scores[0] - scores[1]


if __name__ == "__main__":
    main()

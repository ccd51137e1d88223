"""TriForce's ladder on real models beside plain decoding: a draft of 14 M parameters over a streaming cache, SmolLM2 over 512 entries
of its KV, SmolLM2. Run: python examples/ladder.py

The text is a novel that the draft has not learnt from; what is written behind it does not depend on who drafts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rowcast import LLM, RequestOutput, SamplingParams

NOVEL = Path(__file__).parent.parent / "tests" / "data" / "jack-sheppard.txt"
LADDER = "draft:model=smollm2-draft,gamma=2 / self:kv=512,gamma=6 / plain"
CHOICES = ("plain", "draft / plain", "draft / self / plain")
"""Rungs of it that a request may use."""
PROMPTS = (256, 3000)
"""In tokens."""
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def main() -> None:
    llm = LLM(ladder=LADDER, max_model_len=4096, max_num_seqs=1, progress=False)
    novel = llm.tokenizer.encode(NOVEL.read_text(encoding="utf-8"))
    print(llm.plan.summary())
    differ = False
    for length in PROMPTS:
        print(
            f"\nBehind {length:,} tokens of a novel:\n{'':22}  tokens/s  beside plain  tokens a round  output     accepted",
            flush=True,
        )
        outputs: list[RequestOutput] = []
        for choice in CHOICES:
            if llm.plan.device != "cpu":  # kernels are compiled and passes captured
                write(llm, novel[:length], choice)
            outputs.append(write(llm, novel[:length], choice))
            print(line(choice, outputs[-1], outputs[0]), flush=True)
        print(f"    {outputs[0].outputs[0].text.strip()!r}")
        for choice, output in zip(CHOICES[1:], outputs[1:], strict=True):
            differ |= ids(output) != ids(outputs[0])
            if speed(output) <= speed(outputs[0]):
                print(f"    {choice} is not faster than plain here.")
    print(
        "\nA draft reads the prompt when it is first used; its speed includes that. `self` reads all weights, as plain does, and\n"
        "saves KV alone, which for a model this small is much only behind many thousands of tokens: where it is not, three rungs\n"
        "are no faster than plain, or than two. A ladder's text without `gamma=` lets the runtime leave out what does not pay."
    )
    sys.exit(differ)


def write(llm: LLM, prompt: list[int], choice: str) -> RequestOutput:
    """By these rungs of the ladder. Requests of one prompt share its K/V."""
    request = llm.engine.add(prompt, GREEDY, ladder=choice)
    while llm.engine.has_work:
        llm.engine.step()
    return request.output()


def line(choice: str, output: RequestOutput, plain: RequestOutput) -> str:
    stats = output.metrics
    same = "" if output is plain else "identical" if ids(output) == ids(plain) else "DIFFERS"
    accepted = ", ".join(f"{name} {share:.2f}" for name, share in stats.acceptance.items())
    ratio = speed(output) / speed(plain)
    return f"{choice:22}  {speed(output):8.1f}  {ratio:11.2f}x  {stats.tokens_per_round:14.2f}  {same:9}  {accepted}"


def speed(output: RequestOutput) -> float:
    assert output.metrics.tokens_per_s is not None
    return output.metrics.tokens_per_s


def ids(output: RequestOutput) -> Sequence[int]:
    return output.outputs[0].token_ids


if __name__ == "__main__":
    main()

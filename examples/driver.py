"""The driver API in one page. Run: python examples/driver.py [MODEL]"""

from __future__ import annotations

import sys

from rowcast import LLM, SamplingParams, UserError


def main() -> None:
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "SmolLM2-135M-Instruct", max_model_len=1024)
    print("plan:", llm.plan.summary())

    # Prompts of one batch join and leave as they finish, each with parameters of its own.
    prompts = ["The capital of France is", "A short list of colours: red,", "Once upon a time"]
    each = [
        SamplingParams(temperature=0, max_tokens=8),
        SamplingParams(temperature=0, max_tokens=32, stop=["\n", "."]),
        SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=24),
    ]
    for output in llm.generate(prompts, each):
        found, stats = output.outputs[0], output.metrics
        print(f"{output.prompt!r} -> {found.text!r} ({found.finish_reason}, {stats.generated_tokens} tokens)")

    # A seed gives the same tokens whatever else runs beside it.
    alone = llm.generate(prompts[2], each[2])[0]
    print("alone:", repr(alone.outputs[0].text))

    # Log-probabilities of each token and of the two most likely ones.
    scored = llm.generate("Two plus two is", SamplingParams(temperature=0, max_tokens=3, logprobs=2))[0].outputs[0]
    for token_id, entries in zip(scored.token_ids, scored.logprobs or [], strict=True):
        print("chosen", token_id, {entry.decoded_token: round(entry.logprob, 2) for entry in entries.values()})

    # A conversation, streamed; the last chunk carries the whole output.
    messages = [{"role": "user", "content": "Name three rivers."}]
    for chunk in llm.stream_chat(messages, SamplingParams(temperature=0, max_tokens=48)):
        print(chunk.text, end="", flush=True)
        if chunk.output is not None:
            print(f"\n{chunk.output.metrics}")

    # Mistakes are ValueErrors of one sentence.
    try:
        SamplingParams(temperature=-1)
    except UserError as error:
        print("refused:", error)


if __name__ == "__main__":
    main()

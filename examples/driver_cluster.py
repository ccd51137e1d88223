"""A model over several ranks, from Python. Run: python examples/driver_cluster.py [MODEL], or as a job of a Ray cluster:

ray job submit --working-dir . -- python examples/driver_cluster.py

Without a GPU the ranks share this machine's cores: that shows how it works, not how fast it is.
"""

from __future__ import annotations

import sys

from rowcast import LLM, GangError, Replicas, SamplingParams

PROMPTS = ["The capital of France is", "Water boils at", "A short list of colours: red,", "Once upon a time"]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "SmolLM2-135M-Instruct"
    params = SamplingParams(temperature=0, max_tokens=12)

    # One model, three ranks (a divisor of its KV heads), in Ray's cluster or in one that is started here. They end with the block.
    with LLM(model, tensor_parallel_size=3, max_model_len=512) as llm:
        print("plan:", llm.plan.summary())
        sharded = [output.outputs[0].text for output in llm.generate(PROMPTS, params)]
        for prompt, text in zip(PROMPTS, sharded, strict=True):
            print(f"{prompt!r} -> {text!r}")

        # A request can be cancelled at any time; the other ones do not notice.
        stream = llm.stream("Count: one, two,", SamplingParams(max_tokens=400))
        print("first:", repr(next(stream).text))
        stream.close()

    # Two models, one rank each, which share the requests: on two nodes, if there are two.
    try:
        with Replicas(model, data_parallel_size=2, max_model_len=512) as replicas:
            shared = [output.outputs[0].text for output in replicas.generate(PROMPTS, params)]
            print("replicas up:", replicas.up)
    except GangError as error:  # ranks failed again and again; single failures are made up for
        sys.exit(f"the cluster failed: {error}")
    print("the same text:", shared == sharded)


if __name__ == "__main__":
    main()

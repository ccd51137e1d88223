"""`rowcast chat`: a conversation, one line a turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from rowcast.cli import options
from rowcast.cli.output import print_stream
from rowcast.errors import UserError


def chat(
    system: Annotated[str | None, typer.Option("--system", help="Instructions that stand before the conversation.")] = None,
    model: options.Model = options.DEFAULT_MODEL,
    dtype: options.DType = "auto",
    weights: options.Weights = "auto",
    device: options.Device = "auto",
    ladder: options.Ladder = "auto",
    draft: options.Draft = None,
    kv_budget: options.KVBudget = None,
    verification: options.Verification = "coupled",
    mode: options.Mode = "exact",
    density: options.Density = None,
    calibration: options.Calibration = None,
    gpu_memory: options.GpuMemory = None,
    host_memory: options.HostMemory = None,
    max_model_len: options.MaxModelLen = None,
    eager: options.Eager = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Most tokens to an answer.", rich_help_panel="Sampling")] = 512,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
) -> None:
    """Talk to a model. Each line of standard input is one turn; /reset starts again, /exit or the end of input leaves."""
    from rowcast import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)

    from rowcast import LLM

    llm = LLM(
        model, ladder=ladder, draft=draft, kv_budget=kv_budget, verification=verification, mode=mode, density=density,
        calibration=calibration, dtype=dtype, weights=weights, device=device, gpu_memory=gpu_memory, host_memory=host_memory,
        max_model_len=max_model_len, eager=eager,
    )  # fmt: skip
    opening = [] if system is None else [{"role": "system", "content": system}]
    # A model without a template, or whose template takes no system message, is refused here and not once a turn.
    llm.tokenizer.chat([*opening, {"role": "user", "content": "Hello"}])
    history = list(opening)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            history = list(opening)
            continue
        turn = {"role": "user", "content": line}
        prompt = llm.tokenizer.chat([*history, turn])
        try:
            stream = llm.stream(prompt, params)
        except UserError as error:  # Too long.
            print(f"rowcast: {error}\nThe conversation stays as it was; /reset starts it again.", file=sys.stderr)
            continue
        history += [turn, {"role": "assistant", "content": print_stream(stream)}]


def _lines() -> Iterator[str]:
    """Lines of standard input that are not blank, asked for with a prompt on a terminal."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line

"""`rowcast generate`: prompts in, text out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rowcast.cli import options
from rowcast.cli.output import print_json, print_outputs, print_placement, print_plan_report, print_stream, with_plan
from rowcast.errors import UserError


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts; `-` reads one from standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="A text file that is one prompt.")] = None,
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Wrap prompts in the model's chat template, or not.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a request on standard output.")] = False,
    model: options.Model = options.DEFAULT_MODEL,
    dtype: options.DType = "auto",
    weights: options.Weights = "auto",
    device: options.Device = "auto",
    ladder: options.Ladder = "auto",
    draft: options.Draft = None,
    draft_device: options.DraftDevice = None,
    kv_budget: options.KVBudget = None,
    verification: options.Verification = "coupled",
    mode: options.Mode = "exact",
    density: options.Density = None,
    calibration: options.Calibration = None,
    tp: options.TensorParallel = 1,
    gpu_memory: options.GpuMemory = None,
    host_memory: options.HostMemory = None,
    max_model_len: options.MaxModelLen = None,
    eager: options.Eager = False,
    plan: Annotated[Path | None, typer.Option("--plan", help="A plan file to execute.", rich_help_panel="Model")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Most tokens to generate.", rich_help_panel="Sampling")] = 128,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    n: Annotated[int, typer.Option("--n", help="Samples a prompt.", rich_help_panel="Sampling")] = 1,
    stop: options.Stop = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past end tokens.", rich_help_panel="Sampling")] = False,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="Likeliest tokens to report, with --json.", rich_help_panel="Sampling")
    ] = None,
) -> None:
    """Complete prompts. Text goes to standard output, statistics and progress to standard error."""
    if logprobs is not None and not as_json:
        raise UserError(f"--logprobs {logprobs} shows nothing in plain text: add --json")
    texts = [_read_stdin() if text == "-" else text for text in prompt or []]
    if prompt_file is not None:
        texts.append(_read_file(prompt_file))
    if not texts:
        raise UserError("no prompt was given, pass one as an argument, with --prompt-file, or on standard input with `-`")

    from rowcast import SamplingParams

    params = SamplingParams(
        n=n, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=stop or [],
        ignore_eos=ignore_eos, logprobs=logprobs,
    )  # fmt: skip

    from rowcast import LLM, Plan

    llm = LLM(
        model, tensor_parallel_size=tp, ladder=ladder, draft=draft, draft_device=draft_device, kv_budget=kv_budget,
        verification=verification, mode=mode, density=density, calibration=calibration, dtype=dtype, weights=weights, device=device,
        gpu_memory=gpu_memory, host_memory=host_memory, max_model_len=max_model_len, eager=eager,
        plan=None if plan is None else Plan.load(plan),
    )  # fmt: skip
    tokenizer = llm.tokenizer  # raises where there is none: no advice to pass token ids, which Python can
    prompts: list[str] | list[list[int]] = texts
    if chat:
        prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in texts]

    if not as_json:
        print_placement(llm.plan)
    if as_json:
        for output in llm.iterate(prompts, params):
            print_json(with_plan(output.to_json(), llm.plan, llm.plan_report()))
    elif len(prompts) == 1 and n == 1:
        print_stream(llm.stream(prompts[0], params))
    else:
        print_outputs(llm.iterate(prompts, params))
    report = llm.plan_report(remember=True)
    if not as_json:
        print_plan_report(report)


def _read_file(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"the prompt file {path} cannot be read ({error.strerror}), name a readable text file") from None
    return _decode(data, f"the prompt file {path}")


def _read_stdin() -> str:
    return _decode(sys.stdin.buffer.read(), "the prompt on standard input")


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 at byte {error.start}, convert it to UTF-8") from None
    if not text.strip():
        raise UserError(f"{name} is empty, write a prompt into it")
    return text

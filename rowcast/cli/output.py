"""What the verbs print: text on standard output, statistics on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rowcast.runtime.outputs import RequestOutput, StreamChunk


def print_json(value: object) -> None:
    """One object on one line of standard output."""
    print(json.dumps(value), flush=True)


def print_statistics(output: RequestOutput) -> None:
    """One line on standard error."""
    stats = output.metrics
    parts = [f"{stats.prompt_tokens} prompt tokens", f"{stats.generated_tokens} generated"]
    if stats.ttft_s is not None:
        parts.append(f"{stats.ttft_s:.2f} s to the first")
    if stats.tokens_per_s is not None:
        parts.append(f"{stats.tokens_per_s:.1f} tokens/s")
    parts.append(f"{stats.tokens_per_round:.2f} tokens a round")
    told = [", ".join(parts)]
    if stats.acceptance:
        told.append(", ".join(f"{rung} {share:.2f}" for rung, share in stats.acceptance.items()) + " accepted")
    if stats.ladder.lower:
        told.append(f"ladder {stats.ladder}")
    print(f"[{'; '.join(told)}]", file=sys.stderr)


def print_stream(chunks: Iterable[StreamChunk]) -> str:
    """Text as it comes, then a line break and the statistics line. Returns the whole text."""
    text = ""
    for chunk in chunks:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
        text += chunk.text
        if chunk.output is not None:
            print(flush=True)
            print_statistics(chunk.output)
    return text


def print_outputs(outputs: Iterable[RequestOutput]) -> None:
    """Texts as they come, each under its prompt's number and, where a prompt has several samples, the sample's."""
    for number, output in enumerate(outputs, start=1):
        for completion in output.outputs:
            sample = f".{completion.index + 1}" if len(output.outputs) > 1 else ""
            print(f"==> {number}{sample} <==\n{completion.text}\n", flush=True)
        print_statistics(output)

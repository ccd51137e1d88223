"""In-context quality: small tasks whose answer stands in the prompt, or follows from it. Made from a seed and a text.

cloze: the last word of a passage, which occurred in it before (after LAMBADA, arXiv 1606.06031). copy: "word -> word", a few times.
repeat: a list, written twice. induction: x y ... x, then y (arXiv 2209.11895). sequence: numbers, days, months, letters.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rowcast.calibration.recording import OneLayerKV
from rowcast.calibration.text import Encoder, tokens_before
from rowcast.errors import UserError
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.step import SeqStep

PASSAGE_CHARACTERS = 400
PASS_TOKENS = 1024
"""Most tokens of a pass, where an item has no more."""

_LAST_WORD = re.compile(r" ([A-Za-z]{4,})[.!?]")
_SERIES = (
    ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"],
    list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    *([str(number) for number in range(step, 30 * step, step)] for step in (1, 2, 3, 5, 10)),
)
_LEAST_SHOWN = 3
_SHOTS, _LIST, _WORDS = 5, 10, 16


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and the tokens that should follow."""

    prompt: list[int]
    answer: list[int]


def make_tasks(text: str, encoder: Encoder, *, items: int, context: int, seed: int = 0) -> dict[str, list[Item]]:
    """By kind, `items` of each that fit `context` tokens; fewer where no more are found. The same for the same arguments. Prompts begin
    with what the encoder puts before one.

    Raises UserError where the text is too short to take words from, and where nothing fits.
    """
    words = sorted(set(re.findall(r"\b[a-z]{4,7}\b", text)))
    if len(words) < 2 * _LIST:
        raise UserError(
            f"the text has {len(words)} different words of 4 to 7 letters, tasks need {2 * _LIST}: give a longer text"
        )
    passages = _passages(text)
    random.Random(seed).shuffle(passages)
    begins = tokens_before(text, encoder)
    made = {"cloze": _encoded(passages, encoder, begins, items, context)}
    for kind, make in (("copy", _copy), ("repeat", _repeat), ("induction", _induction), ("sequence", _sequence)):
        draws = random.Random(f"{seed} {kind}")
        made[kind] = _encoded((make(words, draws) for _ in range(8 * items)), encoder, begins, items, context)
    if not any(made.values()):
        raise UserError(f"no task fits the model's context of {context} tokens: leave the tasks out")
    return made


@torch.inference_mode()
def accuracy(decoder: Decoder, tasks: Mapping[str, Sequence[Item]], *, dtype: torch.dtype, sparse_prompt: bool) -> dict[str, int]:
    """How many items of each kind have an answer whose every token is the most likely one.

    The prompt runs dense up to its last token, which counts as generated, as the answer does: it is what writes the answer's first
    token. With `sparse_prompt` all tokens but the first count as generated.
    """
    return {kind: sum(_right(decoder, batch, dtype, sparse_prompt) for batch in _batches(items)) for kind, items in tasks.items()}


def _right(decoder: Decoder, items: Sequence[Item], dtype: torch.dtype, sparse_prompt: bool) -> int:
    sequences = [item.prompt + item.answer[:-1] for item in items]
    kv = OneLayerKV(decoder.spec, len(items), max(map(len, sequences)), dtype=dtype, device=decoder.device)
    steps: list[SeqStep] = []
    rows: list[int] = []
    first = 0
    for i, (item, tokens) in enumerate(zip(items, sequences, strict=True)):
        generated_from = 1 if sparse_prompt else len(item.prompt) - 1
        steps.append(SeqStep(i, tokens, 0, [i], prompt_length=generated_from, sample=False))
        rows += range(first + len(item.prompt) - 1, first + len(tokens))
        first += len(tokens)
    found = decoder.logits(decoder.run(steps, kv)[rows]).argmax(-1).split([len(item.answer) for item in items])  # type: ignore[no-untyped-call]
    return sum(best.tolist() == item.answer for best, item in zip(found, items, strict=True))


def _batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    tokens = 0
    for item in items:
        size = len(item.prompt) + len(item.answer) - 1
        if batch and tokens + size > PASS_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(item)
        tokens += size
    if batch:
        yield batch


def _encoded(
    pairs: Iterator[tuple[str, str]] | list[tuple[str, str]], encoder: Encoder, begins: Sequence[int], items: int, context: int
) -> list[Item]:
    """The first `items` pairs of prompt and answer whose border is a border between tokens, and that fit `context` tokens."""
    found: list[Item] = []
    for prompt, answer in pairs:
        if len(found) == items:
            break
        ids, whole = encoder.encode(prompt, add_special_tokens=False), encoder.encode(prompt + answer, add_special_tokens=False)
        if len(ids) >= 2 and whole[: len(ids)] == ids and len(ids) < len(whole) <= context - len(begins):
            found.append(Item([*begins, *ids], whole[len(ids) :]))
    return found


def _passages(text: str) -> list[tuple[str, str]]:
    """Passages of whole words before the last word of a sentence, which they hold; no two overlap."""
    text = " ".join(text.split())
    found, free = [], 0
    for match in _LAST_WORD.finditer(text):
        start = text.find(" ", max(match.start() - PASSAGE_CHARACTERS, 0)) + 1
        passage, word = text[start : match.start()], match[1]
        if start >= free and len(passage) > PASSAGE_CHARACTERS // 2 and re.search(rf"\b{word}\b", passage):
            found.append((passage, f" {word}"))
            free = match.end()
    return found


def _copy(words: Sequence[str], draws: random.Random) -> tuple[str, str]:
    *shown, asked = draws.sample(words, _SHOTS + 1)
    return "".join(f"{word} -> {word}\n" for word in shown) + f"{asked} ->", f" {asked}"


def _repeat(words: Sequence[str], draws: random.Random) -> tuple[str, str]:
    listed, at = draws.sample(words, _LIST), draws.randrange(1, _LIST)
    return ", ".join(listed) + "\n" + ", ".join(listed[:at]) + ",", f" {listed[at]}"


def _induction(words: Sequence[str], draws: random.Random) -> tuple[str, str]:
    shown, at = draws.sample(words, _WORDS), draws.randrange(_WORDS // 2)
    return " ".join([*shown, shown[at]]), f" {shown[at + 1]}"


def _sequence(words: Sequence[str], draws: random.Random) -> tuple[str, str]:
    series = draws.choice(_SERIES)
    count = draws.randrange(_LEAST_SHOWN, min(8, len(series)))
    start = draws.randrange(len(series) - count)
    return ", ".join(series[start : start + count]) + ",", f" {series[start + count]}"

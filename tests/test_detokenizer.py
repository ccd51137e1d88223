"""Streaming equals decoding at once: for any tokens, any stop strings and any moments of looking."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rowcast.runtime.checkpoint import DEFAULT_MODEL, open_checkpoint
from rowcast.runtime.detokenizer import Detokenizer, StopMatch
from rowcast.runtime.tokenizer import Tokenizer, load_tokenizer

SMOLLM = load_tokenizer(open_checkpoint(DEFAULT_MODEL))
"""Not a fixture: hypothesis draws from its vocabulary."""


class _SentencePieceFiles:
    """A tiny SentencePiece vocabulary: bytes, letters, and words with and without a space."""

    path = Path("model.gguf")
    format = "gguf"
    words = ("▁Hi", "▁there", "▁", "▁▁", "!", "x", "▁x", "你")
    gguf_metadata = {  # noqa: RUF012
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words],
        "tokenizer.ggml.scores": [0.0] * (259 + len(words)),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
    }


LLAMA = load_tokenizer(_SentencePieceFiles())
HI, THERE, SPACE, TWO_SPACES, BANG, X, SPACE_X, NI = range(259, 267)


def _byte(value: int) -> int:
    """The id of a byte token of LLAMA."""
    return 3 + value


def _stream(
    tokenizer: Tokenizer, ids: list[int], looks: list[bool] | None = None, **options: object
) -> tuple[list[str], str, StopMatch | None]:
    """Push all tokens, take the delta where `looks` says so -> (deltas, text, match)."""
    detokenizer = Detokenizer(tokenizer, **options)  # type: ignore[arg-type]
    deltas: list[str] = []
    match = None
    for i, token in enumerate(ids):
        match = detokenizer.push(token)
        if looks is None or looks[i % len(looks)]:
            deltas.append(detokenizer.take_delta())
        if match is not None:
            break
    detokenizer.finish()
    deltas.append(detokenizer.take_delta())
    assert detokenizer.take_delta() == ""
    return deltas, detokenizer.text, match


def _cut(text: str, stop: list[str], include: bool) -> str:
    """`text` up to the stop string that is complete first, character by character."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end if include else end - max(map(len, ending))]
    return text


texts = st.text(st.sampled_from("ab \n.é你好世界😀👩\u200d🇩🇪ﬁ"), max_size=20)
encoded = texts.map(SMOLLM.encode)
anything = st.lists(st.integers(0, 49151), max_size=20)
"""Also special tokens, halves of characters and bytes that are no UTF-8."""
with_specials = st.lists(st.one_of(st.integers(0, 16), st.integers(17, 400)), max_size=20)
id_lists = st.one_of(encoded, anything, with_specials)


@given(ids=id_lists, skip=st.booleans(), looks=st.lists(st.booleans(), min_size=1, max_size=5))
@settings(deadline=None)
def test_deltas_join_to_the_decoded_text(ids: list[int], skip: bool, looks: list[bool]) -> None:
    deltas, text, _ = _stream(SMOLLM, ids, looks, skip_special_tokens=skip)
    assert "".join(deltas) == text == SMOLLM.decode(ids, skip_special_tokens=skip)


@given(
    data=st.data(), ids=st.one_of(encoded, anything), include=st.booleans(), looks=st.lists(st.booleans(), min_size=1, max_size=5)
)
@settings(deadline=None, max_examples=200)
def test_text_is_cut_at_the_first_stop_string(data: st.DataObject, ids: list[int], include: bool, looks: list[bool]) -> None:
    whole = SMOLLM.decode(ids)
    spans = st.tuples(st.integers(0, len(whole)), st.integers(1, 4)).map(lambda span: whole[span[0] : sum(span)])
    stops = st.lists(st.one_of(spans, st.text("ab 你😀", max_size=3)), max_size=3)
    stop = data.draw(stops.map(lambda found: [s for s in found if s and "\ufffd" not in s]))
    deltas, text, match = _stream(SMOLLM, ids, looks, stop=stop, include_stop_str_in_output=include)
    assert "".join(deltas) == text == _cut(whole, stop, include)
    assert (match is not None) == any(s in whole for s in stop)


def test_stop_strings_span_tokens_and_end_inside_them() -> None:
    ids = SMOLLM.encode("one two\n\nthree four")
    assert _stream(SMOLLM, ids, stop=["o\n\nth"])[1:] == ("one tw", StopMatch("o\n\nth"))
    assert _stream(SMOLLM, ids, stop=["hre"], include_stop_str_in_output=True)[1:] == ("one two\n\nthre", StopMatch("hre"))


def test_the_stop_string_complete_first_wins_then_the_longest() -> None:
    ids = SMOLLM.encode("xabcdx")
    assert _stream(SMOLLM, ids, stop=["abcd", "bc"])[1:] == ("xa", StopMatch("bc"))
    assert _stream(SMOLLM, ids, stop=["c", "abc", "bc"])[1:] == ("x", StopMatch("abc"))


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    letters = [token for c in "say abab abc" for token in SMOLLM.encode(c)]
    deltas, _, _ = _stream(SMOLLM, letters, stop=["abac"])
    assert deltas == ["s", "", "ay", " ", "", "", "", "ab", "ab ", "", "", "abc", ""]
    assert _stream(SMOLLM, letters[:7], stop=["abac"])[0] == ["s", "", "ay", " ", "", "", "", "aba"]


def test_nothing_is_held_back_when_the_stop_string_is_kept() -> None:
    detokenizer = Detokenizer(SMOLLM, stop=["abc"], include_stop_str_in_output=True)
    for c in "ab":
        detokenizer.push(*SMOLLM.encode(c))
        assert detokenizer.take_delta() == c


def test_unchecked_tokens_do_not_stop_but_may_begin_a_stop_string() -> None:
    detokenizer = Detokenizer(SMOLLM, stop=["ab"])
    pushed = [detokenizer.push(*SMOLLM.encode(c), check_stop=i > 2) for i, c in enumerate("abaab")]
    assert pushed == [None, None, None, None, StopMatch("ab")]
    assert detokenizer.text == "aba"
    passed = Detokenizer(SMOLLM, stop=["a", "xyz"])
    passed.push(*SMOLLM.encode("a"), check_stop=False)
    assert passed.take_delta() == "a"
    spanning = Detokenizer(SMOLLM, stop=["ab"])
    assert spanning.push(*SMOLLM.encode("a"), check_stop=False) is None
    assert spanning.push(*SMOLLM.encode("b")) == StopMatch("ab")


def test_characters_arrive_whole() -> None:
    ids = SMOLLM.encode("🦄x")
    assert len(ids) > 3
    deltas, _, _ = _stream(SMOLLM, ids)
    assert [delta for delta in deltas if delta] == ["🦄", "x"]
    assert _stream(SMOLLM, ids[:2])[0] == ["", "", "\ufffd"]


class _Counting(Tokenizer):
    """SMOLLM that counts the tokens it decodes."""

    def __init__(self) -> None:
        super().__init__(SMOLLM.backend, special_tokens={})
        self.decoded = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return super().decode(ids, skip_special_tokens)


PARTS = [i for i in range(17, 49152) if "\ufffd" in SMOLLM.token(i)]
LEAD, SPACE_LEAD = (SMOLLM.backend.token_to_id(piece) for piece in ("Ã", "ĠÎ"))


@pytest.mark.parametrize("run", [[LEAD], [SPACE_LEAD], PARTS], ids=["lead bytes", "spaces and lead bytes", "all parts"])
def test_parts_of_characters_take_linear_time(run: list[int]) -> None:
    counting = _Counting()
    ids = (run * 2000)[:2000]
    deltas, text, _ = _stream(counting, ids)
    assert "".join(deltas) == text == SMOLLM.decode(ids)
    assert counting.decoded < 25 * len(ids)
    assert max(map(len, deltas)) < 25, "text that is settled is shown"


@given(
    ids=st.lists(st.sampled_from(PARTS), min_size=4, max_size=4).flatmap(lambda few: st.lists(st.sampled_from(few), max_size=70))
)
@settings(deadline=None, max_examples=300)
def test_runs_of_parts_of_characters(ids: list[int]) -> None:
    deltas, text, _ = _stream(SMOLLM, ids)
    assert "".join(deltas) == text == SMOLLM.decode(ids)


def test_complete_characters_do_not_wait_for_the_rest_of_their_token() -> None:
    space_and_part = next(i for i in range(17, 49152) if SMOLLM.token(i) == " \ufffd")
    assert _stream(SMOLLM, [space_and_part])[0] == [" ", "\ufffd"]


def test_special_tokens() -> None:
    ids = SMOLLM.encode("<|im_start|>Hi<|im_end|><|im_end|>")
    assert _stream(SMOLLM, ids)[1] == "Hi"
    for spaces in (True, False):
        _, text, _ = _stream(SMOLLM, ids, skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert text == "<|im_start|>Hi<|im_end|><|im_end|>"


# SentencePiece: spaces at the beginning, bytes

pieces = st.sampled_from([1, HI, THERE, SPACE, TWO_SPACES, BANG, X, SPACE_X, NI])
characters = st.sampled_from("\n👩é你").map(lambda c: [_byte(value) for value in c.encode()])
llama_ids = st.lists(st.one_of(pieces.map(lambda i: [i]), characters), max_size=12).map(
    lambda found: [*chain.from_iterable(found)]
)


@given(ids=llama_ids, split=st.integers(0, 12), skip=st.booleans())
@settings(deadline=None, max_examples=200)
def test_sentencepiece_alone_and_after_a_prompt(ids: list[int], split: int, skip: bool) -> None:
    deltas, text, _ = _stream(LLAMA, ids, skip_special_tokens=skip)
    assert "".join(deltas) == text == LLAMA.decode(ids, skip_special_tokens=skip)
    prompt = LLAMA.decode(ids[:split], skip_special_tokens=skip)
    if "\ufffd" not in prompt:
        _, rest, _ = _stream(LLAMA, ids[split:], skip_special_tokens=skip, prompt_ids=ids[:split])
        assert prompt + rest == LLAMA.decode(ids, skip_special_tokens=skip)


def test_the_space_of_the_first_word_belongs_to_the_text_after_a_prompt() -> None:
    assert _stream(LLAMA, [THERE])[1] == "there"
    assert _stream(LLAMA, [THERE], prompt_ids=[1, HI])[1] == " there"
    assert _stream(LLAMA, [THERE], prompt_ids=[1])[1] == "there", "nothing visible stands before it"


def test_stop_strings_are_not_sought_in_the_prompt() -> None:
    assert _stream(LLAMA, [THERE, BANG], prompt_ids=[HI, HI], stop=["Hi", "i t"])[1:] == (" there!", None)


@pytest.mark.parametrize("prompt", [[], [HI]])
def test_invalid_bytes_do_not_take_back_what_was_shown(prompt: list[int]) -> None:
    ids = [X, *(_byte(value) for value in "你".encode()), _byte(0xF0), _byte(0x9F), SPACE_X]
    deltas, text, _ = _stream(LLAMA, ids, prompt_ids=prompt)
    assert "".join(deltas) == text == "x你\ufffd\ufffd x"

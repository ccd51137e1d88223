"""Encoding against independent references: Transformers' own reader, SentencePiece's algorithm written out, expected text."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from rowcast.errors import UserError
from rowcast.runtime.checkpoint import DEFAULT_MODEL, open_checkpoint
from rowcast.runtime.gguf_vocabulary import _SPLIT_RULES
from rowcast.runtime.tokenizer import Tokenizer, load_tokenizer

HARD_TEXTS = [
    "",
    " ",
    "  leading and trailing  ",
    "\n\n\t indented\r\n",
    "naïve café, Ĝis, ﬁne, e\u0301",
    "你好，世界！日本語のテスト 한국어",
    "👩‍👩‍👧‍👦 🇩🇪 😀😀",
    "for (int i = 0; i < 10; ++i) { x[i] += 1e-5; }",
    "don't, we'll, I'VE, it's",
    "a" * 300,
    "مرحبا بالعالم שלום",
    "\u200b\u00a0\u3000|",
]


@dataclass
class Files:
    """What `load_tokenizer` reads of a checkpoint."""

    path: Path = Path("model.gguf")
    format: str = "gguf"
    gguf_metadata: dict[str, Any] | None = field(default_factory=dict)


@pytest.fixture(scope="session")
def smollm_metadata() -> dict[str, Any]:
    metadata = open_checkpoint(DEFAULT_MODEL).gguf_metadata
    assert metadata is not None
    return metadata


@pytest.fixture(scope="session")
def smollm(smollm_metadata: dict[str, Any]) -> Tokenizer:
    return load_tokenizer(Files(gguf_metadata=smollm_metadata))


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip(smollm: Tokenizer, text: str) -> None:
    assert smollm.decode(smollm.encode(text), skip_special_tokens=False) == text


def test_encode_equals_transformers_on_texts_without_digits(smollm: Tokenizer) -> None:
    from transformers import AutoTokenizer

    path = open_checkpoint(DEFAULT_MODEL).path
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in HARD_TEXTS:
        if not any(c.isdigit() for c in text):
            assert smollm.encode(text) == reference.encode(text, add_special_tokens=False), text
    special = "<|im_start|>user\nHi<|im_end|>"
    assert smollm.encode(special) == reference.encode(special, add_special_tokens=False)


def test_digits_are_single_tokens(smollm: Tokenizer) -> None:
    ids = smollm.encode("In 2024 pi was 3.14159, x1y22")
    assert [smollm.token(i) for i in ids if any(c.isdigit() for c in smollm.token(i))] == list("202431415912" + "2")
    assert smollm.encode("12") == smollm.encode("1") + smollm.encode("2")


def test_ids_and_sizes_come_from_the_file(smollm: Tokenizer) -> None:
    assert smollm.eos_token_id == 2
    assert smollm.special_ids == frozenset(range(17))
    assert smollm.encode("Hi") == smollm.encode("Hi", add_special_tokens=False), "the file says add_bos_token = False"


def test_token_text(smollm: Tokenizer) -> None:
    assert [smollm.token(i) for i in smollm.encode("Hi there<|im_end|>")] == ["Hi", " there", "<|im_end|>"]
    assert {smollm.token(i) for i in smollm.encode("🦄")} == {"\ufffd"}
    assert smollm.token(10**6) == ""


def test_decode_skips_special_tokens_only_when_asked(smollm: Tokenizer) -> None:
    ids = smollm.encode("<|im_start|>Hi<|im_end|>")
    assert smollm.decode(ids) == "Hi"
    assert smollm.decode(ids, skip_special_tokens=False) == "<|im_start|>Hi<|im_end|>"


def test_chat_is_the_templates_text(smollm: Tokenizer) -> None:
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    turn = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
    messages = [{"role": "user", "content": "What is 2+2?"}]
    assert smollm.chat(messages) == smollm.encode(system + turn + "<|im_start|>assistant\n")
    assert smollm.chat(messages, add_generation_prompt=False) == smollm.encode(system + turn)


def _with(metadata: dict[str, Any], **changes: Any) -> Tokenizer:
    """A tokenizer with some of its tokenizer.* keys changed; None removes one."""
    merged = {**metadata, **{f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}}
    return load_tokenizer(Files(gguf_metadata={key: value for key, value in merged.items() if value is not None}))


def test_bos_and_eos_surround_prompts_but_never_chats(smollm: Tokenizer, smollm_metadata: dict[str, Any]) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ tail }}{% endfor %}"
    tokenizer = _with(smollm_metadata, ggml__add_bos_token=True, ggml__add_eos_token=True, chat_template=template)
    plain = smollm.encode("Hi")
    assert tokenizer.encode("Hi") == [1, *plain, 2]
    assert tokenizer.encode("Hi", add_special_tokens=False) == plain
    assert tokenizer.chat([{"role": "user", "content": "Hi"}], tail="!") == [1, *plain, *smollm.encode("!")]


def test_template_errors_are_user_errors(smollm: Tokenizer, smollm_metadata: dict[str, Any]) -> None:
    strict = _with(smollm_metadata, chat_template="{{ raise_exception('roles must\\nalternate') }}")
    for tokenizer, messages, words in (
        (strict, [{"role": "user", "content": "Hi"}], "roles must alternate"),
        (_with(smollm_metadata, chat_template="{{ 1/0 }}"), [{"role": "user", "content": "Hi"}], "refuses.*division by zero"),
        (_with(smollm_metadata, chat_template="{{ messages['x' * 3].y }}"), [{"role": "user", "content": "Hi"}], "refuses"),
        (_with(smollm_metadata, chat_template="{% if %}"), [{"role": "user", "content": "Hi"}], "refuses"),
        (_with(smollm_metadata, chat_template=None), [{"role": "user", "content": "Hi"}], "no chat template"),
        (smollm, [], "0 messages"),
        (smollm, [{"role": "user", "content": "Hi"}, {"content": "Hi"}], "message 1 has no text under 'role'"),
        (smollm, [{"role": "user"}], "message 0 has no text under 'content'"),
    ):
        with pytest.raises(UserError, match=words) as error:
            tokenizer.chat(messages)
        assert "\n" not in str(error.value)


def test_has_chat_template(smollm: Tokenizer, smollm_metadata: dict[str, Any]) -> None:
    assert smollm.has_chat_template
    assert not _with(smollm_metadata, chat_template=None).has_chat_template


def test_surrogates_are_refused(smollm: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"U\+DCFF at character 3"):
        smollm.encode("abc\udcff")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ggml__pre": "klingon"}, "rule klingon, supported are default, gpt-2"),
        ({"ggml__model": "rwkv"}, "kind rwkv, supported are gpt2 and llama"),
        ({"ggml__tokens": None}, "no tokenizer"),
        ({"ggml__merges": None}, "no tokenizer.ggml.merges"),
        ({"ggml__merges": ["Ġ t", "nowhere tobefound"]}, "damaged"),
        ({"ggml__token_type": [1, 1]}, "49152 tokens and 2 token types"),
        ({"ggml__eos_token_id": 49152}, "eos token is 49152, the last one is 49151"),
    ],
)
def test_what_cannot_be_read_is_a_user_error(smollm_metadata: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _with(smollm_metadata, **changes)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("ggml.model", [7, ["llama"]]),
        ("ggml.tokens", [7, "abc", [1, 2], ["a", 7]]),
        ("ggml.scores", [7, "abc", ["0.5"] * 339, [None] * 339]),
        ("ggml.token_type", [7, "abc", ["1"] * 339, [1.5] * 339]),
        ("ggml.bos_token_id", ["1", 1.5, [1], True]),
        ("ggml.eos_token_id", ["2"]),
        ("ggml.unknown_token_id", ["0"]),
        ("ggml.padding_token_id", ["0"]),
        ("ggml.add_bos_token", ["yes", 1]),
        ("ggml.add_eos_token", ["no"]),
        ("ggml.add_space_prefix", ["no"]),
        ("chat_template", [7, ["x"]]),
    ],
)
def test_wrongly_typed_keys_are_named(llama_metadata: dict[str, Any], key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UserError, match=rf"model\.gguf .*tokenizer\.{key} is") as error:
            load_tokenizer(Files(gguf_metadata=llama_metadata | {f"tokenizer.{key}": value}))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "values"), [("ggml.pre", [7, ["gpt-2"]]), ("ggml.merges", [7, "a b", [1]])])
def test_wrongly_typed_keys_of_byte_level_vocabularies(smollm_metadata: dict[str, Any], key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UserError, match=rf"tokenizer\.{key} is"):
            load_tokenizer(Files(gguf_metadata=smollm_metadata | {f"tokenizer.{key}": value}))


def test_gguf_needs_no_transformers() -> None:
    """Importing it takes longer than everything else that a prompt needs."""
    code = "import sys, rowcast.runtime.tokenizer; print(sorted({'torch', 'transformers', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# How text is split before merging


def _words(pre: str, text: str) -> list[str]:
    """The words of `text` under a rule, as text again."""
    rule = _SPLIT_RULES[pre]
    if rule.normalizer is not None:
        text = rule.normalizer().normalize_str(text)
    pieces = pre_tokenizers.Sequence(rule.split()).pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["I", "'m", " x", "12345", " it", "'", "S", " (", "a", "-", "b", ")...", "\n", "\n", "end"]),
        ("smollm", ["I", "'m", " x", *"12345", " it", "'", "S", " (", "a", "-", "b", ")...", "\n", "\n", "end"]),
        ("llama-bpe", ["I", "'m", " x", "123", "45", " it", "'S", " (", "a", "-b", ")...\n\n", "end"]),
        ("qwen2", ["I", "'m", " x", *"12345", " it", "'S", " (", "a", "-b", ")...\n\n", "end"]),
        ("tekken", ["I", "'m", " x", *"12345", " it", "'S", " (", "a", "-b", ")...\n\n", "end"]),
        ("falcon", ["I", "'", "m", " x", "123", "45", " it", "'", "S", " ", "(", "a", "-", "b", ")...", "\n", "\n", "end"]),
        ("bloom", ["I'm", " x12345", " it'S", " (", "a-b", ")...\n\n", "end"]),
    ],
)
def test_split_rules(pre: str, words: list[str]) -> None:
    assert _words(pre, "I'm x12345 it'S (a-b)...\n\nend") == words


def test_split_rules_that_normalise() -> None:
    """Qwen and MPT compose characters (NFC), the others leave them."""
    assert _words("qwen2", "e\u0301") == _words("mpt", "e\u0301") == ["é"]
    assert "".join(_words("gpt-2", "e\u0301")) == "e\u0301"


def test_llama3_takes_whole_words_whatever_the_merges(smollm_metadata: dict[str, Any]) -> None:
    no_merges: dict[str, Any] = {"ggml__merges": [], "ggml__add_bos_token": None}
    llama3 = _with(smollm_metadata, ggml__pre="llama-bpe", **no_merges)
    assert [llama3.token(i) for i in llama3.encode("Hello there")] == ["<|im_start|>", "Hello", " there"]
    gpt2 = _with(smollm_metadata, ggml__pre="gpt-2", **no_merges)
    assert [gpt2.token(i) for i in gpt2.encode("Hello")] == list("Hello")


# SentencePiece


def _sentencepiece_metadata() -> dict[str, Any]:
    """A small SentencePiece vocabulary: characters, then every piece that some frequent pair makes, scored by its rank."""
    corpus = "▁the▁theory▁of▁other▁things▁▁▁▁▁▁there▁then▁hello▁world▁low▁lower▁lowest▁newer▁wider▁banana▁bandana" * 3
    characters = sorted(set(corpus))
    pieces = list(characters)
    text = list(corpus)
    while len(pieces) < 80:
        pairs = list(itertools.pairwise(text))
        best = max(sorted(set(pairs)), key=pairs.count)
        if "".join(best) not in pieces:
            pieces.append("".join(best))
        joined: list[str] = []
        while text:
            width = 2 if tuple(text[:2]) == best else 1
            joined.append("".join(text[:width]))
            del text[:width]
        text = joined
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces[len(characters) :], *characters]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _sentencepiece_reference(metadata: dict[str, Any], text: str) -> Iterator[int]:
    """SentencePiece's BPE: join the neighbours that make the best-scored piece, the leftmost of equals, until none do."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = metadata["tokenizer.ggml.scores"]
    kinds = metadata["tokenizer.ggml.token_type"]
    ids = {token: i for i, token in enumerate(tokens) if kinds[i] == 1}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = enumerate(map("".join, itertools.pairwise(symbols)))
        joins = [(scores[ids[pair]], -i) for i, pair in pairs if pair in ids]
        if not joins:
            break
        i = -max(joins)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    for symbol in symbols:
        yield from [ids[symbol]] if symbol in ids else [tokens.index(f"<0x{byte:02X}>") for byte in symbol.encode()]


@pytest.fixture(scope="session")
def llama_metadata() -> dict[str, Any]:
    return _sentencepiece_metadata()


@pytest.fixture(scope="session")
def llama(llama_metadata: dict[str, Any]) -> Tokenizer:
    return load_tokenizer(Files(gguf_metadata=llama_metadata))


LLAMA_TEXTS = [
    "the lowest theory",
    " the",
    "bananabandana",
    "x\ny",
    "      then",
    "你好 hello 🦄",
    "there  other   things",
    "",
    "<s",
    "▁▁",
]


@pytest.mark.parametrize("text", LLAMA_TEXTS)
def test_sentencepiece_equals_its_algorithm(llama: Tokenizer, llama_metadata: dict[str, Any], text: str) -> None:
    ids = llama.encode(text)
    assert ids == [1, *_sentencepiece_reference(llama_metadata, text)]
    assert llama.decode(ids) == text.replace("▁", " ")


def test_sentencepiece_joins_equals_from_the_left(llama_metadata: dict[str, Any]) -> None:
    """Mistral's vocabulary has runs of spaces of these lengths, all of one score."""
    runs = ["▁" * length for length in (16, *range(14, 1, -1))]
    metadata = {**llama_metadata, "tokenizer.ggml.tokens": [*llama_metadata["tokenizer.ggml.tokens"][:259], *runs, "▁"]}
    metadata["tokenizer.ggml.scores"] = [0.0] * 259 + [-1.0] * 14 + [-2.0]
    metadata["tokenizer.ggml.token_type"] = llama_metadata["tokenizer.ggml.token_type"][:259] + [1] * 15
    tokenizer = load_tokenizer(Files(gguf_metadata=metadata))
    for length in range(1, 50):
        assert tokenizer.encode(" " * length, add_special_tokens=False) == [*_sentencepiece_reference(metadata, " " * length)]


def test_sentencepiece_without_space_prefix(llama_metadata: dict[str, Any]) -> None:
    tokenizer = _with(llama_metadata, ggml__add_space_prefix=False, ggml__add_bos_token=False)
    for text in ("the theory", " the theory"):
        assert "".join(tokenizer.token(i) for i in tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_token_text_keeps_its_space(llama: Tokenizer) -> None:
    assert [llama.token(i) for i in llama.encode("the the")] == ["<s>", " the", " the"]


# Hugging Face directories


def test_directory_saved_by_transformers(smollm: Tokenizer, tmp_path: Path) -> None:
    smollm.transformers.save_pretrained(tmp_path)
    loaded = load_tokenizer(Files(tmp_path, "safetensors", None))
    for text in HARD_TEXTS:
        assert loaded.encode(text) == smollm.encode(text)
    assert (loaded.eos_token_id, loaded.special_ids) == (2, smollm.special_ids)
    assert loaded.has_chat_template
    messages = [{"role": "user", "content": "Hi"}]
    assert loaded.chat(messages) == smollm.chat(messages)


def test_directory_with_truncation_is_not_cut(smollm: Tokenizer, tmp_path: Path) -> None:
    smollm.transformers.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    assert len(load_tokenizer(Files(tmp_path, "safetensors", None)).encode("one two three four")) == 4


def test_directory_without_or_with_damaged_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(Files(tmp_path, "safetensors", None))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(UserError, match="cannot be read") as error:
        load_tokenizer(Files(tmp_path, "safetensors", None))
    assert "\n" not in str(error.value)

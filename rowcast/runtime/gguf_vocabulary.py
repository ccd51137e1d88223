"""The tokenizer inside a GGUF file, built on the `tokenizers` library.

A GGUF file carries a vocabulary, its merges or scores, and in one word (`tokenizer.ggml.pre`) the rule that splits text into
words before merging. Here is what each such word stands for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from rowcast.errors import UserError
from rowcast.runtime.fields import short

logger = logging.getLogger(__name__)

Merges: TypeAlias = list[tuple[str, str]]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""Values of tokenizer.ggml.token_type; beside them 5 for an unused token and 6 for a byte."""


@dataclass(frozen=True, slots=True)
class GGUFVocabulary:
    """What a GGUF file says about its tokenizer, ready to use."""

    backend: Tokenizer
    special_tokens: dict[str, str]
    """bos_token, eos_token, unk_token and pad_token, those that exist."""
    chat_template: str | None


def read_vocabulary(path: Path, metadata: dict[str, Any]) -> GGUFVocabulary:
    """The tokenizer of the GGUF file `path` with key-value part `metadata` (arrays as lists).

    Knows the kinds gpt2 (byte-level BPE) and llama (SentencePiece's BPE). Raises UserError for others, for an unknown rule of
    splitting and for a damaged vocabulary.
    """
    keys = _Keys(path, metadata)
    kind = keys.text("model")
    if kind == "gpt2":
        backend, add_bos = _byte_level_bpe(keys)
        special_types = {_CONTROL}
    elif kind == "llama":
        backend, add_bos = _sentencepiece_bpe(keys)
        special_types = {_CONTROL, _UNKNOWN}
    else:
        raise UserError(f"{path} has a tokenizer of kind {kind}, supported are gpt2 and llama; name a file with one of those")

    typed = list(zip(keys.tokens, keys.types, strict=True))
    special = [AddedToken(token, special=True, normalized=False) for token, kind in typed if kind in special_types]
    plain = [AddedToken(token, special=False, normalized=False) for token, kind in typed if kind == _USER_DEFINED]
    backend.add_special_tokens(special)
    backend.add_tokens(plain)

    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special_tokens = {name: token for name, key in names.items() if (token := keys.special(key)) is not None}
    first = special_tokens.get("bos_token") if keys.flag("add_bos_token", add_bos) else None
    last = special_tokens.get("eos_token") if keys.flag("add_eos_token", False) else None
    _surround(backend, first, last)
    return GGUFVocabulary(backend, special_tokens, keys.text("chat_template", group="tokenizer"))


class _Keys:
    """Typed access to the tokenizer.* part of one file's metadata. Its errors name the file and the key."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path = path
        self._metadata = metadata
        self.tokens: list[str] = self.array("tokens", str)
        self.types: list[int] = self.array("token_type", int) if "token_type" in self else [_NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise self.damaged(f"it has {len(self.tokens)} tokens and {len(self.types)} token types")

    def __contains__(self, key: str) -> bool:
        return f"tokenizer.ggml.{key}" in self._metadata

    def text(self, key: str, *, group: str = "tokenizer.ggml") -> str | None:
        value = self._metadata.get(f"{group}.{key}")
        if value is None or isinstance(value, str):
            return value
        raise self.mistyped(f"{group}.{key}", value, "a text")

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if isinstance(value, bool):
            return value
        raise self.mistyped(f"tokenizer.ggml.{key}", value, "true or false")

    def array(self, key: str, *kinds: type) -> list[Any]:
        name = f"tokenizer.ggml.{key}"
        if name not in self._metadata:
            raise UserError(f"{self.path} has no tokenizer (no {name}): name a file with one; a draft is named by --draft")
        values = self._metadata[name]
        if not isinstance(values, list) or not set(map(type, values)) <= set(kinds):
            raise self.mistyped(name, values, f"a list of {kinds[0].__name__}")
        return values

    def special(self, name: str) -> str | None:
        """The text of the token whose id stands under NAME_token_id."""
        key = f"tokenizer.ggml.{name}_token_id"
        index = self._metadata.get(key)
        if index is None:
            return None
        if type(index) is not int:
            raise self.mistyped(key, index, "a token id")
        if not 0 <= index < len(self.tokens):
            raise self.damaged(f"its {name} token is {index}, the last one is {len(self.tokens) - 1}")
        return self.tokens[index]

    def bpe(self, merges: Merges, **options: Any) -> Tokenizer:
        vocab = {token: index for index, token in enumerate(self.tokens)}
        try:
            return Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
        except Exception as error:  # the library raises nothing narrower
            raise self.damaged(" ".join(str(error).split())) from error

    def mistyped(self, key: str, value: object, wanted: str) -> UserError:
        return self.damaged(f"{key} is {short(value)}, not {wanted}")

    def damaged(self, what: str) -> UserError:
        return UserError(f"the vocabulary in {self.path} is damaged ({what}); download the file again")


# gpt2: byte-level BPE


@dataclass(frozen=True, slots=True)
class _SplitRule:
    """What happens to text before merges, as the original model's tokenizer.json says it."""

    split: Callable[[], list[pre_tokenizers.PreTokenizer]]
    normalizer: type[normalizers.NFC] | None = None
    ignore_merges: bool = False
    """A word that is in the vocabulary becomes that token, whatever the merges say."""
    add_bos: bool = False
    """Used where the file does not say."""


def _gpt2() -> list[pre_tokenizers.PreTokenizer]:
    """GPT-2's own pattern is built in."""
    return [pre_tokenizers.ByteLevel(add_prefix_space=False)]


def _single_digits() -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Digits(individual_digits=True), *_gpt2()]


def _falcon() -> list[pre_tokenizers.PreTokenizer]:
    triples = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")
    return [pre_tokenizers.Punctuation("contiguous"), *_gpt2(), pre_tokenizers.Digits(individual_digits=False), triples]


def _pattern(regex: str) -> Callable[[], list[pre_tokenizers.PreTokenizer]]:
    """Words are the matches of `regex` and what lies between them."""

    def split() -> list[pre_tokenizers.PreTokenizer]:
        words = pre_tokenizers.Split(Regex(regex), "isolated")
        return [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]

    return split


_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_PATH_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = _SplitRule(_gpt2)
_MPT = _SplitRule(_gpt2, normalizers.NFC)
_SMOLLM = _SplitRule(_single_digits)
_FALCON = _SplitRule(_falcon)
_BLOOM = _SplitRule(_pattern(r" ?[^(\s|.,!?…。，、।۔،)]+"))
_QWEN2 = _SplitRule(_pattern(rf"{_WORD}|\p{{N}}|{_SIGNS}|{_SPACE}"), normalizers.NFC)
_LLAMA3 = _SplitRule(_pattern(rf"{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACE}"), ignore_merges=True, add_bos=True)
_TEKKEN = _SplitRule(_pattern(rf"{_CASED_WORD}|\p{{N}}|{_PATH_SIGNS}|{_SPACE}"), ignore_merges=True, add_bos=True)

_SPLIT_RULES: dict[str, _SplitRule] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "mpt": _MPT,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "falcon": _FALCON,
    "bloom": _BLOOM,
    "gpt3-finnish": _BLOOM,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": _TEKKEN,
}
"""By tokenizer.ggml.pre."""


def _byte_level_bpe(keys: _Keys) -> tuple[Tokenizer, bool]:
    """GPT-2's scheme, merges over bytes written as printable characters; and whether a prompt begins with BOS by default."""
    name = keys.text("pre")
    if name is None:
        logger.warning("%s does not say how its tokenizer splits text; assuming GPT-2's way", keys.path)
        name = "default"
    rule = _SPLIT_RULES.get(name)
    if rule is None:
        known = ", ".join(_SPLIT_RULES)
        raise UserError(f"{keys.path} splits text by the rule {name}, supported are {known}; name a file with one of those")
    merges = []
    for merge in keys.array("merges", str):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    backend = keys.bpe(merges, ignore_merges=rule.ignore_merges)
    if rule.normalizer is not None:
        backend.normalizer = rule.normalizer()
    backend.pre_tokenizer = pre_tokenizers.Sequence(rule.split())
    backend.decoder = decoders.ByteLevel()
    return backend, rule.add_bos


# llama: SentencePiece's BPE


def _sentencepiece_bpe(keys: _Keys) -> tuple[Tokenizer, bool]:
    """SentencePiece's scheme with byte fallback (Llama 2, Mistral); and whether a prompt begins with BOS by default."""
    scores = keys.array("scores", float, int)
    if len(scores) != len(keys.tokens):
        raise keys.damaged(f"it has {len(keys.tokens)} tokens and {len(scores)} scores")
    merges = _merges_from_scores(keys.tokens, scores, keys.types)
    backend = keys.bpe(merges, unk_token=keys.special("unknown"), fuse_unk=True, byte_fallback=True)
    normalize: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    decode: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if keys.flag("add_space_prefix", True):
        normalize.insert(0, normalizers.Prepend("▁"))
        decode.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(normalize)
    backend.decoder = decoders.Sequence(decode)
    return backend, True


def _merges_from_scores(tokens: list[str], scores: list[float], types: list[int]) -> Merges:
    """Merges that act as SentencePiece's scores do: the pair that makes the piece of the highest score goes first.

    Of equal scores SentencePiece takes the leftmost pair. Merges know no place; the longest left part first does the same for
    runs of spaces, where such ties occur.
    """
    typed = zip(tokens, scores, types, strict=True)
    pieces = {token: score for token, score, kind in typed if kind in (_NORMAL, _USER_DEFINED)}
    ranked = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [(left, right) for _, _, left, right in sorted(ranked)]


def _surround(backend: Tokenizer, first: str | None, last: str | None) -> None:
    """Make `encode` put the token `first` before a text and `last` behind it."""
    ends = {"first": first, "last": last}
    ids = {name: backend.token_to_id(token) for name, token in ends.items() if token is not None}
    if ids:
        backend.post_processor = processors.TemplateProcessing(
            single=[name for name in ("first", "$A", "last") if name in ids or name == "$A"],
            special_tokens=[{"id": name, "ids": [index], "tokens": [name]} for name, index in ids.items()],
        )

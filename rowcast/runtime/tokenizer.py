"""Text to token ids and back, for a Hugging Face directory or a GGUF file.

A GGUF file needs the `tokenizers` library alone, which imports in a few hundredths of a second; Transformers is imported for
directories and for chat templates. Knows nothing of models, sampling or streaming (`detokenizer` streams).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import tokenizers

from rowcast.errors import UserError
from rowcast.runtime.gguf_vocabulary import read_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class TokenizerSource(Protocol):
    """The part of a checkpoint that holds its tokenizer."""

    @property
    def path(self) -> Path: ...

    @property
    def format(self) -> str:
        """`safetensors` (`path` is a directory) or `gguf` (`path` is a file)."""
        ...

    @property
    def gguf_metadata(self) -> dict[str, Any] | None:
        """The key-value part of a GGUF file, arrays as lists."""
        ...


class Tokenizer:
    """A vocabulary with its chat template. Nothing changes after construction, so threads may share one."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        chat_template: str | None = None,
        wrapped: PreTrainedTokenizerFast | None = None,
    ) -> None:
        """`special_tokens` maps bos_token, eos_token, ... to their text; `wrapped` is the form that Transformers made, if it did.

        Switches truncation and padding of `backend` off: a prompt is never cut in silence.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        """Ids without text when special tokens are skipped."""
        self._special_tokens = dict(special_tokens)
        self._chat_template = chat_template
        self._wrapped = wrapped

    @property
    def eos_token_id(self) -> int | None:
        token = self._special_tokens.get("eos_token")
        return None if token is None else self.backend.token_to_id(token)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be called."""
        return self._chat_template is not None

    @cached_property
    def transformers(self) -> PreTrainedTokenizerFast:
        """The same tokenizer in the form that Transformers knows."""
        from transformers import PreTrainedTokenizerFast

        if self._wrapped is not None:
            return self._wrapped
        return PreTrainedTokenizerFast(tokenizer_object=self.backend, chat_template=self._chat_template, **self._special_tokens)

    def bare(self) -> Tokenizer:
        """The same without what Transformers made of it, which takes seconds to import and only chat templates need: for a process that
        gets it pickled."""
        return Tokenizer(self.backend, special_tokens=self._special_tokens, chat_template=self._chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by default with the begin and end tokens that this vocabulary puts around a prompt.

        Special tokens written in the text are recognised either way. Raises UserError when `text` is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place, code = error.start, ord(text[error.start])
            raise UserError(f"the prompt is not valid UTF-8 (U+{code:04X} at character {place}); re-encode it") from None
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Invalid UTF-8 becomes U+FFFD; ids outside the vocabulary have no text."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        """The text of one token within a sentence: with its leading space, U+FFFD for parts of a character."""
        piece = self.backend.id_to_token(token_id)
        text = self.decode([token_id], skip_special_tokens=False)
        dropped_space = piece is not None and piece.startswith("▁") and len(text) < len(piece)
        return " " + text if dropped_space else text

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation written out by the model's own template; further keywords are the template's variables.

        The template itself writes the begin token where it wants one; none is added. Raises UserError when the model has no
        template, when a message lacks its role or content, and when the template refuses the conversation.
        """
        if self._chat_template is None:
            raise UserError("this model has no chat template; use generate, or an instruction-tuned model")
        _check_messages(messages)
        conversation = [dict(message) for message in messages]
        options = {**template_kwargs, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        try:
            text = self.transformers.apply_chat_template(conversation, **options)
        except Exception as error:  # a template is a program, which may fail in any way
            raise UserError(f"the chat template refuses the messages ({_one_line(error)}); change them") from error
        return self.encode(text, add_special_tokens=False)


def load_tokenizer(checkpoint: TokenizerSource) -> Tokenizer:
    """The tokenizer of a checkpoint. Runs no code of the checkpoint and downloads nothing.

    Raises UserError when its files are missing, damaged or of a kind not supported. Prompts given as token ids need no
    tokenizer; a caller that wants to allow those calls this only when a text arrives.
    """
    if checkpoint.format == "gguf":
        assert checkpoint.gguf_metadata is not None
        found = read_vocabulary(checkpoint.path, checkpoint.gguf_metadata)
        return Tokenizer(found.backend, special_tokens=found.special_tokens, chat_template=found.chat_template)
    if checkpoint.format == "random":
        raise UserError(f"{checkpoint.path} has random weights and no tokenizer: time it by rowcast bench latency --shape")
    return _from_directory(checkpoint.path)


def _from_directory(path: Path) -> Tokenizer:
    if not any((path / name).is_file() for name in _VOCABULARY_FILES):
        names = " or ".join(_VOCABULARY_FILES)
        raise UserError(f"{path} has no tokenizer (no {names}); copy one there")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        wrapped = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower for a damaged file
        raise UserError(f"the tokenizer in {path} cannot be read ({_one_line(error)}); copy it again") from error
    if not isinstance(wrapped, PreTrainedTokenizerFast):
        raise UserError(f"{path} has a {type(wrapped).__name__}, which has no fast form; save it with a tokenizer.json")
    special_tokens = {name: token for name, token in wrapped.special_tokens_map.items() if isinstance(token, str)}
    template = wrapped.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Tokenizer(wrapped.backend_tokenizer, special_tokens=special_tokens, chat_template=template, wrapped=wrapped)


def _check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    if not messages:
        raise UserError("the conversation has 0 messages, at least 1 is needed; add one with the role user")
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise UserError(f"message {index} has no text under {key!r}; give each message a role and a content")


def _one_line(error: Exception) -> str:
    """The beginning of an error's message, without line breaks."""
    return " ".join(str(error).split())[:200].rstrip(". ")

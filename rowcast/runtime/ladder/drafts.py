"""Draft models: opened, and refused where their vocabulary is not the target's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rowcast.errors import UserError
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.tokenizer import Tokenizer, load_tokenizer

_FIX = "use a draft that was made for this model's tokenizer"
_RUNG_IN_NAME = re.compile(r"/(ngram|draft|self|plain|full)(?=[:/]|$)")
_ADVICE = re.compile(r", or name [^;]*, which comes with Rowcast|, or pass --model[^;]*")
"""What a sentence about a model that cannot be opened says of --model, which is not where a draft comes from."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A checkpoint that drafts for another, its weights not read yet."""

    checkpoint: Checkpoint
    spec: ModelSpec
    fingerprint: str


def open_drafts(
    ladder: Ladder, spec: ModelSpec, tokenizer: Tokenizer | None, opened: Mapping[str, Checkpoint] | None = None
) -> dict[str, Draft]:
    """The ladder's draft models by the names that its rungs give them. `opened`: those that the caller has opened.

    `spec` and `tokenizer` are the target's. A draft needs no tokenizer; where both have one, they have to agree. Raises UserError
    for a model that cannot be opened and for another vocabulary.
    """
    found: dict[str, Draft] = {}
    for rung in ladder.lower:
        if rung.model is None or rung.model in found:
            continue
        checkpoint = (opened or {}).get(rung.model) or _open(rung.model)
        draft = Draft(checkpoint, _spec(rung.model, checkpoint), checkpoint.source.fingerprint())
        check_vocabulary(rung.model, draft, spec, tokenizer)
        found[rung.model] = draft
    return found


def _open(name: str) -> Checkpoint:
    try:
        return open_checkpoint(name)
    except UserError as error:
        rung = _RUNG_IN_NAME.search(name)
        meant = f"rungs are separated by ' / ', so write ' / {rung[1]}' if a rung was meant" if rung else ""
        fix = meant or "name another model with draft=MODEL"
        reason = _ADVICE.sub("", str(error)).rstrip(".")
        raise UserError(f"the draft {name} cannot be opened: {reason}; {fix}") from error


def _spec(name: str, checkpoint: Checkpoint) -> ModelSpec:
    try:
        return spec_from_config(checkpoint.config)
    except UserError as error:
        raise UserError(f"the draft {name} cannot be used: {str(error).rstrip('.')}; name another with draft=MODEL") from error


def check_vocabulary(name: str, draft: Draft, spec: ModelSpec, tokenizer: Tokenizer | None) -> None:
    """Raise UserError where the draft's vocabulary is not that of the model with this spec and tokenizer."""
    theirs, ours = _tokens(draft.checkpoint), None if tokenizer is None else _vocabulary(tokenizer)
    sizes = f"the draft {name} has a vocabulary of {draft.spec.vocab_size} tokens and the model one of {spec.vocab_size}"
    if draft.spec.vocab_size != spec.vocab_size and ours is not None and ours == theirs:
        raise UserError(
            f"{sizes}, though their tokenizers agree: one is padded to another size, so use a draft with {spec.vocab_size} rows of "
            "embeddings"
        )
    if draft.spec.vocab_size != spec.vocab_size:
        raise UserError(f"{sizes}: {_FIX}")
    if theirs is None or ours is None:
        return
    for token_id in sorted(ours.keys() & theirs.keys()):
        if ours[token_id] != theirs[token_id]:
            raise UserError(
                f"token {token_id} is {theirs[token_id]!r:.60} in the draft {name} and {ours[token_id]!r:.60} in the model: {_FIX}"
            )


def _tokens(checkpoint: Checkpoint) -> dict[int, str] | None:
    """None where the checkpoint has no tokenizer that can be read: token ids do without."""
    try:
        return _vocabulary(load_tokenizer(checkpoint))
    except UserError:
        return None


def _vocabulary(tokenizer: Tokenizer) -> dict[int, str]:
    return {token_id: text for text, token_id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}

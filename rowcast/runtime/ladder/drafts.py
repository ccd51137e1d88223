"""Draft models: opened, and refused where their vocabulary is not the target's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rowcast.errors import UserError
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.tokenizer import Tokenizer, load_tokenizer


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
        checkpoint = (opened or {}).get(rung.model) or open_checkpoint(rung.model)
        draft = Draft(checkpoint, spec_from_config(checkpoint.config), checkpoint.source.fingerprint())
        if draft.spec.vocab_size != spec.vocab_size:
            raise UserError(
                f"the draft {rung.model} has a vocabulary of {draft.spec.vocab_size} tokens and the model one of {spec.vocab_size}: "
                "use a draft that was made for this model's tokenizer"
            )
        if tokenizer is not None:
            _check_tokens(rung.model, checkpoint, tokenizer)
        found[rung.model] = draft
    return found


def _check_tokens(name: str, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    try:
        theirs = _tokens(load_tokenizer(checkpoint))
    except UserError:  # none that can be read: token ids do without
        return
    ours = _tokens(tokenizer)
    for token_id in sorted(ours.keys() & theirs.keys()):
        if ours[token_id] != theirs[token_id]:
            raise UserError(
                f"token {token_id} is {theirs[token_id]!r:.60} in the draft {name} and {ours[token_id]!r:.60} in the model: use a "
                "draft that was made for this model's tokenizer"
            )


def _tokens(tokenizer: Tokenizer) -> dict[int, str]:
    return {token_id: text for text, token_id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}

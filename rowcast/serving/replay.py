"""What a client has of a request already, so that another replica can run it again and the client sees one stream. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rowcast.serving.backend import Piece


class Diverged(Exception):
    """The second run's tokens are not those that were handed out: two streams would be mixed."""


@dataclass(slots=True)
class _Sample:
    token_ids: list[int] = field(default_factory=list)
    """Handed out."""
    characters: int = 0
    """Handed out."""
    finished: bool = False
    run_tokens: int = 0
    """Of the run that goes on now."""
    run_characters: int = 0


class HandedOut:
    """Cuts what was handed out off the pieces of later runs.

    A request's seed is fixed before its first run, so every run gives the same tokens and, joined, the same text; where a piece ends
    may differ, since that depends on drafts and on what a detokenizer holds back. So both are counted, tokens and characters.
    """

    def __init__(self) -> None:
        self._samples: dict[int, _Sample] = {}
        self._prompt = False

    @property
    def tokens(self) -> int:
        """Handed out so far, of all samples."""
        return sum(len(sample.token_ids) for sample in self._samples.values())

    def again(self) -> None:
        """Another run begins: its pieces come from the first token on."""
        for sample in self._samples.values():
            sample.run_tokens = sample.run_characters = 0

    def new(self, piece: Piece) -> Piece | None:
        """The part of a run's piece that was not handed out yet, which thereby is; None if there is none. Raises Diverged.

        The piece with `usage` always comes, if need be with nothing else.
        """
        sample = self._samples.setdefault(piece.index, _Sample())
        known = sample.token_ids[sample.run_tokens : sample.run_tokens + len(piece.token_ids)]
        if known != piece.token_ids[: len(known)]:
            raise Diverged
        sample.run_tokens += len(piece.token_ids)
        ids = piece.token_ids[len(known) :]
        text = piece.text[max(0, sample.characters - sample.run_characters) :]
        sample.run_characters += len(piece.text)
        ends = piece.finish_reason is not None and not sample.finished
        if ends and sample.run_tokens < len(sample.token_ids):  # an earlier run went on where this one ended
            raise Diverged
        if not (ids or text or ends or piece.usage is not None):
            return None
        sample.token_ids += ids
        sample.characters += len(text)
        sample.finished = sample.finished or ends
        first, self._prompt = not self._prompt, True
        return replace(
            piece,
            text=text,
            token_ids=ids,
            finish_reason=piece.finish_reason if ends else None,
            stop_reason=piece.stop_reason if ends else None,
            logprobs=None if piece.logprobs is None else piece.logprobs[len(known) :],
            prompt_token_ids=piece.prompt_token_ids if first else None,
        )

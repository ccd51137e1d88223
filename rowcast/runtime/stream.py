"""One request's output as it grows. Torch-free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from rowcast.runtime.engine import Engine
from rowcast.runtime.outputs import StreamChunk
from rowcast.runtime.request import Request, Sequence


class Stream(Iterator[StreamChunk]):
    """Steps the engine while it is iterated over; other requests of that engine move along and keep what they gain.

    `close` cancels what is left of the request; so does dropping the stream, at the engine's next step.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self._request = request
        self._ready: deque[StreamChunk] = deque()

    def __next__(self) -> StreamChunk:
        while not self._ready:
            if all(seq.streamed for seq in self._request.sequences):
                raise StopIteration
            self._collect()
            if not self._ready:
                self._engine.step()
        return self._ready.popleft()

    def close(self) -> None:
        """Cancel the request if it still runs; the stream is then at its end. May be called twice."""
        self._engine.abort(self._request)
        for seq in self._request.sequences:
            seq.streamed = True
        self._ready.clear()

    def __del__(self) -> None:
        self._request.dropped = True

    def _collect(self) -> None:
        """Make chunks of what was gained since the last time."""
        self._ready.extend(take_chunks(self._request))


def take_chunks(request: Request) -> list[StreamChunk]:
    """What the samples of a request gained since the last call, in order; the last one of all carries the whole `output`.

    For whoever steps the engine: call it after each step. Samples that gained nothing to show, and those that have handed out their
    last chunk, have none.
    """
    chunks = [chunk for seq in request.sequences if (chunk := take_chunk(seq)) is not None]
    if chunks and request.finished:
        chunks[-1] = replace(chunks[-1], output=request.output())
    return chunks


def take_chunk(seq: Sequence) -> StreamChunk | None:
    """What one sample gained since the last call and may be shown; None if there is nothing, or all of it is held back."""
    if seq.streamed:
        return None
    text = "" if seq.detokenizer is None else seq.detokenizer.take_delta()
    start, ids = seq.streamed_tokens, seq.output_ids[seq.streamed_tokens :]
    if seq.finish_reason is None and (not text if seq.detokenizer is not None else not ids):
        return None
    seq.streamed_tokens += len(ids)
    seq.streamed = seq.finish_reason is not None
    logprobs = None if seq.request.params.logprobs is None else seq.logprobs[start:]
    return StreamChunk(text, ids, seq.sample_index, seq.finish_reason, logprobs=logprobs, stop_reason=seq.stop_reason)

"""Forward and backward of a step as one CUDA graph: a step of a small model is a few thousand small kernels, which a processor launches
more slowly than a GPU runs them.

A graph is recorded once for each form of a step, from ordinary code that does the same work whatever ids are in its input and waits
for nothing. It knows neither the optimiser nor the batch: what it gives is a loss with a gradient, as any other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WARM = 2
"""Steps of a form that run as they are, before it is recorded: what is compiled or tuned is compiled and tuned by then."""
MOST_FORMS = 4
"""That are recorded; each holds activations of its own. Steps of others run as they are."""


class Recorded(Protocol):
    """Work that can be done again."""

    @property
    def ids(self) -> Tensor:
        """Its input, in place."""
        ...

    @property
    def loss(self) -> Tensor:
        """A scalar, of the last time, ..."""
        ...

    @property
    def grads(self) -> tuple[Tensor | None, ...]:
        """... and its gradients."""
        ...

    def replay(self) -> None: ...


@dataclass(slots=True)
class Captured:
    """A loss that is replayed where it can be."""

    loss_of: Callable[[Hashable, Tensor], Tensor]
    """(form, ids) -> a scalar loss with a gradient. Of one form and one shape of ids it always launches the same."""
    parameters: Sequence[Tensor]
    """That are trained."""
    on: bool
    steps: int = 0
    """That were replayed."""
    _seen: dict[Hashable, int] = field(default_factory=dict)
    _recorded: dict[Hashable, Recorded] = field(default_factory=dict)
    _pool: Any = None
    _stream: Any = None

    def __call__(self, form: Hashable, ids: Tensor) -> Tensor:
        """The loss; `backward` of it reaches the parameters. A form that cannot be recorded turns all recording off, with a warning."""
        if not self.on or not ids.is_cuda:
            return self._of(form, ids)
        # All on one stream, which records: where a gradient is accumulated is settled by the first use of its parameter that is still
        # known, and a recording must not wait for another stream.
        if self._stream is None:
            self._stream = torch.cuda.Stream(ids.device)  # type: ignore[no-untyped-call]
        outer = torch.cuda.current_stream(ids.device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            loss = self._of(form, ids)
        outer.wait_stream(self._stream)
        return loss

    def _of(self, form: Hashable, ids: Tensor) -> Tensor:
        key = (form, ids.shape)
        count = self._seen[key] = self._seen.get(key, 0) + 1
        if not self.on or count <= WARM or (key not in self._recorded and len(self._recorded) == MOST_FORMS):
            return self.loss_of(form, ids)
        if key not in self._recorded:
            try:
                self._recorded[key] = self._record(form, ids)
            except Exception as error:  # of the driver, of memory, or of code that waits for the GPU
                first = _first(error)
                log.warning("steps are not replayed (%s: %s)", type(first).__name__, str(first).split("\n")[0][:200])
                self.on = False
                self._recorded.clear()
                return self.loss_of(form, ids)
        one = self._recorded[key]
        one.ids.copy_(ids)
        one.replay()
        self.steps += 1
        loss: Tensor = _Replayed.apply(one, *self.parameters)  # type: ignore[no-untyped-call]
        return loss

    def _record(self, form: Hashable, ids: Tensor) -> Recorded:
        held = ids.clone()
        torch.clear_autocast_cache()  # weights that were cast outside are not the graph's
        torch.cuda.empty_cache()  # what is kept outside is not the graph's
        graph = torch.cuda.CUDAGraph()
        # To compile waits for the GPU. What fails at it here would run uncompiled ever after.
        with (
            torch.compiler.set_stance("fail_on_recompile"),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            loss, grads = self._gradients(form, held)
        torch.clear_autocast_cache()
        self._pool = graph.pool()
        return _Graph(held, loss, grads, graph)

    def _gradients(self, form: Hashable, ids: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        loss = self.loss_of(form, ids)
        with torch.autocast("cuda", enabled=False):  # whose number formats backward has from forward
            return loss.detach(), torch.autograd.grad(loss, list(self.parameters), allow_unused=True)


def _first(error: BaseException) -> BaseException:
    """What went wrong first: a recording that was broken off fails once more as it ends."""
    while (before := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = before
    return error


@dataclass(frozen=True, slots=True)
class _Graph:
    """Implements `Recorded`."""

    ids: Tensor
    loss: Tensor
    grads: tuple[Tensor | None, ...]
    graph: Any

    def replay(self) -> None:
        self.graph.replay()


class _Replayed(torch.autograd.Function):
    """What was replayed, as a loss: its gradients are there already, and copied, since the next replay writes over them."""

    @staticmethod
    def forward(ctx: Any, one: Recorded, *parameters: Tensor) -> Tensor:
        ctx.one = one
        return one.loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        found = [grad for grad in ctx.one.grads if grad is not None]
        scaled = iter(torch._foreach_mul(found, outer[0]))
        return None, *(None if grad is None else next(scaled) for grad in ctx.one.grads)

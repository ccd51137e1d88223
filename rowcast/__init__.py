"""Rowcast runs large language models by reading only what the next token needs.

The public names below are loaded on first use, so that `import rowcast` costs next to nothing.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as checkers of types know it; `typing` itself takes most of the time of such an import

if TYPE_CHECKING:
    from rowcast.cluster.llm import LLM
    from rowcast.cluster.replicas import Replicas
    from rowcast.errors import DraftError, GangError, OutOfMemoryError, UserError
    from rowcast.placement.plan import Plan
    from rowcast.runtime.ladder.spec import Ladder, Rung
    from rowcast.runtime.outputs import CompletionOutput, RequestOutput, StreamChunk
    from rowcast.runtime.params import SamplingParams

__version__ = "0.1.0"

# Read when torch is first imported. A thread that is done with its part of a product spins until the others are, by libgomp's default
# for so long that its core never looks idle: where another process has the core that the last one needs, it is not moved there.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__all__ = [
    "LLM",
    "CompletionOutput",
    "DraftError",
    "GangError",
    "Ladder",
    "OutOfMemoryError",
    "Plan",
    "Replicas",
    "RequestOutput",
    "Rung",
    "SamplingParams",
    "StreamChunk",
    "UserError",
    "__version__",
]

_HOME = {
    "LLM": "rowcast.cluster.llm",
    "Replicas": "rowcast.cluster.replicas",
    "SamplingParams": "rowcast.runtime.params",
    "RequestOutput": "rowcast.runtime.outputs",
    "CompletionOutput": "rowcast.runtime.outputs",
    "StreamChunk": "rowcast.runtime.outputs",
    "Plan": "rowcast.placement.plan",
    "Ladder": "rowcast.runtime.ladder.spec",
    "Rung": "rowcast.runtime.ladder.spec",
    "UserError": "rowcast.errors",
    "OutOfMemoryError": "rowcast.errors",
    "DraftError": "rowcast.errors",
    "GangError": "rowcast.errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'rowcast' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

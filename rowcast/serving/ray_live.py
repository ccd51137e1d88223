"""What the page shows of several engine replicas: their sums, in one engine's terms. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SUMS = ("tokens_per_s", "prompt_tokens_per_s", "tokens", "prompt_tokens", "steps")
_SHOWN = ("state", "requests", "tokens_per_s")
"""Of each replica."""


def together(
    mine: Mapping[str, Any], replicas: Mapping[int, Mapping[str, Any]], pids: Sequence[int | None], losses: int
) -> dict[str, Any]:
    """What an ingress shows. `mine`: what it knows itself; `replicas`: what those that answered say, by number; `pids`: of the
    processes of all, None for one that is not up; `losses`: how often it lost one.

    What is no sum is the first one's: the model, the ladder, what happened in its rungs and layers.
    """
    found: dict[str, Any] = dict(next(iter(replicas.values()), {}))
    for name in _SUMS:
        found[name] = sum(each.get(name, 0) for each in replicas.values())
    for name in ("kv", "prefix_cache"):
        parts = [each[name] for each in replicas.values() if isinstance(each.get(name), Mapping)]
        if parts:
            kept = {key: parts[0][key] for key in ("block_tokens", "token_bytes") if key in parts[0]}
            found[name] = _added(parts) | kept
    found["failures"] = _added([each.get("failures", {}) for each in replicas.values()]) | {"replicas": losses}
    if replicas:
        found["memory"] = [
            {**device, "device": f"replica {number}: {device.get('device', '')}"}
            for number, each in replicas.items()
            for device in each.get("memory", [])
        ]
    found |= mine
    found["replicas"] = [
        {"up": pid is not None, "pid": pid, **{name: replicas.get(number, {}).get(name) for name in _SHOWN}}
        for number, pid in enumerate(pids)
    ]
    return found


def _added(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Number by number."""
    names = {name for part in parts for name in part}
    return {name: sum(part.get(name) or 0 for part in parts) for name in sorted(names)}

"""Figures and claims of `offload.py`'s cases. Floors are of a rank: its bytes over the slowest bus."""

from __future__ import annotations

from typing import Any

from _figures import Figure, Session

_ON_HOST = ("streamed", "rows", "cpu", "host")
_KV_KEYS = ("load_s", "first_token_s", "first_round_s", "s_per_round", "tokens_per_round", "expected_tokens_per_round")
_WEIGHTS_KEYS = ("load_s", "warm_s", "first_token_s", "rows_wanted", "rows_hit", "stalled_s", "overlap")


def tell(session: Session, name: str, found: dict[str, Any]) -> None:
    """Add what the case says."""
    model = found["model"]
    if name == "accelerate":
        few = {key: found[key] for key in ("layers_run", "layers_that_fit", "s_per_layer_in_cpu_memory", "bytes_per_s")}
        session.add(Figure(name=f"Accelerate, {model}", s_per_token=found["s_per_token"], more=few))
        return
    buses = ", ".join(f"{each / 1e9:.1f}" for each in found["bus_rates"])
    session.say(f"{name}, {found['ranks']} x {found['gpu']}: buses {buses} GB/s, a copy each at the same time")
    if found["outside_bytes"] is not None:
        session.say(
            f"{name}: {found['outside_bytes'] / 2**20:.0f} MiB of each GPU are left to what is neither a tensor nor a graph"
        )
    {"kv": _kv, "lowbit": _low_bits}.get(name, _weights)(session, name, found)
    if name != "kv":
        _memory(session, name, found)


def _weights(session: Session, name: str, found: dict[str, Any]) -> None:
    took, rate = found["s_per_token"], min(found["bus_rates"])
    moved = found["streamed_bytes"] + found["row_bytes"]
    more = {key: found[key] for key in _WEIGHTS_KEYS} | {f"GB {tier}": size for tier, size in found["places"].items()}
    more |= _projected(found, found["ranks"]) | {"slowest bus, GB/s": rate / 1e9}
    session.add(
        Figure(
            name=f"{name}, {found['model']}",
            ladder=found["ladder"],
            s_per_token=took,
            bytes=moved,
            floor_s=moved / rate,
            planned_s=found["planned_s"],
            more=more,
        )
    )
    if name in ("streamed", "filled"):
        session.claim(f"{name}: share of the bus's rate", moved / rate / took, 0.85)


def _low_bits(session: Session, name: str, found: dict[str, Any]) -> None:
    plain, rate = found["plain"]["s_per_token"], min(found["bus_rates"])
    for way in ["plain", *(key for key in found if key.replace(".", "").isdigit())]:
        one = found[way]
        told = f"{found['model']}, plain" if way == "plain" else f"{found['model']}, 4-bit drafts that stand at {way}"
        ladder = "plain" if way == "plain" else found["ladder"]
        moved = found["places"]["streamed"] * 1e9 / one["tokens_per_round"]
        more = {key: one[key] for key in ("s_per_round", "tokens_per_round", "rounds")} | _projected(one, found["ranks"])
        session.add(
            Figure(
                name=told,
                ladder=ladder,
                s_per_token=one["s_per_token"],
                bytes=moved,
                floor_s=moved / rate,
                planned_s=one["planned_s"],
                more=more | {"load_s": found["load_s"], "slowest bus, GB/s": rate / 1e9},
            )
        )
        if way != "plain":
            bound = {"0.8": 4.0, "0.9": 6.0}.get(way, 1.0)
            session.claim(f"4-bit drafts at {way} over full streaming", plain / one["s_per_token"], bound)


def _kv(session: Session, name: str, found: dict[str, Any]) -> None:
    floor, plain, rate = found["floor_s"], found["plain"]["s_per_token"], min(found["bus_rates"])
    shape = f"{found['model']}, {found['prompt']} tokens"
    for way in ["plain", *(key for key in found if key.startswith("triforce"))]:
        one = found[way]
        rungs = {f"{rung}, s a round": each["s"] for rung, each in one["rungs"].items()}
        moved = found["kv_bytes"] if way == "plain" else one["kv_bytes_per_round"] / one["expected_tokens_per_round"]
        more = {"as run, ms a token": one["s_per_token_as_run"] * 1e3} | {key: one[key] for key in _KV_KEYS} | rungs
        more |= _projected(one, found["ranks"]) | {"slowest bus, GB/s": rate / 1e9}
        session.add(
            Figure(
                name=f"{shape}, {way}" if way == "plain" else f"{shape}, {way}, outer {found['outer']}",
                ladder=one["ladder"],
                s_per_token=one["s_per_token"],
                bytes=moved,
                floor_s=moved / rate,
                planned_s=one["planned_s"],
                more=more,
            )
        )
        if way == "plain":
            session.claim("KV in host memory, plain: share of the bus's rate", floor / plain, 0.85)
        elif way.endswith("0.6"):
            session.claim("TriForce over plain decoding, KV in host memory", plain / one["s_per_token"], 7.8)
        _memory(session, way, one)


def _projected(found: dict[str, Any], ranks: int) -> dict[str, float]:
    seconds = found["projected_s"]
    return {} if seconds is None else {f"projected to {ranks} x RTX 4090, PCIe 4, by the planner, ms a token": seconds * 1e3}


def _memory(session: Session, name: str, found: dict[str, Any]) -> None:
    if not found["driver_bytes"]:
        return
    held, plan, cap = found["driver_bytes"], found["planned_bytes"], found["cap_bytes"]
    pinned, host_plan = found["host_bytes"], sum(found["places"].get(tier, 0.0) for tier in _ON_HOST) * 1e9
    session.say(
        f"{name}: GPU {held / 1e9:.2f} GB by the driver, {found['gpu_bytes'] / 1e9:.2f} allocated, {plan / 1e9:.2f} planned, "
        f"{cap / 1e9:.2f} allowed, {found['loading_bytes'] / 1e9:.2f} while loading; pinned {pinned / 1e9:.2f} GB, "
        f"{host_plan / 1e9:.2f} planned"
    )
    session.claim(f"{name}: GPU memory over what is allowed", max(held, found["loading_bytes"]) / cap, 1.0, at_most=True)
    session.claim(f"{name}: GPU memory off its plan", abs(held / plan - 1), 0.05, at_most=True)
    if host_plan:
        session.claim(f"{name}: host memory off its plan", abs(pinned / host_plan - 1), 0.05, at_most=True)

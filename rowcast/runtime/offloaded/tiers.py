"""Which rows of which part of a model lie where, as a plan's shares say. Torch-free.

A share names groups of a part of a layer; group g of `of` stands for the rows n g / of up to n (g + 1) / of of its n. Neurons are
counted from the most frequent one on, all else as the model has it. Parts that no share names are resident.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rowcast.placement.forecast import Share
from rowcast.placement.plan import Plan

RESIDENT, STREAMED, ROWS, CPU, HOST, DISK = "resident", "streamed", "rows", "cpu", "host", "disk"
PEER = "peer"
"""Rows, too, but of another GPU's memory."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Rows of one part of one layer, by tier."""

    runs: tuple[tuple[str, int, int, int], ...] = ()
    """Tier, first group, groups, of how many."""

    def rows(self, tier: str, total: int) -> list[slice]:
        """Those of `total` rows that lie there, ascending; neighbours are one."""
        found: list[slice] = []
        for name, first, count, of in self.runs or ((RESIDENT, 0, 1, 1),):
            start, stop = total * first // of, total * (first + count) // of
            if name != tier or start == stop:
                continue
            if found and found[-1].stop == start:
                found[-1] = slice(found[-1].start, stop)
            else:
                found.append(slice(start, stop))
        return found

    @property
    def all_resident(self) -> bool:
        return all(tier == RESIDENT or not count for tier, _, count, _ in self.runs)

    @property
    def tiers(self) -> set[str]:
        return {tier for tier, _, count, _ in self.runs if count} or {RESIDENT}

    @property
    def on_disk(self) -> bool:
        """All of it: parts are there whole or not at all."""
        return DISK in self.tiers


WHOLE = Spans()


@dataclass(frozen=True, slots=True)
class Tiers:
    """Of one rank."""

    attention: Mapping[int, Spans]
    """By layer."""
    neurons: Mapping[int, Spans]
    head: Spans
    embeddings: Spans
    kv_away: frozenset[int]
    """Layers whose KV lies in host memory."""
    peers: frozenset[int] = frozenset()
    """Layers whose rows lie in another GPU's memory."""

    @classmethod
    def of(cls, plan: Plan, rank: int, layers: int) -> Tiers | None:
        """None: all is resident. KV is placed by whole layers: of those that a plan divides, as many stay as it has bytes for."""
        shares = [] if plan.forecast is None else [share for share in plan.forecast.shares if rank in share.ranks and share.count]
        if all(share.tier == RESIDENT for share in shares):
            return None

        def spans(part: str, layer: int) -> Spans:
            mine = sorted((s for s in shares if s.part == part and s.layer == layer), key=lambda s: s.first)
            return Spans(tuple((ROWS if s.tier == PEER else s.tier, s.first, s.count, s.of) for s in mine))

        return cls(
            attention={i: spans("attention", i) for i in range(layers)},
            neurons={i: spans("neurons", i) for i in range(layers)},
            head=spans("LM head", -1),
            embeddings=spans("embeddings", -1),
            kv_away=_kv_away([share for share in shares if share.part == "KV"]),
            peers=frozenset(share.layer for share in shares if (share.part, share.tier) == ("neurons", PEER)),
        )

    @property
    def on_disk(self) -> bool:
        """Whether any layer is there."""
        return any(part.on_disk for part in (*self.attention.values(), *self.neurons.values()))

    @property
    def weights_resident(self) -> bool:
        """Whether only KV lies elsewhere."""
        parts = (*self.attention.values(), *self.neurons.values(), self.head, self.embeddings)
        return all(part.all_resident for part in parts)


def _kv_away(shares: Sequence[Share]) -> frozenset[int]:
    here: dict[int, float] = {}
    for share in shares:
        here[share.layer] = here.get(share.layer, 0.0) + (share.tier == RESIDENT) * share.count / share.of
    stay = int(sum(here.values()) + 1e-6)
    by_share = sorted(here, key=lambda layer: (-here[layer], layer))
    return frozenset(by_share[stay:])

"""Which part of the model a tensor-parallel rank holds. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from rowcast.errors import UserError
from rowcast.runtime.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `world`: whole heads, a contiguous share of the neurons and of the vocabulary."""

    rank: int = 0
    world: int = 1

    def span(self, total: int) -> slice:
        """This rank's share of `total` items: contiguous, sizes differ by at most one."""
        return slice(total * self.rank // self.world, total * (self.rank + 1) // self.world)

    def query_heads(self, spec: ModelSpec) -> slice:
        """This rank's query heads."""
        return self.span(spec.num_heads)

    def kv_heads(self, spec: ModelSpec) -> slice:
        """The KV heads that this rank's query heads read. Ranks beyond the number of KV heads share copies."""
        heads = self.query_heads(spec)
        return slice(heads.start // spec.group_size, (heads.stop - 1) // spec.group_size + 1)

    def vocabulary(self, spec: ModelSpec) -> slice:
        """This rank's vocabulary rows. All ranks but the last have ceil(V / world) of them."""
        size = -(-spec.vocab_size // self.world)
        return slice(min(spec.vocab_size, self.rank * size), min(spec.vocab_size, (self.rank + 1) * size))

    def check(self, spec: ModelSpec) -> None:
        """Raise UserError unless the heads can be dealt out evenly."""
        world, heads, kv_heads = self.world, spec.num_heads, spec.num_kv_heads
        if not 0 <= self.rank < world:
            raise UserError(f"rank {self.rank} is outside 0..{world - 1}")
        if kv_heads % world and (world % kv_heads or heads % world):
            fits = [w for w in range(1, heads + 1) if kv_heads % w == 0 or (w % kv_heads == 0 and heads % w == 0)]
            raise UserError(
                f"tensor_parallel_size={world} does not divide the model's {kv_heads} KV heads ({heads} query heads): use one of {fits}"
            )

"""The decoder: one forward pass for every family, over any weight view and any KV view.

It knows the order of sub-layers, residuals and rotations. It does not know where weights or KV are, how many rows of them are
read, or how many ranks there are beyond summing their parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.runtime.protocols import Comm, KVView, WeightView
from rowcast.runtime.rope import Rope, apply_rope
from rowcast.runtime.step import SeqStep


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a forward pass reads of T tokens, [T] int64 each, on the device."""

    ids: Tensor
    positions: Tensor
    prompt_lengths: Tensor
    """Of each token's request; dynamic NTK scaling reads it."""

    @staticmethod
    def of(steps: Sequence[SeqStep], device: torch.device) -> Tokens:
        """The tokens of all steps, in order."""
        return Tokens(
            torch.tensor([t for s in steps for t in s.tokens], device=device),
            torch.tensor([p for s in steps for p in range(s.start, s.start + len(s.tokens))], device=device),
            torch.tensor([s.prompt_length for s in steps for _ in s.tokens], device=device),
        )


class Decoder:
    """A decoder-only transformer on one rank."""

    def __init__(self, weights: WeightView, comm: Comm, device: torch.device) -> None:
        self.spec = weights.spec
        self.device = device
        self._weights = weights
        self._comm = comm
        self._rope = Rope(self.spec.rope, self.spec.head_dim, device) if self.spec.rope is not None else None

    def run(self, steps: Sequence[SeqStep], kv: KVView) -> Tensor:
        """`forward` over the tokens of all steps, T in all, after binding them to `kv`. Returns hidden states [T, D]."""
        kv.bind(steps)
        return self.forward(Tokens.of(steps, self.device), kv)

    @torch.inference_mode()
    def forward(self, tokens: Tokens, kv: KVView) -> Tensor:
        """Run the tokens that are bound to `kv` and write their K/V into it as proposals. Asks the device nothing.

        Returns hidden states [T, D] before the final norm; `logits` takes any rows of them.
        """
        spec, weights = self.spec, self._weights
        x = weights.embed(tokens.ids, tokens.positions)
        if spec.embed_norm:
            x = weights.norm(0, "embed", x)
        rotation = None
        if self._rope is not None:
            cos, sin = self._rope.cos_sin(tokens.positions, tokens.prompt_lengths)
            rotation = cos.to(x.dtype), sin.to(x.dtype)
        for layer in range(spec.num_layers):
            x = self._layer(layer, x, rotation, kv)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, D] -> logits [T, V], the same on every rank."""
        if self.spec.final_norm:
            hidden = self._weights.norm(0, "final", hidden)
        local = self._weights.head(hidden)
        if self._comm.world == 1:
            return local
        return self._comm.exchange(local).transpose(0, 1).flatten(1)[:, : self.spec.vocab_size]

    def _layer(self, layer: int, x: Tensor, rotation: tuple[Tensor, Tensor] | None, kv: KVView) -> Tensor:
        # [T, D] -> [T, D]
        spec, weights, reduce = self.spec, self._weights, self._comm.all_reduce
        if spec.parallel_norms:
            normed = weights.norm(layer, "attn", x)
            mlp_in = normed if spec.parallel_norms == 1 else weights.norm(layer, "mlp", x)
            return x + reduce(self._attention(layer, normed, rotation, kv) + weights.mlp(layer, mlp_in))
        if not spec.pre_norm:
            x = weights.norm(layer, "attn", x + reduce(self._attention(layer, x, rotation, kv)))
            return weights.norm(layer, "mlp", x + reduce(weights.mlp(layer, x)))
        normed = weights.norm(layer, "attn", x)
        x = (normed if spec.residual_from_norm else x) + reduce(self._attention(layer, normed, rotation, kv))
        normed = weights.norm(layer, "mlp", x)
        return (normed if spec.residual_from_norm else x) + reduce(weights.mlp(layer, normed))

    def _attention(self, layer: int, x: Tensor, rotation: tuple[Tensor, Tensor] | None, kv: KVView) -> Tensor:
        # [T, D] -> this rank's part of the sum, [T, D]
        q, k, v = self._weights.qkv(layer, x)
        if rotation is not None:
            q, k = apply_rope(q, *rotation), apply_rope(k, *rotation)
        kv.append(layer, k, v)
        return self._weights.out(layer, kv.attend(layer, q))

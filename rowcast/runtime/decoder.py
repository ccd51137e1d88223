"""The decoder: one forward pass for every family, over any weight view and any KV view.

It knows the order of sub-layers, residuals and rotations. It does not know where weights or KV are, how many rows of them are
read, or how many ranks there are beyond summing their parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rowcast.runtime.norm import Norm
from rowcast.runtime.protocols import Comm, DeviceKV, KeepsLayer, KVView, Late, Rotation, RunsByLayer, Tokens, WeightView
from rowcast.runtime.rope import Rope, apply_rope
from rowcast.runtime.sharded_logits import Logits, ShardedLogits, whole
from rowcast.runtime.step import SeqStep


def tokens_of(steps: Sequence[SeqStep], device: torch.device) -> Tokens:
    """The tokens of all steps, in order."""
    return Tokens(
        torch.tensor([t for s in steps for t in s.tokens], device=device),
        torch.tensor([p for s in steps for p in range(s.start, s.start + len(s.tokens))], device=device),
        torch.tensor([s.prompt_length for s in steps for _ in s.tokens], device=device),
        steps,
    )


class Decoder:
    """A decoder-only transformer on one rank."""

    def __init__(self, weights: WeightView, comm: Comm, device: torch.device) -> None:
        self.spec = weights.spec
        self.device = device
        self.weights = weights
        self._comm = comm
        self._rope = Rope(self.spec.rope, self.spec.head_dim, device) if self.spec.rope is not None else None

    def run(self, steps: Sequence[SeqStep], kv: KVView) -> Tensor:
        """`forward` over the tokens of all steps, T in all, after binding them to `kv`. Returns hidden states [T, D]."""
        kv.bind(steps)
        return self.forward(tokens_of(steps, self.device), kv)

    @torch.inference_mode()
    def forward(self, tokens: Tokens, kv: KVView) -> Tensor:
        """Run the tokens that are bound to `kv` and write their K/V into it as proposals. Asks the device nothing.

        Returns hidden states [T, D] before the final norm; `logits` takes any rows of them.
        """
        x, rotation = self.embed(tokens, kv)
        if isinstance(kv, KeepsLayer) and isinstance(self.weights, RunsByLayer) and len(parts := kv.parts()) > 1:
            return self._by_layer(x, rotation, kv, [sum(len(step.tokens) for step in part) for part in parts])
        normed = None
        for layer in range(self.spec.num_layers):
            last = layer == self.spec.num_layers - 1 or not self.spec.pre_norm
            behind = None if last else self.weights.norm_of(layer + 1, "attn")
            x, normed = self._layer(layer, x, normed, rotation, kv, behind)
        return x

    @torch.inference_mode()
    def embed(self, tokens: Tokens, kv: KVView) -> tuple[Tensor, Rotation]:
        """Begin a pass over `kv`: what enters the first layer, [T, D], and the rotation of all of them."""
        self.weights.begin(tokens, kv)
        x = self.weights.embed(tokens.ids, tokens.positions)
        if self.spec.embed_norm:
            x = self.weights.norm_of(0, "embed")(x)
        if self._rope is None:
            return x, None
        cos, sin = self._rope.cos_sin(tokens.positions, tokens.prompt_lengths)
        return x, (cos.to(x.dtype), sin.to(x.dtype))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, D] -> logits [T, V], the same on every rank."""
        return whole(self.own_logits(hidden))

    @torch.inference_mode()
    def own_logits(self, hidden: Tensor) -> Logits:
        """Hidden states [T, D] -> logits [T, V], of which each of several ranks has its own columns."""
        if self.spec.final_norm:
            hidden = self.weights.norm_of(0, "final")(hidden)
        local = self.weights.head(hidden)
        if self._comm.world == 1:
            return local
        return ShardedLogits(local, self._comm, self.spec.vocab_size)

    def layer(self, layer: int, x: Tensor, rotation: Rotation, kv: KVView) -> Tensor:
        """One layer of the pass that `embed` began: [T, D] -> [T, D]."""
        return self._layer(layer, x, None, rotation, kv, None)[0]

    def _layer(
        self, layer: int, x: Tensor, normed: Tensor | None, rotation: Rotation, kv: KVView, behind: Norm | None
    ) -> tuple[Tensor, Tensor | None]:
        """`layer`, and `behind` of what it gives, where there is one. `normed`: what the layer's first norm makes of x, if known."""
        spec, weights, comm = self.spec, self.weights, self._comm
        if not spec.pre_norm:
            attended = self._attention(layer, x, rotation, kv, self._own(x))
            x = comm.all_reduce_norm(attended, weights.norm_of(layer, "attn"))[1]
            return comm.all_reduce_norm(weights.mlp(layer, x, self._own(x)), weights.norm_of(layer, "mlp"))[1], None
        if normed is None:
            normed = weights.norm_of(layer, "attn")(x)
        if spec.parallel_norms:
            mlp_in = normed if spec.parallel_norms == 1 else weights.norm_of(layer, "mlp")(x)
            part = weights.mlp(layer, mlp_in, self._attention(layer, normed, rotation, kv, self._own(x)))
        else:
            attended = self._attention(layer, normed, rotation, kv, self._own(normed if spec.residual_from_norm else x))
            x, normed = comm.all_reduce_norm(attended, weights.norm_of(layer, "mlp"))
            part = weights.mlp(layer, normed, self._own(normed if spec.residual_from_norm else x))
        return (comm.all_reduce(part), None) if behind is None else comm.all_reduce_norm(part, behind)

    def _by_layer(self, x: Tensor, rotation: Rotation, kv: Any, sizes: Sequence[int]) -> Tensor:
        """`forward` over parts of so many tokens: each layer over all of them, before the next one. Overwrites x [T, D]."""
        self.weights.repeat(len(sizes))  # type: ignore[attr-defined]
        ends = list(accumulate(sizes))
        for layer in range(self.spec.num_layers):
            for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
                rows = slice(end - size, end)
                kv.part(number)
                turned = None if rotation is None else (rotation[0][rows], rotation[1][rows])
                x[rows] = self.layer(layer, x[rows], turned, kv)
        return x

    def _attention(self, layer: int, x: Tensor, rotation: Rotation, kv: KVView, residual: Tensor | None) -> Tensor:
        # [T, D] -> this rank's part of the sum, [T, D]
        q, k, v = self.weights.qkv(layer, x)
        heads = self.weights.heads(layer)
        if heads.late is not None:
            kv.fill(layer, self._rotated(heads.late))
        if isinstance(kv, DeviceKV):
            q = kv.rotate_append(layer, q, k, v, rotation)
        else:
            if rotation is not None:
                q, k = apply_rope(q, *rotation), apply_rope(k, *rotation)
            kv.append(layer, k, v)
        return self.weights.out(layer, kv.attend(layer, q, heads.queries), residual)

    def _own(self, residual: Tensor) -> Tensor | None:
        """The residual, which is in the sum once."""
        return residual if self._comm.rank == 0 else None

    def _rotated(self, late: Late) -> Late:
        """With RoPE at the tokens' own positions."""
        if self._rope is None:
            return late
        cos, sin = self._rope.cos_sin(late.positions, late.prompt_lengths)
        return replace(late, k=apply_rope(late.k, cos.to(late.k.dtype), sin.to(late.k.dtype)))

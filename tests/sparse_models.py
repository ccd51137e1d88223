"""Tiny models in the bank layout, a slow reference of choosing heads, and how to run them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import VOCAB, tiny_model
from torch import Tensor

from rowcast.runtime.banks import BankWeights
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.ladder.spec import HeadReads
from rowcast.runtime.protocols import Comm, KVView, Tokens, WeightView
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.heads import HeadSelector, top_heads
from rowcast.runtime.sparse.weights import SparseWeights
from rowcast.runtime.step import SeqStep

CPU = torch.device("cpu")
BLOCKS = 16
"""Of 4 positions each, of every sequence."""


class HeadModel:
    """A tiny model and a random head predictor for each layer, which favours no head."""

    def __init__(self, name: str, path: Path, **overrides: Any) -> None:
        tiny_model(name, path, **overrides)
        self.spec = spec_from_config(json.loads((path / "config.json").read_text()))
        self.source = SafetensorsSource.open(path)
        self.banks = BankWeights(self.spec, self.source, SoloComm(), dtype=torch.float32, device=CPU)
        generator = torch.Generator().manual_seed(11)
        shape = self.spec.num_heads, self.spec.hidden_size
        self._weights = [torch.randn(shape, generator=generator) for _ in self.banks.ffn]
        seen = _Inputs(self.banks)
        Run(seen, self.paged()).alone(self.tokens(50), [50], 50)
        self._means = {"own": seen.attention, "ahead": seen.attention[:1] + seen.mlps[:-1]}

    def tokens(self, count: int, seed: int = 3) -> list[int]:
        return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    def predictor(self, layer: int, reads: HeadReads) -> tuple[Tensor, Tensor]:
        """weight [H, D], bias [H]."""
        weight = self._weights[layer]
        return weight, -weight @ self._means[reads][layer]

    def selectors(self, keep: int, reads: HeadReads = "own") -> list[HeadSelector]:
        return [
            HeadSelector(*self.predictor(i, reads), keep=keep, reads=reads if i else "own") for i in range(self.spec.num_layers)
        ]

    def view(self, keep: int, reads: HeadReads = "own") -> SparseWeights:
        return SparseWeights(self.banks, [None] * self.spec.num_layers, heads=self.selectors(keep, reads))

    def paged(self, sequences: int = 1, *, lazy: bool = True, keep_queries: int = 0) -> PagedKV:
        return PagedKV(
            self.spec,
            Shard(),
            num_blocks=BLOCKS * sequences,
            block_size=4,
            dtype=torch.float32,
            device=CPU,
            keep_queries=keep_queries,
            lazy=lazy,
        )


class Run:
    """A decoder over a KV view, pass by pass."""

    def __init__(self, view: WeightView, kv: KVView, comm: Comm | None = None) -> None:
        self.view, self.kv = view, kv
        self._decoder = Decoder(view, comm or SoloComm(), CPU)

    def __call__(self, *passes: tuple[int, Sequence[int], int], prompt: int) -> Tensor:
        """One pass over (sequence, tokens, start) each: hidden states [T, D]."""
        steps = []
        for seq_id, tokens, start in passes:
            self.kv.admit(seq_id)
            blocks = list(range(BLOCKS * seq_id, BLOCKS * (seq_id + 1)))[::-1]
            steps.append(SeqStep(seq_id, list(tokens), start, blocks, prompt, sample=True))
        return self._decoder.run(steps, self.kv)

    def alone(self, tokens: Sequence[int], cuts: Sequence[int], prompt: int, seq_id: int = 0) -> Tensor:
        """A sequence in committed passes that end at `cuts`: hidden states of all tokens."""
        rows, start = [], 0
        for end in cuts:
            rows.append(self((seq_id, tokens[start:end], start), prompt=prompt))
            self.kv.commit(seq_id, end - start)
            start = end
        return torch.cat(rows)


class _Wrapped:
    """A view that runs all rows of given banks."""

    on_device = False

    def __init__(self, banks: BankWeights) -> None:
        self.spec, self._banks = banks.spec, banks
        self.embed, self.norm_of, self.head, self.heads = banks.embed, banks.norm_of, banks.head, banks.heads
        self.reads = banks.reads

    def begin(self, tokens: Tokens, kv: KVView) -> None:
        self._banks.begin(tokens, kv)

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._banks.qkv(layer, x)

    def out(self, layer: int, heads: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._banks.out(layer, heads, residual)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._banks.mlp(layer, x, residual)


class _Inputs(_Wrapped):
    """Keeps what each layer's attention and MLP read of a pass, [D] means."""

    def __init__(self, banks: BankWeights) -> None:
        super().__init__(banks)
        self.attention: list[Tensor] = []
        self.mlps: list[Tensor] = []

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.attention.append(x.mean(0))
        return super().qkv(layer, x)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.mlps.append(x.mean(0))
        return super().mlp(layer, x, residual)


class EagerReference(_Wrapped):
    """Everything is computed; the heads that a token does not choose are set to 0 before the output product."""

    def __init__(self, model: HeadModel, keep: int, reads: HeadReads = "own") -> None:
        super().__init__(model.banks)
        self._predictors = [model.predictor(layer, reads) for layer in range(model.spec.num_layers)]
        self._keep, self._reads = keep, reads

    def begin(self, tokens: Tokens, kv: KVView) -> None:
        super().begin(tokens, kv)
        self._prompt = torch.tensor([not generated for generated in tokens.generated])[:, None]

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._reads == "own" or layer == 0:
            self._seen = x
        return super().qkv(layer, x)

    def out(self, layer: int, heads: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, bias = self._predictors[layer]
        own = top_heads(self._seen @ weight.T + bias, self._keep) | self._prompt
        return super().out(layer, heads * own[:, :, None], residual)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._reads == "ahead":
            self._seen = x
        return super().mlp(layer, x, residual)

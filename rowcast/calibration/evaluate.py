"""Quality of sparse and low-bit views beside the dense model, teacher-forced over windows of real text.

A window runs in one pass, its first token as the prompt, so that all others count as generated. Such a pass reads all rows, and each
token still uses its own set: the law is that of decoding token by token, and many tokens at once are fast. Bytes are those of
decoding one token at a time, measured by doing so for a few tokens.

A view that answers by itself (`laws_of`) sees K/V of its own. One that drafts (`drafts_of`) sees the exact model's, which has judged
all tokens that stand, and its own of the tokens of the same run alone: it is right more often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rowcast.calibration.metrics import Laws, Sets
from rowcast.calibration.recording import OneLayerKV, RunsKV, window_steps
from rowcast.kernels import select
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.protocols import WeightView
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.attention import HeadObserver
from rowcast.runtime.sparse.heads import contributions, top_heads
from rowcast.runtime.sparse.scorers import Oracle, Proxy
from rowcast.runtime.sparse.selection import Selector, shards_for
from rowcast.runtime.sparse.weights import Observer, SparseWeights
from rowcast.runtime.step import SeqStep

LOGIT_ROWS = 128
"""Rows of logits that are held at a time, of the dense model and of one view."""
DECODED_PROMPT, DECODED_TOKENS = 8, 8
"""Of the text that bytes are measured on."""
DRAFTED = 4
"""Tokens of a run of drafts: its first one sees, beside its own, the exact model's K/V alone."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One sparse or low-bit view."""

    laws: Laws
    """By itself."""
    drafts: Laws
    """As a rung."""
    neurons: Sets
    heads: Sets
    bytes_per_token: float
    """Weights that a token reads when it is decoded alone, proxies included."""
    neurons_share: float
    """Of the neurons of all layers, also of those that do not choose, what the tokens of `laws` used."""

    def to_json(self, dense: Laws, dense_bytes: int, layers: bool) -> dict[str, Any]:
        """`layers`: with what was chosen by layer."""
        laws = self.laws
        chosen = {kind: sets for kind, sets in (("neurons", self.neurons), ("heads", self.heads)) if sets.layers()}
        return {
            "perplexity": laws.perplexity,
            "perplexity_over_dense": laws.perplexity - dense.perplexity,
            "kl": laws.kl,
            "acceptance": laws.acceptance,
            "draft_acceptance": self.drafts.acceptance,
            "greedy": laws.greedy,
            **{kind: sets.overall().to_json() for kind, sets in chosen.items()},
            **({"neurons_share": self.neurons_share} if "neurons" in chosen else {}),
            "bytes_per_token": self.bytes_per_token,
            "bytes_share": self.bytes_per_token / dense_bytes,
            **({f"{kind}_by_layer": sets.by_layer() for kind, sets in chosen.items()} if layers else {}),
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found."""

    dense: Laws
    dense_bytes: int
    views: Mapping[str, Measured]

    def to_json(self, layers: bool = False) -> dict[str, Any]:
        """`layers`: with what was chosen by layer."""
        return {
            "tokens": self.dense.tokens,
            "dense": {"perplexity": self.dense.perplexity, "bytes_per_token": self.dense_bytes},
            "views": {name: one.to_json(self.dense, self.dense_bytes, layers) for name, one in self.views.items()},
        }


@torch.inference_mode()
def evaluate(
    banks: BankWeights,
    views: Mapping[str, WeightView],
    windows: Sequence[Sequence[int]],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    advance: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure `views` over `banks` by name, beside `banks` itself.

    `windows`: token ids, at least 3 each; every token behind the second is predicted. `advance` is called after each pass. Memory
    beside the models: hidden states of one window for each view, K/V of two in all layers, and `LOGIT_ROWS` rows of logits.
    """
    sets, head_sets = {name: Sets() for name in views}, {name: Sets() for name in views}
    sparse = {name: view for name, view in views.items() if isinstance(view, SparseWeights)}
    for name, view in sparse.items():
        view.observe(_neurons_into(sets[name], banks), _heads_into(head_sets[name], banks))
        view.reads()
    dense, laws = laws_of(banks, views, windows, device=device, dtype=dtype, advance=advance)
    shares = dict.fromkeys(views, 1.0)
    for name, view in sparse.items():
        view.observe(None, None)
        reads = view.reads()
        shares[name] = reads.neurons / reads.neurons_of
    drafts = drafts_of(banks, views, windows, device=device, dtype=dtype, advance=advance)
    read = {name: bytes_per_token(view, windows[0], device=device, dtype=dtype) for name, view in views.items()}
    measured = {name: Measured(laws[name], drafts[name], sets[name], head_sets[name], read[name], shares[name]) for name in views}
    return Evaluation(dense, banks.bytes, measured)


@torch.inference_mode()
def laws_of(
    banks: BankWeights,
    views: Mapping[str, WeightView],
    windows: Sequence[Sequence[int]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Laws, dict[str, Laws]]:
    """Laws of the dense model and of each view; arguments as in `evaluate`."""
    kv = OneLayerKV(banks.spec, 1, max(map(len, windows)), dtype=dtype, device=device)
    dense, dense_laws = Decoder(banks, SoloComm(), device), Laws()
    decoders = {name: Decoder(view, SoloComm(), device) for name, view in views.items()}
    laws = {name: Laws() for name in views}
    for window in windows:
        ids = torch.tensor(window, device=device)

        def hidden(decoder: Decoder, ids: Tensor = ids) -> Tensor:
            # Of all tokens but the prompt, which is dense, and the last, which has no successor: [T - 2, D].
            found = decoder.run(window_steps(ids[None], prompt_length=1), kv)[1:-1]
            kv.free(0)
            advance()
            return found

        expected, found = hidden(dense), {name: hidden(decoder) for name, decoder in decoders.items()}
        for rows, log_p in _rows(dense, expected):
            dense_laws.add(log_p, log_p, ids[2:][rows])
            for name, decoder in decoders.items():
                laws[name].add(log_p, _log_softmax(decoder, found[name][rows]), ids[2:][rows])
    return dense_laws, laws


@torch.inference_mode()
def drafts_of(
    banks: BankWeights,
    views: Mapping[str, WeightView],
    windows: Sequence[Sequence[int]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Laws]:
    """Laws of each view that drafts, in runs of `DRAFTED` tokens, for `banks`, whose K/V stands behind them; arguments as in
    `evaluate`. The first run of a window has one draft less: its first token is the prompt."""
    decoders = {name: Decoder(view, SoloComm(), device) for name, view in views.items()}
    dense, laws = Decoder(banks, SoloComm(), device), {name: Laws() for name in views}
    kv = RunsKV(banks.spec, max(map(len, windows)), DRAFTED, dtype=dtype, device=device)
    for window in windows:
        ids = torch.tensor(window, device=device)

        def passed(decoder: Decoder, steps: Sequence[SeqStep]) -> Tensor:
            found = decoder.run(steps, kv)[1:-1]
            for step in steps:
                kv.free(step.seq_id)
            advance()
            return found

        expected = passed(dense, [kv.whole(window)])
        found = {name: passed(decoder, kv.runs(window)) for name, decoder in decoders.items()}
        for rows, log_p in _rows(dense, expected):
            for name, decoder in decoders.items():
                laws[name].add(log_p, _log_softmax(decoder, found[name][rows]), ids[2:][rows])
    return laws


def _rows(decoder: Decoder, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`LOGIT_ROWS` at a time, with their laws."""
    for start in range(0, len(hidden), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        yield rows, _log_softmax(decoder, hidden[rows])


@torch.inference_mode()
def bytes_per_token(view: WeightView, ids: Sequence[int], *, device: torch.device, dtype: torch.dtype) -> float:
    """Weights that `view` reads for each token that it decodes alone, on average over a few tokens behind a prompt."""
    ids = ids[: DECODED_PROMPT + DECODED_TOKENS]
    prompt = min(DECODED_PROMPT, len(ids) - 1)
    kv = PagedKV(view.spec, Shard(), num_blocks=1, block_size=len(ids), dtype=dtype, device=device)
    decoder = Decoder(view, SoloComm(), device)
    for step in _one_by_one(ids, prompt):
        if step.start == prompt:
            view.reads()
        decoder.logits(decoder.run([step], kv))
        kv.commit(0, len(step.tokens))
    return view.reads().bytes / (len(ids) - prompt)


def _one_by_one(ids: Sequence[int], prompt: int) -> Iterator[SeqStep]:
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, len(ids)))]:
        yield SeqStep(seq_id=0, tokens=list(ids[start:end]), start=start, blocks=[0], prompt_length=prompt, sample=True)


def _neurons_into(sets: Sets, banks: BankWeights) -> Observer:
    def observe(layer: int, selector: Selector, hidden: Tensor, own: Tensor) -> None:
        # hidden, own [T, N], the first token's set being all neurons
        scorer = selector.scorer
        score = banks.ffn[layer].score(hidden[1:], norms=scorer.norms if isinstance(scorer, (Oracle, Proxy)) else None)
        if selector.threshold is None:
            best = select.top_mask(score, selector.keep, shards_for(score.shape[1]))
        else:
            best = _best(score, own[1:].sum(-1))
        sets.add(layer, own[1:], best, score)

    return observe


def _best(score: Tensor, counts: Tensor) -> Tensor:
    """Each token's own number of best scores: [T, N], [T] -> [T, N] bool."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, places < counts[:, None])


def _heads_into(sets: Sets, banks: BankWeights) -> HeadObserver:
    def observe(layer: int, outputs: Tensor, own: Tensor) -> None:
        # outputs [T, H, d], own [T, H], the first token's set being all heads
        score = contributions(outputs[1:], banks.attention[layer].o)
        sets.add(layer, own[1:], top_heads(score, int(own[1].sum())), score)

    return observe


def _log_softmax(decoder: Decoder, hidden: Tensor) -> Tensor:  # [T, D] -> [T, V] float32
    return decoder.logits(hidden).float().log_softmax(-1)

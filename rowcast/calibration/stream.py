"""The pass over the text: all windows through one layer, then all through the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.calibration.curves import Rows
from rowcast.calibration.fitting import LayerRows
from rowcast.calibration.moments import Moments
from rowcast.calibration.recording import OneLayerKV, RecordingWeights, window_steps
from rowcast.calibration.text import Windows
from rowcast.runtime.banks import AttentionBank
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.decoder import Decoder, tokens_of

BATCH_TOKENS = 4096
FIT_BYTES = 1 << 28
"""Most memory for the hidden states of one kind that fits read."""
FIT_ROWS, HELD_ROWS = 32768, 1024


@dataclass(frozen=True, slots=True)
class Collected:
    """Of one layer."""

    moments: Moments
    """Of (attention's input, MLP's input), over all tokens to fit to."""
    rows: LayerRows
    """Of some of them, and of held-out ones."""


class Stream:
    """Windows of text on their way through a model. What they begin with is run, and nothing is learnt of it: prompts are dense."""

    def __init__(self, weights: RecordingWeights, windows: Windows, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self._weights, self._device, self._dtype = weights, device, dtype
        self._decoder = Decoder(weights, SoloComm(), device)
        self._windows = torch.cat([windows.fit, windows.held])
        self.tokens = self._windows.numel()
        """That are run."""
        self._begins, self._fit_windows = len(windows.begins), len(windows.fit)
        places = torch.arange(self.tokens).view(self._windows.shape)[:, self._begins :]
        self.fit_tokens, self.held_tokens = places[: self._fit_windows].flatten(), places[self._fit_windows :].flatten()
        """Where in the stream those lie that are learnt from, and those that judge."""
        hidden = weights.spec.hidden_size
        generator = torch.Generator().manual_seed(seed)
        fit_rows = min(FIT_ROWS, len(self.fit_tokens), max(1, FIT_BYTES // (4 * hidden)))
        self._fit = self.fit_tokens[torch.randperm(len(self.fit_tokens), generator=generator)[:fit_rows].sort().values]
        self._held = self.held_tokens[torch.randperm(len(self.held_tokens), generator=generator)[:HELD_ROWS].sort().values]

    @torch.no_grad()
    def run(self, layer: int, entering: Tensor, leaving: Tensor, progress: Callable[[int], None]) -> Collected:
        """All tokens through one layer: `entering` [tokens, D] (not read for layer 0) -> `leaving`. `progress` is told of tokens."""
        weights, spec = self._weights, self._weights.spec
        window = self._windows.shape[1]
        moments = Moments.zero(spec.hidden_size, spec.hidden_size, self._device)
        fit, held = (_Sampler(rows, _gram(weights.attention[layer], spec.head_dim)) for rows in (self._fit, self._held))
        batch = max(1, BATCH_TOKENS // window)
        kv = OneLayerKV(spec, batch, window, dtype=self._dtype, device=self._device)
        for windows in torch.split(self._windows, batch):
            start = fit.seen
            rows = slice(start, start + windows.numel())
            steps = window_steps(windows, prompt_length=window)
            kv.bind(steps)
            x, rotation = self._decoder.embed(tokens_of(steps, self._device), kv)
            if layer:
                x = entering[rows].to(self._device)
            leaving[rows] = self._decoder.layer(layer, x, rotation, kv).to(leaving.device)
            ours = max(0, self._fit_windows - start // window)
            moments.add(*(self._learnt(x, ours) for x in (weights.attention_input, weights.mlp_input)))
            for sampler in (fit, held):
                sampler.add(weights.attention_input, weights.mlp_input, weights.head_outputs)
            progress(windows.numel())
        return Collected(moments, LayerRows(fit.rows(), held.rows()))

    def _learnt(self, x: Tensor, windows: int) -> Tensor:
        """Of a batch's rows [T, D], those that are learnt from: all of its first `windows` but what these begin with."""
        return x.view(-1, self._windows.shape[1], x.shape[1])[:windows, self._begins :].flatten(0, 1)


class _Sampler:
    """Gathers chosen tokens' rows from a stream of all tokens."""

    def __init__(self, chosen: Tensor, gram: Tensor) -> None:
        """`chosen` [S] ascending; `gram` [H, d, d] of each head's output rows."""
        self._chosen, self._gram = chosen, gram
        self._parts: list[Rows] = []
        self.seen = 0

    def add(self, attention: Tensor, mlp: Tensor, heads: Tensor) -> None:  # [T, D], [T, D], [T, H, d]
        low, high = torch.searchsorted(self._chosen, torch.tensor([self.seen, self.seen + len(attention)])).tolist()
        rows = (self._chosen[low:high] - self.seen).to(attention.device)
        outputs = heads[rows].float()
        squares = torch.einsum("thd,hde,the->th", outputs, self._gram, outputs)
        self._parts.append(Rows(attention[rows].float(), mlp[rows].float(), squares.clamp_min(0).sqrt()))
        self.seen += len(attention)

    def rows(self) -> Rows:
        return Rows(*(torch.cat([getattr(part, name) for part in self._parts]) for name in ("attention", "mlp", "heads")))


def _gram(bank: AttentionBank, head_dim: int) -> Tensor:
    # -> [H, d, d]
    rows = bank.o.float().view(-1, head_dim, bank.o.shape[1])
    return rows @ rows.transpose(1, 2)

"""The products behind a cut, fitted again in closed form: least squares over text, layer by layer, so that what is left gives what
the whole model gave (as ZipLM, arXiv 2302.04089, and SparseGPT, arXiv 2301.00774, do for what they remove)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rowcast.calibration.learning.state import load_tensors, save_tensors
from rowcast.calibration.pruning.blocks import Block, Calls, Run, blocks_of, entering, watching
from rowcast.runtime.spec import ModelSpec

RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Of each input's mean square, added to it: what the text says little of changes little."""
HELD_EVERY = 5
"""Every so many windows, or the last one, there is one that ridges are chosen by."""


class Normal:
    """Sums of a least-squares problem: the change of a product [out, in] (and of its bias) that makes up for residuals."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear
        self._biased = linear.bias is not None
        size = linear.in_features + self._biased
        self._sums = [_Sums.zero(size, linear.out_features, linear.weight.device) for _ in range(2)]

    def add(self, x: Tensor, residual: Tensor, weight: Tensor, held: Tensor) -> None:
        """The product is given x [T, in], and `residual` [T, out] is what it should give more; `weight` [T, 1] multiplies both.

        `held`: bool [T], tokens that ridges are chosen by. Products in single precision.
        """
        x, residual = x.float(), residual.float() * weight
        if self._biased:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        x = x * weight
        self._sums[0].add(x[~held], residual[~held])
        self._sums[1].add(x[held], residual[held])

    @torch.no_grad()
    def solve(self) -> float:
        """Change the product, by the ridge that leaves least of the held tokens' residuals, or not at all where none leaves less.

        Returns the sum of their squares that is left over that of before. The change is then fitted to all tokens.
        """
        fit, held = self._sums
        left = {ridge: held.left(self._change(fit, ridge)) for ridge in RIDGES} if held.rr and fit.rr else {}
        best = min(left, key=lambda ridge: left[ridge], default=0.0)
        if not left or left[best] >= held.rr:
            return 1.0
        change = self._change(fit.plus(held), best)
        inputs = self._linear.in_features
        self._linear.weight.add_(change[:inputs].T.to(self._linear.weight.dtype))
        if self._biased:
            self._linear.bias.add_(change[inputs].to(self._linear.bias.dtype))
        return left[best] / held.rr

    def _change(self, sums: _Sums, ridge: float) -> Tensor:  # [in (+ 1), out]
        xx = sums.xx.clone()
        squares = sums.xx.diagonal()[: self._linear.in_features]
        xx.diagonal()[: self._linear.in_features].add_(ridge * squares)
        xx.diagonal().add_(1e-9 * xx.diagonal().mean())
        return torch.cholesky_solve(sums.xr, torch.linalg.cholesky(xx))


@dataclass(slots=True)
class _Sums:
    xx: Tensor
    """[in, in] float64."""
    xr: Tensor
    """[in, out] float64."""
    rr: float = 0.0

    @classmethod
    def zero(cls, inputs: int, outputs: int, device: torch.device) -> _Sums:
        xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        return cls(xx, xx.new_zeros(inputs, outputs))

    def add(self, x: Tensor, residual: Tensor) -> None:  # [T, in], [T, out]
        self.xx.add_(x.T @ x)
        self.xr.add_(x.T @ residual)
        self.rr += float(residual.double().square().sum())

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(self.xx + other.xx, self.xr + other.xr, self.rr + other.rr)

    def left(self, change: Tensor) -> float:
        """Sum of squares of the residuals behind the change [in, out]."""
        return self.rr - 2 * float((change * self.xr).sum()) + float((change * (self.xx @ change)).sum())


@torch.no_grad()
def refit(
    whole: Any,
    smaller: Any,
    spec: ModelSpec,
    smaller_spec: ModelSpec,
    windows: Tensor,
    *,
    device: torch.device,
    folder: Path | None = None,
    batch_tokens: int = 4096,
    advance: Callable[[int], None] = lambda tokens: None,
    saved: Callable[[], None] = lambda: None,
) -> list[tuple[float, float]]:
    """Fit the output and down products of `smaller`, layer by layer, over windows [W, T] of token ids.

    What a layer is given comes from the fitted layers before it. What its products should give is what those of `whole` give plus what
    the residual stream lacks by then, so that errors do not pile up; where a norm stands behind the sum (`pre_norm` false) without the
    latter. A token's errors count over the length of what the whole layer gives, since the next norm divides by it.

    Returns for each layer the sum of squared residuals that is left over that of before the fit, of attention and MLP, on the windows
    that ridges are chosen by; W is at least 2. Layers that are done are kept in `folder`, and taken from there. `advance` is told of
    tokens times layers, `saved` is called when another layer is in `folder`. Host memory: five hidden states a token.
    """
    assert len(windows) > 1
    batches = [ids.to(device) for ids in torch.split(windows, max(1, batch_tokens // windows.shape[1]))]
    pairs = list(zip(blocks_of(whole, spec), blocks_of(smaller, smaller_spec), strict=True))
    exact = [entering(whole, pairs[0][0], ids).cpu() for ids in batches]
    ours = [entering(smaller, pairs[0][1], ids).cpu() for ids in batches]
    calls = {
        ids.shape: (Calls.of(whole, [block for block, _ in pairs], ids), Calls.of(smaller, [block for _, block in pairs], ids))
        for ids in batches
    }
    number = torch.arange(len(windows))
    held = number % HELD_EVERY == HELD_EVERY - 1 if len(windows) >= HELD_EVERY else number == len(windows) - 1
    tokens_held = torch.split(held.repeat_interleave(windows.shape[1]).to(device), [ids.numel() for ids in batches])
    left = []
    for layer, (old, new) in enumerate(pairs):
        run_old = [calls[ids.shape][0].of_layer(old, layer) for ids in batches]
        run_new = [calls[ids.shape][1].of_layer(new, layer) for ids in batches]
        path = None if folder is None else folder / f"fit-{layer}.safetensors"
        fit = _Fit(old, new, spec.pre_norm and not spec.residual_from_norm, tokens_held, device)
        fit.observe(run_old, exact)
        if path is not None and path.exists():
            found = _taken(path, new)
        else:
            found = fit.attention(run_new, ours), fit.mlp(run_new, ours)
            if path is not None:
                save_tensors(path, _changed(new), {"left": json.dumps(found)})
                saved()
        for i, ids in enumerate(batches):
            exact[i], ours[i] = fit.behind[i], run_new[i](ours[i].to(device)).cpu()
            advance(ids.numel())
        left.append(found)
    return left


class _Fit:
    """One layer, whole and cut."""

    def __init__(self, old: Block, new: Block, catches_up: bool, held: Sequence[Tensor], device: torch.device) -> None:
        self._old, self._new, self._catches_up, self._held, self._device = old, new, catches_up, held, device
        self._out: list[Tensor] = []
        self._down: list[Tensor] = []
        self.behind: list[Tensor] = []
        """What the whole layer gives, by batch, [B, T, D]."""

    def observe(self, runs: Sequence[Run], entering: Sequence[Tensor]) -> None:
        """Run the whole layer."""
        with (
            watching(self._old.out, lambda _, y: self._out.append(y.cpu())),
            watching(self._old.down, lambda _, y: self._down.append(y.cpu())),
        ):
            self.behind = [run(x.to(self._device)).cpu() for run, x in zip(runs, entering, strict=True)]
        self._entered = list(entering)

    def attention(self, runs: Sequence[Run], entering: Sequence[Tensor]) -> float:
        normal = Normal(self._new.out)
        for i, (run, x) in enumerate(zip(runs, entering, strict=True)):
            given, found = _one(self._new.out, run, x.to(self._device), whole=False)[:2]
            residual = self._out[i].to(self._device) - found
            if self._catches_up:
                residual += (self._entered[i] - x).to(self._device).reshape(residual.shape)
            normal.add(given, residual, self._weight(i), self._held[i])
        return normal.solve()

    def mlp(self, runs: Sequence[Run], entering: Sequence[Tensor]) -> float:
        normal = Normal(self._new.down)
        for i, (run, x) in enumerate(zip(runs, entering, strict=True)):
            given, found, behind = _one(self._new.down, run, x.to(self._device), whole=self._catches_up)
            if behind is None:
                residual = self._down[i].to(self._device) - found
            else:
                residual = (self.behind[i].to(self._device) - behind).reshape(found.shape)
            normal.add(given, residual, self._weight(i), self._held[i])
        return normal.solve()

    def _weight(self, batch: int) -> Tensor:
        behind = self.behind[batch].to(self._device).float().flatten(0, 1)
        return behind.square().mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()


class _Enough(Exception):
    """Nobody asks for the rest of the layer."""


def _one(linear: nn.Linear, run: Run, x: Tensor, *, whole: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a product is given and gives in a layer, [T, in] and [T, out], and with `whole` what the layer gives."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(given: Tensor, found: Tensor) -> None:
        seen.append((given, found))
        if not whole:
            raise _Enough

    behind = None
    with watching(linear, see), suppress(_Enough):
        behind = run(x)
    return *seen[0], behind


def _taken(path: Path, block: Block) -> tuple[float, float]:
    tensors, metadata = load_tensors(path)
    for name, tensor in _changed(block).items():
        tensor.copy_(tensors[name])
    attention, mlp = json.loads(metadata["left"])
    return attention, mlp


def _changed(block: Block) -> dict[str, Tensor]:
    found = {"out.weight": block.out.weight, "down.weight": block.down.weight}
    biases = {"out.bias": block.out.bias, "down.bias": block.down.bias}
    return {name: tensor.detach() for name, tensor in (found | biases).items() if tensor is not None}

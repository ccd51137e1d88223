"""How much the model's law of the next token changes where a layer's MLP adds a little along a neuron's column, in nats.

To the second order the divergence KL(p || p') of the laws before and after a change e of what an MLP adds to the residual stream at a
token is e^T F e / 2, with the Fisher matrix F = E[g g^T], g the gradient of log p(y) with respect to that sum and y drawn from the
model's own laws (Amari, Neural Computation 10(2), 1998). Without a neuron of activation h and column w of the down projection e is h w:
the score |h| |w| s with s = sqrt(w^T F w) / |w| is the square root of twice that divergence, comparable over layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rowcast.calibration.adapting.neurons import mlps_of
from rowcast.calibration.pruning.blocks import gradients_of_activations
from rowcast.errors import UserError
from rowcast.runtime.spec import ModelSpec, parameter_count

BATCH_TOKENS = 2048


def needed_bytes(spec: ModelSpec, dtype: torch.dtype, window: int) -> int:
    """About what `sensitivities` takes: the module, what a pass keeps of its tokens in all layers, and three tables of logits."""
    kept = spec.num_layers * (12 * spec.hidden_size + 6 * spec.intermediate_size) * dtype.itemsize
    return parameter_count(spec) * dtype.itemsize + max(BATCH_TOKENS, window) * (kept + 3 * 4 * spec.vocab_size)


def sensitivities(
    module: Any,
    spec: ModelSpec,
    windows: Tensor,
    *,
    device: torch.device,
    seed: int = 0,
    begins: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Tensor]:
    """Of each layer, s of its neurons in the checkpoint's order, [N] float32 above 0, on the CPU.

    `module`: a Transformers causal language model on `device`, for evaluation. `windows` [W, T]: token ids, the first `begins` of each
    only context; the laws of all tokens count, one drawn token each. `advance` is told of tokens. Neurons that no output depends on,
    such as those whose column is 0, get their layer's mean, layers without any the model's. Raises UserError where the module keeps its
    MLPs elsewhere (`mlps_of`), and where gradients are not finite or there are none.
    """
    assert begins < windows.shape[1]
    downs = [mlp.down for mlp in mlps_of(module, spec)]
    squares = [torch.zeros(down.in_features, dtype=torch.float64, device=device) for down in downs]
    generator = torch.Generator().manual_seed(seed)

    def seen(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        # The gradient with respect to an activation is w^T g: neither F nor g is needed.
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].register_hook(add)  # type: ignore[no-untyped-call]

        def add(grad: Tensor) -> None:  # [B, T, N], or OPT's [B T, N]
            rows = grad.reshape(-1, windows.shape[1], grad.shape[-1])[:, begins:]
            total.add_(rows.float().square().sum((0, 1)))

        return see

    handles = [down.register_forward_pre_hook(seen(total)) for down, total in zip(downs, squares, strict=True)]
    try:
        with gradients_of_activations(module), torch.enable_grad():
            for ids in torch.split(windows, max(1, batch_tokens // windows.shape[1])):
                logits = module(input_ids=ids.to(device), use_cache=False).logits
                logits.backward(_of_drawn(logits.detach(), generator))
                advance(ids.numel())
    finally:
        for handle in handles:
            handle.remove()
    for layer, total in enumerate(squares):
        if not total.isfinite().all():
            raise UserError(
                f"gradients of layer {layer} are not finite in {str(downs[0].weight.dtype).removeprefix('torch.')}: use --dtype float32"
            )
    if not any(total.any() for total in squares):
        raise UserError("no gradient reaches any layer: the model's laws do not depend on its MLPs; do without sensitivities")
    found = [
        _over_length(total / windows[:, begins:].numel(), down.weight.detach())
        for total, down in zip(squares, downs, strict=True)
    ]
    known = torch.cat([one[one > 0] for one in found])
    return [torch.where(one > 0, one, one[one > 0].mean() if one.any() else known.mean()) for one in found]


def _of_drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of the log probabilities of a token drawn from each law, with respect to logits [B, T, V]."""
    law = logits.float().softmax(-1)
    places = torch.rand((*law.shape[:-1], 1), generator=generator).to(law.device)
    cumulated = law.cumsum(-1)
    drawn = torch.searchsorted(cumulated, places * cumulated[..., -1:], right=True).clamp_max_(law.shape[-1] - 1)
    return law.neg_().scatter_add_(-1, drawn, torch.ones_like(places)).to(logits.dtype)


def _over_length(squares: Tensor, weight: Tensor) -> Tensor:
    """[N] float32, of E[(w^T g)^2] [N] and down weights [D, N]; 0 where the column is."""
    lengths = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32).double()
    found: Tensor = (squares.sqrt() / lengths).nan_to_num(0.0, 0.0, 0.0)
    return found.float().cpu()

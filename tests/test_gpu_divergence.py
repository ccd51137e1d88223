"""The GPU's kernel of KL and its gradient against torch's, and that training's loss goes through it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_interpreting import take_arrays_as_bounds

from rowcast.calibration.learning import losses
from rowcast.kernels import gpu
from rowcast.kernels.gpu import divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    take_arrays_as_bounds()
    torch.manual_seed(0)
    if DEVICE == "cpu":
        monkeypatch.setattr(divergence, "BLOCK", 64)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variation", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(5, 333), (3, 64), (1, 7)], ids=str)
def test_loss_and_gradient(shape: tuple[int, int], variation: float, dtype: torch.dtype) -> None:
    student, teacher = (3 * torch.randn(2, *shape, device=DEVICE)).to(dtype)
    teacher[0, 0] = 60  # one row all but certain
    kl, other = losses.kl_term(student, teacher), losses.variation_term(student, teacher)
    loss, slope = divergence.divergence_(student.clone(), teacher, variation)
    torch.testing.assert_close(loss, (1 - variation) * kl[0] + variation * other[0], rtol=1e-5, atol=1e-5)
    wanted = (1 - variation) * kl[1] + variation * other[1]
    torch.testing.assert_close(slope.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("variation", [0.0, 0.5])
def test_training_takes_it(variation: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((20, 8), (101, 8)))
    y, v = (torch.randn(shape, device=DEVICE) for shape in ((20, 12), (101, 12)))
    term, calls, kernel = losses.mixed_term(variation), list[int](), divergence.divergence_

    def counted(student: Tensor, teacher: Tensor, variation: float) -> tuple[Tensor, Tensor]:
        calls.append(len(student))
        return kernel(student, teacher, variation)

    monkeypatch.setattr(divergence, "divergence_", counted)
    found = {}
    for serves in (False, True):
        monkeypatch.setattr(gpu, "serves", lambda device, serves=serves: serves)
        loss = losses.head_divergence(x, w, y, v, term=term)
        found[serves] = (loss, *torch.autograd.grad(loss, (x, w)))
    assert calls == [20]
    for mine, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)

"""Muon: what it makes of momentum, which matrices it is for, and a training that goes on with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_runs import CPU, Ends
from tiny import tiny_model
from torch import Tensor, nn

from rowcast.calibration.learning import muon
from rowcast.calibration.learning.module import load_module
from rowcast.calibration.learning.muon import SCALE, Muon, hidden_matrices, orthogonal
from rowcast.calibration.learning.part import Part, Unfinished
from rowcast.calibration.learning.settings import TrainSettings
from rowcast.calibration.learning.state import load_tensors
from rowcast.calibration.learning.trainer import STATE, Trainer
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import open_checkpoint


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 40, 24), (2, 16, 16)])
def test_momentum_is_made_orthogonal(shape: tuple[int, ...], dtype: torch.dtype, error: float) -> None:
    x = draw(*shape) * torch.logspace(-3, 0, shape[-1])
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    inside = u.mT @ orthogonal(x.to(dtype)).float() @ v.mT
    singular = inside.diagonal(dim1=-2, dim2=-1)
    reached = s > 2e-3 * torch.linalg.vector_norm(x, dim=(-2, -1))[:, None]
    assert reached.sum() > reached.numel() / 2 and singular[reached].min() > 0.67 and singular.max() < 1.21
    assert (inside - torch.diag_embed(singular)).abs().max() < error, "its directions are those of x"


def moved(matrices: Sequence[Tensor], step: Callable[[], Any], gradients: list[list[Tensor]]) -> list[Tensor]:
    before = [matrix.detach().clone() for matrix in matrices]
    for each in gradients:
        for matrix, gradient in zip(matrices, each, strict=True):
            matrix.grad = gradient.clone()
        step()
    return [matrix.detach() - start for matrix, start in zip(matrices, before, strict=True)]


def some(shapes: list[tuple[int, int]]) -> tuple[list[nn.Parameter], list[list[Tensor]]]:
    gradients = [[draw(*shape, seed=10 * step + i) for i, shape in enumerate(shapes)] for step in range(4)]
    return [nn.Parameter(0.1 * draw(*shape, seed=100 + i)) for i, shape in enumerate(shapes)], gradients


SHAPES = [(24, 40), (16, 16), (24, 40), (40, 24), (24, 40)]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has one from 2.9 on")
def test_matrices_move_as_the_librarys_do(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices, gradients = some(SHAPES)
    library = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")  # in bfloat16
    wanted = moved(matrices, library.step, gradients)
    for most in (muon.BATCH_ELEMENTS, 2 * 24 * 40):
        monkeypatch.setattr(muon, "BATCH_ELEMENTS", most)
        matrices, gradients = some(SHAPES)
        ours = Muon(matrices, weight_decay=0.1)
        for found, other in zip(moved(matrices, partial(ours.step, 0.02), gradients), wanted, strict=True):
            assert (found - other).norm() < 0.02 * other.norm()


def test_a_step_moves_by_the_rate() -> None:
    matrices, gradients = some(SHAPES)
    ours = Muon(matrices, weight_decay=0.0)
    for step in moved(matrices, partial(ours.step, 0.01), gradients[:1]):
        assert float(step.square().mean().sqrt()) == pytest.approx(0.01 * SCALE, rel=0.25)
    matrices, gradients = some(SHAPES)
    still = [[torch.zeros_like(gradient) for gradient in gradients[0]]]
    for step, matrix in zip(moved(matrices, partial(Muon(matrices, 0.5).step, 0.1), still), some(SHAPES)[0], strict=True):
        torch.testing.assert_close(step, -0.05 * matrix.detach())


@pytest.mark.parametrize("name", ["opt", "llama-gqa", "llama-tied", "bloom", "mpt-clip", "falcon-40b"])
def test_embeddings_and_the_head_are_not_for_it(name: str, tmp_path: Path) -> None:
    tiny_model(name, tmp_path)
    module = load_module(open_checkpoint(str(tmp_path)), torch.float32, CPU)
    chosen = {id(matrix) for matrix in hidden_matrices(module)}
    names = {key for key, value in module.named_parameters() if id(value) in chosen}
    of_layers = {key for key, value in module.named_parameters() if value.dim() == 2 and (".0." in key or ".1." in key)}
    assert names == of_layers and names
    module.requires_grad_(False)
    assert hidden_matrices(module) == []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)])
        for i, value in enumerate(self.parameters()):
            value.data = 0.3 * draw(*value.shape, seed=i)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def make_trainer(folder: Path, stopping: Part | None = None, **settings: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    net = Net()

    def loss_of(step: int, part: int, parts: int) -> Tensor:
        ids = torch.randint(10, (8,), generator=torch.Generator().manual_seed(step))[part::parts]
        loss: Tensor = (net(ids) - draw(10, 4)[ids].tanh()).square().mean()
        return loss

    made = TrainSettings(
        **{"steps": 12, "learning_rate": 0.05, "warmup_steps": 3, "optimizer": "muon", "muon_rate": 0.01, **settings}
    )
    return Trainer(net, loss_of, made, folder, device=CPU, batch_tokens=8, part=stopping, show=False)


def test_a_run_that_was_cut_off_gives_the_same_bits(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole")
    result = whole.run()
    for looks in (1, 7):
        with pytest.raises(Unfinished):
            make_trainer(tmp_path / str(looks), Ends(looks - 1)).run()
        rest = make_trainer(tmp_path / str(looks))
        assert rest.step == looks and rest.run().loss == result.loss
        for mine, other in zip(rest.module.parameters(), whole.module.parameters(), strict=True):
            assert torch.equal(mine, other)
    longer = make_trainer(tmp_path / "longer", steps=100).run()
    assert longer.loss < 0.4 * result.loss


def test_a_state_holds_one_number_beside_a_weight(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run").run()
    kept = set(load_tensors(tmp_path / "run" / STATE)[0])
    assert {"momentum.layers.0.weight", "first.embedding.weight", "second.layers.0.bias"} < kept
    assert not {"first.layers.0.weight", "second.layers.0.weight", "momentum.embedding.weight"} & kept
    with pytest.raises(UserError, match="state of another training"):
        make_trainer(tmp_path / "run", optimizer="adamw")


def test_parts_of_a_batch_are_the_batch(tmp_path: Path) -> None:
    whole, parts = make_trainer(tmp_path / "whole"), make_trainer(tmp_path / "parts", accumulate=4)
    assert whole.run().loss == pytest.approx(parts.run().loss, rel=1e-4)
    for mine, other in zip(parts.module.parameters(), whole.module.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)

"""Steps that are replayed: which are, that their gradients are those of ordinary ones, and what becomes of those that cannot be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import model_with_words, random_words
from torch import Tensor, nn

from rowcast.calibration.adapting.adapt import adapt
from rowcast.calibration.adapting.settings import Settings
from rowcast.calibration.learning import capturing
from rowcast.calibration.learning.capturing import WARM, Captured
from rowcast.calibration.learning.job import How
from rowcast.calibration.learning.settings import Optimizer

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@dataclass
class Again:
    """On a CPU: the same work once more, into the same places."""

    ids: Tensor
    loss: Tensor
    grads: tuple[Tensor | None, ...]
    work: Callable[[], tuple[Tensor, tuple[Tensor | None, ...]]]

    def replay(self) -> None:
        loss, grads = self.work()
        self.loss.copy_(loss)
        for mine, found in zip(self.grads, grads, strict=True):
            if mine is not None and found is not None:
                mine.copy_(found)


def recorded(self: Captured, form: Hashable, ids: Tensor) -> Again:
    held = ids.clone()
    return Again(held, *self._gradients(form, held), lambda: self._gradients(form, held))


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(Captured, "_record", recorded)
    return str(request.param)


class Model:
    """Two weights, of which one has no part in the loss, and how often it really ran."""

    def __init__(self, device: str) -> None:
        self.table = nn.Parameter(torch.arange(12.0, device=device).view(6, 2).cos())
        self.idle = nn.Parameter(torch.ones(3, device=device))
        self.ran = 0

    @property
    def parameters(self) -> list[Tensor]:
        return [self.table, self.idle]

    def loss(self, form: Hashable, ids: Tensor) -> Tensor:
        self.ran += 1
        assert isinstance(form, float)
        return form * F.embedding(ids, self.table).square().sum(-1).sqrt().mean()


def trained(model: Model, device: str, loss: Callable[[Hashable, Tensor], Tensor], forms: list[float]) -> list[float]:
    optimiser = torch.optim.SGD(model.parameters, lr=0.1)
    found = []
    draws = torch.Generator().manual_seed(0)
    for form in forms:
        for _ in range(2):  # parts of a batch
            one = loss(form, torch.randint(6, (4096,), generator=draws).to(device))
            (one / 2).backward()  # type: ignore[no-untyped-call]
            found.append(one.detach())
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return [float(one) for one in found]  # not before: what is replayed must not change what was given


def test_training_is_the_same(device: str) -> None:
    forms = [1.0, 2.0, 1.0, 2.0, 1.0, 1.0]
    plain, replayed = Model(device), Model(device)
    wanted = trained(plain, device, plain.loss, forms)
    captured = Captured(replayed.loss, replayed.parameters, on=True)
    assert trained(replayed, device, captured, forms) == pytest.approx(wanted)
    torch.testing.assert_close(replayed.table, plain.table)
    assert replayed.idle.grad is None and captured.steps == 2 * len(forms) - 2 * WARM
    if device == "cuda":
        assert replayed.ran == 2 * (WARM + 1)  # as they are, and while each of the two forms is recorded


def test_few_forms_are_recorded(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "MOST_FORMS", 1)
    model = Model(device)
    captured = Captured(model.loss, model.parameters, on=True)
    trained(model, device, captured, [1.0, 1.0, 2.0, 2.0])
    assert captured.steps == 4 - WARM


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def waits(self: Captured, form: Hashable, ids: Tensor) -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise ValueError("the recording was broken off")

    plain, other = Model("cpu"), Model("cpu")
    wanted = trained(plain, "cpu", plain.loss, [1.0] * 4)
    monkeypatch.setattr(Captured, "_record", waits)
    captured = Captured(other.loss, other.parameters, on=True)
    with caplog.at_level(logging.WARNING):
        assert trained(other, "cpu", captured, [1.0] * 4) == wanted
    assert captured.steps == 0 and not captured.on and len(caplog.records) == 1
    assert caplog.messages[0].endswith("(RuntimeError: operation not permitted when stream is capturing)")
    monkeypatch.setattr(Captured, "_record", recorded)
    off = Captured(other.loss, other.parameters, on=False)
    trained(other, "cpu", off, [1.0] * 4)
    assert off.steps == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("optimizer", "compiled"), [("adamw", False), ("muon", False), ("adamw", True)])
def test_adapting_is_the_same_replayed(tmp_path: Path, optimizer: Optimizer, compiled: bool) -> None:
    model = model_with_words(tmp_path / "model", "llama-gqa")
    text = random_words(tmp_path / "text.txt", 3000)
    settings = Settings(
        density=0.2, window=16, batch=16, steps=12, learning_rate=2e-3, optimizer=optimizer, warmup=2, written_tokens=0,
        judged_tokens=64, looks=2,
    )  # fmt: skip
    found = [
        adapt(str(model), [text], tmp_path / str(on), settings, How(device="cuda", show=False, captured=on), compiled=compiled)
        for on in (False, True)
    ]
    assert [one["training"]["replayed_steps"] for one in found] == [0, settings.steps - WARM]
    assert found[1]["training"]["loss"] == pytest.approx(found[0]["training"]["loss"], rel=0.02)
    for name, value in found[0]["looks"]["12"]["acceptance"].items():
        assert found[1]["looks"]["12"]["acceptance"][name] == pytest.approx(value, abs=0.01)

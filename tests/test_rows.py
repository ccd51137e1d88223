"""Products with chosen rows: the native part against torch, on every instruction set that this CPU has."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rowcast
from rowcast.kernels import native, rows
from rowcast.runtime.spec import Activation

NEURONS, CHOSEN = 331, 131
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
TOKENS = (1, 3, 16)
WIDTHS = (576, 37, 64)
DTYPES = (torch.float32, torch.bfloat16)

needs_native = pytest.mark.skipif(native.library() is None, reason="the native part was not built")


@pytest.fixture(params=range(len(native.LEVELS)), ids=native.LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    lib = native.library()
    if lib is None:
        pytest.skip("the native part was not built")
    if lib.rowcast_level(request.param) != request.param:
        pytest.skip(f"this CPU has no {native.LEVELS[request.param]}")
    yield request.param
    lib.rowcast_level(len(native.LEVELS) - 1)


def reference(run: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What torch computes."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return run()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    error = (found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)
    assert error < TOLERANCE[found.dtype]


def tables(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate [N, D], up and down as views of one bank [N, 2, D], ids [C]."""
    generator = torch.Generator().manual_seed(width)
    gate = torch.randn(NEURONS, width, generator=generator).to(dtype)
    bank = torch.randn(NEURONS, 2, width, generator=generator).to(dtype)
    return gate, bank[:, 0], bank[:, 1], torch.randperm(NEURONS, generator=generator)[:CHOSEN].sort().values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_rows_in_and_out(level: int, tokens: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _, up, down, ids = tables(width, dtype)
    x, hidden = torch.randn(tokens, width).to(dtype), torch.randn(tokens, CHOSEN).to(dtype)
    every = torch.randn(tokens, NEURONS).to(dtype)
    runs: list[Callable[[], Tensor]] = [
        lambda: rows.rows_in(up, x, ids),
        lambda: rows.rows_in(up, x),
        lambda: rows.rows_out(down, hidden, ids),
        lambda: rows.rows_out(down, every),
    ]
    for run in runs:
        close(run(), reference(run, monkeypatch))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_ffn(level: int, tokens: int, activation: Activation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up, down, ids = tables(576, dtype)
    x, bias = (torch.randn(tokens, 576) / 8).to(dtype), torch.randn(NEURONS).to(dtype)
    own = torch.rand(tokens, CHOSEN) < 0.5
    runs: list[Callable[[], Tensor]] = [
        lambda: rows.ffn_hidden(gate, up, None, x, ids, activation),
        lambda: rows.ffn_hidden(None, up, bias, x, ids, activation),
        lambda: rows.ffn_hidden(None, up, None, x, None, activation),
        lambda: rows.ffn(gate, up, None, down, x, ids, own, activation),
        lambda: rows.ffn(None, up, bias, down, x, None, None, activation),
    ]
    for run in runs:
        close(run(), reference(run, monkeypatch))


def test_activations_are_the_models() -> None:
    x = torch.linspace(-100, 100, 4001)[:, None]
    one = torch.ones(1, 1)
    expected = {"silu": F.silu(x), "gelu": F.gelu(x), "gelu_tanh": F.gelu(x, approximate="tanh"), "relu": F.relu(x)}
    for activation, values in expected.items():
        found = torch.cat([rows.ffn_hidden(None, one, None, part, None, activation) for part in torch.split(x, 16)])
        assert (found - values).abs().max() < 2e-5
        assert ((found - values).abs() <= 1e-6 + 2e-6 * values.abs()).all()


@needs_native
@pytest.mark.parametrize("tokens", [2, 4, 7, 16])
def test_a_token_has_the_same_bits_alone_and_among_others(tokens: int) -> None:
    gate, up, down, ids = tables(576, torch.float32)
    x = torch.randn(tokens, 576)
    together = rows.ffn(gate, up, None, down, x, ids, None, "silu")
    alone = torch.cat([rows.ffn(gate, up, None, down, token[None], ids, None, "silu") for token in x])
    assert torch.equal(together, alone)


@needs_native
def test_rows_of_zero_coefficients_are_not_read() -> None:
    _, _, down, ids = tables(576, torch.float32)
    hidden = torch.randn(3, CHOSEN)
    hidden[:, ::2] = 0
    expected = rows.rows_out(down, hidden, ids)
    spoilt = down.clone()
    spoilt[ids[::2]] = torch.nan
    assert torch.equal(rows.rows_out(spoilt, hidden, ids), expected)


def test_what_would_be_read_out_of_bounds_is_refused() -> None:
    gate, up, down, ids = tables(64, torch.float32)
    x, hidden = torch.randn(2, 64), torch.randn(2, CHOSEN)
    for outside in (-1, NEURONS, 10**6):
        with pytest.raises(IndexError):
            rows.rows_in(up, x, torch.tensor([0, outside + (outside < 0) * -NEURONS]))
    own, short = torch.ones(2, CHOSEN), torch.zeros(CHOSEN)
    wrong: list[Callable[[], Tensor]] = [
        lambda: rows.rows_in(up, x[:, :32]),
        lambda: rows.rows_out(down, hidden[:, :3], ids),
        lambda: rows.rows_out(down, hidden),
        lambda: rows.ffn_hidden(gate[:10], up, None, x, ids, "silu"),
        lambda: rows.ffn_hidden(None, up, short[None].expand(2, -1), x, ids, "silu"),
        lambda: rows.ffn(gate, up, None, down, x, ids, own[:, :3] > 0, "silu"),
    ]
    for run in wrong:
        with pytest.raises((AssertionError, RuntimeError, IndexError)):
            run()
    if native.library() is not None:
        for run in (
            lambda: rows.ffn(gate, up, None, down, x, ids, own, "silu"),
            lambda: rows.ffn_hidden(None, up, short, x, ids, "silu"),
        ):
            with pytest.raises(AssertionError):
                run()


def test_no_rows_and_many_tokens() -> None:
    gate, up, down, ids = tables(64, torch.float32)
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(rows.ffn(gate, up, None, down, torch.randn(2, 64), none, None, "silu"), torch.zeros(2, 64))
    many = torch.randn(native.MOST_TOKENS + 1, 64)
    expected = torch.cat([rows.ffn(gate, up, None, down, part, ids, None, "silu") for part in torch.split(many, 4)])
    close(rows.ffn(gate, up, None, down, many, ids, None, "silu"), expected)


def run_python(code: str, **environ: str) -> str:
    root = str(Path(rowcast.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr


def test_the_switch_is_obeyed_and_logged() -> None:
    code = (
        "from rowcast.settings import configure_logging as c; c(); from rowcast.kernels import native; print(native.describe())"
    )
    said = run_python(code, ROWCAST_CPU_NATIVE="0", ROWCAST_LOG="info")
    assert "CPU kernels: torch, since ROWCAST_CPU_NATIVE is 0" in said and said.rstrip().splitlines()[0] == "torch"


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime_is_loaded() -> None:
    code = """
import torch
from rowcast.kernels import native, rows
assert native.library() is not None
rows.rows_in(torch.randn(64, 64), torch.randn(1, 64))
torch.randn(999, 999) @ torch.randn(999, 999)
print({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]})
"""
    assert run_python(code).count("omp") == 1


@needs_native
def test_alternating_with_torch_slows_neither() -> None:
    weight, table, x = torch.randn(2048, 576), torch.randn(2048, 576), torch.randn(1, 576)

    def fastest(*runs: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(60):
            start = time.perf_counter()
            for run in runs:
                run()
            times.append(time.perf_counter() - start)
        return min(times)

    torch_product, ours = (lambda: F.linear(x, weight)), (lambda: rows.rows_in(table, x))
    apart = fastest(torch_product) + fastest(ours)
    assert fastest(torch_product, ours) < 3 * apart + 100e-6  # two pools that take turns cost milliseconds

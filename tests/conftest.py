"""What all tests share: no network, one thread a process, and GPU tests only where there is one."""

from __future__ import annotations

import os
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")  # NumPy's products and the commands that tests start; read at import.

import pytest
import torch

# Tiny models: handing work to a second thread takes longer than doing it, and where another process wants the core, far longer.
torch.set_num_threads(1)

os.environ["HF_HUB_OFFLINE"] = "1"  # Read when huggingface_hub is first imported, after this.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Read when kernels are decorated: without a GPU they run in Triton's interpreter.
    if find_spec("triton") is not None:
        from triton_interpreting import remember_what_does_not_change

        remember_what_does_not_change()
for name in [name for name in os.environ if name.startswith("ROWCAST_")]:
    del os.environ[name]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers() -> int:
    """A GPU's memory is for one process; elsewhere each takes up to some 2.5 GiB. One more than cores: tests of ranks mostly wait."""
    return 1 if torch.cuda.is_available() else min(4, (os.cpu_count() or 1) + 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every",
        type=int,
        metavar="N",
        help="Every N-th case of each kernels' test; 1 on a GPU, 6 in the interpreter, which is slow.",
    )


def runs_kernels(item: pytest.Item) -> bool:
    """Whether it does so in the interpreter, where there is no GPU."""
    module = getattr(item, "module", None)
    return hasattr(module, "take_arrays_as_bounds") or getattr(module, "__name__", "").startswith("test_gpu_")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = torch.cuda.is_available()
    kernels = [item for item in items if runs_kernels(item) and (on_gpu or "gpu" not in item.keywords)]
    every = config.getoption("--every")
    if every is None:
        every = 1 if on_gpu else 6
    elif every < 1:
        raise pytest.UsageError(f"--every is {every}, at least 1 is needed: use 1 for every case")
    left_out = set(_all_but_every(every, kernels))
    config.hook.pytest_deselected(items=[item for item in kernels if item in left_out])
    items[:] = [item for item in items if item not in left_out]
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if on_gpu and runs_kernels(item):  # in the interpreter elsewhere
            item.add_marker(pytest.mark.gpu)
        elif not on_gpu and "gpu" in item.keywords:
            item.add_marker(skip)


def _all_but_every(number: int, items: list[pytest.Item]) -> list[pytest.Item]:
    """Of each test function all cases but the first, the one `number` places behind it, and so on."""
    seen: dict[str, int] = {}
    left_out = []
    for item in items:
        name = item.nodeid.partition("[")[0]
        seen[name] = seen.get(name, -1) + 1
        if seen[name] % number:
            left_out.append(item)
    return left_out

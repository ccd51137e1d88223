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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        for item in items:  # Tests of kernels, which run in the interpreter elsewhere, are GPU tests here.
            module = getattr(item, "module", None)
            if hasattr(module, "take_arrays_as_bounds") or getattr(module, "__name__", "").startswith("test_gpu_"):
                item.add_marker(pytest.mark.gpu)
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)

"""Imports point one way, torch stays out of what must not need it, and `import rowcast` is instant."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

import rowcast

ROOT = Path(rowcast.__file__).parent

EVERYWHERE = ("errors", "settings", "placement.plan")
CONTRACTS = ("runtime.protocols", "runtime.spec", "runtime.step")

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "settings": ("errors",),
    "placement": ("placement", "runtime.spec", *EVERYWHERE),
    "kernels": ("kernels", *EVERYWHERE),
    # What it measures it says in the planner's terms.
    "offload": ("offload", "kernels", "placement.host", "placement.measured", "placement.nvml", *CONTRACTS, *EVERYWHERE),
    # Without a plan the engine makes the all-resident one itself; `forecast` makes what the planner is asked.
    "runtime": (
        *("runtime", "offload", "kernels"),
        *(f"placement.{name}" for name in ("resident", "units", "executable", "hardware", "here", "models", "workload")),
        *(f"placement.{name}" for name in ("constants", "corrections", "forecast", "planner", "process_memory", "report")),
        *EVERYWHERE,
    ),
    "cluster": ("cluster", "runtime", "offload", "kernels", *EVERYWHERE),
    "calibration": ("calibration", "placement", "runtime", "offload", "kernels", *EVERYWHERE),
    "serving": ("serving", "cluster", "placement", "runtime", "offload", "kernels", "__init__", *EVERYWHERE),
    "bench": ("bench", "cluster", "calibration", "placement", "runtime", "offload", "kernels", "__init__", *EVERYWHERE),
    "cli": (
        "cli",
        "bench",
        "serving",
        "cluster",
        "calibration",
        "placement",
        "runtime",
        "offload",
        "kernels",
        "__init__",
        *EVERYWHERE,
    ),
    "__main__": ("cli",),
}
"""For each package or module, prefixes of what it may import. Whatever is not named may not be."""


def module_name(path: Path) -> str:
    """rowcast/runtime/spec.py -> runtime.spec; a package is named by itself, rowcast/__init__.py is __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}

TORCH_FREE = {"errors", "settings", "runtime.spec", "runtime.params", "runtime.step", "runtime.outputs", "cli", "cli.generate"}
"""Beside these: all of placement, and every module whose docstring says that it is."""


def torch_free() -> list[str]:
    said = {name for name, path in MODULES.items() if "Torch-free." in (ast.get_docstring(ast.parse(path.read_text())) or "")}
    return sorted(TORCH_FREE | said | {name for name in MODULES if name.split(".")[0] == "placement"})


def imports(name: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and name of each module of ours that `source`, the text of module `name`, imports anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} imports relatively; name the whole path"
            targets = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, attribute in targets:
            if module.split(".")[0] != "rowcast":
                continue
            inner = module.removeprefix("rowcast").removeprefix(".")
            deeper = f"{inner}.{attribute}".strip(".")
            yield node.lineno, deeper if deeper in MODULES else inner or "__init__"


def violations(name: str, source: str) -> list[str]:
    allowed = MAY_IMPORT[name.split(".")[0]]
    return [
        f"rowcast/{name.replace('.', '/')}:{line} imports {target}"
        for line, target in imports(name, source)
        if not any(target == prefix or target.startswith(prefix + ".") for prefix in allowed)
    ]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_imports_point_one_way(name: str) -> None:
    assert violations(name, MODULES[name].read_text()) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("kernels.linear", "from rowcast.runtime import spec"),
        ("offload.banks", "import rowcast.runtime.model"),
        ("runtime.engine", "from rowcast.cluster import gang"),
        ("runtime.engine", "def late():\n    from rowcast.cli import main"),
        ("placement.plan", "from rowcast.runtime.model import Decoder"),
        ("placement.plan", "from rowcast import LLM"),
        ("cluster.gang", "from rowcast.serving import http"),
        ("settings", "from rowcast.runtime.spec import ModelSpec"),
    ],
)
def test_a_wrong_import_is_seen(name: str, line: str) -> None:
    assert len(violations(name, line)) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("offload.banks", "from rowcast.runtime import protocols, spec, step"),
        ("kernels.linear", "from rowcast.settings import settings"),
        ("cluster.gang", "from rowcast.placement.plan import Plan"),
        ("cli.generate", "from rowcast import LLM"),
    ],
)
def test_a_right_import_is_let_through(name: str, line: str) -> None:
    assert violations(name, line) == []


def test_dependencies_are_what_is_imported() -> None:
    project = (ROOT.parent / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^dependencies = \[(.*?)^\]", project, flags=re.MULTILINE | re.DOTALL)
    imported = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    imported.add("jinja2")  # Transformers renders chat templates with it and does not require it.
    modules = {"nvidia-ml-py": "pynvml", "pyzmq": "zmq"}
    names = {modules.get(name, name) for name in re.findall(r'"([\w-]+)(?:\[\w+\])?>=', listed)}
    extras = "".join(re.findall(r"^(?:plot|serve|train) = \[(.*?)\]", project, flags=re.MULTILINE))
    optional = set(re.findall(r'"([\w-]+)>=', extras))
    assert names == imported - sys.stdlib_module_names - {"rowcast"} - optional


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_torch_free() -> None:
    """One after another in one interpreter: the first one that loads any of it is named."""
    code = f"""
import importlib, sys
for name in {torch_free()!r}:
    importlib.import_module("rowcast." + name)
    if found := [heavy for heavy in ("torch", "transformers", "numpy") if heavy in sys.modules]:
        sys.exit(f"rowcast.{{name}} loads {{found}}")
"""
    assert len(torch_free()) > 50
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_import_is_instant() -> None:
    loaded = run_python("import sys; old = set(sys.modules); import rowcast; print(*sorted(m for m in set(sys.modules) - old))")
    assert [m for m in loaded.split() if m.startswith("rowcast")] == ["rowcast"]

    def cpu_s(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_python(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert median(cpu_s("import rowcast") / cpu_s("") for _ in range(7)) < 1.5


def test_public_names() -> None:
    assert set(rowcast.__all__) >= {"LLM", "SamplingParams", "UserError", "OutOfMemoryError"}
    for name in rowcast.__all__:
        assert getattr(rowcast, name) is not None
    assert set(rowcast.__all__) <= set(dir(rowcast))
    with pytest.raises(AttributeError, match="LMM"):
        _ = rowcast.LMM


def test_numbers_that_stand_twice_are_the_same() -> None:
    """Each is wanted where torch or Triton may not be imported, too."""
    pytest.importorskip("triton")
    from rowcast.kernels.gpu import host_rows
    from rowcast.kernels.gpu import row_cache as kernel
    from rowcast.offload import disk, host_store, peer_memory, row_cache
    from rowcast.runtime.offloaded import disk_plan

    assert row_cache.OLDEST == kernel.OLDEST
    assert disk.BUFFERS == disk_plan.BUFFERS
    assert host_store._UNIT == peer_memory._UNIT == host_rows.UNIT

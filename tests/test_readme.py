"""What the README and the example show does run, and what they name does exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import typer
import typer.main

import rowcast.cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("rowcast ")]


def run_script(*args: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_python_block_runs() -> None:
    (code,) = blocks("python")
    out = run_script("-c", code)
    assert out.startswith(" Paris")
    assert "Paris" in out.splitlines()[-1]


def test_example_runs() -> None:
    out = run_script("examples/driver.py").splitlines()
    assert "Paris" in out[1]
    told = {line.partition(" -> ")[0]: line for line in out}
    alone = next(line for line in out if line.startswith("alone: ")).removeprefix("alone: ")
    assert alone in told["'Once upon a time'"]
    assert out[-1].startswith("refused: temperature is -1")


def test_commands_are_found() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses(line: str) -> None:
    """Names and options as the command line takes them; nothing runs."""
    command = typer.main.get_command(rowcast.cli.command_line())
    args = shlex.split(line)[1:]
    while hasattr(command, "commands"):
        command = command.commands[args.pop(0)]
    command.make_context("rowcast", args)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test", "check", "test-gpu"} <= named <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_module_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "rowcast"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if not path.name.startswith("__")}
    named = {name for name in re.findall(r"`([\w/]+\.py)`", text) if not name.startswith("tests/")}
    assert (modules - named, named - modules) == (set(), set())


def test_setup_sees_each_gpu(tmp_path: Path) -> None:
    """A machine with several GPUs, on which `nvidia-smi -L` is still writing when the first one is known."""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: H100'\nsleep 0.3\necho 'GPU 1: H100'\n")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    for script in (fake / "nvidia-smi", python):
        script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake}:{os.environ['PATH']}", "PYTHON": str(python), "DEVICE": "auto"}
    command = ["bash", str(ROOT / "tools" / "setup.sh"), str(tmp_path / "venv")]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert found.returncode == 0, found.stderr
    assert "installing torch for gpu" in found.stdout


def test_an_editable_install_is_found_beside_the_clone(tmp_path: Path) -> None:
    """In the folder that holds a clone, whose own name is the package's: Python would take it for a namespace package."""
    pytest.importorskip("setuptools", minversion="77")
    clone, site = tmp_path / "rowcast", tmp_path / "site"
    (clone / "rowcast").mkdir(parents=True)
    (clone / "rowcast" / "__init__.py").touch()
    for name in ("README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)
    build = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    built = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True, cwd=clone, timeout=60)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    look = f"import site; site.addsitedir({str(site)!r}); import rowcast; print(rowcast.__file__)"
    found = subprocess.run([sys.executable, "-S", "-c", look], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert found.stdout.strip() == str(clone / "rowcast" / "__init__.py"), found.stderr

"""The registry of environment variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rowcast.errors import UserError
from rowcast.settings import Settings, describe, settings


def test_defaults_and_values() -> None:
    assert settings({"HOME": "/"}) == Settings(cpu_pack=True, log="warning", threads=None)
    given = {"ROWCAST_CPU_PACK": "off", "ROWCAST_LOG": "DEBUG", "ROWCAST_THREADS": " 3 "}
    assert settings(given) == Settings(cpu_pack=False, log="debug", threads=3)


def test_environment_is_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWCAST_CPU_PACK", "0")
    assert settings().cpu_pack is False
    monkeypatch.setenv("ROWCAST_CPU_PACK", "1")
    assert settings().cpu_pack is True


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ROWCAST_CPU_PACK", "maybe", "'maybe', it must be 1 or 0"),
        ("ROWCAST_CPU_PACK", "", "'', it must be 1 or 0"),
        ("ROWCAST_THREADS", "0", "from 1 to 1024"),
        ("ROWCAST_THREADS", "-2", "from 1 to 1024"),
        ("ROWCAST_THREADS", "two", "from 1 to 1024"),
        ("ROWCAST_LOG", "loud", "one of debug, info, warning, error"),
        ("ROWCAST_THREAD", "2", "did you mean ROWCAST_THREADS?"),
    ],
)
def test_refusals(name: str, value: str, expected: str) -> None:
    with pytest.raises(UserError, match=name) as error:
        settings({name: value})
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_every_variable_is_documented() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for variable in describe(Settings()):
        assert variable.doc.endswith(".")
        assert variable.name in readme


def logged(before: str, level: str = "info", after: str = "") -> str:
    """What a fresh process shows on standard error when the loggers rowcast and other say something."""
    code = f"""
import logging
from rowcast.settings import configure_logging
{before}
configure_logging()
configure_logging()
{after}
for name in ("rowcast", "rowcast.inner", "other"):
    logging.getLogger(name).info("note of %s", name)
logging.getLogger("rowcast").debug("detail")
"""
    environment = {**os.environ, "ROWCAST_LOG": level}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    return found.stderr


def test_logging_is_that_of_rowcast_alone() -> None:
    assert logged("") == "INFO rowcast: note of rowcast\nINFO rowcast.inner: note of rowcast.inner\n"
    assert logged("", level="debug").endswith("DEBUG rowcast: detail\n")
    assert logged("", level="error") == ""


def test_the_level_follows_the_environment() -> None:
    again = "import os; os.environ['ROWCAST_LOG'] = 'warning'; configure_logging()"
    assert logged("", level="debug", after=again) == ""


def test_logging_of_the_application_is_kept() -> None:
    to_root = "logging.basicConfig(format='app: %(message)s')"
    assert logged(to_root) == "app: note of rowcast\napp: note of rowcast.inner\n"
    to_rowcast = "logging.getLogger('rowcast').addHandler(logging.NullHandler())"
    assert logged(to_rowcast) == ""


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")], ids=str
)
def test_threads_do_not_spin_for_long(given: dict[str, str], spins: str) -> None:
    """Unless the user has said how they wait."""
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = "import os, rowcast; print(os.environ.get('GOMP_SPINCOUNT'))"
    ran = subprocess.run([sys.executable, "-c", command], env=kept | given, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == spins

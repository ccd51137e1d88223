"""The registry of environment variables."""

from __future__ import annotations

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

"""The picture of a forecast: everything that it speaks of is in it, twice the same, and what cannot be drawn is told."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from plan_samples import FORECAST, memory

from rowcast.errors import UserError
from rowcast.placement.forecast import Stage
from rowcast.placement.picture import _figure, draw


def texts(path: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_it_names_devices_classes_stages_and_the_bottleneck(tmp_path: Path) -> None:
    draw(FORECAST, tmp_path / "a.svg")
    found = texts(tmp_path / "a.svg")
    for each in FORECAST.memory:
        assert each.device in found
        assert f"{each.budget_bytes / (1 << 30):.1f}" in found
    assert {"RTX4090", "weights", "rung KV", "margin", "budget", "GiB"} <= set(found)
    assert {stage.name for stage in FORECAST.stages} | {rung.rung for rung in FORECAST.rungs} <= set(found)
    assert "bus (bottleneck)" in found
    assert any("81% of 226 ms a token" in text for text in found)
    assert any("4.42 tokens/s (3.6 to 5.1)" in text for text in found)
    assert "rung weights" not in found  # nothing of that kind is in memory


def test_figures_are_plain_and_beside_the_legend(tmp_path: Path) -> None:
    stages = [Stage("plain", "neurons", {}, {"host memory": 138.0, "CPU": 138.0}), Stage("plain", "KV", {}, {"bus": 2e-7})]
    slow = replace(FORECAST, stages=stages, seconds_per_token=123.4567, tokens_per_s=12345.6)
    draw(slow, tmp_path / "a.svg")
    found = texts(tmp_path / "a.svg")
    assert {"138000", "276000", "<0.001"} <= set(found) and not any("e+" in text or "e-0" in text for text in found)
    assert any("of 123457 ms a token" in text for text in found) and any("12346 tokens/s" in text for text in found)
    figure = _figure(slow)
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert all(text.get_window_extent().x1 <= axes.get_window_extent().x1 for text in axes.texts)


def test_the_same_forecast_gives_the_same_bytes(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for ending in ("svg", "png"):
        draw(FORECAST, tmp_path / f"a.{ending}")
        draw(FORECAST, tmp_path / f"b.{ending.upper()}")
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending.upper()}").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before


def test_bars_of_one_panel_are_in_proportion(tmp_path: Path) -> None:
    """Of the two devices' weights one is half of the other: so are their bars."""
    devices = [memory("GPU 0", "A", 24, weights=20), memory("GPU 1", "A", 24, weights=10)]
    draw(replace(FORECAST, memory=devices), tmp_path / "a.svg")
    tree = ElementTree.parse(tmp_path / "a.svg")
    paths = [e.get("d", "") for e in tree.iter("{http://www.w3.org/2000/svg}path") if "fill: #0072b2" in e.get("style", "")]
    widths = []
    for d in paths:
        xs = [float(word) for word in d.replace("\n", " ").split() if word[0].isdigit()][::2]
        widths.append(max(xs) - min(xs))
    assert widths[0] == pytest.approx(2 * widths[1], rel=1e-3)


def test_many_devices_are_drawn_once_for_each_kind(tmp_path: Path) -> None:
    many = [memory(f"GPU {i}", "H200", 140, weights=90 if i < 31 else 91) for i in range(32)]
    draw(replace(FORECAST, memory=many), tmp_path / "a.svg")
    found = texts(tmp_path / "a.svg")
    assert {"GPU 0 to GPU 30", "GPU 31"} <= set(found) and "GPU 1" not in found


def test_texts_are_texts(tmp_path: Path) -> None:
    """Names are no mathematics and no markup."""
    odd = replace(FORECAST, model="a_$x^2$_<b>&", memory=[replace(FORECAST.memory[0], device="GPU $0$")], stages=[])
    draw(odd, tmp_path / "a.svg")
    found = texts(tmp_path / "a.svg")
    assert any("a_$x^2$_<b>&" in text for text in found)
    assert "GPU $0$" in found


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.pdf", "a", "svg"):
        with pytest.raises(UserError, match=r"picture=.* has to end in \.svg or \.png"):
            draw(FORECAST, tmp_path / name)
    with pytest.raises(UserError, match="cannot write the picture"):
        draw(FORECAST, tmp_path / "no" / "such.svg")
    real = builtins.__import__

    def without(name: str, *args: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'run pip install "matplotlib>=3\.8"'):
        draw(FORECAST, tmp_path / "a.svg")

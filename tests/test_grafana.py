"""The dashboard in docs/grafana: its panels ask for metrics that a server exports, by labels that they have."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from rowcast.runtime import metrics as engine
from rowcast.serving import metrics as server

DASHBOARD = Path(__file__).parent.parent / "docs" / "grafana" / "rowcast.json"
OF_PROMETHEUS = {"instance", "le"}
"""Labels that are not ours."""


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Labels by name of each sample that the two tables come to; a live server's are compared in `test_serving_page`."""
    found = {}
    for metric, more in [*((each, {engine.REPLICA}) for each in engine.TABLE), *((each, set[str]()) for each in server.TABLE)]:
        ending = {"counter": "_total", "gauge": "", "histogram": "_bucket"}[metric.kind]
        found[f"{metric.name}{ending}"] = {*metric.labels, *more}
    return found


def test_panels_are_told_apart_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(ids) == len(set(ids)) and all(panel["title"] for panel in panels)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23
    for panel in panels:
        references = [target["refId"] for target in panel.get("targets", ())]
        assert len(references) == len(set(references)) and (references or panel["type"] == "row")


def test_what_panels_ask_for_is_exported(expressions: list[str], exported: dict[str, set[str]]) -> None:
    asked = set(chain.from_iterable(re.findall(r"\browcast_\w+", expression) for expression in expressions))
    assert asked <= set(exported), asked - set(exported)
    forgotten = {metric.name for metric in (*engine.TABLE, *server.TABLE)} - {
        re.sub("_(total|bucket)$", "", name) for name in asked
    }
    assert forgotten == {"rowcast_server_finished"}  # rowcast_requests has the same, by reason


def test_labels_are_those_of_the_metrics(dashboard: dict[str, Any], exported: dict[str, set[str]]) -> None:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            names = re.findall(r"\browcast_\w+", target["expr"])
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            for grouped in re.findall(r"by \(([^)]*)\)", target["expr"]):
                labels |= {label.strip() for label in grouped.split(",")}
            labels |= set(re.findall(r"[{,]\s*(\w+)=~?\"", target["expr"]))
            for name in names:
                assert labels - OF_PROMETHEUS <= exported[name], (panel["title"], name)


def test_expressions_are_well_formed(expressions: list[str]) -> None:
    """Counters only as rates, histograms only by their buckets, every query of the chosen servers only."""
    for expression in expressions:
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing)
        for name, after in re.findall(r"\b(rowcast_\w+)(\{[^}]*\}(?:\[[^\]]*\])?)?", expression):
            assert 'instance=~"$instance"' in after
            assert name.endswith(("_total", "_bucket")) == after.endswith("[$__rate_interval]")

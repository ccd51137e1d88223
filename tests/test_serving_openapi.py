"""Schemathesis against the server's own OpenAPI document: whatever it thinks of, no answer is a 5xx, and all are as described.

ROUNDS=200 pytest tests/test_serving_openapi.py    # many more requests of each route, of another seed each time
"""

from __future__ import annotations

import json
import os
import random
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from http_serving import NAME, WAIT_S, Served, character_model, engine
from warm_ranks import WarmLauncher

from rowcast.serving.security import AppSettings

schemathesis = pytest.importorskip("schemathesis")

ROUNDS = int(os.environ.get("ROUNDS", "0"))
EXAMPLES = ROUNDS or 5
"""Random requests of each route, beside those that cover its schema."""
SEED = random.SystemRandom().randrange(1 << 30) if ROUNDS else 12

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = character_model(tmp_path_factory.mktemp("characters"))
    launcher = WarmLauncher()
    with engine(model, launcher) as found, found.at(AppSettings(log_requests=False)) as server:
        yield server
    launcher.close()


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with bounds narrower than the server's, so that requests get as far as the model and end soon."""
    schemas = document["components"]["schemas"]
    few: dict[str, dict[str, Any]] = {
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": 3},
        "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 3},
        "n": {"type": "integer", "minimum": 1, "maximum": 2},
        "best_of": {"type": "integer", "minimum": 1, "maximum": 2},
        "min_tokens": {"type": "integer", "minimum": 0, "maximum": 2},
        "ladder": {"enum": ["ngram / plain", "plain", "ngram"]},
        "deadline_s": {"type": "number", "minimum": WAIT_S, "maximum": 86400},  # a deadline that is missed is a 504
    }
    for name in ("CompletionRequest", "ChatRequest", "TokenizeRequest", "DetokenizeRequest"):
        properties = schemas[name]["properties"]
        properties["model"] = {"enum": [NAME]}
        properties.update({field: schema for field, schema in few.items() if field in properties})
    for name, limit in (("CompletionRequest", "max_tokens"), ("ChatRequest", "max_completion_tokens")):
        schemas[name]["required"].append(limit)
    ids = {"type": "integer", "minimum": 0, "maximum": 100}
    schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"][2]["items"] = ids
    schemas["DetokenizeRequest"]["properties"]["tokens"]["items"] = ids
    del document["paths"]["/live/stream"]  # without an end
    return document


def test_no_answer_is_wrong(served: Served) -> None:
    from schemathesis.config import SchemathesisConfig
    from schemathesis.engine import events, from_schema

    with urllib.request.urlopen(f"{served.url}/openapi.json", timeout=WAIT_S) as answer:
        document = narrowed(json.load(answer))
    config = SchemathesisConfig.from_dict(
        {
            "seed": SEED,
            "base-url": served.url,
            "generation": {"max-examples": EXAMPLES, "deterministic": not ROUNDS},
            "phases": {"stateful": {"enabled": False}, "coverage": {"unexpected-methods": ["trace", "put"]}},
            "checks": {"enabled": False, **{name: {"enabled": True} for name in CHECKS}},
        }
    )
    schema = schemathesis.openapi.from_dict(document, config=config)
    answers: dict[str, Counter[int]] = {}
    wrong: list[str] = []
    for event in from_schema(schema).execute():
        if isinstance(event, (events.NonFatalError, events.FatalError)):
            wrong.append(f"{event}"[:2000])
        if not isinstance(event, events.ScenarioFinished):
            continue
        recorder = event.recorder
        found = answers.setdefault(recorder.label, Counter())
        for interaction in recorder.interactions.values():
            found[interaction.response.status_code if interaction.response else 0] += 1
        for failed in (check.failure_info for checks in recorder.checks.values() for check in checks if check.failure_info):
            wrong.append(f"{recorder.label}: {failed.failure}\n{failed.code_sample}"[:2000])
    assert not wrong, f"{len(wrong)} answers are wrong, seed {SEED}:\n\n" + "\n\n".join(wrong[:5])
    served.settle()
    assert answers.keys() >= {"POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize", "GET /metrics", "GET /live"}
    for label, found in answers.items():
        assert found[200] >= 1 and not found[0], (label, found)
    for label in ("POST /v1/completions", "POST /v1/chat/completions"):
        assert answers[label][200] >= 20 and answers[label][400] >= 100, answers[label]

"""SamplingParams: vLLM's names and defaults, and one sentence for every mistake."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from rowcast.errors import UserError
from rowcast.runtime.params import SamplingParams

DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": None,
    "stop_token_ids": None,
    "bad_words": None,
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "logit_bias": None,
    "allowed_token_ids": None,
}


def test_defaults() -> None:
    assert dataclasses.asdict(SamplingParams()) == DEFAULTS


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", [1, 100]),
        ("presence_penalty", [-2, 2.0]),
        ("frequency_penalty", [-2.0, 2]),
        ("repetition_penalty", [0.01, 1, 50.0]),
        ("temperature", [0, 1e-9, 0.001, 3]),
        ("top_p", [1e-9, 1]),
        ("top_k", [-1, 0, 1, 10**6]),
        ("min_p", [0, 1.0]),
        ("seed", [None, 0, 2**63 - 1]),
        ("stop", [None, "a", ["a", "b"], ()]),
        ("max_tokens", [None, 1]),
        ("min_tokens", [0, 16]),
        ("logprobs", [None, -1, 0, 20]),
        ("prompt_logprobs", [None, -1, 0, 20]),
        ("truncate_prompt_tokens", [None, -1, 1]),
        ("logit_bias", [None, {}, {0: -100, 7: 2.5}]),
        ("allowed_token_ids", [None, [0]]),
    ],
)
def test_bounds_belong_to_the_range(name: str, values: list[Any]) -> None:
    for value in values:
        kept = getattr(SamplingParams(**{name: value}), name)
        assert kept == (tuple(value) if isinstance(value, (str, list)) else value)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": True}, "n is True"),
        ({"n": 1.0}, "n is 1.0"),
        ({"n": "2"}, "n is '2'"),
        ({"n": 2, "temperature": 0}, "temperature 0"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1"),
        ({"frequency_penalty": -2.1}, "frequency_penalty is -2.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": None}, "temperature is None"),
        ({"temperature": False}, "temperature is False"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": -2}, "top_k is -2"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"stop": ""}, "stop is ''"),
        ({"stop": ["a", ""]}, "stop[1] is ''"),
        ({"stop": 3}, "stop is 3"),
        ({"stop": "a", "detokenize": False}, "detokenize"),
        ({"stop_token_ids": 3}, "stop_token_ids is 3"),
        ({"stop_token_ids": [3, -1]}, "stop_token_ids[1] is -1"),
        ({"bad_words": "word"}, "bad_words is 'word'"),
        ({"bad_words": [""]}, "bad_words[0] is ''"),
        ({"ignore_eos": 1}, "ignore_eos is 1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 17}, "min_tokens is 17"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"logprobs": -2}, "logprobs is -2"),
        ({"logprobs": True}, "logprobs is True"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens is -2"),
        ({"logit_bias": [1]}, "logit_bias is [1]"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias key is 'x'"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias[1] is inf"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"temprature": 1}, "did you mean temperature?"),
        ({"max_new_tokens": 1}, "did you mean max_tokens?"),
        ({"zzz": 1}, "the known ones are n, "),
        ({"n": "two\nlines" * 50}, "n is 'two\\nlines"),
    ],
)
@pytest.mark.parametrize("make", [lambda given: SamplingParams(**given), SamplingParams.from_dict])
def test_mistakes_get_one_sentence(make: Any, given: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        make(given)
    sentence = str(caught.value)
    assert named in sentence
    assert "\n" not in sentence
    assert sentence[-1] in ".?"


def test_from_dict_reads_json() -> None:
    given = {"stop": ["x"], "logit_bias": {"5": 1, "6": -2.5}, "max_tokens": None}
    assert SamplingParams.from_dict(given) == SamplingParams(stop="x", logit_bias={5: 1.0, 6: -2.5}, max_tokens=None)
    with pytest.raises(UserError, match="logit_bias key is '5'"):
        SamplingParams(logit_bias={"5": 1})  # type: ignore[dict-item]


def test_copies_are_equal_and_nothing_changes_later() -> None:
    stop, bias = ["a"], {1: 2.0}
    params = SamplingParams(stop=stop, logit_bias=bias, stop_token_ids=[1, 2])
    stop.append("b")
    bias[2] = 1.0
    assert params.stop_strings == ("a",)
    assert params.logit_bias == {1: 2.0}
    assert copy.deepcopy(params) == params
    assert SamplingParams.from_dict(dataclasses.asdict(params)) == params
    assert dataclasses.replace(params, n=2).n == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 3  # type: ignore[misc]


def test_greedy_below_vllms_threshold() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy


def test_import_needs_no_torch() -> None:
    code = "import sys, rowcast.runtime.params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

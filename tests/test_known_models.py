"""The shipped configs: each is read, and has as many parameters as its model is known to have."""

from __future__ import annotations

import pytest

from rowcast.errors import UserError
from rowcast.placement.models import find_config, known_config, known_models
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.spec import parameter_count

BILLIONS = {
    "bigscience/bloom-560m": 0.559, "bigscience/bloom-1b1": 1.065, "bigscience/bloom-1b7": 1.722, "bigscience/bloom-3b": 3.003,
    "bigscience/bloom-7b1": 7.069, "bigscience/bloom": 176.25,
    "facebook/opt-125m": 0.125, "facebook/opt-350m": 0.331, "facebook/opt-1.3b": 1.316, "facebook/opt-2.7b": 2.65,
    "facebook/opt-6.7b": 6.66, "facebook/opt-13b": 12.85, "facebook/opt-30b": 29.97, "facebook/opt-66b": 65.7,
    "facebook/opt-175b": 175.0,
    "HuggingFaceTB/SmolLM2-135M": 0.135, "HuggingFaceTB/SmolLM2-360M": 0.362, "HuggingFaceTB/SmolLM2-1.7B": 1.711,
    "JackFram/llama-68m": 0.068, "JackFram/llama-160m": 0.162, "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1.10,
    "LargeWorldModel/LWM-Text-Chat-128K": 6.74, "LargeWorldModel/LWM-Text-Chat-1M": 6.74,
    "meta-llama/Llama-2-7b-hf": 6.74, "meta-llama/Llama-2-13b-hf": 13.02, "meta-llama/Llama-2-70b-hf": 68.98,
    "meta-llama/Meta-Llama-3-8B": 8.03, "meta-llama/Meta-Llama-3-70B": 70.55, "meta-llama/Llama-3.1-8B": 8.03,
    "meta-llama/Llama-3.1-70B": 70.55, "meta-llama/Llama-3.1-405B": 405.85, "meta-llama/Llama-3.2-1B": 1.236,
    "meta-llama/Llama-3.2-3B": 3.213, "meta-llama/Llama-3.3-70B-Instruct": 70.55,
    "mistralai/Mistral-7B-v0.1": 7.24, "mistralai/Mistral-7B-v0.3": 7.25, "mistralai/Mistral-7B-Instruct-v0.2": 7.24,
    "mosaicml/mpt-7b": 6.65, "mosaicml/mpt-30b": 29.96,
    "NousResearch/Yarn-Llama-2-7b-128k": 6.74, "NousResearch/Yarn-Llama-2-13b-128k": 13.02,
    "Qwen/Qwen2.5-0.5B": 0.494, "Qwen/Qwen2.5-1.5B": 1.544, "Qwen/Qwen2.5-3B": 3.086, "Qwen/Qwen2.5-7B": 7.616,
    "Qwen/Qwen2.5-14B": 14.77, "Qwen/Qwen2.5-32B": 32.76, "Qwen/Qwen2.5-72B": 72.71,
    "Qwen/Qwen3-0.6B": 0.596, "Qwen/Qwen3-1.7B": 1.72, "Qwen/Qwen3-4B": 4.02, "Qwen/Qwen3-8B": 8.19, "Qwen/Qwen3-14B": 14.77,
    "Qwen/Qwen3-32B": 32.76,
    "SparseLLM/ReluLLaMA-7B": 6.74, "SparseLLM/ReluLLaMA-13B": 13.02, "SparseLLM/ReluLLaMA-70B": 68.98,
    "tiiuae/falcon-7b": 6.92, "tiiuae/falcon-40b": 41.30, "tiiuae/falcon-180B": 178.56,
}  # fmt: skip
"""As published on the models' pages, OPT-175B by its paper. Of Falcon, whose files hold the head once more, less that copy."""
BILLIONS |= {f"{name}-Instruct": count for name, count in BILLIONS.items() if name.startswith("Qwen/Qwen2.5-")}


def test_all_of_them_are_checked() -> None:
    assert set(known_models()) == set(BILLIONS)


@pytest.mark.parametrize("name", known_models())
def test_parameters(name: str) -> None:
    spec = spec_from_config(find_config(name))
    assert parameter_count(spec) == pytest.approx(BILLIONS[name] * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("facebook/OPT-175B", "facebook/opt-175b"),
        ("opt-175b", "facebook/opt-175b"),
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("llama-2-13b-128k", "NousResearch/Yarn-Llama-2-13b-128k"),
        ("llama-3.1-70b", "meta-llama/Llama-3.1-70B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        (" SmolLM2-135M-Instruct ", "HuggingFaceTB/SmolLM2-135M"),
        ("bloom-176b", "bigscience/bloom"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert known_config(name) == find_config(expected)


def test_contexts() -> None:
    for name, context in (("llama-2-13b-128k", 131072), ("lwm-1m", 1 << 20), ("qwen2.5-7b-instruct", 32768), ("opt-66b", 2048)):
        assert spec_from_config(find_config(name)).max_context == context


def test_a_caller_may_change_its_config() -> None:
    config = find_config("llama-3.1-8b")
    config["rope_scaling"]["factor"] = 1.0
    assert find_config("llama-3.1-8b")["rope_scaling"]["factor"] == 8.0


@pytest.mark.parametrize("name", ["lama-3.1-70b", "somebody/llama-2-7b", "", "nothing like it"])
def test_unknown_models(name: str) -> None:
    assert known_config(name) is None
    with pytest.raises(UserError, match=r"is not known here: use a hub id such as [^,]+/") as error:
        find_config(name)
    assert "\n" not in str(error.value)

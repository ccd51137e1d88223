"""The configs of well-known models, by hub id, so that planning needs neither a network nor the model. Torch-free.

Facts only: the keys of each `config.json` that `runtime/config.py` reads, which turns them into a spec. OPT-175B, which the hub lacks,
is as table 1 of the OPT paper has it (arXiv 2205.01068).
"""

from __future__ import annotations

import json
from copy import deepcopy
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from rowcast.errors import UserError

RANDOM = "random:"
"""Before a model's name: random weights in its shape."""

_ALIASES = {
    "bloom-176b": "bigscience/bloom",
    "llama-2-7b-128k": "NousResearch/Yarn-Llama-2-7b-128k",
    "llama-2-13b-128k": "NousResearch/Yarn-Llama-2-13b-128k",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "lwm-128k": "LargeWorldModel/LWM-Text-Chat-128K",
    "lwm-1m": "LargeWorldModel/LWM-Text-Chat-1M",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
"""What people call them, in lower case. Names without the owner, and without a "-hf" at their end, are known anyway."""

_TUNED = {
    "meta-llama/Llama-2-{}-hf": ("meta-llama/Llama-2-{}-chat-hf", ("7b", "13b", "70b")),
    "meta-llama/Meta-Llama-3-{}": ("meta-llama/Meta-Llama-3-{}-Instruct", ("8B", "70B")),
    "meta-llama/Llama-3.1-{}": ("meta-llama/Llama-3.1-{}-Instruct", ("8B", "70B", "405B")),
    "meta-llama/Llama-3.2-{}": ("meta-llama/Llama-3.2-{}-Instruct", ("1B", "3B")),
    "mistralai/Mistral-7B-{}": ("mistralai/Mistral-7B-Instruct-{}", ("v0.1", "v0.3")),
    "HuggingFaceTB/SmolLM2-{}": ("HuggingFaceTB/SmolLM2-{}-Instruct", ("135M", "360M", "1.7B")),
}
"""Tuned versions whose configs say the same as the base model's, but for tokens."""

_EXAMPLES = ("facebook/opt-66b", "meta-llama/Llama-3.1-70B", "Qwen/Qwen3-32B", "bigscience/bloom", "tiiuae/falcon-40b")


def known_config(name: str) -> dict[str, Any] | None:
    """The config of the model of this id, in any case, or short name, such as "facebook/opt-66b" or "llama-3.1-70b"; None: not known.

    The caller may change what it gets.
    """
    key = _names().get(name.strip().lower())
    return None if key is None else deepcopy(_configs()[key])


def find_config(name: str) -> dict[str, Any]:
    """As `known_config`. Raises UserError for an unknown name, with the nearest ones."""
    config = known_config(name)
    if config is None:
        near = get_close_matches(name.strip().lower(), _names(), n=5, cutoff=0.6)
        ids = dict.fromkeys(_names()[match] for match in near) or _EXAMPLES
        raise UserError(
            f"the model {name!r:.80} is not known here: use a hub id such as {', '.join(ids)}, or give the path of its config.json"
        )
    return config


def known_models() -> list[str]:
    """Hub ids, in alphabetical order."""
    return list(_configs())


@lru_cache(maxsize=1)
def _configs() -> dict[str, dict[str, Any]]:
    configs: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("configs.json").read_bytes())
    return configs


@lru_cache(maxsize=1)
def _names() -> dict[str, str]:
    """Each name in lower case -> the hub id that the config stands under."""
    tuned = {other.format(size): base.format(size) for base, (other, sizes) in _TUNED.items() for size in sizes}
    full = {name: name for name in _configs()} | tuned
    short = {name.rpartition("/")[2].removesuffix("-hf"): base for name, base in full.items()}
    both = {name.rpartition("/")[2]: base for name, base in full.items()}
    return {name.lower(): base for name, base in (short | both | full | _ALIASES).items()}

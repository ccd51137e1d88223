"""Attention without masks: it sees what Transformers' own does, and none is made where Transformers cannot tell what is in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from rowcast.calibration.learning import attention
from rowcast.calibration.learning.judge import hidden_states
from rowcast.calibration.learning.module import load_module
from rowcast.runtime.checkpoint import open_checkpoint

EXCHANGED = ["llama-gqa", "llama-mha", "mistral-window", "qwen2-window", "qwen3-window", "opt"]


@pytest.mark.parametrize("name", EXCHANGED)
def test_tokens_see_what_they_would(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 8 tokens among them. While a CUDA graph is recorded the library would give each layer a mask."""
    theirs = tiny_model(name, tmp_path)
    module = load_module(open_checkpoint(str(tmp_path)), torch.float32, "cpu")
    assert module.config._attn_implementation == attention.NAME
    ids = torch.randint(theirs.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    wanted = theirs.base_model(input_ids=ids, use_cache=False).last_hidden_state
    masks: list[Tensor | None] = []
    causal = attention._causal

    def watched(layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
        masks.append(mask)
        return causal(layer, query, key, value, mask, **more)

    monkeypatch.setattr(attention, "_causal", watched)
    attention.without_masks(module)
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: True)
    torch.testing.assert_close(hidden_states(module, ids), wanted)
    assert masks == [None] * theirs.config.num_hidden_layers


def test_other_attention_stays(tmp_path: Path) -> None:
    theirs = tiny_model("falcon-7b", tmp_path)
    module = load_module(open_checkpoint(str(tmp_path)), torch.float32, "cpu")
    assert module.config._attn_implementation == theirs.config._attn_implementation

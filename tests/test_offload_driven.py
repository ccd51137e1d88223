"""Last passes that the host drives behind rounds on the device, while sequences come and go. Here through Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_offload_kv import OnItsWay
from test_offload_llm import away, shares
from test_speculation import GREEDY, ids
from tiny import VOCAB, tiny_model
from triton_interpreting import take_arrays_as_bounds

from rowcast import LLM
from rowcast.kernels import gpu
from rowcast.runtime.kv import hosted
from rowcast.runtime.request import Request

take_arrays_as_bounds()
ON_GPU = torch.cuda.is_available()
SEEDED = replace(GREEDY, temperature=0.8, seed=3)
RETRIEVAL = "self:kv=16,chunk=4,sinks=4,recent=4,score={score},gamma=2 / plain"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "interpreted", not ON_GPU)


@pytest.mark.parametrize(
    ("ladder", "where"),
    [
        ("draft:model={draft},kv=full,gamma=2 / plain", "KV"),
        ("draft:model={draft},kv=full,gamma=2 / plain", "neurons"),
        (RETRIEVAL.format(score="bounds"), "KV"),
        (RETRIEVAL.format(score="mean"), "KV"),
    ],
)
def test_sequences_come_and_go(ladder: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than there are places for, of several lengths; some begin with the same tokens, some give way and come back; new entries
    reach host memory when somebody waits for them. A draft that is the model is always right: nothing stale is in its cache."""
    tiny_model("llama-gqa", tmp_path, num_hidden_layers=1)
    how: dict[str, Any] = {
        "device": "cuda" if ON_GPU else "cpu", "dtype": "float32", "block_size": 4, "max_num_seqs": 3, "progress": False,
    }  # fmt: skip
    prefix = [(7 * i) % VOCAB for i in range(16)]
    prompts = [[*prefix, i, 2 * i, 50 + i] if i % 2 else [(i + j * j) % VOCAB for j in range(9 + 5 * i)] for i in range(5)]
    params = [replace(SEEDED if i % 2 else GREEDY, max_tokens=3 + 2 * (i % 3)) for i in range(5)]
    with monkeypatch.context() as plainly:
        plainly.setattr(gpu, "interpreted", False)
        reference = LLM(tmp_path, ladder="plain", **how)
        expected = ids(reference.generate(prompts, params))
        plan = LLM(tmp_path, ladder=ladder.format(draft=tmp_path), **how).plan
    monkeypatch.setattr(hosted, "Outbox", OnItsWay)
    resident = dict.fromkeys(("attention", "neurons", "LM_head", "KV", "embeddings"), ("resident",))
    given = shares(None, reference.spec.num_layers, **{**resident, where: ("streamed",)})
    there = LLM(tmp_path, plan=replace(away(plan, given), num_blocks=24, max_context=64), progress=False)
    rounds = there.engine._executor._rounds  # type: ignore[attr-defined]
    assert rounds is not None and rounds.driven
    requests: list[Request] = []
    while len(requests) < len(prompts) or there.engine.has_work:
        if len(requests) < len(prompts):
            requests.append(there.engine.add(prompts[len(requests)], params[len(requests)]))
        there.engine.step()
        there.engine.check()
    assert [request.sequences[0].output_ids for request in requests] == expected
    assert rounds._reads, "the device ran no round"
    if "draft" in ladder:
        judged = [counts for request in requests if (counts := request.stats.rungs.get("draft")) and counts.judged]
        assert judged and all(counts.acceptance == 1.0 for counts in judged)

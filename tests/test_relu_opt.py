"""benchmarks/relu_opt.py in its smallest form: what it measures, what it penalises, and that its checkpoint is an ordinary one."""

from __future__ import annotations

import io
import json
import runpy
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model
from transformers import AutoTokenizer, OPTForCausalLM

from rowcast.errors import UserError
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.model import load_decoder
from rowcast.runtime.shard import Shard
from rowcast.runtime.step import SeqStep
from rowcast.runtime.tokenizer import load_tokenizer

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "relu_opt.py"
TEXT = (Path(__file__).parent / "data" / "news-from-nowhere.txt").read_text(encoding="utf-8")
SMALLEST = ("--hidden=64", "--layers=2", "--ffn=192", "--vocab=320", "--context=48", "--batch=4", "--steps=60", "--device=cpu")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def run(directory: Path, script: dict[str, Any], *options: str) -> dict[str, Any]:
    """Train on a part of TEXT, save under `directory`/model -> the JSON of the last line."""
    text = directory / "text.txt"
    text.write_text(TEXT[:60_000], encoding="utf-8")
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told):
        patch.setattr(sys, "argv", ["relu_opt.py", "--text", str(text), "-o", str(directory / "model"), *SMALLEST, *options])
        script["main"]()
    found: dict[str, Any] = json.loads(told.getvalue().splitlines()[-1])
    return found


@dataclass
class Trained:
    path: Path
    found: dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, script: dict[str, Any]) -> Trained:
    directory = tmp_path_factory.mktemp("relu")
    return Trained(directory / "model", run(directory, script, "--sparsity=1"))


def test_checkpoint_gives_transformers_logits(trained: Trained) -> None:
    checkpoint = open_checkpoint(str(trained.path))
    spec = spec_from_config(checkpoint.config)
    assert (spec.family, spec.activation, spec.gated) == ("opt", "relu", False)
    ids = load_tokenizer(checkpoint).encode(TEXT[-300:])[:48]
    assert ids == AutoTokenizer.from_pretrained(trained.path)(TEXT[-300:])["input_ids"][:48]
    kv = PagedKV(spec, Shard(), num_blocks=3, block_size=16, dtype=torch.float32, device=torch.device("cpu"))
    decoder = load_decoder(spec, checkpoint.source, dtype=torch.float32)
    with torch.inference_mode():
        ours = decoder.logits(decoder.run([SeqStep(0, ids, 0, [0, 1, 2], len(ids), sample=True)], kv))
        theirs = OPTForCausalLM.from_pretrained(trained.path).eval()(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours[-1], theirs[-1], atol=1e-4, rtol=0)


def test_penalty_silences_neurons(tmp_path: Path, trained: Trained, script: dict[str, Any]) -> None:
    """With it a token's best 10% of the neurons are all that it has; without it they are not."""

    def outcome(found: dict[str, Any]) -> tuple[float, float]:
        return max(layer["mean"] for layer in found["layers"]), found["perplexity"]["best 10%"] / found["perplexity"]["dense"]

    active, perplexity = outcome(trained.found)
    assert active < 0.1 and perplexity == pytest.approx(1, abs=0.001)
    active, perplexity = outcome(run(tmp_path, script, "--sparsity=0"))
    assert active > 0.3 and perplexity > 1.001


def test_selections_are_what_they_say(tmp_path: Path, script: dict[str, Any]) -> None:
    model = tiny_model("opt", tmp_path)
    windows = torch.randint(VOCAB, (3, 64), generator=torch.Generator().manual_seed(0))

    def loss(selection: AbstractContextManager[None]) -> float:
        with selection:
            return float(script["loss_of"](model, windows))

    dense, without = loss(nullcontext()), loss(script["without_ffns"](model))
    assert loss(script["at_neurons"](model, script["best_share"](1.0))) == pytest.approx(dense, abs=1e-6)
    assert abs(loss(script["at_neurons"](model, script["best_share"](0.1))) - dense) > 0.01
    for layer in model.model.decoder.layers:
        layer.fc2.weight.data.zero_()
        layer.fc2.bias.data.zero_()
    assert abs(without - dense) > 0.01 and loss(nullcontext()) == pytest.approx(without, abs=1e-6)


def test_tail_share_is_what_lies_outside_the_largest(script: dict[str, Any]) -> None:
    x = torch.tensor([[4.0, 1.0, 0.0, 1.0], [-2.0, 3.0, 0.0, -1.0]], requires_grad=True)
    norms = torch.tensor([1.0, 1.0, 5.0, 3.0])
    tail = script["tail_share"](x.relu(), norms, 0.5)
    tail.backward()
    assert tail.item() == pytest.approx((1 / 8 + 0) / 2)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[0, 1 / 8, 0, 0], [0, 0, 0, 0]]) / 2)


def test_too_little_text_is_refused(tmp_path: Path, script: dict[str, Any]) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.", encoding="utf-8")
    with pytest.raises(UserError, match=r"short.txt has \d+ tokens in windows of 48: at least 1000 are needed"):
        run(tmp_path, script, "--report", str(text))

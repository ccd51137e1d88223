"""The ground of training: modules and checkpoints, a loop that can be killed, losses, figures."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_runs import CPU, Ends
from safetensors import safe_open
from tiny import VOCAB, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rowcast.calibration.learning import losses, part, streaming, trainer
from rowcast.calibration.learning.gguf_export import write_gguf
from rowcast.calibration.learning.judge import Figures, ModuleSubject, coupled_acceptance, judge
from rowcast.calibration.learning.module import load_module, make_module, save_module
from rowcast.calibration.learning.part import Part, Unfinished, World
from rowcast.calibration.learning.settings import TrainSettings
from rowcast.calibration.learning.trainer import Trainer
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.checkpoint.safetensors_header import read_metadata
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv.streaming import StreamingKV
from rowcast.runtime.shard import Shard
from rowcast.runtime.step import SeqStep
from rowcast.runtime.weights import DenseWeights

FAMILIES = (
    "opt-350m",
    "llama-gqa",
    "llama-tied",
    "mistral-window",
    "qwen3",
    "bloom",
    "mpt-clip",
    "falcon-40b",
    "falcon-alibi-12-heads",
)


def some_ids(count: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_goes_to_a_module_and_back(name: str, tmp_path: Path) -> None:
    theirs = tiny_model(name, tmp_path / "there")
    checkpoint, ids = open_checkpoint(str(tmp_path / "there")), some_ids(24).view(2, 12)
    module = load_module(checkpoint, torch.float32, CPU)
    wanted = theirs(input_ids=ids).logits
    assert torch.equal(module(input_ids=ids).logits, wanted)
    save_module(module, checkpoint, tmp_path / "back", {"density": "0.2"}, torch.float32)
    modes = {path.stat().st_mode for path in (tmp_path / "back").iterdir()}
    assert len(modes) == 1, "safetensors writes for the owner alone"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    assert torch.equal(again(input_ids=ids).logits, wanted)
    back = open_checkpoint(str(tmp_path / "back"))
    assert spec_from_config(back.config) == spec_from_config(checkpoint.config)
    assert all(torch.equal(back.source.read(key), checkpoint.source.read(key)) for key in back.source.names())
    assert read_metadata(tmp_path / "back" / "model.safetensors")["density"] == "0.2"
    with pytest.raises(UserError, match="not empty"):
        save_module(module, checkpoint, tmp_path / "back", {}, torch.float32)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "back"}


def test_the_same_module_makes_the_same_bytes(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path / "there")
    checkpoint = open_checkpoint(str(tmp_path / "there"))
    module = load_module(checkpoint, torch.float32, CPU)
    notes = {f"note {i}": f'\u00e9 \u2028 \x1f \x7f "{i}"\n' for i in range(5)}
    files = []
    for i in range(4):  # of 720 orders
        save_module(module, checkpoint, tmp_path / f"{i}", dict(sorted(notes.items(), reverse=i % 2 == 1)), torch.float32)
        files.append((tmp_path / f"{i}" / "model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2] == files[3]
    assert read_metadata(tmp_path / "0" / "model.safetensors") == {"format": "pt", **notes}
    with safe_open(tmp_path / "0" / "model.safetensors", "pt") as theirs:
        assert theirs.metadata() == {"format": "pt", **notes}
        assert all(torch.equal(theirs.get_tensor(key), checkpoint.source.read(key)) for key in theirs.keys())  # noqa: SIM118


def test_shards_are_put_together_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama-gqa", tmp_path / "there")
    checkpoint = open_checkpoint(str(tmp_path / "there"))
    monkeypatch.setattr("rowcast.calibration.learning.module.SHARD_BYTES", 60_000)
    save_module(load_module(checkpoint, torch.float32, CPU), checkpoint, tmp_path / "back", {}, torch.float32)
    assert len(list((tmp_path / "back").glob("model-0*.safetensors"))) > 2
    back = open_checkpoint(str(tmp_path / "back")).source
    assert all(torch.equal(back.read(key), checkpoint.source.read(key)) for key in checkpoint.source.names())


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path)
    config = json.loads((tmp_path / "config.json").read_bytes())
    for changed, said in (({"num_hidden_layers": 3}, r"no tensor model\.layers\.2"), ({"intermediate_size": 96}, "has shape")):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(UserError, match=said):
            load_module(open_checkpoint(str(tmp_path)), torch.float32, CPU)


def test_eight_bits_are_what_all_readers_see(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "rope_theta": 500.0,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    module = make_module(config, torch.float32, CPU)
    for value in module.parameters():
        value.data += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))
    path, ids = write_gguf(module, tmp_path, "a draft"), some_ids(24).view(2, 12)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ours = load_module(open_checkpoint(str(tmp_path)), torch.float32, CPU)
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert (ours.model.layers[0].self_attn.q_proj.weight - module.model.layers[0].self_attn.q_proj.weight).abs().max() < 0.01
    assert ours.config.bos_token_id == 1
    assert path.stat().st_size < 1.3 * sum(value.numel() for value in module.parameters())


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(24.0).view(4, 6) / 24)
            self.layer.bias.zero_()


def make_trainer(folder: Path, steps: int = 12, stopping: Part | None = None, **more: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    line = Line()

    def loss_of(step: int, part: int, parts: int) -> Tensor:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))[part::parts]
        loss: Tensor = (line.layer(x) - x[:, :4].flip(1)).square().mean()
        return loss

    settings = TrainSettings(steps, 0.05, 3, accumulate=more.pop("accumulate", 1))
    return Trainer(
        line, more.pop("loss_of", loss_of), settings, folder, device=CPU, batch_tokens=8, part=stopping, show=False, **more
    )


def test_a_run_that_was_cut_off_gives_the_same_bits(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole")
    result = whole.run()
    assert result.steps == 12 and result.tokens == 96
    for looks in (1, 4, 7):
        cut = make_trainer(tmp_path / str(looks), stopping=Ends(looks - 1))
        with pytest.raises(Unfinished):
            cut.run()
        assert cut.step == looks
        rest = make_trainer(tmp_path / str(looks))
        assert rest.step == looks
        again = rest.run()
        assert again.loss == result.loss
        for mine, other in zip(rest.module.parameters(), whole.module.parameters(), strict=True):
            assert torch.equal(mine, other)
    done = make_trainer(tmp_path / "whole")
    assert done.run().loss == result.loss and torch.equal(next(done.module.parameters()), next(whole.module.parameters()))


def test_a_run_that_was_killed_goes_on_from_what_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_trainer(tmp_path / "whole")
    whole.run()
    killed = make_trainer(tmp_path / "killed", save_seconds=-1.0)
    move = Trainer._move

    def dies(self: Trainer) -> Tensor:
        if self.step == 5:
            raise SystemExit
        return move(self)

    monkeypatch.setattr(Trainer, "_move", dies)
    with pytest.raises(SystemExit):
        killed.run()
    monkeypatch.setattr(Trainer, "_move", move)
    (tmp_path / "killed" / f"{trainer.STATE}.part").write_bytes(b"half a file")
    rest = make_trainer(tmp_path / "killed")
    assert rest.step == 5
    rest.run()
    assert torch.equal(next(rest.module.parameters()), next(whole.module.parameters()))


def test_dropout_is_off(tmp_path: Path) -> None:
    """It would draw, and a run that was cut off would draw again from the start."""

    def trained(folder: str, stopping: Part | None = None) -> Trainer:
        found, dropout = make_trainer(tmp_path / folder, stopping=stopping), nn.Dropout(0.5)
        found.module.add_module("dropout", dropout)
        plain = found.loss_of
        found.loss_of = lambda step, part, parts: dropout(plain(step, part, parts).expand(64)).mean()
        return found

    whole = trained("whole")
    whole.run()
    with pytest.raises(Unfinished):
        trained("cut", Ends(3)).run()
    rest = trained("cut")
    rest.run()
    assert torch.equal(next(rest.module.parameters()), next(whole.module.parameters()))


def test_parts_of_a_batch_are_the_batch(tmp_path: Path) -> None:
    whole, parts = make_trainer(tmp_path / "whole"), make_trainer(tmp_path / "parts", accumulate=4)
    assert whole.run().loss == pytest.approx(parts.run().loss, rel=1e-5)
    torch.testing.assert_close(next(parts.module.parameters()), next(whole.module.parameters()))


def test_the_rate_rises_and_falls() -> None:
    settings = TrainSettings(100, 1e-3, 10, final_share=0.1)
    rates = [settings.share(step) for step in range(100)]
    assert rates[:2] == [0.1, 0.2] and max(rates) == rates[10] == rates[9] == 1.0
    assert TrainSettings(1, optimizer="muon").rates == "--muon-rate and --learning-rate"
    assert rates[55] == pytest.approx(0.55) and rates[99] == pytest.approx(0.11)


def test_what_training_refuses(tmp_path: Path) -> None:
    broken = make_trainer(tmp_path / "nan", loss_of=lambda step, part, parts: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(UserError, match="not a number any more at step 1: lower --learning-rate and"):
        broken.run()
    make_trainer(tmp_path / "done", steps=1).run()
    with pytest.raises(UserError, match="state of another training"):
        Trainer(
            nn.Linear(2, 2),
            lambda step, part, parts: torch.zeros(()),
            TrainSettings(1),
            tmp_path / "done",
            device=CPU,
            batch_tokens=1,
        )
    with pytest.raises(UserError, match="--learning-rate"):
        TrainSettings(1, learning_rate=0).check()
    with pytest.raises(UserError, match="--muon-rate"):
        TrainSettings(1, optimizer="muon", muon_rate=-1).check()
    with pytest.raises(UserError, match="--part-minutes"):
        Part(0)


def test_signals_end_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Part() as sitting:
        assert not sitting.over
        os.kill(os.getpid(), signal.SIGTERM)
        assert sitting.over and sitting.stop().by_signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
    clock = [0.0]
    monkeypatch.setattr(part.time, "monotonic", lambda: clock[0])
    timed = Part(1.0)
    clock[0] = 59.9
    assert not timed.over
    clock[0] = 60.0
    assert timed.over and timed.stop().by_signal is None


@pytest.mark.parametrize(("code", "number"), [(1, None), (1 + signal.SIGTERM, signal.SIGTERM)])
def test_processes_stop_together(code: int, number: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    told = [code, code, 0]

    def agree(self: World, number: int, device: torch.device) -> int:
        said.append(number)
        return told[len(said) - 1]

    monkeypatch.setattr(World, "agree", agree)
    mine = Unfinished(number)
    with pytest.raises(Unfinished) as stopped:
        World().stop_together(mine, CPU)
    assert stopped.value is mine and said == [code], "as the leading one says to the others"
    with pytest.raises(Unfinished) as stopped:
        World().stop_together(None, CPU)
    assert stopped.value.by_signal == number, "and they for the same reason"
    World().stop_together(None, CPU)
    assert said == [code, 0, 0]


@pytest.mark.parametrize(
    ("term", "variation"),
    [(losses.kl_term, 0.0), (losses.variation_term, 1.0), (losses.mixed_term(0.0), 0.0), (losses.mixed_term(0.3), 0.3)],
)
def test_chunked_divergences_have_the_gradients_of_whole_ones(
    term: losses.Term, variation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=draw, requires_grad=True) for shape in ((50, 8), (VOCAB, 8)))
    y, v = (torch.randn(shape, generator=draw) for shape in ((50, 12), (VOCAB, 12)))
    monkeypatch.setattr(losses, "CPU_CHUNK_ELEMENTS", 7 * VOCAB)
    found = losses.head_divergence(x, w, y, v, term=term)
    p, log_q = (y @ v.T).softmax(-1), (x @ w.T).log_softmax(-1)
    kl, tv = (p * (p.log() - log_q)).sum(-1).mean(), 0.5 * (p - log_q.exp()).abs().sum(-1).mean()
    wanted = (1 - variation) * kl + variation * tv
    torch.testing.assert_close(found, wanted)
    for mine, other in zip(torch.autograd.grad(3 * found, (x, w)), torch.autograd.grad(3 * wanted, (x, w)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_a_head_that_is_the_embedding_has_both_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    w, y = torch.randn(VOCAB, 8, generator=draw, requires_grad=True), torch.randn(50, 8, generator=draw)
    v, ids = torch.randn(VOCAB, 8, generator=draw), some_ids(50)
    monkeypatch.setattr(losses, "CPU_CHUNK_ELEMENTS", 7 * VOCAB)
    [found] = torch.autograd.grad(losses.head_divergence(w[ids].tanh(), w, y, v), w)
    log_p, log_q = (y @ v.T).log_softmax(-1), (w[ids].tanh() @ w.T).log_softmax(-1)
    [wanted] = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(-1).mean(), w)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "llama-llama3", "qwen3"])
@pytest.mark.parametrize("rows", [1024, 16])
def test_a_streaming_module_sees_what_the_ladders_draft_sees(
    name: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "QUERY_ROWS", rows)
    tiny_model(name, tmp_path, max_position_embeddings=512)
    checkpoint, ids, how = open_checkpoint(str(tmp_path)), some_ids(90), {"budget": 24, "sinks": 4, "stride": 8}
    spec, module = spec_from_config(checkpoint.config), load_module(checkpoint, torch.float32, CPU)
    whole = module(input_ids=ids[None]).logits[0]
    streaming.stream(module, **how)
    found = module(input_ids=ids[None], use_cache=False).logits[0]
    kv = StreamingKV(spec, Shard(), **how, slots=1, room=8, dtype=torch.float32, device=CPU)
    kv.admit(0)
    decoder = Decoder(DenseWeights(spec, checkpoint.source, SoloComm(), dtype=torch.float32, device=CPU), SoloComm(), CPU)
    wanted = decoder.logits(decoder.run([SeqStep(0, ids.tolist(), 0, [0], 90, True)], kv))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:24], whole[:24], rtol=1e-4, atol=1e-4)
    assert (found[40:] - whole[40:]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["opt", "mistral-window", "llama-dynamic", "bloom"])
def test_models_that_do_not_learn_to_stream(name: str, tmp_path: Path) -> None:
    tiny_model(name, tmp_path)
    with pytest.raises(UserError, match="does not learn to stream"):
        streaming.stream(load_module(open_checkpoint(str(tmp_path)), torch.float32, CPU), 64)


def test_coupled_acceptance_is_the_closed_form() -> None:
    draw = torch.Generator().manual_seed(0)
    log_p, log_q = ((2 * torch.randn(5, 30, generator=draw)).log_softmax(-1) for _ in range(2))
    p, q = log_p.double().exp(), log_q.double().exp()
    wanted = (1 / torch.maximum(p[:, None] / p[:, :, None], q[:, None] / q[:, :, None]).sum(-1)).sum(-1)
    torch.testing.assert_close(coupled_acceptance(log_p, log_q), wanted)
    torch.testing.assert_close(coupled_acceptance(log_p, log_p), torch.ones(5, dtype=torch.float64))
    figures = Figures()
    figures.add(torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]]), torch.tensor([0]), (1.0,))
    assert figures.at[1.0].coupled == pytest.approx(0, abs=1e-9) and figures.acceptance == pytest.approx(0, abs=1e-9)


def test_a_judge_measures_what_the_definitions_say(tmp_path: Path) -> None:
    tiny_model("llama-gqa", tmp_path / "p"), tiny_model("llama-gqa", tmp_path / "q", rms_norm_eps=0.5)
    one, other = (load_module(open_checkpoint(str(tmp_path / name)), torch.float32, CPU) for name in "pq")
    windows, told = some_ids(60).view(4, 15), list[int]()
    found = judge(
        ModuleSubject(one), {"copy": ModuleSubject(other), "same": ModuleSubject(one)}, windows, device=CPU, skip=5, batch_tokens=40,
        advance=told.append,
    )  # fmt: skip
    with torch.no_grad():
        p, q = (model(input_ids=windows).logits[:, 5:-1].flatten(0, 1) for model in (one, other))
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    copy, same = found["copy"], found["same"]
    assert copy.tokens == 36 and sum(told) == 60
    assert copy.acceptance == pytest.approx(float(torch.minimum(log_p, log_q).exp().sum(-1).mean()), rel=1e-4)
    warm = torch.minimum((p / 0.8).softmax(-1), (q / 0.8).softmax(-1)).sum(-1).mean()
    assert copy.at[0.8].maximal / 36 == pytest.approx(float(warm), rel=1e-4)
    assert copy.greedy == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert copy.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
    nll = -log_q.gather(1, windows[:, 6:].flatten()[:, None]).mean()
    assert copy.perplexity == pytest.approx(float(nll.exp()), rel=1e-4)
    assert same.acceptance == pytest.approx(1) and same.greedy == 1 and same.kl == pytest.approx(0, abs=1e-6)
    assert copy.at[1.0].coupled < copy.at[1.0].maximal and json.dumps(copy.to_json())


def test_one_process_is_a_world() -> None:
    world, x = World(), torch.ones(2)
    world.average([x])
    world.wait()
    world.check_shares(6, 3)
    world.size = 4
    with pytest.raises(
        UserError, match="--batch 6 is not shared evenly by 4 processes with --accumulate 3: give a multiple of 12"
    ):
        world.check_shares(6, 3)
    world.size = 1
    assert world.leads and world.agree(3, CPU) == 3 and x.tolist() == [1, 1]

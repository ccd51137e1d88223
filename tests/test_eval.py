"""`rowcast eval`: what its figures mean, that fast evaluation has the law of decoding, the tasks, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import hypergeom
from sparse_models import HeadModel
from tiny import VOCAB, model_with_words, tiny_model, tiny_words
from torch import Tensor

import rowcast.cli
from rowcast.calibration.evaluate import bytes_per_token, drafts_of, evaluate, laws_of
from rowcast.calibration.metrics import Laws, Sets, recall
from rowcast.calibration.quality import LEAST_WINDOW, cut
from rowcast.calibration.recording import OneLayerKV, window_steps
from rowcast.calibration.tasks import Item, accuracy, make_tasks
from rowcast.errors import UserError
from rowcast.kernels import select
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.protocols import WeightView
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.artefact import BESIDE, DESCRIPTION, FORMAT, TENSORS
from rowcast.runtime.sparse.build import build_neurons
from rowcast.runtime.sparse.heads import HeadOracle
from rowcast.runtime.sparse.scorers import Reads, Scored
from rowcast.runtime.sparse.selection import SHARDS, Selector
from rowcast.runtime.sparse.weights import SparseWeights
from rowcast.runtime.step import SeqStep

CPU = torch.device("cpu")
NOVEL = (Path(__file__).parent / "data" / "news-from-nowhere.txt").read_text(encoding="utf-8")
NEURONS = 512


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


WINDOWS = [tokens(60, 1), tokens(50, 2)]


def load(path: Path, name: str, **overrides: int) -> BankWeights:
    tiny_model(name, path, **overrides)
    spec = spec_from_config(json.loads((path / "config.json").read_text()))
    return BankWeights(spec, SafetensorsSource.open(path), SoloComm(), dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> BankWeights:
    return load(tmp_path_factory.mktemp("llama"), "llama-gqa", intermediate_size=NEURONS)


def view(banks: BankWeights, by: str, mlp: float, over: float = 1.0) -> SparseWeights:
    return SparseWeights(banks, build_neurons(banks, mlp=mlp, by=by, over=over))


# Figures


def test_laws_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    q = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.6, 0.3]])
    laws = Laws()
    for row in (0, 1):
        laws.add(p[row : row + 1].log(), q[row : row + 1].log(), torch.tensor([row]))
    assert laws.tokens == 2
    assert laws.acceptance == pytest.approx((0.7 + 0.8) / 2)
    assert laws.greedy == 0.5
    assert laws.perplexity == pytest.approx((0.2 * 0.6) ** -0.5)
    kl = 0.5 * math.log(2.5) + 0.3 * math.log(0.6) + 0.2 * math.log(2 / 3) + 0.8 * math.log(8 / 6) + 0.1 * math.log(1 / 3)
    assert laws.kl == pytest.approx(kl / 2)


def test_choices_by_hand() -> None:
    """100 tokens of 4 neurons: one finds none of its best two, one finds one, the others both."""
    sets, best = Sets(), torch.tensor([[True, True, False, False]]).repeat(100, 1)
    own = best.clone()
    own[0] = ~own[0]
    own[1] = torch.tensor([True, False, True, False])
    score = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).repeat(100, 1)
    for rows in (slice(0, 30), slice(30, 100)):
        sets.add(3, own[rows], best[rows], score[rows])
    [layer] = sets.by_layer()
    found = sets.overall().to_json()
    assert layer == {"layer": 3, **found}
    assert found["recall"] == pytest.approx(98.5 / 100) and found["density"] == 0.5
    assert found["recall_p1"] == found["recall_min"] == 0
    assert found["mass"] == pytest.approx((98 * 0.7 + 0.3 + 0.6) / 100)
    sets.add(4, best[:50], best[:50], score[:50])
    sets.add(4, best[:50], best[:50], score[:50])
    assert sets.overall().recall_p1 == 0.5 and sets.overall().recall_min == 0


@dataclass
class Random:
    """Scores that know nothing."""

    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(5))
    reads: Reads = "own"
    bytes: int = 0

    def __call__(self, x: Tensor) -> Scored:
        return Scored(torch.randn(len(x), NEURONS, generator=self.generator))


@pytest.mark.parametrize("keep", [64, 256])
def test_random_scores_find_what_chance_finds(banks: BankWeights, keep: int) -> None:
    """Of each shard's k best, k random ones hit a hypergeometric number."""
    selectors = [Selector(Random(), NEURONS, keep=keep) for _ in banks.ffn]
    windows = [tokens(120, seed) for seed in range(4)]
    measured = evaluate(banks, {"random": SparseWeights(banks, selectors)}, windows, device=CPU).views["random"]
    chance = hypergeom(NEURONS // SHARDS, keep // SHARDS, keep // SHARDS)
    samples = sum(len(window) - 1 for window in windows) * len(banks.ffn)
    sigma = math.sqrt(SHARDS * chance.var()) / keep / math.sqrt(samples)
    assert abs(measured.neurons.overall().recall - SHARDS * chance.mean() / keep) < 3 * sigma
    assert measured.neurons.overall().density == keep / NEURONS


def test_recall_above_a_threshold_is_of_as_many_as_a_token_used(banks: BankWeights) -> None:
    """Exact scores above a level are each token's best, however few; those of a proxy nearly are."""
    views: dict[str, WeightView] = {}
    for by in ("oracle", "q8"):
        top = build_neurons(banks, mlp=0.5, by=by)
        above = [Selector(each.scorer, NEURONS, keep=NEURONS // 2, threshold=0.2) for each in top if each is not None]
        views[by] = SparseWeights(banks, above)
    found = evaluate(banks, views, WINDOWS, device=CPU).views
    exact, near = (found[by].neurons.overall() for by in ("oracle", "q8"))
    assert exact.recall_min == 1 and 0.05 < exact.density < 0.45
    assert 0.9 < near.recall < 1 and near.density == pytest.approx(exact.density, abs=0.02)


@pytest.mark.parametrize("kept", [16, 20, 24, 32])
def test_recall_of_local_selection(kept: int) -> None:
    """DA-TOP-k (HiRE, arXiv 2402.09360): `kept` of each of 8 shards against the best 128 of 1,024 placed at random."""
    total, wanted, shards = 1024, 128, 8
    scores = torch.randn(2000, total, generator=torch.Generator().manual_seed(kept))
    found = recall(select.top_mask(scores, kept * shards, shards), select.top_mask(scores, wanted, 1))
    in_shard = hypergeom(total, wanted, total // shards)
    expected = 1 - shards / wanted * sum((r - kept) * in_shard.pmf(r) for r in range(kept + 1, wanted + 1))
    assert abs(float(found.mean()) - expected) < 3 * float(found.std()) / math.sqrt(len(found)) + 1e-6


@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "opt", "bloom", "falcon-7b"])
def test_all_neurons_are_the_dense_model(family: str, tmp_path: Path) -> None:
    banks = load(tmp_path, family)
    selectors = [("oracle", 1.0), ("q2", 1.0), ("q4", 2.0)]
    found = evaluate(banks, {by: view(banks, by, 1.0, over) for by, over in selectors}, [ids[:40] for ids in WINDOWS], device=CPU)
    for one in found.views.values():
        assert abs(one.laws.kl) < 1e-5 and one.laws.greedy == 1
        assert one.laws.acceptance == pytest.approx(1, abs=1e-4) and one.drafts.acceptance == pytest.approx(1, abs=1e-4)
        assert one.laws.perplexity == pytest.approx(found.dense.perplexity, rel=1e-4)
        assert one.neurons.overall().recall_min == one.neurons.overall().density == 1
        assert one.neurons.overall().mass == pytest.approx(1)
    assert found.dense.tokens == 2 * 38


def test_the_oracle_bounds_and_candidates_help(banks: BankWeights) -> None:
    views = {"oracle": view(banks, "oracle", 0.25)}
    views |= {f"q2 {over}": view(banks, "q2", 0.25, over) for over in (1.0, 1.5, 2.0, 4.0)}
    found = evaluate(banks, views, WINDOWS, device=CPU).views
    recalls = [found[f"q2 {over}"].neurons.overall().recall for over in (1.0, 1.5, 2.0, 4.0)]
    assert found["oracle"].neurons.overall().recall_min == recalls[-1] == 1
    assert recalls == sorted(recalls) and recalls[0] < 0.95
    assert all(one.neurons.overall().mass <= found["oracle"].neurons.overall().mass for one in found.values())
    assert found["oracle"].laws.acceptance > found["q2 1.0"].laws.acceptance
    assert found["q2 4.0"].laws.kl == pytest.approx(found["oracle"].laws.kl, rel=1e-3)


@pytest.mark.parametrize("length", [3, 23, 24, 25])
def test_drafts_stand_behind_the_exact_models_entries(banks: BankWeights, length: int) -> None:
    """Token by token: runs of four, each behind K/V that the exact model writes anew, against passes over whole windows."""
    sparse, windows = view(banks, "oracle", 0.25), [tokens(length, seed) for seed in range(2)]
    exact, rung = (Decoder(weights, SoloComm(), CPU) for weights in (banks, sparse))

    def run(decoder: Decoder, kv: PagedKV, ids: list[int], start: int) -> Tensor:
        step = SeqStep(seq_id=0, tokens=ids, start=start, blocks=[0], prompt_length=1, sample=False)
        found = decoder.logits(decoder.run([step], kv)).log_softmax(-1)
        kv.commit(0, len(ids))
        return found

    def store() -> PagedKV:
        return PagedKV(banks.spec, Shard(), num_blocks=1, block_size=length, dtype=torch.float32, device=CPU)

    wanted = Laws()
    for window in windows:
        laws, rows = run(exact, store(), window, 0), []
        for first in range(0, length, 4):
            kv = store()
            if first:
                run(exact, kv, window[:first], 0)
            rows += [run(rung, kv, [token], first + i) for i, token in enumerate(window[first : first + 4])]
        wanted.add(laws[1:-1], torch.cat(rows)[1:-1], torch.tensor(window[2:]))
    settings: Any = {"device": CPU, "dtype": torch.float32}
    found = drafts_of(banks, {"rung": sparse}, windows, **settings)["rung"]
    assert found.tokens == wanted.tokens == 2 * (length - 2)
    assert found.acceptance == pytest.approx(wanted.acceptance, rel=1e-5) and found.kl == pytest.approx(wanted.kl, rel=1e-4)
    if length > 4:
        assert laws_of(banks, {"rung": sparse}, windows, **settings)[1]["rung"].kl > found.kl > 0


def test_heads_are_measured_as_neurons_are(tmp_path: Path) -> None:
    model = HeadModel("llama-gqa", tmp_path)
    oracle = SparseWeights(model.banks, [None] * 2, heads=[HeadOracle(4)] * 2)
    found = evaluate(model.banks, {"oracle": oracle, "predicted": model.view(4), "all": model.view(8)}, WINDOWS, device=CPU).views
    assert found["oracle"].heads.overall().recall_min == 1 and found["oracle"].heads.overall().density == 0.5
    assert 0.3 < found["predicted"].heads.overall().recall < 0.9
    assert found["oracle"].laws.acceptance > found["predicted"].laws.acceptance
    assert found["all"].laws.kl == pytest.approx(0, abs=1e-5)
    assert not found["all"].neurons.layers()


# The law


def one_by_one(view: WeightView, ids: list[int]) -> Tensor:
    kv = PagedKV(view.spec, Shard(), num_blocks=1, block_size=len(ids), dtype=torch.float32, device=CPU)
    decoder, rows = Decoder(view, SoloComm(), CPU), []
    for i, token in enumerate(ids):
        rows.append(decoder.logits(decoder.run([SeqStep(0, [token], i, [0], prompt_length=1, sample=True)], kv)))
        kv.commit(0, 1)
    return torch.cat(rows)


@pytest.mark.parametrize(("by", "over"), [("q2", 1.0), ("q2", 1.5), ("gate", 1.0), ("oracle", 1.0)])
def test_a_window_at_once_is_decoding_token_by_token(banks: BankWeights, by: str, over: float) -> None:
    """As far as the first token whose choice hangs on rounding: two scores at the border of its set that are nearly the same."""
    keep = round(0.3 * NEURONS)
    selectors, ids = build_neurons(banks, mlp=0.3, by=by, over=over), WINDOWS[0]
    gaps = torch.full((len(ids),), torch.inf)

    class Watched:
        def __init__(self, selector: Selector) -> None:
            self.scorer, self.reads, self.bytes = selector.scorer, selector.scorer.reads, selector.scorer.bytes
            selector.scorer = self

        def __call__(self, x: Tensor) -> Scored:
            scored = self.scorer(x)
            if len(x) == len(ids):
                for span, count in select.shard_spans(NEURONS, round(keep * over), SHARDS):
                    ranked = scored.values[:, span].sort(descending=True).values
                    gaps.copy_(torch.minimum(gaps, 1 - ranked[:, count] / ranked[:, count - 1]))
            return scored

    watched = [Watched(selector) for selector in selectors]
    assert len(watched) == banks.spec.num_layers
    sparse = SparseWeights(banks, selectors)
    decoder = Decoder(sparse, SoloComm(), CPU)
    kv = OneLayerKV(banks.spec, 1, len(ids), dtype=torch.float32, device=CPU)
    at_once = decoder.logits(decoder.run(window_steps(torch.tensor([ids]), prompt_length=1), kv))
    sparse.reads()
    single = one_by_one(sparse, ids)
    reads = sparse.reads()
    assert reads.neurons == reads.neurons_of * keep / NEURONS
    tied = (gaps < 3e-6).nonzero()[:, 0].tolist()
    same = slice(0, tied[0] if tied else len(ids))
    assert same.stop >= 10
    torch.testing.assert_close(single[same], at_once[same], atol=1e-4, rtol=0)
    assert (single[same] - one_by_one(banks, ids)[same]).abs().max() > 0.1


def test_bytes_are_those_of_single_tokens(banks: BankWeights) -> None:
    ids = WINDOWS[0]
    sparse, bank = view(banks, "q2", 0.25), banks.ffn[0]
    assert bytes_per_token(banks, ids, device=CPU, dtype=torch.float32) == banks.bytes
    dropped = NEURONS * 3 // 4 * (bank.in_row_bytes + bank.out_row_bytes)
    proxy = NEURONS * (2 * banks.spec.hidden_size * (2 / 8 + 2 / 64) + 4)
    saved = len(banks.ffn) * (dropped - proxy)
    assert bytes_per_token(sparse, ids, device=CPU, dtype=torch.float32) == banks.bytes - saved


# Text and tasks


class Words:
    """A token for each word."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = []
        for word in text.replace("\n", " \n ").replace(",", " ,").split(" "):
            if word and word not in self.words:
                self.words.append(word)
            if word:
                ids.append(self.words.index(word))
        return ids


def test_windows_spread_over_the_text() -> None:
    encoder = Words()
    text = " ".join(str(i) for i in range(1000))
    windows = cut(text, encoder, 300, 100, "text")
    assert [window[0] for window in windows] == [0, 300, 600] and all(len(window) == 100 for window in windows)
    assert cut(text, encoder, 50, 100, "text") == [list(range(50))]
    assert cut(" ".join(text.split()[:30]), encoder, 300, 100, "text") == [list(range(30))]
    with pytest.raises(UserError, match=f"2 tokens, at least {LEAST_WINDOW}"):
        cut("two words", encoder, 300, 100, "text")


class Begun(Words):
    """Puts a token before a prompt."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [-1] * add_special_tokens + super().encode(text)


def test_windows_and_tasks_begin_as_what_the_engine_is_given_does() -> None:
    windows = cut(" ".join(str(i) for i in range(990)), Begun(), 300, 100, "text")
    assert [window[:2] for window in windows] == [[-1, 0], [-1, 297], [-1, 594]] and all(len(window) == 100 for window in windows)
    assert cut(" ".join(str(i) for i in range(990)), Begun(), 50, 100, "text") == [[-1, *range(49)]]
    assert cut(" ".join(str(i) for i in range(30)), Begun(), 300, 100, "text") == [[-1, *range(30)]]
    bare, begun = (make_tasks(NOVEL, encoder(), items=5, context=200, seed=3) for encoder in (Words, Begun))
    assert begun == {kind: [Item([-1, *item.prompt], item.answer) for item in items] for kind, items in bare.items()}
    [size] = {len(item.prompt) + len(item.answer) for item in bare["copy"]}
    fit = [len(make_tasks(NOVEL, encoder, items=5, context=size)["copy"]) for encoder in (Words(), Begun())]
    assert fit == [5, 0], "the context is for all of a prompt"


def test_tasks_can_be_answered_from_their_prompts() -> None:
    encoder = Words()
    made = make_tasks(NOVEL, encoder, items=12, context=200, seed=3)
    assert list(made) == ["cloze", "copy", "repeat", "induction", "sequence"]
    assert all(len(items) == 12 for items in made.values())
    again, other = (make_tasks(NOVEL, encoder, items=12, context=200, seed=seed) for seed in (3, 4))
    assert made == again != other

    def words(ids: Sequence[int]) -> list[str]:
        return [encoder.words[i] for i in ids]

    for item in made["cloze"]:
        [answer] = words(item.answer)
        assert any(word.strip(".,;:!?'\"()_-").endswith(answer) or answer in word for word in words(item.prompt))
    for item in made["copy"]:
        assert words(item.prompt)[-2:] == [*words(item.answer), "->"]
    for item in made["repeat"]:
        listed = [word for word in words(item.prompt) if word not in (",", "\n")]
        assert words(item.answer) == [listed[len(listed) - 10]]
    for item in made["induction"]:
        first = item.prompt.index(item.prompt[-1])
        assert item.answer == [item.prompt[first + 1]] and first < len(item.prompt) - 1
    for item in made["sequence"]:
        shown = [word for word in words(item.prompt) if word != ","]
        if shown[0].isdigit():
            assert int(words(item.answer)[0]) - int(shown[-1]) == int(shown[-1]) - int(shown[-2])
    with pytest.raises(UserError, match="different words"):
        make_tasks("Too few words here.", encoder, items=1, context=200)
    short = make_tasks(NOVEL, encoder, items=12, context=20, seed=3)
    longest = max(len(item.prompt) + len(item.answer) for items in short.values() for item in items)
    assert longest <= 20 and not short["copy"] and len(short["induction"]) == 12
    with pytest.raises(UserError, match="no task fits the model's context of 2 tokens"):
        make_tasks(NOVEL, encoder, items=12, context=2, seed=3)


def greedy(view: WeightView, prompt: list[int], count: int, generated_from: int) -> list[int]:
    """By real decoding: the prompt up to `generated_from` in one pass, then token by token."""
    kv = PagedKV(view.spec, Shard(), num_blocks=1, block_size=64, dtype=torch.float32, device=CPU)
    decoder, ids = Decoder(view, SoloComm(), CPU), list(prompt)
    start, ends = 0, [generated_from, *range(generated_from + 1, len(prompt) + count)]
    for end in ends:
        best = decoder.logits(decoder.run([SeqStep(0, ids[start:end], start, [0], generated_from, sample=True)], kv)[-1:])
        kv.commit(0, end - start)
        start = end
        if end >= len(prompt):
            ids.append(int(best.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("sparse_prompt", [False, True])
def test_an_answer_is_what_decoding_gives(banks: BankWeights, sparse_prompt: bool) -> None:
    sparse = view(banks, "q2", 0.1)
    items, wrong = [], []
    for seed in range(6):
        prompt = tokens(8 + seed, seed)
        answer = greedy(sparse, prompt, 1 + seed % 3, 1 if sparse_prompt else len(prompt) - 1)
        items.append(Item(prompt, answer))
        wrong.append(Item(prompt, [*answer[:-1], (answer[-1] + 1) % VOCAB]))
    decoder = Decoder(sparse, SoloComm(), CPU)
    found = accuracy(decoder, {"right": items, "wrong": wrong}, dtype=torch.float32, sparse_prompt=sparse_prompt)
    assert found == {"right": 6, "wrong": 0}
    assert accuracy(Decoder(banks, SoloComm(), CPU), {"right": items}, dtype=torch.float32, sparse_prompt=False)["right"] < 6


# The command line


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = model_with_words(tmp_path_factory.mktemp("model"), "llama-gqa")
    (path / "text.txt").write_text(" ".join(f"w{i}" for i in tokens(400, 7)))
    (path / "empty.txt").write_text(" \n")
    (path / "short.txt").write_text("w1 w2")
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(directory: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object, text: str = "text.txt") -> tuple[int, str, str]:
        capsys.readouterr()
        code = rowcast.cli.main(["eval", str(directory), "--text", str(directory / text), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_the_report(run: Run) -> None:
    code, out, _ = run("--selector", "q2", "--selector", "oracle", "--density", 0.5, "--density", 1, "--window", 64, "--json")
    assert code == 0
    [text] = json.loads(out)["texts"].values()
    assert list(text["views"]) == ["mlp=0.5,by=oracle", "mlp=0.5,by=q2", "mlp=1,by=oracle", "mlp=1,by=q2"]
    assert text["tokens"] == 6 * 62
    predicted, oracle = text["views"]["mlp=0.5,by=q2"], text["views"]["mlp=0.5,by=oracle"]
    assert predicted["perplexity_over_oracle"] == pytest.approx(predicted["perplexity"] - oracle["perplexity"])
    assert oracle["perplexity_over_dense"] == pytest.approx(oracle["perplexity"] - text["dense"]["perplexity"])
    assert [layer["layer"] for layer in predicted["neurons_by_layer"]] == [0, 1]
    assert predicted["bytes_share"] < 1 and predicted["neurons"]["density"] == 0.5
    code, out, _ = run("--ladder", "ngram / self:mlp=0.5,by=q2,kv=128,sinks=8,gamma=2 / plain", "--window", 64)
    assert code == 0 and f"{predicted['acceptance']:.3f}" in out
    assert "price of sparsity" in out and f"of prediction {predicted['perplexity_over_oracle']:+.3f}" in out


def test_figures_are_those_of_windows_that_begin_with_bos(run: Run, directory: Path) -> None:
    arguments = ("--selector", "oracle", "--density", 0.5, "--window", 64, "--json")
    bare = json.loads(run(*arguments)[1])
    tiny_words(directory, bos=True)
    code, out, _ = run(*arguments)
    tiny_words(directory)
    assert code == 0
    [text], [without] = json.loads(out)["texts"].values(), bare["texts"].values()
    ids = tokens(400, 7)
    windows = [[1, *ids[start : start + 63]] for start in range(0, 6 * 63, 63)]
    spec = spec_from_config(json.loads((directory / "config.json").read_text()))
    banks = BankWeights(spec, SafetensorsSource.open(directory), SoloComm(), dtype=torch.float32, device=CPU)
    wanted = evaluate(banks, {"half": view(banks, "oracle", 0.5)}, windows, device=CPU)
    assert text["tokens"] == wanted.dense.tokens == 6 * 62
    assert text["dense"]["perplexity"] == pytest.approx(wanted.dense.perplexity, rel=1e-5)
    half = wanted.views["half"]
    assert text["views"]["mlp=0.5,by=oracle"]["acceptance"] == pytest.approx(half.laws.acceptance, rel=1e-5)
    assert text["views"]["mlp=0.5,by=oracle"]["draft_acceptance"] == pytest.approx(half.drafts.acceptance, rel=1e-5)
    assert text["dense"]["perplexity"] != pytest.approx(without["dense"]["perplexity"], rel=1e-3)


def test_low_bit_rungs_stand_beside_sparse_ones(run: Run) -> None:
    ladder = "self:bits=4,kv=95,gamma=2 / self:bits=8 / self:mlp=0.5,by=oracle / plain"
    code, out, _ = run("--ladder", ladder, "--window", 64, "--json")
    assert code == 0
    [text] = json.loads(out)["texts"].values()
    assert list(text["views"]) == ["bits=4", "bits=8", "mlp=0.5,by=oracle"]
    four, eight, _ = text["views"].values()
    assert four["bytes_share"] < eight["bytes_share"] < 0.4 and 0.5 < four["acceptance"] < eight["acceptance"] < 1
    assert "neurons" not in four and "perplexity_over_oracle" not in four
    code, out, _ = run("--ladder", "self:bits=8", "--window", 64)
    assert code == 0 and f"{eight['acceptance']:.3f}" in out


def test_texts_of_one_name_are_told_apart(run: Run, directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "text.txt"
    other.write_text(" ".join(f"w{i}" for i in tokens(200, 8)))
    code, out, _ = run("--text", other, "--window", 64, "--json")
    assert code == 0
    found = json.loads(out)["texts"]
    assert {name: text["tokens"] for name, text in found.items()} == {str(directory / "text.txt"): 372, str(other): 186}


def test_a_ladders_draft_is_not_needed(run: Run) -> None:
    code, out, _ = run("--ladder", "draft / self:mlp=0.5,by=q2 / plain", "--window", 64, "--json")
    [text] = json.loads(out)["texts"].values()
    assert code == 0 and list(text["views"]) == ["mlp=0.5,by=oracle", "mlp=0.5,by=q2"]


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("empty.txt", (), ["empty.txt is empty"]),
        ("short.txt", (), ["short.txt has 2 tokens", "longer text"]),
        ("none.txt", (), ["none.txt cannot be read"]),
        ("text.txt", ("--selector", "psychic"), ["'psychic'", "q4", "oracle"]),
        ("text.txt", ("--selector", "dejavu"), ["dejavu needs a calibration", "rowcast calibrate"]),
        ("text.txt", ("--selector", "q4-ahead"), ["q4-ahead needs a calibration"]),
        ("text.txt", ("--density", "1.5"), ["1.5", "up to 1"]),
        ("text.txt", ("--heads", "0.5", "--selector", "q4"), ["q4", "density"]),
        ("text.txt", ("--ladder", "ngram / plain"), ["no sparse rung", "self:mlp=0.5"]),
        ("text.txt", ("--ladder", "self:mlp=0.5 / plain", "--density", "0.5"), ["names its own density"]),
        ("text.txt", ("--calibration", "nowhere"), ["nowhere holds no calibration"]),
        ("text.txt", ("--tasks",), ["different words"]),
        ("text.txt", ("--ladder", "self:mlp=0.5 / plain", "--over", "3"), ["--over 3", "over=3"]),
        ("text.txt", ("--selector", "oracle", "--over", "3"), ["--over 3", "oracle"]),
        ("text.txt", ("--window", "5000"), ["--window 5000", "context of 128"]),
    ],
)
def test_what_is_refused(run: Run, text: str, arguments: tuple[str, ...], words: list[str]) -> None:
    code, out, err = run(*arguments, text=text)
    assert code == 2 and out == ""
    assert err.startswith("rowcast: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_a_foreign_calibration_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION).write_text(json.dumps({"format": FORMAT, "fingerprint": "0" * 16}))
    code, _, err = run("--calibration", tmp_path)
    assert code == 2 and "was made for weights" in err and err.count("\n") == 1


@pytest.fixture
def own(directory: Path, tmp_path: Path) -> Path:
    """A model with a calibration of its own: its first layer chooses, its second uses all neurons."""
    model = shutil.copytree(directory, tmp_path / "own")
    folder = model / BESIDE
    folder.mkdir()
    fingerprint = {"fingerprint": SafetensorsSource.open(model).fingerprint()}
    shares = torch.tensor([[0.4, 1.0], [1.0, 1.0]])
    tables = {"densities": shares, "levels.densities": shares.clone(), "levels.q4": torch.tensor([0.003, 0.0])}
    save_file(tables, folder / TENSORS, metadata=fingerprint)
    about = {"format": FORMAT, **fingerprint, "density": 0.7, "densities": [0.7, 1.0], "quality": {}, "scorers": {}}
    (folder / DESCRIPTION).write_text(json.dumps(about))
    return model


def test_levels_of_the_models_own_calibration_are_measured(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(own), "--text", str(own / "text.txt"), "--window", "64"]
    grid = ["--selector", "q4", "--selector", "q8", "--density", "0.7"]
    assert rowcast.cli.main([*arguments, *grid, "--json"]) == 0
    [text] = json.loads(capsys.readouterr().out)["texts"].values()
    views = text["views"]
    assert list(views) == ["mlp=0.7,by=oracle", "mlp=0.7,by=q4", "mlp=0.7,by=q4,cut=threshold", "mlp=0.7,by=q8"]
    top, above = views["mlp=0.7,by=q4"], views["mlp=0.7,by=q4,cut=threshold"]
    assert top["neurons"]["density"] == pytest.approx(0.4, abs=0.01) and top["neurons_share"] == pytest.approx(0.7, abs=0.01)
    assert abs(above["neurons_share"] - 0.7) > 0.05 and 0 < above["neurons_share"] < 1
    [first] = above["neurons_by_layer"]
    assert above["neurons_share"] == pytest.approx((first["density"] + 1) / 2)
    assert rowcast.cli.main([*arguments, "--density", "0.7"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"calibration: the model's own ({own / BESIDE})\n")
    [line] = [line for line in shown.splitlines() if line.startswith("mlp=0.7,by=q4,cut=threshold ") and ":" not in line]
    assert f"{above['neurons_share']:.3f}" in line.split()[-2]
    for named in (["--ladder", "self:mlp=0.7,by=q4 / plain"], ["--density", "0.7", "--over", "1.5"], ["--density", "0.6"]):
        assert rowcast.cli.main([*arguments, *named]) == 0
        assert "threshold" not in capsys.readouterr().out, "a ladder says itself what it cuts by; levels have their place"


def test_a_ladder_that_reads_no_calibration_leaves_the_models_own_alone(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(own), "--text", str(own / "text.txt"), "--window", "64", "--ladder", "self:bits=8 / plain", "--json"]
    assert rowcast.cli.main(arguments) == 0
    whole = capsys.readouterr().out
    assert "own_calibration" not in whole
    (own / BESIDE / TENSORS).unlink()
    assert rowcast.cli.main(arguments) == 0, "a damaged one is left out"
    assert capsys.readouterr().out == whole
    assert rowcast.cli.main([*arguments, "--calibration", str(own / BESIDE)]) == 2

"""Drawing from logits that ranks share: the ids that one rank draws, few bytes, and a certificate that fails when it has to."""

from __future__ import annotations

import math

import pytest
import torch
from thread_comm import ThreadComm, run_ranks
from torch import Tensor

from rowcast.runtime.params import SamplingParams
from rowcast.runtime.sampler import Row, Sampler
from rowcast.runtime.sharded_logits import Exchanged, ShardedLogits, kept_each, kth_largest, whole

V = 1003  # divides by no number of ranks

PARAMS = {
    "greedy": SamplingParams(temperature=0),
    "random": SamplingParams(temperature=0.9),
    "top_k": SamplingParams(temperature=1.3, top_k=40),
    "top_k=1": SamplingParams(temperature=1.3, top_k=1),
    "min_p": SamplingParams(temperature=1.1, min_p=0.05),
    "both": SamplingParams(temperature=1.1, min_p=0.02, top_k=7),
    "top_p": SamplingParams(temperature=1.0, top_p=0.8),
    "penalised": SamplingParams(temperature=0.7, frequency_penalty=0.5, min_tokens=3, stop_token_ids=[5]),
    "biased": SamplingParams(temperature=0, logit_bias={17: 3.0}),
}
GATHERS = {"top_p", "penalised", "biased"}


def local(logits: Tensor, comm: ThreadComm) -> ShardedLogits:
    """This rank's columns, as `Outer.pad` leaves them."""
    each = -(-V // comm.world)
    padded = torch.nn.functional.pad(logits, (0, each * comm.world - V), value=-math.inf)
    return ShardedLogits(padded[:, comm.rank * each : (comm.rank + 1) * each].clone(), comm, V)


def sampler_of(names: list[str]) -> Sampler:
    sampler = Sampler(V)
    for i, name in enumerate(names):
        sampler.add(i, PARAMS[name], seed=i * 7919, sample_index=0, prompt_ids=[3, 5, 9], eos_ids=[2])
    return sampler


def draws(names: list[str], logits: Tensor, world: int) -> tuple[list[list[int]], Exchanged]:
    """Of every rank, two steps of tokens, and what rank 0 counted."""

    def work(comm: ThreadComm) -> tuple[list[int], Exchanged]:
        sampler, found = sampler_of(names), []
        for step in range(2):
            rows = [Row(i, (4,) * step) for i in range(len(names))]
            found += sampler.sample(rows, local(logits + step, comm)).tolist()
        return found, sampler.exchanged

    ranks = run_ranks(world, work)
    return [tokens for tokens, _ in ranks], ranks[0][1]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("names", [[name] for name in PARAMS] + [["greedy", "random", "top_k", "min_p", "both"], list(PARAMS)])
def test_all_ranks_draw_what_one_draws(names: list[str], world: int) -> None:
    logits = torch.randn(len(names), V, generator=torch.Generator().manual_seed(len(names))) * 3
    sampler = sampler_of(names)
    alone: list[int] = []
    for step in range(2):
        alone += sampler.sample([Row(i, (4,) * step) for i in range(len(names))], logits + step).tolist()
    ranks, exchanged = draws(names, logits, world)
    assert all(rank == alone for rank in ranks)
    assert (exchanged.bytes > 0) == (not GATHERS & set(names))


def test_ties_go_to_the_lowest_id_and_nan_is_told() -> None:
    logits = torch.zeros(1, V)
    assert draws(["greedy"], logits, 4)[0][0][:1] == [0]
    logits[0, [300, 900]] = 1.0
    assert draws(["greedy"], logits, 4)[0][0][:1] == [300]
    logits[0, 950] = math.nan
    assert draws(["greedy"], logits, 4)[0][3][:1] == [-1]


@pytest.mark.parametrize(
    ("total", "wanted", "shards", "miss", "kept"),
    [
        (14336, 717, 4, 1e-3, 219),
        (14336, 717, 8, 1e-3, 123),
        (14336, 717, 8, 1e-6, 137),
        (128256, 64, 4, 1e-3, 29),
        (128256, 64, 8, 1e-3, 19),
        (128256, 64, 8, 1e-6, 24),
        (128256, 256, 8, 1e-3, 53),
        (100, 10, 1, 1e-3, 10),
    ],
)
def test_slack_is_the_hypergeometric_laws(total: int, wanted: int, shards: int, miss: float, kept: int) -> None:
    assert kept_each(total, wanted, shards, miss) == kept


def kth(logits: Tensor, k: int, world: int) -> tuple[Tensor, Exchanged]:
    def work(comm: ThreadComm) -> tuple[Tensor, Exchanged]:
        counts = Exchanged()
        ks = torch.full((len(logits), 1), k)
        return kth_largest(local(logits, comm).local, ks, k, comm, V, counts), counts

    return run_ranks(world, work)[0]


def test_where_all_the_best_lie_on_one_rank_the_certificate_fails_and_the_answer_is_right() -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    found, counts = kth(logits, 64, 4)
    assert torch.equal(found, logits.topk(64).values[:, -1:]) and counts.fallbacks == 0
    logits[1, :120] += 100.0  # of one row, all on rank 0
    found, counts = kth(logits, 64, 4)
    assert torch.equal(found, logits.topk(64).values[:, -1:]) and counts.fallbacks == 1


def test_a_token_costs_two_kilobytes_at_most_where_logits_cost_half_a_megabyte() -> None:
    vocab, world, k = 128256, 8, 64
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1))

    def work(comm: ThreadComm) -> tuple[int, Exchanged]:
        sampler = Sampler(vocab)
        sampler.add(0, SamplingParams(temperature=1.0, top_k=k), seed=1, sample_index=0, prompt_ids=[1], eos_ids=[2])
        each = vocab // world
        part = ShardedLogits(logits[:, comm.rank * each : (comm.rank + 1) * each].clone(), comm, vocab)
        assert part.shape == (1, vocab) and torch.equal(whole(part), logits)
        return int(sampler.sample([Row(0)], part)[0]), sampler.exchanged

    ranks = run_ranks(world, work)
    assert len({token for token, _ in ranks}) == 1
    exchanged = ranks[0][1]
    print(f"{exchanged.bytes / exchanged.tokens:.0f} bytes a token over {world} ranks; gathered logits {4 * vocab}")
    assert exchanged.tokens == 1 and exchanged.fallbacks == 0
    assert exchanged.bytes <= 2048 < 4 * vocab / 200

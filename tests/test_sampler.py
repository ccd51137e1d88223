"""The sampler against a slow float64 reference, the drawn law against softmax, and what a draw may not depend on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.runtime.logits import prompt_logprobs
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.philox import Purpose, gumbel
from rowcast.runtime.sampler import Row, Sampler
from rowcast.runtime.sampling_batch import make_batch

V = 40
EOS = 39


def random_logits(rows: int, seed: int = 0, vocab_size: int = V) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def reference_law(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    bad_words: Sequence[list[int]] = (),
) -> list[float]:
    """The probabilities that one row is drawn from, step by step in Python floats."""
    x = list(logits)
    if params.allowed_token_ids:
        x = [v if i in params.allowed_token_ids else -math.inf for i, v in enumerate(x)]
    for word in bad_words:
        if list(output[len(output) - len(word) + 1 :]) == word[:-1] and len(output) >= len(word) - 1:
            x[word[-1]] = -math.inf
    if len(output) < params.min_tokens:
        for i in (EOS, *(params.stop_token_ids or ())):
            x[i] = -math.inf
    for i, bias in (params.logit_bias or {}).items():
        x[i] += bias
    for i in range(len(x)):
        if i in prompt or i in output:
            x[i] = x[i] / params.repetition_penalty if x[i] > 0 else x[i] * params.repetition_penalty
        x[i] -= params.frequency_penalty * list(output).count(i)
        x[i] -= params.presence_penalty * (i in output)
    if params.temperature == 0:
        return [float(i == x.index(max(x))) for i in range(len(x))]
    p = softmax([v / params.temperature for v in x])
    p = normalised([q if q >= params.min_p * max(p) else 0.0 for q in p])
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if params.top_k > 0:
        kept = order[: params.top_k]
        p = normalised([q if i in kept else 0.0 for i, q in enumerate(p)])
    before = dict(zip(order, itertools.accumulate((p[i] for i in order), initial=0.0), strict=False))
    return normalised([q if params.top_p == 1 or before[i] < params.top_p else 0.0 for i, q in enumerate(p)])


def softmax(x: list[float]) -> list[float]:
    return normalised([math.exp(v - max(x)) for v in x])


def normalised(p: list[float]) -> list[float]:
    return [q / sum(p) for q in p]


def law(processed: Tensor, params: SamplingParams) -> Tensor:
    """[V] processed logits -> [V] probabilities, as `process` documents."""
    if params.greedy:
        return torch.nn.functional.one_hot(processed.argmax(), len(processed)).double()
    return processed.double().softmax(-1)


def rows_of(*seq_ids: int) -> list[Row]:
    return [Row(seq_id) for seq_id in seq_ids]


def one(params: SamplingParams, *, prompt: Sequence[int] = (1, 2), output: Sequence[int] = (), **keywords: Any) -> Sampler:
    """A sampler with one sequence, number 0, that has generated `output`."""
    sampler = Sampler(keywords.pop("vocab_size", V))
    keywords = {"seed": 7, "sample_index": 0, "eos_ids": [EOS], **keywords}
    sampler.add(0, params, prompt_ids=prompt, **keywords)
    sampler.commit(0, output)
    return sampler


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "greedy": {"temperature": 0},
    "greedy_ignores_truncation": {"temperature": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.9},
    "greedy_penalised": {"temperature": 0, "repetition_penalty": 3.0, "presence_penalty": 2, "frequency_penalty": 2},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.7},
    "repetition": {"repetition_penalty": 1.7},
    "all_penalties": {"presence_penalty": -1, "frequency_penalty": 0.5, "repetition_penalty": 0.8, "temperature": 1.3},
    "top_k": {"top_k": 5},
    "top_k_above_vocabulary": {"top_k": 1000},
    "top_k_minus_one": {"top_k": -1},
    "top_p": {"top_p": 0.8},
    "top_p_tiny": {"top_p": 1e-6},
    "top_k_then_top_p": {"top_k": 6, "top_p": 0.7, "temperature": 2.0},
    "min_p": {"min_p": 0.1},
    "min_p_then_top_p": {"min_p": 0.05, "top_p": 0.75, "temperature": 1.5},
    "all_truncations": {"min_p": 0.02, "top_p": 0.9, "top_k": 7, "temperature": 1.7},
    "bias": {"logit_bias": {3: 4.0, 11: -100.0, 0: 1.5}},
    "allowed": {"allowed_token_ids": [4, 9, 30, EOS]},
    "allowed_biased_truncated": {"allowed_token_ids": list(range(20)), "logit_bias": {5: 6.0}, "top_k": 3},
    "min_tokens": {"min_tokens": 8, "stop_token_ids": [5, 6]},
    "min_tokens_reached": {"min_tokens": 6, "stop_token_ids": [5, 6]},
    "bad_words": {"bad_words": ["stands for the ids below"]},
    "everything": {
        "allowed_token_ids": list(range(2, V)),
        "bad_words": ["same"],
        "min_tokens": 16,
        "logit_bias": {7: 3.0, 8: 3.0},
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "temperature": 0.9,
        "min_p": 0.01,
        "top_k": 12,
        "top_p": 0.95,
    },
}
BAD_WORDS = [[8], [13, 14], [12, 13, 15], [14, 16], [13, 13, 17]]
"""After OUTPUT: 8, 14 and 15 are forbidden, 16 and 17 are not."""
PROMPT, OUTPUT = [3, 7, 7, 21], [9, 7, 9, 12, 12, 13]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_every_parameter_changes_the_law_as_the_reference_says(case: str, seed: int) -> None:
    params = SamplingParams(**CASES[case])
    bad_words = BAD_WORDS if params.bad_words else []
    logits = random_logits(1, seed)
    given = logits.clone()
    sampler = one(params, prompt=PROMPT, output=OUTPUT, bad_word_ids=bad_words)
    got = law(sampler.process([Row(0)], logits)[0], params)
    expected = torch.tensor(reference_law(logits[0].tolist(), params, PROMPT, OUTPUT, bad_words), dtype=torch.float64)
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(logits, given)


def test_a_batch_of_different_requests_equals_each_alone_in_any_order() -> None:
    names = list(CASES)
    together = Sampler(V)
    logits = random_logits(len(names), 5).bfloat16()
    alone: list[tuple[Tensor, int]] = []
    for i, name in enumerate(names):
        params = SamplingParams(**CASES[name])
        keywords: dict[str, Any] = {
            "seed": i,
            "sample_index": i % 3,
            "prompt_ids": PROMPT[: i % 5],
            "eos_ids": [EOS],
            "bad_word_ids": BAD_WORDS if params.bad_words else (),
        }
        single = Sampler(V)
        for sampler, seq_id in ((single, 0), (together, i)):
            sampler.add(seq_id, params, **keywords)
            sampler.commit(seq_id, OUTPUT)
        alone.append((single.process([Row(0)], logits[i : i + 1])[0], int(single.sample([Row(0)], logits[i : i + 1]))))
    generator = torch.Generator().manual_seed(0)
    for size in (len(names), len(names), 7, 2, 1):
        rows = torch.randperm(len(names), generator=generator)[:size].tolist()
        processed = together.process(rows_of(*rows), logits[rows])
        assert all(torch.equal(row, alone[i][0]) for i, row in zip(rows, processed, strict=True))
        assert together.sample(rows_of(*rows), logits[rows]).tolist() == [alone[i][1] for i in rows]


@pytest.mark.parametrize("case", CASES)
def test_drafted_tokens_count_like_committed_ones(case: str) -> None:
    """One call for several depths, beside another sequence; nothing stays behind."""
    params = SamplingParams(**CASES[case])
    bad_words = BAD_WORDS if params.bad_words else []
    depths = [0, 4, 1, len(OUTPUT)]
    logits = random_logits(len(depths) + 1, 2)
    drafting = one(params, prompt=PROMPT, bad_word_ids=bad_words)
    drafting.add(1, SamplingParams(presence_penalty=1.0), seed=1, sample_index=0, prompt_ids=[1], eos_ids=[])
    rows = [Row(0, tuple(OUTPUT[:depth])) for depth in depths]
    rows.insert(1, Row(1, (5, 5)))
    for _ in range(2):
        processed, drawn = drafting.process(rows, logits), drafting.sample(rows, logits).tolist()
        for i, row in enumerate(rows):
            if row.seq_id == 0:
                committed = one(params, prompt=PROMPT, output=row.drafted, bad_word_ids=bad_words)
                assert torch.equal(processed[i], committed.process([Row(0)], logits[i : i + 1])[0])
                assert drawn[i] == int(committed.sample([Row(0)], logits[i : i + 1]))
    for depth in range(len(OUTPUT)):
        behind = [Row(0, tuple(OUTPUT[depth:]))]
        assert torch.equal(drafting.process(behind, logits[-1:])[0], processed[-1])
        drafting.commit(0, OUTPUT[depth : depth + 1])


def test_tensors_of_parameters_are_built_once_for_a_pattern_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    def counted(*arguments: Any) -> Any:
        built.append(1)
        return make_batch(*arguments)

    monkeypatch.setattr("rowcast.runtime.sampler.make_batch", counted)
    sampler = one(SamplingParams(top_k=3, presence_penalty=0.5))
    logits = random_logits(4)
    for token in range(10):
        sampler.sample([Row(0)], logits[:1])
        sampler.sample([Row(0, (token, 3)[:drafted]) for drafted in range(3)], logits[:3])
        sampler.commit(0, [token])
    assert len(built) == 2
    for count in range(1, 300):
        sampler.uniforms([Row(0)] * count, purpose=Purpose.ACCEPT, rung=0, rounds=[0] * count)
    assert len(sampler._batches) < 100
    sampler.suspend(0)
    assert not sampler._batches


def test_sample_is_gumbel_max_of_the_processed_logits_at_the_position() -> None:
    logits = random_logits(1)
    sampler = one(SamplingParams(temperature=8.0, top_k=30), prompt=[1, 2, 3], seed=2**50 + 1, sample_index=2)
    for position in range(3, 23):
        noise = gumbel(torch.tensor([2**50 + 1]), torch.tensor([2]), torch.tensor([position]), range(V))
        expected = (sampler.process([Row(0)], logits) + noise).argmax(-1)
        assert torch.equal(sampler.sample([Row(0)], logits), expected)
        sampler.commit(0, [0])


def test_noise_of_a_rung_and_round_is_its_own() -> None:
    """Greedy rows take the argmax whatever it is."""
    law = torch.zeros(40, V)
    law[:, 3] = 0.1
    sampler = one(SamplingParams())
    sampler.add(1, SamplingParams(temperature=0), seed=7, sample_index=0, prompt_ids=(1, 2), eos_ids=[])
    rows = [Row(0, (0,) * i) for i in range(39)] + [Row(1)]
    keys = [(purpose, rung, number) for purpose in Purpose for rung in (0, 2) for number in (1, 65535)]
    drawn, coins = [], []
    for purpose, rung, number in keys:
        tokens = sampler.draw(rows, law, purpose=purpose, rung=rung, rounds=[number] * 40)
        noise = gumbel(
            torch.tensor([7]), torch.tensor([0]), torch.tensor([7]), range(V), purpose=purpose, rung=rung, round_index=number
        )
        assert int(tokens[5]) == int((noise + law[:1]).argmax())
        assert int(tokens[39]) == 3
        uniforms = sampler.uniforms(rows, purpose=purpose, rung=rung, rounds=[number] * 40)
        assert uniforms.dtype == torch.float64
        assert 0 < float(uniforms.min()) < 0.3 < 0.7 < float(uniforms.max()) < 1
        drawn.append(tuple(tokens.tolist()))
        coins.append(tuple(uniforms[:39].tolist()))
    assert len(set(drawn)) == len(keys)
    assert len({coin for row in coins for coin in row}) == 39 * len(keys)
    mixed = sampler.draw(rows, law, purpose=Purpose.RESIDUAL, rung=2, rounds=[1, 65535] * 20).tolist()
    where = keys.index((Purpose.RESIDUAL, 2, 1))
    assert mixed == [drawn[where + i % 2][i] for i in range(40)]
    assert torch.equal(sampler.sample(rows, law), sampler.draw(rows, law, purpose=Purpose.TOKEN))


def test_rounds_are_numbered_for_each_sequence_and_outlive_suspension() -> None:
    sampler = one(SamplingParams())
    sampler.add(1, SamplingParams(), seed=7, sample_index=0, prompt_ids=(), eos_ids=[])
    numbers = [sampler.next_round(0) for _ in range(2**16 - 1)]
    sampler.suspend(0)
    assert {*numbers, sampler.next_round(0)} == set(range(2**16))
    assert sampler.next_round(1) == numbers[0]
    assert (sampler.greedy(0), one(SamplingParams(temperature=0)).greedy(0)) == (False, True)


DRAWS = 200_000


@pytest.mark.parametrize("case", ["plain", "temperature", "top_k", "top_p", "min_p", "all_truncations"])
def test_the_drawn_law_is_softmax(case: str) -> None:
    """Chi-square over positions (even cases) or seeds (odd ones) at fixed seeds; forbidden tokens never appear."""
    params = SamplingParams(**CASES[case])
    processed = one(params).process([Row(0)], random_logits(1, 3))
    counter, fixed = torch.arange(DRAWS), torch.full((DRAWS,), 11)
    keys = (fixed, counter) if list(CASES).index(case) % 2 else (counter, fixed)
    noise = gumbel(keys[0], torch.zeros_like(fixed), keys[1], range(V))
    counts = (noise + processed).argmax(-1).bincount(minlength=V)
    expected = processed[0].double().softmax(-1) * DRAWS
    assert int(counts[expected == 0].sum()) == 0
    assert_fits(counts, expected)


def test_draws_at_different_positions_samples_and_seeds_are_independent() -> None:
    """The joint law of two draws is the product of their laws."""
    processed = random_logits(1, 8, vocab_size=5) / 3
    p = processed[0].double().softmax(-1)
    counter, zero = torch.arange(DRAWS), torch.zeros(DRAWS, dtype=torch.int64)
    pairs = {
        "next position": ((zero, zero, counter * 2), (zero, zero, counter * 2 + 1)),
        "other sample": ((zero, zero, counter), (zero, zero + 1, counter)),
        "next seed": ((counter * 2, zero, zero), (counter * 2 + 1, zero, zero)),
    }
    for first, second in pairs.values():
        a, b = ((gumbel(*keys, range(5)) + processed).argmax(-1) for keys in (first, second))
        assert_fits((a * 5 + b).bincount(minlength=25), torch.outer(p, p).flatten() * DRAWS)


def assert_fits(counts: Tensor, expected: Tensor) -> None:
    """Chi-square, cells expected fewer than 10 times pooled. Fixed seeds: a pass stays a pass."""
    common = expected >= 10
    observed, wanted = ([*x[common].tolist(), float(x[~common].sum())] for x in (counts.double(), expected))
    if wanted[-1] == 0:
        del observed[-1], wanted[-1]
    assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-3


def test_a_replayed_sequence_draws_the_same_tokens_step_by_step_or_at_once() -> None:
    params = SamplingParams(temperature=1.0, presence_penalty=0.5)
    steps = random_logits(20, 4)

    def run(sampler: Sampler, seq_id: int) -> list[int]:
        tokens = []
        for step in steps:
            tokens += sampler.sample([Row(seq_id)], step[None]).tolist()
            sampler.commit(seq_id, tokens[-1:])
        return tokens

    first = one(params)
    tokens = run(first, 0)
    assert len(set(tokens)) > 5
    assert run(one(params), 0) == tokens
    assert run(one(params, seed=8), 0) != tokens
    assert run(one(params, sample_index=1), 0) != tokens
    resumed = one(params, output=tokens[:12])
    assert int(resumed.sample([Row(0)], steps[12:13])) == tokens[12]
    first.remove(0)
    first.add(3, params, seed=7, sample_index=0, prompt_ids=(1, 2), eos_ids=[EOS])  # a slot used before starts clean
    assert run(first, 3) == tokens


def test_penalties_tell_prompt_from_output() -> None:
    logits = torch.ones(1, V)
    logits[0, 9] = -1.0
    expected = {  # in the prompt twice, in the output twice, there once, in the prompt and negative, nowhere
        SamplingParams(presence_penalty=2): [1.0, -1.0, -1.0, -1.0, 1.0],
        SamplingParams(frequency_penalty=2): [1.0, -3.0, -1.0, -1.0, 1.0],
        SamplingParams(repetition_penalty=2): [0.5, 0.5, 0.5, -2.0, 1.0],
    }
    for params, values in expected.items():
        x = one(params, prompt=[4, 4, 9], output=[5, 5, 6]).process([Row(0)], logits)[0]
        assert x[[4, 5, 6, 9, 0]].tolist() == values


def test_min_tokens_counts_committed_tokens() -> None:
    logits = torch.zeros(1, V)
    logits[0, EOS], logits[0, 5] = 9.0, 8.0
    sampler = one(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[5], ignore_eos=True))
    drawn = []
    for _ in range(3):
        drawn += sampler.sample([Row(0)], logits).tolist()
        sampler.commit(0, drawn[-1:])
    assert drawn == [0, 0, EOS]


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = torch.zeros(2, V)
    logits[0, [11, 30]] = 1.0
    sampler = one(SamplingParams(temperature=0))
    sampler.add(1, SamplingParams(temperature=0, repetition_penalty=1.5), seed=0, sample_index=0, prompt_ids=[0], eos_ids=[])
    assert sampler.sample(rows_of(0, 1), logits).tolist() == [11, 0]


def test_ties_at_the_edge_of_a_truncation_all_stay() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    for keywords in ({"top_k": 2}, {"top_p": 0.6}, {"top_k": 2, "top_p": 0.99}):
        sampler = one(SamplingParams(**keywords), vocab_size=6)
        sampler.add(1, SamplingParams(top_k=5), seed=0, sample_index=0, prompt_ids=[], eos_ids=[])
        for rows in (rows_of(0), rows_of(0, 1)):
            kept = sampler.process(rows, logits.expand(len(rows), -1))[0] > -math.inf
            assert kept.tolist() == [True, False, True, True, True, False]


def test_logprobs_come_from_the_raw_logits() -> None:
    logits = random_logits(3, 6)
    raw = logits.double().log_softmax(-1)
    sampler = one(SamplingParams(temperature=0, logit_bias={5: 50.0}, logprobs=3))
    sampler.add(1, SamplingParams(), seed=0, sample_index=0, prompt_ids=[], eos_ids=[])
    sampler.add(2, SamplingParams(temperature=0.5, top_k=1, logprobs=-1), seed=0, sample_index=0, prompt_ids=[], eos_ids=[])
    tokens = sampler.sample(rows_of(0, 1, 2), logits).tolist()
    assert (tokens[0], tokens[2]) == (5, int(logits[2].argmax()))
    biased = sampler.report(0, logits[[0, 2]], [tokens[0], 9])
    whole = sampler.report(2, logits[2:], tokens[2:])
    assert biased is not None
    assert whole is not None
    assert [entry.token_id for entry in biased + whole] == [5, 9, tokens[2]]
    for entry, row, k in ((biased[0], 0, 3), (biased[1], 2, 3), (whole[0], 2, V)):
        order = raw[row].argsort(descending=True).tolist()
        assert entry.logprob == pytest.approx(float(raw[row, entry.token_id]), abs=1e-5)
        assert entry.rank == order.index(entry.token_id) + 1
        assert entry.top_ids == order[:k]
        assert entry.top_logprobs == pytest.approx(raw[row, order[:k]].tolist(), abs=1e-5)
    assert sampler.report(1, logits[1:2], [0]) is None
    none_but_chosen = one(SamplingParams(logprobs=0)).report(0, logits[:1], [4])
    assert none_but_chosen is not None
    assert none_but_chosen[0].top_ids == []


def test_prompt_logprobs() -> None:
    logits = random_logits(5, 9)
    following = [3, 3, 0, 39, 12]
    found = prompt_logprobs(logits, following, 2)
    raw = logits.double().log_softmax(-1)
    assert [entry.token_id for entry in found] == following
    assert [entry.logprob for entry in found] == pytest.approx([float(raw[i, t]) for i, t in enumerate(following)], abs=1e-5)
    assert [entry.top_ids for entry in found] == raw.topk(2).indices.tolist()
    assert prompt_logprobs(logits[:0], [], 2) == []


def test_temperature_and_truncation_leave_a_greedy_row_alone() -> None:
    logits = random_logits(1)
    params = SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.9)
    sampler = one(params)
    assert sampler.process([Row(0)], logits) is logits
    sampler.add(1, SamplingParams(temperature=0.5, top_k=4, min_p=0.1), seed=0, sample_index=0, prompt_ids=[], eos_ids=[])
    assert torch.equal(sampler.process(rows_of(1, 0), logits.expand(2, -1))[1], logits[0])


@pytest.mark.parametrize(
    ("given", "bad_words"),
    [
        ({"logit_bias": {V: 1.0}}, []),
        ({"allowed_token_ids": [0, V]}, []),
        ({"allowed_token_ids": [EOS], "min_tokens": 1}, []),
        ({"allowed_token_ids": [4, 5]}, [[4], [3, 5]]),
    ],
)
def test_what_no_token_can_satisfy_is_refused(given: dict[str, Any], bad_words: list[list[int]]) -> None:
    with pytest.raises(UserError) as caught:
        one(SamplingParams(**given), bad_word_ids=bad_words)
    assert "\n" not in str(caught.value)


def test_a_suspended_sequence_goes_on_with_its_counts() -> None:
    """Device memory for penalties is held by sequences that run, not by those that wait."""
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.3, presence_penalty=0.2)
    sampler = Sampler(V)
    for seq_id in range(20):
        sampler.add(seq_id, params, seed=1, sample_index=0, prompt_ids=[1, 2, seq_id], eos_ids=[EOS])
    assert len(sampler._counts.in_prompt) == 0
    logits = random_logits(2)
    for tokens in ([3, 4], [3], [5, 5]):
        before = sampler.process(rows_of(0, 1), logits)
        for seq_id in (0, 1):
            sampler.commit(seq_id, tokens)
        sampler.suspend(0)
        sampler.suspend(0)
        after = sampler.process(rows_of(0, 1), logits)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after[:, 6:], sampler.process(rows_of(1, 0), logits.flip(0)).flip(0)[:, 6:])
    law = reference_law(logits[0].tolist(), params, [1, 2, 0], [3, 4, 3, 5, 5])
    torch.testing.assert_close(after[0].softmax(-1), torch.tensor(law), atol=1e-6, rtol=1e-5)
    assert len(sampler._counts.in_prompt) == 2
    sampler.remove(0)
    assert sampler.seq_ids == set(range(1, 20))


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.4)]
)
def test_logits_that_are_not_numbers_give_no_token(params: SamplingParams) -> None:
    sampler = Sampler(V)
    for seq_id in (0, 1):
        sampler.add(seq_id, params, seed=1, sample_index=0, prompt_ids=[1], eos_ids=[EOS])
    logits = random_logits(2)
    logits[1, 7] = math.nan
    first, second = sampler.sample(rows_of(0, 1), logits).tolist()
    assert first >= 0
    assert second == -1

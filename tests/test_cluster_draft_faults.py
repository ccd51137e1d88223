"""A draft outside the ranks where something goes wrong, or is large, or comes late. Float32, on the CPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cluster_drafts import FOUR, PARAMS, PROMPTS, TWO, driver_draft, gang, tokens
from tiny import VOCAB, tiny_model
from warm_ranks import WarmLauncher

from rowcast import LLM, SamplingParams
from rowcast.cluster import drafting
from rowcast.cluster import gang as gang_module
from rowcast.cluster.drafting import DriverDraft, DriverRelay
from rowcast.cluster.executor import GangExecutor
from rowcast.cluster.gang import Gang
from rowcast.cluster.wire import Answer, Ask, Asked, Message, Proposed, WireError, decode, encode
from rowcast.errors import DraftError, UserError
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.ladder import relay as relay_module
from rowcast.runtime.ladder.climb import Climb, Climber, Want
from rowcast.runtime.ladder.coupled import Coupled
from rowcast.runtime.ladder.maximal import Maximal
from rowcast.runtime.ladder.model_runner import ModelRunner
from rowcast.runtime.ladder.path import Path as Tokens
from rowcast.runtime.ladder.rule import Rule
from rowcast.runtime.planning import Target, Wish, make_plan
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.step import RungCounts, SeqResult, SeqSetup, SeqStep

SEEDED = SamplingParams(temperature=0.8, seed=5, max_tokens=40, detokenize=False, ignore_eos=True)
DRIVER = TWO.replace("{at}", "driver")


@pytest.fixture(scope="module")
def launcher() -> Iterator[WarmLauncher]:
    started = WarmLauncher()
    yield started
    started.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama-gqa", folder / "target")
    tiny_model("llama-gqa", folder / "draft")
    return folder / "target", folder / "draft"


@pytest.fixture(scope="module")
def expected(models: tuple[Path, Path]) -> list[list[list[int]]]:
    return tokens(LLM(models[0], dtype="float32", ladder="plain").generate(PROMPTS, PARAMS))


def executor(llm: LLM) -> GangExecutor:
    found = llm.engine._executor
    assert isinstance(found, GangExecutor)
    return found


# Interrupted, or slow.


@pytest.mark.parametrize("where", ["drafting", "waiting"])
def test_interrupts_are_no_failures(
    launcher: WarmLauncher,
    models: tuple[Path, Path],
    expected: list[list[list[int]]],
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the ranks wait for a draft; before what they say is read, of requests that come and of rounds. They live on, however
    often."""
    started, calls, at = launcher.started, 0, 0
    owner, name = (DriverDraft, "_answer") if where == "drafting" else (Gang, "_message")
    real = getattr(owner, name)

    def interrupted(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return real(self, *arguments)

    with gang(launcher, models, FOUR, "driver") as llm:
        monkeypatch.setattr(owner, name, interrupted)
        for number in (2, 7, 9, 10, 12):
            at, calls = number, 0
            with pytest.raises(KeyboardInterrupt):
                llm.generate(PROMPTS, PARAMS)
            llm.engine.check()
        assert tokens(llm.generate(PROMPTS, PARAMS)) == expected
        assert executor(llm).failures == 0
    assert launcher.started == started + 1


def test_an_interrupted_driver_ends_at_once(
    launcher: WarmLauncher, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the ranks wait for a draft."""
    real, calls = Gang._message, 0

    def interrupted(self: Gang, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            time.sleep(0.2)  # the question is there
            raise KeyboardInterrupt
        return real(self, *arguments)

    llm = gang(launcher, models, DRIVER, "driver")
    monkeypatch.setattr(Gang, "_message", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, PARAMS)
    started = time.monotonic()
    llm.shutdown()
    assert time.monotonic() - started < 2


def test_a_slow_draft_is_not_the_ranks_fault(
    launcher: WarmLauncher, models: tuple[Path, Path], expected: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads a long prompt, say: the time that a round may take is that of the ranks."""
    real, late_s = DriverDraft.answer, 0.0

    def slow(self: DriverDraft, ask: Ask) -> Answer:
        nonlocal late_s
        late_s += 1000
        return real(self, ask)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late_s, sleep=time.sleep)
    with gang(launcher, models, DRIVER, "driver") as llm:
        monkeypatch.setattr(gang_module, "time", clock)
        monkeypatch.setattr(DriverDraft, "answer", slow)
        assert tokens(llm.generate(PROMPTS, PARAMS)) == expected
        assert executor(llm).failures == 0


def test_a_draft_that_is_lost_is_done_without(
    launcher: WarmLauncher,
    models: tuple[Path, Path],
    expected: list[list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A device that fails once fails for good: one error, and whoever asks again gets what it asked for."""

    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    with gang(launcher, models, FOUR, "driver") as llm:
        assert tokens(llm.generate(PROMPTS, PARAMS)) == expected
        monkeypatch.setattr(ModelRunner, "forward", lost)
        with pytest.raises(DraftError, match="unspecified launch failure"):
            llm.generate(PROMPTS, PARAMS)
        for _ in range(2):
            assert tokens(llm.generate(PROMPTS, PARAMS)) == expected
        llm.engine.check()
        assert executor(llm).failures == 0
    [told] = [record.message for record in caplog.records if "nothing is drafted any more" in record.message]
    assert "unspecified launch failure" in told


# What the driver's caches hold.


def test_a_draft_that_is_the_model_is_always_right(launcher: WarmLauncher, models: tuple[Path, Path]) -> None:
    """Whatever its cache in the driver went through: rounds without it, preemption, blocks that others filled, requests that come and
    go. Anything stale in its K/V would cost acceptance."""
    target, _ = models
    prefix = list(range(40, 56))
    some = [[*prefix, 3 * i + 1, 3 * i + 2, 7] for i in range(6)]
    ladder = DRIVER.format(draft=target)
    roomy = LLM(target, dtype="float32", ladder="plain", block_size=4)
    plain = tokens(roomy.generate(some, SEEDED))
    launcher.faults = [{0: "whim", 1: "none"}]
    with gang(launcher, models, ladder, "driver", block_size=4, max_num_seqs=6, max_num_batched_tokens=24) as llm:
        llm.engine.scheduler.pool.take(llm.engine.scheduler.pool.free_blocks - 45)
        requests = [llm.engine.add(prompt, SEEDED) for prompt in some[:4]]
        while llm.engine.has_work:
            llm.engine.step()
            if len(requests) < 6 and len(requests[0].sequences[0].output_ids) > 5 * (len(requests) - 3):
                requests.append(llm.engine.add(some[len(requests)], SEEDED))
        assert [[seq.output_ids for seq in request.sequences] for request in requests] == plain
        judged = [r.stats.rungs["draft"] for r in requests if "draft" in r.stats.rungs and r.stats.rungs["draft"].judged]
        assert judged and all(counts.acceptance == 1.0 for counts in judged)
        assert sum(r.stats.preemptions for r in requests) > 0
        assert sum(r.stats.cached_tokens for r in requests) > 0
        assert not driver_draft(llm).seq_ids


class Alone:
    """A driver's draft without a gang."""

    def __init__(self, models: tuple[Path, Path], verification: str = "coupled") -> None:
        checkpoint = open_checkpoint(str(models[0]))
        self.spec = spec_from_config(checkpoint.config)
        target = Target(checkpoint, self.spec, checkpoint.source.fingerprint(), None)
        ladder = TWO.format(draft=models[1], at="driver")
        wish = Wish(ladder=ladder, verification=verification, dtype="float32", device="cpu", block_size=4, tensor_parallel_size=2)
        rule = Maximal if verification == "maximal" else Coupled

        def make_rule(sampler: Sampler) -> Rule:
            return rule(sampler)

        self.draft = DriverDraft(make_plan(target, wish, {}), self.spec.vocab_size, make_rule, torch.device("cpu"))

    def add(self, seq_id: int, prompt: list[int], params: SamplingParams = SEEDED) -> None:
        self.draft.add(SeqSetup(seq_id, params, 5 + seq_id, 0, prompt, [], []))

    def begin(self, **blocks: list[int]) -> None:
        self.draft.begin([SeqStep(int(name[1:]), [0], 0, own, 0, sample=True) for name, own in blocks.items()])

    def ask(self, *seq_ids: int, count: int = 3) -> Answer:
        return self.draft.answer(Ask(0, [Asked(seq_id, [], count, [count], 0) for seq_id in seq_ids]))

    def ids(self, *seq_ids: int, count: int = 3) -> list[list[int]]:
        answer = self.ask(*seq_ids, count=count)
        assert answer.failure is None
        return [proposed.ids for proposed in answer.wants]


def test_blocks_that_were_lent_to_drafts_may_be_anybodys(models: tuple[Path, Path]) -> None:
    """What a sequence has drafted behind its committed tokens lies in blocks that it gives back after the round. Those tokens may
    still come, in a round without the draft: their entries have to be made anew."""
    prompt = [5, 6, 7, 8, 9, 10, 11]
    alone, fresh = Alone(models, "maximal"), Alone(models, "maximal")
    alone.add(0, prompt)
    alone.begin(_0=[0, 1, 2])
    [drafted] = alone.ids(0, count=3)
    alone.draft.commit([SeqResult(0, drafted[:1])])  # 8 tokens, of which 7 have entries: block 2 goes back
    alone.begin(_0=[0, 1, 5])
    alone.draft.commit([SeqResult(0, drafted[1:])])
    alone.add(1, list(range(31, 41)))
    alone.begin(_0=[0, 1, 5, 6], _1=[2, 3, 4, 7])
    alone.ask(1)
    fresh.add(0, prompt)
    fresh.draft.commit([SeqResult(0, drafted)])
    fresh.begin(_0=[0, 1, 2, 3])
    found, expected = (
        torch.frombuffer(bytearray(each.ask(0).wants[0].laws[0] or b""), dtype=torch.float32) for each in (alone, fresh)
    )
    torch.testing.assert_close(found, expected)


def test_a_failure_is_told_once(models: tuple[Path, Path]) -> None:
    """Where a rank died in the same round nobody asks for it: a later round's mistake is another's."""
    alone = Alone(models)
    alone.add(0, [1, 2, 3])
    alone.begin(_0=[0])
    assert "use at=ranks" in (alone.ask(7).failure or "")
    alone.begin(_0=[0])
    assert alone.draft.failed() is None


# The relay.


class Loop:
    """Links of two ranks to a draft, without sockets. What crosses is encoded."""

    def __init__(self, draft: DriverDraft) -> None:
        self.draft = draft
        self.asked: list[Ask] = []
        self._inboxes: tuple[deque[bytes], deque[bytes]] = deque(), deque()

    def link(self, rank: int) -> Any:
        return SimpleNamespace(send=self._send, receive=lambda: decode(self._inboxes[rank].popleft()))

    def _send(self, message: Message) -> None:
        ask = decode(encode(message))
        assert isinstance(ask, Ask)
        self.asked.append(ask)
        data = encode(self.draft.answer(ask))
        for inbox in self._inboxes:
            inbox.append(data)


def shared(loop: Loop, counts: list[int], prompts: dict[int, list[int]]) -> list[list[Want]]:
    """What each of two ranks learns."""
    found = []
    for rank in range(2):
        sampler = Sampler(VOCAB)
        wants = []
        for (seq_id, prompt), count in zip(prompts.items(), counts, strict=True):
            sampler.add(seq_id, SEEDED, seed=5 + seq_id, sample_index=0, prompt_ids=prompt, eos_ids=[])
            path = Tokens(seq_id, list(prompt), len(prompt), [], len(prompt))
            wants.append(Want(Climber(path, [count]), count, len(prompt)))
        relay = DriverRelay(loop.link(rank), leads=rank == 0, sampler=sampler, device=torch.device("cpu"), laws=True)
        relay.share(Climb([], Maximal(sampler), logit_rows=1), 0, wants, counts)
        assert all(sampler.rounds(seq_id) > 0 for seq_id in prompts)
        found.append(wants)
    return found


def test_laws_come_in_messages_that_are_sent(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: as many at a time as a message takes, of whole sequences."""
    prompts = {seq_id: [seq_id + 1, 2, 3, 4] for seq_id in range(4)}
    counts, outcomes = [3, 3, 2, 3], []
    for most_rows in (100, 6, 1):
        alone = Alone(models, "maximal")
        for seq_id, prompt in prompts.items():
            alone.add(seq_id, prompt)
        alone.begin(**{f"_{seq_id}": [2 * seq_id, 2 * seq_id + 1] for seq_id in prompts})
        monkeypatch.setattr(drafting, "MOST_LAW_BYTES", most_rows * VOCAB * 4)
        loop = Loop(alone.draft)
        first, second = shared(loop, counts, prompts)
        assert [len(ask.wants) for ask in loop.asked] == {100: [4], 6: [2, 2], 1: [1, 1, 1, 1]}[most_rows]
        for mine, other in zip(first, second, strict=True):
            assert mine.climber.path.ids == other.climber.path.ids
            assert len(mine.laws) == mine.count and all(map(torch.equal, mine.laws, other.laws))  # type: ignore[arg-type]
        outcomes.append([want.climber.path.ids for want in first])
    assert outcomes[0] == outcomes[1] == outcomes[2]


class Told:
    """`Decisions` of two ranks, the first of which speaks before the second listens."""

    def __init__(self, said: deque[Any], *, leads: bool) -> None:
        self.leads, self._said = leads, said

    def share(self, numbers: Sequence[int]) -> list[int]:
        if self.leads:
            self._said.append(list(numbers))
        told = numbers if self.leads else self._said.popleft()
        assert len(told) == len(numbers)
        return list(told)

    def share_tensor(self, x: torch.Tensor) -> torch.Tensor:
        if self.leads:
            self._said.append(x.clone())
            return x
        told = self._said.popleft()
        assert (told.shape, told.dtype) == (x.shape, x.dtype)
        return told  # type: ignore[no-any-return]


def test_the_first_rank_tells_laws_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokens are certain, one sequence has fewer than were asked for, and one has none."""
    monkeypatch.setattr(relay_module, "LOGIT_ELEMENTS", 2 * VOCAB)
    laws = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    given: list[tuple[list[int], list[torch.Tensor | None]]] = [
        ([5, 6, 7], [laws[0], None, laws[1]]),
        ([8], [laws[2]]),
        ([], []),
        ([9, 10, 11], [laws[3], laws[4], laws[5]]),
        ([12, 13], []),
    ]
    said: deque[Any] = deque()
    for leads in (True, False):
        sampler, wants = Sampler(VOCAB), []
        for seq_id, (ids, own) in enumerate(given):
            sampler.add(seq_id, SEEDED, seed=1, sample_index=0, prompt_ids=[1], eos_ids=[])
            want = Want(Climber(Tokens(seq_id, [1], 1, [], 1), [3]), 3, 1)
            if leads:
                sampler.resume_rounds(seq_id, 40 + seq_id)
                want.climber.path.ids += ids
                want.laws += own
            wants.append(want)
        relay_module.FirstRelay(Told(said, leads=leads), sampler, torch.device("cpu")).share(
            Climb([], Maximal(sampler), logit_rows=1), 0, wants, [3] * len(given)
        )
        for seq_id, (want, (ids, own)) in enumerate(zip(wants, given, strict=True)):
            assert want.climber.path.ids == [1, *ids] and sampler.rounds(seq_id) == 40 + seq_id
            assert len(want.laws) == len(own)
            for mine, theirs in zip(want.laws, own, strict=True):
                assert (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs))  # type: ignore[arg-type]
    assert not said


LAW = bytes(4 * VOCAB)


@pytest.mark.parametrize(
    ("proposed", "passes", "words"),
    [
        ([], [], "0 sequences"),
        ([Proposed([1, 2, 3, 4], [], 0, {})], [], "4 tokens"),
        ([Proposed([1, VOCAB], [], 0, {})], [], "token 101"),
        ([Proposed([1, -1], [], 0, {})], [], "token -1"),
        ([Proposed([1, 2], [LAW, LAW[:-1]], 0, {})], [], "law of 403 bytes"),
        ([Proposed([1, 2], [LAW] * 3, 0, {})], [], "3 laws"),
        ([Proposed([1], [LAW], 0, {"draft": RungCounts()})], [[0.0, 1.0]], "pass"),
    ],
)
def test_answers_that_are_none(proposed: list[Proposed], passes: list[list[float]], words: str) -> None:
    sampler = Sampler(VOCAB)
    sampler.add(0, SEEDED, seed=1, sample_index=0, prompt_ids=[1], eos_ids=[])
    answer = decode(encode(Answer(proposed, passes, [], None)))
    link: Any = SimpleNamespace(send=lambda _: None, receive=lambda: answer)
    relay = DriverRelay(link, leads=True, sampler=sampler, device=torch.device("cpu"), laws=True)
    want = Want(Climber(Tokens(0, [1], 1, [], 1), [3]), 3, 1)
    with pytest.raises(WireError, match=words):
        relay.share(Climb([], Maximal(sampler), logit_rows=1), 0, [want], [3])
    assert want.climber.path.ids == [1] and not want.laws


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (Ask(0, [Asked(7, [], 1, [1], 0)]), "sequence 7"),
        (Ask(1, [Asked(0, [], 1, [1], 0)]), "rung 1"),
        (Ask(0, [Asked(0, [], 1, [], 0)]), "gammas"),
        (Ask(0, [Asked(0, [], 1 << 40, [3], 0)]), "1099511627776 tokens"),
        (Ask(0, [Asked(0, [VOCAB], 1, [3], 0)]), "token 101"),
    ],
)
def test_questions_that_are_none(models: tuple[Path, Path], ask: Ask, words: str) -> None:
    """Each is one sentence, and the next question is answered as if nothing had been."""
    alone = Alone(models)
    alone.add(0, [1, 2, 3])
    alone.begin(_0=[0, 1])
    answer = alone.draft.answer(decode(encode(ask)))  # type: ignore[arg-type]
    assert answer.failure is not None and words in answer.failure
    assert len(alone.ids(0)[0]) == 3


def test_only_rank_0_asks() -> None:
    """Another's question would be answered to all of them."""
    gang = SimpleNamespace(_draft=lambda _: None, _serial=1)
    link = SimpleNamespace(receive=lambda: Ask(0, []))
    with pytest.raises(gang_module.RankFailure, match="rank 1 asked for a draft"):
        Gang._message(gang, 1, link)  # type: ignore[arg-type]


# What is asked for beside tokens.


@pytest.mark.parametrize("at", ["first", "driver"])
def test_reports_are_of_the_target(launcher: WarmLauncher, models: tuple[Path, Path], at: str) -> None:
    """Log-probabilities, penalties and minimum lengths at drafted positions, wherever they were drafted."""
    how = {"max_tokens": 16, "detokenize": False, "seed": 9, "temperature": 0.9}
    params = [
        SamplingParams(logprobs=3, presence_penalty=0.7, frequency_penalty=0.4, **how),  # type: ignore[arg-type]
        SamplingParams(logprobs=1, stop_token_ids=list(range(50)), min_tokens=9, **how),  # type: ignore[arg-type]
        SamplingParams(prompt_logprobs=1, logit_bias={7: 3.0}, bad_words=None, top_k=20, top_p=0.9, **how),  # type: ignore[arg-type]
    ]
    params.append(replace(params[0], max_tokens=1))
    prompts = [*PROMPTS, PROMPTS[2]]
    plain = LLM(models[0], dtype="float32", ladder="plain").generate(prompts, params)
    with gang(launcher, models, FOUR, at) as llm:
        found = llm.generate(prompts, params)
    assert any(output.metrics.acceptance.get("draft") for output in found)
    for mine, theirs in zip(found, plain, strict=True):
        [sample], [expected] = mine.outputs, theirs.outputs
        assert (sample.token_ids, sample.finish_reason) == (expected.token_ids, expected.finish_reason)
        for one, other in zip(sample.logprobs or [], expected.logprobs or [], strict=True):
            assert one.keys() == other.keys()
            assert all(one[token].logprob == pytest.approx(other[token].logprob, abs=1e-4) for token in one)


@pytest.mark.parametrize("last", ["self:lm=hire", "self:mlp=0.5,by=q4"])
def test_a_last_rung_that_chooses_rows(launcher: WarmLauncher, models: tuple[Path, Path], last: str) -> None:
    """Its certificate, or choice, is of each position, whoever has drafted it."""
    found = {}
    for at in ("ranks", "first", "driver"):
        ladder = DRIVER.replace("driver", at).replace("plain", last)
        with gang(launcher, models, ladder, at, mode="approximate") as llm:
            outputs = llm.generate(PROMPTS, PARAMS)
        found[at] = tokens(outputs)
        assert any(output.metrics.acceptance.get("draft") for output in outputs)
    assert found["ranks"] == found["first"] == found["driver"]


def test_memory_or_numbers_of_one_rank(launcher: WarmLauncher, models: tuple[Path, Path]) -> None:
    """The first rank runs out of memory where the others wait for its draft: one error, and the gang begins anew."""
    for at in ("first", "driver"):
        launcher.faults = [{0: "starve@3"}]
        with gang(launcher, models, TWO, at) as llm:
            with pytest.raises(UserError, match="as was asked for"):
                llm.generate(PROMPTS, PARAMS)
            assert len(tokens(llm.generate(PROMPTS, PARAMS))) == 3
            assert executor(llm).failures == 0

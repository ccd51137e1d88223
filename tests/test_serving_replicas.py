"""The ingress of a Ray Serve application, without Ray: replicas that are lost, and what clients see of it."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rowcast import SamplingParams
from rowcast.errors import UserError
from rowcast.runtime.llm import LLM
from rowcast.serving import ray_link, ray_session
from rowcast.serving.backend import Ask, Backend, ModelCard, Piece, ServingError, State, Usage, engine_failed
from rowcast.serving.ray_arguments import Arguments, app_settings
from rowcast.serving.ray_backend import IngressSettings, RayBackend, _Job
from rowcast.serving.ray_live import together
from rowcast.serving.ray_session import Command, Hello, Session
from rowcast.serving.replay import Diverged, HandedOut
from rowcast.serving.routing import Router

WAIT_S = 60.0


def output(seed: int, sample: int, length: int) -> tuple[list[int], str]:
    """What a model gives: so many tokens, and a text that is no function of single tokens."""
    chance = random.Random(f"{seed} {sample}")
    ids = [chance.randrange(100) for _ in range(length)]
    return ids, "".join(chance.choice("abcdefgh ") * (token % 3) for token in ids)


def cut(seed: int, samples: int, length: int, chance: random.Random) -> list[Piece]:
    """The same output in pieces as chance will have them; text lags behind the tokens."""
    pieces: list[Piece] = []
    left = {sample: (*output(seed, sample, length), 0) for sample in range(samples)}
    while left:
        sample = chance.choice(list(left))
        ids, text, done = left[sample]
        count = min(chance.randint(1, 4), len(ids))
        shown = text if count == len(ids) else text[: chance.randint(0, len(text))]
        left[sample] = (ids[count:], text[len(shown) :], done + count)
        ends = count == len(ids)
        if ends:
            del left[sample]
        pieces.append(
            Piece(
                sample,
                shown,
                ids[:count],
                finish_reason="length" if ends else None,
                prompt_token_ids=None if pieces else [1],
                usage=None if left else Usage(1, 0, length * samples),
            )
        )
    return pieces


def test_any_cut_of_a_second_run_goes_on_where_the_first_was() -> None:
    chance = random.Random(3)
    for trial in range(200):
        samples, length, out = 1 + trial % 3, 1 + trial % 17, HandedOut()
        seen: list[Piece] = []
        for run in range(3):
            pieces = cut(trial, samples, length, chance)
            if run < 2:
                pieces = pieces[: chance.randrange(len(pieces))]
            out.again()
            seen += [new for piece in pieces if (new := out.new(piece)) is not None]
        for sample in range(samples):
            mine = [piece for piece in seen if piece.index == sample]
            ids, text = output(trial, sample, length)
            assert [token for piece in mine for token in piece.token_ids] == ids
            assert "".join(piece.text for piece in mine) == text
        assert sum(piece.prompt_token_ids is not None for piece in seen) == 1
        assert seen[-1].usage is not None and sum(piece.usage is not None for piece in seen) == 1


def test_another_stream_is_not_mixed_in() -> None:
    out = HandedOut()
    out.new(Piece(0, "ab", [1, 2]))
    out.again()
    assert out.new(Piece(0, "a", [1])) is None
    with pytest.raises(Diverged):
        out.new(Piece(0, "c", [3]))
    out.again()
    with pytest.raises(Diverged):
        out.new(Piece(0, "a", [1], finish_reason="stop"))


def test_a_sample_ends_once() -> None:
    out = HandedOut()
    for index in (0, 1):
        out.new(Piece(index, "a", [1], finish_reason="stop" if index == 0 else None, stop_reason=7))
    out.again()
    assert out.new(Piece(1, "ab", [1, 2], finish_reason="length")) == Piece(1, "b", [2], finish_reason="length")
    last = Piece(0, "a", [1], finish_reason="stop", stop_reason=7, usage=Usage(1, 0, 3))
    assert out.new(last) == Piece(0, "", [], usage=last.usage)


def test_answers_that_have_ended_hold_no_place_on_a_replica() -> None:
    """Others get it, though the request's last answer goes on. Whatever comes twice or is moved, nothing is given back twice."""
    ask = Ask("r", [1], SamplingParams(n=3, temperature=1, seed=1), "")
    taken: Any = SimpleNamespace(cancelled=False, give=lambda _: None, arrived_s=0.0, alarm=None)
    backend: Any = SimpleNamespace(
        _loads=[0, 3], _queue=SimpleNamespace(generated=lambda *_: None), server_metrics=SimpleNamespace(observe=lambda *_: None)
    )
    link: Any = SimpleNamespace(number=1)
    job = _Job(1, ask, taken, SimpleNamespace(), None, link=link, places=3)  # type: ignore[arg-type]
    for sample, left in ((0, 2), (2, 1)):
        RayBackend._gained(backend, job, Piece(sample, "x", [5]))
        assert backend._loads == [0, left + 1]
        RayBackend._gained(backend, job, Piece(sample, "y", [6], finish_reason="length"))
        assert backend._loads == [0, left]
    RayBackend._leave(backend, job)
    assert backend._loads == [0, 0]


def test_who_has_the_beginning_runs_it_unless_it_is_busy() -> None:
    router, long = Router(), list(range(300))
    assert router.choose(long, {0: 3, 1: 0}) == 1
    assert router.choose([*long, 5], {0: 0, 1: 4}) == 1
    assert router.choose(long[:130] + [7] * 90, {0: 0, 1: 4}) == 1
    assert router.choose(long, {0: 0, 1: 5}) == 0  # and is from now on
    assert router.choose(long, {0: 4, 1: 0}) == 0
    assert router.choose([9] * 300, {0: 1, 1: 0}) == 1
    router.forget(0)
    assert router.choose(long, {0: 2, 1: 0}) == 1
    assert router.choose("to be or not " * 40, {0: 1, 1: 0}) == 1
    assert router.choose("to be or not " * 50, {0: 0, 1: 2}) == 1


class Model(Backend):
    """Gives `output`, a token or some at a time, as fast as `pace` lets it."""

    def __init__(self, number: int, pace: Callable[[], Awaitable[None]]) -> None:
        self._pace = pace
        self.running: list[Ask] = []
        self.ran: list[Ask] = []
        self.now: State = "ready"
        self.number = number

    @property
    def card(self) -> ModelCard:
        return ModelCard("tiny", 0, 100, 100, "plain", "exact")

    @property
    def tokenizer(self) -> Any:
        raise UserError("it has none")

    def state(self) -> tuple[State, str]:
        return self.now, ""

    async def submit(self, ask: Ask) -> AsyncIterator[Piece]:
        if ask.prompt == [99]:
            raise UserError("prompt token id 99 is outside")
        return self._run(ask)

    async def _run(self, ask: Ask) -> AsyncIterator[Piece]:
        self.running.append(ask)
        self.ran.append(ask)
        try:
            assert ask.params.seed is not None and ask.params.max_tokens is not None
            for piece in cut(ask.params.seed, ask.params.n, ask.params.max_tokens, random.Random()):
                await self._pace()
                if ask.prompt == [98]:
                    raise engine_failed("it ended")
                yield piece
        finally:
            self.running.remove(ask)

    async def live(self) -> dict[str, Any]:
        return {
            "state": "ready",
            "tokens": 5,
            "memory": [{"device": "cpu"}],
            "failures": {"ranks": 1},
            "kv": {"block_tokens": 16},
        }

    async def metrics(self) -> bytes:
        return b""

    async def drain(self, timeout_s: float) -> bool:
        return True


class Handle:
    """A deployment of one replica as Ray Serve shows it: `kill` ends it, `start` makes it anew."""

    def __init__(self, number: int, slots: int = 4) -> None:
        self.number, self.slots = number, slots
        self.steps = asyncio.Semaphore(0)
        self.free = True
        self.model = Model(number, self._step)
        self.killed = asyncio.Event()
        self.up = asyncio.Event()
        self.silent = False
        self.sessions: dict[str, Session] = {}
        self.start()

    async def _step(self) -> None:
        if self.free:
            await asyncio.sleep(0)
        else:
            await self.steps.acquire()

    def start(self) -> None:
        self.model = Model(self.number, self._step)
        self.sessions, self.killed = {}, asyncio.Event()
        self.up.set()

    def kill(self) -> None:
        self.up.clear()
        self.killed.set()

    def options(self, *, method_name: str, stream: bool = False) -> Any:
        return type("Method", (), {"remote": staticmethod(getattr(self, f"{'_stream' if stream else '_call'}_{method_name}"))})

    def _stream_attach(self, name: str) -> Any:
        return Stream(self._attach(name))

    async def _attach(self, name: str) -> AsyncIterator[Any]:
        await self.up.wait()
        killed = asyncio.ensure_future(self.killed.wait())
        session = self.sessions[name] = Session(self.model)
        try:
            yield Hello(self.model.card, self.slots, 0)
            while True:
                batch = asyncio.ensure_future(session.next())
                await asyncio.wait({batch, killed}, return_when=asyncio.FIRST_COMPLETED)
                if killed.done():
                    batch.cancel()
                    raise RuntimeError("The actor died unexpectedly")
                if self.silent:
                    await killed
                yield batch.result()
        finally:
            killed.cancel()
            await session.close()

    async def _call_obey(self, name: str, commands: list[Command]) -> bool:
        await self.up.wait()
        session = self.sessions.get(name)
        if session is not None:
            session.obey(commands)
        return session is not None

    async def _call_describe(self) -> str:
        return "it has none"

    async def _call_live(self) -> dict[str, Any]:
        return await self.model.live()


class Stream:
    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._closing: asyncio.Task[None] | None = None

    def __anext__(self) -> Any:
        return self._inner.__anext__()

    def cancel(self) -> None:
        self._closing = asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        await self._inner.aclose()


class Case:
    """Two replicas and their ingress."""

    def __init__(self, **settings: Any) -> None:
        self.handles = [Handle(0), Handle(1)]
        self.backend = RayBackend(self.handles, IngressSettings(**settings))

    async def __aenter__(self) -> Case:
        await self.backend.start()
        await self.until(lambda: all(link.ready for link in self.backend._links))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.backend.drain(0)

    async def until(self, done: Callable[[], bool]) -> None:
        async def wait() -> None:
            while not done():
                await asyncio.sleep(0.001)

        await asyncio.wait_for(wait(), WAIT_S)

    def ask(self, seed: int = 0, length: int = 12, **more: Any) -> Ask:
        params = SamplingParams(seed=seed, max_tokens=length, n=more.pop("n", 1))
        return Ask(f"{seed}", more.pop("prompt", [seed]), params, **more)

    async def answer(self, ask: Ask) -> list[tuple[list[int], str]]:
        """By sample. Raises what the stream raises."""
        found: list[tuple[list[int], str]] = [([], "") for _ in range(ask.params.n)]
        usages = 0
        async for piece in await self.backend.submit(ask):
            ids, text = found[piece.index]
            found[piece.index] = (ids + piece.token_ids, text + piece.text)
            usages += piece.usage is not None
        assert usages == 1
        return found


def expected(ask: Ask) -> list[tuple[list[int], str]]:
    assert ask.params.seed is not None and ask.params.max_tokens is not None
    return [output(ask.params.seed, sample, ask.params.max_tokens) for sample in range(ask.params.n)]


def run(case: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(case(), WAIT_S)

    asyncio.run(limited())


def test_a_lost_replicas_streams_go_on() -> None:
    async def case() -> None:
        async with Case() as two:
            asks = [two.ask(seed, 5 + seed, n=1 + seed % 2) for seed in range(20)]
            for handle in two.handles:
                handle.free = False
            answers = [asyncio.ensure_future(two.answer(ask)) for ask in asks]
            await two.until(lambda: len(two.handles[0].model.running) >= 2)
            for _ in range(6):
                two.handles[0].steps.release()
            first = two.backend._links[0]
            await two.until(lambda: any(job.link is first and job.handed_out.tokens for job in two.backend._jobs.values()))
            two.handles[0].kill()
            await two.until(lambda: not two.backend._links[0].ready)
            assert two.backend.state() == ("ready", "")
            two.handles[1].free = True
            for _ in range(100):
                two.handles[1].steps.release()
            assert await asyncio.gather(*answers) == [expected(ask) for ask in asks]
            two.handles[0].free = True
            two.handles[0].start()
            await two.until(lambda: two.backend._links[0].ready)
            assert await two.answer(two.ask(77)) == expected(two.ask(77))
            live = await two.backend.live()
            assert live["failures"] == {"ranks": 2, "replicas": 1} and live["requests"]["moved"] >= 2
            assert live["tokens"] == 10 and [each["up"] for each in live["replicas"]] == [True, True]
            assert b"rowcast_server_finished_total 21.0" in await two.backend.metrics()

    run(case)


def test_without_any_replica_requests_wait() -> None:
    async def case() -> None:
        async with Case() as two:
            for handle in two.handles:
                handle.kill()
            await two.until(lambda: two.backend.state()[0] == "recovering")
            waiting = asyncio.ensure_future(two.answer(two.ask(3)))
            late = asyncio.ensure_future(two.answer(two.ask(4, deadline_s=0.01)))
            with pytest.raises(ServingError, match=r"deadline of 0\.01 s"):
                await late
            two.handles[1].start()
            assert await waiting == expected(two.ask(3))

    run(case)


def test_a_call_that_ends_as_cancelled_is_made_anew() -> None:
    """Ray raises CancelledError for what was cancelled elsewhere."""

    async def case() -> None:
        async with Case() as two:
            link, attach = two.backend._links[0], two.handles[0]._stream_attach
            cancelled = asyncio.Event()

            async def end() -> AsyncIterator[Any]:
                cancelled.set()
                raise asyncio.CancelledError
                yield

            two.handles[0]._stream_attach = lambda name: attach(name) if cancelled.is_set() else Stream(end())  # type: ignore[method-assign]
            two.handles[0].kill()
            await two.until(cancelled.is_set)
            two.handles[0].start()
            await two.until(lambda: link.ready)

    run(case)


def test_a_replica_that_says_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_link, "SILENCE_S", 2 * ray_session.BEAT_S)

    async def case() -> None:
        async with Case() as two:
            two.handles[0].silent = True
            asks = [two.ask(seed) for seed in range(4)]
            assert await asyncio.gather(*map(two.answer, asks)) == [expected(ask) for ask in asks]
            assert two.backend._counts["moved"] >= 2

    run(case)


def test_an_ingress_that_says_nothing_is_forgotten() -> None:
    async def case() -> None:
        now = 0.0
        session = Session(Model(0, lambda: asyncio.sleep(3600)), clock=lambda: now)
        session.obey([Command(1, Ask("1", [1], SamplingParams(seed=1)))])
        session.obey([Command(1, Ask("1", [1], SamplingParams(seed=1)))])
        assert session.running == 1
        now = ray_session.SILENCE_S
        assert not session.lapsed
        now += 1
        assert session.lapsed
        await session.close()
        assert session.running == 0

    run(case)


def test_a_request_that_ends_every_replica_ends_itself() -> None:
    async def case() -> None:
        async with Case() as two:
            with pytest.raises(ServingError, match="failed 3 times, the last time as it ended"):
                await two.answer(two.ask(1, prompt=[98]))
            assert sum(len(handle.model.ran) for handle in two.handles) == 3
            with pytest.raises(UserError, match="token id 99"):
                await two.backend.submit(two.ask(1, prompt=[99]))
            assert await two.answer(two.ask(2)) == expected(two.ask(2))

    run(case)


def test_the_queue_is_the_ingresss_and_has_an_end() -> None:
    async def case() -> None:
        async with Case(max_waiting=3) as two:
            for handle in two.handles:
                handle.free = False
            asks = [two.ask(seed, client="many") for seed in range(8)] + [two.ask(8, client="few")]
            answers = [asyncio.ensure_future(two.answer(ask)) for ask in asks]
            await two.until(lambda: sum(len(handle.model.running) for handle in two.handles) == 8)
            answers += [asyncio.ensure_future(two.answer(two.ask(seed, client="many"))) for seed in (9, 10)]
            await two.until(lambda: len(two.backend._queue) == 3)
            with pytest.raises(ServingError, match="3 requests wait already") as full:
                await two.backend.submit(two.ask(11))
            assert full.value.status == 429 and full.value.retry_after_s
            answers[-1].cancel()  # it waits still
            await two.until(lambda: len(two.backend._queue) == 2)
            answers[0].cancel()  # it runs
            await two.until(lambda: len(two.backend._queue) == 1)
            await two.until(lambda: two.handles[0].model.ran[-1].client == "few" or two.handles[1].model.ran[-1].client == "few")
            for handle in two.handles:
                handle.free = True
                handle.steps.release()
                for _ in range(100):
                    handle.steps.release()
            done = await asyncio.gather(*answers[1:-1])
            assert done == [expected(two.ask(seed)) for seed in range(1, 10)]

    run(case)


def test_a_reader_that_goes_leaves_the_replica() -> None:
    async def case() -> None:
        async with Case() as two:
            for handle in two.handles:
                handle.free = False
            pieces = await two.backend.submit(two.ask(5))
            model = two.handles[0].model
            await two.until(lambda: len(model.running) == 1)
            await pieces.aclose()  # type: ignore[attr-defined]
            await two.until(lambda: not model.running)
            assert two.backend._loads == [0, 0] and not two.backend._jobs

    run(case)


def test_arguments_as_text_and_as_values() -> None:
    told = Arguments.parse(
        {"model": "/models/opt-125m/", "replicas": "3", "density": "0.25", "eager": "true", "gpu_memory": "4GiB"}
    )
    assert told == Arguments.parse(
        {"model": "/models/opt-125m/", "replicas": 3, "density": 0.25, "eager": True, "gpu_memory": "4GiB"}
    )
    assert told.name == "opt-125m"
    assert told.for_llm() == {"model": "/models/opt-125m/", "density": 0.25, "eager": True, "gpu_memory": "4GiB"}
    for wrong, sentence in (
        ({"model": "m", "replica": 2}, "replica is unknown, did you mean replicas"),
        ({}, "model is missing"),
        ({"model": "m", "replicas": "two"}, "replicas='two' has to be a whole number"),
        ({"model": "m", "replicas": 0}, "replicas=0 has to be from 1"),
        ({"model": "m", "eager": "perhaps"}, "eager='perhaps' has to be true or false"),
        ({"model": "m", "cpus": -1}, "cpus=-1"),
        ({"model": ""}, "model='' has to be a text"),
    ):
        with pytest.raises(UserError, match=sentence):
            Arguments.parse(wrong)
    with pytest.raises(UserError, match="give API keys"):
        app_settings(told, "0.0.0.0")
    assert app_settings(told, "127.0.0.1").api_keys == ()


def test_the_documented_config_file() -> None:
    yaml = pytest.importorskip("yaml")
    text = (Path(__file__).parents[1] / "docs/serving.md").read_text()
    [config] = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    [app] = yaml.safe_load(config)["applications"]
    assert Arguments.parse(app["args"]).tensor_parallel_size == 4
    module, name = app["import_path"].split(":")
    assert f"def {name}(" in (Path(__file__).parents[1] / f"{module.replace('.', '/')}.py").read_text()


def test_all_of_a_models_arguments_can_be_given() -> None:
    import inspect

    theirs = set(inspect.signature(LLM.__init__).parameters) - {"self", "progress", "model", "tensor_parallel_size", "seed"}
    mine = set(Arguments.__dataclass_fields__)
    assert theirs <= mine, theirs - mine


def test_nobody_answers_for_nothing() -> None:
    shown = together({"state": "recovering"}, {}, [None, None], 3)
    assert shown["state"] == "recovering" and shown["tokens"] == 0
    assert [each["up"] for each in shown["replicas"]] == [False, False]

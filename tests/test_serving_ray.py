"""The Ray Serve application: one local cluster, two replicas of a tiny model, and OpenAI's own client."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from tiny import VOCAB, tiny_model

from rowcast import LLM, SamplingParams

ray: Any = pytest.importorskip("ray")
serve: Any = pytest.importorskip("ray.serve")

from rowcast.serving.ray_app import build  # noqa: E402

WAIT_S = 120.0
LENGTH = 40
LADDER = "ngram / plain"


@dataclass(frozen=True)
class Served:
    url: str
    model: Path


def words(model: Path) -> None:
    """A tokenizer that has a word for each id."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(model)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = tmp_path_factory.mktemp("llama")
    tiny_model("llama-gqa", model)
    words(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=4, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        given = {"model": str(model), "replicas": "2", "ladder": LADDER, "served_model_name": "tiny", "max_num_seqs": "32"}
        serve.run(build(given), name="rowcast")
        yield Served(f"http://127.0.0.1:{port}", model)
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as made:
        yield made


def live(served: Served) -> dict[str, Any]:
    found: dict[str, Any] = httpx2.get(f"{served.url}/live", timeout=WAIT_S).json()
    return found


def until(done: Callable[[], bool]) -> bool:
    end = time.monotonic() + WAIT_S
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


async def read(
    asking: openai.AsyncOpenAI, prompt: list[int], params: SamplingParams, begun: Callable[[], None]
) -> dict[int, tuple[str, str | None]]:
    """A stream's text and finish reason by choice."""
    stream = await asking.completions.create(
        model="tiny", prompt=prompt, stream=True, n=params.n, seed=params.seed, temperature=params.temperature, max_tokens=LENGTH,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    found: dict[int, tuple[str, str | None]] = {}
    async for chunk in stream:
        for choice in chunk.choices:
            text, reason = found.get(choice.index, ("", None))
            assert reason is None, "nothing comes after the end"
            found[choice.index] = (text + choice.text, choice.finish_reason)
        begun()
    return found


def test_a_replica_is_killed_under_load_and_nothing_is_lost(served: Served) -> None:
    prompts = [[(7 * i + j * j) % VOCAB for j in range(4 + i % 17)] for i in range(40)]
    params = [
        SamplingParams(temperature=0.8 * (i % 2), n=1 + (i % 4 == 1), seed=i, max_tokens=LENGTH, ignore_eos=True)
        for i in range(len(prompts))
    ]
    offline = LLM(served.model, ladder=LADDER).generate(prompts, params)
    expected = [{sample.index: (sample.text, sample.finish_reason) for sample in output.outputs} for output in offline]
    before = live(served)["replicas"]
    assert [each["up"] for each in before] == [True, True]

    async def all_at_once() -> list[dict[int, tuple[str, str | None]]]:
        begun, killed = set(), False

        def note(number: int) -> Callable[[], None]:
            def one_has_begun() -> None:
                nonlocal killed
                begun.add(number)
                if len(begun) >= 8 and not killed:
                    killed = True
                    os.kill(before[0]["pid"], signal.SIGKILL)

            return one_has_begun

        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as asking:
            streams = [read(asking, prompts[i], params[i], note(i)) for i in range(len(prompts))]
            found = await asyncio.gather(*streams)
        assert killed
        return list(found)

    assert asyncio.run(all_at_once()) == expected
    after = live(served)
    assert after["failures"]["replicas"] == 1 and after["requests"]["moved"] > 0 and after["requests"]["lost"] == 0
    assert httpx2.get(f"{served.url}/ready").status_code == 200  # by the other one, if need be
    assert until(lambda: all(each["up"] for each in live(served)["replicas"]))
    assert live(served)["replicas"][0]["pid"] != before[0]["pid"]


def test_a_cancelled_stream_leaves_its_engine(served: Served, client: openai.OpenAI) -> None:
    def running() -> int:
        return sum(each["requests"]["running"] for each in live(served)["replicas"])

    cancelled = live(served)["requests"]["cancelled"]
    streams = [
        client.completions.create(model="tiny", prompt=[i, 5], stream=True, max_tokens=LENGTH, extra_body={"ignore_eos": True})
        for i in range(2)
    ]
    for stream in streams:
        next(iter(stream))
        stream.close()
    assert until(lambda: live(served)["requests"]["cancelled"] + live(served)["requests"]["finished"] >= cancelled + 2)
    assert until(lambda: running() == 0)


def test_errors_are_openais(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="another", prompt=[1])
    assert unknown.value.code == "model_not_found"
    for wrong in ({"prompt": [VOCAB]}, {"prompt": [1] * 500}, {"prompt": [1], "temperature": -1.0}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", **wrong)
    [choice] = client.completions.create(model="tiny", prompt=[1, 2], max_tokens=3, extra_body={"ignore_eos": True}).choices
    assert choice.finish_reason == "length"
    assert client.models.list().data[0].id == "tiny"
    assert "rowcast_server_finished_total" in httpx2.get(f"{served.url}/metrics").text

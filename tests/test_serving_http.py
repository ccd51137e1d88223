"""OpenAI's own client against the server: every answer is what the model gives offline, every mistake is a sentence."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from http_serving import CONTEXT, NAME, WAIT_S, Served
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from rowcast import LLM, CompletionOutput, OutOfMemoryError, SamplingParams, UserError, __version__
from rowcast.runtime.outputs import Logprob
from rowcast.serving import documents
from rowcast.serving.answers import token_bytes
from rowcast.serving.app import make_app
from rowcast.serving.backend import Ask, ModelCard, Piece, State, unavailable
from rowcast.serving.errors import as_api_error
from rowcast.serving.logs import MOST_LINES, Exchange, RequestLog
from rowcast.serving.security import ApiKey, AppSettings, is_loopback, read_api_keys

pytest_plugins = ["shared_engine"]

PROMPT = "Once upon a time"
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]
SECRET = "what a client said"
KEY, OTHER_KEY = "sk-0123456789abcdef", "sk-fedcba9876543210"
LONG: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "temperature": 0, "max_tokens": 900, "extra_body": {"ignore_eos": True}}

HTTP = httpx2.Client(timeout=WAIT_S, trust_env=False)


@pytest.fixture(scope="module")
def llm(offline_llm: LLM) -> LLM:
    return offline_llm


@pytest.fixture(scope="module")
def served(shared_engine: Served) -> Iterator[Served]:
    with shared_engine.at(AppSettings(log_requests=False)) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as made:
        yield made


def offline(llm: LLM, prompt: Any = PROMPT, **params: Any) -> list[CompletionOutput]:
    return llm.generate(prompt, SamplingParams(**params))[0].outputs


def post(served: Served, path: str, body: Any, **more: Any) -> httpx2.Response:
    return HTTP.post(f"{served.url}{path}", json=body, **more)


def test_models(client: OpenAI) -> None:
    [only] = client.models.list().data
    assert only.id == NAME and only.object == "model" and client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="'gpt-5' is not served here, tiny is") as caught:
        client.completions.create(model="gpt-5", prompt="x")
    assert (caught.value.code, caught.value.param, caught.value.type) == ("model_not_found", "model", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.models.retrieve("a/b")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_request_that_names_no_model(served: Served, path: str) -> None:
    """Gets the one that there is, under its name."""
    for given in ({}, {"model": None}):
        body = {**given, "max_tokens": 1, **({"messages": MESSAGES} if "chat" in path else {"prompt": "a"})}
        assert post(served, path, body).json()["model"] == NAME
        first = post(served, path, {**body, "stream": True}).text.partition("\n")[0]
        assert json.loads(first.removeprefix("data: "))["model"] == NAME


@pytest.mark.parametrize(
    ("given", "params"),
    [
        ({"temperature": 0}, {"temperature": 0}),
        ({"seed": 3}, {"seed": 3}),
        ({"seed": 4, "n": 3, "temperature": 0.7, "top_p": 0.9}, {"seed": 4, "n": 3, "temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0, "stop": ["q", "xyz"], "max_tokens": 200}, {"temperature": 0, "stop": ["q", "xyz"], "max_tokens": 200}),
        ({"temperature": 0, "logit_bias": {"40": 9.0}}, {"temperature": 0, "logit_bias": {40: 9.0}}),
        ({"seed": 5, "presence_penalty": 2, "frequency_penalty": -1}, {"seed": 5, "presence_penalty": 2.0, "frequency_penalty": -1}),
        (
            {"seed": 6, "extra_body": {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.3, "min_tokens": 5, "stop_token_ids": [9],
             "include_stop_str_in_output": True, "skip_special_tokens": False, "truncate_prompt_tokens": 4}},
            {"seed": 6, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.3, "min_tokens": 5, "stop_token_ids": [9],
             "include_stop_str_in_output": True, "skip_special_tokens": False, "truncate_prompt_tokens": 4},
        ),
    ],
)  # fmt: skip
def test_completions_are_what_the_model_gives_offline(
    client: OpenAI, llm: LLM, given: dict[str, Any], params: dict[str, Any]
) -> None:
    expected = offline(llm, **params)
    whole = client.completions.create(model=NAME, prompt=PROMPT, **given)
    assert [(c.index, c.text, c.finish_reason) for c in whole.choices] == [(o.index, o.text, o.finish_reason) for o in expected]
    assert [c.model_dump()["stop_reason"] for c in whole.choices] == [o.stop_reason for o in expected]
    texts = dict.fromkeys(range(len(expected)), "")
    for chunk in client.completions.create(model=NAME, prompt=PROMPT, stream=True, **given):
        [choice] = chunk.choices
        texts[choice.index] += choice.text
    assert list(texts.values()) == [o.text for o in expected]


def test_several_prompts_of_both_kinds(client: OpenAI, llm: LLM) -> None:
    prompts = ["abc", PROMPT, "def"]
    found = client.completions.create(model=NAME, prompt=prompts, n=2, seed=1, max_tokens=6)
    expected = [output.text for prompt in prompts for output in offline(llm, prompt, n=2, seed=1, max_tokens=6)]
    assert [c.text for c in found.choices] == expected and [c.index for c in found.choices] == list(range(6))
    assert found.usage is not None and found.usage.prompt_tokens == 22 and found.usage.completion_tokens <= 36
    assert [stats["seed"] for stats in found.model_dump()["rowcast"]] == [1, 1, 1]
    ids = [llm.tokenizer.encode(prompt) for prompt in prompts]
    chunks = list(client.completions.create(model=NAME, prompt=ids, n=2, seed=1, max_tokens=6, stream=True, echo=True))
    for index, text in enumerate(expected):
        echoed = "".join(c.choices[0].text for c in chunks if c.choices[0].index == index)
        assert echoed == prompts[index // 2] + text
    assert [offline(llm, ids[0], temperature=0)[0].text] == [
        c.text for c in client.completions.create(model=NAME, prompt=ids[0], temperature=0).choices
    ]


def test_chat_is_what_the_model_says_offline(client: OpenAI, llm: LLM) -> None:
    params = {"seed": 7, "max_tokens": 12, "n": 2}
    expected = llm.chat(MESSAGES, SamplingParams(**params))[0]  # type: ignore[arg-type]
    parts = [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": MESSAGES[1]["content"]}]}]
    for messages in (MESSAGES, parts):
        found = client.chat.completions.create(model=NAME, messages=messages, **params)  # type: ignore[call-overload]
        assert [c.message.content for c in found.choices] == [o.text for o in expected.outputs]
        assert [c.message.role for c in found.choices] == ["assistant"] * 2
    assert found.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert found.usage.completion_tokens == sum(len(o.token_ids) for o in expected.outputs)
    assert found.usage.prompt_tokens_details.cached_tokens >= 0
    stats = found.model_dump()["rowcast"]
    assert stats["seed"] == 7 and {"acceptance", "density", "tokens_per_round"} <= stats.keys()
    again = client.chat.completions.create(
        model=NAME, messages=[*MESSAGES, found.choices[0].message.model_dump(exclude_none=True)], max_completion_tokens=2, user="me",
        metadata={"a": "b"}, store=False, tools=[], response_format={"type": "text"},
    )  # fmt: skip
    assert again.choices[0].finish_reason in ("length", "stop")


def test_a_chat_stream(client: OpenAI, llm: LLM) -> None:
    expected = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=30))[0].outputs[0]
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=MESSAGES, temperature=0, max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [expected.finish_reason]
    assert len({c.id for c in chunks}) == 1 and chunks[0].id.startswith("chatcmpl-")
    last = chunks[-1]
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == len(expected.token_ids)
    assert all(c.usage is None for c in chunks[:-1])


def test_the_events_of_a_stream(served: Served) -> None:
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 3, "stream": True, "temperature": 0, "ignore_eos": True}
    response = post(served, "/v1/completions", body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8" and response.headers["x-request-id"]
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(e.startswith("data: {") and "\n" not in e for e in events[:-2])
    first = json.loads(events[0].removeprefix("data: "))
    assert first["object"] == "text_completion" and "usage" not in first


def test_logprobs(client: OpenAI, llm: LLM) -> None:
    [expected] = offline(llm, "Hello", temperature=0, logprobs=2, max_tokens=12)
    assert expected.logprobs is not None
    text = client.completions.create(model=NAME, prompt="Hello", temperature=0, logprobs=2, max_tokens=12).choices[0].logprobs
    assert text is not None and text.tokens is not None and text.token_logprobs is not None and text.text_offset is not None
    rows = list(zip(expected.token_ids, expected.logprobs, strict=True))
    assert text.tokens == [entry[token].decoded_token for token, entry in rows]
    assert text.token_logprobs == pytest.approx([entry[token].logprob for token, entry in rows], abs=1e-4)
    assert [list(top) for top in text.top_logprobs or []] == [[p.decoded_token for p in entry.values()] for _, entry in rows]
    assert any(token.startswith("<|") for token in text.tokens[:6]), "a token that is not shown"
    for token, at in zip(text.tokens, text.text_offset, strict=True):
        assert expected.text[at:].startswith(token) or token.startswith("<")

    asked: dict[str, Any] = {
        "model": NAME,
        "messages": MESSAGES,
        "seed": 2,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 12,
    }
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    assert whole is not None and whole.content is not None
    [said] = llm.chat(MESSAGES, SamplingParams(seed=2, logprobs=2, max_tokens=12))[0].outputs
    assert [entry.token for entry in whole.content] == [
        entry[token].decoded_token for token, entry in zip(said.token_ids, said.logprobs or [], strict=True)
    ]
    for entry in whole.content:
        assert bytes(entry.bytes or []).decode() == entry.token
        assert len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob >= -20
    chunks = client.chat.completions.create(**asked, stream=True)
    streamed = [e for c in chunks for choice in c.choices if choice.logprobs for e in choice.logprobs.content or []]
    for one, other in zip(streamed, whole.content, strict=True):
        assert (one.token, one.bytes) == (other.token, other.bytes) and one.logprob == pytest.approx(other.logprob, abs=1e-4)
    told = client.chat.completions.create(**asked, extra_body={"return_token_ids": True}).choices[0].model_dump()
    assert told["token_ids"] == said.token_ids
    plain = client.chat.completions.create(model=NAME, messages=MESSAGES, logprobs=True, max_tokens=2).choices[0].logprobs
    assert plain is not None and all(entry.top_logprobs == [] for entry in plain.content or [])


def test_bytes_of_tokens_that_are_no_text() -> None:
    pieces = {0: "<0xE4>", 1: "Ã¤", 2: "Ġ", 3: "什"}

    class Tokenizer:
        class backend:
            id_to_token = staticmethod(pieces.get)

    find = token_bytes(Tokenizer())  # type: ignore[arg-type]
    assert find(0, "\ufffd") == [0xE4] and find(1, "\ufffd") == [0xC3, 0xA4] and find(2, " ") == [0x20]
    assert find(3, "\ufffd") is None and find(7, "\ufffd") is None


class TestClientsThatGo:
    """Cancelled at once, streamed or not, running or waiting."""

    def test_a_stream_that_is_closed(self, served: Served, client: OpenAI) -> None:
        before = served.requests()
        with client.completions.create(**LONG, stream=True) as stream:
            next(iter(stream))
        served.settle()
        after = served.requests()
        assert after["cancelled"] == before["cancelled"] + 1 and after["finished"] == before["finished"]

    def test_answers_that_are_waited_for_no_longer(self, served: Served) -> None:
        before = served.requests()

        async def leave() -> None:
            async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
                many = {**LONG, "temperature": 1, "n": 16}
                with served.still():
                    tasks = [asyncio.ensure_future(client.completions.create(**many)) for _ in range(3)]
                    await asyncio.to_thread(served.until, lambda found: found["waiting"] == 2)
                    for task in tasks:
                        task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(leave())
        served.settle()
        after = served.requests()
        assert after["cancelled"] == before["cancelled"] + 3 and after["finished"] == before["finished"]


def test_too_many_requests(served: Served, llm: LLM) -> None:
    seeded: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "n": 16, "seed": 8, "max_tokens": 5}

    async def crowd() -> Any:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
            with served.still():
                long = asyncio.ensure_future(client.completions.create(**{**LONG, "temperature": 1, "n": 16}))
                await asyncio.to_thread(served.until, lambda found: found["running"] == 1)
                waiting = [asyncio.ensure_future(client.completions.create(**seeded)) for _ in range(4)]
                await asyncio.to_thread(served.until, lambda found: found["waiting"] == 4)
                with pytest.raises(openai.RateLimitError, match="4 requests wait already") as caught:
                    await client.completions.create(**seeded, stream=True)
                assert caught.value.code == "queue_full" and int(caught.value.response.headers["retry-after"]) >= 1
                long.cancel()
            return await asyncio.gather(*waiting)

    found = asyncio.run(crowd())
    expected = [output.text for output in offline(llm, n=16, seed=8, max_tokens=5)]
    assert all([choice.text for choice in each.choices] == expected for each in found)


def test_deadlines(client: OpenAI) -> None:
    late = {**LONG, "extra_body": {"ignore_eos": True, "deadline_s": 0.001}}
    with pytest.raises(openai.APIStatusError, match=r"deadline of 0\.001 s") as caught:
        client.completions.create(**late)
    assert caught.value.status_code == 504 and caught.value.code == "deadline_exceeded"
    slow = {**LONG, "temperature": 1, "n": 16, "stream": True, "extra_body": {"ignore_eos": True, "deadline_s": 0.5}}
    chunks = []
    with pytest.raises(openai.APIError, match=r"deadline of 0\.5 s") as error:
        chunks += list(client.completions.create(**slow))
    assert getattr(error.value, "code", None) == "deadline_exceeded"


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "does not support tools"),
        ({"tool_choice": "auto"}, "tool_choice", "tools"),
        ({"functions": [{"name": "f"}]}, "functions", "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format", "formats other than text"),
        ({"modalities": ["text", "audio"]}, "modalities", "text"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio", "audio"),
        ({"extra_body": {"temprature": 1}}, "temprature", "did you mean temperature"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template", "not a field"),
        ({"temperature": 3}, "temperature", "is 3: input should be less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"n": 2, "temperature": 0}, "n", "must be 1 at temperature 0"),
        ({"n": 500}, "n", "at most 128"),
        ({"top_logprobs": 3}, "top_logprobs", "set logprobs to true"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
        ({"logit_bias": {"101": 1}}, "logit_bias", "101"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias", "at most 1024"),
        ({"extra_body": {"ladder": "no such rung"}}, "ladder", "no such rung"),
        ({"extra_body": {"mode": "approximate"}}, "mode", "mode=approximate takes"),
        ({"n": 25, "temperature": 1, "logprobs": True, "top_logprobs": 20}, "top_logprobs", "asks for 525 log-probabilities"),
        ({"extra_body": {"mode": "fast"}}, "mode", "exact"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id", "not a field"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "of type image_url"),
        ({"messages": [{"role": "user", "content": "a" * CONTEXT}]}, "messages", f"the context is {CONTEXT}"),
    ],
)  # fmt: skip
def test_chats_that_cannot_be(client: OpenAI, more: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": NAME, "messages": MESSAGES, **more})
    assert words in caught.value.message and "\n" not in caught.value.message and "Traceback" not in caught.value.message
    assert caught.value.param == param and caught.value.type == "invalid_request_error" and caught.value.code


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ({"prompt": ["a"] * 32, "n": 4, "temperature": 1, "logprobs": 4}, "too_many_logprobs", "set logprobs to 3 or less"),
        ({"prompt": "a" * CONTEXT}, "context_length_exceeded", f"has {CONTEXT} tokens"),
        ({"prompt": [[5] * 2000]}, "context_length_exceeded", "has 2000 tokens"),
        ({"prompt": [101]}, "invalid_value", "101 is outside the vocabulary"),
        ({"prompt": ""}, "invalid_value", "at least one token"),
        ({"prompt": ["a", ""]}, "invalid_value", "no empty prompts"),
        ({"prompt": [1, "a"]}, "invalid_value", "element 0 is neither"),
        ({"prompt": ["a"] * 129}, "too_many_choices", "at most 128"),
        ({"suffix": "x"}, "unsupported", "suffix"),
        ({"best_of": 3}, "unsupported", "best_of is 3"),
        ({"echo": True, "logprobs": 1}, "unsupported", "echo"),
        ({"logprobs": 6}, "invalid_value", "less than or equal to 5"),
        ({"extra_body": {"stream_options": {"include_usag": True}}}, "unknown_field", "did you mean include_usage"),
    ],
)  # fmt: skip
def test_completions_that_cannot_be(client: OpenAI, more: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": NAME, "prompt": "x", **more})
    assert caught.value.code == code and words in caught.value.message and caught.value.param


@pytest.mark.parametrize(
    ("sentence", "param"),
    [
        ("the ladder 'x' does not end in plain; it has ngram / plain", "ladder"),
        ("'ngram' in the ladder 'self / ngram / plain' is none of the rungs in its place", "ladder"),
        ("mode=approximate takes a sparse rung", "mode"),
        ("min_tokens is 5 but must be at most max_tokens, 3; change either.", "min_tokens"),
        ("prompt token id 101 is outside the vocabulary, 0 to 100", "messages"),
        ("the prompt has 9 tokens, but the context is 8", "messages"),
        ("/models/x has no tokenizer (no tokenizer.json); copy one there", "messages"),
        ("this model has no chat template; use generate", "messages"),
        ("the chat template refuses the messages (alternate); change them", "messages"),
        ("something else", None),
    ],
)
def test_the_field_of_a_refusal(sentence: str, param: str | None) -> None:
    """As OpenAI's clients read it; a conversation's prompt is its messages."""
    assert as_api_error(UserError(sentence), prompt="messages").param == param
    assert as_api_error(OutOfMemoryError(sentence)).param == "max_tokens"


def test_bodies_that_are_none(served: Served) -> None:
    def send(body: bytes, kind: str = "application/json") -> httpx2.Response:
        return HTTP.post(f"{served.url}/v1/completions", content=body, headers={"content-type": kind})

    for body in (b"", b"{", b"[" * 20_000, b"\xff\xfe{}", b'{"n": 1e999}', b"9" * 5000, b"null", b"[]", b'"x"'):
        response = send(body)
        assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error", body[:20]
    surrogate = send(json.dumps({"model": NAME, "prompt": "\ud800"}).encode())
    assert surrogate.status_code == 400 and "surrogate" in surrogate.json()["error"]["message"]
    assert send(b"{}", "text/plain").status_code == 415
    wide = json.dumps({"model": NAME, "prompt": [None] * 100_000, **{f"f{i}": 1 for i in range(1000)}}).encode()
    assert send(wide).json()["error"]["param"] == "f0"
    large = send(b" " * (1 << 21))
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"


def test_other_routes(served: Served, llm: LLM) -> None:
    text = post(served, "/tokenize", {"prompt": PROMPT, "return_token_strs": True}).json()
    ids = llm.tokenizer.encode(PROMPT)
    assert text == {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids, "token_strs": list(PROMPT)}
    turns = post(served, "/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}).json()
    assert turns["tokens"] == llm.tokenizer.chat(MESSAGES, add_generation_prompt=False)
    assert post(served, "/detokenize", {"tokens": ids}).json() == {"prompt": PROMPT}
    assert post(served, "/detokenize", {"tokens": [101]}).status_code == 400
    assert post(served, "/tokenize", {}).status_code == 400
    assert HTTP.get(f"{served.url}/version").json() == {"version": __version__}
    assert HTTP.get(f"{served.url}/ready").json() == {"state": "ready"}
    assert HTTP.get(f"{served.url}/health").json()["status"] == "alive"
    assert post(served, "/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200
    metrics = HTTP.get(f"{served.url}/metrics")
    assert 'rowcast_http_requests_total{route="/v1/completions",status="200"}' in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert HTTP.get(f"{served.url}/live").json()["state"] == "ready"
    with HTTP.stream("GET", f"{served.url}/live/stream") as stream:
        lines = (line for line in stream.iter_lines() if line)
        assert [json.loads(next(lines).removeprefix("data: "))["state"] for _ in range(2)] == ["ready"] * 2
    missing, wrong = HTTP.get(f"{served.url}/v2"), HTTP.put(f"{served.url}/health", json={})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_route")
    assert (wrong.status_code, wrong.json()["error"]["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "GET")
    assert HTTP.get(f"{served.url}/page/page.js").headers["cache-control"] == "no-cache"
    page = HTTP.get(served.url)
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert HTTP.get(f"{served.url}/page/../app.py").status_code == 404
    assert HTTP.get(f"{served.url}/page/%2e%2e/app.py").status_code == 404


def test_the_document_is_true(served: Served, client: OpenAI) -> None:
    document = HTTP.get(f"{served.url}/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/ready", "/live"} <= document["paths"].keys()
    assert not any("422" in o["responses"] for p in document["paths"].values() for o in p.values())

    def check(kind: type[BaseModel], found: Any) -> None:
        """The model describes all that is there."""
        read = kind.model_validate(found).model_dump(mode="json", exclude_unset=True)
        assert read == found

    check(documents.ModelList, HTTP.get(f"{served.url}/v1/models").json())
    for logprobs in (None, 1):
        check(documents.Completion, post(served, "/v1/completions", {"model": NAME, "prompt": "ab", "logprobs": logprobs}).json())
    chat = {"model": NAME, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    check(documents.ChatCompletion, post(served, "/v1/chat/completions", chat).json())
    check(documents.Tokens, post(served, "/tokenize", {"prompt": "a"}).json())
    check(documents.ErrorResponse, post(served, "/tokenize", {}).json())


def test_keys(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# who\nalice:{KEY}\n\n{OTHER_KEY}\n")
    path.chmod(0o600)
    with served.at(AppSettings(api_keys=read_api_keys(path))) as locked:

        def ask(key: str, **more: Any) -> Any:
            with OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S) as client:
                return client.completions.create(
                    model=NAME, prompt="the prompt", max_tokens=2, extra_body={"ignore_eos": True}, **more
                )

        ask(KEY, extra_headers={"x-request-id": "mine-1"})
        ask(OTHER_KEY, extra_headers={"x-request-id": "bad id"})
        for wrong in ("sk-wrong-wrong-wrong", KEY[:-1], KEY.upper()):
            with pytest.raises(openai.AuthenticationError, match="not one of this server's") as caught:
                ask(wrong)
            assert caught.value.code == "invalid_api_key" and caught.value.response.headers["www-authenticate"] == "Bearer"
            assert wrong not in str(caught.value)
        for path_ in ("/metrics", "/live", "/live/stream", "/version", "/openapi.json", "/v1/models", "/nothing", "/page"):
            assert HTTP.get(f"{locked.url}{path_}").status_code == 401, path_
        for path_ in ("/health/", "/HEALTH", "/PAGE/page.js", "/v1/models/"):
            assert HTTP.get(f"{locked.url}{path_}").status_code == 401, path_
        for path_ in ("/health", "/ready", "/", "/page/page.js"):
            assert HTTP.get(f"{locked.url}{path_}").status_code == 200, path_
        document = HTTP.get(f"{locked.url}/openapi.json", headers={"authorization": f"bearer {KEY}"}).json()
        assert document["security"] == [{"key": []}] and document["paths"]["/ready"]["get"]["security"] == []
    shown = capsys.readouterr().err  # written before the application's end
    lines = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    asked = [line for line in lines if line["route"] == "/v1/completions"]
    assert [(line["client"], line["status"]) for line in asked[:2]] == [("alice", 200), ("key-4", 200)]
    assert asked[0]["request_id"] == "mine-1" and len(asked[1]["request_id"]) == 24
    assert asked[0]["prompt_tokens"] == 10 and asked[0]["generated_tokens"] == 2 and asked[0]["finish_reason"] == "length"
    assert 0 < asked[0]["ttft_s"] <= asked[0]["total_s"] and asked[0]["completion_id"].startswith("cmpl-")
    assert {line["status"] for line in asked[2:]} == {401} and asked[2]["error"] == "invalid_api_key"
    assert not any(secret in shown for secret in (KEY, OTHER_KEY, "the prompt"))


def test_key_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    for text, words in (
        ("", "holds no API key"),
        ("short", "has 5 characters"),
        (f"a b:{KEY}", "name of an API key"),
        (f"a:{KEY}\nb:{KEY}", "line 2"),
        (f"a:{KEY}\na:{OTHER_KEY}", "line 2"),
        (f"a:{KEY} x", "letters"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            read_api_keys(path)
        assert KEY not in str(caught.value)
    with pytest.raises(UserError, match="FileNotFoundError"):
        read_api_keys(tmp_path / "none")
    path.write_text(KEY)
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING, "rowcast"):
        [found] = read_api_keys(path)
    assert (
        found.name == "key-1" and "chmod 600" in caplog.text and KEY not in repr(found) and found.digest.hex() not in repr(found)
    )
    assert AppSettings(host="0.0.0.0", api_keys=(found,)).loopback is False
    for host in ("0.0.0.0", "example.org", "::", "10.0.0.1"):
        with pytest.raises(UserError, match="API keys"):
            AppSettings(host=host)
    for origin in ("*", "https://Example.org", "https://example.org/"):
        with pytest.raises(UserError, match="origin"):
            AppSettings(allowed_origins=(origin,))
    assert is_loopback("127.1.2.3") and is_loopback("::1") and is_loopback("LOCALHOST") and not is_loopback("localhost.evil.org")


def test_pages_of_elsewhere(served: Served) -> None:
    def get(url: str, **headers: str) -> int:
        return HTTP.get(f"{url}/v1/models", headers=headers).status_code

    port = served.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "[::1]:80", "localhost"):
        assert get(served.url, host=host) == 200
    for host in ("evil.org", f"evil.org:{port}", "127.0.0.1.evil.org", "0.0.0.0", "[::2]", ""):
        assert get(served.url, host=host) == 403, host
    assert get(served.url, origin=served.url) == 200
    for origin in ("https://evil.org", "null", f"http://127.0.0.1:{port + 1}", f"http://evil.org:{port}"):
        assert get(served.url, origin=origin) == 403, origin
    for site, mode, status in (("cross-site", "no-cors", 403), ("same-site", "no-cors", 403), ("cross-site", "navigate", 200)):
        assert get(served.url, **{"sec-fetch-site": site, "sec-fetch-mode": mode}) == status
    assert get(served.url, **{"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}) == 200
    preflight = {"origin": "https://friend.org", "access-control-request-method": "POST"}
    assert HTTP.options(f"{served.url}/v1/completions", headers=preflight).status_code == 403
    friendly = AppSettings(
        log_requests=False, allowed_origins=("https://friend.org",), allowed_hosts=("llm.friend.org",), api_keys=(ApiKey.of("a", KEY),)
    )  # fmt: skip
    with served.at(friendly) as other:
        bearer = {"authorization": f"Bearer {KEY}"}
        assert get(other.url, origin="https://friend.org", host="llm.friend.org", **bearer) == 200
        assert get(other.url, origin="https://evil.org", **bearer) == 403
        allowed = HTTP.options(f"{other.url}/v1/completions", headers=preflight)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://friend.org"


class Stub:
    """A backend in any state, whose requests fail."""

    def __init__(self, state: State, error: Exception | None = None, *, pieces: int = 1) -> None:
        """`pieces`: before the error."""
        self._state, self._error, self._pieces = state, error, pieces
        self.card = ModelCard(NAME, 0, 16, 100, "plain", "exact")

    @property
    def tokenizer(self) -> Any:
        raise UserError("there is no tokenizer")

    def state(self) -> tuple[State, str]:
        return self._state, "it is like that"

    async def submit(self, ask: Ask) -> AsyncIterator[Piece]:
        assert not ask.params.detokenize

        async def pieces() -> AsyncIterator[Piece]:
            for _ in range(self._pieces):
                yield Piece(0, "", [1], prompt_token_ids=[1])
            assert self._error is not None
            raise self._error

        return pieces()

    async def live(self) -> dict[str, Any]:
        return {"rate": float("nan")}

    async def metrics(self) -> bytes:
        raise KeyError(SECRET)


def of_stub(backend: Any, path: str, body: Any = None) -> httpx2.Response:
    async def ask() -> httpx2.Response:
        app = make_app(backend, AppSettings())
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            found: httpx2.Response = await client.request("GET" if body is None else "POST", path, json=body)
            return found

    return asyncio.run(ask())


def test_states() -> None:
    states: tuple[State, ...] = ("starting", "recovering", "draining", "stopped")
    for state in states:
        response = of_stub(Stub(state), "/ready")
        assert response.status_code == 503 and response.json()["state"] == state and "like that" in response.text
        assert of_stub(Stub(state), "/health").status_code == (503 if state == "stopped" else 200)
    starting = of_stub(Stub("starting"), "/v1/models")
    assert starting.status_code == 503 and starting.headers["retry-after"] == "5"
    assert of_stub(Stub("draining"), "/live/stream").text == 'data: {"rate":null}\n\n'


@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_token_have_their_status(stream: bool) -> None:
    lost = Stub("ready", unavailable("the model is lost", retry_after_s=2.5), pieces=0)
    response = of_stub(lost, "/v1/completions", {"model": NAME, "prompt": [1], "stream": stream})
    assert response.status_code == 503 and response.headers["retry-after"] == "3"
    assert response.json()["error"] == {
        "message": "the model is lost", "type": "service_unavailable", "param": None, "code": "unavailable"
    }  # fmt: skip


def test_mistakes_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    body = {"model": NAME, "prompt": [1], "max_tokens": 2}
    for response in (
        of_stub(Stub("ready"), "/metrics"),
        of_stub(Stub("ready", RuntimeError(SECRET)), "/v1/completions", body),
        of_stub(Stub("ready", RuntimeError(SECRET)), "/v1/completions", {**body, "stream": True}),
    ):
        error = json.loads(response.text.split("data: ")[-1])["error"]
        assert error["code"] == "internal" and response.headers["x-request-id"] in error["message"]
        assert SECRET not in response.text and "Traceback" not in response.text
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    errors = [line for line in lines if line["event"] == "error"]
    assert [line["exception"] for line in errors] == ["KeyError", "RuntimeError", "RuntimeError"] and SECRET not in str(lines)
    assert errors[-1]["request_id"] == response.headers["x-request-id"] and any(
        "submit" in frame or "pieces" in frame for frame in errors[-1]["traceback"]
    )
    assert response.status_code == 200 and "[DONE]" not in response.text
    refused = of_stub(Stub("ready"), "/tokenize", {"prompt": "a"}).json()["error"]["message"]
    assert refused == "there is no tokenizer."
    refused = of_stub(Stub("ready"), "/v1/completions", {"model": NAME, "prompt": "a"}).json()["error"]["message"]
    assert refused == "there is no tokenizer, or pass prompts as token ids."


def test_the_log() -> None:
    stream = io.StringIO()
    log = RequestLog(stream)
    log.request(Exchange("1", "GET", route="/ready", status=200))
    log.request(Exchange("2", "GET", route="/ready", status=503))
    log.close()
    log._dropped = 3
    log.request(Exchange("3", "POST", route="/x", status=200))
    log.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line.get("request_id", line.get("lines")) for line in lines] == ["2", 3, "3"]
    off = RequestLog(stream, enabled=False)
    off.request(Exchange("4", "GET", status=500))
    off.failure(KeyError(SECRET), "5")
    off.close()
    [last] = stream.getvalue().splitlines()[3:]
    assert json.loads(last)["request_id"] == "5" and SECRET not in last


def test_a_log_that_is_not_read() -> None:
    """Requests go on: lines are dropped."""
    read, write = os.pipe()
    log = RequestLog(os.fdopen(write, "w"))
    for _ in range(MOST_LINES + 2000):
        log.write({"event": "x" * 100})
    assert log._dropped > 0
    os.close(read)
    log.close()


def test_logprobs_that_json_does_not_have() -> None:
    from rowcast.serving.answers import ChatAnswer

    answer = ChatAnswer("chatcmpl-1", 1, NAME, Stub("ready").card, 1, 1, top_logprobs=1)
    piece = Piece(0, "x\u2028", [1], [{1: Logprob(float("-inf"), 3, "x"), 2: Logprob(-0.5, 1, "y")}], "stop")
    events = answer.events(0, piece)
    assert "\u2028" not in events and all(json.loads(e.removeprefix("data: ")) for e in events.split("\n\n")[:-1])
    assert '"logprob":-9999.0' in events and '"token":"y"' in events

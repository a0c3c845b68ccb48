"""The openai SDK, unchanged, against `inferctl up`: sync, async and streamed, to the word."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import openai
import pytest

from inference_runtime.testing.history import History
from inference_runtime.testing.scripted import expected_text, user_says
from tests.e2e.kit import ROOT, Up, readme_block

QUESTIONS = json.loads((ROOT / "libs/inference_runtime/demo_model/questions.json").read_text(encoding="utf-8"))


@pytest.fixture
def client(up: Up) -> Iterator[openai.OpenAI]:
    """A client that does not retry: what fails shall be seen."""
    with openai.OpenAI(base_url=f"{up.http}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.mark.parametrize("entry", QUESTIONS, ids=lambda e: e["question"])
def test_the_demo_model_answers_the_questions_of_the_readme_word_for_word(client: openai.OpenAI, entry: dict[str, str]) -> None:
    """A first run shows sense, not noise: through every service, streamed."""
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": entry["question"]}], temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    assert text == entry["answer"]


def test_the_readme_lists_these_questions() -> None:
    """The ten questions and answers that are tested are the ten that are printed."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    assert len(QUESTIONS) == 10
    assert [e["question"] for e in QUESTIONS if f"| {e['question']} | {e['answer']} |" not in readme] == []


def test_the_sdk_example_of_the_readme_runs_as_written(up: Up) -> None:
    """The block is run as it stands; only the address is that of this cluster."""
    code = readme_block("python")
    assert "http://127.0.0.1:8080" in code
    run = subprocess.run(
        [sys.executable, "-c", code.replace("http://127.0.0.1:8080", up.http)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == next(e["answer"] for e in QUESTIONS if e["question"] in code)


def test_trap_01_an_answer_is_what_the_model_said(client: openai.OpenAI) -> None:
    """Traps 1, 2: not an empty message with HTTP 200, and no 400 no_route: text, usage and finish reason from the model."""
    answer = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hello"}], seed=7, max_tokens=40)

    assert answer.choices[0].message.content == expected_text(user_says("hello"), seed=7, n=40)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 40
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 40


def test_a_stream_carries_every_word_once_in_order_with_usage(client: openai.OpenAI) -> None:
    """R02: the stream equals the recomputed answer; usage comes last when it is asked for."""
    history = History()
    record = history.begin("hello", seed=3, tokens=100)
    stream = client.chat.completions.create(
        model="echo",
        messages=[{"role": "user", "content": "hello"}],
        seed=3,
        max_tokens=100,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            record.text(choice.delta.content or "")
    record.end()

    history.check()
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 100


def test_trap_04_a_stream_arrives_while_it_is_made(client: openai.OpenAI) -> None:
    """Trap 4: `stream: true` is not a batch in disguise: at 20 ms a token the first piece comes long before the last."""
    begin = time.monotonic()
    times = []
    for chunk in client.chat.completions.create(
        model="slow", messages=[{"role": "user", "content": "x"}], max_tokens=50, stream=True
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.monotonic() - begin)

    assert len(times) >= 25
    assert times[-1] - times[0] > 0.5
    assert times[0] < times[-1] / 2


async def test_many_async_streams_at_once_do_not_mix(up: Up) -> None:
    """Each of 32 concurrent streams gets its own words, all of them, in order."""
    history = History()
    async with openai.AsyncOpenAI(base_url=f"{up.http}/v1", api_key="none", max_retries=0, timeout=60) as client:

        async def one(number: int) -> None:
            record = history.begin(f"prompt {number}", seed=number, tokens=32, name=f"request {number}")
            stream = await client.chat.completions.create(
                model="slow",
                messages=[{"role": "user", "content": f"prompt {number}"}],
                seed=number,
                max_tokens=32,
                stream=True,
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    record.text(choice.delta.content or "")
            record.end()

        async with asyncio.TaskGroup() as tasks:
            for number in range(32):
                tasks.create_task(one(number))

    history.check()


async def test_the_async_client_gets_whole_answers(up: Up) -> None:
    """Async, not streamed."""
    async with openai.AsyncOpenAI(base_url=f"{up.http}/v1", api_key="none", max_retries=0, timeout=60) as client:
        answer = await client.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": "a"}], seed=1, max_tokens=8
        )

    assert answer.choices[0].message.content == expected_text(user_says("a"), seed=1, n=8)


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client: openai.OpenAI) -> None:
    """`stop` over HTTP, in both modes."""
    whole = expected_text(user_says("hello"), seed=7, n=40)
    stop = whole.split()[5]
    expected = whole[: whole.index(stop)]

    unary = client.chat.completions.create(
        model="echo", messages=[{"role": "user", "content": "hello"}], seed=7, max_tokens=40, stop=[stop]
    )
    streamed = client.chat.completions.create(
        model="echo", messages=[{"role": "user", "content": "hello"}], seed=7, max_tokens=40, stop=[stop], stream=True
    )

    assert unary.choices[0].message.content == expected
    assert unary.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].delta.content or "" for c in streamed if c.choices) == expected


def test_trap_36_models_are_listed_and_parts_are_read(client: openai.OpenAI) -> None:
    """Trap 36: /v1/models exists; content may come as parts."""
    models = sorted(model.id for model in client.models.list())
    parts = client.chat.completions.create(
        model="echo",
        messages=[{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}],
        seed=7,
        max_tokens=8,
    )

    assert models == ["demo", "echo", "slow"]
    assert parts.choices[0].message.content == expected_text(user_says("hello"), seed=7, n=8)


def test_the_demo_model_ships_with_the_package() -> None:
    """The weights lie in the package, at most 10 MB."""
    size = (ROOT / "libs/inference_runtime/demo_model/model.safetensors").stat().st_size

    assert size <= 10_000_000


@pytest.mark.parametrize(
    ("change", "expected", "code", "param"),
    [
        ({"model": "no-such-model"}, openai.NotFoundError, "model_not_found", None),
        ({"messages": []}, openai.BadRequestError, None, "messages"),
        ({"temperature": 9}, openai.BadRequestError, None, "temperature"),
        ({"temperature": "hot"}, openai.BadRequestError, None, "temperature"),
        ({"max_tokens": -1}, openai.BadRequestError, None, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}]}, openai.BadRequestError, "context_length_exceeded", None),
    ],
    ids=["unknown model", "no messages", "range", "type", "negative", "long prompt"],
)
def test_bad_input_is_the_sdks_own_exception(
    client: openai.OpenAI, change: dict[str, object], expected: type[openai.APIStatusError], code: str | None, param: str | None
) -> None:
    """Bad input: a clear OpenAI-shaped error, and the next request is answered."""
    body: dict[str, object] = {"model": "echo", "messages": [{"role": "user", "content": "x"}], **change}

    with pytest.raises(expected) as caught:
        client.post("/chat/completions", body=body, cast_to=object)

    error = caught.value.body
    assert isinstance(error, dict)
    assert error["message"]
    if code is not None:
        assert error["code"] == code
    if param is not None:
        assert error["param"] == param
    assert client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "x"}], max_tokens=1).choices


def test_a_client_that_leaves_frees_its_place(up: Up, client: openai.OpenAI) -> None:
    """A disconnect reaches the engine: the replica's running requests fall to zero long before the answer would have ended."""
    stream = client.chat.completions.create(
        model="slow", messages=[{"role": "user", "content": "x"}], max_tokens=10_000, stream=True
    )
    next(iter(stream))

    def running() -> int:
        replicas = json.loads(up.cli("get", "replicas", "-o", "json").stdout)
        return sum(r["load"]["running"] for r in replicas if r["replica"]["deployment"] == "slow")

    deadline = time.monotonic() + 20
    while running() != 1:
        assert time.monotonic() < deadline, "the load of a running request was never reported"
    stream.close()
    while running() != 0:
        assert time.monotonic() < deadline, "the request still runs"

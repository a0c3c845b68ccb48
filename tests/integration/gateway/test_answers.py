"""A request through the HTTP door to an engine and back, in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.integration.gateway.conftest import Gateway
from tests.integration.gateway.peer import Peer, Row, deployment_route, last_row


def events(body: str) -> list[str]:
    return [line[6:] for line in body.split("\n") if line.startswith("data: ")]


async def test_trap_01_a_unary_answer_carries_the_models_text(gateway: Gateway, engine: Peer) -> None:
    """Trap 1: the original answered with an empty message."""
    asking = asyncio.create_task(gateway.chat())
    submission = await engine.submission()
    engine.send(
        Row(submission, 0, [7], "Hel"),
    )
    engine.send(last_row(submission, 1, [8, 9], "lo."))
    answer = (await asking).json()
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["usage"]["total_tokens"] == 6
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "demo"


async def test_trap_03_the_request_reaches_the_replica_that_was_routed(gateway: Gateway, engine: Peer) -> None:
    """Trap 3: the original discarded target and channel after routing."""
    asking = asyncio.create_task(gateway.chat(temperature=0.5, max_tokens=5, seed=4, stop=["x"]))
    submission = await engine.submission()
    assert submission.replica_id == "demo-on-engine-1"
    assert submission.request.deployment == "demo"
    assert submission.request.chat.messages[0].content[0].text == "hi"
    assert submission.request.sampling.max_tokens == 5
    assert submission.request.sampling.seed == 4
    assert list(submission.request.sampling.stop) == ["x"]
    assert 9 < submission.time_left.seconds + submission.time_left.nanos / 1e9 < 10
    engine.send(last_row(submission, 0, [1], "ok"))
    assert (await asking).status_code == 200


async def test_a_stream_has_openais_events_in_order(gateway: Gateway, engine: Peer) -> None:
    asking = asyncio.create_task(gateway.chat(stream=True, stream_options={"include_usage": True}))
    submission = await engine.submission()
    engine.send(Row(submission, 0, [1], "Hel"))
    engine.send(Row(submission, 1, [2], ""))
    engine.send(last_row(submission, 2, [3], 'lo "x"\n'))
    response = await asking
    assert response.headers["content-type"] == "text/event-stream"
    seen = events(response.text)
    assert seen[-1] == "[DONE]"
    chunks = [json.loads(e) for e in seen[:-1]]
    assert {c["id"] for c in chunks} == {"chatcmpl-" + response.headers["x-request-id"]}
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert [d.get("content") for d in deltas[1:]] == ["Hel", 'lo "x"\n', None]
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]] == [None, None, None, "stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 6
    assert all(c["usage"] is None for c in chunks[:-1])


async def test_the_clients_trace_goes_on_to_the_engine_and_nonsense_does_not(gateway: Gateway, engine: Peer) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
    for number, (sent, received) in enumerate([(trace, trace), ("x" * 5000, ""), ("", "")]):
        headers = {"traceparent": sent} if sent else {}
        asking = asyncio.create_task(gateway.client.post("/v1/chat/completions", json=body, headers=headers))
        submission = await engine.submission(number + 1)
        assert submission.traceparent == received
        engine.send(last_row(submission, 0, [1], "ok"))
        assert (await asking).status_code == 200


async def test_text_completions_have_their_own_shape(gateway: Gateway, engine: Peer) -> None:
    asking = asyncio.create_task(gateway.client.post("/v1/completions", json={"model": "demo", "prompt": "once"}))
    submission = await engine.submission()
    assert submission.request.text == "once"
    engine.send(last_row(submission, 0, [1], " upon"))
    answer = (await asking).json()
    assert (answer["object"], answer["id"][:5]) == ("text_completion", "cmpl-")
    assert answer["choices"] == [{"index": 0, "text": " upon", "logprobs": None, "finish_reason": "stop"}]
    asking = asyncio.create_task(gateway.client.post("/v1/completions", json={"model": "demo", "prompt": "once", "stream": True}))
    submission = await engine.submission(2)
    engine.send(Row(submission, 0, [1], " upon"), last_row(submission, 1, [2], " a"))
    chunks = [json.loads(e) for e in events((await asking).text)[:-1]]
    assert [c["choices"][0]["text"] for c in chunks] == [" upon", " a", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_log_probabilities_have_openais_shape(gateway: Gateway, engine: Peer) -> None:
    replica = engine.replica("demo")
    replica.capabilities.logprobs = True
    await gateway.route(deployment_route(replica))
    for number, stream in enumerate([False, True]):
        asking = asyncio.create_task(gateway.chat(logprobs=True, top_logprobs=1, stream=stream))
        row = last_row(await engine.submission(number + 1), 0, [7], "é")
        assert row.detail is not None
        entry = row.detail.logprobs.add(token_id=7, token="é".encode(), logprob=-0.5)
        entry.top.add(token_id=8, token=b"\xff", logprob=-1.5)
        engine.send(row)
        response = await asking
        chunk = json.loads(events(response.text)[1]) if stream else response.json()
        assert chunk["choices"][0]["logprobs"]["content"] == [
            {
                "token": "é", "logprob": -0.5, "bytes": [195, 169],
                "top_logprobs": [{"token": "\ufffd", "logprob": -1.5, "bytes": [255]}],
            }
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "https://[::1]:8080"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1.evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
async def test_a_web_page_cannot_use_a_gateway_without_keys(gateway: Gateway, headers: dict[str, str], status: int) -> None:
    """DNS rebinding and cross-site requests: on loopback the door is open to programs, not to pages from elsewhere."""
    await gateway.route(wait=False)
    answer = await gateway.client.get("/v1/models", headers=headers)
    assert answer.status_code == status

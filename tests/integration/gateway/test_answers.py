"""A request through the HTTP door to an engine and back, in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json

from tests.integration.gateway.conftest import Gateway
from tests.integration.gateway.peer import Peer, Row, last_row


def events(body: str) -> list[str]:
    return [line[6:] for line in body.split("\n\n") if line.startswith("data: ")]


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

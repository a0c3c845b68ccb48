"""Several choices of one request over HTTP and gRPC: each its own answer, all of them one response."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from itertools import islice
from typing import Any

import grpc
import httpx
import pytest

from inference_runtime.client import InferenceClient
from inference_runtime.errors import BadRequest, EngineLost, InferenceError
from inference_runtime.generation import (
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    Message,
    Role,
    SamplingParams,
    TextPart,
    TokenChunk,
)
from inference_runtime.rpc import error_from_rpc, open_channel
from inference_runtime.runners.scripted import ScriptedCodec, scripted_tokens
from inference_runtime.testing.scripted import expected_text, expected_tokens, user_says
from inference_runtime.v1 import engine_service_pb2, gateway_service_pb2, gateway_service_pb2_grpc
from inference_runtime.wire import request_to_proto
from tests.integration.gateway.conftest import Gateway, Start
from tests.integration.gateway.peer import Peer, Row, deployment_route, error_row, last_row, until
from tests.integration.gateway.test_every_index import PROMPT, SEED, TOKENS, breaking

Submission = engine_service_pb2.Submission


async def submitted(engine: Peer, choices: int, after: int = 0) -> list[Submission]:
    """The submissions of one request, by choice."""
    await until(lambda: len(engine.submissions) >= after + choices, f"{choices} submissions")
    return sorted(engine.submissions[after : after + choices], key=lambda s: s.choice)


def parts(body: str) -> list[str]:
    return [line[6:] for line in body.split("\n") if line.startswith("data: ")]


def choices_of(response: httpx.Response) -> dict[int, list[dict[str, Any]]]:
    """A stream's choices, each as the list of its events; fails when it is not a proper stream."""
    data = parts(response.text)
    assert data[-1] == "[DONE]", response.text
    assert data.count("[DONE]") == 1
    found: dict[int, list[dict[str, Any]]] = {}
    for event in map(json.loads, data[:-1]):
        for choice in event["choices"]:
            found.setdefault(choice["index"], []).append(choice)
    return found


async def test_a_whole_answer_has_every_choice_and_counts_the_prompt_once(gateway: Gateway, engine: Peer) -> None:
    asking = asyncio.create_task(gateway.chat(n=2, seed=4))
    first, second = await submitted(engine, 2)
    assert [(s.choice, s.request.sampling.n, s.request.sampling.seed) for s in (first, second)] == [(0, 0, 4), (1, 0, 4)]
    engine.send(last_row(second, 0, [7, 8], "two", finish="FINISH_REASON_LENGTH"))  # type: ignore[arg-type]
    engine.send(last_row(first, 0, [9], "one"))
    response = await asking
    answer = response.json()
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in answer["choices"]] == [
        (0, "one", "stop"), (1, "two", "length"),
    ]  # fmt: skip
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"], answer["usage"]["total_tokens"]) == (3, 3, 6)
    assert answer["id"] == "chatcmpl-" + first.request.request_id == "chatcmpl-" + second.request.request_id
    assert gateway.metric('inference_requests_total{deployment="demo",outcome="ok"}') == 1
    assert gateway.metric('inference_tokens_in_total{deployment="demo"}') == 3
    assert gateway.metric('inference_tokens_out_total{deployment="demo"}') == 3


async def test_a_stream_interleaves_its_choices_and_ends_with_the_last(gateway: Gateway, engine: Peer) -> None:
    asking = asyncio.create_task(gateway.chat(n=2, stream=True, stream_options={"include_usage": True}))
    first, second = await submitted(engine, 2)
    engine.send(Row(first, 0, [1], "a"), Row(second, 0, [2], "x"))
    engine.send(Row(second, 1, [3], "y"))
    engine.send(last_row(first, 1, [4], "b"))
    engine.send(last_row(second, 2, [5], "z", finish="FINISH_REASON_LENGTH"))  # type: ignore[arg-type]
    response = await asking
    found = choices_of(response)
    for number, text, finish in ((0, "ab", "stop"), (1, "xyz", "length")):
        assert found[number][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert "".join(c["delta"].get("content") or "" for c in found[number]) == text
        assert [c["finish_reason"] for c in found[number] if c["finish_reason"]] == [finish]
        assert found[number][-1]["finish_reason"] == finish  # nothing follows it
    events = [json.loads(e) for e in parts(response.text)[:-1]]
    assert {e["id"] for e in events} == {"chatcmpl-" + response.headers["x-request-id"]}
    assert [e["usage"] for e in events if e["usage"]] == [events[-1]["usage"]]
    assert "\nid:" not in response.text  # no place in one choice tells where a client is in all of them
    assert events[-1]["choices"] == []
    assert (events[-1]["usage"]["prompt_tokens"], events[-1]["usage"]["completion_tokens"]) == (3, 5)


async def test_text_completions_have_choices_too(gateway: Gateway, engine: Peer) -> None:
    asking = asyncio.create_task(gateway.client.post("/v1/completions", json={"model": "demo", "prompt": "x", "n": 2}))
    first, second = await submitted(engine, 2)
    engine.send(last_row(first, 0, [1], " one"), last_row(second, 0, [1], " two"))
    assert [(c["index"], c["text"]) for c in (await asking).json()["choices"]] == [(0, " one"), (1, " two")]


@pytest.mark.parametrize("stream", [True, False])
async def test_log_probabilities_stay_with_their_choice(gateway: Gateway, engine: Peer, stream: bool) -> None:
    replica = engine.replica("demo")
    replica.capabilities.logprobs = True
    await gateway.route(deployment_route(replica))
    asking = asyncio.create_task(gateway.chat(n=2, logprobs=True, stream=stream))
    rows = []
    for s in await submitted(engine, 2):
        row = last_row(s, 0, [7], f"{s.choice}")
        assert row.detail is not None
        row.detail.logprobs.add(token_id=7, token=b"%d" % s.choice, logprob=-0.5)
        rows.append(row)
    engine.send(*rows)
    response = await asking
    found = choices_of(response) if stream else {c["index"]: [c] for c in response.json()["choices"]}
    for number in range(2):
        entries = [entry for c in found[number] if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert [entry["token"] for entry in entries] == [str(number)]


@pytest.mark.parametrize("n", [0, -1, 9])
async def test_too_many_choices_are_refused_by_name(gateway: Gateway, n: int) -> None:
    response = await gateway.chat(n=n)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")


async def test_a_deployment_that_cannot_tell_choices_apart_says_so(gateway: Gateway, engine: Peer) -> None:
    replica = engine.replica("demo")
    replica.capabilities.max_choices = 1
    await gateway.route(deployment_route(replica))
    response = await gateway.chat(n=2)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_choice_that_fails_before_anything_was_shown_fails_the_request(
    gateway: Gateway, engine: Peer, stream: bool
) -> None:
    asking = asyncio.create_task(gateway.chat(n=2, stream=stream))
    first, second = await submitted(engine, 2)
    engine.send(error_row(second, BadRequest("not this", param="messages")))
    response = await asking
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    await engine.cancelled(first)
    assert gateway.metric('inference_requests_total{deployment="demo",outcome="BAD_REQUEST"}') == 1


async def test_a_choice_that_fails_in_mid_stream_ends_it_with_one_error(gateway: Gateway, engine: Peer) -> None:
    asking = asyncio.create_task(gateway.chat(n=3, stream=True))
    streams = await submitted(engine, 3)
    engine.send(Row(streams[0], 0, [1], "a"), Row(streams[1], 0, [1], "b"))
    engine.send(error_row(streams[1], BadRequest("not this"), 1))
    data = parts((await asking).text)
    assert "[DONE]" not in data
    assert ["error" in json.loads(d) for d in data].count(True) == 1
    assert "error" in json.loads(data[-1])
    await engine.cancelled(streams[0])
    await engine.cancelled(streams[2])
    assert not gateway.worker.live.requests


async def test_a_client_that_leaves_ends_every_choice(gateway: Gateway, engine: Peer) -> None:
    body = b'{"model":"demo","n":2,"stream":true,"messages":[{"role":"user","content":"hi"}]}'
    reader, writer = await gateway.connect()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    first, second = await submitted(engine, 2)
    engine.send(Row(first, 0, [1], "a"))
    await reader.readuntil(b'"content":"a"')
    writer.close()
    await engine.cancelled(first)
    await engine.cancelled(second)
    await until(lambda: not gateway.worker.live.requests, "no request")
    assert gateway.metric('inference_requests_total{deployment="demo",outcome="cancelled"}') == 1


async def test_the_record_of_a_request_whose_client_left_has_its_prompt(gateway: Gateway, engine: Peer) -> None:
    """What was read is work, also where nothing came of it."""
    for n in (1, 2):
        engine.submissions.clear()
        asking = asyncio.create_task(gateway.chat(n=n))
        streams = await submitted(engine, n)
        before = gateway.metric('inference_tokens_in_total{deployment="demo"}')
        engine.send_admitted(*((s, 31) for s in streams))
        await until(lambda: all(r.input_tokens for r in gateway.worker.live.requests), "the admission")
        asking.cancel()
        for s in streams:
            await engine.cancelled(s)
        await until(lambda: not gateway.worker.live.requests, "no request")
        assert gateway.metric('inference_tokens_in_total{deployment="demo"}') == before + 31


async def test_a_silent_request_is_kept_alive_once_for_all_choices(start: Start, engine: Peer) -> None:
    async with start(http={"keepalive_s": 0.3}) as gateway:
        await gateway.route(deployment_route(engine.replica("demo")))
        asking = asyncio.create_task(gateway.chat(n=2, stream=True))
        first, second = await submitted(engine, 2)
        live = next(iter(gateway.worker.live.requests))
        since = live.quiet_since
        await until(lambda: live.quiet_since > since, "a comment")
        engine.send(last_row(first, 0, [1], "a"), last_row(second, 0, [1], "b"))
        text = (await asking).text
        assert text.startswith(": waiting\n")
        assert text.count(": waiting") == 1 + (live.quiet_since - since > 0.6)
        assert set(choices_of(await asking)) == {0, 1}


# --- broken, and gone on --------------------------------------------------------------------------------------------------------


async def test_each_choice_goes_on_behind_its_own_last_token(gateway: Gateway, engine: Peer) -> None:
    asking = asyncio.create_task(gateway.chat(n=2, stream=True))
    first, second = await submitted(engine, 2)
    engine.send(Row(first, 0, [1], "a"), Row(second, 0, [2], "x"), Row(second, 1, [3], "y"))
    engine.cut(EngineLost("gone"))
    again = await submitted(engine, 2, after=2)
    assert [[(p.choice, list(p.token_ids)) for p in s.generated_prefix] for s in again] == [[(0, [1])], [(1, [2, 3])]]
    assert [s.epoch for s in again] == [1, 1]
    engine.send(last_row(again[0], 1, [4], "b"), last_row(again[1], 2, [5], "z"))
    response = await asking
    texts = {k: "".join(c["delta"].get("content") or "" for c in v) for k, v in choices_of(response).items()}
    assert texts == {0: "ab", 1: "xyz"}
    assert gateway.metric('inference_resumptions_total{deployment="demo",outcome="resumed"}') == 2


def _ends(choice: int, stop: str) -> int:
    """Tokens of a choice up to the one that completes the stop string, or all."""
    codec, tokens = ScriptedCodec(), expected_tokens(user_says(PROMPT), SEED, choice, TOKENS)
    spelt = (b"".join(map(codec.token_bytes, tokens[:n])).decode() for n in range(TOKENS))
    return next((n for n, text in enumerate(spelt) if stop in text), TOKENS)


#: Late in choice 1, and no part of choice 0.
WORDS = expected_text(user_says(PROMPT), SEED, 1, TOKENS).split(" ")
STOP = f"{WORDS[57][-1]} {WORDS[58]} {WORDS[59][:4]}"


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("broken_at", [0, 1, 2, 31, 56, 57, 58])
@pytest.mark.parametrize("broken", [(0,), (1,), (0, 1)], ids=["the first", "the second", "both"])
async def test_trap_08_choices_that_are_broken_are_the_undisturbed_ones(
    start: Start, broken: Sequence[int], broken_at: int, stream: bool
) -> None:
    """Trap 8 with n=2, a stop string that ends one of them, and a seed: text, finish reasons and usage of each choice."""
    lengths = [_ends(0, STOP), _ends(1, STOP)]
    assert lengths == [TOKENS, 59]
    async with breaking("a", ScriptedCodec(), lambda: None) as engine, start() as gateway:
        engine.break_choice_at = dict.fromkeys(broken, broken_at)
        await gateway.route(deployment_route(engine.replica("demo")))
        fields: dict[str, Any] = {"max_tokens": TOKENS, "seed": SEED, "n": 2, "stop": [STOP]}
        fields["messages"] = [{"role": "user", "content": PROMPT}]
        if stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        response = await gateway.chat(**fields)
        assert response.status_code == 200, response.text
        if stream:
            found = choices_of(response)
            usage = json.loads(parts(response.text)[-2])["usage"]
            got = {
                k: ("".join(c["delta"].get("content") or "" for c in v), [c["finish_reason"] for c in v if c["finish_reason"]])
                for k, v in found.items()
            }
        else:
            usage = response.json()["usage"]
            got = {c["index"]: (c["message"]["content"], [c["finish_reason"]]) for c in response.json()["choices"]}
        second = expected_text(user_says(PROMPT), SEED, 1, TOKENS).partition(STOP)[0]
        assert got == {0: (expected_text(user_says(PROMPT), SEED, 0, TOKENS), ["length"]), 1: (second, ["stop"])}
        assert usage["completion_tokens"] == sum(lengths)
        assert usage["prompt_tokens"] == len(ScriptedCodec().encode_chat(user_says(PROMPT)))
        truth = [expected_tokens(user_says(PROMPT), SEED, choice, TOKENS) for choice in broken]
        assert sorted(engine.prefixes) == sorted(t[:broken_at] for t in truth)  # each was broken, and continued from there


# --- the gRPC door ------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def stub(gateway: Gateway) -> AsyncIterator[gateway_service_pb2_grpc.GatewayServiceStub]:
    channel = open_channel(gateway.worker.rpc.address)
    yield gateway_service_pb2_grpc.GatewayServiceStub(channel)  # type: ignore[no-untyped-call]
    await channel.close(None)


def _generate(n: int) -> gateway_service_pb2.GenerateRequest:
    prompt = ChatPrompt((Message(Role.USER, (TextPart("hi"),)),))
    return gateway_service_pb2.GenerateRequest(
        request=request_to_proto(GenerationRequest("", "demo", prompt, SamplingParams(n=n, seed=4)))
    )


async def test_a_call_for_two_choices_streams_both_and_counts_at_the_end(
    stub: gateway_service_pb2_grpc.GatewayServiceStub, engine: Peer
) -> None:
    call = stub.Generate(_generate(2))
    first, second = await submitted(engine, 2)
    engine.send(Row(first, 0, [1], "a"), Row(second, 0, [2], "x"))
    engine.send(last_row(second, 1, [3], "y"))
    engine.send(last_row(first, 1, [4, 5], "b"))
    chunks = [c async for c in call]
    assert [(c.choice, c.index, list(c.token_ids), c.text) for c in chunks] == [
        (0, 0, [1], "a"), (1, 0, [2], "x"), (1, 1, [3], "y"), (0, 1, [4, 5], "b"),
    ]  # fmt: skip
    assert [c.detail.HasField("usage") for c in chunks] == [False, False, False, True]
    assert (chunks[-1].detail.usage.input_tokens, chunks[-1].detail.usage.output_tokens) == (3, 5)
    assert [bool(c.detail.finish_reason) for c in chunks] == [False, False, True, True]


async def test_a_call_whose_second_choice_fails_ends_with_its_error(
    stub: gateway_service_pb2_grpc.GatewayServiceStub, engine: Peer
) -> None:
    call = stub.Generate(_generate(2))
    first, second = await submitted(engine, 2)
    engine.send(Row(first, 0, [1], "a"), error_row(second, BadRequest("not this")))
    seen: list[str] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for chunk in call:
            seen.append(chunk.text)
    assert seen == ["a"]
    error: InferenceError = error_from_rpc(caught.value)
    assert isinstance(error, BadRequest)
    await engine.cancelled(first)


async def test_the_client_tells_choices_apart_and_does_not_mix_them_up(gateway: Gateway, engine: Peer) -> None:
    async with InferenceClient(gateway.worker.rpc.address) as client:
        with pytest.raises(BadRequest):
            await client.complete("demo", "hi", SamplingParams(n=2))

        async def ask() -> list[TokenChunk]:
            return [chunk async for chunk in client.generate("demo", "hi", SamplingParams(n=2))]

        asking = asyncio.create_task(ask())
        first, second = await submitted(engine, 2)
        engine.send(last_row(second, 0, [7], "two"))
        engine.send(last_row(first, 0, [8, 9], "one"))
        chunks = await asking
    assert [(c.choice, c.text, c.finish_reason, c.usage and c.usage.output_tokens) for c in chunks] == [
        (1, "two", FinishReason.STOP, None), (0, "one", FinishReason.STOP, 3),
    ]  # fmt: skip


async def test_choices_are_what_the_scripted_runtime_says_they_are() -> None:
    """The helper that the tests above trust: a choice is its own stream of the same seed."""
    prompt = ScriptedCodec().encode_chat(user_says(PROMPT))
    apart = [list(islice(scripted_tokens(prompt, SEED, choice), TOKENS)) for choice in range(2)]
    assert apart == [expected_tokens(user_says(PROMPT), SEED, choice, TOKENS) for choice in range(2)]
    assert apart[0] != apart[1]

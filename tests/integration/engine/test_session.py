"""Sessions and Execute over real gRPC: one frame a step, exact streams, typed refusals, nothing that waits for a slow reader."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from inference_runtime.errors import (
    Backpressure,
    BadRequest,
    ContextLengthExceeded,
    InferenceError,
    NoReplica,
    RevisionMismatch,
    Timeout,
    Unsupported,
)
from inference_runtime.generation import FinishReason, Priority, SamplingParams
from inference_runtime.rpc import error_from_rpc, error_from_status, open_channel
from inference_runtime.testing.scripted import expected_text, expected_tokens, user_says
from inference_runtime.v1 import common_pb2, engine_service_pb2, engine_service_pb2_grpc
from tests.integration.engine.kit import Answer, EngineUnderTest, assignment, running_engine, session, submission, until


def check_exact(answer: Answer, says: str, n: int, *, prefix: int = 0, seed: int | None = None) -> None:
    """The stream is the scripted answer: nothing lost, doubled, reordered or foreign."""
    assert answer.error is None
    assert answer.token_ids == expected_tokens(user_says(says), seed, 0, n)[prefix:]
    whole, before = (expected_text(user_says(says), seed, 0, k) for k in (n, prefix))
    assert answer.text == whole[len(before) :]


async def test_a_session_streams_every_request_exactly() -> None:
    """M08, N05: text, tokens, finish and usage of requests that run together."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("chat", {"pace_s": 0.002}))
        assert gateway.welcome is not None
        assert (gateway.welcome.engine_id, gateway.welcome.boot_id, gateway.welcome.protocol_version) == ("engine-1", "boot-1", 1)
        await gateway.send(
            *(submission(i, "chat", f"says {i}", sampling=SamplingParams(max_tokens=20, seed=i)) for i in range(1, 17))
        )
        for i in range(1, 17):
            answer = await gateway.answer(i)
            check_exact(answer, f"says {i}", 20, seed=i)
            assert answer.finish is FinishReason.LENGTH
            assert answer.usage is not None
            assert answer.usage.output_tokens == 20
            assert answer.usage.input_tokens > 0


async def test_trap_09_requests_run_at_once_and_a_step_is_one_frame() -> None:
    """32 requests take the steps of one, and each frame holds all of them."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("batch", {"pace_s": 0.02}))
        begin = asyncio.get_running_loop().time()
        await gateway.send(*(submission(i, "batch", f"{i}", sampling=SamplingParams(max_tokens=10)) for i in range(32)))
        for i in range(32):
            check_exact(await gateway.answer(i), f"{i}", 10)
        assert asyncio.get_running_loop().time() - begin < 32 * 10 * 0.02 / 4
        assert len(gateway.frames) <= 13  # ten steps; the batch may need a few to form
        assert max(len(f.stream_ids) for f in gateway.frames) == 32


async def test_columns_that_hold_only_defaults_stay_empty() -> None:
    """One token a row, epoch 0 and choice 0 cost no bytes."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("columns", {"pace_s": 0.002}))
        await gateway.send(submission(1, "columns"), submission(2, "columns"))
        await gateway.answer(1)
        await gateway.answer(2)
        assert all(not f.token_counts and not f.epochs and not f.choices and f.texts for f in gateway.frames)
        await gateway.send(submission(3, "columns", epoch=4))
        await gateway.answer(3)
        assert set(gateway.frames[-1].epochs) == {4}


async def test_trap_09_a_gateway_that_does_not_read_blocks_nobody_and_is_ended() -> None:
    """Its session ends beyond the bound, its requests are cancelled, and the other gateway never waits."""
    async with running_engine(buffer=3000) as engine:
        await engine.host(assignment("slow", {"tokens_per_step": 8, "pace_s": 0.002}, {"max_concurrent": 64}))
        async with open_channel(engine.address) as channel:
            stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
            stalled = stub.Session()
            await stalled.write(engine_service_pb2.SessionRequest(hello=engine_service_pb2.SessionHello(gateway_id="stalled")))
            long = SamplingParams(max_tokens=20_000)
            many = [submission(i, "slow", f"{i}", sampling=long) for i in range(32)]
            await stalled.write(engine_service_pb2.SessionRequest(submissions=many))
            await until(lambda: engine.load("slow-0").running == 32, "the stalled gateway's requests run")
            async with session(engine, "reads") as gateway:
                await gateway.send(submission(1, "slow", sampling=SamplingParams(max_tokens=400)))
                check_exact(await gateway.answer(1), "hello", 400)
            await until(lambda: engine.load("slow-0").running == 0, "the stalled session's requests are cancelled")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await stalled.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
                    pass
            assert isinstance(error_from_rpc(caught.value), Backpressure)


async def test_a_gateway_that_leaves_while_a_message_is_on_its_way_is_no_surprise(caplog: pytest.LogCaptureFixture) -> None:
    """Everything it ran is cancelled, and the log holds no error."""
    async with running_engine() as engine:
        await engine.host(assignment("leaves", {"tokens_per_step": 8, "pace_s": 0.002}))
        async with open_channel(engine.address) as channel:
            stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Session()
            await call.write(engine_service_pb2.SessionRequest(hello=engine_service_pb2.SessionHello(gateway_id="leaves")))
            long = SamplingParams(max_tokens=20_000)
            many = [submission(i, "leaves", sampling=long) for i in range(32)]
            await call.write(engine_service_pb2.SessionRequest(submissions=many))
            await until(lambda: any(s.waiting > 500 for s in engine.service.sessions), "its messages are stuck")
            call.cancel()
            await until(lambda: engine.load("leaves-0").running == 0, "its requests are gone")
            await until(lambda: not engine.service.sessions, "its session is gone")
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


async def test_trap_08_max_concurrent_binds_and_load_is_real() -> None:
    """Three run, the others wait, and both counts return to 0."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("narrow", {"pace_s": 0.02}, {"max_concurrent": 3}))
        await gateway.send(*(submission(i, "narrow", f"{i}", sampling=SamplingParams(max_tokens=5)) for i in range(9)))
        await until(lambda: engine.load("narrow-0").running == 3, "three run")
        load = engine.load("narrow-0")
        assert (load.running, load.queued) == (3, 6)
        assert load.pending_tokens > 9 * 3
        for i in range(9):
            check_exact(await gateway.answer(i), f"{i}", 5)
        assert max(len(f.stream_ids) for f in gateway.frames) == 3
        load = engine.load("narrow-0")
        assert (load.running, load.queued, load.pending_tokens, load.kv_use) == (0, 0, 0, 0.0)


async def test_trap_08_places_are_given_back_by_cancel_error_and_timeout() -> None:
    """However a request ends, its place is free."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("places", {"pace_s": 0.01}, {"max_concurrent": 2}))
        long = SamplingParams(max_tokens=20_000)
        await gateway.send(*(submission(i, "places", sampling=long) for i in (1, 2)), submission(3, "places"))
        await until(lambda: engine.load("places-0").running == 2, "two run")
        await gateway.send(cancel=((1, 0),))
        check_exact(await gateway.answer(3), "hello", 10)
        await gateway.send(cancel=((2, 0),))
        await gateway.send(submission(4, "places", sampling=long, time_left_s=0.1))
        assert isinstance((await gateway.answer(4)).error, Timeout)
        await gateway.send(submission(5, "places", sampling=SamplingParams(max_tokens=10**9)))
        assert isinstance((await gateway.answer(5)).error, ContextLengthExceeded)
        load = engine.load("places-0")
        assert (load.running, load.queued) == (0, 0)


async def test_a_full_queue_refuses_at_once_and_a_rejecting_deployment_has_none() -> None:
    """D06, E10: bounded, typed, and what was admitted still runs."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("full", {"pace_s": 0.02}, {"max_concurrent": 1, "queue_capacity": 2}))
        reject = {"max_concurrent": 1, "queue_capacity": 100, "on_capacity_exhausted": "reject"}
        await engine.host(assignment("reject", {"pace_s": 0.02}, reject))
        await gateway.send(*(submission(i, "full") for i in range(1, 5)), *(submission(i, "reject") for i in range(11, 13)))
        for refused in (4, 12):
            error = (await gateway.answer(refused)).error
            assert isinstance(error, Backpressure)
            assert error.retry_after_s is not None
        for admitted in (1, 2, 3, 11):
            check_exact(await gateway.answer(admitted), "hello", 10)


async def test_higher_priorities_go_first_and_equals_in_order() -> None:
    """FIFO within a priority."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("order", {"pace_s": 0.01}, {"max_concurrent": 1}))
        priorities = [Priority.NORMAL, Priority.BACKGROUND, Priority.NORMAL, Priority.HIGH, Priority.CRITICAL, Priority.HIGH]
        few = SamplingParams(max_tokens=2)
        await gateway.send(*(submission(i, "order", sampling=few, priority=p) for i, p in enumerate(priorities)))
        for i in range(len(priorities)):
            await gateway.answer(i)
        ended = sorted(range(len(priorities)), key=lambda i: gateway.answers[i].frames[-1])
        assert ended == [0, 4, 3, 5, 2, 1]


async def test_a_cancelled_request_stops_and_the_end_of_a_session_stops_all() -> None:
    """G13: within one step, in both ways."""
    async with running_engine() as engine:
        await engine.host(assignment("cancel", {"pace_s": 0.005}))
        long = SamplingParams(max_tokens=20_000)
        async with session(engine) as gateway:
            await gateway.send(*(submission(i, "cancel", sampling=long) for i in (1, 2, 3)))
            await until(lambda: engine.load("cancel-0").running == 3, "three run")
            await gateway.send(cancel=((1, 0), (2, 7)))  # the second names another attempt: ignored
            await until(lambda: engine.load("cancel-0").running == 2, "one is gone")
            count = len(gateway.answers[1].token_ids)
            await until(lambda: len(gateway.answers[2].token_ids) > count + 5, "the other goes on")
            assert len(gateway.answers[1].token_ids) <= count + 1
        await until(lambda: engine.load("cancel-0").running == 0, "the session's end cancels the rest")
        cancels = engine.telemetry.metrics.prometheus_text().decode()
        assert "inference_cancel_to_stop_seconds_count" in cancels


async def test_a_stream_is_continued_from_a_prefix() -> None:
    """R-journal: indexes go on, only new text comes, usage counts the whole."""
    async with running_engine() as engine, session(engine) as gateway:
        a = assignment("resume", {"pace_s": 0.002})
        await engine.host(a)
        prefix = tuple(expected_tokens(user_says("hello"), n=4))
        await gateway.send(submission(1, "resume", prefix=prefix, revision=a.revision, epoch=1))
        answer = await gateway.answer(1)
        check_exact(answer, "hello", 10, prefix=4)
        assert answer.indexes[0] == 4
        assert answer.usage is not None
        assert answer.usage.output_tokens == 10
        whole = tuple(expected_tokens(user_says("hello"), n=10))
        await gateway.send(submission(2, "resume", prefix=whole, revision=a.revision))
        answer = await gateway.answer(2)
        assert (answer.token_ids, answer.text, answer.finish) == ([], "", FinishReason.LENGTH)


async def test_a_prefix_with_a_token_that_the_model_lacks_costs_nobody_else_anything() -> None:
    """A client brings tokens back in an event id: they are input like any other."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("resume", {"pace_s": 0.002}))
        await gateway.send(submission(1, "resume"), submission(2, "resume", prefix=(300, 2**32 - 1)))
        error = (await gateway.answer(2)).error
        assert isinstance(error, BadRequest)
        assert error.param == "generated_prefix"
        check_exact(await gateway.answer(1), "hello", 10)


async def test_a_stop_string_that_the_prefix_began_is_completed() -> None:
    """Stop strings survive a move to another replica."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("stops", {"pace_s": 0.002}))
        tokens = expected_tokens(user_says("hello"), n=10)
        texts = [expected_text(user_says("hello"), n=k) for k in range(11)]
        stop = texts[5][len(texts[4]) - 2 :][:5]  # begins in the fourth token, ends in the fifth
        sampling = SamplingParams(max_tokens=10, stop=(stop,))
        await gateway.send(
            submission(1, "stops", sampling=sampling), submission(2, "stops", sampling=sampling, prefix=tuple(tokens[:4]))
        )
        first, second = await gateway.answer(1), await gateway.answer(2)
        assert (first.finish, first.stop_sequence, first.text) == (FinishReason.STOP, stop, texts[10][: texts[10].index(stop)])
        assert (second.finish, second.stop_sequence, second.text) == (FinishReason.STOP, stop, "")
        assert second.token_ids == tokens[4:5]


async def test_coalesced_tokens_come_in_groups_and_the_rest_at_the_end() -> None:
    """A unary request needs one message, not one a token."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("groups", {"pace_s": 0.001}))
        await gateway.send(submission(1, "groups", coalesce_tokens=4), submission(2, "groups", coalesce_tokens=10_000))
        grouped, whole = await gateway.answer(1), await gateway.answer(2)
        check_exact(grouped, "hello", 10)
        check_exact(whole, "hello", 10)
        assert grouped.indexes == [0, 4, 8]
        assert whole.indexes == [0]
        assert whole.usage is not None


async def test_credits_bound_what_is_sent_and_grants_let_the_rest_go() -> None:
    """To the token, with several tokens a step."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("credits", {"tokens_per_step": 3, "pace_s": 0.001}))
        await gateway.send(submission(1, "credits", credits=4))
        await until(lambda: engine.load("credits-0").running == 0, "the sequence is generated")
        await gateway.send(submission(2, "credits"))
        await gateway.answer(2)
        assert len(gateway.answers[1].token_ids) == 4
        await gateway.send(credit=((1, 5),))
        await until(lambda: len(gateway.answers[1].token_ids) == 9, "five more come")
        assert not gateway.answers[1].over
        await gateway.send(credit=((1, 100),))
        check_exact(await gateway.answer(1), "hello", 10)


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_choices_of_one_request_are_apart_and_continued_as_themselves(isolation: str) -> None:
    """A choice is a function of (seed, choice, index): equal seeds, different answers, each the same wherever it goes on, on the
    next context included."""
    sampling = SamplingParams(max_tokens=10, seed=5)
    whole = [expected_tokens(user_says("hello"), 5, choice, 10) for choice in range(3)]
    async with running_engine() as engine, session(engine) as gateway:
        dies = isolation == "thread"  # a process of its own would die each time
        config = {"pace_s": 0.001, "poison_at_step": 5 if dies else 0}
        await engine.host(assignment("choices", config, isolation=isolation))
        await gateway.send(*(submission(k, "choices", sampling=sampling, choice=k) for k in range(3)))
        assert [(await gateway.answer(k)).token_ids for k in range(3)] == whole
        assert engine.replica("choices-0").restarts == dies
        await gateway.send(submission(8, "choices", sampling=sampling, choice=2, prefix=tuple(whole[2][:4])))
        assert (await gateway.answer(8)).token_ids == whole[2][4:]
        strange = submission(9, "choices", sampling=sampling, choice=1)
        strange.generated_prefix.add(choice=0, token_ids=whole[0][:4])
        await gateway.send(strange)
        assert isinstance((await gateway.answer(9)).error, BadRequest)
        responses = await execute(engine, submission(0, "choices", sampling=sampling, choice=1))
        assert {r.choice for r in responses} == {1}
        assert [t for r in responses for t in r.token_ids] == whole[1]


async def test_the_length_of_a_prompt_is_told_at_its_admission_once() -> None:
    """Also of one that is tokenised in a thread, and of one that has no token yet: what is cancelled then has its cost too."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("quick", {}))
        await engine.host(assignment("later", {"first_token_delay_s": 30.0}))
        await gateway.send(submission(1, "quick"), submission(2, "quick", "x" * 5000), submission(3, "later"))
        usages = [(await gateway.answer(stream_id)).usage for stream_id in (1, 2)]
        await until(lambda: 3 in gateway.admitted, "the admission of what has no token yet")
        assert [u and u.input_tokens for u in usages] == [gateway.admitted[1], gateway.admitted[2]]
        assert gateway.admitted[3] == gateway.admitted[1]
        assert gateway.admitted[2] > 5000
        assert not gateway.answers[3].indexes


@pytest.mark.parametrize(
    ("wrong", "error", "metadata"),
    [
        ({"sampling": SamplingParams(max_tokens=40_000)}, ContextLengthExceeded, {"max_tokens": "32768"}),
        ({"says": "x" * 33_000}, ContextLengthExceeded, {"max_tokens": "32768"}),
        ({"sampling": SamplingParams(top_logprobs=2)}, Unsupported, {"feature": "logprobs"}),
        ({"sampling": SamplingParams(n=2)}, Unsupported, {"feature": "n"}),
        ({"sampling": SamplingParams(temperature=9.0)}, BadRequest, {"param": "temperature"}),
        ({"replica_id": "other-0"}, NoReplica, {}),
        ({"revision": "0000"}, RevisionMismatch, {}),
        ({"time_left_s": -1.0}, Timeout, {"phase": "admission"}),
    ],
)
async def test_refusals_are_typed_over_the_wire(
    wrong: dict[str, object], error: type[InferenceError], metadata: dict[str, str]
) -> None:
    """E03, E06, E07, E14: in a session as a chunk, in Execute as the status of the call; the session goes on."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("wrong", {"pace_s": 0.001}))
        bad = submission(1, "wrong", **wrong)  # type: ignore[arg-type]
        await gateway.send(bad, submission(2, "wrong"))
        refused = (await gateway.answer(1)).error
        assert type(refused) is error
        assert isinstance(refused, InferenceError)
        assert refused.metadata.items() >= metadata.items()
        check_exact(await gateway.answer(2), "hello", 10)
        async with open_channel(engine.address) as channel:
            stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Execute(engine_service_pb2.ExecuteRequest(submission=bad)):
                    pass
            assert type(error_from_rpc(caught.value)) is error


async def test_unknown_parts_of_a_request_are_refused_by_name() -> None:
    """Nothing is ignored silently."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("tools", {}))
        tools = submission(1, "tools")
        tools.request.tools.add(name="f")
        constraint = submission(2, "tools")
        constraint.request.constraint.regex = "a+"
        await gateway.send(tools, constraint)
        for stream_id, feature in ((1, "tools"), (2, "constraint")):
            error = (await gateway.answer(stream_id)).error
            assert isinstance(error, Unsupported)
            assert error.metadata["feature"] == feature


async def test_the_first_chunk_has_a_deadline_of_its_own() -> None:
    """E03: the phase is named."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("late", {"first_token_delay_s": 5.0}, timeouts={"first_chunk_s": 0.05}))
        await gateway.send(submission(1, "late"))
        error = (await gateway.answer(1)).error
        assert isinstance(error, Timeout)
        assert error.metadata["phase"] == "first_chunk"
        await until(lambda: engine.load("late-0").running == 0, "its place is free")


async def test_a_session_without_hello_is_refused() -> None:
    """The contract's first message."""
    async with running_engine() as engine, open_channel(engine.address) as channel:
        stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Session()
        await call.write(engine_service_pb2.SessionRequest())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert isinstance(error_from_rpc(caught.value), BadRequest)


async def execute(engine: EngineUnderTest, wanted: engine_service_pb2.Submission) -> list[engine_service_pb2.ExecuteResponse]:
    """All responses of one call."""
    async with open_channel(engine.address) as channel:
        stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
        return [r async for r in stub.Execute(engine_service_pb2.ExecuteRequest(submission=wanted))]


async def test_execute_streams_one_generation() -> None:
    """M01: the public face for gRPC clients."""
    async with running_engine() as engine:
        await engine.host(assignment("single", {"pace_s": 0.001}))
        responses = await execute(engine, submission(0, "single", epoch=2))
        assert [t for r in responses for t in r.token_ids] == expected_tokens(user_says("hello"), n=10)
        assert "".join(r.text for r in responses) == expected_text(user_says("hello"), n=10)
        assert [r.index for r in responses] == list(range(10))
        assert {(r.epoch, r.context_generation) for r in responses} == {(2, 1)}
        assert responses[-1].detail.usage.output_tokens == 10


async def test_cancelling_execute_stops_the_generation() -> None:
    """G13."""
    async with running_engine() as engine:
        await engine.host(assignment("quit", {"pace_s": 0.005}))
        async with open_channel(engine.address) as channel:
            stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
            wanted = submission(0, "quit", sampling=SamplingParams(max_tokens=20_000))
            call = stub.Execute(engine_service_pb2.ExecuteRequest(submission=wanted))
            await call.read()
            call.cancel()
            await until(lambda: engine.load("quit-0").running == 0, "the generation is gone")


async def test_get_engine_describes_replicas_and_load() -> None:
    """What `inferctl get engines` shows."""
    async with running_engine() as engine, open_channel(engine.address) as channel:
        await engine.host(assignment("seen", {}, {"max_concurrent": 7, "queue_capacity": 9}))
        stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
        answer = await stub.GetEngine(engine_service_pb2.GetEngineRequest())
        assert answer.engine.id == "engine-1"
        (replica,) = answer.replicas
        assert replica.state == common_pb2.REPLICA_STATE_SERVING
        assert (replica.max_concurrent, replica.queue_capacity, replica.max_context_tokens) == (7, 9, 32_768)
        assert replica.capabilities.resume
        assert replica.address == engine.address
        assert [x.replica_id for x in answer.loads] == ["seen-0"]


def test_an_error_detail_carries_our_error_back() -> None:
    """The pair of both directions."""
    from services.engine.session import error_detail

    detail = error_detail(ContextLengthExceeded("too long", tokens="9", max_tokens="8"), 3)
    assert detail.row == 3
    error = error_from_status(detail.error)
    assert isinstance(error, ContextLengthExceeded)
    assert error.metadata == {"tokens": "9", "max_tokens": "8"}

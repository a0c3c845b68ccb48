"""Signs of life: a session answers pings whatever its replicas do, and what is held back is not held for long (R-03, O01)."""

from __future__ import annotations

import asyncio

from inference_runtime.generation import SamplingParams
from inference_runtime.rpc import open_channel
from inference_runtime.v1 import engine_service_pb2, engine_service_pb2_grpc
from tests.integration.engine.kit import assignment, running_engine, session, submission


async def test_r_03_a_ping_is_answered_while_a_request_waits_for_its_first_token() -> None:
    """From the event loop, so that the length of a step says nothing about it."""
    async with running_engine() as engine:
        await engine.host(assignment("late", {"first_token_delay_s": 30.0}))
        async with open_channel(engine.address) as channel:
            stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Session()
            await call.write(engine_service_pb2.SessionRequest(hello=engine_service_pb2.SessionHello(gateway_id="pings")))
            async with asyncio.timeout(5):
                assert (await call.read()).welcome.answers_pings
                await call.write(engine_service_pb2.SessionRequest(submissions=[submission(1, "late")], ping=7))
                await call.write(engine_service_pb2.SessionRequest(ping=8))
                pongs = [0, 0]
                while pongs != [7, 8]:
                    message = await call.read()
                    if message.pong:
                        pongs = [pongs[1], message.pong]
            call.cancel()


async def test_tokens_that_are_held_back_leave_within_a_second_or_so() -> None:
    """Whoever wants its tokens in lumps of 256 still sees a slow answer begin and go on, long before there are as many."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("slowly", {"pace_s": 0.1}))
        asked = submission(1, "slowly", sampling=SamplingParams(max_tokens=25))
        asked.coalesce_tokens = 256
        await gateway.send(asked)
        answer = await gateway.answer(1)
        lumps = [count for frame in gateway.frames for count in (frame.token_counts or [1] * len(frame.stream_ids))]
        assert sum(lumps) == len(answer.token_ids) == 25
        assert 2 <= len(lumps) <= 4

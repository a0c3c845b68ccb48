"""An operator takes an engine out of service and puts it back, without ending it."""

from __future__ import annotations

import asyncio

from inference_runtime.errors import Draining
from inference_runtime.generation import SamplingParams
from inference_runtime.rpc import open_channel
from inference_runtime.v1 import common_pb2, engine_service_pb2, engine_service_pb2_grpc
from tests.integration.engine.kit import EngineUnderTest, assignment, running_engine, session, submission, until
from tests.integration.engine.test_drain import ENDLESS, LONG, begun
from tests.integration.engine.test_session import check_exact

SERVING, DRAINING = common_pb2.REPLICA_STATE_SERVING, common_pb2.REPLICA_STATE_DRAINING


async def order(engine: EngineUnderTest, *, undo: bool = False) -> int:
    """The RPC. Returns the requests that are left."""
    async with open_channel(engine.address) as channel:
        stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
        return int((await stub.DrainEngine(engine_service_pb2.DrainEngineRequest(undo=undo))).requests)


async def test_an_engine_is_taken_out_of_service_and_put_back() -> None:
    """Told to sessions and in its record; what runs ends, nothing new is taken; then everything is as before."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("op", {"pace_s": 0.01}))
        await gateway.send(submission(1, "op", sampling=LONG))
        await begun(gateway, 1)
        assert await order(engine) == 1
        await until(lambda: gateway.draining, "the gateway is told")
        assert engine.replicas.engine.state == common_pb2.ENGINE_STATE_DRAINING
        assert engine.replica("op-0").state == DRAINING
        await until(lambda: not engine.replicas.admits, "it is closed")
        await gateway.send(submission(2, "op"))
        assert isinstance((await gateway.answer(2)).error, Draining)
        check_exact(await gateway.answer(1), "hello", 100)
        assert await order(engine) == 0, "asking again changes nothing"

        assert await order(engine, undo=True) == 0
        await until(lambda: gateway.accepting, "the gateway is told")
        assert engine.replicas.engine.state == common_pb2.ENGINE_STATE_READY
        assert engine.replica("op-0").state == SERVING
        await gateway.send(submission(3, "op", "again"))
        check_exact(await gateway.answer(3), "again", 10)


async def test_an_order_that_is_taken_back_at_once_costs_running_requests_nothing() -> None:
    """The hand-over that was under way does not happen."""
    async with running_engine(drain_timeout_s=0.3, drain_notice_s=0.2) as engine, session(engine) as gateway:
        await engine.host(assignment("back", {"pace_s": 0.01}))
        await gateway.send(submission(1, "back", sampling=LONG))
        await begun(gateway, 1)
        await order(engine)
        await order(engine, undo=True)
        check_exact(await gateway.answer(1), "hello", 100)
        await gateway.send(submission(2, "back"))
        check_exact(await gateway.answer(2), "hello", 10)


async def test_what_does_not_end_in_time_is_handed_over_and_the_engine_stays() -> None:
    """The drain time-out holds for an operator too."""
    async with running_engine(drain_timeout_s=0.3) as engine, session(engine) as gateway:
        await engine.host(assignment("long", {"pace_s": 0.01}))
        await gateway.send(submission(1, "long", sampling=ENDLESS))
        await begun(gateway, 1)
        assert await order(engine) == 1
        assert isinstance((await gateway.answer(1)).error, Draining)
        await order(engine, undo=True)
        await gateway.send(submission(2, "long", sampling=SamplingParams(max_tokens=5)))
        check_exact(await gateway.answer(2), "hello", 5)


async def test_what_is_assigned_and_taken_back_meanwhile_is_so_afterwards() -> None:
    """The manager moves replicas away from an engine that drains; it may change its mind before the engine is back."""
    async with running_engine() as engine:
        await engine.host(assignment("stays", {}))
        await engine.host(assignment("goes", {}))
        await order(engine)
        engine.replicas.unassign("goes-0")
        engine.replicas.assign(assignment("comes", {}))
        engine.replicas.assign(assignment("regretted", {}))
        engine.replicas.unassign("regretted-0")
        await until(lambda: engine.withdrawn == ["goes-0"], "it is taken back")
        assert {r.id for r in engine.replicas.describe()} == {"stays-0"}
        await order(engine, undo=True)
        await until(
            lambda: {r.id: r.state for r in engine.replicas.describe()} == dict.fromkeys(("stays-0", "comes-0"), SERVING), ""
        )


async def test_an_engine_that_ends_cannot_be_put_back() -> None:
    """SIGTERM wins over an operator, whoever came first."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("ends", {}))
        await order(engine)
        engine.replicas.start_draining()
        await order(engine, undo=True)
        async with asyncio.timeout(5):
            await engine.replicas.drain()
        await gateway.send(submission(1, "ends"))
        assert isinstance((await gateway.answer(1)).error, Draining)

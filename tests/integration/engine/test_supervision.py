"""The two tiers: a context dies, its requests go on, its replica gives up only when it must (trap 12, R05, E13)."""

from __future__ import annotations

from inference_runtime.errors import Backpressure, ContextPoisoned, NoReplica, Quarantined, RequestTooLarge, Retry
from inference_runtime.generation import SamplingParams
from inference_runtime.rpc import open_channel
from inference_runtime.v1 import common_pb2, engine_service_pb2, engine_service_pb2_grpc
from tests.integration.engine.kit import assignment, core_of, running_engine, session, submission, until
from tests.integration.engine.test_session import check_exact, execute

LONG = SamplingParams(max_tokens=60)


async def test_trap_12_a_poison_in_the_middle_of_streams_is_healed_and_the_streams_are_exact() -> None:
    """The context is replaced, its requests are continued from their tokens, and the caller sees nothing of it."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("heal", {"pace_s": 0.002, "poison_at_token": 100}))
        await gateway.send(*(submission(i, "heal", f"{i}", sampling=LONG) for i in range(8)))
        for i in range(8):
            check_exact(await gateway.answer(i), f"{i}", 60)
        replica = engine.replica("heal-0")
        assert (replica.restarts, replica.state) == (1, common_pb2.REPLICA_STATE_SERVING)
        states = [r.state for r in engine.published if r.id == "heal-0"]
        assert states == [
            common_pb2.REPLICA_STATE_LOADING,
            common_pb2.REPLICA_STATE_SERVING,
            common_pb2.REPLICA_STATE_RESTARTING,
            common_pb2.REPLICA_STATE_SERVING,
        ]
        metrics = engine.telemetry.metrics.prometheus_text().decode()
        assert 'inference_context_restarts_total{deployment="heal",cause="context_poisoned"} 1' in metrics


async def test_trap_12_a_restart_works_more_than_once() -> None:
    """The factory of the original panicked the second time."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("again", {"pace_s": 0.001, "poison_at_step": 20, "poison_times": 3}))
        for i in range(1, 8):
            await gateway.send(submission(i, "again", f"{i}", sampling=SamplingParams(max_tokens=15)))
            check_exact(await gateway.answer(i), f"{i}", 15)
        assert engine.replica("again-0").restarts == 3
        assert engine.replica("again-0").state == common_pb2.REPLICA_STATE_SERVING


async def test_trap_12_the_fourth_death_within_a_minute_fails_the_replica_with_its_reason() -> None:
    """Everybody who waits is told, with a type; who comes later too."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("doomed", {"pace_s": 0.001, "poison_at_step": 3, "poison_times": 0}, {"max_concurrent": 1}))
        await gateway.send(*(submission(i, "doomed", f"{i}", sampling=LONG) for i in range(1, 6)))
        await until(lambda: engine.replica("doomed-0").state == common_pb2.REPLICA_STATE_FAILED, "the replica gives up")
        assert "more than 3 times within 60 s" in engine.replica("doomed-0").reason
        errors = [(await gateway.answer(i)).error for i in range(1, 6)]
        assert all(isinstance(error, Quarantined) for error in errors[:2])  # each was alone on two of them
        assert all(isinstance(error, ContextPoisoned) for error in errors[2:])
        assert (engine.load("doomed-0").running, engine.load("doomed-0").queued) == (0, 0)
        await gateway.send(submission(9, "doomed"))
        error = (await gateway.answer(9)).error
        assert isinstance(error, NoReplica)
        assert "doomed-0" in error.message


async def test_a_request_that_sees_two_contexts_die_is_ended() -> None:
    """It may be the cause; the others must not pay for it for ever."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("suspect", {"pace_s": 0.001, "poison_at_step": 5, "poison_times": 2}))
        await gateway.send(submission(1, "suspect", sampling=LONG))
        error = (await gateway.answer(1)).error
        assert isinstance(error, Quarantined)
        assert error.metadata["context_deaths"] == "2"
        await until(lambda: engine.replica("suspect-0").state == common_pb2.REPLICA_STATE_SERVING, "it serves again")
        await gateway.send(submission(2, "suspect", "another", sampling=LONG))
        check_exact(await gateway.answer(2), "another", 60)


async def test_requests_that_wait_during_a_restart_are_answered_by_the_next_context() -> None:
    """The queue survives the context."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("waits", {"pace_s": 0.002, "poison_at_step": 5, "load_s": 0.1}, {"max_concurrent": 1}))
        await gateway.send(*(submission(i, "waits", f"{i}") for i in (1, 2)))
        await until(lambda: engine.replica("waits-0").state == common_pb2.REPLICA_STATE_RESTARTING, "it restarts")
        await gateway.send(submission(3, "waits", "3"))
        for i in (1, 2, 3):
            check_exact(await gateway.answer(i), f"{i}", 10)


async def test_a_cancellation_during_a_restart_is_not_forgotten() -> None:
    """The request does not come back with the next context."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("gone", {"pace_s": 0.002, "poison_at_step": 5, "load_s": 0.1}))
        await gateway.send(submission(1, "gone", sampling=LONG))
        await until(lambda: engine.replica("gone-0").state == common_pb2.REPLICA_STATE_RESTARTING, "it restarts")
        await gateway.send(cancel=((1, 0),))
        await until(lambda: engine.load("gone-0").running == 0, "its place is free")
        await until(lambda: engine.replica("gone-0").state == common_pb2.REPLICA_STATE_SERVING, "it serves again")
        await gateway.send(submission(2, "gone"))
        await gateway.answer(2)
        assert {s for f in gateway.frames[-5:] for s in f.stream_ids} == {2}


async def test_a_batch_that_has_grown_too_large_sheds_its_newest_and_goes_on() -> None:
    """E10: the context is sound, the newest may go on elsewhere, and for a while fewer run at once."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("memory", {"pace_s": 0.01, "oom_at_step": 6}, {"max_concurrent": 4}))
        await gateway.send(*(submission(i, "memory", f"{i}", sampling=LONG) for i in range(1, 5)))
        error = (await gateway.answer(4)).error
        assert isinstance(error, Backpressure)
        assert error.metadata["cause"] == "out_of_memory"
        await gateway.send(submission(5, "memory", "5"))
        await until(lambda: engine.load("memory-0").queued == 1, "three places are left")
        for i in (1, 2, 3):
            check_exact(await gateway.answer(i), f"{i}", 60)
        check_exact(await gateway.answer(5), "5", 10)
        assert engine.replica("memory-0").restarts == 0


async def test_a_prompt_that_is_too_large_for_the_memory_ends_alone_and_everybody_else_is_exact() -> None:
    """R-07, E10: two steps fail for it; it is told so with 413, and not sent elsewhere. Alone it costs one step."""
    async with running_engine() as engine, session(engine) as gateway:
        await engine.host(assignment("huge", {"pace_s": 0.005, "oom_prompt_tokens": 500}))
        await gateway.send(*(submission(i, "huge", f"{i}", sampling=LONG) for i in range(1, 9)))
        await until(lambda: all(len(gateway.answers[i].token_ids) > 3 for i in range(1, 9)), "all run")
        await gateway.send(submission(9, "huge", "x" * 600), submission(10, "huge", "10"))
        error = (await gateway.answer(9)).error
        assert isinstance(error, RequestTooLarge)
        assert (error.http_status, error.retry) == (413, Retry.NEVER)
        for i in range(1, 9):
            check_exact(await gateway.answer(i), f"{i}", 60)
        check_exact(await gateway.answer(10), "10", 10)
        await gateway.send(submission(11, "huge", "y" * 600))
        error = (await gateway.answer(11)).error
        assert isinstance(error, RequestTooLarge)
        assert "nothing else" in error.message
        assert core_of(engine, "huge-0")._places == 32, "one prompt does not make the replica smaller"
        load = engine.load("huge-0")
        assert (load.running, load.queued, engine.replica("huge-0").state) == (0, 0, common_pb2.REPLICA_STATE_SERVING)


async def test_a_checkpoint_that_cannot_be_loaded_fails_the_replica_and_not_the_engine() -> None:
    """D08: the reason is the runner's sentence."""
    async with running_engine() as engine, session(engine) as gateway:
        engine.replicas.assign(assignment("missing", {"load_fails": True}))
        await until(lambda: engine.replica("missing-0").state == common_pb2.REPLICA_STATE_FAILED, "it fails")
        assert "load_fails" in engine.replica("missing-0").reason
        engine.replicas.assign(assignment("typo", {"pase_s": 1}))
        await until(lambda: engine.replica("typo-0").state == common_pb2.REPLICA_STATE_FAILED, "it fails")
        assert "did you mean 'pace_s'" in engine.replica("typo-0").reason
        unknown = assignment("unknown", {})
        unknown.spec.runtime = "surely-not-there"
        engine.replicas.assign(unknown)
        assert engine.replica("unknown-0").state == common_pb2.REPLICA_STATE_FAILED
        assert "surely-not-there" in engine.replica("unknown-0").reason
        await engine.host(assignment("sound", {}))
        await gateway.send(submission(1, "sound"))
        check_exact(await gateway.answer(1), "hello", 10)


async def test_a_replica_is_rebuilt_by_hand_and_what_runs_goes_on() -> None:
    """M02: the generation rises; no fault is counted against the request."""
    async with running_engine() as engine, session(engine) as gateway, open_channel(engine.address) as channel:
        await engine.host(assignment("manual", {"pace_s": 0.005}))
        stub = engine_service_pb2_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
        await gateway.send(submission(1, "manual", sampling=LONG))
        for generation in (2, 3, 4):
            seen = len(gateway.answers[1].token_ids)
            await until(lambda seen=seen: len(gateway.answers[1].token_ids) > seen, "it runs")  # type: ignore[misc]
            answer = await stub.RebuildReplica(engine_service_pb2.RebuildReplicaRequest(replica_id="manual-0"))
            assert answer.context_generation == generation
        check_exact(await gateway.answer(1), "hello", 60)
        assert {r.context_generation for r in await execute(engine, submission(0, "manual"))} == {4}


async def test_assignments_are_started_replaced_and_stopped() -> None:
    """P-node: the same revision takes over bounds, another one replaces the replica, removal drains it."""
    async with running_engine() as engine, session(engine) as gateway:
        first = assignment("moves", {"pace_s": 0.01}, {"max_concurrent": 4})
        await engine.host(first)
        await gateway.send(submission(1, "moves", sampling=SamplingParams(max_tokens=30)))
        await until(lambda: len(gateway.answers[1].token_ids) > 0, "it runs")
        bounds = assignment("moves", {"pace_s": 0.01}, {"max_concurrent": 2})
        bounds.generation = 2
        assert bounds.revision == first.revision
        engine.replicas.assign(bounds)
        assert (engine.replica("moves-0").max_concurrent, engine.replica("moves-0").generation) == (2, 2)
        other = assignment("moves", {"pace_s": 0.001})
        other.generation = 3
        engine.replicas.assign(other)
        assert engine.replica("moves-0").state == common_pb2.REPLICA_STATE_DRAINING
        check_exact(await gateway.answer(1), "hello", 30)
        await until(
            lambda: (
                any(r.id == "moves-0" and r.state == common_pb2.REPLICA_STATE_SERVING for r in engine.replicas.describe())
                and engine.replica("moves-0").revision == other.revision
            ),
            "the new revision serves",
        )
        engine.replicas.unassign("moves-0")
        await until(lambda: not engine.replicas.describe(), "it is stopped")
        assert engine.withdrawn == ["moves-0", "moves-0"]

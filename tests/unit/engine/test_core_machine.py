"""The engine's core as a state machine: admission, cancellation, credit, deaths, memory that runs out, resumption, in any order.

The core is the real one, with its worker, supervisor, queue and streams; the context below it is moved by hand, step by step.
Whatever happens: every request gets exactly one end, its tokens are the undisturbed ones up to there, and all places come back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inference_runtime.deployment import parse_deployment
from inference_runtime.errors import Backpressure, ContextPoisoned, InferenceError, Internal, Quarantined, RequestTooLarge
from inference_runtime.generation import FinishReason, GenerationRequest, Priority, SamplingParams, TextPrompt, TokenChunk
from inference_runtime.runner import (
    Capabilities,
    Isolation,
    LoadProgress,
    RunnerConfig,
    RunnerInfo,
    StepOutput,
    StepRequest,
    TransportKind,
)
from inference_runtime.runners.scripted import RUNTIME, scripted_tokens
from inference_runtime.settings import TelemetrySettings
from inference_runtime.stepping import OUT_OF_MEMORY, StepReport
from inference_runtime.supervision import ContextFault, Fault, Loss, RestartPolicy
from inference_runtime.supervision.policy import KILLED_STATUS
from inference_runtime.telemetry import Telemetry
from inference_runtime.testing.scripted import expected_tokens
from services.engine.context import OnStep
from services.engine.core import CoreState, EngineCore
from services.engine.measures import CoreMetrics
from services.engine.stream import Stream
from services.engine.submission import Submission

MAX_BATCH, QUEUE = 4, 4
KILLER = "kill"
POISONED = Fault(names=("ContextPoisoned", "InferenceError", "Exception"))
KILLED = Fault(exit_status=KILLED_STATUS, loss=Loss.EOF)

#: What a killer may be told: it did not get in, or it did not get far.
REFUSALS = {Backpressure.reason, Quarantined.reason}
LOSSES = {ContextPoisoned.reason, Quarantined.reason, RequestTooLarge.reason, Backpressure.reason, Internal.reason}

T = TypeVar("T")


class AtOnce(Executor):
    """Runs what it is given where it is given."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run it now."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as err:  # noqa: BLE001 - as an executor does
            future.set_exception(err)
        return future


class HandContext:
    """A context that does nothing by itself. Orders are carried out at the next step, as in the real ones."""

    def __init__(self, on_step: OnStep) -> None:
        self._deliver = on_step
        self._death: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._orders: list[StepRequest | int] = []
        self.live: dict[int, tuple[StepRequest, int]] = {}  # with the tokens each has
        self.closed = False
        self.steps = 0
        self.progress = LoadProgress(0, 0, "")

    @property
    def info(self) -> RunnerInfo:
        """A runner that can resume."""
        can = Capabilities(seed=True, resume=True, deterministic=True)
        return RunnerInfo("scripted", "m", TransportKind.LOCAL_CPU, Isolation.THREAD, can, 4096, MAX_BATCH)

    async def start(self) -> None:
        """At once."""

    async def died(self) -> Exception:
        """When told to."""
        return await asyncio.shield(self._death)

    async def close(self) -> None:
        """Nothing is delivered any more."""
        self.closed = True

    def admit(self, request: StepRequest) -> None:
        """At the next step."""
        assert not self.closed
        self._orders.append(request)

    def abort(self, sequence_id: int) -> None:
        """At the next step."""
        self._orders.append(sequence_id)

    def die(self, fault: Fault) -> None:
        """Now."""
        if not self._death.done():
            self._death.set_result(ContextFault(fault))

    @property
    def dead(self) -> bool:
        """Whether it is."""
        return self._death.done()

    def _read_orders(self) -> list[int]:
        aborted = []
        for order in self._orders:
            if isinstance(order, int):
                self.live.pop(order, None)
                aborted.append(order)
            else:
                assert order.sequence_id not in self.live
                self.live[order.sequence_id] = (order, len(order.generated_prefix))
        self._orders.clear()
        return aborted

    def step(self, tokens: int, *, memory: bool = True) -> None:
        """Give each sequence its next tokens, or fail all of them for want of memory, or die of a killer."""
        aborted = self._read_orders()
        self.steps += 1
        if any(bytes(r.prompt_token_ids).startswith(KILLER.encode()) for r, _ in self.live.values()):
            self.die(POISONED)
            return
        outputs = []
        for sequence_id, (request, done) in list(self.live.items()):
            if not memory:
                del self.live[sequence_id]
                error = Backpressure("out of memory", cause=OUT_OF_MEMORY)
                outputs.append(StepOutput(sequence_id, (), error=error))
                continue
            stream = scripted_tokens(request.prompt_token_ids, request.sampling.seed or 0, request.choice, done)
            size = min(tokens, request.sampling.max_tokens - done)
            made = tuple(next(stream) for _ in range(size))
            finish = FinishReason.LENGTH if done + size == request.sampling.max_tokens else None
            self.live[sequence_id] = (request, done + size)
            if finish is not None:
                del self.live[sequence_id]
            outputs.append(StepOutput(sequence_id, made, finish))
        if outputs or aborted:
            self._deliver(StepReport(outputs, aborted, 0.5, 0.001))

    def fail_one(self, at: int) -> None:
        """One sequence fails alone."""
        self._read_orders()
        if self.live:
            sequence_id = sorted(self.live)[at % len(self.live)]
            del self.live[sequence_id]
            self._deliver(StepReport([StepOutput(sequence_id, (), error=Internal("failed alone"))], [], 0.5, 0.001))


@dataclass(eq=False)
class Client:
    """Who asked, and what came."""

    prompt: str
    tokens: int
    prefix: tuple[int, ...]
    stream: Stream | None = None
    credit: int = 0
    received: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    cancelled: bool = False

    def admitted(self, stream: Stream, input_tokens: int) -> None:
        """Its prompt is as long as it is."""
        assert input_tokens == len(self.prompt)

    def chunk(self, stream: Stream, chunk: TokenChunk) -> None:
        """In order, within the credit, and not after the end."""
        assert not self.ends, "something followed the end"
        assert not self.cancelled, "something followed the cancellation"
        assert chunk.index == len(self.prefix) + len(self.received), "a gap, or tokens twice"
        self.received += chunk.token_ids
        if self.credit:
            assert len(self.received) <= self.credit, "more than was granted"
        if chunk.finish_reason is not None:
            self.ends.append("finished")

    def error(self, stream: Stream, err: InferenceError) -> None:
        """The end."""
        assert not self.cancelled
        self.ends.append(err.reason)

    def check(self) -> None:
        """The undisturbed tokens as far as it got, and all of them when it finished."""
        whole = expected_tokens(self.prompt, n=self.tokens)[len(self.prefix) :]
        assert self.received == whole[: len(self.received)], "foreign tokens"
        assert len(self.ends) <= 1
        if self.ends == ["finished"]:
            assert self.received == whole


class CoreMachine(RuleBasedStateMachine):
    """Everything that can happen to a core."""

    @initialize()
    def begin(self) -> None:
        """A replica that serves."""
        self.runner = asyncio.Runner()
        self.contexts: list[HandContext] = []
        self.clients: list[Client] = []
        self.states: list[CoreState] = []
        self.runner.run(self._begin())

    async def _begin(self) -> None:
        def make(config: RunnerConfig, name: str, generation: int, on_step: OnStep) -> HandContext:
            assert all(c.closed for c in self.contexts), "two contexts at once"
            self.contexts.append(HandContext(on_step))
            return self.contexts[-1]

        spec = parse_deployment(
            {"name": "d", "model": "m", "runtime": "scripted", "serving": {"max_concurrent": MAX_BATCH, "queue_capacity": QUEUE}}
        )
        self.core = EngineCore(
            "d-0",
            spec,
            "rev",
            RUNTIME,
            contexts=make,
            policy=RestartPolicy(max_restarts=10**6, short_lives=10**6, backoff_s=(0.0,)),
            tokenisers=AtOnce(),
            metrics=CoreMetrics(Telemetry("engine", TelemetrySettings())),
            on_change=lambda core: self.states.append(core.state),
        )
        self.task = asyncio.ensure_future(self.core.run())
        await self._settle()
        assert self.core.state is CoreState.SERVING

    async def _settle(self) -> None:
        for _ in range(12):  # turns of the loop: a death, its supervisor, the next context, who boards it
            await asyncio.sleep(0)

    def run(self, act: Callable[[], object]) -> None:
        """Do something on the loop and let it have its consequences."""

        async def body() -> None:
            act()
            await self._settle()

        self.runner.run(body())

    @property
    def context(self) -> HandContext:
        """The present one."""
        return self.contexts[-1]

    # --- rules -------------------------------------------------------------------------------------------------------

    @rule(
        number=st.integers(0, 6),
        tokens=st.integers(1, 8),
        done=st.integers(0, 3),
        credit=st.sampled_from((0, 0, 1, 4)),
        group=st.sampled_from((0, 0, 3)),
        tenant=st.sampled_from("ab"),
        priority=st.sampled_from(list(Priority)),
        deaths=st.sampled_from((0, 0, 0, 1)),
    )
    def submit(
        self, number: int, tokens: int, done: int, credit: int, group: int, tenant: str, priority: Priority, deaths: int
    ) -> None:
        """A request arrives, perhaps with what it was given elsewhere."""
        self._submit(f"prompt {number}", tokens, done, credit, group, tenant, priority, deaths)

    @rule(number=st.integers(0, 2), done=st.integers(0, 2), deaths=st.sampled_from((0, 0, 1)))
    def submit_killer(self, number: int, done: int, deaths: int) -> None:
        """One arrives that kills in each step."""
        self._submit(f"{KILLER} {number}", 6, done, 0, 0, "a", Priority.NORMAL, deaths)

    @rule(number=st.integers(0, 2))
    def submit_long(self, number: int) -> None:
        """One arrives that is tokenised after it was admitted."""
        self._submit(f"{number}" * 1500, 5, 0, 0, 0, "b", Priority.NORMAL, 0)

    def _submit(
        self, prompt: str, tokens: int, done: int, credit: int, group: int, tenant: str, priority: Priority, deaths: int
    ) -> None:
        prefix = tuple(expected_tokens(prompt, n=min(done, tokens)))
        client = Client(prompt, tokens, prefix, credit=credit)
        request = GenerationRequest(
            f"r{len(self.clients)}", "d", TextPrompt(prompt), SamplingParams(max_tokens=tokens), priority, tenant=tenant
        )
        submission = Submission(request, prefix=prefix, credits=credit, coalesce_tokens=group, context_deaths=deaths)

        def act() -> None:
            try:
                client.stream = self.core.submit(submission, client)
            except InferenceError as err:
                client.ends.append(err.reason)

        self.clients.append(client)
        self.run(act)

    @rule(tokens=st.integers(1, 3), times=st.integers(1, 3))
    def step(self, tokens: int, times: int) -> None:
        """The context works."""
        for _ in range(times):
            if not self.context.dead:
                self.run(lambda: self.context.step(tokens))

    @rule(tokens=st.integers(1, 2))
    def run_out_of_memory(self, tokens: int) -> None:
        """The next step is too large."""
        if not self.context.dead:
            self.run(lambda: self.context.step(tokens, memory=False))

    @rule(at=st.integers(0, 3))
    def fail_one(self, at: int) -> None:
        """One sequence fails by a fault of its own."""
        if not self.context.dead:
            self.run(lambda: self.context.fail_one(at))

    @rule(fault=st.sampled_from((POISONED, KILLED)))
    def die(self, fault: Fault) -> None:
        """The context dies by chance, or by somebody's hand."""
        self.run(lambda: self.context.die(fault))

    @rule()
    def rebuild(self) -> None:
        """Somebody asks for another context."""
        self.run(self.core.rebuild)

    @rule()
    def die_and_rebuild_at_once(self) -> None:
        """Two reasons in one turn of the loop."""

        def act() -> None:
            self.core.rebuild()
            self.context.die(POISONED)

        self.run(act)

    @precondition(lambda self: any(c.stream for c in self.clients))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A client leaves, perhaps after its answer was complete."""
        client = data.draw(st.sampled_from([c for c in self.clients if c.stream]))
        assert client.stream is not None
        over = bool(client.ends)
        self.run(client.stream.cancel)
        client.cancelled = not over

    @precondition(lambda self: any(c.stream and c.credit for c in self.clients))
    @rule(data=st.data(), tokens=st.integers(1, 5))
    def grant(self, data: st.DataObject, tokens: int) -> None:
        """A reader keeps up."""
        client = data.draw(st.sampled_from([c for c in self.clients if c.stream and c.credit]))
        self._grant(client, tokens)

    def _grant(self, client: Client, tokens: int) -> None:
        assert client.stream is not None
        client.credit += tokens
        self.run(lambda: client.stream.grant(tokens))  # type: ignore[union-attr]

    # --- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def what_came_is_right(self) -> None:
        """No token lost, doubled or foreign; one end at most."""
        for client in getattr(self, "clients", ()):
            client.check()

    @invariant()
    def places_are_kept(self) -> None:
        """Never more than may run, and the counts agree with what is there."""
        if hasattr(self, "core"):
            core = self.core
            assert 0 <= core.running <= MAX_BATCH
            assert core.running + core.queued == len(core._streams) <= MAX_BATCH + QUEUE
            assert core.state in (CoreState.SERVING, CoreState.RESTARTING)
            open_ones = {c.stream for c in self.clients if c.stream and not c.stream.ended}
            assert open_ones == set(core._streams.values())

    def teardown(self) -> None:
        """In the end everybody has an end, and the replica is as empty as at the beginning."""
        if not hasattr(self, "core"):
            return
        try:
            self._end()
        finally:
            self.runner.run(self._stop())
            self.runner.close()

    def _end(self) -> None:
        for client in self.clients:
            if client.stream and client.credit:
                self._grant(client, 100)
        for _ in range(400):
            if not self.core._streams:
                break
            self.run(lambda: self.context.step(1))
        for client in self.clients:
            client.check()
            assert bool(client.ends) != client.cancelled, f"{client.prompt}: {client.ends}"
            if client.prompt.startswith(KILLER) and client.ends:
                assert client.ends[0] in (*REFUSALS, *LOSSES) or len(client.prefix) == client.tokens
        core, worker = self.core, self.core._worker
        assert (core.running, core.queued, core.pending_tokens(), len(core._admission.room)) == (0, 0, 0, 0)
        assert not worker._flights
        assert worker._probation.empty() == []
        assert core.state is CoreState.SERVING

    async def _stop(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        assert asyncio.all_tasks() == {asyncio.current_task()}


CoreMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestCore = CoreMachine.TestCase

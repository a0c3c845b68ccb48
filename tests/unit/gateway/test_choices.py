"""Several choices of one request: each its own stream, together one request, whatever happens to them in whatever order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_runtime.errors import Backpressure, BadRequest, ContextPoisoned, EngineLost, InferenceError, Unsupported
from inference_runtime.rpc import status_from_error
from inference_runtime.settings import TelemetrySettings
from inference_runtime.telemetry import Telemetry
from inference_runtime.v1 import common_pb2, coordinator_service_pb2, engine_service_pb2, generation_pb2
from services.gateway import request as request_module
from services.gateway.choices import Choices
from services.gateway.live import LiveRequests
from services.gateway.needs import needs_of
from services.gateway.request import Request
from services.gateway.routes import RouteTable
from services.gateway.sessions import Receiver
from services.gateway.settings import LimitSettings
from services.gateway.usage import UsageEntry

Submission = engine_service_pb2.Submission
ChunkDetail = engine_service_pb2.ChunkDetail
PROMPT_TOKENS = 7


class Engine:
    """The far end of a session, driven by hand: what was submitted and not taken back."""

    up = True
    silent = False
    silence = 0

    def listen(self) -> None:
        """Nothing is said in silence."""

    def __init__(self) -> None:
        self.streams: dict[int, tuple[Submission, Receiver]] = {}
        self.submitted: list[Submission] = []
        self.cancelled: list[int] = []

    def submit(self, submission: Submission, receiver: Receiver) -> int:
        copy = Submission()
        copy.CopyFrom(submission)
        self.submitted.append(copy)
        stream_id = len(self.submitted)
        self.streams[stream_id] = (copy, receiver)
        receiver.on_admitted(PROMPT_TOKENS)
        return stream_id

    def cancel(self, stream_id: int, epoch: int) -> None:
        if self.streams.pop(stream_id, None) is not None:
            self.cancelled.append(stream_id)

    def forget(self, stream_id: int) -> None:
        self.streams.pop(stream_id, None)

    def of(self, choice: int) -> tuple[int, Submission, Receiver] | None:
        """The stream that generates this choice at present."""
        for stream_id, (submission, receiver) in self.streams.items():
            if submission.choice == choice:
                return stream_id, submission, receiver
        return None


class Shown:
    """A client's view of one choice."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.done = 0
        self.errors: list[InferenceError] = []

    def token(self, index: int, token: int, text: str) -> None:
        self.chunk(index, [token], text, None, False)

    def chunk(self, index: int, tokens: Sequence[int], text: str, detail: ChunkDetail | None, done: bool) -> None:
        assert not self.done
        assert index == len(self.tokens)
        self.tokens += tokens
        self.done += done

    def fail(self, error: InferenceError) -> None:
        self.errors.append(error)

    def hold(self) -> None: ...

    def release(self) -> None: ...

    def keep_alive(self) -> None: ...

    def resumed(self, count: int) -> None: ...


class Ledger:
    """Records of ended requests."""

    def __init__(self) -> None:
        self.entries: list[UsageEntry] = []

    def add(self, entry: UsageEntry) -> None:
        self.entries.append(entry)

    def only(self) -> tuple[int, int, str]:
        """The one record there is: tokens of the prompt, of the output, and the outcome."""
        (entry,) = self.entries
        return entry[3], entry[4], entry[8]


class World:
    """One gateway worker's requests over one engine with one replica."""

    def __init__(self, limits: LimitSettings | None = None, max_choices: int = 8) -> None:
        self.engine, self.ledger = Engine(), Ledger()
        self.telemetry = Telemetry("gateway", TelemetrySettings())
        table = RouteTable(lambda engine_id, address: self.engine)
        replica = common_pb2.Replica(
            id="r-0", deployment="demo", engine_id="e", address="a", revision="r1", state=common_pb2.REPLICA_STATE_SERVING,
            capabilities=common_pb2.Capabilities(chat=True, resume=True, seed=True, max_choices=max_choices),
        )  # fmt: skip
        line = coordinator_service_pb2.DeploymentRoute(deployment="demo", runtime="scripted", replicas=[replica])
        table.apply(coordinator_service_pb2.WatchRoutesResponse(revision=1, snapshot=True, deployments=[line]))
        self.target = table.targets["r-0"]
        self.live = LiveRequests(table, limits or LimitSettings(), self.ledger, self.telemetry, 15.0)
        self.shown: list[Shown] = []

    def ask(self, n: int, *, stream: bool = True, model: str = "demo") -> Request | Choices:
        """A request for n choices, sent off."""
        submission = Submission()
        submission.request.request_id, submission.request.deployment, submission.request.sampling.n = "one", model, n
        self.shown = [Shown() for _ in range(n)]
        needs = needs_of(submission.request.sampling)
        request = self.live.begin_choices(submission, self.shown, shows_at_once=stream, needs=needs)
        request.begin()
        return request

    def check_clean(self) -> None:
        """Nothing is left of any request."""
        assert not self.live.requests
        assert not self.live.waiting
        assert not self.engine.streams
        assert self.target.in_flight == 0
        assert self.live.budget("demo").in_flight == 0


def token(choice: int, index: int) -> int:
    """The answer, as every engine would make it."""
    return 100 * (choice + 1) + index


def end(index: int, finish: generation_pb2.FinishReason = generation_pb2.FINISH_REASON_LENGTH) -> ChunkDetail:
    """The detail of a choice's last chunk."""
    return ChunkDetail(finish_reason=finish, usage=generation_pb2.Usage(input_tokens=PROMPT_TOKENS, output_tokens=index))


def failure(error: InferenceError) -> ChunkDetail:
    """The detail that ends an attempt."""
    return ChunkDetail(error=status_from_error(error))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further attempts begin with the next turn of the loop."""
    monkeypatch.setattr(request_module, "JITTER_S", (0.0, 0.0))


async def running_again(world: World, request: Request | Choices, choices: Sequence[int]) -> None:
    """Wait until each of these runs or is complete. The one replica is tried again at once, by the sweeper's means."""
    async with asyncio.timeout(10):
        while not request.ended and any(not world.shown[c].done and world.engine.of(c) is None for c in choices):
            for waiting in tuple(world.live.waiting):
                waiting._again_at = 0.0
                waiting.try_again(time.monotonic())
            await asyncio.sleep(0)


async def test_each_choice_is_a_submission_of_its_own_and_the_record_is_one() -> None:
    world = World()
    world.ask(3)
    assert [(s.choice, s.request.sampling.n, s.request.request_id) for s in world.engine.submitted] == [
        (0, 0, "one"), (1, 0, "one"), (2, 0, "one"),
    ]  # fmt: skip
    for choice, length in ((1, 2), (0, 3), (2, 1)):
        stream = world.engine.of(choice)
        assert stream is not None
        for index in range(length - 1):
            stream[2].on_token(0, index, token(choice, index), "x")
        stream[2].on_chunk(0, length - 1, [token(choice, length - 1)], "x", end(length))
    assert [shown.tokens for shown in world.shown] == [[100, 101, 102], [200, 201], [300]]
    assert [shown.done for shown in world.shown] == [1, 1, 1]
    assert world.ledger.entries[0][:2] == ("one", "demo")
    assert world.ledger.only() == (PROMPT_TOKENS, 6, "ok")
    world.check_clean()


async def test_a_choice_that_breaks_goes_on_by_itself() -> None:
    world = World()
    request = world.ask(2)
    for choice in range(2):
        stream = world.engine.of(choice)
        assert stream is not None
        stream[2].on_token(0, 0, token(choice, 0), "x")
    broken = world.engine.of(1)
    assert broken is not None
    broken[2].on_chunk(0, 1, [], "", failure(ContextPoisoned("again")))
    await running_again(world, request, [1])
    again = world.engine.submitted[-1]
    assert (again.choice, again.epoch, again.revision) == (1, 1, "r1")
    assert [(p.choice, list(p.token_ids)) for p in again.generated_prefix] == [(1, [200])]
    whole = world.engine.of(0)
    assert whole is not None
    assert whole[1].epoch == 0  # nobody disturbed the other one
    whole[2].on_chunk(0, 1, [101], "x", end(2))
    rest = world.engine.of(1)
    assert rest is not None
    rest[2].on_chunk(1, 1, [201], "x", end(2))
    assert [shown.tokens for shown in world.shown] == [[100, 101], [200, 201]]
    assert [entry[8] for entry in world.ledger.entries] == ["ok"]
    world.check_clean()


@pytest.mark.parametrize("stream", [True, False])
async def test_one_choice_that_cannot_be_saved_ends_all_of_them_with_one_error(stream: bool) -> None:
    world = World()
    request = world.ask(3, stream=stream)
    first = world.engine.of(0)
    second = world.engine.of(1)
    assert first is not None
    assert second is not None
    first[2].on_token(0, 0, 100, "x")
    second[2].on_chunk(0, 0, [], "", failure(BadRequest("no")))
    assert request.ended
    assert [len(shown.errors) for shown in world.shown] == [1, 0, 0]  # told once, through the sink of the first
    assert sorted(world.engine.cancelled) == [1, 3]
    assert world.ledger.only() == (PROMPT_TOKENS, 1, BadRequest.reason)
    first[2].on_token(0, 1, 101, "x")  # what was on its way
    assert world.shown[0].tokens == [100]
    world.check_clean()


async def test_a_cancelled_request_stops_every_choice_and_its_record_knows_the_prompt() -> None:
    world = World()
    request = world.ask(2)
    stream = world.engine.of(1)
    assert stream is not None
    stream[2].on_token(0, 0, 200, "x")
    request.cancel()
    request.cancel()
    assert sorted(world.engine.cancelled) == [1, 2]
    assert world.ledger.only() == (PROMPT_TOKENS, 1, "cancelled")
    assert not any(shown.errors for shown in world.shown)
    world.check_clean()


async def test_a_cancelled_request_for_one_choice_has_its_prompt_in_the_record_too() -> None:
    """Also one that is cancelled before its first token: its prompt was work."""
    world = World()
    world.ask(1).cancel()
    assert world.ledger.only() == (PROMPT_TOKENS, 0, "cancelled")


async def test_a_request_counts_as_many_as_it_has_choices() -> None:
    world = World(LimitSettings(max_requests=5))
    first = world.ask(3)
    with pytest.raises(Backpressure):
        world.ask(3)
    second = world.ask(2)
    with pytest.raises(Backpressure):
        world.ask(1)
    first.cancel()
    third = world.ask(3)
    for request in (second, third):
        request.cancel()
    world.check_clean()


async def test_a_deployment_that_cannot_tell_choices_apart_refuses_them_by_name() -> None:
    world = World(max_choices=1)
    world.ask(2)
    (error,) = world.shown[0].errors
    assert isinstance(error, Unsupported)
    assert error.param == "n"
    assert not world.engine.submitted
    world.check_clean()


async def test_an_unknown_deployment_is_one_error_and_no_record() -> None:
    world = World()
    world.ask(2, model="other")
    assert [len(shown.errors) for shown in world.shown] == [1, 0]
    assert not world.ledger.entries
    assert not world.live.requests


async def test_choices_that_wait_for_a_replica_are_sent_when_there_is_one() -> None:
    world = World()
    world.engine.up = False
    world.ask(2)
    assert not world.engine.submitted
    assert len(world.live.waiting) == 2
    world.engine.up = True
    world.live.wake()
    assert {s.choice for s in world.engine.submitted} == {0, 1}
    next(iter(world.live.requests)).cancel()
    world.check_clean()


LENGTHS = (3, 5, 4)
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["next", "next", "next", "batch", "again", "old", "gap", "poison", "lost"]), st.integers(0, 2)),
    max_size=60,
)


async def _play(actions: Sequence[tuple[str, int]], cancel_after: int | None) -> None:
    world = World(LimitSettings(max_resumptions=10, max_retries=10, move_floor=1000, retry_floor=1000))
    request = world.ask(3)
    for at, (action, choice) in enumerate(actions):
        if at == cancel_after:
            request.cancel()
        stream = world.engine.of(choice)
        if stream is None:
            continue
        stream_id, submission, receiver = stream
        epoch, shown, length = submission.epoch, len(world.shown[choice].tokens), LENGTHS[choice]
        match action:
            case "next" | "batch":
                until = min(length, shown + (1 if action == "next" else 2))
                tokens = [token(choice, i) for i in range(shown, until)]
                if until == length:
                    receiver.on_chunk(epoch, shown, tokens, "", end(length))
                    world.engine.forget(stream_id)
                elif len(tokens) == 1:
                    receiver.on_token(epoch, shown, tokens[0], "")
                else:
                    receiver.on_chunk(epoch, shown, tokens, "", None)
            case "again" if shown:
                receiver.on_token(epoch, shown - 1, 999, "")
            case "old" if epoch:
                receiver.on_token(epoch - 1, shown, 999, "")
            case "gap":
                receiver.on_token(epoch, shown + 1, 999, "")
            case "poison":
                receiver.on_chunk(epoch, shown, [], "", failure(ContextPoisoned("poisoned")))
            case "lost":
                world.engine.forget(stream_id)
                receiver.on_lost(EngineLost("gone"))
        await running_again(world, request, range(3))
    truth = [[token(choice, i) for i in range(length)] for choice, length in enumerate(LENGTHS)]
    for shown_choice, expected in zip(world.shown, truth, strict=True):
        assert shown_choice.tokens == expected[: len(shown_choice.tokens)]
    complete = all(shown_choice.done for shown_choice in world.shown)
    if not request.ended:
        assert not complete
        request.cancel()
    input_tokens, output_tokens, outcome = world.ledger.only()
    assert input_tokens == PROMPT_TOKENS
    assert output_tokens == sum(len(shown_choice.tokens) for shown_choice in world.shown)
    assert (outcome == "ok") == complete
    assert [len(shown_choice.errors) for shown_choice in world.shown[1:]] == [0, 0]
    world.check_clean()


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.none() | st.integers(0, 40))
def test_whatever_happens_in_whatever_order_each_choice_is_exact_and_the_request_is_settled_once(
    actions: list[tuple[str, int]], cancel_after: int | None
) -> None:
    """Choices are broken, doubled, skipped and cancelled in any order: none shows a token that is not its own, or one twice."""
    asyncio.run(_play(actions, cancel_after))

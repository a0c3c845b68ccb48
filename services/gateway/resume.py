"""Streams whose clients may come back: what is kept of each, what happens when its client leaves, how it goes on.

A stream that this worker serves is followed from its first moment to its end, copied to another gateway meanwhile, and kept for a
while afterwards. A client that comes back, here or there, names the last event it has. Whoever serves the stream at that moment
stops; the answer goes on behind that event.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from inference_runtime.errors import Backpressure, DeploymentNotFound, Draining, NoReplica, Retry, error_class
from inference_runtime.telemetry import MetricSet, get_logger
from inference_runtime.v1 import engine_service_pb2, gateway_peer_service_pb2, generation_pb2
from services.gateway.kept import KeptSink, SkippingSink
from services.gateway.needs import needs_of
from services.gateway.peers import PeerTable
from services.gateway.records import Plan, Record, RecordStore, StreamNotFound
from services.gateway.replication import Copied, Replicator
from services.gateway.request import Request
from services.gateway.sink import Sink

if TYPE_CHECKING:
    from services.gateway.live import LiveRequests
    from services.gateway.settings import ResumeSettings

__all__ = ["Line", "Resumer", "Served", "Terms"]

log = get_logger(__name__)

StreamEnd = gateway_peer_service_pb2.StreamEnd
StreamHeader = gateway_peer_service_pb2.StreamHeader

#: The first event of a stream waits for its copy for this long at most, seconds. Without another gateway nothing waits.
GATE_S = 0.25
#: Seconds between two looks at what is too old.
HOUSEKEEPING_S = 1.0
#: Clients that come back at once. More are told to try again.
MAX_JOBS = 1024


@dataclass(frozen=True, slots=True)
class Terms:
    """What an answer looks like to its client."""

    format: gateway_peer_service_pb2.StreamFormat
    include_usage: bool
    logprobs: bool


class Line(Protocol):
    """The connection to a client."""

    on_disconnect: Callable[[], None] | None

    def gate(self) -> None:
        """Hold back what is sent until `open_gate`."""
        ...

    def open_gate(self) -> None:
        """Let it go. Harmless without a gate."""
        ...

    def abort(self) -> None:
        """Close it, now."""
        ...


class Served(Copied):
    """A stream that this worker serves.

    Args:
        resumer: What it is one of.
        request: Its request.
        line: To its client.
        terms: What it looks like.
        before: What is known from whoever served it before; None for a new one.
        keep_s: Time that it goes on without a client, seconds.
    """

    __slots__ = ("_before", "_gate", "_leaving", "_resumer", "_terms", "keep_s", "kept", "line")

    def __init__(
        self, resumer: Resumer, request: Request, line: Line, terms: Terms, before: Record | None, keep_s: float
    ) -> None:
        super().__init__(request)
        self._resumer, self.line, self._terms, self._before, self.keep_s = resumer, line, terms, before, keep_s
        self.kept: KeptSink | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self._gate: asyncio.TimerHandle | None = None
        if keep_s:
            self.kept = KeptSink(request, request.sink)
            request.sink = self.kept

    def gate(self) -> None:
        """Show nothing before another gateway knows of the stream, or a moment has passed."""
        self.line.gate()
        self._gate = asyncio.get_running_loop().call_later(GATE_S, self.on_safe)

    def on_safe(self) -> None:
        """Open the gate."""
        if self._gate is not None:
            self._gate.cancel()
            self._gate = None
            self.line.open_gate()

    def header(self) -> StreamHeader:
        """What is known of it from the beginning on."""
        request, terms = self.request, self._terms
        header = StreamHeader(
            request=request.submission.request,
            format=terms.format,
            include_usage=terms.include_usage,
            logprobs=terms.logprobs,
            attachment=self.attachment,
        )
        # Field by field: every stream pays for this, and the helpers of these types cost more than all the rest.
        accepted_at, age = header.accepted_at, header.age
        accepted_at.seconds, accepted_at.nanos = divmod(request.accepted_ns, 1_000_000_000)
        age_s = time.monotonic() - (self._before.began if self._before is not None else request.began)
        age.seconds = int(age_s)
        age.nanos = int(age_s % 1 * 1e9)
        return header

    @property
    def attachment(self) -> int:
        """How often its client has come back."""
        return self._before.attachment + 1 if self._before is not None else 0

    def left(self) -> None:
        """The client is gone: stop, or wait for it for as long as the deployment says."""
        self.on_safe()
        if self.kept is None or self._resumer.draining:
            self.request.cancel()
        elif not self.request.ended:
            self.kept.detach()
            self._leaving = asyncio.get_running_loop().call_later(self.keep_s, self.request.cancel)

    def came_back(self, line: Line) -> None:
        """A client has it again."""
        old, self.line = self.line, line
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        old.on_disconnect = None
        old.abort()
        if not self.request.ended:
            line.on_disconnect = self.left

    def give_up_waiting(self) -> None:
        """Stop, if its client is away."""
        if self._leaving is not None:
            self.request.cancel()

    def supersede(self) -> None:
        """Another one serves it from here on."""
        self.line.on_disconnect = None
        self.request.cancel()
        self.line.abort()

    def ended(self, outcome: str) -> None:
        """Its request is over, like this (see `LiveRequests.end`)."""
        if self._leaving is not None:
            self._leaving.cancel()
        self._resumer.ended(self, self._end(outcome))

    def _end(self, outcome: str) -> StreamEnd | None:
        """What is told of the end; None where nobody may come back to it."""
        request = self.request
        if outcome not in ("ok", "cancelled") and error_class(outcome).retry is not Retry.ELSEWHERE:
            return None
        end = StreamEnd(
            settled_input_tokens=max(request.input_tokens, request.settled_input_tokens),
            settled_output_tokens=max(request.output_tokens, request.settled_output_tokens),
        )
        if outcome == "ok":
            end.finish_reason = request.finish_reason  # type: ignore[assignment]
            usage = end.usage
            usage.input_tokens, usage.output_tokens = request.input_tokens, request.output_tokens
            usage.reasoning_tokens, usage.cached_input_tokens = request.reasoning_tokens, request.cached_input_tokens
        return end


class Resumer:
    """All of them.

    Args:
        live: Requests in flight.
        peers: The other gateways.
        settings: Bounds.
        metrics: Where their number is published.
    """

    def __init__(self, live: LiveRequests, peers: PeerTable, settings: ResumeSettings, metrics: MetricSet) -> None:
        self._live, self._peers = live, peers
        #: Clients may come back at all.
        self.offered = settings.window_s > 0
        self.store = RecordStore(settings.window_s, settings.max_streams, settings.max_bytes)
        self._replicator = Replicator(peers, settings.max_request_bytes, metrics)
        self._served: dict[str, Served] = {}
        #: Streams that ended while their client was away, with what they were to tell it.
        self._waiting: dict[str, tuple[KeptSink, Record]] = {}
        #: This worker ends: nobody is waited for any more.
        self.draining = False
        self._jobs: asyncio.Queue[Coroutine[None, None, None]] = asyncio.Queue(MAX_JOBS)
        self._records = metrics.gauge("inference_stream_records")
        self._peer_count = metrics.gauge("inference_gateway_peers")
        self._peer_count.set(0)
        self.outcomes = metrics.counter("inference_stream_returns_total", "outcome")

    # --- streams that begin and end ----------------------------------------------------------------------------------------

    def follow(self, request: Request, line: Line, terms: Terms, *, before: Record | None = None) -> None:
        """Follow a stream from its begin on; call it before the request's own `begin`."""
        route = self._live.table.routes.get(request.model)
        served = Served(self, request, line, terms, before, 0.0 if route is None else route.disconnected_timeout_s)
        self._served[request.request_id] = served
        request.follower = served
        line.on_disconnect = served.left
        self._replicator.add(served)
        if request.copied == 0:
            served.gate()

    def ended(self, served: Served, end: StreamEnd | None) -> None:
        """One is over."""
        request = served.request
        if self._served.get(request.request_id) is served:
            del self._served[request.request_id]
        request.follower = None  # parted, so that both are freed at once
        self._replicator.ended(served, end)
        if end is None:
            return
        now = time.monotonic()
        record = Record(served.header(), now)
        record.tokens.extend(request.journal.tokens)
        record.revision, record.end = request.revision, end
        kept = served.kept if end.finish_reason else None
        record.extra_bytes = kept.size_bytes if kept is not None else 0
        if self.store.put(record, now) and kept is not None:
            self._waiting[request.request_id] = kept, record

    # --- clients that come back --------------------------------------------------------------------------------------------

    def give_up(self, request_id: str, tenant: str, now: float) -> Record | None:
        """What is known here of a stream of this tenant. Where it is served here, it is no longer."""
        served = self._served.get(request_id)
        if served is not None and served.request.tenant == tenant:
            served.supersede()
        self._waiting.pop(request_id, None)
        record = self.store.get(request_id, now)
        return record if record is not None and record.tenant == tenant else None

    def kept(self, request_id: str, tenant: str) -> tuple[KeptSink, Served | None, StreamHeader] | None:
        """The stream as it was kept here for a client that was away, who serves it if it goes on, and what it is."""
        served = self._served.get(request_id)
        if served is not None:
            own = served.kept is not None and served.request.tenant == tenant
            return (served.kept, served, served.header()) if own and served.kept is not None else None
        waiting = self._waiting.get(request_id)
        if waiting is None or waiting[1] not in self.store or waiting[1].tenant != tenant:
            return None
        return waiting[0], None, StreamHeader.FromString(waiting[1].header)

    async def find(self, request_id: str, tenant: str) -> list[Record]:
        """What gateways know of a stream. None of them serves it any more, as far as it could be reached.

        Raises:
            StreamNotFound: There is none, or it is somebody else's.
            NoReplica: Not here, and this gateway has not heard yet which others there are: ask another one.
        """
        now = time.monotonic()
        own = self.give_up(request_id, tenant, now)
        found = [] if own is None else [own]
        for proto in await self._peers.take(request_id, tenant):
            if proto.header.request.tenant == tenant and proto.header.request.request_id == request_id:
                found.append(Record.from_proto(proto, now))
        if not found and not self._peers.complete:
            raise NoReplica("this gateway does not know the others yet, who may have this stream; ask them", retry_after_s=1)
        if not found:
            raise StreamNotFound
        return found

    def repeats(self, record: Record) -> bool:
        """Whether the runtime makes the same tokens again."""
        request = StreamHeader.FromString(record.header).request
        route = self._live.table.routes.get(request.deployment)
        sampling = request.sampling
        fixed = sampling.HasField("seed") or (sampling.HasField("temperature") and not sampling.temperature)
        targets = () if route is None else [t for t in route.targets if not record.revision or t.revision == record.revision]
        return fixed and bool(targets) and all(target.capabilities.deterministic for target in targets)

    def go_on(self, record: Record, way: Plan, sink: Sink, line: Line, terms: Terms, *, traceparent: str = "") -> Request:
        """A request that goes on with a stream. Give it to the sink, then call its `begin`.

        Raises:
            DeploymentNotFound: Its deployment is gone.
            Draining, Backpressure: As `LiveRequests.begin`.
        """
        header = StreamHeader.FromString(record.header)
        deployment = header.request.deployment
        route = self._live.table.routes.get(deployment)
        if route is None and self._live.table.known:
            raise DeploymentNotFound(f"the deployment of this stream, {deployment!r}, is gone", param="model")
        left_s = float("inf") if route is None else route.total_timeout_s - (time.monotonic() - record.began)
        skipping = SkippingSink(sink, way.skip_to) if way.skip_to >= 0 else None
        request = self._live.begin(
            engine_service_pb2.Submission(request=header.request),
            skipping or sink,
            shows_at_once=True,
            needs=needs_of(header.request.sampling),
            traceparent=traceparent,
            time_limit_s=left_s,
        )
        if skipping is not None:
            skipping.request = request
        request.accepted_ns = header.accepted_at.ToNanoseconds()
        request.go_on(way.prefix, record.revision)
        request.attempt = record.attachment + 1
        if record.end is not None:
            request.settled_input_tokens = record.end.settled_input_tokens
            request.settled_output_tokens = record.end.settled_output_tokens
        self.follow(request, line, terms, before=record)
        return request

    def over(self, record: Record) -> Request:
        """A request that is over, to tell the end of a stream from."""
        header = StreamHeader.FromString(record.header)
        request = self._live.past(engine_service_pb2.Submission(request=header.request))
        request.accepted_ns = header.accepted_at.ToNanoseconds()
        usage = generation_pb2.Usage() if record.end is None else record.end.usage
        request.recall(record.revision, usage, 0 if record.end is None else record.end.finish_reason)
        return request

    def drain(self) -> None:
        """This worker ends: streams whose clients are away stop, and go on where they come back."""
        self.draining = True
        for served in tuple(self._served.values()):
            served.give_up_waiting()

    # --- work --------------------------------------------------------------------------------------------------------------

    def do(self, job: Coroutine[None, None, None]) -> None:
        """Run a job in a task of ours. It raises nothing.

        Raises:
            Draining: This worker takes no streams any more, and leaves those of others alone.
            Backpressure: Too many wait.
        """
        if self._live.closed:
            job.close()
            raise Draining("this gateway is shutting down; ask another one", retry_after_s=1)
        try:
            self._jobs.put_nowait(job)
        except asyncio.QueueFull:
            job.close()
            raise Backpressure("too many clients come back at once; try again in a moment", retry_after_s=1) from None

    async def run(self) -> None:
        """Copy, look after what is kept, and do jobs, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._replicator.run(), name="stream copies")
                tasks.create_task(self._watch_peers(), name="gateways")
                tasks.create_task(self._tidy(), name="stream records")
                while True:
                    tasks.create_task(await self._jobs.get())
        finally:
            while not self._jobs.empty():
                self._jobs.get_nowait().close()

    async def _watch_peers(self) -> None:
        while True:
            await self._peers.changed.wait()
            self._peers.changed.clear()
            self._peer_count.set(len(self._peers.peers))
            self._replicator.wake()

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            self.store.expire(time.monotonic())
            for name in [name for name, (_, record) in self._waiting.items() if record not in self.store]:
                del self._waiting[name]
            self._records.set(len(self.store))
            await self._peers.close_gone(self._replicator.keeper)

    async def close(self) -> None:
        """Hand the last copies over. The last thing, once every request has ended."""
        await self._replicator.flush()
        await self._peers.close()

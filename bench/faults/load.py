"""The standing load: clients that stream without a pause and can tell to the token what they must get; and probes beside them.

Half of the clients speak HTTP, half gRPC; each stays with one gateway. Nothing is repeated for them. Only where a cell takes a
gateway down does a client that was refused before anything was answered ask another one, as every load balancer does; and there a
client over HTTP whose answer breaks off asks the other gateway for the rest, by `Last-Event-ID`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from bench.faults.asking import MODEL, PATIENCE_S, Answer, Broken, Failed, Outcome, Refused, over_grpc, over_http
from inference_runtime.client import InferenceClient
from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.history import History

__all__ = ["MODEL", "Answer", "Load", "Outcome"]

#: Seconds between two new requests that only ask whether new requests are answered.
PROBE_EVERY_S = 0.1
#: Seconds that a client waits before it asks again after a failure, so that a refused one does not spin.
AFTER_FAILURE_S = 0.1
#: How a request ended, by what was raised; anything else is a failure.
OUTCOMES: dict[type[BaseException], Outcome] = {Broken: "broken", Refused: "refused"}


class Load:
    """Streams and probes on one cluster.

    Args:
        cluster: It serves the deployment `MODEL` with the scripted runtime.
        streams: Streams that are open at any time.
        tokens: Tokens of each.
        rng: Where randomness comes from.
        elsewhere: Clients that are refused ask the next gateway.
    """

    def __init__(self, cluster: Cluster, *, streams: int, tokens: int, rng: random.Random, elsewhere: bool = False) -> None:
        self._cluster, self._streams, self._tokens, self._rng = cluster, streams, tokens, rng
        self._elsewhere = elsewhere
        self._addresses = [url.removeprefix("http://") for url in cluster.local.http_urls]
        self._clients: list[InferenceClient] = []
        self._seed = 0
        self._started: set[int] = set()
        self._all_started = asyncio.Event()
        self.history = History()
        self.answers: list[Answer] = []
        #: Requests that one gateway refused and another one was asked for.
        self.asked_elsewhere = 0
        #: Answers that broke off at one gateway and were asked to go on at another.
        self.came_back = 0
        #: Probes stay away from these gateways: they are dead on purpose.
        self.probed = list(range(len(self._addresses)))

    @property
    def gateways(self) -> int:
        """How many there are to ask."""
        return len(self._addresses)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load runs during the body; afterwards every request has come to its end."""
        stop = asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            for address in self._cluster.local.grpc_addresses:
                self._clients.append(await stack.enter_async_context(InferenceClient(gateway=address)))
            async with asyncio.TaskGroup() as tasks:
                for worker in range(self._streams):
                    tasks.create_task(self._work(worker, self._rng.random(), stop))
                tasks.create_task(self._probe(tasks, stop))
                try:
                    yield
                finally:
                    stop.set()

    async def started(self) -> None:
        """Return once every client has had its first token."""
        async with asyncio.timeout(PATIENCE_S):
            await self._all_started.wait()

    async def _work(self, worker: int, delay_s: float, stop: asyncio.Event) -> None:
        await asyncio.sleep(delay_s)  # streams are not in step with each other
        count = len(self._addresses)
        gateway, grpc = worker % count, bool(worker // count % 2)
        while not stop.is_set():
            answer = self.begin(gateway, self._tokens, kind="stream")
            await self.ask(answer, grpc=grpc, first=lambda: self._has_started(worker))
            if answer.outcome != "ended":
                await asyncio.sleep(AFTER_FAILURE_S)

    def _has_started(self, worker: int) -> None:
        self._started.add(worker)
        if len(self._started) == self._streams:
            self._all_started.set()

    async def _probe(self, tasks: asyncio.TaskGroup, stop: asyncio.Event) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            gateway = self.probed[number % len(self.probed)]
            tasks.create_task(self.ask(self.begin(gateway, 1, kind="probe")))
            await asyncio.sleep(PROBE_EVERY_S)

    def begin(self, gateway: int, tokens: int, *, kind: str, model: str = MODEL) -> Answer:
        """Note a request that is about to be asked. `kind` is "stream", "probe", or a name of the cell's own."""
        self._seed += 1
        name = f"{kind} {self._seed}"
        record = self.history.begin(name, seed=self._seed, tokens=tokens, name=name)
        answer = Answer(record, gateway, time.monotonic(), kind == "probe", model=model)
        self.answers.append(answer)
        return answer

    async def ask(self, answer: Answer, *, grpc: bool = False, first: Callable[[], None] = lambda: None) -> None:
        """Ask it, and note what comes of it. Raises nothing."""
        count = len(self._addresses)
        try:
            async with asyncio.timeout(PATIENCE_S):
                for attempt in range(count):
                    try:
                        if grpc:
                            await over_grpc(self._clients[answer.gateway], answer, first)
                        else:
                            await over_http(self._addresses[answer.gateway], answer, first)
                        break
                    except (Refused, Broken) as err:
                        if not self._elsewhere or attempt + 1 == count or (isinstance(err, Refused) and err.full):
                            raise
                        if isinstance(err, Refused):
                            self.asked_elsewhere += 1
                        elif grpc:
                            raise
                        else:
                            self.came_back += 1
                        answer.gateway = (answer.gateway + 1) % count
            answer.outcome = "ended"
            answer.record.end()
        except (Failed, Broken, Refused, TimeoutError) as err:
            answer.outcome = OUTCOMES.get(type(err), "failed")
            answer.error = str(err) or f"no end after {PATIENCE_S:g} s"
            answer.record.fail(answer.error)
        finally:
            answer.end = time.monotonic()

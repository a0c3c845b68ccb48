"""A TCP proxy that stands for the network between two processes: cut, cut one way, slow, stalling, or in slices of a few bytes.

    async with TcpProxy("127.0.0.1:2379") as door:
        ...                               # somebody is told to reach 127.0.0.1:2379 through door.address
        door.disturb(up=CUT, down=CUT)    # as a fault that is verified: testing.disturb

A cut is silence, as between hosts: connections stay open, what is sent waits until the cut is healed or the sender gives up,
and new connections are not passed on. What is counted is bytes, so that a fault can be seen to have had an effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import socket
import struct
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["CLEAR", "CUT", "Disturbance", "Lane", "TcpProxy", "process_of"]

#: Bytes read at once.
CHUNK_BYTES = 64 << 10
#: Chunks of one direction that wait while nothing passes; then reading stops and the sender's window closes.
HELD_CHUNKS = 16
#: Slices after which others get a turn.
SLICES_PER_TURN = 32


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What one direction of a connection does to bytes.

    Args:
        cut: Nothing passes.
        delay_s: Seconds that every byte takes.
        jitter_s: Up to this much more, at random. Bytes keep their order.
        stall_share: Share of chunks that wait for `stall_s`, and all behind them: what lost packets look like above TCP.
        stall_s: How long such a chunk waits, seconds: the least retransmission timeout of Linux.
        slice_bytes: Bytes are passed on in writes of this many; 0 for as they came.
    """

    cut: bool = False
    delay_s: float = 0.0
    jitter_s: float = 0.0
    stall_share: float = 0.0
    stall_s: float = 0.2
    slice_bytes: int = 0


CLEAR, CUT = Disturbance(), Disturbance(cut=True)


@dataclass(slots=True)
class Lane:
    """One direction of the connections that a disturbance concerns: what it does to them, and what came and went."""

    disturbance: Disturbance = CLEAR
    received: int = 0
    forwarded: int = 0
    writes: int = 0
    stalls: int = 0
    #: When the disturbance began, and the shortest time that a chunk was kept which came after that, seconds.
    since: float = 0.0
    kept_s: float = math.inf


class _End:
    """The end of a direction: in order, or torn."""

    def __init__(self, *, torn: bool) -> None:
        self.torn = torn


@dataclass(eq=False, slots=True)
class _Connection:
    """One connection from a client, and its other half once it was passed on."""

    client: asyncio.StreamWriter
    port: int
    concerned: bool = True
    server: asyncio.StreamWriter | None = None


class TcpProxy:
    """A door in front of one listening address. For one event loop; use it as an async context manager.

    Args:
        target: host:port that is passed on to.
        seed: Of jitter and stalls.

    A disturbance concerns every connection, or those of some processes only: then the others pass as if nothing were.
    """

    def __init__(self, target: str, *, seed: int = 0) -> None:
        self.target = target
        #: host:port of the door, once it is open.
        self.address = ""
        #: Connections that were passed on, and those that had to wait at the closed door; ever.
        self.passed_on = 0
        self.held_back = 0
        #: From clients to the target, and back: connections that the present disturbance concerns.
        self.up = Lane()
        self.down = Lane()
        self._calm_up, self._calm_down = Lane(), Lane()
        self._only: frozenset[int] | None = None
        self._rng = random.Random(seed)
        self._changed = asyncio.Event()
        self._connections: set[_Connection] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._server: asyncio.Server | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        assert self._server is not None
        self._closed = True
        self._server.close()
        self.clear()
        self.reset()
        await self._empty.wait()

    def disturb(self, *, up: Disturbance = CLEAR, down: Disturbance = CLEAR, only: Collection[int] | None = None) -> None:
        """From now on bytes fare like this, on open connections and on new ones. What was held and may pass now, passes.

        Args:
            up: From clients to the target.
            down: From the target to clients.
            only: Process ids of the clients that it concerns; None for all.
        """
        self._only = None if only is None else frozenset(only)
        for lane, disturbance in ((self.up, up), (self.down, down)):
            lane.disturbance, lane.since, lane.kept_s = disturbance, time.monotonic(), math.inf
        for connection in self._connections:
            self._classify(connection)
        self._changed.set()
        self._changed = asyncio.Event()

    def clear(self) -> None:
        """No disturbance any more."""
        self.disturb()

    def reset(self) -> int:
        """Tear every open connection (RST); how many there were."""
        for connection in self._connections:
            _tear(connection)
        return len(self._connections)

    # --- connections -------------------------------------------------------------------------------------------------

    def _classify(self, connection: _Connection) -> None:
        # Only a few processes are looked through: whoever opens a door shares its event loop with the load that is measured.
        door = int(self.address.rpartition(":")[2])
        connection.concerned = self._only is None or process_of(connection.port, door, self._only) in self._only

    def _lanes(self, connection: _Connection) -> tuple[Lane, Lane]:
        return (self.up, self.down) if connection.concerned else (self._calm_up, self._calm_down)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its arrival to its end."""
        connection = _Connection(writer, int(writer.get_extra_info("peername")[1]))
        self._connections.add(connection)
        self._empty.clear()
        try:
            self._classify(connection)
            await self._opened(connection)
            host, _, port = self.target.rpartition(":")
            behind, connection.server = await asyncio.open_connection(host, int(port))
            self.passed_on += 1
            async with asyncio.TaskGroup() as tasks:
                for place, source, sink in ((0, reader, connection.server), (1, behind, writer)):
                    queue: asyncio.Queue[tuple[float, bytes] | _End] = asyncio.Queue(HELD_CHUNKS)
                    tasks.create_task(self._take(connection, place, source, queue))
                    tasks.create_task(self._give(connection, place, queue, sink))
        except* (OSError, ConnectionError):
            pass  # the target refused, or somebody tore the connection: so does the other half
        finally:
            _tear(connection)
            self._connections.discard(connection)
            if not self._connections:
                self._empty.set()

    async def _opened(self, connection: _Connection) -> None:
        """Return once a connection could be made: both directions pass."""
        waited = False
        while any(lane.disturbance.cut for lane in self._lanes(connection)) and not self._closed:
            self.held_back += not waited
            waited = True
            await self._changed.wait()

    async def _take(
        self,
        connection: _Connection,
        place: int,
        source: asyncio.StreamReader,
        queue: asyncio.Queue[tuple[float, bytes] | _End],
    ) -> None:
        """Read one direction to its end. When too much waits, reading stops and the sender's window closes."""
        try:
            while data := await source.read(CHUNK_BYTES):
                self._lanes(connection)[place].received += len(data)
                await queue.put((time.monotonic(), data))
        except OSError:
            await queue.put(_End(torn=True))
        else:
            await queue.put(_End(torn=False))

    async def _give(
        self,
        connection: _Connection,
        place: int,
        queue: asyncio.Queue[tuple[float, bytes] | _End],
        sink: asyncio.StreamWriter,
    ) -> None:
        """Pass one direction on, as it is disturbed. An end, too, passes only when bytes would."""
        while True:
            item = await queue.get()
            if isinstance(item, _End):
                await self._uncut(connection, place)
                if item.torn:
                    raise ConnectionResetError
                sink.write_eof()
                return
            came, data = item
            await self._ripe(connection, place, came)
            turn = 0
            while data:
                await self._uncut(connection, place)
                lane = self._lanes(connection)[place]
                size = lane.disturbance.slice_bytes or len(data)
                piece, data = data[:size], data[size:]
                sink.write(piece)
                lane.forwarded += len(piece)
                lane.writes += 1
                if came >= lane.since:
                    lane.kept_s = min(lane.kept_s, time.monotonic() - came)
                await sink.drain()
                turn += 1
                if turn % SLICES_PER_TURN == 0:
                    await asyncio.sleep(0)

    async def _uncut(self, connection: _Connection, place: int) -> None:
        while self._lanes(connection)[place].disturbance.cut and not self._closed:
            await self._changed.wait()

    async def _ripe(self, connection: _Connection, place: int, came: float) -> None:
        """Return when a chunk that came then is due, delay and stall included."""
        lane = self._lanes(connection)[place]
        wanted = lane.disturbance
        due = came + wanted.delay_s + wanted.jitter_s * self._rng.random()
        if wanted.stall_share and self._rng.random() < wanted.stall_share:
            lane.stalls += 1
            due = max(due, time.monotonic() + wanted.stall_s)
        if (rest := due - time.monotonic()) > 0:
            await asyncio.sleep(rest)


def _tear(connection: _Connection) -> None:
    for writer in (connection.client, connection.server):
        if writer is not None and not writer.transport.is_closing():
            connected = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


def process_of(client_port: int, server_port: int, among: Collection[int]) -> int:
    """Which of these processes holds the client's end of a connection on this machine; 0 when none of them does."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                ports = [int(fields[n].rpartition(":")[2], 16) for n in (1, 2)]
                if ports == [client_port, server_port]:
                    inodes.add(f"socket:[{fields[9]}]")
    for pid in among if inodes else ():
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{name}") in inodes:
                        return pid
    return 0

"""The proxy does what it is told, and what it counts tells a fault that had no effect from one that had."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from inference_runtime.testing.disturb import Disturb
from inference_runtime.testing.faults import FaultNotVerified, injected
from inference_runtime.testing.proxy import CLEAR, CUT, Disturbance, TcpProxy, process_of


@asynccontextmanager
async def echo() -> AsyncIterator[str]:
    """A server that sends back what it gets; host:port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield "{}:{}".format(*server.sockets[0].getsockname()[:2])


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def of(cls, address: str) -> Client:
        """Connect."""
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def ask(self, data: bytes, timeout_s: float = 5.0) -> bytes:
        """Send, and receive as much."""
        self.writer.write(data)
        return await asyncio.wait_for(self.reader.readexactly(len(data)), timeout_s)

    def close(self) -> None:
        """Hang up."""
        self.writer.close()


@asynccontextmanager
async def way() -> AsyncIterator[tuple[TcpProxy, Client]]:
    """A proxy in front of an echo, and a client behind it that was answered once."""
    async with echo() as target, TcpProxy(target) as door:
        client = await Client.of(door.address)
        assert await client.ask(b"hello") == b"hello"
        try:
            yield door, client
        finally:
            client.close()


async def test_without_a_disturbance_everything_passes_and_is_counted() -> None:
    """The proxy alone changes nothing."""
    data = os.urandom(3_000_000)
    async with way() as (door, client):
        assert await client.ask(data) == data

        assert door.up.received == door.up.forwarded == len(data) + 5
        assert door.down.received == door.down.forwarded == len(data) + 5
        assert door.passed_on == 1


async def test_an_end_of_one_direction_is_passed_on_and_the_other_goes_on() -> None:
    """A half-closed connection stays one."""
    async with way() as (_, client):
        client.writer.write(b"last words")
        client.writer.write_eof()

        assert await asyncio.wait_for(client.reader.read(-1), 5) == b"last words"


@pytest.mark.parametrize(("up", "down"), [(True, True), (True, False), (False, True)], ids=["both ways", "up", "down"])
async def test_a_cut_is_silence_and_what_was_sent_arrives_when_it_is_healed(up: bool, down: bool) -> None:
    """M-04, M-06, N-01: no reset, no byte, no new connection; afterwards nothing is lost."""
    async with way() as (door, client), asyncio.TaskGroup() as tasks:
        fault = Disturb([door], up=CUT if up else CLEAR, down=CUT if down else CLEAR)
        fault.inject()
        answer = tasks.create_task(client.ask(b"x" * 1000, timeout_s=30))
        late = await Client.of(door.address)
        late_answer = tasks.create_task(late.ask(b"late", timeout_s=30))

        await asyncio.wait([answer, late_answer], timeout=0.3)

        assert not answer.done()
        assert not late_answer.done()
        assert door.down.forwarded == 5
        assert (door.up.forwarded > 5) == (not up), "the other direction passes"
        assert fault.is_injected()
        await fault.heal()
        assert await answer == b"x" * 1000
        assert await late_answer == b"late"
        assert fault.is_healed()
        late.close()


async def test_a_cut_that_nothing_met_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """§4.2, control run: a door that nobody uses proves nothing."""
    monkeypatch.setattr("inference_runtime.testing.faults.VERIFY_S", 0.2)
    async with echo() as target, TcpProxy(target) as unused:
        with pytest.raises(FaultNotVerified, match="did not take effect"):
            async with injected(Disturb([unused], up=CUT, down=CUT)):
                pass
    with pytest.raises(FaultNotVerified, match="nothing to disturb"):
        Disturb([], up=CUT)


async def test_a_cut_whose_target_is_gone_is_not_healed(monkeypatch: pytest.MonkeyPatch) -> None:
    """§4.2: healed means that something passes again."""
    monkeypatch.setattr("inference_runtime.testing.disturb.HEALED_S", 0.3)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # ours, so that nobody else listens there, and never listening
        async with TcpProxy("{}:{}".format(*reserved.getsockname())) as door:
            await _not_healed(door)


async def _not_healed(door: TcpProxy) -> None:
    fault = Disturb([door], up=CUT, down=CUT)
    fault.inject()
    with pytest.raises(FaultNotVerified, match="nothing passes"):
        await fault.heal()
    assert not fault.is_healed()


async def test_delay_is_added_to_each_byte_and_not_to_each_chunk() -> None:
    """A slow way has the same bandwidth."""
    async with way() as (door, client):
        fault = Disturb([door], up=Disturbance(delay_s=0.1, jitter_s=0.02))
        fault.inject()
        begin = time.monotonic()
        for number in range(10):
            client.writer.write(b"%d" % number)
            await client.writer.drain()
            await asyncio.sleep(0)
        assert await asyncio.wait_for(client.reader.readexactly(10), 5) == b"0123456789"

        assert 0.1 <= time.monotonic() - begin < 0.9
        assert fault.is_injected()
        await fault.heal()
        assert fault.is_healed()


async def test_stalls_hold_some_chunks_and_all_behind_them() -> None:
    """N-01, loss above TCP: late, in order, complete."""
    async with way() as (door, client):
        fault = Disturb([door], down=Disturbance(stall_share=0.3, stall_s=0.05))
        fault.inject()
        answers = [await client.ask(b"%d" % (number % 10)) for number in range(30)]

        assert b"".join(answers) == b"0123456789" * 3
        assert 0 < door.down.stalls < 30
        assert fault.is_injected()


async def test_slices_are_writes_of_that_many_bytes() -> None:
    """N-01, 1-byte slices."""
    async with way() as (door, client):
        fault = Disturb([door], up=Disturbance(slice_bytes=1), down=Disturbance(slice_bytes=3))
        fault.inject()
        assert not fault.is_injected(), "nothing has passed yet"
        data = os.urandom(5000)

        assert await client.ask(data) == data
        assert fault.is_injected()
        assert door.up.writes >= 5000
        assert door.down.writes >= 5000 / 3


async def test_a_disturbance_of_some_processes_leaves_the_others_alone() -> None:
    """M-05: who is at the other end is read in the kernel's tables."""
    async with way() as (door, client):
        mine = client.writer.get_extra_info("sockname")[1]
        port = int(door.address.rpartition(":")[2])
        assert process_of(mine, port, [1, os.getpid()]) == os.getpid()
        assert process_of(mine, port, [1]) == process_of(mine, port + 1, [os.getpid()]) == 0

        door.disturb(up=CUT, down=CUT, only=[1])
        assert await client.ask(b"not concerned") == b"not concerned"
        other = await Client.of(door.address)
        assert await other.ask(b"nor this one") == b"nor this one"
        other.close()

        door.disturb(up=CUT, down=CUT, only=[os.getpid()])
        with pytest.raises(TimeoutError):
            await client.ask(b"concerned", timeout_s=0.2)


async def test_a_reset_tears_connections_at_both_ends() -> None:
    """A connection that is torn says so; new ones pass."""
    async with way() as (door, client):
        assert door.reset() == 1
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await client.ask(b"anybody?")
        another = await Client.of(door.address)
        assert await another.ask(b"anybody?") == b"anybody?"
        another.close()


async def test_a_proxy_closes_while_connections_are_cut() -> None:
    """Nothing is left behind, whatever is held."""
    async with echo() as target:
        async with asyncio.timeout(5):
            async with TcpProxy(target) as door:
                client = await Client.of(door.address)
                door.disturb(up=CUT, down=CUT)
                client.writer.write(b"held")
                waiting = await Client.of(door.address)
        client.close()
        waiting.close()

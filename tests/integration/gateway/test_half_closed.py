"""Clients that close their sending side and wait for the answer, told from clients that have left."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from tests.integration.gateway.conftest import Gateway
from tests.integration.gateway.peer import Peer, Row, last_row, until
from tests.integration.gateway.test_http_wire import BODY, STREAM, ended, post


def half_closed(gateway: Gateway) -> bool:
    """The gateway knows that a client sends nothing more."""
    return any(connection.half_closed for connection in gateway.worker.http.connections)


async def rest(reader: asyncio.StreamReader) -> bytes:
    """Everything up to the end of the connection."""
    async with asyncio.timeout(5):
        return await reader.read()


async def test_a_client_that_sends_nothing_more_gets_its_whole_answer_and_the_end(gateway: Gateway, engine: Peer) -> None:
    reader, writer = await gateway.connect()
    writer.write(post(BODY))
    writer.write_eof()
    s = await engine.submission()
    await until(lambda: half_closed(gateway), "the half-close")
    engine.send(last_row(s, 0, [1], "all of it"))
    answer = await rest(reader)
    interim, _, final = answer.partition(b"\r\n\r\n")
    assert interim == b"HTTP/1.1 102 Processing"  # any client must read past it; one that is gone is found out by it
    assert final.startswith(b"HTTP/1.1 200 OK")
    assert json.loads(final.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] == "all of it"
    assert not engine.cancellations


async def test_a_client_that_sends_nothing_more_gets_its_whole_stream(gateway: Gateway, engine: Peer) -> None:
    reader, writer = await gateway.connect()
    writer.write(post(STREAM))
    s = await engine.submission()
    engine.send(Row(s, 0, [1], "one "))
    async with asyncio.timeout(5):
        await reader.readuntil(b"one ")
    writer.write_eof()
    await until(lambda: half_closed(gateway), "the half-close")
    engine.send(Row(s, 1, [2], "two "), last_row(s, 2, [3], "three"))
    answer = await rest(reader)
    assert b": waiting\n" in answer
    assert answer.index(b"two ") < answer.index(b"three") < answer.index(b"[DONE]")


async def test_all_requests_that_were_sent_before_the_end_are_answered(gateway: Gateway, engine: Peer) -> None:
    reader, writer = await gateway.connect()
    writer.write(post(BODY) + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + post(BODY))
    writer.write_eof()
    for number in (1, 2):
        engine.send(last_row(await engine.submission(number), 0, [1], f"answer {number}"))
    answer = await rest(reader)
    assert answer.index(b"answer 1") < answer.index(b"alive") < answer.index(b"answer 2")


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["unary", "stream"])
async def test_a_client_that_leaves_after_its_half_close_stops_its_generation(
    gateway: Gateway, engine: Peer, body: bytes
) -> None:
    """Trap 9: its end looks like a half-close until something is written to it."""
    _reader, writer = await gateway.connect()
    writer.write(post(body))
    s = await engine.submission()
    writer.write_eof()
    await until(lambda: half_closed(gateway), "the half-close")
    writer.close()
    if body is STREAM:
        engine.send(Row(s, 0, [1], "x"))
        await asyncio.sleep(0)
        engine.send(Row(s, 1, [2], "y"))
    await engine.cancelled(s)


async def test_http_1_0_gets_no_interim_answer(gateway: Gateway, engine: Peer) -> None:
    """It does not know them."""
    reader, writer = await gateway.connect()
    writer.write(post(BODY).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    writer.write_eof()
    engine.send(last_row(await engine.submission(), 0, [1], "ok"))
    assert (await rest(reader)).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("sent", [b"", post(BODY)[:-1], b"GET /heal"], ids=["nothing", "half a body", "half a head"])
async def test_a_client_that_ends_without_a_whole_request_is_let_go(gateway: Gateway, sent: bytes) -> None:
    reader, writer = await gateway.connect()
    writer.write(sent)
    writer.write_eof()
    assert await ended(reader)
    await until(lambda: not gateway.worker.http.connections, "no connection left")


async def test_a_client_that_leaves_while_its_parked_requests_wait_is_told_from_one_that_waits(
    gateway: Gateway, engine: Peer
) -> None:
    """So much is parked that nothing is read any more, not even the end."""
    host, port = gateway.address.rsplit(":", 1)
    flood = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 5_000
    reader, writer = await gateway.connect()
    writer.write(post(BODY))
    s = await engine.submission()
    writer.write(flood)
    writer.write_eof()
    await until(lambda: half_closed(gateway), "the half-close")
    engine.send(last_row(s, 0, [1], "first"))
    answer = await rest(reader)
    assert answer.count(b"HTTP/1.1 200 OK") == 5_001
    with socket.create_connection((host, int(port))) as gone:
        gone.sendall(post(BODY))
        t = await engine.submission(2)
    await engine.cancelled(t)


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP, identity"])
async def test_a_compressed_body_is_415_and_says_what_to_do(gateway: Gateway, encoding: str) -> None:
    response = await gateway.client.post("/v1/chat/completions", content=b"\x1f\x8b", headers={"content-encoding": encoding})
    assert response.status_code == 415
    error = response.json()["error"]
    assert error["code"] == "unsupported_content_encoding"
    assert "uncompressed" in error["message"]
    assert response.headers["accept-encoding"] == "identity"


async def test_a_body_that_says_it_is_not_compressed_is_read(gateway: Gateway, engine: Peer) -> None:
    asking = asyncio.create_task(
        gateway.client.post("/v1/chat/completions", content=BODY, headers={"content-encoding": "identity"})
    )
    engine.send(last_row(await engine.submission(), 0, [1], "ok"))
    assert (await asking).status_code == 200

"""HTTP itself: what a client may do on a socket, and what it may not."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from inference_runtime.errors import Internal
from tests.integration.gateway.conftest import Gateway, Start
from tests.integration.gateway.peer import Peer, Row, deployment_route, error_row, last_row, peer, until

BODY = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "hi"}]}).encode()
STREAM = BODY[:-1] + b', "stream": true}'


def post(body: bytes, extra: bytes = b"") -> bytes:
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (extra, len(body), body)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes], bytes]:
    """One answer with a content-length."""
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(b":") for line in lines[1:] if line)}
        body = await reader.readexactly(int(headers.get(b"content-length", b"0")))
    return int(lines[0].split()[1]), headers, body


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the server closes the connection within the deadline."""
    try:
        async with asyncio.timeout(5):
            await reader.read()
    except ConnectionError:
        return True
    return reader.at_eof()


async def test_a_connection_serves_one_request_after_another(gateway: Gateway, engine: Peer) -> None:
    reader, writer = await gateway.connect()
    for number in range(3):
        writer.write(post(BODY))
        s = await engine.submission(number + 1)
        engine.send(last_row(s, 0, [1], f"answer {number}"))
        status, headers, body = await read_answer(reader)
        assert status == 200
        assert json.loads(body)["choices"][0]["message"]["content"] == f"answer {number}"
        assert b"date" in headers
    writer.close()


async def test_pipelined_requests_are_answered_one_at_a_time_in_order(gateway: Gateway, engine: Peer) -> None:
    reader, writer = await gateway.connect()
    writer.write(post(BODY) + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + post(BODY))
    s = await engine.submission()
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
    assert len(engine.submissions) == 1
    engine.send(last_row(s, 0, [1], "first"))
    assert b"first" in (await read_answer(reader))[2]
    assert json.loads((await read_answer(reader))[2]) == {"status": "alive"}
    engine.send(last_row(await engine.submission(2), 0, [1], "second"))
    assert b"second" in (await read_answer(reader))[2]
    assert json.loads((await read_answer(reader))[2])["object"] == "list"
    writer.close()


async def test_a_flood_of_pipelined_requests_is_held_back(gateway: Gateway, engine: Peer) -> None:
    """What waits behind a request is bounded: reading pauses. All of it is answered in the end."""
    reader, writer = await gateway.connect()
    writer.write(post(BODY))
    s = await engine.submission()
    flood = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 20_000
    writer.write(flood)
    await until(lambda: any(c._paused for c in gateway.worker.http.connections), "reading paused")
    engine.send(last_row(s, 0, [1], "first"))
    assert b"first" in (await read_answer(reader))[2]
    for _ in range(20_000):
        assert (await read_answer(reader))[0] == 200
    writer.close()


async def test_a_client_that_leaves_while_its_later_requests_wait_is_noticed(gateway: Gateway, engine: Peer) -> None:
    _reader, writer = await gateway.connect()
    writer.write(post(BODY))
    s = await engine.submission()
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 5_000)
    await until(lambda: any(c._paused for c in gateway.worker.http.connections), "reading paused")
    writer.transport.abort()
    await engine.cancelled(s)


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["unary", "stream"])
async def test_trap_09_a_client_that_leaves_stops_its_generation_only(gateway: Gateway, engine: Peer, body: bytes) -> None:
    """Trap 9, from this side: one client's end touches no other. In both modes the engine is told at once."""
    _reader, writer = await gateway.connect()
    writer.write(post(body))
    s = await engine.submission()
    other = asyncio.create_task(gateway.chat())
    t = await engine.submission(2)
    engine.send(Row(s, 0, [1], "x"))
    writer.close()
    await engine.cancelled(s)
    engine.send(Row(s, 1, [2], "y"), last_row(t, 0, [1], "still here"))
    assert (await other).json()["choices"][0]["message"]["content"] == "still here"
    await until(lambda: not gateway.worker.live.requests, "no request left")
    assert gateway.metric('inference_requests_total{deployment="demo",outcome="cancelled"}') == 1
    assert gateway.worker.table.targets["demo-on-engine-1"].in_flight == 0


async def test_a_reader_that_stalls_is_cut_off_and_its_generation_stopped(start: Start) -> None:
    """What waits for a client is bounded in bytes: a stalled one costs a megabyte, not the answer's length."""
    async with peer("a") as a, start(http={"max_unread_bytes": 256 << 10}) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        host, port = gateway.address.rsplit(":", 1)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        sock.sendall(post(STREAM))
        s = await a.submission()
        sent = 0
        async with asyncio.timeout(10):
            while not a.cancellations:
                a.send(*(Row(s, sent + n, [1], "x" * 2000) for n in range(20)))
                sent += 20
                await asyncio.sleep(0.01)
        assert sent * 2000 < 4 << 20
        await a.cancelled(s)
        sock.close()


async def test_a_reader_that_stalls_below_the_bound_is_cut_off_in_time(start: Start) -> None:
    async with peer("a") as a, start(http={"stall_timeout_s": 0.5}) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        host, port = gateway.address.rsplit(":", 1)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        sock.sendall(post(STREAM))
        s = await a.submission()
        a.send(*(Row(s, n, [1], "x" * 2000) for n in range(200)))
        await a.cancelled(s)
        sock.close()


async def test_a_body_over_the_limit_is_413_whether_declared_or_not(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/chat/completions", content=b"x" * (9 << 20))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"
    assert response.headers["connection"] == "close"

    async def pieces() -> object:
        for _ in range(90):
            yield b"x" * (100 << 10)

    response = await gateway.client.post("/v1/chat/completions", content=pieces())  # type: ignore[arg-type]
    assert response.status_code == 413


async def test_a_declared_body_over_the_limit_is_refused_before_it_is_sent(gateway: Gateway) -> None:
    reader, writer = await gateway.connect()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n")
    assert (await read_answer(reader))[0] == 413
    assert await ended(reader)


async def test_a_client_that_waits_for_leave_to_send_gets_it(gateway: Gateway, engine: Peer) -> None:
    reader, writer = await gateway.connect()
    head, body = post(BODY, b"Expect: 100-continue\r\n").split(b"\r\n\r\n", 1)
    writer.write(head + b"\r\n\r\n")
    async with asyncio.timeout(5):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    engine.send(last_row(await engine.submission(), 0, [1], "ok"))
    assert (await read_answer(reader))[0] == 200
    writer.close()


async def test_a_chunked_body_is_read(gateway: Gateway, engine: Peer) -> None:
    reader, writer = await gateway.connect()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    for at in range(0, len(BODY), 10):
        piece = BODY[at : at + 10]
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await asyncio.sleep(0)
    writer.write(b"0\r\n\r\n")
    engine.send(last_row(await engine.submission(), 0, [1], "ok"))
    assert (await read_answer(reader))[0] == 200
    writer.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"NONSENSE\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_400_and_closes(gateway: Gateway, raw: bytes) -> None:
    reader, writer = await gateway.connect()
    writer.write(raw)
    status, _headers, body = await read_answer(reader)
    assert status == 400
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert await ended(reader)


@pytest.mark.parametrize("ended_head", [True, False])
async def test_a_head_over_the_limit_is_431_and_closes(gateway: Gateway, ended_head: bool) -> None:
    reader, writer = await gateway.connect()
    head = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * (80 << 10)
    writer.write(head + (b"\r\n\r\n" if ended_head else b""))
    assert (await read_answer(reader))[0] == 431
    assert await ended(reader)


async def test_a_head_or_a_body_that_never_ends_is_408(start: Start) -> None:
    async with start(http={"header_timeout_s": 0.3, "body_timeout_s": 0.3}) as gateway:
        for raw in (b"GET /healthz HT", post(BODY)[:-1]):
            reader, writer = await gateway.connect()
            writer.write(raw)
            assert (await read_answer(reader))[0] == 408
            assert await ended(reader)


async def test_an_idle_connection_is_closed(start: Start) -> None:
    async with start(http={"idle_timeout_s": 0.3}) as gateway:
        reader, writer = await gateway.connect()
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await read_answer(reader))[0] == 200
        assert await ended(reader)


async def test_a_client_that_asks_for_close_gets_it(gateway: Gateway, engine: Peer) -> None:
    reader, writer = await gateway.connect()
    writer.write(post(BODY, b"Connection: close\r\n"))
    engine.send(last_row(await engine.submission(), 0, [1], "ok"))
    status, headers, _ = await read_answer(reader)
    assert (status, headers[b"connection"]) == (200, b"close")
    assert await ended(reader)


async def test_http_1_0_gets_a_stream_without_chunks_ended_by_close(gateway: Gateway, engine: Peer) -> None:
    reader, writer = await gateway.connect()
    writer.write(post(STREAM).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    s = await engine.submission()
    engine.send(Row(s, 0, [1], "a"), last_row(s, 1, [2], "b"))
    async with asyncio.timeout(5):
        answer = await reader.read()
    assert b"transfer-encoding" not in answer
    assert answer.endswith(b"data: [DONE]\n\n")


async def test_a_silent_stream_gets_a_sign_of_life_and_then_its_tokens(start: Start) -> None:
    async with peer("a") as a, start(http={"keepalive_s": 0.2}) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        reader, writer = await gateway.connect()
        writer.write(post(STREAM))
        s = await a.submission()
        async with asyncio.timeout(5):
            assert b"200 OK" in await reader.readuntil(b": waiting\n")
        a.send(last_row(s, 0, [1], "at last"))
        async with asyncio.timeout(5):
            assert b"at last" in await reader.readuntil(b"[DONE]")
        writer.close()


async def test_a_stream_without_a_replica_gets_signs_of_life_too(start: Start) -> None:
    """From admission on; what goes wrong later is an event then."""
    async with start(http={"keepalive_s": 0.2}, limits={"route_wait_s": 1.0}) as gateway:
        await gateway.route(deployment_route(name="demo"))
        reader, writer = await gateway.connect()
        writer.write(post(STREAM))
        async with asyncio.timeout(5):
            assert b"200 OK" in await reader.readuntil(b": waiting\n")
            rest = await reader.readuntil(b"\r\n0\r\n\r\n")
        assert b'"code":' in rest
        assert b"[DONE]" not in rest
        writer.close()


async def test_other_urls_and_methods_are_refused_in_openais_shape(gateway: Gateway) -> None:
    """Trap 36: an unknown route was 400 in the original."""
    response = await gateway.client.get("/v1/nothing?x=1")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")
    assert (await gateway.client.get("/v1/chat/completions")).status_code == 405
    assert (await gateway.client.post("/v1/models")).status_code == 405
    assert (await gateway.client.delete("/healthz")).status_code == 405
    assert (await gateway.client.head("/healthz")).status_code == 200


async def test_trap_36_models_health_and_metrics_are_served(gateway: Gateway) -> None:
    """Trap 36: no models, no metrics, a constant healthz."""
    assert [m["id"] for m in (await gateway.client.get("/v1/models")).json()["data"]] == ["demo"]
    assert (await gateway.client.get("/v1/models/demo")).json()["id"] == "demo"
    assert (await gateway.client.get("/v1/models/none")).status_code == 404
    assert (await gateway.client.get("/healthz")).json() == {"status": "alive"}
    assert (await gateway.client.get("/readyz")).status_code == 200
    assert "inference_requests_total" in (await gateway.client.get("/metrics")).text


async def test_trap_36_readiness_follows_the_replicas(start: Start) -> None:
    async with start() as gateway:
        assert (await gateway.client.get("/readyz")).status_code == 503
        async with peer("a") as a:
            await gateway.route(deployment_route(a.replica("demo")))
            assert (await gateway.client.get("/readyz")).status_code == 200
        await until(lambda: not gateway.worker.table.ready, "the lost session")
        assert "replica" in (await gateway.client.get("/readyz")).json()["reason"]
        assert (await gateway.client.get("/healthz")).status_code == 200


async def test_readiness_does_not_trust_a_replica_that_only_fails(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that is reachable, reports that it serves, and fails every request. One answer makes it good again."""
    monkeypatch.setattr("services.gateway.outcomes.FAILING_AFTER_S", 0.0)
    async with peer("a") as a, start() as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        for count in range(1, 4):
            assert (await gateway.client.get("/readyz")).status_code == 200
            asking = asyncio.create_task(gateway.chat())
            a.send(error_row(await a.submission(count), Internal("a shape does not fit")))
            assert (await asking).status_code == 500
        assert "fails" in (await gateway.client.get("/readyz")).json()["reason"]
        asking = asyncio.create_task(gateway.chat())
        a.send(last_row(await a.submission(4), 0, [1], "ok"))
        assert (await asking).status_code == 200
        assert (await gateway.client.get("/readyz")).status_code == 200


async def test_a_gateway_with_keys_wants_one(start: Start) -> None:
    """Trap 36: the original had no authentication."""
    async with peer("a") as a, start(api_keys=["sesame"]) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        response = await gateway.chat()
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (await gateway.client.get("/v1/models")).status_code == 401
        assert (await gateway.client.get("/readyz")).status_code == 200
        gateway.client.headers["authorization"] = "Bearer sesame"
        assert (await gateway.client.get("/v1/models")).status_code == 200
        asking = asyncio.create_task(gateway.chat())
        s = await a.submission()
        assert s.request.tenant
        a.send(last_row(s, 0, [1], "open"))
        assert (await asking).status_code == 200

"""One trace through the hops: what a collector sees of a request."""

from __future__ import annotations

import asyncio

import pytest

from inference_runtime.errors import ContextPoisoned
from tests.integration.gateway.conftest import Start
from tests.integration.gateway.peer import Row, deployment_route, error_row, last_row, peer
from tests.unit.test_telemetry import Collector, collector

__all__ = ["collector"]

OUTSIDE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("outside", ["", OUTSIDE])
async def test_engines_hang_their_spans_below_the_gateways(start: Start, collector: Collector, outside: str) -> None:
    """V02: client, gateway, engine: one below the other, through a resumption, which the span tells of."""
    async with peer("a") as a, start(telemetry={"otlp_endpoint": collector.address}) as gateway:
        await gateway.route(deployment_route(a.replica("demo")))
        gateway.client.headers.update({"traceparent": outside} if outside else {})
        asking = asyncio.create_task(gateway.chat(stream=True))
        s = await a.submission()
        a.send(Row(s, 0, [1], "one"), error_row(s, ContextPoisoned("poisoned"), 1))
        t = await a.submission(2)
        a.send(last_row(t, 1, [2], "two"))
        await asking
    (span,) = [x for x in collector.spans if x.name == "chat demo"]
    assert s.traceparent == t.traceparent == f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01"
    assert span.parent_span_id.hex() == outside[36:52]
    assert not outside or span.trace_id.hex() == outside[3:35]
    assert {x.key: x.value.int_value for x in span.attributes}["inference.resumptions"] == 1

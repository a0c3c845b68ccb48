"""The metrics service in office."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from inference_runtime.coordination import EtcdClient
from inference_runtime.errors import BadRequest, NotLeader
from inference_runtime.testing.etcd import EtcdProcess
from inference_runtime.v1 import generation_pb2, metrics_service_pb2
from services.metrics.settings import MetricsSettings
from tests.integration.control.kit import Singleton, singleton, until

pb = metrics_service_pb2


@pytest.fixture
def settings(tmp_path: Path) -> MetricsSettings:
    return MetricsSettings(state_dir=tmp_path)


@pytest.fixture
async def metrics(etcd: EtcdProcess, client: EtcdClient, settings: MetricsSettings) -> AsyncIterator[Singleton]:
    async with singleton("metrics", etcd.endpoint, settings) as leader:
        yield leader


def record(request_id: str, deployment: str = "a", **more: object) -> pb.UsageRecord:
    usage = generation_pb2.Usage(input_tokens=10, output_tokens=4)
    return pb.UsageRecord(
        request_id=request_id,
        deployment=deployment,
        usage=usage,
        cost_micro_usd=500_000,
        **more,  # type: ignore[arg-type]
    )


async def send(metrics: Singleton, *records: pb.UsageRecord) -> int:
    return int((await metrics.call("RecordUsage", pb.RecordUsageRequest(records=records))).accepted)


async def snapshot(metrics: Singleton, deployment: str = "") -> dict[str, pb.DeploymentUsage]:
    answer = await metrics.call("GetSnapshot", pb.GetSnapshotRequest(deployment=deployment))
    return {usage.deployment: usage for usage in answer.deployments}


async def test_trap_06_usage_is_counted_by_deployment(metrics: Singleton) -> None:
    """Trap 6, R13, V01."""
    assert await send(metrics, record("1"), record("2", error_reason="TIMEOUT"), record("3", "b")) == 3

    usage = await snapshot(metrics)
    assert usage["a"] == pb.DeploymentUsage(
        deployment="a",
        requests=1,
        errors=1,
        input_tokens=20,
        output_tokens=8,
        cost_micro_usd=1_000_000,
        errors_by_reason={"TIMEOUT": 1},
    )
    assert usage["b"].requests == 1
    assert (await snapshot(metrics, "b")).keys() == {"b"}


async def test_a_batch_that_is_sent_again_counts_once(metrics: Singleton) -> None:
    """B04: the sender does not know whether the first one arrived."""
    assert await send(metrics, record("1"), record("2")) == 2
    assert await send(metrics, record("1"), record("2"), record("3")) == 1

    assert (await snapshot(metrics))["a"].requests == 3


async def test_the_next_leader_goes_on_from_the_ledger(etcd: EtcdProcess, client: EtcdClient, settings: MetricsSettings) -> None:
    async with singleton("metrics", etcd.endpoint, settings) as first:
        await send(first, record("1"))
    async with singleton("metrics", etcd.endpoint, settings) as second:

        async def leads() -> bool:
            try:
                return await send(second, record("1"), record("2")) == 1
            except NotLeader:
                return False

        await until(leads, "the second to lead")
        assert (await snapshot(second))["a"].requests == 2
        text = second.telemetry.metrics.prometheus_text().decode()
        assert 'inference_requests_total{deployment="a",outcome="ok"} 2' in text, "counters go on, too"
        assert 'inference_cost_usd_total{deployment="a"} 1.0' in text


async def test_who_does_not_lead_publishes_no_counters(
    etcd: EtcdProcess, client: EtcdClient, metrics: Singleton, settings: MetricsSettings
) -> None:
    """A sum over all processes is the truth."""
    await send(metrics, record("1"))
    async with singleton("metrics", etcd.endpoint, settings, wait=False) as follower:

        async def refused() -> str:
            with pytest.raises(NotLeader) as caught:
                await send(follower, record("2"))
            return caught.value.address

        assert await until(refused, "an address") == metrics.address
        assert b'deployment="a"' not in follower.telemetry.metrics.prometheus_text()


@pytest.mark.parametrize(
    "wrong",
    [
        record(""),
        record("1", ""),
        record("x" * 300),
        pb.UsageRecord(request_id="1", deployment="a", cost_micro_usd=-1),
        pb.UsageRecord(request_id="1", deployment="a", cost_micro_usd=2**62),
    ],
)
async def test_a_wrong_record_is_refused_with_its_whole_batch(metrics: Singleton, wrong: pb.UsageRecord) -> None:
    with pytest.raises(BadRequest) as caught:
        await send(metrics, record("good"), wrong)

    assert caught.value.param == "records[1]"
    assert await snapshot(metrics) == {}


async def test_a_batch_has_a_bound(metrics: Singleton) -> None:
    with pytest.raises(BadRequest) as caught:
        await send(metrics, *(record(str(i)) for i in range(10_001)))
    assert caught.value.param == "records"

"""`inferctl acknowledge-store` as it is typed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference_runtime.coordination import EtcdClient, StoreRecord, keys
from inference_runtime.testing.etcd import EtcdProcess

INFERCTL = str(Path(sys.executable).with_name("inferctl"))


@pytest.fixture
def etcd() -> Iterator[EtcdProcess]:
    with EtcdProcess(fsync=False) as etcd:
        yield etcd


def acknowledge_store(etcd: EtcdProcess, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [INFERCTL, "acknowledge-store", "--etcd", etcd.endpoint, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def record(etcd: EtcdProcess) -> StoreRecord | None:
    async def read() -> StoreRecord | None:
        async with EtcdClient([etcd.endpoint]) as client:
            kv = await client.get(keys.STORE)
            return StoreRecord.from_bytes(kv.value) if kv else None

    return asyncio.run(read())


def test_an_empty_store_is_taken_only_when_that_is_said(etcd: EtcdProcess) -> None:
    """E-05: taking an empty store takes every route away."""
    refused = acknowledge_store(etcd)
    assert refused.returncode == 2
    assert "holds no deployment" in refused.stderr
    assert "--allow-empty" in refused.stderr
    assert record(etcd) is None

    taken = acknowledge_store(etcd, "--allow-empty")
    assert taken.returncode == 0
    first = record(etcd)
    assert first is not None
    assert (first.acknowledged, first.past) == (True, ())
    assert first.store_id[:8] in taken.stdout
    assert "0 deployments" in taken.stdout


def test_each_acknowledgement_is_a_new_id_that_knows_the_old_ones(etcd: EtcdProcess) -> None:
    async def deploy() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            await client.put(keys.deployment("a"), b"")

    asyncio.run(deploy())
    assert "1 deployments" in acknowledge_store(etcd).stdout
    first = record(etcd)
    assert acknowledge_store(etcd).returncode == 0
    second = record(etcd)

    assert first is not None
    assert second is not None
    assert second.past == (first.store_id,)


def test_without_etcd_it_is_one_sentence() -> None:
    command = [INFERCTL, "acknowledge-store", "--etcd", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 1
    assert "etcd at 127.0.0.1:1 cannot be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1

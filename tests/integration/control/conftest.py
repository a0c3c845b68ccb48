"""One etcd for all tests here, emptied before each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from inference_runtime.coordination import EtcdClient, keys
from inference_runtime.testing.etcd import EtcdProcess


@pytest.fixture(scope="session")
def etcd() -> Iterator[EtcdProcess]:
    with EtcdProcess(fsync=False) as process:
        yield process


@pytest.fixture
async def client(etcd: EtcdProcess) -> AsyncIterator[EtcdClient]:
    async with EtcdClient([etcd.endpoint]) as client:
        await client.delete_prefix(keys.ROOT)
        yield client

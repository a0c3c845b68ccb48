"""A real etcd for these tests, shared where a test does not break it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from inference_runtime.coordination import EtcdClient
from inference_runtime.testing.etcd import EtcdProcess

Eventually = Callable[[Callable[[], Awaitable[bool]], float], Awaitable[None]]


@pytest.fixture(scope="session")
def shared_etcd() -> Iterator[EtcdProcess]:
    """For tests that only read and write under their own prefix."""
    with EtcdProcess(fsync=False) as etcd:
        yield etcd


@pytest.fixture
def etcd() -> Iterator[EtcdProcess]:
    """One that the test may kill."""
    with EtcdProcess(fsync=False) as etcd:
        yield etcd


@pytest.fixture
async def shared(shared_etcd: EtcdProcess) -> AsyncIterator[EtcdClient]:
    async with EtcdClient([shared_etcd.endpoint], timeout_s=3.0) as client:
        yield client


@pytest.fixture
async def client(etcd: EtcdProcess) -> AsyncIterator[EtcdClient]:
    async with EtcdClient([etcd.endpoint]) as client:
        yield client


@pytest.fixture
def prefix() -> str:
    """Keys of this test alone."""
    return f"/test/{uuid.uuid4().hex}/"


@pytest.fixture
def role() -> str:
    """A role of this test alone."""
    return f"role-{uuid.uuid4().hex}"


@pytest.fixture
def eventually() -> Eventually:
    """Looks at a condition until it holds; fails after a deadline in seconds."""

    async def wait(condition: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            while not await condition():  # noqa: ASYNC110 - the condition lies in another process
                await asyncio.sleep(0.02)

    return wait

"""EtcdClient against a real etcd: keys, transactions, leases, fail-over, authentication, TLS."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trustme

from inference_runtime.coordination import (
    Compacted,
    Compare,
    EtcdClient,
    EtcdDenied,
    EtcdError,
    EtcdOutcomeUnknown,
    EtcdUnavailable,
    LeaseLost,
    Op,
    PrefixWatch,
)
from inference_runtime.coordination import etcd as etcd_module
from inference_runtime.coordination.identity import StoreGuard
from inference_runtime.coordination.lease import Lease
from inference_runtime.errors import BadRequest
from inference_runtime.secret import SecretStr
from inference_runtime.testing.etcd import EtcdCluster, EtcdProcess, find_etcd

Eventually = Callable[[Callable[[], Awaitable[bool]], float], Awaitable[None]]


async def test_a_key_is_written_read_counted_and_deleted(shared: EtcdClient, prefix: str) -> None:
    key = prefix + "a"
    assert await shared.get(key) is None

    first = await shared.put(key, b"one")
    second = await shared.put(key, b"two")
    found = await shared.get(key)

    assert found is not None
    assert (found.value, found.create_revision, found.mod_revision, found.version) == (b"two", first, second, 2)
    assert await shared.delete(key)
    assert not await shared.delete(key)
    assert await shared.get(key) is None


async def test_a_listing_is_complete_ordered_and_of_one_moment(
    shared: EtcdClient, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_module, "PAGE_KEYS", 3)
    for i in range(10):
        await shared.put(f"{prefix}{i}", b"x")
    await shared.put(prefix[:-1] + "0", b"a neighbour")

    found, revision = await shared.list(prefix)

    assert [kv.key for kv in found] == [f"{prefix}{i}" for i in range(10)]
    assert revision >= max(kv.mod_revision for kv in found)
    assert await shared.delete_prefix(prefix) == 10
    assert (await shared.list(prefix))[0] == []


async def test_an_empty_prefix_is_not_a_way_to_delete_everything(shared: EtcdClient) -> None:
    with pytest.raises(BadRequest):
        await shared.delete_prefix("")


async def test_a_transaction_does_all_or_runs_the_other_branch(shared: EtcdClient, prefix: str) -> None:
    key, other = prefix + "a", prefix + "b"
    absent = Compare.create_revision(key, "==", 0)

    made = await shared.txn(compare=[absent], success=[Op.put(key, b"1"), Op.put(other, b"1")])
    refused = await shared.txn(compare=[absent], success=[Op.put(key, b"2")], failure=[Op.get(key)])
    changed = await shared.txn(
        compare=[Compare.mod_revision(key, "==", made.revision), Compare.version(key, "<", 2), Compare.version(other, "!=", 2)],
        success=[Op.delete(prefix, prefix=True), Op.get(prefix, prefix=True)],
    )

    assert made.succeeded
    assert not refused.succeeded
    assert refused.results[0].kvs[0].value == b"1"
    assert changed.succeeded
    assert (changed.results[0].deleted, changed.results[1].kvs) == (2, ())
    assert changed.cluster_id == shared.cluster_id != 0


async def test_a_refusal_of_etcd_is_typed_and_quotes_it(shared: EtcdClient, prefix: str) -> None:
    with pytest.raises(EtcdError, match="duplicate key"):
        await shared.txn(compare=[], success=[Op.put(prefix, b"1"), Op.put(prefix, b"2")])
    with pytest.raises(LeaseLost):
        await shared.put(prefix, b"", lease_id=12345)


async def test_a_lease_that_nobody_renews_takes_its_keys_along(shared: EtcdClient, prefix: str) -> None:
    granted = await shared.grant(1)
    began = time.monotonic()
    await shared.put(prefix + "a", b"", granted.lease_id)
    revision = (await shared.list(prefix))[1]

    stream = shared.watch(prefix, revision + 1)
    await stream.open()
    update = await stream.read(granted.ttl_s + 3)
    stream.close()

    assert update is not None
    assert [e.deleted for e in update.events] == [True]
    assert time.monotonic() - began >= granted.ttl_s - 0.1
    assert await shared.time_to_live(granted.lease_id) is None


async def test_a_revoked_lease_takes_its_keys_along_at_once_and_is_known_to_be_lost(shared: EtcdClient, prefix: str) -> None:
    async with Lease(shared, ttl_s=30) as lease:
        await shared.put(prefix + "a", b"", lease.id)
        assert lease.valid()

        await shared.revoke(lease.id)

        assert await shared.get(prefix + "a") is None
        stream = shared.keep_alive(lease.id)
        with pytest.raises(LeaseLost):
            await stream.renew(1.0)
        stream.close()


async def test_a_lease_object_lives_on_renewals_and_hears_of_its_revocation(
    shared: EtcdClient, prefix: str, eventually: Eventually
) -> None:
    async with Lease(shared, ttl_s=2) as lease:
        first = lease.valid_until
        await shared.put(prefix + "a", b"", lease.id)

        async def renewed_past_its_first_life() -> bool:
            return lease.valid_until > first + 2.0

        await eventually(renewed_past_its_first_life, 5)
        assert lease.valid()
        assert await shared.get(prefix + "a") is not None

        await shared.revoke(lease.id)
        async with asyncio.timeout(3):
            await lease.lost()
        assert not lease.valid()


async def test_leaving_a_lease_revokes_it(shared: EtcdClient, prefix: str) -> None:
    async with Lease(shared, ttl_s=30) as lease:
        await shared.put(prefix + "a", b"", lease.id)

    assert await shared.get(prefix + "a") is None


async def test_a_frozen_etcd_ends_the_validity_of_a_lease_before_etcd_would(etcd: EtcdProcess, client: EtcdClient) -> None:
    """M-04: cut from etcd, the holder stops trusting its lease a margin before anybody else can get it."""
    async with Lease(client, ttl_s=4) as lease:
        etcd.pause()
        paused = time.monotonic()
        async with asyncio.timeout(4):
            await lease.lost()
        waited_s = time.monotonic() - paused
        etcd.resume()

    assert not lease.valid()
    assert waited_s <= 2.5  # of four: margin 2


async def test_an_unreachable_etcd_gives_one_sentence_that_names_the_endpoints() -> None:
    client = EtcdClient(["127.0.0.1:1", "127.0.0.1:2"], timeout_s=0.3)

    with pytest.raises(EtcdUnavailable) as caught:
        await client.connect()
    await client.close()

    message = caught.value.message
    assert type(caught.value) is EtcdUnavailable
    assert "127.0.0.1:1, 127.0.0.1:2" in message
    assert "\n" not in message
    assert len(message) < 200


async def test_a_write_that_got_no_answer_is_called_unknown_and_one_that_was_not_sent_is_not(etcd: EtcdProcess) -> None:
    async with EtcdClient([etcd.endpoint], timeout_s=0.3) as client:
        await client.put("/a", b"1")
        etcd.pause()
        with pytest.raises(EtcdOutcomeUnknown):
            await client.put("/a", b"2")
        etcd.resume()
        etcd.kill()
        with pytest.raises(EtcdUnavailable):
            while True:  # the first may still meet the dying connection
                try:
                    await client.put("/a", b"3")
                except EtcdOutcomeUnknown:
                    continue


async def test_calls_of_a_closed_client_end_with_an_error_and_not_as_a_cancellation(etcd: EtcdProcess) -> None:
    client = EtcdClient([etcd.endpoint])
    await client.connect()
    stream = client.watch("/", 1)
    await stream.open()

    async with asyncio.TaskGroup() as group:
        reader = group.create_task(_outcome(stream.read(30)))
        await asyncio.sleep(0)
        await client.close()

    assert isinstance(reader.result(), EtcdUnavailable)
    with pytest.raises(EtcdUnavailable, match="closed"):
        await client.get("/a")


async def _outcome(awaitable: object) -> object:
    try:
        return await awaitable  # type: ignore[misc]
    except EtcdError as err:
        return err


async def test_the_same_client_works_again_after_a_crash_and_restart_of_etcd(etcd: EtcdProcess, client: EtcdClient) -> None:
    await client.put("/a", b"1")

    await asyncio.to_thread(etcd.restart)

    found = await client.get("/a")
    assert found is not None
    assert found.value == b"1"


async def test_a_dead_first_endpoint_costs_nothing_but_the_look(shared_etcd: EtcdProcess, prefix: str) -> None:
    async with EtcdClient(["127.0.0.1:1", f"http://{shared_etcd.endpoint}"]) as client:
        began = time.monotonic()
        await client.put(prefix, b"1")

        assert (await client.get(prefix)) is not None
        assert time.monotonic() - began < 1.0


async def test_endpoints_may_be_host_names(shared_etcd: EtcdProcess, prefix: str) -> None:
    port = shared_etcd.endpoint.rpartition(":")[2]
    async with EtcdClient([f"localhost:{port}"], timeout_s=3.0) as client:
        await client.put(prefix, b"1")


async def test_a_cluster_loses_its_leader_and_the_client_goes_on() -> None:
    """E-01, E-02: writes are back within 3 s, a lease of 10 s survives, a watch misses nothing."""
    async with EtcdCluster() as cluster:
        async with EtcdClient(cluster.endpoints) as client, Lease(client) as lease, PrefixWatch(client, "/w/") as watch:
            assert (await anext(watch)).snapshot
            await client.put("/w/a", b"1", lease.id)
            victim = [m for m in cluster.members if await _leads(m)][0]  # noqa: RUF015 - next() takes no async generator

            await asyncio.to_thread(victim.kill)
            killed = time.monotonic()
            while True:
                try:
                    await client.put("/w/b", b"2")
                    break
                except EtcdUnavailable:
                    assert time.monotonic() - killed < 10

            seen: set[str] = set()
            async with asyncio.timeout(15):
                while seen < {"/w/a", "/w/b"}:
                    seen |= {kv.key for kv in (await anext(watch)).puts}
            assert lease.valid()
            assert await client.get("/w/a") is not None


async def test_a_first_renewal_that_meets_a_frozen_member_goes_to_another_one() -> None:
    """E-02: looking which store it is takes part of the renewal's time; a member that does not answer in it is asked last."""
    async with EtcdCluster() as cluster:
        leader = await asyncio.to_thread(cluster.leader)
        preferred = cluster.members[leader - 1]
        others = [m.endpoint for m in cluster.members if m is not preferred]
        async with EtcdClient([preferred.endpoint, *others], guard=StoreGuard()) as client:
            renewals = client.keep_alive((await client.grant(60)).lease_id)
            preferred.pause()
            try:
                with pytest.raises(EtcdUnavailable):
                    await renewals.renew(1.0)  # a frozen member is known by its silence only
                assert await renewals.renew(1.0) == 60
            finally:
                renewals.close()
                preferred.resume()


async def _leads(member: EtcdProcess) -> bool:
    command = [str(_etcdctl()), "--endpoints", member.endpoint, "endpoint", "status", "-w", "fields"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    fields = dict(line.split(" : ") for line in (await process.communicate())[0].decode().splitlines() if " : " in line)
    return fields['"MemberID"'] == fields['"Leader"']


def _etcdctl() -> Path:
    path = Path(find_etcd()).with_name("etcdctl")
    if not path.exists():
        pytest.skip("etcdctl is not installed next to etcd")
    return path


async def test_users_and_passwords_are_used_and_tokens_are_fetched_again(etcd: EtcdProcess) -> None:
    """etcd forgets its tokens when it restarts; neither calls nor watches may notice."""
    ctl = [str(_etcdctl()), "--endpoints", etcd.endpoint]
    for command in (["user", "add", "root:pw"], ["user", "grant-role", "root", "root"], ["auth", "enable"]):
        await asyncio.to_thread(subprocess.run, [*ctl, *command], check=True, capture_output=True)

    anonymous = EtcdClient([etcd.endpoint])
    with pytest.raises(EtcdDenied, match="anonymous"):
        await anonymous.get("/a")
    await anonymous.close()
    wrong = EtcdClient([etcd.endpoint], username="root", password="nope")
    with pytest.raises(EtcdDenied, match="'root'") as caught:
        await wrong.connect()
    assert "nope" not in str(caught.value)
    await wrong.close()

    async with EtcdClient([etcd.endpoint], username="root", password=SecretStr("pw"), timeout_s=3.0) as client:
        async with PrefixWatch(client, "/") as watch, Lease(client, ttl_s=10) as lease:
            await anext(watch)
            await client.put("/a", b"1", lease.id)
            assert [kv.key for kv in (await anext(watch)).puts] == ["/a"]
            await asyncio.to_thread(etcd.restart)
            await client.put("/b", b"2")
            async with asyncio.timeout(10):
                assert [kv.key for kv in (await anext(watch)).puts] == ["/b"]
            stream = client.keep_alive(lease.id)
            assert await stream.renew(3.0) > 0
            stream.close()


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """A certificate authority, a server certificate for 127.0.0.1 and a client certificate, made on the spot."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name in ("server", "client"):
        issued = authority.issue_cert("127.0.0.1", "localhost", common_name=name)
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        for certificate in issued.cert_chain_pems:
            certificate.write_to_path(tmp_path / f"{name}.pem", append=True)
    return tmp_path


async def test_tls_with_client_certificates_works_and_strangers_stay_outside(pki: Path) -> None:
    ca, cert, key = (str(pki / name) for name in ("ca.pem", "client.pem", "client.key"))
    server = EtcdProcess(fsync=False, ca_file=ca, cert_file=str(pki / "server.pem"), key_file=str(pki / "server.key"))
    async with server:
        endpoints = [f"https://{server.endpoint}"]
        dead_first = ["https://127.0.0.1:1", *endpoints]
        async with EtcdClient(dead_first, ca_file=ca, cert_file=cert, key_file=key, timeout_s=3.0) as client:
            await client.put("/a", b"1")
            assert await client.get("/a") is not None
        for known_ca in (ca, ""):
            stranger = EtcdClient(endpoints, timeout_s=0.5, ca_file=known_ca)
            with pytest.raises(EtcdError):
                await stranger.connect()
            await stranger.close()


async def test_a_missing_certificate_file_is_named(tmp_path: Path) -> None:
    client = EtcdClient(["127.0.0.1:1"], ca_file=str(tmp_path / "gone.pem"))

    with pytest.raises(EtcdDenied, match=r"gone\.pem"):
        await client.connect()


async def test_a_compacted_revision_is_a_type_of_its_own(etcd: EtcdProcess, client: EtcdClient) -> None:
    revision = max([await client.put("/a", str(i).encode()) for i in range(3)])
    await client.compact(revision)

    stream = client.watch("/a", 1)
    with pytest.raises(Compacted):
        await stream.open()
        await stream.read(5)
    stream.close()

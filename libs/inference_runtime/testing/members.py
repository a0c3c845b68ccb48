"""Faults of single members of an etcd cluster, and of what they store.

async with Cluster(etcd_members=3) as cluster:
    async with injected(MembersKilled(cluster.store, [cluster.store.leader()])):
        ...
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Collection, Sequence
from pathlib import Path

from inference_runtime.testing.cluster import Cluster
from inference_runtime.testing.etcd import EtcdCluster, ask_member, member_status
from inference_runtime.testing.faults import FaultNotVerified, process_state

__all__ = ["LeasesRevoked", "MembersFrozen", "MembersKilled", "StoreSwapped"]


class _Members:
    """Some members, by number."""

    verb = ""

    def __init__(self, store: EtcdCluster | None, numbers: Sequence[int]) -> None:
        if store is None or not numbers:
            raise FaultNotVerified("there are no members of an etcd cluster here")
        self._members = [store.members[number] for number in numbers]
        self.pids = [member.pid for member in self._members]

    @property
    def name(self) -> str:
        """What it is."""
        return f"{self.verb} {len(self.pids)} of etcd's members (pids {', '.join(map(str, self.pids))})"


class MembersKilled(_Members):
    """SIGKILL for some members; healed by starting them on their data.

    Args:
        store: The cluster.
        numbers: Which members.
    """

    verb = "killing"

    def inject(self) -> None:
        """Kill them."""
        for member in self._members:
            member.kill()

    def is_injected(self) -> bool:
        """Gone from the process table."""
        return all(process_state(pid) == "" for pid in self.pids)

    async def heal(self) -> None:
        """Start them again, and return when each is healthy."""
        for member in self._members:
            await asyncio.to_thread(member.start, wait=False)
        for member in self._members:
            await asyncio.to_thread(member.wait_healthy)

    def is_healed(self) -> bool:
        """Other processes run in their places."""
        return all(member.running and member.pid not in self.pids for member in self._members)


class MembersFrozen(_Members):
    """SIGSTOP for some members: their connections stay open and nothing answers. Healed by SIGCONT.

    Args:
        store: The cluster.
        numbers: Which members.
    """

    verb = "freezing"

    def inject(self) -> None:
        """Stop them."""
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)

    def is_injected(self) -> bool:
        """The kernel says that they are stopped."""
        return all(process_state(pid) == "T" for pid in self.pids)

    async def heal(self) -> None:
        """Let them go on, and return when each is healthy."""
        for pid in self.pids:
            os.kill(pid, signal.SIGCONT)
        for member in self._members:
            await asyncio.to_thread(member.wait_healthy)

    def is_healed(self) -> bool:
        """They run."""
        return all(process_state(pid) not in {"", "T", "Z"} for pid in self.pids)


class StoreSwapped:
    """The data of the cluster's only etcd is swapped for nothing, or for an older state of it. Healed by putting the right data
    back, unless `keep` was set: then the older state is the right one from now on.

    Args:
        cluster: Its etcd has one member.
        older: A copy of the data directory, made while etcd did not run; None for an empty store.
    """

    def __init__(self, cluster: Cluster, older: Path | None) -> None:
        self._cluster, self._older = cluster, older
        self._data = cluster.local.data_dir
        self._aside = cluster.folder / "aside"
        self._before = self._revision()
        #: Revision of the store that was put in.
        self.revision = 0
        self.keep = False

    @property
    def name(self) -> str:
        """What it is."""
        return f"swapping etcd's data for {self._older or 'nothing'}"

    def inject(self) -> None:
        """Swap it, with etcd killed meanwhile."""
        etcd = self._cluster.local.processes["etcd"]
        etcd.kill()
        self._data.rename(self._aside)
        if self._older is not None:
            shutil.copytree(self._older, self._data)
        etcd.start()

    def is_injected(self) -> bool:
        """etcd answers, and its revision is lower than the one before."""
        now = self._revision()
        self.revision = self.revision or now
        return self.keep or 0 < now < self._before

    async def heal(self) -> None:
        """Put the right data back, unless the other one was accepted."""
        if not self.keep:
            etcd = self._cluster.local.processes["etcd"]
            await asyncio.to_thread(etcd.kill)
            await asyncio.to_thread(shutil.rmtree, self._data)
            self._aside.rename(self._data)
            etcd.start()

    def is_healed(self) -> bool:
        """etcd answers, and has its revision again, or goes on from the older one."""
        return self._revision() >= (self.revision if self.keep else self._before)

    def _revision(self) -> int:
        status = member_status(int(self._cluster.etcd[0].rpartition(":")[2]))
        return int(status["header"]["revision"]) if status else 0


class LeasesRevoked:
    """Leases are revoked behind the backs of those who hold them. Heals by itself: they take others.

    Args:
        cluster: Where.
        leases: Their ids.
    """

    def __init__(self, cluster: Cluster, leases: Collection[int]) -> None:
        if not leases:
            raise FaultNotVerified("there are no leases to revoke")
        self._port = int(cluster.etcd[0].rpartition(":")[2])
        self._leases = tuple(leases)

    @property
    def name(self) -> str:
        """What it is."""
        return f"revoking {len(self._leases)} leases"

    def inject(self) -> None:
        """Revoke them, one right after the other."""
        for lease in self._leases:
            ask_member(self._port, "/v3/lease/revoke", {"ID": str(lease)})

    def is_injected(self) -> bool:
        """etcd knows none of them any more."""
        said = ask_member(self._port, "/v3/lease/leases", {})
        alive = {int(lease["ID"]) for lease in said.get("leases", [])}
        return "header" in said and not alive & set(self._leases)

    async def heal(self) -> None:
        """Nothing to do: that is the work of those who held them."""

    def is_healed(self) -> bool:
        """A revoked lease never comes back: what is healed is seen in what is registered."""
        return self.is_injected()

"""Tokens that order the terms of a role, and who leads it. Values only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from google.protobuf.message import DecodeError

from inference_runtime.coordination.kv import KeyValue
from inference_runtime.errors import StaleLeader
from inference_runtime.v1 import common_pb2

__all__ = ["Fence", "FencingToken", "LeaderInfo", "oldest"]


@dataclass(frozen=True, slots=True)
class FencingToken:
    """One term of one role: a later term of the same cluster always has a higher `revision`."""

    role: str
    cluster_id: int
    revision: int

    def to_proto(self) -> common_pb2.FencingToken:
        """The message that travels with every order of a leader."""
        return common_pb2.FencingToken(role=self.role, cluster_id=self.cluster_id, revision=self.revision)

    @classmethod
    def from_proto(cls, message: common_pb2.FencingToken) -> Self:
        """The value of a received message."""
        return cls(message.role, message.cluster_id, message.revision)


@dataclass(frozen=True, slots=True)
class LeaderInfo:
    """Who leads a role, where it answers (host:port), and under which token."""

    role: str
    candidate_id: str
    address: str
    pid: int
    token: FencingToken

    def to_proto(self) -> common_pb2.Leader:
        """The message that services hand out."""
        return common_pb2.Leader(
            role=self.role, candidate_id=self.candidate_id, address=self.address, pid=self.pid, token=self.token.to_proto()
        )

    @classmethod
    def from_key(cls, role: str, kv: KeyValue, cluster_id: int) -> Self:
        """Reads a leader key. A value that is no `Leader` message gives an empty address: somebody leads and
        cannot be called."""
        try:
            leader = common_pb2.Leader.FromString(kv.value)
        except DecodeError:
            leader = common_pb2.Leader()
        candidate_id = leader.candidate_id or kv.key.rpartition("/")[2]
        return cls(role, candidate_id, leader.address, leader.pid, FencingToken(role, cluster_id, kv.create_revision))


class Fence:
    """What a receiver of orders remembers: the highest token of each role. Pure; the receiver decides where to persist it."""

    def __init__(self) -> None:
        self._highest: dict[str, FencingToken] = {}

    def highest(self, role: str) -> FencingToken | None:
        """The highest token seen of this role."""
        return self._highest.get(role)

    def check(self, token: FencingToken) -> None:
        """Accepts the token and remembers it.

        Raises:
            StaleLeader: A later leader of this role has spoken already, or the token is of another etcd cluster, whose revisions
                cannot be compared: then restart this process once the new cluster is known to be the right one.
        """
        seen = self._highest.get(token.role)
        if seen is not None and seen.cluster_id != token.cluster_id:
            raise StaleLeader(
                f"The order of the {token.role} carries a token of etcd cluster {token.cluster_id:x}; this process follows"
                f" {seen.cluster_id:x}. Restart it if etcd was replaced on purpose.",
                role=token.role,
            )
        if seen is not None and token.revision < seen.revision:
            raise StaleLeader(
                f"The order of the {token.role} carries term {token.revision}, and term {seen.revision} has begun.",
                role=token.role,
            )
        self._highest[token.role] = token


def oldest(candidates: Iterable[KeyValue]) -> KeyValue | None:
    """The leader among candidate keys: the one created first. None without candidates."""
    return min(candidates, key=lambda kv: kv.create_revision, default=None)

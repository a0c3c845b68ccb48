"""The latest load of each replica."""

from __future__ import annotations

import random

from inference_runtime.v1 import common_pb2
from services.coordinator.load import LoadBook, better_of_two


def load(replica_id: str, running: int, queued: int = 0) -> common_pb2.ReplicaLoad:
    return common_pb2.ReplicaLoad(replica_id=replica_id, running=running, queued=queued)


def replica(replica_id: str, max_concurrent: int = 10) -> common_pb2.Replica:
    return common_pb2.Replica(id=replica_id, max_concurrent=max_concurrent)


def test_the_latest_report_counts() -> None:
    book = LoadBook(ttl_s=10)
    assert book.report(load("r", 1), 0.0)
    assert book.report(load("r", 5), 1.0)

    assert book.get("r", 2.0) == load("r", 5)


def test_a_report_that_says_the_same_is_not_news() -> None:
    book = LoadBook(ttl_s=10)
    book.report(load("r", 1), 0.0)

    assert not book.report(load("r", 1), 9.0)
    assert book.get("r", 18.0) == load("r", 1), "it still renews"


def test_an_old_report_is_forgotten() -> None:
    book = LoadBook(ttl_s=10)
    book.report(load("r", 1), 0.0)

    assert book.get("r", 10.0) is not None
    assert book.get("r", 10.1) is None
    assert book.all(10.1) == []


def test_the_book_holds_no_more_than_the_table() -> None:
    book = LoadBook(ttl_s=10)
    for i in range(100):
        book.report(load(f"r{i}", 1), 0.0)

    book.keep({"r3", "r4"}, 1.0)

    assert [x.replica_id for x in book.all(1.0)] == ["r3", "r4"]
    assert len(book) == 2


def test_trap_06_reported_load_decides_the_choice() -> None:
    """Trap 6: load reports were dead code. Of two replicas the busy one is never chosen."""
    book = LoadBook(ttl_s=10)
    book.report(load("busy", 9), 0.0)
    book.report(load("idle", 1), 0.0)
    draw = random.Random(1)

    assert {better_of_two([replica("busy"), replica("idle")], book, 1.0, draw).id for _ in range(50)} == {"idle"}


def test_load_is_measured_by_what_a_replica_can_take() -> None:
    book = LoadBook(ttl_s=10)
    book.report(load("big", 8), 0.0)
    book.report(load("small", 2), 0.0)
    replicas = [replica("big", max_concurrent=100), replica("small", max_concurrent=2)]

    assert better_of_two(replicas, book, 1.0, random.Random(1)).id == "big"


def test_equal_replicas_share_the_work() -> None:
    draw, book = random.Random(7), LoadBook(ttl_s=10)
    replicas = [replica(f"r{i}") for i in range(4)]

    chosen = [better_of_two(replicas, book, 0.0, draw).id for _ in range(400)]

    assert all(60 < chosen.count(r.id) < 140 for r in replicas)


def test_a_single_replica_is_chosen() -> None:
    assert better_of_two([replica("r")], LoadBook(ttl_s=1), 0.0, random.Random(1)).id == "r"

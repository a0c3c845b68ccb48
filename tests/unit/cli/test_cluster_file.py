"""How a command finds the cluster, and who may have a state directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inference_runtime.cli import cluster_file
from inference_runtime.cli.cluster_file import RUNTIME_FILE, Located, locate, lock_state_dir, write_atomically
from inference_runtime.errors import BadRequest, ServerError

DOCUMENT = {"http": "http://127.0.0.1:1", "grpc": "127.0.0.1:2", "etcd": "127.0.0.1:3", "pids": {"etcd": 4}}


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory and a home of this test."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_a_running_up_in_the_working_directory_is_found() -> None:
    """`inferctl get` beside `inferctl up` needs no flag."""
    write_atomically(cluster_file.LOCAL_DIR / RUNTIME_FILE, DOCUMENT)

    assert locate("", None) == Located(("127.0.0.1:3",), "http://127.0.0.1:1", "127.0.0.1:2")


def test_the_users_own_state_directory_is_the_second_place() -> None:
    """Where the working directory holds none."""
    write_atomically(cluster_file.home_state_dir() / RUNTIME_FILE, DOCUMENT)

    assert locate("", None).etcd == ("127.0.0.1:3",)


def test_a_named_state_directory_is_the_only_place(tmp_path: Path) -> None:
    """--state-dir does not fall back to another cluster."""
    write_atomically(cluster_file.LOCAL_DIR / RUNTIME_FILE, DOCUMENT)

    with pytest.raises(BadRequest, match="no cluster: nothing runs from"):
        locate("", tmp_path / "other")


def test_etcd_by_name_wins_and_brings_no_gateway_of_another_cluster() -> None:
    """--etcd speaks to that cluster; the gateway is known only if it is the one of the same `up`."""
    write_atomically(cluster_file.LOCAL_DIR / RUNTIME_FILE, DOCUMENT)

    assert locate("a:1, b:2", None) == Located(("a:1", "b:2"))
    assert locate("127.0.0.1:3", None).http == "http://127.0.0.1:1"


def test_without_a_cluster_the_way_out_is_said() -> None:
    """Bad input: what to start or to name."""
    with pytest.raises(BadRequest, match=r"inferctl up.*--etcd"):
        locate("", None)


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    """A reader of the ready file never sees half of it."""
    path = tmp_path / "deep" / "ready.json"
    write_atomically(path, DOCUMENT)
    write_atomically(path, {**DOCUMENT, "http": "new"})

    assert json.loads(path.read_text())["http"] == "new"
    assert [p.name for p in path.parent.iterdir()] == ["ready.json"]


def test_a_state_directory_belongs_to_one(tmp_path: Path) -> None:
    """Two `up` on one directory would share etcd's data: the second is refused, with the pid of the first."""
    with lock_state_dir(tmp_path), pytest.raises(ServerError, match=r"another inferctl up \(pid \d+\) runs from"):
        lock_state_dir(tmp_path)
    lock_state_dir(tmp_path).close()


def test_a_state_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    """Bad input: the directory and the flag."""
    (tmp_path / "file").touch()

    with pytest.raises(ServerError, match="choose another --state-dir"):
        lock_state_dir(tmp_path / "file" / "state")

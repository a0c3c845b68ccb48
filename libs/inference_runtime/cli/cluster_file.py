"""How a command finds the cluster: the file that a running `inferctl up` leaves in its state directory."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from inference_runtime.errors import BadRequest, ServerError

__all__ = ["Located", "default_state_dir", "locate", "lock_state_dir", "make_private", "write_atomically"]

RUNTIME_FILE = "runtime.json"
LOCAL_DIR = Path(".inference")


@dataclass(frozen=True, slots=True)
class Located:
    """Where a cluster is. `http` is empty when only etcd is known."""

    etcd: tuple[str, ...]
    http: str = ""
    grpc: str = ""


def home_state_dir() -> Path:
    """The state directory of this user."""
    return Path.home() / ".local" / "state" / "inference-runtime"


def default_state_dir() -> Path:
    """`./.inference`, or the user's own where the working directory cannot be written."""
    writable = os.access(LOCAL_DIR if LOCAL_DIR.exists() else Path(), os.W_OK)
    return LOCAL_DIR if writable else home_state_dir()


def locate(etcd: str, state_dir: Path | None) -> Located:
    """The cluster that a command speaks to.

    Args:
        etcd: host:port of members, comma-separated, when the caller named them.
        state_dir: State directory, when the caller named one; else `./.inference`, then the user's own.

    Raises:
        BadRequest: Nothing was named and no `inferctl up` runs.
    """
    found = {}
    places = [state_dir] if state_dir is not None else [LOCAL_DIR, home_state_dir()]
    for place in places:
        try:
            found = json.loads((place / RUNTIME_FILE).read_text(encoding="utf-8"))
            break
        except (OSError, ValueError):
            continue
    if etcd:
        members = tuple(part.strip() for part in etcd.split(",") if part.strip())
        same = found.get("etcd") == etcd
        return Located(members, found.get("http", "") if same else "", found.get("grpc", "") if same else "")
    if not found:
        where = " or ".join(str(place) for place in places)
        raise BadRequest(
            f"no cluster: nothing runs from {where}; start one with `inferctl up`, or name etcd with --etcd host:port"
        )
    return Located(tuple(found["etcd"].split(",")), found["http"], found["grpc"])


def write_atomically(path: Path, document: Mapping[str, object]) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def make_private(folder: Path) -> None:
    """Make a folder that only this user can look into, or turn one into that. Logs and usage are nobody else's business."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


def lock_state_dir(state_dir: Path) -> IO[str]:
    """Claim a state directory for this process, until the returned file is closed.

    Raises:
        ServerError: It cannot be made, or another `inferctl up` has it.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (state_dir / "lock").open("a+", encoding="utf-8")
    except OSError as err:
        raise ServerError(f"state directory {state_dir} cannot be used: {err.strerror}; choose another --state-dir") from err
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ServerError(
            f"another inferctl up (pid {holder}) runs from {state_dir}; stop it, or choose another --state-dir"
        ) from err
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file

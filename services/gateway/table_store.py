"""The routing table on disk, so that a gateway that starts while the control plane is away still serves.

One file, replaced whole: a line of JSON with a checksum, then the table as the coordinator would send it. What cannot be read
is never used; the next table that arrives replaces it. A table from disk is in force until the first live one, and no longer.

The file also says which store the table came from, so that a restarted gateway refuses an etcd that was wiped meanwhile as a
running one does. An etcd at other endpoints is another one on purpose: then the file is not used.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from inference_runtime.coordination import StoreMark
from inference_runtime.errors import ServerError
from inference_runtime.telemetry import get_logger
from inference_runtime.v1 import common_pb2, coordinator_service_pb2

__all__ = ["FILE", "StoredTable", "TableStore"]

log = get_logger(__name__)

#: Name of the file in the gateway's state directory.
FILE = "routes.bin"
FORMAT = "inference-runtime routes 1"
#: A table changes in bursts, and is written at most this often, seconds.
WRITE_INTERVAL_S = 0.2
#: Pause after a write that failed, seconds. The disk may be full.
RETRY_S = 10.0
#: A file larger than this was not written here.
MAX_BYTES = 256 << 20

_HEX = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class StoredTable:
    """What the file holds.

    Args:
        table: A snapshot: every line, the revision, the coordinator's token. No load.
        mark: The store it came from; None when that had no id.
        endpoints: host:port of the etcd members that were configured.
    """

    table: coordinator_service_pb2.WatchRoutesResponse
    mark: StoreMark | None
    endpoints: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """As written."""
        payload = self.table.SerializeToString(deterministic=True)
        mark = self.mark
        head: dict[str, object] = {
            "format": FORMAT,
            "endpoints": list(self.endpoints),
            "store": None
            if mark is None
            else {
                "store_id": mark.store_id,
                "cluster_id": mark.cluster_id,
                "revision": mark.revision,
                "past": list(mark.past),
            },
        }
        head["sha256"] = _checksum(head, payload)
        return json.dumps(head, sort_keys=True).encode() + b"\n" + payload

    @classmethod
    def from_bytes(cls, data: bytes) -> StoredTable:
        """Reads a file.

        Raises:
            ValueError: It is none of ours, of another format, cut off, or changed. The message says which.
        """
        line, separator, payload = data.partition(b"\n")
        try:
            head = json.loads(line)
        except ValueError:
            head = None
        if not separator or not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ValueError(f"it does not begin as {FORMAT!r}")
        if head.pop("sha256", None) != _checksum(head, payload):
            raise ValueError("its checksum is wrong: it was cut off or changed")
        try:
            table = coordinator_service_pb2.WatchRoutesResponse.FromString(payload)
            return cls(table, _mark(head["store"]), tuple(head["endpoints"]))
        except (DecodeError, KeyError, TypeError) as err:
            raise ValueError("its checksum is right and its content is not readable") from err


def _checksum(head: dict[str, object], payload: bytes) -> str:
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode() + b"\n" + payload).hexdigest()


def _mark(stored: dict[str, object] | None) -> StoreMark | None:
    if stored is None:
        return None
    store_id, cluster_id, revision, past = (stored[key] for key in ("store_id", "cluster_id", "revision", "past"))
    if not isinstance(store_id, str) or not isinstance(cluster_id, int) or not isinstance(revision, int):
        raise TypeError("store")
    if not isinstance(past, list) or not all(isinstance(i, str) and _HEX.fullmatch(i) for i in (store_id, *past)):
        raise TypeError("store")
    return StoreMark(store_id, cluster_id, revision, tuple(past))


class TableStore:
    """The file of one gateway. Its workers share it: each writes the newest table it knows, and they are all told the same.

    Args:
        folder: The gateway's own directory; made, for this user alone, when missing.
        endpoints: host:port of the configured etcd members.
    """

    def __init__(self, folder: Path, endpoints: Sequence[str]) -> None:
        self._path, self._endpoints = folder / FILE, tuple(endpoints)
        self._lines: dict[str, coordinator_service_pb2.DeploymentRoute] = {}
        self._token = common_pb2.FencingToken()
        self._mark: StoreMark | None = None
        self._revision = 0
        self._changed = asyncio.Event()

    def load(self) -> StoredTable | None:
        """What an earlier life of this gateway wrote; None when there is nothing that may be used. Blocks on the disk.

        Raises:
            ServerError: The directory cannot be used.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as err:
            raise ServerError(f"state_dir: {err.filename}: {err.strerror}; choose another state_dir, or none") from err
        try:
            if len(data) > MAX_BYTES:
                raise ValueError("it is too large")
            stored = StoredTable.from_bytes(data)
        except ValueError as err:
            log.warning("routing table on disk is not used", path=str(self._path), cause=str(err))
            return None
        if set(stored.endpoints).isdisjoint(self._endpoints):
            log.info("routing table on disk is not used: it came from another etcd", path=str(self._path))
            return None
        self.took(stored.table, stored.mark)
        self._changed.clear()
        log.info("routing table taken from disk", path=str(self._path), deployments=len(stored.table.deployments))
        return stored

    def took(self, update: coordinator_service_pb2.WatchRoutesResponse, mark: StoreMark | None) -> None:
        """The gateway took over a table or a change of it, which came from that store. Load is not kept: it is old by then."""
        if update.snapshot:
            self._lines.clear()
        for name in update.removed:
            self._lines.pop(name, None)
        self._lines.update((line.deployment, line) for line in update.deployments)
        self._revision, self._mark = update.revision, mark
        if update.fencing_token.revision:
            self._token = update.fencing_token
        if update.snapshot or update.deployments or update.removed:
            self._changed.set()

    async def run(self) -> None:
        """Writes the table after each change, until cancelled. A disk that takes nothing is logged and tried again: no request
        depends on it."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await asyncio.to_thread(_replace, self._path, self._present().to_bytes())
            except OSError as err:
                log.warning("routing table not written to disk", path=str(self._path), cause=err.strerror or str(err))
                self._changed.set()
                await asyncio.sleep(RETRY_S)
            else:
                await asyncio.sleep(WRITE_INTERVAL_S)

    def _present(self) -> StoredTable:
        table = coordinator_service_pb2.WatchRoutesResponse(
            revision=self._revision, snapshot=True, deployments=self._lines.values(), fencing_token=self._token
        )
        return StoredTable(table, self._mark, self._endpoints)


def _replace(path: Path, data: bytes) -> None:
    """A reader, also one after a crash of the machine, sees the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # made with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

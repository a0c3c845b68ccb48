"""The usage ledger: one row for each finished request, and their sums, in one SQLite file.

A row and its share of the sums are written in one transaction, and a row with a known (request_id, attempt) is not written again:
a record counts once however often it is sent, across restarts too. Several processes may open the same file, as two metrics
services of one machine do in a hand-over; SQLite orders their transactions.

NOT guaranteed: that a record older than the newest `max_records` is still known as seen. Sums are kept for ever.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from inference_runtime.errors import ServerError
from inference_runtime.v1 import metrics_service_pb2
from services.metrics.aggregate import Totals, add_up

__all__ = ["Ledger"]

#: How long a transaction waits for another process's, seconds. They last milliseconds.
BUSY_TIMEOUT_S = 5.0
#: Statements of the schema. `usage.id` rises with time, so that the oldest rows are found without an index on time.
SCHEMA = (
    """CREATE TABLE IF NOT EXISTS usage (
        id INTEGER PRIMARY KEY, request_id TEXT NOT NULL, attempt INTEGER NOT NULL, deployment TEXT NOT NULL,
        tenant TEXT NOT NULL, accepted_at_s INTEGER NOT NULL, record BLOB NOT NULL, UNIQUE (request_id, attempt))""",
    """CREATE TABLE IF NOT EXISTS totals (
        deployment TEXT PRIMARY KEY, requests INTEGER NOT NULL, cancelled INTEGER NOT NULL, input_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL, cost_micro_usd INTEGER NOT NULL) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS errors (
        deployment TEXT NOT NULL, reason TEXT NOT NULL, requests INTEGER NOT NULL,
        PRIMARY KEY (deployment, reason)) WITHOUT ROWID""",
)
T = TypeVar("T")


class Ledger:
    """One open ledger. Its SQLite connection lives in one thread of its own, so that no disk access blocks the event loop.

    Args:
        path: The file, or ":memory:".
        max_records: Rows to keep; the oldest go first.
    """

    def __init__(self, path: str, max_records: int) -> None:
        self._path, self._max_records = path, max_records
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        self._db: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Open the file, made where it is missing.

        Raises:
            ServerError: It cannot be opened, or is not a ledger.
        """
        await self._run(self._open)

    async def record(self, records: Sequence[metrics_service_pb2.UsageRecord]) -> dict[str, Totals]:
        """Write the records that are new, all or none. Returns what those add up to, by deployment.

        On cancel the transaction still ends one way or the other; sending the batch again is safe.

        Raises:
            ServerError: The file cannot be written: the disk is full, or another process holds it for too long.
        """
        return await self._run(lambda: self._record(records))

    async def totals(self, deployment: str = "") -> dict[str, Totals]:
        """The sums, of one deployment or of all.

        Raises:
            ServerError: The file cannot be read.
        """
        return await self._run(lambda: self._totals(deployment))

    async def close(self) -> None:
        """Close the file. The ledger can be opened again."""
        await self._run(self._close)

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as err:
            raise ServerError(f"usage ledger {self._path}: {err}; check the disk, or choose another ledger") from err
        except OSError as err:
            raise ServerError(f"usage ledger {self._path}: {err.strerror}; choose another state_dir") from err

    # What follows runs in the thread.

    def _open(self) -> None:
        if self._path != ":memory:":
            Path(self._path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))  # who used what is for its owner; SQLite keeps the mode
        db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            # Survives every crash of the process; when the machine loses power, all but the last moments.
            db.execute("PRAGMA synchronous = NORMAL")
            for statement in SCHEMA:
                db.execute(statement)
        except sqlite3.Error:
            db.close()
            raise
        self._db = db

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise sqlite3.ProgrammingError("the ledger is closed")
        return self._db

    def _record(self, records: Sequence[metrics_service_pb2.UsageRecord]) -> dict[str, Totals]:
        db = self._connection()
        db.execute("BEGIN IMMEDIATE")
        try:
            totals = add_up([record for record in records if self._insert(db, record)])
            self._add(db, totals)
            db.execute("DELETE FROM usage WHERE id <= (SELECT max(id) FROM usage) - ?", (self._max_records,))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # SQLite itself rolls back when the disk is full
                db.execute("ROLLBACK")
            raise
        return totals

    @staticmethod
    def _insert(db: sqlite3.Connection, record: metrics_service_pb2.UsageRecord) -> bool:
        row = (
            record.request_id,
            record.attempt,
            record.deployment,
            record.tenant,
            record.accepted_at.seconds,
            record.SerializeToString(),
        )
        columns = "request_id, attempt, deployment, tenant, accepted_at_s, record"
        sql = f"INSERT OR IGNORE INTO usage ({columns}) VALUES (?, ?, ?, ?, ?, ?)"  # noqa: S608 - no value is in it
        return db.execute(sql, row).rowcount == 1

    @staticmethod
    def _add(db: sqlite3.Connection, totals: dict[str, Totals]) -> None:
        for deployment, t in totals.items():
            db.execute(
                """INSERT INTO totals VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (deployment) DO UPDATE SET
                requests = requests + excluded.requests, cancelled = cancelled + excluded.cancelled,
                input_tokens = input_tokens + excluded.input_tokens, output_tokens = output_tokens + excluded.output_tokens,
                cost_micro_usd = cost_micro_usd + excluded.cost_micro_usd""",
                (deployment, t.requests, t.cancelled, t.input_tokens, t.output_tokens, t.cost_micro_usd),
            )
            db.executemany(
                """INSERT INTO errors VALUES (?, ?, ?) ON CONFLICT (deployment, reason) DO UPDATE SET
                requests = requests + excluded.requests""",
                [(deployment, reason, count) for reason, count in t.errors_by_reason.items()],
            )

    def _totals(self, deployment: str) -> dict[str, Totals]:
        db = self._connection()
        db.execute("BEGIN")  # both tables as of one moment
        try:
            rows = db.execute("SELECT * FROM totals WHERE ? IN ('', deployment) ORDER BY deployment", (deployment,)).fetchall()
            errors = db.execute("SELECT * FROM errors WHERE ? IN ('', deployment)", (deployment,)).fetchall()
        finally:
            db.execute("COMMIT")
        totals = {row[0]: Totals(*row[1:]) for row in rows}
        for name, reason, count in errors:
            totals[name].errors_by_reason[reason] = count
        return totals

"""Settings of the metrics service."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from inference_runtime.settings import ServiceSettings

__all__ = ["MetricsSettings"]


class MetricsSettings(ServiceSettings):
    """The metrics service: counts the usage of every request once."""

    service: ClassVar[str] = "metrics"

    state_dir: Path = Field(default=Path("~/.local/state/inference-runtime"), description="directory of the ledger")
    ledger: str = Field(
        default="usage.sqlite3",
        min_length=1,
        description='SQLite file, taken from state_dir; ":memory:" forgets it all at the end',
    )
    max_records: int = Field(
        default=5_000_000, ge=1000, description="records kept, about 250 bytes each; older ones live on in the sums"
    )
    grace_s: float = Field(default=2.0, ge=0, description="seconds that running calls may take to end at shutdown")

    def ledger_path(self) -> str:
        """The ledger as SQLite opens it."""
        return self.ledger if self.ledger == ":memory:" else str(self.state_dir.expanduser() / self.ledger)

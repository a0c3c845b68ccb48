"""The metrics of all workers of a gateway as one: whoever is asked answers for all.

Each worker keeps its figures in a file of its own, in a folder of their parent's, and adds up all files when it is scraped. What
it shows of itself is written down before it is shown, so no later scrape, whichever worker answers it, shows a counter that has
fallen. A worker that takes a dead one's place goes on from its counters.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from inference_runtime.telemetry import Family, MetricSet, get_logger, merged, prometheus_text

__all__ = ["SUFFIX", "MetricShare", "text_of_all"]

log = get_logger(__name__)

SUFFIX = ".metrics"
#: Seconds between two writes. What a worker counted since the last one is lost when it is killed.
WRITE_S = 1.0
#: A file that is older was left by a worker that is dead or stands still: its gauges say nothing about now. Seconds.
STALE_S = 5.0


class _Page(msgspec.Struct, array_like=True, frozen=True):
    """What one worker wrote. `written_at` is the machine's monotonic clock."""

    written_at: float
    families: list[Family]


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Page)


class MetricShare:
    """One worker's part.

    Args:
        metrics: Of this process.
        file: Its own file; those beside it with the same suffix belong to the other workers.
    """

    def __init__(self, metrics: MetricSet, file: Path) -> None:
        self._metrics, self._file = metrics, file
        # Whoever had this place before: what it counted happened.
        self._before = [family for family in _read(file) if family.kind != "gauge"]
        self._turn = threading.Lock()  # scrapes and the writer run in threads: an older page never replaces a newer one

    def text(self) -> bytes:
        """The metrics of all workers. Blocks for a few small files: call it in a thread."""
        with self._turn:
            own = self._write()
        return prometheus_text(merged([own, *_pages(f for f in self._file.parent.glob(f"*{SUFFIX}") if f != self._file)]))

    async def run(self) -> None:
        """Keep the file up to date until cancelled."""
        while True:
            await asyncio.to_thread(self._write_in_turn)
            await asyncio.sleep(WRITE_S)

    def _write_in_turn(self) -> None:
        with self._turn:
            self._write()

    def _write(self) -> list[Family]:
        families = merged([self._metrics.families(), self._before])
        draft = self._file.with_suffix(".draft")
        try:
            draft.write_bytes(_encoder.encode(_Page(time.monotonic(), families)))
            draft.replace(self._file)
        except OSError as err:  # a full disk is no reason to end, nor to show nothing
            log.warning("metrics not shared with other workers", file=str(self._file), why=err.strerror or str(err))
        return families


def text_of_all(folder: Path) -> bytes:
    """The metrics of all workers, for their parent. Blocks as `MetricShare.text` does."""
    return prometheus_text(merged(_pages(folder.glob(f"*{SUFFIX}"))))


def _pages(files: Iterable[Path]) -> list[list[Family]]:
    return [_read(file) for file in sorted(files)]


def _read(file: Path) -> list[Family]:
    """What stands in a file; nothing where there is none. Gauges of a stale one are left out."""
    try:
        page = _decoder.decode(file.read_bytes())
    except FileNotFoundError:
        return []
    except msgspec.DecodeError as err:  # replaced whole, so only a worker of another version can have written it
        log.warning("metrics of another worker cannot be read", file=str(file), why=str(err))
        return []
    if time.monotonic() - page.written_at > STALE_S:
        return [family for family in page.families if family.kind != "gauge"]
    return page.families

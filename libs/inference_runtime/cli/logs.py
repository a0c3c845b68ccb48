"""`inferctl logs`: the log files of an `up` on this machine, the last lines and what comes after them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from inference_runtime.errors import BadRequest

__all__ = ["find_logs", "follow", "tail"]

#: Seconds between two looks for new lines.
LOOK_S = 0.2
#: Bytes read from the end of a log to find its last lines.
TAIL_BYTES = 1 << 20


def find_logs(places: Sequence[Path], service: str) -> list[Path]:
    """The logs of the first of these state directories that has any: those of one service (`gateway` names `gateway-2`, too) or
    one process, or all.

    Raises:
        BadRequest: There is none.
    """
    for place in places:
        every = sorted((place / "logs").glob("*.log"))
        if every:
            names = [path.stem for path in every]
            found = [p for p in every if not service or p.stem == service or p.stem.rpartition("-")[0] == service]
            if not found:
                raise BadRequest(f"nothing called {service!r} has a log in {place / 'logs'}; there are {', '.join(names)}")
            return found
    raise BadRequest(f"no logs in {' or '.join(str(place / 'logs') for place in places)}; name the directory with --state-dir")


def tail(path: Path, lines: int) -> tuple[list[str], int]:
    """The last lines of a log, and how many bytes of it were read."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        start = file.seek(max(0, size - TAIL_BYTES))
        text = file.read(size - start)
    whole = text.rpartition(b"\n")[0].split(b"\n") if b"\n" in text else []  # a line that is being written comes later
    done = start + text.rfind(b"\n") + 1
    return [line.decode("utf-8", "replace") for line in whole[-lines:]] if lines else [], done


def follow(paths: Sequence[Path], read: dict[Path, int], say: Callable[[Path, str], None]) -> Iterator[None]:
    """Say each new line of these logs, for ever; yields after every look. A log that became shorter is read from its beginning.

    Args:
        paths: The logs.
        read: Bytes of each that were said already.
        say: Called with a log and one of its lines.
    """
    while True:
        for path in paths:
            if not path.exists():
                continue
            with path.open("rb") as file:
                if file.seek(0, 2) < read[path]:
                    read[path] = 0
                file.seek(read[path])
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            read[path] += len(whole)
            for line in whole.splitlines():
                say(path, line.decode("utf-8", "replace"))
        yield
        time.sleep(LOOK_S)

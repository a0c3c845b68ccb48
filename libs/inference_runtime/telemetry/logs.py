"""Logs: one event per fact, a constant message and fields, one line each."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping

__all__ = ["MAX_FIELD_CHARS", "Formatter", "Logger", "get_logger"]

#: A logged field longer than this is cut: a header of a megabyte is not a log line.
MAX_FIELD_CHARS = 2048


class Logger:
    """Logs events with fields: `log.info("replica registered", deployment=…, replica=…)`."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def _log(self, level: int, message: str, exc_info: BaseException | None, fields: Mapping[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, message, exc_info=exc_info, extra={"fields": fields})

    def debug(self, message: str, /, **fields: object) -> None:
        """An expected refusal, a detail."""
        self._log(logging.DEBUG, message, None, fields)

    def info(self, message: str, /, **fields: object) -> None:
        """A decision or a change of state."""
        self._log(logging.INFO, message, None, fields)

    def warning(self, message: str, /, **fields: object) -> None:
        """Something a person should know by tomorrow."""
        self._log(logging.WARNING, message, None, fields)

    def error(self, message: str, /, *, exc_info: BaseException | None = None, **fields: object) -> None:
        """A surprise. Wakes someone."""
        self._log(logging.ERROR, message, exc_info, fields)


def get_logger(name: str) -> Logger:
    """The logger of a module."""
    return Logger(name)


def _field(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    if len(text) > MAX_FIELD_CHARS:
        text = f"{text[:MAX_FIELD_CHARS]}…"
    return text


class Formatter(logging.Formatter):
    """One record, one line: control characters are escaped, so that a field cannot forge a line."""

    def __init__(self, service: str, as_json: bool) -> None:
        super().__init__()
        self._service, self._as_json = service, as_json

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, object] = getattr(record, "fields", {})
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        trace = self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""
        if self._as_json:
            entry: dict[str, object] = {
                "time": stamp,
                "level": record.levelname.lower(),
                "service": self._service,
                "logger": record.name,
                "message": record.getMessage(),
            }
            entry.update({key: _field(value) for key, value in fields.items()})
            if trace:
                entry["exception"] = trace
            return json.dumps(entry)
        pairs = " ".join(f"{key}={json.dumps(_field(value), ensure_ascii=False)}" for key, value in fields.items())
        event = f"{_printable(record.getMessage())} {_printable(pairs)}".rstrip()
        line = f"{stamp} {record.levelname.lower():7s} {self._service}: {event}"
        return f"{line}\n{trace}" if trace else line


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

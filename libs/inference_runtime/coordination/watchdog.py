"""Ends the process when it still leads after its lease: for an event loop that is stuck, nothing inside it can step down."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from inference_runtime.coordination.clock import boottime
from inference_runtime.coordination.lease import Lease

__all__ = ["EXIT_STATUS", "GRACE_S", "guarded"]

#: How long after the end of validity a leader may take to step down, seconds. etcd's expiry comes at least a second later.
GRACE_S = 1.0
#: EX_TEMPFAIL of sysexits.h: start me again.
EXIT_STATUS = 75
#: Pause between two looks, seconds.
LOOK_S = 0.1
#: Looks that must find a term overdue. After a suspend or SIGSTOP the event loop gets that much running time to step down.
LOOKS = 5

_active: dict[object, tuple[str, Lease]] = {}
_changed = threading.Condition()
_thread: threading.Thread | None = None


@contextmanager
def guarded(role: str, lease: Lease) -> Iterator[None]:
    """While the body runs, the process leads `role` under `lease`; it is ended (status 75) if the body outlasts the lease's
    validity by more than GRACE_S. No `finally` runs then: whatever a leader does must bear a crash anyway."""
    global _thread
    entry = object()
    with _changed:
        _active[entry] = (role, lease)
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_watch, name="leader-watchdog", daemon=True)
            _thread.start()
        _changed.notify()
    try:
        yield
    finally:
        with _changed:
            del _active[entry]


def _watch() -> None:
    overdue: dict[object, int] = {}
    while True:
        with _changed:
            while not _active:
                overdue.clear()
                _changed.wait()
            active = dict(_active)
        now = boottime()
        overdue = {entry: overdue.get(entry, 0) + 1 for entry, (_, lease) in active.items() if now >= lease.valid_until}
        for entry, looks in overdue.items():
            role, lease = active[entry]
            if looks >= LOOKS and now >= lease.valid_until + GRACE_S:
                os.write(
                    2, f"still leading {role} {now - lease.valid_until:.1f} s after the lease: ending the process\n".encode()
                )
                os._exit(EXIT_STATUS)
        time.sleep(LOOK_S)

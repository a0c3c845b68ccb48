"""A thread that ends terms in time when the event loop does not: because its timers have slept through a suspend, or because it
is stuck. The loop is told first; a loop that does not act on it is ended with its process.

Not covered: C code that holds the interpreter's lock keeps this thread from running, too. What holds then is that every write of
a leader is guarded in etcd.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
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

_active: dict[object, tuple[str, Lease, asyncio.AbstractEventLoop]] = {}
_changed = threading.Condition()
_thread: threading.Thread | None = None


@contextmanager
def guarded(role: str, lease: Lease) -> Iterator[None]:
    """While the body runs, the process leads `role` under `lease`. When the lease's validity ends, the lease is declared lost on
    the running loop; if the body outlasts it by more than GRACE_S, the process is ended (status 75), with the stacks of all
    threads on stderr. No `finally` runs then: whatever a leader does must bear a crash anyway."""
    global _thread
    entry = object()
    with _changed:
        _active[entry] = (role, lease, asyncio.get_running_loop())
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
        overdue = {entry: overdue.get(entry, 0) + 1 for entry, (_, lease, _) in active.items() if now >= lease.valid_until}
        for entry, looks in overdue.items():
            role, lease, loop = active[entry]
            if looks == 1:
                with contextlib.suppress(RuntimeError):  # a loop that is closed has no term any more
                    loop.call_soon_threadsafe(lease.end)
            if looks >= LOOKS and now >= lease.valid_until + GRACE_S:
                _end_process(role, now - lease.valid_until)
        time.sleep(LOOK_S)


def _end_process(role: str, late_s: float) -> None:
    os.write(2, f"still leading {role} {late_s:.1f} s after the lease: ending the process; its threads stand here\n".encode())
    faulthandler.dump_traceback(file=2, all_threads=True)
    os._exit(EXIT_STATUS)

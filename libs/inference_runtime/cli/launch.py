"""Becomes another program that dies with its parent: `python -I -S launch.py PARENT_PID PROGRAM ARGUMENT…`.

Runs before the program it turns into, so it imports next to nothing. The kernel delivers the signal when the *thread* that
started this process ends, so a caller starts it from a thread that lives as long as its process. Elsewhere than on Linux it only
becomes the other program.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

#: prctl's number for "send me this signal when my parent is gone".
PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call above
            sys.exit(1)
    try:
        os.execvp(program[0], program)  # noqa: S606 - no shell is the point
    except OSError as err:
        sys.exit(f"cannot start {program[0]}: {err.strerror}")

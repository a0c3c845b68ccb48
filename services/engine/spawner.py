"""Starts the child processes of contexts, all from one thread that lives as long as the engine.

One thread, because the kernel's "kill me when my parent dies" means the parent's thread. Never a fork without exec: a forked
copy of a process with gRPC threads cannot run. The child's environment holds no secrets.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from inference_runtime.settings import environment

__all__ = ["Spawned", "Spawner", "child_environment"]

#: Names that hold secrets. A runner runs code of models and plug-ins; what it does not get, it cannot leak.
_SECRET_NAME = re.compile(r"(_KEY|_TOKEN|_SECRET|PASSWORD)$|^INFERENCE_.*__ETCD__", re.IGNORECASE)
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Spawned:
    """A child process and the engine's ends of what leads to it. Whoever holds it closes them."""

    process: subprocess.Popen[bytes]
    pidfd: int
    sock: socket.socket
    #: What it writes to stdout and stderr.
    output: int


def child_environment(base: Mapping[str, str], accelerators: Sequence[int]) -> dict[str, str]:
    """The environment of a child: no secrets, and these devices only. Indexes count what the engine itself may see."""
    env = {name: value for name, value in base.items() if not _SECRET_NAME.search(name)}
    seen = [d for d in base.get(_VISIBLE, "").split(",") if d]
    env[_VISIBLE] = ",".join(seen[i] if i < len(seen) else str(i) for i in accelerators)
    env["PYTHONUNBUFFERED"] = "1"
    return env


class Spawner:
    """The thread. `close` comes after the last child is gone."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spawner")

    def spawn(self, accelerators: Sequence[int]) -> asyncio.Future[Spawned]:
        """Start a child. The future raises OSError when the system has no process or descriptor left."""
        return asyncio.get_running_loop().run_in_executor(self._thread, _spawn, tuple(accelerators))

    def close(self) -> None:
        """End the thread, which kills what it spawned and nobody closed."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _path_flags() -> list[str]:
    """The child looks for modules where this process does: not in the working folder, which may have a `services` of its own."""
    return [] if {"", os.getcwd()} & set(sys.path) else ["-P"]


def _spawn(accelerators: tuple[int, ...]) -> Spawned:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    read_end, write_end = os.pipe()
    process: subprocess.Popen[bytes] | None = None
    try:
        process = subprocess.Popen(
            [sys.executable, *_path_flags(), "-m", "services.engine.child", str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=write_end,
            stderr=write_end,
            env=child_environment(environment(), accelerators),
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # a group of its own: its whole tree is killed at once, and Ctrl-C does not reach it
        )
        pidfd = os.pidfd_open(process.pid)
    except BaseException:
        ours.close()  # which ends the child, if there is one
        os.close(read_end)
        if process is not None:
            process.kill()
            process.wait()
        raise
    finally:
        theirs.close()
        os.close(write_end)
    ours.setblocking(False)
    return Spawned(process, pidfd, ours, read_end)

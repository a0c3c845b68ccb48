"""HTTP/1.1 on a socket: accepts connections and keeps their time with one sweeper. Knows nothing of models; an `App` answers."""

from __future__ import annotations

import asyncio
import email.utils
import errno
import socket
import time
from typing import TYPE_CHECKING

from inference_runtime.errors import ServerError
from services.gateway.http.connection import App, Connection
from services.gateway.http.message import HttpRequest

if TYPE_CHECKING:
    from services.gateway.settings import HttpSettings

__all__ = ["App", "Connection", "HttpRequest", "HttpServer", "listen"]

#: Seconds between two looks at the clock for all connections. Time-outs are late by at most this.
SWEEP_S = 0.25
#: Kernel buffer of an accepted socket: bounds what a client that stopped reading holds there.
SEND_BUFFER_BYTES = 64 << 10
BACKLOG = 4096


def listen(host: str, port: int, *, shared: bool) -> socket.socket:
    """A listening socket.

    Args:
        host: Address or name to bind.
        port: Port; 0 picks a free one.
        shared: Other processes listen on the same port (SO_REUSEPORT).

    Raises:
        ServerError: The port is taken or the address is not ours.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            sock.bind(address)
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
    except OSError as err:
        why = "the port is taken" if err.errno == errno.EADDRINUSE else str(err.strerror or err)
        raise ServerError(f"cannot listen on {host}:{port}: {why}; choose another http.port or http.host") from err
    return sock


class HttpServer:
    """Accepts connections and keeps their time.

    Args:
        app: Answers.
        settings: Limits.
        sock: A bound socket; the server listens on it and closes it.
    """

    def __init__(self, app: App, settings: HttpSettings, sock: socket.socket) -> None:
        self.app, self.settings = app, settings
        self.connections: set[Connection] = set()
        #: Each answer is the last of its connection.
        self.draining = False
        self.now = time.monotonic()
        self.date_line = b""
        self._sock = sock
        self._server: asyncio.Server | None = None
        self._closing: asyncio.Server | None = None
        self._tick()

    @property
    def address(self) -> str:
        """host:port as bound."""
        host, port = self._sock.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self) -> None:
        """Begin to accept."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), sock=self._sock, backlog=BACKLOG)

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self._tick()
            for connection in tuple(self.connections):
                connection.sweep(self.now)

    def _tick(self) -> None:
        self.now = time.monotonic()
        self.date_line = b"date: %b\r\n" % email.utils.formatdate(usegmt=True).encode()

    def announce(self) -> None:
        """From now on each answer is the last one of its connection, and says so."""
        self.draining = True

    async def drain(self) -> None:
        """Accept nothing more; idle connections close, others after their present answer.

        Clients whom the kernel has connected already are served too: closing the socket on them would reset them.
        """
        self.draining = True
        server, self._server = self._server, None
        if server is None:
            return
        waiting = self._accept_all()
        server.close()
        for sock in waiting:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: Connection(self), sock)
        self._closing = server
        now = time.monotonic()
        for connection in tuple(self.connections):
            connection.leave(now)

    def _accept_all(self) -> list[socket.socket]:
        waiting: list[socket.socket] = []
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:  # there is none, or no descriptor for it
                return waiting
            sock.setblocking(False)
            waiting.append(sock)

    async def close(self) -> None:
        """Close everything, now. Writes that a transport still holds get one more turn of the loop."""
        await self.drain()
        for connection in tuple(self.connections):
            connection.close()
        await asyncio.sleep(0)
        for connection in tuple(self.connections):
            connection.abort()
        if self._closing is not None:
            await self._closing.wait_closed()

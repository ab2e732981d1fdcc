"""HTTP backends that answer with their name."""

from __future__ import annotations

import asyncio
import ssl
import threading

from tests.support.closing import Closing


class _Answer(asyncio.Protocol):
    """HTTP/1.1 with keep-alive and pipelining; bodies of requests by Content-Length."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.buffer = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.backend.transports.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        assert self.transport is not None
        self.backend.transports.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        assert self.transport is not None
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            length = 0
            if (at := head.find(b"content-length:")) >= 0:
                length = int(head[at + 15 :].split(b"\r\n", 1)[0])
            if len(self.buffer) < end + 4 + length:
                return
            self.buffer = self.buffer[end + 4 + length :]
            self.backend.requests += 1
            self.transport.write(self.backend.answer)


class Backend(Closing):
    """One backend."""

    def __init__(
        self,
        name: str,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.name = name
        self.host = host
        self.port = port
        self.tls = tls
        self.requests = 0
        self.transports: set[asyncio.Transport] = set()
        body = f"{name}\n".encode()
        head = f"HTTP/1.1 200 OK\r\nx-backend: {name}\r\ncontent-type: text/plain\r\n"
        self.answer = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread: threading.Thread | None = None

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Answer(self), self.host, self.port, ssl=self.tls, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]

    def __enter__(self) -> Backend:
        started = threading.Event()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(self.listen())
            started.set()
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        started.wait(5)
        return self

    def close(self) -> None:
        async def end() -> None:
            if self._server is not None:
                self._server.close()
            for transport in list(self.transports):
                transport.abort()

        if self._thread is not None:
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
            self._loop.close()
            self._thread = None


class Backends(Closing):
    """Several backends by name."""

    def __init__(self, *names: str) -> None:
        self._each = [Backend(name).__enter__() for name in names]
        self.ports = {each.name: each.port for each in self._each}

    def __getitem__(self, name: str) -> int:
        return self.ports[name]

    def close(self) -> None:
        for each in self._each:
            each.close()

"""The processes of a pod that are neither Envoy nor the loader: small HTTP servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import ssl
import threading
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Request(NamedTuple):
    method: str
    path: str
    headers: Mapping[str, str]  # lower-case names
    body: bytes


class Response(NamedTuple):
    body: str | bytes = ""
    status: int = 200
    headers: Mapping[str, str] = {}


Handler = Callable[[Request], Awaitable[Response]]


def named(name: str, delay: float = 0.0) -> Handler:
    """Answers with its name, after a while."""

    async def answer(request: Request) -> Response:
        if delay:
            await asyncio.sleep(delay)
        return Response(name, headers={"x-pod": name})

    return answer


class Server(NamedTuple):
    """A listening server; its handler may be replaced while it runs."""

    listener: asyncio.Server
    writers: set[asyncio.StreamWriter]
    handler: list[Handler]
    requests: list[int]


class Servers:
    """HTTP servers that share one thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._servers: list[Server] = []

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def serve(
        self, ip: str, port: int, handler: Handler, tls: ssl.SSLContext | None = None
    ) -> Server:
        writers: set[asyncio.StreamWriter] = set()
        chosen, requests = [handler], [0]

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.add(writer)
            try:
                while (request := await read_request(reader)) is not None:
                    requests[0] += 1
                    await write_response(writer, await chosen[0](request))
            except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                writers.discard(writer)
                writer.close()

        async def start() -> asyncio.Server:
            return await asyncio.start_server(connected, ip, port, ssl=tls, backlog=1024)

        server = Server(self.do(start()), writers, chosen, requests)
        self._servers.append(server)
        return server

    def stop(self, server: Server) -> None:
        """As when a pod is killed: connections are cut."""

        async def end() -> None:
            server.listener.close()
            for writer in list(server.writers):
                writer.transport.abort()

        self.do(end())

    def close(self) -> None:
        async def end() -> None:
            mine = asyncio.current_task()
            others = [task for task in asyncio.all_tasks() if task is not mine]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        for server in self._servers:
            self.stop(server)
        self.do(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *rest = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ")
    pairs = (line.partition(":") for line in rest if line)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    body = b""
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, path, headers, body)


async def write_response(writer: asyncio.StreamWriter, response: Response) -> None:
    body = response.body.encode() if isinstance(response.body, str) else response.body
    lines = [f"HTTP/1.1 {response.status} -", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in response.headers.items()]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    await writer.drain()


class Fetched(NamedTuple):
    """Status 0: no answer, `body` says why. `seconds` it took."""

    status: int
    body: str
    headers: Mapping[str, str]
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)


def fetch(
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: str | None = None,
    timeout: float = 5.0,
    tls: ssl.SSLContext | None = None,
) -> Fetched:
    """One request on a connection of its own; failures are answers too."""
    parts = urllib.parse.urlsplit(url)
    start = time.monotonic()
    host, port = parts.hostname or "", parts.port
    connection = (
        http.client.HTTPSConnection(host, port, timeout=timeout, context=tls)
        if parts.scheme == "https"
        else http.client.HTTPConnection(host, port, timeout=timeout)
    )
    with contextlib.closing(connection):
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request(method, target, body, dict(headers or {}))
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace").strip()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Fetched(answer.status, text, found, time.monotonic() - start)
        except (OSError, http.client.HTTPException) as error:
            return Fetched(0, str(error) or repr(error), {}, time.monotonic() - start)

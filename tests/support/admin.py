"""What may stand in the place of Envoy's admin interface: a relay that stalls, or something odd."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

from tests.support.closing import Closing
from tests.support.envoy import admin_connection


class Listener(Closing):
    """Accepts on a port of its own; what a connection gets is for `serve` to say."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.accepted = 0
        self._clients: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.accepted += 1
                self._clients.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self.serve(client)

    def serve(self, client: socket.socket) -> None:
        raise NotImplementedError

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join(5)
        for client in self._clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            client.close()


class Odd(Listener):
    """The same bytes in answer to every request; None: no answer, ever."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        if self.answer is not None:
            client.recv(65536)
            client.sendall(self.answer)
            client.close()


STATS = "cluster_manager.cds.update_success: 1\nlistener_manager.lds.update_success: 1\n"


class FakeEnvoy(Listener):
    """Answers like Envoy's admin interface, or as `answers` says: a body, or a way to send one."""

    def __init__(self, **answers: str | Callable[[socket.socket], None]) -> None:
        self.answers = {
            "server_info": '"state": "LIVE"', "stats": STATS, "config_dump": "{}", **answers,
        }  # fmt: skip
        self.asked: list[str] = []
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        while request := client.recv(65536):
            path = re.split(r"[ ?]", request.decode())[1].strip("/")
            self.asked.append(path)
            answer = self.answers[path]
            if isinstance(answer, str):
                body = answer.encode()
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            else:
                answer(client)


class Relay(Listener):
    """Envoy's own admin interface: each answer `delay` seconds late, none while it is `silent`."""

    def __init__(self, admin_url: str, delay: float = 0.0) -> None:
        self.admin_url = admin_url
        self.delay = delay
        self._speaks = threading.Event()
        self._speaks.set()
        super().__init__()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Connections and requests are accepted; answers come when it is over."""
        self._speaks.clear()
        try:
            yield
        finally:
            self._speaks.set()

    def serve(self, client: socket.socket) -> None:
        with client, contextlib.closing(admin_connection(self.admin_url)) as envoy:
            envoy.connect()
            back = threading.Thread(target=self._answers, args=(envoy.sock, client), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                while part := client.recv(65536):
                    envoy.sock.sendall(part)
            with contextlib.suppress(OSError):
                envoy.sock.shutdown(socket.SHUT_RDWR)
            back.join(5)

    def _answers(self, envoy: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := envoy.recv(1 << 20):
                time.sleep(self.delay)
                self._speaks.wait()
                client.sendall(part)
            client.shutdown(socket.SHUT_RDWR)

"""Ports on loopback that are ours from the moment they are known.

A port that is looked for, given back and bound later belongs to whoever is faster. Here the socket
that got the port from the kernel is kept: it never listens, so that connections are refused until
the server is there, and with SO_REUSEADDR and SO_REUSEPORT it does not stand in the way of a server
that sets one of them (Envoy's listeners and its admin interface, asyncio, http.server,
socket.create_server). The kernel gives the port to nobody else, also while the server restarts.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

_held: list[socket.socket] = []


def hold(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A bound socket; close it to give the port back."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def held_port(host: str = "127.0.0.1") -> int:
    """A port that stays ours until the test (see `released`) or the process ends."""
    sock = hold(host)
    _held.append(sock)
    return int(sock.getsockname()[1])


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Give back at the end what was held since the beginning."""
    before = len(_held)
    try:
        yield
    finally:
        while len(_held) > before:
            _held.pop().close()

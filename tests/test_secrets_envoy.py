"""Certificates that rotate under load in the real Envoy: a listener's and an upstream's.

Each rotation is a new leaf of a new intermediate; clients trust only the root. So a key of one
rotation with the certificate of another fails the handshake, and a leaf of one with the
intermediate of another fails the verification: "old and new never mixed" is what no failure says.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import socket
import ssl
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme

from tests.conftest import NAMESPACE, RunLoader, StartEnvoy, StartLoader
from tests.support.apiserver import ApiServer
from tests.support.busy import busy
from tests.support.envoy import (
    Config,
    bootstrap,
    cluster,
    file_source,
    http_listener,
    route_config,
)
from tests.support.loader import wait_until
from tests.support.ports import held_port

TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3."
ROTATIONS = 50
# Connections that may end before a new certificate is seen: 3 to 6 on a quiet machine, 15 on one
# with seven times as many busy threads as cores (measured). A loader that polls takes hundreds.
SOON, SOON_WHEN_BUSY = 15, 40
HOST = "web.example"
PAIR_FILE = "sds/demo_web-tls.yaml"
CA_FILE = "sds/demo_web-tls_ca.yaml"


class Issued(NamedTuple):
    """A certificate with its intermediate, its key, and how a client recognises it."""

    cert: bytes
    key: bytes
    fingerprint: str


def issue(root: trustme.CA) -> Issued:
    leaf = root.create_child_ca().issue_cert(HOST)
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    der = ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())
    return Issued(chain, leaf.private_key_pem.bytes(), fingerprint(der))


def fingerprint(der: bytes | None) -> str:
    return hashlib.sha256(der or b"").hexdigest()[:16]


class Seen(NamedTuple):
    """One connection: when it began and ended, and which certificate was seen ("": it failed)."""

    began: float
    ended: float
    fingerprint: str
    error: str = ""


class Clients:
    """Threads that connect again and again; `look` gives the fingerprint that it sees."""

    def __init__(self, look: Callable[[], str], count: int = 1) -> None:
        self.seen: list[Seen] = []
        self._look = look
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]

    def _run(self) -> None:
        while not self._ended.is_set():
            began, found, error = time.monotonic(), "", ""
            try:
                found = self._look()
            except (OSError, http.client.HTTPException, ValueError) as problem:
                error = repr(problem)
            self.seen.append(Seen(began, time.monotonic(), found, error))

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(10)

    def first(self, wanted: str, since: int) -> Seen | None:
        return next((seen for seen in self.seen[since:] if seen.fingerprint == wanted), None)


class Upstream:
    """A TLS server that requires a client certificate and answers with its fingerprint."""

    def __init__(self, root: trustme.CA) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        root.issue_cert(HOST).configure_cert(self.context)
        root.configure_trust(self.context)
        self.context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(sock,), daemon=True).start()

    def _answer(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            sock.settimeout(5)
            tls = self.context.wrap_socket(no_delay(sock), server_side=True)
            body = fingerprint(tls.getpeercert(binary_form=True)).encode()
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += tls.recv(65536)
            head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            tls.sendall(head.encode() + body)
            tls.unwrap()

    def close(self) -> None:
        self._listener.close()


def sds(name: str, path: Path) -> Config:
    return {"name": name, "sds_config": file_source(path)}


def envoy_config(current: Path, server_port: int, plain_port: int, upstream_port: int) -> Config:
    """A TLS listener that answers by itself, and a plain one whose upstream asks for mTLS."""
    pair = {"tls_certificate_sds_secret_configs": [sds("demo/web-tls", current / PAIR_FILE)]}
    trusted = {"validation_context_sds_secret_config": sds("demo/web-tls/ca", current / CA_FILE)}
    hello: Config = {
        "name": "hello",
        "virtual_hosts": [
            {
                "name": "all",
                "domains": ["*"],
                "routes": [{"match": {"prefix": "/"}, "direct_response": {"status": 204}}],
            }
        ],
    }
    secure = http_listener(server_port, {"route_config": hello}, name="secure")
    secure["filter_chains"][0]["transport_socket"] = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {"@type": TLS + "DownstreamTlsContext", "common_tls_context": pair},
    }
    plain = http_listener(plain_port, {"route_config": route_config({"up": 1})}, name="plain")
    up = cluster(
        "up",
        upstream_port,
        transport_socket={
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": TLS + "UpstreamTlsContext",
                "sni": HOST,
                "common_tls_context": {**pair, **trusted},
            },
        },
    )
    return bootstrap(listeners=[secure, plain], clusters=[up])


def no_delay(sock: socket.socket) -> socket.socket:
    """Else the request waits 40 ms for the peer's delayed acknowledgement of the handshake."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def handshake(port: int, root: trustme.CA) -> Callable[[], str]:
    """Connect, verify against the root, give the fingerprint of what the server showed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    root.configure_trust(context)

    def look() -> str:
        with (
            no_delay(socket.create_connection(("127.0.0.1", port), timeout=5)) as sock,
            context.wrap_socket(sock, server_hostname=HOST) as tls,
        ):
            tls.sendall(b"GET / HTTP/1.1\r\nHost: web.example\r\nConnection: close\r\n\r\n")
            answer = tls.recv(4096)
            if not answer.startswith(b"HTTP/1.1 204"):
                raise ValueError(f"answered {answer!r}")
            return fingerprint(tls.getpeercert(binary_form=True))

    return look


def through(port: int) -> Callable[[], str]:
    """Ask through the plain listener, give the fingerprint that the upstream saw."""

    def look() -> str:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/")
            response = connection.getresponse()
            body = response.read().decode()
            if response.status != 200:
                raise ValueError(f"answered {response.status} {body}")
            return body
        finally:
            connection.close()

    return look


class Edge(NamedTuple):
    """The Envoy under test with an upstream: the two ways to look at its certificates."""

    envoy: Any
    downstream: Callable[[], str]
    upstream: Callable[[], str]


@pytest.fixture
def root() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def edge(root: trustme.CA, start_envoy: StartEnvoy) -> Iterator[Callable[[Path], Edge]]:
    """`edge(current)`: an Envoy whose certificates are the files of that directory."""
    server = Upstream(root)

    def start(current: Path) -> Edge:
        secure, plain = held_port(), held_port()
        envoy = start_envoy(envoy_config(current, secure, plain, server.port))
        return Edge(envoy, handshake(secure, root), through(plain))

    yield start
    server.close()


def put(api: ApiServer, cert: bytes, key: bytes, ca: bytes) -> None:
    keys = {"tls.crt": cert, "tls.key": key, "ca.crt": ca}
    api.secret(NAMESPACE, "web-tls", keys, type="kubernetes.io/tls")


def rotate_under_load(
    edge: Edge, issued: Sequence[Issued], publish: Callable[[Issued], None]
) -> tuple[list[float], list[float]]:
    """Publish one after another while clients connect; the delays, downstream and upstream.

    A delay is from the publication to the end of the first connection that saw the certificate,
    in connections: by what one takes at that moment, so that a busy machine changes nothing.
    """
    delays: tuple[list[float], list[float]] = ([], [])
    with Clients(edge.downstream) as down, Clients(edge.upstream) as up:
        for one in issued:
            marks = [len(clients.seen) for clients in (down, up)]
            began = time.monotonic()
            publish(one)
            for clients, mark, found in zip((down, up), marks, delays, strict=True):

                def served(clients: Clients = clients, mark: int = mark) -> Seen | None:
                    return clients.first(one.fingerprint, mark)  # noqa: B023

                seen = wait_until(served, 10, "the new certificate")
                assert seen is not None
                found.append(seen.ended - began)
    order = {one.fingerprint: number for number, one in enumerate(issued)}
    for clients in (down, up):
        assert [seen for seen in clients.seen if seen.error] == []
        assert len(clients.seen) > len(issued)
        never_back(clients.seen, order)
    costs = [connection_cost(clients.seen) for clients in (down, up)]
    for found, cost, side in zip(delays, costs, ("downstream", "upstream"), strict=True):
        late = statistics.median(found)
        print(f"{side}: served {late * 1000:.1f} ms after the change, of which a connection takes "
              f"{cost * 1000:.1f} ms")  # fmt: skip
    return [delay / costs[0] for delay in delays[0]], [delay / costs[1] for delay in delays[1]]


def connection_cost(seen: Sequence[Seen]) -> float:
    return statistics.median(one.ended - one.began for one in seen)


def never_back(seen: Sequence[Seen], order: dict[str, int]) -> None:
    """A connection that begins after another one ended does not see an older certificate."""
    ended: list[tuple[float, int]] = []
    for one in sorted(seen, key=lambda seen: seen.began):
        at = order.get(one.fingerprint, -1)
        newest = max((number for end, number in ended[-50:] if end <= one.began), default=-1)
        assert at >= newest, f"certificate {at} after {newest}"
        ended.append((one.ended, at))


def test_fifty_rotations_of_the_secret(
    api: ApiServer,
    out: Path,
    root: trustme.CA,
    start_loader: StartLoader,
    edge: Callable[[Path], Edge],
) -> None:
    """The whole way: Secret, watch, check, snapshot, move, Envoy, handshake."""
    ca = root.cert_pem.bytes()

    def publish(one: Issued) -> None:
        put(api, one.cert, one.key, ca)

    publish(issue(root))
    running_loader = start_loader("--watch", "--secret", "web-tls")
    wait_until(lambda: (out / "current" / CA_FILE).exists(), message="the first snapshot")
    running = edge(out / "current")
    issued = [issue(root) for _ in range(ROTATIONS)]
    downstream, upstream = rotate_under_load(running, issued, publish)
    bound = SOON_WHEN_BUSY if busy() else SOON
    assert max(statistics.median(downstream), statistics.median(upstream)) < bound
    version = running.envoy.stat("sds.demo/web-tls.version_text") or ""
    assert str(version) in (out / "current" / PAIR_FILE).read_text()
    assert running.envoy.count("sds.demo/web-tls.update_rejected") == 0
    for path in (PAIR_FILE, CA_FILE):
        assert (out / "current" / path).stat().st_mode & 0o777 == 0o600
    assert "PRIVATE" not in running_loader.log
    assert issued[-1].key.split(b"\n")[1].decode() not in running_loader.log


def test_a_bad_pair_keeps_the_last_and_is_named(
    api: ApiServer,
    out: Path,
    root: trustme.CA,
    start_loader: StartLoader,
    edge: Callable[[Path], Edge],
) -> None:
    ca, good, other = root.cert_pem.bytes(), issue(root), issue(root)
    put(api, good.cert, good.key, ca)
    running_loader = start_loader("--watch", "--secret", "web-tls")
    wait_until(lambda: (out / "current" / CA_FILE).exists(), message="the first snapshot")
    running = edge(out / "current")
    assert running.downstream() == good.fingerprint
    before = (out / "current" / PAIR_FILE).read_bytes()
    put(api, good.cert, other.key, ca)
    running_loader.wait_log("secret demo/web-tls: tls.key is not the key of the first certificate")
    assert (out / "current" / PAIR_FILE).read_bytes() == before
    assert running.downstream() == running.upstream() == good.fingerprint
    put(api, other.cert, other.key, ca)
    wait_until(lambda: running.downstream() == other.fingerprint, message="the repaired pair")


def test_envoy_itself_refuses_a_mismatched_pair_and_keeps_the_last(
    api: ApiServer,
    out: Path,
    root: trustme.CA,
    run_loader: RunLoader,
    edge: Callable[[Path], Edge],
) -> None:
    """Why the check may be left to Envoy where this machine has no anonymous memory."""
    good, other = issue(root), issue(root)
    put(api, good.cert, good.key, root.cert_pem.bytes())
    assert run_loader("--onetime", "--secret", "web-tls").returncode == 0
    running = edge(out / "current")
    content = (out / "current" / PAIR_FILE).read_bytes()
    own, strange = (json.dumps(pair.key.decode())[1:-1].encode() for pair in (good, other))
    mixed = content.replace(own, strange)
    assert mixed != content
    fresh = out / "fresh"
    fresh.write_bytes(mixed)
    fresh.rename(out / "current" / PAIR_FILE)
    running.envoy.wait_stat("sds.demo/web-tls.update_rejected", 1)
    assert running.downstream() == good.fingerprint


def test_envoy_shows_no_key_and_takes_every_spelling_of_pem(
    api: ApiServer,
    out: Path,
    root: trustme.CA,
    run_loader: RunLoader,
    edge: Callable[[Path], Edge],
) -> None:
    """With CR LF and comments too: all of it goes as base64."""
    good = issue(root)
    key = "# für Web\n".encode() + good.key
    put(api, good.cert.replace(b"\n", b"\r\n"), key, root.cert_pem.bytes())
    assert run_loader("--onetime", "--secret", "web-tls").returncode == 0
    assert b"inline_bytes" in (out / "current" / PAIR_FILE).read_bytes()
    running = edge(out / "current")
    assert running.downstream() == running.upstream() == good.fingerprint
    dump = running.envoy.admin("/config_dump")
    assert "demo/web-tls" in dump
    for line in good.key.splitlines()[1:-1]:
        assert line.decode() not in dump

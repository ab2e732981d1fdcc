"""What an API server, a proxy or a file may send: bounded in size, time and depth, and no token in
the log."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import RunLoader, StartLoader
from tests.support import apiserver as k8s
from tests.support.admin import Listener
from tests.support.apiserver import ApiServer, Response, Stream
from tests.support.busy import within
from tests.support.loader import Loader, wait_files, wait_until
from tests.support.tuned import tuned

WATCH = ("--watch", "--configmap", "envoy-xds")
ONCE = ("--onetime", "--configmap", "envoy-xds")
DEEP = 200_000


def put(api: ApiServer, text: str) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": text})


# -- who gets the token


def test_a_token_goes_over_plain_http_to_loopback_only(
    run_loader: RunLoader, api: ApiServer
) -> None:
    """(0.0.0.0 reaches the scripted server: it would see a request.)"""
    put(api, "1")
    url = f"http://0.0.0.0:{api.port}"
    done = run_loader(*ONCE, "--apiserver", url, server=None)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "plain HTTP" in done.stderr
    assert "https" in done.stderr
    assert api.connections_total == 0


def test_an_empty_ca_file_is_not_the_trust_of_the_system(
    run_loader: RunLoader, api_tls: ApiServer, tmp_path: Path
) -> None:
    empty = tmp_path / "ca.crt"
    empty.touch()
    where = ("--apiserver", api_tls.url, "--ca-file", str(empty))
    done = run_loader(*ONCE, *where, server=None)
    assert done.returncode == 1
    assert f"{empty}: not a usable certificate" in done.stderr
    assert not api_tls.requests


SECRET = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJsb2FkZXI_In0.c2lnbmF0dXJl-dGhhdCBpcyBsb25nIGVub3VnaA"


def wrapped() -> dict[str, str]:
    """The token as error pages, redirects and debug output show it."""
    basic = {
        f"base64 after {len(user)} characters": base64.b64encode(f"{user}{SECRET}==".encode())
        for user in ("", "a", "ab:")
    }
    return {
        "as it is": f"Authorization: Bearer {SECRET}",
        "beyond where messages are cut": "x" * 480 + SECRET,
        "in a URL": "token%3D" + urllib.parse.quote(SECRET).replace("_", "%5F"),
        **{name: text.decode() for name, text in basic.items()},
        "base64 of URLs": base64.urlsafe_b64encode(f"?{SECRET}".encode()).decode(),
        "base64 in lines": base64.encodebytes(f"Bearer {SECRET}".encode()).decode(),
    }


SHOWN: dict[str, Callable[[str], k8s.Fault]] = {
    "message": lambda text: k8s.failure(400, "BadRequest", text),
    "page": lambda text: Response(400, f"<html>{text}</html>".encode()),
    "redirect": lambda text: k8s.redirect("http://127.0.0.1:1/?" + "".join(text.split())),
    "status line": lambda text: k8s.Raw("".join(text.split()).encode() + b"\r\n"),
}


@pytest.mark.parametrize("place", SHOWN)
def test_no_echo_of_the_token_reaches_the_log(
    run_loader: RunLoader, api: ApiServer, token_file: Path, place: str
) -> None:
    token_file.write_text(SECRET)
    for name, text in wrapped().items():
        api.fail_next("GET", SHOWN[place](text))
        done = run_loader(*ONCE, "--log-level", "debug")
        assert done.returncode == 1
        quoted = "quotes the token" in done.stderr
        assert quoted == (place == "message"), "of other texts nothing is shown"
        assert ("redirect" in done.stderr) == (place == "redirect"), "and the advice stays"
        for part in (SECRET[:12], SECRET[-12:], text[:12], text[-40:-20]):
            assert part not in done.stderr, name


def test_no_echo_of_the_token_in_an_error_event(
    start_loader: StartLoader, api: ApiServer, token_file: Path, out: Path
) -> None:
    token_file.write_text(SECRET)
    api.tokens = {SECRET}
    put(api, "1")
    event = k8s.error_event(500, "InternalError", f"no {SECRET}")
    api.fail_next("watch=", Stream([event]))
    running = start_loader(*WATCH)
    running.wait_log("quotes the token")
    assert SECRET not in running.log


# -- depth


def deep(start: bytes, end: bytes = b"") -> bytes:
    return start + b'{"a":' * DEEP + b"1" + b"}" * DEEP + end


TOO_DEEP: dict[str, k8s.Fault] = {
    "an error page": Response(503, b"[" * DEEP),
    "an error that is JSON": Response(503, deep(b'{"message":', b"}")),
    "an error in half a character": Response(503, b'{"message":"\\ud800"}'),
    "a list": Response(200, deep(b'{"kind":"ConfigMapList","items":[', b"]}")),
    "an event": Stream([deep(b'{"type":"MODIFIED","object":', b"}\n")]),
    "a Location": k8s.redirect("http://" + "[" * 60_000),
    "just deep enough": Response(503, b'{"message":' + b"[" * 960 + b"]" * 960 + b"}"),
}


@pytest.mark.parametrize("name", TOO_DEEP)
def test_what_is_nested_deep_is_an_error_and_no_crash(
    start_loader: StartLoader, api: ApiServer, out: Path, name: str
) -> None:
    put(api, "1")
    running = start_loader(*WATCH)
    wait_files(out, {"rds.yaml": "1"})
    api.wait_watches(1)
    match = "watch=" if name == "an event" else "GET"
    if name == "a list":
        api.fail_next("watch=", k8s.failure(410, "Expired"))
        match = r"GET [^?]*\?(?!.*watch=)"
    api.fail_next(match, TOO_DEEP[name])
    api.close_watches(clean=True)
    put(api, "2")
    wait_files(out, {"rds.yaml": "2"})
    assert "Traceback" not in running.log
    assert "RecursionError" not in running.log
    assert max(map(len, running.lines)) < 2_000


# -- size


@pytest.fixture
def tight(api: ApiServer, common: list[str]) -> Iterator[Callable[..., Loader]]:
    """`tight(*args, LIST_BYTES=1 << 20)`: a loader with other bounds, ended with the test."""
    started: list[Loader] = []

    def start(*args: str, **constants: object) -> Loader:
        words = [*common, "--apiserver", api.url, *args]
        started.append(Loader(words, prefix=tuned(constants)))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        with one:
            pass


def test_a_bomb_is_not_unpacked(tight: Callable[..., Loader], api: ApiServer) -> None:
    """A server that answers with gzip that nobody asked for."""
    bomb = Response(200, gzip.compress(bytes(256 << 20)), {"Content-Encoding": "gzip"})
    api.fail_next("GET", bomb, times=1000)
    running = tight(*WATCH)
    running.wait_log("is not a ConfigMapList")
    peak = Path(f"/proc/{running.pid}/status").read_text().partition("VmHWM:")[2].split()[0]
    assert int(peak) < 80 << 10, "KiB"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_list_of_any_size_is_not_read(
    tight: Callable[..., Loader], api: ApiServer, out: Path, chunked: bool
) -> None:
    """With its length, or in chunks without end."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 9000000000\r\n\r\n"
    body = b'{"kind":"ConfigMapList","items":[' + b" " * (3 << 20)
    if chunked:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        body = b"".join(b"10000\r\n" + b" " * 0x10000 + b"\r\n" for _ in range(48))
    api.fail_next("GET", k8s.Raw(head + body))
    put(api, "1")
    running = tight(*WATCH, LIST_BYTES=1 << 20)
    running.wait_log("larger than 1 MiB")
    wait_files(out, {"rds.yaml": "1"})


def test_a_list_without_end_is_left(
    tight: Callable[..., Loader], api: ApiServer, out: Path
) -> None:
    put(api, "1")
    page = {"kind": "ConfigMapList", "items": [], "metadata": {"continue": "more"}}
    api.fail_next("GET", Response(200, json.dumps(page).encode()), times=10)
    running = tight(*WATCH, LIST_PAGES=5)
    running.wait_log("pages without end")
    assert len(api.requests) <= 10
    wait_files(out, {"rds.yaml": "1"})


def test_an_error_page_of_any_size(run_loader: RunLoader, api: ApiServer) -> None:
    api.fail_next("GET", Response(503, b"x" * (20 << 20)), times=100)
    done = run_loader(*ONCE)
    assert done.returncode == 1
    assert "503" in done.stderr
    assert len(done.stderr) < 1_000


def test_an_event_without_end(tight: Callable[..., Loader], api: ApiServer, out: Path) -> None:
    put(api, "1")
    api.fail_next("watch=", Stream([b"x" * (1 << 16)] * 40, "silent"))
    running = tight(*WATCH, EVENT_BYTES=1 << 20)
    running.wait_log("does not end")
    put(api, "2")
    wait_files(out, {"rds.yaml": "2"})


# -- time


class Trickle(Listener):
    """A server that sends the start of an answer, and then a byte now and then for ever."""

    def __init__(self, start: bytes) -> None:
        self.start = start
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        client.recv(65536)
        client.sendall(self.start)
        while True:
            client.sendall(b" ")
            time.sleep(0.02)


@pytest.mark.parametrize(
    "start",
    [b"HTTP/1.1 200 OK\r\nX:", b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n",
     b"HTTP/1.1 503 No\r\nContent-Length: 99999\r\n\r\n"],
    ids=["head", "list", "error"],
)  # fmt: skip
def test_a_server_that_trickles_is_left(common: list[str], start: bytes) -> None:
    """Each byte comes in time, the answer never does."""
    with Trickle(start) as server:
        words = [*common, "--apiserver", server.url, *ONCE]
        with Loader(words, prefix=tuned({"ANSWER_SECONDS": 0.5})) as running:
            assert running.wait(8) == 1
            assert "configmap demo/envoy-xds" in running.log


def test_no_server_makes_a_source_wait_for_years(
    tight: Callable[..., Loader], api: ApiServer, out: Path
) -> None:
    put(api, "1")
    refusal = k8s.failure(429, "TooManyRequests", "", {"Retry-After": "9" * 400})
    api.fail_next("GET", refusal)
    tight(*WATCH, RETRY_AFTER_LAST=1.0)
    wait_files(out, {"rds.yaml": "1"})


# -- patterns

SIZE = 200_000
@pytest.mark.parametrize(
    "text",
    [" " * SIZE, "[" * SIZE, '{"kind":"List"}' + "\n" * SIZE + "x", "\\" * SIZE,
     '{"kind":"List","items":[' * 5_000, '"' + '\\"' * SIZE],
    ids=["spaces", "depth", "lines", "backslashes", "lists", "quotes"],
)  # fmt: skip
def test_files_are_read_in_linear_time(run_loader: RunLoader, tmp_path: Path, text: str) -> None:
    path = tmp_path / "objects.json"
    path.write_text(text)
    with within(5):
        done = run_loader(*ONCE, "--from-file", str(path), server=None)
    assert done.returncode == 1, done.stderr
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_has_a_bound(common: list[str], tmp_path: Path) -> None:
    path = tmp_path / "objects.json"
    path.write_text(json.dumps({"kind": "List", "items": [], "pad": "x" * (2 << 20)}))
    words = [*common, *ONCE, "--from-file", str(path)]
    with Loader(words, prefix=tuned({"LIST_BYTES": 1 << 20})) as running:
        assert running.wait(8) == 1
        assert "larger than 1 MiB" in running.log


def test_nothing_waits_for_a_thread(
    api: ApiServer, tight: Callable[..., Loader], out: Path
) -> None:
    """Bounds in time cost no thread that stays."""
    put(api, "1")
    running = tight("--configmap", "envoy-xds", "--sync-interval", "20ms")
    wait_files(out, {"rds.yaml": "1"})
    wait_until(lambda: len(api.requests) > 20)
    assert len(list(Path(f"/proc/{running.pid}/task").iterdir())) <= 5

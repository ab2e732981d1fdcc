"""What holds against whoever writes ConfigMaps, Services or the volume, or answers in Envoy's place.

What an API server may send is in test_hardening_api.py.
"""

from __future__ import annotations

import gc
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import loader
from tests.conftest import RunLoader, StartLoader
from tests.support import disk
from tests.support.admin import Listener
from tests.support.apiserver import ApiServer
from tests.support.loader import Loader, snapshot, wait_files, wait_until

ONCE = ("--onetime", "--configmap", "envoy-xds")
WATCH = ("--watch", "--configmap", "envoy-xds")
STATS = "cluster_manager.cds.update_attempt: 1\nlistener_manager.lds.update_attempt: 1\n"


class Envoy(Listener):
    """Answers like Envoy's admin interface, or as `answers` says: a body, or a way to send one."""

    def __init__(self, **answers: str | Callable[[socket.socket], None]) -> None:
        self.answers = {
            "server_info": '"uptime_current_epoch": "1s"', "ready": "LIVE", "stats": STATS,
            "config_dump": "{}", **answers,
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


def put(api: ApiServer, text: str = "1") -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": text})


# ------------------------------------------------------------------------------------------
# Whoever may write to the volume

VERSION = {"version": loader.__version__}
STATES: dict[str, bytes] = {
    "deep": b'{"version":' + b"[" * 200_000,
    "just deep enough": b'{"files":' + b"[" * 900 + b"]" * 900 + b"}",
    "no object": b"[1]",
    "not UTF-8": b"\xff\xfe{",
    "spaces": b" " * 1_000_000,
    "huge": b"[" + b"[]," * 6_000_000 + b"1]",
    **{
        f"everywhere {json.dumps(value)}": json.dumps(
            {**VERSION, "files": value, "acked": value, "nacked": value}).encode()
        for value in (
            "x", [[]], {"rds.yaml": 1, "../../token": [], "..data/x": {}, "": None},
            {"rds.yaml": ["x", "no such kind"]}, {"rds.yaml": ["x", ["eds"]]},
            {"rds.yaml": ["a", "b", "eds", "d", [1, []]], "../x": ["a", "b", "c", "d", []]},
            {"rds.yaml": ["\ud800", "\ud800"], "\ud800": ["a", "b", "c", "\ud800", ["\ud800"]]},
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_planted_state_ends_no_loader(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path, name: str
) -> None:
    put(api)
    assert run_loader(*ONCE).returncode == 0
    (out / "..state/loader.json").write_bytes(STATES[name])
    with Envoy() as envoy:
        running = start_loader(*WATCH, "--envoy-admin", envoy.url)
        wait_until(lambda: "stats" in envoy.asked)
        put(api, "2")
        wait_files(out, {"rds.yaml": "2"}, 10)
        assert running.resident() < 120 << 20
        running.stop(within=5)
    assert "Traceback" not in running.log


def planted(place: Path, kind: str) -> None:
    """Something else than a file in the place of one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir():
        place.rename(place.with_name("away"))
    place.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "directory":
        (place / "x").mkdir(parents=True)
    elif kind == "socket":
        bound = socket.socket(socket.AF_UNIX)
        here = os.getcwd()
        os.chdir(place.parent)  # the path of a socket has 107 bytes at most
        bound.bind(place.name)
        os.chdir(here)
    elif kind == "sparse":
        for number in range(40):
            place.with_name(f"{place.name}{number}").touch()
            os.truncate(place.with_name(f"{place.name}{number}"), 60 << 20)
    elif kind == "deep":
        place.joinpath(*["d"] * 100).mkdir(parents=True)


PLACES = (
    "..state/loader.json", "..state/loader.json.new", "..state/acked/rds.yaml", "..state/acked/x",
    "..data/x.yaml", "..0123456789abcdef/rds.yaml", "..00000000000000ff", "current/x.yaml",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "sparse", "deep"])
def test_what_is_planted_is_not_waited_for(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path, kind: str
) -> None:
    put(api)
    assert run_loader(*ONCE).returncode == 0
    for place in PLACES:
        planted(out / place, kind)
    routes = out / "current/rds.yaml"
    with Envoy() as envoy:
        running = start_loader(*WATCH, "--sync-interval", "100ms", "--envoy-admin", envoy.url)
        for number in "23":
            put(api, number)
            wait_until(lambda n=number: routes.read_text() == n, 10)  # type: ignore[misc]
            envoy.answers["stats"] = STATS.replace("1", number)
        assert running.resident() < 600 << 20
        running.stop(within=5)
    assert "Traceback" not in running.log

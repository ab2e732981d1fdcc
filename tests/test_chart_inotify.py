"""How many Envoys of one user fit on a node: the table of docs/envoy-files.md, measured.

Each row starts that many Envoys as one user with the kernel's default limit, each with as many
clusters on EDS as the budget allows, and changes all clusters of all of them at once.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.envoy import (
    Config,
    admin_connection,
    assignment,
    bootstrap,
    dynamic_resources,
    eds_cluster,
    envoy_path,
    file_source,
    http_listener,
    inotify_instances,
    rds_routes,
    response,
    route_config,
)
from tests.support.loader import ROOT, wait_until

pytestmark = [pytest.mark.envoy, pytest.mark.xdist_group("inotify")]

LIMIT = 128  # the kernel's default of fs.inotify.max_user_instances
PAGE = (ROOT / "docs" / "envoy-files.md").read_text()


class Node:
    """A user namespace with the limit, as a user of its own: other Envoys here do not count."""

    def __init__(self, root: Path, budget: int) -> None:
        self.root = root
        self.eds = budget
        self.pids: list[int] = []
        # accepts connections and never answers: a cluster with such an endpoint goes on warming
        self.silent = socket.create_server(("127.0.0.1", 0), backlog=1024)
        root.chmod(0o777)
        limit = "/proc/sys/user/max_inotify_instances"
        begin = f"echo {LIMIT} > {limit} || exit 1; echo ready"
        script = f"{begin}; while read -r command; do $command & echo $!; done"
        user = ["setpriv", f"--reuid={random.randint(20000, 60000)}", "--clear-groups"]
        self.shell = subprocess.Popen(
            [*(user if os.getuid() == 0 else []), "unshare", "-Ur", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self.line() != "ready":
            self.close()
            pytest.skip("no user namespace with a limit of its own can be made here")

    def line(self) -> str:
        assert self.shell.stdout is not None
        return self.shell.stdout.readline().strip()

    def close(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.shell.kill()
        self.shell.communicate()
        self.silent.close()

    # -- files

    def move(self, name: str, content: str) -> None:
        (self.root / f"{name}.new").write_text(content)
        (self.root / f"{name}.new").rename(self.root / name)

    def write(self, warming: bool) -> None:
        """All clusters; `warming`: each is changed, and waits for a health check."""
        more: Config = {}
        if warming:
            check = {"timeout": "60s", "interval": "60s", "http_health_check": {"path": "/"}}
            more["health_checks"] = [{**check, "unhealthy_threshold": 1, "healthy_threshold": 1}]
        clusters = [
            eds_cluster(f"c{number}", file_source(self.root / f"eds{number}.json"), **more)
            for number in range(self.eds)
        ]
        for number in range(self.eds):
            found = assignment(f"c{number}", self.silent.getsockname()[1])
            self.move(f"eds{number}.json", response("assignment", found))
        self.move("cds.json", response("cluster", *clusters))

    def write_rest(self) -> None:
        self.write(warming=False)
        self.move("rds.json", response("routes", route_config({"c0": 1})))
        listener = http_listener(0, rds_routes(file_source(self.root / "rds.json")))
        self.move("lds.json", response("listener", listener))

    # -- Envoys

    def start(self) -> int:
        number = len(self.pids)
        config = bootstrap(
            dynamic_resources(
                file_source(self.root / "cds.json"), file_source(self.root / "lds.json")
            )
        )
        config["node"] = {"id": "a", "cluster": "a"}
        pipe = {"path": str(self.root / f"{number}.sock"), "mode": 0o600}
        config["admin"] = {"address": {"pipe": pipe}}
        place = self.root / f"{number}.json"
        place.write_text(json.dumps(config))
        words = [envoy_path(), "-c", str(place), "--concurrency", "1", "--disable-hot-restart"]
        words += ["--log-path", str(self.root / f"{number}.log")]
        assert self.shell.stdin is not None
        print(*words, file=self.shell.stdin, flush=True)
        self.pids.append(int(self.line()))
        wait_until(lambda: self.live(number) or number not in self.alive(), 30)
        return number

    def admin(self, number: int, path: str) -> str:
        with contextlib.closing(admin_connection(f"unix:{self.root}/{number}.sock")) as connection:
            connection.request("GET", path)
            return connection.getresponse().read().decode()

    def live(self, number: int) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.admin(number, "/ready").strip() == "LIVE"
        return False

    def alive(self) -> list[int]:
        """The Envoys that run; one that ended is a zombie of the shell."""
        found = []
        for number, pid in enumerate(self.pids):
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX":
                    found.append(number)
        return found

    def change_everything(self) -> None:
        """Until every Envoy warms all its clusters, or has ended."""
        self.write(warming=True)
        wanted = f"cluster_manager.warming_clusters: {self.eds}"

        def seen(number: int) -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return wanted in self.admin(number, "/stats?filter=warming_clusters")
            return False

        numbers = range(len(self.pids))
        wait_until(lambda: all(seen(n) or n not in self.alive() for n in numbers), 30)


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, for Unix sockets, and open to another user."""
    path = Path(tempfile.mkdtemp(prefix="xds-"))
    yield path
    shutil.rmtree(path)


def rows() -> list[tuple[int, int, int]]:
    """The table of the page: budget, Envoys at rest, Envoys whatever changes."""
    found = re.findall(r"^\| (\d+)[^|]*\| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
    return [(int(budget), int(rest), int(change)) for budget, rest, change in found]


def instances(node: Node) -> set[int]:
    return {inotify_instances(node.pids[number]) for number in node.alive()}


def test_the_table_has_three_budgets() -> None:
    assert [row[0] for row in rows()] == [8, 16, 32]


@pytest.mark.parametrize(("budget", "at_rest", "fit"), rows())
def test_so_many_envoys_survive_a_change_of_everything(
    budget: int, at_rest: int, fit: int, directory: Path
) -> None:
    with contextlib.closing(Node(directory, budget)) as node:
        node.write_rest()
        for _ in range(fit):
            node.start()
        assert instances(node) == {budget + 3}, "CDS, LDS and RDS besides the budget"
        assert LIMIT // (budget + 3) == at_rest
        node.change_everything()
        assert len(node.alive()) == fit
        assert instances(node) == {2 * budget + 3}
        assert LIMIT // (2 * budget + 3) == fit, "not one more"


def test_one_envoy_more_ends_one(directory: Path) -> None:
    budget, _, fit = rows()[-1]
    with contextlib.closing(Node(directory, budget)) as node:
        node.write_rest()
        for _ in range(fit + 1):
            node.start()
        assert len(node.alive()) == fit + 1
        node.change_everything()
        assert len(node.alive()) < fit + 1

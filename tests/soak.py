"""The long run: `python -m tests.soak --minutes 60` (or DURATION=3600 in the environment).

Objects change all the time while the API server fails now and then. Two loaders watch: one lives
through all of it beside a real Envoy, and its memory and open files must stay flat; the other is
killed again and again, and must converge each time. Every `--checkpoint` seconds the churn pauses,
what is on disk and in Envoy is compared with what the API has, and a row of figures is printed.
Exit 1 if anything was not as promised.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.support import disk
from tests.support.apiserver import ApiServer, Cut, Drop, Slow, Stall, failure
from tests.support.envoy import (
    Envoy,
    bootstrap,
    file_source,
    http_listener,
    rds_routes,
    response,
)
from tests.support.loader import Loader, snapshot, wait_until
from tests.support.ports import held_port

MAPS, SERVICES, ENDPOINTS = 40, 60, 10
PORT = [{"name": "http", "port": 8080, "protocol": "TCP"}]
# A loader that failed for a while looks again after at most 30 s.
CONVERGED = 40.0


class Figures(NamedTuple):
    minute: float
    changes: int
    publications: int
    resident: float  # MB
    files: int
    threads: int
    cpu: float  # seconds so far
    envoy: float  # MB
    converged: float  # seconds that it took


class Soak:
    """The objects, the loaders and Envoy."""

    def __init__(self, scratch: Path, seed: int, rate: float) -> None:
        self.chosen = random.Random(seed)
        self.scratch, self.rate = scratch, rate
        self.api = ApiServer()
        self.maps: dict[str, str] = {}
        self.endpoints: dict[int, list[str]] = {}
        self.counts: Counter[str] = Counter()
        self.listens = {name: held_port() for name in ("steady", "mortal")}
        self.changes = 0
        self.began = time.monotonic()
        for number in range(MAPS):
            self.rewrite(number)
        for number in range(SERVICES):
            ports = [{"name": "http", "port": 80, "protocol": "TCP"}]
            self.api.service("demo", f"s{number}", ports, annotations={"xds-loader/route": "true"})
            self.roll(number)
        self.route()
        self.steady = self.loader("steady", "--sync-interval", "5s")
        self.mortal = self.loader("mortal", "--sync-interval", "1s")
        path = self.out("steady") / "current/routes.json"
        wait_until(path.exists, 20)
        self.port = held_port()
        source = rds_routes(file_source(path))
        self.envoy = Envoy(
            bootstrap(listeners=[http_listener(self.port, source)]), scratch / "envoy"
        )

    def out(self, name: str) -> Path:
        return self.scratch / name

    def loader(self, name: str, *more: str) -> Loader:
        return Loader(
            ["--namespace", "demo", "--apiserver", self.api.url, "--watch",
             "--output-dir", str(self.out(name)), "--token-file", os.devnull,
             "--configmap", "envoy-xds", "--configmap-selector", "app=soak",
             "--services", "*", "--endpoints", "eds", "--step-delay", "5ms",
             "--log-level", "warning", "--listen", f"127.0.0.1:{self.listens[name]}", *more],
        )  # fmt: skip

    # -- churn

    def rewrite(self, number: int) -> None:
        name = f"map{number}"
        size = self.chosen.choice([10, 100, 1_000, 20_000])
        self.maps[name] = f"{self.changes} " + "x" * self.chosen.randrange(size)
        self.api.configmap("demo", name, {f"{name}.txt": self.maps[name]}, labels={"app": "soak"})

    def remove(self, number: int) -> None:
        self.maps.pop(f"map{number}", None)
        self.api.delete("ConfigMap", "demo", f"map{number}")

    def roll(self, number: int) -> None:
        addresses = [
            f"10.{self.chosen.randrange(250)}.{number}.{n + 1}" for n in range(ENDPOINTS)
        ]
        self.endpoints[number] = addresses
        self.api.endpointslice("demo", f"s{number}-abc", f"s{number}", addresses, PORT)

    def route(self) -> None:
        self.version = f"v{self.changes}"
        answer = {"status": 200, "body": {"inline_string": self.version}}
        route = {"match": {"prefix": "/"}, "direct_response": answer}
        host = {"name": "all", "domains": ["*"], "routes": [route]}
        text = response("routes", {"name": "routes", "virtual_hosts": [host]})
        self.api.configmap("demo", "envoy-xds", {"routes.json": text})

    def change(self) -> None:
        self.changes += 1
        what = self.chosen.random()
        if what < 0.5:
            self.roll(self.chosen.randrange(SERVICES))
        elif what < 0.85:
            self.rewrite(self.chosen.randrange(MAPS))
        elif what < 0.9:
            self.remove(self.chosen.randrange(MAPS))
        else:
            self.route()

    def fault(self) -> None:
        """One thing that goes wrong with the API server."""
        api, chosen = self.api, self.chosen
        times = chosen.randrange(1, 6)
        faults: dict[str, Callable[[], object]] = {
            "watches end": api.close_watches,
            "watches are cut": lambda: api.close_watches(clean=False),
            "cut within a chunk": lambda: api.close_watches(midchunk=True),
            "history is compacted": self.forget,
            "connections are dropped": lambda: api.fail_next(".", Drop(), times),
            "answers are cut": lambda: api.fail_next(".", Cut(chosen.randrange(2_000)), times),
            "500": lambda: api.fail_next(".", failure(500, "InternalError"), times),
            "429": lambda: api.fail_next(
                ".", failure(429, "TooManyRequests", headers={"Retry-After": "1"}), times
            ),
            "401": lambda: api.fail_next(".", failure(401, "Unauthorized"), times),
            "slow": lambda: api.fail_next(".", Slow(100, 0.001), times),
            "stalls": lambda: api.fail_next(".", Stall(2.0), times),
            "server restarts": lambda: self.away(0.5),
            "server is away": lambda: self.away(3.0),
            "server freezes": self.freeze,
            "bookmarks": api.bookmark,
        }
        name = chosen.choice(sorted(faults))
        self.counts[name] += 1
        faults[name]()
        if chosen.random() < 0.5:
            api.close_watches(clean=False)

    def forget(self) -> None:
        self.api.compact()
        self.api.close_watches()

    def away(self, seconds: float) -> None:
        self.api.stop()
        time.sleep(seconds)
        self.api.start()

    def freeze(self) -> None:
        self.api.freeze()
        time.sleep(1.5)
        self.api.thaw()

    def kill(self) -> None:
        """The mortal loader dies, at any moment, and another one starts."""
        self.mortal.kill()
        self.counts["loader is killed"] += 1
        self.mortal = self.loader("mortal", "--sync-interval", "1s")

    def damage(self) -> None:
        """Somebody meddles with the files."""
        current = self.out("mortal") / "current"
        with contextlib.suppress(OSError):
            path = self.chosen.choice(sorted(current.glob("*.txt")))
            if self.chosen.random() < 0.5:
                path.unlink()
            else:
                path.resolve().write_text("damaged")
            self.counts["files are damaged"] += 1

    def churn(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        next_fault = time.monotonic() + self.chosen.random() * 5
        next_kill = time.monotonic() + self.chosen.random() * 10
        while (now := time.monotonic()) < until:
            self.change()
            if now > next_fault:
                self.fault()
                next_fault = time.monotonic() + self.chosen.random() * 10
            if now > next_kill:
                self.chosen.choice([self.kill, self.damage])()
                next_kill = time.monotonic() + self.chosen.random() * 10
            time.sleep(self.chosen.expovariate(self.rate))

    # -- checks

    def is_right(self, name: str) -> bool:
        files = snapshot(self.out(name))
        for map_name, text in self.maps.items():
            if files.pop(f"{map_name}.txt", b"").decode() != text:
                return False
        if any(path.endswith(".txt") for path in files):
            return False
        for number, addresses in self.endpoints.items():
            eds = files.get(f"eds/demo_s{number}_http.yaml", b"").decode()
            if not all(f"{address}\n" in eds or f'{address}"' in eds for address in addresses):
                return False
        return self.version.encode() in files.get("routes.json", b"")

    def served(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", "/")
            return connection.getresponse().read().decode()

    def checkpoint(self) -> Figures:
        began = time.monotonic()
        self.api.forgive()
        for name in ("steady", "mortal"):
            wait_until(lambda: self.is_right(name), CONVERGED, f"{name} to converge")  # noqa: B023
        took = time.monotonic() - began
        wait_until(lambda: self.served() == self.version, 2, "Envoy to serve the last routes")
        for name in ("steady", "mortal"):
            wait_until(lambda: inspected(self.out(name)), 3, f"{name} to be tidy")  # noqa: B023
        assert self.steady.process.poll() is None
        assert "Traceback" not in self.steady.log + self.mortal.log
        assert self.envoy.count("http.ingress.rds.routes.update_failure") == 0
        assert self.envoy.count("http.ingress.rds.routes.update_rejected") == 0
        self.api.compact()  # the server keeps its history for ever, else
        return Figures(
            (time.monotonic() - self.began) / 60,
            self.changes,
            self.envoy.count("http.ingress.rds.routes.update_success"),
            self.steady.resident() / 2**20,
            self.steady.open_files(),
            len(os.listdir(f"/proc/{self.steady.pid}/task")),
            self.steady.cpu(),
            resident(self.envoy.pid) / 2**20,
            took,
        )

    def close(self) -> None:
        self.envoy.stop()
        self.steady.kill()
        self.mortal.kill()
        self.api.close()


def inspected(out: Path) -> bool:
    try:
        disk.inspect(out)
    except (AssertionError, OSError):
        return False
    return True


def resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def verdict(rows: list[Figures]) -> list[str]:
    """What is not flat: the last third against the middle one."""
    third = len(rows) // 3
    if third < 2:
        return []
    middle, last = rows[third : 2 * third], rows[-third:]
    wrong = []
    for name, allowed in (("resident", 2.0), ("files", 2), ("threads", 0)):
        before = statistics.median(getattr(row, name) for row in middle)
        after = statistics.median(getattr(row, name) for row in last)
        if after - before > allowed:
            wrong.append(f"{name} grew from {before:.1f} to {after:.1f}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    seconds = float(os.environ.get("DURATION", "3600"))
    parser.add_argument("--minutes", type=float, default=seconds / 60)
    parser.add_argument("--checkpoint", type=float, default=20.0, help="seconds of churn")
    parser.add_argument("--rate", type=float, default=50.0, help="changes a second")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"{options.minutes:g} minutes, seed {options.seed}", flush=True)
    rows: list[Figures] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak(Path(scratch), options.seed, options.rate)
        print("minute  changes  rds reloads  loader MB  fds  threads  CPU s  Envoy MB  converged")
        try:
            while time.monotonic() < soak.began + options.minutes * 60:
                soak.churn(options.checkpoint)
                row = soak.checkpoint()
                rows.append(row)
                print(f"{row.minute:6.1f} {row.changes:8} {row.publications:12} "
                      f"{row.resident:10.1f} {row.files:4} {row.threads:8} {row.cpu:6.1f} "
                      f"{row.envoy:9.1f} {row.converged:8.2f} s", flush=True)  # fmt: skip
        except (AssertionError, TimeoutError, OSError) as error:
            wrong.append(repr(error))
            print(f"the steady loader's log ends with:\n{soak.steady.log[-3_000:]}")
            print(f"the mortal loader's log ends with:\n{soak.mortal.log[-3_000:]}")
        finally:
            soak.close()
    wrong += verdict(rows)
    for name, count in sorted(soak.counts.items()):
        print(f"{count:6} times: {name}")
    print("\n".join(wrong) if wrong else "everything as promised; memory and descriptors flat")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

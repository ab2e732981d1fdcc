"""Steady load through Envoys while their configuration changes, and what stands behind them."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.closing import Closing
from tests.support.envoy import (
    Config,
    Envoy,
    admin_connection,
    admin_interface,
    bootstrap,
    dynamic_resources,
    file_source,
    http_listener,
    rds_routes,
)
from tests.support.load import Wrk
from tests.support.ports import held_port


class Upstreams(Envoy):
    """Servers that answer 200 with their name, all in one Envoy: much faster than Python's."""

    def __init__(self, base_dir: Path, count: int) -> None:
        self.ports = [held_port() for _ in range(count)]
        listeners = [self._listener(f"v{i}", port) for i, port in enumerate(self.ports)]
        super().__init__(bootstrap(listeners=listeners), base_dir, log_level="warning")

    def __enter__(self) -> Upstreams:
        return self

    def _listener(self, name: str, port: int) -> Config:
        answer = {"status": 200, "body": {"inline_string": f"{name}\n"}}
        route = {"match": {"prefix": "/"}, "direct_response": answer}
        host = {"name": "all", "domains": ["*"], "routes": [route]}
        return http_listener(port, {"route_config": {"virtual_hosts": [host]}}, name=name)


ACCESS_LOG = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog"


class Front(NamedTuple):
    """A bootstrap whose clusters and routes come from files; the port it serves; its admin."""

    port: int
    admin_url: str
    config: Config
    failures: Path  # a line for each answer of 400 and more

    def failed(self) -> str:
        """Of which kinds the failures are, with their time, for whoever reads about them."""
        lines = self.failures.read_text().splitlines() if self.failures.exists() else []
        kinds: dict[str, list[str]] = {}
        for line in lines:
            when, _, what = line.partition(" ")
            kinds.setdefault(what, []).append(when)
        return "; ".join(f"{what}: {len(at)} ({at[0]}..{at[-1]})" for what, at in kinds.items())


def failure_log(path: Path) -> Config:
    """An access log of status, response flags and cluster of what failed."""
    line = "%START_TIME(%T.%3f)% %RESPONSE_CODE% %RESPONSE_FLAGS% %UPSTREAM_CLUSTER%\n"
    status = {"value": {"default_value": 400, "runtime_key": "none"}, "op": "GE"}
    return {
        "name": "envoy.access_loggers.file",
        "filter": {"status_code_filter": {"comparison": status}},
        "typed_config": {
            "@type": ACCESS_LOG,
            "path": str(path),
            "log_format": {"text_format_source": {"inline_string": line}},
        },
    }


def front(
    out: Path,
    *,
    cds: str = "cds.yaml",
    rds: str = "rds.yaml",
    name: str = "routes",
    watched: bool = False,
) -> Front:
    """`watched`: both subscriptions share the output directory as their watched_directory."""
    directory = out if watched else None
    port = held_port()
    routes = rds_routes(file_source(out / "current" / rds, directory), name)
    clusters = dynamic_resources(file_source(out / "current" / cds, directory))
    admin, admin_url = admin_interface(out.parent / f"admin-{port}.sock")
    failures = out.parent / f"failed-{port}.log"
    routes["access_log"] = [failure_log(failures)]
    config = bootstrap(clusters, listeners=[http_listener(port, routes)])
    config["admin"] = {"address": admin}
    return Front(port, admin_url, config, failures)


class Total(NamedTuple):
    requests: int
    failed: int
    seconds: float
    stall: float = 0.0  # the longest that an Envoy's main thread took to answer, in seconds
    bad: int = 0  # of those that failed: the answers of 400 and more; the others got none

    @property
    def rate(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        rate = f"{self.rate:.0f}/s, longest stall {self.stall * 1000:.0f} ms"
        return f"{self.failed} of {self.requests} requests failed ({rate})"


class Pulse(threading.Thread):
    """Asks one Envoy's main thread for a sign of life, all the time; `stall` is the longest wait.

    On a machine that is busy beyond measure it takes seconds to read a file. Whoever does not wait
    so long publishes the next step too early: that is the bound of what is promised.
    """

    def __init__(self, admin_url: str) -> None:
        super().__init__(daemon=True)
        self.stall = 0.0
        self._where = admin_url
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        connection = admin_connection(self._where, 30)
        while not self._done.wait(0.03):
            began = time.monotonic()
            try:
                connection.request("GET", "/ready")
                connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                connection.close()
            self.stall = max(self.stall, time.monotonic() - began)
        connection.close()

    def end(self) -> float:
        self._done.set()
        self.join(31)
        return self.stall


class Load(Closing):
    """wrk against each of these ports; `stop` gives the sum."""

    def __init__(
        self,
        ports: Iterable[int],
        *,
        connections: int = 4,
        host: str | None = None,
        admins: Iterable[str] = (),
        timeout: int = 2,
    ) -> None:
        self._pulses = [Pulse(url) for url in admins]
        self._stack = contextlib.ExitStack()
        self._began = time.monotonic()
        self._each: Sequence[Wrk] = [
            self._stack.enter_context(
                Wrk(f"http://127.0.0.1:{port}/", connections=connections, host=host,
                    timeout=timeout)
            )
            for port in ports
        ]

    def stop(self) -> Total:
        reports = [wrk.stop() for wrk in self._each]
        seconds = max((report.seconds for report in reports), default=0.0)
        requests = sum(report.requests for report in reports)
        failed = sum(report.failed for report in reports)
        stall = max((pulse.end() for pulse in self._pulses), default=0.0)
        bad = sum(report.non_2xx for report in reports)
        return Total(requests, failed, seconds, stall, bad)

    def close(self) -> None:
        self._stack.close()

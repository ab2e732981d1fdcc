"""`--services` as a process beside the real Envoy: what users do, and what is served then.

Pods are backends on 127.0.0.2 and so on, all on one port as pods are.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shlex
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from tests.conftest import StartEnvoy, StartLoader
from tests.support.apiserver import ApiServer, Client, Object
from tests.support.backend import Backend
from tests.support.disk import wait_converged
from tests.support.dns import Resolver
from tests.support.docs import ROOT, block_for
from tests.support.envoy import Config, Envoy, http_listener, inotify_instances
from tests.support.load import Poller, have_wrk
from tests.support.loader import Loader, snapshot, wait_until
from tests.support.ports import held_port
from tests.support.rendering import endpoint, endpoint_slice, port, service
from tests.support.steady import Front, Load, Upstreams, front
from tests.support.worlds import CHECKS, MERGE

pytestmark = [pytest.mark.envoy, pytest.mark.xdist_group("inotify")]

HOST = "shop.example"
WEB = "web.demo.svc.cluster.local"
StartPod = Callable[..., Backend]


class Shop:
    """Services of the namespace demo, the loader that renders them and the Envoy that reads it."""

    def __init__(
        self,
        api: ApiServer,
        out: Path,
        upstreams: Upstreams,
        start_loader: StartLoader,
        start_envoy: StartEnvoy,
    ) -> None:
        self.api = api
        self.out = out
        self.upstreams = upstreams
        self.use("json")
        self._start_loader = start_loader
        self._start_envoy = start_envoy
        self.client = Client(api.url, "token-1")
        self.loader: Loader | None = None
        self.envoy: Envoy | None = None

    def use(self, fmt: str) -> None:
        self.fmt = fmt
        cds, rds = f"cds.{fmt}", f"rds.{fmt}"
        self.front: Front = front(self.out, cds=cds, rds=rds, name="services")

    def start(self, *options: str, config: Config | None = None) -> Envoy:
        self.start_loader(*options, config=config)
        rds = self.out / f"current/rds.{self.fmt}"
        wait_until(rds.exists, 20, "the first snapshot")
        self.envoy = self._start_envoy(self.front.config)
        return self.envoy

    def start_loader(self, *options: str, config: Config | None = None) -> Loader:
        path = self.out.parent / "config.json"
        path.write_text(json.dumps(config or {}))
        self.loader = self._start_loader(
            *("--watch", "--services", "*", "--format", self.fmt, "--config", str(path)),
            *("--envoy-admin", self.front.admin_url, *options),
        )
        return self.loader

    def await_routes(self) -> None:
        """Until Envoy runs the routes on disk."""

        def run() -> bool:
            version = json.loads(snapshot(self.out)["rds.json"])["version_info"]
            assert self.envoy is not None
            return version in self.envoy.stats(r"\.rds\..*\.version_text$").values()

        wait_until(run, message="the routes in Envoy")

    def service(self, name: str, port: int = 80, /, **annotations: str) -> None:
        ports = [{"name": "http", "port": port, "targetPort": 8080, "protocol": "TCP"}]
        given = {f"xds-loader/{key}": value for key, value in annotations.items()}
        self.api.service("demo", name, ports, annotations=given)

    def endpoints(self, service: str, port: int, *addresses: str | Object, name: str = "") -> None:
        ports = [{"name": "http", "port": port, "protocol": "TCP"}]
        self.api.endpointslice("demo", name or f"{service}-x", service, addresses, ports)

    def up(self, name: str, upstream: int, **annotations: str) -> None:
        """A Service with one endpoint."""
        self.endpoints(name, self.upstreams.ports[upstream], "127.0.0.1")
        self.service(name, **annotations)

    def annotate(self, name: str, **annotations: str | None) -> None:
        """As `kubectl annotate --overwrite` does it; None takes one away (`key-`)."""
        given = {f"xds-loader/{key}": value for key, value in annotations.items()}
        path = f"/api/v1/namespaces/demo/services/{name}"
        patch = {"metadata": {"annotations": given}}
        status, answer = self.client.request("PATCH", path, patch, MERGE)
        assert status == 200, answer

    def put(self, *raw: Object) -> None:
        """Services and slices as tests/support/rendering.py makes them."""
        for obj in raw:
            self.api.put({"kind": "EndpointSlice" if "addressType" in obj else "Service", **obj})

    def ask(self, host: str = WEB, path: str = "/") -> tuple[int, str, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.front.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.read().decode().strip(), answer.headers

    def get(self, host: str = WEB, path: str = "/") -> tuple[int, str]:
        """Status and body."""
        return self.ask(host, path)[:2]

    def share(self, count: int = 40, host: str = WEB) -> set[str]:
        """Who answered."""
        answers = [self.get(host) for _ in range(count)]
        assert {status for status, _ in answers} == {200}
        return {body for _, body in answers}

    def hosts(self, cluster: str) -> list[tuple[str, str, int, str]]:
        """(address:port, zone, priority, EDS health) of each host that Envoy has."""
        assert self.envoy is not None
        found = []
        for one in self.envoy.clusters()[cluster]:
            address = one["address"]["socket_address"]
            where = f"{address['address']}:{address['port_value']}"
            zone = one.get("locality", {}).get("zone", "")
            health = one["health_status"]["eds_health_status"]
            found.append((where, zone, one.get("priority", 0), health))
        return sorted(found)

    def poller(self, path: str = "/", host: str = HOST) -> Poller:
        return Poller(f"http://127.0.0.1:{self.front.port}{path}", host=host, interval=0.001)


@pytest.fixture
def shop(
    api: ApiServer,
    out: Path,
    upstreams: Upstreams,
    start_loader: StartLoader,
    start_envoy: StartEnvoy,
) -> Iterator[Shop]:
    found = Shop(api, out, upstreams, start_loader, start_envoy)
    with contextlib.closing(found.client):
        yield found


@pytest.fixture
def pod() -> Iterator[StartPod]:
    """`pod("name", "127.0.0.2", port)`: a backend on an address of its own, as pods have them."""
    with contextlib.ExitStack() as stack:

        def start(name: str, host: str, port: int, tls: ssl.SSLContext | None = None) -> Backend:
            return stack.enter_context(Backend(name, port, tls, host))

        yield start


# ---------------------------------------------------------------------------------------------
# What Envoy has


@pytest.mark.parametrize(("mode", "fmt"), [("eds", "yaml"), ("inline", "yaml"), ("eds", "json")])
def test_envoy_has_each_endpoint_and_requests_reach_the_ports_of_pods(
    shop: Shop, pod: StartPod, mode: str, fmt: str
) -> None:
    one, two = held_port(), held_port()
    for name, host, number in (
        *(("a", "127.0.0.2", one), ("b", "127.0.0.3", two)),
        *(("drains", "127.0.0.4", one), ("admin", "127.0.0.2", two)),
    ):
        pod(name, host, number)
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
    shop.use(fmt)
    shop.put(web, *slices, service("demo/empty"))
    shop.start("--endpoints", mode)
    assert shop.hosts("demo/web/http") == [
        (f"127.0.0.2:{one}", "z1", 0, "HEALTHY"),
        (f"127.0.0.3:{two}", "z2", 0, "HEALTHY"),
        (f"127.0.0.4:{one}", "z1", 0, "DRAINING"),
    ]
    assert shop.hosts("demo/web/udp") == [
        (f"127.0.0.2:{one}", "z1", 0, "HEALTHY"),
        (f"127.0.0.4:{one}", "z1", 0, "DRAINING"),
    ]
    assert shop.hosts("demo/empty/http") == []
    assert shop.share() == {"a", "b"}
    assert shop.get("web.demo.svc.cluster.local:1234") in ((200, "a"), (200, "b"))
    # An annotation exposes one port: no Host header reaches another.
    assert shop.get("web.demo.svc.cluster.local:9000") in ((200, "a"), (200, "b"))
    shop.api.delete("EndpointSlice", "demo", "x")
    wait_until(lambda: len(shop.hosts("demo/web/http")) == 1)
    assert shop.share() == {"b"}


def test_upstream_tls_verifies_the_ca_and_the_name(
    shop: Shop, pod: StartPod, tmp_path: Path
) -> None:
    number = held_port()
    trusted, stranger = trustme.CA(), trustme.CA()
    trusted.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    def start(name: str, host: str, ca: trustme.CA, certified: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert(certified).configure_cert(context)
        pod(name, host, number, context)

    start("good", "127.0.0.2", trusted, "good.demo.svc.cluster.local")
    start("stranger", "127.0.0.3", stranger, "stranger.demo.svc.cluster.local")
    start("liar", "127.0.0.4", trusted, "good.demo.svc.cluster.local")
    start("outside", "127.0.0.5", trusted, "pods.example")
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
    shop.put(*raw, outside)
    with Resolver("127.0.0.5") as resolver:
        config: Config = {
            "cluster": {"trusted_ca": str(tmp_path / "ca.pem"), "base": resolver.fields},
            "endpoint": {"external_name": "strict_dns"},
        }
        envoy = shop.start(config=config)
        wait_until(lambda: bool(shop.hosts("demo/outside/https")))
        statuses = {
            name: shop.get(f"{name}.demo.svc.cluster.local")[0]
            for name in ("good", "stranger", "liar", "outside")
        }
    assert statuses == {"good": 200, "stranger": 503, "liar": 503, "outside": 200}
    assert envoy.count("cluster.demo/stranger/https.ssl.fail_verify_error")
    assert envoy.count("cluster.demo/liar/https.ssl.fail_verify_san")


def test_no_external_name_reaches_what_listens_beside_envoy(shop: Shop, pod: StartPod) -> None:
    """Envoy's own admin interface, in each spelling that it would resolve; with the name allowed,
    Envoy really goes where DNS says, which is why it is off by default.
    """
    number, admin = held_port(), held_port()
    pod("elsewhere", "127.0.0.2", number)
    names = ("localhost", "LOCALHOST.", "x.localhost", "127.0.0.1", "127.1", "2130706433", "0x7f.1")

    shop.front.config["admin"] = {
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": admin}}
    }
    shop.front = shop.front._replace(admin_url=f"http://127.0.0.1:{admin}")
    for index, name in enumerate(names):
        shop.put(service(f"demo/s{index}", port("http", admin), type="ExternalName",
                         externalName=name, annotations={"hosts": f"h{index}"}))  # fmt: skip
    shop.put(service("demo/ok", port("http", number), type="ExternalName",
                     externalName="pods.example", annotations={"hosts": "ok"}))  # fmt: skip
    on = {"external_name": "strict_dns"}
    with Resolver("127.0.0.2") as resolver:
        envoy = shop.start(config={"endpoint": on, "cluster": {"base": resolver.fields}})
        wait_until(lambda: bool(shop.hosts("demo/ok/http")))
    assert shop.get("ok") == (200, "elsewhere")
    assert {shop.get(f"h{index}", "/config_dump")[0] for index in range(len(names))} == {404}
    assert set(envoy.clusters()) == {"demo/ok/http"}
    assert set(resolver.asked) == {"pods.example"}


def test_http2_where_the_port_says_so(shop: Shop) -> None:
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
    pod = http_listener(number, {"route_config": answer}, name="pod")
    shop.front.config["static_resources"]["listeners"].append(pod)
    shop.put(*raw)
    shop.start(config={"cluster": {"base": base}})
    assert shop.ask("plain")[2]["x-spoken"] == "HTTP/1.1"
    assert shop.ask("h2c")[2]["x-spoken"] == "HTTP/2"
    assert shop.ask("grpc", "/x.Greeter/Hello")[2]["x-spoken"] == "HTTP/2"
    assert shop.get("grpc", "/x.Other/Hello")[0] == 404


# ---------------------------------------------------------------------------------------------
# Pods that come and go


def terminating(address: str) -> Object:
    conditions = {"ready": False, "serving": True, "terminating": True}
    return {"addresses": [address], "conditions": conditions}


@pytest.mark.skipif(not have_wrk(), reason="wrk is not installed")
@pytest.mark.parametrize("mode", ["eds", "inline"])
def test_rolling_100_endpoints_under_load_loses_no_request(
    mode: str, shop: Shop, pod: StartPod
) -> None:
    """Ten at a time: new ones are ready, old ones terminate, end while still listed, and go.

    A pod ends as soon as Envoy knows that it is DRAINING, which is long before it leaves the slice.
    """
    old = [f"127.0.1.{i}" for i in range(1, 101)]
    new = [f"127.0.2.{i}" for i in range(1, 101)]
    port = held_port()
    pods = {each: pod(each, each, port) for each in old}
    shop.endpoints("web", port, *old)
    shop.service("web", hosts=HOST)
    shop.start("--endpoints", mode)

    def known() -> dict[str, str]:
        """What the endpoints say of each address, as Envoy has it."""
        found = shop.hosts("demo/web/http")
        return {where.partition(":")[0]: health for where, _, _, health in found}

    wait_until(lambda: len(known()) == 100, 10)
    with Load([shop.front.port], connections=8, host=HOST) as load:
        time.sleep(0.3)
        for i in range(0, 100, 10):
            come, go = new[: i + 10], old[i : i + 10]
            pods |= {each: pod(each, each, port) for each in new[i : i + 10]}
            shop.endpoints("web", port, *come, name="web-y")
            rest: list[str | Object] = [*old[i + 10 :]]
            shop.endpoints("web", port, *rest, *map(terminating, go))

            gone = dict.fromkeys(go, "DRAINING")
            wait_until(lambda gone=gone: gone.items() <= known().items(), 10)  # type: ignore[misc]
            time.sleep(0.1)  # what is under way ends
            for each in go:
                pods[each].close()
            time.sleep(0.1)
            shop.endpoints("web", port, *rest)
        wait_until(lambda: known().keys() == set(new), 10, "all new")
        time.sleep(0.2)
        total = load.stop()
    print(f"rolling 100 endpoints, {mode}: {total}")
    assert total.failed == 0, f"{total}; {shop.front.failed()}"
    assert total.requests > 1000
    assert all(pods[address].requests > 0 for address in new)


def test_a_zone_that_is_lost_fails_over(shop: Shop, pod: StartPod) -> None:
    """`prefer_zone`: the own zone serves alone; without it the others do; no request is lost."""
    number = held_port()
    near = pod("near", "127.0.0.2", number)
    pod("far", "127.0.0.3", number)
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

    def slices(state: str = "ready") -> None:
        zones = endpoint("127.0.0.2", zone="a", state=state), endpoint("127.0.0.3", zone="b")
        shop.put(endpoint_slice("demo/web", *zones, ports={"http": number}))

    slices()
    shop.put(service(annotations={"hosts": HOST}))
    envoy = shop.start(config={"cluster": {"base": base}, "endpoint": {"prefer_zone": "a"}})
    envoy.wait_stat("cluster.demo/web/http.membership_healthy", 2)
    assert shop.hosts("demo/web/http") == [
        (f"127.0.0.2:{number}", "a", 0, "HEALTHY"),
        (f"127.0.0.3:{number}", "b", 1, "HEALTHY"),
    ]
    with shop.poller() as poller:
        poller.wait_body("near")
        assert set(poller.counts()) == {"near"}
        slices("unready")
        poller.wait_body("far")
        wait_until(lambda: len(shop.hosts("demo/web/http")) == 1)
        assert set(poller.next(10)) == {"far"}
        slices()
        poller.wait_body("near", after=poller.answers[-1].time)
        assert set(poller.next(10)) == {"near"}
        assert not poller.failed
    # Its pods fail without a word to Kubernetes.
    near.close()
    wait_until(lambda: shop.get(HOST) == (200, "far"))
    assert shop.share(host=HOST) == {"far"}


# ---------------------------------------------------------------------------------------------
# Routes by annotation


def canary_commands() -> list[tuple[str, dict[str, str]]]:
    """The commands of README.md and docs/rendering.md: (name, annotations) of each line."""
    test = test_a_canary_by_the_commands_of_the_page.__name__
    page = (ROOT / "docs" / "rendering.md").read_text()
    blocks = re.findall(r"```sh canary\n(.*?)```", page, re.DOTALL)
    found = []
    for line in "".join([block_for("README.md", test), *blocks]).splitlines():
        words = shlex.split(line, comments=True)
        assert words[:3] == ["kubectl", "annotate", "service"]
        given = dict(word.split("=") for word in words[4:] if word != "--overwrite")
        found.append((words[3], {key.removeprefix("xds-loader/"): given[key] for key in given}))
    return found


def test_a_canary_by_the_commands_of_the_page(shop: Shop) -> None:
    """Each command gives the canary the share that it says; then the old Service is deleted.

    No request is lost.
    """
    shop.up("web", 0, hosts=HOST)
    shop.up("web-canary", 1)
    shop.start()
    with shop.poller() as poller:
        poller.wait_body("v0")
        for name, annotations in canary_commands():
            shop.annotate(name, **annotations)
            weight = int(annotations["weight"])
            wanted = f'"name":"demo/{name}/http","weight":{weight}}}'.encode()
            wait_until(lambda w=wanted: w in snapshot(shop.out)["rds.json"], 5)  # type: ignore[misc]
            shop.await_routes()
            share = 100 * poller.next(500).get("v1", 0) / 500
            assert abs(share - weight) <= (12 if 0 < weight < 100 else 0), (weight, share)
        shop.annotate("web-canary", weight="100")
        shop.annotate("web", weight="0")
        shop.api.delete("Service", "demo", "web")
        wait_until(lambda: b"demo/web/http" not in snapshot(shop.out)["cds.json"], 5)
        shop.await_routes()
        assert set(poller.next(20)) == {"v1"}
        assert not poller.failed


def test_annotations_route_and_split(shop: Shop, pod: StartPod) -> None:
    number = held_port()
    for index, name in enumerate(("stable", "canary", "api", "rest")):
        pod(name, f"127.0.0.{index + 2}", number)

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

    shop.put(*raw("0"))
    shop.start()
    assert shop.share(host="shop.example") == {"stable"}
    shop.put(*raw("40"))
    both = {"stable", "canary"}
    wait_until(lambda: shop.share(60, host="SHOP.example:8080") == both)
    shop.put(*raw("100"))
    wait_until(lambda: shop.share(host="shop.example") == {"canary"})
    assert shop.get("shop.example", "/api/x") == (200, "api")
    assert shop.get("other.example") == (200, "rest")
    assert shop.get("elsewhere") == (200, "rest")


def test_a_service_that_is_deleted_while_it_is_routed_to(shop: Shop) -> None:
    """What it served goes to the next best route, or is 404; never to a cluster that is gone."""
    shop.up("web", 0, hosts=HOST)
    shop.up("api", 1, hosts=HOST, prefix="/api")
    shop.up("lone", 2, hosts="lone.example")
    envoy = shop.start()
    with shop.poller("/api/x") as poller, shop.poller(host="lone.example") as lone:
        poller.wait_body("v1")
        lone.wait_body("v2")
        shop.api.delete("Service", "demo", "api")
        poller.wait_body("v0")
        shop.api.delete("Service", "demo", "lone")
        shop.api.delete("EndpointSlice", "demo", "api-x")
        wait_until(lambda: set(envoy.clusters()) == {"demo/web/http"}, 5, "only web is left")
        time.sleep(0.1)
        assert not poller.failed
        assert {answer.status for answer in lone.answers} == {200, 404}
    wait_converged(shop.out)


# ---------------------------------------------------------------------------------------------
# Where endpoints come from


def test_legacy_endpoints_serve_where_there_are_no_slices(shop: Shop) -> None:
    """An API without EndpointSlices."""
    shop.api.missing_groups = {"discovery.k8s.io"}

    def endpoints(upstream: int) -> None:
        subset = {
            "addresses": [{"ip": "127.0.0.1"}],
            "ports": [{"name": "http", "port": shop.upstreams.ports[upstream], "protocol": "TCP"}],
        }
        metadata = {"namespace": "demo", "name": "web"}
        shop.api.put({"kind": "Endpoints", "metadata": metadata, "subsets": [subset]})

    endpoints(0)
    shop.service("web", hosts=HOST)
    shop.start()
    with shop.poller() as poller:
        poller.wait_body("v0")
        for upstream in (1, 2, 0):
            endpoints(upstream)
            poller.wait_body(f"v{upstream}")
        assert not poller.failed


# ---------------------------------------------------------------------------------------------
# Many


class Highest(threading.Thread):
    """The most inotify instances that a process had while this ran."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.most = 0
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, inotify_instances(self.pid))

    def end(self) -> int:
        self._done.set()
        self.join(5)
        return self.most


@pytest.mark.slow
def test_a_thousand_services_keep_envoy_up_also_when_all_warm_at_once(shop: Shop) -> None:
    """By `auto`; another `base` by a restart: all warm beside what they were."""
    many = 1000
    for i in range(many):
        shop.up(f"s{i:03}", i % 4, **({"hosts": HOST} if i == 0 else {}))
    base = {"connect_timeout": "1s", "health_checks": [CHECKS]}
    budget = 24  # other tests and their Envoys share the limit of this user
    config: Config = {"cluster": {"base": base}, "endpoint": {"eds_budget": budget}}
    envoy = shop.start(config=config)
    wait_until(lambda: len(envoy.clusters()) == many, 20, f"{many} clusters")
    on_eds = eds_files(shop.out)
    assert len(on_eds) == budget
    before = inotify_instances(envoy.pid)
    with shop.poller() as poller:
        poller.wait_body("v0")
        assert shop.loader is not None
        for timeout in ("2s", "3s"):
            highest = Highest(envoy.pid)
            shop.loader.stop()
            mark = len(poller.answers)
            shop.start_loader(
                config={**config, "cluster": {"base": {**base, "connect_timeout": timeout}}}
            )
            shop.loader.wait_log("published .*ack=yes", 20)
            assert set(connect_timeouts(shop.out)) == {timeout}
            assert eds_files(shop.out) == on_eds
            most = highest.end()
            print(f"{many} Services, {budget} on EDS: {before} instances, {most} while all warm")
            assert most <= 2 * budget + 4
            assert envoy.count("cluster_manager.warming_clusters") == 0
            assert envoy.count("cluster_manager.active_clusters") == many
            assert poller.answers[mark:]
        assert not poller.failed
    assert envoy.process is not None
    assert envoy.process.poll() is None
    refused = envoy.stats(r"(cds|rds)\.update_(rejected|failure)$")
    assert not any(refused.values()), refused


def eds_files(out: Path) -> set[str]:
    return {name for name in snapshot(out) if name.startswith("eds/")}


def connect_timeouts(out: Path) -> list[str]:
    clusters = json.loads(snapshot(out)["cds.json"])["resources"]
    return [each["connect_timeout"] for each in clusters]

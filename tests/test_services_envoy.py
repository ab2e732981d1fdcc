"""`--services` as a process beside the real Envoy: what users do, and what is served then."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.conftest import StartEnvoy, StartLoader
from tests.support.apiserver import ApiServer, Client, Object
from tests.support.busy import in_time
from tests.support.disk import wait_converged
from tests.support.dns import Resolver
from tests.support.docs import block_for
from tests.support.envoy import Config, Envoy, inotify_instances
from tests.support.load import Poller, have_wrk
from tests.support.loader import Loader, snapshot, wait_until
from tests.support.ports import held_port
from tests.support.steady import Front, Load, Upstreams, front
from tests.support.worlds import CHECKS, MERGE

pytestmark = [pytest.mark.envoy, pytest.mark.xdist_group("inotify")]

HOST = "shop.example"


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstreams]:
    with Upstreams(tmp_path_factory.mktemp("upstreams"), 4) as found:
        yield found


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
        self.front: Front = front(out, cds="cds.json", rds="rds.json", name="services")
        self._start_loader = start_loader
        self._start_envoy = start_envoy
        self.client = Client(api.url, "token-1")
        self.loader: Loader | None = None
        self.envoy: Envoy | None = None

    def start(self, *options: str, config: Config | None = None) -> Envoy:
        self.start_loader(*options, config=config)
        wait_until(lambda: (self.out / "current/rds.json").exists(), 20, "the first snapshot")
        self.envoy = self._start_envoy(self.front.config)
        return self.envoy

    def start_loader(self, *options: str, config: Config | None = None) -> Loader:
        path = self.out.parent / "config.json"
        path.write_text(json.dumps(config or {}))
        self.loader = self._start_loader(
            *("--watch", "--services", "*", "--format", "json", "--config", str(path)),
            *("--envoy-admin", self.front.admin_url, *options),
        )
        return self.loader

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


# ---------------------------------------------------------------------------------------------
# Pods that come and go


class Pods:
    """HTTP servers on addresses of their own and one port, in one thread; they really end."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.requests: dict[str, int] = {}
        self._servers: dict[str, asyncio.Server] = {}
        self._writers: dict[str, set[asyncio.StreamWriter]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def _serve(
        self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._writers[address].add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                self.requests[address] += 1
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok\n")
        self._writers[address].discard(writer)
        writer.close()

    async def _start(self, address: str) -> None:
        self.requests[address] = 0
        self._writers[address] = set()
        self._servers[address] = await asyncio.start_server(
            lambda reader, writer: self._serve(address, reader, writer), address, self.port
        )

    async def _stop(self, address: str) -> None:
        self._servers.pop(address).close()
        for writer in list(self._writers[address]):
            writer.transport.abort()

    def start(self, *addresses: str) -> None:
        for address in addresses:
            asyncio.run_coroutine_threadsafe(self._start(address), self._loop).result(5)

    def stop(self, *addresses: str) -> None:
        """At once, with all its connections."""
        for address in addresses:
            asyncio.run_coroutine_threadsafe(self._stop(address), self._loop).result(5)

    def close(self) -> None:
        self.stop(*self._servers)
        time.sleep(0.05)  # the connections' tasks end
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()


def terminating(address: str) -> Object:
    conditions = {"ready": False, "serving": True, "terminating": True}
    return {"addresses": [address], "conditions": conditions}


def health(envoy: Envoy, cluster: str) -> dict[str, str]:
    """What the EDS file says of each address, as Envoy has it."""
    return {
        host["address"]["socket_address"]["address"]: host["health_status"].get(
            "eds_health_status", "HEALTHY"
        )
        for host in envoy.clusters().get(cluster, [])
    }


@pytest.mark.skipif(not have_wrk(), reason="wrk is not installed")
@pytest.mark.parametrize("mode", ["eds", "inline"])
def test_rolling_100_endpoints_under_load_loses_no_request(mode: str, shop: Shop) -> None:
    """Ten at a time: new ones are ready, old ones terminate, end while still listed, and go.

    A pod ends as soon as Envoy knows that it is DRAINING, which is long before it leaves the slice.
    """
    old = [f"127.0.1.{i}" for i in range(1, 101)]
    new = [f"127.0.2.{i}" for i in range(1, 101)]
    with contextlib.closing(Pods(held_port())) as pods:
        pods.start(*old)
        shop.endpoints("web", pods.port, *old)
        shop.service("web", hosts=HOST)
        envoy = shop.start("--endpoints", mode)
        wait_until(lambda: len(envoy.clusters().get("demo/web/http", [])) == 100, 10)
        with Load([shop.front.port], connections=8, host=HOST) as load:
            time.sleep(0.3)
            for i in range(0, 100, 10):
                come, go = new[: i + 10], old[i : i + 10]
                pods.start(*new[i : i + 10])
                shop.endpoints("web", pods.port, *come, name="web-y")
                rest: list[str | Object] = [*old[i + 10 :]]
                shop.endpoints("web", pods.port, *rest, *map(terminating, go))

                def knows(addresses: Sequence[str] = go) -> bool:
                    known = health(envoy, "demo/web/http")
                    return all(known.get(each) == "DRAINING" for each in addresses)

                wait_until(knows, 10, f"{go[0]}... are DRAINING")
                time.sleep(0.1)  # what is under way ends
                pods.stop(*go)
                time.sleep(0.1)
                shop.endpoints("web", pods.port, *rest)
            wait_until(lambda: health(envoy, "demo/web/http").keys() == set(new), 10, "all new")
            time.sleep(0.2)
            total = load.stop()
        print(f"rolling 100 endpoints, {mode}: {total}")
        assert total.failed == 0, f"{total}; {shop.front.failed()}"
        assert total.requests > 1000
        assert all(pods.requests[address] > 0 for address in new)


def test_zones_fail_over_and_back(shop: Shop) -> None:
    """`prefer_zone`: the own zone serves alone; without it the others do; no request is lost."""
    here, there = shop.upstreams.ports[:2]

    def in_zone(zone: str, *, ready: bool = True) -> Object:
        conditions = {"ready": ready, "serving": ready, "terminating": False}
        return {"addresses": ["127.0.0.1"], "conditions": conditions, "zone": zone}

    shop.endpoints("web", here, in_zone("a"), name="web-a")
    shop.endpoints("web", there, in_zone("b"), name="web-b")
    shop.service("web", hosts=HOST)
    shop.start(config={"endpoint": {"prefer_zone": "a"}})
    with shop.poller() as poller:
        poller.wait_body("v0")
        assert set(poller.counts()) == {"v0"}
        shop.endpoints("web", here, in_zone("a", ready=False), name="web-a")
        poller.wait_body("v1")
        shop.endpoints("web", here, in_zone("a"), name="web-a")
        poller.wait_body("v0", after=poller.answers[-1].time)
        time.sleep(0.1)
        assert set(poller.counts(10)) == {"v0"}
        assert not poller.failed


# ---------------------------------------------------------------------------------------------
# Routes by annotation


ROOT = Path(__file__).resolve().parents[1]


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
            time.sleep(0.2)
            mark = len(poller.answers)
            wait_until(lambda n=mark: len(poller.answers) > n + 300, 20, "300 answers")  # type: ignore[misc]
            share = 100 * poller.counts(300).get("v1", 0) / 300
            assert abs(share - weight) <= (12 if 0 < weight < 100 else 0), (weight, share)
        shop.annotate("web-canary", weight="100")
        shop.annotate("web", weight="0")
        shop.api.delete("Service", "demo", "web")
        wait_until(lambda: b"demo/web/http" not in snapshot(shop.out)["cds.json"], 5)
        time.sleep(0.1)
        assert set(poller.counts(20)) == {"v1"}
        assert not poller.failed


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


def test_a_service_that_comes_is_served_at_once(shop: Shop) -> None:
    """From the API to the answer; a Service that nothing routes to costs nobody anything."""
    shop.up("web", 0, hosts=HOST)
    envoy = shop.start()
    with shop.poller("/new") as poller:
        poller.wait_body("v0")
        began = time.monotonic()
        shop.up("new", 1, hosts=HOST, prefix="/new")
        took = poller.wait_body("v1").time - began
        in_time(took, 1.0)
        assert not poller.failed
    wait_until(lambda: set(envoy.clusters()) == {"demo/web/http", "demo/new/http"}, 5)


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


def test_an_external_name_is_asked_of_dns(shop: Shop) -> None:
    """A name where it is allowed; `localhost` reaches nothing beside Envoy."""
    ports = [{"name": "http", "port": shop.upstreams.ports[0], "protocol": "TCP"}]
    shop.api.service(
        *("demo", "near", ports),
        annotations={"xds-loader/hosts": "near.example"},
        type="ExternalName",
        externalName="localhost",
        clusterIP="",
    )
    shop.api.service(
        *("demo", "far", ports),
        annotations={"xds-loader/hosts": HOST},
        type="ExternalName",
        externalName="pods.example",
        clusterIP="",
    )
    with Resolver() as resolver:
        on = {"external_name": "strict_dns"}
        envoy = shop.start(config={"endpoint": on, "cluster": {"base": resolver.fields}})
        with shop.poller() as poller, shop.poller(host="near.example") as near:
            poller.wait_body("v0")
            wait_until(lambda: len(near.answers) > 20, 5)
    assert set(envoy.clusters()) == {"demo/far/http"}
    assert {answer.status for answer in near.answers} == {404}


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
def test_many_services_keep_envoy_up_also_when_all_of_them_warm(shop: Shop) -> None:
    """300 Services by `auto`; another `base` by a restart: all warm beside what they were."""
    many = 300
    for i in range(many):
        shop.up(f"s{i:03}", i % 4, **({"hosts": HOST} if i == 0 else {}))
    base = {"connect_timeout": "1s", "health_checks": [CHECKS]}
    budget = 24  # other tests and their Envoys share the limit of this user
    config: Config = {"cluster": {"base": base}, "endpoint": {"eds_budget": budget}}
    envoy = shop.start(config=config)
    wait_until(lambda: len(envoy.clusters()) == many, 20, f"{many} clusters")
    assert eds_files(shop.out) <= budget
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
            most = highest.end()
            print(f"{many} Services, {budget} on EDS: {before} instances, {most} while all warm")
            assert most <= 2 * budget + 4
            assert envoy.count("cluster_manager.warming_clusters") == 0
            assert poller.answers[mark:]
        assert not poller.failed
    assert envoy.process is not None
    assert envoy.process.poll() is None
    refused = envoy.stats(r"(cds|rds)\.update_(rejected|failure)$")
    assert not any(refused.values()), refused


def eds_files(out: Path) -> int:
    files: Mapping[str, bytes] = snapshot(out)
    return sum(name.startswith("eds/") for name in files)


def connect_timeouts(out: Path) -> list[str]:
    clusters = json.loads(snapshot(out)["cds.json"])["resources"]
    return [each["connect_timeout"] for each in clusters]

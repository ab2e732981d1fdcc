"""Make before break, by the real Envoy under load: no request is lost, whatever changes.

Random changes that add, remove, replace and re-route clusters at once. An Envoy reads what shares
a `watched_directory` in an order of its own that differs from process to process, hence so many of
them: eight that are asked with 26 changes each, and six that are not with a third of that, of each
kind. ORDER_CHANGES=200 makes it 200 for each.

The last tests switch the order off and see requests fail: else the others would prove nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.conftest import StartEnvoy, StartLoader
from tests.support.apiserver import ApiServer, Client
from tests.support.disk import wait_converged
from tests.support.envoy import Envoy
from tests.support.load import have_wrk
from tests.support.loader import COMMAND, ROOT, Loader, snapshot, wait_until
from tests.support.steady import Front, Load, Total, Upstreams, front
from tests.support.worlds import (
    CHECKS,
    HOST,
    Shop,
    World,
    as_json,
    as_yaml,
    changed,
    first,
    less,
    more,
    populated,
    served,
)

CHANGES = int(os.environ.get("ORDER_CHANGES", "26"))
# Longer than the default: on a busy machine Envoy's main thread may take 400 ms for a CDS that
# takes EDS clusters away (the kernel waits when it closes an inotify instance).
STEP_DELAY = 0.3
ANSWER_BOUND = 2.0  # how long an Envoy that is asked may be silent
NAME = "envoy-xds"
FLUSH = ("--file-flush-interval-msec", "50")  # of the log of failures

pytestmark = [
    pytest.mark.xdist_group("inotify"),
    pytest.mark.timeout(120 + 15 * CHANGES),
    pytest.mark.skipif(not have_wrk(), reason="wrk is not installed"),
]


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstreams]:
    with Upstreams(tmp_path_factory.mktemp("upstreams"), 6) as found:
        yield found


@pytest.fixture
def client(api: ApiServer) -> Iterator[Client]:
    with contextlib.closing(Client(api.url, "token-1")) as found:
        yield found


class Scene:
    """A world that changes, its loader's options, and what stands in the output directory."""

    cds, rds, route_name = "cds.yaml", "rds.yaml", "routes"
    host: str | None = None
    options: tuple[str, ...] = ("--configmap", NAME)

    def __init__(
        self, seed: int, api: ApiServer, client: Client, out: Path, ports: Sequence[int]
    ) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.api = api
        self.client = client
        self.out = out
        self.ports = list(ports)
        self.serial = 0
        self.checked = False  # active health checks
        self.world = World({}, {})

    def begin(self) -> None:
        self.set(first(self.rng, self.ports))

    def change(self) -> None:
        self.serial += 1
        self.set(self.next())

    def next(self) -> World:
        return changed(self.world, self.serial, self.rng, self.ports)

    def set(self, world: World) -> None:
        """Ask for it; nobody waits."""
        raise NotImplementedError

    def name_of(self, name: str) -> str:
        """A cluster's name in Envoy."""
        return name

    def stands(self) -> bool:
        """Whether exactly this world is on disk."""
        clusters, weights = served(snapshot(self.out), self.cds, self.rds)
        wanted = {self.name_of(name): weight for name, weight in self.world.weights.items()}
        if len(wanted) == 1:  # a route to one cluster has no weight
            wanted = dict.fromkeys(wanted, 1)
        return clusters == set(map(self.name_of, self.world.clusters)) and weights == wanted

    def settle(self) -> None:
        wait_until(self.stands, 20, f"change {self.serial} of seed {self.seed} on disk")

    def front(self, *, watched: bool) -> Front:
        return front(self.out, cds=self.cds, rds=self.rds, name=self.route_name, watched=watched)

    def arguments(self, tmp_path: Path) -> tuple[str, ...]:
        return ("--watch", *self.options, "--output-dir", str(self.out))


class Json(Scene):
    """The world as one ConfigMap in JSON."""

    def files(self, world: World) -> dict[str, str]:
        return as_json(world, self.out, checked=self.checked)

    def set(self, world: World) -> None:
        gone = self.files(self.world).keys() - self.files(world).keys()
        self.client.configmap("demo", NAME, {**dict.fromkeys(gone), **self.files(world)})
        self.world = world

    def change(self) -> None:
        """Mostly one after the other, sometimes the next while steps of this one still wait."""
        super().change()
        if self.rng.random() < 0.8:
            self.settle()
        else:
            time.sleep(self.rng.random() * 0.15)


class Yaml(Json):
    """The same in block YAML: in one change clusters either come or go."""

    def begin(self) -> None:
        self.set(first(self.rng, self.ports, eds=False))

    def files(self, world: World) -> dict[str, str]:
        return as_yaml(world, self.out)

    def next(self) -> World:
        if len(self.world.clusters) > 4:
            return less(self.world, self.rng)
        return more(self.world, self.serial, self.rng, self.ports)

    def change(self) -> None:
        super().change()
        self.settle()


class Services(Scene):
    """The world as Services; what comes is up before it is routed to."""

    cds, rds, route_name = "cds.json", "rds.json", "services"
    host = HOST
    options = ("--services", "app=shop", "--format", "json")

    def name_of(self, name: str) -> str:
        return f"demo/{name}/http"

    def begin(self) -> None:
        self.shop = Shop(self.api, self.client)
        self.world = first(self.rng, self.ports, eds=False)
        self.shop.prepare(self.world)
        self.shop.switch(self.world)
        self.shop.tidy(self.world)

    def next(self) -> World:
        return changed(self.world, self.serial, self.rng, self.ports, eds=False)

    def set(self, world: World) -> None:
        self.shop.prepare(world)
        coming = set(map(self.name_of, world.clusters))
        wait_until(lambda: coming <= populated(snapshot(self.out), self.cds), 20, "endpoints")
        self.shop.switch(world)
        self.world = world
        self.settle()
        self.shop.tidy(world)

    def arguments(self, tmp_path: Path) -> tuple[str, ...]:
        """A few clusters on EDS, the rest inline."""
        base = {"connect_timeout": "1s", **({"health_checks": [CHECKS]} if self.checked else {})}
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"cluster": {"base": base}, "endpoint": {"eds_budget": 2}}))
        return (*super().arguments(tmp_path), "--config", str(path))


KINDS = {"json": Json, "yaml": Yaml, "services": Services}


def loaded(
    scene: Scene, fronts: Sequence[Front], changes: int, *, stall: float = math.inf
) -> Total:
    """Change after change under load; again where an Envoy stalled longer than is waited for it."""
    for _ in range(3):
        total = once_loaded(scene, fronts, changes)
        if not total.failed or total.stall < stall:
            break
    else:
        pytest.skip(f"this machine is too busy: {total}")
    return total


def once_loaded(scene: Scene, fronts: Sequence[Front], changes: int) -> Total:
    connections = 24 // len(fronts)
    ports, admins = [each.port for each in fronts], [each.admin_url for each in fronts]
    with Load(ports, host=scene.host, connections=connections, admins=admins) as load:
        time.sleep(0.2)
        for _ in range(changes):
            scene.change()
        scene.settle()
        time.sleep(0.2)
        total = load.stop()
    print(f"{type(scene).__name__}: {changes} changes, {len(fronts)} Envoys: {total}")
    if total.failed:
        print("\n".join(f"{i}: {each.failed()}" for i, each in enumerate(fronts)))
    return total


def assert_none_failed(total: Total, scene: Scene, loader: Loader) -> None:
    warnings = [line for line in loader.lines if "confirmed=yes" not in line]
    assert total.failed == 0, "\n".join([f"{total}, seed {scene.seed}", *warnings[-30:]])
    assert total.rate > 500  # load, even on a machine that is busy


def assert_served(envoy: Envoy, scene: Scene) -> None:
    """Envoy has the clusters of the world, and refused nothing on the way."""
    wanted = set(map(scene.name_of, scene.world.clusters))
    wait_until(lambda: set(envoy.clusters()) == wanted, 5, f"{sorted(wanted)} in Envoy")
    stats = envoy.stats(r"update_(rejected|failure)$")
    assert not any(stats.values()), {name: value for name, value in stats.items() if value}


# ---------------------------------------------------------------------------------------------
# Without --envoy-admin there is a pause between the steps; six Envoys can read one directory


@pytest.mark.parametrize("kind", KINDS)
def test_no_request_is_lost_without_asking_envoy(
    kind: str,
    api: ApiServer,
    client: Client,
    out: Path,
    tmp_path: Path,
    upstreams: Upstreams,
    start_loader: StartLoader,
    start_envoy: StartEnvoy,
) -> None:
    scene = KINDS[kind](1, api, client, out, upstreams.ports)
    scene.begin()
    loader = start_loader(*scene.arguments(tmp_path), "--step-delay", f"{STEP_DELAY}s")
    scene.settle()
    fronts = [scene.front(watched=i % 2 == 0) for i in range(6)]
    envoys = [start_envoy(each.config, args=FLUSH) for each in fronts]
    total = loaded(scene, fronts, CHANGES // 3, stall=STEP_DELAY * 0.8)
    assert_none_failed(total, scene, loader)
    for envoy in envoys:
        assert_served(envoy, scene)
    wait_converged(out)


# ---------------------------------------------------------------------------------------------
# With --envoy-admin each Envoy has a loader beside it, and clusters that warm are awaited


@pytest.mark.parametrize("watched", [False, True], ids=["path", "watched_directory"])
@pytest.mark.parametrize("kind", ["json", "services"])
def test_no_request_is_lost_when_envoy_is_asked(
    kind: str,
    watched: bool,
    api: ApiServer,
    client: Client,
    out: Path,
    tmp_path: Path,
    upstreams: Upstreams,
    start_loader: StartLoader,
    start_envoy: StartEnvoy,
) -> None:
    for seed in (1, 2):
        scene = KINDS[kind](seed, api, client, out / str(seed), upstreams.ports)
        scene.checked = True
        scene.begin()
        one = scene.front(watched=watched)
        loader = start_loader(*scene.arguments(tmp_path), "--envoy-admin", one.admin_url)
        scene.settle()
        envoy = start_envoy(one.config, args=FLUSH)
        loader.wait_log(r" answers")
        total = loaded(scene, [one], CHANGES, stall=ANSWER_BOUND * 0.8)
        assert_none_failed(total, scene, loader)
        assert_served(envoy, scene)
        wait_converged(scene.out)
        assert not loader.count_log("Envoy refuses"), loader.log
        loader.stop()
        envoy.stop()
        if isinstance(scene, Services):
            scene.shop.close()


# ---------------------------------------------------------------------------------------------
# The test of the tests


@pytest.mark.parametrize("kind", ["json", "services"])
def test_without_order_requests_are_lost(
    kind: str,
    api: ApiServer,
    client: Client,
    out: Path,
    tmp_path: Path,
    token_file: Path,
    upstreams: Upstreams,
    start_envoy: StartEnvoy,
) -> None:
    scene = KINDS[kind](1, api, client, out, upstreams.ports)
    scene.begin()
    unordered = str(ROOT / "tests/support/unordered.py")
    common = ("--namespace", "demo", "--token-file", str(token_file), "--apiserver", api.url)
    prefix = [*COMMAND[:-1], unordered]
    with Loader([*common, *scene.arguments(tmp_path)], prefix=prefix):
        scene.settle()
        fronts = [scene.front(watched=i % 2 == 0) for i in range(6)]
        for each in fronts:
            start_envoy(each.config, args=FLUSH)
        total = loaded(scene, fronts, max(CHANGES // 2, 10))
    assert total.failed > 0

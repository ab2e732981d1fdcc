"""Worlds that change under load, the Envoys that serve them, and what befalls these and the loader.

A Scene asks for one world after another; `loaded` counts the requests that fail meanwhile. A Trial
has one Envoy and one loader, either of which is killed, stopped or silenced within a step.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.admin import Relay
from tests.support.apiserver import ApiServer, Client
from tests.support.busy import REASON
from tests.support.envoy import Envoy
from tests.support.loader import Loader, snapshot, wait_until
from tests.support.long import LONG
from tests.support.ports import held_port
from tests.support.steady import Front, Load, Total, front
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

NAME = "envoy-xds"


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


KINDS: dict[str, type[Scene]] = {"json": Json, "yaml": Yaml, "services": Services}


def loaded(
    scene: Scene, fronts: Sequence[Front], changes: int, *, stall: float = math.inf
) -> Total:
    """Change after change under load; again where an Envoy stalled longer than is waited for it."""
    for _ in range(3):
        total = once_loaded(scene, fronts, changes)
        if not total.failed or total.stall < stall:
            break
    else:
        pytest.skip(f"{REASON}: {total}")
    return total


def once_loaded(scene: Scene, fronts: Sequence[Front], changes: int) -> Total:
    connections = 24 // len(fronts)
    ports, admins = [each.port for each in fronts], [each.admin_url for each in fronts]
    # A stall of Envoy is no loss: the answer comes.
    with Load(
        ports, host=scene.host, connections=connections, admins=admins, timeout=30
    ) as load:
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
    warnings = [line for line in loader.lines if "ack=yes" not in line]
    assert total.failed == 0, "\n".join([f"{total}, seed {scene.seed}", *warnings[-30:]])
    assert total.rate > 500  # load, even on a machine that is busy


def assert_served(envoy: Envoy, scene: Scene) -> None:
    """Envoy has the clusters of the world, and refused nothing on the way."""
    wanted = set(map(scene.name_of, scene.world.clusters))
    wait_until(lambda: set(envoy.clusters()) == wanted, 5, f"{sorted(wanted)} in Envoy")
    stats = envoy.stats(r"update_(rejected|failure)$")
    assert not any(stats.values()), {name: value for name, value in stats.items() if value}


# ---------------------------------------------------------------------------------------------
# What befalls an Envoy and its loader


STEPS = ("children", "clusters", "references", "removals")
ACKED = {"acked", "unread"}  # in /snapshot
SILENCE = (0.3, 1.2, 2.5, 6.0) if LONG else (0.3, 2.5)  # seconds


class Trial:
    """One Envoy, the loader that asks it, and load; see FAULTS for what happens to them."""

    def __init__(
        self,
        scene: Scene,
        home: Path,
        token_file: Path,
        *,
        watched: bool,
        binary: str = "",
        relayed: bool = False,
    ) -> None:
        """`relayed`: the loader asks through a relay, so that Envoy can fall silent."""
        self.scene = scene
        self.front = scene.front(watched=watched)
        self.stack = contextlib.ExitStack()
        self.relay: Relay | None = None
        self.port = held_port()
        self.options = [
            *("--namespace", "demo", "--apiserver", scene.api.url),
            *("--token-file", str(token_file), *scene.arguments(home)),
            *("--envoy-admin", self.front.admin_url, "--listen", f"127.0.0.1:{self.port}"),
        ]
        if relayed:
            # Not always: in its place a dead Envoy accepts connections, and ends them.
            self.relay = Relay(self.front.admin_url)
            self.stack.callback(self.relay.close)
            self.options += ["--envoy-admin", self.relay.url]
        self.envoy = Envoy(self.front.config, home / "envoy", start=False, binary=binary)
        self.stack.callback(self.envoy.stop)
        self.loader = self.new_loader()

    def new_loader(self) -> Loader:
        loader = Loader(self.options)
        self.stack.callback(loader.kill)
        return loader

    def begin(self) -> None:
        """All that is published is served and ACKed."""
        self.scene.settle()
        self.envoy.start()
        self.await_acked()

    def states(self) -> Mapping[str, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            connection.request("GET", "/snapshot")
            rows = json.loads(connection.getresponse().read())["files"]
            return {row["path"]: row["state"] for row in rows}
        return {}

    def await_acked(self) -> None:
        def acked() -> bool:
            found = self.states()
            return bool(found) and set(found.values()) <= ACKED

        wait_until(acked, 30, f"everything ACKed, not {self.states()}")

    def befall(self, fault: Callable[[Trial], None]) -> str:
        """A change, and a fault in it: at a random moment, or as soon as one step is published."""
        rng = self.scene.rng
        step = rng.choice(("", *STEPS))
        since = len(self.loader.lines)
        with ThreadPoolExecutor(1) as pool:
            change = pool.submit(self.scene.change)
            if step:
                self._await_step(step, since)
            else:
                time.sleep(rng.random() * 0.04)
            fault(self)
            change.result(90)
        self.scene.settle()
        self.await_acked()
        return step or "any"

    def _await_step(self, step: str, since: int) -> None:
        """A change does not have each of the steps: not for long."""
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            if any(f"step={step}" in line for line in self.loader.lines[since:]):
                return
            time.sleep(0.001)

    def run(self, fault: Callable[[Trial], None], count: int) -> Total:
        """`count` changes under load, each with the fault."""
        with Load([self.front.port], host=self.scene.host, connections=4, timeout=30) as load:
            time.sleep(0.2)
            for _ in range(count):
                self.befall(fault)
            time.sleep(0.2)
            total = load.stop()
        print(f"{type(self.scene).__name__}: {fault.__name__} x {count}: {total}")
        if total.failed:
            print(self.front.failed())
        return total

    # -- faults

    def silence(self) -> float:
        return self.scene.rng.choice(SILENCE)

    def envoy_is_stopped(self) -> None:
        with self.envoy.paused():
            time.sleep(self.silence())

    def envoy_is_silent(self) -> None:
        assert self.relay is not None
        with self.relay.silent():
            time.sleep(self.silence())

    def envoy_is_killed(self) -> None:
        self.envoy.restart(kill=True)

    def loader_is_killed(self) -> None:
        self.loader.kill()
        self.loader = self.new_loader()

    def loader_is_ended(self) -> None:
        self.loader.stop()
        self.loader = self.new_loader()

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note("the loader's log:\n" + "\n".join(self.loader.lines[-40:]))
            error.add_note(f"Envoy's log:\n{self.envoy.log_tail(10)}"[-3000:])
        self.stack.close()
        if isinstance(self.scene, Services):
            self.scene.shop.close()


FAULTS = {
    "a stopped Envoy": Trial.envoy_is_stopped,
    "a silent Envoy": Trial.envoy_is_silent,
    "a killed Envoy": Trial.envoy_is_killed,
    "a killed loader": Trial.loader_is_killed,
    "a loader that ends": Trial.loader_is_ended,
}

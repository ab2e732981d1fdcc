"""Random changes that add, remove, replace and re-route clusters at once, in three forms.

A World is what somebody wants to be served; `changed` gives the next one from a seeded generator.
It can be written as ConfigMap files (JSON, or block YAML) or as Services with their slices.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.support.apiserver import ApiServer, Client
from tests.support.envoy import (
    Config,
    assignment,
    cluster,
    eds_cluster,
    file_source,
    response,
    route_config,
)

HOST = "shop.example"
CHECKS = {  # a connection is enough; the first check follows at once
    "timeout": "1s",
    "interval": "5s",
    "unhealthy_threshold": 3,
    "healthy_threshold": 1,
    "tcp_health_check": {},
}


class Spec(NamedTuple):
    """One cluster: where it leads, and how Envoy learns its endpoint."""

    port: int
    eds: bool = False


class World(NamedTuple):
    clusters: Mapping[str, Spec]
    weights: Mapping[str, int]  # of the clusters that are routed to


MOST, MOST_EDS = 6, 2  # every EDS cluster costs each Envoy an inotify instance


def some(rng: random.Random, names: list[str], least: int) -> list[str]:
    return sorted(rng.sample(names, rng.randint(least, len(names))))


def first(rng: random.Random, ports: list[int], *, eds: bool = True) -> World:
    clusters = {f"c0-{i}": Spec(rng.choice(ports), eds and i == 0) for i in range(3)}
    return World(clusters, dict.fromkeys(clusters, 1))


def changed(
    world: World, serial: int, rng: random.Random, ports: list[int], *, eds: bool = True
) -> World:
    """Some clusters go, at least one that is routed to; some come; the routes follow.

    Of those that stay one may lead elsewhere.
    """
    names = sorted(world.clusters)
    gone = {rng.choice(sorted(world.weights)), *some(rng, names, 0)}
    stay = {name: world.clusters[name] for name in names if name not in gone}
    if stay and rng.random() < 0.6:
        one = rng.choice(sorted(stay))
        stay[one] = stay[one]._replace(port=rng.choice(ports))
    come: dict[str, Spec] = {}
    for i in range(rng.randint(1, max(1, MOST - len(stay)))):
        used = sum(spec.eds for spec in (*stay.values(), *come.values()))
        come[f"c{serial}-{i}"] = Spec(
            rng.choice(ports), eds and used < MOST_EDS and rng.random() < 0.5
        )
    routed = {rng.choice(sorted(come)), *some(rng, sorted({**stay, **come}), 0)}
    weights = {name: rng.randint(1, 9) for name in sorted(routed)}
    return World({**stay, **come}, weights)


def more(world: World, serial: int, rng: random.Random, ports: list[int]) -> World:
    """Clusters come and are routed to, none goes."""
    come = {f"c{serial}-{i}": Spec(rng.choice(ports)) for i in range(rng.randint(1, 3))}
    clusters = {**world.clusters, **come}
    routed = {rng.choice(sorted(come)), *some(rng, sorted(clusters), 0)}
    return World(clusters, {name: rng.randint(1, 9) for name in sorted(routed)})


def less(world: World, rng: random.Random) -> World:
    """Clusters that are routed to go, none comes."""
    names = sorted(world.clusters)
    stay = sorted(rng.sample(names, rng.randint(1, len(names) - 1)))
    weights = {name: rng.randint(1, 9) for name in some(rng, stay, 1)}
    return World({name: world.clusters[name] for name in stay}, weights)


# ---------------------------------------------------------------------------------------------
# As files of a ConfigMap


def resource(name: str, spec: Spec, out: Path, more: Config) -> Config:
    if spec.eds:
        return eds_cluster(name, file_source(out / "current" / f"eds-{name}.json"), **more)
    return cluster(name, spec.port, **more)


def as_json(world: World, out: Path, *, checked: bool = False) -> dict[str, str]:
    """cds.yaml and rds.yaml (JSON within YAML, as many keep it) and a file for each EDS cluster."""
    options: Config = {"health_checks": [CHECKS]} if checked else {}
    clusters = [resource(name, spec, out, options) for name, spec in world.clusters.items()]
    files = {
        "cds.yaml": response("cluster", *clusters),
        "rds.yaml": response("routes", route_config(world.weights)),
    }
    for name, spec in world.clusters.items():
        if spec.eds:
            files[f"eds-{name}.json"] = response("assignment", assignment(name, spec.port))
    return files


def as_yaml(world: World, out: Path) -> dict[str, str]:
    """cds.yaml and rds.yaml in block style."""
    files = as_json(world, out)
    return {name: yaml.safe_dump(json.loads(text), sort_keys=False) for name, text in files.items()}


# ---------------------------------------------------------------------------------------------
# As Services

ANNOTATION = "xds-loader/"
MERGE = "application/merge-patch+json"


def route_annotations(weight: int | None) -> dict[str, str | None]:
    """The annotations of a Service that is routed to, or (null) those to take away."""
    if weight is None:
        return {f"{ANNOTATION}hosts": None, f"{ANNOTATION}weight": None}
    return {f"{ANNOTATION}hosts": HOST, f"{ANNOTATION}weight": str(weight)}


class Shop:
    """A World as Services of one namespace; changed as `kubectl` would do it."""

    def __init__(self, api: ApiServer, client: Client, namespace: str = "demo") -> None:
        self.api = api
        self.client = client
        self.namespace = namespace
        self.world = World({}, {})

    def prepare(self, wanted: World) -> None:
        """Endpoints and Services that come: not routed to yet, as nobody routes to what is not up.

        A Service that stays and leads elsewhere gets its other endpoint.
        """
        for name, spec in wanted.clusters.items():
            if self.world.clusters.get(name) != spec:
                ports = [{"name": "http", "port": spec.port, "protocol": "TCP"}]
                self.api.endpointslice(self.namespace, f"{name}-x", name, ["127.0.0.1"], ports)
            if name not in self.world.clusters:
                ports = [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]
                self.api.service(self.namespace, name, ports, {"app": "shop"})

    def switch(self, wanted: World) -> None:
        """Routes to what came, then none to what goes, which is deleted: one call after another."""
        for name, weight in wanted.weights.items():
            if self.world.weights.get(name) != weight:
                self.annotate(name, weight)
        for name in self.world.clusters.keys() - wanted.clusters.keys():
            self.api.delete("Service", self.namespace, name)
        for name in self.world.weights.keys() - wanted.weights.keys():
            if name in wanted.clusters:
                self.annotate(name, None)

    def tidy(self, wanted: World) -> None:
        """The slices of Services that went are collected some time later."""
        for name in self.world.clusters.keys() - wanted.clusters.keys():
            self.api.delete("EndpointSlice", self.namespace, f"{name}-x")
        self.world = wanted

    def close(self) -> None:
        """Nothing is there any more; whoever watches is gone."""
        for name in self.world.clusters:
            self.api.delete("Service", self.namespace, name)
            self.api.delete("EndpointSlice", self.namespace, f"{name}-x")

    def annotate(self, name: str, weight: int | None) -> None:
        patch = {"metadata": {"annotations": route_annotations(weight)}}
        path = f"/api/v1/namespaces/{self.namespace}/services/{name}"
        status, answer = self.client.request("PATCH", path, patch, MERGE)
        assert status == 200, answer


def populated(files: Mapping[str, bytes], cds: str) -> set[str]:
    """The clusters that have endpoints, inline or in an EDS file."""
    found = set()
    for one in json.loads(files.get(cds, b'{"resources":[]}'))["resources"]:
        given = one.get("load_assignment")
        if given is None:
            path = one["eds_cluster_config"]["eds_config"]["path_config_source"]["path"]
            content = files.get(path.rpartition("/current/")[2], b'{"resources":[{}]}')
            given = json.loads(content)["resources"][0]
        if given.get("endpoints"):
            found.add(one["name"])
    return found


def served(files: Mapping[str, bytes], cds: str, rds: str) -> tuple[set[str], dict[str, int]]:
    """The clusters of a CDS file and the weights of a RDS file."""

    def resources(name: str) -> list[dict[str, Any]]:
        content = files.get(name, b"{}")
        found = yaml.safe_load(content) if not content.startswith(b"{") else json.loads(content)
        return list(found.get("resources", []))

    weights: dict[str, int] = {}
    for one in resources(rds):
        for host in one.get("virtual_hosts", []):
            for route in host.get("routes", []):
                action = route["route"]
                if "cluster" in action:
                    weights[action["cluster"]] = 1
                for share in action.get("weighted_clusters", {}).get("clusters", []):
                    weights[share["name"]] = share["weight"]
    return {one["name"] for one in resources(cds)}, weights

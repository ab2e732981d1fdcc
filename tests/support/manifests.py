"""Kubernetes objects as tests look at them: rendered by Helm, checked, and resolved to commands."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.support.chart_docs import CHART

Object = dict[str, Any]
VERSIONS = [f"1.{minor}" for minor in range(29, 37)]
CUSTOM = {"PodMonitor", "ServiceMonitor", "PrometheusRule"}
WORKLOADS = {"Deployment", "DaemonSet"}
IMAGE = "registry.example/envoy-xds-configmap-loader"


class Release(NamedTuple):
    """What one `helm template` gives: the objects in order, and the notes."""

    objects: list[Object]
    notes: str

    def all(self, kind: str) -> list[Object]:
        return [obj for obj in self.objects if obj["kind"] == kind]

    def one(self, kind: str, name: str = "") -> Object:
        return only(self.objects, kind, name)

    @property
    def workload(self) -> Object:
        return only([obj for obj in self.objects if obj["kind"] in WORKLOADS])

    @property
    def pod(self) -> Object:
        spec: Object = self.workload["spec"]["template"]["spec"]
        return spec


def only(objects: list[Object], kind: str = "", name: str = "") -> Object:
    """The one object of this kind whose name ends with `name`."""
    found = [
        obj
        for obj in objects
        if kind in ("", obj["kind"]) and obj["metadata"]["name"].endswith(name)
    ]
    assert len(found) == 1, f"{len(found)} objects {kind} *{name}"
    return found[0]


def load_values(name: str) -> Object:
    """The values of one file in the chart's ci/."""
    values: Object = yaml.safe_load((CHART / "ci" / name).read_text())
    return values


def render(
    values: Mapping[str, Any] | None = None,
    name: str = "edge",
    namespace: str = "shop",
    chart: Path = CHART,
) -> Release:
    """`helm template`, schema included; helm.HelmError says what is wrong with the values.

    The loader's image, which every release must name, is added where the values have none.
    """
    given = dict(values or {})
    if chart == CHART:
        loader = given.get("loader", {})
        given["loader"] = {**loader, "image": {"repository": IMAGE, **loader.get("image", {})}}
    return copy.deepcopy(_rendered(json.dumps(given), name, namespace, chart))


@functools.lru_cache(50)
def _rendered(values: str, name: str, namespace: str, chart: Path) -> Release:
    import helm_python as helm  # the examples use this module too, and run without Helm

    given = json.loads(values)
    with helm.Chart.load(chart) as loaded:
        loaded.validate_schema(given)
        files = loaded.render(given, name=name, namespace=namespace)
    notes = next((text for path, text in files.items() if path.endswith("NOTES.txt")), "")
    objects = [
        obj
        for path, text in files.items()
        if path.endswith(".yaml")
        for obj in yaml.safe_load_all(text)
        if obj
    ]
    return Release(objects, notes)


def validate(obj: Object, version: str) -> None:
    """Raises when this version of Kubernetes rejects `obj`, for unknown fields as well."""
    if obj["kind"] not in CUSTOM:
        _validator()(obj, version, strict=True)


@functools.cache
def _validator() -> Callable[..., object]:
    import kubernetes_validate.utils as library

    # Else it reads a megabyte of schemas for each object.
    library.schema_contents = functools.cache(library.schema_contents)
    library.all_versions = functools.cache(library.all_versions)
    validate: Callable[..., object] = library.validate
    return validate


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def restricted(pod: Object) -> Iterator[str]:
    """What keeps a pod from the restricted Pod Security Standard (1.29 to 1.36)."""
    security = pod.get("securityContext", {})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield field
    if any(not {"configMap", "emptyDir", "projected", "secret"} & set(v) for v in pod["volumes"]):
        yield "a volume of another type"
    for container in containers(pod):
        own = container.get("securityContext", {})
        name = container["name"]
        both = {**security, **own}
        if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: privileges"
        if own.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{name}: capabilities"
        if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
            yield f"{name}: root"
        if both.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{name}: seccomp"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{name}: hostPort"


class Command(NamedTuple):
    """A container as a process: arguments and environment, as the kubelet resolves them."""

    args: list[str]
    env: dict[str, str]


def command(container: Object, fields: Mapping[str, str]) -> Command:
    """`fields`: what `fieldRef`s give, by field path. `$(NAME)` is replaced as Kubernetes does."""
    env: dict[str, str] = {}
    for entry in container.get("env", []):
        source = entry.get("valueFrom", {}).get("fieldRef")
        env[entry["name"]] = fields[source["fieldPath"]] if source else entry.get("value", "")

    def expand(text: str) -> str:
        return re.sub(r"\$\((\w+)\)", lambda found: env.get(found[1], found[0]), text)

    args = [*container.get("command", []), *container.get("args", [])]
    return Command([expand(arg) for arg in args], env)

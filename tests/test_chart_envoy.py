"""What the chart and the sidecar example render, started: the real Envoy and the loader."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import pytest

from tests.support.backend import Backends
from tests.support.chart_docs import CHART
from tests.support.loader import wait_until
from tests.support.manifests import Object, Release, load_values, render
from tests.support.pod import Pod, get
from tests.support.tls import Authority
from tests.test_chart import CI
from tests.test_example_sidecar import kustomize, plain

pytestmark = pytest.mark.envoy


def names_of(pod: Pod, count: int, host: str = "", path: str = "/") -> Counter[str]:
    """Which backends answered `count` requests."""
    answers = [pod.get(path, host) for _ in range(count)]
    assert {answer.status for answer in answers} == {200}, answers
    return Counter(answer.body.strip() for answer in answers)


def states(pod: Pod) -> set[str]:
    """What the loader knows of its files: "confirmed" is Envoy's word."""
    body = json.loads(get(pod.ports[9902], "/snapshot").body)
    return {file["state"] for file in body["files"]}


def weights(backends: Backends, stable: int, canary: int) -> Object:
    def backend(name: str, weight: int) -> Object:
        return {"address": "127.0.0.1", "port": backends[name], "weight": weight}

    chosen = {"stable": backend("stable", stable), "canary": backend("canary", canary)}
    return {"upstreams": {"web": {"domains": ["web.example"], "backends": chosen}}}


@pytest.mark.parametrize("native", [False, True])
def test_traffic_flows_and_weights_move_it(
    native: bool, tmp_path: Path, authority: Authority
) -> None:
    with Backends("stable", "canary") as backends:
        values = {"nativeSidecar": native, **weights(backends, 100, 0)}
        with Pod(render(values), tmp_path, authority) as pod:
            assert pod.envoy is not None
            before = pod.envoy.pid
            assert names_of(pod, 20, "web.example") == {"stable": 20}
            assert pod.get(host="other.example").status == 404
            pod.apply(render({**values, **weights(backends, 0, 100)}))
            wait_until(lambda: names_of(pod, 1, "web.example") == {"canary": 1})
            assert names_of(pod, 20, "web.example") == {"canary": 20}
            wait_until(lambda: states(pod) == {"confirmed"})
            assert pod.envoy.pid == before
            assert pod.envoy.poll() is None


def test_discovered_services(tmp_path: Path, authority: Authority) -> None:
    values = load_values("services-nodes-values.yaml")
    with Backends("one", "two") as backends:
        pod = Pod(render(values), tmp_path, authority)
        pod.api.node("node-a", {"topology.kubernetes.io/region": "eu", ZONE: "a"})
        port = {"name": "http", "port": 80, "protocol": "TCP"}
        pod.api.service("shop", "web", [port], annotations={"xds-loader/hosts": "web.example"})
        target = {**port, "port": backends["one"]}
        pod.api.endpointslice("shop", "web-1", "web", ["127.0.0.1"], [target])
        with pod:
            assert names_of(pod, 5, "web.example") == {"one": 5}
            target = {**port, "port": backends["two"]}
            pod.api.endpointslice("shop", "web-1", "web", ["127.0.0.1"], [target])
            wait_until(lambda: names_of(pod, 1, "web.example") == {"two": 1})


@pytest.mark.parametrize("name", CI)
def test_each_file_of_the_matrix_comes_up(name: str, tmp_path: Path, authority: Authority) -> None:
    """With the rights it renders and no other; `Pod` waits for every probe."""
    files = render({}).one("ConfigMap", "-xds")["data"]
    pod = Pod(render(load_values(name)), tmp_path, authority)
    for existing, namespace in (("envoy-xds", "shop"), ("envoy-xds-more", "shop")):
        data = {"more.txt": "x"} if existing.endswith("more") else files
        mapped = {key: pod.map(text) for key, text in data.items()}
        pod.api.configmap(namespace, existing, mapped)
    pod.api.configmap("shop", "flags", {"flag": "1"})
    pod.api.configmap("shop", "selected", {"more.txt": "x"}, labels={"xds": "edge"})
    own = authority.pair("web.example")
    tls = {"tls.crt": own.cert.read_bytes(), "tls.key": own.key.read_bytes()}
    for namespace in ("shop", "payments"):
        pod.api.secret(namespace, "web-tls", tls, type="kubernetes.io/tls")
    pod.api.node("node-a", {ZONE: "a"})
    with pod:
        assert pod.api.requests.matching(lambda request: request.status == 403) == []
        assert pod.loader is not None
        pod.loader.stop()


ZONE = "topology.kubernetes.io/zone"


@pytest.mark.parametrize("native", [False, True])
def test_drain(native: bool, tmp_path: Path, authority: Authority) -> None:
    with Pod(render({"nativeSidecar": native}), tmp_path, authority) as pod:
        ready = pod.ports[9903]
        assert get(ready, "/ready").status == 200
        assert pod.get().connection == ""
        assert get(ready, "/quitquitquit").status == 404, "no way to the admin interface"
        pod.pre_stop(pod.loader_container())
        assert get(ready, "/ready").status == 503
        assert pod.get().connection == "close"
        assert pod.get().status == 404, "it still takes new connections and answers"
        assert pod.loader is not None
        pod.loader.stop()


def test_the_sidecar_example(tmp_path: Path, authority: Authority) -> None:
    for name, release in (("kustomize", kustomize()), ("plain", plain())):
        with Backends("app") as backends:
            pod = Pod(release, tmp_path / name, authority, namespace="web")
            pod.ports[8080] = backends["app"]
            pod.apply(release)
            with pod:
                assert names_of(pod, 5) == {"app": 5}
                config = pod.api.get("ConfigMap", "web", "envoy-xds")
                assert config is not None
                routes = config["data"]["rds.yaml"].replace(
                    "route: {cluster: app, timeout: 10s}", "direct_response: {status: 418}"
                )
                pod.api.put({**config, "data": {**config["data"], "rds.yaml": routes}})
                wait_until(lambda pod=pod: pod.get().status == 418)  # type: ignore[misc]
                pod.pre_stop(pod.loader_container())
                assert get(pod.ports[9903], "/ready").status == 503


# ---------------------------------------------------------------------------------------------
# Dashboard and alerts, against what is really served

TARGET = {"namespace", "pod", "job", "container"}  # Prometheus adds these to each target


def expressions(release: Release) -> Iterator[tuple[str, str]]:
    """Every PromQL expression with what it belongs to; Grafana's variables filled in."""
    dashboard = json.loads(next(iter(release.one("ConfigMap", "-dashboard")["data"].values())))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"].replace("$__rate_interval", "5m")
            yield panel["title"], text.replace("$namespace", "shop").replace("$pod", ".*")
    (group,) = release.one("PrometheusRule")["spec"]["groups"]
    for rule in group["rules"]:
        yield rule["alert"], rule["expr"]


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """Each metric of an expression, with the labels it is selected or grouped by."""
    found: list[tuple[str, set[str]]] = []

    def visit(node: promql_parser.Expr, grouped: frozenset[str]) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            used = {matcher.name for matcher in node.matchers.matchers}
            found.append((node.name or "", (used | grouped) - TARGET))
        elif isinstance(node, promql_parser.MatrixSelector):
            visit(node.vector_selector, grouped)
        elif isinstance(node, promql_parser.AggregateExpr):
            labels = node.modifier.labels if node.modifier else []
            visit(node.expr, frozenset(labels))
        elif isinstance(node, promql_parser.BinaryExpr):
            visit(node.lhs, grouped)
            visit(node.rhs, grouped)
        elif isinstance(node, promql_parser.Call):
            for argument in node.args:
                visit(argument, grouped)
        elif isinstance(node, promql_parser.ParenExpr | promql_parser.UnaryExpr):
            visit(node.expr, grouped)

    visit(promql_parser.parse(expression), frozenset())
    return found


LOADER_LABELS = {
    "xds_loader_publications_total": {"step"},
    "xds_loader_published_files_total": set(),
    "xds_loader_publication_duration_seconds_bucket": {"le"},
    "xds_loader_confirmation_duration_seconds_bucket": {"le"},
    "xds_loader_rejections_total": {"type"},
    "xds_loader_refused_files": {"file"},
    "xds_loader_source_last_event_timestamp_seconds": {"source"},
    "xds_loader_source_synced": {"source"},
    "xds_loader_watch_restarts_total": {"source", "reason"},
    "xds_loader_api_requests_total": {"code", "verb"},
    "xds_loader_errors_total": {"kind"},
    "xds_loader_clusters": {"endpoints"},
    "xds_loader_inotify_instances_budget": set(),
    "xds_loader_inotify_instances_used": set(),
    "xds_loader_snapshot_info": {"version"},
    "xds_loader_snapshot_timestamp_seconds": set(),
    "xds_loader_certificate_expiry_timestamp_seconds": {"secret"},
    "xds_loader_info": {"version"},
    "process_resident_memory_bytes": set(),
    "process_cpu_seconds_total": set(),
}


def served(text: str) -> dict[str, set[str]]:
    """Each series of an exposition with its labels; a family without one has none yet."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.split()[2:4]
            found.setdefault(f"{name}_bucket" if kind == "histogram" else name, set())
        elif series := re.match(r"(\w+)(?:\{(.*)\})? ", line):
            labels = re.findall(r'(\w+)="(?:[^"\\]|\\.)*"', series[2] or "")
            found.setdefault(series[1], set()).update(labels)
    return found


def test_every_expression_meets_what_is_served(tmp_path: Path, authority: Authority) -> None:
    values = load_values("monitoring-values.yaml")
    values["metrics"]["prometheusRule"].update(disabled=[], additionalRules=[])
    with Backends("stable", "canary") as backends:
        values.update(weights(backends, 1, 1))
        with Pod(render(values), tmp_path, authority) as pod:
            names_of(pod, 5, "web.example")
            loader = served(get(pod.ports[9902], "/metrics").body)
            envoy = served(get(pod.ports[9903], "/stats/prometheus").body)
            everything = list(expressions(render(values)))
            assert len(everything) > 40
            for where, expression in everything:
                for name, labels in selectors(expression):
                    if name in LOADER_LABELS:
                        assert labels <= LOADER_LABELS[name], where
                        assert name in loader, f"{where}: {name} is not served by the loader"
                        assert not loader[name] or labels <= loader[name], where
                    else:
                        assert name in envoy, f"{where}: {name} is not served by Envoy"
                        assert labels <= envoy[name], f"{where}: {name} has {envoy[name]}"
    used = {name for _, expression in everything for name, _ in selectors(expression)}
    assert set(LOADER_LABELS) <= used, "the dashboard leaves out a metric of the loader"


def test_dashboard_and_package(tmp_path: Path) -> None:
    dashboard = json.loads((CHART / "dashboards" / f"{CHART.name}.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    assert all(p["title"] and "gridPos" in p for p in dashboard["panels"])

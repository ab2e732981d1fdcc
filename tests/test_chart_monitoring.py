"""Dashboard and alerts of the chart, against what loader and Envoy really serve."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import loader
from tests.support.backend import Backends
from tests.support.manifests import Release, load_values, render
from tests.support.pod import Pod
from tests.support.tls import Authority
from tests.test_chart_envoy import names_of

promql = pytest.importorskip("promql_parser", reason="pip install promql-parser")

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

    def visit(node: Any, grouped: frozenset[str]) -> None:
        if isinstance(node, promql.VectorSelector):
            used = {matcher.name for matcher in node.matchers.matchers}
            found.append((node.name or "", (used | grouped) - TARGET))
        elif isinstance(node, promql.MatrixSelector):
            visit(node.vector_selector, grouped)
        elif isinstance(node, promql.AggregateExpr):
            labels = node.modifier.labels if node.modifier else []
            visit(node.expr, frozenset(labels))
        elif isinstance(node, promql.BinaryExpr):
            visit(node.lhs, grouped)
            visit(node.rhs, grouped)
        elif isinstance(node, promql.Call):
            for argument in node.args:
                visit(argument, grouped)
        elif isinstance(node, promql.ParenExpr | promql.UnaryExpr):
            visit(node.expr, grouped)

    visit(promql.parse(expression), frozenset())
    return found


LOADER_LABELS = {
    f"{name}_bucket" if kind == "histogram" else name: (
        {*labels.split()} | ({"le"} if kind == "histogram" else set()))
    for name, kind, labels, _ in loader.METRICS
    if name != "process_start_time_seconds"
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


@pytest.mark.envoy
def test_every_expression_meets_what_is_served(tmp_path: Path, authority: Authority) -> None:
    values = load_values("monitoring-values.yaml")
    values["metrics"]["prometheusRule"].update(disabled=[], additionalRules=[])
    with Backends("stable", "canary") as backends:
        chosen = {name: {"address": "127.0.0.1", "port": backends[name]} for name in backends.ports}
        values["upstreams"] = {"web": {"domains": ["web.example"], "backends": chosen}}
        with Pod(render(values), tmp_path, authority) as pod:
            names_of(pod, 5, "web.example")
            own = served(pod.ask(9902, "/metrics").body)
            envoy = served(pod.ask(9903, "/stats/prometheus").body)
            everything = list(expressions(render(values)))
            assert len(everything) > 40
            for where, expression in everything:
                for name, labels in selectors(expression):
                    if name in LOADER_LABELS:
                        assert labels <= LOADER_LABELS[name], where
                        assert name in own, f"{where}: {name} is not served by the loader"
                        assert not own[name] or labels <= own[name], where
                    else:
                        assert name in envoy, f"{where}: {name} is not served by Envoy"
                        assert labels <= envoy[name], f"{where}: {name} has {envoy[name]}"
    used = {name for _, expression in everything for name, _ in selectors(expression)}
    assert set(LOADER_LABELS) <= used, "the dashboard leaves out a metric of the loader"


def alerts(values: dict[str, Any]) -> dict[str, Any]:
    metrics = {"prometheusRule": {"enabled": True}}
    (group,) = render({**values, "metrics": metrics}).one("PrometheusRule")["spec"]["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def test_pods_that_prefer_their_zone_differ_by_design() -> None:
    services = {"enabled": True, "selector": "*"}
    for zone, fires in ((True, False), (False, True), ("eu-1a", True)):
        config = {"endpoint": {"prefer_zone": zone}}
        found = alerts({"services": services, "config": config})
        assert ("XdsSnapshotsDiffer" in found) == fires


def test_the_alert_on_a_nack_names_where_the_reason_is() -> None:
    annotations = alerts({})["XdsFileNacked"]["annotations"]
    assert (
        "kubectl -n shop logs -l app.kubernetes.io/instance=edge -c loader"
        in (annotations["description"])
    )
    assert "/readyz" in annotations["description"]


def test_alerts_count_the_pods_of_their_own_release() -> None:
    (pods,) = set(re.findall(r'pod=~"([^"]+)"', json.dumps(alerts({})).replace('\\"', '"')))
    own = "edge-envoy-xds-configmap-loader"
    assert re.fullmatch(pods, f"{own}-5d4f6b7c9d-x2x4z")
    assert re.fullmatch(pods, f"{own}-x2x4z"), "of a DaemonSet"
    assert not re.fullmatch(pods, f"{own}-first-5d4f6b7c9d-x2x4z")

"""The mesh: five pods, each behind its own Envoy with a loader; traces and figures of all."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Envoys are started beside gRPC's threads; they do not need what gRPC does for a fork.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
os.environ["GRPC_VERBOSITY"] = "ERROR"

from example.mesh import apps
from example.support.cluster import Proxy
from example.support.pods import Request, Response, fetch
from example.support.story import Story, milliseconds

SERVICES = ("frontend", "order", "user", "item")
PODS = ("ingress", *SERVICES)
Spans = dict[str, list[dict[str, Any]]]


def sink(traces: Spans) -> Callable[[Request], Any]:
    """What Zipkin's collector is here: spans by the trace that they belong to."""

    async def take(request: Request) -> Response:
        for span in json.loads(request.body):
            traces.setdefault(span["traceId"], []).append(span)
        return Response(status=202)

    return take


def start_apps(story: Story) -> None:
    """The applications, each on its pod's port 8080."""
    cluster = story.cluster

    def outbound(name: str) -> apps.Outbound:
        made = apps.Outbound(f"{cluster.ip(name)}:15001", cluster.namespace)
        story.at_end(made.close)
        return made

    cluster.servers.serve(cluster.ip("frontend"), 8080, apps.frontend(outbound("frontend")))
    for name, answer in (
        ("user", apps.user),
        ("item", apps.item),
        ("order", apps.order(outbound("order"))),
    ):
        story.at_end(apps.grpc_server(name, f"{cluster.ip(name)}:8080", answer))


# ---------------------------------------------------------------------------------------------
# Prometheus


class Prometheus:
    """The real one, if it is here: on PATH, or beside Python, where make puts Debian's."""

    @staticmethod
    def path() -> str | None:
        places = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return shutil.which("prometheus", path=places)

    def __init__(self, root: Path, ip: str, proxies: list[Proxy]) -> None:
        jobs = [
            {"job_name": job, "metrics_path": path, "static_configs": [
                {"targets": [f"{p.ip}:{port}"], "labels": {"service": p.name}} for p in proxies
            ]}
            for job, path, port in (
                ("envoy", "/stats/prometheus", 9903), ("loader", "/metrics", 9902)
            )
        ]  # fmt: skip
        root.mkdir()
        (root / "config.yml").write_text(
            json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs})
        )
        self.url = f"http://{ip}:9090"
        self._process = subprocess.Popen(
            [self.path() or "", f"--config.file={root}/config.yml", "--log.level=error",
             f"--storage.tsdb.path={root}/db", f"--web.listen-address={ip}:9090"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each row."""
        answer = fetch(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
        if answer.status != 200:
            return []
        rows = answer.json()["data"]["result"]
        return [(row["metric"], float(row["value"][1])) for row in rows]

    def up(self) -> int:
        return sum(int(value) for _, value in self.ask("up"))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


def queries(readme: Path) -> list[tuple[str, str]]:
    """The PromQL of the README: what is asked (the comment), and the query."""
    blocks = re.findall(r"^```promql\n# (.*?)\n(.*?)^```", readme.read_text(), re.S | re.M)
    return [(what, " ".join(query.split())) for what, query in blocks]


def figures(story: Story, prometheus: Prometheus) -> None:
    story.title("What Prometheus answers, by service and cluster")
    for what, query in queries(story.folder / "README.md"):
        # A rate compares scrapes, and Envoy renews histograms every 5 s: the first know nothing.
        story.until(lambda q=query: len(known(prometheus.ask(q))) >= 4, what, 20)  # type: ignore[misc]
        rows = known(prometheus.ask(query))
        story.say(f"  {what}")
        for labels, value in sorted(rows, key=str):
            cluster = labels.get("envoy_cluster_name", "")
            story.say(f"    {labels.get('service', ''):<10} {cluster:<22} {value:10.1f}")
        story.claim(f"Prometheus: {what}", rows, f"{len(rows)} rows")


def known(rows: list[tuple[dict[str, str], float]]) -> list[tuple[dict[str, str], float]]:
    return [(labels, value) for labels, value in rows if value == value]  # not NaN


# ---------------------------------------------------------------------------------------------
# The story


def start(story: Story, traces: Spans) -> list[Proxy]:
    cluster = story.cluster
    cluster.servers.serve(cluster.ip("zipkin"), 9411, sink(traces))
    cluster.names["zipkin.demo.svc.cluster.local"] = cluster.ip("zipkin")
    story.kubectl("kubectl apply -k .")
    for name in SERVICES:
        cluster.join(name, cluster.ip(name))
    proxies = []
    for name in PODS:
        proxies.append(cluster.run(name))
        story.say(f"  {name}: Envoy and its loader run at {cluster.ip(name)}")
    start_apps(story)
    return proxies


def tracing(story: Story, traces: Spans) -> None:
    story.title("One request, as Envoy's tracers saw it")

    def whole() -> list[dict[str, Any]]:
        found = [spans for spans in traces.values() if len(spans) >= 8]
        return found[0] if found else []

    story.until(whole, "a whole trace")
    spans = sorted(whole(), key=lambda span: int(span["timestamp"]))
    begin = spans[0]["timestamp"]
    for span in spans:
        at, took = (span["timestamp"] - begin) / 1000, span["duration"] / 1000
        name = span["localEndpoint"]["serviceName"]
        story.say(f"  {at:6.1f} ms  {name:<9} {span['kind']:<7} {took:6.1f} ms  {span['name']}")
    seen = {span["localEndpoint"]["serviceName"] for span in spans}
    story.claim("one trace through all services", seen == set(PODS), f"{len(spans)} spans")


def another_pod(story: Story, proxies: list[Proxy]) -> None:
    story.title("Another pod of item")
    cluster = story.cluster
    story.at_end(apps.grpc_server("item", f"{cluster.ip('item-1')}:15006", apps.item))
    since = time.monotonic()
    cluster.join("item", cluster.ip("item-1"))
    members = "cluster.demo/item/grpc.membership_healthy"
    story.until(lambda: all(p.envoy.count(members) == 2 for p in proxies), "all Envoys know")
    took = milliseconds(time.monotonic() - since)
    story.claim("all five Envoys know a new pod", True, f"after {took}")
    story.say(f"  all five Envoys know it after {took}")


def tell(story: Story) -> None:
    traces: Spans = {}
    proxies = start(story, traces)
    url = proxies[0].url(10000, "/order/7")
    host = {"host": "shop.example"}
    story.until(lambda: fetch(url, headers=host).status == 200, "an order")
    story.say(f"  GET /order/7: {fetch(url, headers=host).body}")
    poller = story.load(url, host="shop.example", interval=0.02)
    prometheus = None
    if Prometheus.path():
        where = story.cluster.ip("prometheus")
        prometheus = Prometheus(story.root / "prometheus", where, proxies)
        story.at_end(prometheus.close)
    tracing(story, traces)
    another_pod(story, proxies)
    if prometheus is not None:
        story.until(lambda: prometheus.up() == 10, "Prometheus scrapes all", 20)
        story.claim("scraped: Envoys and loaders", True, "10 of 10")
        figures(story, prometheus)
    else:
        story.say("\nNo Prometheus here: apt-get install prometheus. The figures are skipped.")
    story.watch(lambda: [f"  {len(poller.answers)} requests, {len(poller.failed)} failed"])
    story.verdict([poller], proxies)
    story.play([
        f"curl -s -H 'Host: shop.example' {url}",
        f"{proxies[2].admin_command('/clusters')}    # of the order service",
        f"{prometheus.url if prometheus else ''}    # Prometheus",
    ])  # fmt: skip

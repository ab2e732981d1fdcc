"""STRICT_DNS and EDS side by side: what each sees when a pod comes, goes or hangs."""

from __future__ import annotations

import asyncio
import itertools
import time

import dnslib
from dnslib.server import BaseResolver, DNSHandler, DNSLogger, DNSServer

from example.support.cluster import Cluster
from example.support.pods import Handler, Request, Response
from example.support.story import Story, milliseconds
from tests.support.load import Poller

TTL = 5  # seconds, what CoreDNS gives a Service's name by default
REFRESH = 5  # seconds, how often a STRICT_DNS cluster asks by default
CLIENTS = 3  # for each way
WAYS = ("dns", "eds")
Loads = dict[str, list[Poller]]


class Names(BaseResolver):  # type: ignore[misc]
    """The cluster's DNS: a headless Service's name is the addresses of its ready pods."""

    def __init__(self) -> None:
        self.addresses: list[str] = []

    def resolve(self, request: dnslib.DNSRecord, handler: DNSHandler) -> dnslib.DNSRecord:
        reply = request.reply()
        if request.q.qtype == dnslib.QTYPE.A:
            for address in self.addresses:
                reply.add_answer(dnslib.RR(request.q.qname, rdata=dnslib.A(address), ttl=TTL))
        return reply


class Pods:
    """The pods of the Service, told to both: EndpointSlice and DNS at the same moment."""

    def __init__(self, story: Story, names: Names) -> None:
        self.cluster: Cluster = story.cluster
        self.names = names
        self.hung: set[str] = set()  # they take a request and never answer
        self.ordinals = itertools.count()
        self.seen: list[tuple[float, str, str]] = []  # requests: when, which pod, which way

    def handler(self, name: str) -> Handler:
        async def answer(request: Request) -> Response:
            self.seen.append((time.monotonic(), name, request.path.strip("/")))
            if name in self.hung:
                await asyncio.Event().wait()
            return Response(name)

        return answer

    def start(self) -> str:
        name = f"echo-{next(self.ordinals)}"
        pod = self.cluster.pod("echo", handler=self.handler(name), publish=False)
        assert pod.name == name
        return name

    def tell(self, *, without: str = "", draining: str = "") -> float:
        """The endpoints change in Kubernetes; when that was."""
        gone = {without, draining}
        ready = [pod for pod in self.cluster.backends.values() if pod.name not in gone]
        now = time.monotonic()
        kept = self.cluster.backends.pop(without, None)
        self.cluster.publish("echo", draining=[draining])
        if kept is not None:
            self.cluster.backends[without] = kept
        self.names.addresses = [pod.ip for pod in ready]
        return now

    def last(self, pod: str, way: str) -> float:
        return max((at for at, name, by in self.seen if (name, by) == (pod, way)), default=0.0)


def row(story: Story, what: str, values: dict[str, str]) -> None:
    story.fact(what, "   ".join(f"{values[way]:<12}" for way in WAYS))


def failures(loads: Loads) -> dict[str, int]:
    return {way: sum(len(load.failed) for load in found) for way, found in loads.items()}


def since_then(loads: Loads, before: dict[str, int]) -> dict[str, int]:
    return {way: count - before[way] for way, count in failures(loads).items()}


def table(story: Story, what: str, last: dict[str, float], lost: dict[str, int]) -> None:
    for way in WAYS:
        story.say(f"  {way.upper()}: {spoken(last[way])}, {lost[way]} failed")
    row(story, f"{what}: last request to it", {w: spoken(last[w]) for w in WAYS})
    row(story, f"{what}: failed requests", {w: f"{lost[w]}" for w in WAYS})


def comes(story: Story, pods: Pods) -> None:
    story.title("A pod comes")
    pod = pods.start()
    since = pods.tell()
    story.until(lambda: all(pods.last(pod, way) for way in WAYS), "both use it", REFRESH + 5)
    first = {
        way: min(at for at, name, by in pods.seen if (name, by) == (pod, way)) - since
        for way in WAYS
    }
    for way in WAYS:
        story.say(f"  {way.upper()}: {spoken(first[way])} until its first request")
    row(story, "a pod comes: first request to it", {w: spoken(first[w]) for w in WAYS})


def goes(story: Story, pods: Pods, loads: Loads, pod: str) -> None:
    story.title("A pod goes: it terminates, and a second later it is gone")
    before = failures(loads)
    since = pods.tell(draining=pod)
    time.sleep(1)
    pods.cluster.stop_pod(pod)
    pods.tell()
    time.sleep(max(0.0, since + REFRESH + 0.7 - time.monotonic()))
    last = {way: max(0.0, pods.last(pod, way) - since) for way in WAYS}
    lost = since_then(loads, before)
    table(story, "a pod goes", last, lost)
    story.claim("EDS lost no request when a pod went", lost["eds"] == 0, lost["eds"])


def hangs(story: Story, pods: Pods, loads: Loads, pod: str) -> None:
    story.title("A pod hangs: a second later its readiness probe fails")
    before = failures(loads)
    pods.hung.add(pod)
    time.sleep(1)
    known = failures(loads)
    since = pods.tell(without=pod)
    time.sleep(REFRESH + 1.2)
    last = {way: max(0.0, pods.last(pod, way) - since) for way in WAYS}
    row(story, "a pod hangs: failed before the probe does",
        {way: str(known[way] - before[way]) for way in WAYS})  # fmt: skip
    table(story, "from then on", last, since_then(loads, known))
    story.claim("EDS stops as soon as Kubernetes knows", last["eds"] < 0.5, spoken(last["eds"]))


def spoken(seconds: float) -> str:
    return milliseconds(seconds) if seconds < 1 else f"{seconds:.2f} s"


def tell(story: Story) -> None:
    cluster, names = story.cluster, Names()
    ip = cluster.ip("dns")
    server = DNSServer(names, address=ip, port=0, logger=DNSLogger("error"))
    port = int(server.server.server_address[1])
    server.start_thread()
    story.at_end(server.server.server_close)
    story.at_end(server.stop)
    cluster.has_dns = True
    cluster.replacements["10.96.0.10, port_value: 53"] = f"{ip}, port_value: {port}"
    pods = Pods(story, names)
    story.kubectl("kubectl apply -k .")
    first, second = pods.start(), pods.start()
    pods.tell()
    proxy = cluster.run("envoy")
    loads = {
        way: [story.load(proxy.url(10000, f"/{way}"), interval=0.02) for _ in range(CLIENTS)]
        for way in WAYS
    }
    every = [load for found in loads.values() for load in found]
    story.until(lambda: all(len(load.answers) > 20 for load in every), "answers")
    row(story, "", {"dns": "STRICT_DNS", "eds": "EDS"})
    comes(story, pods)
    goes(story, pods, loads, first)
    hangs(story, pods, loads, second)
    story.claim("restarts of Envoy", proxy.never_restarted(), proxy.restarts())
    story.play([
        f"curl -s {proxy.url(10000, '/dns')}    # or /eds",
        proxy.admin_command("/clusters"),
    ])  # fmt: skip

"""The gateway, told: from a static Envoy to one whose every part changes while it runs."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import trustme

from example.support.cluster import Proxy
from example.support.pods import Fetched, Request, Response, fetch, named
from example.support.story import Story, milliseconds
from tests.support.load import Poller

ca = trustme.CA()
trust = ssl.create_default_context()
ca.configure_trust(trust)


class Search:
    """Slow, and it counts how many ask at once."""

    now = most = 0

    async def __call__(self, request: Request) -> Response:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.1)
        self.now -= 1
        return Response("search")


async def cart(request: Request) -> Response:
    """Every third request fails."""
    cart_requests.append(request)
    return Response("busy", 503) if len(cart_requests) % 3 == 0 else Response("cart")


cart_requests: list[Request] = []
search = Search()


def roll(story: Story, old: tuple[Proxy, Poller] | None) -> tuple[Proxy, Poller]:
    """The rolling update of a Deployment: the new pod serves before the old one ends."""
    proxy = story.cluster.run("gateway")
    poller = story.load(proxy.url(8000))
    story.until(lambda: len(poller.answers) > 20, "answers")
    if old is not None:
        old[1].close()
        old[0].close()
    return proxy, poller


def many(url: str, count: int, at_once: int = 1, **options: object) -> list[Fetched]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda _: fetch(url, **options), range(count)))  # type: ignore[arg-type]


def statuses(answers: list[Fetched]) -> str:
    found = Counter(answer.status for answer in answers)
    return ", ".join(f"{count} x {status}" for status, count in sorted(found.items()))


def change(story: Story, proxy: Proxy, command: str, scope: str, version: str) -> None:
    """One kubectl command; how long until Envoy runs it."""
    name = f"{scope}.version_text"
    sent = story.kubectl(command)
    served = story.until(lambda: proxy.envoy.stat(name) == version, f"{name} {version}")
    story.say(f"  Envoy runs it after {milliseconds(served - sent)}")


ROUTES, CLUSTERS = "http.gateway.rds.gateway", "cluster_manager.cds"


def new_certificate(story: Story) -> None:
    pair = ca.issue_cert("gateway.example")
    pair.private_key_pem.write_to_path(str(story.cluster.root / "gateway.key"))
    (story.cluster.root / "gateway.crt").write_bytes(
        b"".join(blob.bytes() for blob in pair.cert_chain_pems)
    )


def served_certificate(proxy: Proxy) -> bytes:
    """What the TLS listener shows to a client that trusts the CA."""
    import socket

    with (
        socket.create_connection((proxy.ip, 8443), 5) as plain,
        trust.wrap_socket(plain, server_hostname="gateway.example") as secure,
    ):
        return secure.getpeercert(binary_form=True) or b""


def tls(story: Story, proxy: Proxy) -> None:
    story.title("Another certificate, while requests run")
    old = served_certificate(proxy)
    new_certificate(story)
    sent = story.kubectl("kubectl create secret tls gateway-tls")
    served = story.until(lambda: served_certificate(proxy) != old, "the new certificate")
    story.claim("new certificate served", served - sent < 1, f"after {milliseconds(served - sent)}")


def retries(story: Story, proxy: Proxy) -> None:
    story.title("Retries: the cart fails every third request")
    before = many(proxy.url(8000, "/cart"), 30)
    story.say(f"  without: {statuses(before)}")
    change(story, proxy, "kubectl apply -f 3-everything/routes-retries", ROUTES, "retries")
    after = many(proxy.url(8000, "/cart"), 30)
    story.say(f"  with:    {statuses(after)}")
    good = all(answer.status == 200 for answer in after)
    seen = f"{statuses(before)}; then {statuses(after)}"
    story.claim("retries: 30 requests to the cart", good, seen)


def breakers(story: Story, proxy: Proxy) -> None:
    story.title("Circuit breaker: the search is slow, and everybody searches")
    many(proxy.url(8000, "/search"), 12, 12)
    before, search.most = search.most, 0
    change(story, proxy, "kubectl apply -f 3-everything/clusters-breakers", CLUSTERS, "breakers")
    answers = many(proxy.url(8000, "/search"), 12, 12)
    quick = [a.seconds for a in answers if a.headers.get("x-envoy-overloaded") == "true"]
    slowest = milliseconds(max(quick or [9]))
    story.say(f"  {statuses(answers)}; those without room were answered after {slowest}")
    story.claim("circuit breaker: requests in the search at once", quick and search.most <= 2,
                f"{before}; then {search.most}")  # fmt: skip


def limit(story: Story, proxy: Proxy) -> None:
    story.title("Rate limit: five searches in ten seconds")
    change(story, proxy, "kubectl apply -f 3-everything/routes-limited", ROUTES, "limited")
    answers = many(proxy.url(8000, "/search"), 12)
    story.say(f"  {statuses(answers)}")
    found = Counter(answer.status for answer in answers)
    story.claim("rate limit: 12 searches", found == {200: 5, 429: 7}, statuses(answers))


def nonsense(story: Story, proxy: Proxy) -> None:
    story.title("And a mistake: the same domain twice, which Envoy rejects")
    loader = proxy.loaders[0]
    before = len(loader.lines)
    story.kubectl("kubectl apply -f 3-everything/routes-broken")
    found = loader.wait_log("(?i)nack|rejected", 8, since=before)
    story.say(f"  the loader: {found.string[:160]}")
    standing = proxy.output_dir / "current/rds.yaml"
    story.until(lambda: "limited" in standing.read_text(), "the last good routes")
    story.claim("a mistake in the routes", True, "rejected, named, and rolled back")


def most_tries(proxy: Proxy) -> int:
    lines = [json.loads(line) for line in (proxy.root / "stdout").read_text().splitlines()]
    return max(int(line["tries"] or 0) for line in lines)


def tell(story: Story) -> None:
    cluster = story.cluster
    story.title("1. Envoy alone")
    story.kubectl("kubectl apply -f services.yaml")
    for name, handler in (("shop", named("shop")), ("cart", cart), ("search", search)):
        cluster.pod(name, handler=handler)
    story.kubectl("kubectl apply -k 1-static")
    now = roll(story, None)
    pollers = [now[1]]
    story.title("2. The routes from a ConfigMap")
    story.kubectl("kubectl apply -k 2-routes")
    now = roll(story, now)
    pollers.append(now[1])
    story.title("3. Everything from ConfigMaps, and TLS from a Secret")
    new_certificate(story)
    story.kubectl("kubectl create secret tls gateway-tls")
    story.kubectl("kubectl apply -k 3-everything")
    proxy, poller = roll(story, now)
    pollers.append(poller)
    story.say(f"  bootstrap: {bootstrap_lines(story)} lines in the three steps")
    retries(story, proxy)
    breakers(story, proxy)
    limit(story, proxy)
    tls(story, proxy)
    nonsense(story, proxy)
    story.watch(lambda: [f"  {len(poller.answers)} requests, {len(poller.failed)} failed"])
    story.until(lambda: most_tries(proxy) > 1, "the access log")
    story.claim("access log", True, f"a request had {most_tries(proxy)} tries")
    story.verdict(pollers, [proxy], "the shop meanwhile: ")
    story.play([
        f"curl -s {proxy.url(8000, '/cart')}",
        f"tail -f {proxy.root}/stdout    # the access log",
        proxy.admin_command("/config_dump"),
    ])  # fmt: skip


def bootstrap_lines(story: Story) -> str:
    files: list[Path] = sorted(story.folder.glob("*/bootstrap.yaml"))
    return ", ".join(str(len(file.read_text().splitlines())) for file in files)

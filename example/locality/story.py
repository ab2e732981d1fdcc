"""Two zones: requests stay in their own, and leave it when it is empty."""

from __future__ import annotations

import time

from example.support.cluster import Proxy
from example.support.pods import named
from example.support.story import Story, bars, milliseconds, shares
from tests.support.load import Poller

ZONES = ("a", "b")


def crossed(poller: Poller, since: float) -> float:
    """The share of answers from the other zone; Envoy is in zone a."""
    answers = [answer.body for answer in poller.answers if answer.time > since]
    return answers.count("b") / len(answers)


def serve(story: Story) -> tuple[Proxy, Poller]:
    proxy = story.cluster.run("envoy")
    poller = story.load(proxy.url(10000), host="web.example")
    story.until(lambda: len(poller.answers) > 10, "answers")
    return proxy, poller


def moved(story: Story, poller: Poller, zone: str, since: float) -> float:
    """How long until the first answer from this zone, and until all are."""
    story.until(lambda: shares(poller, 0.2) == {zone: 1.0}, f"only zone {zone}")
    return poller.wait_body(zone, after=since).time - since


def tell(story: Story) -> None:
    cluster = story.cluster
    story.title("Two pods in zone a, two in zone b; Envoy runs in zone a")
    story.kubectl("kubectl apply -k .")
    for zone in ("a", "a", "b", "b"):
        cluster.pod("web", handler=named(zone), zone=zone)
    old, load = serve(story)
    start = time.monotonic()
    story.watch(lambda: bars(load, ZONES, "zone "), story.pace + 0.5)
    before = crossed(load, start)

    story.title("prefer_zone")
    story.kubectl("kubectl apply -k prefer-zone")
    proxy, poller = serve(story)
    load.close()
    old.close()
    start = time.monotonic()
    story.watch(lambda: bars(poller, ZONES, "zone "), story.pace + 0.5)
    after = crossed(poller, start)
    value = f"{before:.0%} before, {after:.0%} with prefer_zone"
    story.claim("requests that cross zones", before > 0.3 and after == 0, value)

    story.title("Zone a loses its pods, one after the other")
    cluster.publish("web", draining=["web-0"])
    story.watch(lambda: bars(poller, ZONES, "zone "))
    story.claim("one of two left in zone a: requests that cross",
                shares(poller) == {"a": 1.0}, "0%")  # fmt: skip
    since = time.monotonic()
    cluster.publish("web", draining=["web-0", "web-1"])
    took = moved(story, poller, "b", since)
    story.watch(lambda: bars(poller, ZONES, "zone "))
    story.claim("zone a is empty: first answer from zone b", took < 1, milliseconds(took))

    story.title("And they come back")
    since = time.monotonic()
    cluster.publish("web")
    took = moved(story, poller, "a", since)
    story.watch(lambda: bars(poller, ZONES, "zone "))
    story.claim("zone a again: first answer", took < 1, milliseconds(took))
    story.verdict([load, poller], [proxy])
    story.play([
        f"curl -s -H 'Host: web.example' {proxy.url(10000)}",
        f"cat {proxy.output_dir}/current/eds/demo_web_http.yaml",
    ])  # fmt: skip

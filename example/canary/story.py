"""The canary release, told: weights change in a ConfigMap, then by Service annotation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from example.support.cluster import TOKEN, Proxy
from example.support.story import Story, bars, milliseconds, shares
from tests.support.load import Poller

VERSION = "http.ingress.rds.{}.version_text"
SERVICES = ("bold-olm", "eerie-octopus")


def text(proxy: Proxy, routes: str) -> str:
    return str(proxy.envoy.stat(VERSION.format(routes)) or "")


def shift(story: Story, proxy: Proxy, poller: Poller, routes: str, command: str) -> float:
    """One change: from the PATCH until Envoy runs another version of the routes."""
    before = text(proxy, routes)
    sent = story.kubectl(command)
    served = story.until(lambda: text(proxy, routes) != before, f"Envoy after {command}")
    story.say(f"  Envoy runs it after {milliseconds(served - sent)}")
    return served - sent


def settle(story: Story, poller: Poller, wanted: Callable[[dict[str, float]], bool]) -> None:
    """Watch the answers for a while, and until they are as wanted."""
    story.watch(lambda: bars(poller, SERVICES))
    story.until(lambda: wanted(shares(poller)), f"the answers: {shares(poller)}")


def even(share: dict[str, float]) -> bool:
    return all(0.3 < share.get(name, 0) < 0.7 for name in SERVICES)


def only(name: str) -> Callable[[dict[str, float]], bool]:
    return lambda share: share == {name: 1.0}


def verdict(story: Story, proxy: Proxy, poller: Poller, took: Sequence[float], how: str) -> None:
    story.fact(f"{how}: first snapshot, by the init run", milliseconds(proxy.init_seconds))
    for name, seconds in zip(("50/50", "0/100"), (took[-2], took[-1]), strict=True):
        value = f"{milliseconds(seconds)} from the PATCH until Envoy ran it"
        story.claim(f"{how}: {name}", seconds < 1, value)
    story.verdict([poller], [proxy], f"{how}: ")


def by_configmap(story: Story) -> tuple[Proxy, Poller]:
    cluster = story.cluster
    story.title("Weights in a ConfigMap")
    story.kubectl("kubectl apply -k .")
    for name in SERVICES:
        cluster.pod(name)
    proxy = cluster.run("envoy")
    poller = story.load(proxy.url(10000))
    settle(story, poller, only("bold-olm"))
    took = []
    for name, wanted in (("50-50", even), ("0-100", only("eerie-octopus"))):
        took.append(shift(story, proxy, poller, "podinfo", f"kubectl apply -f weights-{name}"))
        settle(story, poller, wanted)
    verdict(story, proxy, poller, took, "ConfigMap")
    return proxy, poller


def by_annotation(story: Story) -> tuple[Proxy, Poller]:
    cluster = story.cluster
    story.title("The same by annotation of the Services")
    for _ in SERVICES:
        story.kubectl("kubectl annotate service")
    story.kubectl("kubectl apply -k by-annotation")
    proxy = cluster.run("envoy-services")
    poller = story.load(proxy.url(10000), host="podinfo.example")
    settle(story, poller, only("bold-olm"))
    took = []
    for wanted in (even, only("eerie-octopus")):
        command = "kubectl annotate --overwrite service eerie-octopus"  # the other takes the rest
        took.append(shift(story, proxy, poller, "services", command))
        settle(story, poller, wanted)
    verdict(story, proxy, poller, took, "annotation")
    return proxy, poller


def patches(story: Story) -> list[Path]:
    """The ConfigMaps of this folder as JSON, to be sent with curl."""
    made = []
    for name in ("weights-50-50", "weights-0-100", "configmap"):
        place = story.root / f"{name}.json"
        place.write_text(json.dumps({"data": story.cluster.read(f"{name}.yaml")[0]["data"]}))
        made.append(place)
    return made


def tell(story: Story) -> None:
    started = time.monotonic()
    proxy, _ = by_configmap(story)
    other, _ = by_annotation(story)
    story.fact("the whole story", f"{time.monotonic() - started:.1f} s")
    api = f"{story.cluster.api.url}/api/v1/namespaces/demo/configmaps/envoy-xds"
    auth = f"-H 'Authorization: Bearer {TOKEN}'"
    files = patches(story)
    service = f"{story.cluster.api.url}/api/v1/namespaces/demo/services/eerie-octopus"
    weight = json.dumps({"metadata": {"annotations": {"xds-loader/weight": "50"}}})
    patch = f"curl -s -X PATCH {auth} -H 'Content-Type: application/merge-patch+json' \\"
    look = "   # Envoy's admin interface"
    story.play([
        "# Weights in a ConfigMap",
        f"curl -s {proxy.url(10000)}                 # the answer of one backend",
        patch,
        f"  {api} --data-binary @{files[0]}   # or {', '.join(f.name for f in files[1:])}",
        f"{proxy.admin_command('/stats?filter=rds')}{look}",
        f"ls -l {proxy.output_dir}/current/    # what the loader wrote",
        "# Weights by annotation",
        f"curl -s -H 'Host: podinfo.example' {other.url(10000)}",
        patch,
        f"  {service} -d '{weight}'   # any weight",
        f"{other.admin_command('/stats?filter=rds')}{look}",
        f"ls -l {other.output_dir}/current/",
        "# The logs of the loaders",
    ])  # fmt: skip

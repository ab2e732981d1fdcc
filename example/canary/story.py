"""The canary release, told: weights change in a ConfigMap, then by Service annotation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

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


def to_play(story: Story, proxy: Proxy, other: Proxy) -> list[str]:
    """What to type: the README's changes without kubectl, and some of one's own."""
    for name in ("configmap", "weights-50-50", "weights-0-100"):
        data = story.cluster.read(f"{name}.yaml")[0]["data"]
        (story.root / f"{name}.json").write_text(json.dumps({"data": data}))
    routes = story.root / "rds.yaml"
    routes.write_text(data["rds.yaml"])
    patch = 'curl -s -X PATCH -H "$AUTH" -H "$PATCH" $API'
    weight = json.dumps({"metadata": {"annotations": {"xds-loader/weight": "50"}}})
    as_json = "import json, sys; print(json.dumps({'data': {'rds.yaml': sys.stdin.read()}}))"
    return [
        "# first: the API server of the demo (kubectl does not know it), and what it wants to see",
        f"API={story.cluster.api.url}/api/v1/namespaces/demo AUTH='Authorization: Bearer {TOKEN}' "
        "PATCH='Content-Type: application/merge-patch+json'",
        "# Weights in a ConfigMap",
        f"curl -s {proxy.url(10000)}    # the answer of one backend",
        f"{patch}/configmaps/envoy-xds --data-binary @{story.root}/weights-50-50.json"
        "    # or weights-0-100, configmap",
        f"# or edit {routes} as you like, and send it:",
        f'python3 -c "{as_json}" < {routes} | {patch}/configmaps/envoy-xds --data-binary @-',
        f"{proxy.admin_command('/stats?filter=rds')}    # Envoy's admin interface",
        f"ls -l {proxy.output_dir}/current/    # what the loader wrote",
        "# Weights by annotation",
        f"curl -s -H 'Host: podinfo.example' {other.url(10000)}",
        f"{patch}/services/eerie-octopus -d '{weight}'    # any weight",
        f"ls -l {other.output_dir}/current/",
    ]


def tell(story: Story) -> None:
    started = time.monotonic()
    proxy, _ = by_configmap(story)
    other, _ = by_annotation(story)
    story.fact("the whole story", f"{time.monotonic() - started:.1f} s")
    if story.options.keep:
        story.play(to_play(story, proxy, other))

"""What the chart and the sidecar example render, started: the real Envoy and the loader."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.backend import Backends
from tests.support.loader import run, wait_until
from tests.support.manifests import Object, Release, command, load_values, render
from tests.support.pod import Pod
from tests.support.tls import Authority
from tests.test_chart import CI, set_values
from tests.test_example_sidecar import kustomize, plain

pytestmark = pytest.mark.envoy


def names_of(pod: Pod, count: int, host: str = "", path: str = "/") -> Counter[str]:
    """Which backends answered `count` requests."""
    answers = [pod.get(path, host) for _ in range(count)]
    assert {answer.status for answer in answers} == {200}, answers
    return Counter(answer.body.strip() for answer in answers)


def states(pod: Pod) -> set[str]:
    """What Envoy made of the loader's files."""
    body = json.loads(pod.ask(9902, "/snapshot").body)
    return {file["state"] for file in body["files"]}


def weights(backends: Backends, **given: int) -> Object:
    """An upstream of these backends; those that are not given a weight have none."""
    chosen = {
        name: {"address": "127.0.0.1", "port": backends[name]}
        | ({"weight": given[name]} if name in given else {})
        for name in ("stable", "canary")
    }
    return {"upstreams": {"web": {"domains": ["web.example"], "backends": chosen}}}


def test_weights_move_traffic_with_the_command_of_the_notes(
    tmp_path: Path, authority: Authority
) -> None:
    with Backends("stable", "canary") as backends:
        values = weights(backends, canary=0)
        release = render(values)
        with Pod(release, tmp_path, authority) as pod:
            assert pod.envoy is not None
            before = pod.envoy.pid
            assert names_of(pod, 20, "web.example") == {"stable": 20}
            assert pod.get(host="other.example").status == 404
            assert pod.get(host="web.example:10000").status == 200, "any port in Host"
            (assignment,) = re.findall(r"--set (\S+)", release.notes)
            assert assignment == "upstreams.web.backends.canary.weight=50"
            pod.apply(render(set_values(values, assignment)))
            wait_until(lambda: "canary" in names_of(pod, 10, "web.example"))
            found = names_of(pod, 400, "web.example")
            assert 120 < found["canary"] < 280, "half, give or take eight standard deviations"
            pod.apply(render(set_values(values, assignment.replace("=50", "=100"))))
            wait_until(lambda: names_of(pod, 5, "web.example") == {"canary": 5})
            wait_until(lambda: states(pod) == {"acked"})
            assert pod.envoy.pid == before
            assert pod.envoy.poll() is None


def test_discovered_services(tmp_path: Path, authority: Authority) -> None:
    values = load_values("services-nodes-values.yaml")
    with Backends("one", "two") as backends:
        pod = Pod(render(values), tmp_path, authority)
        pod.api.node("node-a", {"topology.kubernetes.io/region": "eu", ZONE: "a"})
        port = {"name": "http", "port": 80, "protocol": "TCP"}
        pod.api.service(
            "shop",
            "web",
            [port],
            labels={"edge": "public"},
            annotations={"xds-loader/hosts": "web.example"},
        )
        target = {**port, "port": backends["one"]}
        pod.api.endpointslice("shop", "web-1", "web", ["127.0.0.1"], [target])
        with pod:
            assert names_of(pod, 5, "web.example") == {"one": 5}
            target = {**port, "port": backends["two"]}
            pod.api.endpointslice("shop", "web-1", "web", ["127.0.0.1"], [target])
            wait_until(lambda: names_of(pod, 1, "web.example") == {"two": 1})


@pytest.mark.parametrize("name", CI)
def test_each_file_of_the_matrix_comes_up(name: str, tmp_path: Path, authority: Authority) -> None:
    """With the permissions it renders and no other; `Pod` waits for every probe."""
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


def test_drain(tmp_path: Path, authority: Authority) -> None:
    with Pod(render(), tmp_path, authority) as pod:
        kept = http.client.HTTPConnection(pod.ip, 10000, timeout=5)
        kept.request("GET", "/")
        assert kept.getresponse().read() == b""
        assert pod.ask(9903, "/ready").status == 200
        assert pod.get().connection == ""
        pod.pre_stop(pod.loader_container())
        assert pod.ask(9903, "/ready").status == 503
        kept.request("GET", "/")
        assert kept.getresponse().getheader("connection") == "close"
        kept.close()
        assert pod.get().connection == "close"
        assert pod.get().status == 404, "it still accepts new connections and answers"
        assert pod.loader is not None
        pod.loader.stop()


def test_helm_test_and_the_notes(tmp_path: Path, authority: Authority) -> None:
    release = render(load_values("weights-values.yaml"))
    with Pod(release, tmp_path, authority) as pod:
        (hook,) = release.all("Pod")
        loader, request = hook["spec"]["containers"]
        args, env = command(loader, pod.fields)
        volume = tmp_path / "volume of the test pod"
        words = [pod.map(arg).replace(str(tmp_path / "srv/runtime"), str(volume)) for arg in args]
        done = run(words, {**env, **pod.api_environment()})
        assert done.returncode == 0, done.stderr
        assert "podinfo-canary" in (volume / "current/cds.yaml").read_text()
        assert "podinfo" not in done.stdout + done.stderr, "no configuration in the output"
        _, *flags, code, host, port, path = request["command"]
        assert host == release.one("Service")["metadata"]["name"]
        words = [sys.executable, *flags, code, pod.ip, port, path]
        assert subprocess.run(words, check=False).returncode == 1, "503: no such backend"
        assert subprocess.run([*words, "503"], check=False).returncode == 0
        file, admin = re.findall(r"python3 -c '(.*)'", release.notes)
        for code, more in ((file, []), (admin, ["/config_dump"])):
            words = [sys.executable, "-c", pod.map(code), *more]
            shown = subprocess.run(words, capture_output=True, text=True, check=True)
            assert "podinfo-canary" in shown.stdout


@pytest.mark.parametrize("source", [kustomize, plain])
def test_the_sidecar_example(
    source: Callable[[], Release], tmp_path: Path, authority: Authority
) -> None:
    release = source()
    with Backends("app") as backends:
        pod = Pod(release, tmp_path, authority, namespace="web")
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
            wait_until(lambda: pod.get().status == 418)
            pod.pre_stop(pod.loader_container())
            assert pod.ask(9903, "/ready").status == 503

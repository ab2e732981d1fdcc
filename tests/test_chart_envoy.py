"""What the chart and the sidecar example render, started: the real Envoy and the loader."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support.backend import Backends
from tests.support.chart_docs import CHART
from tests.support.envoy import inotify_instances
from tests.support.loader import run, wait_until
from tests.support.manifests import Object, Release, command, containers, load_values, render
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
README = (CHART / "README.md").read_text()


def test_the_readmes_canary_release(tmp_path: Path, authority: Authority) -> None:
    """Its values and its one-line upgrade; 10 % are counted."""
    (block,) = (b for b in re.findall(r"```yaml\n(.*?)```", README, re.S) if "podinfo-stable" in b)
    (assignment,) = re.findall(r"upgrade edge .* --reuse-values --set (\S+)", README)
    values = yaml.safe_load(block)
    with Backends("stable", "canary") as backends:
        for name, backend in values["upstreams"]["podinfo"]["backends"].items():
            port = backends[name.removeprefix("podinfo-")]
            del backend["port"]
            backend.update(address="127.0.0.1", port=port, http2={"enabled": False})
        before, after = render(values), render(set_values(values, assignment))
        changed = [obj["metadata"]["name"] for obj in after.objects if obj not in before.objects]
        assert changed == ["edge-envoy-xds-configmap-loader-xds"]
        with Pod(before, tmp_path, authority) as pod:
            assert pod.envoy is not None
            started = pod.envoy.pid
            assert names_of(pod, 20, "podinfo.example") == {"stable": 20}
            assert pod.get(host="other.example").status == 404
            assert pod.get(host="podinfo.example:10000").status == 200, "any port in Host"
            pod.apply(after)
            wait_until(lambda: "canary" in names_of(pod, 20, "podinfo.example"))
            found = names_of(pod, 1000, "podinfo.example")
            assert 40 < found["canary"] < 160, "10 %, give or take six standard deviations"
            wait_until(lambda: states(pod) == {"acked"})
            assert pod.envoy.pid == started
            assert pod.envoy.poll() is None


def test_a_change_meets_a_few_pods_first(tmp_path: Path, authority: Authority) -> None:
    """The README's recipe: its check fails while a file is NACKed."""
    (block,) = (b for b in re.findall(r"```yaml\n(.*?)```", README, re.S) if "front: edge" in b)
    starts = ("helm upgrade --", "kubectl")
    upgrade, check, promote = (one for one in README.splitlines() if one.startswith(starts))
    common = {**yaml.safe_load(block), "xds": routes_of(200)}
    first = set_values(common, *re.findall(r"--set (\S+)", upgrade))
    assert promote == upgrade.replace("edge-first", "edge").replace(
        " --set replicaCount=1 --set service.enabled=false", ""
    )
    (selector,) = (s["spec"]["selector"] for s in render(common).all("Service"))
    release = render(first, name="edge-first")
    assert release.all("Service") == []
    assert selector.items() <= release.workload["spec"]["template"]["metadata"]["labels"].items()
    assert f"deployment/{release.workload['metadata']['name']} " in check

    with Pod(release, tmp_path, authority) as pod:
        words = shlex.split(check)
        code = words[words.index("-c", words.index("python3")) + 1]
        code = code.replace("127.0.0.1:9902", f"{pod.ip}:9902")

        def checked() -> tuple[int, str]:
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            return done.returncode, done.stdout

        wait_until(lambda: checked()[0] == 0)
        pod.apply(render({**first, "xds": routes_of(999)}, name="edge-first"))
        wait_until(lambda: "rds.yaml" in checked()[1])
        assert checked()[0] == 1
        assert pod.get().status == 200, "the last good routes serve"
        pod.apply(render({**first, "xds": routes_of(204)}, name="edge-first"))
        wait_until(lambda: pod.get().status == 204)
        wait_until(lambda: checked()[0] == 0)


def routes_of(status: int) -> Object:
    """Everything gets this status; Envoy rejects one beyond 599."""
    action = {"match": {"prefix": "/"}, "direct_response": {"status": status}}
    host = {"name": "all", "domains": ["*"], "routes": [action]}
    kind = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
    return {"rds.yaml": [{"@type": kind, "name": "services", "virtual_hosts": [host]}]}


def test_a_new_pod_whose_envoy_rejects_the_files_never_becomes_ready(
    tmp_path: Path, authority: Authority
) -> None:
    class Refused(Pod):
        def await_probe(self, container: Object, kind: str) -> None:
            if (container["name"], kind) == ("envoy", "startupProbe"):
                assert self.loader is not None
                self.loader.wait_log("ERROR Envoy NACKed rds.yaml")
                action = container[kind]["httpGet"]
                for _ in range(20):
                    assert self.ask(action["port"], action["path"]).status == 503
                raise RuntimeError("it is not started")
            super().await_probe(container, kind)

    with pytest.raises(RuntimeError, match="it is not started"):
        Refused(render({"xds": routes_of(999)}), tmp_path, authority).__enter__()


def test_a_dead_loader_takes_no_envoy_out(tmp_path: Path, authority: Authority) -> None:
    with Pod(render(), tmp_path, authority) as pod:
        assert pod.loader is not None
        pod.loader.kill()
        envoy = next(c for c in containers(pod.release.pod) if c["name"] == "envoy")
        pod.await_probe(envoy, "readinessProbe")
        assert pod.ask(9903, "/ready").status == 200


def test_no_route_reaches_the_admin_interface(tmp_path: Path, authority: Authority) -> None:
    """Neither an ExternalName nor Envoy's own files: there is no address that leads there."""
    with Pod(render(load_values("services-nodes-values.yaml")), tmp_path, authority) as pod:
        for name, target in (("a", "localhost"), ("b", "127.0.0.1"), ("c", "x.localhost")):
            pod.api.service(
                "shop",
                name,
                [{"name": "http", "port": 9901}],
                labels={"edge": "public"},
                annotations={"xds-loader/hosts": f"{name}.example"},
                type="ExternalName",
                externalName=target,
            )
        port = {"name": "http", "port": 80, "protocol": "TCP"}
        notes = {"xds-loader/hosts": "d.example"}
        pod.api.service("shop", "d", [port], labels={"edge": "public"}, annotations=notes)
        wait_until(lambda: pod.get(host="d.example").status == 503)  # the last one is there
        for name in "abc":
            assert pod.get("/config_dump", host=f"{name}.example").status == 404
        assert pod.ask(9903, "/quitquitquit").status == 404
        with pytest.raises(OSError):
            pod.ask(9901, "/config_dump")


def expose(pod: Pod, namespace: str, name: str, ports: dict[str, int], **notes: str) -> None:
    """A selected Service with annotations, and one endpoint on loopback for each port."""
    service = [{"name": key, "port": 80 + n} for n, key in enumerate(ports)]
    target = [{"name": key, "port": port} for key, port in ports.items()]
    annotations = {f"xds-loader/{key}": value for key, value in notes.items()}
    pod.api.service(namespace, name, service, labels={"edge": "public"}, annotations=annotations)
    pod.api.endpointslice(namespace, f"{name}-1", name, ["127.0.0.1"], target)


def test_what_a_tenant_tries_changes_nothing_for_others(
    tmp_path: Path, authority: Authority
) -> None:
    """Hosts of others, other ports, wrong weights and huge annotations, one after the other."""
    values = {"services": {"enabled": True, "selector": "edge=public", "namespaces": ["*"]}}
    names = ("shop", "admin", "canary", "evil", "last")
    with Backends(*names) as backends:
        pod = Pod(render(values), tmp_path, authority)
        ports = {"http": backends["shop"], "http-admin": backends["admin"]}
        expose(pod, "shop", "web", ports, hosts="shop.example", port="http", weight="95%")
        expose(
            pod, "shop", "canary", {"http": backends["canary"]}, hosts="shop.example", weight="5"
        )
        with pod:
            assert pod.loader is not None
            found = names_of(pod, 400, "shop.example")
            assert found["canary"] < 80, "a wrong weight takes the remainder"
            assert set(names_of(pod, 20, "shop.example:81")) <= {"shop", "canary"}

            time.sleep(1.1)  # creation times have whole seconds, and the oldest owns the host
            evil = {"http": backends["evil"]}
            hosts = "shop.example,web.shop.svc.cluster.local"
            expose(pod, "evil", "take", evil, hosts=hosts, weight="1000000")
            expose(pod, "evil", "more", evil, hosts="shop.example", weight="4294967295")
            many = ",".join(f"h{n}.example" for n in range(2000))
            expose(pod, "evil", "huge", evil, hosts=many, grpc=many)
            bad = ",".join(f"not a host {n}" for n in range(3000))
            expose(pod, "evil", "noise", evil, hosts=bad)
            expose(pod, "shop", "last", {"http": backends["last"]}, hosts="last.example")
            wait_until(lambda: pod.get(host="last.example").status == 200)
            assert names_of(pod, 3, "last.example") == {"last": 3}
            assert set(names_of(pod, 50, "shop.example")) <= {"shop", "canary"}
            assert "evil" not in pod.get(host="web.shop.svc.cluster.local").body
            assert pod.get(host="h7.example").status == 404
            lines = [line for line in pod.loader.lines if "evil/" in line]
            assert len(lines) < 20
            assert max(map(len, lines)) < 1000
            assert states(pod) <= {"acked", "unread"}


def test_the_budget_of_the_values_is_that_of_the_pod(tmp_path: Path, authority: Authority) -> None:
    values = {"services": {"enabled": True, "selector": "edge=public", "edsBudget": 4}}
    pod = Pod(render(values), tmp_path, authority)
    for number in range(10):
        expose(pod, "shop", f"web-{number}", {"http": 9})
    with pod:
        assert pod.envoy is not None
        wait_until(lambda: "shop/web-9/http" in pod.admin("/clusters").body)
        assert inotify_instances(pod.envoy.pid) == 4 + 3, "CDS, LDS and RDS besides"


def test_a_service_without_slices_raises_no_alarm(tmp_path: Path, authority: Authority) -> None:
    """Endpoints are not asked for, which the chart's Role does not permit."""
    values = {"services": {"enabled": True, "selector": "*"}}
    pod = Pod(render(values), tmp_path, authority)
    pod.api.service("shop", "new", [{"name": "http", "port": 80}])
    with pod:
        wait_until(lambda: "shop/new/http" in pod.admin("/clusters").body)
        paths = {request.path for request in pod.api.requests}
        assert not [path for path in paths if path.endswith("/endpoints")]
        assert pod.api.requests.matching(lambda request: request.status == 403) == []
        assert 'code="403"' not in pod.ask(9902, "/metrics").body


def test_the_edge_rejects_what_it_should(tmp_path: Path, authority: Authority) -> None:
    values = {"xds": routes_of(200), "envoy": {"overload": {"maxConnections": 3}}}
    with Pod(render(values), tmp_path, authority) as pod:
        assert pod.get("/a/b").status == 200
        assert pod.get("/a%2Fb").status == 400
        connection = http.client.HTTPConnection(pod.ip, 10000, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", "/", headers={"x_admin": "1"})
            assert connection.getresponse().status == 400
        with contextlib.ExitStack() as many:
            for _ in range(10):
                connection = http.client.HTTPConnection(pod.ip, 10000, timeout=5)
                many.enter_context(contextlib.closing(connection))
                connection.connect()
            with pytest.raises((OSError, http.client.HTTPException)):
                pod.get()
            assert pod.ask(9903, "/ready").status == 200, "the kubelet is let in"
        wait_until(lambda: answers(pod))


def answers(pod: Pod) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return pod.get().status == 200
    return False


def test_a_pod_watches_its_own_node_only(tmp_path: Path, authority: Authority) -> None:
    services = {"enabled": True, "selector": "*"}
    values = {"services": services, "config": {"endpoint": {"prefer_zone": True}}}
    pod = Pod(render(values), tmp_path, authority)
    pod.api.node("node-a", {ZONE: "a"})
    pod.api.node("node-b", {ZONE: "b"})
    with pod:
        asked = pod.api.requests.matching(lambda request: "/nodes" in request.path)
        assert asked
        assert {request.query.get("fieldSelector") for request in asked} == {"metadata.name=node-a"}


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

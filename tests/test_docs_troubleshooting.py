"""docs/troubleshooting.md: each symptom whose log is shown there, made to happen.

A line of the page is a line of the log without its time. What differs from run to run (ports,
durations, the test's directory) is written as on a real machine.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import loader
from tests.conftest import NAMESPACE, RunLoader, StartEnvoy, StartLoader
from tests.support.apiserver import ApiServer, Rule
from tests.support.docs import ROOT, block_for, blocks_of
from tests.support.envoy import (
    Envoy,
    assignment,
    bootstrap,
    cluster,
    dynamic_resources,
    eds_cluster,
    envoy_path,
    file_source,
    http_listener,
    rds_routes,
    response,
    route_config,
)
from tests.support.loader import Loader, wait_files
from tests.support.ports import held_port
from tests.support.tls import Authority

PAGE = "docs/troubleshooting.md"
THIS = f"tests/{Path(__file__).name}"
EMPTY = "resources: []\n"
EMPTY_JSON = '{"resources": []}\n'


class World(NamedTuple):
    """What a symptom is made with."""

    api: ApiServer
    out: Path
    start: StartLoader
    run: RunLoader
    envoy: StartEnvoy
    authority: Authority
    tmp_path: Path

    def put(self, name: str = "envoy-xds", **files: str) -> None:
        data = {key.replace("_", "."): text for key, text in files.items()}
        self.api.configmap(NAMESPACE, name, data)

    def with_envoy(self, *, reads: str = "current/rds.yaml") -> Envoy:
        """An Envoy whose routes are rds.yaml, and which has what is published."""
        self.put(rds_yaml=routes())
        assert self.run("--onetime", "--configmap=envoy-xds").returncode == 0
        listener = http_listener(held_port(), rds_routes(file_source(self.out / reads)))
        return self.envoy(bootstrap(listeners=[listener]))

    def asking(self, envoy: Envoy) -> Loader:
        """A loader that asks this Envoy, and watches."""
        admin = ["--envoy-admin", envoy.admin_url]
        sidecar = self.start("--watch", "--configmap=envoy-xds", *admin)
        self.api.wait_watches(1)
        return sidecar


@pytest.fixture
def world(
    api: ApiServer,
    out: Path,
    start_loader: StartLoader,
    run_loader: RunLoader,
    start_envoy: StartEnvoy,
    authority: Authority,
    tmp_path: Path,
) -> World:
    return World(api, out, start_loader, run_loader, start_envoy, authority, tmp_path)


def routes(status: int = 200, **more: Any) -> str:
    answer = {"match": {"prefix": "/"}, "direct_response": {"status": status}}
    found = route_config({"x": 1})
    found["virtual_hosts"][0]["routes"] = [answer]
    found["virtual_hosts"][0].update(more)
    return response("routes", found)


Symptom = Callable[[World], str]
SYMPTOMS: dict[str, Symptom] = {}


def symptom(make: Symptom) -> Symptom:
    SYMPTOMS[make.__name__] = make
    return make


@symptom
def missing(world: World) -> str:
    world.put(rds_yaml=EMPTY)
    sidecar = world.start("--watch", "--configmap=envoy-xds", "--configmap=flags:runtime")
    sidecar.wait_log("waiting")
    return sidecar.log


@symptom
def missing_once(world: World) -> str:
    return world.run("--onetime", "--configmap=envoy-xds").stderr


@symptom
def forbidden(world: World) -> str:
    world.api.rules = [Rule(["get", "watch"], ["configmaps"], NAMESPACE, ["envoy-xds"])]
    return world.run("--onetime", "--configmap=envoy-xds").stderr


@symptom
def unauthorized(world: World) -> str:
    world.api.tokens = {"another"}
    return world.run("--onetime", "--configmap=envoy-xds").stderr


@symptom
def unreachable(world: World) -> str:
    world.api.stop()
    return world.run("--onetime", "--configmap=envoy-xds").stderr


@symptom
def untrusted(world: World) -> str:
    stranger = world.tmp_path / "other.pem"
    stranger.write_bytes(Authority(world.tmp_path).ca_file.read_bytes())
    with ApiServer(tls=world.authority.server_context()) as server:
        args = ["--namespace", NAMESPACE, "--apiserver", server.url, "--ca-file", str(stranger)]
        more = ["--onetime", "--configmap=envoy-xds", "--output-dir", str(world.out)]
        return world.run(*args, *more, server=None).stderr


@symptom
def gone(world: World) -> str:
    world.put(rds_yaml=EMPTY)
    sidecar = world.start("--watch", "--configmap=envoy-xds")
    sidecar.wait_log("published")
    world.api.wait_watches(1)
    world.api.delete("ConfigMap", NAMESPACE, "envoy-xds")
    sidecar.wait_log("last files stay")
    wait_files(world.out, {"rds.yaml": EMPTY})
    return sidecar.log


@symptom
def twice(world: World) -> str:
    world.put(rds_yaml=EMPTY)
    world.put("more", rds_yaml="resources: [] # more\n")
    return world.run("--onetime", "--configmap=envoy-xds", "--configmap=more").stderr


@symptom
def bad_key(world: World) -> str:
    world.api.configmap(NAMESPACE, "envoy-xds", {"rds.yaml": EMPTY, "..data": "x"})
    return world.run("--onetime", "--configmap=envoy-xds").stderr


@symptom
def stranger(world: World) -> str:
    (world.out / "current").mkdir(parents=True)
    (world.out / "current" / "old.yaml").write_text("of the past\n")
    world.put(rds_yaml=EMPTY)
    return world.run("--onetime", "--configmap=envoy-xds").stderr


@symptom
def second_loader(world: World) -> str:
    world.put(rds_yaml=EMPTY)
    world.start("--watch", "--configmap=envoy-xds").wait_log("published")
    second = world.start("--watch", "--configmap=envoy-xds")
    second.wait_log("another loader")
    return second.log


@symptom
def edited(world: World) -> str:
    world.put(rds_yaml=EMPTY)
    sidecar = world.start("--watch", "--configmap=envoy-xds")
    sidecar.wait_log("published")
    (world.out / "current" / "rds.yaml").write_text("by hand\n")
    sidecar.process.send_signal(signal.SIGHUP)
    sidecar.wait_log("repaired")
    wait_files(world.out, {"rds.yaml": EMPTY})
    return sidecar.log


@symptom
def refused(world: World) -> str:
    sidecar = world.asking(world.with_envoy())
    world.put(rds_yaml=routes(204, domains=["*", "*"]))
    sidecar.wait_log("rollback.*ack=yes")
    sidecar.wait_log("last ACKed bytes stay")
    wait_files(world.out, {"rds.yaml": routes()})
    return sidecar.log


@symptom
def first_refused(world: World) -> str:
    world.put(rds_yaml=routes(204, domains=["*", "*"]))
    assert world.run("--onetime", "--configmap=envoy-xds").returncode == 0
    rds = file_source(world.out / "current/rds.yaml")
    envoy = world.envoy(bootstrap(listeners=[http_listener(held_port(), rds_routes(rds))]))
    sidecar = world.start("--watch", "--configmap=envoy-xds", "--envoy-admin", envoy.admin_url)
    sidecar.wait_log("NACKed")
    return sidecar.log


@symptom
def renamed(world: World) -> str:
    sidecar = world.asking(world.with_envoy())
    world.put(rds_yaml=routes(204))
    sidecar.wait_log("ack=yes")  # now the loader knows who reads it
    world.put(routes_yaml=routes())
    sidecar.wait_log("its source is gone")
    return sidecar.log


@symptom
def hidden(world: World) -> str:
    world.put(cds_json=EMPTY_JSON)
    assert world.run("--onetime", "--configmap=envoy-xds").returncode == 0
    cds = dynamic_resources(cds=file_source(world.out / "current/cds.json"))
    matcher = {"exclusion_list": {"patterns": [{"prefix": "cluster_manager."}]}}
    envoy = world.envoy(bootstrap(cds, {"stats_config": {"stats_matcher": matcher}}))
    sidecar = world.start("--watch", "--configmap=envoy-xds", "--envoy-admin", envoy.admin_url)
    sidecar.wait_log("stats_matcher")
    return sidecar.log


@symptom
def typo(world: World) -> str:
    sidecar = world.asking(world.with_envoy())
    world.put(rds_yaml=routes(204))
    sidecar.wait_log("ack=yes")  # only now there is a count to compare with
    world.put(rds_yaml=routes(204, retry_polcy={"num_retries": 1}))
    sidecar.wait_log("unknown fields")
    return sidecar.log


@symptom
def unread(world: World) -> str:
    sidecar = world.asking(world.with_envoy())
    other = response("routes", route_config({"x": 1}, "others"))
    world.put(rds_yaml=routes(), other_yaml=other)
    sidecar.wait_log("unread=other.yaml")
    return sidecar.log


@symptom
def no_envoy(world: World) -> str:
    world.put(rds_yaml=EMPTY)
    admin = ["--envoy-admin", f"http://127.0.0.1:{held_port()}"]
    sidecar = world.start("--watch", "--configmap=envoy-xds", *admin)
    sidecar.wait_log("is not asked")
    return sidecar.log


@symptom
def check_refuses(world: World) -> str:
    world.put(rds_yaml=EMPTY)
    sidecar = world.start("--watch", "--configmap=envoy-xds", "--check-cmd=test ! -e {dir}/no.yaml")
    sidecar.wait_log("published")
    world.api.wait_watches(1)
    world.put(rds_yaml=EMPTY, no_yaml=EMPTY)
    sidecar.wait_log("rejects")
    return sidecar.log


@symptom
def mismatched_pair(world: World) -> str:
    one, two = world.authority.pair("one.example"), world.authority.pair("two.example")
    pem = {"tls.crt": one.cert.read_bytes(), "tls.key": two.key.read_bytes()}
    world.api.secret(NAMESPACE, "web-tls", pem, type="kubernetes.io/tls")
    return world.run("--onetime", "--secret=web-tls").stderr


def test_an_unquoted_version_is_nacked(world: World) -> None:
    sidecar = world.asking(world.with_envoy())
    text = yaml.safe_dump({"version_info": 1, **json.loads(routes(204))}, sort_keys=False)
    world.put(rds_yaml=text)
    sidecar.wait_log("NACKed rds.yaml")


def test_a_port_in_host_is_another_domain(start_envoy: StartEnvoy) -> None:
    """`domains: [shop.example]` does not match `Host: shop.example:8080`."""
    answer = {"match": {"prefix": "/"}, "direct_response": {"status": 200}}

    def statuses(*domains: str) -> list[int]:
        found = {"name": "web", "virtual_hosts": [
            {"name": "shop", "domains": list(domains), "routes": [answer]}]}
        port = held_port()
        with start_envoy(bootstrap(listeners=[http_listener(port, {"route_config": found})])):
            return [status_of(port, host) for host in ("shop.example", "shop.example:8080")]

    assert statuses("shop.example") == [200, 404]
    assert statuses("shop.example", "shop.example:*") == [200, 200]


def test_a_route_to_no_cluster_is_accepted(world: World) -> None:
    envoy = world.with_envoy()
    sidecar = world.asking(envoy)
    world.put(rds_yaml=response("routes", route_config({"no-such": 1})))
    sidecar.wait_log("published.*ack=yes")
    (port,) = envoy.listeners().values()
    assert status_of(port, "any") == 503
    assert re.search(r"no_cluster: [1-9]", envoy.admin("/stats?filter=no_cluster"))


def status_of(port: int, host: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/", headers={"Host": host})
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_five_questions(world: World) -> None:
    """The commands of the page: what they ask is there, in the container that they name."""
    lines = block_for(PAGE, "test_the_five_questions").splitlines()
    assert all(line.split()[2:5] in (["POD", "-c", "loader"],) for line in lines)
    port = held_port()
    world.put(rds_yaml=routes())
    sidecar = world.start("--watch", "--configmap=envoy-xds", f"--listen=127.0.0.1:{port}")
    sidecar.wait_log("published.*changed=rds.yaml")
    python = shlex.split(lines[1].partition(" -- ")[2].replace("9902", str(port)))
    assert python[0] == "python3"
    done = subprocess.run([sys.executable, *python[1:]], capture_output=True, text=True, timeout=20)
    assert json.loads(done.stdout)["files"][0]["state"] == "unknown"
    shown = shlex.split(lines[2].partition(" -- ")[2].replace("/srv/runtime", str(world.out)))
    assert subprocess.check_output(shown, text=True) == routes()


def steady(line: str) -> str:
    """A line without what differs from run to run."""
    line = re.sub(r"^\S+Z (?=[A-Z]+ )", "", line)
    line = re.sub(r"(duration_ms|ack_ms|next_try_s)=[\d.N]+", r"\1=N", line)
    line = re.sub(r"_ssl\.c:\d+", "_ssl.c", line)
    line = re.sub(r"version=([0-9a-f]{16}|V)", "version=V", line)
    return re.sub(r"127\.0\.0\.1:\d+|10\.96\.0\.1:443", "SERVER", line)


@pytest.mark.parametrize("name", SYMPTOMS)
def test_the_log_says_so(name: str, world: World) -> None:
    shown = block_for(PAGE, "test_the_log_says_so", name).splitlines()
    log = SYMPTOMS[name](world).replace(str(world.out), "/srv/runtime")
    log = log.replace(str(world.tmp_path / "token"), f"{loader.SERVICE_ACCOUNT}/token")
    lines = [steady(line) for line in log.splitlines()]
    for line in shown:
        assert steady(line) in lines


def test_every_symptom_is_on_the_page() -> None:
    marked = [
        block.arguments[0]
        for block in blocks_of(PAGE)
        if block.target == f"{THIS}::test_the_log_says_so"
    ]
    assert sorted(marked) == sorted(SYMPTOMS)


def test_envoy_needs_a_node(tmp_path: Path) -> None:
    source = file_source(tmp_path / "cds.json")
    (tmp_path / "cds.json").write_text('{"resources": []}')
    config = tmp_path / "envoy.json"
    config.write_text(json.dumps({"dynamic_resources": {"cds_config": source}}))
    command = [envoy_path(), "-c", str(config), "--disable-hot-restart"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    shown = block_for(PAGE, "test_envoy_needs_a_node").strip()
    assert shown in done.stderr


def test_envoy_aborts_without_inotify_instances(tmp_path: Path) -> None:
    """In a user namespace of its own, whose limit is 8: nobody else on this machine notices."""
    unshare = ["unshare", "--user", "--map-root-user", "sh", "-c"]
    limit = "/proc/sys/user/max_inotify_instances"
    if subprocess.run([*unshare, f"echo 8 > {limit}"], capture_output=True).returncode != 0:
        pytest.skip("no user namespace can be made here")
    clusters = []
    for index in range(12):
        path = tmp_path / f"eds-{index}.json"
        path.write_text(response("assignment", assignment(f"c{index}", 9)))
        clusters.append(eds_cluster(f"c{index}", file_source(path)))
    config = tmp_path / "envoy.json"
    node = {"node": {"id": "x", "cluster": "x"}}
    config.write_text(json.dumps({**bootstrap(clusters=clusters), **node}))
    envoy = [envoy_path(), "-c", str(config), "--disable-hot-restart", "--concurrency", "1"]
    command = [*unshare, f'echo 8 > {limit} && exec "$@"', "sh", *envoy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == -signal.SIGABRT
    assert block_for(PAGE, "test_envoy_aborts_without_inotify_instances").strip() in done.stderr


def cpu_seconds(pid: int) -> float:
    """What a process used so far, whatever else runs on this machine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.bench
def test_yaml_costs_envoy_more_than_json(start_envoy: StartEnvoy, tmp_path: Path) -> None:
    """300 clusters of which one changes, five times."""

    def cost(extension: str) -> float:
        path = tmp_path / f"cds.{extension}"

        def write(change: int) -> None:
            made = [cluster(f"c{i}", *range(9000 + change * (i == 0), 9010)) for i in range(300)]
            text = response("cluster", *made)
            if extension == "yaml":
                text = yaml.dump(json.loads(text), Dumper=yaml.CSafeDumper)
            new = tmp_path / "new"
            new.write_text(text)
            new.rename(path)

        write(0)
        with start_envoy(bootstrap(dynamic_resources(cds=file_source(path)))) as envoy:
            before = cpu_seconds(envoy.pid)
            for count in range(1, 6):
                write(count % 2)
                envoy.wait_stat("cluster_manager.cds.update_success", count + 1, timeout=20)
            return cpu_seconds(envoy.pid) - before

    assert cost("yaml") > 1.2 * cost("json")


@pytest.mark.envoy
def test_the_check_that_asks_envoy(world: World) -> None:
    """example/check.py as --check-cmd: good files pass, bad ones are not published."""
    script = ROOT / "example" / "check.py"
    shown = block_for(PAGE, "test_the_check_that_asks_envoy").strip()
    option = shlex.split(shown)[-1]
    assert shown.startswith("envoy-xds-configmap-loader --watch --configmap envoy-xds --check-cmd ")
    option = option.replace("python3", sys.executable).replace("/etc/xds/check.py", str(script))
    path = f"{Path(envoy_path()).parent}:/usr/bin:/bin"
    good = {"name": "web", "type": "STATIC", "connect_timeout": "1s"}
    bad = {**good, "connect_timeout": "-1s"}
    data = {"cds.yaml": response("cluster", good)}
    world.api.configmap(NAMESPACE, "envoy-xds", data)
    check = [f"--check-cmd={option}"]
    sidecar = world.start("--watch", "--configmap=envoy-xds", *check, env={"PATH": path})
    sidecar.wait_log("published", 15)
    world.api.wait_watches(1)
    world.api.configmap(NAMESPACE, "envoy-xds", {"cds.yaml": response("cluster", bad)})
    sidecar.wait_log(r"--check-cmd .*rejects the files \(exit 1\): .*Invalid duration", 15)
    wait_files(world.out, data)


def test_every_symptom_is_shown_by_a_test() -> None:
    """Each has a sample that is compared, or names the test that reproduces it."""
    text = (ROOT / PAGE).read_text()
    sections = re.split(r"^##+ ", text, flags=re.M)
    symptoms = [part for part in sections if f"\n### {part}" in text]
    for table in re.findall(r"^\| symptom \|.*\n\| ---.*\n((?:\|.*\n)+)", text, re.M):
        symptoms += table.splitlines()
    assert len(symptoms) > 40
    for symptom in symptoms:
        assert re.search(r"tests/\w+\.py::\w+", symptom), symptom.splitlines()[0]

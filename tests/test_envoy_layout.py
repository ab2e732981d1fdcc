"""The real Envoy on the published layout: each way to subscribe that the manual promises.

End to end: scripted API server, the loader as a process, Envoy. What Envoy does with files in
layouts that are not the loader's is here too, because it is why the layout is as it is; the page
docs/envoy-files.md names these tests.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.conftest import StartEnvoy, StartLoader
from tests.support.apiserver import ApiServer
from tests.support.crash import Plan
from tests.support.disk import wait_converged
from tests.support.envoy import (
    Config,
    Envoy,
    assignment,
    bootstrap,
    cluster,
    dynamic_resources,
    eds_cluster,
    file_source,
    http_listener,
    inotify_instances,
    rds_routes,
    response,
)
from tests.support.loader import ROOT, Loader, wait_files, wait_until
from tests.support.ports import held_port

pytestmark = [pytest.mark.envoy, pytest.mark.xdist_group("inotify")]

STYLES = ("path", "source", "watched")
WATCH = ("--watch", "--configmap", "envoy-xds")
CHANGES = 100


def routes(text: str, version: str | None = None) -> str:
    """A RouteConfiguration that answers with `text`; its version_info is the text too."""
    answer = {"status": 200, "body": {"inline_string": text}}
    route = {"match": {"prefix": "/"}, "direct_response": answer}
    host = {"name": "all", "domains": ["*"], "routes": [route]}
    config = {"name": "routes", "virtual_hosts": [host]}
    return response("routes", config, version=text if version is None else version)


def source(style: str, out: Path, name: str = "rds.json") -> Config:
    """The three ways to subscribe to a file of `current/`."""
    path = out / "current" / name
    if style == "path":
        return file_source(path, old=True)
    return file_source(path, watched=out if style == "watched" else None)


class Served:
    """An Envoy with one listener a style; all read the same file."""

    def __init__(self, out: Path, styles: tuple[str, ...] = STYLES, *parts: Config) -> None:
        self.ports = {style: held_port() for style in styles}
        listeners = [
            http_listener(port, rds_routes(source(style, out)), name=style)
            for style, port in self.ports.items()
        ]
        self.bootstrap = bootstrap(*parts, listeners=listeners)
        self.envoy: Envoy | None = None
        self.loader: Loader | None = None

    def body(self, style: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[style], timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", "/")
            return connection.getresponse().read().decode()

    def wait_body(self, text: str, timeout: float = 5.0) -> None:
        for style in self.ports:
            wait_until(lambda: self.body(style) == text, timeout, f"{style} to serve {text}")  # noqa: B023

    def counts(self, name: str) -> dict[str, int]:
        assert self.envoy is not None
        return {style: self.envoy.count(f"http.{style}.rds.routes.{name}") for style in self.ports}

    def versions(self) -> dict[str, object]:
        assert self.envoy is not None
        stats = self.envoy.stats(r"rds\.routes\.version_text$")
        return {style: stats.get(f"http.{style}.rds.routes.version_text") for style in self.ports}


def put(api: ApiServer, text: str) -> None:
    api.configmap("demo", "envoy-xds", {"rds.json": routes(text)})


@pytest.fixture
def served(api: ApiServer, start_loader: StartLoader, start_envoy: StartEnvoy, out: Path) -> Served:
    """Running: the API server, a watching loader, an Envoy on what it published."""
    put(api, "first")
    found = Served(out)
    found.loader = start_loader(*WATCH)
    wait_files(out, {"rds.json": routes("first")})
    api.wait_watches(1)
    found.envoy = start_envoy(found.bootstrap)
    found.wait_body("first")
    return found


# -- what the layout promises


def test_each_way_to_subscribe_sees_a_change(served: Served, api: ApiServer) -> None:
    before = served.counts("update_attempt")
    put(api, "second")
    served.wait_body("second")
    assert served.versions() == dict.fromkeys(STYLES, "second")
    assert served.counts("update_attempt") == {style: n + 1 for style, n in before.items()}


def test_a_hundred_changes_in_a_row_are_all_seen(served: Served, api: ApiServer) -> None:
    """One after the other, each awaited: no change is lost, none is read twice."""
    before = served.counts("update_success")
    for number in range(CHANGES):
        put(api, f"n{number}")
        wanted = dict.fromkeys(STYLES, f"n{number}")
        wait_until(lambda: served.versions() == wanted, 5, f"all to have {wanted}")  # noqa: B023
    assert served.counts("update_success") == {s: n + CHANGES for s, n in before.items()}
    assert set(served.counts("update_rejected").values()) == {0}
    assert set(served.counts("update_failure").values()) == {0}


def test_the_last_of_a_hundred_changes_without_a_pause_is_served(
    served: Served, api: ApiServer
) -> None:
    """Bursts are gathered; whatever is left out in between, the last one is there."""
    for number in range(CHANGES):
        put(api, f"n{number}")
    served.wait_body(f"n{CHANGES - 1}")
    attempts = served.counts("update_attempt")
    time.sleep(0.3)  # nothing more comes
    assert served.counts("update_attempt") == attempts
    assert set(served.counts("update_failure").values()) == {0}


def test_a_file_that_did_not_change_is_not_read_again(
    api: ApiServer, start_loader: StartLoader, start_envoy: StartEnvoy, out: Path
) -> None:
    """Only who shares a watched_directory reads all of its files at each switch."""
    maps = {"rds.json": routes("first"), "other.json": "{}"}
    api.configmap("demo", "envoy-xds", maps)
    start_loader(*WATCH)
    wait_files(out, maps)
    served = Served(out)
    served.envoy = start_envoy(served.bootstrap)
    before = served.counts("update_attempt")
    api.configmap("demo", "envoy-xds", {**maps, "other.json": "[]"})
    wait_until(lambda: served.counts("update_attempt")["watched"] == before["watched"] + 1)
    assert served.counts("update_attempt") == {**before, "watched": before["watched"] + 1}


def test_a_runtime_layer_sees_a_change(
    api: ApiServer, start_loader: StartLoader, start_envoy: StartEnvoy, out: Path
) -> None:
    """`symlink_root: <output-dir>/..data`: each file is a key; a key that goes is gone."""
    api.configmap("demo", "flags", {"feature.percent": "10", "old.key": "1"})
    start_loader("--watch", "--configmap", "flags:flags")
    wait_files(out, {"flags/feature.percent": "10", "flags/old.key": "1"})
    disk = {"symlink_root": str(out / "..data"), "subdirectory": "flags"}
    layers = [{"name": "disk", "disk_layer": disk}, {"name": "admin", "admin_layer": {}}]
    envoy = start_envoy(bootstrap({"layered_runtime": {"layers": layers}}))

    def values() -> dict[str, str]:
        entries = json.loads(envoy.admin("/runtime"))["entries"]
        return {key: entry["final_value"] for key, entry in entries.items()}

    assert values() == {"feature.percent": "10", "old.key": "1"}
    for number in range(20):
        data = {"feature.percent": str(number), f"new.key{number}": "1"}
        api.configmap("demo", "flags", data)
        wait_until(lambda: values() == data, 5, f"the runtime {data}")  # noqa: B023
    # One that Envoy meets while it reloads must not be lost either.
    for number in range(20):
        api.configmap("demo", "flags", {"feature.percent": f"5{number}"})
    wait_until(lambda: values() == {"feature.percent": "519"})


def cds(out: Path, *names: str) -> str:
    clusters = [eds_cluster(name, file_source(out / f"current/eds/{name}.json")) for name in names]
    return response("cluster", *clusters)


def hosts(envoy: Envoy, name: str) -> list[int]:
    found = envoy.clusters().get(name, [])
    return sorted(one["address"]["socket_address"]["port_value"] for one in found)


def test_endpoints_in_a_subdirectory_and_a_new_cluster_are_seen(
    api: ApiServer, start_loader: StartLoader, start_envoy: StartEnvoy, out: Path
) -> None:
    """The new child file goes out before CDS names it: a missing one would be for ever."""
    api.configmap("demo", "envoy-xds", {"cds.json": cds(out, "a")})
    api.configmap("demo", "eds", {"a.json": response("assignment", assignment("a", 1001))})
    start_loader("--watch", "--configmap", "envoy-xds", "--configmap", "eds:eds")
    wait_until(lambda: (out / "current/eds/a.json").exists())
    for style in ("source", "watched"):
        dynamic = dynamic_resources(cds=source(style, out, "cds.json"))
        envoy = start_envoy(bootstrap(dynamic))
        wait_until(lambda: hosts(envoy, "a"))  # noqa: B023
        api.configmap("demo", "eds", {
            "a.json": response("assignment", assignment("a", 1002, 1003)),
            "b.json": response("assignment", assignment("b", 1004)),
        })  # fmt: skip
        wait_until(lambda: hosts(envoy, "a") == [1002, 1003])  # noqa: B023
        api.configmap("demo", "envoy-xds", {"cds.json": cds(out, "a", "b")})
        wait_until(lambda: hosts(envoy, "b") == [1004])  # noqa: B023
        assert envoy.count("cluster_manager.cds.update_rejected") == 0
        api.configmap("demo", "envoy-xds", {"cds.json": cds(out, "a")})
        api.configmap("demo", "eds", {"a.json": response("assignment", assignment("a", 1001))})
        wait_until(lambda: hosts(envoy, "a") == [1001])  # noqa: B023
        envoy.stop()


def test_a_directory_that_was_empty_is_still_watched(
    api: ApiServer, start_loader: StartLoader, start_envoy: StartEnvoy, out: Path
) -> None:
    """Envoy's watch is bound to the directory: had it been removed, nothing would ever come.

    A bootstrap alone names the file: where a file of ours names it, it stays.
    """
    eds = {"a.json": response("assignment", assignment("a", 1001))}
    api.configmap("demo", "envoy-xds", {"note.txt": "hello"})
    api.configmap("demo", "eds", eds, labels={"app": "x"})
    start_loader("--watch", "--configmap", "envoy-xds", "--configmap", "eds:eds")
    wait_until(lambda: (out / "current/eds/a.json").exists())
    static = eds_cluster("a", source("source", out, "eds/a.json"))
    envoy = start_envoy(bootstrap(clusters=[static]))
    wait_until(lambda: hosts(envoy, "a") == [1001])
    api.configmap("demo", "eds", {"other.json": "{}"})
    wait_until(lambda: not (out / "current/eds/a.json").is_symlink())
    assert hosts(envoy, "a") == [1001], "a file that goes changes nothing in Envoy"
    api.configmap("demo", "eds", {"a.json": response("assignment", assignment("a", 1002))})
    wait_until(lambda: hosts(envoy, "a") == [1002])


def test_a_predecessors_envoy_goes_on_without_a_restart(
    api: ApiServer, start_loader: StartLoader, start_envoy: StartEnvoy, out: Path
) -> None:
    """It watches `current/` with real files in it; the loader takes them over."""
    (out / "current").mkdir(parents=True)
    (out / "current/rds.json").write_text(routes("old"))
    served = Served(out, ("path", "source"))
    served.envoy = start_envoy(served.bootstrap)
    served.wait_body("old")
    put(api, "new")
    start_loader(*WATCH)
    served.wait_body("new")
    put(api, "newer")
    served.wait_body("newer")


# -- restarts


def test_envoy_may_restart_at_any_time(served: Served, api: ApiServer) -> None:
    """Killed in the middle of changes: it starts on a complete snapshot and sees the next one."""
    assert served.envoy is not None
    for number in range(4):
        for step in range(5):
            put(api, f"r{number}.{step}")
        served.envoy.restart(kill=number % 2 == 0)
        served.wait_body(f"r{number}.4")
        put(api, f"after{number}")
        served.wait_body(f"after{number}")
        assert set(served.counts("update_failure").values()) == {0}


def test_the_loader_may_restart_at_any_time(
    served: Served, api: ApiServer, start_loader: StartLoader, out: Path
) -> None:
    """Envoy goes on serving; what changed meanwhile is seen; what did not is not read again."""
    assert served.loader is not None
    running = served.loader
    for number in range(4):
        running.kill() if number % 2 else running.stop()
        put(api, f"gap{number}")
        assert served.body("source") != f"gap{number}"
        running = start_loader(*WATCH)
        served.wait_body(f"gap{number}")
        wait_converged(out)  # a publication that is cut short would be told again
        attempts = served.counts("update_attempt")
        running.kill()
        asked = len(api.requests)
        running = start_loader(*WATCH)
        api.requests.wait_for(lambda request: request.is_watch, since=asked)
        assert served.counts("update_attempt") == attempts, "nothing changed, nothing read"


def test_the_loader_may_be_killed_at_any_call_of_a_publication(
    served: Served, api: ApiServer, start_loader: StartLoader, common: list[str],
    out: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """Also between the switch and the moves, when every path is new and Envoy was not told."""
    assert served.loader is not None
    served.loader.stop()
    plan_file = tmp_path / "plan"
    crash = str(ROOT / "tests/support/crash.py")
    prefix = [sys.executable, "-I", "-S", crash, str(plan_file), str(out)]
    args = [*common, "--apiserver", api.url, *WATCH]
    untold = number = 0
    while True:
        plan_file.write_text("")
        asked = len(api.requests)
        with Loader(args, prefix=prefix) as doomed:
            api.requests.wait_for(lambda request: request.is_watch, since=asked)
            plan_file.write_text(json.dumps(Plan(number, "after", changing=True)) + "\n")
            put(api, f"k{number}")
            try:
                doomed.wait(2)
            except TimeoutError:
                break  # there is no such call: it was published in peace
        shown = json.loads((out / "current/rds.json").read_text())["version_info"]
        untold += shown == f"k{number}" != served.body("source")
        asked = len(api.requests)
        with start_loader(*WATCH) as healer:
            served.wait_body(f"k{number}")
            api.requests.wait_for(lambda request: request.is_watch, since=asked)
            healer.kill()
        number += 1
    assert number > 10
    assert untold >= 1, "one death was between the switch and the move"
    assert set(served.counts("update_failure").values()) == {0}


# -- what Envoy does in other layouts: why this one


def replace(path: Path, text: str) -> None:
    """As everybody does it: written beside, then renamed over."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.rename(path)


def stays(condition: Callable[[], bool], seconds: float = 0.3) -> bool:
    """Whether it holds for a while (Envoy needs 1 to 4 ms to see a move)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not condition():
            return False
        time.sleep(0.02)
    return True


def lay(out: Path, version: str) -> None:
    """A ConfigMap volume, as the kubelet writes it: `..data` swapped, the links never touched."""
    home = out / f"..{version}"
    home.mkdir(parents=True)
    (home / "rds.json").write_text(routes(version))
    (out / "..data_tmp").symlink_to(home.name)
    (out / "..data_tmp").rename(out / "..data")
    if not (out / "rds.json").is_symlink():
        (out / "rds.json").symlink_to("..data/rds.json")


def started(
    start_envoy: StartEnvoy, sources: Mapping[str, Config]
) -> tuple[Envoy, Callable[[str], str]]:
    """An Envoy with one listener a source, and how to ask each."""
    served = Served(Path("/nowhere"), ())
    served.ports = {name: held_port() for name in sources}
    listeners = [
        http_listener(served.ports[name], rds_routes(one), name=name)
        for name, one in sources.items()
    ]
    return start_envoy(bootstrap(listeners=listeners)), served.body


def test_a_configmap_volume_is_seen_only_with_a_watched_directory(
    start_envoy: StartEnvoy, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    lay(volume, "v1")
    _, body = started(start_envoy, {
        "path": file_source(volume / "rds.json", old=True),
        "source": file_source(volume / "rds.json"),
        "watched": file_source(volume / "rds.json", watched=volume),
    })  # fmt: skip
    lay(volume, "v2")
    wait_until(lambda: body("watched") == "v2")
    assert stays(lambda: body("path") == body("source") == "v1")


def test_a_directory_that_is_a_swapped_link_is_never_seen_again(
    start_envoy: StartEnvoy, tmp_path: Path
) -> None:
    """The watch sits on the directory that the link named when Envoy started."""
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "rds.json").write_text(routes(version))
    (tmp_path / "current").symlink_to("v1")
    path = tmp_path / "current/rds.json"
    _, body = started(start_envoy, {
        "source": file_source(path), "watched": file_source(path, watched=tmp_path),
    })  # fmt: skip
    (tmp_path / "new").symlink_to("v2")
    (tmp_path / "new").rename(tmp_path / "current")
    wait_until(lambda: body("watched") == "v2")
    assert stays(lambda: body("source") == "v1")
    replace(tmp_path / "v2/rds.json", routes("v3"))
    assert stays(lambda: body("source") == "v1"), "nor is a move in the new directory"


def write_in_place(path: Path, text: str) -> None:
    path.write_text(text)


def delete_and_create(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def touch(path: Path, text: str) -> None:
    path.write_text(text)
    path.touch()


def hard_link(path: Path, text: str) -> None:
    other = path.parent.parent / "linked"
    other.unlink(missing_ok=True)
    other.write_text(text)
    path.unlink()
    os.link(other, path)


def symbolic_link(path: Path, text: str) -> None:
    """`ln -sf`: unlink, then symlink."""
    other = path.parent.parent / "target"
    other.write_text(text)
    path.unlink()
    path.symlink_to(other)


def move_elsewhere(path: Path, text: str) -> None:
    """Only the directory of the path counts, not the one of the target of a link."""
    real = path.parent.parent / "real"
    real.mkdir(exist_ok=True)
    (real / "rds.json").write_text(text)
    replace(real / "rds.json", text)


@pytest.mark.parametrize(
    "way",
    [write_in_place, delete_and_create, touch, hard_link, symbolic_link, move_elsewhere],
    ids=lambda way: way.__name__,
)
def test_only_a_move_is_seen(
    start_envoy: StartEnvoy, tmp_path: Path, way: Callable[[Path, str], None]
) -> None:
    directory = tmp_path / "current"
    directory.mkdir()
    path = directory / "rds.json"
    path.write_text(routes("v1"))
    _, body = started(start_envoy, {
        "source": file_source(path), "watched": file_source(path, watched=directory),
    })  # fmt: skip
    way(path, routes("v2"))
    assert stays(lambda: body("source") == body("watched") == "v1")
    replace(path, routes("v3"))
    wait_until(lambda: body("source") == body("watched") == "v3")


def test_a_moved_link_is_seen_like_a_moved_file(start_envoy: StartEnvoy, tmp_path: Path) -> None:
    directory = tmp_path / "current"
    directory.mkdir()
    for version in ("v1", "v2"):
        (tmp_path / version).write_text(routes(version))
    path = directory / "rds.json"
    path.symlink_to("../v1")
    _, body = started(start_envoy, {"path": file_source(path, old=True), "s": file_source(path)})
    (directory / "tmp").symlink_to("../v2")
    (directory / "tmp").rename(path)
    wait_until(lambda: body("path") == body("s") == "v2")


def test_a_bad_file_leaves_the_last_one_serving(served: Served, api: ApiServer) -> None:
    for bad in ("", "{", routes("x", "y").replace('"name": "all"', '"nam": "all"'),
                routes("x").replace("[\n", "[null,\n")):  # fmt: skip
        before = served.counts("update_attempt")
        api.configmap("demo", "envoy-xds", {"rds.json": bad})
        wait_until(lambda: all(n > before[s] for s, n in served.counts("update_attempt").items()))  # noqa: B023
    put(api, "good")
    served.wait_body("good")


def test_a_missing_file_ends_envoy_at_its_start(start_envoy: StartEnvoy, out: Path) -> None:
    """Why the init container ends only when every file is complete."""
    (out / "current").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="must refer to an existing path"):
        start_envoy(Served(out, ("source",)).bootstrap)


def test_an_empty_file_at_the_start_is_live_with_nothing(
    start_envoy: StartEnvoy, out: Path
) -> None:
    """Live, and without any cluster: an init container that wrote half would not be noticed."""
    (out / "current").mkdir(parents=True)
    (out / "current/cds.json").write_text("")
    envoy = start_envoy(bootstrap(dynamic_resources(cds=source("source", out, "cds.json"))))
    assert envoy.admin("/ready").strip() == "LIVE"
    assert envoy.count("cluster_manager.cds.update_failure") == 1
    replace(out / "current/cds.json", response("cluster", cluster("a", 1)))
    wait_until(lambda: "a" in envoy.clusters())


def test_two_resources_in_one_eds_file_are_refused(start_envoy: StartEnvoy, out: Path) -> None:
    """Why it takes a file a cluster."""
    (out / "current/eds").mkdir(parents=True)
    both = response("assignment", assignment("a", 1001), assignment("b", 1002))
    (out / "current/eds/a.json").write_text(both)
    (out / "current/cds.json").write_text(cds(out, "a"))
    envoy = start_envoy(bootstrap(dynamic_resources(cds=source("source", out, "cds.json"))))
    assert envoy.count("cluster.a.update_rejected") == 1
    assert hosts(envoy, "a") == []


def test_a_child_file_that_comes_too_late_is_not_waited_for(
    start_envoy: StartEnvoy, out: Path
) -> None:
    """Why children go out in an earlier snapshot than what names them."""
    (out / "current/eds").mkdir(parents=True)
    path = out / "current/cds.json"
    path.write_text(response("cluster"))
    envoy = start_envoy(bootstrap(dynamic_resources(cds=source("source", out, "cds.json"))))
    replace(path, cds(out, "a"))
    envoy.wait_stat("cluster_manager.cds.update_rejected", 1)
    child = out / "current/eds/a.json"
    replace(child, response("assignment", assignment("a", 1001)))
    assert stays(lambda: "a" not in envoy.clusters())
    replace(path, cds(out, "a"))
    wait_until(lambda: hosts(envoy, "a") == [1001])


def test_each_file_costs_an_inotify_instance(start_envoy: StartEnvoy, out: Path) -> None:
    """Of which the kernel gives a user 128: the budget of EDS files."""
    (out / "current/eds").mkdir(parents=True)
    names = [f"c{number}" for number in range(8)]
    for name in names:
        text = response("assignment", assignment(name, 1001))
        (out / f"current/eds/{name}.json").write_text(text)
    (out / "current/cds.json").write_text(cds(out, *names))
    envoy = start_envoy(bootstrap(dynamic_resources(cds=source("source", out, "cds.json"))))
    assert inotify_instances(envoy.pid) >= len(names) + 1


# ---------------------------------------------------------------------------------------------
# What the admin interface tells


def reading(out: Path, stats: Config | None = None) -> Config:
    """A bootstrap that reads cds.json and lds.json, which are there and empty."""
    (out / "current").mkdir(parents=True)
    for name, kind in (("cds.json", "cluster"), ("lds.json", "listener")):
        (out / "current" / name).write_text(response(kind))
    sources = (source("source", out, "cds.json"), source("source", out, "lds.json"))
    return bootstrap(dynamic_resources(*sources), {"stats_config": stats} if stats else {})


@pytest.mark.parametrize("admin", ["tcp", "unix"])
def test_the_server_info_tells_one_process_from_another(
    admin: str, start_envoy: StartEnvoy, out: Path
) -> None:
    """Without any statistics: whether it is live, the seconds that it is up, and how often it was
    restarted hot."""
    envoy = start_envoy(reading(out), admin=admin)
    assert '"state": "LIVE"' in envoy.admin("/server_info")
    info = json.loads(envoy.admin("/server_info"))
    assert re.fullmatch(r"[0-9]+s", info["uptime_current_epoch"])
    assert info["command_line_options"]["restart_epoch"] == 0


def test_the_counters_that_were_used_tell_of_each_event(start_envoy: StartEnvoy, out: Path) -> None:
    """One attempt, and with it one success, rejection or failure."""
    envoy = start_envoy(reading(out))
    path = out / "current/cds.json"
    seen: list[dict[str, str]] = []
    twice = {**cluster("a", 1), "eds_cluster_config": {}}
    for text in (cds(out), response("cluster", cluster("a", 1)), "{", response("cluster", twice)):
        replace(path, text)
        attempt = len(seen) + 2
        envoy.wait_stat("cluster_manager.cds.update_attempt", attempt)
        lines = envoy.admin("/stats?usedonly&filter=cds%5C.update_").splitlines()
        counts = dict(line.split(": ") for line in lines if "histogram" not in line)
        seen.append({name.rpartition("_")[2]: value for name, value in counts.items()})
    shown = [{key: counts[key] for key in counts.keys() - {"time", "duration"}} for counts in seen]
    assert shown == [
        {"attempt": "2", "success": "2"},
        {"attempt": "3", "success": "3"},
        {"attempt": "4", "success": "3", "failure": "1"},
        {"attempt": "5", "success": "3", "failure": "1", "rejected": "1"},
    ]


@pytest.mark.parametrize("hidden", [False, True])
def test_the_config_dump_shows_a_stats_matcher(
    hidden: bool, start_envoy: StartEnvoy, out: Path
) -> None:
    """Nothing else tells a counter that is hidden from one that is not there."""
    patterns = {"exclusion_list": {"patterns": [{"prefix": "cluster_manager."}]}}
    envoy = start_envoy(reading(out, {"stats_matcher": patterns} if hidden else None))
    found = envoy.admin("/config_dump?mask=bootstrap.stats_config.stats_matcher")
    assert ('"stats_matcher"' in found) is hidden
    assert (envoy.stat("cluster_manager.cds.update_attempt") is None) is hidden


def test_the_config_dump_says_why_a_listener_was_rejected(
    start_envoy: StartEnvoy, out: Path
) -> None:
    envoy = start_envoy(reading(out))
    route = {"match": {"prefix": "/"}, "route": {"cluster": "nowhere"}}
    host = {"name": "all", "domains": ["*"], "routes": [route]}
    config = {"route_config": {"name": "r", "virtual_hosts": [host]}}
    replace(out / "current/lds.json", response("listener", http_listener(held_port(), config)))
    envoy.wait_stat("listener_manager.lds.update_rejected", 1)
    mask = "resource=dynamic_listeners&mask=name,error_state.details"
    found = json.loads(envoy.admin(f"/config_dump?{mask}"))
    assert "unknown cluster 'nowhere'" in found["configs"][0]["error_state"]["details"]

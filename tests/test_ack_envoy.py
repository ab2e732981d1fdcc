"""Files that the real Envoy NACKed: said with the reason, put back, and nothing else suffers."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

import loader
from tests.conftest import NewStage
from tests.support.admin import Odd, Relay
from tests.support.busy import in_time
from tests.support.disk import Inotify, fingerprint, wait_converged
from tests.support.envoy import (
    assignment,
    cluster,
    eds_cluster,
    file_source,
    http_listener,
    rds_routes,
    response,
)
from tests.support.load import Poller
from tests.support.loader import wait_until
from tests.support.long import times
from tests.support.stage import Stage, routes
from tests.support.tuned import tuned

pytestmark = [pytest.mark.envoy, pytest.mark.xdist_group("inotify")]


# ---------------------------------------------------------------------------------------------
# The table

Make = Callable[[Stage, str], str]


class Bad(NamedTuple):
    """A bad file: `content(stage, mark)`, where another mark gives other bytes."""

    path: str
    content: Make
    reason: str  # a pattern of what the log says


def text(content: str) -> Make:
    return lambda stage, mark: f"# {mark}\n{content}"


def cds(*extra: Callable[[Stage], dict[str, object]]) -> Make:
    """The good clusters and others."""
    return lambda stage, mark: response(
        "cluster", stage.cluster_a(), stage.cluster_e(), *(one(stage) for one in extra),
        version=mark,
    )  # fmt: skip


def rds(**changes: object) -> Make:
    return lambda stage, mark: response(
        "routes", {**routes({"/": "a", "/e": "e"}), **changes}, version=mark
    )


def hosts(*domains: str) -> list[dict[str, object]]:
    rows = [{"match": {"prefix": "/"}, "route": {"cluster": "a"}}]
    return [
        {"name": f"h{i}", "domains": [domain], "routes": rows} for i, domain in enumerate(domains)
    ]


def weighted(*weights: int) -> list[dict[str, object]]:
    split = [{"name": "a", "weight": weight} for weight in weights]
    route = {"match": {"prefix": "/"}, "route": {"weighted_clusters": {"clusters": split}}}
    return [{"name": "all", "domains": ["*"], "routes": [route]}]


def two_listeners(stage: Stage, mark: str) -> str:
    other = stage.listener("other")
    return response("listener", stage.listener(), other, version=mark)


def listener_without_routes(stage: Stage, mark: str) -> str:
    """It names an RDS file that nobody publishes."""
    lost = file_source(stage.out / "current/lost.yaml")
    other = http_listener(stage.extra_port, rds_routes(lost, "lost"), name="other")
    other["address"]["socket_address"]["address"] = "127.0.0.2"
    return response("listener", stage.listener(), other, version=mark)


def unknown_type(stage: Stage, mark: str) -> str:
    # Another version_info alone would be the same file on the way: it is united with the old one.
    kind = "type.googleapis.com/envoy.config.cluster.v3.Klaster"
    row = {"@type": kind, "name": "a", "alt_stat_name": mark}
    return json.dumps({"version_info": mark, "resources": [row]})


def two_assignments(stage: Stage, mark: str) -> str:
    port = stage.upstreams.ports[1]
    return response("assignment", assignment("e", port), assignment("f", port), version=mark)


def other_assignment(stage: Stage, mark: str) -> str:
    return response("assignment", assignment("other", stage.upstreams.ports[1]), version=mark)


TABLE = {
    "cds: bad yaml": Bad("cds.yaml", text("resources: [{"), ""),
    "cds: empty": Bad("cds.yaml", lambda stage, mark: " " * len(mark), "empty"),
    "cds: unknown type": Bad("cds.yaml", unknown_type, ""),
    "cds: version as a number": Bad("cds.yaml", text("version_info: 1\nresources: []"), ""),
    "cds: invalid duration": Bad(
        "cds.yaml", cds(lambda stage: cluster("b", 1, connect_timeout="1 second")), ""
    ),
    "cds: one bad cluster": Bad(
        "cds.yaml",
        cds(
            lambda stage: cluster("b", stage.upstreams.ports[2]),
            lambda stage: cluster("c", 1, lb_policy="CLUSTER_PROVIDED"),
        ),
        "c",
    ),
    "cds: missing child file": Bad(
        "cds.yaml",
        cds(lambda stage: eds_cluster("lost", file_source(stage.out / "current/lost.yaml"))),
        "lost",
    ),
    "rds: a host twice": Bad("rds.yaml", rds(virtual_hosts=hosts("x", "X")), ""),
    "rds: weights sum to 0": Bad("rds.yaml", rds(virtual_hosts=weighted(0, 0)), ""),
    "rds: weights too big": Bad("rds.yaml", rds(virtual_hosts=weighted(2**32 - 1, 1)), ""),
    "rds: another name": Bad("rds.yaml", rds(name="other"), ""),
    "rds: two resources": Bad(
        "rds.yaml",
        lambda stage, mark: response(
            "routes", routes({"/": "a"}), routes({"/": "a"}, "more"), version=mark
        ),
        "",
    ),
    "eds: two resources": Bad("eds-e.yaml", two_assignments, ""),
    "eds: another cluster": Bad("eds-e.yaml", other_assignment, ""),
    "eds: empty": Bad("eds-e.yaml", lambda stage, mark: " " * len(mark), "empty"),
    "lds: duplicate address": Bad("lds.yaml", two_listeners, "duplicate address|existing"),
    "lds: missing child file": Bad("lds.yaml", listener_without_routes, "lost.yaml"),
    "lds: bad yaml": Bad("lds.yaml", text("{"), ""),
    "lds: unknown cluster": Bad(
        "lds.yaml",
        lambda stage, mark: response("listener", stage.listener(to="nowhere"), version=mark),
        "nowhere",
    ),
}
COUNTS = r"update_(rejected|failure)$"


@pytest.mark.parametrize("row", TABLE)
def test_a_bad_file_alone_and_mixed_with_good_ones(row: str, stage: Stage) -> None:
    bad, good = TABLE[row], stage.files()
    stage.start()
    stage.await_served("v0", "v1", "v0")
    clusters = set(stage.envoy.clusters())

    # Alone: named with its reason, and Envoy is back where it was.
    stage.patch({bad.path: bad.content(stage, "m1")})
    said = rf"ERROR Envoy NACKed {bad.path} \([^)]*\): .*({bad.reason})"
    stage.log.wait_log(said)
    stage.await_files(good)
    wait_until(lambda: set(stage.envoy.clusters()) == clusters, 5, f"{clusters} again")
    assert stage.served() == ("v0", "v1", "v0")
    assert stage.asked("/readyz")[0] == 200

    # It is not tried again while other things change.
    rejected = sum(map(int, stage.envoy.stats(COUNTS).values()))
    other = "eds-e.yaml" if bad.path != "eds-e.yaml" else "rds.yaml"
    fresh = {"eds-e.yaml": stage.endpoints(2), "rds.yaml": rds()(stage, "v2")}[other]
    stage.patch({other: fresh})
    stage.await_files({**good, other: fresh})
    now = ("v0", "v2" if other == "eds-e.yaml" else "v1", "v0")
    stage.await_served(*now)
    assert sum(map(int, stage.envoy.stats(COUNTS).values())) == rejected
    assert stage.log.count_log("Envoy NACKed") == 1, stage.log.log

    # Mixed with a good change, in one go: the good one is served.
    since = len(stage.log.lines)
    stage.patch({bad.path: bad.content(stage, "m2+"), other: good[other]})
    stage.log.wait_log(said, since=since)
    stage.await_files(good)
    stage.await_served("v0", "v1", "v0")
    assert stage.asked("/readyz")[0] == 200

    # An Envoy that starts now is well.
    stage.envoy.restart(kill=True)
    stage.await_served("v0", "v1", "v0")
    assert set(stage.envoy.clusters()) == clusters

    # It is tried as soon as its bytes are others.
    mended = good[bad.path].replace("\n", "\n\n", 1)
    stage.patch({bad.path: mended})
    stage.await_files({bad.path: mended})
    stage.await_acked()
    stage.await_served("v0", "v1", "v0")
    wait_converged(stage.out)


@pytest.mark.parametrize("watched", [False, True], ids=["path", "watched_directory"])
def test_the_oldest_envoy_tells_the_same(
    watched: bool, envoy_binary: str, new_stage: NewStage
) -> None:
    """Of each kind a file that it rejects, then a change of all steps, with a killed Envoy."""
    stage: Stage = new_stage(watched=watched, binary=envoy_binary)
    stage.start()
    for row in ("cds: one bad cluster", "rds: a host twice", "eds: empty", "lds: bad yaml"):
        bad = TABLE[row]
        stage.patch({bad.path: bad.content(stage, "bad")})
        stage.log.wait_log(f"ERROR Envoy NACKed {bad.path}")
        stage.await_files(stage.files())
        stage.patch({bad.path: stage.files()[bad.path]})
        stage.await_acked()
    new = eds_cluster("n", stage.source("eds-n.yaml"))
    port = stage.upstreams.ports[2]
    with Poller(f"http://127.0.0.1:{stage.port}/e", interval=0.0) as poller:
        poller.wait_body("v1")
        stage.patch({
            "cds.yaml": response("cluster", stage.cluster_a(), new, version="n"),
            "eds-n.yaml": response("assignment", assignment("n", port)),
            "rds.yaml": response("routes", routes({"/": "a", "/e": "n"}), version="n"),
            "eds-e.yaml": None,
        })  # fmt: skip
        wait_until(lambda: stage.read("eds-e.yaml") is None)
        poller.wait_body("v2")
        assert not poller.failed
    for step in STEPS[1:]:
        stage.log.wait_log(f"step={step} .*ack=yes")
    stage.envoy.restart(kill=True)
    stage.await_acked()
    stage.await_served("v0", "v2", "v0")


# ---------------------------------------------------------------------------------------------
# What a NACK holds back, and what it does not


def more_clusters(stage: Stage, *extra: dict[str, object], mark: str) -> str:
    return response("cluster", stage.cluster_a(), stage.cluster_e(), *extra, version=mark)


def test_what_needs_the_nacked_file_waits_with_it(stage: Stage) -> None:
    """A route to a cluster that only the NACKed CDS has, while endpoints go on; later it comes."""
    stage.start()
    good = stage.files()
    bad = cluster("n", stage.upstreams.ports[2], lb_policy="CLUSTER_PROVIDED")
    route = response("routes", routes({"/": "a", "/e": "e", "/n": "n"}), version="n")
    stage.patch({
        "cds.yaml": more_clusters(stage, bad, mark="bad"),
        "rds.yaml": route,
        "eds-e.yaml": stage.endpoints(2),
    })  # fmt: skip
    stage.log.wait_log("Envoy NACKed cds.yaml")
    stage.log.wait_log("rds.yaml: waits for what Envoy NACKed")
    stage.await_served("v0", "v2", "v0")
    stage.await_files({**good, "eds-e.yaml": stage.endpoints(2)})
    assert stage.get("/n") == "v0"  # the old routes

    mended = cluster("n", stage.upstreams.ports[2])
    with Poller(f"http://127.0.0.1:{stage.port}/n") as poller:
        poller.wait_body("v0")
        stage.patch({"cds.yaml": more_clusters(stage, mended, mark="mended")})
        poller.wait_body("v2")
        assert not poller.failed  # the cluster before the route
    assert stage.read("rds.yaml") == route
    stage.await_acked()


def test_endpoints_stay_fresh_while_a_route_file_is_broken(stage: Stage) -> None:
    stage.start()
    stage.patch({"rds.yaml": "resources: {"})
    stage.log.wait_log("Envoy NACKed rds.yaml")
    with Poller(f"http://127.0.0.1:{stage.port}/e") as poller:
        poller.wait_body("v1")
        delays = []
        for i in range(20):
            upstream = 2 - i % 2
            began = time.monotonic()
            stage.patch({"eds-e.yaml": stage.endpoints(upstream)})
            delays.append(poller.wait_body(f"v{upstream}", after=began).time - began)
        assert not poller.failed
    in_time(sorted(delays)[10], 0.25, delays)
    assert stage.log.count_log("Envoy NACKed") == 1


def test_what_needs_a_new_child_that_is_nacked_waits(stage: Stage) -> None:
    """A new EDS file with two resources: no route goes to its cluster, which has no endpoint."""
    stage.start()
    good = stage.files()
    new = eds_cluster("n", stage.source("eds-n.yaml"))
    port = stage.upstreams.ports[2]
    stage.patch({
        "cds.yaml": more_clusters(stage, new, mark="n"),
        "eds-n.yaml": response("assignment", assignment("n", port), assignment("m", port)),
        "rds.yaml": response("routes", routes({"/": "a", "/e": "e", "/n": "n"}), version="n"),
    })  # fmt: skip
    stage.log.wait_log("Envoy NACKed eds-n.yaml")
    stage.log.wait_log("rds.yaml: waits for what Envoy NACKed")
    stage.patch({"eds-e.yaml": stage.endpoints(2)})
    stage.await_served("v0", "v2", "v0")
    stage.await_files({"rds.yaml": good["rds.yaml"]})
    assert stage.get("/n") == "v0"
    stage.envoy.restart(kill=True)
    stage.await_served("v0", "v2", "v0")
    stage.patch({"eds-n.yaml": response("assignment", assignment("n", port))})
    wait_until(lambda: stage.get("/n") == "v2", 5, "the new cluster is routed to")
    stage.await_acked()


def test_unknown_fields_are_taken_and_warned_about(stage: Stage) -> None:
    stage.start()
    typo = {**routes({"/": "a", "/e": "e"}), "virtual_hostz": []}
    stage.patch({"rds.yaml": response("routes", typo, version="typo")})
    stage.log.wait_log(r"WARNING .*unknown fields in rds.yaml.*")
    stage.await_acked()
    assert stage.log.count_log("NACKed") == 0


@pytest.mark.parametrize("signal", ["kill", "stop"])
def test_a_loader_that_starts_again_does_not_try_nacked_bytes(signal: str, stage: Stage) -> None:
    stage.start()
    good = stage.files()
    bad = rds(virtual_hosts=hosts("x", "x"))(stage, "bad")
    stage.patch({"rds.yaml": bad})
    stage.log.wait_log("Envoy NACKed rds.yaml")
    stage.await_files(good)
    stage.log.wait_log("step=rollback.*ack=yes")  # Envoy has been told, and has read
    wait_until(lambda: stage.states().get("eds-e.yaml") == "acked")
    before = stage.envoy.stats(COUNTS)
    with Inotify(stage.out, stage.out / "current") as watch:
        stage.restart_loader(kill=signal == "kill")
        stage.log.wait_log("rds.yaml: NACKed by Envoy")
        wait_until(lambda: stage.states().get("rds.yaml") == "nacked")
        time.sleep(0.5)  # nothing else shall happen
        # Counts of both kinds tell a new loader nothing: Envoy reads the good bytes once more.
        assert watch.moved() in ([], ["..data", "rds.yaml"])
    assert stage.envoy.stats(COUNTS) == before
    stage.await_files(good)
    stage.patch({"rds.yaml": rds()(stage, "mended")})
    stage.await_acked()
    assert stage.envoy.stat("http.ingress.rds.routes.version_text") == "mended"


# ---------------------------------------------------------------------------------------------
# An admin interface that does not help


NO_ANSWER = "WARNING Envoy (is not asked|does not answer)"
GARBAGE = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n"
SILENCE = 3.0  # in place of SILENT_BOUND
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
ODD: dict[str, Callable[[], Odd | None]] = {
    "nobody there": lambda: None,
    "silent": lambda: Odd(None),
    "not Envoy": lambda: Odd(GARBAGE),
    "not found": lambda: Odd(NOT_FOUND),
    "no HTTP": lambda: Odd(b"\x00\xff" * 50),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_admin_interface_that_does_not_help_delays_once(kind: str, stage: Stage) -> None:
    """Changes are served, in order, after --step-delay. What is silent may be an Envoy that
    stalls: it is waited for, once for 30 s (here for three)."""
    assert loader.SILENT_BOUND == 30.0
    stage.prefix = tuned({"SILENT_BOUND": SILENCE})
    odd = ODD[kind]()
    try:
        stage.start(admin=odd.url if odd else "http://127.0.0.1:9")
        stage.await_served("v0", "v1", "v0")
        with Poller(f"http://127.0.0.1:{stage.port}/") as poller:
            poller.wait_body("v0")
            delays = []
            for i in range(4):
                upstream = 1 + i % 2
                began = time.monotonic()
                new = cluster(f"n{i}", stage.upstreams.ports[upstream])
                stage.patch({
                    "cds.yaml": more_clusters(stage, new, mark=f"n{i}"),
                    "rds.yaml": response("routes", routes({"/": f"n{i}", "/e": "e"})),
                })  # fmt: skip
                delays.append(poller.wait_body(f"v{upstream}", after=began).time - began)
            assert not poller.failed
        in_time(delays[0], SILENCE + 1 if kind == "silent" else 3, delays)
        in_time(max(delays[1:]), 1.2, delays)  # --step-delay, and the steps themselves
        assert stage.log.count_log(NO_ANSWER) == 1, stage.log.log
        assert stage.asked("/readyz")[0] == 200
    finally:
        if odd:
            odd.close()


def test_an_admin_interface_that_is_slow_is_waited_for(stage: Stage) -> None:
    """0.4 s for each answer: steps are late by as much, in order, ACKed; NACKs are seen."""
    slow = Relay(stage.admin_url, 0.4)
    try:
        stage.start(admin=slow.url)
        stage.await_acked(15)
        with Poller(f"http://127.0.0.1:{stage.port}/") as poller:
            poller.wait_body("v0")
            began = time.monotonic()
            new = cluster("n", stage.upstreams.ports[1])
            stage.patch({
                "cds.yaml": more_clusters(stage, new, mark="n"),
                "rds.yaml": response("routes", routes({"/": "n", "/e": "e"})),
            })  # fmt: skip
            in_time(poller.wait_body("v1").time - began, 4.0)
            stage.patch({"rds.yaml": "resources: {", "eds-e.yaml": stage.endpoints(2)})
            stage.log.wait_log("Envoy NACKed rds.yaml")
            stage.await_served("v1", "v2", "v0")
            assert not poller.failed
        assert stage.log.count_log(NO_ANSWER) <= 1  # before Envoy was there
    finally:
        slow.close()


def test_an_admin_interface_that_comes_late_is_asked_about_what_is_published(stage: Stage) -> None:
    stage.start(admin=stage.admin_url)
    stage.await_acked()
    stage.envoy.stop(kill=True)
    stage.log.wait_log(NO_ANSWER)
    stage.patch({"eds-e.yaml": stage.endpoints(2)})
    wait_until(lambda: stage.states().get("eds-e.yaml") == "unknown")
    stage.envoy.start()
    stage.await_served("v0", "v2", "v0")
    stage.await_acked(15)


def test_a_file_that_is_repaired_on_disk_is_judged_again(stage: Stage) -> None:
    """Envoy is notified of it, so what it counts next is about that."""
    stage.start()
    with stage.envoy.paused():
        damaged = (stage.out / "current/rds.yaml").resolve()
        damaged.write_text(damaged.read_text() + " ")
        stage.log.process.send_signal(signal.SIGHUP)
        stage.log.wait_log("repaired on disk: rds.yaml")
        wait_until(lambda: stage.states()["rds.yaml"] == "unknown")
    stage.await_acked()


# ---------------------------------------------------------------------------------------------
# Restarts


def test_envoy_may_restart_at_any_moment(stage: Stage) -> None:
    """Also within a step, also while a bad file is tried: it comes up, and serves the last."""
    rng = random.Random(4)
    stage.start()
    for i in range(6):
        upstream = 1 + i % 2
        new = cluster(f"n{i}", stage.upstreams.ports[upstream])
        files = {
            "cds.yaml": more_clusters(stage, new, mark=f"n{i}"),
            "rds.yaml": response("routes", routes({"/": f"n{i}", "/e": "e"}), version=f"n{i}"),
        }
        if i % 3 == 2:
            bad = rds(virtual_hosts=hosts("x", "x"))(stage, f"bad{i}")
            stage.patch({"cds.yaml": files["cds.yaml"], "rds.yaml": bad})
        else:
            stage.patch(files)
        time.sleep(rng.random() * 0.05)
        stage.envoy.restart(kill=True)
        stage.patch(files)
        stage.await_served(f"v{upstream}", "v1", "v0", timeout=15)
        stage.await_acked(20)
        stage.await_files(files)
    wait_converged(stage.out)


STEPS = ("children", "clusters", "references", "removals")


@pytest.mark.parametrize("asked", [False, True], ids=["not asked", "asked"])
@pytest.mark.parametrize("step", STEPS)
def test_a_loader_that_dies_between_steps_goes_on(step: str, asked: bool, stage: Stage) -> None:
    """Killed right after each step; no request is lost while another one takes over."""
    stage.start(*(() if asked else ("--step-delay", "200ms")), admin="" if asked else None)
    stage.await_served("v0", "v1", "v0")
    new = eds_cluster("n", stage.source("eds-n.yaml"))
    port = stage.upstreams.ports[2]
    wanted = {
        "cds.yaml": response("cluster", stage.cluster_a(), new, version="n"),
        "eds-n.yaml": response("assignment", assignment("n", port)),
        "rds.yaml": response("routes", routes({"/": "a", "/e": "n"}), version="n"),
    }
    with Poller(f"http://127.0.0.1:{stage.port}/e", interval=0.0) as poller:
        poller.wait_body("v1")
        stage.patch({**wanted, "eds-e.yaml": None})
        stage.log.wait_log(f"published.*step={step}")
        stage.restart_loader()
        stage.await_files(wanted)
        wait_until(lambda: stage.read("eds-e.yaml") is None, 10, "the old endpoints are gone")
        poller.wait_body("v2")
        time.sleep(0.1)
        assert not poller.failed
    if asked:
        stage.await_acked()
    wait_until(lambda: set(stage.envoy.clusters()) == {"a", "n"}, 5, "the old cluster is gone")
    counts = stage.envoy.stats(COUNTS)
    assert not any(counts.values()), counts
    wait_converged(stage.out)


def test_a_loader_that_starts_again_does_not_disturb(stage: Stage) -> None:
    """Nothing changed: no event, nothing written but the state; Envoy reads nothing again."""
    stage.start()
    stage.await_served("v0", "v1", "v0")
    wait_converged(stage.out)
    attempts = stage.envoy.stats("update_attempt")
    before = fingerprint(stage.out / "current")
    with Inotify(stage.out, stage.out / "current") as watch:
        for kill in (True, False, True):
            stage.restart_loader(kill=kill)
            wait_until(lambda: set(stage.states()) == set(stage.files()))
            stage.await_acked()
        time.sleep(0.3)  # nothing shall happen
        assert watch.events() == []
    assert stage.envoy.stats("update_attempt") == attempts
    assert fingerprint(stage.out / "current") == before


@pytest.mark.parametrize("watched", [False, True], ids=["path", "watched_directory"])
def test_both_start_at_once_on_an_empty_directory(
    watched: bool, new_stage: NewStage
) -> None:
    """As a kubelet does it that starts Envoy again whenever it ends: it ends well, each time."""
    for attempt in range(3):
        stage: Stage = new_stage(place=str(attempt), watched=watched)
        stage.patch(stage.files())
        stage.start_loader()
        for _ in range(50):
            with contextlib.suppress(RuntimeError):  # Envoy exited: a file is missing
                stage.envoy.start()
                break
        stage.await_served("v0", "v1", "v0")
        stage.await_acked(15)
        stage.patch({"eds-e.yaml": stage.endpoints(2)})
        stage.await_served("v0", "v2", "v0")
        counts = stage.envoy.stats(COUNTS)
        assert not any(counts.values()), counts
        stage.stack.close()


def test_a_native_sidecar_is_waited_for(stage: Stage) -> None:
    """Envoy starts once /readyz says 200: it never ends, and has everything at once."""
    stage.start_loader()
    wait_until(lambda: stage.log.count_log("waiting for configmap"), 5, "it waits")
    assert stage.asked("/readyz")[0] == 503
    stage.patch(stage.files())
    wait_until(lambda: stage.asked("/readyz")[0] == 200, 5, "ready")
    stage.envoy.start()
    assert stage.served() == ("v0", "v1", "v0")
    stage.await_acked(15)


# ---------------------------------------------------------------------------------------------
# All of it at once


@pytest.mark.parametrize("seed", range(1, 1 + times(2, long=12)))
@pytest.mark.parametrize("watched", [False, True], ids=["path", "watched_directory"])
def test_no_request_is_lost_over_random_good_and_bad_changes(
    watched: bool, seed: int, new_stage: NewStage
) -> None:
    """Up to two bad files and good ones in each change, most of them before the last is settled."""
    good_and_bad(random.Random(seed), new_stage(watched=watched))


def good_and_bad(rng: random.Random, stage: Stage) -> None:
    stage.start()
    first, rest = f"http://127.0.0.1:{stage.port}", f"http://127.0.0.1:{stage.extra_port}"
    with Poller(f"{first}/") as one, Poller(f"{first}/e") as two, Poller(f"{rest}/") as three:
        for i in range(25):
            bad = bad_files(stage, rng, f"b{i}")
            good = good_files(stage, rng, f"g{i}", routed="cds.yaml" not in bad)
            stage.patch({**good, **bad})
            time.sleep(rng.choice((0.0, 0.02, 0.1, 0.3)))
        last = {**stage.files(), **good_files(stage, rng, "last")}
        stage.patch(last)
        stage.await_files(last, 30)
        stage.await_acked(30)
        for poller in (one, two, three):
            assert len(poller.answers) > 100
            assert not poller.failed, poller.failed[:5]
    assert stage.log.count_log("Envoy NACKed") > 3
    wait_converged(stage.out)


def good_files(
    stage: Stage, rng: random.Random, mark: str, *, routed: bool = True
) -> dict[str, str]:
    """A cluster that comes, perhaps with a route to it; one that is replaced; other endpoints."""
    ports = stage.upstreams.ports
    new, old = cluster(mark, rng.choice(ports)), cluster("a", rng.choice(ports))
    return {
        "cds.yaml": response("cluster", old, stage.cluster_e(), new, version=mark),
        "rds.yaml": response(
            "routes", routes({"/": mark if routed else "a", "/e": "e"}), version=mark
        ),
        "eds-e.yaml": stage.endpoints(rng.randrange(3)),
        "lds.yaml": response("listener", stage.listener(), version=mark),
    }


def bad_files(stage: Stage, rng: random.Random, mark: str) -> dict[str, str]:
    rows = rng.sample(sorted(TABLE), rng.randint(0, 2))
    return {TABLE[row].path: TABLE[row].content(stage, mark) for row in rows}

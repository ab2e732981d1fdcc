"""Faults that were there once, each seen on the real Envoy: none of them comes back."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

import loader
from tests.conftest import NewStage
from tests.support.busy import in_time, within
from tests.support.disk import wait_converged
from tests.support.envoy import (
    Config,
    assignment,
    cluster,
    eds_cluster,
    http_listener,
    rds_routes,
    response,
)
from tests.support.load import Poller
from tests.support.loader import run, wait_until
from tests.support.ports import held_port
from tests.support.stage import Stage, routes
from tests.support.tuned import tuned

pytestmark = [pytest.mark.envoy, pytest.mark.xdist_group("inotify")]

BROKEN = "resources: {"
GOOD = ("v0", "v1", "v0")  # what Stage serves


def clusters(stage: Stage, *extra: Config, a: bool = True, mark: str = "") -> str:
    """A CDS file of the good clusters, and others."""
    own = [stage.cluster_a()] if a else []
    return response("cluster", *own, stage.cluster_e(), *extra, version=mark)


def bad_cluster(name: str = "bad") -> Config:
    return cluster(name, 1, lb_policy="CLUSTER_PROVIDED")


def to(**more: str) -> str:
    """An RDS file: `/` to a and `/e` to e as ever, and others."""
    found = {"/": "a", "/e": "e"} | {f"/{name}": cluster for name, cluster in more.items()}
    return response("routes", routes(found), version="-".join(more))


def silent_cluster(name: str, port: int) -> Config:
    """It warms for as long as its health check has no answer."""
    check = {
        "timeout": "20s",
        "interval": "20s",
        "unhealthy_threshold": 1,
        "healthy_threshold": 1,
        "http_health_check": {"path": "/"},
    }
    return cluster(name, port, health_checks=[check])


# ---------------------------------------------------------------------------------------------
# Order and NACK


def test_fault_01_two_nacks_do_not_chase_each_other(stage: Stage) -> None:
    """The routes that stay name a cluster that a rejected CDS file drops."""
    stage.start()
    stage.patch({"rds.yaml": BROKEN})
    stage.log.wait_log("NACKed rds.yaml")
    stage.patch({"cds.yaml": clusters(stage, bad_cluster(), a=False)})
    stage.log.wait_log("NACKed cds.yaml")
    time.sleep(1.0)  # in which there were 300 publications
    assert stage.log.count_log("published") <= 7
    assert stage.log.count_log("NACKed [a-z]+.yaml") == 2
    stage.await_served(*GOOD)
    stage.patch(stage.files())
    stage.await_acked()


def test_fault_02_a_listener_is_tried_again_once_its_cluster_is_there(stage: Stage) -> None:
    stage.start()
    stage.patch({"lds.yaml": response("listener", stage.listener(to="late"))})
    stage.log.wait_log("NACKed lds.yaml")
    stage.await_served(*GOOD)
    stage.patch({"cds.yaml": clusters(stage, cluster("late", stage.upstreams.ports[2]))})
    stage.await_served("v0", "v1", "v2")
    stage.await_acked()


def test_fault_03_endpoints_inside_cds_do_not_wait_for_a_cluster_that_warms(stage: Stage) -> None:
    assert loader.WARM_BOUND == 5.0
    stage.prefix = tuned({"WARM_BOUND": 2.0})
    stage.start()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        warming = silent_cluster("w", mute.getsockname()[1])
        stage.patch({"cds.yaml": clusters(stage, warming), "rds.yaml": to(w="w")})
        wait_until(lambda: stage.envoy.count("cluster_manager.warming_clusters") == 1)
        moved = cluster("a", stage.upstreams.ports[2])
        with Poller(f"http://127.0.0.1:{stage.port}/") as poller:
            began = time.monotonic()
            stage.patch({"cds.yaml": clusters(stage, warming, moved, a=False)})
            in_time(poller.wait_body("v2").time - began, 0.5)
            assert stage.read("rds.yaml") == stage.files()["rds.yaml"]  # it waits, for a while
            stage.await_files({"rds.yaml": to(w="w")})
            assert not poller.failed


# ---------------------------------------------------------------------------------------------
# Unknown is never called ACKed


class Filtered(Stage):
    """An Envoy whose stats_matcher leaves out what begins so."""

    prefixes: tuple[str, ...] = ()

    def bootstrap(self) -> Config:
        patterns = [{"prefix": prefix} for prefix in self.prefixes]
        matcher = {"exclusion_list": {"patterns": patterns}}
        return {**super().bootstrap(), "stats_config": {"stats_matcher": matcher}}


class Deaf(Filtered):
    prefixes = ("cluster_manager.", "listener_manager.", "http.")


class WithoutServer(Filtered):
    prefixes = ("server.",)


def test_fault_04_what_a_stats_matcher_hides_is_unknown(new_stage: NewStage) -> None:
    stage: Deaf = new_stage(Deaf)
    stage.patch(stage.files())
    stage.start_loader("--step-delay", "100ms")
    wait_until(lambda: (stage.out / "current/lds.yaml").exists())
    stage.envoy.start()
    stage.log.wait_log("WARNING .*rds.yaml.* unknown.*stats_matcher")
    since = len(stage.log.lines)
    bad = clusters(stage, bad_cluster())
    stage.patch({"cds.yaml": bad, "rds.yaml": to(x="a")})
    stage.log.wait_log("published .*rds.yaml.* ack=unknown", since=since)
    stage.await_files({"cds.yaml": bad, "rds.yaml": to(x="a")})
    time.sleep(0.5)
    found = stage.states()
    assert found == {"eds-e.yaml": "acked"} | dict.fromkeys(
        ("cds.yaml", "lds.yaml", "rds.yaml"), "unknown"
    )
    assert stage.asked("/startz")[0] == 200
    # What it does tell counts.
    stage.patch({"eds-e.yaml": BROKEN})
    stage.log.wait_log("NACKed eds-e.yaml")
    assert stage.log.count_log("does not answer|ack=yes .*rds") == 0


def test_fault_04_nothing_of_the_server_is_needed(new_stage: NewStage) -> None:
    stage: WithoutServer = new_stage(WithoutServer)
    stage.start()
    stage.patch({"rds.yaml": BROKEN})
    stage.log.wait_log("NACKed rds.yaml")
    stage.patch({"rds.yaml": to(x="a")})
    stage.await_acked()
    assert stage.log.count_log("does not answer|unknown: ") == 0


class Half(Stage):
    """Two listeners read rds.yaml; one of them is never told that it changed."""

    def bootstrap(self) -> Config:
        config = super().bootstrap()
        self.second_port = held_port()
        elsewhere = self.out.parent / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        source = self.source("rds.yaml")
        source["path_config_source"]["watched_directory"] = {"path": str(elsewhere)}
        second = http_listener(self.second_port, rds_routes(source), name="second")
        config["static_resources"]["listeners"].append(second)
        return config


def test_fault_05_one_of_two_subscriptions_is_not_enough(new_stage: NewStage) -> None:
    stage: Half = new_stage(Half)
    stage.start()
    stage.patch({"rds.yaml": to(x="e")})
    wait_until(lambda: stage.get("/x") == "v1")
    stage.log.wait_log("WARNING Envoy did not read rds.yaml in time")
    stage.log.wait_log("published .*changed=rds.yaml.* ack=unknown")
    assert stage.get("/x", stage.second_port) == "v0"
    assert stage.states()["rds.yaml"] == "unknown"
    # One NACK is a NACK.
    stage.patch({"rds.yaml": BROKEN})
    stage.log.wait_log("NACKed rds.yaml")
    # Nobody waits for it a second time.
    with within(1.5):
        for i in range(3):
            stage.patch({"eds-e.yaml": stage.endpoints(2 - i % 2)})
            stage.await_files({"eds-e.yaml": stage.endpoints(2 - i % 2)})
        # (Counted as well: on a busy machine the bound above skips, and a count does not.)
        assert stage.log.count_log("Envoy did not read rds.yaml") == 1


def test_fault_05_a_repair_that_not_all_read_is_told(new_stage: NewStage) -> None:
    """It is asked about with a bound, as a publication is."""
    stage: Half = new_stage(Half)
    stage.start()
    damaged = (stage.out / "current/rds.yaml").resolve()
    damaged.write_text(damaged.read_text() + " ")
    stage.log.process.send_signal(signal.SIGHUP)
    stage.log.wait_log("repaired on disk: rds.yaml")
    stage.log.wait_log("WARNING Envoy did not read rds.yaml in time")
    wait_until(lambda: stage.states()["rds.yaml"] == "unknown")


def test_fault_05_a_file_that_nobody_reads_is_not_acked(stage: Stage) -> None:
    stage.start()
    for mark in "ab":
        lonely = response("assignment", assignment(f"x{mark}", 1))
        with within(1.0):
            stage.patch({"eds-x.yaml": lonely, "rds.yaml": to(**{mark: "e"})})
            stage.await_files({"rds.yaml": to(**{mark: "e"})})
        wait_until(lambda: stage.states().get("eds-x.yaml") == "unread")
        stage.patch({"eds-x.yaml": lonely + "\n"})
        stage.log.wait_log("published .*changed=eds-x.yaml.* ack=unknown .* unread=eds-x.yaml")


# ---------------------------------------------------------------------------------------------
# Rollback


def test_fault_06_a_rollback_does_not_wait_for_check_cmd(stage: Stage, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nsleep 1\n")
    slow.chmod(0o755)
    stage.patch(stage.files())
    stage.start_loader("--check-cmd", str(slow))
    wait_until(lambda: (stage.out / "current/lds.yaml").exists())
    stage.envoy.start()
    stage.await_acked()
    stage.patch({"rds.yaml": BROKEN})
    stage.log.wait_log("NACKed rds.yaml")
    with within(0.5):
        stage.await_files(stage.files())


def test_fault_06_a_rollback_does_not_wait_for_the_sources(stage: Stage) -> None:
    """Nobody was there to reject the file when it came; now a source is missing."""
    stage.start()
    stage.envoy.stop()
    stage.patch({"rds.yaml": BROKEN})
    stage.await_files({"rds.yaml": BROKEN})
    assert stage.loader
    stage.loader.stop()
    stage.start_loader("--configmap", "missing")
    stage.log.wait_log("waiting for configmap demo/missing")
    stage.envoy.start()
    stage.log.wait_log("NACKed rds.yaml")
    stage.await_files(stage.files())
    stage.await_served(*GOOD)


# ---------------------------------------------------------------------------------------------
# What nobody has to wait for


def test_fault_09_a_note_beside_the_routes_costs_no_pause(stage: Stage) -> None:
    stage.start("--step-delay", "1s", admin=None)
    time.sleep(1.1)
    for i in range(3):
        changed = {"note.txt": str(i), "rds.yaml": to(**{f"x{i}": "a"})}
        with within(0.5):
            stage.patch(changed)
            stage.await_files(changed)


def test_fault_11_a_thousand_eds_files_cost_one_look(stage: Stage) -> None:
    stage.start()
    for part in range(10):
        rows = {
            f"{part}-{i}.yaml": response("assignment", assignment(f"{part}-{i}", 1))
            for i in range(100)
        }
        stage.client.configmap("demo", f"many-{part}", rows)
    assert stage.loader
    stage.loader.stop()
    many = [word for part in range(10) for word in ("--configmap", f"many-{part}:eds")]
    stage.start_loader(*many)
    wait_until(lambda: len(stage.states()) == 1004, 20)
    stage.await_acked(20)
    before = stage.loader.cpu()
    for i in range(10):
        changed = {"eds-e.yaml": stage.endpoints(2 - i % 2)}
        stage.patch(changed)
        stage.await_files(changed)
    stage.await_acked()
    assert stage.loader.cpu() - before < 1.5


# ---------------------------------------------------------------------------------------------
# New files, new Envoys

ORDERS = ("loader first", "Envoy first", "both at once")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("path", ["rds.yaml", "cds.yaml", "lds.yaml"])
def test_fault_12_the_very_first_files_may_be_nacked(path: str, order: str, stage: Stage) -> None:
    stage.patch(stage.files(**{path.removesuffix(".yaml"): BROKEN}))
    if order == "Envoy first":
        run([*stage.arguments(), "--onetime"])
        stage.envoy.start(wait=False)
        stage.envoy.wait_ready()
        stage.start_loader()
    else:
        stage.start_loader()
        if order == "loader first":
            wait_until(lambda: (stage.out / f"current/{path}").exists())
        for _ in range(100):
            with contextlib.suppress(RuntimeError):  # Envoy exited: a file is not there yet
                stage.envoy.start()
                break
    stage.log.wait_log(f"ERROR Envoy NACKed {path}")
    wait_until(lambda: stage.states().get(path) == "nacked")
    assert stage.asked("/startz")[0] == 503
    status, body = stage.asked("/readyz")
    assert status == 200
    assert f"nacked: {path}" in body
    row = f'xds_loader_nacked_files{{file="{path}"}} 1'
    wait_until(lambda: row in stage.asked("/metrics")[1])
    stage.patch(stage.files())
    stage.await_acked()
    wait_until(lambda: stage.asked("/startz")[0] == 200)
    wait_until(lambda: row not in stage.asked("/metrics")[1])
    stage.log.wait_log(f"INFO warning over: {path}")
    stage.await_served(*GOOD)


def test_fault_13_a_key_that_envoy_reads_goes_and_comes_back(stage: Stage) -> None:
    stage.start()
    stage.patch({"lds.yaml": None, "rds.yaml": None, "routes.yaml": BROKEN})
    stage.log.wait_log("WARNING lds.yaml: its source is gone")
    stage.log.wait_log("WARNING rds.yaml: its source is gone")
    stage.envoy.restart(kill=True)
    stage.await_served(*GOOD)
    # Not even a new loader that does not know this Envoy forgets it, nor one without Envoy.
    stage.restart_loader()
    stage.await_served(*GOOD)
    stage.envoy.stop()
    stage.restart_loader()
    stage.log.wait_log("rds.yaml: its source is gone")
    stage.envoy.start()
    stage.await_served(*GOOD)
    again = response("listener", stage.listener(to="e"))
    stage.patch({"lds.yaml": again, "rds.yaml": to(x="e"), "routes.yaml": None})
    stage.await_served("v0", "v1", "v1")
    stage.await_acked()
    assert set(stage.states()) == set(stage.files())


def test_fault_13_a_nack_is_not_blamed_on_another_name(stage: Stage) -> None:
    stage.start()
    stage.patch({"rds.yaml": BROKEN})
    stage.log.wait_log("NACKed rds.yaml")
    stage.patch({"rds.yaml": None, "routes.yaml": stage.files()["rds.yaml"]})
    stage.await_files({"routes.yaml": stage.files()["rds.yaml"]})
    time.sleep(0.3)
    assert stage.log.count_log("NACKed routes.yaml") == 0
    stage.await_served(*GOOD)


class Mortal(Stage):
    """An Envoy for which few inotify instances are left: with one too many it ends by SIGABRT.
    Whoever runs it starts it again, always."""

    limit = 5

    def live(self) -> None:
        self.ended = 0
        self.envoy.command = [
            *("unshare", "--user", "--map-root-user", "sh", "-c"),
            f'echo {self.limit} > /proc/sys/user/max_inotify_instances; exec "$@"',
            *("sh", *self.envoy.command),
        ]
        self.running = True
        thread = threading.Thread(target=self._keep, daemon=True)
        thread.start()
        self.stack.callback(thread.join, 10)
        self.stack.callback(setattr, self, "running", False)

    def _keep(self) -> None:
        while self.running:
            self.envoy.start(wait=False)
            assert self.envoy.process
            while self.running and self.envoy.process.poll() is None:
                time.sleep(0.01)
            self.ended += self.envoy.process.poll() is not None
            time.sleep(0.2)


def may_limit_inotify() -> bool:
    words = ["unshare", "--user", "--map-root-user", "sh", "-c"]
    with contextlib.suppress(OSError):
        limit = "echo 100 > /proc/sys/user/max_inotify_instances"
        return not subprocess.run([*words, limit], capture_output=True, check=False).returncode
    return False


@pytest.mark.skipif(not may_limit_inotify(), reason="no user namespaces here")
def test_fault_14_bytes_that_end_envoy_are_nacked(new_stage: NewStage) -> None:
    stage: Mortal = new_stage(Mortal)
    stage.patch(stage.files())
    stage.start_loader()
    wait_until(lambda: (stage.out / "current/lds.yaml").exists())
    stage.live()
    stage.await_acked()
    more = {f"eds-m{i}.yaml": response("assignment", assignment(f"m{i}", 1)) for i in range(4)}
    extra = [eds_cluster(f"m{i}", stage.source(f"eds-m{i}.yaml")) for i in range(4)]
    stage.patch({"cds.yaml": clusters(stage, *extra), "rds.yaml": to(m="m1"), **more})
    stage.log.wait_log("ERROR Envoy NACKed cds.yaml .*: Envoy ended twice on it", 30)
    stage.await_served(*GOOD, timeout=20)
    ended = stage.ended
    assert 2 <= ended <= 8
    wait_until(lambda: stage.states().get("cds.yaml") == "nacked")
    time.sleep(2.0)
    assert stage.ended == ended
    stage.await_files({"cds.yaml": stage.files()["cds.yaml"]})
    stage.patch({"cds.yaml": clusters(stage, mark="mended"), "rds.yaml": to(x="e")})
    wait_until(lambda: stage.get("/x") == "v1")
    assert stage.ended == ended


def test_fault_15_onetime_leaves_out_what_was_nacked(stage: Stage) -> None:
    stage.start()
    stage.patch({"rds.yaml": BROKEN})
    stage.log.wait_log("NACKed rds.yaml")
    stage.await_files(stage.files())
    assert stage.loader
    stage.loader.kill()
    stage.patch({"eds-e.yaml": stage.endpoints(2)})
    done = run([*stage.arguments(), "--onetime"])
    assert done.returncode == 0, done.stderr
    stage.await_files(stage.files(**{"eds-e": stage.endpoints(2)}))
    stage.await_served("v0", "v2", "v0")
    # NACKed bytes that were not rolled back yet are, in the first place.
    stage.restart_loader()
    wait_until(lambda: stage.states().get("rds.yaml") == "nacked")


def test_fault_15_onetime_goes_by_the_steps(stage: Stage) -> None:
    stage.start(admin=None)
    stage.await_served(*GOOD)
    assert stage.loader
    stage.loader.stop()
    with Poller(f"http://127.0.0.1:{stage.port}/", interval=0.0) as poller:
        for i in range(2):
            new = cluster(f"n{i}", stage.upstreams.ports[1 + i])
            files = {
                "cds.yaml": response("cluster", stage.cluster_e(), stage.cluster_a(), new),
                "rds.yaml": response("routes", routes({"/": f"n{i}", "/e": "e"})),
            }
            stage.patch(files)
            done = run([*stage.arguments(), "--onetime", "--step-delay", "200ms"])
            assert done.returncode == 0, done.stderr
            stage.await_files(files, 0.1)
            poller.wait_body(f"v{1 + i}")
        assert not poller.failed


def test_fault_16_another_envoy_may_nack_what_one_took(stage: Stage) -> None:
    """The port of a listener is taken when Envoy starts again."""
    stage.start()
    stage.envoy.stop()
    with socket.create_server(("127.0.0.1", stage.extra_port)):
        stage.envoy.start()
        stage.log.wait_log("ERROR Envoy NACKed lds.yaml")
        wait_until(lambda: stage.states().get("lds.yaml") == "nacked")
        assert stage.asked("/startz")[0] == 503
        stage.patch({"eds-e.yaml": stage.endpoints(2)})
        wait_until(lambda: stage.get("/e") == "v2")
        time.sleep(0.5)
        assert stage.log.count_log("Envoy NACKed") <= 2, stage.log.log
    stage.envoy.restart()
    stage.await_acked()
    stage.await_served("v0", "v2", "v0")
    assert stage.asked("/startz")[0] == 200


@pytest.mark.parametrize("seconds", [0.6, 1.2])
def test_fault_17_an_envoy_that_stalls_is_waited_for(seconds: float, stage: Stage) -> None:
    """Beyond the bounds of an answer, which are a quarter of the usual here."""
    stage.prefix = tuned({"ANSWER_BOUND": 0.25, "ASK_BOUND": (0.25, 0.5)})
    stage.start()
    new = cluster("n", stage.upstreams.ports[2])
    wanted = {
        "cds.yaml": response("cluster", stage.cluster_e(), stage.cluster_a(), new),
        "rds.yaml": response("routes", routes({"/": "n", "/e": "e"})),
    }
    with stage.envoy.paused():
        stage.patch(wanted)
        stage.await_files({"cds.yaml": wanted["cds.yaml"]})
        time.sleep(seconds)
        assert stage.read("rds.yaml") == stage.files()["rds.yaml"]
    with Poller(f"http://127.0.0.1:{stage.port}/", interval=0.0) as poller:
        poller.wait_body("v2")
        # The same before the removals.
        less = response("cluster", stage.cluster_e(), new)
        with stage.envoy.paused():
            stage.patch({"cds.yaml": less, "rds.yaml": to_n()})
            time.sleep(seconds)
            assert stage.read("cds.yaml") == wanted["cds.yaml"]
        stage.await_files({"cds.yaml": less})
        stage.await_acked()
        assert not poller.failed


def test_an_end_is_not_delayed_by_an_envoy_that_stalls(stage: Stage) -> None:
    stage.prefix = tuned({"ANSWER_BOUND": 0.5, "ASK_BOUND": (0.5, 1.0)})
    stage.start()
    with stage.envoy.paused():
        for seconds in (0.0, 0.6, 1.3):  # asked, silent, waited for
            stage.patch({"cds.yaml": clusters(stage, mark=str(seconds)), "rds.yaml": to(x="a")})
            time.sleep(seconds)
            assert stage.loader
            stage.loader.stop(within=1.0)
            stage.restart_loader()
    stage.await_acked()


def to_n() -> str:
    return response("routes", routes({"/": "n", "/x": "n", "/e": "e"}))


def test_fault_18_an_envoy_that_was_restarted_hot_is_unknown(stage: Stage) -> None:
    """It counts the events of its parent too."""
    envoy = stage.envoy

    def child_answers() -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return "epoch: 1" in envoy.admin("/stats?filter=server.hot_restart_epoch")
        return False

    envoy.command.remove("--disable-hot-restart")
    number = str(os.getpid() % 30000)
    envoy.command += ["--base-id", number, "--restart-epoch", "0"]
    stage.start()
    first, envoy.process = envoy.process, None
    assert first
    try:
        envoy.command[-1] = "1"
        envoy.start(wait=False)
        wait_until(child_answers)
        stage.patch({"eds-e.yaml": stage.endpoints(0)})
        stage.log.wait_log("WARNING Envoy is not asked: it was restarted hot", 10)
        wait_until(lambda: first.poll() is not None or set(stage.states().values()) == {"unknown"})
        assert first.poll() is None, "what the parent ACKed is unknown of its child at once"
        wait_until(lambda: first.poll() is not None, 15)
        files = {"rds.yaml": to(x="e"), "eds-e.yaml": stage.endpoints(2)}
        stage.patch(files)
        wait_until(lambda: stage.get("/x") == "v2", 10)
        stage.log.wait_log("published .*rds.yaml.* ack=unknown")
        time.sleep(0.5)
        assert set(stage.states().values()) == {"unknown"}
        assert stage.log.count_log("NACKed") == 0
        assert stage.asked("/startz")[0] == 200
    finally:
        first.kill()
        first.wait()
        for each in Path("/dev/shm").glob(f"envoy_shared_memory_{number}*"):
            each.unlink()


def test_what_cannot_be_written_down_ends_nobody(stage: Stage) -> None:
    """What Envoy ACKed is kept in ..state, which cannot be written just then."""
    stage.start()
    state, aside = stage.out / "..state", stage.out / "aside"
    with stage.envoy.paused():
        stage.patch({"eds-e.yaml": stage.endpoints(2)})
        stage.await_files({"eds-e.yaml": stage.endpoints(2)})
        state.rename(aside)
        state.write_text("in the way")
    stage.log.wait_log("WARNING cannot publish to ")
    state.unlink()
    aside.rename(state)
    stage.patch({"eds-e.yaml": stage.endpoints(0)})
    wait_until(lambda: stage.get("/e") == "v0", 20)
    stage.log.wait_log("INFO warning over: cannot publish to ")


def test_a_clock_that_jumps_disturbs_nothing(stage: Stage) -> None:
    """Days ahead and back between two looks at it."""
    stage.patch(stage.files())
    stage.prefix = tuned(clock=True)
    stage.start_loader()
    wait_until(lambda: (stage.out / "current/lds.yaml").exists())
    stage.envoy.start()
    stage.await_acked()
    for i in range(5):
        new = cluster(f"n{i}", stage.upstreams.ports[1 + i % 2])
        files = {
            "cds.yaml": clusters(stage, new),
            "rds.yaml": response("routes", routes({"/": f"n{i}", "/e": "e"})),
        }
        stage.patch(files if i % 2 else {**files, "eds-e.yaml": BROKEN})
        stage.await_files(files)
        stage.await_served(f"v{1 + i % 2}", "v1", "v0")
    assert stage.log.count_log("Envoy NACKed") == 1
    wait_converged(stage.out)

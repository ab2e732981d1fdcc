"""What the figures rest on, as far as a busy machine can tell it: counts and ratios, no times."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import machine
from bench.services import populate as populate_services
from bench.stage import FLOOR, KEY, LOADER, NAMESPACE, Running, Stage, is_about, named, spread
from tests.support.busy import skip_if_busy
from tests.support.disk import IN_CREATE, IN_MOVED_TO, Inotify
from tests.support.loader import ROOT

pytestmark = pytest.mark.bench
LABEL = {"bench": "test"}
BY_LABEL = "labelSelector=bench%3Dtest"


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path) as found:
        yield found


def change(stage: Stage, run: Running, name: str = "one") -> None:
    run.eye.wait(stage.change(name, 1024, LABEL))
    time.sleep(0.01)


def populate(stage: Stage, count: int) -> None:
    """So many files beside that of the ConfigMap `one`, all by one label."""
    data = {f"more-{index}.yaml": f"{index}\n" for index in range(count)}
    stage.api.configmap(NAMESPACE, "more", data, labels=LABEL)


# ---------------------------------------------------------------------------------------------
# Requests and files


def test_changes_cost_no_request(stage: Stage) -> None:
    first = stage.change("one")
    with stage.running(LOADER, named("one")) as run:
        run.eye.wait(first)
        for _ in range(20):
            change(stage, run)
        asked = stage.api.requests.matching(is_about(named("one")))
    assert [request.is_watch for request in asked] == [False, True]
    assert len({request.connection for request in asked}) == 1


def test_one_change_among_many_files_touches_one(stage: Stage) -> None:
    populate(stage, 100)
    first = stage.change("one", labels=LABEL)
    with stage.running(LOADER, BY_LABEL) as run:
        run.eye.wait(first)
        run.wait_log("published")
        before = {path: path.stat().st_ino for path in (run.place / "current").iterdir()}
        mask = IN_MOVED_TO | IN_CREATE
        with Inotify(run.place / "current", mask=mask) as eye:
            change(stage, run)
            assert [path.name for _, path in eye.events(0.2)] == [KEY]
        after = {path: path.stat().st_ino for path in (run.place / "current").iterdir()}
    # Only that one was written; the others are the same inodes, linked.
    assert [path.name for path in after if before[path] != after[path]] == [KEY]


# ---------------------------------------------------------------------------------------------
# System calls


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_system_calls_of_a_change_are_bounded_by_the_files(stage: Stage) -> None:
    few, many = (system_calls(stage, count) for count in (1, 101))
    assert sum(few.values()) < 80, few
    # A link, a look at its source, and its removal later: some calls a file and no more.
    assert sum(many.values()) - sum(few.values()) < 100 * 5, many
    for name in ("rename", "symlink", "write", "sendto", "connect", "fsync", "execve"):
        assert many[name] - few[name] < 1, name


def system_calls(stage: Stage, files: int, count: int = 10) -> Counter[str]:
    """The calls of one change among so many files, on average."""
    populate(stage, files - 1)
    place = stage.directory("strace")
    log = place / "calls"
    stage.change("one", labels=LABEL)
    command = ["strace", "-f", "-qq", "-o", str(log), *stage.command(LOADER, BY_LABEL, place)]
    with Running(LOADER, place, command) as run:
        run.wait_log("published")
        time.sleep(0.5)
        before = len(log.read_text().splitlines())
        for _ in range(count):
            change(stage, run)
            time.sleep(0.05)
        time.sleep(0.3)
        calls = log.read_text().splitlines()[before:]
    found = Counter(match[1] for line in calls if (match := re.match(r"\d+ +(\w+)\(", line)))
    return Counter({name: number // count for name, number in found.items()})


# ---------------------------------------------------------------------------------------------
# Ratios: what is aimed at with a margin, for `make bench` measures and this only notices


def test_a_change_costs_a_few_times_the_floor(stage: Stage) -> None:
    """Time, CPU and memory; the fastest tenth of the changes, taken in turns."""
    for attempt in range(3):
        took, spent, resident = in_turns(stage, f"one-{attempt}")
        if took[LOADER] < 2.5 * took[FLOOR] and spent[LOADER] < 5 * spent[FLOOR]:
            break
    else:
        skip_if_busy(f"{took} ms, CPU {spent} ms")
        pytest.fail(f"{took} ms, CPU {spent} ms")
    assert resident[LOADER] < 1.3 * resident[FLOOR]


def in_turns(
    stage: Stage, name: str
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    first = stage.change(name)
    taken: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(stage.running(kind, named(name))) for kind in (FLOOR, LOADER)]
        for run in runs:
            run.eye.wait(first)
        time.sleep(0.3)
        before = {run.kind: run.cpu() for run in runs}
        for _ in range(60):
            wanted = stage.change(name)
            changed = time.monotonic()
            for run in runs:
                taken.setdefault(run.kind, []).append((run.eye.wait(wanted) - changed) * 1e3)
            time.sleep(0.01)
        spent = {run.kind: run.cpu() - before[run.kind] for run in runs}
        resident = {run.kind: run.memory() for run in runs}
    return {kind: spread(values).p10 for kind, values in taken.items()}, spent, resident


def test_a_one_time_run_costs_twice_the_floor(stage: Stage) -> None:
    """CPU to the exit, from byte code; from source it is more. The best of several, in turns."""
    stage.change("one")
    options = ("--onetime", "--configmap", "one", "--output-dir")
    commands: dict[str, Callable[[Path], list[str]]] = {
        "floor": lambda place: stage.command(FLOOR, named("one"), place, once=True),
        "byte code": lambda place: stage.command(LOADER, named("one"), place, once=True),
        "source": lambda place: stage.loader_command(*options, str(place), source=True),
    }
    cost = dict.fromkeys(commands, math.inf)
    for _ in range(12):
        for name, command in commands.items():
            place = stage.directory("cost")
            cost[name] = min(cost[name], machine.run(command(place), place / "current").cpu)
        if cost["byte code"] < min(2.2 * cost["floor"], 0.8 * cost["source"]):
            return
    skip_if_busy(f"CPU {cost} s")
    pytest.fail(f"CPU {cost} s")


def test_services_cost_in_proportion_to_their_number(tmp_path: Path, stage: Stage) -> None:
    def cost(count: int) -> float:
        namespace = f"services-{count}"
        populate_services(stage, namespace, count)
        options = ("--onetime", "--services", "*", "--services-namespace", namespace)
        place = stage.directory(namespace)
        command = stage.loader_command(*options, "--output-dir", str(place))
        return min(machine.run(command, place / "current").cpu for _ in range(2))

    start, few, many = cost(1), cost(400), cost(1600)
    assert many - start < 9 * (few - start)  # linear: 4 times, quadratic: 16


# ---------------------------------------------------------------------------------------------
# The program


@pytest.fixture(scope="module")
def bench() -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "bench", *args],
            cwd=ROOT,
            env={**os.environ, "QUICK": "1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_the_table_has_a_row_for_each_measure(
    bench: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = bench("disk")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()]
    table = [row[1:-1] for row in rows if len(row) > 3]
    assert table[0][:3] == ["", LOADER, FLOOR]
    assert table[0][-1] == "aim"
    measures = [row[0] for row in table[2:]]
    assert any("change -> file" in measure for measure in measures)
    assert all(row[1] and row[2] for row in table[2:])
    assert "noise before" in done.stdout
    assert "load average" in done.stdout

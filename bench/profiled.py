"""Where the loader's time goes: importing, and between an event and its file.

`python -m bench.profiled` runs the loader under cProfile in every thread (which makes Python code
three times as slow: read the shares, not the sums), for changes of a 4 KiB and of a 900 KiB
ConfigMap, a first list of 1,000 Services and changes among them; then counts the system calls of a
change with strace, where it is installed.
"""

from __future__ import annotations

import contextlib
import json
import pstats
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.services import endpoints, populate
from bench.stage import LOADER, SOURCE, Running, Stage, named, tmpfs

# Runs in a process of its own: profiles each thread into a file of its own, until SIGTERM.
PROFILE = """
import cProfile, os, sys, threading, time
code, place, sys.argv = sys.argv[1], sys.argv[2], sys.argv[3:]
profiles = []
def follow(*_):
    profile = cProfile.Profile(time.thread_time_ns, 1e-9)
    profiles.append(profile)
    profile.enable()
threading.setprofile(follow)
main = cProfile.Profile(time.thread_time_ns, 1e-9)
sys.path.insert(0, os.path.dirname(code))
import loader
sys.argv = [code, *sys.argv]
main.enable()
try:
    loader.main()
finally:
    main.disable()
    for index, profile in enumerate([main, *profiles]):
        profile.create_stats()
        if profile.stats:
            profile.dump_stats(f"{place}/{index}.prof")
"""

# Times a few functions only, each without those below it: CPU that nearly costs nothing to measure.
# A coarse function that is no longer there is left out.
COARSE = """
import atexit, functools, json, os, sys, threading, time
code, place, sys.argv = sys.argv[1], sys.argv[2], sys.argv[3:]
sys.path.insert(0, os.path.dirname(code))
import loader
sys.argv = [code, *sys.argv]
spent, local, names = {}, threading.local(), sys.argv.pop(1).split(",")
def timed(name, function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        began, outer = time.thread_time(), getattr(local, "below", 0.0)
        local.below = 0.0
        try:
            return function(*args, **kwargs)
        finally:
            took = time.thread_time() - began
            calls, own = spent.get(name, (0, 0.0))
            spent[name] = calls + 1, own + took - local.below
            local.below = outer + took
    return run
for name in names:
    home, _, last = name.rpartition(".")
    home = getattr(loader, home, None) if home else loader
    if hasattr(home, last):
        setattr(home, last, timed(name, getattr(home, last)))
def usage(*_):
    spent["all"] = 1, time.process_time()
    with open(f"{place}/spent.json", "w") as file:
        json.dump(spent, file)
    spent.clear()
def listen():
    for _ in sys.stdin:
        usage()
threading.Thread(target=listen, daemon=True).start()
loader.main()
"""
STEPS = (
    "watch_event,Reflector._apply,configmap_from,Wakes.put,Wakes.get,Loop._await,Loop._turn,"
    "Sources.compose,Loop._advance,next_step,independent,Loop._publish,Output.stage,"
    "Output.publish,Output.prune,Log._write,Metrics.add,Metrics.set,Metrics.observe,"
    "Metrics.replace,Loop._count_snapshot,Loop._say,watch_lines,kind_of,same,version_of,file_of,"
    "Output._notify,Output._switch,Output._write_sources,Output._own_directory,"
    "Output._writable,replace_link,remove_tree,Renderer.render,Sources._gathered,overlaid,"
    "endpointslice_from,Reflector.objects"
)


def profiled(stage: Stage, args: Sequence[str], work: Callable[[Running], None]) -> pstats.Stats:
    """The profile of all threads while `work` runs (and of the start before it)."""
    place = stage.directory("profile")
    options = stage.loader_command("--output-dir", str(place), *args)[4:]
    command = [sys.executable, "-I", "-S", "-c", PROFILE, str(SOURCE), str(place), *options]
    with Running(LOADER, place, command) as run:
        run.wait_log("published")
        work(run)
        time.sleep(0.3)
        run.process.send_signal(signal.SIGTERM)
        run.process.wait(20)
    found = [str(path) for path in sorted(place.glob("*.prof"))]
    stats = pstats.Stats(found[0])
    for path in found[1:]:
        stats.add(path)
    return stats


def show(title: str, stats: pstats.Stats, per: int = 1, most: int = 28) -> None:
    """The costliest functions by their own CPU time, in microseconds for each of `per`.

    What a thread waits in when it is stopped has no end on its own clock, hence the exception.
    """
    print(f"\n## {title}\n")
    print(f"{'calls':>8} {'us':>9}  function")
    rows = []
    for (path, line, name), (_, calls, own, _, _) in stats.stats.items():  # type: ignore[attr-defined]
        where = f"{Path(path).name}:{line} " if line else ""
        if not re.search(r"'read' of '_ssl|'acquire' of|select", name):
            rows.append((own, calls, f"{where}{name}"))
    for own, calls, name in sorted(rows, reverse=True)[:most]:
        print(f"{calls / per:8.1f} {own / per * 1e6:9.1f}  {name}")


def changes(stage: Stage, count: int, size: int) -> Callable[[Running], None]:
    def work(run: Running) -> None:
        for _ in range(count):
            run.eye.wait(stage.change("profiled", size))
            time.sleep(0.02)

    return work


def steps(
    stage: Stage, args: Sequence[str], title: str, count: int, work: Callable[[Running], None]
) -> None:
    """CPU of the steps of one change, each for itself, in microseconds."""
    place = stage.directory("steps")
    options = stage.loader_command("--output-dir", str(place), *args)[4:]
    command = [sys.executable, "-I", "-S", "-c", COARSE, str(SOURCE), str(place), STEPS, *options]
    told = place / "spent.json"
    with Running(LOADER, place, command, stdin=subprocess.PIPE) as run:
        run.wait_log("published")
        time.sleep(0.5)
        before = look(run, told)
        work(run)
        time.sleep(0.3)
        spent = look(run, told)
    whole = spent.pop("all")[1] - before["all"][1]
    print(f"\n## {title}: CPU of each step for itself, us (all: {whole / count * 1e6:.0f} us)\n")
    print(f"{'calls':>8} {'us':>9}")
    for name, (calls, own) in sorted(spent.items(), key=lambda item: -item[1][1]):
        print(f"{calls / count:8.1f} {own / count * 1e6:9.1f}  {name}")
    rest = whole - sum(own for _, own in spent.values())
    print(f"{'':8} {rest / count * 1e6:9.1f}  everything else: sockets, TLS, threads")


def look(run: Running, told: Path) -> dict[str, list[float]]:
    """What was spent since the last look."""
    told.unlink(missing_ok=True)
    assert run.process.stdin is not None
    run.process.stdin.write(b"\n")
    run.process.stdin.flush()
    while True:
        with contextlib.suppress(FileNotFoundError, ValueError):
            found: dict[str, list[float]] = json.loads(told.read_text())
            return found
        time.sleep(0.01)


def one_of_many(stage: Stage, count: int) -> Callable[[Running], None]:
    def work(run: Running) -> None:
        for change in range(1, count + 1):
            endpoints(stage, "services-1000", 7, change)
            time.sleep(0.3)

    return work


def imports(stage: Stage) -> None:
    """The modules that take longest to import, and the loader's own share."""
    command = [sys.executable, "-I", "-S", "-X", "importtime", str(stage.bytecode), "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    rows = re.findall(r"import time: +(\d+) \| +(\d+) \|( +)(\S+)", text)
    top = sorted(((int(all_), int(own), name) for own, all_, _, name in rows), reverse=True)
    print("\n## Imports, cumulative us (own us)\n")
    for all_, own, name in top[:14]:
        print(f"{all_:8} {own:8}  {name}")


def system_calls(stage: Stage, count: int) -> None:
    """How many system calls one change costs, by name."""
    if not shutil.which("strace"):
        print("\nstrace is not installed: no system calls counted")
        return
    place = stage.directory("strace")
    log = place / "calls"
    stage.change("profiled")
    selector = named("profiled")
    command = ["strace", "-f", "-qq", "-o", str(log), *stage.command(LOADER, selector, place)]
    with Running(LOADER, place, command) as run:
        run.wait_log("published")
        time.sleep(0.5)
        before = len(log.read_text().splitlines())
        changes(stage, count, 4096)(run)
        time.sleep(0.5)
        calls = log.read_text().splitlines()[before:]
    seen: dict[str, int] = {}
    for line in calls:
        if found := re.match(r"\d+ +(\w+)\(", line):
            seen[found[1]] = seen.get(found[1], 0) + 1
    print(f"\n## System calls a change ({count} changes)\n")
    for name, number in sorted(seen.items(), key=lambda item: -item[1]):
        print(f"{number / count:8.1f}  {name}")
    print(f"{sum(seen.values()) / count:8.1f}  all")


def main() -> int:
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=tmpfs()) as root,
        Stage(Path(root)) as stage,
    ):
        imports(stage)
        stage.change("profiled")
        watch = ["--watch", "--configmap", "profiled"]
        title = "200 changes of 4 KiB"
        steps(stage, watch, title, 200, changes(stage, 200, 4096))
        stats = profiled(stage, watch, changes(stage, 200, 4096))
        show("200 changes of 4 KiB, each", stats, 200)
        stats = profiled(stage, watch, changes(stage, 20, 900 << 10))
        show("20 changes of 900 KiB, each", stats, 20)
        populate(stage, "services-1000", 1000)
        config = Path(root) / "config.json"
        config.write_text(json.dumps({"endpoint": {"eds_budget": 100_000}}))
        services = ["--watch", "--services", "*", "--services-namespace", "services-1000"]
        eds = [*services, "--endpoints", "eds", "--config", str(config)]
        title = "1,000 Services x 10, eds: 40 changes of one slice"
        steps(stage, eds, title, 40, one_of_many(stage, 40))
        stats = profiled(stage, eds, lambda run: None)
        show("1,000 Services x 10, eds: the first snapshot", stats)
        stats = profiled(stage, eds, one_of_many(stage, 40))
        show("the same, and 40 changes of one slice", stats)
        system_calls(stage, 50)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""ConfigMaps: from a change in the API to the file, and to what Envoy serves."""

from __future__ import annotations

import contextlib
import http.client
import statistics
import time
from collections.abc import Callable, Sequence

from bench import machine
from bench.stage import (
    FLOOR,
    KEY,
    LOADER,
    NAMESPACE,
    OTHER,
    Row,
    Running,
    Stage,
    content,
    is_about,
    named,
    number,
    ratios,
    spread,
)
from tests.support.disk import IN_CREATE, IN_MOVED_TO, Inotify
from tests.support.envoy import (
    Envoy,
    bootstrap,
    cluster,
    dynamic_resources,
    file_source,
    http_listener,
    rds_routes,
    response,
)
from tests.support.ports import held_port

PAUSE = 0.02  # between changes: quiet enough that each is one of its own


def measure(stage: Stage, kinds: Sequence[str], quick: bool) -> list[Row]:
    """All contenders run at once, each with a ConfigMap of its own, and take turns."""
    rounds, each = (2, 15) if quick else (4, 50)
    with contextlib.ExitStack() as stack:
        runs = []
        for kind in kinds:
            first = stage.change(config_of(kind))
            run = stack.enter_context(stage.running(kind, named(config_of(kind))))
            run.eye.wait(first, timeout=60)
            runs.append(run)
        time.sleep(1.0)
        rows = latency(stage, runs, rounds, each)
        rows += bursts(stage, runs, 2 if quick else 5)
        rows += churn(stage, runs, 300 if quick else 1000)
        rows += served(stage, runs, 15 if quick else 100)
        known = [run for run in runs if run.kind != OTHER]  # whose requests can be told apart
        rows += idle(stage, known, 3.0 if quick else 10.0)
        rows += large(stage, runs, 5 if quick else 20)
        return rows


def config_of(kind: str) -> str:
    return f"bench-{kind.lower().replace(' ', '-')}"


def one(stage: Stage, run: Running, size: int = 4096) -> float:
    """One change: ms from when the API server has stored it to the file."""
    wanted = stage.change(config_of(run.kind), size)
    changed = time.monotonic()
    return (run.eye.wait(wanted) - changed) * 1e3


def on_disk(stage: Stage, kinds: Sequence[str], quick: bool) -> list[Row]:
    """The loader and the floor where files are not in memory (a plain `emptyDir`)."""
    with contextlib.ExitStack() as stack:
        runs = []
        for kind in (LOADER, FLOOR):
            first = stage.change(config_of(kind))
            run = stack.enter_context(stage.running(kind, named(config_of(kind))))
            run.eye.wait(first, timeout=60)
            runs.append(run)
        time.sleep(0.5)
        rows = latency(stage, runs, 2, 10 if quick else 50)
    return [Row(f"on disk: {row.measure}", row.values) for row in rows[:4]]


def latency(stage: Stage, runs: Sequence[Running], rounds: int, each: int) -> list[Row]:
    taken: dict[str, list[float]] = {run.kind: [] for run in runs}
    spent = {run.kind: 0.0 for run in runs}
    for _ in range(rounds):
        for run in runs:
            before = run.cpu()
            for _ in range(each):
                taken[run.kind].append(one(stage, run))
                time.sleep(PAUSE)
            spent[run.kind] += run.cpu() - before
    total = rounds * each
    found = {kind: spread(values) for kind, values in taken.items()}
    return [
        Row(f"change -> file, {total} of 4 KiB, p50 / p99", {k: f"{v}" for k, v in found.items()}),
        Row("the same, p50 to the floor's", ratios({k: v.p50 for k, v in found.items()}), "1.6 x"),
        Row("the same, fastest tenth", {k: f"{number(v.p10)} ms" for k, v in found.items()}),
        Row("CPU a change", {k: f"{number(v / total)} ms" for k, v in spent.items()}),
        Row(
            "resident after that",
            {run.kind: f"{number(run.memory())} MB" for run in runs},
            "24 MB",
        ),
    ]


def bursts(stage: Stage, runs: Sequence[Running], rounds: int) -> list[Row]:
    """50 changes back to back; from the last one to its file."""
    taken: dict[str, list[float]] = {run.kind: [] for run in runs}
    for _ in range(rounds):
        for run in runs:
            last = 0
            for _ in range(50):
                last = stage.change(config_of(run.kind))
            changed = time.monotonic()
            taken[run.kind].append((run.eye.wait(last) - changed) * 1e3)
            time.sleep(0.3)
    row = {kind: f"{number(statistics.median(values))} ms" for kind, values in taken.items()}
    return [Row("burst of 50: last change -> file", row)]


def churn(stage: Stage, runs: Sequence[Running], events: int) -> list[Row]:
    """Events at 1,000 a second: how often does Envoy read, and what does it cost?"""
    moves, late, spent, rate = {}, {}, {}, []
    for run in runs:
        counter = Counter(run)
        before, began = run.cpu(), time.monotonic()
        last = 0
        for index in range(events):
            last = stage.change(config_of(run.kind))
            time.sleep(max(0.0, began + index * 0.001 - time.monotonic()))
        changed = time.monotonic()
        rate.append(events / (changed - began))
        while run.eye.number() != last:
            time.sleep(0.0005)
            if time.monotonic() > changed + 30:
                raise TimeoutError(f"{run.kind} is not through with {events} events")
        late[run.kind] = f"{number((time.monotonic() - changed) * 1e3)} ms"
        time.sleep(0.3)
        moves[run.kind] = f"{counter.count():,}"
        spent[run.kind] = f"{number((run.cpu() - before) / events)} ms"
    title = f"{events:,} events at {min(rate):.0f} a second"
    return [
        Row(f"{title}: publications (moves that Envoy sees)", moves, "50"),
        Row("the same: last change -> file", late),
        Row("the same: CPU an event", spent),
    ]


class Counter:
    """Counts how often a contender's file was replaced from now on.

    The kernel merges equal events that nobody has read: so with those of the files that are made
    between, or, where the loader makes none in that directory, by its log.
    """

    def __init__(self, run: Running) -> None:
        self._run = run
        self._before = run.log().count("published")
        self._inotify = Inotify(run.place / "current", mask=IN_MOVED_TO | IN_CREATE)

    def count(self) -> int:
        with self._inotify:
            moved = self._inotify.moved().count(KEY)
        return max(moved, self._run.log().count("published") - self._before)


def idle(stage: Stage, runs: Sequence[Running], seconds: float) -> list[Row]:
    time.sleep(0.5)
    spent = {run.kind: run.cpu() for run in runs}
    since = len(stage.api.requests)
    time.sleep(seconds)
    seen = stage.api.requests[since:]
    asked, hour = {}, {}
    for run in runs:
        spent[run.kind] = run.cpu() - spent[run.kind]
        about = is_about(named(config_of(run.kind)))
        asked[run.kind] = sum(map(about, seen))
        # Every watch ends after the seconds that it asked for, 30 to 60 minutes by default.
        watches = [r for r in stage.api.requests.matching(about) if r.is_watch]
        lives = [float(r.query.get("timeoutSeconds", 2700)) for r in watches]
        mean = 450.0 if run.kind == LOADER else statistics.mean(lives)
        hour[run.kind] = f"{asked[run.kind] * 3600 / seconds + 3600 / mean:.1f}"
    return [
        Row(
            f"CPU while idle ({seconds:.0f} s)",
            {kind: f"{number(value / seconds)} ms/s" for kind, value in spent.items()},
        ),
        Row(f"requests in {seconds:.0f} idle seconds", {k: str(v) for k, v in asked.items()}),
        Row("requests an hour: those, and renewals of the watch", hour),
    ]


def large(stage: Stage, runs: Sequence[Running], changes: int) -> list[Row]:
    taken: dict[str, list[float]] = {run.kind: [] for run in runs}
    for _ in range(changes):
        for run in runs:
            taken[run.kind].append(one(stage, run, 900 << 10))
            time.sleep(PAUSE)
    for run in runs:
        stage.change(config_of(run.kind))
    time.sleep(0.3)
    return [
        Row(
            f"900 KiB ConfigMap: change -> file, {changes} of them, p50 / p99",
            {kind: str(spread(values)) for kind, values in taken.items()},
            "10 ms",
        ),
        Row("resident after that", {run.kind: f"{number(run.memory())} MB" for run in runs}),
    ]


# ---------------------------------------------------------------------------------------------
# Through Envoy


def served(stage: Stage, runs: Sequence[Running], changes: int) -> list[Row]:
    """One Envoy with a listener for each contender's file; asked until the answer is new."""
    ports = {run.kind: held_port() for run in runs}
    listeners = [
        http_listener(
            ports[run.kind],
            rds_routes(file_source(run.place / "current" / KEY)),
            name=config_of(run.kind),
        )
        for run in runs
    ]
    taken: dict[str, list[float]] = {run.kind: [] for run in runs}
    with Envoy(bootstrap(listeners=listeners), stage.root / "envoy"):
        for run in runs:
            with contextlib.closing(Asker(ports[run.kind])) as asker:
                for _ in range(changes):
                    wanted = stage.change(config_of(run.kind))
                    changed = time.monotonic()
                    run.eye.wait(wanted)
                    taken[run.kind].append((asker.wait(wanted) - changed) * 1e3)
                    time.sleep(PAUSE)
    found = {kind: spread(values) for kind, values in taken.items()}
    return [
        Row(f"change -> served by Envoy, {changes} of them, p50 / p99",
            {kind: str(value) for kind, value in found.items()}, "3 / 8 ms"),
        Row("the same, fastest tenth", {k: f"{number(v.p10)} ms" for k, v in found.items()}),
    ]  # fmt: skip


class Asker:
    """Asks Envoy again and again over one connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    def wait(self, wanted: int) -> float:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            self._connection.request("GET", "/")
            body = self._connection.getresponse().read()
            if body == b"%d" % wanted:
                return time.monotonic()
        raise TimeoutError(f"Envoy does not serve {wanted}, but {body!r}")

    def close(self) -> None:
        self._connection.close()


# ---------------------------------------------------------------------------------------------
# More of them


def selector(stage: Stage, kinds: Sequence[str], quick: bool) -> list[Row]:
    """200 ConfigMaps by a label."""
    count, changes = 200, 10 if quick else 50
    label = {"bench": "many"}
    chosen = "labelSelector=bench%3Dmany"
    last = 0
    for index in range(count):
        last = stage.next()
        data = {f"file-{index:03}.yaml": content(last)}
        stage.api.configmap(NAMESPACE, f"many-{index:03}", data, labels=label)
    taken: dict[str, str] = {}
    resident: dict[str, str] = {}
    connections: dict[str, str] = {}
    for kind in (kind for kind in kinds if kind != OTHER):
        since = len(stage.api.requests)
        with stage.running(kind, chosen) as run:
            run.eye.wait(last, f"file-{count - 1:03}.yaml", timeout=60)
            time.sleep(0.5)
            values = []
            for change in range(changes):
                index, last = change % (count - 1), stage.next()
                data = {f"file-{index:03}.yaml": content(last)}
                stage.api.configmap(NAMESPACE, f"many-{index:03}", data, labels=label)
                changed = time.monotonic()
                values.append((run.eye.wait(last, f"file-{index:03}.yaml") - changed) * 1e3)
                time.sleep(PAUSE)
            last = stage.next()
            data = {f"file-{count - 1:03}.yaml": content(last)}
            stage.api.configmap(NAMESPACE, f"many-{count - 1:03}", data, labels=label)
            taken[kind], resident[kind] = str(spread(values)), f"{number(run.memory())} MB"
            own = filter(is_about(chosen), stage.api.requests[since:])
            connections[kind] = str(len({request.connection for request in own}))
    for index in range(count):
        stage.api.delete("ConfigMap", NAMESPACE, f"many-{index:03}")
    return [
        Row(f"{count} ConfigMaps by selector: one change -> file, p50 / p99", taken),
        Row("the same: connections", connections, "1"),
        Row("the same: resident", resident, "30 MB"),
    ]


def note(stage: Stage, quick: bool) -> list[Row]:
    """500 ConfigMaps, each with routes and a note that is not xDS; both of one change at once."""
    count, changes = 500, 5 if quick else 20
    label = {"bench": "notes"}

    def put(index: int) -> int:
        number = stage.next()
        data = {f"rds-{index:03}.yaml": content(number), f"note-{index:03}.txt": f"# {number}\n"}
        stage.api.configmap(NAMESPACE, f"notes-{index:03}", data, labels=label)
        return number

    last = [put(index) for index in range(count)][-1]
    values, before = [], 0.0
    with stage.running(LOADER, "labelSelector=bench%3Dnotes") as run:
        run.eye.wait(last, f"rds-{count - 1:03}.yaml", timeout=60)
        time.sleep(0.5)
        before = run.cpu()
        for change in range(changes):
            wanted = put(change)
            changed = time.monotonic()
            values.append((run.eye.wait(wanted, f"rds-{change:03}.yaml") - changed) * 1e3)
            time.sleep(0.3)
        text = f"{spread(values)}; CPU {number((run.cpu() - before) / changes)} ms"
    for index in range(count):
        stage.api.delete("ConfigMap", NAMESPACE, f"notes-{index:03}")
    words = f"one of {count} ConfigMaps, its routes and a note: -> file, p50 / p99"
    return [Row(words, {LOADER: text}, "40 ms")]


def memory(stage: Stage) -> list[Row]:
    """At the start, and at rest after it: from byte code, and from source, which is compiled."""
    first = stage.change("bench-memory")
    texts = []
    for source in (False, True):
        command = stage.loader_command(
            *("--watch", "--configmap", "bench-memory", "--output-dir", "{dir}"), source=source
        )
        with stage.running(LOADER, "", command) as run:
            run.eye.wait(first, timeout=60)
            time.sleep(1.0)
            texts.append(f"{number(run.memory())} MB (peak {number(run.memory('VmHWM'))})")
    return [
        Row("resident after the start, byte code", {LOADER: texts[0]}, "24 MB"),
        Row("the same from source", {LOADER: texts[1]}, "peak 40 MB"),
    ]


def asked(stage: Stage, quick: bool) -> list[Row]:
    """Everything at once: 50 clusters, Envoy is asked, and a new route goes to it."""
    changes, clusters = 15 if quick else 100, 50
    name, port = "bench-asked", held_port()
    place = stage.directory("asked")
    current = place / "current"

    def put(route: int) -> int:
        text = content(route, 1024)
        cds = response("cluster", *(cluster(f"c{i}", 9) for i in range(clusters)))
        stage.api.configmap(NAMESPACE, name, {KEY: text, "cds.json": cds})
        return route

    config = bootstrap(
        dynamic_resources(file_source(current / "cds.json")),
        listeners=[http_listener(port, rds_routes(file_source(current / KEY)))],
    )
    envoy = Envoy(config, stage.root / "asked-envoy", start=False)
    command = stage.loader_command(
        *("--watch", "--configmap", name, "--output-dir", str(place)),
        *("--envoy-admin", envoy.admin_url),
    )
    wanted = put(stage.next())
    values = []
    with Running(LOADER, place, command) as run, contextlib.closing(Asker(port)) as asker:
        run.eye.wait(wanted, timeout=60)
        with envoy:
            envoy.start()
            asker.wait(wanted)
            time.sleep(1.5)
            before = run.cpu()
            for _ in range(changes):
                wanted = put(stage.next())
                changed = time.monotonic()
                run.eye.wait(wanted)
                values.append((asker.wait(wanted) - changed) * 1e3)
                time.sleep(PAUSE)
            spent = (run.cpu() - before) / changes
    words = f"{clusters} clusters, Envoy asked: change -> served, {changes} of them, p50 / p99"
    return [
        Row(words, {LOADER: str(spread(values))}, "3 / 8 ms"),
        Row("the same: CPU a change", {LOADER: f"{number(spent)} ms"}),
    ]


def files(stage: Stage, quick: bool) -> list[Row]:
    """One change among so many published files: the loader makes a whole snapshot of links."""
    rows = []
    label = {"bench": "files"}
    made = 0
    stage.change("files-one", 300, label)
    for count in (1, 100, 1000):
        while made < count - 1:
            size = min(100, count - 1 - made)
            data = {f"more-{made + i:05}.yaml": f"{made + i}\n" * 30 for i in range(size)}
            stage.api.configmap(NAMESPACE, f"files-{made:05}", data, labels=label)
            made += size
        first = stage.change("files-one", 300, label)
        with stage.running(LOADER, "labelSelector=bench%3Dfiles") as run:
            run.eye.wait(first, timeout=120)
            run.wait_log("published")
            time.sleep(0.5)
            values, before, changes = [], run.cpu(), 10 if quick else 20
            for _ in range(changes):
                wanted = stage.change("files-one", 300, label)
                changed = time.monotonic()
                values.append((run.eye.wait(wanted) - changed) * 1e3)
                time.sleep(0.1 if count < 1000 else 0.3)
            spent = (run.cpu() - before) / changes
            text = f"{spread(values)}; CPU {number(spent)} ms, {number(run.memory())} MB"
        rows.append(Row(f"one change among {count:,} files: -> file, p50 / p99", {LOADER: text}))
    for name in ["files-one", *(f"files-{index:05}" for index in range(made))]:
        stage.api.delete("ConfigMap", NAMESPACE, name)
    return rows


def cold(stage: Stage, kinds: Sequence[str], quick: bool) -> list[Row]:
    """From exec to the file, and to the exit; interleaved, fresh directories."""
    name = "bench-cold"
    wanted = stage.change(name)
    starts: dict[str, Callable[[str], list[str]]] = {}
    kinds = [kind for kind in kinds if kind != OTHER]
    for kind in kinds:
        starts[kind] = lambda place, kind=kind: stage.command(  # type: ignore[misc]
            kind, named(name), stage.root / place, once=True
        )
    starts["source"] = lambda place: stage.loader_command(
        "--onetime", "--output-dir", place, "--configmap", name, source=True
    )
    python = stage.loader_command()[0]
    imports = "import http.client, json, ssl"
    starts["python"] = lambda _: [python, "-I", "-S", "-c", "pass"]
    starts["imports"] = lambda _: [python, "-I", "-S", "-c", imports]
    begun: dict[str, list[float]] = {start: [] for start in starts}
    ended: dict[str, list[float]] = {start: [] for start in starts}
    spent: dict[str, list[float]] = {start: [] for start in starts}
    for turn in range(5 if quick else 20):
        for start, command in starts.items():
            if start in kinds[2:] and turn % 4:
                continue  # half a second each
            place = stage.directory(start)
            ran = machine.run(command(str(place)), place / "current")
            ended[start].append(ran.seconds * 1e3)
            spent[start].append(ran.cpu * 1e3)
            if start not in ("python", "imports"):
                begun[start].append(ran.first_move * 1e3)
                assert b"# %d\n" % wanted in (place / "current" / KEY).read_bytes()
    return cold_rows(kinds, begun, ended, spent)


def cold_rows(
    kinds: Sequence[str],
    begun: dict[str, list[float]],
    ended: dict[str, list[float]],
    spent: dict[str, list[float]],
) -> list[Row]:
    def shown(values: Sequence[float]) -> str:
        return f"{number(min(values))} / {number(statistics.median(values))} ms"

    medians = {kind: statistics.median(begun[kind]) for kind in kinds}
    rows = [
        Row("one time: exec -> published, best / p50", {k: shown(begun[k]) for k in kinds}),
        Row("the same, p50 to the floor's", ratios(medians), "2 x"),
        Row("the same: CPU to the exit, best / p50", {k: shown(spent[k]) for k in kinds}),
        Row("the same from source, not byte code", {LOADER: shown(begun["source"])}),
    ]
    for start, words in (("python", "python -c pass"), ("imports", "and http.client, json, ssl")):
        text = f"{shown(ended[start])}, CPU {shown(spent[start])}"
        rows.append(Row(f"{words}: exec -> exit, best / p50", {"floor": text}))
    return rows


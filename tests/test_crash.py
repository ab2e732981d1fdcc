"""The crash matrix: every filesystem call of a publication fails, or the process dies around it.

Each case starts from the same disk, counts the calls, and lets one go wrong. Then the promises
of that instant are checked, a new loader starts, and then those of convergence: the files are
there, Envoy was notified of each change after the switch, and what was left over goes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import disk
from tests.support.apiserver import ApiServer
from tests.support.crash import ERRORS, Call, Plan, Run
from tests.support.disk import IN_MOVED_TO, Inotify
from tests.support.loader import COMMAND, ROOT, Loader, environment, snapshot, wait_until

Contents = Mapping[str, str]
CRASH = str(ROOT / "tests/support/crash.py")

OLDER = {"keep": "k", "change": "0", "eds/keep": "k", "eds/change": "0"}
OLD = {
    "keep": "k", "change": "1", "gone": "g",
    "eds/keep": "k", "eds/change": "1", "eds/gone": "g",
}  # fmt: skip
NEW = {
    "keep": "k", "change": "2", "new": "n",
    "eds/keep": "k", "eds/change": "2", "eds/new": "n", "more/new": "n",
}  # fmt: skip
NEWER = {**NEW, "change": "3"}


# -- a loader in a fork of a small process: without the 50 ms that an interpreter takes


class Ended(NamedTuple):
    status: int  # as Popen has it: negative is a signal
    calls: tuple[Call, ...]
    log: str

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


def objects(contents: Contents) -> tuple[str, list[str]]:
    """A list as `kubectl get -o json` prints it, and the options that publish it as `contents`."""
    maps: dict[str, dict[str, str]] = {}
    for path, text in contents.items():
        directory, _, name = path.rpartition("/")
        maps.setdefault(directory, {})[name] = text
    items = [{"kind": "ConfigMap", "metadata": {"name": f"map{directory}", "namespace": "demo"},
              "data": data} for directory, data in maps.items()]  # fmt: skip
    names = [f"map{directory}:{directory}".rstrip(":") for directory in maps]
    args = [word for name in names for word in ("--configmap", name)]
    return json.dumps({"kind": "List", "items": items}), args


class Forks:
    """Runs of the loader, each in a fork, on a directory that can be put back as it was."""

    def __init__(self, server: subprocess.Popen[str], out: Path, scratch: Path) -> None:
        self.out = out
        assert server.stdin is not None
        assert server.stdout is not None
        self._runs, self._statuses = server.stdin, server.stdout
        self._scratch = scratch
        self._log, self._calls = scratch / "log", scratch / "calls"

    def start(self, contents: Contents, plan: Plan, *more: str) -> None:
        text, args = objects(contents)
        path = self._scratch / "objects.json"
        path.write_text(text)
        args += ["--namespace", "demo", "--output-dir", str(self.out), "--from-file", str(path),
                 "--step-delay", "1ms", *more]  # fmt: skip
        run = Run(args, str(self.out), plan, str(self._log), str(self._calls))
        print(json.dumps(run), file=self._runs, flush=True)

    def is_over(self, timeout: float = 0.0) -> bool:
        return bool(select.select([self._statuses], [], [], timeout)[0])

    def ended(self) -> Ended:
        assert self.is_over(60.0), f"the fork still runs:\n{self._log.read_text()}"
        status = int(self._statuses.readline())
        log = self._log.read_text()
        assert "Traceback" not in log, log
        rows = [line.split("\t") for line in self._calls.read_text().splitlines()]
        return Ended(status, tuple(Call(name, path) for name, path in rows), log)

    def once(self, contents: Contents, plan: Plan = Plan()) -> Ended:  # noqa: B008
        self.start(contents, plan, "--onetime")
        return self.ended()

    def publish(self, contents: Contents) -> tuple[Call, ...]:
        """A run in which nothing goes wrong."""
        done = self.once(contents)
        assert done.status == 0, done.log
        return done.calls

    def save(self) -> None:
        shutil.copytree(self.out, self._scratch / "saved", symlinks=True)

    def restore(self) -> None:
        shutil.rmtree(self.out)
        shutil.copytree(self._scratch / "saved", self.out, symlinks=True)


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[Forks]:
    (tmp_path / "runtime").mkdir()
    server = subprocess.Popen(
        [*COMMAND[:-1], CRASH, COMMAND[-1]], env=environment(), start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield Forks(server, tmp_path / "runtime", tmp_path)
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # with a fork that hangs
        server.communicate()


# -- what must hold


def encoded(contents: Contents) -> dict[str, bytes]:
    return {path: text.encode() for path, text in contents.items()}


def directories(out: Path) -> dict[str, int]:
    """`current/` and those below it, with their inodes."""
    places = [Path(place) for place, _, _ in os.walk(out / "current")]
    return {str(place.relative_to(out)): place.stat().st_ino for place in places}


def watched(out: Path) -> Inotify:
    return Inotify(out, *(out / name for name in directories(out)))


def check_instant(out: Path, *generations: Contents) -> None:
    """Every path that old and new have resolves, and all show one snapshot."""
    shown, (old, *others) = snapshot(out), generations
    # What goes goes one snapshot later than what comes: then there are both.
    candidates = [encoded(each) for each in (*generations, *({**old, **new} for new in others))]
    if old or shown:
        assert any(shown.items() <= each.items() for each in candidates), f"mixed: {shown}"
    missing = set(old).intersection(*others) - shown.keys()
    assert not missing, f"{missing} does not resolve"
    if (out / "..data").is_symlink():
        disk.inspect(out, converged=False)


def check_notified(
    events: list[tuple[int, Path]], out: Path, old: Contents, new: Contents, excused: str = ""
) -> None:
    """Envoy saw a move of each changed file after the first switch, and of no other file.

    `excused` is a place whose file could not be read: it counts as damaged and is written anew.
    """
    moves = [str(path.relative_to(out)) for mask, path in events if mask & IN_MOVED_TO]
    assert "..data" in moves, f"no switch was seen: {moves}"
    after = {name.removeprefix("current/") for name in moves[moves.index("..data") :]}
    changed = {path for path, text in new.items() if old.get(path) != text
               and any(path.rpartition("/")[0] == other.rpartition("/")[0] for other in old)}
    assert changed <= after, f"Envoy was not notified of {changed - after}: {moves}"
    kept = {path for path, text in new.items() if old.get(path) == text}
    needless = kept & {name.removeprefix("current/") for name in moves}
    needless -= {excused.partition("/")[2]}
    assert not needless, f"Envoy was notified of {needless}, which did not change"


def check_converged(forks: Forks, new: Contents, newer: Contents) -> None:
    """What `new` says stands, one more start touches nothing, one more publication tidies up."""
    assert disk.inspect(forks.out, converged=False).files == encoded(new)
    before = disk.fingerprint(forks.out)
    forks.publish(new)
    assert disk.fingerprint(forks.out) == before
    forks.publish(newer)
    assert disk.inspect(forks.out).files == encoded(newer)


@contextlib.contextmanager
def blamed(how: object, call: Call) -> Iterator[None]:
    """Says at which call a case failed."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"at: {how} {call.name} {call.path}")
        raise


def cases(calls: tuple[Call, ...]) -> list[tuple[int, str]]:
    """(call, how) of every death: before the first, after each, in the middle of each write.

    What is on disk before a call is what is there after the last one that changed something.
    """
    changing = [number for number, call in enumerate(calls) if call.changes]
    writes = [number for number in changing if calls[number].name == "write"]
    return [(changing[0], "before"), *((number, "after") for number in changing),
            *((number, "halfway") for number in writes)]  # fmt: skip


# -- deaths


def nothing(_: Forks) -> Contents:
    return {}


def published(forks: Forks) -> Contents:
    """Two snapshots stand, so that the next publication prunes one."""
    forks.publish(OLDER)
    forks.publish(OLD)
    return OLD


def littered(forks: Forks) -> Contents:
    """Half-written snapshots, a link's temporary name, damaged files and links."""
    published(forks)
    out = forks.out
    (out / "..0123456789abcdef/eds").mkdir(parents=True)
    (out / "..0123456789abcdef/eds/x").write_text("half")
    (out / "..link").symlink_to("nowhere")
    (out / "current/gone").write_text("damaged")
    (out / "current/eds/keep").unlink()
    (out / "current/eds/keep").write_text("k")
    return {**OLD, "gone": "damaged"}


@pytest.mark.parametrize("prepare", [nothing, published, littered])
def test_death_at_each_call(forks: Forks, prepare: Callable[[Forks], Contents]) -> None:
    """Of the first publication; of one in which files change, come and go, in a subdirectory too
    (it is two snapshots: what is gone goes with the second); of one that also repairs."""
    old = prepare(forks)
    forks.save()
    calls = forks.publish(NEW)
    if old:
        kinds = {call.name for call in calls}
        assert kinds >= {"mkdir", "open", "write", "link", "symlink", "rename", "unlink", "rmdir",
                         "readlink", "scandir", "lstat", "open (read)"}  # fmt: skip
        assert calls.count(Call("rename", "..data")) == 2
        assert len([call for call in calls if call.changes]) < 100
    for index, (number, how) in enumerate(cases(calls)):
        forks.restore()
        before = directories(forks.out)
        with watched(forks.out) as seen, blamed(how, calls[number]):
            assert forks.once(NEW, Plan(number, how)).killed
            if prepare is not littered:
                check_instant(forks.out, old, NEW)
            forks.publish(NEW)
            assert before.items() <= directories(forks.out).items(), "a directory was replaced"
            if old is OLD:
                check_notified(seen.events(), forks.out, old, NEW)
            if index % 3 == 0:
                forks.publish(NEW)  # a snapshot before that was damaged goes
                check_converged(forks, NEW, NEWER)


def test_death_at_each_call_of_a_recovery(forks: Forks) -> None:
    """The start after a death between switch and moves dies as well."""
    published(forks)
    forks.save()
    switch = forks.publish(NEW).index(Call("rename", "..data"))
    forks.restore()
    assert forks.once(NEW, Plan(switch, "after")).killed
    calls = forks.publish(NEW)
    for number, how in cases(calls)[::2]:
        forks.restore()
        with watched(forks.out) as seen, blamed(how, calls[number]):
            assert forks.once(NEW, Plan(switch, "after")).killed
            assert forks.once(NEW, Plan(number, how)).killed
            check_instant(forks.out, OLD, NEW)
            forks.publish(NEW)
            check_notified(seen.events(), forks.out, OLD, NEW)


def test_after_a_death_at_each_call_the_source_of_each_file_is_known(forks: Forks) -> None:
    """The object is deleted meanwhile: its files stay, whichever they are by now."""
    published(forks)
    forks.save()
    calls = forks.publish(NEW)
    for number in [number for number, call in enumerate(calls) if call.changes][::3]:
        forks.restore()
        with blamed("after", calls[number]):
            assert forks.once(NEW, Plan(number, "after")).killed
            home = (forks.out / "..data").resolve()
            shown = {str(path.relative_to(home)): path.read_bytes()
                     for path in home.rglob("*") if path.is_file()}  # fmt: skip
            named = objects(dict.fromkeys(shown, ""))[1]
            forks.start({}, Plan(), "--onetime", *named)
            done = forks.ended()
            assert (done.status, snapshot(forks.out)) == (0, shown), done.log


# -- a call that fails, in a run that ends


def failures(calls: tuple[Call, ...]) -> Iterator[tuple[int, Call, int]]:
    """For each call that changes something, and some that read, an error that it can fail with."""
    for at, call in enumerate(calls):
        numbers = [number for number in ERRORS if call.can_fail_with(number)]
        if numbers and (call.changes or at % 3 == 0):
            yield at, call, numbers[at % len(numbers)]


def test_each_call_of_a_one_time_run_fails(forks: Forks) -> None:
    """Exit 1 and one line, or 0 and the new files; the next run converges."""
    published(forks)
    forks.save()
    for at, call, number in failures(forks.publish(NEW)):
        forks.restore()
        before = directories(forks.out)
        with watched(forks.out) as seen, blamed(errno.errorcode[number], call):
            done = forks.once(NEW, Plan(at, "fail", number))
            check_instant(forks.out, OLD, NEW)
            assert done.status in (0, 1)
            if done.status == 0:
                assert snapshot(forks.out) == encoded(NEW)
            else:
                (line,) = [line for line in done.log.splitlines() if " ERROR " in line]
                assert str(forks.out) in line
            forks.publish(NEW)
            assert before.items() <= directories(forks.out).items(), "a directory was replaced"
            excused = call.path if call.name == "open (read)" else ""
            check_notified(seen.events(), forks.out, OLD, NEW, excused)
            if at % 6 == 0:  # deaths leave more than errors do
                check_converged(forks, NEW, NEWER)


# -- a call that fails, in a sidecar that lives


class Sidecar:
    """A loader that watches, whose disk fails when told to."""

    def __init__(self, api: ApiServer, common: list[str], out: Path, scratch: Path) -> None:
        self.api, self.out = api, out
        self.plan_file = scratch / "plan"
        self.generation = 0
        self.contents: Contents = {}
        self.plan(Plan())
        self.change()
        self.loader = Loader(
            [*common, "--apiserver", api.url, "--watch", "--sync-interval", "1h",
             "--step-delay", "1ms", "--configmap", "both", "--configmap", "both:eds"],
            prefix=[*COMMAND[:-1], CRASH, str(self.plan_file), str(out)],
        )  # fmt: skip

    def plan(self, plan: Plan) -> None:
        """Replaced by rename, so that the loader never reads half of it."""
        temporary = self.plan_file.with_suffix(".new")
        temporary.write_text(json.dumps(plan) + "\n")
        os.utime(temporary, ns=(0, time.time_ns()))
        temporary.rename(self.plan_file)

    def change(self, more: str = "") -> Contents:
        """One event: two files change, two come, two go; in the top and in a subdirectory."""
        self.generation += not more
        g = self.generation
        data = {"keep": "k", "change": f"{g}{more}", f"only{g % 3}": "x"}
        self.contents = {**data, **{f"eds/{path}": text for path, text in data.items()}}
        self.api.configmap("demo", "both", data)
        return self.contents

    def calls(self, start: int = 0) -> tuple[Call, ...]:
        rows = Path(f"{self.plan_file}.calls").read_text().splitlines()[start:]
        return tuple(Call(*row.split("\t")) for row in rows)

    def is_converged(self, snapshots: int = 2) -> bool:
        assert self.loader.process.poll() is None, "the sidecar has died"
        assert "Traceback" not in self.loader.log
        try:
            disk.inspect(self.out, snapshots=snapshots)
        except (AssertionError, OSError):
            return False
        return snapshot(self.out) == encoded(self.contents)

    def wait_converged(self, snapshots: int = 2) -> None:
        wait_until(lambda: self.is_converged(snapshots))

    def publication(self) -> tuple[Call, ...]:
        """The calls of one publication when nothing fails (each one is like the others)."""
        self.change()
        self.wait_converged()
        start = len(self.calls())
        self.change()
        self.wait_converged()
        wait_until(lambda: len(set(self.calls(start))) > 10)
        return self.calls(start)


@pytest.fixture
def sidecar(api: ApiServer, common: list[str], out: Path, tmp_path: Path) -> Iterator[Sidecar]:
    found = Sidecar(api, common, out, tmp_path)
    with found.loader:
        wait_until(lambda: snapshot(out) == encoded(found.contents))
        wait_until(lambda: api.watches)
        yield found


def test_each_call_of_a_living_sidecar_fails_once(sidecar: Sidecar) -> None:
    """It stays alive, the last snapshot serves, it converges when the fault is over."""
    for at, call, number in failures(sidecar.publication()):
        old = sidecar.contents
        with watched(sidecar.out) as seen, blamed(errno.errorcode[number], call):
            sidecar.plan(Plan(at, "fail", number))
            new = sidecar.change()
            sidecar.wait_converged(3)  # a left-over that cannot go stays until the next time
            excused = call.path if call.name == "open (read)" else ""
            check_notified(seen.events(), sidecar.out, old, new, excused)
    sidecar.plan(Plan())
    sidecar.change()
    sidecar.wait_converged()


def test_from_each_call_on_everything_fails_for_a_while(sidecar: Sidecar) -> None:
    """Recovery fails too, another change comes meanwhile: nothing of it is forgotten."""
    changing = [call for call in sidecar.publication() if call.changes]
    for at, call in enumerate(changing):
        old, said = sidecar.contents, len(sidecar.loader.lines)
        number = (errno.ENOSPC, errno.EIO, errno.EROFS)[at % 3]
        with watched(sidecar.out) as seen, blamed(errno.errorcode[number], call):
            sidecar.plan(Plan(at, "fail", number, 1 << 30, changing=True))
            new = sidecar.change()
            sidecar.loader.wait_log("cannot publish|left-over stays|published", since=said)
            check_instant(sidecar.out, old, new)
            time.sleep(0.03)  # a few attempts more
            if at % 2:
                newer = sidecar.change(" again")
                time.sleep(0.02)
                check_instant(sidecar.out, old, new, newer)
            sidecar.plan(Plan())
            sidecar.wait_converged(3)
            check_notified(seen.events(), sidecar.out, old, sidecar.contents)


def test_a_short_write_is_completed(sidecar: Sidecar) -> None:
    """write(2) may take less than it is given."""
    for at, call in enumerate(sidecar.publication()):
        if call.name == "write":
            with blamed("short", call):
                sidecar.plan(Plan(at, "short"))
                sidecar.change()
                sidecar.wait_converged()
    assert sidecar.loader.count_log("cannot publish") == 0


# -- ordered publications of several snapshots


TYPE = "type.googleapis.com/envoy.config."


def resource(kind: str, **fields: object) -> str:
    return json.dumps({"resources": [{"@type": f"{TYPE}{kind}", **fields}]})


def steps(color: str) -> Contents:
    """CDS, RDS and EDS of one cluster."""
    route = {"match": {"prefix": "/"}, "route": {"cluster": color}}
    hosts = [{"name": "all", "domains": ["*"], "routes": [route]}]
    return {
        "cds.json": resource("cluster.v3.Cluster", name=color),
        "rds.json": resource("route.v3.RouteConfiguration", name="r", virtual_hosts=hosts),
        f"eds/{color}": color,
        "flag": color,
    }


def references_hold(out: Path) -> tuple[frozenset[str], str]:
    """What one resolution of `..data` shows: its clusters, and the one that is routed to."""
    while True:
        home = out / os.readlink(out / "..data")
        try:
            cds = json.loads((home / "cds.json").read_text())
            clusters = frozenset(row["name"] for row in cds["resources"])
            (route,) = json.loads((home / "rds.json").read_text())["resources"]
            name = route["virtual_hosts"][0]["routes"][0]["route"]["cluster"]
            assert name in clusters, f"routed to {name}, which is not among {sorted(clusters)}"
            assert (home / f"eds/{name}").exists(), f"the endpoints of {name} are gone"
        except (AssertionError, FileNotFoundError):
            if home.exists() and out / os.readlink(out / "..data") == home:
                raise
            continue  # two publications passed meanwhile: what was looked at is pruned
        return clusters, name


def test_death_at_each_call_of_an_ordered_publication(forks: Forks) -> None:
    """Between the steps too: the next loader goes on where it was, and no reference breaks."""
    old, new = steps("blue"), steps("green")
    forks.publish(old)
    forks.save()
    calls = forks.publish(new)
    assert calls.count(Call("rename", "..data")) >= 3
    for number, call in enumerate(calls):
        if not call.changes:
            continue
        forks.restore()
        states = set()
        with watched(forks.out) as seen, blamed("after", call):
            for plan in (Plan(number, "after"), Plan()):
                forks.start(new, plan, "--onetime")
                while not forks.is_over(0.0005):
                    states.add(references_hold(forks.out))
                assert forks.ended().status == (0 if plan.at < 0 else -signal.SIGKILL)
                states.add(references_hold(forks.out))
            assert states >= {(frozenset(["green"]), "green")}
            check_notified(seen.events(), forks.out, old, new)
            assert disk.inspect(forks.out).files == encoded(new)

"""The crash matrix: every filesystem call of a publication fails, or the process dies around it.

Each case starts from the same disk, counts the calls, and lets one go wrong. Then the promises
of that instant are checked, a new loader starts, and then those of convergence: the files are
there, Envoy was told of each change after the switch, and what was left over goes.
"""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import loader
from tests.support import disk
from tests.support.apiserver import ApiServer
from tests.support.crash import ERRORS, Call, Plan, arm
from tests.support.disk import IN_MOVED_TO, Inotify
from tests.support.loader import ROOT, Loader, snapshot, wait_until

Contents = Mapping[str, str]

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


# -- a loader in a fork: as a process of its own, without the 50 ms that an interpreter takes


class Ended(NamedTuple):
    status: int  # as Popen has it: negative is a signal
    calls: tuple[Call, ...]
    log: str


def objects(contents: Contents) -> tuple[dict[str, Any], list[str]]:
    """A list as `kubectl get -o json` prints it, and the options that publish it as `contents`."""
    by_directory: dict[str, dict[str, str]] = {}
    for path, text in contents.items():
        directory, _, name = path.rpartition("/")
        by_directory.setdefault(directory, {})[name] = text
    items, args = [], []
    for directory, keys in by_directory.items():
        name = f"map-{directory or 'top'}"
        metadata = {"name": name, "namespace": "demo"}
        items.append(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": keys}
        )
        args += ["--configmap", f"{name}:{directory}" if directory else name]
    return {"apiVersion": "v1", "kind": "List", "items": items}, args


class Forks:
    """Runs of `loader.main`, each in a fork."""

    def __init__(self, out: Path, scratch: Path) -> None:
        self.out = out
        self._scratch = scratch
        self._log = scratch / "log"
        self._calls = scratch / "calls"
        self._objects = scratch / "objects.json"

    def arguments(self, contents: Contents, *more: str) -> list[str]:
        document, args = objects(contents)
        temporary = self._scratch / "objects.new"
        temporary.write_text(json.dumps(document))
        temporary.rename(self._objects)
        base = ["--namespace", "demo", "--output-dir", str(self.out), "--step-delay", "1ms"]
        return [*base, "--from-file", str(self._objects), *args, *more]

    def start(self, args: list[str], plan: Plan) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:  # the child: it never returns
            number = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(number, 1)
            os.dup2(number, 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            loader.log = loader.Log()
            trace = os.open(self._calls, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            write = os.write
            arm(
                str(self.out),
                plan,
                lambda call: void(write(trace, f"{call.name}\t{call.path}\n".encode())),
            )
            status = loader.main(args)
        except BaseException as error:
            os.write(2, f"Traceback of the fork: {error!r}\n".encode())
            os._exit(99)
        os._exit(status)

    def ended(self, pid: int, timeout: float = 20.0) -> Ended:
        watch = os.pidfd_open(pid)
        late = not select.select([watch], [], [], timeout)[0]
        os.close(watch)
        if late:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert not late, f"the fork still ran after {timeout} s:\n{self._log.read_text()}"
        rows = [line.split("\t") for line in self._calls.read_text().splitlines()]
        calls = tuple(Call(name, path) for name, path in rows)
        log = self._log.read_text()
        assert "Traceback" not in log, log
        return Ended(os.waitstatus_to_exitcode(status), calls, log)

    def once(self, contents: Contents, plan: Plan = Plan()) -> Ended:  # noqa: B008
        return self.ended(self.start(self.arguments(contents, "--onetime"), plan))


def void(_: object) -> None:
    return None


@pytest.fixture
def forks(tmp_path: Path) -> Forks:
    return Forks(tmp_path / "runtime", tmp_path)


# -- what must hold


def encoded(contents: Contents) -> dict[str, bytes]:
    return {path: text.encode() for path, text in contents.items()}


def inodes(out: Path) -> dict[str, int]:
    current = out / "current"
    found = {"current": current.stat().st_ino} if current.is_dir() else {}
    for place, names, _ in os.walk(current):
        for name in names:
            path = Path(place, name)
            found[str(path.relative_to(out))] = path.stat().st_ino
    return found


def watched(out: Path) -> Inotify:
    return Inotify(out, *(out / name for name in inodes(out)))


def check_instant(out: Path, old: Contents, new: Contents, directories: dict[str, int]) -> None:
    """Every path that old and new have resolves, and all show one snapshot."""
    shown = snapshot(out)
    # What goes goes one snapshot later than what comes: the third has both.
    candidates = (encoded(old), encoded(new), encoded({**old, **new}))
    if not old and not shown:
        return
    fits = [
        all(files.get(path) == content for path, content in shown.items()) for files in candidates
    ]
    assert any(fits), f"mixed: {shown}"
    missing = (old.keys() & new.keys()) - shown.keys()
    assert not missing, f"{missing} does not resolve"
    now = inodes(out)
    assert {name: now.get(name) for name in directories} == directories, "a directory was replaced"
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
    watched_directories = {path.rpartition("/")[0] for path in old} | {""}
    changed = {path for path, text in new.items() if old.get(path) != text
               and path.rpartition("/")[0] in watched_directories}  # fmt: skip
    assert changed <= after, f"Envoy was not notified of {changed - after}: {moves}"
    kept = {path for path, text in new.items() if old.get(path) == text}
    needless = kept & {name.removeprefix("current/") for name in moves}
    needless -= {excused.partition("/")[2]}
    assert not needless, f"Envoy was notified of {needless}, which did not change"


def check_converged(forks: Forks, new: Contents, newer: Contents) -> None:
    """What `new` says stands, one more start touches nothing, one more publication tidies up."""
    out = forks.out
    assert disk.inspect(out, converged=False).files == encoded(new)
    before = disk.fingerprint(out)
    with watched(out) as seen:
        again = forks.once(new)
        assert again.status == 0, again.log
        assert seen.events() == []
    assert disk.fingerprint(out) == before
    done = forks.once(newer)
    assert done.status == 0, done.log
    assert disk.inspect(out, snapshots=2).files == encoded(newer)


def cases(calls: tuple[Call, ...]) -> list[tuple[int, str]]:
    """(call, how) of every death: before the first, after each, in the middle of each write.

    What is on disk before a call is what is there after the last one that changed something.
    """
    changing = [number for number, call in enumerate(calls) if call.changes]
    found = [(changing[0], "before")]
    for number in changing:
        found.append((number, "after"))
        if calls[number].name == "write":
            found.append((number, "halfway"))
    return found


def wipe(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)


Prepare = Callable[[Forks], None]


def nothing(forks: Forks) -> None:
    wipe(forks.out)


def published(forks: Forks) -> None:
    """Two snapshots stand, so that the next publication prunes one."""
    wipe(forks.out)
    for contents in (OLDER, OLD):
        assert forks.once(contents).status == 0


def half_notified(forks: Forks) -> None:
    """The process before died right after the switch: everything is left to be recovered."""
    at = count(forks, published, NEW).index(Call("rename", "..data"))
    published(forks)
    assert forks.once(NEW, Plan(at, "after")).status == -signal.SIGKILL


def littered(forks: Forks) -> None:
    """Half-written snapshots, a link's temporary name, damaged files and links."""
    published(forks)
    out = forks.out
    home = out / os.readlink(out / "..data")
    (out / "..0123456789abcdef/eds").mkdir(parents=True)
    (out / "..0123456789abcdef/eds/x").write_text("half")
    (out / "..link").symlink_to("nowhere")
    (out / "current/change").unlink()
    (home / "gone").write_text("damaged")
    (out / "current/eds/keep").unlink()
    (out / "current/eds/keep").write_text("k")


def count(forks: Forks, prepare: Prepare, contents: Contents) -> tuple[Call, ...]:
    prepare(forks)
    done = forks.once(contents)
    assert done.status == 0, done.log
    return done.calls


# -- deaths


def test_the_calls_of_a_publication_are_few_and_counted(forks: Forks) -> None:
    """The matrix is only as good as its counting: each kind of call must be in it."""
    calls = count(forks, published, NEW)
    assert {call.name for call in calls} >= {
        "mkdir", "open", "write", "link", "symlink", "rename", "unlink", "rmdir", "readlink",
        "scandir", "lstat", "open (read)",
    }  # fmt: skip
    assert calls.count(Call("rename", "..data")) == 2
    changing = [call for call in calls if call.changes]
    assert len(changing) < 90, changing


def test_death_at_each_call_of_the_first_publication(forks: Forks) -> None:
    deaths(forks, nothing, {})


def test_death_at_each_call_of_a_publication(forks: Forks) -> None:
    """Files change, come and go, in a subdirectory too, one of which is new; one is pruned. It is
    two snapshots: what is gone goes with the second."""
    deaths(forks, published, OLD)


def test_death_at_each_call_of_a_recovery(forks: Forks) -> None:
    """The start after a death between switch and moves dies as well."""
    calls = count(forks, half_notified, NEW)
    switch = count(forks, published, NEW).index(Call("rename", "..data"))
    for number, how in cases(calls):
        published(forks)
        directories = inodes(forks.out)
        with watched(forks.out) as seen:
            assert forks.once(NEW, Plan(switch, "after")).status == -signal.SIGKILL
            died = forks.once(NEW, Plan(number, how))
            assert died.status == -signal.SIGKILL
            with blamed(how, calls[number]):
                check_instant(forks.out, OLD, NEW, directories)
                assert forks.once(NEW).status == 0
                check_notified(seen.events(), forks.out, OLD, NEW)
        with blamed(how, calls[number]):
            check_converged(forks, NEW, NEWER)


def test_death_at_each_call_of_a_repair(forks: Forks) -> None:
    """A start that finds litter and damage, and dies while it puts them right."""
    calls = count(forks, littered, NEW)
    for number, how in cases(calls):
        littered(forks)
        assert forks.once(NEW, Plan(number, how)).status == -signal.SIGKILL
        with blamed(how, calls[number]):
            assert forks.once(NEW).status == 0
            # The snapshot before has a damaged file: the next start may remove it.
            assert forks.once(NEW).status == 0
            check_converged(forks, NEW, NEWER)


def deaths(forks: Forks, prepare: Prepare, old: Contents, *, thorough: bool = True) -> None:
    calls = count(forks, prepare, NEW)
    for number, how in cases(calls):
        prepare(forks)
        forks.out.mkdir(exist_ok=True)
        directories = inodes(forks.out)
        with watched(forks.out) as seen, blamed(how, calls[number]):
            died = forks.once(NEW, Plan(number, how))
            assert died.status == -signal.SIGKILL
            check_instant(forks.out, old, NEW, directories)
            assert forks.once(NEW).status == 0
            if old:
                check_notified(seen.events(), forks.out, old, NEW)
        if thorough:
            with blamed(how, calls[number]):
                check_converged(forks, NEW, NEWER)


class blamed:
    """Says at which call a case failed."""

    def __init__(self, how: object, call: Call) -> None:
        self._note = f"{how} {call.name} {call.path}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(f"at: {self._note}")


# -- a call that fails, in a run that ends


ERRNOS = list(ERRORS)


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_each_call_of_a_one_time_run_fails(forks: Forks, number: int) -> None:
    """Exit 1 and one line, or 0 and the new files; the next run converges."""
    calls = count(forks, published, NEW)
    for at, call in enumerate(calls):
        if not call.can_fail_with(number):
            continue
        published(forks)
        directories = inodes(forks.out)
        with watched(forks.out) as seen, blamed(errno.errorcode[number], call):
            done = forks.once(NEW, Plan(at, "fail", number))
            check_instant(forks.out, OLD, NEW, directories)
            assert done.status in (0, 1)
            if done.status == 0:
                assert snapshot(forks.out) == encoded(NEW)
            else:
                errors = [line for line in done.log.splitlines() if " ERROR " in line]
                assert len(errors) == 1, done.log
                assert str(forks.out) in errors[0]
            assert forks.once(NEW).status == 0
            excused = call.path if call.name == "open (read)" else ""
            check_notified(seen.events(), forks.out, OLD, NEW, excused)
        if at % 4 == 0:  # half of the time of a case, and deaths leave more than errors do
            with blamed(errno.errorcode[number], call):
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
        crash = str(ROOT / "tests/support/crash.py")
        self.loader = Loader(
            [*common, "--apiserver", api.url, "--watch", "--sync-interval", "1h",
             "--step-delay", "1ms", "--configmap", "both", "--configmap", "both:eds"],
            prefix=[sys.executable, "-I", "-S", crash, str(self.plan_file), str(out)],
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

    def wait_converged(self, snapshots: int = 2) -> None:
        """Until everything is as promised, or say what is not."""
        deadline = time.monotonic() + 5
        while True:
            try:
                assert snapshot(self.out) == encoded(self.contents)
                disk.inspect(self.out, snapshots=snapshots)
                return
            except (AssertionError, OSError) as error:
                if time.monotonic() > deadline:
                    error.add_note(f"the loader's log:\n{self.loader.log[-3000:]}")
                    raise
                assert self.loader.process.poll() is None, "the sidecar has died"
                time.sleep(0.002)

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


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_each_call_of_a_living_sidecar_fails_once(sidecar: Sidecar, number: int) -> None:
    """It stays alive, the last snapshot serves, it converges when the fault is over."""
    for at, call in enumerate(sidecar.publication()):
        if not call.can_fail_with(number):
            continue
        old = sidecar.contents
        with watched(sidecar.out) as seen, blamed(errno.errorcode[number], call):
            sidecar.plan(Plan(at, "fail", number))
            new = sidecar.change()
            sidecar.wait_converged(3)  # a left-over that cannot go stays until the next time
            check_notified(seen.events(), sidecar.out, old, new)
        assert "Traceback" not in sidecar.loader.log
    sidecar.plan(Plan())
    sidecar.change()
    sidecar.wait_converged()


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get
)
def test_from_each_call_on_everything_fails_for_a_while(sidecar: Sidecar, number: int) -> None:
    """Recovery fails too, another change comes meanwhile: nothing of it is forgotten."""
    changing = [call for call in sidecar.publication() if call.changes]
    for at, call in enumerate(changing):
        old, directories = sidecar.contents, inodes(sidecar.out)
        said = len(sidecar.loader.lines)
        with watched(sidecar.out) as seen, blamed(errno.errorcode[number], call):
            sidecar.plan(Plan(at, "fail", number, 1 << 30, changing=True))
            new = sidecar.change()
            sidecar.loader.wait_log("cannot publish|left-over stays|published", since=said)
            check_instant(sidecar.out, old, new, directories)
            time.sleep(0.03)  # a few attempts more
            if at % 2:
                new = sidecar.change(" again")
                time.sleep(0.02)
            check_instant_any(sidecar.out)
            sidecar.plan(Plan())
            sidecar.wait_converged(3)
            check_notified(seen.events(), sidecar.out, old, new)
        assert "Traceback" not in sidecar.loader.log
    sidecar.change()
    sidecar.wait_converged()


def check_instant_any(out: Path) -> None:
    """What is shown is complete and of one generation, whichever."""
    shown = snapshot(out)
    assert shown["keep"] == shown["eds/keep"] == b"k"
    assert shown["change"] == shown["eds/change"]


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


def cds(*names: str) -> str:
    rows = [{"@type": f"{TYPE}cluster.v3.Cluster", "name": name} for name in names]
    return json.dumps({"resources": rows})


def rds(name: str) -> str:
    route = {"match": {"prefix": "/"}, "route": {"cluster": name}}
    hosts = [{"name": "all", "domains": ["*"], "routes": [route]}]
    row = {"@type": f"{TYPE}route.v3.RouteConfiguration", "name": "r", "virtual_hosts": hosts}
    return json.dumps({"resources": [row]})


STEPS_OLD = {"cds.json": cds("blue"), "rds.json": rds("blue"), "eds/blue": "b", "flag": "1"}
STEPS_NEW = {"cds.json": cds("green"), "rds.json": rds("green"), "eds/green": "g", "flag": "2"}


def references_hold(out: Path) -> tuple[frozenset[str], str]:
    """What one resolution of `..data` shows: its clusters, and the one that is routed to."""
    while True:
        target = os.readlink(out / "..data")
        home = out / target
        try:
            clusters = frozenset(
                row["name"] for row in json.loads((home / "cds.json").read_text())["resources"]
            )
            (route,) = json.loads((home / "rds.json").read_text())["resources"]
            name = route["virtual_hosts"][0]["routes"][0]["route"]["cluster"]
            assert name in clusters, f"routed to {name}, which is not among {sorted(clusters)}"
            assert (home / f"eds/{name}").exists(), f"the endpoints of {name} are gone"
        except (AssertionError, FileNotFoundError):
            if home.exists() and os.readlink(out / "..data") == target:
                raise
            continue  # two publications passed meanwhile: what was looked at is pruned
        return clusters, name


def stepping(forks: Forks, plan: Plan, *, restart: bool = False) -> Ended | None:
    """A sidecar on the way from old to new; None when it has arrived (it is stopped then)."""
    args = forks.arguments(STEPS_NEW, "--sync-interval", "1h", "--step-delay", "1ms")
    pid = forks.start(args, plan)
    deadline = time.monotonic() + 10
    states = set()
    while True:
        done = peek(pid)
        states.add(references_hold(forks.out))
        if done:
            return forks.ended(pid)
        arrived = snapshot(forks.out) == encoded(STEPS_NEW)
        if arrived and len([name for name in os.listdir(forks.out) if name != "..notify"]) <= 5:
            os.kill(pid, signal.SIGTERM)
            ended = forks.ended(pid)
            # One that has nothing to do may not have come to its handlers yet.
            if ended.status == 0 or (restart and ended.status == -signal.SIGTERM):
                assert restart or len(states) >= 2, states
                return None
            return ended
        assert time.monotonic() < deadline, forks.ended(pid, 0.0)
        time.sleep(0.001)


def peek(pid: int) -> bool:
    """Whether it has ended, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def test_death_at_each_call_of_an_ordered_publication(forks: Forks) -> None:
    """Between the steps too: the next loader goes on where it was, and no reference breaks."""
    number = 0
    while True:
        wipe(forks.out)
        assert forks.once(STEPS_OLD).status == 0
        directories = inodes(forks.out)
        with watched(forks.out) as seen:
            died = stepping(forks, Plan(number, "after", changing=True))
            if died is None:
                break
            call = [call for call in died.calls if call.changes][-1]
            with blamed(f"after ({number})", call):
                assert died.status == -signal.SIGKILL, died
                references_hold(forks.out)
                assert stepping(forks, Plan(), restart=True) is None
                assert inodes(forks.out).items() >= directories.items()
                check_notified(seen.events(), forks.out, STEPS_OLD, STEPS_NEW)
                disk.inspect(forks.out)
        number += 1
    assert number > 40, "three snapshots or four have more calls than that"

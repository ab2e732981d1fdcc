"""Publication: the layout, what Envoy's kind of watch sees of it, and what a disk may hold before.

Most tests drive `Output`, the directory's one owner; where a promise is about the whole program, a
loader process. Crashes and failing calls are in test_crash.py, what others may plant on the volume
in test_volume.py, concurrent readers in test_reader.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import loader
from tests.conftest import RunLoader, StartLoader
from tests.support import disk
from tests.support.apiserver import ApiServer
from tests.support.disk import IN_CREATE, IN_DELETE, IN_MODIFY, IN_MOVED_FROM, IN_MOVED_TO, Inotify
from tests.support.loader import COMMAND, Loader, environment, snapshot, wait_files, wait_until

IN_ATTRIB, IN_CLOSE_WRITE = 0x4, 0x8
EVERYTHING = (
    IN_MODIFY | IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
)
SOURCE = "configmap demo/envoy-xds"
ONCE = ("--onetime", "--configmap", "envoy-xds")
WATCH = ("--watch", "--configmap", "envoy-xds")
Contents = Mapping[str, str]


def xds(name: str) -> str:
    """A file of one resource of this type."""
    return f'{{"resources":[{{"@type":"type.googleapis.com/envoy.config.{name}"}}]}}'


CDS, EDS = xds("cluster.v3.Cluster"), xds("endpoint.v3.ClusterLoadAssignment")
RDS, LDS = xds("route.v3.RouteConfiguration"), xds("listener.v3.Listener")


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    """As `loader.main` sets it; what happens with others is asked of a process below."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def output(out: Path) -> loader.Output:
    """As a loader that starts has it: locked and recovered."""
    found = loader.Output(str(out))
    found.lock()
    found.recover()
    return found


def reopened(output: loader.Output) -> loader.Output:
    """The same after a restart. The lock stays with the object, as only a process can have two."""
    again = loader.Output(output.root)
    again.recover()
    return again


def files(contents: Contents, mode: int = 0o644) -> dict[str, loader.File]:
    return {path: loader.file_of(text.encode(), SOURCE, mode) for path, text in contents.items()}


def publish(output: loader.Output, contents: Contents, mode: int = 0o644) -> str:
    """The name of the snapshot."""
    output.publish(files(contents, mode))
    output.remember({})
    output.prune()
    return output.snapshot


def texts(out: Path, **options: Any) -> dict[str, str]:
    """What is published, of a directory in which nothing is left over."""
    return {path: content.decode() for path, content in disk.inspect(out, **options).files.items()}


def inodes(out: Path, *paths: str) -> dict[str, int]:
    return {path: (out / "current" / path).stat().st_ino for path in paths}


def state(out: Path) -> dict[str, Any]:
    """What is remembered for a restart."""
    path = out / "..state/loader.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def snapshots(out: Path) -> set[str]:
    return {name for name in os.listdir(out) if disk.VERSION.match(name)}


# -- layout


def test_links_are_relative_so_the_directory_can_be_mounted_elsewhere(
    output: loader.Output, out: Path, tmp_path: Path
) -> None:
    publish(output, {"rds.yaml": "1", "a/b/c/deep.yaml": "2"})
    moved = tmp_path / "elsewhere"
    shutil.copytree(out, moved, symlinks=True)
    shutil.rmtree(out)
    assert snapshot(moved) == {"rds.yaml": b"1", "a/b/c/deep.yaml": b"2"}


def test_the_version_is_the_hash_of_the_content_alone(output: loader.Output) -> None:
    """Not of the source, the order or the place, so two sidecars can be compared."""
    one = publish(output, {"a": "1", "b": "2"})
    same = {path: loader.file_of(text, "secret x/y") for path, text in (("b", b"2"), ("a", b"1"))}
    assert f"..{loader.version_of(same)}" == one
    for other in ({"a": "1"}, {"a": "1", "b": "3"}, {"a": "1", "c": "2"}, {"a": "2", "b": "1"}):
        assert publish(output, other) != one
    assert publish(output, {"a": "1", "b": "2"}, 0o600) != one


CONTENTS: dict[str, dict[str, bytes]] = {
    "none": {},
    "empty": {"empty.yaml": b""},
    "text": {"no-newline": b"x", "-dash": "ä".encode(), ".hidden": b"1\r\n"},
    "binary": {"blob.pb": bytes(range(256)) * 9},
    "1 MiB": {"big.yaml": b"x" * (1 << 20)},
    "deep": {"a/b/c/d/e.yaml": b"deep", "a/f.yaml": b"shallow"},
}


@pytest.mark.parametrize("contents", CONTENTS.values(), ids=CONTENTS)
def test_what_is_published_is_read_byte_for_byte(
    output: loader.Output, out: Path, contents: dict[str, bytes]
) -> None:
    wanted = {path: loader.file_of(content, SOURCE) for path, content in contents.items()}
    output.publish(wanted)
    assert disk.inspect(out).files == contents
    again = reopened(output)
    assert again.published == wanted
    assert again.snapshot == output.snapshot


# -- what Envoy's watch sees


def test_each_changed_file_is_moved_exactly_once_and_no_other(
    output: loader.Output, out: Path
) -> None:
    """And nothing is written where Envoy watches: IN_MODIFY wakes its main thread."""
    publish(output, {"cds.yaml": CDS, "rds.yaml": RDS, "same": "s", "eds/a": "1", "eds/b": "1"})
    watched = (out, out / "current", out / "current/eds")
    with Inotify(*watched) as seen, Inotify(*watched, mask=IN_CLOSE_WRITE) as written:
        publish(output, {"cds.yaml": CDS, "rds.yaml": f"{RDS}\n", "same": "s", "eds/a": "2",
                         "eds/b": "1", "new": "n"})  # fmt: skip
        moves = [out / "..data", *(out / "current" / path for path in ("eds/a", "new", "rds.yaml"))]
        assert seen.events() == [(IN_MOVED_TO, path) for path in moves]
        assert written.events() == []


def test_the_root_sees_one_move_at_the_switch_and_nothing_else(
    output: loader.Output, out: Path
) -> None:
    """A shared watched_directory fires every subscription on any rename into it."""
    publish(output, {"rds.yaml": "1"})
    for contents in ({"rds.yaml": "2"}, {"rds.yaml": "2", "new.yaml": "1"}, {"new.yaml": "1"}):
        with Inotify(out) as seen:
            publish(output, contents)
            assert seen.events() == [(IN_MOVED_TO, out / "..data")]


def test_a_removed_file_moves_nothing(output: loader.Output, out: Path) -> None:
    publish(output, {"rds.yaml": "1", "old.yaml": "1"})
    with Inotify(out / "current") as seen:
        publish(output, {"rds.yaml": "1"})
        assert seen.events() == []
    assert texts(out) == {"rds.yaml": "1"}


def test_children_are_notified_before_parents(output: loader.Output, out: Path) -> None:
    """By content, not by name: EDS, CDS, RDS, LDS."""
    kinds = {"a.yaml": LDS, "b.yaml": RDS, "c.yaml": CDS, "d.yaml": EDS}
    publish(output, kinds)
    with Inotify(out / "current") as seen:
        publish(output, {path: f"{text}\n" for path, text in kinds.items()})
        assert seen.moved() == ["d.yaml", "c.yaml", "b.yaml", "a.yaml"]


def spied(monkeypatch: pytest.MonkeyPatch, look: Callable[[str, str], None]) -> None:
    """Call `look` with both paths before each rename(2)."""
    rename = os.rename

    def spy(source: str, target: str) -> None:
        look(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", spy)


def test_every_path_shows_the_new_snapshot_before_the_first_move(
    output: loader.Output, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(output, {"a": "1", "b": "1", "gone": "1"})
    shown: list[dict[str, bytes]] = []
    spied(monkeypatch, lambda _, to: shown.append(snapshot(out)) if "/current/" in to else None)
    publish(output, {"a": "2", "b": "2"})
    assert shown == [{"a": b"2", "b": b"2"}] * 2


def test_a_changed_mode_is_a_change(output: loader.Output, out: Path) -> None:
    publish(output, {"key": "x"}, 0o644)
    with Inotify(out / "current") as seen:
        publish(output, {"key": "x"}, 0o600)
        assert seen.moved() == ["key"]
    assert disk.modes(out) == {".": 0o755, "key": 0o600}


# -- hard links


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EXDEV])
def test_where_the_kernel_refuses_links_files_are_copied(
    output: loader.Output, out: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    publish(output, {"same": "s", "key": "1"})

    def refuse(*_: object, **__: object) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "link", refuse)
    with Inotify(out / "current") as seen:
        publish(output, {"same": "s", "key": "2"})
        assert seen.moved() == ["key"], "a copy of an unchanged file is no change"
    assert texts(out) == {"same": "s", "key": "2"}


# -- versions that are already there


def test_a_b_a_publishes_the_verified_directory_again(output: loader.Output, out: Path) -> None:
    first = publish(output, {"k": "a", "same": "s"})
    publish(output, {"k": "b", "same": "s"})
    with Inotify(out, out / "current") as seen:
        assert publish(output, {"k": "a", "same": "s"}) == first
        assert seen.moved() == ["..data", "k"]
    assert texts(out) == {"k": "a", "same": "s"}


def spoil(path: Path, what: str) -> None:
    """Damage one file of a snapshot, as people and disks do."""
    if what == "same size and time":
        before = path.stat()
        path.write_text("evil")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif what == "truncated":
        os.truncate(path, 1)
    elif what == "chmod":
        path.chmod(0o600)
    elif what == "extra":
        path.with_name("extra").write_text("x")
    else:
        path.unlink()
    if what == "a link":
        path.symlink_to("same")
    elif what == "a directory":
        path.mkdir()


DAMAGE = ["same size and time", "truncated", "chmod", "removed", "extra", "a link", "a directory"]


@pytest.mark.parametrize("what", DAMAGE)
def test_a_b_a_never_trusts_a_damaged_directory(
    output: loader.Output, out: Path, what: str
) -> None:
    """Nor one that a publication that failed left half-written."""
    first = publish(output, {"k": "aaaa", "same": "s"})
    publish(output, {"k": "bbbb", "same": "s"})
    spoil(out / first / "k", what)
    assert publish(output, {"k": "aaaa", "same": "s"}) == f"{first}.1"
    assert texts(out) == {"k": "aaaa", "same": "s"}
    assert disk.modes(out)["k"] == 0o644


@pytest.mark.parametrize("what", DAMAGE)
def test_the_periodic_check_repairs_what_was_damaged(
    output: loader.Output, out: Path, what: str
) -> None:
    """At both names of a shared inode: the last snapshot but one must not be trusted either."""
    publish(output, {"k": "good", "other": "0"})
    publish(output, {"k": "good", "other": "1"})
    spoil(out / output.snapshot / "k", what)
    with Inotify(out / "current") as seen:
        assert output.check() != []
        assert seen.moved() == ([] if what == "extra" else ["k"]), "Envoy may have read it"
        assert output.check() == []
    assert texts(out) == {"k": "good", "other": "1"}
    assert disk.modes(out)["k"] == 0o644
    publish(output, {"k": "good", "other": "0"})
    assert texts(out) == {"k": "good", "other": "0"}


def test_a_start_removes_half_written_left_overs(output: loader.Output, out: Path) -> None:
    first = publish(output, {"k": "1"})
    second = publish(output, {"k": "2"})
    for name in ("..0123456789abcdef", "..0123456789abcdef.7"):
        (out / name / "eds").mkdir(parents=True)
        (out / name / "eds/x").write_text("half")
    (out / "..link").symlink_to("nowhere")
    reopened(output)
    assert snapshots(out) == {first, second}, "the last snapshot but one stays over a restart"
    assert texts(out) == {"k": "2"}


def test_other_peoples_directories_stay(output: loader.Output, out: Path) -> None:
    """Only what has the form of a snapshot's name is ever removed."""
    names = {"..backup", "..2024_01_01", "lost+found", "..0123456789ABCDEF", "..0123.1.2"}
    for name in names:
        (out / name).mkdir()
        (out / name / "precious").write_text("x")
    for text in ("1", "2", "3"):
        publish(output, {"k": text})
    reopened(output)
    assert {path.parent.name for path in out.glob("*/precious")} == names


# -- accidents


def remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def replace_by_link(path: Path, target: str) -> None:
    remove(path)
    path.symlink_to(target)


def replace_by_file(path: Path) -> None:
    remove(path)
    path.write_text("1")


ACCIDENTS: dict[str, Callable[[Path], None]] = {
    "no link": lambda out: remove(out / "current/k"),
    "a wrong link": lambda out: replace_by_link(out / "current/k", "/etc/hostname"),
    "a real file": lambda out: replace_by_file(out / "current/k"),
    "no switch": lambda out: remove(out / "..data"),
    "a wrong switch": lambda out: replace_by_link(out / "..data", "..0000000000000000"),
    "a file for the switch": lambda out: replace_by_file(out / "..data"),
    "no snapshot": lambda out: remove(out / os.readlink(out / "..data")),
    "no directory": lambda out: remove(out / "current/eds"),
    "a linked directory": lambda out: replace_by_link(out / "current/eds", "/nowhere"),
    "no current": lambda out: remove(out / "current"),
    # As ConfigMap volumes have it: such a directory cannot hold Envoy's watch.
    "current is a link": lambda out: replace_by_link(out / "current", "..data"),
    "nothing left": lambda out: remove(*out.iterdir()),
}


@pytest.mark.parametrize("restart", [False, True], ids=["check", "restart"])
@pytest.mark.parametrize("accident", ACCIDENTS.values(), ids=ACCIDENTS)
def test_it_converges_whatever_it_finds(
    output: loader.Output, out: Path, accident: Callable[[Path], None], restart: bool
) -> None:
    contents = {"k": "1", "eds/a": "1"}
    publish(output, contents)
    accident(out)
    if restart:
        output = reopened(output)
        publish(output, contents)
    else:
        assert output.check() != []
    assert texts(out) == contents
    assert output.check() == []
    publish(output, {"k": "2"})
    assert texts(out) == {"k": "2"}


def test_a_directory_in_the_place_of_the_switch_is_named(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    """It may be somebody's: nobody removes it."""
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    (out / "..data").mkdir(parents=True)
    done = run_loader(*ONCE)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert f"{out}/..data" in done.stderr


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_a_file_that_cannot_be_read_at_a_start_keeps_its_link(
    output: loader.Output, out: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """What cannot be read now is there all the same: Envoy may start at this moment."""
    publish(output, {"k": "1", "z": "1"})
    real = os.open

    def refuse(place: Any, *args: Any, **more: Any) -> Any:
        if str(place).endswith("/k"):
            raise OSError(number, os.strerror(number), place)
        return real(place, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    with Inotify(out / "current", mask=EVERYTHING) as seen:
        with contextlib.suppress(OSError):
            reopened(output)
        assert seen.events() == []
    assert snapshot(out) == {"k": b"1", "z": b"1"}


# -- directories


def test_directories_in_current_are_never_removed_even_when_empty(
    output: loader.Output, out: Path
) -> None:
    """Envoy's watch is bound to the directory, not to its name."""
    publish(output, {"eds/a": "1", "x/y/z": "1"})
    before = inodes(out, ".", "eds", "x", "x/y")
    publish(output, {"rds.yaml": "1"})
    again = reopened(output)
    again.check()
    with Inotify(out / "current/eds") as seen:
        publish(again, {"eds/a": "2"})
        assert seen.moved() == ["a"]
    assert inodes(out, ".", "eds", "x", "x/y") == before


@pytest.mark.parametrize("gone", ["removed", "a link to another directory"])
def test_a_directory_that_somebody_took_away_is_made_again(
    output: loader.Output, out: Path, tmp_path: Path, gone: str
) -> None:
    """With the change of a file in it, which follows no link out of `current/`."""
    publish(output, {"eds/a.yaml": "1"})
    place, other = out / "current/eds", tmp_path / "other"
    other.mkdir()
    place.rename(tmp_path / "away")
    if gone != "removed":
        place.symlink_to(other)
    publish(output, {"eds/a.yaml": "2"})
    assert not place.is_symlink()
    assert texts(out) == {"eds/a.yaml": "2"}
    assert not list(other.iterdir())


def test_a_file_becomes_a_directory(output: loader.Output, out: Path) -> None:
    """`--configmap flags` with a key `runtime` becomes `--configmap flags:runtime`."""
    publish(output, {"runtime": "1", "k": "1"})
    publish(output, {"runtime/a": "1", "k": "1"})
    assert texts(out) == {"runtime/a": "1", "k": "1"}


def test_a_file_that_is_needed_costs_only_what_goes_below_it(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    """`--configmap flags` with a key `runtime`, which another file names, becomes
    `--configmap flags:runtime`."""
    named = {"x": f"path: {out}/current/runtime"}
    api.configmap("demo", "envoy-xds", {**named, "runtime": "1"})
    assert run_loader(*ONCE).returncode == 0
    api.configmap("demo", "envoy-xds", {**named, "k": "2"})
    api.configmap("demo", "more", {"a": "1"})
    done = run_loader(*ONCE, "--configmap", "more:runtime")
    assert done.returncode == 0, done.stderr
    assert texts(out) == {**named, "runtime": "1", "k": "2"}
    text = f"runtime/a of configmap demo/more left out: {out}/current/runtime is a file"
    assert text in done.stderr


@pytest.mark.parametrize("mode", ["--onetime", "--watch"])
def test_a_name_that_was_a_directory_costs_only_itself(
    run_loader: RunLoader, start_loader: StartLoader, api: ApiServer, out: Path, mode: str
) -> None:
    """The directory cannot go (Envoy watches it), so the file cannot come: the rest can."""
    api.configmap("demo", "envoy-xds", {"k": "1"})
    api.configmap("demo", "more", {"a": "1"})
    assert run_loader(*ONCE, "--configmap", "more:eds").returncode == 0
    api.configmap("demo", "envoy-xds", {"k": "2", "eds": "a file"})
    running = start_loader(mode, "--configmap", "envoy-xds")
    wait_files(out, {"k": "2"})
    running.wait_log(f"WARNING eds of {SOURCE} left out: {out}/current/eds is a directory")
    if mode == "--onetime":
        assert running.wait() == 0


# -- what was there before


def test_real_files_of_names_we_publish_are_taken_over(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    """The predecessor wrote new/x and renamed it to current/x. Foreign files are left and named,
    whatever they are."""
    contents = {"rds.yaml": "new", "cds.yaml": "same"}
    api.configmap("demo", "envoy-xds", contents)
    (out / "current/mine").mkdir(parents=True)
    (out / "current/rds.yaml").write_text("old")
    (out / "current/cds.yaml").write_text("same")
    (out / "current/notes.txt").write_text("n")
    (out / "current/mine/x").write_text("x")
    (out / "current/link").symlink_to("/etc/hostname")
    before = inodes(out, ".")
    with Inotify(out / "current") as seen:
        done = run_loader(*ONCE)
        assert done.returncode == 0, done.stderr
        assert sorted(seen.moved()) == ["cds.yaml", "rds.yaml"]
    assert inodes(out, ".") == before
    assert texts(out, foreign=["notes.txt", "mine/x", "link"]) == contents
    for name in ("notes.txt", "mine/x", "link"):
        assert f"{out}/current/{name} is a foreign file" in done.stderr
    assert (out / "current/mine/x").read_text() == "x"
    assert os.readlink(out / "current/link") == "/etc/hostname"


def test_a_foreign_file_where_a_directory_must_be_costs_only_what_goes_there(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"a": "1"})
    (out / "current").mkdir(parents=True)
    (out / "current/eds").write_text("mine")
    (out / "current/link").symlink_to("/nowhere")
    names = ("envoy-xds:eds/x", "envoy-xds:link", "envoy-xds")
    done = run_loader("--onetime", *(word for name in names for word in ("--configmap", name)))
    assert done.returncode == 0, done.stderr
    assert f"eds/x/a of {SOURCE} left out: {out}/current/eds is a file" in done.stderr
    assert f"link/a of {SOURCE} left out: {out}/current/link is a file" in done.stderr
    assert os.readlink(out / "current/link") == "/nowhere"
    assert texts(out, foreign=["eds", "link"]) == {"a": "1"}


# -- modes


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_modes_are_as_stated_whatever_the_umask(
    api: ApiServer, common: list[str], out: Path, umask: int
) -> None:
    """Directories 0755, files 0644; the parents of the directory too."""
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    root = out / "deep/er"
    done = subprocess.run(
        [*COMMAND, *common, "--output-dir", str(root), "--apiserver", api.url,
         *ONCE, "--configmap", "envoy-xds:eds"],
        env=environment(), umask=umask, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert disk.modes(root) == {
        ".": 0o755, "rds.yaml": 0o644, "eds": 0o755, "eds/rds.yaml": 0o644
    }  # fmt: skip
    for path in (out, out / "deep", root, root / "current", root / "current/eds", root / "..state"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755, path
    assert stat.S_IMODE((root / "..state/loader.json").stat().st_mode) == 0o644


# -- nothing changed, nothing touched


def directories(root: Path) -> list[Path]:
    """Everything that Envoy (or a test) could watch: the directory and all below it."""
    below = [Path(place, name) for place, names, _ in os.walk(root) for name in names]
    return [root, *(path for path in below if not path.is_symlink())]


def test_nothing_changed_means_nothing_touched(
    run_loader: RunLoader, start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    """By a second run, a sidecar after it, checks of the disk, events about nothing, a relist."""
    api.configmap("demo", "envoy-xds", {"rds.yaml": RDS, "cds.yaml": CDS})
    assert run_loader(*ONCE).returncode == 0
    before = disk.fingerprint(out)
    with Inotify(*directories(out), mask=EVERYTHING) as seen:
        done = run_loader(*ONCE)
        assert (done.returncode, done.stderr) == (0, "")
        running = start_loader(*WATCH, "--sync-interval", "50ms")
        api.wait_watches(1)
        for number in range(5):
            labels = {"n": str(number)}
            api.configmap("demo", "envoy-xds", {"rds.yaml": RDS, "cds.yaml": CDS}, labels=labels)
        api.compact()
        api.close_watches()
        api.requests.wait_for(lambda request: request.is_watch, 10, count=2)
        running.process.send_signal(1)
        running.wait_log("SIGHUP")
        assert seen.events(timeout=0.3) == []
        running.stop()
    assert disk.fingerprint(out) == before


# -- the marker


def test_a_start_that_finds_the_marker_notifies_what_differs(
    output: loader.Output, out: Path
) -> None:
    """Every path shows the new files, yet Envoy was not notified; of all, where nobody knows what
    it was notified of; of none, where the publication never switched."""
    first = publish(output, {"a": "1", "b": "1", "eds/c": "1"})
    second = publish(output, {"a": "2", "b": "1", "eds/c": "2"})
    unknown = ("none", "..0123456789abcdef", "/etc", "..data", "current", "..")
    wanted = {first: ["a", "c"], second: [], **{key: ["a", "b", "c"] for key in unknown}}
    for marker, notified in wanted.items():
        (out / "..notify").symlink_to(marker)
        with Inotify(out, out / "current", out / "current/eds") as seen:
            reopened(output)
            assert sorted(seen.moved()) == notified, marker
            reopened(output)
            assert seen.moved() == []
        assert texts(out) == {"a": "2", "b": "1", "eds/c": "2"}


def test_a_stranger_in_the_place_of_the_marker_is_removed_before_anything_moves(
    output: loader.Output, out: Path
) -> None:
    publish(output, {"a": "1"})
    for make in (Path.mkdir, Path.touch, lambda place: place.symlink_to("elsewhere")):
        make(out / "..notify")
        with pytest.raises(FileExistsError):
            publish(output, {"a": "2"})
        assert (out / "current/a").read_text() == "1"
        output.recover()
        assert not os.path.lexists(out / "..notify")
    publish(output, {"a": "2"})
    assert texts(out) == {"a": "2"}


# -- pruning


def test_the_last_snapshot_but_one_stays_until_the_next_publication(
    output: loader.Output, out: Path
) -> None:
    """Who has resolved `..data` reads on in its snapshot, also after the next switch."""
    versions = []
    for text in "12345":
        versions.append(publish(output, {"k": text}))
        assert snapshots(out) == set(versions[-2:])
    assert (out / versions[-2] / "k").read_text() == "4"


def test_pruning_that_fails_is_no_failure(
    output: loader.Output, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: str) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        for text in "1234":
            publish(output, {"k": text})
    publish(output, {"k": "5"})
    assert texts(out) == {"k": "5"}


# -- one loader a directory


def test_the_second_loader_says_so_once_and_waits(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    """A preview needs no lock; `--onetime` waits as long as --timeout says; a lock leaves no file,
    and a loader that was killed blocks nobody."""
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    first = start_loader(*WATCH)
    wait_until(lambda: state(out).get("nacked") == {})  # it is done with everything
    before = disk.fingerprint(out)
    assert run_loader("--dry-run", "--configmap", "envoy-xds").returncode == 0
    for timeout in ("0s", "300ms"):
        done = run_loader(*ONCE, "--timeout", timeout)
        assert done.returncode == 1
        assert f"another loader works in {out}: " in done.stderr
    second = start_loader(*WATCH)
    second.wait_log(f"another loader works in {out}: .*waiting")
    second.process.send_signal(signal.SIGHUP)
    second.wait_log("SIGHUP")
    assert disk.fingerprint(out) == before
    first.kill()
    second.wait_log("INFO warning over: another loader works in ")
    assert second.count_log("WARNING another loader works in ") == 1
    api.configmap("demo", "envoy-xds", {"rds.yaml": "2"})
    wait_files(out, {"rds.yaml": "2"})
    assert second.stop() < 1.0
    disk.wait_converged(out)


def test_sigterm_ends_a_loader_that_waits_for_another(
    start_loader: StartLoader, output: loader.Output, api: ApiServer
) -> None:
    second = start_loader(*WATCH)
    second.wait_log("another loader")
    assert second.stop() < 1.0


# -- a directory that is not ours


# Root without these is an ordinary user, whose interpreter and modules are still readable.
ORDINARY = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]


def is_ordinary_possible() -> bool:
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        return False
    return subprocess.run([*ORDINARY, "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not is_ordinary_possible(), reason="needs root and setpriv to be another user")
@pytest.mark.parametrize("mode", ["init container", "sidecar"])
def test_another_users_directory_is_said_with_what_to_do(
    api: ApiServer, run_loader: RunLoader, common: list[str], out: Path, mode: str
) -> None:
    """An init container of another user leaves no lock behind, but directories that are its own."""
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    assert run_loader(*ONCE).returncode == 0
    for path in out.rglob("*"):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    out.chmod(0o777)
    before = disk.fingerprint(out)
    args = [*common, "--apiserver", api.url, *(ONCE if mode == "init container" else WATCH)]
    api.configmap("demo", "envoy-xds", {"rds.yaml": "2"})
    with Loader(args, prefix=ORDINARY) as running:
        said = running.wait_log("cannot publish").string
        assert str(out) in said
        assert "as one user" in said
        assert snapshot(out) == {"rds.yaml": b"1"}, "the last snapshot goes on serving"
        if mode == "init container":
            assert running.wait() == 1
            after = disk.fingerprint(out)
            del before["."], after["."]
            assert after == before
        else:
            for path in [out, *out.rglob("*")]:
                os.chown(path, 0, 0, follow_symlinks=False)
            wait_files(out, {"rds.yaml": "2"})
            running.wait_log(f"INFO warning over: cannot publish to {out}")
        assert "Traceback" not in running.log


def test_an_output_directory_that_cannot_be_is_said(
    run_loader: RunLoader, api: ApiServer, tmp_path: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    file = tmp_path / "file"
    file.write_text("x")
    for place in (file, file / "below", Path("/proc/nope"), Path("/sys/nope")):
        done = run_loader(*ONCE, "--output-dir", str(place))
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert str(place) in done.stderr
        assert "Traceback" not in done.stderr


def test_an_output_directory_may_be_relative_and_a_link(
    run_loader: RunLoader, api: ApiServer, tmp_path: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    done = run_loader(*ONCE, "--output-dir", "link/below", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path / "real/below") == {"rds.yaml": "1"}


# -- a sidecar that lives


@pytest.mark.parametrize("how", ["interval", "SIGHUP", "start"])
def test_damage_is_repaired_at_the_next_check(
    start_loader: StartLoader, api: ApiServer, out: Path, how: str
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "good", "cds.yaml": CDS})
    args = (*WATCH, "--sync-interval", "100ms" if how == "interval" else "1h")
    running = start_loader(*args)
    wait_files(out, {"rds.yaml": "good", "cds.yaml": CDS})
    wait_until(lambda: api.watches)
    requests = len(api.requests)
    with Inotify(out / "current") as seen:
        (out / "current/rds.yaml").write_text("bad")
        if how == "SIGHUP":
            running.process.send_signal(1)
        elif how == "start":
            running.kill()
            running = start_loader(*args)
        wait_until(lambda: (out / "current/rds.yaml").read_text() == "good")
        if how != "start":
            running.wait_log("WARNING repaired on disk: rds.yaml")
        assert seen.moved(1.0) == ["rds.yaml"]
    cpu = running.cpu()
    time.sleep(0.5)
    assert running.cpu() - cpu < 0.1, "there is nothing left to do"
    assert texts(out) == {"rds.yaml": "good", "cds.yaml": CDS}
    if how == "interval":
        lists = [request for request in api.requests[requests:] if request.is_list]
        assert lists == [], "the API server is not asked again for that"

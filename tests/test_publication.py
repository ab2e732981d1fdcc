"""Publication: the layout, what Envoy's kind of watch sees of it, and what a disk may hold before.

Most tests drive `Output` itself; where a promise is about the whole program, a loader process.
Crashes and failing calls are in test_crash.py, concurrent readers in test_reader.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
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
CDS = '{"resources":[{"@type":"type.googleapis.com/envoy.config.cluster.v3.Cluster"}]}'
LDS = '{"resources":[{"@type":"type.googleapis.com/envoy.config.listener.v3.Listener"}]}'
RDS = '{"resources":[{"@type":"type.googleapis.com/envoy.config.route.v3.RouteConfiguration"}]}'
EDS = (
    '{"resources":[{"@type":"type.googleapis.com/'
    'envoy.config.endpoint.v3.ClusterLoadAssignment"}]}'
)
ONCE = ("--onetime", "--configmap", "envoy-xds")
WATCH = ("--watch", "--configmap", "envoy-xds")


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    """As `loader.run` sets it; what happens with others is asked of a process below."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def output(out: Path) -> Iterator[loader.Output]:
    found = opened(out)
    yield found
    found.unlock()


def opened(out: Path) -> loader.Output:
    """As a loader that starts: locked and recovered."""
    output = loader.Output(str(out))
    output.lock()
    output.recover()
    return output


def reopened(output: loader.Output) -> loader.Output:
    """The same after a restart. The lock stays with the object, as only a process can have two."""
    again = loader.Output(output.root)
    again.recover()
    return again


def files(contents: Mapping[str, str], mode: int = 0o644) -> dict[str, loader.File]:
    return {
        path: loader.file_of(text.encode(), SOURCE, mode) for path, text in contents.items()
    }


def publish(output: loader.Output, contents: Mapping[str, str], mode: int = 0o644) -> list[str]:
    changed = output.publish(files(contents, mode))
    output.prune()
    return changed


def texts(published: disk.Published) -> dict[str, str]:
    return {path: content.decode() for path, content in published.files.items()}


def directories(root: Path) -> list[Path]:
    """Everything that Envoy (or a test) could watch: the directory and all below it."""
    below = [Path(place, name) for place, names, _ in os.walk(root) for name in names]
    return [root, *(path for path in below if not path.is_symlink())]


def inode(path: Path) -> int:
    return path.stat().st_ino


# -- layout


def test_the_layout_is_the_one_that_the_manual_draws(output: loader.Output, out: Path) -> None:
    publish(output, {"rds.yaml": "routes", "eds/demo_web_http.yaml": "endpoints"})
    assert os.readlink(out / "current/rds.yaml") == "../..data/rds.yaml"
    eds = "eds/demo_web_http.yaml"
    assert os.readlink(out / "current" / eds) == f"../../..data/{eds}"
    version = os.readlink(out / "..data")
    assert re.fullmatch(r"\.\.[0-9a-f]{16}", version)
    assert sorted(os.listdir(out)) == sorted(["..data", "..state", "current", version])
    assert (out / version / "rds.yaml").read_text() == "routes"
    assert not (out / "current").is_symlink()
    disk.inspect(out)


def test_links_are_relative_so_the_directory_can_be_mounted_elsewhere(
    output: loader.Output, out: Path, tmp_path: Path
) -> None:
    publish(output, {"rds.yaml": "1", "a/b/c/deep.yaml": "2"})
    moved = tmp_path / "elsewhere"
    shutil.copytree(out, moved, symlinks=True)
    shutil.rmtree(out)
    assert snapshot(moved) == {"rds.yaml": b"1", "a/b/c/deep.yaml": b"2"}


def test_the_version_is_the_hash_of_the_content_alone(tmp_path: Path) -> None:
    """Not of the source, the order or the place, so two sidecars can be compared."""
    one, two = opened(tmp_path / "one"), opened(tmp_path / "two")
    publish(one, {"a": "1", "b": "2"})
    two.publish({path: loader.file_of(text, "secret x/y") for path, text in
                 (("b", b"2"), ("a", b"1"))})
    assert one.snapshot == two.snapshot
    for other in ({"a": "1"}, {"a": "1", "b": "3"}, {"a": "1", "c": "2"}, {"a": "2", "b": "1"}):
        assert loader.version_of(files(other)) != one.snapshot[2:]
    assert loader.version_of(files({"a": "1", "b": "2"}, 0o600)) != one.snapshot[2:]
    one.unlock()
    two.unlock()


@pytest.mark.parametrize(
    "contents",
    [
        {},
        {"empty.yaml": ""},
        {"no-newline": "x", "ümläut.yaml": "ä\n", "-dash": "-", "with space": " "},
        {"big.yaml": "x" * (1 << 20)},
        {".hidden": "1", "..two": "2", "...": "3"},
        {"a/b/c/d/e.yaml": "deep", "a/f.yaml": "shallow"},
    ],
    ids=["none", "empty", "names", "1 MiB", "dots", "deep"],
)
def test_what_is_published_is_read_byte_for_byte(
    output: loader.Output, out: Path, contents: dict[str, str]
) -> None:
    publish(output, contents)
    assert texts(disk.inspect(out)) == contents
    assert texts(disk.inspect(out)) == contents
    again = reopened(output)
    assert loader.same(again.published, files(contents))
    assert again.snapshot == output.snapshot


def test_binary_content_is_kept(output: loader.Output, out: Path) -> None:
    content = bytes(range(256)) * 9 + b"\r\n\0"
    output.publish({"blob.pb": loader.file_of(content, SOURCE)})
    assert (out / "current/blob.pb").read_bytes() == content


# -- what Envoy's watch sees


def test_each_changed_file_is_moved_exactly_once_and_no_other(
    output: loader.Output, out: Path
) -> None:
    publish(
        output, {"cds.yaml": CDS, "rds.yaml": RDS, "same.yaml": "s", "eds/a": "1", "eds/b": "1"}
    )
    with Inotify(out, out / "current", out / "current/eds") as seen:
        publish(output, {"cds.yaml": CDS, "rds.yaml": RDS + "\n", "same.yaml": "s", "eds/a": "2",
                         "eds/b": "1"})
        moved = [path for mask, path in seen.events() if mask & IN_MOVED_TO]
    assert moved == [out / "..data", out / "current/eds/a", out / "current/rds.yaml"]


def test_the_root_sees_one_move_at_the_switch_and_nothing_else(
    output: loader.Output, out: Path
) -> None:
    """A shared watched_directory fires every subscription on any rename into it."""
    publish(output, {"rds.yaml": "1"})
    for contents in ({"rds.yaml": "2"}, {"rds.yaml": "2", "new.yaml": "1"}, {"new.yaml": "1"}):
        with Inotify(out) as seen:
            publish(output, contents)
            assert seen.events() == [(IN_MOVED_TO, out / "..data")]


def test_nothing_is_written_where_envoy_watches(output: loader.Output, out: Path) -> None:
    """IN_MODIFY wakes Envoy's main thread: files are written in the snapshot, never in current/."""
    publish(output, {"rds.yaml": "1", "eds/a": "1"})
    written = IN_MODIFY | IN_CLOSE_WRITE
    with Inotify(out, out / "current", out / "current/eds", mask=written) as seen:
        publish(output, {"rds.yaml": "2", "eds/a": "2", "lds.yaml": "1"})
        publish(output, {"rds.yaml": "3"})
        assert seen.events() == []


def test_a_removed_file_moves_nothing(output: loader.Output, out: Path) -> None:
    publish(output, {"rds.yaml": "1", "old.yaml": "1"})
    with Inotify(out / "current") as seen:
        publish(output, {"rds.yaml": "1"})
        assert seen.events() == []
    assert not (out / "current/old.yaml").is_symlink()


def test_new_files_are_moved_in_too(output: loader.Output, out: Path) -> None:
    """A subscription whose file was not there at its start waits for just this."""
    publish(output, {"rds.yaml": "1"})
    with Inotify(out / "current") as seen:
        publish(output, {"rds.yaml": "1", "new.yaml": "1"})
        assert seen.moved() == ["new.yaml"]


def test_children_are_notified_before_parents(output: loader.Output, out: Path) -> None:
    """By content, not by name: EDS, CDS, RDS, LDS."""
    kinds = {"a.yaml": LDS, "b.yaml": RDS, "c.yaml": CDS, "d.yaml": EDS}
    publish(output, kinds)
    with Inotify(out / "current") as seen:
        publish(output, {path: text + "\n" for path, text in kinds.items()})
        assert seen.moved() == ["d.yaml", "c.yaml", "b.yaml", "a.yaml"]


def test_every_path_shows_the_new_snapshot_before_the_first_move(
    output: loader.Output, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(output, {"a": "1", "b": "1", "gone": "1"})
    shown: list[dict[str, bytes]] = []
    rename = os.rename

    def spy(source: str, target: str) -> None:
        if "/current/" in target:
            shown.append(snapshot(out))
        rename(source, target)

    monkeypatch.setattr(os, "rename", spy)
    publish(output, {"a": "2", "b": "2"})
    assert shown == [{"a": b"2", "b": b"2"}] * 2


def test_a_changed_mode_is_a_change(output: loader.Output, out: Path) -> None:
    publish(output, {"key": "x"}, 0o644)
    with Inotify(out / "current") as seen:
        publish(output, {"key": "x"}, 0o600)
        assert seen.moved() == ["key"]
    assert disk.modes(out) == {".": 0o755, "key": 0o600}


# -- hard links


def test_an_unchanged_file_is_the_same_inode(output: loader.Output, out: Path) -> None:
    publish(output, {"same": "s", "eds/same": "t", "new": "1"})
    before = {path: inode(out / "current" / path) for path in ("same", "eds/same", "new")}
    publish(output, {"same": "s", "eds/same": "t", "new": "2"})
    after = {path: inode(out / "current" / path) for path in ("same", "eds/same", "new")}
    assert after["same"] == before["same"]
    assert after["eds/same"] == before["eds/same"]
    assert after["new"] != before["new"]


def test_only_what_changed_is_written(
    output: loader.Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(output, {f"file{number}": "x" * 1000 for number in range(20)})
    written: list[int] = []
    write = os.write

    def spy(number: int, content: Any) -> int:
        if b'"file' not in bytes(content)[:10]:
            written.append(len(content))
        return write(number, content)

    monkeypatch.setattr(os, "write", spy)
    publish(output, {**{f"file{number}": "x" * 1000 for number in range(19)}, "file19": "new"})
    assert written == [3]


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP])
def test_where_the_kernel_refuses_links_files_are_copied(
    output: loader.Output, out: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    publish(output, {"same": "s", "key": "1"})
    before = inode(out / "current/same")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "link", refuse)
    with Inotify(out / "current") as seen:
        publish(output, {"same": "s", "key": "2"})
        assert inode(out / "current/same") != before
        assert seen.moved() == ["key"], "a copy of an unchanged file is no change"
    assert texts(disk.inspect(out)) == {"same": "s", "key": "2"}
    monkeypatch.undo()
    publish(output, {"same": "s", "key": "3"})
    assert texts(disk.inspect(out)) == {"same": "s", "key": "3"}


# -- versions that are already there


def test_a_b_a_publishes_the_verified_directory_again(output: loader.Output, out: Path) -> None:
    publish(output, {"k": "a", "same": "s"})
    first = output.snapshot
    publish(output, {"k": "b", "same": "s"})
    with Inotify(out, out / "current") as seen:
        publish(output, {"k": "a", "same": "s"})
        assert seen.moved() == ["..data", "k"]
    assert output.snapshot == first
    assert texts(disk.inspect(out)) == {"k": "a", "same": "s"}


@pytest.mark.parametrize("what", ["edited", "truncated", "chmod", "removed", "extra", "a link"])
def test_a_b_a_never_trusts_a_damaged_directory(
    output: loader.Output, out: Path, what: str
) -> None:
    publish(output, {"k": "aaa", "same": "s"})
    first = output.snapshot
    publish(output, {"k": "bbb", "same": "s"})
    spoil(out / first / "k", what)
    publish(output, {"k": "aaa", "same": "s"})
    assert output.snapshot == f"{first}.1"
    assert texts(disk.inspect(out)) == {"k": "aaa", "same": "s"}
    assert disk.modes(out)["k"] == 0o644


def spoil(path: Path, what: str) -> None:
    """Damage one file of a snapshot, as people and disks do."""
    if what == "edited":
        with path.open("r+") as stream:
            stream.write("X")
    elif what == "truncated":
        os.truncate(path, 1)
    elif what == "chmod":
        path.chmod(0o600)
    elif what == "removed":
        path.unlink()
    elif what == "extra":
        path.with_name("extra").write_text("x")
    elif what == "a link":
        path.unlink()
        path.symlink_to("same")
    elif what == "replaced":
        path.unlink()
        path.write_text("other")
    elif what == "a directory":
        path.unlink()
        path.mkdir()
    else:
        raise AssertionError(what)


@pytest.mark.parametrize(
    "held",
    [{}, {"k": ""}, {"k": "aa"}, {"k": "aaa"}, {"same": "s"}, {"k": "aaa", "same": "s", "x": "1"}],
    ids=["nothing", "empty", "part", "one of two", "the other", "more"],
)
def test_a_half_written_left_over_is_rebuilt_under_another_name(
    output: loader.Output, out: Path, held: dict[str, str]
) -> None:
    """One that a publication of this very process left, as when the disk was full."""
    wanted = {"k": "aaa", "same": "s"}
    version = f"..{loader.version_of(files(wanted))}"
    (out / version).mkdir()
    for name, text in held.items():
        (out / version / name).write_text(text)
    publish(output, wanted)
    assert output.snapshot == f"{version}.1"
    assert texts(disk.inspect(out)) == wanted
    assert not (out / version).exists()


def test_a_start_removes_half_written_left_overs(out: Path) -> None:
    output = opened(out)
    publish(output, {"k": "1"})
    for name in ("..0123456789abcdef", "..0123456789abcdef.7"):
        (out / name / "eds").mkdir(parents=True)
        (out / name / "eds/x").write_text("half")
    (out / "..link").symlink_to("nowhere")
    again = reopened(output)
    assert again.snapshot == output.snapshot
    assert sorted(os.listdir(out)) == sorted(["..data", "..state", "current", output.snapshot])
    output.unlock()


def test_other_peoples_directories_stay(output: loader.Output, out: Path) -> None:
    """Only what has the form of a snapshot's name is ever removed."""
    publish(output, {"k": "1"})
    for name in ("..backup", "..2024_01_01", "lost+found", "..0123456789ABCDEF", "..0123.1.2"):
        (out / name).mkdir()
        (out / name / "precious").write_text("x")
    for text in ("2", "3", "4"):
        publish(output, {"k": text})
    reopened(output)
    kept = {path.parent.name for path in out.glob("*/precious")}
    assert kept == {"..backup", "..2024_01_01", "lost+found", "..0123456789ABCDEF", "..0123.1.2"}


# -- damage to what is served


DAMAGE = ["edited", "truncated", "chmod", "removed", "a link", "replaced", "a directory"]


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_written_anew_not_linked_on(
    output: loader.Output, out: Path, what: str
) -> None:
    publish(output, {"damaged": "good", "k": "1"})
    spoil(out / "current/damaged" if what == "extra" else out / output.snapshot / "damaged", what)
    with Inotify(out / "current") as seen:
        publish(output, {"damaged": "good", "k": "2"})
        assert set(seen.moved()) == {"damaged", "k"}, "Envoy may have read the damaged bytes"
    assert texts(disk.inspect(out)) == {"damaged": "good", "k": "2"}
    assert disk.modes(out)["damaged"] == 0o644


@pytest.mark.parametrize("what", [*DAMAGE, "extra"])
def test_the_periodic_check_repairs_what_was_damaged(
    output: loader.Output, out: Path, what: str
) -> None:
    publish(output, {"damaged": "good", "k": "1"})
    spoil(out / output.snapshot / "damaged", what)
    with Inotify(out / "current") as seen:
        assert output.repair() != []
        assert seen.moved() == ([] if what == "extra" else ["damaged"])
    assert texts(disk.inspect(out)) == {"damaged": "good", "k": "1"}
    assert disk.modes(out)["damaged"] == 0o644
    assert output.repair() == []


def test_a_damaged_file_is_found_by_its_bytes_though_size_and_time_are_the_same(
    output: loader.Output, out: Path
) -> None:
    publish(output, {"damaged": "good"})
    path = out / output.snapshot / "damaged"
    before = path.stat()
    path.write_text("evil")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert output.repair() == ["damaged"]
    assert texts(disk.inspect(out)) == {"damaged": "good"}


def test_damage_is_repaired_at_both_names_of_a_shared_inode(
    output: loader.Output, out: Path
) -> None:
    """The last snapshot but one links to the damaged inode: it must not be trusted either."""
    publish(output, {"same": "good", "k": "1"})
    first = output.snapshot
    publish(output, {"same": "good", "k": "2"})
    with (out / "current/same").open("r+") as stream:
        stream.write("EVIL")
    publish(output, {"same": "good", "k": "1"})
    assert output.snapshot == f"{first}.1"
    assert texts(disk.inspect(out)) == {"same": "good", "k": "1"}


def unlink_link(out: Path) -> None:
    (out / "current/k").unlink()


def wrong_link(out: Path) -> None:
    (out / "current/k").unlink()
    (out / "current/k").symlink_to("/etc/hostname")


def real_file(out: Path) -> None:
    (out / "current/k").unlink()
    (out / "current/k").write_text("1")


def no_switch(out: Path) -> None:
    (out / "..data").unlink()


def wrong_switch(out: Path) -> None:
    (out / "..data").unlink()
    (out / "..data").symlink_to("..0000000000000000")


def file_for_switch(out: Path) -> None:
    (out / "..data").unlink()
    (out / "..data").write_text("x")


def no_snapshot(out: Path) -> None:
    shutil.rmtree(out / os.readlink(out / "..data"))


def no_subdirectory(out: Path) -> None:
    shutil.rmtree(out / "current/eds")


def linked_subdirectory(out: Path) -> None:
    shutil.rmtree(out / "current/eds")
    (out / "elsewhere").mkdir()
    (out / "current/eds").symlink_to("../elsewhere")


def no_current(out: Path) -> None:
    shutil.rmtree(out / "current")


def linked_current(out: Path) -> None:
    """As ConfigMap volumes have it: such a directory cannot hold Envoy's watch."""
    shutil.rmtree(out / "current")
    (out / "current").symlink_to("..data")


def nothing_left(out: Path) -> None:
    for path in out.iterdir():
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


ACCIDENTS = [
    unlink_link, wrong_link, real_file, no_switch, wrong_switch, file_for_switch, no_snapshot,
    no_subdirectory, linked_subdirectory, no_current, linked_current, nothing_left,
]  # fmt: skip


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_the_periodic_check_puts_the_layout_right(
    output: loader.Output, out: Path, accident: Any
) -> None:
    publish(output, {"k": "1", "eds/a": "1"})
    accident(out)
    assert output.repair() != []
    shutil.rmtree(out / "elsewhere", ignore_errors=True)
    assert texts(disk.inspect(out)) == {"k": "1", "eds/a": "1"}
    assert output.repair() == []


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_restart_converges_whatever_it_finds(
    output: loader.Output, out: Path, accident: Any
) -> None:
    publish(output, {"k": "1", "eds/a": "1"})
    accident(out)
    again = reopened(output)
    if not loader.same(again.published, files({"k": "1", "eds/a": "1"})):
        publish(again, {"k": "1", "eds/a": "1"})
    shutil.rmtree(out / "elsewhere", ignore_errors=True)
    assert texts(disk.inspect(out)) == {"k": "1", "eds/a": "1"}
    publish(again, {"k": "2"})
    assert texts(disk.inspect(out)) == {"k": "2"}


def test_a_restart_does_not_follow_a_link_in_a_snapshots_place(
    output: loader.Output, out: Path, tmp_path: Path
) -> None:
    """Nothing outside the directory is touched, whoever put a link there."""
    precious = tmp_path / "precious"
    (precious / "below").mkdir(parents=True)
    (precious / "file").write_text("x")
    (precious / "below/file").write_text("x")
    publish(output, {"k": "1"})
    (out / "..0123456789abcdef").symlink_to(precious)
    (out / "..0123456789abcdef.1").mkdir()
    (out / "..0123456789abcdef.1/link").symlink_to(precious)
    again = reopened(output)
    publish(again, {"k": "2"})
    publish(again, {"k": "3"})
    assert (precious / "file").read_text() == "x"
    assert (precious / "below/file").read_text() == "x"
    assert not os.path.lexists(out / "..0123456789abcdef.1")


def test_a_file_in_a_snapshots_place_blocks_nothing(output: loader.Output, out: Path) -> None:
    publish(output, {"k": "1"})
    (out / "..0123456789abcdef").write_text("x")
    (out / f"..{loader.version_of(files({'k': '2'}))}").write_text("x")
    again = reopened(output)
    publish(again, {"k": "2"})
    assert texts(disk.inspect(out, converged=False)) == {"k": "2"}


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ENOMEM])
def test_a_file_that_cannot_be_read_at_a_start_keeps_its_link(
    output: loader.Output, out: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """"Cannot be read now" is not "is not there": Envoy may start at this moment."""
    publish(output, {"k": "1", "z": "1"})
    real = open

    def refuse(place: Any, *args: Any, **more: Any) -> Any:
        if str(place).endswith("/k"):
            raise OSError(number, os.strerror(number), place)
        return real(place, *args, **more)

    monkeypatch.setattr("builtins.open", refuse)
    with Inotify(out / "current", mask=EVERYTHING) as seen:
        again = loader.Output(output.root)
        with contextlib.suppress(OSError):
            again.recover()
        monkeypatch.undo()
        assert seen.events() == []
    assert snapshot(out) == {"k": b"1", "z": b"1"}


# -- directories


def test_directories_in_current_are_never_removed_even_when_empty(
    output: loader.Output, out: Path
) -> None:
    """Envoy's watch is bound to the directory, not to its name."""
    publish(output, {"eds/a": "1", "x/y/z": "1"})
    places = ["current", "current/eds", "current/x", "current/x/y"]
    before = {place: inode(out / place) for place in places}
    publish(output, {"rds.yaml": "1"})
    assert {place: inode(out / place) for place in places} == before
    assert os.listdir(out / "current/eds") == []
    again = reopened(output)
    again.repair()
    assert {place: inode(out / place) for place in places} == before
    with Inotify(out / "current/eds") as seen:
        publish(again, {"eds/a": "2"})
        assert seen.moved() == ["a"]
    assert {place: inode(out / place) for place in places} == before


def test_a_file_becomes_a_directory(output: loader.Output, out: Path) -> None:
    """`--configmap flags` with a key `runtime` becomes `--configmap flags:runtime`."""
    publish(output, {"runtime": "1", "k": "1"})
    publish(output, {"runtime/a": "1", "k": "1"})
    assert texts(disk.inspect(out)) == {"runtime/a": "1", "k": "1"}


def test_a_name_that_is_a_directory_of_the_past_costs_only_itself(
    output: loader.Output, out: Path
) -> None:
    """The directory cannot go (Envoy watches it), so the file cannot come: the rest can."""
    publish(output, {"eds/a": "1", "k": "1", "z": "1"})
    before = inode(out / "current/eds")
    with Inotify(out / "current") as seen:
        try:
            publish(output, {"eds": "file", "k": "2", "z": "2"})
        except (OSError, loader.LoaderError):
            reopened(output)
        assert inode(out / "current/eds") == before
        assert {path: text for path, text in snapshot(out).items() if path in "kz"} == {
            "k": b"2", "z": b"2"
        }
        assert {"k", "z"} <= set(seen.moved()), "and Envoy is told of the rest"


# -- what was there before


def test_real_files_of_names_we_publish_are_taken_over(out: Path) -> None:
    """The predecessor wrote new/x and renamed it to current/x."""
    for directory in ("current", "new"):
        (out / directory).mkdir(parents=True)
    (out / "current/rds.yaml").write_text("old")
    (out / "current/cds.yaml").write_text("same")
    (out / "current/lds.yaml").write_text("stranger")
    (out / "new/rds.yaml").write_text("half")
    before = inode(out / "current")
    output = opened(out)
    with Inotify(out / "current") as seen:
        publish(output, {"rds.yaml": "new", "cds.yaml": "same"})
        assert sorted(seen.moved()) == ["cds.yaml", "rds.yaml"]
    assert inode(out / "current") == before
    published = disk.inspect(out, strangers=["lds.yaml"], converged=False)
    assert texts(published) == {"rds.yaml": "new", "cds.yaml": "same"}
    assert (out / "current/lds.yaml").read_text() == "stranger"
    assert (out / "new/rds.yaml").read_text() == "half"
    output.repair()
    assert output.strangers == ("lds.yaml",)
    output.unlock()


def test_a_predecessors_directory_is_never_without_a_complete_file(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the real files are taken over, each path shows the old or the new bytes."""
    (out / "current").mkdir(parents=True)
    (out / "current/rds.yaml").write_text("old")
    output = opened(out)
    shown = set()
    for name in ("rename", "symlink", "unlink", "mkdir", "link"):
        real = getattr(os, name)

        def spy(*args: Any, real: Any = real, **more: Any) -> Any:
            shown.add((out / "current/rds.yaml").read_text())
            result = real(*args, **more)
            shown.add((out / "current/rds.yaml").read_text())
            return result

        monkeypatch.setattr(os, name, spy)
    publish(output, {"rds.yaml": "new"})
    assert shown == {"old", "new"}
    output.unlock()


def test_strangers_are_left_and_named(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    """Whatever they are, below `current/` and in its directories."""
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    (out / "current/mine").mkdir(parents=True)
    (out / "current/notes.txt").write_text("n")
    (out / "current/mine/x").write_text("x")
    (out / "current/link").symlink_to("/etc/hostname")
    running = start_loader(*WATCH)
    wait_until(lambda: (out / "current/rds.yaml").exists())
    for name in ("notes.txt", "mine/x", "link"):
        running.wait_log(re.escape(f"{out}/current/{name}") + ".*left alone")
    assert (out / "current/notes.txt").read_text() == "n"
    assert (out / "current/mine/x").read_text() == "x"
    assert os.readlink(out / "current/link") == "/etc/hostname"


def test_a_stranger_where_a_directory_must_be_costs_only_what_goes_there(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"a": "1"})
    (out / "current").mkdir(parents=True)
    (out / "current/eds").write_text("mine")
    done = run_loader("--onetime", "--configmap", "envoy-xds:eds", "--configmap", "envoy-xds")
    assert done.returncode == 0, done.stderr
    assert f"{out}/current/eds" in done.stderr
    assert "left out" in done.stderr
    assert "Traceback" not in done.stderr
    assert (out / "current/eds").read_text() == "mine"
    assert (out / "current/a").read_text() == "1"


# -- modes


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_modes_are_as_stated_whatever_the_umask(
    api: ApiServer, common: list[str], out: Path, umask: int
) -> None:
    """Directories 0755, files 0644, key material 0600; the parents of the directory too."""
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    api.configmap("demo", "more", {"a": "1"})
    done = subprocess.run(
        [*COMMAND, *common, "--output-dir", str(out / "deep/er"), "--apiserver", api.url,
         "--onetime", "--configmap", "envoy-xds", "--configmap", "more:eds"],
        env=environment(), umask=umask, timeout=20, check=False,
    )
    assert done.returncode == 0
    root = out / "deep/er"
    assert disk.modes(root) == {".": 0o755, "rds.yaml": 0o644, "eds": 0o755, "eds/a": 0o644}
    for path in (out, out / "deep", root, root / "current", root / "current/eds", root / "..state"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755, path
    assert stat.S_IMODE((root / "..state/sources.json").stat().st_mode) == 0o644


# -- nothing changed, nothing touched


def test_a_second_run_on_the_same_objects_touches_nothing(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1", "cds.yaml": CDS})
    assert run_loader(*ONCE).returncode == 0
    before = disk.fingerprint(out)
    with Inotify(*directories(out), mask=EVERYTHING) as seen:
        done = run_loader(*ONCE)
        assert done.returncode == 0, done.stderr
        assert seen.events() == []
    assert disk.fingerprint(out) == before


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_a_second_run_makes_no_call_that_writes(
    run_loader: RunLoader, api: ApiServer, common: list[str], out: Path, tmp_path: Path
) -> None:
    """What inotify could miss, strace shows: no call that changes a directory or a file of it."""
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1", "cds.yaml": CDS})
    assert run_loader(*ONCE).returncode == 0
    calls = (
        "mkdir,mkdirat,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,"
        "rmdir,chmod,fchmod,fchmodat,truncate,ftruncate,utimensat,open,openat,creat"
    )
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "-o", str(trace), "-e", f"trace={calls}"]
    done = subprocess.run(
        [*strace, *COMMAND, *common, "--apiserver", api.url, *ONCE],
        env=environment(), timeout=60, check=False, capture_output=True, text=True,
    )
    if "ptrace" in done.stderr or not trace.exists():
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    lines = [line for line in trace.read_text().splitlines() if str(out) in line]
    assert lines, "the trace shows how the directory is read"
    writing = [line for line in lines if not re.search(r"= -1 E(NOENT|EXIST)", line)
               and not re.search(r"open(at)?\(.*O_RDONLY", line)]
    assert writing == []


def test_an_event_that_changes_no_content_touches_nothing(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    running = start_loader(*WATCH, "--sync-interval", "100ms")
    wait_files(out, {"rds.yaml": "1"})
    api.wait_watches(1)
    before = disk.fingerprint(out)
    with Inotify(*directories(out), mask=EVERYTHING) as seen:
        for number in range(5):
            api.configmap("demo", "envoy-xds", {"rds.yaml": "1"}, labels={"n": str(number)})
        api.configmap("demo", "other", {"rds.yaml": "x"})
        # Several periodic checks pass, too.
        assert seen.events(timeout=0.5) == []
    assert disk.fingerprint(out) == before
    assert running.process.poll() is None


def test_a_reconnect_and_a_relist_touch_nothing(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    start_loader(*WATCH)
    wait_files(out, {"rds.yaml": "1"})
    api.wait_watches(1)
    before = disk.fingerprint(out)
    with Inotify(*directories(out), mask=EVERYTHING) as seen:
        api.compact()
        api.close_watches()
        api.requests.wait_for(lambda request: request.is_watch, 10, count=2)
        assert seen.events(timeout=0.2) == []
    assert disk.fingerprint(out) == before


# -- the marker


def test_the_marker_stands_from_before_the_switch_until_all_are_told(
    output: loader.Output, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(output, {"a": "1", "b": "1"})
    first = output.snapshot
    seen: list[tuple[str, str | None]] = []
    rename = os.rename

    def spy(source: str, target: str) -> None:
        marker = out / "..notify"
        seen.append((Path(target).name, os.readlink(marker) if marker.is_symlink() else None))
        rename(source, target)

    monkeypatch.setattr(os, "rename", spy)
    publish(output, {"a": "2", "b": "2"})
    moves = [row for row in seen if not row[0].endswith(".json")]
    assert moves == [("..data", first), ("a", first), ("b", first)]
    assert not (out / "..notify").is_symlink()


def test_a_start_that_finds_the_marker_notifies_what_differs(
    output: loader.Output, out: Path
) -> None:
    """Every path shows the new files, yet Envoy was not told."""
    publish(output, {"a": "1", "b": "1", "c": "1"})
    first = output.snapshot
    publish(output, {"a": "2", "b": "1", "c": "2"})
    (out / "..notify").symlink_to(first)
    with Inotify(out, out / "current") as seen:
        reopened(output)
        assert sorted(seen.moved()) == ["a", "c"]
        reopened(output)
        assert seen.moved() == []
    assert not (out / "..notify").is_symlink()


@pytest.mark.parametrize("names", ["none", "..0123456789abcdef", "/etc", "..data", "current", ".."])
def test_a_marker_that_names_no_snapshot_notifies_everything(
    output: loader.Output, out: Path, names: str
) -> None:
    publish(output, {"a": "1", "eds/b": "1"})
    (out / "..notify").symlink_to(names)
    with Inotify(out / "current", out / "current/eds") as seen:
        reopened(output)
        assert sorted(seen.moved()) == ["a", "b"]
    assert not os.path.lexists(out / "..notify")


def test_the_marker_of_a_publication_that_never_switched_notifies_nothing(
    output: loader.Output, out: Path
) -> None:
    publish(output, {"a": "1"})
    (out / "..notify").symlink_to(output.snapshot)
    with Inotify(out, out / "current") as seen:
        reopened(output)
        assert seen.events() == []
    assert not os.path.lexists(out / "..notify")


def test_a_notification_that_failed_is_made_good_by_the_next_publication(
    output: loader.Output, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if nothing could be repaired in between: what nobody was told of is not forgotten."""
    publish(output, {"a": "1", "b": "1", "c": "1"})
    rename = os.rename

    def broken(source: str, target: str) -> None:
        if target.endswith("/current/b"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), target)
        rename(source, target)

    with Inotify(out / "current") as seen:
        monkeypatch.setattr(os, "rename", broken)
        with pytest.raises(OSError):
            publish(output, {"a": "2", "b": "2", "c": "2"})
        monkeypatch.undo()
        publish(output, {"a": "3", "b": "2", "c": "2"})
        assert {"a", "b", "c"} <= set(seen.moved())
    assert texts(disk.inspect(out)) == {"a": "3", "b": "2", "c": "2"}


# -- pruning


def test_the_last_snapshot_but_one_stays_until_the_next_publication(
    output: loader.Output, out: Path
) -> None:
    versions = []
    for text in "12345":
        publish(output, {"k": text})
        versions.append(output.snapshot)
        kept = {name for name in os.listdir(out) if disk.VERSION.match(name)}
        assert kept == set(versions[-2:])


def test_a_reader_of_the_last_snapshot_but_one_is_not_disturbed(
    output: loader.Output, out: Path
) -> None:
    """Who has resolved `..data` reads on in its snapshot, also after the next switch."""
    publish(output, {"a": "1", "b": "1"})
    home = out / os.readlink(out / "..data")
    publish(output, {"a": "2", "b": "2"})
    assert {path.name: path.read_text() for path in home.iterdir()} == {"a": "1", "b": "1"}


def test_a_restart_keeps_the_last_snapshot_but_one(output: loader.Output, out: Path) -> None:
    publish(output, {"k": "1"})
    first = output.snapshot
    publish(output, {"k": "2"})
    reopened(output)
    assert (out / first / "k").read_text() == "1"


def test_a_snapshot_that_is_needed_stays_as_long_as_it_is(
    output: loader.Output, out: Path
) -> None:
    """It holds the last bytes that Envoy confirmed."""
    publish(output, {"k": "1"})
    first = output.snapshot
    for text in "234":
        output.publish(files({"k": text}), keep=[first])
        output.prune()
        assert (out / first / "k").read_text() == "1"
    output.write_state("envoy", {"confirmed": {"k": first}})
    again = reopened(output)
    assert (out / first / "k").read_text() == "1"
    publish(again, {"k": "5"})
    assert not (out / first).exists()


def test_pruning_that_fails_is_no_failure(
    output: loader.Output, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: str) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), place)

    monkeypatch.setattr(os, "rmdir", refuse)
    for text in "1234":
        publish(output, {"k": text})
    monkeypatch.undo()
    publish(output, {"k": "5"})
    assert texts(disk.inspect(out)) == {"k": "5"}


# -- what a restart could not see


def test_the_source_of_each_file_is_remembered(output: loader.Output, out: Path) -> None:
    output.publish(
        {
            "rds.yaml": loader.file_of(b"1", "configmap demo/a"),
            "eds/x": loader.file_of(b"2", "services"),
        }
    )
    found = reopened(output).published
    assert {path: file.source for path, file in found.items()} == {
        "rds.yaml": "configmap demo/a",
        "eds/x": "services",
    }
    assert json.loads((out / "..state/sources.json").read_text())["eds/x"] == "services"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"confirmed": [1], "refused": 2}', '{"confirmed": {"a": 3}}',
     '{"refused": {"rds.yaml": ["1", "2", "3", "4", "5"]}}', '{"refused": {"rds.yaml": "x"}}',
     '{"rds.yaml": {"x": []}}', "\udcff"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["sources", "envoy"])
def test_a_state_that_cannot_be_read_is_no_obstacle(
    run_loader: RunLoader, api: ApiServer, out: Path, name: str, text: str
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    assert run_loader(*ONCE).returncode == 0
    place = out / f"..state/{name}.json"
    place.write_bytes(text.encode("utf-8", "surrogateescape"))
    api.configmap("demo", "envoy-xds", {"rds.yaml": "2"})
    done = run_loader(*ONCE, "--envoy-admin", "http://127.0.0.1:1")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert texts(disk.inspect(out)) == {"rds.yaml": "2"}


# -- one loader a directory


def test_the_second_loader_on_a_directory_says_so_and_exits_1(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    first = start_loader(*WATCH)
    wait_files(out, {"rds.yaml": "1"})
    before = disk.fingerprint(out)
    done = run_loader(*ONCE)
    assert done.returncode == 1
    assert str(out) in done.stderr
    assert "another loader" in done.stderr
    assert "Traceback" not in done.stderr
    assert disk.fingerprint(out) == before
    first.stop()
    assert run_loader(*ONCE).returncode == 0


def test_a_loader_that_was_killed_blocks_nobody(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    first = start_loader(*WATCH)
    wait_files(out, {"rds.yaml": "1"})
    first.kill()
    assert run_loader(*ONCE).returncode == 0


def test_a_preview_takes_no_lock_and_creates_nothing(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    assert run_loader("--dry-run", "--configmap", "envoy-xds").returncode == 0
    assert not out.exists()
    start_loader(*WATCH)
    wait_files(out, {"rds.yaml": "1"})
    assert run_loader("--dry-run", "--configmap", "envoy-xds").returncode == 0


def test_the_lock_leaves_no_file(output: loader.Output, out: Path) -> None:
    publish(output, {"k": "1"})
    assert not [name for name in os.listdir(out) if "lock" in name]


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
    if mode == "init container":
        same = subprocess.run(
            [*ORDINARY, *COMMAND, *args], env=environment(), timeout=20, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
        assert (same.returncode, same.stderr) == (0, ""), "nothing to write, nothing to say"
    api.configmap("demo", "envoy-xds", {"rds.yaml": "2"})
    with Loader(args, prefix=ORDINARY) as running:
        said = running.wait_log("cannot publish").string
        assert str(out) in said
        assert "as one user" in said
        assert snapshot(out) == {"rds.yaml": b"1"}, "the last snapshot goes on serving"
        assert {name: row for name, row in disk.fingerprint(out).items() if name != "."} == {
            name: row for name, row in before.items() if name != "."
        }
        if mode == "init container":
            assert running.wait() == 1
        else:
            for path in [out, *out.rglob("*")]:
                os.chown(path, 0, 0, follow_symlinks=False)
            wait_files(out, {"rds.yaml": "2"})
            running.wait_log("can be written again")
        assert "Traceback" not in running.log


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_an_output_directory_that_cannot_be_is_said(
    run_loader: RunLoader, api: ApiServer, tmp_path: Path, place: str
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    (tmp_path / "file").write_text("x")
    root = tmp_path / ("file" if place == "file" else "file/below")
    done = run_loader(*ONCE, "--output-dir", str(root))
    assert done.returncode == 1
    assert str(tmp_path / "file") in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_relative_output_directory_works(
    run_loader: RunLoader, api: ApiServer, tmp_path: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    done = run_loader(*ONCE, "--output-dir", "here/there", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert texts(disk.inspect(tmp_path / "here/there")) == {"rds.yaml": "1"}


def test_an_output_directory_may_be_a_link(
    run_loader: RunLoader, api: ApiServer, tmp_path: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert run_loader(*ONCE, "--output-dir", str(tmp_path / "link")).returncode == 0
    assert texts(disk.inspect(tmp_path / "real")) == {"rds.yaml": "1"}


# -- a sidecar that lives


def test_a_sidecar_repairs_what_somebody_damaged(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "good", "cds.yaml": CDS})
    running = start_loader(*WATCH, "--sync-interval", "100ms")
    wait_files(out, {"rds.yaml": "good", "cds.yaml": CDS})
    requests = len(api.requests)
    with Inotify(out / "current") as seen:
        spoil(out / os.readlink(out / "..data") / "rds.yaml", "edited")
        wait_until(lambda: (out / "current/rds.yaml").read_text() == "good")
        running.wait_log("repaired on disk.*rds.yaml")
        assert seen.moved() == ["rds.yaml"]
    assert texts(disk.inspect(out)) == {"rds.yaml": "good", "cds.yaml": CDS}
    lists = [request for request in api.requests[requests:] if request.is_list]
    assert lists == [], "the API server is not asked again for that"


def test_sighup_checks_and_repairs_now(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "good"})
    running = start_loader(*WATCH, "--sync-interval", "1h")
    wait_files(out, {"rds.yaml": "good"})
    (out / "current/rds.yaml").unlink()
    running.process.send_signal(1)
    wait_files(out, {"rds.yaml": "good"})
    running.stop()

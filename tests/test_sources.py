"""What ConfigMaps and files of objects become on disk: precedence, bad input, gaps, repair."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.conftest import RunLoader, StartLoader
from tests.support import apiserver as k8s
from tests.support.apiserver import ApiServer, Object
from tests.support.disk import IN_MOVED_TO, Inotify, fingerprint, inspect, modes, wait_converged
from tests.support.loader import run, snapshot, wait_files

INTERVAL = ("--sync-interval", "100ms")


def configmap(name: str, data: Object | None, namespace: str = "demo", **more: object) -> Object:
    """An object as `kubectl get -o json` prints it."""
    obj: Object = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace, "resourceVersion": "1"},
        **more,
    }
    if data is not None:
        obj["data"] = data
    return obj


def save(path: Path, *objects: Object) -> None:
    """As an editor does, by rename."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))
    new.rename(path)


# -- the first snapshot


def test_nothing_is_published_before_every_named_object_exists(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    done = run_loader("--onetime", "--configmap", "a", "--configmap", "b")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "demo/b" in done.stderr
    assert not (out / "..data").exists()


def test_onetime_waits_for_its_sources(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    names = ("--configmap", "a", "--configmap", "b")
    loader = start_loader("--onetime", "--timeout", "20s", *names)
    loader.wait_log("demo/b")
    assert not (out / "..data").exists()
    api.configmap("demo", "b", {"b": "1"})
    assert loader.wait(10) == 0
    wait_files(out, {"a": "1", "b": "1"})


def test_onetime_gives_up_at_its_timeout(run_loader: RunLoader) -> None:
    start = time.monotonic()
    done = run_loader("--onetime", "--configmap", "b", "--timeout", "1s")
    assert done.returncode == 1
    assert 0.9 < time.monotonic() - start < 3
    assert "demo/b" in done.stderr


@pytest.mark.parametrize("mode", [["--watch"], []], ids=["watch", "poll"])
def test_a_sidecar_says_so_once_and_waits(
    start_loader: StartLoader, api: ApiServer, out: Path, mode: list[str]
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    loader = start_loader(*mode, *INTERVAL, "--configmap", "a", "--configmap", "b")
    loader.wait_log("demo/b")
    time.sleep(0.5)  # some intervals
    assert loader.count_log("demo/b") == 1, loader.log
    assert not (out / "..data").exists()
    api.configmap("demo", "b", {"b": "1"})
    wait_files(out, {"a": "1", "b": "1"})


def test_an_init_run_and_then_a_sidecar(
    run_loader: RunLoader, start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    """Nothing changed means nothing touched: not a link, not a time stamp, no event."""
    api.configmap("demo", "a", {"a": "1", "b": "1"})
    assert run_loader("--onetime", "--configmap", "a").returncode == 0
    before = fingerprint(out)
    with Inotify(out, out / "current", mask=0xFFF & ~0x1 & ~0x10 & ~0x20) as inotify:
        loader = start_loader("--watch", *INTERVAL, "--configmap", "a")
        api.wait_watches(1)
        time.sleep(0.3)  # some checks of the disk
        loader.stop()
        assert inotify.events() == []
    assert fingerprint(out) == before
    assert run_loader("--onetime", "--configmap", "a").returncode == 0
    assert fingerprint(out) == before


# -- deleted, emptied, renamed


@pytest.mark.parametrize("mode", [["--watch"], []], ids=["watch", "poll"])
@pytest.mark.parametrize("how", ["deleted", "emptied", "without data"])
def test_a_named_one_that_goes_keeps_its_files(
    start_loader: StartLoader, api: ApiServer, out: Path, how: str, mode: list[str]
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    api.configmap("demo", "b", {"b": "1"})
    loader = start_loader(*mode, *INTERVAL, "--configmap", "a", "--configmap", "b")
    wait_files(out, {"a": "1", "b": "1"})
    if how == "deleted":
        api.delete("ConfigMap", "demo", "a")
    else:
        api.configmap("demo", "a", {} if how == "emptied" else None)
    loader.wait_log("(?i)warn.*demo/a")
    api.configmap("demo", "b", {"b": "2"})
    wait_files(out, {"a": "1", "b": "2"})
    assert loader.count_log("(?i)warn.*demo/a") == 1, loader.log
    api.configmap("demo", "a", {"a": "2"})
    wait_files(out, {"a": "2", "b": "2"})


def test_it_keeps_them_over_a_restart(
    run_loader: RunLoader, start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    api.configmap("demo", "b", {"b": "1"})
    names = ("--configmap", "a", "--configmap", "b")
    assert run_loader("--onetime", *names).returncode == 0
    api.delete("ConfigMap", "demo", "a")
    api.configmap("demo", "b", {"b": "2"})
    loader = start_loader("--watch", *names)
    loader.wait_log("(?i)warn.*demo/a")
    wait_files(out, {"a": "1", "b": "2"})


@pytest.mark.parametrize("mode", [["--watch"], []], ids=["watch", "poll"])
def test_a_key_that_goes_takes_its_file_along(
    start_loader: StartLoader, api: ApiServer, out: Path, mode: list[str]
) -> None:
    api.configmap("demo", "a", {"a": "1", "b": "1"})
    start_loader(*mode, *INTERVAL, "--configmap", "a")
    wait_files(out, {"a": "1", "b": "1"})
    api.configmap("demo", "a", {"a": "1", "c": "1"})
    wait_files(out, {"a": "1", "c": "1"})
    wait_converged(out)


def test_a_key_that_goes_while_the_loader_is_down(
    run_loader: RunLoader, start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"a": "1", "b": "1"})
    assert run_loader("--onetime", "--configmap", "a").returncode == 0
    api.configmap("demo", "a", {"a": "1"})
    start_loader("--watch", "--configmap", "a")
    wait_files(out, {"a": "1"})
    wait_converged(out)


def test_leaving_a_selector_takes_all_files_along(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    label = {"app": "x"}
    api.configmap("demo", "a", {"a1": "1", "a2": "1"}, labels=label)
    api.configmap("demo", "b", {"b": "1"}, labels=label)
    api.configmap("other", "c", {"c": "1"}, labels=label)
    start_loader("--watch", "--configmap-selector", "app=x")
    wait_files(out, {"a1": "1", "a2": "1", "b": "1"})
    api.wait_watches(1)
    api.configmap("demo", "a", {"a1": "1", "a2": "1"})
    wait_files(out, {"b": "1"})
    api.configmap("demo", "a", {"a1": "2"}, labels=label)
    wait_files(out, {"a1": "2", "b": "1"})
    api.delete("ConfigMap", "demo", "b")
    wait_files(out, {"a1": "2"})
    wait_converged(out)


def test_a_selector_that_matches_nothing_is_a_snapshot(run_loader: RunLoader, out: Path) -> None:
    done = run_loader("--onetime", "--configmap-selector", "app=x")
    assert done.returncode == 0, done.stderr
    assert inspect(out).files == {}


def test_recreated_under_the_same_name(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"a": "1", "b": "1"})
    start_loader("--watch", "--configmap", "a")
    wait_files(out, {"a": "1", "b": "1"})
    api.wait_watches(1)
    api.delete("ConfigMap", "demo", "a")
    api.configmap("demo", "a", {"a": "2"})
    wait_files(out, {"a": "2"})


# -- who wins


def test_the_one_named_later_wins(run_loader: RunLoader, api: ApiServer, out: Path) -> None:
    api.configmap("demo", "a", {"x": "a", "a": "1"})
    api.configmap("demo", "b", {"x": "b", "b": "1"})
    for first, last in ("ab", "ba"):
        done = run_loader("--onetime", "--configmap", first, "--configmap", last)
        assert done.returncode == 0, done.stderr
        assert snapshot(out) == {"x": last.encode(), "a": b"1", "b": b"1"}
        warned = [line for line in done.stderr.splitlines() if re.search("(?i)warn", line)]
        assert len(warned) == 1, done.stderr
        assert all(word in warned[0] for word in ("x", "demo/a", "demo/b"))


def test_a_hidden_key_comes_back(start_loader: StartLoader, api: ApiServer, out: Path) -> None:
    api.configmap("demo", "a", {"x": "a"})
    api.configmap("demo", "b", {"x": "b"})
    start_loader("--watch", "--configmap", "a", "--configmap", "b")
    wait_files(out, {"x": "b"})
    api.wait_watches(2)
    api.configmap("demo", "b", {"y": "b"})
    wait_files(out, {"x": "a", "y": "b"})


def test_within_a_selector_the_order_is_always_the_same(
    run_loader: RunLoader, api: ApiServer, tmp_path: Path, out: Path
) -> None:
    objects = [configmap(name, {"x": name}) for name in "abc"]
    for one in objects:
        one["metadata"]["labels"] = {"app": "x"}
    path = tmp_path / "objects.json"
    results = set()
    for order in (objects, objects[::-1], objects[1:] + objects[:1]):
        save(path, *order)
        done = run_loader("--onetime", "--configmap-selector", "app=x", "--from-file", str(path))
        assert done.returncode == 0, done.stderr
        results.add(snapshot(out)["x"])
    assert len(results) == 1


def test_a_directory_of_its_own(run_loader: RunLoader, api: ApiServer, out: Path) -> None:
    api.configmap("demo", "flags", {"feature.on": "100"})
    api.configmap("other", "more", {"feature.on": "50"})
    sources = ("--configmap", "flags:runtime", "--configmap", "other/more:a/b.c/d")
    done = run_loader("--onetime", *sources)
    assert done.returncode == 0, done.stderr
    published = inspect(out)
    assert published.files == {"runtime/feature.on": b"100", "a/b.c/d/feature.on": b"50"}
    assert modes(out)["runtime"] == 0o755


def test_a_directory_that_empties_stays(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    """Envoy's watch is bound to it."""
    api.configmap("demo", "a", {"a": "1"}, labels={"app": "x"})
    api.configmap("demo", "b", {"b": "1"})
    start_loader("--watch", "--configmap", "a:deep/er", "--configmap", "b")
    wait_files(out, {"deep/er/a": "1", "b": "1"})
    api.wait_watches(2)
    inode = (out / "current/deep/er").stat().st_ino
    api.configmap("demo", "a", None, binary={"c": b"1"})
    wait_files(out, {"deep/er/c": "1", "b": "1"})
    assert (out / "current/deep/er").stat().st_ino == inode


def test_a_file_where_another_has_a_directory(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"eds": "a file", "ok": "1"})
    api.configmap("demo", "b", {"x.yaml": "1"})
    for names in (("a", "b:eds"), ("b:eds", "a")):
        args = [word for name in names for word in ("--configmap", name)]
        done = run_loader("--onetime", *args)
        assert done.returncode == 0, done.stderr
        assert snapshot(out) == {"ok": b"1", "eds/x.yaml": b"1"}
        assert "eds" in done.stderr
        assert "demo/a" in done.stderr


# -- content, byte for byte

CONTENT = {
    "empty": b"",
    "no-newline": b"a: 1",
    "crlf": b"a: 1\r\nb: 2\r\n",
    "utf8": "grün, 緑, 🟢\n".encode(),
    "bom": b"\xef\xbb\xbfa: 1\n",
    "nul": b"a\0b",
    "line-separators": "a\u2028b\u0085c".encode(),
    "large": b"x: y\n" * 200_000,
}


@pytest.mark.parametrize("name", CONTENT)
def test_content_goes_through_byte_for_byte(
    run_loader: RunLoader, api: ApiServer, out: Path, name: str
) -> None:
    api.configmap("demo", "a", {"text": CONTENT[name].decode()}, {"binary": CONTENT[name]})
    done = run_loader("--onetime", "--configmap", "a")
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"text": CONTENT[name], "binary": CONTENT[name]}


def test_binary_that_is_no_text(run_loader: RunLoader, api: ApiServer, out: Path) -> None:
    content = bytes(range(256)) * 100
    api.configmap("demo", "a", None, {"blob": content})
    assert run_loader("--onetime", "--configmap", "a").returncode == 0
    assert snapshot(out) == {"blob": content}


@pytest.mark.parametrize("data", [{}, None], ids=["empty", "without data"])
def test_a_configmap_that_has_nothing_yet(
    run_loader: RunLoader, api: ApiServer, out: Path, data: dict[str, str] | None
) -> None:
    """It exists; the others are published, and it is named."""
    api.configmap("demo", "a", data)
    api.configmap("demo", "b", {"b": "1"})
    done = run_loader("--onetime", "--configmap", "a", "--configmap", "b")
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"b": b"1"}


BAD_KEYS = [
    "..",
    ".",
    "",
    "../up",
    "a/b",
    "/etc/passwd",
    "..data",
    "..x",
    "a\nb",
    "a\0b",
    "x" * 300,
]


@pytest.mark.parametrize("key", BAD_KEYS, ids=repr)
def test_a_bad_key_is_left_out_and_named(
    run_loader: RunLoader, api: ApiServer, out: Path, key: str
) -> None:
    """A real API server refuses them; nothing may rest on that."""
    api.configmap("demo", "a", {key: "bad", "good.yaml": "1", ".hidden": "1"})
    done = run_loader("--onetime", "--configmap", "a")
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"good.yaml": b"1", ".hidden": b"1"}
    assert "demo/a" in done.stderr
    assert len(done.stderr.splitlines()) <= 3
    wait_converged(out)
    assert sorted(os.listdir(out.parent)) == ["runtime", "token"]


def test_binary_data_that_is_no_base64(run_loader: RunLoader, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "objects.json"
    save(path, configmap("a", {"ok": "1"}, binaryData={"bad": "***"}))
    done = run_loader("--onetime", "--configmap", "a", "--from-file", str(path))
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"ok": b"1"}
    assert "bad" in done.stderr


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_whatever_the_umask(api: ApiServer, common: list[str], out: Path, umask: int) -> None:
    api.configmap("demo", "a", {"a": "1"})
    before = os.umask(umask)
    try:
        args = [*common, "--apiserver", api.url, "--onetime", "--configmap", "a:sub"]
        assert run(args).returncode == 0
    finally:
        os.umask(before)
    assert modes(out) == {".": 0o755, "sub": 0o755, "sub/a": 0o644}
    assert (out / "current/sub").stat().st_mode & 0o777 == 0o755
    assert out.stat().st_mode & 0o777 == 0o755


# -- what Envoy is told


def test_only_what_changed_is_moved(start_loader: StartLoader, api: ApiServer, out: Path) -> None:
    data = {"cds.yaml": "1", "rds.yaml": "1", "lds.yaml": "1"}
    api.configmap("demo", "a", data)
    start_loader("--watch", "--configmap", "a")
    wait_files(out, data)
    api.wait_watches(1)
    with Inotify(out / "current") as current, Inotify(out) as top:
        for text in "23":
            api.configmap("demo", "a", {**data, "rds.yaml": text})
            assert current.moved(5) == ["rds.yaml"]
            assert top.moved(1) == ["..data"]
        api.configmap("demo", "a", {**data, "rds.yaml": "3"}, labels={"only": "metadata"})
        api.configmap("demo", "a", {**data, "rds.yaml": "4"})
        assert current.moved(5) == ["rds.yaml"]
        assert top.moved(1) == ["..data"]


def test_there_and_back_again(start_loader: StartLoader, api: ApiServer, out: Path) -> None:
    """A, B, A: the version is the hash of the content."""
    api.configmap("demo", "a", {"a": "A"})
    start_loader("--watch", "--configmap", "a")
    wait_files(out, {"a": "A"})
    api.wait_watches(1)
    versions = [inspect(out).version]
    for text in "BABABCA":
        api.configmap("demo", "a", {"a": text})
        wait_files(out, {"a": text})
        versions.append(wait_converged(out).version)
    bare = [version[:18] for version in versions]
    assert bare[0] == bare[2] == bare[4] == bare[7]
    assert bare[1] == bare[3] == bare[5]
    assert len(set(bare)) == 3


def test_a_burst_is_a_handful_of_publications(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"a": "0"})
    start_loader("--watch", "--configmap", "a")
    wait_files(out, {"a": "0"})
    api.wait_watches(1)
    with Inotify(out) as top:
        for number in range(1, 1001):
            api.configmap("demo", "a", {"a": str(number)})
        wait_files(out, {"a": "1000"}, 10)
        moves = sum(1 for mask, _ in top.events(1) if mask & IN_MOVED_TO)
    assert moves <= 30
    wait_converged(out)


def test_nothing_is_lost_in_a_hundred_changes(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"a": "0", "same": "x" * 10_000})
    loader = start_loader("--watch", "--configmap", "a")
    api.wait_watches(1)
    files = loader.open_files()
    for number in range(100):
        api.configmap("demo", "a", {"a": str(number), "same": "x" * 10_000})
        wait_files(out, {"a": str(number), "same": "x" * 10_000})
    wait_converged(out)
    assert loader.open_files() <= files + 2
    assert (out / "current/same").stat().st_nlink >= 2  # unchanged: linked, not written


# -- the output directory


def test_damage_is_repaired_at_the_interval(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"a": "1", "b": "1"})
    start_loader("--watch", *INTERVAL, "--configmap", "a")
    wait_files(out, {"a": "1", "b": "1"})
    (out / "current/a").resolve().write_text("damaged")
    wait_files(out, {"a": "1", "b": "1"})
    (out / "current/b").unlink()
    wait_files(out, {"a": "1", "b": "1"})
    (out / "current/a").resolve().unlink()
    wait_files(out, {"a": "1", "b": "1"})
    wait_converged(out)
    assert len(api.requests.matching(lambda request: request.is_list)) == 1


def test_the_predecessors_files_are_taken_over_and_strangers_left(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"rds.yaml": "new"})
    (out / "current").mkdir(parents=True)
    (out / "current/rds.yaml").write_text("old")
    (out / "current/mine.yaml").write_text("mine")
    done = run_loader("--onetime", "--configmap", "a")
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"rds.yaml": b"new", "mine.yaml": b"mine"}
    assert "mine.yaml" in done.stderr
    inspect(out, strangers=["mine.yaml"])


def test_current_was_a_link(run_loader: RunLoader, api: ApiServer, out: Path) -> None:
    """An older layout swapped `current` itself, which Envoy never sees after the first time."""
    api.configmap("demo", "a", {"rds.yaml": "new"})
    (out / "old").mkdir(parents=True)
    (out / "old/rds.yaml").write_text("old")
    (out / "current").symlink_to("old")
    done = run_loader("--onetime", "--configmap", "a")
    assert done.returncode == 0, done.stderr
    assert not (out / "current").is_symlink()
    assert snapshot(out) == {"rds.yaml": b"new"}


def test_a_deep_output_directory_is_made(
    run_loader: RunLoader, api: ApiServer, tmp_path: Path
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    deep = tmp_path / "x/y/z"
    done = run_loader("--onetime", "--configmap", "a", "--output-dir", str(deep))
    assert done.returncode == 0, done.stderr
    assert inspect(deep).files == {"a": b"1"}


def test_a_relative_output_directory(run_loader: RunLoader, api: ApiServer, tmp_path: Path) -> None:
    api.configmap("demo", "a", {"a": "1"})
    done = run_loader("--onetime", "--configmap", "a", "--output-dir", "rel", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert inspect(tmp_path / "rel").files == {"a": b"1"}


def test_an_output_directory_that_cannot_be(
    run_loader: RunLoader, api: ApiServer, tmp_path: Path
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    file = tmp_path / "file"
    file.write_text("")
    wanted = [(file, file), (file / "below", file)]
    wanted += [(place, place) for place in (Path("/proc/nope"), Path("/sys/nope"))]
    for place, named in wanted:
        done = run_loader("--onetime", "--configmap", "a", "--output-dir", str(place))
        assert done.returncode == 1, (place, done.stderr)
        assert str(named) in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert "Traceback" not in done.stderr


UNPRIVILEGED = """
import os, sys
# Everything is imported while this may still read the interpreter's files.
import argparse, difflib, importlib.util, shlex, subprocess, tempfile
import encodings.ascii, encodings.idna, encodings.latin_1
sys.argv = sys.argv[1:]
spec = importlib.util.spec_from_file_location("loader", sys.argv[0])
module = importlib.util.module_from_spec(spec)
sys.modules["loader"] = module
spec.loader.exec_module(module)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(module.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_an_output_directory_of_another_user(api: ApiServer, tmp_path: Path) -> None:
    from tests.support.loader import COMMAND

    api.tokens = None
    api.configmap("demo", "a", {"a": "1"})
    script = tmp_path / "unprivileged.py"
    script.write_text(UNPRIVILEGED)
    with tempfile.TemporaryDirectory() as home:  # where others may enter, unlike tmp_path
        os.chmod(home, 0o755)
        for place in (Path(home), Path(home, "below")):
            args = ["--namespace", "demo", "--apiserver", api.url, "--output-dir", str(place)]
            command = [sys.executable, "-I", str(script), COMMAND[-1], *args, "--onetime"]
            done = subprocess.run(
                [*command, "--configmap", "a"],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            assert done.returncode == 1, done.stderr
            assert str(home) in done.stderr
            assert "Permission denied" in done.stderr
            assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file system of 256 KiB, where this may be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    return place


def test_a_full_disk_leaves_the_last_snapshot_serving(
    start_loader: StartLoader, api: ApiServer, small: Path
) -> None:
    try:
        api.configmap("demo", "a", {"a": "1"})
        place = small / "out"
        loader = start_loader("--watch", *INTERVAL, "--configmap", "a", "--output-dir", str(place))
        wait_files(place, {"a": "1"})
        api.wait_watches(1)
        api.configmap("demo", "a", {"a": "x" * 500_000})
        loader.wait_log("No space left")
        assert snapshot(place) == {"a": b"1"}
        inspect(place, converged=False)
        api.configmap("demo", "a", {"a": "2"})
        wait_files(place, {"a": "2"})
        wait_converged(place)
        loader.stop()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


def test_a_read_only_disk_leaves_the_last_snapshot_serving(
    start_loader: StartLoader, api: ApiServer, small: Path
) -> None:
    try:
        api.configmap("demo", "a", {"a": "1"})
        place = small / "out"
        loader = start_loader("--watch", *INTERVAL, "--configmap", "a", "--output-dir", str(place))
        wait_files(place, {"a": "1"})
        api.wait_watches(1)
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        api.configmap("demo", "a", {"a": "2"})
        loader.wait_log("Read-only file system")
        assert snapshot(place) == {"a": b"1"}
        subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
        wait_files(place, {"a": "2"}, 40)
        loader.stop()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


def test_too_few_open_files(api: ApiServer, common: list[str], out: Path) -> None:
    """EMFILE is a failure like another."""
    from tests.support.loader import COMMAND, environment

    api.configmap("demo", "a", {"a": "1"})

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))

    args = [*common, "--apiserver", api.url, "--onetime", "--configmap", "a"]
    done = subprocess.run(
        [*COMMAND, *args],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=20,
        preexec_fn=few,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_two_loaders_on_one_directory(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    first = start_loader("--watch", "--configmap", "a")
    wait_files(out, {"a": "1"})
    for mode in (["--onetime"], ["--watch"]):
        done = run_loader(*mode, "--configmap", "a", timeout=10)
        assert done.returncode == 1
        assert str(out) in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
    preview = run_loader("--dry-run", "--configmap", "a")
    assert preview.returncode == 0, preview.stderr
    first.kill()
    assert run_loader("--onetime", "--configmap", "a").returncode == 0


# -- preview


def test_a_preview_prints_every_file_under_a_header(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"rds.yaml": "a: 1\n", "end": "no newline"}, {"blob": b"\xff\0"})
    done = run_loader("--dry-run", "--configmap", "a:sub")
    assert done.returncode == 0, done.stderr
    for text in ("sub/rds.yaml", "a: 1\n", "sub/end", "no newline\n", "sub/blob", "demo/a"):
        assert text in done.stdout
    assert not out.exists()


def test_a_diff_against_what_is_published(run_loader: RunLoader, api: ApiServer, out: Path) -> None:
    api.configmap("demo", "a", {"rds.yaml": "a: 1\nb: 1\n", "old.yaml": "o: 1\n"})
    assert run_loader("--onetime", "--configmap", "a").returncode == 0
    before = fingerprint(out)
    same = run_loader("--dry-run", "--diff", "--configmap", "a")
    assert same.returncode == 0, same.stderr
    assert "@@" not in same.stdout
    api.configmap("demo", "a", {"rds.yaml": "a: 1\nb: 2\n", "new.yaml": "n: 1\n"})
    done = run_loader("--dry-run", "--diff", "--configmap", "a")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in ("-b: 1", "+b: 2", "-o: 1", "+n: 1"):
        assert line in lines
    assert "-a: 1" not in lines
    assert fingerprint(out) == before


def test_a_diff_against_nothing(run_loader: RunLoader, api: ApiServer, out: Path) -> None:
    api.configmap("demo", "a", {"rds.yaml": "a: 1\n"})
    done = run_loader("--dry-run", "--diff", "--configmap", "a")
    assert done.returncode == 0, done.stderr
    assert "+a: 1" in done.stdout.splitlines()
    assert not out.exists()


# -- the check


def test_a_check_sees_the_staged_snapshot(
    run_loader: RunLoader, api: ApiServer, tmp_path: Path, out: Path
) -> None:
    api.configmap("demo", "a", {"rds.yaml": "1"})
    seen = tmp_path / "seen"
    check = f"sh -c 'cat \"$1\"/rds.yaml > {seen}' check {{dir}}"
    done = run_loader("--onetime", "--configmap", "a", "--check-cmd", check)
    assert done.returncode == 0, done.stderr
    assert seen.read_text() == "1"
    assert snapshot(out) == {"rds.yaml": b"1"}


def test_what_the_check_refuses_is_not_published(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"rds.yaml": "good"})
    check = ("--check-cmd", "grep -q good {dir}/rds.yaml")
    loader = start_loader("--watch", *INTERVAL, "--configmap", "a", *check)
    wait_files(out, {"rds.yaml": "good"})
    api.wait_watches(1)
    api.configmap("demo", "a", {"rds.yaml": "bad"})
    loader.wait_log("(?i)check")
    assert snapshot(out) == {"rds.yaml": b"good"}
    api.configmap("demo", "a", {"rds.yaml": "good again"})
    wait_files(out, {"rds.yaml": "good again"})
    loader.stop()
    api.configmap("demo", "a", {"rds.yaml": "bad"})
    done = run_loader("--onetime", "--configmap", "a", *check)
    assert done.returncode == 1
    assert "check" in done.stderr
    assert snapshot(out) == {"rds.yaml": b"good again"}


def test_the_words_of_a_check_that_fails_are_shown(run_loader: RunLoader, api: ApiServer) -> None:
    api.configmap("demo", "a", {"rds.yaml": "1"})
    check = "sh -c 'echo line 3 is wrong >&2; exit 7'"
    done = run_loader("--onetime", "--configmap", "a", "--check-cmd", check)
    assert done.returncode == 1
    assert "line 3 is wrong" in done.stderr
    assert "7" in done.stderr


def test_a_check_that_is_not_there(run_loader: RunLoader, api: ApiServer, out: Path) -> None:
    api.configmap("demo", "a", {"rds.yaml": "1"})
    done = run_loader("--onetime", "--configmap", "a", "--check-cmd", "/nope/check {dir}")
    assert done.returncode in (1, 2)
    assert "/nope/check" in done.stderr
    assert not (out / "..data").exists()


# -- files of objects instead of an API server


def test_objects_of_a_file(
    run_loader: RunLoader, api: ApiServer, tmp_path: Path, out: Path
) -> None:
    path = tmp_path / "objects.json"
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "a", "namespace": "demo"},
    }
    elsewhere = configmap("a", {"a": "of another namespace"}, "other")
    save(path, service, elsewhere, configmap("a", {"a": "1"}), configmap("b", {"b": "1"}))
    done = run_loader("--onetime", "--configmap", "a", "--from-file", str(path))
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"a": b"1"}
    assert api.connections_total == 0


def test_one_object_of_a_file(run_loader: RunLoader, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "object.json"
    path.write_text(json.dumps(configmap("a", {"a": "1"})))
    assert run_loader("--onetime", "--configmap", "a", "--from-file", str(path)).returncode == 0
    assert snapshot(out) == {"a": b"1"}


def test_a_selector_over_a_file(run_loader: RunLoader, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "objects.json"
    objects = [configmap(name, {name: "1"}) for name in "abcd"]
    for one, app in zip(objects, "xyxz", strict=True):
        one["metadata"]["labels"] = {"app": app}
    del objects[3]["metadata"]["labels"]
    save(path, *objects)
    wanted = {"app=x": "ac", "app!=x": "bd", "app": "abc", "!app": "d", "app in (x,y)": "abc",
              "app notin (x, y)": "d", "app=x,app!=y": "ac"}  # fmt: skip
    for selector, names in wanted.items():
        done = run_loader("--onetime", "--configmap-selector", selector, "--from-file", str(path))
        assert done.returncode == 0, (selector, done.stderr)
        assert sorted(snapshot(out)) == list(names), selector


def test_objects_of_stdin(run_loader: RunLoader, out: Path) -> None:
    text = json.dumps(configmap("a", {"a": "1"}))
    done = run_loader("--onetime", "--configmap", "a", "--from-file", "-", stdin=text)
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"a": b"1"}


def test_options_of_the_api_server_are_ignored_beside_a_file(
    run_loader: RunLoader, tmp_path: Path, out: Path
) -> None:
    path = tmp_path / "objects.json"
    save(path, configmap("a", {"a": "1"}))
    others = ("--token-file", "/nope", "--ca-file", "/nope", "--apiserver", "http://127.0.0.1:1")
    done = run_loader(
        "--onetime", "--configmap", "a", "--from-file", str(path), *others, server=None
    )
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"a": b"1"}


@pytest.mark.parametrize(
    "content",
    ["", "no json", "[1]", "null", '{"kind":"List"}', '{"kind":"List","items":{}}', '{"items":[1]}',
     '{"kind":"ConfigMap"}', '{"kind":"ConfigMap","metadata":{"name":7}}', "\ud800",
     '{"kind":"ConfigMap","metadata":{"name":"a","namespace":"demo"},"data":"text"}'],
    ids=repr,
)  # fmt: skip
def test_a_file_that_is_none_of_it(
    run_loader: RunLoader, tmp_path: Path, out: Path, content: str
) -> None:
    path = tmp_path / "objects.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    done = run_loader("--onetime", "--configmap", "a", "--from-file", str(path))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert str(path) in done.stderr or "demo/a" in done.stderr
    assert not (out / "..data").exists()


def test_a_file_that_is_not_there(run_loader: RunLoader, tmp_path: Path) -> None:
    path = tmp_path / "missing.json"
    done = run_loader("--onetime", "--configmap", "a", "--from-file", str(path))
    assert done.returncode == 1
    assert str(path) in done.stderr


@pytest.mark.parametrize("mode", [["--watch"], []], ids=["watch", "poll"])
def test_a_sidecar_reads_the_file_again(
    start_loader: StartLoader, tmp_path: Path, out: Path, mode: list[str]
) -> None:
    path = tmp_path / "objects.json"
    save(path, configmap("a", {"a": "1"}))
    args = (*mode, *INTERVAL, "--configmap", "a", "--from-file", str(path))
    loader = start_loader(*args, server=None)
    wait_files(out, {"a": "1"})
    save(path, configmap("a", {"a": "2", "b": "2"}))
    wait_files(out, {"a": "2", "b": "2"})
    path.write_text("broken")
    loader.wait_log(re.escape(str(path)))
    wait_files(out, {"a": "2", "b": "2"})
    path.unlink()
    time.sleep(0.3)
    wait_files(out, {"a": "2", "b": "2"})
    save(path, configmap("a", {"a": "3"}))
    wait_files(out, {"a": "3"})
    save(path)
    loader.wait_log("(?i)warn.*demo/a")
    wait_files(out, {"a": "3"})


# -- what the loader reads it may not trust


def test_objects_nobody_asked_for_are_no_source(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    """A server that ignores the field selector does not smuggle in files."""
    items = [
        {"metadata": {"name": name, "namespace": namespace}, "data": {f"{name}.yaml": namespace}}
        for name, namespace in (("b", "demo"), ("a", "other"), ("a", "demo"))
    ]
    body = {"kind": "ConfigMapList", "apiVersion": "v1", "items": items,
            "metadata": {"resourceVersion": "5"}}  # fmt: skip
    api.fail_next("GET", k8s.Response(200, k8s.to_json(body)))
    done = run_loader("--onetime", "--configmap", "a")
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"a.yaml": b"demo"}


@pytest.mark.parametrize(
    "item", [7, None, {}, {"metadata": {}}, {"metadata": {"name": "a"}}, []], ids=repr
)
def test_a_bad_item_does_not_stop_the_rest(
    run_loader: RunLoader, api: ApiServer, out: Path, item: object
) -> None:
    good = {"metadata": {"name": "g", "namespace": "demo"}, "data": {"g": "1"}}
    body = {"kind": "ConfigMapList", "apiVersion": "v1", "items": [item, good],
            "metadata": {"resourceVersion": "5"}}  # fmt: skip
    api.fail_next("GET", k8s.Response(200, k8s.to_json(body)))
    done = run_loader("--onetime", "--configmap-selector", "app=x")
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"g": b"1"}

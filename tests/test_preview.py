"""--dry-run, --diff and --check-cmd: what CI and laptops use."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import loader
from tests.conftest import RunLoader, StartLoader
from tests.support.apiserver import ApiServer
from tests.support.busy import within
from tests.support.loader import COMMAND, environment, wait_until

# -- the check


def check(*command: str, stop: threading.Event | None = None) -> str:
    return loader.run_check(command, "/the/directory", stop or threading.Event())


def shell(script: str, stop: threading.Event | None = None) -> str:
    return check("sh", "-c", script, "{dir}", stop=stop)


def test_what_a_check_is_given() -> None:
    assert check("true") == ""
    assert shell('test "$0" = /the/directory') == ""
    assert shell('test "$(umask)" = 0022') == ""
    (reading, writing), before, umask = os.pipe(), os.dup(0), os.umask(0)
    try:
        os.write(writing, b"not for the check\n")
        os.dup2(reading, 0)
        assert shell('! read line && test "$(umask)" = 0022') == ""
    finally:
        os.umask(umask)
        os.dup2(before, 0)
        for descriptor in (reading, writing, before):
            os.close(descriptor)


def test_the_last_line_of_a_check_that_rejects_is_shown() -> None:
    problem = shell("echo one; echo line 3 is wrong >&2; exit 7")
    assert problem == "--check-cmd sh rejects the files (exit 7): line 3 is wrong"
    assert shell("exit 1").endswith("(exit 1): no output")
    absent = check("/nope/check")
    assert absent == "--check-cmd cannot be run: /nope/check: No such file or directory"
    assert check("a\0b").startswith("--check-cmd cannot be run: ")


def test_the_output_of_a_check_is_bounded_and_redacted() -> None:
    """A key is not shown, however much is printed after it."""
    script = "print('-----BEGIN PRIVATE KEY-----'); print('MIIsecret' * {times}); exit(1)"
    for times in (1, 100_000):
        problem = check(sys.executable, "-c", script.format(times=times))
        assert problem.endswith("rejects the files (exit 1): [redacted]")
    assert len(check(sys.executable, "-c", "print('x' * 10_000_000); exit(1)")) < 500


def processes_with(mark: str) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if mark.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@pytest.mark.parametrize("code", [0, 1])
def test_what_a_check_leaves_behind_is_ended(code: int) -> None:
    mark = f"3600.{time.time_ns()}"
    with within(2):
        problem = shell(f"sleep {mark} & exit {code}")
    assert bool(problem) == bool(code)
    wait_until(lambda: not processes_with(mark), message="the end of the child")


def test_a_check_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "CHECK_SECONDS", 0.3)
    mark = f"3600.{time.time_ns()}"
    assert shell(f"sleep {mark} | cat") == "--check-cmd took more than 0 s"
    assert check("yes") == "--check-cmd took more than 0 s"
    wait_until(lambda: not processes_with(mark), message="the end of the child")


def test_a_signal_ends_a_check_at_once() -> None:
    stop = threading.Event()
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    with within(0.5):
        assert shell("exec sleep 3600", stop) == "--check-cmd was ended by a signal"


def test_no_check_outlives_the_loader(start_loader: StartLoader, api: ApiServer) -> None:
    mark = f"3600.{time.time_ns()}"
    api.configmap("demo", "a", {"a": "1"})
    loader = start_loader("--watch", "--configmap", "a", "--check-cmd", f"sleep {mark}")
    wait_until(lambda: len(processes_with(mark)) > 1, message="the check beside the loader")
    loader.stop(within=1.0)
    assert not processes_with(mark)


# -- the preview


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    path = tmp_path / "objects.json"
    write(path, {"rds.yaml": "a: 1\n", "flags/x": "no key", "cds.json": "{}"})
    return path


def write(path: Path, data: dict[str, str]) -> None:
    item = {"kind": "ConfigMap", "metadata": {"namespace": "demo", "name": "a"}, "data": data}
    path.write_text(json.dumps(item))


def preview(objects: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Without an API server."""
    command = [*COMMAND, "--from-file", str(objects), "--namespace", "demo", "--configmap", "a"]
    return subprocess.run(
        [*command, "--dry-run", *more, "--output-dir", str(objects.parent / "runtime")],
        env=environment(), capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip


def test_the_files_are_printed_and_the_version_to_wait_for(
    objects: Path, run_loader: RunLoader, out: Path
) -> None:
    write(objects, {"rds.yaml": "a: 1\n", "note": "no line break"})
    done = preview(objects)
    assert done.returncode == 0, done.stderr
    version, _, files = done.stdout.partition("\n")
    assert files == (
        "\n==> note (configmap demo/a, 13 bytes) <==\nno line break\n"
        "\n==> rds.yaml (configmap demo/a, 5 bytes) <==\na: 1\n"
    )
    run_loader("--onetime", "--configmap", "a", "--from-file", str(objects))
    assert os.readlink(out / "..data") == f"..{version.removeprefix('snapshot ')}"


def test_bytes_that_are_not_text_are_escaped(objects: Path) -> None:
    item = {"kind": "ConfigMap", "metadata": {"namespace": "demo", "name": "a"},
            "binaryData": {"blob": "/wBhCg=="}}  # fmt: skip
    objects.write_text(json.dumps(item))
    shown = "==> blob (configmap demo/a, 4 bytes) <==\n\\xff\0a\n"
    assert preview(objects).stdout.endswith(shown)
    assert "+\\xff\0a\n" in preview(objects, "--diff").stdout


def test_a_difference_and_none(objects: Path, run_loader: RunLoader, out: Path) -> None:
    write(objects, {"rds.yaml": "a: 1\n"})
    first = preview(objects, "--diff")
    assert re.match(r"snapshot [0-9a-f]{16}\n--- /dev/null\n\+\+\+ b/rds.yaml\n", first.stdout)
    said = f"WARNING {out}: nothing is published there, so every file is new\n"
    assert first.stderr.partition(" ")[2] == said
    run_loader("--onetime", "--configmap", "a", "--from-file", str(objects))
    same = preview(objects, "--diff")
    assert (same.stdout, same.stderr) == ("", "")
    write(objects, {"rds.yaml": "a: 2"})
    assert re.fullmatch(
        r"snapshot [0-9a-f]{16}\n--- a/rds.yaml\n\+\+\+ b/rds.yaml\n"
        r"@@ -1 \+1 @@\n-a: 1\n\+a: 2\n\\ No newline at end of file\n",
        preview(objects, "--diff").stdout,
    )


def test_an_object_that_the_file_does_not_hold(objects: Path) -> None:
    done = preview(objects, "--configmap", "b")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "configmap demo/b: does not exist or is not usable; " in last
    assert last.endswith("; --from-file must hold it, in this namespace")


def test_json_that_is_none_is_named(objects: Path) -> None:
    write(objects, {"cds.json": '{"a": }', "lds.json": "[" * 200_000, "rds.json": "{}", "x": "{"})
    done = preview(objects)
    assert done.returncode == 0
    warnings = [line.partition(" WARNING ")[2] for line in done.stderr.splitlines()]
    assert len(warnings) == 2
    assert warnings[0].startswith("cds.json of configmap demo/a is not valid JSON (")
    assert "line 1 column 7" in warnings[0]
    assert warnings[1].startswith("lds.json of configmap demo/a is not valid JSON (")


def test_a_check_runs_on_a_copy_that_goes_again(
    objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = preview(objects, "--check-cmd", "sh -c 'cat $0/rds.yaml; exit 3' {dir}")
    assert done.returncode == 1
    assert "==> rds.yaml" in done.stdout
    assert "--check-cmd sh rejects the files (exit 3): a: 1" in done.stderr
    done = preview(objects, "--check-cmd", f"sh -c 'stat -c %a:%n $0 > {tmp_path}/seen' {{dir}}")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)  # of the bad key
    mode, _, place = (tmp_path / "seen").read_text().strip().partition(":")
    assert mode == "700"
    assert Path(place).parent == tmp_path
    assert not Path(place).exists()
    assert not (tmp_path / "runtime").exists()


def test_sigterm_ends_a_preview_that_is_process_1(tmp_path: Path, api: ApiServer) -> None:
    """The kernel gives process 1 no default action for a signal."""
    pytest.importorskip("psutil")
    (tmp_path / "token").write_text("token-1")
    command = ["unshare", "--pid", "--fork", "--kill-child", *COMMAND, "--apiserver", api.url]
    if subprocess.run(["unshare", "--pid", "--fork", "true"], check=False).returncode:
        pytest.skip("no PID namespace may be made here")
    command += ["--token-file", str(tmp_path / "token"), "--dry-run", "--timeout", "60s"]
    process = subprocess.Popen([*command, "--configmap", "absent"], stderr=subprocess.PIPE)
    try:
        wait_until(lambda: api.requests, message="a request")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        assert process.wait(2) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_a_preview_beside_a_loader_that_publishes(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    """The snapshot that it compares with may be pruned while it reads."""
    names = [f"k{number}" for number in range(200)]
    api.configmap("demo", "a", dict.fromkeys(names, "0"))
    start_loader("--watch", "--configmap", "a")
    wait_until(lambda: (out / "current" / "k0").exists(), message="the first snapshot")
    ended = threading.Event()

    def change() -> None:
        number = 0
        while not ended.wait(0.005):
            number += 1
            api.configmap("demo", "a", dict.fromkeys(names, f"{number}"))

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    try:
        for _ in range(5):
            done = run_loader("--dry-run", "--diff", "--configmap", "a")
            assert done.returncode == 0, done.stderr
            assert "/dev/null" not in done.stdout
    finally:
        ended.set()
        thread.join(5)

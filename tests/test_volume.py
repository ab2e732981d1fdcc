"""What other containers may plant on the volume, and what a restart remembers there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import loader
from tests.conftest import RunLoader, StartLoader
from tests.support import disk
from tests.support.apiserver import ApiServer
from tests.support.crash import Call, Plan
from tests.support.disk import Inotify
from tests.support.loader import ROOT, Loader, snapshot, wait_files, wait_until

ONCE = ("--onetime", "--configmap", "envoy-xds")
WATCH = ("--watch", "--configmap", "envoy-xds")
SECRET = "the secret of another container"
TYPE = "type.googleapis.com/envoy.config."


def xds(kind: str, **fields: object) -> str:
    return json.dumps({"resources": [{"@type": f"{TYPE}{kind}", **fields}]})


def cds(*names: str) -> str:
    rows = [{"@type": f"{TYPE}cluster.v3.Cluster", "name": name} for name in names]
    return json.dumps({"resources": rows})


def rds(cluster: str) -> str:
    return xds("route.v3.RouteConfiguration", name="r", virtual_hosts=[{"routes": [
        {"route": {"cluster": cluster}}]}])  # fmt: skip


def state_file(out: Path) -> Path:
    return out / "..state/loader.json"


def remembered(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(state_file(out).read_text())
    return found


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# -- planted: nothing is followed out of the directory, nothing is waited for


def secret_by_link(home: Path, secret: Path) -> None:
    (home / "rds.yaml").unlink()
    (home / "rds.yaml").symlink_to(secret)


def secret_beside(home: Path, secret: Path) -> None:
    (home / "planted").symlink_to(secret)


def linked_subdirectory(home: Path, secret: Path) -> None:
    (home / "eds/a").unlink()
    (home / "eds").rmdir()
    (home / "eds").symlink_to(secret.parent)


def fifo(home: Path, _: Path) -> None:
    (home / "rds.yaml").unlink()
    os.mkfifo(home / "rds.yaml")


def a_socket(home: Path, _: Path) -> None:
    (home / "eds/a").unlink()
    before = os.getcwd()
    os.chdir(home / "eds")  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("a")
    os.chdir(before)


def huge(home: Path, _: Path) -> None:
    os.truncate(home / "rds.yaml", 1 << 40)


def deep(home: Path, _: Path) -> None:
    """Deeper than Python's stack."""
    before = os.getcwd()
    os.chdir(home)
    for _number in range(1_200):
        os.mkdir("d")
        os.chdir("d")
    os.chdir(before)


@pytest.fixture(autouse=True)
def nothing_deep(out: Path) -> Iterator[None]:
    """Whoever removes the directories of tests may be recursive."""
    yield
    subprocess.run(["rm", "-rf", str(out)], check=True)


PLANTED = [secret_by_link, secret_beside, linked_subdirectory, fifo, a_socket, huge, deep]


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("mode", ["check", "start", "preview"])
def test_nothing_planted_in_a_snapshot_is_followed(
    run_loader: RunLoader, start_loader: StartLoader, api: ApiServer, out: Path, tmp_path: Path,
    planted: Callable[[Path, Path], None], mode: str,
) -> None:  # fmt: skip
    """It is written anew, without what was planted; a preview does not show it."""
    (tmp_path / "other").mkdir()
    secret = tmp_path / "other/a"
    secret.write_text(SECRET)
    api.configmap("demo", "envoy-xds", {"rds.yaml": "good"})
    api.configmap("demo", "more", {"a": "good"})
    names = ("--configmap", "envoy-xds", "--configmap", "more:eds")
    assert run_loader("--onetime", *names).returncode == 0
    home = out / os.readlink(out / "..data")
    if mode == "check":
        running = start_loader("--watch", *names, "--sync-interval", "1h")
        api.wait_watches(2)
        planted(home, secret)
        running.process.send_signal(1)
        running.wait_log("repaired on disk")
        status = Path(f"/proc/{running.pid}/status").read_text()
        assert int(status.partition("VmHWM:")[2].split()[0]) < 64 << 10, "kB: all is bounded"
        running.stop()
        assert SECRET not in running.log
        disk.inspect(out)
    else:
        planted(home, secret)
        how = ("--dry-run", "--diff") if mode == "preview" else ("--onetime",)
        done = run_loader(*how, *names, timeout=10)
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
    if mode != "preview":
        assert snapshot(out) == {"rds.yaml": b"good", "eds/a": b"good"}
    assert secret.read_text() == SECRET
    assert secret.stat().st_nlink == 1


@pytest.mark.parametrize("kind", ["link", "file", "directory with a link"])
def test_what_has_the_name_of_a_snapshot_is_removed_not_followed(
    run_loader: RunLoader, api: ApiServer, out: Path, tmp_path: Path, kind: str
) -> None:
    precious = tmp_path / "precious"
    (precious / "below").mkdir(parents=True)
    (precious / "below/file").write_text("x")
    name = out / f"..{loader.version_of({'k': loader.file_of(b'2', '')})}"
    out.mkdir()
    if kind == "link":
        name.symlink_to(precious)
    elif kind == "file":
        name.write_text("x")
    else:
        name.mkdir()
        (name / "link").symlink_to(precious)
    for text in ("2", "3", "4"):
        api.configmap("demo", "envoy-xds", {"k": text})
        assert run_loader(*ONCE).returncode == 0
    assert disk.inspect(out).files == {"k": b"4"}
    assert (precious / "below/file").read_text() == "x"
    assert not os.path.lexists(name)


def state_fifo(out: Path, _: Path) -> None:
    state_file(out).unlink()
    os.mkfifo(state_file(out))


def state_link(out: Path, other: Path) -> None:
    """To a state that says that the new bytes were NACKed."""
    (other / "state").write_text(json.dumps({
        "version": loader.__version__, "nacked": {"rds.yaml": [digest("2"), "", "rds", "", []]}}))
    state_file(out).unlink()
    state_file(out).symlink_to(other / "state")


def state_directory_link(out: Path, other: Path) -> None:
    state_file(out).unlink()
    (out / "..state").rmdir()
    (out / "..state").symlink_to(other)


def acked_link(out: Path, other: Path) -> None:
    (other / "rds.yaml").write_text(SECRET)
    (out / "..state/acked").symlink_to(other)


def acked_fifo(out: Path, _: Path) -> None:
    (out / "..state/acked").mkdir()
    os.mkfifo(out / "..state/acked/rds.yaml")


def acked_secret(out: Path, other: Path) -> None:
    (other / "secret").write_text(SECRET)
    (out / "..state/acked").mkdir()
    (out / "..state/acked/rds.yaml").symlink_to(other / "secret")
    (out / "..state/acked/..%..%x").write_text("x")


def state_huge(out: Path, _: Path) -> None:
    os.truncate(state_file(out), 1 << 40)


PLANTED_STATE = [state_fifo, state_link, state_directory_link, acked_link, acked_fifo,
                 acked_secret, state_huge]  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED_STATE)
def test_nothing_planted_in_the_state_is_followed(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path, tmp_path: Path,
    fake: FakeEnvoy, planted: Callable[[Path, Path], None],
) -> None:  # fmt: skip
    """Nothing outside is read or written; the loader goes on without."""
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    assert run_loader(*ONCE).returncode == 0
    other = tmp_path / "other"
    other.mkdir()
    planted(out, other)
    before = disk.fingerprint(other)
    api.configmap("demo", "envoy-xds", {"rds.yaml": "2"})
    running = start_loader(*WATCH, "--envoy-admin", fake.url)
    wait_files(out, {"rds.yaml": "2"})
    wait_until(lambda: state_file(out).is_file() and "nacked" in remembered(out))
    assert running.stop() < 1.0
    assert disk.fingerprint(other) == before
    assert "Traceback" not in running.log
    disk.wait_converged(out)


# -- what is remembered


class FakeEnvoy:
    """An admin interface that counts for `rds.yaml` as many attempts and ACKs as it is told."""

    def __init__(self) -> None:
        self.attempts = self.rejected = 0
        envoy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = envoy.answer(self.path).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path: str) -> str:
        if path.startswith("/server_info"):
            return '{"uptime_current_epoch": "5s"}'
        if path.startswith("/ready"):
            return "LIVE\n"
        if path.startswith("/stats"):
            acks = self.attempts - self.rejected
            rows = {"attempt": self.attempts, "success": acks, "rejected": self.rejected}
            return "".join(f"http.i.rds.r.update_{k}: {v}\n" for k, v in rows.items() if v)
        return "{}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def fake() -> Iterator[FakeEnvoy]:
    made = FakeEnvoy()
    yield made
    made.close()


def test_nothing_new_from_envoy_touches_nothing_that_is_remembered(
    start_loader: StartLoader, api: ApiServer, out: Path, fake: FakeEnvoy
) -> None:
    """A loader that starts anew learns of the same ACK once more."""
    api.configmap("demo", "envoy-xds", {"rds.yaml": rds("a")})
    fake.attempts = 1
    running = start_loader(*WATCH, "--envoy-admin", fake.url)
    wait_until(lambda: state_file(out).exists() and remembered(out).get("acked"))
    running.stop()
    api.wait_watches(0)
    before = disk.fingerprint(out)
    with Inotify(out, out / "..state", out / "current", mask=0xFFF & ~0x31) as seen:
        running = start_loader(*WATCH, "--envoy-admin", fake.url, "--listen", "127.0.0.1:0",
                               "--sync-interval", "50ms")  # fmt: skip
        api.wait_watches(1)
        time.sleep(0.5)
        running.stop()
        assert seen.events() == []
    assert disk.fingerprint(out) == before


class Failing:
    """A loader whose disk does what a plan says."""

    def __init__(self, args: list[str], out: Path, scratch: Path) -> None:
        self._plan = scratch / "plan"
        self.plan()
        crash = str(ROOT / "tests/support/crash.py")
        self.loader = Loader(args, prefix=[sys.executable, "-I", "-S", crash, str(self._plan),
                                           str(out)])  # fmt: skip

    def plan(self, at: int = -1, how: str = "", number: int = 0, times: int = 1) -> None:
        """The calls that change something are counted from now on."""
        self._plan.write_text(json.dumps(Plan(at, how, number, times, changing=True)) + "\n")

    def calls(self) -> list[str]:
        """The calls so far that change something, as `name path`."""
        rows = Path(f"{self._plan}.calls").read_text().splitlines()
        return [row.replace("\t", " ") for row in rows if Call(*row.split("\t")).changes]


@pytest.fixture
def failing(
    api: ApiServer, out: Path, tmp_path: Path, common: list[str], fake: FakeEnvoy
) -> Iterator[Failing]:
    args = [*common, "--apiserver", api.url, *WATCH, "--envoy-admin", fake.url]
    api.configmap("demo", "envoy-xds", {"rds.yaml": rds("1")})
    fake.attempts = 1
    made = Failing(args, out, tmp_path)
    yield made
    made.loader.kill()


def wait_acked(out: Path, text: str) -> None:
    wait_until(lambda: state_file(out).exists()
               and remembered(out).get("acked") == {"rds.yaml": digest(text)})  # fmt: skip


def test_acked_bytes_are_kept_before_they_are_replaced(
    failing: Failing, start_loader: StartLoader, api: ApiServer, out: Path, fake: FakeEnvoy
) -> None:
    """The loader dies right after the switch; the next one can still roll back to them."""
    wait_acked(out, rds("1"))
    api.wait_watches(1)
    failing.plan()
    start = len(failing.calls())
    api.configmap("demo", "envoy-xds", {"rds.yaml": rds("2")})
    wait_files(out, {"rds.yaml": rds("2")})
    fake.attempts += 1
    wait_acked(out, rds("2"))
    failing.plan(failing.calls()[start:].index("rename ..data"), "after")
    good = (out / "current/rds.yaml").stat().st_ino
    api.configmap("demo", "envoy-xds", {"rds.yaml": rds("3")})
    failing.loader.process.wait(10)
    assert snapshot(out) == {"rds.yaml": rds("3").encode()}
    assert (out / "..state/acked/rds.yaml").stat().st_ino == good, "a hard link"
    fake.attempts = fake.rejected = 1  # by a new Envoy, too
    running = start_loader(*WATCH, "--envoy-admin", fake.url)
    wait_files(out, {"rds.yaml": rds("2")})
    running.wait_log("ERROR Envoy NACKed rds.yaml.*rolled back")
    wait_until(lambda: os.listdir(out / "..state/acked") == [])


def test_a_disk_that_fails_while_an_ack_is_remembered_ends_nobody(
    failing: Failing, api: ApiServer, out: Path, fake: FakeEnvoy
) -> None:
    wait_acked(out, rds("1"))
    api.wait_watches(1)
    api.configmap("demo", "envoy-xds", {"rds.yaml": rds("2")})
    wait_until(lambda: remembered(out)["files"] and (out / "..state/acked/rds.yaml").exists())
    wait_files(out, {"rds.yaml": rds("2")})
    time.sleep(0.1)
    failing.plan(0, "fail", errno.ENOSPC, 1 << 30)
    fake.attempts += 1
    failing.loader.wait_log("cannot publish.*No space left", 40)
    assert failing.loader.process.poll() is None
    failing.plan()
    wait_acked(out, rds("2"))


# -- a one-time run beside a running Envoy


def test_onetime_goes_by_the_steps_where_there_is_a_snapshot(
    run_loader: RunLoader, start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "envoy-xds", {"cds.json": cds("a"), "rds.json": rds("a")})
    assert run_loader(*ONCE).returncode == 0
    api.configmap("demo", "envoy-xds", {"cds.json": cds("b"), "rds.json": rds("b")})
    began = time.monotonic()
    running = start_loader(*ONCE, "--step-delay", "200ms")
    assert running.wait() == 0
    assert time.monotonic() - began >= 0.4
    steps = [running.wait_log(f"published .*step={step}").string
             for step in ("clusters", "references", "removals")]  # fmt: skip
    assert [line for line in running.lines if " published " in line] == steps
    assert {path: text.decode() for path, text in disk.inspect(out).files.items()} == {
        "cds.json": cds("b"), "rds.json": rds("b")}  # fmt: skip


@pytest.mark.parametrize("version", [loader.__version__, "0"])
def test_onetime_leaves_out_what_envoy_nacked(
    run_loader: RunLoader, api: ApiServer, out: Path, version: str
) -> None:
    """And goes on with the rest; when the bytes change, they are tried. What another version of the
    loader wrote is ignored."""
    good, bad = rds("good"), rds("bad")
    api.configmap("demo", "envoy-xds", {"rds.yaml": good, "note": "1"})
    assert run_loader(*ONCE).returncode == 0
    state = remembered(out)
    state |= {"version": version, "acked": {"rds.yaml": digest(good)},
              "nacked": {"rds.yaml": [digest(bad), digest(bad), "rds", "no reason", []]}}
    state_file(out).write_text(json.dumps(state))
    api.configmap("demo", "envoy-xds", {"rds.yaml": bad, "note": "2"})
    done = run_loader(*ONCE)
    assert done.returncode == 0, done.stderr
    if version == "0":
        assert disk.inspect(out).files == {"rds.yaml": bad.encode(), "note": b"2"}
        return
    assert "rds.yaml: NACKed by Envoy" in done.stderr
    assert disk.inspect(out).files == {"rds.yaml": good.encode(), "note": b"2"}
    assert remembered(out)["nacked"] == state["nacked"]
    api.configmap("demo", "envoy-xds", {"rds.yaml": rds("mended"), "note": "2"})
    assert run_loader(*ONCE).returncode == 0
    assert disk.inspect(out).files["rds.yaml"] == rds("mended").encode()

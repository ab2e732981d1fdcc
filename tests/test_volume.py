"""What other containers may plant on the volume, and what a restart remembers there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import loader
from tests.conftest import RunLoader, StartLoader
from tests.support import disk
from tests.support.admin import FakeEnvoy
from tests.support.apiserver import ApiServer
from tests.support.crash import Call, Plan
from tests.support.disk import Inotify
from tests.support.loader import ROOT, snapshot, wait_files, wait_until

ONCE = ("--onetime", "--configmap", "envoy-xds")
WATCH = ("--watch", "--configmap", "envoy-xds")
SECRET = "the secret of another container"
TYPE = "type.googleapis.com/envoy.config."


def xds(kind: str, **fields: object) -> str:
    return json.dumps({"resources": [{"@type": f"{TYPE}{kind}", **fields}]})


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


PLANTED = [secret_by_link, secret_beside, linked_subdirectory, fifo, huge, deep]


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


def acked_secret(out: Path, other: Path) -> None:
    (other / "secret").write_text(SECRET)
    (out / "..state/acked").mkdir()
    (out / "..state/acked/rds.yaml").symlink_to(other / "secret")
    (out / "..state/acked/..%..%x").write_text("x")


@pytest.mark.parametrize("planted", [state_link, state_directory_link, acked_link, acked_secret])
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


def counted(acks: int, nacks: int = 0) -> str:
    """The statistics of a subscription to rds.yaml."""
    rows = {"success": acks, "rejected": nacks}
    return "".join(f"http.i.rds.r.update_{name}: {n}\n" for name, n in rows.items() if n)


@pytest.fixture
def fake() -> Iterator[FakeEnvoy]:
    with FakeEnvoy(stats="") as made:
        yield made


def test_nothing_new_from_envoy_touches_nothing_that_is_remembered(
    start_loader: StartLoader, api: ApiServer, out: Path, fake: FakeEnvoy
) -> None:
    """A loader that starts anew learns of the same ACK once more."""
    api.configmap("demo", "envoy-xds", {"rds.yaml": rds("a")})
    fake.answers["stats"] = counted(1)
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


def test_acked_bytes_are_kept_before_they_are_replaced(
    start_loader: StartLoader, api: ApiServer, out: Path, tmp_path: Path, fake: FakeEnvoy
) -> None:
    """The loader dies right after the switch; the next one can still roll back to them."""
    plan, calls = tmp_path / "plan", tmp_path / "plan.calls"
    plan.write_text(json.dumps(Plan()) + "\n")
    crash = [sys.executable, "-I", "-S", str(ROOT / "tests/support/crash.py"), str(plan), str(out)]

    def changes() -> list[Call]:
        """The calls so far that change something."""
        found = [Call(*row.split("\t")) for row in calls.read_text().splitlines()]
        return [call for call in found if call.changes]

    def acked(number: int) -> None:
        """Envoy has ACKed rds(number), after as many publications."""
        fake.answers["stats"] = counted(number)
        wanted = {"rds.yaml": digest(rds(str(number)))}
        wait_until(lambda: state_file(out).exists() and remembered(out).get("acked") == wanted)

    api.configmap("demo", "envoy-xds", {"rds.yaml": rds("1")})
    fake.answers["stats"] = counted(1)
    dying = start_loader(*WATCH, "--envoy-admin", fake.url, prefix=crash)
    acked(1)
    api.wait_watches(1)
    start = len(changes())
    api.configmap("demo", "envoy-xds", {"rds.yaml": rds("2")})
    wait_files(out, {"rds.yaml": rds("2")})
    acked(2)
    switch = changes()[start:].index(Call("rename", "..data"))
    plan.write_text(json.dumps(Plan(switch, "after", changing=True)) + "\n")
    good = (out / "current/rds.yaml").stat().st_ino
    api.configmap("demo", "envoy-xds", {"rds.yaml": rds("3")})
    dying.process.wait(10)
    assert snapshot(out) == {"rds.yaml": rds("3").encode()}
    assert (out / "..state/acked/rds.yaml").stat().st_ino == good, "a hard link"
    fake.answers["stats"] = counted(0, 1)  # by a new Envoy, too
    running = start_loader(*WATCH, "--envoy-admin", fake.url)
    wait_files(out, {"rds.yaml": rds("2")})
    running.wait_log("ERROR Envoy NACKed rds.yaml.*rolled back")
    wait_until(lambda: os.listdir(out / "..state/acked") == [])

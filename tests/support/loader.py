"""The loader as users run it: a process of its own, with nothing but the standard library."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tests.support.busy import WAIT, Deadline

ROOT = Path(__file__).resolve().parents[2]
# The loader runs on another Python than the tests where LOADER_PYTHON names one.
PYTHON = os.environ.get("LOADER_PYTHON") or sys.executable

def _compiled() -> str:
    """Byte code, as the image runs it; to compile the source takes longer than all of a start."""
    directory = tempfile.mkdtemp(prefix="loader-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    script = "import py_compile, sys; py_compile.compile(*sys.argv[1:], doraise=True)"
    source, place = str(ROOT / "loader.py"), f"{directory}/loader.pyc"
    subprocess.run([PYTHON, "-I", "-S", "-c", script, source, place, source], check=True)
    return place


# -I and -S: no site-packages, no PYTHONPATH, no current directory.
COMMAND = [PYTHON, "-I", "-S", _compiled()]

T = TypeVar("T")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a container has, not what this test runner has."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return {**kept, **(extra or {})}


def run(
    args: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    stdin: str | None = None,
    cwd: Path | None = None,
    timeout: float = 30.0,
    prefix: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """One run to its end."""
    return subprocess.run(
        [*prefix, *COMMAND, *args],
        env=environment(env),
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def wait_until(
    condition: Callable[[], T], timeout: float = WAIT, message: str = "the condition"
) -> T:
    """What `condition` gives as soon as it is true-ish; asked every 2 ms."""
    deadline = Deadline(timeout)
    while True:
        value = condition()
        if value:
            return value
        if deadline.over():
            raise TimeoutError(f"{message} did not come true within {timeout} s; last: {value!r}")
        time.sleep(0.002)


def snapshot(output_dir: Path) -> dict[str, bytes]:
    """Every file below `current/`, read as Envoy reads it: through the links."""
    current = output_dir / "current"
    found = {}
    for directory, _, names in os.walk(current):
        for name in names:
            path = Path(directory, name)
            try:
                found[str(path.relative_to(current))] = path.read_bytes()
            except FileNotFoundError:
                continue  # a link that was unlinked meanwhile
    return found


def wait_files(output_dir: Path, files: Mapping[str, str | bytes], timeout: float = WAIT) -> None:
    """Until `current/` shows exactly these files."""
    wanted = {
        name: text.encode() if isinstance(text, str) else text for name, text in files.items()
    }
    try:
        wait_until(lambda: snapshot(output_dir) == wanted, timeout)
    except TimeoutError:
        raise TimeoutError(
            f"{snapshot(output_dir)!r:.500} after {timeout} s, not {wanted!r:.500}"
        ) from None


class Loader:
    """A running loader; its log is kept and can be awaited."""

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        cwd: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self.output = b""
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [*prefix, *COMMAND, *args],
            env=environment(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._threads = [
            threading.Thread(target=self._read_log, daemon=True),
            threading.Thread(target=self._read_output, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self._lines.append(line.decode(errors="replace").rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        self.output = self.process.stdout.read()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def lines(self) -> list[str]:
        with self._changed:
            return list(self._lines)

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def count_log(self, pattern: str) -> int:
        return sum(1 for line in self.lines if re.search(pattern, line))

    def wait_log(self, pattern: str, timeout: float = WAIT, *, since: int = 0) -> re.Match[str]:
        """The first match in a line of the log (from line `since` on)."""
        found: list[re.Match[str]] = []

        def seen() -> bool:
            matches = (re.search(pattern, line) for line in self._lines[since:])
            found[:] = [match for match in matches if match][:1]
            return bool(found) or self._ended

        deadline = Deadline(timeout)
        with self._changed:
            while not self._changed.wait_for(seen, deadline.left()) and not deadline.over():
                pass
            if not found:
                ended = "the loader ended" if self._ended else f"{timeout} s"
                raise TimeoutError(f"no {pattern!r} in the log ({ended}):\n" + self._tail())
            return found[0]

    def _tail(self) -> str:
        return "\n".join(f"  {line}" for line in self._lines[-30:])

    def wait(self, timeout: float = 10.0) -> int:
        """The exit status, once it ends by itself; the log is complete then."""
        deadline = Deadline(timeout)
        while True:
            try:
                code = self.process.wait(deadline.left())
                break
            except subprocess.TimeoutExpired:
                if deadline.over():
                    late = f"still running after {timeout} s:\n{self._tail()}"
                    raise TimeoutError(late) from None
        for thread in self._threads:
            thread.join(5)
        return code

    def stop(self, number: int = signal.SIGTERM, *, within: float = 1.0) -> float:
        """Ask it to end; it must, with 0, in time. How long it took, in seconds."""
        start = time.monotonic()
        self.process.send_signal(number)
        try:
            code = self.wait(within)
        except TimeoutError:
            self.kill()
            raise
        took = time.monotonic() - start
        assert code == 0, f"exit {code}:\n{self._tail()}"
        return took

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()

    def resident(self) -> int:
        """Resident memory in bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu(self) -> float:
        """CPU time so far in seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.kill()
            error.add_note(f"the loader's log:\n{self._tail()}")
        elif self.process.poll() is None:
            self.stop(within=5.0)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

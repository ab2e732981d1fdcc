"""Filesystem calls that fail, and processes that die in them, at a place that the test chooses.

`arm` patches `os` (and `open`) in this very process. Run one loader as

    python -I -S tests/support/crash.py PLAN ROOT python -I -S LOADER ARGUMENTS...

which (a prefix to the usual command) reads its plan from the file PLAN again whenever that
changes, or many, one after the other, each in a fork of a small process, as

    python -I -S tests/support/crash.py LOADER

which takes a `Run` in each line (JSON), and answers with its status. Only calls on paths below
ROOT count. A death is SIGKILL: nothing is tidied up.
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

CHANGING = (
    "mkdir", "write", "link", "symlink", "rename", "replace", "unlink", "remove", "rmdir", "chmod",
    "fchmod", "truncate", "ftruncate", "utime", "makedirs", "mkfifo", "fsync", "open",
)  # fmt: skip
READING = ("readlink", "lstat", "stat", "fstat", "scandir", "listdir", "close")

# What the kernel can answer to which call.
ERRORS = {
    errno.ENOSPC: ("mkdir", "open", "write", "link", "symlink", "rename"),
    errno.EIO: (*CHANGING, "scandir", "listdir", "lstat", "readlink"),
    errno.EROFS: ("mkdir", "open", "link", "symlink", "rename", "unlink", "rmdir"),
    errno.EMFILE: ("open", "scandir", "listdir"),
    errno.EACCES: ("mkdir", "open", "link", "symlink", "rename", "unlink", "rmdir", "scandir"),
    errno.EEXIST: ("mkdir", "open", "link", "symlink"),
}


class Call(NamedTuple):
    """One counted call: its name, and what it is on, relative to the root."""

    name: str
    path: str

    @property
    def changes(self) -> bool:
        return self.name in CHANGING

    def can_fail_with(self, number: int) -> bool:
        if self.name == "open (read)":
            return number in (errno.EIO, errno.EMFILE, errno.EACCES)
        return self.name in ERRORS[number]


class Plan(NamedTuple):
    """What goes wrong: at the `at`-th call (from 0; -1: at none), for `times` calls.

    how: "before" and "after" (death), "halfway" (death after half of a write), "short" (half of a
    write, no error), "fail" (`number` is the errno). `changing`: only calls that change something
    count.
    """

    at: int = -1
    how: str = "fail"
    number: int = 0
    times: int = 1
    changing: bool = False


class Faults:
    """Counts the calls below `root`, and lets happen what the plan says."""

    def __init__(self, root: str, plan: Plan, seen: Callable[[Call], None]) -> None:
        self.root = os.path.realpath(root)
        self.plan = plan
        self.count = 0
        self.plan_file = ""
        self._read_at = 0
        self._seen = seen
        self._fds: dict[int, str] = {}
        self._real = {name: getattr(os, name) for name in (*CHANGING, *READING)}
        self._open = builtins.open
        self._inside = False

    def install(self) -> None:
        for name, real in self._real.items():
            setattr(os, name, self._patched(name, real))

        def patched_open(place: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            relative = self._below(place)
            if relative is None or more.get("opener"):
                return self._open(place, mode, *args, **more)
            name = "open (read)" if set(mode) <= set("rbt") else "open"
            return self._do(Call(name, relative), lambda: self._open(place, mode, *args, **more))

        builtins.open = patched_open  # type: ignore[assignment]

    def _patched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def patched(*args: Any, **more: Any) -> Any:
            if self._inside:
                return real(*args, **more)
            # A rename, link or symlink is known by the place where something new appears.
            index = 1 if name in ("rename", "replace", "link", "symlink") else 0
            relative = self._below(args[index])
            if relative is None:
                return real(*args, **more)
            label = name
            if name == "open" and args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) == 0:
                label = "open (read)"
            half = None
            if name == "write":
                half = lambda: real(args[0], bytes(args[1])[: len(args[1]) // 2])  # noqa: E731
            return self._do(Call(label, relative), lambda: real(*args, **more), half)

        return patched

    def _below(self, place: Any) -> str | None:
        if isinstance(place, int):
            return self._fds.get(place)
        if isinstance(place, os.DirEntry):
            place = place.path
        text = os.fsdecode(place)
        if text == self.root:
            return "."
        return text[len(self.root) + 1 :] if text.startswith(self.root + "/") else None

    def _do(
        self, call: Call, real: Callable[[], Any], half: Callable[[], Any] | None = None
    ) -> Any:
        self._reread()
        plan, number = self.plan, self.count
        counted = call.changes or not plan.changing
        self.count += counted
        self._seen(call)
        hit = counted and plan.at <= number < plan.at + plan.times and plan.at >= 0
        if hit and plan.how == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if hit and plan.how == "halfway":
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        if hit and plan.how == "short" and half is not None:
            return half()
        if hit and plan.how == "fail":
            if call.name == "close":
                real()
            raise OSError(plan.number, os.strerror(plan.number), f"{self.root}/{call.path}")
        self._inside = True
        try:
            result = real()
        finally:
            self._inside = False
            if hit and plan.how == "after":
                os.kill(os.getpid(), signal.SIGKILL)
        self._note_fd(call, result)
        return result

    def _note_fd(self, call: Call, result: Any) -> None:
        if call.name.startswith("open") and isinstance(result, int):
            self._fds[result] = call.path
        elif call.name == "close":
            self._fds = {fd: path for fd, path in self._fds.items() if path != call.path}

    def _reread(self) -> None:
        if not self.plan_file:
            return
        try:
            changed = self._real["stat"](self.plan_file).st_mtime_ns
        except OSError:
            return
        if changed != self._read_at:
            with self._open(self.plan_file) as stream:
                text = stream.read()
            if text.endswith("\n"):  # else it is being written
                self._read_at = changed
                self.plan = Plan(*json.loads(text))
                self.count = 0


def arm(root: str, plan: Plan, seen: Callable[[Call], None] = lambda call: None) -> Faults:
    """From now on, in this process."""
    faults = Faults(root, plan, seen)
    faults.install()
    return faults


class Run(NamedTuple):
    """One run of the loader: what goes wrong below `root`, and where log and calls are written."""

    args: list[str]
    root: str
    plan: Plan
    log: str
    calls: str


def recorder(place: str, flags: int) -> Callable[[Call], None]:
    """Writes each call into a file."""
    trace = os.open(place, os.O_WRONLY | os.O_CREAT | flags, 0o644)
    write = os.write

    def seen(call: Call) -> None:
        write(trace, f"{call.name}\t{call.path}\n".encode("utf-8", "surrogateescape"))

    return seen


def serve() -> None:
    """A fork for each line of stdin; its status, as Popen has it, on stdout."""
    import loader

    for line in sys.stdin:
        args, root, plan, log, calls = json.loads(line)
        pid = os.fork()
        if not pid:  # it never returns
            try:
                number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(number, 1)
                os.dup2(number, 2)
                arm(root, Plan(*plan), recorder(calls, os.O_TRUNC))
                os._exit(loader.main(args))
            except BaseException as error:
                os.write(2, f"Traceback of the fork: {error!r}\n".encode())
                os._exit(99)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def main(argv: list[str]) -> int:
    if len(argv) == 2:
        sys.path.insert(0, os.path.dirname(argv[1]))
        serve()
        return 0
    plan_file, root, _, _, _, module, *arguments = argv[1:]
    sys.path.insert(0, os.path.dirname(module))
    import loader

    # A retry shall not cost the test half a second.
    loader.BACKOFF_FIRST, loader.BACKOFF_LAST = 0.01, 0.05
    faults = arm(root, Plan(), recorder(f"{plan_file}.calls", os.O_APPEND))
    faults.plan_file = plan_file
    return loader.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv))

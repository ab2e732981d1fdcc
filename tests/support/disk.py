"""What the output directory promises at any time, and what Envoy's kind of watch sees of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import stat
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.busy import WAIT, Deadline
from tests.support.closing import Closing

VERSION = re.compile(r"^\.\.[0-9a-f]{8,64}(\.\d+)?$")
KNOWN = {"current", "..data", "..state"}


class Published(NamedTuple):
    """`version` is the name of the snapshot's directory, `files` what `current/` shows."""

    version: str
    files: dict[str, bytes]


def inspect(
    output_dir: Path,
    *,
    foreign: Iterable[str] = (),
    snapshots: int = 2,
    converged: bool = True,
) -> Published:
    """Assert the layout; `foreign` are files in `current/` that are not the loader's.

    With `converged` nothing may be left over: as many links as files, no temporary name, no marker
    and at most `snapshots` directories (the one served and the last but one).
    Without it, only what holds at every instant: each link resolves into the snapshot.
    """
    data = output_dir / "..data"
    assert data.is_symlink(), f"{data} is no symlink"
    target = os.readlink(data)
    assert VERSION.match(target), f"..data -> {target}"
    home = output_dir / target
    assert stat.S_ISDIR(home.lstat().st_mode), f"{home} is no directory"
    current = output_dir / "current"
    assert stat.S_ISDIR(current.lstat().st_mode), "current is no real directory"
    files = _links(output_dir, home, set(foreign))
    if converged:
        held = {str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir()}
        assert set(files) == held, f"links {sorted(files)} but files {sorted(held)}"
        names = set(os.listdir(output_dir)) - KNOWN
        odd = {name for name in names if not VERSION.match(name)}
        assert not odd, f"left over: {sorted(odd)}"
        assert len(names) <= snapshots, f"{len(names)} snapshots: {sorted(names)}"
    return Published(target, files)


def wait_converged(output_dir: Path, timeout: float = WAIT, **options: Any) -> Published:
    """`inspect`, once it holds: a publication may be under way."""
    deadline = Deadline(timeout)
    while True:
        try:
            return inspect(output_dir, **options)
        except (AssertionError, FileNotFoundError):
            if deadline.over():
                raise
            time.sleep(0.005)


def _links(output_dir: Path, home: Path, foreign: set[str]) -> dict[str, bytes]:
    current = output_dir / "current"
    files = {}
    for directory, directories, names in os.walk(current):
        depth = len(Path(directory).relative_to(current).parts)
        for name in directories:
            assert not Path(directory, name).is_symlink(), f"{directory}/{name} is a link"
        for name in names:
            path = Path(directory, name)
            relative = str(path.relative_to(current))
            if relative in foreign:
                continue
            try:
                files[relative] = _linked(path, relative, home, depth)
            except FileNotFoundError:
                if os.path.lexists(path):
                    raise
                # else listed, and taken away by a publication under way
    return files


def _linked(path: Path, relative: str, home: Path, depth: int) -> bytes:
    """What a link in `current/` shows; its target is as stated. FileNotFoundError if it went."""
    wanted = "../" * (depth + 1) + f"..data/{relative}"
    found = os.readlink(path) if path.is_symlink() or not os.path.lexists(path) else "no link"
    assert found == wanted, f"{relative} -> {found}"
    file = home / relative
    assert stat.S_ISREG(file.lstat().st_mode), f"{relative} is no regular file"
    return path.read_bytes()


def modes(output_dir: Path) -> dict[str, int]:
    """Permission bits of everything in the snapshot that is served, and of its directories."""
    home = output_dir / os.readlink(output_dir / "..data")
    found = {str(path.relative_to(home)): path.lstat().st_mode & 0o7777 for path in home.rglob("*")}
    return {".": home.lstat().st_mode & 0o7777, **found}


def fingerprint(output_dir: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, modification time and size of everything: equal means that nothing was touched."""
    found = {}
    for path in [output_dir, *output_dir.rglob("*")]:
        seen = path.lstat()
        found[str(path.relative_to(output_dir))] = (seen.st_ino, seen.st_mtime_ns, seen.st_size)
    return found


def fingerprint_at_rest(output_dir: Path, quiet: float = 0.1) -> dict[str, tuple[int, int, int]]:
    """The same, once nothing changed for a moment: what is remembered in `..state` follows the
    files."""
    deadline = Deadline(WAIT)
    while True:
        with contextlib.suppress(FileNotFoundError):  # a temporary name
            before = fingerprint(output_dir)
            time.sleep(quiet)
            if fingerprint(output_dir) == before or deadline.over():
                return before


_libc = ctypes.CDLL(None, use_errno=True)
IN_MODIFY, IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_MOVED_FROM = 0x2, 0x80, 0x100, 0x200, 0x40


class Inotify(Closing):
    """An inotify watch on directories, with Envoy's mask by default. Costs one instance."""

    def __init__(self, *directories: Path, mask: int = IN_MODIFY | IN_MOVED_TO) -> None:
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._fd >= 0, os.strerror(ctypes.get_errno())
        self._names: dict[int, Path] = {}
        for directory in directories:
            number = _libc.inotify_add_watch(self._fd, os.fsencode(directory), mask)
            assert number >= 0, f"{directory}: {os.strerror(ctypes.get_errno())}"
            self._names[number] = directory

    def events(self, timeout: float = 0.0) -> list[tuple[int, Path]]:
        """(mask, path) of what happened since the last call; waits for a first one."""
        found: list[tuple[int, Path]] = []
        while select.select([self._fd], [], [], 0.0 if found else timeout)[0]:
            content, offset = os.read(self._fd, 65536), 0
            while offset < len(content):
                number, mask, _, length = struct.unpack_from("iIII", content, offset)
                name = content[offset + 16 : offset + 16 + length].rstrip(b"\0")
                found.append((mask, self._names[number] / os.fsdecode(name)))
                offset += 16 + length
        return found

    def moved(self, timeout: float = 0.0) -> list[str]:
        """The names of files that were moved in."""
        return [path.name for mask, path in self.events(timeout) if mask & IN_MOVED_TO]

    def close(self) -> None:
        os.close(self._fd)


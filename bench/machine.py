"""The machine: its noise, and what processes use of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.disk import IN_MOVED_TO, Inotify
from tests.support.loader import environment


class Noise(NamedTuple):
    """A fixed piece of work, and a sleep of 1 ms: what they took, in ms."""

    work: float
    work_p99: float
    late: float
    late_p99: float
    load: float

    def __str__(self) -> str:
        return (
            f"fixed work {self.work:.2f} ms (p99 {self.work_p99:.2f}), a sleep of 1 ms ends "
            f"{self.late:.2f} ms late (p99 {self.late_p99:.2f}), load average {self.load:.2f}"
        )


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def work() -> str:
    """About 2 ms of what the loader does: bytes, dictionaries, hashes."""
    table: dict[str, str] = {}
    for number in range(1500):
        table[f"key-{number}"] = hashlib.sha256(b"%d" % number).hexdigest()
    return "".join(sorted(table.values()))


def noise(rounds: int = 150) -> Noise:
    worked, late = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        done = time.perf_counter()
        time.sleep(0.001)
        worked.append((done - began) * 1e3)
        late.append((time.perf_counter() - done) * 1e3 - 1.0)
    return Noise(
        statistics.median(worked),
        quantile(worked, 0.99),
        statistics.median(late),
        quantile(late, 0.99),
        os.getloadavg()[0],
    )


def describe() -> str:
    model, total = "unknown processor", 0
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal"):
            total = int(line.split()[1]) >> 20
    system = os.uname()
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores ({model}), {total} GB, {system.sysname} {system.release}"


# ---------------------------------------------------------------------------------------------
# Processes


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{one}/task"):
                children = Path(f"/proc/{one}/task/{task}/children").read_text()
                found += map(int, children.split())
    return found


def cpu(pids: Iterable[int]) -> float:
    """CPU time so far in ms, of all threads that live."""
    spent = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                spent += _on_cpu(pid, task)
    return spent / 1e6


def _on_cpu(pid: int, task: str) -> int:
    """Nanoseconds on a CPU; where the kernel does not count them, the clock ticks."""
    try:
        return int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    except FileNotFoundError:
        fields = Path(f"/proc/{pid}/task/{task}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def memory(pids: Iterable[int], field: str = "VmRSS") -> float:
    """Resident memory in MB; `VmHWM` is its peak."""
    kilobytes = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                kilobytes += int(line.split()[1])
    return kilobytes / 1024


def shared_memory(pid: int) -> float:
    """Proportional set size in MB: pages that several processes share count in parts."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


# ---------------------------------------------------------------------------------------------
# Runs to the end


class Ran(NamedTuple):
    """One run: wall clock to the first move into a directory and to the exit, CPU; seconds."""

    first_move: float
    seconds: float
    cpu: float


def run(command: Sequence[str], directory: Path) -> Ran:
    """Run to the end, with an eye on the files that are moved into `directory`."""
    with Inotify(directory, mask=IN_MOVED_TO) as inotify:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        with subprocess.Popen(
            command,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as process:
            moved = 0.0
            while process.poll() is None and not moved:
                if inotify.moved(0.001):
                    moved = time.monotonic() - began
            assert process.stderr is not None
            log = process.stderr.read().decode(errors="replace")
            code = process.wait()
        seconds = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        raise RuntimeError(f"exit {code}: {' '.join(command)}\n{log}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ran(moved or seconds, seconds, cpu)

"""Whether others want this machine's processors too, and what a test does about it.

A bound on time is for a quiet machine. Where the machine is busy, waiting goes on for longer, and
what can only be measured on a quiet one is skipped, with a reason that the summary counts.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

REASON = "the machine is busy"
MORE = 5.0  # times as long


def busy() -> str:
    """How busy it is, in words; empty on a quiet one."""
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    waiting = _pressure()
    if waiting > 10.0 or load > cores:
        return f"load average {load:.1f} on {cores} cores, {waiting:.0f} % of the time some wait"
    return ""


def _pressure() -> float:
    """The share of the last ten seconds in which some task waited for a processor, in percent."""
    try:
        text = Path("/proc/pressure/cpu").read_text()
    except OSError:  # a kernel without it
        return 0.0
    return float(text.partition("avg10=")[2].split()[0])


class Deadline:
    """Over after so many seconds; on a busy machine after `MORE` times as many."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._last = time.monotonic() + seconds * MORE

    def left(self) -> float:
        """Seconds, for something that waits by itself until it asks again."""
        return max(0.0, self._end - time.monotonic())

    def over(self) -> bool:
        now = time.monotonic()
        if now >= self._end and now < self._last and busy():
            self._end = min(now + 0.5, self._last)
        return now >= self._end


def skip_if_busy(what: str) -> None:
    """Skip a test whose measurement does not count; on a quiet machine return: let it fail."""
    import pytest  # the demo does without it

    if found := busy():
        pytest.skip(f"{REASON} ({found}): {what}")

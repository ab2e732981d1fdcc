"""Whether others want this machine's processors too, and what a test does about it.

What must come is waited for with patience. A bound on time is for a quiet machine: where it is
broken on a busy one the test is skipped, with a reason that the summary counts.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

REASON = "the machine is busy"
MORE, MOST = 5.0, 60.0  # times as long, and as many seconds at the most
WAIT = 30.0  # seconds for what must come, and comes in milliseconds


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
    """Over after so many seconds; on a busy machine after `MORE` times as many, or `MOST`."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._last = time.monotonic() + max(seconds, min(seconds * MORE, MOST))

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


def in_time(took: float, seconds: float, what: object = "it") -> None:
    """Assert that something took less than so many seconds."""
    if took >= seconds:
        skip_if_busy(f"{what} took {took:.3f} s")
        raise AssertionError(f"{what} took {took:.3f} s, not less than {seconds}")


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """What happens here takes less."""
    began = time.monotonic()
    yield
    in_time(time.monotonic() - began, seconds)

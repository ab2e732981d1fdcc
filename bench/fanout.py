"""Fifty sidecars on one API server, and what each costs it: requests and bytes on the wire."""

from __future__ import annotations

import contextlib
import itertools
import socket
import statistics
import struct
import time
from collections.abc import Sequence
from typing import NamedTuple

from bench import machine
from bench.stage import FLOOR, LOADER, Row, Running, Stage, is_about, named, number, spread

NAME = "bench-fan-out"
SIDECARS = 10_000  # of the projection
BOOKMARK_SECONDS = 60.0  # of a real API server


class Cost(NamedTuple):
    """Of one sidecar on the API server, by TCP's own count: bytes with TLS, both ways."""

    start: float  # handshake, list, watch opened
    bookmark: float
    event: float  # 4 KiB
    renewal: float
    renewal_requests: float
    watch_seconds: float  # what a watch asks for, on average


def measure(stage: Stage, quick: bool) -> list[Row]:
    count, changes = (10, 4) if quick else (50, 20)
    rows: dict[str, dict[str, str]] = {}
    cost = None
    for kind in (LOADER, FLOOR):
        with contextlib.ExitStack() as stack:
            runs = start(stage, stack, kind, count)
            began = traffic(stage)
            latency, cpu = storm(stage, runs, changes)
            rows.setdefault("one change -> the last file, p50 / p99", {})[kind] = str(latency)
            rows.setdefault("CPU a change and sidecar", {})[kind] = f"{number(cpu)} ms"
            resident = statistics.median(run.memory() for run in runs)
            shared = statistics.median(machine.shared_memory(run.process.pid) for run in runs)
            text = f"{number(resident)} MB, {number(shared)} MB"
            rows.setdefault("resident, proportional share (pages in common)", {})[kind] = text
            if kind == LOADER:
                cost = wire(stage, count, began)
    assert cost is not None
    title = f"{count} sidecars on one API server: "
    return [
        *(Row(title + words, values) for words, values in rows.items()),
        *projection(cost),
    ]


def start(stage: Stage, stack: contextlib.ExitStack, kind: str, count: int) -> list[Running]:
    first = stage.change(NAME)
    runs = []
    for _ in range(count):
        runs.append(stack.enter_context(stage.running(kind, named(NAME))))
        if len(runs) % 5 == 0:
            runs[-1].eye.wait(first, timeout=60)
    for run in runs:
        if run.eye.number() != first:
            run.eye.wait(first, timeout=60)
    time.sleep(1.0)
    return runs


def storm(stage: Stage, runs: Sequence[Running], changes: int) -> tuple[object, float]:
    values = []
    before = sum(run.cpu() for run in runs)
    for _ in range(changes):
        wanted = stage.change(NAME)
        changed = time.monotonic()
        values.append((max(run.eye.wait(wanted) for run in runs) - changed) * 1e3)
        time.sleep(0.3)
    spent = sum(run.cpu() for run in runs) - before
    return spread(values), spent / changes / len(runs)


# ---------------------------------------------------------------------------------------------
# Bytes


def wire(stage: Stage, count: int, began: int) -> Cost:
    """What the connections of `count` loaders carry: they are the only clients now.

    `began` is what they had carried once all were started.
    """
    api = stage.api
    about = is_about(named(NAME))
    carried = [settled(stage)]
    api.bookmark()
    carried.append(settled(stage))
    stage.change(NAME)
    carried.append(settled(stage))
    since = len(api.requests)
    api.close_watches(clean=True)
    carried.append(settled(stage))
    api.wait_watches(count, timeout=30)
    requests = len(list(filter(about, api.requests[since:])))
    watches = [r for r in api.requests.matching(about) if "timeoutSeconds" in r.query]
    bookmark, event, renewal = (b - a for a, b in itertools.pairwise(carried))
    return Cost(
        began / count,
        bookmark / count,
        event / count,
        renewal / count,
        requests / count,
        statistics.mean(float(request.query["timeoutSeconds"]) for request in watches),
    )


def settled(stage: Stage) -> int:
    """The traffic once nothing moves for half a second."""
    before = -1
    while (now := traffic(stage)) != before:
        before = now
        time.sleep(0.5)
    return now


def traffic(stage: Stage) -> int:
    """Bytes both ways on all open connections (TCP_INFO: acknowledged and received)."""
    total = 0
    for connection in list(stage.api._connections.values()):
        with contextlib.suppress(OSError):
            info = connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 144)
            total += sum(struct.unpack_from("=QQ", info, 120))
    return total


def projection(cost: Cost) -> list[Row]:
    """10,000 sidecars, each with one ConfigMap: what the API server has of them."""
    bookmarks = SIDECARS / BOOKMARK_SECONDS
    renewals = SIDECARS / cost.watch_seconds
    steady = bookmarks * cost.bookmark + renewals * cost.renewal
    texts = {
        "one sidecar on the wire: start, bookmark, 4 KiB event, renewal": (
            f"{cost.start:,.0f} / {cost.bookmark:,.0f} / {cost.event:,.0f} / "
            f"{cost.renewal:,.0f} bytes ({cost.renewal_requests:.1f} requests)"
        ),
        f"projection, {SIDECARS:,} sidecars: steady": (
            f"{SIDECARS:,} watches, {bookmarks:.0f} bookmarks/s, {renewals:.0f} requests/s, "
            f"{steady / 1e6:.2f} MB/s"
        ),
        "the same: one change of 4 KiB": f"{SIDECARS * cost.event / 1e6:.0f} MB at once",
        "the same: all start anew": (
            f"{2 * SIDECARS:,} requests, {SIDECARS * cost.start / 1e6:.0f} MB"
        ),
    }
    return [Row(words, {LOADER: text}) for words, text in texts.items()]

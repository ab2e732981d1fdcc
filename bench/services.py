"""Services: what rendering costs against their number, for each way of giving endpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from bench import machine
from bench.stage import LOADER, Row, Running, Stage, number
from tests.support.apiserver import Request

WAYS = {
    "eds": ["--endpoints", "eds"],
    "inline": ["--endpoints", "inline"],
    "inline, json": ["--endpoints", "inline", "--format", "json"],
}
ENDPOINTS = 10


def measure(stage: Stage, quick: bool) -> list[Row]:
    """A namespace for each size; each way in turn on it."""
    rows = []
    config = stage.root / "config.json"
    config.write_text(json.dumps({"endpoint": {"eds_budget": 100_000}}))
    for count in (100, 1000) if quick else (100, 1000, 5000):
        namespace = f"services-{count}"
        populate(stage, namespace, count)
        for way, options in WAYS.items():
            args = [
                *("--watch", "--services", "*", "--services-namespace", namespace),
                *("--config", str(config), "--output-dir", "{dir}", *options),
            ]
            with stage.running(LOADER, "", stage.loader_command(*args)) as run:
                text = rendering(stage, run, namespace, way, 4 if quick else 10)
            title = f"{count:,} Services x {ENDPOINTS}, {way}: first snapshot, one change, memory"
            aim = "1 s, 20 ms, 128 MB" if (count, way) == (1000, "eds") else ""
            rows.append(Row(title, {LOADER: text}, aim))
        for index in range(count):
            stage.api.delete("Service", namespace, f"svc-{index:04}")
            stage.api.delete("EndpointSlice", namespace, f"svc-{index:04}")
        stage.api.compact()
    return rows


def populate(stage: Stage, namespace: str, count: int) -> None:
    port = {"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}
    for index in range(count):
        stage.api.service(namespace, f"svc-{index:04}", [port], {"app": f"app-{index}"})
        endpoints(stage, namespace, index, 0)


def endpoints(stage: Stage, namespace: str, index: int, change: int) -> None:
    """The slice of a Service as a real one looks: Pod, Node and zone of each endpoint."""
    found = [
        {
            "addresses": [f"10.{index >> 8}.{index & 255}.{ENDPOINTS * (change % 20) + each + 1}"],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": f"node-{each}",
            "zone": f"zone-{each % 3}",
            "targetRef": {
                "kind": "Pod",
                "namespace": namespace,
                "name": f"app-{index}-5d4f8c7b6-{each:05}",
                "uid": f"00000000-0000-4000-8000-{index:06}{each:06}",
            },
        }
        for each in range(ENDPOINTS)
    ]
    ports = [{"name": "http", "port": 8080, "protocol": "TCP"}]
    stage.api.endpointslice(namespace, f"svc-{index:04}", f"svc-{index:04}", found, ports)


def rendering(stage: Stage, run: Running, namespace: str, way: str, changes: int) -> str:
    """The first snapshot (from exec, and from when all objects were there), changes, memory."""
    since = len(stage.api.requests)
    published = run.wait_log("published", timeout=120)
    opened = [request.time for request in watches(stage, since)]
    there = max(opened, default=published)  # a watch begins as soon as its list is there
    # The first change of a directory: the eye is on `current`, EDS files are in `current/eds`.
    key = "cds.json" if "json" in way else "cds.yaml"
    if way == "eds":
        key = f"{namespace}_svc-0007_http.yaml"
        run.eye.close()
        run.eye = type(run.eye)(run.place / "current" / "eds")
    time.sleep(0.5)
    run.eye.drain()
    values, before = [], run.cpu()
    for change in range(1, changes + 1):
        endpoints(stage, namespace, 7, change)
        changed = time.monotonic()
        values.append((run.eye.wait_moved(key) - changed) * 1e3)
        time.sleep(0.35)
    spent = (run.cpu() - before) / changes
    return (
        f"{number(published - run.began)} s from exec, {number(published - there)} s from the "
        f"lists; {quick_spread(values)}, CPU {number(spent)} ms; {number(run.memory())} MB "
        f"(peak {number(run.memory('VmHWM'))})"
    )


def quick_spread(values: Sequence[float]) -> str:
    return f"{number(machine.quantile(values, 0.5))} ms (best {number(min(values))})"


def watches(stage: Stage, since: int) -> list[Request]:
    return [request for request in stage.api.requests[since:] if request.is_watch]

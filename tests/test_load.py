"""Many events, many objects: few publications, the last state soon, no growth, one connection.

Bounds are several times what was measured (docs/reliability.md has the figures), because tests run
beside each other. The long runs are in tests/soak.py.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

import loader
from tests.conftest import StartLoader
from tests.support import disk
from tests.support.apiserver import ApiServer
from tests.support.busy import in_time
from tests.support.loader import Loader, wait_until

PORTS = [{"name": "http", "port": 80, "protocol": "TCP"}]


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def published(running: Loader) -> int:
    return running.count_log(r" INFO published ")


def snapshots(out: Path) -> int:
    return sum(1 for name in os.listdir(out) if disk.VERSION.match(name))


@pytest.mark.parametrize("maps", [1, 50])
def test_a_thousand_events_in_a_second_are_a_handful_of_publications(
    start_loader: StartLoader, api: ApiServer, out: Path, maps: int
) -> None:
    """The first is published at once, the burst is gathered, the last is there soon after."""

    def put(number: int) -> None:
        name = f"map{number % maps}"
        api.configmap("demo", name, {f"file{number % maps}": str(number)}, labels={"app": "x"})

    for number in range(maps):
        put(number)
    running = start_loader("--watch", "--configmap-selector", "app=x")
    wait_until(lambda: read(out / f"current/file{maps - 1}") == str(maps - 1))
    api.wait_watches(1)
    before = published(running)
    began = time.monotonic()
    for number in range(1_000):
        put(number)
        time.sleep(max(0.0, began + number / 1_000 - time.monotonic()))
    ended = time.monotonic()
    last = out / f"current/file{999 % maps}"
    wait_until(lambda: read(last) == "999")
    late = time.monotonic() - ended
    wait_until(lambda: len({read(out / f"current/file{n}") for n in range(maps)}) == maps)
    assert sorted(int(read(out / f"current/file{n}")) for n in range(maps)) == list(
        range(1_000 - maps, 1_000)
    )
    count = published(running) - before
    print(f"1,000 events in {ended - began:.2f} s: {count} publications, last {late * 1e3:.0f} ms")
    assert count <= 60 * max(1.0, ended - began)
    in_time(late, 0.5)


def test_the_first_event_of_a_quiet_time_is_published_at_once(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    """Debounce is for bursts: a change in quiet times never waits for others."""
    api.configmap("demo", "envoy-xds", {"k": "0"})
    start_loader("--watch", "--configmap", "envoy-xds")
    wait_until(lambda: read(out / "current/k") == "0")
    api.wait_watches(1)
    took = []
    for number in range(1, 21):
        time.sleep(0.03)
        began = time.monotonic()
        api.configmap("demo", "envoy-xds", {"k": str(number)})
        wait_until(lambda: read(out / "current/k") == str(number))  # noqa: B023
        took.append(time.monotonic() - began)
    print(f"change to file: median {sorted(took)[10] * 1e3:.1f} ms")
    in_time(sorted(took)[10], loader.DEBOUNCE_GATHER / 2, "a change that nobody gathered")


def test_a_configmap_rewritten_without_a_pause_starves_nobody(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    """5 s: its changes go on appearing, so do those of others, and nothing grows."""
    api.configmap("demo", "busy", {"busy": "0" + " " * 4096})
    api.configmap("demo", "calm", {"calm": "0"})
    running = start_loader("--watch", "--configmap", "busy", "--configmap", "calm")
    wait_until(lambda: read(out / "current/calm") == "0")
    api.wait_watches(2)
    number, seen, calm, lags = 0, set(), 0, []
    resident: list[int] = []
    files: list[int] = []
    began = time.monotonic()
    while time.monotonic() < began + 5 or number < 3_000:
        number += 1
        api.configmap("demo", "busy", {"busy": f"{number}" + " " * 4096})
        if number % 50 == 0:
            shown = int(read(out / "current/busy").strip() or 0)
            seen.add(shown)
            lags.append(number - shown)
            assert snapshots(out) <= 4  # one is made, one is about to go
        if number % 500 == 0:
            calm += 1
            api.configmap("demo", "calm", {"calm": str(calm)})
            if calm > 2:
                assert int(read(out / "current/calm")) > 0
        if number % 200 == 0:
            resident.append(running.resident())
            files.append(running.open_files())
        time.sleep(0.0005)
    rate = number / (time.monotonic() - began)
    wait_until(lambda: read(out / "current/busy").strip() == str(number))
    wait_until(lambda: read(out / "current/calm") == str(calm))
    print(f"{rate:.0f} rewrites/s: {published(running)} publications, {len(seen)} states sampled, "
          f"{max(resident) / 2**20:.1f} MB at most")  # fmt: skip
    assert len(seen) >= 20, "the file went on changing"
    third = len(resident) // 3
    assert max(resident[-third:]) - max(resident[third : 2 * third]) < 2 << 20
    assert max(files) - min(files) <= 2
    disk.wait_converged(out)


def test_a_thousand_configmaps_by_selector_are_one_connection(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    for number in range(1_000):
        api.configmap("demo", f"m{number}", {f"f{number:03}": "x" * 200}, labels={"app": "x"})
    began = time.monotonic()
    running = start_loader("--watch", "--configmap-selector", "app=x")
    wait_until(lambda: read(out / "current/f999") != "", 20)
    first = time.monotonic() - began
    api.wait_watches(1)
    assert api.connections_total == 1
    assert len(os.listdir(out / "current")) == 1_000
    took = []
    for number in range(10):
        began = time.monotonic()
        api.configmap("demo", f"m{number}", {f"f{number:03}": "changed"}, labels={"app": "x"})
        wait_until(lambda: read(out / f"current/f{number:03}") == "changed")  # noqa: B023
        took.append(time.monotonic() - began)
        time.sleep(0.05)
    print(f"1,000 ConfigMaps: first after {first:.2f} s, a change in {sorted(took)[5] * 1e3:.0f} "
          f"ms, {running.resident() / 2**20:.1f} MB")  # fmt: skip
    lists = [request for request in api.requests if request.is_list]
    assert len(lists) == 2, "1,000 objects are two pages of 500"
    assert api.connections_total == 1
    assert running.resident() < 60 << 20
    in_time(sorted(took)[5], 0.5)
    for number in range(0, 1_000, 2):
        api.delete("ConfigMap", "demo", f"m{number}")
    wait_until(lambda: len(os.listdir(out / "current")) == 500, 10)
    disk.wait_converged(out)


def roll(api: ApiServer, service: int, generation: int) -> list[str]:
    second = generation + 100 * (service // 250)  # no address is that of two Services
    addresses = [f"10.{second}.{service % 250}.{n + 1}" for n in range(10)]
    api.endpointslice("demo", f"s{service}-abc", f"s{service}", addresses,
                      [{"name": "http", "port": 8080, "protocol": "TCP"}])  # fmt: skip
    return addresses


def test_services_that_roll_all_at_once(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    """500 Services of 10 endpoints, every one replaced five times, as fast as it goes."""
    services = 500
    for number in range(services):
        api.service("demo", f"s{number}", PORTS)
        roll(api, number, 0)
    running = start_loader("--watch", "--services", "*", "--endpoints", "inline",
                           "--format", "json")  # fmt: skip
    wait_until(lambda: read(out / "current/cds.json").count('"name"') >= services, 20)
    before = published(running)
    began = time.monotonic()
    for generation in range(1, 6):
        for number in range(services):
            wanted = roll(api, number, generation)
    ended = time.monotonic()
    wait_until(lambda: wanted[-1] in read(out / "current/cds.json"), 20)
    late = time.monotonic() - ended
    text = json.dumps(json.loads(read(out / "current/cds.json")))
    assert set(re.findall(r"10\.(\d+)\.\d+\.\d+", text)) == {"5", "105"}
    count = published(running) - before
    print(f"{services * 5} slices in {ended - began:.1f} s: {count} publications, last after "
          f"{late:.2f} s, {running.resident() / 2**20:.0f} MB")  # fmt: skip
    assert count <= 10 * (ended - began + late) + 10
    in_time(late, 10)
    assert running.resident() < 128 << 20

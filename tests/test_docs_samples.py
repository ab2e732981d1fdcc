"""The samples of docs/metrics.md and docs/on-disk.md: what a real loader shows and makes.

Compared word for word (JSON value for value), but for times and durations.
"""

from __future__ import annotations

import http.client
import json
import os
import re
from pathlib import Path

import pytest

from tests.conftest import NAMESPACE, RunLoader, StartLoader
from tests.support.apiserver import ApiServer
from tests.support.docs import block_for
from tests.support.loader import wait_until
from tests.support.ports import held_port

METRICS, DISK = "docs/metrics.md", "docs/on-disk.md"
SOURCES = ["--configmap=envoy-xds", "--configmap=flags:runtime"]
FILES = {"cds.yaml": "resources: []\n", "rds.yaml": "resources: []\n"}


def steady(text: str) -> str:
    """A text without what differs from run to run."""
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "TIME", text)
    return re.sub(r"((?:duration|confirmed)_ms\"?[=:] ?)[\d.]+", r"\1MS", text)


def ask(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def test_the_pages_of_listen(api: ApiServer, start_loader: StartLoader) -> None:
    def sample(name: str) -> str:
        return block_for(METRICS, "test_the_pages_of_listen", name)

    port = held_port()
    api.configmap(NAMESPACE, "envoy-xds", FILES)
    start_loader("--watch", *SOURCES, f"--listen=127.0.0.1:{port}")
    api.wait_watches(2)
    wait_until(lambda: ask(port, "/readyz") == sample("missing"))
    assert ask(port, "/healthz") == sample("healthz")
    api.configmap(NAMESPACE, "flags", {"canary": "0"})
    wait_until(lambda: ask(port, "/readyz") == sample("ready"))
    snapshot = steady(ask(port, "/snapshot"))
    assert json.loads(snapshot) == json.loads(steady(sample("snapshot")))
    assert snapshot == f"{json.dumps(json.loads(snapshot), indent=1)}\n", "the page has fewer lines"
    served = ask(port, "/metrics").splitlines()
    shown = sample("metrics").splitlines()
    assert [line for line in served if line in shown] == shown
    api.stop()
    wait_until(lambda: ask(port, "/readyz") == sample("stale"))


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_line_of_a_publication(form: str, api: ApiServer, run_loader: RunLoader) -> None:
    api.configmap(NAMESPACE, "envoy-xds", FILES)
    api.configmap(NAMESPACE, "flags", {"canary": "0"})
    done = run_loader("--onetime", *SOURCES, f"--log-format={form}")
    assert done.returncode == 0
    expected = block_for(METRICS, "test_the_line_of_a_publication", form)
    assert steady(done.stderr) == steady(expected)


def tree(directory: Path, indent: str = "") -> list[str]:
    """The directory as the page draws it: directories with a slash, links with their targets."""
    lines = []
    for name in sorted(os.listdir(directory)):
        place = directory / name
        if place.is_symlink():
            lines.append(f"{indent}{name} -> {os.readlink(place)}")
        elif place.is_dir():
            lines += [f"{indent}{name}/", *tree(place, f"{indent}  ")]
        else:
            lines.append(f"{indent}{name}")
    return lines


def drawn() -> list[str]:
    """The lines of the page's tree, without its comments."""
    text = block_for(DISK, "test_the_tree_is_that_of_a_run")
    lines = [re.sub(r"  +# .*", "", line).rstrip() for line in text.splitlines()]
    assert lines[0] == "/srv/runtime/"
    return [line.removeprefix("  ") for line in lines[1:]]


def test_the_tree_is_that_of_a_run(api: ApiServer, start_loader: StartLoader, out: Path) -> None:
    api.configmap(NAMESPACE, "envoy-xds", FILES)
    api.configmap(NAMESPACE, "flags", {"canary": "0"})
    loader = start_loader("--watch", *SOURCES)
    loader.wait_log("published")
    new, old = drawn()[0].rstrip("/"), drawn()[5].rstrip("/")
    first = [line.replace(new, old) for line in drawn()[5:]]  # without the new snapshot
    wait_until(lambda: (out / "current").is_dir() and tree(out) == first)
    unchanged = os.stat(out / "current" / "cds.yaml").st_ino
    api.configmap(NAMESPACE, "envoy-xds", {**FILES, "rds.yaml": "resources: []  # changed\n"})
    wait_until(lambda: tree(out) == drawn())
    assert os.stat(out / "current" / "cds.yaml").st_ino == unchanged
    loader.stop()

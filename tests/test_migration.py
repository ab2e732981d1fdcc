"""docs/migration.md, line by line: the Go tool's manifests with another image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.apiserver import ApiServer
from tests.support.loader import ROOT, Loader, run, snapshot, wait_until
from tests.support.manifests import VERSIONS, render, validate
from tests.support.tls import Authority

PAGE = (ROOT / "docs" / "migration.md").read_text()
FILES = {"rds.yaml": "version_info: '0'\nresources: []\n", "cds.yaml": "resources: []\n"}


@pytest.fixture
def server(authority: Authority) -> Iterator[ApiServer]:
    """The Go tool's chart turns verification off, and grants more than is asked for."""
    with ApiServer(tokens=["t"], tls=authority.server_context("kubernetes.default")) as api:
        api.configmap("demo", "edge-xds", FILES)
        yield api


def shared(api: ApiServer, tmp_path: Path) -> list[str]:
    token = tmp_path / "token"
    token.write_text("t\n")
    return ["--token-file", str(token), f"--output-dir={tmp_path}", f"--apiserver={api.url}"]


def test_the_go_charts_arguments_work_as_they_are(server: ApiServer, tmp_path: Path) -> None:
    chart = ["--configmap=edge-xds", "--trafficsplit-api-version=v1alpha2"]
    args = [*shared(server, tmp_path), *chart, "--insecure"]
    done = run([*args, "--onetime"], {"POD_NAMESPACE": "demo"})
    assert done.returncode == 0, done.stderr
    assert "trafficsplit-api-version" in done.stderr
    assert {k: v.decode() for k, v in snapshot(tmp_path).items()} == FILES
    sidecar = [*args, "--sync-interval=30s", "--watch"]
    with Loader(sidecar, {"POD_NAMESPACE": "demo"}) as loader:
        server.wait_watches(1)
        server.configmap("demo", "edge-xds", {**FILES, "rds.yaml": "resources: [] # new\n"})
        wait_until(lambda: snapshot(tmp_path)["rds.yaml"] == b"resources: [] # new\n")
        server.configmap("demo", "edge-xds", {"rds.yaml": "resources: []\n"})
        wait_until(lambda: list(snapshot(tmp_path)) == ["rds.yaml"])  # a deleted key
        loader.stop()


def test_what_the_page_sets_to_null() -> None:
    """Each of its remedies against a default."""
    (words,) = re.findall(r"what you do not want: (.*?)\.\n\n", PAGE, re.DOTALL)
    texts = [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", words)]
    values: dict[str, object] = {}
    for text in texts:
        path, _, value = text.partition(": ")
        *outer, last = path.split(".")
        where = values
        for key in outer:
            where = where.setdefault(key, {})  # type: ignore[assignment]
        where[last] = yaml.safe_load(value)
    release = render(values)
    envoy = next(c for c in release.pod["containers"] if c["name"] == "envoy")
    assert "limits" not in envoy["resources"]
    assert "fixed_heap" not in release.one("ConfigMap", "-bootstrap")["data"]["envoy.yaml"]
    assert "topologySpreadConstraints" not in release.pod
    assert release.all("PodDisruptionBudget") == []


def test_names_are_those_of_the_table() -> None:
    assert "Service and service account have the release's name" in PAGE
    release = render(name="front")
    assert release.one("Service")["metadata"]["name"] == "front"
    assert release.one("ServiceAccount")["metadata"]["name"] == "front"


def test_every_option_that_the_page_names_exists() -> None:
    shown = set(re.findall(r"--[a-z][\w-]+", run(["--help"]).stdout))
    gone = {"--smi", "--trafficsplit", "--trafficsplit-api-version", "--set", "--overwrite"}
    named = set(re.findall(r"`(--[a-z][\w-]+)", PAGE))
    assert named - gone <= shown
    assert shown - named <= {"--help", "--services-namespace"}


def test_the_pages_yaml_is_valid() -> None:
    security = (ROOT / "docs" / "security.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", security + PAGE, re.DOTALL)
    role, values = map(yaml.safe_load, blocks)
    for version in VERSIONS:
        validate(role, version)
    release = render(values)
    service = release.one("Service", "envoy")
    assert [port["name"] for port in service["spec"]["ports"]] == ["n0"], "the default is removed"
    envoy = next(c for c in release.pod["containers"] if c["name"] == "envoy")
    assert [port["name"] for port in envoy["ports"]] == ["n0", "ready"]
    (routes,) = yaml.safe_load(release.one("ConfigMap", "-xds")["data"]["rds.yaml"])["resources"]
    (host,) = routes["virtual_hosts"]
    clusters = host["routes"][0]["route"]["weighted_clusters"]["clusters"]
    assert {cluster["name"]: cluster["weight"] for cluster in clusters} == {
        "eerie-octopus-podinfo": 50,
        "bold-olm-podinfo": 50,
    }

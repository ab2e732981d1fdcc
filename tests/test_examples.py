"""The examples: what their READMEs say runs and holds, and what users copy from them is valid."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import loader
from example.support.cluster import kustomized
from tests.support.loader import ROOT, wait_until
from tests.support.manifests import Object, containers, restricted, validate

EXAMPLES = sorted((ROOT / "example").glob("*/verify"), key=lambda path: path.parent.name)
THE_GO_TOOLS = ("before.yaml", "after.yaml")  # its manifests, the second with another image
NAMES = [path.parent.name for path in EXAMPLES]
KUSTOMIZATIONS = [
    found for path in EXAMPLES for found in sorted(path.parent.glob("**/kustomization.yaml"))
]


def manifests(folder: Path) -> list[tuple[Path, Object]]:
    """The objects of a folder as they reach the cluster: built, or from files of their own."""
    found: list[tuple[Path, Object]] = []
    used: set[Path] = set()
    for path in sorted(folder.glob("**/kustomization.yaml")):
        found += [(path, obj) for obj in kustomized(path.parent, "demo")]
        asked = yaml.safe_load(path.read_text())
        patches = [patch["path"] for patch in asked.get("patches", [])]
        used |= {path, *(path.parent / name for name in [*asked["resources"], *patches])}
    for path in sorted(set(folder.glob("**/*.yaml")) - used):
        objects = yaml.safe_load_all(path.read_text())
        found += [(path, obj) for obj in objects if {"kind", "apiVersion"} <= set(obj or ())]
    return found


class Plays:
    """Plays of examples, each a process."""

    def __init__(self) -> None:
        self._started: dict[Path, subprocess.Popen[str]] = {}

    def start(self, verify: Path) -> subprocess.Popen[str]:
        if verify not in self._started:
            env = {**os.environ, "PYTHON": sys.executable,
                   "PYTHONWARNINGS": "error::ResourceWarning"}  # fmt: skip
            self._started[verify] = subprocess.Popen(
                [str(verify)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        return self._started[verify]

    def close(self) -> None:
        for process in self._started.values():
            process.terminate()
            process.communicate()


@pytest.fixture(scope="module")
def plays() -> Iterator[Plays]:
    """The last one, whose story mostly waits for DNS, goes on beside the others."""
    with contextlib.closing(Plays()) as found:
        found.start(EXAMPLES[-1])
        yield found


@pytest.mark.envoy
@pytest.mark.xdist_group("inotify")
@pytest.mark.parametrize("verify", EXAMPLES, ids=NAMES)
def test_the_steps_of_the_readme_do_what_it_says(verify: Path, plays: Plays) -> None:
    process = plays.start(verify)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, output + errors
    assert "The facts" in output
    assert errors == ""


@pytest.mark.envoy
@pytest.mark.xdist_group("inotify")
def test_an_example_that_is_kept_shows_what_to_type_next() -> None:
    """In both halves of the canary, the loaders' logs included; what it shows works."""
    env = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "example/canary/verify"), "--keep", "--pace", "0.1"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            shown: list[str] = []
            for line in process.stdout:
                shown.append(line)
                if "Ctrl-C" in line:
                    break
            text = "".join(shown)
            for log in (logs := re.findall(r"tail -f (\S+loader.log)", text)):
                wait_until(lambda log=log: "published" in Path(log).read_text())  # type: ignore[misc]
            of_envoy = re.findall(r"tail -f (\S+envoy.log)", text)
            assert (len(logs), len(of_envoy)) == (2, 2)
            assert all(Path(log).exists() for log in of_envoy)
            assert f"kill {process.pid}" in text
            lines = [line.strip() for line in text.splitlines()]
            (given,) = (line for line in lines if line.startswith("API="))
            typed = [line for line in lines if "curl -s -X PATCH" in line]
            assert [re.findall(r"\$API/(\S+)", line)[0] for line in typed] == [
                *("configmaps/envoy-xds", "configmaps/envoy-xds", "services/eerie-octopus")
            ]
            typed += [line for line in lines if line.startswith("python3 loader.py")]
            typed += [line for line in lines if "/snapshot" in line]
            assert len(typed) == 7
            for line in typed if shutil.which("curl") else ():
                asked = f"{given}; {line}".replace("curl -s", "curl -sSf")
                done = subprocess.run(["sh", "-c", asked], cwd=ROOT, capture_output=True, text=True)
                assert done.returncode == 0, f"{line}: {done.stderr}"
                assert "demo" in done.stdout, line
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.mark.parametrize("folder", [path.parent for path in EXAMPLES], ids=NAMES)
def test_the_manifests_are_valid(folder: Path) -> None:
    found = manifests(folder)
    assert found
    for path, obj in found:
        for version in ("1.30", "1.36"):
            try:
                validate(obj, version)
            except Exception as error:
                error.add_note(f"{path}: {obj['kind']} {obj['metadata']['name']}, {version}")
                raise


@pytest.mark.parametrize("folder", [path.parent for path in EXAMPLES], ids=NAMES)
def test_the_pods_with_envoy_are_restricted(folder: Path) -> None:
    for path, obj in manifests(folder):
        if obj["kind"] == "Deployment" and "envoyproxy/envoy" in json.dumps(obj):
            assert not list(restricted(obj["spec"]["template"]["spec"])), path


@pytest.mark.parametrize("folder", [path.parent for path in EXAMPLES], ids=NAMES)
def test_what_a_pod_with_envoy_and_loader_has(folder: Path) -> None:
    """The token in the loader alone, nothing on a disk, the admin interface on a socket."""
    for path, obj in manifests(folder):
        if obj["kind"] != "Deployment" or "xds-configmap-loader" not in json.dumps(obj):
            continue
        if path.name in THE_GO_TOOLS:
            continue
        pod = obj["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False, path
        for volume in pod["volumes"]:
            assert volume.get("emptyDir", {"medium": "Memory"}).get("medium") == "Memory", path
        for container in containers(pod):
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            own = "xds-configmap-loader" in container["image"]
            envoy = "envoyproxy/envoy" in container["image"]
            assert ("token" in mounts) == own, f"{path}: {container['name']}"
            assert ("admin" in mounts) == (own or envoy), f"{path}: {container['name']}"
            assert not (own and "readinessProbe" in container), path
            if envoy:
                assert container["startupProbe"]["httpGet"]["path"] == "/startz", path
                assert "--disable-hot-restart" in container["args"], path
                assert container["startupProbe"]["httpGet"]["port"] == 9902, path
            if own and "--watch" in container["args"]:
                assert "--envoy-admin=unix:/var/run/envoy-admin/admin.sock" in container["args"]
                # as in the chart: commands of one page work on the next
                assert "--listen=:9902" in container["args"], path
                assert container["name"] == "loader", path


def test_images_have_the_version_of_the_loader() -> None:
    for path in [*(ROOT / "example").rglob("*.yaml"), *(ROOT / "charts").rglob("*.md")]:
        for tag in re.findall(r"envoy-xds-configmap-loader:([\w.]+)", path.read_text()):
            assert tag == loader.__version__, path


def test_no_bootstrap_has_an_admin_interface_on_tcp() -> None:
    for path in sorted((ROOT / "example").rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if isinstance(document, dict) and "admin" in document and path.parent.name != "migrate":
                pipe = document["admin"]["address"]["pipe"]
                assert pipe == {"path": "/var/run/envoy-admin/admin.sock", "mode": 0o600}, path


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on PATH")
@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda p: str(p.parent.relative_to(ROOT)))
def test_kubectl_makes_the_same_of_the_kustomizations(path: Path) -> None:
    built = subprocess.run(
        ["kubectl", "kustomize", str(path.parent)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    theirs = [comparable(obj) for obj in yaml.safe_load_all(built.stdout)]
    ours = [comparable(obj) for obj in kustomized(path.parent, "demo")]
    assert sorted(theirs) == sorted(ours)


def comparable(obj: Object) -> str:
    """Without the hashes in the names of what is generated, and without an order."""
    return canonical(json.loads(re.sub(r"-[a-z0-9]{10}(?=\")", "", json.dumps(obj))))


def canonical(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps({key: canonical(value[key]) for key in sorted(value)})
    if isinstance(value, list):
        return json.dumps(sorted(map(canonical, value)))
    return json.dumps(value)

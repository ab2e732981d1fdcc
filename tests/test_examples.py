"""The examples: what their READMEs say runs and holds, and what users copy from them is valid."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.loader import ROOT
from tests.support.manifests import Object, restricted, validate

EXAMPLES = sorted((ROOT / "example").glob("*/verify"), key=lambda path: path.parent.name)
NAMES = [path.parent.name for path in EXAMPLES]
KUSTOMIZATIONS = [
    found for path in EXAMPLES for found in sorted(path.parent.glob("**/kustomization.yaml"))
]


def manifests(folder: Path) -> list[tuple[Path, Object]]:
    """The Kubernetes objects of a folder; a bootstrap or values have no `kind`."""
    return [
        (path, obj)
        for path in sorted(folder.glob("**/*.yaml"))
        if path.name != "kustomization.yaml"
        for obj in yaml.safe_load_all(path.read_text())
        if obj and "kind" in obj and "apiVersion" in obj
    ]


@pytest.mark.envoy
@pytest.mark.xdist_group("inotify")
@pytest.mark.parametrize("verify", EXAMPLES, ids=NAMES)
def test_the_steps_of_the_readme_do_what_it_says(verify: Path) -> None:
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONWARNINGS": "error::ResourceWarning"}
    done = subprocess.run([str(verify)], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The facts" in done.stdout
    assert done.stderr == ""


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
        if obj["kind"] == "Deployment" and "envoyproxy/envoy" in path.read_text():
            assert not list(restricted(obj["spec"]["template"]["spec"])), path


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on PATH")
@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda p: str(p.parent.relative_to(ROOT)))
def test_kubectl_takes_the_kustomizations(path: Path) -> None:
    built = subprocess.run(
        ["kubectl", "kustomize", str(path.parent)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    assert list(yaml.safe_load_all(built.stdout))

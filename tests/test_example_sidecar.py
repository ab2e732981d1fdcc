"""The manifests for a sidecar without Helm: what they grant, and that Kubernetes accepts them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import yaml

from tests.support.loader import ROOT
from tests.support.manifests import VERSIONS, Object, Release, containers, restricted, validate

EXAMPLE = ROOT / "example" / "sidecar"


def kustomize() -> Release:
    """`kubectl kustomize` of the application with the component."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    about = subprocess.run([kubectl, "version", "--client", "-o", "json"], capture_output=True)
    minor = re.match(r"\d+", json.loads(about.stdout)["clientVersion"]["minor"])
    if minor is None or int(minor[0]) < 21:
        pytest.skip("kubectl before 1.21 does not know kustomize components")
    done = subprocess.run(
        [kubectl, "kustomize", str(EXAMPLE / "app")], capture_output=True, text=True, check=True
    )
    return Release(list(yaml.safe_load_all(done.stdout)), "")


def plain() -> Release:
    return Release(list(yaml.safe_load_all((EXAMPLE / "plain.yaml").read_text())), "")


def is_loader(container: Object) -> bool:
    return "envoy-xds-configmap-loader" in container["image"]


@pytest.fixture(params=["kustomize", "plain"])
def release(request: pytest.FixtureRequest) -> Release:
    return kustomize() if request.param == "kustomize" else plain()


def test_kubernetes_accepts_it(release: Release) -> None:
    for obj in release.objects:
        assert obj["metadata"]["namespace"] == "web"
        for version in VERSIONS:
            validate(obj, version)


def test_least_privilege(release: Release) -> None:
    (role,) = release.all("Role")
    assert role["rules"] == [
        {
            "apiGroups": [""],
            "resources": ["configmaps"],
            "resourceNames": ["envoy-xds"],
            "verbs": ["list", "watch"],
        }
    ]
    (binding,) = release.all("RoleBinding")
    account = release.pod["serviceAccountName"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "web"}]
    assert {obj["kind"] for obj in release.objects} == {
        *("ConfigMap", "Deployment", "Role", "RoleBinding", "Service", "ServiceAccount")
    }
    assert list(restricted(release.pod)) == []
    assert release.pod["automountServiceAccountToken"] is False
    for container in containers(release.pod):
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert ("xds-token" in mounts) == is_loader(container)
        loader_or_envoy = is_loader(container) or container["name"] == "envoy"
        assert ("envoy-admin" in mounts) <= loader_or_envoy
        if loader_or_envoy:
            pod = release.pod.get("securityContext", {})
            assert {**pod, **container["securityContext"]}["runAsUser"] == 65532
            assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_order_of_start(release: Release) -> None:
    first = release.pod["initContainers"][0]
    if len(release.pod["initContainers"]) == 2:  # native sidecars, in this order
        assert [c["restartPolicy"] for c in release.pod["initContainers"]] == ["Always"] * 2
        assert first["startupProbe"]["httpGet"]["path"] == "/readyz"
    else:
        assert "--onetime" in first["args"]
    envoy = next(c for c in containers(release.pod) if c["name"] == "envoy")
    assert envoy["startupProbe"]["httpGet"] == {"path": "/startz", "port": 9902}
    for container in containers(release.pod):
        if is_loader(container):
            assert "readinessProbe" not in container


def test_plain_and_component_have_the_same_files() -> None:
    for name, of in (("envoy-xds", "envoy-xds"), ("envoy-bootstrap-", "envoy-bootstrap")):
        maps = [o for o in kustomize().all("ConfigMap") if o["metadata"]["name"].startswith(name)]
        assert len(maps) == 1
        data = plain().one("ConfigMap", of)["data"]
        parsed = {key: yaml.safe_load(text) for key, text in data.items()}
        assert {k: yaml.safe_load(text) for k, text in maps[0]["data"].items()} == parsed
    assert {o["metadata"]["name"] for o in kustomize().all("ConfigMap")} >= {"envoy-xds"}

"""The Helm chart, rendered by the real Helm."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest
import yaml

from loader import __version__
from tests.support import chart_docs
from tests.support.chart_docs import CHART
from tests.support.manifests import (
    IMAGE,
    VERSIONS,
    Object,
    Release,
    containers,
    load_values,
    render,
    restricted,
    validate,
)

CI = sorted(path.name for path in (CHART / "ci").glob("*-values.yaml"))
NAME = "edge-envoy-xds-configmap-loader"
ADMIN = "/var/run/envoy-admin"


def named(pod: Object, name: str) -> Object:
    return next(container for container in containers(pod) if container["name"] == name)


def identities(release: Release) -> list[tuple[str, str | None, str]]:
    return [
        (obj["kind"], obj["metadata"].get("namespace"), obj["metadata"]["name"])
        for obj in release.objects
    ]


def xds(release: Release) -> dict[str, Any]:
    """The files that the release brings, parsed."""
    texts = release.one("ConfigMap", "-xds")["data"]
    return {name: yaml.safe_load(text) for name, text in texts.items()}


def bootstrap(release: Release) -> Object:
    text = release.one("ConfigMap", "-bootstrap")["data"]["envoy.yaml"]
    config: Object = yaml.safe_load(text)
    return config


# ---------------------------------------------------------------------------------------------
# Every file in ci/


@pytest.mark.parametrize("name", CI)
def test_each_object_is_valid_for_every_kubernetes(name: str) -> None:
    objects = render(load_values(name)).objects
    for version in VERSIONS:
        for obj in objects:
            validate(obj, version)


@pytest.mark.parametrize("name", CI)
def test_lint_has_nothing_to_say(name: str) -> None:
    for version in ("v1.29.0", "v1.36.0"):
        report = helm.lint(CHART, load_values(name), strict=True, kube_version=version)
        assert report["errors"] == []
        assert [m for m in report["messages"] if "icon" not in m["error"]] == []


@pytest.mark.parametrize("name", CI)
def test_no_object_is_made_twice_and_each_has_a_namespace(name: str) -> None:
    seen = identities(render(load_values(name)))
    assert len(seen) == len(set(seen))
    for kind, namespace, who in seen:
        if who not in ("extra", "edge-text"):
            assert (namespace is None) == kind.startswith("Cluster")


@pytest.mark.parametrize("name", CI)
def test_least_privilege_in_the_pod(name: str) -> None:
    values = load_values(name)
    release = render(values)
    pods = [release.pod, *(pod["spec"] for pod in release.all("Pod"))]
    for pod in pods:
        own = [c for c in containers(pod) if c["name"] not in ("first", "beside")]
        found = set(restricted({**pod, "initContainers": [], "containers": own}))
        assert found <= ({"envoy: hostPort"} if name == "daemonset-values.yaml" else set())
        assert pod["securityContext"]["runAsUser"] == 65532
        assert pod["automountServiceAccountToken"] is False
        for container in own:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert "runAsUser" not in container["securityContext"]
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert ("token" in mounts) == (container["name"] == "loader")
    (mount,) = (m for m in named(release.pod, "envoy")["volumeMounts"] if m["name"] == "xds")
    assert mount == {"name": "xds", "mountPath": "/srv/runtime", "readOnly": True}
    for volume in release.pod["volumes"]:  # keys and tokens never touch a disk
        if volume["name"] != "more":
            assert volume.get("emptyDir", {"medium": "Memory"})["medium"] == "Memory"


@pytest.mark.parametrize("name", CI)
def test_the_admin_interface_is_a_socket_that_envoy_and_loader_alone_mount(name: str) -> None:
    release = render(load_values(name))
    config = bootstrap(release)
    pipe = {"path": f"{ADMIN}/admin.sock", "mode": 0o600}
    assert config["admin"]["address"] == {"pipe": pipe}
    assert "9901" not in json.dumps(release.objects)
    mounts = {
        container["name"]: mount
        for container in containers(release.pod)
        for mount in container.get("volumeMounts", [])
        if mount["name"] == "admin"
    }
    assert mounts == {
        "envoy": {"name": "admin", "mountPath": ADMIN},
        "loader": {"name": "admin", "mountPath": ADMIN, "readOnly": True},
    }


@pytest.mark.parametrize("name", CI)
def test_what_is_mounted_exists_and_what_exists_is_selected(name: str) -> None:
    release = render(load_values(name))
    for pod in (release.pod, *(pod["spec"] for pod in release.all("Pod"))):
        volumes = [volume["name"] for volume in pod["volumes"]]
        assert len(volumes) == len(set(volumes))
        for container in containers(pod):
            assert {m["name"] for m in container.get("volumeMounts", [])} <= set(volumes)
        maps = {v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v}
        assert maps <= {obj["metadata"]["name"] for obj in release.all("ConfigMap")}
    labels = release.workload["spec"]["template"]["metadata"]["labels"]
    selectors = [release.workload["spec"]["selector"]["matchLabels"]]
    selectors += [service["spec"]["selector"] for service in release.all("Service")]
    selectors += [b["spec"]["selector"]["matchLabels"] for b in release.all("PodDisruptionBudget")]
    selectors += [p["spec"]["podSelector"]["matchLabels"] for p in release.all("NetworkPolicy")]
    spread = release.pod.get("topologySpreadConstraints", [])
    selectors += [constraint["labelSelector"]["matchLabels"] for constraint in spread]
    selectors += [m["spec"]["selector"]["matchLabels"] for m in release.all("PodMonitor")]
    for selector in selectors:
        assert selector.items() <= labels.items()
    for test in release.all("Pod"):  # or the Service would send it requests
        assert not selectors[0].items() <= test["metadata"]["labels"].items()


@pytest.mark.parametrize("name", CI)
def test_envoy_reads_what_somebody_writes(name: str) -> None:
    values = load_values(name)
    release = render(values)
    sources = bootstrap(release)["dynamic_resources"]
    paths = [Path(s["path_config_source"]["path"]) for s in sources.values()]
    assert {str(path.parent) for path in paths} <= {"/srv/runtime/current"}
    known = {o["metadata"]["name"]: o for o in release.all("ConfigMap")}
    own = set(known.get(release.workload["metadata"]["name"] + "-xds", {}).get("data", {}))
    services = values.get("services", {})
    if services.get("enabled"):
        suffix = services.get("format", "yaml")
        rendered = {f"cds.{suffix}", f"rds.{suffix}"}
        assert not own & {f"cds.{suffix}"}, "it would hide every discovered cluster"
        own |= rendered
    if not values.get("configMaps"):
        assert {path.name for path in paths} <= own
        rds = re.findall(r"/srv/runtime/current/(rds\.\w+)", json.dumps(list(known.values())))
        assert set(rds) <= own


@pytest.mark.parametrize("name", CI)
def test_notes_name_what_is_there(name: str) -> None:
    release = render(load_values(name))
    workload = release.workload
    who = f"{workload['kind'].lower()}/{workload['metadata']['name']}"
    assert f"exec {who} -c loader" in release.notes
    assert "/snapshot" in release.notes
    assert "config_dump" in release.notes
    assert ("older than 1.30" in release.notes) == (name == "old-kubernetes-values.yaml")
    assert ("tag may change" in release.notes) == (name != "single-values.yaml")
    # one of the two ways to set weights, never both
    assert ("get configmaps -l" in release.notes) == (name == "selector-values.yaml")
    assert ("ACKed" in release.notes) == load_values(name).get("loader", {}).get("confirm", True)
    assert "service <name>" not in release.notes or "--set upstreams" not in release.notes
    assert ("takes the place of the routes" in release.notes) == (
        name == "services-weights-values.yaml"
    )


# ---------------------------------------------------------------------------------------------
# Ways to run


def arguments(release: Release, container: str) -> list[str]:
    args: list[str] = named(release.pod, container)["args"]
    return args


TOKEN_ARGS = [
    "--token-file=/var/run/secrets/kubernetes.io/serviceaccount/token",
    "--ca-file=/var/run/secrets/kubernetes.io/serviceaccount/ca.crt",
    "--output-dir=/srv/runtime",
    "--log-format=text",
    "--log-level=info",
]


def test_the_loader_is_a_native_sidecar() -> None:
    release = render()
    (loader,) = release.pod["initContainers"]
    assert [c["name"] for c in release.pod["containers"]] == ["envoy"]
    assert (loader["name"], loader["restartPolicy"]) == ("loader", "Always")
    assert arguments(release, "loader") == [
        f"--configmap={NAME}-xds",
        *TOKEN_ARGS,
        "--watch",
        "--sync-interval=1m0s",
        "--listen=:9902",
        f"--envoy-admin=unix:{ADMIN}/admin.sock",
    ]


def test_probes() -> None:
    """A new pod is ready once its Envoy ACKed the files; a dead loader takes no Envoy away."""
    pod = render().pod
    loader, envoy = named(pod, "loader"), named(pod, "envoy")
    assert loader["startupProbe"]["httpGet"] == {"path": "/readyz", "port": "loader"}
    assert loader["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "loader"}
    assert "readinessProbe" not in loader
    assert envoy["startupProbe"]["httpGet"] == {"path": "/startz", "port": 9902}
    assert envoy["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "ready"}
    pod = render({"loader": {"confirm": False}}).pod
    assert named(pod, "envoy")["startupProbe"]["httpGet"] == {"path": "/ready", "port": 9903}


def test_daemonset() -> None:
    release = render(load_values("daemonset-values.yaml"))
    spec = release.one("DaemonSet")["spec"]
    assert "replicas" not in spec
    assert spec["updateStrategy"]["rollingUpdate"] == {"maxUnavailable": "10%"}
    assert spec["minReadySeconds"] == 5
    assert release.pod["dnsPolicy"] == "Default"


def test_polling_and_existing_configmaps() -> None:
    release = render(load_values("configmaps-values.yaml"))
    assert arguments(release, "loader") == [
        "--configmap=envoy-xds",
        "--configmap=envoy-xds-more",
        "--configmap=flags:runtime",
        *TOKEN_ARGS,
        "--sync-interval=30s",
        "--listen=:9902",
    ]
    assert release.pod["serviceAccountName"] == "envoy"
    assert release.all("ServiceAccount") == []
    assert [o["metadata"]["name"] for o in release.all("ConfigMap")] == [f"{NAME}-bootstrap"]
    assert list(bootstrap(release)["dynamic_resources"]) == ["lds_config"]


def test_services_of_other_namespaces_and_json() -> None:
    release = render(load_values("services-namespaces-values.yaml"))
    assert arguments(release, "loader")[1:7] == [
        "--configmap=shop/flags:runtime",
        "--services=*",
        "--services-namespace=shop",
        "--services-namespace=payments",
        "--endpoints=inline",
        "--format=json",
    ]
    assert "--secret=payments/web-tls" in arguments(release, "loader")
    cds = bootstrap(release)["dynamic_resources"]["cds_config"]["path_config_source"]["path"]
    assert cds == "/srv/runtime/current/cds.json"
    assert list(xds(release)) == ["lds.yaml"]


def test_the_loaders_config_is_a_file_of_json() -> None:
    values = load_values("services-values.yaml")
    release = render(values)
    written = release.one("ConfigMap", "-loader")["data"]["loader.json"]
    assert json.loads(written) == values["config"]
    assert "--config=/etc/xds-loader/loader.json" in arguments(release, "loader")
    assert arguments(release, "loader")[1] == "--services=app.kubernetes.io/part-of=shop"


def test_more_of_everything() -> None:
    release = render(load_values("extras-values.yaml"))
    assert "replicas" not in release.workload["spec"]
    names = [c["name"] for c in containers(release.pod)]
    assert names == ["first", "loader", "envoy", "beside"]
    loader = named(release.pod, "loader")
    assert loader["image"].startswith("registry.example/loader@sha256:0123")
    assert {"name": "XDS_LOADER_STEP_DELAY", "value": "200ms"} in loader["env"]
    assert "--step-delay=50ms" in loader["args"]
    assert named(release.pod, "envoy")["image"] == "docker.io/envoyproxy/envoy:v1.40.0"
    assert release.pod["hostAliases"] == [{"ip": "10.0.0.1", "hostnames": ["legacy"]}]
    service = release.one("Service", "edge-http")["spec"]
    assert [port["name"] for port in service["ports"]] == ["https", "web"]
    assert service["externalTrafficPolicy"] == "Local"
    assert release.one("ConfigMap", "edge-text")["data"] == {"namespace": "shop"}
    for obj in release.objects:
        if not obj["metadata"]["name"].endswith(("extra", "-text")):
            assert obj["metadata"]["labels"]["team"] == "edge"
            assert obj["metadata"]["annotations"]["owner"] == "edge@example.com"


# ---------------------------------------------------------------------------------------------
# Drain


def test_drain_lets_envoy_serve_on_while_the_loader_asks_it_to_drain() -> None:
    release = render({"drain": {"seconds": 7}})
    assert named(release.pod, "envoy")["lifecycle"] == {"preStop": {"sleep": {"seconds": 7}}}
    hook = named(release.pod, "loader")["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[:4] == ["python3", "-I", "-S", "-c"]
    assert hook[5:] == [f"{ADMIN}/admin.sock"]
    compile(hook[4], "preStop", "exec")
    assert "sleep" not in hook[4], "Kubernetes ends a native sidecar after Envoy"
    assert release.pod["terminationGracePeriodSeconds"] > 7
    # the kubelet kills a container whose liveness probe fails; /ready fails while it drains
    assert named(release.pod, "envoy")["livenessProbe"]["tcpSocket"] == {"port": "ready"}


def test_kubernetes_before_preStop_sleep() -> None:
    release = render(load_values("old-kubernetes-values.yaml"))
    assert "lifecycle" not in named(release.pod, "envoy")


def test_without_drain_there_are_no_hooks() -> None:
    pod = render({"drain": {"enabled": False}}).pod
    assert all("lifecycle" not in container for container in containers(pod))


# ---------------------------------------------------------------------------------------------
# Permissions: exactly these


def rule(resource: str, *names: str, watch: bool = True, group: str = "") -> Object:
    found: Object = {
        "apiGroups": [group],
        "resources": [resource],
        "verbs": ["list", "watch"] if watch else ["list"],
    }
    return {**found, "resourceNames": list(names)} if names else found


OWN = rule("configmaps", f"{NAME}-xds")
DISCOVERY = [rule("services"), rule("endpointslices", group="discovery.k8s.io")]

PERMISSIONS: dict[str, tuple[dict[str, list[Object]], list[Object]]] = {
    # values: (rules by namespace, rules for the whole Kubernetes cluster)
    "default-values.yaml": ({"web": [OWN]}, []),
    "single-values.yaml": ({"web": [OWN]}, []),
    "weights-values.yaml": ({"web": [OWN]}, []),
    "selector-values.yaml": ({"web": [rule("configmaps")]}, []),
    "tls-values.yaml": ({"web": [OWN, rule("secrets", "web-tls")]}, []),
    "services-values.yaml": ({"web": [OWN, *DISCOVERY]}, []),
    "services-weights-values.yaml": ({"web": [OWN, *DISCOVERY]}, []),
    "configmaps-values.yaml": (
        {"web": [rule("configmaps", "envoy-xds", "envoy-xds-more", "flags", watch=False)]},
        [],
    ),
    "services-namespaces-values.yaml": (
        {
            "web": [OWN],
            "shop": [rule("configmaps", "flags"), *DISCOVERY],
            "payments": [rule("secrets", "web-tls"), *DISCOVERY],
        },
        [],
    ),
    "services-nodes-values.yaml": ({"web": [OWN]}, [*DISCOVERY, rule("nodes")]),
}


@pytest.mark.parametrize("name", PERMISSIONS)
def test_permissions(name: str) -> None:
    by_namespace, everywhere = PERMISSIONS[name]
    release = render(load_values(name), namespace="web")
    roles = {role["metadata"]["namespace"]: role for role in release.all("Role")}
    assert {namespace: role["rules"] for namespace, role in roles.items()} == by_namespace
    assert [role["rules"] for role in release.all("ClusterRole")] == (
        [everywhere] if everywhere else []
    )
    account = {"kind": "ServiceAccount", "name": release.pod["serviceAccountName"]}
    bindings = release.all("RoleBinding") + release.all("ClusterRoleBinding")
    assert len(bindings) == len(by_namespace) + bool(everywhere)
    made = identities(release)
    for binding in bindings:
        assert binding["subjects"] == [{**account, "namespace": "web"}]
        ref, namespace = binding["roleRef"], binding["metadata"].get("namespace")
        assert (ref["kind"], namespace, ref["name"]) in made
        # two releases of one name in two namespaces must not fight over an object elsewhere
        if namespace != "web":
            assert ref["name"] == f"{NAME}-web"


@pytest.mark.parametrize(
    ("endpoint", "nodes"),
    [
        ({}, False),
        ({"prefer_zone": True}, True),
        ({"prefer_zone": False}, False),
        ({"prefer_zone": "eu-1a"}, False),
        ({"locality": {"zone": {"label": "topology.kubernetes.io/zone"}}}, True),
        ({"locality": {"zone": {"literal": "a"}, "sub_zone": {"node_name": True}}}, False),
    ],
)
def test_nodes_are_read_only_when_the_configuration_needs_them(
    endpoint: Object, nodes: bool
) -> None:
    services = {"enabled": True, "selector": "*"}
    release = render({"services": services, "config": {"endpoint": endpoint}})
    expected = [[rule("nodes")]] if nodes else []
    assert [role["rules"] for role in release.all("ClusterRole")] == expected


def test_no_permissions_are_made_when_somebody_else_makes_them() -> None:
    release = render({"rbac": {"create": False}})
    kinds = {obj["kind"] for obj in release.objects}
    assert not kinds & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}


# ---------------------------------------------------------------------------------------------
# Weights and files


def set_values(values: Object, *assignments: str) -> Object:
    """`helm upgrade --reuse-values --set ...`."""
    merged = copy.deepcopy(values)
    for assignment in assignments:
        into(merged, helm.parse_set_string(assignment))
    return merged


def into(base: Object, extra: Object) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            into(base[key], value)
        else:
            base[key] = value


@pytest.mark.parametrize(
    ("given", "shares"),
    [
        # as annotations of Services: who has no weight takes what the others leave of 100
        ({"a": None, "b": 5}, {"a": 95, "b": 5}),
        ({"a": None, "b": 120}, {"a": 0, "b": 120}),
        ({"a": None, "b": None}, {"a": 1, "b": 1}),
        ({"a": None, "b": None, "c": 5}, {"a": 95, "b": 95, "c": 10}),
        ({"a": 3, "b": 1}, {"a": 3, "b": 1}),
    ],
)
def test_a_backend_without_a_weight_takes_the_rest(given: Object, shares: Object) -> None:
    backends = {
        name: {"port": 80} | ({} if weight is None else {"weight": weight})
        for name, weight in given.items()
    }
    (routes,) = xds(render({"upstreams": {"web": {"backends": backends}}}))["rds.yaml"]["resources"]
    (route,) = routes["virtual_hosts"][0]["routes"]
    split = route["route"]["weighted_clusters"]["clusters"]
    assert {entry["name"]: entry["weight"] for entry in split} == shares


@pytest.mark.parametrize("weights", [{"stable": 95, "canary": 5}, {"canary": 5}, {}])
def test_the_notes_show_a_command_that_gives_half(weights: Object) -> None:
    backends = {
        name: {"port": 80} | ({"weight": weights[name]} if name in weights else {})
        for name in ("stable", "canary")
    }
    values = {"upstreams": {"web": {"backends": backends}}}
    after = render(set_values(values, *re.findall(r"--set (\S+)", render(values).notes)))
    (routes,) = xds(after)["rds.yaml"]["resources"]
    split = routes["virtual_hosts"][0]["routes"][0]["route"]["weighted_clusters"]["clusters"]
    assert {entry["weight"] for entry in split} == {50}


def test_what_envoy_advises_at_the_edge() -> None:
    release = render()
    (listener,) = xds(release)["lds.yaml"]["resources"]
    assert listener["per_connection_buffer_limit_bytes"] == 32768
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    expected = {
        "use_remote_address": True,
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "request_headers_timeout": "10s",
        "stream_idle_timeout": "300s",
    }
    assert expected.items() <= manager.items()
    config = bootstrap(release)
    monitors = config["overload_manager"]["resource_monitors"]
    assert [m["typed_config"].get("max_heap_size_bytes") for m in monitors] == [1 << 30, None]
    (ready,) = config["static_resources"]["listeners"]
    assert ready["ignore_global_conn_limit"] is ready["bypass_overload_manager"] is True
    assert config["deferred_stat_options"] == {"enable_deferred_creation_stats": True}
    assert "--disable-hot-restart" in named(release.pod, "envoy")["args"]
    single = render(load_values("single-values.yaml"))
    assert "overload_manager" not in bootstrap(single), "both limits are switched off"


# ---------------------------------------------------------------------------------------------
# What a platform team expects


@pytest.mark.parametrize(
    ("values", "several"),
    [
        ({}, True),
        ({"replicaCount": 1}, False),
        ({"replicaCount": None}, True),
        ({"kind": "DaemonSet"}, False),
    ],
)
def test_two_pods_are_spread_and_not_evicted_together(values: Object, several: bool) -> None:
    release = render(values)
    assert len(release.all("PodDisruptionBudget")) == several
    spread = release.pod.get("topologySpreadConstraints", [])
    keys = ["kubernetes.io/hostname", "topology.kubernetes.io/zone"] if several else []
    assert [constraint["topologyKey"] for constraint in spread] == keys


def test_images_by_digest() -> None:
    pod = render(load_values("single-values.yaml")).pod
    assert all(re.search(r"@sha256:\w{64}$", c["image"]) for c in containers(pod))
    assert named(render().pod, "loader")["image"] == f"{IMAGE}:{__version__}"


def test_the_inotify_budget_is_a_value() -> None:
    services = {"enabled": True, "selector": "*", "edsBudget": 16}
    release = render({"services": services, "config": {"cluster_domain": "k8s.local"}})
    written = release.one("ConfigMap", "-loader")["data"]["loader.json"]
    assert json.loads(written) == {"cluster_domain": "k8s.local", "endpoint": {"eds_budget": 16}}
    assert "--config=/etc/xds-loader/loader.json" in arguments(release, "loader")


def test_a_network_policy_may_be_switched_on() -> None:
    assert render().all("NetworkPolicy") == []
    http = {"port": 10000, "protocol": "TCP"}
    (policy,) = render(load_values("single-values.yaml")).all("NetworkPolicy")
    assert policy["spec"]["ingress"] == [{"ports": [http]}]
    release = render(load_values("monitoring-values.yaml"))
    traffic, metrics = release.one("NetworkPolicy")["spec"]["ingress"]
    assert traffic["ports"] == [http]
    *given, test = traffic["from"]
    assert len(given) == 2
    (hook,) = release.all("Pod")
    assert test["podSelector"]["matchLabels"].items() <= hook["metadata"]["labels"].items()
    assert [port["port"] for port in metrics["ports"]] == [9902, 9903]
    assert len(metrics["from"]) == 1


def test_a_service_may_select_the_pods_of_two_releases() -> None:
    release = render(load_values("extras-values.yaml"))
    assert release.one("Service", "edge-http")["spec"]["selector"] == {"tier": "front"}


def test_helm_test_asks_the_port_that_leads_to_the_listener() -> None:
    for values, port in ((load_values("extras-values.yaml"), "80"), ({}, "10000")):
        (hook,) = render(values).all("Pod")
        assert hook["spec"]["containers"][1]["command"][6] == port


def test_upstreams_of_one_host_share_it_and_the_longer_prefix_goes_first() -> None:
    files = xds(render(load_values("weights-values.yaml")))
    (routes,) = files["rds.yaml"]["resources"]
    hosts = {host["name"]: host for host in routes["virtual_hosts"]}
    assert sorted(hosts) == ["podinfo", "rest"]
    prefixes = [route["match"]["prefix"] for route in hosts["podinfo"]["routes"]]
    assert prefixes == ["/api/", "/"]
    names = [cluster["name"] for cluster in files["cds.yaml"]["resources"]]
    assert names == ["podinfo-canary", "podinfo-stable", "podinfo_api"]


def test_weights_of_discovered_clusters() -> None:
    release = render(load_values("services-weights-values.yaml"))
    assert sorted(xds(release)) == ["lds.yaml", "rds.yaml"]
    ((host,),) = [r["virtual_hosts"] for r in xds(release)["rds.yaml"]["resources"]]
    split = host["routes"][0]["route"]["weighted_clusters"]["clusters"]
    assert {entry["name"]: entry["weight"] for entry in split} == {
        "shop/web/http": 90,
        "shop/web-canary/http": 10,
    }


def test_files_as_users_know_them() -> None:
    release = render(load_values("xds-values.yaml"))
    texts = release.one("ConfigMap", "-xds")["data"]
    assert texts["note.txt"] == "kept as it is, {{ braces }} included\n"
    files = xds(release)
    for name in ("rds.yaml", "cds.yaml", "lds.yaml", "extra.yaml"):
        assert isinstance(files[name]["version_info"], str), "a number does not parse"
        assert len(files[name]["resources"]) == 1
    assert files["extra.yaml"]["resources"][0]["name"] == "extra"
    assert "1000000" in texts["cds.yaml"], "not 1e+06"
    config = bootstrap(release)
    assert [c["name"] for c in config["static_resources"]["clusters"]] == ["admin", "static"]
    assert config["layered_runtime"]["layers"][0]["name"] == "admin"
    address = config["static_resources"]["listeners"][0]["address"]["socket_address"]
    assert address == {"address": "::", "ipv4_compat": True, "port_value": 9903}


def test_restart_only_for_what_is_read_once() -> None:
    def annotations(values: Object) -> Object:
        found: Object = render(values).workload["spec"]["template"]["metadata"]["annotations"]
        return found

    plain = annotations({})
    assert annotations({"listener": {"codecType": "HTTP2"}}) == plain
    assert annotations({"upstreams": load_values("weights-values.yaml")["upstreams"]}) == plain
    assert annotations({"envoy": {"bootstrap": {"stats_flush_interval": "1s"}}}) != plain
    assert annotations({"config": {"cluster_domain": "k8s.local"}}) != plain
    services: Object = {"enabled": True, "selector": "*"}
    budget = {"services": {**services, "edsBudget": 4}}
    assert annotations(budget) != annotations({"services": services})


# ---------------------------------------------------------------------------------------------
# Errors


ONE = {"b": {"weight": 1, "port": 1}}


def upstreams(**given: Object) -> Object:
    """Each upstream with these fields and one backend, unless it has `backends`."""
    return {"upstreams": {name: {"backends": ONE, **more} for name, more in given.items()}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 3}, "replicas"),
        ({"loader": {"syncInterval": 30}}, "syncInterval"),
        ({"loader": {"image": {"digest": "sha256:1"}}}, "digest"),
        ({"kind": "StatefulSet"}, "kind"),
        ({"services": {"edsBudget": "8"}}, "edsBudget"),
        ({"envoy": {"overload": {"maxHeap": "1 GB"}}}, "maxHeap"),
        ({"networkPolicy": {"from": ["monitoring"]}}, "from"),
        ({"envoy": {"cds": "../cds.yaml"}}, "cds"),
        ({"envoy": {"ports": {"ready": {"containerPort": 1}}}}, "ready"),
        ({"configMaps": ["envoy-xds"]}, "configMaps"),
        ({"configMaps": [{"name": "x", "directory": "../x"}]}, "directory"),
        ({"secrets": [{"name": "Upper"}]}, "secrets"),
        ({"services": {"namespaces": ["a b"]}}, "namespaces"),
        ({"services": {"endpoints": "edds"}}, "endpoints"),
        ({"config": {"clusters": {}}}, "clusters"),
        ({"config": {"cluster": {"base": {"name": "x"}}}}, "name"),
        ({"config": {"cluster": {"overrides": [{"merge": {}}]}}}, "match"),
        ({"config": {"endpoint": {"locality": {"zone": {"label": "a", "literal": "b"}}}}}, "zone"),
        ({"xds": {"eds/a.yaml": "x"}}, "eds/a.yaml"),
        ({"xds": {"rds.yaml": [{"name": "x"}]}}, "rds.yaml"),
        (upstreams(a={"backends": {}}), "backends"),
        (upstreams(a={"backends": {"b": {"port": 1, "weight": 1000001}}}), "weight"),
        (upstreams(a={"backends": {"b": {"port": 1, "weight": "50%"}}}), "weight"),
        (upstreams(a={"prefix": "x"}), "prefix"),
        ({"tests": {"statuses": ["200"]}}, "statuses"),
        # what a schema cannot express
        ({"loader": {"image": {"repository": ""}}}, 'loader.image.repository: "" has no registry'),
        ({"loader": {"image": {"repository": "team/loader"}}}, '"team/loader" has no registry'),
        ({"envoy": {"image": {"repository": "envoy"}}}, "envoy.image.repository"),
        ({"loader": {"image": {"repository": f"{IMAGE}:1"}}}, "has a tag or digest"),
        ({"services": {"enabled": True}}, "services.selector: give the label selector"),
        ({"runtimeVolume": {"sizeLimit": "256Mi"}}, "loader.resources.limits.memory: must be 64Mi"),
        ({"loader": {"resources": {"limits": {"memory": "100M"}}}}, "runtimeVolume.sizeLimit"),
        ({"envoy": {"overload": {"maxHeap": "2Gi"}}}, "must be below envoy.resources.limits"),
        (
            {"envoy": {"bootstrap": {"admin": {"address": {"socket_address": {}}}}}},
            "envoy.bootstrap.admin.address: the admin interface is a Unix socket",
        ),
        ({"listener": {"port": 8080}}, "listener.port: 8080 is in no entry of envoy.ports"),
        (
            {"listener": {"port": 8080}, "envoy": {"ports": {"web": {"containerPort": 8080}}}},
            "listener.port: no entry of service.ports has it as targetPort (8080 or web)",
        ),
        (upstreams(a={"domains": ["x:80"]}), "domain x:80: give it without a port"),
        (upstreams(a={"backends": {"b": {"weight": 1}}}), "b: port is required"),
        (upstreams(a={"backends": {"b": {"weight": 0, "port": 1}}}), "sum to 0"),
        ({"listener": {"enabled": False}}, "nothing for Envoy to read"),
        ({"listener": {"enabled": False}, **upstreams(a={})}, "listener.enabled"),
        ({"services": {"enabled": True, "selector": "*"}, **upstreams(a={})}, "discovered"),
        (
            {"xds": {"rds.yaml": "resources: []"}, **upstreams(a={})},
            "rds.yaml would replace the file",
        ),
        (
            {"services": {"enabled": True, "selector": "*", "namespaces": ["*", "a"]}},
            "name no other",
        ),
        ({"terminationGracePeriodSeconds": 20}, "drain.seconds"),
        (
            upstreams(a={"domains": ["x", "y"]}, c={"domains": ["Y"]}),
            "domain Y is another upstream's",
        ),
        (upstreams(a={}, c={}), "prefix / of these domains"),
        (
            upstreams(a={}, c={"prefix": "/c", "backends": {"b": {"weight": 1, "port": 2}}}),
            "a backend of this name that differs",
        ),
    ],
)
def test_values_that_are_an_error(values: Object, message: str) -> None:
    with pytest.raises(helm.HelmError, match=re.escape(message)):
        render(values)


# ---------------------------------------------------------------------------------------------
# Documentation


def test_the_readme_has_the_values_and_each_is_described() -> None:
    text = (CHART / "values.yaml").read_text()
    readme = (CHART / "README.md").read_text()
    assert chart_docs.with_table(readme, text) == readme, "run python -m tests.support.chart_docs"
    assert [row.path for row in chart_docs.rows(text) if not row.description] == []


def schemas(schema: Object, path: str = "") -> Iterator[tuple[str, Object]]:
    for name, child in schema.get("properties", {}).items():
        if isinstance(child, dict):
            yield f"{path}{name}", child
            yield from schemas(child, f"{path}{name}.")


def test_the_schema_knows_exactly_the_values() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    known = dict(schemas(schema))
    described = {row.path for row in chart_docs.rows((CHART / "values.yaml").read_text())}
    leaves = {
        path for path, child in known.items() if not any(p.startswith(f"{path}.") for p in known)
    }
    inner = {path for path in known if path.startswith(("config.", "envoy.bootstrap."))}
    expanded = {"loader.image", "envoy.image"} | {
        path for path in known if known[path].get("$ref") == "#/definitions/image"
    }
    images = {f"{path}.{field}" for path in expanded for field in ("repository", "tag", "digest")}
    images |= {f"{path}.pullPolicy" for path in expanded}
    assert described - images <= set(known)
    assert (leaves - inner - expanded - {"global"}) <= described
    for path, child in known.items():
        if child.get("type") == "object" and "properties" in child and path != "envoy.bootstrap":
            assert child.get("additionalProperties") is False or path.startswith("envoy."), path


def test_the_readmes_values_render() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (CHART / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        for obj in render(yaml.safe_load(block)).objects:
            validate(obj, VERSIONS[-1])


def test_the_package_has_no_test_values(tmp_path: Path) -> None:
    archive = helm.package(CHART, destination=tmp_path)
    with helm.Chart.load(archive) as chart:
        names = [file["name"] for file in chart.files]
    assert not [name for name in names if name.startswith("ci/")]
    assert "dashboards/envoy-xds-configmap-loader.json" in names


def test_as_a_subchart(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    (parent / "templates").mkdir(parents=True)
    shutil.copytree(CHART, parent / "charts" / CHART.name)
    (parent / "Chart.yaml").write_text("apiVersion: v2\nname: parent\nversion: 1.0.0\n")
    image = {"repository": IMAGE}
    values = {"replicaCount": 1, "loader": {"image": image}}
    release = render({"global": {"x": 1}, CHART.name: values}, chart=parent)
    assert release.workload["spec"]["replicas"] == 1

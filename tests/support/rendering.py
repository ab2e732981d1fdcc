"""Services and their endpoints as the API gives them, and rendered files as Envoy reads them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml
from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.transport_sockets.tls.v3 import tls_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf import json_format

import loader

# What an Any of a rendered file may hold: importing a module makes its types known to protobuf.
TYPES = (cluster_pb2, endpoint_pb2, route_pb2, tls_pb2, http_protocol_options_pb2)

Object = dict[str, Any]
NO_SLICE = ": has no EndpointSlice, so it has no endpoints"
CURRENT = "/srv/runtime/current"


def service(name: str = "demo/web", *ports: Object, **spec: Any) -> Object:
    """A Service (`<namespace>/<name>`), with one port `http` unless others are given.

    `labels` and `annotations` go to the metadata; annotations get the default prefix.
    """
    namespace, _, short = name.partition("/")
    metadata: Object = {"namespace": namespace, "name": short, "labels": spec.pop("labels", {})}
    given = spec.pop("annotations", {})
    metadata["annotations"] = {
        key if "/" in key else f"xds-loader/{key}": value for key, value in given.items()
    }
    spec.setdefault("clusterIP", "10.96.0.10")
    return {"metadata": metadata, "spec": {"ports": list(ports) or [port("http", 80)], **spec}}


def port(name: str, number: int, target: int | str = 8080, **more: Any) -> Object:
    """A Service port."""
    return {"name": name, "port": number, "targetPort": target, "protocol": "TCP", **more}


def endpoint(*addresses: str, state: str = "ready", zone: str = "", **more: Any) -> Object:
    """An endpoint: `ready`, `draining`, `terminating`, `unready`, or `unknown` (all null)."""
    conditions: Object = {
        "ready": {"ready": True, "serving": True, "terminating": False},
        "draining": {"ready": False, "serving": True, "terminating": True},
        "terminating": {"ready": False, "serving": False, "terminating": True},
        "unready": {"ready": False, "serving": False, "terminating": False},
        "unknown": {},
    }[state]
    if hints := more.pop("hints", None):
        more["hints"] = {"forZones": [{"name": hint} for hint in hints]}
    return {"addresses": list(addresses), "conditions": conditions, "zone": zone or None, **more}


def endpoint_slice(
    owner: str = "demo/web",
    *endpoints: Object,
    ports: Mapping[str, int | None] | None = None,
    name: str = "",
    family: str = "IPv4",
) -> Object:
    """A slice of the Service's endpoints; `ports` by name, `http: 8080` by default."""
    namespace, _, short = owner.partition("/")
    return {
        "metadata": {
            "namespace": namespace,
            "name": name or f"{short}-{family.lower()}",
            "labels": {"kubernetes.io/service-name": short},
        },
        "addressType": family,
        "ports": [
            {"name": name, "port": number, "protocol": "TCP"}
            for name, number in ({"http": 8080} if ports is None else ports).items()
        ],
        "endpoints": list(endpoints),
    }


def node(name: str, **labels: str) -> Object:
    """A Node; `zone=` and `region=` are the well-known labels."""
    known = {f"topology.kubernetes.io/{key}": labels[key] for key in labels}
    return {"metadata": {"name": name, "labels": known}}


def objects_of(*raw: Object) -> loader.Objects:
    """Raw objects, told apart by what they hold."""
    found = loader.Objects({}, [], {})
    for obj in raw:
        key = (obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
        if "spec" in obj:
            found.services[key] = loader.service_from(obj)  # type: ignore[index]
        elif "addressType" in obj:
            found.slices.append(loader.endpointslice_from(obj))  # type: ignore[attr-defined]
        elif "subsets" in obj:
            found.slices.extend(loader.endpoints_from(obj))  # type: ignore[attr-defined]
        else:
            found.nodes[key[1]] = loader.texts_of(obj)  # type: ignore[index]
    return found


def renderer(config: Object | None = None, **options: Any) -> loader.Renderer:
    """A renderer with a configuration in JSON; EDS and YAML unless `options` say otherwise."""
    parsed = loader.config_from(config or {})
    budget = 32 if parsed["endpoint"]["eds_budget"] is None else loader.inotify_budget(parsed)
    given = {"endpoints": "eds", "fmt": "yaml", "node_name": "", "published": {}, **options}
    settings = loader.Options(
        endpoints=given["endpoints"], format=given["fmt"], node_name=given["node_name"],
        output_dir=CURRENT.rpartition("/")[0])
    return loader.Renderer(settings, parsed, given.get("budget", budget), given["published"])


def render(*raw: Object, config: Object | None = None, **options: Any) -> loader.Rendering:
    return renderer(config, **options).render(objects_of(*raw))


def routed(name: str = "demo/web", *ports: Object, created: str = "", **annotations: str) -> Object:
    """A Service with annotations."""
    raw = service(name, *ports, annotations=annotations)
    raw["metadata"]["creationTimestamp"] = created or None
    return raw


def content_of(path: str, file: loader.File) -> Object:
    """What a file says, read as its extension tells."""
    found = (yaml.safe_load if path.endswith(".yaml") else json.loads)(file.content)
    assert isinstance(found, dict)
    return found


def parsed(path: str, file: loader.File) -> discovery_pb2.DiscoveryResponse:
    """The file as Envoy's own message types; an unknown field anywhere is an error."""
    response = discovery_pb2.DiscoveryResponse()
    json_format.ParseDict(content_of(path, file), response)
    return response


def resources(rendering: loader.Rendering, path: str) -> list[Object]:
    found = content_of(path, rendering.files[path])["resources"]
    assert isinstance(found, list)
    return found


def clusters(rendering: loader.Rendering) -> dict[str, Object]:
    """The rendered clusters by name."""
    [path] = [path for path in rendering.files if path.startswith("cds.")]
    found = resources(rendering, path)
    assert len({one["name"] for one in found}) == len(found)
    return {one["name"]: one for one in found}


def assignment(rendering: loader.Rendering, cluster: str) -> Object:
    """The ClusterLoadAssignment of a cluster, wherever it is."""
    found = clusters(rendering)[cluster]
    if "load_assignment" in found:
        given = found["load_assignment"]
    else:
        path = found["eds_cluster_config"]["eds_config"]["path_config_source"]["path"]
        [given] = resources(rendering, path.removeprefix(f"{CURRENT}/"))
    assert given["cluster_name"] == cluster
    assert isinstance(given, dict)
    return given


def shown(rendering: loader.Rendering, cluster: str = "demo/web/http") -> list[str]:
    """The endpoints of a cluster: `[zone/priority] address:port [STATE]`, in the file's order."""
    lines = []
    for group in assignment(rendering, cluster).get("endpoints", ()):
        zone = group.get("locality", {}).get("zone", "")
        where = f"{zone}/{group.get('priority', 0)} " if zone or group.get("priority") else ""
        for one in group["lb_endpoints"]:
            address = one["endpoint"]["address"]["socket_address"]
            state = f" {one['health_status']}" if "health_status" in one else ""
            lines.append(f"{where}{address['address']}:{address['port_value']}{state}")
    return lines


def routes(rendering: loader.Rendering) -> dict[str, list[str]]:
    """`{"domain, domain": ["prefix -> cluster=weight, cluster=weight"]}` of the routes."""
    [path] = [path for path in rendering.files if path.startswith("rds.")]
    found: dict[str, list[str]] = {}
    for host in resources(rendering, path)[0].get("virtual_hosts", ()):
        lines = []
        for route in host.get("routes", ()):
            action = route["route"]
            split: Iterable[Object] = action.get("weighted_clusters", {}).get("clusters", ())
            to = ", ".join(f"{one['name']}={one['weight']}" for one in split)
            lines.append(f"{route['match']['prefix']} -> {action.get('cluster') or to}")
        found[", ".join(host["domains"])] = lines
    return found


def rendered(*raw: Object, **options: Any) -> loader.Rendering:
    """Rendered in both formats: they say the same, and Envoy's types know every field.

    Most Services here have no slice; the warning about that has a test of its own.
    """
    found, other = (
        one._replace(warnings=tuple(each for each in one.warnings if not each.endswith(NO_SLICE)))
        for one in (render(*raw, **options), render(*raw, **{**options, "fmt": "json"}))
    )
    assert other.warnings == found.warnings
    assert [path.replace(".json", ".yaml") for path in other.files] == list(found.files)
    for path, file in found.files.items():
        twin = path.replace(".yaml", ".json")
        said = content_of(path, file)
        as_json = json.dumps(content_of(twin, other.files[twin])).replace(".json", ".yaml")
        assert said["resources"] == json.loads(as_json)["resources"]
        assert parsed(path, file).version_info == said["version_info"]
        assert isinstance(said["version_info"], str)
        assert file == loader.file_of(file.content, "services")
    return found


def seconds(action: Callable[[], object]) -> float:
    """The CPU time of it."""
    start = time.process_time()
    action()
    return time.process_time() - start

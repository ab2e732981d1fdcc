"""Services, EndpointSlices and Nodes become clusters, load assignments and routes.

Every rendering of this file is also read with Envoy's own message types (`rendered`).
"""

from __future__ import annotations

import copy
import itertools
import json
import random
from typing import Any

import pytest
import yaml
from envoy.config.cluster.v3 import cluster_pb2
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

import loader
from tests.support import rendering as r
from tests.support.rendering import (
    Object,
    assignment,
    clusters,
    endpoint,
    endpoint_slice,
    node,
    objects_of,
    port,
    render,
    routes,
    service,
    shown,
    renderer,
)

HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def rendered(*raw: Object, **options: Any) -> loader.Rendering:
    """Rendered in both formats: they say the same, and Envoy's types know every field."""
    found = render(*raw, **options)
    other = render(*raw, **{**options, "fmt": "json"})
    assert other.warnings == found.warnings
    assert [path.replace(".json", ".yaml") for path in other.files] == list(found.files)
    for path, file in found.files.items():
        twin = path.replace(".yaml", ".json")
        said = r.content_of(path, file)
        as_json = json.dumps(r.content_of(twin, other.files[twin])).replace(".json", ".yaml")
        assert said["resources"] == json.loads(as_json)["resources"]
        assert r.parsed(path, file).version_info == said["version_info"]
        assert isinstance(said["version_info"], str)
        assert file == loader.file_of(file.content, "services")
    return found


# ------------------------------------------------------------------------------------------
# Clusters


def test_one_cluster_a_port_each_with_an_eds_file() -> None:
    found = rendered(
        service("demo/web", port("http", 80), port("admin", 9000, 9001)),
        endpoint_slice("demo/web", endpoint("10.0.0.1"), ports={"http": 8080, "admin": 9001}),
    )
    assert list(clusters(found)) == ["demo/web/http", "demo/web/admin"]
    assert clusters(found)["demo/web/http"] == {
        "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
        "name": "demo/web/http",
        "type": "EDS",
        "eds_cluster_config": {
            "eds_config": {
                "resource_api_version": "V3",
                "path_config_source": {"path": f"{r.CURRENT}/eds/demo_web_http.yaml"},
            }
        },
    }
    assert sorted(found.files) == [
        *("cds.yaml", "eds/demo_web_admin.yaml", "eds/demo_web_http.yaml", "rds.yaml")
    ]
    assert shown(found) == ["10.0.0.1:8080"]
    assert shown(found, "demo/web/admin") == ["10.0.0.1:9001"]
    assert found.clusters == {"eds": 2, "inline": 0, "dns": 0}
    assert not found.warnings


def test_comments_name_the_source_and_the_type_is_seen_without_resources() -> None:
    found = render(service(), endpoint_slice())
    assert found.files["eds/demo_web_http.yaml"].content.startswith(
        b"# Endpoints of service demo/web, port http.\n"
    )
    for name, kind in (
        ("cds", "config.cluster.v3.Cluster"),
        ("rds", "config.route.v3.RouteConfiguration"),
    ):
        for fmt in ("yaml", "json"):
            content = render(fmt=fmt).files[f"{name}.{fmt}"].content.decode()
            assert f"type.googleapis.com/envoy.{kind}" in content
    assert clusters(render()) == {}
    assert routes(render()) == {}


def test_the_version_is_of_the_resources_alone() -> None:
    pairs = (service(), endpoint_slice("demo/web", endpoint("10.0.0.1")))
    one, two = render(*pairs), render(*pairs, fmt="json")
    for path in one.files:
        twin = path.replace(".yaml", ".json")
        versions = [
            r.content_of(*each)["version_info"]
            for each in ((path, one.files[path]), (twin, two.files[twin]))
        ]
        if path != "cds.yaml":  # whose paths differ
            assert versions[0] == versions[1]
    more = render(service(), endpoint_slice("demo/web", endpoint("10.0.0.1"), endpoint("10.0.0.2")))
    assert more.files["cds.yaml"] == one.files["cds.yaml"]
    path = "eds/demo_web_http.yaml"
    assert more.files[path].content.splitlines()[2] != one.files[path].content.splitlines()[2]


def test_names_come_from_the_template_and_file_names_do_not() -> None:
    found = rendered(
        service("demo/web", port("", 80)),
        endpoint_slice("demo/web", endpoint("10.0.0.1"), ports={"": 8080}),
        config={"cluster": {"name": "k8s-{service}.{namespace}:{port}"}},
    )
    assert list(clusters(found)) == ["k8s-web.demo:80"]
    assert "eds/demo_web_80.yaml" in found.files
    assert shown(found, "k8s-web.demo:80") == ["10.0.0.1:8080"]


def test_the_second_of_two_clusters_of_one_name_is_left_out() -> None:
    found = rendered(
        service("b/web"), service("a/web"), config={"cluster": {"name": "{service}/{port}"}}
    )
    assert list(clusters(found)) == ["web/http"]
    assert "eds/a_web_http.yaml" in found.files
    assert found.warnings == (
        "service b/web: port http is left out: the cluster name web/http is service a/web's",
    )


def test_a_port_named_like_the_number_of_another_does_not_collide() -> None:
    found = rendered(service("demo/web", port("", 80), port("80", 8000)))
    assert list(clusters(found)) == ["demo/web/80"]
    assert len(found.warnings) == 1


def test_sctp_is_skipped_and_named_and_udp_has_udp_addresses() -> None:
    found = rendered(
        service("demo/dns", port("dns", 53, 5353, protocol="UDP"), port("x", 9, protocol="SCTP")),
        endpoint_slice("demo/dns", endpoint("10.0.0.1"), ports={"dns": 5353, "x": 9}),
    )
    assert list(clusters(found)) == ["demo/dns/dns"]
    assert found.warnings == ("service demo/dns: port x is left out: Envoy does not speak SCTP",)
    address = assignment(found, "demo/dns/dns")["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    assert address == {
        "address": {
            "socket_address": {"protocol": "UDP", "address": "10.0.0.1", "port_value": 5353}
        }
    }


@pytest.mark.parametrize(
    ("override", "there"),
    [
        (None, False),
        ({"match": {"namespace": "default"}, "merge": {"connect_timeout": "1s"}}, False),
        ({"match": {"cluster_name": "default/kubernetes/https"}, "merge": {}}, True),
        ({"match": {"cluster_name": "default/kubernetes/https"}, "suppress": True}, False),
        ({"match": {"cluster_name": "default/other/https"}, "merge": {}}, False),
    ],
)
def test_the_api_server_is_left_out_unless_matched_by_name(
    override: Object | None, there: bool
) -> None:
    config = {"cluster": {"overrides": [override] if override else []}}
    found = rendered(service("default/kubernetes", port("https", 443)), config=config)
    assert ("default/kubernetes/https" in clusters(found)) == there


# ------------------------------------------------------------------------------------------
# Endpoints

ZONED = (
    endpoint("10.0.0.1", zone="a"),
    endpoint("10.0.0.2", zone="b"),
    endpoint("10.0.0.3", zone="c"),
)
HINTED = (
    endpoint("10.0.0.1", zone="a", hints=["b"]),
    endpoint("10.0.0.2", zone="b", hints=["a"]),
    endpoint("10.0.0.3", zone="c", state="draining"),
)


@pytest.mark.parametrize(
    ("slices", "config", "wanted"),
    [
        pytest.param([], {}, [], id="none"),
        pytest.param([endpoint_slice()], {}, [], id="empty"),
        pytest.param(
            [endpoint_slice("demo/web", endpoint("10.0.0.10"), endpoint("10.0.0.9"))],
            {},
            ["10.0.0.9:8080", "10.0.0.10:8080"],
            id="numeric order",
        ),
        pytest.param(
            [
                endpoint_slice("demo/web", endpoint("10.0.0.1"), ports={"http": 8080}, name="x"),
                endpoint_slice("demo/web", endpoint("10.0.0.2"), ports={"http": 9090}, name="y"),
                endpoint_slice("demo/web", endpoint("10.0.0.3"), ports={"admin": 80}, name="z"),
            ],
            {},
            ["10.0.0.1:8080", "10.0.0.2:9090"],
            id="a named target port differs from pod to pod",
        ),
        pytest.param(
            [
                endpoint_slice(
                    "demo/web",
                    *(endpoint("10.0.0.1", state="ready"), endpoint("10.0.0.2", state="unknown")),
                    *(
                        endpoint("10.0.0.3", state="draining"),
                        endpoint("10.0.0.4", state="unready"),
                    ),
                    endpoint("10.0.0.5", state="terminating"),
                )
            ],
            {},
            ["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080 DRAINING"],
            id="conditions",
        ),
        pytest.param(
            [
                endpoint_slice(
                    "demo/web",
                    *(
                        endpoint("10.0.0.3", state="draining"),
                        endpoint("10.0.0.4", state="unready"),
                    ),
                )
            ],
            {"include_not_ready": True},
            ["10.0.0.3:8080 DRAINING", "10.0.0.4:8080 UNHEALTHY"],
            id="include_not_ready",
        ),
        pytest.param(
            [
                endpoint_slice("demo/web", endpoint("10.0.0.1", state="draining"), name="x"),
                endpoint_slice("demo/web", endpoint("10.0.0.1", zone="a"), name="y"),
                endpoint_slice("demo/web", endpoint("10.0.0.1", zone="b"), name="z"),
            ],
            {},
            ["a/0 10.0.0.1:8080"],
            id="an address seen twice takes its best state",
        ),
        pytest.param(
            [
                endpoint_slice("demo/web", endpoint("fd00::1"), family="IPv6"),
                endpoint_slice("demo/web", endpoint("10.0.0.1")),
            ],
            {},
            ["10.0.0.1:8080"],
            id="IPv4 alone",
        ),
        pytest.param(
            [
                endpoint_slice("demo/web", endpoint("fd00::1"), family="IPv6"),
                endpoint_slice("demo/web", endpoint("10.0.0.1")),
            ],
            {"families": ["ipv4", "ipv6"]},
            ["10.0.0.1:8080", "fd00::1:8080"],
            id="both, IPv4 first",
        ),
        pytest.param(
            [
                endpoint_slice(
                    "demo/web", endpoint("fd00::1"), endpoint("fd00:0::1"), family="IPv6"
                ),
                endpoint_slice("demo/web", endpoint("10.0.0.1")),
            ],
            {"families": ["ipv6"]},
            ["fd00:0::1:8080"],
            id="IPv6 alone, one address in two spellings",
        ),
        pytest.param(
            [endpoint_slice("demo/web", *ZONED)],
            {},
            ["a/0 10.0.0.1:8080", "b/0 10.0.0.2:8080", "c/0 10.0.0.3:8080"],
            id="localities",
        ),
        pytest.param(
            [endpoint_slice("demo/web", *ZONED)],
            {"prefer_zone": "b"},
            ["b/0 10.0.0.2:8080", "a/1 10.0.0.1:8080", "c/1 10.0.0.3:8080"],
            id="prefer_zone",
        ),
        pytest.param(
            [endpoint_slice("demo/web", *ZONED)],
            {"prefer_zone": "d"},
            ["a/0 10.0.0.1:8080", "b/0 10.0.0.2:8080", "c/0 10.0.0.3:8080"],
            id="the own zone is empty",
        ),
        pytest.param(
            [endpoint_slice("demo/web", *HINTED)],
            {"prefer_zone": "b"},
            ["a/0 10.0.0.1:8080", "b/1 10.0.0.2:8080", "c/1 10.0.0.3:8080 DRAINING"],
            id="hints",
        ),
        pytest.param(
            [endpoint_slice("demo/web", *HINTED)],
            {},
            ["a/0 10.0.0.1:8080", "b/0 10.0.0.2:8080", "c/0 10.0.0.3:8080 DRAINING"],
            id="hints count only with prefer_zone",
        ),
        pytest.param(
            [
                endpoint_slice("demo/web", *HINTED),
                endpoint_slice("demo/web", endpoint("10.0.0.9", zone="b"), name="y"),
            ],
            {"prefer_zone": "b"},
            [
                *("b/0 10.0.0.2:8080", "b/0 10.0.0.9:8080"),
                *("a/1 10.0.0.1:8080", "c/1 10.0.0.3:8080 DRAINING"),
            ],
            id="hints count only if every ready endpoint has them",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["eds", "inline"])
def test_endpoints(slices: list[Object], config: Object, wanted: list[str], mode: str) -> None:
    found = rendered(service(), *slices, config={"endpoint": config}, endpoints=mode)
    assert shown(found) == wanted
    assert not found.warnings


@pytest.mark.parametrize(
    ("slices", "warning"),
    [
        (
            [endpoint_slice("demo/web", endpoint("web.example"), family="FQDN")],
            "endpoints of slice web-fqdn are left out: host names, where Envoy needs addresses",
        ),
        (
            [endpoint_slice("demo/web", endpoint("10.0.0.1"), ports={})],
            "endpoints of slice web-ipv4 are left out: it has no ports",
        ),
        (
            [{**endpoint_slice("demo/web", endpoint("10.0.0.1")), "ports": None}],
            "endpoints of slice web-ipv4 are left out: it has no ports",
        ),
        (
            [endpoint_slice("demo/web", endpoint("10.0.0.1"), ports={"http": None})],
            "endpoints of slice web-ipv4 are left out: its port http has no number",
        ),
        (
            [endpoint_slice("demo/web", endpoint("10.0.0.1"), ports={"http": 0})],
            "endpoints of slice web-ipv4 are left out: its port http has no number",
        ),
        (
            [endpoint_slice("demo/web", endpoint("fd00::1"), family="IPv6")],
            "has only ipv6 endpoints, which endpoint.families leaves out",
        ),
    ],
)
def test_what_gives_no_endpoint_is_named(slices: list[Object], warning: str) -> None:
    found = rendered(service(), *slices)
    assert shown(found) == []
    assert found.warnings == (f"service demo/web: {warning}",)


def test_an_unnamed_port_is_joined_with_the_unnamed_one() -> None:
    raw = endpoint_slice("demo/web", endpoint("10.0.0.1"), ports={"": 8080})
    for name in ("", None):
        raw["ports"][0]["name"] = name
        assert shown(rendered(service("demo/web", port("", 80)), raw), "demo/web/80") == [
            "10.0.0.1:8080"
        ]


LEGACY = {
    "metadata": {"namespace": "demo", "name": "web"},
    "subsets": [
        {
            "addresses": [{"ip": "10.0.0.1", "nodeName": "n1"}, {"ip": "fd00::1"}],
            "notReadyAddresses": [{"ip": "10.0.0.2"}],
            "ports": [{"name": "http", "port": 8080}, {"name": "admin", "port": 9000}],
        },
        {"addresses": [{"ip": "10.0.0.3"}], "ports": [{"name": "http", "port": 8081}]},
        {"addresses": None, "ports": None},
    ],
}


def test_legacy_endpoints_serve_a_service_without_slices() -> None:
    config = {"endpoint": {"families": ["ipv4", "ipv6"], "include_not_ready": True}}
    found = rendered(service(), LEGACY, config=config)
    assert shown(found) == [
        *("10.0.0.1:8080", "10.0.0.2:8080 UNHEALTHY", "10.0.0.3:8081", "fd00::1:8080")
    ]
    found = rendered(service(), LEGACY, endpoint_slice("demo/web", endpoint("10.0.0.9")))
    assert shown(found) == ["10.0.0.9:8080"]


@pytest.mark.parametrize(
    ("locality", "wanted"),
    [
        ({}, {"zone": "slice-zone"}),
        (
            {"region": {"label": "topology.kubernetes.io/region"}},
            {"region": "eu", "zone": "slice-zone"},
        ),
        (
            {"zone": {"label": "topology.kubernetes.io/zone"}, "sub_zone": {"node_name": True}},
            {"zone": "eu-1", "sub_zone": "n1"},
        ),
        ({"region": {"literal": "here"}, "zone": {"label": "no/such"}}, {"region": "here"}),
    ],
)
def test_localities(locality: Object, wanted: Object) -> None:
    found = rendered(
        service(),
        endpoint_slice("demo/web", endpoint("10.0.0.1", zone="slice-zone", nodeName="n1")),
        node("n1", zone="eu-1", region="eu"),
        config={"endpoint": {"locality": locality}},
    )
    assert assignment(found, "demo/web/http")["endpoints"][0]["locality"] == wanted


def test_prefer_zone_true_is_the_zone_of_the_own_node() -> None:
    raw = (service(), endpoint_slice("demo/web", *ZONED))
    config = {"endpoint": {"prefer_zone": True}}
    for nodes, wanted in (([node("n1", zone="c")], "c/0"), ([node("n1")], "a/0"), ([], "a/0")):
        found = rendered(*raw, *nodes, config=config, node_name="n1")
        assert shown(found)[0].startswith(wanted)
        assert bool(found.warnings) == (wanted == "a/0")
        assert all("node n1" in warning for warning in found.warnings)
    with pytest.raises(loader.UsageError, match=r"\$\.endpoint\.prefer_zone.*NODE_NAME"):
        renderer(config)
    # It is the zone as the endpoints have it, wherever that comes from.
    racks = {"endpoint": {"prefer_zone": True, "locality": {"zone": {"label": "rack"}}}}
    nodes = [node("n1"), node("n2")]
    for index, each in enumerate(nodes):
        each["metadata"]["labels"] = {"rack": f"r{index}", "topology.kubernetes.io/zone": "z"}
    pods = [endpoint(f"10.0.0.{index + 1}", nodeName=f"n{index + 1}") for index in range(2)]
    found = rendered(
        service(), endpoint_slice("demo/web", *pods), *nodes, config=racks, node_name="n2"
    )
    assert shown(found) == ["r1/0 10.0.0.2:8080", "r0/1 10.0.0.1:8080"]


def test_nodes_are_needed_only_where_they_matter() -> None:
    cases: list[tuple[Object, bool]] = [
        ({}, False),
        ({"endpoint": {"prefer_zone": "a"}}, False),
        ({"endpoint": {"prefer_zone": True}}, True),
        ({"endpoint": {"locality": {"zone": {"label": "x"}}}}, True),
        ({"endpoint": {"locality": {"zone": {"node_name": True}}}}, False),
    ]
    for config, needed in cases:
        assert loader.needs_nodes(loader.config_from(config)) == needed


# ------------------------------------------------------------------------------------------
# DNS


@pytest.mark.parametrize(
    ("raw", "host", "number", "warned"),
    [
        ([service()], "web.demo.svc.cluster.local", 80, True),
        ([service(clusterIP="None")], "web.demo.svc.cluster.local", 8080, False),
        (
            [
                service("demo/web", port("http", 80, "web"), clusterIP="None"),
                endpoint_slice("demo/web", endpoint("10.0.0.1"), ports={"http": 8081}),
            ],
            *("web.demo.svc.cluster.local", 8081, False),
        ),
        ([service(type="ExternalName", externalName="db.example")], "db.example", 80, False),
    ],
)
def test_dns_mode(raw: list[Object], host: str, number: int, warned: bool) -> None:
    found = rendered(*raw, endpoints="dns")
    assert shown(found) == [f"{host}:{number}"]
    assert clusters(found)["demo/web/http"]["type"] == "STRICT_DNS"
    assert clusters(found)["demo/web/http"]["dns_lookup_family"] == "V4_ONLY"
    assert found.clusters == {"eds": 0, "inline": 0, "dns": 1}
    assert bool(found.warnings) == warned


def test_a_target_port_that_nobody_knows_is_named() -> None:
    headless = service("demo/web", port("http", 80, "web"), clusterIP="None")
    found = rendered(headless, endpoints="dns")
    assert shown(found) == []
    assert found.warnings == (
        "service demo/web: the number of its target port web is not known, so there is no endpoint",
    )


@pytest.mark.parametrize("mode", ["auto", "eds", "inline", "dns"])
def test_external_names_are_dns_clusters_in_every_mode(mode: str) -> None:
    raw = service("demo/db", port("tls", 443), type="ExternalName", externalName="db.example.")
    config = {"endpoint": {"external_name": "logical_dns", "families": ["ipv6"]}}
    found = clusters(rendered(raw, endpoints=mode, config=config))["demo/db/tls"]
    assert (found["type"], found["dns_lookup_family"]) == ("LOGICAL_DNS", "V6_ONLY")
    context = found["transport_socket"]["typed_config"]
    assert context["sni"] == "db.example"
    both = {"endpoint": {"families": ["ipv4", "ipv6"]}}
    found = clusters(rendered(raw, endpoints=mode, config=both))["demo/db/tls"]
    assert (found["type"], found["dns_lookup_family"]) == ("STRICT_DNS", "ALL")


def test_an_external_name_without_ports_is_named() -> None:
    raw = service("demo/db", type="ExternalName", externalName="db.example")
    raw["spec"]["ports"] = None
    found = rendered(raw)
    assert clusters(found) == {}
    assert found.warnings == ("service demo/db: has no ports, so there is no cluster",)


# ------------------------------------------------------------------------------------------
# The mode of endpoints


def many(count: int) -> list[Object]:
    return [service(f"demo/s{index:03}") for index in range(count)]


def on_eds(found: loader.Rendering) -> list[str]:
    return [name for name, one in clusters(found).items() if one["type"] == "EDS"]


def test_auto_spends_the_budget_in_order_of_names() -> None:
    raw = many(5)
    random.Random(1).shuffle(raw)
    found = rendered(*raw, endpoints="auto", budget=3)
    assert on_eds(found) == ["demo/s000/http", "demo/s001/http", "demo/s002/http"]
    assert found.inlined == ("demo/s003/http", "demo/s004/http")
    assert found.clusters == {"eds": 3, "inline": 2, "dns": 0}
    assert render(*many(5), endpoints="inline").inlined == ()


def test_files_of_others_use_the_budget_unless_it_is_configured() -> None:
    objects = objects_of(*many(5))
    found = renderer(endpoints="auto", budget=3).render(objects, other_files=2)
    assert len(on_eds(found)) == 1
    config = {"endpoint": {"eds_budget": 2}}
    found = renderer(config, endpoints="auto", budget=30).render(objects, other_files=20)
    assert len(on_eds(found)) == 2
    config = {"endpoint": {"eds_budget": 0}}
    assert on_eds(render(*many(2), endpoints="auto", config=config)) == []


def test_a_cluster_never_flips() -> None:
    translate = renderer(endpoints="auto", budget=2)
    raw = many(4)
    assert on_eds(translate.render(objects_of(*raw))) == ["demo/s000/http", "demo/s001/http"]
    # One goes: what is inline stays so; a new one takes the place.
    assert on_eds(translate.render(objects_of(*raw[1:]))) == ["demo/s001/http"]
    found = translate.render(objects_of(*raw[1:], service("demo/z")))
    assert on_eds(found) == ["demo/s001/http", "demo/z/http"]
    # Names before all others, and more files of others, move nobody.
    found = translate.render(objects_of(service("a/a"), *raw[1:], service("demo/z")), other_files=9)
    assert on_eds(found) == ["demo/s001/http", "demo/z/http"]


@pytest.mark.parametrize("fmt", ["yaml", "json"])
def test_a_restart_keeps_what_the_files_say(fmt: str) -> None:
    raw = many(4)
    config = {"cluster": {"name": 'x:{service} "{port}"'}}
    before = render(*raw, endpoints="auto", budget=2, fmt=fmt, config=config).files
    assert loader.eds_clusters(before) == {'x:s000 "http"', 'x:s001 "http"'}
    assert loader.inline_clusters(before) == {'x:s002 "http"', 'x:s003 "http"'}

    def restarted(*new: Object) -> list[str]:
        kept: dict[str, Any] = {
            "on_eds": loader.eds_clusters(before),
            "on_inline": loader.inline_clusters(before),
        }
        return on_eds(render(*new, endpoints="auto", budget=2, fmt=fmt, config=config, **kept))

    assert restarted(*raw[1:]) == ['x:s001 "http"']
    assert restarted(service("a/a"), *raw[1:]) == ['x:a "http"', 'x:s001 "http"']


def test_a_restart_in_another_mode_starts_afresh() -> None:
    raw = many(4)
    for mode in ("inline", "dns"):
        before = render(*raw, endpoints=mode).files
        kept: dict[str, Any] = {
            "on_eds": loader.eds_clusters(before),
            "on_inline": loader.inline_clusters(before),
        }
        assert len(on_eds(render(*raw, endpoints="auto", budget=2, **kept))) == 2
    # More than the budget would be the end of Envoy.
    kept = {"on_eds": loader.eds_clusters(render(*raw, endpoints="eds").files)}
    assert len(on_eds(render(*raw, endpoints="auto", budget=2, **kept))) == 2
    assert loader.eds_clusters({}) == set()


def test_the_budget_is_a_quarter_of_the_instances(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "max_user_instances"
    monkeypatch.setattr(loader, "MAX_USER_INSTANCES", str(limit))
    assert loader.inotify_budget() == 32
    limit.write_text("8192\n")
    assert loader.inotify_budget() == 2048


# ------------------------------------------------------------------------------------------
# Protocols


def options_of(raw: Object, **options: Any) -> tuple[bool, bool]:
    """Whether a Service's only cluster speaks HTTP/2 and TLS."""
    [cluster] = clusters(rendered(raw, **options)).values()
    http = cluster.get("typed_extension_protocol_options", {}).get(HTTP_OPTIONS, {})
    tls = cluster.get("transport_socket", {}).get("name") == "envoy.transport_sockets.tls"
    return "http2_protocol_options" in http.get("explicit_http_config", {}), tls


@pytest.mark.parametrize(
    ("name", "app_protocol", "wanted"),
    [
        ("x", "http", (False, False)),
        ("x", "HTTPS", (False, True)),
        ("x", "grpc", (True, False)),
        ("x", "GRPCS", (True, True)),
        ("x", "kubernetes.io/h2c", (True, False)),
        ("x", "kubernetes.io/ws", (False, False)),
        ("x", "kubernetes.io/wss", (False, True)),
        ("grpc", "example.com/own", (False, False)),
        ("https", "http", (False, False)),
        ("http", None, (False, False)),
        ("http2", None, (True, False)),
        ("h2c", "", (True, False)),
        ("grpc", None, (True, False)),
        ("grpc-web", None, (True, False)),
        ("https", None, (False, True)),
        ("https-admin", None, (False, True)),
        ("tls", None, (False, True)),
        ("httptls", None, (False, True)),
        ("grpctls", None, (True, True)),
        ("grpcs", None, (True, True)),
        ("grpcx", None, (False, False)),
        ("web-grpc", None, (False, False)),
        ("", None, (False, False)),
    ],
)
def test_protocols(name: str, app_protocol: str | None, wanted: tuple[bool, bool]) -> None:
    assert options_of(service("demo/web", port(name, 80, appProtocol=app_protocol))) == wanted


def test_udp_has_no_http() -> None:
    raw = service("demo/web", port("https", 443, protocol="UDP", appProtocol="https"))
    assert options_of(raw) == (False, False)


def test_tls_verifies_name_and_ca() -> None:
    config = {"cluster": {"trusted_ca": "/ca.pem"}, "cluster_domain": "corp.example"}
    found = clusters(rendered(service("demo/web", port("grpcs", 443)), config=config))
    assert found["demo/web/grpcs"]["transport_socket"]["typed_config"] == {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": "web.demo.svc.corp.example",
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "validation_context": {
                "trusted_ca": {"filename": "/ca.pem"},
                "match_typed_subject_alt_names": [
                    {"san_type": "DNS", "matcher": {"exact": "web.demo.svc.corp.example"}}
                ],
            },
        },
    }


def test_http2_keeps_what_base_says_of_http() -> None:
    def found(base: Object) -> Object:
        config = {"cluster": {"base": {"typed_extension_protocol_options": {HTTP_OPTIONS: base}}}}
        [one] = clusters(rendered(service("demo/x", port("grpc", 1)), config=config)).values()
        options = one["typed_extension_protocol_options"][HTTP_OPTIONS]
        assert options.pop("@type") == f"type.googleapis.com/{HTTP_OPTIONS}"
        assert isinstance(options, dict)
        return options

    kind = {"@type": f"type.googleapis.com/{HTTP_OPTIONS}"}
    idle = {"common_http_protocol_options": {"idle_timeout": "9s"}}
    http2: Object = {"explicit_http_config": {"http2_protocol_options": {}}}
    assert found({**kind, **idle, "auto_config": {}}) == {**idle, **http2}
    assert found({**kind, "use_downstream_protocol_config": {}}) == http2
    assert found({**kind, "explicit_http_config": {"http_protocol_options": {}}}) == http2
    tuned = {"explicit_http_config": {"http2_protocol_options": {"max_concurrent_streams": 9}}}
    assert found({**kind, **tuned}) == tuned


# ------------------------------------------------------------------------------------------
# Base, overrides, merging


def merged(*overrides: Object, base: Object | None = None, **raw: Any) -> Object:
    config = {"cluster": {"base": base or {}, "overrides": list(overrides)}}
    found = clusters(rendered(service("shop/web", **raw), config=config)).get("shop/web/http", {})
    own = ("@type", "name", "type", "eds_cluster_config")
    return {key: value for key, value in found.items() if key not in own}


@pytest.mark.parametrize(
    ("match", "holds"),
    [
        ({"cluster_name": "shop/web/http"}, True),
        ({"cluster_name": "shop/web/https"}, False),
        ({"port_name": "http"}, True),
        ({"port_name": "http", "namespace": "shop"}, True),
        ({"port_name": "http", "namespace": "other"}, False),
        ({"labels": {"app": "web"}}, True),
        ({"labels": {"app": "web", "tier": "front"}}, True),
        ({"labels": {"app": "web", "tier": "back"}}, False),
        ([{"namespace": "other"}, {"port_name": "http"}], True),
        ([{"namespace": "other"}, {"port_name": "grpc"}], False),
    ],
)
def test_matches(match: Any, holds: bool) -> None:
    labels = {"app": "web", "tier": "front"}
    found = merged({"match": match, "merge": {"connect_timeout": "2s"}}, labels=labels)
    assert found == ({"connect_timeout": "2s"} if holds else {})
    config = {"cluster": {"overrides": [{"match": match, "suppress": True}]}}
    assert (clusters(rendered(service("shop/web", labels=labels), config=config)) == {}) == holds


def test_base_then_overrides_in_order() -> None:
    match = {"namespace": "shop"}
    found = merged(
        {"match": match, "merge": {"connect_timeout": "2s", "lb_policy": "RANDOM"}},
        {"match": {"namespace": "other"}, "merge": {"connect_timeout": "3s"}},
        {"match": match, "merge": {"connect_timeout": "4s"}},
        base={"connect_timeout": "1s", "respect_dns_ttl": True},
    )
    assert found == {"connect_timeout": "4s", "respect_dns_ttl": True, "lb_policy": "RANDOM"}


TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
OTHER = f"type.googleapis.com/{HTTP_OPTIONS}"
OTHER_CONFIG: Object = {"@type": OTHER, "auto_config": {}}


@pytest.mark.parametrize(
    ("base", "merge", "wanted"),
    [
        pytest.param(
            {"circuit_breakers": {"thresholds": [{"max_retries": 1}], "per_host_thresholds": []}},
            {"circuit_breakers": {"thresholds": [{"priority": "HIGH", "max_retries": 2}]}},
            {
                "circuit_breakers": {
                    "thresholds": [{"max_retries": 1}, {"priority": "HIGH", "max_retries": 2}],
                    "per_host_thresholds": [],
                }
            },
            id="messages merge, lists append",
        ),
        pytest.param(
            {"ring_hash_lb_config": {"minimum_ring_size": 9}, "lb_policy": "RING_HASH"},
            {"maglev_lb_config": {"table_size": 11}, "lb_policy": "MAGLEV"},
            {"maglev_lb_config": {"table_size": 11}, "lb_policy": "MAGLEV"},
            id="the other member of a oneof goes",
        ),
        pytest.param(
            {"common_lb_config": {"zone_aware_lb_config": {},
                                  "ignore_new_hosts_until_first_hc": True}},
            {"common_lb_config": {"locality_weighted_lb_config": {}}},
            {"common_lb_config": {"locality_weighted_lb_config": {},
                                  "ignore_new_hosts_until_first_hc": True}},
            id="also further down",
        ),
        pytest.param(
            {"transport_socket": {"name": "a", "typed_config": {"@type": TLS, "sni": "x"}}},
            {"transport_socket": {"name": "b", "typed_config": OTHER_CONFIG}},
            {"transport_socket": {"name": "b", "typed_config": OTHER_CONFIG}},
            id="typed_config is replaced whole",
        ),
        pytest.param(
            {"typed_extension_protocol_options": {
                HTTP_OPTIONS: {"@type": f"type.googleapis.com/{HTTP_OPTIONS}", "auto_config": {}},
                "other": {"@type": OTHER}}},
            {"typed_extension_protocol_options": {
                HTTP_OPTIONS: {"@type": f"type.googleapis.com/{HTTP_OPTIONS}"}}},
            {"typed_extension_protocol_options": {
                HTTP_OPTIONS: {"@type": f"type.googleapis.com/{HTTP_OPTIONS}"},
                "other": {"@type": OTHER}}},
            id="so are the values of a map",
        ),
        pytest.param(
            {"metadata": {"filter_metadata": {"a": {"x": 1, "y": 2}, "b": {"z": 3}}}},
            {"metadata": {"filter_metadata": {"a": {"x": 9}}}},
            {"metadata": {"filter_metadata": {"a": {"x": 9}, "b": {"z": 3}}}},
            id="metadata is a map",
        ),
        pytest.param(
            {"outlier_detection": {"consecutive_5xx": 3, "interval": "1s"}},
            {"outlier_detection": {"consecutive_5xx": None, "interval": "2s"}},
            {"outlier_detection": {"consecutive_5xx": 3, "interval": "2s"}},
            id="null says nothing",
        ),
    ],
)  # fmt: skip
def test_merging_is_protobufs(base: Object, merge: Object, wanted: Object) -> None:
    given_base, given_merge = copy.deepcopy((base, merge))
    assert merged({"match": {"port_name": "http"}, "merge": merge}, base=base) == wanted
    assert (base, merge) == (given_base, given_merge)
    # Protobuf itself says the same.
    into, more, both = (
        json_format.ParseDict(each, cluster_pb2.Cluster()) for each in (base, merge, wanted)
    )
    into.MergeFrom(more)
    assert into == both


def test_values_that_do_not_merge_cost_only_the_service() -> None:
    config = {
        "cluster": {
            "base": {"outlier_detection": {"interval": {"seconds": 1}}},
            "overrides": [
                {
                    "match": {"cluster_name": "demo/bad/http"},
                    "merge": {"outlier_detection": {"interval": "1s"}},
                }
            ],
        }
    }
    found = render(service("demo/bad", annotations={"route": "true"}), service(), config=config)
    assert list(clusters(found)) == ["demo/web/http"]
    assert found.warnings == (
        "service demo/bad: is not routed: its port http has no cluster",
        "service demo/bad: port http is left out: outlier_detection.interval: "
        "a value cannot be merged into an object",
    )


def test_the_tables_of_cluster_are_those_of_envoy() -> None:
    """The fields of Cluster, the oneofs that merging meets and the maps, from the descriptors."""
    descriptor = cluster_pb2.Cluster.DESCRIPTOR
    fields = {field.name for field in descriptor.fields}
    assert fields == loader.CLUSTER_FIELDS.keys() | loader.OWN_FIELDS.keys()
    samples: dict[str, Any] = {
        "an object": {},
        "a list": [],
        'a duration such as "1.5s"': "1.5s",
        "a number": 7,
        "true or false": True,
    }
    for name, kind in loader.CLUSTER_FIELDS.items():
        enum = descriptor.fields_by_name[name].enum_type
        sample = samples.get(kind, enum.values[0].name if enum else "text")
        json_format.ParseDict({name: sample}, cluster_pb2.Cluster())
        assert loader.is_field_value(sample, kind)
        wrong = {} if kind != "an object" else "text"
        assert not loader.is_field_value(wrong, kind)

    oneofs: dict[str, set[tuple[str, ...]]] = {}
    maps: set[str] = set()

    def walk(message: Any, path: tuple[str, ...], above: tuple[str, ...]) -> None:
        for oneof in message.oneofs:
            members = tuple(sorted(field.name for field in oneof.fields))
            if len(members) > 1:
                oneofs.setdefault(".".join(path), set()).add(members)
        for field in message.fields:
            below, kind = (*path, field.name), field.message_type
            if below[0] in loader.OWN_FIELDS or kind is None:
                continue
            if kind.GetOptions().map_entry:
                if kind.fields_by_name["value"].message_type:
                    maps.add(".".join(below))
            elif kind.full_name == "google.protobuf.Struct":
                maps.add(".".join(below))
            elif kind.full_name == "google.protobuf.Any":
                assert field.name == "typed_config"
            elif not field.is_repeated and kind.full_name not in above:
                walk(kind, below, (*above, kind.full_name))

    walk(descriptor, (), (descriptor.full_name,))
    assert oneofs.pop("") == {("cluster_type", "type"), tuple(sorted(loader.CLUSTER_ONEOFS[""][0]))}
    ours = {
        path: {tuple(sorted(group)) for group in groups}
        for path, groups in loader.CLUSTER_ONEOFS.items()
    }
    del ours[""]
    assert ours == oneofs
    assert maps == loader.CLUSTER_MAPS


# ------------------------------------------------------------------------------------------
# Configuration


def override(**more: Any) -> Object:
    return {"cluster": {"overrides": [{"match": {"namespace": "x"}, **more}]}}


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ([], "$: an object expected"),
        ({"clusters": {}}, "$.clusters: unknown key (one of cluster, cluster_domain, endpoint, "
                           "route)"),
        ({"a b": 1}, '$["a b"]: unknown key (one of cluster, cluster_domain, endpoint, route)'),
        ({"cluster": None}, "$.cluster: an object expected"),
        ({"cluster": {"nme": "x"}},
         "$.cluster.nme: unknown key (one of base, name, overrides, trusted_ca)"),
        ({"cluster": {"name": 3}}, "$.cluster.name: a string expected"),
        ({"cluster": {"name": ""}}, "$.cluster.name: a string expected"),
        ({"cluster": {"name": "web"}}, "$.cluster.name: every cluster would have this one name"),
        ({"cluster": {"name": "{cluster}/{port}"}},
         "$.cluster.name: {cluster} is none of {namespace}, {service}, {port}"),
        ({"cluster": {"name": "{port}}"}},
         "$.cluster.name: } is none of {namespace}, {service}, {port}"),
        ({"cluster": {"name": "{port}\n"}},
         "$.cluster.name: a character that does not print: '{port}\\n'"),
        ({"cluster": {"trusted_ca": "ca.pem"}}, "$.cluster.trusted_ca: an absolute path expected"),
        ({"cluster": {"base": {"name": "x"}}},
         "$.cluster.base.name: the loader's own: use cluster.name, a template"),
        ({"cluster": {"base": {"type": "EDS"}}},
         "$.cluster.base.type: the loader's own: use --endpoints, or endpoint.external_name for "
         "ExternalName Services"),
        ({"cluster": {"base": {"cluster_type": {}}}},
         "$.cluster.base.cluster_type: the loader's own: use --endpoints, or "
         "endpoint.external_name for ExternalName Services"),
        (override(merge={"load_assignment": {}}),
         "$.cluster.overrides[0].merge.load_assignment: the loader's own: endpoints come from "
         "EndpointSlices, see endpoint"),
        (override(merge={"eds_cluster_config": {}}),
         "$.cluster.overrides[0].merge.eds_cluster_config: the loader's own: use --endpoints, and "
         "--output-dir for the path"),
        ({"cluster": {"base": {"connect_timout": "1s"}}},
         "$.cluster.base.connect_timout: no field of Envoy's Cluster"),
        ({"cluster": {"base": {"connectTimeout": "1s"}}},
         "$.cluster.base.connectTimeout: no field of Envoy's Cluster, here connect_timeout "
         "(names are in snake_case)"),
        ({"cluster": {"base": {"connect_timeout": 1}}},
         '$.cluster.base.connect_timeout: a duration such as "1.5s" expected'),
        ({"cluster": {"base": {"connect_timeout": "1m"}}},
         '$.cluster.base.connect_timeout: a duration such as "1.5s" expected'),
        ({"cluster": {"base": {"health_checks": {}}}},
         "$.cluster.base.health_checks: a list expected"),
        ({"cluster": {"base": {"respect_dns_ttl": 1}}},
         "$.cluster.base.respect_dns_ttl: true or false expected"),
        ({"cluster": {"base": {"ring_hash_lb_config": {}, "maglev_lb_config": {}}}},
         "$.cluster.base: only one of ring_hash_lb_config and maglev_lb_config can be set"),
        ({"cluster": {"base": {"common_lb_config": {"zone_aware_lb_config": {},
                                                    "locality_weighted_lb_config": {}}}}},
         "$.cluster.base.common_lb_config: only one of zone_aware_lb_config and "
         "locality_weighted_lb_config can be set"),
        ({"cluster": {"base": {"transport_socket": {"typed_config": {"sni": "x"}}}}},
         '$.cluster.base.transport_socket.typed_config: an object with "@type" expected'),
        ({"cluster": {"base": {"typed_extension_protocol_options": {"a.b": 1}}}},
         '$.cluster.base.typed_extension_protocol_options["a.b"]: an object with "@type" expected'),
        ({"cluster": {"base": {"outlier_detection": {"x": [1, float("nan")]}}}},
         "$.cluster.base.outlier_detection.x[1]: a finite number expected"),
        ({"cluster": {"base": {"alt_stat_name": "\ud800"}}},
         "$.cluster.base.alt_stat_name: not a Unicode text: '\\ud800'"),
        ({"cluster": {"overrides": {}}}, "$.cluster.overrides: a list expected"),
        ({"cluster": {"overrides": [{"suppress": True}]}},
         "$.cluster.overrides[0]: match is missing: which clusters is it about?"),
        ({"cluster": {"overrides": [{"match": {"port": "x"}, "suppress": True}]}},
         "$.cluster.overrides[0].match.port: unknown key (one of cluster_name, labels, namespace, "
         "port_name)"),
        ({"cluster": {"overrides": [{"match": [{"port_name": 1}], "suppress": True}]}},
         "$.cluster.overrides[0].match[0].port_name: a string expected"),
        ({"cluster": {"overrides": [{"match": [], "suppress": True}]}},
         "$.cluster.overrides[0].match: an empty list matches nothing"),
        ({"cluster": {"overrides": [{"match": {}, "suppress": True}]}},
         "$.cluster.overrides[0].match: one or more of cluster_name, labels, namespace, port_name "
         "expected: what is for every cluster belongs into base"),
        ({"cluster": {"overrides": [{"match": {"labels": {"a": 1}}, "suppress": True}]}},
         "$.cluster.overrides[0].match.labels.a: a string expected"),
        ({"cluster": {"overrides": [{"match": {"labels": {}}, "suppress": True}]}},
         "$.cluster.overrides[0].match.labels: an object of labels expected"),
        (override(), "$.cluster.overrides[0]: one of merge and suppress expected"),
        (override(merge={}, suppress=True),
         "$.cluster.overrides[0]: one of merge and suppress expected"),
        (override(suppress=False),
         "$.cluster.overrides[0].suppress: true expected; leave the override out instead"),
        ({"endpoint": {"eds_budget": -1}},
         "$.endpoint.eds_budget: a whole number of EDS files expected"),
        ({"endpoint": {"eds_budget": True}},
         "$.endpoint.eds_budget: a whole number of EDS files expected"),
        ({"endpoint": {"external_name": "eds"}},
         '$.endpoint.external_name: "strict_dns" or "logical_dns" expected'),
        ({"endpoint": {"include_not_ready": "yes"}},
         "$.endpoint.include_not_ready: true or false expected"),
        ({"endpoint": {"prefer_zone": 1}},
         "$.endpoint.prefer_zone: a zone, true or false expected"),
        ({"endpoint": {"families": []}},
         '$.endpoint.families: "ipv4", "ipv6" or both expected, once each'),
        ({"endpoint": {"families": ["ipv4", "ipv4"]}},
         '$.endpoint.families: "ipv4", "ipv6" or both expected, once each'),
        ({"endpoint": {"families": "ipv4"}}, "$.endpoint.families: a list expected"),
        ({"endpoint": {"locality": {"rack": {}}}},
         "$.endpoint.locality.rack: unknown key (one of region, sub_zone, zone)"),
        ({"endpoint": {"locality": {"zone": {}}}},
         "$.endpoint.locality.zone: one of label, literal and node_name expected"),
        ({"endpoint": {"locality": {"zone": {"label": "x", "literal": "y"}}}},
         "$.endpoint.locality.zone: one of label, literal and node_name expected"),
        ({"endpoint": {"locality": {"zone": {"node_name": False}}}},
         "$.endpoint.locality.zone.node_name: true expected"),
        ({"endpoint": {"locality": {"zone": {"label": ""}}}},
         "$.endpoint.locality.zone.label: a string expected"),
        ({"route": {"prefix": "/"}},
         "$.route.prefix: unknown key (one of annotation_prefix, name, suffix)"),
        ({"route": {"suffix": "a..b"}}, "$.route.suffix: not a DNS name: a..b"),
        ({"route": {"annotation_prefix": "a/b"}},
         "$.route.annotation_prefix: not a DNS name: a/b"),
        ({"cluster_domain": 1}, "$.cluster_domain: a DNS name expected"),
    ],
)  # fmt: skip
def test_config_errors_name_the_path(document: object, error: str) -> None:
    with pytest.raises(loader.UsageError) as caught:
        loader.config_from(document)
    assert str(caught.value) == f"--config: {error}"


def test_the_whole_configuration_is_taken() -> None:
    """The example of the documentation, with every key there is."""
    document = {
        "cluster": {
            "name": "{namespace}/{service}/{port}",
            "base": {"connect_timeout": "1s"},
            "overrides": [
                {
                    "match": {"port_name": "grpc", "namespace": "shop"},
                    "merge": {"lb_policy": "LEAST_REQUEST"},
                },
                {"match": {"cluster_name": "shop/legacy/http"}, "suppress": True},
            ],
            "trusted_ca": "/etc/ssl/certs/ca-certificates.crt",
        },
        "endpoint": {
            "include_not_ready": False,
            "families": ["ipv4"],
            "eds_budget": 64,
            "prefer_zone": True,
            "external_name": "strict_dns",
            "locality": {
                "region": {"label": "topology.kubernetes.io/region"},
                "zone": {"literal": "a"},
                "sub_zone": {"node_name": True},
            },
        },
        "route": {
            "name": "services",
            "suffix": "cluster.local",
            "annotation_prefix": "xds-loader",
        },
        "cluster_domain": "cluster.local",
    }
    config = loader.config_from(document)
    assert config.eds_budget == 64
    assert config.zone == loader.LocalityPart("literal", "a")
    assert loader.config_from({}) == loader.Config()
    assert loader.config_from({"cluster": {}, "endpoint": {}, "route": {}}) == loader.Config()


def test_a_key_that_is_there_twice_is_an_error() -> None:
    text = '{"cluster": {"name": "{port}", "name": "{service}"}}'
    with pytest.raises(loader.UsageError, match='the key "name" is there twice'):
        json.loads(text, object_pairs_hook=loader.unique_keys)


# ------------------------------------------------------------------------------------------
# Routes


def routed(name: str = "demo/web", *ports: Object, **annotations: str) -> Object:
    return service(name, *ports, annotations=annotations)


WEB = "web.demo.svc.cluster.local"


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        pytest.param([service()], {}, id="no annotation, no route"),
        pytest.param([routed(route="false")], {}, id="false"),
        pytest.param([routed(route="false", hosts="x")], {}, id="false switches off"),
        pytest.param(
            [routed(route="true")], {f"{WEB}, {WEB}:*": ["/ -> demo/web/http"]}, id="the default"
        ),
        pytest.param(
            [routed(hosts="B.example, a.EXAMPLE,,a.example")],
            {
                "a.example, a.example:*": ["/ -> demo/web/http"],
                "b.example, b.example:*": ["/ -> demo/web/http"],
            },
            id="hosts, lower case, each once",
        ),
        pytest.param(
            [routed(hosts="*, *.example, *-x.example, x.*, under_score.x")],
            {
                "*": ["/ -> demo/web/http"],
                "*-x.example": ["/ -> demo/web/http"],
                "*.example": ["/ -> demo/web/http"],
                "under_score.x, under_score.x:*": ["/ -> demo/web/http"],
                "x.*": ["/ -> demo/web/http"],
            },
            id="wildcards",
        ),
        pytest.param(
            [
                routed("demo/a", hosts="h", prefix="/"),
                routed("demo/b", hosts="h", prefix="/api"),
                routed("demo/c", hosts="h", prefix="/api/v2/"),
                routed("demo/d", hosts="h", prefix="/app"),
            ],
            {
                "h, h:*": [
                    *("/api/v2/ -> demo/c/http", "/api -> demo/b/http"),
                    *("/app -> demo/d/http", "/ -> demo/a/http"),
                ]
            },
            id="from most to least specific",
        ),
        pytest.param(
            [
                routed("demo/b", hosts="h", weight="10"),
                routed("demo/a", hosts="h", weight="90"),
                routed("demo/c", hosts="h"),
                routed("demo/d", hosts="h", weight="0"),
            ],
            {
                "h, h:*": [
                    "/ -> demo/a/http=90, demo/b/http=10, demo/c/http=1, demo/d/http=0",
                ]
            },
            id="weights",
        ),
        pytest.param(
            [routed("demo/a", port("grpc", 9000), hosts="h", grpc="x.v1.Greeter, Health")],
            {"h, h:*": ["/x.v1.Greeter/ -> demo/a/grpc", "/Health/ -> demo/a/grpc"]},
            id="gRPC services",
        ),
        pytest.param(
            [routed("demo/a", port("grpc", 9000), hosts="h", grpc="Health", prefix="/x")],
            {"h, h:*": ["/Health/ -> demo/a/grpc", "/x -> demo/a/grpc"]},
            id="gRPC services and a prefix",
        ),
        pytest.param(
            [routed("demo/a", port("metrics", 9000), port("http", 80), route="true")],
            {"a.demo.svc.cluster.local, a.demo.svc.cluster.local:*": ["/ -> demo/a/http"]},
            id="the first HTTP port",
        ),
        pytest.param(
            [routed("demo/a", port("metrics", 9000), port("http", 80), hosts="h", port="metrics")],
            {"h, h:*": ["/ -> demo/a/metrics"], "h:80": ["/ -> demo/a/http"]},
            id="port by name, the HTTP port by its number",
        ),
        pytest.param(
            [routed("demo/a", port("x", 9000), port("y", 81), hosts="h", port="81")],
            {"h, h:*": ["/ -> demo/a/y"]},
            id="port by number",
        ),
        pytest.param(
            [
                routed("demo/a", port("http", 80), port("http-x", 81), hosts="h"),
                routed("demo/b", port("http", 80), hosts="h", weight="3"),
                routed("demo/c", port("http-c", 81), hosts="h", prefix="/c"),
                routed("demo/d", port("http", 80), hosts="h", prefix="/d"),
            ],
            {
                "h, h:*": [
                    *("/c -> demo/c/http-c", "/d -> demo/d/http"),
                    "/ -> demo/a/http=1, demo/b/http=3",
                ],
                "h:81": [
                    *("/c -> demo/c/http-c", "/d -> demo/d/http"),
                    "/ -> demo/a/http-x",
                ],
            },
            id="a further HTTP port",
        ),
        pytest.param(
            [routed("demo/a", port("http", 80), port("https", 443), hosts="*.x, y.*, *")],
            {
                "*": ["/ -> demo/a/http"],
                "*.x": ["/ -> demo/a/http"],
                "*.x:443": ["/ -> demo/a/https"],
                "y.*": ["/ -> demo/a/http"],
            },
            id="further ports of wildcards",
        ),
    ],
)
def test_routes(raw: list[Object], wanted: dict[str, list[str]]) -> None:
    found = rendered(*raw)
    assert routes(found) == wanted
    assert not found.warnings
    domains = [domain for key in wanted for domain in key.split(", ")]
    assert len(set(domains)) == len(domains)


@pytest.mark.parametrize(
    ("raw", "wanted", "warning"),
    [
        ([routed(hosts="good, bad host")], {"good, good:*": ["/ -> demo/web/http"]},
         "service demo/web: xds-loader/hosts: left out: 'bad host' is no host name"),
        ([routed(hosts="x:80")], {}, "'x:80' is no host name (without a port"),
        ([routed(hosts="a\nb")], {}, "'a\\nb' is no host name"),
        ([routed(hosts="a*b")], {}, "'a*b' is no host name"),
        ([routed(hosts="*.a.*")], {}, "'*.a.*' is no host name"),
        ([routed(hosts="a..b")], {}, "'a..b' is no host name"),
        ([routed(hosts="ä.example")], {}, "'\\xe4.example' is no host name"),
        ([routed(hosts="a" * 254)], {}, "is no host name"),
        ([routed(prefix="x")], {}, "is not routed: xds-loader/prefix: not the beginning of a path"),
        ([routed(prefix="/x\ny")], {}, "not the beginning of a path: '/x\\ny'"),
        ([routed(prefix="/x?y=1")], {}, "not the beginning of a path: '/x?y=1'"),
        ([routed(grpc="a/b")], {}, "xds-loader/grpc: not the name of a gRPC service: 'a/b'"),
        ([routed(weight="-1")], {}, "xds-loader/weight: a whole number up to 4294967295 expected"),
        ([routed(weight="1.5")], {}, "a whole number up to 4294967295 expected: '1.5'"),
        ([routed(weight="4294967296")], {}, "a whole number up to 4294967295 expected"),
        ([routed(weight="²")], {}, "a whole number up to 4294967295 expected"),
        ([routed(route="yes")], {}, "xds-loader/route: true or false expected: 'yes'"),
        ([routed(port="admin")], {}, "xds-loader/port: the Service has no TCP port 'admin'"),
        ([routed("demo/web", port("a", 1), port("b", 2), route="true")], {},
         "which of its ports is HTTP? Say so by appProtocol or by xds-loader/port"),
        ([routed("demo/web", port("a", 1, protocol="UDP"), route="true")], {},
         "which of its ports is HTTP?"),
        ([routed(hosts="h", weight="0")], {"h, h:*": []},
         "service demo/web: h/ has no route: all weights are 0"),
        ([routed("demo/a", hosts="h", weight="4294967295"), routed("demo/b", hosts="h")],
         {"h, h:*": ["/ -> demo/a/http"]},
         "service demo/b: is not routed at h/: with it the weights sum up to more than 4294967295"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_annotations_costs_only_the_service(
    raw: list[Object], wanted: dict[str, list[str]], warning: str
) -> None:
    found = rendered(*raw, routed("demo/good", hosts="fine"))
    fine = {"fine, fine:*": ["/ -> demo/good/http"]}
    assert routes(found) == dict(sorted({**fine, **wanted}.items()))
    [given_warning] = found.warnings
    assert warning in given_warning
    assert "\n" not in given_warning


def test_a_route_needs_its_cluster() -> None:
    config = {"cluster": {"overrides": [{"match": {"port_name": "http"}, "suppress": True}]}}
    found = rendered(routed(route="true"), config=config)
    assert routes(found) == {}
    assert found.warnings == ("service demo/web: is not routed: its port http has no cluster",)
    found = rendered(
        routed("a/web", hosts="a"),
        routed("b/web", port("http", 80), port("https", 443), hosts="b"),
        config={"cluster": {"name": "{service}/{port}"}},
    )
    assert routes(found) == {"a, a:*": ["/ -> web/http"]}
    assert "service b/web: is not routed: it has no cluster of its own" in found.warnings


def test_prefix_suffix_and_name_are_configurable() -> None:
    config = {"route": {"annotation_prefix": "x.io", "suffix": "corp", "name": "all"}}
    raw = service(annotations={"x.io/route": "true", "xds-loader/hosts": "not-mine"})
    found = rendered(raw, config=config)
    assert list(routes(found)) == ["web.demo.svc.corp, web.demo.svc.corp:*"]
    assert r.resources(found, "rds.yaml")[0]["name"] == "all"


# ------------------------------------------------------------------------------------------
# Raw objects


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"metadata": {"namespace": "../x", "name": "web"}}, "namespace: not a DNS label"),
        ({"metadata": {"namespace": "demo", "name": "a/b"}}, "name: not a DNS label"),
        ({"metadata": {"namespace": "demo", "name": "a\n"}}, "name: not a DNS label"),
        ({"metadata": None}, "namespace: not a DNS label"),
        ({"metadata": []}, "metadata: dict expected, not list"),
        ({"spec": {"ports": {}}}, "ports: list expected, not dict"),
        ({"spec": {"ports": [7]}}, r"ports\[0\]: dict expected, not int"),
        ({"spec": {"ports": [{"port": "80"}]}}, "port: int expected, not str"),
        ({"spec": {"ports": [{"port": True}]}}, "port: int expected, not bool"),
        ({"spec": {"ports": [{"port": 70000}]}}, "port: a port is between 1 and 65535, not 70000"),
        ({"spec": {"ports": [{"name": "x"}]}}, "port: a Service port needs a number"),
        ({"spec": {"ports": [{"name": "../x", "port": 1}]}}, "name: not a port name"),
        ({"spec": {"ports": [{"port": 1, "targetPort": -1}]}}, "targetPort: a port is between"),
        ({"spec": {"type": "ExternalName", "externalName": "a b"}}, "externalName: not a DNS name"),
        ({"spec": {"type": "ExternalName"}}, "externalName: not a DNS name"),
        ({"spec": {"clusterIP": "\ud800"}}, "clusterIP: not a Unicode text"),
    ],
)
def test_a_malformed_service_is_refused(change: Object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        loader.service_from({**service(), **change})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"addressType": "IPX"}, "addressType: not IPv4, IPv6 or FQDN"),
        ({"endpoints": [{"addresses": ["10.0.0"]}]}, "addresses: not an ipv4 address: '10.0.0'"),
        ({"endpoints": [{"addresses": ["fd00::1"]}]}, "addresses: not an ipv4 address"),
        ({"endpoints": [{"addresses": [7]}]}, "addresses: not an ipv4 address: 7"),
        ({"endpoints": [{"addresses": ["\0"]}]}, "addresses: not an ipv4 address"),
        ({"endpoints": [{"conditions": {"ready": "no"}}]}, "ready: bool expected, not str"),
        ({"endpoints": [{"zone": 3}]}, "zone: str expected, not int"),
        ({"ports": [{"port": 65536}]}, "port: a port is between"),
    ],
)
def test_a_malformed_slice_is_refused(change: Object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        loader.endpointslice_from({**endpoint_slice(), **change})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["metadata", "spec", "name", "namespace", "labels", "ports", "port",
                         "endpoints", "addresses", "conditions", "subsets", "ip", "x"]),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(ANYTHING)
def test_anything_is_reduced_or_refused(raw: Any) -> None:
    for reduce in (
        *(loader.service_from, loader.endpointslice_from),
        *(loader.endpoints_from, loader.node_from),
    ):
        said = "no error"
        try:
            reduce(raw)
        except ValueError as error:
            said = str(error)
        assert said
        assert "\n" not in said


CONFIG_KEYS = st.sampled_from(
    ["cluster", "endpoint", "route", "base", "overrides", "match", "merge", "name", "families",
     "locality", "zone", "label", "prefer_zone", "transport_socket", "typed_config", "x"]
)  # fmt: skip


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CONFIG_KEYS, inner, max_size=4),
        max_leaves=12,
    )
)
def test_any_configuration_is_taken_or_refused(document: Any) -> None:
    config, said = None, "--config: $"
    try:
        config = loader.config_from(document)
    except loader.UsageError as error:
        said = str(error)
    assert said.startswith("--config: $")
    assert "\n" not in said
    if config is not None:
        loader.Renderer(
            config, endpoints="auto", fmt="json", current_dir="/x", node_name="n", budget=1
        ).render(objects_of(service(), endpoint_slice()))


# ------------------------------------------------------------------------------------------
# Properties


STATES = ("ready", "draining", "terminating", "unready", "unknown")


@st.composite
def inventories(draw: st.DrawFn) -> list[Object]:
    """Some Services, each with endpoints, a third of them in slices more than once."""
    raw: list[Object] = []
    for index in range(draw(st.integers(1, 4))):
        name = f"ns{index % 2}/s{index}"
        chosen = draw(st.sets(st.sampled_from(["http", "grpc", "https", "x"]), min_size=1))
        ports = [port(each, 80 + len(each), each) for each in sorted(chosen)]
        hosts = draw(st.sampled_from(["", "h", "h, g", "*.x, h"]))
        weight = draw(st.sampled_from(["0", "1", "7"]))
        routed = {"route": "true", "hosts": hosts, "weight": weight}
        raw.append(service(name, *ports, annotations=routed if hosts else {}))
        for number in range(draw(st.integers(0, 3))):
            endpoints = [
                endpoint(
                    f"10.0.{index}.{draw(st.integers(1, 5))}",
                    state=draw(st.sampled_from(STATES)),
                    zone=draw(st.sampled_from(["", "a", "b"])),
                    hints=draw(st.sampled_from([[], ["a"]])),
                )
                for _ in range(draw(st.integers(0, 4)))
            ]
            mapping: dict[str, int | None] = {each: 8000 + len(each) for each in sorted(chosen)}
            raw.append(endpoint_slice(name, *endpoints, ports=mapping, name=f"s{index}-{number}"))
    return raw


def resliced(raw: list[Object], chance: random.Random) -> list[Object]:
    """The same objects in another order, each slice cut in two that overlap, ports shuffled."""
    found = []
    for obj in copy.deepcopy(raw):
        if "endpoints" not in obj:
            found.append(obj)
            continue
        endpoints = obj["endpoints"]
        chance.shuffle(endpoints)
        chance.shuffle(obj["ports"])
        cut, overlap = chance.randint(0, len(endpoints)), chance.randint(0, 2)
        for part, chosen in (("a", endpoints[: cut + overlap]), ("b", endpoints[cut:])):
            metadata = {**obj["metadata"], "name": f"{part}-{obj['metadata']['name']}"}
            found.append({**obj, "metadata": metadata, "endpoints": chosen})
    chance.shuffle(found)
    return found


@settings(max_examples=40, deadline=None)
@given(inventories(), st.randoms(use_true_random=False), st.sampled_from(["auto", "inline", "dns"]))
def test_order_and_slicing_change_no_byte(
    raw: list[Object], chance: random.Random, mode: str
) -> None:
    options: dict[str, Any] = {
        "endpoints": mode,
        "budget": 2,
        "config": {"endpoint": {"prefer_zone": "a", "include_not_ready": True}},
    }
    one = rendered(*raw, **options)
    two = render(*resliced(raw, chance), **options)
    assert one.files == two.files
    assert one.warnings == two.warnings
    assert one.inlined == two.inlined


@settings(max_examples=40, deadline=None)
@given(inventories(), inventories(), st.sampled_from(["eds", "inline"]))
def test_a_translator_that_saw_other_things_renders_the_same(
    before: list[Object], raw: list[Object], mode: str
) -> None:
    used = renderer(endpoints=mode)
    used.render(objects_of(*before))
    assert used.render(objects_of(*raw)) == render(*raw, endpoints=mode)


# ------------------------------------------------------------------------------------------
# What changes


def test_a_change_renders_what_changed_and_no_more() -> None:
    services = [routed(f"demo/s{index}", hosts=f"h{index}") for index in range(4)]
    slices = [endpoint_slice(f"demo/s{index}", endpoint("10.0.0.1")) for index in range(4)]
    translate, objects = renderer(), objects_of(*services, *slices)
    first = translate.render(objects)

    def changed(**new: Any) -> set[str]:
        nonlocal objects, first
        parts = {name: {**getattr(objects, name), **values} for name, values in new.items()}
        objects = objects._replace(**parts)
        found, before = translate.render(objects), first
        first = found
        return {
            path
            for path in {*found.files, *before.files}
            if found.files.get(path) is not before.files.get(path)
        }

    assert changed() == set()
    moved = endpoint_slice("demo/s1", endpoint("10.0.0.2"))
    assert changed(slices={("demo", "s1-ipv4"): loader.endpointslice_from(moved)}) == {
        "eds/demo_s1_http.yaml"
    }
    # The same again, as after a relist.
    again = objects_of(*services, *slices)
    assert changed(services=again.services) == set()
    weighed = loader.service_from(routed("demo/s2", hosts="h2, h3", weight="3"))
    assert changed(services={("demo", "s2"): weighed}) == {"rds.yaml"}
    renamed = loader.service_from(service("demo/s3", port("web", 80)))
    assert changed(services={("demo", "s3"): renamed}) == {
        *("cds.yaml", "rds.yaml", "eds/demo_s3_http.yaml", "eds/demo_s3_web.yaml")
    }


def test_a_slice_may_change_hands() -> None:
    raw = [service("demo/a"), service("demo/b")]
    one = endpoint_slice("demo/a", endpoint("10.0.0.1"), name="x")
    two = endpoint_slice("demo/b", endpoint("10.0.0.1"), name="x")
    translate = renderer()
    for slices, owners in (([one], "a"), ([two], "b"), ([one], "a"), ([], "")):
        found = translate.render(objects_of(*raw, *slices))
        assert [name for name in "ab" if shown(found, f"demo/{name}/http")] == list(owners)


def test_a_node_that_changes_moves_its_endpoints() -> None:
    config = {"endpoint": {"locality": {"zone": {"label": "topology.kubernetes.io/zone"}}}}
    raw = [service("demo/a"), service("demo/b")]
    for index, name in enumerate(("demo/a", "demo/b")):
        raw.append(endpoint_slice(name, endpoint("10.0.0.1", nodeName=f"n{index}")))
    translate = renderer(config)
    one = translate.render(objects_of(*raw, node("n0", zone="x"), node("n1", zone="x")))
    two = translate.render(objects_of(*raw, node("n0", zone="x"), node("n1", zone="y")))
    assert shown(two, "demo/b/http") == ["y/0 10.0.0.1:8080"]
    assert two.files["eds/demo_a_http.yaml"] is one.files["eds/demo_a_http.yaml"]
    three = translate.render(objects_of(*raw))
    assert shown(three, "demo/a/http") == ["10.0.0.1:8080"]


def test_a_store_that_is_changed_in_place_is_seen() -> None:
    translate, objects = renderer(), objects_of(service())
    translate.render(objects)
    key = ("demo", "other")
    objects.services[key] = loader.service_from(service("demo/other"))  # type: ignore[index]
    assert list(clusters(translate.render(objects))) == ["demo/other/http", "demo/web/http"]


# ------------------------------------------------------------------------------------------
# YAML

TRICKY = (
    *(
        "",
        "yes",
        "No",
        "on",
        "OFF",
        "y",
        "N",
        "true",
        "null",
        "~",
        "NaN",
        ".inf",
        "1",
        "-1",
        "0x1F",
    ),
    *("1e3", "1.5", "1_000", "0o17", "12:30:45", "2001-01-01", "=", "<<", "!x", "&x", "*x", "@x"),
    *("a: b", "a:b", "a #b", "#a", "- a", "-", "?", "[a]", "{a}", "%x", "`x", "|", ">", "'", '"'),
    *(" a", "a ", "\ta", "a\n", "a\nb", "a\r\nb", "\x00", "\x1b", "\x7f", "\x85", "\xa0", "\u2028"),
    *(
        "\ufeff",
        "\ufffe",
        "ä",
        "日本",
        "😀",
        "\\",
        "\\n",
        "a\\",
        "1s",
        "0.25s",
        "10.0.0.1",
        "fd00::1",
    ),
)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(TRICKY)
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text() | st.sampled_from(TRICKY), inner, max_size=4)
    ),
    max_leaves=20,
)


def emitted(value: Any) -> str:
    lines: list[str] = []
    loader.yaml_lines(value, "", lines)
    return "".join(f"{line}\n" for line in lines)


@settings(max_examples=100, deadline=None)
@given(st.lists(DOCUMENTS, min_size=1) | st.dictionaries(st.text(), DOCUMENTS, min_size=1))
def test_yaml_means_what_json_means(value: Any) -> None:
    assert yaml.safe_load(emitted(value)) == value
    assert yaml.load(emitted(value), yaml.CSafeLoader) == value


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_strings_stay_strings(text: str) -> None:
    """In every place of a document, and to a YAML 1.1 parser too."""
    value = {text: [text, [text], {text: text}]}
    assert yaml.safe_load(emitted(value)) == value


def test_yaml_that_a_person_likes_to_read() -> None:
    value = {
        "a": 1,
        "list": [{"x": "1s", "z": [1, [2, 3]]}, {}, [], "10.0.0.1"],
        "empty": {},
        "text": "two words",
        "e": 1e16,
    }
    assert emitted(value) == (
        "a: 1\n"
        "list:\n"
        "- x: 1s\n"
        "  z:\n"
        "  - 1\n"
        "  - - 2\n"
        "    - 3\n"
        "- {}\n"
        "- []\n"
        "- 10.0.0.1\n"
        "empty: {}\n"
        'text: "two words"\n'
        "e: 1.0e+16\n"
    )


def test_a_thousand_services_are_rendered_in_no_time() -> None:
    """Bounds with a wide margin; the figures are in the benchmark."""
    import time

    raw = many(1000)
    pods = [
        endpoint_slice(
            f"demo/s{index:03}",
            *(endpoint(f"10.{index // 250}.{index % 250}.{pod}") for pod in range(1, 11)),
        )
        for index in range(1000)
    ]
    objects = objects_of(*raw, *pods)
    translate = renderer(endpoints="inline")
    start = time.process_time()
    translate.render(objects)
    assert time.process_time() - start < 3
    costs = []
    for index in range(10):
        moved = endpoint_slice(f"demo/s{index:03}", endpoint("10.9.9.9"))
        slices = {**objects.slices, ("demo", f"s{index:03}-ipv4"): loader.endpointslice_from(moved)}
        start = time.process_time()
        translate.render(objects._replace(slices=slices))
        costs.append(time.process_time() - start)
    assert min(costs) < 0.1


def test_every_mode_and_format_together() -> None:
    raw = [
        service("demo/a", port("http", 80), port("grpcs", 443), annotations={"route": "true"}),
        service("demo/b", port("https", 443), type="ExternalName", externalName="b.example"),
        endpoint_slice("demo/a", *HINTED, ports={"http": 80, "grpcs": 443}),
    ]
    for mode, external in itertools.product(
        ("auto", "eds", "inline", "dns"), ("strict_dns", "logical_dns")
    ):
        config = {
            "cluster": {"base": {"connect_timeout": "1s"}},
            "endpoint": {"external_name": external, "prefer_zone": "a"},
        }
        found = rendered(*raw, endpoints=mode, config=config)
        assert sum(found.clusters.values()) == 3

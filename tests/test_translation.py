"""Services, EndpointSlices and Nodes become clusters, load assignments and routes.

Every rendering of this file is also read with Envoy's own message types (`rendered`).
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import loader
from tests.conftest import RunLoader
from tests.support import rendering as r
from tests.support.apiserver import ApiServer
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
    rendered,
    renderer,
    routed,
    routes,
    seconds,
    service,
    shown,
)

HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def counted() -> dict[str, int]:
    """How many clusters of each mode were rendered last, as the metrics say it."""
    pattern = r'^xds_loader_clusters\{endpoints="(\w+)"\} (\d+)$'
    found = re.findall(pattern, loader.metrics.render(), re.M)
    return {mode: int(count) for mode, count in found}


# ------------------------------------------------------------------------------------------
# Clusters


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
    one = render(service(), endpoint_slice("demo/web", endpoint("10.0.0.1")))
    more = render(service(), endpoint_slice("demo/web", endpoint("10.0.0.1"), endpoint("10.0.0.2")))
    assert more.files["cds.yaml"] == one.files["cds.yaml"]
    path = "eds/demo_web_http.yaml"
    assert more.files[path].content.splitlines()[2] != one.files[path].content.splitlines()[2]
    for fmt in ("yaml", "json"):
        versions = {
            r.content_of(f"x.{fmt}", loader.file_of(content, ""))["version_info"]
            for content in (
                loader.discovery_response(fmt, "# one\n", "t", [loader.element(fmt, {"a": 1})]),
                loader.discovery_response(fmt, "# other\n", "t", [loader.element(fmt, {"a": 1})]),
            )
        }
        assert len(versions) == 1


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
        "service b/web: port http is left out: service a/web has a cluster named web/http",
    )


def test_a_name_of_clusters_belongs_to_the_oldest_service_and_its_first_port() -> None:
    config = {"cluster": {"name": "{service}"}}
    young = routed("a/web", created="2025")
    old = routed("b/web", port("http", 80), port("admin", 81), created="2024")
    found = rendered(young, old, config=config)
    assert list(clusters(found)) == ["web"]
    assert "eds/b_web_http.yaml" in found.files
    assert found.warnings == (
        "service a/web: port http is left out: service b/web has a cluster named web",
        "service b/web: port admin is left out: service b/web has a cluster named web",
    )


def test_sctp_is_skipped_and_named_and_udp_has_udp_addresses() -> None:
    found = rendered(
        service("demo/dns", port("dns", 53, 5353, protocol="UDP"), port("x", 9, protocol="SCTP")),
        endpoint_slice("demo/dns", endpoint("10.0.0.1"), ports={"dns": 5353, "x": 9}),
    )
    assert list(clusters(found)) == ["demo/dns/dns"]
    assert found.warnings == (
        "service demo/dns: port 'x' is left out: the first 256 TCP and UDP ports are rendered",
    )
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


def web(*endpoints: Object, **more: Any) -> Object:
    """A slice of demo/web."""
    return endpoint_slice("demo/web", *endpoints, **more)


ENDPOINTS: dict[str, tuple[list[Object], Object, list[str]]] = {
    "empty": ([endpoint_slice()], {}, []),
    "numeric order": (
        [web(endpoint("10.0.0.10"), endpoint("10.0.0.9"))],
        {},
        ["10.0.0.9:8080", "10.0.0.10:8080"],
    ),
    "a named target port differs from pod to pod": (
        [
            web(endpoint("10.0.0.1"), ports={"http": 8080}, name="x"),
            web(endpoint("10.0.0.2"), ports={"http": 9090}, name="y"),
            web(endpoint("10.0.0.3"), ports={"admin": 80}, name="z"),
        ],
        {},
        ["10.0.0.1:8080", "10.0.0.2:9090"],
    ),
    "conditions": (
        [
            web(
                endpoint("10.0.0.1", state="ready"),
                endpoint("10.0.0.2", state="unknown"),
                endpoint("10.0.0.3", state="draining"),
                endpoint("10.0.0.4", state="unready"),
                endpoint("10.0.0.5", state="terminating"),
            )
        ],
        {},
        ["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080 DRAINING"],
    ),
    "include_not_ready": (
        [web(endpoint("10.0.0.3", state="draining"), endpoint("10.0.0.4", state="unready"))],
        {"include_not_ready": True},
        ["10.0.0.3:8080 DRAINING", "10.0.0.4:8080 UNHEALTHY"],
    ),
    "an address seen twice takes its best state": (
        [
            web(endpoint("10.0.0.1", state="draining"), name="x"),
            web(endpoint("10.0.0.1", zone="a"), name="y"),
            web(endpoint("10.0.0.1", zone="b"), name="z"),
        ],
        {},
        ["a/0 10.0.0.1:8080"],
    ),
    "IPv6 alone, one address in two spellings": (
        [web(endpoint("fd00::1"), endpoint("fd00:0::1"), family="IPv6"), web(endpoint("10.0.0.1"))],
        {"families": ["ipv6"]},
        ["fd00:0::1:8080"],
    ),
    "prefer_zone": (
        [web(*ZONED)],
        {"prefer_zone": "b"},
        ["b/0 10.0.0.2:8080", "a/1 10.0.0.1:8080", "c/1 10.0.0.3:8080"],
    ),
    "the own zone is empty": (
        [web(*ZONED)],
        {"prefer_zone": "d"},
        ["a/0 10.0.0.1:8080", "b/0 10.0.0.2:8080", "c/0 10.0.0.3:8080"],
    ),
    "hints": (
        [web(*HINTED)],
        {"prefer_zone": "b"},
        ["a/0 10.0.0.1:8080", "b/1 10.0.0.2:8080", "c/1 10.0.0.3:8080 DRAINING"],
    ),
    "hints count only with prefer_zone": (
        [web(*HINTED)],
        {},
        ["a/0 10.0.0.1:8080", "b/0 10.0.0.2:8080", "c/0 10.0.0.3:8080 DRAINING"],
    ),
    "hints count only if every ready endpoint has them": (
        [web(*HINTED), web(endpoint("10.0.0.9", zone="b"), name="y")],
        {"prefer_zone": "b"},
        [
            *("b/0 10.0.0.2:8080", "b/0 10.0.0.9:8080"),
            *("a/1 10.0.0.1:8080", "c/1 10.0.0.3:8080 DRAINING"),
        ],
    ),
}


@pytest.mark.parametrize(("slices", "config", "wanted"), ENDPOINTS.values(), ids=ENDPOINTS)
@pytest.mark.parametrize("mode", ["eds", "inline"])
def test_endpoints(slices: list[Object], config: Object, wanted: list[str], mode: str) -> None:
    found = rendered(service(), *slices, config={"endpoint": config}, endpoints=mode)
    assert shown(found) == wanted
    assert not found.warnings


@pytest.mark.parametrize(
    ("slices", "warning"),
    [
        (
            [{**endpoint_slice("demo/web", endpoint("10.0.0.1")), "ports": None}],
            "endpoints of slice web-ipv4 are left out: it has no ports",
        ),
        (
            [endpoint_slice("demo/web", endpoint("10.0.0.1"), ports={"http": None})],
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


def test_a_slice_of_host_names_is_left_out_and_named(
    run_loader: RunLoader, tmp_path: Path, out: Path
) -> None:
    names = endpoint_slice("demo/web", endpoint("web.example"), family="FQDN")
    addresses = endpoint_slice("demo/web", endpoint("10.0.0.1"))
    items = [{"kind": "Service", **service()}]
    items += [{"kind": "EndpointSlice", **one} for one in (names, addresses)]
    source = tmp_path / "objects.json"
    source.write_text(json.dumps({"kind": "List", "items": items}))
    done = run_loader("--onetime", "--services", "*", "--from-file", str(source), server=None)
    assert done.returncode == 0, done.stderr
    text = "endpointslice demo/web-fqdn: addressType: Envoy needs IPv4 or IPv6, not 'fqdn'"
    assert f"WARNING {text}" in done.stderr
    [resource] = yaml.safe_load((out / "current/eds/demo_web_http.yaml").read_text())["resources"]
    assert "10.0.0.1" in str(resource)
    assert "web.example" not in str(resource)


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


def test_legacy_endpoints_are_slices_too() -> None:
    config = {"endpoint": {"families": ["ipv4", "ipv6"], "include_not_ready": True}}
    found = rendered(service(), LEGACY, config=config)
    assert shown(found) == [
        *("10.0.0.1:8080", "10.0.0.2:8080 UNHEALTHY", "10.0.0.3:8081", "fd00::1:8080")
    ]
    nobody = {**LEGACY, "subsets": None}
    assert not render(service(), nobody).warnings


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


@pytest.mark.parametrize(
    ("endpoint_config", "asked"),
    [
        ({}, []),
        ({"prefer_zone": "a"}, []),
        ({"prefer_zone": True}, ["metadata.name=n1"]),
        ({"locality": {"zone": {"label": "x"}}}, [""]),
        ({"locality": {"zone": {"label": "x"}}, "prefer_zone": True}, [""]),
        ({"locality": {"zone": {"node_name": True}}}, []),
    ],
)
def test_nodes_are_asked_for_only_where_they_matter(
    api: ApiServer, run_loader: RunLoader, tmp_path: Path, endpoint_config: Object, asked: list[str]
) -> None:
    """For others the loader needs no permission to read them; and all only for their labels."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"endpoint": endpoint_config}))
    words = ("--onetime", "--services", "*", "--config", str(config))
    done = run_loader(*words, env={"NODE_NAME": "n1"})
    assert done.returncode == 0, done.stderr
    lists = api.requests.matching(lambda one: one.path == "/api/v1/nodes")
    assert [one.query.get("fieldSelector", "") for one in lists] == asked


# ------------------------------------------------------------------------------------------
# Families, DNS, ExternalName


@pytest.mark.parametrize(
    ("families", "config", "wanted"),
    [
        (["IPv6", "IPv4"], None, ["fd00::1:8080"]),
        (["IPv4", "IPv6"], None, ["10.0.0.1:8080"]),
        (None, None, ["10.0.0.1:8080"]),
        (["IPv4"], ["ipv6"], ["fd00::1:8080"]),
        (["IPv4"], ["ipv6", "ipv4"], ["fd00::1:8080", "10.0.0.1:8080"]),
    ],
)
def test_families_are_the_services_first_one_unless_configured(
    families: Any, config: Any, wanted: list[str]
) -> None:
    raw = service(ipFamilies=families)
    slices = [
        endpoint_slice("demo/web", endpoint("fd00::1"), family="IPv6"),
        endpoint_slice("demo/web", endpoint("10.0.0.1")),
    ]
    found = rendered(raw, *slices, config={"endpoint": {"families": config}} if config else {})
    assert shown(found) == wanted
    assert not found.warnings


@pytest.mark.parametrize(
    ("raw", "number", "family", "warned"),
    [
        ([service()], 80, "V4_ONLY", True),
        ([service(clusterIP="None", ipFamilies=["IPv6"])], 8080, "V6_ONLY", False),
        (
            [
                service("demo/web", port("http", 80, "web"), clusterIP="None"),
                endpoint_slice("demo/web", endpoint("10.0.0.1"), ports={"http": 8081}),
            ],
            *(8081, "V4_ONLY", False),
        ),
    ],
)
def test_dns_mode(raw: list[Object], number: int, family: str, warned: bool) -> None:
    found = rendered(*raw, endpoints="dns")
    assert shown(found) == [f"web.demo.svc.cluster.local:{number}"]
    assert clusters(found)["demo/web/http"]["type"] == "STRICT_DNS"
    assert clusters(found)["demo/web/http"]["dns_lookup_family"] == family
    assert counted() == {"eds": 0, "inline": 0, "dns": 1}
    assert bool(found.warnings) == warned


def test_a_target_port_that_nobody_knows_is_named() -> None:
    headless = service("demo/web", port("http", 80, "web"), clusterIP="None")
    found = rendered(headless, endpoints="dns")
    assert shown(found) == []
    assert found.warnings == (
        "service demo/web: the number of the target port of http is not known, so there is no "
        "endpoint",
    )


def external(name: str, **more: Any) -> Object:
    return service("demo/db", port("tls", 443), type="ExternalName", externalName=name, **more)


@pytest.mark.parametrize("mode", ["auto", "eds", "inline", "dns"])
def test_an_external_name_is_a_dns_cluster_where_it_is_asked_for(mode: str) -> None:
    raw = external("db.example.")
    config: Object = {"endpoint": {"external_name": "logical_dns", "families": ["ipv6"]}}
    found = clusters(rendered(raw, endpoints=mode, config=config))["demo/db/tls"]
    assert (found["type"], found["dns_lookup_family"]) == ("LOGICAL_DNS", "V6_ONLY")
    assert found["transport_socket"]["typed_config"]["sni"] == "db.example"
    config = {"endpoint": {"external_name": "strict_dns", "families": ["ipv4", "ipv6"]}}
    found_all = rendered(raw, endpoints=mode, config=config)
    found = clusters(found_all)["demo/db/tls"]
    assert (found["type"], found["dns_lookup_family"]) == ("STRICT_DNS", "ALL")
    assert shown(found_all, "demo/db/tls") == ["db.example:443"]
    assert not found_all.warnings
    off = rendered(raw, endpoints=mode)
    assert clusters(off) == {}
    assert off.warnings == (
        "service demo/db: is left out: ExternalName needs endpoint.external_name in --config",
    )
    raw["spec"]["ports"] = None
    assert rendered(raw, endpoints=mode, config=config).warnings == (
        "service demo/db: has no ports, so there is no cluster",
    )


@pytest.mark.parametrize(
    "name",
    [
        *("localhost", "LocalHost.", "a.localhost", "a.b.LOCALHOST", "localhost.localdomain"),
        *("ip6-localhost", "ip6-loopback", "127.0.0.1", "127.0.0.1.", "127.1", "2130706433"),
        *("0x7f.1", "0X7F000001", "0177.0.0.1", "10.0.0.1", "::1", "[::1]", "0x", "fd00::1"),
        *("", ".", "a..b", "a b", "localhost ", "a\nb", "-a", "a-", "ä.example", "a." * 200 + "a"),
        *("localhost..", "127.0.0.1..", "a.-b"),
    ],
)
def test_an_external_name_is_never_an_address_or_local(name: str) -> None:
    config = {"endpoint": {"external_name": "strict_dns"}}
    found = rendered(external(name, annotations={"hosts": "h"}), config=config)
    assert clusters(found) == {}
    assert routes(found) == {}
    [warning] = found.warnings
    assert warning.startswith("service demo/db: is left out: externalName is not a DNS name, or lo")
    assert "\n" not in warning
    # A name that only looks like one of them is none.
    for fine in ("localhost.example", "1.example", "0x7f.example", "my-localhost", "x_y.example"):
        assert clusters(rendered(external(fine), config=config))


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
    said = "beyond the EDS budget of 3, endpoints are in CDS: demo/s003/http, demo/s004/http"
    assert found.warnings == (said,)
    assert counted() == {"eds": 3, "inline": 2, "dns": 0}
    assert not rendered(*many(5), endpoints="inline").warnings


def test_files_of_others_use_the_budget_unless_it_is_configured() -> None:
    objects = objects_of(*many(5))
    found = renderer(endpoints="auto", budget=3).render(objects, other_files=2)
    assert len(on_eds(found)) == 1
    config = {"endpoint": {"eds_budget": 2}}
    found = renderer(config, endpoints="auto").render(objects, other_files=20)
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
    before = render(*raw, endpoints="auto", budget=2, fmt=fmt, config=config)
    assert list(clusters(before)) == [f'x:s00{index} "http"' for index in range(4)]
    assert on_eds(before) == ['x:s000 "http"', 'x:s001 "http"']

    def restarted(*new: Object) -> list[str]:
        options = {"endpoints": "auto", "budget": 2, "fmt": fmt, "published": before.files}
        return on_eds(render(*new, config=config, **options))

    assert restarted(*raw[1:]) == ['x:s001 "http"']
    assert restarted(service("a/a"), *raw[1:]) == ['x:a "http"', 'x:s001 "http"']


def test_a_restart_in_another_mode_starts_afresh() -> None:
    raw = many(4)
    for mode in ("inline", "dns"):
        left = render(*raw, endpoints=mode).files
        assert len(on_eds(render(*raw, endpoints="auto", budget=2, published=left))) == 2
    # More than the budget would be the end of Envoy.
    left = render(*raw, endpoints="eds").files
    assert len(on_eds(render(*raw, endpoints="auto", budget=2, published=left))) == 2
    for mode in ("inline", "eds"):  # nor does it matter to another mode what was before
        assert len(on_eds(render(*raw, endpoints=mode, published=left))) == 4 * (mode == "eds")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"x"', b'{"resources": 7}', b'{"resources": [7, {}, {"name": "x"}]}',
     b'{"resources": [{"name": ["x"], "type": "EDS"}]}', b"[" * 200_000, b"\xff",
     b'{"resources":' * 100_000, b"resources:\n- name: x\n  type: EDS\n"],
)  # fmt: skip
def test_what_is_not_our_cds_tells_nothing(content: bytes) -> None:
    for path in ("cds.yaml", "cds.json"):
        left = {path: loader.file_of(content, "")}
        found = rendered(*many(4), endpoints="auto", budget=2, published=left)
        assert found == rendered(*many(4), endpoints="auto", budget=2)


def test_the_budget_is_a_sixteenth_of_the_instances(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "max_user_instances"
    monkeypatch.setattr(loader, "MAX_USER_INSTANCES", str(limit))
    assert loader.inotify_budget(loader.DEFAULTS) == 8
    limit.write_text("8192\n")
    assert loader.inotify_budget(loader.DEFAULTS) == 512
    assert loader.inotify_budget(loader.config_from({"endpoint": {"eds_budget": 3}})) == 3


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
        ("x", "H2C", (True, False)),
        ("x", "GRPCS", (True, True)),
        ("x", "kubernetes.io/h2c", (True, False)),
        ("x", "kubernetes.io/wss", (False, True)),
        ("grpc", "example.com/own", (False, False)),
        ("grpc", "GrpcTLS", (False, False)),
        ("https", "http", (False, False)),
        ("http", None, (False, False)),
        ("h2c", "", (True, False)),
        ("grpc", None, (True, False)),
        ("grpc-web", None, (True, False)),
        ("https", None, (False, True)),
        ("tls", None, (False, True)),
        ("httptls", None, (False, True)),
        ("grpctls", None, (True, True)),
        ("grpcs", None, (True, True)),
        ("grpcx", None, (False, False)),
        ("web-grpc", None, (False, False)),
    ],
)
def test_protocols(name: str, app_protocol: str | None, wanted: tuple[bool, bool]) -> None:
    assert options_of(service("demo/web", port(name, 80, appProtocol=app_protocol))) == wanted


def test_udp_has_no_http() -> None:
    raw = service("demo/web", port("https", 443, protocol="UDP", appProtocol="https"))
    assert options_of(raw) == (False, False)


def test_tls_verifies_name_and_ca() -> None:
    """The whole of it is the output `greeter` of docs/rendering.md."""
    config = {"cluster": {"trusted_ca": "/ca.pem"}, "cluster_domain": "corp.example"}
    found = clusters(rendered(service("demo/web", port("grpcs", 443)), config=config))
    tls = found["demo/web/grpcs"]["transport_socket"]["typed_config"]
    [name] = tls["common_tls_context"]["validation_context"].pop("match_typed_subject_alt_names")
    assert tls["sni"] == name["matcher"]["exact"] == "web.demo.svc.corp.example"
    trusted = {"trusted_ca": {"filename": "/ca.pem"}}
    assert tls["common_tls_context"]["validation_context"] == trusted


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
# Raw objects


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"metadata": {"namespace": "../x", "name": "web"}}, "namespace: not a DNS label"),
        ({"metadata": {"namespace": "demo", "name": "a/b"}}, "name: not a DNS label"),
        ({"metadata": []}, "metadata: dict expected, not list"),
        ({"spec": {"ports": {}}}, "ports: list expected, not dict"),
        ({"spec": {"ports": [7]}}, "an object with port expected, not int"),
        ({"spec": {"ports": [{"port": "80"}]}}, "port: int expected, not str"),
        ({"spec": {"ports": [{"port": True}]}}, "port: int expected, not bool"),
        ({"spec": {"ports": [{"port": 70000}]}}, "port: a port is between 1 and 65535"),
        ({"spec": {"ports": [{"name": "../x", "port": 1}]}}, "name: not a DNS label"),
        ({"spec": {"ports": [{"port": 1, "targetPort": -1}]}}, "targetPort: a port is between"),
        ({"spec": {"clusterIP": "\ud800"}}, "surrogates not allowed"),
    ],
)
def test_a_malformed_service_is_rejected(change: Object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        loader.service_from({**service(), **change})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"addressType": "IPX"}, "addressType: Envoy needs IPv4 or IPv6, not 'ipx'"),
        ({"endpoints": [{"addresses": ["10.0.0"]}]}, "addresses: not an ipv4 address: '10.0.0'"),
        ({"endpoints": [{"addresses": ["fd00::1"]}]}, "addresses: not an ipv4 address"),
        ({"endpoints": [{"addresses": [7]}]}, "addresses: not an ipv4 address: 7"),
        ({"endpoints": [{"conditions": {"ready": "no"}}]}, "ready: bool expected, not str"),
        ({"endpoints": [{"zone": 3}]}, "zone: str expected, not int"),
        ({"ports": [{"port": 65536}]}, "port: a port is between"),
    ],
)
def test_a_malformed_slice_is_rejected(change: Object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        loader.endpointslice_from({**endpoint_slice(), **change})


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
        weight = draw(st.sampled_from([{}, {"weight": "0"}, {"weight": "7"}, {"weight": "x"}]))
        asked = {"route": "true", "hosts": hosts, **weight} if hosts else {}
        created = draw(st.sampled_from(["", "2024", "2025"]))
        raw.append(routed(name, *ports, created=created, **asked))
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
    two = rendered(*resliced(raw, chance), **options)
    assert one.files == two.files
    assert one.warnings == two.warnings


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
    objects, translate = objects_of(*services, *slices), renderer()
    first = translate.render(objects)

    def changed(new: loader.Objects) -> set[str]:
        nonlocal first
        found, before = translate.render(new), first
        first = found
        return {
            path
            for path in {*found.files, *before.files}
            if found.files.get(path) is not before.files.get(path)
        }

    assert changed(objects) == set()
    slices[1] = endpoint_slice("demo/s1", endpoint("10.0.0.2"))
    moved = loader.endpointslice_from(slices[1])
    objects = objects._replace(slices=[objects.slices[0], moved, *objects.slices[2:]])
    assert changed(objects) == {"eds/demo_s1_http.yaml"}
    # The same again, as after a relist.
    assert changed(objects_of(*services, *slices)) == set()
    services[2] = routed("demo/s2", hosts="h2, h3", weight="3")
    assert changed(objects_of(*services, *slices)) == {"rds.yaml"}
    services[3] = service("demo/s3", port("web", 80))
    assert changed(objects_of(*services, *slices)) == {
        *("cds.yaml", "rds.yaml", "eds/demo_s3_http.yaml", "eds/demo_s3_web.yaml")
    }


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


# ------------------------------------------------------------------------------------------
# Hostile texts


def test_long_texts_are_not_kept() -> None:
    before = loader.yaml_key.cache_info().currsize
    for index in range(50):
        assert loader.element("yaml", {"@type": f"{index}" * 100_000})
    assert loader.yaml_key.cache_info().currsize <= before + 1
    # Nor what a Service has in annotations of others.
    huge = service(annotations={"kubectl.kubernetes.io/last-applied-configuration": "x" * 200_000})
    assert len(str(loader.service_from(huge))) < 1_000


def test_what_nobody_meant_is_named_once() -> None:
    """A selector that matches nothing, and a Service that no slice is about."""
    assert render().warnings == ("--services: no Service matches the selector",)
    raw = [service(), service("demo/api"), endpoint_slice("demo/api")]
    assert render(*raw).warnings == (
        "service demo/web: has no EndpointSlice, so it has no endpoints",
    )
    assert render(service(clusterIP="None"), endpoints="dns").warnings == ()


# ------------------------------------------------------------------------------------------
# YAML

TRICKY = (
    "", "yes", "No", "on", "OFF", "y", "N", "true", "null", "~", "NaN", ".inf", "1", "-1", "0x1F",
    "1e3", "1.5", "1_000", "0o17", "12:30:45", "2001-01-01", "=", "<<", "!x", "&x", "*x", "@x",
    "a: b", "a:b", "a #b", "#a", "- a", "-", "?", "[a]", "{a}", "%x", "`x", "|", ">", "'", "\"",
    " a", "a ", "\ta", "a\n", "a\nb", "a\r\nb", "\x00", "\x1b", "\x7f", "\x85", "\xa0", "\u2028",
    "\ufeff", "\ufffe", "ä", "日本", "😀", "\\", "\\n", "a\\", "1s", "0.25s", "10.0.0.1", "fd00::1",
)  # fmt: skip

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
    return loader.yaml_text(value, "\n")


@settings(max_examples=100, deadline=None)
@given(st.lists(DOCUMENTS, min_size=1) | st.dictionaries(st.text(), DOCUMENTS, min_size=1))
def test_yaml_means_what_json_means(value: Any) -> None:
    assert yaml.safe_load(emitted(value)) == value
    assert yaml.load(emitted(value), yaml.CSafeLoader) == value


def test_tricky_strings_stay_strings() -> None:
    """In every place of a document, and to a YAML 1.1 parser too."""
    value = {text: [text, [text], {text: text}] for text in TRICKY}
    assert yaml.safe_load(emitted(value)) == value


def split_of(content: bytes) -> Mapping[str, bytes] | None:
    return loader.clusters_of(loader.file_of(content, ""))


def test_rendered_yaml_is_split_and_joined() -> None:
    """As planning the steps needs it: old and new clusters in one file."""
    one = render(service("demo/a"), service("demo/b"), endpoints="inline").files["cds.yaml"]
    two = render(service("demo/c", annotations={"hosts": "h"}), endpoints="dns").files
    split, other = split_of(one.content), split_of(two["cds.yaml"].content)
    assert split
    assert other

    def joined(*clusters: bytes) -> bytes:
        return loader.discovery_response("yaml", loader.CDS_COMMENT, loader.CLUSTER_TYPE, clusters)

    assert list(split) == ["demo/a/http", "demo/b/http"]
    assert joined(*split.values()) == one.content
    union = joined(*split.values(), *other.values())
    found = r.content_of("cds.yaml", loader.file_of(union, ""))
    assert [each["name"] for each in found["resources"]] == [
        *("demo/a/http", "demo/b/http", "demo/c/http")
    ]
    versions = {yaml.safe_load(each)["version_info"] for each in (one.content, union)}
    assert len(versions) == 2
    empty = render().files["cds.yaml"].content
    assert (split_of(empty), joined()) == ({}, empty)
    # Whatever else somebody wrote is left as it is.
    for foreign in (b"", b"resources: []\n", one.content[20:], one.content + b"more: 1\n",
                    one.content[:-1], one.content.replace(b"  name", b"\tname"), b"# x\n" * 9,
                    one.content.replace(b"resources:\n", b"resources:\n# x\n"),
                    two["rds.yaml"].content[:-20]):  # fmt: skip
        assert split_of(foreign) is None


def test_a_thousand_services_are_rendered_in_no_time() -> None:
    """Bounds with a wide margin; the figures are in the benchmark."""
    raw = [routed(f"demo/s{index:04}", hosts=f"h{index}") for index in range(1000)]
    pods = [
        endpoint_slice(
            f"demo/s{index:04}",
            *(endpoint(f"10.{index // 250}.{index % 250}.{pod}") for pod in range(1, 11)),
        )
        for index in range(1000)
    ]
    objects, translate = objects_of(*raw, *pods), renderer(endpoints="inline")
    assert seconds(lambda: translate.render(objects)) < 2
    slices, services, costs = list(objects.slices), dict(objects.services), []
    for index in range(10):
        moved = endpoint_slice(f"demo/s{index:04}", endpoint("10.9.9.9"))
        slices[index] = loader.endpointslice_from(moved)
        changed = objects._replace(slices=list(slices), services=dict(services))
        costs.append(seconds(lambda changed=changed: translate.render(changed)))  # type: ignore[misc]
    assert min(costs) < 0.04
    costs = []
    for index in range(5):
        services["demo", "s0000"] = loader.service_from(routed("demo/s0000", hosts=f"x{index}"))
        changed = objects._replace(slices=slices, services=dict(services))
        costs.append(seconds(lambda changed=changed: translate.render(changed)))  # type: ignore[misc]
    assert min(costs) < 0.06

"""--config: what it may say, what is wrong with it, and how `base` and `merge` change clusters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from envoy.config.cluster.v3 import cluster_pb2
from hypothesis import given
from hypothesis import strategies as st

import loader
from tests.conftest import RunLoader
from tests.support.rendering import (
    Object,
    clusters,
    rendered,
    service,
)

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
        ({"labels": {"app": "web", "tier": "front"}}, True),
        ({"labels": {"app": "web", "tier": "back"}}, False),
        ([{"namespace": "other"}, {"port_name": "http"}, {"port_name": "http"}], True),
        ([{"namespace": "other"}, {"port_name": "grpc"}], False),
    ],
)
def test_matches(match: Any, holds: bool) -> None:
    labels = {"app": "web", "tier": "front"}
    merge = {"health_checks": [{"interval": "2s"}]}
    found = merged({"match": match, "merge": merge}, labels=labels)
    assert found == (merge if holds else {})
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
RAW = "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"


@pytest.mark.parametrize(
    ("into", "more", "wanted"),
    [
        ({"a": [1, {"x": 1}]}, {"a": [{"x": 2}]}, {"a": [1, {"x": 1}, {"x": 2}]}),
        ({"a": [1]}, {"a": 2}, {"a": 2}),
        ({"a": {"b": 1}}, {"a": [2]}, {"a": [2]}),
        ({"a": {"@type": TLS, "sni": "x"}}, {"a": {"@type": RAW}}, {"a": {"@type": RAW}}),
        ({"a": {"@type": TLS, "sni": "x"}}, {"a": {"@type": TLS, "y": 1}},
         {"a": {"@type": TLS, "sni": "x", "y": 1}}),
        ({"a": {"@type": TLS, "sni": "x"}}, {"a": {"sni": "y"}}, {"a": {"@type": TLS, "sni": "y"}}),
        ({"a": {"sni": "x"}}, {"a": {"@type": TLS}}, {"a": {"sni": "x", "@type": TLS}}),
        ({"a": {"@type": [1]}}, {"a": {"@type": {}}}, {"a": {"@type": {}}}),
    ],
)  # fmt: skip
def test_merging_is_json_merge_patch_but_for_lists_and_types(
    into: Object, more: Object, wanted: Object
) -> None:
    given_into, given_more = copy.deepcopy((into, more))
    assert loader.merge(into, more) == wanted
    assert (into, more) == (given_into, given_more)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(JSON_VALUES, JSON_VALUES)
def test_merging_without_lists_and_types_is_rfc_7386(into: Any, more: Any) -> None:
    def patched(target: Any, patch: Any) -> Any:  # the pseudo-code of the RFC
        if not isinstance(patch, dict):
            return patch
        target = dict(target) if isinstance(target, dict) else {}
        for name, value in patch.items():
            if value is None:
                target.pop(name, None)
            else:
                target[name] = patched(target.get(name), value)
        return target

    assert loader.merge(into, more) == patched(into, more)


def test_the_fields_of_cluster_are_those_of_envoy() -> None:
    fields = {field.name for field in cluster_pb2.Cluster.DESCRIPTOR.fields}
    assert fields == loader.CLUSTER_FIELDS | loader.OWN_FIELDS.keys()


# ------------------------------------------------------------------------------------------
# Configuration


def override(**more: Any) -> Object:
    return {"cluster": {"overrides": [{"match": {"namespace": "x"}, **more}]}}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"x": [value]}
    return value


NO_OBJECTS: list[Any] = [[], None]
NAME = "a string with {namespace}, {service} or {port} expected"
ENVOY_JSON = "JSON without NaN, of valid text, at most 64 deep expected"
ONE_PART = "one of label, literal and node_name expected"
EXTERNAL = "use --endpoints, or endpoint.external_name for ExternalName Services"
SOMETHING = "something to match (what is for every cluster belongs into base) expected"
LABELS = "$.cluster.overrides[0].match.labels: an object of strings expected"
FAMILIES = (
    '$.endpoint.families: ["ipv4"] or ["ipv6"] or ["ipv4", "ipv6"] or ["ipv6", "ipv4"] expected'
)


@pytest.mark.parametrize(
    ("document", "error"),
    [
        *((value, "$: an object expected") for value in NO_OBJECTS),
        *(({section: value}, f"$.{section}: an object expected")
          for section in ("cluster", "endpoint", "route") for value in NO_OBJECTS),
        ({"clusters": {}}, "$.clusters: unknown key (one of cluster, cluster_domain, endpoint, "
                           "route)"),
        ({"a b": 1}, '$["a b"]: unknown key (one of cluster, cluster_domain, endpoint, route)'),
        ({"cluster": {"nme": "x"}},
         "$.cluster.nme: unknown key (one of base, name, overrides, trusted_ca)"),
        *(({"cluster": {"name": name}}, f"$.cluster.name: {NAME}")
          for name in (3, "", "web", "{cluster}/{port}", "{port}}", "{port}\n")),
        ({"cluster": {"trusted_ca": "ca.pem"}}, "$.cluster.trusted_ca: an absolute path expected"),
        ({"cluster": {"base": "x"}}, "$.cluster.base: an object expected"),
        ({"cluster": {"base": {"name": "x"}}},
         "$.cluster.base.name: use cluster.name, a template"),
        ({"cluster": {"base": {"type": "EDS"}}},
         f"$.cluster.base.type: {EXTERNAL}"),
        (override(merge={"load_assignment": None}),
         "$.cluster.overrides[0].merge.load_assignment: endpoints come from "
         "EndpointSlices, see endpoint"),
        (override(merge={"eds_cluster_config": {}}),
         "$.cluster.overrides[0].merge.eds_cluster_config: use --endpoints, and "
         "--output-dir for the path"),
        ({"cluster": {"base": {"connect_timout": "1s"}}},
         "$.cluster.base.connect_timout: not a field of Envoy's Cluster"),
        ({"cluster": {"base": {"outlier_detection": {"x": [1, float("nan")]}}}},
         f"$.cluster.base.outlier_detection: {ENVOY_JSON}"),
        ({"cluster": {"base": {"alt_stat_name": "\ud800"}}},
         f"$.cluster.base.alt_stat_name: {ENVOY_JSON}"),
        ({"cluster": {"base": {"metadata": nested(40)}}}, f"$.cluster.base.metadata: {ENVOY_JSON}"),
        (override(merge={"metadata": nested(50_000)}),
         f"$.cluster.overrides[0].merge.metadata: {ENVOY_JSON}"),
        ({"cluster": {"overrides": {}}}, "$.cluster.overrides: a list expected"),
        ({"cluster": {"overrides": ["x"]}}, "$.cluster.overrides[0]: an object expected"),
        *(({"cluster": {"overrides": [one]}},
           "$.cluster.overrides[0]: match, and one of merge and suppress expected")
          for one in ({"suppress": True}, {"match": {"namespace": "x"}},
                      {"match": {"namespace": "x"}, "merge": {}, "suppress": True},
                      {"match": [], "suppress": True})),
        ({"cluster": {"overrides": [{"match": "x", "suppress": True}]}},
         "$.cluster.overrides[0].match: an object expected"),
        ({"cluster": {"overrides": [{"match": {"port": "x"}, "suppress": True}]}},
         "$.cluster.overrides[0].match.port: unknown key (one of cluster_name, labels, namespace, "
         "port_name)"),
        ({"cluster": {"overrides": [{"match": [{"port_name": 1}], "suppress": True}]}},
         "$.cluster.overrides[0].match[0].port_name: a string expected"),
        ({"cluster": {"overrides": [{"match": {}, "suppress": True}]}},
         f"$.cluster.overrides[0].match: {SOMETHING}"),
        ({"cluster": {"overrides": [{"match": {"labels": {}}, "suppress": True}]}},
         LABELS),
        (override(suppress=False), "$.cluster.overrides[0].suppress: true expected"),
        *(({"endpoint": {"eds_budget": value}},
           "$.endpoint.eds_budget: a whole number of EDS files expected")
          for value in (-1, True, "8", 1.5)),
        ({"endpoint": {"external_name": "eds"}},
         '$.endpoint.external_name: "strict_dns" or "logical_dns" expected'),
        ({"endpoint": {"include_not_ready": "yes"}},
         "$.endpoint.include_not_ready: true or false expected"),
        ({"endpoint": {"prefer_zone": 1}},
         "$.endpoint.prefer_zone: a zone, true or false expected"),
        *(({"endpoint": {"families": value}}, FAMILIES)
          for value in ([], ["ipv4", "ipv4"], "ipv4", [["ipv4"]])),
        ({"endpoint": {"locality": {"rack": {}}}},
         "$.endpoint.locality.rack: unknown key (one of region, sub_zone, zone)"),
        *(({"endpoint": {"locality": {"zone": value}}}, f"$.endpoint.locality.zone: {ONE_PART}")
          for value in ({}, {"label": "x", "literal": "y"})),
        ({"endpoint": {"locality": {"zone": {"node_name": False}}}},
         "$.endpoint.locality.zone.node_name: true expected"),
        ({"endpoint": {"locality": {"zone": {"label": ""}}}},
         "$.endpoint.locality.zone.label: a string expected"),
        ({"route": {"prefix": "/"}},
         "$.route.prefix: unknown key (one of annotation_prefix, name, suffix)"),
        ({"route": {"suffix": "a..b"}}, "$.route.suffix: a DNS name expected"),
        ({"route": {"annotation_prefix": "a/b"}},
         "$.route.annotation_prefix: a DNS name expected"),
        ({"cluster_domain": 1}, "$.cluster_domain: a DNS name expected"),
    ],
)  # fmt: skip
def test_config_errors_name_the_path(document: object, error: str) -> None:
    with pytest.raises(loader.UsageError) as caught:
        loader.config_from(document)
    assert str(caught.value) == f"--config: {error}"


def test_a_key_that_is_there_twice_is_an_error() -> None:
    text = '{"cluster": {"name": "{port}", "name": "{service}"}}'
    with pytest.raises(loader.UsageError, match="a key is there twice in the object of 'name'"):
        json.loads(text, object_pairs_hook=loader.unique_keys)


def test_the_own_zone_needs_the_name_of_the_own_node(
    run_loader: RunLoader, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"endpoint": {"prefer_zone": true}}')
    done = run_loader("--onetime", "--services", "*", "--config", str(config))
    assert done.returncode == 2
    assert "--config: $.endpoint.prefer_zone: true needs the Node in $NODE_NAME" in done.stderr


@pytest.mark.parametrize("text", [None, "", "{", "[" * 100_000, '{"cluster": NaN}', '{"x": 1e999}'])
def test_a_file_that_is_no_configuration_is_one_line(
    run_loader: RunLoader, tmp_path: Path, text: str | None
) -> None:
    config = tmp_path / "config.json"
    if text is not None:
        config.write_text(text)
    done = run_loader("--onetime", "--services", "*", "--config", str(config))
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "--config" in line

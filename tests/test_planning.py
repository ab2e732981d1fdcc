"""Where to go from what is published, and what Envoy's counts tell: pure functions, as tables.

What follows from a NACK is in test_interleavings.py, and on the real Envoy in test_ack_envoy.py and
test_faults_envoy.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from loader import (
    ACKED,
    CDS_COMMENT,
    MIXED,
    NACKED,
    UNREAD,
    Counts,
    File,
    Known,
    Look,
    Nack,
    after_end,
    after_look,
    after_meeting,
    after_publication,
    allowed,
    awaited,
    cluster_names,
    discovery_response,
    element,
    file_of,
    kind_of,
    mentioned,
    next_step,
    notify_order,
    parse_stats,
    paths_in,
    resource_names,
    same_files,
    united,
)
from tests.support import envoy as real

CURRENT = "/srv/runtime/current"
CLUSTER = f"type.googleapis.com/{real.TYPES['cluster']}"


def text(content: str, kind: str = "") -> File:
    return file_of(content.encode(), "configmap demo/x", kind=kind)


def cds(*names: str, port: int = 80, also: str = "") -> File:
    rows = [real.cluster(name, port) for name in names]
    return text(real.response("cluster", *rows, version=also))


def on_eds(*names: str) -> File:
    """CDS with a cluster on an EDS file for each name."""
    source = {name: real.file_source(f"{CURRENT}/eds/{name}.json") for name in names}
    rows = [real.eds_cluster(name, source[name]) for name in names]
    return text(real.response("cluster", *rows))


def yaml_cds(*names: str) -> File:
    rows = [{"@type": CLUSTER, **real.cluster(name, 80)} for name in names]
    return text(yaml.safe_dump({"resources": rows}))


def rendered(*names: str) -> File:
    rows = [element("yaml", {"@type": CLUSTER, "name": name}) for name in names]
    content = discovery_response("yaml", CDS_COMMENT, CLUSTER, rows)
    return file_of(content, "services")


def eds(name: str, port: int = 80) -> File:
    return text(real.response("assignment", real.assignment(name, port)))


def rds(*names: str) -> File:
    return text(real.response("routes", real.route_config(dict.fromkeys(names, 1))))


def lds(path: str) -> File:
    routes = real.rds_routes(real.file_source(f"{CURRENT}/{path}"))
    return text(real.response("listener", real.http_listener(80, routes)))


NOTE = text("hello")
A = {"cds.yaml": cds("a"), "rds.yaml": rds("a"), "lds.yaml": lds("rds.yaml")}


# ---------------------------------------------------------------------------------------------
# What a file is, and what it names


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (real.response("cluster", real.cluster("a", 1)), "cds"),
        (f"type_url: {CLUSTER}\nresources: []\n", "cds"),
        # A wrapper and other types are passed over, the first xDS type counts.
        (f"type.googleapis.com/envoy.service.discovery.v3.Resource {CLUSTER}", "cds"),
        ("type.googleapis.com/envoy.config.cluster.v3.Cluster.CustomClusterType", ""),
        ("type.googleapis.com/envoy.api.v2.Cluster", ""),  # v2 is gone from Envoy
        ("", ""),
        ("{{{ nothing", ""),
    ],
)
def test_the_first_xds_type_url_tells_the_kind(content: str, kind: str) -> None:
    assert kind_of(content.encode()) == kind


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b'{"cluster":"web"}', {"web"}),
        (b"route: {cluster: web}", {"web"}),
        (b"- 'web'\n", {"web"}),
        (b"cluster: demo/web/http\n", set()),
        (b"cluster: webs\ncluster: web-2\n", set()),
        (b'{"cluster":"demo\\/web"}', {"demo/web"}),
        (b'cluster: "my own"', {"my own"}),
    ],
)
def test_a_reference_is_a_whole_word(content: bytes, names: set[str]) -> None:
    assert mentioned(content, ["other", "web", "demo/web", "my own"]) == names


def test_a_path_is_named_under_whatever_directory() -> None:
    paths = {"eds/a.json", "a.json"}
    for place in (b"/etc/envoy/eds/a.json", b"eds/a.json", b"\\/srv\\/eds\\/a.json"):
        assert paths_in([text(f'{{"path": "{place.decode()}"}}')], paths) >= {"a.json"}
    assert paths_in([text("path: /srv/current/eds/a.json")], {"eds/a.json"}) == {"eds/a.json"}
    other = text("path: /srv/eds/a.json.bak\npath: /srv/other-eds/a.json")
    assert paths_in([other], paths) == {"a.json"}


# ---------------------------------------------------------------------------------------------
# Old and new clusters together


@pytest.mark.parametrize("make", [cds, rendered])
def test_a_union_has_all_clusters(make: Any) -> None:
    old, new = make("a", "b"), make("c", "b")
    both = united(old, new)
    assert cluster_names([both]) == {"a", "b", "c"}
    assert united(both, new) == both, "a restart within a step changes nothing"
    parsed = yaml.safe_load(both.content)
    assert [item["name"] for item in parsed["resources"]] == ["c", "b", "a"]
    assert parsed["version_info"] not in ("", yaml.safe_load(new.content).get("version_info"))


def test_the_new_definition_of_a_cluster_wins() -> None:
    both = json.loads(united(cds("a", "b"), cds("a", port=7)).content)
    ports = {
        one["name"]: one["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"][
            "address"
        ]["socket_address"]["port_value"]
        for one in both["resources"]
    }
    assert ports == {"a": 7, "b": 80}


def test_a_union_that_adds_nothing_is_one_of_its_sides() -> None:
    assert united(cds("a", "b"), cds("a")) == cds("a", "b"), "the old file stays"
    assert united(cds("a"), cds("a", "b")) == cds("a", "b"), "the new file goes out"
    assert united(rendered("a"), rendered()) == rendered("a")
    kept = united(rendered("a", "b"), rendered("c"), frozenset("b"))
    assert cluster_names([kept]) == {"b", "c"}


def test_yaml_of_a_configmap_is_never_rewritten() -> None:
    assert united(yaml_cds("a"), yaml_cds("b")) == yaml_cds("b")
    assert united(yaml_cds("a", "b"), yaml_cds("a")) == yaml_cds("a", "b"), "with the removals"


# ---------------------------------------------------------------------------------------------
# Steps


PLANS: list[tuple[str, Mapping[str, File], Mapping[str, File], str]] = [
    ("nothing", A, A, ""),
    ("first", {}, A, "initial:cds.yaml,lds.yaml,rds.yaml"),
    ("weights", A, A | {"rds.yaml": rds("a", "a2")}, "references:rds.yaml"),
    ("clusters alone", A, A | {"cds.yaml": cds("a", "b")}, "clusters:cds.yaml"),
    (
        "cluster and route",
        A,
        A | {"cds.yaml": cds("a", "b"), "rds.yaml": rds("b")},
        "clusters:cds.yaml references:rds.yaml",
    ),
    (
        "replaced",
        A,
        A | {"cds.yaml": cds("b"), "rds.yaml": rds("b")},
        "clusters:cds.yaml references:rds.yaml removals:cds.yaml",
    ),
    (
        "gone",
        A | {"cds.yaml": cds("a", "b"), "rds.yaml": rds("b")},
        A,
        "references:rds.yaml removals:cds.yaml",
    ),
    (
        "endpoints and their cluster",
        A,
        A | {"cds.yaml": on_eds("a", "b"), "eds/b.json": eds("b"), "eds/a.json": eds("a")},
        "children:eds/a.json,eds/b.json clusters:cds.yaml",
    ),
    ("a new file that nobody names", A, A | {"eds/b.json": eds("b")}, "clusters:eds/b.json"),
    (
        "a note beside routes",
        A | {"note": NOTE},
        A | {"note": text("new"), "rds.yaml": rds("a", "b")},
        "clusters:note references:rds.yaml",
    ),
    ("a file goes", A | {"note": NOTE}, A, "removals:-note"),
    (
        "YAML, more",
        {"cds.yaml": yaml_cds("a"), "rds.yaml": rds("a")},
        {"cds.yaml": yaml_cds("a", "b"), "rds.yaml": rds("b")},
        "clusters:cds.yaml references:rds.yaml",
    ),
    (
        "YAML, fewer",
        {"cds.yaml": yaml_cds("a", "b"), "rds.yaml": rds("b")},
        {"cds.yaml": yaml_cds("a"), "rds.yaml": rds("a")},
        "references:rds.yaml removals:cds.yaml",
    ),
    (
        "routes move to another listener file",
        A,
        {"cds.yaml": A["cds.yaml"], "new.yaml": rds("a"), "lds.yaml": lds("new.yaml")},
        "children:new.yaml references:lds.yaml removals:-rds.yaml",
    ),
]


@pytest.mark.parametrize(
    ("published", "desired", "plan"), [row[1:] for row in PLANS], ids=[row[0] for row in PLANS]
)
def test_steps(published: Mapping[str, File], desired: Mapping[str, File], plan: str) -> None:
    assert planned(published, desired) == plan


def planned(published: Mapping[str, File], desired: Mapping[str, File]) -> str:
    rows = []
    while step := next_step(published, desired):
        moved = sorted(p for p, file in step.files.items() if published.get(p) != file)
        gone = sorted(f"-{path}" for path in published.keys() - step.files.keys())
        rows.append(f"{step.name}:{','.join([*moved, *gone])}")
        published = step.files
    assert same_files(published, desired)
    return " ".join(rows)


def test_children_are_noticed_first() -> None:
    files = A | {"eds/a.json": eds("a"), "note": NOTE}
    assert notify_order(files, files) == ["eds/a.json", "note", "cds.yaml", "rds.yaml", "lds.yaml"]


# ---------------------------------------------------------------------------------------------
# After a NACK: what neither the interleavings nor the real Envoy show


def test_clusters_that_a_new_envoy_rejects_may_be_removed() -> None:
    """It NACKed what an earlier one ACKed; their union with fewer clusters is that again."""
    acked = {**A, "cds.yaml": cds("a", "bad")}
    nacks = {"cds.yaml": Nack(acked["cds.yaml"].digest, "cds", "bad")}
    assert allowed(A, acked, acked, nacks) == (A, [])
    assert allowed(acked, acked, acked, nacks)[0] == acked


# ---------------------------------------------------------------------------------------------
# What one look tells


SCOPE = {"cds.yaml": "cluster_manager.cds", "rds.yaml": "http.ingress.rds.routes"}
SCOPE |= {"lds.yaml": "listener_manager.lds"}


def look(counts: Mapping[str, tuple[int, int]]) -> Look:
    """`{"cds": (success, failed)}`."""
    found = {SCOPE[f"{name}.yaml"]: Counts(*row) for name, row in counts.items()}
    return Look(found, True)


ONE = {"cds": (1, 0), "rds": (1, 0), "lds": (1, 0)}


def met() -> Known:
    """Envoy has ACKed everything."""
    known, first = after_look(Known(), A, look(ONE))
    assert first == {}, "the first look of all is not believed"
    known, told = after_look(known, A, look(ONE))
    assert told == dict.fromkeys(A, ACKED)
    return known


@pytest.mark.parametrize(
    ("counts", "state"),
    [
        ((1, 0), None),
        ((2, 0), ACKED),
        ((1, 1), NACKED),
        ((3, 0), ACKED),
        ((2, 1), None),  # Envoy is notified once more
    ],
)
def test_counts_tell(counts: tuple[int, int], state: str | None) -> None:
    new = A | {"rds.yaml": rds("b")}
    known = after_publication(met(), A, new, [])
    known, told = after_look(known, new, look({**ONE, "rds": counts}))
    assert known.states.get("rds.yaml") == state
    assert (told["rds.yaml"] == MIXED) == (counts == (2, 1))
    assert known.acked["rds.yaml"] == (new if state == ACKED else A)["rds.yaml"]


def test_a_first_file_without_a_name_explains_a_subscription_that_only_fails() -> None:
    files = A | {"rds.yaml": text("{", "rds")}
    known, told = after_look(Known(doubt=False), files, look({**ONE, "rds": (0, 1)}))
    assert [path for path in told if told[path] == NACKED] == ["rds.yaml"]
    other = text(real.response("routes", real.route_config({"a": 1}, "other")))
    more = files | {"new.yaml": other}
    known = after_publication(known, files, more, [])
    known, told = after_look(known, more, look({**ONE, "rds": (0, 1)}))
    assert told == {"new.yaml": UNREAD}


def test_what_mends_a_nack_lifts_none_that_the_same_look_tells() -> None:
    files = A | {"sds.yaml": text(real.response("secret", {"name": "s"}))}
    known = Known(doubt=False, nacks={
        path: Nack(files[path].digest, files[path].kind, "") for path in ("lds.yaml", "sds.yaml")})
    counts = {**look({**ONE, "lds": (0, 1)}).counts, "sds.s": Counts(1, 0)}
    known, told = after_look(known, files, Look(counts, True))
    assert (told["sds.yaml"], told["lds.yaml"]) == (ACKED, NACKED)
    assert list(known.nacks) == ["lds.yaml"]


def test_what_nobody_read_is_not_waited_for_in_a_new_envoy_either() -> None:
    known = after_meeting(Known(states={"cds.yaml": UNREAD, "rds.yaml": ACKED, "lds.yaml": NACKED}))
    assert set(awaited(known, A)) == {"rds.yaml", "lds.yaml"}


def test_the_second_end_on_the_same_bytes_is_blamed_on_them() -> None:
    bad = A | {"cds.yaml": cds("a", "deadly")}
    known = after_publication(met(), A, bad, [])
    known, blamed = after_end(known, bad, soon=False)
    assert blamed == []
    known, blamed = after_end(known, bad, soon=False)
    assert blamed == [], "it ran for more than ten seconds"
    known, blamed = after_end(known, bad, soon=True)
    assert blamed == ["cds.yaml"]
    assert allowed(bad, bad, known.acked, known.nacks)[0] == A, "it is rolled back"


# ---------------------------------------------------------------------------------------------
# Where statistics are


@pytest.mark.parametrize(
    ("path", "content", "names"),
    [
        ("cds.yaml", real.response("cluster", real.cluster("a")), {""}),
        ("eds/a.yaml", real.response("assignment", real.assignment("d/w:80")), {"d/w_80"}),
        ("r.yaml", real.response("routes", {"name": "r"}), {"r"}),
        ("r.yaml", "x: {'@type': type.googleapis.com/envoy.config.route.v3.RouteConfiguration, "
         "name: r}", {"r"}),
        ("r.yaml", "resources:\n- virtual_hosts:\n  - name: no\n  name: r\n  '@type': type."
         "googleapis.com/envoy.config.route.v3.RouteConfiguration\n", {"r"}),
        ("s.yaml", real.response("secret", {"name": "s"}), {"s"}),
        ("x.yaml", "{{{", set()),
    ],
)  # fmt: skip
def test_the_names_of_a_file_in_statistics(path: str, content: str, names: set[str]) -> None:
    assert resource_names(path, text(content), {}) == names


def test_a_cluster_may_count_its_endpoints_under_another_name() -> None:
    source = real.file_source(f"{CURRENT}/eds/a.yaml")
    cluster = real.eds_cluster("web", source, alt_stat_name="alias")
    cluster["eds_cluster_config"]["service_name"] = "demo/web:80"
    for content in (
        real.response("cluster", cluster),
        yaml.safe_dump({"resources": [{"@type": CLUSTER, **cluster}]}),
    ):
        files = {"cds.yaml": text(content), "eds/a.yaml": text("broken", "eds")}
        assert resource_names("eds/a.yaml", files["eds/a.yaml"], files) >= {"alias", "web"}


def test_statistics_are_read() -> None:
    lines = """\
cluster.plain.update_success: 0
cluster_manager.cds.update_failure: 1
cluster_manager.cds.update_rejected: 1
cluster_manager.cds.update_success: 2
cluster_manager.warming_clusters: 4
cluster_manager.cds.version_text: "v1"
odd.update_success: 99999999999999999999999
"""
    counts, gauges = parse_stats(lines)
    assert counts == {"cluster_manager.cds": Counts(2, 2)}
    assert gauges == {"cluster_manager.warming_clusters": 4}

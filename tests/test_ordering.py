"""Make before break: kinds, unions and steps, as tables and as properties of random changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loader import (
    File,
    Refusal,
    Step,
    carry,
    clusters_in,
    file_of,
    independent,
    kind_at,
    kind_of,
    next_step,
    notify_order,
    references,
    refusals,
    unite,
    withhold,
)

TYPE = "type.googleapis.com/envoy.config."
CLUSTER = f"{TYPE}cluster.v3.Cluster"
ASSIGNMENT = f"{TYPE}endpoint.v3.ClusterLoadAssignment"
ROUTES = f"{TYPE}route.v3.RouteConfiguration"
LISTENER = f"{TYPE}listener.v3.Listener"
ROOT = "/srv/runtime/current"


# ---------------------------------------------------------------------------------------------
# Files


def as_json(kind: str, *resources: Mapping[str, Any], source: str = "configmap demo/xds") -> File:
    typed = [{"@type": kind, **resource} for resource in resources]
    return file_of(json.dumps({"resources": typed}).encode(), source)


def as_yaml(kind: str, *resources: Mapping[str, Any], source: str = "configmap demo/xds") -> File:
    """Block style, as people write it and as the loader renders it."""
    body = {"resources": [{"@type": kind, **resource} for resource in resources]}
    text = yaml.safe_dump(body, sort_keys=False, default_flow_style=False)
    return file_of(f'# made by hand\nversion_info: "1"\n{text}'.encode(), source)


def cluster(name: str, variant: int = 0, eds: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "connect_timeout": f"{variant + 1}s"}
    if eds:
        source = {"path_config_source": {"path": f"{ROOT}/{eds}"}}
        found |= {"type": "EDS", "eds_cluster_config": {"eds_config": source}}
    return found


def cds(*names: str, source: str = "configmap demo/xds") -> File:
    return as_json(CLUSTER, *(cluster(name) for name in names), source=source)


def rendered(*names: str) -> File:
    return as_yaml(CLUSTER, *(cluster(name) for name in names), source="services")


def eds(name: str, port: int = 80) -> File:
    return as_json(ASSIGNMENT, {"cluster_name": name, "endpoints": [{"priority": port}]})


def rds(*clusters: str, name: str = "routes") -> File:
    routes = [{"match": {"prefix": "/"}, "route": {"cluster": each}} for each in clusters]
    hosts = [{"name": "all", "domains": ["*"], "routes": routes}]
    return as_json(ROUTES, {"name": name, "virtual_hosts": hosts})


def lds(*paths: str, port: int = 80) -> File:
    listeners = [{"name": path, "port": port, "rds": f"{ROOT}/{path}"} for path in paths]
    return as_json(LISTENER, *listeners)


def other(text: str) -> File:
    return file_of(text.encode(), "configmap demo/xds")


def steps_of(published: Mapping[str, File], target: Mapping[str, File]) -> Iterator[Step]:
    """Every step to the target; each starts from the files alone, as after a restart."""
    for _ in range(10):
        step = next_step(dict(published), dict(target))
        if step is None:
            return
        yield step
        published = step.files
    raise AssertionError("it never ends")


def plan(published: Mapping[str, File], target: Mapping[str, File]) -> list[tuple[Any, ...]]:
    return [
        (step.stage, *step.changed, *(f"-{path}" for path in step.removed))
        for step in steps_of(published, target)
    ]


# ---------------------------------------------------------------------------------------------
# What a file is


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (as_json(CLUSTER, cluster("a")).content, "cds"),
        (as_yaml(CLUSTER, cluster("a")).content, "cds"),
        (lds("rds.yaml").content, "lds"),
        (eds("a").content, "eds"),
        (rds("a").content, "rds"),
        (f"resources:\n- '@type': {TYPE}route.v3.ScopedRouteConfiguration".encode(), "scoped_rds"),
        (b"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", "sds"),
        (b"type.googleapis.com/envoy.service.runtime.v3.Runtime", "rtds"),
        (f"type_url: {CLUSTER}\nresources: []\n".encode(), "cds"),
        # A wrapper and other types are passed over, the first xDS type counts.
        (
            f"type.googleapis.com/envoy.service.discovery.v3.Resource {ROUTES} {CLUSTER}".encode(),
            "rds",
        ),
        (f"{TYPE}cluster.v3.Cluster.CustomClusterType {TYPE}nonsense {LISTENER}".encode(), "lds"),
        (f"{TYPE}core.v3.TypedExtensionConfig {CLUSTER}".encode(), "ecds"),
        (b"type.googleapis.com/envoy.api.v2.Cluster", ""),  # v2 is gone from Envoy
        (b"", ""),
        (b"\xff\xfe\x00", ""),
        (b"{{{ nothing", ""),
    ],
)
def test_the_first_xds_type_url_tells_the_kind(content: bytes, kind: str) -> None:
    assert kind_of(content) == kind


def test_a_file_without_resources_is_known_by_what_stood_there_or_by_its_name() -> None:
    empty = {"all.yaml": other("resources: []\n"), "cds.json": other("{}")}
    assert kind_at("all.yaml", empty, {"all.yaml": cds("a")}) == "cds"
    assert kind_at("all.yaml", empty) == ""
    assert kind_at("cds.json", empty) == "cds"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('{"resources": []}', set()),
        ('{"resources": [{"name": "a/b"}, {"load_assignment": {}, "name": "c"}]}', {"a/b", "c"}),
        ('{"resources": [{"type": "EDS"}]}', None),
        ('{"resources": [1]}', None),
        ('{"resources": [', None),
        ("resources: []\n", set()),
        ("resources:\n- name: a\n- type: EDS\n  name: 'it''s'\n", {"a", "it's"}),
        (
            "resources:\n  # one\n  - '@type': x\n    name: \"a:b\" # c\n\n"
            "  -\n    name: c#d\nx: 1\n",
            {"a:b", "c#d"},
        ),
        ("resources:\n- load_assignment:\n    name: no\n  name: yes/1\n", {"yes/1"}),
        ("# c\n---\nversion_info: '1'\nresources:\n- name: a\n---\nresources:\n- name: b\n", {"a"}),
        (
            "resources:\n- name: a\n  metadata: |\n    - name: b\n\n    name: c\n- name: d\n",
            {"a", "d"},
        ),
        ('resources:\n- {"name": "j", "x": [1]}\n', {"j"}),
        ("resources:\r\n- name: a\r\n", {"a"}),
        # Better unknown than wrong:
        ("resources: [{name: a}]\n", None),
        ("resources:\n- {name: a}\n", None),
        ("resources:\n- &x\n  name: a\n- *x\n", None),
        ("resources:\n- <<: *x\n  name: a\n", None),
        ("resources:\n- name: >\n    folded\n", None),
        ("resources:\n- type: EDS\n", None),
        ("other: 1\n", None),
        ("", None),
    ],
)
def test_cluster_names_are_read_exactly_or_not_at_all(text: str, names: set[str] | None) -> None:
    found = clusters_in(other(text))
    assert (None if found is None else set(found)) == names
    if names is not None:  # a real parser agrees
        first = next(iter(yaml.safe_load_all(text)))
        assert {item["name"] for item in first["resources"]} == names


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"cluster":"web"}', True),
        (b"cluster: web\n", True),
        (b"route: {cluster: web}", True),
        (b"- 'web'\n", True),
        (b'{"cluster":"w\\u0065b"}', True),
        (b"cluster: demo/web/http\n", False),
        (b"cluster: webs\n", False),
        (b"cluster: web-2\n", False),
        (b"", False),
    ],
)
def test_a_reference_is_a_whole_word(content: bytes, named: bool) -> None:
    assert references(content, ["other", "web"]) is named
    assert not references(content, [])


def test_a_name_with_a_space_is_found_too() -> None:
    assert references(b'cluster: "my own"', ["my own"])


# ---------------------------------------------------------------------------------------------
# Old and new clusters together


@pytest.mark.parametrize("make", [cds, rendered])
def test_a_union_has_all_clusters_and_the_new_definitions(make: Any) -> None:
    old, new = make("a", "b"), make("c", "b")
    both = unite(old, new)
    assert sorted(clusters_in(both) or ()) == ["a", "b", "c"]
    assert both.source == new.source
    assert unite(both, new) == both, "a restart within a step changes nothing"
    parsed = yaml.safe_load(both.content)
    assert [item["name"] for item in parsed["resources"]] == ["c", "b", "a"]
    assert parsed["version_info"] not in ("", yaml.safe_load(new.content).get("version_info"))
    assert unite(old, both) != old


def test_the_new_definition_of_a_cluster_wins() -> None:
    old = as_json(CLUSTER, cluster("a", 0), cluster("b", 0))
    new = as_json(CLUSTER, cluster("a", 7))
    resources = json.loads(unite(old, new).content)["resources"]
    assert [(one["name"], one["connect_timeout"]) for one in resources] == [
        ("a", "8s"),
        ("b", "1s"),
    ]


def test_a_union_that_adds_nothing_is_one_of_its_sides() -> None:
    assert unite(cds("a", "b"), cds("a")) == cds("a", "b"), "nothing new: the old file stays"
    assert unite(cds("a"), cds("a", "b")) == cds("a", "b"), "nothing old: the new file goes out"
    assert unite(rendered("a"), rendered()) == rendered("a")
    kept = unite(rendered("a", "b"), rendered("c"), frozenset("b"))
    assert sorted(clusters_in(kept) or ()) == ["b", "c"]


def test_forms_mix_where_the_new_file_can_hold_both() -> None:
    both = unite(cds("a"), rendered("b"))
    assert sorted(clusters_in(both) or ()) == ["a", "b"]
    assert unite(both, rendered("b")) == both
    assert {one["name"] for one in yaml.safe_load(both.content)["resources"]} == {"a", "b"}
    assert unite(rendered("a"), cds("b")) == cds("b"), "block YAML does not fit into JSON"


def test_yaml_of_a_configmap_is_never_rewritten() -> None:
    old, new = as_yaml(CLUSTER, cluster("a")), as_yaml(CLUSTER, cluster("b"))
    assert unite(old, new) == new


# ---------------------------------------------------------------------------------------------
# Steps, as a table


A = {"cds.yaml": cds("a"), "rds.yaml": rds("a"), "lds.yaml": lds("rds.yaml")}

PLANS: list[tuple[str, dict[str, File], dict[str, File], list[tuple[Any, ...]]]] = [
    ("nothing", A, A, []),
    ("first", {}, A, [(1, "cds.yaml", "rds.yaml", "lds.yaml")]),
    ("weights", A, A | {"rds.yaml": rds("a", "a")}, [(3, "rds.yaml")]),
    (
        "endpoints",
        A | {"eds/a.yaml": eds("a")},
        A | {"eds/a.yaml": eds("a", 81)},
        [(1, "eds/a.yaml")],
    ),
    ("clusters alone", A, A | {"cds.yaml": cds("a", "b")}, [(2, "cds.yaml")]),
    (
        "cluster and route",
        A,
        A | {"cds.yaml": cds("a", "b"), "rds.yaml": rds("b")},
        [(2, "cds.yaml"), (3, "rds.yaml")],
    ),
    (
        "replaced",
        A,
        A | {"cds.yaml": cds("b"), "rds.yaml": rds("b")},
        [(2, "cds.yaml"), (3, "rds.yaml"), (4, "cds.yaml")],
    ),
    (
        "gone",
        A | {"cds.yaml": cds("a", "b"), "rds.yaml": rds("b")},
        A,
        [(3, "rds.yaml"), (4, "cds.yaml")],
    ),
    (
        "definition",
        A,
        A | {"cds.yaml": as_json(CLUSTER, cluster("a", 9)), "rds.yaml": rds("a", "a")},
        [(2, "cds.yaml"), (3, "rds.yaml")],
    ),
    (
        "everything",
        A | {"cds.yaml": as_json(CLUSTER, cluster("a", eds="eds/a.yaml")), "eds/a.yaml": eds("a")},
        A
        | {
            "cds.yaml": as_json(CLUSTER, cluster("b", eds="eds/b.yaml")),
            "eds/b.yaml": eds("b"),
            "rds.yaml": rds("b"),
            "rds2.yaml": rds("b"),
            "lds.yaml": lds("rds.yaml", "rds2.yaml"),
        },
        [
            (1, "eds/b.yaml", "rds2.yaml"),
            (2, "cds.yaml"),
            (3, "rds.yaml", "lds.yaml"),
            (4, "cds.yaml", "-eds/a.yaml"),
        ],
    ),
    (
        "a cluster is replaced, no route moves",
        A | {"cds.yaml": cds("a", "b")},
        A | {"cds.yaml": cds("a", "c")},
        [(2, "cds.yaml")],
    ),
    (
        "a cluster is taken away",
        A | {"cds.yaml": cds("a", "b")},
        A,
        [(4, "cds.yaml")],
    ),
    (
        "a cluster and its endpoints go",
        A
        | {
            "cds.yaml": as_json(CLUSTER, cluster("a"), cluster("b", eds="eds/b.yaml")),
            "eds/b.yaml": eds("b"),
        },
        A,
        [(4, "cds.yaml", "-eds/b.yaml")],
    ),
    ("routes on their own", A, A | {"rds2.yaml": rds("a")}, [(3, "rds2.yaml")]),
    (
        "a listener goes",
        A | {"lds.yaml": lds("rds.yaml", "rds2.yaml"), "rds2.yaml": rds("a")},
        A,
        [(3, "lds.yaml"), (4, "-rds2.yaml")],
    ),
    (
        "unknown kinds",
        A | {"x.lua": other("1")},
        A | {"x.lua": other("2"), "y.lua": other("3")},
        [(1, "x.lua", "y.lua")],
    ),
    (
        "all clusters go",
        A,
        {"cds.yaml": other('{"resources": []}'), "rds.yaml": rds()},
        [(3, "rds.yaml"), (4, "cds.yaml", "-lds.yaml")],
    ),
    (
        "YAML of a ConfigMap that adds and removes",
        A | {"cds.yaml": as_yaml(CLUSTER, cluster("a"))},
        A | {"cds.yaml": as_yaml(CLUSTER, cluster("b")), "rds.yaml": rds("b")},
        [(2, "cds.yaml"), (3, "rds.yaml")],
    ),
    (
        "YAML of a ConfigMap that removes",
        A | {"cds.yaml": as_yaml(CLUSTER, cluster("a"), cluster("b")), "rds.yaml": rds("b")},
        A | {"cds.yaml": as_yaml(CLUSTER, cluster("a"))},
        [(3, "rds.yaml"), (4, "cds.yaml")],
    ),
    (
        "flow YAML",
        A | {"cds.yaml": other(f"resources: [{{'@type': {CLUSTER}, name: a}}]")},
        A
        | {
            "cds.yaml": other(f"resources: [{{'@type': {CLUSTER}, name: b}}]"),
            "rds.yaml": rds("b"),
        },
        [(2, "cds.yaml"), (3, "rds.yaml")],
    ),
    (
        "a file where a directory was",
        A | {"x/y.lua": other("1")},
        A | {"x": other("2")},
        [(1, "x", "-x/y.lua")],
    ),
    ("a mode", A, A | {"rds.yaml": A["rds.yaml"]._replace(mode=0o600)}, [(3, "rds.yaml")]),
    ("a source", A, A | {"rds.yaml": A["rds.yaml"]._replace(source="services")}, []),
]


@pytest.mark.parametrize(
    ("published", "target", "steps"), [row[1:] for row in PLANS], ids=[row[0] for row in PLANS]
)
def test_steps(
    published: dict[str, File], target: dict[str, File], steps: list[tuple[Any, ...]]
) -> None:
    assert plan(published, target) == steps


def test_children_are_noticed_first() -> None:
    files = A | {"eds/a.yaml": eds("a"), "z.lua": other("")}
    order = ["eds/a.yaml", "z.lua", "cds.yaml", "rds.yaml", "lds.yaml"]
    assert notify_order(reversed(order), files) == order


# ---------------------------------------------------------------------------------------------
# Steps, as a property


NAMES = ["a", "b", "c/d", "e:f"]


@st.composite
def states(draw: st.DrawFn) -> dict[str, File]:
    """A consistent set of files: routes name clusters that are there, parents files that are."""
    chosen = draw(
        st.dictionaries(st.sampled_from(NAMES), st.tuples(st.integers(0, 1), st.booleans()))
    )
    files: dict[str, File] = {}
    clusters = []
    for name, (variant, has_file) in sorted(chosen.items()):
        path = f"eds/{NAMES.index(name)}.yaml" if has_file else ""
        clusters.append(cluster(name, variant, path))
        if path:
            files[path] = eds(name, draw(st.integers(1, 2)))
    form = draw(st.sampled_from([as_json, as_yaml]))
    files["cds.yaml"] = form(CLUSTER, *draw(st.permutations(clusters)), source="services")
    used = st.lists(st.sampled_from(sorted(chosen)), max_size=3) if chosen else st.just([])
    paths = draw(st.lists(st.sampled_from(["rds.yaml", "rds2.yaml"]), unique=True))
    for path in paths:
        files[path] = rds(*draw(used), name=path)
    files["lds.yaml"] = lds(*paths, port=draw(st.integers(1, 2)))
    if draw(st.booleans()):
        files["flags.json"] = other(str(draw(st.integers(1, 2))))
    return files


def named_files(file: File) -> set[str]:
    return {
        path.strip('",}\n')
        for path in file.content.decode().split(f"{ROOT}/")[1:]
        for path in [path.split('"')[0].split("\n")[0]]
    }


def named_clusters(file: File) -> set[str]:
    return {
        route["route"]["cluster"]
        for one in json.loads(file.content)["resources"]
        for host in one["virtual_hosts"]
        for route in host["routes"]
    }


@settings(max_examples=150, deadline=None)
@given(states(), states())
def test_every_step_is_consistent_and_the_target_is_reached(
    published: dict[str, File], target: dict[str, File]
) -> None:
    mixed = clusters_in(published["cds.yaml"]) and (
        published["cds.yaml"].content[:1] != target["cds.yaml"].content[:1]
    )
    before, count = published, 0
    for step in steps_of(published, target):
        count += 1
        there = clusters_in(step.files["cds.yaml"])
        assert there is not None
        read = named_files(before["lds.yaml"]) | named_files(step.files["lds.yaml"])
        for path, file in step.files.items():
            if kind_of(file.content) == "rds" and path in read and not mixed:
                assert named_clusters(file) <= there, (step, path)
        for parent in ("cds.yaml", "lds.yaml"):
            assert named_files(step.files[parent]) <= step.files.keys(), "a child is missing"
            if parent in step.changed:
                assert named_files(step.files[parent]) <= before.keys(), "child and parent at once"
        assert {path for path, file in step.files.items() if before.get(path) != file} >= set(
            step.changed
        )
        before = step.files
    assert count <= 4
    assert before == target


# ---------------------------------------------------------------------------------------------
# What overtakes a step that waits


def test_endpoints_and_unrelated_routes_overtake() -> None:
    start = A | {"eds/a.yaml": eds("a"), "rds2.yaml": rds("a")}
    pinned = start | {"cds.yaml": cds("b"), "rds.yaml": rds("b")}
    step = next_step(start, pinned)
    assert step is not None
    assert step.stage == 2
    published = step.files
    newer = pinned | {"eds/a.yaml": eds("a", 81), "rds2.yaml": rds("a", "a"), "new.lua": other("1")}
    now = independent(published, pinned, newer, start)
    assert now == published | {"eds/a.yaml": eds("a", 81)}, "rds2 names a cluster that will go"

    kept = pinned | {"cds.yaml": cds("a", "b")}
    newer = newer | {"cds.yaml": cds("a", "b")}
    now = independent(published, kept, newer, start)
    assert now == published | {"eds/a.yaml": eds("a", 81), "rds2.yaml": rds("a", "a")}
    assert carry(kept, published, now)["rds2.yaml"] == rds("a", "a")


@pytest.mark.parametrize(
    ("change", "goes"),
    [
        ({"rds2.yaml": rds("b")}, False),  # the cluster that is on its way
        ({"rds2.yaml": rds("c")}, False),  # a cluster that is only desired
        ({"rds2.yaml": rds()}, True),
        ({"cds.yaml": cds("a", "b", "c")}, False),
        ({"lds.yaml": lds("rds.yaml", port=81)}, True),
        ({"lds.yaml": lds("rds3.yaml"), "rds3.yaml": rds("a")}, False),
    ],
)
def test_what_depends_on_something_pending_waits(change: dict[str, File], goes: bool) -> None:
    start = A | {"rds2.yaml": rds("a")}
    pinned = start | {"cds.yaml": cds("a", "b"), "rds.yaml": rds("b")}
    published = start | {"cds.yaml": cds("a", "b")}
    newer = pinned | {"cds.yaml": cds("a", "b", "c")} | change
    now = independent(published, pinned, newer, start)
    assert (now != published) is goes


@settings(max_examples=80, deadline=None)
@given(states(), states(), states())
def test_overtaking_keeps_every_step_consistent(
    start: dict[str, File], pinned: dict[str, File], newer: dict[str, File]
) -> None:
    """Between any two steps something newer may slip in; no route loses its cluster."""
    if start["cds.yaml"].content[:1] != pinned["cds.yaml"].content[:1]:
        return
    before, published = start, start
    for step in steps_of(start, pinned):
        before, published = published, step.files
        now = independent(published, pinned, newer, before)
        there = clusters_in(now["cds.yaml"])
        assert there is not None
        read = named_files(before["lds.yaml"]) | named_files(now["lds.yaml"])
        for path in now.keys() & read:
            if now[path] != published[path] and kind_of(now[path].content) == "rds":
                assert named_clusters(now[path]) <= there
                later = carry(pinned, published, now)
                names = clusters_in(later["cds.yaml"])
                assert names is not None
                assert named_clusters(now[path]) <= names


# ---------------------------------------------------------------------------------------------
# Refusals


def refuse(**files: File) -> dict[str, Refusal]:
    return {f"{name}.yaml": Refusal(file.digest, "no") for name, file in files.items()}


def test_a_refused_file_goes_back_and_the_rest_proceeds() -> None:
    start = A | {"eds/a.yaml": eds("a")}
    bad = rds("a", "bad")
    desired = start | {"rds.yaml": bad, "eds/a.yaml": eds("a", 81), "cds.yaml": cds("a", "b")}
    result, notes = withhold(desired, start | {"rds.yaml": bad}, refuse(rds=bad), start)
    assert result == desired | {"rds.yaml": start["rds.yaml"]}
    assert len(notes) == 1
    assert "rds.yaml" in notes[0]
    fixed = desired | {"rds.yaml": rds("b")}
    assert withhold(fixed, start, refuse(rds=bad), start) == (fixed, [])


def test_routes_to_clusters_of_a_refused_cds_wait_with_it() -> None:
    bad = cds("a", "b", "bad")
    desired = A | {"cds.yaml": bad, "rds.yaml": rds("b"), "rds2.yaml": rds("a")}
    result, notes = withhold(
        desired, A | {"cds.yaml": unite(A["cds.yaml"], bad)}, refuse(cds=bad), A
    )
    assert result == A | {"rds2.yaml": rds("a")}
    assert any(note.startswith("rds.yaml") for note in notes)


def test_what_held_routes_name_stays() -> None:
    start = A | {
        "cds.yaml": as_json(CLUSTER, cluster("a", eds="eds/a.yaml")),
        "eds/a.yaml": eds("a"),
    }
    bad = rds("b", "bad")
    desired = {"cds.yaml": cds("b"), "rds.yaml": bad, "lds.yaml": lds("rds.yaml")}
    result, _ = withhold(desired, start, refuse(rds=bad), start)
    assert result["rds.yaml"] == start["rds.yaml"]
    assert sorted(clusters_in(result["cds.yaml"]) or ()) == ["a", "b"]
    assert result["eds/a.yaml"] == eds("a"), "and so does what those clusters name"
    again, _ = withhold(desired, result, refuse(rds=bad), start)
    assert again == result, "it settles"


def test_held_routes_hold_yaml_clusters_of_a_configmap_whole() -> None:
    start = A | {"cds.yaml": as_yaml(CLUSTER, cluster("a"))}
    bad = rds("b", "bad")
    desired = A | {"cds.yaml": as_yaml(CLUSTER, cluster("b")), "rds.yaml": bad}
    result, _ = withhold(desired, start, refuse(rds=bad), start)
    assert result == start


def test_a_refused_new_file_is_left_out_with_what_names_it() -> None:
    bad = eds("b", 9)
    desired = A | {
        "cds.yaml": as_json(CLUSTER, cluster("a"), cluster("b", eds="eds/b.yaml")),
        "eds/b.yaml": bad,
        "rds.yaml": rds("b"),
    }
    refused = {"eds/b.yaml": Refusal(bad.digest, "two resources")}
    result, notes = withhold(desired, A | {"eds/b.yaml": bad}, refused, A)
    assert result == A
    assert len(notes) == 3


def test_a_refused_first_file_stays_if_there_is_nothing_better() -> None:
    """Envoy starts on a bad file, but not on a missing one."""
    bad = other("{{{")
    desired = A | {"cds.yaml": bad}
    assert withhold(desired, desired, refuse(cds=bad), {})[0] == desired


def test_refused_bytes_are_put_back_before_anything_is_built_on_them() -> None:
    bad = cds("a", "bad")
    published = A | {"cds.yaml": bad}
    target = A | {"rds.yaml": rds("a", "a"), "eds/n.yaml": eds("n")}
    first = next_step(published, target, refuse(cds=bad))
    assert first is not None
    assert first.changed == ("eds/n.yaml",)
    second = next_step(first.files, target, refuse(cds=bad))
    assert second is not None
    assert (second.changed, second.reason) == (("cds.yaml",), "put back")
    assert second.files["cds.yaml"] == A["cds.yaml"]


def test_a_refused_union_is_a_refusal_of_what_was_desired() -> None:
    target = A | {"cds.yaml": cds("b")}
    shown = unite(A["cds.yaml"], target["cds.yaml"])
    known = refusals({}, {"cds.yaml": "bad"}, target, A | {"cds.yaml": shown}, A)
    assert known == {"cds.yaml": Refusal(target["cds.yaml"].digest, "bad", shown.digest)}
    assert withhold(target, A | {"cds.yaml": shown}, known, A)[0] == A
    # What was put back and is rejected too is no news about the desired bytes.
    assert refusals(known, {"cds.yaml": "still"}, A, A, A) == known


@settings(max_examples=80, deadline=None)
@given(
    states(),
    states(),
    st.sets(st.sampled_from(["cds.yaml", "rds.yaml", "lds.yaml", "eds/0.yaml", "eds/1.yaml"])),
)
def test_what_is_withheld_leaves_consistent_files(
    confirmed: dict[str, File], desired: dict[str, File], bad: set[str]
) -> None:
    if confirmed["cds.yaml"].content[:1] != desired["cds.yaml"].content[:1]:
        return
    refused = {
        path: Refusal(desired[path].digest, "no")
        for path in bad & desired.keys()
        if confirmed.get(path) != desired[path]
    }
    result, _ = withhold(desired, confirmed, refused, confirmed)
    there = clusters_in(result["cds.yaml"])
    assert there is not None
    for path in refused:
        if path in confirmed:
            assert result[path] == confirmed[path]
    for parent in ("cds.yaml", "lds.yaml"):
        assert named_files(result[parent]) <= result.keys()
    for path, file in result.items():
        if kind_of(file.content) == "rds" and path in named_files(result["lds.yaml"]):
            assert named_clusters(file) <= there
    assert withhold(desired, result, refused, confirmed)[0] == result, "it settles"

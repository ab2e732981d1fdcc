"""Annotations become routes: weights, who owns a host, and what nobody may ask for.

Every rendering of this file is also read with Envoy's own message types (`rendered`).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

import loader
from tests.conftest import RunLoader
from tests.support import rendering as r
from tests.support.rendering import (
    NO_SLICE,
    Object,
    clusters,
    endpoint,
    endpoint_slice,
    objects_of,
    port,
    rendered,
    renderer,
    routed,
    routes,
    seconds,
    service,
)

# ------------------------------------------------------------------------------------------
# Routes


WEB = "web.demo.svc.cluster.local"


ROUTES: dict[str, tuple[list[Object], dict[str, list[str]]]] = {
    "no annotation, no route": ([service()], {}),
    "false switches off": ([routed(route="false", hosts="x")], {}),
    "the default": ([routed(route="true")], {f"{WEB}, {WEB}:*": ["/ -> demo/web/http"]}),
    "hosts, lower case, each once": (
        [routed(hosts="B.example, a.EXAMPLE,,a.example")],
        {
            "a.example, a.example:*": ["/ -> demo/web/http"],
            "b.example, b.example:*": ["/ -> demo/web/http"],
        },
    ),
    "wildcards": (
        [routed(hosts="*, *.example, *-x.example, x.*, x-*, under_score.x")],
        {
            "*": ["/ -> demo/web/http"],
            "*-x.example": ["/ -> demo/web/http"],
            "*.example": ["/ -> demo/web/http"],
            "under_score.x, under_score.x:*": ["/ -> demo/web/http"],
            "x-*": ["/ -> demo/web/http"],
            "x.*": ["/ -> demo/web/http"],
        },
    ),
    "from most to least specific": (
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
    ),
    "weights": (
        [
            routed("demo/b", hosts="h", weight="10"),
            routed("demo/a", hosts="h", weight="1000000"),
            routed("demo/d", hosts="h", weight="0"),
        ],
        {"h, h:*": ["/ -> demo/a/http=1000000, demo/b/http=10, demo/d/http=0"]},
    ),
    "no weights: equal parts": (
        [routed(f"demo/{name}", hosts="h") for name in "abc"],
        {"h, h:*": ["/ -> demo/a/http=1, demo/b/http=1, demo/c/http=1"]},
    ),
    "gRPC services": (
        [routed("demo/a", port("grpc", 9000), hosts="h", grpc="x.v1.Greeter, Health")],
        {"h, h:*": ["/x.v1.Greeter/ -> demo/a/grpc", "/Health/ -> demo/a/grpc"]},
    ),
    "gRPC services and a prefix": (
        [routed("demo/a", port("grpc", 9000), hosts="h", grpc="Health", prefix="/x")],
        {"h, h:*": ["/Health/ -> demo/a/grpc", "/x -> demo/a/grpc"]},
    ),
    "the first HTTP port": (
        [routed("demo/a", port("metrics", 9000), port("http", 80), route="true")],
        {"a.demo.svc.cluster.local, a.demo.svc.cluster.local:*": ["/ -> demo/a/http"]},
    ),
    "that one port, and no domain for others": (
        [routed("demo/a", port("x", 9000), port("http", 80), hosts="h, *.h", port="x")],
        {"*.h": ["/ -> demo/a/x"], "h, h:*": ["/ -> demo/a/x"]},
    ),
    "port by number": (
        [routed("demo/a", port("x", 9000), port("y", 81), hosts="h", port="81")],
        {"h, h:*": ["/ -> demo/a/y"]},
    ),
}


@pytest.mark.parametrize(("raw", "wanted"), ROUTES.values(), ids=ROUTES)
def test_routes(raw: list[Object], wanted: dict[str, list[str]]) -> None:
    found = rendered(*raw)
    assert routes(found) == wanted
    assert not found.warnings
    domains = [domain for key in wanted for domain in key.split(", ")]
    assert len(set(domains)) == len(domains)


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ([None], [1]),
        ([5, None], [5, 95]),
        ([None, 5, None], [48, 5, 47]),
        ([10, None, None, None, None], [10, 23, 23, 22, 22]),
        ([150, None, 1], [150, 0, 1]),
        ([0, None], [0, 100]),
        ([None, 99, *[None] * 4], [1, 99, 0, 0, 0, 0]),
    ],
)
def test_who_has_no_weight_takes_what_the_others_leave(
    weights: list[int | None], wanted: list[int]
) -> None:
    assert loader.shares(weights) == wanted


def splits_in(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The lines about shares that were logged since the last look, all of them at INFO."""
    lines = [line for line in capfd.readouterr().err.splitlines() if " is split by weight" in line]
    return [line.partition(" INFO ")[2] for line in lines]


def test_one_annotation_is_a_canary_and_its_shares_are_named(
    capfd: pytest.CaptureFixture[str],
) -> None:
    raw = routed("demo/web", hosts="h"), routed("demo/web-2", hosts="h", weight="5")
    found = rendered(*raw)
    assert routes(found) == {"h, h:*": ["/ -> demo/web/http=95, demo/web-2/http=5"]}
    line = "service demo/web: h/ is split by weight: demo/web/http 95, demo/web-2/http 5"
    assert {*splits_in(capfd)} == {line}
    assert not found.warnings
    again = renderer()
    for more, logged in (((), [line]), ((routed("demo/other", hosts="x"),), []), ((), [])):
        again.render(objects_of(*raw, *more))
        assert splits_in(capfd) == logged, "only where shares changed"


def test_shares_are_logged_at_info(run_loader: RunLoader, tmp_path: Path) -> None:
    """Nothing is wrong with them: a warning would be one for the length of each canary release."""
    raw = [routed("demo/web", hosts="h"), routed("demo/web-2", hosts="h", weight="5")]
    source = tmp_path / "objects.json"
    items = [{"kind": "Service", **one} for one in raw]
    source.write_text(json.dumps({"kind": "List", "items": items}))
    words = ("--services", "*", "--from-file", str(source), "--log-format", "json")
    for mode in ("--onetime", "--dry-run"):
        done = run_loader(mode, *words, server=None)
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stderr.splitlines()]
        [level] = [one["level"] for one in found if "h/ is split by weight" in one["message"]]
        assert level == "info"


@pytest.mark.parametrize("weight", ["95%", "-1", "1.5", "1000001", "4294967296", "²", "", "much"])
def test_a_wrong_weight_counts_as_none(weight: str) -> None:
    """A typing error on the stable Service must not send everything to the canary."""
    found = rendered(
        routed("demo/a", hosts="h", weight=weight), routed("demo/b", hosts="h", weight="5")
    )
    assert routes(found) == {"h, h:*": ["/ -> demo/a/http=95, demo/b/http=5"]}
    [line] = found.warnings
    assert f"service demo/a: xds-loader/weight counts as none: {weight!a} is not 0 to 100" in line


@pytest.mark.parametrize(
    ("raw", "wanted", "warning"),
    [
        ([routed(hosts="good, bad host")], {"good, good:*": ["/ -> demo/web/http"]},
         "service demo/web: xds-loader/hosts: left out: 'bad host': not a valid host name"),
        ([routed(hosts="x:80")], {}, "'x:80': not a valid host name (no port"),
        ([routed(hosts="a\nb")], {}, "'a\\nb': not a valid host name"),
        *(([routed(hosts=host)], {}, f"{host!a}: not a valid host name")
          for host in ("a*b", "*.a.*", "a..b", "ä.example", "*80", "*a", "a*", "**", ".a", "a.")),
        ([routed(hosts="a" * 254)], {}, "not a valid host name"),
        ([routed(hosts=",")], {}, "is not routed: xds-loader/hosts: 1 to 32 valid hosts expected"),
        ([routed(prefix="x")], {}, "is not routed: xds-loader/prefix: not the beginning of a path"),
        ([routed(prefix="/x\ny")], {}, "not the beginning of a path: '/x\\ny'"),
        ([routed(prefix="/x?y=1")], {}, "not the beginning of a path: '/x?y=1'"),
        ([routed(prefix="/" + "x" * 255)], {}, "not the beginning of a path: '/xxx"),
        ([routed(grpc="a/b")], {}, "xds-loader/grpc: not the name of a gRPC service: 'a/b'"),
        ([routed(route="yes")], {}, 'xds-loader/route: "true" or "false" expected'),
        ([routed(port="admin")], {}, "xds-loader/port: the Service has no TCP port 'admin'"),
        ([routed("demo/web", port("a", 1), port("b", 2), route="true")], {},
         "which of its ports is HTTP? Set appProtocol or xds-loader/port"),
        ([routed("demo/web", port("a", 1, protocol="UDP"), route="true")], {},
         "which of its ports is HTTP?"),
        ([routed(hosts="h", weight="0")], {"h, h:*": []},
         "service demo/web: h/ has no route: all weights are 0"),
        ([routed(hosts="h", host="x")], {"h, h:*": ["/ -> demo/web/http"]},
         "service demo/web: unknown annotation 'xds-loader/host'"),
        ([routed(host="x")], {}, "unknown annotation 'xds-loader/host'"),
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
    # Its clusters and endpoints never depend on its annotations.
    plain = copy.deepcopy(raw)
    for one in plain:
        one["metadata"]["annotations"] = {}
    without = rendered(*plain, routed("demo/good", hosts="fine"))
    assert {**found.files, "rds.yaml": 0} == {**without.files, "rds.yaml": 0}


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
    [warning] = found.warnings
    assert warning.startswith("service b/web: port http is left out: service a/web has a cluster")
    assert warning.endswith("; is not routed: its port http has no cluster")
    found = rendered(  # never to another port of the Service, which has the name
        routed("a/web", port("metrics", 9000), port("http", 80), hosts="a"),
        config={"cluster": {"name": "{service}"}},
    )
    assert routes(found) == {}
    [warning] = found.warnings
    assert warning.startswith("service a/web: port http is left out: service a/web has a cluster")
    assert warning.endswith("; is not routed: its port http has no cluster")


def test_prefix_suffix_and_name_are_configurable() -> None:
    config = {"route": {"annotation_prefix": "x.io", "suffix": "corp", "name": "all"}}
    raw = service(annotations={"x.io/route": "true", "xds-loader/hosts": "not-mine"})
    found = rendered(raw, config=config)
    assert list(routes(found)) == ["web.demo.svc.corp, web.demo.svc.corp:*"]
    assert r.resources(found, "rds.yaml")[0]["name"] == "all"


# ------------------------------------------------------------------------------------------
# Who a host belongs to

OLD, NEW = "2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("one", "two", "owner"),
    [
        ({"created": NEW}, {"created": OLD}, "b"),
        ({"created": OLD}, {"created": NEW}, "a"),
        ({"created": OLD}, {"created": OLD}, "a"),
        ({}, {"created": NEW}, "b"),  # one that is not created yet takes nothing from anybody
    ],
)
@pytest.mark.parametrize("host", ["h", "*.h", "*"])
def test_a_host_belongs_to_the_namespace_of_its_oldest_service(
    one: dict[str, str], two: dict[str, str], owner: str, host: str
) -> None:
    raw = [
        routed("a/web", hosts=f"{host}, a.example", **one),
        routed("b/web", hosts=f"{host.upper()}, b.example", prefix="/b", **two),
        routed("b/old", hosts="other", created="2000-01-01T00:00:00Z"),
    ]
    found = routes(rendered(*raw))
    domains = host if "*" in host else f"{host}, {host}:*"
    assert found.pop(domains) == [{"a": "/ -> a/web/http", "b": "/b -> b/web/http"}[owner]]
    assert list(found) == ["a.example, a.example:*", "b.example, b.example:*", "other, other:*"]
    loser = "a" if owner == "b" else "b"
    assert rendered(*raw).warnings == (
        f"service {loser}/web: is not routed at {host}: an older Service of namespace {owner} "
        f"has it",
    )


def test_the_owner_of_a_host_keeps_it_whatever_is_wrong_with_its_service() -> None:
    """A typing error, or a cluster that is suppressed, hands the host over to nobody."""
    thief = routed("b/web", hosts="h", created=NEW)
    config = {"cluster": {"overrides": [{"match": {"namespace": "off"}, "suppress": True}]}}
    for owner in (
        routed("a/web", hosts="h", created=OLD, prefix="wrong"),
        routed("a/web", hosts="h", created=OLD, port="none"),
        routed("a/web", hosts="h", created=OLD, route="yes"),
        routed("a/web", hosts="h", created=OLD, weight="wrong"),
        routed("off/web", hosts="h", created=OLD),
        routed("a/web", hosts=",".join(["h", *(f"i{i}" for i in range(32))]), created=OLD),
    ):
        found = routes(rendered(owner, thief, config=config))
        assert "b/web/http" not in str(found)
    # One that is switched off claims nothing.
    off = routed("a/web", hosts="h", created=OLD, route="false")
    assert routes(rendered(off, thief)) == {"h, h:*": ["/ -> b/web/http"]}


@pytest.mark.parametrize(
    "host",
    [
        *("web.demo.svc.cluster.local", "WEB.Demo.svc.CLUSTER.local"),
        *("x.web.demo.svc.cluster.local", "*.demo.svc.cluster.local"),
        *("*.svc.cluster.local", "*-x.demo.svc.cluster.local"),
        *("web.demo.svc.*", "web.demo.svc.cluster.*"),
        *("svc.svc.svc.cluster.local", "demo.svc.cluster.local"),
    ],
)  # fmt: skip
def test_names_of_services_belong_to_their_namespace_alone(host: str) -> None:
    """Even if nobody else claims them, and whoever is older."""
    found = rendered(routed("evil/web", hosts=f"{host}, fine", created=OLD))
    assert list(routes(found)) == ["fine, fine:*"]
    [warning] = found.warnings
    assert f"service evil/web: xds-loader/hosts: left out: {host.lower()!a}: not a v" in warning
    assert warning.endswith(", or another namespace's")
    own = "x.web.demo.svc.cluster.local, web.demo.svc.*, *.demo.svc.cluster.local, a.svc.example"
    assert len(routes(rendered(routed(hosts=own)))) == 4
    other = {"route": {"suffix": "Corp"}}
    assert routes(rendered(routed("e/web", hosts="web.demo.svc.corp"), config=other)) == {}
    assert routes(rendered(routed("e/web", hosts="web.demo.svc.cluster.local"), config=other))


# ------------------------------------------------------------------------------------------
# Bounds: what somebody may ask for who may annotate a Service


def test_the_hosts_and_prefixes_of_a_service_are_bounded() -> None:
    most = ",".join(f"h{index}" for index in range(32))
    services = ",".join(f"s{index}" for index in range(31))
    found = rendered(routed(hosts=most, grpc=services, prefix="/"))
    assert [len(one) for one in routes(found).values()] == [32] * 32
    assert not found.warnings
    assert len(found.files["rds.yaml"].content) < 200_000
    for more in (
        {"hosts": f"{most},x"},
        {"hosts": most, "grpc": f"{services},x,y"},
        {"grpc": f"{services},x", "prefix": "/"},
    ):
        found = rendered(routed(**more))
        assert routes(found) == {}
        [warning] = found.warnings
        assert warning.startswith("service demo/web: is not routed: xds-loader/")


@pytest.mark.parametrize(
    "annotations",
    [
        {"hosts": ",".join(f"bad host {index}" for index in range(20_000))},
        {"hosts": ",".join(f"b {index}" for index in range(1_000))},
        {"hosts": ",".join(f"h{index}" for index in range(1_500))},
        {"grpc": ",".join(f"s{index}" for index in range(1_500))},
        {"grpc": "a." * 125_000},
        {"prefix": "/" * 250_000},
        {"weight": "9" * 250_000},
        {"port": "x" * 9_000},
        {"hosts": "a-" * 125_000},
        {f"x{index}": "" for index in range(5_000)},
    ],
    ids=lambda value: next(iter(value)),
)
def test_the_worst_annotations_are_one_short_line(annotations: dict[str, str]) -> None:
    raw = objects_of(routed("demo/web", **annotations), routed("demo/good", hosts="fine"))
    found = renderer().render(raw)
    [warning] = [line for line in found.warnings if "demo/web" in line and NO_SLICE not in line]
    assert len(warning) < 500
    assert len(found.files["rds.yaml"].content) < 1_500
    assert seconds(lambda: renderer().render(raw)) < 0.5


def test_many_ports_and_endless_problems_are_one_line_too() -> None:
    ports = [port(f"p{index}", index + 1) for index in range(20_000)]
    numbers: dict[str, int | None] = {one["name"]: None for one in ports}
    ports += [port(f"x{index}", 9, protocol="SCTP\n" * 20) for index in range(10_000)]
    raw = (
        routed("demo/web", *ports, route="true"),
        endpoint_slice("demo/web", endpoint("10.0.0.1"), ports=numbers),
    )
    objects = objects_of(*raw)
    assert seconds(lambda: renderer().render(objects)) < 2
    found = renderer().render(objects)
    assert len(clusters(found)) == loader.PORTS_MOST
    assert len(found.warnings) == 2
    assert max(map(len, found.warnings)) < 500
    assert "\n" not in "".join(found.warnings)


def test_splits_of_many_are_one_line_for_each_service(capfd: pytest.CaptureFixture[str]) -> None:
    """Shares at 1,024 places, and weights that would sum up to more than Envoy reads."""
    many_hosts = ",".join(f"h{index}" for index in range(32))
    many_services = ",".join(f"s{index}" for index in range(32))
    one = routed("demo/a", hosts=many_hosts, grpc=many_services)
    two = routed("demo/b", hosts=many_hosts, grpc=many_services, weight="5")
    found = renderer().render(objects_of(one, two))
    assert all(NO_SLICE in line for line in found.warnings)
    [line] = splits_in(capfd)
    assert line.startswith("service demo/a: h0/s10/ is split")
    assert line.endswith("; and 1019 more")
    crowd = [routed(f"demo/s{index}", hosts="h", weight="1000000") for index in range(5_000)]
    route = routes(renderer(fmt="json").render(objects_of(*crowd)))["h, h:*"][0]
    assert 0 < sum(int(part.rpartition("=")[2]) for part in route.split(", ")) < 2**32

"""What holds against whoever writes ConfigMaps, Services or the volume, or answers for Envoy.

What an API server may send is in test_hardening_api.py.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loader
from tests.conftest import RunLoader, StartLoader
from tests.support.admin import STATS, FakeEnvoy, Listener
from tests.support.apiserver import ApiServer
from tests.support.envoy import response
from tests.support.loader import ROOT, wait_files, wait_until
from tests.support.stage import Stage

ONCE = ("--onetime", "--configmap", "envoy-xds")
WATCH = ("--watch", "--configmap", "envoy-xds")


def put(api: ApiServer, text: str = "1") -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": text})


# ------------------------------------------------------------------------------------------
# Whoever may write to the volume

VERSION = {"version": loader.__version__}
TYPES: tuple[Any, ...] = (
    "x", [[]], {"rds.yaml": 1, "../../token": [], "..data/x": {}, "": None},
    {"rds.yaml": ["x", "no such kind"]}, {"rds.yaml": ["x", ["eds"]]},
    {"rds.yaml": ["a", "b", "eds", "d", [1, []]], "../x": ["a", "b", "c", "d", []]},
    {"rds.yaml": ["s", "no-kind"], "../../other/a": "x", "/etc/hostname": ["s", "cds"]},
    {"rds.yaml": ["\ud800", "\ud800"], "\ud800": ["a", "b", "c", "\ud800", ["\ud800"]]},
    {"rds.yaml": "eds \ud800", "../../token": "x"}, {"rds.yaml": "no-kind x", "/etc/hostname": ""},
)  # fmt: skip
STATES: dict[str, bytes] = {
    "deep": b'{"version":' + b"[" * 200_000,
    "just deep enough": b'{"files":' + b"[" * 900 + b"]" * 900 + b"}",
    "deep objects": b'{"acked":' * 50_000,
    "empty": b"",
    "no object": b"[1]",
    "another version": b'{"version": "0", "nacked": {"rds.yaml": ["x", "x", "x", "x"]}}',
    "not UTF-8": b"\xff\xfe{",
    "spaces": b" " * 1_000_000,
    "huge": b"[" + b"[]," * 6_000_000 + b"1]",
    **{
        f"everywhere {json.dumps(value)}": json.dumps(
            {**VERSION, "files": value, "acked": value, "nacked": value}).encode()
        for value in TYPES
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_planted_state_ends_no_loader(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path, name: str
) -> None:
    put(api)
    assert run_loader(*ONCE).returncode == 0
    state = out / "..state/loader.json"
    state.write_bytes(STATES[name])
    with FakeEnvoy() as envoy:
        running = start_loader(*WATCH, "--envoy-admin", envoy.url)
        wait_until(lambda: "stats" in envoy.asked)
        put(api, "2")
        wait_files(out, {"rds.yaml": "2"})
        wait_until(lambda: state.read_bytes() != STATES[name])
        assert json.loads(state.read_bytes())["version"] == loader.__version__
        assert running.resident() < 120 << 20
        running.stop(within=5)
    assert "Traceback" not in running.log


def planted(place: Path, kind: str) -> None:
    """Something else than a file in the place of one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir():
        place.rename(place.with_name("away"))
    place.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "directory":
        (place / "x").mkdir(parents=True)
    elif kind == "socket":
        bound = socket.socket(socket.AF_UNIX)
        here = os.getcwd()
        os.chdir(place.parent)  # the path of a socket has 107 bytes at most
        bound.bind(place.name)
        os.chdir(here)
    elif kind == "sparse":
        for number in range(4):
            place.with_name(f"{place.name}{number}").touch()
            os.truncate(place.with_name(f"{place.name}{number}"), 60 << 20)
    elif kind == "deep":
        place.joinpath(*["d"] * 100).mkdir(parents=True)


PLACES = (
    "..state/loader.json", "..state/loader.json.new", "..state/acked/rds.yaml", "..state/acked/x",
    "..data/x.yaml", "..0123456789abcdef/rds.yaml", "..00000000000000ff", "current/x.yaml",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "sparse", "deep"])
def test_what_is_planted_is_not_waited_for(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path, kind: str
) -> None:
    put(api)
    assert run_loader(*ONCE).returncode == 0
    for place in PLACES[4:] if kind == "deep" else PLACES:
        planted(out / place, kind)
    routes = out / "current/rds.yaml"
    with FakeEnvoy() as envoy:
        running = start_loader(*WATCH, "--sync-interval", "100ms", "--envoy-admin", envoy.url)
        for number in "23":
            put(api, number)
            wait_until(lambda n=number: routes.read_text() == n, 10)  # type: ignore[misc]
            envoy.answers["stats"] = STATS.replace("1", number)
        assert running.resident() < 600 << 20
        running.stop(within=5)
    assert "Traceback" not in running.log


# ------------------------------------------------------------------------------------------
# Whoever answers in the place of Envoy's admin interface


def for_ever(first: bytes, then: bytes) -> Callable[[socket.socket], None]:
    def send(client: socket.socket) -> None:
        client.sendall(first)
        for _ in range(600):
            client.sendall(then)
            time.sleep(0.05)

    return send


HEAD = b"HTTP/1.1 200 OK\r\n"
TRICKLES = {
    "status": for_ever(b"", b"H"),
    "a header": for_ever(HEAD + b"X: ", b"x"),
    "headers": for_ever(HEAD, b"X: x\r\n"),
    "body": for_ever(HEAD + b"\r\n", b"x"),
    "chunks": for_ever(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "100": for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("name", TRICKLES)
def test_an_admin_interface_that_trickles_holds_up_nothing(
    start_loader: StartLoader, api: ApiServer, out: Path, name: str
) -> None:
    """It counts as silent, changes go on, it is asked again, and SIGTERM is not delayed."""
    put(api)
    with FakeEnvoy() as envoy:
        running = start_loader(*WATCH, "--envoy-admin", envoy.url)
        wait_until(lambda: "stats" in envoy.asked)
        envoy.answers["stats"] = TRICKLES[name]
        put(api, "2")
        running.wait_log("Envoy does not answer: .*stats: no end of the answer in time", 8)
        put(api, "3")
        wait_files(out, {"rds.yaml": "3"}, 8)
        asked = len(envoy.asked)
        wait_until(lambda: len(envoy.asked) > asked, 8)
        running.stop()


class Closing(Listener):
    """A proxy in front of an Envoy that is not there."""

    def serve(self, client: socket.socket) -> None:
        client.close()


def test_the_path_of_an_admin_socket_is_taken_as_it_is(tmp_path: Path) -> None:
    place = str(tmp_path / "a#b?c[.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen()
        loader.Admin(loader.admin_url(f"unix:{place}"), lambda *_: None)._connect().close()


def test_connections_that_nobody_answers_are_not_ends_of_envoy(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    """They are told once, and no file is blamed for them."""
    put(api)
    with Closing() as proxy:
        running = start_loader(*WATCH, "--envoy-admin", proxy.url)
        wait_files(out, {"rds.yaml": "1"})
        running.wait_log("Envoy is not asked: nobody answers")
        wait_until(lambda: proxy.accepted > 20)
        assert running.count_log("NACKed|is not asked") == 1, running.log
        running.stop()


FIGURES = {
    "superscripts": {"stats": "a.update_success: ²"},
    "long": {"server_info": f'"state": "LIVE{"E" * 5000}"',
             "stats": f"{STATS}server.hot_restart_epoch: {'9' * 5000}\n"},
    "deep": {"config_dump": "[" * 200_000,
             "stats": f"{STATS}listener_manager.lds.update_failure: 1"},
    "odd": {"config_dump": '{"configs": [1, {"error_state": {"details": []}}]}',
            "stats": f"{STATS}listener_manager.lds.update_rejected: 3\n: 1\nx\n.: -1\n"},
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_odd_answers_of_an_admin_interface_end_no_loader(
    start_loader: StartLoader, api: ApiServer, out: Path, name: str
) -> None:
    put(api)
    with FakeEnvoy(**FIGURES[name]) as envoy:
        running = start_loader(*WATCH, "--envoy-admin", envoy.url)
        wait_until(lambda: len(envoy.asked) >= 2, 8)
        put(api, "2")
        wait_files(out, {"rds.yaml": "2"}, 8)
        running.stop()
    assert "Traceback" not in running.log


# ------------------------------------------------------------------------------------------
# Where a token goes


@pytest.mark.parametrize(
    ("host", "sent"),
    [("127.0.0.1", True), ("127.8.9.10", True), ("localhost", True), ("[::1]", True),
     ("LOCALHOST", True), ("127.0.0.1.example", False), ("127.1", False), ("localhost.x", False),
     ("10.0.0.1", False), ("[::ffff:127.0.0.1]", False), ("1270.0.0.1", False)],
)  # fmt: skip
def test_loopback_is_127_8_and_no_name_that_looks_like_it(
    host: str, sent: bool, token_file: Path
) -> None:
    words = ["--configmap", "x", "--apiserver", f"http://{host}:1", "--token-file", str(token_file)]
    api = loader.Api(loader.options_from(words, {}))
    with pytest.raises(loader.LoaderError) as error:
        api.list(loader.Query(loader.CONFIGMAPS, "demo"), print)
    assert ("plain HTTP" in str(error.value)) != sent, error.value


# ------------------------------------------------------------------------------------------
# Whoever writes ConfigMaps and Services

ODD_VALUES: tuple[Any, ...] = (None, 1, True, 1.5, [], ["x"], {}, {"x": 1}, "\ud800", "text")


def test_a_configmap_of_any_values_is_reduced() -> None:
    """One key in both maps too, whatever the types are."""
    metadata = {"namespace": "demo", "name": "a"}
    for one in ODD_VALUES:
        for other in ODD_VALUES:
            raw = {"metadata": metadata, "data": {"k": one, "l": other},
                   "binaryData": {"k": other, "m": one}}  # fmt: skip
            found = loader.configmap_from(raw)
            names = list(found.files)
            assert sorted({*names}) == names
            assert ("k" in names) == (one == "text")


def test_a_name_that_is_no_text_is_previewed(run_loader: RunLoader, tmp_path: Path) -> None:
    source = tmp_path / "objects.json"
    metadata = {"name": "\ud800", "labels": {"a": "b"}}
    source.write_text(json.dumps({"kind": "ConfigMap", "metadata": metadata, "data": {"x": "1"}}))
    words = ("--configmap-selector", "a=b", "--dry-run", "--from-file", str(source))
    done = run_loader(*words)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_a_name_template_without_the_namespace_takes_no_cluster(
    run_loader: RunLoader, tmp_path: Path, out: Path
) -> None:
    """Whose Service is older has it, whatever the name of the namespace."""
    services = [
        {"kind": "Service",
         "metadata": {"namespace": where, "name": "web", "creationTimestamp": at},
         "spec": {"ports": [{"port": 80, "name": "http"}]}}
        for where, at in (("shop", "2024-01-01T00:00:00Z"), ("aaa", "2025-01-01T00:00:00Z"))
    ]  # fmt: skip
    (tmp_path / "objects.json").write_text(json.dumps({"kind": "List", "items": services}))
    config = tmp_path / "config.json"
    config.write_text('{"cluster": {"name": "{service}/{port}"}}')
    words = ("--services", "*", "--services-namespace", "*", "--config", str(config))
    done = run_loader("--onetime", *words, "--from-file", str(tmp_path / "objects.json"))
    assert done.returncode == 0, done.stderr
    assert (out / "current/eds/shop_web_http.yaml").exists()
    assert not (out / "current/eds/aaa_web_http.yaml").exists()
    assert "service aaa/web: port http is left out: service shop/web has a cluster" in done.stderr


# ------------------------------------------------------------------------------------------
# Every pattern that sees foreign text

SIZE = 200_000
OPERATORS = {"pattern", r"rf'\\+?(?:0|(?:{part})+)'", "part"}  # see test_command_line.py


@functools.cache
def all_patterns() -> dict[str, tuple[str, str | bytes]]:
    """Each call of `re` as written: its function, and the pattern."""
    tree = ast.parse((ROOT / "loader.py").read_text())
    calls = {ast.unparse(node.args[0]): node.func.attr for node in ast.walk(tree)
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
             and ast.unparse(node.func.value) == "re" and node.func.attr != "escape"}  # fmt: skip
    found = {}
    for text, function in calls.items():
        with contextlib.suppress(NameError):
            found[text] = function, eval(text, dict(vars(loader)))  # our own source
    assert len(found) > 25
    assert len(calls.keys() - found.keys()) <= len(OPERATORS), calls.keys() - found.keys()
    return found


PARTS = (
    " ", "\t", "\n", " \n", "a", "A", "-", "- ", "_", ".", "/", "a/", "/a", "a.", "a-", "-.", "0",
    "a.a-", "1.2.", "0x0.",
    '"', '\\"', "'", "\\/", "{", "[", "name", "name ", "name:", "name: ", "cluster_name",
    "alt_stat_name", "path", "path: ", "\nresources:", "\nresources:\n ", "\n  - name", "- match",
    "# \n", "- \n", "type.googleapis.com/", "type.googleapis.com/envoy.a", "/current/", "0x",
    "localhost.", "ip6-", "*", ",", "=", "{port}", "\xe9",
)  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


@pytest.mark.parametrize("text", all_patterns())
def test_every_pattern_is_linear(text: str) -> None:
    """40 KB of its worst cost no more than 40 plain passes over as much, where what is quadratic
    takes a second."""
    function, source = all_patterns()[text]
    pattern = re.compile(source)
    if function == "compile":
        function = "findall" if isinstance(source, bytes) else "match"
    bound = max(0.2, 40 * seconds(lambda: re.findall(r"\w", "a" * SIZE)))
    for head in ("", "a", "\nresources:\n", "name:", '"'):
        for part in PARTS:
            worst: Any = head + part * (SIZE // len(part)) + "\n!"
            worst = worst.encode() if isinstance(source, bytes) else worst
            into = [""] if function == "sub" else []
            work = functools.partial(getattr(pattern, function), *into, worst)
            assert seconds(work) < bound, (function, head, part)


READERS: dict[str, Callable[[bytes], object]] = {
    "kind": loader.kind_of,
    "names": loader.names_in,
    "words": lambda text: loader.mentioned(text, ["a/b", "a b", "x"]),
    "paths": lambda text: loader.paths_in([loader.file_of(text, "x")], {"eds/a.yaml", "x"}),
    "statistics": lambda text: loader.resource_names(
        "x", loader.file_of(text, "x", kind="rds"), {}),
    "clusters": lambda text: loader.names_by_place(loader.file_of(text, "x", kind="cds")),
    "our own CDS": lambda text: loader.clusters_of(loader.file_of(text, "services")),
    "cause": lambda text: loader.likely_cause(loader.file_of(text, "x"), {}),
    "yaml": lambda text: loader.yaml_scalar(text.decode()),
    "log": lambda text: loader.log_line("text", "info", text.decode(), {"x": text.decode()}),
    "statistics of Envoy": lambda text: loader.parse_stats(text.decode()),
    "annotations": lambda text: [
        loader.plan_service(loader.service_from({
            "metadata": {"namespace": "a", "name": "b",
                         "annotations": {f"xds-loader/{name}": text.decode()}},
            "spec": {"ports": [{"port": 80}]}}), loader.DEFAULTS, "eds")
        for name in loader.ROUTE_ANNOTATIONS],
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_every_reader_of_foreign_text_is_linear(name: str) -> None:
    """Not the pattern alone: what is done with each match too."""
    bound = max(0.5, 100 * seconds(lambda: re.findall(r"\w", "a" * SIZE)))
    for part in PARTS:
        text = (part * (SIZE // len(part))).encode()
        assert seconds(lambda t=text: READERS[name](t)) < bound, part  # type: ignore[misc]


def test_no_digest_of_a_secret_is_remembered() -> None:
    """Neither of one that Envoy took nor of one that it refused: guesses could be tested at it."""
    sds = loader.file_of(loader.SDS_TYPE.encode(), "secret demo/web")
    nack = loader.Nack(sds.digest, sds.kind, "reason")
    known = loader.Known(acked={"sds/a": sds}, nacks={"sds/b": nack})
    assert sds.digest not in json.dumps(loader.state_of(known))


# ------------------------------------------------------------------------------------------
# What Envoy's reasons quote (the real Envoy)


@pytest.mark.envoy
@pytest.mark.xdist_group("inotify")
def test_no_source_of_a_lua_filter_is_in_the_log_nor_remembered(stage: Stage) -> None:
    """Envoy's error_state quotes the line that is wrong."""
    stage.start("--log-level", "debug")
    listener = stage.listener()
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    lua = {"@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua",
           "default_source_code": {"inline_string": 'local key = "hunter2" hunter2'}}  # fmt: skip
    manager["http_filters"].insert(0, {"name": "lua", "typed_config": lua})
    stage.patch({"lds.yaml": response("listener", listener)})
    stage.log.wait_log("step=rollback", 10)
    wait_until(lambda: "hunter2" in stage.envoy.log(), 15, "Envoy's own quote of it")
    assert "hunter2" not in stage.log.log
    for place in (stage.out / "..state").rglob("*"):
        assert place.is_dir() or b"hunter2" not in place.read_bytes(), place


def test_an_interpreter_without_ctypes_suffices(
    api: ApiServer, common: list[str], out: Path
) -> None:
    """Some slim images have none: `import _ctypes` fails."""
    put(api)
    run = "import sys; sys.modules['_ctypes'] = None; import loader; sys.exit(loader.main())"
    command = [sys.executable, "-c", run, *common, "--apiserver", api.url, *ONCE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    wait_files(out, {"rds.yaml": "1"})

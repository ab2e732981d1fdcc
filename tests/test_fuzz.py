"""Anything at all as input: no traceback ever reaches a user, no file leaves the directory.

`loader.main` runs in this process, with whatever hypothesis makes up; a reflector that raises
something else than it should ends it, so every thread counts. FUZZ=1000 in the environment tries
that many of each (nightly), the default is what fits into a minute.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import string
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loader
from tests.support import disk
from tests.support.apiserver import ApiServer
from tests.support.loader import Loader, snapshot, wait_files
from tests.support.tuned import tuned

EXAMPLES = int(os.environ.get("FUZZ", "60"))
few = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

# -- anything


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(["", "demo", "web", "http", "10.0.0.1", "::1", "TCP", "*", "..", "/", "\0",
                     "x" * 300, "true", "0", "-1", "1e9", "é", "\u2028", "\ud800"]),
)  # fmt: skip
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=4),
    max_leaves=12,
)  # fmt: skip


def mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A right value, three times of four."""
    return st.integers(0, 3).flatmap(lambda n: anything if n == 0 else good)


def record(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An object of some of these fields, and perhaps one that nobody knows."""
    known = st.fixed_dictionaries({}, optional={k: mostly(v) for k, v in fields.items()})
    odd = st.dictionaries(st.text(max_size=8), anything, max_size=1)
    return st.builds(lambda one, two: {**two, **one}, known, odd)


keys = st.one_of(
    st.text(string.ascii_lowercase + "-._", min_size=1, max_size=12),
    st.sampled_from(["rds.yaml", "cds.yaml", "eds", "..", ".", "", "../x", "a/b", "/etc/x",
                     "..data", "..x", "a\0b", "x" * 254, "x" * 253, "...", ".x", "-", "a b", "é",
                     "\n", "..data/x", "current", "a\\b", "\ud800"]),
    st.text(max_size=8),
)  # fmt: skip
names = st.sampled_from(["web", "api", "envoy-xds", "x", "", "UPPER", "a.b", "x" * 64, "../up"])
namespaces = st.sampled_from(["demo", "shop", ""])
labels = st.dictionaries(st.sampled_from(["app", "kubernetes.io/service-name", "é"]),
                         mostly(st.sampled_from(["web", "api", "x"])), max_size=2)  # fmt: skip
annotation_names = st.sampled_from(
    [f"xds-loader/{name}" for name in ("route", "hosts", "prefix", "grpc", "weight", "port")]
)
annotation_values = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["true", "a.example", "*.example, b.example", "*", "/", "/x", "1", "0", "100",
                     "4294967295", "4294967296", "-1", "http", "80", "pkg.Service", "a,a", ",", "é",
                     "a:80", "[::1]", "A.EXAMPLE", "a.example\n", "x" * 5000, "/a?b", "/%", "1e3"]),
)  # fmt: skip
metadata = record(
    name=names, namespace=namespaces, labels=labels, resourceVersion=st.text(max_size=5),
    annotations=st.dictionaries(annotation_names, mostly(annotation_values), max_size=4),
)  # fmt: skip
ports = st.lists(
    record(name=st.sampled_from(["http", "grpc", "", "tls", "http-admin", "HTTP", "x" * 70]),
           port=st.integers(-1, 70000),
           targetPort=st.one_of(st.integers(0, 9), st.text(max_size=5)),
           protocol=st.sampled_from(["TCP", "UDP", "SCTP", "tcp"]),
           appProtocol=st.sampled_from(["http", "grpc", "https", "kubernetes.io/h2c", "odd"])),
    max_size=3,
)  # fmt: skip
addresses = st.lists(
    mostly(st.sampled_from(["10.0.0.1", "10.0.0.2", "fd00::1", "pod.example", "300.1.1.1", "::",
                            "010.0.0.1", "10.0.0.1\n"])), max_size=2)  # fmt: skip
conditions = record(ready=st.booleans(), serving=st.booleans(), terminating=st.booleans())
endpoint = record(addresses=addresses, conditions=conditions, zone=st.sampled_from(["a", "b", ""]),
                  nodeName=st.sampled_from(["node", "é"]))  # fmt: skip
base64s = st.one_of(
    st.binary(max_size=40).map(lambda content: base64.b64encode(content).decode()),
    st.text(max_size=12),
    st.just(base64.b64encode(b"-----BEGIN CERTIFICATE-----\nAAAA\n").decode()),
)
KINDS = {
    "ConfigMap": record(
        metadata=metadata, data=st.dictionaries(keys, mostly(st.text(max_size=60)), max_size=4),
        binaryData=st.dictionaries(keys, mostly(base64s), max_size=2),
    ),
    "Service": record(
        metadata=metadata,
        spec=record(ports=ports, type=st.sampled_from(["ClusterIP", "ExternalName"]),
                    clusterIP=st.sampled_from(["None", "10.0.0.1", ""]),
                    externalName=st.sampled_from(["x.example", "10.0.0.1", "bad name", ""])),
    ),
    "EndpointSlice": record(
        metadata=metadata, endpoints=st.lists(endpoint, max_size=3), ports=ports,
        addressType=st.sampled_from(["IPv4", "IPv6", "FQDN", "IPX"]),
    ),
    "Endpoints": record(
        metadata=metadata,
        subsets=st.lists(record(addresses=st.lists(record(ip=st.text(max_size=9)), max_size=2),
                                ports=ports), max_size=2),
    ),
    "Secret": record(
        metadata=metadata, type=st.sampled_from(["kubernetes.io/tls", "Opaque"]),
        data=st.dictionaries(st.sampled_from(["tls.crt", "tls.key", "ca.crt", "x"]),
                             mostly(base64s), max_size=3),
    ),
    "Node": record(metadata=metadata),
}  # fmt: skip


@st.composite
def objects(draw: st.DrawFn) -> list[Any]:
    found = []
    for kind in draw(st.lists(st.sampled_from(sorted(KINDS)), max_size=6)):
        body = draw(KINDS[kind])
        version = "discovery.k8s.io/v1" if kind == "EndpointSlice" else "v1"
        found.append({"kind": kind, "apiVersion": version, **body} if isinstance(body, dict)
                     else body)  # fmt: skip
    return found


# -- running it here


class Ended:
    def __init__(self, status: int, output: bytes, log: str) -> None:
        self.status, self.output, self.log = status, output, log


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Put the handlers back that a run replaces, and the umask."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    umask = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(umask)
        for number, handler in before.items():
            signal.signal(number, handler)


def main(args: list[str]) -> Ended:
    """One run; whatever it raises is a traceback that a user would see."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    errors = io.StringIO()
    written = os.memfd_create("log")
    loader.log = loader.Log(written)
    redirected = contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors)
    with signals(), descriptors(), redirected[0], redirected[1]:
        status = loader.main(args)
    output.flush()
    buffer = output.buffer
    assert isinstance(buffer, io.BytesIO)
    logged = os.pread(written, 1 << 24, 0).decode()
    os.close(written)
    loader.log = loader.Log()
    ended = Ended(status, buffer.getvalue(), errors.getvalue() + logged)
    assert ended.status in (0, 1, 2)
    assert "Traceback" not in ended.log
    return ended


@contextlib.contextmanager
def descriptors() -> Iterator[None]:
    """Close what the end of a process closes: pipes, and the lock on the output directory."""
    pipe2 = os.pipe2
    made: list[int] = []

    def recorded(flags: int) -> tuple[int, int]:
        made.extend(ends := pipe2(flags))
        return ends

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pipe2", recorded)
        patch.setattr(threading, "excepthook", threading.excepthook)  # put back at the end
        yield
        for thread in threading.enumerate():
            if thread.name.startswith("reflector"):
                thread.join(5)
    signal.set_wakeup_fd(-1)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            is_lock = "/fuzz-" in target and target.endswith("/out")
            if is_lock or (int(name) in made and target.startswith("pipe:")):
                os.close(int(name))


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose only entry that may change is `out`."""
    found = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (found / "sentinel").write_text("untouched")
    (found / "out").mkdir()
    yield found
    shutil.rmtree(found)


def check_place(place: Path) -> None:
    assert sorted(os.listdir(place)) == ["input.json", "out", "sentinel"]
    assert (place / "sentinel").read_text() == "untouched"
    if (place / "out/..data").is_symlink():
        disk.inspect(place / "out", converged=False)


def dumped(document: object) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


EVERYTHING = [
    "--namespace", "demo", "--configmap-selector", "app", "--services", "*",
    "--services-namespace", "*", "--endpoints", "eds",
]  # fmt: skip


@few
@given(objects(), st.sampled_from(["yaml", "json"]), st.booleans())
def test_any_objects(place: Path, items: list[Any], form: str, named: bool) -> None:
    """Published or refused in one line; what is rendered is well-formed; nothing else moves."""
    shutil.rmtree(place / "out", ignore_errors=True)
    (place / "out").mkdir()
    (place / "input.json").write_bytes(dumped({"kind": "List", "apiVersion": "v1", "items": items}))
    args = ["--from-file", str(place / "input.json"), "--format", form,
            "--output-dir", str(place / "out"), *EVERYTHING]  # fmt: skip
    if named:
        args += ["--configmap", "web", "--secret", "web", "--configmap", "shop/api:deep/er"]
    ended = main([*args, "--onetime"])
    check_place(place)
    assert ended.status != 2 or not named
    if ended.status == 0:
        for name, content in snapshot(place / "out").items():
            if name in ("cds.yaml", "rds.yaml", "cds.json", "rds.json") or name.startswith("eds/"):
                with contextlib.suppress(UnicodeDecodeError, yaml.YAMLError, ValueError):
                    # A ConfigMap may have a key of that name: its bytes are its own.
                    parse(name, content)
    before = disk.fingerprint(place / "out")
    preview = main([*args, "--dry-run"])
    assert preview.status == ended.status
    diff = main([*args, "--dry-run", "--diff"])
    if ended.status == 0:
        assert diff.output == b"", "what was just published differs in nothing"
    assert disk.fingerprint(place / "out") == before


def parse(name: str, content: bytes) -> Any:
    return json.loads(content) if name.endswith(".json") else yaml.safe_load(content)


@few
@given(st.dictionaries(keys, st.text(max_size=40), max_size=6),
       st.sampled_from(["", ":flags", ":a/b", ":eds"]))  # fmt: skip
def test_any_keys(place: Path, data: dict[str, str], directory: str) -> None:
    """A good key becomes a file with just these bytes, a bad one is named; none goes elsewhere."""
    shutil.rmtree(place / "out", ignore_errors=True)
    (place / "out").mkdir()
    item = {"kind": "ConfigMap", "apiVersion": "v1",
            "metadata": {"name": "web", "namespace": "demo"}, "data": data}  # fmt: skip
    (place / "input.json").write_bytes(dumped(item))
    args = ["--from-file", str(place / "input.json"), "--output-dir", str(place / "out")]
    ended = main([*args, "--onetime", "--namespace", "demo", "--configmap", f"web{directory}"])
    check_place(place)
    if ended.status == 0:
        prefix = f"{directory[1:]}/" if directory else ""
        for name, content in snapshot(place / "out").items():
            assert content == data[name.removeprefix(prefix)].encode("utf-8", "surrogatepass")
        left_out = len(data) - len(snapshot(place / "out"))
        assert left_out == 0 or "WARNING" in ended.log


@few
@given(content=st.one_of(
    anything.map(dumped), st.binary(max_size=80), st.just(b"\xef\xbb\xbf{}"),
    st.just(b"[" * 5000), st.just(b'{"a":' * 3000), st.just(b"1" * 5000),
))  # fmt: skip
@pytest.mark.parametrize("option", ["--from-file", "--config"])
def test_any_bytes_in_a_file(place: Path, content: bytes, option: str) -> None:
    (place / "input.json").write_bytes(content)
    other = ["--from-file", os.devnull] if option == "--config" else []
    ended = main(["--dry-run", option, str(place / "input.json"), *other, "--services", "*",
                  "--configmap", "x", "--output-dir", str(place / "out")])  # fmt: skip
    check_place(place)
    if ended.status:
        assert len(ended.log.strip().splitlines()) == 1, ended.log
        assert re.search("/input.json|/dev/null|configmap", ended.log), ended.log


config = record(
    cluster=record(
        name=st.sampled_from(["{namespace}/{service}/{port}", "{x}", "{", "", "a"]),
        base=record(connect_timeout=st.sampled_from(["1s", "x", ""]), lb_policy=st.text(max_size=9),
                    name=st.text(max_size=3), type=st.text(max_size=3)),
        overrides=st.lists(record(match=record(port_name=st.text(max_size=4), labels=labels),
                                  merge=record(lb_policy=st.text(max_size=4)),
                                  suppress=st.booleans()), max_size=2),
        trusted_ca=st.text(max_size=9),
    ),
    endpoint=record(include_not_ready=st.booleans(), eds_budget=st.integers(-1, 99),
                    families=st.lists(st.sampled_from(["ipv4", "ipv6", "x"]), max_size=3),
                    prefer_zone=st.one_of(st.booleans(), st.text(max_size=3)),
                    external_name=st.sampled_from(["strict_dns", "logical_dns", "x"]),
                    locality=record(region=record(label=st.text(max_size=5)),
                                    zone=record(literal=st.text(max_size=5)))),
    route=record(name=st.text(max_size=5), suffix=st.text(max_size=9),
                 annotation_prefix=st.text(max_size=9)),
    cluster_domain=st.text(max_size=9),
)  # fmt: skip


@few
@given(config, objects())
def test_any_configuration(place: Path, document: Any, items: list[Any]) -> None:
    """Exit 2 with the JSON path, or whatever it says is done."""
    (place / "input.json").write_bytes(dumped({"kind": "List", "items": items}))
    settings_file = place / "out/config"
    settings_file.write_bytes(dumped(document))
    ended = main(["--dry-run", "--from-file", str(place / "input.json"), "--config",
                  str(settings_file), "--output-dir", str(place / "out"), *EVERYTHING])  # fmt: skip
    if ended.status == 2:
        assert len(ended.log.strip().splitlines()) == 1
        assert "--config" in ended.log
    settings_file.unlink()
    check_place(place)


# -- the command line


values = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "x", "1s", "-1s", "1m0s", "1h", "0", "9" * 400, "true", "false", "demo/x",
                     "a/b/c", "x:..", "x:/etc", "x:a/../b", "x:", ":x", "http://h:1", "https://[::1]",
                     "http://", "ftp://x", ":8080", "1.2.3.4:99999", "0600", "9999", "eds", "auto",
                     "a=b,c in (d)", "a in (", "!x", "'", "debug", "--", "-", "é", "\0", "\ud800",
                     "http://user:secret@h/", "http://h:99999", "1e9s", "1d", "inf", "nan",
                     "unix:/x", "unix:x", "unix:/" + "x" * 200, "0o640", "app in (" * 50]),
)  # fmt: skip
option_names = st.sampled_from([option.name for option in loader.OPTIONS] + ["no-such", "", "h"])


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    words: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        dashes, name = draw(st.sampled_from(["-", "--", "", "---"])), draw(option_names)
        style = draw(st.integers(0, 2))
        if style == 0:
            words.append(f"{dashes}{name}={draw(values)}")
        elif style == 1:
            words += [f"{dashes}{name}", draw(values)]
        else:
            words.append(f"{dashes}{name}")
    return words


@settings(few, max_examples=10 * EXAMPLES)
@given(command_lines(), st.dictionaries(option_names, values, max_size=2))
def test_any_command_line(words: list[str], variables: dict[str, str]) -> None:
    """Options, or one line and exit 2, before anything is touched."""
    environ: Mapping[str, str] = {
        f"XDS_LOADER_{name.upper().replace('-', '_')}": value for name, value in variables.items()
    }
    try:
        options = loader.options_from(words, environ)
    except loader.UsageError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert options.mode in ("once", "poll", "watch")
        assert options.sync_interval > 0
    if refusal:
        assert len(refusal.splitlines()) == 1, refusal
        if not variables:
            assert main(words).status in (0, 2)  # 0: --help and --version win


# -- secrets


@few
@given(st.binary(min_size=1, max_size=200), st.sampled_from(["tls.key", "tls.crt", "ca.crt", "x"]),
       st.booleans())  # fmt: skip
def test_no_secret_is_ever_shown(place: Path, content: bytes, key: str, pem: bool) -> None:
    """Neither in the log nor in a preview, however broken it is."""
    sentinel = b"SENTINELsentinel"
    body = b"-----BEGIN PRIVATE KEY-----\n" + sentinel + content if pem else sentinel + content
    good = base64.b64encode(b"x").decode()
    data = {"tls.crt": good, "tls.key": good, key: base64.b64encode(body).decode()}
    item = {"kind": "Secret", "apiVersion": "v1", "type": "kubernetes.io/tls",
            "metadata": {"name": "web", "namespace": "demo"}, "data": data}  # fmt: skip
    (place / "input.json").write_bytes(dumped(item))
    args = ["--from-file", str(place / "input.json"), "--namespace", "demo", "--secret", "web",
            "--output-dir", str(place / "out"), "--log-level", "debug"]  # fmt: skip
    for more in (["--dry-run"], ["--dry-run", "--diff"], ["--onetime"], ["--dry-run", "--diff"]):
        ended = main([*args, *more])
        if key == "tls.key":
            assert sentinel not in ended.output
        assert sentinel.decode() not in ended.log
        encoded = base64.b64encode(sentinel)[:16]
        assert encoded not in ended.output or key != "tls.key"
        assert encoded.decode() not in ended.log
    check_place(place)


# -- events against a model of list and watch


class Model:
    """What the API has; whatever happens on the way, the files must come to be just this."""

    def __init__(self, api: ApiServer) -> None:
        self.api = api
        self.maps: dict[str, dict[str, str]] = {}
        self.selected: set[str] = set()

    def put(self, name: str, data: dict[str, str], selected: bool) -> None:
        self.maps[name] = {f"{name}.{key}": text for key, text in data.items()}
        self.selected.discard(name)
        if selected:
            self.selected.add(name)
        labels = {"app": "x"} if selected else {"app": "other"}
        self.api.configmap("demo", name, self.maps[name], labels=labels)

    def delete(self, name: str) -> None:
        self.maps.pop(name, None)
        self.selected.discard(name)
        self.api.delete("ConfigMap", "demo", name)

    def files(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in sorted(self.selected):
            found.update(self.maps[name])
        return found


map_names = st.sampled_from(["a", "b", "c"])
events = st.lists(
    st.one_of(
        st.tuples(st.just("put"), map_names,
                  st.dictionaries(st.sampled_from("xyz"), st.text("ab", max_size=2), max_size=3),
                  st.booleans()),
        st.tuples(st.just("delete"), map_names),
        st.tuples(st.sampled_from(["end", "cut", "midchunk", "compact", "bookmark", "restart",
                                   "expire", "garbage", "unknown"])),
    ),
    max_size=12,
)  # fmt: skip


def happen(model: Model, event: tuple[Any, ...]) -> None:
    api = model.api
    what, *rest = event
    if what == "put":
        model.put(*rest)
    elif what == "delete":
        model.delete(*rest)
    elif what == "compact":
        api.compact()
        api.close_watches()
    elif what == "bookmark":
        api.bookmark()
    elif what == "restart":
        api.stop()
        api.start()
    elif what == "expire":
        status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
        api.inject(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n", end=True)
    elif what == "garbage":
        api.inject(b'{"type":"MODIFIED","object":{"kind":"ConfigM\n', end=True)
    elif what == "unknown":
        api.inject(b'{"type":"ODD","object":{"kind":"X","metadata":{"name":"a"}}}\n')
    else:
        api.close_watches(clean=what == "end", midchunk=what == "midchunk")


@pytest.mark.parametrize("mode", ["watch", "poll"])
def test_any_sequence_of_events_equals_the_final_list(
    api: ApiServer, common: list[str], out: Path, mode: str
) -> None:
    """One loader lives through all of them; only its backoff is made short."""
    model = Model(api)
    how = ["--watch"] if mode == "watch" else ["--sync-interval", "20ms"]
    constants = {"BACKOFF_FIRST": 0.01, "BACKOFF_LAST": 0.05}
    args = [*common, "--apiserver", api.url, "--configmap-selector", "app=x", *how]
    with Loader(args, prefix=tuned(constants)) as running:

        @settings(few, max_examples=EXAMPLES)
        @given(events)
        def lives_through(sequence: list[tuple[Any, ...]]) -> None:
            for event in sequence:
                happen(model, event)
            wait_files(out, model.files(), 5)
            assert running.process.poll() is None

        lives_through()
        assert "Traceback" not in running.log
        disk.wait_converged(out)

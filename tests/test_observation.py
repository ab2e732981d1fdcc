"""What the loader shows of itself: log lines, metrics, probes; and that nobody can stall it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import json
import math
import os
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import loader
from tests.conftest import RunLoader, StartLoader
from tests.support.apiserver import ApiServer
from tests.support.busy import in_time, within
from tests.support.loader import COMMAND, Loader, wait_until
from tests.support.ports import held_port

PATHS = ("/healthz", "/readyz", "/startz", "/metrics", "/snapshot")
SECRET = b"c2VjcmV0IGJ5dGVz-PRIVATE KEY-----"


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str


def ask(
    port: int, path: str, method: str = "GET", host: str = "127.0.0.1", timeout: float = 5
) -> Reply:
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, headers, response.read().decode())
    finally:
        connection.close()


def talk(port: int, sent: bytes, timeout: float = 5.0) -> bytes:
    """Everything that comes back for raw bytes, up to the end of the connection."""
    received = b""
    with (
        contextlib.suppress(ConnectionResetError),
        socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock,
    ):
        sock.sendall(sent)
        while block := sock.recv(65536):
            received += block
    return received


@pytest.fixture
def listener() -> Any:
    """It serves for the life of the process."""
    return loader.Listener("127.0.0.1", 0)


NOTHING = loader.Status({}).named


def a_status(**changes: Any) -> Any:
    files = {
        "rds.yaml": loader.file_of(b"resources: []\n", "configmap demo/envoy-xds"),
        "sds/demo_web.yaml": loader.file_of(SECRET, "secret demo/web", 0o600),
        "eds/x.yaml": loader.file_of(b"resources: [1]\n", "services"),
        "note": loader.file_of(b"x", "configmap demo/envoy-xds"),
    }
    status = loader.Status(
        files,
        version="ab12cd34",
        published_at=1_700_000_000.25,
        states={"rds.yaml": "acked", "eds/x.yaml": "nacked", "note": "unread",
                "sds/demo_web.yaml": "unknown"},
        named={"nacked": ["eds/x.yaml"], "unknown": ["sds/demo_web.yaml"], "unread": ["note"],
               "missing": ["configmap demo/absent"], "stale": ["services"]},
        turn_by=time.monotonic() + 60,
    )
    return status._replace(**changes)


# -- probes --------------------------------------------------------------------------------------


def test_healthz_is_well_while_the_loop_turns(listener: Any) -> None:
    assert ask(listener.port, "/healthz")[0::2] == (200, "ok\n")
    listener.status = a_status(turn_by=time.monotonic() - 61)
    reply = ask(listener.port, "/healthz")
    assert reply.status == 503
    assert reply.body == "the loop is 61 s late\n"
    listener.status = a_status()
    assert ask(listener.port, "/healthz").status == 200


def test_readyz_waits_for_the_first_snapshot_and_names_what_is_not_well(listener: Any) -> None:
    listener.status = loader.Status({}, named={
        **NOTHING, "missing": ["configmap demo/absent"]})  # fmt: skip
    reply = ask(listener.port, "/readyz")
    assert (reply.status, reply.body) == (503, "no snapshot yet\nmissing: configmap demo/absent\n")
    listener.status = a_status()
    reply = ask(listener.port, "/readyz")
    assert reply.status == 200
    assert reply.body.splitlines() == [
        "ready, version ab12cd34",
        "missing: configmap demo/absent",
        "stale: services",
        "nacked: eds/x.yaml",
    ]


def test_startz_waits_for_envoy(listener: Any) -> None:
    assert ask(listener.port, "/startz").body == "no snapshot yet\n"
    listener.status = a_status(named={**NOTHING, "nacked": ["eds/x.yaml"]})
    reply = ask(listener.port, "/startz")
    assert (reply.status, reply.body) == (503, "not ACKed by Envoy yet\nnacked: eds/x.yaml\n")
    listener.status = a_status(named=NOTHING, started=True)
    reply = ask(listener.port, "/startz")
    assert (reply.status, reply.body) == (200, "ready, version ab12cd34\n")


def test_snapshot_lists_files_and_serves_no_content(listener: Any) -> None:
    listener.status = a_status()
    reply = ask(listener.port, "/snapshot")
    assert reply.headers["content-type"] == "application/json"
    shown = json.loads(reply.body)
    assert shown["version"] == "ab12cd34"
    assert shown["published_at"] == "2023-11-14T22:13:20.250Z"
    assert shown["missing"] == ["configmap demo/absent"]
    digests = {path: file.digest for path, file in listener.status.files.items()}
    assert shown["files"] == [
        {"path": "eds/x.yaml", "source": "services", "bytes": 15, "sha256": digests["eds/x.yaml"],
         "state": "nacked"},
        {"path": "note", "source": "configmap demo/envoy-xds", "bytes": 1,
         "sha256": digests["note"], "state": "unread"},
        {"path": "rds.yaml", "source": "configmap demo/envoy-xds", "bytes": 14,
         "sha256": digests["rds.yaml"], "state": "acked"},
        {"path": "sds/demo_web.yaml", "source": "secret demo/web", "state": "unknown"},
    ]  # fmt: skip
    by_state = {state: shown[state] for state in ("nacked", "unknown", "unread")}
    assert by_state == {"nacked": ["eds/x.yaml"], "unknown": ["sds/demo_web.yaml"],
                        "unread": ["note"]}  # fmt: skip


def test_an_empty_status_is_a_snapshot_of_nothing(listener: Any) -> None:
    shown = json.loads(ask(listener.port, "/snapshot").body)
    assert shown == {"version": None, "published_at": None, "files": [], "nacked": [],
                     "unknown": [], "unread": [], "missing": [], "stale": []}  # fmt: skip


# -- the server ----------------------------------------------------------------------------------


def test_paths_and_bad_requests(listener: Any) -> None:
    port = listener.port
    assert ask(port, "/metrics?name[]=up").status == 200
    for path in ("/", "/metrics/", "/snapshot/rds.yaml"):
        assert ask(port, path).status == 404
    assert ask(port, "/metrics", "POST").status == 400
    for bad in (b"GET\r\n\r\n", b"\x16\x03\x01\n\n", b"GET /" + b"y" * 9000):
        assert talk(port, bad).startswith(b"HTTP/1.0 400 ")
    assert talk(port, b"GET /healthz HTTP/1.0\n\n").startswith(b"HTTP/1.0 200 ")
    assert ask(port, "/healthz").status == 200


def test_a_request_in_single_bytes(listener: Any) -> None:
    with socket.create_connection(("127.0.0.1", listener.port), timeout=5) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n":
            sock.send(bytes([byte]))
        assert sock.recv(4096).startswith(b"HTTP/1.0 200 ")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=st.binary(max_size=300))
def test_any_request_ends(listener: Any, request: bytes) -> None:
    answer = talk(listener.port, request + b"\r\n\r\n")
    assert b" 200 " not in answer.partition(b"\n")[0]
    assert ask(listener.port, "/healthz").status == 200


def connections() -> int:
    """Those that the listeners of this process serve: each has a thread."""
    return sum("(_talk)" in thread.name for thread in threading.enumerate())


def test_silent_clients_cost_others_nothing(listener: Any) -> None:
    """3,000 idle connections: probes are answered again within seconds, then each at once."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[1], 8000), limits[1]))
    silent = [socket.socket() for _ in range(min(3000, limits[1] // 3))]
    try:
        for sock in silent:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", listener.port))
        assert ask(listener.port, "/healthz", timeout=10).status == 200
        slow = 0
        for _ in range(10):
            began = time.monotonic()
            assert ask(listener.port, "/healthz").status == 200
            slow += time.monotonic() - began > 0.5
        assert slow <= 2
        assert connections() <= loader.CONNECTIONS_MAX + 1
    finally:
        for sock in silent:
            sock.close()
        wait_until(lambda: not connections(), 10, "all connections closed")
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\n"])
def test_a_client_that_dawdles_is_gone_after_its_time(
    listener: Any, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """However busily it drips, and if nobody else comes."""
    monkeypatch.setattr(loader, "CONNECTION_TIME", 0.3)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", listener.port), timeout=5) as sock:
        sock.sendall(sent)
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 5 and (sent or sock.recv(1)):
                sock.sendall(b"x")
                time.sleep(0.005)
    took = time.monotonic() - began
    assert took > 0.2
    in_time(took, 2)


def test_a_client_that_never_reads_is_gone_after_its_time(
    listener: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "CONNECTION_TIME", 0.3)
    files = {f"{n:06}": loader.file_of(b"", "services") for n in range(30_000)}
    listener.status = a_status(files=files, states=dict.fromkeys(files, "unknown"))
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", listener.port))
        sock.sendall(b"GET /snapshot HTTP/1.1\r\n\r\n")
        wait_until(connections, message="a connection")
        wait_until(lambda: not connections(), message="no connection")
    assert ask(listener.port, "/healthz").status == 200


def test_rendering_costs_a_twentieth_of_a_cpu(
    listener: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of clients, and however often the status changes."""
    spent: list[float] = []

    def slowly() -> str:
        time.sleep(0.01)
        spent.append(0.01)
        return ""

    monkeypatch.setattr(loader.metrics, "render", slowly)
    began = time.monotonic()
    while time.monotonic() - began < 1:
        ask(listener.port, "/metrics")
    assert 1 < len(spent) <= 6


def test_descriptors_that_run_out_do_not_end_it() -> None:
    """In a process of its own: the limit would hit the test runner's threads."""
    script = """
import os, resource, socket, sys, time
import loader
server = loader.Listener("127.0.0.1", 0)
client = socket.create_connection(("127.0.0.1", server.port))
client.close()
time.sleep(0.1)
held = [socket.socket() for _ in range(4)]
limit = max(sock.fileno() for sock in held) + 1
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
held.pop().close()
client = socket.create_connection(("127.0.0.1", server.port))  # nothing is left for accept
began = time.process_time()
time.sleep(1)
assert time.process_time() - began < 0.1, "it spins"
held.pop().close()
client.sendall(b"GET /healthz HTTP/1.1\\r\\n\\r\\n")
client.settimeout(5)
assert client.recv(100).startswith(b"HTTP/1.0 200"), "no answer"
os._exit(0)  # a daemon thread that wakes at the interpreter's end needs a descriptor
"""
    run_python(script)


def run_python(script: str) -> None:
    where = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": where},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_without_an_address_it_listens_on_every_one() -> None:
    server = loader.Listener("", 0)
    assert ask(server.port, "/healthz").status == 200
    if socket.has_dualstack_ipv6():
        assert ask(server.port, "/healthz", host="::1").status == 200


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (":9000", ("", 9000)),
        ("127.0.0.1:9000", ("127.0.0.1", 9000)),
        ("localhost:80", ("localhost", 80)),
        ("[::1]:9000", ("::1", 9000)),
        ("[::]:0", ("::", 0)),
        ("[fe80::1%eth0]:9", ("fe80::1%eth0", 9)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert loader.listen_address(text) == address


# -- metrics -------------------------------------------------------------------------------------


def families(text: str) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def recorded() -> Any:
    """A value in every metric."""
    metrics = loader.Metrics("1.2.3")
    for name, kind, names, _ in loader.METRICS:
        labels = tuple(f"a {label}" for label in names.split())
        if kind == "histogram":
            for seconds in (0.0001, 0.0012, 0.0012, 3.0, 99.0):
                metrics.observe(name, seconds)
        elif kind == "counter":
            metrics.add(name, labels, 2)
        else:
            metrics.set(name, 1.5, labels)
    return metrics


def test_metrics_are_told_where_no_descriptor_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    metrics = recorded()
    monkeypatch.setattr("builtins.open", none_left)
    assert "xds_loader_info" in metrics.render()


def test_a_real_parser_reads_every_metric() -> None:
    found = families(recorded().render())
    for name, kind, _, text in loader.METRICS:
        family = found[name.removesuffix("_total")]
        assert family.type == kind
        assert family.documentation == text
        assert family.samples, name
    assert [s.value for s in found["xds_loader_publications"].samples] == [2.0]
    assert found["xds_loader_api_requests"].samples[0].labels == {
        "code": "a code",
        "verb": "a verb",
    }


def test_a_histogram_counts() -> None:
    family = families(recorded().render())["xds_loader_publication_duration_seconds"]
    buckets = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    assert buckets["0.0005"] == 1
    assert buckets["0.001"] == 1
    assert buckets["0.0025"] == 3
    assert buckets["5.0"] == 4
    assert buckets["10.0"] == 4
    assert buckets["+Inf"] == 5
    totals = {s.name: s.value for s in family.samples if not s.name.endswith("_bucket")}
    assert totals["xds_loader_publication_duration_seconds_count"] == 5
    total = totals["xds_loader_publication_duration_seconds_sum"]
    assert total == pytest.approx(102.0025)


def test_a_bound_belongs_to_its_bucket() -> None:
    metrics = loader.Metrics("1")
    for bound in loader.BUCKETS:
        metrics.observe("xds_loader_ack_duration_seconds", bound)
    family = families(metrics.render())["xds_loader_ack_duration_seconds"]
    counts = [s.value for s in family.samples if s.name.endswith("_bucket")]
    assert counts == [*range(1, len(loader.BUCKETS) + 1), len(loader.BUCKETS)]


def test_names_follow_the_conventions() -> None:
    for name, kind, _, text in loader.METRICS:
        assert name.startswith(("xds_loader_", "process_"))
        assert name.endswith("_total") == (kind == "counter")
        if kind == "histogram":
            assert name.endswith("_seconds")
        assert text.endswith(".")
    assert len({name for name, *_ in loader.METRICS}) == len(loader.METRICS)


def test_only_what_is_known_has_a_sample() -> None:
    """A gauge that nobody has set is absent and not 0, which would be the year 1970."""
    found = families(loader.Metrics("1.2.3").render())
    assert found["xds_loader_info"].samples[0].labels == {"version": "1.2.3"}
    assert found["xds_loader_published_files"].samples[0].value == 0
    assert not found["xds_loader_snapshot_timestamp_seconds"].samples
    assert not found["xds_loader_publications"].samples


@given(value=st.text(max_size=30))
def test_labels_arrive_as_they_are(value: str) -> None:
    """But for surrogates, which no UTF-8 has."""
    value = value.encode("utf-8", "replace").decode()
    metrics = loader.Metrics("1")
    metrics.add("xds_loader_errors_total", (value,))
    sample = families(metrics.render())["xds_loader_errors"].samples[0]
    assert sample.labels == {"kind": value}


def test_replace_forgets_the_series_that_are_gone() -> None:
    metrics = loader.Metrics("1")
    name = "xds_loader_nacked_files"
    metrics.replace(name, {("rds.yaml",): 1, ("cds.yaml",): 1})
    metrics.replace(name, {("cds.yaml",): 1})
    assert [s.labels for s in families(metrics.render())[name].samples] == [{"file": "cds.yaml"}]
    metrics.add("xds_loader_errors_total", ("api",), 0)
    assert families(metrics.render())["xds_loader_errors"].samples[0].value == 0


def test_no_count_is_lost_between_threads() -> None:
    metrics = loader.Metrics("1")

    def count() -> None:
        for _ in range(5000):
            metrics.add("xds_loader_errors_total", ("x",))
            metrics.observe("xds_loader_publication_duration_seconds", 0.5)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.render()
    found = families(metrics.render())
    assert found["xds_loader_errors"].samples[0].value == 20_000
    samples = found["xds_loader_publication_duration_seconds"].samples
    assert [s.value for s in samples if s.name.endswith("_sum")] == [10_000.0]


def test_what_the_process_uses() -> None:
    found = families(loader.Metrics("1").render())
    assert 1e6 < found["process_resident_memory_bytes"].samples[0].value < 1e10
    assert found["process_cpu_seconds"].samples[0].value > 0
    assert abs(found["process_start_time_seconds"].samples[0].value - time.time()) < 60


# -- the log -------------------------------------------------------------------------------------


class Written:
    """A log that writes to a file."""

    def __init__(self, form: str = "text", level: str = "info") -> None:
        self.fd = os.memfd_create("log")
        self.log = loader.Log(self.fd)
        self.log.configure(form, level)

    def text(self) -> str:
        return os.pread(self.fd, 1 << 24, 0).decode()

    def lines(self) -> list[str]:
        """Without the time."""
        return [line.partition(" ")[2] for line in self.text().splitlines()]

    def __del__(self) -> None:
        os.close(self.fd)


def test_levels() -> None:
    for at, level in enumerate(("debug", "info", "warning", "error")):
        written = Written(level=level)
        for name in ("debug", "info", "warning", "error"):
            getattr(written.log, name)("it is %s", name)
        assert len(written.lines()) == 4 - at
        assert written.lines()[-1] == "ERROR it is error"


ANY_TEXT = st.text(max_size=20) | st.sampled_from(["\n", "\u2028", "\x1b[31m", "\ud800"]).map(
    lambda text: text * 3000
)
ANY_VALUE = st.one_of(ANY_TEXT, st.integers(), st.booleans(), st.none(), st.floats())


@example(message="x", value=math.nan, form="json")
@example(message="x", value=-math.inf, form="json")
@given(message=ANY_TEXT, value=ANY_VALUE, form=st.sampled_from(["text", "json"]))
def test_a_record_is_one_line_whatever_is_in_it(message: str, value: Any, form: str) -> None:
    """Of at most 4,096 bytes, so that a pipe accepts it whole."""
    written = Written(form)
    written.log.warning(message, reason=value, path="rds.yaml")
    text = written.text()
    assert len(text.splitlines()) == 1
    assert text.endswith("\n")
    assert len(text.encode()) <= 4096
    if form == "json":
        shown = json.loads(text, parse_constant=pytest.fail)
        assert shown["path"] == "rds.yaml"
        cut = isinstance(value, str) and len(value) >= 100
        finite = not isinstance(value, float) or math.isfinite(value)
        if finite and not cut:
            assert shown["reason"] == value


def test_a_long_line_is_cut_and_not_its_short_fields() -> None:
    for form in ("text", "json"):
        written = Written(form)
        began = time.process_time()
        written.log.error("x" * 200_000, reason='"' * 200_000, path="rds.yaml")
        assert time.process_time() - began < 0.5
        assert "rds.yaml" in written.text()
        assert "xxx..." in written.text()
        assert 1000 < len(written.text()) <= 4096


def test_a_value_cannot_forge_a_field_or_colour_a_terminal() -> None:
    written = Written()
    written.log.info(
        "rejected", reason='x" level=ok', name="a\x1b[31m", key="a=b", empty="", odd="ü"
    )
    assert written.lines() == [
        'INFO rejected reason="x\\" level=ok" name="a\\u001b[31m" key="a=b" empty="" odd=ü'
    ]


def test_a_closed_stderr_ends_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    loader.Log(writing).error("nobody reads this")
    os.close(writing)
    loader.Log(writing).error("nor this")


def test_a_blocked_stderr_drops_lines_whole_and_counts_them() -> None:
    """And does not wait for each; who reads again gets whole lines again."""
    reading, writing = os.pipe()
    log = loader.Log(writing)
    log.configure("json", "info")
    before = errors_of("log")
    with within(1):
        for number in range(300):
            log.info("x" * 1000, number=number)
    dropped = errors_of("log") - before
    assert 200 < dropped < 300
    received = os.read(reading, 1 << 20)
    log.info("again")
    received += os.read(reading, 1 << 20)
    records = [json.loads(line) for line in received.splitlines()]
    assert len(records) == 300 - dropped + 1
    assert records[-1]["message"] == "again"
    for end in (reading, writing):
        os.close(end)


def errors_of(kind: str) -> float:
    samples = families(loader.metrics.render())["xds_loader_errors"].samples
    return float(sum(sample.value for sample in samples if sample.labels["kind"] == kind))


def test_threads_do_not_mix_their_lines() -> None:
    written = Written("json")

    def write(name: str) -> None:
        for number in range(500):
            written.log.info("turn", thread=name, number=number)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([json.loads(line) for line in written.text().splitlines()]) == 2000


# -- the loader as a process ---------------------------------------------------------------------


class Running(NamedTuple):
    process: Loader
    port: int

    def metric(self, name: str) -> dict[tuple[str, ...], float]:
        """Values of one metric by its label values."""
        found = families(ask(self.port, "/metrics").body)
        samples = (s for family in found.values() for s in family.samples if s.name == name)
        return {tuple(sample.labels.values()): sample.value for sample in samples}


@pytest.fixture
def start_listening(start_loader: StartLoader) -> Callable[..., Running]:
    def start(*args: str) -> Running:
        port = held_port()
        process = start_loader("--watch", "--listen", f"127.0.0.1:{port}", *args)

        def listens() -> bool:
            with contextlib.suppress(OSError):
                return bool(ask(port, "/healthz").status)
            return False

        wait_until(listens, message="the port")
        return Running(process, port)

    return start


def is_ready(running: Running) -> bool:
    return ask(running.port, "/readyz").status == 200


def test_a_loader_from_missing_to_published(
    api: ApiServer, start_listening: Callable[..., Running]
) -> None:
    running = start_listening("--configmap", "envoy-xds")
    missing = "no snapshot yet\nmissing: configmap demo/envoy-xds\n"
    wait_until(lambda: ask(running.port, "/readyz").body == missing, message="missing")
    assert not is_ready(running)
    assert ask(running.port, "/healthz").status == 200
    published = ("xds_loader_snapshot_info", "xds_loader_snapshot_timestamp_seconds")
    assert not any(running.metric(name) for name in published), "no snapshot is not one of 1970"
    api.configmap("demo", "envoy-xds", {"rds.yaml": "resources: []\n", "note": "content"})
    wait_until(lambda: is_ready(running), message="ready")
    wait_until(lambda: running.metric(published[0]), message="metrics that are not kept ones")
    (version,) = running.metric("xds_loader_snapshot_info").keys()
    reply = ask(running.port, "/snapshot")
    shown = json.loads(reply.body)
    assert shown["version"] == version[0]
    assert [row["path"] for row in shown["files"]] == ["note", "rds.yaml"]
    assert "content" not in reply.body
    assert sum(running.metric("xds_loader_publications_total").values()) == 1
    assert running.metric("xds_loader_published_files_total") == {(): 2}
    assert running.metric("xds_loader_publication_duration_seconds_count") == {(): 1}
    assert set(running.metric("xds_loader_source_synced").values()) == {1}
    assert running.metric("xds_loader_api_requests_total")
    (heard,) = running.metric("xds_loader_source_last_event_timestamp_seconds").values()
    assert abs(heard - time.time()) < 60
    assert abs(running.metric("xds_loader_snapshot_timestamp_seconds")[()] - time.time()) < 60
    assert running.metric("process_resident_memory_bytes")[()] < 60e6


def test_nothing_of_a_secret_is_in_any_answer(
    api: ApiServer, out: Path, start_listening: Callable[..., Running]
) -> None:
    """Nor in the log; no digest either, by which guesses could be tested."""
    leaf = trustme.CA().issue_cert("web.example")
    cert = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    key = leaf.private_key_pem.bytes()
    api.secret("demo", "web-tls", {"tls.crt": cert, "tls.key": key}, type="kubernetes.io/tls")
    running = start_listening("--secret", "web-tls", "--log-level", "debug")
    wait_until(lambda: is_ready(running), message="ready")
    told = [ask(running.port, path).body for path in PATHS]
    said = "\n".join([*told, running.process.log])
    for line in key.splitlines()[1:-1]:
        assert line.decode() not in said
    (file,) = (out / "current/sds").iterdir()
    assert loader.file_of(file.read_bytes(), "").digest[:8] not in said
    (row,) = json.loads(told[-1])["files"]
    assert set(row) == {"path", "source", "state"}


def test_a_stderr_that_nobody_reads_stops_no_publication(
    api: ApiServer, out: Path, common: list[str]
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "0"})
    command = [*COMMAND, *common, "--apiserver", api.url, "--watch", "--configmap", "envoy-xds"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        path = out / "current" / "rds.yaml"
        for number in range(60):
            api.configmap("demo", "envoy-xds", {"rds.yaml": str(number)})
            wait_until(lambda: path.exists() and path.read_text() == str(number))  # noqa: B023
        process.terminate()
        assert process.wait(2) == 0
        assert all(b" INFO " in line for line in process.stderr.read().splitlines())
    finally:
        process.kill()
        process.communicate()


def test_a_hundred_clients_and_half_open_ones_hold_up_no_publication(
    api: ApiServer, out: Path, start_listening: Callable[..., Running]
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "0"})
    running = start_listening("--configmap", "envoy-xds")
    wait_until(lambda: is_ready(running), message="ready")
    ended = threading.Event()

    def scrape() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                ask(running.port, "/metrics")
            time.sleep(0.1)

    silent = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(20)]
    threads = [threading.Thread(target=scrape, daemon=True) for _ in range(100)]
    for thread in threads:
        thread.start()
    try:
        delays = []
        for number in range(1, 21):
            began = time.monotonic()
            api.configmap("demo", "envoy-xds", {"rds.yaml": str(number)})
            path = out / "current" / "rds.yaml"
            wait_until(lambda: path.read_text() == str(number))  # noqa: B023
            delays.append(time.monotonic() - began)
    finally:
        ended.set()
        for thread in threads:
            thread.join(10)
    in_time(statistics.median(delays), 0.25)  # this test's own 100 threads are most of it
    running.process.stop(within=1.0)
    for sock in silent:
        sock.close()


def test_an_outage_is_quiet_and_ready(
    api: ApiServer, start_listening: Callable[..., Running]
) -> None:
    api.configmap("demo", "envoy-xds", {"rds.yaml": "0"})
    running = start_listening("--configmap", "envoy-xds", "--log-format", "json")
    wait_until(lambda: is_ready(running), message="ready")
    api.stop()
    running.process.wait_log("warning")
    time.sleep(3)
    records = [json.loads(line) for line in running.process.lines]
    warnings = [record["message"] for record in records if record["level"] == "warning"]
    assert 1 <= len(warnings) <= 2
    assert len(set(warnings)) == len(warnings), "each is written once"
    assert is_ready(running)
    assert "stale: " in ask(running.port, "/readyz").body
    api.start()
    running.process.wait_log("warning over: configmap demo/envoy-xds", 15)
    api.configmap("demo", "envoy-xds", {"rds.yaml": "1"})
    found = running.process.wait_log('"published".*rds.yaml', 15, since=len(records))
    record = json.loads(found.string)
    assert (record["level"], record["message"], record["files"]) == ("info", "published", 1)
    assert "configmap demo/envoy-xds" in record["source"]
    wait_until(lambda: "stale" not in ask(running.port, "/readyz").body, 15, "not stale")
    assert running.process.count_log("warning over") == 1


def test_an_address_that_cannot_be_bound_ends_the_loader(
    listener: Any, run_loader: RunLoader
) -> None:
    in_use = f"127.0.0.1:{listener.port}"
    for address in (in_use, "no.such.host.invalid:1", "192.0.2.1:1", f"{'x' * 64}:1", "a..b:1"):
        done = run_loader("--watch", "--configmap", "x", "--listen", address)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "--listen: cannot bind " in done.stderr
        if address == in_use:
            said = f"cannot bind 127.0.0.1 port {listener.port}: Address already in use"
            assert said in done.stderr

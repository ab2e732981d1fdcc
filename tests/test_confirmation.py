"""Envoy's word: the judgement as tables, the thread with scripted and real admin interfaces."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import loader
from loader import (
    UNSEEN,
    Admin,
    AdminError,
    Confirmer,
    File,
    Pending,
    Request,
    Scope,
    Stats,
    Subject,
    Verdict,
    file_of,
    likely_cause,
    outcome,
    parse_stats,
    progress,
    scopes_of,
    stats_filter,
    subject_of,
    version_info,
)
from tests.support import envoy as real
from tests.support.envoy import Config, Envoy
from tests.support.ports import held_port

StartEnvoy = Callable[..., Envoy]
NOW = 1000.0  # wall clock of a move, in seconds
MS = 1_000_000  # the same in Envoy's milliseconds


def text(content: str) -> File:
    return file_of(content.encode(), "configmap demo/xds")


# ---------------------------------------------------------------------------------------------
# One file, one scope

OLD = Scope(attempt=3, success=2, rejected=1, failure=0, updated=MS - 500, version="v1")


@pytest.mark.parametrize(
    ("old", "new", "version", "said"),
    [
        # nothing happened yet
        (OLD, OLD, "v2", "pending"),
        (OLD, OLD, "v1", "pending"),
        (OLD, OLD, "", "pending"),
        # success
        (OLD, OLD._replace(attempt=4, success=3, updated=MS + 1, version="v2"), "v2", "confirmed"),
        (OLD, OLD._replace(attempt=4, success=3, updated=MS + 1), "v1", "confirmed"),
        (OLD, OLD._replace(attempt=4, success=3, updated=MS + 1, version=""), "", "confirmed"),
        # of other bytes: the file that stood there before was read once more
        (OLD, OLD._replace(attempt=4, success=3, updated=MS + 1), "v2", "pending"),
        # the success that is known already, in the millisecond of the move, is not this file's
        (OLD._replace(updated=MS), OLD._replace(updated=MS), "v1", "pending"),
        (OLD._replace(updated=MS), OLD._replace(updated=MS, rejected=2), "", "rejected"),
        # refused; after a rejection in part version_text is the old one
        (OLD, OLD._replace(attempt=4, rejected=2), "v2", "rejected"),
        (OLD, OLD._replace(attempt=4, rejected=2), "v1", "rejected"),
        (OLD, OLD._replace(attempt=4, failure=1), "", "failed"),
        # the first look was after the event: the time tells
        (None, OLD._replace(updated=MS + 1, version="v2"), "v2", "confirmed"),
        (None, OLD._replace(updated=MS + 1), "", "confirmed"),
        (None, OLD._replace(updated=MS - 1), "", "rejected"),
        (None, Scope(1, 0, 1), "", "rejected"),
        (None, Scope(), "v1", "pending"),
        # the counters began anew: a new cluster of the same name, a new Envoy
        (OLD, Scope(1, 1, 0, 0, MS + 9, "v2"), "v2", "confirmed"),
        (OLD, Scope(1, 1, 0, 0, MS + 9), "", "confirmed"),
        (OLD, Scope(1, 0, 0, 1), "", "failed"),
        (Scope(1, 1, 0, 0, MS - 9), Scope(1, 1, 0, 0, MS + 9), "", "confirmed"),
    ],
)
def test_what_one_scope_says(old: Scope | None, new: Scope, version: str, said: str) -> None:
    assert outcome(old, new, version, NOW, age=0.5) == said


@pytest.mark.parametrize(
    ("new", "age", "said"),
    [
        (OLD._replace(success=3, updated=MS - 1), 0.9, "pending"),  # the move before this one
        (OLD._replace(success=3, updated=MS + 1), 0.002, "confirmed"),
        (OLD._replace(success=3, updated=MS), 0.002, "pending"),  # which of the two?
        (OLD._replace(success=3, updated=MS), 0.1, "confirmed"),  # nothing came after it
        (OLD._replace(success=3, updated=MS, rejected=2), 0.1, "pending"),
        (OLD._replace(success=3, updated=MS, rejected=2), 0.6, "rejected"),
        (OLD._replace(rejected=2), 0.1, "pending"),  # this one, or the move before it?
    ],
)
def test_moves_that_overlap_are_told_apart_by_time(new: Scope, age: float, said: str) -> None:
    assert outcome(OLD, new, "", NOW, age, overlaps=True) == said


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (Scope(1, 1, 0, 0, MS), "confirmed"),
        (Scope(2, 1, 1, 0, MS), "pending"),  # which came last?
        (Scope(1, 0, 1), "rejected"),
        (Scope(), "pending"),
    ],
)
def test_a_file_of_unknown_time_is_judged_by_a_clean_record(new: Scope, said: str) -> None:
    assert outcome(None, new, "", 0.0, age=0.5) == said


def test_a_rejection_of_long_ago_is_not_ours() -> None:
    seen = Scope(attempt=2, success=1, rejected=1, updated=MS - 1)
    assert outcome(None, seen, "", NOW, age=0.001) == "pending"
    accepted = seen._replace(attempt=3, success=2, updated=MS + 1)
    assert outcome(None, accepted, "", NOW, age=0.002) == "confirmed"


# ---------------------------------------------------------------------------------------------
# Where statistics are

EDS = real.response("assignment", real.assignment("demo/web:80"), version="e1")


def files_of(**contents: str) -> dict[str, File]:
    return {name.replace("__", "/") + ".yaml": text(value) for name, value in contents.items()}


@pytest.mark.parametrize(
    ("path", "content", "found"),
    [
        ("cds.yaml", real.response("cluster", real.cluster("a")), ["cluster_manager.cds"]),
        ("cds.yaml", '{"resources": []}', ["cluster_manager.cds"]),
        ("lds.yaml", "x: type.googleapis.com/envoy.config.listener.v3.Listener",
         ["listener_manager.lds"]),
        ("eds/a.yaml", EDS, ["cluster.demo/web_80"]),
        ("r.yaml", real.response("routes", {"name": "r"}), ["http.in.rds.r", "http.a.b.rds.r"]),
        ("r.yaml", real.response("routes", {"name": "R"}), []),
        ("r.yaml", "{'@type': type.googleapis.com/envoy.config.route.v3.RouteConfiguration, "
         "name: r}", ["http.in.rds.r", "http.a.b.rds.r"]),
        ("s.yaml", real.response("secret", {"name": "s"}), ["sds.s"]),
        ("x.lua", "hello", []),
        ("x.yaml", "{{{", []),
    ],
)  # fmt: skip
def test_the_scopes_of_a_file(path: str, content: str, found: list[str]) -> None:
    known = ["cluster_manager.cds", "listener_manager.lds", "cluster.demo/web_80", "cluster.other",
             "http.in.rds.r", "http.a.b.rds.r", "http.in.rds.rr", "sds.s", "runtime"]  # fmt: skip
    assert scopes_of(subject_of(path, {path: text(content)}), known) == found


def test_a_cluster_may_count_its_endpoints_under_another_name() -> None:
    source = real.file_source("/srv/runtime/current/eds/a.yaml")
    cluster = real.eds_cluster("web", source, alt_stat_name="alias")
    cluster["eds_cluster_config"]["service_name"] = "demo/web:80"
    files = files_of(cds=real.response("cluster", cluster), eds__a=EDS)
    assert scopes_of(subject_of("eds/a.yaml", files), ["cluster.alias"]) == ["cluster.alias"]


def test_a_broken_file_is_looked_for_where_the_good_one_was() -> None:
    good = subject_of("r.yaml", files_of(r=real.response("routes", {"name": "r"})))
    broken = subject_of("r.yaml", files_of(r="{{{")).after(good)
    assert broken.kind == "rds"
    assert scopes_of(broken, ["http.in.rds.r"]) == ["http.in.rds.r"]
    renamed = subject_of("r.yaml", files_of(r=real.response("routes", {"name": "x"}))).after(good)
    assert scopes_of(renamed, ["http.in.rds.r"]) == ["http.in.rds.r"]


@pytest.mark.parametrize(
    ("content", "version"),
    [
        ('version_info: "a1"\nresources: []\n', "a1"),
        ("# c\nversion_info: 'a1' # x\nresources: []\n", "a1"),
        ('{"version_info":"a1","resources":[{"version_info":"b"}]}', "a1"),
        ('{"resources":[{"version_info":"b"}],"version_info":"a1"}', "a1"),
        ('{"versionInfo": "a1", "resources": []}', "a1"),
        ('{"resources":[{"version_info":"b"}]}', ""),
        ('{"version_info":"a\\"<","resources":[]}', ""),
        ("resources: []\n", ""),
        ("", ""),
    ],
)
def test_the_version_of_a_file(content: str, version: str) -> None:
    found = version_info(content.encode())
    assert found == version or (version == "" and found == "a")


def test_many_files_are_asked_about_by_kind() -> None:
    few = stats_filter([Subject("eds", r"cluster\.a", ""), Subject("", "", "")])
    assert r"cluster\.a" in few
    many = stats_filter([Subject("eds", rf"cluster\.{i}", "") for i in range(1000)])
    assert len(many) < 1000


# ---------------------------------------------------------------------------------------------
# Statistics

TEXT = """\
cluster_manager.cds.version_text: "v1"
cluster.plain.update_attempt: 0
cluster.plain.update_success: 0
cluster_manager.cds.update_attempt: 3
cluster_manager.cds.update_failure: 0
cluster_manager.cds.update_rejected: 1
cluster_manager.cds.update_success: 2
cluster_manager.cds.update_time: 1000000
cluster_manager.warming_clusters: 4
listener_manager.workers_started: 1
server.dynamic_unknown_fields: 7
server.uptime: 12
"""


def test_statistics_are_read() -> None:
    scope = Scope(3, 2, 1, 0, 1000000, "v1")
    assert parse_stats(TEXT, 5.0) == Stats(5.0, 12, True, 4, 7, {"cluster_manager.cds": scope})


@pytest.mark.parametrize("answer", ["", "<html>hello</html>", "\x00\xff", "server.uptime: x", "{}"])
def test_what_is_not_envoy_is_named(answer: str) -> None:
    with pytest.raises(AdminError, match=r"server\.uptime"):
        parse_stats(answer, 0.0)


# ---------------------------------------------------------------------------------------------
# A request over time

CDS = Scope(1, 1, 0, 0, MS - 9, "v1")
BEFORE = Stats(10.0, 100, True, 0, 0, {"cluster_manager.cds": CDS})
READ = CDS._replace(attempt=2, success=2, updated=MS + 1, version="v2")


def look(at: float, scope: Scope | None = CDS, **more: Any) -> Stats:
    found = {} if scope is None else {"cluster_manager.cds": scope}
    return BEFORE._replace(at=at, scopes=found, **more)


def asked(version: str = "v2") -> Pending:
    request = Request(1, {"cds.yaml": text("")}, {"cds.yaml": NOW}, BEFORE)
    subject = Subject("cds", r"cluster_manager\.cds", version)
    return Pending(request, {"cds.yaml": subject}, BEFORE, 10.0, 10.0)


@pytest.mark.parametrize(
    ("looks", "states"),
    [
        ([look(10.0), look(10.01, READ)], {"cds.yaml": "confirmed"}),
        ([look(10.9), look(11.0)], {"cds.yaml": "pending"}),  # not read within 1 s
        ([look(10.1, None)], {"cds.yaml": "unread"}),  # Envoy has no CDS
        ([look(10.01, CDS._replace(attempt=2, rejected=1))], {"cds.yaml": "rejected"}),
        # clusters that warm, for 5 s at most
        ([look(10.1, READ, warming=2), look(12.0, READ)], {"cds.yaml": "confirmed"}),
        ([look(14.9, READ, warming=2), look(15.0, READ, warming=2)], {"cds.yaml": "confirmed"}),
        # a rejection does not wait for them
        ([look(10.1, CDS._replace(attempt=2, rejected=1), warming=2)], {"cds.yaml": "rejected"}),
        # Envoy restarted: the counting begins anew, and its start takes what it takes
        ([look(10.9, CDS, uptime=0, started=False), look(14.0, None, uptime=1, started=False),
          look(14.5, Scope(1, 1, 0, 0, MS + 5, "v2"), uptime=2)], {"cds.yaml": "confirmed"}),
        ([look(10.9, uptime=0), look(11.8, uptime=0), look(11.9, uptime=0)],
         {"cds.yaml": "pending"}),
        # the same uptime, yet other counters
        ([look(10.1, Scope(1, 1, 0, 0, MS + 5, "v2"))], {"cds.yaml": "confirmed"}),
    ],
)  # fmt: skip
def test_a_request_waits_for_its_answer(looks: list[Stats], states: Mapping[str, str]) -> None:
    pending = asked()
    for each in looks[:-1]:
        pending, said, _ = progress(pending, each)
        assert said is None, each
    _, said, _ = progress(pending, looks[-1])
    assert said == states


def test_no_crash_loop_of_envoy_holds_a_request_for_ever() -> None:
    pending, at = asked(), 10.0
    for number in range(100):
        at += 0.5
        pending, said, _ = progress(pending, look(at, None, uptime=99 - number, started=False))
        if said is not None:
            break
    assert at <= 10.0 + loader.VERDICT_BOUND


def test_late_files_and_warm_clusters_are_named() -> None:
    assert "cds.yaml" in progress(asked(), look(11.0))[2]
    assert "2 clusters" in progress(asked(), look(15.0, READ, warming=2))[2]


@pytest.mark.parametrize(
    ("path", "kind", "content", "words"),
    [
        ("rds.yaml", "rds", " \n", "empty"),
        ("cds.json", "cds", '{"a": }', "not JSON"),
        ("eds/a.yaml", "eds", real.response("assignment", {"cluster_name": "a"},
                                            {"cluster_name": "b"}), "2 resources"),
        ("cds.yaml", "cds", "resources: [{'@type': type.googleapis.com/envoy.Nonsense}]",
         "no xDS v3 type"),
        ("cds.yaml", "cds", real.response("cluster", real.eds_cluster(
            "a", real.file_source("/x/current/eds/none.yaml"))), "eds/none.yaml"),
        ("cds.yaml", "cds", real.response("cluster", real.cluster("a")), ""),
    ],
)  # fmt: skip
def test_a_look_at_the_file_tells_more(path: str, kind: str, content: str, words: str) -> None:
    cause = likely_cause(path, kind, {path: text(content)})
    assert words in cause
    assert bool(words) == bool(cause)


# ---------------------------------------------------------------------------------------------
# The thread, with admin interfaces of all sorts


WARM = TEXT.replace("warming_clusters: 4", "warming_clusters: 0")


class Script:
    """An HTTP server that answers as it is told to, connection after connection."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.requests = 0
        self.answer: Callable[[socket.socket], None] = self.stats
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._speak, args=(connection,), daemon=True).start()

    def _speak(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(65536):
                self.requests += 1
                self.answer(connection)

    def stats(self, connection: socket.socket, body: str = WARM) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())

    def silence(self, connection: socket.socket) -> None:
        time.sleep(5)

    def trickle(self, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.05)

    def garbage(self, connection: socket.socket) -> None:
        connection.sendall(b"\x00\x01\x02 nonsense\r\n\r\n")

    def html(self, connection: socket.socket) -> None:
        self.stats(connection, "<html></html>")

    def not_found(self, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno")

    def close(self) -> None:
        self.socket.close()


class Asker:
    """A Confirmer and what it posts."""

    def __init__(self, url: str) -> None:
        self.posted: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
        self.confirmer = Confirmer(Admin(url), self.posted.put)
        self.confirmer.start()
        self.count = 0
        self.news: list[Verdict] = []

    def hear(self, timeout: float = 8.0) -> Verdict:
        return self.posted.get(timeout=timeout)

    def ask(
        self,
        files: Mapping[str, File],
        moved: Mapping[str, float],
        baseline: Stats | None = None,
    ) -> Verdict:
        self.count += 1
        base = self.confirmer.baseline if baseline is None else baseline
        self.confirmer.submit(Request(self.count, dict(files), dict(moved), base))
        return self.verdict()

    def verdict(self) -> Verdict:
        while (verdict := self.hear()).id != self.count:
            self.news.append(verdict)
        return verdict

    def close(self) -> None:
        self.confirmer.close()
        self.confirmer.join(5)
        assert not self.confirmer.is_alive()


@pytest.fixture
def script() -> Iterator[Script]:
    server = Script()
    yield server
    server.close()


@pytest.fixture
def asker(script: Script) -> Iterator[Asker]:
    found = Asker(script.url)
    yield found
    found.close()


ONE = {"cds.yaml": text('version_info: "v1"\nresources: []\n')}


@pytest.mark.parametrize("way", ["silence", "trickle", "garbage", "html", "not_found"])
def test_an_admin_interface_without_sense_delays_once_and_is_named_once(
    script: Script, asker: Asker, way: str
) -> None:
    assert asker.hear() == Verdict(0, note=f"{script.url} answers")
    script.answer = getattr(script, way)
    began = time.monotonic()
    first = asker.ask(ONE, {"cds.yaml": NOW})
    assert first.unanswered
    assert 0.9 < time.monotonic() - began < 3.0
    began = time.monotonic()
    for _ in range(20):
        assert asker.ask(ONE, {"cds.yaml": NOW}) == Verdict(asker.count, unanswered=True)
    assert time.monotonic() - began < 0.2
    said = [verdict for verdict in asker.news if verdict.unanswered]
    assert len(said) == 1
    assert script.url in said[0].note
    assert "\n" not in said[0].note
    script.answer = script.stats
    assert asker.hear() == Verdict(0, note=f"{script.url} answers")
    assert asker.ask(ONE, {"cds.yaml": NOW}, UNSEEN).confirmed == {"cds.yaml"}


def test_nobody_listens() -> None:
    url = f"http://127.0.0.1:{held_port()}"
    asker = Asker(url)
    try:
        said = asker.hear()
        assert (said.id, said.unanswered) == (0, True)
        assert "refused" in said.note
        began = time.monotonic()
        assert asker.ask(ONE, {"cds.yaml": NOW}).unanswered
        assert time.monotonic() - began < 0.1
    finally:
        asker.close()


def test_an_idle_confirmer_asks_nothing(script: Script, asker: Asker) -> None:
    asker.hear()
    assert asker.ask(ONE, {"cds.yaml": NOW}, UNSEEN).confirmed
    before = script.requests
    time.sleep(0.5)
    assert script.requests == before


def test_two_requests_at_once_are_answered_by_the_same_looks(script: Script, asker: Asker) -> None:
    """An endpoint that moves does not queue behind a step that waits for warm clusters."""
    asker.hear()
    base = asker.confirmer.baseline
    asker.confirmer.submit(Request(1, ONE, {"cds.yaml": NOW}, base))
    began = time.monotonic()
    asker.confirmer.submit(Request(2, ONE, {}, base))
    assert asker.hear().id == 2
    assert time.monotonic() - began < 0.3
    read = WARM.replace("success: 2", "success: 3").replace("attempt: 3", "attempt: 4")
    script.answer = lambda it: script.stats(it, read)
    assert asker.hear().confirmed == {"cds.yaml"}


# ---------------------------------------------------------------------------------------------
# The real Envoy


class Bench:
    """A directory of files as the loader leaves them, an Envoy that reads it, and an Asker."""

    def __init__(self, home: Path, start: StartEnvoy) -> None:
        self.home = home
        home.mkdir()
        self.port = held_port()
        self.files: dict[str, File] = {}
        self.put("eds/a.yaml", real.response("assignment", real.assignment("a:b", 9), version="e1"))
        self.put("cds.yaml", self.cds("c1"))
        self.put("rds.yaml", real.response("routes", real.route_config({"s": 1})))
        self.put("lds.yaml", self.lds("l1"))
        config = real.bootstrap(
            real.dynamic_resources(self.source("cds.yaml"), self.source("lds.yaml"))
        )
        self.envoy = start(config)
        self.asker = Asker(self.envoy.admin_url)
        self.asker.hear()

    def source(self, path: str) -> Config:
        return real.file_source(self.home / path)

    def cds(self, version: str, *more: Config) -> str:
        eds = real.eds_cluster("a:b", self.source("eds/a.yaml"))
        return real.response("cluster", real.cluster("s", 9), eds, *more, version=version)

    def lds(self, version: str, *more: Config) -> str:
        routes = real.rds_routes(self.source("rds.yaml"))
        return real.response(
            "listener", real.http_listener(self.port, routes), *more, version=version
        )

    def put(self, path: str, content: str) -> float:
        """Move a file into place as the loader does; the wall clock just before."""
        target = self.home / path
        target.parent.mkdir(exist_ok=True)
        staged = self.home.with_suffix(".tmp")
        staged.write_text(content)
        self.files[path] = text(content)
        moved = time.time()
        os.rename(staged, target)
        return moved

    def change(self, path: str, content: str) -> Verdict:
        baseline = self.asker.confirmer.baseline
        return self.asker.ask(self.files, {path: self.put(path, content)}, baseline)

    def survey(self) -> Verdict:
        moved = {path: (self.home / path).stat().st_mtime for path in self.files}
        return self.asker.ask(self.files, moved, UNSEEN)


@pytest.fixture
def bench(tmp_path: Path, start_envoy: StartEnvoy) -> Iterator[Bench]:
    found = Bench(tmp_path / "current", start_envoy)
    yield found
    found.asker.close()


def test_envoy_confirms_each_kind(bench: Bench) -> None:
    assert bench.survey().confirmed == bench.files.keys(), "what it read at its start"
    changes = {
        "eds/a.yaml": real.response("assignment", real.assignment("a:b", 10), version="e2"),
        "rds.yaml": real.response("routes", real.route_config({"s": 2})),
        "cds.yaml": bench.cds("c2", real.cluster("new", 9)),
        "lds.yaml": bench.lds("l2", real.http_listener(
            held_port(), {"route_config": real.route_config({"s": 1})}, name="two")),
    }  # fmt: skip
    for path, content in changes.items():
        verdict = bench.change(path, content)
        assert verdict == Verdict(verdict.id, frozenset([path]), waited=verdict.waited), (
            "confirmed, and nothing else"
        )
        assert verdict.waited < 0.5


def test_envoy_refuses_with_a_reason(bench: Bench) -> None:
    bench.survey()
    routes = real.route_config({"s": 1})
    twice = json.loads(json.dumps(routes))
    twice["virtual_hosts"][0]["domains"] = ["a", "a"]
    wrong = real.eds_cluster("u", bench.source("none.yaml"))
    clash = real.http_listener(bench.port, {"route_config": routes}, name="clash")
    clash["enable_reuse_port"] = False
    bad = [
        ("rds.yaml", real.response("routes", twice), "update_rejected"),
        ("rds.yaml", "{{{", "update_failure"),
        ("rds.yaml", "", "the file is empty"),
        ("rds.yaml", real.response("routes", real.route_config({"s": 1}, "other")),
         "update_rejected"),
        ("rds.yaml", real.response("assignment", real.assignment("a", 1)), "update_rejected"),
        ("eds/a.yaml", real.response("assignment", real.assignment("a:b", 1),
                                     real.assignment("c", 1)), "2 resources"),
        ("cds.yaml", bench.cds("c2", real.cluster("x", 9, connect_timeout="soon")),
         "update_failure"),
        ("cds.yaml", bench.cds("c3", wrong), "none.yaml"),
        ("cds.yaml", bench.cds("c4", wrong), "clusters not taken: u"),
        ("cds.yaml", bench.cds("c5").replace("envoy.config.cluster.v3.Cluster", "envoy.Nonsense"),
         "no xDS v3 type URL"),
        ("lds.yaml", bench.lds("l2", clash), "duplicate address"),
        ("lds.yaml", bench.lds("l3", real.http_listener(
            held_port(), real.rds_routes(bench.source("none.yaml")), name="n")), "none.yaml"),
    ]  # fmt: skip
    for path, content, words in bad:
        good = bench.files[path].content.decode()
        verdict = bench.change(path, content)
        assert list(verdict.rejected) == [path], content
        assert words in verdict.rejected[path]
        assert "\n" not in verdict.rejected[path]
        assert bench.change(path, good).confirmed == {path}, "the good bytes come back"


def test_unread_files_are_told_apart(bench: Bench) -> None:
    bench.survey()
    new = real.response("assignment", real.assignment("new", 9), version="n1")
    verdict = bench.change("eds/new.yaml", new)
    assert verdict.unread == {"eds/new.yaml"}
    assert not verdict.rejected
    assert verdict.waited < 0.5
    moved = {"eds/new.yaml": time.time() - 0.5}
    baseline = bench.asker.confirmer.baseline
    cluster = real.eds_cluster("new", bench.source("eds/new.yaml"))
    moved["cds.yaml"] = bench.put("cds.yaml", bench.cds("c2", cluster))
    verdict = bench.asker.ask(bench.files, moved, baseline)
    assert verdict.confirmed == {"cds.yaml", "eds/new.yaml"}, "with its cluster it is read"


def test_endpoints_that_are_refused_when_their_cluster_comes(bench: Bench) -> None:
    bench.survey()
    both = [real.assignment("new", 9), real.assignment("x", 9)]
    moved = {"eds/new.yaml": bench.put("eds/new.yaml", real.response("assignment", *both))}
    baseline = bench.asker.confirmer.baseline
    cluster = real.eds_cluster("new", bench.source("eds/new.yaml"))
    moved["cds.yaml"] = bench.put("cds.yaml", bench.cds("c2", cluster))
    verdict = bench.asker.ask(bench.files, moved, baseline)
    assert verdict.confirmed == {"cds.yaml"}
    assert list(verdict.rejected) == ["eds/new.yaml"]


def test_clusters_are_awaited_to_be_warm(bench: Bench) -> None:
    bench.survey()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers a check
        check = {"timeout": "0.3s", "interval": "1s", "unhealthy_threshold": 1,
                 "healthy_threshold": 1, "http_health_check": {"path": "/"}}  # fmt: skip
        slow = real.cluster("slow", silent.getsockname()[1], health_checks=[check])
        verdict = bench.change("cds.yaml", bench.cds("c2", slow))
    assert verdict.confirmed == {"cds.yaml"}
    assert 0.25 < verdict.waited < 2.0


def test_ignored_fields_are_counted(bench: Bench) -> None:
    bench.survey()
    odd = real.route_config({"s": 1}) | {"no_such_field": 1}
    verdict = bench.change("rds.yaml", real.response("routes", odd))
    assert verdict.confirmed == {"rds.yaml"}
    assert verdict.unknown_fields == 1


def test_envoy_restarts(bench: Bench) -> None:
    bench.survey()
    bench.envoy.stop(kill=True)
    gone = bench.asker.hear()
    assert (gone.id, gone.unanswered) == (0, True)
    bench.envoy.start()
    assert bench.asker.hear() == Verdict(0, note=f"{bench.envoy.admin_url} answers")
    assert bench.survey().confirmed == bench.files.keys()
    verdict = bench.change("rds.yaml", real.response("routes", real.route_config({"s": 7})))
    assert verdict.confirmed == {"rds.yaml"}


def test_envoy_restarts_within_a_step(bench: Bench) -> None:
    """Killed after the files moved and before it was asked: the new process's word counts."""
    bench.survey()
    baseline = bench.asker.confirmer.baseline
    moved = {"rds.yaml": bench.put("rds.yaml", "{{{")}
    bench.envoy.restart(kill=True)
    while bench.asker.hear().unanswered:
        pass
    verdict = bench.asker.ask(bench.files, moved, baseline)
    assert list(verdict.rejected) == ["rds.yaml"]

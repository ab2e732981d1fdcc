"""An API server that fails in every way: no file changes wrongly, the loader lives and converges.

Each outage is begun under a running sidecar, the object changes meanwhile, and what the loader
asked is counted in the transcript: an outage of many loaders must not become a storm.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import loader
from tests.conftest import TOKEN, RunLoader, StartLoader
from tests.support import disk
from tests.support.apiserver import (
    ApiServer,
    Cut,
    Drop,
    Fault,
    Gzip,
    Raw,
    Request,
    Response,
    Rule,
    Slow,
    Stall,
    StallBody,
    Stream,
    WrongLength,
    failure,
    redirect,
)
from tests.support.busy import within
from tests.support.loader import Loader, wait_until
from tests.support.tuned import tuned

MODES = {"watch": ("--watch",), "poll": ("--sync-interval", "100ms")}
NAMED = ("--configmap", "envoy-xds")
LIST, ANY = r"GET [^?]*\?(?!.*watch=)", "GET "

BOUND = 3.0  # seconds: after an outage of a second the next try comes within two

# Outages are short here, and so are the pauses: a quarter of the usual.
HASTY = tuned({"BACKOFF_FIRST": 0.125, "BACKOFF_LAST": 7.5, "ONE_TRY_SECONDS": 0.25})
OUTAGE = 0.2
# Tries in that time: at once, after 0.06 to 0.13 s, after 0.13 to 0.25 s; one may be the probe of
# the resourceVersion and one a list after it.
BUDGET = 6


def put(api: ApiServer, generation: int, more: str = "") -> None:
    text = f"{generation}{more}"
    api.configmap("demo", "envoy-xds", {"one.txt": text, "two.txt": text})


def shown(out: Path) -> str:
    """What both files of one snapshot say."""
    while True:
        try:
            home = os.open(out / "..data", os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return ""
        try:
            texts = []
            for name in ("one.txt", "two.txt"):
                with open(os.open(name, os.O_RDONLY, dir_fd=home)) as stream:
                    texts.append(stream.read())
        except FileNotFoundError:
            continue  # pruned meanwhile
        finally:
            os.close(home)
        assert texts[0] == texts[1], "two generations in one snapshot"
        return texts[0]


def generation_of(text: str) -> int:
    digits = text[:12].strip("x\n").split(" ")[0]
    return int(digits) if digits else -1


class Sampler(threading.Thread):
    """Looks at the files all the time: each state must be one that the API had, in its order."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.wrong: list[str] = []
        self.seen: list[int] = []
        self._out = out
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.002):
            try:
                generation = generation_of(shown(self._out))
            except (AssertionError, ValueError, OSError) as error:
                self.wrong.append(repr(error))
                return
            if not self.seen or generation != self.seen[-1]:
                self.seen.append(generation)

    def finish(self, *possible: int) -> None:
        """`possible` are the generations that the API had (any, if none are given)."""
        self._done.set()
        self.join()
        assert self.wrong == []
        assert self.seen == sorted(self.seen), f"went back: {self.seen}"
        assert not possible or set(self.seen) <= set(possible)


@pytest.fixture
def sampler(out: Path) -> Iterator[Sampler]:
    found = Sampler(out)
    yield found
    found._done.set()


def wait_shown(out: Path, generation: int, timeout: float, more: str = "") -> float:
    """How long it took, in seconds."""
    began = time.monotonic()
    wait_until(lambda: shown(out) == f"{generation}{more}", timeout, f"generation {generation}")
    return time.monotonic() - began


# -- outages


class Kind(NamedTuple):
    begin: Callable[[ApiServer], object]
    end: Callable[[ApiServer], object]
    fault: Fault | None = None  # that a first request meets as well


def failing(fault: Fault, match: str = ANY) -> Kind:
    """Every request meets this, and open watches are cut."""

    def begin(api: ApiServer) -> None:
        api.fail_next(match, fault, times=1_000)
        api.close_watches(clean=False)

    return Kind(begin, lambda api: api.forgive(), fault)


def frozen(api: ApiServer) -> None:
    """Takes connections and requests, answers nothing."""
    api.freeze()
    api.close_watches(clean=False)


def set_tokens(api: ApiServer, *tokens: str) -> None:
    api.tokens = set(tokens)
    api.close_watches(clean=False)


def set_rules(api: ApiServer, rules: list[Rule] | None) -> None:
    api.rules = rules
    api.close_watches(clean=False)


HTML = Response(200, b"<html>captive portal</html>", {"Content-Type": "text/html"})
OUTAGES = {
    "killed": Kind(lambda api: api.stop(), lambda api: api.start()),
    "stopped gracefully": Kind(lambda api: api.stop(graceful=True, grace=0.2), ApiServer.start),
    "frozen": Kind(frozen, ApiServer.thaw),
    "closes": failing(Drop()),
    "resets": failing(Drop(reset=True)),
    "500": failing(failure(500, "InternalError")),
    "503": failing(failure(503, "ServiceUnavailable")),
    "504": failing(failure(504, "Timeout")),
    "429": failing(failure(429, "TooManyRequests")),
    "429, wait a second": failing(failure(429, "TooManyRequests", headers={"Retry-After": "1"})),
    "401: the token has expired": Kind(
        lambda api: set_tokens(api), lambda api: set_tokens(api, TOKEN)
    ),
    "403: the role is gone": Kind(
        lambda api: set_rules(api, []), lambda api: set_rules(api, None)
    ),
    "404": failing(failure(404, "NotFound")),
    "redirects": failing(redirect("http://127.0.0.1:1/")),
    "a captive portal": failing(HTML),
    "404 in plain text": failing(Response(404, b"404 page not found\n")),
    "something else": failing(Response(200, b'{"kind":"APIVersions","versions":["v1"]}')),
    "a list": failing(Response(200, b"[1, 2]")),
    "invalid UTF-8": failing(Response(200, b'{"kind":"ConfigMapList","items":[{"a":"\xff"}]}')),
    "an empty object": failing(Response(200, b"{}")),
    "no bytes": failing(Response(200, b"")),
    "null": failing(Response(200, b"null")),
    "garbage": failing(Raw(b"\x00\xff\x16\x03garbage\r\n\r\n")),
    "half an answer": failing(Raw(b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"kind":"Co')),
    "an endless header": failing(Raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n")),
    "a length too long": failing(WrongLength(10), LIST),
    "a length too short": failing(WrongLength(-10), LIST),
    "cut after the head": failing(Cut(0)),
    "cut in the body": failing(Cut(40)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OUTAGES)
def test_an_outage(
    start_loader: StartLoader, api: ApiServer, out: Path, sampler: Sampler, name: str, mode: str
) -> None:
    """It only delays the first list. Later the last files stand, requests are few, and a change
    made meanwhile comes soon after."""
    kind = OUTAGES[name]
    put(api, 1)
    if kind.fault is not None:
        api.fail_next(LIST, kind.fault)
    running = start_loader(*NAMED, *MODES[mode], prefix=HASTY)
    wait_shown(out, 1, 5)
    running.wait_log("published")
    if mode == "watch":
        api.wait_watches(1)
    sampler.start()
    wait_until((out / "..state/loader.json").exists)  # the last thing that a publication writes
    before = disk.fingerprint_at_rest(out)
    kind.begin(api)
    asked = len(api.requests)
    put(api, 2)
    time.sleep(OUTAGE)
    requests = len(api.requests) - asked
    if not (mode == "watch" and name in ("a length too long", "a length too short")):
        # Those two are about lists; a watch that is cut is resumed without one.
        assert shown(out) == "1"
        assert disk.fingerprint(out) == before, "an outage touches nothing"
    assert running.process.poll() is None, running.log
    assert requests <= BUDGET, api.requests[asked:]
    kind.end(api)
    wait_shown(out, 2, BOUND)
    put(api, 3)
    wait_shown(out, 3, BOUND)
    sampler.finish(1, 2, 3)
    assert "Traceback" not in running.log
    assert len(running.lines) < 20, running.log


def test_a_long_outage_is_asked_about_ever_more_seldom(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    """Two sources: 0.5, 1, 2, 4 s and so on to 30 s (here a quarter), less jitter of a half at the
    most; and few lines of log."""
    put(api, 1)
    api.configmap("demo", "more", {"lds.yaml": "1"})
    running = start_loader(*NAMED, "--configmap", "more", "--watch", prefix=HASTY)
    wait_until(lambda: (out / "current/lds.yaml").exists())
    api.wait_watches(2)
    api.fail_next(ANY, Drop(), times=10_000)
    asked = len(api.requests)
    api.close_watches(clean=False)
    for name in ("envoy-xds", "more"):

        def of_it(request: Request, name: str = name) -> bool:
            return name in request.query["fieldSelector"]

        tries = [api.requests.wait_for(of_it, count=n, since=asked).time for n in range(1, 6)]
        for number, (before, after) in enumerate(itertools.pairwise(tries)):
            assert after - before > 0.95 * 0.125 / 2 * 2**number, tries
    assert len(running.lines) < 12, running.log


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_chaos(
    start_loader: StartLoader, api: ApiServer, out: Path, sampler: Sampler, seed: int, mode: str
) -> None:
    """Faults of all kinds at random places while the object changes all the time."""
    chosen = random.Random(seed)
    put(api, 0)
    running = start_loader(*NAMED, *MODES[mode])
    wait_shown(out, 0, 5)
    sampler.start()
    faults: list[Callable[[], Fault]] = [
        lambda: Drop(chosen.random() < 0.5),
        lambda: Cut(chosen.randrange(400)),
        lambda: failure(chosen.choice([401, 403, 429, 500, 503, 504]), "Odd"),
        lambda: failure(410, "Expired"),
        lambda: Raw(bytes(chosen.randrange(256) for _ in range(60))),
        lambda: HTML,
        lambda: Slow(chosen.randrange(1, 40), 0.0005),
        lambda: Gzip(),
        lambda: Stall(chosen.random() * 0.3),
        lambda: Stream([b'{"type":"ADDED","object":{"kind"', b"\n"], "cut"),
        lambda: Stream([b"\n\n", b'{"type":"ODD","object":{}}\n'], "clean"),
    ]
    generation = 0
    for _ in range(40):
        api.fail_next(ANY, chosen.choice(faults)())
        for _ in range(chosen.randrange(4)):
            generation += 1
            put(api, generation)
        if chosen.random() < 0.5:
            api.close_watches(clean=chosen.random() < 0.3, midchunk=chosen.random() < 0.3)
        if chosen.random() < 0.1:
            api.compact()
        time.sleep(0.03)
    api.forgive()
    generation += 1
    put(api, generation)
    wait_shown(out, generation, 32)  # the longest backoff, and a little
    sampler.finish()
    assert running.process.poll() is None
    assert "Traceback" not in running.log
    running.stop()


# -- silence: with the bounds of 30 and 80 s made short, to see what they do


@pytest.fixture
def impatient(api: ApiServer, common: list[str]) -> Iterator[Callable[..., Loader]]:
    """A loader that takes a second of silence for what it else takes 30 or 80 s for."""
    constants = {"WATCH_SILENCE": 1.0, "ANSWER_TIMEOUT": 0.5, "CONNECT_TIMEOUT": 0.5}
    with contextlib.ExitStack() as stack:
        yield lambda *args: stack.enter_context(
            Loader([*common, "--apiserver", api.url, *args], prefix=tuned(constants))
        )


def test_a_silent_watch_is_noticed(
    impatient: Callable[..., Loader], api: ApiServer, out: Path
) -> None:
    """Half-open, or behind a proxy that forgot it: no byte comes and no end."""
    put(api, 1)
    api.fail_next(r"watch=", Stream([], "silent"))
    impatient(*NAMED, "--watch")
    wait_shown(out, 1, 5)
    put(api, 2)
    wait_shown(out, 2, 4)


def test_a_silent_watch_of_a_quiet_object_is_no_trouble(
    impatient: Callable[..., Loader], api: ApiServer, out: Path
) -> None:
    """Bookmarks keep it open; without any it is asked once a silence, no more."""
    put(api, 1)
    api.bookmark_interval = 0.3
    running = impatient(*NAMED, "--watch")
    running.wait_log("published")
    wait_until((out / "..state/loader.json").exists)  # the last thing that a publication writes
    before = disk.fingerprint_at_rest(out)
    time.sleep(2.5)
    assert len(api.requests) == 2, "a list and a watch"
    assert disk.fingerprint(out) == before
    assert "cannot" not in running.log


@pytest.mark.parametrize("fault", [Stall(), StallBody(0), StallBody(30)], ids=repr)
@pytest.mark.parametrize("mode", MODES)
def test_an_answer_that_never_comes(
    impatient: Callable[..., Loader], api: ApiServer, out: Path, fault: Fault, mode: str
) -> None:
    put(api, 1)
    running = impatient(*NAMED, *MODES[mode])
    wait_shown(out, 1, 5)
    api.fail_next(ANY, fault)
    api.close_watches(clean=False)
    put(api, 2)
    wait_shown(out, 2, 6)
    assert "Traceback" not in running.log


@pytest.mark.parametrize("line", [b'{"type":"MODIFIED","object":{"ki\n', b"\0\xff\n", b"[]\n",
                                  b'{"type":"MODIFIED"}\n', b'{"type":"MODIFIED","object":7}\n'],
                         ids=repr)  # fmt: skip
def test_an_event_that_cannot_be_read_is_asked_for_again(
    start_loader: StartLoader, api: ApiServer, out: Path, line: bytes
) -> None:
    """It may have been the last one for a long time: to pass it over would be to lose it."""
    put(api, 1)
    api.fail_next("watch=", Stream([line], "silent"))
    running = start_loader(*NAMED, "--watch")
    wait_shown(out, 1, 5)
    put(api, 2)
    wait_shown(out, 2, BOUND)
    assert "Traceback" not in running.log


# -- slow, large


def test_a_server_that_sends_byte_by_byte(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    put(api, 1)
    api.fail_next(ANY, Slow(1, 0.0005), times=2)
    start_loader(*NAMED, "--watch")
    wait_shown(out, 1, 5)
    put(api, 2)
    wait_shown(out, 2, 5)


HUGE = 440 * 1024  # each of two files: 900 KiB in one line of the watch


@pytest.mark.parametrize("mode", MODES)
def test_huge_objects_cut_and_sent_again(
    start_loader: StartLoader, api: ApiServer, out: Path, sampler: Sampler, mode: str
) -> None:
    """In chunks, cut midway, compressed: never half of one on disk."""
    tail = " " + "x" * HUGE
    put(api, 1, tail)
    api.chunk_size = 10_000
    running = start_loader(*NAMED, *MODES[mode])
    wait_shown(out, 1, 5, tail)
    sampler.start()
    faults: list[Fault] = [
        Cut(300_000), Cut(900_000), Gzip(), Slow(50_000, 0.001), WrongLength(-5),
    ]  # fmt: skip
    for generation, fault in enumerate(faults, 2):
        api.fail_next(ANY, fault)
        api.close_watches(clean=False)
        put(api, generation, tail)
        wait_shown(out, generation, 6, tail)
    put(api, 7)
    wait_shown(out, 7, 6)
    sampler.finish(1, 2, 3, 4, 5, 6, 7)
    assert running.resident() < 80 << 20


# -- the clock, DNS


@pytest.mark.parametrize("mode", MODES)
def test_a_clock_that_jumps_matters_to_nothing(
    api: ApiServer, common: list[str], out: Path, sampler: Sampler, mode: str
) -> None:
    """By days, by years and back to 1970, at each look at it: intervals are monotonic."""
    put(api, 0)
    arguments = [*common, "--apiserver", api.url, *NAMED, *MODES[mode]]
    with Loader(arguments, prefix=tuned(clock=True)) as running:
        wait_shown(out, 0, 5)
        sampler.start()
        for generation in range(1, 30):
            put(api, generation)
            wait_shown(out, generation, 2)
        asked = len(api.requests)
        time.sleep(0.5)
        assert len(api.requests) - asked <= (6 if mode == "poll" else 0)
        assert "Traceback" not in running.log
    sampler.finish()


def test_dns_that_is_gone_for_a_while(
    api: ApiServer, common: list[str], out: Path, tmp_path: Path
) -> None:
    put(api, 1)
    flag = tmp_path / "gone"
    url = api.url.replace("127.0.0.1", "localhost")
    prefix = tuned(dns=str(flag))
    with Loader([*common, "--apiserver", url, *NAMED, "--watch"], prefix=prefix) as running:
        wait_shown(out, 1, 5)
        api.wait_watches(1)  # it must need a new connection
        flag.touch()
        api.close_watches(clean=False)
        put(api, 2)
        said = running.wait_log("name resolution")
        assert "--apiserver" in said.string
        assert shown(out) == "1"
        flag.unlink()
        wait_shown(out, 2, BOUND)


# -- a run that ends


@pytest.mark.parametrize(
    "name", [name for name in OUTAGES if name not in ("frozen", "stopped gracefully")]
)
def test_one_run_ends_soon_and_says_why(
    run_loader: RunLoader, api: ApiServer, out: Path, name: str
) -> None:
    put(api, 1)
    OUTAGES[name].begin(api)
    with within(5):  # a second of retries, and the start of an interpreter
        done = run_loader(*NAMED, "--onetime", prefix=HASTY)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "envoy-xds" in done.stderr or f"127.0.0.1:{api.port}" in done.stderr
    assert not (out / "..data").exists()
    assert len(api.requests) <= 13, "at most ten a second"
    OUTAGES[name].end(api)
    assert run_loader(*NAMED, "--onetime").returncode == 0
    assert shown(out) == "1"


def test_an_error_answer_that_is_cut_keeps_its_status(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    """One try goes on after a 503, and not after an answer that is none."""
    put(api, 1)
    api.fail_next(LIST, Raw(b"HTTP/1.1 503 Busy\r\nContent-Length: 500\r\n\r\nhalf of it"))
    done = run_loader(*NAMED, "--onetime")
    assert done.returncode == 0, done.stderr
    assert shown(out) == "1"


def test_a_role_for_another_scope_is_named(run_loader: RunLoader, api: ApiServer) -> None:
    api.rules = []
    done = run_loader("--onetime", "--services", "*", "--services-namespace", "*")
    assert done.returncode == 1
    assert "grant the service account list on services in all namespaces" in done.stderr \
        or "grant the service account list on endpointslices in all namespaces" in done.stderr


def test_who_may_list_and_not_watch_is_told_once(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    put(api, 1)
    api.rules = [Rule(["list"], ["configmaps"], "demo")]
    running = start_loader(*NAMED, "--watch", prefix=HASTY)
    api.requests.wait_for(lambda request: "watch" in request.query, count=5)
    assert shown(out) == "1"
    assert running.count_log("watch configmap") == 1
    assert running.count_log("warning over") == 0


def test_another_port_in_an_error_is_no_news(
    start_loader: StartLoader, api: ApiServer
) -> None:
    for port in (43812, 50123, 61234):
        api.fail_next(LIST, failure(500, "InternalError", f"read tcp 10.0.0.5:{port}: reset"))
    put(api, 1)
    running = start_loader(*NAMED, "--watch", prefix=HASTY)
    running.wait_log("INFO warning over: configmap demo")
    assert running.count_log("read tcp") == 1


def test_no_thread_is_left_for_a_request(
    monkeypatch: pytest.MonkeyPatch, api: ApiServer
) -> None:
    """An error of this request, and not the end of the loader."""

    def start(timer: threading.Timer) -> None:
        raise RuntimeError("can't start new thread")

    options = loader.options_from([*NAMED, f"--apiserver={api.url}", "--token-file="], {})
    monkeypatch.setattr(threading.Timer, "start", start)
    with pytest.raises(loader.ApiError, match="temporarily unavailable"):
        loader.Api(options).list(loader.Query(loader.CONFIGMAPS, "demo"), print)

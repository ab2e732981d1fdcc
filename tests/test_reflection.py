"""List, poll and watch against the scripted API server, judged by its transcript and the files."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

import loader
from tests.conftest import TOKEN, RunLoader, StartLoader
from tests.support import apiserver as k8s
from tests.support.apiserver import ApiServer, Request, Rule
from tests.support.busy import in_time, within
from tests.support.loader import Loader, wait_files, wait_until
from tests.support.tls import Authority

MAPS = "/api/v1/namespaces/demo/configmaps"
WATCH = ["--watch", "--configmap", "envoy-xds"]
LIST = rf"GET {MAPS}\?(?!.*watch=)"  # a regex over Request.target


def put(api: ApiServer, text: str, namespace: str = "demo") -> None:
    api.configmap(namespace, "envoy-xds", {"rds.yaml": text})


def wait_text(out: Path, text: str, timeout: float = 5.0) -> None:
    wait_files(out, {"rds.yaml": text}, timeout)


def is_list(request: Request) -> bool:
    return request.is_list


def is_watch(request: Request) -> bool:
    return request.is_watch


@pytest.fixture(autouse=True)
def first(api: ApiServer) -> None:
    put(api, "1")


@pytest.fixture
def watching(start_loader: StartLoader, api: ApiServer, out: Path) -> Loader:
    """A sidecar that has published and whose watch is open."""
    loader = start_loader(*WATCH)
    wait_text(out, "1")
    api.wait_watches(1)
    return loader


# -- list


def test_resource_names_suffice_for_a_watch_too(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.rules = [Rule(["list", "watch"], ["configmaps"], "demo", ["envoy-xds"])]
    start_loader(*WATCH)
    wait_text(out, "1")
    put(api, "2")
    wait_text(out, "2")
    assert {request.status for request in api.requests} <= {0, 200}


def test_long_lists_come_in_pages(run_loader: RunLoader, api: ApiServer, out: Path) -> None:
    for number in range(1200):
        api.configmap("demo", f"m{number}", {f"k{number}": str(number)}, labels={"app": "x"})
    done = run_loader("--onetime", "--configmap-selector", "app=x")
    assert done.returncode == 0, done.stderr
    wait_files(out, {f"k{number}": str(number) for number in range(1200)})
    assert len(api.requests) >= 3
    assert all(int(request.query["limit"]) <= 500 for request in api.requests)
    assert len({request.connection for request in api.requests}) == 1


def test_pages_that_expire_are_listed_again(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    for number in range(1200):
        api.configmap("demo", f"m{number:04}", {f"k{number}": "1"}, labels={"app": "x"})
    expired: list[str] = []

    def expire(request: Request) -> bool:
        if "continue" in request.query and not expired:
            expired.append(request.query["continue"])
            api.delete("ConfigMap", "demo", "m0000")  # on the first page, already read
            api.compact()
        return False

    api.fail_next(expire, k8s.Drop())
    done = run_loader("--onetime", "--configmap-selector", "app=x", "--timeout", "10s")
    assert done.returncode == 0, done.stderr
    assert expired
    wait_files(out, {f"k{number}": "1" for number in range(1, 1200)})


def test_a_transient_refusal_is_asked_again(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    """Right after its restart an API server refused a valid token, once, for some 20 ms."""
    api.fail_next(LIST, k8s.failure(403, "Transient"))
    done = run_loader("--onetime", "--configmap", "envoy-xds")
    assert done.returncode == 0, done.stderr
    wait_text(out, "1")


def test_a_refusal_names_verb_resource_and_namespace(run_loader: RunLoader, api: ApiServer) -> None:
    api.rules = []
    done = run_loader("--onetime", "--configmap", "envoy-xds")
    assert done.returncode == 1
    for word in ("403", "list", "configmaps", "demo"):
        assert word in done.stderr
    assert TOKEN not in done.stderr


def test_a_refusal_is_not_final_for_a_sidecar(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.rules = [Rule(["list"], ["configmaps"], "demo")]
    loader = start_loader(*WATCH)
    loader.wait_log(r"watch.*configmaps.*demo|configmaps.*demo.*watch")
    wait_text(out, "1")
    api.rules = None
    put(api, "2")
    wait_text(out, "2", 15)


def test_onetime_waits_for_an_api_server_that_comes_late(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.stop()
    loader = start_loader("--onetime", "--configmap", "envoy-xds", "--timeout", "20s")
    loader.wait_log(str(api.port))
    api.start()
    assert loader.wait(20) == 0
    wait_text(out, "1")


# -- poll


def test_polling_goes_at_its_interval(start_loader: StartLoader, api: ApiServer, out: Path) -> None:
    start_loader("--configmap", "envoy-xds", "--sync-interval", "300ms")
    first = api.requests.wait_for(is_list)
    last = api.requests.wait_for(is_list, count=5)
    assert last.time - first.time > 0.9
    in_time(last.time - first.time, 3)


# -- watch


def test_watching_asks_once_and_then_only_listens(
    watching: Loader, api: ApiServer, out: Path
) -> None:
    for number in range(20):
        put(api, f"n{number}")
        wait_text(out, f"n{number}")
    api.bookmark()
    put(api, "last")
    wait_text(out, "last")
    listed, watched = api.requests
    assert listed.is_list
    assert watched.is_watch
    assert watched.query["allowWatchBookmarks"] in ("true", "1")
    assert watched.query["fieldSelector"] == "metadata.name=envoy-xds"
    assert 60 <= int(watched.query["timeoutSeconds"]) <= 3600
    assert watched.query["resourceVersion"].isdigit()


def test_no_relist_at_the_sync_interval(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    """A thousand sidecars must not relist every minute."""
    start_loader(*WATCH, "--sync-interval", "50ms")
    wait_text(out, "1")
    for number in range(10):
        time.sleep(0.05)  # intervals pass
        put(api, f"n{number}")
        wait_text(out, f"n{number}")
    assert len(api.requests) == 2


@pytest.mark.parametrize("how", ["clean", "cut", "midchunk"])
def test_a_watch_that_ends_is_resumed(
    watching: Loader, api: ApiServer, out: Path, how: str
) -> None:
    """From the last resourceVersion, without a list; what happened in the gap is delivered."""
    put(api, "2")
    wait_text(out, "2")
    version = api.version
    api.close_watches(how == "clean", midchunk=how == "midchunk")
    put(api, "3")
    wait_text(out, "3")
    resumed = api.requests.wait_for(is_watch, count=2)
    assert resumed.query["resourceVersion"] in (version, api.version)
    assert [r for r in api.requests if r.is_list and r.query.get("limit") != "1"] == [
        api.requests[0]
    ]


def test_a_bookmark_moves_the_version_to_resume_from(
    watching: Loader, api: ApiServer, out: Path
) -> None:
    put(api, "of another namespace", "other")
    version = api.version
    api.bookmark()
    api.close_watches()
    resumed = api.requests.wait_for(is_watch, count=2)
    assert resumed.query["resourceVersion"] == version
    put(api, "2")
    wait_text(out, "2")


def test_a_bookmark_is_a_version_and_nothing_else(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.bookmark_interval = 0.05
    start_loader(*WATCH)
    wait_text(out, "1")
    time.sleep(0.3)  # some bookmarks, whose ConfigMap has neither name nor data
    wait_text(out, "1")
    put(api, "2")
    wait_text(out, "2")


def test_expired_in_the_stream_is_listed_again(watching: Loader, api: ApiServer, out: Path) -> None:
    api.stop()
    put(api, "2")
    put(api, "3")
    api.compact()
    api.start()
    wait_text(out, "3", 10)
    put(api, "4")
    wait_text(out, "4")


def test_expired_as_a_status_is_listed_again(watching: Loader, api: ApiServer, out: Path) -> None:
    api.fail_next("watch=", k8s.failure(410, "Expired", "too old resource version"))
    api.close_watches()
    put(api, "2")
    wait_text(out, "2")
    assert len(api.requests.matching(is_list)) >= 2


@pytest.mark.parametrize(
    "code, reason", [(410, "Expired"), (500, "InternalError"), (504, "Timeout")]
)
def test_error_events(watching: Loader, api: ApiServer, out: Path, code: int, reason: str) -> None:
    """None of them is an object; after each the truth is found again."""
    api.inject(k8s.error_event(code, reason, "scripted"), end=True)
    put(api, "2")
    wait_text(out, "2", 5)
    put(api, "3")
    wait_text(out, "3", 5)


def test_deletions_in_a_gap_are_seen(start_loader: StartLoader, api: ApiServer, out: Path) -> None:
    """A relist replaces the store."""
    for name in "abc":
        api.configmap("demo", name, {f"{name}.yaml": name}, labels={"app": "x"})
    start_loader("--watch", "--configmap-selector", "app=x")
    wait_files(out, {"a.yaml": "a", "b.yaml": "b", "c.yaml": "c"})
    api.wait_watches(1)
    api.stop()
    api.delete("ConfigMap", "demo", "b")
    api.compact()
    api.start()
    wait_files(out, {"a.yaml": "a", "c.yaml": "c"}, 10)


def test_unknown_event_types_are_passed_over(watching: Loader, api: ApiServer, out: Path) -> None:
    odd = b'{"type":"REFRESHED","object":{"kind":"ConfigMap","metadata":{"name":"envoy-xds",' \
          b'"namespace":"demo","resourceVersion":"7"},"data":{"rds.yaml":"odd"}}}\n'  # fmt: skip
    api.inject(odd + b"\n")
    time.sleep(0.2)
    wait_text(out, "1")
    put(api, "2")
    wait_text(out, "2", 10)


def test_a_large_event_in_many_chunks(watching: Loader, api: ApiServer, out: Path) -> None:
    api.chunk_size = 4096
    text = "x" * 1_000_000 + "é"
    put(api, text)
    wait_text(out, text, 10)


def test_etcd_reset_is_noticed_soon_after_the_reconnect(
    watching: Loader, api: ApiServer, out: Path
) -> None:
    """The resumed watch would be silent for ever: its version is of the future."""
    for number in range(30):
        put(api, f"n{number}")
    wait_text(out, "n29")
    old = {"kind": "ConfigMap", "metadata": {"name": "envoy-xds", "namespace": "demo"}}
    asked = len(api.requests)
    api.stop()
    api.reset_etcd([{**old, "data": {"rds.yaml": "restored"}}])
    time.sleep(0.3)
    api.start()
    wait_text(out, "restored", 10)
    put(api, "new")
    wait_text(out, "new", 5)
    assert len(api.requests) - asked <= 5, api.requests[asked:]


def test_etcd_reset_behind_a_graceful_restart(watching: Loader, api: ApiServer, out: Path) -> None:
    """The stream ends properly, but only after a silence while nothing new connects."""
    for number in range(30):
        put(api, f"n{number}")
    wait_text(out, "n29")
    old = {"kind": "ConfigMap", "metadata": {"name": "envoy-xds", "namespace": "demo"}}
    api.stop(graceful=True, grace=0.5)
    api.reset_etcd([{**old, "data": {"rds.yaml": "restored"}}], drop=False)
    time.sleep(1.2)  # the old process ends its watches before the new one listens
    api.start()
    wait_text(out, "restored", 10)


def test_no_probe_where_nothing_failed(watching: Loader, api: ApiServer, out: Path) -> None:
    """Ends of watches that are the server's habit cost one request each."""
    for count in range(2, 5):
        put(api, f"n{count}")
        wait_text(out, f"n{count}")
        api.close_watches()
        api.requests.wait_for(is_watch, count=count)
        api.wait_watches(1)
    assert len(api.requests) == 5


def test_the_server_is_away_for_a_while(watching: Loader, api: ApiServer, out: Path) -> None:
    """It costs nothing but freshness."""
    api.stop()
    watching.wait_log(str(api.port))
    wait_text(out, "1")
    api.start()
    put(api, "2")
    wait_text(out, "2", 10)


def test_a_restarted_server_refuses_once(watching: Loader, api: ApiServer, out: Path) -> None:
    api.fail_next("GET", k8s.failure(403, "Forbidden", "not yet"))
    api.close_watches(clean=False)
    put(api, "2")
    wait_text(out, "2", 5)


# -- tokens, certificates, redirects


def test_rotated_tokens_are_read_again(
    watching: Loader, api: ApiServer, out: Path, token_file: Path
) -> None:
    token_file.write_text("token-2")
    api.tokens = {"token-2"}
    api.close_watches()
    put(api, "2")
    wait_text(out, "2")
    assert api.requests[-1].token == "token-2"
    assert not api.requests.matching(lambda request: request.status == 401)


def test_a_refused_token_is_read_again(
    watching: Loader, api: ApiServer, out: Path, token_file: Path
) -> None:
    """The kubelet may be a moment behind."""
    api.tokens = {"token-2"}
    api.close_watches()
    api.requests.wait_for(lambda request: request.status == 401)
    token_file.write_text("token-2")
    put(api, "2")
    wait_text(out, "2", 5)


def test_no_token_where_none_is_needed(api: ApiServer, out: Path) -> None:
    """`kubectl proxy`: the service account's file is not there, and nobody asks for it."""
    from tests.support.loader import run

    api.tokens = None
    args = ["--onetime", "--configmap", "envoy-xds", "--namespace", "demo"]
    done = run([*args, "--apiserver", api.url, "--output-dir", str(out)])
    assert done.returncode == 0, done.stderr
    assert api.requests[0].token is None
    wait_text(out, "1")


def test_a_token_file_that_is_missing_is_named(
    run_loader: RunLoader, tmp_path: Path, api: ApiServer
) -> None:
    missing = tmp_path / "missing"
    done = run_loader("--onetime", "--configmap", "envoy-xds", "--token-file", str(missing))
    assert done.returncode in (1, 2)
    assert "--token-file" in done.stderr or str(missing) in done.stderr


def test_the_certificate_is_verified(
    run_loader: RunLoader, api_tls: ApiServer, authority: Authority, tmp_path: Path, out: Path
) -> None:
    put(api_tls, "tls")
    other = Authority(tmp_path / "other")
    args = ("--onetime", "--configmap", "envoy-xds", "--apiserver", api_tls.url)
    done = run_loader(*args, "--ca-file", str(other.ca_file), server=None)
    assert done.returncode == 1
    assert "certificate" in done.stderr.lower()
    assert not api_tls.requests
    done = run_loader(*args, "--ca-file", str(authority.ca_file), server=None)
    assert done.returncode == 0, done.stderr
    wait_text(out, "tls")


def test_the_name_in_the_certificate_is_verified(
    run_loader: RunLoader, authority: Authority
) -> None:
    with ApiServer(tls=authority.server_context("kubernetes.example")) as api:
        done = run_loader("--onetime", "--configmap", "envoy-xds", server=api)
        assert done.returncode == 1
        assert not api.requests


def test_an_encrypted_key_is_an_error_and_no_question(
    run_loader: RunLoader, authority: Authority, api_tls: ApiServer, tmp_path: Path
) -> None:
    pair = Authority(tmp_path / "clients").pair("loader")
    key = load_pem_private_key(pair.key.read_bytes(), None)
    hidden = BestAvailableEncryption(b"secret")
    locked = tmp_path / "locked.key"
    locked.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden))
    given = ("--client-cert", str(pair.cert), "--client-key", str(locked))
    done = run_loader("--onetime", "--configmap", "envoy-xds", *given, server=api_tls)
    assert done.returncode == 1
    assert f"{locked}: not a usable certificate" in done.stderr


def test_insecure_warns(run_loader: RunLoader, api_tls: ApiServer, out: Path) -> None:
    put(api_tls, "tls")
    args = ("--onetime", "--configmap", "envoy-xds", "--apiserver", api_tls.url, "-insecure")
    done = run_loader(*args, server=None)
    assert done.returncode == 0, done.stderr
    assert "insecure" in done.stderr
    wait_text(out, "tls")


def test_client_certificates(
    run_loader: RunLoader, authority: Authority, tmp_path: Path, out: Path
) -> None:
    clients = Authority(tmp_path / "clients")
    pair = clients.pair("loader")
    with ApiServer(tls=authority.server_context(client_ca=clients)) as api:
        put(api, "mutual")
        args = ("--onetime", "--configmap", "envoy-xds")
        assert run_loader(*args, server=api).returncode == 1
        given = ("--client-cert", str(pair.cert), "--client-key", str(pair.key))
        done = run_loader(*args, *given, server=api)
        assert done.returncode == 0, done.stderr
        wait_text(out, "mutual")


def test_the_ca_rotates(
    start_loader: StartLoader, authority: Authority, api_tls: ApiServer, tmp_path: Path, out: Path
) -> None:
    put(api_tls, "1")
    ca_file = tmp_path / "ca.crt"
    ca_file.write_bytes(authority.ca_file.read_bytes())
    where = ("--apiserver", api_tls.url, "--ca-file", str(ca_file))
    start_loader(*WATCH, *where, server=None)
    wait_text(out, "1")
    api_tls.stop()
    renewed = Authority(tmp_path / "renewed")
    ca_file.write_bytes(renewed.ca_file.read_bytes())
    api_tls.tls = renewed.server_context()
    api_tls.start()
    put(api_tls, "2")
    wait_text(out, "2", 10)


@pytest.mark.parametrize("how", [301, 308])
def test_a_bearer_token_follows_nobody(run_loader: RunLoader, api: ApiServer, how: int) -> None:
    with ApiServer() as elsewhere:
        put(elsewhere, "stolen")
        api.fail_next("GET", k8s.redirect(elsewhere.url + MAPS, how), times=20)
        done = run_loader("--onetime", "--configmap", "envoy-xds")
        assert done.returncode == 1
        assert "redirect" in done.stderr.lower()
        assert elsewhere.connections_total == 0


def test_a_proxy_of_the_environment_gets_no_token(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    """HTTP_PROXY is for other people's traffic: the API server is asked directly."""
    with ApiServer() as proxy:
        env = {"http_proxy": proxy.url, "HTTP_PROXY": proxy.url, "all_proxy": proxy.url}
        done = run_loader("--onetime", "--configmap", "envoy-xds", env=env)
        assert done.returncode == 0, done.stderr
        assert proxy.connections_total == 0


# -- how often it asks


def test_retry_after_is_honoured(start_loader: StartLoader, api: ApiServer, out: Path) -> None:
    api.fail_next("GET", k8s.failure(429, "TooManyRequests", "", {"Retry-After": "2"}))
    start_loader(*WATCH)
    first = api.requests.wait_for(is_list)
    second = api.requests.wait_for(is_list, count=2)
    waited = second.time - first.time
    assert waited >= 1.9
    in_time(waited, 4)
    wait_text(out, "1")


@pytest.mark.parametrize("code", [403, 500])
def test_an_api_server_that_fails_is_not_hammered(
    start_loader: StartLoader, api: ApiServer, code: int
) -> None:
    """Backoff from 0.5 s, doubled, less jitter of a half at the most."""
    api.fail_next("GET", k8s.failure(code, "Scripted"), times=1000)
    start_loader(*WATCH)
    first, second, third = (api.requests.wait_for(is_list, count=n).time for n in (1, 2, 3))
    assert second - first > 0.2
    assert third - second > 0.4
    assert len(api.requests) == 3


def test_watches_that_end_at_once_are_backed_off_from(watching: Loader, api: ApiServer) -> None:
    """A server (or a proxy) that closes each watch right away must not be asked in a loop."""
    api.fail_next("watch=", k8s.Stream([], "clean"), times=100_000)
    before = len(api.requests)
    api.close_watches()
    time.sleep(3)
    assert len(api.requests) - before <= 20


def test_watches_that_end_after_an_event_are_backed_off_from(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    """However many events they bring; and each event counts as soon as it comes."""
    lines = [
        b'{"type":"MODIFIED","object":{"metadata":{"name":"envoy-xds","namespace":"demo",'
        b'"resourceVersion":"%d"},"data":{"rds.yaml":"%d"}}}\n' % (number, number)
        for number in range(2, 40)
    ]
    for line in lines:
        api.fail_next("watch=", k8s.Stream([line], "clean"))
    start_loader(*WATCH)
    first = api.requests.wait_for(is_watch)
    api.requests.wait_for(is_watch, count=2)
    assert int((out / "current/rds.yaml").read_text()) >= 2, "it is there before the pause is over"
    last = api.requests.wait_for(is_watch, count=5)
    assert last.time - first.time > 1.4
    in_time(last.time - first.time, 4.5, "five watches, half a second to a second apart,")


@pytest.mark.parametrize("server", ["api", "api_tls"])
def test_sighup_asks_the_api_server(
    start_loader: StartLoader, request: pytest.FixtureRequest, out: Path, server: str
) -> None:
    """In watch mode too: whatever the open watch has missed. It is no failure."""
    api: ApiServer = request.getfixturevalue(server)
    put(api, "1")
    api.fail_next("watch=", k8s.Stream([], "silent"))
    watching = start_loader(*WATCH, server=api)
    wait_text(out, "1")
    api.requests.wait_for(is_watch)
    put(api, "2")
    watching.process.send_signal(signal.SIGHUP)
    wait_text(out, "2")
    api.wait_watches(1)
    put(api, "3")
    wait_text(out, "3")
    assert len(api.requests.matching(is_list)) == 2
    assert "WARN" not in watching.log


def test_sighup_ends_a_pause(start_loader: StartLoader, api: ApiServer, out: Path) -> None:
    refusal = k8s.failure(429, "TooManyRequests", "", {"Retry-After": "60"})
    api.fail_next("GET", refusal)
    loader = start_loader(*WATCH)
    loader.wait_log("429")
    loader.process.send_signal(signal.SIGHUP)
    wait_text(out, "1")


# -- several sources


def test_one_failing_source_does_not_stop_the_other(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    """Each in a namespace of its own."""
    api.configmap("other", "more", {"cds.yaml": "0"})
    start_loader(*WATCH, "--configmap", "other/more")
    wait_files(out, {"rds.yaml": "1", "cds.yaml": "0"})
    api.wait_watches(2)
    api.configmap("other", "more", {"cds.yaml": "1"})
    wait_files(out, {"rds.yaml": "1", "cds.yaml": "1"})
    paths = {request.path for request in api.requests}
    assert paths == {MAPS, "/api/v1/namespaces/other/configmaps"}
    api.rules = [Rule(["list", "watch"], ["configmaps"], "demo")]
    api.close_watches()
    put(api, "2")
    wait_files(out, {"rds.yaml": "2", "cds.yaml": "1"})


def test_a_selector_is_one_connection(start_loader: StartLoader, api: ApiServer, out: Path) -> None:
    wanted = {}
    for number in range(200):
        api.configmap("demo", f"m{number}", {f"k{number}": "1"}, labels={"app": "x"})
        wanted[f"k{number}"] = "1"
    start_loader("--watch", "--configmap-selector", "app=x")
    wait_files(out, wanted)
    api.wait_watches(1)
    api.configmap("demo", "m7", {"k7": "2"}, labels={"app": "x"})
    wait_files(out, {**wanted, "k7": "2"})
    assert api.watches == 1
    assert api.requests[-1].query["labelSelector"] == "app=x"


def test_set_based_selectors(run_loader: RunLoader, api: ApiServer, out: Path) -> None:
    api.configmap("demo", "a", {"a": "1"}, labels={"app": "a"})
    api.configmap("demo", "b", {"b": "1"}, labels={"app": "b"})
    api.configmap("demo", "c", {"c": "1"}, labels={"app": "c"})
    done = run_loader("--onetime", "--configmap-selector", "app in (a, b)")
    assert done.returncode == 0, done.stderr
    wait_files(out, {"a": "1", "b": "1"})


# -- what there need not be

SERVICES = ["--services", "*"]


def service(api: ApiServer) -> None:
    ports = [{"name": "http", "port": 80, "protocol": "TCP"}]
    metadata = {"namespace": "demo", "name": "web"}
    spec = {"ports": ports, "clusterIP": "10.0.0.1"}
    api.put({"kind": "Service", "metadata": metadata, "spec": spec})
    subsets = [{"addresses": [{"ip": "10.1.1.1"}], "ports": [{"name": "http", "port": 8080}]}]
    api.put({"kind": "Endpoints", "metadata": metadata, "subsets": subsets})


def test_endpointslices_that_are_not_there_are_asked_for_once(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    """A 404 at the start decides."""
    service(api)
    api.missing_groups.add("discovery.k8s.io")
    loader = start_loader("--watch", *SERVICES, "--endpoints", "inline")
    path = out / "current/cds.yaml"
    wait_until(lambda: path.exists() and "10.1.1.1" in path.read_text())
    asked = [request for request in api.requests if "endpointslices" in request.path]
    loader.process.send_signal(signal.SIGHUP)
    api.requests.wait_for(lambda request: request.is_list and "/services" in request.path, count=2)
    assert asked == [request for request in api.requests if "endpointslices" in request.path]
    assert len(asked) == 1


def test_endpointslices_that_are_not_granted_are_an_error(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    service(api)
    api.rules = [Rule(["list", "watch"], ["services", "endpoints"], "demo")]
    loader = start_loader("--watch", *SERVICES)
    loader.wait_log("403.*endpointslices")
    time.sleep(2)  # longer than a few denials took that once meant absence
    assert not (out / "..data").exists()
    api.rules = None
    wait_until((out / "..data").exists, 10)


def test_a_file_of_endpoints_without_slices(
    run_loader: RunLoader, tmp_path: Path, api: ApiServer, out: Path
) -> None:
    """The same as for an API server that has no slices."""
    service(api)
    path = tmp_path / "objects.json"
    path.write_text("".join(json.dumps(api.get(kind, "demo", "web"))
                            for kind in ("Service", "Endpoints")))  # fmt: skip
    args = ("--onetime", *SERVICES, "--endpoints", "inline", "--from-file", str(path))
    done = run_loader(*args, server=None)
    assert done.returncode == 0, done.stderr
    assert "10.1.1.1" in (out / "current/cds.yaml").read_text()
    slices = loader.Query(loader.ENDPOINTSLICES, "demo")
    with pytest.raises(loader.ApiError, match="no EndpointSlice") as failed:
        loader.FileSource(str(path), "demo").list(slices, print)
    assert failed.value.status == 404


def test_a_file_says_where_else_an_object_is(tmp_path: Path) -> None:
    path = tmp_path / "objects.json"
    source = loader.FileSource(str(path), "demo")
    named = loader.Query(loader.CONFIGMAPS, "demo", "envoy-xds")

    def holding(*names: str) -> str:
        keys = [name.split("/") for name in names]
        path.write_text(json.dumps({"kind": "ConfigMapList", "items": [
            {"metadata": {"namespace": namespace, "name": name}} for namespace, name in keys
        ]}))  # fmt: skip
        return source.elsewhere(named)

    web = f"`{path}` holds configmap web/envoy-xds"
    assert holding("web/envoy-xds", "web/other") == f"{web}; give --namespace web"
    assert holding("web/envoy-xds", "a/envoy-xds") == f"`{path}` holds configmap a/envoy-xds, " \
        "web/envoy-xds"  # fmt: skip
    assert holding("demo/routes") == f"`{path}` holds configmap demo/routes"
    assert holding() == ""
    path.write_text("no JSON")
    assert source.elsewhere(named) == ""


# -- the end


def quiet(api: ApiServer) -> None:
    """Nothing is wrong: the watch waits for events."""


def frozen(api: ApiServer) -> None:
    """The peer has vanished without a word."""
    api.freeze()


def stalled(api: ApiServer) -> None:
    api.fail_next("GET", k8s.Stall(), times=10)
    api.close_watches()


def half_a_body(api: ApiServer) -> None:
    api.fail_next("GET", k8s.failure(410, "Expired"))
    api.fail_next(LIST, k8s.StallBody(10), times=10)
    api.close_watches()


def away(api: ApiServer) -> None:
    api.stop()


def told_to_wait(api: ApiServer) -> None:
    api.fail_next("GET", k8s.failure(429, "TooManyRequests", "", {"Retry-After": "60"}), times=10)
    api.close_watches()


TROUBLES = [quiet, frozen, stalled, half_a_body, away, told_to_wait]


@pytest.mark.parametrize(
    "number, trouble", [(signal.SIGINT, quiet), *((signal.SIGTERM, each) for each in TROUBLES)]
)
def test_it_ends_within_a_second(
    watching: Loader, api: ApiServer, trouble: Callable[[ApiServer], None], number: int
) -> None:
    requests = len(api.requests)
    trouble(api)
    if trouble in (stalled, half_a_body, told_to_wait):
        api.requests.wait_for(lambda request: True, since=requests)
    if trouble is away:
        watching.wait_log(str(api.port))
    watching.stop(number)
    assert "Traceback" not in watching.log


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("mode", ["--watch", "--onetime"])
def test_it_ends_while_nobody_accepts(start_loader: StartLoader, scheme: str, mode: str) -> None:
    """The kernel takes the connection, no process ever answers (nor shakes hands)."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(8)
        url = f"{scheme}://127.0.0.1:{deaf.getsockname()[1]}"
        loader = start_loader(
            mode, "--configmap", "x", "--apiserver", url, "--timeout", "60s", "--insecure",
            server=None,
        )  # fmt: skip
        connection, _ = deaf.accept()
        with connection, within(1):
            loader.process.send_signal(signal.SIGTERM)
            code = loader.wait(5)
        assert "Traceback" not in loader.log
        if mode == "--watch":
            assert code == 0


def test_it_ends_while_many_readers_block(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    names = [f"m{number}" for number in range(20)]
    for name in names:
        api.configmap("demo", name, {name: "1"})
    args = [word for name in names for word in ("--configmap", name)]
    loader = start_loader("--watch", *args)
    wait_files(out, dict.fromkeys(names, "1"))
    api.wait_watches(20)
    loader.stop()
    assert not re.search("Traceback|Exception", loader.log)


def test_a_second_signal_is_no_failure(watching: Loader) -> None:
    watching.process.send_signal(signal.SIGTERM)
    watching.process.send_signal(signal.SIGTERM)
    assert watching.wait(2) in (0, -signal.SIGTERM)

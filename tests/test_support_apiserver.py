"""The scripted API server behaves like the real one: each thing that was measured there."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import apiserver as k8s
from tests.support.apiserver import ApiServer, Client
from tests.support.tls import Authority

MAPS = "/api/v1/namespaces/demo/configmaps"


@pytest.fixture
def open_api() -> Iterator[ApiServer]:
    with ApiServer() as server:
        server.future_delay = 0.01
        yield server


@pytest.fixture
def client(open_api: ApiServer) -> Iterator[Client]:
    client = Client(open_api.url)
    yield client
    client.close()


class Watch:
    """A watch read line by line, as the loader's would be."""

    def __init__(self, api: ApiServer, query: str, path: str = MAPS, timeout: float = 5.0) -> None:
        self.http = http.client.HTTPConnection("127.0.0.1", api.port, timeout=timeout)
        self.http.request("GET", f"{path}?watch=1&{query}")
        self.response = self.http.getresponse()

    def event(self) -> dict[str, Any] | None:
        line = self.response.readline()
        return json.loads(line) if line else None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()


def names(body: dict[str, Any]) -> list[str]:
    return [item["metadata"]["name"] for item in body["items"]]


# -- lists


def test_list_items_carry_no_kind_and_watch_objects_do(open_api: ApiServer, client: Client) -> None:
    open_api.configmap("demo", "a", {"k": "v"})
    _, body = client.request("GET", MAPS)
    assert "kind" not in body["items"][0]
    assert body["items"][0]["data"] == {"k": "v"}
    with Watch(open_api, "") as watch:
        event = watch.event()
        assert event is not None
        assert event["type"] == "ADDED"
        assert event["object"]["kind"] == "ConfigMap"
        assert event["object"]["apiVersion"] == "v1"


def test_a_namespace_that_does_not_exist_is_an_empty_list(client: Client) -> None:
    code, body = client.request("GET", "/api/v1/namespaces/nowhere/configmaps")
    assert (code, body["items"]) == (200, [])


@pytest.mark.parametrize("path", ["/apis/nope.example/v1/things", "/api/v1/nothings"])
def test_an_unknown_group_is_404_in_plain_text(client: Client, path: str) -> None:
    assert client.request("GET", path) == (404, "404 page not found\n")


def test_a_group_can_be_missing(open_api: ApiServer, client: Client) -> None:
    path = "/apis/discovery.k8s.io/v1/namespaces/demo/endpointslices"
    assert client.request("GET", path)[0] == 200
    open_api.missing_groups.add("discovery.k8s.io")
    assert client.request("GET", path)[0] == 404


def test_pages_are_of_one_version_and_expire(open_api: ApiServer, client: Client) -> None:
    for name in "abcde":
        open_api.configmap("demo", name, {})
    _, first = client.request("GET", f"{MAPS}?limit=2")
    assert names(first) == ["a", "b"]
    assert first["metadata"]["remainingItemCount"] == 3
    open_api.configmap("demo", "bb", {})
    token = first["metadata"]["continue"]
    _, second = client.request("GET", f"{MAPS}?limit=2&continue={token}")
    assert names(second) == ["c", "d"]
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    open_api.compact()
    code, gone = client.request("GET", f"{MAPS}?limit=2&continue={token}")
    assert (code, gone["reason"], gone["code"]) == (410, "Expired", 410)
    fresh = gone["metadata"]["continue"]
    _, rest = client.request("GET", f"{MAPS}?limit=9&continue={fresh}")
    assert names(rest) == ["bb", "c", "d", "e"]


def test_pages_of_two_resources_with_equal_names_are_kept_apart(
    open_api: ApiServer, client: Client
) -> None:
    paths = (MAPS, MAPS.replace("configmaps", "secrets"))
    for name in "abc":
        open_api.configmap("demo", name, {})
        open_api.secret("demo", name, {})
    firsts = [client.request("GET", f"{path}?limit=1")[1] for path in paths]
    tokens = [first["metadata"]["continue"] for first in firsts]
    rests = [
        client.request("GET", f"{path}?limit=9&continue={token}")[1]
        for path, token in zip(paths, tokens, strict=True)
    ]
    assert [rest["kind"] for rest in rests] == ["ConfigMapList", "SecretList"]
    assert ["type" in rest["items"][0] for rest in rests] == [False, True]


def test_large_lists_are_gzipped_when_asked_for(open_api: ApiServer) -> None:
    open_api.configmap("demo", "big", {"k": "x" * 200_000})
    connection = http.client.HTTPConnection("127.0.0.1", open_api.port)
    for accept, encoding in (("gzip", "gzip"), ("identity", None)):
        connection.request("GET", MAPS, headers={"Accept-Encoding": accept})
        response = connection.getresponse()
        content = response.read()
        assert response.headers.get("Content-Encoding") == encoding
        text = gzip.decompress(content) if encoding else content
        assert len(json.loads(text)["items"][0]["data"]["k"]) == 200_000
    connection.close()


def test_a_version_from_the_future_is_504(open_api: ApiServer, client: Client) -> None:
    query = "resourceVersion=999999999&resourceVersionMatch=NotOlderThan&limit=1"
    start = time.monotonic()
    code, body = client.request("GET", f"{MAPS}?{query}")
    assert code == 504
    assert "Too large resource version: 999999999, current: 1" in body["message"]
    assert body["details"]["retryAfterSeconds"] == 1
    assert time.monotonic() - start >= open_api.future_delay
    current = f"resourceVersion={open_api.version}&resourceVersionMatch=NotOlderThan"
    assert client.request("GET", f"{MAPS}?{current}")[0] == 200
    assert client.request("GET", f"{MAPS}?resourceVersion=0")[0] == 200


def test_selectors(open_api: ApiServer, client: Client) -> None:
    open_api.configmap("demo", "a", {}, labels={"app": "x", "tier": "front"})
    open_api.configmap("demo", "b", {}, labels={"app": "y"})
    open_api.configmap("demo", "c", {})
    open_api.configmap("other", "d", {}, labels={"app": "x"})
    wanted = {
        "app=x": ["a"],
        "app==y": ["b"],
        "app!=x": ["b", "c"],
        "app": ["a", "b"],
        "!app": ["c"],
        "app in (x, y)": ["a", "b"],
        "app notin (x)": ["b", "c"],
        "app in (x,y),tier=front": ["a"],
    }
    for selector, found in wanted.items():
        quoted = selector.replace(" ", "%20").replace("!", "%21")
        assert names(client.request("GET", f"{MAPS}?labelSelector={quoted}")[1]) == found, selector
    assert names(client.request("GET", f"{MAPS}?fieldSelector=metadata.name%3Db")[1]) == ["b"]
    everywhere = client.request("GET", "/api/v1/configmaps?labelSelector=app%3Dx")[1]
    assert names(everywhere) == ["a", "d"]
    assert client.request("GET", f"{MAPS}?labelSelector=app%3D%3D%3D")[0] == 400
    assert client.request("GET", f"{MAPS}?fieldSelector=data.x%3Db")[0] == 400


# -- watches


def test_a_watch_resumes_and_labels_decide(open_api: ApiServer) -> None:
    open_api.configmap("demo", "a", {"n": "1"}, labels={"app": "x"})
    start = open_api.version
    with Watch(open_api, f"resourceVersion={start}&labelSelector=app%3Dx") as watch:
        open_api.configmap("demo", "a", {"n": "1"})
        open_api.configmap("demo", "a", {"n": "2"}, labels={"app": "x"})
        open_api.configmap("demo", "a", {"n": "3"}, labels={"app": "x"})
        open_api.configmap("demo", "other", {})
        open_api.delete("ConfigMap", "demo", "a")
        events = [watch.event() for _ in range(4)]
        assert [e["type"] for e in events if e] == ["DELETED", "ADDED", "MODIFIED", "DELETED"]
    with Watch(open_api, f"resourceVersion={start}") as again:
        event = again.event()
        assert event is not None
        assert event["type"] == "MODIFIED"


def test_expired_is_an_event_with_status_200(open_api: ApiServer) -> None:
    open_api.configmap("demo", "a", {"n": "1"})
    open_api.configmap("demo", "a", {"n": "2"})
    open_api.compact()
    with Watch(open_api, "resourceVersion=2") as watch:
        assert watch.response.status == 200
        event = watch.event()
        assert event is not None
        assert event["type"] == "ERROR"
        assert event["object"]["reason"] == "Expired"
        assert event["object"]["code"] == 410
        assert watch.event() is None


def test_a_watch_from_the_future_is_silent(open_api: ApiServer) -> None:
    open_api.bookmark_interval = 0.02
    query = "resourceVersion=999&allowWatchBookmarks=true"
    with Watch(open_api, query, timeout=0.3) as watch:
        open_api.configmap("demo", "a", {})
        with pytest.raises(TimeoutError):
            watch.event()


def test_bookmarks_are_a_version_and_zero_values(open_api: ApiServer) -> None:
    open_api.bookmark_interval = 0.05
    path = "/apis/discovery.k8s.io/v1/namespaces/demo/endpointslices"
    with Watch(open_api, "resourceVersion=1&allowWatchBookmarks=true", path) as watch:
        event = watch.event()
        assert event is not None
        assert event["type"] == "BOOKMARK"
        assert event["object"]["endpoints"] is None
        assert event["object"]["metadata"]["resourceVersion"] == open_api.version
    with Watch(open_api, "resourceVersion=1", timeout=0.3) as watch, pytest.raises(TimeoutError):
        watch.event()


@pytest.mark.parametrize("shortest, bookmarked", [(0.0, True), (10.0, False)])
def test_the_end_of_a_watch(open_api: ApiServer, shortest: float, bookmarked: bool) -> None:
    """A bookmark is the last thing before the server's time is up; short watches get none."""
    open_api.shortest_bookmarked = shortest
    with Watch(open_api, "resourceVersion=1&allowWatchBookmarks=true&timeoutSeconds=0.2") as watch:
        if bookmarked:
            event = watch.event()
            assert event is not None
            assert event["type"] == "BOOKMARK"
        assert watch.event() is None
    open_api.wait_watches(0)


def test_one_event_in_many_chunks(open_api: ApiServer) -> None:
    open_api.chunk_size = 1000
    with Watch(open_api, "resourceVersion=1") as watch:
        open_api.configmap("demo", "a", {"k": "x" * 1_500_000})
        event = watch.event()
        assert event is not None
        assert len(event["object"]["data"]["k"]) == 1_500_000


def test_fifty_watches_miss_nothing(open_api: ApiServer) -> None:
    with contextlib.ExitStack() as stack:
        watches = [stack.enter_context(Watch(open_api, "resourceVersion=1")) for _ in range(50)]
        open_api.wait_watches(50)
        for number in range(20):
            open_api.configmap("demo", "a", {"n": str(number)})
        for watch in watches:
            seen = [watch.event() for _ in range(20)]
            assert [e["object"]["data"]["n"] for e in seen if e] == [str(n) for n in range(20)]
    open_api.wait_watches(0)


# -- who may do what


def test_a_wrong_token_is_401_and_none_is_403(api: ApiServer) -> None:
    code, body = Client(api.url, "wrong").request("GET", MAPS)
    assert (code, body["message"], body["reason"]) == (401, "Unauthorized", "Unauthorized")
    code, body = Client(api.url).request("GET", MAPS)
    assert code == 403
    assert "system:anonymous" in body["message"]
    assert Client(api.url, "token-1").request("GET", MAPS)[0] == 200
    assert api.requests[-1].token == "token-1"


def test_resource_names_need_a_field_selector(open_api: ApiServer, client: Client) -> None:
    open_api.configmap("demo", "envoy-xds", {})
    open_api.rules = [k8s.Rule(["get", "list", "watch"], ["configmaps"], "demo", ["envoy-xds"])]
    assert client.request("GET", f"{MAPS}?fieldSelector=metadata.name%3Denvoy-xds")[0] == 200
    assert client.request("GET", f"{MAPS}/envoy-xds")[0] == 200
    with Watch(open_api, "fieldSelector=metadata.name%3Denvoy-xds") as watch:
        assert watch.response.status == 200
    code, body = client.request("GET", MAPS)
    assert (code, body["message"]) == (
        403,
        'configmaps is forbidden: User "system:serviceaccount:demo:loader" cannot list resource '
        '"configmaps" in API group "" in the namespace "demo"',
    )


# -- writes over HTTP


def test_objects_change_over_http(open_api: ApiServer, client: Client) -> None:
    made = client.configmap("demo", "a", {"x": "1", "y": "2"})
    assert made["data"] == {"x": "1", "y": "2"}
    with Watch(open_api, f"resourceVersion={open_api.version}") as watch:
        changed = client.configmap("demo", "a", {"y": None, "z": "3"})
        event = watch.event()
        assert event is not None
        assert event["object"]["data"] == changed["data"] == {"x": "1", "z": "3"}
    assert client.request("POST", MAPS, {"metadata": {"name": "a"}})[0] == 409
    assert client.request("DELETE", f"{MAPS}/a")[0] == 200
    code, body = client.request("GET", f"{MAPS}/a")
    assert (code, body["message"]) == (404, 'configmaps "a" not found')


def test_a_change_of_nothing_is_no_event(open_api: ApiServer) -> None:
    open_api.configmap("demo", "a", {"k": "v"})
    version = open_api.version
    open_api.configmap("demo", "a", {"k": "v"})
    assert open_api.version == version


# -- failures


def test_faults_meet_one_request_each(open_api: ApiServer) -> None:
    open_api.configmap("demo", "a", {"k": "v"})

    def body() -> Any:
        client = Client(open_api.url)
        try:
            return client.request("GET", MAPS)
        finally:
            client.close()

    open_api.fail_next(f"GET {MAPS}", k8s.failure(429, "TooManyRequests", "", {"Retry-After": "1"}))
    assert body()[0] == 429
    open_api.fail_next("configmaps", k8s.Response(200, b"<html>"))
    assert body() == (200, "<html>")
    open_api.fail_next("configmaps", k8s.Gzip())
    assert names(body()[1]) == ["a"]
    open_api.fail_next("configmaps", k8s.Slow(40, 0.001))
    assert names(body()[1]) == ["a"]
    for fault, error in (
        (k8s.Drop(), http.client.RemoteDisconnected),
        (k8s.Drop(reset=True), ConnectionResetError),
        (k8s.Cut(20), http.client.IncompleteRead),
        (k8s.WrongLength(5), http.client.IncompleteRead),
        (k8s.Raw(b"SSH-2.0-x\r\n"), http.client.BadStatusLine),
    ):
        open_api.fail_next("configmaps", fault)
        with pytest.raises(error):
            body()
    assert open_api.faults_left == 0
    assert body()[0] == 200


def test_a_cut_between_chunks_is_a_normal_end_and_within_one_is_not(open_api: ApiServer) -> None:
    line = b'{"type":"ODD","object":{}}\n'
    open_api.fail_next("watch=1", k8s.Stream([line[:5], line[5:]], "cut"))
    with Watch(open_api, "") as watch:
        event = watch.event()
        assert event is not None
        assert event["type"] == "ODD"
        with contextlib.suppress(http.client.IncompleteRead):
            assert watch.event() is None
    with Watch(open_api, "resourceVersion=1") as watch:
        open_api.wait_watches(1)
        open_api.close_watches(midchunk=True)
        with pytest.raises(http.client.IncompleteRead):
            watch.response.read()


def test_a_killed_server_comes_back_on_its_port(open_api: ApiServer) -> None:
    with Watch(open_api, "resourceVersion=1") as watch:
        open_api.wait_watches(1)
        open_api.stop()
        with contextlib.suppress(http.client.IncompleteRead, ConnectionResetError):
            assert watch.event() is None
    with pytest.raises(ConnectionRefusedError):
        Client(open_api.url)
    open_api.start()
    assert Client(open_api.url).request("GET", MAPS)[0] == 200


def test_a_graceful_stop_leaves_watches_silent_and_then_ends_them(open_api: ApiServer) -> None:
    with Watch(open_api, "resourceVersion=1") as watch:
        open_api.wait_watches(1)
        open_api.stop(graceful=True, grace=0.2)
        with pytest.raises(ConnectionRefusedError):
            Client(open_api.url)
        open_api.configmap("demo", "a", {})
        start = time.monotonic()
        assert watch.event() is None
        assert time.monotonic() - start > 0.1


def test_frozen_it_answers_nothing_until_it_thaws(open_api: ApiServer) -> None:
    answers: list[int] = []
    open_api.freeze()

    def ask() -> None:
        answers.append(Client(open_api.url).request("GET", MAPS)[0])

    thread = threading.Thread(target=ask)
    thread.start()
    open_api.requests.wait_for(lambda request: request.path == MAPS)
    assert not answers
    open_api.thaw()
    thread.join(5)
    assert answers == [200]


def test_etcd_is_reset(open_api: ApiServer, client: Client) -> None:
    for number in range(9):
        open_api.configmap("demo", "a", {"n": str(number)})
    old = open_api.version
    with Watch(open_api, f"resourceVersion={old}") as watch:
        open_api.wait_watches(1)
        open_api.reset_etcd()
        with contextlib.suppress(http.client.IncompleteRead, ConnectionResetError):
            assert watch.event() is None
    assert int(open_api.version) < int(old)
    assert client.request("GET", f"{MAPS}/a")[1]["data"] == {"n": "8"}


def test_tls_and_client_certificates(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    with ApiServer(tls=ours.server_context(client_ca=theirs)) as api:
        context = ssl.create_default_context(cafile=str(ours.ca_file))
        pair = theirs.pair("loader")
        context.load_cert_chain(pair.cert, pair.key)
        connection = http.client.HTTPSConnection("127.0.0.1", api.port, context=context)
        connection.request("GET", MAPS)
        assert connection.getresponse().status == 200
        connection.close()
        with pytest.raises(ssl.SSLCertVerificationError):
            Client(api.url, ca_file=theirs.ca_file)

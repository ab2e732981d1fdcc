"""A Kubernetes API server for tests: scripted, on a real socket, with a transcript.

It answers what a kube-apiserver 1.36 was seen to answer: lists with pages, watches with bookmarks
and resumption, expiry as a status and in the stream, the silent watch from a future
resourceVersion, RBAC by resourceNames. On top of this come faults, one request at a time:

    with ApiServer() as api:
        api.configmap("demo", "envoy-xds", {"rds.yaml": "..."})
        api.fail_next("GET /api/v1/.*watch=1", Stream([b'{"type":"ODD","object":{}}\\n']))
        api.requests.wait_for(is_watch, timeout=5)
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import itertools
import json
import queue
import re
import select
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, overload

from tests.support.busy import WAIT, Deadline
from tests.support.closing import Closing
from tests.support.ports import hold

Object = dict[str, Any]

# ---------------------------------------------------------------------------------------------
# What the API has


class Resource(NamedTuple):
    """One kind of object: where it lives in the API."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


RESOURCES = (
    Resource("", "v1", "configmaps", "ConfigMap"),
    Resource("", "v1", "secrets", "Secret"),
    Resource("", "v1", "services", "Service"),
    Resource("", "v1", "endpoints", "Endpoints"),
    Resource("", "v1", "pods", "Pod"),
    Resource("", "v1", "nodes", "Node", False),
    Resource("", "v1", "namespaces", "Namespace", False),
    Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice"),
)
ZEROS: Mapping[str, Object] = {  # the typed fields of a bookmark's object
    "Service": {"spec": {}, "status": {"loadBalancer": {}}},
    "Pod": {"spec": {"containers": None}, "status": {}},
    "Node": {"spec": {}, "status": {}},
    "Namespace": {"spec": {}, "status": {}},
    "EndpointSlice": {"addressType": "", "endpoints": None, "ports": None},
}
BY_KIND = {resource.kind: resource for resource in RESOURCES}
BY_PATH = {(r.group, r.version, r.plural): r for r in RESOURCES}


class Key(NamedTuple):
    namespace: str
    name: str


class Stored(NamedTuple):
    """An object as the store has it: `json` with kind and apiVersion first, `bare` without."""

    object: Object
    version: int
    json: bytes
    bare: bytes


def stored(resource: Resource, obj: Object, version: int) -> Stored:
    metadata = {**obj["metadata"], "resourceVersion": str(version)}
    full: Object = {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata}
    prefix = len(to_json({"kind": resource.kind, "apiVersion": resource.api_version}))
    full.update((k, v) for k, v in obj.items() if k not in ("kind", "apiVersion", "metadata"))
    text = to_json(full)
    return Stored(full, version, text, b"{" + text[prefix:])


class Change(NamedTuple):
    """One step of the history. A deletion has no `after`; `last` is the final state either way."""

    version: int
    key: Key
    before: Stored | None
    after: Stored | None
    last: Stored


def to_json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def status_object(code: int, reason: str, message: str, **more: Any) -> Object:
    """A `Status`, the body of every failure (and the object of an ERROR event)."""
    return {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code, **more,
    }  # fmt: skip


def error_event(code: int, reason: str, message: str) -> bytes:
    """A line of a watch that is an ERROR, not an object."""
    event = {"type": "ERROR", "object": status_object(code, reason, message)}
    return to_json(event) + b"\n"


EXPIRED_EVENT = error_event(410, "Expired", "too old resource version: 1 (2)")

# ---------------------------------------------------------------------------------------------
# Selectors

_SETS = re.compile(r"^\s*(\S+?)\s+(in|notin)\s+\(([^)]*)\)\s*$")
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_./-]*[A-Za-z0-9])?"
_EQUAL = re.compile(rf"^\s*({_LABEL})\s*(!=|==|=)\s*(({_LABEL})?)\s*$")
_EXISTS = re.compile(rf"^\s*(!?)\s*({_LABEL})\s*$")


class BadSelector(ValueError):
    pass


def label_selector(text: str) -> Callable[[Mapping[str, str]], bool]:
    """The predicate over labels that `labelSelector=text` means."""
    parts = [_requirement(part) for part in re.split(r",(?![^(]*\))", text) if part.strip()]
    return lambda labels: all(part(labels) for part in parts)


def _requirement(text: str) -> Callable[[Mapping[str, str]], bool]:
    if found := _SETS.match(text):
        key, operator, values = found.group(1), found.group(2), found.group(3)
        wanted = {value.strip() for value in values.split(",")}
        if operator == "in":
            return lambda labels: labels.get(key) in wanted
        return lambda labels: labels.get(key) not in wanted
    if found := _EQUAL.match(text):
        key, value = found.group(1), found.group(4)
        if found.group(3) == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if found := _EXISTS.match(text):
        key, negated = found.group(2), bool(found.group(1))
        return lambda labels: (key in labels) != negated
    raise BadSelector(f"unable to parse requirement: found '{text}'")


def field_selector(text: str) -> Mapping[str, str]:
    """`metadata.name=a,metadata.namespace=b` as a dictionary; other fields are refused."""
    fields = dict(part.split("=", 1) for part in text.replace("==", "=").split(",") if part)
    for name in fields:
        if name not in ("metadata.name", "metadata.namespace"):
            raise BadSelector(f"field label not supported: {name}")
    return fields


class Scope(NamedTuple):
    """What a list or watch asks for: a resource, one namespace or all (''), and selectors."""

    resource: Resource
    namespace: str
    labels: Callable[[Mapping[str, str]], bool]
    fields: Mapping[str, str]

    def has(self, item: Stored | None) -> bool:
        if item is None:
            return False
        metadata = item.object["metadata"]
        return (
            (not self.namespace or metadata.get("namespace") == self.namespace)
            and metadata["name"] == self.fields.get("metadata.name", metadata["name"])
            and metadata.get("namespace")
            == self.fields.get("metadata.namespace", metadata.get("namespace"))
            and self.labels(metadata.get("labels") or {})
        )

    def line(self, change: Change) -> bytes | None:
        """The event of a change as this watch sees it: leaving a selector is DELETED."""
        was, stays = self.has(change.before), self.has(change.after)
        if stays:
            kind = b"MODIFIED" if was else b"ADDED"
        elif was:
            kind = b"DELETED"
        else:
            return None
        return b'{"type":"%s","object":%s}\n' % (kind, change.last.json)


# ---------------------------------------------------------------------------------------------
# The transcript


@dataclass(eq=False)
class Request:
    """One request as it came in. `status` is 0 until an answer begins (or for ever)."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    connection: int
    body: bytes = b""
    status: int = 0
    time: float = field(default_factory=time.monotonic)

    @property
    def target(self) -> str:
        """`GET /api/v1/namespaces/demo/configmaps?watch=1`, unquoted: what a match looks at."""
        query = "&".join(f"{key}={value}" for key, value in self.query.items())
        return f"{self.method} {self.path}" + (f"?{query}" if query else "")

    @property
    def is_watch(self) -> bool:
        return self.method == "GET" and self.query.get("watch") in ("1", "true")

    @property
    def is_list(self) -> bool:
        return self.method == "GET" and not self.is_watch and self.path.startswith("/api")

    @property
    def token(self) -> str | None:
        kind, _, token = self.headers.get("authorization", "").partition(" ")
        return token if kind.lower() == "bearer" else None

    def __repr__(self) -> str:
        return f"<{self.status} {self.target} on connection {self.connection}>"


class Transcript(Sequence[Request]):
    """Every request so far, oldest first; awaitable, so that no test sleeps."""

    def __init__(self) -> None:
        self._entries: list[Request] = []
        self._changed = threading.Condition()

    @overload
    def __getitem__(self, index: int) -> Request: ...

    @overload
    def __getitem__(self, index: slice) -> list[Request]: ...

    def __getitem__(self, index: int | slice) -> Request | list[Request]:
        with self._changed:
            return self._entries[index]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        with self._changed:
            return iter(list(self._entries))

    def add(self, request: Request) -> None:
        with self._changed:
            self._entries.append(request)
            self._changed.notify_all()

    def answered(self, request: Request, status: int) -> None:
        with self._changed:
            request.status = status
            self._changed.notify_all()

    def matching(self, predicate: Callable[[Request], bool]) -> list[Request]:
        return [request for request in self if predicate(request)]

    def wait_for(
        self,
        predicate: Callable[[Request], bool],
        timeout: float = WAIT,
        *,
        count: int = 1,
        since: int = 0,
    ) -> Request:
        """The `count`-th request from index `since` on that the predicate holds for."""
        found: list[Request] = []

        def enough() -> bool:
            found[:] = [entry for entry in self._entries[since:] if predicate(entry)]
            return len(found) >= count

        deadline = Deadline(timeout)
        with self._changed:
            while not self._changed.wait_for(enough, deadline.left()):
                if deadline.over():
                    seen = "\n  ".join(map(repr, self._entries[since:][-30:])) or "nothing"
                    raise TimeoutError(
                        f"{len(found)} of {count} requests within {timeout} s; seen:\n  {seen}"
                    )
            return found[count - 1]


# ---------------------------------------------------------------------------------------------
# Faults


class Response(NamedTuple):
    """A whole answer instead of the true one."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}


class Drop(NamedTuple):
    """The connection goes before any answer: with FIN, or with RST."""

    reset: bool = False


class Cut(NamedTuple):
    """The true answer, but the connection goes after so many bytes of its body (or chunks)."""

    after: int


class Stall(NamedTuple):
    """Nothing for so many seconds (for ever by default), then the true answer."""

    seconds: float = 1e9


class StallBody(NamedTuple):
    """The true head and so many bytes of the body, then nothing for ever."""

    after: int = 0


class Slow(NamedTuple):
    """The true answer in pieces of `size` bytes with a pause after each."""

    size: int = 1
    pause: float = 0.001


class WrongLength(NamedTuple):
    """The true answer with a Content-Length that is off by so much, then end of connection."""

    by: int


class Gzip(NamedTuple):
    """The true answer, compressed whether asked for or not."""


class Raw(NamedTuple):
    """These bytes instead of HTTP, then end of connection."""

    bytes: bytes


class Stream(NamedTuple):
    """A watch that answers 200 and these chunks, one each, as they are.

    `then`: `clean` (the last chunk is there), `cut` (end of connection) or `silent` (for ever).
    """

    chunks: Sequence[bytes]
    then: str = "clean"


Fault = Response | Drop | Cut | Stall | StallBody | Slow | WrongLength | Gzip | Raw | Stream
Match = str | Callable[[Request], bool]


def failure(
    code: int, reason: str, message: str = "", headers: Mapping[str, str] | None = None
) -> Response:
    """An answer with a `Status` body, as the API server words its failures."""
    body = to_json(status_object(code, reason, message or reason))
    return Response(code, body, {"Content-Type": "application/json", **(headers or {})})


def redirect(location: str, status: int = 302) -> Response:
    return Response(status, b"", {"Location": location})


class _Script(NamedTuple):
    match: Match
    fault: Fault

    def matches(self, request: Request) -> bool:
        if isinstance(self.match, str):
            return re.search(self.match, request.target) is not None
        return self.match(request)


# ---------------------------------------------------------------------------------------------
# Who may do what


class Rule(NamedTuple):
    """Like a rule of a Role: `namespace` '' is every namespace, `names` are resourceNames."""

    verbs: Sequence[str]
    resources: Sequence[str]
    namespace: str = ""
    names: Sequence[str] = ()

    def allows(self, verb: str, resource: str, namespace: str, name: str) -> bool:
        return (
            verb in self.verbs
            and resource in self.resources
            and (not self.namespace or self.namespace == namespace)
            and (not self.names or name in self.names)
        )


# ---------------------------------------------------------------------------------------------
# Connections


class _Gone(Exception):
    """The connection is over, from either side."""


_CLEAN, _ABRUPT, _MIDCHUNK = object(), object(), object()  # how a watch ends
_ids = itertools.count(1)


class _Connection:
    """One client: reads requests, writes answers; a fault may limit or slow what is written."""

    def __init__(self, sock: socket.socket) -> None:
        self.id = next(_ids)
        self.raw = sock
        self.sock = sock
        self.buffer = b""
        self.budget: int | None = None  # bytes of the body that still go out
        self.stall_at_end = False
        self.pace: Slow | None = None

    def secure(self, context: ssl.SSLContext) -> None:
        self.sock.settimeout(10)
        self.sock = context.wrap_socket(self.sock, server_side=True)
        self.sock.settimeout(None)

    def read_request(self) -> Request | None:
        """The next request, or None where the client has gone."""
        head, found = self.buffer, -1
        while (found := head.find(b"\r\n\r\n")) < 0:
            more = self._recv()
            if not more:
                return None
            head += more
        lines = head[:found].decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split(" ", 2)
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        body = head[found + 4 :]
        length = int(headers.get("content-length", 0))
        while len(body) < length:
            more = self._recv()
            if not more:
                return None
            body += more
        self.buffer = body[length:]
        path, _, query = target.partition("?")
        pairs = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        path = urllib.parse.unquote(path)
        return Request(method, path, pairs, headers, self.id, body[:length])

    def _recv(self) -> bytes:
        try:
            return self.sock.recv(65536)
        except (OSError, ValueError):
            return b""

    def head(self, status: int, headers: Mapping[str, str]) -> bytes:
        phrase = http.client.responses.get(status, "Unknown")
        lines = [f"HTTP/1.1 {status} {phrase}", *(f"{k}: {v}" for k, v in headers.items())]
        return "\r\n".join(lines).encode() + b"\r\n\r\n"

    def send(self, head: bytes, body: bytes = b"") -> None:
        """One write, unless a fault says otherwise."""
        try:
            if self.budget is not None:
                allowed = body[: self.budget]
                self.budget -= len(allowed)
                self._paced(head + allowed)
                if len(allowed) < len(body) or self.budget == 0:
                    raise _Gone
            else:
                self._paced(head + body)
        except OSError:
            raise _Gone from None

    def _paced(self, content: bytes) -> None:
        if self.pace is None:
            self.sock.sendall(content)
            return
        for start in range(0, len(content), self.pace.size):
            self.sock.sendall(content[start : start + self.pace.size])
            time.sleep(self.pace.pause)

    def client_has_gone(self) -> bool:
        """Whether the client closed; to be asked only while it owes nothing."""
        poller = select.poll()
        try:
            poller.register(self.raw if self.sock is self.raw else self.sock, select.POLLIN)
            if not poller.poll(0):
                return False
            self.sock.settimeout(0)
            try:
                more = self.sock.recv(4096)
            finally:
                self.sock.settimeout(None)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except (OSError, ValueError):
            return True
        self.buffer += more
        return not more

    def hang_up(self, reset: bool = False) -> None:
        """End of connection without a TLS goodbye, as when the process is killed."""
        with contextlib.suppress(OSError):
            if reset:
                linger = (1).to_bytes(4, sys.byteorder) + (0).to_bytes(4, sys.byteorder)
                self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            else:
                self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()


class _Watch:
    """An open watch: changes are queued by whoever makes them and sent by its own thread."""

    def __init__(self, scope: Scope, request: Request, since: int) -> None:
        self.scope = scope
        self.request = request
        self.since = since
        self.bookmarks = request.query.get("allowWatchBookmarks") in ("1", "true")
        self.lines: queue.SimpleQueue[object] = queue.SimpleQueue()


# ---------------------------------------------------------------------------------------------
# The server


class ApiServer(Closing):
    """See the module; every attribute may be changed while it runs."""

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        tokens: Iterable[str] | None = None,
        rules: Iterable[Rule] | None = None,
    ) -> None:
        self.tls = tls
        self.tokens = None if tokens is None else set(tokens)
        self.rules = None if rules is None else list(rules)
        self._held = hold()  # nobody else gets the port while the server is away
        self.port: int = self._held.getsockname()[1]
        self.missing_groups: set[str] = set()
        self.bookmark_interval = 60.0
        self.shortest_bookmarked = 10.0  # a watch of fewer seconds ends without a bookmark
        self.future_delay = 0.1  # the real one takes 3 s to say "Too large resource version"
        self.chunk_size = 0  # an event in chunks of so many bytes, 0: in one
        self.requests = Transcript()
        self.connections_total = 0
        self._lock = threading.RLock()
        self._version = 1
        self._compacted = 0
        self._objects: dict[Resource, dict[Key, Stored]] = {r: {} for r in RESOURCES}
        self._history: dict[Resource, list[Change]] = {r: [] for r in RESOURCES}
        self._pages: dict[tuple[str, str], tuple[int, list[tuple[Key, Stored]]]] = {}
        self._uids = itertools.count(1)
        self._watches: list[_Watch] = []
        self._watches_changed = threading.Condition(self._lock)
        self._faults: list[_Script] = []
        self._gate = threading.Event()
        self._gate.set()
        self._connections: dict[int, _Connection] = {}
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self._closing = threading.Event()
        self.start()

    # -- running

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the port that it had before."""
        self._closing = threading.Event()
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(1024)
        self._listener = listener
        self._spawn(self._accept, listener, self._closing)

    def stop(self, *, graceful: bool = False, grace: float = 60.0) -> None:
        """Killed; or graceful: no new connection, open watches silent until `grace` is over."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        if graceful:
            self._end_gracefully(grace)
            return
        self._closing.set()
        self._gate.set()
        with self._lock:
            watches, self._watches = self._watches, []
            self._watches_changed.notify_all()
            connections = list(self._connections.values())
        for watch in watches:
            watch.lines.put(_ABRUPT)
        for connection in connections:
            connection.hang_up()

    def _end_gracefully(self, grace: float) -> None:
        with self._lock:
            watches, self._watches = self._watches, []
            busy = {watch.request.connection for watch in watches}
            self._watches_changed.notify_all()
            idle = [c for c in self._connections.values() if c.id not in busy]
        for connection in idle:
            connection.hang_up()

        closing = self._closing

        def end() -> None:
            closing.wait(grace)
            for watch in watches:
                watch.lines.put(_CLEAN)
            closing.set()  # these connections take no further request

        self._spawn(end)

    def close(self) -> None:
        """Stop for good and wait for every thread."""
        self.stop()
        self._held.close()
        for thread in self._threads:
            thread.join(5)

    def freeze(self) -> None:
        """Take connections and requests, answer nothing, send no event: a half-open server."""
        self._gate.clear()

    def thaw(self) -> None:
        self._gate.set()

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()]
        self._threads.append(thread)
        thread.start()

    # -- objects, as a test changes them

    @property
    def version(self) -> str:
        """The current resourceVersion."""
        return str(self._version)

    def put(self, obj: Object) -> Object:
        """Create or replace; nothing happens where nothing differs. The object as stored."""
        resource = BY_KIND[obj["kind"]]
        metadata = dict(obj["metadata"])
        if resource.namespaced:
            metadata.setdefault("namespace", "default")
        key = Key(metadata.get("namespace", ""), metadata["name"])
        with self._lock:
            before = self._objects[resource].get(key)
            old = before.object["metadata"] if before else {}
            metadata["uid"] = old.get("uid") or f"00000000-0000-4000-8000-{next(self._uids):012d}"
            created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            metadata["creationTimestamp"] = old.get("creationTimestamp") or created
            metadata.pop("resourceVersion", None)
            new = stored(resource, {**obj, "metadata": metadata}, self._version + 1)
            if before is not None and _same(before.object, new.object):
                return before.object
            self._version += 1
            self._objects[resource][key] = new
            self._record(resource, Change(self._version, key, before, new, new))
            return new.object

    def delete(self, kind: str, namespace: str, name: str) -> Object | None:
        """Delete, if it is there. The object as it last was."""
        resource = BY_KIND[kind]
        with self._lock:
            before = self._objects[resource].pop(Key(namespace, name), None)
            if before is None:
                return None
            self._version += 1
            last = stored(resource, before.object, self._version)
            self._record(resource, Change(self._version, Key(namespace, name), before, None, last))
            return last.object

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        found = self._objects[BY_KIND[kind]].get(Key(namespace, name))
        return found.object if found else None

    def configmap(
        self,
        namespace: str,
        name: str,
        data: Mapping[str, str] | None,
        binary: Mapping[str, bytes] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Object:
        obj: Object = {"kind": "ConfigMap", "metadata": _metadata(namespace, name, labels)}
        if data is not None:
            obj["data"] = dict(data)
        if binary:
            encoded = {key: base64.b64encode(value).decode() for key, value in binary.items()}
            obj["binaryData"] = encoded
        return self.put(obj)

    def secret(
        self,
        namespace: str,
        name: str,
        data: Mapping[str, bytes],
        type: str = "Opaque",
        labels: Mapping[str, str] | None = None,
    ) -> Object:
        encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
        metadata = _metadata(namespace, name, labels)
        return self.put({"kind": "Secret", "metadata": metadata, "data": encoded, "type": type})

    def service(
        self,
        namespace: str,
        name: str,
        ports: Sequence[Object],
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        **spec: Any,
    ) -> Object:
        """`ports` as in the API; more fields of the spec by keyword (`clusterIP="None"`)."""
        metadata = _metadata(namespace, name, labels)
        if annotations:
            metadata["annotations"] = dict(annotations)
        full = {"type": "ClusterIP", "clusterIP": "10.0.0.1", "ports": list(ports), **spec}
        return self.put({"kind": "Service", "metadata": metadata, "spec": full})

    def endpointslice(
        self,
        namespace: str,
        name: str,
        service: str,
        addresses: Sequence[str | Object],
        ports: Sequence[Object],
        address_type: str = "IPv4",
        labels: Mapping[str, str] | None = None,
    ) -> Object:
        """An address is a ready endpoint; a dictionary is an endpoint as in the API."""
        endpoints = [
            {"addresses": [a], "conditions": {"ready": True, "serving": True, "terminating": False}}
            if isinstance(a, str)
            else dict(a)
            for a in addresses
        ]
        metadata = _metadata(namespace, name, {"kubernetes.io/service-name": service})
        metadata["labels"].update(labels or {})
        return self.put({
            "kind": "EndpointSlice", "metadata": metadata, "addressType": address_type,
            "endpoints": endpoints, "ports": list(ports),
        })  # fmt: skip

    def node(self, name: str, labels: Mapping[str, str] | None = None) -> Object:
        return self.put({"kind": "Node", "metadata": _metadata("", name, labels)})

    def _record(self, resource: Resource, change: Change) -> None:
        self._history[resource].append(change)
        for watch in self._watches:
            if watch.scope.resource is resource and change.version > watch.since:
                line = watch.scope.line(change)
                if line is not None:
                    watch.lines.put(line)

    # -- faults

    def fail_next(self, match: Match, fault: Fault, times: int = 1) -> None:
        """The next `times` requests that match (a regex over `Request.target`) go wrong."""
        with self._lock:
            self._faults.extend([_Script(match, fault)] * times)

    @property
    def faults_left(self) -> int:
        return len(self._faults)

    def forgive(self) -> None:
        """Forget the faults that nobody met."""
        with self._lock:
            self._faults.clear()

    def compact(self) -> None:
        """Forget the history: watches from before now, and pages of lists, are expired."""
        with self._lock:
            self._compacted = self._version
            for history in self._history.values():
                history.clear()
            self._pages.clear()

    def reset_etcd(self, objects: Iterable[Object] | None = None, *, drop: bool = True) -> None:
        """Versions start again; the same objects, or others. Connections are lost meanwhile."""
        with self._lock:
            kept = [item.object for store in self._objects.values() for item in store.values()]
            self._version, self._compacted = 1, 0
            for resource in RESOURCES:
                self._objects[resource].clear()
                self._history[resource].clear()
            self._pages.clear()
            watches = list(self._watches)
            # A watch from before goes on in silence where it is not dropped.
            self._watches.clear()
            self._watches_changed.notify_all()
            for obj in kept if objects is None else objects:
                self.put(obj)
        if drop:
            for watch in watches:
                watch.lines.put(_ABRUPT)

    def close_watches(self, clean: bool = True, *, midchunk: bool = False) -> int:
        """End every open watch: properly, or cut (between chunks or within one). How many."""
        with self._lock:
            watches = list(self._watches)
        for watch in watches:
            watch.lines.put(_MIDCHUNK if midchunk else _CLEAN if clean else _ABRUPT)
        return len(watches)

    def inject(self, line: bytes, *, end: bool = False) -> None:
        """Send bytes as a chunk on every open watch, and end it properly if asked to."""
        with self._lock:
            for watch in self._watches:
                watch.lines.put(line)
                if end:
                    watch.lines.put(_CLEAN)

    def bookmark(self) -> None:
        """Send a bookmark now on every watch that allows them."""
        with self._lock:
            for watch in self._watches:
                self._queue_bookmark(watch)

    @property
    def watches(self) -> int:
        """How many watches are open (a client that closed is noticed within 0.1 s)."""
        with self._lock:
            return len(self._watches)

    def wait_watches(self, count: int, timeout: float = WAIT) -> None:
        def open_now() -> bool:
            return len(self._watches) == count

        deadline = Deadline(timeout)
        with self._watches_changed:
            while not self._watches_changed.wait_for(open_now, deadline.left()):
                if deadline.over():
                    raise TimeoutError(f"{len(self._watches)} open watches after {timeout} s")

    # -- connections

    def _accept(self, listener: socket.socket, closing: threading.Event) -> None:
        while not closing.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(sock)
            with self._lock:
                self.connections_total += 1
                self._connections[connection.id] = connection
            self._spawn(self._serve, connection, closing)

    def _serve(self, connection: _Connection, closing: threading.Event) -> None:
        try:
            if self.tls is not None:
                connection.secure(self.tls)
            while not closing.is_set():
                request = connection.read_request()
                if request is None:
                    return
                self.requests.add(request)
                exchange = _Exchange(self, connection, request, closing)
                exchange.run()
                if request.headers.get("connection", "").lower() == "close":
                    return
        except _Gone:
            connection.hang_up()
        except (OSError, ValueError):
            pass
        finally:
            with self._lock:
                self._connections.pop(connection.id, None)
            connection.close()

    def _fault_for(self, request: Request) -> Fault | None:
        with self._lock:
            for index, script in enumerate(self._faults):
                if script.matches(request):
                    del self._faults[index]
                    return script.fault
        return None

    # -- watches

    def _open_watch(self, scope: Scope, request: Request) -> _Watch | bytes:
        """A registered watch with its backlog, or the line that says that it cannot be."""
        asked = request.query.get("resourceVersion", "")
        with self._lock:
            if asked in ("", "0"):
                watch = _Watch(scope, request, self._version)
                for _, item in self._select(scope):
                    watch.lines.put(b'{"type":"ADDED","object":%s}\n' % item.json)
            else:
                since = int(asked)
                if since < self._compacted:
                    return error_event(
                        410, "Expired", f"too old resource version: {since} ({self._compacted})"
                    )
                watch = _Watch(scope, request, since)
                history = self._history[scope.resource]
                start = bisect_right(history, since, key=lambda change: change.version)
                for change in history[start:]:
                    line = scope.line(change)
                    if line is not None:
                        watch.lines.put(line)
            self._watches.append(watch)
            self._watches_changed.notify_all()
            return watch

    def _close_watch(self, watch: _Watch) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._watches.remove(watch)
            self._watches_changed.notify_all()

    def _queue_bookmark(self, watch: _Watch) -> None:
        """Behind every event that it covers; a watch from the future never gets one."""
        with self._lock:
            if not watch.bookmarks or watch.since > self._version or watch not in self._watches:
                return
            resource = watch.scope.resource
            metadata: Object = {"resourceVersion": self.version, "creationTimestamp": None}
            obj = {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata}
            event = {"type": "BOOKMARK", "object": {**obj, **ZEROS.get(resource.kind, {})}}
            watch.lines.put(to_json(event) + b"\n")

    def _select(self, scope: Scope) -> list[tuple[Key, Stored]]:
        with self._lock:
            items = self._objects[scope.resource]
            return sorted((k, v) for k, v in items.items() if scope.has(v))


def _metadata(namespace: str, name: str, labels: Mapping[str, str] | None) -> Object:
    metadata: Object = {"name": name}
    if namespace:
        metadata["namespace"] = namespace
    if labels:
        metadata["labels"] = dict(labels)
    return metadata


def _same(one: Object, other: Object) -> bool:
    def content(obj: Object) -> Object:
        metadata = {k: v for k, v in obj["metadata"].items() if k != "resourceVersion"}
        return {**obj, "metadata": metadata}

    return content(one) == content(other)


# ---------------------------------------------------------------------------------------------
# One request and its answer


class _Exchange:
    def __init__(
        self,
        api: ApiServer,
        connection: _Connection,
        request: Request,
        closing: threading.Event,
    ) -> None:
        self.api = api
        self.connection = connection
        self.request = request
        self.closing = closing
        self.fault: Fault | None = None
        self.settled: tuple[int, bytes, Mapping[str, str]] | None = None

    def run(self) -> None:
        self.pass_gate()
        self.fault = fault = self.api._fault_for(self.request)
        if isinstance(fault, Stall):
            self.silence(fault.seconds)
        elif isinstance(fault, Drop):
            self.connection.hang_up(fault.reset)
            if fault.reset:
                self.connection.close()
            raise _Gone
        elif isinstance(fault, Raw):
            self.connection.send(fault.bytes)
            raise _Gone
        elif isinstance(fault, Response):
            self.reply(fault.status, fault.body, fault.headers)
            self.flush()
            return
        elif isinstance(fault, Cut | StallBody):
            self.connection.budget = fault.after
        elif isinstance(fault, Slow):
            self.connection.pace = fault
        try:
            self.answer()
            self.flush()
        except _Gone:
            if isinstance(fault, StallBody):
                self.silence(1e9)
            raise
        finally:
            self.connection.budget = self.connection.pace = None
        if isinstance(fault, WrongLength):
            raise _Gone

    def pass_gate(self) -> None:
        while not self.api._gate.wait(0.05):
            if self.closing.is_set():
                raise _Gone

    def silence(self, seconds: float) -> None:
        """Nothing, until the time is up, the client has gone or the server stops."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self.closing.wait(min(left, 0.05)) or self.connection.client_has_gone():
                raise _Gone

    # -- answers

    def reply(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Settle the answer; `flush` sends it, when no lock is held."""
        self.settled = (status, body, headers or {})

    def flush(self) -> None:
        if self.settled is None:
            return
        status, body, headers = self.settled
        fields = {"Content-Type": "application/json", "Cache-Control": "no-cache, private"}
        fields["Content-Length"] = str(len(body))
        accepts = "gzip" in self.request.headers.get("accept-encoding", "")
        if isinstance(self.fault, Gzip) or (accepts and len(body) > 128 * 1024):
            body = gzip.compress(body, 1)
            fields["Content-Encoding"] = "gzip"
            fields["Content-Length"] = str(len(body))
        if isinstance(self.fault, WrongLength):
            fields["Content-Length"] = str(len(body) + self.fault.by)
        fields.update(headers)
        self.pass_gate()
        self.api.requests.answered(self.request, status)
        self.connection.send(self.connection.head(status, fields), body)

    def refuse(
        self,
        code: int,
        reason: str,
        message: str,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        self.reply(code, to_json(status_object(code, reason, message, **more)), headers)

    def not_found(self) -> None:
        self.reply(404, b"404 page not found\n", {"Content-Type": "text/plain; charset=utf-8"})

    def answer(self) -> None:
        if isinstance(self.fault, Stream):
            return self.scripted_stream(self.fault)
        if not self.authenticated():
            return None
        if self.discovery():
            return None
        found = self.route()
        if found is None:
            return self.not_found()
        resource, namespace, name = found
        try:
            labels = label_selector(self.request.query.get("labelSelector", ""))
            fields = field_selector(self.request.query.get("fieldSelector", ""))
        except (BadSelector, ValueError) as error:
            return self.refuse(400, "BadRequest", str(error))
        verb = self.verb(name)
        if not self.authorized(verb, resource, namespace, name or fields.get("metadata.name", "")):
            return None
        scope = Scope(resource, namespace, labels, fields)
        if verb == "watch":
            if name:
                fields = {"metadata.name": name}
                scope = scope._replace(fields=fields)
            return self.watch(scope)
        if verb == "list":
            return self.list_items(scope)
        if verb == "get":
            return self.get(scope, Key(namespace, name))
        return self.write(verb, scope, Key(namespace, name))

    # -- discovery, so that kubectl works too

    def discovery(self) -> bool:
        path = self.request.path.rstrip("/")
        groups = sorted({r.group for r in RESOURCES if r.group} - self.api.missing_groups)
        if path == "/api":
            self.reply(200, to_json({"kind": "APIVersions", "versions": ["v1"]}))
        elif path == "/apis":
            named = [(g, {"groupVersion": f"{g}/v1", "version": "v1"}) for g in groups]
            listed = [{"name": g, "versions": [v], "preferredVersion": v} for g, v in named]
            body = {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
            self.reply(200, to_json(body))
        elif path == "/api/v1" or path in [f"/apis/{group}/v1" for group in groups]:
            group = path.split("/")[2] if path.startswith("/apis") else ""
            self.reply(200, to_json(_resource_list(group)))
        else:
            return False
        return True

    def verb(self, name: str) -> str:
        if self.request.is_watch:
            return "watch"
        verbs = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}
        return verbs.get(self.request.method, "get" if name else "list")

    def route(self) -> tuple[Resource, str, str] | None:
        """(resource, namespace, name) of the path; None where the API has no such thing."""
        parts = self.request.path.strip("/").split("/")
        if parts[:1] == ["api"] and len(parts) >= 3:
            group, version, rest = "", parts[1], parts[2:]
        elif parts[:1] == ["apis"] and len(parts) >= 4:
            group, version, rest = parts[1], parts[2], parts[3:]
        else:
            return None
        if group in self.api.missing_groups:
            return None
        namespace = ""
        if rest[0] == "namespaces" and len(rest) >= 3:
            namespace, rest = rest[1], rest[2:]
        resource = BY_PATH.get((group, version, rest[0]))
        if resource is None or len(rest) > 2 or (namespace and not resource.namespaced):
            return None
        return resource, namespace, rest[1] if len(rest) == 2 else ""

    # -- who asks

    def authenticated(self) -> bool:
        if self.api.tokens is None:
            return True
        token = self.request.token
        if token is not None and token not in self.api.tokens:
            self.refuse(401, "Unauthorized", "Unauthorized")
            return False
        return True

    def authorized(self, verb: str, resource: Resource, namespace: str, name: str) -> bool:
        user, rules = "system:serviceaccount:demo:loader", self.api.rules
        if self.api.tokens is not None and self.request.token is None:
            user = "system:anonymous"
        elif rules is None or any(
            rule.allows(verb, resource.plural, namespace, name) for rule in rules
        ):
            return True
        where = f' in the namespace "{namespace}"' if namespace else " at the cluster scope"
        quoted = f' "{name}"' if name and verb not in ("list", "watch") else ""
        self.refuse(
            403,
            "Forbidden",
            f'{resource.plural}{quoted} is forbidden: User "{user}" cannot {verb} resource '
            f'"{resource.plural}" in API group "{resource.group}"{where}',
            details={"group": resource.group, "kind": resource.plural},
        )
        return False

    # -- lists

    def list_items(self, scope: Scope) -> None:
        query = self.request.query
        api = self.api
        asked = query.get("resourceVersion", "")
        token = query.get("continue", "")
        if token:
            return self.next_page(scope, token)
        if asked not in ("", "0"):
            if not asked.isdigit():
                return self.refuse(400, "BadRequest", f"invalid resource version: {asked!r}")
            if int(asked) > int(api.version):
                return self.too_large(asked)
        with api._lock:
            return self.page(scope, int(api.version), api._select(scope))

    def too_large(self, asked: str) -> None:
        message = f"Timeout: Too large resource version: {asked}, current: {self.api.version}"
        self.silence(self.api.future_delay)
        cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
        details = {"causes": [cause], "retryAfterSeconds": 1}
        self.refuse(504, "Timeout", message, {"Retry-After": "1"}, details=details)

    def page(self, scope: Scope, version: int, items: list[tuple[Key, Stored]]) -> None:
        """The first `limit` of the items; the rest is kept under a continue token."""
        metadata: Object = {"resourceVersion": str(version)}
        limit = int(self.request.query.get("limit") or 0)
        if limit and len(items) > limit:
            token = base64.b64encode(
                to_json({"v": "meta.k8s.io/v1", "rv": version, "start": items[limit - 1][0]})
            ).decode()
            with self.api._lock:
                self.api._pages[scope.resource.plural, token] = (version, items[limit:])
            metadata["continue"] = token
            metadata["remainingItemCount"] = len(items) - limit
            items = items[:limit]
        resource = scope.resource
        head = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version}
        start = to_json({**head, "metadata": metadata})[:-1]
        bare = b",".join(item.bare for _, item in items)
        self.reply(200, start + b',"items":[' + bare + b"]}\n")

    def next_page(self, scope: Scope, token: str) -> None:
        try:
            wanted = json.loads(base64.b64decode(token))
            after = Key(*wanted["start"])
        except (ValueError, KeyError, TypeError):
            return self.refuse(400, "BadRequest", "continue key is not valid")
        with self.api._lock:
            if wanted.get("fresh"):
                rest = [(key, item) for key, item in self.api._select(scope) if key > after]
                return self.page(scope, int(self.api.version), rest)
            page = self.api._pages.get((scope.resource.plural, token))
        if page is None:
            fresh = base64.b64encode(to_json({**wanted, "fresh": True})).decode()
            too_old = "The provided continue parameter is too old to display a consistent list"
            return self.refuse(410, "Expired", f"{too_old} result.", metadata={"continue": fresh})
        return self.page(scope, *page)

    def get(self, scope: Scope, key: Key) -> None:
        found = self.api._objects[scope.resource].get(key)
        if found is None:
            return self.missing(scope.resource, key)
        return self.reply(200, found.json + b"\n")

    def missing(self, resource: Resource, key: Key) -> None:
        details = {"name": key.name, "kind": resource.plural}
        message = f'{resource.plural} "{key.name}" not found'
        self.refuse(404, "NotFound", message, details=details)

    # -- writes

    def write(self, verb: str, scope: Scope, key: Key) -> None:
        """Creations, deletions and merge patches: what kubectl is imitated with."""
        resource, api = scope.resource, self.api
        try:
            body = json.loads(self.request.body) if self.request.body else {}
        except ValueError as error:
            return self.refuse(400, "BadRequest", str(error))
        with api._lock:
            current = api._objects[resource].get(key)
            if verb == "create":
                name = Key(key.namespace, body.get("metadata", {}).get("name", ""))
                if name in api._objects[resource]:
                    message = f'{resource.plural} "{name.name}" already exists'
                    return self.refuse(409, "AlreadyExists", message)
                return self.store(resource, name, body, 201)
            if current is None:
                return self.missing(resource, key)
            if verb == "delete":
                api.delete(resource.kind, key.namespace, key.name)
                success = {"kind": "Status", "apiVersion": "v1", "status": "Success"}
                return self.reply(200, to_json(success))
            return self.store(resource, key, merge_patch(current.object, body), 200)

    def store(self, resource: Resource, key: Key, obj: Object, status: int) -> None:
        if not key.name:
            return self.refuse(422, "Invalid", "metadata.name: Required value")
        metadata = {**obj.get("metadata", {}), "name": key.name}
        if resource.namespaced:
            metadata["namespace"] = key.namespace
        result = self.api.put({**obj, "kind": resource.kind, "metadata": metadata})
        return self.reply(status, to_json(result) + b"\n")

    # -- watches

    def watch(self, scope: Scope) -> None:
        query = self.request.query
        asked = query.get("resourceVersion", "")
        if asked and not asked.isdigit():
            return self.refuse(400, "BadRequest", f"invalid resource version: {asked!r}")
        opened = self.api._open_watch(scope, self.request)
        try:
            self.begin_stream()
            if isinstance(opened, bytes):
                self.chunk(opened)
                return self.end_stream()
            return self.pump(opened)
        finally:
            if isinstance(opened, _Watch):
                self.api._close_watch(opened)

    def begin_stream(self) -> None:
        self.pass_gate()
        self.api.requests.answered(self.request, 200)
        fields = {
            "Content-Type": "application/json",
            "Cache-Control": "no-cache, private",
            "Transfer-Encoding": "chunked",
        }
        self.connection.send(self.connection.head(200, fields))

    def chunk(self, content: bytes) -> None:
        size = self.api.chunk_size or len(content)
        for start in range(0, len(content), size):
            piece = content[start : start + size]
            self.connection.send(b"", b"%x\r\n%s\r\n" % (len(piece), piece))

    def end_stream(self) -> None:
        self.connection.send(b"0\r\n\r\n")

    def pump(self, watch: _Watch) -> None:
        """Events as they come, bookmarks when they are due, until the end."""
        api, now = self.api, time.monotonic()
        limit = float(self.request.query.get("timeoutSeconds") or 1800)
        deadline = now + limit
        bookmark = now + api.bookmark_interval
        while True:
            due = min(deadline, bookmark, time.monotonic() + 0.1)
            try:
                item = watch.lines.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                if self.closing.is_set() or self.connection.client_has_gone():
                    raise _Gone from None
                now = time.monotonic()
                if now >= deadline:
                    if limit >= api.shortest_bookmarked:
                        api._queue_bookmark(watch)
                    api._close_watch(watch)
                    watch.lines.put(_CLEAN)
                    deadline = bookmark = now + 3600
                elif now >= bookmark:
                    api._queue_bookmark(watch)
                    bookmark = now + api.bookmark_interval
                continue
            self.pass_gate()
            if not self.send_item(item):
                return

    def send_item(self, item: object) -> bool:
        """Whether the stream goes on."""
        if isinstance(item, bytes):
            self.chunk(item)
            return True
        if item is _CLEAN:
            self.end_stream()
            return False
        if item is _MIDCHUNK:
            self.connection.send(b'ff\r\n{"type":"MODIFIED","obj')
        raise _Gone

    def scripted_stream(self, script: Stream) -> None:
        self.begin_stream()
        for piece in script.chunks:
            self.connection.send(b"", b"%x\r\n%s\r\n" % (len(piece), piece))
        if script.then == "clean":
            self.end_stream()
        elif script.then == "silent":
            self.silence(1e9)
        else:
            assert script.then == "cut"
            raise _Gone


def _resource_list(group: str) -> Object:
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {
            "name": r.plural,
            "singularName": r.kind.lower(),
            "namespaced": r.namespaced,
            "kind": r.kind,
            "verbs": verbs,
            "shortNames": {"configmaps": ["cm"], "services": ["svc"]}.get(r.plural, []),
        }
        for r in RESOURCES
        if r.group == group
    ]
    version = f"{group}/v1" if group else "v1"
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": version,
        "resources": resources,
    }


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


# ---------------------------------------------------------------------------------------------
# A client


class Client:
    """Changes objects over HTTP as `kubectl` would; one connection, kept."""

    def __init__(self, url: str, token: str | None = None, ca_file: Path | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname is not None
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
            self._http: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port, context=context, timeout=10
            )
        else:
            self._http = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
        self._http.connect()
        self._http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def request(
        self, method: str, path: str, body: object = None, kind: str = "application/json"
    ) -> tuple[int, Any]:
        """(status, decoded body; text where it is no JSON)."""
        content = None if body is None else to_json(body)
        self._http.request(method, path, content, {**self._headers, "Content-Type": kind})
        response = self._http.getresponse()
        text = response.read()
        if response.headers.get("Content-Encoding") == "gzip":
            text = gzip.decompress(text)
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text.decode("utf-8", "replace")

    def configmap(self, namespace: str, name: str, data: Mapping[str, str | None]) -> Object:
        """Merge `data` into the ConfigMap (None takes a key away); made where there is none."""
        path = f"/api/v1/namespaces/{namespace}/configmaps"
        patch = {"data": data}
        code, body = self.request("PATCH", f"{path}/{name}", patch, "application/merge-patch+json")
        if code == 404:
            made = {"metadata": {"name": name}, "data": data}
            code, body = self.request("POST", path, made)
        if code >= 300:
            raise RuntimeError(f"{code} {body}")
        result: Object = body
        return result

    def close(self) -> None:
        self._http.close()

"""envoy-xds-configmap-loader: Envoy's filesystem xDS, live from Kubernetes.

It lists, polls or watches ConfigMaps (and if asked Services, EndpointSlices and Secrets) over the
raw Kubernetes REST API, turns them into the files that Envoy's filesystem xDS reads, and publishes
them as one atomic snapshot:

    <output-dir>/
      ..<version>/           one snapshot: complete, immutable, made under this name
      ..data -> ..<version>  THE switch: one rename(2) replaces the whole snapshot
      current/               a real directory, never replaced: Envoy's inotify watch stays valid
        rds.yaml -> ../..data/rds.yaml
      ..state/               what a restart cannot see on disk

What it promises, each with a test:

* `current/X` always resolves to a complete file of one snapshot.
* Nothing is published before every source is known; "unknown" never becomes "empty".
* Nothing changed means nothing touched: no event for Envoy, no new directory.
* A restart repairs and converges, whatever it finds.
* Clusters come before the routes that name them, and are removed after them.
* What Envoy rejects (NACK) is rolled back, named, and not tried again until it changes.

Data flows one way, and so do the chapters:

    API objects -> resources -> files -> steps -> disk -> ACK or NACK

Reflector threads own memory; the main thread alone owns the disk; one more thread talks to Envoy's
admin interface. Only the standard library is used.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import functools
import hashlib
import http.client
import io
import itertools
import json
import os
import random
import re
import select
import signal
import socket
import ssl
import stat
import sys
import threading
import time
import types
import urllib.parse
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__version__ = "2.0.0"

# ---------------------------------------------------------------------------------------------
# Constants, errors, values
# ---------------------------------------------------------------------------------------------

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"

Json = Any  # what json.loads returns: written once, so that each use shows what it is


class LoaderError(Exception):
    """The loader tried and could not: one line with what, where and what to do (exit 1)."""


class UsageError(LoaderError):
    """Bad input, named in one line before anything is touched (exit 2)."""


class File(NamedTuple):
    """One file of a snapshot: bytes, their SHA-256 in hex, xDS kind, source object, mode.

    `kind` is "cds", "eds", ... or "" for what is not xDS; it is decided once, when files are
    composed.
    """

    content: bytes
    digest: str
    kind: str
    source: str
    mode: int = 0o644

    def __repr__(self) -> str:
        """Without the content, which may be a key."""
        return f"File({self.digest[:12]}, {self.kind}, {self.source}, {self.mode:04o})"


Files = Mapping[str, File]
"""A set of files by their path relative to `current/`, such as `eds/demo_web_http.yaml`."""

Key = tuple[str, str]
"""Namespace (empty for what has none) and name of a Kubernetes object."""

KINDS = {
    b"envoy.config.cluster.v3.Cluster": "cds",
    b"envoy.config.listener.v3.Listener": "lds",
    b"envoy.config.endpoint.v3.ClusterLoadAssignment": "eds",
    b"envoy.config.route.v3.RouteConfiguration": "rds",
    b"envoy.config.route.v3.ScopedRouteConfiguration": "scoped_rds",
    b"envoy.extensions.transport_sockets.tls.v3.Secret": "sds",
    b"envoy.service.runtime.v3.Runtime": "rtds",
    b"envoy.config.core.v3.TypedExtensionConfig": "ecds",
}
TYPE_URL = re.compile(rb"type\.googleapis\.com/(envoy\.[A-Za-z0-9_.]+)")


def kind_of(content: bytes) -> str:
    """What a file configures: the first type URL of an xDS resource in its text decides."""
    for found in TYPE_URL.finditer(content):
        if found[1] in KINDS:
            return KINDS[found[1]]
    return ""


def file_of(content: bytes, source: str, mode: int = 0o644, kind: str = "") -> File:
    """A file with the digest of its content, and the kind that its content shows."""
    digest = hashlib.sha256(content).hexdigest()
    return File(content, digest, kind or kind_of(content), source, mode)


def same_file(one: File | None, other: File | None) -> bool:
    """Whether two files are the same on disk: bytes and mode. The source does not show there."""
    if one is None or other is None or one is other:
        return one is other
    return one.digest == other.digest and one.mode == other.mode


def same_files(one: Files, other: Files) -> bool:
    """Whether two sets of files are the same on disk."""
    return len(one) == len(other) and all(same_file(other.get(p), f) for p, f in one.items())


def moved_paths(before: Files, after: Files) -> list[str]:
    """The paths that are new, or have other bytes or another mode."""
    return [path for path, file in after.items() if not same_file(before.get(path), file)]


def version_of(files: Files) -> str:
    """The version of a snapshot: a hash of paths, modes and contents, never a resourceVersion."""
    rows = (f"{path}\0{files[path].mode:o}\0{files[path].digest}\n" for path in sorted(files))
    return hashlib.sha256("".join(rows).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def parents(path: str) -> Iterator[str]:
    """The directories above a relative path, nearest first."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def json_object(value: object) -> dict[str, Json]:
    """A value that should be a JSON object; anything else is an empty one."""
    return value if isinstance(value, dict) else {}


def parse_json(text: bytes | str) -> Json:
    """json.loads; nesting that is too deep is a ValueError like every other error."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def why(error: BaseException) -> str:
    """An exception as one readable line."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}"
    text = " ".join(str(error).split())[:500]
    name = "" if isinstance(error, LoaderError) else f"{type(error).__name__}: "
    return f"{name}{text}".rstrip(": ")


def shortened(names: Sequence[str], most: int = 5) -> str:
    """A list for one log line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---------------------------------------------------------------------------------------------
# Asking Kubernetes
# ---------------------------------------------------------------------------------------------

# A TCP and TLS handshake; the silence within one answer; one whole answer, from its request to its
# last byte: no server holds a thread by trickling.
CONNECT_TIMEOUT, ANSWER_TIMEOUT, ANSWER_SECONDS = 10.0, 30.0, 120.0

# Sizes of answers. A page of 500 objects of 512 KiB each; the text of an error; an event
# (etcd stores objects of 1.5 MiB).
LIST_BYTES, ERROR_BYTES, EVENT_BYTES = 256 << 20, 1 << 20, 64 << 20

# Objects in one page of a list, as kubectl asks. And pages in one list: a million objects, beyond
# which the server is going round in circles.
PAGE, LIST_PAGES = 500, 2_000

# An API server bookmarks a watch about once a minute. One from a resourceVersion of the future
# (etcd was restored) is silent for ever, like a half-open connection: either is probed.
WATCH_SILENCE = 80.0

# The server ends a watch after timeoutSeconds; spread, so that a thousand sidecars that started
# together do not renew together (client-go: 5 to 10 minutes).
WATCH_SECONDS = (300, 600)

# Where a token may go over plain HTTP.
LOOPBACK = r"127(\.[0-9]{1,3}){3}|::1|localhost"

# What a server may ask us to wait: a year in a header must not stop a source for a year.
RETRY_AFTER_LAST = 300.0


class Access(NamedTuple):
    """Where the API server is and how to prove who asks. The token is read again for each request,
    the other files for each connection: Kubernetes rotates both under a running pod."""

    apiserver: str = ""
    token_file: str = f"{SERVICE_ACCOUNT}/token"
    ca_file: str = f"{SERVICE_ACCOUNT}/ca.crt"
    client_cert: str = ""
    client_key: str = ""
    insecure: bool = False


class Resource(NamedTuple):
    """A resource of the Kubernetes API: its API group's path, its plural name, its kind."""

    api: str
    name: str
    kind: str


CONFIGMAPS = Resource("/api/v1", "configmaps", "ConfigMap")
SECRETS = Resource("/api/v1", "secrets", "Secret")
SERVICES = Resource("/api/v1", "services", "Service")
ENDPOINTS = Resource("/api/v1", "endpoints", "Endpoints")
NODES = Resource("/api/v1", "nodes", "Node")
ENDPOINTSLICES = Resource("/apis/discovery.k8s.io/v1", "endpointslices", "EndpointSlice")


class Query(NamedTuple):
    """What one list or watch asks for. An empty namespace means all, or a resource without one."""

    resource: Resource
    namespace: str = ""
    name: str = ""
    labels: str = ""

    def target(self, more: Mapping[str, str]) -> str:
        """Path and query. `metadata.name` as a field lets RBAC by `resourceNames` suffice."""
        scope = f"/namespaces/{urllib.parse.quote(self.namespace, '')}" if self.namespace else ""
        field = f"metadata.name={self.name}" if self.name else ""
        words = {"fieldSelector": field, "labelSelector": self.labels, **more}
        given = urllib.parse.urlencode({key: value for key, value in words.items() if value})
        return f"{self.resource.api}{scope}/{self.resource.name}?{given}"

    def __str__(self) -> str:
        if self.name:
            scope = f"{self.namespace}/" if self.namespace else ""
            return f"{self.resource.name.removesuffix('s')} {scope}{self.name}"
        where = f" in namespace {self.namespace}" if self.namespace else ""
        return f"{self.resource.name}{f' with {self.labels}' if self.labels else ''}{where}"


def text_at(item: Mapping[str, Json], *path: str) -> str:
    """The text at a path of names in an API object; "" for whatever else is there."""
    value: Json = item
    for name in path:
        value = json_object(value).get(name)
    return value if isinstance(value, str) else ""


def object_key(item: Mapping[str, Json]) -> Key:
    return text_at(item, "metadata", "namespace"), text_at(item, "metadata", "name")


class ApiError(LoaderError):
    """The API server answered, and not with what was asked for."""

    def __init__(self, status: int, text: str, retry_after: float = 0.0) -> None:
        super().__init__(text)
        self.status, self.retry_after = status, retry_after


class Expired(ApiError):
    """410: the resourceVersion (or the continue token) is too old; only a new list helps."""


class Cut(LoaderError):
    """A connection that ended where it should not have, or was silent for too long."""


# What a broken network raises below http.client (IncompleteRead and bad status lines included), and
# what is not JSON. A host name that no resolver accepts (`a..b`) is a ValueError.
BROKEN = (OSError, http.client.HTTPException, ValueError)

Response = http.client.HTTPResponse
Event = tuple[str, dict[str, Json]]  # type, object


class Api:
    """The Kubernetes REST API over one connection that is kept open; one thread uses it. (Not
    `urllib.request`, which follows redirects.) `count` is called for every answer: (verb, status).
    """

    def __init__(self, access: Access, count: Callable[[str, str], None]) -> None:
        self._access, self._count = access, count
        self._url = urllib.parse.urlsplit(access.apiserver)
        self._connection: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None
        self._token = ""  # the one that was sent last

    def list(self, query: Query, limit: int, keep: Callable[[dict[str, Json]], None]) -> str:
        """Call `keep` with each object that matches, page by page (`limit` 0: in one); the
        resourceVersion to watch from. What is not plainly such a list is unknown, never empty."""
        kind = f"{query.resource.kind}List"
        page = {"limit": str(limit or "")}
        for _ in range(LIST_PAGES):
            answer: dict[str, Json] = {}
            with contextlib.suppress(ValueError):
                answer = json_object(parse_json(self._ask(query, "list", page)[1]))
            items = answer.pop("items", 0)
            if answer.get("kind") != kind or not (items is None or isinstance(items, list)):
                text = f"list {query}: the answer of {self._url.netloc} is not a {kind}"
                raise ApiError(200, f"{text}; is it a Kubernetes API server?")
            for item in items or ():  # Go's JSON writes an empty slice as null
                keep(json_object(item))
            del items  # before the next page is read
            page["continue"] = text_at(answer, "metadata", "continue")
            if not page["continue"]:
                return text_at(answer, "metadata", "resourceVersion")
        raise ApiError(200, f"list {query}: {self._url.netloc} sends pages without end")

    def is_future(self, query: Query, version: str) -> bool:
        """Whether `version` is one that this server never reached: its etcd was reset. (It waits
        up to 3 s for the version to come before its 504.)"""
        page = {"limit": "1", "resourceVersionMatch": "NotOlderThan", "resourceVersion": version}
        try:
            self._ask(query, "list", page)
            return False
        except ApiError as error:
            if error.status == 504:
                return True
            raise

    def watch(self, query: Query, version: str) -> Iterator[Event]:
        """Open a watch: its events, until the server ends it properly; else Cut, ApiError, or
        Expired for 410 (a status, or an ERROR event: a real server answers 200 and one event)."""
        seconds = random.randint(*WATCH_SECONDS)
        asked = {"watch": "1", "allowWatchBookmarks": "true", "resourceVersion": version}
        response, _ = self._ask(query, "watch", {**asked, "timeoutSeconds": str(seconds)})
        if self._socket is not None:
            self._socket.settimeout(WATCH_SILENCE)
        return self._events(query, response, time.monotonic() + seconds + ANSWER_SECONDS)

    def interrupt(self) -> None:
        """End what goes on, from any thread: the one that reads finds the end of its stream."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # (not SSLSocket's own shutdown: that one makes a plain socket of it)
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._socket = None

    # -- one answer -------------------------------------------------------------------------

    def _events(self, query: Query, response: Response, until: float) -> Iterator[Event]:
        """The events in the lines of a watch. (http.client's readline shows a stream that was cut
        at a chunk boundary as a normal end; `read1` does not.)"""
        buffer = bytearray()
        try:
            while block := response.read1(1 << 18):
                buffer += block
                if b"\n" in block:
                    *lines, rest = bytes(buffer).split(b"\n")
                    buffer = bytearray(rest)
                    for line in filter(bytes.strip, lines):
                        yield self._event(query, line)
                if len(buffer) > EVENT_BYTES or time.monotonic() > until:
                    raise ValueError("it does not end")
            if buffer.strip():
                raise ValueError("cut within an event")
        except BROKEN as error:
            shown = self._quoted(str(error), why(error))
            raise Cut(f"watch {query}: cut or silent ({shown})") from error
        finally:
            if not response.isclosed():
                self.close()  # it cannot be used for another request

    def _event(self, query: Query, line: bytes) -> Event:
        event = json_object(parse_json(line))
        kind, item = event.get("type"), event.get("object")
        if not isinstance(kind, str) or not isinstance(item, dict):
            raise ValueError("an event has no type or no object")
        if kind == "ERROR":
            code = item.get("code")
            status = code if isinstance(code, int) and 400 <= code < 600 else 500
            if item.get("reason") in ("Expired", "Gone"):
                status = 410
            raise self._error(query, "watch", status, text_at(item, "message"))
        return kind, item

    def _ask(self, query: Query, verb: str, page: Mapping[str, str]) -> tuple[Response, bytes]:
        """An answer of status 200, and its body unless it is a watch's; ApiError for any other."""
        headers = {"Accept": "application/json", "User-Agent": f"envoy-xds-loader/{__version__}"}
        self._token = self._read_token()
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        timer = threading.Timer(ANSWER_SECONDS, self.interrupt)
        timer.daemon = True
        timer.start()
        code = "none"
        try:
            response = self._send(self._url.path.rstrip("/") + query.target(page), headers)
            code = str(response.status)
            if response.status != 200:
                raise self._failure(query, verb, response)
            return response, b"" if verb == "watch" else body_of(response, LIST_BYTES)
        except BROKEN as error:
            self.close()
            text = f"{verb} {query} at {self._url.netloc}: {self._quoted(str(error), why(error))}"
            raise Cut(f"{text}; check --apiserver and --ca-file") from error
        finally:
            timer.cancel()
            self._count(verb, code)

    def _send(self, target: str, headers: dict[str, str]) -> Response:
        """Over the open connection if there is one; a server may have closed it meanwhile."""
        began, kept = time.monotonic(), self._connection
        if kept is not None and kept.sock is None:
            kept = None
        try:
            connection = kept or self._connect()
            connection.request("GET", target, headers=headers)
            connection.sock.settimeout(ANSWER_TIMEOUT)
            return connection.getresponse()
        except BROKEN:
            self.close()
            if kept is None or time.monotonic() - began > CONNECT_TIMEOUT:
                raise
        return self._send(target, headers)

    def _failure(self, query: Query, verb: str, response: Response) -> ApiError:
        """What an answer other than 200 means: a Kubernetes Status, or whatever text came."""
        message = ""
        with contextlib.suppress(*BROKEN):
            message = body_of(response, ERROR_BYTES).decode("utf-8", "replace")
            message = text_at(json_object(parse_json(message)), "message")
        if not response.isclosed():
            self.close()
        if 300 <= response.status < 400:
            where = self._quoted(response.headers.get("Location", ""))
            message = f"redirects are not followed: correct --apiserver ({where})"
        retry = response.headers.get("Retry-After", "")
        seconds = min(float(retry), RETRY_AFTER_LAST) if retry.isdecimal() else 0.0
        return self._error(query, verb, response.status, message, seconds)

    def _error(self, query: Query, verb: str, status: int, message: str,
               retry_after: float = 0.0) -> ApiError:
        path = self._access.token_file
        scope = f"namespace {query.namespace}" if query.namespace else "all namespaces"
        sent = "" if self._token else f" (no token was sent: there is none in {path})"
        hint = {
            401: f"; is the token in {path} valid?",
            403: f"; grant the service account {verb} on {query.resource.name} in {scope}{sent}",
            404: "; is --apiserver a Kubernetes API server?",
        }.get(status, "")
        text = f"{verb} {query}: {status} {self._quoted(message)}".rstrip()
        return (Expired if status == 410 else ApiError)(status, text + hint, retry_after)

    def _quoted(self, text: str, shown: str = "") -> str:
        """Foreign text (or a line about it) for the log. An error page may echo the request, token
        and all, in a URL or in base64 too, where three alignments are possible."""
        forms = {self._token}
        for shift, first in enumerate((0, 2, 3)):  # characters shared with the text before it
            encoded = base64.b64encode(bytes(shift) + self._token.encode("latin-1")).decode()
            forms.add(encoded[first : len(encoded) // 4 * 4 - 4])
        plain = "".join(urllib.parse.unquote(text).split())
        seen = plain + plain.replace("-", "+").replace("_", "/")
        if any(form in seen for form in forms if form):
            return "[a text that quotes the token]"
        return shown or " ".join(text.split())[:500]

    # -- one connection ---------------------------------------------------------------------

    def _connect(self) -> http.client.HTTPConnection:
        place = self._url.hostname or "", self._url.port
        made = http.client.HTTPConnection(*place, timeout=CONNECT_TIMEOUT)
        if self._url.scheme == "https":
            context = self._context()
            made = http.client.HTTPSConnection(*place, timeout=CONNECT_TIMEOUT, context=context)
        made.connect()
        self._connection, self._socket = made, made.sock
        # The kernel notices within about a minute that the other side is gone.
        made.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        made.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        return made

    def _read_token(self) -> str:
        """The bearer token as it is now. Without a file there is none: a local proxy needs none."""
        path, url = self._access.token_file, self._url
        try:
            with open(path, "rb") as stream:
                token = stream.read(ERROR_BYTES).decode("latin-1").strip()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise LoaderError(f"token file {why(error)}; check --token-file") from None
        if not token.isprintable():
            raise LoaderError(f"token file {path}: not a valid token; check --token-file")
        if token and url.scheme == "http" and not re.fullmatch(LOOPBACK, url.hostname or ""):
            text = f"the token in {path} is not sent to {url.netloc} over plain HTTP"
            raise LoaderError(f"{text}; give --apiserver an https URL")
        return token

    def _context(self) -> ssl.SSLContext:
        """TLS that trusts the CA of `--ca-file`; the system's only out of a pod, where there is no
        service account."""
        context, access = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), self._access
        where = access.ca_file
        try:
            if access.insecure:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            elif where == f"{SERVICE_ACCOUNT}/ca.crt" and not os.path.exists(where):
                context.load_default_certs()
            else:
                context.load_verify_locations(cafile=where)
            if access.client_cert:
                where = f"{access.client_cert}, {access.client_key}"
                # (an empty password: without one OpenSSL would ask on the terminal, and wait)
                context.load_cert_chain(access.client_cert, access.client_key, password="")
        except OSError as error:  # an SSLError is one
            hint = "check --ca-file, --client-cert and --client-key"
            raise LoaderError(f"{where}: not a usable certificate ({why(error)}); {hint}") from None
        return context


def body_of(response: Response, most: int) -> bytes:
    """All of an answer; ValueError if that is more than `most` bytes."""
    body = response.read(most + 1)
    if len(body) > most:
        raise ValueError(f"the answer is larger than {most >> 20} MiB")
    if response.length:  # with a bound, read() does not raise it
        raise http.client.IncompleteRead(b"", response.length)
    return body


# ---------------------------------------------------------------------------------------------
# Reflecting
# ---------------------------------------------------------------------------------------------

# Backoff after failures: exponential, with jitter.
BACKOFF_FIRST, BACKOFF_LAST = 0.5, 30.0

# A watch that ends sooner than this after it began is followed by a pause: a server or a proxy that
# ends each at once must not be asked thousands of times a second.
WATCH_SHORT = 1.0

# A server that stops gracefully keeps an open watch silent for 60 s and then ends it properly. A
# proper end after that much silence may hide a new server with an older etcd behind it.
SUSPICIOUS_SILENCE = 30.0

# Failures that are answers to a resumed watch, in a row, after which only a list can help.
RELIST_AFTER = 3

# `--onetime` without `--timeout` is one try. The API server answers 401, 403, 429 and 5xx for some
# 20 ms after a restart though it means 200: these are asked again for this long.
ONE_TRY_SECONDS = 1.0
PASSING = frozenset((401, 403, 408, 429, *range(500, 600)))


class Reflector(threading.Thread):
    """Keeps the objects of one query current in memory, and wakes the main thread on change.

    `mode` is `once` (a try, with a second of retries), `poll` (a list every `interval` seconds) or
    `watch` (a list, then watches that resume). `parse` reduces an API object to what is used of
    it; an object that it rejects (ValueError) keeps its last good value and is named in `bad`.
    `patience` is the longest backoff, in seconds. An `optional` resource that the API server
    answers with 404 at the start counts as synced and `absent`, for good. `wake` is called with
    "objects", "trouble" or "recovered", and when (monotonic).
    """

    def __init__(self, query: Query, parse: Callable[[dict[str, Json]], Any],
                 client: Api | FileSource, wake: Callable[[str, float], None], *, mode: str,
                 interval: float, optional: bool, patience: float) -> None:
        super().__init__(name=f"reflector {query}", daemon=True)
        self.query = query
        self.synced = self.absent = self.failed = False
        self.trouble = ""
        self.bad: dict[Key, str] = {}
        self._parse, self._client, self._wake = parse, client, wake
        self._mode, self._interval, self._optional = mode, interval, optional
        self._patience, self._topic = patience, str(query)
        self._objects: dict[Key, Any] = {}  # only ever read, or replaced, as a whole elsewhere
        self._version, self._failures = "", 0
        self._asked = threading.Event()  # by refresh(): ends each wait
        self._watching: Api | None = None

    def objects(self) -> dict[Key, Any]:
        return self._objects.copy()

    def refresh(self) -> None:
        """List now: a pause ends for it, and an open watch."""
        self._asked.set()
        if self._watching:
            self._watching.interrupt()

    def run(self) -> None:
        """List, and then again or watch; resume a watch that ended, list again where only that
        helps. After a failure the server may be another one: its etcd may have been restored."""
        until, suspect, rejections = time.monotonic() + ONE_TRY_SECONDS, False, 0
        api = self._client if self._mode == "watch" and isinstance(self._client, Api) else None
        while True:
            try:
                if self._asked.is_set():
                    self._asked.clear()
                    self._forget("refresh")
                elif suspect and api and self._version and api.is_future(self.query, self._version):
                    self._forget("future")
                suspect = False
                if not api or not self._version:
                    self._relist()
                if self._mode == "once" or self.absent:
                    return
                if api:
                    suspect = self._follow(api)
                else:
                    self._failures = 0
                    self._asked.wait(self._interval)
                rejections = 0
            except LoaderError as error:
                if self._asked.is_set():
                    continue  # refresh() cut the watch
                status = getattr(error, "status", 0)
                suspect = suspect or not status or status >= 500
                rejections = rejections + 1 if status else 0
                if isinstance(error, Expired) or (api and rejections >= RELIST_AFTER):
                    self._forget("expired" if isinstance(error, Expired) else "rejected")
                    if rejections == 1:
                        continue
                delay = self._failure(error)
                # (a quarter of a second more, so that a Retry-After of 1 fits)
                late = time.monotonic() + delay > until + 0.25
                if self._mode == "once" and (late or status not in PASSING):
                    self.failed = True
                    self._wake("trouble", time.monotonic())
                    return
                self._asked.wait(delay)

    # -- their parts ------------------------------------------------------------------------

    def _forget(self, reason: str) -> None:
        """Drop the version: the next step is a list. The objects stay until it has come."""
        log.debug("%s: %s, listing anew", self.query, reason)
        metrics.add("xds_loader_watch_restarts_total", (self._topic, reason))
        self._version = ""

    def _relist(self) -> None:
        """Replace the store by a complete list, so that deletions in a gap are seen. One whose
        continue token expires midway is asked for again without pages."""
        try:
            try:
                objects, bad, version = self._listed(PAGE)
            except Expired:
                objects, bad, version = self._listed(0)
        except ApiError as error:
            if error.status != 404 or not self._optional or self.synced:
                raise
            log.info("%s: not available here (%s)", self.query, error)
            objects, bad, version = {}, {}, ""
            self.absent = True
        changed = not self.synced or bad != self.bad or objects != self._objects
        self._objects, self.bad, self._version, self.synced = objects, bad, version, True
        log.debug("listed %s: %d objects at %.40s", self.query, len(objects), version)
        self._recovered()
        if changed:
            self._wake("objects", time.monotonic())
        metrics.set("xds_loader_source_synced", 1.0, (self._topic,))
        metrics.set("xds_loader_source_last_event_timestamp_seconds", time.time(), (self._topic,))

    def _listed(self, limit: int) -> tuple[dict[Key, Any], dict[Key, str], str]:
        """A complete list: values by key, what is bad, and the version."""
        objects: dict[Key, Any] = {}
        bad: dict[Key, str] = {}

        def keep(item: dict[str, Json]) -> None:
            key = object_key(item)
            if (value := self._value(key, item, bad)) is not None:
                objects[key] = value

        return objects, bad, self._client.list(self.query, limit, keep)

    def _value(self, key: Key, item: dict[str, Json], bad: dict[Key, str]) -> Any:
        """The value of an object; the old one where nothing that counts changed, or it is bad."""
        old = self._objects.get(key)
        try:
            value = self._parse(item)
            return old if value == old else value
        except (ValueError, RecursionError) as error:
            name = f"{self.query.resource.kind.lower()} {'/'.join(filter(None, key))}"
            bad[key] = str(error) if str(error).startswith(name) else f"{name}: {error}"
            return old

    def _follow(self, api: Api) -> bool:
        """Watch until the server ends it properly; whether that end wants a closer look."""
        events = api.watch(self.query, self._version)
        began = last = time.monotonic()
        log.debug("watching %s from %.40s", self.query, self._version)
        self._recovered()
        self._watching = api
        try:
            while not self._asked.is_set() and (event := next(events, None)):
                last = time.monotonic()
                self._apply(*event, last)
        finally:
            self._watching = None
            now = time.monotonic()
            if now - began >= WATCH_SHORT:
                self._failures = 0
            elif last > began:  # it brought news: the next may come soon, but not at once
                self._failures = min(self._failures, 1)
        log.debug("watch of %s ended after %.0f s", self.query, now - began)
        metrics.add("xds_loader_watch_restarts_total", (self._topic, "ended"))
        if now - began < WATCH_SHORT:
            self._asked.wait(self._delay())
        return now - last >= SUSPICIOUS_SILENCE

    def _apply(self, kind: str, item: dict[str, Json], now: float) -> None:
        """One event into the store. A bookmark is a version and nothing else."""
        self._version = text_at(item, "metadata", "resourceVersion") or self._version
        if kind in ("ADDED", "MODIFIED", "DELETED"):  # a type of the future is passed over
            key = object_key(item)
            bad = {other: text for other, text in self.bad.items() if other != key}
            value = None if kind == "DELETED" else self._value(key, item, bad)
            if value is not self._objects.get(key) or bad != self.bad:
                self.bad = bad
                if value is None:
                    self._objects.pop(key, None)
                else:
                    self._objects[key] = value
                self._wake("objects", now)
        metrics.set("xds_loader_source_last_event_timestamp_seconds", time.time(), (self._topic,))

    def _recovered(self) -> None:
        if self.trouble:
            self.trouble = ""
            log.recovered(self._topic, f"{self.query}: answered again")
            self._wake("recovered", time.monotonic())

    def _failure(self, error: LoaderError) -> float:
        """Log what failed (once, until it is another failure); how long to wait."""
        status = getattr(error, "status", 0)
        reason = f"status {status}" if status else "cut" if isinstance(error, Cut) else "error"
        metrics.add("xds_loader_watch_restarts_total", (self._topic, reason))
        delay = self._delay(getattr(error, "retry_after", 0.0))
        self.trouble = str(error)
        if self._mode != "once":  # there the error is the end, and is reported as such
            log.outage(self._topic, self.trouble)
        self._wake("trouble", time.monotonic())
        return delay

    def _delay(self, retry_after: float = 0.0) -> float:
        """Seconds to wait after one more failure; never less than what the server asks for."""
        ceiling = min(self._patience, BACKOFF_FIRST * 2.0 ** min(self._failures, 10))
        self._failures += 1
        return max(retry_after, ceiling * random.uniform(0.5, 1.0))


# -- --from-file ------------------------------------------------------------------------------


class FileSource:
    """The objects of `kubectl get ... -o json` in a file (`-`: standard input), as a lister."""

    def __init__(self, path: str, namespace: str) -> None:
        self._path, self._namespace = path, namespace
        self._text = b""
        self._lock = threading.Lock()  # each reflector asks; standard input can be read once

    def list(self, query: Query, limit: int, keep: Callable[[dict[str, Json]], None]) -> str:
        """Call `keep` with the objects that an API server with this file's objects would list."""
        wanted, objects = requirements(query.labels), self._objects()
        kinds = {item["kind"] for item in objects} & {ENDPOINTS.kind, ENDPOINTSLICES.kind}
        if query.resource is ENDPOINTSLICES and kinds == {ENDPOINTS.kind}:
            raise ApiError(404, f"{self._path} holds Endpoints and no EndpointSlice")
        for item in objects:
            namespace, name = object_key(item)
            named = query.namespace in ("", namespace) and query.name in ("", name)
            labels = json_object(item["metadata"].get("labels"))
            if item["kind"] == query.resource.kind and named and selects(wanted, labels):
                keep(item)
        return ""

    def elsewhere(self, query: Query) -> str:
        """Where the named object of a query is, which is not where it was looked for; or ""."""
        kind, keys = query.resource.kind, []
        with contextlib.suppress(LoaderError):
            keys = sorted(object_key(item) for item in self._objects() if item["kind"] == kind)
        same = [key for key in keys if key[1] == query.name]
        names = [f"{namespace}/{name}" for namespace, name in same or keys]
        hint = f"; give --namespace {same[0][0]}" if len(same) == 1 else ""
        return f"`{self._path}` holds {kind.lower()} {shortened(names)}{hint}" if names else ""

    def _objects(self) -> Sequence[dict[str, Json]]:
        """All objects of the file, each with a namespace if its kind has one."""
        stdin = self._path == "-"
        try:
            with self._lock:
                if not (stdin and self._text):
                    with open(0 if stdin else self._path, "rb", closefd=not stdin) as stream:
                        self._text = stream.read(LIST_BYTES + 1)
                objects = objects_of(self._text)
        except OSError as error:
            raise LoaderError(f"--from-file {why(error)}") from None
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error)[:200].split())
            hint = "give the output of `kubectl get ... -o json`"
            raise LoaderError(f"--from-file {self._path}: {reason}; {hint}") from None
        for item in objects:
            if item["kind"] != NODES.kind and not item["metadata"].get("namespace"):
                item["metadata"]["namespace"] = self._namespace
        return objects


def objects_of(text: bytes) -> list[dict[str, Json]]:
    """The objects of a file: single ones or lists (of lists), one after another; ValueError for
    anything else."""
    if len(text) > LIST_BYTES:
        raise ValueError(f"larger than {LIST_BYTES >> 20} MiB")
    whole, position, objects = text.decode("utf-8-sig"), 0, []
    decoder, solid = json.JSONDecoder(), re.compile(r"\S")
    while start := solid.search(whole, position):
        value, position = decoder.raw_decode(whole, start.start())
        objects += single_objects(json_object(value))
    if not position:  # a file that is just being rewritten; no objects at all is an empty List
        raise ValueError("is empty")
    return objects


def single_objects(value: dict[str, Json]) -> list[dict[str, Json]]:
    kind, items = text_at(value, "kind"), value.get("items") or []
    if not kind or (kind.endswith("List") and not isinstance(items, list)):
        raise ValueError("holds something that is not a Kubernetes object")
    if not kind.endswith("List"):
        return [value] if isinstance(value.get("metadata"), dict) else []
    one = {"kind": kind.removesuffix("List")}
    return [each for item in items for each in single_objects({**one, **json_object(item)})]


# -- label selectors --------------------------------------------------------------------------

# One requirement of a selector whose words are one space apart, which makes this linear.
REQUIREMENT = (
    r"((?:! )?)([A-Za-z0-9](?:[-._/A-Za-z0-9]*[A-Za-z0-9])?)"
    r"(?: (==?|!=)(?: ([-._A-Za-z0-9]+))?| (in|notin) \(((?: [-._A-Za-z0-9]+| ,)*) \))?(?: , |$)"
)
Requirement = tuple[str, Sequence[str] | None, bool]  # label, values (None: any), whether it holds


def requirements(selector: str) -> list[Requirement]:
    """A label selector as its requirements; UsageError for what is not one.

    The grammar of the Kubernetes page "Labels and Selectors": `a=b`, `a==b`, `a!=b`,
    `a in (b,c)`, `a notin (b,c)`, `a`, `!a`, with commas between.
    """
    text = " ".join(re.findall(r"[-._/A-Za-z0-9]+|[=!]=|\S", selector))
    found: list[Requirement] = []
    pattern, position = re.compile(REQUIREMENT), 0
    while position < len(text):
        match = pattern.match(text, position)
        if not match or (match[1] and (match[3] or match[5])):
            raise UsageError(f"{selector[:200]!r} is not a valid label selector")
        absent, label, operator, value, words, values = match.groups()
        chosen = None
        if operator or words:
            chosen = [word.strip() for word in (values or value or "").split(",")]
        found.append((label, chosen, not absent and operator != "!=" and words != "notin"))
        position = match.end()
    return found


def selects(wanted: Sequence[Requirement], labels: Mapping[str, Json]) -> bool:
    """Whether all requirements hold; like the API server, `!=` and `notin` match absence."""
    return all((label in labels if values is None else labels.get(label) in values) == holds
               for label, values, holds in wanted)


# ---------------------------------------------------------------------------------------------
# Objects
# ---------------------------------------------------------------------------------------------
#
# What the Kubernetes API gives, reduced to what is rendered: five thousand Services of ten
# endpoints are held at once. `*_from` read the raw JSON of one object. Null, absent and empty are
# the same there, as in Go's types; a wrong type or value raises ValueError that names the member.

HEALTHY, DRAINING, UNHEALTHY = range(3)  # of an endpoint, best first
IPV4, IPV6, FQDN = "ipv4", "ipv6", "fqdn"
SOCKET_FAMILIES = {IPV4: socket.AF_INET, IPV6: socket.AF_INET6}
TOPOLOGY_ZONE = "topology.kubernetes.io/zone"
SERVICE_NAME_LABEL = "kubernetes.io/service-name"
ROUTE_ANNOTATIONS = ("route", "hosts", "prefix", "grpc", "weight", "port")
DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
SURROGATES = "[\ud800-\udfff]"  # "\ud800" is valid JSON, and not valid UTF-8


class ServicePort(NamedTuple):
    """One port of a Service. `target` is a number, or the name of a container's port."""

    name: str
    number: int
    protocol: str
    app_protocol: str
    target: int | str

    @property
    def label(self) -> str:
        """What names the port in a cluster's name: its own name, else its number."""
        return self.name or str(self.number)


class Service(NamedTuple):
    """A Service. `external_name` is None unless its type is ExternalName; `family` is its first
    one. Of annotations that cannot be ours only the names are kept.
    """

    namespace: str
    name: str
    created: str
    ports: tuple[ServicePort, ...]
    headless: bool
    external_name: str | None
    family: str
    labels: dict[str, str]
    annotations: dict[str, str]


class Endpoint(NamedTuple):
    """One address of a slice: state, zone, node, and the zones that topology hints name."""

    address: str
    state: int
    zone: str
    node: str
    hints: tuple[str, ...]


class EndpointSlice(NamedTuple):
    """A slice of a Service's endpoints, all of one family, with ports (name, number or 0)."""

    namespace: str
    name: str
    service: str
    family: str
    ports: tuple[tuple[str, int], ...]
    endpoints: tuple[Endpoint, ...]


class Node(NamedTuple):
    """A Node, for the localities of the endpoints on it."""

    name: str
    labels: dict[str, str]


class Objects(NamedTuple):
    """All that is rendered. Unchanged values are the same objects from one call to the next."""

    services: Mapping[Key, Service]
    slices: Sequence[EndpointSlice]
    nodes: Mapping[str, Node]


def member(parent: Json, key: str, kind: type) -> Json:
    """The member of a raw object; null and absent are the kind's empty value.

    Strings are interned: zones, nodes and names of ports are few and are held thousands of times.
    """
    if type(parent) is not dict:
        raise ValueError(f"an object with {key} expected, not {type(parent).__name__}")
    value = parent.get(key)
    if value is None:
        return kind()
    if type(value) is not kind:
        raise ValueError(f"{key}: {kind.__name__} expected, not {type(value).__name__}")
    if type(value) is not str:
        return value
    if re.search(SURROGATES, value):
        raise ValueError(f"{key}: not a Unicode text: {value[:60]!a}")
    return sys.intern(value) if len(value) <= CACHED_LENGTH else value


def text_map(parent: Json, key: str) -> dict[str, str]:
    """Labels or annotations."""
    found = member(parent, key, dict)
    return {sys.intern(name): member(found, name, str) for name in found}


def port_number(parent: Json, key: str) -> int:
    """A port, 0 where there is none."""
    number: int = member(parent, key, int)
    if not 0 <= number <= 65535:
        raise ValueError(f"{key}: a port is between 1 and 65535")
    return number


def dns_label(parent: Json, key: str) -> str:
    """A DNS label: namespaces and names become file names, so nothing else may pass."""
    label: str = member(parent, key, str)
    if not re.fullmatch(DNS_LABEL, label):
        raise ValueError(f"{key}: not a DNS label: {label[:60]!a}")
    return label


def service_from(obj: Json) -> Service:
    """A v1 Service, reduced."""
    metadata, spec = member(obj, "metadata", dict), member(obj, "spec", dict)
    annotations = text_map(metadata, "annotations")
    for name in annotations:
        if name.rpartition("/")[2] not in ROUTE_ANNOTATIONS:
            annotations[name] = ""
    external = member(spec, "type", str) == "ExternalName"
    return Service(
        namespace=dns_label(metadata, "namespace"),
        name=dns_label(metadata, "name"),
        created=member(metadata, "creationTimestamp", str) or "~",  # not created yet: the youngest
        ports=tuple(service_port_from(port) for port in member(spec, "ports", list)),
        headless=member(spec, "clusterIP", str) == "None",
        external_name=member(spec, "externalName", str) if external else None,
        family=IPV6 if member(spec, "ipFamilies", list)[:1] == ["IPv6"] else IPV4,
        labels=text_map(metadata, "labels"),
        annotations=annotations,
    )


def service_port_from(port: Json) -> ServicePort:
    number = port_number(port, "port")
    if not number:
        raise ValueError("port: a Service port needs a number")
    name = dns_label(port, "name") if port.get("name") else ""
    target = port.get("targetPort")
    if type(target) is not str:
        target = port_number(port, "targetPort")
    protocol = member(port, "protocol", str) or "TCP"
    return ServicePort(name, number, protocol, member(port, "appProtocol", str), target or number)


def endpointslice_from(obj: Json) -> EndpointSlice:
    """A discovery.k8s.io/v1 EndpointSlice, reduced."""
    metadata, family = member(obj, "metadata", dict), member(obj, "addressType", str).lower()
    if family not in (IPV4, IPV6, FQDN):
        raise ValueError(f"addressType: not IPv4, IPv6 or FQDN: {family[:60]!a}")
    ports = [(member(each, "name", str), port_number(each, "port"))
             for each in member(obj, "ports", list)]
    return EndpointSlice(
        namespace=member(metadata, "namespace", str),
        name=member(metadata, "name", str),
        service=member(member(metadata, "labels", dict), SERVICE_NAME_LABEL, str),
        family=family,
        ports=tuple(ports),
        endpoints=tuple(endpoint for item in member(obj, "endpoints", list)
                        for endpoint in endpoint_from(item, family)),
    )


def endpoint_from(item: Json, family: str) -> Iterator[Endpoint]:
    """The addresses of one endpoint. Null is ready, and serving if it is ready: so the other two
    only matter where `ready` is false, and null is false there.
    """
    conditions = member(item, "conditions", dict)
    ready = conditions.get("ready") is None or member(conditions, "ready", bool)
    leaving = member(conditions, "serving", bool) and member(conditions, "terminating", bool)
    state = HEALTHY if ready else DRAINING if leaving else UNHEALTHY
    hints = member(member(item, "hints", dict), "forZones", list)
    zones = tuple(member(zone, "name", str) for zone in hints)
    zone, node = member(item, "zone", str), member(item, "nodeName", str)
    for address in member(item, "addresses", list):
        try:  # one that Envoy cannot parse would cost it the whole file
            if family != FQDN:
                socket.inet_pton(SOCKET_FAMILIES[family], address)
        except (OSError, TypeError, ValueError):
            text = str(address)[:60]
            raise ValueError(f"addresses: not an {family} address: {text!a}") from None
        yield Endpoint(str(address), state, zone, node, zones)


def endpoints_from(obj: Json) -> tuple[EndpointSlice, ...]:
    """A legacy v1 Endpoints object as slices: for each subset one of each family."""
    metadata = member(obj, "metadata", dict)
    own = {**metadata, "labels": {SERVICE_NAME_LABEL: member(metadata, "name", str)}}
    slices = []
    for subset in member(obj, "subsets", list) or [{}]:
        items = [{"addresses": [member(item, "ip", str)], "nodeName": item.get("nodeName"),
                  "conditions": {"ready": ready}}
                 for key, ready in (("addresses", True), ("notReadyAddresses", False))
                 for item in member(subset, key, list)]
        for family, colon in (("IPv4", False), ("IPv6", True)):
            endpoints = [item for item in items if (":" in item["addresses"][0]) == colon]
            raw = {"metadata": own, "ports": subset.get("ports"), "endpoints": endpoints}
            slices.append(endpointslice_from({**raw, "addressType": family}))
    return tuple(slices)


def node_from(obj: Json) -> Node:
    """A v1 Node, reduced."""
    metadata = member(obj, "metadata", dict)
    return Node(member(metadata, "name", str), text_map(metadata, "labels"))


# ---------------------------------------------------------------------------------------------
# --config
# ---------------------------------------------------------------------------------------------

# The fields of envoy.config.cluster.v3.Cluster, which Envoy would ignore in silence if they were
# misspelled; a test compares them with the protobuf descriptor.
CLUSTER_FIELDS = frozenset("""
    alt_stat_name circuit_breakers cleanup_interval close_connections_on_host_health_failure
    common_http_protocol_options common_lb_config connect_timeout dns_failure_refresh_rate
    connection_pool_per_downstream_connection dns_jitter dns_lookup_family dns_refresh_rate
    dns_resolution_config dns_resolvers filters health_checks http2_protocol_options
    http_protocol_options ignore_health_on_host_removal lb_policy lb_subset_config
    least_request_lb_config load_balancing_policy lrs_report_endpoint_metrics lrs_server
    maglev_lb_config max_requests_per_connection metadata original_dst_lb_config outlier_detection
    per_connection_buffer_limit_bytes preconnect_policy protocol_selection respect_dns_ttl
    ring_hash_lb_config round_robin_lb_config track_cluster_stats track_timeout_budgets
    transport_socket transport_socket_matcher transport_socket_matches typed_dns_resolver_config
    typed_extension_protocol_options upstream_bind_config upstream_config
    upstream_connection_options upstream_http_protocol_options use_tcp_for_dns_lookups
    wait_for_warm_on_init""".split())
# The loader's own fields, and what to use instead.
OWN_FIELDS = {
    "name": "use cluster.name, a template",
    "type": "use --endpoints, or endpoint.external_name for ExternalName Services",
    "cluster_type": "use --endpoints, or endpoint.external_name for ExternalName Services",
    "load_assignment": "endpoints come from EndpointSlices, see endpoint",
    "eds_cluster_config": "use --endpoints, and --output-dir for the path",
}
DNS_NAME = r"(?ia)(?!.*(?:\.\.|-\.|\.-))[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?"
NAME_TEMPLATE = r"[^{}]*(?:\{(?:namespace|service|port)\}[^{}]*)+"
CONFIG_DEPTH = 64  # of `base` and `merge`; protobuf's JSON ends at 100


class Config(NamedTuple):
    """What `--config` says; `cluster.name` is `cluster_name`, `endpoint.families` is `families`."""

    cluster_name: str = "{namespace}/{service}/{port}"
    cluster_base: Mapping[str, Json] = {}
    cluster_overrides: Sequence[Mapping[str, Json]] = ()
    trusted_ca: str = "/etc/ssl/certs/ca-certificates.crt"
    include_not_ready: bool = False
    families: Sequence[str] | None = None
    eds_budget: int | None = None
    prefer_zone: bool | str = False
    external_name: str = ""
    locality: Mapping[str, Mapping[str, Json]] = {}
    route_name: str = "services"
    route_suffix: str = "cluster.local"
    annotation_prefix: str = "xds-loader"
    cluster_domain: str = "cluster.local"


def is_text(value: Json) -> bool:
    """A string that is not empty, and that neither Envoy nor UTF-8 stumbles over."""
    return type(value) is str and value.isprintable() and value != ""


def is_dns_name(value: Json) -> bool:
    return type(value) is str and len(value) <= 253 and bool(re.fullmatch(DNS_NAME, value))


def depth_of(value: Json) -> int:
    items = value.values() if type(value) is dict else value if type(value) is list else ()
    return 1 + max(map(depth_of, items), default=0)


def is_json(value: Json) -> bool:
    """What Envoy can read: no NaN, no lone surrogates, and not too deep."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        return depth_of(value) <= CONFIG_DEPTH
    except (ValueError, RecursionError):
        return False


ENVOY_JSON = f"JSON without NaN, of valid text, at most {CONFIG_DEPTH} deep"
# What is expected where, and how to tell.
RULES: dict[str, Callable[[Json], object]] = {
    "a string": is_text,
    "a DNS name": is_dns_name,
    "a string with {namespace}, {service} or {port}": lambda value: (
        is_text(value) and re.fullmatch(NAME_TEMPLATE, value)),
    "an absolute path": lambda value: is_text(value) and value.startswith("/"),
    "a whole number of EDS files": lambda value: type(value) is int and value >= 0,
    "true or false": lambda value: type(value) is bool,
    "true": lambda value: value is True,
    "a zone, true or false": lambda value: type(value) is bool or is_text(value),
    '"strict_dns" or "logical_dns"': lambda value: value in ("strict_dns", "logical_dns"),
    'a list of "ipv4", "ipv6" or both': lambda value: value in (
        [IPV4], [IPV6], [IPV4, IPV6], [IPV6, IPV4]),
    ENVOY_JSON: is_json,
    "one of label, literal and node_name": lambda value: len(value) == 1,
    "something to match (what is for every cluster belongs into base)": lambda value: (
        value and value.get("labels") != {}),
    "match, and one of merge and suppress": lambda value: (
        value.get("match") and ("merge" in value) != ("suppress" in value)),
}
# The schema: a rule, a list of items, (either this object, or that list), or an object with these
# keys ("*": any other; "": a rule for the whole).
PATCH_FIELDS = dict.fromkeys(CLUSTER_FIELDS, ENVOY_JSON)
PART = {"": "one of label, literal and node_name", "label": "a string", "literal": "a string",
        "node_name": "true"}
MATCH = {"": "something to match (what is for every cluster belongs into base)",
         "cluster_name": "a string", "labels": {"*": "a string"}, "namespace": "a string",
         "port_name": "a string"}
OVERRIDE = {"": "match, and one of merge and suppress", "match": (MATCH, [MATCH]),
            "merge": PATCH_FIELDS, "suppress": "true"}
SCHEMA = {
    "cluster": {"base": PATCH_FIELDS, "name": "a string with {namespace}, {service} or {port}",
                "overrides": [OVERRIDE], "trusted_ca": "an absolute path"},
    "cluster_domain": "a DNS name",
    "endpoint": {"eds_budget": "a whole number of EDS files",
                 "external_name": '"strict_dns" or "logical_dns"',
                 "families": 'a list of "ipv4", "ipv6" or both',
                 "include_not_ready": "true or false",
                 "locality": {"region": PART, "sub_zone": PART, "zone": PART},
                 "prefer_zone": "a zone, true or false"},
    "route": {"annotation_prefix": "a DNS name", "name": "a string", "suffix": "a DNS name"},
}  # fmt: skip


def config_error(path: str, what: str) -> UsageError:
    return UsageError(f"--config: {path}: {what}")


def config_check(value: Json, schema: Json, path: str) -> None:
    """Raise UsageError with the JSON path of the first value that the schema does not allow."""
    if type(schema) is tuple:
        schema = schema[type(value) is list]
    expected = schema
    if type(schema) is dict:
        if type(value) is not dict:
            raise config_error(path, "an object expected")
        for key, item in value.items():
            where = f"{path}.{key}" if re.fullmatch(r"\w+", key) else f"{path}[{json.dumps(key)}]"
            rule = schema.get(key, schema.get("*")) if key else None
            if rule is None:
                raise config_error(where, wrong_key(key, schema))
            config_check(item, rule, where)
        expected = schema.get("", "")
    elif type(schema) is list:
        if type(value) is not list:
            raise config_error(path, "a list expected")
        for index, item in enumerate(value):
            config_check(item, schema[0], f"{path}[{index}]")
        return
    if expected and not RULES[expected](value):
        raise config_error(path, f"{expected} expected")


def wrong_key(key: str, schema: Mapping[str, Json]) -> str:
    if schema is not PATCH_FIELDS:
        return f"unknown key (one of {', '.join(sorted(name for name in schema if name))})"
    if key in OWN_FIELDS:
        return f"the loader's own: {OWN_FIELDS[key]}"
    snake = re.sub("([A-Z])", lambda match: "_" + match[1].lower(), key)
    return "not a field of Envoy's Cluster" + (f": write {snake}" if snake in schema else "")


def config_from(document: Json) -> Config:
    """Validate a parsed `--config`; raise UsageError with the JSON path of the first error."""
    config_check(document, SCHEMA, "$")
    chosen = {}
    for section, value in document.items():
        for key, item in value.items() if type(value) is dict else [(section, value)]:
            name = f"{section}_{key}"
            chosen[name if name in Config._fields else key] = item
    return Config(**chosen)


def unique_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """For json.loads(object_pairs_hook=): a key that is there twice would hide its first value."""
    found: dict[str, Json] = {}
    for key, value in pairs:
        if key in found:
            raise UsageError(f"--config: the key {json.dumps(key)} is there twice in one object")
        found[key] = value
    return found


def by_node_label(config: Config) -> bool:
    return any("label" in source for source in config.locality.values())


def needs_nodes(config: Config) -> bool:
    """Whether rendering looks at Nodes: only then must the loader be allowed to read them."""
    return config.prefer_zone is True or by_node_label(config)


def merge(into: Json, more: Json) -> Json:
    """JSON Merge Patch (RFC 7386), with two exceptions for what Envoy's messages are made of: lists
    append, and an object of another `@type` replaces the whole. Neither argument is changed.
    """
    if type(into) is list and type(more) is list:
        return into + more
    if type(more) is not dict:
        return more
    if type(into) is not dict:
        into = {}
    if "@type" in into and into["@type"] != more.get("@type", into["@type"]):
        into = {}
    merged = {key: value for key, value in into.items() if more.get(key, "") is not None}
    for key, value in more.items():
        if value is not None:
            merged[key] = merge(merged.get(key), value)
    return merged


# ---------------------------------------------------------------------------------------------
# Clusters, assignments, routes
# ---------------------------------------------------------------------------------------------

TYPE_PREFIX = "type.googleapis.com/"
CLUSTER_TYPE = f"{TYPE_PREFIX}envoy.config.cluster.v3.Cluster"
ASSIGNMENT_TYPE = f"{TYPE_PREFIX}envoy.config.endpoint.v3.ClusterLoadAssignment"
ROUTE_TYPE = f"{TYPE_PREFIX}envoy.config.route.v3.RouteConfiguration"
UPSTREAM_TLS_TYPE = f"{TYPE_PREFIX}envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
API_SERVER = ("default", "kubernetes")
EDS, INLINE, DNS, AUTO = "eds", "inline", "dns", "auto"

# Bounds of what one Service may ask for: whoever may annotate it is not trusted with the size of
# a file that Envoy reads on its main thread.
PORTS_MOST = 256
HOSTS_MOST = PREFIXES_MOST = 32
PREFIX_LENGTH, ANNOTATION_LENGTH = 255, 10_000
WEIGHT_MOST = 1_000_000
SPLIT_MOST = 1_000  # Services; Envoy rejects a file whose weights sum up to 2**32
NAMED_MOST = 5  # of what is wrong with one object, in the one line about it

# What reaches Envoy's own pod, whatever DNS says: names that the kubelet and images write into
# /etc/hosts, and each spelling of an IPv4 address that a resolver accepts (127.1, 0x7f000001).
LOCAL_NAME = r"(.*\.)?(localhost(\.localdomain)?|ip6-(localhost|loopback)|[0-9]+|0x[0-9a-f]*)"
# What Envoy accepts in a domain, but for `*80`, which would take `x.example:80` from its owner.
HOST_NAME = r"[a-z0-9_](?:-*[a-z0-9_]|\.(?=[a-z0-9_]))*"
ROUTE_HOST = rf"\*|(?:\*[.-])?{HOST_NAME}|{HOST_NAME}[.-]\*"
ROUTE_PREFIX = r"/(?:(?![?#])[!-~])*"
GRPC_SERVICE = r"(?a)[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"

# How Envoy speaks upstream to a port of an appProtocol, or of a name (up to its first dash).
HTTP2_PORTS = frozenset(("http2", "h2c", "grpc", "grpcs", "grpctls", "kubernetes.io/h2c"))
TLS_PORTS = frozenset(("https", "tls", "httptls", "grpcs", "grpctls", "kubernetes.io/wss"))
HTTP_PORTS = (HTTP2_PORTS | TLS_PORTS | {"http", "kubernetes.io/ws"}) - {"tls"}
ONLY_NAMES = frozenset(("tls", "httptls", "grpctls"))  # known as a port's name alone


class Cluster(NamedTuple):
    """One cluster to be: everything that does not depend on endpoints.

    `stem` names its EDS file. `host` is what DNS is asked for, and `number` the port there (0: a
    target port that only the slices know); empty where the endpoints come from slices.
    """

    name: str
    stem: str
    port: ServicePort
    families: Sequence[str]
    host: str
    number: int
    options: Mapping[str, Json]


class Route(NamedTuple):
    """What the annotations of a Service ask for. Without a cluster it claims its hosts, no more."""

    namespace: str
    name: str
    created: str
    hosts: Sequence[str]
    prefixes: Sequence[str] = ()
    weight: int | None = None
    cluster: str = ""


class ServicePlan(NamedTuple):
    """What one Service becomes; depends on it and on the configuration alone."""

    clusters: tuple[Cluster, ...]
    route: Route | None
    problems: tuple[str, ...]


def warning_line(key: Key, problems: Sequence[str]) -> str:
    """One line for one Service, whatever is wrong with it."""
    line = f"service {'/'.join(key)}: {'; '.join(problems[:NAMED_MOST])}"
    return line + (f"; and {len(problems) - NAMED_MOST} more" if problems[NAMED_MOST:] else "")


def first_of(items: Sequence[str]) -> str:
    """The first of some texts that somebody else wrote, and how many there are."""
    return f"{items[0][:60]!a}" + (f" and {len(items) - 1} more" if items[1:] else "")


def present(**members: Json) -> dict[str, Json]:
    """The members that are not empty."""
    return {name: value for name, value in members.items() if value}


def plan_service(service: Service, config: Config, endpoints: str) -> ServicePlan:
    """Plan one Service; what cannot be rendered is left out and named."""
    problems: list[str] = []
    clusters: list[Cluster] = []
    if not service.ports:
        problems.append("has no ports, so there is no cluster")
    elif problem := external_problem(service, config):
        problems.append(f"is left out: {problem}")
    else:
        known = [port for port in service.ports if port.protocol in ("TCP", "UDP")]
        if other := [port.label for port in service.ports if port.protocol not in ("TCP", "UDP")]:
            problems.append(f"port {first_of(other)} is left out: Envoy supports TCP and UDP")
        if len(known) > PORTS_MOST:
            problems.append(f"has {len(known)} ports; the first {PORTS_MOST} are rendered")
        found = [plan_cluster(service, port, config, endpoints) for port in known[:PORTS_MOST]]
        clusters = [cluster for cluster in found if cluster]
        if endpoints == DNS and clusters and not service.headless and service.external_name is None:
            problems.append("kube-proxy balances behind its one clusterIP, where --endpoints dns "
                            "needs a headless Service (clusterIP: None)")
    route = route_of(service, clusters, config, problems)
    return ServicePlan(tuple(clusters), route, tuple(problems))


def external_problem(service: Service, config: Config) -> str:
    """Why an ExternalName is not rendered; "" if it is, or if the Service has none."""
    if service.external_name is None:
        return ""
    name = service.external_name.removesuffix(".")
    if not config.external_name:
        return "ExternalName needs endpoint.external_name in --config"
    if not is_dns_name(name) or re.fullmatch(LOCAL_NAME, name.lower()):
        return f"externalName is not a DNS name, or local: {name[:60]!a}"
    return ""


def plan_cluster(service: Service, port: ServicePort, config: Config, endpoints: str
                 ) -> Cluster | None:
    """The cluster of a port; None where it is not wanted."""
    facts = {"cluster_name": cluster_name(config.cluster_name, service, port),
             "namespace": service.namespace, "port_name": port.label}
    overrides, by_name = [], False
    for override in config.cluster_overrides:
        match = override["match"]
        matches = [one for one in (match if type(match) is list else [match])
                   if one.get("labels", {}).items() <= service.labels.items()
                   and all(one.get(key, fact) == fact for key, fact in facts.items())]
        by_name = by_name or any("cluster_name" in one for one in matches)
        overrides += [override] if matches else []
    api_server = (service.namespace, service.name) == API_SERVER
    if (api_server and not by_name) or any("suppress" in override for override in overrides):
        return None
    families = config.families or (service.family,)
    host, number, kind = service_dns_name(service, config.cluster_domain), port.number, ""
    if service.external_name is not None:
        host, kind = service.external_name.removesuffix("."), config.external_name.upper()
    elif endpoints == DNS:
        kind = "STRICT_DNS"
        if service.headless:
            number = port.target if isinstance(port.target, int) else 0
    both, only = len(families) > 1, {IPV4: "V4_ONLY", IPV6: "V6_ONLY"}
    options: Json = {}
    if kind:
        options = {"type": kind, "dns_lookup_family": "ALL" if both else only[families[0]]}
    patches = [protocol_options(port, host, config.trusted_ca)]
    for patch in [config.cluster_base, *patches, *(override["merge"] for override in overrides)]:
        options = merge(options, patch)
    stem = f"{service.namespace}_{service.name}_{port.label}"
    return Cluster(
        facts["cluster_name"], stem, port, families, host if kind else "", number, options)


def cluster_name(template: str, service: Service, port: ServicePort) -> str:
    """The name of a cluster: the one function that CDS, EDS and RDS have it from."""
    parts = {"{namespace}": service.namespace, "{service}": service.name, "{port}": port.label}
    return re.sub(r"\{\w+\}", lambda match: parts[match[0]], template)


def service_dns_name(service: Service, domain: str) -> str:
    return f"{service.name}.{service.namespace}.svc.{domain}"


def protocol_of(port: ServicePort) -> str:
    """The name of a port's protocol: its appProtocol, else its name up to the first dash."""
    if port.protocol != "TCP":
        return ""
    found = port.app_protocol.lower() or port.name.partition("-")[0]
    unknown = found in ONLY_NAMES or found not in HTTP_PORTS
    return "http" if port.app_protocol and unknown else found


def protocol_options(port: ServicePort, host: str, trusted_ca: str) -> dict[str, Json]:
    """HTTP/2 and TLS upstream, as a patch: what `base` says beside them stays."""
    protocol, patch = protocol_of(port), dict[str, Json]()
    if protocol in HTTP2_PORTS:
        patch["typed_extension_protocol_options"] = {HTTP_OPTIONS: {
            "@type": TYPE_PREFIX + HTTP_OPTIONS,
            "auto_config": None, "use_downstream_protocol_config": None,
            "explicit_http_config": {"http_protocol_options": None, "http3_protocol_options": None,
                                     "http2_protocol_options": {}},
        }}
    if protocol in TLS_PORTS:
        names = [{"san_type": "DNS", "matcher": {"exact": host}}]
        validation = {"trusted_ca": {"filename": trusted_ca},
                      "match_typed_subject_alt_names": names}
        alpn = present(alpn_protocols=["h2"] if protocol in HTTP2_PORTS else [])
        patch["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {"@type": UPSTREAM_TLS_TYPE, "sni": host,
                             "common_tls_context": {**alpn, "validation_context": validation}},
        }
    return patch


def unique_clusters(
    plans: Mapping[Key, ServicePlan], by_age: Iterable[Key], problems: Mapping[Key, list[str]]
) -> dict[Key, list[Cluster]]:
    """Of two clusters of one name that of the oldest Service exists: with a name template without
    the namespace nobody takes another's. Envoy would use the last, in silence."""
    owners: dict[str, Key] = {}
    kept: dict[Key, list[Cluster]] = {key: [] for key in plans}
    for key in by_age:
        for cluster in plans[key].clusters:
            if cluster.name in owners:
                problems[key].append(f"port {cluster.port.label} is left out: service "
                                     f"{'/'.join(owners[cluster.name])} has a cluster of the same "
                                     f"name, {cluster.name}")
            else:
                owners[cluster.name] = key
                kept[key].append(cluster)
    return kept


# -- load assignments --------------------------------------------------------------------------

Place = tuple[int, tuple[str, str, str]]  # (priority, (region, zone, sub_zone))


class View(NamedTuple):
    """Where endpoints are seen from: `zone` is the own one, None where none is preferred."""

    config: Config
    zone: str | None
    nodes: Mapping[str, Node]

    def place(self, endpoint: Endpoint, hinted: bool) -> Place:
        """Priority and locality. `hinted`: the topology hints of its Service count."""
        node, sources = self.nodes.get(endpoint.node), self.config.locality
        region = locality_part(sources.get("region"), "", endpoint.node, node)
        zone = locality_part(sources.get("zone"), endpoint.zone, endpoint.node, node)
        sub_zone = locality_part(sources.get("sub_zone"), "", endpoint.node, node)
        near = self.zone in endpoint.hints if hinted and endpoint.hints else self.zone == zone
        return 0 if near or self.zone is None else 1, (region, zone, sub_zone)


def own_zone(config: Config, node_name: str, nodes: Mapping[str, Node]) -> str | None:
    """The zone to prefer; None: none, or the own Node is not known or has no zone."""
    if config.prefer_zone is not True:
        return config.prefer_zone or None
    node = nodes.get(node_name)
    default = node.labels.get(TOPOLOGY_ZONE, "") if node else ""
    return locality_part(config.locality.get("zone"), default, node_name, node) or None


def locality_part(source: Json, default: str, node_name: str, node: Node | None) -> str:
    if not source:
        return default
    if "label" in source:
        return node.labels.get(source["label"], "") if node else ""
    return node_name if "node_name" in source else str(source["literal"])


def assignment_of(cluster: Cluster, slices: Sequence[EndpointSlice], view: View) -> dict[str, Json]:
    """The ClusterLoadAssignment of a service port, joined with each slice by the port's name.

    Hints count only if all ready endpoints have them: Kubernetes gives none to one that
    terminates, which must not take them from the others at every rolling update.
    """
    used = [found for found in slices if found.family in cluster.families]
    ready = [each for found in used for each in found.endpoints if each.state == HEALTHY]
    hinted = bool(ready) and all(endpoint.hints for endpoint in ready)
    worst = UNHEALTHY if view.config.include_not_ready else DRAINING
    best: dict[tuple[int, bytes, int], tuple[int, Place, str]] = {}
    for found in used:
        rank, family = cluster.families.index(found.family), SOCKET_FAMILIES[found.family]
        numbers = {number for name, number in found.ports if number and name == cluster.port.name}
        for endpoint in found.endpoints if numbers else ():
            if endpoint.state <= worst:
                packed = socket.inet_pton(family, endpoint.address)
                seen = (endpoint.state, view.place(endpoint, hinted), endpoint.address)
                for key in [(rank, packed, number) for number in numbers]:
                    best[key] = min(best.get(key, seen), seen)
    nearest = min((place[0] for _, place, _ in best.values()), default=0)
    groups: dict[Place, list[Json]] = {}
    for (_, _, number), (state, place, address) in sorted(best.items()):
        groups.setdefault(place, []).append(
            lb_endpoint(address, number, cluster.port.protocol, state))
    localities = []
    for (priority, (region, zone, sub_zone)), endpoints in sorted(groups.items()):
        locality = present(region=region, zone=zone, sub_zone=sub_zone)
        where = present(locality=locality, priority=priority - nearest)
        localities.append({**where, "lb_endpoints": endpoints})
    return {"cluster_name": cluster.name, **present(endpoints=localities)}


def dns_assignment(cluster: Cluster, slices: Iterable[EndpointSlice]) -> dict[str, Json]:
    """One host name. A headless one resolves to pods, so it needs the port of the pods."""
    name = cluster.port.name
    numbers = {number for found in slices for key, number in found.ports if key == name and number}
    number = cluster.number or (numbers.pop() if len(numbers) == 1 else 0)
    endpoint = lb_endpoint(cluster.host, number, cluster.port.protocol, HEALTHY)
    localities = [{"lb_endpoints": [endpoint]}] if number else []
    return {"cluster_name": cluster.name, **present(endpoints=localities)}


def lb_endpoint(address: str, port: int, protocol: str, state: int) -> dict[str, Json]:
    where = {**present(protocol="UDP" if protocol == "UDP" else ""),
             "address": address, "port_value": port}
    health = {HEALTHY: "", DRAINING: "DRAINING", UNHEALTHY: "UNHEALTHY"}[state]
    return {"endpoint": {"address": {"socket_address": where}}, **present(health_status=health)}


def endpoint_problems(clusters: Sequence[Cluster], slices: Sequence[EndpointSlice]
                      ) -> Iterator[str]:
    """What of a Service's slices gives no endpoint although somebody meant it to."""
    if not slices:
        yield "has no EndpointSlice, so it has no endpoints"
    used = [found for found in slices if found.endpoints]
    for found in used:
        where = f"endpoints of slice {found.name} are left out"
        if found.family == FQDN:
            yield f"{where}: host names, where Envoy needs addresses"
        elif not found.ports:
            yield f"{where}: it has no ports"
        numberless = {name for name, number in found.ports if not number}
        for cluster in clusters:
            if cluster.port.name in numberless:
                yield f"{where}: its port {cluster.port.label} has no number"
    families = {found.family for found in used} - {FQDN}
    if families and not families & set(clusters[0].families):
        yield f"has only {min(families)} endpoints, which endpoint.families leaves out"


# -- routes ------------------------------------------------------------------------------------


def route_of(service: Service, clusters: Sequence[Cluster], config: Config, problems: list[str]
             ) -> Route | None:
    """What the annotations of a Service ask for; None if nothing. What is wrong is named.

    A Service that is not routed for another error still claims its hosts: a typing error must not
    hand a host over to the Service of another namespace.
    """
    ours = f"{config.annotation_prefix}/"
    given = {name.removeprefix(ours): value.strip()
             for name, value in service.annotations.items() if name.startswith(ours)}
    if unknown := sorted(given.keys() - set(ROUTE_ANNOTATIONS)):
        known = ", ".join(ROUTE_ANNOTATIONS)
        named = first_of([ours + name for name in unknown])
        problems.append(f"unknown annotation {named} (known: {known})")
        given = {name: value for name, value in given.items() if name not in unknown}
    if not given or given.get("route") == "false":
        return None
    route = Route(service.namespace, service.name, service.created, ())
    try:
        if any(len(value) > ANNOTATION_LENGTH for value in given.values()):
            raise ValueError(f"an annotation is longer than {ANNOTATION_LENGTH} characters")
        default = service_dns_name(service, config.route_suffix)
        hosts = comma_separated((given.get("hosts") or default).lower())
        wrong = {host: host_problem(host, service, config.route_suffix) for host in hosts}
        if bad := [host for host in hosts if wrong[host]]:
            problems.append(f"{ours}hosts: left out: {first_of(bad)}: {wrong[bad[0]]}")
        hosts = [host for host in hosts if not wrong[host]]
        route = route._replace(hosts=hosts[:HOSTS_MOST])
        if given.get("route", "true") != "true":
            raise ValueError(f'{ours}route: "true" or "false" expected')
        if not 0 < len(hosts) <= HOSTS_MOST:
            raise ValueError(f"{ours}hosts: 1 to {HOSTS_MOST} hosts expected, not {len(hosts)}")
        prefixes = route_prefixes(given, ours)
        port = route_port(service, given.get("port", ""), f"{ours}port")
        names = [cluster.name for cluster in clusters if cluster.port == port]
        if not names:
            raise ValueError(f"its port {port.label} has no cluster")
    except ValueError as error:
        problems.append(f"is not routed: {error}")
        return route
    weight, number = given.get("weight"), None
    if weight and re.fullmatch(r"[0-9]{1,7}", weight) and int(weight) <= WEIGHT_MOST:
        number = int(weight)
    elif weight is not None:
        problems.append(f"{ours}weight counts as none: {weight[:60]!a} is not 0 to {WEIGHT_MOST}")
    return route._replace(prefixes=prefixes, weight=number, cluster=names[0])


def comma_separated(text: str) -> list[str]:
    """The items of a comma-separated list, sorted, each once."""
    return sorted({word.strip() for word in text.split(",")} - {""})


def host_problem(host: str, service: Service, suffix: str) -> str:
    """Why a Service cannot have a host; "" if it can. Names of Services are their namespace's."""
    if len(host) > 253 or not re.fullmatch(ROUTE_HOST, host):
        return "not a valid host name (no port; * alone, or as in *.x, *-x, x.*, x-*)"
    ending, name = f".svc.{suffix}".lower(), host.removesuffix("*")
    head, _, tail = name.rpartition(".svc.")
    if host.endswith(ending):
        head = host.removesuffix(ending)
    elif name == host or not head or not ending.startswith(f".svc.{tail}"):
        return ""
    owner = head.rpartition(".")[2]
    return "" if owner == service.namespace else f"a name of namespace {owner[:63]}"


def route_prefixes(given: Mapping[str, str], ours: str) -> list[str]:
    """The path prefixes: gRPC services are prefixes of their own, else `/` is the default."""
    services = comma_separated(given.get("grpc", ""))
    for service in services:
        if len(service) > PREFIX_LENGTH or not re.fullmatch(GRPC_SERVICE, service):
            raise ValueError(f"{ours}grpc: not the name of a gRPC service: {service[:60]!a}")
    path = given.get("prefix", "") or ("" if services else "/")
    if path and (len(path) > PREFIX_LENGTH or not re.fullmatch(ROUTE_PREFIX, path)):
        raise ValueError(f"{ours}prefix: not the beginning of a path: {path[:60]!a}")
    found = sorted({f"/{service}/" for service in services} | ({path} if path else set()))
    if len(found) > PREFIXES_MOST:
        raise ValueError(f"{ours}grpc: at most {PREFIXES_MOST} prefixes, not {len(found)}")
    return found


def route_port(service: Service, wanted: str, where: str) -> ServicePort:
    """The port that was asked for, else the only one, else the first HTTP one."""
    ports = [port for port in service.ports if port.protocol == "TCP"]
    if wanted:
        chosen = [port for port in ports if wanted in (port.name, str(port.number))]
    else:
        chosen = ports if len(ports) == 1 else [
            port for port in ports if protocol_of(port) in HTTP_PORTS]
    if not chosen and wanted:
        raise ValueError(f"{where}: the Service has no TCP port {wanted[:60]!a}")
    if not chosen:
        raise ValueError(f"which of its ports is HTTP? Set appProtocol or {where}")
    return chosen[0]


def routes_by_host(routes: Iterable[Route], problems: Mapping[Key, list[str]]
                   ) -> dict[str, list[Route]]:
    """The routes of each host, in the order of names.

    A host belongs to the namespace of the oldest Service that claims it; others are named.
    """
    owners: dict[str, str] = {}
    for route in sorted(routes, key=lambda route: (route.created, *route[:2])):
        for host in route.hosts:
            owners.setdefault(host, route.namespace)
    found: dict[str, list[Route]] = {}
    for route in routes:
        for host in route.hosts:
            if owners[host] != route.namespace:
                problems[route[:2]].append(
                    f"is not routed at {host}: an older Service of namespace {owners[host]} has it")
            elif route.cluster:
                found.setdefault(host, []).append(route)
    return found


def shares(weights: Sequence[int | None]) -> list[int]:
    """The weights of a split. Who has none takes what the others leave of 100: equal parts in whole
    numbers, the first ones one more where it does not divide. If nobody has one, all are equal.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return [1] * len(weights)
    rest, without = max(0, 100 - sum(given)), len(weights) - len(given)
    parts = iter([rest // without + (i < rest % without) for i in range(without)])
    return [next(parts) if weight is None else weight for weight in weights]


def virtual_host(host: str, routes: Sequence[Route]) -> tuple[Json, list[tuple[Key, str]]]:
    """The virtual host of a host, its routes from most to least specific; Services that share a
    prefix split it. What is wrong is named for the first Service concerned.
    """
    rendered, problems, prefixes = [], [], dict[str, list[Route]]()
    for route in routes:
        for prefix in route.prefixes:
            prefixes.setdefault(prefix, []).append(route)
    for prefix in sorted(prefixes, key=lambda prefix: (-len(prefix), prefix)):
        members = prefixes[prefix][:SPLIT_MOST]
        weights = shares([route.weight for route in members])
        split = [{"name": route.cluster, "weight": weight}
                 for route, weight in zip(members, weights, strict=True)]
        if not any(weights):
            problems.append((members[0][:2], f"{host}{prefix} has no route: all weights are 0"))
            continue
        if 0 < [route.weight for route in members].count(None) < len(members):
            text = ", ".join(f"{one['name']} {one['weight']}" for one in split[:NAMED_MOST])
            note = f"{host}{prefix} is split by weight and remainder: {text}"
            problems.append((members[0][:2], note))
        action = {"weighted_clusters": {"clusters": split}} if members[1:] else {
            "cluster": members[0].cluster}
        rendered.append({"match": {"prefix": prefix}, "route": action})
    domains = [host] if "*" in host else [host, f"{host}:*"]
    return {"name": host, "domains": domains, **present(routes=rendered)}, problems


# ---------------------------------------------------------------------------------------------
# Writing and rendering
# ---------------------------------------------------------------------------------------------

# What every YAML parser, of 1.1 or 1.2, reads as the string that it is: names, paths, IPv4
# addresses, durations. Everything else is quoted as in JSON, in one line.
PLAIN_SCALAR = (
    r"(?ia)(?!(?:y|n|yes|no|on|off|true|false|null|nan|inf|infinity)\Z)"
    r"[a-z_/][a-z0-9_./-]*\Z|[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+\Z|[0-9]+s\Z"
)
# What JSON's quoting leaves as it is, and YAML takes for a line break or rejects.
UNPRINTABLE = "[\x7f-\xa0\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]"
CACHED_LENGTH = 128  # of a text: 4,096 of them are small, whatever a Service holds
COMPACT_JSON = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
# A file that response() wrote in YAML: its head, and the resources.
OUR_YAML = (
    rb'((?:# .*\n)++version_info: "[0-9a-f]{16}"\ntype_url: \S++\n)'
    rb"resources:(?: \[\]\n|\n((?:(?:- |  ).*\n)++))"
)

SERVICES_SOURCE = "services"  # of every rendered file
MAX_USER_INSTANCES = "/proc/sys/fs/inotify/max_user_instances"
MADE_BY = "Rendered by envoy-xds-configmap-loader, which overwrites changes."
CDS_COMMENT = f"Clusters: one for each port of each Service.\n{MADE_BY}"
RDS_COMMENT = f"Routes: from the annotations {{prefix}}/... of Services.\n{MADE_BY}"


def yaml_text(text: str) -> str:
    """A string, in the one way that cannot be misread."""
    return cached_yaml_text(text) if len(text) <= CACHED_LENGTH else any_yaml_text(text)


def any_yaml_text(text: str) -> str:
    if re.match(PLAIN_SCALAR, text):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub(UNPRINTABLE, lambda match: f"\\u{ord(match[0]):04x}", quoted)


cached_yaml_text = functools.lru_cache(maxsize=4096)(any_yaml_text)  # keys and names repeat


def yaml_scalar(value: Json) -> str:
    """A scalar or an empty collection."""
    if type(value) is str:
        return yaml_text(value)
    text = str(value) if type(value) is int else json.dumps(value)
    return text.replace("e", ".0e") if type(value) is float and "." not in text else text


def yaml_lines(value: Json, indent: str, lines: list[str]) -> None:
    """Append the lines of a collection that is not empty, in block style."""
    if type(value) is dict:
        for key, item in value.items():
            if item and type(item) in (dict, list):
                lines.append(f"{indent}{yaml_text(key)}:")
                yaml_lines(item, indent + "  " if type(item) is dict else indent, lines)
            else:
                lines.append(f"{indent}{yaml_text(key)}: {yaml_scalar(item)}")
        return
    for item in value:
        if item and type(item) in (dict, list):
            first = len(lines)
            yaml_lines(item, indent + "  ", lines)
            lines[first] = f"{indent}- {lines[first][len(indent) + 2 :]}"
        else:
            lines.append(f"{indent}- {yaml_scalar(item)}")


def element(fmt: str, value: Json, indent: str = "") -> bytes:
    """One element of a list that is written at the indent: "yaml" for people, "json" for Envoy,
    which reads it five times faster.
    """
    if fmt == "json":
        return COMPACT_JSON.encode(value).encode()
    lines: list[str] = []
    yaml_lines([value], indent, lines)
    return ("\n".join(lines) + "\n").encode()


def response(fmt: str, comment: str, type_url: str, resources: Sequence[bytes]) -> bytes:
    """A DiscoveryResponse of resources that element() wrote. Its version is their hash."""
    if fmt == "json":
        return b'{"version_info":"%s","type_url":"%s","resources":[\n%s\n]}\n' % (
            hash_of(resources), type_url.encode(), b",\n".join(resources))
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return join_rendered(f'{head}version_info: ""\ntype_url: {type_url}\n'.encode(), resources)


def resource_file(fmt: str, comment: str, type_url: str, resources: Sequence[Json]) -> bytes:
    """A whole file of resources in JSON's types."""
    return response(fmt, comment, type_url, [element(fmt, resource) for resource in resources])


def hash_of(resources: Sequence[bytes]) -> bytes:
    return hashlib.sha256(b"".join(resources)).hexdigest()[:16].encode()


def split_rendered(content: bytes) -> tuple[bytes, list[bytes]] | None:
    """Head and resources of a YAML file that response() wrote; None if somebody else did."""
    found = re.fullmatch(OUR_YAML, content)
    return (found[1], re.split(rb"(?m)^(?=- )", found[2] or b"")[1:]) if found else None


def join_rendered(head: bytes, resources: Sequence[bytes]) -> bytes:
    """The reverse of split_rendered(), with a version of its own."""
    version = b'version_info: "%s"\n' % hash_of(resources)
    head = re.sub(rb'(?m)^version_info: ".*"\n', version, head, count=1)
    return head + b"resources:" + (b"\n" + b"".join(resources) if resources else b" []\n")


def eds_clusters(files: Files) -> set[str]:
    """The clusters that are on EDS in the files that a loader left: `on_eds` of a Renderer."""
    return rendered_clusters(files, "EDS")


def inline_clusters(files: Files) -> set[str]:
    """The clusters with endpoints in CDS itself: `on_inline` of a Renderer."""
    return rendered_clusters(files, "STATIC")


def rendered_clusters(files: Files, kind: str) -> set[str]:
    """The names of the clusters of a type in our own CDS, whatever a ConfigMap has in its place."""
    found: list[Json] = []
    try:
        if "cds.json" in files:
            document = parse_json(files["cds.json"].content)
            found = [(one["type"], one["name"]) for one in document["resources"]]
        elif "cds.yaml" in files:
            for resource in (split_rendered(files["cds.yaml"].content) or (b"", []))[1]:
                name, type_ = [row.partition(b": ")[2] for row in resource.split(b"\n")[1:3]]
                text = json.loads(name) if name[:1] == b'"' else name.decode()
                found.append((type_.decode(), text))
        return {name for type_, name in found if type_ == kind}
    except (ValueError, LookupError, TypeError):
        return set()


def inotify_budget() -> int:
    """How many EDS files are safe: a sixteenth of the instances that a user may have on this node.

    Each is an inotify instance to Envoy, two while its cluster warms, and all Envoys of one user
    on the node share the limit. Envoy aborts when it is passed.
    """
    try:
        with open(MAX_USER_INSTANCES, encoding="ascii") as file:
            return int(file.read()) // 16
    except (OSError, ValueError):
        return 128 // 16  # the kernel's default


class Memo:
    """Results of a function by key, each as long as its arguments are equal; unchanged ones are the
    same objects, so comparing ends at their identity. What was not asked for between two calls of
    `forget` is forgotten.
    """

    def __init__(self, function: Callable[..., Json]) -> None:
        self._function = function
        self._old: dict[object, tuple[object, Json]] = {}
        self._new: dict[object, tuple[object, Json]] = {}

    def get(self, key: object, *arguments: object) -> Json:
        found = self._new.get(key) or self._old.get(key)
        if found is None or found[0] != arguments:
            found = (arguments, self._function(*arguments))
        self._new[key] = found
        return found[1]

    def forget(self) -> None:
        self._old, self._new = self._new, {}


class Rendering(NamedTuple):
    """What all objects give. `inlined`: clusters in CDS because the EDS budget is spent."""

    files: dict[str, File]
    warnings: tuple[str, ...]
    clusters: dict[str, int]
    inlined: tuple[str, ...]


class Renderer:
    """Renders Services again and again; a change in one of them renders that one.

    `endpoints` is the mode, `fmt` "yaml" or "json", `current_dir` the absolute path under which
    Envoy reads, `budget` as inotify_budget() has it. `on_eds` and `on_inline` are the clusters
    that the files on disk had in that mode when the loader started: they stay, within the budget.
    """

    def __init__(
        self, config: Config, *, endpoints: str, fmt: str, current_dir: str, node_name: str,
        budget: int, on_eds: Iterable[str] = (), on_inline: Iterable[str] = (),
    ) -> None:
        if config.prefer_zone is True and not node_name:
            raise config_error(
                "$.endpoint.prefer_zone", "true needs the name of the own Node in $NODE_NAME")
        self._config, self._endpoints, self._fmt = config, endpoints, fmt
        self._directory, self._node_name = current_dir.rstrip("/"), node_name
        self._budget = budget if config.eds_budget is None else config.eds_budget
        kept = dict.fromkeys(sorted(on_eds)[: self._budget], EDS)
        # Without one EDS file what is on disk was no decision of `auto`.
        self._modes = dict.fromkeys(on_inline, INLINE) | kept if kept else {}
        self._services: Mapping[Key, Service] | None = None
        self._clusters: dict[Key, list[Cluster]] = {}
        self._routes = b""
        self._plan_warnings: list[str] = []
        self._plans = Memo(lambda service: plan_service(service, config, endpoints))
        self._hosts, self._rendered = Memo(self._host), Memo(self._service)
        self._files = Memo(self._file)

    def render(self, objects: Objects, other_files: int = 0) -> Rendering:
        """Render all; `other_files` EDS, RDS and SDS files of other sources share the budget."""
        if objects.services != self._services:
            self._plan(dict(sorted(objects.services.items())), other_files)
        config, warnings = self._config, list(self._plan_warnings)
        zone = own_zone(config, self._node_name, objects.nodes)
        if zone is None and config.prefer_zone:
            warnings.append(f"node {self._node_name}: is not known or has no zone: "
                            f"endpoint.prefer_zone prefers none")
        slices: dict[Key, list[EndpointSlice]] = {}
        for found in objects.slices:
            slices.setdefault((found.namespace, found.service), []).append(found)
        files: dict[str, File] = {}
        resources: list[bytes] = []
        labels, counts = by_node_label(config), Counter[str]()
        for key, clusters in self._clusters.items():
            own, nodes = slices.get(key, []), dict[str, Node | None]()
            if labels:
                names = {endpoint.node for found in own for endpoint in found.endpoints}
                nodes = {name: objects.nodes[name] for name in names & objects.nodes.keys()}
            modes = [self._modes.get(cluster.name, DNS) for cluster in clusters]
            counts.update(modes)
            texts, eds, problems = self._rendered.get(key, key, clusters, modes, own, zone, nodes)
            resources += texts
            files |= eds
            if problems:
                warnings.append(warning_line(key, problems))
        self._rendered.forget()
        comment = RDS_COMMENT.format(prefix=config.annotation_prefix)
        for path, *parts in (("cds", CDS_COMMENT, CLUSTER_TYPE, resources),
                             ("rds", comment, ROUTE_TYPE, [self._routes])):
            files[f"{path}.{self._fmt}"] = self._files.get(path, *parts)
        inlined = [name for name, mode in self._modes.items() if mode == INLINE]
        return Rendering(files, tuple(sorted(warnings)),
                         {mode: counts[mode] for mode in (EDS, INLINE, DNS)},
                         tuple(inlined) if self._endpoints == AUTO else ())

    def _plan(self, services: dict[Key, Service], other_files: int) -> None:
        """What follows from the Services alone: which clusters exist, their modes, the routes."""
        plans = {key: self._plans.get(key, service) for key, service in services.items()}
        problems = {key: list(plan.problems) for key, plan in plans.items()}
        by_age = sorted(plans, key=lambda key: (services[key].created, key))
        kept = unique_clusters(plans, by_age, problems)
        names = [one.name for clusters in kept.values() for one in clusters if not one.host]
        self._modes, self._clusters = self._decided(names, other_files), kept
        routes = []
        for key, plan in plans.items():
            if not plan.route:
                continue
            there = plan.route.cluster in [cluster.name for cluster in kept[key]]
            routes.append(plan.route if there else plan.route._replace(cluster=""))
            if plan.route.cluster and not there:
                problems[key].append("is not routed: it has no cluster of its own")
        hosts, elements = routes_by_host(routes, problems), []
        for host in sorted(hosts):
            text, found = self._hosts.get(host, host, hosts[host])
            elements.append(text)
            for key, problem in found:
                problems[key].append(problem)
        self._routes = self._route_configuration(elements)
        self._plan_warnings = [warning_line(key, problems[key]) for key in plans if problems[key]]
        if not services:
            self._plan_warnings = ["--services: no Service matches the selector"]
        self._plans.forget()
        self._hosts.forget()
        self._services = services

    def _decided(self, names: Sequence[str], other_files: int) -> dict[str, str]:
        """The mode of each cluster by slices: once decided it stays as long as the cluster lives.

        A cluster that flips would be a new one to Envoy, with new connections and health.
        """
        if self._endpoints != AUTO:
            return dict.fromkeys(names, self._endpoints)
        decided = {name: self._modes[name] for name in names if name in self._modes}
        free = self._budget - sum(mode == EDS for mode in decided.values())
        free -= other_files if self._config.eds_budget is None else 0
        new = [name for name in names if name not in decided]
        decided |= dict.fromkeys(new, INLINE) | dict.fromkeys(new[: max(0, free)], EDS)
        return {name: decided[name] for name in names}

    def _host(self, host: str, routes: list[Route]) -> tuple[bytes, list[tuple[Key, str]]]:
        found, problems = virtual_host(host, routes)
        return element(self._fmt, found, "  "), problems

    def _route_configuration(self, virtual_hosts: Sequence[bytes]) -> bytes:
        """The RouteConfiguration, of virtual hosts that were written before."""
        head = element(self._fmt, {"@type": ROUTE_TYPE, "name": self._config.route_name})
        if not virtual_hosts:
            return head
        if self._fmt == "json":
            return b'%s,"virtual_hosts":[\n%s\n]}' % (head[:-1], b",\n".join(virtual_hosts))
        return b"%s  virtual_hosts:\n%s" % (head, b"".join(virtual_hosts))

    def _service(
        self, key: Key, clusters: Sequence[Cluster], modes: Sequence[str],
        slices: Sequence[EndpointSlice], zone: str | None, nodes: Mapping[str, Node],
    ) -> tuple[list[bytes], dict[str, File], list[str]]:
        """One Service: its clusters in CDS, its EDS files, and what is wrong with its endpoints."""
        by_slices = [cluster for cluster in clusters if not cluster.host]
        problems = list(endpoint_problems(by_slices, slices)) if by_slices else []
        resources, files = [], {}
        for cluster, mode in zip(clusters, modes, strict=True):
            resource: dict[str, Json] = {"@type": CLUSTER_TYPE, "name": cluster.name, "type": "EDS"}
            if mode == DNS:
                assignment = dns_assignment(cluster, slices)
                if "endpoints" not in assignment:
                    problems.append(f"the number of its target port {cluster.port.target} is not "
                                    f"known, so there is no endpoint")
            else:
                assignment = assignment_of(cluster, slices, View(self._config, zone, nodes))
            if mode == EDS:
                path = f"eds/{cluster.stem}.{self._fmt}"
                comment = f"Endpoints of service {'/'.join(key)}, port {cluster.port.label}.\n"
                text = element(self._fmt, {"@type": ASSIGNMENT_TYPE, **assignment})
                files[path] = self._file(comment + MADE_BY, ASSIGNMENT_TYPE, [text])
                resource["eds_cluster_config"] = {"eds_config": {
                    "resource_api_version": "V3",
                    "path_config_source": {"path": f"{self._directory}/{path}"}}}
            else:
                resource |= {"type": "STATIC", "load_assignment": assignment}
            resources.append(element(self._fmt, {**resource, **cluster.options}))
        return resources, files, problems

    def _file(self, comment: str, type_url: str, resources: list[bytes]) -> File:
        return file_of(response(self._fmt, comment, type_url, resources), SERVICES_SOURCE)


# ---------------------------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------------------------
#
# A TLS Secret becomes SDS files, one for the pair and one for the trusted CA: Envoy accepts one
# resource a file. The PEM is inline, so that certificate and key are replaced at once. No text made
# here (error, problem, repr, redaction) has a byte of a key in it.

SDS_TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
NAME_PART = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
OBJECT_NAME = rf"(?=.{{1,253}}\Z){NAME_PART}(?:\.{NAME_PART})*"  # an RFC 1123 subdomain
# OpenSSL's reasons for a key of another certificate: of the same type; of another one.
KEY_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
FILE_NAME_BYTES = 255  # NAME_MAX of every file system that we know
SECRET_KEYS = ("tls.crt", "tls.key", "ca.crt")


class Secret(NamedTuple):
    """What a Secret holds for Envoy: PEM bytes, empty where the key is absent."""

    namespace: str
    name: str
    cert: bytes  # tls.crt: the leaf first, then its intermediates
    key: bytes  # tls.key
    ca: bytes  # ca.crt

    def __repr__(self) -> str:  # without the bytes, for messages and tracebacks
        return f"Secret({self.namespace}/{self.name})"


def secret_from(obj: Json) -> Secret:
    """Reduce an API object to what is used of it; ValueError, without content, for what is not a
    valid Secret. The raw object must not be kept: an annotation often holds the key again."""
    metadata, held = json_object(obj.get("metadata")), json_object(obj.get("data"))
    namespace, name = str(metadata.get("namespace", "")), str(metadata.get("name", ""))
    if not (re.fullmatch(OBJECT_NAME, namespace) and re.fullmatch(OBJECT_NAME, name)):
        raise ValueError("a secret without a valid namespace and name")
    label = f"secret {namespace}/{name}"
    entries = (decode_key(held.get(entry), f"{label}: {entry}") for entry in SECRET_KEYS)
    return Secret(namespace, name, *entries)


def decode_key(text: Json, what: str) -> bytes:
    """Base64 as Go reads it (line breaks do not count), b"" for an absent or null key."""
    try:
        return base64.b64decode((text or "").replace("\r", "").replace("\n", ""), validate=True)
    except (AttributeError, ValueError):  # not chained: the text of the cause may quote it
        raise ValueError(f"{what} is not base64") from None


def secret_files(secret: Secret, form: str = "yaml",
                 mode: int = 0o600) -> tuple[dict[str, File], tuple[str, ...]]:
    """The SDS files of a Secret, by path in the snapshot, and what is wrong with it: then there are
    none, and the caller keeps the last ones, all of them."""
    label = f"{secret.namespace}/{secret.name}"
    stem = f"sds/{secret.namespace}_{secret.name}"  # no object name has `_`: it is unambiguous
    problems = secret_problems(secret)
    if len(f"{stem}_ca.{form}") - len("sds/") > FILE_NAME_BYTES:
        problems.append("the name is too long for a file name")
    if problems:
        return {}, tuple(f"secret {label}: {problem}" for problem in problems)
    resources: dict[str, dict[str, Json]] = {}
    if secret.cert:
        pair = {"certificate_chain": pem_source(secret.cert), "private_key": pem_source(secret.key)}
        resources[f"{stem}.{form}"] = {"@type": SDS_TYPE, "name": label, "tls_certificate": pair}
    if secret.ca:
        trusted = {"validation_context": {"trusted_ca": pem_source(secret.ca)}}
        resources[f"{stem}_ca.{form}"] = {"@type": SDS_TYPE, "name": f"{label}/ca", **trusted}
    source = f"secret {label}"
    return {path: file_of(resource_file(form, source, SDS_TYPE, [resource]), source, mode)
            for path, resource in resources.items()}, ()


def pem_source(pem: bytes) -> dict[str, str]:
    """A DataSource of exactly these bytes: text where every parser reads the same, else base64."""
    if re.fullmatch(rb"[\n -~]*", pem):
        return {"inline_string": pem.decode("ascii")}
    return {"inline_bytes": base64.b64encode(pem).decode("ascii")}


def secret_problems(secret: Secret) -> list[str]:
    """Why this Secret must not be published: whatever Envoy would reject, as far as the standard
    library can tell, and nothing that Envoy would accept."""
    cert, key, ca = secret.cert, secret.key, secret.ca
    if not (cert or key or ca):
        return ["none of the keys tls.crt, tls.key and ca.crt is there or has a value"]
    problems: list[str] = []
    if bool(cert) != bool(key):
        there, absent = ("tls.crt", "tls.key") if cert else ("tls.key", "tls.crt")
        problems.append(f"{there} without {absent}")
    for entry, pem in (("tls.crt", cert), ("ca.crt", ca)):
        if pem and (problem := certificates_problem(pem)):
            problems.append(f"{entry} {problem}")
    if cert and not problems and (problem := pair_problem(cert, key)):
        problems.append(f"tls.key {problem}")
    return problems


def certificates_problem(pem: bytes) -> str:
    """What is wrong with a chain or with a bundle of CAs, "" if nothing. Text around the blocks is
    a comment."""
    if b"PRIVATE KEY-----" in pem:  # Envoy's /config_dump redacts private_key, not this field
        return "holds a private key, which belongs into tls.key alone"
    parts = pem.split(b"-----BEGIN CERTIFICATE-----")[1:]
    context = tls_context()
    try:
        for part in parts:
            body, end, _ = part.partition(b"-----END CERTIFICATE-----")
            if not end:
                return "is not readable (a PEM block has no end)"
            der = base64.b64decode(b"".join(body.split()), validate=True)
            context.load_verify_locations(cadata=der)
    except (ssl.SSLError, ValueError):  # ValueError: an empty block, or one that is not base64
        return "is not readable (a PEM block is not an X.509 certificate)"
    return "" if parts else "holds no PEM certificate"


def pair_problem(cert: bytes, key: bytes) -> str:
    """What is wrong with the key of a certificate, "" if nothing.

    OpenSSL reads pairs from files only: anonymous memory has a name in /proc, and the key touches
    no disk. Where there is none (macOS) Envoy judges the pair itself.
    """
    descriptors: list[int] = []
    try:
        for pem in (cert, key):
            descriptors.append(os.memfd_create("pem"))
            with open(descriptors[-1], "wb", closefd=False) as file:
                file.write(pem)
        names = [f"/proc/self/fd/{descriptor}" for descriptor in descriptors]
        # Without a passphrase OpenSSL would prompt on the terminal and block the loader.
        tls_context().load_cert_chain(names[0], names[1], password="")
    except ssl.SSLError as error:
        if error.reason in KEY_MISMATCHES:
            return "is not the key of the first certificate in tls.crt"
        if b"ENCRYPTED" in key:
            return "is encrypted, and Envoy is given no passphrase"
        return "is not readable as a PEM private key"
    except (OSError, AttributeError):  # after SSLError, which is an OSError
        return ""
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return ""


def tls_context() -> ssl.SSLContext:
    """A context that judges form and not strength: Envoy decides what is too weak."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


def holds_secret(content: bytes) -> bool:
    """Whether a file must not be shown: an SDS resource from whatever source, a private key, or PEM
    in base64."""
    marks = (b"PRIVATE KEY-----", b"transport_sockets.tls.v3.Secret", b"LS0tLS1CRUdJTi")
    return any(mark in content for mark in marks)


def redacted(content: bytes, published: bytes | None = None) -> bytes:
    """The content to print: itself, or a line in its place, without a hash, by which guesses could
    be tested. With `published`, the bytes on disk, it tells whether they differ."""
    if not holds_secret(content):
        return content
    differs = published is not None and published != content
    return f"# [redacted: {len(content)} bytes{', changed' if differs else ''}]\n".encode()


def no_core_dumps() -> None:
    """Keep keys out of core files. (Not 0, which does not hold where core_pattern is a pipe.)"""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard != 0:  # 0 is all that is left to set where somebody forbade them before us
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


# ---------------------------------------------------------------------------------------------
# Composing
# ---------------------------------------------------------------------------------------------

KEY_NAME = re.compile(r"(?!\.\Z)[-._a-zA-Z0-9]{1,253}")
ROUTE_MATCH = re.compile(rb'- match:|[{]"match":')


def key_problem(name: str) -> str:
    """Why a key (or a part of a path) cannot be a file name here; empty if it can.

    The API server checks keys, but --from-file and `..state` do not come from there, and nothing
    may ever leave the output directory. Names that begin with `..` are the loader's own.
    """
    if not KEY_NAME.fullmatch(name):
        return "is not a valid file name"
    return "begins with '..'" if name.startswith("..") else ""


class Keys(NamedTuple):
    """What a ConfigMap or a Secret is to us: files by key, and what in it cannot be one."""

    files: Mapping[str, File]
    problems: tuple[str, ...]


def configmap_from(item: dict[str, Any]) -> Keys:
    """Reduce a ConfigMap: `data` and `binaryData`, byte for byte. ValueError if it is none."""
    metadata = json_object(item.get("metadata"))
    source = f"configmap {metadata.get('namespace')}/{metadata.get('name')}"
    text, binary = item.get("data") or {}, item.get("binaryData") or {}
    if not isinstance(text, dict) or not isinstance(binary, dict):
        raise ValueError(f"{source}: data is not a map")
    files, problems = {}, []
    for key in sorted(text.keys() | binary.keys()):  # (values of any type have no order)
        problem = key_problem(key)
        try:
            content = text[key].encode() if key in text else decode_key(binary[key], key)
        except (AttributeError, ValueError):
            problem = "is not text" if key in text else "is not base64"
        if problem:
            problems.append(f"{source}: key {key[:80]!r} {problem}, left out")
        else:
            files[key] = file_of(content, source)
    return Keys(files, tuple(problems))


class Named(NamedTuple):
    """A ConfigMap or Secret that an option names, and the directory that its files go to."""

    kind: str  # "configmap" or "secret"
    namespace: str
    name: str
    directory: str = ""

    @property
    def source(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"

    @property
    def query(self) -> Query:
        resource = SECRETS if self.kind == "secret" else CONFIGMAPS
        return Query(resource, self.namespace, self.name)

    def owns(self, path: str, file: File) -> bool:
        """Whether a file found on disk came from here."""
        directory = path.rpartition("/")[0]
        return file.source == self.source and (self.kind == "secret" or directory == self.directory)


class Wanted(NamedTuple):
    """What the sources ask for now. Unless it is complete, nothing of it may be published."""

    files: Files
    notes: tuple[str, ...] = ()  # what is wrong with single objects
    missing: tuple[str, ...] = ()  # named objects that do not exist and never did
    stale: tuple[str, ...] = ()  # sources that keep their last files
    unknown: tuple[str, ...] = ()  # sources that were not listed yet
    failed: tuple[str, ...] = ()  # what a one-time run could not list

    @property
    def complete(self) -> bool:
        return not (self.unknown or self.missing or self.failed)


def overlaid(layers: Iterable[Files]) -> tuple[dict[str, File], list[str]]:
    """All files of the layers, the later ones winning, and a warning for each that lost.

    A file where another source has a directory cannot be on disk beside it: it is left out.
    """
    files: dict[str, File] = {}
    warnings = []
    for layer in layers:
        for path, file in layer.items():
            lost = files.get(path)
            if lost is not None and lost.source != file.source:
                warnings.append(f"{path} of {lost.source}{counted(lost)} is hidden by that of "
                                f"{file.source}")
            files[path] = file
    directories = {parent for path in files for parent in parents(path)}
    for path in sorted(directories & files.keys()):
        source = files.pop(path).source
        warnings.append(f"{path} of {source} left out: others have a directory there")
    return files, warnings


def counted(file: File) -> str:
    """How many clusters or routes a file has, in words, where it shows."""
    if file.kind == "cds" and (clusters := clusters_of(file)):
        return f" ({len(clusters.texts)} clusters)"
    return f" ({len(ROUTE_MATCH.findall(file.content))} routes)" if file.kind == "rds" else ""


def with_kind(path: str, file: File, before: File | None) -> File:
    """A file without a type URL is what was published there before, else what its name says.

    That is CDS with no cluster left, or a file that Envoy will not be able to parse.
    """
    stem = path.rpartition("/")[2].partition(".")[0]
    kind = file.kind or (before.kind if before else stem if stem in KINDS.values() else "")
    return file if file.kind == kind else file._replace(kind=kind)


class Sources:
    """All reflectors of a run, and the files that their objects make together."""

    def __init__(self, options: Options, config: Config, wake: Callable[[str, float], None]):
        self._options, self._config, self._wake = options, config, wake
        self._file = FileSource(options.from_file, options.namespace) if options.from_file else None
        self._reflectors: dict[Query, Reflector] = {}
        self._selected: Query | None = None
        self._kept: dict[Named, Files] = {}  # the last good files of each named object
        self._renderer: Renderer | None = None
        self.rendering: Rendering | None = None
        own = config.eds_budget
        self.budget = inotify_budget() if own is None else own

    def start(self, published: Files) -> None:
        """Start every reflector. What is published tells what sources had before a restart."""
        options = self._options
        for named in (*options.configmap, *options.secret):
            owned = {path: file for path, file in published.items() if named.owns(path, file)}
            if owned:
                self._kept[named] = owned
            self._reflect(named.query, self._secret if named.kind == "secret" else configmap_from)
        if options.configmap_selector is not None:
            self._selected = Query(CONFIGMAPS, options.namespace, labels=options.configmap_selector)
            self._reflect(self._selected, configmap_from)
        if options.services is None:
            return
        self._renderer = Renderer(
            self._config,
            endpoints=options.endpoints,
            fmt=options.format,
            current_dir=f"{os.path.abspath(options.output_dir)}/{CURRENT}",
            node_name=options.node_name,
            on_eds=eds_clusters(published),
            on_inline=inline_clusters(published),
            budget=self.budget,
        )
        namespaces = options.services_namespace or (options.namespace,)
        for namespace in ("",) if "*" in namespaces else namespaces:
            self._reflect(Query(SERVICES, namespace, labels=options.services), service_from)
            self._reflect(Query(ENDPOINTSLICES, namespace), endpointslice_from)
        if needs_nodes(self._config):
            # All for localities by label, else just the own one.
            own = "" if by_node_label(self._config) else options.node_name
            self._reflect(Query(NODES, name=own), node_from)

    def _secret(self, item: dict[str, Any]) -> Keys:
        form, mode = self._options.format, self._options.secret_mode
        return Keys(*secret_files(secret_from(item), form, mode))

    def _reflect(self, query: Query, parse: Callable[[Json], Any]) -> None:
        if query in self._reflectors:
            return
        options = self._options
        mode, interval, patience = options.mode, options.sync_interval, BACKOFF_LAST
        if mode == "once" and options.timeout:
            mode, interval, patience = "poll", ONETIME_POLL, 2 * ONETIME_POLL
        elif self._file:
            patience = min(patience, interval)  # nobody is hammered
        self._reflectors[query] = reflector = Reflector(
            query, parse, self._file or Api(options.access, count_request), self._wake,
            mode=mode, interval=interval, optional=query.resource is ENDPOINTSLICES,
            patience=patience,
        )
        metrics.set("xds_loader_source_synced", 0, (str(query),))
        reflector.start()

    def refresh(self) -> None:
        """Ask every source again now."""
        for reflector in self._reflectors.values():
            reflector.refresh()

    def trouble(self) -> dict[str, str]:
        """What goes wrong now, by source."""
        return {str(r.query): r.trouble for r in self._reflectors.values() if r.trouble}

    def compose(self, published: Files) -> Wanted:
        """The files of all sources. Precedence, last wins: rendered files, Secrets, ConfigMaps by
        selector in order of name, ConfigMaps in the order in which they were named."""
        for query, reflector in list(self._reflectors.items()):
            if reflector.absent:  # the API server has no EndpointSlices
                self._reflect(Query(ENDPOINTS, query.namespace), endpoints_from)
        reflectors = self._reflectors.values()
        failed = tuple(r.trouble for r in reflectors if r.failed)
        unknown = tuple(str(r.query) for r in reflectors if not r.synced)
        if failed or unknown:
            return Wanted({}, unknown=unknown, failed=failed)
        notes: list[str] = [bad for r in reflectors for bad in r.bad.values()]
        missing: list[str] = []
        stale: list[str] = []
        layers = [self._named(named, notes, missing, stale) for named in self._options.secret]
        if self._selected is not None:
            found = self._reflectors[self._selected].objects()
            if not found:
                notes.append(f"{self._selected}: none exist")
            for _, configmap in sorted(found.items()):
                notes += configmap.problems
                layers.append(configmap.files)
        layers += [self._named(named, notes, missing, stale) for named in self._options.configmap]
        if self._renderer is not None:
            layers.insert(0, self._render(self._renderer, layers, notes))
        files, warnings = overlaid(layers)
        files = {path: with_kind(path, file, published.get(path)) for path, file in files.items()}
        return Wanted(files, (*notes, *warnings), tuple(missing), tuple(stale))

    def _named(
        self, named: Named, notes: list[str], missing: list[str], stale: list[str]
    ) -> Files:
        """The files of a named object; the last ones where it is gone, emptied or bad."""
        found = self._reflectors[named.query].objects().get((named.namespace, named.name))
        prefix = f"{named.directory}/" if named.directory else ""
        files = {prefix + key: file for key, file in found.files.items()} if found else {}
        notes += found.problems if found else ()
        kept = self._kept.get(named)  # None: it never was there
        if files or (found and not kept and named.kind == "configmap"):
            self._kept[named] = files
        elif kept is None:
            missing.append(named.source)
            if self._file and (hint := self._file.elsewhere(named.query)):
                notes.append(hint)
        else:
            state = "has no usable files" if found else "does not exist any more"
            notes.append(f"{named.source} {state}: its last files stay published")
            stale.append(named.source)
        return self._kept.get(named, {})

    def _render(self, renderer: Renderer, others: Sequence[Files], notes: list[str]) -> Files:
        """The files of Services, as many of them with EDS as the other files leave budget for."""

        def gathered(resource: Resource) -> dict[Key, Any]:
            return {key: value for query, reflector in self._reflectors.items()
                    if query.resource is resource for key, value in reflector.objects().items()}

        legacy = itertools.chain.from_iterable(gathered(ENDPOINTS).values())
        objects = Objects(
            services=gathered(SERVICES),
            slices=[*gathered(ENDPOINTSLICES).values(), *legacy],
            nodes={name: node for (_, name), node in gathered(NODES).items()},
        )
        kinds = {path: file.kind for layer in others for path, file in layer.items()}
        subscriptions = sum(kind in ("eds", "rds", "sds") for kind in kinds.values())
        self.rendering = renderer.render(objects, other_files=subscriptions)
        notes += self.rendering.warnings
        if self.rendering.inlined:
            notes.append(f"beyond the EDS budget of {self.budget}, endpoints are in CDS: "
                         f"{shortened(self.rendering.inlined)}")
        return self.rendering.files


def count_request(verb: str, code: str) -> None:
    metrics.add("xds_loader_api_requests_total", (code, verb))


# ---------------------------------------------------------------------------------------------
# Planning the steps
# ---------------------------------------------------------------------------------------------
#
# A route to a cluster that is not there yet answers 503, and so does a route to one that is gone
# already (measured: 547 and 709 of 76,000 requests). RDS, scoped RDS, ECDS and LDS are references:
# they name clusters, files or each other. With P published and D desired, the next snapshot is the
# first of these that differs from P:
#
#   children    P, and the files of D whose path is new
#   clusters    that, and every changed file that is no reference; CDS with old and new clusters
#   references  that, and the changed references
#   removals    D
#
# Each is complete and consistent, and they follow from what is published and what is desired, so a
# loader that was killed between two goes on where it was.

INITIAL, CHILDREN, CLUSTERS, REFERENCES, REMOVALS, ROLLBACK = (
    "initial", "children", "clusters", "references", "removals", "rollback",
)
REFERENCE_KINDS = frozenset(("ecds", "rds", "scoped_rds", "lds"))
CHILD_KINDS = frozenset(("cds", "eds", "sds"))
WAITING_STEPS = frozenset((REFERENCES, REMOVALS))  # for what Envoy makes of the steps before
NOTIFY_RANK = {"cds": 1, "ecds": 2, "rds": 2, "scoped_rds": 3, "lds": 4}  # others before them
CLUSTER_URL = "type.googleapis.com/envoy.config.cluster.v3.Cluster"


class Step(NamedTuple):
    """The next snapshot on the way, and its name."""

    files: Files
    name: str


def next_step(published: Files, desired: Files) -> Step | None:
    """The next snapshot on the way from `published` to `desired`; None when it is published."""
    if not published:
        return Step(desired, INITIAL) if desired else None
    changed = {path: published[path] for path in moved_paths(published, desired)
               if path in published}
    plain = {path for path, old in changed.items()
             if not {old.kind, desired[path].kind} & REFERENCE_KINDS}
    children = beside(published, {p: f for p, f in desired.items() if p not in published})
    clusters = {**children, **{path: united(published[path], desired[path]) for path in plain}}
    references = {**clusters, **{path: desired[path] for path in changed.keys() - plain}}
    steps = [Step(clusters, CLUSTERS), Step(references, REFERENCES), Step(desired, REMOVALS)]
    if len(plain) < len(changed) or any(changed[path].kind == "cds" for path in plain):
        # Without a changed parent nobody reads the new files before they are all there.
        steps.insert(0, Step(children, CHILDREN))
    return next((step for step in steps if not same_files(step.files, published)), None)


def beside(published: Files, new: Files) -> dict[str, File]:
    """Both sets of files, without the old ones where a new one needs a directory, or is one."""
    above = {parent for path in new for parent in parents(path)}
    kept = {path: file for path, file in published.items()
            if path not in above and new.keys().isdisjoint(parents(path))}
    return {**kept, **new}


def notify_order(paths: Iterable[str], files: Files) -> list[str]:
    """Paths in the order in which Envoy shall notice them: children, CDS, RDS, LDS."""
    return sorted(paths, key=lambda path: (NOTIFY_RANK.get(files[path].kind, 0), path))


# -- old and new clusters together --------------------------------------------------------------


class Clusters(NamedTuple):
    """The clusters of a CDS file by name, as texts; and what is around them."""

    frame: Json  # JSON: the other fields of the response; rendered YAML: the bytes before
    texts: Mapping[str, bytes]


@functools.lru_cache(maxsize=4)  # a step is planned several times until it may be published
def clusters_of(file: File) -> Clusters | None:
    """The clusters of CDS that is JSON or our own YAML; None where the text does not tell."""
    if file.content[:1] == b"{":
        try:
            frame = parse_json(file.content)
            resources = frame.pop("resources", [])
            texts = {str(each["name"]): json.dumps(each, sort_keys=True, separators=(",", ":"),
                                                   ensure_ascii=False).encode()
                     for each in resources}
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return Clusters(frame, texts) if len(texts) == len(resources) else None
    split = split_rendered(file.content) if file.source == SERVICES_SOURCE else None
    if split is None:
        return None
    head, blocks = split
    names = [rendered_name(block) for block in blocks]
    return Clusters(head, dict(zip(names, blocks, strict=True))) if all(names) else None


def rendered_name(block: bytes) -> str:
    """The name of a cluster that our own writer wrote as YAML."""
    found = re.search(rb'^[- ] name: (?:(".*")|(.+))$', block, re.MULTILINE)
    if found is None:
        return ""
    return str(parse_json(found[1])) if found[1] else found[2].decode()


def united(old: File, new: File, keep: frozenset[str] | None = None) -> File:
    """A file on the way from old to new: of CDS the clusters of both, of two with one name the new.

    `keep`: the old clusters to take along; None for all. YAML of a ConfigMap is never rewritten:
    it goes out at once, or with the removals if it has fewer names and all of them were there.
    united(united(a, b), b) == united(a, b).
    """
    if new.kind != "cds" and old.kind != "cds":
        return new
    one, two = clusters_of(old), clusters_of(new)
    if one is None or two is None or type(one.frame) is not type(two.frame):
        fewer = names_in(new.content) < names_in(old.content)
        return old if fewer or keep is not None else new
    extra = {name: text for name, text in one.texts.items()
             if name not in two.texts and (keep is None or name in keep)}
    if not extra:
        return new
    if {**extra, **two.texts} == one.texts:
        return old  # nothing new: the old file is the union
    return file_of(joined(two.frame, [*two.texts.values(), *extra.values()]), new.source,
                   new.mode, "cds")


def joined(frame: Json, texts: list[bytes]) -> bytes:
    """A CDS file of these clusters, within the frame of another."""
    if isinstance(frame, bytes):
        return join_rendered(frame, texts)
    version = hashlib.sha256(b"\n".join(texts)).hexdigest()[:16]
    fields = {key: value for key, value in frame.items() if key != "versionInfo"}
    fields |= {"version_info": version, "resources": [json.loads(text) for text in texts]}
    return (json.dumps(fields, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


# -- names in texts, without a YAML parser -------------------------------------------------------

NAME_VALUE = re.compile(
    rb"""["']?\b(?:cluster_)?[nN]ame["']?[ \t]*:[ \t]*["']?([^\s"',{}\[\]]+)"""
)
WORD = re.compile(rb"[^\s\"'{}\[\],]+")
PLACE = re.compile(rb"/([-\w./]+)", re.ASCII)


def names_in(content: bytes) -> frozenset[str]:
    """The values of all `name:` fields of a text, at whatever depth."""
    return frozenset(name.decode("utf-8", "replace") for name in NAME_VALUE.findall(content))


def cluster_names(files: Iterable[File]) -> frozenset[str]:
    """The clusters that CDS files hold; where a text does not tell, every name in it."""
    names: set[str] = set()
    for file in files:
        if file.kind == "cds":
            known = clusters_of(file)
            names |= known.texts.keys() if known else names_in(file.content)
    return frozenset(names)


def mentioned(content: bytes, names: Iterable[str]) -> frozenset[str]:
    """Those of the names that a text has as a word.

    A route that takes its cluster from a header or a plugin names none: nobody can tell.
    """
    text = content.replace(b"\\/", b"/")
    words = {word.strip(b":") for word in WORD.findall(text)}
    return frozenset(
        name for name in names
        if (raw := name.encode()) in words or (WORD.fullmatch(raw) is None and raw in text)
    )


def paths_in(contents: Iterable[bytes], paths: Collection[str]) -> set[str]:
    """Those of the paths that texts name, under whatever directory Envoy mounts ours."""
    found, longest = set[str](), max(map(len, paths), default=0)
    for content in contents if paths else ():
        for raw in PLACE.findall(content.replace(b"\\/", b"/")):
            place = "/" + raw.decode()
            place = place[-longest - 1 :]  # of 200 KB of slashes not every end is looked at
            while place := place.partition("/")[2]:
                if place in paths:
                    found.add(place)
    return found


# -- what may be published after a NACK ----------------------------------------------------------


class Nack(NamedTuple):
    """Bytes that Envoy rejected: not tried again until the desired bytes are others."""

    digest: str  # of the desired file
    shown: str  # of the file as it was published: another one where clusters were united
    kind: str
    reason: str
    stood: frozenset[str] = frozenset()  # the clusters and files there were, of those it names


def with_needed(desired: Files, published: Files, is_read: Callable[[str], bool]) -> Files:
    """The desired files, and those without a source that somebody still needs.

    An Envoy that starts without a file that its bootstrap or a listener names has no listener. A
    file that is read and that no published file names is named by the bootstrap.
    """
    result = dict(desired)
    gone = published.keys() - desired.keys()
    named = paths_in((file.content for file in published.values()), gone)
    more = {path for path in gone - named if is_read(path)}
    more |= paths_in((file.content for file in desired.values()), gone)
    while more:
        result |= {path: published[path] for path in more}
        more = paths_in((published[path].content for path in more), gone - result.keys())
    return result


def allowed(
    desired: Files, published: Files, acked: Files, nacks: Mapping[str, Nack]
) -> tuple[Files, list[str]]:
    """What may be published of `desired` after NACKs, and why the rest waits, in words.

    A NACKed file keeps its last ACKed bytes. References to what is lacking because of that keep
    theirs too, and what bytes that are kept name stays as well. Everything else goes on.
    """
    result, notes = dict(desired), []
    before = {**published, **acked}
    held = {path for path, nack in nacks.items()
            if path in desired and (desired[path].digest == nack.digest or (
                path in before and united(before[path], desired[path]).digest == nack.shown))}
    for path in sorted(held):
        result[path] = before.get(path, desired[path])
        notes.append(f"{path}: NACKed by Envoy, "
                     f"{'the last ACKed bytes stay' if path in acked else 'it has no ACKed bytes'}")
    if not held:
        return result, notes
    idle = idle_clusters(desired, held - acked.keys())
    there = cluster_names(desired.values())
    while True:
        lacking = idle | (there - cluster_names(result.values()))
        missing = desired.keys() - result.keys()
        waiting = [
            path for path, file in result.items()
            if file.kind in REFERENCE_KINDS
            and file is desired.get(path)
            and not same_file(before.get(path), file)
            and (mentioned(file.content, lacking)
                 or paths_in([file.content], missing))
        ]
        for path in waiting:
            notes.append(f"{path}: waits for what Envoy NACKed")
            del result[path]
            if path in before:
                result[path] = before[path]
        if not waiting and not keep_needed(result, desired, published, acked, nacks):
            return result, notes


def idle_clusters(desired: Files, paths: Collection[str]) -> frozenset[str]:
    """The clusters whose endpoints are in files that never were ACKed."""
    known = [clusters_of(file) for file in desired.values() if file.kind == "cds"] if paths else []
    return frozenset(
        name for clusters in known if clusters for name, text in clusters.texts.items()
        if paths_in([text], paths)
    )


def keep_needed(
    result: dict[str, File], desired: Files, published: Files, acked: Files,
    nacks: Mapping[str, Nack],
) -> bool:
    """Give back to `result` what bytes that are kept name: files and clusters; whether any."""
    kept = [file for path, file in result.items() if not same_file(desired.get(path), file)]
    before = {**acked, **published}
    gone = paths_in((file.content for file in kept),
                    before.keys() - result.keys() - desired.keys())
    result |= {path: before[path] for path in gone}
    users = [file.content for file in kept if file.kind in REFERENCE_KINDS]
    found = bool(gone)
    for path, file in list(result.items()):
        for old in (acked.get(path), published.get(path)):
            if old is None or file.kind != "cds" or is_nacked(old, nacks.get(path)):
                continue
            if clusters_of(old) is None and not same_file(file, desired.get(path)):
                continue  # it is one of the old files as a whole already
            lost = cluster_names([old]) - cluster_names(result.values())
            needed = frozenset().union(*(mentioned(user, lost) for user in users))
            if needed:
                result[path] = united(old, result[path], needed)
                found = True
    return found


def is_nacked(file: File | None, nack: Nack | None) -> bool:
    """Whether these bytes are among those that Envoy rejected."""
    return file is not None and nack is not None and file.digest in (nack.digest, nack.shown)


def rollback(published: Files, acked: Files, nacks: Mapping[str, Nack]) -> Step | None:
    """The snapshot without the NACKed bytes that are published, where there are ACKed ones.

    Files that the ACKed bytes name come back with them.
    """
    back = {path: acked[path] for path, nack in nacks.items()
            if path in acked and is_nacked(published.get(path), nack)
            and not same_file(acked[path], published[path])}
    named = paths_in((file.content for file in back.values()), acked.keys() - published.keys())
    files = {**published, **{path: acked[path] for path in named}, **back}
    return Step(files, ROLLBACK) if back else None


# ---------------------------------------------------------------------------------------------
# The disk
# ---------------------------------------------------------------------------------------------
#
# Publishing a set of files; the numbers come back in the code:
#
#   1. Stage: everything goes to a new directory `..<version>`; a file that did not change is a
#      hard link to that of the previous snapshot.
#   2. Remember in `..state` which object each file is from.
#   3. Mark: a symlink `..notify` names the snapshot before, until Envoy has been notified of
#      everything. symlink(2) and unlink(2) are no event for Envoy.
#   4. Unlink the links of files that are gone.
#   5. Swap: `..data` is renamed over. From here on every path shows the new snapshot.
#   6. Notify: the link of each new or changed file is replaced by rename(2), children first. This
#      MOVE is what wakes just the subscription concerned.
#   7. Unmark.
#   8. Prune: all but the last two snapshots go.
#
# A death before 5 leaves the old snapshot and a left-over; between 5 and 7 the marker, and the
# next start notifies again of what differs. So does a loader that lives: after an OSError it
# recovers, as at a start, before it publishes anything.

SWITCH, MARKER, STATE, CURRENT, LINK = "..data", "..notify", "..state", "current", "..link"
ACKED_FILES, STATE_FILE = f"{STATE}/acked", f"{STATE}/loader.json"
SNAPSHOT = re.compile(r"\.\.[0-9a-f]{16}(\.[0-9]{1,9})?")
DEPTH = 32  # of directories that we look into
FILE_BYTES = 64 << 20  # a larger file on the volume is not ours
SNAPSHOT_BYTES = 256 << 20  # of what is read of one directory: sparse files cost nobody a disk
STATE_BYTES = 16 << 20  # of what is remembered: 10,000 files are 3 MB


class Output:
    """The output directory; nothing else touches it. Raises OSError as it comes: what was
    published goes on serving."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.published: Files = {}
        self.snapshot = ""  # the name of its directory
        self.foreign: tuple[str, ...] = ()  # files in `current/` that are not ours
        self.state: Mapping[str, Json] = {}  # what is remembered
        self.staged = ""  # a snapshot that --check-cmd looks at
        self._remembered = b""  # the same as it is on disk
        self._before = ""  # the last snapshot but one
        self._links: set[str] = set()  # ours, in `current/`
        self._lock = -1

    # -- opening ------------------------------------------------------------------------------

    def lock(self) -> bool:
        """Create the directory if need be and be its only loader; False while another one is.

        flock(2) on the directory itself: no lock file that another user's init container left.
        """
        make_directories(self.root)
        if self._lock < 0:
            self._lock = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def recover(self) -> list[str]:
        """Make good whatever the last process, or the last failure, left; what was done, in words.

        Afterwards `published` is what the disk shows, and every link and notification is right.
        """
        if is_directory(self._path(SWITCH)):
            raise LoaderError(f"{self._path(SWITCH)} is a directory and not a link: remove it")
        self.published, self.snapshot = self.peek(), self._switched()
        done = ["links repaired"] if self._repair_links() else []
        marked = read_link(self._path(MARKER))
        if marked is not None:
            before = self._load(marked) if SNAPSHOT.fullmatch(marked) else {}
            changed = moved_paths(before, self.published)
            self._notify(changed)
            os.unlink(self._path(MARKER))
            done.append(f"notified again: {shortened(changed) or 'nothing'}")
        others = [entry for entry in self._snapshots() if entry != self.snapshot
                  and version_of(self._load(entry)) == entry[2:18]]  # else half-written
        times = {entry: os.stat(self._path(entry)).st_mtime_ns for entry in others}
        self._before = max(others, key=times.__getitem__, default="")
        self.prune()
        if os.path.islink(self._path(LINK)):
            os.unlink(self._path(LINK))
        return done

    def peek(self) -> Files:
        """What is published, read without a lock and without touching anything.

        A loader that lives may prune what is being read: then the switch has moved on.
        """
        self._read_state()
        while True:
            name = self._switched()
            files = self._load(name) if name else {}
            if self._switched() == name:
                return files

    def switched_at(self) -> float:
        """When the snapshot was switched to, Unix time; 0 where there is none."""
        return os.lstat(self._path(SWITCH)).st_mtime if self.snapshot else 0.0

    # -- publishing ---------------------------------------------------------------------------

    def fitting(self, files: Files) -> tuple[Files, list[str]]:
        """The files that can be in `current/`, and a warning for each that cannot.

        A directory there is never removed (Envoy's watch is bound to it), so a file of its name
        cannot come; nor can a file below a foreign file.
        """
        blocked = {}
        for path in sorted(files.keys() - self.published.keys()):
            place = self._path(CURRENT, path)
            if is_directory(place):
                blocked[path] = f"{path} of {files[path].source} left out: {place} is a directory"
            for above in (self._path(CURRENT, each) for each in parents(path)):
                if os.path.lexists(above) and not os.path.islink(above) and not is_directory(above):
                    blocked[path] = f"{path} of {files[path].source} left out: {above} is a file"
        return {p: file for p, file in files.items() if p not in blocked}, list(blocked.values())

    def stage(self, files: Files) -> str:
        """Step 1: the name of a complete directory of these files, made if need be."""
        wanted = f"..{version_of(files)}"
        name, attempt = wanted, 0
        while os.path.lexists(self._path(name)):
            if not self._damage(name, files):
                return name
            attempt += 1
            name = f"{wanted}.{attempt}"
        os.mkdir(self._path(name), 0o755)
        made = {""}
        for path, file in files.items():
            for directory in reversed(list(parents(path))):
                if directory not in made:
                    os.mkdir(self._path(name, directory), 0o755)
                    made.add(directory)
            old, new = self._path(self.snapshot, path), self._path(name, path)
            if not (same_file(self.published.get(path), file) and linked(old, new)):
                write_file(new, file.content, file.mode)
        return name

    def publish(self, files: Files, again: Iterable[str] = ()) -> list[str]:
        """Publish these files, some of them `again`; returns the paths that moved or are gone."""
        changed = [*moved_paths(self.published, files), *again]
        gone = sorted(self._links - files.keys())
        self._may_write({os.path.dirname(path) for path in (*changed, *gone)})
        name, before = self.stage(files), self.snapshot  # 1
        self.remember(self.state, files)  # 2
        with contextlib.suppress(FileExistsError):
            os.symlink(before or "none", self._path(MARKER))  # 3
        for path in gone:  # 4
            if self._is_ours(path):
                os.unlink(self._path(CURRENT, path))
        self._links.difference_update(gone)
        self._own_parents(CURRENT, changed)
        self._link(SWITCH, name)  # 5
        self.snapshot, self.published = name, files
        self._before = before if before != name else self._before
        self._notify(changed)  # 6
        unlink_if_there(self._path(MARKER))  # 7
        return changed + gone

    def notify_again(self, paths: Iterable[str]) -> None:
        """Wake Envoy once more: those who watch the switch, and those who watch the links."""
        self._link(SWITCH, self.snapshot)
        self._notify(path for path in paths if path in self.published)

    def prune(self) -> None:
        """Step 8: only the last two snapshots stay."""
        for entry in self._snapshots():
            if entry not in (self.snapshot, self._before, self.staged):
                remove_tree(self._path(entry))

    def check(self) -> list[str]:
        """Compare the disk with memory and put it right; returns what was wrong."""
        files, damaged = self.published, self._damage(self.snapshot, self.published)
        if self._switched() != self.snapshot:
            damaged.append(SWITCH)
        if damaged:
            self.published = {path: file for path, file in files.items() if path not in damaged}
            self.publish(files)
            self.prune()
        return damaged + self._repair_links()

    # -- what a restart cannot see --------------------------------------------------------------

    def remember(self, state: Mapping[str, Json], coming: Files = {}) -> None:  # noqa: B006
        """Replace what is remembered, by rename. The source and kind of each file comes along, of
        those that are about to be published too."""
        files = {**self.published, **coming}
        self.state = {**state, "version": __version__,
                      "files": {path: [file.source, file.kind] for path, file in files.items()}}
        text = json.dumps(self.state, sort_keys=True).encode()
        if text == self._remembered:
            return
        self._own_parents(STATE)
        new = self._path(f"{STATE_FILE}.new")
        unlink_if_there(new)
        write_file(new, text, 0o644)
        if is_directory(self._path(STATE_FILE)):
            remove_tree(self._path(STATE_FILE))
        os.rename(new, self._path(STATE_FILE))
        self._remembered = text

    def keep_acked(self, acked: Files, files: Files) -> None:
        """Keep the ACKed bytes that are not published, or that `files` are about to replace, and
        no others."""
        needed = {path.replace("/", "%"): path for path, file in acked.items()
                  if not (same_file(self.published.get(path), file)
                          and same_file(files.get(path), file))}
        there = self._kept()
        if needed:
            self._own_parents(STATE, ["acked/"])
        for name, path in needed.items():
            place, file = self._path(ACKED_FILES, name), acked[path]
            if holds(place, file):
                continue
            unlink_if_there(place)
            shown = same_file(self.published.get(path), file)
            if not (shown and linked(self._path(self.snapshot, path), place)):
                write_file(place, file.content, file.mode)
        for name in there - needed.keys():
            os.unlink(self._path(ACKED_FILES, name))

    def acked_files(self, digests: Mapping[str, Json]) -> dict[str, File]:
        """The last ACKed bytes by path. The digest of a secret is not remembered: what is kept of
        one tells."""
        found = {path: file for path, file in self.published.items()
                 if file.digest == digests.get(path)}
        room = SNAPSHOT_BYTES
        for name in self._kept():
            path = name.replace("%", "/")
            file = self._file(path, self._path(ACKED_FILES, name), room)
            room -= len(file.content) if file is not None else 0
            if file is not None and file.digest == digests.get(path, file.digest):
                found[path] = file
        return found

    def _kept(self) -> set[str]:
        entries = walk(self._path(ACKED_FILES)) if is_directory(self._path(STATE)) else ()
        return {name for name, _ in entries if not any(map(key_problem, name.split("%")))}

    def _read_state(self) -> None:
        """What was remembered; nothing where it is not JSON or another version wrote it."""
        self.state, self._remembered = {}, b""
        there = is_directory(self._path(STATE))
        found = read_file(self._path(STATE_FILE), STATE_BYTES) if there else None
        try:
            state = json_object(parse_json(found[0])) if found else {}
        except ValueError as error:
            log.warning("%s: %s; goes on without it", self._path(STATE_FILE), why(error))
            return
        if found and state.get("version") == __version__:
            self.state, self._remembered = state, found[0]

    # -- parts of the steps -------------------------------------------------------------------

    def _path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def _file(self, path: str, place: str, most: int = FILE_BYTES) -> File | None:
        """The file of a path as it is on disk; None where there is no regular one to be read."""
        found = read_file(place, min(most, FILE_BYTES))
        if found is None:
            return None
        row = json_object(self.state.get("files")).get(path)
        source, kind = map(str, row) if isinstance(row, list) and len(row) == 2 else ("disk", "")
        file = file_of(found[0], source, found[1])
        return file._replace(kind=kind) if not file.kind and kind in KINDS.values() else file

    def _load(self, name: str) -> dict[str, File]:
        files, room = dict[str, File](), SNAPSHOT_BYTES
        for path, place in walk(self._path(name)):
            file = None if any(map(key_problem, path.split("/"))) else self._file(path, place, room)
            if file is not None:
                files[path] = file
                room -= len(file.content)
        return files

    def _damage(self, name: str, files: Files) -> list[str]:
        """The paths that are not on disk as they should be, those that are too many included."""
        if not is_directory(self._path(name)):
            return [*files, name]
        wrong = [path for path, file in files.items() if not holds(self._path(name, path), file)]
        return wrong + [path for path, _ in walk(self._path(name)) if path not in files]

    def _may_write(self, directories: Iterable[str]) -> None:
        """OSError before anything is switched: the links of all files must be replaceable."""
        for place in (self._path(CURRENT, each) for each in directories):
            if os.path.isdir(place) and not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
                read_only = os.statvfs(place).f_flag & os.ST_RDONLY
                number = errno.EROFS if read_only else errno.EACCES
                raise OSError(number, os.strerror(number), place)

    def _link(self, relative: str, target: str) -> None:
        """Make or replace a link by rename(2): nobody ever finds none."""
        try:
            os.symlink(target, self._path(LINK))
        except FileExistsError:  # of a process that died: a fixed name must not wedge
            os.unlink(self._path(LINK))
            os.symlink(target, self._path(LINK))
        os.rename(self._path(LINK), self._path(relative))

    def _notify(self, paths: Iterable[str]) -> None:
        """Make or replace the links of files: the MOVE that Envoy sees."""
        for path in notify_order(paths, self.published):
            self._link(f"{CURRENT}/{path}", link_target(path))
            self._links.add(path)

    def _is_ours(self, path: str) -> bool:
        """Whether what is in `current/` is a link that we made."""
        return read_link(self._path(CURRENT, path)) == link_target(path)

    def _own_parents(self, top: str, paths: Iterable[str] = ()) -> None:
        """Real directories at `top` and above the paths in it, never replaced if they are."""
        below = {f"{top}/{parent}" for path in paths for parent in parents(path)}
        for place in map(self._path, (top, *sorted(below))):
            if is_directory(place):
                continue
            if os.path.islink(place):
                os.unlink(place)  # Envoy's watch would stay on what is behind it
            os.mkdir(place, 0o755)

    def _switched(self) -> str:
        """The snapshot that `..data` names, or nothing where there is none behind it."""
        name = read_link(self._path(SWITCH)) or ""
        return name if SNAPSHOT.fullmatch(name) and is_directory(self._path(name)) else ""

    def _repair_links(self) -> list[str]:
        """Every published file has its link in `current/`, and no link of ours is left over."""
        self._own_parents(CURRENT, self.published)
        repaired = [path for path in self.published if not self._is_ours(path)]
        self._notify(repaired)
        self._links, foreign = set(self.published), []
        for path, place in walk(self._path(CURRENT)):
            if path in self.published:
                continue
            if not self._is_ours(path):
                foreign.append(path)
            elif os.path.lexists(self._path(self.snapshot, path)):
                self._links.add(path)  # its file could not be read: the next snapshot decides
            else:
                os.unlink(place)
                repaired.append(path)
        self.foreign = tuple(foreign)
        return repaired

    def _snapshots(self) -> list[str]:
        return [entry for entry in os.listdir(self.root) if SNAPSHOT.fullmatch(entry)]


def link_target(path: str) -> str:
    """What `current/<path>` points to: relative, so that the directory may be mounted anywhere."""
    return "../" * (path.count("/") + 1) + f"{SWITCH}/{path}"


def read_link(place: str) -> str | None:
    """Where a link points to; None where there is none. An error says nothing about that."""
    try:
        return os.readlink(place)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.ENOTDIR):
            return None
        raise


def is_directory(place: str) -> bool:
    """A real directory: what a link points to is not ours."""
    try:
        return stat.S_ISDIR(os.lstat(place).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def unlink_if_there(place: str) -> None:
    """A directory that somebody else made there goes too."""
    if is_directory(place):
        remove_tree(place)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(place)


def linked(old: str, new: str) -> bool:
    """link(2); False where there is none, for whatever reason: then the file is written."""
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        return False
    return True


def write_file(place: str, content: bytes, mode: int) -> None:
    """A new file; the mode is exact because the umask is 0 (see `run`)."""
    number = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(number, view) :]
    finally:
        os.close(number)


def read_file(place: str, most: int = FILE_BYTES) -> tuple[bytes, int] | None:
    """Content and mode of a regular file; None where there is none that can be read.

    Others may write to the volume: no link is followed, and no FIFO is waited for.
    """
    try:
        number = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            os.close(number)
            return None
        with open(number, "rb") as stream:
            return stream.read(most), stat.S_IMODE(status.st_mode)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # says nothing about the file
        return None  # not readable is as good as not there: it is written anew


def holds(place: str, file: File) -> bool:
    """Whether this very file is on disk there."""
    return read_file(place) == (file.content, file.mode)


def walk(root: str, below: str = "") -> Iterator[tuple[str, str]]:
    """Every entry under a directory that is no directory, as (relative path, place)."""
    if not is_directory(root):
        return
    try:
        with os.scandir(f"{root}/{below}") as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return  # pruned by a loader that lives, while a preview reads
    for entry in found:
        path = f"{below}{entry.name}"
        if entry.is_dir(follow_symlinks=False) and path.count("/") < DEPTH:
            yield from walk(root, f"{path}/")
        else:
            yield path, f"{root}/{path}"


def make_directories(place: str) -> None:
    """mkdir -p, each with mode 0755 (os.makedirs would leave the upper ones to the umask)."""
    if not os.path.isdir(place):
        make_directories(os.path.dirname(place))
        with contextlib.suppress(FileExistsError):
            os.mkdir(place, 0o755)


def remove_tree(place: str) -> None:
    """Remove a directory; what cannot be removed is named and stays.

    A link is removed, never followed: nothing outside of the output directory is touched.
    """
    try:
        if not is_directory(place):
            os.unlink(place)
            return
        for _, each in walk(place):
            os.unlink(each)
        for directory, _, _ in os.walk(place, topdown=False):
            os.rmdir(directory)
    except OSError as error:
        log.warning("left-over stays: %s", why(error))


# ---------------------------------------------------------------------------------------------
# ACK and NACK
# ---------------------------------------------------------------------------------------------
#
# For every move of a file Envoy counts one update_attempt for each subscription that reads it, and
# with it exactly one of update_success (ACK) or update_rejected and update_failure (NACK). One
# publication is asked about at a time, so the counts before and after it tell everything. Neither
# clocks nor versions are needed, and what the counts do not tell stays unknown.

ACKED, NACKED, UNKNOWN, UNREAD = "acked", "nacked", "unknown", "unread"  # of a published file
PENDING, HIDDEN = "pending", "hidden"  # why one is unknown: not attempted yet, no counters
ANSWER_BOUND = 1.0  # seconds for one answer of the admin interface
ASK_BOUND = (1.0, 2.0)  # seconds until a publication is judged; of an Envoy that answered before
SILENT_BOUND = 30.0  # seconds that references wait for an Envoy that is there and silent
WARM_BOUND = 5.0  # seconds until clusters are warm: the first health check of each
LOOK_FIRST, LOOK_LAST, LOOK_IDLE = 0.001, 0.05, 30.0  # seconds between two looks, growing
PROBE = 0.1  # seconds between two tries to reach Envoy: one that ends at once is seen, too
END_BOUND = 10.0  # seconds after coming back within which a second end is blamed on the files
ANSWER_BYTES = 64 << 20  # a longer answer is not Envoy's
REASON_LENGTH = 200  # characters of Envoy's words in the log

LEAVES = {"update_attempt": 0, "update_success": 1, "update_rejected": 2, "update_failure": 2}
STATS = "/stats?" + urllib.parse.urlencode({
    "usedonly": "",
    "filter": r"\.(update_(attempt|success|rejected|failure)|warming_clusters"
              r"|dynamic_unknown_fields|hot_restart_epoch)$",
})


NOT_ENVOY = "the answer is not that of Envoy's admin interface"
STATS_MATCHER = "/config_dump?mask=bootstrap.stats_config.stats_matcher"


class AdminError(LoaderError):
    """Envoy's admin interface did not answer, or not as Envoy does."""


class Counts(NamedTuple):
    """What Envoy counts for one subscription."""

    attempt: int = 0
    success: int = 0
    failed: int = 0  # update_rejected and update_failure


class Look(NamedTuple):
    """One look at Envoy."""

    counts: Mapping[str, Counts] = {}  # by the name of the scope in /stats
    live: bool = False  # Envoy is through its own initialization
    hidden: str = ""  # why counters may be lacking, in words
    warming: int = 0  # clusters
    unknown_fields: int = 0
    reason: str = ""  # why listeners were rejected, in Envoy's words


class Known(NamedTuple):
    """What Envoy made of the files, as far as it is known. A value: each fact makes a new one.

    `acked` are the last bytes that any Envoy ACKed; the rest is about the Envoy process of now.
    """

    acked: Files = {}  # noqa: RUF012
    nacks: Mapping[str, Nack] = {}
    states: Mapping[str, str] = {}  # of published files; absent is unknown
    counts: Mapping[str, Counts] | None = None  # counted before; None: never looked at
    moves: Mapping[str, int] = {}  # how often a file moved since
    tried: Mapping[str, tuple[str, bool]] = {}  # digest of the desired file; on ACKed bytes
    late: frozenset[str] = frozenset()  # not attempted in time: nobody waits for these again
    leaving: frozenset[str] = frozenset()  # not desired any more, by those that named them either
    came: frozenset[str] = frozenset()  # clusters and files that a NACK may be older than
    gone: bool = False  # no process is known
    wary: bool = False  # moved while moves before were not judged: a read may belong to those
    suspects: frozenset[tuple[str, str]] = frozenset()  # path and digest, when Envoy ended
    back_at: float = 0.0  # when the process of now was met
    blind: bool = False  # its counters do not tell


class Outcome(NamedTuple):
    """What one look told."""

    acks: tuple[str, ...] = ()
    nacks: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()  # both: Envoy must be notified once more to tell
    hidden: tuple[str, ...] = ()  # Envoy keeps no counters of these
    pending: tuple[str, ...] = ()  # read by Envoy, but not attempted yet


# -- which counters are about which file ---------------------------------------------------------

SCOPES = {  # by kind: how the scope of a subscription begins, and what is before the file's name
    "cds": ("cluster_manager.cds", ""),
    "lds": ("listener_manager.lds", ""),
    "eds": ("cluster.", "cluster."),
    "rds": ("http.", ".rds."),
    "scoped_rds": ("http.", ".scoped_rds."),  # and the name of the listener's set of scopes
    "sds": ("", "sds."),
    "ecds": ("extension_config_discovery.", "."),
    "rtds": ("runtime", ""),
}


def scopes_of(kind: str, names: Iterable[str], scopes: Iterable[str]) -> list[str]:
    """The scopes that are about a file of this kind with a resource of one of these names."""
    begin, middle = SCOPES[kind]
    if kind in ("cds", "lds", "eds"):
        return [scope for name in names if (scope := begin + name) in scopes]
    if kind == "scoped_rds":
        return [scope for scope in scopes if scope.startswith(begin) and middle in scope]
    ends = tuple(middle + name for name in names)
    return [scope for scope in scopes if scope.startswith(begin) and scope.endswith(ends)]


FIELD_NAME = re.compile(
    rb"""^([ ]*(?:- )?)["']?(?:cluster_?)?[nN]ame["']?[ \t]*:[ \t]*["']?([^\s"',}]+)""",
    re.MULTILINE,
)
STAT_NAME = re.compile(
    rb"""(?:alt_?[sS]tat_?[nN]ame|(?<!\w)name)["']?[ \t]*:[ \t]*["']?([^\s"',}]+)"""
)
PATH = re.compile(rb"""(?<!\w)path["']?[ \t]*:[ \t]*["']?([^\s"',}]+)""")


def resource_names(path: str, file: File, files: Files) -> set[str]:
    """The names under which statistics know the resource of a file, "" where there is but one."""
    if file.kind in ("cds", "lds", "rtds", "scoped_rds"):
        return {""}
    names: set[str] = set()
    if file.kind == "eds":  # the name of the cluster, which may differ from the assignment's
        for other in files.values():
            if other.kind == "cds":
                for place, found in eds_clusters_of(other).get(path.rpartition("/")[2], ()):
                    names |= found if place.endswith(f"/{path}") else set()
    if not names:
        names = names_of_resource(file.content)
    return {name.replace("://", "_").replace(":/", "_").replace(":", "_") for name in names}


def names_of_resource(content: bytes) -> set[str]:
    """The name of the first resource in a file; empty where the text shows none."""
    if content[:1] == b"{":
        try:
            resource = parse_json(content)["resources"][0]
            return {name for key in ("name", "cluster_name", "clusterName")
                    if isinstance(name := resource.get(key), str)}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            pass  # then a name is looked for in the text, as in YAML
    fields = [(len(found[1]), found.start(), found[2]) for found in FIELD_NAME.finditer(content)]
    first = [min(fields)[2]] if fields else NAME_VALUE.findall(content)[:1]
    return {name.decode("utf-8", "replace") for name in first}


@functools.lru_cache(maxsize=4)
def eds_clusters_of(cds: File) -> Mapping[str, list[tuple[str, set[str]]]]:
    """By the base name of an EDS file: its path as a cluster gives it, and the cluster's names."""
    found: dict[str, list[tuple[str, set[str]]]] = {}
    for block in cluster_blocks(cds):
        names = {name.decode("utf-8", "replace") for name in STAT_NAME.findall(block)}
        for raw in PATH.findall(block.replace(b"\\/", b"/")):
            place = raw.decode("utf-8", "replace")
            found.setdefault(place.rpartition("/")[2], []).append((place, names))
    return found


def cluster_blocks(file: File) -> list[bytes]:
    """The texts of the clusters of CDS, to be searched; in block YAML as its dashes divide it."""
    if known := clusters_of(file):
        return list(known.texts.values())
    first = re.search(rb"\nresources:[^\n]*\n([ ]*)- ", b"\n" + file.content)
    return file.content.split(b"\n" + first[1] + b"- ") if first else [file.content]


# -- what is known, step by step (pure) ----------------------------------------------------------


def after_publication(
    known: Known, before: Files, after: Files, desired: Files, again: Iterable[str] = ()
) -> Known:
    """Files moved, some of them `again`: what Envoy makes of them is to be seen."""
    moved = [*moved_paths(before, after), *again]
    leaving = after.keys() - desired.keys()
    gone = before.keys() - after.keys()
    tried = {path: (desired.get(path, after[path]).digest,
                    same_file(before.get(path), known.acked.get(path)))
             for path in moved}
    return known._replace(
        states={path: state for path, state in known.states.items()
                if path not in gone and path not in tried},
        moves={**known.moves, **{path: known.moves.get(path, 0) + 1 for path in moved}},
        tried={**known.tried, **tried},
        leaving=(known.leaving & leaving) | paths_in(
            (file.content for file in before.values()), leaving) if leaving else frozenset(),
        wary=any(file.kind and path not in known.states for path, file in before.items()),
        came=known.came | (newly_there(before, after) if before and (known.gone or any(
            file.kind in REFERENCE_KINDS and path not in known.states and path not in tried
            for path, file in before.items())) else frozenset()),
    )


def newly_there(before: Files, after: Files) -> frozenset[str]:
    """The clusters and files that came with a publication."""
    clusters = [cluster_names(files[path] for path in moved_paths(before, after) if path in files)
                for files in (after, before)]
    return (clusters[0] - clusters[1]) | (after.keys() - before.keys())


def after_meeting(known: Known, now: float) -> Known:
    """Another Envoy process: it confirmed nothing yet, and counts from zero."""
    unread = {path: state for path, state in known.states.items() if state == UNREAD}
    return known._replace(states=unread, counts=None, moves={}, late=frozenset(), back_at=now,
                          gone=False)


def after_end(known: Known, files: Files, now: float) -> tuple[Known, tuple[str, ...]]:
    """Envoy ended. If it was on bytes that no Envoy ACKed, and again soon after it came back, then
    these bytes end it: they count as NACKed. Returns the paths of those."""
    unproven = {path: file for path, file in files.items()
                if file.kind and not same_file(known.acked.get(path), file)
                and known.states.get(path) != UNREAD}
    suspects = frozenset((path, file.digest) for path, file in unproven.items())
    again = not known.blind and bool(suspects & known.suspects) and now - known.back_at <= END_BOUND
    known = known._replace(suspects=suspects, gone=True)
    if not again:
        return known, ()
    nacks = {path: nack_of(known, path, files, "Envoy ended twice on it") for path in unproven}
    return known._replace(nacks={**known.nacks, **nacks}, suspects=frozenset()), tuple(unproven)


def after_look(known: Known, files: Files, look: Look) -> tuple[Known, Outcome]:
    """What the counts tell about each published file that is not judged yet.

    Of a process that was never looked at before the first look is believed only when the second
    one agrees: Envoy may have been asked in the moment between a move and its reading. So it is
    after a publication that did not wait for the judgement of the one before.
    """
    lasting = ("cluster_manager.cds", "listener_manager.lds")  # they live as long as Envoy does
    if known.counts and any(look.counts.get(scope, Counts()).attempt < known.counts[scope].attempt
                            for scope in lasting if scope in known.counts):
        known = after_meeting(known, known.back_at)
    if known.counts is None or known.wary:
        known = known._replace(counts=known.counts or {}, wary=False)
        return known, Outcome(pending=tuple(p for p in files if files[p].kind))
    open_scopes: set[str] = set()
    found: dict[str, list[str]] = {ACKED: [], NACKED: [], UNKNOWN: [], UNREAD: [], PENDING: [],
                                   HIDDEN: []}
    for path, file in files.items():
        if not file.kind or known.states.get(path) in (ACKED, NACKED):
            continue
        names = resource_names(path, file, files)
        if path in known.acked:  # Envoy still asks for the name that broken bytes hide
            names |= resource_names(path, known.acked[path], files)
        read_by = scopes_of(file.kind, names, look.counts)
        state = judged(known, look, read_by, known.moves.get(path, 1))
        found[state].append(path)
        if state == PENDING:
            open_scopes |= set(read_by)
    for path in rejected_unnamed(known, files, look, found[UNREAD]):
        found[UNREAD].remove(path)
        found[NACKED].append(path)
    known = known._replace(
        blind=bool(look.hidden),
        counts={scope: known.counts.get(scope, Counts()) if scope in open_scopes else counts
                for scope, counts in look.counts.items()},
        moves={**{path: times for path, times in known.moves.items() if path in found[PENDING]},
               **dict.fromkeys(found[UNKNOWN], 1)},  # they are notified once more
        states={**known.states, **dict.fromkeys(found[UNREAD], UNREAD)},
        late=known.late.difference(found[ACKED]),
    )
    for path in found[ACKED]:
        known = with_ack(known, path, files)
    for path in found[NACKED]:
        reason = look.reason if files[path].kind == "lds" else ""
        reason = likely_cause(files[path], files) or reason or "the log of Envoy has the reason"
        known = with_nack(known, path, files, reason)
    known = known._replace(came=known.came if found[PENDING] else frozenset())
    pending = tuple(path for path in found[PENDING] if path not in known.late)
    return settled(known, files), Outcome(tuple(found[ACKED]), tuple(found[NACKED]),
                                          tuple(found[UNKNOWN]), tuple(found[HIDDEN]), pending)


def rejected_unnamed(
    known: Known, files: Files, look: Look, unread: Sequence[str]
) -> list[str]:
    """Those of the files that nobody seems to read which explain a subscription that only fails:
    their text does not show the name for which Envoy asks."""
    failing = {scope for scope, counts in look.counts.items()
               if counts.failed and not counts.success}
    kinds = {files[path].kind for path in unread if path not in known.acked} if failing else set()
    if not kinds:
        return []
    for path, file in files.items():
        if file.kind in kinds and path not in unread:
            failing.difference_update(
                scopes_of(file.kind, resource_names(path, file, files), look.counts))
            if known.states.get(path) == NACKED and path not in known.acked:
                kinds.discard(file.kind)  # this one explains it
    kinds = {kind for kind in kinds for scope in failing
             if scope.startswith(SCOPES[kind][0]) and SCOPES[kind][1] in scope}
    return [path for path in unread if path not in known.acked and files[path].kind in kinds]


def judged(known: Known, look: Look, read_by: Sequence[str], moves: int) -> str:
    """What became of one file, by the scopes of those who read it; UNKNOWN: mixed counts.

    Several may read one file: one NACK is a NACK, and an ACK takes all.
    """
    if not read_by:
        return HIDDEN if look.hidden else UNREAD if look.live else PENDING
    told = set()
    for scope in read_by:
        now, before = look.counts[scope], (known.counts or {}).get(scope, Counts())
        if now.attempt < before.attempt:
            before = Counts()  # the cluster was removed and came back
        success, failed = now.success - before.success, now.failed - before.failed
        expected = moves if scope in (known.counts or {}) else 1  # a new one reads what there is
        if now.attempt - before.attempt < expected:
            told.add(PENDING)
        else:
            told.add(ACKED if not failed else NACKED if not success else UNKNOWN)
    return next(state for state in (NACKED, UNKNOWN, PENDING, ACKED) if state in told)


def with_ack(known: Known, path: str, files: Files) -> Known:
    """Envoy took these bytes. When others than before mend what was NACKed, the references that
    were NACKed are tried once more."""
    file, nacks = files[path], dict(known.nacks)
    nack = nacks.get(path)
    if nack and (is_nacked(file, nack) or not same_file(known.acked.get(path), file)):
        del nacks[path]
        if file.kind in ("cds", "eds", "sds"):
            nacks = {each: nack for each, nack in nacks.items()
                     if each not in files or files[each].kind not in REFERENCE_KINDS}
    return known._replace(acked={**known.acked, path: file}, nacks=nacks,
                          states={**known.states, path: ACKED})


def with_nack(known: Known, path: str, files: Files, reason: str) -> Known:
    """Envoy rejected these bytes. If they are its last good ones, something else is wrong."""
    known = known._replace(states={**known.states, path: NACKED})
    if path in known.nacks and same_file(known.acked.get(path), files[path]):
        return known
    return known._replace(nacks={**known.nacks, path: nack_of(known, path, files, reason)})


def nack_of(known: Known, path: str, files: Files, reason: str) -> Nack:
    """A NACK blames the desired bytes, unless others that no Envoy ACKed were united with them."""
    shown = files[path].digest
    desired, clean = known.tried.get(path, (shown, True))
    blamed = desired if clean or path not in known.acked else shown
    stood: frozenset[str] = frozenset()
    old = known.nacks.get(path)
    if old and is_nacked(files[path], old):
        stood = old.stood
    elif files[path].kind in REFERENCE_KINDS:
        stood = named_things(files[path], files) - known.came
    return Nack(blamed, shown, files[path].kind, reason, stood)


def named_things(file: File, files: Files) -> frozenset[str]:
    """The clusters and files there are, of those that a reference names."""
    return mentioned(file.content, cluster_names(files.values())) \
        | paths_in([file.content], files.keys())


def settled(known: Known, files: Files) -> Known:
    """Forget the ACKed bytes of files that are gone, once nothing may be rolled back to them."""
    if any(file.kind in ("cds", "lds") and known.states.get(path, UNKNOWN) in (UNKNOWN, NACKED)
           for path, file in files.items()):
        return known
    return known._replace(acked={path: file for path, file in known.acked.items() if path in files})


def retried(known: Known, desired: Files, published: Files) -> Known:
    """Without the NACKs of files that are gone, and of references for which clusters or files came
    that they name. What is desired again leaves no more."""
    gone = [path for path, nack in known.nacks.items()
            if (path not in desired and path not in published)
            or ((file := desired.get(path)) is not None and file.digest == nack.digest
                and file.kind in REFERENCE_KINDS and named_things(file, published) - nack.stood)]
    leaving = known.leaving.difference(desired)
    if not gone and leaving == known.leaving:
        return known
    nacks = {path: nack for path, nack in known.nacks.items() if path not in gone}
    return known._replace(nacks=nacks, leaving=leaving)


def after_bound(known: Known, files: Files, moved: Iterable[str]) -> tuple[Known, list[str]]:
    """Envoy answers, and did not attempt these files in time: nobody waits for them again."""
    late = [path for path in moved
            if path in files and files[path].kind and path not in known.states]
    return known._replace(late=known.late | set(late)), late


def is_read(known: Known, path: str) -> bool:
    """Whether Envoy is known to read a file, or the one before did. Not that of a listener that
    only drains."""
    state = known.states.get(path)
    read = state in (ACKED, NACKED) or path in known.nacks or (not state and path in known.acked)
    return read and path not in known.leaving


def unjudged(known: Known, files: Files, step: str) -> list[str]:
    """The published files that Envoy is to judge before this step."""
    kinds = CHILD_KINDS if step == REFERENCES else CHILD_KINDS | REFERENCE_KINDS
    return [path for path, file in files.items()
            if file.kind in kinds and path not in known.states]


def to_retry(known: Known, files: Files) -> list[str]:
    """References that were NACKed for what is mended now, and that are published as they are:
    Envoy has to be notified of them again."""
    return [path for path, file in files.items() if file.kind in REFERENCE_KINDS
            and known.states.get(path) == NACKED and path not in known.nacks]


def likely_cause(file: File, files: Files) -> str:
    """What a glance at a file shows; "" where it shows nothing."""
    if not file.content.strip():
        return "the file is empty"
    if file.content.lstrip()[:1] == b"{":
        try:
            parse_json(file.content)
        except ValueError as error:
            return f"not valid JSON: {why(error).partition(': ')[2]}"
    named = {each.decode("utf-8", "replace") for each in
             re.findall(rb"/current/([-._a-zA-Z0-9/]+)", file.content)}
    missing = sorted(named - files.keys())
    return f"it names {shortened(missing)}, which is not published" if missing else ""


# -- asking Envoy --------------------------------------------------------------------------------


class Admin(threading.Thread):
    """Envoy's admin interface, in a thread: the main thread never waits for it.

    `wake` gets ("end", why) when nothing listens or Envoy's connection ended, ("closed", why) for
    a connection that nobody answered, ("meet", None) for one to another process, ("blind", reason)
    for one whose counters do not tell, ("look", Look) for each answer to `ask`, and ("silent",
    reason) where there is none in time.
    """

    def __init__(self, url: str, wake: Callable[[str, object], None]) -> None:
        super().__init__(name="admin", daemon=True)
        self.url, self._wake = url, wake
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._hidden, self._deaf, self._live = "", False, False
        self._rejected, self._reason = 0, ""

    def ask(self) -> None:
        """Look at Envoy now; the answer is a wake."""
        try:
            os.write(self._write, b"?")
        except BlockingIOError:
            pass  # it is asked enough

    def run(self) -> None:
        ended_at, gone, refused = -1.0, False, False
        while True:
            try:
                kept = self._connect()
            except OSError as error:
                if not gone:
                    self._wake("end", f"{self.url}: {why(error)}")
                refused = True
            else:
                with kept.sock:
                    met = self._stay(kept, ended_at)
                # A process that dies still accepts connections for a moment: the end of one that
                # nobody answered counts only if there was none to be had before it.
                self._wake("end" if met or refused else "closed",
                           f"{self.url}: the connection ended")
                ended_at, refused = time.monotonic(), False
            gone = True
            time.sleep(PROBE)

    def _connect(self) -> http.client.HTTPConnection:
        parts = urllib.parse.urlsplit(self.url)
        host, port = parts.hostname or "127.0.0.1", parts.port or 80
        connection = http.client.HTTPConnection(host, port, timeout=ANSWER_BOUND)
        if parts.scheme != "unix":
            connection.connect()
            return connection
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(ANSWER_BOUND)
        try:
            connection.sock.connect(parts.path)
        except OSError:
            connection.sock.close()
            raise
        return connection

    def _stay(self, kept: http.client.HTTPConnection, ended_at: float) -> bool:
        """Meet the process behind a connection, and answer questions until the connection ends.

        A process that was up before the last connection ended is the one that was met then. Returns
        whether it answered.
        """
        self._wake("connected", None)
        met = False
        while True:
            try:
                if not met:
                    uptime = self._meet()
                    met = True
                    if ended_at < 0 or uptime < time.monotonic() - ended_at + 2.0:
                        self._live, self._rejected, self._reason = False, 0, ""
                        self._wake("meet", None)
                    self.ask()
                if kept.sock in select.select([kept.sock, self._read], [], [])[0]:
                    return met
                os.read(self._read, 4096)
                self._wake("look", self._look())
            except (OSError, http.client.HTTPException, AdminError) as error:
                if select.select([kept.sock], [], [], 0)[0] or (
                        not met and isinstance(error, ConnectionError)):
                    return met  # its end is why
                self._wake("silent" if isinstance(error, OSError) else "blind", why(error))
                if not met:
                    time.sleep(ANSWER_BOUND)  # it is not Envoy, or stalls

    def _meet(self) -> float:
        """The uptime of this process in seconds; whether its counters can tell is noted."""
        info = self._get("/server_info")
        uptime = re.search(r'"uptime_current_epoch": "([0-9]{1,12})s"', info, re.ASCII)
        if uptime is None:
            raise AdminError(NOT_ENVOY)
        self._hidden, self._deaf = "", False
        self._restarted_hot(re.search(r'"restart_epoch": [1-9]', info) is not None)
        if not self._deaf and '"stats_matcher"' in self._get(STATS_MATCHER):
            self._hidden = "its stats_matcher leaves the counters out"
        return float(uptime[1])

    def _restarted_hot(self, hot: bool) -> None:
        """Such an Envoy counts the events of its parent too. The connection that is kept may be
        the parent's, so each look asks."""
        if hot and not self._deaf:
            self._wake("warning", "Envoy was restarted hot: start it with --disable-hot-restart")
            self._deaf, self._hidden = True, "it was restarted hot, and counts for its parent too"

    def _look(self) -> Look:
        self._live = self._live or self._get("/ready").strip() == "LIVE"
        counts, gauges = parse_stats(self._get(STATS))
        self._restarted_hot(gauges.get("server.hot_restart_epoch", 0) > 0)
        counts = {} if self._deaf else counts
        rejected = counts.get("listener_manager.lds", Counts()).failed
        if rejected > self._rejected:
            self._reason = listener_errors(self._get(
                "/config_dump?resource=dynamic_listeners&mask=name,error_state.details"))
        self._rejected = rejected
        return Look(counts, self._live, self._hidden,
                    gauges.get("cluster_manager.warming_clusters", 0),
                    gauges.get("server.dynamic_unknown_fields", 0), self._reason)

    def _get(self, path: str) -> str:
        """The body of an answer on a connection of its own, whole within ANSWER_BOUND."""
        deadline = time.monotonic() + ANSWER_BOUND
        connection = self._connect()
        with connection.sock as sock, Answering(sock, deadline) as answering:
            connection.request("GET", path)
            response = http.client.HTTPResponse(answering, method="GET")  # type: ignore[arg-type]
            body = bytearray()
            try:
                response.begin()
                while part := response.read1(1 << 16):
                    body += part
                    if len(body) > ANSWER_BYTES:
                        raise TimeoutError
            except TimeoutError:
                text = f"{path.partition('?')[0]}: no end of the answer in time"
                raise TimeoutError(text) from None
            except http.client.HTTPException:
                raise AdminError(NOT_ENVOY) from None
        if response.status not in (200, 503):  # /ready is 503 until Envoy is live
            raise AdminError(f"{path.partition('?')[0]}: HTTP {response.status}")
        return body.decode("utf-8", "replace")


class Answering(io.RawIOBase):
    """What comes over a socket until a deadline. (The time limit of a socket is for each read: who
    sends headers byte by byte is within it for ever.)"""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(max(0.001, self._deadline - time.monotonic()))
        if time.monotonic() >= self._deadline:
            raise TimeoutError
        return self._sock.recv_into(buffer)


def parse_stats(text: str) -> tuple[dict[str, Counts], dict[str, int]]:
    """Of /stats, one `name: value` a line: the counts by scope, and the other figures by name."""
    counts: dict[str, list[int]] = {}
    figures: dict[str, int] = {}
    for line in text.splitlines():
        name, _, value = line.partition(": ")
        if not (value.isascii() and value.isdigit() and len(value) < 19):
            continue
        scope, _, leaf = name.rpartition(".")
        if leaf in LEAVES:
            counts.setdefault(scope, [0, 0, 0])[LEAVES[leaf]] += int(value)
        else:
            figures[name] = int(value)
    return {scope: Counts(*values) for scope, values in counts.items() if values[0]}, figures


def listener_errors(text: str) -> str:
    """Why Envoy rejected listeners, in its own words, cut where they would quote the content."""
    try:
        rows = json_object(parse_json(text)).get("configs") or []
        details = {json_object(json_object(row).get("error_state")).get("details") for row in rows}
    except (ValueError, TypeError):
        return ""
    words = {re.split(r"[\[{\n\"]", detail, maxsplit=1)[0][:REASON_LENGTH].strip(" :,(")
             for detail in details if isinstance(detail, str)}
    return "; ".join(sorted(words - {""}))[: 2 * REASON_LENGTH]


# ---------------------------------------------------------------------------------------------
# Log, metrics, probes
# ---------------------------------------------------------------------------------------------

LOG_LEVELS = ("debug", "info", "warning", "error")
# Seconds until an outage is logged again, and lines about it until then: errors that differ each
# time must not flood either.
REMINDER, OUTAGE_LINES = 300.0, 8
# PIPE_BUF: a pipe accepts so much whole or not at all, whoever else writes to it.
LINE_BYTES = 4096
STDERR_PATIENCE = 20  # milliseconds for a reader of stderr that is behind


class Log:
    """One line a record to stderr: a message, `%`-formatted with `args` only if it is written, and
    fields. A line is written whole or not at all: where nobody reads stderr, lines are dropped and
    counted, and the loader goes on. (Not `logging`: it costs 6 ms of import.)"""

    def __init__(self, fd: int = 2, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fd, self._clock = fd, clock
        self._lock = threading.Lock()
        self._blocked = False
        self._outages: dict[str, dict[str, float]] = {}  # topic -> message -> when it was written
        self.configure("text", "info")

    def configure(self, form: str, level: str) -> None:
        self._form, self._level = form, LOG_LEVELS.index(level)

    def outage(self, topic: str, message: str, /, **fields: object) -> None:
        """A warning about something persistent: once, and again every five minutes; else debug."""
        now = self._clock()
        with self._lock:
            past = self._outages.setdefault(topic, {})
            for old in [old for old, at in past.items() if now - at >= REMINDER]:
                del past[old]
            due = message not in past and len(past) < OUTAGE_LINES
            if due:
                past[message] = now
        self._write("warning" if due else "debug", message, **fields)

    def recovered(self, topic: str, message: str) -> None:
        """The end of an outage: one line if there was one, else nothing."""
        with self._lock:
            was_out = self._outages.pop(topic, None) is not None
        if was_out:
            self._write("info", message)

    def _write(self, level: str, message: str, /, *args: object, **fields: object) -> None:
        if LOG_LEVELS.index(level) < self._level:
            return
        line = log_line(self._form, level, message % args if args else message, fields)
        poll = select.poll()
        with self._lock:
            poll.register(self._fd, select.POLLOUT)
            self._blocked = not poll.poll(0 if self._blocked else STDERR_PATIENCE)
            try:
                if not self._blocked:
                    os.write(self._fd, line)
            except OSError:  # closed, or a full disk: no reason to end
                self._blocked = True
        if self._blocked:
            metrics.add("xds_loader_errors_total", ("log",))

    debug = functools.partialmethod(_write, "debug")
    info = functools.partialmethod(_write, "info")
    warning = functools.partialmethod(_write, "warning")
    error = functools.partialmethod(_write, "error")


def log_line(form: str, level: str, message: str, fields: Mapping[str, object]) -> bytes:
    """`2025-11-20T23:31:54.120Z INFO published version=ab12 source="configmap demo/envoy-xds"`, or
    the same as a JSON object. Where it is too long, the longest of its texts are cut."""
    when = timestamp(time.time())
    texts = {"message": message, **{name: plain_value(value) for name, value in fields.items()}}
    while True:
        if form == "json":
            line = json.dumps({"time": when, "level": level, **texts})
        else:
            said = message if message.isprintable() else json.dumps(message)
            pairs = (f" {name}={text_value(texts[name])}" for name in fields)
            line = f"{when} {level.upper()} {said}{''.join(pairs)}"
        encoded = line.encode("utf-8", "backslashreplace") + b"\n"
        if len(encoded) <= LINE_BYTES:
            return encoded
        longest = max(texts, key=lambda name: len(str(texts[name])))
        texts[longest] = f"{str(texts[longest])[: len(str(texts[longest])) // 2]}..."
        message = str(texts["message"])


def plain_value(value: object) -> Json:
    """A number stays, a sequence is joined by commas, the rest is its str()."""
    if value is None or isinstance(value, int) or (isinstance(value, float) and value - value == 0):
        return value  # not NaN nor infinite, which JSON does not have
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def text_value(value: Json) -> str:
    """A value in a text line. What comes from outside (names, reasons) cannot forge a line."""
    text = value if isinstance(value, str) else json.dumps(value)
    if text.isprintable() and re.fullmatch(r'[^\s"=]+', text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def timestamp(now: float) -> str:
    """Unix time as RFC 3339 in UTC, to the millisecond."""
    seconds, millis = divmod(int(now * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{millis:03}Z"


log = Log()

# -- metrics -----------------------------------------------------------------------------------


class Metric(NamedTuple):
    name: str
    type: str  # counter, gauge or histogram
    help: str
    labels: tuple[str, ...] = ()


METRICS = (
    Metric("xds_loader_info", "gauge", "The loader that runs.", ("version",)),
    Metric("xds_loader_publications_total", "counter", "Published snapshots by step.", ("step",)),
    Metric("xds_loader_published_files_total", "counter", "Files that changed in publications."),
    Metric("xds_loader_publication_duration_seconds", "histogram", "From an event to the file."),
    Metric("xds_loader_ack_duration_seconds", "histogram", "From a publication to Envoy's answer."),
    Metric("xds_loader_nacks_total", "counter", "Files that Envoy rejected by type.", ("type",)),
    Metric("xds_loader_nacked_files", "gauge", "1 while the wanted bytes are NACKed.", ("file",)),
    Metric("xds_loader_unknown_files", "gauge", "1 while no ACK or NACK is known.", ("file",)),
    Metric("xds_loader_source_last_event_timestamp_seconds", "gauge",
           "When a source last answered: an event, a bookmark or a list.", ("source",)),
    Metric("xds_loader_source_synced", "gauge", "1 once the first list is complete.", ("source",)),
    Metric("xds_loader_watch_restarts_total", "counter", "Watches resumed.", ("source", "reason")),
    Metric("xds_loader_api_requests_total", "counter", "API requests.", ("code", "verb")),
    Metric("xds_loader_errors_total", "counter", "Errors by kind.", ("kind",)),
    Metric("xds_loader_clusters", "gauge", "Clusters by where endpoints live.", ("endpoints",)),
    Metric("xds_loader_inotify_instances_budget", "gauge", "Files that Envoy may subscribe to."),
    Metric("xds_loader_inotify_instances_used", "gauge", "Files that Envoy subscribes to."),
    Metric("xds_loader_snapshot_info", "gauge", "The published snapshot.", ("version",)),
    Metric("xds_loader_snapshot_timestamp_seconds", "gauge", "When it was published."),
    Metric("process_resident_memory_bytes", "gauge", "Resident memory."),
    Metric("process_cpu_seconds_total", "counter", "User and system CPU time."),
    Metric("process_start_time_seconds", "gauge", "When the process started."),
)

# From the 0.5 ms of a good publication to the 10 s after which nobody waits.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BUCKET_TEXTS = {bound: f'_bucket{{le="{bound}"}}' for bound in BUCKETS}
LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

Labels = tuple[str, ...]


class Metrics:
    """The values of METRICS, to be recorded from any thread. Labels are a tuple of values in the
    order declared. A series is held by what stands between name and value in the output."""

    def __init__(self, version: str) -> None:
        self._lock = threading.Lock()
        self._labels = {metric.name: metric.labels for metric in METRICS}
        self._series: dict[str, dict[str, float]] = {name: {} for name in self._labels}
        for name, kind, _, labels in METRICS:
            if kind == "histogram":
                suffixes = (*BUCKET_TEXTS.values(), '_bucket{le="+Inf"}', "_sum", "_count")
                self._series[name] = dict.fromkeys(suffixes, 0.0)
            elif kind == "counter" and not labels:
                self.add(name, by=0)
        self.set("xds_loader_info", 1, (version,))
        self.set("process_start_time_seconds", time.time())

    def add(self, name: str, labels: Labels = (), by: float = 1) -> None:
        """Count. `by=0` makes a series that starts at 0, which rate() needs to see the first 1."""
        with self._lock:
            series, suffix = self._series[name], self._suffix(name, labels)
            series[suffix] = series.get(suffix, 0.0) + by

    def set(self, name: str, value: float, labels: Labels = ()) -> None:
        with self._lock:
            self._series[name][self._suffix(name, labels)] = value

    def replace(self, name: str, series: Mapping[Labels, float]) -> None:
        """Set all series of a gauge: those that are gone from it are gone from the output."""
        with self._lock:
            self._series[name] = {self._suffix(name, labels): series[labels] for labels in series}

    def observe(self, name: str, seconds: float) -> None:
        """Add a duration to a histogram."""
        with self._lock:
            series = self._series[name]
            for bound, text in BUCKET_TEXTS.items():
                series[text] += seconds <= bound
            series["_sum"] += seconds
            series["_count"] += 1
            series['_bucket{le="+Inf"}'] += 1

    def render(self) -> bytes:
        """All of it in Prometheus' text format 0.0.4, in an order that does not change."""
        times = os.times()
        self.set("process_cpu_seconds_total", round(times.user + times.system, 2))
        with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[1])
            self.set("process_resident_memory_bytes", pages * os.sysconf("SC_PAGE_SIZE"))
        with self._lock:
            held = {name: [*series.items()] for name, series in self._series.items()}
        lines = []
        for name, kind, text, _ in METRICS:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            rows = held[name] if kind == "histogram" else sorted(held[name])
            lines += [f"{name}{suffix} {value:.15g}" for suffix, value in rows]
        return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")

    def _suffix(self, name: str, values: Labels) -> str:
        """`{code="200",verb="list"}`, "" without labels."""
        names = self._labels[name]
        pairs = (f'{n}="{v.translate(LABEL_ESCAPES)}"' for n, v in zip(names, values, strict=True))
        return "{" + ",".join(pairs) + "}" if names else ""


metrics = Metrics(__version__)

# -- probes, metrics and the snapshot over HTTP ------------------------------------------------
#
# Whoever reaches the port needs no credentials, so everything is bounded: connections, their time,
# the size of a request, what rendering may cost. It shows names and figures: never the content of
# a file, nor Envoy's reasons, which quote it.

CONNECTIONS_MAX = 256  # beyond it the oldest is closed: a crowd makes room by those that dawdle
CONNECTION_TIME = 5.0  # seconds from accept to close, whatever the client does
TICK = 0.2  # seconds between two looks for connections past their time
HEAD_MAX = 8192  # bytes that are read of a request
# An answer that costs more than a probe's is used for so many times as long as it took to make, so
# that rendering for clients that ask without a pause takes a twentieth of a CPU at most.
REUSED = 20


class Status(NamedTuple):
    """What the loop shows. It puts a new value in place; nothing in one changes."""

    files: Files  # of the snapshot; replaced with it, never changed in place
    version: str = ""  # of the published snapshot, "" while there is none
    published_at: float = 0.0  # Unix time
    states: Mapping[str, str] = {}  # path -> acked, nacked, unknown or unread
    missing: tuple[str, ...] = ()  # sources waited for
    stale: tuple[str, ...] = ()  # sources that show their last good state
    started: bool = False  # Envoy has ACKed what it needs to serve
    last_turn: float = 0.0  # monotonic time
    turn_bound: float = 120.0  # seconds within which the loop turns again if it is well

    def paths(self, state: str) -> list[str]:
        """The files in this state; one that has none is unknown."""
        states = {**dict.fromkeys(self.files, "unknown"), **self.states}
        return sorted(path for path, its in states.items() if its == state)


Answer = tuple[int, str, bytes]
"""An HTTP response: status code, Content-Type, body."""


def text_answer(code: int, *lines: str) -> Answer:
    body = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
    return code, "text/plain; charset=utf-8", body


def ready_answer(status: Status, *, started: bool = True) -> Answer:
    """/readyz: 200 as soon as a snapshot is published. /startz: and Envoy has ACKed it. The body
    names what is not as it should be, which takes no running Envoy out of its Service."""
    ready = f"ready, version {status.version}" if started else "not ACKed by Envoy yet"
    lines = [ready if status.version else "no snapshot yet"]
    named = {"missing": status.missing, "stale": status.stale, "nacked": status.paths("nacked")}
    lines += [f"{what}: {name}" for what, names in named.items() for name in names]
    return text_answer(200 if status.version and started else 503, *lines)


def snapshot_answer(status: Status) -> Answer:
    """/snapshot: the published files and what Envoy made of them. One that holds a secret has no
    size and no digest: with a digest one tests guesses at a password."""
    rows = []
    for path, file in sorted(status.files.items()):
        row: dict[str, Json] = {"path": path, "source": file.source}
        if not holds_secret(file.content):
            row |= {"bytes": len(file.content), "sha256": file.digest}
        rows.append({**row, "state": status.states.get(path, "unknown")})
    body = {"version": status.version or None,
            "published_at": timestamp(status.published_at) if status.version else None,
            "files": rows,
            **{state: status.paths(state) for state in ("nacked", "unknown", "unread")},
            "missing": status.missing, "stale": status.stale}
    return 200, "application/json", (json.dumps(body, indent=1) + "\n").encode()


def listen_address(text: str) -> tuple[str, int]:
    """`:9000`, `127.0.0.1:9000`, `[::1]:9000` as host ("" is every address) and port."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\s:\[\]/]*)):([0-9]{1,5})", text)
    if not found or int(found[3]) > 65535:
        raise ValueError("is not a valid [ADDRESS]:PORT, such as :9000 or [::1]:9000")
    return found[1] or found[2], int(found[3])


class Client(NamedTuple):
    """A connection: when it is closed at the latest, and what is left to do."""

    socket: socket.socket
    end: float
    talk: Iterator[int]


class Listener:
    """The server of --listen, in one thread that waits for no client. The loop sets `status`."""

    def __init__(self, host: str, port: int, recorded: Metrics) -> None:
        self.status = Status({}, last_turn=time.monotonic())
        self.clients: dict[int, Client] = {}  # by descriptor, oldest first
        self._recorded, self._stopped = recorded, False
        self._kept: dict[str, tuple[float, Answer]] = {}  # path -> good until, answer
        self._socket, self._poll = listening_socket(host, port), select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped = True
        with contextlib.suppress(OSError):  # stopped before
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()

    def _serve(self) -> None:
        while not self._stopped:
            for number, _ in self._poll.poll(TICK * 1000):
                if number not in self.clients:
                    self._accept()
                    continue
                try:
                    self._poll.modify(number, next(self.clients[number].talk))
                except (StopIteration, OSError):
                    self._close(number)
            now, crowd = time.monotonic(), len(self.clients) - CONNECTIONS_MAX
            for place, (number, client) in enumerate([*self.clients.items()]):
                if place < crowd or client.end < now:
                    self._close(number)
        for number in [*self.clients]:
            self._close(number)
        self._socket.close()

    def _accept(self) -> None:
        try:
            client, _ = self._socket.accept()
        except OSError:  # no descriptor is left: not to spin
            time.sleep(0.01)
            return
        client.setblocking(False)
        talk = self._talk(client)
        self._poll.register(client, next(talk))
        self.clients[client.fileno()] = Client(client, time.monotonic() + CONNECTION_TIME, talk)

    def _close(self, number: int) -> None:
        self._poll.unregister(number)
        self.clients.pop(number).socket.close()

    def _talk(self, client: socket.socket) -> Iterator[int]:
        """One request and its answer; it yields what it waits for."""
        head, block = b"", b"-"
        while block and len(head) < HEAD_MAX and not re.search(rb"\n\r?\n", head):
            yield select.POLLIN
            block = client.recv(HEAD_MAX - len(head))
            head += block
        words = head.partition(b"\n")[0].decode("latin-1").split()
        if len(words) == 3 and words[0] == "GET" and words[2].startswith("HTTP/1."):
            code, form, body = self.answer(words[1].partition("?")[0])
        else:
            code, form, body = text_answer(400, "not a GET of HTTP/1.1")
        fields = f"Content-Type: {form}\r\nContent-Length: {len(body)}\r\n\r\n"
        line = f"HTTP/1.0 {code} {http.client.responses[code]}\r\n"
        left = memoryview((line + fields).encode() + body)
        while left:
            yield select.POLLOUT
            left = left[client.send(left) :]

    def answer(self, path: str) -> Answer:
        """What is served there."""
        status, began = self.status, time.monotonic()
        if path == "/healthz":  # 200 while the loop turns
            age, bound = began - status.last_turn, status.turn_bound
            late = f"the loop has not turned for {age:.0f} s (bound: {bound:.0f} s)"
            return text_answer(503, late) if age > bound else text_answer(200, "ok")
        if path in ("/readyz", "/startz"):
            return ready_answer(status, started=path == "/readyz" or status.started)
        if path not in ("/metrics", "/snapshot"):
            return text_answer(404, "not found")
        until, kept = self._kept.get(path, (0.0, None))
        if kept and began < until:
            return kept
        if path == "/snapshot":
            kept = snapshot_answer(status)
        else:
            kept = 200, "text/plain; version=0.0.4; charset=utf-8", self._recorded.render()
        now = time.monotonic()
        self._kept[path] = now + REUSED * (now - began), kept
        return kept


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; "" is every address, of IPv6 too if there is any."""
    both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:  # UnicodeError: a host that cannot be a name
        reason = why(error).partition(" (while")[0]
        where = f"{host or '*'} port {port}"
        raise LoaderError(f"--listen: cannot bind {where}: {reason}") from error


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------
#
# One thread turns: news (an event, an answer of Envoy, a signal) -> compose -> plan -> publish ->
# ask Envoy. `Wakes` has the news, `Asking` what passes between us and Envoy, `Loop` the rest.

# Debounce: an event of a quiet time is published at once. One that comes within QUIET of the last
# publication may belong to a burst, which is gathered until nothing came for QUIET, for GATHER at
# most.
DEBOUNCE_QUIET, DEBOUNCE_GATHER = 0.004, 0.2  # seconds
STEP_DELAY = 0.1  # seconds between ordered steps, unless --step-delay is given
STEP_DELAYS = 10  # how many of them a step waits at most, whatever else is published meanwhile
ONETIME_POLL = 1.0  # seconds between two lists of `--onetime --timeout`
LOCK_POLL = 0.2  # seconds between two tries to be the only loader of a directory

# Envoy is there, and does not answer; answers; answers in a way that cannot be understood.
SILENT, MET, BLIND = "silent", "met", "blind"
LINKS = {"connected": SILENT, "silent": SILENT, "meet": MET, "look": MET, "blind": BLIND,
         "end": "", "closed": ""}  # by what Admin found
STARTING_KINDS = ("cds", "lds", "rds")  # what Envoy must have ACKed to have started

DISK_HINTS: Mapping[int | None, str] = {
    errno.EACCES: "run init container, loader and Envoy as one user",
    errno.EPERM: "run init container, loader and Envoy as one user",
    errno.EROFS: "mount a writable volume there",
    errno.ENOSPC: "make room: a snapshot needs what its changed files need",
    errno.EMFILE: "raise the limit of open files",
}


class Wakes:
    """The news for the main thread, and a wait for them that a signal ends.

    A wait on a lock would not do: a signal that comes after the last bytecode and before the wait
    sets a flag that nobody looks at. To the pipe the interpreter itself writes
    (signal.set_wakeup_fd), so that select(2) returns at once.
    """

    def __init__(self) -> None:
        self._news: deque[tuple[str, Any]] = deque()
        self._read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def put(self, what: str, news: object = None) -> None:
        """Add news, from any thread."""
        self._news.append((what, news))
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self.write, b"\0")

    def take(self, seconds: float) -> list[tuple[str, Any]]:
        """All news there are, after waiting up to so many seconds for the first."""
        until = time.monotonic() + seconds
        while not self._news and (left := until - time.monotonic()) > 0:
            if select.select([self._read], [], [], left)[0]:
                os.read(self._read, 4096)  # there may be more bytes than news
        return [self._news.popleft() for _ in range(len(self._news))]


class Asked(NamedTuple):
    """The publication that Envoy is asked about; the next one waits for its end."""

    moved: tuple[str, ...]  # xDS files
    fields: Mapping[str, object] | None  # of its line in the log
    at: float
    until: float  # when it ends whatever Envoy did


class Asking:
    """What Envoy makes of the publications (`known`), and when the next step may follow them."""

    def __init__(self, output: Output, step_delay: float | None) -> None:
        self.known = Known()
        self.link = ""  # SILENT, MET or BLIND; "": there is nobody to ask
        self.asked: Asked | None = None
        self.waits_since = 0.0  # of a step whose time has not come
        self.look_at = 0.0  # when Envoy is looked at again; 0: not before it is asked
        self.mixed: tuple[str, ...] = ()  # Envoy has to be notified of these once more
        self.notes: list[str] = []
        self.unsaved = False  # there is something that a restart is to know
        self.admin: Admin | None = None
        self._output, self._step_delay, self._look = output, step_delay, Look()
        self._moved_at = dict.fromkeys(WAITING_STEPS, time.monotonic())
        self._asked_at, self._look_pause = 0.0, LOOK_FIRST
        self._silent_until = 0.0  # until then a silent Envoy is waited for; 0: it is not silent
        self._started = False

    def start(self, url: str, wake: Callable[[str, object], None]) -> None:
        """Ask Envoy from now on; first for its counts of now, before anything moves."""
        self.admin = Admin(url, wake)
        self.admin.start()
        if self._output.published:
            self._await(ANSWER_BOUND)

    @property
    def started(self) -> bool:
        """Whether Envoy has ACKed what it needs to serve, as far as it can be asked."""
        return self.admin is None or self._started or self.link == BLIND

    def opens_at(self, step: str) -> float:
        """When a step may be published (monotonic).

        References and removals wait until what went out before them is judged by Envoy, and no
        cluster warms. Where Envoy is not asked or does not tell, a pause stands for it.
        """
        now = time.monotonic()
        if step not in WAITING_STEPS:
            return now
        since = self.waits_since = self.waits_since or now
        delay = STEP_DELAY if self._step_delay is None else self._step_delay
        pause = min(self._moved_at[step] + delay, since + STEP_DELAYS * delay)
        if self.link not in (MET, SILENT):
            return pause
        if self._look.warming and now < since + WARM_BOUND:
            self.look_at = self.look_at or now
            return since + WARM_BOUND
        if unjudged(self.known, self._output.published, step):
            return max(pause, self._silent_until)
        return now if self._step_delay is None else pause

    # -- a publication --------------------------------------------------------------------------

    def moved(self, before: Files, after: Files, desired: Files, again: Sequence[str]) -> None:
        """Files moved, some of them `again`."""
        known, now = self.known, time.monotonic()
        kinds = {after[path].kind for path in (*moved_paths(before, after), *again)
                 if known.states.get(path) != UNREAD and path not in known.late}
        if kinds & CHILD_KINDS:
            self._moved_at[REFERENCES] = now
        if kinds - {""}:
            self._moved_at[REMOVALS] = now
        self.known = after_publication(known, before, after, desired, again)

    def ask_about(self, moved: Iterable[str], fields: Mapping[str, object]) -> None:
        """Ask what became of a publication; its line in the log comes with the answer."""
        if self.link == MET or time.monotonic() < self._silent_until:
            files = self._output.published
            self._await(ASK_BOUND[self.link == MET],
                        tuple(path for path in moved if files[path].kind), fields)
            self._ask()
        else:
            log.info("published", **fields, **({"ack": "unknown"} if self.admin else {}))

    def _await(self, bound: float, moved: tuple[str, ...] = (),
               fields: Mapping[str, object] | None = None) -> None:
        now = time.monotonic()
        self.asked = Asked(moved, fields, now, now + bound)

    def _ask(self) -> None:
        assert self.admin is not None
        self.look_at, self._asked_at = 0.0, time.monotonic()
        self.admin.ask()

    def turn(self) -> None:
        """Look at Envoy if it is time; go on without its answer if it is late."""
        now = time.monotonic()
        if self.look_at and now >= self.look_at:
            self._ask()
        if self.asked is None or now < self.asked.until:
            return
        if self.link == MET and self.asked.moved:
            known, late = after_bound(self.known, self._output.published, self.asked.moved)
            if late and not self._look.hidden:
                self.known = known
                log.warning("Envoy did not read %s in time: does a bootstrap, listener or cluster "
                            "name this path?", shortened(late))
        self.end()

    def end(self, *, told: bool = False) -> None:
        """The line of the publication that was asked about, when Envoy told all or nobody waits."""
        asked, self.asked = self.asked, None
        self._look_pause = LOOK_FIRST
        if asked is None or not asked.fields:
            return
        took, states = time.monotonic() - asked.at, self.known.states
        found = {states.get(path, UNKNOWN) for path in asked.moved}
        if told:
            metrics.observe("xds_loader_ack_duration_seconds", took)
        all_read = told and ACKED in found and found <= {ACKED, UNREAD}
        ack = "no" if NACKED in found else "yes" if all_read else "unknown"
        unread = [path for path in asked.moved if states.get(path) == UNREAD]
        log.info("published", **asked.fields, ack=ack, ack_ms=round(took * 1000, 1),
                 **({"unread": shortened(unread)} if unread else {}))

    # -- what Envoy does --------------------------------------------------------------------------

    def take(self, what: str, news: Any) -> None:
        """Take in what Admin found."""
        now, before, self.link = time.monotonic(), self.link, LINKS[what]
        silent_until = self._silent_until or now + SILENT_BOUND
        self._silent_until = silent_until if self.link == SILENT else 0.0
        if what == "connected":
            self.known = self.known._replace(back_at=now)
        elif what == "silent":
            log.outage("envoy", f"Envoy does not answer: {news}")
            self.look_at = now + LOOK_LAST
        elif what == "meet":
            self.known = after_meeting(self.known, self.known.back_at)
            self._started, self._look_pause = False, LOOK_FIRST
            if self.asked is None:
                self._await(ANSWER_BOUND)
        elif what == "look":
            log.recovered("envoy", "Envoy answers")
            self.look_at = 0.0
            self._take_look(news, now)
        else:
            log.outage("envoy", f"Envoy is not asked: {news}")
            self.look_at = 0.0
            if what == "end" and before in (MET, SILENT):
                self._started = False
                self.known, blamed = after_end(self.known, self._output.published, now)
                self._tell_nacks(blamed)
            self.end()

    def _take_look(self, look: Look, now: float) -> None:
        """What Envoy made of the published files."""
        files, ignored = self._output.published, look.unknown_fields - self._look.unknown_fields
        if ignored > 0 and self.asked is not None and self.asked.moved:
            log.warning("Envoy ignored %d unknown fields in %s: a typing error?", ignored,
                        shortened(self.asked.moved))
        self._look = look
        self.known, outcome = after_look(self.known, files, look)
        self._tell_nacks(outcome.nacks)
        self.unsaved = self.unsaved or bool(outcome.acks)
        self.mixed += outcome.mixed
        if not outcome.pending:
            self.notes = [f"what Envoy makes of {shortened(sorted(outcome.hidden))} stays unknown: "
                          f"{look.hidden}"] if outcome.hidden else []
        states = self.known.states
        if look.live and files and not self._started:
            self._started = all(states.get(path) in (ACKED, UNREAD) or path in outcome.hidden
                                for path, file in files.items() if file.kind in STARTING_KINDS)
        waiting = bool(outcome.pending or outcome.mixed or not look.live)
        if self.asked is not None and (outcome.nacks or not waiting):
            self.end(told=True)  # a rollback does not wait for the other files
        unknown = any(file.kind and path not in states for path, file in files.items())
        if waiting or unknown or look.warming or not self._started:
            self._plan_look(now)
        else:
            self._look_pause = LOOK_FIRST

    def _plan_look(self, now: float) -> None:
        """Look again: soon while something waits, ever more seldom while all it can do is to
        become known."""
        soon = self.asked is not None or self.waits_since
        last = LOOK_LAST if soon else LOOK_IDLE if self._started else 1.0
        self._look_pause = min(self._look_pause * 1.5, last)
        # A look costs Envoy's main thread 1 ms, with 1,000 clusters 41 ms: leave it as much room.
        took = min(now - self._asked_at, LOOK_LAST)  # or it was asked when Envoy was met
        self.look_at = now + max(self._look_pause, took)

    def _tell_nacks(self, paths: Iterable[str]) -> None:
        """One line and one count for each file that Envoy rejected."""
        files = self._output.published
        for path in sorted(paths):
            self.unsaved = True
            back = path in self.known.acked and not same_file(self.known.acked[path], files[path])
            metrics.add("xds_loader_nacks_total", (files[path].kind,))
            log.error("Envoy NACKed %s (%s): %s; %s", path, files[path].kind,
                      self.known.nacks[path].reason,
                      "rolled back to its last ACKed bytes" if back else "it stays, for there are "
                      "no other ACKed bytes", source=files[path].source)


class Loop:
    """The main thread: waits, composes, plans, publishes, and takes in what Envoy made of it."""

    def __init__(self, options: Options, config: Config) -> None:
        self.options = options
        self.wakes = Wakes()
        self.sources = Sources(options, config, self.wakes.put)
        self.output = Output(options.output_dir)
        self.asking = Asking(self.output, options.step_delay)
        self.check = Check(options.check_cmd, self.output, self.wakes.put)
        self.stopping = False
        self._listener: Listener | None = None
        self._wanted: Wanted | None = None  # None: to be composed
        self._noted: dict[str, frozenset[str]] = {}  # what was warned of, by topic
        self._event_at = time.monotonic()  # of the first event that is not composed
        self._published_at = 0.0  # monotonic; 0: nothing yet
        self._switched_at = 0.0  # Unix time of the snapshot
        self._step_at = 0.0  # when the step that waits may be published
        self._check_at = 0.0  # when the files on disk are checked
        self._retry_at, self._backoff = 0.0, BACKOFF_FIRST  # of the disk
        # A defect in a thread must end the process: a deaf sidecar looks like a quiet one.
        threading.excepthook = lambda failed: self.wakes.put("defect", failed.exc_value)

    # -- running ------------------------------------------------------------------------------

    def run(self) -> int:
        """Until SIGTERM or SIGINT; with --onetime until the first complete snapshot."""
        deadline = time.monotonic() + self.options.timeout
        once = self.options.mode == "once"
        try:
            self._open(deadline if once else None)
            if once:
                self._publish_once(deadline)
            while not self.stopping and not once:
                self._turn()
                self._report()
                self._await(self._next_at())
        except OSError as error:
            raise LoaderError(self._disk_trouble(error)) from error
        finally:
            self.check.stop()
        self.asking.end()
        return 0

    def _open(self, deadline: float | None) -> None:
        """Take the directory as it is, and start everything that brings news."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # A signal interrupts nothing: it wakes the loop, as everything does.
            signal.signal(number, lambda number, _: self._signalled(number))
        signal.set_wakeup_fd(self.wakes.write, warn_on_full_buffer=False)
        if self.options.listen:
            host, port = self.options.listen
            self._listener = Listener(host, port, metrics)
        while not self.output.lock():
            text = f"{self.output.root}: another loader works here; give each its own --output-dir"
            if deadline is not None and time.monotonic() >= deadline:
                raise LoaderError(text)
            log.outage("lock", f"{text}; waiting for its end")
            self._report()
            self._await(time.monotonic() + LOCK_POLL)
            if self.stopping:
                return
        log.recovered("lock", f"{self.output.root}: the other loader has ended")
        done = self.output.recover()
        if done:
            log.info("%s: %s", self.output.root, "; ".join(done))
        self._switched_at = self.output.switched_at()
        self._check_at = time.monotonic() + self.options.sync_interval
        self.asking.known = known_from(self.output)
        self.sources.start(self.output.published)
        if self.options.envoy_admin:
            self.asking.start(self.options.envoy_admin, self.wakes.put)

    def _publish_once(self, deadline: float) -> None:
        """--onetime: when the sources are complete, publish step by step."""
        while True:
            self.composed(deadline)
            if self.check.refusal:
                self.output.prune()
                raise LoaderError(self.check.refusal)
            while self._advance():
                pass
            if not self._step_at and not self.check.running:
                return
            self._await(self._step_at or time.monotonic() + CHECK_SECONDS)

    def composed(self, deadline: float) -> Wanted:
        """The complete files of a one-time run; LoaderError where there will be none."""
        waits = self.options.timeout > 0
        while not self.stopping:
            wanted = self._compose()
            if wanted.complete:
                return wanted
            late = time.monotonic() >= deadline
            if wanted.failed or (late and (wanted.missing or waits)):
                raise LoaderError(unfinished(wanted, self.sources.trouble(), self.options))
            # Without --timeout each request has bounds of its own.
            self._await(deadline if waits else time.monotonic() + 60.0)
            self._wanted = None  # a request may have failed
        raise LoaderError("ended by a signal before there was a snapshot to publish")

    # -- waiting ------------------------------------------------------------------------------

    def _signalled(self, number: int) -> None:
        self.stopping = self.stopping or number != signal.SIGHUP
        self.wakes.put("refresh" if number == signal.SIGHUP else "stop")

    def _next_at(self) -> float:
        """When the loop turns if nothing happens."""
        asked = self.asking.asked
        times = (self.asking.look_at, asked.until if asked else self._step_at,
                 self._retry_at or self._check_at)
        return min(each for each in times if each)

    def _await(self, until: float) -> None:
        """Sleep until something happens; afterwards everything that happened is taken in."""
        news = self.wakes.take(until - time.monotonic())
        self._take(news)
        burst = self._published_at + DEBOUNCE_QUIET
        if any(what == "objects" and at < burst for what, at in news):
            end = time.monotonic() + DEBOUNCE_GATHER
            while time.monotonic() < end and (news := self.wakes.take(DEBOUNCE_QUIET)):
                self._take(news)

    def _take(self, everything: Iterable[tuple[str, Any]]) -> None:
        """Take in what happened; nothing is published here."""
        for what, news in everything:
            match what:
                case "defect":
                    raise news
                case "objects":
                    self._event_at = self._event_at if self._wanted is None else news
                    self._wanted = None
                case "refresh":
                    log.info("SIGHUP: checking and publishing now")
                    self.sources.refresh()
                    self._check_at = time.monotonic()
                    self._retry_at = min(self._retry_at, self._check_at)
                case "checked":
                    self.check.end(news)
                case "warning":
                    log.warning("%s", news)
                case _ if what in LINKS:
                    self.asking.take(what, news)

    # -- turning ------------------------------------------------------------------------------

    def _turn(self) -> None:
        """What is due now, and the next snapshots on the way to what is wanted."""
        self.asking.turn()
        now = time.monotonic()
        if self._retry_at > now:
            return
        try:
            if self._retry_at:
                self.output.recover()
                self._retry_at = 0.0
            if now >= self._check_at:
                self._check_disk()
            if self.asking.mixed:
                self.output.notify_again(self.asking.mixed)
                self.asking.mixed = ()
            if self.asking.unsaved:
                self._remember()
            while self.asking.asked is None and not self.stopping and self._advance():
                pass
            self._backoff = BACKOFF_FIRST
        except OSError as error:
            metrics.add("xds_loader_errors_total", ("disk",))
            log.outage("disk", self._disk_trouble(error), next_try_s=round(self._backoff, 1))
            self._retry_at = time.monotonic() + self._backoff
            self._backoff = min(2 * self._backoff, BACKOFF_LAST)

    def _disk_trouble(self, error: OSError) -> str:
        hint = DISK_HINTS.get(error.errno, "the last snapshot goes on serving")
        return f"cannot publish to {self.output.root}: {why(error)}; {hint}"

    def _check_disk(self) -> None:
        """Compare what is on disk with what was published, and repair it."""
        self._check_at = time.monotonic() + self.options.sync_interval
        repaired = self.output.check() if self.output.snapshot else []
        if repaired:
            metrics.add("xds_loader_errors_total", ("damage",))
            log.warning("repaired on disk: %s", shortened(repaired))

    def _advance(self) -> bool:
        """Publish the next snapshot if its time has come; whether there may be another one."""
        published, asking, self._step_at = self.output.published, self.asking, 0.0
        back = rollback(published, asking.known.acked, asking.known.nacks)
        if back is not None:
            self._publish(back, back.files)
            return True
        wanted = self._checked()
        if wanted is None:
            return False
        asking.known = retried(asking.known, wanted, published)
        desired, notes = allowed(wanted, published, asking.known.acked, asking.known.nacks)
        self.note("nacked", [*notes, *asking.notes])
        step = next_step(published, desired) if self.output.snapshot else Step(desired, INITIAL)
        again = to_retry(asking.known, published) if step is None else []
        if again:
            step = Step(published, REFERENCES)
        if step is None:
            asking.waits_since = 0.0
            at_start = not self._published_at and self.options.mode != "once"
            if at_start and self._wanted and same_files(published, self._wanted.files):
                self._published_at = time.monotonic()
                log.info("up to date", version=self.output.snapshot[2:])
            return False
        opens_at = asking.opens_at(step.name)
        if opens_at > time.monotonic():
            self._step_at = opens_at
            return False
        self._publish(step, wanted, again)
        return True

    def _compose(self) -> Wanted:
        """What the sources ask for now."""
        if self._wanted is None:
            self._wanted = self.sources.compose(self.output.published)
        waits = self.options.timeout or self.options.mode != "once"  # else it is an error
        missing = self._wanted.missing if waits else ()
        self.note("sources", [*self._wanted.notes,
                              *(f"waiting for {source}: it does not exist" for source in missing)])
        return self._wanted

    def _checked(self) -> Files | None:
        """What is to be published unless Envoy NACKed it; None where that is not known."""
        wanted, published = self._compose(), self.output.published
        if not wanted.complete:
            return None
        files, unfit = self.output.fitting(wanted.files)
        files = with_needed(files, published, functools.partial(is_read, self.asking.known))
        self.note("files", [
            *unfit,
            *(f"{path}: its source is gone; its last bytes stay, for Envoy or another file needs it"
              for path in files if path not in wanted.files),
            *(f"{self.output.root}/{CURRENT}/{path} is a foreign file: it is left alone"
              for path in self.output.foreign if path not in files),
        ])
        return self.check.passed(files)

    def _publish(self, step: Step, desired: Files, again: Sequence[str] = ()) -> None:
        """Publish one snapshot, have Envoy asked about it, then tidy up."""
        before, files = self.output.published, step.files
        if step.name in WAITING_STEPS:
            self.asking.waits_since = 0.0
        try:
            self.output.keep_acked(self.asking.known.acked, files)
            paths = self.output.publish(files, again)
        finally:  # whatever failed, Envoy may have read what was switched to
            if self.output.published is not before or again:
                self.asking.moved(before, files, desired, again)
        self._published_at, self._switched_at = time.monotonic(), time.time()
        took = self._published_at - self._event_at
        metrics.add("xds_loader_publications_total", (step.name,))
        metrics.add("xds_loader_published_files_total", by=len(paths))
        metrics.observe("xds_loader_publication_duration_seconds", took)
        origins = {each[path].source for path in paths for each in (files, before) if path in each}
        self.asking.ask_about([path for path in paths if path in files], {
            "version": self.output.snapshot[2:], "step": step.name, "files": len(paths),
            "changed": shortened(paths), "source": shortened(sorted(origins)),
            "duration_ms": round(took * 1000, 1),
        })
        log.recovered("disk", f"{self.output.root} can be written again")
        self._remember()
        self.output.prune()

    def _remember(self) -> None:
        """What a restart is to know, and the ACKed bytes that may be rolled back to."""
        self.asking.unsaved = True
        self.output.keep_acked(self.asking.known.acked, self.output.published)
        self.output.remember(state_of(self.asking.known))
        self.asking.unsaved = False

    # -- words --------------------------------------------------------------------------------

    def note(self, topic: str, notes: Iterable[str]) -> None:
        """Warn once of each thing for as long as it lasts; a line when it is over."""
        lasting, before = frozenset(notes), self._noted.get(topic, frozenset())
        for note in sorted(lasting - before):
            log.warning("%s", note)
        for note in sorted(before - lasting):
            log.info("warning over: %s", note.partition(": ")[0])
        self._noted[topic] = lasting

    def _report(self) -> None:
        """Put what is known now before whoever asks over HTTP."""
        if self._listener is None:
            return
        wanted, asking, files = self._wanted or Wanted({}), self.asking, self.output.published
        states = {path: asking.known.states.get(path, UNKNOWN) if file.kind else UNREAD
                  for path, file in files.items()}
        states |= {path: NACKED for path, nack in asking.known.nacks.items()
                   if is_nacked(files.get(path), nack) or is_nacked(wanted.files.get(path), nack)}
        version = self.output.snapshot[2:]
        self._listener.status = status = Status(
            files, version, self._switched_at, states,
            missing=(*wanted.missing, *wanted.unknown),
            stale=(*wanted.stale, *self.sources.trouble()) if files else (),
            started=bool(version) and asking.started,
            last_turn=time.monotonic(),
            turn_bound=2 * self.options.sync_interval + 60.0,
        )
        unknown = status.paths(UNKNOWN) if asking.admin else ()
        metrics.replace("xds_loader_unknown_files", {(path,): 1.0 for path in unknown})
        metrics.replace("xds_loader_nacked_files", {(path,): 1.0 for path in status.paths(NACKED)})
        metrics.replace("xds_loader_snapshot_info", {(version,): 1.0} if files else {})
        metrics.set("xds_loader_snapshot_timestamp_seconds", self._switched_at)
        metrics.set("xds_loader_inotify_instances_budget", self.sources.budget)
        metrics.set("xds_loader_inotify_instances_used",
                    sum(bool(file.kind) for file in files.values()))
        if self.sources.rendering is not None:
            metrics.replace("xds_loader_clusters", {
                (mode,): count for mode, count in self.sources.rendering.clusters.items()})


def unfinished(wanted: Wanted, trouble: Mapping[str, str], options: Options) -> str:
    """Why a one-time run ends without a snapshot."""
    if wanted.missing:
        hint = "create it" if options.timeout else "create it, or wait for it with --timeout"
        if options.from_file:
            hint = "--from-file must hold it"
        return f"{', '.join(wanted.missing)}: does not exist or is not usable; {hint}"
    reasons = (*wanted.failed, *trouble.values(),
               f"no answer in time for {', '.join(wanted.unknown)}")
    if options.access.apiserver == NO_POD:
        return f"{reasons[0]}; outside a pod: `kubectl proxy` and --apiserver http://127.0.0.1:8001"
    return reasons[0]


# -- what a restart is told --------------------------------------------------------------------


def state_of(known: Known) -> dict[str, Json]:
    """What is remembered of Envoy. No digest of a secret: one could test guesses at it."""
    return {
        "acked": {p: file.digest for p, file in known.acked.items() if file.kind != "sds"},
        "nacked": {path: [*nack[:4], sorted(nack.stood)] for path, nack in known.nacks.items()
                   if nack.kind != "sds"},
    }


def known_from(output: Output) -> Known:
    """What the process before knew; entries that are not as we write them are left out."""
    nacks = {}
    for path, row in json_object(output.state.get("nacked")).items():
        if isinstance(row, list) and len(row) == 5 and isinstance(row[4], list):
            digest, shown, kind, reason = map(str, row[:4])
            nacks[path] = Nack(digest, shown, kind, reason, frozenset(map(str, row[4])))
    return Known(acked=output.acked_files(json_object(output.state.get("acked"))), nacks=nacks,
                 came=cluster_names(output.published.values()).union(output.published))


# ---------------------------------------------------------------------------------------------
# Preview and check
# ---------------------------------------------------------------------------------------------

CHECK_SECONDS = 30.0  # what --check-cmd may take
CHECK_OUTPUT = 1 << 16  # bytes kept of what it prints


def run_check(command: Sequence[str], directory: str, stop: threading.Event) -> str:
    """Run --check-cmd on the files in a directory: "" if it accepts them, else why not, in a line.

    It has a process group of its own, which is killed at the end: a process that the command left
    behind must not read the next snapshot's files, nor hold this one.
    """
    import subprocess

    try:
        process = subprocess.Popen(
            [part.replace("{dir}", directory) for part in command], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, umask=0o022,
            start_new_session=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        return f"--check-cmd cannot be run: {why(error)}"
    output, until, printed, secret = process.stdout, time.monotonic() + CHECK_SECONDS, b"", False
    assert output is not None
    os.set_blocking(output.fileno(), False)
    ended = None
    try:
        while not ended and time.monotonic() < until and not stop.wait(0.01):
            # Not reaped yet, so that the group cannot be another's when it is killed.
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            printed += output.read(CHECK_OUTPUT) or b""  # without it a full pipe would block it
            secret = secret or holds_secret(printed)
            printed = printed[-CHECK_OUTPUT:]
    finally:  # SIGTERM raises in a preview
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        output.close()
    if not ended:
        late = f"took more than {CHECK_SECONDS:.0f} s"
        return f"--check-cmd {'was ended by a signal' if stop.is_set() else late}"
    text = "[redacted]" if secret else printed.decode("utf-8", "replace").strip()
    last = text.splitlines()[-1][:300] if text else "no output"
    return f"--check-cmd {command[0]} rejects the files (exit {code}): {last}" if code else ""


class Check:
    """--check-cmd, which runs beside the loop, once for each version."""

    def __init__(self, command: Sequence[str] | None, output: Output,
                 wake: Callable[[str, object], None]) -> None:
        self.running: threading.Thread | None = None
        self.refusal = ""  # of the version that was checked last
        self._version = ""
        self._accepted: Files | None = None
        self._command, self._output, self._wake = command, output, wake
        self._stop = threading.Event()

    def passed(self, desired: Files) -> Files | None:
        """What it lets pass: all, or what it accepted last with endpoints and secrets of now; None
        where there is nothing yet."""
        if not self._command:
            return desired
        base = self._output.published if self._accepted is None else self._accepted
        fresh = {path: file for path, file in desired.items()
                 if path in base and file.kind in ("eds", "sds")}
        version = version_of(desired)
        known = version == self._version and not self.running
        if same_files({**base, **fresh}, desired) or (known and not self.refusal):
            self._accepted = desired
            return desired
        if known:
            self._output.prune()  # what was staged for it
        elif not self.running:
            self._output.staged = self._output.stage(desired)
            self.refusal, self._version = "", version
            self.running = threading.Thread(target=self._run, args=(self._command,), daemon=True)
            self.running.start()
        return {**base, **fresh} if base else None

    def _run(self, command: Sequence[str]) -> None:
        place = f"{self._output.root}/{self._output.staged}"
        self._wake("checked", run_check(command, place, self._stop))

    def end(self, refusal: str) -> None:
        """It has accepted the staged files, or not."""
        self.running, self.refusal, self._output.staged = None, refusal, ""
        if refusal:
            metrics.add("xds_loader_errors_total", ("check",))
            log.error("%s; the last snapshot stays published", refusal, version=self._version)

    def stop(self) -> None:
        """No command outlives the loader."""
        self._stop.set()
        if self.running:
            self.running.join(0.5)  # seconds


def preview(options: Options, config: Config) -> int:
    """--dry-run: print the files, or with --diff what would change; touch nothing."""
    # The kernel ignores signals to process 1 that have no handler: without this one a preview in
    # a container would not end.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    loop = Loop(options, config)
    loop.output.published = loop.output.peek()
    loop.sources.start(loop.output.published)
    files = loop.composed(time.monotonic() + options.timeout).files
    loop.note("json", json_warnings(files))
    if options.diff:
        published = loop.output.published
        if not published:
            log.warning("%s: nothing is published there, so every file is new", loop.output.root)
        texts = [difference(path, published.get(path), files.get(path))
                 for path in sorted({*files, *published})]
    else:
        texts = [b"\n" + preview_text(path, file) for path, file in sorted(files.items())]
    if any(texts) or not options.diff:
        print_out([f"snapshot {version_of(files)}\n".encode(), *texts])
    if options.check_cmd:
        import tempfile

        # a copy that nobody else can read (0700), and that goes again
        with tempfile.TemporaryDirectory(prefix="xds-loader-") as directory:
            for path, file in files.items():
                os.makedirs(os.path.dirname(f"{directory}/{path}"), exist_ok=True)
                with open(f"{directory}/{path}", "wb") as stream:
                    stream.write(file.content)
            if problem := run_check(options.check_cmd, directory, threading.Event()):
                raise LoaderError(problem)
    return 0


def json_warnings(files: Files) -> Iterator[str]:
    """The *.json files that Envoy will not be able to read."""
    for path, file in sorted(files.items()):
        if path.endswith(".json"):
            try:
                parse_json(file.content)
            except ValueError as error:
                yield f"{path} of {file.source} is not valid JSON ({why(error)})"


def preview_text(path: str, file: File) -> bytes:
    """One file under a header; key material is not shown."""
    content = redacted(file.content)
    try:
        content.decode()
    except UnicodeDecodeError:
        content = b"[binary]\n"
    end = b"" if content.endswith(b"\n") or not content else b"\n"
    header = f"==> {path} ({file.source}, {len(file.content)} bytes) <==\n"
    return header.encode("utf-8", "backslashreplace") + content + end


def difference(path: str, old: File | None, new: File | None) -> bytes:
    """A unified diff of one file against what is published; empty if it is the same."""
    import difflib

    before = redacted(old.content) if old else b""
    after = redacted(new.content, old.content if old else None) if new else b""
    a, b = (text.decode("utf-8", "backslashreplace").splitlines(True) for text in (before, after))
    names = f"a/{path}" if old else "/dev/null", f"b/{path}" if new else "/dev/null"
    rows = difflib.unified_diff(a, b, *names)
    missing = "\n\\ No newline at end of file\n"
    return "".join(row if row.endswith("\n") else row + missing for row in rows).encode()


def print_out(texts: Iterable[bytes]) -> None:
    """To standard output, as far as anybody reads."""
    try:
        for text in texts:
            sys.stdout.buffer.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_config(path: str) -> Config:
    """The --config file, or UsageError with the place in it."""
    if not path:
        return config_from({})
    try:
        with open(path, "rb") as stream:
            return config_from(json.load(stream, object_pairs_hook=unique_keys))
    except OSError as error:
        raise UsageError(f"--config {why(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config {path} is not valid JSON ({why(error)})") from None


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def matching(pattern: str, what: str, value: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """A parser of an option: it takes a text, or raises ValueError with what is wrong with it."""

    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"is not {what}")
        return value(text)

    return parse


def one_of(words: str) -> Callable[[str], Any]:
    return matching(words, f"one of {words.replace('|', ', ')}")


NAMESPACE = rf"(?=.{{1,63}}\Z){NAME_PART}"
NAMESPACE_WHAT = "a valid namespace (at most 63 lower case letters, digits, '-')"
namespace_name = matching(NAMESPACE, NAMESPACE_WHAT)
any_namespace = matching(rf"\*|{NAMESPACE}", NAMESPACE_WHAT)
object_name = matching(OBJECT_NAME, "a valid Kubernetes name (lower case letters, digits, '-')")
go_bool = matching("1|t|T|true|TRUE|True|0|f|F|false|FALSE|False", "true or false",
                   lambda text: text[0] in "1tT")
file_mode = matching("(0o)?0?[4-7][0-7]{2}", "a file mode with which the owner reads, like 0600",
                     lambda text: int(text.removeprefix("0o"), 8))
gone = matching("false", "supported any more; split traffic with weights in an RDS file, or by the "
                "annotation xds-loader/weight with --services")


def go_duration(text: str) -> float:
    """Seconds of a duration as Go writes it: `1m0s`, `250ms`, `1.5h`, `0`."""
    units = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
    part = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)"
    if re.fullmatch(rf"\+?(?:0|(?:{part})+)", text):
        seconds = sum(float(number) * units[unit] for number, unit in re.findall(part, text))
        if seconds < 9e9:  # Go's longest
            return float(seconds)
    raise ValueError("is not a valid duration, such as 30s, 1m0s or 250ms")


def named_secret(text: str, kind: str = "secret", directory: str = "") -> Named:
    """`[NS/]NAME`; the namespace is filled in later where it is empty."""
    namespace, slash, name = text.rpartition("/")
    return Named(kind, namespace_name(namespace) if slash else "", object_name(name), directory)


def named_configmap(text: str) -> Named:
    """`[NS/]NAME[:DIR]`."""
    name, colon, directory = text.partition(":")
    for part in directory.split("/") if colon else ():
        if problem := key_problem(part):
            raise ValueError(f"names a directory of which {part!r} {problem}")
    return named_secret(name, "configmap", directory)


def label_selector(text: str) -> str:
    requirements(text)
    return text


def services_selector(text: str) -> str:
    return "" if text.strip() == "*" else label_selector(text)


def http_url(text: str, schemes: Sequence[str] = ("https", "http")) -> str:
    try:
        url = urllib.parse.urlsplit(text)
        host = re.fullmatch(r"(?:[^.\s]{1,63}\.)*[^.\s]{1,63}\.?", url.hostname or "")
        usable = host and url.scheme in schemes and url.port != 0 and url.username is None
    except ValueError:
        usable = False
    if not usable or url.query or url.fragment or not text.isascii() or not text.isprintable():
        raise ValueError(f"is not a valid URL with {' or '.join(schemes)}")
    return text


def admin_url(text: str) -> str:
    """`http://127.0.0.1:9901`, or the path of a Unix socket, which has 107 bytes at most."""
    if not text.startswith("unix:"):
        return http_url(text, ["http"])
    if not text.startswith("unix:/") or not text.isprintable() or len(text[5:].encode()) > 107:
        raise ValueError("is not unix:/ and an absolute path of at most 107 bytes")
    return text


def shell_words(text: str) -> tuple[str, ...]:
    import shlex

    if words := tuple(shlex.split(text)):
        return words
    raise ValueError("is empty")


# -- options ---------------------------------------------------------------------------------------


class Option(NamedTuple):
    """One option: the same table makes the parser, the environment variables, --help and docs."""

    name: str
    parse: Callable[[str], Any]
    metavar: str  # "" of a switch
    help: str
    default: str = ""
    repeats: bool = False

    @property
    def attribute(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return f"XDS_LOADER_{self.attribute.upper()}"

    @property
    def value(self) -> Any:
        """What it has where it is not given; None where `default` says it in words."""
        if self.repeats or not self.metavar:
            return () if self.repeats else False
        with contextlib.suppress(ValueError):
            return self.parse(self.default) if self.default else None


WHERE, LEVELS = "auto|eds|inline|dns", "|".join(LOG_LEVELS)
SECTIONS = {
    "What to load": (
        Option("configmap", named_configmap, "[NS/]NAME[:DIR]",
               "a ConfigMap: each key is a file (in DIR), its value the content", repeats=True),
        Option("configmap-selector", label_selector, "SEL",
               "every ConfigMap of the namespace that matches a label selector"),
        Option("services", services_selector, "SEL", "render clusters, endpoints and routes of "
               "the Services that match a label selector ('*' or '': all of them)"),
        Option("services-namespace", any_namespace, "NS",
               "where these Services are; '*' for all namespaces", "--namespace", True),
        Option("secret", named_secret, "[NS/]NAME", "a TLS Secret as SDS files", repeats=True),
        Option("namespace", namespace_name, "NS", "the namespace of what is named without one",
               "$NS, $POD_NAMESPACE, the service account's, 'default'"),
    ),
    "From where": (
        Option("apiserver", http_url, "URL", "the Kubernetes API server",
               "the pod's own, else https://kubernetes"),
        Option("token-file", str, "FILE", "bearer token, may rotate", f"{SERVICE_ACCOUNT}/token"),
        Option("ca-file", str, "FILE", "CA of the API server", f"{SERVICE_ACCOUNT}/ca.crt"),
        Option("client-cert", str, "FILE", "client certificate for the API server"),
        Option("client-key", str, "FILE", "its private key"),
        Option("insecure", go_bool, "", "do not verify the API server's certificate"),
        Option("from-file", str, "PATH", "objects from `kubectl get ... -o json` instead of an API "
               "server; read again every interval ('-': standard input, with --onetime)"),
    ),
    "How Services are rendered": (
        Option("config", str, "PATH", "JSON: how Services become clusters and routes"),
        Option("endpoints", one_of(WHERE), WHERE, "where endpoints live", "auto"),
        Option("format", one_of("yaml|json"), "yaml|json", "of rendered files", "yaml"),
    ),
    "Where to, and when": (
        Option("output-dir", str, "DIR", "where the files are published", "/srv/runtime"),
        Option("onetime", go_bool, "", "publish one snapshot and exit (init container)"),
        Option("watch", go_bool, "", "watch for changes instead of polling"),
        Option("sync-interval", go_duration, "D",
               "between two polls; in watch mode between two checks of the files on disk", "1m0s"),
        Option("timeout", go_duration, "D", "how long --onetime waits for the sources to exist and "
               "the API server to answer", "0s"),
        Option("dry-run", go_bool, "", "print the files and touch nothing; implies --onetime"),
        Option("diff", go_bool, "", "with --dry-run: a diff against what is published"),
        Option("secret-mode", file_mode, "MODE", "of files that hold private keys", "0600"),
    ),
    "ACK and NACK": (
        Option("envoy-admin", admin_url, "URL", "http://127.0.0.1:9901 or unix:/path: ask "
               "Envoy's admin interface what became of every publication"),
        Option("step-delay", go_duration, "D", "pause between ordered steps; beside "
               "--envoy-admin only where it is given", "100ms"),
        Option("check-cmd", shell_words, "CMD", "run on the staged files ('{dir}'), 30 s at "
               "most; non-zero: not published, only endpoints and secrets go on"),
    ),
    "Log, metrics, probes": (
        Option("listen", listen_address, "[ADDR]:PORT",
               "serve /healthz, /readyz, /startz, /metrics and /snapshot"),
        Option("log-format", one_of("text|json"), "text|json", "of standard error", "text"),
        Option("log-level", one_of(LEVELS), LEVELS, "the least that is logged", "info"),
        Option("version", go_bool, "", "print the version and exit"),
        Option("help", go_bool, "", "print this and exit (also -h)"),
    ),
    "Of the predecessor": (
        Option("trafficsplit-api-version", str, "V", "accepted and ignored, with a warning"),
        Option("smi", gone, "", "not supported any more: use weights by annotation"),
        Option("trafficsplit", gone, "NAME", "not supported any more, too"),
    ),
}
OPTIONS = tuple(itertools.chain.from_iterable(SECTIONS.values()))
NO_POD = "https://kubernetes"  # the API server where the environment names none
# A Service named `xds-loader` puts these into the environment of every pod of its namespace.
SERVICE_LINK = r"XDS_LOADER_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\w+)?)"


class Options(types.SimpleNamespace):
    """What was asked for: the value of each option by its name (with `_`), parsed and checked.

    And what follows from several: `access`, `mode` ("once", "watch" or "poll"), `node_name` and
    `warnings`.
    """


def command_line_words(argv: Sequence[str]) -> dict[str, list[str]]:
    """The values on the command line by option, read as Go's flag package reads them: one dash or
    two; `-x=v` and `-x v`; a switch takes a value only after `=`."""
    known = {option.name: option for option in OPTIONS}
    found: dict[str, list[str]] = {}
    rest = iter(argv)
    for text in rest:
        if not text.startswith("-") or text in ("-", "--"):
            raise UsageError(f"{text[:100]!r} is not an option; every value follows its option")
        name, equals, value = text.removeprefix("-").removeprefix("-").partition("=")
        option = known.get("help" if name == "h" else name)
        if option is None:
            raise UsageError(f"unknown option {text.partition('=')[0][:100]!r}; see --help")
        if not equals:
            following = next(rest, None) if option.metavar else "true"
            if following is None:
                raise UsageError(f"--{option.name} needs a value: {option.metavar}")
            value = following
        found.setdefault(option.name, []).append(value)
    return found


def value_of(where: str, parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except (ValueError, UsageError) as error:
        shown = re.sub("//[^/@]*@", "//...@", text[:200])  # a password is not logged
        raise UsageError(f"{where} {shown!r}: {error}") from None


def given_values(words: Mapping[str, list[str]], environ: Mapping[str, str]) -> dict[str, Any]:
    """The value (or, of repeatable options, the values) of each option that was given."""
    values: dict[str, Any] = {}
    for option in OPTIONS:
        where, texts = f"--{option.name}", words.get(option.name, [])
        if not texts and option.name not in ("help", "version"):
            where, text = option.variable, environ.get(option.variable, "")
            texts = text.split() if option.repeats else [text] if text else []
        found = [value_of(where, option.parse, text) for text in texts]
        if found:
            values[option.attribute] = tuple(dict.fromkeys(found)) if option.repeats else found[-1]
    return values


def options_from(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """The options, or UsageError in one line. Reads nothing but the namespace's file."""
    given = given_values(command_line_words(argv), environ)
    options = Options(**{option.attribute: option.value for option in OPTIONS} | given)
    options.step_delay = given.get("step_delay")  # None: only where Envoy is not asked
    once = options.onetime or options.dry_run
    check_combination(options, once)
    options.mode = "watch" if options.watch and not options.from_file else "poll"
    if once:  # it asks nobody, and serves nothing
        options.mode, options.listen, options.envoy_admin = "once", None, None
    options.namespace = options.namespace or default_namespace(environ)
    for named in ("configmap", "secret"):
        setattr(options, named, tuple(
            each._replace(namespace=each.namespace or options.namespace)
            for each in getattr(options, named)))
    if not options.from_file:
        options.apiserver = options.apiserver or default_apiserver(environ)
    options.access = Access(**{name: value for name, value in vars(options).items()
                               if name in Access._fields and value})
    options.node_name = environ.get("NODE_NAME", "")
    options.warnings = []
    if options.trafficsplit_api_version is not None:
        options.warnings.append("--trafficsplit-api-version is ignored: SMI is not supported any "
                                "more")
    known = {option.variable for option in OPTIONS}
    unknown = [name for name in sorted(environ) if name.startswith("XDS_LOADER_")
               and name not in known and not re.fullmatch(SERVICE_LINK, name)]
    if unknown:
        options.warnings.append(f"no option has the environment variable {shortened(unknown)}")
    return options


def check_combination(options: Options, once: bool) -> None:
    """Combinations that make no sense, before any request."""
    services = options.services is not None
    selected = services or options.configmap_selector is not None
    pair = bool(options.client_cert) == bool(options.client_key)
    for holds, text in (
        (options.configmap or options.secret or selected,
         "nothing to load: give --configmap NAME, --configmap-selector, --services or --secret"),
        (options.dry_run or not options.diff, "--diff needs --dry-run"),
        (once or options.from_file != "-", "--from-file - needs --onetime"),
        (pair or options.from_file, "--client-cert and --client-key belong together"),
        (services or not options.services_namespace, "--services-namespace needs --services"),
        (services or not options.config, "--config needs --services"),
        (options.output_dir, "--output-dir is empty"),
        (options.sync_interval >= 0.001, "--sync-interval must be at least 1ms"),
    ):
        if not holds:
            raise UsageError(text)


def default_namespace(environ: Mapping[str, str]) -> str:
    for variable in ("NS", "POD_NAMESPACE"):
        if environ.get(variable):
            return str(value_of(f"${variable}", namespace_name, environ[variable]))
    try:
        with open(f"{SERVICE_ACCOUNT}/namespace", "rb") as stream:
            return str(namespace_name(stream.read(1000).decode().strip()))
    except (OSError, ValueError):
        return "default"


def default_apiserver(environ: Mapping[str, str]) -> str:
    """The address that every pod is given, else the predecessor's default."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT")
    if not host:
        return NO_POD
    url = f"https://{f'[{host}]' if ':' in host else host}:{port or 443}"
    return str(value_of("$KUBERNETES_SERVICE_HOST and ..._PORT", http_url, url))


HELP = """\
envoy-xds-configmap-loader feeds Envoy's filesystem xDS from Kubernetes.

Examples:
  An init container: publish the files of a ConfigMap; wait for it up to a minute.
    envoy-xds-configmap-loader --configmap envoy-xds --onetime --timeout 60s
  A sidecar: publish every change at once, and roll back what Envoy rejects.
    envoy-xds-configmap-loader --configmap envoy-xds --watch --envoy-admin http://127.0.0.1:9901
  A preview: print what would be made of the Services of a namespace.
    envoy-xds-configmap-loader --services app=web --namespace shop --dry-run

Options may have one dash. Durations are written 30s, 1m0s, 250ms. Each option can come from the
environment as XDS_LOADER_ and its name in capitals with underscores; the command line wins.
More: docs/options.md in the repository.
"""


def help_text() -> str:
    """--help, from the table of options."""
    import textwrap

    parts = [HELP]
    for title, options in SECTIONS.items():
        parts.append(f"\n{title}:\n")
        for option in options:
            text = option.help + "; repeatable" * option.repeats
            text += f" (default {option.default})" if option.default else ""
            parts.append(f"  --{option.name} {option.metavar}".rstrip() + "\n")
            parts.append(textwrap.indent(textwrap.fill(text, 90), " " * 8) + "\n")
    return "".join(parts)


# -- running ---------------------------------------------------------------------------------------


def run(options: Options) -> int:
    """Run as asked: a preview, one snapshot, or until a signal comes."""
    log.configure(options.log_format, options.log_level)
    for warning in options.warnings:
        log.warning("%s", warning)
    config = read_config(options.config)
    if options.access.insecure and not options.from_file:
        log.warning("--insecure: the API server's certificate is not verified")
    if options.services is not None and config.prefer_zone is True and not options.node_name:
        raise UsageError("--config: $.endpoint.prefer_zone: true needs the Node in $NODE_NAME")
    if options.secret:
        no_core_dumps()
    os.umask(0)  # modes are as stated, whatever the umask was
    return preview(options, config) if options.dry_run else Loop(options, config).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the loader; returns the exit code: 0, 1 (tried and could not) or 2 (bad input)."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        words = command_line_words(arguments)
        for name in ("help", "version"):
            if words.get(name, ["false"])[-1] != "false":
                version = f"envoy-xds-configmap-loader {__version__}\n"
                print_out([(version if name == "version" else help_text()).encode()])
                return 0
        return run(options_from(arguments, os.environ))
    except UsageError as error:
        print(f"envoy-xds-configmap-loader: {error}", file=sys.stderr)
        return 2
    except (LoaderError, OSError) as error:
        log.error("%s", error if isinstance(error, LoaderError) else why(error))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""envoy-xds-configmap-loader feeds Envoy's filesystem xDS, live from Kubernetes.

It lists, polls or watches ConfigMaps (and if asked Services, EndpointSlices and Secrets) over the
raw Kubernetes REST API, turns them into the files that Envoy's filesystem xDS reads, and publishes
these as one atomic snapshot:

    <output-dir>/
      ..<version>/           one snapshot: complete, immutable, made under this name
      ..data -> ..<version>  THE switch: one rename(2) replaces the whole snapshot
      current/               a real directory, never replaced: Envoy's inotify watch stays valid
        rds.yaml -> ../..data/rds.yaml
      ..state/               what a restart cannot see on disk

What it promises:

* `current/X` always resolves to a complete file of one snapshot.
* Nothing is published before every source is known; "unknown" never becomes "empty".
* Nothing changed means nothing touched: no event for Envoy, no new directory.
* A restart repairs and converges, whatever it finds.
* Clusters come before the routes that name them, and are removed after them.
* What Envoy rejects (NACK) is rolled back, named, and not tried again until it changes.

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

# Data flows one way, and so do the chapters: API objects -> resources -> files -> steps -> disk ->
# ACK or NACK. Reflector threads own memory; the main thread alone owns the disk; one more thread
# talks to Envoy's admin interface. Only the standard library is used.

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import functools
import hashlib
import http.client
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
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__version__ = "2.0.0"

# == Constants, errors, values ===================================================================
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
Json = Any  # what json.loads returns: written once, so that each use shows what it is


class LoaderError(Exception):
    """The loader tried and could not: one line with what, where and what to do (exit 1)."""


class UsageError(LoaderError):
    """Bad input, named in one line before anything is touched (exit 2)."""


class File(NamedTuple):
    content: bytes
    digest: str  # SHA-256 in hex
    kind: str  # "cds", "eds", ... or "" for what is not xDS; decided once, when it is composed
    source: str  # the object it came from
    mode: int = 0o644

    def __repr__(self) -> str:  # without the content, which may be a key
        return f"File({self.digest[:12]}, {self.kind}, {self.source}, {self.mode:04o})"


Files = Mapping[str, File]  # by path relative to `current/`, such as `eds/demo_web_http.yaml`
Key = tuple[str, str]  # namespace (empty for what has none) and name of a Kubernetes object
CLUSTER_TYPE = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
ASSIGNMENT_TYPE = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
ROUTE_TYPE = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
SDS_TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
KINDS = {
    CLUSTER_TYPE: "cds", ASSIGNMENT_TYPE: "eds", ROUTE_TYPE: "rds", SDS_TYPE: "sds",
    "type.googleapis.com/envoy.config.listener.v3.Listener": "lds",
    "type.googleapis.com/envoy.config.route.v3.ScopedRouteConfiguration": "scoped_rds",
    "type.googleapis.com/envoy.service.runtime.v3.Runtime": "rtds",
    "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig": "ecds"}
TYPE_URL = re.compile(rb"type\.googleapis\.com/envoy\.[A-Za-z0-9_.]+")


def kind_of(content: bytes) -> str:
    """What a file configures: the first type URL of an xDS resource in its text decides."""
    kinds = (KINDS.get(url[0].decode()) for url in TYPE_URL.finditer(content))
    return next(filter(None, kinds), "")


def file_of(content: bytes, source: str, mode: int = 0o644, kind: str = "") -> File:
    digest = hashlib.sha256(content).hexdigest()
    return File(content, digest, kind or kind_of(content), source, mode)


def same_file(one: File | None, other: File | None) -> bool:
    """Whether two files are the same on disk: bytes and mode. The source does not show there."""
    return one is other or (one is not None and other is not None
                            and one.digest == other.digest and one.mode == other.mode)


def same_files(one: Files, other: Files) -> bool:
    return one is other or (one.keys() == other.keys() and not moved_paths(one, other))


def moved_paths(before: Files, after: Files) -> list[str]:
    """The paths that are new, or have other bytes or another mode."""
    return [path for path, file in after.items() if not same_file(before.get(path), file)]


def version_of(files: Files) -> str:
    """The version of a snapshot: a hash of paths, modes and contents, never a resourceVersion."""
    rows = [f"{path}\0{files[path].mode:o}\0{files[path].digest}\n" for path in sorted(files)]
    return hashlib.sha256("".join(rows).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def parents(path: str) -> Iterator[str]:
    """The directories above a relative path, nearest first."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def json_object(value: object) -> dict[str, Json]:
    return value if isinstance(value, dict) else {}


def parse_json(text: bytes | bytearray | str) -> Json:
    """json.loads; nesting that is too deep is a ValueError like every other error."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def why(error: BaseException) -> str:
    """An exception as one readable line; http.client's without their text, which is a server's."""
    if isinstance(error, http.client.HTTPException):
        return type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error) if isinstance(error, LoaderError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500].rstrip(": ")


def shortened(texts: Sequence[str], between: str = ", ") -> str:
    """A list for one log line: the first five, and how many more there are."""
    more = [f"and {len(texts) - 5} more"] if len(texts) > 5 else []
    return between.join([*texts[:5], *more])


# == Asking Kubernetes ===========================================================================
CONFIGMAPS, SECRETS, SERVICES, NODES = "ConfigMap", "Secret", "Service", "Node"  # their kinds
ENDPOINTS, ENDPOINTSLICES = "Endpoints", "EndpointSlice"
# Seconds for a handshake; of silence within an answer; for a whole one, which may come in trickles.
CONNECT_TIMEOUT, ANSWER_TIMEOUT, ANSWER_SECONDS = 10.0, 30.0, 120.0
# Objects in a page of a list, as kubectl asks; pages in a list (more: the server goes in circles).
PAGE, LIST_PAGES = 500, 2_000
# Bytes of an answer: a page of objects of 512 KiB; of an event: one object (etcd takes 1.5 MiB).
LIST_BYTES, EVENT_BYTES = 256 << 20, 64 << 20
# Seconds of silence within a watch, which is bookmarked about once a minute; and until the server
# is asked to end it: random, so that sidecars that started together do not renew together.
WATCH_SILENCE, WATCH_SECONDS = 80.0, (300, 600)
RETRY_AFTER_LAST = 300.0  # seconds: a year in a header must not stop a source for a year
LOOPBACK = r"127(\.[0-9]{1,3}){3}|::1|localhost"  # where a token may go over plain HTTP
# What a broken network raises, and what is not HTTP. (A host name like `a..b` is a ValueError.)
BROKEN = (OSError, http.client.HTTPException, ValueError)


class Query(NamedTuple):
    kind: str
    namespace: str = ""  # empty: all of them, or a kind without one
    name: str = ""
    labels: str = ""

    @property
    def resource(self) -> str:
        return f"{self.kind.lower().removesuffix('s')}s"  # such as `endpointslices`

    def target(self, more: Mapping[str, str]) -> str:
        api = "/apis/discovery.k8s.io/v1" if self.kind == ENDPOINTSLICES else "/api/v1"
        scope = f"/namespaces/{self.namespace}" if self.namespace else ""
        field = f"metadata.name={self.name}" if self.name else ""  # as RBAC by resourceNames needs
        words = {"fieldSelector": field, "labelSelector": self.labels, **more}
        given = urllib.parse.urlencode({key: value for key, value in words.items() if value})
        return f"{api}{scope}/{self.resource}?{given}"

    def __str__(self) -> str:
        if self.name:
            return f"{self.kind.lower()} {self.namespace}{self.namespace and '/'}{self.name}"
        where = f" in namespace {self.namespace}" if self.namespace else ""
        return f"{self.resource}{self.labels and f' with {self.labels}'}{where}"


def text_at(item: Mapping[str, Json], *path: str) -> str:
    """The text at a path of names in an API object; "" for whatever else is there."""
    value: Json = item
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""


def object_key(item: Mapping[str, Json]) -> Key:
    return text_at(item, "metadata", "namespace"), text_at(item, "metadata", "name")


class ApiError(LoaderError):
    def __init__(self, text: str, status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(text)
        self.status, self.retry_after = status, retry_after  # 0: no answer; the seconds it asks for


class Api:
    """The Kubernetes REST API over one connection that is kept open; one thread uses it. (Not
    `urllib.request`, which follows redirects.) The token is read for each request, certificates
    for each connection: Kubernetes rotates both under a running pod."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._url = urllib.parse.urlsplit(options.apiserver)
        self._connection = http.client.HTTPConnection("")  # not open
        self.socket: socket.socket  # of the connection, which itself forgets that of a last answer
        self._token = ""  # the one that was sent last

    def list(self, query: Query, keep: Callable[[dict[str, Json]], None]) -> str:
        """Call `keep` with each object; returns the resourceVersion. No list at all is an error."""
        kind, page = f"{query.kind}List", {"limit": str(PAGE)}
        for _ in range(LIST_PAGES):
            answer = self._ask(query, "list", page)[1]
            items = answer.pop("items", 0)
            if answer.get("kind") != kind or not (items is None or isinstance(items, list)):
                text = f"list {query}: the answer of {self._url.netloc} is not a {kind}"
                raise ApiError(f"{text}; is it a Kubernetes API server?")
            for item in items or ():  # Go's JSON writes an empty slice as null
                keep(json_object(item))
            del items  # before the next page is read
            page["continue"] = text_at(answer, "metadata", "continue")
            if not page["continue"]:
                return text_at(answer, "metadata", "resourceVersion")
        raise ApiError(f"list {query}: {self._url.netloc} sends pages without end")

    def is_future(self, query: Query, version: str) -> bool:
        """Whether this server never reached `version`: its etcd was reset. (504, after 3 s.)"""
        page = {"limit": "1", "resourceVersionMatch": "NotOlderThan", "resourceVersion": version}
        try:
            self._ask(query, "list", page)
        except ApiError as error:
            if error.status != 504:
                raise
            return True
        return False

    def watch(self, query: Query, version: str) -> Iterator[tuple[str, dict[str, Json]]]:
        """The events (type, object) after a version, an empty one first: the server has answered;
        until it ends the watch properly. ApiError for any other end (410 comes in both ways)."""
        asked = {"watch": "1", "allowWatchBookmarks": "true", "resourceVersion": version,
                 "timeoutSeconds": str(random.randint(*WATCH_SECONDS))}
        response, rest = self._ask(query, "watch", asked)[0], bytearray()
        try:
            yield "", {}
            # (http.client's readline shows a stream that was cut between chunks as a normal end.)
            while block := response.read1(1 << 18):
                rest += block
                if b"\n" in block:
                    *lines, rest = rest.split(b"\n")
                    for line in filter(None, lines):
                        event = parse_json(line.decode())  # (bytes are looked at for UTF-16)
                        kind, item = member(event, "type", str), member(event, "object", dict)
                        if not kind or not item:
                            raise ValueError("an event has no type or no object")
                        if kind == "ERROR":
                            status = item["code"] if item.get("code") in range(400, 600) else 500
                            raise self._refusal(query, "watch", status, item)
                        yield kind, item
                if len(rest) > EVENT_BYTES:
                    raise ValueError("an event does not end")
            if rest:
                raise ValueError("cut within an event")
        except BROKEN as error:
            raise ApiError(f"watch {query}: cut or silent ({why(error)})") from error
        finally:
            if not response.isclosed():
                self._connection.close()  # it cannot be used for another request

    def _ask(self, query: Query, verb: str, page: Mapping[str, str]
             ) -> tuple[http.client.HTTPResponse, dict[str, Json]]:
        """An answer of status 200 and its object ({}: none, or a watch, which is not read here)."""
        headers = {"Accept": "application/json", "User-Agent": f"envoy-xds-loader/{__version__}"}
        target, status, body = self._url.path.rstrip("/") + query.target(page), 0, b""
        try:
            self._token = self._read_token()
            if self._token:
                headers["Authorization"] = f"Bearer {self._token}"
            self._connect()
            with bounded(self.socket, ANSWER_SECONDS):
                self._connection.request("GET", target, headers=headers)
                self.socket.settimeout(WATCH_SILENCE if verb == "watch" else ANSWER_TIMEOUT)
                response = self._connection.getresponse()
                status = response.status
                if status != 200 or verb != "watch":
                    body = response.read(LIST_BYTES + 1)
                    if len(body) > LIST_BYTES or response.length:  # what is left of it
                        raise ValueError(f"answer cut, or larger than {LIST_BYTES >> 20} MiB")
        except BROKEN as error:
            self._connection.close()
            if status in (0, 200):  # of an error the status tells enough
                text = f"{verb} {query} at {self._url.netloc}: {why(error)}"
                raise ApiError(f"{text}; check --apiserver and --ca-file") from error
        finally:
            metrics.add("xds_loader_api_requests_total", (str(status or "none"), verb))
        said: dict[str, Json] = {}
        with contextlib.suppress(ValueError):
            said = json_object(parse_json(body))
        if status == 200:
            return response, said
        retry = response.headers.get("Retry-After", "")
        seconds = min(float(retry), RETRY_AFTER_LAST) if retry.isdecimal() else 0.0
        raise self._refusal(query, verb, status, said, seconds)

    def _refusal(self, query: Query, verb: str, status: int, said: dict[str, Json],
                 retry_after: float = 0.0) -> ApiError:
        """An error in the words of its Kubernetes Status; no other text, which may echo a token."""
        path = self._options.token_file
        sent = "" if self._token else f" (no token was sent: there is none in {path})"
        where = f"namespace {query.namespace}" if query.namespace else "all namespaces"
        hint = {
            401: f"; is the token in {path} valid?",
            403: f"; grant the service account {verb} on {query.resource} in {where}{sent}",
            404: "; is --apiserver a Kubernetes API server?",
            **dict.fromkeys(range(300, 400), "; redirects are not followed: correct --apiserver"),
        }.get(status, "")
        words = self._quoted(text_at(said, "message")) or http.client.responses.get(status, "")
        return ApiError(f"{verb} {query}: {status} {words}{hint}", status, retry_after)

    def _quoted(self, text: str) -> str:
        """A server's text for the log, unless the token is in it: as it is, in a URL or in base64,
        whose three alignments share their first and last characters with what is beside it."""
        token, url_safe = self._token.encode("latin-1"), bytes.maketrans(b"-_", b"+/")
        forms = [token, *(base64.b64encode(bytes(n) + token)[4:-4] for n in range(3))]
        seen = b"".join(urllib.parse.unquote_to_bytes(text.encode("utf-8", "replace")).split())
        if any(form and form.translate(url_safe) in seen.translate(url_safe) for form in forms):
            return "[a text that quotes the token]"
        return " ".join(text.split())[:500]

    def _connect(self) -> None:
        """Connect, unless a connection is open that the server has not ended meanwhile."""
        if self._connection.sock is not None:
            idle = select.poll()
            idle.register(self._connection.sock, select.POLLIN)
            if not idle.poll(0):
                return
        self._connection.close()
        kind: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
        if self._url.scheme == "https":
            kind = functools.partial(http.client.HTTPSConnection, context=self._context())
        self._connection = kind(self._url.hostname, self._url.port, timeout=CONNECT_TIMEOUT)
        self._connection.connect()
        self.socket = self._connection.sock

    def _read_token(self) -> str:
        """The bearer token as it is now. Without a file there is none: a local proxy needs none."""
        path, url, token = self._options.token_file, self._url, ""
        try:
            with contextlib.suppress(FileNotFoundError), open(path, encoding="latin-1") as stream:
                token = stream.read().strip()
        except OSError as error:
            raise ApiError(f"token file {why(error)}; check --token-file") from None
        if not token.isprintable():
            raise ApiError(f"token file {path}: not a valid token; check --token-file")
        if token and url.scheme == "http" and not re.fullmatch(LOOPBACK, url.hostname or ""):
            text = f"the token in {path} is not sent to {url.netloc} over plain HTTP"
            raise ApiError(f"{text}; give --apiserver an https URL")
        return token

    def _context(self) -> ssl.SSLContext:
        """TLS that trusts `--ca-file`; the system's CAs only where there is no service account."""
        context, options = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), self._options
        where = options.ca_file
        try:
            if options.insecure:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            elif where == f"{SERVICE_ACCOUNT}/ca.crt" and not os.path.exists(where):
                context.load_default_certs()
            else:
                context.load_verify_locations(cafile=where)
            if options.client_cert:
                where = f"{options.client_cert}, {options.client_key}"
                # (an empty password: without one OpenSSL would ask on the terminal, and wait)
                context.load_cert_chain(options.client_cert, options.client_key, password="")
        except OSError as error:  # an SSLError is one
            hint = "check --ca-file, --client-cert and --client-key"
            raise ApiError(f"{where}: not a usable certificate ({why(error)}); {hint}") from None
        return context


def cut(sock: socket.socket) -> None:
    """End a connection, from any thread: who reads from it finds the end of the stream."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # SSLSocket's own would make it a plain one


@contextlib.contextmanager
def bounded(sock: socket.socket, seconds: float) -> Iterator[None]:
    """Cut a connection that is in use for longer. (A socket's own limit is for each read alone.)"""
    timer = threading.Timer(seconds, cut, (sock,))
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError as error:  # no thread is left
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
    try:
        yield
    finally:
        timer.cancel()


# == Reflecting ==================================================================================
BACKOFF_FIRST, BACKOFF_LAST = 0.5, 30.0  # seconds after a failure: doubled, with jitter
WATCH_SHORT = 1.0  # seconds: after a watch that ends sooner there is a pause
RELIST_AFTER = 3  # rejections in a row of a watch that resumes: only a list can help
ONETIME_POLL = 1.0  # seconds between two lists of `--onetime --timeout`
# `--onetime` without `--timeout` is one try. What the API server answers for some 20 ms after a
# restart though it means 200 is asked again for a second (and a little: a Retry-After of 1 fits).
ONE_TRY_SECONDS, PASSING = 1.25, frozenset((401, 403, 408, 429, *range(500, 600)))
# A server that stops gracefully keeps a watch silent for 60 s and then ends it properly. After
# such an end the next server may have an older etcd behind it.
SUSPICIOUS_SILENCE = 30.0


class Reflector(threading.Thread):
    """Keeps the objects of one query current in memory: lists them, then watches (resuming what
    ended) or lists again every interval. `parse` reduces an API object to what is used; what it
    rejects (ValueError) keeps its last good value and is named in `bad`. Where EndpointSlices are a
    404 at the start it lists Endpoints, for good. `wake` names what changed: objects or trouble."""

    def __init__(self, query: Query, parse: Callable[[dict[str, Json]], Any],
                 client: Api | FileSource, wake: Callable[[str], None], options: Options) -> None:
        super().__init__(name=f"reflector {query}", daemon=True)
        self.query, self.synced = query, False
        self.trouble: ApiError | None = None
        self.objects: dict[Key, Any] = {}  # both are replaced, and never changed
        self.bad: dict[Key, str] = {}
        self._parse, self._client, self._wake, self._topic = parse, client, wake, str(query)
        self._api = client if isinstance(client, Api) and options.mode == "watch" else None
        self._interval = ONETIME_POLL if options.mode == "once" else options.sync_interval
        self._one_try = options.mode == "once" and not options.timeout
        self._version, self._failures = "", 0
        self._rejections = 0  # failures in a row that are answers
        self._suspect = False  # the next server may be another one, with an etcd that was restored
        self._refresh = threading.Event()  # requested; ends each wait
        self._watching: socket.socket | None = None

    def refresh(self) -> None:
        """List now: a pause ends for it, and an open watch."""
        self._refresh.set()
        if watching := self._watching:
            cut(watching)

    def run(self) -> None:
        while True:
            if self._refresh.is_set():
                self._refresh.clear()
                self._again("refresh")
            try:
                if self._api:
                    pause = self._watch(self._api)
                else:
                    self._relist()
                    self._report(None)
                    self._failures, self._rejections, pause = 0, 0, self._interval
            except ApiError as error:
                if self._refresh.is_set():
                    continue  # refresh() cut the watch
                if error.status == 404 and not self.synced and self.query.kind == ENDPOINTSLICES:
                    log.info("%s: not available here (%s)", self.query, error)
                    self.query, self._parse = Query(ENDPOINTS, self.query.namespace), endpoints_from
                    continue
                pause = self._failed(error)
            lasting = self.trouble and self.trouble.status not in PASSING
            if self._one_try and (self.synced or lasting):
                return
            self._refresh.wait(pause)

    def _failed(self, error: ApiError) -> float:
        """The seconds until the next request, which is a list where only that helps."""
        self._suspect, self._rejections = True, self._rejections + 1 if error.status else 0
        expired = error.status == 410
        reason = "expired" if expired else f"status {error.status}" if error.status else "cut"
        self._again(reason, "" if expired or self._rejections >= RELIST_AFTER else self._version)
        if expired and self._rejections == 1:
            return 0.0
        self._report(error)
        return self._delay(error.retry_after)

    def _again(self, reason: str, version: str = "") -> None:
        """The next request is a watch from this version, or a list; the objects stay until then."""
        self._version = version
        log.debug("%s: again (%s)", self.query, reason)
        metrics.add("xds_loader_watch_restarts_total", (self._topic, reason))

    def _relist(self) -> None:
        """Replace the store by a complete list, so that deletions in a gap are seen."""
        objects, bad = dict[Key, Any](), dict[Key, str]()
        self._version = self._client.list(self.query, functools.partial(self._keep, objects, bad))
        log.debug("listed %s: %d objects at %.40s", self.query, len(objects), self._version)
        self._store(objects, bad, not self.synced or bad != self.bad or objects != self.objects)
        metrics.set("xds_loader_source_synced", 1.0, (self._topic,))

    def _store(self, objects: dict[Key, Any], bad: dict[Key, str], changed: bool) -> None:
        self.objects, self.bad, self.synced = objects, bad, True
        if changed:
            self._wake("objects")
        metrics.set("xds_loader_source_last_event_timestamp_seconds", time.time(), (self._topic,))

    def _keep(self, objects: dict[Key, Any], bad: dict[Key, str], item: dict[str, Json]) -> None:
        """Store the value of an object: the old one if that is equal, or if the new one is bad."""
        key = object_key(item)
        value = old = self.objects.get(key)
        try:
            value = self._parse(item)
        except (ValueError, RecursionError) as error:
            bad[key] = f"{Query(self.query.kind, *key)}: {error}"
        if value is not None:
            objects[key] = old if value == old else value

    def _watch(self, api: Api) -> float:
        """Watch, after a list where that is needed; returns the seconds until the next watch."""
        if self._suspect and self._version and api.is_future(self.query, self._version):
            self._again("future")
        if not self._version:
            self._relist()
        events = api.watch(self.query, self._version)
        next(events)  # empty: it is answered
        log.debug("watching %s from %.40s", self.query, self._version)
        self._report(None)
        self._watching, began = api.socket, time.monotonic()
        last = began
        try:
            while not self._refresh.is_set() and (event := next(events, None)):
                last = time.monotonic()
                self._apply(*event)
        finally:
            self._watching, now = None, time.monotonic()
            if now - began >= WATCH_SHORT:
                self._failures = 0
            elif last > began:  # it brought news: the next may come soon, but not at once
                self._failures = min(self._failures, 1)
        self._suspect, self._rejections = now - last >= SUSPICIOUS_SILENCE, 0
        self._again("ended", self._version)
        return self._delay() if now - began < WATCH_SHORT else 0.0

    def _apply(self, kind: str, item: dict[str, Json]) -> None:
        self._version = text_at(item, "metadata", "resourceVersion") or self._version
        key, objects, bad = object_key(item), self.objects.copy(), self.bad.copy()
        if kind in ("ADDED", "MODIFIED", "DELETED"):  # not a bookmark, nor a type of the future
            bad.pop(key, None)
            if kind == "DELETED":
                objects.pop(key, None)
            else:
                self._keep(objects, bad, item)
        self._store(objects, bad, objects.get(key) is not self.objects.get(key) or bad != self.bad)

    def _report(self, trouble: ApiError | None) -> None:
        if trouble is not self.trouble:
            self.trouble = trouble
            self._wake("trouble")

    def _delay(self, retry_after: float = 0.0) -> float:
        """Seconds to wait after one more failure; never less than what the server asks for."""
        longest = BACKOFF_LAST if self._api else max(2.0, self._interval)
        ceiling = min(longest, BACKOFF_LAST, BACKOFF_FIRST * 2.0 ** min(self._failures, 10))
        self._failures += 1
        return max(retry_after, ceiling * random.uniform(0.5, 1.0))


class FileSource:
    """The objects of `kubectl get ... -o json` in a file (`-`: standard input), as a lister."""

    def __init__(self, path: str, namespace: str) -> None:
        self._path, self._namespace, self._text = path, namespace, b""
        self._lock = threading.Lock()  # each reflector asks; standard input can be read once

    def list(self, query: Query, keep: Callable[[dict[str, Json]], None]) -> str:
        """Call `keep` with the objects that an API server with this file's objects would list."""
        selects, stdin = label_predicate(query.labels), self._path == "-"
        try:
            with self._lock:
                if not (stdin and self._text):
                    with open(0 if stdin else self._path, "rb", closefd=not stdin) as stream:
                        self._text = stream.read(LIST_BYTES + 1)
                objects = objects_of(self._text)
        except (OSError, ValueError, RecursionError) as error:
            text = f"--from-file {self._path}: {getattr(error, 'strerror', None) or error}"
            raise ApiError(f"{text}; give the output of `kubectl get ... -o json`") from None
        kinds = {item["kind"] for item in objects} & {ENDPOINTS, ENDPOINTSLICES}
        if query.kind == ENDPOINTSLICES and kinds == {ENDPOINTS}:
            raise ApiError(f"{self._path} holds Endpoints and no EndpointSlice", 404)
        for item in objects:
            metadata = item["metadata"]
            if item["kind"] != NODES:
                metadata["namespace"] = metadata.get("namespace") or self._namespace
            namespace, name = object_key(item)
            if (item["kind"] == query.kind and query.namespace in ("", namespace)
                    and query.name in ("", name) and selects(json_object(metadata.get("labels")))):
                keep(item)
        return ""

    def elsewhere(self, query: Query) -> str:
        """Where the named object of a query is, which is not where it was looked for; or ""."""
        found: list[dict[str, Json]] = []
        with contextlib.suppress(LoaderError):
            self.list(Query(query.kind), found.append)
        keys = sorted(map(object_key, found))
        same = [key for key in keys if key[1] == query.name]
        held = shortened(["/".join(key) for key in same or keys])
        hint = f"; give --namespace {same[0][0]}" if len(same) == 1 else ""
        return f"`{self._path}` holds {query.kind.lower()} {held}{hint}" if keys else ""


def objects_of(text: bytes) -> list[dict[str, Json]]:
    """The objects of a file: single ones or lists (of lists), one after another. Or ValueError."""
    if len(text) > LIST_BYTES:
        raise ValueError(f"larger than {LIST_BYTES >> 20} MiB")
    whole, position, values = text.decode("utf-8-sig"), 0, []
    decoder, solid = json.JSONDecoder(), re.compile(r"\S")
    while start := solid.search(whole, position):
        value, position = decoder.raw_decode(whole, start.start())
        values.append(json_object(value))
    if not values:  # a file that is just being rewritten; no objects at all is an empty List
        raise ValueError("is empty")
    objects = []
    for value in values:  # which grows by the items of lists
        kind, items = text_at(value, "kind"), value.get("items") or []
        if not kind or (kind.endswith("List") and not isinstance(items, list)):
            raise ValueError("holds something that is not a Kubernetes object")
        if kind.endswith("List"):
            values += [{"kind": kind.removesuffix("List"), **json_object(item)} for item in items]
        elif isinstance(value.get("metadata"), dict):
            objects.append(value)
    return objects


# One requirement of a label selector whose words are one space apart.
LABEL, VALUE = r"([A-Za-z0-9](?:[-._/A-Za-z0-9]*[A-Za-z0-9])?)", "[-._A-Za-z0-9]+"
REQUIREMENT = (rf"(?:! {LABEL}|{LABEL}(?: (==?|!=)(?: ({VALUE}))?|"
               rf" (in|notin) \(((?: {VALUE}| ,)*) \))?)(?: , |$)")


def label_predicate(selector: str) -> Callable[[Mapping[str, Json]], bool]:
    """Whether labels match a selector (`a,!b,c=d,e!=f,g in (h),i notin (j,k)`), or UsageError."""
    text = " ".join(re.findall(r"[-._/A-Za-z0-9]+|[=!]=|\S", selector))
    requirements, pattern, position = list[re.Match[str]](), re.compile(REQUIREMENT), 0
    while position < len(text):
        if not (found := pattern.match(text, position)):
            raise UsageError(f"{selector[:200]!r} is not a valid label selector")
        requirements.append(found)
        position = found.end()

    def selects(labels: Mapping[str, Json]) -> bool:
        for requirement in requirements:
            absent, label, sign, value, word, values = requirement.groups("")
            chosen = [text.strip() for text in (values or value).split(",")]
            there = labels.get(label) in chosen if sign or word else (absent or label) in labels
            if there == bool(absent or sign == "!=" or word == "notin"):  # which match absence
                return False
        return True

    return selects


# == Objects =====================================================================================
# `*_from` reduce the raw JSON of one object to what is rendered. Null, absent and empty are alike,
# as in Go's types; a wrong type or value is a ValueError that names the member.

HEALTHY, DRAINING, UNHEALTHY = "", "DRAINING", "UNHEALTHY"  # Envoy's names; sorted, best first
FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
SERVICE_NAME_LABEL = "kubernetes.io/service-name"
ROUTE_ANNOTATIONS = ("route", "hosts", "prefix", "grpc", "weight", "port")
DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # of what becomes a part of a file name
Texts = Mapping[str, str]  # labels, annotations


class ServicePort(NamedTuple):
    name: str
    label: str  # the name, else the number
    number: int
    protocol: str
    app_protocol: str
    dns_number: int  # where DNS leads: of a headless Service the target port (0 if that is a name)


class Service(NamedTuple):
    key: Key
    created: str  # as in JSON, which sorts by age
    ports: tuple[ServicePort, ...]
    headless: bool
    external_name: str | None  # None for other types
    family: str
    labels: Texts
    annotations: Texts  # of those that cannot be ours only the names


class Endpoint(NamedTuple):
    address: str
    state: str
    zone: str
    node: str
    hints: tuple[str, ...]  # zones


class EndpointSlice(NamedTuple):
    service: Key
    name: str
    family: str
    ports: tuple[tuple[str, int], ...]  # name, number or 0
    endpoints: tuple[Endpoint, ...]


class Objects(NamedTuple):
    services: Mapping[Key, Service]
    slices: Sequence[EndpointSlice]
    nodes: Mapping[str, Texts]  # their labels


def member(parent: Json, key: str, kind: type, dns_label: bool = False) -> Json:
    """The member of a raw object; null and absent are the kind's empty value. Numbers are ports.
    Strings are interned: zones, nodes and names of ports are few and held thousands of times."""
    if type(parent) is not dict:
        raise ValueError(f"an object with {key} expected, not {type(parent).__name__}")
    value: Json = parent.get(key)
    if value is None:
        value = kind()
    elif type(value) is not kind:
        raise ValueError(f"{key}: {kind.__name__} expected, not {type(value).__name__}")
    if dns_label and not re.fullmatch(DNS_LABEL, value):
        raise ValueError(f"{key}: not a DNS label: {value[:60]!a}")
    if kind is str:
        value.encode()  # "\ud800" is valid JSON, and not valid UTF-8: a ValueError
        return sys.intern(value) if len(value) <= 128 else value  # some Pythons never free it
    if kind is int and not 0 <= value <= 65535:
        raise ValueError(f"{key}: a port is between 1 and 65535")
    return value


def texts_of(obj: Json, key: str = "labels") -> dict[str, str]:
    found = member(member(obj, "metadata", dict), key, dict)
    return {sys.intern(name): member(found, name, str) for name in found}


def service_from(obj: Json) -> Service:
    metadata, spec = member(obj, "metadata", dict), member(obj, "spec", dict)
    external = member(spec, "type", str) == "ExternalName"
    address = member(spec, "externalName" if external else "clusterIP", str)
    headless, ports = address == "None" and not external, []
    for port in member(spec, "ports", list):
        number, named = member(port, "port", int), type(port.get("targetPort")) is str
        target = 0 if named else member(port, "targetPort", int) or number
        name = member(port, "name", str, dns_label=True) if port.get("name") else ""
        ports.append(ServicePort(
            name, name or str(number), number, member(port, "protocol", str) or "TCP",
            member(port, "appProtocol", str), target if headless else number))
    return Service(
        key=(member(metadata, "namespace", str, dns_label=True),
             member(metadata, "name", str, dns_label=True)),
        created=member(metadata, "creationTimestamp", str) or "~",  # not created yet: the youngest
        ports=tuple(ports), headless=headless,
        external_name=address.removesuffix(".") if external else None,
        family="ipv6" if member(spec, "ipFamilies", list)[:1] == ["IPv6"] else "ipv4",
        labels=texts_of(obj), annotations={
            name: text if name.rpartition("/")[2] in ROUTE_ANNOTATIONS else ""
            for name, text in texts_of(obj, "annotations").items()})


def endpointslice_from(obj: Json) -> EndpointSlice:
    metadata, family = member(obj, "metadata", dict), member(obj, "addressType", str).lower()
    if family not in FAMILIES:
        raise ValueError(f"addressType: Envoy needs IPv4 or IPv6, not {family[:60]!a}")
    endpoints = []
    for item in member(obj, "endpoints", list):
        conditions = member(item, "conditions", dict)
        # (Null is ready; where `ready` is false the other two matter, and null is false for them.)
        ready = conditions.get("ready") is None or member(conditions, "ready", bool)
        leaving = member(conditions, "serving", bool) and member(conditions, "terminating", bool)
        state = HEALTHY if ready else DRAINING if leaving else UNHEALTHY
        hints = tuple(member(zone, "name", str)
                      for zone in member(member(item, "hints", dict), "forZones", list))
        zone, node = member(item, "zone", str), member(item, "nodeName", str)
        for address in member(item, "addresses", list):
            try:  # one that Envoy cannot parse would cost it the whole file
                socket.inet_pton(FAMILIES[family], address)
            except (OSError, TypeError, ValueError):
                raise ValueError(f"addresses: not an {family} address: {address!a:.60}") from None
            endpoints.append(Endpoint(address, state, zone, node, hints))
    return EndpointSlice(
        service=(member(metadata, "namespace", str),
                 member(member(metadata, "labels", dict), SERVICE_NAME_LABEL, str)),
        name=member(metadata, "name", str), family=family, endpoints=tuple(endpoints),
        ports=tuple((member(port, "name", str), member(port, "port", int))
                    for port in member(obj, "ports", list)))


def endpoints_from(obj: Json) -> tuple[EndpointSlice, ...]:
    """A legacy v1 Endpoints object as slices: for each subset one of each family."""
    metadata, slices = member(obj, "metadata", dict), []
    own = {**metadata, "labels": {SERVICE_NAME_LABEL: member(metadata, "name", str)}}
    for subset in member(obj, "subsets", list) or [{}]:
        items = [{"addresses": [member(item, "ip", str)], "nodeName": item.get("nodeName"),
                  "conditions": {"ready": key == "addresses"}}
                 for key in ("addresses", "notReadyAddresses")
                 for item in member(subset, key, list)]
        slices += [endpointslice_from({
            "metadata": own, "addressType": family, "ports": subset.get("ports"),
            "endpoints": [item for item in items if (":" in item["addresses"][0]) == colon],
        }) for family, colon in (("IPv4", False), ("IPv6", True))]
    return tuple(slices)


# == --config ====================================================================================
Config = Mapping[str, Json]  # the JSON document, with everything that DEFAULTS has
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
    "eds_cluster_config": "use --endpoints, and --output-dir for the path"}
DNS_NAME = r"(?ia)(?!.{254})(?!.*(?:\.\.|-\.|\.-))[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?"
NAME_TEMPLATE = r"[^{}]*(?:\{(?:namespace|service|port)\}[^{}]*)+"
CONFIG_DEPTH = 64  # of `base` and `merge`; protobuf's JSON ends at 100
DEFAULTS: Config = {
    "cluster": {"base": {}, "name": "{namespace}/{service}/{port}", "overrides": [],
                "trusted_ca": "/etc/ssl/certs/ca-certificates.crt"},
    "cluster_domain": "cluster.local",
    "endpoint": {"eds_budget": None, "external_name": None, "families": None,
                 "include_not_ready": False, "locality": {}, "prefer_zone": False},
    "route": {"annotation_prefix": "xds-loader", "name": "services", "suffix": "cluster.local"}}


class Rule(NamedTuple):
    expected: str  # in the message, where it does not hold
    holds: Callable[[Json], object]
    inner: Json = None  # a schema, checked first


def text_rule(expected: str, pattern: str) -> Rule:
    """A string that matches, and that neither Envoy nor UTF-8 stumbles over."""
    return Rule(expected, lambda value: (
        type(value) is str and value.isprintable() and re.fullmatch(pattern, value)))


def is_json(value: Json) -> bool:
    """Whether Envoy can read it."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, indent=1).encode()
        return b"\n" + b" " * CONFIG_DEPTH not in text  # a level is one space of indent
    except (ValueError, RecursionError):
        return False


# A schema is an object with these keys, [the schema of each item of a list], (the schema of an
# object, the schema of a list), a text of JSON values with ` or ` between, or a rule.
TEXT, DOMAIN = text_rule("a string", ".+"), text_rule("a DNS name", DNS_NAME)
PATCH = dict.fromkeys(CLUSTER_FIELDS, Rule(
    f"JSON without NaN, of valid text, at most {CONFIG_DEPTH} deep", is_json))
PART = Rule("one of label, literal and node_name", lambda value: len(value) == 1,
            {"label": TEXT, "literal": TEXT, "node_name": "true"})
LABELS = Rule("an object of strings", lambda value: (
    value and type(value) is dict and all(map(TEXT.holds, value.values()))))
MATCH = Rule("something to match (what is for every cluster belongs into base)", bool,
             {"cluster_name": TEXT, "namespace": TEXT, "port_name": TEXT, "labels": LABELS})
OVERRIDE = Rule("match, and one of merge and suppress", lambda value: (
    value.get("match") and ("merge" in value) != ("suppress" in value)),
    {"match": (MATCH, [MATCH]), "merge": PATCH, "suppress": "true"})
SCHEMA = {
    "cluster": {
        "base": PATCH, "overrides": [OVERRIDE], "trusted_ca": text_rule("an absolute path", "/.*"),
        "name": text_rule("a string with {namespace}, {service} or {port}", NAME_TEMPLATE)},
    "cluster_domain": DOMAIN,
    "endpoint": {
        "eds_budget": Rule("a whole number of EDS files", lambda n: type(n) is int and n >= 0),
        "external_name": '"strict_dns" or "logical_dns"', "include_not_ready": "true or false",
        "families": '["ipv4"] or ["ipv6"] or ["ipv4", "ipv6"] or ["ipv6", "ipv4"]',
        "locality": {"region": PART, "sub_zone": PART, "zone": PART},
        "prefer_zone": Rule("a zone, true or false", lambda value: (
            type(value) is bool or TEXT.holds(value)))},
    "route": {"annotation_prefix": DOMAIN, "name": TEXT, "suffix": DOMAIN}}


def config_check(value: Json, schema: Json, path: str) -> None:
    """Raise UsageError with the JSON path of the first value that the schema does not allow."""
    if type(schema) is tuple:
        schema = schema[type(value) is list]
    expected = ""
    if type(schema) is Rule:
        if schema.inner:
            config_check(value, schema.inner, path)
        expected = "" if schema.holds(value) else schema.expected
    elif type(schema) is str:
        expected = "" if json.dumps(value) in schema.split(" or ") else schema
    elif type(value) is not type(schema):
        expected = "a list" if type(schema) is list else "an object"
    elif type(schema) is list:
        for index, item in enumerate(value):
            config_check(item, schema[0], f"{path}[{index}]")
    else:
        for key, item in value.items():
            where = f"{path}.{key}" if re.fullmatch(r"\w+", key) else f"{path}[{json.dumps(key)}]"
            if key not in schema:
                known = f"unknown key (one of {', '.join(sorted(schema))})"
                own = OWN_FIELDS.get(key, "not a field of Envoy's Cluster")
                raise UsageError(f"{where}: {own if schema is PATCH else known}")
            config_check(item, schema[key], where)
    if expected:
        raise UsageError(f"{path}: {expected} expected")


def config_from(document: Json) -> Config:
    """A parsed `--config` with its defaults; UsageError with the JSON path of the first error."""
    config_check(document, SCHEMA, "--config: $")
    sections = {name: DEFAULTS[name] | document.get(name, {})
                for name in ("cluster", "endpoint", "route")}
    return {**DEFAULTS, **document, **sections}


def unique_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """For json.load(object_pairs_hook=): a key that is there twice would hide its first value."""
    if len(found := dict(pairs)) < len(pairs):
        raise UsageError(f"--config: a key is there twice in the object of {shortened([*found])!a}")
    return found


def merge(into: Json, more: Json) -> Json:
    """JSON Merge Patch (RFC 7386), with two exceptions for what Envoy's messages are made of: lists
    append, and an object of another `@type` replaces the whole. Neither argument is changed."""
    if type(into) is list and type(more) is list:
        return into + more
    if type(more) is not dict:
        return more
    if type(into) is not dict or (more | into).get("@type") != (into | more).get("@type"):
        into = {}
    merged = into | {key: merge(into.get(key), value) for key, value in more.items()}
    return {key: value for key, value in merged.items() if value is not None or key not in more}


# == Clusters, assignments, routes ===============================================================
UPSTREAM_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
EDS, INLINE, DNS, AUTO = "eds", "inline", "dns", "auto"
# Bounds of what one Service may ask for (whoever annotates it is not trusted with the size of what
# Envoy's main thread reads), and of Services in a split: weights must not sum up to 2**32.
PORTS_MOST, HOSTS_MOST, PREFIXES_MOST, WEIGHT_MOST, SPLIT_MOST = 256, 32, 32, 1_000_000, 1_000
# What reaches Envoy's own pod, whatever DNS says: names in /etc/hosts, and each spelling of an IPv4
# address that a resolver accepts (127.1, 0x7f000001).
LOCAL_NAME = r"(?i)(.*\.)?(localhost(\.localdomain)?|ip6-(localhost|loopback)|[0-9]+|0x[0-9a-f]*)"
# What Envoy accepts in a domain, but for `*80`, which would take `x.example:80` from its owner.
HOST_NAME = r"[a-z0-9_](?:-*[a-z0-9_]|\.(?=[a-z0-9_]))*"
ROUTE_HOST = rf"(?!.{{254}})(?:\*|(?:\*[.-])?{HOST_NAME}|{HOST_NAME}[.-]\*)"
ROUTE_PREFIX = r"/(?:(?![?#])[!-~]){0,254}"
GRPC_SERVICE = r"(?a)(?!.{254})[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
# How Envoy speaks upstream to a port of an appProtocol, or of a name (up to its first dash).
HTTP2_PORTS = frozenset(("http2", "h2c", "grpc", "grpcs", "grpctls", "kubernetes.io/h2c"))
TLS_PORTS = frozenset(("https", "tls", "httptls", "grpcs", "grpctls", "kubernetes.io/wss"))
HTTP_PORTS = (HTTP2_PORTS | TLS_PORTS | {"http", "kubernetes.io/ws"}) - {"tls"}
ONLY_NAMES = frozenset(("tls", "httptls", "grpctls"))  # known as a port's name alone


class Cluster(NamedTuple):
    name: str
    port: ServicePort
    families: Sequence[str]
    host: str  # what DNS is asked for, empty for slices
    options: Mapping[str, Json]  # more members of the resource


class Route(NamedTuple):
    service: Key
    hosts: Sequence[str] = ()
    prefixes: Sequence[str] = ()
    weight: int | None = None
    port: ServicePort | None = None  # without one it claims its hosts, no more
    cluster: str = ""  # of the port


ServicePlan = tuple[Sequence[Cluster], Route, Sequence[str]]  # what it becomes, what is wrong


def service_line(key: Key, problems: Sequence[str]) -> str:
    return f"service {'/'.join(key)}: {shortened(problems, '; ')}"


def present(**members: Json) -> dict[str, Json]:
    return {name: value for name, value in members.items() if value}


def plan_service(service: Service, config: Config, endpoints: str) -> ServicePlan:
    """What becomes of one Service, from it and --config alone; what is left out is named."""
    problems, clusters, external = list[str](), list[Cluster](), service.external_name
    if not service.ports:
        problems.append("has no ports, so there is no cluster")
    elif external is not None and not config["endpoint"]["external_name"]:
        problems.append("is left out: ExternalName needs endpoint.external_name in --config")
    elif external is not None and (
            not re.fullmatch(DNS_NAME, external) or re.fullmatch(LOCAL_NAME, external)):
        problems.append(f"is left out: externalName is not a DNS name, or local: {external!a:.60}")
    else:
        kept = [port for port in service.ports if port.protocol in ("TCP", "UDP")][:PORTS_MOST]
        if left_out := sorted({port.label for port in set(service.ports).difference(kept)}):
            problems.append(f"port {shortened(left_out)!a:.100} is left out: the first "
                            f"{PORTS_MOST} TCP and UDP ports are rendered")
        planned = [plan_cluster(service, port, config, endpoints) for port in kept]
        clusters = [*filter(None, planned)]
        if endpoints == DNS and clusters and not service.headless and external is None:
            problems.append("has one clusterIP, where --endpoints dns needs a headless Service")
    return clusters, route_of(service, config, problems), problems


def plan_cluster(service: Service, port: ServicePort, config: Config, mode: str) -> Cluster | None:
    settings, (namespace, service_name) = config["cluster"], service.key
    name = settings["name"].format(namespace=namespace, service=service_name, port=port.label)
    facts = {"cluster_name": name, "namespace": namespace, "port_name": port.label,
             "labels": service.labels}
    overrides, wanted = [], service.key != ("default", "kubernetes")
    for override in settings["overrides"]:
        match = override["match"]
        matches = [one for one in (match if type(match) is list else [match])
                   if merge(facts, one) == facts]  # what holds changes nothing
        wanted = wanted or any("cluster_name" in one for one in matches)
        overrides += [override] if matches else []
    if not wanted or any("suppress" in override for override in overrides):
        return None
    families, options = config["endpoint"]["families"] or (service.family,), dict[str, Json]()
    host = service.external_name or f"{service_name}.{namespace}.svc.{config['cluster_domain']}"
    if by_dns := service.external_name is not None or mode == DNS:
        lookup = "ALL" if families[1:] else {"ipv4": "V4_ONLY", "ipv6": "V6_ONLY"}[families[0]]
        kind = config["endpoint"]["external_name"] if service.external_name else "strict_dns"
        options = {"type": kind.upper(), "dns_lookup_family": lookup}
    protocol = protocol_options(port, host, settings["trusted_ca"])
    for patch in (settings["base"], protocol, *(each["merge"] for each in overrides)):
        options = merge(options, patch)
    return Cluster(name, port, families, host if by_dns else "", options)


def protocol_of(port: ServicePort) -> str:
    """The name of a port's protocol: its appProtocol, else its name up to the first dash."""
    if port.protocol != "TCP":
        return ""
    if port.app_protocol:
        found = port.app_protocol.lower()
        return found if found in HTTP_PORTS - ONLY_NAMES else "http"
    return port.name.partition("-")[0]


def protocol_options(port: ServicePort, host: str, trusted_ca: str) -> dict[str, Json]:
    """HTTP/2 and TLS upstream, as a patch: what `base` says beside them stays."""
    protocol, patch = protocol_of(port), dict[str, Json]()
    if protocol in HTTP2_PORTS:
        patch["typed_extension_protocol_options"] = {HTTP_OPTIONS: {
            "@type": f"type.googleapis.com/{HTTP_OPTIONS}",
            "auto_config": None, "use_downstream_protocol_config": None,
            "explicit_http_config": {"http_protocol_options": None, "http3_protocol_options": None,
                                     "http2_protocol_options": {}}}}
    if protocol in TLS_PORTS:
        validation = {"trusted_ca": {"filename": trusted_ca}, "match_typed_subject_alt_names": [
            {"san_type": "DNS", "matcher": {"exact": host}}]}
        patch["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": {
            "@type": UPSTREAM_TLS, "sni": host, "common_tls_context": present(
                alpn_protocols=["h2"] if protocol in HTTP2_PORTS else [],
                validation_context=validation)}}
    return patch


def locality_of(config: Config, zone: str, node: str, labels: Texts) -> tuple[str, ...]:
    """Region, zone and sub-zone of what runs on a Node; `zone` is what its slice says."""
    found = {"region": "", "zone": zone, "sub_zone": ""}
    for name, source in config["endpoint"]["locality"].items():
        [(kind, value)] = source.items()
        found[name] = {"label": labels.get(value, ""), "literal": value, "node_name": node}[kind]
    return tuple(found.values())


def own_zone(config: Config, node: str, nodes: Mapping[str, Texts]) -> str | None:
    """The zone to prefer; None: none, or the own Node is not known or has no zone."""
    zone, labels = config["endpoint"]["prefer_zone"], nodes.get(node, {})
    if zone is True:
        zone = locality_of(config, labels.get("topology.kubernetes.io/zone", ""), node, labels)[1]
    return zone or None


def assignment_of(cluster: Cluster, slices: Sequence[EndpointSlice], config: Config,
                  preferred: str | None, nodes: Mapping[str, Texts]) -> dict[str, Json]:
    """A ClusterLoadAssignment; slices are joined by the port's name. Hints count if all ready
    endpoints have them: what terminates, at every rolling update, is given none by Kubernetes."""
    port, candidates = cluster.port, list[tuple[Any, ...]]()  # sorted, the best state is first
    used = [found for found in slices if found.family in cluster.families and not cluster.host]
    if cluster.host:  # one name; a headless Service's leads to pods, so it needs their port
        numbers = {number for found in slices for name, number in found.ports
                   if number and name == port.name}
        number = port.dns_number or (numbers.pop() if len(numbers) == 1 else 0)
        candidates = [(0, b"", number, HEALTHY, False, ("", "", ""), cluster.host)]
    hinted = all(endpoint.hints or endpoint.state != HEALTHY
                 for found in used for endpoint in found.endpoints)
    worst = UNHEALTHY if config["endpoint"]["include_not_ready"] else DRAINING
    for found in used:
        rank, family = cluster.families.index(found.family), FAMILIES[found.family]
        numbers = {number for name, number in found.ports if name == port.name}
        for endpoint in found.endpoints:
            if endpoint.state <= worst:
                labels = nodes.get(endpoint.node, {})
                locality = locality_of(config, endpoint.zone, endpoint.node, labels)
                zones = endpoint.hints if hinted and endpoint.hints else locality[1:2]
                away = preferred is not None and preferred not in zones
                packed = socket.inet_pton(family, endpoint.address)
                candidates += [(rank, packed, number, endpoint.state, away, locality,
                                endpoint.address) for number in numbers]
    groups, seen = defaultdict[tuple[bool, Any], list[Json]](list), set[tuple[bytes, int]]()
    for _, packed, number, state, away, locality, address in sorted(candidates):
        if number and (packed, number) not in seen:
            seen.add((packed, number))
            where = present(protocol="UDP" if port.protocol == "UDP" else "",
                            address=address, port_value=number)
            groups[away, locality].append(present(
                endpoint={"address": {"socket_address": where}}, health_status=state))
    all_away = all(away for away, _ in groups)
    return present(cluster_name=cluster.name, endpoints=[
        present(locality=present(region=region, zone=zone, sub_zone=sub_zone),
                priority=int(away and not all_away), lb_endpoints=endpoints)
        for (away, (region, zone, sub_zone)), endpoints in sorted(groups.items())])


def slice_problems(clusters: Sequence[Cluster], slices: Sequence[EndpointSlice]) -> Iterator[str]:
    """What of a Service's slices gives no endpoint although somebody meant it to."""
    if not slices:
        yield "has no EndpointSlice, so it has no endpoints"
    used = [found for found in slices if found.endpoints]
    for found in used:
        reasons = [f"its port {cluster.port.label} has no number" for cluster in clusters
                   if (cluster.port.name, 0) in found.ports]
        for reason in reasons if found.ports else ["it has no ports"]:
            yield f"endpoints of slice {found.name} are left out: {reason}"
    there = {found.family for found in used}
    if there and not there & set(clusters[0].families):
        yield f"has only {min(there)} endpoints, which endpoint.families leaves out"


def route_of(service: Service, config: Config, problems: list[str]) -> Route:
    """What the annotations of a Service ask for. One that is not routed for an error still claims
    its hosts: a typing error must not hand them to another namespace."""
    (namespace, name), ours = service.key, config["route"]["annotation_prefix"] + "/"
    given = {key.removeprefix(ours): text.strip()
             for key, text in service.annotations.items() if key.startswith(ours)}
    if unknown := sorted(ours + key for key in given.keys() - set(ROUTE_ANNOTATIONS)):
        problems.append(f"unknown annotation {shortened(unknown)!a:.100}")
    if len(unknown) == len(given) or given.get("route") == "false":
        return Route(service.key)
    suffix = f".svc.{config['route']['suffix']}".lower()
    asked = comma_separated((given.get("hosts") or f"{name}.{namespace}{suffix}").lower())
    hosts = [host for host in asked[:HOSTS_MOST] if may_have(namespace, host, suffix)]
    if wrong := [host for host in asked[:HOSTS_MOST] if host not in hosts]:
        problems.append(f"{ours}hosts: left out: {shortened(wrong)!a:.100}: not a valid host name "
                        f"(no port; * alone, or as in *.x, *-x, x.*, x-*), or another namespace's")
    try:
        if not hosts or len(asked) > HOSTS_MOST:
            raise ValueError(f"{ours}hosts: 1 to {HOSTS_MOST} valid hosts expected")
        prefixes, port = route_target(service, given, ours)
    except ValueError as error:
        problems.append(f"is not routed: {error}")
        return Route(service.key, hosts)
    weight, number = given.get("weight"), None
    if weight and re.fullmatch(r"[0-9]{1,7}", weight) and int(weight) <= WEIGHT_MOST:
        number = int(weight)
    elif weight is not None:
        problems.append(f"{ours}weight counts as none: {weight[:60]!a} is not 0 to {WEIGHT_MOST}")
    return Route(service.key, hosts, prefixes, number, port)


def comma_separated(text: str) -> list[str]:
    return sorted({word.strip() for word in text.split(",")} - {""})


def may_have(namespace: str, host: str, suffix: str) -> bool:
    """Names of Services are their namespace's alone, also with `*` for an end of the suffix."""
    name, svc, end = host.rpartition(".svc.")
    if host.endswith(suffix):
        name = host.removesuffix(suffix)
    elif not (svc and end.endswith("*") and suffix.startswith(svc + end[:-1])):
        name = namespace  # no name of a Service
    return bool(re.fullmatch(ROUTE_HOST, host)) and name.rpartition(".")[2] == namespace


def route_target(service: Service, given: Texts, ours: str) -> tuple[list[str], ServicePort]:
    """The path prefixes and the port: the named, else the only, else the first HTTP one."""
    if given.get("route", "true") != "true":
        raise ValueError(f'{ours}route: "true" or "false" expected')
    services, prefix = comma_separated(given.get("grpc", "")), given.get("prefix", "")
    if wrong := [name for name in services if not re.fullmatch(GRPC_SERVICE, name)]:
        raise ValueError(f"{ours}grpc: not the name of a gRPC service: {shortened(wrong)!a:.100}")
    if prefix and not re.fullmatch(ROUTE_PREFIX, prefix):
        raise ValueError(f"{ours}prefix: not the beginning of a path: {prefix!a:.100}")
    prefixes = sorted(({f"/{name}/" for name in services} | {prefix}) - {""} or {"/"})
    if len(prefixes) > PREFIXES_MOST:
        raise ValueError(f"{ours}grpc: at most {PREFIXES_MOST} prefixes")
    ports = [port for port in service.ports if port.protocol == "TCP"]
    if wanted := given.get("port"):
        ports = [port for port in ports if wanted in (port.name, str(port.number))]
    elif len(ports) > 1:
        ports = [port for port in ports if protocol_of(port) in HTTP_PORTS]
    if not ports:
        raise ValueError(f"{ours}port: the Service has no TCP port {wanted[:60]!a}" if wanted else
                         f"which of its ports is HTTP? Set appProtocol or {ours}port")
    return prefixes, ports[0]


def owned_by_age(services: Mapping[Key, Service], plans: Mapping[Key, ServicePlan],
                 problems: Mapping[Key, list[str]]
                 ) -> tuple[dict[Key, list[Cluster]], dict[str, list[Route]]]:
    """The clusters of each Service, and the routes of each host. What two claim is the oldest's: a
    cluster's name (of two Envoy would use the last, in silence), and a host for its namespace."""
    names, hosts = dict[str, tuple[Key, Cluster]](), dict[str, str]()
    clusters: dict[Key, list[Cluster]] = {key: [] for key in plans}
    routes = defaultdict[str, list[Route]](list)
    for key in sorted(plans, key=lambda key: (services[key].created, key)):
        planned, route, _ = plans[key]
        for cluster in planned:
            owner, first = names.setdefault(cluster.name, (key, cluster))
            if first is cluster:
                clusters[key].append(cluster)
            else:
                problems[key].append(f"port {cluster.port.label} is left out: service "
                                     f"{'/'.join(owner)} has a cluster named {cluster.name}")
        name = next((own.name for own in clusters[key] if own.port == route.port), "")
        if route.port and not name:
            problems[key].append(f"is not routed: its port {route.port.label} has no cluster")
        for host in route.hosts:
            namespace = hosts.setdefault(host, key[0])
            if namespace != key[0]:
                problems[key].append(
                    f"is not routed at {host}: an older Service of namespace {namespace} has it")
            elif name:
                routes[host].append(route._replace(cluster=name))
    return clusters, {host: sorted(found) for host, found in routes.items()}


def shares(weights: Sequence[int | None]) -> list[int]:
    """The weights of a split. Who has none gets an equal part of what the others leave of 100."""
    given = [weight for weight in weights if weight is not None]
    without = len(weights) - len(given)
    rest = max(0, 100 - sum(given)) if given else without
    parts = iter([rest // without + (i < rest % without) for i in range(without)])
    return [next(parts) if weight is None else weight for weight in weights]


def virtual_host(fmt: str, host: str, routes: Sequence[Route]
                 ) -> tuple[bytes, list[tuple[Key, bool, str]]]:
    """The virtual host of a host, its routes from most to least specific; Services that share a
    prefix split it. And for the log: the first Service concerned, whether it is a problem, why."""
    rendered, said, prefixes = [], [], dict[str, list[Route]]()
    for route in routes:
        for prefix in route.prefixes:
            prefixes.setdefault(prefix, []).append(route)
    for prefix in sorted(prefixes, key=lambda prefix: (-len(prefix), prefix)):
        members = prefixes[prefix][:SPLIT_MOST]
        first, weights = members[0].service, shares([route.weight for route in members])
        split = [{"name": route.cluster, "weight": weight}
                 for route, weight in zip(members, weights, strict=True)]
        if not any(weights):
            said.append((first, True, f"{host}{prefix} has no route: all weights are 0"))
            continue
        if 0 < [route.weight for route in members].count(None) < len(members):
            text = shortened([f"{one['name']} {one['weight']}" for one in split])
            said.append((first, False, f"{host}{prefix} is split by weight: {text}"))
        action = {"weighted_clusters": {"clusters": split}} if members[1:] else {
            "cluster": members[0].cluster}
        rendered.append({"match": {"prefix": prefix}, "route": action})
    domains = [host] if "*" in host else [host, f"{host}:*"]
    return element(fmt, present(name=host, domains=domains, routes=rendered), "    "), said


# == Writing and rendering =======================================================================
MAX_USER_INSTANCES = "/proc/sys/fs/inotify/max_user_instances"
MADE_BY = "# Rendered by envoy-xds-configmap-loader, which overwrites changes.\n"
CDS_COMMENT = f"# Clusters: one for each port of each Service.\n{MADE_BY}"
# What every YAML parser, of 1.1 or 1.2, reads as the string that it is: names, paths, IPv4
# addresses, durations. Everything else is quoted as in JSON, in one line.
PLAIN_SCALAR = (
    r"(?ia)(?!(?:y|n|yes|no|on|off|true|false|null|nan|inf|infinity)\Z)"
    r"(?:[a-z_/][a-z0-9_./-]*|(?:[0-9]+\.){3}[0-9]+|[0-9]+s)\Z")
# What JSON's quoting leaves as it is, and YAML takes for a line break or rejects.
UNPRINTABLE = "[\x7f-\xa0\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]"
COMPACT_JSON = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


class Rendering(NamedTuple):
    files: Mapping[str, File]  # of one source
    warnings: Sequence[str] = ()  # what is wrong with it


def yaml_scalar(value: Json) -> str:
    """A scalar or an empty collection, in the one way that cannot be misread."""
    if type(value) is int or (type(value) is str and re.match(PLAIN_SCALAR, value)):
        return str(value)
    text = COMPACT_JSON.encode(value)
    if type(value) is float and "." not in text:
        return text.replace("e", ".0e")  # 1e+16 is a string in YAML 1.1
    return re.sub(UNPRINTABLE, lambda match: f"\\u{ord(match[0]):04x}", text)


yaml_key = functools.lru_cache(maxsize=1024)(yaml_scalar)  # keys are few, and short


def yaml_text(value: Json, indent: str) -> str:
    """A value in block style. `indent` begins each line of a collection, with the line break."""
    deeper = f"{indent}  "
    if value and type(value) is dict:
        return "".join([
            f"{indent}{yaml_key(key)}:{yaml_text(item, deeper if type(item) is dict else indent)}"
            for key, item in value.items()])
    if value and type(value) is list:
        return "".join([f"{indent}- {yaml_text(item, deeper).lstrip()}" for item in value])
    return f" {yaml_scalar(value)}"


def element(fmt: str, value: Json, indent: str = "  ") -> bytes:
    """One element of a list: "yaml" for people; "json", which Envoy reads five times faster."""
    if fmt == "json":
        return COMPACT_JSON.encode(value).encode()
    return yaml_text(value, f"\n{indent}").lstrip().encode()


def with_list(fmt: str, value: Json, name: str, elements: Sequence[bytes], indent: str) -> bytes:
    """What element() writes, and as its last member a list of elements that were written before."""
    text = element(fmt, {**value, name: []}, indent)
    if fmt == "json":
        return text[:-2] + b"\n" + b",\n".join(elements) + b"\n]}"
    dash = f"\n{indent}- ".encode()
    return dash.join([text.removesuffix(b" []"), *elements]) if elements else text


def discovery_response(fmt: str, comment: str, type_url: str, resources: Sequence[bytes]) -> bytes:
    """A DiscoveryResponse of resources that element() wrote. Its version is their hash."""
    version = hashlib.sha256(b"\n".join(resources)).hexdigest()[:16]
    head = {"version_info": version, "type_url": type_url}
    text = with_list(fmt, head, "resources", resources, "") + b"\n"
    return text if fmt == "json" else comment.encode() + text


@functools.lru_cache(maxsize=4)  # a step is planned several times until it may be published
def clusters_of(file: File) -> Mapping[str, bytes] | None:
    """The clusters by name, as texts, of CDS that is JSON or our own YAML; else None."""
    content = file.content
    try:
        if content.startswith(b"{"):
            resources = parse_json(content).get("resources", [])
            texts = {str(each["name"]): element("json", each) for each in resources}
        elif content.startswith(CDS_COMMENT.encode()):
            resources = content.removesuffix(b"\n").split(b"\n- ")[1:]
            if discovery_response("yaml", CDS_COMMENT, CLUSTER_TYPE, resources) != content:
                return None  # somebody else wrote a byte
            names = re.findall(rb"\n- .*\n  name: (.*)", content)
            texts = {json.loads(name) if name.startswith(b'"') else name.decode(): text
                     for name, text in zip(names, resources, strict=True)}
        else:
            return None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return texts if len(texts) == len(resources) else None


def inotify_budget(config: Config) -> int:
    """endpoint.eds_budget, else a sixteenth of a user's inotify instances: all Envoys of the node
    share these, need one for an EDS file (two while its cluster warms), and abort without."""
    instances = 128  # the kernel's default
    with contextlib.suppress(OSError, ValueError), open(MAX_USER_INSTANCES, "rb") as file:
        instances = int(file.read())
    configured = config["endpoint"]["eds_budget"]
    return instances // 16 if configured is None else configured


class Renderer:
    """Renders Services again and again; a change in one of them renders that one. `budget` is that
    of EDS files for `auto`; a cluster that is `published` keeps its mode."""

    def __init__(self, options: Options, config: Config, budget: int, published: Files) -> None:
        self._config, self._node_name = config, options.node_name
        self._fmt, self._endpoints = options.format, options.endpoints
        self._directory = f"{os.path.abspath(options.output_dir)}/{CURRENT}"
        self._budget = {EDS: sys.maxsize, INLINE: 0}.get(options.endpoints, budget)
        left = {name: EDS if b"eds_cluster_config" in text else INLINE
                for path in ("cds.yaml", "cds.json") if path in published
                for name, text in (clusters_of(published[path]) or {}).items()}
        # Of clusters by slices. (Without EDS files the modes there were no decision of `auto`.)
        self._modes = left if options.endpoints == AUTO and EDS in left.values() else {}
        self._splits: set[str] = set()  # as they were logged last
        self._calls: dict[Callable[..., Json], dict[Any, tuple[tuple[object, ...], Json]]] = {}

    def render(self, objects: Objects, other_files: int = 0) -> Rendering:
        """Render all; `other_files` EDS, RDS and SDS files of other sources share the budget."""
        plan = self._results(self._plan, {"": (objects.services, other_files)})[""]
        planned, routes, warnings = plan[0], plan[1], [*plan[2]]
        zone = own_zone(self._config, self._node_name, objects.nodes)
        if zone is None and self._config["endpoint"]["prefer_zone"]:
            warnings.append(f"node {self._node_name}: is not known or has no zone: "
                            f"endpoint.prefer_zone prefers none")
        slices = defaultdict[Key, list[EndpointSlice]](list)
        for found in objects.slices:
            slices[found.service].append(found)
        calls = {}
        for key, clusters in planned.items():
            nodes = {endpoint.node: objects.nodes[endpoint.node]
                     for found in (slices[key] if objects.nodes else ())
                     for endpoint in found.endpoints if endpoint.node in objects.nodes}
            calls[key] = (key, clusters, slices[key], zone, nodes)
        files, resources = dict[str, File](), list[bytes]()
        for key, (texts, eds, problems) in self._results(self._service, calls).items():
            resources += texts
            files |= eds
            if problems:
                warnings.append(service_line(key, problems))
        prefix = self._config["route"]["annotation_prefix"]
        comment = f"# Routes: from the annotations {prefix}/... of Services.\n{MADE_BY}"
        files |= self._results(self._file, {
            f"cds.{self._fmt}": (CDS_COMMENT, CLUSTER_TYPE, resources),
            f"rds.{self._fmt}": (comment, ROUTE_TYPE, [routes])})
        return Rendering(files, tuple(sorted(warnings)))

    def _results(self, function: Callable[..., Json], calls: Mapping[Any, tuple[object, ...]]
                 ) -> dict[Any, Json]:
        """The results of a function by key. It is called only where arguments differ from the last
        time's. (Unchanged objects are the same objects: comparing them ends at identity.)"""
        known = self._calls.get(function, {})
        found = {key: known[key] if key in known and known[key][0] == arguments else
                 (arguments, function(*arguments)) for key, arguments in calls.items()}
        self._calls[function] = found
        return {key: result for key, (_, result) in found.items()}

    def _plan(self, services: Mapping[Key, Service], other_files: int
              ) -> tuple[dict[Key, list[Cluster]], bytes, list[str]]:
        """What follows from the Services alone: clusters, the RouteConfiguration, warnings."""
        plans: dict[Key, ServicePlan] = self._results(plan_service, {
            key: (service, self._config, self._endpoints)
            for key, service in sorted(services.items())})
        problems = {key: list(said) for key, (_, _, said) in plans.items()}
        clusters, routes = owned_by_age(services, plans, problems)
        self._decide([*itertools.chain.from_iterable(clusters.values())], other_files)
        hosts = self._results(virtual_host, {host: (self._fmt, host, routed)
                                             for host, routed in sorted(routes.items())})
        splits = defaultdict[Key, list[str]](list)
        for key, is_problem, text in itertools.chain(*(said for _, said in hosts.values())):
            (problems if is_problem else splits)[key].append(text)
        lines = {service_line(key, texts) for key, texts in splits.items()}
        for line in sorted(lines - self._splits):  # not as a warning: nothing is wrong
            log.info("%s", line)
        self._splits = lines
        warnings = [service_line(key, problems[key]) for key in plans if problems[key]]
        if not services:
            warnings = ["--services: no Service matches the selector"]
        inlined = [name for name, mode in self._modes.items() if mode == INLINE]
        if inlined and self._endpoints == AUTO:
            warnings.append(f"beyond the EDS budget of {self._budget}, endpoints are in CDS: "
                            f"{shortened(inlined)}")
        head = {"@type": ROUTE_TYPE, "name": self._config["route"]["name"]}
        written = [text for text, _ in hosts.values()]
        return clusters, with_list(self._fmt, head, "virtual_hosts", written, "  "), warnings

    def _decide(self, clusters: Sequence[Cluster], other_files: int) -> None:
        """The mode of each cluster by slices, for life: one that flips would be new to Envoy."""
        names = [cluster.name for cluster in clusters if not cluster.host]
        on_eds = [name for name in names if self._modes.get(name) == EDS][: self._budget]
        free = self._budget - len(on_eds)
        free -= other_files if self._config["endpoint"]["eds_budget"] is None else 0
        on_eds += [name for name in names if name not in self._modes][: max(0, free)]
        self._modes = dict.fromkeys(names, INLINE) | dict.fromkeys(on_eds, EDS)
        metrics.replace("xds_loader_clusters", {
            (EDS,): len(on_eds), (INLINE,): len(names) - len(on_eds),
            (DNS,): len(clusters) - len(names)})

    def _service(self, key: Key, clusters: Sequence[Cluster], slices: Sequence[EndpointSlice],
                 zone: str | None, nodes: Mapping[str, Texts]
                 ) -> tuple[list[bytes], dict[str, File], list[str]]:
        """One Service: its clusters in CDS, its EDS files, and what is wrong with its endpoints."""
        by_slices = [cluster for cluster in clusters if not cluster.host]
        problems = list(slice_problems(by_slices, slices)) if by_slices else []
        resources, files = [], {}
        for cluster in clusters:
            label = cluster.port.label
            resource: dict[str, Json] = {"@type": CLUSTER_TYPE, "name": cluster.name, "type": "EDS"}
            assignment = assignment_of(cluster, slices, self._config, zone, nodes)
            if cluster.host and "endpoints" not in assignment:
                problems.append(f"the number of the target port of {label} is not known, so "
                                f"there is no endpoint")
            if self._modes.get(cluster.name) == EDS:
                path = f"eds/{'_'.join(key)}_{label}.{self._fmt}"
                comment = f"# Endpoints of service {'/'.join(key)}, port {label}.\n{MADE_BY}"
                text = element(self._fmt, {"@type": ASSIGNMENT_TYPE, **assignment})
                files[path] = self._file(comment, ASSIGNMENT_TYPE, [text])
                resource["eds_cluster_config"] = {"eds_config": {
                    "resource_api_version": "V3",
                    "path_config_source": {"path": f"{self._directory}/{path}"}}}
            else:
                resource |= {"type": "STATIC", "load_assignment": assignment}
            resources.append(element(self._fmt, {**resource, **cluster.options}))
        return resources, files, problems

    def _file(self, comment: str, type_url: str, resources: list[bytes]) -> File:
        return file_of(discovery_response(self._fmt, comment, type_url, resources), "services")


# == Secrets =====================================================================================
# A TLS Secret becomes SDS files, for the pair and for the trusted CA: Envoy accepts one resource a
# file. The PEM is inline, so that certificate and key are replaced at once. No text made here to be
# read has a byte of a key in it.

NAME_PART = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
OBJECT_NAME = rf"(?=.{{1,253}}\Z){NAME_PART}(?:\.{NAME_PART})*"  # an RFC 1123 subdomain


def secret_from(obj: Json, form: str = "yaml", mode: int = 0o600) -> Rendering:
    """The SDS files of a Secret. ValueError, without content, if anything is wrong with it. The raw
    object must not be kept: an annotation often holds the key again."""
    names = object_key(obj)
    label, stem = "/".join(names), "_".join(names)  # no object name has `_`
    valid = all(re.fullmatch(OBJECT_NAME, name) for name in names)
    if not valid or len(f"{stem}_ca.{form}") > 255:  # NAME_MAX of every file system that we know
        raise ValueError("a secret without a valid namespace and name, or too long for a file name")
    held = json_object(obj.get("data"))
    cert, key, ca = (decode_key(held.get(name), name) for name in ("tls.crt", "tls.key", "ca.crt"))
    check_secret(cert, key, ca)
    pair = {"name": label, "tls_certificate": {
        "certificate_chain": pem_source(cert), "private_key": pem_source(key)}}
    trusted = {"name": f"{label}/ca", "validation_context": {"trusted_ca": pem_source(ca)}}
    files, source = {}, f"secret {label}"
    for suffix, pem, resource in (("", cert, pair), ("_ca", ca, trusted)):
        if pem:
            text = element(form, {"@type": SDS_TYPE, **resource})
            content = discovery_response(form, f"# {source}\n", SDS_TYPE, [text])
            files[f"{stem}{suffix}.{form}"] = file_of(content, source, mode)
    return Rendering(files)


def pem_source(pem: bytes) -> dict[str, str]:
    """A DataSource of exactly these bytes: text where every parser reads the same, else base64."""
    if re.fullmatch(rb"[\n -~]*", pem):
        return {"inline_string": pem.decode("ascii")}
    return {"inline_bytes": base64.b64encode(pem).decode("ascii")}


def decode_key(text: Json, what: str) -> bytes:
    """Base64 as Go reads it (line breaks do not count), b"" for an absent or null key."""
    try:
        return base64.b64decode((text or "").replace("\r", "").replace("\n", ""), validate=True)
    except (AttributeError, ValueError):  # not chained: the text of the cause may quote it
        raise ValueError(f"{what} is not base64") from None


def check_secret(cert: bytes, key: bytes, ca: bytes) -> None:
    """ValueError for what Envoy would reject, as far as OpenSSL can tell, and for nothing else."""
    if not (cert or key or ca):
        raise ValueError("none of the keys tls.crt, tls.key and ca.crt is there or has a value")
    if bool(cert) != bool(key):
        raise ValueError("tls.crt without tls.key" if cert else "tls.key without tls.crt")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ALL:@SECLEVEL=0")  # Envoy itself decides what is too weak
    for entry, pem in (("tls.crt", cert), ("ca.crt", ca)):
        if b"PRIVATE KEY-----" in pem:  # Envoy's /config_dump redacts private_key, not this field
            raise ValueError(f"{entry} holds a private key, which belongs into tls.key alone")
        try:
            if pem:  # of which a comment may be in any encoding
                context.load_verify_locations(cadata=pem.decode("ascii", "backslashreplace"))
        except ssl.SSLError:
            raise ValueError(f"{entry} holds no PEM certificate, or an unreadable one") from None
    if not cert:
        return
    try:
        # OpenSSL reads pairs from files only: anonymous memory has a name in /proc, and no disk is
        # touched. Without it (macOS) only Envoy judges.
        with open(os.memfd_create("pem"), "wb", buffering=0) as file:
            file.write(cert + b"\n" + key)
            # (an empty password: without one OpenSSL would ask on the terminal, and wait)
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}", password="")
    except ssl.SSLError as error:
        if b"ENCRYPTED" in key:
            raise ValueError("tls.key is encrypted, and Envoy is given no passphrase") from None
        raise ValueError(f"tls.key is not the key of the first certificate in tls.crt "
                         f"({error.reason or 'not readable'})") from None
    except (OSError, AttributeError):  # after SSLError, which is an OSError
        pass


def holds_secret(content: bytes) -> bool:
    """Whether a text must not be shown: an SDS resource, a private key, or PEM, also in base64."""
    marks = (b"PRIVATE KEY-----", b"transport_sockets.tls.v3.Secret",
             b"LS0tLS1CRUdJTi", b"0tLS0tQkVHSU4g", b"tLS0tLUJFR0lOI")  # -----BEGIN, wherever it is
    return any(mark in content for mark in marks)


def redacted(content: bytes, published: bytes | None = None) -> bytes:
    """What may be printed of a content: of a secret no hash, by which guesses can be tested."""
    if not holds_secret(content):
        return content
    differs = published is not None and published != content
    return f"# [redacted: {len(content)} bytes{', changed' if differs else ''}]\n".encode()


def no_core_dumps() -> None:
    """Keep keys out of core files. (Not 0, which does not hold where core_pattern is a pipe.)"""
    import resource
    if resource.getrlimit(resource.RLIMIT_CORE)[1] != 0:  # else somebody forbade them before us
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


# == Composing ===================================================================================
# What an option asks for: objects by name or selector, and the directory that their files go to.
Source = tuple[Query, str]
# The API server checks this; --from-file and `..state` do not, and nothing may leave the output
# directory. (`..` begins the loader's own names.)
KEY_NAME = re.compile(r"(?!\.\.|\.\Z)[-._a-zA-Z0-9]{1,253}")
COUNTED = {  # in warnings: what a file has of it, and how each begins
    "cds": ("clusters", rb"@type\W+type\.googleapis\.com/envoy\.config\.cluster\.v3\.Cluster\b"),
    "rds": ("routes", rb'- match:|{"match":')}


def configmap_from(item: dict[str, Any]) -> Rendering:
    """Reduce a ConfigMap: `data` and `binaryData`, byte for byte. ValueError if it is none."""
    source = f"configmap {'/'.join(object_key(item))}"
    text, binary = member(item, "data", dict), member(item, "binaryData", dict)
    files, warnings = {}, []
    for key in sorted(text.keys() | binary.keys()):  # (values of any type have no order)
        problem = "" if KEY_NAME.fullmatch(key) else "is not a valid file name"
        try:
            content = text[key].encode() if key in text else decode_key(binary[key], key)
        except (AttributeError, ValueError):
            problem = "is not text" if key in text else "is not base64"
        if problem:
            warnings.append(f"{source}: key {key[:80]!r} {problem}, left out")
        else:
            files[key] = file_of(content, source)
    return Rendering(files, tuple(warnings))


class Wanted(NamedTuple):
    files: Files  # which may not be published while anything is missing or unknown
    notes: list[str]  # what is wrong with single objects
    missing: list[str]  # named objects that do not exist and never did
    stale: list[str]  # sources that keep their last files
    unknown: list[str]  # sources that were not listed yet


def overlaid(layers: Iterable[Rendering]) -> Rendering:
    """All files of the layers, the later ones winning, and a warning for each that lost."""
    files, warnings = dict[str, File](), list[str]()
    for layer in layers:
        warnings += layer.warnings
        for path, file in layer.files.items():
            lost = files.get(path, file)
            if lost.source != file.source:
                what, pattern = COUNTED.get(lost.kind, ("", b""))
                held = f" ({len(re.findall(pattern, lost.content))} {what})" if what else ""
                warnings.append(f"{path} of {lost.source}{held} is hidden by that of {file.source}")
            files[path] = file
    directories = {parent for path in files if "/" in path for parent in parents(path)}
    for path in sorted(directories & files.keys()):
        source = files.pop(path).source
        warnings.append(f"{path} of {source} left out: others have a directory there")
    return Rendering(files, warnings)


def with_kind(path: str, file: File, before: File | None) -> File:
    """A file without a type URL (CDS with no cluster left, or what Envoy will not be able to parse)
    is what was published there before, else what its name says."""
    stem = path.rpartition("/")[2].partition(".")[0]
    kind = before.kind if before else stem if stem in KINDS.values() else ""
    return file._replace(kind=kind) if kind else file


class Sources:
    """All reflectors of a run, and the files that their objects make together."""

    def __init__(self, options: Options, config: Config, wake: Callable[[str], None]):
        self._options, self._config, self._wake = options, config, wake
        self._file = FileSource(options.from_file, options.namespace) if options.from_file else None
        self._reflectors: dict[Query, Reflector] = {}
        selected = Query(CONFIGMAPS, options.namespace, labels=options.configmap_selector or "")
        by_selector = [] if options.configmap_selector is None else [(selected, "")]
        self._sources: list[Source] = [*options.secret, *by_selector, *options.configmap]
        self._kept: dict[Source, Files] = {}  # the last good files of each named object
        self._renderer: Renderer | None = None

    def start(self, published: Files) -> None:
        """Start every reflector. What is published tells what sources had before a restart."""
        options, budget = self._options, inotify_budget(self._config)
        metrics.set("xds_loader_inotify_instances_budget", budget)
        for query, directory in self._sources:
            owned = {path: file for path, file in published.items()
                     if file.source == str(query) and path.rpartition("/")[0] == directory}
            if owned:
                self._kept[query, directory] = owned
        queries = [query for query, _ in self._sources]
        if options.services is not None:
            self._renderer = Renderer(options, self._config, budget, published)
            namespaces = options.services_namespace or (options.namespace,)
            for namespace in ("",) if "*" in namespaces else namespaces:
                queries += [Query(SERVICES, namespace, labels=options.services),
                            Query(ENDPOINTSLICES, namespace)]
            endpoint = self._config["endpoint"]
            by_label = any("label" in source for source in endpoint["locality"].values())
            if by_label or endpoint["prefer_zone"] is True:  # all Nodes, or just the own one
                queries.append(Query(NODES, name="" if by_label else options.node_name))
        parsers: dict[str, Callable[[Json], Any]] = {
            CONFIGMAPS: configmap_from, SERVICES: service_from, NODES: texts_of,
            ENDPOINTSLICES: endpointslice_from,
            SECRETS: functools.partial(secret_from, form=options.format, mode=options.secret_mode)}
        for query in dict.fromkeys(queries):
            metrics.set("xds_loader_source_synced", 0, (str(query),))
            self._reflectors[query] = reflector = Reflector(
                query, parsers[query.kind], self._file or Api(options), self._wake, options)
            reflector.start()

    def refresh(self) -> None:
        for reflector in self._reflectors.values():
            reflector.refresh()

    def trouble(self) -> dict[str, ApiError]:
        return {str(r.query): r.trouble for r in self._reflectors.values() if r.trouble}

    def compose(self, published: Files) -> Wanted:
        """The files of all sources. Precedence, last wins: rendered files, Secrets, ConfigMaps by
        selector in order of name, ConfigMaps in the order in which they were named."""
        reflectors = self._reflectors.values()
        wanted = Wanted(
            {}, [bad for r in reflectors for bad in r.bad.values()], missing=[], stale=[],
            unknown=[str(r.query) for r in reflectors if not r.synced])
        if wanted.unknown:
            return wanted
        layers: list[Rendering] = []
        for query, directory in self._sources:
            if query.name:
                layers.append(self._named(query, directory, wanted))
            elif selected := self._reflectors[query].objects:
                layers += [selected[key] for key in sorted(selected)]
            else:
                wanted.notes.append(f"{query}: none exist")
        if self._renderer is not None:
            layers.insert(0, self._render(self._renderer, layers))
        files, warnings = overlaid(layers)
        wanted.notes.extend(warnings)
        files = {path: file if file.kind else with_kind(path, file, published.get(path))
                 for path, file in files.items()}
        return Wanted(files, *wanted[1:])

    def _named(self, query: Query, directory: str, wanted: Wanted) -> Rendering:
        """The files of a named object; the last ones where it is gone, emptied or bad."""
        source, key = (query, directory), (query.namespace, query.name)
        bad = key in self._reflectors[query].bad
        found = None if bad else self._reflectors[query].objects.get(key)
        named, warnings = found or Rendering({})
        files = {f"{directory}{directory and '/'}{name}": file for name, file in named.items()}
        if files or (found and not self._kept.get(source)):
            self._kept[source] = files
        elif source not in self._kept:
            wanted.missing.append(str(query))
            if self._file and not bad and (hint := self._file.elsewhere(query)):
                warnings = [hint]
        else:
            state = "has no usable files" if found or bad else "does not exist any more"
            warnings = [*warnings, f"{query} {state}: its last files stay published"]
            wanted.stale.append(str(query))
        return Rendering(self._kept.get(source, {}), warnings)

    def _render(self, renderer: Renderer, others: Sequence[Rendering]) -> Rendering:
        """The files of Services, as many of them with EDS as the other files leave budget for."""
        found = defaultdict[str, dict[Key, Any]](dict)
        for reflector in self._reflectors.values():
            found[reflector.query.kind] |= reflector.objects
        legacy = itertools.chain.from_iterable(found[ENDPOINTS].values())
        slices = [*found[ENDPOINTSLICES].values(), *legacy]
        nodes = {name: node for (_, name), node in found[NODES].items()}
        kinds = {path: file.kind for layer in others for path, file in layer.files.items()}
        subscriptions = sum(kind in ("eds", "rds", "sds") for kind in kinds.values())
        return renderer.render(Objects(found[SERVICES], slices, nodes), subscriptions)


# == Planning the steps ==========================================================================
# A route to a cluster that is not there yet answers 503, and so does a route to one that is gone
# already (measured: 547 and 709 of 76,000 requests). With P published and D desired, the next
# snapshot is the first of these that differs from P, each complete and consistent:
#   children    P, and the files of D whose path is new
#   clusters    that, and every changed file that is no reference; CDS with old and new clusters
#   references  that, and the changed references
#   removals    D

INITIAL, CHILDREN, CLUSTERS = "initial", "children", "clusters"
REFERENCES, REMOVALS, ROLLBACK = "references", "removals", "rollback"
REFERENCE_KINDS = frozenset(("ecds", "rds", "scoped_rds", "lds"))  # name clusters, files, others
CHILD_KINDS = frozenset(("cds", "eds", "sds"))
WAITING_STEPS = frozenset((REFERENCES, REMOVALS))  # for what Envoy makes of the steps before
NOTIFY_RANK = {"cds": 1, "ecds": 2, "rds": 2, "scoped_rds": 3, "lds": 4}  # every other kind first


class Step(NamedTuple):
    files: Files  # the next snapshot on the way
    name: str


def next_step(published: Files, desired: Files) -> Step | None:
    """The next snapshot; None when all is published. (What is on disk tells, at a start too.)"""
    if not published:
        return Step(desired, INITIAL) if desired else None
    new, references, others = dict[str, File](), dict[str, File](), dict[str, File]()
    for path in moved_paths(published, desired):
        old, file = published.get(path), desired[path]
        if old is None:
            new[path] = file
        elif {old.kind, file.kind} & REFERENCE_KINDS:
            references[path] = file
        else:
            others[path] = united(old, file)
    children: Files = published
    if new:
        above = {parent for path in new for parent in parents(path)}  # files become directories
        children = {path: file for path, file in published.items() if path not in above} | new
    clusters = {**children, **others} if others else children
    steps = [Step(children, CHILDREN), Step(clusters, CLUSTERS),
             Step({**clusters, **references}, REFERENCES), Step(desired, REMOVALS)]
    if not references and all(published[path].kind != "cds" for path in others):
        del steps[0]  # no parent changes: nobody reads new files before they are all there
    return next((step for step in steps if not same_files(step.files, published)), None)


def notify_order(paths: Iterable[str], files: Files) -> list[str]:
    return sorted(paths, key=lambda path: (NOTIFY_RANK.get(files[path].kind, 0), path))


def united(old: File, new: File, keep: frozenset[str] | None = None) -> File:
    """A file on the way from old to new: CDS with the clusters of both (of old those to `keep`).
    YAML of a ConfigMap goes out as it is: now, or with the removals if it only has fewer names."""
    if new.kind != "cds" and old.kind != "cds":
        return new
    one, two = clusters_of(old), clusters_of(new)
    if one is None or two is None or old.content[:1] != new.content[:1]:  # JSON beside YAML
        fewer = names_in(new.content) < names_in(old.content)
        return old if fewer or keep is not None else new
    extra = {name: text for name, text in one.items()
             if name not in two and (keep is None or name in keep)}
    if not extra:
        return new
    if (union := {**two, **extra}) == one:
        return old  # nothing new: the old file is the union
    form = "json" if new.content.startswith(b"{") else "yaml"
    content = discovery_response(form, CDS_COMMENT, CLUSTER_TYPE, [*union.values()])
    return file_of(content, new.source, new.mode, "cds")


# Names in texts, without a YAML parser.
NAME = re.compile(rb"""(?m)(^[ ]*(?:- )?)?["']?\b(?:cluster_?|alt_?[sS]tat_?)?[nN]ame["']?"""
                  rb"""[ \t]*:[ \t]*["']?([^\s"',{}\[\]]+)""")
WORD = re.compile(rb"[^\s\"'{}\[\],]+")
PLACE = re.compile(rb"/[-\w./]+", re.ASCII)


def names_in(content: bytes) -> frozenset[str]:
    """The values of all `name:` fields of a text, at whatever depth."""
    return frozenset(name.decode("utf-8", "replace") for _, name in NAME.findall(content))


def cluster_names(files: Iterable[File]) -> frozenset[str]:
    """The clusters that CDS files hold; where a text does not tell, every name in it."""
    return frozenset().union(*(
        names_in(file.content) if (known := clusters_of(file)) is None else known.keys()
        for file in files if file.kind == "cds"))


def mentioned(content: bytes, names: Iterable[str]) -> frozenset[str]:
    """Those of the names that a text has as a word."""
    text = content.replace(b"\\/", b"/")
    words = {word.strip(b":") for word in WORD.findall(text)}
    return frozenset(name for name in names if (raw := name.encode()) in words
                     or (WORD.fullmatch(raw) is None and raw in text))


def places_in(content: bytes) -> set[str]:
    """The paths in a text, and their ends: Envoy may have our directory anywhere."""
    found = set()
    for place in PLACE.findall(content.replace(b"\\/", b"/")):
        parts = place.decode().split("/")[-DEPTH:]
        found |= {"/".join(parts[i:]) for i in range(len(parts))}
    return found


def paths_in(files: Iterable[File], paths: Collection[str]) -> set[str]:
    return {path for file in files if paths for path in places_in(file.content) if path in paths}


@functools.lru_cache(maxsize=4)
def names_by_place(cds: File) -> Mapping[str, list[frozenset[str]]]:
    """By the places that clusters name: the names in each of these clusters."""
    blocks = [*(clusters_of(cds) or {}).values()]
    if not blocks:  # block YAML, as its dashes divide it
        first = re.search(rb"\nresources:[^\n]*\n([ ]*)- ", b"\n" + cds.content)
        blocks = cds.content.split(b"\n" + first[1] + b"- ") if first else [cds.content]
    found = defaultdict[str, list[frozenset[str]]](list)
    for block in blocks:
        names = names_in(block)
        for place in places_in(block):
            found[place].append(names)
    return found


def names_by_path(path: str, files: Files) -> set[str]:
    """The names in the clusters whose endpoints are in this file."""
    return {name for cds in files.values() if cds.kind == "cds"
            for names in names_by_place(cds).get(path, ()) for name in names}


def with_named_files(files: Files, pool: Files) -> dict[str, File]:
    """These files, those of a pool that they name, and so on."""
    files = {**files}
    while more := paths_in(files.values(), pool.keys() - files.keys()):
        files |= {path: pool[path] for path in more}
    return files


class Nack(NamedTuple):
    digest: str  # of the bytes that Envoy rejected: not tried again until others are desired
    kind: str
    reason: str
    stood: frozenset[str] = frozenset()  # the clusters and files there were, of those it names


def is_nacked(file: File | None, nack: Nack, acked: File | None = None) -> bool:
    """Whether Envoy rejected these bytes, or what they are with the clusters of ACKed ones."""
    if file is None or acked is None or acked.digest == nack.digest:  # another Envoy ACKed it
        return file is not None and file.digest == nack.digest
    return nack.digest in (file.digest, united(acked, file).digest)


def allowed(desired: Files, published: Files, acked: Files,
            nacks: Mapping[str, Nack]) -> tuple[Files, list[str]]:
    """What may be published of `desired` after NACKs, and why the rest waits, in words. A NACKed
    file keeps its last ACKed bytes. References to what is lacking because of that keep theirs too,
    and what bytes that are kept name stays as well."""
    if not nacks:
        return desired, []
    held = [path for path, nack in sorted(nacks.items())
            if is_nacked(desired.get(path), nack, acked.get(path))]
    notes = [f"{path}: NACKed by Envoy, "
             f"{'the last ACKed bytes stay' if path in acked else 'it has no ACKed bytes'}"
             for path in held]
    idle = {name for path in held if path not in acked for name in names_by_path(path, desired)}
    result, waiting = desired, held
    while waiting:
        before = {**published, **acked}
        result = {path: file for path, file in result.items() if path not in waiting}
        result |= {path: before[path] for path in waiting if path in before}
        result = with_named(result, desired, published, acked)
        there, missing = cluster_names(desired.values()), desired.keys() - result.keys()
        lacking = (there & idle) | (there - cluster_names(result.values()))
        waiting = [path for path, file in result.items()
                   if file.kind in REFERENCE_KINDS and file is desired.get(path)
                   and not same_file(before.get(path), file)
                   and (mentioned(file.content, lacking) or paths_in([file], missing))]
        notes += [f"{path}: waits for what Envoy NACKed" for path in waiting]
    return result, notes


def with_named(result: Files, desired: Files, published: Files, acked: Files) -> dict[str, File]:
    """`result`, and what its bytes that are not the desired ones name: files and clusters."""
    result = with_named_files(result, {**acked, **published})
    users = b"\n".join(file.content for path in moved_paths(desired, result)
                       if (file := result[path]).kind in REFERENCE_KINDS)
    for path, old in [*acked.items(), *published.items()]:
        cds = result.get(path)
        # (YAML that was put back is one of the old files as a whole already.)
        if cds and cds.kind == "cds" and (clusters_of(old) or cds is desired.get(path)):
            lost = cluster_names([old]) - cluster_names(result.values())
            if needed := mentioned(users, lost):
                result[path] = united(old, cds, needed)
    return with_named_files(result, {**acked, **published})  # the endpoints of these clusters


# == The disk ====================================================================================
# A `path` is relative, in a snapshot and in `current/`; a `place` is where something is on disk.
# Publishing a set of files; the numbers come back in the code:
#   1. Stage: a new directory `..<version>` of all files; unchanged ones are hard-linked.
#   2. Remember in `..state` which object each file is from.
#   3. Mark: a symlink `..notify` names the snapshot before. (For Envoy it is no event.)
#   4. Unlink the links of files that are gone.
#   5. Swap: `..data` is renamed over. From here on every path shows the new snapshot.
#   6. Notify: rename(2) replaces each changed link, children first. The MOVE wakes only its reader.
#   7. Unmark.
#   8. Prune: all but the last two snapshots go.
#
# A death before 5 leaves the old snapshot and a left-over; between 5 and 7 the marker, and the
# next start notifies again of what differs. A loader that lives does so after an OSError.

SWITCH, MARKER, STATE, CURRENT, LINK = "..data", "..notify", "..state", "current", "..link"
ACKED_FILES, STATE_FILE = f"{STATE}/acked", f"{STATE}/loader.json"
SNAPSHOT = re.compile(r"\.\.[0-9a-f]{16}(\.[0-9]{1,9})?")
DEPTH = 32  # of directories that we look into
SNAPSHOT_BYTES = 256 << 20  # of what is read of one directory: sparse files cost nobody a disk
STATE_BYTES = 16 << 20  # of what is remembered: 10,000 files are 3 MB


class Output:
    """The output directory; nothing else touches it. After an OSError the old files serve on."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.published: Files = {}
        self.snapshot = ""  # the name of its directory
        self.switched_at = 0.0  # when it was switched to, Unix time
        self.foreign: set[str] = set()  # files in `current/` that are not ours
        self.state: Mapping[str, Json] = {}  # what is remembered, as it is on disk
        self.staged = ""  # a snapshot that --check-cmd looks at
        self.kept: Files = {}  # the ACKed files in `..state`
        self._before = ""  # the last snapshot but one
        self._unread: set[str] = set()  # files that could not be read: their links stay
        self._lock = -1

    def lock(self) -> bool:
        """Create the directory if need be and be its only loader; False while another one is."""
        os.makedirs(self.root, exist_ok=True)
        if self._lock < 0:  # the directory itself: a lock file could be another user's
            self._lock = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def recover(self) -> None:
        """Make good whatever the last process, or the last failure, left; load what is there."""
        if is_directory(self._path(SWITCH)):
            raise LoaderError(f"{self._path(SWITCH)} is a directory and not a link: remove it")
        remove(self._path(LINK))
        self.published, self.snapshot = self.peek(), self._switched()
        self.kept = self._load(ACKED_FILES, "%") if is_directory(self._path(STATE)) else {}
        self.switched_at = os.lstat(self._path(SWITCH)).st_mtime if self.snapshot else 0.0
        if repaired := self._repair_links():
            log.info("links repaired: %s", shortened(repaired))
        if (marked := read_link(self._path(MARKER))) is not None:
            before = self._load(marked) if SNAPSHOT.fullmatch(marked) else {}
            changed = moved_paths(before, self.published)
            self._notify(changed)
            log.info("notified again: %s", shortened(changed) or "nothing")
        remove(self._path(MARKER))
        complete = [entry for entry in filter(SNAPSHOT.fullmatch, os.listdir(self.root))
                    if entry != self.snapshot and version_of(self._load(entry)) == entry[2:18]]
        self._before = max(complete, default="",
                           key=lambda entry: os.lstat(self._path(entry)).st_mtime_ns)
        self.prune()

    def peek(self) -> Files:
        """What is published, and `state`, read without a lock and without touching anything."""
        self.state, there = {}, is_directory(self._path(STATE))
        if there and (found := read_file(self._path(STATE_FILE), STATE_BYTES)):
            with contextlib.suppress(ValueError, TypeError, KeyError):  # it is not ours
                state = parse_json(found[0])
                self.state = state if state["version"] == __version__ else {}
        while True:  # a loader that lives may prune what is being read: then it has switched
            name = self._switched()
            files = self._load(name) if name else {}
            if self._switched() == name:
                return files

    def fitting(self, files: Files) -> tuple[Files, list[str]]:
        """The files that can be in `current/`, and a warning for each that has no place there."""
        fit, warnings = {**files}, list[str]()
        for path in sorted(files.keys() - self.published.keys()):
            above = next((each for each in parents(path)
                          if each in self.foreign or each in files), "")
            if above or is_directory(self._path(CURRENT, path)):  # Envoy may watch it
                place = self._path(CURRENT, above or path)
                warnings.append(f"{path} of {fit.pop(path).source} left out: {place} is a "
                                f"{'file' if above else 'directory'}")
        return fit, warnings

    def stage(self, files: Files) -> str:
        """Step 1: the name of a complete directory of these files, made if need be."""
        version = f"..{version_of(files)}"
        for attempt in itertools.count():
            name = f"{version}.{attempt}" if attempt else version
            try:
                os.mkdir(f"{self.root}/{name}", 0o755)
                break
            except FileExistsError:
                if not self._damage(name, files):
                    return name
        if nested := [path for path in files if "/" in path]:
            self._own_parents(name, nested)
        for path, file in files.items():
            self._put(f"{self.root}/{name}/{path}", path, file)
        return name

    def publish(self, files: Files, again: Iterable[str] = ()) -> list[str]:
        """Publish these files, some of them `again`; returns the paths that moved or are gone."""
        changed = [*moved_paths(self.published, files), *files.keys() & again]
        gone = [path for path in sorted({*self.published, *self._unread} - files.keys())
                if read_link(self._path(CURRENT, path)) == link_target(path)]  # it is ours
        directories = {path.rpartition("/")[0] for path in (*changed, *gone)}
        # Before anything is switched: the links of all files must be replaceable.
        for place in [f"{self.root}/{CURRENT}/{each}" for each in directories]:
            if not os.access(place, os.W_OK | os.X_OK, effective_ids=True) and os.path.isdir(place):
                read_only = os.statvfs(place).f_flag & os.ST_RDONLY
                number = errno.EROFS if read_only else errno.EACCES
                raise OSError(number, os.strerror(number), place)
        name, before = self.stage(files), self.snapshot  # 1
        self.remember(self.state, files)  # 2
        os.symlink(before or "none", self._path(MARKER))  # 3
        for path in gone:  # 4
            os.unlink(self._path(CURRENT, path))
        if directories != {""} or not is_directory(f"{self.root}/{CURRENT}"):
            self._own_parents(CURRENT, changed)
        self._link(SWITCH, name)  # 5
        self.snapshot, self.published, self.switched_at = name, files, time.time()
        self._before = before if before != name else self._before
        self._notify(changed)  # 6
        remove(self._path(MARKER))  # 7
        return changed + gone

    def prune(self) -> None:
        """Step 8: only the last two snapshots stay. What cannot be removed is named."""
        for entry in filter(SNAPSHOT.fullmatch, os.listdir(self.root)):
            if entry not in (self.snapshot, self._before, self.staged):
                try:
                    remove(self._path(entry))
                except OSError as error:
                    log.warning("left-over stays: %s", why(error))

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

    def remember(self, state: Mapping[str, Json], coming: Files = {}) -> None:  # noqa: B006
        """Replace what is remembered, with the kind and source of each file, also of those that
        are about to be published."""
        files = {**self.published, **coming}
        state = {**state, "version": __version__,
                 "files": {path: f"{file.kind} {file.source}" for path, file in files.items()}}
        if state == self.state:
            return
        self._own_parents(STATE)
        place, new = self._path(STATE_FILE), self._path(f"{STATE_FILE}.new")
        remove(new)
        write_file(new, json.dumps(state).encode(), 0o644)
        if is_directory(place):
            remove(place)
        os.rename(new, place)
        self.state = state

    def keep_acked(self, acked: Files, files: Files) -> None:
        """Keep the ACKed bytes that are not published or that `files` will replace, no others."""
        needed = {path: acked[path] for shown in (self.published, files)
                  for path in moved_paths(shown, acked)}
        for path in [*moved_paths(self.kept, needed), *(self.kept.keys() - needed.keys())]:
            place = self._path(ACKED_FILES, path.replace("/", "%"))
            self._own_parents(ACKED_FILES)
            remove(place)
            if path in needed:
                self._put(place, path, needed[path])
        self.kept = needed

    def _path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def _load(self, name: str, slash: str = "/") -> dict[str, File]:
        """The regular files of a directory, and of each what is remembered."""
        rows, files, room = json_object(self.state.get("files")), dict[str, File](), SNAPSHOT_BYTES
        for entry in walk(self._path(name)):
            path, place = entry.replace(slash, "/"), self._path(name, entry)
            valid = all(map(KEY_NAME.fullmatch, path.split("/")))
            if not valid or not (found := read_file(place, room)):
                continue
            content, mode = found
            kind, _, source = str(rows.get(path, " disk")).partition(" ")
            kind = kind_of(content) or (kind if kind in KINDS.values() else "")
            files[path] = file_of(content, source, mode, kind)
            room -= len(content)
        return files

    def _put(self, place: str, path: str, file: File) -> None:
        """Make a new file: if it is published, by a hard link where the kernel allows it."""
        if same_file(self.published.get(path), file):
            with contextlib.suppress(OSError):
                os.link(self._path(self.snapshot, path), place, follow_symlinks=False)
                return
        write_file(place, file.content, file.mode)

    def _damage(self, name: str, files: Files) -> list[str]:
        """The paths that are not on disk as they should be, those that are too many included."""
        if not is_directory(self._path(name)):
            return [*files, name]
        wrong = [path for path, file in files.items() if (file.content, file.mode)
                 != read_file(self._path(name, path), len(file.content))]
        return wrong + [path for path in walk(self._path(name)) if path not in files]

    def _link(self, relative: str, target: str) -> None:
        """Make or replace a link by rename(2): nobody ever finds none."""
        place = f"{self.root}/{LINK}"
        os.symlink(target, place)
        os.rename(place, f"{self.root}/{relative}")

    def _notify(self, paths: Iterable[str]) -> None:
        """Make or replace the links of files: the MOVE that Envoy sees."""
        for path in notify_order(paths, self.published):
            self._link(f"{CURRENT}/{path}", link_target(path))

    def _own_parents(self, top: str, paths: Iterable[str] = ("",)) -> None:
        """Real directories above these paths below `top`, never replaced if they are."""
        needed = {parent for path in paths for parent in parents(f"{top}/{path}")}
        for place in map(self._path, sorted(needed)):
            if not is_directory(place):
                if os.path.islink(place):
                    os.unlink(place)  # Envoy's watch would stay on what is behind it
                os.mkdir(place, 0o755)

    def _switched(self) -> str:
        """The snapshot that `..data` names, or nothing where there is none behind it."""
        name = read_link(self._path(SWITCH)) or ""
        return name if SNAPSHOT.fullmatch(name) and is_directory(self._path(name)) else ""

    def _repair_links(self) -> list[str]:
        """Every published file has its link in `current/`, and no link of ours is left over."""
        self._own_parents(CURRENT, ("", *self.published))
        there = [*walk(self._path(CURRENT))]
        ours = {path for path in there if read_link(self._path(CURRENT, path)) == link_target(path)}
        missing = [path for path in self.published if path not in ours]
        self._notify(missing)
        left = ours - self.published.keys()
        self._unread = {path for path in left if os.path.lexists(self._path(self.snapshot, path))}
        stale = sorted(left - self._unread)
        for path in stale:
            os.unlink(self._path(CURRENT, path))
        self.foreign = {*there} - ours - self.published.keys()
        return missing + stale


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


def remove(place: str, depth: int = DEPTH) -> None:
    """Remove what is there, if anything is. A link is never followed."""
    try:
        os.unlink(place)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        if not depth:
            raise
        for name in sorted(os.listdir(place)):
            remove(f"{place}/{name}", depth - 1)
        os.rmdir(place)


def write_file(place: str, content: bytes, mode: int) -> None:
    """A new file, of exactly this mode."""
    number = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.fchmod(number, mode)  # whatever the umask, or a default ACL of the volume
        while content:
            content = content[os.write(number, content) :]
    finally:
        os.close(number)


def read_file(place: str, most: int) -> tuple[bytes, int] | None:
    """Content and mode of a regular file, else None. (Others may plant links and FIFOs here.)"""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with open(place, "rb", opener=lambda path, _: os.open(path, flags)) as stream:
            status = os.fstat(stream.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_size <= most:
                return stream.read(most), stat.S_IMODE(status.st_mode)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # says nothing about the file
    return None


def walk(root: str, below: str = "") -> Iterator[str]:
    """The relative path of every entry under a directory that is no directory."""
    if not is_directory(root):
        return
    # What is not there was pruned by a loader that lives, while a preview reads.
    with contextlib.suppress(FileNotFoundError), os.scandir(f"{root}/{below}") as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = f"{below}{entry.name}"
            if entry.is_dir(follow_symlinks=False) and path.count("/") < DEPTH:
                yield from walk(root, f"{path}/")
            else:
                yield path


# == ACK and NACK ================================================================================
# For every move of a file Envoy counts, for each subscription that reads it, exactly one of
# update_success (ACK) or update_rejected and update_failure (NACK). One publication is asked about
# at a time, so the counts before and after it tell everything. What they do not tell stays unknown.

ACKED, NACKED, UNKNOWN, UNREAD = "acked", "nacked", "unknown", "unread"  # of a published file
PENDING, MIXED = "pending", "mixed"  # in one look: not attempted yet; both, as moves overlapped
ANSWER_BOUND = 1.0  # seconds for one answer of the admin interface
ASK_BOUND = (1.0, 2.0)  # seconds until a publication is judged; of an Envoy that answered before
SILENT_BOUND = 30.0  # seconds that references wait for an Envoy that is there and silent
WARM_BOUND = 5.0  # seconds until clusters are warm: the first health check of each
LOOK_FIRST, LOOK_LAST, LOOK_IDLE = 0.001, 0.05, 30.0  # seconds between two looks, growing
# Seconds between two tries to reach Envoy, soon after an end and later: one that ends at each start
# has its admin socket open for 12 to 115 ms (measured).
PROBE_SOON, PROBE = 0.01, 0.1
END_BOUND = 10.0  # seconds after coming back within which a second end is blamed on the files
ANSWER_BYTES = 64 << 20  # a longer answer is not Envoy's
REASON_LENGTH = 400  # characters of Envoy's words in the log

STATS = "/stats?usedonly&filter=" + urllib.parse.quote(
    r"\.(update_(success|rejected|failure)|warming_clusters"
    r"|dynamic_unknown_fields|hot_restart_epoch)$")
NOT_ENVOY = "the answer is not that of Envoy's admin interface"
STATS_MATCHER = "/config_dump?mask=bootstrap.stats_config.stats_matcher"
LISTENER_ERRORS = "/config_dump?resource=dynamic_listeners&mask=name,error_state.details"


class Counts(NamedTuple):  # of the attempts of one subscription
    success: int = 0
    failed: int = 0  # update_rejected and update_failure


class Look(NamedTuple):
    counts: Mapping[str, Counts] = {}  # by the name of the scope in /stats
    live: bool = False  # Envoy is through its own initialization
    hidden: bool = False  # a stats_matcher may leave out counters
    warming: int = 0  # clusters
    unknown_fields: int = 0
    reason: str = ""  # why listeners were rejected, in Envoy's words


class Known(NamedTuple):
    """What Envoy made of the files, as far as it is known. A value: each fact makes a new one."""

    acked: Files = {}  # noqa: RUF012 - the last bytes that any Envoy ACKed
    nacks: Mapping[str, Nack] = {}  # of any Envoy, until what is desired is something else
    states: Mapping[str, str] = {}  # ACKED, NACKED, UNREAD by path, by the Envoy process of now
    unknown: frozenset[str] = frozenset()  # paths that nobody waits for any more, until an ACK
    counts: Mapping[str, Counts] = {}  # before the moves that are not judged yet
    doubt: bool = True  # the next look may show an attempt that was before the last move
    came: frozenset[str] = frozenset()  # clusters and files that a NACK may be older than
    named: frozenset[str] = frozenset()  # files without a source that others named
    suspects: frozenset[tuple[str, str]] = frozenset()  # paths and digests, when Envoy ended last


SCOPES = {  # by kind: how the scope of a subscription begins, and what is before the file's name
    "cds": ("cluster_manager.cds", ""),
    "lds": ("listener_manager.lds", ""),
    "eds": ("cluster.", ""),
    "rtds": ("runtime", ""),
    "rds": ("http.", ".rds."),
    "scoped_rds": ("http.", ".scoped_rds."),  # and the name of the listener's set of scopes
    "sds": ("", "sds."),
    "ecds": ("extension_config_discovery.", "."),
}


def scopes_of(kind: str, names: Iterable[str], scopes: Collection[str]) -> list[str]:
    """The scopes that are about a file of this kind with a resource of one of these names."""
    begin, middle = SCOPES[kind]
    if not middle:
        return [scope for name in names if (scope := begin + name) in scopes]
    ends = tuple(name and middle + name for name in names)
    return [scope for scope in scopes
            if scope.startswith(begin) and middle in scope and scope.endswith(ends)]


def resource_names(path: str, file: File, files: Files) -> set[str]:
    """The names under which statistics know the resource of a file: "" where there is but one,
    none where the text shows none."""
    if file.kind in ("cds", "lds", "rtds", "scoped_rds"):
        return {""}
    # Endpoints are under the name of the cluster, which may differ from the assignment's.
    names = names_by_path(path, files) if file.kind == "eds" else set()
    if not names:
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            resource = parse_json(file.content)["resources"][0]
            names = {name for key in ("name", "cluster_name", "clusterName")
                     if isinstance(name := resource.get(key), str)}
    if not names:  # in YAML the field that is indented least
        fields = [(len(file.content) if found[1] is None else len(found[1]), found.start(),
                   found[2].decode("utf-8", "replace")) for found in NAME.finditer(file.content)]
        names = {name for _, _, name in sorted(fields)[:1]}
    return {name.replace("://", "_").replace(":/", "_").replace(":", "_") for name in names}


def after_publication(known: Known, before: Files, after: Files, again: Sequence[str]) -> Known:
    """Files moved, some of them `again`: what Envoy makes of them is to be seen."""
    moved = {*moved_paths(before, after), *again}
    waiting = bool(unjudged(known, before))
    came = known.came | (things(after) - things(before)) if waiting else frozenset[str]()
    return known._replace(
        states={path: state for path, state in known.states.items()
                if path in after and path not in moved},
        unknown=known.unknown.intersection(after), doubt=known.doubt or waiting, came=came)


def things(files: Files) -> frozenset[str]:
    return cluster_names(files.values()).union(files)


def named_things(file: File, files: Files) -> frozenset[str]:
    """The clusters and files there are, of those that a reference names."""
    clusters = mentioned(file.content, cluster_names(files.values()))
    return clusters | paths_in([file], files.keys())


def after_meeting(known: Known) -> Known:
    """Another Envoy process: it confirmed nothing yet, and counts from zero."""
    unread = {path: state for path, state in known.states.items() if state == UNREAD}
    return known._replace(states=unread, unknown=frozenset(), counts={}, doubt=True)


def after_end(known: Known, files: Files, *, soon: bool) -> tuple[Known, list[str]]:
    """Envoy ended. If it was on bytes that no Envoy ACKed, and again soon after it came back, then
    these bytes end it: they count as NACKed. Returns the paths of those."""
    unproven = [path for path, file in files.items()
                if file.kind and not same_file(known.acked.get(path), file)
                and known.states.get(path) != UNREAD]
    suspects = frozenset((path, files[path].digest) for path in unproven)
    blamed = unproven if soon and suspects & known.suspects else []
    for path in blamed:
        known = with_nack(known, path, files, "Envoy ended twice on it")
    suspects = frozenset() if blamed else suspects
    return after_meeting(known)._replace(suspects=suspects), blamed


def after_look(known: Known, files: Files, look: Look) -> tuple[Known, dict[str, str]]:
    """What the counts tell about the published files that are not ACKed or NACKed yet, by path."""
    if known.doubt:  # Envoy may have been asked between a move and its reading: ask again
        return known._replace(doubt=False), {}
    told, open_scopes = dict[str, str](), set[str]()
    for path, file in files.items():
        if not file.kind or known.states.get(path) in (ACKED, NACKED):
            continue
        names = resource_names(path, file, files)
        if path in known.acked:  # Envoy still asks for the name that broken bytes hide
            names |= resource_names(path, known.acked[path], files)
        read_by = scopes_of(file.kind, names, look.counts)
        told[path] = verdict(known, look, read_by)
        if told[path] == PENDING:
            open_scopes |= set(read_by)
    told |= dict.fromkeys(rejected_unnamed(known, files, look, told), NACKED)
    known = known._replace(
        states={**known.states, **{path: state for path, state in told.items()
                                   if state in (ACKED, NACKED, UNREAD)}},
        unknown=known.unknown.union(path for path in told if told[path] == UNKNOWN),
        counts={scope: known.counts.get(scope, Counts()) if scope in open_scopes else counts
                for scope, counts in look.counts.items()},
    )
    for path, state in sorted(told.items(), key=lambda row: row[1]):  # first ACKs: they lift NACKs
        if state == ACKED:
            known = with_ack(known, path, files)
        elif state == NACKED:
            reason = look.reason if files[path].kind == "lds" else ""
            reason = likely_cause(files[path], files) or reason or "the log of Envoy has the reason"
            known = with_nack(known, path, files, reason)
    if not any(told[path] == PENDING for path in awaited(known, files)):
        known = known._replace(came=frozenset())
    # Of files that are gone the ACKed bytes are kept until nothing may be rolled back to them.
    if all(known.states.get(path) in (ACKED, UNREAD)
           for path, file in files.items() if file.kind in ("cds", "lds")):
        known = known._replace(acked={p: file for p, file in known.acked.items() if p in files})
    return known, told


def verdict(known: Known, look: Look, read_by: Sequence[str]) -> str:
    """What became of a file, by the scopes of its readers: one NACK is a NACK, an ACK takes all."""
    if not read_by:
        return UNKNOWN if look.hidden else UNREAD if look.live else PENDING
    told = set()
    for scope in read_by:
        now, before = look.counts[scope], known.counts.get(scope, Counts())
        if sum(now) < sum(before):
            before = Counts()  # the cluster was removed and came back
        success, failed = now.success - before.success, now.failed - before.failed
        told.add((MIXED if failed else ACKED) if success else NACKED if failed else PENDING)
    return next(state for state in (NACKED, MIXED, PENDING, ACKED) if state in told)


def rejected_unnamed(known: Known, files: Files, look: Look, told: Mapping[str, str]) -> list[str]:
    """Those of the first files that nobody seems to read which explain a subscription that only
    fails: their text does not show the name for which Envoy asks."""
    failing = [scope for scope, counts in look.counts.items()
               if counts.failed and not counts.success]
    explained = {files[path].kind for path, state in {**known.states, **told}.items()
                 if path in files and state in (NACKED, PENDING)}
    kinds = {kind for kind, (begin, middle) in SCOPES.items() for scope in failing
             if kind not in explained and scope.startswith(begin) and middle in scope}
    return [path for path, state in told.items()
            if state == UNREAD and files[path].kind in kinds and path not in known.acked]


def with_ack(known: Known, path: str, files: Files) -> Known:
    """Envoy took these bytes. If they mend a NACK, references that were NACKed are tried again."""
    file, nacks = files[path], dict(known.nacks)
    nack = nacks.get(path)
    if nack and (is_nacked(file, nack) or not same_file(known.acked.get(path), file)):
        del nacks[path]
        if file.kind in CHILD_KINDS:
            nacks = {p: its for p, its in nacks.items() if its.kind not in REFERENCE_KINDS}
    return known._replace(acked={**known.acked, path: file}, nacks=nacks,
                          unknown=known.unknown - {path})


def with_nack(known: Known, path: str, files: Files, reason: str) -> Known:
    """Envoy rejected these bytes. If they are its last good ones, something else is wrong."""
    file, old = files[path], known.nacks.get(path)
    if old and same_file(known.acked.get(path), file):
        return known
    named = named_things(file, files) if file.kind in REFERENCE_KINDS else frozenset[str]()
    stood = old.stood if old and is_nacked(file, old) else named - known.came
    nack = Nack(file.digest, file.kind, reason, stood)
    return known._replace(nacks={**known.nacks, path: nack})


def retried(known: Known, desired: Files, published: Files) -> Known:
    """Without the NACKs of files that are gone, and of references to what came since."""
    kept = dict(known.nacks)
    for path, nack in known.nacks.items():
        if (file := desired.get(path)) is None:
            over = path not in published
        else:
            over = (file.kind in REFERENCE_KINDS and file.digest == nack.digest
                    and not named_things(file, published) <= nack.stood)
        if over:
            del kept[path]
    return known if kept == known.nacks else known._replace(nacks=kept)


def unjudged(known: Known, files: Files, step: str = "") -> list[str]:
    """The xDS files that Envoy did not judge yet; those that it shall have, before a step."""
    return [path for path, file in files.items() if path not in known.states
            and (file.kind in CHILD_KINDS if step == REFERENCES else file.kind)]


def awaited(known: Known, files: Files) -> list[str]:
    return [path for path in unjudged(known, files) if path not in known.unknown]


def with_needed(known: Known, desired: Files, published: Files) -> tuple[Known, Files]:
    """The desired files, and those without a source that an Envoy which starts would miss: other
    files name them; or Envoy is known to read them, and none named them: its bootstrap does."""
    gone = {path: file for path, file in published.items() if path not in desired}
    named = known.named.union(paths_in(published.values(), gone))
    if (named := named.intersection(gone)) != known.named:
        known = known._replace(named=named)
    read = {path: file for path, file in gone.items() if path not in known.named and (
        path in known.nacks or known.states.get(path) == NACKED
        or (path in known.acked and known.states.get(path) != UNREAD))}
    return known, with_named_files({**desired, **read}, published)


def to_retry(known: Known, files: Files) -> list[str]:
    """The published references that were NACKed for what is mended now: to be notified again."""
    return [path for path, file in files.items() if file.kind in REFERENCE_KINDS
            and known.states.get(path) == NACKED and path not in known.nacks]


def likely_cause(file: File, files: Files) -> str:
    """What a glance at a file shows; "" where it shows nothing."""
    text = file.content.strip()
    if not text:
        return "the file is empty"
    try:
        if text[:1] == b"{":
            parse_json(text)
    except ValueError as error:
        return f"not valid JSON: {why(error).partition(': ')[2]}"
    named = {place.partition(f"/{CURRENT}/")[2] for place in places_in(file.content)}
    missing = sorted(named - {""} - files.keys())
    return f"it names {shortened(missing)}, which is not published" if missing else ""


class Admin(threading.Thread):
    """Envoy's admin interface, in a thread: the main thread never waits for it. A connection that
    is kept tells when its process ends. `wake` gets "envoy" with what is found: SILENT and "" at a
    connection; for each `ask` MET and a Look, or SILENT or BLIND and why there is none; ABSENT and
    why when nothing listens or the process ended ("": nobody ever answered)."""

    def __init__(self, url: str, wake: Callable[[str, object], None]) -> None:
        super().__init__(name="admin", daemon=True)
        self.url, self._wake = url, wake
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def ask(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe: it is asked enough
            os.write(self._write, b"?")

    def run(self) -> None:
        # A process that dies accepts connections for a moment: one that nobody answers is of
        # another process only if there was none to be had before it.
        another, told, ended_at = False, False, -END_BOUND
        while True:
            try:
                kept = self._connect()
            except OSError as error:
                if not told:
                    self._wake("envoy", (ABSENT, f"{self.url}: {why(error)}"))
                another = told = True
            else:
                if another or not told:
                    self._wake("envoy", (SILENT, ""))
                with kept:
                    there = self._stay(kept) or another
                if there or not told:
                    news = f"{self.url}: the connection ended" if there else ""
                    self._wake("envoy", (ABSENT, news))
                another, told, ended_at = False, True, time.monotonic()
            time.sleep(PROBE_SOON if time.monotonic() < ended_at + END_BOUND else PROBE)

    def _connect(self) -> socket.socket:
        if not self.url.startswith("unix:"):
            parts = urllib.parse.urlsplit(self.url)
            place = (parts.hostname or "127.0.0.1", parts.port or 80)
            return socket.create_connection(place, ANSWER_BOUND)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(ANSWER_BOUND)
        try:
            sock.connect(self.url.removeprefix("unix:"))
        except OSError:
            sock.close()
            raise
        return sock

    def _stay(self, kept: socket.socket) -> bool:
        """Look at the process behind a connection until that ends; whether anything was found."""
        news: object
        there, end, self._live, poll = False, kept.fileno(), False, select.poll()
        poll.register(end, select.POLLIN)
        poll.register(self._read, select.POLLIN)
        self.ask()
        while end not in dict(poll.poll()):
            os.read(self._read, 4096)
            try:
                link, news = MET, self._look()
            except (OSError, LoaderError) as error:
                if isinstance(error, ConnectionError) and not there:
                    break
                link, news = SILENT if isinstance(error, OSError) else BLIND, why(error)
            if end in dict(poll.poll(0)):
                break  # its end is why, or the answer is that of another process
            self._wake("envoy", (link, news))
            there = True
        return there

    def _look(self) -> Look:
        if not self._live:
            state = re.search(r'"state": "([A-Z_]+)"', self._get("/server_info"))
            if state is None:
                raise LoaderError(NOT_ENVOY)
            self._live = state[1] == "LIVE"
            self._hidden = '"stats_matcher"' in self._get(STATS_MATCHER)
        counts, figures = parse_stats(self._get(STATS))
        if figures.get("server.hot_restart_epoch"):  # the kept connection may be its parent's
            raise LoaderError("it was restarted hot, and counts for its parent too: start it with "
                              "--disable-hot-restart")
        rejected = counts.get("listener_manager.lds", Counts()).failed
        details = self._get(LISTENER_ERRORS) if rejected else ""
        # Envoy's own words, cut where they would quote the content (or JSON escapes something).
        words = {each.strip(" :,(") for each in re.findall(r'"details": *"([^\[{"\\]+)', details)}
        return Look(counts, self._live, self._hidden,
                    figures.get("cluster_manager.warming_clusters", 0),
                    figures.get("server.dynamic_unknown_fields", 0),
                    "; ".join(sorted(words - {""}))[:REASON_LENGTH])

    def _get(self, path: str) -> str:
        """The body of an answer on a connection of its own, whole within ANSWER_BOUND."""
        where, deadline = path.partition("?")[0], time.monotonic() + ANSWER_BOUND
        connection = http.client.HTTPConnection("localhost")
        connection.sock = self._connect()
        connection.sock.settimeout(None)
        try:
            with contextlib.closing(connection), bounded(connection.sock, ANSWER_BOUND):
                connection.request("GET", path)
                response = connection.getresponse()
                status, body = response.status, response.read(ANSWER_BYTES + 1)
        except http.client.HTTPException as error:  # it speaks something else, or was cut off
            if isinstance(error, ConnectionError) and time.monotonic() < deadline:
                raise
            status, body = 0, b""
        if time.monotonic() >= deadline or len(body) > ANSWER_BYTES:
            raise TimeoutError(f"{where}: no end of the answer in time")
        if status != 200:
            raise LoaderError(f"{where}: HTTP {status}" if status else NOT_ENVOY)
        return body.decode("utf-8", "replace")


def parse_stats(text: str) -> tuple[dict[str, Counts], dict[str, int]]:
    """Of /stats, one `name: value` a line: the counts by scope, and the other figures by name."""
    counts, figures = dict[str, list[int]](), dict[str, int]()
    for scope, leaf, value in re.findall(r"(?m)^(.*)\.(\w+): ([0-9]{1,18})$", text):
        if leaf.startswith("update_"):
            counts.setdefault(scope, [0, 0])[leaf != "update_success"] += int(value)
        else:
            figures[f"{scope}.{leaf}"] = int(value)
    return {scope: Counts(*values) for scope, values in counts.items() if any(values)}, figures


# == Log, metrics, probes ========================================================================

LOG_LEVELS = ("debug", "info", "warning", "error")
LINE_BYTES = 4096  # PIPE_BUF: a pipe accepts so much whole or not at all, whoever else writes
STDERR_PATIENCE = 0.02  # seconds for a reader of stderr that is behind


class Log:
    """One line a record to stderr, written whole or not at all: where nobody reads stderr, lines
    are dropped and counted, and the loader goes on. (Not `logging`: it costs 6 ms of import.)"""

    def __init__(self, fd: int = 2) -> None:
        self._fd, self._lock, self._blocked = fd, threading.Lock(), False
        self.configure("text", "info")

    def configure(self, form: str, level: str) -> None:
        self._form, self._level = form, LOG_LEVELS.index(level)

    def _write(self, level: str, message: str, /, *args: object, **fields: object) -> None:
        if LOG_LEVELS.index(level) < self._level:
            return
        line = log_line(self._form, level, message % args if args else message, fields)
        with self._lock:
            patience = 0 if self._blocked else STDERR_PATIENCE
            try:
                self._blocked = not select.select([], [self._fd], [], patience)[1]
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
    """`2025-11-20T23:31:54.120Z INFO published version=ab12`, or JSON; cut where it is too long."""
    numbers = {name: value for name, value in fields.items()  # JSON has no NaN and no infinity
               if value is None or (isinstance(value, (int, float)) and value - value == 0)}
    when, most, line = timestamp(time.time()), LINE_BYTES, b""
    while not line or len(line) > LINE_BYTES:
        texts = {name: whole if len(whole := str(value)) <= most else f"{whole[:most]}..."
                 for name, value in {"message": message, **fields}.items()}
        if form == "json":
            text = json.dumps({"time": when, "level": level, **texts, **numbers})
        else:  # what comes from outside (names, reasons) cannot forge a field or a line
            said = texts.pop("message")
            said = said if said.isprintable() else json.dumps(said)
            pairs = [f"{name}={text}" if text.isprintable() and re.fullmatch('[^ "=]+', text)
                     else f"{name}={json.dumps(text)}" for name, text in texts.items()]
            text = " ".join([when, level.upper(), said, *pairs])
        line, most = f"{text}\n".encode("utf-8", "backslashreplace"), most // 2
    return line


def timestamp(now: float) -> str:
    """Unix time as RFC 3339 in UTC, to the millisecond."""
    seconds, millis = divmod(int(now * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{millis:03}Z"


log = Log()

METRICS = (  # name, type, labels, help
    ("xds_loader_info", "gauge", "version", "The loader that runs."),
    ("xds_loader_publications_total", "counter", "step", "Published snapshots by step."),
    ("xds_loader_published_files_total", "counter", "", "Files that changed in publications."),
    ("xds_loader_publication_duration_seconds", "histogram", "", "From an event to the file."),
    ("xds_loader_ack_duration_seconds", "histogram", "", "From a publication to Envoy's answer."),
    ("xds_loader_nacks_total", "counter", "type", "Files that Envoy rejected by type."),
    ("xds_loader_nacked_files", "gauge", "file", "1 while the wanted bytes are NACKed."),
    ("xds_loader_unknown_files", "gauge", "file", "1 while no ACK or NACK is known."),
    ("xds_loader_source_last_event_timestamp_seconds", "gauge", "source",
     "When a source last answered: an event, a bookmark or a list."),
    ("xds_loader_source_synced", "gauge", "source", "1 once the first list is complete."),
    ("xds_loader_watch_restarts_total", "counter", "source reason", "Watches resumed."),
    ("xds_loader_api_requests_total", "counter", "code verb", "API requests."),
    ("xds_loader_errors_total", "counter", "kind", "Errors by kind."),
    ("xds_loader_clusters", "gauge", "endpoints", "Clusters by where endpoints live."),
    ("xds_loader_inotify_instances_budget", "gauge", "", "Files that Envoy may subscribe to."),
    ("xds_loader_inotify_instances_used", "gauge", "", "Files that Envoy subscribes to."),
    ("xds_loader_snapshot_info", "gauge", "version", "The published snapshot."),
    ("xds_loader_snapshot_timestamp_seconds", "gauge", "", "When it was published."),
    ("process_resident_memory_bytes", "gauge", "", "Resident memory."),
    ("process_cpu_seconds_total", "counter", "", "User and system CPU time."),
    ("process_start_time_seconds", "gauge", "", "When the process started."),
)
# From the 0.5 ms of a good publication to the 10 s after which nobody waits.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
HISTOGRAM = {**{f'_bucket{{le="{bound}"}}': bound for bound in BUCKETS},
             '_bucket{le="+Inf"}': float("inf"), "_count": float("inf")}
LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[str, ...]


class Metrics:
    """The values of METRICS, set from any thread: by labels as declared, or by HISTOGRAM's rows."""

    def __init__(self, version: str) -> None:
        self._lock = threading.Lock()
        self._series: dict[str, dict[Any, float]] = {
            name: dict.fromkeys((*HISTOGRAM, "_sum"), 0.0) if kind == "histogram" else {}
            for name, kind, *_ in METRICS}
        self.add("xds_loader_published_files_total", by=0)  # rate() needs to see the 0
        self.set("xds_loader_info", 1, (version,))
        self.set("process_start_time_seconds", time.time())

    def add(self, name: str, labels: Labels = (), by: float = 1) -> None:
        with self._lock:
            series = self._series[name]
            series[labels] = series.get(labels, 0.0) + by

    def set(self, name: str, value: float, labels: Labels = ()) -> None:
        self._series[name][labels] = value

    def replace(self, name: str, series: Mapping[Labels, float]) -> None:
        """Set all series of a gauge: those that are gone from it are gone from the output."""
        self._series[name] = {**series}

    def observe(self, name: str, seconds: float) -> None:
        with self._lock:
            series = self._series[name]
            for row, bound in HISTOGRAM.items():
                series[row] += seconds <= bound
            series["_sum"] += seconds

    def render(self) -> str:
        """All of it in Prometheus' text format 0.0.4."""
        self.set("process_cpu_seconds_total", time.process_time())
        with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[1])
            self.set("process_resident_memory_bytes", pages * os.sysconf("SC_PAGE_SIZE"))
        with self._lock:
            held = {name: [*series.items()] for name, series in self._series.items()}
        lines = []
        for name, kind, labels, text in METRICS:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            for key, value in held[name]:
                pairs = (f'{label}="{its.translate(LABEL_ESCAPES)}"'
                         for label, its in zip(labels.split(), key, strict=True))
                suffix = "{" + ",".join(pairs) + "}" if labels else "".join(key)
                lines.append(f"{name}{suffix} {value:.15g}")
        return "\n".join(lines)


metrics = Metrics(__version__)

# Probes, metrics and the snapshot over HTTP. Whoever reaches the port needs no credentials, so
# everything is bounded: connections, their time, the size of a request, what rendering may cost. It
# shows names and figures: never the content of a file, nor Envoy's reasons, which quote it.
NOT_ACKED = (NACKED, UNKNOWN, UNREAD)
CONNECTIONS_MAX = 128  # beyond it the oldest is cut: a crowd makes room by those that dawdle
CONNECTION_TIME = 5.0  # seconds from accept to close, whatever the client does
HEAD_MAX = 8192  # bytes that are read of a request
REUSED = 20  # an answer is used for so many times as long as its rendering took: 5 % of a CPU


class Status(NamedTuple):  # what the loop shows: replaced as a whole, never changed in place
    files: Files  # of the snapshot
    version: str = ""  # of the published snapshot, "" while there is none
    published_at: float = 0.0  # Unix time
    states: Mapping[str, str] = {}  # acked, nacked, unknown or unread, of each of them
    # Files by state (but acked), sources that are waited for, and that show their last good state.
    named: Mapping[str, Sequence[str]] = dict.fromkeys((*NOT_ACKED, "missing", "stale"), ())
    started: bool = False  # Envoy has ACKed what it needs to serve
    turn_by: float = 0.0  # when the loop has turned again if it is well (monotonic)


def snapshot_text(status: Status) -> str:
    """/snapshot. Secrets have no size and no digest: with a digest one tests guesses at them."""
    rows = [{"path": path, "source": file.source, "state": status.states[path]} | (
                {} if holds_secret(file.content) else
                {"bytes": len(file.content), "sha256": file.digest})
            for path, file in sorted(status.files.items())]
    when = timestamp(status.published_at) if status.version else None
    head = {"version": status.version or None, "published_at": when}
    return json.dumps({**head, "files": rows, **status.named}, indent=1)


def listen_address(text: str) -> tuple[str, int]:
    """`:9000`, `127.0.0.1:9000`, `[::1]:9000` as host ("" is every address) and port."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\s:\[\]/]*)):([0-9]{1,5})", text)
    if not found or int(found[3]) > 65535:
        raise ValueError("is not a valid [ADDRESS]:PORT, such as :9000 or [::1]:9000")
    return found[1] or found[2], int(found[3])


class Listener:
    """The server of --listen, with a thread for each connection. The loop sets `status`."""

    def __init__(self, host: str, port: int) -> None:
        self.status, self._rendering = Status({}, turn_by=time.monotonic() + 120), threading.Lock()
        self._kept = {"/metrics": (0.0, ""), "/snapshot": (0.0, "")}  # good until, text
        both = not host and socket.has_dualstack_ipv6()  # every address, of IPv6 too
        family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, dualstack_ipv6=both)
        except (OSError, UnicodeError) as error:  # UnicodeError: a host that cannot be a name
            where, reason = f"{host or '*'} port {port}", why(error).partition(" (while")[0]
            raise LoaderError(f"--listen: cannot bind {where}: {reason}") from error
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        recent: deque[socket.socket] = deque()
        while True:
            try:
                client, _ = self._socket.accept()
                threading.Thread(target=self._talk, args=(client,), daemon=True).start()
                recent.append(client)
            except (OSError, RuntimeError):  # no descriptor, or no thread, is left: not to spin
                time.sleep(0.01)
            if len(recent) > CONNECTIONS_MAX:
                cut(recent.popleft())

    def _talk(self, client: socket.socket) -> None:
        end, head, block = time.monotonic() + CONNECTION_TIME, b"", b"-"
        with client, contextlib.suppress(OSError):
            while block and len(head) < HEAD_MAX and not re.search(rb"\n\r?\n", head):
                client.settimeout(max(end - time.monotonic(), 0))  # 0: for what is there already
                block = client.recv(HEAD_MAX - len(head))
                head += block
            asked = re.match(r"GET ([^\s?]+)(?:\?\S*)? HTTP/1\.", head.decode("latin-1"))
            path = asked[1] if asked else ""
            code, text = self.answer(path)
            body = f"{text}\n".encode("utf-8", "backslashreplace")
            form = "application/json" if path == "/snapshot" else METRICS_TYPE
            line = f"HTTP/1.0 {code} {http.client.responses[code]}\r\n"
            fields = f"Content-Type: {form}\r\nContent-Length: {len(body)}\r\n\r\n"
            client.settimeout(max(end - time.monotonic(), 0))
            client.sendall((line + fields).encode() + body)  # the timeout is one for all of it

    def answer(self, path: str) -> tuple[int, str]:
        status = self.status
        if path == "/healthz":  # 200 while the loop turns
            late = time.monotonic() - status.turn_by
            return (503, f"the loop is {late:.0f} s late") if late > 0 else (200, "ok")
        if path in ("/readyz", "/startz"):
            # Published; for /startz also ACKed. What else is wrong is named: Envoy stays in use.
            started = path == "/readyz" or status.started
            ready = f"ready, version {status.version}" if started else "not ACKed by Envoy yet"
            lines = [f"{what}: {name}" for what in ("missing", "stale", NACKED)
                     for name in status.named[what]]
            text = "\n".join([ready if status.version else "no snapshot yet", *lines])
            return 200 if status.version and started else 503, text
        if path not in self._kept:
            return (404, "not found") if path else (400, "not a GET of HTTP/1.1")
        with self._rendering:
            began, (until, text) = time.monotonic(), self._kept[path]
            if began >= until:
                text = snapshot_text(status) if path == "/snapshot" else metrics.render()
                now = time.monotonic()
                self._kept[path] = now + REUSED * (now - began), text
        return 200, text


# == The loop ====================================================================================
# One thread turns: news (an event, an answer of Envoy, a signal) -> compose -> plan -> publish ->
# ask Envoy. `Wakes` has the news, `Asking` what passes between us and Envoy, `Loop` the rest.

# Debounce, in seconds: an event of a quiet time is published at once. One within QUIET of the last
# publication may begin a burst: it is gathered until none comes for QUIET, for GATHER at most.
DEBOUNCE_QUIET, DEBOUNCE_GATHER = 0.004, 0.2
STEP_DELAY, STEP_DELAYS = 0.1, 10  # seconds between steps, and how many of these one waits at most
LOCK_POLL = 0.2  # seconds between two tries to be the only loader of a directory

# Nobody is there to ask; Envoy does not answer; answers; answers what cannot be understood.
ABSENT, SILENT, MET, BLIND = "absent", "silent", "met", "blind"


class Wakes:
    """The news for the main thread. At a signal the interpreter itself writes to the pipe
    (signal.set_wakeup_fd): a wait on a lock would miss one that comes just before it."""

    def __init__(self) -> None:
        self._news: deque[tuple[object, Any]] = deque()
        self._read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def put(self, what: object, news: object = None) -> None:
        """Add news, from any thread; where there is nothing to tell, when it came (monotonic)."""
        self._news.append((what, time.monotonic() if news is None else news))
        try:
            os.write(self.write, b"\0")
        except BlockingIOError:
            pass  # a full pipe wakes as well

    def wait(self, seconds: float) -> list[tuple[object, Any]]:
        """All news there are, after waiting up to so many seconds for the first."""
        until = time.monotonic() + seconds
        while not self._news and (left := until - time.monotonic()) > 0:
            if select.select([self._read], [], [], left)[0]:
                os.read(self._read, 4096)  # there may be more bytes than news
        return [self._news.popleft() for _ in range(len(self._news))]


class Asking:
    """What Envoy makes of the publications (`known`), and when the next step may follow them."""

    def __init__(self, output: Output, step_delay: float | None) -> None:
        self.known = Known()
        self.link = ABSENT
        self.until = 0.0  # the next publication waits for an answer until then; 0: it does not
        self.waits_since = 0.0  # of a step whose time has not come
        self.look_at = 0.0  # when Envoy is looked at again; 0: not before it is asked
        self.mixed: list[str] = []  # Envoy has to be notified of these once more
        self.notes: Mapping[str, str] = {}  # why it does not answer, or not of all files
        self.admin: Admin | None = None
        self._output, self._step_delay, self._look = output, step_delay, Look()
        self._moved_at = dict.fromkeys(WAITING_STEPS, time.monotonic())
        self._asked_at = 0.0  # about a publication or a new process; then ever more seldom
        self._moved: Sequence[str] = ()  # xDS files, by the publication that is asked about
        self._fields: Mapping[str, object] = {}  # of its line in the log
        self._silent_until = 0.0  # until then a silent Envoy is waited for; 0: it is not silent
        self._back_at = 0.0  # when this process was reached
        self.started = True  # Envoy has ACKed what it needs to serve, as far as it can be asked

    def start(self, url: str, wake: Callable[[str, object], None]) -> None:
        """Ask Envoy from now on; first for its counts of now, before anything moves."""
        self.admin, self.started = Admin(url, wake), False
        self.admin.start()
        if self._output.published:
            self.expect(ANSWER_BOUND)

    def opens_at(self, step: str) -> float:
        """When a step may be published (monotonic). References and removals wait until Envoy has
        judged what went out before and no cluster warms; for a pause, where it does not tell."""
        now = time.monotonic()
        if step not in WAITING_STEPS:
            return now
        since = self.waits_since = self.waits_since or now
        delay = STEP_DELAY if self._step_delay is None else self._step_delay
        pause = min(self._moved_at[step] + delay, since + STEP_DELAYS * delay)
        if self.link not in (MET, SILENT):
            return pause
        if self._look.warming and now < since + WARM_BOUND:
            return since + WARM_BOUND
        if unjudged(self.known, self._output.published, step):
            return max(pause, self._silent_until)
        return now if self._step_delay is None else pause

    def moved(self, before: Files, after: Files, again: Sequence[str]) -> None:
        known, now = self.known, time.monotonic()
        kinds = {after[path].kind for path in (*moved_paths(before, after), *again)
                 if known.states.get(path) != UNREAD}
        if kinds & CHILD_KINDS:
            self._moved_at[REFERENCES] = now
        if kinds - {""}:
            self._moved_at[REMOVALS] = now
        self.known = after_publication(known, before, after, again)

    def ask_about(self, moved: Iterable[str], fields: Mapping[str, object]) -> None:
        """Ask what became of a publication; its line in the log comes with the answer."""
        if self.link == MET or time.monotonic() < self._silent_until:
            files = self._output.published
            self.expect(ASK_BOUND[self.link == MET],
                         [path for path in moved if files[path].kind], fields)
            self.look_at = self._asked_at
        else:
            log.info("published", **fields, **({"ack": "unknown"} if self.admin else {}))

    def expect(self, bound: float, moved: Sequence[str] = (),
                fields: Mapping[str, object] = {}) -> None:
        """The next publication waits for an answer, so many seconds at most."""
        self._asked_at, self._moved, self._fields = time.monotonic(), moved, fields
        self.until = self._asked_at + bound

    def turn(self) -> None:
        """Look at Envoy if it is time; go on without its answer if it is late."""
        now = time.monotonic()
        if self.look_at and now >= self.look_at:
            self.look_at = 0.0
            if self.admin:
                self.admin.ask()
        if not self.until or now < self.until:
            return
        late = set(self._moved).intersection(awaited(self.known, self._output.published))
        if late and self.link == MET:  # nobody waits for them again
            self.known = self.known._replace(unknown=self.known.unknown | late)
            log.warning("Envoy did not read %s in time: does a bootstrap, listener or cluster "
                        "name this path?", shortened(sorted(late)))
        self.end()

    def end(self) -> None:
        """Envoy told all, or nobody waits any more: the publication's line in the log."""
        fields, self._fields, self.until = self._fields, {}, 0.0
        if not fields:
            return
        took, states = time.monotonic() - self._asked_at, self.known.states
        found = {states.get(path, UNKNOWN) for path in self._moved}
        ack = "no" if NACKED in found else "yes" if found - {UNREAD} == {ACKED} else "unknown"
        if ack != "unknown":
            metrics.observe("xds_loader_ack_duration_seconds", took)
        unread = [path for path in self._moved if states.get(path) == UNREAD]
        log.info("published", **fields, ack=ack, ack_ms=round(took * 1000, 1),
                 **({"unread": shortened(unread)} if unread else {}))

    def found(self, link: str, news: Any) -> None:
        now, before, self.link = time.monotonic(), self.link, link
        self.started = link == BLIND or (self.started and not {before, link} & {ABSENT, BLIND})
        self._back_at = now if before == ABSENT else self._back_at
        self._silent_until = (self._silent_until or now + SILENT_BOUND) if link == SILENT else 0.0
        if link == MET:
            self.look_at = 0.0
            if before != MET and not self.until:
                self.expect(ANSWER_BOUND)
            self._take_look(news, now)
        elif link == SILENT and news:
            self.notes = {"Envoy answers": f"Envoy does not answer: {news}"}
            self.look_at = now + LOOK_LAST
        elif link != SILENT:
            reason = news or "nobody answers at --envoy-admin"
            self.notes = {"Envoy answers": f"Envoy is not asked: {reason}"}
            self.look_at = now + ANSWER_BOUND if link == BLIND else 0.0
            if link == BLIND:
                self.known = after_meeting(self.known)
            elif news and before in (MET, SILENT):
                soon = not self._look.hidden and now - self._back_at <= END_BOUND
                self.known, blamed = after_end(self.known, self._output.published, soon=soon)
                self._tell_nacks(blamed)
            self.end()

    def _take_look(self, look: Look, now: float) -> None:
        files, ignored = self._output.published, look.unknown_fields - self._look.unknown_fields
        if ignored > 0 and self.until and self._moved:
            log.warning("Envoy ignored %d unknown fields in %s: a typing error?", ignored,
                        shortened(self._moved))
        self._look = look
        self.known, told = after_look(self.known, files, look)
        nacked = [path for path in told if told[path] == NACKED]
        self._tell_nacks(nacked)
        self.mixed += [path for path in told if told[path] == MIXED]
        states, hidden = self.known.states, sorted(self.known.unknown) if look.hidden else []
        waiting = bool(awaited(self.known, files)) or not look.live
        self.notes = {"Envoy keeps all counters": f"what Envoy makes of {shortened(hidden)} stays "
                      "unknown: its stats_matcher leaves the counters out"} if hidden else {}
        self.started = self.started or (look.live and bool(files) and all(
            states.get(path) in (ACKED, UNREAD) or path in hidden
            for path, file in files.items() if file.kind in ("cds", "lds", "rds")))
        if nacked or not waiting:
            self.end()  # a rollback does not wait for the other files
        if not look.live or unjudged(self.known, files) or look.warming or not self.started:
            # (A look costs Envoy's main thread 1 ms, with 1,000 clusters 41 ms.)
            soon = self.until or self.waits_since
            longest = LOOK_LAST if soon else LOOK_IDLE if self.started else 1.0
            self.look_at = now + min(max((now - self._asked_at) / 2, LOOK_FIRST), longest)

    def _tell_nacks(self, paths: Iterable[str]) -> None:
        """One line and one count for each file that Envoy rejected."""
        files = self._output.published
        for path in sorted(paths):
            back = path in self.known.acked and not same_file(self.known.acked[path], files[path])
            metrics.add("xds_loader_nacks_total", (files[path].kind,))
            log.error("Envoy NACKed %s (%s): %s; %s", path, files[path].kind,
                      self.known.nacks[path].reason,
                      "rolled back to its last ACKed bytes" if back else "it stays, for there are "
                      "no other ACKed bytes", source=files[path].source)


class Loop:
    """The main thread: waits, composes, plans, publishes, and takes in what Envoy made of it."""

    def __init__(self, options: Options, config: Config) -> None:
        self.options, self._once = options, options.mode == "once"
        self._deadline = time.monotonic() + options.timeout  # of a one-time run
        self.wakes = Wakes()
        self.sources = Sources(options, config, self.wakes.put)
        self.output = Output(options.output_dir)
        self.asking = Asking(self.output, options.step_delay)
        self.check_command = CheckCommand(options.check_cmd, self.output, self.wakes.put)
        self.stopping = False
        self._listener: Listener | None = None
        self._wanted: Wanted | None = None  # None: to be composed
        self._remembered = Known()  # what a restart is told
        self._noted: dict[str, tuple[Mapping[str, object], dict[str, set[str]]]] = {}  # by topic
        self._event_at = time.monotonic()  # of the first event that is not composed
        self._published_at = 0.0  # monotonic; 0: nothing yet
        self._step_at = 0.0  # when the step that waits may be published; 0: none waits
        self._check_at = 0.0  # when the files on disk are checked; 0: they are not ours yet
        self._backoff = 0.0  # seconds: the disk failed, nothing is tried before that check; 0: no
        # A defect in a thread must end the process: a deaf sidecar looks like a quiet one.
        threading.excepthook = lambda failed: self.wakes.put("defect", failed.exc_value)

    def run(self) -> int:
        """Until SIGTERM or SIGINT; with --onetime until there is nothing left to publish."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self.wakes.put)  # it interrupts nothing: it is news like all else
        signal.set_wakeup_fd(self.wakes.write, warn_on_full_buffer=False)
        if self.options.listen:
            self._listener = Listener(*self.options.listen)
        try:
            while not self.stopping:
                self._turn()
                self._report()
                check, step_at = self.check_command, self.asking.until or self._step_at
                if self._once and not (step_at or check.running):
                    return 1 if check.refusal else 0
                self._await(min(filter(None, (step_at, self.asking.look_at, self._check_at))))
        finally:
            self.check_command.stop()
            self.asking.end()
        return 0

    def _await(self, until: float) -> None:
        """Sleep until something happens, and take in all that did; of a burst, the rest too."""
        news = self.wakes.wait(until - time.monotonic())
        burst = self._published_at + DEBOUNCE_QUIET
        gathers = any(what == "objects" and at < burst for what, at in news)
        end = time.monotonic() + (DEBOUNCE_GATHER if gathers else 0.0)
        while news:
            for what, about in news:
                match what:
                    case "defect":
                        raise about
                    case "objects" if self._wanted is not None:
                        self._wanted, self._event_at = None, about
                    case signal.SIGTERM | signal.SIGINT:
                        if self._once:
                            raise LoaderError("ended by a signal before everything was published")
                        self.stopping = True
                    case signal.SIGHUP:
                        log.info("SIGHUP: checking and publishing now")
                        self.sources.refresh()
                        self._check_at = min(self._check_at, time.monotonic())
                    case "checked":
                        self.check_command.end(about)
                    case "envoy":
                        self.asking.found(*about)
            news = self.wakes.wait(DEBOUNCE_QUIET) if time.monotonic() < end else []

    def _turn(self) -> None:
        """What is due now, and the next snapshots on the way to what is wanted."""
        asking, output, now = self.asking, self.output, time.monotonic()
        asking.turn()
        self.note("envoy", asking.notes)
        self._step_at = 0.0
        if self._backoff and now < self._check_at:
            return
        try:
            if not self._check_at and not self._open():
                return
            if self._backoff:
                output.recover()
            if now >= self._check_at:
                self._check_at = now + self.options.sync_interval
                if repaired := output.check() if output.snapshot else []:
                    metrics.add("xds_loader_errors_total", ("damage",))
                    log.warning("repaired on disk: %s", shortened(repaired))
                    again = [path for path in repaired if path in output.published]
                    asking.moved(output.published, output.published, again)
                    asking.look_at = time.monotonic()
                    if asking.link == MET and not asking.until:
                        asking.expect(ASK_BOUND[True], again)
            if asking.mixed:
                output.publish(output.published, asking.mixed)
                asking.mixed = []
            more = True
            while more:
                if asking.known is not self._remembered:
                    output.keep_acked(asking.known.acked, output.published)
                    output.remember(state_of(asking.known))
                    self._remembered = asking.known
                more = not asking.until and self._advance()
            self._backoff = 0.0
            self.note("disk", [])
        except OSError as error:
            trouble = (f"cannot publish to {output.root}: {why(error)}; it must be a volume with "
                       "room, writable for init container, loader and Envoy as one user")
            if self._once or not self._check_at:
                raise LoaderError(trouble) from error
            metrics.add("xds_loader_errors_total", ("disk",))
            self.note("disk", {f"cannot publish to {output.root}": trouble})
            self._backoff = min(2 * self._backoff or BACKOFF_FIRST, BACKOFF_LAST)
            self._check_at = time.monotonic() + self._backoff

    def _open(self) -> bool:
        """Take the directory as it is, and start everything that brings news; False for as long as
        the directory is another loader's."""
        other = f"another loader works in {self.output.root}: give each its own --output-dir"
        if not self.output.lock():
            if self._once and time.monotonic() >= self._deadline:
                raise LoaderError(other)
            self.note("lock", [f"{other}; waiting for its end"])
            self._step_at = time.monotonic() + LOCK_POLL
            return False
        self.note("lock", [])
        self.output.recover()
        self.asking.known = self._remembered = known_from(self.output)
        self.sources.start(self.output.published)
        if self.options.envoy_admin:
            self.asking.start(self.options.envoy_admin, self.wakes.put)
        self._check_at = time.monotonic() + self.options.sync_interval
        return True

    def _advance(self) -> bool:
        """Publish the next snapshot if its time has come; whether there may be another one."""
        asking, output, published = self.asking, self.output, self.output.published
        back, _ = allowed(published, published, asking.known.acked, asking.known.nacks)
        if not same_files(back, published):
            self._publish(Step(back, ROLLBACK))
            return True
        sources = self.composed()
        if sources.missing or sources.unknown:
            return False
        files, kept = sources.files, list[str]()
        if files.keys() != published.keys() or asking.known.named:
            asking.known, files = with_needed(asking.known, files, published)
            files, kept = output.fitting(files)
            kept += [f"{path}: its source is gone; its last bytes stay, for Envoy or another file "
                     f"needs it" for path in files if path not in sources.files]
        self.note("files", kept + [
            f"{output.root}/{CURRENT}/{path} is a foreign file: it is left alone"
            for path in output.foreign if path not in files])
        if (wanted := self.check_command.passed(files)) is None:
            return False
        asking.known = retried(asking.known, wanted, published)
        desired, notes = allowed(wanted, published, asking.known.acked, asking.known.nacks)
        self.note("nacked", notes)
        step = next_step(published, desired) if output.snapshot else Step(desired, INITIAL)
        again = to_retry(asking.known, published) if step is None else []
        if again:
            step = Step(published, REFERENCES)
        if step is None:
            asking.waits_since = 0.0
            if not (self._published_at or self._once) and same_files(published, wanted):
                self._published_at = time.monotonic()
                log.info("up to date", version=output.snapshot[2:])
            return False
        if (opens_at := asking.opens_at(step.name)) > time.monotonic():
            self._step_at = opens_at
            return False
        self._publish(step, again)
        return True

    def composed(self) -> Wanted:
        """What the sources ask for now. A one-time run waits until that is complete; LoaderError
        where it will not be."""
        options, patient = self.options, not self._once or self.options.timeout > 0
        deadline = self._deadline if patient else time.monotonic() + ONE_TRY_SECONDS
        while True:
            if self._wanted is None:
                self._wanted = self.sources.compose(self.output.published)
            wanted, trouble = self._wanted, self.sources.trouble()
            self.note("sources", wanted.notes)
            if patient:  # else these are errors
                self.note("missing", [f"waiting for {source}: it does not exist"
                                      for source in wanted.missing])
                self.note("trouble", trouble)
            if not (self._once and (wanted.missing or wanted.unknown)):
                return wanted
            lasting = wanted.missing or any(it.status not in PASSING for it in trouble.values())
            # A first answer may be slow: each request has bounds of its own.
            until = deadline if patient or trouble else time.monotonic() + 60.0
            if (lasting and not patient) or time.monotonic() >= until:
                raise LoaderError(unfinished(wanted, trouble, options))
            self._await(until)

    def _publish(self, step: Step, again: Sequence[str] = ()) -> None:
        """Publish one snapshot, have Envoy asked about it, then tidy up."""
        before, files = self.output.published, step.files
        if step.name in WAITING_STEPS:
            self.asking.waits_since = 0.0
        try:
            if self.asking.known.acked:
                self.output.keep_acked(self.asking.known.acked, files)
            paths = self.output.publish(files, again)
        finally:  # whatever failed, Envoy may have read what was switched to
            if self.output.published is not before or again:
                self.asking.moved(before, files, again)
        self._published_at = time.monotonic()
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
        self.output.prune()

    def note(self, topic: str, notes: Iterable[str] | Mapping[str, object]) -> None:
        """Warn once of each thing for as long as it lasts; a line when it is over. A mapping has
        what is wrong by its subject: as long as that lasts, only another text is news."""
        texts = notes if isinstance(notes, dict) else {note: note for note in notes}
        shown, before = self._noted.get(topic, ({}, {}))
        if texts == shown:
            return
        said = {subject: {re.sub("[0-9]{4,}", "...", str(text)), *before.get(subject, ())}
                for subject, text in texts.items()}  # another port in an error is no news
        for subject in sorted(said):
            if said[subject] != before.get(subject):
                log.warning("%s", texts[subject])
        for subject in sorted(before.keys() - said.keys()):
            log.info("warning over: %s", subject.partition(": ")[0])
        self._noted[topic] = texts, said

    def _report(self) -> None:
        """Put what is known now before whoever asks over HTTP."""
        if self._listener is None:
            return
        wanted, known = self._wanted or Wanted({}, [], [], [], []), self.asking.known
        files, version = self.output.published, self.output.snapshot[2:]
        states = {path: known.states.get(path, UNKNOWN) if file.kind else UNREAD
                  for path, file in files.items()}
        states |= {path: NACKED for path, nack in known.nacks.items()
                   if is_nacked(files.get(path), nack)
                   or is_nacked(wanted.files.get(path), nack, known.acked.get(path))}
        named = {state: sorted(path for path, its in states.items() if its == state)
                 for state in NOT_ACKED}
        named["missing"] = wanted.missing + wanted.unknown
        named["stale"] = [*wanted.stale, *self.sources.trouble()] if files else []
        self._listener.status = Status(
            files, version, self.output.switched_at, states, named, self.asking.started,
            turn_by=time.monotonic() + 2 * self.options.sync_interval + 60.0)
        unknown = named[UNKNOWN] if self.asking.admin else []
        metrics.replace("xds_loader_unknown_files", {(path,): 1.0 for path in unknown})
        metrics.replace("xds_loader_nacked_files", {(path,): 1.0 for path in named[NACKED]})
        metrics.replace("xds_loader_snapshot_info", {(version,): 1.0} if files else {})
        metrics.replace("xds_loader_snapshot_timestamp_seconds",
                        {(): self.output.switched_at} if version else {})
        metrics.set("xds_loader_inotify_instances_used",
                    len([path for path, file in files.items() if file.kind]))


def unfinished(wanted: Wanted, trouble: Mapping[str, ApiError], options: Options) -> str:
    if wanted.missing:
        hint = ("--from-file must hold it, in this namespace" if options.from_file else
                "create it, or wait for it with --timeout")
        return f"{', '.join(wanted.missing)}: does not exist or is not usable; {hint}"
    reason = next(iter(trouble.values()), f"no answer in time for {', '.join(wanted.unknown)}")
    if options.apiserver == NO_POD and not options.from_file:
        return f"{reason}; outside a pod: `kubectl proxy` and --apiserver http://127.0.0.1:8001"
    return str(reason)


def state_of(known: Known) -> dict[str, Json]:
    """What is remembered of Envoy. No digest of a secret: one could test guesses at it."""
    return {
        "acked": {p: file.digest for p, file in known.acked.items() if file.kind != "sds"},
        "nacked": {path: [*nack[:3], sorted(nack.stood)] for path, nack in known.nacks.items()
                   if nack.kind != "sds"},
    }


def known_from(output: Output) -> Known:
    """What the process before knew; entries that are not as we write them are left out."""
    nacks = {}
    for path, row in json_object(output.state.get("nacked")).items():
        match row:
            case [str(digest), str(kind), str(reason), list(stood)]:
                nacks[path] = Nack(digest, kind, reason, frozenset(map(str, stood)))
    digests = json_object(output.state.get("acked"))  # none of a secret: what is kept of it tells
    acked = {p: file for p, file in output.published.items() if file.digest == digests.get(p)}
    acked |= {p: file for p, file in output.kept.items()
              if file.digest == digests.get(p, file.digest)}
    return Known(acked=acked, nacks=nacks, came=things(output.published))


# == Preview and check ===========================================================================

CHECK_SECONDS = 30.0  # what --check-cmd may take
CHECK_OUTPUT = 1 << 16  # bytes kept of what it prints


def run_check(command: Sequence[str], directory: str, stop: threading.Event) -> str:
    """Run --check-cmd on a directory: "" if it accepts it, else why not. No process is left."""
    import subprocess
    words = [part.replace("{dir}", directory) for part in command]
    until, printed, ended = time.monotonic() + CHECK_SECONDS, b"", None
    try:
        with subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                bufsize=0, umask=0o022, start_new_session=True) as process:
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            try:
                while not ended and time.monotonic() < until and not stop.wait(0.01):
                    # Not reaped yet, so that the group cannot be another's when it is killed.
                    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                    block = process.stdout.read(CHECK_OUTPUT) or b""  # a full pipe would block it
                    if not holds_secret(printed):  # else what comes may belong to it
                        printed = printed[-CHECK_OUTPUT:] + block
            finally:  # SIGTERM raises in a preview
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        return f"--check-cmd cannot be run: {why(error)}"
    if not ended:
        late = f"took more than {CHECK_SECONDS:.0f} s"
        return f"--check-cmd {'was ended by a signal' if stop.is_set() else late}"
    text = "[redacted]" if holds_secret(printed) else printed.decode("utf-8", "replace").strip()
    last = (text.splitlines() or ["no output"])[-1][:300]
    return (f"--check-cmd {command[0]} rejects the files (exit {process.returncode}): {last}"
            if process.returncode else "")


class CheckCommand:
    """--check-cmd, which runs beside the loop, once for each version."""

    def __init__(self, command: Sequence[str] | None, output: Output,
                 wake: Callable[[str, object], None]) -> None:
        self.running: threading.Thread | None = None
        self.refusal = self._version = ""  # of what was checked last
        self._accepted: Files = {}
        self._command, self._output, self._wake = command or (), output, wake
        self._stop = threading.Event()

    def passed(self, desired: Files) -> Files | None:
        """All, or what it accepted last with endpoints and secrets of now; else None."""
        if not self._command:
            return desired
        base = self._accepted = self._accepted or self._output.published
        fresh = {path: file for path, file in desired.items()
                 if path in base and file.kind in ("eds", "sds")}
        # Endpoints and secrets are not judged: their changes must not start it again and again.
        version = version_of({**desired, **{path: base[path] for path in fresh}})
        known = version == self._version and not self.running
        if same_files({**base, **fresh}, desired) or (known and not self.refusal):
            self._accepted = desired
            return desired
        if known:
            self._output.prune()  # what was staged for it
        elif not self.running:
            self._output.staged = self._output.stage(desired)
            self.refusal, self._version = "", version
            self.running = threading.Thread(target=self._run, daemon=True)
            self.running.start()
        return {**base, **fresh} if base else None

    def _run(self) -> None:
        place = f"{self._output.root}/{self._output.staged}"
        self._wake("checked", run_check(self._command, place, self._stop))

    def end(self, refusal: str) -> None:
        version, self._output.staged = self._output.staged[2:], ""
        self.running, self.refusal = None, refusal
        if refusal:
            metrics.add("xds_loader_errors_total", ("check",))
            log.error("%s; the last snapshot stays published", refusal, version=version)

    def stop(self) -> None:
        """No command outlives the loader."""
        self._stop.set()
        if self.running:
            self.running.join(0.5)  # seconds


def preview(options: Options, config: Config) -> int:
    """--dry-run: print the files, or with --diff what would change; touch nothing."""
    # To process 1 of a container the kernel sends only signals that have a handler.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    loop = Loop(options, config)
    published = loop.output.published = loop.output.peek()
    loop.sources.start(published)
    files, shown = loop.composed().files, list[str]()
    for path, file in sorted(files.items()):
        try:
            if path.endswith(".json"):
                parse_json(file.content)
        except ValueError as error:
            log.warning("%s of %s is not valid JSON (%s)", path, file.source, why(error))
        if not options.diff:  # key material is not shown
            text = redacted(file.content).decode("utf-8", "backslashreplace").removesuffix("\n")
            shown.append(f"\n==> {path} ({file.source}, {len(file.content)} bytes) <==\n{text}\n")
    if options.diff:
        if not published:
            log.warning("%s: nothing is published there, so every file is new", loop.output.root)
        shown = [difference(path, published.get(path), files.get(path))
                 for path in sorted({*files, *published})]
    if any(shown) or not options.diff:
        print_out("".join([f"snapshot {version_of(files)}\n", *shown]))
    if options.check_cmd:
        import tempfile  # for a copy that nobody else can read (0700), and that goes again
        with tempfile.TemporaryDirectory(prefix="xds-loader-") as directory:
            for path, file in files.items():
                os.makedirs(os.path.dirname(f"{directory}/{path}"), exist_ok=True)
                write_file(f"{directory}/{path}", file.content, file.mode)
            if problem := run_check(options.check_cmd, directory, threading.Event()):
                raise LoaderError(problem)
    return 0


def difference(path: str, old: File | None, new: File | None) -> str:
    """A unified diff of one file against what is published; empty if it is the same."""
    import difflib
    before = redacted(old.content) if old else b""
    after = redacted(new.content, old.content if old else None) if new else b""
    a, b = (text.decode("utf-8", "backslashreplace").splitlines(True) for text in (before, after))
    names = f"a/{path}" if old else "/dev/null", f"b/{path}" if new else "/dev/null"
    rows = difflib.unified_diff(a, b, *names)
    missing = "\n\\ No newline at end of file\n"
    return "".join(row if row.endswith("\n") else row + missing for row in rows)


def print_out(text: str) -> None:
    """To standard output, as far as anybody reads."""
    try:
        sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# == The command line ============================================================================

def matching(pattern: str, what: str, value: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """A parser of an option: it takes a text, or raises ValueError with what is wrong with it."""
    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"is not {what}")
        return value(text)
    return parse


NAMESPACE = rf"(?=.{{1,63}}\Z){NAME_PART}"
namespace_name = matching(NAMESPACE, "a namespace (at most 63 lower case letters, digits, '-')")
any_namespace = matching(rf"\*|{NAMESPACE}", "'*' or a namespace (lower case letters, digits, '-')")
object_name = matching(OBJECT_NAME, "a valid Kubernetes name (lower case letters, digits, '-')")
go_bool = matching("1|t|T|true|TRUE|True|0|f|F|false|FALSE|False", "true or false",
                   lambda text: text[0] in "1tT")
file_mode = matching("(0o)?0?[4-7][0-7]{2}", "a file mode with which the owner reads, like 0600",
                     lambda text: int(text.removeprefix("0o"), 8))
socket_path = matching(r"unix:/[ -~]{0,106}", "unix:/ and an absolute path of at most 107 bytes")
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


def named_secret(text: str, kind: str = SECRETS, directory: str = "sds") -> Source:
    """`[NS/]NAME`; the namespace is filled in later where it is empty."""
    namespace, slash, name = text.rpartition("/")
    return Query(kind, namespace_name(namespace) if slash else "", object_name(name)), directory


def named_configmap(text: str) -> Source:
    name, colon, directory = text.partition(":")
    for part in directory.split("/") if colon else ():
        if not KEY_NAME.fullmatch(part):
            raise ValueError(f"names a directory of which {part!r} is not a valid file name")
    return named_secret(name, CONFIGMAPS, directory)


def label_selector(text: str) -> str:
    """A selector that can be read; "" for `*`, which is all."""
    text = "" if text.strip() == "*" else text
    label_predicate(text)
    return text


def http_url(text: str, schemes: Sequence[str] = ("https", "http")) -> str:
    with contextlib.suppress(ValueError):
        url = urllib.parse.urlsplit(text)
        host = re.fullmatch(r"(?:[^.\s]{1,63}\.)*[^.\s]{1,63}\.?", url.hostname or "")
        plain = re.fullmatch("[!-~]+", text) and not (url.query or url.fragment)
        if host and plain and url.scheme in schemes and url.port != 0 and url.username is None:
            return text
    raise ValueError(f"is not a valid URL with {' or '.join(schemes)}")


def admin_url(text: str) -> str:
    return socket_path(text) if text.startswith("unix:") else http_url(text, ["http"])


def shell_words(text: str) -> tuple[str, ...]:
    import shlex
    if words := tuple(shlex.split(text)):
        return words
    raise ValueError("is empty")


class Option(NamedTuple):  # the same table makes the parser, the variables, --help and docs
    name: str
    parse: Callable[[str], Any]
    metavar: str  # "" of a switch; `a|b` where these are all values
    help: str
    default: str = ""
    repeats: bool = False


NO_POD = "https://kubernetes"  # the API server where the environment names none
SECTIONS = {
    "What to load": (
        Option("configmap", named_configmap, "[NS/]NAME[:DIR]",
               "a ConfigMap: each key is a file (in DIR), its value the content", repeats=True),
        Option("configmap-selector", label_selector, "SEL", "ConfigMaps by label selector"),
        Option("services", label_selector, "SEL",
               "clusters, endpoints and routes of Services by label selector ('*' or '': all)"),
        Option("services-namespace", any_namespace, "NS",
               "where these Services are, if not in --namespace; '*' for all", repeats=True),
        Option("secret", named_secret, "[NS/]NAME", "a TLS Secret as SDS files", repeats=True),
        Option("namespace", namespace_name, "NS",
               "of names without one; else $NS, $POD_NAMESPACE, the service account's", "default"),
    ),
    "From where": (
        Option("apiserver", http_url, "URL", "the API server, if not the pod's own", NO_POD),
        Option("token-file", str, "FILE", "bearer token, may rotate", f"{SERVICE_ACCOUNT}/token"),
        Option("ca-file", str, "FILE", "CA of the API server", f"{SERVICE_ACCOUNT}/ca.crt"),
        Option("client-cert", str, "FILE", "client certificate for the API server"),
        Option("client-key", str, "FILE", "its private key"),
        Option("insecure", go_bool, "", "do not verify the API server's certificate"),
        Option("from-file", str, "PATH", "objects from `kubectl get -o json` instead ('-': stdin)"),
    ),
    "How Services are rendered": (
        Option("config", str, "PATH", "JSON: how Services become clusters and routes"),
        Option("endpoints", str, "auto|eds|inline|dns", "where endpoints live", "auto"),
        Option("format", str, "yaml|json", "of rendered files", "yaml"),
    ),
    "Where to, and when": (
        Option("output-dir", str, "DIR", "where the files are published", "/srv/runtime"),
        Option("onetime", go_bool, "", "publish one snapshot and exit (init container)"),
        Option("watch", go_bool, "", "watch for changes instead of polling"),
        Option("sync-interval", go_duration, "D", "between polls, and checks of the disk", "1m0s"),
        Option("timeout", go_duration, "D", "how long --onetime waits for its sources", "0s"),
        Option("dry-run", go_bool, "", "print the files and touch nothing; implies --onetime"),
        Option("diff", go_bool, "", "with --dry-run: a diff against what is published"),
        Option("secret-mode", file_mode, "MODE", "of files that hold private keys", "0600"),
    ),
    "ACK and NACK": (
        Option("envoy-admin", admin_url, "URL",
               "ask Envoy what became of every publication: http://127.0.0.1:9901 or unix:/path"),
        Option("step-delay", go_duration, "D",
               "pause between ordered steps; 100ms where Envoy is not asked, else none"),
        Option("check-cmd", shell_words, "CMD", "run on what is staged ('{dir}'), 30 s at most; "
               "if it fails, only endpoints and secrets go on"),
    ),
    "Log, metrics, probes": (
        Option("listen", listen_address, "[ADDR]:PORT", "serve probes, /metrics and /snapshot"),
        Option("log-format", str, "text|json", "of standard error", "text"),
        Option("log-level", str, "|".join(LOG_LEVELS), "the least that is logged", "info"),
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
SPELLED = {f"{dash}{option.name}": option for option in OPTIONS for dash in ("-", "--")}
SPELLED["-h"] = SPELLED["--help"]
VARIABLES = {  # the later ones win
    "POD_NAMESPACE": SPELLED["--namespace"], "NS": SPELLED["--namespace"],
    **{f"XDS_LOADER_{option.name.replace('-', '_').upper()}": option for option in OPTIONS}}
# A Service named `xds-loader` puts these into the environment of every pod of its namespace.
SERVICE_LINK = r"XDS_LOADER_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\w+)?)"
# The value of each option by its name (with `_`), checked; and what follows from them and the
# environment: `mode` ("once", "watch" or "poll"), `node_name`, `unknown_variables`.
Options = types.SimpleNamespace
Given = dict[str, tuple[str, list[str]]]  # by option: where it is said, and its values as texts


def given_in_words(argv: Sequence[str]) -> Given:
    """As Go's flags: one dash or two; `-x=v` and `-x v`; a switch takes a value only after `=`."""
    given, rest = Given(), deque(argv)
    while rest:
        name, equals, value = rest.popleft().partition("=")
        if not (option := SPELLED.get(name)):
            raise UsageError(f"unknown option {name[:100]!r}; see --help")
        if option.metavar and not (equals or rest):
            raise UsageError(f"{name} needs a value: {option.metavar}")
        if not equals:
            value = rest.popleft() if option.metavar else "true"
        given.setdefault(option.name, (f"--{option.name}", []))[1].append(value)
    return given


def given_in_environment(environ: Mapping[str, str]) -> Given:
    """What an option's own variable says, else what Kubernetes gives a pod."""
    given, place = Given(), f"{SERVICE_ACCOUNT}/namespace"
    with contextlib.suppress(OSError, ValueError), open(place, "rb") as stream:
        given["namespace"] = place, [namespace_name(stream.read(1000).decode().strip())]
    if host := environ.get("KUBERNETES_SERVICE_HOST"):
        port = environ.get("KUBERNETES_SERVICE_PORT") or "443"
        url = f"https://{f'[{host}]' if ':' in host else host}:{port}"
        given["apiserver"] = "$KUBERNETES_SERVICE_HOST and ..._PORT", [url]
    for variable, option in VARIABLES.items():
        if (text := environ.get(variable)) and option.name not in ("help", "version"):
            given[option.name] = variable, text.split() if option.repeats else [text]
    return given


def option_value(option: Option, given: Given) -> Any:
    """What is given, else the default; None where there is none."""
    where, texts = given.get(option.name, ("", [option.default] if option.default else []))
    values = []
    for text in texts:
        try:
            if "|" in option.metavar and text not in option.metavar.split("|"):
                raise ValueError(f"is not one of {option.metavar}")
            values.append(option.parse(text))
        except (ValueError, UsageError) as error:
            shown = re.sub("//[^/@]*@", "//...@", text[:200])  # a password is not logged
            raise UsageError(f"{where} {shown!r}: {error}") from None
    if option.repeats:
        return tuple(dict.fromkeys(values))
    return values[-1] if values else None


def options_from(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """The options, or UsageError in one line. Reads nothing but the namespace's file."""
    given = {**given_in_environment(environ), **given_in_words(argv)}
    if option_value(SPELLED["--from-file"], given):
        given.pop("apiserver", None)  # it is not asked, whatever the pod's variables say
    options = Options(**{option.name.replace("-", "_"): option_value(option, given)
                         for option in OPTIONS})
    services, once = options.services is not None, options.onetime or options.dry_run
    for holds, text in (
        (options.configmap or options.secret or services or options.configmap_selector is not None,
         "nothing to load: give --configmap NAME, --configmap-selector, --services or --secret"),
        (options.dry_run or not options.diff, "--diff needs --dry-run"),
        (once or options.from_file != "-", "--from-file - needs --onetime"),
        (options.from_file or bool(options.client_cert) == bool(options.client_key),
         "--client-cert and --client-key belong together"),
        (services or not options.services_namespace, "--services-namespace needs --services"),
        (services or not options.config, "--config needs --services"),
        (options.output_dir, "--output-dir is empty"),
        (options.sync_interval >= 0.001, "--sync-interval must be at least 1ms"),
    ):
        if not holds:
            raise UsageError(text)
    options.mode = "watch" if options.watch and not options.from_file else "poll"
    if once:  # it asks no Envoy, and serves nothing
        options.mode, options.listen, options.envoy_admin = "once", None, None
    for kind in ("configmap", "secret"):
        setattr(options, kind, tuple(
            (query._replace(namespace=query.namespace or options.namespace), directory)
            for query, directory in getattr(options, kind)))
    options.node_name = environ.get("NODE_NAME", "")
    options.unknown_variables = [
        name for name in sorted(environ) if name.startswith("XDS_LOADER_")
        and name not in VARIABLES and not re.fullmatch(SERVICE_LINK, name)]
    return options


def help_text() -> str:
    lines = [(__doc__ or "").rstrip()]
    for title, options in SECTIONS.items():
        lines += ["", f"{title}:"]
        for option in options:
            text = option.help + "; repeatable" * option.repeats
            text += f" (default {option.default})" if option.default else ""
            lines += [f"  --{option.name} {option.metavar}".rstrip(), f"        {text}"]
    return "\n".join([*lines, ""])


def run(options: Options) -> int:
    log.configure(options.log_format, options.log_level)
    if options.trafficsplit_api_version:
        log.warning("--trafficsplit-api-version is ignored: SMI is not supported any more")
    if unknown := options.unknown_variables:
        log.warning("no option has the environment variable %s", shortened(unknown))
    config, path = DEFAULTS, options.config
    if path:
        try:
            with open(path, "rb") as stream:
                config = config_from(json.load(stream, object_pairs_hook=unique_keys))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"--config {path} cannot be read as JSON ({why(error)})") from None
    if options.insecure and not options.from_file:
        log.warning("--insecure: the API server's certificate is not verified")
    if config["endpoint"]["prefer_zone"] is True and not options.node_name:
        raise UsageError("--config: $.endpoint.prefer_zone: true needs the Node in $NODE_NAME")
    if options.secret:
        no_core_dumps()
    os.umask(0o022)  # of the directories that are made, whatever it was
    return preview(options, config) if options.dry_run else Loop(options, config).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the loader; returns the exit code: 0, 1 (tried and could not) or 2 (bad input)."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        given = given_in_words(arguments)
        if option_value(SPELLED["--help"], given):
            print_out(help_text())
        elif option_value(SPELLED["--version"], given):
            print_out(f"envoy-xds-configmap-loader {__version__}\n")
        else:
            return run(options_from(arguments, os.environ))
        return 0
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

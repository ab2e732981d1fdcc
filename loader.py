"""envoy-xds-configmap-loader: Envoy's filesystem xDS, live from Kubernetes.

It lists, polls or watches ConfigMaps (and if asked Services, EndpointSlices and Secrets) over the
raw Kubernetes REST API, turns them into the files that Envoy's filesystem xDS reads, and publishes
them as one atomic snapshot:

    <output-dir>/
      ..<version>/           one snapshot: complete, immutable, made under this name
      ..data -> ..<version>  THE switch: one rename(2) replaces the whole snapshot
      current/               a real directory, never replaced: Envoy's inotify watch stays valid
        rds.yaml -> ../..data/rds.yaml
      ..state/               what a restart could not see on disk

What it promises, each with a test that kills the process at every step:

* `current/X` always resolves to a complete file of one snapshot.
* Nothing is published before every source is known; "unknown" never becomes "empty".
* Nothing changed means nothing touched: no event for Envoy, no new directory.
* A restart repairs and converges, whatever it finds.

How it reads, from top to bottom: constants, values, the Kubernetes client, reflection (list and
watch), translation (objects to resources), secrets, composition (sources to files), ordering,
publication, confirmation, observation, the loop, the command line. Reflector threads own memory;
the main thread alone owns the disk. Only the standard library is used.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import fcntl
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
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
import urllib.parse
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

JsonType = TypeVar("JsonType")
__version__ = "1.0.0"

# ---------------------------------------------------------------------------------------------
# Constants, each with its reason
# ---------------------------------------------------------------------------------------------

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"

# A TCP and TLS handshake, and the silence within one answer. An API server that needs longer for
# a page of 500 objects is not going to answer.
CONNECT_TIMEOUT = 10.0
ANSWER_TIMEOUT = 30.0

# An API server bookmarks a watch about once a minute. A watch from a resourceVersion of the future
# (etcd was restored) is silent for ever, and so is a half-open connection: 90 s without a byte is
# taken for either, and answered by one cheap probe.
WATCH_SILENCE = 90.0

# The server ends a watch after timeoutSeconds; spread, so that a thousand sidecars that started
# together do not renew together (client-go: 5 to 10 minutes).
WATCH_SECONDS = (300, 600)

# A server that stops gracefully keeps an open watch silent for 60 s and then ends it properly. A
# proper end after that much silence may hide a new server with an older etcd behind it.
SUSPICIOUS_SILENCE = 30.0

# Backoff after failures: exponential, with jitter.
BACKOFF_FIRST, BACKOFF_LAST = 0.5, 30.0

# `--onetime` without `--timeout` is one try. The API server answers 401, 403, 429 and 5xx for some
# 20 ms after a restart though it means 200: these are asked again for this long.
ONE_TRY_SECONDS = 1.0

# What a server may ask us to wait: a year in a header must not stop a source for a year.
RETRY_AFTER_LAST = 300.0

# Objects in one page of a list: the chunk size of kubectl and of client-go's pager.
PAGE = 500

# Beyond this an event of a watch is none (etcd takes objects of 1.5 MiB).
EVENT_BYTES = 64 << 20

# Holdoff: an event of a quiet time is published at once. One that comes within QUIET of the last
# publication may belong to a burst, which is gathered until nothing came for QUIET, for GATHER at
# most. If nobody else came, then somebody waits for each of his changes before he makes the next:
# his next ones, twice as many each time up to LONELY, are not held up.
HOLDOFF_QUIET, HOLDOFF_GATHER, HOLDOFF_LONELY = 0.004, 0.2, 64

# Snapshots that are kept for what Envoy has not confirmed.
KEPT_MOST = 8

# What `--check-cmd` may take.
CHECK_SECONDS = 30.0

# Answers other than 200 to a resumed watch, in a row, after which only a list can help.
RELIST_AFTER = 3

# `--onetime --timeout` lists again this often what does not exist yet.
ONETIME_POLL = 1.0

# A 403 may be a passing one (see PASSING): an optional resource is missed after this many.
DENIALS = 3

# An optional resource that the API server does not have or grant is asked for again this seldom.
ABSENT_PAUSE = 300.0

# ---------------------------------------------------------------------------------------------
# Errors and values
# ---------------------------------------------------------------------------------------------


class LoaderError(Exception):
    """The loader tried and could not: one line that says what, where and what to do (exit 1)."""


class UsageError(LoaderError):
    """Bad input, said in one line before anything is touched (exit 2)."""


class File(NamedTuple):
    """One file of a snapshot: its bytes, their SHA-256 in hex, the source object, its mode."""

    content: bytes
    digest: str
    source: str
    mode: int = 0o644

    def __repr__(self) -> str:
        """Without the content, which may be a key."""
        return f"File({self.digest[:12]}, {self.source}, {self.mode:04o})"


Files = Mapping[str, File]
"""A set of files by their path relative to `current/`, such as `eds/demo_web_http.yaml`."""

Key = tuple[str, str]
"""Namespace (empty for what has none) and name of a Kubernetes object."""


def file_of(content: bytes, source: str, mode: int = 0o644) -> File:
    """A file with the digest of its content."""
    return File(content, hashlib.sha256(content).hexdigest(), source, mode)


def version_of(files: Files) -> str:
    """The version of a snapshot: a hash of paths, modes and contents, never a resourceVersion."""
    rows = (f"{path}\0{files[path].mode:o}\0{files[path].digest}\n" for path in sorted(files))
    return hashlib.sha256("".join(rows).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def parse_json(text: bytes | str) -> Any:
    """json.loads, of which a depth without end is a ValueError too. (Stand-in: chapter 1.)"""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def resource_file(fmt: str, comment: str, type_url: str, resources: list[dict[str, Any]]) -> bytes:
    """A stand-in for chapter 7."""
    typed = [{"@type": type_url, **resource} for resource in resources]
    version = hashlib.sha256(json.dumps(typed, sort_keys=True).encode()).hexdigest()[:16]
    if fmt == "json":
        return (json.dumps({"version_info": version, "resources": typed}, indent=2) + "\n").encode()
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f'version_info: "{version}"', "resources:"]
    for resource in typed:
        body: list[str] = []
        yaml_lines(resource, "  ", body)
        lines += ["- " + body[0][2:], *body[1:]]
    return ("\n".join(lines) + "\n").encode()


def same(one: Files, other: Files) -> bool:
    """Whether two sets of files are the same on disk (their sources may differ)."""
    return len(one) == len(other) and all(standing(other, path, one[path]) for path in one)


# ---------------------------------------------------------------------------------------------
# The Kubernetes client
# ---------------------------------------------------------------------------------------------


class Access(NamedTuple):
    """Where the API server is and how to prove who asks. Paths are read again for each request."""

    url: str
    token_file: str
    ca_file: str
    client_cert: str = ""
    client_key: str = ""
    insecure: bool = False


class Resource(NamedTuple):
    """A resource of the Kubernetes API: the path of its API group and its plural name."""

    api: str
    name: str

    def path(self, namespace: str) -> str:
        scope = f"/namespaces/{urllib.parse.quote(namespace, safe='')}" if namespace else ""
        return f"{self.api}{scope}/{self.name}"


CONFIGMAPS = Resource("/api/v1", "configmaps")
SECRETS = Resource("/api/v1", "secrets")
SERVICES = Resource("/api/v1", "services")
ENDPOINTS = Resource("/api/v1", "endpoints")
NODES = Resource("/api/v1", "nodes")
ENDPOINTSLICES = Resource("/apis/discovery.k8s.io/v1", "endpointslices")


class Query(NamedTuple):
    """What one list or watch asks for. An empty namespace means all, or a resource without one."""

    resource: Resource
    namespace: str = ""
    name: str = ""
    labels: str = ""

    def parameters(self) -> dict[str, str]:
        """The selectors. `metadata.name` as a field lets RBAC by `resourceNames` suffice."""
        chosen = {"fieldSelector": self.name and f"metadata.name={self.name}"}
        chosen["labelSelector"] = self.labels
        return {key: value for key, value in chosen.items() if value}

    def __str__(self) -> str:
        if self.name:
            kind = self.resource.name.removesuffix("s")
            return f"{kind} {self.namespace}/{self.name}".replace(" /", " ")
        where = f" in namespace {self.namespace}" if self.namespace else ""
        return f"{self.resource.name}{f' with {self.labels}' if self.labels else ''}{where}"


Items = list[dict[str, Any]]
"""API objects as JSON gives them."""


class ApiError(LoaderError):
    """The API server answered, and not with what was asked for."""

    def __init__(self, status: int, text: str, retry_after: float = 0.0) -> None:
        super().__init__(text)
        self.status = status
        self.retry_after = retry_after


class Expired(ApiError):
    """410: the resourceVersion (or the continue token) is too old; only a new list helps."""


class Cut(LoaderError):
    """A connection that ended where it should not have, or was silent for too long."""


# What a broken network raises below http.client; IncompleteRead and bad status lines included. A
# host name that no resolver takes (`a..b`) is a UnicodeError.
BROKEN = (OSError, http.client.HTTPException, UnicodeError)

# Answers that may pass by themselves. A 403 too: right after its restart an API server gave a valid
# token one 403 for some 20 ms (measured on kube-apiserver 1.36.2).
PASSING = frozenset((401, 403, 408, 429))


def is_passing(status: int) -> bool:
    """Whether asking again soon may help."""
    return status in PASSING or status >= 500


def why(error: BaseException) -> str:
    """An exception as one readable line."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}"
    text = " ".join(str(error).split())[:500]
    name = "" if isinstance(error, LoaderError) else f"{type(error).__name__}: "
    return f"{name}{text}".rstrip(": ")


class Trust:
    """The TLS context and the bearer token, made anew when the files they come from change.

    Kubernetes rotates both under a running pod: tokens about every hour, a CA within years.
    """

    def __init__(self, access: Access) -> None:
        self.access = access
        self._lock = threading.Lock()
        self._material: tuple[bytes, ...] | None = None
        self._context: ssl.SSLContext | None = None

    def token(self) -> str:
        """The bearer token as it is now. Without a file there is none: a local proxy needs none."""
        try:
            with open(self.access.token_file, "rb") as stream:
                token = stream.read().decode("latin-1").strip()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise LoaderError(f"token file {why(error)}; check --token-file") from None
        if not token.isprintable():
            raise LoaderError(f"token file {self.access.token_file}: not a token")
        return token

    def context(self) -> ssl.SSLContext:
        """The TLS context: the CA of `--ca-file`, or the system's where that file is not."""
        paths = (self.access.ca_file, self.access.client_cert, self.access.client_key)
        material = tuple(self._read(path) for path in paths)
        with self._lock:
            if self._context is None or material != self._material:
                self._context = self._build(material[0])
                self._material = material
            return self._context

    def _read(self, path: str) -> bytes:
        try:
            with open(path, "rb") as stream:
                return stream.read()
        except FileNotFoundError:
            if path and path != f"{SERVICE_ACCOUNT}/ca.crt":
                raise LoaderError(f"{path}: no such file; check --ca-file, --client-cert") from None
            return b""
        except OSError as error:
            raise LoaderError(f"{why(error)}; check --ca-file, --client-cert") from None

    def _build(self, authority: bytes) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        access = self.access
        try:
            where = access.ca_file
            if access.insecure:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            elif authority:
                context.load_verify_locations(cadata=authority.decode("ascii", "ignore"))
            else:
                context.load_default_certs()
            where = f"{access.client_cert}, {access.client_key}"
            if access.client_cert:
                paths = (access.client_cert, access.client_key)
                context.load_cert_chain(*paths, password=no_passphrase)
        except (ssl.SSLError, ValueError, EncryptedKey) as error:
            hint = "check --ca-file, --client-cert and --client-key"
            raise LoaderError(f"{where}: no usable certificate ({why(error)}); {hint}") from None
        return context


class ApiClient:
    """The Kubernetes REST API over one connection that is kept open; one thread uses it.

    `http.client` and not `urllib.request`: it keeps its connection, and a redirect must be refused
    rather than followed with the token. `count` is told every answer: (verb, status).
    """

    def __init__(self, access: Access, trust: Trust, count: Callable[[str, str], None]) -> None:
        self._trust = trust
        self._count = count
        self._url = urllib.parse.urlsplit(access.url)
        self._connection: http.client.HTTPConnection | None = None

    def list(self, query: Query, limit: int) -> Iterator[tuple[Items, str]]:
        """All objects that match, page by page (`limit` 0: in one), each with the resourceVersion
        to watch from. Expired when the server forgot the list midway."""
        page = {"limit": str(limit)} if limit else {}
        while True:
            body = self._get(query, "list", page)
            metadata = json_object(body.get("metadata"))
            yield list_items(body, query), str(metadata.get("resourceVersion") or "")
            token = metadata.get("continue")
            if not token:
                return
            if token == page.get("continue"):
                raise ApiError(200, f"list {query}: the continue token does not move on")
            page["continue"] = token

    def is_future(self, query: Query, version: str) -> bool:
        """Whether `version` is one that this server never reached: its etcd was reset.

        Costs one object. The server waits up to 3 s for the version to come before its 504.
        """
        page = {"limit": "1", "resourceVersionMatch": "NotOlderThan", "resourceVersion": version}
        try:
            self._get(query, "list", page)
        except ApiError as error:
            if error.status != 504:
                raise
            return True
        return False

    def watch(self, query: Query, version: str) -> Iterator[dict[str, Any]]:
        """The events after `version`, until the server ends the watch properly.

        Raises Expired for 410 (a status, or an ERROR event: a real server answers 200 and one
        event), ApiError for other refusals, Cut for an end that is none.
        """
        seconds = random.randint(*WATCH_SECONDS)
        asked = {"watch": "1", "allowWatchBookmarks": "true", "resourceVersion": version}
        response = self._open(query, "watch", {**asked, "timeoutSeconds": str(seconds)})
        self._wait(WATCH_SILENCE)
        yield {"type": "OPENED"}
        for line in watch_lines(response, query):
            event = watch_event(line, query)
            if event["type"] == "ERROR":
                raise self._refusal(query, "watch", error_status(event["object"]), event["object"])
            yield event

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _get(self, query: Query, verb: str, page: dict[str, str]) -> dict[str, Any]:
        response = self._open(query, verb, page)
        self._wait(ANSWER_TIMEOUT)
        try:
            body = response.read()
            if response.getheader("Content-Encoding") == "gzip":
                body = unzipped(body)
            answer = json.loads(body)
        except BROKEN as error:
            self.close()
            raise Cut(f"{query}: the answer of {self._url.netloc} stopped midway") from error
        except (ValueError, RecursionError) as error:
            text = f"{query}: {self._url.netloc} answered 200 with no JSON; is it an API server?"
            raise ApiError(200, text) from error
        if not isinstance(answer, dict):
            raise ApiError(200, f"{query}: {self._url.netloc} answered with no Kubernetes object")
        return answer

    def _open(self, query: Query, verb: str, page: dict[str, str]) -> http.client.HTTPResponse:
        """Ask; the answer's head is read and is a 200, else ApiError."""
        parameters = urllib.parse.urlencode({**query.parameters(), **page})
        target = f"{self._url.path.rstrip('/')}{query.resource.path(query.namespace)}?{parameters}"
        headers = {"Accept": "application/json", "User-Agent": f"envoy-xds-loader/{__version__}"}
        token = self._trust.token()
        if token:
            headers["Authorization"] = f"Bearer {token}"
        try:
            response = self._send(target, headers)
        except BROKEN as error:
            self._count(verb, "none")
            raise Cut(f"{verb} {query} at {self._url.netloc}: {self._hint(error)}") from error
        self._count(verb, str(response.status))
        if response.status == 200:
            return response
        text = self._rest(response)
        raise self._refusal(query, verb, response.status, text, response)

    def _send(self, target: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        """Over the open connection if there is one; a server may have closed it meanwhile."""
        while True:
            fresh = self._connection is None
            try:
                connection = self._connection or self._connect()
                connection.request("GET", target, headers=headers)
                self._wait(ANSWER_TIMEOUT)
                return connection.getresponse()
            except BROKEN:
                self.close()
                if fresh:
                    raise

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        if self._url.scheme == "https":
            context = self._trust.context()
            self._connection = http.client.HTTPSConnection(
                host, port, timeout=CONNECT_TIMEOUT, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(host, port, timeout=CONNECT_TIMEOUT)
        self._connection.connect()
        keep_alive(self._connection.sock)
        return self._connection

    def _wait(self, seconds: float) -> None:
        if self._connection is not None and self._connection.sock is not None:
            self._connection.sock.settimeout(seconds)

    def _rest(self, response: http.client.HTTPResponse) -> object:
        """The body of a refusal: a Kubernetes Status, or the start of whatever came."""
        try:
            body = response.read(1 << 20)
        except BROKEN:
            self.close()
            return ""
        if not response.isclosed():
            self.close()
        try:
            return json.loads(body)
        except ValueError:
            return body[:200].decode("utf-8", "replace")

    def _refusal(
        self,
        query: Query,
        verb: str,
        status: int,
        body: object,
        response: http.client.HTTPResponse | None = None,
    ) -> ApiError:
        if response is None:
            self.close()  # an ERROR event ends its stream
        said = body.get("message") if isinstance(body, dict) else body
        words, token = " ".join(str(said or "").split()), self._trust.token()
        words = words.replace(token, "[token]") if token else words  # an error page may echo it
        text = f"{verb} {query}: {status} {words[:500]}".rstrip()
        if status == 410:
            return Expired(status, text)
        if 300 <= status < 400:
            where = response.getheader("Location") if response else ""
            self.close()
            return ApiError(status, f"{text}: redirect to {where} refused; correct --apiserver")
        if status == 401:
            text += f"; is the token in {self._trust.access.token_file} valid?"
        if status == 403:
            where = f"in namespace {query.namespace}" if query.namespace else "in all namespaces"
            text += f"; grant the service account {verb} on {query.resource.name} {where}"
            if not token:
                text += f" (no token was sent: there is none in {self._trust.access.token_file})"
        if status == 404:
            text += "; is --apiserver a Kubernetes API server?"
        retry = response.getheader("Retry-After") if response else ""
        seconds = float(retry) if retry and retry.isdecimal() else 0.0
        return ApiError(status, text, min(seconds, RETRY_AFTER_LAST))

    def _hint(self, error: BaseException) -> str:
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"{error.verify_message or why(error)}; check --ca-file and --apiserver"
        if isinstance(error, TimeoutError):
            return "no answer in time; check --apiserver and network policies"
        return f"{why(error)}; check --apiserver"


def unzipped(body: bytes) -> bytes:
    """A body that came with gzip, which nobody asked for; ValueError for what is none."""
    import zlib

    try:
        return zlib.decompress(body, wbits=zlib.MAX_WBITS | 16)
    except zlib.error as error:
        raise ValueError(f"gzip: {error}") from None


def keep_alive(sock: socket.socket) -> None:
    """Let the kernel notice within about a minute that the other side is gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def list_items(body: dict[str, Any], query: Query) -> list[dict[str, Any]]:
    """The objects of a list. Anything that is not plainly a list is unknown, never empty."""
    kind, items = body.get("kind"), body.get("items")
    if items is None and isinstance(kind, str) and kind.endswith("List") and "items" in body:
        return []  # Go's JSON writes an empty slice as null
    if not isinstance(items, list):
        raise ApiError(200, f"list {query}: the answer is no list (kind {kind!r})")
    return [item for item in items if isinstance(item, dict)]


def watch_lines(response: http.client.HTTPResponse, query: Query) -> Iterator[bytes]:
    """The lines of a watch. One line can span many chunks and exceed 1 MiB.

    `read1` and not `readline`: http.client's readline shows a stream that was cut at a chunk
    boundary as a normal end (measured), and a cut must be told from an end.
    """
    parts: list[bytes] = []
    while True:
        try:
            block = response.read1(1 << 18)
        except BROKEN as error:
            silent = isinstance(error, TimeoutError)
            text = f"silent for {WATCH_SILENCE:.0f} s" if silent else f"cut ({why(error)})"
            raise Cut(f"watch {query}: {text}") from error
        if not block:
            if b"".join(parts).strip():
                raise Cut(f"watch {query}: cut within an event")
            return
        if b"\n" in block:
            *whole, block = (b"".join(parts) + block).split(b"\n")
            parts.clear()
            yield from filter(bytes.strip, whole)
        parts.append(block)
        if len(parts) % 256 == 0 and sum(map(len, parts)) > EVENT_BYTES:
            raise Cut(f"watch {query}: an event without end")


def watch_event(line: bytes, query: Query) -> dict[str, Any]:
    """One event of a watch: {"type": ..., "object": {...}}."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Cut(f"watch {query}: an event is no JSON") from error
    if not isinstance(event, dict) or not isinstance(event.get("object"), dict):
        raise Cut(f"watch {query}: an event has no object")
    if not isinstance(event.get("type"), str):
        raise Cut(f"watch {query}: an event has no type")
    return event


def error_status(status: dict[str, Any]) -> int:
    """The code of an ERROR event. Status objects of 410 are also known by their reason."""
    code = status.get("code")
    if status.get("reason") in ("Expired", "Gone"):
        return 410
    return code if isinstance(code, int) else 500


# ---------------------------------------------------------------------------------------------
# Reflection: list, then watch or poll
# ---------------------------------------------------------------------------------------------


class Backoff:
    """Delays after failures: exponential, each between half and all of what it could be."""

    def __init__(self, last: float = BACKOFF_LAST) -> None:
        self._failures = 0
        self._last = last

    def reset(self) -> None:
        self._failures = 0

    def delay(self, retry_after: float = 0.0) -> float:
        """Seconds to wait now, jittered; never less than what the server asks for."""
        ceiling = min(self._last, BACKOFF_FIRST * 2.0 ** min(self._failures, 10))
        self._failures += 1
        return max(retry_after, ceiling * random.uniform(0.5, 1.0))


def json_object(value: object) -> dict[str, Any]:
    """A value that should be a JSON object; anything else is an empty one."""
    return value if isinstance(value, dict) else {}


def object_key(item: dict[str, Any]) -> Key:
    metadata = json_object(item.get("metadata"))
    return str(metadata.get("namespace") or ""), str(metadata.get("name") or "")


class Wake(NamedTuple):
    """What wakes the main thread: why, when (monotonic), and the news if it is not in a store."""

    what: str
    at: float
    news: object = None


class Wakes:
    """A queue for the main thread, and a wait on it that a signal ends.

    A wait on a lock would not do: a signal that comes after the last bytecode and before the wait
    sets a flag that nobody looks at. To the pipe the interpreter itself writes
    (signal.set_wakeup_fd), so that select(2) returns at once.
    """

    def __init__(self) -> None:
        self._wakes: deque[Wake] = deque()
        self._read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def put(self, wake: Wake) -> None:
        """Add a wake, from any thread."""
        self._wakes.append(wake)
        try:
            os.write(self.write, b"\0")
        except BlockingIOError:
            pass  # a full pipe wakes as well

    def get(self, seconds: float) -> Wake | None:
        """The next wake, waiting up to so many seconds; None where none came."""
        until = time.monotonic() + seconds
        while not self._wakes:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                return None
            os.read(self._read, 4096)  # there may be more bytes than wakes: those taken unwaited
        return self._wakes.popleft()


class Reflector(threading.Thread):
    """Keeps the objects of one query current in memory, and wakes the main thread on change.

    `mode` is `once` (a try, with a second of retries), `poll` (a list every `interval` seconds) or
    `watch` (a list, then watches that resume). `parse` reduces an API object to what is used of
    it; an object that it refuses (ValueError) keeps its last good value and is named in `bad`.
    `patience` is the longest backoff, in seconds. An `optional` query that the API
    server does not know (404) or grant (403) counts as synced and `absent`. What the main thread
    reads, it reads under the lock.
    """

    def __init__(
        self,
        query: Query,
        parse: Callable[[dict[str, Any]], Any],
        client: ApiClient | FileClient,
        wake: Callable[[Wake], None],
        *,
        mode: str,
        interval: float = 0.0,
        optional: bool = False,
        patience: float = BACKOFF_LAST,
    ) -> None:
        super().__init__(name=f"reflector {query}", daemon=True)
        self.query = query
        self.synced = False
        self.absent = False
        self.failed = False
        self.trouble = ""
        self.bad: dict[Key, str] = {}
        self._parse, self._client, self._wake = parse, client, wake
        self._mode, self._interval, self._optional = mode, interval, optional
        self._objects: dict[Key, Any] = {}
        self._version = ""
        self._lock = threading.Lock()
        self._backoff = Backoff(patience)
        self._denials = 0
        self._poke = threading.Event()

    def objects(self) -> dict[Key, Any]:
        """A copy of what is known now."""
        with self._lock:
            return dict(self._objects)

    def poke(self) -> None:
        """End a pause: list or connect now."""
        self._poke.set()

    def run(self) -> None:
        {"once": self._once, "poll": self._poll, "watch": self._watch}[self._mode]()

    # -- the three ways ---------------------------------------------------------------------

    def _once(self) -> None:
        until = time.monotonic() + ONE_TRY_SECONDS
        while True:
            try:
                self._relist()
                return
            except LoaderError as error:
                passing = isinstance(error, ApiError) and is_passing(error.status)
                delay = max(random.uniform(0.1, 0.2), getattr(error, "retry_after", 0.0))
                # (a quarter of a second more, so that a Retry-After of 1 fits)
                if not passing or time.monotonic() + delay > until + 0.25:
                    self._failure(error, last=True)
                    return
            self._pause(delay)

    def _poll(self) -> None:
        while True:
            try:
                self._relist()
                self._backoff.reset()
                delay = self._interval
            except LoaderError as error:
                delay = self._failure(error)
            self._pause(delay)

    def _watch(self) -> None:
        suspect, refusals = False, 0
        while True:
            try:
                if suspect and self._version and self._is_future():
                    self._restart("future")
                suspect = False
                if not self._version:
                    self._relist()
                suspect, refusals = self._follow(), 0
            except Expired as error:
                self._restart("expired")
                log.debug("%s", error)
                self._pause(self._backoff.delay() if refusals else 0.0)
                refusals += 1
            except LoaderError as error:
                answered = isinstance(error, ApiError)
                suspect = suspect or not answered or error.status >= 500  # type: ignore[attr-defined]
                refusals = refusals + 1 if answered else 0
                if refusals >= RELIST_AFTER:
                    self._restart("refused")
                self._pause(self._failure(error))

    # -- their parts ------------------------------------------------------------------------

    def _is_future(self) -> bool:
        assert isinstance(self._client, ApiClient)
        return self._client.is_future(self.query, self._version)

    def _restart(self, reason: str) -> None:
        """Forget the version: the next step is a list. The objects stay until it has come."""
        log.debug("%s: %s, listing anew", self.query, reason)
        metrics.add("xds_loader_watch_restarts_total", (str(self.query), reason))
        self._version = ""

    def _relist(self) -> None:
        """Replace the store by a complete list, so that deletions in a gap are seen.

        A list whose continue token expires midway is asked for again without pages: a server whose
        history is shorter than a paginated list takes would else never be read.
        """
        try:
            objects, bad, version = self._listed(PAGE)
        except Expired:
            objects, bad, version = self._listed(0)
        changed = not self.synced or bad != self.bad or objects != self._objects
        with self._lock:
            self._objects, self.bad = objects, bad
        self._version = version
        self.synced, self.absent = True, False
        log.debug("listed %s: %d objects at %s", self.query, len(objects), version)
        self._heard()
        self._recovered()
        if changed:
            self._changed()

    def _listed(self, limit: int) -> tuple[dict[Key, Any], dict[Key, str], str]:
        """A complete list: values by key, what is bad, and the version. One page is held at once,
        and of each object what `parse` keeps: JSON as it is decoded is many times larger."""
        objects: dict[Key, Any] = {}
        bad: dict[Key, str] = {}
        version = ""
        for items, version in self._client.list(self.query, limit):  # noqa: B007
            for item in items:
                key = object_key(item)
                value = self._parsed(key, item, bad)
                if value is not None:
                    objects[key] = value
        return objects, bad, version

    def _heard(self) -> None:
        """The source lives: an event, a bookmark or a list."""
        source = (str(self.query),)
        metrics.set("xds_loader_source_last_event_timestamp_seconds", time.time(), source)
        metrics.set("xds_loader_source_synced", 1.0, source)

    def _parsed(self, key: Key, item: dict[str, Any], bad: dict[Key, str]) -> Any:
        """The value of an object; the old one where nothing that counts changed, or it is bad."""
        old = self._objects.get(key)
        try:
            value = self._parse(item)
        except ValueError as error:
            name = f"{RESOURCE_KINDS[self.query.resource].lower()} {'/'.join(filter(None, key))}"
            bad[key] = str(error) if str(error).startswith(name) else f"{name}: {error}"
            return old
        return old if value == old else value

    def _follow(self) -> bool:
        """Watch until the server ends it properly; whether that end wants a closer look."""
        assert isinstance(self._client, ApiClient)
        began = last = time.monotonic()
        fruitful = False
        for event in self._client.watch(self.query, self._version):
            last = time.monotonic()
            if event["type"] == "OPENED":
                log.debug("watching %s from %s", self.query, self._version)
                self._recovered()
            else:
                self._apply(event, last)
                self._backoff.reset()
                fruitful = True
        now = time.monotonic()
        log.debug("watch of %s ended after %.0f s", self.query, now - began)
        metrics.add("xds_loader_watch_restarts_total", (str(self.query), "ended"))
        if now - began >= 1.0:
            self._backoff.reset()
        elif not fruitful:
            self._pause(self._backoff.delay())
        return now - last >= SUSPICIOUS_SILENCE

    def _apply(self, event: dict[str, Any], now: float) -> None:
        """One event into the store. A bookmark is a version and nothing else."""
        kind, item = event["type"], event["object"]
        metadata = json_object(item.get("metadata"))
        self._version = str(metadata.get("resourceVersion") or self._version)
        self._heard()
        if kind not in ("ADDED", "MODIFIED", "DELETED"):
            if kind != "BOOKMARK":
                log.debug("watch of %s: event of unknown type %s", self.query, kind)
            return
        key = object_key(item)
        old = self._objects.get(key)
        bad = dict(self.bad)
        bad.pop(key, None)
        value = None if kind == "DELETED" else self._parsed(key, item, bad)
        if value is old and bad == self.bad:
            return
        with self._lock:
            self.bad = bad
            if value is None:
                self._objects.pop(key, None)
            else:
                self._objects[key] = value
        self._changed(now)

    def _changed(self, now: float | None = None) -> None:
        self._wake(Wake("objects", now or time.monotonic()))

    def _recovered(self) -> None:
        if self.trouble:
            self.trouble = ""
            log.recovered(str(self.query), f"{self.query}: answered again")
            self._wake(Wake("recovered", time.monotonic()))

    def _is_absence(self, error: LoaderError) -> bool:
        """Whether an optional resource is not there, or not granted: not just for one answer."""
        if not self._optional or not isinstance(error, ApiError) or self.synced:
            return False
        self._denials += error.status == 403
        denied = error.status == 403 and (self._denials >= DENIALS or self._mode == "once")
        return denied or error.status == 404

    def _failure(self, error: LoaderError, *, last: bool = False) -> float:
        """Say what failed (once, until it is another failure) and how long to wait."""
        metrics.add("xds_loader_watch_restarts_total", (str(self.query), restart_reason(error)))
        delay = self._backoff.delay(getattr(error, "retry_after", 0.0))
        if self._is_absence(error):
            self.synced = self.absent = True
            log.info("%s: not available here (%s)", self.query, error)
            self._wake(Wake("objects", time.monotonic()))
            return ABSENT_PAUSE
        if self.absent:
            return ABSENT_PAUSE
        self.trouble, self.failed = str(error), last
        if self._mode != "once":  # there the error is the end, and is said as such
            log.outage(str(self.query), self.trouble)
        log.debug("%s: next try in %.1f s", self.query, delay)
        self._wake(Wake("trouble", time.monotonic()))
        return delay

    def _pause(self, seconds: float) -> None:
        """Wait, unless poked. Daemon threads need no other word to stop: they own no disk."""
        self._poke.wait(seconds)
        self._poke.clear()


def restart_reason(error: LoaderError) -> str:
    """A label for metrics: few values, whatever the error."""
    if isinstance(error, ApiError):
        return f"status {error.status}"
    return "cut" if isinstance(error, Cut) else "error"


class FileClient:
    """The objects of `kubectl get ... -o json` in a file (`-`: standard input), as a lister."""

    def __init__(self, path: str, namespace: str) -> None:
        self._path, self._namespace = path, namespace
        self._standard_input: bytes | None = None
        self._lock = threading.Lock()  # each reflector asks; standard input can be read once

    def list(self, query: Query, limit: int) -> Iterator[tuple[Items, str]]:
        """The objects of the file that the API server would give for this query, in one page."""
        kind = RESOURCE_KINDS[query.resource]
        found = []
        for item in documents(self._read(), self._path):
            metadata = item.get("metadata")
            if item.get("kind") != kind or not isinstance(metadata, dict):
                continue
            if query.resource is not NODES:
                metadata["namespace"] = metadata.get("namespace") or self._namespace
            if matches(metadata, query):
                found.append(item)
        yield found, ""

    def _read(self) -> bytes:
        try:
            if self._path == "-":
                with self._lock:
                    if self._standard_input is None:
                        self._standard_input = sys.stdin.buffer.read()
                    return self._standard_input
            with open(self._path, "rb") as stream:
                return stream.read()
        except OSError as error:
            raise LoaderError(f"--from-file {why(error)}") from None


RESOURCE_KINDS = {
    CONFIGMAPS: "ConfigMap",
    SECRETS: "Secret",
    SERVICES: "Service",
    ENDPOINTS: "Endpoints",
    NODES: "Node",
    ENDPOINTSLICES: "EndpointSlice",
}


def documents(text: bytes, path: str) -> Iterator[dict[str, Any]]:
    """The objects of a file: single ones or lists (of lists), one after another."""
    decoder, solid, position = json.JSONDecoder(), re.compile(r"\S"), 0
    hint = "give the output of `kubectl get ... -o json`"
    try:
        whole = text.decode("utf-8-sig")
        while found := solid.search(whole, position):
            value, position = decoder.raw_decode(whole, found.start())
            yield from flattened(value, path)
    except (ValueError, RecursionError) as error:
        raise LoaderError(f"--from-file {path}: no JSON ({why(error)}); {hint}") from None
    if not position:  # a file that is just being rewritten; no objects at all is an empty List
        raise LoaderError(f"--from-file {path}: is empty; {hint}")


def flattened(value: object, path: str) -> Iterator[dict[str, Any]]:
    """The objects in a value: itself, or the items of a List kind."""
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise LoaderError(f"--from-file {path}: holds something that is no Kubernetes object")
    if not value["kind"].endswith("List"):
        yield value
        return
    items = value.get("items") or []
    if not isinstance(items, list):
        raise LoaderError(f"--from-file {path}: the items of a {value['kind']} are no list")
    for item in items:
        if isinstance(item, dict):
            item.setdefault("kind", value["kind"].removesuffix("List"))
        yield from flattened(item, path)


def matches(metadata: dict[str, Any], query: Query) -> bool:
    """Whether the API server would list an object of this metadata for this query."""
    if query.namespace and metadata.get("namespace") != query.namespace:
        return False
    if query.name and metadata.get("name") != query.name:
        return False
    return selects(query.labels, json_object(metadata.get("labels")))


def requirements(selector: str) -> list[tuple[str, str, frozenset[str]]]:
    """A label selector as (label, operator, values); UsageError for what is none.

    The grammar of the Kubernetes page "Labels and Selectors": `a=b`, `a==b`, `a!=b`,
    `a in (b,c)`, `a notin (b,c)`, `a`, `!a`, with commas between.
    """
    found = []
    rest = selector.strip()
    while rest:
        match = re.match(REQUIREMENT, rest)
        if not match:
            raise UsageError(f"{selector!r} is no label selector")
        absent, label, operator, value, words, values = match.groups()
        if words:
            chosen = frozenset(word.strip() for word in values.split(","))
            found.append((label, words, chosen))
        elif operator:
            found.append((label, "notin" if operator == "!=" else "in", frozenset({value})))
        else:
            found.append((label, "absent" if absent else "exists", frozenset()))
        rest = rest[match.end() :]
    return found


REQUIREMENT = (
    r"\s*(!)?\s*([A-Za-z0-9](?:[-._/A-Za-z0-9]*[A-Za-z0-9])?)"
    r"(?:\s*(==|=|!=)\s*([-._A-Za-z0-9]*)|\s+(in|notin)\s*\(([^()]*)\))?\s*(?:,(?=.)|$)"
)


def selects(selector: str, labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches; like the API server, `!=` and `notin` match absence."""
    for label, operator, values in requirements(selector):
        value = labels.get(label)
        if operator == "exists":
            holds = value is not None
        elif operator == "absent":
            holds = value is None
        else:
            holds = (value in values) == (operator == "in")
        if not holds:
            return False
    return True

# ---------------------------------------------------------------------------------------------
# Translation: Services, endpoints and Nodes become clusters, assignments and routes
# ---------------------------------------------------------------------------------------------

# -- objects: what the Kubernetes API gives, reduced to what is rendered -----------------------
#
# Five thousand Services of ten endpoints are held at once, so these are tuples of interned
# strings. `*_from` take the raw JSON of one object. Null, absent and empty are one there, as in
# Go's types; what has a wrong type raises ValueError with the path of the member at fault.

Json = Any  # what json.loads returns: written once, so that each use says what it is

HEALTHY, DRAINING, UNHEALTHY = range(3)  # of an endpoint, best first
IPV4, IPV6, FQDN = "ipv4", "ipv6", "fqdn"
SOCKET_FAMILIES = {IPV4: socket.AF_INET, IPV6: socket.AF_INET6}
TOPOLOGY_ZONE = "topology.kubernetes.io/zone"
SERVICE_NAME_LABEL = "kubernetes.io/service-name"
ROUTE_ANNOTATIONS = ("route", "hosts", "prefix", "grpc", "weight", "port")

DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
DNS_NAME = (
    r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*"
    r"[A-Za-z0-9_])?)*"
)


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
    """A Service. `external_name` is empty unless its type is ExternalName."""

    namespace: str
    name: str
    ports: tuple[ServicePort, ...]
    headless: bool
    external_name: str | None
    labels: tuple[tuple[str, str], ...]
    annotations: tuple[tuple[str, str], ...]  # those that may be about routes

    def __str__(self) -> str:
        return f"service {self.namespace}/{self.name}"


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
    labels: tuple[tuple[str, str], ...]


class Objects(NamedTuple):
    """All that is rendered. Unchanged values are the same objects from one call to the next."""

    services: Mapping[Key, Service]
    slices: Mapping[Key, EndpointSlice]
    endpoints: Mapping[Key, tuple[EndpointSlice, ...]]
    nodes: Mapping[str, Node]


def member_of(parent: Json, key: str, kind: type[JsonType]) -> JsonType:
    """The member of a raw object; null and absent are the kind's empty value."""
    value = parent.get(key)
    if value is None:
        return kind()
    if type(value) is not kind:
        raise ValueError(f"{key}: {kind.__name__} expected, not {type(value).__name__}")
    return value


def items_of(parent: Json, key: str) -> list[dict[str, Json]]:
    """The objects of a list."""
    items = member_of(parent, key, list)
    for index, item in enumerate(items):
        if type(item) is not dict:
            raise ValueError(f"{key}[{index}]: dict expected, not {type(item).__name__}")
    return items


def text_of(parent: Json, key: str) -> str:
    """A string, interned: zones, nodes and port names are few, and are held thousands of times."""
    text = member_of(parent, key, str)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # "\ud800" is valid JSON, and no valid UTF-8
            raise ValueError(f"{key}: not a Unicode text: {text!a}") from None
    return sys.intern(text)


def pairs_of(parent: Json, key: str) -> tuple[tuple[str, str], ...]:
    """A map of strings (labels, annotations), sorted."""
    pairs = member_of(parent, key, dict)
    return tuple((sys.intern(name), text_of(pairs, name)) for name in sorted(pairs))


def port_number(parent: Json, key: str) -> int:
    """A port, 0 where there is none."""
    number = member_of(parent, key, int)
    if not 0 <= number <= 65535:
        raise ValueError(f"{key}: a port is between 1 and 65535, not {number}")
    return number


def label_of(parent: Json, key: str) -> str:
    """A DNS label: namespaces and the like become file names, so nothing else may pass."""
    label = text_of(parent, key)
    if not re.fullmatch(DNS_LABEL, label):
        raise ValueError(f"{key}: not a DNS label: {label!a}")
    return label


def metadata_of(obj: Json) -> dict[str, Json]:
    if type(obj) is not dict:
        raise ValueError(f"a JSON object expected, not {type(obj).__name__}")
    return member_of(obj, "metadata", dict)


def service_from(obj: Json) -> Service:
    """A v1 Service, reduced."""
    metadata, spec = metadata_of(obj), member_of(obj, "spec", dict)
    external = None
    if text_of(spec, "type") == "ExternalName":
        external = text_of(spec, "externalName").removesuffix(".")
        if not re.fullmatch(DNS_NAME, external):
            raise ValueError(f"externalName: not a DNS name: {external!a}")
    annotations = pairs_of(metadata, "annotations")
    return Service(
        namespace=label_of(metadata, "namespace"),
        name=label_of(metadata, "name"),
        ports=tuple(service_port_from(port) for port in items_of(spec, "ports")),
        headless=text_of(spec, "clusterIP") == "None",
        external_name=external,
        labels=pairs_of(metadata, "labels"),
        annotations=tuple(
            pair for pair in annotations if pair[0].rpartition("/")[2] in ROUTE_ANNOTATIONS
        ),
    )


def service_port_from(port: dict[str, Json]) -> ServicePort:
    number, name = port_number(port, "port"), text_of(port, "name")
    if not number:
        raise ValueError("port: a Service port needs a number")
    if name and not re.fullmatch(DNS_LABEL, name):
        raise ValueError(f"name: not a port name: {name!a}")
    target = port.get("targetPort")
    if type(target) is not str:
        target = port_number(port, "targetPort")
    return ServicePort(
        name,
        number,
        text_of(port, "protocol") or "TCP",
        text_of(port, "appProtocol"),
        target or number,
    )


def endpointslice_from(obj: Json) -> EndpointSlice:
    """A discovery.k8s.io/v1 EndpointSlice, reduced."""
    metadata = metadata_of(obj)
    family = text_of(obj, "addressType").lower()
    if family not in (IPV4, IPV6, FQDN):
        raise ValueError(f"addressType: not IPv4, IPv6 or FQDN: {family!a}")
    return EndpointSlice(
        namespace=text_of(metadata, "namespace"),
        name=text_of(metadata, "name"),
        service=text_of(member_of(metadata, "labels", dict), SERVICE_NAME_LABEL),
        family=family,
        ports=slice_ports_from(obj),
        endpoints=tuple(
            endpoint
            for item in items_of(obj, "endpoints")
            for endpoint in endpoint_from(item, family)
        ),
    )


def slice_ports_from(obj: Json) -> tuple[tuple[str, int], ...]:
    return tuple(
        (text_of(port, "name"), port_number(port, "port")) for port in items_of(obj, "ports")
    )


def endpoint_from(item: dict[str, Json], family: str) -> Iterator[Endpoint]:
    """The addresses of one endpoint. Null is ready, and serving if it is ready: so the other two
    only matter where `ready` is false, and null is false there.
    """
    conditions = member_of(item, "conditions", dict)
    ready = conditions.get("ready") is None or member_of(conditions, "ready", bool)
    serving, terminating = (member_of(conditions, key, bool) for key in ("serving", "terminating"))
    state = HEALTHY if ready else DRAINING if serving and terminating else UNHEALTHY
    hints = items_of(member_of(item, "hints", dict), "forZones")
    zones = tuple(text_of(zone, "name") for zone in hints)
    zone, node = text_of(item, "zone"), text_of(item, "nodeName")
    for address in member_of(item, "addresses", list):
        yield Endpoint(checked_address(address, family), state, zone, node, zones)


def checked_address(address: Json, family: str) -> str:
    """The address itself, if Envoy can parse it: one that it cannot costs it the whole file."""
    try:
        if family != FQDN:
            socket.inet_pton(SOCKET_FAMILIES[family], address)
        return str(address)
    except (OSError, TypeError, ValueError):
        raise ValueError(f"addresses: not an {family} address: {address!a}") from None


def endpoints_from(obj: Json) -> tuple[EndpointSlice, ...]:
    """A legacy v1 Endpoints object as slices: one for each subset and family in it."""
    metadata, slices = metadata_of(obj), []
    namespace, name = text_of(metadata, "namespace"), text_of(metadata, "name")
    for subset in items_of(obj, "subsets"):
        found: dict[str, list[Endpoint]] = {IPV4: [], IPV6: []}
        for key, state in (("addresses", HEALTHY), ("notReadyAddresses", UNHEALTHY)):
            for item in items_of(subset, key):
                address = text_of(item, "ip")
                family = IPV6 if ":" in address else IPV4
                checked_address(address, family)
                found[family].append(Endpoint(address, state, "", text_of(item, "nodeName"), ()))
        ports = slice_ports_from(subset)
        slices += [
            EndpointSlice(namespace, name, name, family, ports, tuple(endpoints))
            for family, endpoints in found.items()
            if endpoints
        ]
    return tuple(slices)


def node_from(obj: Json) -> Node:
    """A v1 Node, reduced."""
    metadata = metadata_of(obj)
    return Node(text_of(metadata, "name"), pairs_of(metadata, "labels"))


# ---------------------------------------------------------------------------------------------
# --config: how Services become clusters
# ---------------------------------------------------------------------------------------------

# The fields of envoy.config.cluster.v3.Cluster by the JSON that each takes. Envoy ignores a field
# that it does not know, so a typing error would pass in silence; a test compares this table, and
# the two below, with the protobuf descriptors.
CLUSTER_FIELDS = {
    name: kind
    for kind, names in {
        "an object": """transport_socket_matcher circuit_breakers upstream_http_protocol_options
        common_http_protocol_options http_protocol_options http2_protocol_options
        typed_extension_protocol_options dns_failure_refresh_rate dns_resolution_config
        typed_dns_resolver_config outlier_detection upstream_bind_config lb_subset_config
        ring_hash_lb_config maglev_lb_config original_dst_lb_config least_request_lb_config
        round_robin_lb_config common_lb_config transport_socket metadata
        upstream_connection_options load_balancing_policy lrs_server upstream_config
        track_cluster_stats preconnect_policy""",
        "a list": """transport_socket_matches health_checks dns_resolvers filters
        lrs_report_endpoint_metrics""",
        'a duration such as "1.5s"': """connect_timeout dns_refresh_rate dns_jitter
        cleanup_interval""",
        "a number": "per_connection_buffer_limit_bytes max_requests_per_connection",
        "true or false": """respect_dns_ttl use_tcp_for_dns_lookups wait_for_warm_on_init
        close_connections_on_host_health_failure ignore_health_on_host_removal
        track_timeout_budgets connection_pool_per_downstream_connection""",
        "a string": "alt_stat_name lb_policy dns_lookup_family protocol_selection",
    }.items()
    for name in names.split()
}

# The loader's own fields, and what to use instead.
OWN_FIELDS = {
    "name": "use cluster.name, a template",
    "type": "use --endpoints, or endpoint.external_name for ExternalName Services",
    "cluster_type": "use --endpoints, or endpoint.external_name for ExternalName Services",
    "load_assignment": "endpoints come from EndpointSlices, see endpoint",
    "eds_cluster_config": "use --endpoints, and --output-dir for the path",
}

# Where merging a Cluster meets a oneof (setting one member clears the others), and where a map
# (entries are replaced, not merged): paths of fields, from the Cluster down.
CLUSTER_ONEOFS: dict[str, tuple[tuple[str, ...], ...]] = {
    "": (
        (
            "ring_hash_lb_config",
            "maglev_lb_config",
            "original_dst_lb_config",
            "least_request_lb_config",
            "round_robin_lb_config",
        ),
    ),
    "common_lb_config": (("zone_aware_lb_config", "locality_weighted_lb_config"),),
    "http_protocol_options.header_key_format": (("proper_case_words", "stateful_formatter"),),
    "lrs_server": (("path", "path_config_source", "api_config_source", "ads", "self"),),
    "transport_socket_matcher": (("matcher_list", "matcher_tree"),),
    "transport_socket_matcher.matcher_tree": (
        ("exact_match_map", "prefix_match_map", "custom_match"),
    ),
    "transport_socket_matcher.on_no_match": (("matcher", "action"),),
    "upstream_bind_config.source_address": (("port_value", "named_port"),),
}
CLUSTER_MAPS = frozenset(
    (
        "lb_subset_config.default_subset",
        "metadata.filter_metadata",
        "metadata.typed_filter_metadata",
        "transport_socket_matcher.matcher_tree.exact_match_map.map",
        "transport_socket_matcher.matcher_tree.prefix_match_map.map",
        "typed_extension_protocol_options",
    )
)

CONFIG_SECTIONS = ("cluster", "cluster_domain", "endpoint", "route")


class ClusterMatch(NamedTuple):
    """What a cluster must be for an override to apply: all that is not None must hold."""

    cluster_name: str | None
    port_name: str | None
    namespace: str | None
    labels: tuple[tuple[str, str], ...]


class ClusterOverride(NamedTuple):
    """Clusters that match any of `matches` get `merge`, or do not exist where it is None."""

    matches: tuple[ClusterMatch, ...]
    merge: Mapping[str, Json] | None


class LocalityPart(NamedTuple):
    """Where one part of a locality comes from: a Node's label, a literal, or a Node's name."""

    source: str = ""  # "label", "literal", "node_name"; empty: what the slice says
    value: str = ""


class Config(NamedTuple):
    """What `--config` says; a member is named after its path in the JSON."""

    cluster_name: str = "{namespace}/{service}/{port}"
    cluster_base: Mapping[str, Json] = {}
    cluster_overrides: tuple[ClusterOverride, ...] = ()
    trusted_ca: str = "/etc/ssl/certs/ca-certificates.crt"
    include_not_ready: bool = False
    families: tuple[str, ...] = (IPV4,)
    eds_budget: int | None = None
    prefer_zone: bool | str = False
    external_name: str = "strict_dns"
    region: LocalityPart = LocalityPart()
    zone: LocalityPart = LocalityPart()
    sub_zone: LocalityPart = LocalityPart()
    route_name: str = "services"
    route_suffix: str = "cluster.local"
    annotation_prefix: str = "xds-loader"
    cluster_domain: str = "cluster.local"


def needs_nodes(config: Config) -> bool:
    """Whether rendering looks at Nodes: only then must the loader be allowed to read them."""
    return config.prefer_zone is True or any(
        part.source == "label" for part in (config.region, config.zone, config.sub_zone)
    )


def unique_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """For json.loads(object_pairs_hook=): a key that is there twice would hide its first value."""
    found: dict[str, Json] = {}
    for key, value in pairs:
        if key in found:
            raise UsageError(f"--config: the key {json.dumps(key)} is there twice in one object")
        found[key] = value
    return found


def config_error(path: str, what: str) -> UsageError:
    return UsageError(f"--config: {path}: {what}")


def config_path(path: str, key: str) -> str:
    """The JSON path of a member."""
    return f"{path}.{key}" if re.fullmatch(r"\w+", key) else f"{path}[{json.dumps(key)}]"


def config_from(document: Json) -> Config:
    """Validate a parsed `--config`; raise UsageError with the JSON path of the first error."""
    root = config_object(document, "$", CONFIG_SECTIONS)
    chosen: dict[str, Json] = {}
    if "cluster_domain" in root:
        chosen["cluster_domain"] = config_dns_name(root["cluster_domain"], "$.cluster_domain")
    if "cluster" in root:
        chosen |= config_cluster(root["cluster"], "$.cluster")
    if "endpoint" in root:
        chosen |= config_endpoint(root["endpoint"], "$.endpoint")
    if "route" in root:
        chosen |= config_route(root["route"], "$.route")
    return Config(**chosen)


def config_cluster(value: Json, path: str) -> dict[str, Json]:
    cluster = config_object(value, path, ("base", "name", "overrides", "trusted_ca"))
    chosen: dict[str, Json] = {}
    if "name" in cluster:
        chosen["cluster_name"] = config_template(cluster["name"], f"{path}.name")
    if "base" in cluster:
        chosen["cluster_base"] = config_fields(cluster["base"], f"{path}.base")
    if "overrides" in cluster:
        overrides = config_list(cluster["overrides"], f"{path}.overrides")
        chosen["cluster_overrides"] = tuple(
            config_override(override, f"{path}.overrides[{index}]")
            for index, override in enumerate(overrides)
        )
    if "trusted_ca" in cluster:
        chosen["trusted_ca"] = config_text(cluster["trusted_ca"], f"{path}.trusted_ca")
        if not chosen["trusted_ca"].startswith("/"):
            raise config_error(f"{path}.trusted_ca", "an absolute path expected")
    return chosen


def config_endpoint(value: Json, path: str) -> dict[str, Json]:
    endpoint = config_object(
        value,
        path,
        ("eds_budget", "external_name", "families", "include_not_ready", "locality", "prefer_zone"),
    )
    chosen = dict(endpoint)
    if type(endpoint.get("eds_budget", 0)) is not int or endpoint.get("eds_budget", 0) < 0:
        raise config_error(f"{path}.eds_budget", "a whole number of EDS files expected")
    if endpoint.get("external_name", "strict_dns") not in ("strict_dns", "logical_dns"):
        raise config_error(f"{path}.external_name", '"strict_dns" or "logical_dns" expected')
    if type(endpoint.get("include_not_ready", False)) is not bool:
        raise config_error(f"{path}.include_not_ready", "true or false expected")
    if "prefer_zone" in endpoint and type(endpoint["prefer_zone"]) is not bool:
        config_text(endpoint["prefer_zone"], f"{path}.prefer_zone", "a zone, true or false")
    if "families" in endpoint:
        families = config_list(endpoint["families"], f"{path}.families")
        if sorted(map(str, families)) not in ([IPV4], [IPV6], [IPV4, IPV6]):
            raise config_error(f"{path}.families", '"ipv4", "ipv6" or both expected, once each')
        chosen["families"] = tuple(families)
    if "locality" in endpoint:
        del chosen["locality"]
        parts = config_object(
            endpoint["locality"], f"{path}.locality", ("region", "sub_zone", "zone")
        )
        chosen |= {
            part: config_locality(source, f"{path}.locality.{part}")
            for part, source in parts.items()
        }
    return chosen


def config_locality(value: Json, path: str) -> LocalityPart:
    source = config_object(value, path, ("label", "literal", "node_name"))
    if len(source) != 1:
        raise config_error(path, "one of label, literal and node_name expected")
    [(kind, given)] = source.items()
    if kind == "node_name":
        if given is not True:
            raise config_error(f"{path}.node_name", "true expected")
        return LocalityPart(kind)
    return LocalityPart(kind, config_text(given, f"{path}.{kind}"))


def config_route(value: Json, path: str) -> dict[str, Json]:
    route = config_object(value, path, ("annotation_prefix", "name", "suffix"))
    chosen: dict[str, Json] = {}
    if "name" in route:
        chosen["route_name"] = config_text(route["name"], f"{path}.name")
    if "suffix" in route:
        chosen["route_suffix"] = config_dns_name(route["suffix"], f"{path}.suffix")
    if "annotation_prefix" in route:
        where = f"{path}.annotation_prefix"
        chosen["annotation_prefix"] = config_dns_name(route["annotation_prefix"], where)
    return chosen


def config_override(value: Json, path: str) -> ClusterOverride:
    override = config_object(value, path, ("match", "merge", "suppress"))
    if "match" not in override:
        raise config_error(path, "match is missing: which clusters is it about?")
    match = override["match"]
    alternatives = match if type(match) is list else [match]
    if not alternatives:
        raise config_error(f"{path}.match", "an empty list matches nothing")
    matches = tuple(
        config_match(item, f"{path}.match[{index}]" if match is alternatives else f"{path}.match")
        for index, item in enumerate(alternatives)
    )
    if ("merge" in override) == ("suppress" in override):
        raise config_error(path, "one of merge and suppress expected")
    if "merge" in override:
        return ClusterOverride(matches, config_fields(override["merge"], f"{path}.merge"))
    if override["suppress"] is not True:
        raise config_error(f"{path}.suppress", "true expected; leave the override out instead")
    return ClusterOverride(matches, None)


def config_match(value: Json, path: str) -> ClusterMatch:
    match = config_object(value, path, ("cluster_name", "labels", "namespace", "port_name"))
    if not match:
        raise config_error(
            path,
            "one or more of cluster_name, labels, namespace, port_name "
            "expected: what is for every cluster belongs into base",
        )
    labels = match.get("labels", {})
    if type(labels) is not dict or ("labels" in match and not labels):
        raise config_error(f"{path}.labels", "an object of labels expected")
    for label, given in labels.items():
        if type(given) is not str:
            raise config_error(config_path(f"{path}.labels", label), "a string expected")
    for key in ("cluster_name", "namespace", "port_name"):
        if key in match:
            config_text(match[key], f"{path}.{key}")
    return ClusterMatch(
        match.get("cluster_name"),
        match.get("port_name"),
        match.get("namespace"),
        tuple(sorted(labels.items())),
    )


def config_object(value: Json, path: str, keys: Sequence[str]) -> dict[str, Json]:
    if type(value) is not dict:
        raise config_error(path, "an object expected")
    for key in value:
        if key not in keys:
            raise config_error(config_path(path, key), f"unknown key (one of {', '.join(keys)})")
    return value


def config_list(value: Json, path: str) -> list[Json]:
    if type(value) is not list:
        raise config_error(path, "a list expected")
    return value


def config_text(value: Json, path: str, what: str = "a string") -> str:
    """A string that is not empty, and that neither Envoy nor UTF-8 stumbles over."""
    if type(value) is not str or not value:
        raise config_error(path, f"{what} expected")
    if not value.isprintable():  # neither are lone surrogates, which JSON allows
        raise config_error(path, f"a character that does not print: {value!a}")
    return value


def config_dns_name(value: Json, path: str) -> str:
    text = config_text(value, path, "a DNS name")
    if not re.fullmatch(DNS_NAME, text):
        raise config_error(path, f"not a DNS name: {text}")
    return text


def config_template(value: Json, path: str) -> str:
    template = config_text(value, path)
    rest = re.sub(r"\{(namespace|service|port)\}", "", template)
    if unknown := re.search(r"\{[^{}]*\}|[{}]", rest):
        raise config_error(path, f"{unknown[0]} is none of {{namespace}}, {{service}}, {{port}}")
    if "{" not in template:
        raise config_error(path, "every cluster would have this one name")
    return template


def config_fields(value: Json, path: str) -> dict[str, Json]:
    """Fields of a Cluster, for `base` and `merge`."""
    if type(value) is not dict:
        raise config_error(path, "an object expected")
    for key, given in value.items():
        where = config_path(path, key)
        if key in OWN_FIELDS:
            raise config_error(where, f"the loader's own: {OWN_FIELDS[key]}")
        kind = CLUSTER_FIELDS.get(key)
        if kind is None:
            snake = re.sub("([A-Z])", lambda match: "_" + match[1].lower(), key)
            known = f", here {snake} (names are in snake_case)" if snake in CLUSTER_FIELDS else ""
            raise config_error(where, f"no field of Envoy's Cluster{known}")
        if not is_field_value(given, kind):
            raise config_error(where, f"{kind} expected")
        config_values(given, where)
    config_oneofs(value, path, "")
    return value


def is_field_value(value: Json, kind: str) -> bool:
    """Whether protobuf's JSON takes the value for a field of the kind."""
    if kind.startswith("a duration"):
        return type(value) is str and bool(re.fullmatch(r"-?\d+(\.\d{1,9})?s", value))
    types: dict[str, type] = {
        "an object": dict,
        "a list": list,
        "a number": int,
        "true or false": bool,
        "a string": str,
    }
    return type(value) is types[kind]


def config_values(value: Json, path: str) -> None:
    """Refuse what JSON lets pass at any depth: an Any without a type, NaN, lone surrogates."""
    if type(value) is dict:
        for key, item in value.items():
            where = config_path(path, key)
            if "@type" not in (item if type(item) is dict else ()) and (
                key == "typed_config" or path.endswith(".typed_extension_protocol_options")
            ):
                raise config_error(where, 'an object with "@type" expected')
            config_values(key, path)
            config_values(item, where)
    elif type(value) is list:
        for index, item in enumerate(value):
            config_values(item, f"{path}[{index}]")
    elif type(value) is float and value - value != 0:
        raise config_error(path, "a finite number expected")
    elif type(value) is str and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise config_error(path, f"not a Unicode text: {value!a}")


def config_oneofs(value: Mapping[str, Json], path: str, field: str) -> None:
    """Refuse two members of one oneof, for which Envoy would refuse every cluster."""
    for group in CLUSTER_ONEOFS.get(field, ()):
        given = [name for name in group if value.get(name) is not None]
        if len(given) > 1:
            raise config_error(path, f"only one of {' and '.join(given)} can be set")
    for key, item in value.items():
        if type(item) is dict:
            config_oneofs(item, config_path(path, key), f"{field}.{key}".lstrip("."))


# -- merging, as protobuf does it --------------------------------------------------------------


def merge_cluster(
    into: Mapping[str, Json], more: Mapping[str, Json], path: str = ""
) -> dict[str, Json]:
    """Merge the JSON of two Clusters: messages merge, lists append, scalars replace, the other
    member of a oneof goes, entries of a map and `typed_config` are replaced whole.

    Neither is changed; the result shares what the two did not disagree about. Values of
    different kinds raise ValueError: which one is wrong, only Envoy knows.
    """
    merged = dict(into)
    for group in CLUSTER_ONEOFS.get(path, ()):
        if any(more.get(name) is not None for name in group):
            for name in group:
                if more.get(name) is None:
                    merged.pop(name, None)
    for key, new in more.items():
        old, where = merged.get(key), f"{path}.{key}".lstrip(".")
        if old is None or new is None:  # null is a field that is not set
            merged[key] = old if new is None else new
        elif type(old) is not type(new) and (
            dict in (types := {type(old), type(new)}) or list in types
        ):
            raise ValueError(f"{where}: {json_kind(new)} cannot be merged into {json_kind(old)}")
        elif type(old) is list:
            merged[key] = old + new
        elif type(old) is not dict or key == "typed_config":
            merged[key] = new
        elif where in CLUSTER_MAPS:
            merged[key] = {**old, **new}
        else:
            merged[key] = merge_cluster(old, new, where)
    return merged


def json_kind(value: Json) -> str:
    return "an object" if type(value) is dict else "a list" if type(value) is list else "a value"


# -- clusters ----------------------------------------------------------------------------------

ENVOY_TYPES = "type.googleapis.com/envoy."
CLUSTER_TYPE = f"{ENVOY_TYPES}config.cluster.v3.Cluster"
ASSIGNMENT_TYPE = f"{ENVOY_TYPES}config.endpoint.v3.ClusterLoadAssignment"
ROUTE_TYPE = f"{ENVOY_TYPES}config.route.v3.RouteConfiguration"
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
UPSTREAM_TLS_TYPE = f"{ENVOY_TYPES}extensions.transport_sockets.tls.v3.UpstreamTlsContext"
API_SERVER = ("default", "kubernetes")

EDS, INLINE, DNS, AUTO = "eds", "inline", "dns", "auto"


class UpstreamProtocol(NamedTuple):
    """How Envoy speaks upstream. `http`: a port that routes may go to without being named."""

    http2: bool
    tls: bool
    http: bool


PLAIN_TCP = UpstreamProtocol(http2=False, tls=False, http=False)
HTTP1 = UpstreamProtocol(http2=False, tls=False, http=True)
HTTP2 = UpstreamProtocol(http2=True, tls=False, http=True)
HTTPS = UpstreamProtocol(http2=False, tls=True, http=True)
HTTP2_TLS = UpstreamProtocol(http2=True, tls=True, http=True)
APP_PROTOCOLS = {
    "http": HTTP1,
    "https": HTTPS,
    "grpc": HTTP2,
    "grpcs": HTTP2_TLS,
    "kubernetes.io/h2c": HTTP2,
    "kubernetes.io/ws": HTTP1,
    "kubernetes.io/wss": HTTPS,
}
PORT_NAMES = {
    "http": HTTP1,
    "http2": HTTP2,
    "h2c": HTTP2,
    "grpc": HTTP2,
    "https": HTTPS,
    "tls": UpstreamProtocol(http2=False, tls=True, http=False),
    "httptls": HTTPS,
    "grpctls": HTTP2_TLS,
    "grpcs": HTTP2_TLS,
}


class PlannedCluster(NamedTuple):
    """One cluster to be: everything that does not depend on endpoints.

    `stem` names its EDS file. `dns_type` and `host` (what DNS is asked for) are empty where the
    endpoints come from slices.
    """

    name: str
    stem: str
    port: ServicePort
    dns_type: str
    host: str
    options: Mapping[str, Json]


class ServicePlan(NamedTuple):
    """What one Service becomes: depends on it and on the configuration alone."""

    service: Service
    clusters: tuple[PlannedCluster, ...]
    route: ServiceRoute | None
    warnings: tuple[str, ...]


class ClusterPlanner(NamedTuple):
    """Plans Services: the configuration and the mode that was asked for."""

    config: Config
    endpoints: str  # AUTO, EDS, INLINE or DNS

    def plan(self, service: Service) -> ServicePlan:
        """Plan one Service; what cannot be rendered is left out and named."""
        warnings: list[str] = []
        clusters = []
        if not service.ports:
            warnings.append(f"{service}: has no ports, so there is no cluster")
        for port in service.ports:
            try:
                cluster = self.cluster(service, port)
            except ValueError as error:
                warnings.append(f"{service}: port {port.label} is left out: {error}")
                continue
            if cluster:
                clusters.append(cluster)
                warnings += dns_warnings(service, cluster)
        route = route_of(service, clusters, self.config, warnings)
        return ServicePlan(service, tuple(clusters), route, tuple(warnings))

    def cluster(self, service: Service, port: ServicePort) -> PlannedCluster | None:
        """The cluster of a port; None where it is not wanted, ValueError where it cannot be."""
        if port.protocol not in ("TCP", "UDP"):
            raise ValueError(f"Envoy does not speak {port.protocol}")
        name = cluster_name(self.config.cluster_name, service, port)
        matching = [
            (override, match)
            for override in self.config.cluster_overrides
            for match in override.matches
            if is_match(match, name, service, port)
        ]
        if any(override.merge is None for override, _ in matching):
            return None
        by_name = any(match.cluster_name for _, match in matching)
        if (service.namespace, service.name) == API_SERVER and not by_name:
            return None
        dns_type, host, options = self.dns(service)
        options = merge_cluster(options, self.config.cluster_base)
        options = merge_cluster(options, self.protocol_options(service, port, options))
        for override in self.config.cluster_overrides:
            if any(override is found for found, _ in matching):
                options = merge_cluster(options, override.merge or {})
        return PlannedCluster(name, cluster_stem(service, port), port, dns_type, host, options)

    def dns(self, service: Service) -> tuple[str, str, dict[str, Json]]:
        """Type, host and options of a DNS cluster: the families asked for, and no others."""
        only = {IPV4: "V4_ONLY", IPV6: "V6_ONLY"}
        families = self.config.families
        options = {"dns_lookup_family": only[families[0]] if len(families) == 1 else "ALL"}
        if service.external_name:
            return self.config.external_name.upper(), service.external_name, options
        if self.endpoints == DNS:
            return "STRICT_DNS", service_dns_name(service, self.config), options
        return "", "", {}

    def protocol_options(
        self, service: Service, port: ServicePort, options: Mapping[str, Json]
    ) -> dict[str, Json]:
        """HTTP/2 and TLS upstream, on top of `options`."""
        protocol, found = protocol_of(port), dict[str, Json]()
        if protocol.http2:
            given = options.get("typed_extension_protocol_options") or {}
            found["typed_extension_protocol_options"] = {
                HTTP_OPTIONS: http2_options(given.get(HTTP_OPTIONS) or {})
            }
        if protocol.tls:
            host = service.external_name or service_dns_name(service, self.config)
            context: dict[str, Json] = {"alpn_protocols": ["h2"]} if protocol.http2 else {}
            context["validation_context"] = {
                "trusted_ca": {"filename": self.config.trusted_ca},
                "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": host}}],
            }
            found["transport_socket"] = {
                "name": "envoy.transport_sockets.tls",
                "typed_config": {
                    "@type": UPSTREAM_TLS_TYPE,
                    "sni": host,
                    "common_tls_context": context,
                },
            }
        return found


def http2_options(base: Mapping[str, Json]) -> dict[str, Json]:
    """HttpProtocolOptions for HTTP/2; what `base` says of them stays, but for the protocol."""
    kept = {
        key: value
        for key, value in base.items()
        if key not in ("auto_config", "use_downstream_protocol_config")
    }
    explicit = kept.get("explicit_http_config") or {}
    return {
        "@type": f"type.googleapis.com/{HTTP_OPTIONS}",
        **kept,
        "explicit_http_config": {
            "http2_protocol_options": explicit.get("http2_protocol_options") or {}
        },
    }


def cluster_name(template: str, service: Service, port: ServicePort) -> str:
    """The name of a cluster: the one function that CDS, EDS and RDS take it from."""
    parts = {"{namespace}": service.namespace, "{service}": service.name, "{port}": port.label}
    return re.sub(r"\{\w+\}", lambda match: parts[match[0]], template)


def cluster_stem(service: Service, port: ServicePort) -> str:
    """The name of the EDS file: `_` is in no namespace, Service or port name, so it is unique."""
    return f"{service.namespace}_{service.name}_{port.label}"


def service_dns_name(service: Service, config: Config) -> str:
    return f"{service.name}.{service.namespace}.svc.{config.cluster_domain}"


def is_match(match: ClusterMatch, name: str, service: Service, port: ServicePort) -> bool:
    return (
        match.cluster_name in (None, name)
        and match.port_name in (None, port.label)
        and match.namespace in (None, service.namespace)
        and all(pair in service.labels for pair in match.labels)
    )


def protocol_of(port: ServicePort) -> UpstreamProtocol:
    """appProtocol decides where there is one, else the port's name up to the first dash."""
    if port.protocol != "TCP":
        return PLAIN_TCP
    if port.app_protocol:
        return APP_PROTOCOLS.get(port.app_protocol.lower(), HTTP1)
    return PORT_NAMES.get(port.name.partition("-")[0], PLAIN_TCP)


def dns_warnings(service: Service, cluster: PlannedCluster) -> Iterator[str]:
    if cluster.host and not service.external_name and not service.headless:
        yield (
            f"{service}: --endpoints dns sees its one clusterIP, behind which kube-proxy and "
            f"not Envoy balances: make it headless (clusterIP: None)"
        )


# -- load assignments --------------------------------------------------------------------------

EndpointPlace = tuple[int, tuple[str, str, str]]  # (priority, (region, zone, sub_zone))


class Placement(NamedTuple):
    """Where endpoints are seen from here: localities and priorities.

    `zone` is the own one, None where none is preferred.
    """

    config: Config
    zone: str | None
    nodes: Mapping[str, Node]

    def places(self, slices: Iterable[EndpointSlice]) -> Placer:
        """For the endpoints of one Service: hints count only if all ready ones have them.

        Kubernetes gives none to an endpoint that terminates: it must not take them from the
        others at every rolling update.
        """
        ready = [
            endpoint
            for found in slices
            for endpoint in found.endpoints
            if endpoint.state == HEALTHY and found.family in self.config.families
        ]
        hinted = self.zone is not None and bool(ready) and all(e.hints for e in ready)
        return Placer(self, hinted, {})

    def locality(self, zone: str, node_name: str) -> tuple[str, str, str]:
        config, node = self.config, self.nodes.get(node_name)
        return (
            locality_part(config.region, "", node_name, node),
            locality_part(config.zone, zone, node_name, node),
            locality_part(config.sub_zone, "", node_name, node),
        )


class Placer(NamedTuple):
    """Places the endpoints of one Service, and remembers: they share few zones and nodes."""

    placement: Placement
    hinted: bool
    known: dict[tuple[str, str, tuple[str, ...]], EndpointPlace]

    def place(self, endpoint: Endpoint) -> EndpointPlace:
        key = (endpoint.zone, endpoint.node, endpoint.hints)
        found = self.known.get(key)
        if found is None:
            own = self.placement.zone
            locality = self.placement.locality(endpoint.zone, endpoint.node)
            near = own is None or (
                own in endpoint.hints if self.hinted and endpoint.hints else own == locality[1]
            )
            found = self.known[key] = (0 if near else 1, locality)
        return found


def locality_part(part: LocalityPart, default: str, node_name: str, node: Node | None) -> str:
    if part.source == "label":
        return dict(node.labels).get(part.value, "") if node else ""
    return {"literal": part.value, "node_name": node_name}.get(part.source, default)


def own_zone(config: Config, node_name: str, nodes: Mapping[str, Node]) -> str | None:
    """The zone to prefer; None: none, or the own Node is not known or says nothing."""
    if config.prefer_zone is not True:
        return config.prefer_zone or None
    node = nodes.get(node_name)
    default = dict(node.labels).get(TOPOLOGY_ZONE, "") if node else ""
    return locality_part(config.zone, default, node_name, node) or None


def assignment_of(
    cluster: PlannedCluster, slices: Iterable[EndpointSlice], placer: Placer
) -> dict[str, Json]:
    """The ClusterLoadAssignment of a service port, joined with each slice by the port's name."""
    config = placer.placement.config
    worst = UNHEALTHY if config.include_not_ready else DRAINING
    best: dict[tuple[int, bytes, int], tuple[int, EndpointPlace, str]] = {}
    for found in slices:
        if found.family not in config.families:
            continue
        rank, family = config.families.index(found.family), SOCKET_FAMILIES[found.family]
        for number in [
            number for name, number in found.ports if number and name == cluster.port.name
        ]:
            for endpoint in found.endpoints:
                if endpoint.state <= worst:
                    key = (rank, socket.inet_pton(family, endpoint.address), number)
                    seen = (endpoint.state, placer.place(endpoint), endpoint.address)
                    best[key] = min(best.get(key, seen), seen)
    nearest = min((place[0] for _, place, _ in best.values()), default=0)
    localities: dict[EndpointPlace, list[Json]] = {}
    for key in sorted(best):
        state, (priority, locality), address = best[key]
        localities.setdefault((priority - nearest, locality), []).append(
            lb_endpoint(address, key[2], cluster.port.protocol, state)
        )
    return load_assignment(
        cluster.name, [locality_endpoints(place, localities[place]) for place in sorted(localities)]
    )


def dns_assignment(
    cluster: PlannedCluster, service: Service, slices: Iterable[EndpointSlice]
) -> dict[str, Json]:
    """One host name. A headless one resolves to pods, so it needs the port of the pods."""
    port = cluster.port
    number: int | None = port.number
    if service.headless:
        number = port.target if type(port.target) is int else None
        if number is None:
            numbers = {
                number
                for found in slices
                for name, number in found.ports
                if name == port.name and number
            }
            number = numbers.pop() if len(numbers) == 1 else None
    endpoints = [lb_endpoint(cluster.host, number, port.protocol, HEALTHY)] if number else []
    return load_assignment(cluster.name, [{"lb_endpoints": endpoints}] if endpoints else [])


def load_assignment(name: str, localities: list[Json]) -> dict[str, Json]:
    return {"cluster_name": name, **({"endpoints": localities} if localities else {})}


def locality_endpoints(place: EndpointPlace, endpoints: list[Json]) -> dict[str, Json]:
    priority, parts = place
    named = zip(("region", "zone", "sub_zone"), parts, strict=True)
    locality = {name: value for name, value in named if value}
    return {
        **({"locality": locality} if locality else {}),
        **({"priority": priority} if priority else {}),
        "lb_endpoints": endpoints,
    }


def lb_endpoint(address: str, port: int, protocol: str, state: int) -> dict[str, Json]:
    where: dict[str, Json] = {"address": address, "port_value": port}
    if protocol == "UDP":
        where = {"protocol": "UDP", **where}
    endpoint: dict[str, Json] = {"endpoint": {"address": {"socket_address": where}}}
    if state != HEALTHY:
        endpoint["health_status"] = "DRAINING" if state == DRAINING else "UNHEALTHY"
    return endpoint


def endpoint_warnings(
    service: Service,
    clusters: Sequence[PlannedCluster],
    slices: Sequence[EndpointSlice],
    families: Sequence[str],
) -> Iterator[str]:
    """What of a Service's slices gives no endpoint although somebody meant it to."""
    used = [found for found in slices if found.endpoints and clusters]
    for found in used:
        where = f"{service}: endpoints of slice {found.name} are left out"
        if found.family == FQDN:
            yield f"{where}: host names, where Envoy needs addresses"
        elif not found.ports:
            yield f"{where}: it has no ports"
        for cluster in clusters:
            if cluster.port.name in [name for name, number in found.ports if not number]:
                yield f"{where}: its port {cluster.port.label} has no number"
    unwanted = sorted({found.family for found in used if found.family in SOCKET_FAMILIES})
    if unwanted and not set(unwanted) & set(families):
        yield (f"{service}: has only {unwanted[0]} endpoints, which endpoint.families leaves out")


# -- routes ------------------------------------------------------------------------------------

# `*` alone, at the start or at the end is all that Envoy takes in a domain.
HOST_NAME = r"[a-z0-9_](?:-*[a-z0-9_]|\.(?=[a-z0-9_]))*"
ROUTE_HOST = rf"\*|(?:\*[.-]?)?{HOST_NAME}|{HOST_NAME}[.-]?\*"
ROUTE_PREFIX = r"/[!-~]*"
GRPC_SERVICE = r"(?a)[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
MAX_WEIGHT = 2**32 - 1  # Envoy refuses a file whose weights sum up to more


class ServiceRoute(NamedTuple):
    """What the annotations of a Service ask for.

    `cluster` is where its hosts go, `ports` (number, cluster) all its HTTP ports, that one's too.
    """

    service: str
    hosts: tuple[str, ...]
    prefixes: tuple[str, ...]
    weight: int
    cluster: str
    ports: tuple[tuple[int, str], ...]


def route_of(
    service: Service, clusters: Sequence[PlannedCluster], config: Config, warnings: list[str]
) -> ServiceRoute | None:
    """The route of a Service, None if it asks for none; what is wrong is left out and named."""
    prefix = config.annotation_prefix + "/"
    asked = {
        key.removeprefix(prefix): value.strip()
        for key, value in service.annotations
        if key.startswith(prefix)
    }
    if not asked or asked.get("route") == "false":
        return None
    try:
        if asked.get("route", "true") != "true":
            raise ValueError(f"{prefix}route: true or false expected: {asked['route']!a}")
        default = f"{service.name}.{service.namespace}.svc.{config.route_suffix}"
        hosts = route_hosts(asked.get("hosts") or default, f"{service}: {prefix}hosts", warnings)
        prefixes = route_prefixes(asked, prefix)
        weight = route_weight(asked.get("weight", "1"), f"{prefix}weight")
        chosen = route_port(service, asked.get("port", ""), f"{prefix}port")
        names = {cluster.port: cluster.name for cluster in clusters}
        if chosen not in names:
            raise ValueError(f"its port {chosen.label} has no cluster")
    except ValueError as error:
        warnings.append(f"{service}: is not routed: {error}")
        return None
    ports = tuple(
        sorted(
            (port.number, name)
            for port, name in names.items()
            if port == chosen or protocol_of(port).http
        )
    )
    if not hosts:
        if not any(warning.startswith(f"{service}: {prefix}hosts") for warning in warnings):
            warnings.append(f"{service}: is not routed: {prefix}hosts names no host")
        return None
    name = f"{service.namespace}/{service.name}"
    return ServiceRoute(name, hosts, prefixes, weight, names[chosen], ports)


def comma_separated(text: str) -> list[str]:
    """The items of a comma-separated list, sorted, each once."""
    return sorted({word.strip() for word in text.split(",")} - {""})


def route_hosts(text: str, where: str, warnings: list[str]) -> tuple[str, ...]:
    hosts = []
    for host in comma_separated(text.lower()):
        if len(host) <= 253 and re.fullmatch(ROUTE_HOST, host):
            hosts.append(host)
        else:
            warnings.append(
                f"{where}: left out: {host!a} is no host name (without a port; "
                f"* only at the start or the end)"
            )
    return tuple(hosts)


def route_prefixes(asked: Mapping[str, str], prefix: str) -> tuple[str, ...]:
    """The path prefixes: gRPC services are prefixes of their own, else `/` is the default."""
    services = comma_separated(asked.get("grpc", ""))
    for service in services:
        if not re.fullmatch(GRPC_SERVICE, service):
            raise ValueError(f"{prefix}grpc: not the name of a gRPC service: {service!a}")
    path = asked.get("prefix", "") or ("" if services else "/")
    if path and (not re.fullmatch(ROUTE_PREFIX, path) or "?" in path or "#" in path):
        raise ValueError(f"{prefix}prefix: not the beginning of a path: {path!a}")
    return tuple(sorted({f"/{service}/" for service in services} | ({path} if path else set())))


def route_weight(text: str, where: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > MAX_WEIGHT:
        raise ValueError(f"{where}: a whole number up to {MAX_WEIGHT} expected: {text!a}")
    return int(text)


def route_port(service: Service, wanted: str, where: str) -> ServicePort:
    """The port that was asked for, else the only one, else the first HTTP one."""
    ports = [port for port in service.ports if port.protocol == "TCP"]
    if wanted:
        for port in ports:
            if wanted in (port.name, str(port.number)):
                return port
        raise ValueError(f"{where}: the Service has no TCP port {wanted!a}")
    http = [port for port in ports if protocol_of(port).http]
    chosen = ports if len(ports) == 1 else http
    if not chosen:
        raise ValueError(f"which of its ports is HTTP? Say so by appProtocol or by {where}")
    return chosen[0]


class HostBlock(NamedTuple):
    """The virtual hosts of one host name, rendered; `routes` are what they were made of."""

    routes: tuple[ServiceRoute, ...]
    block: ResourceBlock
    warnings: tuple[str, ...]


def virtual_hosts(host: str, routes: Sequence[ServiceRoute], warnings: list[str]) -> list[Json]:
    """The virtual host of a host name, and one for each further port that it is asked with."""
    domains = [host] if "*" in host else [host, f"{host}:*"]
    found = [(host, domains, split_routes(host, routes, None, warnings))]
    further = {
        number for route in routes for number, cluster in route.ports if cluster != route.cluster
    }
    for number in sorted(further) if not host.endswith("*") else ():
        domain = f"{host}:{number}"
        found.append((domain, [domain], split_routes(domain, routes, number, warnings)))
    return [
        {"name": name, "domains": domains, **({"routes": split} if split else {})}
        for name, domains, split in found
    ]


def split_routes(
    domain: str, routes: Sequence[ServiceRoute], port: int | None, warnings: list[str]
) -> list[Json]:
    """The routes of a virtual host, from most to least specific.

    Services that share a prefix split it. With a port, those that have it do, if any has.
    """
    prefixes: dict[str, list[tuple[ServiceRoute, str]]] = {}
    for route in sorted(routes):
        for prefix in route.prefixes:
            prefixes.setdefault(prefix, []).append((route, dict(route.ports).get(port or 0, "")))
    found: list[Json] = []
    for prefix in sorted(prefixes, key=lambda prefix: (-len(prefix), prefix)):
        members = prefixes[prefix]
        if any(cluster for _, cluster in members):
            members = [(route, cluster) for route, cluster in members if cluster]
        split: list[Json] = []
        total = 0
        for route, cluster in members:
            if total + route.weight > MAX_WEIGHT:
                warnings.append(
                    f"service {route.service}: is not routed at {domain}{prefix}: "
                    f"with it the weights sum up to more than {MAX_WEIGHT}"
                )
                continue
            total += route.weight
            split.append({"name": cluster or route.cluster, "weight": route.weight})
        if not total:
            warnings.append(
                f"service {members[0][0].service}: {domain}{prefix} has no route: all weights are 0"
            )
            continue
        action: Json = (
            {"cluster": split[0]["name"]}
            if len(split) == 1
            else {"weighted_clusters": {"clusters": split}}
        )
        found.append({"match": {"prefix": prefix}, "route": action})
    return found


# -- YAML and JSON -----------------------------------------------------------------------------

# What every YAML parser, of 1.1 or 1.2, reads as the string that it is: names, paths, IPv4
# addresses, durations. Everything else is quoted.
PLAIN_SCALAR = (
    r"(?ia)(?!(?:y|n|yes|no|on|off|true|false|null|nan|inf|infinity)\Z)"
    r"[a-z_/][a-z0-9_./-]*\Z|[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+\Z|[0-9]+s\Z"
)
# What JSON's quoting leaves as it is, and YAML takes for a line break or refuses.
UNPRINTABLE = "[\x7f-\xa0\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]"


COMPACT_JSON = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


class ResourceBlock(NamedTuple):
    """One resource, or an element of one: its text in the file, and a hash of what it says.

    The hash is the same in YAML and JSON.
    """

    text: bytes
    digest: bytes


@functools.lru_cache(maxsize=4096)  # keys and names come again and again
def yaml_text(text: str) -> str:
    """A string, in the one way that cannot be misread."""
    if re.match(PLAIN_SCALAR, text):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub(UNPRINTABLE, lambda match: f"\\u{ord(match[0]):04x}", quoted)


def yaml_scalar(value: Json) -> str:
    """A scalar or an empty collection."""
    if type(value) is str:
        return yaml_text(value)
    if type(value) is int:
        return str(value)
    if type(value) is float:  # 1e+16 is a string to YAML 1.1
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")
    return json.dumps(value)


def yaml_lines(value: Json, indent: str, lines: list[str]) -> None:
    """Append the lines of a collection that is not empty, in block style."""
    if type(value) is dict:
        for key, item in value.items():
            if item and type(item) is dict:
                lines.append(f"{indent}{yaml_text(key)}:")
                yaml_lines(item, indent + "  ", lines)
            elif item and type(item) is list:
                lines.append(f"{indent}{yaml_text(key)}:")
                yaml_lines(item, indent, lines)
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


class ResourceWriter(NamedTuple):
    """Writes files: `yaml` for people, `json` for Envoy, which reads it five times faster."""

    format: str

    def items(self, values: list[Json], indent: str = "") -> ResourceBlock:
        """Elements of a list that is written at the indent."""
        compact = ",\n".join(map(COMPACT_JSON.encode, values)).encode()
        digest = hashlib.sha256(compact).digest()
        if self.format == "json":
            return ResourceBlock(compact, digest)
        lines: list[str] = []
        yaml_lines(values, indent, lines)
        lines.append("")
        return ResourceBlock("\n".join(lines).encode(), digest)

    def nested(
        self, resource: dict[str, Json], key: str, blocks: Sequence[ResourceBlock]
    ) -> ResourceBlock:
        """A resource whose last field is a list, of elements that were written before."""
        head = self.items([resource])
        if not blocks:
            return head
        digest = hashlib.sha256(head.digest + b"".join(block.digest for block in blocks)).digest()
        if self.format == "json":
            text = b'%s,"%s":[\n%s\n]}' % (
                head.text[:-1],
                key.encode(),
                b",\n".join(block.text for block in blocks),
            )
        else:
            text = b"%s  %s:\n%s" % (
                head.text,
                key.encode(),
                b"".join(block.text for block in blocks),
            )
        return ResourceBlock(text, digest)

    def file(self, comment: str, type_url: str, blocks: Sequence[ResourceBlock]) -> bytes:
        """A DiscoveryResponse. Its version is the hash of its resources, the comment is not in it.

        `type_url` tells what an empty file is about.
        """
        version = hashlib.sha256(b"".join(block.digest for block in blocks)).hexdigest()[:16]
        if self.format == "json":
            return b'{"version_info":"%s","type_url":"%s","resources":[\n%s\n]}\n' % (
                version.encode(),
                type_url.encode(),
                b",\n".join(block.text for block in blocks),
            )
        head = "".join(f"# {line}\n" for line in comment.splitlines())
        head += f'version_info: "{version}"\ntype_url: {type_url}\nresources:'
        resources = b"\n" + b"".join(block.text for block in blocks) if blocks else b" []\n"
        return head.encode() + resources


# -- the translator: renders all, and again what changed ---------------------------------------

SERVICES_SOURCE = "services"  # of every rendered file
MAX_USER_INSTANCES = "/proc/sys/fs/inotify/max_user_instances"
MADE_BY = "Rendered by envoy-xds-configmap-loader, which overwrites changes."
CDS_COMMENT = f"Clusters: one for each port of each Service.\n{MADE_BY}"
RDS_COMMENT = f"Routes: from the annotations {{prefix}}/... of Services.\n{MADE_BY}"


class RenderedCluster(NamedTuple):
    """One cluster: its text in CDS, and its EDS file where it has one."""

    name: str
    mode: str
    block: ResourceBlock
    path: str
    file: File | None


class Rendered(NamedTuple):
    """One Service, and the plan, clusters, modes and slices that it was rendered from."""

    inputs: tuple[object, ...]
    clusters: tuple[RenderedCluster, ...]
    warnings: tuple[str, ...]
    slices: tuple[EndpointSlice, ...]


# Each plan, with those of its clusters that really exist.
KeptClusters = Mapping[Key, tuple[ServicePlan, tuple[PlannedCluster, ...]]]


NOT_RENDERED = Rendered((), (), (), ())


class Rendering(NamedTuple):
    """What all objects give. `inlined`: clusters in CDS because the EDS budget is spent."""

    files: dict[str, File]
    warnings: tuple[str, ...]
    clusters: dict[str, int]
    inlined: tuple[str, ...]


def inotify_budget() -> int:
    """How many EDS files are safe: a quarter of the instances that a user may have on this node.

    Each is an inotify instance to Envoy, two while its cluster warms, and all Envoys of one user
    on the node share the limit. Envoy aborts when it is passed.
    """
    try:
        with open(MAX_USER_INSTANCES, encoding="ascii") as file:
            return int(file.read()) // 4
    except (OSError, ValueError):
        return 128 // 4  # the kernel's default


def eds_clusters(files: Files) -> set[str]:
    """The clusters that are on EDS in the files that a loader left: `on_eds` of a Translator."""
    return rendered_clusters(files, b"EDS")


def inline_clusters(files: Files) -> set[str]:
    """The clusters with endpoints in CDS itself: `on_inline` of a Translator."""
    return rendered_clusters(files, b"STATIC")


def rendered_clusters(files: Files, kind: bytes) -> set[str]:
    """The names of the clusters of a type, from our own CDS: no YAML parser is needed for that."""
    found = set()
    in_json = rb'^\{"@type":"[^"]*","name":("(?:[^"\\]|\\.)*"),"type":"%s"'
    for path, pattern in (("cds.yaml", rb"^  name: (.+)\n  type: %s$"), ("cds.json", in_json)):
        content = files[path].content if path in files else b""
        for name in re.findall(pattern % kind, content, re.MULTILINE):
            try:
                found.add(json.loads(name) if name[:1] == b'"' else name.decode())
            except ValueError:
                pass  # of a ConfigMap's file that hides ours
    return found


class SliceIndex:
    """The slices of each Service; with thousands of them only what changed is looked at."""

    def __init__(self) -> None:
        self._seen: dict[Key, EndpointSlice] = {}
        self._of: dict[Key, dict[Key, EndpointSlice]] = {}

    def update(self, slices: Mapping[Key, EndpointSlice]) -> Iterator[Key]:
        """Take all slices; yield the Services of those that came, went or changed."""
        for key in self._seen.keys() - slices.keys():
            yield self._forget(key)
        for key, found in slices.items():
            old = self._seen.get(key)
            if old is found or old == found:
                continue
            if old:
                yield self._forget(key)
            service = (found.namespace, found.service)
            self._of.setdefault(service, {})[key] = self._seen[key] = found
            yield service

    def _forget(self, key: Key) -> Key:
        found = self._seen.pop(key)
        service = (found.namespace, found.service)
        del self._of[service][key]
        if not self._of[service]:
            del self._of[service]
        return service

    def of(self, service: Key) -> tuple[EndpointSlice, ...]:
        return tuple(self._of.get(service, {}).values())


class Translator:
    """Renders Services again and again; a change in one of them renders that one.

    `endpoints` is the mode, `fmt` "yaml" or "json", `current_dir` the absolute path under which
    Envoy reads, `budget` as inotify_budget() has it. `on_eds` and `on_inline` are the clusters
    that the files on disk had in that mode when the loader started: they stay, within the budget.
    """

    def __init__(
        self,
        config: Config,
        *,
        endpoints: str,
        fmt: str,
        current_dir: str,
        node_name: str,
        budget: int,
        on_eds: Iterable[str] = (),
        on_inline: Iterable[str] = (),
    ) -> None:
        if config.prefer_zone is True and not node_name:
            raise config_error(
                "$.endpoint.prefer_zone", "true needs the name of the own Node in $NODE_NAME"
            )
        self._config, self._endpoints, self._node_name = config, endpoints, node_name
        self._planner, self._writer = ClusterPlanner(config, endpoints), ResourceWriter(fmt)
        self._fmt = fmt
        self._directory = f"{current_dir.rstrip('/')}/"
        self._budget = config.eds_budget if config.eds_budget is not None else budget
        self._modes = initial_modes(sorted(on_eds)[: self._budget], on_inline)
        self._services: Mapping[Key, Service] | None = None
        self._plans: dict[Key, ServicePlan] = {}
        self._kept: KeptClusters = {}
        self._plan_warnings: tuple[str, ...] = ()
        self._routes = b""
        self._slices = SliceIndex()
        self._legacy: Mapping[Key, tuple[EndpointSlice, ...]] = {}
        self._touched: set[Key] = set()  # Services to be looked at again
        self._rendered: dict[Key, Rendered] = {}
        self._hosts: dict[str, HostBlock] = {}
        self._files: dict[str, File] = {}
        self._placement = Placement(config, own_zone(config, node_name, {}), {})

    def render(self, objects: Objects, *, other_files: int = 0) -> Rendering:
        """Render all; `other_files` EDS, RDS and SDS files of other sources share the budget."""
        warnings: list[str] = []
        self._see_nodes(objects.nodes, warnings)
        if objects.services != self._services:
            self._plan(objects.services, other_files)
        self._touched.update(self._slices.update(objects.slices))
        if objects.endpoints != self._legacy:
            self._legacy = dict(objects.endpoints)
            self._touched.update(self._kept)
        for key in self._touched & self._kept.keys():
            self._rendered[key] = self._service(key)
        self._touched = set()
        clusters = [cluster for one in self._rendered.values() for cluster in one.clusters]
        files = {cluster.path: cluster.file for cluster in clusters if cluster.file}
        blocks = [cluster.block for cluster in clusters]
        cds, rds = f"cds.{self._fmt}", f"rds.{self._fmt}"
        files[cds] = self._file(cds, self._writer.file(CDS_COMMENT, CLUSTER_TYPE, blocks))
        files[rds] = self._file(rds, self._routes)
        self._files = files
        warnings += self._plan_warnings
        warnings += [warning for one in self._rendered.values() for warning in one.warnings]
        modes = [cluster.mode for cluster in clusters]
        counts = {mode: modes.count(mode) for mode in (EDS, INLINE, DNS)}
        inlined = [cluster.name for cluster in clusters if cluster.mode == INLINE]
        if self._endpoints != AUTO:
            inlined = []
        return Rendering(files, tuple(sorted(set(warnings))), counts, tuple(inlined))

    def _see_nodes(self, nodes: Mapping[str, Node], warnings: list[str]) -> None:
        """Take the Nodes; forget the Services with endpoints on those that changed."""
        if not needs_nodes(self._config):
            return
        old = self._placement
        zone = own_zone(self._config, self._node_name, nodes)
        if zone is None and self._config.prefer_zone:
            warnings.append(
                f"node {self._node_name}: is not known or has no zone: "
                f"endpoint.prefer_zone prefers none"
            )
        if zone == old.zone and nodes == old.nodes:
            return
        changed = {name for name in {*nodes, *old.nodes} if nodes.get(name) != old.nodes.get(name)}
        for key, one in self._rendered.items():
            if zone != old.zone or any(
                endpoint.node in changed for found in one.slices for endpoint in found.endpoints
            ):
                self._rendered[key] = one._replace(inputs=())
                self._touched.add(key)
        self._placement = Placement(self._config, zone, dict(nodes))

    def _plan(self, services: Mapping[Key, Service], other_files: int) -> None:
        """What follows from the Services alone: which clusters exist, their modes, the routes."""
        plans = {}
        for key in sorted(services):
            plan = self._plans.get(key)
            if plan is None or plan.service != services[key]:
                plan = self._planner.plan(services[key])
            plans[key] = plan
        warnings = [warning for plan in plans.values() for warning in plan.warnings]
        kept = unique_clusters(plans, warnings)
        self._modes = self._decided(kept, other_files)
        self._routes = self._route_configuration(kept, warnings)
        self._services, self._plans, self._kept = dict(services), plans, kept
        self._plan_warnings = tuple(warnings)
        self._rendered = {key: self._rendered.get(key, NOT_RENDERED) for key in kept}
        self._touched.update(kept)

    def _decided(self, kept: KeptClusters, other_files: int) -> dict[str, str]:
        """The mode of each cluster by slices: once decided it stays as long as the cluster lives.

        A cluster that flips would be a new one to Envoy, with new connections and health.
        """
        names = [
            cluster.name
            for _, clusters in kept.values()
            for cluster in clusters
            if not cluster.host
        ]
        if self._endpoints != AUTO:
            return dict.fromkeys(names, self._endpoints)
        modes = {name: self._modes[name] for name in names if name in self._modes}
        free = self._budget - sum(mode == EDS for mode in modes.values())
        if self._config.eds_budget is None:
            free -= other_files
        for name in names:
            if name not in modes:
                modes[name] = EDS if free > 0 else INLINE
                free -= 1
        return modes

    def _service(self, key: Key) -> Rendered:
        """A Service as rendered; anew only if something that it is made of changed."""
        plan, clusters = self._kept[key]
        slices = self._slices.of(key) or self._legacy.get(key, ())
        modes = [self._modes.get(cluster.name, DNS) for cluster in clusters]
        inputs = (plan, clusters, modes, slices)
        if self._rendered[key].inputs == inputs:
            return self._rendered[key]
        service, placer = plan.service, self._placement.places(slices)
        by_slices = [cluster for cluster in clusters if not cluster.host]
        warnings = list(endpoint_warnings(service, by_slices, slices, self._config.families))
        rendered = []
        for cluster, mode in zip(clusters, modes, strict=True):
            if mode == DNS:
                assignment = dns_assignment(cluster, service, slices)
                if "endpoints" not in assignment:
                    warnings.append(
                        f"{service}: the number of its target port "
                        f"{cluster.port.target} is not known, so there is no endpoint"
                    )
            else:
                assignment = assignment_of(cluster, slices, placer)
            rendered.append(self._cluster(service, cluster, mode, assignment))
        return Rendered(inputs, tuple(rendered), tuple(warnings), slices)

    def _cluster(
        self, service: Service, cluster: PlannedCluster, mode: str, assignment: dict[str, Json]
    ) -> RenderedCluster:
        path, file = "", None
        resource: dict[str, Json] = {"@type": CLUSTER_TYPE, "name": cluster.name, "type": "EDS"}
        if mode == EDS:
            path = f"eds/{cluster.stem}.{self._fmt}"
            block = self._writer.items([{"@type": ASSIGNMENT_TYPE, **assignment}])
            comment = f"Endpoints of {service}, port {cluster.port.label}.\n{MADE_BY}"
            file = self._file(path, self._writer.file(comment, ASSIGNMENT_TYPE, [block]))
            resource["eds_cluster_config"] = {
                "eds_config": {
                    "resource_api_version": "V3",
                    "path_config_source": {"path": self._directory + path},
                }
            }
        else:
            resource["type"] = cluster.dns_type or "STATIC"
            resource["load_assignment"] = assignment
        block = self._writer.items([{**resource, **cluster.options}])
        return RenderedCluster(cluster.name, mode, block, path, file)

    def _route_configuration(self, kept: KeptClusters, warnings: list[str]) -> bytes:
        """The RouteConfiguration; the virtual hosts of a host are made anew if its routes are."""
        routes: dict[str, list[ServiceRoute]] = {}
        for plan, clusters in kept.values():
            route = plan.route
            if route and clusters is not plan.clusters:
                route = route_to(route, clusters)
            if route:
                for host in route.hosts:
                    routes.setdefault(host, []).append(route)
            elif plan.route:
                warnings.append(f"{plan.service}: is not routed: it has no cluster of its own")
        hosts = {}
        for host in sorted(routes):
            block = self._hosts.get(host)
            if block is None or block.routes != tuple(routes[host]):
                block = self._host(host, tuple(routes[host]))
            hosts[host] = block
            warnings += block.warnings
        self._hosts = hosts
        resource = self._writer.nested(
            {"@type": ROUTE_TYPE, "name": self._config.route_name},
            "virtual_hosts",
            [block.block for block in hosts.values()],
        )
        comment = RDS_COMMENT.format(prefix=self._config.annotation_prefix)
        return self._writer.file(comment, ROUTE_TYPE, [resource])

    def _host(self, host: str, routes: tuple[ServiceRoute, ...]) -> HostBlock:
        warnings: list[str] = []
        found = virtual_hosts(host, routes, warnings)
        return HostBlock(routes, self._writer.items(found, "  "), tuple(warnings))

    def _file(self, path: str, content: bytes) -> File:
        """The file; the very one of last time where nothing changed, so nobody looks further."""
        old = self._files.get(path)
        return old if old and old.content == content else file_of(content, SERVICES_SOURCE)


def initial_modes(on_eds: Iterable[str], on_inline: Iterable[str]) -> dict[str, str]:
    """What the files on disk say. Without one EDS file they are no decision of `auto`."""
    modes = dict.fromkeys(on_eds, EDS)
    return dict.fromkeys(on_inline, INLINE) | modes if modes else {}


def unique_clusters(plans: Mapping[Key, ServicePlan], warnings: list[str]) -> KeptClusters:
    """Of two clusters of one name the first exists; Envoy would take the last, without a word."""
    taken: dict[str, Service] = {}
    kept = {}
    for key, plan in plans.items():
        clusters = []
        for cluster in plan.clusters:
            if cluster.name in taken:
                warnings.append(
                    f"{plan.service}: port {cluster.port.label} is left out: the "
                    f"cluster name {cluster.name} is {taken[cluster.name]}'s"
                )
                continue
            taken[cluster.name] = plan.service
            clusters.append(cluster)
        whole = len(clusters) == len(plan.clusters)
        kept[key] = (plan, plan.clusters if whole else tuple(clusters))
    return kept


def route_to(route: ServiceRoute, clusters: Sequence[PlannedCluster]) -> ServiceRoute | None:
    """The route to those of its clusters that there are."""
    names = {cluster.name for cluster in clusters}
    if route.cluster not in names:
        return None
    ports = tuple(pair for pair in route.ports if pair[1] in names)
    return route if ports == route.ports else route._replace(ports=ports)

# ---------------------------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------------------------
#
# A TLS Secret becomes SDS files. Envoy accepts one Secret resource a file (it rejects a second
# one), so the pair and the trusted CA are two files. The PEM is inline, not by file name:
# certificate and key are then replaced by the one rename(2) of the snapshot, and Envoy never reads
# one without the other.
#
# No text made here (error, problem, repr, redaction) has a byte of a key in it: messages are
# literals plus names, and OpenSSL's reason codes, which are constants.

SDS_TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
NAME_PART = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
OBJECT_NAME = rf"(?=.{{1,253}}\Z){NAME_PART}(?:\.{NAME_PART})*"  # an RFC 1123 subdomain
# OpenSSL's reasons for a key of another certificate: of the same type; of another one.
KEY_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
FILE_NAME_BYTES = 255  # NAME_MAX of every file system that we know


class Secret(NamedTuple):
    """What a Secret holds for Envoy: PEM bytes, empty where the key is absent."""

    namespace: str
    name: str
    cert: bytes  # tls.crt: the leaf first, then its intermediates
    key: bytes  # tls.key
    ca: bytes  # ca.crt

    def __repr__(self) -> str:
        """The name alone: a value that gets into a message or a traceback shows nothing."""
        return f"Secret({self.namespace}/{self.name})"


def secret_from(obj: Json) -> Secret:
    """Reduce an API object to what is used of it.

    The raw object must not be kept: its annotation `last-applied-configuration` often holds the
    key a second time. Raises ValueError, without content, for what is not a valid Secret.
    """
    metadata, held = json_object(obj.get("metadata")), json_object(obj.get("data"))
    namespace, name = str(metadata.get("namespace", "")), str(metadata.get("name", ""))
    if not (re.fullmatch(OBJECT_NAME, namespace) and re.fullmatch(OBJECT_NAME, name)):
        raise ValueError("a secret without a valid namespace and name")
    cert, key, ca = (
        decode_key(held.get(entry), f"secret {namespace}/{name}: {entry}")
        for entry in ("tls.crt", "tls.key", "ca.crt")
    )
    return Secret(namespace, name, cert, key, ca)


def decode_key(text: Json, what: str) -> bytes:
    """Base64 as Go reads it (line breaks do not count), b"" for an absent or null key."""
    try:
        return base64.b64decode((text or "").replace("\r", "").replace("\n", ""), validate=True)
    except (AttributeError, ValueError):  # not chained: the text of the cause may quote it
        raise ValueError(f"{what} is not base64") from None


def secret_files(
    secret: Secret, form: str = "yaml", mode: int = 0o600
) -> tuple[dict[str, File], tuple[str, ...]]:
    """The SDS files of a Secret, by path in the snapshot, and what is wrong with it.

    It is all or nothing: with a problem there are no files, and the caller keeps the last ones. A
    new CA beside an old certificate would be a mixture that nobody wrote. Both files have `mode`:
    it is widened where Envoy runs as another user, and Envoy needs both.

    `version_info` is a hash over the key too, so every rotation shows in Envoy's `version_text`.
    It gives nothing away: SHA-256 of a key that nobody can guess is not invertible.
    """
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
        resources[f"{stem}.{form}"] = {"name": label, "tls_certificate": pair}
    if secret.ca:
        context = {"trusted_ca": pem_source(secret.ca)}
        resources[f"{stem}_ca.{form}"] = {"name": f"{label}/ca", "validation_context": context}
    source = f"secret {label}"
    return {
        path: file_of(resource_file(form, source, SDS_TYPE, [resource]), source, mode)
        for path, resource in resources.items()
    }, ()


def pem_source(pem: bytes) -> dict[str, str]:
    """A DataSource of exactly these bytes: text where every parser reads the same, else base64."""
    if re.fullmatch(rb"[\n -~]*", pem):
        return {"inline_string": pem.decode("ascii")}
    return {"inline_bytes": base64.b64encode(pem).decode("ascii")}


# What is checked before a Secret is published: whatever Envoy would reject, as far as the standard
# library can tell, and nothing that Envoy would accept.


def secret_problems(secret: Secret) -> list[str]:
    """Why this Secret must not be published; empty when it may."""
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
    """What is wrong with a chain or with a bundle of CAs, "" if nothing.

    Every block is an X.509 certificate to OpenSSL; text around the blocks is a comment.
    """
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
    except binascii.Error:
        return "is not readable (a PEM block is not base64)"
    except (ssl.SSLError, ValueError):  # ValueError: an empty block
        return "is not readable (a PEM block is not an X.509 certificate)"
    return "" if parts else "holds no PEM certificate"


def pair_problem(cert: bytes, key: bytes) -> str:
    """What is wrong with the key of a certificate, "" if nothing.

    OpenSSL reads pairs from files only: anonymous memory has a name in /proc, and the key touches
    no disk. Where there is none (macOS, no /proc) the pair goes to Envoy unchecked, which rejects
    a bad one itself and keeps the last.
    """
    if not hasattr(os, "memfd_create"):
        return ""
    descriptors: list[int] = []
    try:
        for pem in (cert, key):
            descriptors.append(os.memfd_create("pem"))
            with open(descriptors[-1], "wb", closefd=False) as file:
                file.write(pem)
        names = [f"/proc/self/fd/{descriptor}" for descriptor in descriptors]
        tls_context().load_cert_chain(names[0], names[1], no_passphrase)
    except EncryptedKey:
        return "is encrypted, and Envoy is given no passphrase"
    except ssl.SSLError as error:
        if error.reason in KEY_MISMATCHES:
            return "is not the key of the first certificate in tls.crt"
        return "is not readable as a PEM private key"
    except OSError:  # after SSLError, which is one
        return ""
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return ""


class EncryptedKey(Exception):
    """OpenSSL asked for a passphrase."""


def no_passphrase() -> str:
    """Without a callback OpenSSL would prompt on the terminal and block the loader."""
    raise EncryptedKey


def tls_context() -> ssl.SSLContext:
    """A context that judges form and not strength: Envoy decides what is too weak."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


# What --dry-run and --diff print, and how a crash writes nothing.


def holds_secret(content: bytes) -> bool:
    """Whether a file must not be shown: an SDS resource from whatever source, or a private key.

    PEM in base64 (`inline_bytes`) counts as well; that this hides some certificates does no harm.
    """
    marks = (b"PRIVATE KEY-----", b"transport_sockets.tls.v3.Secret", b"LS0tLS1CRUdJTi")
    return any(mark in content for mark in marks)


def redacted(content: bytes, published: bytes | None = None) -> bytes:
    """The content to print: itself, or a line in its place.

    The line has no hash, which would let a reader test guesses at a password in an SDS file. With
    `published`, the bytes on disk, it tells whether they differ, so that a diff shows it.
    """
    if not holds_secret(content):
        return content
    differs = published is not None and published != content
    return f"# [redacted: {len(content)} bytes{', changed' if differs else ''}]\n".encode()


def no_core_dumps() -> None:
    """Keep keys out of core files. To be called when --secret is given.

    The limit is 1 and not 0: core(5) says that 0 does not hold where core_pattern is a pipe; the
    kernel takes 1 for "not even then".
    """
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard != 0:  # 0 is all that is left to set where somebody forbade them before us
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


# ---------------------------------------------------------------------------------------------
# Composition: sources become one set of files
# ---------------------------------------------------------------------------------------------


class ConfigMap(NamedTuple):
    """A ConfigMap as files by key, and what in it cannot be one."""

    namespace: str
    name: str
    files: tuple[tuple[str, File], ...]
    problems: tuple[str, ...]


def configmap_from(item: dict[str, Any]) -> ConfigMap:
    """Reduce a ConfigMap: `data` and `binaryData`, byte for byte. ValueError if it is none."""
    namespace, name = object_key(item)
    source = f"configmap {namespace}/{name}"
    contents: dict[str, bytes] = {}
    problems = []
    text, binary = item.get("data") or {}, item.get("binaryData") or {}
    if not isinstance(text, dict) or not isinstance(binary, dict):
        raise ValueError(f"{source}: data is no map")
    for key, value in [*text.items(), *binary.items()]:
        problem = key_problem(key)
        try:
            contents[key] = value.encode() if key in text else decode_key(value, key)
        except (AttributeError, ValueError):
            problem = "is no text" if key in text else "is no base64"
        if problem:
            contents.pop(key, None)
            problems.append(f"{source}: key {key!r} {problem}, left out")
    files = ((key, file_of(contents[key], source)) for key in sorted(contents))
    return ConfigMap(namespace, name, tuple(files), tuple(problems))


def key_problem(name: str) -> str:
    """Why a key (or a part of a path) cannot be a file name here; empty if it can.

    The API server checks keys, but --from-file does not come from there, and nothing may ever
    leave the output directory. Names that begin with `..` are the loader's own.
    """
    if not re.fullmatch(KEY, name):
        return "is no file name"
    return "begins with '..'" if name.startswith("..") else ""


KEY = r"(?!\.\Z)[-._a-zA-Z0-9]{1,253}"


class Named(NamedTuple):
    """A ConfigMap or Secret that an option names, and the directory its files go to."""

    kind: str
    namespace: str
    name: str
    directory: str = ""

    @property
    def source(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"

    def owns(self, path: str, file: File) -> bool:
        """Whether a file found on disk came from here."""
        directory, _, _ = path.rpartition("/")
        return file.source == self.source and (self.kind == "secret" or directory == self.directory)


def placed(files: Iterable[tuple[str, File]], directory: str) -> dict[str, File]:
    return {f"{directory}/{name}" if directory else name: file for name, file in files}


def overlaid(layers: Iterable[Files]) -> tuple[dict[str, File], list[str]]:
    """All files of the layers, the later ones winning, and a warning for each that lost.

    A file where another has a directory cannot be on disk beside it: it is left out.
    """
    files: dict[str, File] = {}
    warnings = []
    for layer in layers:
        for path, file in layer.items():
            lost = files.get(path)
            if lost is not None and lost.source != file.source:
                warnings.append(f"{path} of {lost.source} is hidden by that of {file.source}")
            files[path] = file
    directories = {parent for path in files for parent in parents(path)}
    for path in sorted(directories & files.keys()):
        source = files.pop(path).source
        warnings.append(f"{path} of {source} left out: others have a directory there")
    return files, warnings


def parents(path: str) -> Iterator[str]:
    """The directories above a relative path, nearest first."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path

# ---------------------------------------------------------------------------------------------
# Ordering: make before break
# ---------------------------------------------------------------------------------------------
#
# A route to a cluster that is not there yet answers 503, and so does a route to one that is gone
# already (measured: 547 and 709 of 76,000 requests). So a change that needs it goes out as up to
# four snapshots, each complete:
#
#   1. children: files that others name (EDS, SDS, the RDS of a new listener), and all that needs
#      no order;
#   2. clusters: CDS with the old and the new ones;
#   3. references: what names clusters (RDS), then what names that (LDS);
#   4. removals: CDS without the old clusters, and files whose source is gone.
#
# Everything here follows from what is published and what is desired, so a loader that was killed
# between two steps goes on where it was.

TYPE_URL = b"type.googleapis.com/"
KINDS = {
    b"envoy.config.cluster.v3.Cluster": "cds",
    b"envoy.config.listener.v3.Listener": "lds",
    b"envoy.config.endpoint.v3.ClusterLoadAssignment": "eds",
    b"envoy.config.route.v3.RouteConfiguration": "rds",
    b"envoy.config.route.v3.ScopedRouteConfiguration": "scoped_rds",
    b"envoy.config.route.v3.VirtualHost": "vhds",
    b"envoy.extensions.transport_sockets.tls.v3.Secret": "sds",
    b"envoy.service.runtime.v3.Runtime": "rtds",
    b"envoy.config.core.v3.TypedExtensionConfig": "ecds",
}
TYPE_NAME = rb"[A-Za-z0-9_.]+"
# Kinds that name clusters; the number is their place in one snapshot, children first.
REFERRERS = {"ecds": 2, "vhds": 2, "rds": 2, "scoped_rds": 3, "lds": 4}
NOTIFY_RANK = {"cds": 1, **REFERRERS}


PUT_BACK = "put back"  # the reason of a step that undoes what Envoy refused


class Step(NamedTuple):
    """One snapshot on the way: what stands afterwards, and what is new in it."""

    files: dict[str, File]
    stage: int  # 1 children, 2 clusters, 3 references, 4 removals
    changed: tuple[str, ...]  # new and changed paths, in the order of notification
    removed: tuple[str, ...]
    reason: str  # in words, for the log


class Refusal(NamedTuple):
    """Bytes that Envoy refused: not tried again until the desired bytes are others."""

    digest: str  # of the desired file
    reason: str
    shown: str = ""  # of the file as it was published: another one when clusters were united


class Item(NamedTuple):
    """One resource of a file, as far as it can be told without a YAML parser."""

    name: str  # `name`, or `cluster_name` of a ClusterLoadAssignment
    stat_name: str  # `alt_stat_name` where there is one: the name in Envoy's statistics
    text: str  # its lines in YAML; canonical in JSON: equal texts are equal resources


class Document(NamedTuple):
    """A DiscoveryResponse in parts: enough to list, compare and unite its resources."""

    form: str  # "json" | "yaml"
    version: str  # version_info, "" without
    items: tuple[Item, ...]
    head: str  # YAML: the lines before `resources:`; JSON: ""
    tail: str  # YAML: the lines after the list
    dash: str  # YAML: the indentation of the list's dashes
    fields: dict[str, Any]  # JSON: the whole object


def kind_of(content: bytes) -> str:
    """What a file configures: "cds", "lds", "eds", "rds", "sds", ... or "" if it is not xDS.

    The first v3 type URL of an xDS resource decides; other URLs (a wrapper, an extension) are
    passed over.
    """
    at = content.find(TYPE_URL)
    while at >= 0:
        at += len(TYPE_URL)
        name = re.compile(TYPE_NAME).match(content, at)
        if name is not None and name.group() in KINDS:
            return KINDS[name.group()]
        at = content.find(TYPE_URL, at)
    return ""


KINDS_KNOWN: dict[str, str] = {}  # by digest: asked for every file at every change


def kind_of_file(file: File) -> str:
    """kind_of() its content, remembered."""
    kind = KINDS_KNOWN.get(file.digest)
    if kind is None:
        if len(KINDS_KNOWN) >= 8_000:
            KINDS_KNOWN.clear()
        kind = KINDS_KNOWN[file.digest] = kind_of(file.content)
    return kind


def kind_at(path: str, *snapshots: Files) -> str:
    """The kind of the file at `path`, from the first snapshot that tells.

    A CDS file with no cluster left has no type URL. What stood there before tells what it is,
    else its name.
    """
    for files in snapshots:
        if path in files and (kind := kind_of_file(files[path])):
            return kind
    stem = path.rpartition("/")[2].partition(".")[0]
    return stem if stem in NOTIFY_RANK else ""


# -- what is in a file, without a YAML parser --------------------------------------------------


@functools.lru_cache(maxsize=4)
def document_of(content: bytes) -> Document | None:
    """The parts of a DiscoveryResponse, or None where they cannot be told from its text.

    JSON is read exactly. Of YAML only what block style makes plain is read: a top-level list
    `resources:` whose items carry their names at their own first level. Flow style, anchors and
    merge keys give None: better unknown than wrong.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    try:
        return json_document(text) if text.lstrip().startswith("{") else yaml_document(text)
    except RecursionError:  # nested 1,000 deep: protobuf, and so Envoy, stops at 100
        return None


def json_document(text: str) -> Document | None:
    """The parts of a DiscoveryResponse in JSON; None if it is not JSON (flow-style YAML, say)."""
    try:
        fields = json.loads(text)
        if "\\u" in text:  # half a surrogate pair is valid JSON, and no text: Envoy refuses it
            json.dumps(fields, ensure_ascii=False).encode()
    except ValueError:
        return None
    resources = fields.get("resources", [])
    if not isinstance(resources, list) or not all(isinstance(each, dict) for each in resources):
        return None
    version = fields.get("version_info", fields.get("versionInfo", ""))
    items = tuple(map(json_item, resources))
    return Document("json", version if isinstance(version, str) else "", items, "", "", "", fields)


def json_item(resource: dict[str, Any]) -> Item:
    """One resource of a JSON file; unnamed if its name is in none of the known places."""

    def first(*keys: str) -> str:
        return next((v for key in keys if isinstance(v := resource.get(key), str)), "")

    name = first("name", "cluster_name", "clusterName")
    text = json.dumps(resource, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return Item(name, first("alt_stat_name", "altStatName"), text)


YAML_FIELD = (
    r"""(?:"(?P<double>[^"\\]*)"|'(?P<single>[^']*)'|(?P<plain>[^\s:#'"&*!|>%@`{}\[\],][^\s:#]*))"""
    r"""[ ]*:(?:[ ]+(?P<value>.*))?$"""
)
YAML_DOUBLE = r"""("(?:[^"\\]|\\.)*")\s*(?:#.*)?$"""
YAML_SINGLE = r"""'((?:[^']|'')*)'\s*(?:#.*)?$"""
YAML_PLAIN = r"""([^\s"'#&*!|>%@`{}\[\],](?:[^#]|(?<=\S)#)*?)\s*(?:(?<=\s)#.*)?$"""


def yaml_document(text: str) -> Document | None:
    """The parts of a DiscoveryResponse in block-style YAML.

    Patterns begin with a line break rather than with `^`: twenty times as fast on 1 MiB.
    """
    text = "\n" + first_document("\n" + text.replace("\r\n", "\n"))
    fields: dict[str, tuple[re.Match[str], str | None]] = {}
    for line in re.finditer(r"\n([^\s#-].*)", text):
        if field := yaml_field(line[1]):
            fields.setdefault(field[0], (line, field[1]))
    line_and_value = fields.get("resources")
    if line_and_value is None or line_and_value[1] not in ("", "[]"):
        return None
    line, value = line_and_value
    version = fields["version_info"][1] or "" if "version_info" in fields else ""
    head, body = text[: line.start()].strip("\n"), text[line.end() :]
    if value == "[]":
        return Document("yaml", version, (), head, body.strip("\n"), "", {})
    dash, blocks, tail = yaml_blocks(body)
    items = [item for block in blocks if (item := yaml_item(block, dash))]
    if not blocks or len(items) != len(blocks):
        return None
    return Document("yaml", version, tuple(items), head, tail, dash, {})


def first_document(text: str) -> str:
    """The first YAML document of a stream, the only one that Envoy reads."""
    start = 0
    for mark in re.finditer(r"\n(?:---|\.\.\.)(?![^ \t\n])", text):
        before = text[start : mark.start()].split("\n")
        if any(line.strip() and line[0] not in "#%" for line in before):
            return text[start : mark.start()]
        start = mark.end()
    return text[start:]


def yaml_blocks(body: str) -> tuple[str, list[str], str]:
    """A block sequence as (indentation of its dashes, the text of each item, what follows it)."""
    first = re.match(r"(?:\n[ ]*(?:#.*)?)*\n([ ]*)-(?![^ \n])", body)
    if first is None:
        return "", [], body
    dash = first[1]
    item = rf"\n{dash}-(?![^ \n])"
    end = re.search(rf"\n(?!{dash} )(?!{dash}-(?![^ \n]))[ ]*[^ #\n]", body)
    tail = body[end.start() + 1 :] if end else ""
    body = body[: end.start()] if end else body
    starts = [found.start() + 1 for found in re.finditer(item, body)]
    ends = [*starts[1:], len(body)]
    return dash, [body[one:two].rstrip() for one, two in zip(starts, ends, strict=True)], tail


def yaml_item(text: str, dash: str) -> Item | None:
    """One item of the list; None if its name is not plain to see."""
    opening = re.compile(r"-\s*").match(text, len(dash))
    if opening is None:
        return None
    if text.startswith("{", opening.end()):  # JSON within YAML, as `united` writes it
        try:
            item = json_item(json.loads(text[opening.end() :]))
            item.text.encode()  # ValueError for half a surrogate pair
            return item
        except ValueError:
            return None
    pad = " " * (opening.end() - 1 - text.rfind("\n", 0, opening.end()))
    values: dict[str, str | None] = {}
    for line in re.finditer(rf"\n{pad}([^\s#-].*)", f"\n{pad}{text[opening.end() :]}"):
        field = yaml_field(line[1])
        if field is None or field[0] == "<<":
            return None
        values.setdefault(*field)
    name = values.get("name") or values.get("cluster_name") or values.get("clusterName")
    if not name:
        return None
    stat_name = values.get("alt_stat_name") or values.get("altStatName") or ""
    return Item(name, stat_name, text)


def yaml_field(line: str) -> tuple[str, str | None] | None:
    """`key: value` as (key, value); None for the value if it is no scalar on this line."""
    found = re.match(YAML_FIELD, line)
    if found is None:
        return None
    key = found["double"] or found["single"] or found["plain"] or ""
    value = (found["value"] or "").rstrip()
    if value == "" or value.startswith("#"):
        return key, ""
    if value == "[]":
        return key, value
    if double := re.match(YAML_DOUBLE, value):
        try:
            return key, str(json.loads(double[1])).encode().decode()
        except ValueError:  # an escape that only YAML knows, or half a surrogate pair
            return key, None
    if single := re.match(YAML_SINGLE, value):
        return key, single[1].replace("''", "'")
    plain = re.match(YAML_PLAIN, value)
    return key, plain[1] if plain else None


def clusters_in(file: File) -> frozenset[str] | None:
    """The names of the clusters of a CDS file; None if its text does not tell."""
    document = document_of(file.content)
    if document is None or not all(item.name for item in document.items):
        return None
    return frozenset(item.name for item in document.items)


TOKEN = rb"[^\s\"'{}\[\],]+"


def tokens_in(content: bytes) -> frozenset[str]:
    """Every word of a text that could be a name, with JSON's escapes undone where there are any."""
    words = {word.strip(b":") for word in re.findall(TOKEN, content)}
    if b"\\" in content:
        strings = re.findall(rb'"(?:[^"\\]|\\.)*\\.(?:[^"\\]|\\.)*"', content)
        words.update(unescaped(each) for each in strings)
    return frozenset(word.decode("utf-8", "replace") for word in words)


def unescaped(quoted: bytes) -> bytes:
    """The value of a string in double quotes; as it stands if JSON does not know its escapes."""
    try:
        return str(json.loads(quoted)).encode()
    except ValueError:
        return quoted


def references(content: bytes, names: Iterable[str]) -> bool:
    """Whether a text names one of these clusters: as a whole word, and rather once too often.

    A route that takes its cluster from a header or a plugin names none: nobody can tell.
    """
    return bool(named_in(content, frozenset(names)))


def named_in(content: bytes, names: frozenset[str]) -> frozenset[str]:
    """Those of the clusters that a text names."""
    found = names & tokens_in(content) if names else names
    return found | {name for name in names - found
                    if not is_word(name) and name.encode() in content}


def is_word(name: str) -> bool:
    """Whether a name is found as one token; one with a space or a quote is not."""
    return name == name.strip(":") and re.fullmatch(TOKEN, name.encode()) is not None


def names_file(content: bytes, path: str) -> bool:
    """Whether a text names the file at `path`, under whatever directory Envoy mounts ours."""
    return re.search(rb"/" + re.escape(path.encode()) + rb"(?![\w./-])", content) is not None


def possible_clusters(files: Files) -> frozenset[str]:
    """All clusters that the CDS files may hold: where a text does not tell, each of its words."""
    names: frozenset[str] = frozenset()
    for path, file in files.items():
        if kind_at(path, files) == "cds":
            names |= possible_names(file)
    return names


def possible_names(file: File) -> frozenset[str]:
    """The clusters of one CDS file, or each of its words."""
    known = clusters_in(file)
    return tokens_in(file.content) if known is None else known


# -- old and new clusters together -------------------------------------------------------------


def unite(old: File, new: File, keep: frozenset[str] | None = None) -> File:
    """CDS with the clusters of both; of two with one name the new one.

    keep: the old clusters to take along; None for all. Only what can be read exactly is united:
    JSON, and YAML that the loader rendered. Else it is `new`, and only the order of the files
    holds. The same inputs give the same bytes, and unite(unite(a, b), b) == unite(a, b).
    """
    one, two = exact_document(old), exact_document(new)
    if one is None or two is None:
        return new
    names = {item.name for item in two.items}
    former = [item for item in one.items if item.name not in names]
    extra = [item for item in former if keep is None or item.name in keep]
    if not extra:
        return new
    if len(extra) == len(former) and {item.text for item in two.items} <= {
        item.text for item in one.items
    }:
        return old  # nothing new: the old file is the union
    content = united(one, two, extra)
    return new if content is None else file_of(content, new.source, new.mode)


def exact_document(file: File) -> Document | None:
    """A file's parts where its text tells them beyond doubt, names included."""
    document = document_of(file.content)
    if document is None or not all(item.name for item in document.items):
        return None
    return document if document.form == "json" or file.source == "services" else None


def united(one: Document, two: Document, extra: list[Item]) -> bytes | None:
    """The bytes of `two` with the `extra` items of `one`; None if their forms do not mix."""
    texts = [item.text for item in (*two.items, *extra)]
    version = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    if two.form == "json":
        if one.form != "json":
            return None
        fields = {key: value for key, value in two.fields.items() if key != "versionInfo"}
        fields |= {"version_info": version, "resources": list(map(json.loads, texts))}
        return (json.dumps(fields, separators=(",", ":"), ensure_ascii=False) + "\n").encode()
    dash = two.dash if two.items else one.dash
    if one.form == "yaml" and one.dash != dash:
        return None
    kept = [line for line in two.head.split("\n") if not line.startswith("version_info:")]
    blocks = [f"{dash}- {text}" if text.startswith("{") else text for text in texts]
    lines = [*kept, f'version_info: "{version}"', "resources:", *blocks, two.tail]
    return ("\n".join(lines).strip("\n") + "\n").encode()


# -- the steps ---------------------------------------------------------------------------------


def standing(files: Files, path: str, file: File) -> bool:
    """Whether `files` has this very file at `path`: bytes and mode; the source does not show."""
    old = files.get(path)
    if old is None or old is file:
        return old is file
    return old.digest == file.digest and old.mode == file.mode


def moved_paths(before: Files, after: Files) -> list[str]:
    """The paths that are new or have other bytes or another mode."""
    return [path for path, file in after.items() if not standing(before, path, file)]


def next_step(
    published: Files, target: Files, refused: Mapping[str, Refusal] | None = None
) -> Step | None:
    """The next snapshot on the way from `published` to `target`; None when it stands.

    The first snapshot of all is one step. refused: bytes that Envoy refused are put back before
    anything is built on them.
    """
    moved = set(moved_paths(published, target))
    if not moved and published.keys() == target.keys():
        return None
    if not published:
        return step_to(published, target, moved, 1, "first snapshot")
    kinds = {path: kind_at(path, target, published) for path in moved}
    clusters = {path for path in moved if kinds[path] == "cds"}
    children = {path for path in moved - clusters if is_child(path, kinds, published, target)}
    if children:
        return step_to(published, target, children, 1, "children")
    if back := {path for path in moved if is_refused(published.get(path), path, refused or {})}:
        return step_to(published, target, back, 2, PUT_BACK)
    referrers = moved - clusters
    if not referrers:
        return last_step(published, target, moved)
    middle = {path: transition(published.get(path), target[path]) for path in clusters}
    changed = {path for path, file in middle.items() if not standing(published, path, file)}
    if changed:
        return step_to(published, {**target, **middle}, changed, 2, "clusters")
    return step_to(published, target, referrers, 3, "references")


def last_step(published: Files, target: Files, clusters: set[str]) -> Step:
    """To the target itself: no reference moves any more, so nothing is left to be broken."""
    removed = tuple(sorted(published.keys() - target.keys()))
    fewer = any(path in published and has_fewer(target[path], published[path]) for path in clusters)
    stage, reason = (4, "removals") if removed or fewer else (2, "clusters")
    step = step_to(published, target, clusters, stage, reason)
    return step._replace(files=dict(target), removed=removed)


def has_fewer(new: File, old: File) -> bool:
    """Whether a CDS file has fewer clusters than it had: counted, which 1 MiB does not notice."""
    url = TYPE_URL + b"envoy.config.cluster.v3.Cluster"
    return new.content.count(url) < old.content.count(url)


def step_to(published: Files, target: Files, changed: set[str], stage: int, reason: str) -> Step:
    """What is published with `changed` as in `target`, as a step."""
    above = {parent for path in changed for parent in parents(path)}
    files = {
        path: target[path] if path in target and standing(target, path, file) else file
        for path, file in published.items()
        # A file and a directory of one name cannot stand side by side.
        if path not in above and changed.isdisjoint(parents(path))
    }
    files |= {path: target[path] for path in changed}
    removed = tuple(sorted(published.keys() - files.keys()))
    return Step(files, stage, tuple(notify_order(changed, files)), removed, reason)


def is_child(path: str, kinds: Mapping[str, str], published: Files, target: Files) -> bool:
    """Whether a moved file goes out first: it names no cluster, or nobody reads it yet.

    The second is RDS for a new listener. Its link must stand before a listener names it: a shared
    `watched_directory` reads at the switch, and a listener whose file is missing is not retried.
    """
    if kinds[path] not in REFERRERS:
        return True
    if kinds[path] == "lds" or path in published:
        return False
    namers = [other for other, kind in kinds.items() if kind in ("lds", "ecds", "scoped_rds")]
    return any(other != path and names_file(target[other].content, path) for other in namers)


def is_refused(file: File | None, path: str, refused: Mapping[str, Refusal]) -> bool:
    """Whether the file that is published is one that Envoy refused."""
    known = refused.get(path)
    return file is not None and known is not None and file.digest in (known.digest, known.shown)


def transition(old: File | None, new: File) -> File:
    """What CDS holds while the references move: the old and the new clusters, if it can be had.

    YAML of a ConfigMap is never rewritten. If it only takes clusters away it waits for the
    references, else it goes before them.
    """
    if old is None:
        return new
    if exact_document(old) is not None and exact_document(new) is not None:
        return unite(old, new)
    before, after = clusters_in(old), clusters_in(new)
    return old if before is not None and after is not None and after < before else new


def notify_order(changed: Iterable[str], files: Files) -> list[str]:
    """Paths in the order in which Envoy shall notice them: children, CDS, RDS, LDS."""
    return sorted(changed, key=lambda path: (NOTIFY_RANK.get(kind_at(path, files), 0), path))


# -- what need not wait, and what must ---------------------------------------------------------


def independent(published: Files, pinned: Files, newer: Files, before: Files) -> dict[str, File]:
    """What may be published now, while a step of `pinned` waits and `newer` is desired already.

    before: what stood before the step that waits; its clusters are known to serve. Taken from
    `newer` are changed files that depend on nothing pending: endpoints and secrets, and routes
    and listeners that name only clusters which stood, and stand, as they will: one that gets its
    first endpoints just now may serve a moment later than the route comes. `carry` takes them
    along into the pinned target.
    """
    kinds = {
        path: kind_at(path, newer, published)
        for path, file in newer.items()
        if path in published and not standing(published, path, file)
    }
    pending: frozenset[str] = frozenset()
    if any(kind in REFERRERS for kind in kinds.values()):
        ends = (before, published, pinned, newer)
        names = [possible_clusters(files) for files in ends]
        pending = names[0].union(*names) - names[0].intersection(*names)
        pending |= changing(ends) | populated(before, published) | populated(published, newer)
    fresh = newer.keys() - published.keys()
    now = dict(published)
    for path, kind in kinds.items():
        content = newer[path].content
        waits = kind in REFERRERS and (
            references(content, pending) or any(names_file(content, each) for each in fresh)
        )
        if kind != "cds" and not waits:
            now[path] = newer[path]
    return now


def changing(ends: Iterable[Files]) -> frozenset[str]:
    """The clusters that are not the same in all of these, as far as the texts tell."""
    texts: dict[str, set[str]] = {}
    for files in ends:
        for path, file in files.items():
            if kind_at(path, files) == "cds" and (document := document_of(file.content)):
                for item in document.items:
                    texts.setdefault(item.name, set()).add(item.text)
    return frozenset(name for name, variants in texts.items() if len(variants) > 1)


def populated(before: Files, after: Files) -> frozenset[str]:
    """The clusters whose EDS file gets its first endpoints in `after`.

    EDS and RDS have an inotify instance each: Envoy may read a route that comes 2 ms after the
    first endpoints of its cluster before these, and answer 503 (measured).
    """
    filled = [
        path
        for path, file in after.items()
        if not standing(before, path, file)
        and kind_at(path, after) == "eds"
        and b"address" in file.content
        and (path not in before or b"address" not in before[path].content)
    ]
    renaming = renaming_clusters(after) if filled else []
    names = (resource_names(path, after[path], renaming) for path in filled)
    return frozenset().union(*names)


def carry(pinned: Files, published: Files, now: Files) -> dict[str, File]:
    """The pinned target with what went out meanwhile, so that no later step takes it back."""
    return {**pinned, **{path: now[path] for path in moved_paths(published, now)}}


def withhold(
    desired: Files, published: Files, refused: Mapping[str, Refusal], confirmed: Files
) -> tuple[dict[str, File], list[str]]:
    """What may be published of `desired` after refusals, and why the rest waits, in words.

    A refused file goes back to its last confirmed bytes. What it was needed for (a route to a
    cluster that only the refused CDS has, CDS that names a refused new EDS file) stays as it is
    too, and what those need stays with them. Everything else proceeds.
    """
    old = {**published, **confirmed}
    result, notes = dict(desired), []
    held = [
        path
        for path, refusal in sorted(refused.items())
        if path in desired and desired[path].digest == refusal.digest
    ]
    for path in held:
        put_back(path, result, old, not is_needless(path, desired, confirmed))
        notes.append(f"{path}: refused by Envoy, {what_stands(path, result, confirmed)} stays")
    idle = idle_clusters(held, desired, confirmed)
    blind = any(kind_at(path, old) == "cds" and not clusters_in(desired[path]) for path in held)
    while held:
        missing = desired.keys() - result.keys()
        there = possible_clusters(result)
        lacking = idle | (possible_clusters(desired) - there)
        waiting = [
            path
            for path in sorted(desired)
            if result.get(path) == desired[path]
            and not standing(old, path, desired[path])
            and must_wait(
                desired[path].content,
                kind_at(path, desired, old),
                missing,
                lacking | (names_added(path, desired, old) - there if blind else frozenset()),
            )
        ]
        for path in waiting:
            put_back(path, result, old, True)
            notes.append(f"{path}: waits for what was refused")
        kept = keep_needed(result, desired, old)
        if not waiting and not kept:
            break
        notes += kept
    return result, notes


NAME_VALUE = (
    rb"""["']?\b(?:cluster|name)["']?\s*:\s*["']?([^\s"',{}\[\]]+)"""
)


def names_added(path: str, desired: Files, old: Files) -> frozenset[str]:
    """What a file names and did not name before: clusters too, where no CDS tells which are."""
    before = old[path].content if path in old else b""
    added = set(re.findall(NAME_VALUE, desired[path].content)) - set(re.findall(NAME_VALUE, before))
    return frozenset(name.decode("utf-8", "replace") for name in added)


def idle_clusters(held: Iterable[str], desired: Files, confirmed: Files) -> frozenset[str]:
    """The clusters without endpoints because their EDS file is refused and never was confirmed."""
    files = [path for path in held if path not in confirmed and kind_at(path, desired) == "eds"]
    documents = [
        document_of(file.content)
        for path, file in (desired.items() if files else ())
        if kind_at(path, desired) == "cds"
    ]
    return frozenset(
        item.name
        for document in documents
        for item in (document.items if document else ())
        if any(names_file(item.text.encode(), path) for path in files)
    )


def put_back(path: str, result: dict[str, File], old: Files, stays: bool) -> None:
    """Give a path its old bytes, or leave it out if there are none or nobody needs them."""
    result.pop(path, None)
    if path in old and stays:
        result[path] = old[path]


def is_needless(path: str, desired: Files, confirmed: Files) -> bool:
    """Whether a refused file can go: it never was confirmed, and only what waits names it.

    A file that none of ours names is named by Envoy's bootstrap: without it Envoy would not start
    again, with a bad one it does.
    """
    if path in confirmed:
        return False
    namers = [each for each in desired if names_file(desired[each].content, path)]
    return bool(namers) and all(
        each in confirmed and not names_file(confirmed[each].content, path) for each in namers
    )


def what_stands(path: str, result: Files, confirmed: Files) -> str:
    """In words, what a refused file's path holds now."""
    if path not in result:
        return "nothing"
    return "the last confirmed file" if path in confirmed else "the first file"


def must_wait(content: bytes, kind: str, missing: Iterable[str], lacking: frozenset[str]) -> bool:
    """Whether a file names a file that is missing, or a cluster that is lacking."""
    if kind != "cds" and kind not in REFERRERS:
        return False
    if any(names_file(content, path) for path in missing):
        return True
    return kind != "cds" and references(content, lacking)


def keep_needed(result: dict[str, File], desired: Files, old: Files) -> list[str]:
    """Put back what files at their old bytes still name: files and clusters. Says what."""
    notes = []
    holders = [path for path, file in result.items() if not standing(desired, path, file)]
    for gone in sorted(old.keys() - result.keys() - desired.keys()):
        if any(names_file(result[path].content, gone) for path in holders):
            result[gone] = old[gone]
            notes.append(f"{gone}: stays for what was refused")
    there = possible_clusters(result)
    for path, file in old.items():
        if kind_at(path, old) != "cds" or path not in result:
            continue
        lost = possible_names(file) - there
        users = [result[each].content for each in holders if each != path]
        needed: frozenset[str] = frozenset().union(*(named_in(user, lost) for user in users))
        if needed:
            both = unite(file, result[path], needed)
            result[path] = both if both != result[path] else file
            notes.append(f"{path}: keeps clusters for what was refused")
    return notes


def refusals(
    refused: Mapping[str, Refusal],
    reasons: Mapping[str, str],
    target: Files,
    published: Files,
    confirmed: Files,
) -> dict[str, Refusal]:
    """The refusals after a verdict: what was known, and each path that Envoy now rejected.

    target: what the loader was on its way to; its digest counts, not that of a union on the way.
    Confirmed bytes that are rejected (they were put back, and something else is wrong) do not
    count: else the bytes that were refused before would be tried again.
    """
    found = dict(refused)
    for path, reason in reasons.items():
        shown = published.get(path)
        if shown is None or (path in confirmed and confirmed[path].digest == shown.digest):
            continue
        found[path] = Refusal(blamed(path, shown, target, confirmed), reason, shown.digest)
    return found


def blamed(path: str, shown: File, target: Files, confirmed: Files) -> str:
    """The digest of the bytes that a refusal is about.

    Those of the target, if Envoy was shown them, or them united with what it had confirmed. Of any
    other union (with bytes that it never confirmed) nobody knows which half was bad: it is put
    back, and the target is tried on what is confirmed.
    """
    wanted = target.get(path, shown)
    if shown.digest == wanted.digest or path not in confirmed:
        return wanted.digest
    ours = transition(confirmed[path], wanted).digest == shown.digest
    return wanted.digest if ours else shown.digest


# ---------------------------------------------------------------------------------------------
# Publication: the only code that touches the output directory
# ---------------------------------------------------------------------------------------------
#
# Publishing a set of files, step by step; the numbers come back in the code:
#
#   1. Stage: everything goes to a new directory `..<version>`; a file that did not change is a
#      hard link to the previous snapshot's (checked by inode, size and time first).
#   2. Remember in `..state/` which source each file has.
#   3. Mark: a symlink `..notify` names the snapshot before, until Envoy has been told everything.
#      symlink(2) and unlink(2) are no event for Envoy.
#   4. Unlink the links of files that go.
#   5. Swap: `..data` is renamed over. From here on every path shows the new snapshot.
#   6. Notify: the link of each new or changed file is replaced by rename(2), children first. This
#      MOVE is what wakes just the subscription concerned.
#   7. Unmark.
#   8. Prune: snapshots that nobody needs go.
#
# A death before 5 leaves the old snapshot and a left-over; between 5 and 7 the marker, and the
# next start (or the next publication of a loader that lives) notifies again what differs.

SWITCH, MARKER, STATE, CURRENT, LINK = "..data", "..notify", "..state", "current", "..link"
SNAPSHOT = r"\.\.[0-9a-f]{16}(\.[0-9]+)?"


class Print(NamedTuple):
    """What stat(2) says of a file that was written or verified: it changes when somebody edits."""

    inode: int
    size: int
    modified: int
    mode: int


def print_of(status: os.stat_result) -> Print:
    return Print(status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode & 0o7777)


class Output:
    """The output directory. Raises OSError as it comes; what stood goes on serving."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.published: dict[str, File] = {}
        self.snapshot = ""
        self.strangers: tuple[str, ...] = ()
        self._prints: dict[str, Print] = {}
        self._sources: dict[str, str] = {}
        self._untold: set[str] = set()  # switched to, and Envoy not told yet
        self._unread: set[str] = set()  # in the snapshot and linked, but could not be read
        self._before = ""  # the last snapshot but one
        self.switching = 0.0  # wall clock just before the last switch
        self._kept: frozenset[str] = frozenset()  # snapshots that others still need
        self._lock = -1

    # -- opening ------------------------------------------------------------------------------

    def lock(self) -> None:
        """Create the directory if need be and be its only loader, or LoaderError.

        flock(2) on the directory itself: no lock file that another user's init container left.
        """
        make_directories(self.root)
        self._lock = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.unlock()
            raise LoaderError(
                f"{self.root}: another loader is at work here; give each its own --output-dir"
            ) from None

    def is_there(self) -> bool:
        """Whether the directory that is locked still is the one at this place."""
        try:
            return os.path.samestat(os.fstat(self._lock), os.stat(self.root))
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENOTDIR)

    def unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def recover(self) -> list[str]:
        """Make good whatever the last process left; returns what was done, in words.

        Afterwards `published` is what the disk shows, and every link and notification is right.
        """
        done = []
        if is_directory(self._path(SWITCH)):
            place = self._path(SWITCH)
            raise LoaderError(f"{place} is a directory and not the loader's link: remove it")
        self._own_directory(CURRENT)
        self.snapshot = self._switched()
        self._sources = self._read_sources()
        self._unread.clear()
        self.published, self._prints = self._load(self.snapshot) if self.snapshot else ({}, {})
        if self._repair_links():
            done.append("links repaired")
        marked = read_link(self._path(MARKER))
        if marked is not None:
            changed = self._differing(marked)
            for path in notify_order(changed, self.published):
                self._notify(path)
            os.unlink(self._path(MARKER))
            self._untold.clear()
            done.append(f"notified again: {', '.join(changed) or 'nothing'}")
        self._prune_leftovers()
        return done

    def peek(self) -> Files:
        """What is published, read without a lock and without touching anything."""
        self._sources = self._read_sources()
        name = self._switched() or CURRENT
        return self._load(name)[0] if os.path.isdir(self._path(name)) else {}

    # -- publishing ---------------------------------------------------------------------------

    def fitting(self, files: Files) -> tuple[Files, list[str]]:
        """The files that can be in `current/`, and a warning for each that cannot.

        A directory there is never removed (Envoy's watch is bound to it), so a file of its name
        cannot come; nor can a file below a stranger's file.
        """
        warnings = []
        for path in files.keys() - self.published.keys():
            place = self._path(CURRENT, path)
            strangers = [above for above in parents(path) if self._is_strangers(above)]
            if is_directory(place):
                warnings.append(f"{path} of {files[path].source} left out: {place} is a directory")
            elif strangers:
                place = self._path(CURRENT, strangers[0])
                warnings.append(f"{path} of {files[path].source} left out: {place} is a file")
            else:
                continue
            files = {other: file for other, file in files.items() if other != path}
        return files, sorted(warnings)

    def stage(self, files: Files) -> tuple[str, dict[str, Print], set[str]]:
        """Step 1: a complete directory of these files, made if it is not there yet.

        Also returns what stat(2) says of each file, and which were found damaged.
        """
        damaged = {path for path, file in files.items()
                   if standing(self.published, path, file) and self._is_damaged(path)}
        wanted = f"..{version_of(files)}"
        for attempt in itertools.count():
            name = f"{wanted}.{attempt}" if attempt else wanted
            try:
                os.mkdir(self._path(name), 0o755)
            except FileExistsError:
                if self._intact(name, files):
                    return name, self._prints_of(name, files), damaged
                continue
            try:
                return name, self._fill(name, files, damaged), damaged
            except OSError:
                remove_tree(self._path(name), tolerate=True)
                raise
        raise AssertionError("itertools.count ended")

    def publish(self, files: Files, keep: Iterable[str] = ()) -> list[str]:
        """Publish these files; returns the changed paths. `keep` are snapshots that must stay."""
        files, _ = self.fitting(files)
        before = self.snapshot
        self._own_directory(CURRENT)
        gone = [path for path in (*self.published, *self._unread) if path not in files]
        moved = moved_paths(self.published, files)
        self._may_write({os.path.dirname(path) for path in (*moved, *gone)})
        name, prints, damaged = self.stage(files)  # 1
        changed = [*moved, *sorted(damaged)]
        self._write_sources(files)  # 2
        try:
            os.symlink(before or "none", self._path(MARKER))  # 3
        except FileExistsError:
            pass  # a failed publication left it: it tells of the snapshot that Envoy knows
        for path in gone:  # 4
            self._unlink_ours(path)
        for directory in sorted({parent for path in changed for parent in parents(path)}):
            self._own_directory(f"{CURRENT}/{directory}")
        self._untold |= set(changed)
        self.switching = time.time()
        self._switch(name)  # 5
        self.snapshot, self._prints, self.published = name, prints, dict(files)
        for path in notify_order(self._untold & files.keys(), files):  # 6
            self._notify(path)
        os.unlink(self._path(MARKER))  # 7
        self._untold.clear()
        self._unread.clear()
        self._before, self._kept = before, frozenset(keep)
        return changed + gone

    def prune(self, keep: Iterable[str] | None = None) -> None:
        """Step 8, after everybody has been told: only the last two snapshots stay, and `keep`."""
        self._kept = self._kept if keep is None else frozenset(keep)
        for entry in self._snapshots():
            if entry not in (self.snapshot, self._before) and entry not in self._kept:
                remove_tree(self._path(entry), tolerate=True)

    def damage(self) -> list[str]:
        """The paths whose bytes or mode on disk are no longer what was published."""
        if not self.snapshot:
            return []
        damaged = [path for path, file in self.published.items()
                   if not holds(self._path(self.snapshot, path), file)]
        if self._switched() != self.snapshot or self._extra(self.snapshot, self.published):
            damaged.append(SWITCH)
        return damaged

    def repair(self) -> list[str]:
        """Check everything on disk against memory and put it right; returns what was wrong."""
        self._own_directory(CURRENT)
        damaged = self.damage()
        if damaged or self._untold:
            for path in damaged:
                self._prints.pop(path, None)
            self.publish(self.published, self._kept)
            self.prune()
        return damaged + self._repair_links()

    # -- parts of the steps -------------------------------------------------------------------

    def _path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def _may_write(self, directories: Iterable[str]) -> None:
        """OSError before anything is switched: the links of all files must be replaceable."""
        for directory in directories:
            place = self._path(CURRENT, directory) if directory else self._path(CURRENT)
            if os.path.isdir(place) and not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
                read_only = os.statvfs(place).f_flag & os.ST_RDONLY
                number = errno.EROFS if read_only else errno.EACCES
                raise OSError(number, os.strerror(number), place)

    def _is_strangers(self, path: str) -> bool:
        """Whether something in `current/` is neither a directory nor a link that we made."""
        place = self._path(CURRENT, path)
        if not os.path.lexists(place) or os.path.isdir(place):
            return False
        return read_link(place) != link_target(path)

    def _prints_of(self, name: str, files: Files) -> dict[str, Print]:
        return {path: print_of(os.lstat(self._path(name, path))) for path in files}

    def _fill(self, name: str, files: Files, damaged: set[str]) -> dict[str, Print]:
        """Write what changed, link what did not; the kernel may refuse links, then copy."""
        made = {""}
        prints = {}
        old, new = self._path(self.snapshot, ""), self._path(name, "")
        for path, file in files.items():
            if path.rpartition("/")[0] not in made:
                for directory in reversed(list(parents(path))):
                    if directory not in made:
                        os.mkdir(new + directory, 0o755)
                        made.add(directory)
            stands = path not in damaged and standing(self.published, path, file)
            if stands and self._linked(old + path, new + path):
                prints[path] = self._prints[path]
                continue
            prints[path] = write_file(new + path, file.content, file.mode)
        return prints

    def _linked(self, old: str, new: str) -> bool:
        try:
            os.link(old, new)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP):
                return False
            raise
        return True

    def _is_damaged(self, path: str) -> bool:
        """Whether the published file is not, by stat(2), the one that was written or verified."""
        try:
            return print_of(os.lstat(f"{self.root}/{self.snapshot}/{path}")) != self._prints[path]
        except (FileNotFoundError, KeyError):
            return True

    def _intact(self, name: str, files: Files) -> bool:
        """Whether a directory that is already there holds these files and nothing else."""
        if not is_directory(self._path(name)):
            return False
        return not self._extra(name, files) and all(
            holds(self._path(name, path), file) for path, file in files.items()
        )

    def _extra(self, name: str, files: Files) -> bool:
        return any(path not in files for path, _ in walk(self._path(name)))

    def _switch(self, name: str) -> None:
        replace_link(name, self._path(LINK))
        os.rename(self._path(LINK), self._path(SWITCH))

    def _notify(self, path: str) -> None:
        """Make or replace the link of one file by rename: the MOVE that Envoy sees."""
        replace_link(link_target(path), self._path(LINK))
        try:
            os.rename(self._path(LINK), self._path(CURRENT, path))
        except IsADirectoryError:
            os.unlink(self._path(LINK))
            raise

    def _unlink_ours(self, path: str) -> None:
        """Remove a link that we made; a stranger's file of the same name stays."""
        if read_link(self._path(CURRENT, path)) == link_target(path):
            os.unlink(self._path(CURRENT, path))

    def _own_directory(self, relative: str) -> None:
        """A real directory at this place, made if need be (never replaced if it is one)."""
        place = self._path(relative)
        try:
            mode = os.lstat(place).st_mode
        except FileNotFoundError:
            os.mkdir(place, 0o755)
            return
        if stat.S_ISLNK(mode):
            # A link cannot hold Envoy's watch: it would stay on the directory behind it.
            os.unlink(place)
            os.mkdir(place, 0o755)
        elif not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, "is a file where a directory must be", place)

    def _switched(self) -> str:
        """The snapshot that `..data` names, or nothing where there is none behind it."""
        name = read_link(self._path(SWITCH)) or ""
        return name if re.fullmatch(SNAPSHOT, name) and is_directory(self._path(name)) else ""

    def _load(self, name: str) -> tuple[dict[str, File], dict[str, Print]]:
        files, prints = {}, {}
        for path, place in walk(self._path(name)):
            try:
                with open(place, "rb", opener=unblocked) as stream:
                    status = os.fstat(stream.fileno())
                    if not stat.S_ISREG(status.st_mode):
                        continue
                    content = stream.read()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    raise  # says nothing about the file
                continue  # not readable is as good as not there: it is written anew
            prints[path] = print_of(status)
            files[path] = file_of(content, self._sources.get(path, "disk"), prints[path].mode)
        return files, prints

    def _repair_links(self) -> list[str]:
        """Every published file has its link in `current/`, and no link of ours is left over."""
        repaired = []
        for directory in sorted({parent for path in self.published for parent in parents(path)}):
            self._own_directory(f"{CURRENT}/{directory}")
        for path in notify_order(list(self.published), self.published):
            if read_link(self._path(CURRENT, path)) != link_target(path):
                self._notify(path)
                repaired.append(path)
        strangers = []
        for path, place in walk(self._path(CURRENT)):
            if path in self.published:
                continue
            if read_link(place) != link_target(path):
                strangers.append(path)
            elif os.path.lexists(self._path(self.snapshot, path)):
                self._unread.add(path)  # that is not gone
            else:
                os.unlink(place)
                repaired.append(path)
        self.strangers = tuple(strangers)
        return repaired

    def _differing(self, marked: str) -> list[str]:
        """What differs between the snapshot before and the one that is switched to."""
        known = re.fullmatch(SNAPSHOT, marked) and is_directory(self._path(marked))
        before = self._load(marked)[0] if known else {}
        return [
            path
            for path, file in self.published.items()
            if path not in before or before[path].digest != file.digest
        ]

    def _snapshots(self) -> list[str]:
        return [entry for entry in os.listdir(self.root) if re.fullmatch(SNAPSHOT, entry)]

    def _prune_leftovers(self) -> None:
        """At a start: half-written directories go, and all but the newest other snapshot."""
        others, needed = [], self._needed() | {self.snapshot}
        for entry in self._snapshots():
            place = self._path(entry)
            if entry in needed:
                continue
            if is_directory(place) and version_of(self._load(entry)[0]) == entry[2:18]:
                others.append((os.stat(place).st_mtime_ns, entry))
            else:
                remove_tree(place, tolerate=True)
        self._before = max(others)[1] if others else ""
        for _, entry in others:
            if entry != self._before:
                remove_tree(self._path(entry), tolerate=True)
        if read_link(self._path(LINK)) is not None:
            os.unlink(self._path(LINK))

    def file_in(self, snapshot: str, path: str) -> File | None:
        """A file as a snapshot that stands has it."""
        found = read_file(self._path(snapshot, path)) if re.fullmatch(SNAPSHOT, snapshot) else None
        return file_of(found[0], self._sources.get(path, "disk"), found[1]) if found else None

    def switched_at(self) -> float:
        """When the snapshot that stands was switched to, Unix time; 0 where there is none."""
        return os.lstat(self._path(SWITCH)).st_mtime if self.snapshot else 0.0

    def link_times(self, paths: Iterable[str]) -> dict[str, float]:
        """When the links of these files were made, just before Envoy was told; Unix time."""
        times = {}
        for path in paths:
            try:
                times[path] = os.lstat(self._path(CURRENT, path)).st_mtime
            except FileNotFoundError:
                pass  # it was taken away
        return times

    # -- what a restart could not see ---------------------------------------------------------

    def _read_sources(self) -> dict[str, str]:
        found = self.read_state("sources")
        return {str(path): str(source) for path, source in found.items()}

    def _write_sources(self, files: Files) -> None:
        both = (*self.published.items(), *files.items())  # a restart may find the old snapshot
        sources = {path: file.source for path, file in both}
        if sources != self._sources:
            self.write_state("sources", sources)
            self._sources = sources

    def read_state(self, name: str) -> dict[str, Any]:
        """A remembered JSON object. One that cannot be read counts as nothing remembered."""
        try:
            with open(self._path(STATE, f"{name}.json"), "rb") as stream:
                value = json.load(stream)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s: %s; goes on without it", self._path(STATE, f"{name}.json"), why(error))
            return {}
        return value if isinstance(value, dict) else {}

    def write_state(self, name: str, value: Mapping[str, Any]) -> None:
        """Replace a remembered JSON object by rename."""
        self._own_directory(STATE)
        place = self._path(STATE, name)
        text = json.dumps(value, sort_keys=True).encode()
        unlink_if_there(f"{place}.new")
        write_file(f"{place}.new", text, 0o644)
        os.rename(f"{place}.new", f"{place}.json")

    def _needed(self) -> frozenset[str]:
        """Snapshots that hold the last confirmed bytes of a file that is not confirmed yet."""
        pointers = self.read_state("envoy").get("confirmed")
        return frozenset(map(str, pointers.values())) if isinstance(pointers, dict) else frozenset()


def link_target(path: str) -> str:
    """What `current/<path>` points to: relative, so that the directory may be mounted anywhere."""
    return "../" * (path.count("/") + 1) + f"{SWITCH}/{path}"


def read_link(place: str) -> str | None:
    try:
        return os.readlink(place)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.ENOTDIR):
            return None
        raise


def is_directory(place: str) -> bool:
    """A real directory: what a link points to is not ours."""
    return os.path.isdir(place) and not os.path.islink(place)


def replace_link(target: str, place: str) -> None:
    """symlink(2), over a left-over of a process that died: a fixed name must not wedge."""
    try:
        os.symlink(target, place)
    except FileExistsError:
        os.unlink(place)
        os.symlink(target, place)


def unlink_if_there(place: str) -> None:
    try:
        os.unlink(place)
    except FileNotFoundError:
        pass


def write_file(place: str, content: bytes, mode: int) -> Print:
    """A new file; the mode is exact because the umask is 0 (see `run`)."""
    number = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(number, view) :]
        return print_of(os.fstat(number))
    finally:
        os.close(number)


def read_file(place: str) -> tuple[bytes, int] | None:
    """Content and mode of a regular file, or None where there is none that can be read."""
    try:
        with open(place, "rb", opener=no_follow) as stream:
            return stream.read(), stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise


def holds(place: str, file: File) -> bool:
    """Whether this very file is on disk there."""
    return read_file(place) == (file.content, file.mode)


def unblocked(place: str, flags: int) -> int:
    """Open without waiting for the writer of somebody's FIFO."""
    return os.open(place, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def no_follow(place: str, flags: int) -> int:
    return os.open(place, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def walk(root: str, below: str = "") -> Iterator[tuple[str, str]]:
    """Every entry under a directory that is no directory, as (relative path, place)."""
    with os.scandir(f"{root}/{below}" if below else root) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from walk(root, path)
        else:
            yield path, entry.path


def make_directories(place: str) -> None:
    """mkdir -p, each with mode 0755 (os.makedirs would leave the upper ones to the umask)."""
    if os.path.isdir(place):
        return
    make_directories(os.path.dirname(place))
    try:
        os.mkdir(place, 0o755)
    except FileExistsError:
        if not os.path.isdir(place):
            raise LoaderError(f"{place} is no directory; give another --output-dir") from None


def remove_tree(root: str, *, tolerate: bool = False) -> None:
    """Remove a directory; with `tolerate` what cannot be removed is named and stays.

    A link is removed, never followed: nothing outside of the output directory is touched.
    """
    try:
        if not is_directory(root):
            os.unlink(root)
            return
        with os.scandir(root) as entries:
            found = list(entries)
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.path)
            else:
                os.unlink(entry.path)
        os.rmdir(root)
    except OSError as error:
        if not tolerate:
            raise
        log.warning("left-over stays: %s", why(error))

# ---------------------------------------------------------------------------------------------
# Confirmation: Envoy's word (its admin interface)
# ---------------------------------------------------------------------------------------------
#
# For every event on a file Envoy counts one update_attempt, and in the same turn of its main thread
# (so no answer shows one without the other) exactly one of
#
#   update_success    and sets version_text and update_time (wall clock, ms);
#   update_rejected   parsed, but not valid; CDS and LDS may have been applied in part;
#   update_failure    could not be parsed (an empty file too).

ANSWER_BOUND = 1.0  # seconds: one request; and how long an admin interface may be silent
BUSY_BOUND = 2.0  # seconds of silence of an Envoy that answered before and takes connections
ATTEMPT_BOUND = 1.0  # seconds until Envoy has read what moved: it needs 1-4 ms
OVERLAP_DOUBT = 0.5  # the same, of a file that moved twice before Envoy was seen to read it once
DOUBT = 0.05  # seconds until a rejection is believed of which the count before is not known
WARM_BOUND = 5.0  # seconds until clusters are warm: the first health check of each
VERDICT_BOUND = 10.0  # seconds for all of it, while one Envoy after the other starts and dies
POLL_FIRST, POLL_LAST = 0.002, 0.05  # seconds between two looks, growing
PROBE_FIRST, PROBE_LAST = 0.1, 5.0  # seconds between two tries while nothing answers
ANSWER_BYTES = 64 << 20  # an answer beyond it is not Envoy's
FILTER_LENGTH = 8_000  # characters of names in a request (Envoy takes 60 KiB of head, encoded)

# Where the statistics of a file are, by kind; measured on Envoy 1.40.
STAT_SCOPES = {
    "cds": r"cluster_manager\.cds",
    "lds": r"listener_manager\.lds",
    "eds": r"cluster\.{name}",
    "rds": r"http\..+\.rds\.{name}",
    "sds": r"(?:.+\.)?sds\.{name}",
    "ecds": r"extension_config_discovery\..+\.{name}",
    "scoped_rds": r"http\..+\.scoped_rds\..+",
    "rtds": r"runtime",
}
ONE_RESOURCE = frozenset(("eds", "rds", "sds", "ecds", "rtds"))  # kinds of exactly one a file


class AdminError(LoaderError):
    """Envoy's admin interface did not answer, or not as Envoy does."""


class Scope(NamedTuple):
    """What Envoy counts for one subscription."""

    attempt: int = 0
    success: int = 0
    rejected: int = 0
    failure: int = 0
    updated: int = 0  # wall clock of the last success in ms
    version: str = ""  # version_info of the file that was last applied


class Stats(NamedTuple):
    """One look at Envoy."""

    at: float = 0.0  # our monotonic clock
    uptime: int = -1  # seconds, as of Envoy's last flush (every 5 s): only its falling back tells
    started: bool = False  # the workers run: Envoy is through its own initialization
    warming: int = 0  # clusters
    unknown_fields: int = 0
    scopes: Mapping[str, Scope] = {}


UNSEEN = Stats()


class Request(NamedTuple):
    """A question: what became of these files?

    moved: path -> wall clock just before its link was moved, of the files in question; 0 if that is
    not known. Files that nobody read so far (a new EDS file before its cluster) are asked about
    again with the next step.
    """

    id: int
    files: Files  # all that is published
    moved: Mapping[str, float]
    baseline: Stats  # `Confirmer.baseline` from before the publication; UNSEEN to judge by times
    overlapping: frozenset[str] = frozenset()  # moved while the move before it was not judged yet


class Verdict(NamedTuple):
    """Envoy's word about a Request; id 0: news about the admin interface itself."""

    id: int
    confirmed: frozenset[str] = frozenset()
    rejected: Mapping[str, str] = {}  # path -> reason
    unread: frozenset[str] = frozenset()  # no subscription reads them, or none did in time
    unanswered: bool = False  # Envoy was not there to ask; nothing is known
    unknown_fields: int = 0  # fields that Envoy ignored
    waited: float = 0.0  # seconds
    note: str = ""


# -- statistics --------------------------------------------------------------------------------


class Subject(NamedTuple):
    """How to recognise what Envoy says about one file."""

    kind: str
    pattern: str  # a regular expression of its scopes; "" if the file is not xDS
    version: str  # its version_info, "" without
    former: str = ""  # the pattern of what stood there before: Envoy still asks for that name

    def after(self, old: Subject) -> Subject:
        """The same, knowing what stood there before: a broken file tells neither kind nor name."""
        former = old.former if old.pattern == self.pattern else old.pattern
        return self._replace(
            kind=self.kind or old.kind, pattern=self.pattern or old.pattern, former=former
        )


def subject_of(path: str, files: Files, renaming: Sequence[Item] | None = None) -> Subject:
    """The scopes and the version of a published file.

    renaming: what renaming_clusters() gives, for who asks about many files.
    """
    renaming = renaming_clusters(files) if renaming is None else renaming
    file, kind = files[path], kind_at(path, files)
    template = STAT_SCOPES.get(kind, "")
    if "{name}" in template:
        names = sorted(map(stat_name, resource_names(path, file, renaming)))
        template = template.replace("{name}", f"(?:{'|'.join(map(re.escape, names))})")
        template = template if names else ""
    return Subject(kind, template, version_info(file.content))


FIRST_NAME = rb"[\"']?(?:cluster_?)?[nN]ame[\"']?\s*:\s*[\"']?([^\s\"',}]+)"


def resource_names(path: str, file: File, renaming: Sequence[Item]) -> set[str]:
    """The names under which routes and statistics know the resource of a file.

    For EDS that is the cluster's, which differs from the assignment's if the cluster has a
    `service_name` or an `alt_stat_name`: then the cluster that names the file tells.
    """
    document = document_of(file.content)
    names = {item.name for item in document.items[:1]} if document else set()
    if not names and (found := re.search(FIRST_NAME, file.content)):
        names = {found[1].decode("utf-8", "replace")}
    for item in renaming if kind_of_file(file) == "eds" else ():
        if names_file(item.text.encode(), path):
            names |= {item.name, item.stat_name}
    return names - {""}


def renaming_clusters(files: Files) -> list[Item]:
    """The clusters that statistics, or their endpoints, know by another name."""
    found: list[Item] = []
    for path, file in files.items():
        if kind_at(path, files) == "cds" and re.search(RENAMES, file.content):
            document = document_of(file.content)
            found += document.items if document else ()
    return found


RENAMES = rb"(?i)service_?name|alt_?stat_?name"


def stat_name(name: str) -> str:
    """A name as Envoy writes it in statistics."""
    return name.replace("://", "_").replace(":/", "_").replace(":", "_")


VERSION_INFO = (
    rb"[\"']?version_?[iI]nfo[\"']?[ \t]*:[ \t]*([\"']?)([\w.+/=-]+)\1[ \t]*(?:[,\r\n#}]|$)"
)


def version_info(content: bytes) -> str:
    """A file's own version; "" without one, or one that statistics might show otherwise."""
    if b"version_info" not in content and b"versionInfo" not in content:
        return ""
    if found := re.compile(VERSION_INFO).search(content, 0, max(content.find(b"resources"), 0)):
        return found[2].decode()
    document = document_of(content)
    version = document.version if document else ""
    return version if re.fullmatch(r"[\w.+/=-]*", version) else ""


def scopes_of(subject: Subject, stats_names: Iterable[str]) -> list[str]:
    """The scopes among `stats_names` that are about this file; none: nobody reads it."""
    if not subject.pattern:
        return []
    pattern = re.compile(f"{subject.pattern}|{subject.former or subject.pattern}")
    return [name for name in stats_names if pattern.fullmatch(name)]


def stats_filter(subjects: Iterable[Subject]) -> str:
    """A regular expression for /stats: what tells about these files, and about Envoy itself."""
    patterns = {each for subject in subjects for each in (subject.pattern, subject.former)}
    patterns = (patterns - {""}) | {STAT_SCOPES["cds"], STAT_SCOPES["lds"]}
    if sum(map(len, patterns)) > FILTER_LENGTH:
        patterns = {each.replace("{name}", ".+") for each in STAT_SCOPES.values()}
    leaf = r"\.(?:update_(?:attempt|success|rejected|failure|time)|version_text)"
    general = (
        r"server\.(?:uptime|dynamic_unknown_fields)",
        r"listener_manager\.workers_started",
        r"cluster_manager\.warming_clusters",
    )
    return f"^(?:(?:{'|'.join(sorted(patterns))}){leaf}|{'|'.join(general)})$"


FIELDS = {
    "update_attempt": "attempt",
    "update_success": "success",
    "update_rejected": "rejected",
    "update_failure": "failure",
    "update_time": "updated",
}


def parse_stats(text: str, at: float) -> Stats:
    """Of the text format, one `name: value` a line; AdminError if this is not Envoy's."""
    numbers: dict[str, int] = {}
    found: dict[str, dict[str, int]] = {}
    versions: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(": ")
        scope, _, leaf = name.rpartition(".")
        if leaf == "version_text":
            versions[scope] = value.strip('"')
        elif value.isdigit() and leaf in FIELDS:
            found.setdefault(scope, {})[FIELDS[leaf]] = int(value)
        elif value.isdigit():
            numbers[name] = int(value)
    if "server.uptime" not in numbers:
        raise AdminError("the answer has no server.uptime: is this Envoy's admin interface?")
    # A static cluster counts too, but only zeros and without update_rejected: it reads nothing.
    known = {
        scope: Scope(**fields, version=versions.get(scope, ""))
        for scope, fields in found.items()
        if "rejected" in fields
    }
    return Stats(
        at,
        numbers["server.uptime"],
        numbers.get("listener_manager.workers_started", 0) == 1,
        numbers.get("cluster_manager.warming_clusters", 0),
        numbers.get("server.dynamic_unknown_fields", 0),
        known,
    )


# -- the judgement (pure) ----------------------------------------------------------------------

CONFIRMED, REJECTED, FAILED, UNREAD, PENDING = (
    "confirmed",
    "rejected",
    "failed",
    "unread",
    "pending",
)


class Pending(NamedTuple):
    """A Request that waits for its Verdict."""

    request: Request
    subjects: Mapping[str, Subject]
    base: Stats
    submitted: float
    begun: float  # when the counting began: at the submission or with a new Envoy


def began_anew(old: Scope, new: Scope) -> bool:
    """Whether a scope's counters belong to a newer subscription, or a newer Envoy."""
    return new.attempt < old.attempt or (new.updated != old.updated and new.success <= old.success)


def restarted(base: Stats, now: Stats) -> bool:
    """Whether Envoy is another process than at `base`."""
    if now.uptime < base.uptime:
        return True
    lasting = ("cluster_manager.cds", "listener_manager.lds")  # they live as long as Envoy does
    return any(
        name in base.scopes and began_anew(base.scopes[name], now.scopes.get(name, Scope()))
        for name in lasting
    )


def outcome(
    old: Scope | None, new: Scope, version: str, moved: float, age: float, overlaps: bool = False
) -> str:
    """What became of a file that moved at `moved`, by one scope, `age` seconds into the counting.

    old: the scope before; None if it is not known (a new cluster, another Envoy): then the time of
    the last success tells whether it was this file's. Where the file has a version that must be
    the one that runs, and yet a success is asked for: after a rejection in part version_text is
    still the old one. A rejection may be one of long ago if the count before is not known; Envoy
    reads its events and our question in turns, so after DOUBT it is not. overlaps: the count before
    is from before another move, so a success that was counted may be that one's, and so may a
    rejection.
    """
    if old is not None and began_anew(old, new):
        old = None
    known = old or Scope()
    rose = old is not None and new.success > old.success and not overlaps
    refused = new.rejected > known.rejected or new.failure > known.failure
    # In the millisecond of the move Envoy may have read what stood there before (measured).
    same_ms_counts = old is None or (overlaps and age >= DOUBT and not refused)
    if moved:
        moved_ms = int(moved * 1000)
        in_time = new.updated > moved_ms or (new.updated == moved_ms and same_ms_counts)
    else:
        in_time = new.success > 0 and not new.rejected and not new.failure
    if (rose or in_time) and version in ("", new.version):
        return CONFIRMED
    if old is None and (age < DOUBT or (not moved and new.success)):
        return PENDING
    if overlaps and age < OVERLAP_DOUBT:
        return PENDING
    if new.rejected > known.rejected:
        return REJECTED
    return FAILED if new.failure > known.failure else PENDING


def judge(
    subject: Subject, base: Stats, now: Stats, moved: float, age: float, overlaps: bool = False
) -> str:
    """What became of one file. It may have several scopes: two listeners can share its route."""
    said = {
        outcome(base.scopes.get(name), now.scopes[name], subject.version, moved, age, overlaps)
        for name in scopes_of(subject, now.scopes)
    }
    order = (REJECTED, FAILED, CONFIRMED, PENDING)
    return next((state for state in order if state in said), UNREAD)


def progress(pending: Pending, now: Stats) -> tuple[Pending, dict[str, str] | None, str]:
    """One look at Envoy, as (what waits now, the state of each file once all is said, note)."""
    request = pending.request
    if restarted(pending.base, now):
        pending = pending._replace(base=UNSEEN, begun=now.at)
    age = now.at - pending.begun
    if now.at - pending.submitted >= VERDICT_BOUND:
        age = VERDICT_BOUND
    states = {
        path: judge(
            subject, pending.base, now, request.moved[path], age, path in request.overlapping
        )
        for path, subject in pending.subjects.items()
    }
    said = set(states.values())
    if not now.started and age < WARM_BOUND and said & {PENDING, UNREAD}:
        return pending, None, ""
    if PENDING in said and age < ATTEMPT_BOUND:
        return pending, None, ""
    taken = {pending.subjects[path].kind for path, state in states.items() if state == CONFIRMED}
    if now.warming and "cds" in taken:
        if age < WARM_BOUND:
            return pending, None, ""
        return pending, states, f"{now.warming} clusters still warm after {WARM_BOUND:g} s"
    late = sorted(path for path, state in states.items() if state == PENDING)
    return pending, states, f"Envoy did not read {', '.join(late)} in time" if late else ""


def likely_cause(path: str, kind: str, files: Files) -> str:
    """What Envoy does not tell over its admin interface and a look at the file does; or ""."""
    content = files[path].content
    if not content.strip():
        return "the file is empty"
    if not path.endswith((".yaml", ".yml", ".pb", ".pb_text")):
        try:
            json.loads(content)
        except (ValueError, RecursionError) as error:
            return f"not JSON: {error}"
    document = document_of(content)
    if document and kind in ONE_RESOURCE and len(document.items) != 1:
        return f"{len(document.items)} resources where Envoy takes exactly one"
    if not kind_of(content):
        return "no xDS v3 type URL in it"
    named = re.findall(rb"/current/([^\s\"',}]+)", content)
    missing = sorted({name.decode("utf-8", "replace") for name in named} - files.keys())
    return f"it names {', '.join(missing)}, not published" if missing else ""


# -- the client --------------------------------------------------------------------------------


class Admin:
    """A minimal client of Envoy's admin interface: one connection, kept open."""

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        """url: http://host:port."""
        parts = urllib.parse.urlsplit(url)
        self.url = url.rstrip("/")
        self.clock = clock
        self._base = parts.path.rstrip("/")
        self._connection = http.client.HTTPConnection(
            parts.hostname or "127.0.0.1", parts.port or 80, timeout=ANSWER_BOUND
        )

    def get(self, path: str) -> str:
        """The body of the answer within ANSWER_BOUND; a connection that died is opened again."""
        deadline = self.clock() + ANSWER_BOUND
        reused = self._connection.sock is not None
        try:
            try:
                return self._get(path, deadline)
            except (ConnectionError, http.client.BadStatusLine):
                self.close()
                if not reused:
                    raise
                return self._get(path, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            words = "".join(each if each.isprintable() else "?" for each in str(error).strip())
            raise AdminError(f"{self.url}: {words or type(error).__name__}") from error
        except AdminError:
            self.close()
            raise

    def _get(self, path: str, deadline: float) -> str:
        connection = self._connection
        connection.request("GET", self._base + path)  # with TCP_NODELAY: http.client sets it
        response = connection.getresponse()
        body = bytearray()
        while part := response.read1(1 << 16):
            body += part
            if self.clock() > deadline or len(body) > ANSWER_BYTES:
                raise AdminError(f"{self.url}: no end of the answer within {ANSWER_BOUND:g} s")
        if response.status != 200:
            raise AdminError(f"{self.url}{path.partition('?')[0]}: HTTP {response.status}")
        return body.decode("utf-8", "replace")

    def stats(self, pattern: str) -> Stats:
        """What Envoy counts, of the names that match."""
        query = urllib.parse.urlencode({"filter": pattern})
        try:
            return parse_stats(self.get(f"/stats?{query}"), self.clock())
        except AdminError as error:
            if self.url in str(error):
                raise
            raise AdminError(f"{self.url}: {error}") from error

    def reasons(self, kind: str, file: File) -> str:
        """Envoy's own words on what it does not take of a file, where it keeps them; or "".

        Listeners have an error_state. Of clusters only those that Envoy lacks can be told; the
        words on them, on routes and on endpoints are in Envoy's log alone.
        """
        if kind not in ("lds", "cds"):
            return ""
        if kind == "lds":
            query = "resource=dynamic_listeners&mask=name,error_state.details"
        else:
            query = "resource=dynamic_active_clusters&mask=cluster.name"
        try:
            found = json.loads(self.get(f"/config_dump?{query}")).get("configs", [])
            if kind == "lds":
                details = {one.get("error_state", {}).get("details", "") for one in found}
                return "; ".join(sorted(details - {""}))
            there = {one.get("cluster", {}).get("name") for one in found}
        except (AdminError, ValueError, AttributeError):
            return ""
        document = document_of(file.content)
        lacking = sorted({item.name for item in document.items} - there) if document else []
        return f"clusters not taken: {', '.join(lacking[:10])}" if lacking else ""

    def fileno(self) -> int:
        """The socket, to wait for its end; -1 without."""
        return self._connection.sock.fileno() if self._connection.sock is not None else -1

    def close(self) -> None:
        self._connection.close()


# -- the thread --------------------------------------------------------------------------------


class Confirmer(threading.Thread):
    """Asks Envoy about publications, in a thread of its own; posts each Verdict.

    The loop takes `baseline` before it publishes (a cached value: it costs nothing) and submits a
    Request after it. While the admin interface does not answer, a Request is answered at once and
    without asking, so that it delays a publication by its bound once; it is tried in the
    background. Verdicts with id 0 tell when it falls silent while nobody asks, and when it answers
    (again): Envoy is there, or is there anew.
    """

    def __init__(self, admin: Admin, post: Callable[[Verdict], None]) -> None:
        super().__init__(name="confirm", daemon=True)
        self.admin = admin
        self.post = post
        self.baseline = UNSEEN
        self._met = False  # it answered, and has not fallen silent since
        self._down = False  # it did not answer, and that was said
        self._subjects: dict[str, tuple[str, Subject]] = {}  # path -> (digest, what to look for)
        self._submitted: list[Request] = []
        self._pending: list[Pending] = []
        self._closing = False
        self._lock = threading.Lock()  # of _down and _submitted
        self._ear, self._mouth = socket.socketpair()

    def submit(self, request: Request) -> None:
        """Ask; the Verdict comes through `post`, at once if the admin interface is down."""
        with self._lock:
            down = self._down
            if not down:
                self._submitted.append(request)
                self._mouth.send(b"?")
        if down:
            self.post(Verdict(request.id, unanswered=True))

    def close(self) -> None:
        """Let the thread end; it may be within a request of up to ANSWER_BOUND."""
        self._closing = True
        self._mouth.send(b".")

    def run(self) -> None:
        pause, silent_since = POLL_FIRST, None
        while not self._closing:
            begun = self.admin.clock()
            try:
                self._look()
            except AdminError as error:
                silent_since = begun if silent_since is None else silent_since
                if self.admin.clock() - silent_since >= self._patience(error):
                    self._give_up(error)
                pause = min(pause * 2, PROBE_LAST if self._down else POLL_LAST)
            else:
                # A look costs Envoy's main thread 1 ms, with 1,000 clusters 45 ms: leave it room.
                pause = max(min(pause * 1.5, POLL_LAST), self.admin.clock() - begun)
                silent_since = None
            if self._rest(max(pause, PROBE_FIRST) if self._down else pause):
                pause = POLL_FIRST
        self.admin.close()

    def _patience(self, error: AdminError) -> float:
        """How long Envoy may be silent, in seconds.

        One that answered before and takes connections is busy: with a large CDS, or with closing
        inotify instances on a loaded node, for seconds (measured). Then it has not read what moved
        either, and steps that do not wait for it would be read at once.
        """
        if not self._pending:
            return 0.0
        busy = self._met and isinstance(error.__cause__, TimeoutError)
        return BUSY_BOUND if busy else ANSWER_BOUND

    def _rest(self, pause: float) -> bool:
        """Sleep until there is something to do; true if somebody asks.

        Without a Request the thread waits for one, or for the end of the connection: an Envoy that
        went away is looked for before anybody asks.
        """
        busy = bool(self._pending) or not self._met
        poll = select.poll()  # not select(2), which takes no descriptor beyond 1023
        poll.register(self._ear, select.POLLIN)
        if not busy and self.admin.fileno() >= 0:
            poll.register(self.admin.fileno(), select.POLLIN)
        ready = dict(poll.poll(pause * 1000 if busy else None))
        if self._ear.fileno() not in ready:
            return False
        self._ear.recv(4096)
        return True

    def _look(self) -> None:
        """Take what was submitted, look at Envoy once, and say what can be said."""
        with self._lock:
            submitted, self._submitted = self._submitted, []
        for request in submitted:
            subjects, now = self._learn(request), self.admin.clock()
            self._pending.append(Pending(request, subjects, request.baseline, now, now))
        asked_at = self.admin.clock()
        stats = self.admin.stats(stats_filter(known for _, known in self._subjects.values()))
        with self._lock:  # before the news: who hears it asks at once
            news = not self._met
            self.baseline, self._met, self._down = stats, True, False
        if news:
            self.post(Verdict(0, note=f"{self.admin.url} answers"))
        waiting, self._pending = self._pending, []
        late = max(0.0, stats.at - asked_at - POLL_LAST)  # a busy Envoy: its bounds wait with it
        for each in waiting:
            pending, states, note = progress(each._replace(begun=each.begun + late), stats)
            if states is None:
                self._pending.append(pending)
            else:
                self.post(self._verdict(pending, states, stats, note))

    def _learn(self, request: Request) -> dict[str, Subject]:
        """What to look for, of the files in question; and of all files, for the next baseline."""
        known, self._subjects = self._subjects, {}
        renaming = renaming_clusters(request.files)
        for path, file in request.files.items():
            digest, old = known.get(path, ("", Subject("", "", "")))
            if digest != file.digest or path in request.moved:
                old = subject_of(path, request.files, renaming).after(old)
            self._subjects[path] = (file.digest, old)
        return {path: self._subjects[path][1] for path in request.moved if path in self._subjects}

    def _verdict(
        self, pending: Pending, states: Mapping[str, str], now: Stats, note: str
    ) -> Verdict:
        request, base = pending.request, pending.base
        reasons = {
            path: self._reason(path, state, pending)
            for path, state in states.items()
            if state in (REJECTED, FAILED)
        }
        ignored = now.unknown_fields - base.unknown_fields if base.at else 0
        return Verdict(
            request.id,
            frozenset(path for path, state in states.items() if state == CONFIRMED),
            reasons,
            frozenset(path for path, state in states.items() if state in (UNREAD, PENDING)),
            unknown_fields=max(ignored, 0),
            waited=now.at - pending.submitted,
            note=note,
        )

    def _reason(self, path: str, state: str, pending: Pending) -> str:
        """Why a file was refused: Envoy's words where it has any, else what a look at it tells."""
        files, kind = pending.request.files, pending.subjects[path].kind
        counted = "update_rejected" if state == REJECTED else "update_failure, not parsable"
        words = self.admin.reasons(kind, files[path]) if state == REJECTED else ""
        causes = [each for each in (words, likely_cause(path, kind, files)) if each]
        return f"{counted}: {'; '.join(causes or ['the log of Envoy says why'])}"

    def _give_up(self, error: AdminError) -> None:
        """Say once that nothing answers, and answer everybody who waits with that."""
        with self._lock:
            news, self._met, self._down = not self._down, False, True
            submitted, self._submitted = self._submitted, []
        now = self.admin.clock()
        waiting = [(each.request.id, now - each.submitted) for each in self._pending]
        waiting += [(request.id, 0.0) for request in submitted]
        self._pending = []
        if news:
            self.post(Verdict(0, unanswered=True, note=str(error)))
        for number, waited in waiting:
            self.post(Verdict(number, unanswered=True, waited=waited))


# ---------------------------------------------------------------------------------------------
# Log, metrics, probes
# ---------------------------------------------------------------------------------------------

LOG_LEVELS = ("debug", "info", "warning", "error")
REMINDER = 300.0  # seconds between two lines about the same outage
# PIPE_BUF: a pipe accepts so much whole or not at all, whoever else writes to it.
LINE_BYTES = 4096
STDERR_PATIENCE = 20  # milliseconds for a reader of stderr that is behind


class Log:
    """One line a record to stderr, as text for people or as JSON for machines.

    A record is a message, `%`-formatted with `args` only if it is written, and fields:
    `log.info("published", version=v, files=1)`. A line is written whole, whichever thread it comes
    from, or not at all: where nobody reads stderr, lines are dropped and counted, and the loader
    goes on. (Not `logging`: it costs 6 ms of import, and what is needed of it are these lines.)
    """

    def __init__(self, fd: int = 2, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fd, self._clock = fd, clock
        self._lock = threading.Lock()
        self._blocked = False
        self._outages: dict[str, dict[str, float]] = {}  # topic -> message -> when it was written
        self.configure("text", "info")

    def configure(self, form: str, level: str) -> None:
        """What --log-format and --log-level say."""
        self._form, self._level = form, LOG_LEVELS.index(level)

    def outage(self, topic: str, message: str, /, **fields: object) -> None:
        """A warning about something persistent: written once, and again every five minutes.

        In between it is there at level debug. A new message on the same topic is written at once,
        but not a ninth one: errors that differ each time must not flood either.
        """
        now = self._clock()
        with self._lock:
            past = self._outages.setdefault(topic, {})
            known = message if message in past or len(past) < 8 else max(past, key=past.__getitem__)
            due = now - past.get(known, -REMINDER) >= REMINDER
            if due:
                past[known] = now
        self._write("warning" if due else "debug", message, **fields)

    def recovered(self, topic: str, message: str, /, **fields: object) -> None:
        """The end of an outage: one line if there was one, else nothing."""
        with self._lock:
            was_out = self._outages.pop(topic, None)
        if was_out:
            self._write("info", message, **fields)

    def _write(self, level: str, message: str, /, *args: object, **fields: object) -> None:
        if LOG_LEVELS.index(level) < self._level:
            return
        values = {name: plain_value(value) for name, value in fields.items()}
        text, now = message % args if args else message, timestamp(time.time())
        line = log_line(self._form, now, level, text, values)
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


def log_line(form: str, when: str, level: str, message: str, fields: Mapping[str, Json]) -> bytes:
    """`2025-11-20T23:31:54.120Z INFO published version=ab12 source="configmap demo/envoy-xds"`, or
    the same as a JSON object. Where it is too long, the longest of its texts are cut.
    """
    texts = {"message": message, **fields}
    while True:
        if form == "json":
            line = json.dumps({"time": when, "level": level, **texts})
        else:
            said = texts["message"]
            said = said if said.isprintable() else json.dumps(said)
            pairs = (f" {name}={text_value(texts[name])}" for name in fields)
            line = f"{when} {level.upper()} {said}{''.join(pairs)}"
        encoded = line.encode("utf-8", "backslashreplace") + b"\n"
        if len(encoded) <= LINE_BYTES:
            return encoded
        longest = max(texts, key=lambda name: len(str(texts[name])))
        texts[longest] = f"{str(texts[longest])[: len(str(texts[longest])) // 2]}..."


def plain_value(value: object) -> Json:
    """A number stays, a sequence is joined by commas, the rest is its str()."""
    if value is None or isinstance(value, int) or (isinstance(value, float) and value - value == 0):
        return value  # not NaN nor infinite, which JSON does not have
    if isinstance(value, (tuple, list, set, frozenset)):
        return ",".join(map(str, sorted(value) if isinstance(value, (set, frozenset)) else value))
    return str(value)


def text_value(value: Json) -> str:
    """A value in a text line. What comes from outside (names, reasons) cannot forge a line."""
    text = value if isinstance(value, str) else json.dumps(value)
    if not text.isprintable():
        return json.dumps(text)
    return json.dumps(text, ensure_ascii=False) if not text or re.search(r'[\s"=]', text) else text


def timestamp(now: float) -> str:
    """Unix time as RFC 3339 in UTC, to the millisecond."""
    seconds, millis = divmod(int(now * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{millis:03}Z"


log = Log()

# -- metrics -----------------------------------------------------------------------------------


class Metric(NamedTuple):
    """A declared metric: its type is counter, gauge or histogram."""

    name: str
    type: str
    help: str
    labels: tuple[str, ...] = ()


# fmt: off
METRICS = (
    Metric("xds_loader_info", "gauge", "The loader that runs.", ("version",)),
    Metric("xds_loader_publications_total", "counter", "Published snapshots by step.", ("step",)),
    Metric("xds_loader_published_files_total", "counter", "Files that changed in publications."),
    Metric("xds_loader_publication_duration_seconds", "histogram",
           "From an event to the file that Envoy reads."),
    Metric("xds_loader_ack_duration_seconds", "histogram", "From a publication to Envoy's answer."),
    Metric("xds_loader_nacks_total", "counter", "Files that Envoy rejected by type.", ("type",)),
    Metric("xds_loader_nacked_files", "gauge", "1 while the wanted bytes are NACKed.", ("file",)),
    Metric("xds_loader_unknown_files", "gauge", "1 while no ACK or NACK is known.", ("file",)),
    Metric("xds_loader_source_last_event_timestamp_seconds", "gauge",
           "When a source last answered: an event, a bookmark or a list.", ("source",)),
    Metric("xds_loader_source_synced", "gauge", "1 once the first list is complete.", ("source",)),
    Metric("xds_loader_watch_restarts_total", "counter", "Watches begun again by reason.",
           ("source", "reason")),
    Metric("xds_loader_api_requests_total", "counter", "Requests to the API server.",
           ("code", "verb")),
    Metric("xds_loader_errors_total", "counter", "Errors by kind.", ("kind",)),
    Metric("xds_loader_clusters", "gauge", "Clusters by where endpoints live.", ("endpoints",)),
    Metric("xds_loader_inotify_instances_budget", "gauge", "Files that Envoy may subscribe to."),
    Metric("xds_loader_inotify_instances_used", "gauge", "Files that Envoy subscribes to."),
    Metric("xds_loader_snapshot_info", "gauge", "The published snapshot.", ("version",)),
    Metric("xds_loader_snapshot_timestamp_seconds", "gauge", "When it was published."),
    Metric("process_resident_memory_bytes", "gauge", "Resident memory."),
    Metric("process_cpu_seconds_total", "counter", "User and system CPU time."),
    Metric("process_start_time_seconds", "gauge", "When the process started."),
    Metric("process_open_fds", "gauge", "Open file descriptors."),
)
# fmt: on

# From the 0.5 ms of a good publication to the 10 s after which nobody waits.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

Labels = tuple[str, ...]


class Metrics:
    """The values of METRICS, to be recorded from any thread in about a microsecond.

    Labels are a tuple of values in the order declared. An undeclared name is a KeyError.
    """

    def __init__(self, version: str) -> None:
        self._lock = threading.Lock()
        self._series: dict[str, dict[Labels, float]] = {
            metric.name: {(): 0.0} if metric.type == "counter" and not metric.labels else {}
            for metric in METRICS
        }
        # of a histogram: a count for each bucket, one for what lies beyond, and the sum
        self._histograms = {
            metric.name: [0.0] * (len(BUCKETS) + 2)
            for metric in METRICS
            if metric.type == "histogram"
        }
        self.set("xds_loader_info", 1, (version,))
        self.set("process_start_time_seconds", time.time())

    def add(self, name: str, labels: Labels = (), by: float = 1) -> None:
        """Count. `by=0` makes a series that starts at 0, which rate() needs to see the first 1."""
        with self._lock:
            series = self._series[name]
            series[labels] = series.get(labels, 0.0) + by

    def set(self, name: str, value: float, labels: Labels = ()) -> None:
        """Set a gauge."""
        with self._lock:
            self._series[name][labels] = value

    def replace(self, name: str, series: Mapping[Labels, float]) -> None:
        """Set all series of a gauge: those that are gone from it are gone from the output."""
        with self._lock:
            self._series[name] = dict(series)

    def observe(self, name: str, seconds: float) -> None:
        """Add a duration to a histogram."""
        with self._lock:
            histogram = self._histograms[name]
            histogram[bisect_left(BUCKETS, seconds)] += 1
            histogram[-1] += seconds

    def render(self) -> bytes:
        """All of it in Prometheus' text format 0.0.4, in an order that does not change."""
        for name, value in process_figures().items():
            self.set(name, value)
        with self._lock:
            series = {name: sorted(values.items()) for name, values in self._series.items()}
            histograms = {name: tuple(values) for name, values in self._histograms.items()}
        lines = []
        for name, kind, text, labels in METRICS:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            for values, value in series[name]:
                lines.append(f"{name}{label_text(labels, values)} {value:.15g}")
            if kind == "histogram":
                *counts, total = histograms[name]
                counts = [*itertools.accumulate(counts)]
                for bound, count in zip((*BUCKETS, "+Inf"), counts, strict=True):
                    lines.append(f'{name}_bucket{{le="{bound}"}} {count:.15g}')
                lines += [f"{name}_sum {total:.15g}", f"{name}_count {counts[-1]:.15g}"]
        return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")


metrics = Metrics(__version__)


def label_text(names: Labels, values: Labels) -> str:
    """`{code="200",verb="list"}`, "" without labels."""
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    pairs = (f'{n}="{v.translate(escapes)}"' for n, v in zip(names, values, strict=True))
    return "{" + ",".join(pairs) + "}" if names else ""


def process_figures() -> dict[str, float]:
    """What this process uses now, under the names that every Prometheus client gives it."""
    times = os.times()
    figures = {"process_cpu_seconds_total": round(times.user + times.system, 2)}
    try:
        with open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[1])
        figures["process_resident_memory_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
        figures["process_open_fds"] = len(os.listdir("/proc/self/fd")) - 1  # less this listing
    except OSError:  # not Linux, or out of descriptors
        pass
    return figures


# -- probes, metrics and the snapshot over HTTP ------------------------------------------------
#
# Whoever reaches the port needs no credentials, so everything is bounded: connections, their time,
# the size of a request, what rendering may cost. It shows one immutable Status, so it never waits
# for the loop nor the loop for it; and only names and figures: never the content of a file, nor
# Envoy's reasons, which quote it.

CONNECTIONS_MAX = 32  # each has a thread
CONNECTION_TIME = 5.0  # seconds from accept to close, whatever the client does
# The same while all threads are busy: a probe waits for 1 s, and with a full backlog of silent
# clients before it (128) it is answered after 128 / 32 * 0.05 s.
CROWDED_TIME = 0.05
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
        known = dict.fromkeys(self.files, "unknown") if state == "unknown" else {}
        return sorted(path for path, its in {**known, **self.states}.items() if its == state)


Answer = tuple[int, str, bytes]
"""An HTTP response: status code, Content-Type, body."""


def text_answer(code: int, *lines: str) -> Answer:
    body = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
    return code, "text/plain; charset=utf-8", body


def health_answer(status: Status, now: float) -> Answer:
    """/healthz: 200 while the loop turns. `now` is monotonic."""
    age, bound = now - status.last_turn, status.turn_bound
    if age <= bound:
        return text_answer(200, "ok")
    return text_answer(503, f"the loop has not turned for {age:.0f} s (bound: {bound:.0f} s)")


def ready_answer(status: Status, *, started: bool = True) -> Answer:
    """/readyz: 200 as soon as a snapshot is published. /startz: and Envoy has ACKed it.

    The body names what is not as it should be. A NACKed file or an API server that is down takes
    no running Envoy out of its Service.
    """
    ready = f"ready, version {status.version}" if started else "not ACKed by Envoy yet"
    lines = [ready if status.version else "no snapshot yet"]
    lines += [f"missing: {name}" for name in status.missing]
    lines += [f"stale: {name}" for name in status.stale]
    lines += [f"nacked: {name}" for name in status.paths("nacked")]
    return text_answer(200 if status.version and started else 503, *lines)


def snapshot_answer(status: Status) -> Answer:
    """/snapshot: the published files, their size, digest and source, and what Envoy made of them.

    A file that holds a secret has no size and no digest: with a digest one tests guesses at a
    password, and the port asks nobody for credentials.
    """
    rows = []
    for path, file in sorted(status.files.items()):
        row: dict[str, Json] = {"path": path, "source": file.source}
        if not holds_secret(file.content):
            row |= {"bytes": len(file.content), "sha256": file.digest}
        rows.append({**row, "state": status.states.get(path, "unknown")})
    body = {
        "version": status.version or None,
        "published_at": timestamp(status.published_at) if status.version else None,
        "files": rows,
        **{state: status.paths(state) for state in ("nacked", "unknown", "unread")},
        "missing": status.missing,
        "stale": status.stale,
    }
    return 200, "application/json", (json.dumps(body, indent=1) + "\n").encode()


def listen_address(text: str) -> tuple[str, int]:
    """`:9000`, `127.0.0.1:9000`, `[::1]:9000` as host ("" is every address) and port."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\s:\[\]/]*)):([0-9]{1,5})", text)
    if not found or int(found[3]) > 65535:
        raise ValueError("is not a valid [ADDRESS]:PORT, such as :9000 or [::1]:9000")
    return found[1] or found[2], int(found[3])


class Listener:
    """The server of --listen. The loop replaces `status`; all else belongs to its threads."""

    def __init__(self, host: str, port: int, recorded: Metrics) -> None:
        """Bind and serve. Raises LoaderError: an address in use ends the loader at its start."""
        self.status = Status({}, last_turn=time.monotonic())
        self._recorded = recorded
        self._rendering = threading.Lock()
        self._kept: dict[str, tuple[Status, float, Answer]] = {}  # path -> of, good until, answer
        self._server = probe_server(listening_socket(host, port), self.answer)
        self.port: int = self._server.socket.getsockname()[1]
        serve = threading.Thread(target=self._server.serve_forever, args=(TICK,), daemon=True)
        serve.start()

    def stop(self) -> None:
        """Close everything."""
        with contextlib.suppress(OSError):  # stopped before
            self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._server.shutdown()
        self._server.server_close()
        self._server.drop(0.0)

    def answer(self, path: str) -> Answer | None:
        """What is served there, None where there is nothing."""
        if path == "/healthz":
            return health_answer(self.status, time.monotonic())
        if path == "/readyz":
            return ready_answer(self.status)
        if path == "/startz":
            return ready_answer(self.status, started=self.status.started)
        if path not in ("/metrics", "/snapshot"):
            return None
        with self._rendering:
            status, began = self.status, time.monotonic()
            of, until, kept = self._kept.get(path, (None, 0.0, None))
            if kept and (began < until or (path == "/snapshot" and of is status)):
                return kept
            if path == "/snapshot":
                kept = snapshot_answer(status)
            else:
                kept = 200, "text/plain; version=0.0.4; charset=utf-8", self._recorded.render()
            now = time.monotonic()
            self._kept[path] = status, now + REUSED * (now - began), kept
            return kept


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; "" is every address, of IPv6 too if there is any."""
    try:
        if not host and socket.has_dualstack_ipv6():
            address, family, both = ("", port), socket.AF_INET6, True
        else:
            found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)
            address, family, both = (host, port), found[0][0], False
        return socket.create_server(address, family=family, backlog=128, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:  # UnicodeError: a host that cannot be a name
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        where = f"{host or '*'} port {port}"
        raise LoaderError(f"--listen: cannot bind {where}: {reason}") from error


def probe_server(bound: socket.socket, answer: Callable[[str], Answer | None]) -> Any:
    """A server of these answers, with a thread for each connection.

    Made in a function, because http.server takes 15 ms to import and only --listen needs it.
    """
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "xds-loader", ""
        error_content_type, error_message_format = "text/plain", "%(code)d %(explain)s\n"

        def setup(self) -> None:
            """Of a request no more than HEAD_MAX is read; http.server would read 6 MB."""
            super().setup()
            self.rfile.close()
            head = block = self.request.recv(HEAD_MAX)
            while block and not re.search(rb"\n\r?\n", head) and len(head) < HEAD_MAX:
                block = self.request.recv(HEAD_MAX - len(head))
                head += block
            self.rfile = io.BytesIO(head)

        def do_GET(self) -> None:
            found = answer(self.path.partition("?")[0])
            if found is None:
                self.send_error(404)
                return
            code, content_type, body = found
            self.send_response(code)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Not a line a request."""

    class Server(ThreadingHTTPServer):
        def __init__(self) -> None:
            super().__init__(("", 0), Handler, bind_and_activate=False)
            self.socket.close()
            self.socket = bound
            self.room = threading.Semaphore(CONNECTIONS_MAX)
            self.since: dict[Any, float] = {}  # when each connection was accepted

        def drop(self, age: float) -> None:
            """Shut connections of this age or more: their threads, which read or write, end."""
            for request, since in list(self.since.items()):
                if time.monotonic() - since >= age:
                    with contextlib.suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

        def service_actions(self) -> None:
            self.drop(CONNECTION_TIME)

        def get_request(self) -> Any:
            try:
                return super().get_request()
            except OSError:  # no descriptor is left: not to spin
                time.sleep(0.01)
                raise

        def process_request(self, request: Any, client_address: Any) -> None:
            """A crowd makes room by those that dawdle."""
            while not self.room.acquire(timeout=CROWDED_TIME):
                self.drop(CROWDED_TIME)
            self.since[request] = time.monotonic()
            super().process_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            """The end of every connection."""
            super().shutdown_request(request)
            if self.since.pop(request, None) is not None:
                self.room.release()

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that went away."""
            log.debug("a probe failed: %s", why(sys.exception() or Exception()))

    return Server()


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------

CHILDREN, CLUSTERS, REFERENCES, REMOVALS = 1, 2, 3, 4
STAGES = {
    CHILDREN: "children", CLUSTERS: "clusters", REFERENCES: "references", REMOVALS: "removals"
}


class Composition(NamedTuple):
    """What the sources ask for now. `missing` or `unknown`: nothing may be published yet."""

    files: dict[str, File]
    warnings: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()  # sources that were not listed yet
    missing: tuple[str, ...] = ()  # named objects that do not exist and never did
    stale: tuple[str, ...] = ()  # sources that keep their last files
    failed: tuple[str, ...] = ()  # what a one-time run could not list

    @property
    def notes(self) -> tuple[str, ...]:
        return self.warnings

    @property
    def complete(self) -> bool:
        """Whether it may be published."""
        return not (self.unknown or self.missing or self.failed)


class Sources:
    """All reflectors of a run, and the files that their objects make together."""

    def __init__(self, options: Options, config: Config, wake: Callable[[Wake], None]) -> None:
        self.options = options
        self._config = config
        self._wake = wake
        self._trust = Trust(options.access)
        self._file = FileClient(options.from_file, options.namespace) if options.from_file else None
        self._reflectors: dict[Query, Reflector] = {}
        self._kept: dict[Named, dict[str, File]] = {}
        self._secrets: dict[Key, tuple[Secret, dict[str, File], tuple[str, ...]]] = {}
        self._ends: dict[tuple[str, ...], float] = {}
        self._translator: Translator | None = None
        self.rendering: Rendering | None = None
        own = config.eds_budget
        self.budget = inotify_budget() if own is None else own

    # -- starting ---------------------------------------------------------------------------

    def start(self, published: Files) -> None:
        """Start every reflector. What is published tells what sources had before a restart."""
        options = self.options
        for named in self._named():
            owned = {path: file for path, file in published.items() if named.owns(path, file)}
            if owned:
                self._kept[named] = owned
            self._reflect(self._query(named), secret_from if named.kind == "secret"
                          else configmap_from)
        if options.configmap_selector is not None:
            self._reflect(self._selector_query(), configmap_from)
        if options.services is not None:
            self._translator = Translator(
                self._config,
                endpoints=options.endpoints,
                fmt=options.format,
                current_dir=f"{os.path.abspath(options.output_dir)}/{CURRENT}",
                node_name=options.node_name,
                on_eds=eds_clusters(published),
                on_inline=inline_clusters(published),
                budget=self.budget,
            )
            for namespace in self._service_namespaces():
                self._reflect(Query(SERVICES, namespace, labels=options.services), service_from)
                self._reflect(Query(ENDPOINTSLICES, namespace), endpointslice_from, optional=True)
            if needs_nodes(self._config):
                self._reflect(Query(NODES), node_from)

    def _named(self) -> tuple[Named, ...]:
        return self.options.configmap + self.options.secret

    def _query(self, named: Named) -> Query:
        resource = SECRETS if named.kind == "secret" else CONFIGMAPS
        return Query(resource, named.namespace, named.name)

    def _selector_query(self) -> Query:
        selector = self.options.configmap_selector or ""
        return Query(CONFIGMAPS, self.options.namespace, labels=selector)

    def _service_namespaces(self) -> tuple[str, ...]:
        chosen = self.options.services_namespace or (self.options.namespace,)
        return ("",) if "*" in chosen else chosen

    def _reflect(
        self, query: Query, parse: Callable[[dict[str, Any]], Any], *, optional: bool = False
    ) -> Reflector:
        found = self._reflectors.get(query)
        if found is not None:
            return found
        options = self.options
        mode, interval, patience = options.mode, options.sync_interval, BACKOFF_LAST
        if mode == "once" and options.timeout:
            mode, interval, patience = "poll", ONETIME_POLL, 2 * ONETIME_POLL
        elif options.from_file:
            patience = min(patience, interval)  # nobody is hammered
        client = self._file or ApiClient(options.access, self._trust, count_request)
        reflector = Reflector(
            query, parse, client, self._wake,
            mode=mode, interval=interval, optional=optional, patience=patience,
        )
        self._reflectors[query] = reflector
        metrics.set("xds_loader_source_synced", 0, (str(query),))
        reflector.start()
        return reflector

    def poke(self) -> None:
        """List or connect now."""
        for reflector in self._reflectors.values():
            reflector.poke()

    def troubles(self) -> tuple[str, ...]:
        """What goes wrong now, in words."""
        return tuple(r.trouble for r in self.reflectors() if r.trouble)

    def troubled(self) -> tuple[str, ...]:
        """The queries that cannot be asked now: what they gave may be stale."""
        return tuple(str(r.query) for r in self.reflectors() if r.trouble and r.synced)

    def reflectors(self) -> tuple[Reflector, ...]:
        return tuple(self._reflectors.values())

    # -- composing --------------------------------------------------------------------------

    def compose(self) -> Composition:
        """The files of all sources. Precedence, last wins: rendered files, Secrets, ConfigMaps by
        selector in order of namespace and name, ConfigMaps in the order they were named."""
        failed = tuple(r.trouble for r in self.reflectors() if r.failed)
        unknown = tuple(
            str(r.query)
            for r in self.reflectors()
            # Endpoints sought later, for a Service that has none so far, keep nobody waiting.
            if not r.synced and (self.rendering is None or r.query.resource is not ENDPOINTS)
        )
        if failed or unknown:
            return Composition({}, unknown=unknown, failed=failed)
        notes: list[str] = []
        stale: list[str] = []
        missing: list[str] = []
        layers: list[Files] = []
        layers += [self._named_files(named, notes, stale, missing)
                   for named in self.options.secret]
        if self.options.configmap_selector is not None:
            objects = self._objects(self._selector_query(), notes)
            for _, configmap in sorted(objects.items()):
                notes += configmap.problems
                layers.append(dict(configmap.files))
        layers += [self._named_files(named, notes, stale, missing)
                   for named in self.options.configmap]
        others, warnings = overlaid(layers)
        if self._translator is not None:
            if self.rendering is None and not self.seek_endpoints():
                return Composition({}, unknown=("endpoints",))
            rendering = self._render(others)
            notes += rendering.warnings
            if rendering.inlined:
                beyond = f"beyond the EDS budget of {self.budget}"
                notes.append(f"{beyond}, endpoints are in CDS: {shortened(rendering.inlined)}")
            notes += hidden(rendering.files, others)
            others, warnings = overlaid([without(rendering.files, others), *layers])
        return Composition(others, (*notes, *warnings), (), tuple(missing), tuple(stale))

    def _objects(self, query: Query, notes: list[str]) -> dict[Key, Any]:
        reflector = self._reflectors[query]
        notes += reflector.bad.values()
        return reflector.objects()

    def _named_files(
        self, named: Named, notes: list[str], stale: list[str], missing: list[str]
    ) -> Files:
        """The files of a named object; the last ones where it is gone, emptied or bad."""
        found = self._objects(self._query(named), notes).get((named.namespace, named.name))
        files: dict[str, File] = {}
        if isinstance(found, Secret):
            files, problems = self._secret_files(found)
            notes += problems
        elif found is not None:
            files = placed(found.files, named.directory)
            notes += found.problems
        kept = self._kept.get(named)  # None: it never was there
        if files or (found is not None and not kept and named.kind == "configmap"):
            kept = self._kept[named] = files
        elif kept is None:
            missing.append(named.source)
        else:
            state = "has no usable files" if found is not None else "does not exist any more"
            notes.append(f"{named.source} {state}: its last files stay")
            stale.append(named.source)
        return kept or {}

    def _secret_files(self, secret: Secret) -> tuple[dict[str, File], tuple[str, ...]]:
        """The SDS files of a Secret, made and checked once for each change of it."""
        key = secret.namespace, secret.name
        known = self._secrets.get(key)
        if known is None or known[0] is not secret:
            files, problems = secret_files(secret, self.options.format, self.options.secret_mode)
            self._secrets[key] = known = secret, files, problems
        return known[1], known[2]

    # -- Services ---------------------------------------------------------------------------

    def seek_endpoints(self) -> bool:
        """Ask for legacy Endpoints where no slice tells; whether all that was asked is known.

        They serve where the API has no slices or RBAC does not give them, and for a Service of
        which no slice is known. Where slices tell everything, they are never asked for. Looked at
        before the first rendering and at each check: a new Service has no slice for a moment.
        """
        selector, known = self.options.services or "", True
        for namespace in self._service_namespaces() if self._translator else ():
            slices = self._reflectors[Query(ENDPOINTSLICES, namespace)]
            services = self._reflectors[Query(SERVICES, namespace, labels=selector)]
            if slices.absent or without_slices(services.objects(), slices.objects()):
                legacy = self._reflect(Query(ENDPOINTS, namespace), endpoints_from,
                                       optional=not slices.absent)
                known = known and legacy.synced
        return known

    def _gathered(self, resource: Resource, notes: list[str] | None = None) -> dict[Key, Any]:
        """The objects of one resource, of all namespaces that are looked at."""
        found: dict[Key, Any] = {}
        for query, reflector in self._reflectors.items():
            if query.resource is resource:
                found.update(reflector.objects())
                if notes is not None:
                    notes += reflector.bad.values()
        return found

    def _render(self, others: Files) -> Rendering:
        assert self._translator is not None
        notes: list[str] = []
        nodes = self._gathered(NODES, notes)
        objects = Objects(
            services=self._gathered(SERVICES, notes),
            slices=self._gathered(ENDPOINTSLICES, notes),
            endpoints=self._gathered(ENDPOINTS, notes),
            nodes={name: node for (_, name), node in nodes.items()},
        )
        kinds = [kind_of_file(file) for file in others.values()]
        subscriptions = sum(kind in ("eds", "rds", "sds") for kind in kinds)
        rendering = self._translator.render(objects, other_files=subscriptions)
        self.rendering = rendering
        return rendering._replace(warnings=(*notes, *rendering.warnings))


def without(files: Files, hidden_by: Files) -> dict[str, File]:
    return {path: file for path, file in files.items() if path not in hidden_by}


ROUTE_MATCH = rb"(?m)^ *- match:|\"match\":"


def hidden(rendered: Files, others: Files) -> list[str]:
    """A warning for each rendered file that a ConfigMap key of the same name hides."""
    notes = []
    for path in sorted(rendered.keys() & others.keys()):
        kind = kind_at(path, rendered)
        what = {
            "cds": f"{len(clusters_in(rendered[path]) or ())} rendered clusters",
            "rds": f"{len(re.findall(ROUTE_MATCH, rendered[path].content))} rendered routes",
        }.get(kind, "rendered endpoints")
        notes.append(f"{path} of {others[path].source} hides {what}")
    return notes


def without_slices(services: Mapping[Key, Service], slices: Mapping[Key, EndpointSlice]) -> bool:
    """Whether there is a Service of which no slice is known, though it should have endpoints."""
    known = {(key[0], piece.service) for key, piece in slices.items()}
    return any(
        key not in known and bool(service.ports) and service.external_name is None
        for key, service in services.items()
    )


def count_request(verb: str, code: str) -> None:
    metrics.add("xds_loader_api_requests_total", (code, verb))


class Envoy:
    """What is known of Envoy's word: which bytes it confirmed, which it refused.

    A path in `unconfirmed` was published, or taken away, and Envoy has not said yet that it goes
    on without the bytes before. Those are its value: the file (None: there was none) and the
    snapshot that holds it, which must stay so long.
    """

    def __init__(self, output: Output, *, asked: bool) -> None:
        self._output = output
        self.asked = asked
        self.unconfirmed: dict[str, tuple[str, File | None]] = {}
        self.refused: dict[str, Refusal] = {}
        self.moved: dict[str, float] = {}  # wall clock of the last notification

    def remember(self) -> None:
        """Read what the process before knew. Without --envoy-admin nobody is refused anything."""
        if not self.asked:
            return
        state = self._output.read_state("envoy")
        for path, snapshot in json_object(state.get("confirmed")).items():
            file = self._output.file_in(str(snapshot), path)
            self.unconfirmed[path] = (str(snapshot) if file else "", file)
        for path, row in json_object(state.get("refused")).items():
            if isinstance(row, list) and len(row) == len(Refusal._fields):
                self.refused[path] = Refusal(*map(str, row))
        self.moved = self._output.link_times(self.unconfirmed)
        metrics.replace("xds_loader_nacked_files", {(path,): 1.0 for path in self.refused})

    def publishing(self, paths: Iterable[str], before: Files, snapshot: str) -> None:
        """Before a publication: what stands at these paths is the last that Envoy confirmed."""
        if not self.asked:
            return
        now = time.time()
        for path in paths:
            self.moved[path] = now
            if path not in self.unconfirmed:
                old = before.get(path)
                self.unconfirmed[path] = (snapshot if old else "", old)
        self.save()

    def judged(self, verdict: Verdict, files: Files, *, last: bool) -> None:
        """Take in a verdict on published files; `last`: no further step was to come.

        What nobody reads after the last step has nobody to ask. What was taken away is done with
        once CDS and LDS, which may have named it, are confirmed.
        """
        done = set(verdict.confirmed)
        if last and not verdict.rejected:
            done |= verdict.unread - {path for path in files if self.is_refused(path, files[path])}
        waiting = self.unconfirmed.keys() - done
        if not any(kind_at(path, files) in ("cds", "lds") for path in waiting & files.keys()):
            done |= self.unconfirmed.keys() - files.keys()
        for path in done & self.unconfirmed.keys():
            del self.unconfirmed[path]
        self.save()

    def is_refused(self, path: str, file: File) -> bool:
        """Whether these bytes are among those that Envoy refused."""
        return is_refused(file, path, self.refused)

    def forget(self, wanted: Files, published: Files) -> None:
        """A refusal holds until the desired bytes change, and what was refused is put back."""
        kept = {path: refusal for path, refusal in self.refused.items()
                if (path in wanted and wanted[path].digest == refusal.digest)
                or (path in published and published[path].digest == refusal.shown)}
        if len(kept) != len(self.refused):
            self.refused = kept
            self.save()

    def last_confirmed(self, published: Files) -> dict[str, File]:
        """The confirmed bytes by path: what is published, unless it is not confirmed."""
        files = {path: file for path, file in published.items() if path not in self.unconfirmed}
        files.update((path, file) for path, (_, file) in self.unconfirmed.items() if file)
        return files

    def to_put_back(self, published: Files) -> dict[str, File]:
        """The confirmed bytes of what stands and was refused, and the files that they name."""
        confirmed = self.last_confirmed(published)
        back = {
            path: confirmed[path]
            for path, refusal in self.refused.items()
            if path in published
            and path in confirmed
            and published[path].digest == refusal.shown != confirmed[path].digest
        }
        named = {
            path: file
            for path, file in confirmed.items()
            if path not in published
            and any(names_file(each.content, path) for each in back.values())
        }
        return {**back, **named}

    def needed(self) -> set[str]:
        """The snapshots that hold confirmed bytes: those of most files, should Envoy never answer.

        What a living loader puts back it has in memory; the snapshots are for a restart.
        """
        held = Counter(snapshot for snapshot, _ in self.unconfirmed.values() if snapshot)
        return {snapshot for snapshot, _ in held.most_common(KEPT_MOST)}

    def save(self) -> None:
        """Remember it for a restart."""
        if not self.asked:
            return
        confirmed = {path: snapshot for path, (snapshot, _) in self.unconfirmed.items()}
        self._output.write_state("envoy", {"confirmed": confirmed, "refused": self.refused})
        metrics.replace("xds_loader_nacked_files", {(path,): 1.0 for path in self.refused})


class Gate(NamedTuple):
    """What the next ordered step waits for: Envoy's word on a request, or a time."""

    closed_at: float
    until: float
    before: Files  # what stood before the step that is waited for
    request: int


class Asked(NamedTuple):
    """A publication that Envoy was asked about."""

    files: Files
    target: Files  # where its step was on the way to
    moved: frozenset[str]  # the paths that were asked about
    told: Mapping[str, object]  # the fields of its line in the log


class Loop:
    """The main thread: waits, composes, orders, publishes, listens to Envoy."""

    def __init__(self, options: Options, config: Config) -> None:
        self.options = options
        self.wakes = Wakes()
        self.sources = Sources(options, config, self.wakes.put)
        self.output = Output(options.output_dir)
        self.envoy = Envoy(self.output, asked=bool(options.envoy_admin))
        self.listener: Listener | None = None
        self.stopping = False
        self.stop_event = threading.Event()
        self._once = options.mode == "once"
        self._composition: Composition | None = None
        self._said: dict[str, frozenset[str]] = {}  # what was warned of, by topic
        self._target: Files | None = None  # where the ordered steps under way lead
        self._confirmer: Confirmer | None = None
        self._request = 0  # the last one that Envoy was asked
        self._asked: dict[int, Asked] = {}
        self._gate: Gate | None = None  # what the next step waits for
        self._settled = False  # whether this process has seen a step through
        self._checked = ("", True)  # version that --check-cmd judged, and how
        self._event_at = 0.0
        self._published_at = 0.0
        self._published_wall = 0.0
        self._counted = ""  # the snapshot that the metrics tell of
        self._newest = 0.0  # when the newest event came that is not published yet
        self._alone = 1  # how many close events in a row may go unheld, once nobody else came
        self._lonely = 0  # how many of them are left
        self._retry_at = 0.0
        self._backoff = Backoff()
        # A defect in a thread must end the process: a deaf sidecar looks like a quiet one.
        threading.excepthook = lambda failed: self.wakes.put(
            Wake("defect", time.monotonic(), failed.exc_value)
        )

    # -- running ------------------------------------------------------------------------------

    def run(self) -> int:
        """Until SIGTERM or SIGINT; with --onetime until the first complete snapshot."""
        began = time.monotonic()
        deadline = began + self.options.timeout
        check_at = began + self.options.sync_interval
        self._event_at = began
        try:
            self._open()
        except OSError as error:
            raise LoaderError(self._disk_trouble(error)) from error
        done = False
        while not self.stopping:
            self._turn()
            done = self._once and self._finished(deadline)
            if done:
                break
            if not self._once and time.monotonic() >= check_at:
                check_at = time.monotonic() + self.options.sync_interval
                self._check()
            self._tell()
            self._await(self._wait_until(deadline) if self._once else check_at)
        return self._end(done=done)

    def _end(self, *, done: bool) -> int:
        for asked in self._asked.values():
            if asked.told:
                log.info("published", **asked.told, confirmed="ended before")
        if self.listener is not None:
            self.listener.stop()
        self.output.unlock()
        if self._once and not done:
            raise LoaderError("ended by a signal before there was a snapshot to publish")
        return 0

    def _open(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # A signal interrupts nothing: it wakes the loop, as everything does.
            signal.signal(number, lambda number, _: self._signalled(number))
        signal.set_wakeup_fd(self.wakes.write, warn_on_full_buffer=False)
        if self.options.listen and not self._once:
            self.listener = Listener(*self.options.listen, metrics)
        self.output.lock()
        done = self.output.recover()
        if done:
            log.info("%s: %s", self.output.root, "; ".join(done))
        metrics.set("xds_loader_inotify_instances_budget", self.sources.budget)
        self._published_wall = self.output.switched_at()
        self._name_strangers()
        self.envoy.remember()
        self.sources.start(self.output.published)
        if self.options.envoy_admin and not self._once:
            self._confirmer = Confirmer(
                Admin(self.options.envoy_admin),
                lambda verdict: self.wakes.put(Wake("verdict", time.monotonic(), verdict)),
            )
            self._confirmer.start()

    def _signalled(self, number: int) -> None:
        self.stopping = self.stopping or number != signal.SIGHUP
        if self.stopping:
            self.stop_event.set()
        self.wakes.put(Wake("signal", time.monotonic(), number))

    # -- waiting ------------------------------------------------------------------------------

    def _await(self, until: float) -> None:
        """Sleep until something happens; afterwards everything that happened is taken in."""
        times = [until]
        if self._gate is not None:
            times.append(self._gate.until)
        if self._retry_at:
            times.append(self._retry_at)
        self._newest = 0.0
        wake = self._next(min(times))
        while wake is not None:
            self._take(wake)
            wake = self._next(0.0)
        if self._newest and not self._once:
            self._hold_off()

    def _next(self, until: float) -> Wake | None:
        return self.wakes.get(0.0 if self.stopping else until - time.monotonic())

    def _hold_off(self) -> None:
        """Gather what belongs to a burst before it is published."""
        since = self._newest - self._published_at
        if since >= HOLDOFF_QUIET:
            return
        if since > 0 and self._lonely > 0:
            self._lonely -= 1
            return
        if self._gathered():
            self._alone = 1
        else:
            self._alone = min(2 * self._alone, HOLDOFF_LONELY)
            self._lonely = self._alone

    def _gathered(self) -> int:
        """Take in events until it is quiet, for a bounded time; how many came."""
        end, count = time.monotonic() + HOLDOFF_GATHER, 0
        while not self.stopping and time.monotonic() < end:
            wake = self._next(min(end, time.monotonic() + HOLDOFF_QUIET))
            if wake is None:
                break
            self._take(wake)
            count += wake.what == "objects"
        return count

    def _take(self, wake: Wake) -> None:
        if wake.what == "defect":
            assert isinstance(wake.news, BaseException)
            raise wake.news
        if wake.what == "objects":
            self._newest = wake.at
            if self._composition is not None:
                self._event_at = wake.at
            self._composition = None
        elif wake.what == "trouble" and self._once:
            self._composition = None  # it has failed
        elif isinstance(wake.news, Verdict):
            self._judge(wake.news)
        elif wake.what == "signal" and wake.news == signal.SIGHUP:
            log.info("SIGHUP: checking and publishing now")
            self.sources.poke()
            self._retry_at = min(self._retry_at, time.monotonic())
            self._check()

    # -- turning ------------------------------------------------------------------------------

    def _turn(self) -> None:
        """One decision: what is wanted, and the next snapshot on the way there."""
        if self._gate is not None and time.monotonic() >= self._gate.until:
            self._gate = None  # here, whatever follows: nobody may wait for a time that is past
        fresh = self._composition is None
        composition = self._composition = self._composition or self.sources.compose()
        self._go_on(composition)
        if fresh:  # after the publication: words can wait
            self._say(composition)

    def _go_on(self, composition: Composition) -> None:
        """Towards what the sources ask for, as far as it goes now."""
        if self._retry_at and time.monotonic() < self._retry_at:
            return
        try:
            if self._retry_at:
                self.output.recover()
                self.envoy.save()
                self._look_again()
                self._retry_at = 0.0
            if not composition.complete:
                return
            wanted, notes = self.output.fitting(composition.files)
            self._note("unfit", notes)
            if self._target is not None:
                self._target = self.output.fitting(self._target)[0]
            while not self.stopping and self._advance(wanted):
                pass
            self._backoff.reset()
        except OSError as error:
            if self._once or not self.output.is_there():
                raise LoaderError(self._disk_trouble(error)) from error
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        """The disk refused: what stood goes on serving, and the next try begins by repairing.

        A step may be half done: as after a restart, plan anew and wait before what builds on it.
        """
        self._target, self._settled = None, False
        delay = self._backoff.delay()
        metrics.add("xds_loader_errors_total", ("disk",))
        log.outage("disk", self._disk_trouble(error), next_try_s=round(delay, 1))
        self._retry_at = time.monotonic() + delay

    def _disk_trouble(self, error: OSError) -> str:
        hint = {
            errno.EACCES: "run init container, loader and Envoy as one user",
            errno.EPERM: "run init container, loader and Envoy as one user",
            errno.EROFS: "mount a writable volume there",
            errno.ENOSPC: "make room: a snapshot needs what its changed files need",
            errno.EMFILE: "raise the limit of open files",
        }.get(error.errno or 0, "the last snapshot goes on serving")
        return f"cannot publish to {self.output.root}: {why(error)}; {hint}"

    def _advance(self, wanted: Files) -> bool:
        """Publish the next snapshot if it is its time; whether there may be more to do at once."""
        published = self.output.published
        desired = self._allowed(wanted, published)
        if not self._accepted(desired):
            if self._target is None:
                return False
            desired = self._target  # what was accepted before goes on to its end
        if self._once or not self.output.snapshot:
            if not self.output.snapshot or not same(published, desired):
                first = "" if self.output.snapshot else "the first snapshot"
                self._publish(desired, "whole", first or "one step, asked for by --onetime")
            self._settled = True
            return False
        if self._gate is None:
            return self._step(published, self._target or desired)
        now = independent(published, self._target or desired, desired, self._gate.before)
        if not same(now, published):
            if self._target is not None:
                self._target = carry(self._target, published, now)
            routes = any(kind_at(path, now) in REFERRERS for path in moved_paths(published, now))
            self._publish(now, "independent", "needs nothing that is pending", self._target or now)
            if routes:  # what these do not name any more goes after Envoy has them
                until = max(self._gate.until, self._paused(self._gate))
                self._gate = self._gate._replace(request=self._request, until=until)
        return False

    def _step(self, published: Files, target: Files) -> bool:
        """Publish one ordered step towards the target, and close the gate before the next."""
        if back := self.envoy.to_put_back(published):
            # First of all: a union with bytes that Envoy refused is refused again, and bytes that
            # nobody can parse have no clusters to keep.
            self._publish({**published, **back}, PUT_BACK, PUT_BACK, target)
            self._close(published)
            return False
        step = next_step(published, target, self.envoy.refused)
        if step is None:
            more, self._target, self._settled = self._target is not None, None, True
            return more
        if step.stage in (REFERENCES, REMOVALS) and not self._settled:
            # The process before may have died right after the step before: wait again.
            self._settled = True
            self._target = target
            if self._confirmer:
                self._ask(Asked(published, target, frozenset(), {}), UNSEEN)
            self._close(published)
            return False
        self._settled = True
        self._target = None if same(step.files, target) else target
        name = step.reason if step.reason == PUT_BACK else STAGES[step.stage]
        self._publish(step.files, name, step.reason, target)
        ordered = step.stage in (CLUSTERS, REFERENCES) or populated(published, step.files)
        if ordered or self._target is not None:
            # Also after the last step: the next change may name what this one brought.
            self._close(published)
        return self._gate is None

    def _close(self, before: Files) -> None:
        """Close the gate before the next ordered step: Envoy's word opens it, or time."""
        now = time.monotonic()
        wait = VERDICT_BOUND if self._confirmer else self.options.step_delay or 0.1
        self._gate = Gate(now, now + wait, before, self._request)

    def _publish(self, files: Files, step: str, reason: str, target: Files | None = None) -> None:
        """Publish one snapshot, tell everybody, then tidy up."""
        before, snapshot = self.output.published, self.output.snapshot
        moved = [*moved_paths(before, files), *(before.keys() - files.keys())]
        self.envoy.publishing(moved, before, snapshot)
        baseline = self._confirmer.baseline if self._confirmer else UNSEEN
        paths = self.output.publish(files, self.envoy.needed())
        self.envoy.moved.update(dict.fromkeys(moved, self.output.switching))
        self._published_at, self._published_wall = time.monotonic(), time.time()
        took = self._published_at - self._event_at
        metrics.add("xds_loader_publications_total", (step,))
        metrics.add("xds_loader_published_files_total", by=len(paths))
        metrics.observe("xds_loader_publication_duration_seconds", took)
        sources = {found[path].source for path in paths for found in (files, before)
                   if path in found}
        told = {
            "version": self.output.snapshot[2:], "step": step, "files": len(paths),
            "changed": shortened(paths), "source": shortened(sorted(sources)), "reason": reason,
            "duration_ms": round(took * 1000, 1),
        }
        if self._confirmer:
            self._ask(
                Asked(files, files if target is None else target, frozenset(moved), told), baseline
            )
        else:
            log.info("published", **told)
        log.recovered("disk", f"{self.output.root} can be written again")
        self.output.prune()

    def _count_snapshot(self) -> None:
        """The metrics of the snapshot that stands, once for each."""
        if self.output.snapshot == self._counted:
            return
        self._counted = self.output.snapshot
        files = self.output.published
        metrics.replace("xds_loader_snapshot_info", {(self.output.snapshot[2:],): 1.0})
        metrics.set("xds_loader_snapshot_timestamp_seconds", self._published_wall)
        used = sum(kind_at(path, files) in STAT_SCOPES for path in files)
        metrics.set("xds_loader_inotify_instances_used", used)

    # -- Envoy's word -------------------------------------------------------------------------

    def _allowed(self, wanted: Files, published: Files) -> Files:
        """What is wanted, less what Envoy refused and what needs it."""
        self.envoy.forget(wanted, published)
        notes: list[str] = []
        if self.envoy.refused:
            confirmed = self.envoy.last_confirmed(published)
            wanted, notes = withhold(wanted, published, self.envoy.refused, confirmed)
        self._note("refused", notes)
        return wanted

    def _ask(self, asked: Asked, baseline: Stats) -> None:
        """Ask Envoy about all that it has not confirmed; what it said before does not count."""
        assert self._confirmer is not None
        self._request += 1
        envoy, files = self.envoy, asked.files
        # What an open request is about is not asked again: counted from now it would be unread.
        covered = {path for each in self._asked.values() for path in each.moved}
        moved = {path: envoy.moved.get(path, 0.0)
                 for path in envoy.unconfirmed.keys() - (covered - asked.moved)
                 if path in files and not envoy.is_refused(path, files[path])}
        self._asked[self._request] = asked._replace(moved=frozenset(moved))
        overlapping = frozenset(covered & asked.moved)
        self._confirmer.submit(
            Request(self._request, files, moved, baseline, overlapping=overlapping)
        )

    def _look_again(self) -> None:
        """Ask about what stands: since the last question links moved, or Envoy started."""
        if self._confirmer is not None and self.output.snapshot:
            target = self._target or self.output.published
            self._ask(Asked(self.output.published, target, frozenset(), {}), UNSEEN)

    def _judge(self, verdict: Verdict) -> None:
        """Take in Envoy's word on a publication, or on whether it is there at all."""
        if verdict.id == 0:
            if verdict.unanswered:
                log.outage("envoy", f"Envoy does not answer ({verdict.note}): unconfirmed so long")
            else:
                log.recovered("envoy", verdict.note)
                self._look_again()
            return
        asked = self._asked.pop(verdict.id)
        now = self.output.published
        still = {path for path, file in asked.files.items() if standing(now, path, file)}
        rejected = {path: verdict.rejected[path] for path in verdict.rejected.keys() & still}
        if not verdict.unanswered:
            of_these = verdict._replace(
                confirmed=verdict.confirmed & still, unread=verdict.unread & still
            )
            self._take_word(of_these._replace(rejected=rejected), asked)
        self._tell_verdict(verdict, rejected, asked)
        if self._gate is not None and min(self._asked, default=math.inf) > self._gate.request:
            # Where Envoy does not answer, the pause between steps is what is left.
            until = self._paused(self._gate) if verdict.unanswered else self._gate.closed_at
            self._gate = self._gate._replace(until=until)

    def _paused(self, gate: Gate) -> float:
        """When the pause after the last publication is over; no stream of them lasts for ever."""
        last = max(self._published_at, gate.closed_at)
        return min(last + (self.options.step_delay or 0.1), gate.closed_at + VERDICT_BOUND)

    def _take_word(self, verdict: Verdict, asked: Asked) -> None:
        envoy = self.envoy
        confirmed = envoy.last_confirmed(self.output.published)
        found = refusals(envoy.refused, verdict.rejected, asked.target, asked.files, confirmed)
        envoy.refused = found
        self._tell()  # before the metric: who sees one, finds the other
        try:
            envoy.judged(verdict, asked.files, last=same(asked.files, asked.target))
            self.output.prune(envoy.needed())
        except OSError as error:
            self._failed(error)
        if verdict.rejected:
            self._target = None  # the plan was made without knowing this
        metrics.observe("xds_loader_ack_duration_seconds", verdict.waited)
        for path in verdict.rejected:
            kind = kind_at(path, asked.files) or "other"
            metrics.add("xds_loader_nacks_total", (kind,))

    def _tell_verdict(self, verdict: Verdict, rejected: Mapping[str, str], asked: Asked) -> None:
        """The line of a publication, and one for each file that Envoy refused."""
        word = "unanswered" if verdict.unanswered else "no" if rejected else "yes"
        if asked.told:
            log.info("published", **asked.told, confirmed=word,
                     confirmed_ms=round(verdict.waited * 1000, 1))
        if verdict.note:
            log.warning("%s", verdict.note)
        if verdict.unread and not self._target and asked.told:
            log.debug("no subscription of Envoy reads %s", shortened(sorted(verdict.unread)))
        for path, reason in sorted(rejected.items()):
            log.error("Envoy refuses %s (%s): %s; its last good bytes are put back", path,
                      kind_at(path, asked.files) or "unknown type", reason,
                      source=asked.files[path].source)
        if verdict.unknown_fields:
            log.warning(
                "Envoy ignored %d unknown fields in %s: a typo?", verdict.unknown_fields,
                asked.told.get("changed", "what was published"),
            )

    # -- checks and words ---------------------------------------------------------------------

    def _accepted(self, desired: Files) -> bool:
        """Whether --check-cmd takes the staged final snapshot; asked once for each version."""
        command = self.options.check_cmd
        if not command or same(desired, self.output.published):
            return True
        version = version_of(desired)
        if self._checked[0] != version:
            place = f"{self.output.root}/{self.output.stage(desired)[0]}"
            refusal = run_check(command, place, self.stop_event)
            self._checked = (version, not refusal)
            if refusal:
                self.output.prune()  # what was staged for the check
            if refusal and self._once:
                raise LoaderError(refusal)
            if refusal:
                metrics.add("xds_loader_errors_total", ("check",))
                log.error("%s; the last snapshot stays", refusal, version=version)
        return self._checked[1]

    def _check(self) -> None:
        """Compare what is on disk with what was published, and repair it."""
        if self.options.secret:  # a certificate may be about to end by now
            self.wakes.put(Wake("objects", time.monotonic()))
        self.sources.seek_endpoints()
        if not self.output.snapshot:
            return
        try:
            repaired = self.output.repair()
        except OSError as error:
            self._failed(error)
            return
        self._name_strangers()
        if repaired:
            self._look_again()
            metrics.add("xds_loader_errors_total", ("damage",))
            log.warning("repaired on disk: %s", shortened(repaired))

    def _name_strangers(self) -> None:
        current = f"{self.output.root}/{CURRENT}"
        self._note("strangers", [f"{current}/{path} is not the loader's: left alone"
                                 for path in self.output.strangers])

    def _note(self, topic: str, notes: Iterable[str]) -> None:
        """Warn once of each thing, for as long as it lasts."""
        lasting = frozenset(notes)
        for note in sorted(lasting - self._said.get(topic, frozenset())):
            log.warning("%s", note)
        self._said[topic] = lasting

    def _say(self, composition: Composition) -> None:
        """Name what is wrong with the sources; what is over may be named again when it returns."""
        waiting = [f"waiting for {source}: it does not exist" for source in composition.missing]
        if self._once and not self.options.timeout:
            waiting = []  # the error that ends it says so
        self._note("sources", [*composition.warnings, *waiting])
        if self.sources.rendering is not None:
            metrics.replace("xds_loader_clusters", {
                (mode,): count for mode, count in self.sources.rendering.clusters.items()})

    def _tell(self) -> None:
        """Put what is known now before whoever asks over HTTP."""
        if self.listener is None:
            return
        self._count_snapshot()
        composition = self._composition
        now = time.monotonic()
        self.listener.status = Status(
            files=self.output.published,
            version=self.output.snapshot[2:],
            published_at=self._published_wall,
            states={
                **dict.fromkeys(self.output.published.keys() - self.envoy.unconfirmed.keys()
                                if self._confirmer else (), "acked"),
                **dict.fromkeys(self.envoy.refused, "nacked"),
            },
            started=bool(self.output.snapshot),
            missing=composition.missing + composition.unknown if composition else (),
            stale=(composition.stale if composition else ()) + self.sources.troubled(),
            last_turn=now,
            turn_bound=2 * self.options.sync_interval + CHECK_SECONDS + 30.0,
        )

    def composed(self, deadline: float) -> Composition:
        """The complete files of all sources, once; nothing on disk is touched."""
        self.sources.start(self.output.peek())
        while True:
            if self._composition is None:
                self._composition = self.sources.compose()
            if self._finished(deadline):
                return self._composition
            self._await(self._wait_until(deadline))

    def _wait_until(self, deadline: float) -> float:
        """Of a one-time run: without --timeout each request has bounds of its own."""
        return deadline if self.options.timeout else time.monotonic() + 60.0

    def _finished(self, deadline: float) -> bool:
        """Whether a one-time run is done; LoaderError if it never will be."""
        composition = self._composition
        if composition is None:
            return False
        if composition.complete:
            return True
        late = time.monotonic() >= deadline
        if composition.failed or (late and (composition.missing or self.options.timeout)):
            self._note("sources", composition.warnings)
            raise LoaderError(
                unfinished(composition, self.sources.troubles(), waited=bool(self.options.timeout))
            )
        return False


def shortened(names: Sequence[str], most: int = 5) -> str:
    """A list for one log line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def unfinished(composition: Composition, troubles: Sequence[str], *, waited: bool) -> str:
    """Why a one-time run ends without a snapshot."""
    if composition.failed:
        return composition.failed[0]
    if composition.missing:
        names = ", ".join(composition.missing)
        hint = "create it" if waited else "create it, or wait for it with --timeout"
        return f"{names}: does not exist or is not usable; {hint}"
    return troubles[0] if troubles else f"no answer in time for {', '.join(composition.unknown)}"


# ---------------------------------------------------------------------------------------------
# Preview and check
# ---------------------------------------------------------------------------------------------

CHECK_SECONDS = 30.0  # what --check-cmd may take
CHECK_OUTPUT = 1 << 16  # bytes kept of what it prints


def run_check(command: Sequence[str], directory: str, stop: threading.Event) -> str:
    """Run --check-cmd on the files in a directory: "" if it accepts them, else why not, in a line.

    It has a session, and so a process group, of its own, which is killed as a whole at the end: a
    process that the command left behind must not read the next snapshot's files, nor hold this one.
    """
    import subprocess

    try:
        process = subprocess.Popen(
            [part.replace("{dir}", directory) for part in command], bufsize=0, umask=0o022,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        return f"--check-cmd cannot be run: {why(error)}"
    output, until, printed, secret = process.stdout, time.monotonic() + CHECK_SECONDS, b"", False
    assert output is not None
    os.set_blocking(output.fileno(), False)
    try:
        ended = False
        while not ended and time.monotonic() < until and not stop.wait(0.01):
            # Not reaped yet, so that the group cannot be another's when it is killed.
            states = os.WEXITED | os.WNOHANG | os.WNOWAIT
            ended = os.waitid(os.P_PID, process.pid, states) is not None
            printed += output.read(CHECK_OUTPUT) or b""  # without it a full pipe would block it
            secret = secret or holds_secret(printed)
            printed = printed[-CHECK_OUTPUT:]
    finally:
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


def preview(options: Options, config: Config) -> int:
    """--dry-run: print the files, or with --diff what would change; touch nothing."""
    # The kernel ignores signals to process 1 that have no handler: without this one a preview in
    # a container would not end.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    loop = Loop(options, config)
    wanted = loop.composed(time.monotonic() + options.timeout)
    files, published = wanted.files, loop.output.peek() if options.diff else {}
    for note in (*wanted.notes, *json_warnings(files)):
        log.warning("%s", note)
    title, paths = f"snapshot {version_of(files)}\n".encode(), sorted({*files, *published})
    if options.diff:
        texts = [difference(path, published.get(path), files.get(path)) for path in paths]
        title = title if any(texts) else b""
    else:
        texts = [b"\n" + preview_text(path, files[path]) for path in paths]
    print_out([title, *texts])
    problem = check_copy(options.check_cmd, files) if options.check_cmd else ""
    if problem:
        raise LoaderError(problem)
    return 0


def check_copy(command: Sequence[str], files: Files) -> str:
    """Run --check-cmd on a copy of the files, which nobody else can read and which goes again."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="xds-loader-") as directory:  # 0700
        for path, file in files.items():
            os.makedirs(os.path.dirname(f"{directory}/{path}"), exist_ok=True)
            with open(f"{directory}/{path}", "wb") as stream:
                stream.write(file.content)
        return run_check(command, directory, threading.Event())


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
    return header.encode() + content + end


def difference(path: str, old: File | None, new: File | None) -> bytes:
    """A unified diff of one file against what is published; empty if it is the same."""
    import difflib

    if old and new and old.digest == new.digest:
        return b""
    before = redacted(old.content) if old else b""
    after = redacted(new.content, old.content if old else None) if new else b""
    a, b = (text.decode("utf-8", "backslashreplace").splitlines(True) for text in (before, after))
    names = f"a/{path}" if old else "/dev/null", f"b/{path}" if new else "/dev/null"
    missing = "\n\\ No newline at end of file\n"
    rows = difflib.unified_diff(a, b, *names)
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

# -- values: each parser takes a text, or raises ValueError with what is wrong with it -------------


def go_duration(text: str) -> float:
    """Seconds of a duration as Go writes it: `1m0s`, `250ms`, `1.5h`, `0`."""
    units = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
    part = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)"
    if not re.fullmatch(rf"\+?(?:0|(?:{part})+)", text):
        raise ValueError("is not a valid duration, such as 30s, 1m0s or 250ms")
    seconds = float(sum(float(number) * units[unit] for number, unit in re.findall(part, text)))
    if seconds > 9e9:
        raise ValueError("is longer than Go's longest, 2562047h")
    return seconds


def go_bool(text: str) -> bool:
    if text not in "1 t T true TRUE True 0 f F false FALSE False".split():
        raise ValueError("is neither true nor false")
    return text[0] in "1tT"


def object_name(text: str) -> str:
    if not re.fullmatch(OBJECT_NAME, text):
        raise ValueError("is not a valid Kubernetes name (lower case letters, digits, '-')")
    return text


def namespace_name(text: str) -> str:
    if "." in text or len(text) > 63:
        raise ValueError("is not a valid namespace (at most 63 lower case letters, digits, '-')")
    return object_name(text)


def any_namespace(text: str) -> str:
    return text if text == "*" else namespace_name(text)


def named(kind: str, text: str, directory: str = "") -> Named:
    """`[NS/]NAME`; the namespace is filled in later where it is empty."""
    namespace, slash, name = text.rpartition("/")
    return Named(kind, namespace_name(namespace) if slash else "", object_name(name), directory)


def named_secret(text: str) -> Named:
    return named("secret", text)


def named_configmap(text: str) -> Named:
    """`[NS/]NAME[:DIR]`."""
    name, colon, directory = text.partition(":")
    for part in directory.split("/") if colon else ():
        if problem := key_problem(part):
            raise ValueError(f"names a directory of which {part!r} {problem}")
    return named("configmap", name, directory)


def label_selector(text: str) -> str:
    requirements(text)
    return text


def services_selector(text: str) -> str:
    return "" if text.strip() == "*" else label_selector(text)


def http_url(text: str, schemes: Sequence[str] = ("https", "http")) -> str:
    try:
        url = urllib.parse.urlsplit(text)
        host = re.fullmatch(r"(?:[^.\s]{1,63}\.)*[^.\s]{1,63}\.?", url.hostname or "")
        usable = host and url.scheme in schemes and url.port != 0
    except ValueError:
        usable = False
    if not usable or url.query or url.fragment or not text.isascii() or not text.isprintable():
        raise ValueError(f"is not a valid URL with {' or '.join(schemes)}")
    if url.username is not None:
        raise ValueError("must not hold a user; see --token-file and --client-cert")
    return text


def admin_url(text: str) -> str:
    """`http://127.0.0.1:9901`, or the path of a Unix socket, which has 107 bytes at most."""
    path = text.removeprefix("unix:")
    if path == text:
        return http_url(text, ["http"])
    if not path.startswith("/") or not path.isprintable() or len(path.encode()) > 107:
        raise ValueError("is not unix:/ and an absolute path of at most 107 bytes")
    return text


def file_mode(text: str) -> int:
    if not re.fullmatch("(0o)?0?[4-7][0-7]{2}", text):
        raise ValueError("is not a file mode that lets the owner read, such as 0600 or 0640")
    return int(text.removeprefix("0o"), 8)


def shell_words(text: str) -> tuple[str, ...]:
    import shlex

    words = tuple(shlex.split(text))
    if not words:
        raise ValueError("is empty")
    return words


def one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"is not one of {', '.join(words)}")
        return text

    return parse


def gone(text: str) -> str:
    """An option of the predecessor, `-smi=false` excepted."""
    if text == "false":
        return text
    raise ValueError("is not supported any more; split traffic with weights in an RDS file, or by "
                     "the annotation xds-loader/weight with --services")  # fmt: skip


# -- options ---------------------------------------------------------------------------------------


class Option(NamedTuple):
    """One option: the same table makes the parser, the environment variables, --help and docs."""

    name: str
    parse: Callable[[str], Any]
    metavar: str  # "" of a switch
    default: str
    help: str
    repeats: bool = False

    @property
    def variable(self) -> str:
        return "XDS_LOADER_" + self.name.upper().replace("-", "_")


# fmt: off
SECTIONS = {
    "What to load": (
        Option("configmap", named_configmap, "[NS/]NAME[:DIR]", "",
               "a ConfigMap: each key is a file (in DIR), its value the content", True),
        Option("configmap-selector", label_selector, "SEL", "",
               "every ConfigMap of the namespace that matches a label selector"),
        Option("services", services_selector, "SEL", "", "render clusters, endpoints and routes of "
               "the Services that match a label selector ('*' or '': all of them)"),
        Option("services-namespace", any_namespace, "NS", "--namespace",
               "where these Services are; '*' for all namespaces", True),
        Option("secret", named_secret, "[NS/]NAME", "", "a TLS Secret as SDS files", True),
        Option("namespace", namespace_name, "NS", "$NS, $POD_NAMESPACE, the service account's, "
               "'default'", "the namespace of what is named without one"),
    ),
    "From where": (
        Option("apiserver", http_url, "URL", "the pod's own, else https://kubernetes",
               "the Kubernetes API server"),
        Option("token-file", str, "FILE", f"{SERVICE_ACCOUNT}/token",
               "bearer token, read again for each request"),
        Option("ca-file", str, "FILE", f"{SERVICE_ACCOUNT}/ca.crt",
               "CA of the API server, read again for each connection"),
        Option("client-cert", str, "FILE", "", "client certificate for the API server"),
        Option("client-key", str, "FILE", "", "its private key"),
        Option("insecure", go_bool, "", "", "do not verify the API server's certificate"),
        Option("from-file", str, "PATH", "", "objects from `kubectl get ... -o json` instead of an "
               "API server; read again every interval ('-': standard input, with --onetime)"),
    ),
    "How Services are rendered": (
        Option("config", str, "PATH", "", "JSON: how Services become clusters and routes"),
        Option("endpoints", one_of("auto", "eds", "inline", "dns"), "auto|eds|inline|dns", "auto",
               "where endpoints live"),
        Option("format", one_of("yaml", "json"), "yaml|json", "yaml", "of rendered files"),
    ),
    "Where to, and when": (
        Option("output-dir", str, "DIR", "/srv/runtime", "where the files are published"),
        Option("onetime", go_bool, "", "", "publish one snapshot and exit (init container)"),
        Option("watch", go_bool, "", "", "watch for changes instead of polling"),
        Option("sync-interval", go_duration, "D", "1m0s",
               "between two polls; in watch mode between two checks of the files on disk"),
        Option("timeout", go_duration, "D", "0s",
               "how long --onetime waits for the sources to exist and the API server to answer"),
        Option("dry-run", go_bool, "", "", "print the files and touch nothing; implies --onetime"),
        Option("diff", go_bool, "", "", "with --dry-run: a diff against what is published"),
        Option("secret-mode", file_mode, "MODE", "0600", "of files that hold private keys"),
    ),
    "ACK and NACK": (
        Option("envoy-admin", admin_url, "URL", "", "http://127.0.0.1:9901 or unix:/path: ask "
               "Envoy's admin interface what became of every publication"),
        Option("step-delay", go_duration, "D", "100ms", "pause between ordered steps; beside "
               "--envoy-admin only where it is given"),
        Option("check-cmd", shell_words, "CMD", "", "run on the staged files ('{dir}'), 30 s at "
               "most; non-zero: not published, only endpoints and secrets go on"),
    ),
    "Log, metrics, probes": (
        Option("listen", listen_address, "[ADDR]:PORT", "",
               "serve /healthz, /readyz, /startz, /metrics and /snapshot"),
        Option("log-format", one_of("text", "json"), "text|json", "text", "of standard error"),
        Option("log-level", one_of(*LOG_LEVELS), "LEVEL", "info",
               "debug, info, warning or error"),
        Option("version", go_bool, "", "", "print the version and exit"),
        Option("help", go_bool, "", "", "print this and exit (also -h)"),
    ),
    "Of the predecessor": (
        Option("trafficsplit-api-version", str, "V", "", "accepted and ignored, with a warning"),
        Option("smi", gone, "", "", "not supported any more: use weights by annotation"),
        Option("trafficsplit", gone, "NAME", "", "not supported any more, too"),
    ),
}
# fmt: on
OPTIONS = tuple(itertools.chain.from_iterable(SECTIONS.values()))
# A Service named `xds-loader` puts these into the environment of every pod of its namespace.
SERVICE_LINK = r"XDS_LOADER_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\w+)?)"


class Options(NamedTuple):
    """What was asked for, parsed and checked."""

    configmap: tuple[Named, ...] = ()
    configmap_selector: str | None = None
    services: str | None = None
    services_namespace: tuple[str, ...] = ()
    secret: tuple[Named, ...] = ()
    namespace: str = "default"
    access: Access = Access("", "", "")
    from_file: str = ""
    config: str = ""
    endpoints: str = "auto"
    format: str = "yaml"
    output_dir: str = "/srv/runtime"
    mode: str = "poll"  # or watch, once
    dry_run: bool = False
    diff: bool = False
    sync_interval: float = 60.0
    secret_mode: int = 0o600
    timeout: float = 0.0
    envoy_admin: str = ""  # http://... or unix:/path
    step_delay: float | None = None  # None where it is not given
    check_cmd: tuple[str, ...] = ()
    listen: tuple[str, int] | None = None
    log_format: str = "text"
    log_level: str = "info"
    node_name: str = ""
    warnings: tuple[str, ...] = ()


def command_line_words(argv: Sequence[str]) -> dict[str, list[str]]:
    """The values on the command line by option, read as Go's flag package reads them.

    One dash or two; `-x=v` and `-x v`; a switch takes a value only after `=`.
    """
    known = {option.name: option for option in OPTIONS}
    found: dict[str, list[str]] = {}
    rest = iter(argv)
    for text in rest:
        if not text.startswith("-") or text in ("-", "--"):
            raise UsageError(f"{text[:100]!r} is not an option; every value follows its option")
        name, equals, value = text.removeprefix("-").removeprefix("-").partition("=")
        option = known.get("help" if name == "h" else name)
        if option is None:
            import difflib

            near = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean --{near[0]}?)" if near else ""
            raise UsageError(f"unknown option {text.partition('=')[0][:100]!r}{hint}; see --help")
        if not equals:
            following = next(rest, None) if option.metavar else "true"
            if following is None:
                raise UsageError(f"--{option.name} needs a value: {option.metavar}")
            value = following
        found.setdefault(option.name, []).append(value)
    return found


def parsed(argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """The value (or, of repeatable options, the values) of each option that was given."""
    words = command_line_words(argv)
    values: dict[str, Any] = {}
    for option in OPTIONS:
        where, texts = f"--{option.name}", words.get(option.name, [])
        if not texts and option.name not in ("help", "version"):
            where, text = option.variable, environ.get(option.variable, "")
            texts = text.split() if option.repeats else [text] if text else []
        found = []
        for text in texts:
            try:
                found.append(option.parse(text))
            except (ValueError, UsageError) as error:
                shown = re.sub("//[^/@]*@", "//...@", text[:200])  # a password is not logged
                raise UsageError(f"{where} {shown!r}: {error}") from None
        if found:
            attribute = option.name.replace("-", "_")
            values[attribute] = tuple(dict.fromkeys(found)) if option.repeats else found[-1]
    return values


def options_from(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """The options, or UsageError in one line. Reads nothing but the namespace's file."""
    values = parsed(argv, environ)
    check_combination(values)
    warnings = []
    if "trafficsplit_api_version" in values:
        warnings.append("--trafficsplit-api-version is ignored: SMI is not supported any more")
    known = {option.variable for option in OPTIONS}
    links = {name for name in environ if re.fullmatch(SERVICE_LINK, name)}
    ours = {name for name in environ if name.startswith("XDS_LOADER_")}
    if unknown := sorted(ours - known - links):
        warnings.append(f"no option has the environment variable {shortened(unknown)}")
    namespace = values.get("namespace") or default_namespace(environ)
    from_file = bool(values.get("from_file"))
    for kind in ("configmap", "secret"):
        values[kind] = tuple(
            each._replace(namespace=each.namespace or namespace) for each in values.get(kind, ())
        )
    access = Access(
        values.get("apiserver") or ("" if from_file else default_apiserver(environ)),
        values.get("token_file") or f"{SERVICE_ACCOUNT}/token",
        values.get("ca_file") or f"{SERVICE_ACCOUNT}/ca.crt",
        values.get("client_cert", ""),
        values.get("client_key", ""),
        values.get("insecure", False),
    )
    once = values.get("onetime") or values.get("dry_run")
    watch = values.get("watch") and not from_file
    mode = "once" if once else "watch" if watch else "poll"
    given = {name: value for name, value in values.items() if name in Options._fields}
    given |= {"namespace": namespace, "access": access, "mode": mode, "warnings": tuple(warnings)}
    return Options(**given, node_name=environ.get("NODE_NAME", ""))


def check_combination(values: Mapping[str, Any]) -> None:
    """Combinations that make no sense, before any request."""
    once = values.get("onetime") or values.get("dry_run")
    services, from_file = "services" in values, values.get("from_file")
    sources = ("configmap", "configmap_selector", "services", "secret")
    pair = bool(values.get("client_cert")) == bool(values.get("client_key"))
    for holds, text in (
        (any(source in values for source in sources),
         "nothing to load: give --configmap NAME, --configmap-selector, --services or --secret"),
        (values.get("dry_run") or not values.get("diff"), "--diff needs --dry-run"),
        (once or from_file != "-", "--from-file - needs --onetime"),
        (pair or from_file, "--client-cert and --client-key belong together"),
        (services or "services_namespace" not in values, "--services-namespace needs --services"),
        (services or not values.get("config"), "--config needs --services"),
        (values.get("output_dir", "x"), "--output-dir is empty"),
        (values.get("sync_interval", 1.0) >= 0.001, "--sync-interval must be at least 1ms"),
    ):  # fmt: skip
        if not holds:
            raise UsageError(text)


def default_namespace(environ: Mapping[str, str]) -> str:
    for variable in ("NS", "POD_NAMESPACE"):
        if environ.get(variable):
            try:
                return namespace_name(environ[variable])
            except ValueError as error:
                raise UsageError(f"${variable} {environ[variable][:100]!r}: {error}") from None
    try:
        with open(f"{SERVICE_ACCOUNT}/namespace", "rb") as stream:
            return namespace_name(stream.read(1000).decode().strip())
    except (OSError, ValueError):
        return "default"


def default_apiserver(environ: Mapping[str, str]) -> str:
    """The address that every pod is given, else the predecessor's default."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT")
    if not host:
        return "https://kubernetes"
    url = f"https://{f'[{host}]' if ':' in host else host}:{port or 443}"
    try:
        return http_url(url, ["https"])
    except ValueError as error:
        raise UsageError(f"$KUBERNETES_SERVICE_HOST and ..._PORT: {url!r}: {error}") from None


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
        raise UsageError(f"--config {options.config}: $.endpoint.prefer_zone: true needs the own "
                         "Node's name in $NODE_NAME")  # fmt: skip
    if options.secret:
        no_core_dumps()
    os.umask(0)  # modes are as stated, whatever the umask was
    return preview(options, config) if options.dry_run else Loop(options, config).run()


def own_standard_streams() -> None:
    """Where a standard stream is closed, none of our files may take its number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115


def main(argv: Sequence[str] | None = None) -> int:
    """Run the loader; returns the exit code: 0, 1 (tried and could not) or 2 (bad input)."""
    arguments = sys.argv[1:] if argv is None else argv
    own_standard_streams()
    try:
        words = command_line_words(arguments)
        if words.get("help", ["false"])[-1] != "false":
            print_out([help_text().encode()])
            return 0
        if words.get("version", ["false"])[-1] != "false":
            print_out([f"envoy-xds-configmap-loader {__version__}\n".encode()])
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

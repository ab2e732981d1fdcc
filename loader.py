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
import errno
import fcntl
import functools
import hashlib
import http.client
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
from typing import Any, NamedTuple, TextIO, TypeVar

JsonType = TypeVar("JsonType")
Json = Any

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


def parse_json(text: bytes | str) -> Json:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def version_of(files: Files) -> str:
    """The version of a snapshot: a hash of paths, modes and contents, never a resourceVersion."""
    rows = (f"{path}\0{files[path].mode:o}\0{files[path].digest}\n" for path in sorted(files))
    return hashlib.sha256("".join(rows).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def give_back_memory() -> None:
    """Return what compiling the module and decoding large lists left to the system.

    glibc keeps freed memory that is not at the top of its heap: 12 MB after the start from source
    (measured). Where there is no malloc_trim (musl) there is nothing to do.
    """
    import ctypes

    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass


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
    return sys.intern(value)


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


def unique_clusters(plans: Mapping[Key, ServicePlan], problems: Mapping[Key, list[str]]
                    ) -> dict[Key, list[Cluster]]:
    """Of two clusters of one name the first exists; Envoy would use the last, in silence."""
    owners: dict[str, Key] = {}
    kept: dict[Key, list[Cluster]] = {key: [] for key in plans}
    for key, plan in plans.items():
        for cluster in plan.clusters:
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
        kept = unique_clusters(plans, problems)
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
# Secrets: TLS Secrets become SDS files
# ---------------------------------------------------------------------------------------------
#
# Envoy takes one Secret resource a file (a second one is rejected), so the pair and the trusted CA
# are two files. The PEM is inline, not by file name: certificate and key then swap in the one
# rename(2) of the snapshot and Envoy never sees one without the other.
#
# No text made here (error, problem, repr, redaction) has a byte of a key in it: messages are
# literals plus names, and OpenSSL's reason codes, which are constants.

SDS_TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
SECRET_MODE = 0o600
EXPIRY_NEAR = 7 * 86400.0  # seconds; cert-manager renews a 90-day certificate 30 days before
OBJECT_NAME = r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?"  # a Kubernetes DNS subdomain
# OpenSSL's words for a key of another certificate: of the same type; of another one.
KEY_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
FILE_NAME_BYTES = 255  # NAME_MAX of every file system that we know


class Secret(NamedTuple):
    """What a Secret holds for Envoy: PEM bytes, empty where the key is absent."""

    namespace: str
    name: str
    type: str
    cert: bytes  # tls.crt: the leaf first, then its intermediates
    key: bytes  # tls.key
    ca: bytes  # ca.crt

    def __repr__(self) -> str:
        """The name alone: a value that gets into a message or a traceback tells nothing."""
        return f"Secret({self.namespace}/{self.name})"


def secret_from(obj: Mapping[str, Any]) -> Secret:
    """Reduce an API object to what is used of it.

    The raw object must not be kept: its annotation `last-applied-configuration` often holds the
    key a second time. Raises ValueError, without content, for what is no Secret.
    """
    metadata, held = (
        value if isinstance(value := obj.get(field), dict) else {} for field in ("metadata", "data")
    )
    namespace, name = str(metadata.get("namespace", "")), str(metadata.get("name", ""))
    if not (re.fullmatch(OBJECT_NAME, namespace) and re.fullmatch(OBJECT_NAME, name)):
        raise ValueError("a secret without a valid namespace and name")
    cert, key, ca = (
        decode_key(held.get(entry), f"secret {namespace}/{name}: {entry}")
        for entry in ("tls.crt", "tls.key", "ca.crt")
    )
    return Secret(namespace, name, str(obj.get("type") or "Opaque"), cert, key, ca)


def decode_key(text: object, what: str) -> bytes:
    """Base64 as Go reads it (line breaks do not count), b"" for an absent or null key."""
    if text is None:
        return b""
    try:
        if isinstance(text, str):
            return base64.b64decode(text.replace("\r", "").replace("\n", ""), validate=True)
    except (binascii.Error, ValueError):
        pass  # and not chained: the text of the cause is not ours to vouch for
    raise ValueError(f"{what} is not base64")


def secret_files(
    secret: Secret, form: str = "yaml", mode: int = SECRET_MODE
) -> tuple[dict[str, File], tuple[str, ...]]:
    """The SDS files of a Secret, by path in the snapshot, and what is wrong with it.

    It is all or nothing: with a problem there are no files, and the caller keeps the last ones. A
    new CA beside an old certificate would be a mixture that nobody wrote. Both files have `mode`:
    whoever widens it does so because Envoy runs as another user, and Envoy needs both.
    """
    label = f"{secret.namespace}/{secret.name}"
    stem = f"{secret.namespace}_{secret.name}"  # no object name has `_`: no two Secrets share it
    problems = secret_problems(secret)
    if len(f"{stem}_ca.{form}") > FILE_NAME_BYTES:
        problems += ("the name is too long for a file name",)
    if problems:
        return {}, tuple(f"secret {label}: {problem}" for problem in problems)
    resources: dict[str, dict[str, Any]] = {}
    if secret.cert:
        pair = {"certificate_chain": pem_source(secret.cert), "private_key": pem_source(secret.key)}
        resources[f"sds/{stem}.{form}"] = {"name": label, "tls_certificate": pair}
    if secret.ca:
        context = {"trusted_ca": pem_source(secret.ca)}
        resources[f"sds/{stem}_ca.{form}"] = {"name": f"{label}/ca", "validation_context": context}
    source = f"secret {label}"
    return {
        path: file_of(sds_content(resource, form, source), source, mode)
        for path, resource in resources.items()
    }, ()


def sds_content(resource: Mapping[str, Any], form: str, source: str) -> bytes:
    """One SDS resource as the file that Envoy reads.

    `version_info` is a hash over the key too, so that every rotation shows in Envoy's
    `version_text`. Envoy's admin interface shows it to whoever asks. It gives nothing away: SHA-256
    of a key nobody can guess is not invertible, and to test a guess the public key in the
    certificate, which every client gets, serves as well.
    """
    typed = {"@type": SDS_TYPE, **resource}
    version = hashlib.sha256(json.dumps(typed, sort_keys=True).encode()).hexdigest()[:16]
    if form == "json":
        response = {"version_info": version, "resources": [typed]}
        return (json.dumps(response, indent=2) + "\n").encode()
    lines = [f"# {source}", f'version_info: "{version}"', "resources:"]
    body = list(secret_yaml(typed, "  "))
    return "\n".join([*lines, "- " + body[0][2:], *body[1:], ""]).encode()


def secret_yaml(fields: Mapping[str, Any], indent: str) -> Iterator[str]:
    """A nested mapping as YAML; text of several lines as a block scalar, which people can read."""
    for name, value in fields.items():
        entry = f"{indent}{json.dumps(name) if name.startswith('@') else name}:"
        if isinstance(value, dict):
            yield entry
            yield from secret_yaml(value, indent + "  ")
        elif "\n" in value:
            text = value.removesuffix("\n")
            # `|` ends with one line break, `|-` with none, `|+` with all there are.
            yield entry + (" |-" if text == value else " |+" if text.endswith("\n") else " |")
            yield from (f"{indent}  {line}" if line else "" for line in text.split("\n"))
        else:
            yield f"{entry} {json.dumps(value)}"


def pem_source(pem: bytes) -> dict[str, str]:
    """A DataSource with exactly these bytes.

    A YAML block scalar keeps printable ASCII and line feeds; it would turn CR LF into LF and takes
    leading spaces for indentation. Such PEM (Windows, comments in UTF-8) goes as base64.
    """
    if re.fullmatch(rb"[!-~][ -~\n]*", pem):
        return {"inline_string": pem.decode("ascii")}
    return {"inline_bytes": base64.b64encode(pem).decode("ascii")}


# What is checked before a Secret is published: whatever Envoy would refuse, as far as the standard
# library can tell, and nothing that Envoy would take.


def secret_problems(secret: Secret) -> tuple[str, ...]:
    """Why this Secret must not be published; empty when it may."""
    cert, key, ca = secret.cert, secret.key, secret.ca
    if not (cert or key or ca):
        return ("none of the keys tls.crt, tls.key and ca.crt is there or has a value",)
    problems: list[str] = []
    if bool(cert) != bool(key):
        there, absent = ("tls.crt", "tls.key") if cert else ("tls.key", "tls.crt")
        problems.append(f"{there} without {absent}")
    for entry, pem in (("tls.crt", cert), ("ca.crt", ca)):
        if pem and (problem := certificates_problem(pem)):
            problems.append(f"{entry} {problem}")
    if not problems:  # OpenSSL is asked only about what has the right form
        found = (pair_problem(cert, key) if cert else "", authority_problem(ca) if ca else "")
        problems = [problem for problem in found if problem]
    return tuple(problems)


def certificates_problem(pem: bytes) -> str:
    """What is wrong with the form of a chain or of a bundle of CAs, "" if nothing."""
    if b"PRIVATE KEY-----" in pem:  # Envoy's /config_dump redacts private_key, not this field
        return "holds a private key, which belongs into tls.key alone"
    try:
        return "holds no PEM certificate" if certificate_expiry(pem) is None else ""
    except ValueError as error:
        return f"is not readable ({error})"


def authority_problem(ca: bytes) -> str:
    """Why OpenSSL does not take a bundle of CAs, "" if it does."""
    try:
        tls_context().load_verify_locations(cadata=b"".join(pem_blocks(ca)))
    except ssl.SSLError as error:
        return f"ca.crt is not readable ({error.reason or 'OpenSSL gives no reason'})"
    return ""


def pair_problem(cert: bytes, key: bytes) -> str:
    """What is wrong with certificate and key as a pair, "" if nothing.

    OpenSSL reads pairs from files only: anonymous memory has a name in /proc, and the key touches
    no disk. Where there is none (macOS, no /proc) the pair goes to Envoy unchecked, which refuses
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
        tls_context().load_cert_chain(*names, password=no_passphrase)
    except EncryptedKey:
        return "tls.key is encrypted, and Envoy is given no passphrase"
    except ssl.SSLError as error:
        if error.reason in KEY_MISMATCHES:
            return "tls.key is not the key of the first certificate in tls.crt"
        return "tls.key is not readable as a PEM private key"
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
    raise EncryptedKey("the key is encrypted")


def tls_context() -> Any:
    """An SSLContext that judges form and not strength: Envoy decides what is too weak."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


def pem_blocks(pem: bytes) -> Iterator[bytes]:
    """The DER of each certificate, in order; text around the blocks is a comment."""
    for part in pem.split(b"-----BEGIN CERTIFICATE-----")[1:]:
        body, end, _ = part.partition(b"-----END CERTIFICATE-----")
        if not end:
            raise ValueError("a PEM block has no end")
        try:
            yield base64.b64decode(b"".join(body.split()), validate=True)
        except binascii.Error:
            raise ValueError("a PEM block is not base64") from None


def certificate_expiry(pem: bytes) -> float | None:
    """The earliest notAfter of a chain, Unix time; None without a certificate.

    Raises ValueError where there is something else in the PEM blocks.
    """
    return min((validity(der)[1] for der in pem_blocks(pem)), default=None)


def expiry_warning(secret: Secret, now: float) -> str:
    """Text when a certificate in tls.crt ends soon or has ended, else "".

    Soon is a week, or a fifth of the lifetime where that is less: a certificate that lives for a
    day is no news in its last week. Renewal comes before (cert-manager: at a third). The text does
    not count down, so that whoever says it only when it changes says it twice.
    """
    for der in pem_blocks(secret.cert):
        start, end = validity(der)
        if end - now <= min(EXPIRY_NEAR, (end - start) / 5):
            verb = "expires" if end > now else "expired"
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(end))
            return f"secret {secret.namespace}/{secret.name}: tls.crt {verb} at {when}"
    return ""


# The standard library reads the end of a certificate only from a live connection. It is five
# elements deep into the DER (RFC 5280, 4.1):
#   Certificate ::= SEQUENCE { tbsCertificate SEQUENCE { [0] version OPTIONAL, serialNumber,
#       signature, issuer, validity SEQUENCE { notBefore, notAfter }, ... }, ... }


def validity(der: bytes) -> tuple[float, float]:
    """notBefore and notAfter of a certificate, Unix time. Raises ValueError for anything else."""
    try:
        _, certificate, _ = der_element(der)
        _, rest, _ = der_element(certificate)
        tag, _, after = der_element(rest)
        if tag == 0xA0:  # a version: all but the certificates of before 1996
            rest = after
        for _ in ("serialNumber", "signature", "issuer"):
            _, _, rest = der_element(rest)
        _, period, _ = der_element(rest)
        start, first, rest = der_element(period)
        end, last, _ = der_element(rest)
        return der_time(start, first), der_time(end, last)
    except (IndexError, ValueError):
        raise ValueError("a PEM block is not an X.509 certificate") from None


def der_element(der: bytes) -> tuple[int, bytes, bytes]:
    """Tag, value, and what follows. IndexError or ValueError where the bytes end too soon."""
    tag, length, at = der[0], der[1], 2
    if length >= 0x80:  # the long form: so many bytes of length follow
        at += length & 0x7F
        length = int.from_bytes(der[2:at], "big")
    if len(der) < at + length:
        raise ValueError
    return tag, der[at : at + length], der[at + length :]


def der_time(tag: int, value: bytes) -> float:
    """UTCTime (YYMMDDHHMMSSZ, 1950 to 2049) or GeneralizedTime (YYYYMMDDHHMMSSZ), Unix time."""
    from datetime import UTC, datetime

    if not re.fullmatch({0x17: rb"\d{12}Z", 0x18: rb"\d{14}Z"}.get(tag, b"(?!)"), value):
        raise ValueError
    digits = value[:-1].decode()
    if tag == 0x17:
        digits = ("19" if digits >= "50" else "20") + digits
    fields = [int(digits[:4]), *(int(digits[at : at + 2]) for at in range(4, 14, 2))]
    return datetime(*fields, tzinfo=UTC).timestamp()  # type: ignore[misc, arg-type]


# What --dry-run and --diff print, and how a crash stays silent.


def holds_secret(content: bytes) -> bool:
    """Whether a file must not be shown: an SDS resource from whatever source, or a private key.

    PEM in base64 (`inline_bytes`) counts as well; that this hides some certificates does no harm.
    """
    marks = (b"PRIVATE KEY-----", b"transport_sockets.tls.v3.Secret", b"LS0tLS1CRUdJTi")
    return any(mark in content for mark in marks)


def redacted(content: bytes, published: bytes | None = None) -> bytes:
    """The content to print: itself, or a line in its place.

    The line has no hash, which would let a reader test guesses at a password in an SDS file. With
    `published`, what stands on disk, it tells whether the bytes differ, so that a diff shows it.
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
# Observation: log, metrics, probes
# ---------------------------------------------------------------------------------------------

# -- the log -----------------------------------------------------------------------------------
#
# Not `logging`: it costs 6 ms of import and 1 MB, and what is needed of it are these lines.

LOG_LEVELS = ("debug", "info", "warning", "error")
REMINDER = 300.0  # seconds between two lines about the same outage


class Log:
    """One line a record to stderr, as text for people or as JSON for machines.

    A record is a message, `%`-formatted with `args` only if it is written, and fields:
    `log.info("published", version=v, files=1)`. Lines are written whole, whichever thread they
    come from, and a closed stderr ends no loader.
    """

    def __init__(
        self,
        form: str = "text",
        level: str = "info",
        stream: TextIO | None = None,
        *,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.configure(form, level)
        self._stream = stream
        self._wall, self._clock = wall, clock
        self._lock = threading.Lock()
        self._outages: dict[str, dict[str, float]] = {}  # topic -> message -> last said

    def configure(self, form: str, level: str) -> None:
        """What --log-format and --log-level say."""
        self._form = form
        self._level = LOG_LEVELS.index(level)

    def debug(self, message: str, /, *args: object, **fields: object) -> None:
        self._write("debug", message, args, fields)

    def info(self, message: str, /, *args: object, **fields: object) -> None:
        self._write("info", message, args, fields)

    def warning(self, message: str, /, *args: object, **fields: object) -> None:
        self._write("warning", message, args, fields)

    def error(self, message: str, /, *args: object, **fields: object) -> None:
        self._write("error", message, args, fields)

    def outage(self, topic: str, message: str, /, **fields: object) -> None:
        """A warning about something that lasts: said once, and again every five minutes.

        In between it is there at level debug. A new message on the same topic is said at once, but
        not a ninth one: errors that differ each time must not flood either.
        """
        now = self._clock()
        with self._lock:
            said = self._outages.setdefault(topic, {})
            known = message if message in said or len(said) < 8 else max(said, key=said.__getitem__)
            due = now - said.get(known, -REMINDER) >= REMINDER
            if due:
                said[known] = now
        self._write("warning" if due else "debug", message, (), fields)

    def recovered(self, topic: str, message: str, /, **fields: object) -> None:
        """The end of an outage: one line if there was one, else nothing."""
        with self._lock:
            was_out = self._outages.pop(topic, None)
        if was_out:
            self._write("info", message, (), fields)

    def _write(
        self, level: str, message: str, args: tuple[object, ...], fields: Mapping[str, object]
    ) -> None:
        if LOG_LEVELS.index(level) < self._level:
            return
        write = json_line if self._form == "json" else text_line
        line = write(self._wall(), level, message % args if args else message, fields)
        try:
            with self._lock:
                stream = self._stream or sys.stderr
                stream.write(line + "\n")
                stream.flush()
        except (OSError, ValueError):  # ValueError: closed
            pass


log = Log()


def text_line(now: float, level: str, message: str, fields: Mapping[str, object]) -> str:
    """`2025-11-20T23:31:54.120Z INFO published version=ab12 source="configmap demo/envoy-xds"`."""
    pairs = (f" {name}={text_value(value)}" for name, value in fields.items())
    shown = message if message.isprintable() else json.dumps(message)
    return f"{timestamp(now)} {level.upper()} {shown}{''.join(pairs)}"


def text_value(value: object) -> str:
    """A value as one word. What comes from outside (names, Envoy's reasons) cannot forge a line."""
    text = plain_value(value)
    word = text if isinstance(text, str) else json.dumps(text)
    if not word.isprintable():
        return json.dumps(word)
    if not word or re.search(r'[\s"=]', word):
        return json.dumps(word, ensure_ascii=False)
    return word


def json_line(now: float, level: str, message: str, fields: Mapping[str, object]) -> str:
    """One JSON object; `time`, `level` and `message` first, then the fields."""
    record = {"time": timestamp(now), "level": level, "message": message}
    return json.dumps(record | {name: plain_value(value) for name, value in fields.items()})


def plain_value(value: object) -> str | int | float | bool | None:
    """What JSON has a word for stays, a sequence is joined by commas, the rest is its str()."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (tuple, list, set, frozenset)):
        return ",".join(map(str, sorted(value) if isinstance(value, (set, frozenset)) else value))
    return str(value)


def timestamp(now: float) -> str:
    """Unix time as RFC 3339 in UTC, to the millisecond."""
    seconds, millis = divmod(int(now * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{millis:03}Z"


# -- metrics -----------------------------------------------------------------------------------


class Metric(NamedTuple):
    """A declared metric: its type is counter, gauge or histogram."""

    name: str
    type: str
    help: str
    labels: tuple[str, ...] = ()


METRICS = tuple(
    Metric(*declared)
    for declared in (
        ("xds_loader_info", "gauge", "The loader that runs.", ("version",)),
        ("xds_loader_publications_total", "counter", "Published snapshots by step.", ("step",)),
        ("xds_loader_published_files_total", "counter", "Files that changed in publications."),
        (
            "xds_loader_publication_duration_seconds",
            "histogram",
            "From an event to the file that Envoy reads.",
        ),
        (
            "xds_loader_confirmation_duration_seconds",
            "histogram",
            "From a publication to Envoy's confirmation.",
        ),
        ("xds_loader_rejections_total", "counter", "Files that Envoy rejected by type.", ("type",)),
        ("xds_loader_refused_files", "gauge", "1 while Envoy's rejection stands.", ("file",)),
        (
            "xds_loader_source_last_event_timestamp_seconds",
            "gauge",
            "When a source was last heard of: an event, a bookmark or a list.",
            ("source",),
        ),
        ("xds_loader_source_synced", "gauge", "1 once the first list is complete.", ("source",)),
        (
            "xds_loader_watch_restarts_total",
            "counter",
            "Watches begun again by reason.",
            ("source", "reason"),
        ),
        (
            "xds_loader_api_requests_total",
            "counter",
            "Requests to the API server by status code and verb.",
            ("code", "verb"),
        ),
        ("xds_loader_errors_total", "counter", "Errors by kind.", ("kind",)),
        ("xds_loader_clusters", "gauge", "Clusters by where endpoints live.", ("endpoints",)),
        ("xds_loader_inotify_instances_budget", "gauge", "Files that Envoy may subscribe to."),
        ("xds_loader_inotify_instances_used", "gauge", "Files that Envoy subscribes to."),
        ("xds_loader_snapshot_info", "gauge", "The published snapshot.", ("version",)),
        ("xds_loader_snapshot_timestamp_seconds", "gauge", "When it was published."),
        (
            "xds_loader_certificate_expiry_timestamp_seconds",
            "gauge",
            "The earliest end of a certificate in tls.crt.",
            ("secret",),
        ),
        ("process_resident_memory_bytes", "gauge", "Resident memory."),
        ("process_cpu_seconds_total", "counter", "User and system CPU time."),
        ("process_start_time_seconds", "gauge", "When the process started."),
        ("process_open_fds", "gauge", "Open file descriptors."),
    )
)

# From the 0.5 ms of a good publication to the 10 s after which nobody waits.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

LabelValues = tuple[str, ...]


class Metrics:
    """The values of METRICS, to be recorded from any thread in about a microsecond.

    Labels are a tuple of values in the order declared. An undeclared name is a KeyError, a wrong
    number of labels a ValueError: mistakes of ours, not of users.
    """

    def __init__(self, version: str) -> None:
        self._lock = threading.Lock()
        self._declared = {metric.name: metric for metric in METRICS}
        self._series: dict[str, dict[LabelValues, float]] = {
            metric.name: {(): 0.0} if metric.type == "counter" and not metric.labels else {}
            for metric in METRICS
            if metric.type != "histogram"
        }
        # a histogram is a count for each bucket, one for what lies beyond, and the sum
        self._histograms = {
            metric.name: [0.0] * (len(BUCKETS) + 2)
            for metric in METRICS
            if metric.type == "histogram"
        }
        self.set("xds_loader_info", 1, (version,))
        self.set("process_start_time_seconds", time.time())

    def add(self, name: str, labels: LabelValues = (), by: float = 1) -> None:
        """Count. `by=0` makes a series that starts at 0, which rate() needs to see the first 1."""
        with self._lock:
            series = self._series[name]
            if labels not in series:
                self._check(name, labels)
                series[labels] = 0.0
            series[labels] += by

    def set(self, name: str, value: float, labels: LabelValues = ()) -> None:
        """Set a gauge."""
        with self._lock:
            series = self._series[name]
            if labels not in series:
                self._check(name, labels)
            series[labels] = value

    def replace(self, name: str, series: Mapping[LabelValues, float]) -> None:
        """Set all series of a gauge: those that are gone from it are gone from the output."""
        for labels in series:
            self._check(name, labels)
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
        figures = process_figures()
        with self._lock:
            for name, value in figures.items():
                self._series[name][()] = value
            series = {name: sorted(values.items()) for name, values in self._series.items()}
            histograms = {name: tuple(values) for name, values in self._histograms.items()}
        lines = []
        for metric in METRICS:
            lines.append(f"# HELP {metric.name} {metric.help}")
            lines.append(f"# TYPE {metric.name} {metric.type}")
            if metric.type == "histogram":
                lines += histogram_lines(metric.name, histograms[metric.name])
                continue
            for labels, value in series[metric.name]:
                name = metric.name + label_text(metric.labels, labels)
                lines.append(f"{name} {sample_text(value)}")
        return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")

    def _check(self, name: str, labels: LabelValues) -> None:
        if len(labels) != len(self._declared[name].labels):
            raise ValueError(f"{name} has the labels {self._declared[name].labels}, not {labels}")


metrics = Metrics(__version__)


def histogram_lines(name: str, values: Sequence[float]) -> list[str]:
    """Cumulative buckets, sum and count. `values`: see Metrics."""
    lines, count = [], 0.0
    for bound, inside in zip((*map(repr, BUCKETS), "+Inf"), values, strict=False):
        count += inside
        lines.append(f'{name}_bucket{{le="{bound}"}} {sample_text(count)}')
    return [*lines, f"{name}_sum {sample_text(values[-1])}", f"{name}_count {sample_text(count)}"]


def label_text(names: LabelValues, values: LabelValues) -> str:
    """`{code="200",verb="list"}`, "" without labels."""
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    pairs = (f'{n}="{v.translate(escapes)}"' for n, v in zip(names, values, strict=True))
    return "{" + ",".join(pairs) + "}" if names else ""


def sample_text(value: float) -> str:
    """Whole numbers without `.0` or exponent, others so that they read back exactly."""
    return str(int(value)) if value == int(value) else repr(value)


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
# One thread polls all connections. Whoever reaches the port needs no credentials, so everything is
# bounded: connections, their time, the size of a request, what rendering may cost. It shows one
# immutable Status, so it never waits for the loop nor the loop for it; and only names and figures:
# never the content of a file, nor Envoy's reasons, which quote it.

CONNECTIONS_MAX = 32
CONNECTION_TIME = 5.0  # seconds from accept to close, whatever the client does
CROWDED_TIME = 0.25  # the same while there is no room for others: probes wait for 1 s
HEAD_MAX = 8192  # bytes of a request, and of what is read and dropped after it
ANSWER_LIFE = 0.05  # seconds that /metrics and /snapshot are reused: 20 renderings a second at most
LISTENER_PATHS = ("/healthz", "/readyz", "/metrics", "/snapshot")
HTTP_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


class Status(NamedTuple):
    """What the loop tells the outside. It puts a new value in place; nothing in one changes."""

    files: Files  # of the snapshot; replaced with it, never changed in place
    version: str = ""  # of the snapshot that stands, "" while there is none
    published_at: float = 0.0  # Unix time
    confirmed: frozenset[str] = frozenset()  # paths of which Envoy has what stands
    refused: tuple[str, ...] = ()  # paths of which Envoy's rejection stands
    missing: tuple[str, ...] = ()  # sources waited for
    stale: tuple[str, ...] = ()  # sources that show their last good state
    last_turn: float = 0.0  # monotonic time
    turn_bound: float = 120.0  # seconds within which the loop turns again if it is well


class Answer(NamedTuple):
    """An HTTP response: status code, Content-Type, body."""

    code: int
    content_type: str
    body: bytes


def text_answer(code: int, text: str) -> Answer:
    """A response for people."""
    body = f"{text}\n".encode("utf-8", "backslashreplace")
    return Answer(code, "text/plain; charset=utf-8", body)


def health_answer(status: Status, now: float) -> Answer:
    """/healthz: 200 while the loop turns. `now` is monotonic."""
    age = now - status.last_turn
    if age <= status.turn_bound:
        return text_answer(200, "ok")
    bound = status.turn_bound
    return text_answer(503, f"the loop has not turned for {age:.0f} s (bound: {bound:.0f} s)")


def ready_answer(status: Status) -> Answer:
    """/readyz: 200 as soon as a snapshot stands; the body names what is not as it should be.

    A rejected file or an API server that is down takes no Envoy out of its Service.
    """
    lines = [f"ready, version {status.version}" if status.version else "no snapshot yet"]
    for word, names in (
        ("missing", status.missing),
        ("stale", status.stale),
        ("refused", status.refused),
    ):
        lines += [f"{word}: {name}" for name in names]
    return text_answer(200 if status.version else 503, "\n".join(lines))


def metrics_answer(recorded: Metrics) -> Answer:
    """/metrics, under the content type of Prometheus' text format."""
    return Answer(200, "text/plain; version=0.0.4; charset=utf-8", recorded.render())


def snapshot_answer(status: Status) -> Answer:
    """/snapshot: which files stand, their size, digest and source, and whether Envoy has them."""
    body = {
        "version": status.version or None,
        "published_at": timestamp(status.published_at) if status.version else None,
        "files": [snapshot_row(path, status) for path in sorted(status.files)],
        "missing": status.missing,
        "stale": status.stale,
        "refused": status.refused,
    }
    return Answer(200, "application/json", (json.dumps(body, indent=1) + "\n").encode())


def snapshot_row(path: str, status: Status) -> dict[str, object]:
    """One file of /snapshot.

    A file that holds a secret has no size and no digest: with a digest one tests guesses at a
    password, and the port asks nobody who he is.
    """
    file = status.files[path]
    row: dict[str, object] = {"path": path, "source": file.source}
    if not holds_secret(file.content):
        row |= {"bytes": len(file.content), "sha256": file.digest}
    if path in status.refused:
        return row | {"state": "refused"}
    return row | {"state": "confirmed" if path in status.confirmed else "unconfirmed"}


def asked_path(head: bytes) -> str | Answer:
    """The path that a request's head asks for, or the answer to one that asks for nothing here."""
    line = head.partition(b"\n")[0].rstrip(b"\r").decode("latin-1")
    method, target, protocol = (*line.split(" "), "", "")[:3]
    path = target.partition("?")[0]
    if not head_ends(head):
        return text_answer(431, "the request is too large")
    if not protocol.startswith("HTTP/1."):
        return text_answer(400, "not an HTTP/1 request")
    if path not in LISTENER_PATHS:
        return text_answer(404, "there are " + ", ".join(LISTENER_PATHS))
    if method not in ("GET", "HEAD"):
        return text_answer(405, "GET or HEAD only")
    return path


def head_ends(head: bytes) -> bool:
    """Whether the empty line after the header fields is there."""
    return b"\r\n\r\n" in head or b"\n\n" in head


def http_response(reply: Answer, *, with_body: bool) -> bytes:
    """A response as it goes over the wire; each connection carries one."""
    fields = (
        f"HTTP/1.1 {reply.code} {HTTP_REASONS[reply.code]}",
        f"Content-Type: {reply.content_type}",
        f"Content-Length: {len(reply.body)}",
        "Cache-Control: no-store",
        "Connection: close",
        *(["Allow: GET, HEAD"] if reply.code == 405 else []),
    )
    return "\r\n".join([*fields, "", ""]).encode() + (reply.body if with_body else b"")


def listen_address(text: str) -> tuple[str, int]:
    """`:9000`, `127.0.0.1:9000`, `[::1]:9000` as host ("" is every address) and port."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\s:\[\]/]*)):([0-9]{1,5})", text)
    if not found or int(found[3]) > 65535:
        raise UsageError(f"--listen {text!r}: not [ADDRESS]:PORT, such as :9000 or [::1]:9000")
    return found[1] or found[2], int(found[3])


class Visitor:
    """A connection: what it has sent, what it is still owed, and since when it is here."""

    def __init__(self, sock: socket.socket, since: float) -> None:
        self.sock, self.since = sock, since
        self.head = b""
        self.owed: memoryview | None = None  # None until the request is complete
        self.excess = 0  # bytes that came after the request


class Listener:
    """The server of --listen. The loop replaces `status`; all else belongs to the thread."""

    def __init__(self, host: str, port: int, recorded: Metrics) -> None:
        """Bind and serve. Raises LoaderError: an address in use ends the loader at its start."""
        try:
            self._server = listening_socket(host, port)
        except (OSError, UnicodeError) as error:  # UnicodeError: a host that is no name at all
            reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
            where = f"{host or '*'} port {port}"
            raise LoaderError(f"--listen: cannot bind {where}: {reason}") from error
        self.port: int = self._server.getsockname()[1]
        self.status = Status({}, last_turn=time.monotonic())
        self._recorded = recorded
        self._kept: dict[str, tuple[float, Answer]] = {}  # path -> when made, answer
        self._visitors: dict[int, Visitor] = {}  # by descriptor, in the order of their coming
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="listener", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close everything; back within 100 ms even if the thread is not."""
        self._wake_write.close()
        self._thread.join(0.1)

    def _serve(self) -> None:
        """Serve until the other end of the wake socket is closed."""
        while True:
            self._drop_overdue()
            poll = select.poll()  # made anew each time: some 30 entries, and no state to keep true
            poll.register(self._wake_read, select.POLLIN)
            if self._has_room():
                poll.register(self._server, select.POLLIN)
            for visitor in self._visitors.values():
                poll.register(visitor.sock, select.POLLOUT if visitor.owed else select.POLLIN)
            for descriptor, _ in poll.poll(self._time_left() * 1000):
                if descriptor == self._wake_read.fileno():
                    return self._close()
                if descriptor == self._server.fileno():
                    self._accept()
                else:
                    self._advance(self._visitors[descriptor])

    def _has_room(self) -> bool:
        return len(self._visitors) < CONNECTIONS_MAX

    def _time_left(self) -> float:
        """Seconds until the oldest connection is overdue; an hour where there is none."""
        oldest = next(iter(self._visitors.values()), None)
        if oldest is None:
            return 3600.0
        limit = CONNECTION_TIME if self._has_room() else CROWDED_TIME
        return max(0.0, oldest.since + limit - time.monotonic()) + 0.001

    def _drop_overdue(self) -> None:
        """Close what is past its time; a crowd makes room by those that dawdle."""
        now = time.monotonic()
        for visitor in list(self._visitors.values()):
            limit = CONNECTION_TIME if self._has_room() else CROWDED_TIME
            if now - visitor.since < limit:
                return
            self._drop(visitor)

    def _drop(self, visitor: Visitor) -> None:
        del self._visitors[visitor.sock.fileno()]
        visitor.sock.close()

    def _accept(self) -> None:
        """Take those who wait while there is room, and read at once: most have written."""
        while self._has_room():
            try:
                sock, _ = self._server.accept()
            except BlockingIOError:
                return
            except OSError:  # gone again; or no descriptor is left, and then not to spin
                time.sleep(0.01)
                return
            sock.setblocking(False)
            visitor = Visitor(sock, time.monotonic())
            self._visitors[sock.fileno()] = visitor
            self._advance(visitor)

    def _advance(self, visitor: Visitor) -> None:
        """Read, answer and write, as far as it goes without waiting."""
        try:
            if not visitor.owed:
                received = visitor.sock.recv(HEAD_MAX)
                if not received or not self._take(visitor, received):
                    return self._drop(visitor)
            if visitor.owed:
                visitor.owed = visitor.owed[visitor.sock.send(visitor.owed) :]
                if not visitor.owed:
                    visitor.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:  # reset by the client
            self._drop(visitor)

    def _take(self, visitor: Visitor, received: bytes) -> bool:
        """What a client sent: its request, or what comes after. False: more than we read.

        After the answer we read on until the client closes: to close with bytes unread resets the
        connection, and the answer may not arrive.
        """
        if visitor.owed is not None:
            visitor.excess += len(received)
            return visitor.excess <= HEAD_MAX
        visitor.head += received
        if head_ends(visitor.head) or len(visitor.head) >= HEAD_MAX:
            reply = self._answer(asked_path(visitor.head))
            with_body = not visitor.head.startswith(b"HEAD ")
            visitor.owed = memoryview(http_response(reply, with_body=with_body))
            visitor.head = b""
        return True

    def _answer(self, asked: str | Answer) -> Answer:
        now = time.monotonic()
        if isinstance(asked, Answer):
            return asked
        if asked == "/healthz":
            return health_answer(self.status, now)
        if asked == "/readyz":
            return ready_answer(self.status)
        made, kept = self._kept.get(asked, (now, None))
        if kept is None or now - made > ANSWER_LIFE:
            of_metrics = asked == "/metrics"
            kept = metrics_answer(self._recorded) if of_metrics else snapshot_answer(self.status)
            self._kept[asked] = (now, kept)
        return kept

    def _close(self) -> None:
        for visitor in list(self._visitors.values()):
            self._drop(visitor)
        self._server.close()
        self._wake_read.close()


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens and never blocks; "" is every address, of IPv6 too if there is any."""
    if not host and socket.has_dualstack_ipv6():
        family, options = socket.AF_INET6, {"dualstack_ipv6": True}
    else:
        family = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0][0]
        options = {}
    server = socket.create_server((host, port), family=family, backlog=128, **options)
    server.setblocking(False)
    return server

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
        self._translator: Renderer | None = None
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
            self._translator = Renderer(
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
        near = expiry_warning(secret, time.time()) if known[1] else ""
        return known[1], (*known[2], near) if near else known[2]

    def certificates(self) -> dict[tuple[str, ...], float]:
        """When the last good certificate of each Secret ends, Unix time."""
        for (namespace, name), (secret, files, _) in self._secrets.items():
            end = certificate_expiry(secret.cert) if files else None
            if end is not None:
                self._ends[(f"{namespace}/{name}",)] = end
        return self._ends

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
            slices=list(self._gathered(ENDPOINTSLICES, notes).values())
            or [one for found in self._gathered(ENDPOINTS, notes).values() for one in found],
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
        metrics.replace("xds_loader_refused_files", {(path,): 1.0 for path in self.refused})

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
        metrics.replace("xds_loader_refused_files", {(path,): 1.0 for path in self.refused})


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
        wait = VERDICT_BOUND if self._confirmer else self.options.step_delay
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
        if step == "whole" and not self._once:
            give_back_memory()

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
        return min(last + self.options.step_delay, gate.closed_at + VERDICT_BOUND)

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
        metrics.observe("xds_loader_confirmation_duration_seconds", verdict.waited)
        for path in verdict.rejected:
            kind = kind_at(path, asked.files) or "other"
            metrics.add("xds_loader_rejections_total", (kind,))

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
            refusal = self._run_check([word.replace("{dir}", place) for word in command])
            self._checked = (version, not refusal)
            if refusal:
                self.output.prune()  # what was staged for the check
            if refusal and self._once:
                raise LoaderError(refusal)
            if refusal:
                metrics.add("xds_loader_errors_total", ("check",))
                log.error("%s; the last snapshot stays", refusal, version=version)
        return self._checked[1]

    def _run_check(self, command: list[str]) -> str:
        """Run the check; empty if it is content, else why not, in one line."""
        import subprocess

        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, umask=0o022, start_new_session=True,
            )
        except OSError as error:
            return f"--check-cmd cannot be run: {why(error)}"
        output = Drain(process.stdout)
        until = time.monotonic() + CHECK_SECONDS
        while process.poll() is None and time.monotonic() < until and not self.stopping:
            output.join(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            late = f"took more than {CHECK_SECONDS:.0f} s"
            return f"--check-cmd {'was ended by a signal' if self.stopping else late}"
        output.join(1.0)
        if process.returncode == 0:
            return ""
        said = redacted(output.text.strip()).decode("utf-8", "replace").strip()
        last = said.splitlines()[-1] if said else "said nothing"
        return f"--check-cmd {command[0]} refuses (exit {process.returncode}): {last[:300]}"

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
        give_back_memory()
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
        metrics.replace("xds_loader_certificate_expiry_timestamp_seconds",
                        self.sources.certificates())
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
            confirmed=frozenset(self.output.published) - self.envoy.unconfirmed.keys()
            if self._confirmer else frozenset(),
            refused=tuple(sorted(self.envoy.refused)),
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


class Drain(threading.Thread):
    """Reads what a child process says, so that a full pipe cannot block it; keeps the end."""

    def __init__(self, stream: Any) -> None:
        super().__init__(daemon=True)
        self.text = b""
        self._stream = stream
        self.start()

    def run(self) -> None:
        with self._stream as stream:
            while block := stream.read1(1 << 16):
                self.text = (self.text + block)[-(1 << 16) :]


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


def preview(options: Options, config: Config) -> int:
    """--dry-run: print the files, or with --diff what would change; touch nothing."""
    loop = Loop(options, config)
    composition = loop.composed(time.monotonic() + options.timeout)
    published = loop.output.peek()
    files, unfit = loop.output.fitting(composition.files)
    for note in (*composition.warnings, *unfit):
        log.warning("%s", note)
    paths = sorted({*files, *(published if options.diff else ())})
    print_out(
        difference(path, published.get(path), files.get(path)) if options.diff
        else preview_text(path, files.get(path))
        for path in paths
    )
    return 0


def print_out(texts: Iterable[bytes]) -> None:
    """To standard output, as far as anybody reads."""
    try:
        for text in texts:
            sys.stdout.buffer.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def preview_text(path: str, file: File | None) -> bytes:
    """One file under a header; key material is not shown."""
    assert file is not None
    content = redacted(file.content)
    try:
        content.decode()
    except UnicodeDecodeError:
        content = b"[binary]\n"
    end = b"" if content.endswith(b"\n") or not content else b"\n"
    header = f"==> {path} ({file.source}, {len(file.content)} bytes) <==\n"
    return header.encode() + content + end + b"\n"


def difference(path: str, old: File | None, new: File | None) -> bytes:
    """A unified diff of one file against what is published; empty if it is the same."""
    import difflib

    if old and new and old.digest == new.digest:
        return b""
    sides = (
        redacted(old.content) if old else b"",
        redacted(new.content, old.content if old else None) if new else b"",
    )
    texts = [side.decode("utf-8", "backslashreplace").splitlines(keepends=True) for side in sides]
    rows = difflib.unified_diff(
        texts[0],
        texts[1],
        f"a/{path}" if old else "/dev/null",
        f"b/{path}" if new else "/dev/null",
    )
    missing = "\n\\ No newline at end of file\n"
    return "".join(row if row.endswith("\n") else row + missing for row in rows).encode()


def run(options: Options) -> int:
    """Run as asked: a preview, one snapshot, or until a signal comes."""
    for warning in options.warnings:
        log.warning("%s", warning)
    config = read_config(options.config)
    if options.access.insecure and not options.from_file:
        log.warning("--insecure: the API server's certificate is not verified")
    if options.services is not None and config.prefer_zone is True and not options.node_name:
        raise config_error("$.endpoint.prefer_zone", "true needs the own Node's name in $NODE_NAME")
    if options.secret:
        no_core_dumps()
    os.umask(0)  # modes are as stated, whatever the umask was
    return preview(options, config) if options.dry_run else Loop(options, config).run()


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
        raise UsageError(f"--config {path}: no JSON ({why(error)})") from None

# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """One option: the same table makes the parser, the environment variables, --help and docs."""

    name: str
    kind: str  # a key of PARSERS; "gone" is refused
    metavar: str
    help: str
    default: str = ""

    @property
    def variable(self) -> str:
        return "XDS_LOADER_" + self.name.upper().replace("-", "_")


OPTIONS = (
    Option("configmap", "configmaps", "[NS/]NAME[:DIR]",
           "a ConfigMap: each key is a file (in DIR), its value the content; repeatable"),
    Option("configmap-selector", "selector", "SEL",
           "every ConfigMap of the namespace that matches a label selector"),
    Option("services", "services", "SEL",
           "render clusters, endpoints and routes of the Services that match a label selector "
           "('*' or '': all of them)"),
    Option("services-namespace", "namespaces", "NS",
           "where these Services are; repeatable, '*' for all namespaces", "--namespace"),
    Option("secret", "secrets", "[NS/]NAME", "a TLS Secret as SDS files; repeatable"),
    Option("namespace", "namespace", "NS",
           "the namespace of what is named without one",
           "$NS, $POD_NAMESPACE, the service account's, 'default'"),
    Option("apiserver", "url", "URL", "the Kubernetes API server",
           "the pod's own, else https://kubernetes"),
    Option("token-file", "text", "FILE", "bearer token, read again for each request",
           f"{SERVICE_ACCOUNT}/token"),
    Option("ca-file", "text", "FILE", "CA of the API server, read again for each connection",
           f"{SERVICE_ACCOUNT}/ca.crt"),
    Option("client-cert", "text", "FILE", "client certificate for the API server"),
    Option("client-key", "text", "FILE", "its private key"),
    Option("insecure", "switch", "", "do not verify the API server's certificate"),
    Option("from-file", "text", "PATH",
           "objects from `kubectl get ... -o json` instead of an API server; read again every "
           "interval ('-': standard input, only with --onetime)"),
    Option("config", "text", "PATH", "JSON: how Services become clusters and routes"),
    Option("endpoints", "endpoints", "auto|eds|inline|dns", "where endpoints live", "auto"),
    Option("format", "format", "yaml|json", "of rendered files", "yaml"),
    Option("output-dir", "text", "DIR", "where the files go", "/srv/runtime"),
    Option("onetime", "switch", "", "publish one complete snapshot and exit (init container)"),
    Option("dry-run", "switch", "", "print the files and touch nothing; implies --onetime"),
    Option("diff", "switch", "", "with --dry-run: a unified diff against what is published"),
    Option("watch", "switch", "", "watch for changes instead of polling"),
    Option("sync-interval", "interval", "D",
           "between two polls; in watch mode between two checks of the files on disk", "1m0s"),
    Option("secret-mode", "mode", "MODE", "of files that hold private keys", "0600"),
    Option("timeout", "duration", "D",
           "how long --onetime waits for the sources to exist and the API server to answer", "0s"),
    Option("envoy-admin", "admin", "URL", "confirm every publication with Envoy's admin interface"),
    Option("step-delay", "duration", "D", "pause between ordered steps when Envoy is not asked",
           "100ms"),
    Option("check-cmd", "command", "CMD",
           "run on each staged snapshot ('{dir}'), 30 s at most; non-zero: not published"),
    Option("listen", "listen", "[ADDR]:PORT", "serve /healthz, /readyz, /metrics and /snapshot"),
    Option("log-format", "log_format", "text|json", "of the log on standard error", "text"),
    Option("log-level", "log_level", "LEVEL", "debug, info, warning or error", "info"),
    Option("trafficsplit-api-version", "text", "V", "taken for the predecessor's chart, ignored"),
    Option("smi", "switch", "", "no longer there: use weights by annotation"),
    Option("trafficsplit", "gone", "NAME", "no longer there: use weights by annotation"),
    Option("version", "switch", "", "print the version and exit"),
    Option("help", "switch", "", "print this and exit (also -h)"),
)


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
    mode: str = "poll"
    dry_run: bool = False
    diff: bool = False
    sync_interval: float = 60.0
    secret_mode: int = 0o600
    timeout: float = 0.0
    envoy_admin: str = ""
    step_delay: float = 0.1
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
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word in ("-", "--"):
            raise UsageError(f"{word!r} is no option; every value follows its option")
        name, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        option = known.get("help" if name == "h" else name)
        if option is None:
            hint = close_to(name, known)
            raise UsageError(f"unknown option {word.partition('=')[0]}{hint}; see --help")
        if not equals:
            if option.kind == "switch":
                value = "true"
            elif not rest:
                raise UsageError(f"--{option.name} needs a value: {option.metavar}")
            else:
                value = rest.pop(0)
        found.setdefault(option.name, []).append(value)
    return found


def close_to(name: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean --{near[0]}?)" if near else ""


def given_options(
    argv: Sequence[str], environ: Mapping[str, str]
) -> dict[str, tuple[str, list[str]]]:
    """Every option that was given: where (for messages) and its values; the command line wins."""
    words = command_line_words(argv)
    found = {}
    for option in OPTIONS:
        text = "" if option.name in ("help", "version") else environ.get(option.variable, "")
        if option.name in words:
            found[option.name] = (f"--{option.name}", words[option.name])
        elif text:
            repeats = option.kind in ("configmaps", "secrets", "namespaces")
            found[option.name] = (option.variable, text.split() if repeats else [text])
    return found


# -- values: each parser takes the text and raises ValueError with what it should be --------------


def go_duration(text: str) -> float:
    """Seconds of a duration as Go writes it: `1m0s`, `250ms`, `1.5h`, `0`."""
    if text in ("0", "+0"):
        return 0.0
    units = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
    part = r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)"
    if not re.fullmatch(rf"\+?(?:{part})+", text):
        raise ValueError("is no duration, such as 30s, 1m0s or 250ms")
    seconds = float(sum(float(number) * units[unit] for number, unit in re.findall(part, text)))
    if seconds > 9e9:
        raise ValueError("is longer than Go's longest, 2562047h")
    return seconds


def go_interval(text: str) -> float:
    seconds = go_duration(text)
    if seconds < 0.001:
        raise ValueError("must be at least 1ms")
    return seconds


def go_bool(text: str) -> bool:
    if text in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if text in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise ValueError("is neither true nor false")


def dns_name(text: str, *, label: bool = False) -> str:
    """A Kubernetes name: an RFC 1123 subdomain, or label."""
    part = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
    pattern = part if label else rf"{part}(?:\.{part})*"
    if not re.fullmatch(pattern, text) or len(text) > (63 if label else 253):
        raise ValueError(f"{text!r} is no Kubernetes name (lower case letters, digits, '-')")
    return text


def namespace_name(text: str) -> str:
    return dns_name(text, label=True)


def named_configmap(text: str) -> Named:
    """`[NS/]NAME[:DIR]`; the namespace is filled in later where it is empty."""
    name, colon, directory = text.partition(":")
    found = named_object("configmap", name)
    for part in directory.split("/") if colon else ():
        problem = key_problem(part)
        if problem:
            raise ValueError(f"directory {directory!r}: {part!r} {problem}")
    return found._replace(directory=directory)


def named_object(kind: str, text: str) -> Named:
    namespace, slash, name = text.rpartition("/")
    if slash:
        namespace_name(namespace)
    return Named(kind, namespace, dns_name(name))


def label_selector(text: str) -> str:
    requirements(text)
    return text


def services_selector(text: str) -> str:
    return "" if text.strip() == "*" else label_selector(text)


def namespaces_value(text: str) -> str:
    return text if text == "*" else namespace_name(text)


def base_url(text: str, schemes: Sequence[str], example: str = "https://10.0.0.1:6443") -> str:
    try:
        url = urllib.parse.urlsplit(text)
        usable = url.scheme in schemes and url.hostname and url.port != 0
        (url.hostname or "").encode("idna")  # what the resolver makes of it
    except ValueError:
        usable = False
    if not usable or url.query or url.fragment or not text.isascii() or not text.isprintable():
        raise ValueError(f"is no URL such as {example}")
    if url.username is not None:
        raise ValueError("must not hold a user; see --token-file and --client-cert")
    return text


def file_mode(text: str) -> int:
    if not re.fullmatch(r"(0o)?[0-7]{3,4}", text) or int(text.removeprefix("0o"), 8) & ~0o777:
        raise ValueError("is no file mode such as 0600 or 0640")
    mode = int(text.removeprefix("0o"), 8)
    if mode & 0o400 == 0:
        raise ValueError("must let the owner read")
    return mode


def shell_words(text: str) -> tuple[str, ...]:
    import shlex

    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"cannot be split into words ({error})") from None
    if not words:
        raise ValueError("is empty")
    return words


def one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"is none of {', '.join(words)}")
        return text

    return parse


PARSERS: dict[str, Callable[[str], Any]] = {
    "text": str,
    "switch": go_bool,
    "configmaps": named_configmap,
    "secrets": lambda text: named_object("secret", text),
    "namespaces": namespaces_value,
    "namespace": namespace_name,
    "selector": label_selector,
    "services": services_selector,
    "url": lambda text: base_url(text, ("https", "http")),
    "admin": lambda text: base_url(text, ("http",), "http://127.0.0.1:9901"),
    "duration": go_duration,
    "interval": go_interval,
    "mode": file_mode,
    "command": shell_words,
    "listen": listen_address,
    "endpoints": one_of("auto", "eds", "inline", "dns"),
    "format": one_of("yaml", "json"),
    "log_format": one_of("text", "json"),
    "log_level": one_of(*LOG_LEVELS),
}


def parsed(argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """The value (or, of repeatable options, the tuple of values) of each option that was given."""
    values: dict[str, Any] = {}
    for name, (where, texts) in given_options(argv, environ).items():
        kind = next(option.kind for option in OPTIONS if option.name == name)
        if kind == "gone":
            raise UsageError(f"{where}: {NO_SMI}")
        try:
            found = [PARSERS[kind](text) for text in texts]
        except ValueError as error:
            raise UsageError(f"{where} {' '.join(texts)!r}: {error}") from None
        except UsageError as error:
            raise UsageError(f"{where}: {str(error).removeprefix('--listen ')}") from None
        repeats = kind in ("configmaps", "secrets", "namespaces")
        values[name.replace("-", "_")] = tuple(dict.fromkeys(found)) if repeats else found[-1]
    return values


NO_SMI = (
    "SMI TrafficSplit is no longer supported; split traffic with weights in an RDS file, "
    "or by the annotation xds-loader/weight with --services"
)


def options_from(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """The options, or UsageError in one line. Reads nothing but the namespace's file."""
    values = parsed(argv, environ)
    for name in ("help", "version"):
        values.pop(name, None)
    if values.pop("smi", False):
        raise UsageError(f"--smi: {NO_SMI}")
    warnings = []
    if values.pop("trafficsplit_api_version", None) is not None:
        warnings.append("--trafficsplit-api-version is ignored: SMI is no longer supported")
    namespace = values.get("namespace") or default_namespace(environ)
    values["namespace"] = namespace
    for kind in ("configmap", "secret"):
        values[kind] = tuple(
            named._replace(namespace=named.namespace or namespace)
            for named in values.get(kind, ())
        )
    check_combination(values)
    dry_run = values.get("dry_run", False)
    once = values.pop("onetime", False) or dry_run
    values["mode"] = "once" if once else "watch" if values.get("watch") else "poll"
    values.pop("watch", None)
    if values["mode"] == "watch" and values.get("from_file"):
        values["mode"] = "poll"
    values["access"] = Access(
        values.pop("apiserver", None)
        or ("" if values.get("from_file") else default_apiserver(environ)),
        values.pop("token_file", None) or f"{SERVICE_ACCOUNT}/token",
        values.pop("ca_file", None) or f"{SERVICE_ACCOUNT}/ca.crt",
        values.pop("client_cert", ""),
        values.pop("client_key", ""),
        values.pop("insecure", False),
    )
    return Options(**values, node_name=environ.get("NODE_NAME", ""), warnings=tuple(warnings))


def check_combination(values: Mapping[str, Any]) -> None:
    """Combinations that make no sense, before any request."""
    once = values.get("onetime") or values.get("dry_run")
    discovers = "services" in values
    named = values.get("configmap") or values.get("secret")
    rules = (
        (named or discovers or "configmap_selector" in values,
         "nothing to load: give --configmap NAME, --configmap-selector, --services or --secret"),
        (not values.get("diff") or values.get("dry_run"), "--diff needs --dry-run"),
        (values.get("from_file") != "-" or once, "--from-file -: needs --onetime"),
        (bool(values.get("client_cert")) == bool(values.get("client_key"))
         or values.get("from_file"),
         "--client-cert and --client-key belong together"),
        (discovers or not values.get("services_namespace"),
         "--services-namespace needs --services"),
        (discovers or not values.get("config"), "--config needs --services"),
        (values.get("output_dir", "x"), "--output-dir is empty"),
    )
    for holds, text in rules:
        if not holds:
            raise UsageError(text)


def default_namespace(environ: Mapping[str, str]) -> str:
    for variable in ("NS", "POD_NAMESPACE"):
        if environ.get(variable):
            try:
                return namespace_name(environ[variable])
            except ValueError as error:
                raise UsageError(f"${variable}: {error}") from None
    try:
        with open(f"{SERVICE_ACCOUNT}/namespace", "rb") as stream:
            return namespace_name(stream.read().decode().strip())
    except (OSError, ValueError):
        return "default"


def default_apiserver(environ: Mapping[str, str]) -> str:
    """The address that every pod is given, else the predecessor's default."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT")
    if not host:
        return "https://kubernetes"
    url = f"https://{f'[{host}]' if ':' in host else host}:{port or 443}"
    try:
        return base_url(url, ("https",))
    except ValueError as error:
        text = f"$KUBERNETES_SERVICE_HOST and $KUBERNETES_SERVICE_PORT: {url!r} {error}"
        raise UsageError(text) from None


def help_text() -> str:
    """--help, from the table of options."""
    import textwrap

    parts = [
        "envoy-xds-configmap-loader feeds Envoy's filesystem xDS from Kubernetes.",
        "",
        "Usage: envoy-xds-configmap-loader [options]",
        "",
    ]
    for option in OPTIONS:
        default = f" (default {option.default})" if option.default else ""
        parts.append(f"  --{option.name} {option.metavar}".rstrip())
        parts += textwrap.wrap(option.help + default, 90, initial_indent=" " * 8,
                               subsequent_indent=" " * 8)
    parts += [
        "",
        "Options may have one dash. Durations are written 30s, 1m0s, 250ms. Each option can come",
        "from the environment as XDS_LOADER_ and its name in capitals with underscores.",
    ]
    return "\n".join(parts)


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
        values = parsed(arguments, os.environ)
        if values.get("help") or values.get("version"):
            version = f"envoy-xds-configmap-loader {__version__}"
            print_out([f"{help_text() if values.get('help') else version}\n".encode()])
            return 0
        options = options_from(arguments, os.environ)
        log.configure(options.log_format, options.log_level)
        return run(options)
    except UsageError as error:
        print(f"envoy-xds-configmap-loader: {error}", file=sys.stderr)
        return 2
    except LoaderError as error:
        log.error("%s", error)
        return 1
    except OSError as error:
        log.error("%s", why(error))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""What Envoy does with files, as a small model: no process, no clock, no disk.

Each rule was measured on the real Envoy (docs/envoy-files.md); what a file holds is JSON with the
type URLs of Envoy and three words of our own in a resource:

    "bad": true      Envoy rejects it
    "deadly": true   Envoy ends when it reads it (one inotify instance too many, for instance)
    "health": true   a cluster with active health checks: it warms until `warm`

The rules:

- CDS applies partially: good clusters are taken, absent ones are removed, and one bad cluster
  makes the update count as rejected. A cluster whose EDS file is not there is a bad one.
- A cluster that is new or changed reads its EDS file at once; so does a listener its RDS file.
- EDS and RDS are taken or rejected whole; what was accepted before stays.
- A listener is refused for an RDS file that is not there and for a cluster that Envoy does not
  have, and is not tried again when they come.
- What cannot be parsed changes nothing and counts as failed.
- Each subscription counts its successes and failures from its own beginning; those of a cluster
  that goes are forgotten. That of a route file lasts as long as the old listener drains: here for
  the life of the process.
- A process that starts reads CDS, with all EDS files, then the other files of its bootstrap.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from loader import Counts, File, Files, Look

ROOT = "/srv/runtime/current/"
TYPE = "type.googleapis.com/envoy.config."
CDS, LDS = "cluster_manager.cds", "listener_manager.lds"


class Cluster(NamedTuple):
    """A cluster of Envoy. While the first definition of a name warms, it serves nothing."""

    text: str  # its definition
    eds: str  # the path that it reads; "" for endpoints in the definition
    endpoints: str  # the digest of the EDS bytes that it took; "" for none
    serves: bool
    warming: bool


class Listener(NamedTuple):
    text: str
    rds: str  # the path of its routes; "" for none
    clusters: frozenset[str]  # that routes inside the listener name


class Routes(NamedTuple):
    digest: str  # of the bytes that were taken; "" for none
    clusters: frozenset[str]


class Read(NamedTuple):
    """What was read last."""

    digest: str
    taken: bool
    had: frozenset[str] = frozenset()  # clusters and files, when a reference was rejected


class Ended(Exception):
    """Envoy read what ends it."""


@functools.cache
def resources_of(content: bytes) -> tuple[dict[str, Any], ...] | None:
    """The resources of a file; None where it cannot be parsed."""
    try:
        return tuple(json.loads(content)["resources"])
    except (ValueError, KeyError):
        return None


@functools.cache
def text_of(content: bytes, index: int) -> str:
    resources = resources_of(content) or ()
    return json.dumps(resources[index], sort_keys=True)


def relative(path: str) -> str:
    return path.removeprefix(ROOT)


def scope_of(path: str, name: str = "") -> str:
    """The scope of a subscription in /stats: by the cluster for EDS, by the file for the rest."""
    if name:
        return f"cluster.{name}"
    stem = path.partition(".")[0]
    return {"cds": CDS, "lds": LDS}.get(stem, f"http.in.rds.{stem}")


class Envoy:
    """One Envoy and the files it was told of. `files` is what the disk shows at that moment."""

    __slots__ = (
        "booting",
        "bootstrap",
        "clusters",
        "counts",
        "last",
        "listeners",
        "queue",
        "routes",
        "up",
    )  # a value but for the methods that are events

    def __init__(self, bootstrap: tuple[str, ...]) -> None:
        self.bootstrap = bootstrap  # the paths that it names
        self.up = False
        self.booting = False
        self.clusters: dict[str, Cluster] = {}
        self.listeners: dict[str, Listener] = {}
        self.routes: dict[str, Routes] = {}  # by path
        self.counts: dict[str, Counts] = {}
        self.last: dict[str, Read] = {}  # by scope
        self.queue: tuple[str, ...] = ()  # paths whose moves were not read yet

    def copy(self) -> Envoy:
        new = Envoy(self.bootstrap)
        new.up, new.booting, new.queue = self.up, self.booting, self.queue
        new.clusters, new.listeners = dict(self.clusters), dict(self.listeners)
        new.routes, new.counts, new.last = dict(self.routes), dict(self.counts), dict(self.last)
        return new

    def key(self) -> int:
        return hash((self.up, self.booting, self.queue, *(
            frozenset(each.items()) for each in
            (self.clusters, self.listeners, self.routes, self.counts, self.last))))

    # -- events -------------------------------------------------------------------------------

    def may_start(self, files: Files) -> bool:
        return not self.up and all(path in files for path in self.bootstrap)

    def start(self) -> None:
        """A process starts; it has read nothing yet."""
        self.up = self.booting = True
        self.queue = self.bootstrap

    def end(self) -> None:
        """The process ends, and with it everything that it had."""
        fresh = Envoy(self.bootstrap)
        for name in self.__slots__:
            setattr(self, name, getattr(fresh, name))

    def move(self, paths: Iterable[str]) -> None:
        """These files moved, in this order. Those who read them will."""
        if self.up:
            to_be_read = self.queue if self.booting else ()
            reads = set(self.subscriptions().values()).difference(to_be_read)
            self.queue += tuple(path for path in paths if path in reads)

    def read(self, files: Files, index: int = 0) -> None:
        """Read one of the files that moved."""
        path = self.queue[index]
        self.queue = self.queue[:index] + self.queue[index + 1:]
        try:
            if path == "cds.json":
                self._read_cds(path, files)
            elif path == "lds.json":
                self._read_lds(path, files)
            elif path.startswith("eds/"):
                for name, cluster in list(self.clusters.items()):
                    if cluster.eds == path:
                        self._read_eds(name, files)
            elif path in self.bootstrap or path in self.routes:
                self._read_rds(path, files)
        except Ended:
            self.end()
            return
        self.booting = self.booting and bool(self.queue)

    def warm(self) -> None:
        """The health checks of every cluster that has some pass."""
        for name, cluster in self.clusters.items():
            if cluster.warming:
                self.clusters[name] = cluster._replace(serves=True, warming=False)

    def look(self, *, hidden: bool = False) -> Look:
        """What the admin interface tells."""
        warming = sum(cluster.warming for cluster in self.clusters.values())
        return Look({} if hidden else dict(self.counts), not self.booting, hidden, warming)

    # -- what is seen ---------------------------------------------------------------------------

    def subscriptions(self) -> dict[str, str]:
        """Scopes and the paths that they read, of this process."""
        found = {scope_of(path): path for path in (*self.bootstrap, *self.routes)}
        return found | {scope_of(cluster.eds, name): cluster.eds
                        for name, cluster in self.clusters.items() if cluster.eds}

    def serving(self) -> set[str]:
        return {name for name, cluster in self.clusters.items() if cluster.serves}

    def references(self) -> set[tuple[str, str]]:
        """What this process runs that names clusters: a text or digest, and a cluster."""
        found = {(listener.text, name) for listener in self.listeners.values()
                 for name in listener.clusters}
        return found | {(routes.digest, name) for routes in self.used_routes().values()
                        for name in routes.clusters}

    def used_routes(self) -> dict[str, Routes]:
        """Without those of listeners that only drain: their subscription lasts for minutes."""
        used = {*self.bootstrap, *(each.rds for each in self.listeners.values())}
        return {path: routes for path, routes in self.routes.items() if path in used}

    # -- reading ------------------------------------------------------------------------------

    def _count(self, scope: str, file: File | None, *, taken: bool, files: Files | None = None
               ) -> None:
        success, failed = self.counts.get(scope, Counts())
        self.counts[scope] = Counts(success + taken, failed + (not taken))
        had = frozenset((*self.clusters, *files)) if files and not taken else frozenset()
        self.last[scope] = Read(file.digest if file else "", taken, had)

    def _resources(self, file: File | None) -> tuple[dict[str, Any], ...] | None:
        found = resources_of(file.content) if file else None
        if any(each.get("deadly") for each in found or ()):
            raise Ended
        return found

    def _read_cds(self, path: str, files: Files) -> None:
        file = files.get(path)
        resources = self._resources(file)
        if resources is None or file is None:
            self._count(CDS, file, taken=False)
            return
        taken = True
        for index, each in enumerate(resources):
            name, eds = each["name"], relative(each.get("eds", ""))
            text, old = text_of(file.content, index), self.clusters.get(name)
            if each.get("bad") or (eds and eds not in files):
                taken = False
            elif old is None or old.text != text:
                warming = bool(each.get("health"))
                serves = not warming or (old is not None and old.serves)
                self.clusters[name] = Cluster(text, eds, "", serves, warming)
                if eds:
                    self._read_eds(name, files)
        for name in self.clusters.keys() - {each["name"] for each in resources}:
            self._forget(scope_of("", name))
            del self.clusters[name]
        self._count(CDS, file, taken=taken)

    def _read_eds(self, name: str, files: Files) -> None:
        cluster = self.clusters[name]
        file = files.get(cluster.eds)
        resources = self._resources(file)
        taken = (resources is not None and len(resources) == 1
                 and resources[0]["cluster_name"] == name and not resources[0].get("bad"))
        if taken and file is not None:
            self.clusters[name] = cluster._replace(endpoints=file.digest)
        self._count(scope_of("", name), file, taken=taken)

    def _read_rds(self, path: str, files: Files) -> None:
        file = files.get(path)
        resources = self._resources(file)
        taken = resources is not None and len(resources) == 1 and not resources[0].get("bad")
        if taken and resources and file is not None:
            self.routes[path] = Routes(file.digest, frozenset(resources[0]["clusters"]))
        self._count(scope_of(path), file, taken=taken, files=files)

    def _read_lds(self, path: str, files: Files) -> None:
        file = files.get(path)
        resources = self._resources(file)
        if resources is None or file is None:
            self._count(LDS, file, taken=False, files=files)
            return
        taken = True
        for index, each in enumerate(resources):
            rds, named = relative(each.get("rds", "")), frozenset(each.get("clusters", ()))
            text = text_of(file.content, index)
            if each.get("bad") or (rds and rds not in files) or named - self.clusters.keys():
                taken = False
                continue
            self.listeners[each["name"]] = Listener(text, rds, named)
            if rds and rds not in self.routes:
                self.routes[rds] = Routes("", frozenset())
                self._read_rds(rds, files)
        for name in self.listeners.keys() - {each["name"] for each in resources}:
            del self.listeners[name]
        self._count(LDS, file, taken=taken, files=files)

    def _forget(self, scope: str) -> None:
        self.counts.pop(scope, None)
        self.last.pop(scope, None)


def named_paths(files: Files) -> set[str]:
    """The files that clusters and listeners name."""
    return {relative(each[key]) for file in files.values() if file.kind in ("cds", "lds")
            for each in resources_of(file.content) or () for key in ("eds", "rds") if key in each}


# -- what files hold ------------------------------------------------------------------------------


def cluster(name: str, eds: bool = False, **more: object) -> dict[str, object]:
    return {"name": name, **({"eds": f"{ROOT}eds/{name}.json"} if eds else {}), **more}


def cds(*clusters: Mapping[str, object]) -> bytes:
    return _content("cluster.v3.Cluster", clusters)


def eds(name: str, version: int = 1, **more: object) -> bytes:
    return _content("endpoint.v3.ClusterLoadAssignment",
                    [{"cluster_name": name, "version": version, **more}])


def rds(stem: str, *clusters: str, **more: object) -> bytes:
    return _content("route.v3.RouteConfiguration",
                    [{"name": stem, "clusters": list(clusters), **more}])


def lds(*listeners: Mapping[str, object]) -> bytes:
    return _content("listener.v3.Listener", listeners)


def listener(name: str, rds: str = "", clusters: Iterable[str] = (),
             **more: object) -> dict[str, object]:
    return {"name": name, **({"rds": ROOT + rds} if rds else {}), "clusters": list(clusters),
            **more}


def _content(kind: str, resources: Iterable[Mapping[str, object]]) -> bytes:
    return json.dumps({"type_url": TYPE + kind, "resources": [
        {"@type": TYPE + kind, **each} for each in resources]}).encode()

"""Every interleaving of what can happen, over small worlds, against a model of Envoy.

What the loader decides is pure: `next_step`, `allowed`, `after_look` and the others
that chapter "The loop" calls. A driver calls them as the loop does, and a search, breadth first,
tries every order of events:

    change   other files are desired
    read     Envoy reads one file that moved; it takes or rejects it, or ends
    look     the loader looks at Envoy's counters
    step     the loader publishes the next snapshot
    unknown  the bound is over and Envoy's judgement is not known
    crash    Envoy ends, soon after it came back or long after
    kill     the loader ends, and another one starts from what is on disk and remembered

The first four go on until nothing is left to do; the others are bounded in number by the world.
docs/interleavings.md tells what is checked in each state. INTERLEAVINGS_DEEPER=2 goes deeper.
"""

from __future__ import annotations

import functools
import gc
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest

import loader
from loader import ACKED, NACKED, Counts, File, Files, Known, Output, Step
from tests.support import envoy_model as model
from tests.support.envoy_model import Envoy, cds, cluster, eds, lds, listener, rds

DEEPER = int(os.environ.get("INTERLEAVINGS_DEEPER", "0"))  # so many events more than in the suite


class Violation(AssertionError):
    """A promise that is broken in a state, with the way there."""


# ---------------------------------------------------------------------------------------------
# Worlds


class World(NamedTuple):
    """What can happen. The first target is desired at the start, of an empty directory."""

    name: str
    targets: tuple[Files, ...]
    events: int = 3  # of all kinds
    changes: int = 3
    in_order: bool = True  # each change goes to the next target; else to any other one
    crashes: int = 1  # long after Envoy came back
    kills: int = 1
    unknowns: int = 1
    bootstrap: tuple[str, ...] = ("cds.json", "lds.json")
    shared: bool = False  # a watched_directory: every publication wakes all, in any order
    hidden: bool = False  # Envoy keeps no counters
    asked: bool = True  # with --envoy-admin
    never_warm: bool = False  # health checks never pass


@functools.cache
def interned(content: bytes, path: str) -> File:
    file = loader.file_of(content, "configmap demo/xds")
    return loader.with_kind(path, file, None) if not file.kind else file


def files(**contents: bytes) -> Files:
    """Files by their stems; `eds_a` is eds/a.json."""
    paths = {stem.replace("_", "/") + ".json": content for stem, content in contents.items()}
    return {path: interned(content, path) for path, content in paths.items()}


ROUTED = listener("in", "rds.json")


# ---------------------------------------------------------------------------------------------
# The driver: what Loop does, without clock, disk, log and threads


class Memory(Output):
    """What a loader that starts finds on disk."""

    def __init__(self, state: Mapping[str, Any], published: Files, kept: Files) -> None:
        super().__init__("/nowhere")
        self.state, self.published, self.kept = dict(state), published, kept


class Burnt(NamedTuple):
    """Bytes that the loader knows as NACKed, and that may not be shown again."""

    path: str
    digest: str
    stood: frozenset[str]  # of the things that a reference names, those there were


class Left(NamedTuple):
    """How many events may still come."""

    changes: int
    crashes: int
    kills: int
    unknowns: int
    events: int


class State:
    """The loader, its directory and one Envoy at one moment. What is in it is never changed in
    place: an event makes a copy, and puts other values there."""

    __slots__ = ("asked", "blind", "burnt", "doubt", "ended", "envoy", "envoy_key",
                 "first", "kept", "known", "known_key", "left", "link", "published", "saved",
                 "waiting", "wanted", "warming")

    def __init__(self, world: World) -> None:
        self.wanted = 0  # the number of the target
        self.published: Files = {}
        self.known, self.known_key = Known(), 0
        self.link = "" if world.asked else "never"  # then as Loop has it
        self.asked: tuple[str, ...] | None = None
        self.first = False  # the first look at this process was taken, and not believed
        self.warming = 0
        self.waiting = False  # another look is planned
        self.saved: dict[str, Any] = {}
        self.kept: Files = {}
        self.envoy, self.envoy_key = Envoy(world.bootstrap), 0
        self.ended = ""  # Envoy ended, and the loader did not see it yet: "soon" or "later"
        self.left = Left(world.changes, world.crashes, world.kills, world.unknowns,
                         world.events + DEEPER)
        self.burnt: frozenset[Burnt] = frozenset()
        self.doubt = False  # another loader starts, and cannot know when files were read
        self.blind = False  # a step went on without Envoy's judgement

    def copy(self) -> State:
        new: State = object.__new__(State)
        for name in State.__slots__:
            setattr(new, name, getattr(self, name))
        return new

    def own_envoy(self) -> Envoy:
        """The Envoy of this state, to be changed."""
        self.envoy, self.envoy_key = self.envoy.copy(), 0
        return self.envoy

    def spend(self, **left: int) -> None:
        self.left = self.left._replace(events=self.left.events - 1, **left)

    def know(self, known: Known) -> None:
        if known is not self.known:
            self.known, self.known_key = known, 0

    def key(self) -> int:
        """The same for states that nobody can tell apart."""
        if not self.envoy_key or not self.known_key:
            self._normalize()
            self.envoy_key, self.known_key = self.envoy.key(), key_of(self.known)
        disk: tuple[object, ...] = ()
        if self.left.kills and self.left.events:  # nobody else reads what is remembered
            disk = (digests(self.kept), repr(self.saved))
        return hash((
            self.wanted, digests(self.published), disk, self.known_key, self.envoy_key, self.link,
            self.asked, self.first, self.warming, self.waiting, self.ended, self.left, self.burnt,
            self.blind, self.doubt,
        ))

    def _normalize(self) -> None:
        """Counters grow for ever; only differences and zeros matter."""
        counts, before = self.envoy.counts, self.known.counts
        rows, lowered = dict(counts), {}
        if self.known.doubt and not before:
            rows = {scope: Counts(min(now.success, 3), min(now.failed, 3))
                    for scope, now in counts.items()}
        for scope, old in before.items():
            now = counts.get(scope)
            if now is None or now.success < old.success or now.failed < old.failed:
                lowered[scope] = Counts(min(old.success, 2), min(old.failed, 2))
                continue
            low = lowered[scope] = Counts(min(old.success, 1), min(old.failed, 1))
            rows[scope] = Counts(low.success + min(3, now.success - old.success),
                                 low.failed + min(3, now.failed - old.failed))
        if lowered != before:
            self.know(self.known._replace(counts=lowered))
        if rows != counts:
            self.own_envoy().counts = rows


def key_of(known: Known) -> int:
    return hash((
        digests(known.acked), frozenset(known.nacks.items()), frozenset(known.states.items()),
        known.unknown, frozenset(known.counts.items()), *known[5:],
    ))


def digests(found: Files) -> frozenset[tuple[str, str]]:
    """A key of files; they are never changed, and their number is small."""
    known = DIGESTS.get(id(found))
    if known is None:
        known = DIGESTS[id(found)] = (
            found, frozenset((path, file.digest) for path, file in found.items()))
    return known[1]


DIGESTS: dict[int, tuple[Files, frozenset[tuple[str, str]]]] = {}


Act = Callable[[State], None]


class Explorer:
    """All states of one world, breadth first, and what is promised in each."""

    def __init__(self, world: World, most: int = 1_000_000) -> None:
        self.world, self.most = world, most
        self.seen: dict[int, tuple[int, str]] = {}
        self.edges: dict[int, list[tuple[int, bool]]] = {}  # what happens by itself; steps marked
        self.ends = 0
        self.plans: dict[object, tuple[Known, Step | None]] = {}
        self.origins: dict[tuple[str, str], list[Files]] = {}
        for target in world.targets:
            for path, file in target.items():
                self.origins.setdefault((path, file.digest), []).append(target)

    # -- the search -----------------------------------------------------------------------------

    def run(self) -> int:
        """Visit every state; the number of them. Violation tells the way to the first bad one."""
        start = State(self.world)
        queue = deque([start])
        self.seen[start.key()] = (0, "start")
        while queue:
            state = queue.popleft()
            here, quiet = state.key(), True
            for label, after, there in self.after(here, state, self.internal(state)):
                quiet = quiet and there == here
                self.visit(queue, here, label, after, there, by_itself=True)
            if quiet:
                for label, after, there in self.after(here, state, self.overdue(here, state)):
                    quiet = quiet and there == here
                    self.visit(queue, here, label, after, there, by_itself=True)
            if quiet:
                self.ends += 1
                self.tell(here, "", self.check_end, state)
            for label, after, there in self.after(here, state, self.events(state)):
                self.visit(queue, here, label, after, there, by_itself=False)
        self.check_loops()
        return len(self.seen)

    def after(
        self, here: int, state: State, acts: Iterable[tuple[str, Act]]
    ) -> Iterator[tuple[str, State, int]]:
        for label, act in acts:
            after = state.copy()
            self.tell(here, label, act, after)
            yield label, after, after.key()

    def visit(self, queue: deque[State], here: int, label: str, state: State, there: int, *,
              by_itself: bool) -> None:
        if by_itself and there != here:
            self.edges.setdefault(here, []).append((there, label.startswith("step")))
        if there in self.seen:
            return
        self.seen[there] = (here, label)
        if len(self.seen) > self.most:
            raise Violation(f"{self.world.name}: more than {self.most} states")
        self.tell(there, "", self.check, state)
        queue.append(state)

    def tell(self, here: int, label: str, act: Act, state: State) -> None:
        try:
            act(state)
        except Violation as violation:
            lines = [f"{self.world.name}, state {len(self.seen)}: {violation}", *self.way(here),
                     *filter(None, [label])]
            raise Violation("\n  ".join(lines)) from None

    def way(self, key: int) -> list[str]:
        labels = []
        while key:
            key, label = self.seen[key]
            labels.append(label)
        return labels[::-1]

    def check_loops(self) -> None:
        """No publication is on a loop of what happens by itself: every path ends."""
        edges = self.edges
        before: dict[int, list[int]] = {}
        for here, found in edges.items():
            for there, _ in found:
                before.setdefault(there, []).append(here)
        left = {here: len(found) for here, found in edges.items()}
        ends = [there for there in before if there not in edges]
        while ends:  # what cannot be on a loop
            for here in before.get(ends.pop(), ()):
                left[here] -= 1
                if not left[here]:
                    del left[here]
                    ends.append(here)
        for here in left:
            for there, published in edges[here]:
                if published and there in left and self.leads(there, here, left):
                    raise Violation("\n  ".join([
                        f"{self.world.name}: publications without an event, and no end",
                        *self.way(here), "... and again"]))

    def leads(self, start: int, end: int, left: Mapping[int, int]) -> bool:
        seen, stack = {start}, [start]
        while stack:
            for there, _ in self.edges[stack.pop()]:
                if there in left and there not in seen:
                    seen.add(there)
                    stack.append(there)
        return end in seen

    def internal(self, state: State) -> Iterator[tuple[str, Act]]:
        envoy = state.envoy
        if envoy.may_start(state.published) and not state.ended:
            yield "Envoy starts", lambda s: s.own_envoy().start()
        indexes = range(len(envoy.queue)) if self.world.shared and not envoy.booting else range(1)
        warming = any(each.warming for each in envoy.clusters.values())
        # A process that starts reads listeners when the clusters that it has are warm.
        reads = envoy.queue and not (envoy.booting and warming and not self.world.never_warm)
        for index in indexes if reads else ():
            yield f"Envoy reads {envoy.queue[index]}", functools.partial(self.read, index=index)
        if warming and not self.world.never_warm:
            yield "clusters are warm", lambda s: s.own_envoy().warm()
        if state.ended or (state.link == "" and not envoy.up):
            yield "the loader sees no Envoy", self.lose
        elif envoy.up and state.link in ("", "end"):
            yield "the loader connects", self.connect
        elif envoy.up and state.link == "silent" and not envoy.booting:
            yield "the loader meets Envoy", self.look
        elif (state.link == "meet" and not ((state.first or self.world.shared) and envoy.queue)
              and state.waiting):
            yield "the loader looks", self.look
        if state.asked is None:
            _, step = self.plan(state)
            if step is not None and self.opens(state, step):
                yield f"step {step.name}", self.publish

    def overdue(self, here: int, state: State) -> Iterator[tuple[str, Act]]:
        """What happens only because time passes and nothing else happens."""
        if state.asked is not None:
            yield "the bound is over", self.give_up
        elif self.plan(state)[1] is not None:
            self.tell(here, "", self.check_late, state)
            yield "step, overdue", self.publish

    def events(self, state: State) -> Iterator[tuple[str, Act]]:
        changes, crashes, kills, unknowns, events = state.left
        if not events:
            return
        for number in range(len(self.world.targets)) if changes else ():
            if (number == (state.wanted + 1) % len(self.world.targets) if self.world.in_order
                    else number != state.wanted):
                yield f"target {number} is desired", functools.partial(self.change, number=number)
        if crashes and state.envoy.up:
            yield "Envoy is restarted", self.crash
        if kills and state.published:
            yield "the loader is killed and starts", self.kill
            if state.asked is None:
                _, step = self.plan(state)
                if step is not None and self.opens(state, step):
                    yield (f"step {step.name}, killed before it is remembered",
                           functools.partial(self.publish, killed=True))
        if unknowns and state.asked is not None:
            yield "unknown: the bound is over", self.unknown

    # -- the loader, as Loop does it ------------------------------------------------------------

    def plan(self, state: State) -> tuple[Known, Step | None]:
        """Loop._advance."""
        published, known = state.published, state.known
        key = (state.wanted, digests(published), digests(known.acked),
               frozenset(known.nacks.items()), frozenset(known.states.items()), known.named)
        if key not in self.plans:
            self.plans[key] = self._plan(published, known, self.world.targets[state.wanted])
        found, step = self.plans[key]
        return known._replace(nacks=found.nacks, named=found.named), step

    def _plan(self, published: Files, known: Known, wanted: Files) -> tuple[Known, Step | None]:
        back, _ = loader.allowed(published, published, known.acked, known.nacks)
        if not loader.same_files(back, published):
            return known, Step(back, loader.ROLLBACK)
        known, found = loader.with_needed(known, wanted, published)
        known = loader.retried(known, found, published)
        desired, _ = loader.allowed(found, published, known.acked, known.nacks)
        step = loader.next_step(published, desired)
        if step is None and loader.to_retry(known, published):
            step = Step(published, loader.REFERENCES)
        return known, step

    def opens(self, state: State, step: Step) -> bool:
        """Asking.opens_at. A pause is long enough for Envoy to read what moved, and to warm."""
        if step.name not in loader.WAITING_STEPS:
            return True
        if state.link == "silent" or (state.link == "meet" and state.warming):
            return False
        if state.link == "meet" and not loader.unjudged(state.known, state.published, step.name):
            return True
        warms = any(each.warming for each in state.envoy.clusters.values())
        return not state.envoy.queue and (self.world.never_warm or not warms)

    def publish(self, state: State, killed: bool = False) -> None:
        """Loop._publish."""
        known, step = self.plan(state)
        assert step is not None
        before, after = state.published, step.files
        if step.name in loader.WAITING_STEPS and (
                state.link != "meet" or loader.unjudged(state.known, before, step.name)):
            state.blind = not all(self.is_sound(number) for number in range(
                len(self.world.targets)))
        moved = loader.moved_paths(before, after)
        self.check_step(state, step, moved)
        again = loader.to_retry(known, before) if loader.same_files(before, after) else []
        moved += again
        self.keep(state, after)
        state.know(loader.after_publication(known, before, after, again))
        state.published = after
        paths = loader.notify_order(moved, after)
        if state.envoy.up:
            everything = self.world.shared and not state.envoy.booting
            state.own_envoy().move(
                sorted(set(state.envoy.subscriptions().values())) if everything else paths)
        if killed:
            self.kill(state)
            return
        if state.link in ("meet", "silent"):
            state.asked, state.waiting = tuple(moved), True
        self.remember(state)

    def remember(self, state: State) -> None:
        self.keep(state, state.published)
        state.saved = loader.state_of(state.known)

    @staticmethod
    def keep(state: State, files: Files) -> None:
        """Output.keep_acked."""
        state.kept = {path: file for path, file in state.known.acked.items()
                      if not (loader.same_file(state.published.get(path), file)
                              and loader.same_file(files.get(path), file))}

    def lose(self, state: State) -> None:
        """Asking.found: nothing listens, or the connection ended."""
        if state.link in ("meet", "silent"):
            soon = state.ended == "soon" and not self.world.hidden
            known, blamed = loader.after_end(state.known, state.published, soon=soon)
            state.know(known)
            self.burn(state, blamed)
            self.remember(state)
        state.link, state.asked, state.ended = "end", None, ""

    def connect(self, state: State) -> None:
        state.link = "silent"

    def look(self, state: State) -> None:
        """Asking.found and _take_look."""
        if state.link == "silent":
            state.link = "meet"
            state.asked = state.asked if state.asked is not None else ()
        look = state.envoy.look(hidden=self.world.hidden)
        state.first = state.known.doubt
        mended = set(state.known.nacks)
        known, told = loader.after_look(state.known, state.published, look)
        state.know(known)
        nacked = [path for path in told if told[path] == NACKED]
        self.burn(state, nacked)
        state.doubt = state.doubt and state.first
        self.mend(state, mended - set(state.known.nacks))
        if mixed := [path for path in told if told[path] == loader.MIXED]:
            state.own_envoy().move(mixed)
        waiting = bool(loader.awaited(known, state.published)) or not look.live
        if state.asked is not None and (nacked or not waiting):
            state.asked = None
        if {ACKED, NACKED} & {*told.values()}:
            self.remember(state)  # before anything is published
        state.warming = look.warming
        unknown = bool(loader.unjudged(known, state.published))
        state.waiting = waiting or unknown or bool(look.warming)
        if not unknown and NACKED not in state.known.states.values() and (
                {name for _, name in state.envoy.references()} <= state.envoy.serving()):
            state.blind = False

    def give_up(self, state: State) -> None:
        """Asking.turn, where it is late."""
        assert state.asked is not None
        if state.link == "meet":
            late = set(state.asked).intersection(loader.awaited(state.known, state.published))
            state.know(state.known._replace(unknown=state.known.unknown | late))
        state.asked = None

    # -- events ----------------------------------------------------------------------------------

    def read(self, state: State, index: int) -> None:
        state.own_envoy().read(state.published, index)
        if not state.envoy.up and state.link in ("meet", "silent"):
            state.ended = "soon"

    def change(self, state: State, number: int) -> None:
        old, new = self.world.targets[state.wanted], self.world.targets[number]
        state.wanted = number
        state.spend(changes=state.left.changes - 1)
        state.burnt = frozenset(each for each in state.burnt if loader.same_file(
            old.get(each.path), new.get(each.path)))

    def crash(self, state: State) -> None:
        state.spend(crashes=state.left.crashes - 1)
        state.own_envoy().end()
        if state.link in ("meet", "silent"):
            state.ended = "later"

    def kill(self, state: State) -> None:
        """Another loader finds what was published and remembered, and asks a new connection."""
        state.spend(kills=state.left.kills - 1)
        memory = Memory(state.saved, state.published, state.kept)
        state.know(loader.known_from(memory))
        state.link = "" if self.world.asked else "never"
        state.asked = () if self.world.asked else None
        state.first, state.warming, state.waiting, state.ended = False, 0, False, ""
        state.doubt = True

    def unknown(self, state: State) -> None:
        state.spend(unknowns=state.left.unknowns - 1)
        self.give_up(state)

    # -- what is promised ------------------------------------------------------------------------

    def burn(self, state: State, paths: Iterable[str]) -> None:
        """These paths were NACKed just now."""
        for path in paths:
            file = state.published[path]
            stood = loader.named_things(file, state.published)
            if state.doubt:
                stood = frozenset()
            for scope, each in state.envoy.subscriptions().items():
                if each == path and (last := state.envoy.last.get(scope)):
                    stood &= last.had
            state.burnt |= {Burnt(path, file.digest, stood)}

    def mend(self, state: State, paths: Iterable[str]) -> None:
        """What was NACKed at these paths is mended: references may be tried once more."""
        if any(path in state.published and state.published[path].kind in loader.CHILD_KINDS
               for path in paths):
            state.burnt = frozenset(
                each for each in state.burnt if each.path in state.published
                and state.published[each.path].kind not in loader.REFERENCE_KINDS)

    def check_step(self, state: State, step: Step, moved: Iterable[str]) -> None:
        """Before a publication: no NACKed bytes are shown again, and nothing goes that an Envoy
        that starts would miss."""
        gone = state.published.keys() - step.files.keys()
        read = {path for path in gone if state.known.states.get(path) in (ACKED, NACKED)}
        missed = gone & {*model.named_paths(step.files), *read.intersection(self.world.bootstrap)}
        if missed:
            raise Violation(f"{sorted(missed)} go, and an Envoy that starts needs them")
        for path in moved:
            file = step.files[path]
            for each in state.burnt:
                if (each.path, each.digest) != (path, file.digest):
                    continue
                if loader.same_file(state.known.acked.get(path), file):
                    continue  # an earlier Envoy took them, and nothing better is known
                if file.kind in loader.REFERENCE_KINDS and (
                        loader.named_things(file, state.published) - each.stood):
                    state.burnt -= {each}
                    continue
                raise Violation(f"{path}: NACKed bytes are shown again by step {step.name}")

    def check_late(self, state: State) -> None:
        """A step waits: no endpoints wait with it, neither in files nor in CDS."""
        wanted = self.world.targets[state.wanted]
        for path, file in wanted.items():
            if file.kind == "eds" and self.good(file) and not loader.same_file(
                    state.published.get(path), file):
                raise Violation(f"{path} waits")
        if self.good(wanted["cds.json"]) and not state.known.nacks:
            have, want = (loader.clusters_of(each["cds.json"]) for each in
                          (state.published, wanted))
            assert have is not None
            assert want is not None
            late = [name for name, text in want.items() if have.get(name) != text]
            if late:
                raise Violation(f"the clusters {late} wait")

    def check(self, state: State, final: bool = False) -> None:
        envoy = state.envoy
        if not envoy.up or envoy.booting:
            return
        lacking = {(source, name) for source, name in envoy.references()
                   if name not in envoy.serving()}
        for source, name in () if state.blind and not final else lacking:
            if all(self.is_good(target, name) for target in self.targets_of(source)):
                raise Violation(f"a route that Envoy runs names {name}, which it lacks")
        if state.link == "meet" and not state.ended:
            scopes = envoy.subscriptions()
            for path, told in state.known.states.items():
                if told not in (ACKED, NACKED) or path not in state.published:
                    continue
                digest = state.published[path].digest
                took = [envoy.last.get(scope) for scope, each in scopes.items() if each == path]
                if told == ACKED and took and any(
                        each is None or each[:2] != (digest, True) for each in took):
                    raise Violation(f"{path} is called ACKed, and Envoy did not take it: {took}")

    @functools.cache  # noqa: B019
    def targets_of(self, source: str) -> list[Files]:
        """The targets with a reference of this text or digest."""
        return [target for target in self.world.targets if any(
            file.digest == source or any(model.text_of(file.content, index) == source
                                         for index in range(len(resources)))
            for file in target.values()
            if (resources := model.resources_of(file.content)) is not None)]

    @functools.cache  # noqa: B019
    def _good(self, digest: str, content: bytes) -> bool:
        found = model.resources_of(content)
        return found is not None and not any(each.get("bad") or each.get("deadly")
                                             for each in found)

    def good(self, file: File) -> bool:
        return self._good(file.digest, file.content)

    def is_good(self, target: Files, name: str) -> bool:
        """Whether a target has a cluster, and Envoy must be able to serve it."""
        for each in model.resources_of(target["cds.json"].content) or ():
            if each["name"] == name:
                path = model.relative(each.get("eds", ""))
                return (not each.get("bad") and self.good(target["cds.json"])
                        and not (self.world.never_warm and each.get("health"))
                        and (not path or (path in target and self.good(target[path]))))
        return False

    @functools.cache  # noqa: B019
    def is_sound(self, number: int) -> bool:
        """Whether a fresh Envoy takes all of a target."""
        fresh = Envoy(self.world.bootstrap)
        target = self.world.targets[number]
        if not fresh.may_start(target):
            return False
        fresh.start()
        while fresh.queue and fresh.up:
            fresh.read(target)
        fresh.warm()
        return (fresh.up and all(count.failed == 0 for count in fresh.counts.values())
                and {name for _, name in fresh.references()} <= fresh.serving())

    def check_end(self, state: State) -> None:
        """Nothing more happens by itself: what is desired and good is there."""
        wanted, envoy, known = self.world.targets[state.wanted], state.envoy, state.known
        if state.link == "meet" and not self.world.hidden and not state.blind and all(
                path in known.acked for path in known.nacks):
            self.check(state, final=True)
        blamed = any(nack.reason == "Envoy ended twice on it" for nack in known.nacks.values())
        sound = self.is_sound(state.wanted)
        if not envoy.up:
            if sound:
                raise Violation("in the end Envoy is down")
            return
        if blamed:
            return  # the good files that came with deadly ones wait with them
        for path, file in wanted.items():
            if file.kind == "eds" and self.good(file) and not loader.same_file(
                    state.published.get(path), file):
                raise Violation(f"in the end {path} is not published")
        if not sound:
            return
        odd = {path for path in {*state.published, *wanted}
               if not loader.same_file(state.published.get(path), wanted.get(path))}
        if state.left.kills < self.world.kills:
            # The new loader cannot tell a listener that drains from one of the bootstrap.
            odd -= set(envoy.subscriptions().values()) - wanted.keys()
        if odd:
            raise Violation(f"in the end {sorted(odd)} are not as desired")
        fresh = Envoy(self.world.bootstrap)
        fresh.start()
        while fresh.queue:
            fresh.read(wanted)
        fresh.warm()
        for name, have, want in (
                ("clusters", envoy.clusters, fresh.clusters),
                ("listeners", envoy.listeners, fresh.listeners),
                ("routes", envoy.used_routes(), fresh.used_routes())):
            if not self.world.never_warm and have != want:
                raise Violation(f"in the end Envoy has other {name}: {have}, not {want}")
        if state.link == "meet" and not self.world.hidden:
            states = {path: known.states.get(path) for path, file in wanted.items() if file.kind}
            read = set(envoy.subscriptions().values())
            odd = {path for path in states if states[path] != ACKED and path in read}
            if odd:
                raise Violation(f"in the end {sorted(odd)} are not ACKed: {states}")


# ---------------------------------------------------------------------------------------------
# The worlds


def good_world(**more: Any) -> World:
    """Clusters with and without EDS files come, change and go, with two route files."""
    first = files(
        cds=cds(cluster("a", eds=True), cluster("b")), eds_a=eds("a"),
        rds=rds("rds", "a", "b"), lds=lds(ROUTED))
    second = files(
        cds=cds(cluster("b", version=2), cluster("c", eds=True)), eds_c=eds("c"),
        rds=rds("rds", "b", "c"), lds=lds(ROUTED))
    third = {**first, **files(
        eds_a=eds("a", 2), rds2=rds("rds2", "a"),
        lds=lds(ROUTED, listener("more", "rds2.json", ["b"])))}
    return World(**{"name": "good", "targets": (first, second, third), **more})


def refused_world() -> World:
    """Fault 1: a rejected route file, and a CDS file that drops what the last good one names."""
    first = files(cds=cds(cluster("a"), cluster("b")), rds=rds("rds", "a", "b"), lds=lds(ROUTED))
    second = {**first, **files(rds=rds("rds", "b", bad=True))}
    third = files(cds=cds(cluster("b"), cluster("x", bad=True)), rds=rds("rds", "b"),
                  lds=lds(ROUTED))
    fourth = {**third, **files(cds=cds(cluster("b"), cluster("c")), rds=rds("rds", "b", bad=True))}
    return World("refused", (first, second, third, fourth))


def listener_world() -> World:
    """Fault 2: a listener is rejected for a cluster that comes later."""
    inner = listener("in", clusters=["a", "c"])
    first = files(cds=cds(cluster("a")), lds=lds(listener("in", clusters=["a"])))
    second = files(cds=cds(cluster("a")), lds=lds(inner))
    third = files(cds=cds(cluster("a"), cluster("c")), lds=lds(inner))
    fourth = files(cds=cds(cluster("a"), cluster("c", bad=True)), lds=lds(inner))
    return World("listener", (first, second, third, fourth), events=4)


def endpoints_world(**more: Any) -> World:
    """Fault 3: endpoints change, in files and in CDS, while another cluster warms."""
    first = files(cds=cds(cluster("a", eds=True), cluster("b")), eds_a=eds("a"),
                  rds=rds("rds", "a", "b"), lds=lds(ROUTED))
    second = files(cds=cds(cluster("a", eds=True), cluster("b"), cluster("c", health=True)),
                   eds_a=eds("a"), rds=rds("rds", "a", "c"), lds=lds(ROUTED))
    third = files(cds=cds(cluster("a", eds=True), cluster("b", version=2),
                          cluster("c", health=True)),
                  eds_a=eds("a", 2), rds=rds("rds", "a", "c"), lds=lds(ROUTED))
    fourth = {**third, **files(eds_a=eds("a", bad=True))}
    return World(**{"name": "endpoints", "targets": (first, second, third, fourth), **more})


def deadly_world() -> World:
    """Bytes that end Envoy, in CDS and in an EDS file, beside good ones."""
    first = files(cds=cds(cluster("a", eds=True)), eds_a=eds("a"), rds=rds("rds", "a"),
                  lds=lds(ROUTED))
    second = {**first, **files(cds=cds(cluster("a", eds=True), cluster("b", deadly=True)),
                               rds=rds("rds", "a", "b"))}
    third = {**first, **files(eds_a=eds("a", deadly=True))}
    fourth = {**first, **files(cds=cds(cluster("a", eds=True), cluster("b")),
                               eds_a=eds("a", 2))}
    return World("deadly", (first, second, third, fourth))


def gone_world() -> World:
    """Fault 13: files that Envoy reads go, and come back; also one that the bootstrap names."""
    first = files(cds=cds(cluster("a", eds=True), cluster("b")), eds_a=eds("a"),
                  rds=rds("rds", "a"), rds2=rds("rds2", "b"), lds=lds(ROUTED))
    second = {path: file for path, file in first.items() if path not in ("rds.json", "rds2.json")}
    third = {path: file for path, file in first.items() if path not in ("eds/a.json", "lds.json")}
    return World("gone", (first, second, third), events=6,
                 bootstrap=("cds.json", "rds2.json", "lds.json"))


WORLDS = [
    good_world(), refused_world(), listener_world(), endpoints_world(),
    endpoints_world(name="endpoints, never warm", never_warm=True), deadly_world(), gone_world(),
    good_world(name="good, watched_directory", shared=True, unknowns=0, events=1),
    good_world(name="good, no counters", hidden=True),
    good_world(name="good, not asked", asked=False, events=4),
]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The searches in texts are pure: each is done once. Nothing here is a cycle to be collected,
    and collections among so many objects took half the time."""
    monkeypatch.setattr(loader, "clusters_of", functools.cache(loader.clusters_of.__wrapped__))
    monkeypatch.setattr(loader, "resource_names", by_identity(loader.resource_names))
    mentioned = functools.cache(loader.mentioned)
    monkeypatch.setattr(loader, "mentioned", lambda content, names: mentioned(
        content, frozenset(names)))
    gc.disable()
    yield
    gc.enable()


def by_identity(function: Callable[[str, File, Files], set[str]]) -> Callable[..., set[str]]:
    """The model's contents have no alt_stat_name: the other files do not matter."""
    found: dict[tuple[str, str], set[str]] = {}

    def cached(path: str, file: File, files: Files) -> set[str]:
        key = (path, file.digest)
        if key not in found:
            found[key] = function(path, file, files)
        return set(found[key])

    return cached


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_every_interleaving(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    explorer, began = Explorer(world), time.monotonic()
    states = explorer.run()
    with capsys.disabled():
        print(f"\n{world.name}: {states} states, {explorer.ends} ends, "
              f"{time.monotonic() - began:.1f} s")


# ---------------------------------------------------------------------------------------------
# Faults that were there, put back


def never_tried_again(known: Known, desired: Files, published: Files) -> Known:
    return known


def dropped(known: Known, desired: Files, published: Files) -> tuple[Known, Files]:
    return known, desired


FAULTS = {
    "1: what bytes that are kept name goes": (
        "refused", {"with_named": lambda result, *_: dict(result)}, "which it lacks"),
    "2: a listener is never tried again": (
        "listener", {"retried": never_tried_again}, "other listeners"),
    "2: nor is one whose NACK is older than its cluster": (
        "listener", {"things": lambda _: frozenset()}, "other listeners"),
    "3: endpoints wait while a cluster warms": (
        "endpoints, never warm",
        {"WAITING_STEPS": loader.WAITING_STEPS | {loader.CHILDREN, loader.CLUSTERS}}, "wait"),
    "13: a file whose source is gone goes": (
        "gone", {"with_needed": dropped}, "an Envoy that starts needs them"),
}


@pytest.mark.parametrize(("name", "variants", "told"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_that_is_put_back_is_found(
    name: str, variants: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for function, variant in variants.items():
        monkeypatch.setattr(loader, function, variant)
    world = next(each for each in WORLDS if each.name == name)
    with pytest.raises(Violation, match=told):
        Explorer(world).run()

"""Tells an example on the terminal: steps, a small live view, and the facts at the end."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from example.support.cluster import Cluster, Proxy
from example.support.pods import Servers
from tests.support.load import Poller
from tests.support.loader import Loader

HERE = Path(__file__).resolve().parents[1]


def readme_commands(readme: Path) -> list[str]:
    """The kubectl commands of a README's code blocks, in order, continued lines joined."""
    blocks = re.findall(r"^```(?:console|sh)\n(.*?)^```", readme.read_text(), re.S | re.M)
    joined = "\n".join(blocks).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    return [line.partition("  #")[0].strip() for line in lines if line.startswith("kubectl")]


class Story:
    """`with Story("canary") as story:`; its exit status is `story.status` (1: a claim failed)."""

    def __init__(self, name: str, argv: Sequence[str] | None = None, clusters: str = "") -> None:
        """`clusters`: names of Kubernetes clusters, where there is more than one (--context)."""
        parser = argparse.ArgumentParser(prog=f"example/{name}/verify", description=(
            "Runs the steps of the README on this machine, and checks what it claims."
        ))  # fmt: skip
        parser.add_argument("--keep", action="store_true", help="leave it running to play with")
        parser.add_argument("--pace", type=float, metavar="S", help="seconds to watch each step")
        self.options = parser.parse_args(argv)
        self.live = sys.stdout.isatty()
        self.pace: float = (2.5 if self.live else 0.5) if self.options.pace is None \
            else self.options.pace  # fmt: skip
        self.folder = HERE / name
        self.root = Path(tempfile.mkdtemp(prefix=f"xds-{name}-"))
        self.servers = Servers()
        self.clusters = {
            word: Cluster(self.folder, self.root / word, self.servers)
            for word in (clusters.split() or ["one"])
        }
        self.cluster = next(iter(self.clusters.values()))
        self._commands = readme_commands(self.folder / "README.md")
        self._facts: list[tuple[str, str, bool | None]] = []
        self._pollers: list[Poller] = []
        self._closing: list[Callable[[], object]] = []
        self._drawn = 0
        self.status = 0
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    # -- steps

    def kubectl(self, begins: str) -> float:
        """Run the next kubectl command of the README; the time just before it was sent.

        `begins` is what the story expects there: a README that was changed alone is noticed.
        """
        assert self._commands, f"the README has no further command, but the story: {begins}"
        line = self._commands.pop(0)
        assert line.startswith(begins), f"the README says {line!r}, the story {begins!r}"
        self.say(f"{self._bold('$ ')}{line}")
        context = re.search(r" --context[= ](\S+)", line)
        cluster = self.clusters[context[1]] if context else self.cluster
        before = time.monotonic()
        cluster.kubectl(line.replace(context[0], "", 1) if context else line)
        return before

    def load(self, url: str, host: str | None = None, interval: float = 0.002) -> Poller:
        """A steady client, ended with the story."""
        poller = Poller(url, host=host, interval=interval)
        self._pollers.append(poller)
        return poller

    def at_end(self, close: Callable[[], object]) -> None:
        """Called when the requests have ended, before the cluster does; the last one first."""
        self._closing.append(close)

    def watch(self, lines: Callable[[], Sequence[str]], seconds: float | None = None) -> None:
        """Show `lines()` in place for a while; without a terminal once, at the end."""
        until = time.monotonic() + (self.pace if seconds is None else seconds)
        while time.monotonic() < until:
            if self.live:
                self._draw(lines())
            time.sleep(max(0.0, min(0.1, until - time.monotonic())))
        self._draw(lines())
        self._drawn = 0

    def until(self, condition: Callable[[], object], message: str, timeout: float = 30.0) -> float:
        """Wait; the time when it was so."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{message}: not within {timeout} s")
            time.sleep(0.0005)
        return time.monotonic()

    # -- words

    def _bold(self, text: str) -> str:
        return f"\033[1m{text}\033[0m" if self.live else text

    def say(self, text: str = "") -> None:
        self._drawn = 0
        print(text, flush=True)

    def title(self, text: str) -> None:
        self.say(f"\n{self._bold(text)}")

    def _draw(self, lines: Sequence[str]) -> None:
        if self._drawn:
            print(f"\033[{self._drawn}A", end="")
        width = shutil.get_terminal_size((100, 24)).columns if self.live else 200
        for line in lines:
            print(f"\033[K{line[: width - 1]}" if self.live else line)
        sys.stdout.flush()
        self._drawn = len(lines) if self.live else 0

    def fact(self, what: str, value: object) -> None:
        self._facts.append((what, str(value), None))

    def claim(self, what: str, holds: object, value: object) -> None:
        """A fact that must be so: the exit status tells."""
        self._facts.append((what, str(value), bool(holds)))
        if not holds:
            self.status = 1

    def verdict(self, pollers: Sequence[Poller], proxies: Sequence[Proxy], what: str = "") -> None:
        """What every example claims: no request failed, and no Envoy was restarted."""
        count = sum(len(poller.answers) for poller in pollers)
        failed = sum(len(poller.failed) for poller in pollers)
        self.claim(f"{what}requests, failed", count and not failed, f"{count}, {failed}")
        for proxy in proxies:
            name = f" ({proxy.name})" if len(proxies) > 1 else ""
            self.claim(f"{what}restarts of Envoy{name}", proxy.never_restarted(), proxy.restarts())

    def _table(self) -> None:
        self.title("The facts")
        width = max(len(what) for what, _, _ in self._facts)
        marks = {True: "ok", False: "NO", None: "  "}
        for what, value, holds in self._facts:
            print(f"  {marks[holds]}  {what:<{width}}  {value}")
        print(flush=True)

    def play(self, lines: Sequence[str]) -> None:
        """With --keep: leave everything running, show what to type next, wait for Ctrl-C."""
        if not self.options.keep:
            return
        self._table()
        self._facts = []
        self.say(self._bold("It goes on running. In another terminal, in this directory:"))
        for line in [*lines, *self._loaders()]:
            self.say(f"  {line}")
        # A shell starts what is in its background with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.say("Ctrl-C ends it.")
        try:
            signal.pause()
        except KeyboardInterrupt:
            self.say()

    def _loaders(self) -> list[str]:
        """What each loader serves, where its log is (from now on in a file), and one's own."""
        commands = []
        for cluster in self.clusters.values():
            api = f"--apiserver {cluster.api.url} --token-file {cluster.token_file}"
            for proxy in cluster.proxies.values():
                for loader in proxy.loaders:
                    place = proxy.root / "loader.log"
                    place.touch()
                    threading.Thread(target=follow, args=(loader, place), daemon=True).start()
                    commands += [
                        f"# The loader of {proxy.name}",
                        f"curl -s {proxy.url(9902, '/snapshot')}    # also /readyz, /metrics",
                        f"tail -f {place}",
                        "# one of your own, with the token of the demo; to run on: --watch "
                        "--output-dir DIR in place of --dry-run",
                        f"python3 loader.py {api} --namespace {cluster.namespace} "
                        f"{shlex.join(proxy.sources())} --dry-run",
                    ]
                log = proxy.envoy.log_file
                commands.append(f"tail -f {log}    # its Envoy: why it rejects a file")
        return [*commands, "# To end all of it", f"kill {os.getpid()}    # or Ctrl-C there"]

    def __enter__(self) -> Story:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None and self._commands:
            self.claim("every command of the README was run", False, self._commands)
        for poller in self._pollers:
            poller.close()
        for close in reversed(self._closing):
            close()
        if error is not None and not isinstance(error, SystemExit | KeyboardInterrupt):
            for cluster in self.clusters.values():
                for proxy in cluster.proxies.values():
                    error.add_note(f"{proxy.name}:\n" + "\n".join(
                        line for loader in proxy.loaders for line in loader.lines[-15:]
                    ))  # fmt: skip
                    if proxy._envoy is not None:
                        error.add_note(proxy.envoy.log_tail(10))
        for cluster in self.clusters.values():
            cluster.close()
        self.servers.close()
        shutil.rmtree(self.root, ignore_errors=True)
        if error is None and self._facts:
            self._table()
        return isinstance(error, KeyboardInterrupt)


def follow(loader: Loader, place: Path) -> None:
    """Write a loader's log to a file, and go on as it grows."""
    written = 0
    with contextlib.suppress(OSError), place.open("w") as file:  # gone with the story
        while place.exists():
            lines = loader.lines
            file.writelines(f"{line}\n" for line in lines[written:])
            file.flush()
            written = len(lines)
            time.sleep(0.2)


def bar(share: float, width: int = 30) -> str:
    """A share of 1 as a bar."""
    full = round(share * width)
    return "█" * full + "·" * (width - full)


def shares(poller: Poller, seconds: float = 0.4) -> dict[str, float]:
    """The share of each body among the answers of the last moments."""
    since = time.monotonic() - seconds
    counts = Counter(answer.body for answer in poller.answers if answer.time > since)
    return {body: count / counts.total() for body, count in sorted(counts.items())}


def bars(poller: Poller, names: Sequence[str], label: str = "") -> list[str]:
    """How the last answers were shared, as bars, and how many there were in all."""
    found = shares(poller)
    width = max(map(len, names))
    lines = [f"  {label}{name:<{width}} {bar(found.get(name, 0))} {found.get(name, 0):>5.0%}"
             for name in names]  # fmt: skip
    return [*lines, f"  {len(poller.answers)} requests, {len(poller.failed)} failed"]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"

"""What every measurement stands on: the API server, the contenders, and an eye on their files."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import py_compile
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import machine
from tests.support.apiserver import ApiServer, Request
from tests.support.closing import Closing
from tests.support.disk import IN_MOVED_TO, Inotify
from tests.support.loader import environment
from tests.support.tls import Authority

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "loader.py"
NAMESPACE = "demo"
TOKEN = "bench-token"
KEY = "rds.yaml"
PAGE = "0123456789abcde\n"  # 16 bytes of padding

LOADER, FLOOR, CLIENT, KUBECTL = "loader", "floor", "Python client", "kubectl"
# Any other program, such as the loader of another commit: its command line in the environment, with
# {url}, {ca_file}, {token_file}, {namespace}, {configmap} and {dir} in it. It writes {dir}/current.
OTHER, OTHER_COMMAND = "other", os.environ.get("OTHER", "")
ROUTES = """\
version_info: "{number}"
resources:
- "@type": type.googleapis.com/envoy.config.route.v3.RouteConfiguration
  name: routes
  virtual_hosts:
  - name: all
    domains: ["*"]
    routes:
    - match: {{prefix: /}}
      direct_response: {{status: 200, body: {{inline_string: "{number}"}}}}
"""


class Spread(NamedTuple):
    """Of measured values: the fastest tenth, the median, the 99th percentile."""

    p10: float
    p50: float
    p99: float

    def __str__(self) -> str:
        return f"{number(self.p50)} / {number(self.p99)} ms"


def spread(values: Sequence[float]) -> Spread:
    return Spread(*(machine.quantile(values, share) for share in (0.1, 0.5, 0.99)))


def number(value: float) -> str:
    """Three digits, as many as are worth reading."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratios(values: Mapping[str, float]) -> dict[str, str]:
    """Each figure as a multiple of the floor's."""
    floor = values[FLOOR]
    return {kind: f"{value / floor:.2f} x" for kind, value in values.items() if floor}


class Row(NamedTuple):
    """One line of the table: what was measured, each contender's figure, what is aimed at."""

    measure: str
    values: Mapping[str, str]
    aim: str = ""


def content(number: int, size: int = 4096) -> str:
    """A RouteConfiguration that answers `number`, padded by comments to `size` bytes."""
    text = f"# {number}\n" + ROUTES.format(number=number)
    lines = max(0, size - len(text)) // 18
    return text + f"# {PAGE}" * lines


class Stage(Closing):
    """An API server over TLS, a byte-compiled loader, a directory for everybody's files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.authority = Authority(root / "ca")
        self.api = ApiServer(tls=self.authority.server_context(), tokens=[TOKEN])
        self.token_file = root / "token"
        self.token_file.write_text(TOKEN)
        self.bytecode = root / "loader.pyc"
        # As the image has it: see the Dockerfile.
        py_compile.compile(
            str(SOURCE),
            str(self.bytecode),
            doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        self._numbers = itertools.count(1)

    def close(self) -> None:
        self.api.close()

    def directory(self, kind: str) -> Path:
        """A new directory; with `current` in it, so that it can be watched before anybody ran."""
        place = self.root / f"{kind.replace(' ', '-')}-{next(self._numbers)}"
        (place / "current").mkdir(parents=True)
        return place

    # -- changes

    def next(self) -> int:
        return next(self._numbers)

    def change(self, name: str, size: int = 4096, labels: Mapping[str, str] | None = None) -> int:
        """A new content for a ConfigMap; the number in it."""
        number = self.next()
        self.api.configmap(NAMESPACE, name, {KEY: content(number, size)}, labels=labels)
        return number

    # -- who runs

    def loader_command(self, *args: str, source: bool = False) -> list[str]:
        """The loader with the options that all runs share."""
        code = str(SOURCE if source else self.bytecode)
        return [
            *(sys.executable, "-I", "-S", code, "--apiserver", self.api.url),
            *("--ca-file", str(self.authority.ca_file), "--token-file", str(self.token_file)),
            *("--namespace", NAMESPACE, *args),
        ]

    def command(self, kind: str, selector: str, place: Path, *, once: bool = False) -> list[str]:
        """The program `kind` that puts the ConfigMaps of a selector below `place`."""
        if kind == LOADER:
            what, _, value = selector.partition("=")
            value = value.replace("%3D", "=")
            if what == "fieldSelector":
                chosen = ["--configmap", value.removeprefix("metadata.name=")]
            else:
                chosen = ["--configmap-selector", value]
            mode = "--onetime" if once else "--watch"
            return self.loader_command(mode, "--output-dir", str(place), *chosen)
        if kind == OTHER:
            places = {
                "url": self.api.url,
                "ca_file": self.authority.ca_file,
                "token_file": self.token_file,
                "namespace": NAMESPACE,
                "configmap": selector.rpartition("%3D")[2],
                "dir": place,
            }
            return [word.format(**places) for word in shlex.split(OTHER_COMMAND)]
        program = {FLOOR: "floor.py", CLIENT: "client.py", KUBECTL: "kubectl.py"}[kind]
        # Nobody but the client needs more than the standard library.
        alone = [] if kind == CLIENT else ["-I", "-S"]
        return [
            *(sys.executable, *alone, str(HERE / program), self.api.url),
            *(str(self.authority.ca_file), str(self.token_file), NAMESPACE, selector),
            *(str(place / "current"), *(["--once"] if once else [])),
        ]

    @contextlib.contextmanager
    def running(
        self, kind: str, selector: str, command: Sequence[str] | None = None
    ) -> Iterator[Running]:
        place = self.directory(kind)
        program = command or self.command(kind, selector, place)
        with Running(kind, place, [part.format(dir=place) for part in program]) as run:
            yield run


class Running:
    """A contender at work, its log in a file."""

    def __init__(
        self, kind: str, place: Path, command: Sequence[str], stdin: int = subprocess.DEVNULL
    ) -> None:
        self.kind, self.place = kind, place
        self.log_file = place / "log"
        self.eye = Eye(place / "current")
        self.began = time.monotonic()
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment(), stdin=stdin, stdout=log, stderr=log
            )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        children = machine.family(self.process.pid)[1:]
        self.process.terminate()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, 15)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.eye.close()
        if self.process.stdin is not None:
            self.process.stdin.close()
        if error is not None:
            error.add_note(f"{self.kind}'s log:\n{self.log()[-3000:]}")

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_log(self, text: str, timeout: float = 60.0) -> float:
        """When the log first had this text, in seconds of the monotonic clock."""
        deadline = time.monotonic() + timeout
        while text not in self.log():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"no {text!r} in the log of {self.kind}:\n{self.log()[-2000:]}")
            time.sleep(0.002)
        return time.monotonic()

    def cpu(self) -> float:
        return machine.cpu(machine.family(self.process.pid))

    def memory(self, field: str = "VmRSS") -> float:
        return machine.memory(machine.family(self.process.pid), field)


class Eye:
    """Sees files as Envoy does: told of a move by inotify, then reading."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._inotify = Inotify(directory, mask=IN_MOVED_TO)

    def close(self) -> None:
        self._inotify.close()

    def number(self, key: str = KEY) -> int:
        """The number in a file; 0 where there is none."""
        try:
            with open(self.directory / key, "rb") as file:
                first = file.readline(64).split()
            return int(first[1])
        except (FileNotFoundError, IndexError, ValueError):
            return 0

    def wait(self, wanted: int, key: str = KEY, timeout: float = 30.0) -> float:
        """When (monotonic, s) the file with this number was seen."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            moved = self._inotify.moved(1.0)
            seen = time.monotonic()
            if (key in moved or not moved) and self.number(key) == wanted:
                return seen
        raise TimeoutError(f"{self.directory / key} is not {wanted} after {timeout} s")

    def wait_moved(self, key: str, timeout: float = 30.0) -> float:
        """When a file of this name was moved in."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if key in self._inotify.moved(1.0):
                return time.monotonic()
        raise TimeoutError(f"{self.directory / key} did not move within {timeout} s")

    def drain(self, key: str = KEY) -> int:
        """How many moves of the file were seen since the last look."""
        return self._inotify.moved(0.0).count(key)


# ---------------------------------------------------------------------------------------------


def contenders() -> list[str]:
    """Those that are installed here."""
    found = [LOADER, FLOOR]
    if importlib.util.find_spec("kubernetes") is not None:
        found.append(CLIENT)
    if shutil.which("kubectl"):
        found.append(KUBECTL)
    if OTHER_COMMAND:
        found.append(OTHER)
    return found


def tmpfs() -> str | None:
    """Where the files go: memory, as the chart's `emptyDir` has it, not this machine's disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def named(name: str) -> str:
    return f"fieldSelector=metadata.name%3D{name}"


def is_about(selector: str) -> Callable[[Request], bool]:
    """Whether a request is one with this selector."""
    field, _, value = selector.partition("=")
    value = value.replace("%3D", "=")
    return lambda request: request.query.get(field) == value

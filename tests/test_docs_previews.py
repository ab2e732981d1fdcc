"""docs/previews.md: its commands are run, with a kubectl that does what these lines need of it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import loader
from tests.conftest import NAMESPACE, RunLoader
from tests.support.apiserver import ApiServer
from tests.support.docs import ROOT, block_for, blocks_of
from tests.support.loader import COMMAND

PAGE = "docs/previews.md"
KUBECTL = """#!{python}
import json, pathlib, subprocess, sys

arguments = sys.argv[1:]
if arguments[:2] == ["create", "configmap"]:
    assert arguments[3:] == ["--from-file=xds/", "--dry-run=client", "-o", "json"], arguments
    data = {{path.name: path.read_text() for path in pathlib.Path("xds").iterdir()}}
    metadata = {{"name": arguments[2], "creationTimestamp": None}}
    kind = {{"kind": "ConfigMap", "apiVersion": "v1"}}
    print(json.dumps({{**kind, "metadata": metadata, "data": data}}))
elif arguments[0] == "exec":
    command = arguments[arguments.index("--") + 1 :]
    assert ("-i" in arguments) == ("-" in command), "standard input reaches a container by -i"
    sys.exit(subprocess.run([*command, *{options}]).returncode)
"""


class Laptop:
    """A directory with the files of a ConfigMap, kubectl, and the loader as a command."""

    def __init__(self, place: Path, *options: str) -> None:
        self.place = place
        (place / "xds").mkdir(parents=True)
        (place / "bin").mkdir()
        (place / "xds" / "rds.yaml").write_text("resources: []\n")
        ours = f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n'
        kubectl = KUBECTL.format(python=sys.executable, options=list(options))
        for name, text in (
            ("loader", ours),
            ("envoy-xds-configmap-loader", ours),
            ("kubectl", kubectl),
        ):
            (place / "bin" / name).write_text(text)
            (place / "bin" / name).chmod(0o755)

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.place / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            ["sh", "-c", line],
            cwd=self.place,
            env={"PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )


def test_the_command() -> None:
    line = block_for(PAGE, "test_the_command").strip()
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout == f"envoy-xds-configmap-loader {loader.__version__}\n"


def blocks(test: str) -> tuple[list[str], str]:
    """The command lines of a test's block, and its output where there is one."""
    found = [block for block in blocks_of(PAGE) if block.target.endswith(f"::{test}")]
    shown = [block.text for block in found if block.kind == "output"]
    lines = [line for block in found if block.kind == "run" for line in block.text.splitlines()]
    return lines, "".join(shown)


def test_before_applying(tmp_path: Path) -> None:
    (line,), shown = blocks("test_before_applying")
    done = Laptop(tmp_path).run(line)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == shown


def test_another_namespace(tmp_path: Path) -> None:
    (line,), _ = blocks("test_before_applying")
    _, shown = blocks("test_another_namespace")
    laptop = Laptop(tmp_path)
    objects = laptop.run(line.partition(" | ")[0]).stdout
    (tmp_path / "object.json").write_text(objects.replace('{"name"', '{"namespace":"web","name"'))
    done = laptop.run(f"{line.partition(' | ')[2].replace(' web', ' shop')} < object.json")
    assert done.returncode == 1
    assert shown.strip() in done.stderr


def test_from_a_laptop(tmp_path: Path) -> None:
    """A proxy is an API server on loopback that asks for no token."""
    lines, _ = blocks("test_from_a_laptop")
    assert lines[0] == "kubectl proxy &"
    with ApiServer() as proxy:
        proxy.configmap("web", "envoy-xds", {"rds.yaml": "resources: []\n"})
        shown = ("rds.yaml (configmap", "cds.yaml (serv")
        for line, expected in zip(lines[1:], shown, strict=True):
            done = Laptop(tmp_path / expected[:3]).run(
                line.replace("http://127.0.0.1:8001", proxy.url)
            )
            assert done.returncode == 0, done.stderr
            assert expected in done.stdout


def test_in_a_running_sidecar(
    api: ApiServer, run_loader: RunLoader, common: list[str], tmp_path: Path
) -> None:
    lines, _ = blocks("test_in_a_running_sidecar")
    api.configmap(NAMESPACE, "envoy-xds", {"rds.yaml": "resources: []  # before\n"})
    assert run_loader("--onetime", "--configmap", "envoy-xds").returncode == 0
    laptop = Laptop(tmp_path, *common, "--apiserver", api.url)
    for line, changed in zip(lines, (False, True), strict=True):
        done = laptop.run(line)
        assert done.returncode == 0, done.stderr
        assert ("-resources: []  # before" in done.stdout) == changed

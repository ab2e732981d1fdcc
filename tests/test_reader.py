"""A reader in a process of its own, in a loop, during thousands of publications.

Each file carries the generation that it belongs to. Read through one resolution of `..data`, all
files are of one generation; through `current/`, each path always resolves to a complete file.
SOAK=1 in the environment makes it 10,000 publications.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import loader

# On a disk each publication takes some ms more than in memory.
PUBLICATIONS = {"disk": 200, "tmpfs": 600, "overlay": 500}
if os.environ.get("SOAK"):
    PUBLICATIONS = dict.fromkeys(PUBLICATIONS, 10_000)
FILES = [f"file{number}" for number in range(4)] + [f"eds/file{number}" for number in range(4)]
UNCHANGED = ["same", "eds/same"]

# What a reader does; it prints its findings when its stdin ends.
READER = r"""
import json, os, select, sys
root, files = sys.argv[1], sys.argv[2:]
found = {"rounds": 0, "generations": 0, "overtaken": 0, "pruned": 0,
         "missing": [], "partial": [], "mixed": [], "backwards": []}
last = seen = -1

def parse(name, text):
    # "<generation> <length> xxxx...\n": complete if the length is right.
    parts = text.split(" ")
    if len(parts) != 3 or len(parts[2]) != int(parts[1]) + 1 or not text.endswith("\n"):
        found["partial"].append((name, text[:40]))
        return -1
    return int(parts[0])

def snapshot():
    # Through a descriptor of the directory that ..data names now.
    home = os.open(f"{root}/..data", os.O_RDONLY | os.O_DIRECTORY)
    try:
        generations = set()
        for name in files:
            number = os.open(name, os.O_RDONLY, dir_fd=home)
            with open(number) as stream:
                generations.add(parse(name, stream.read()))
        return generations
    finally:
        os.close(home)

print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    try:
        generations = snapshot()
    except FileNotFoundError:
        # Two publications passed while it read: the snapshot that it had opened was pruned.
        found["pruned"] += 1
        generations = set()
    if len(generations) > 1:
        found["mixed"].append(sorted(generations))
    before = -1
    for name in files:
        try:
            with open(f"{root}/current/{name}") as stream:
                generation = parse(name, stream.read())
        except OSError as error:
            with open(f"{root}/current/{name}") as stream:
                generation = parse(name, stream.read())
            if generation < before + 2:
                found["missing"].append(str(error))
            # Else it was suspended within open(2), between the link and its target, for two
            # whole publications: the snapshot that it was on its way into is pruned by then.
            found["overtaken"] += 1
            continue
        # Paths are read one after the other: never one that is older than the one before.
        if generation < before:
            found["backwards"].append((name, before, generation))
        before = generation
    for name in ("same", "eds/same"):
        try:
            with open(f"{root}/current/{name}") as stream:
                if stream.read() != "same":
                    found["partial"].append(name)
        except OSError:
            found["overtaken"] += 1
    found["rounds"] += 1
    found["generations"] += before != seen
    seen = before
print(json.dumps(found))
"""


def content(generation: int) -> bytes:
    """Of a length that differs from one generation to the next, up to 20 kB."""
    length = generation * 7919 % 20_000
    return f"{generation} {length} {'x' * length}\n".encode()


def files(generation: int) -> dict[str, loader.File]:
    changed = loader.file_of(content(generation), "test")
    same = loader.file_of(b"same", "test")
    return {**dict.fromkeys(FILES, changed), **dict.fromkeys(UNCHANGED, same)}


def overlay() -> Path | None:
    """An overlay filesystem of its own, where that is allowed: containers have one for a root."""
    base = Path(tempfile.mkdtemp(dir="/dev/shm"))
    for name in ("lower", "upper", "work", "merged"):
        (base / name).mkdir()
    options = ",".join(f"{name}dir={base / name}" for name in ("lower", "upper", "work"))
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(base / "merged")]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        done = None
    if done is None or done.returncode != 0:
        shutil.rmtree(base)
        return None
    return base


@pytest.fixture(params=["disk", "tmpfs", "overlay"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path / "runtime"
        return
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm")
    if request.param == "tmpfs":
        place = Path(tempfile.mkdtemp(dir="/dev/shm"))
        yield place / "runtime"
        shutil.rmtree(place)
        return
    base = overlay()
    if base is None:
        pytest.skip("mounting an overlay is not allowed here")
    yield base / "merged/runtime"
    subprocess.run(["umount", str(base / "merged")], check=True)
    shutil.rmtree(base)


def test_a_reader_never_sees_a_missing_partial_or_mixed_set(
    root: Path, request: pytest.FixtureRequest
) -> None:
    publications = PUBLICATIONS[request.node.callspec.params["root"]]
    before = os.umask(0)
    output = loader.Output(str(root))
    output.lock()
    output.recover()
    output.publish(files(0))
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", READER, str(root), *FILES],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as reader:  # fmt: skip
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        for generation in range(1, publications + 1):
            output.publish(files(generation))
            output.prune()
        found = json.loads(reader.communicate("")[0])
    os.close(output._lock)  # as the end of the process does
    os.umask(before)
    pruned, overtaken = found.pop("pruned"), found.pop("overtaken")
    rounds, generations = found.pop("rounds"), found.pop("generations")
    print(f"{publications} publications: {rounds} rounds saw {generations} generations; {pruned} "
          f"lost their snapshot midway, {overtaken} of {rounds * 10} opens were overtaken")
    assert found == {"missing": [], "partial": [], "mixed": [], "backwards": []}
    assert overtaken <= rounds // 100 + 1
    assert rounds > 50
    assert generations > 20

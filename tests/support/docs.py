"""The code blocks of a Markdown page, and what is said above each about the test behind it.

<!-- run: tests/test_x.py::test_y ARGUMENTS -->      the test executes the block
<!-- output: tests/test_x.py::test_y ARGUMENTS -->   the block is what the test sees
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^ *(```+|~~~+)([^`]*)$")
MARK = re.compile(r"^ *<!-- (run|output): (\S+)(?: (.*?))? -->$")


class Block(NamedTuple):
    """One fenced block: where it is, its language, its text, and the mark above it."""

    page: str
    line: int
    language: str
    text: str
    kind: str = ""  # run, output, or "" without a mark
    target: str = ""  # tests/test_x.py or tests/test_x.py::test_y
    arguments: tuple[str, ...] = ()


def blocks_of(page: str) -> list[Block]:
    """Every fenced block of a page (a path relative to the repository)."""
    return list(_blocks(page, (ROOT / page).read_text().split("\n")))


def _blocks(page: str, lines: list[str]) -> Iterator[Block]:
    at = 0
    while at < len(lines):
        opened = FENCE.match(lines[at])
        if not opened:
            at += 1
            continue
        end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == opened[1])
        indent = len(lines[at]) - len(lines[at].lstrip())
        text = "".join(f"{line[indent:]}\n" for line in lines[at + 1 : end])
        mark = MARK.match(lines[at - 1]) if at else None
        language = (opened[2].split() or [""])[0]
        kind, target, rest = mark.groups() if mark else ("", "", "")
        yield Block(page, at + 1, language, text, kind, target, tuple((rest or "").split()))
        at = end + 1


def block_for(page: str, test: str, *arguments: str) -> str:
    """The text of the one block that names this test (and these arguments)."""
    found = [
        block.text
        for block in blocks_of(page)
        if block.target.endswith(f"::{test}") and block.arguments == arguments
    ]
    assert len(found) == 1, f"{page}: {len(found)} blocks for {test} {arguments}"
    return found[0]

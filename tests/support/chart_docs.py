"""The table of values in the chart's README, made from the comments of values.yaml.

A value is described by the comment right above it that starts with `# --`; a description on a
mapping covers all of it, otherwise each value below needs its own.

`python -m tests.support.chart_docs` writes the table anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

CHART = Path(__file__).resolve().parents[2] / "charts" / "envoy-xds-configmap-loader"
BEGIN, END = "<!-- values: begin -->", "<!-- values: end -->"


class Row(NamedTuple):
    """One value: its path, default (JSON, short) and description ("" when there is none)."""

    path: str
    default: str
    description: str


def _comment_above(lines: list[str], line: int) -> str:
    """The text of the `# --` block that ends right above `line` (counted from 0)."""
    words: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        text = lines[line].strip().removeprefix("#").strip()
        words.insert(0, text.removeprefix("-- "))
        if text.startswith("-- "):
            return " ".join(words)
    return ""


def rows(text: str) -> Iterator[Row]:
    """Every value of a values.yaml that is described or has nothing below it."""
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, path: str) -> Iterator[Row]:
        for key, value in node.value:
            name = f"{path}{key.value}"
            described = _comment_above(lines, key.start_mark.line)
            if isinstance(value, yaml.MappingNode) and value.value and not described:
                yield from walk(value, f"{name}.")
            else:
                default = yaml.safe_load(yaml.serialize(value))
                yield Row(name, json.dumps(default, ensure_ascii=False), described)

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    yield from walk(root, "")


def table(text: str) -> str:
    """The Markdown table of a values.yaml."""
    escaped = (
        f"| `{row.path}` | `{row.default}` | {row.description.replace('|', chr(92) + '|')} |"
        for row in rows(text)
    )
    return "\n".join(["| value | default | meaning |", "| --- | --- | --- |", *escaped])


def with_table(readme: str, text: str) -> str:
    """The README with its table made anew."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table(text)}\n{END}{tail}"


if __name__ == "__main__":
    path = CHART / "README.md"
    path.write_text(with_table(path.read_text(), (CHART / "values.yaml").read_text()))

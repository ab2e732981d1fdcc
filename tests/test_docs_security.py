"""docs/security.md: each line of "What holds against whom" names a test that exists."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support.loader import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text()


def lines() -> Iterator[tuple[str, list[str]]]:
    """What is tried, and the tests that show what holds."""
    _, _, rest = PAGE.partition("## What holds against whom")
    section = re.split(r"^## ", rest, flags=re.MULTILINE)[0]
    for row in re.findall(r"^\| (?!what |---)(.*) \|$", section, re.MULTILINE):
        what, _, shown = row.split(" | ")
        yield what, re.findall(r"`(tests/\w+\.py::\w+)`", shown)


@pytest.mark.parametrize(("what", "tests"), list(lines()))
def test_each_line_has_a_test(what: str, tests: list[str]) -> None:
    assert tests
    for test in tests:
        path, _, function = test.partition("::")
        text = (ROOT / path).read_text() if (ROOT / path).exists() else ""
        assert re.search(rf"^def {function}\(", text, re.MULTILINE), test


def test_the_page_has_all_parties() -> None:
    assert len(list(lines())) > 25

"""What README.md and docs/ say is so: every code block has a test, every link and test is there.

A block's test is named in a comment right above it (see tests/support/docs.py), or the whole page
has a test that goes through it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import loader
from tests.support import reference
from tests.support.docs import ROOT, Block, block_for, blocks_of
from tests.support.loader import run
from tests.support.manifests import VERSIONS, render, validate

DOCS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PAGES = [
    *DOCS,
    "CHANGELOG.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "example").glob("**/README.md"))),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "charts").glob("*/README.md"))),
]
# Pages whose blocks are all gone through by a test that knows their form.
WHOLE = {
    "docs/rendering.md": "tests/test_docs_rendering.py",
    "docs/migration.md": "tests/test_migration.py",
    "docs/security.md": "tests/test_secrets.py",
}
BLOCKS = [block for page in DOCS for block in blocks_of(page)]


def name_of(block: Block) -> str:
    return f"{block.page}:{block.line}"


# ---------------------------------------------------------------------------------------------
# Code blocks, links and names of tests


@pytest.mark.parametrize("block", BLOCKS, ids=name_of)
def test_every_block_has_a_test(block: Block) -> None:
    """It exists, and it names the page: a test that does not read it cannot tell."""
    target = block.target or WHOLE.get(block.page, "")
    assert target, f"{name_of(block)}: no `<!-- run: ... -->` or `<!-- output: ... -->` above it"
    assert names_a_test(target), target
    path = target.partition("::")[0]
    assert Path(block.page).name in (ROOT / path).read_text()


def names_a_test(target: str) -> bool:
    """Whether `tests/test_x.py`, or `tests/test_x.py::test_y`, is there."""
    path, _, function = target.partition("::")
    place = ROOT / path
    if not place.is_file():
        return False
    return re.search(rf"^def {function}\(" if function else "", place.read_text(), re.M) is not None


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_is_named_exists(page: str) -> None:
    named = re.findall(r"tests/\w+\.py(?:::\w+)?", (ROOT / page).read_text())
    assert [target for target in named if not names_a_test(target)] == []


def test_each_line_of_what_holds_against_whom_has_a_test() -> None:
    """docs/security.md; that the tests exist is shown above."""
    page = (ROOT / "docs" / "security.md").read_text()
    section = page.partition("## What holds against whom")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!what |---)(.*) \|$", section, re.M)
    assert len(rows) > 25
    for row in rows:
        assert re.search(r"`tests/\w+\.py::\w+`", row.split(" | ")[2]), row


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_letter_leads_to_exists(page: str) -> None:
    """Where a page says: `L` stands for `tests/test_x.py`."""
    text = (ROOT / page).read_text()
    files = dict(re.findall(r"`([A-Z])`\s(?:stands\s)?for\s`(tests/\w+\.py)`", text))
    named = re.findall(r"\b([A-Z])\s`(test_\w+)", text) if files else []
    assert [name for name in named if not names_a_test(f"{files.get(name[0])}::{name[1]}")] == []


def prose(page: str) -> str:
    """A page without its code."""
    text = re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", lambda code: "" if "](" in code[0] else code[0], text)


def anchors(page: Path) -> Iterator[str]:
    """What GitHub calls the headings of a page."""
    seen: dict[str, int] = {}
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
    for title in re.findall(r"^#+ +(.*?) *$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = seen[slug] = seen.get(slug, -1) + 1
        yield f"{slug}-{count}" if count else slug


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        path, _, anchor = link.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(link)
    assert broken == []


def test_the_readme_leads_to_every_page_and_example() -> None:
    text = (ROOT / "README.md").read_text()
    for page in (*DOCS[1:], *PAGES[len(DOCS) + 1 :]):
        assert f"]({page})" in text, page


def test_pages_name_options_that_exist() -> None:
    known = {option.name for option in loader.OPTIONS}
    others = {"keep", "minutes", "mode", "overwrite", "reuse-values", "set"}
    others |= {"service-cluster", "service-node"}
    others |= {"disable-hot-restart", "unix-socket"}
    mistaken = {"sync-intervall"}
    for page in (page for page in DOCS if page not in WHOLE):
        for name in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", (ROOT / page).read_text()):
            assert name in known | others | mistaken, f"{page}: --{name}"


# ---------------------------------------------------------------------------------------------
# Options and metrics


def test_the_page_of_options_is_that_of_the_parser() -> None:
    """docs/options.md: written by `python -m tests.support.reference`."""
    assert reference.NOTES.keys() == loader.SECTIONS.keys()
    assert reference.OPTIONS_PAGE.read_text() == reference.options_page()


def test_help_lists_the_same_options() -> None:
    done = run(["--help"])
    assert done.returncode == 0
    helped = re.findall(r"^  --(\S+)(?: (\S+))?\n", done.stdout, re.M)
    page = reference.OPTIONS_PAGE.read_text().replace("\\|", "|")
    shown = re.findall(r"^\| `--([a-z-]+)(?: (\S+))?` \|", page, re.M)
    assert sorted(helped) == sorted(shown)
    words = " ".join(done.stdout.split())
    for option in loader.OPTIONS:
        assert " ".join(option.help.split()) in words
        assert not option.default or f"(default {option.default})" in words


def test_the_page_of_metrics_is_that_of_the_loader() -> None:
    """docs/metrics.md: its tables are written by `python -m tests.support.reference`."""
    page = reference.METRICS_PAGE.read_text()
    assert page == reference.metrics_page(page)
    declared = {name for name, *_ in loader.METRICS}
    histograms = {name for name, kind, *_ in loader.METRICS if kind == "histogram"}
    for name in re.findall(r"\b(?:xds_loader|process)_\w+", page):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert name in declared or base in histograms, name


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each call of the loader in a block."""
    for line in text.splitlines():
        words = shlex.split(line.rpartition("| ")[2].removeprefix("$ "))
        if words[0] == "envoy-xds-configmap-loader":
            yield words[1:]


def taken(page: str, test: str) -> None:
    found = list(commands(block_for(page, test)))
    assert len(found) >= 3
    for arguments in found:
        loader.options_from(arguments, {})


def test_the_command_lines_of_the_options_run() -> None:
    taken("docs/options.md", "test_the_command_lines_of_the_options_run")


def test_the_command_lines_of_the_readme_are_taken() -> None:
    taken("README.md", "test_the_command_lines_of_the_readme_are_taken")


def test_what_is_rejected() -> None:
    lines = block_for("docs/options.md", "test_what_is_rejected").splitlines()
    asked, said = lines[::2], lines[1::2]
    for line, expected in zip(asked, said, strict=True):
        (arguments,) = commands(line)
        done = run(arguments)
        assert (done.returncode, done.stderr) == (2, f"{expected}\n")


def test_the_times_of_the_pages_are_those_of_the_loader() -> None:
    how = (ROOT / "docs" / "how-it-works.md").read_text()
    assert f"nothing came for {loader.DEBOUNCE_QUIET * 1000:.0f} ms" in how
    assert f"({loader.DEBOUNCE_GATHER * 1000:.0f} ms at most)" in how
    watch = (ROOT / "docs" / "kubernetes-watch.md").read_text()
    assert f"pages of {loader.PAGE}" in watch
    assert f"{loader.WATCH_SILENCE:.0f} s without a byte" in watch
    first, last = (seconds // 60 for seconds in loader.WATCH_SECONDS)
    assert f"after {first} to {last} minutes (random)" in watch
    assert loader.BACKOFF_FIRST == 0.5
    assert f"from half a second doubling to {loader.BACKOFF_LAST:.0f} s" in watch


# ---------------------------------------------------------------------------------------------
# The README and the drawings


def test_the_drawing_names_what_there_is() -> None:
    test = "test_the_drawing_names_what_there_is"
    inside = block_for("docs/how-it-works.md", test)
    paths = ("/healthz", "/readyz", "/startz", "/metrics", "/snapshot")
    for name in (*paths, loader.SWITCH, loader.CURRENT, "loader.py"):
        assert name in inside
    for thread, word in (
        (loader.Reflector, "reflector"),
        (loader.Admin, "admin"),
        (loader.Listener, "listener"),
    ):
        assert thread.__doc__
        assert word in inside
    output_dir = loader.options_from(["--configmap", "x"], {}).output_dir
    for name in (output_dir, loader.CURRENT, "rds.yaml", "cds.yaml"):
        assert name in block_for("README.md", test)


def test_the_chapters_are_those_of_the_module() -> None:
    chapters = re.findall(r"^# == (.+) =+$", (ROOT / "loader.py").read_text(), re.M)
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    table = page.partition("## The chapters")[2].partition("\n## ")[0]
    shown = re.findall(r"^\| `?([^|`]+?)`? \| [^-]", table, re.M)[1:]
    assert shown == chapters


def story(text: str) -> list[str]:
    """The lines of a demo without numbers and the lengths of bars."""
    lines = [re.sub(r"[█·]+", "BAR", line) for line in text.splitlines() if line.strip()]
    return [" ".join(re.sub(r"\d+(\.\d+)?", "N", line).split()) for line in lines]


@pytest.mark.envoy
@pytest.mark.xdist_group("inotify")
def test_the_demo_shows_what_the_readme_shows() -> None:
    """README.md; `make demo` is this script with the Makefile's own Python."""
    assert "example/$(EXAMPLE)/verify" in (ROOT / "Makefile").read_text()
    asked, shown = (
        block.text
        for block in blocks_of("README.md")
        if block.target.endswith("::test_the_demo_shows_what_the_readme_shows")
    )
    assert asked == "make demo\n"
    verify = str(ROOT / "example" / "canary" / "verify")
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([verify], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    wanted, seen = story(shown), story(done.stdout)
    start = seen.index(wanted[0])
    assert seen[start : start + len(wanted)] == wanted


def test_the_values_of_the_readme_render() -> None:
    values, upgrade = (
        block.text
        for block in blocks_of("README.md")
        if block.target.endswith("::test_the_values_of_the_readme_render")
    )
    release = render(yaml.safe_load(values))
    for obj in release.objects:
        validate(obj, VERSIONS[-1])
    assert "podinfo-canary" in release.one("ConfigMap", "-xds")["data"]["rds.yaml"]
    for line in upgrade.splitlines():
        assert (ROOT / line.split()[3] / "Chart.yaml").is_file()
    path, _, weight = upgrade.split()[-1].partition("=")
    changed = yaml.safe_load(values)
    *parents, last = path.split(".")
    inner = changed
    for key in parents:
        inner = inner[key]
    assert last in inner
    inner[last] = int(weight)
    after = render(changed)
    differing = [
        new["kind"] for old, new in zip(release.objects, after.objects, strict=True) if old != new
    ]
    assert differing == ["ConfigMap"]


def test_the_manifests_of_the_readme_are_there() -> None:
    """What they do is in tests/test_chart_envoy.py::test_the_sidecar_example."""
    text = block_for("README.md", "test_the_manifests_of_the_readme_are_there")
    (path,) = re.findall(r"apply -f (\S+)", text)
    objects = list(yaml.safe_load_all((ROOT / path).read_text()))
    (namespace,) = re.findall(r"create namespace (\S+)", text)
    names = [obj["metadata"]["name"] for obj in objects if obj["kind"] == "ConfigMap"]
    assert {obj["metadata"]["namespace"] for obj in objects} == {namespace}
    assert re.findall(r"edit configmap (\S+)", text)[0] in names

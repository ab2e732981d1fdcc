"""docs/rendering.md is true: each output in it is what its input gives.

A fence says what its block is: `yaml input NAME` (objects), `json config NAME` (a configuration),
`yaml output NAME FILE [config=NAME] [endpoints=MODE]` (the whole file, or lines of it), and
`text output NAME log` (all that is named).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import loader
from tests.support.rendering import objects_of, parsed, renderer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "rendering.md"
FENCE = re.compile(r"^```\w+ (input|config|output) (\S+) ?(.*)\n((?s:.*?))^```$", re.MULTILINE)


class Block(NamedTuple):
    kind: str
    name: str
    options: list[str]
    text: str


def blocks() -> list[Block]:
    found = FENCE.findall(PAGE.read_text())
    return [Block(kind, name, options.split(), text) for kind, name, options, text in found]


def block(kind: str, name: str) -> str:
    [found] = [one.text for one in blocks() if (one.kind, one.name) == (kind, name)]
    return found


def rendering_of(output: Block) -> loader.Rendering:
    options = dict(option.split("=") for option in output.options[1:])
    config = json.loads(block("config", options["config"])) if "config" in options else {}
    objects = objects_of(*yaml.safe_load_all(block("input", output.name)))
    return renderer(config, endpoints=options.get("endpoints", "eds")).render(objects)


OUTPUTS = [one for one in blocks() if one.kind == "output"]


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda one: f"{one.name}-{one.options[0]}")
def test_an_output_is_what_its_input_gives(output: Block) -> None:
    found = rendering_of(output)
    for path, file in found.files.items():
        parsed(path, file)
    if output.options[0] == "log":
        assert output.text.splitlines() == list(found.warnings)
        return
    content = found.files[output.options[0]].content.decode()
    if output.text.startswith("#"):
        assert output.text == content
    else:
        assert f"\n{output.text}" in content
        # The page leaves some slices out.
        assert all("no EndpointSlice" in one for one in found.warnings)


def test_every_input_and_configuration_is_used() -> None:
    used = {one.name for one in OUTPUTS}
    used |= {option[7:] for one in OUTPUTS for option in one.options if "config=" in option}
    assert used == {one.name for one in blocks() if one.kind != "output"}
    assert len(OUTPUTS) >= 8


def keys(path: str, document: Any) -> set[str]:
    """The keys that are taken at a path: what the error of an unknown one says."""
    with pytest.raises(loader.UsageError) as caught:
        loader.config_from(document)
    assert str(caught.value).startswith(f"--config: $.{path}".removesuffix("."))
    [names] = re.findall(r"\(one of (.*)\)$", str(caught.value))
    return {f"{path}{name}" for name in names.split(", ")}


def test_the_reference_has_every_key_and_its_default() -> None:
    reference = PAGE.read_text().partition("### Reference")[2]
    rows = dict(re.findall(r"^\| `([a-z_.\[\]]+)` \|.*\| ?(.*?) ?\|$", reference, re.MULTILINE))
    override = {"match": {"namespace": "x"}, "suppress": True}
    expected = keys("", {"?": 1}) | keys("cluster.", {"cluster": {"?": 1}})
    expected |= keys("endpoint.", {"endpoint": {"?": 1}}) | keys("route.", {"route": {"?": 1}})
    document = {"cluster": {"overrides": [{**override, "?": 1}]}}
    expected |= {name.replace("[0]", "[]") for name in keys("cluster.overrides[0].", document)}
    document = {"cluster": {"overrides": [{**override, "match": {"?": 1}}]}}
    names = keys("cluster.overrides[0].match.", document)
    expected |= {name.replace("[0]", "[]") for name in names}
    expected |= keys("endpoint.locality.", {"endpoint": {"locality": {"?": 1}}})
    assert set(rows) == expected - {"cluster", "endpoint", "route", "endpoint.locality"}
    defaults = {"cluster_domain": loader.DEFAULTS["cluster_domain"]}
    for section in ("cluster", "endpoint", "route"):
        defaults |= {f"{section}.{key}": value for key, value in loader.DEFAULTS[section].items()}
    shown = {key: row for key, row in rows.items() if row.startswith("`")}
    assert shown == {
        key: f"`{value if isinstance(value, str) else json.dumps(value)}`"
        for key, value in defaults.items()
        if isinstance(value, str | bool)
    }


def test_the_annotations_and_protocols_are_all_there() -> None:
    page = PAGE.read_text()
    for name in loader.ROUTE_ANNOTATIONS:
        assert f"| `xds-loader/{name}` |" in page
    section = page[page.index("## HTTP/2") : page.index("## Routes")]
    rows = [row.split("|")[1:4] for row in section.splitlines() if row.startswith("| `")][1:]
    known = [set(re.findall(r"`([^`]+)`", " ".join(row[:2]))) for row in rows]
    assert set().union(*known) == loader.HTTP_PORTS | loader.TLS_PORTS
    for row, names in zip(rows, known, strict=True):
        assert ("HTTP/2" in row[2]) == bool(names & loader.HTTP2_PORTS)
        assert ("TLS" in row[2]) == bool(names & loader.TLS_PORTS)
        assert not names & loader.ONLY_NAMES or not set(re.findall("`([^`]+)`", row[0])) & (
            loader.ONLY_NAMES
        )


def test_the_bounds_of_the_page_are_the_loaders() -> None:
    page = PAGE.read_text()
    for text in (
        f"at most {loader.HOSTS_MOST};",
        f"At most {loader.PREFIXES_MOST} prefixes",
        f"0 to {loader.WEIGHT_MOST:,}",
        f"The first {loader.PORTS_MOST} ports",
    ):
        assert text in page
    of_the_rest = loader.shares([5, None, None, None])[1:]
    assert "three get {}, {} and {}".format(*of_the_rest) in page


def test_the_error_of_the_page_is_the_loaders() -> None:
    with pytest.raises(loader.UsageError) as caught:
        loader.config_from({"cluster": {"base": {"connect_timout": "1s"}}})
    assert str(caught.value) in PAGE.read_text()

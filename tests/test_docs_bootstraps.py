"""docs/bootstraps.md: each recipe of the page, started in the real Envoy and changed live.

Only what a machine without a Kubernetes cluster lacks is replaced: `/srv/runtime` by the output
directory, ports and names of Services by those of loopback.
"""

from __future__ import annotations

import http.client
import re
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.conftest import NAMESPACE, RunLoader, StartEnvoy, StartLoader
from tests.support.apiserver import ApiServer
from tests.support.backend import Backend
from tests.support.docs import Block, blocks_of
from tests.support.envoy import Envoy
from tests.support.loader import wait_until
from tests.support.ports import held_port
from tests.support.tls import Authority

PAGE = "docs/bootstraps.md"
LISTENER = 10000
HERE = "127.0.0.1"
ADMIN = "/var/run/envoy-admin"


class Recipe(NamedTuple):
    """How a recipe is changed, and how its change shows in the answer to a request."""

    change: Mapping[str, str] = {}  # texts to replace in the ConfigMap
    headers: Mapping[str, str] = {}
    source: str = "--configmap=envoy-xds"


TEXT = {'"one\\n"': '"two\\n"'}
TO_TWO = {"one": "two", "8081": "8082"}
RECIPES = {
    "rds": Recipe({"one, weight: 100": "one, weight: 0", "two, weight: 0": "two, weight: 100"}),
    "srds": Recipe(TEXT, {"x-tenant": "a"}),
    "lds": Recipe(TEXT),
    "cds": Recipe(TO_TWO),
    "eds": Recipe({"10.0.0.1": "10.0.0.2", "8081": "8082"}),
    "ecds": Recipe(TEXT),
    "disk": Recipe({"0": "100"}, source="--configmap=flags:runtime"),
    "rtds": Recipe({"canary: 0": "canary: 100"}),
    "all": Recipe(TO_TWO),
    "sds": Recipe(source="--secret=web-tls"),
}


def yaml_of(name: str) -> list[Block]:
    """The recipe's YAML blocks: the bootstrap, and the ConfigMap if it has one."""
    found = [block for block in blocks_of(PAGE) if block.arguments == (name,)]
    return [block for block in found if block.language == "yaml"]


class Machine(NamedTuple):
    """What stands in for a pod's surroundings."""

    out: str
    port: int
    one: Backend
    two: Backend
    watched: str  # the directory, empty for none
    admin: str  # of the socket

    def mapped(self, text: str) -> str:
        """A text of the page, for this machine."""
        text = text.replace(ADMIN, self.admin)
        text = re.sub(r"\b(?:(?:one|two)\.demo\.svc\.cluster\.local|10\.0\.0\.[12])\b", HERE, text)
        text = text.replace("0.0.0.0", HERE).replace(str(LISTENER), str(self.port))
        text = text.replace("8081", str(self.one.port)).replace("8082", str(self.two.port))
        if self.watched:
            text = re.sub(
                r"path_config_source: \{(path: /srv/runtime/current/[^}]*)\}",
                rf"path_config_source: {{\1, watched_directory: {{path: {self.watched}}}}}",
                text,
            )
        return text.replace("/srv/runtime", self.out)


BASES = {"srds": "rds", "eds": "cds", "sds": "cds", "ecds": "cds", "rtds": "disk"}


def bootstrap_of(name: str) -> str:
    """The recipe's bootstrap; where it shows a part, laid over the one that it refers to."""
    text = yaml_of(name)[0].text
    if name not in BASES:
        return text
    own = yaml.safe_load(text)
    whole = yaml.safe_load(yaml_of(BASES[name])[0].text)
    static = whole["static_resources"]
    if "admin" in own:  # all but the listener
        whole = {**own, "static_resources": {**static, **own.get("static_resources", {})}}
    else:
        whole.pop("dynamic_resources", None)
        chain = static["listeners"][0]["filter_chains"][0]
        place = chain if name == "sds" else chain["filters"][0]["typed_config"]
        if name == "srds":
            del place["rds"]
        place.update(own)
    # `path_config_source: {path: ...}` stays on one line
    return yaml.safe_dump(whole, default_flow_style=None, width=1000)


FORMS = {"path": "", "watched_directory": "/srv/runtime"}
INSIDE = {"current": "/srv/runtime/current"}  # also works, says the page
RUNS = [
    (name, form)
    for name in RECIPES
    for form in (FORMS if name != "disk" else ["path"])  # a layer on disk has no such field
] + [("all", "current")]


@pytest.fixture(params=FORMS)
def machine(request: pytest.FixtureRequest, out: Any) -> Iterator[Machine]:
    # a socket's path may have 107 characters
    with Backend("one") as one, Backend("two") as two, tempfile.TemporaryDirectory() as admin:
        form = {**FORMS, **INSIDE}[request.param]
        yield Machine(str(out), held_port(), one, two, form, admin)


def answer(port: int, headers: Mapping[str, str]) -> str:
    """The body of `GET /`, or "" while nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/", headers=dict(headers))
        return connection.getresponse().read().decode().strip()
    except OSError:
        return ""
    finally:
        connection.close()


def certificate(port: int) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=context)
    try:
        connection.connect()
        found = connection.sock.getpeercert(binary_form=True)
        assert found
        return found
    finally:
        connection.close()


def replaced(data: Mapping[str, str], change: Mapping[str, str]) -> dict[str, str]:
    """The ConfigMap's data after the change, which must find what it replaces."""
    pattern = re.compile("|".join(map(re.escape, change)))
    text = "".join(data.values())
    assert all(old in text for old in change)
    return {key: pattern.sub(lambda m: change[m[0]], value) for key, value in data.items()}


def asked(machine: Machine) -> list[str]:
    """The page's `--envoy-admin`."""
    line = next(b.text for b in blocks_of(PAGE) if b.text.startswith("envoy-xds-configmap-loader"))
    assert line.split()[:4] == ["envoy-xds-configmap-loader", "--watch", "--configmap", "envoy-xds"]
    return [machine.mapped(word) for word in line.split()[4:]]


@pytest.mark.parametrize("machine", ["path"], indirect=True)
def test_the_admin_interface_can_be_asked(machine: Machine, start_envoy: StartEnvoy) -> None:
    (line,) = (b.text for b in blocks_of(PAGE) if b.text.startswith("curl"))
    (bootstrap,) = (b.text for b in yaml_of("rds")[:1])
    (Path(machine.out) / "current").mkdir(parents=True)
    (Path(machine.out) / "current/rds.yaml").write_text("resources: []\n")
    start_envoy(machine.mapped(bootstrap))
    assert Path(machine.admin, "admin.sock").stat().st_mode & 0o777 == 0o600
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(machine.mapped(line).split(), capture_output=True, text=True, check=True)
    assert "BootstrapConfigDump" in done.stdout


@pytest.mark.parametrize(
    "name,machine", [run for run in RUNS if run[0] != "sds"], indirect=["machine"]
)
def test_a_recipe_works(
    name: str,
    machine: Machine,
    api: ApiServer,
    run_loader: RunLoader,
    start_loader: StartLoader,
    start_envoy: StartEnvoy,
) -> None:
    recipe = RECIPES[name]
    configmap = yaml_of(name)[1].text
    document = yaml.safe_load(configmap)
    named, data = document["metadata"]["name"], document["data"]
    assert document["metadata"]["namespace"] == NAMESPACE

    def put(data: Mapping[str, str]) -> None:
        api.configmap(NAMESPACE, named, {key: machine.mapped(text) for key, text in data.items()})

    put(data)
    assert run_loader("--onetime", recipe.source).returncode == 0
    envoy: Envoy = start_envoy(machine.mapped(bootstrap_of(name)))
    loader = start_loader("--watch", recipe.source, *asked(machine))
    api.wait_watches(1)
    wait_until(lambda: answer(machine.port, recipe.headers) == "one", message="one")
    put(replaced(data, recipe.change))
    wait_until(lambda: answer(machine.port, recipe.headers) == "two", message="two")
    if name != "disk":  # no xDS
        loader.wait_log("ack=yes")
    assert not [key for key, value in envoy.stats("update_(rejected|failure)$").items() if value]
    assert not re.search(r"\[(error|critical)\]", envoy.log())


def test_the_recipe_of_sds_works(
    machine: Machine,
    api: ApiServer,
    authority: Authority,
    run_loader: RunLoader,
    start_loader: StartLoader,
    start_envoy: StartEnvoy,
) -> None:
    source = RECIPES["sds"].source

    def put(pair: Any) -> None:
        pem = {"tls.crt": pair.cert.read_bytes(), "tls.key": pair.key.read_bytes()}
        api.secret(NAMESPACE, "web-tls", pem, type="kubernetes.io/tls")

    def der(pair: Any) -> bytes:
        first = pair.cert.read_text().partition("-----END CERTIFICATE-----")
        return ssl.PEM_cert_to_DER_cert(first[0][first[0].index("-----BEGIN") :] + first[1])

    one, two = authority.pair("one.example"), authority.pair("two.example")
    put(one)
    assert run_loader("--onetime", source).returncode == 0
    start_envoy(machine.mapped(bootstrap_of("sds")))
    start_loader("--watch", source, *asked(machine))
    api.wait_watches(1)
    assert certificate(machine.port) == der(one)
    put(two)
    wait_until(lambda: certificate(machine.port) == der(two))


def test_both_forms_are_shown() -> None:
    """The two forms of the page are what the recipes are run with."""
    plain, watched = (
        yaml.safe_load(block.text)
        for block in blocks_of(PAGE)
        if block.target.endswith("::test_both_forms_are_shown")
    )
    path = "/srv/runtime/current/rds.yaml"
    assert plain == {"path_config_source": {"path": path}}
    assert watched == {
        "path_config_source": {"path": path, "watched_directory": {"path": "/srv/runtime"}}
    }


def test_every_recipe_of_the_page_is_run() -> None:
    named = {block.arguments[0] for block in blocks_of(PAGE) if block.arguments}
    assert named == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_source_of_files_needs_a_node(name: str) -> None:
    """The test's Envoy would add one that is forgotten."""
    bootstrap = bootstrap_of(name)
    assert ("node" in yaml.safe_load(bootstrap)) == ("path_config_source" in bootstrap)

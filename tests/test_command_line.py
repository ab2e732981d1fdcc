"""The command line is a public contract: names, durations, environment, failures."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

import loader
from tests.conftest import TOKEN, RunLoader, StartLoader
from tests.support.apiserver import ApiServer
from tests.support.loader import COMMAND, ROOT, run, snapshot, wait_files

OPTIONS = (
    "configmap configmap-selector services services-namespace secret namespace apiserver "
    "token-file ca-file client-cert client-key insecure from-file config endpoints format "
    "output-dir onetime dry-run watch sync-interval diff secret-mode timeout envoy-admin "
    "step-delay check-cmd listen log-format log-level trafficsplit-api-version version help"
).split()


@pytest.fixture(autouse=True)
def objects(api: ApiServer) -> None:
    api.configmap("demo", "x", {"rds.yaml": "x: 1\n"})
    api.configmap("demo", "y", {"cds.yaml": "y: 1\n"})
    api.configmap("default", "x", {"rds.yaml": "default: 1\n"})


# -- what it is


def test_nothing_but_the_standard_library_is_imported() -> None:
    """Every run of these tests is `python -I -S`, too."""
    tree = ast.parse((ROOT / "loader.py").read_text())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add((node.module or "").partition(".")[0])
    assert roots <= sys.stdlib_module_names


@pytest.mark.parametrize("option", ["-h", "--help", "-help"])
def test_help_names_every_option_in_sections_with_examples(option: str) -> None:
    done = run([option])
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    named = [line.split()[0] for line in lines if line.startswith("  --")]
    assert set(named) >= {f"--{name}" for name in OPTIONS}
    assert len(named) == len(set(named))
    sections = [line for line in lines if re.fullmatch(r"[A-Z].*:", line)]
    assert len(sections) > 5
    examples = [line for line in lines if line.startswith("    envoy-xds-configmap-loader -")]
    assert len(examples) == 3
    for example in examples:
        loader.options_from(shlex.split(example)[1:], {})
    assert "docs/options.md" in done.stdout


@pytest.mark.parametrize("option", ["--version", "-version"])
def test_version(option: str) -> None:
    done = run([option])
    assert done.returncode == 0
    assert loader.__version__ in done.stdout.split()


@pytest.mark.parametrize("option", ["--version", "-help"])
def test_help_and_version_are_switches_as_in_go(option: str) -> None:
    """An init container that printed its version instead of files would count as a success."""
    done = run([f"{option}=false", "--from-file", "/nope"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "nothing to load" in done.stderr
    done = run([f"{option}=maybe"])
    assert done.returncode == 2
    assert "is not true or false" in done.stderr


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_help_and_version_win_over_bad_values(option: str) -> None:
    env = {"XDS_LOADER_TIMEOUT": "30", "XDS_LOADER_VERSION": "false"}
    for words in ([option], ["--timeout", "30", option], [option, "--secret-mode=999"]):
        done = run(words, env)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("envoy-xds-configmap-loader ")


@pytest.mark.parametrize("words", ["--help", "--version", "--dry-run --from-file objects.json"])
def test_who_reads_no_further_is_no_error(words: str, tmp_path: Path) -> None:
    """`| head` closes the pipe."""
    items = [{"kind": "ConfigMap", "metadata": {"namespace": "demo", "name": "x"},
              "data": {"rds.yaml": "x" * 100_000}}]  # fmt: skip
    (tmp_path / "objects.json").write_text(json.dumps({"kind": "List", "items": items}))
    reading, writing = os.pipe()
    os.close(reading)
    command = [*COMMAND, *words.split(), "--namespace", "demo", "--configmap", "x"]
    try:
        done = subprocess.run(
            command, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, timeout=20, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


# -- one dash, two dashes, `=`, Go's switches


@pytest.mark.parametrize("line", [
    "--configmap x --onetime",
    "-configmap=x -onetime",
    "--configmap=x --onetime -sync-interval=1m30.5s",
    "-configmap demo/x -onetime=true",
    "-configmap x -onetime=1 -watch=false",
    "-onetime -watch -insecure=false -dry-run=false -configmap x",
])  # fmt: skip
def test_spellings(run_loader: RunLoader, out: Path, line: str) -> None:
    done = run_loader(*line.split())
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"rds.yaml": b"x: 1\n"}


def test_a_repeated_option_repeats(run_loader: RunLoader, out: Path) -> None:
    assert run_loader("-onetime", "-configmap", "x", "-configmap", "y").returncode == 0
    assert snapshot(out) == {"rds.yaml": b"x: 1\n", "cds.yaml": b"y: 1\n"}


def test_the_predecessors_command_line_runs_unchanged(
    api: ApiServer, tmp_path: Path, out: Path
) -> None:
    (tmp_path / "mytoken").write_text(TOKEN)
    line = (
        "-onetime -dry-run -insecure -namespace default -token-file ./mytoken -configmap x "
        f"-apiserver {api.url} -sync-interval 1m0s -watch"
    )
    done = run(line.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rds.yaml" in done.stdout
    assert "default: 1" in done.stdout
    line = (
        "--namespace default --token-file ./mytoken --configmap x --onetime --insecure "
        f"--apiserver {api.url} --output-dir {out}"
    )
    done = run(line.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"rds.yaml": b"default: 1\n"}


def test_the_charts_option_is_taken_with_a_warning(run_loader: RunLoader, out: Path) -> None:
    done = run_loader("--onetime", "--configmap", "x", "-trafficsplit-api-version", "v1alpha2")
    assert done.returncode == 0, done.stderr
    assert "trafficsplit-api-version" in done.stderr
    assert snapshot(out) == {"rds.yaml": b"x: 1\n"}


@pytest.mark.parametrize("args", [["-smi"], ["-trafficsplit", "podinfo"], ["--smi=true"]])
def test_smi_points_to_weights_by_annotation(
    run_loader: RunLoader, api: ApiServer, args: list[str]
) -> None:
    done = run_loader("--onetime", "--configmap", "x", *args)
    assert done.returncode == 2
    assert "annotation" in done.stderr
    assert "weight" in done.stderr
    assert api.connections_total == 0


# -- bad input

BAD = {  # values are below
    "an unknown option": ["--configmap", "x", "--nope"],
    "an unknown option with one dash": ["-configmap", "x", "-nope"],
    "an abbreviation": ["--configmap", "x", "--onet"],
    "a stray word": ["--configmap", "x", "stray"],
    "no value": ["--onetime", "--configmap"],
    "no source": ["--onetime"],
    "a duration without unit": ["--configmap", "x", "--sync-interval", "30"],
    "an interval of nothing": ["--configmap", "x", "-sync-interval=0s"],
    "no switch": ["--configmap", "x", "--watch=maybe"],
    "a diff of what is written": ["--configmap", "x", "--onetime", "--diff"],
    "a certificate without key": ["--configmap", "x", "--client-cert", "c.pem"],
    "stdin again and again": ["--configmap", "x", "--from-file", "-"],
}


@pytest.mark.parametrize("args", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_no_request(
    run_loader: RunLoader, api: ApiServer, out: Path, args: list[str]
) -> None:
    done = run_loader(*args, timeout=10)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert api.connections_total == 0
    assert not out.exists()


@pytest.mark.parametrize(
    "env",
    [
        {"XDS_LOADER_SYNC_INTERVAL": "30"},
        {"XDS_LOADER_WATCH": "maybe"},
        {"XDS_LOADER_APISERVER": "nonsense"},
    ],
    ids=str,
)
def test_bad_environment_is_named(api: ApiServer, token_file: Path, env: dict[str, str]) -> None:
    args = ["--configmap", "x", "--token-file", str(token_file)]
    done = run(args, env, timeout=10)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    name = next(iter(env))
    option = name.removeprefix("XDS_LOADER_").lower().replace("_", "-")
    assert name in done.stderr or option in done.stderr


# -- the environment


def test_every_option_from_the_environment(api: ApiServer, token_file: Path, out: Path) -> None:
    env = {
        "XDS_LOADER_APISERVER": api.url,
        "XDS_LOADER_TOKEN_FILE": str(token_file),
        "XDS_LOADER_OUTPUT_DIR": str(out),
        "XDS_LOADER_CONFIGMAP": "x  demo/y:sub",
        "XDS_LOADER_NAMESPACE": "demo",
        "XDS_LOADER_ONETIME": "true",
        "XDS_LOADER_WATCH": "false",
        "XDS_LOADER_SYNC_INTERVAL": "",
        "XDS_LOADER_LOG_FORMAT": "json",
    }
    done = run([], env)
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"rds.yaml": b"x: 1\n", "sub/cds.yaml": b"y: 1\n"}
    for line in done.stderr.splitlines():
        assert isinstance(json.loads(line), dict)


def test_the_command_line_wins(run_loader: RunLoader, out: Path) -> None:
    env = {"XDS_LOADER_CONFIGMAP": "y", "XDS_LOADER_LOG_LEVEL": "loud"}
    done = run_loader("--onetime", "--configmap", "x", "--log-level", "info", env=env)
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"rds.yaml": b"x: 1\n"}


@pytest.mark.parametrize(
    "env, namespace",
    [
        ({"NS": "demo", "POD_NAMESPACE": "other"}, "demo"),
        ({"POD_NAMESPACE": "demo"}, "demo"),
        ({"NS": "", "POD_NAMESPACE": "demo"}, "demo"),
        ({"XDS_LOADER_NAMESPACE": "demo", "NS": "other"}, "demo"),
        ({}, "default"),
    ],
    ids=str,
)
def test_where_the_namespace_comes_from(
    api: ApiServer, token_file: Path, out: Path, env: dict[str, str], namespace: str
) -> None:
    args = ["--onetime", "--configmap", "x", "--apiserver", api.url]
    done = run([*args, "--token-file", str(token_file), "--output-dir", str(out)], env)
    assert done.returncode == 0, done.stderr
    assert f"/namespaces/{namespace}/configmaps" in api.requests[0].path


@pytest.mark.parametrize("content", [b"", b"not one\n", b"\xff", b"x" * 5000])
def test_a_namespace_file_that_cannot_be_used_means_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(loader, "SERVICE_ACCOUNT", str(tmp_path))
    (tmp_path / "namespace").write_bytes(b"demo\n")
    assert loader.options_from([*BASE], {}).namespace == "demo"
    assert loader.options_from([*BASE], {"POD_NAMESPACE": "shop"}).namespace == "shop"
    (tmp_path / "namespace").write_bytes(content)
    assert loader.options_from([*BASE], {}).namespace == "default"


@pytest.mark.parametrize("words", [["--from-file", "x.json"], ["--apiserver", "https://a:6443"]])
def test_an_api_server_of_the_pod_that_is_not_asked_is_no_error(words: list[str]) -> None:
    env = {"KUBERNETES_SERVICE_HOST": "not a host", "KUBERNETES_SERVICE_PORT": "0"}
    loader.options_from([*BASE, *words], env)
    with pytest.raises(loader.UsageError, match="KUBERNETES_SERVICE_HOST"):
        loader.options_from([*BASE], env)


def test_the_api_server_of_the_pod(
    api_tls: ApiServer, run_loader: RunLoader, out: Path, authority: object
) -> None:
    api_tls.configmap("demo", "x", {"rds.yaml": "tls: 1\n"})
    env = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api_tls.port)}
    ca_file = str(getattr(authority, "ca_file"))  # noqa: B009
    done = run_loader("--onetime", "--configmap", "x", "--ca-file", ca_file, server=None, env=env)
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"rds.yaml": b"tls: 1\n"}


# -- modes


def test_dry_run_ends_by_itself_and_touches_nothing(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    done = run_loader("--dry-run", "--watch", "--configmap", "x", "--configmap", "y:sub")
    assert done.returncode == 0, done.stderr
    for text in ("rds.yaml", "x: 1\n", "sub/cds.yaml", "y: 1\n"):
        assert text in done.stdout
    assert not out.exists()
    assert not api.requests.matching(lambda request: request.is_watch)


def test_switches_off_leave_a_polling_sidecar(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    loader = start_loader("-watch=false", "-onetime=false", "-sync-interval=100ms", "-configmap=x")
    wait_files(out, {"rds.yaml": "x: 1\n"})
    api.configmap("demo", "x", {"rds.yaml": "x: 2\n"})
    wait_files(out, {"rds.yaml": "x: 2\n"})
    assert not api.requests.matching(lambda request: request.is_watch)
    assert len({request.connection for request in api.requests}) == 1
    loader.stop()


def test_quiet_logs(run_loader: RunLoader) -> None:
    done = run_loader("--onetime", "--configmap", "x", "--log-level", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- values


PASSED = {
    "--envoy-admin": ["http://127.0.0.1:9901", "http://[::1]:9901", "unix:/run/envoy/admin.sock"],
    "--apiserver": ["https://10.0.0.1:6443", "http://127.0.0.1:8001/", "https://[fd00::1]:443",
                    "https://kubernetes.default.svc."],
    "--secret-mode": ["0600", "640", "0o640", "400"],
    "--services": ["*", "", "app=web,tier in (a, b),!legacy"],
    "--services-namespace": ["*", "shop"],
    "--configmap-selector": ["*", "", "app=web"],
    "--check-cmd": ["check.sh '{dir}'"],
    "--step-delay": ["0", "0s", "+1.5s", "1h1m1s1ms1us1ns", ".5s", "1.s"],
}  # fmt: skip
REJECTED = {
    "--envoy-admin": ["https://127.0.0.1:9901", "unix:admin.sock", "unix:", "unix:/" + "x" * 107,
                      "unix:/a\nb", "9901", "http://h:0", "http://h?x", "http://h#x", "http://a..b",
                      "http://" + "x" * 64, "http://h h"],
    "--secret-mode": ["0300", "0000", "1777", "666666", "rw", "0x1ff", "7"],
    "--services-namespace": ["shop.x", "-", "x" * 64],
    "--secret": ["a/b/c", "x:dir", "x" * 254, "a..b", ".a", "a\n"],
    "--configmap": ["", "a/b/c", "demo/", "Not_A_Name", "x:", "x:a//b", "x:a\nb", "x:..data",
                    "x:../up", "x:a/../../b", "x:/etc"],
    "--namespace": ["Not A Namespace"],
    "--apiserver": ["ftp://127.0.0.1", "nonsense"],
    "--log-level": ["loud"],
    "--log-format": ["xml"],
    "--sync-interval": ["soon", ""],
    "--step-delay": ["1", "s", "1.2.3s", "1e3s", "-1s", "9" * 400 + "h", "1m 0s", "1d"],
    "--endpoints": ["EDS", ""],
    "--check-cmd": ["", " ", "'envoy"],
    "--listen": ["9902", ":99999", "", "::1:9000", ":", ":x", ":65536", ":-1", "[::1]", "a b:9",
                 "[]:9", ":9\n", ":٣"],
}  # fmt: skip
BASE = ["--configmap", "base", "--services", "a=b"]


@pytest.mark.parametrize("option, value", [(o, v) for o, vs in PASSED.items() for v in vs])
def test_values_that_are_accepted(option: str, value: str) -> None:
    loader.options_from([*BASE, option, value], {})


@pytest.mark.parametrize("option, value", [(o, v) for o, vs in REJECTED.items() for v in vs])
def test_values_that_are_rejected(option: str, value: str) -> None:
    with pytest.raises(loader.UsageError) as caught:
        loader.options_from([*BASE, option, value], {})
    assert str(caught.value).startswith(f"{option} ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 350


def test_what_the_options_become() -> None:
    def options(*words: str, **variables: str) -> loader.Options:
        return loader.options_from([*BASE, *words], variables)

    assert options().step_delay is None
    assert options("--step-delay", "0s").step_delay == 0.0
    assert options("--step-delay", "1m0.5s").step_delay == 60.5
    assert options().mode == "poll"
    assert options("--watch").mode == "watch"
    assert options("--watch", "--onetime").mode == "once"
    assert options("--watch", "--dry-run").mode == "once"
    assert options("--watch", "--from-file", "x.json").mode == "poll"
    assert options("--services", "*").services == ""
    assert options("--configmap-selector", "*").configmap_selector == ""
    assert (options().namespace, options().apiserver) == ("default", "https://kubernetes")
    found = options("--secret", "x", "--secret", "shop/x", "--secret=x", NS="demo").secret
    assert [query.namespace for query, _ in found] == ["demo", "shop"]
    assert options(NODE_NAME="node-1").node_name == "node-1"
    assert options("--from-file", "x", "--client-cert", "c").from_file == "x"
    assert options(KUBERNETES_SERVICE_HOST="fd00::1").apiserver == "https://[fd00::1]:443"


def test_a_password_in_a_url_is_not_shown() -> None:
    with pytest.raises(loader.UsageError) as caught:
        loader.options_from([*BASE, "--apiserver", "https://me:geheim@10.0.0.1/"], {})
    assert "geheim" not in str(caught.value)
    assert "is not a valid URL" in str(caught.value)


def test_an_unknown_variable_is_one_warning(run_loader: RunLoader) -> None:
    """But those that Kubernetes makes of a Service named xds-loader."""
    env = {
        "XDS_LOADER_SYNC_INTERVALL": "30s",
        "XDS_LOADER_FOO": "x",
        "XDS_LOADER_VERSION": "1.2",
        "XDS_LOADER_SERVICE_HOST": "10.0.0.1",
        "XDS_LOADER_SERVICE_PORT_HTTP": "80",
        "XDS_LOADER_PORT": "tcp://10.0.0.1:80",
        "XDS_LOADER_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    done = run_loader("--onetime", "--configmap", "x", env=env)
    assert done.returncode == 0
    (line,) = [line for line in done.stderr.splitlines() if " WARNING " in line]
    assert line.endswith("variable XDS_LOADER_FOO, XDS_LOADER_SYNC_INTERVALL")


def test_a_config_that_is_nested_too_deeply(tmp_path: Path, run_loader: RunLoader) -> None:
    for text in ("[" * 200_000, '{"a":' * 200_000, "", "nonsense", '"text"'):
        (tmp_path / "config.json").write_text(text)
        words = ("--onetime", "--services", "*", "--config", str(tmp_path / "config.json"))
        done = run_loader(*words)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "config" in done.stderr


PARTS = [("", "1", ""), ("", "1m", "!"), ("", "a", "!"), ("", "a-", ""), ("", "a.", ""),
         ("", ":", ""), ("[", "0", ""), ("", "//", ""), ("http://", "a.", ":x"),
         ("http://", "x@", ""), ("", "0", ""), ("", "-", ""), ("", " ", ""), ("", "'", "'"),
         ("", "a=b,", "!"), ("", "a in (", ""), ("a in (", "b,", ""), ("a in (", "b", ""),
         ("a", " ", "="), ("", "(", ""), ("", "_", "")]  # fmt: skip
WORST = [head + part * (200_000 // len(part)) + tail for head, part, tail in PARTS]


def test_every_value_is_parsed_in_linear_time() -> None:
    """200 KB of the worst: what is quadratic takes minutes."""
    for option in loader.OPTIONS:
        for text in WORST:
            began = time.process_time()
            with contextlib.suppress(loader.UsageError):
                loader.options_from([f"--{option.name}={text}"], {f"XDS_LOADER_{text}": "x"})
            assert time.process_time() - began < 0.5, (option.name, text[:20])


def test_it_tried_and_could_not(run_loader: RunLoader, api: ApiServer) -> None:
    """Exit 1: the line says what, where and what to do."""
    api.close()
    done = run_loader("--onetime", "--configmap", "x", timeout=10)
    assert done.returncode == 1
    assert str(api.port) in done.stderr
    assert "Traceback" not in done.stderr
    assert "kubectl proxy" not in done.stderr


def test_outside_a_pod_the_way_in_is_named(run_loader: RunLoader) -> None:
    done = run_loader("--dry-run", "--configmap", "x", server=None, timeout=20)
    assert done.returncode == 1
    assert done.stderr.endswith("outside a pod: `kubectl proxy` and --apiserver "
                                "http://127.0.0.1:8001\n")
    assert "at kubernetes: " in done.stderr

"""Fixtures: an API server, an output directory, loaders and Envoys that are stopped at the end."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.apiserver import ApiServer
from tests.support.busy import REASON
from tests.support.envoy import OLDEST, Config, Envoy, envoy_path, oldest_envoy
from tests.support.loader import Loader, run
from tests.support.ports import released
from tests.support.tls import Authority

NAMESPACE = "demo"
TOKEN = "token-1"
NO_OLDEST = f"Envoy {OLDEST} is not installed"

StartLoader = Callable[..., Loader]
RunLoader = Callable[..., subprocess.CompletedProcess[str]]
StartEnvoy = Callable[..., Envoy]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whatever starts an Envoy is marked so. On another Python only loaders are started."""

    others = []
    for item in items:
        assert isinstance(item, pytest.Function)
        if "start_envoy" in item.fixturenames:
            item.add_marker(pytest.mark.envoy)
        if os.environ.get("LOADER_PYTHON") and {"start_loader", "run_loader", "run"}.isdisjoint(
            [*item.fixturenames, *item.function.__code__.co_names]
        ):
            others.append(item)
    if others:
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud how much was not tested, and why: a skip is easily overlooked."""
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    for reason, advice in (
        (REASON, "run them on a quiet machine"),
        (NO_OLDEST, "`make oldest-envoy` gets it"),
    ):
        if count := sum(reason in one for one in skipped):
            terminalreporter.write_line(f"{count} skipped because {reason}: {advice}", yellow=True)


@pytest.fixture(params=["", OLDEST], ids=["envoy", f"envoy-{OLDEST}"])
def envoy_binary(request: pytest.FixtureRequest) -> str:
    """Envoy as everywhere, and the oldest that is tested."""
    if request.param != OLDEST:
        return envoy_path()
    return oldest_envoy() or pytest.skip(NO_OLDEST)


@pytest.fixture(autouse=True)
def _ports() -> Iterator[None]:
    """The ports that a test holds are given back when it ends."""
    with released():
        yield


@pytest.fixture
def api() -> Iterator[ApiServer]:
    """Plain HTTP; it takes the token of `token_file` and no other."""
    with ApiServer(tokens=[TOKEN]) as server:
        yield server


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def api_tls(authority: Authority) -> Iterator[ApiServer]:
    """The same over TLS, with a certificate of `authority`."""
    with ApiServer(tokens=[TOKEN], tls=authority.server_context()) as server:
        yield server


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The output directory, which does not exist yet."""
    return tmp_path / "runtime"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture
def common(out: Path, token_file: Path) -> list[str]:
    """The options that every run of a test shares, but for the API server."""
    return ["--namespace", NAMESPACE, "--token-file", str(token_file), "--output-dir", str(out)]


def _arguments(
    common: list[str], args: tuple[str, ...], server: ApiServer | None, authority: Authority
) -> list[str]:
    if server is None:
        return [*common, *args]
    trust = ["--ca-file", str(authority.ca_file)] if server.tls else []
    return [*common, "--apiserver", server.url, *trust, *args]


@pytest.fixture
def start_loader(api: ApiServer, common: list[str], authority: Authority) -> Iterator[StartLoader]:
    """`start_loader("--watch", "--configmap", "x")`: running, ended when the test ends.

    `server=` another API server (None: no --apiserver at all); `env=` environment variables;
    `prefix=` words before the command.
    """
    with contextlib.ExitStack() as stack:

        def start(
            *args: str,
            server: ApiServer | None = api,
            env: Mapping[str, str] | None = None,
            cwd: Path | None = None,
            prefix: Sequence[str] = (),
        ) -> Loader:
            arguments = _arguments(common, args, server, authority)
            loader = Loader(arguments, env, cwd=cwd, prefix=prefix)
            stack.callback(loader.kill)
            return stack.enter_context(loader)

        yield start


@pytest.fixture
def run_loader(api: ApiServer, common: list[str], authority: Authority) -> RunLoader:
    """`run_loader("--onetime", "--configmap", "x")`: the completed process."""

    def once(
        *args: str,
        server: ApiServer | None = api,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        cwd: Path | None = None,
        timeout: float = 30.0,
        prefix: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        arguments = _arguments(common, args, server, authority)
        return run(arguments, env, stdin=stdin, cwd=cwd, timeout=timeout, prefix=prefix)

    return once


@pytest.fixture
def start_envoy(tmp_path: Path) -> Iterator[StartEnvoy]:
    """`start_envoy(bootstrap(...))`: live, stopped when the test ends."""
    with contextlib.ExitStack() as stack:
        count = 0

        def start(config: Config | str, **options: object) -> Envoy:
            nonlocal count
            count += 1
            envoy = Envoy(config, tmp_path / f"envoy{count}", **options)  # type: ignore[arg-type]
            return stack.enter_context(envoy)

        yield start

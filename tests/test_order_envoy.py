"""Make before break, by the real Envoy under load: no request is lost, whatever changes.

Random changes that add, remove, replace and re-route clusters at once. An Envoy reads what shares
a `watched_directory` in an order of its own that differs from process to process, hence so many of
them: four that are asked with 26 changes each, and six that are not with a third of that, of each
kind; 200 in the long run (`make soak`).

The last tests switch the order off and see requests fail: else the others would prove nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import StartEnvoy, StartLoader
from tests.support.apiserver import ApiServer, Client
from tests.support.disk import wait_converged
from tests.support.envoy import OLDEST
from tests.support.load import have_wrk
from tests.support.loader import COMMAND, ROOT, Loader
from tests.support.long import LONG, times
from tests.support.scenes import (
    FAULTS,
    KINDS,
    Services,
    Trial,
    assert_none_failed,
    assert_served,
    loaded,
)
from tests.support.steady import Upstreams

CHANGES = times(26, long=200)
FAULTS_EACH = times(2, long=30)
# Envoy and how it subscribes: in the suite the oldest Envoy shares a `watched_directory`.
WAYS = [
    pytest.param(version, watched, id=f"{version or 'envoy'}-{('path', 'watched')[watched]}")
    for version in ("", OLDEST)
    for watched in (False, True)
    if LONG or watched == (version == OLDEST)
]
# Longer than the default: on a busy machine Envoy's main thread may take 400 ms for a CDS that
# takes EDS clusters away (the kernel waits when it closes an inotify instance).
STEP_DELAY = 0.3
ANSWER_BOUND = 30.0  # how long an Envoy that is asked may be silent

pytestmark = [
    pytest.mark.xdist_group("inotify"),
    pytest.mark.timeout(600 + 15 * CHANGES if LONG else 240),
    pytest.mark.skipif(not have_wrk(), reason="wrk is not installed"),
]


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstreams]:
    with Upstreams(tmp_path_factory.mktemp("upstreams"), 6) as found:
        yield found


@pytest.fixture
def client(api: ApiServer) -> Iterator[Client]:
    with contextlib.closing(Client(api.url, "token-1")) as found:
        yield found


# ---------------------------------------------------------------------------------------------
# Without --envoy-admin there is a pause between the steps; six Envoys can read one directory


@pytest.mark.parametrize("kind", KINDS)
def test_no_request_is_lost_without_asking_envoy(
    kind: str,
    api: ApiServer,
    client: Client,
    out: Path,
    tmp_path: Path,
    upstreams: Upstreams,
    start_loader: StartLoader,
    start_envoy: StartEnvoy,
) -> None:
    scene = KINDS[kind](1, api, client, out, upstreams.ports)
    scene.begin()
    loader = start_loader(*scene.arguments(tmp_path), "--step-delay", f"{STEP_DELAY}s")
    scene.settle()
    fronts = [scene.front(watched=i % 2 == 0) for i in range(6)]
    envoys = [start_envoy(each.config) for each in fronts]
    total = loaded(scene, fronts, CHANGES // 3, stall=STEP_DELAY * 0.8)
    assert_none_failed(total, scene, loader)
    for envoy in envoys:
        assert_served(envoy, scene)
    wait_converged(out)


# ---------------------------------------------------------------------------------------------
# With --envoy-admin each Envoy has a loader beside it, and clusters that warm are awaited


@pytest.mark.parametrize("watched", [False, True], ids=["path", "watched_directory"])
@pytest.mark.parametrize("kind", ["json", "services"])
def test_no_request_is_lost_when_envoy_is_asked(
    kind: str,
    watched: bool,
    api: ApiServer,
    client: Client,
    out: Path,
    tmp_path: Path,
    upstreams: Upstreams,
    start_loader: StartLoader,
    start_envoy: StartEnvoy,
) -> None:
    for seed in range(times(1, long=2)):
        scene = KINDS[kind](seed, api, client, out / str(seed), upstreams.ports)
        scene.checked = True
        scene.begin()
        one = scene.front(watched=watched)
        loader = start_loader(*scene.arguments(tmp_path), "--envoy-admin", one.admin_url)
        scene.settle()
        envoy = start_envoy(one.config)
        loader.wait_log(r" answers")
        total = loaded(scene, [one], CHANGES, stall=ANSWER_BOUND * 0.8)
        assert_none_failed(total, scene, loader)
        assert_served(envoy, scene)
        wait_converged(scene.out)
        assert not loader.count_log("NACKed"), loader.log
        loader.stop()
        envoy.stop()
        if isinstance(scene, Services):
            scene.shop.close()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("envoy_binary", "watched"), WAYS, indirect=["envoy_binary"])
def test_nothing_is_lost_nor_stuck_whatever_befalls(
    fault: str,
    watched: bool,
    api: ApiServer,
    client: Client,
    out: Path,
    tmp_path: Path,
    token_file: Path,
    upstreams: Upstreams,
    envoy_binary: str,
) -> None:
    """Within a step, on the oldest Envoy as well. What a killed Envoy was serving fails with it."""
    scene = KINDS["json"](3, api, client, out, upstreams.ports)
    scene.checked = True
    scene.begin()
    relayed = "silent" in fault
    with Trial(
        scene, tmp_path, token_file, watched=watched, binary=envoy_binary, relayed=relayed
    ) as trial:
        trial.begin()
        total = trial.run(FAULTS[fault], FAULTS_EACH)
        failed = total.bad if "killed Envoy" in fault else total.failed
        assert failed == 0, f"{total}, seed {scene.seed}"
        assert_served(trial.envoy, scene)
        wait_converged(scene.out)


# ---------------------------------------------------------------------------------------------
# The test of the tests


@pytest.mark.parametrize("kind", ["json", "services"])
def test_without_order_requests_are_lost(
    kind: str,
    api: ApiServer,
    client: Client,
    out: Path,
    tmp_path: Path,
    token_file: Path,
    upstreams: Upstreams,
    start_envoy: StartEnvoy,
) -> None:
    scene = KINDS[kind](1, api, client, out, upstreams.ports)
    scene.begin()
    unordered = str(ROOT / "tests/support/unordered.py")
    common = ("--namespace", "demo", "--token-file", str(token_file), "--apiserver", api.url)
    prefix = [*COMMAND[:-1], unordered]
    with Loader([*common, *scene.arguments(tmp_path)], prefix=prefix):
        scene.settle()
        fronts = [scene.front(watched=i % 2 == 0) for i in range(6)]
        for each in fronts:
            start_envoy(each.config)
        total = loaded(scene, fronts, max(CHANGES // 2, 10))
    assert total.failed > 0

"""What ConfigMaps and files of objects become on disk: precedence, bad input, gaps, repair."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import RunLoader, StartLoader
from tests.support import apiserver as k8s
from tests.support.apiserver import ApiServer, Object
from tests.support.busy import in_time
from tests.support.disk import inspect, modes, wait_converged
from tests.support.loader import snapshot, wait_files, wait_until
from tests.support.tls import Authority

INTERVAL = ("--sync-interval", "100ms")


def configmap(name: str, data: Object | None, namespace: str = "demo", **more: object) -> Object:
    """An object as `kubectl get -o json` prints it."""
    obj: Object = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace, "resourceVersion": "1"},
        **more,
    }
    if data is not None:
        obj["data"] = data
    return obj


def save(path: Path, *objects: Object) -> None:
    """As an editor does, by rename."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))
    new.rename(path)


# -- the first snapshot


def test_nothing_is_published_before_every_named_object_exists(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    done = run_loader("--onetime", "--configmap", "a", "--configmap", "b")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "demo/b" in done.stderr
    assert not (out / "..data").exists()


def test_onetime_waits_for_its_sources(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    names = ("--configmap", "a", "--configmap", "b")
    loader = start_loader("--onetime", "--timeout", "20s", *names)
    loader.wait_log("demo/b")
    assert not (out / "..data").exists()
    api.configmap("demo", "b", {"b": "1"})
    assert loader.wait(10) == 0
    wait_files(out, {"a": "1", "b": "1"})


def test_onetime_gives_up_at_its_timeout(run_loader: RunLoader) -> None:
    start = time.monotonic()
    done = run_loader("--onetime", "--configmap", "b", "--timeout", "1s")
    assert done.returncode == 1
    took = time.monotonic() - start
    assert took > 0.9
    in_time(took, 3)
    assert "demo/b" in done.stderr


@pytest.mark.parametrize("waits", ["for a source", "for a step"])
def test_a_signal_ends_onetime_before_it_is_done(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path, waits: str
) -> None:
    """It did not publish all, so it is no success."""
    api.configmap("demo", "a", {"cds.json": "{}", "rds.json": "{}"})
    if waits == "for a step":
        assert run_loader("--onetime", "--configmap", "a").returncode == 0
        api.configmap("demo", "a", {"cds.json": '{"a": 1}', "rds.json": '{"a": 1}'})
        loader = start_loader("--onetime", "--configmap", "a", "--step-delay", "1h")
        loader.wait_log("published .*step=clusters")
        wait_files(out, {"cds.json": '{"a": 1}', "rds.json": "{}"})
    else:
        loader = start_loader("--onetime", "--timeout", "1h", "--configmap", "absent")
        loader.wait_log("waiting for configmap demo/absent")
    loader.process.send_signal(signal.SIGTERM)
    assert loader.wait(1) == 1
    assert "ERROR ended by a signal before everything was published" in loader.log


@pytest.mark.parametrize("mode", [["--watch"], []], ids=["watch", "poll"])
def test_a_sidecar_says_so_once_and_waits(
    start_loader: StartLoader, api: ApiServer, out: Path, mode: list[str]
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    loader = start_loader(*mode, *INTERVAL, "--configmap", "a", "--configmap", "b")
    loader.wait_log("demo/b")
    time.sleep(0.5)  # some intervals
    assert loader.count_log("demo/b") == 1, loader.log
    assert not (out / "..data").exists()
    api.configmap("demo", "b", {"b": "1"})
    wait_files(out, {"a": "1", "b": "1"})
    loader.wait_log("INFO warning over: waiting for configmap demo/b")


@pytest.mark.parametrize("mode", [["--watch"], []], ids=["watch", "poll"])
def test_a_sidecar_that_finds_nothing_to_do_says_so_once(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path, mode: list[str]
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    assert run_loader("--onetime", "--configmap", "a").returncode == 0
    version = os.readlink(out / "..data").removeprefix("..")
    loader = start_loader(*mode, *INTERVAL, "--configmap", "a")
    loader.wait_log(f"INFO up to date version={version}")
    api.configmap("demo", "a", {"a": "2"})
    loader.wait_log("INFO published")
    api.configmap("demo", "a", {"a": "3"})
    wait_files(out, {"a": "3"})
    assert loader.count_log("up to date") == 1


# -- deleted, emptied, renamed


@pytest.mark.parametrize("mode", [["--watch"], []], ids=["watch", "poll"])
@pytest.mark.parametrize("how", ["deleted", "emptied", "without data"])
def test_a_named_one_that_goes_keeps_its_files(
    start_loader: StartLoader, api: ApiServer, out: Path, how: str, mode: list[str]
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    api.configmap("demo", "b", {"b": "1"})
    loader = start_loader(*mode, *INTERVAL, "--configmap", "a", "--configmap", "b")
    wait_files(out, {"a": "1", "b": "1"})
    if how == "deleted":
        api.delete("ConfigMap", "demo", "a")
    else:
        api.configmap("demo", "a", {} if how == "emptied" else None)
    loader.wait_log("(?i)warn.*demo/a")
    api.configmap("demo", "b", {"b": "2"})
    wait_files(out, {"a": "1", "b": "2"})
    assert loader.count_log("(?i)warn.*demo/a") == 1, loader.log
    api.configmap("demo", "a", {"a": "2"})
    wait_files(out, {"a": "2", "b": "2"})
    loader.wait_log("INFO warning over: configmap demo/a ")


def test_it_keeps_them_over_a_restart(
    run_loader: RunLoader, start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    api.configmap("demo", "b", {"b": "1"})
    names = ("--configmap", "a", "--configmap", "b")
    assert run_loader("--onetime", *names).returncode == 0
    api.delete("ConfigMap", "demo", "a")
    api.configmap("demo", "b", {"b": "2"})
    loader = start_loader("--watch", *names)
    loader.wait_log("(?i)warn.*demo/a")
    wait_files(out, {"a": "1", "b": "2"})


@pytest.mark.parametrize("mode", [["--watch"], []], ids=["watch", "poll"])
def test_a_key_that_goes_takes_its_file_along(
    start_loader: StartLoader, api: ApiServer, out: Path, mode: list[str]
) -> None:
    api.configmap("demo", "a", {"a": "1", "b": "1"})
    start_loader(*mode, *INTERVAL, "--configmap", "a")
    wait_files(out, {"a": "1", "b": "1"})
    api.configmap("demo", "a", {"a": "1", "c": "1"})
    wait_files(out, {"a": "1", "c": "1"})
    wait_converged(out)


def test_leaving_a_selector_takes_all_files_along(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    label = {"app": "x"}
    api.configmap("demo", "a", {"a1": "1", "a2": "1"}, labels=label)
    api.configmap("demo", "b", {"b": "1"}, labels=label)
    api.configmap("other", "c", {"c": "1"}, labels=label)
    start_loader("--watch", "--configmap-selector", "app=x")
    wait_files(out, {"a1": "1", "a2": "1", "b": "1"})
    api.wait_watches(1)
    api.configmap("demo", "a", {"a1": "1", "a2": "1"})
    wait_files(out, {"b": "1"})
    api.configmap("demo", "a", {"a1": "2"}, labels=label)
    wait_files(out, {"a1": "2", "b": "1"})
    api.delete("ConfigMap", "demo", "b")
    wait_files(out, {"a1": "2"})
    wait_converged(out)


def test_a_selector_that_matches_nothing_is_a_snapshot(run_loader: RunLoader, out: Path) -> None:
    done = run_loader("--onetime", "--configmap-selector", "app=x")
    assert done.returncode == 0, done.stderr
    assert inspect(out).files == {}


def test_recreated_under_the_same_name(
    start_loader: StartLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"a": "1", "b": "1"})
    start_loader("--watch", "--configmap", "a")
    wait_files(out, {"a": "1", "b": "1"})
    api.wait_watches(1)
    api.delete("ConfigMap", "demo", "a")
    api.configmap("demo", "a", {"a": "2"})
    wait_files(out, {"a": "2"})


# -- who wins


def test_the_one_named_later_wins(run_loader: RunLoader, api: ApiServer, out: Path) -> None:
    api.configmap("demo", "a", {"x": "a", "a": "1"})
    api.configmap("demo", "b", {"x": "b", "b": "1"})
    for first, last in ("ab", "ba"):
        done = run_loader("--onetime", "--configmap", first, "--configmap", last)
        assert done.returncode == 0, done.stderr
        assert snapshot(out) == {"x": last.encode(), "a": b"1", "b": b"1"}
        warned = [line for line in done.stderr.splitlines() if re.search("(?i)warn", line)]
        assert len(warned) == 1, done.stderr
        assert all(word in warned[0] for word in ("x", "demo/a", "demo/b"))


def test_a_hidden_key_comes_back(start_loader: StartLoader, api: ApiServer, out: Path) -> None:
    api.configmap("demo", "a", {"x": "a"})
    api.configmap("demo", "b", {"x": "b"})
    start_loader("--watch", "--configmap", "a", "--configmap", "b")
    wait_files(out, {"x": "b"})
    api.wait_watches(2)
    api.configmap("demo", "b", {"y": "b"})
    wait_files(out, {"x": "a", "y": "b"})


def test_within_a_selector_the_order_is_always_the_same(
    run_loader: RunLoader, api: ApiServer, tmp_path: Path, out: Path
) -> None:
    objects = [configmap(name, {"x": name}) for name in "abc"]
    for one in objects:
        one["metadata"]["labels"] = {"app": "x"}
    path = tmp_path / "objects.json"
    results = set()
    for order in (objects, objects[::-1], objects[1:] + objects[:1]):
        save(path, *order)
        done = run_loader("--onetime", "--configmap-selector", "app=x", "--from-file", str(path))
        assert done.returncode == 0, done.stderr
        results.add(snapshot(out)["x"])
    assert len(results) == 1


def test_a_directory_of_its_own(run_loader: RunLoader, api: ApiServer, out: Path) -> None:
    api.configmap("demo", "flags", {"feature.on": "100"})
    api.configmap("other", "more", {"feature.on": "50"})
    sources = ("--configmap", "flags:runtime", "--configmap", "other/more:a/b.c/d")
    done = run_loader("--onetime", *sources)
    assert done.returncode == 0, done.stderr
    published = inspect(out)
    assert published.files == {"runtime/feature.on": b"100", "a/b.c/d/feature.on": b"50"}
    assert modes(out)["runtime"] == 0o755


def test_a_file_where_another_has_a_directory(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"eds": "a file", "ok": "1"})
    api.configmap("demo", "b", {"x.yaml": "1"})
    for names in (("a", "b:eds"), ("b:eds", "a")):
        args = [word for name in names for word in ("--configmap", name)]
        done = run_loader("--onetime", *args)
        assert done.returncode == 0, done.stderr
        assert snapshot(out) == {"ok": b"1", "eds/x.yaml": b"1"}
        assert "eds" in done.stderr
        assert "demo/a" in done.stderr


# -- content, byte for byte

CONTENT = {
    "empty": b"",
    "no-newline": b"a: 1",
    "crlf": b"a: 1\r\nb: 2\r\n",
    "utf8": "grün, 緑, 🟢\n".encode(),
    "bom": b"\xef\xbb\xbfa: 1\n",
    "nul": b"a\0b",
    "line-separators": "a\u2028b\u0085c".encode(),
    "large": b"x: y\n" * 200_000,
}


def test_content_goes_through_byte_for_byte(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    data = {f"{name}.text": content.decode() for name, content in CONTENT.items()}
    api.configmap("demo", "a", data, {f"{name}.binary": text for name, text in CONTENT.items()})
    done = run_loader("--onetime", "--configmap", "a")
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {
        f"{name}.{how}": content for name, content in CONTENT.items() for how in ("text", "binary")
    }


@pytest.mark.parametrize("data", [{}, None], ids=["empty", "without data"])
def test_a_configmap_that_has_nothing_yet(
    run_loader: RunLoader, api: ApiServer, out: Path, data: dict[str, str] | None
) -> None:
    """It exists; the others are published, and it is named."""
    api.configmap("demo", "a", data)
    api.configmap("demo", "b", {"b": "1"})
    done = run_loader("--onetime", "--configmap", "a", "--configmap", "b")
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"b": b"1"}


BAD_KEYS = ["..", ".", "", "../up", "a/b", "/etc/passwd", "..data", "a\nb", "a\0b", "x" * 300]


@pytest.mark.parametrize("key", BAD_KEYS, ids=repr)
def test_a_bad_key_is_left_out_and_named(
    run_loader: RunLoader, api: ApiServer, out: Path, key: str
) -> None:
    """A real API server refuses them; nothing may rest on that."""
    api.configmap("demo", "a", {key: "bad", "good.yaml": "1", ".hidden": "1"})
    done = run_loader("--onetime", "--configmap", "a")
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"good.yaml": b"1", ".hidden": b"1"}
    assert "demo/a" in done.stderr
    assert len(done.stderr.splitlines()) <= 3
    wait_converged(out)
    assert sorted(os.listdir(out.parent)) == ["runtime", "token"]


def test_binary_data_that_is_no_base64(run_loader: RunLoader, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "objects.json"
    save(path, configmap("a", {"ok": "1", "both": 7}, binaryData={"bad": "***", "both": "MQ=="}))
    done = run_loader("--onetime", "--configmap", "a", "--from-file", str(path))
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"ok": b"1"}
    assert "key 'bad' is not base64" in done.stderr
    assert "key 'both' is not text" in done.stderr


# -- a file whose source is gone


def names(path: str) -> str:
    """A listener that reads its routes from a file."""
    return json.dumps({"resources": [{
        "@type": "type.googleapis.com/envoy.config.listener.v3.Listener", "name": "l",
        "rds": {"path": f"/srv/runtime/current/{path}"},
    }]})  # fmt: skip


@pytest.mark.parametrize("how", ["deleted", "renamed"])
def test_a_key_stays_as_long_as_something_published_names_it(
    start_loader: StartLoader, api: ApiServer, out: Path, how: str
) -> None:
    """An Envoy that starts without it would have no listener."""
    listener, more = names("rds.yaml"), {"rds2.yaml": "new"} if how == "renamed" else {}
    api.configmap("demo", "a", {"lds.json": listener, "rds.yaml": "old"})
    loader = start_loader("--watch", "--configmap", "a")
    wait_files(out, {"lds.json": listener, "rds.yaml": "old"})
    api.wait_watches(1)
    api.configmap("demo", "a", {"lds.json": listener, **more})
    loader.wait_log("WARNING rds.yaml: its source is gone")
    wait_files(out, {"lds.json": listener, "rds.yaml": "old", **more})
    api.configmap("demo", "a", {"lds.json": names("rds2.yaml"), **more})
    wait_files(out, {"lds.json": names("rds2.yaml"), **more})
    assert loader.count_log("its source is gone") == 1


# -- the disk


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where this may be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def test_a_full_disk_leaves_the_last_snapshot_serving(
    start_loader: StartLoader, api: ApiServer, small: Path
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    place = small / "out"
    loader = start_loader("--watch", *INTERVAL, "--configmap", "a", "--output-dir", str(place))
    wait_files(place, {"a": "1"})
    api.wait_watches(1)
    api.configmap("demo", "a", {"a": "x" * 500_000})
    loader.wait_log("No space left")
    assert snapshot(place) == {"a": b"1"}
    inspect(place, converged=False)
    api.configmap("demo", "a", {"a": "2"})
    wait_files(place, {"a": "2"})
    wait_converged(place)
    loader.stop()


def test_a_read_only_disk_leaves_the_last_snapshot_serving(
    start_loader: StartLoader, api: ApiServer, small: Path
) -> None:
    api.configmap("demo", "a", {"a": "1"})
    place = small / "out"
    loader = start_loader("--watch", *INTERVAL, "--configmap", "a", "--output-dir", str(place))
    wait_files(place, {"a": "1"})
    api.wait_watches(1)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    api.configmap("demo", "a", {"a": "2"})
    loader.wait_log("Read-only file system")
    assert snapshot(place) == {"a": b"1"}
    subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
    wait_files(place, {"a": "2"}, 40)
    loader.stop()


# -- the check


CHECK = ("--check-cmd", "grep -q good {dir}/rds.yaml")


def test_what_the_check_rejects_is_not_published(
    start_loader: StartLoader, run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    api.configmap("demo", "a", {"rds.yaml": "good"})
    loader = start_loader("--watch", *INTERVAL, "--configmap", "a", *CHECK)
    wait_files(out, {"rds.yaml": "good"})
    api.wait_watches(1)
    api.configmap("demo", "a", {"rds.yaml": "bad"})
    loader.wait_log("ERROR --check-cmd")
    assert snapshot(out) == {"rds.yaml": b"good"}
    api.configmap("demo", "a", {"rds.yaml": "good again"})
    wait_files(out, {"rds.yaml": "good again"})
    loader.stop()
    api.configmap("demo", "a", {"rds.yaml": "bad"})
    done = run_loader("--onetime", "--configmap", "a", *CHECK)
    assert done.returncode == 1
    assert "--check-cmd" in done.stderr
    wait_converged(out)
    assert snapshot(out) == {"rds.yaml": b"good again"}


def test_a_check_that_is_not_there(run_loader: RunLoader, api: ApiServer, out: Path) -> None:
    api.configmap("demo", "a", {"rds.yaml": "1"})
    done = run_loader("--onetime", "--configmap", "a", "--check-cmd", "/nope/check {dir}")
    assert done.returncode == 1
    assert "/nope/check" in done.stderr
    assert not (out / "..data").exists()


EDS = "current/eds/demo_web_http.yaml"


def endpoint(api: ApiServer, address: str) -> None:
    ports = [{"name": "http", "port": 8080, "protocol": "TCP"}]
    api.endpointslice("demo", "web-abc", "web", [address], ports)


def moves_on(api: ApiServer, out: Path, address: str) -> None:
    endpoint(api, address)
    wait_until(lambda: address in (out / EDS).read_text())


@pytest.mark.parametrize("check", ["rejects", "is slow", "accepts late"])
def test_endpoints_and_secrets_wait_for_no_check(
    start_loader: StartLoader, api: ApiServer, out: Path, authority: Authority, check: str
) -> None:
    """Neither for one that rejects the rest, nor for one that still runs; nor does SIGTERM. And
    they start it neither again nor anew."""
    api.service("demo", "web", [{"name": "http", "port": 80, "protocol": "TCP"}])
    endpoint(api, "10.0.0.1")
    api.configmap("demo", "a", {"note": "good"})
    ca = authority.ca_file.read_bytes()
    api.secret("demo", "web", {"ca.crt": ca})
    how = {"rejects": "false", "is slow": "sleep 60", "accepts late": "sleep 1"}[check]
    command = f"sh -c 'grep -q good $1/note || {how}' check {{dir}}"
    loader = start_loader("--watch", "--services", "*", "--endpoints", "eds", "--configmap", "a",
                          "--secret", "web", "--check-cmd", command)  # fmt: skip
    wait_until(lambda: "10.0.0.1" in ((out / EDS).read_text() if (out / EDS).exists() else ""))
    api.wait_watches(4)
    api.configmap("demo", "a", {"note": "bad"})
    if check == "rejects":
        loader.wait_log("ERROR --check-cmd")
    for number in range(2, 7):
        moves_on(api, out, f"10.0.0.{number}")
    sds = out / "current/sds/demo_web_ca.yaml"
    before = sds.read_text()
    api.secret("demo", "web", {"ca.crt": ca + ca})
    wait_until(lambda: sds.read_text() != before)
    note = out / "current/note"
    if check == "accepts late":
        numbers = itertools.count(1)
        while note.read_text() != "bad":
            number = next(numbers)
            assert number < 1_000, "it is never accepted"
            moves_on(api, out, f"10.1.{number // 250}.{number % 250 + 1}")
    else:
        assert note.read_text() == "good"
    assert loader.log.count("ERROR --check-cmd") == (check == "rejects")
    assert loader.stop() < 1.0


# -- files of objects instead of an API server


def test_objects_of_a_file(
    run_loader: RunLoader, api: ApiServer, tmp_path: Path, out: Path
) -> None:
    path = tmp_path / "objects.json"
    service: Object = {"kind": "Service", "metadata": {"name": "a", "namespace": "demo"}}
    elsewhere = configmap("a", {"a": "of another namespace"}, "other")
    save(path, service, elsewhere, configmap("a", {"a": "1"}), configmap("b", {"b": "1"}))
    ignored = ("--token-file", "/nope", "--ca-file", "/nope")
    done = run_loader("--onetime", "--configmap", "a", "--from-file", str(path), *ignored)
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"a": b"1"}
    assert api.connections_total == 0


@pytest.mark.parametrize(
    ("selector", "selected"),
    [("", "abc"), ("app", "ab"), ("!app", "c"), ("app=x", "a"), ("app == y", "b"), ("app!=x", "bc"),
     ("app=", ""), ("app in (x, y)", "ab"), ("app notin (x)", "bc"), ("app notin (x),app", "b"),
     ("app in (x,y),tier=1", "b")],
)  # fmt: skip
def test_a_selector_selects_from_a_file_what_it_selects_from_an_api_server(
    run_loader: RunLoader, api: ApiServer, tmp_path: Path, out: Path, selector: str, selected: str
) -> None:
    path, items = tmp_path / "objects.json", []
    for name, labels in {"a": {"app": "x"}, "b": {"app": "y", "tier": "1"}, "c": {}}.items():
        api.configmap("demo", name, {name: "1"}, labels=labels)
        items.append(configmap(name, {name: "1"}))
        items[-1]["metadata"]["labels"] = labels
    save(path, *items)
    for more in ((), ("--from-file", str(path))):
        done = run_loader("--onetime", "--configmap-selector", selector, *more)
        assert done.returncode == 0, done.stderr
        assert snapshot(out) == dict.fromkeys(selected, b"1")


def test_an_object_of_another_kind_may_have_items(
    run_loader: RunLoader, tmp_path: Path, out: Path
) -> None:
    path = tmp_path / "objects.json"
    other: Object = {"kind": "Foo", "metadata": {"name": "a"}, "items": {"a": 1}}
    save(path, other, configmap("a", {"a": "1"}))
    done = run_loader("--onetime", "--configmap", "a", "--from-file", str(path))
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"a": b"1"}


def test_objects_of_stdin(run_loader: RunLoader, out: Path) -> None:
    text = json.dumps(configmap("a", {"a": "1"}))
    done = run_loader("--onetime", "--configmap", "a", "--from-file", "-", stdin=text)
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"a": b"1"}


@pytest.mark.parametrize(
    "content",
    [None, "", "no json", "[1]", '{"kind":"List","items":{}}', '{"items":[1]}',
     '{"kind":"ConfigMap","metadata":{"name":7}}', "\ud800",
     '{"kind":"ConfigMap","metadata":{"name":"a","namespace":"demo"},"data":"text"}'],
    ids=repr,
)  # fmt: skip
def test_a_file_that_is_none_of_it(
    run_loader: RunLoader, tmp_path: Path, out: Path, content: str | None
) -> None:
    """Or that is not there."""
    path = tmp_path / "objects.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    done = run_loader("--onetime", "--configmap", "a", "--from-file", str(path))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert str(path) in done.stderr or "demo/a" in done.stderr
    assert not (out / "..data").exists()


@pytest.mark.parametrize("mode", [["--watch"], []], ids=["watch", "poll"])
def test_a_sidecar_reads_the_file_again(
    start_loader: StartLoader, tmp_path: Path, out: Path, mode: list[str]
) -> None:
    path = tmp_path / "objects.json"
    save(path, configmap("a", {"a": "1"}))
    args = (*mode, *INTERVAL, "--configmap", "a", "--from-file", str(path))
    loader = start_loader(*args, server=None)
    wait_files(out, {"a": "1"})
    save(path, configmap("a", {"a": "2", "b": "2"}))
    wait_files(out, {"a": "2", "b": "2"})
    path.write_text("broken")
    loader.wait_log(re.escape(str(path)))
    wait_files(out, {"a": "2", "b": "2"})
    path.unlink()
    time.sleep(0.3)
    wait_files(out, {"a": "2", "b": "2"})
    save(path, configmap("a", {"a": "3"}))
    wait_files(out, {"a": "3"})
    save(path)
    loader.wait_log("(?i)warn.*demo/a")
    wait_files(out, {"a": "3"})


# -- what the loader reads it may not trust


def test_objects_nobody_asked_for_are_no_source(
    run_loader: RunLoader, api: ApiServer, out: Path
) -> None:
    """A server that ignores the field selector does not smuggle in files."""
    items = [
        {"metadata": {"name": name, "namespace": namespace}, "data": {f"{name}.yaml": namespace}}
        for name, namespace in (("b", "demo"), ("a", "other"), ("a", "demo"))
    ]
    body = {"kind": "ConfigMapList", "apiVersion": "v1", "items": items,
            "metadata": {"resourceVersion": "5"}}  # fmt: skip
    api.fail_next("GET", k8s.Response(200, k8s.to_json(body)))
    done = run_loader("--onetime", "--configmap", "a")
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"a.yaml": b"demo"}


@pytest.mark.parametrize(
    "item", [None, {}, {"metadata": {"name": "a"}}, []], ids=repr
)
def test_a_bad_item_does_not_stop_the_rest(
    run_loader: RunLoader, api: ApiServer, out: Path, item: object
) -> None:
    good = {"metadata": {"name": "g", "namespace": "demo"}, "data": {"g": "1"}}
    body = {"kind": "ConfigMapList", "apiVersion": "v1", "items": [item, good],
            "metadata": {"resourceVersion": "5"}}  # fmt: skip
    api.fail_next("GET", k8s.Response(200, k8s.to_json(body)))
    done = run_loader("--onetime", "--configmap-selector", "app=x")
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert snapshot(out) == {"g": b"1"}

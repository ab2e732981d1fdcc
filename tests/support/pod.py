"""A rendered pod as processes on this machine: the real Envoy, the loader, a scripted API server.

Arguments, environment, mounted files, rights and probes are those of the manifests; only paths are
put under a temporary root, and ports are exchanged for free ones.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from tests.support.apiserver import ApiServer, Rule
from tests.support.envoy import envoy_path
from tests.support.loader import Loader, run, wait_until
from tests.support.manifests import Object, Release, command, containers
from tests.support.ports import held_port
from tests.support.tls import Authority

TOKEN = "pod-token"
PATHS = ("/srv/runtime", "/etc/xds-loader", "/etc/envoy", "/var/run/secrets")
FIXED = (9901, 9902, 9903, 10000)


class Answer(NamedTuple):
    """What a GET got."""

    status: int
    body: str
    connection: str


def get(port: int, path: str = "/", host: str = "", timeout: float = 5.0) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", path, headers={"Host": host} if host else {})
        response = connection.getresponse()
        text = response.read().decode()
        return Answer(response.status, text, response.getheader("connection") or "")
    finally:
        connection.close()


def rules(release: Release) -> list[Rule]:
    """The Roles and ClusterRoles of the release, which must be bound to the pod's account."""
    bound = {
        (b["roleRef"]["kind"], b["metadata"].get("namespace"), b["roleRef"]["name"])
        for b in release.all("RoleBinding") + release.all("ClusterRoleBinding")
        if b["subjects"][0]["name"] == release.pod["serviceAccountName"]
    }
    return [
        Rule(r["verbs"], r["resources"], role["metadata"].get("namespace", ""), names(r))
        for role in release.all("Role") + release.all("ClusterRole")
        if (role["kind"], role["metadata"].get("namespace"), role["metadata"]["name"]) in bound
        for r in role["rules"]
    ]


def names(rule: Object) -> list[str]:
    found: list[str] = rule.get("resourceNames", [])
    return found


class Pod:
    """`with Pod(release, tmp_path, authority) as pod:` all containers are up and ready."""

    def __init__(
        self, release: Release, root: Path, authority: Authority, namespace: str = "shop"
    ) -> None:
        self.release = release
        self.root = root
        self.authority = authority
        self.ports = {port: held_port() for port in FIXED}
        self.fields = {
            "metadata.namespace": namespace,
            "metadata.name": "edge-0",
            "spec.nodeName": "node-a",
        }
        self.stack = contextlib.ExitStack()
        self.api = ApiServer(tokens=[TOKEN], rules=rules(release), tls=authority.server_context())
        self.loader: Loader | None = None
        self.envoy: subprocess.Popen[bytes] | None = None
        self.apply(release)

    # -- mapping

    def map(self, text: str) -> str:
        """Paths under the root, fixed ports exchanged; nothing listens beyond loopback."""
        for path in PATHS:
            text = text.replace(path, f"{self.root}{path}")
        for port, free in self.ports.items():
            text = re.sub(rf"(?<![\d.]){port}(?!\d)", str(free), text)
        text = text.replace("--listen=:", "--listen=127.0.0.1:")
        text = text.replace("https://kubernetes.default", self.api.url)
        return re.sub(
            r"address: (0\.0\.0\.0|'::'\n +ipv4_compat: true)", "address: 127.0.0.1", text
        )

    def apply(self, release: Release) -> None:
        """`kubectl apply` of the ConfigMaps; a change in the pod's template is not looked at."""
        self.release = release
        for obj in release.all("ConfigMap"):
            data = {key: self.map(text) for key, text in obj["data"].items()}
            self.api.put({**obj, "data": data})

    def mount(self, container: Object) -> None:
        """The files that the kubelet would have put there."""
        volumes = {volume["name"]: volume for volume in self.release.pod["volumes"]}
        for entry in container.get("volumeMounts", []):
            volume = volumes[entry["name"]]
            directory = Path(self.map(entry["mountPath"]))
            directory.mkdir(parents=True, exist_ok=True)
            if "configMap" in volume:
                source = self.release.one("ConfigMap", volume["configMap"]["name"])
                for key, text in source["data"].items():
                    (directory / key).write_text(self.map(text))
            for source in volume.get("projected", {}).get("sources", []):
                if "serviceAccountToken" in source:
                    (directory / source["serviceAccountToken"]["path"]).write_text(TOKEN)
                elif "configMap" in source:
                    (directory / "ca.crt").write_bytes(self.authority.ca_file.read_bytes())

    # -- running

    def __enter__(self) -> Pod:
        try:
            self.stack.callback(self.api.close)
            for container in containers(self.release.pod):
                self.start(container)
            for container in containers(self.release.pod):
                self.await_probe(container, "readinessProbe")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self.loader is not None:
            error.add_note(f"the loader's log:\n{self.loader.log}")
        if error is not None and (self.root / "envoy.log").exists():
            error.add_note(f"Envoy's log:\n{(self.root / 'envoy.log').read_text()[-3000:]}")
        self.close()

    def close(self) -> None:
        self.stack.close()

    def start(self, container: Object) -> None:
        """An init container runs to its end; any other runs on, after its startup probe."""
        args, env = command(container, self.fields)
        args = [self.map(arg) for arg in args]
        if "envoy:" in container["image"]:
            self.mount(container)
            self.start_envoy(args, env)
        elif "loader" in container["image"]:
            self.mount(container)
            env.update(self.api_environment())
            if "--onetime" in args:
                done = run(args, env)
                assert done.returncode == 0, done.stderr
            else:
                self.loader = Loader(args, env)
                self.stack.callback(self.loader.kill)
        self.await_probe(container, "startupProbe")

    def api_environment(self) -> dict[str, str]:
        """Where the API server is, as the kubelet says it in every container."""
        return {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(self.api.port),
        }

    def start_envoy(self, args: list[str], env: Mapping[str, str]) -> None:
        log = self.stack.enter_context((self.root / "envoy.log").open("wb"))
        binary, *rest = args
        assert binary == "/usr/local/bin/envoy"
        if "--concurrency" not in rest:  # one worker is enough here
            rest += ["--concurrency", "1"]
        self.envoy = subprocess.Popen([envoy_path(), *rest], env=dict(env), stdout=log, stderr=log)
        self.stack.callback(self.stop_envoy)

    def stop_envoy(self) -> None:
        if self.envoy is not None:
            self.envoy.terminate()
            self.envoy.wait(10)

    def port(self, container: Object, name: str) -> int:
        (number,) = (p["containerPort"] for p in container["ports"] if p["name"] == name)
        return self.ports[number]

    def await_probe(self, container: Object, kind: str) -> None:
        action = container.get(kind, {}).get("httpGet")
        if action is None:
            return

        def passes() -> bool:
            assert self.envoy is None or self.envoy.poll() is None, "Envoy exited"
            with contextlib.suppress(OSError):
                return 200 <= get(self.port(container, action["port"]), action["path"]).status < 400
            return False

        wait_until(passes, 20, f"{container['name']}: {kind}")

    def pre_stop(self, container: Object) -> None:
        """The exec hook of a container of the loader's image, with no wait in it."""
        hook = [self.map(word) for word in container["lifecycle"]["preStop"]["exec"]["command"]]
        assert hook[0] == "python3"
        code = hook[4].replace("time.sleep(15)", "time.sleep(0)")
        last = ["0"] if len(hook) > 5 else []
        subprocess.run(
            [sys.executable, *hook[1:4], code, *hook[5:6], *last], check=True, timeout=10
        )

    # -- looking

    def get(self, path: str = "/", host: str = "") -> Answer:
        return get(self.ports[10000], path, host)

    def loader_container(self) -> Object:
        return next(
            container
            for container in containers(self.release.pod)
            if "loader" in container["image"] and "--onetime" not in container["args"]
        )

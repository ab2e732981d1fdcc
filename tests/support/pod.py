"""A rendered pod as processes on this machine: the real Envoy, the loader, a scripted API server.

Arguments, environment, mounted files, permissions, ports and probes are those of the manifests.
Only paths are put under a temporary root, and what listens in the pod does so on a loopback address
of its own, as pods have addresses of their own.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tests.support.apiserver import ApiServer, Rule
from tests.support.envoy import admin_connection, envoy_path
from tests.support.loader import Loader, run, wait_until
from tests.support.manifests import Object, Release, command, containers
from tests.support.tls import Authority

TOKEN = "pod-token"
PATHS = ("/srv/runtime", "/etc/xds-loader", "/etc/envoy", "/var/run/secrets")
ADMIN = "/var/run/envoy-admin"  # of Envoy's Unix socket, whose path may have 107 characters


class Answer(NamedTuple):
    """What a GET got."""

    status: int
    body: str
    connection: str


def ask(connection: http.client.HTTPConnection, path: str, host: str = "") -> Answer:
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Host": host} if host else {})
        response = connection.getresponse()
        text = response.read().decode()
        return Answer(response.status, text, response.getheader("connection") or "")


def rules(release: Release) -> list[Rule]:
    """The Roles and ClusterRoles of the release that are bound to the pod's account."""
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

    patience = 20.0  # seconds that a probe may take

    def __init__(
        self, release: Release, root: Path, authority: Authority, namespace: str = "shop"
    ) -> None:
        self.release = release
        self.root = root
        self.authority = authority
        self.ip = f"127.{random.randint(10, 250)}.{random.randint(0, 255)}.{random.randint(2, 250)}"
        self.ports: dict[int, int] = {}  # of what the test serves in place of a container
        self.admin_directory = Path(tempfile.mkdtemp(prefix="xds-"))
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
        """Paths under the root; nothing listens beyond loopback."""
        for path in PATHS:
            text = text.replace(path, f"{self.root}{path}")
        text = text.replace(ADMIN, str(self.admin_directory))
        for port, other in self.ports.items():
            text = re.sub(rf"(?<![\d.]){port}(?!\d)", str(other), text)
        text = text.replace("--listen=:", f"--listen={self.ip}:")
        text = text.replace("https://kubernetes.default", self.api.url)
        wildcard = r"address: (0\.0\.0\.0|'::'\n +ipv4_compat: true)"
        return re.sub(wildcard, f"address: {self.ip}", text)

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
            self.stack.callback(shutil.rmtree, self.admin_directory, ignore_errors=True)
            self.stack.callback(self.api.close)
            for container in self.release.pod["initContainers"]:  # one after the other
                self.start(container)
                self.await_probe(container, "startupProbe")
            for container in self.release.pod["containers"]:
                self.start(container)
            for container in self.release.pod["containers"]:
                self.await_probe(container, "startupProbe")
            for container in containers(self.release.pod):
                self.await_probe(container, "readinessProbe")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self.loader is not None:
            error.add_note(f"the loader's log:\n{self.loader.log}")
        if error is not None and (self.root / "envoy.log").exists():
            error.add_note(f"Envoy's log:\n{(self.root / 'envoy.log').read_text()[-3000:]}")
        self.close()

    def close(self) -> None:
        self.stack.close()

    def start(self, container: Object) -> None:
        """An init container runs to its end, unless it is a native sidecar."""
        args, env = command(container, self.fields)
        args = [self.map(arg) for arg in args]
        if re.search(r"/envoy[:@]", container["image"]):
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

    def api_environment(self) -> dict[str, str]:
        """Where the API server is, as the kubelet sets it in every container."""
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

    def await_probe(self, container: Object, kind: str) -> None:
        action = container.get(kind, {}).get("httpGet")
        if action is None:
            return

        port = action["port"]
        if isinstance(port, str):  # a name is one of the container's own ports
            (port,) = (p["containerPort"] for p in container["ports"] if p["name"] == port)

        def passes() -> bool:
            assert self.envoy is None or self.envoy.poll() is None, "Envoy exited"
            with contextlib.suppress(OSError):
                return 200 <= self.ask(port, action["path"]).status < 400
            return False

        wait_until(passes, self.patience, f"{container['name']}: {kind}")

    def pre_stop(self, container: Object) -> None:
        """The exec hook of a container of the loader's image, with no wait in it."""
        hook = [self.map(word) for word in container["lifecycle"]["preStop"]["exec"]["command"]]
        assert hook[0] == "python3"
        words = [word.replace("time.sleep(15)", "time.sleep(0)") for word in hook[1:]]
        subprocess.run([sys.executable, *words], check=True, timeout=10)

    # -- looking

    def ask(self, port: int, path: str, host: str = "") -> Answer:
        """What a container of the pod answers on one of its ports."""
        return ask(http.client.HTTPConnection(self.ip, port, timeout=5), path, host)

    def get(self, path: str = "/", host: str = "") -> Answer:
        return self.ask(10000, path, host)

    def admin(self, path: str) -> Answer:
        """What Envoy's admin interface answers, on its Unix socket."""
        return ask(admin_connection(f"unix:{self.admin_directory}/admin.sock"), path)

    def loader_container(self) -> Object:
        return next(
            container
            for container in containers(self.release.pod)
            if "loader" in container["image"] and "--onetime" not in container["args"]
        )

"""A Kubernetes cluster on loopback: the API server, what kubectl sends to it, and pods.

Each pod gets a loopback address of its own, so that ports are those of the manifests. What a
kubelet would do with a pod's text, and no more, happens here: paths of volumes become paths below
a temporary directory, 0.0.0.0 and 127.0.0.1 the pod's address, and (in an `address:`) the DNS name
of a Service its address.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shlex
import socket
import ssl
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from example.support.pods import Handler, Server, Servers, fetch, named
from tests.support.apiserver import BY_KIND, ApiServer, Client, Rule
from tests.support.envoy import Envoy, admin_url_of
from tests.support.loader import Loader, run, wait_until
from tests.support.manifests import command

Object = dict[str, Any]
TOKEN = "the-service-account-token"
WRITES = ("create", "update", "patch", "delete")
ALIASES = {"cm": "ConfigMap", "svc": "Service"}
CLUSTER_WIDE = ("ClusterRole", "ClusterRoleBinding", "Namespace")
NODES = {"a": "node-a", "b": "node-b"}


def own_network() -> tuple[str, socket.socket]:
    """A network of loopback that no other example has, and the socket whose name keeps it so."""
    while True:
        net = f"127.{random.randint(10, 250)}.{random.randint(0, 255)}"
        held = socket.socket(socket.AF_UNIX)
        try:
            held.bind(f"\0envoy-xds-example-{net}")
        except OSError:
            held.close()
        else:
            return net, held


class PodEnvoy(Envoy):
    """Envoy in a pod: on its address, with the bootstrap as the user wrote it."""

    def take(self, text: str) -> None:
        """Envoy's own parser reads the YAML, not Python's."""
        place = self.config_file.with_suffix(".yaml")
        place.write_text(text)
        self.command[self.command.index("-c") + 1] = str(place)


class Backend(NamedTuple):
    """A pod of a Service: a small server."""

    name: str
    service: str
    ip: str
    zone: str
    servers: list[Server]


class Proxy:
    """A pod with Envoy and the loader in it, as its Deployment says."""

    def __init__(self, name: str, ip: str, root: Path, spec: Object, mounts: list[str]) -> None:
        self.name, self.ip, self.root = name, ip, root
        self.spec, self.mounts = spec, mounts
        self._envoy: PodEnvoy | None = None
        self.loaders: list[Loader] = []
        self.init_seconds = 0.0
        self.started = 0.0

    def take(self, envoy: PodEnvoy) -> None:
        self._envoy, self.started = envoy, time.monotonic()

    @property
    def envoy(self) -> PodEnvoy:
        assert self._envoy is not None
        return self._envoy

    @property
    def output_dir(self) -> Path:
        return self.root / "srv/runtime"

    def url(self, port: int, path: str = "/", scheme: str = "http") -> str:
        return f"{scheme}://{self.ip}:{port}{path}"

    def admin_command(self, path: str) -> str:
        """What to type for Envoy's admin interface."""
        url = self.envoy.admin_url
        if url.startswith("unix:"):
            return f"curl -s --unix-socket {url.removeprefix('unix:')} 'http://envoy{path}'"
        return f"curl -s '{url}{path}'"

    def sources(self) -> list[str]:
        """The loader's options that name what it loads."""
        words = [word for one in self.spec["containers"] if "loader" in one["image"]
                 for word in one["args"]]  # fmt: skip
        return [word for word in words if re.match("--(configmap|services|secret)", word)]

    def uptime(self) -> float:
        """Seconds, by Envoy's own clock, which shows whole ones."""
        info = json.loads(self.envoy.admin("/server_info"))
        return float(info["uptime_current_epoch"].removesuffix("s"))

    def never_restarted(self) -> bool:
        """The same process, and Envoy's own clock has run since its start."""
        process = self.envoy.process
        running = process is not None and process.poll() is None
        return running and self.uptime() >= time.monotonic() - self.started - 1.5

    def restarts(self) -> str:
        return f"none: pid {self.envoy.pid}, up {self.uptime():.0f} s"

    def close(self) -> None:
        for loader in self.loaders:
            loader.__exit__(None, None, None)
        if self._envoy is not None:
            self._envoy.stop()


class Cluster:
    def __init__(
        self,
        folder: Path,
        root: Path,
        servers: Servers,
        namespace: str = "demo",
    ) -> None:
        self.folder, self.root, self.servers = folder, root, servers
        self.namespace = namespace
        self.net, self._held = own_network()
        self._hosts = iter(range(2, 250))
        self.ips: dict[str, str] = {}
        everything = [resource.plural for resource in BY_KIND.values()]
        self.api = ApiServer(tokens=[TOKEN], rules=[Rule(WRITES, everything)])
        self.client = Client(self.api.url, TOKEN)
        self.names: dict[str, str] = {}  # more DNS names, to addresses
        self.replacements: dict[str, str] = {}  # more text of bootstraps and ConfigMaps
        self.has_dns = False  # names of Services stay as they are
        self.local: dict[tuple[str, str], Object] = {}  # what the API server does not keep
        self._pods: dict[str, str] = {}  # of a Deployment, the pod that runs its newest version
        self.proxies: dict[str, Proxy] = {}
        self.backends: dict[str, Backend] = {}
        self._counts: Counter[str] = Counter()  # pods that a Service ever had
        self.api.node("node-a", {"topology.kubernetes.io/zone": "a"})
        self.api.node("node-b", {"topology.kubernetes.io/zone": "b"})
        root.mkdir(parents=True, exist_ok=True)
        self.token_file = root / "token"
        self.token_file.write_text(TOKEN)

    # -- kubectl

    def kubectl(self, line: str) -> None:
        """One command line, as in the READMEs."""
        words = shlex.split(line)
        verb, rest = words[1], words[2:]
        namespace = self.namespace
        if "-n" in rest:
            at = rest.index("-n")
            namespace = rest[at + 1]
            del rest[at : at + 2]
        if verb == "apply":
            self.apply(self.read(rest[1]) if rest[0] == "-f"
                       else kustomized(self.folder / rest[1], self.namespace))  # fmt: skip
        elif verb == "patch":
            text = rest[rest.index("-p") + 1]
            self.merge(rest[0], namespace, rest[1], yaml.safe_load(text))
        elif verb == "annotate":
            rest = [word for word in rest if word != "--overwrite"]
            pairs = [word.partition("=") for word in rest[2:]]
            notes = {k: v if sep else None for k, sep, v in pairs}
            notes = {k.removesuffix("-") if v is None else k: v for k, v in notes.items()}
            self.merge(rest[0], namespace, rest[1], {"metadata": {"annotations": notes}})
        elif verb == "create":
            self.create(namespace, rest)
        elif verb == "delete" and rest[0] == "-f":
            for obj in self.read(rest[1]):
                self.delete(obj["kind"], self._namespace_of(obj), obj["metadata"]["name"])
        elif verb == "delete":
            self.delete(kind_of(rest[0]), namespace, rest[1])
        else:
            raise ValueError(f"the examples do not need: {line}")

    def create(self, namespace: str, words: list[str]) -> None:
        """`create configmap|secret [tls|generic] NAME --from-file=[KEY=]FILE ...`."""
        secret = words[0] == "secret"
        kind = {"tls": "kubernetes.io/tls"}.get(words[1], "Opaque") if secret else None
        data = {}
        for option, _, value in (word.partition("=") for word in words[2 + secret :]):
            key, _, file = value.rpartition("=")
            if option == "--from-literal":
                data[key] = file.encode()
            elif option in ("--from-file", "--cert", "--key"):
                fixed = {"--cert": "tls.crt", "--key": "tls.key"}.get(option, "")
                data[fixed or key or file] = self.file(file).read_bytes()
        text = {k: base64.b64encode(v).decode() if secret else v.decode() for k, v in data.items()}
        obj: Object = {"metadata": {"name": words[1 + secret]}, "data": text}
        self.merge(words[0], namespace, words[1 + secret], obj | ({"type": kind} if kind else {}))

    def file(self, name: str) -> Path:
        """A file that the story made, for this cluster or for all."""
        return next(place for place in (self.root / name, self.root.parent / name)
                    if place.exists())  # fmt: skip

    def read(self, name: str) -> list[Object]:
        return [obj for obj in yaml.safe_load_all((self.folder / name).read_text()) if obj]

    def apply(self, objects: Iterable[Object]) -> None:
        """Roles become rules, workloads wait for `run`, the rest goes to the API server."""
        objects = list(objects)
        for obj in objects:
            if obj["kind"] not in BY_KIND:
                key = obj["kind"], obj["metadata"]["name"]
                if self.local.get(key, obj) != obj:
                    self._pods[key[1]] = self.newest(key[1]) + "x"  # a rolling update
                self.local[key] = obj
            if obj["kind"] in ("Role", "ClusterRole"):
                self._allow(obj)
        for obj in objects:
            if obj["kind"] in BY_KIND:
                namespace, name = self._namespace_of(obj), obj["metadata"]["name"]
                wanted = self._localized(obj)
                old = self.api.get(obj["kind"], namespace, name) or {}
                if "data" in wanted:
                    gone = dict.fromkeys(old.get("data", {}).keys() - wanted["data"].keys())
                    wanted = {**wanted, "data": {**wanted["data"], **gone}}
                self.merge(obj["kind"], namespace, name, wanted)

    def _namespace_of(self, obj: Object) -> str:
        return str(obj["metadata"].get("namespace", self.namespace))

    def _allow(self, role: Object) -> None:
        assert self.api.rules is not None
        namespace = self._namespace_of(role) if role["kind"] == "Role" else ""
        for rule in role["rules"]:
            names = rule.get("resourceNames", ())
            self.api.rules.append(Rule(rule["verbs"], rule["resources"], namespace, names))

    def merge(self, kind: str, namespace: str, name: str, patch: Object) -> None:
        """PATCH, as kubectl does; create what is not there."""
        resource = BY_KIND[kind_of(kind)]
        group = f"apis/{resource.group}" if resource.group else "api"
        where = f"/namespaces/{namespace}" if resource.namespaced else ""
        path = f"/{group}/{resource.version}{where}/{resource.plural}"
        code, body = self.client.request(
            "PATCH", f"{path}/{name}", patch, "application/merge-patch+json"
        )
        if code == 404:
            code, body = self.client.request("POST", path, patch)
        if code >= 300:
            raise RuntimeError(f"{kind} {name}: {code} {body}")

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """The API server has it from the apply, or a workload that only ends its pods."""
        if kind in BY_KIND:
            self.api.delete(kind, namespace, name)
        else:
            self.local.pop((kind, name), None)

    # -- text that a kubelet, a network and a DNS server would make work

    def ip(self, pod: str) -> str:
        if pod not in self.ips:
            self.ips[pod] = f"{self.net}.{next(self._hosts)}"
        return self.ips[pod]

    def localize(self, text: str, pod: str, mounts: Iterable[str] = ("/srv/runtime",)) -> str:
        root = self.root / pod
        table = {mount: f"{root}{mount}" for mount in mounts}
        table |= {"0.0.0.0": self.ip(pod), "127.0.0.1": self.ip(pod)}
        table |= {"/dev/stdout": f"{root}/stdout", "https://kubernetes.default": self.api.url}
        table |= self.replacements
        pattern = "|".join(re.escape(key) for key in sorted(table, key=len, reverse=True))
        text = re.sub(rf"(?<![\w.])(?:{pattern})(?![\d.])", lambda found: table[found[0]], text)
        return (
            text
            if self.has_dns
            else re.sub(
                r"(?<=address: )[\w-]+\.[\w-]+\.\w[\w.-]+",
                lambda found: self.resolve(found[0]),
                text,
            )
        )

    def resolve(self, dns_name: str) -> str:
        """Where a name leads; that of a Service to its first pod."""
        if dns_name in self.names or ".svc." not in dns_name:
            return self.names.get(dns_name, dns_name)
        return self.ip(f"{dns_name.split('.')[0]}-0")

    def _localized(self, obj: Object) -> Object:
        """A ConfigMap's text, for the pod that loads it."""
        name = obj["metadata"]["name"]
        if obj["kind"] != "ConfigMap":
            return obj
        for (kind, owner), workload in self.local.items():
            words = re.findall(r"--configmap=([\w-]+)", json.dumps(workload))
            if kind == "Deployment" and name in words:
                pod = self.newest(owner)
                data = {key: self.localize(text, pod) for key, text in obj["data"].items()}
                return {**obj, "data": data}
        return obj

    # -- pods

    def newest(self, deployment: str) -> str:
        return self._pods.get(deployment, deployment)

    def run(self, deployment: str) -> Proxy:
        """Start the pod of a Deployment: init containers, Envoy, the loader beside it."""
        proxy = self.schedule(deployment)
        self.run_init(proxy)
        self.start_envoy(proxy)
        self.start_loaders(proxy)
        self.await_startup(proxy)
        return proxy

    def schedule(self, deployment: str) -> Proxy:
        """A pod with its volumes, and nothing that runs."""
        name = self.newest(deployment)
        spec = self.spec(deployment)
        root = self.root / name
        containers = [*spec.get("initContainers", []), *spec["containers"]]
        proxy = Proxy(name, self.ip(name), root, spec, self._mount(spec, containers, root))
        self.proxies[name] = proxy
        return proxy

    def spec(self, deployment: str) -> Object:
        found: Object = self.local["Deployment", deployment]["spec"]["template"]["spec"]
        return found

    def _fields(self, proxy: Proxy) -> dict[str, str]:
        """What a pod may be told about itself."""
        return {
            "metadata.namespace": self.namespace,
            "metadata.name": f"{proxy.name}-0",
            "metadata.labels['app']": proxy.name,
            "spec.nodeName": NODES["a"],
        }

    def _resolved(self, proxy: Proxy, container: Object) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of a container, as the kubelet makes them."""
        env = []
        for entry in container.get("env", []):
            if ref := entry.get("valueFrom", {}).get("secretKeyRef"):
                found = self.api.get("Secret", self.namespace, ref["name"])
                assert found is not None, f"no Secret {ref['name']}"
                value = base64.b64decode(found["data"][ref["key"]]).decode()
                entry = {"name": entry["name"], "value": value}
            env.append(entry)
        return command({**container, "env": env}, self._fields(proxy))

    def _command(self, proxy: Proxy, container: Object) -> tuple[list[str], dict[str, str]]:
        """A loader's arguments, and the environment that a pod gives it."""
        # The image knows the command by this name too; here it is the loader in any case.
        plain = {key: value for key, value in container.items() if key != "command"}
        args, env = self._resolved(proxy, plain)
        words = [self.localize(word, proxy.name, proxy.mounts) for word in args]
        words = [re.sub(r"^(--listen=):", rf"\g<1>{proxy.ip}:", word) for word in words]
        env |= {
            "XDS_LOADER_APISERVER": self.api.url,
            "XDS_LOADER_TOKEN_FILE": str(self.token_file),
            "XDS_LOADER_OUTPUT_DIR": str(proxy.output_dir),
        }
        return words, env

    def run_init(self, proxy: Proxy) -> None:
        for container in proxy.spec.get("initContainers", []):
            begun = time.monotonic()
            done = run(*self._command(proxy, container))
            proxy.init_seconds = time.monotonic() - begun
            if done.returncode:
                raise RuntimeError(f"{container['name']}: exit {done.returncode}\n{done.stderr}")

    def start_envoy(self, proxy: Proxy) -> None:
        for container in proxy.spec["containers"]:
            if "envoyproxy/envoy" in container["image"]:
                words, env = self._resolved(proxy, container)
                path = words[words.index("-c") + 1]
                more = [w for w in words if w not in ("-c", path, "--disable-hot-restart")]
                more = [self.localize(word, proxy.name, proxy.mounts) for word in more]
                place = proxy.root / path.lstrip("/")
                text = self.localize(place.read_text(), proxy.name, proxy.mounts)
                envoy = PodEnvoy(
                    text, proxy.root / "envoy", args=more, log_level="warning", start=False
                )
                envoy.take(text)
                if "--config-yaml" in more:  # laid over the file
                    over = yaml.safe_load(more[more.index("--config-yaml") + 1])
                    envoy.admin_url = admin_url_of(over["admin"]["address"])
                proxy.take(envoy)
                before = dict(os.environ)
                os.environ.update(env)
                envoy.start()
                for name in env.keys() - before.keys():
                    del os.environ[name]

    def await_startup(self, proxy: Proxy) -> None:
        """Envoy's startup probe: the pod gets no requests before it has passed."""
        for container in proxy.spec["containers"]:
            if probe := container.get("startupProbe", {}).get("httpGet"):
                url = proxy.url(probe["port"], probe["path"])
                wait_until(lambda url=url: fetch(url).status == 200, 20, url)  # type: ignore[misc]

    def start_loaders(self, proxy: Proxy) -> None:
        """Also waits until they watch."""
        for container in proxy.spec["containers"]:
            if "envoy-xds-configmap-loader" in container["image"]:
                before = self.api.watches
                proxy.loaders.append(Loader(*self._command(proxy, container)))
                wait_until(lambda before=before: self.api.watches > before)  # type: ignore[misc]

    def _mount(self, spec: Object, containers: list[Object], root: Path) -> list[str]:
        """Write the volumes below `root`; the paths where they are mounted."""
        mounts = []
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for container in containers:
            for mount in container.get("volumeMounts", []):
                place = root / mount["mountPath"].lstrip("/")
                place.mkdir(parents=True, exist_ok=True)
                mounts.append(mount["mountPath"])
                volume = volumes[mount["name"]]
                for field, kind, key in (
                    ("configMap", "ConfigMap", "name"),
                    ("secret", "Secret", "secretName"),
                ):
                    if field in volume:
                        found = self.api.get(kind, self.namespace, volume[field][key])
                        assert found is not None, volume
                        for file, text in found.get("data", {}).items():
                            content = base64.b64decode(text) if kind == "Secret" else text.encode()
                            (place / file).write_bytes(content)
        return mounts

    def pod(
        self,
        service: str,
        *,
        name: str = "",
        handler: Handler | None = None,
        zone: str = "a",
        publish: bool = True,
        tls: ssl.SSLContext | None = None,
        namespace: str = "",
    ) -> Backend:
        """A pod of a Service starts, is ready, and gets into its EndpointSlice."""
        namespace = namespace or self.namespace
        pod = f"{service}-{self._counts[service]}"
        self._counts[service] += 1
        found = self.api.get("Service", namespace, service)
        assert found is not None, f"no Service {service}"
        ip = self.ip(pod)
        backend = Backend(pod, service, ip, zone, [
            self.servers.serve(ip, port.get("targetPort", port["port"]),
                               handler or named(name or service), tls)
            for port in found["spec"]["ports"]
        ])  # fmt: skip
        self.backends[pod] = backend
        if publish:
            self.publish(service, namespace=namespace)
        return backend

    def join(self, service: str, ip: str, zone: str = "a") -> None:
        """A pod whose processes run already gets into the Service's EndpointSlice."""
        name = f"{service}-{self._counts[service]}"
        self._counts[service] += 1
        self.backends[name] = Backend(name, service, ip, zone, [])
        self.publish(service)

    def publish(self, service: str, draining: Iterable[str] = (), namespace: str = "") -> None:
        """The EndpointSlice of a Service, as its controller would write it now."""
        namespace = namespace or self.namespace
        found = self.api.get("Service", namespace, service)
        assert found is not None
        endpoints = []
        for pod in self.backends.values():
            if pod.service == service:
                going = pod.name in draining
                conditions = {"ready": not going, "serving": True, "terminating": going}
                endpoints.append({
                    "addresses": [pod.ip],
                    "conditions": conditions,
                    "zone": pod.zone,
                    "nodeName": NODES[pod.zone],
                })  # fmt: skip
        ports = [
            {"name": p.get("name", ""), "port": p.get("targetPort", p["port"]), "protocol": "TCP"}
            for p in found["spec"]["ports"]
        ]
        self.api.endpointslice(namespace, f"{service}-1", service, endpoints, ports)

    def stop_pod(self, pod: str, *, publish: bool = True) -> None:
        backend = self.backends.pop(pod)
        if publish:
            self.publish(backend.service)
        for server in backend.servers:
            self.servers.stop(server)

    def close(self) -> None:
        for proxy in self.proxies.values():
            proxy.close()
        self.client.close()
        self.api.close()
        self._held.close()


def kustomized(folder: Path, namespace: str) -> list[Object]:
    """What the examples use of `kubectl kustomize`: resources, patches, generators from files."""
    folder = folder.resolve()
    asked = yaml.safe_load((folder / "kustomization.yaml").read_text())
    made = [generated(folder, "ConfigMap", one) for one in asked.get("configMapGenerator", [])]
    made += [generated(folder, "Secret", one) for one in asked.get("secretGenerator", [])]
    for entry in asked.get("resources", []):
        path = folder / entry
        made += (
            kustomized(path, namespace) if path.is_dir()
            else [obj for obj in yaml.safe_load_all(path.read_text()) if obj]
        )  # fmt: skip
    for patch in asked.get("patches", []):
        over = yaml.safe_load((folder / patch["path"]).read_text())
        for at, obj in enumerate(made):
            if obj["kind"] == patch["target"]["kind"]:
                made[at] = {**overlay(obj, over), "metadata": obj["metadata"]}
    for obj in made:
        if obj["kind"] not in CLUSTER_WIDE:
            obj["metadata"].setdefault("namespace", asked.get("namespace", namespace))
    return made


def generated(folder: Path, kind: str, asked: Object) -> Object:
    """A ConfigMap or Secret of files and literals (its name without a hash)."""
    data = {}
    for entry in asked.get("files", []):
        key, _, path = entry.rpartition("=")
        data[key or path] = (folder / path).read_bytes()
    for entry in asked.get("literals", []):
        key, _, value = entry.partition("=")
        data[key] = value.encode()
    secret = kind == "Secret"
    text = {k: base64.b64encode(v).decode() if secret else v.decode() for k, v in data.items()}
    obj: Object = {"apiVersion": "v1", "kind": kind, "metadata": {"name": asked["name"]}}
    return {**obj, "data": text} | ({"type": asked["type"]} if "type" in asked else {})


def overlay(base: Any, patch: Any) -> Any:
    """A strategic merge, as far as the examples go: lists of named things merge by name."""
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = {key: overlay(base.get(key), value) for key, value in patch.items()}
        return {**base, **merged}
    if isinstance(base, list) and isinstance(patch, list):
        names = {item["name"] for item in patch}
        return [*patch, *(item for item in base if item["name"] not in names)]
    return patch


def kind_of(word: str) -> str:
    """`configmap`, `cm` or `ConfigMap`: the kind."""
    kinds: Mapping[str, str] = {kind.lower(): kind for kind in BY_KIND} | ALIASES
    return kinds[word.lower()]

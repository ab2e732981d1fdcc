"""For --check-cmd: asks Envoy whether it would accept a snapshot, the directory in argv[1]."""

import json
import pathlib
import subprocess
import sys
import tempfile

try:
    from yaml import safe_load as load
except ImportError:
    load = json.loads

HTTP = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3"
ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
MEMBERS = {"Cluster": "clusters", "Listener": "listeners", "Secret": "secrets"}
static = {"clusters": [], "listeners": [], "secrets": []}


def listener(routes):
    """Routes are checked within a listener."""
    router = {"name": "router", "typed_config": {"@type": ROUTER}}
    manager = {"@type": f"{HTTP}.HttpConnectionManager", "stat_prefix": "check",
               "route_config": {**routes, "validate_clusters": False}, "http_filters": [router]}
    filters = [{"name": "http", "typed_config": manager}]
    port = {"address": "127.0.0.1", "port_value": 0}
    return {"name": routes.get("name", "routes"), "address": {"socket_address": port},
            "filter_chains": [{"filters": filters}]}


for path in pathlib.Path(sys.argv[1]).rglob("*.[yj]*"):
    text = path.read_text().replace("/srv/runtime/current", sys.argv[1])
    try:
        resources = (load(text) or {}).get("resources", [])
    except Exception as error:
        sys.exit(f"{path.name}: {' '.join(str(error).split())}")
    for resource in resources:
        kind = resource.pop("@type").rpartition(".")[2]
        if kind in MEMBERS:
            static[MEMBERS[kind]].append(resource)
        elif kind == "RouteConfiguration":
            static["listeners"].append(listener(resource))

with tempfile.NamedTemporaryFile("w", suffix=".json") as bootstrap:
    json.dump({"node": {"id": "check", "cluster": "check"}, "static_resources": static}, bootstrap)
    bootstrap.flush()
    command = ["envoy", "--mode", "validate", "-c", bootstrap.name, "--log-level", "critical"]
    done = subprocess.run(command, capture_output=True, text=True)

print(" ".join(done.stderr.split()))  # the loader shows the last line
sys.exit(done.returncode)

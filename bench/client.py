"""The official Python client (PyPI: kubernetes), used in the plainest way: the same as floor.py.

client.py URL CA-FILE TOKEN-FILE NAMESPACE SELECTOR DIRECTORY [--once]
"""

import os
import sys
import urllib.parse

from kubernetes import client, watch

URL, CA_FILE, TOKEN_FILE, NAMESPACE, SELECTOR, DIRECTORY = sys.argv[1:7]


def write(configmap: client.V1ConfigMap) -> None:
    for key, text in (configmap.data or {}).items():
        with open(f"{DIRECTORY}/.new", "wb") as file:
            file.write(text.encode())
        os.rename(f"{DIRECTORY}/.new", f"{DIRECTORY}/{key}")


name, value = SELECTOR.split("=", 1)
selector = {
    {"fieldSelector": "field_selector", "labelSelector": "label_selector"}[name]:
    urllib.parse.unquote(value)
}
configuration = client.Configuration()
configuration.host, configuration.ssl_ca_cert = URL, CA_FILE
with open(TOKEN_FILE) as token_file:
    configuration.api_key = {"authorization": f"Bearer {token_file.read().strip()}"}
api = client.CoreV1Api(client.ApiClient(configuration))
if "--once" in sys.argv:
    for item in api.list_namespaced_config_map(NAMESPACE, **selector).items:
        write(item)
else:
    stream = watch.Watch().stream(api.list_namespaced_config_map, NAMESPACE, **selector)
    for event in stream:
        write(event["object"])

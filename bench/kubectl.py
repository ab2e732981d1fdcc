"""`kubectl get --watch -o json`, its output put into files: the same as floor.py.

kubectl.py URL CA-FILE TOKEN-FILE NAMESPACE SELECTOR DIRECTORY [--once]
"""

import json
import os
import subprocess
import sys
import urllib.parse

URL, CA_FILE, TOKEN_FILE, NAMESPACE, SELECTOR, DIRECTORY = sys.argv[1:7]


def write(configmap: dict[str, dict[str, str]]) -> None:
    for key, text in configmap.get("data", {}).items():
        with open(f"{DIRECTORY}/.new", "wb") as file:
            file.write(text.encode())
        os.rename(f"{DIRECTORY}/.new", f"{DIRECTORY}/{key}")


name, value = SELECTOR.split("=", 1)
option = {"fieldSelector": "--field-selector", "labelSelector": "--selector"}[name]
with open(TOKEN_FILE) as token_file:
    token = token_file.read().strip()
command = [
    *("kubectl", "--kubeconfig", "/dev/null", "--server", URL, "--certificate-authority", CA_FILE),
    *("--token", token, "--namespace", NAMESPACE, "--cache-dir", f"{DIRECTORY}/.cache"),
    *("get", "configmaps", option, urllib.parse.unquote(value), "--output", "json"),
    *(() if "--once" in sys.argv else ("--watch",)),
]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line == "}\n":
            document = json.loads("".join(lines))
            for item in document.get("items", [document]):
                write(item)
            lines.clear()

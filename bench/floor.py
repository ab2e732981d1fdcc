"""The floor: the plainest Python that does the work, one socket and one file at a time.

It promises nothing (no resume, no order, no crash safety): what is faster than this is not Python.

    floor.py URL CA-FILE TOKEN-FILE NAMESPACE SELECTOR DIRECTORY [--once]

SELECTOR is a query parameter, such as `fieldSelector=metadata.name%3Dx`.
"""

import http.client
import json
import os
import ssl
import sys

URL, CA_FILE, TOKEN_FILE, NAMESPACE, SELECTOR, DIRECTORY = sys.argv[1:7]
PATH = f"/api/v1/namespaces/{NAMESPACE}/configmaps?{SELECTOR}"


def write(configmap: dict[str, dict[str, str]]) -> None:
    for key, text in configmap.get("data", {}).items():
        with open(f"{DIRECTORY}/.new", "wb") as file:
            file.write(text.encode())
        os.rename(f"{DIRECTORY}/.new", f"{DIRECTORY}/{key}")


with open(TOKEN_FILE) as token_file:
    HEADERS = {"Authorization": f"Bearer {token_file.read().strip()}"}
context = ssl.create_default_context(cafile=CA_FILE)
server = http.client.HTTPSConnection(URL.removeprefix("https://"), context=context)
server.request("GET", PATH, headers=HEADERS)
listed = json.loads(server.getresponse().read())
for item in listed["items"]:
    write(item)
if "--once" not in sys.argv:
    version = listed["metadata"]["resourceVersion"]
    server.request("GET", f"{PATH}&watch=1&resourceVersion={version}", headers=HEADERS)
    for line in server.getresponse():
        write(json.loads(line)["object"])

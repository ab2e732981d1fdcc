"""Two Kubernetes clusters, an Envoy at the edge of each, and a forward proxy that crosses."""

from __future__ import annotations

import base64
import json
import os
import ssl
import time
from collections.abc import Sequence
from typing import Any

# Envoys are started beside gRPC's threads; they do not need what gRPC does for a fork.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
os.environ["GRPC_VERBOSITY"] = "ERROR"

import trustme
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from example.mesh.apps import Outbound, grpc_server
from example.support.cluster import Proxy
from example.support.pods import Fetched, Request, Response, fetch
from example.support.story import Story, milliseconds

CLUSTERS = "a b"

ca = trustme.CA()
signer = rsa.generate_private_key(65537, 2048)


def text64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def number64(number: int) -> str:
    return text64(number.to_bytes((number.bit_length() + 7) // 8, "big"))


def key_set() -> str:
    """The public half of `signer`, as a JWK set."""
    public = signer.public_key().public_numbers()
    key = {"kty": "RSA", "alg": "RS256", "use": "sig", "kid": "1",
           "n": number64(public.n), "e": number64(public.e)}  # fmt: skip
    return json.dumps({"keys": [key]})


def token(team: str) -> str:
    head = {"alg": "RS256", "typ": "JWT", "kid": "1"}
    claims = {"iss": "https://sso.example", "aud": "edge", "team": team,
              "exp": int(time.time()) + 600}  # fmt: skip
    signed = f"{text64(json.dumps(head).encode())}.{text64(json.dumps(claims).encode())}"
    signature = signer.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{signed}.{text64(signature)}"


def write_pair(story: Story, name: str, *names: str) -> None:
    """`<name>.crt` and `<name>.key`, for the kubectl commands of the README."""
    leaf = ca.issue_cert(*names)
    leaf.private_key_pem.write_to_path(str(story.root / f"{name}.key"))
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    (story.root / f"{name}.crt").write_bytes(chain)


def client(*names: str, authority: trustme.CA | None = ca) -> ssl.SSLContext:
    """A client's TLS, with a certificate of an authority for `names`, or with none."""
    context = ssl.create_default_context()
    ca.configure_trust(context)
    if authority is not None:
        authority.issue_cert(*names).configure_cert(context)
    return context


async def echo(request: Request) -> Response:
    """What a Service sees of a request."""
    seen = {
        "host": request.headers.get("host", ""),
        "who": request.headers.get("x-forwarded-client-cert", ""),
        "key": request.headers.get("x-api-key", ""),
    }
    return Response(json.dumps(seen))


def start(story: Story) -> dict[str, Proxy]:
    a, b = story.clusters["a"], story.clusters["b"]
    ca.cert_pem.write_to_path(str(story.root / "ca.crt"))
    for name, cluster in story.clusters.items():
        where = f"edge.{name}.example"
        a.names[where] = cluster.ip("edge")
        write_pair(story, f"edge-{name}", where, cluster.ip("edge"))
    write_pair(story, "winch", "winch.a.example")
    (story.root / "jwks-1.json").write_text(key_set())
    for _ in story.clusters:
        story.kubectl("kubectl --context")  # the edge's certificate
        story.kubectl("kubectl --context")  # the keys of tokens
        story.kubectl("kubectl --context")  # the edge itself
    for cluster, service in ((a, "hello"), (b, "reports"), (b, "orders")):
        cluster.pod(service, handler=echo)
    address = f"{b.ip('ledger-0')}:8080"
    story.at_end(grpc_server("ledger", address, lambda asked, _: {"booked": asked["amount"]}))
    b.join("ledger", b.ip("ledger-0"))
    proxies = {"edge-a": a.run("edge"), "edge-b": b.run("edge")}
    for _ in range(3):  # certificate, API key, the proxy
        story.kubectl("kubectl --context a")
    proxies["winch"] = a.run("winch")
    return proxies


def crossing(story: Story, winch: Proxy) -> None:
    story.title("Through winch: a plain request in cluster A, answered in cluster B")

    def ask(host: str) -> Fetched:
        return fetch(winch.url(15001), headers={"host": host})

    host = "reports.demo.svc.b.example"
    story.until(lambda: ask(host).status == 200, "an answer")
    found = ask(host)
    seen = found.json()
    story.say(f"  {host}: {found.body}")
    who = seen["who"].rpartition("DNS=")[2]
    value = f"{milliseconds(found.seconds)}; the Service sees {who}"
    story.claim("a request crosses", who == "winch.a.example", value)
    story.claim("the header from the Secret", seen["key"] == "s3cret", "arrived")
    home = ask("hello.demo.svc.a.example").status
    story.claim("the other edge, by its suffix", home == 200, home)
    calls = Outbound(f"{winch.ip}:15001", "demo", "b.example")
    story.at_end(calls.close)
    booked = calls.call("ledger", {"amount": 12}, ())
    story.claim("gRPC crosses", booked == {"booked": 12}, booked)


def refused(story: Story, edge: Proxy) -> None:
    story.title("At the edge of B itself")
    rows: list[tuple[str, str, dict[str, Any], Sequence[int]]] = [
        ("no certificate", "reports", {"tls": client(authority=None)}, [0]),
        ("a certificate of another CA", "reports",
         {"tls": client("winch.a.example", authority=trustme.CA())}, [0]),
        ("another client of our CA", "reports", {"tls": client("shop.a.example")}, [403]),
        ("the same, host in capitals", "REPORTS", {"tls": client("shop.a.example")}, [403]),
        ("the client that may", "reports", {"tls": client("winch.a.example")}, [200]),
        ("without a token", "orders", {"tls": client("shop.a.example")}, [401, 403]),
        ("with a token of team sales", "orders", {"tls": client("shop.a.example"),
                                                  "token": token("sales")}, [403]),
        ("with a token of team billing", "orders", {"tls": client("shop.a.example"),
                                                    "token": token("billing")}, [200]),
    ]  # fmt: skip
    for what, service, options, wanted in rows:
        headers = {"host": f"{service}.demo.svc.b.example"}
        if "token" in options:
            headers["authorization"] = f"Bearer {options['token']}"
        found = fetch(edge.url(8443, scheme="https"), headers=headers, tls=options["tls"])
        said = str(found.status) if found.status else "rejected in the handshake"
        story.claim(f"{service}, {what}", found.status in wanted, said)
        story.say(f"  {service}, {what}: {said}")


def appearing(story: Story, proxies: dict[str, Proxy]) -> None:
    story.title("A Service appears in cluster B")
    winch, b = proxies["winch"], story.clusters["b"]
    headers = {"host": "stock.demo.svc.b.example"}
    before = fetch(winch.url(15001), headers=headers).status
    sent = story.kubectl("kubectl --context b apply")
    b.pod("stock", handler=echo)
    now = story.until(
        lambda: fetch(winch.url(15001), headers=headers).status == 200, "an answer from stock"
    )
    took = f"after {milliseconds(now - sent)}"
    story.say(f"  reachable from cluster A {took}")
    story.claim("a new Service, reachable from A", before != 200, took)
    name = "cluster.demo/stock/http.upstream_cx_total"
    story.until(lambda: proxies["edge-b"].envoy.count(name) > 1, "a connection kept warm")
    story.claim("connections kept warm behind the edge", True,
                f"{proxies['edge-b'].envoy.count(name)} for one request at a time")  # fmt: skip


def tell(story: Story) -> None:
    proxies = start(story)
    winch = proxies["winch"]
    crossing(story, winch)
    poller = story.load(winch.url(15001), host="reports.demo.svc.b.example", interval=0.01)
    refused(story, proxies["edge-b"])
    appearing(story, proxies)
    story.watch(lambda: [f"  {len(poller.answers)} requests crossed, "
                         f"{len(poller.failed)} failed"])  # fmt: skip
    story.verdict([poller], list(proxies.values()))
    host, door = "-H 'Host: reports.demo.svc.b.example'", proxies["edge-b"]
    story.play([
        f"curl -s {host} {winch.url(15001)}",
        f"curl -k {host} {door.url(8443, scheme='https')}    # rejected: no certificate",
    ])  # fmt: skip

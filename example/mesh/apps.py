"""The shop: frontend, order, user and item. HTTP in front, gRPC behind, JSON in both.

An application here does two things that it must do in any mesh: it calls others through its own
Envoy, and it hands on the headers of the trace that its request came with.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from example.support.pods import Request, Response

Message = dict[str, Any]
Headers = Sequence[tuple[str, str]]
TRACE = ("x-request-id", "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled")


def to_bytes(message: Message) -> bytes:
    return json.dumps(message).encode()


def trace_of(headers: Mapping[str, str]) -> Headers:
    return [(name, headers[name]) for name in TRACE if name in headers]


class Outbound:
    """Calls other services, all through one listener of the own Envoy."""

    def __init__(self, address: str, namespace: str, suffix: str = "cluster.local") -> None:
        self._address, self._domain = address, f"{namespace}.svc.{suffix}"
        self._channels: dict[str, grpc.Channel] = {}

    def call(self, service: str, message: Message, trace: Headers) -> Message:
        if service not in self._channels:
            name = f"{service}.{self._domain}"
            options = [("grpc.default_authority", name), ("grpc.use_local_subchannel_pool", 1)]
            self._channels[service] = grpc.insecure_channel(self._address, options)
        method = self._channels[service].unary_unary(
            f"/shop.{service.capitalize()}/Get", to_bytes, json.loads
        )
        reply: Message = method(message, timeout=5, metadata=list(trace))
        return reply

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()


Answer = Callable[[Message, Headers], Message]


def grpc_server(service: str, address: str, answer: Answer) -> Callable[[], object]:
    """One method, `/shop.<Service>/Get`; what ends it."""

    def get(message: Message, context: grpc.ServicerContext) -> Message:
        return answer(message, trace_of(dict(context.invocation_metadata())))

    handler = grpc.unary_unary_rpc_method_handler(get, json.loads, to_bytes)
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(f"shop.{service.capitalize()}", {"Get": handler})]
    )
    server.add_insecure_port(address)
    server.start()
    return lambda: server.stop(None).wait(2)


def user(message: Message, trace: Headers) -> Message:
    return {"name": f"user {message['id']}"}


def item(message: Message, trace: Headers) -> Message:
    return {"title": f"item {message['id']}", "price": 3}


def order(outbound: Outbound) -> Answer:
    """Who ordered what: asks user and item."""

    def answer(message: Message, trace: Headers) -> Message:
        buyer = outbound.call("user", {"id": 1}, trace)
        goods = outbound.call("item", {"id": message["id"]}, trace)
        return {"id": message["id"], "buyer": buyer["name"], "goods": goods["title"]}

    return answer


def frontend(outbound: Outbound) -> Callable[[Request], Any]:
    """`GET /order/7` in HTTP/1.1."""

    async def answer(request: Request) -> Response:
        number = int(request.path.rpartition("/")[2] or 0)
        found = await asyncio.to_thread(
            outbound.call, "order", {"id": number}, trace_of(request.headers)
        )
        return Response(json.dumps(found), headers={"content-type": "application/json"})

    return answer

"""A DNS server on loopback that knows one address for every name."""

from __future__ import annotations

import socket
import threading
from typing import Any


class Resolver:
    """Answers each A query with `address`, and everything else with nothing."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self._answer = socket.inet_aton(address)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.asked: list[str] = []

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a Cluster that make Envoy ask this server."""
        where = {"address": "127.0.0.1", "port_value": self._socket.getsockname()[1]}
        options = {"no_default_search_domain": True}
        resolution = {"resolvers": [{"socket_address": where}], "dns_resolver_options": options}
        return {"dns_resolution_config": resolution}

    def _serve(self) -> None:
        while True:
            query, peer = self._socket.recvfrom(512)
            if not query:
                return
            end, labels = 12, []
            while query[end]:
                labels.append(query[end + 1 : end + 1 + query[end]].decode())
                end += query[end] + 1
            self.asked.append(".".join(labels))
            question = query[12 : end + 5]
            found = question[-4:-2] == b"\0\1"
            header = query[:2] + b"\x81\x80\0\1\0" + bytes([found]) + b"\0\0\0\0"
            record = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + self._answer
            self._socket.sendto(header + question + (record if found else b""), peer)

    def __enter__(self) -> Resolver:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        # A close alone does not wake a thread in recvfrom; an empty datagram does.
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join(5)
        self._socket.close()

"""A certificate authority for tests: the API server's certificate, and a client's."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

import trustme


class Pair(NamedTuple):
    """A certificate and its private key, as the files that a command line names."""

    cert: Path
    key: Path


class Authority:
    """A CA of its own; `ca_file` is what a client trusts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._ca = trustme.CA()
        self.ca_file = directory / "ca.crt"
        self._ca.cert_pem.write_to_path(str(self.ca_file))

    def server_context(self, *names: str, client_ca: Authority | None = None) -> ssl.SSLContext:
        """For `ApiServer(tls=...)`; with `client_ca` a client needs a certificate of that CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(*(names or ("127.0.0.1", "localhost"))).configure_cert(context)
        if client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            client_ca._ca.configure_trust(context)
        return context

    def pair(self, *names: str) -> Pair:
        """A certificate for `names` (a server's or a client's), written beside the CA."""
        leaf = self._ca.issue_cert(*names)
        stem = names[0].replace("/", "_").replace("*", "any")
        pair = Pair(self.directory / f"{stem}.crt", self.directory / f"{stem}.key")
        pair.cert.unlink(missing_ok=True)
        for blob in leaf.cert_chain_pems:
            blob.write_to_path(str(pair.cert), append=True)
        leaf.private_key_pem.write_to_path(str(pair.key))
        return pair

"""A loader in an odd environment: other constants, a clock that jumps, a DNS that is gone.

    python -I -S tests/support/tuned.py SETTINGS python -I -S LOADER ARGUMENTS...

SETTINGS is JSON: `{"constants": {"WATCH_SILENCE": 1.0}, "clock": true, "dns": "/path/of/flag"}`.
The clock is time.time() alone: time.monotonic() does not jump. Names are not resolved while the
flag file exists.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any


def tuned(
    constants: Mapping[str, object] | None = None, *, clock: bool = False, dns: str = ""
) -> list[str]:
    """The words to put before the usual command."""
    settings = {"constants": dict(constants or {}), "clock": clock, "dns": dns}
    python = os.environ.get("LOADER_PYTHON") or sys.executable
    return [python, "-I", "-S", __file__, json.dumps(settings)]


def jumping() -> None:
    true = time.time
    chosen = random.Random(1)
    # Days and years ahead and back, the epoch itself, and the second before.
    jumps = (0.0, 86_400.0, -86_400.0, 3e9, -1e9, -3_600.0, 0.001)
    time.time = lambda: max(0.0, true() + chosen.choice(jumps))


def without_dns(flag: str) -> None:
    true = socket.getaddrinfo

    def resolved(*args: Any, **more: Any) -> Any:
        if os.path.exists(flag):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return true(*args, **more)

    socket.getaddrinfo = resolved


def main(argv: list[str]) -> int:
    text, _, _, _, module, *arguments = argv
    settings = json.loads(text)
    if settings["clock"]:
        jumping()
    if settings["dns"]:
        without_dns(settings["dns"])
    sys.path.insert(0, os.path.dirname(module))
    import loader

    for name, value in settings["constants"].items():
        assert hasattr(loader, name), name
        setattr(loader, name, value)
    return loader.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

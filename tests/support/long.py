"""How long to look: `make soak` sets LONG=1 and runs for hours what the suite runs briefly."""

from __future__ import annotations

import os

LONG = os.environ.get("LONG", "") not in ("", "0")


def times(short: int, *, long: int) -> int:
    """How many of something: in the suite, and in the long run."""
    return long if LONG else short

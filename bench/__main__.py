"""`python -m bench`: every figure, in one table and one run; QUICK=1 in the environment: shorter.

`python -m bench latency cold` measures only these; `--list` names them. OTHER='COMMAND ...' in the
environment puts another program beside them (see bench/stage.py). Nothing here passes or fails:
figures of one run can be compared with each other, and only with the noise in mind.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import changes, fanout, machine, services
from bench.stage import CLIENT, FLOOR, KUBECTL, LOADER, OTHER, Row, Stage, contenders, tmpfs

Part = Callable[[Stage, list[str], bool], list[Row]]
PARTS: dict[str, Part] = {
    "latency": changes.measure,
    "disk": changes.on_disk,
    "cold": changes.cold,
    "memory": lambda stage, kinds, quick: changes.memory(stage),
    "selector": changes.selector,
    "note": lambda stage, kinds, quick: changes.note(stage, quick),
    "asked": lambda stage, kinds, quick: changes.asked(stage, quick),
    "files": lambda stage, kinds, quick: changes.files(stage, quick),
    "services": lambda stage, kinds, quick: services.measure(stage, quick),
    "fanout": lambda stage, kinds, quick: fanout.measure(stage, quick),
}


def main(argv: Sequence[str]) -> int:
    if "--list" in argv:
        print("\n".join(PARTS))
        return 0
    unknown = [name for name in argv if name not in PARTS]
    if unknown:
        print(f"bench: no part {', '.join(unknown)}; one of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    quick = os.environ.get("QUICK", "") not in ("", "0")
    gc.disable()  # the API server is in this process: its pauses would be everybody's
    began = time.monotonic()
    before = machine.noise()
    found = contenders()
    rows: list[Row] = []
    for name in argv or PARTS:
        print(f"bench: {name} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        where = None if name == "disk" else tmpfs()
        with (
            tempfile.TemporaryDirectory(prefix="bench-", dir=where) as root,
            Stage(Path(root)) as stage,
        ):
            rows += PARTS[name](stage, found, quick)
        gc.collect()
        print(f"bench: {name} {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(report(rows, found, before, machine.noise(), time.monotonic() - began))
    return 0


def report(
    rows: Sequence[Row],
    found: Sequence[str],
    before: machine.Noise,
    after: machine.Noise,
    seconds: float,
) -> str:
    """The table (Markdown), under what the machine was like."""
    columns = [kind for kind in (LOADER, FLOOR, CLIENT, KUBECTL, OTHER) if kind in found]
    absent = [kind for kind in (CLIENT, KUBECTL) if kind not in found]
    lines = [
        f"{machine.describe()}; Python {sys.version.split()[0]}; {seconds:.0f} s",
        f"noise before: {before}",
        f"noise after:  {after}",
        *(f"not installed here: {kind}" for kind in absent),
        "",
    ]
    table = [["", *columns, "aim"], *([row.measure, *cells(row, columns), row.aim] for row in rows)]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns) + 2)]
    for index, line in enumerate(table):
        joined = " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        lines.append(f"| {joined} |")
        if index == 0:
            lines.append("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    return [row.values.get(kind, "") for kind in columns]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

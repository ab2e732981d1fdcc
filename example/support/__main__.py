"""`python -m example.support NAME`: tells `example/NAME/story.py`; see the scripts `verify`."""

from __future__ import annotations

import importlib
import sys

from example.support.story import Story


def main(name: str) -> int:
    module = importlib.import_module(f"example.{name}.story")
    with Story(name, sys.argv[2:], getattr(module, "CLUSTERS", "")) as story:
        module.tell(story)
    return story.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

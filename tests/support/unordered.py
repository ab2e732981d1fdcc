"""The loader with its order switched off: every change is one snapshot. The test of the tests.

python unordered.py <interpreter> -I -S <path>/loader.py <arguments...>
"""

from __future__ import annotations

import os
import sys


def main(argv: list[str]) -> int:
    _, _, _, module, *arguments = argv
    sys.path.insert(0, os.path.dirname(module))
    import loader

    def at_once(
        published: loader.Files, target: loader.Files, refused: object = None
    ) -> loader.Step | None:
        """The target itself."""
        changed = loader.moved_paths(published, target)
        removed = tuple(sorted(published.keys() - target.keys()))
        if not changed and not removed:
            return None
        order = tuple(loader.notify_order(changed, target))
        return loader.Step(dict(target), loader.CHILDREN, order, removed, "without order")

    loader.next_step = at_once
    return loader.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

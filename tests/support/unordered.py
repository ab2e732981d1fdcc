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

    def at_once(published: loader.Files, desired: loader.Files) -> loader.Step | None:
        """What is desired itself."""
        if loader.same_files(published, desired):
            return None
        return loader.Step(desired, loader.CHILDREN)

    loader.next_step = at_once
    return loader.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

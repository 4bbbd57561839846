"""`python -m attar`: the same as the `attar` command, also under `torchrun -m`."""

from __future__ import annotations

import sys

from attar.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())

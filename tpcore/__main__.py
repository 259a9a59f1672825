"""`python -m tpcore` and `torchrun -m tpcore` are the `tpcore` command."""

from __future__ import annotations

import sys

from tpcore.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m teal_cli` is `teal`."""

from __future__ import annotations

import sys

from teal_cli.app import main

if __name__ == "__main__":
    sys.exit(main())

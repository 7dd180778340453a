"""These tests run Triton's interpreter, which must be chosen before Triton is imported.

They are therefore collected only where TRITON_INTERPRET=1; `tests/kernels/test_interpreted.py` runs them so, each file
in a process of its own.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from kernel_interpreter import repair

    repair()
else:
    collect_ignore_glob = ["test_*.py"]

"""Fixtures come from the `fixtures_*.py` modules beside this file."""

from __future__ import annotations

import os

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Before torch is imported: processes that each use every core wait for each other's threads most of the time.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

pytest_plugins = [
    "fixtures_cli", "fixtures_tiny", "fixtures_real", "fixtures_hub", "fixtures_ready", "fixtures_talker",
    "fixtures_s3",
]  # fmt: skip

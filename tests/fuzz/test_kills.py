"""A few runs of a tiny model, each ended at a random moment; `python -m tests.fuzz.kills` tries more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_whatever_ends_a_run_the_store_ends_whole(ready: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.fuzz.kills", "--runs", "3", "--model", "tiny", "--backend", "reference"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGINT 1, SIGKILL 1, SIGTERM 1" in done.stdout

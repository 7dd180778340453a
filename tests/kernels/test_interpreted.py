"""Run every file under `interpreted/` with Triton's interpreter, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ALONE = ("test_gpu_step_model.py", "test_oracle.py", "test_oracle_packed.py", "test_sparse_gemv.py")
"""Files that take longer than a process takes to begin, which may run side by side."""
OTHERS = sorted({path.name for path in (HERE / "interpreted").glob("test_*.py")} - set(ALONE))


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only")
@pytest.mark.timeout(1200)  # whole files, on a machine that may be slow or busy
@pytest.mark.parametrize("names", [*([name] for name in ALONE), OTHERS], ids=[*ALONE, "others"])
def test_under_the_interpreter(names):
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    # Options of the outer run (`-n 4`) are not for this one, which has no plugins to take them.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(HERE / "interpreted" / name) for name in names)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout

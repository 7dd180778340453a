"""A way to run `teal` inside the test's own process, as `main` runs it: exit code, stdout, stderr."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from teal_cli.app import main

HEAVY = {
    "torch",
    "triton",
    "transformers",
    "datasets",
    "zarr",
    "huggingface_hub",
    "numpy",
    "pandas",
    "prompt_toolkit",
    "pyarrow",
    "xarray",
}
"""What only computing needs: nothing that merely talks may import it."""


def interruptible() -> None:
    """For `Popen(preexec_fn=...)`: a child of a job in the background inherits an ignored SIGINT, and keeps it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Result(NamedTuple):
    """What one run of the command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as the one JSON object it must be with --json."""
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        """With --json: the error object, which is the last line of stderr."""
        return json.loads(self.err.splitlines()[-1])["error"]


Teal = Callable[..., Result]


@pytest.fixture
def teal_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty registry of this test's own, and no setting from the machine the tests run on."""
    home = tmp_path / "teal-home"
    monkeypatch.setenv("TEAL_HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return home


@pytest.fixture
def teal(teal_home: Path, capsys: pytest.CaptureFixture[str]) -> Teal:
    """Run `teal ARGS...` and give back (code, out, err)."""

    def run(*args: object) -> Result:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return Result(code, *capsys.readouterr())

    return run

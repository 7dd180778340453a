"""A tiny model that is registered and calibrated, for tests that decode through the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from teal_cli.registry.download import fetch
from teal_cli.registry.registry import Registry
from teal_cli.runs.calibrate import Text, calibrate


@pytest.fixture(scope="session")
def ready_home(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A $TEAL_HOME with the model "tiny" and one calibration of it. Not to be written to: take `ready`."""
    registry = Registry(tmp_path_factory.mktemp("ready") / "home")
    fetch(str(tiny("llama3")), registry=registry, name="tiny")
    for _ in calibrate(registry, "tiny", Text("python-docs", num_sequences=2, seq_len=64), device=torch.device("cpu")):
        pass
    return registry.home


@pytest.fixture
def ready(ready_home: Path, teal_home: Path) -> Path:
    """This test's own copy of `ready_home`, which $TEAL_HOME names."""
    shutil.copytree(ready_home, teal_home, dirs_exist_ok=True)
    return teal_home

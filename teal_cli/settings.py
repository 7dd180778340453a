"""Where a value comes from: command line > TEAL_* variable > ./teal.toml > user config > shipped defaults.

Every setting has one entry in `KEYS`, and every resolved value carries its source, so that `teal doctor` can say why a
run used what it used. This file knows the names and kinds of settings; what they mean is the business of the commands.
It imports nothing heavy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


def configs() -> Traversable:
    """The shipped `configs/` folder: `configs() / "models"` is a folder of TOML files, in a wheel as in a checkout."""
    from importlib.resources import files

    try:
        return files("teal_cli.configs")
    except ModuleNotFoundError:  # a checkout on PYTHONPATH that nobody installed
        return Path(__file__).parent.parent / "configs"


def teal_home() -> Path:
    """The folder that holds the registry: `$TEAL_HOME`, else the user's data folder of this platform."""
    if home := os.environ.get("TEAL_HOME"):
        return Path(home).expanduser()
    from platformdirs import user_data_path

    return user_data_path("teal", appauthor=False)

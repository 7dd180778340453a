"""Searches for plans that are under way, so that one that was stopped goes on where it was."""

from __future__ import annotations

import io
import json
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from teal_cli.files import disk_errors, read_json, write_bytes, write_json
from teal_kernels.spec import PROJECTIONS

_KEEP_EVERY_S: Final = 30.0
"""Seconds between two states of a descent that are kept: a step may be faster than the disk."""


@dataclass
class SavedSearch:
    """What is known of a search, in a file beside the plan that is being made.

    Attributes:
        settings: as JSON values; what was found with others is not used.
    """

    file: Path
    settings: Mapping[str, Any]

    def remove(self) -> None:
        """Forget it: the plan is there."""
        self.file.unlink(missing_ok=True)


@dataclass
class SavedLevels(SavedSearch):
    """The levels of a greedy search, a layer after the other."""

    def load(self) -> Sequence[NDArray[np.float64]]:
        """The levels [T, 7] of each layer that is done; none where there is no such file, or one of other settings."""
        try:
            state = read_json(self.file)
            found = np.array(state["levels"], np.float64)
            usable = state["settings"] == self.settings and found.ndim == 3 and found.shape[2] == len(PROJECTIONS)
        except (OSError, ValueError, KeyError, TypeError):
            return ()
        return tuple(found) if usable and ((found >= 0) & (found < 1)).all() else ()

    def keep(self, levels: NDArray[np.float64]) -> None:
        """Keep the levels [n, T, 7] of all layers so far.

        Raises:
            TealError: the disk refuses.
        """
        with disk_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, {"settings": dict(self.settings), "levels": levels.tolist()})


@dataclass
class SavedDescent(SavedSearch):
    """The state of a descent, step by step."""

    _kept: float = field(default_factory=time.monotonic, init=False)

    def load(self) -> dict[str, Any] | None:
        """The last state; None where there is no such file, or one of other settings."""
        try:
            found = torch.load(self.file, map_location="cpu", weights_only=True)
            return dict(found["state"]) if json.loads(found["settings"]) == self.settings else None
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError):
            return None

    def keep(self, state: Mapping[str, Any], *, last: bool) -> None:
        """Keep a state, if the one before it was kept some time ago or this is the last.

        Raises:
            TealError: the disk refuses.
        """
        if not last and time.monotonic() - self._kept < _KEEP_EVERY_S:
            return
        content = io.BytesIO()
        torch.save({"settings": json.dumps(dict(self.settings)), "state": dict(state)}, content)
        with disk_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.file, [content.getvalue()])
        self._kept = time.monotonic()

"""Levels of a greedy search that is under way, so that one that was stopped goes on after its last whole layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teal_cli.files import disk_errors, read_json, write_json
from teal_kernels.spec import PROJECTIONS


@dataclass(frozen=True)
class SavedLevels:
    """A file beside the plan that is being made.

    Attributes:
        settings: as JSON values; levels that were found with others are not used.
    """

    file: Path
    settings: Mapping[str, Any]

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

    def remove(self) -> None:
        """Forget them: the plan is there."""
        self.file.unlink(missing_ok=True)

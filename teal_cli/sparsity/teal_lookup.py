"""TEAL's own greedy plans: the `lookup/layer-*/results.csv` that its authors publish.

Each file is the path of one block: a row a step, with the level of every projection and the sparsity of the block as
TEAL computed it. That sparsity rests on a table of weight shares, which is wrong for some models; here a row is chosen
by the model's own matrices, and shares that differ are told.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from teal_cli.errors import NotFoundError, TealError
from teal_cli.files import unread
from teal_kernels.spec import PROJECTIONS

_LAYER: Final = re.compile(r"layer-(\d{1,5})")
_EFFECTIVE: Final = "Effective Sparsity"
_CLOSE: Final = 0.002
"""Shares closer than this are equal: levels are multiples of 0.05."""


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """Levels of every block at one target.

    Attributes:
        levels: float64 [layers, 7].
        wrong: projections whose share of the block TEAL's table has wrong: (its share, the true one).
    """

    levels: NDArray[np.float64]
    wrong: dict[str, tuple[float, float]]


def read_lookup(folder: Path, layers: int, sizes: NDArray[np.float64], target: float) -> Lookup:
    """Read the rows of a target.

    Args:
        folder: `lookup/`, or a folder that holds one.
        layers: of the model.
        sizes: [7], entries of each projection's matrix in one layer.
        target: part of each block's bytes to drop.

    Raises:
        NotFoundError: no such folder, or no layers in it.
        TealError: a layer is missing, or a file is no such table or ends before the target.
    """
    folder = folder / "lookup" if (folder / "lookup").is_dir() else folder
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {folder}", hint="name the `lookup` folder that TEAL wrote for a model")
    found = {int(match[1]) for entry in folder.iterdir() if (match := _LAYER.fullmatch(entry.name))}
    if not found:
        raise NotFoundError(
            f"{folder} has no folders layer-0, layer-1, ...: it is not one of TEAL's lookup/",
            hint="name the `lookup` folder that TEAL wrote for a model",
        )
    if found != set(range(layers)):
        missing = sorted(set(range(layers)) - found) or sorted(found - set(range(layers)))
        raise TealError(
            f"{folder} has {len(found)} layers, and the model has {layers}; the first that differs is {missing[0]}",
            hint="name the model that they were made for with -m",
        )
    levels = np.empty((layers, len(PROJECTIONS)))
    shares: dict[str, tuple[float, float]] = {}
    for layer in range(layers):
        path, effective = _read(folder / f"layer-{layer}" / "results.csv")
        true = path @ sizes / sizes.sum()
        reached = np.flatnonzero(true >= target - 1e-9)
        if not len(reached):
            raise TealError(f"{folder / f'layer-{layer}'} ends at a sparsity of {true.max():.3f}, before {target:g}")
        levels[layer] = path[reached[0]]
        shares |= _wrong_shares(path, effective, sizes)
    return Lookup(levels, shares)


def _read(file: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Levels [rows, 7] and TEAL's sparsity [rows] of one file."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        path = np.array([[float(row[projection]) for projection in PROJECTIONS] for row in rows])
        effective = np.array([float(row[_EFFECTIVE]) for row in rows])
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise TealError(f"{file} is not one of TEAL's results.csv: {unread(error)}") from error
    if not len(path) or not ((path >= 0) & (path <= 1)).all() or not np.isfinite(effective).all():
        raise TealError(f"{file} holds levels outside [0, 1]")
    return path, effective


def _wrong_shares(
    path: NDArray[np.float64], effective: NDArray[np.float64], sizes: NDArray[np.float64]
) -> dict[str, tuple[float, float]]:
    """What TEAL's table says of each projection that was raised by itself, where it differs from the model."""
    wrong = {}
    steps, gains = np.diff(path, axis=0, prepend=0.0), np.diff(effective, prepend=0.0)
    for column, projection in enumerate(PROJECTIONS):
        alone = np.flatnonzero((steps[:, column] > 0) & (np.count_nonzero(steps, axis=1) == 1))
        if len(alone):
            told = float(np.median(gains[alone] / steps[alone, column]))
            true = float(sizes[column] / sizes.sum())
            if abs(told - true) > _CLOSE:
                wrong[projection] = (told, true)
    return wrong

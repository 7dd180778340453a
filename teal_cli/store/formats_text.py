"""Forms that are text: Matrix Market, the DLMC dataset's .smtx and FROSTT's .tns. 9 digits give a float32 back."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import numpy as np

from teal_cli.store.packing import to_float
from teal_cli.store.part import Part


def write_mtx(part: Part, folder: Path) -> Path:
    """Matrix Market, coordinate, counting from 1; the comment says where it comes from."""
    path = part.file(folder, ".mtx")
    rows = part.csr()
    token = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    spans = ", ".join(f"{span.start}:{span.stop}" for span in part.spans)
    with path.open("w", encoding="utf-8") as file:
        file.write("%%MatrixMarket matrix coordinate real general\n")
        file.write(f"% {part.level.name}, layer {part.layer}, {part.name}; tokens {spans}\n")
        file.write(f"{rows.shape[0]} {rows.shape[1]} {len(rows.data)}\n")
        np.savetxt(file, np.stack([token + 1, rows.indices + 1, rows.data], axis=1), fmt="%d %d %.9g")
    return path


def write_smtx(part: Part, folder: Path) -> Path:
    """DLMC: a line `rows, columns, nonzeros`, a line of row offsets, a line of column indices, counting from 0."""
    path = part.file(folder, ".smtx")
    rows = part.csr()
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{rows.shape[0]}, {rows.shape[1]}, {len(rows.data)}\n")
        for numbers in (rows.indptr, rows.indices):
            _write_numbers(file, numbers)
    return path


def _write_numbers(file: TextIO, numbers: np.ndarray) -> None:
    file.write(" ".join(map(str, numbers.tolist())) + "\n")


def write_tns(part: Part, folder: Path) -> Path:
    """FROSTT: `<level>/<name>.tns`, a tensor [layer, row, channel]; a line per entry, its indices from 1 and its value.

    The parts of a level and name go to one file, layer after layer; layers are numbered as in the model.
    """
    path = folder / part.level.name / f"{part.name}.tns"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for first, block in part.blocks():
            row, channel = np.nonzero(block.kept)
            layer = np.full(len(row), part.layer + 1)
            entries = [layer, first + row + 1, channel + 1, to_float(block.values).astype(np.float64)]
            np.savetxt(file, np.stack(entries, axis=1), fmt="%d %d %d %.9g")
    return path

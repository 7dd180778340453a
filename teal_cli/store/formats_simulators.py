"""Forms for simulators of accelerators, made of measured densities: SCALE-Sim v3 layers and Timeloop problems.

Each projection is the product of one decode step: a row of K channels, of which the density is kept, times a dense
[K, N] matrix. Neither simulator takes a mask: masks, values and their structure are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from teal_cli.store.part import Part

RATIO: Final = 64
"""SCALE-Sim takes a density as so many of a group of channels; 1/128 is the most that rounding loses."""


def density(part: Part) -> float:
    """Share of the part's entries that are kept."""
    rows, channels = part.shape
    return sum(int(block.row_nnz.sum()) for _, block in part.blocks()) / (rows * channels)


def write_scalesim(part: Part, folder: Path) -> Path:
    """`<level>.csv`, a GEMM topology: a line for each layer and name, M = 1, N outputs, K channels, and the ratio.

    SCALE-Sim's ratio says which rows of a filter are read, the same ones for every output: just what a dropped channel
    spares. Set `SparsitySupport = true` and `OptimizedMapping = false`, and read it with `-i gemm`.
    """
    path = folder / f"{part.level.name}.csv"
    with path.open("a", encoding="utf-8") as file:
        if not file.tell():
            file.write("Layer, M, N, K, Sparsity,\n")
        kept = max(1, round(density(part) * RATIO))
        file.write(f"layer_{part.layer}_{part.name}, 1, {part.outputs}, {part.shape[1]}, {kept}:{RATIO},\n")
    return path


def write_timeloop(part: Part, folder: Path) -> Path:
    """A Timeloop problem with Sparseloop's densities: inputs kept at random places (hypergeometric), the rest dense."""
    path = part.file(folder, ".yaml")
    about = f"{part.level.name}, layer {part.layer}, {part.name}: one decode step, density of {part.shape[0]} rows"
    path.write_text(
        f"""# {about}
problem:
  version: 0.4
  shape:
    name: gemm
    dimensions: [M, N, K]
    data_spaces:
      - name: Inputs
        projection: [[[M]], [[K]]]
      - name: Weights
        projection: [[[K]], [[N]]]
      - name: Outputs
        projection: [[[M]], [[N]]]
        read_write: true
  instance:
    M: 1
    N: {part.outputs}
    K: {part.shape[1]}
    densities:
      Inputs: {{distribution: hypergeometric, density: {density(part):.6f}}}
      Weights: {{distribution: fixed-structured, density: 1.0}}
      Outputs: {{distribution: fixed-structured, density: 1.0}}
""",
        encoding="utf-8",
    )
    return path

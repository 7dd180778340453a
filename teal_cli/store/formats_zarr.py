"""Forms that are Zarr v3: dense arrays, and CSR as AnnData lays it out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
from zarr.storage import LocalStore

from teal_cli.store.packing import to_float
from teal_cli.store.part import Part

_ENCODING: Final = {
    name: {"encoding-type": name, "encoding-version": version}
    for name, version in (
        ("anndata", "0.1.0"),
        ("array", "0.2.0"),
        ("csr_matrix", "0.1.0"),
        ("dataframe", "0.2.0"),
        ("dict", "0.1.0"),
        ("string-array", "0.2.0"),
    )
}


def write_zarr(part: Part, folder: Path) -> Path:
    """The folder is one group; `<level>/layer_<n>/<name>` is an array [R, K], and `<level>` has the token columns."""
    root = zarr.open_group(LocalStore(folder), mode="a")
    new = part.level.name not in root
    level = root.require_group(part.level.name)
    if new:
        for name, column in part.tokens().items():
            level.create_array(name, data=column, dimension_names=("token",))
    group = level.require_group(f"layer_{part.layer}")
    array = group.create_array(
        part.name,
        shape=part.shape,
        chunks=(part.level.store.header.block_tokens, part.shape[1]),
        dtype=part.array.dtype,
        dimension_names=("token", f"channel_{part.site}"),
        attributes={"projections": list(part.projections()), "thresholds": part.thresholds().tolist()},
    )
    for row, block in part.blocks():
        array[row : row + len(block.row_nnz)] = to_float(block.dense())
    return folder / part.level.name / f"layer_{part.layer}" / part.name


def write_anndata(part: Part, folder: Path) -> Path:
    """`<level>/layer_<n>/<name>.zarr`, which `anndata.read_zarr` reads: X is CSR [R, K], obs has the token columns.

    Observations are named by the row's index in the level, variables by the channel.
    """
    path = part.file(folder, ".zarr")
    root = _group(zarr.open_group(LocalStore(path), mode="w"), "anndata")
    rows = part.csr()
    X = _group(root.create_group("X"), "csr_matrix", shape=list(rows.shape))
    data = rows.data.astype(np.float32, copy=False)
    for name, values in (("data", data), ("indices", rows.indices), ("indptr", rows.indptr)):
        X.create_array(name, data=values)
    index = np.concatenate([np.arange(span.start, span.stop) for span in part.spans])
    _frame(root.create_group("obs"), index, part.tokens())
    _frame(root.create_group("var"), np.arange(rows.shape[1]), {})
    for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
        _group(root.create_group(name), "dict")
    _array(root["uns"], "thresholds", part.thresholds())
    return path


def _group(group: zarr.Group, kind: str, **more: Any) -> zarr.Group:
    group.attrs.put(_ENCODING[kind] | more)
    return group


def _array(group: Any, name: str, values: np.ndarray) -> None:
    group.create_array(name, data=values, attributes=dict(_ENCODING["array"]))


def _frame(group: zarr.Group, index: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
    _group(group, "dataframe", **{"_index": "_index", "column-order": list(columns)})
    names = group.create_array(
        "_index",
        shape=index.shape,
        chunks=(max(1, len(index)),),
        dtype="string",
        attributes=dict(_ENCODING["string-array"]),
    )
    names[...] = index.astype(str).astype(object)
    for name, values in columns.items():
        _array(group, name, values)

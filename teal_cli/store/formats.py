"""The forms a store can be converted to. A form is a function that writes one part, and a row of `FORMATS`.

Each part is read whole and written, but where the form can be written in blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from teal_cli.store.formats_simulators import write_scalesim, write_timeloop
from teal_cli.store.formats_text import write_mtx, write_smtx, write_tns
from teal_cli.store.formats_zarr import write_anndata, write_zarr
from teal_cli.store.packing import to_float
from teal_cli.store.part import Part

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        about: what it is, in a few words.
        write: writes a part below a folder and returns the file or folder that has it.
        drops: what of a store it cannot hold; teal.json, beside it, has most of that.
        outputs: it says how wide a projection's output is.
    """

    about: str
    write: Callable[[Part, Path], Path]
    drops: tuple[str, ...] = ()
    outputs: bool = False


def _beside(part: Part) -> dict[str, Any]:
    """What .npz files hold besides the rows."""
    return {**part.tokens(), "projections": np.array(part.projections()), "thresholds": part.thresholds()}


def _npz(part: Part, folder: Path) -> Path:
    """`rows` [R, K]."""
    path = part.file(folder, ".npz")
    np.savez(path, rows=to_float(part.dense()), **_beside(part))
    return path


def _csr(part: Part, folder: Path) -> Path:
    """What `scipy.sparse.load_npz` reads; it knows no float16."""
    path = part.file(folder, ".npz")
    rows = part.csr()
    data = rows.data.astype(np.float32, copy=False)
    parts = {"data": data, "indices": rows.indices, "indptr": rows.indptr, "shape": np.array(rows.shape)}
    np.savez(path, format=np.array(b"csr"), **parts, **_beside(part))  # type: ignore[arg-type]
    return path


def _tensor(rows: np.ndarray) -> Tensor:
    """Stored values as a tensor of the store's own data type."""
    import torch  # only the forms that are its own need it

    return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16) if rows.dtype == np.uint16 else torch.tensor(rows)


def _pt(part: Part, folder: Path) -> Path:
    """`<level>/token_<n>/layer_<n>/<projection>.pt`, one tensor [K] each; tokens are numbered as in the level."""
    import torch

    for _, block in part.blocks():
        for index, row in enumerate(_tensor(block.dense())):
            place = folder / part.level.name / f"token_{block.start + index}" / f"layer_{part.layer}"
            place.mkdir(parents=True, exist_ok=True)
            torch.save(row.clone(), place / f"{part.name}.pt")  # clone: a view would save the whole block
    return folder / part.level.name


def _safetensors(part: Part, folder: Path) -> Path:
    """`rows` [R, K] in the store's own data type, the token columns and `thresholds`."""
    import torch
    from safetensors.torch import save_file

    path = part.file(folder, ".safetensors")
    tensors = {name: torch.from_numpy(column) for name, column in part.tokens().items()}
    tensors |= {"rows": _tensor(part.dense()), "thresholds": torch.from_numpy(part.thresholds())}
    save_file(tensors, path, part.words())
    return path


def _parquet(part: Part, folder: Path) -> Path:
    """A line per row: the token columns, and lists `channels` and `values` of what was kept."""
    import pyarrow as pa
    from pyarrow import parquet

    path = part.file(folder, ".parquet")
    tokens = part.tokens()
    fields = [(name, pa.from_numpy_dtype(column.dtype)) for name, column in tokens.items()]
    fields += [("channels", pa.list_(pa.int32())), ("values", pa.list_(pa.float32()))]
    schema = pa.schema(fields, metadata=part.words())
    with parquet.ParquetWriter(path, schema) as writer:
        for row, block in part.blocks():
            ends = np.concatenate([np.zeros(1, np.int32), np.cumsum(block.row_nnz, dtype=np.int32)])
            kept = np.nonzero(block.kept)[1].astype(np.int32), to_float(block.values).astype(np.float32, copy=False)
            columns = [pa.array(column[row : row + len(block.row_nnz)]) for column in tokens.values()]
            lists = [pa.ListArray.from_arrays(pa.array(ends), pa.array(values)) for values in kept]
            writer.write_table(pa.table([*columns, *lists], schema=schema))
    return path


_WIDENED: Final = "the data type, where it is not float32; values are exact"
_BFLOAT16: Final = "the data type, where it is bfloat16; values are float32, and exact"
_TOKENS: Final = "token columns"
_THRESHOLDS: Final = "thresholds (teal.json has them)"
_ALL: Final = "masks and values, of which the density is left, token columns, thresholds (teal.json has them)"

FORMATS: Final[dict[str, Format]] = {
    "npz": Format("dense NumPy", _npz, (_BFLOAT16,)),
    "csr": Format("SciPy's CSR", _csr, (_WIDENED,)),
    "mtx": Format("Matrix Market", write_mtx, (_WIDENED, _TOKENS, _THRESHOLDS)),
    "pt": Format("a PyTorch vector per token", _pt, (_TOKENS, _THRESHOLDS)),
    "zarr": Format("dense Zarr", write_zarr, (_BFLOAT16,)),
    "safetensors": Format("dense tensors", _safetensors),
    "parquet": Format("a table of lists", _parquet, (_WIDENED,)),
    "anndata": Format("AnnData's CSR in Zarr", write_anndata, (_WIDENED,)),
    "smtx": Format("DLMC's pattern", write_smtx, ("values", _TOKENS, _THRESHOLDS)),
    "tns": Format("FROSTT's tensor", write_tns, ("the shape (teal.json has it)", _WIDENED, _TOKENS, _THRESHOLDS)),
    "scalesim": Format("layers for SCALE-Sim v3", write_scalesim, (_ALL, "the density beyond 1 of 64"), outputs=True),
    "timeloop": Format("problems for Timeloop and Sparseloop", write_timeloop, (_ALL,), outputs=True),
}

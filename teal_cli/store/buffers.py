"""The memory a decode step writes rows into, one block of tokens at a time.

Torch tensors on the device that decodes; a block is read back on the writer thread. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from teal_cli.store.header import StoreHeader
from teal_cli.store.schema import PHASES
from teal_kernels.experts import EXPERT
from teal_kernels.spec import SITES


class BlockBuffer:
    """Rows of all layers and sites for up to T tokens.

    Every row is NaN until it is filled: no kept value is ever NaN (|NaN| > t is false), so a row that a step
    forgot to fill, or filled without thresholding, is found when the block is packed.

    Args:
        header: gives L, T, K per site and the data type.
        device: where the decode step runs.
    """

    def __init__(self, header: StoreHeader, device: torch.device) -> None:
        shape = (header.layers, header.block_tokens)
        dtype = getattr(torch, header.value_dtype)
        # [layers, T, K]: a layer's rows of a block are contiguous, which is the order they are packed in.
        # In a mixture of experts also whose the parts of a row are, -1 until it is filled.
        # Not inference tensors, whatever mode the caller is in: the writer thread, in no such mode, clears
        # them.
        with torch.inference_mode(False):
            self._rows = {
                site: torch.empty((*shape, header.channels[site]), dtype=dtype, device=device) for site in SITES
            }
            if header.mixture is not None:
                self._rows[EXPERT] = torch.empty((*shape, header.mixture.routed), dtype=torch.int32, device=device)
            self._empty()
        self.tokens = {name: np.zeros(header.block_tokens, dtype) for name, dtype in header.token_columns.items()}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._filled: torch.cuda.Event | None = None

    def rows(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Views [layers, rows, K] per site, and of the experts, of a range of rows."""
        return {site: rows[:, start:stop] for site, rows in self._rows.items()}

    def set_token(self, index: int, token_id: int, position: int, sequence: int, phase: str) -> None:
        """Says which token that row belongs to."""
        self.tokens["token_id"][index] = token_id
        self.tokens["position"][index] = position
        self.tokens["sequence"][index] = sequence
        self.tokens["phase"][index] = PHASES[phase]

    def set_columns(self, index: int, values: Mapping[str, float]) -> None:
        """Fills the optional columns of that row; raises KeyError for a column that the store does not have."""
        for name, value in values.items():
            self.tokens[name][index] = value

    def set_tokens(self, index: int, columns: Mapping[str, np.ndarray]) -> None:
        """Fills the token columns, each [rows], from this row on."""
        for name, column in columns.items():
            self.tokens[name][index : index + len(column)] = column

    def seal(self) -> None:
        """Marks, on the decoding stream, the point after which the rows are complete."""
        if self._stream is not None:
            self._filled = torch.cuda.current_stream(self._stream.device).record_event()

    def to_host(self, site: str, count: int) -> np.ndarray:
        """The first `count` rows of a site, [layers, count, K], bfloat16 as uint16 bits, or of the experts, int32; for
        the writer thread."""
        rows = self._rows[site][:, :count]
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                assert self._filled is not None
                self._stream.wait_event(self._filled)
                rows = rows.to("cpu")  # pageable, hence synchronous: only this thread waits for it
        return _bits(rows)

    def clear(self) -> None:
        """Makes every row unfilled again; called on the writer thread."""
        if self._stream is None:
            self._empty()
            return
        with torch.cuda.stream(self._stream):
            self._empty()
        self._stream.synchronize()

    def _empty(self) -> None:
        for rows in self._rows.values():
            empty = torch.full((), float("nan") if rows.is_floating_point() else -1, dtype=rows.dtype)
            if rows.device.type == "cpu":
                _bits(rows).fill(_bits(empty)[()])
            else:
                rows.fill_(empty)


def copy_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies rows of one shape, on a CPU in the calling thread alone (see `_bits`)."""
    if target.device.type == source.device.type == "cpu" and target.dtype == source.dtype:
        np.copyto(_bits(target), _bits(source))
    else:
        target.copy_(source)


def _bits(rows: torch.Tensor) -> np.ndarray:
    """A CPU tensor as an array, bfloat16 as uint16 bits. NumPy moves it in the calling thread alone; PyTorch would
    share that out to threads that then spin, for a while, on cores that others compute on.
    """
    if rows.dtype is torch.bfloat16:
        return rows.view(torch.int16).numpy().view(np.uint16)
    return rows.numpy()

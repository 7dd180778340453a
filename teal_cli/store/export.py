"""Stores in other forms: dense npz, CSR npz, Matrix Market, one .pt per token, layer and projection.

Everything is first written beside the target and renamed in when it is whole. bfloat16 becomes float32,
exactly, where the form has no bfloat16; .pt keeps it. What was converted, and the store's provenance, is
written down in teal.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from teal_cli.errors import UsageError
from teal_cli.files import check_new_folder, disk_errors, new_folder
from teal_cli.store.arrays import ActivationArray
from teal_cli.store.placing import destination
from teal_cli.store.reader import ActivationStore, Level
from teal_kernels.spec import PROJECTION_SITE, PROJECTIONS, SITE_PROJECTIONS, SITES

FORMATS: Final = ("npz", "csr", "mtx", "pt")


@dataclass(frozen=True)
class Selection:
    """Which part of a store.

    Attributes:
        levels: names of levels.
        layers: indices.
        names: sites or projections; for `pt` projections only.
        start, stop: range of tokens of each level; stop None means to the end.
        sequence: instead of the range, all rows of one sequence.
    """

    levels: tuple[str, ...]
    layers: tuple[int, ...]
    names: tuple[str, ...]
    start: int = 0
    stop: int | None = None
    sequence: int | None = None

    def rows(self, level: Level) -> slice:
        """The selected tokens of a level.

        Raises:
            UsageError: the range is empty or goes beyond the level.
            NotFoundError: the level has no such sequence.
        """
        if self.sequence is not None:
            return level.rows(self.sequence)
        stop = len(level) if self.stop is None else self.stop
        if not 0 <= self.start < stop <= len(level):
            raise UsageError(
                f"tokens {self.start}:{stop} are not a range within the {len(level)} tokens of {level.name}",
                hint="give START:STOP with START < STOP",
            )
        return slice(self.start, stop)


@dataclass(frozen=True)
class Converted:
    """Progress: one more array (level, layer, name) is written.

    Attributes:
        path: file or folder, below the target.
        done, total: arrays.
    """

    path: Path
    done: int
    total: int


def select(
    store: ActivationStore,
    *,
    levels: Sequence[str | float] = (),
    layers: Sequence[int] = (),
    names: Sequence[str] = (),
    tokens: tuple[int, int | None] = (0, None),
    sequence: int | None = None,
) -> Selection:
    """A checked selection; what is left empty means all, and for `names` all projections.

    Raises:
        UsageError, NotFoundError: something that the store does not have.
    """
    unknown = [name for name in names if name not in SITES and name not in PROJECTIONS]
    if unknown:
        raise UsageError(
            f"there is no site or projection {unknown[0]!r}", hint=f"use {', '.join((*SITES, *PROJECTIONS))}"
        )
    absent = [layer for layer in layers if not 0 <= layer < store.header.layers]
    if absent:
        raise UsageError(f"there is no layer {absent[0]}", hint=f"layers are 0 to {store.header.layers - 1}")
    return Selection(
        levels=tuple(store.level(name).name for name in levels) or store.levels,
        layers=tuple(layers) or tuple(range(store.header.layers)),
        names=tuple(names) or PROJECTIONS,
        start=tokens[0],
        stop=tokens[1],
        sequence=sequence,
    )


def parse_range(text: str) -> tuple[int, int | None]:
    """START:STOP, either of them left out.

    Raises:
        UsageError: something else.
    """
    try:
        start, stop = text.split(":")
        return int(start or 0), int(stop) if stop else None
    except ValueError:
        raise UsageError(f"{text!r} is no range", hint="write START:STOP, such as 0:100") from None


def parse_layers(text: str | None, count: int) -> list[int]:
    """Layers such as `0,5` or `0:4`, of `count`; none for None.

    Raises:
        UsageError: text that names no layers.
    """
    layers: list[int] = []
    for part in text.split(",") if text else []:
        if ":" in part:
            start, stop = parse_range(part)
            layers += range(start, count if stop is None else stop)
        elif part.strip().isdigit():
            layers.append(int(part))
        else:
            raise UsageError(f"{text!r} names no layers", hint="write them as 0,5 or 0:4")
    return layers


def parse_names(text: str | None) -> list[str]:
    """Names with commas between them; none for None."""
    return [name.strip() for name in text.split(",")] if text else []


def convert(store: ActivationStore, out: Path, form: str, selection: Selection) -> Iterator[Converted]:
    """Writes a selection into a new folder: `<level>/layer_<n>/<name>.<npz|mtx>`, or
    `<level>/token_<n>/layer_<n>/<projection>.pt`.

    Args:
        store: an open store.
        out: a folder that does not exist, or is empty.
        form: one of FORMATS. `npz` holds `rows` [token, channel]; `csr` is what `scipy.sparse.load_npz`
            reads; both hold the token columns too. `mtx` counts from 1 and has the provenance in its
            comments. `pt` is one tensor [K] in the store's own data type; tokens are numbered as in the level.
        selection: from `select`.

    Raises:
        UsageError: unknown form, occupied folder, sites asked for as .pt, tokens out of range.
        TealError: a block is damaged, or the disk refuses.
    """
    if form not in FORMATS:
        raise UsageError(f"there is no format {form!r}", hint=f"formats: {', '.join(FORMATS)}")
    if destination(out).is_relative_to(store.path.resolve()):
        raise UsageError(f"{out} lies within the store that is read", hint="give a folder outside it")
    check_new_folder(out)
    if form == "pt" and any(name in SITES for name in selection.names):
        raise UsageError("one .pt is what one projection consumed; a site feeds several", hint="name projections")
    ranges = {name: selection.rows(store.level(name)) for name in selection.levels}
    with disk_errors(out), new_folder(out.absolute()) as partial:
        _write_provenance(partial / "teal.json", store, form, selection, ranges)
        yield from _arrays(store, partial, form, selection, ranges)


def _arrays(
    store: ActivationStore, folder: Path, form: str, selection: Selection, ranges: dict[str, slice]
) -> Iterator[Converted]:
    write = _WRITERS[form]
    total = len(ranges) * len(selection.layers) * len(selection.names)
    done = 0
    for level_name, rows in ranges.items():
        level = store.level(level_name)
        for layer in selection.layers:
            for name in selection.names:
                array = level.site(layer, name) if name in SITES else level.projection(layer, name)
                part = _Part(level, layer, name, array, rows)
                path = write(part, folder / level.name)
                done += 1
                yield Converted(path.relative_to(folder), done, total)


@dataclass(frozen=True)
class _Part:
    level: Level
    layer: int
    name: str
    array: ActivationArray
    rows: slice

    def columns(self) -> dict[str, Any]:
        """What goes beside the rows: tokens and thresholds."""
        tokens = self.level.tokens
        projections = SITE_PROJECTIONS.get(self.name, (self.name,))
        thresholds = [self.level.thresholds[self.layer, PROJECTIONS.index(p)] for p in projections]
        return {
            "token_id": tokens.token_id[self.rows],
            "position": tokens.position[self.rows],
            "sequence": tokens.sequence[self.rows],
            "phase": tokens.phase[self.rows],
            "projections": np.array(projections),
            "thresholds": np.array(thresholds, np.float32),
        }

    def file(self, folder: Path, suffix: str) -> Path:
        place = folder / f"layer_{self.layer}"
        place.mkdir(parents=True, exist_ok=True)
        return place / f"{self.name}{suffix}"


def _npz(part: _Part, folder: Path) -> Path:
    path = part.file(folder, ".npz")
    np.savez(path, rows=part.array[part.rows], **part.columns())
    return path


def _csr(part: _Part, folder: Path) -> Path:
    path = part.file(folder, ".npz")
    rows = part.array.csr(part.rows)
    parts = {"data": rows.data, "indices": rows.indices, "indptr": rows.indptr, "shape": np.array(rows.shape)}
    np.savez(path, format=np.array(b"csr"), **parts, **part.columns())  # type: ignore[arg-type]
    return path


def _mtx(part: _Part, folder: Path) -> Path:
    path = part.file(folder, ".mtx")
    rows = part.array.csr(part.rows)
    token = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    with path.open("w", encoding="utf-8") as file:
        file.write("%%MatrixMarket matrix coordinate real general\n")
        file.write(f"% {part.level.name}, layer {part.layer}, {part.name}; tokens from {part.rows.start}\n")
        file.write(f"{rows.shape[0]} {rows.shape[1]} {len(rows.data)}\n")
        # 9 digits are enough to read any float32 back as it was.
        np.savetxt(file, np.stack([token + 1, rows.indices + 1, rows.data], axis=1), fmt="%d %d %.9g")
    return path


def _pt(part: _Part, folder: Path) -> Path:
    import torch  # the only form that needs it

    for block in part.array.blocks(part.rows.start, part.rows.stop):
        for index, row in enumerate(block.dense()):
            place = folder / f"token_{block.start + index}" / f"layer_{part.layer}"
            place.mkdir(parents=True, exist_ok=True)
            bits = torch.from_numpy(row.view(np.int16) if row.dtype == np.uint16 else row)
            vector = bits.view(torch.bfloat16) if row.dtype == np.uint16 else bits
            torch.save(vector.clone(), place / f"{part.name}.pt")  # clone: a view would save the whole block
    return folder


_WRITERS: Final[dict[str, Callable[[_Part, Path], Path]]] = {"npz": _npz, "csr": _csr, "mtx": _mtx, "pt": _pt}


def _write_provenance(
    path: Path, store: ActivationStore, form: str, selection: Selection, ranges: dict[str, slice]
) -> None:
    note = {
        "store": dict(store.attrs),
        "format": form,
        "layers": list(selection.layers),
        "names": list(selection.names),
        "sites": {name: PROJECTION_SITE.get(name, name) for name in selection.names},
        "tokens": {level: [rows.start, rows.stop] for level, rows in ranges.items()},
    }
    path.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")

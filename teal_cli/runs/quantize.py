"""`teal quantize`: a derived model of the registry whose matrices are int8 or int4.

One layer is in memory at a time, and each becomes a file that appears in one rename in the staging folder; killed, the
next run takes the files that are there. The model is registered at the very end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from teal_cli.errors import TealError, UsageError
from teal_cli.files import disk_errors, new_file, require_space, sha256_of, write_json
from teal_cli.model import fp8
from teal_cli.model.config import ModelConfig, load_config, refuse_mixture
from teal_cli.model.families import FAMILIES, TOP
from teal_cli.model.quantized import SECTION, WIDTHS, Quantization, packed_name, packed_table
from teal_cli.model.weights import Checkpoint, config_sha256
from teal_cli.registry.catalog import check_name
from teal_cli.registry.checkpoint import CONFIG, INDEX, read_json
from teal_cli.registry.entry import FileRecord, ModelEntry
from teal_cli.registry.registry import Registry
from teal_kernels.packing import VERSION, quantize
from teal_kernels.spec import SITE_PROJECTIONS
from teal_kernels.steps.spec import MATRICES

HEADS: Final[dict[str, int | None]] = {**WIDTHS, "none": None}
"""How embedding and head may be kept -> bits of a code."""


@dataclass(frozen=True)
class Quantized:
    """A layer is packed: `layers` of `total` are."""

    layers: int
    total: int


@dataclass(frozen=True)
class Made:
    """The model is registered; `reused` where it was there already."""

    entry: ModelEntry
    reused: bool


def quantize_model(
    registry: Registry,
    model: str | None,
    width: str,
    *,
    group: int = 64,
    head: str = "int8",
    name: str | None = None,
    force: bool = False,
) -> Generator[Quantized | Made, None, None]:
    """Make an int8 or int4 model of one that is here.

    Args:
        model: as `Registry.get` takes it.
        width: "int8" or "int4".
        group: columns that share a scale.
        head: "int8", "int4" or "none": of embedding and head, which need more bits than the rest; "none" leaves them.
        name: what to call it; None for the parent's name with what is special of it.
        force: make it again, in place of a model of that name.

    Yields:
        Quantized after each layer; last Made.

    Raises:
        UsageError: an unknown width, a group that is none, a model that is quantised, a name that another model has.
        NotFoundError: no such model.
        TealError: weights that are not finite, a damaged checkpoint, or no space for the copy.
    """
    entry = registry.get(model)
    if entry.parent is not None:
        raise UsageError(
            f"{entry.name} is quantised already, from {entry.parent}",
            hint=f"quantise that: `teal quantize {entry.parent} --to {width}`",
        )
    refuse_mixture(load_config(entry.path), "quantisation", "calibrate, generate and evaluate it as it is")
    if width not in WIDTHS:
        raise UsageError(
            f"weights are quantised to {' or '.join(WIDTHS)}, not to {width}", hint="--to int8 or --to int4"
        )
    if head not in HEADS:
        raise UsageError(f"--head is {' or '.join(HEADS)}, not {head}", hint="int8 costs little of the quality")
    quantization = Quantization(
        VERSION, WIDTHS[width], group, entry.name, entry.revision, config_sha256(entry.path), HEADS[head]
    )
    try:
        quantization.rows((1,))
    except ValueError as error:
        raise UsageError(str(error), hint="64 is the usual group") from None
    special = f"-g{group}" if group != 64 else ""
    special += "" if head == "int8" else f"-{'float' if head == 'none' else head}-head"
    name = name or f"{entry.name}-{width}{special}"
    check_name(name)
    with registry.lock(name), disk_errors(registry.home):
        if name in registry.names() and not force:
            yield Made(_same(registry.find(name), quantization), reused=True)
            return
        digest = hashlib.sha256(json.dumps(quantization.to_json(), sort_keys=True).encode()).hexdigest()[:12]
        staging = registry.home / "staging" / f"{name}@quantize-{digest}"
        require_space(registry.home, _size(load_config(entry.path), quantization, entry))
        checkpoint = Checkpoint(entry.path)
        staging.mkdir(parents=True, exist_ok=True)
        yield from _write(checkpoint, quantization, staging)
        yield Made(_register(registry, name, entry, quantization, staging), reused=False)


def _same(found: ModelEntry, wanted: Quantization) -> ModelEntry:
    there = Checkpoint(found.path).quantization if found.parent is not None else None
    if there != wanted:
        raise UsageError(
            f"{found.name} is already the name of {found.source}",
            hint="choose another with --name, or replace it with --force",
        )
    return found


def _size(config: ModelConfig, quantization: Quantization, entry: ModelEntry) -> int:
    """Bytes of the model to be made, about."""
    rows = sum(config.channels(site) * quantization.rows(config.segments(site)).stride for site in MATRICES.values())
    floats = sum(config.channels(site) * sum(config.segments(site)) for site in MATRICES.values())
    kept = entry.parameters - config.layers * floats
    if (table := quantization.table_rows(config.hidden)) is not None:
        tables = 1 if config.tied else 2
        kept -= tables * config.vocab * config.hidden
        rows += tables * config.vocab * table.stride // config.layers
    return config.layers * rows + 4 * max(0, kept) + (1 << 20)


def _write(checkpoint: Checkpoint, quantization: Quantization, staging: Path) -> Iterator[Quantized]:
    """Every weight file, then the index and the small files; whole files that are there stay."""
    config = checkpoint.config
    files = config.layers + 1
    weight_map: dict[str, str] = {}
    for number in range(files):
        file = staging / f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        if not _is_whole(file):
            last = number == config.layers
            tensors = _ends(checkpoint, quantization) if last else _layer(checkpoint, quantization, number)
            with new_file(file) as partial:
                save_file(tensors, partial, metadata={"teal_layout": str(VERSION)})
        with safe_open(file, framework="pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), file.name)
        if number < config.layers:
            yield Quantized(number + 1, config.layers)
    write_json(staging / INDEX, {"metadata": {"teal_layout": VERSION}, "weight_map": weight_map})


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False


def _layer(checkpoint: Checkpoint, quantization: Quantization, index: int) -> dict[str, Tensor]:
    layer = checkpoint.layer(index, torch.float32)
    tensors = {}
    for field, site in MATRICES.items():
        matrix = getattr(layer, field).tensor()
        try:
            tensors[packed_name(index, field)] = quantize(matrix, quantization.rows(checkpoint.config.segments(site)))
        except ValueError as error:
            raise _not_finite(_damaged(checkpoint, index, site, matrix)) from error
    family = FAMILIES[checkpoint.config.family]
    projections = {part for parts in SITE_PROJECTIONS.values() for part in parts}
    others = [family.layer[part][0] for part in family.parts(checkpoint.config.hf) if part not in projections]
    return tensors | checkpoint.stored([f"model.layers.{index}.{name}" for name in others])


def _damaged(checkpoint: Checkpoint, index: int, site: str, matrix: Tensor) -> str:
    """The tensor whose weights cannot be quantised."""
    widths = checkpoint.config.segments(site)
    wrong = [p for p, part in zip(SITE_PROJECTIONS[site], matrix.split(widths, 1), strict=True) if not _fits(part)]
    return f"model.layers.{index}.{FAMILIES[checkpoint.config.family].layer[wrong[0]][0]}"


def _not_finite(name: str) -> TealError:
    return TealError(
        f"{name} has weights that are not finite, or beyond 8e37, and cannot be quantised",
        hint="check the model's files with `teal models verify`",
    )


def _fits(part: Tensor) -> bool:
    return bool((part.abs() <= 2.0**126).all())


def _ends(checkpoint: Checkpoint, quantization: Quantization) -> dict[str, Tensor]:
    """Embedding, final norm, and the head where it is not the embedding."""
    tables = ["embedding"] + ([] if checkpoint.tied() else ["lm_head"])
    tensors = checkpoint.stored([TOP[part][0] for part in ("final_norm", *tables)])
    layout = quantization.table_rows(checkpoint.config.hidden)
    if layout is None:
        return tensors
    for name in [TOP[part][0] for part in tables]:
        try:
            tensors[packed_table(name)] = quantize(tensors.pop(name), layout)
        except ValueError as error:
            raise _not_finite(name) from error
    return tensors


def _register(
    registry: Registry, name: str, parent: ModelEntry, quantization: Quantization, staging: Path
) -> ModelEntry:
    for file in parent.files:
        if not file.path.endswith((".safetensors", INDEX)) and file.path != CONFIG:
            shutil.copyfile(parent.path / file.path, staging / file.path)
    config = {key: value for key, value in read_json(parent.path / CONFIG).items() if key != fp8.SECTION}
    write_json(staging / CONFIG, {**config, SECTION: quantization.to_json()})
    records = tuple(
        FileRecord(file.name, file.stat().st_size, sha256_of(file))
        for file in sorted(staging.iterdir())
        if not file.name.startswith(".")
    )
    Checkpoint(staging)  # what is registered can be opened
    revision = "sha256:" + hashlib.sha256("".join(f"{r.path} {r.sha256}\n" for r in records).encode()).hexdigest()
    home = registry.model_home(name)
    home.mkdir(parents=True, exist_ok=True)
    short = f"weights-{revision.removeprefix('sha256:')[:12]}"
    # Never the folder that may be registered: until `add`, the registry goes on naming the files it named.
    names = chain([short], (f"{short}-{n}" for n in count(2)))
    path = next(home / name for name in names if not (home / name).exists())
    staging.rename(path)
    weights = sum(record.size for record in records if record.path.endswith(".safetensors"))
    made = replace(
        parent, name=name, source=f"quantized:{parent.name}", revision=revision, path=path,
        size_bytes=sum(record.size for record in records), files=records, home=home, parent=parent.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"), bits_per_weight=8 * weights / parent.parameters,
        stored=None,
    )  # fmt: skip
    registry.add(made)
    for folder in home.glob("weights-*"):
        if folder != path:
            shutil.rmtree(folder)
    return made

"""`teal calibrate`: a text, a model of the registry, and the calibration that comes out; or an import; or a
check of one.

Each of the three is one function that yields events and writes, at its very end, a whole calibration or
nothing, so an interruption leaves nothing behind. The pass over the model is `observe`'s business.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
import torch

from teal_cli.data.blocks import TokenBlocks, pack
from teal_cli.data.sources import open_source
from teal_cli.data.tokenizer import load_tokenizer
from teal_cli.errors import UsageError
from teal_cli.files import disk_errors
from teal_cli.model.config import load_config
from teal_cli.model.weights import Checkpoint, config_sha256
from teal_cli.passes.forward import Advance, check_tokens
from teal_cli.passes.observe import Observed, expected_peak, observe
from teal_cli.registry.calibrations import remarks, settle_default
from teal_cli.registry.registry import ModelEntry, Registry
from teal_cli.sparsity.calibration import MANIFEST, Calibration, Provenance, check_fits, read_manifest
from teal_cli.sparsity.plan import uniform_plan
from teal_cli.sparsity.realised import CHECKED, Realised, realised
from teal_cli.sparsity.teal_format import check_widths, read_histograms
from teal_cli.version import __version__
from teal_kernels.spec import SITES

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHORT: Final = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class Text:
    """Which text to run, and how much of it.

    Attributes:
        dataset, split, text_column: as `open_source` takes them.
        num_sequences, seq_len: token blocks, and tokens of each.
    """

    dataset: str
    split: str | None = None
    text_column: str | None = None
    num_sequences: int = 10
    seq_len: int = 2048


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration that lies in the registry.

    Attributes:
        folder: where.
        reused: it was there already, made from the same tokens in the same dtype.
    """

    calibration: Calibration
    folder: Path
    reused: bool


@dataclass(frozen=True, slots=True)
class Checked:
    """What a calibration's uniform plans drop of other text, at each level of `realised.CHECKED`.

    Attributes:
        blocks: the other text.
        levels: one for each sparsity.
        notes: remarks for the user.
    """

    calibration: Calibration
    blocks: TokenBlocks
    levels: tuple[Realised, ...]
    notes: tuple[str, ...]


def calibrate(
    registry: Registry,
    model: str | None,
    text: Text,
    *,
    dtype: str | None = None,
    device: torch.device,
    name: str | None = None,
    force: bool = False,
) -> Iterator[Advance | Calibrated]:
    """Run a text through a model of the registry and keep the histograms (TEAL, section 4.1).

    A calibration of the same tokens, dtype and model is not made twice, unless `force` asks for it.

    Args:
        model: as `Registry.find` takes it.
        dtype: bfloat16, float16 or float32; None takes the checkpoint's own.
        name: id of the calibration; None makes one of dataset, size and dtype.
        force: replace a calibration of that id.

    Raises:
        UsageError: a name that is none, or one that another calibration has; a text that is too short, see
            `pack`.
        NotFoundError, AuthError, TealError: as `Registry.get`, `open_source`, `Checkpoint` and `observe`.
    """
    entry = registry.get(model)
    _check_name(name)
    config = load_config(entry.path)
    dtype = dtype or config.torch_dtype
    blocks = _blocks(entry, text)
    check_tokens(config, blocks.tokens)
    sha256 = config_sha256(entry.path)
    name = name or _make_id(blocks, dtype, sha256)
    folder = registry.calibration_dir(entry.name, name)
    wanted = {
        "config_sha256": sha256,
        "fingerprint": blocks.fingerprint,
        "seq_len": blocks.tokens.shape[1],
        "dtype": dtype,
    }
    if not force and _is_there(folder, wanted):
        yield Calibrated(Calibration.load(folder), folder, reused=True)
        return
    kind = getattr(torch, dtype)
    checkpoint = Checkpoint(entry.path)
    for event in observe(checkpoint, blocks.tokens, kind, device):
        if isinstance(event, Advance):
            yield event
            continue
        sequences, seq_len = blocks.tokens.shape
        peak = expected_peak(
            checkpoint.config,
            sequences=sequences,
            seq_len=seq_len,
            itemsize=kind.itemsize,
            device=device.type,
        )
        made = _provenance(entry, blocks, event, sha256, dtype, device, peak.total)
        yield _keep(registry, entry, Calibration(name, made, event.histogram), folder)


def import_teal(
    registry: Registry,
    model: str | None,
    source: Path,
    *,
    rule: str = "teal",
    name: str | None = None,
    force: bool = False,
) -> Calibrated:
    """Make a calibration of TEAL's `histograms/` folder for a model of the registry.

    Args:
        rule: `teal` for TEAL's own thresholds, `abs` for quantiles of |x| over the same bins.

    Raises:
        UsageError: the folder has another number of layers than the model; a name as in `calibrate`.
        NotFoundError, TealError: as `read_histograms`; also if the sites have other widths than the model's.
    """
    entry = registry.get(model)
    _check_name(name)
    config = load_config(entry.path)
    histogram = read_histograms(source, rule)
    if histogram.layers != config.layers:
        raise UsageError(
            f"{source} has {histogram.layers} layers, but {entry.name} has {config.layers}",
            hint="name the model that the histograms were made for with -m",
        )
    widths = {site: config.channels(site) for site in SITES}
    check_widths(histogram, widths)
    digest = hashlib.sha256(histogram.counts.tobytes() + histogram.centers.tobytes()).hexdigest()
    name = name or f"teal-{rule}-{digest[:6]}"
    folder = registry.calibration_dir(entry.name, name)
    made = Provenance(
        model=entry.name,
        config_sha256=config_sha256(entry.path),
        dataset=str(source.resolve()),
        fingerprint=digest,
        tokens=round(histogram.total(0, SITES[0]) / widths[SITES[0]]),
        created=_now(),
        versions=_versions(),
    )
    wanted = {"config_sha256": made.config_sha256, "fingerprint": digest, "rule": rule}
    if not force and _is_there(folder, wanted):
        return Calibrated(Calibration.load(folder), folder, reused=True)
    return _keep(registry, entry, Calibration(name, made, histogram), folder)


def check(
    registry: Registry, model: str | None, calibration: str | None, text: Text, *, device: torch.device
) -> Iterator[Advance | Checked]:
    """See what thresholds of a calibration drop of a text that it was not made from.

    The text's held-out split is taken if no split is named, and less of it if there is less.

    Args:
        calibration: id or folder; None is the default of the model.

    Raises:
        UsageError: the calibration is another model's.
        NotFoundError, AuthError, TealError: as `calibrate`.
    """
    entry = registry.get(model)
    found = Calibration.load(registry.find_calibration(entry.name, calibration))
    config = load_config(entry.path)
    dtype = found.provenance.dtype or config.torch_dtype
    notes = remarks(entry, calibration) + check_fits(found, config, entry.path, dtype)
    blocks = _blocks(entry, text, held_out=True)
    check_tokens(config, blocks.tokens)
    if blocks.fingerprint == found.provenance.fingerprint:
        notes.append(f"{text.dataset} is the very text that {found.id} was made from.")
    for event in observe(Checkpoint(entry.path), blocks.tokens, getattr(torch, dtype), device):
        if isinstance(event, Observed):
            levels = tuple(realised(event.histogram, uniform_plan(found, level)) for level in CHECKED)
            yield Checked(found, blocks, levels, tuple(notes))
        else:
            yield event


def mean_thresholds(calibration: Calibration, sparsity: float) -> dict[str, float]:
    """Site -> the mean of its thresholds over the layers, for a table."""
    return {
        site: float(np.mean([calibration.threshold(i, site, sparsity) for i in range(calibration.layers)]))
        for site in SITES
    }


def _blocks(entry: ModelEntry, text: Text, *, held_out: bool = False) -> TokenBlocks:
    source = open_source(text.dataset, split=text.split, text_column=text.text_column, held_out=held_out)
    tokenizer = load_tokenizer(entry.path)
    least = 1 if held_out else -(-text.num_sequences // 2)  # a text that is a little short is told, and serves
    return pack(source, tokenizer, num_sequences=text.num_sequences, seq_len=text.seq_len, least=least)


def _check_name(name: str | None) -> None:
    if name is not None and not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a calibration",
            hint="use letters, digits, dots, dashes and underscores",
        )


def _make_id(blocks: TokenBlocks, dtype: str, sha256: str) -> str:
    """Dataset, thousands of tokens, dtype, and six digits that stand for exactly which: python-
    docs-20k-bf16-1f0c3a.
    """
    stem = re.sub(r"[^a-z0-9]+", "-", Path(blocks.dataset).name.lower()).strip("-") or "text"
    tokens = blocks.tokens.size
    size = f"{tokens // 1000}k" if tokens >= 1000 else str(tokens)
    digest = hashlib.sha256(f"{blocks.fingerprint} {blocks.tokens.shape} {dtype} {sha256}".encode()).hexdigest()
    return f"{stem[:40]}-{size}-{_SHORT[dtype]}-{digest[:6]}"


def _is_there(folder: Path, wanted: Mapping[str, object]) -> bool:
    """Whether the folder holds the calibration that is wanted; another one of that name is refused."""
    if not (folder / MANIFEST).exists():
        return False
    manifest = read_manifest(folder)
    if all(manifest.get(key) == value for key, value in wanted.items()):
        return True
    raise UsageError(
        f"there is another calibration called {folder.name}, of {manifest.get('dataset')}",
        hint="choose another --name, or replace it with --force",
    )


def _keep(registry: Registry, entry: ModelEntry, calibration: Calibration, folder: Path) -> Calibrated:
    with registry.lock(entry.name), disk_errors(folder):
        settle_default(entry, calibration.id)
        calibration.save(folder)
    return Calibrated(calibration, folder, reused=False)


def _provenance(
    entry: ModelEntry,
    blocks: TokenBlocks,
    seen: Observed,
    sha256: str,
    dtype: str,
    device: torch.device,
    computed_peak: int,
) -> Provenance:
    sequences, seq_len = blocks.tokens.shape
    return Provenance(
        model=entry.name,
        config_sha256=sha256,
        dataset=blocks.dataset,
        split=blocks.split,
        fingerprint=blocks.fingerprint,
        tokens=blocks.tokens.size,
        sequences=sequences,
        seq_len=seq_len,
        dtype=dtype,
        device=str(device),
        versions=_versions(),
        created=_now(),
        seconds=seen.seconds,
        peak_memory_bytes=seen.peak_memory_bytes,
        peak_device_bytes=seen.peak_device_bytes,
        computed_peak_bytes=computed_peak,
    )


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "teal": __version__,  # known to a checkout that nobody installed, too
        **{name: version(name) for name in ("torch", "transformers", "datasets")},
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""A calibration: how large the activations of a model are at every site of every layer, and how that was found out.

It is a folder of two files: calibration.json, which anything can read, and histogram.npz. This module does
not know how activations are observed (`observe`) nor where the folder lies (the registry does).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.files import disk_errors, new_folder, read_json, write_json
from teal_cli.sparsity.criterion import MAGNITUDE
from teal_cli.sparsity.histogram import ExpertHistogram, MagnitudeHistogram
from teal_cli.sparsity.teal_format import RULES, TealHistogram

if TYPE_CHECKING:
    from teal_cli.model.config import ModelConfig

SCHEMA: Final = "teal-calibration/1"
MANIFEST: Final = "calibration.json"
COUNTS: Final = "histogram.npz"
FEW_TOKENS: Final = 32
"""An expert that saw fewer has no thresholds of its own."""

Histogram: TypeAlias = MagnitudeHistogram | TealHistogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a calibration comes from. What an imported one does not say is None.

    Attributes:
        model: name in the registry.
        config_sha256: of the model's config.json; a calibration is refused for any other.
        dataset, split: the text, as the user named it; for an import the folder.
        fingerprint: sha256 over the token ids, see `data.blocks`.
        tokens, sequences, seq_len: how much of it; tokens = sequences * seq_len.
        dtype: of the activations.  device: where they were computed.
        versions: of python, teal, torch, transformers and datasets.
        created: UTC, ISO 8601.
        seconds: wall-clock time of the pass over the model.
        peak_memory_bytes: most resident memory of the process until the end of it, Python and its libraries
            included.
        peak_device_bytes: most memory of the GPU that PyTorch had given out; None on a CPU.
        computed_peak_bytes: what `observe.expected_peak` makes it, without Python and its libraries.
    """

    model: str
    config_sha256: str
    dataset: str
    created: str
    versions: Mapping[str, str]
    split: str | None = None
    fingerprint: str | None = None
    tokens: int | None = None
    sequences: int | None = None
    seq_len: int | None = None
    dtype: str | None = None
    device: str | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    peak_device_bytes: int | None = None
    computed_peak_bytes: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Histograms of a whole model with their provenance.

    Attributes:
        id: its name among the calibrations of the model.
        criterion: whose scores were counted.
    """

    id: str
    provenance: Provenance
    histogram: Histogram
    criterion: str = MAGNITUDE

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.histogram.layers

    @property
    def rule(self) -> str:
        """What a threshold is: `magnitude` (exact quantile of |x|), or `teal` or `abs` over TEAL's bins."""
        return self.histogram.rule if isinstance(self.histogram, TealHistogram) else "magnitude"

    def threshold(self, layer: int, site: str, sparsity: float) -> float:
        """The threshold that drops this part of the entries at a site, for a sparsity in [0, 1).

        0 gives 0.0, whatever the rule. An imported calibration can give a slightly negative one, which drops nothing.
        """
        return 0.0 if sparsity == 0.0 else self.histogram.threshold(layer, site, sparsity)

    def expert_thresholds(self, layer: int, sparsity: float) -> NDArray[np.float32] | None:
        """The threshold of each expert at `mlp_mid`, float32 [E]; that of the whole site for an expert that saw fewer
        than `FEW_TOKENS`. None where experts were not counted."""
        experts = self.histogram.experts if isinstance(self.histogram, MagnitudeHistogram) else None
        if experts is None:
            return None
        pooled = self.threshold(layer, "mlp_mid", sparsity)
        enough = experts.tokens(layer) >= FEW_TOKENS
        own = [experts.threshold(layer, i, sparsity) if sparsity and fine else pooled for i, fine in enumerate(enough)]
        return np.array(own, np.float32)

    def scarce_experts(self) -> list[tuple[int, int, int]]:
        """(layer, expert, tokens) of the experts that saw fewer than `FEW_TOKENS`."""
        experts = self.histogram.experts if isinstance(self.histogram, MagnitudeHistogram) else None
        if experts is None:
            return []
        found = [(layer, experts.tokens(layer)) for layer in range(self.layers)]
        return [
            (layer, int(i), int(tokens[i]))
            for layer, tokens in found
            if tokens.any()  # of a layer without experts none saw any
            for i in np.flatnonzero(tokens < FEW_TOKENS)
        ]

    def manifest(self) -> dict[str, Any]:
        """What calibration.json holds: one flat object."""
        about = {"schema": SCHEMA, "id": self.id, "criterion": self.criterion, "rule": self.rule, "layers": self.layers}
        return {**about, **asdict(self.provenance)}

    def save(self, folder: Path) -> None:
        """Write the calibration as `folder`: whole or not at all, in place of one that is there.

        Raises:
            TealError: the disk is full, or the place may not be written.
        """
        with disk_errors(folder), new_folder(folder, replace=True) as partial:
            np.savez_compressed(partial / COUNTS, **_arrays(self.histogram))
            write_json(partial / MANIFEST, self.manifest())

    @classmethod
    def load(cls, folder: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            NotFoundError: no calibration lies there.
            TealError: it is damaged, or of another schema.
        """
        manifest = read_manifest(folder)
        hint = "make it again with `teal calibrate --force`"
        try:
            # Opened here, because np.load leaves a file open that turns out to be no archive.
            with (folder / COUNTS).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                histogram = _histogram(manifest, arrays)
            known = {field.name for field in fields(Provenance)}
            provenance = Provenance(**{name: value for name, value in manifest.items() if name in known})
            name, criterion = manifest["id"], manifest.get("criterion", MAGNITUDE)
            if type(name) is not str or type(criterion) is not str:
                raise ValueError("id or criterion is of the wrong type")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise TealError(f"the calibration {folder} is damaged ({error})", hint=hint) from error
        if histogram.layers != manifest.get("layers"):
            raise TealError(f"the calibration {folder} is damaged: its files disagree on the layers", hint=hint)
        return cls(name, provenance, histogram, criterion)


def _arrays(histogram: Histogram) -> dict[str, Any]:
    if isinstance(histogram, TealHistogram):
        return {"counts": histogram.counts, "centers": histogram.centers}
    own = {"counts": histogram.counts, "grid": np.array(histogram.dtype)}
    return own if histogram.experts is None else own | histogram.experts.arrays()


def _histogram(manifest: Mapping[str, Any], arrays: Mapping[str, Any]) -> Histogram:
    if manifest["rule"] in RULES:
        return TealHistogram(arrays["counts"], arrays["centers"], manifest["rule"])
    found = MagnitudeHistogram(str(arrays["grid"]), arrays["counts"])
    if "expert_counts" in arrays:
        found.experts = ExpertHistogram.of_arrays(found.dtype, found.layers, arrays)
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The calibration.json of a folder, without the histograms.

    Raises:
        NotFoundError: there is none.
        TealError: it is damaged, or of another schema.
    """
    file = folder / MANIFEST
    try:
        manifest = read_json(file)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no calibration in {folder}", hint="make one with `teal calibrate`") from error
    except (OSError, ValueError) as error:
        raise TealError(f"{file} is damaged ({error})", hint="make it again with `teal calibrate --force`") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise TealError(f"{file} is of the schema {schema!r}; this teal reads {SCHEMA}", hint="calibrate again")
    return dict(manifest)


def check_fits(calibration: Calibration, config: ModelConfig, checkpoint: Path, dtype: str) -> list[str]:
    """Refuse a calibration of another model.

    Args:
        dtype: what the model will be run in.

    Returns:
        Remarks for the user: a calibration made in another dtype is used, since magnitudes hardly depend on
            it.

    Raises:
        UsageError: another config.json, or another number of layers.
    """
    from teal_cli.model.weights import config_sha256

    made = calibration.provenance
    if calibration.layers != config.layers or made.config_sha256 != config_sha256(checkpoint):
        raise UsageError(
            f"the calibration {calibration.id} was made for another model: {made.model}, {calibration.layers} layers",
            hint="leave --calibration away to use the model's own, or make one with `teal calibrate`",
        )
    if made.dtype in (None, dtype):
        return []
    return [f"The calibration {calibration.id} was made in {made.dtype}; the model runs in {dtype}."]

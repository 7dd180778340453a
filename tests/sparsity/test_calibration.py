"""A calibration's folder: there whole or not at all, and refused for another model."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.model.config import load_config
from teal_cli.model.weights import config_sha256
from teal_cli.sparsity import calibration as module
from teal_cli.sparsity.calibration import COUNTS, MANIFEST, Calibration, Provenance, check_fits
from teal_cli.sparsity.histogram import MagnitudeHistogram
from teal_cli.sparsity.teal_format import TealHistogram
from teal_kernels.spec import SITES

PROVENANCE = Provenance(
    model="tiny",
    config_sha256="abc",
    dataset="python-docs",
    split="train",
    fingerprint="f00",
    tokens=300,
    sequences=3,
    seq_len=100,
    dtype="bfloat16",
    device="cpu",
    seconds=1.5,
    peak_memory_bytes=123,
    computed_peak_bytes=100,
    created="2026-01-01T00:00:00+00:00",
    versions={"torch": "2"},
)


def make(layers: int = 3, seed: int = 0) -> Calibration:
    histogram = MagnitudeHistogram.empty(layers, "bfloat16")
    generator = torch.Generator().manual_seed(seed)
    for layer in range(layers):
        for site in SITES:
            histogram.add(layer, site, torch.randn(500, generator=generator))
    return Calibration("some-id", PROVENANCE, histogram)


def imported() -> Calibration:
    centers = np.broadcast_to(np.linspace(-1, 1, 50, dtype=np.float32), (2, 4, 50)).copy()
    return Calibration("teal", PROVENANCE, TealHistogram(np.ones((2, 4, 50), np.float32), centers, "abs"))


@pytest.mark.parametrize("calibration", [make(), imported()], ids=["magnitude", "teal"])
def test_to_disk_and_back(calibration: Calibration, tmp_path: Path) -> None:
    folder = tmp_path / "calibrations" / "some-id"
    calibration.save(folder)
    again = Calibration.load(folder)
    assert (again.id, again.rule, again.layers) == (calibration.id, calibration.rule, calibration.layers)
    assert again.provenance == calibration.provenance
    for layer in range(again.layers):
        for site in SITES:
            for sparsity in (0.0, 0.3, 0.9):
                t = calibration.threshold(layer, site, sparsity)
                assert again.threshold(layer, site, sparsity) == t
    assert sorted(path.name for path in folder.parent.iterdir()) == ["some-id"]


def test_the_manifest_is_flat_json_that_anything_can_read(tmp_path: Path) -> None:
    make().save(tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / MANIFEST).read_text())
    assert (manifest["schema"], manifest["rule"], manifest["layers"]) == ("teal-calibration/1", "magnitude", 3)
    assert (manifest["dataset"], manifest["dtype"], manifest["fingerprint"]) == ("python-docs", "bfloat16", "f00")


def test_saving_replaces_what_is_there(tmp_path: Path) -> None:
    make(seed=0).save(tmp_path / "c")
    make(seed=1).save(tmp_path / "c")
    assert (Calibration.load(tmp_path / "c").histogram.counts == make(seed=1).histogram.counts).all()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["counts", "manifest"])
def test_what_breaks_while_saving_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, step: str
) -> None:
    make(seed=0).save(tmp_path / "old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    owner, name = (np, "savez_compressed") if step == "counts" else (module, "write_json")
    monkeypatch.setattr(owner, name, fail)
    for folder in ("old", "new"):
        with pytest.raises((TealError, KeyboardInterrupt), match="full" if isinstance(error, OSError) else None):
            make(seed=1).save(tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (Calibration.load(tmp_path / "old").histogram.counts == make(seed=0).histogram.counts).all()


def test_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no calibration in"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_truncated_counts(tmp_path: Path, keep: int) -> None:
    make().save(tmp_path / "c")
    file = tmp_path / "c" / COUNTS
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(TealError, match="is damaged"):
        Calibration.load(tmp_path / "c")


def test_altered_counts(tmp_path: Path) -> None:
    make().save(tmp_path / "c")
    file = tmp_path / "c" / COUNTS
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(TealError, match="is damaged"):
        Calibration.load(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "teal-calibration/9"}, "'teal-calibration/9'; this teal reads teal-calibration/1"),
        ({"layers": 4}, "disagree"),
        ({"rule": "teal"}, "damaged"),
        ({"model": None, "id": None}, None),
        ({"id": None}, "damaged"),
        ({"id": 7}, "damaged"),
        ({"criterion": []}, "damaged"),
    ],
)
def test_an_altered_manifest(tmp_path: Path, change: dict[str, object], says: str | None) -> None:
    make().save(tmp_path / "c")
    file = tmp_path / "c" / MANIFEST
    manifest = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))
    with pytest.raises(TealError, match=says or "damaged"):
        Calibration.load(tmp_path / "c")


def test_json_that_is_none(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(TealError, match="is damaged"):
        Calibration.load(tmp_path)


def test_it_fits_the_model_it_was_made_for(tiny: Any) -> None:
    path = tiny("llama3")
    made = replace(PROVENANCE, config_sha256=config_sha256(path))
    fitting = replace(make(), provenance=made)
    config = load_config(path)
    assert check_fits(fitting, config, path, "bfloat16") == []
    assert check_fits(replace(fitting, provenance=replace(made, dtype=None)), config, path, "float32") == []
    (note,) = check_fits(fitting, config, path, "float32")
    assert "made in bfloat16; the model runs in float32" in note


def test_it_is_refused_for_another_model(tiny: Any) -> None:
    path = tiny("llama3")
    config = load_config(path)
    with pytest.raises(UsageError, match="made for another model: tiny, 3 layers"):
        check_fits(make(), config, path, "bfloat16")
    of_this_config = replace(PROVENANCE, config_sha256=config_sha256(path))
    with pytest.raises(UsageError, match="4 layers"):
        check_fits(replace(make(layers=4), provenance=of_this_config), config, path, "bfloat16")

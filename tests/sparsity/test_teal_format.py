"""TEAL's own histograms: its thresholds to the last figures, the quantile of |x| beside them, and what is refused."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_teal import expected, write_layer

from teal_cli.errors import NotFoundError, TealError
from teal_cli.sparsity.calibration import Calibration, Provenance
from teal_cli.sparsity.plan import uniform_plan
from teal_cli.sparsity.teal_format import TealHistogram, check_widths, read_histograms
from teal_kernels.spec import SITES

WIDTHS = {"attn_in": 4096, "attn_out": 4096, "mlp_in": 4096, "mlp_mid": 14336}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teal") / "histograms"
    write_layer(folder / "layer-0")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "histograms"))


def test_thresholds_are_teals(original: Path) -> None:
    histogram = read_histograms(original)
    for site, sparsity, threshold in expected():
        assert histogram.threshold(0, site, sparsity) == pytest.approx(threshold, rel=1e-5), (site, sparsity)


def test_a_negative_threshold_drops_nothing_and_reaches_the_plan(original: Path) -> None:
    histogram = read_histograms(original)
    assert histogram.threshold(0, "attn_in", 0.05) < 0
    made = Provenance(model="m", config_sha256="0", dataset="d", created="now", versions={})
    plan = uniform_plan(Calibration("c", made, histogram), 0.05)
    assert plan.site_threshold(0, "attn_in") < 0
    x = torch.tensor([0.0, -0.0, 1e-30, -3.0])
    assert bool((x.abs() > plan.site_threshold(0, "attn_in")).all())


def test_the_folder_above_is_found(original: Path) -> None:
    assert read_histograms(original.parent).layers == 1


@pytest.mark.parametrize("site", SITES)
def test_the_abs_rule_is_the_quantile_of_magnitudes(original: Path, site: str) -> None:
    """Against a sample drawn from the bins: what the thresholds drop of it is what was asked for."""
    histogram = read_histograms(original, "abs")
    index = SITES.index(site)
    counts, centers = histogram.counts[0, index], histogram.centers[0, index].astype(np.float64)
    rng = np.random.default_rng(0)
    width = centers[2] - centers[1]
    inner = counts[1:-1].astype(np.float64)
    x = np.repeat(centers[1:-1], rng.multinomial(400_000, inner / inner.sum()))
    x = x + rng.uniform(-width / 2, width / 2, x.size)
    outside = float(counts[0] + counts[-1]) / float(counts.sum(dtype=np.float64))
    for sparsity in (0.25, 0.5, 0.9):
        dropped = np.mean(np.abs(x) <= histogram.threshold(0, site, sparsity)) * (1 - outside)
        assert dropped == pytest.approx(sparsity, abs=0.004)


def test_the_abs_rule_is_exact_for_a_lopsided_histogram() -> None:
    """x uniform on [-1, 3]: P(|x| <= t) is t/2 up to 1, and (1 + t)/4 beyond."""
    centers = np.linspace(-1, 3, 400, endpoint=False, dtype=np.float32) + np.float32(0.005)
    both = np.broadcast_to(centers, (1, 4, 400)).copy()
    histogram = TealHistogram(np.ones((1, 4, 400), np.float32), both, "abs")
    assert histogram.threshold(0, "mlp_in", 0.25) == pytest.approx(0.5, abs=1e-4)
    assert histogram.threshold(0, "mlp_in", 0.75) == pytest.approx(2.0, abs=1e-4)


def test_widths_of_the_model_it_was_made_from(original: Path) -> None:
    check_widths(read_histograms(original), WIDTHS)


def test_widths_of_another_model(original: Path) -> None:
    with pytest.raises(TealError, match=r"layer 0 .* mlp_mid 11008"):
        check_widths(read_histograms(original), {**WIDTHS, "mlp_mid": 11008})


def test_missing_layers_are_named(folder: Path) -> None:
    shutil.copytree(folder / "layer-0", folder / "layer-3")
    with pytest.raises(TealError, match=r"lacks layer-1, layer-2, though it has layer-3"):
        read_histograms(folder)


def test_the_number_of_a_layer_costs_nothing(folder: Path) -> None:
    (folder / "layer-1000000000").mkdir()
    with pytest.raises(TealError, match=r"lacks layer-1, .* layer-4 and 999,?999,?995 more layers, though"):
        read_histograms(folder)
    (folder / "layer-1000000000").rmdir()
    (folder / f"layer-{'9' * 200}").mkdir()
    assert read_histograms(folder).layers == 1, "no name that TEAL gives"


def test_a_missing_file(folder: Path) -> None:
    (folder / "layer-0" / "mlp" / "histograms.pt").unlink()
    with pytest.raises(TealError, match=r"mlp.histograms\.pt is missing"):
        read_histograms(folder)


@pytest.mark.parametrize("keep", [0, 10, 50_000])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    file = folder / "layer-0" / "mlp" / "histograms.pt"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(TealError, match="is damaged"):
        read_histograms(folder)


def test_a_pickle_is_not_run(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return eval, ("1 / 0",)

    (folder / "layer-0" / "mlp" / "histograms.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(TealError, match="is damaged, or not a file of tensors"):
        read_histograms(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("h2"), "lacks h2"),
        (lambda c: c.update(h1=c["h1"][:-1]), "bins of h1"),
        (lambda c: c.update(h1_centers=c["h1_centers"].flip(0)), "bins of h1"),
        (lambda c: c["h1"].__setitem__(7, float("nan")), "bins of h1"),
        (lambda c: c["h1"].__setitem__(7, -1.0), "bins of h1"),
    ],
)
def test_bins_that_make_no_histogram(folder: Path, change: object, says: str) -> None:
    file = folder / "layer-0" / "mlp" / "histograms.pt"
    content = torch.load(file, weights_only=True)
    change(content)  # type: ignore[operator]
    torch.save(content, file)
    with pytest.raises(TealError, match=says):
        read_histograms(folder)


ODD = {
    "none": torch.empty(0),
    "complex": torch.ones(10_000, dtype=torch.complex64),
    "truth": torch.ones(10_000, dtype=torch.bool),
    "sparse": torch.ones(10_000).to_sparse(),
    "nowhere": torch.ones(10_000, device="meta"),
    "with a gradient": torch.ones(10_000, requires_grad=True),
    "billions in four bytes": torch.ones(1).expand(10**10),
    "infinite": torch.full((10_000,), float("inf")),
    "one number": torch.tensor(1.0),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("key", ["h1", "h2_centers"])
def test_odd_tensors(folder: Path, kind: str, key: str) -> None:
    file = folder / "layer-0" / "mlp" / "histograms.pt"
    content = torch.load(file, weights_only=True)
    torch.save(content | {key: ODD[kind]}, file)
    with pytest.raises(TealError, match=rf"histograms\.pt.*{key[:2]}"):
        read_histograms(folder)


def test_no_such_folder_and_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no folder"):
        read_histograms(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="has no folders layer-0"):
        read_histograms(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotFoundError, match="is a file") as refused:
        read_histograms(tmp_path / "file")
    assert "histograms` folder that TEAL wrote" in str(refused.value.hint)

"""Perplexity as `teal eval` tells it against transformers' own model on the same windows: of every family, under every
criterion, and of a real model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_cli import Teal
from reference_model import kept_by, masked_logits

from teal_cli.data.sources import open_source
from teal_cli.data.tokenizer import load_tokenizer
from teal_cli.data.windows import cut
from teal_cli.model.transformer import Transformer
from teal_cli.passes.forward import Sparse, Where, forward
from teal_cli.passes.layers import ResidentLayers
from teal_cli.registry.registry import Registry
from teal_cli.runs.plans import find_plan
from teal_cli.sparsity.calibration import Calibration
from teal_cli.sparsity.plan import Plan, uniform_plan
from teal_kernels.spec import SITE_PROJECTIONS

START = 8
SMALL = ("--tokens", 128, "--seq-len", 32, "--sparse-from", START, "-d", "python-docs")


def perplexity(logits: list[torch.Tensor], targets: list[np.ndarray]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(rows.double(), torch.from_numpy(wanted), reduction="sum")
        for rows, wanted in zip(logits, targets, strict=True)
    ]
    return math.exp(float(sum(losses)) / sum(map(len, targets)))


def assert_as_transformers(teal: Teal, model: str, plan: Plan, *arguments: object, window: int, count: int) -> None:
    """Dense and under the plan that `arguments` name, to 1e-3 relative; the two differ by more than that.

    transformers applies the masks of the pass, each of which is the one that transformers' own vectors give but for
    ties: left to threshold for itself, one rounding at a threshold would send a real model apart for good.
    """
    common = ("-m", model, "-d", "python-docs", "--split", "test", "-n", count, "--window", window)
    common = (*common, "--sparse-from", START, "--dtype", "float32", "--json")
    entry = Registry().get(model)
    text = open_source("python-docs", split="test")
    windows = cut(text, load_tokenizer(entry.path), convention="window", count=count, length=window).windows
    inputs, targets = [w.inputs for w in windows], [w.targets for w in windows]
    assert len(inputs) == count
    masks = Masks(plan)
    layers = ResidentLayers(Transformer.from_checkpoint(entry.path, torch.float32))
    for _ in forward(layers, inputs, [Sparse(plan, START)], visit=masks.visit):
        pass
    expected = [perplexity(masked_logits(entry.path, inputs, keep, START), targets) for keep in (None, masks.keep)]
    assert masks.differing < 1e-4 * masks.entries
    assert abs(expected[1] / expected[0] - 1) > 5e-3
    for levels, wanted in zip((("-s", 0), arguments), expected, strict=True):
        ran = teal("eval", *common, *levels)
        assert ran.code == 0, ran.err
        assert ran.json["levels"][0]["perplexity"] == pytest.approx(wanted, rel=1e-3)


class Masks:
    """What a plan keeps in our pass, and how often transformers' own vectors would have had it otherwise."""

    def __init__(self, plan: Plan) -> None:
        self._kept: dict[tuple[int, int, str], torch.Tensor] = {}
        self._own = kept_by(plan)
        self.differing = self.entries = 0

    def visit(self, where: Where, x: torch.Tensor, kept: torch.Tensor) -> None:
        if where.variant is not None:
            for projection in SITE_PROJECTIONS[where.site]:
                read = self._own(where.sequence, where.layer, projection, x)
                self._kept[where.sequence, where.layer, projection] = read == x

    def keep(self, row: int, layer: int, projection: str, x: torch.Tensor) -> torch.Tensor:
        own = self._own(row, layer, projection, x)
        mask = self._kept[row, layer, projection]
        self.differing += int(((own == x) != mask).sum())
        self.entries += x.numel()
        dropped = self._own(row, layer, projection, torch.full_like(x, torch.nan))  # what stands for a dropped entry
        return torch.where(mask, x, dropped)


def calibrate(teal: Teal, model: str, tokens: int) -> None:
    ran = teal("calibrate", "-m", model, "-d", "python-docs", "-n", 2, "--seq-len", tokens, "--dtype", "float32")
    assert ran.code == 0, ran.err


def test_every_family(tiny_family: Path, teal: Teal) -> None:
    assert teal("download", tiny_family, "--name", "tiny").code == 0
    calibrate(teal, "tiny", 64)
    plan = uniform_plan(Calibration.load(Registry().find_calibration("tiny")), 0.5)
    assert_as_transformers(teal, "tiny", plan, "-s", 0.5, window=48, count=2)


@pytest.mark.parametrize("criterion", ["magnitude", "wina", "centred", "topk"])
def test_every_criterion(ready: Path, teal: Teal, criterion: str) -> None:
    """Levels differ between projections of one site, as an allocation makes them."""
    made = teal(
        "plan", "make", "-m", "tiny", "--allocation", "greedy", "--criterion", criterion, "--name", "mine", *SMALL
    )
    assert made.code == 0, made.err
    assert_as_transformers(
        teal, "tiny", find_plan(Registry().get("tiny"), "mine").plan, "--plan", "mine", window=48, count=2
    )


@pytest.mark.slow
def test_a_real_model(smollm2_home: Path, teal: Teal) -> None:
    calibrate(teal, "smollm2-135m", 128)
    plan = uniform_plan(Calibration.load(Registry().find_calibration("smollm2-135m")), 0.5)
    assert_as_transformers(teal, "smollm2-135m", plan, "-s", 0.5, window=96, count=2)

"""Thresholds of channels that are learned: their gradient by autograd through transformers' model, and the gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_cli import Teal
from fixtures_tiny import VOCAB
from hypothesis import given
from hypothesis import strategies as st
from oracle import reference_model
from reference_model import MODULES, relative_rms

from teal_cli import open_store
from teal_cli.model.transformer import Transformer
from teal_cli.model.weights import Checkpoint
from teal_cli.passes import learn as module
from teal_cli.passes.judge import Judged, judge
from teal_cli.passes.layers import ResidentLayers, StreamedLayers
from teal_cli.passes.learn import learn
from teal_cli.passes.scores import ScoreHistogram, score_histogram
from teal_cli.registry.registry import Registry
from teal_cli.runs.plans import find_plan
from teal_cli.sparsity.criteria import learned_scoring
from teal_cli.sparsity.criterion import Scoring
from teal_cli.sparsity.plan import Plan
from teal_kernels.spec import PROJECTION_INDEX, PROJECTION_SITE, PROJECTIONS, SITE_PROJECTIONS, columns

START = 5


def even_plan(layers: Any, sparsity: float, tokens: list[np.ndarray]) -> Plan:
    """The same level everywhere, by the magnitudes of these tokens."""
    *_, histogram = score_histogram(layers, tokens, Scoring())
    shape = (layers.config.layers, len(PROJECTIONS))
    found = [[histogram.threshold(i, p, sparsity) for p in PROJECTIONS] for i in range(shape[0])]
    return Plan(sparsity, "uniform", np.full(shape, sparsity), np.array(found, np.float32), None)


def transformers_gradients(path: Path, tokens: np.ndarray, plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Site -> [layers, P, K]: the gradients of the mean KL(dense || sparse) after `START`, and of the dropped share of
    bytes, at the logarithms of thresholds; entries masked by hooks on transformers' linear layers."""
    model, seen = reference_model(path), {}
    with torch.no_grad():
        dense = model(input_ids=torch.from_numpy(tokens)[None]).logits[0, START:].float().log_softmax(-1)
    for index, layer in enumerate(model.model.layers):
        for projection, parent in MODULES.items():
            limit = float(plan.thresholds[index, PROJECTION_INDEX[projection]])

            def hook(m: Any, inputs: Any, key: Any = (index, projection), limit: float = limit) -> tuple[torch.Tensor]:
                x = inputs[0][0]
                kept = (x.detach().abs() > limit) | (torch.arange(len(x)) < START)[:, None]
                read = (x * kept)[None]
                read.retain_grad()
                seen[key] = (x.detach()[START:].double(), read, limit)
                return (read,)

            getattr(getattr(layer, parent), f"{projection}_proj").register_forward_pre_hook(hook)
    embedded = model.model.embed_tokens(torch.from_numpy(tokens)[None]).detach().requires_grad_()
    sparse = model(inputs_embeds=embedded).logits[0, START:].float().log_softmax(-1)
    (dense.exp() * (dense - sparse)).sum(-1).mean().backward()
    weights = {key: model.model.layers[key[0]].get_submodule(f"{MODULES[key[1]]}.{key[1]}_proj").weight for key in seen}
    every = sum(weight.numel() for weight in weights.values())
    losses: dict[str, Any] = {site: [] for site in SITE_PROJECTIONS}
    shares: dict[str, Any] = {site: [] for site in SITE_PROJECTIONS}
    for key in sorted(seen, key=lambda key: (key[0], PROJECTION_INDEX[key[1]])):
        x, read, limit = seen[key]
        ratio = (x / limit) ** 4
        bell = 4 * ratio / (1 + ratio).square()
        site = PROJECTION_SITE[key[1]]
        losses[site].append(-(read.grad[0, START:].double() * x * bell).sum(0))
        shares[site].append(bell.mean(0) * weights[key].numel() / every / x.shape[1])

    def stacked(found: dict[str, Any]) -> dict[str, Any]:
        return {
            site: torch.stack(rows).view(-1, len(SITE_PROJECTIONS[site]), len(rows[0])) for site, rows in found.items()
        }

    return stacked(losses), stacked(shares)


@pytest.mark.parametrize("streamed", [False, True])
def test_its_gradients_are_those_of_transformers(tiny_family: Path, streamed: bool) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCAB, 16)
    resident = ResidentLayers(Transformer.from_checkpoint(tiny_family, torch.float32))
    layers = StreamedLayers(Checkpoint(tiny_family), torch.float32, torch.device("cpu")) if streamed else resident
    plan = even_plan(resident, 0.5, [tokens])
    losses, shares = transformers_gradients(tiny_family, tokens, plan)
    descent = module._Descent(layers, plan, START, 1)
    descent._move = lambda rows: None  # type: ignore[method-assign]
    for _ in descent.step([tokens]):
        pass
    for site in SITE_PROJECTIONS:
        assert relative_rms(descent._views[1][site], losses[site]) < 1e-3, site
        assert relative_rms(descent._views[2][site] / (16 - START), shares[site]) < 1e-3, site
    assert float(descent._dropped) / (16 - START) == pytest.approx(0.5, abs=0.1)


def test_it_comes_nearer_to_dense_at_the_same_bytes(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four sequences a step, ten steps, judged on the tokens it learned from: less than 0.75 of the divergence."""
    monkeypatch.setattr(module, "BATCH", 4)
    layers = ResidentLayers(Transformer.from_checkpoint(tiny("llama3"), torch.float32))
    tokens = [np.random.default_rng(i).integers(0, VOCAB, 24) for i in range(4)] * 10
    plan = even_plan(layers, 0.5, tokens[:4])
    *events, found = learn(layers, tokens, plan, START)
    assert (events[-1].done, events[-1].total) == (3 * 3 * 40, 3 * 3 * 40)
    again = list(learn(layers, tokens, plan, START))[-1]
    assert all(np.array_equal(found[site], again[site]) for site in found)
    scoring, table = learned_scoring(found)
    *_, histogram = score_histogram(layers, tokens[:4], scoring)
    judged: list[Judged] = []
    for nominal in (0.44, 0.48, 0.5, 0.52, 0.56):
        levels = histogram.levels(table, layers.config.projection_sizes(), nominal)
        limits = [[histogram.threshold(i, p, levels[i, j]) for j, p in enumerate(PROJECTIONS)] for i in range(3)]
        learned = Plan(0.5, "learned", levels, np.array(limits, np.float32), None, scoring)
        *_, both = judge(layers, tokens[:4], [(0.5, plan), (0.5, learned)], START)
        judged = (
            both
            if nominal == 0.44
            or abs(both[1].realised - both[0].realised) < abs(judged[1].realised - judged[0].realised)
            else judged
        )
    assert judged[1].realised == pytest.approx(judged[0].realised, abs=0.02)
    assert judged[1].kl < 0.75 * judged[0].kl


@pytest.mark.parametrize(("steps", "longest"), [(2, 0.12), (10, 0.12), (40, 0.03), (80, 0.015)])
def test_steps_are_shorter_the_more_there_are(tiny: Any, steps: int, longest: float) -> None:
    """Along gradients that all agree the first step is the longest, and all together come no further than they may."""
    layers = ResidentLayers(Transformer.from_checkpoint(tiny("llama3"), torch.float32))
    plan = even_plan(layers, 0.5, [np.arange(24) % VOCAB])
    descent = module._Descent(layers, plan, START, steps)
    moved = []
    for _ in range(steps):
        before = descent._logs.clone()
        descent._loss.fill_(1.0)[::2] = -1.0
        descent._bytes.fill_(1.0)
        descent._dropped.fill_(0.5)
        descent._move(1)
        moved.append(float((descent._logs - before).abs().max()))
    assert moved[0] == pytest.approx(longest, rel=1e-3)
    assert moved == sorted(moved, reverse=True)
    assert sum(moved) < 1.2


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 0.9))
def test_levels_by_one_factor_drop_what_is_wanted(seed: int, nominal: float) -> None:
    rng = np.random.default_rng(seed)
    histogram, sizes = ScoreHistogram.empty(2), dict(zip(PROJECTIONS, (8, 4, 4, 8, 24, 24, 24), strict=True))
    for layer in range(2):
        for projection in PROJECTIONS:
            histogram.add(layer, projection, torch.from_numpy(np.abs(rng.standard_normal(20_000, np.float32))))
    table = np.exp(rng.uniform(-1, 1, (2, 7))).astype(np.float32)
    levels = histogram.levels(table, sizes, nominal)
    weights = np.broadcast_to(list(sizes.values()), (2, 7))
    assert np.average(levels, weights=weights) == pytest.approx(nominal, abs=0.01)
    factors = [
        histogram.threshold(i, p, levels[i, j]) / table[i, j]
        for i in range(2) for j, p in enumerate(PROJECTIONS) if 0.1 < levels[i, j] < 0.95
    ]  # fmt: skip
    assert max(factors) <= min(factors) * 1.02  # a bin is up to 1/128 wide


@given(st.integers(0, 2**32 - 1))
def test_its_criterion_keeps_what_exceeds_the_threshold_of_its_channel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    limits = {
        site: np.exp(rng.uniform(-6, 3, (2, len(group), 5))).astype(np.float32)
        for site, group in SITE_PROJECTIONS.items()
    }
    scoring, table = learned_scoring(limits)
    assert table.shape == (2, 7)
    applied = scoring.thresholds(table)
    for layer in range(2):
        for site in SITE_PROJECTIONS:
            np.testing.assert_allclose(applied.site(layer, site), limits[site][layer], rtol=1e-5)
            np.testing.assert_allclose(
                np.log(limits[site][layer]).mean(1), np.log(table[layer, columns(site)]), atol=1e-5
            )


def test_levels_of_one_search_nest_and_a_dump_of_them_verifies(ready: Path, teal: Teal, tmp_path: Path) -> None:
    small = ("--tokens", 128, "--seq-len", 32, "--sparse-from", 4, "-d", "python-docs")
    made = teal("plan", "make", "-m", "tiny", "-s", "0.3,0.6", "--allocation", "learned", *small, "--json")
    assert made.code == 0, made.err
    assert [plan["name"] for plan in made.json["plans"]] == ["learned-0.3", "learned-0.6"]
    plans = [find_plan(Registry().get("tiny"), plan["name"]).plan for plan in made.json["plans"]]
    if {plan["made"]["kl_to_uniform"] < 1 for plan in made.json["plans"]} == {True}:
        assert [plan.scoring.criterion for plan in plans] == ["learned"] * 2
        assert all(np.array_equal(plans[0].scoring.scale[s], plans[1].scoring.scale[s]) for s in SITE_PROJECTIONS)
        assert (plans[0].thresholds <= plans[1].thresholds).all()
    assert teal("plan", "make", "-m", "tiny", "-s", 0.3, "--name", "alone", "--allocation", "learned", *small).code == 0
    alone = find_plan(Registry().get("tiny"), "alone").plan
    assert alone.to_json() == plans[0].to_json(), "of two levels the lower one is what is learned"
    path = tmp_path / "store.zarr"
    options = ("--max-new-tokens", 6, "--ignore-eos", "-d", "python-docs", "-n", 2)
    ran = teal("dump", "-m", "tiny", "--plan", "learned-0.6", *options, "-o", path)
    assert ran.code == 0, ran.err
    assert teal("store", "verify", path, "--replay", 4).code == 0
    assert open_store(path).header.criterion["name"] == plans[1].scoring.criterion


def test_an_interrupted_search_goes_on_where_it_was(ready: Path, teal: Teal, monkeypatch: pytest.MonkeyPatch) -> None:
    """After two of four steps, and again after the last one: the thresholds are those of a search that ran through."""
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr("teal_cli.runs.saved_search._KEEP_EVERY_S", 0.0)
    small = ("--tokens", 256, "--seq-len", 32, "--sparse-from", 4, "-d", "python-docs", "--allocation", "learned")
    make = ("plan", "make", "-m", "tiny", "-s", 0.5, *small)
    assert teal(*make, "--name", "whole").code == 0
    step, begun = module._Descent.step, []

    def stopped(self: Any, batch: Any) -> Any:
        begun.append(self.steps)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(module._Descent, "step", stopped)
    ran = teal(*make, "--name", "part")
    assert (ran.code, "the same command goes on" in " ".join(ran.err.split())) == (130, True)
    with monkeypatch.context() as patch:
        patch.setattr("teal_cli.runs.make_plan.learned_scoring", _interrupt)
        assert teal(*make, "--name", "part").code == 130
    resumed = teal(*make, "--name", "part")
    assert resumed.code == 0, resumed.err
    assert "went on after 4 steps" in " ".join(resumed.err.split())
    assert begun == [0, 1, 2, 2, 3]
    plans = [find_plan(Registry().get("tiny"), name).plan for name in ("whole", "part")]
    assert plans[0].to_json() == plans[1].to_json()
    for site in SITE_PROJECTIONS:
        assert np.array_equal(*(plan.scoring.scale[site] for plan in plans))
    assert [file.name for file in (Registry().get("tiny").home / "plans").iterdir() if file.is_file()] == []


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_short_text_is_told(ready: Path, teal: Teal, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    made = teal("plan", "make", "-m", "tiny", "--seq-len", 32, "--sparse-from", 4, "-d", text)
    assert made.code == 0, made.err
    assert "to make plans from, fewer than the 4,096 that are usual" in " ".join(made.err.split())

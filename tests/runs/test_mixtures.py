"""Mixtures of experts against transformers' own model: what is counted, what is dropped, what comes out."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_cli import Teal
from fixtures_talker import TEMPLATE
from fixtures_tiny import MIXTURES, VOCAB, make_tiny
from reference_model import MODULES, reference
from torch import Tensor

from teal_cli.decoding.projector import empty_rows
from teal_cli.decoding.steps import NUMBA, open_step
from teal_cli.errors import HardwareError, TealError, UsageError
from teal_cli.model.config import load_config
from teal_cli.model.transformer import Transformer
from teal_cli.model.weights import Checkpoint
from teal_cli.passes.forward import Sparse, States, Where, forward
from teal_cli.passes.layers import ResidentLayers
from teal_cli.passes.observe import Observed, observe
from teal_cli.registry.download import fetch
from teal_cli.registry.registry import Registry
from teal_cli.runs.calibrate import Text, calibrate
from teal_cli.runs.make_plan import PlanMaker
from teal_cli.runs.plan_request import PlanRequest
from teal_cli.runs.quantize import quantize_model
from teal_cli.runs.session import open_session
from teal_cli.sparsity.calibration import FEW_TOKENS, Calibration, Provenance
from teal_cli.sparsity.plan import Plan, uniform_plan
from teal_cli.sparsity.realised import realised
from teal_kernels.experts import EXPERT
from teal_kernels.spec import PROJECTION_INDEX, PROJECTIONS

CPU = torch.device("cpu")
START, COUNT = 7, 20
TOKENS = np.random.default_rng(5).integers(0, VOCAB, (4, COUNT))


def calibration_of(path: Path, tokens: np.ndarray = TOKENS) -> Calibration:
    *_, seen = observe(Checkpoint(path), tokens, torch.float32, CPU)
    assert isinstance(seen, Observed)
    made = Provenance(model="tiny", config_sha256="0" * 64, dataset="random", created="now", versions={})
    return Calibration("tiny", made, seen.histogram)


@torch.inference_mode()
def masked(path: Path, tokens: np.ndarray, plan: Plan, start: int) -> tuple[Tensor, dict[tuple[int, str], Tensor], Any]:
    """transformers' logits [S, vocab] of one sequence whose linear layers read, from `start` on, what exceeds the
    thresholds: in `down` each part of a row those of the expert that transformers routes it to. Also what they read."""
    model, read = reference(path), {}
    for index, layer in enumerate(model.model.layers):
        experts = getattr(layer.mlp, "experts", None)

        def hook(module: Any, args: Any, index: int = index, p: str = "", experts: Any = experts) -> tuple[Tensor]:
            x = args[0].clone()
            limit = torch.full(x.shape[1:], float(plan.thresholds[index, PROJECTION_INDEX[p]]))
            if p == "down" and experts is not None and plan.experts is not None:
                own = torch.tensor(plan.experts[index])[experts.seen[-1]]
                limit = own.repeat_interleave(x.shape[-1] // own.shape[1], 1)
            x[0, start:] = torch.where(x[0, start:].abs() > limit[start:], x[0, start:], 0.0)
            read[index, p] = x[0, start:]
            return (x,)

        for p in PROJECTIONS:
            linear = getattr(getattr(layer, MODULES[p]), f"{p}_proj")
            linear.register_forward_pre_hook(lambda m, a, h=hook, p=p: h(m, a, p=p))
    return model(torch.from_numpy(tokens)[None]).logits[0], read, model


@pytest.mark.parametrize("name", MIXTURES)
def test_each_expert_is_counted_and_has_thresholds_of_its_own(tiny: Callable[[str], Path], name: str) -> None:
    path = tiny(name)
    found, config = calibration_of(path), load_config(path)
    assert config.mixture is not None
    experts = found.histogram.experts
    assert experts is not None
    few = {(layer, expert): count for layer, expert, count in found.scarce_experts()}
    plan = uniform_plan(found, 0.5)
    assert plan.experts is not None
    dense = Plan(0.0, "uniform", np.zeros((config.layers, 7)), np.zeros((config.layers, 7), np.float32), None)
    runs = [masked(path, row, dense, 0) for row in TOKENS]
    for layer, mixed in enumerate(config.mixture.layers):
        if not mixed:
            assert not experts.tokens(layer).any()
            continue
        routed = torch.cat([model.model.layers[layer].mlp.experts.seen[0] for *_, model in runs])
        rows = torch.cat([read[layer, "down"] for _, read, _ in runs]).unflatten(1, (*routed.shape[1:], -1))
        tokens = np.bincount(routed.flatten().numpy(), minlength=config.mixture.experts)
        assert (experts.tokens(layer) == tokens).all()
        for expert, count in enumerate(tokens):
            if count < FEW_TOKENS:
                assert few[layer, expert] == count
                assert plan.experts[layer, expert] == plan.thresholds[layer, PROJECTION_INDEX["down"]]
            else:
                values = rows[routed == expert].abs().flatten()
                own = float(values.bfloat16().float().quantile(0.5, interpolation="lower"))
                assert plan.experts[layer, expert] == pytest.approx(own, rel=0.01)
    assert few.keys() != {(i, e) for i in range(config.layers) for e in range(config.mixture.experts)}
    assert abs(realised(found.histogram, plan).mean - 0.5) < 0.03


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_steps_and_passes_equal_transformers(tiny: Callable[[str], Path], name: str, sparsity: float) -> None:
    path = tiny(name)
    model = Transformer.from_checkpoint(path, torch.float32)
    plan, tokens = uniform_plan(calibration_of(path), sparsity), TOKENS[0]
    expected, read, theirs = masked(path, tokens, plan, START)
    seen: dict[tuple[int, str], Tensor] = {}
    ends: list[States] = []

    def visit(where: Where, x: Tensor, kept: Tensor) -> None:
        if where.variant == 0:
            seen[where.layer, where.site] = kept.clone()

    layers = ResidentLayers(model)
    kept = np.zeros((model.config.layers, 7), np.int64)
    for _ in forward(layers, [tokens], [Sparse(plan, START, kept)], visit=visit, sink=lambda _, s: ends.append(s)):
        pass
    torch.testing.assert_close(layers.open_head().logits(ends[0].sparse[0]), expected[START:], rtol=1e-4, atol=1e-3)
    for backend in ("cpu", "reference"):
        cache = model.cache(COUNT)
        step = open_step(model, cache, plan.applied(), backend, sparsity)
        model.forward(torch.from_numpy(tokens[:START]), 0, cache)
        for at in range(COUNT - START):
            rows = empty_rows(model.config, torch.float32, CPU)
            logits = step(int(tokens[START + at]), START + at, rows)
            torch.testing.assert_close(logits, expected[START + at], rtol=1e-4, atol=1e-3)
            for (layer, p), row in read.items():
                site = {"q": "attn_in", "o": "attn_out", "gate": "mlp_in", "down": "mlp_mid"}.get(p)
                if site is not None:
                    torch.testing.assert_close(rows[site][layer], row[at], rtol=1e-4, atol=1e-4)
                    torch.testing.assert_close(rows[site][layer], seen[layer, site][at], rtol=1e-4, atol=1e-5)
            for layer, module in enumerate(theirs.model.layers):
                if hasattr(module.mlp, "experts"):
                    assert rows[EXPERT][layer].tolist() == module.mlp.experts.seen[0][START + at].tolist()
        counted = step.kept()
        assert counted is not None
        np.testing.assert_array_equal(counted, kept)


def test_a_calibration_is_kept_whole_and_decoding_uses_it(tiny: Callable[[str], Path], teal_home: Path) -> None:
    fetch(str(tiny("mixtral")), name="tiny")
    *_, made = calibrate(Registry(), "tiny", Text("python-docs", num_sequences=2, seq_len=64), device=CPU)
    read = Calibration.load(made.folder)
    ours, theirs = made.calibration.histogram.experts, read.histogram.experts
    np.testing.assert_array_equal(ours.counts, theirs.counts)
    session = open_session("tiny", device="cpu")
    assert session.backend == "cpu"
    assert "numba takes no mixture of experts" in session.notes[0]
    plan = session.plan(0.5)
    np.testing.assert_array_equal(plan.experts, uniform_plan(made.calibration, 0.5).experts)
    assert Plan.from_json(plan.to_json()).experts.tobytes() == plan.experts.tobytes()
    *_, named = PlanMaker(Registry(), PlanRequest((0.5,), model="tiny")).run()
    np.testing.assert_array_equal(named.named.plan.experts, plan.experts)


def test_what_takes_no_mixture_says_so(tiny: Callable[[str], Path], teal_home: Path, tmp_path: Path) -> None:
    fetch(str(tiny("olmoe")), name="tiny")
    *_, _ = calibrate(Registry(), "tiny", Text("python-docs", num_sequences=2, seq_len=64), device=CPU)
    with pytest.raises(UsageError, match="quantisation takes no mixture of experts, which OLMoE is"):
        next(quantize_model(Registry(), "tiny", "int8"))
    for request in ({"allocation": "fisher"}, {"criterion": "wina"}, {"closed_loop": True}):
        with pytest.raises(UsageError, match="takes no mixture of experts"):
            PlanMaker(Registry(), PlanRequest((0.5,), model="tiny", **request))
    with pytest.raises(HardwareError, match=r"numba.*takes no mixture of experts"):
        open_session("tiny", device="cpu", backend=NUMBA)


def test_the_commands_take_a_mixture(
    tiny: Callable[[str], Path], teal_home: Path, teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("olmoe"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    assert teal("download", folder, "--name", "tiny").code == 0
    assert teal("calibrate", "-m", "tiny", "-d", "python-docs", "-n", 2, "--seq-len", 64).code == 0
    assert teal("plan", "make", "-m", "tiny", "-s", "0.5", "--allocation", "uniform", "--tokens", 128).code == 0
    text = ("-m", "tiny", "-d", "python-docs", "-n", 1, "--window", 96, "--json")
    assert teal("eval", *text, "--plan", "uniform-0.5").json["levels"][-1]["plan"] == "uniform-0.5"
    dense, sparse = teal("eval", *text, "-s", "0,0.9").json["levels"]
    assert dense["kl"] == 0 < sparse["kl"]
    compared = teal("compare", "-m", "tiny", "-s", "0.5", "-p", "The quick", "--max-new-tokens", 4, "--json")
    assert compared.code == 0, compared.err
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    said = teal("chat", "-m", "tiny", "-s", "0.5", "--max-new-tokens", 3, "--json")
    assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, "a token passes 9 of 5 experts"),
        ("qwen3-moe", {"intermediate_size": 100}, "some layers have experts and others an MLP of width 100"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    ],
)
def test_a_config_is_checked(tmp_path: Path, name: str, fields: dict[str, Any], message: str) -> None:
    path = make_tiny(tmp_path / "tiny", name)
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | fields))
    with pytest.raises(TealError, match=message):
        load_config(path)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "tiny", "mixtral")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_local_experts": 6}))
    with pytest.raises(TealError, match=r"lacks the tensor model.layers.0.block_sparse_moe.experts.5.w1.weight"):
        Checkpoint(path)

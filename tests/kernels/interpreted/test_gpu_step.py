"""The whole step, interpreted, against the step in plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_cases import relative_error
from kernel_models import plan, scaled, tiny_model

from teal_kernels.matrix import FloatMatrix
from teal_kernels.parts.sample.reference import SamplingRule
from teal_kernels.spec import columns
from teal_kernels.steps.gpu.op import GpuStep
from teal_kernels.steps.gpu.reference import gpu_step_reference
from teal_kernels.traits import GELU_TANH, Traits

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}

FAMILIES = {
    "llama": {},
    "qwen2": {"biases": True},
    "qwen3": {"qk_norm": True, "head_dim": 32, "heads": 2, "kv_heads": 1},
    "mistral": {"windows": (5, 5)},
    "gemma": {
        "qk_norm": True, "norms_after": True, "windows": (5, None), "ropes": (0, 1),
        "traits": Traits(
            norm_offset=1.0, norm_rounds_once=True, activation=GELU_TANH, attention_scale=0.3, score_cap=3.0,
            embedding_scale=48**0.5, logit_cap=4.0,
        ),
    },
    "scaled": {"traits": Traits(residual_scale=0.4, logit_scale=0.25)},
    "norms after": {
        "qk_norm": True, "norms_before": False, "norms_after": True,
        "traits": Traits(wide_head_norms=True, norm_rounds_once=True),
    },
    "odd": {"heads": 3, "kv_heads": 3, "head_dim": 24, "hidden": 50, "intermediate": 77, "windows": (None, 3)},
}  # fmt: skip


def reference(model, thresholds, token, position):
    _, layers, *ends, rope, keys, values = model.arguments()
    logits, rows = gpu_step_reference(model.spec, layers, tuple(ends), rope, keys, values, thresholds, token, position)
    return logits, rows, keys, values


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_float32(family, sparse):
    model = tiny_model(torch.float32, **FAMILIES[family])
    thresholds = plan(2) if sparse else None
    arguments = model.arguments()
    step = GpuStep(*arguments, thresholds=thresholds, ring_slots=3)
    for tensor in (step.ring["mlp_mid"], step.logits, step._streams, step._q, step._attention.mixed):
        tensor.fill_(torch.nan)
    logits = step.step(11, 17)
    wanted, rows, keys, values = reference(model, thresholds, 11, 17)
    assert relative_error(logits, wanted) < TOLERANCE[torch.float32]
    assert relative_error(arguments[-2], keys) < 1e-6
    assert relative_error(arguments[-1], values) < 1e-6
    for site, vectors in rows.items():
        assert torch.equal(step.ring[site][:, 0] == 0, vectors == 0), site
        assert relative_error(step.ring[site][:, 0], vectors) < 1e-5, site
    assert step.slot.item() == 1


@pytest.mark.parametrize("family", ["llama", "odd"])
def test_a_threshold_for_every_channel(family):
    """Rows, counts and logits under a scale of each projection's own."""
    model = tiny_model(torch.float32, **FAMILIES[family])
    thresholds = scaled(plan(2), model.spec)
    step = GpuStep(*model.arguments(), thresholds=thresholds, ring_slots=1)
    wanted, rows, *_ = reference(model, thresholds, 11, 17)
    assert relative_error(step.step(11, 17), wanted) < TOLERANCE[torch.float32]
    kept = step.kept()
    for site, vectors in rows.items():
        assert torch.equal(step.ring[site][:, 0] == 0, vectors == 0), site
        for layer in range(2):
            limits = thresholds.site(layer, site)
            counts = (vectors[layer].abs().numpy() > limits.reshape(len(limits), -1)).sum(1)
            assert kept[layer, columns(site)].tolist() == counts.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_a_step_in_16_bits(family, dtype):
    model = tiny_model(dtype, **FAMILIES[family])
    thresholds = plan(2)
    logits = GpuStep(*model.arguments(), thresholds=thresholds).step(11, 17)
    wanted = reference(model, thresholds, 11, 17)[0]
    assert relative_error(logits, wanted) < TOLERANCE[dtype]


def test_the_first_and_the_last_position():
    model = tiny_model(torch.float32, max_tokens=20)
    step = GpuStep(*model.arguments(), thresholds=plan(2))
    for position in (0, 19):
        fresh = GpuStep(*model.arguments(), thresholds=plan(2))
        assert relative_error(fresh.step(3, position), reference(model, plan(2), 3, position)[0]) < 1e-5
    with pytest.raises(ValueError, match="outside the cache of 20"):
        step.step(3, 20)


def test_counts_what_each_projection_keeps():
    model = tiny_model(torch.float32)
    step = GpuStep(*model.arguments(), thresholds=plan(2))
    step.step(1, 8)
    rows = reference(model, plan(2), 1, 8)[1]
    kept = step.kept()
    sites = ("attn_in",) * 3 + ("attn_out",) + ("mlp_in",) * 2 + ("mlp_mid",)
    wanted = [
        [int((rows[site][i].abs() > float(plan(2).table[i, p])).sum()) for p, site in enumerate(sites)]
        for i in range(2)
    ]
    assert kept.tolist() == wanted
    step.step(1, 8)
    assert np.array_equal(step.kept(), 2 * kept)
    assert GpuStep(*model.arguments()).kept() is None


def test_decodes_on_the_device_as_the_host_would():
    model = tiny_model(torch.float32)
    step = GpuStep(*model.arguments(), thresholds=plan(2), ring_slots=2)
    step.sample(SamplingRule(0.0))
    step.token.fill_(4)
    step.position.fill_(10)
    host = GpuStep(*model.arguments(), thresholds=plan(2))
    token, tokens = 4, []
    for position in range(10, 14):
        step.run()
        token = int(host.step(token, position).argmax())
        tokens.append(token)
        assert step.chosen() == token
    assert step.position.item() == 14
    assert step.token.item() == tokens[-1]
    assert step.slot.item() == 0


def test_wrong_tensors_are_named():
    model = tiny_model(torch.float32)
    arguments = list(model.arguments())
    with pytest.raises(ValueError, match=r"thresholds must be float32 \[2, 7\]"):
        GpuStep(*arguments, thresholds=plan(3))
    arguments[2] = FloatMatrix(arguments[2].tensor().half())
    with pytest.raises(ValueError, match="layer 0, attn_norm"):
        GpuStep(*arguments)
    arguments = list(model.arguments())
    arguments[5] = tuple(t[:, :10] for t in model.rope)
    with pytest.raises(ValueError, match="cos must be"):
        GpuStep(*arguments)

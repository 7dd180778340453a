"""`GpuStep` on a real GPU: the reference's results, the same bits from the graph as from single launches."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import relative_error
from kernel_models import packed_model, plan, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

SHAPES = {
    "tiny": {},
    "qwen3": {"qk_norm": True, "head_dim": 128, "heads": 16, "kv_heads": 2, "hidden": 1024, "intermediate": 3072},
    "mistral": {"windows": (64, None), "head_dim": 64, "heads": 9, "kv_heads": 3, "hidden": 576, "biases": True},
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference_and_the_graph_has_the_same_bits(shape, dtype, sparse):
    from teal_kernels.steps.gpu.op import GpuStep
    from teal_kernels.steps.gpu.reference import gpu_step_reference

    thresholds = plan(2) if sparse else None

    def made(dtype):
        model = tiny_model(dtype, max_tokens=300, device="cuda", **SHAPES[shape])
        arguments = model.arguments()
        keys, values = arguments[-2:]
        wanted = gpu_step_reference(
            model.spec, model.layers, model.ends, model.rope, keys.clone(), values.clone(), thresholds, 11, 250
        )
        return arguments, wanted

    arguments, (logits, rows) = made(dtype)
    _, (exact_logits, exact_rows) = made(torch.float32)
    step = GpuStep(*arguments, thresholds=thresholds, ring_slots=4)
    first = step.step(11, 250).clone()
    assert relative_error(first, logits) < TOLERANCE[dtype]
    assert relative_error(first, exact_logits) < 3 * relative_error(logits, exact_logits) + TOLERANCE[dtype]
    for site, vectors in rows.items():
        # In 16 bits an entry at its threshold is kept or not by rounding, so the reference is off float32 as well.
        allowed = 3 * relative_error(vectors, exact_rows[site]) + TOLERANCE[dtype]
        assert relative_error(step.ring[site][:, 0], exact_rows[site]) < allowed, site
    for _ in range(5):
        assert torch.equal(step.step(11, 250), first)
    for site, ring in step.ring.items():
        assert torch.equal(ring[:, 0], ring[:, 1]), site


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_matrices(bits, dtype, sparse):
    from teal_kernels.steps.gpu.op import GpuStep
    from teal_kernels.steps.gpu.reference import gpu_step_reference

    thresholds = plan(2) if sparse else None
    packed, exact = (packed_model(tiny_model(d, max_tokens=300, device="cuda"), bits) for d in (dtype, torch.float32))

    def reference(model):
        *_, keys, values = model.arguments()
        return gpu_step_reference(model.spec, model.layers, model.ends, model.rope, keys, values, thresholds, 11, 250)

    logits, _ = reference(packed)
    exact_logits, exact_rows = reference(exact)
    step = GpuStep(*packed.arguments(), thresholds=thresholds, ring_slots=2)
    first = step.step(11, 250).clone()
    assert relative_error(first, exact_logits) < 3 * relative_error(logits, exact_logits) + TOLERANCE[dtype]
    if dtype == torch.float32:
        for site, vectors in exact_rows.items():
            assert relative_error(step.ring[site][:, 0], vectors) < TOLERANCE[dtype], site
    for _ in range(5):
        assert torch.equal(step.step(11, 250), first)


def test_decodes_alone_as_it_does_step_by_step():
    from teal_kernels.parts.sample.reference import SamplingRule
    from teal_kernels.steps.gpu.op import GpuStep

    model = tiny_model(torch.bfloat16, max_tokens=100, device="cuda")
    alone = GpuStep(*model.arguments(), thresholds=plan(2))
    alone.sample(SamplingRule(0.0))
    alone.token.fill_(4)
    alone.position.fill_(10)
    led = GpuStep(*model.arguments(), thresholds=plan(2))
    token = 4
    for position in range(10, 50):
        alone.run()
        token = int(led.step(token, position).argmax())
        assert alone.chosen() == token


def test_sampling_depends_on_seed_and_position_only():
    from teal_kernels.parts.sample.reference import SamplingRule
    from teal_kernels.steps.gpu.op import GpuStep

    model = tiny_model(torch.bfloat16, max_tokens=100, device="cuda")
    histories = []
    for seed in (1, 1, 2):
        step = GpuStep(*model.arguments(), thresholds=plan(2))
        step.sample(SamplingRule(20.0, 20, seed=seed))  # the logits of random weights are far apart
        step.token.fill_(4)
        step.position.fill_(10)
        histories.append([(step.run(), step.chosen())[1] for _ in range(40)])
    assert histories[0] == histories[1]
    assert histories[0] != histories[2]

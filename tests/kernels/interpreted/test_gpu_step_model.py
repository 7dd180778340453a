"""The GPU step, interpreted, on checkpoints of every family: the logits and rows of a step by operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_cases import relative_error
from kernel_models import plan

from teal_cli.decoding.projector import DenseProjector, SparseProjector, empty_rows
from teal_cli.model.transformer import Transformer
from teal_kernels.cpu_step.spec import StepSpec
from teal_kernels.gpu_step.op import GpuStep

PROMPT = (3, 50, 17, 200, 99, 4, 31, 8, 77, 120, 5)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_agrees_with_the_transformer(tiny_family, sparse):
    model = Transformer.from_checkpoint(tiny_family, torch.float32)
    config = model.config
    cache = model.cache(32)
    model.forward(torch.tensor(PROMPT), 0, cache)
    spec = StepSpec(
        hidden=config.hidden,
        intermediate=config.intermediate,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab,
        norm_eps=config.norm_eps,
        windows=config.sliding_windows,
    )
    thresholds = plan(config.layers) if sparse else None
    rope = tuple(half[:, 0] for half in model.rope.at(0, 32))
    ends = model.embedding, model.final_norm, model.lm_head
    keys, values = cache.kv.clone().unbind(1)
    step = GpuStep(spec, model.layers, *ends, rope, keys, values, thresholds=thresholds, ring_slots=4)

    rows = empty_rows(config, model.dtype, model.device)
    if thresholds is None:
        project = DenseProjector()
        project.rows = rows
    else:
        project = SparseProjector(config, thresholds, "reference", model.device, rows)
    for i, token in enumerate((7, 160)):
        position = len(PROMPT) + i
        wanted = model.forward(torch.tensor([token]), position, cache, project)
        assert relative_error(step.step(token, position), wanted) < 1e-5
        for site, vectors in rows.items():
            got = step.ring[site][:, i]
            assert relative_error(got, vectors) < 1e-5, site
            assert np.mean(((got == 0) != (vectors == 0)).numpy()) < 0.002, site

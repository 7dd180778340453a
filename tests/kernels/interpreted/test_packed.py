"""The Triton kernels of packed matrices, interpreted, against the reference; and the step with packed weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import DTYPES, TOLERANCE, channel_limits, operands, relative_error, threshold_sets
from kernel_models import packed, packed_model, plan, tiny_model

from teal_kernels.ops.packed.op import launch_packed_dot, launch_unpack_row
from teal_kernels.ops.sparse_gemv.op import sparse_gemv
from teal_kernels.ops.sparse_gemv.reference import sparse_gemv_reference
from teal_kernels.steps.gpu.op import GpuStep
from teal_kernels.steps.gpu.reference import gpu_step_reference

FORMS = [(8, 64), (8, 32), (8, 256), (4, 64), (4, 32), (4, 128)]
forms = pytest.mark.parametrize(("bits", "group"), FORMS)


@pytest.mark.parametrize(
    ("bits", "group", "dtype"),
    [*((*form, torch.float32) for form in FORMS), *((4, 64, dtype) for dtype in DTYPES[:2])],
    ids=str,
)
@pytest.mark.parametrize("shape", [(1, (5,)), (40, (130, 21, 65))], ids=str)
def test_sums_of_kept_rows(shape, bits, group, dtype):
    inputs, segments = shape
    x, weight = operands(inputs, sum(segments), dtype)
    matrix = packed(weight, segments, bits, group, dtype)
    exact = packed(weight, segments, bits, group, torch.float32).tensor().double()
    every = threshold_sets(x, len(segments))
    for name in ("all", "mixed", "none"):
        thresholds = every[name]
        wanted = sparse_gemv_reference(x.double(), exact, thresholds, segments)
        got = sparse_gemv(x, matrix, thresholds, backend="triton")
        assert got.dtype == dtype
        assert relative_error(got, wanted) < TOLERANCE[dtype], name
    limits = channel_limits(x, len(segments))
    parts = [
        torch.where(x.float().abs() > own, x, 0).double() @ part
        for own, part in zip(limits, exact.split(segments, dim=1), strict=True)
    ]
    assert relative_error(sparse_gemv(x, matrix, limits, backend="triton"), torch.cat(parts)) < TOLERANCE[dtype]


@forms
@pytest.mark.parametrize("width", [1, 130])
def test_tables(width, bits, group):
    table = packed(torch.randn(21, width), (width,), bits, group, torch.float32)
    x, out = torch.randn(width), torch.full((21,), torch.nan)
    launch_packed_dot(table, x, out)
    assert relative_error(out, table.tensor().double() @ x.double()) < TOLERANCE[torch.float32]
    row = torch.full((width,), torch.nan)
    launch_unpack_row(table, torch.tensor([19]), row)
    assert torch.equal(row, table.tensor()[19])


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize(("bits", "head"), [(8, True), (4, True), (4, False)])
def test_a_step(bits, head, sparse):
    model = packed_model(tiny_model(torch.float32, biases=True, qk_norm=True), bits, head=head)
    thresholds = plan(2) if sparse else None
    step = GpuStep(*model.arguments(), thresholds=thresholds, ring_slots=2)
    logits = step.step(11, 17)
    _, _, *ends, rope, keys, values = model.arguments()
    wanted, rows = gpu_step_reference(model.spec, model.layers, tuple(ends), rope, keys, values, thresholds, 11, 17)
    assert relative_error(logits, wanted) < 1e-5
    for site, vectors in rows.items():
        assert relative_error(step.ring[site][:, 0], vectors) < 1e-5, site
    assert (step.kept() is None) == (not sparse)


def test_matrices_of_a_site_share_a_layout():
    model = tiny_model(torch.float32)
    first, second = model.layers
    mixed = [replace(first, down=packed(first.down.tensor(), (48,), 4, 64, torch.float32)), second]
    with pytest.raises(ValueError, match="layer 1, down"):
        GpuStep(*replace(model, layers=mixed).arguments())
    other = replace(second, down=packed(second.down.tensor(), (48,), 8, 64, torch.float32))
    with pytest.raises(ValueError, match="layer 1, down"):
        GpuStep(*replace(model, layers=[mixed[0], other]).arguments())

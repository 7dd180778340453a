"""Packed matrices: what is stored, what it stands for, and products with it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from teal_kernels import packing
from teal_kernels.packing import UNIT, RowLayout, check, dequantize, pack, quantize, unpack
from teal_kernels.steps.cpu.packed_rows import add_packed_rows, dot_packed_rows, unpack_rows

KINDS = {8: np.empty(0, np.int8), 4: np.empty(0, np.uint8)}
DTYPES = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}
WIDTHS = [(1,), (63,), (64,), (65,), (576,), (100, 30, 31), (576, 192, 192), (130, 257)]
GROUPS = [32, 64, 256]
OUTER = {"error_model": "numpy", "_nrt": False}


@njit(**OUTER)
def add(kind, base, scales, stride, group, index, kept, x, units, out):
    add_packed_rows(kind, base, scales, stride, group, index, kept, x, units, out)


@njit(**OUTER)
def dot(kind, base, scales, stride, group, count, x, units, out, ahead):
    dot_packed_rows(kind, base, scales, stride, group, count, x, units, out, ahead)


@njit(**OUTER)
def unpack_into(kind, base, scales, stride, group, count, units, dtype, out, step):
    unpack_rows(kind, base, scales, stride, group, count, units, dtype, out, step)


def matrix(rows: int, widths: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(rows, 1, generator=generator) * 0.1
    return torch.randn(rows, sum(widths), generator=generator) * sizes


def columns(layout: RowLayout) -> np.ndarray:
    """Where each real column lies among the padded ones."""
    return np.concatenate(
        [np.arange(width) + unit * UNIT for width, unit in zip(layout.widths, layout.units, strict=False)]
    )


def code_at(row: np.ndarray, bits: int, column: int) -> int:
    """One code, read the slow way from the documented layout."""
    unit, place = divmod(column, UNIT)
    if bits == 8:
        return int(row[64 * unit + place].view(np.int8))
    m, lane = divmod(place, 16)
    word = int.from_bytes(row[32 * unit + 4 * (lane % 8) : 32 * unit + 4 * (lane % 8) + 4].tobytes(), "little")
    nibble = word >> (4 * m + 16 * (lane // 8)) & 15
    return nibble - 16 if nibble > 7 else nibble


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_pack_and_unpack_are_inverse(bits: int, group: int, widths: tuple[int, ...]) -> None:
    layout = RowLayout(bits, group, widths)
    low, high = packing.LIMITS[bits]
    codes = torch.randint(low, high + 1, (5, layout.padded), dtype=torch.int8)
    scales = torch.randn(5, layout.scales).to(torch.bfloat16)
    packed = pack(codes, scales, layout)
    assert packed.shape == (5, layout.stride)
    assert layout.stride % 64 == 0
    for back, there in zip(unpack(packed, layout), (codes, scales), strict=True):
        assert torch.equal(back, there)
    row = packed[3].numpy()
    assert [code_at(row, bits, column) for column in range(layout.padded)] == codes[3].tolist()
    bits16 = row[layout.scales_at : layout.scales_at + 2 * layout.scales].view(np.uint16)
    assert np.array_equal((bits16.astype(np.uint32) << 16).view(np.float32), scales[3].float().numpy())


@given(
    bits=st.sampled_from([8, 4]),
    group=st.sampled_from([32, 64, 128, 256, 512]),
    widths=st.lists(st.integers(1, 700), min_size=1, max_size=3).map(tuple),
    exponents=st.lists(st.integers(-149, 127), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_width_and_any_size_of_weights(
    bits: int, group: int, widths: tuple[int, ...], exponents: list[int], seed: int
) -> None:
    """Tails of groups, groups of zeros, scales that would be subnormal, weights near the largest float32."""
    layout = RowLayout(bits, group, widths)
    sizes = torch.tensor([2.0**exponent for exponent in [*exponents, -200.0]], dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(len(sizes), sum(widths), generator=generator) * 2 - 1
    weight = (weight * sizes[:, None]).clamp(-packing.LARGEST, packing.LARGEST)
    packed = quantize(weight, layout)
    check(packed, layout, len(weight))
    codes, scales = unpack(packed, layout)
    assert torch.equal(pack(codes, scales, layout), packed)
    tiny = torch.finfo(torch.float32).tiny
    assert ((scales == 0) | (scales.float().abs() >= tiny)).all()
    near, low = dequantize(packed, layout), packing.LIMITS[bits][0]
    largest = weight.abs().amax(1, keepdim=True).double()
    bound = (largest / abs(low)).clamp_min(-low * tiny) * 2  # clipped by one step at most, and scales are bfloat16
    assert ((near.double() - weight.double()).abs() <= bound).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_padding_is_zero_and_weights_are_near(bits: int, group: int, widths: tuple[int, ...]) -> None:
    layout, weight = RowLayout(bits, group, widths), matrix(9, widths)
    packed = quantize(weight, layout)
    codes, _ = unpack(packed, layout)
    padding = np.setdiff1d(np.arange(layout.padded), columns(layout))
    assert not codes[:, padding].any()
    near = dequantize(packed, layout)
    assert near.shape == weight.shape
    assert (near - weight).norm() <= {8: 0.012, 4: 0.12}[bits] * weight.norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_are_close_to_the_best(bits: int) -> None:
    weight = matrix(20, (128,))
    layout = RowLayout(bits, 64, (128,))
    groups = weight.unflatten(1, (-1, 64))
    low, high = packing.LIMITS[bits]
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / low
    best = torch.full(groups.shape[:2], torch.inf)
    for factor in np.linspace(0.5, 1.5, 500):
        for scale in (extreme * factor, -extreme * factor):
            error = (groups - (groups / scale).round().clamp(low, high) * scale).square().sum(2)
            best = best.minimum(error)
    found = (dequantize(quantize(weight, layout), layout) - weight).square().sum()
    assert found <= {8: 1.15, 4: 1.02}[bits] * best.sum()  # scales of 8 significant bits


@pytest.mark.parametrize("bits", [8, 4])
def test_exact_weights_stay_exact(bits: int) -> None:
    low, high = packing.LIMITS[bits]
    codes = torch.randint(low, high + 1, (4, 64))
    codes[:, 5] = low
    weight = codes * torch.tensor([[0.5], [-(2.0**-100)], [2.0**60], [0.0]])
    layout = RowLayout(bits, 64, (64,))
    assert torch.equal(dequantize(quantize(weight, layout), layout), weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_tiny_groups_become_zero_and_others_stay(bits: int) -> None:
    weight = torch.zeros(1, 192)
    weight[0, 3], weight[0, 70], weight[0, 130] = 1e-42, 1.0, 1e-36
    layout = RowLayout(bits, 64, (192,))
    packed = quantize(weight, layout)
    near, scales = dequantize(packed, layout), unpack(packed, layout)[1].float()
    assert scales[0, 0] == 0
    assert abs(near[0, 70] - 1) < 0.005
    assert not near[0, :70].any()
    assert ((scales == 0) | (scales.abs() >= torch.finfo(torch.float32).tiny)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = matrix(40, (64,))
    weight[33, 7] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize(weight, RowLayout(4, 64, (64,)))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_weights_stay_finite(bits: int) -> None:
    weight = matrix(9, (64,)).sign() * packing.LARGEST * torch.linspace(0.3, 1.0, 64)
    layout = RowLayout(bits, 64, (64,))
    near = dequantize(quantize(weight, layout), layout)
    assert near.isfinite().all()
    assert (near / packing.LARGEST - weight / packing.LARGEST).abs().max() < 0.2


@pytest.mark.parametrize("bits", [8, 4])
def test_damaged_rows_are_refused(bits: int) -> None:
    layout = RowLayout(bits, 64, (100,))
    packed = quantize(matrix(7, (100,)), layout)
    check(packed, layout, 7)
    for wrong in (packed[:6], packed[:, :-1], packed.view(torch.int8)):
        with pytest.raises(ValueError, match="packed rows"):
            check(wrong, layout, 7)
    for scale in (torch.inf, torch.nan, 1e-40):
        damaged = packed.clone()
        at = layout.scales_at + 2
        damaged[3, at : at + 2] = torch.tensor([scale]).to(torch.bfloat16).view(torch.uint8)
        with pytest.raises(ValueError, match="a scale"):
            check(damaged, layout, 7)


@pytest.mark.parametrize(("bits", "group", "widths"), [(3, 64, (64,)), (4, 48, (64,)), (4, 16, (64,)), (8, 64, ())])
def test_layouts_that_do_not_exist_are_refused(bits: int, group: int, widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"column|bits"):
        RowLayout(bits, group, widths)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 24, 61])
def test_sums_of_rows(bits: int, group: int, kept: int) -> None:
    layout = RowLayout(bits, group, (576, 100, 65))
    packed = quantize(matrix(80, layout.widths), layout)
    rng = np.random.default_rng(kept)
    x = rng.standard_normal(80).astype(np.float32)
    index = np.sort(rng.choice(80, kept, replace=False)).astype(np.int64)
    out = rng.standard_normal(layout.padded + 32).astype(np.float32)
    before = out.copy()
    add(*where(packed, layout, 0), index, kept, x, layout.units[-1], out)
    exact = before[columns(layout)] + x[index].astype(np.float64) @ dequantize(packed, layout).numpy()[index]
    assert relative(out[columns(layout)], exact) < 1e-6
    rest = np.setdiff1d(np.arange(len(out)), columns(layout))
    assert np.array_equal(out[rest], before[rest])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", GROUPS)
def test_ranges_of_columns_give_the_same_bits(bits: int, group: int) -> None:
    layout = RowLayout(bits, group, (576, 100, 65))
    packed, x, index = quantize(matrix(40, layout.widths), layout), np.ones(40, np.float32), np.arange(40)
    whole, parts = np.zeros(layout.padded, np.float32), np.zeros(layout.padded, np.float32)
    add(*where(packed, layout, 0), index, 40, x, layout.units[-1], whole)
    step = max(1, group // UNIT)
    cuts = sorted({0, step, 2 * step, *layout.units})
    for first, last in itertools.pairwise(cuts):
        add(*where(packed, layout, first), index, 40, x, last - first, parts[UNIT * first :])
    assert np.array_equal(whole, parts)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("width", [1, 64, 130, 576])
def test_dot_products_with_rows(bits: int, group: int, width: int) -> None:
    layout = RowLayout(bits, group, (width,))
    packed = quantize(matrix(33, (width,)), layout)
    x, out = np.zeros(layout.padded, np.float32), np.zeros(33, np.float32)
    x[:width] = np.random.default_rng(0).standard_normal(width)
    dot(*where(packed, layout, 0), 33, x, layout.units[-1], out, 4096)
    exact = dequantize(packed, layout).numpy().astype(np.float64) @ x[:width]
    assert relative(out, exact) < 1e-6


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_rows_unpacked_by_the_compiled_code_are_those_of_the_reference(bits: int, group: int, dtype: Any) -> None:
    layout = RowLayout(bits, group, (100, 576))
    packed = quantize(matrix(6, layout.widths), layout)
    out = torch.zeros(6, layout.padded + 5, dtype=dtype)
    empty = np.empty(0, DTYPES[dtype])
    unpack_into(*where(packed, layout, 0), 6, layout.units[-1], empty, out.data_ptr(), out.stride(0) * out.itemsize)
    assert torch.equal(out[:, columns(layout)], dequantize(packed, layout, dtype))
    assert not out[:, layout.padded :].any()


def where(packed: torch.Tensor, layout: RowLayout, unit: int) -> tuple[Any, int, int, int, int]:
    """The first arguments of the compiled functions, for columns from a unit on."""
    base, shift = packed.data_ptr(), layout.group.bit_length() - 1
    scales = base + layout.scales_at + 2 * (UNIT * unit // layout.group)
    return KINDS[layout.bits], base + unit * layout.unit_bytes, scales, layout.stride, shift


def relative(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / max(np.linalg.norm(exact), 1e-30))


# Conversions to float16 need F16C, as the compiled step does.
PROCESSORS = {
    "AVX2": ("haswell", "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse4.2"),
    "SSE2": ("x86-64", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PROCESSORS))
@pytest.mark.skipif("TEAL_TEST_PROCESSOR" in os.environ, reason="already compiled for another processor")
def test_other_processors(name: str) -> None:
    cpu, features = PROCESSORS[name]
    given = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "TEAL_TEST_PROCESSOR": name}
    chosen = "(rows or ranges or dot) and not float16"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]

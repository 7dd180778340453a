"""Ahead-of-time compilation for GPUs that need not be there: it builds, loads 16 bytes at a time, and spills
nothing."""

from __future__ import annotations

import math
import os
from itertools import accumulate

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

from kernel_aot import POINTER_TYPES, compile_kernel

from teal_kernels.configs import default_gemv_config
from teal_kernels.sparse_gemv.kernel import compact_kernel, gather_gemv_kernel, reduce_kernel
from teal_kernels.threshold.kernel import threshold_kernel

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
capabilities = pytest.mark.parametrize("capability", [80, 90])
dtypes = pytest.mark.parametrize("dtype", list(ITEMSIZE))


def compile_gather(inputs, segments, dtype, capability):
    config = default_gemv_config(inputs, sum(segments), ITEMSIZE[dtype])
    edges = (0, *accumulate(segments))
    tiles = (0, *accumulate(-(-n // config.block_n) for n in segments))
    pointer = POINTER_TYPES[dtype]
    return compile_kernel(
        gather_gemv_kernel,
        {"weight_ptr": pointer, "index_ptr": "*i32", "value_ptr": pointer, "count_ptr": "*i32",
         "thresholds_ptr": "*fp32", "partial_ptr": "*fp32"},
        {"N": edges[-1], "EDGES": edges, "TILES": tiles[:-1], "CHUNKS": -(-inputs // 2048), "CHUNK": 2048,
         "SPLITS": config.splits, "ROWS": config.rows, "BLOCK_N": config.block_n,
         "ALIGN": math.gcd(config.block_n, *edges), "EVEN": all(n % config.block_n == 0 for n in segments)},
        capability, config.warps,
    )  # fmt: skip


@capabilities
@dtypes
@pytest.mark.parametrize(
    ("inputs", "segments"),
    [(4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (11008, (4096,)), (576, (576, 192, 192))],
    ids=["qkv", "gate-up", "down", "small-qkv"],
)
def test_gather_loads_16_bytes_and_spills_nothing(inputs, segments, dtype, capability):
    built = compile_gather(inputs, segments, dtype, capability)
    config = default_gemv_config(inputs, sum(segments), ITEMSIZE[dtype])
    per_thread = config.rows * config.block_n * ITEMSIZE[dtype] // (16 * 32 * config.warps)
    assert len(built.vector_loads()) >= max(1, per_thread)
    built.assert_no_spills()
    assert built.registers <= 128


@capabilities
def test_a_width_no_vector_divides_still_builds(capability):
    compile_gather(63, (63,), "bfloat16", capability).assert_no_spills()


@capabilities
@dtypes
def test_compaction_and_reduction_build(dtype, capability):
    pointer = POINTER_TYPES[dtype]
    lists = {"index_ptr": "*i32", "value_ptr": pointer, "count_ptr": "*i32"}
    compile_kernel(
        compact_kernel, {"x_ptr": pointer, "thresholds_ptr": "*fp32", **lists, "K": "i32"}, {"P": 3, "CHUNK":
        2048}, capability, 8,
    ).assert_no_spills()  # fmt: skip
    compile_kernel(
        reduce_kernel,
        {"partial_ptr": "*fp32", "out_ptr": pointer, "N": "i32"},
        {"SPLITS": 16, "BLOCK": 256},
        capability,
        2,
    ).assert_no_spills()
    compile_kernel(
        threshold_kernel, {"x_ptr": pointer, "thresholds_ptr": "*fp32", "out_ptr": pointer, "size": "i32"},
        {"BLOCK": 1024}, capability,
    ).assert_no_spills()  # fmt: skip

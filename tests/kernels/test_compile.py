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

from kernel_aot import POINTER_TYPES, Compiled, compile_kernel, wide_loads

from teal_kernels.configs import default_gemv_config
from teal_kernels.ops.kept.kernel import compact_kernel
from teal_kernels.ops.kept.op import chunk_for, chunk_warps
from teal_kernels.ops.packed.kernel import packed_dot_kernel, packed_gather_kernel, unpack_row_kernel
from teal_kernels.ops.packed.op import load_rows, packed_gemv_config
from teal_kernels.ops.sparse_gemv.kernel import gather_gemv_kernel, reduce_kernel
from teal_kernels.ops.threshold.kernel import threshold_kernel
from teal_kernels.packing import RowLayout
from teal_kernels.parts.attention.kernel import attention_kernel, join_kernel
from teal_kernels.parts.attention.op import BLOCK_T
from teal_kernels.parts.norm.kernel import rms_norm_kernel
from teal_kernels.parts.rope.kernel import qkv_kernel
from teal_kernels.parts.sample.kernel import draw_kernel, nucleus_kernel, totals_kernel
from teal_kernels.parts.swiglu.kernel import swiglu_kernel

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
LIST_STORES = 3  # the list of the next iteration, handed round among the threads: index, value, whether it is kept
capabilities = pytest.mark.parametrize("capability", [80, 90])
dtypes = pytest.mark.parametrize("dtype", list(ITEMSIZE))
halves = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def compile_gather(
    inputs: int, segments: tuple[int, ...], dtype: str, capability: int, chunk: int, per_channel: bool = False
) -> Compiled:
    config = default_gemv_config(inputs, sum(segments), ITEMSIZE[dtype])
    edges = (0, *accumulate(segments))
    tiles = (0, *accumulate(-(-n // config.block_n) for n in segments))
    pointer = POINTER_TYPES[dtype]
    return compile_kernel(
        gather_gemv_kernel,
        {"weight_ptr": pointer, "index_ptr": "*i32", "value_ptr": pointer, "count_ptr": "*i32",
         "thresholds_ptr": "*fp32", "partial_ptr": "*fp32"},
        {"K": inputs, "N": edges[-1], "EDGES": edges, "TILES": tiles[:-1], "CHUNKS": -(-inputs // chunk),
         "CHUNK": chunk, "SPLITS": config.splits, "ROWS": config.rows, "BLOCK_N": config.block_n,
         "ALIGN": math.gcd(config.block_n, *edges), "EVEN": all(n % config.block_n == 0 for n in segments),
         "PER_CHANNEL": per_channel},
        capability, config.warps,
    )  # fmt: skip


@capabilities
@dtypes
@pytest.mark.parametrize(
    ("inputs", "segments", "chunk"),
    [
        (4096, (4096, 1024, 1024), 2048),
        (4096, (14336, 14336), 2048),
        (14336, (4096,), 2048),
        (576, (576, 192, 192), 1024),
    ],
    ids=["qkv", "gate-up", "down", "small-qkv"],
)
def test_gather_streams_16_bytes_at_a_time(inputs, segments, chunk, dtype, capability):
    built = compile_gather(inputs, segments, dtype, capability, chunk)
    config = default_gemv_config(inputs, sum(segments), ITEMSIZE[dtype])
    per_thread = config.rows * config.block_n * ITEMSIZE[dtype] // (16 * 32 * config.warps)
    (loop,) = built.loops()
    assert len(wide_loads(loop)) == max(1, per_thread), "every weight is loaded in the loop, 16 bytes at a time"
    assert loop.count("st.shared") <= LIST_STORES, "weights must not go through shared memory"
    built.assert_no_spills()
    assert built.registers <= 128, "fewer than four programs of four warps would fit a multiprocessor"


@capabilities
def test_a_width_no_vector_divides_still_builds(capability):
    compile_gather(63, (63,), "bfloat16", capability, 64).assert_no_spills()


@capabilities
@dtypes
@pytest.mark.parametrize(("inputs", "segments"), [(4096, (4096, 1024, 1024)), (14336, (4096,))], ids=["qkv", "down"])
def test_gather_with_a_threshold_for_every_channel_streams_as_well(inputs, segments, dtype, capability):
    built = compile_gather(inputs, segments, dtype, capability, 2048, per_channel=True)
    config = default_gemv_config(inputs, sum(segments), ITEMSIZE[dtype])
    (loop,) = built.loops()
    assert len(wide_loads(loop)) >= config.rows * config.block_n * ITEMSIZE[dtype] // (16 * 32 * config.warps)
    assert loop.count("st.shared") <= LIST_STORES
    built.assert_no_spills()


@capabilities
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (8, 32), (4, 64), (4, 32), (4, 128)])
@pytest.mark.parametrize(
    ("inputs", "segments"),
    [(4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (1536, (576,))],
    ids=["qkv", "gate-up", "small-down"],
)
def test_packed_gather_streams_16_bytes_at_a_time(inputs, segments, bits, group, capability):
    layout = RowLayout(bits, group, segments)
    config, pointer = packed_gemv_config(inputs, layout), POINTER_TYPES["bfloat16"]
    rows = load_rows(config, bits)
    edges = (0, *accumulate(segments))
    tiles = (0, *accumulate(-(-n // config.block_n) for n in segments))
    built = compile_kernel(
        packed_gather_kernel,
        {"words_ptr": "*i32", "scales_ptr": "*bf16", "index_ptr": "*i32", "value_ptr": pointer, "count_ptr": "*i32",
         "thresholds_ptr": "*fp32", "partial_ptr": "*fp32"},
        {"K": inputs, "N": edges[-1], "STRIDE": layout.stride, "GROUP": group, "BITS": bits, "EDGES": edges,
         "TILES": tiles[:-1], "UNITS": layout.units, "CHUNKS": -(-inputs // 2048), "CHUNK": 2048,
         "SPLITS": config.splits, "ROWS": rows, "DEPTH": config.rows // rows, "BLOCK_N": config.block_n,
         "PER_CHANNEL": False},
        capability, config.warps,
    )  # fmt: skip
    (loop,) = built.loops()
    per_thread = config.rows * config.block_n * bits // 8 // (16 * 32 * config.warps)
    assert len(wide_loads(loop)) == max(1, per_thread), "every code is loaded in the loop, 16 bytes at a time"
    assert "bar." not in loop, "warps of a program must not wait for each other while weights stream"
    built.assert_no_spills()
    assert built.registers <= 128, "fewer than four programs of four warps would fit a multiprocessor"


@capabilities
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_tables_build(bits, capability):
    layout, pointer = RowLayout(bits, 64, (4096,)), POINTER_TYPES["bfloat16"]
    types = {"words_ptr": "*i32", "scales_ptr": "*bf16", "out_ptr": pointer}
    form = {"N": 4096, "STRIDE": layout.stride, "GROUP": 64, "BITS": bits}
    dot = compile_kernel(
        packed_dot_kernel, types | {"x_ptr": pointer, "K": "i32"},
        form | {"UNITS": layout.units[-1], "ROWS": 32, "WORDS": 64}, capability,
    )  # fmt: skip
    dot.assert_no_spills()
    (loop,) = dot.loops()
    assert wide_loads(loop)
    assert "bar." not in loop, "codes must not go through shared memory"
    unpack = compile_kernel(unpack_row_kernel, types | {"row_ptr": "*i64"}, form | {"BLOCK": 256}, capability, 2)
    unpack.assert_no_spills()


@capabilities
@dtypes
@pytest.mark.parametrize("per_channel", [False, True], ids=["one", "per-channel"])
def test_compaction_and_reduction_build(per_channel, dtype, capability):
    pointer = POINTER_TYPES[dtype]
    lists = {"index_ptr": "*i32", "value_ptr": pointer, "count_ptr": "*i32"}
    compile_kernel(
        compact_kernel, {"x_ptr": pointer, "thresholds_ptr": "*fp32", **lists, "K": "i32"},
        {"P": 3, "CHUNK": 2048, "PER_CHANNEL": per_channel}, capability, chunk_warps(2048),
    ).assert_no_spills()  # fmt: skip
    compile_kernel(
        reduce_kernel,
        {"partial_ptr": "*fp32", "out_ptr": pointer, "N": "i32"},
        {"SPLITS": 16, "BLOCK": 256},
        capability,
        2,
    ).assert_no_spills()
    compile_kernel(
        threshold_kernel, {"x_ptr": pointer, "thresholds_ptr": "*fp32", "out_ptr": pointer, "size": "i32", "K": "i32"},
        {"BLOCK": 1024, "PER_CHANNEL": per_channel}, capability,
    ).assert_no_spills()  # fmt: skip


def sink(pointer: str, size: int, chunk: int, segments: int, sparse: int) -> tuple[dict, dict]:
    """Argument types and constants of `emit`, with capture; what is not given is None, as at run time. `sparse` is 0
    for a dense product, else the axes of the thresholds."""
    types = {"ring_ptr": pointer, "slot_ptr": "*i64"}
    lists = {
        "thresholds_ptr": "*fp32",
        "index_ptr": "*i32",
        "value_ptr": pointer,
        "count_ptr": "*i32",
        "tally_ptr": "*i64",
    }
    constants: dict[str, object] = {
        "K": size, "P": segments, "CHUNKS": -(-size // chunk), "CHUNK": chunk, "SPARSE": sparse, "RING": True,
    }  # fmt: skip
    if sparse:
        return types | lists, constants | {"row_ptr": None}
    return types | {"row_ptr": pointer}, constants | dict.fromkeys(lists)


@capabilities
@halves
@pytest.mark.parametrize("post", [False, True], ids=["before", "both"])
@pytest.mark.parametrize(("size", "sparse"), [(576, 1), (4096, 1), (8192, 1), (4096, 0), (4096, 2)])
def test_norm_builds(size, sparse, post, dtype, capability):
    pointer, chunk = POINTER_TYPES[dtype], chunk_for(size)
    types, constants = sink(pointer, size, chunk, 3, sparse)
    names = ("hidden_ptr", "partial_ptr", "weight_ptr", "stream_ptr", "bias_ptr") + ("post_ptr",) * post
    numbers = dict.fromkeys(("eps", "norm_offset", "embedding_scale", "residual_scale"), "fp32")
    constants |= {"SPLITS": 16, "EMBED": False, "BIAS": True, "token_ptr": None, **({} if post else {"post_ptr": None})}
    constants |= {"POST": post, "NORM": True, "ONCE": post, "SCALED": post}
    types |= dict.fromkeys(names, pointer) | {"partial_ptr": "*fp32"} | numbers
    built = compile_kernel(rms_norm_kernel, types, constants, capability, chunk_warps(chunk))
    built.assert_no_spills()


@capabilities
@halves
@pytest.mark.parametrize("sparse", [1, 2])
@pytest.mark.parametrize("gelu", [False, True], ids=["silu", "gelu"])
def test_swiglu_builds(gelu, sparse, dtype, capability):
    pointer = POINTER_TYPES[dtype]
    types, constants = sink(pointer, 14336, 2048, 1, sparse)
    built = compile_kernel(
        swiglu_kernel, types | {"partial_ptr": "*fp32", "like_ptr": pointer}, constants | {"SPLITS": 8, "GELU": gelu},
        capability, 16,
    )  # fmt: skip
    built.assert_no_spills()


@capabilities
@dtypes
@pytest.mark.parametrize(("norm", "wide"), [(True, False), (True, True), (False, False)], ids=["norm", "wide", "plain"])
def test_qkv_builds(norm, wide, dtype, capability):
    pointer = POINTER_TYPES[dtype]
    names = ("bias_ptr", "q_norm_ptr", "k_norm_ptr", "cos_ptr", "sin_ptr", "q_ptr", "k_ptr", "v_ptr")
    types = dict.fromkeys(names, pointer)
    types |= {"partial_ptr": "*fp32", "position_ptr": "*i64", "head_stride": "i32"}
    types |= {"eps": "fp32", "norm_offset": "fp32"}
    constants = {"HEADS": 32, "KV_HEADS": 8, "D": 128, "HALF": 64, "SPLITS": 16, "BIAS": True, "NORM": norm}
    constants |= {"ONCE": wide, "WIDE": wide}
    compile_kernel(qkv_kernel, types, constants, capability, 1).assert_no_spills()


@capabilities
@dtypes
@pytest.mark.parametrize(("group", "head_dim", "capped"), [(1, 128, False), (8, 128, True), (3, 64, False)])
def test_attention_builds(group, head_dim, capped, dtype, capability):
    pointer = POINTER_TYPES[dtype]
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), pointer)
    types |= dict.fromkeys(("mixed_ptr", "peak_ptr", "total_ptr"), "*fp32")
    types |= {"position_ptr": "*i64", "head_stride": "i32", "scale": "fp32", "cap": "fp32"}
    constants = {
        "GROUP": group,
        "D": head_dim,
        "SHARES": 32,
        "CAPPED": capped,
        "WINDOW": 4096,
        "BLOCK_G": 16,
        "BLOCK_D": head_dim,
    }
    built = compile_kernel(attention_kernel, types, constants | {"BLOCK_T": BLOCK_T}, capability)
    built.assert_no_spills()
    assert len(built.vector_loads()) >= 2 or "cp.async" in built.ptx
    types, constants = sink(pointer, 4096, 512, 1, 1)
    types |= dict.fromkeys(("mixed_ptr", "peak_ptr", "total_ptr"), "*fp32") | {"like_ptr": pointer}
    compile_kernel(join_kernel, types, constants | {"D": head_dim, "SHARES": 32}, capability, 4).assert_no_spills()


@capabilities
@dtypes
@pytest.mark.parametrize("cut", [True, False], ids=["top-k", "all"])
def test_sampling_builds(cut, dtype, capability):
    pointer = POINTER_TYPES[dtype]
    types = dict.fromkeys(("logits_ptr", "peak_ptr", "ranked_ptr", "lowest_ptr"), pointer) | {
        "temperature_ptr": "*fp32"
    }
    types |= dict.fromkeys(("totals_ptr", "stream_ptr", "position_ptr", "top_p_ptr", "choice_ptr"), "*i64")
    constants: dict[str, object] = {"n": 128256, "BLOCK": 1024}
    if not cut:
        del types["lowest_ptr"]
        constants["lowest_ptr"] = None
    chunks = {"chunks": 126, "CHUNKS": 128}
    compile_kernel(totals_kernel, types, constants, capability).assert_no_spills()
    compile_kernel(draw_kernel, types, constants | chunks, capability).assert_no_spills()
    if cut:
        ranked = {"ranked": 128256, "BLOCK": 1024}
        compile_kernel(nucleus_kernel, types, ranked | chunks, capability).assert_no_spills()

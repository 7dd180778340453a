"""Rows of benchmarks that nobody measured, for what reads, prints and draws them."""

from __future__ import annotations

from teal_cli.bench.rows import DecodeRow, KernelRow, Row


def kernel(product: str, sparsity: float, time: float | None) -> KernelRow:
    ok = time is not None
    return KernelRow(
        models=("m",), matrix="qkv", site="attn_in", inputs=96, outputs=128, dtype="bfloat16", sparsity=sparsity,
        realised=sparsity, product=product, role="sparse" if sparsity else "dense",
        check="passed" if ok else "failed: error 1, allowed 0.1", error=0.001 if ok else None, rounds=3, calls=2,
        copies=4,
        p20_us=time and 0.9 * time, p50_us=time, p80_us=time and 1.1 * time, bytes=1000, gbps=10.0 if ok else None,
        read_gbps=20.0, floor_us=(1 - sparsity) * 10, to_floor=2.0 if ok else None, dense="torch", to_dense=None,
    )  # fmt: skip


def decoded(engine: str, sparsity: float, speed: float | None, *, dump: bool = False) -> DecodeRow:
    return DecodeRow(
        model="m", layers=2, dtype="bfloat16", engine=engine, backend="cpu", sparsity=sparsity, realised=sparsity,
        dump=dump,
        check="passed" if speed else "failed: error 1, allowed 0.1", error=0.0, rounds=3, prompt_tokens=8, tokens=16,
        p20=speed and speed - 1, p50=speed, p80=speed and speed + 1, bytes=10, gbps=1.0, read_gbps=20.0, floor=150.0,
        to_floor=1.5, faster_than={"dense": 1.4}, to_undumped=1.03 if dump else None,
    )  # fmt: skip


KERNELS: list[Row] = [kernel("torch", 0.0, 20.0), kernel("cpu", 0.5, 12.0), kernel("cpu", 0.9, 4.0),
                      kernel("numba", 0.5, 11.0), kernel("numba", 0.9, None)]  # fmt: skip
DECODES: list[Row] = [decoded("teal", 0.0, 90.0), decoded("teal", 0.5, 120.0), decoded("teal", 0.5, 118.0, dump=True),
                      decoded("transformers", 0.0, 37.0), decoded("teal", 0.9, None)]  # fmt: skip

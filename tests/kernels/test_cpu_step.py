"""The compiled decode step against a plain PyTorch implementation of the same step."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

pytest.importorskip("numba")

from kernel_models import scaled

from teal_kernels.matrix import FloatMatrix
from teal_kernels.parts.sample.reference import SamplingRule, random_bits, sample_reference
from teal_kernels.spec import SITES, columns
from teal_kernels.steps.cpu import compiled
from teal_kernels.steps.cpu.op import CpuStep, default_threads
from teal_kernels.steps.spec import MATRICES, OPTIONAL, StepSpec, layer_shapes
from teal_kernels.thresholds import Thresholds
from teal_kernels.traits import GELU_TANH, Traits

if compiled.unavailable() is not None:
    pytest.skip(str(compiled.unavailable()), allow_module_level=True)

SPEC = StepSpec(96, 160, 6, 2, 16, 300, 1e-5, (None, None))
GEMMA = Traits(
    norm_offset=1.0, norm_rounds_once=True, activation=GELU_TANH, attention_scale=0.3, score_cap=3.0,
    embedding_scale=96**0.5, logit_cap=4.0,
)  # fmt: skip
VARIANTS = {
    "grouped": SPEC,
    "odd": StepSpec(63, 77, 3, 1, 10, 101, 1e-6, (None,)),
    "single heads": StepSpec(64, 200, 4, 4, 16, 333, 1e-5, (None, None, None)),
    "window": replace(SPEC, windows=(3, None)),
    "wide": StepSpec(576, 1536, 9, 3, 64, 1000, 1e-5, (None,)),
    "gemma": replace(SPEC, windows=(3, None), ropes=(0, 1), traits=GEMMA),
    "scaled": replace(SPEC, traits=Traits(attention_scale=0.2, residual_scale=0.4, logit_scale=0.25)),
    "norms over all heads": replace(SPEC, traits=Traits(wide_head_norms=True, norm_rounds_once=True)),
}
BEFORE, AFTER = {"attn_norm", "mlp_norm"}, {"attn_post_norm", "mlp_post_norm"}
FLAVOURS = {
    "plain": frozenset(BEFORE),
    "with biases and head norms": OPTIONAL - AFTER,
    "norms on both sides": frozenset(BEFORE | AFTER | {"q_norm", "k_norm"}),
    "norms after": frozenset(AFTER | {"q_norm", "k_norm"}),
}
SITE_COLUMNS = {"attn_in": (0, 3), "attn_out": (3, 4), "mlp_in": (4, 6), "mlp_mid": (6, 7)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Model:
    """Random weights of a spec, a cache, and the plain step over them."""

    spec: StepSpec
    layers: list[Any]
    embedding: Tensor
    final_norm: Tensor
    lm_head: Tensor
    kv: Tensor

    def rope(self, position: int, table: int = 0) -> tuple[Tensor, Tensor]:
        half = self.spec.head_dim // 2
        angles = position / (10_000 if table == 0 else 100) ** (torch.arange(half) / half)
        cos, sin = angles.cos(), angles.sin()
        dtype = self.embedding.dtype
        return torch.cat((cos, cos)).to(dtype), torch.cat((-sin, sin)).to(dtype)

    def compiled(self, thresholds: Any = None, **options: Any) -> CpuStep:
        embedding, lm_head = FloatMatrix(self.embedding), FloatMatrix(self.lm_head)
        tensors = embedding, self.final_norm, lm_head
        tables, room = range(1 + max(self.spec.rope_of_layer)), range(self.kv.shape[3])
        halves = [zip(*(self.rope(position, table) for position in room), strict=True) for table in tables]
        cos, sin = (torch.stack([torch.stack(half) for half in table]) for table in zip(*halves, strict=True))
        rope = cos, sin
        keys, values = self.kv[:, 0], self.kv[:, 1]
        limits = Thresholds(thresholds) if isinstance(thresholds, np.ndarray) else thresholds
        layers = [with_matrices(layer) for layer in self.layers]
        return CpuStep(self.spec, layers, *tensors, rope, keys, values, thresholds=limits, **options)

    def step(self, token: int, position: int, thresholds: Any, kv: Tensor, rows: Any = None) -> tuple[Tensor, Any]:
        """Logits, and per site the inputs of every layer; rounds where a plain PyTorch model does.

        What is kept is decided by `rows`, if given: sums in another order may put an entry on the other side of a
        threshold, and one such entry moves the logits more than all rounding.
        """
        spec = self.spec
        seen: dict[str, list[Tensor]] = {site: [] for site in SITES}
        traits = spec.traits
        hidden = self.embedding[token] * torch.tensor(traits.embedding_scale, dtype=self.embedding.dtype)
        for i, layer in enumerate(self.layers):
            limits: Any = np.full(7, -1, np.float32) if thresholds is None else thresholds[i]

            def project(site: str, x: Tensor, parts: list[Tensor], limits: Any) -> Tensor:
                size = (x if rows is None else rows[site][len(seen[site])]).float().abs()
                seen[site].append(x)
                kept = [torch.where(size > torch.as_tensor(limit), x, torch.zeros_like(x)) for limit in limits]
                return torch.cat([(k.double() @ w.double()).to(x.dtype) for k, w in zip(kept, parts, strict=True)])

            widths = [spec.query_width, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim]
            qkv = project("attn_in", norm(hidden, layer.attn_norm, spec), layer.qkv.split(widths, 1), limits[:3])
            qkv = qkv if layer.qkv_bias is None else qkv + layer.qkv_bias
            q, k, v = (part.view(-1, spec.head_dim) for part in qkv.split(widths))
            if layer.q_norm is not None:
                over = (1, -1) if traits.wide_head_norms else (-1, spec.head_dim)
                q = norm(q.reshape(over), layer.q_norm, spec).view(q.shape)
                k = norm(k.reshape(over), layer.k_norm, spec).view(k.shape)
            cos, sin = self.rope(position, spec.rope_of_layer[i])
            q, k = (x * cos + torch.roll(x, spec.head_dim // 2, -1) * sin for x in (q, k))
            kv[i, 0, :, position], kv[i, 1, :, position] = k, v
            first = 0 if spec.windows[i] is None else max(0, position + 1 - spec.windows[i])
            keys, values = kv[i, :, :, first : position + 1].double().repeat_interleave(spec.heads // spec.kv_heads, 1)
            scores = torch.einsum("hd,htd->ht", q.double(), keys) * (traits.attention_scale or spec.head_dim**-0.5)
            scores = torch.softmax(cap(scores, traits.score_cap), -1)
            mixed = torch.einsum("ht,htd->hd", scores, values).flatten().to(hidden.dtype)
            out = project("attn_out", mixed, [layer.attn_out], limits[3:4])
            out = norm(out if layer.o_bias is None else out + layer.o_bias, layer.attn_post_norm, spec)
            hidden = hidden + out * traits.residual_scale
            both = project("mlp_in", norm(hidden, layer.mlp_norm, spec), layer.gate_up.chunk(2, 1), limits[4:6])
            gate, up = both.chunk(2)
            gelu = traits.activation == GELU_TANH
            active = functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)
            out = norm(project("mlp_mid", active * up, [layer.down], limits[6:]), layer.mlp_post_norm, spec)
            hidden = hidden + out * traits.residual_scale
        logits = self.lm_head.float() @ norm(hidden, self.final_norm, spec).float()
        return cap(logits * traits.logit_scale, traits.logit_cap), seen


def with_matrices(layer: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(layer), **{name: FloatMatrix(getattr(layer, name)) for name in MATRICES}})


def norm(x: Tensor, weight: Tensor | None, spec: StepSpec) -> Tensor:
    if weight is None:
        return x
    normed, traits = functional.rms_norm(x.float(), weight.shape, None, spec.norm_eps), spec.traits
    if traits.norm_rounds_once:
        return (normed * (traits.norm_offset + weight.float())).to(x.dtype)
    return normed.to(x.dtype) * (traits.norm_offset + weight)


def cap(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else torch.tanh(x / limit) * limit


def make(spec: StepSpec, dtype: torch.dtype, extra: frozenset[str] = FLAVOURS["plain"], room: int = 24) -> Model:
    generator = torch.Generator().manual_seed(1)

    def random(name: str, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=generator)
        if "norm" in name:
            return (1 - spec.traits.norm_offset + drawn / 10).to(dtype)
        return (drawn / math.sqrt(shape[0]) if len(shape) == 2 else drawn / 4).to(dtype)

    layers = [
        SimpleNamespace(
            **{
                name: random(name, shape) if name in extra or name not in OPTIONAL else None
                for name, shape in layer_shapes(spec).items()
            }
        )
        for _ in spec.windows
    ]
    embedding = torch.randn(spec.vocab, spec.hidden, generator=generator).to(dtype)
    kv = torch.full((len(layers), 2, spec.kv_heads, room, spec.head_dim), torch.nan, dtype=dtype)
    return Model(spec, layers, embedding, random("norm", (spec.hidden,)), embedding, kv)


def threshold_table(kind: str, layers: int) -> Any:
    if kind == "dense":
        return None
    if kind == "own":  # every projection its own, so that no two walk the same list
        return np.linspace(0.1, 0.7, 7 * layers).astype(np.float32).reshape(layers, 7)
    return np.full((layers, 7), {"zero": 0.0, "half": 0.5, "nothing kept": np.inf}[kind], np.float32)


def poisoned_rows(spec: StepSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Views with a stride between layers, as a store's block buffer gives them."""
    block = {site: torch.full((len(spec.windows), 3, spec.channels(site)), torch.nan, dtype=dtype) for site in SITES}
    return {site: tensor[:, 1] for site, tensor in block.items()}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def poison(step: CpuStep) -> None:
    for name, buffer in step._shared._asdict().items():
        if isinstance(buffer, np.ndarray) and buffer.dtype == np.float32 and name not in ("thresholds", "limits"):
            buffer.fill(np.nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_plain_step(variant: str, flavour: str, dtype: torch.dtype) -> None:
    """Logits, cache and captured rows over several tokens, dense and sparse."""
    spec = VARIANTS[variant]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for kind in ("dense", "zero", "half", "own", "nothing kept"):
        model = make(spec, dtype, FLAVOURS[flavour])
        reference_kv = model.kv.clone()
        table = threshold_table(kind, len(spec.windows))
        step = model.compiled(table)
        poison(step)
        for position in range(6):
            rows = poisoned_rows(spec, dtype)
            logits = step.step(7 * position + 3, position, rows)
            expected, inputs = model.step(7 * position + 3, position, table, reference_kv, rows)
            assert distance(logits, expected) < tolerance
            for site, (first, last) in SITE_COLUMNS.items():
                x = torch.stack(inputs[site])
                lowest = (
                    torch.full((len(x), 1), -1.0)
                    if table is None
                    else torch.from_numpy(table[:, first:last].min(1))[:, None]
                )
                close = tolerance * x.float().abs().max()
                kept = rows[site].float().abs() > lowest.clamp_min(0)
                assert torch.allclose(rows[site][kept].float(), x[kept].float(), rtol=tolerance, atol=close)
                flipped = (x.float().abs() > lowest) & ~kept | ~(x.float().abs() > lowest) & kept
                assert ((x.float().abs() - lowest).abs()[flipped] < close).all() or table is None
            reference_kv[:, :, :, position] = model.kv[:, :, :, position]  # no drift: each step on the same past
        assert torch.isnan(model.kv[:, :, :, 6:]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_captured_rows_are_what_was_multiplied(dtype: torch.dtype) -> None:
    """The first site's input can be recomputed exactly; its kept entries come back bit for bit, the others as zero."""
    model = make(SPEC, dtype)
    x = norm(model.embedding[5], model.layers[0].attn_norm, SPEC)
    t = x.float().abs().sort().values[x.numel() // 3].item()  # a value that occurs: it must be dropped
    table = np.full((2, 7), t, np.float32)
    rows = poisoned_rows(SPEC, dtype)
    model.compiled(table).step(5, 0, rows)
    kept = torch.where(x.float().abs() > t, x, torch.zeros_like(x))
    if dtype != torch.float32:
        assert torch.equal(rows["attn_in"][0], kept)
    torch.testing.assert_close(rows["attn_in"][0], kept, atol=0, rtol=1e-6)
    assert (rows["attn_in"][0] == 0).sum() == x.numel() // 3 + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_threshold_for_every_channel(dtype: torch.dtype) -> None:
    """Logits, captured rows and counts under a scale of each projection's own."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    model = make(SPEC, dtype)
    reference_kv = model.kv.clone()
    thresholds = scaled(Thresholds(threshold_table("own", 2)), SPEC)
    by_projection = [[limit for site in SITES for limit in thresholds.site(layer, site)] for layer in range(2)]
    step, counts = model.compiled(thresholds), np.zeros((2, 7), np.int64)
    for position in range(3):
        rows = poisoned_rows(SPEC, dtype)
        logits = step.step(position, position, rows)
        expected, inputs = model.step(position, position, by_projection, reference_kv, rows)
        assert distance(logits, expected) < tolerance
        for site in SITES:
            for layer in range(2):
                row = rows[site][layer].float().abs().numpy()
                limits = thresholds.site(layer, site)
                counts[layer, columns(site)] += (row > limits.reshape(len(limits), -1)).sum(1)
                assert ((row == 0) | (row > thresholds.lowest(layer, site))).all()
                x = inputs[site][layer].float().abs().numpy()
                differing = (x > thresholds.lowest(layer, site)) != (row > 0)
                assert differing.mean() < 0.02
        reference_kv[:, :, :, position] = model.kv[:, :, :, position]
    assert (step.kept() == counts).all()


def test_counts_what_is_kept() -> None:
    spec = replace(SPEC, windows=(None,))
    model, table = make(spec, torch.float32), threshold_table("own", 1)
    step, expected = model.compiled(table), np.zeros((1, 7), np.int64)
    for position in range(3):
        rows = poisoned_rows(spec, torch.float32)
        step.step(position, position, rows)
        for site, (first, last) in SITE_COLUMNS.items():
            expected[0, first:last] += (rows[site].abs().numpy() > table[0, first:last, None]).sum(1)
    assert (step.kept() == expected).all()
    dense = model.compiled()
    dense.step(3, 3)
    channels = [SPEC.hidden] * 3 + [SPEC.query_width] + [SPEC.hidden] * 2 + [SPEC.intermediate]
    assert (dense.kept() == channels).all()


def test_threshold_that_keeps_one_entry() -> None:
    model = make(SPEC, torch.float32)
    x = norm(model.embedding[5], model.layers[0].attn_norm, SPEC)
    table = np.full((2, 7), np.inf, np.float32)
    table[0, :3] = x.abs().sort().values[-2].item()
    model.compiled(table).step(5, 0)
    expected = model.kv.clone()
    model.step(5, 0, table, expected)
    torch.testing.assert_close(model.kv[0, :, :, 0], expected[0, :, :, 0])
    assert model.kv[0, 1, :, 0].abs().sum() > 0


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_reproducible_and_capture_changes_no_bit(threads: int) -> None:
    spec = VARIANTS["wide"]
    table = threshold_table("half", 1)
    results = []
    for capture in (False, True, False):
        model = make(spec, torch.bfloat16)
        step = model.compiled(table, threads=threads)
        rows = poisoned_rows(spec, torch.bfloat16) if capture else None
        results.append(torch.stack([step.step(9 + i, i, rows).clone() for i in range(12)]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("threads", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", ["dense", "half", "own"])
def test_any_number_of_threads(threads: int, kind: str) -> None:
    """Rows wide enough to be split by columns, too narrow for that, and both at once."""
    spec = StepSpec(640, 2700, 10, 2, 64, 500, 1e-5, (None,))
    model, single = make(spec, torch.float32), make(spec, torch.float32)
    table = threshold_table(kind, 1)
    step, expected = model.compiled(table, threads=threads), single.compiled(table, threads=1)
    for position in range(3):
        assert distance(step.step(position, position), expected.step(position, position)) < 1e-5


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be put on one core here")
@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("variant", ["wide", "norms over all heads"])
def test_parts_that_others_take_over_change_no_bit(threads: int, variant: str) -> None:
    """All threads on one core, beside a process that is busy there: nearly every phase has parts of absent threads."""
    spec = replace(VARIANTS[variant], windows=(None,) * 3)
    extra = FLAVOURS["with biases and head norms" if variant != "wide" else "plain"]
    rule, bits, cores = SamplingRule(0.0), [0] * 16, os.sched_getaffinity(0)
    made, counts = [], []
    for crowded in (False, True):
        model = make(spec, torch.bfloat16, extra, room=64)
        if crowded:
            os.sched_setaffinity(0, {min(cores)})
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if crowded else None
        try:
            step = model.compiled(threshold_table("half", 3), threads=threads)
            tokens, rows = [7], {site: torch.zeros(3, 49, spec.channels(site), dtype=torch.bfloat16) for site in SITES}
            while len(tokens) < 49:
                at = len(tokens) - 1
                some = {site: x[:, at : at + 16] for site, x in rows.items()}
                tokens += step.steps(tokens[-1], at, 16, rule, bits, (), some)
            logits = step.step(tokens[-1], 48, {site: x[:, 48] for site, x in rows.items()}).clone()
            made.append([torch.tensor(tokens), logits, model.kv, *rows.values()])
            counts.append(step.kept())
            step.close()
        finally:
            if busy is not None:
                busy.kill()
                busy.wait()
            os.sched_setaffinity(0, cores)
    for free, crowded_too in zip(*made, strict=True):
        torch.testing.assert_close(crowded_too, free, rtol=0, atol=0, equal_nan=True)
    assert (counts[0] == counts[1]).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("window", [None, 100])
def test_long_context(threads: int, window: int | None) -> None:
    """Several tiles and parts of attention."""
    spec = replace(SPEC, windows=(window, None))
    model = make(spec, torch.float32, room=700)
    model.kv[:, :, :, :650] = torch.randn(2, 2, 2, 650, 16, generator=torch.Generator().manual_seed(2)) * 2
    reference_kv = model.kv.clone()
    logits = model.compiled(threads=threads).step(11, 650)
    expected, _ = model.step(11, 650, None, reference_kv)
    assert distance(logits, expected) < 2e-5


@pytest.mark.parametrize(
    "rule",
    [
        SamplingRule(0.0),
        SamplingRule(0.8, 200, 1.0, 5),
        SamplingRule(1.0, 0, 0.9, 7),
        SamplingRule(3.0, 50, 0.5, 8),
        SamplingRule(1e30, 0, 0.7, 3),
        SamplingRule(1.0, 0, 1e-30, 3),
    ],
    ids=str,
)
def test_chooses_as_the_rule_does(rule: SamplingRule) -> None:
    """Several tokens of one call against one step each; a sleep lets the other threads fall asleep, too."""
    model = make(SPEC, torch.float32, room=64)
    step, expected, token = model.compiled(threads=2), [], 3
    for position in range(60):
        chosen = sample_reference(step.step(token, position), rule, random_bits(rule.seed, 2, position))
        assert chosen is not None
        expected.append(token := chosen)
    bits = [random_bits(rule.seed, 2, position) for position in range(60)]
    got = step.steps(3, 0, 30, rule, bits[:30])
    time.sleep(0.05)
    got += step.steps(got[-1], 30, 30, rule, bits[30:])
    assert got == expected
    stop = expected[10]
    assert step.steps(3, 0, 30, rule, bits[:30], (299, stop)) == expected[: expected.index(stop) + 1]


def test_several_tokens_leave_the_rows_that_each_would() -> None:
    model = make(SPEC, torch.bfloat16)
    step = model.compiled(threshold_table("own", len(SPEC.windows)), threads=2)
    rule, alone, token = SamplingRule(0.0), [], 3
    for position in range(6):
        alone.append(poisoned_rows(SPEC, torch.bfloat16))
        logits = step.step(token, position, alone[-1])
        token = int(logits.argmax())
    # Rows of a block with room for more: strides of layers and steps are not those of a tensor of its own.
    blocks = {site: x[:, None].repeat(1, 9, 1) for site, x in poisoned_rows(SPEC, torch.bfloat16).items()}
    rows = {site: block[:, 1:7] for site, block in blocks.items()}
    step.steps(3, 0, 6, rule, [0] * 6, (), rows)
    for site, block in blocks.items():
        assert torch.equal(block[:, 1:7], torch.stack([one[site] for one in alone], 1))
        assert block[:, [0, 7, 8]].isnan().all()
    with pytest.raises(ValueError, match="rows"):
        step.steps(3, 0, 7, rule, [0] * 7, (), rows)


def test_chooses_nothing_from_nan() -> None:
    model = make(SPEC, torch.float32)
    step = model.compiled(threads=2)
    greedy = SamplingRule(0.0)
    first = step.steps(3, 0, 2, greedy, [0, 0])
    model.embedding[first[0]] = math.nan  # the head's row, too: no logits after it can be ordered
    assert step.steps(3, 0, 2, greedy, [0, 0]) == []
    with pytest.raises(ValueError, match="33 tokens"):
        step.steps(3, 0, 33, greedy, [0] * 33)
    with pytest.raises(ValueError, match="position 24"):
        step.steps(3, 23, 2, greedy, [0, 0])


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_recovers_after_an_interrupted_step(after: bool) -> None:
    """Ctrl-C before this thread's own part leaves the others at a barrier; right after it, perhaps at the last one."""
    model = make(SPEC, torch.float32)
    step = model.compiled(threads=3)
    first = step.step(3, 0).clone()
    work = step._team._work

    def interrupted(thread: int) -> None:
        if after:
            work(thread)
        raise KeyboardInterrupt

    for _ in range(30):
        step._team._work = interrupted
        with pytest.raises(KeyboardInterrupt):
            step.step(3, 0)
        step._team._work = work
        assert torch.equal(step.step(3, 0), first)
    step.close()


def test_threads_end_with_their_step() -> None:
    model = make(SPEC, torch.float32)
    step = model.compiled(threads=4)
    step.step(3, 0)
    assert sum(thread.name.startswith("teal-step") for thread in threading.enumerate()) >= 3
    gone = weakref.ref(step)
    del step
    gc.collect()
    assert gone() is None
    assert not any(thread.name.startswith("teal-step") for thread in threading.enumerate())


def test_does_not_wait_for_threads_that_ended() -> None:
    step = make(SPEC, torch.float32).compiled(threads=2)
    step.close()
    with pytest.raises(RuntimeError, match="close"):
        step.step(3, 0)


def test_refuses_what_it_cannot_trust() -> None:
    model = make(SPEC, torch.float32)
    step = model.compiled(threads=1)
    with pytest.raises(ValueError, match="token 300"):
        step.step(300, 0)
    with pytest.raises(ValueError, match="position 24"):
        step.step(0, 24)
    with pytest.raises(ValueError, match="thresholds"):
        model.compiled(np.zeros((2, 7)))
    with pytest.raises(ValueError, match="thresholds"):
        model.compiled(np.full((2, 7), -1, np.float32))
    with pytest.raises(ValueError, match="keys must be"):
        replace(model, kv=model.kv[..., :8]).compiled()
    with pytest.raises(ValueError, match="attn_out"):
        step.step(0, 0, poisoned_rows(replace(SPEC, heads=7), torch.float32))
    with pytest.raises(ValueError, match="layer 1, down"):
        model.layers[1].down = model.layers[1].down.t()
        model.compiled()
    model.layers.pop()
    with pytest.raises(ValueError, match="1 layers"):
        model.compiled()


def test_compiled_code_is_found_again() -> None:
    """Another process takes it from the disk, so its first token does not wait for the compiler."""
    step = compiled.load(torch.bfloat16)
    assert compiled.is_compiled(torch.bfloat16)
    code = (
        "import torch; from teal_kernels.steps.cpu import compiled; step = compiled.load(torch.bfloat16);"
        "print([sum(counts.values()) for counts in (step.run.stats.cache_hits, step.run.stats.cache_misses)])"
    )
    package = Path(step.__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(package)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert ran.stdout.strip() == "[1, 0]"


def test_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    assert compiled.writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "file").touch()
    other = compiled.writable(tmp_path / "file" / "b")
    assert other.is_dir()
    assert tmp_path not in other.parents


def test_threads() -> None:
    assert default_threads() >= 1

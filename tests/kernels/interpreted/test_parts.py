"""The fused kernels of a decode step, interpreted, one by one, where the whole step does not reach."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, TOLERANCE, relative_error

from teal_kernels.ops.kept.op import KeptList, Sink
from teal_kernels.ops.threshold.reference import keep_mask
from teal_kernels.parts.attention.op import AttentionShares, launch_attention
from teal_kernels.parts.attention.reference import attention_reference
from teal_kernels.parts.norm.op import launch_rms_norm
from teal_kernels.parts.norm.reference import add_partials_reference, rms_norm_reference
from teal_kernels.parts.sample.op import Chooser
from teal_kernels.parts.sample.reference import SamplingRule, philox, random_bits, sample_reference
from teal_kernels.parts.swiglu.op import launch_swiglu
from teal_kernels.parts.swiglu.reference import swiglu_reference

CPU = torch.device("cpu")


def sparse_sink(size, chunk, dtype, thresholds):
    """A sink whose buffers hold what no kernel may read."""
    kept = KeptList.empty(size, dtype, CPU, chunk)
    kept.index.fill_(2**30)
    kept.value.fill_(torch.nan)
    kept.count.fill_(2**30)
    tally = torch.zeros(len(thresholds), len(kept.count), dtype=torch.int64)
    return Sink(kept.chunk, kept, thresholds, tally, None, None)


def listed(sink, size):
    """The vector that a kept list stands for."""
    x = torch.zeros(size, dtype=sink.kept.value.dtype)
    for c, count in enumerate(sink.kept.count.tolist()):
        here = slice(c * sink.chunk, c * sink.chunk + count)
        x[sink.kept.index[here].long()] = sink.kept.value[here]
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [50, 700])
def test_norm_over_several_chunks(size, dtype):
    torch.manual_seed(size)
    hidden, weight, bias = torch.randn(3, size).to(dtype)
    partial = torch.randn(3, size)
    thresholds = torch.tensor([0.8, 0.5])
    sink, stream = sparse_sink(size, 256, dtype, thresholds), torch.full_like(hidden, torch.nan)
    launch_rms_norm(hidden, stream, weight, 1e-5, sink, partial=partial, bias=bias)
    wanted = add_partials_reference(hidden, partial, bias)
    assert torch.equal(stream, wanted)
    x = rms_norm_reference(wanted, weight, 1e-5)
    assert relative_error(listed(sink, size), torch.where(keep_mask(x, 0.5), x, 0.0)) < TOLERANCE[dtype]
    counts = [int(keep_mask(x, t).sum()) for t in (0.8, 0.5)]
    assert sink.tally.sum(1).tolist() == pytest.approx(counts, abs=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_over_several_chunks(dtype):
    partial = torch.randn(3, 2 * 600, generator=torch.Generator().manual_seed(1))
    sink = sparse_sink(600, 128, dtype, torch.tensor([0.1]))
    launch_swiglu(partial, torch.empty(0, dtype=dtype), sink)
    x = swiglu_reference(partial, dtype)
    assert relative_error(listed(sink, 600), torch.where(keep_mask(x, 0.1), x, 0.0)) < 2 * TOLERANCE[dtype]


@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 90),
    shares=st.integers(1, 7),
    window=st.sampled_from([None, 1, 20]),
    group=st.sampled_from([1, 3]),
    dtype=st.sampled_from(DTYPES),
)
def test_attention_with_any_length_and_number_of_shares(length, shares, window, group, dtype):
    torch.manual_seed(length)
    keys, values = torch.randn(2, 2, 90, 32).to(dtype)
    q = torch.randn(2 * group, 32).to(dtype)
    wanted = attention_reference(q, keys, values, length, window)
    keys[:, length:], values[:, length:] = torch.nan, torch.nan
    scratch = AttentionShares.empty(len(q), 32, shares, CPU)
    for tensor in (scratch.mixed, scratch.peak, scratch.total):
        tensor.fill_(torch.nan)
    sink = sparse_sink(q.numel(), 64, dtype, torch.tensor([0.0]))
    launch_attention(q, keys, values, torch.tensor([length - 1]), window, scratch, sink)
    assert relative_error(listed(sink, q.numel()), wanted) < 4 * TOLERANCE[dtype]


@triton.jit
def philox_kernel(key_ptr, counter_ptr, out_ptr):
    key = tl.load(key_ptr)
    c0, c1, c2, c3 = (
        tl.load(counter_ptr),
        tl.load(counter_ptr + 1),
        tl.load(counter_ptr + 2),
        tl.load(counter_ptr + 3),
    )
    a, b, c, d = tl.philox(key, c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32))
    tl.store(out_ptr, a.to(tl.int64))
    tl.store(out_ptr + 1, b.to(tl.int64))
    tl.store(out_ptr + 2, c.to(tl.int64))
    tl.store(out_ptr + 3, d.to(tl.int64))


@given(seed=st.integers(0, 2**63 - 1), counter=st.tuples(*[st.integers(0, 2**32 - 1)] * 4))
@settings(max_examples=20, deadline=None)
def test_philox_of_triton_is_ours(seed, counter):
    out = torch.empty(4, dtype=torch.int64)
    philox_kernel[(1,)](torch.tensor([seed]), torch.tensor(counter), out)
    assert tuple(out.tolist()) == philox((seed & 0xFFFFFFFF, seed >> 32), counter)


RULES = [
    SamplingRule(temperature, top_k, top_p, seed=2**40 + 9)
    for temperature, top_k, top_p in [(0.7, 0, 1.0), (0.7, 5, 1.0), (2.0, 0, 0.8), (1.0, 40, 0.6), (5.0, 2999, 0.99)]
]


@pytest.mark.parametrize(("rule", "dtype"), [*zip(RULES, cycle(DTYPES), strict=False)], ids=str)
def test_draws_what_the_reference_draws(rule, dtype):
    """Over three chunks of the vocabulary, with many equal logits."""
    logits = (torch.randn(3000, generator=torch.Generator().manual_seed(2)) * 2).to(dtype)
    logits[5::7] = logits[11]
    choose, tokens = Chooser(rule, 2**33 + 1, CPU), set()
    for position in (*range(12), 2**32 + 3):
        choose(logits, torch.tensor([position]))
        token = sample_reference(logits, rule, random_bits(rule.seed, 2**33 + 1, position))
        assert choose.choice.tolist() == [token, 0]
        tokens.add(token)
    assert len(tokens) > 3


@pytest.mark.parametrize("n", [1, 2, 1023, 1024, 1025])
def test_draws_from_vocabularies_about_a_chunk(n):
    logits = torch.randn(n, generator=torch.Generator().manual_seed(n))
    for rule in (SamplingRule(3.0), SamplingRule(3.0, top_p=0.9), SamplingRule(3.0, top_k=2)):
        choose = Chooser(rule, 0, CPU)
        for position in range(5):
            choose(logits, torch.tensor([position]))
            assert choose.choice.tolist() == [sample_reference(logits, rule, random_bits(0, 0, position)), 0]


def test_temperature_zero_takes_the_most_likely():
    logits, choose = torch.randn(50), Chooser(SamplingRule(0.0), 0, CPU)
    choose(logits, torch.tensor([3]))
    assert choose.choice.tolist() == [logits.argmax(), 0]


@pytest.mark.parametrize("rule", [SamplingRule(0.0), SamplingRule(1.0), *RULES[1:4]], ids=str)
@pytest.mark.parametrize("place", [0, 20, 49])
def test_nan_logits_are_told(rule, place):
    logits, choose = torch.randn(50), Chooser(rule, 0, CPU)
    logits[place] = torch.nan
    choose(logits, torch.tensor([3]))
    token, broken = choose.choice.tolist()
    assert broken == 1
    assert 0 <= token < 50  # the next step may have been launched with it


@pytest.mark.parametrize(
    "logits", [torch.full([50], -torch.inf), torch.tensor([0.0, torch.inf, 1.0])], ids=["-inf", "inf"]
)
def test_infinite_logits_are_told(logits):
    choose = Chooser(SamplingRule(1.0, top_p=0.5), 0, CPU)
    choose(logits, torch.tensor([3]))
    assert choose.choice.tolist() == [0, 1]


def test_other_settings_without_another_graph():
    logits, position = torch.randn(300), torch.tensor([7])
    choose, other = Chooser(SamplingRule(0.5, 20, seed=1), 0, CPU), SamplingRule(2.0, 20, seed=5)
    assert choose.adopt(other, 3)
    choose(logits, position)
    fresh = Chooser(other, 3, CPU)
    fresh(logits, position)
    assert torch.equal(choose.choice, fresh.choice)
    assert not choose.adopt(SamplingRule(2.0, 21, seed=5), 3)
    assert not choose.adopt(SamplingRule(2.0, 20, 0.5, seed=5), 3)
    assert not choose.adopt(SamplingRule(0.0, 20, seed=5), 3)

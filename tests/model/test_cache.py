"""The cache refuses what does not fit; the rotary table grows; attention with a window equals the plain formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teal_cli.errors import UsageError
from teal_cli.model.config import load_config
from teal_cli.model.rope import RopeTable
from teal_cli.model.transformer import Transformer, attention, dense
from teal_kernels.matrix import FloatMatrix


def test_a_full_cache_says_so_and_stays_as_it_was(tiny: Callable[[str], Path]) -> None:
    model = Transformer.from_checkpoint(tiny("llama3"))
    cache = model.cache(6)
    model.forward(torch.arange(5), 0, cache)
    before = cache.kv.clone()
    with pytest.raises(UsageError, match=r"7 tokens do not fit the key-value cache of 6"):
        model.forward(torch.arange(2), 5, cache)
    assert torch.equal(cache.kv.nan_to_num(), before.nan_to_num())
    assert cache.length == 5
    model.forward(torch.arange(1), 5, cache)
    assert cache.length == 6


def test_a_gap_in_the_cache_is_a_defect(tiny: Callable[[str], Path]) -> None:
    model = Transformer.from_checkpoint(tiny("llama3"))
    with pytest.raises(ValueError, match="leaves a gap"):
        model.forward(torch.arange(1), 3, model.cache(8))


def test_keys_and_values_are_views_of_one_memory(tiny: Callable[[str], Path]) -> None:
    model = Transformer.from_checkpoint(tiny("llama3"))
    cache = model.cache()
    assert cache.max_tokens == model.config.context
    assert cache.k.shape == cache.v.shape == (3, 2, 256, 12)
    model.forward(torch.arange(4), 0, cache)
    assert torch.equal(cache.kv[:, 0, :, :4], cache.k[:, :, :4])
    assert torch.equal(cache.kv[:, 1, :, :4], cache.v[:, :, :4])


@pytest.mark.parametrize("name", ["llama2", "llama3", "llama-linear", "llama-yarn"])
def test_a_grown_table_keeps_what_it_had(tiny: Callable[[str], Path], name: str) -> None:
    table = RopeTable(load_config(tiny(name)), torch.float32, "cpu")
    early = [part.clone() for part in table.at(100, 50)[0]]
    late = table.at(5000, 3)[0]
    assert late[0].shape == (3, 1, 12)
    assert all(torch.equal(a, b) for a, b in zip(early, table.at(100, 50)[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(late, table.at(5000, 3)[0], strict=True))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Query by query, head by head."""
    count, heads, head_dim = q.shape
    kv_heads, total, _ = k.shape
    out = torch.empty(count, heads, head_dim)
    for row in range(count):
        end = total - count + row + 1
        start = 0 if window is None else max(0, end - window)
        for head in range(heads):
            group = head * kv_heads // heads
            scores = k[group, start:end] @ q[row, head] * head_dim**-0.5
            out[row, head] = scores.softmax(0) @ v[group, start:end]
    return out.reshape(count, heads * head_dim)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 9),
    before=st.integers(0, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    window=st.none() | st.integers(1, 12),
)
def test_attention_is_the_plain_formula(count: int, before: int, kv_heads: int, group: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(count + 10 * before)
    q = torch.randn(count, kv_heads * group, 4, generator=generator)
    k, v = torch.randn(2, kv_heads, before + count, 4, generator=generator)
    torch.testing.assert_close(attention(q, k, v, window), plain_attention(q, k, v, window))


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("channels", [100, 256, 1000])
def test_dense_in_half_precision_is_the_rounded_product(tokens: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(tokens, channels, generator=generator).half()
    weight = torch.randn(channels, 33, generator=generator).half()
    expected = (x.double() @ weight.double()).half()
    torch.testing.assert_close(dense(0, "mlp_in", x, FloatMatrix(weight)), expected, rtol=1e-3, atol=1e-3)

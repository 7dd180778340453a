"""Names and sizes of the schema."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teal_cli.errors import UsageError
from teal_cli.store.schema import block_tokens, level_name, parse_level, token_chunk


@pytest.mark.parametrize(
    ("target", "name"), [(0.5, "s0.50"), (0.0, "s0.00"), (0.95, "s0.95"), (0.125, "s0.125"), (1e-5, "s0.00001")]
)
def test_level_names(target: float, name: str) -> None:
    assert level_name(target) == name
    assert parse_level(name) == target
    assert parse_level(str(target)) == target


@given(st.floats(0.0, 1.0, exclude_max=True))
def test_every_level_name_reads_back(target: float) -> None:
    assert parse_level(level_name(target)) == target


@pytest.mark.parametrize("name", ["s1.00", "x", "s-0.5", "1.0", "", "nan", "s0.5x"])
def test_no_levels(name: str) -> None:
    with pytest.raises(UsageError):
        parse_level(name)


@given(st.lists(st.integers(1, 30000), min_size=4, max_size=4), st.sampled_from([2, 4]))
def test_blocks_are_just_large_enough(channels: list[int], itemsize: int) -> None:
    block = block_tokens(channels, itemsize)
    smallest = min(channels) * itemsize
    assert block & (block - 1) == 0
    assert block * smallest >= 256 * 1024
    assert block == 1 or block // 2 * smallest < 256 * 1024
    assert token_chunk(block) % block == 0

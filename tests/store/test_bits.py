"""Bit operations on words against the plain way, entry by entry."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from teal_cli.store import bits


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """bool [rows, K]."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 12)), draw(st.integers(1, 400))
    return random.random(shape) < draw(st.sampled_from([0.0, 0.02, 0.5, 0.95, 1.0]))


def to_bool(words: np.ndarray, channels: int) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(words.T).view(np.uint8), axis=1, count=channels, bitorder="little") == 1


@settings(max_examples=60, deadline=None)
@given(rows(), st.integers(0, 400))
def test_rows_counts_and_shifts(kept: np.ndarray, by: int) -> None:
    channels = kept.shape[1]
    words = bits.to_words(kept)
    assert (to_bool(words, channels) == kept).all()
    assert not bits.past_the_end(words, channels)
    assert (bits.row_counts(words) == kept.sum(axis=1)).all()
    assert bits.total(words) == kept.sum()
    assert (bits.channel_counts(words, channels) == kept.sum(axis=0)).all()
    assert (to_bool(bits.inverted(words, channels), channels) == ~kept).all()
    moved = np.zeros_like(kept)
    moved[:, : max(0, channels - by)] = kept[:, by:]
    assert (to_bool(bits.shifted(words, by), channels) == moved).all()
    bounds = np.sort(np.random.default_rng(by).integers(0, channels + 1, 5))
    wanted = np.array([kept[:, :bound].sum(axis=1) for bound in bounds])
    assert (bits.prefix_counts(words, bounds) == wanted).all()


@settings(max_examples=30, deadline=None)
@given(rows(), st.integers(0, 400))
def test_several_masks_at_once(kept: np.ndarray, by: int) -> None:
    channels, masks = kept.shape[1], [kept, ~kept, np.roll(kept, 1, axis=1)]
    several, each = bits.to_words(np.stack(masks)), [bits.to_words(mask) for mask in masks]
    assert (several == np.stack(each, axis=1)).all()
    assert (bits.total(several) == [mask.sum() for mask in masks]).all()
    assert (bits.row_counts(several) == [bits.row_counts(words) for words in each]).all()
    assert (bits.channel_counts(several, channels) == [mask.sum(axis=0) for mask in masks]).all()
    assert (bits.shifted(several, by) == np.stack([bits.shifted(words, by) for words in each], axis=1)).all()
    assert (bits.inverted(several, channels)[:, 0] == each[1]).all()
    bounds = np.array([0, channels // 2, channels])
    below = np.stack([bits.prefix_counts(words, bounds) for words in each], axis=1)
    assert (bits.prefix_counts(several, bounds) == below).all()


@settings(max_examples=60, deadline=None)
@given(rows())
def test_runs(kept: np.ndarray) -> None:
    channels = kept.shape[1]
    lengths = [n for n in (1, 2, 3, 4, 7, 8, 15, 16, 31, 61, 64, 127, 128, 255) if n <= channels]
    masks = kept, ~kept
    found = bits.runs_at_least(bits.to_words(np.stack(masks)), channels, lengths)
    for number, mask in enumerate(masks):
        runs = []  # (length, whether it ends the row)
        for row in mask:
            edges = np.flatnonzero(np.diff(row, prepend=False, append=False)).tolist()
            runs += [(stop - start, stop == channels) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
        wanted = {n: (sum(x >= n for x, _ in runs), sum(x >= n and last for x, last in runs)) for n in lengths}
        assert {n: (all_of[number], ending[number]) for n, (all_of, ending) in found.items()} == wanted


@settings(max_examples=60, deadline=None)
@given(rows())
def test_groups(kept: np.ndarray) -> None:
    masks = kept, ~kept
    found = bits.group_histograms(bits.to_words(np.stack(masks)), kept.shape[1])
    for size in (4, 8, 16, 32, 64, 128):
        for number, mask in enumerate(masks):
            counts = [row[i : i + size].sum() for row in mask for i in range(0, len(row), size)]
            assert (found[size][number] == np.bincount(counts, minlength=size + 1)).all(), size


@settings(max_examples=60, deadline=None)
@given(rows(), st.floats(0, 1))
def test_narrowed(kept: np.ndarray, share: float) -> None:
    left = kept & (np.random.default_rng(1).random(kept.shape) < share)
    found = bits.narrowed(np.packbits(kept, axis=1, bitorder="little"), left[kept])
    assert (found == np.packbits(left, axis=1, bitorder="little")).all()


def test_a_bit_past_the_last_channel() -> None:
    mask = np.array([[0xFF, 0x01], [0x00, 0x02]], np.uint8)
    assert bits.past_the_end(bits.from_bitmap(mask), 9)
    assert not bits.past_the_end(bits.from_bitmap(mask), 10)

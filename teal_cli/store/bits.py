"""Bit operations on packed rows: which entries of a row were kept, 64 of them in a machine word.

Channel c of a row is bit c % 64 of its word c // 64; bits past the last channel are 0. Words lie word by word, uint64
[W, masks, rows], or [W, rows] of one mask: what is done to every row, a shift too, is then a few long loops, and the
longer they are the less two threads wait for each other's Python. Knows no store and no statistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np

WORD: Final = 64
_PAIRS: Final = np.uint64(0x5555555555555555)
_QUADS: Final = np.uint64(0x3333333333333333)
# Of two counts in four bits each, of four of them (5 << 4 is past what two counts of at most 4 make): their sums.
_TWO_SUMS: Final = np.add.outer(np.arange(16), np.arange(16)).ravel()
_FOUR_SUMS: Final = np.add.outer(_TWO_SUMS[: 5 << 4], _TWO_SUMS)


def from_bitmap(mask: np.ndarray) -> np.ndarray:
    """Bitmap uint8 [..., rows, ceil(K/8)] in little bit order -> uint64 [W, ..., rows], W = ceil(K/64)."""
    if rest := mask.shape[-1] % 8:
        mask = np.concatenate([mask, np.zeros((*mask.shape[:-1], 8 - rest), np.uint8)], axis=-1)
    return np.ascontiguousarray(np.moveaxis(np.ascontiguousarray(mask).view("<u8"), -1, 0))


def to_words(kept: np.ndarray) -> np.ndarray:
    """bool [..., rows, K] -> uint64 [W, ..., rows]."""
    return from_bitmap(np.packbits(kept, axis=-1, bitorder="little"))


@cache
def _places() -> np.ndarray:
    """Of an octet, and of 8 bits that tell which of its set bits stay: what is left, uint8 [256 * 256]."""
    octet, stays = np.arange(256)[:, None], np.arange(256)
    left = np.zeros((256, 256), np.uint8)
    for bit in range(8):
        rank = np.bitwise_count(octet & ((1 << bit) - 1))
        left |= ((octet >> bit & stays >> rank & 1) << bit).astype(np.uint8)
    return left.ravel()


def narrowed(mask: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """A bitmap, uint8 in little bit order, with those of its set bits that stay: bool [set bits], in their order."""
    counts = np.bitwise_count(mask).ravel()
    first = np.cumsum(counts, dtype=np.int64) - counts  # set bits before each octet
    packed = np.append(np.packbits(stays, bitorder="little"), np.zeros(2, np.uint8)).astype(np.uint16)
    windows = packed[:-1] | packed[1:] << 8
    own = windows[first >> 3] >> (first & 7).astype(np.uint16) & 255
    return np.asarray(_places()[mask.ravel().astype(np.uint16) << 8 | own].reshape(mask.shape))


def past_the_end(words: np.ndarray, channels: int) -> np.ndarray:
    """Whether a bit past the last channel is set: bool [...]."""
    beyond = words[-1] >> np.uint64(channels % WORD) if channels % WORD else np.zeros_like(words[-1])
    return np.asarray(beyond.any(axis=-1))


def row_counts(words: np.ndarray) -> np.ndarray:
    """Set bits of every row: uint32 [..., rows]."""
    return np.bitwise_count(words).sum(axis=0, dtype=np.uint32)


def total(words: np.ndarray) -> np.ndarray:
    """Set bits of all rows: int64 [...]."""
    return np.asarray(row_counts(words).sum(axis=-1, dtype=np.int64))


def shifted(words: np.ndarray, by: int) -> np.ndarray:
    """Every row moved towards channel 0: entry c of the result is entry c + by, nothing where there is none."""
    skip, bits = divmod(by, WORD)
    width = max(0, len(words) - skip)
    out = np.empty_like(words)
    np.right_shift(words[skip:], np.uint64(bits), out=out[:width])
    if bits and width:
        out[: width - 1] |= words[skip + 1 :] << np.uint64(WORD - bits)
    out[width:] = 0
    return out


def inverted(words: np.ndarray, channels: int) -> np.ndarray:
    """The entries that are not set, of the first `channels`."""
    return ~words & to_words(np.ones((*words.shape[1:-1], 1, channels), bool))


def runs_at_least(words: np.ndarray, channels: int, lengths: Sequence[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Runs of at least n set entries within rows, and how many of these end with the row: int64 [masks] each.

    A run of L entries has L - n + 1 places where n set entries begin, if any: the places for n less those for n + 1 are
    the runs of at least n.

    Args:
        words: [W, masks, rows].
        lengths: each n, rising from 1, none more than twice the one before.
    """
    width, masks, rows = words.shape
    nothing = np.zeros(masks, np.int64)
    found = dict.fromkeys(lengths, (nothing, nothing))
    columns = words.reshape(width, -1)  # rows of all masks; bounds: where those of each begin
    bounds = np.arange(masks + 1) * rows
    length, longer, more = 0, columns, _by_mask(row_counts(columns), bounds)
    for wanted in lengths:  # longer: c .. c + length are set; more: how often
        begin, places = longer, more
        if wanted > length + 1:
            begin, bounds = _with_any(_and_shifted(begin, wanted - length - 1), bounds)
            places = _by_mask(row_counts(begin), bounds)
        if not places.any():
            break
        longer = _and_shifted(begin, 1)
        more = _by_mask(row_counts(longer), bounds)
        word, bit = divmod(channels - wanted, WORD)
        found[wanted] = places - more, _by_mask(begin[word] >> np.uint64(bit) & np.uint64(1), bounds)
        length = wanted
    return found


def _by_mask(counts: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Sums of counts [columns] over the columns of each mask: int64 [masks]."""
    sums = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, dtype=np.int64, out=sums[1:])
    return np.diff(sums[bounds])


def _and_shifted(words: np.ndarray, by: int) -> np.ndarray:
    """Entries c where c and c + by are set."""
    out = shifted(words, by)
    out &= words
    return out


def _with_any(words: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns that have a set entry, if these are few, else all; and where those of each mask begin."""
    some = np.bitwise_or.reduce(words, axis=0) != 0
    if 2 * np.count_nonzero(some) >= len(some):
        return words, bounds
    return words[:, some], np.append(0, np.cumsum(some))[bounds]


def _by_sum(seen: np.ndarray, sums: np.ndarray, most: int) -> np.ndarray:
    """How often each sum 0 .. most was seen, of what has these sums: int64 [most + 1]."""
    return np.bincount(sums.ravel(), seen.ravel(), most + 1)[: most + 1].astype(np.int64)


def group_histograms(words: np.ndarray, channels: int) -> dict[int, np.ndarray]:
    """How many aligned groups of 4, 8, ..., 128 channels, the last of a row perhaps shorter, have n set entries:
    by size, int64 [masks, size + 1], index n. Words [W, masks, rows].
    """
    width, masks, rows = words.shape
    found = {size: np.zeros((masks, size + 1), np.int64) for size in (4, 8, 16, 32, 64, 128)}
    twos = words - (words >> np.uint64(1) & _PAIRS)  # in two bits each how many of them were set, and in four
    fours = (twos & _QUADS) + (twos >> np.uint64(2) & _QUADS)
    halves = np.bitwise_count(words.view("<u4"))
    pairs = np.bitwise_count(words)
    pairs[: width // 2 * 2 : 2] += pairs[1::2]
    for mask in range(masks):
        seen = np.bincount(fours[:, mask].view("<u2").ravel(), minlength=_FOUR_SUMS.size).reshape(-1, _TWO_SUMS.size)
        two = seen.sum(axis=0)
        two[: len(seen)] += seen.sum(axis=1)
        found[4][mask] = two.reshape(16, 16).sum(axis=0)[:5] + two.reshape(16, 16).sum(axis=1)[:5]
        found[8][mask] = _by_sum(two, _TWO_SUMS, 8)
        found[16][mask] = _by_sum(seen, _FOUR_SUMS, 16)
        seen = np.bincount(halves[:, mask].view("<u2").ravel(), minlength=33 << 8).reshape(33, 256)[:, :33]
        found[32][mask] = seen.sum(axis=0) + seen.sum(axis=1)
        found[64][mask] = _by_sum(seen, np.add.outer(np.arange(33), np.arange(33)), 64)
        found[128][mask] = np.bincount(pairs[::2, mask].ravel(), minlength=129)
    for size in (4, 8, 16, 32, 64):  # words go on past the last channel
        found[size][:, 0] -= rows * (width * WORD // size - -(-channels // size))
    return found


def channel_counts(words: np.ndarray, channels: int) -> np.ndarray:
    """In how many rows each channel is set: int64 [..., K]."""
    octets = np.ascontiguousarray(np.moveaxis(words, (0, -1), (-1, 0))).view(np.uint8)
    counts = np.zeros((*octets.shape[1:-1], octets.shape[-1] * 8), np.int64)
    for first in range(0, len(octets), 255):  # what uint8 can count
        kept = np.unpackbits(octets[first : first + 255], axis=-1, bitorder="little")
        counts += np.add.reduce(kept, axis=0, dtype=np.uint8)
    return counts[..., :channels]


def prefix_counts(words: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Set entries of every row below each of the rising bounds: [bounds, ..., rows], as unsigned as the last bound
    needs.
    """
    counts = np.bitwise_count(words)
    below = np.zeros((len(words) + 1, *words.shape[1:]), np.min_scalar_type(bounds[-1]))
    for index, own in enumerate(counts):  # np.cumsum goes down one column at a time
        np.add(below[index], own, out=below[index + 1])
    whole, rest = np.divmod(bounds, WORD)
    partial = words[np.minimum(whole, len(words) - 1)]
    partial &= ((np.uint64(1) << rest.astype(np.uint64)) - np.uint64(1)).reshape(-1, *[1] * (words.ndim - 1))
    return below[whole] + np.bitwise_count(partial)

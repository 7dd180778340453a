"""Bit operations on packed rows: which entries of a row were kept, 64 of them in a machine word.

Channel c of a row is bit c % 64 of its word c // 64; bits past the last channel are 0. Everything here costs a few
word operations per 64 entries. Knows no store and no statistic.
"""

from __future__ import annotations

from typing import Final

import numpy as np

WORD: Final = 64
_ROW_WORDS: Final = 2  # rows are padded to whole groups of 128 entries, the largest that `group_sizes` counts


def to_words(kept: np.ndarray) -> np.ndarray:
    """bool [rows, K] -> uint64 [rows, W], W even."""
    rows, channels = kept.shape
    words = -(-channels // (WORD * _ROW_WORDS)) * _ROW_WORDS
    packed = np.packbits(kept, axis=1, bitorder="little")
    out = np.zeros((rows, words * 8), np.uint8)
    out[:, : packed.shape[1]] = packed
    return out.view("<u8")


def row_counts(words: np.ndarray) -> np.ndarray:
    """Set bits of every row: int64 [rows]."""
    return np.bitwise_count(words).sum(axis=1, dtype=np.int64)


def total(words: np.ndarray) -> int:
    """Set bits of all rows."""
    return int(np.bitwise_count(words).sum(dtype=np.int64))


def shifted(words: np.ndarray, by: int) -> np.ndarray:
    """Every row moved towards channel 0: entry c of the result is entry c + by, nothing where there is none."""
    skip, bits = divmod(by, WORD)
    width = words.shape[1] - skip
    if width <= 0:
        return np.zeros_like(words)
    # One long row: loops over short ones take five times as long. What came from the row behind is then overwritten.
    out, flat = np.empty_like(words), words.ravel()
    line = out.ravel()
    count = len(flat) - skip
    np.right_shift(flat[skip:], np.uint64(bits), out=line[:count])
    if bits:
        line[: count - 1] |= flat[skip + 1 :] << np.uint64(WORD - bits)
        np.right_shift(words[:, -1], np.uint64(bits), out=out[:, width - 1])
    out[:, width:] = 0
    return out


def inverted(words: np.ndarray, channels: int) -> np.ndarray:
    """The entries that are not set, of the first `channels`."""
    valid = to_words(np.ones((1, channels), bool))
    return ~words & valid


def run_counts(words: np.ndarray, channels: int) -> np.ndarray:
    """Runs of set entries within rows, by floor(log2(length)): int64 [bit length of K].

    A row whose entry c is set where c .. c + n - 1 were set has one run for each run of at least n, and two rows of
    n give that of 2 n.
    """
    at_least = np.zeros(channels.bit_length() + 1, np.int64)
    length = 1
    for k in range(channels.bit_length()):
        if not (ones := total(words)):
            break
        at_least[k] = ones - total(words & shifted(words, 1))
        words = words & shifted(words, length)
        length *= 2
    return at_least[:-1] - at_least[1:]


def gap_counts(words: np.ndarray, channels: int) -> np.ndarray:
    """Set entries by floor(log2(gap)): int64 [bit length of K].

    The gap of an entry is its channel minus that of the set entry before it in the row; the first entry's is its
    channel + 1.
    """
    at_least = np.zeros(channels.bit_length() + 1, np.int64)
    at_least[0] = total(words)
    clear, half = inverted(words, channels), 1  # clear: c .. c + half - 1 are not set
    for k in range(1, channels.bit_length()):
        longer = clear & shifted(clear, half - 1) if half > 1 else clear  # of 2 * half - 1
        if not (found := total(longer & shifted(words, 2 * half - 1))):
            break
        at_least[k] = found
        clear = clear & shifted(clear, half)
        half *= 2
    return at_least[:-1] - at_least[1:]


def group_sizes(words: np.ndarray, channels: int, size: int) -> np.ndarray:
    """Set entries of every aligned group of 8, 16, 32, 64 or 128 channels, the last perhaps shorter: [rows, groups]."""
    unit = min(size, WORD)
    counts = np.bitwise_count(words.view(f"<u{unit // 8}"))
    if size > WORD:
        counts = counts[:, 0::2] + counts[:, 1::2]
    return counts[:, : -(-channels // size)]


def group_histogram(words: np.ndarray, channels: int, size: int) -> np.ndarray:
    """How many aligned groups of 4, 8, ..., 128 channels have n set entries: int64 [size + 1], index n."""
    if size > 4:
        return np.bincount(group_sizes(words, channels, size).ravel(), minlength=size + 1)
    octets = words.view(np.uint8)[:, : -(-channels // 8)]
    seen = np.bincount(octets.ravel(), minlength=256)
    values = np.arange(256, dtype=np.uint8)
    counts = np.zeros(size + 1, np.int64)
    np.add.at(counts, np.bitwise_count(values & 15), seen)
    np.add.at(counts, np.bitwise_count(values >> 4), seen)
    if -(-channels // 4) % 2:  # the upper half of the last octet is past the end
        counts[0] -= len(words)
    return counts


def channel_counts(words: np.ndarray, channels: int) -> np.ndarray:
    """In how many rows each channel is set: int64 [K]."""
    counts = np.zeros(channels, np.int64)
    for first in range(0, len(words), 255):  # what uint8 can count
        octets = words[first : first + 255].view(np.uint8)[:, : -(-channels // 8)]
        kept = np.unpackbits(octets, axis=1, count=channels, bitorder="little")
        counts += np.add.reduce(kept, axis=0, dtype=np.uint8)
    return counts


def prefix_counts(words: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Set entries of every row below each of the rising bounds: int32 [rows, bounds], the rows of a bound together."""
    octets = np.ascontiguousarray(words.view(np.uint8).T)
    counts = np.bitwise_count(octets).astype(np.int32)
    below = np.zeros((len(octets) + 1, len(words)), np.int32)
    for index, own in enumerate(counts):  # a third of the time of np.cumsum, which goes down one column at a time
        np.add(below[index], own, out=below[index + 1])
    whole, rest = np.divmod(bounds, 8)
    partial = octets[np.minimum(whole, len(octets) - 1)] & ((1 << rest) - 1).astype(np.uint8)[:, None]
    return (below[whole] + np.bitwise_count(partial)).T

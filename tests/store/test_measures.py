"""Every statistic of a mask against the plain way: loops over single rows, pairs, windows and groups."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teal_cli.store import bits, counting
from teal_cli.store.counting import MaskCounts, Rows
from teal_cli.store.measures import STATISTICS, Mask, Row


@st.composite
def masks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(kept [rows, K], sequence [rows], sizes of the batches that the rows come in)."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=20))
    sequence = np.repeat(np.cumsum(draw(st.lists(st.integers(1, 3), min_size=len(lengths), max_size=len(lengths)))),
                         lengths)  # fmt: skip
    channels = draw(st.integers(1, 300))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    channel = random.random(channels) ** draw(st.sampled_from([0.1, 1.0, 8.0]))  # from nearly all kept to nearly none
    kept = random.random((len(sequence), channels)) < channel
    kept[random.random(len(sequence)) < 0.1] = False
    return kept, sequence, draw(st.lists(st.integers(1, 40), min_size=1))


def measured(kept: np.ndarray, sequence: np.ndarray, sizes: list[int]) -> dict[str, Any]:
    """The statistics, of rows that come in batches of these sizes, over and over, beside those of other masks."""
    rows = Rows.of(sequence.astype(np.uint32), np.arange(len(sequence), dtype=np.uint32))
    masks = np.stack([~kept, kept, np.zeros_like(kept)])
    count = MaskCounts(rows, kept.shape[1], len(masks))
    start = 0
    while start < len(kept):
        for size in sizes:
            count.add(bits.to_words(masks[:, start : start + size]))
            start += size
            if start >= len(kept):
                break
    return Row("s0.50", 0, "q", 0.5, Mask(len(kept), kept.shape[1], count.finish()[1], outputs=10, gbps=2.0)).values()


def share(part: float, whole: float) -> float | None:
    return pytest.approx(part / whole) if whole else None


def rows_of(sequence: np.ndarray) -> list[np.ndarray]:
    """Indices of the rows of each sequence, in order."""
    return [np.flatnonzero(sequence == s) for s in dict.fromkeys(sequence.tolist())]


@settings(max_examples=40, deadline=None)
@given(masks(), st.sampled_from([1, 100, 5000, 1 << 20]))
def test_against_the_plain_way(example: tuple[np.ndarray, np.ndarray, list[int]], batch: int) -> None:
    kept, sequence, sizes = example
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "_BATCH_ENTRIES", batch)
        found = measured(kept, sequence, sizes)
    tokens, channels = kept.shape
    assert (found["tokens"], found["channels"], found["kept"]) == (tokens, channels, kept.sum())
    assert found["density"] == pytest.approx(kept.mean())
    assert found["never"] == pytest.approx((~kept.any(axis=0)).mean())
    assert found["always"] == pytest.approx(kept.all(axis=0).mean())
    assert found["frequency"]["0.25"] == pytest.approx(np.quantile(kept.mean(axis=0), 0.25))
    check_groups(kept, found)
    check_runs(kept, found)
    check_pairs(kept, sequence, found)
    check_windows(kept, sequence, found)
    check_across(kept, sequence, found)
    check_partitions(kept, found)
    check_chance(kept, found)
    for line in found["position"]:
        first = line["from"]
        rows = kept[first : max(2 * first, 1)]  # positions are row indices here
        assert (line["tokens"], line["density"]) == (len(rows), pytest.approx(rows.mean()))
    assert sum(line["tokens"] for line in found["position"]) == tokens
    weight = kept.sum() / tokens * 10 * 2
    assert found["traffic"] == {
        "weight_bytes": pytest.approx(weight),
        "cache_lines": pytest.approx(kept.sum() / tokens),
        "floor_us": pytest.approx(weight / 2e9 * 1e6),
    }


def check_groups(kept: np.ndarray, found: dict[str, Any]) -> None:
    def groups(size: int) -> list[int]:
        return [int(row[i : i + size].sum()) for row in kept for i in range(0, kept.shape[1], size)]

    for name, values in found["nm"].items():
        n, m = map(int, name.split(":"))
        counts = groups(m)
        assert values["fit"] == share(sum(min(count, n) for count in counts), kept.sum()), name
        assert values["conform"] == share(sum(count <= n for count in counts), len(counts)), name
    assert list(found["nm"]) == ["1:4", "2:4", "4:8", "8:16", "16:32"]
    for name, value in found["blocks"].items():
        counts = groups(int(name))
        assert value == share(sum(count > 0 for count in counts), len(counts)), name
    assert list(found["blocks"]) == ["8", "16", "32", "64", "128"]


def check_runs(kept: np.ndarray, found: dict[str, Any]) -> None:
    runs: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    delta = 0
    for row in kept:
        edges = np.flatnonzero(np.diff(row, prepend=~row[:1], append=~row[-1:]))
        for start, stop in itertools.pairwise(edges):
            runs[bool(row[start])][int(stop - start).bit_length() - 1] += 1
        gaps = np.diff(np.flatnonzero(row), prepend=-1)
        delta += sum(2 * (int(gap).bit_length() - 1) + 1 for gap in gaps)
    for name, counts in (("kept", runs[True]), ("dropped", runs[False])):
        assert found["runs"][name] == [counts[k] for k in range(kept.shape[1].bit_length())], name
    p = kept.mean()
    entropy = -sum(x * math.log2(x) for x in (p, 1 - p) if x > 0)
    assert found["bits"] == {
        "bitmap": kept.shape[1],
        "csr": pytest.approx(16 * kept.sum() / len(kept) + 32),
        "delta": pytest.approx(delta / len(kept)),
        "entropy": pytest.approx(kept.shape[1] * entropy),
    }


def check_pairs(kept: np.ndarray, sequence: np.ndarray, found: dict[str, Any]) -> None:
    for d in (1, 2, 4, 8, 16):
        pairs = [(kept[i - d], kept[i]) for i in range(d, len(kept)) if sequence[i] == sequence[i - d]]
        both = sum((a & b).sum() for a, b in pairs)
        assert found["overlap"][str(d)] == share(both, sum(b.sum() for _, b in pairs)), d
        assert found["jaccard"][str(d)] == share(both, sum((a | b).sum() for a, b in pairs)), d


def check_windows(kept: np.ndarray, sequence: np.ndarray, found: dict[str, Any]) -> None:
    for b in (2, 4, 8, 16):
        windows = [kept[rows[i : i + b]] for rows in rows_of(sequence) for i in range(len(rows) - b + 1)]
        unions = [window.any(axis=0).mean() for window in windows]
        assert found["union"][str(b)] == share(sum(unions), len(unions)), b


def check_across(kept: np.ndarray, sequence: np.ndarray, found: dict[str, Any]) -> None:
    sequences = rows_of(sequence)
    for b in (2, 4, 8, 16):
        unions = []
        for first in range(0, len(sequences) - b + 1, b):
            group = sequences[first : first + b]
            steps = zip(*group, strict=False)  # as many as the shortest has
            unions += [kept[list(rows)].any(axis=0).mean() for rows in steps]
        assert found["union_across"][str(b)] == share(sum(unions), len(unions)), b


def check_partitions(kept: np.ndarray, found: dict[str, Any]) -> None:
    channels = kept.shape[1]
    for p in (4, 8, 16, 32, 64):
        ratios = []
        for row in kept[kept.any(axis=1)]:
            parts = [row[channels * i // p : channels * (i + 1) // p].sum() for i in range(p)]
            ratios.append(max(parts) / (row.sum() / p))
        assert found["imbalance"][str(p)] == share(sum(ratios), len(ratios)), p


def check_chance(kept: np.ndarray, found: dict[str, Any]) -> None:
    f = kept.mean(axis=0)
    both = (f * f).sum()
    assert found["chance"]["overlap"] == share(both, f.sum())
    assert found["chance"]["jaccard"] == share(both, (1 - (1 - f) ** 2).sum())
    assert found["chance"]["union"]["4"] == pytest.approx((1 - (1 - f) ** 4).mean())


def test_only_the_first_steps_count_across_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "ACROSS_STEPS", 5)
    kept = np.zeros((40, 9), bool)
    kept[:5, 0] = kept[20:25, 1] = True
    kept[5:20, 2:] = True  # past the first five steps
    found = measured(kept, np.repeat([3, 7], 20), [7])
    assert found["union_across"] == {"2": pytest.approx(2 / 9), "4": None, "8": None, "16": None}


def test_the_keys_of_a_row() -> None:
    found = measured(np.ones((3, 5), bool), np.zeros(3), [3])
    assert list(found) == ["level", "layer", "projection", "target", *STATISTICS]
    assert found["overlap"] == {"1": 1.0, "2": 1.0, "4": None, "8": None, "16": None}

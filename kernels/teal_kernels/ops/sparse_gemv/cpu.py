"""`sparse_gemv` on a CPU through `embedding_bag`, the library kernel that sums chosen rows of a table.

One call per site. A weight [K, N] is viewed, without copying, as a table of K*S rows of N/S entries: row
`i*S + s` holds columns `s*N/S ... (s+1)*N/S` of input `i`. Output slice `s` is then one bag that sums the
rows `i*S + s` of its kept `i`, weighted by `x[i]`. Slices are as wide as a common divisor of the segments
allows, so that each segment may keep different inputs, and at least as many as there are threads, because
PyTorch divides the work among threads by whole bags.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from teal_kernels.ops.threshold.reference import keep_mask


@functools.lru_cache(maxsize=256)
def slices_per_segment(segments: tuple[int, ...], threads: int) -> tuple[int, ...]:
    """How many equally wide slices each segment is cut into, so that there are at least `threads` in all.

    The width is the largest divisor of every segment that gives that many slices.
    """
    common, total = math.gcd(*segments), sum(segments)
    wanted = min(threads, total)
    cuts = (cut for cut in range(1, common + 1) if common % cut == 0)
    width = next(common // cut for cut in cuts if total * cut // common >= wanted)
    return tuple(n // width for n in segments)


def sparse_gemv_cpu(x: Tensor, weight: Tensor, thresholds: Tensor, segments: tuple[int, ...]) -> Tensor:
    """See `sparse_gemv`. Accumulates in float32; bfloat16, float16 and float32."""
    counts = slices_per_segment(segments, torch.get_num_threads())
    slices = sum(counts)
    table = weight.view(weight.shape[0] * slices, weight.shape[1] // slices)
    limits: Sequence[float | Tensor] = list(thresholds) if thresholds.dim() == 2 else thresholds.tolist()
    if thresholds.dim() == 2:
        same = bool((thresholds == thresholds[0]).all())
    else:
        same = all(limit == limits[0] for limit in limits)
    if same:
        limits, counts = limits[:1], (slices,)
    rows: list[Tensor] = []
    scales: list[Tensor] = []
    starts: list[int] = []
    first = filled = 0
    for limit, count in zip(limits, counts, strict=True):
        kept = keep_mask(x, limit).nonzero().squeeze(1)
        rows.append((kept * slices + torch.arange(first, first + count).unsqueeze(1)).view(-1))
        scales.append(x[kept].repeat(count))
        starts.extend(range(filled, filled + count * len(kept), len(kept)) if len(kept) else [filled] * count)
        first, filled = first + count, filled + count * len(kept)
    index, scale = (rows[0], scales[0]) if len(rows) == 1 else (torch.cat(rows), torch.cat(scales))
    bags = embedding_bag(index, table, torch.tensor(starts), mode="sum", per_sample_weights=scale)
    return bags.view(-1)

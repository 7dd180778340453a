"""The choice of the next token within the compiled step: the rule of `teal_kernels.parts.sample.reference`.

Exponentials are this package's, which differ from PyTorch's in the last place: a draw whose random number falls on such
a difference, one in some ten million, takes the neighbouring token.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from teal_kernels.steps.cpu.intrinsics import atomic_add, atomic_load
from teal_kernels.steps.cpu.layout import (
    CHOICE,
    CHOSEN,
    GREEDY,
    MOST_TOKENS,
    NONE,
    NUCLEUS,
    RELEASED,
    ROPE_BYTES,
    STOPS,
    TOP_K,
    WANTED,
)
from teal_kernels.steps.cpu.sync import begin_write, end_write, take_over, wait_a_little
from teal_kernels.steps.cpu.vectors import LOWEST, compiled, exp, largest

BLOCK = 64
"""Logits that are skipped together where all are too small."""

NEVER = np.float32(23.0)
"""Logits that lie this many temperatures under the largest weigh less than 2**-32 and are never drawn."""

HALF, ONE_WEIGHT = np.float32(0.5), np.float32(2.0**32)
_HALF_WORD, _LOW_WORD = np.uint64(32), np.uint64(0xFFFFFFFF)


@compiled
def conclude(shared: Any, step: int, following: int, own: Any) -> bool:
    """After the head of a step, whose number is `step`: the next token is chosen, and its step released, if one is
    wanted. Thread 0 does that, or one that has waited too long for it. `following`: the phase after the head.

    Returns:
        Whether there is a next step.
    """
    control, draw, place, polls = shared.control, shared.draw, np.int64(CHOICE), 0
    while atomic_load(control, place) < 2 * step + 2:
        if own.thread == 0 or own.threads == 1 or take_over(control, np.int64(0), 2 * following, polls):
            chosen = np.int64(-1)
            if draw.numbers[WANTED] != 0:
                chosen = choose(draw, shared.logits, draw.bits[draw.numbers[CHOSEN]], own.candidates)
            if begin_write(control, place, step):
                advance(shared.order, shared.rows, control, draw, chosen)
                end_write(control, place, step)
        polls = wait_a_little(polls)
    return atomic_load(control, RELEASED) > step + 1


@compiled
def advance(order: Any, rows: Any, control: Any, draw: Any, chosen: int) -> None:
    """Notes the chosen token, and releases the step that is fed with it, if one is wanted."""
    numbers = draw.numbers
    if numbers[WANTED] == 0:
        return
    done = numbers[CHOSEN]
    draw.tokens[done] = chosen
    numbers[CHOSEN] = done + 1
    stopped = chosen < 0 or done + 1 == numbers[WANTED]
    for i in range(numbers[STOPS]):
        stopped = stopped or draw.stops[i] == chosen
    if not stopped:
        order[0] = chosen
        order[1] += 1
        order[2] += numbers[ROPE_BYTES]
        order[3] += numbers[ROPE_BYTES]
        for site in range(len(rows)):
            if rows[site, 0] != NONE:
                rows[site, 0] += rows[site, 2]
        atomic_add(control, RELEASED, 1)


@compiled
def choose(draw: Any, logits: Any, bits: Any, room: Any) -> int:
    """The token; -1 where none can be chosen."""
    for logit in logits:
        if logit != logit:
            return -1
    peak, first = largest(logits, len(logits)), 0
    while first < len(logits) and logits[first] != peak:
        first += 1
    if draw.numbers[GREEDY] != 0:
        return first
    if not np.isfinite(peak):
        return -1
    temperature, top_k = draw.temperature[0], draw.numbers[TOP_K]
    lowest = peak - NEVER * temperature
    if 0 < top_k < len(logits):
        lowest = max(lowest, least_of_largest(logits, top_k, room.values))
    count, total = weigh(room, logits, lowest, peak, temperature)
    if draw.numbers[NUCLEUS] != 0:
        lowest = nucleus(room, count, upper_product(draw.bits[MOST_TOKENS], total) + np.uint64(1), peak)
        total = np.uint64(0)
        for i in range(count):
            if room.values[i] >= lowest:
                total += room.weights[i]
    target, through = upper_product(bits, total), np.uint64(0)
    for i in range(count):
        if room.values[i] >= lowest:
            through += room.weights[i]
            if through > target:
                return room.places[i]
    return -1


@compiled
def least_of_largest(logits: Any, top_k: int, heap: Any) -> Any:
    """The smallest of the `top_k` largest logits; heap[:top_k] is overwritten."""
    for i in range(top_k):
        heap[i] = LOWEST
    for block in range(0, len(logits), BLOCK):
        part = logits[block : block + BLOCK]
        if largest(part, len(part)) <= heap[0]:
            continue
        for logit in part:
            if logit > heap[0]:
                sift(heap, top_k, logit)
    return heap[0]


@compiled
def sift(heap: Any, size: int, value: Any) -> None:
    """Replaces the smallest of a heap."""
    at = 0
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = value


@compiled
def weigh(room: Any, logits: Any, lowest: Any, peak: Any, temperature: Any) -> tuple[int, Any]:
    """Lists places, values and weights of the logits from `lowest` on that weigh anything; their number and weight."""
    count, total = 0, np.uint64(0)
    for block in range(0, len(logits), BLOCK):
        part = logits[block : block + BLOCK]
        if largest(part, len(part)) < lowest:
            continue
        for i in range(len(part)):
            if part[i] >= lowest:
                weight = np.uint64(np.int64(exp((part[i] - peak) / temperature) * ONE_WEIGHT))
                room.places[count], room.values[count], room.weights[count] = block + i, part[i], weight
                count, total = count + int(weight > 0), total + weight
    return count, total


@compiled
def nucleus(room: Any, count: int, wanted: Any, peak: Any) -> Any:
    """The largest number from which on the listed values weigh at least `wanted`; halves the interval until no float32
    lies in it."""
    if heavier(room, count, peak, wanted):
        return peak
    low, high = peak, peak
    for i in range(count):
        low = min(low, room.values[i])
    while True:
        middle = low * HALF + high * HALF
        if middle <= low or middle >= high:
            return low
        if heavier(room, count, middle, wanted):
            low = middle
        else:
            high = middle


@compiled
def heavier(room: Any, count: int, least: Any, wanted: Any) -> bool:
    """Whether the listed values from `least` on weigh at least `wanted`."""
    total = np.uint64(0)
    for i in range(count):
        total += room.weights[i] if room.values[i] >= least else np.uint64(0)
    return total >= wanted


@compiled
def upper_product(a: Any, b: Any) -> Any:
    """a * b >> 64, of uint64."""
    a1, a0, b1, b0 = a >> _HALF_WORD, a & _LOW_WORD, b >> _HALF_WORD, b & _LOW_WORD
    middle = (a0 * b0 >> _HALF_WORD) + (a1 * b0 & _LOW_WORD) + (a0 * b1 & _LOW_WORD)
    return a1 * b1 + (a1 * b0 >> _HALF_WORD) + (a0 * b1 >> _HALF_WORD) + (middle >> _HALF_WORD)

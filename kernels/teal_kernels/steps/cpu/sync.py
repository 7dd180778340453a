"""Synchronisation of the threads of a step: barriers inside a step, and the release of members into the next one.

Threads spin, because a barrier comes every few microseconds and waking a thread takes hundreds; a thread that has
waited for long yields its core, and between steps members sleep. All state is in `Shared.control`.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from teal_kernels.steps.cpu.intrinsics import atomic_add, atomic_load, atomic_swap, pause, yield_core
from teal_kernels.steps.cpu.layout import ABANDON, ARRIVALS, DONE, MEMBERS, PARKED, PLACES, RELEASED
from teal_kernels.steps.cpu.vectors import compiled

SPINS = 2000
"""How often a thread polls a barrier before it yields its core: about 50 microseconds."""

PATIENCE, PAUSES = 2000, 32
"""A member polls for the next step PATIENCE times, PAUSES pauses apart: some milliseconds, enough to sample a token."""


@compiled
def barrier(control: Any, threads: int, rounds: int) -> int:
    """Wait until all threads have arrived; returns the number of barriers passed. The count of arrivals only grows, so
    a thread that polls late finds at least the number that it waits for."""
    rounds += 1
    atomic_add(control, ARRIVALS, 1)
    polls = 0
    while atomic_load(control, ARRIVALS) < rounds * threads:
        polls += 1
        if polls < SPINS:
            pause()
        elif atomic_load(control, ABANDON) != 0:
            break
        else:
            yield_core()
    return rounds


@compiled
def await_release(control: Any, thread: int) -> bool:
    """Wait for a step that this member has not done. False: none was released, and the member is marked as asleep."""
    place = MEMBERS + PLACES * thread
    atomic_swap(control, place + PARKED, 0)
    for _ in range(PATIENCE):
        if atomic_load(control, RELEASED) > control[place + DONE]:
            return True
        for _ in range(PAUSES):
            pause()
        yield_core()
    atomic_swap(control, place + PARKED, 1)
    # Either this sees a step released meanwhile, or `release` sees that the member sleeps.
    return atomic_load(control, RELEASED) > control[place + DONE]


@njit(cache=True, error_model="numpy")
def release(control: Any) -> bool:
    """Let all members begin the next step. True: some of them sleep and must be woken."""
    atomic_add(control, RELEASED, 1)
    asleep = False
    for place in range(MEMBERS + PARKED, len(control), PLACES):
        asleep = asleep or atomic_load(control, place) != 0
    return asleep

"""How the threads of a step meet: barriers inside a step, and the release of members into the next one.

Spinning, because a barrier comes every few microseconds and waking a thread takes hundreds; but a thread that has
waited long offers its core to others, and between steps members go to sleep. All of it happens in `Shared.control`.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from teal_kernels.steps.cpu.intrinsics import atomic_add, atomic_load, atomic_swap, give_way, pause
from teal_kernels.steps.cpu.layout import ABANDON, ARRIVALS, DONE, MEMBERS, PARKED, PLACES, RELEASED
from teal_kernels.steps.cpu.vectors import compiled

SPINS = 2000
"""Looks at a barrier before the thread offers its core to others: some 50 microseconds."""

PATIENCE, PAUSES = 2000, 32
"""A member looks for the next step PATIENCE times, PAUSES pauses apart: some milliseconds, enough to sample a token."""


@compiled
def meet(control: Any, threads: int, rounds: int) -> int:
    """A barrier: returns, with the number of barriers passed, when all threads have come. The count of arrivals only
    grows, so that a thread that looks late finds it at its goal or beyond."""
    rounds += 1
    atomic_add(control, ARRIVALS, 1)
    looks = 0
    while atomic_load(control, ARRIVALS) < rounds * threads:
        looks += 1
        if looks < SPINS:
            pause()
        elif atomic_load(control, ABANDON) != 0:
            break
        else:
            give_way()
    return rounds


@compiled
def await_release(control: Any, thread: int) -> bool:
    """Waits for a step that this member has not done. False: none came, and the member counts as asleep."""
    place = MEMBERS + PLACES * thread
    atomic_swap(control, place + PARKED, 0)
    for _ in range(PATIENCE):
        if atomic_load(control, RELEASED) > control[place + DONE]:
            return True
        for _ in range(PAUSES):
            pause()
        give_way()
    atomic_swap(control, place + PARKED, 1)
    # Either this sees a step released meanwhile, or whoever releases it sees that the member sleeps.
    return atomic_load(control, RELEASED) > control[place + DONE]


@njit(cache=True, error_model="numpy")
def release(control: Any) -> bool:
    """Lets all members begin the next step. True: some of them sleep."""
    atomic_add(control, RELEASED, 1)
    asleep = False
    for place in range(MEMBERS + PARKED, len(control), PLACES):
        asleep = asleep or atomic_load(control, place) != 0
    return asleep

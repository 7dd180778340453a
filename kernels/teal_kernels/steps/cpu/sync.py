"""Synchronisation of the threads of a step: parts of phases and who has computed them, and the release of members.

A step is a sequence of phases, five a layer and the head; each is divided into as many parts as there are threads. A
phase begins once all parts of the one before it are done. A thread whose core runs another program would hold up all
others for milliseconds, so they take over its part: everybody computes in memory of his own, and whoever is first
writes the result where all see it. `begin_write` succeeds for one thread only, and only while nobody is further than
this phase, so that what the result was computed from was still in place. A thread that returns and finds the others
further (`is_late`) throws away what it has, and continues at a layer whose residual stream the others have left for it.

The state of a part in phase p is 2p (open), 2p + 1 (being written) or 2p + 2 (done, and open in the next phase).
Threads spin, because a phase takes microseconds and waking a thread takes hundreds; a thread that has waited for long
yields its core, and between steps members sleep. All state is in `Shared.control`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from teal_kernels.steps.cpu.intrinsics import (
    atomic_add,
    atomic_load,
    atomic_replace,
    atomic_swap,
    pause,
    yield_core,
)
from teal_kernels.steps.cpu.layout import (
    ABANDON,
    ABSENT,
    CHOICE,
    DONE,
    MEMBERS,
    PARKED,
    PART,
    PLACES,
    RELEASED,
    STREAM,
    TAKEN,
)
from teal_kernels.steps.cpu.vectors import compiled

SPINS = 2000
"""How often a thread polls for a part of another before it takes it over: about 50 microseconds."""

PATIENCE, PAUSES = 2000, 32
"""A member polls for the next step PATIENCE times, PAUSES pauses apart: some milliseconds, enough to sample a token."""

OVER: Any = np.int64(-1)
"""Instead of a phase: there is none to continue with."""


@compiled
def begin_write(control: Any, place: int, phase: int) -> bool:
    """Whether this thread is the one that writes the result of a phase, which `end_write` must follow."""
    return atomic_replace(control, place, 2 * phase, 2 * phase + 1)


@compiled
def begin_late(control: Any, place: int, phase: int) -> bool:
    """`begin_write` of what not every phase writes: its state may be that of any phase before."""
    before = atomic_load(control, place)
    return before % 2 == 0 and before <= 2 * phase and atomic_replace(control, place, before, 2 * phase + 1)


@compiled
def end_write(control: Any, place: int, phase: int) -> None:
    atomic_swap(control, place, 2 * phase + 2)


@compiled
def is_late(control: Any, place: int, phase: int) -> bool:
    """Whether others are further than a phase, so that what this thread read before this call may be of a later one."""
    return atomic_add(control, place, 0) > 2 * phase + 2


@compiled
def await_state(control: Any, place: int, phase: int) -> None:
    """Wait for another thread that writes a phase."""
    polls = 0
    while atomic_load(control, place) < 2 * phase + 2:
        polls = wait_a_little(polls)


@compiled
def wait_a_little(polls: int) -> int:
    """Pause, or yield the core after SPINS of these; returns polls + 1."""
    if polls < SPINS:
        pause()
    else:
        yield_core()
    return polls + 1


@compiled
def take_over(control: Any, owner: int, mark: int, polls: int) -> bool:
    """Whether this thread, which has polled so often, should do what `owner` has not done: one thread at once where
    that was absent before, any other after SPINS more.

    Args:
        mark: of what is to be done: 2p + 1 for a part of phase p, 2p for the choice before it.
    """
    if polls >= SPINS:
        atomic_swap(control, MEMBERS + PLACES * owner + ABSENT, 1)
    elif atomic_load(control, MEMBERS + PLACES * owner + ABSENT) == 0:
        return False
    taken = MEMBERS + PLACES * owner + TAKEN
    before = atomic_load(control, taken)
    return polls >= 2 * SPINS or (before < mark and atomic_replace(control, taken, before, mark))


@compiled
def note_presence(control: Any, thread: int) -> None:
    """This thread was in time."""
    if atomic_load(control, MEMBERS + PLACES * thread + ABSENT) != 0:
        atomic_swap(control, MEMBERS + PLACES * thread + ABSENT, 0)


@compiled
def leave_stream(control: Any, phase: int, threads: int, hidden: Any, stream: Any) -> None:
    """Leaves the residual stream before a layer, whose first phase this is, for threads that are late, if any."""
    for thread in range(threads):
        if atomic_load(control, MEMBERS + PLACES * thread + ABSENT) != 0:
            if begin_late(control, STREAM, phase):
                for i in range(len(hidden)):
                    stream[i] = hidden[i]
                end_write(control, STREAM, phase)
            return


@compiled
def rejoin(control: Any, thread: int, phase: int, hidden: Any, stream: Any) -> int:
    """After this thread was late in a phase: the phase to continue with, the first one of a layer whose residual stream
    is now in `hidden`; or OVER, if all steps have ended meanwhile or were abandoned."""
    atomic_swap(control, MEMBERS + PLACES * thread + ABSENT, 1)
    polls = 0
    while not is_over(control):
        left = atomic_load(control, STREAM)
        begun = left // 2 - 1
        if left % 2 == 0 and begun >= phase and not is_late(control, MEMBERS + PLACES * thread + PART, begun):
            for i in range(len(hidden)):
                hidden[i] = stream[i]
            if atomic_add(control, STREAM, 0) == left:
                atomic_swap(control, MEMBERS + PLACES * thread + ABSENT, 0)
                return begun
        polls = wait_a_little(polls)
    return OVER


@compiled
def is_over(control: Any) -> bool:
    """Whether the last released step has ended with a choice, or all are abandoned."""
    chosen = atomic_load(control, CHOICE)
    return chosen >= 2 * atomic_load(control, RELEASED) or atomic_load(control, ABANDON) != 0


@compiled
def await_members(control: Any, threads: int) -> None:
    """Wait until all members have noticed that the released steps are over: none uses memory of the caller then."""
    polls = 0
    for thread in range(1, threads):
        while atomic_load(control, MEMBERS + PLACES * thread + DONE) < control[RELEASED]:
            if atomic_load(control, ABANDON) != 0:
                return
            polls = wait_a_little(polls)


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

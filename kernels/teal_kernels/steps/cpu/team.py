"""Python threads that wait for decode steps and run them together.

They release the interpreter's lock while they compute and while they poll for the next step; when none follows for some
milliseconds, they sleep. Neither numba's nor torch's thread pool is involved. This module does not know what a step
computes.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from teal_kernels.steps.cpu.layout import ABANDON, DONE, MEMBERS, PARKED, PLACES, RELEASED


class Team:
    """The calling thread and `size - 1` members.

    Args:
        control: int64 [MEMBERS + PLACES * size], zeros; see `layout.Shared`.
        release: lets members begin a step; returns whether any must be woken (sync.release).
        work: of a thread by its number, see step.run. It must not refer to the owner of this team.
    """

    def __init__(
        self,
        size: int,
        control: NDArray[np.int64],
        release: Callable[[NDArray[np.int64]], bool],
        work: Callable[[int], None],
    ) -> None:
        self.size = size
        self._control, self._release, self._work = control, release, work
        self._begin()

    def _begin(self) -> None:
        """Starts the members, asleep; in a forked process anew, where those of the parent are not."""
        self._process = os.getpid()
        self._reset()
        self._members = [_Member(thread, self._work) for thread in range(1, self.size)]
        self._finalizer = weakref.finalize(self, _dismiss, self._members)

    def run(self) -> None:
        """Runs a step, and those that follow from it, on all threads; returns when all have ended them.

        Ctrl-C is only noticed before or after them. If it arrives between the release of the members and the work of
        this thread, for which they would wait, they abandon the step; its results are then undefined.

        Raises:
            RuntimeError: the team was closed.
        """
        if not self._finalizer.alive:
            raise RuntimeError("the threads of this decode step were ended by close()")
        if self._process != os.getpid():
            self._finalizer.detach()
            self._begin()
        if self._control[ABANDON]:  # a second Ctrl-C interrupted _abandon
            self._abandon()
        try:
            asleep = self._release(self._control)
            for member in self._members if asleep else ():
                if self._control[MEMBERS + PLACES * member.thread + PARKED]:
                    member.wake()
            self._work(0)
        except BaseException:
            self._abandon()
            raise

    def _reset(self) -> None:
        """Nothing was released, and all members sleep."""
        self._control[:] = 0
        self._control[MEMBERS + PLACES + PARKED :: PLACES] = 1

    def close(self) -> None:
        """Ends the threads; also done when the team is no longer referenced."""
        self._finalizer()

    def _abandon(self) -> None:
        control = self._control
        control[ABANDON] = 1
        for member in self._members:
            member.wake()
        # Done is not enough: a member may still poll for the next release, whose count is reset below.
        done, parked = control[MEMBERS + PLACES + DONE :: PLACES], control[MEMBERS + PLACES + PARKED :: PLACES]
        while (done != control[RELEASED]).any() or not parked.all():
            time.sleep(0.001)
        self._reset()


class _Member:
    """One waiting thread."""

    def __init__(self, thread: int, work: Callable[[int], None]) -> None:
        self.thread = thread
        self._work = work
        self._calls: SimpleQueue[bool] = SimpleQueue()
        self._python_thread = threading.Thread(target=self._serve, name=f"teal-step-{thread}", daemon=True)
        self._python_thread.start()

    def wake(self) -> None:
        """Ends its sleep; one that is not asleep polls once more before it sleeps."""
        self._calls.put(True)

    def stop(self) -> None:
        """Ends the thread and waits for that: one that still runs when the interpreter ends would abort the process."""
        self._calls.put(False)
        if threading.current_thread() is not self._python_thread:
            self._python_thread.join()

    def _serve(self) -> None:
        while self._calls.get():
            self._work(self.thread)


def _dismiss(members: list[_Member]) -> None:
    for member in members:
        member.stop()

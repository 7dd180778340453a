"""Threads that wait for a decode step and run it together.

Plain Python threads that sleep on a lock between steps and leave the interpreter's lock while they compute:
nothing spins when nothing is decoded, and neither numba's nor torch's thread pool is involved. Within a step
they meet at barriers of their own (step.meet). This module does not know what a step computes.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

import numpy as np

from teal_kernels.cpu_step.layout import ABANDON


class Team:
    """`size` threads, the calling one included.

    Attributes:
        arrivals: int64 [16], the barrier's memory; see `layout.Shared`.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.arrivals = np.zeros(16, np.int64)
        self._members = [_Member(thread) for thread in range(1, size)]
        self._finalizer = weakref.finalize(self, _dismiss, self._members)

    def run(self, part: Callable[[int, int], None]) -> None:
        """Calls part(thread, barriers passed so far) on every thread; it must end with a barrier of all."""
        if self.arrivals[ABANDON]:
            self._recover()
        rounds = int(self.arrivals[0]) // self.size
        try:
            for member in self._members:
                member.start(part, rounds)
            part(0, rounds)
        except BaseException:
            self.arrivals[ABANDON] = 1  # Ctrl-C before this thread began: the others would wait for it forever
            raise

    def close(self) -> None:
        """Ends the threads; also done when the team is no longer referenced."""
        self._finalizer()

    def _recover(self) -> None:
        while any(member.busy for member in self._members):
            time.sleep(0.001)
        self.arrivals[:] = 0


class _Member:
    """One waiting thread."""

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self._started = self._finished = 0
        self._call: tuple[Callable[[int, int], None], int] | None = None
        self._go = threading.Lock()
        self._go.acquire()
        self._python_thread = threading.Thread(target=self._serve, name=f"teal-step-{thread}", daemon=True)
        self._python_thread.start()

    @property
    def busy(self) -> bool:
        """Whether it has yet to finish a call. Two counts, since it may be slow to note the end of the call before."""
        return self._started != self._finished

    def start(self, part: Callable[[int, int], None], rounds: int) -> None:
        self._call = part, rounds
        self._started += 1
        self._go.release()

    def stop(self) -> None:
        """Ends the thread and waits for that: one that still runs when the interpreter ends would abort the process."""
        self._go.release()
        if threading.current_thread() is not self._python_thread:
            self._python_thread.join()

    def _serve(self) -> None:
        while True:
            self._go.acquire()
            # The call leads to the owner of this team; held on to while asleep, it would keep both alive.
            call, self._call = self._call, None
            if call is None:
                return
            part, rounds = call
            try:
                part(self._thread, rounds)
            finally:
                self._finished += 1
            del call, part


def _dismiss(members: list[_Member]) -> None:
    for member in members:
        member.stop()

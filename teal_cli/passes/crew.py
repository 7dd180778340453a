"""Threads that each run whole sequences through a layer: on a few cores quicker than sharing out every operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

_T = TypeVar("_T")


class Crew:
    """As many threads as PyTorch uses on this CPU, in each of which PyTorch uses that one alone.

    So a sequence gives the same bits whatever others run beside it, and however many threads there are.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool = ThreadPoolExecutor(size, "teal-pass", initializer=_alone)
        for ready in [self._pool.submit(torch.get_num_threads) for _ in range(size)]:
            ready.result()
        torch.set_num_threads(size)  # threads that begin later take what was set last

    def each(self, work: Callable[..., _T], *arguments: Iterable[object]) -> Iterator[_T]:
        """As `map`; an exception is raised where its result would have come, once nothing runs any more."""
        running = [self._pool.submit(work, *each) for each in zip(*arguments, strict=True)]
        for future in running:
            future.exception()
        return iter([future.result() for future in running])


def _alone() -> None:
    torch.set_num_threads(1)


@cache
def _crew_of(size: int) -> Crew:
    return Crew(size)


def crew(device: torch.device) -> Crew | None:
    """The threads of this process; None on a GPU, which runs one thing at a time."""
    return _crew_of(torch.get_num_threads()) if device.type == "cpu" else None

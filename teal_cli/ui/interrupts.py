"""Ctrl-C: as a wish, for work in short steps that should end between two of them; and with word of what is left."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def when_stopped(say: Callable[[str], None], left: str) -> Iterator[None]:
    """Where Ctrl-C ends the block, say what is left and how to go on; it ends the block all the same."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped; {left}")
        raise


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C only makes the function that is given return True; a second one breaks in."""
    before = signal.getsignal(signal.SIGINT)
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    if before != signal.default_int_handler:  # ignored, as in a job in the background, or somebody else's
        yield lambda: False
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)

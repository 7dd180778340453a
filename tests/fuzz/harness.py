"""One case of fuzzing: a sound object, a seeded mutation, and everything that teal does with it.

A case fails on an exception that is no TealError, on a call of more than 10 s of processor time or two minutes, on 2 GB
more memory, on a write outside the case's own folder, and on whatever the area itself finds, such as rows that differ
without an error.
"""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fuzz.mutations import mutate

SECONDS, WALL_SECONDS, KILOBYTES = 10, 120, 2 << 20


class TooLong(BaseException):
    """A call that does not come back; no `except Exception` holds it up."""


@dataclass(frozen=True)
class Area:
    """A kind of object.

    Attributes:
        name: for people.
        make: builds a sound object in a folder that does not exist.
        use: does with a damaged one what users do, given its folder, a folder to write to, and chance; raises
            AssertionError for what must not be. A TealError is an answer; everything else is a failure.
        damage: changes it; by default one file of it.
        weight: how many of its cases are tried for each of the others'.
    """

    name: str
    make: Callable[[Path], None]
    use: Callable[[Path, Path, random.Random], None]
    damage: Callable[[Path, random.Random], str] = mutate
    weight: int = 1


@dataclass(frozen=True)
class Failure:
    """A case that failed: `python -m tests.fuzz --area AREA --seed SEED` runs it again."""

    area: str
    seed: int
    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.area}, seed {self.seed}: {self.what}\n{self.why}"


def run_case(area: Area, sound: Path, seed: int) -> Failure | None:
    """One case: a copy of the sound object is damaged and used."""
    from teal_cli.errors import TealError

    chance = random.Random(f"{area.name} {seed}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "case")
        shutil.copytree(sound, folder / "object", symlinks=True)
        (folder / "out").mkdir()
        what = area.damage(folder / "object", chance)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        why = ""
        try:
            with _deadline():
                area.use(folder / "object", folder / "out", chance)
        except TealError:
            pass
        except TooLong:
            why = f"more than {SECONDS} s of processor time, or {WALL_SECONDS} s"
        except Exception:
            why = traceback.format_exc(limit=-6)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > KILOBYTES:
            why += "\nmore than 2 GB of memory"
        if strangers := {entry.name for entry in Path(name).iterdir()} - {"case"}:
            why += f"\nwrote {strangers} outside its folder"
        if strangers := {entry.name for entry in folder.iterdir()} - {"object", "out"}:
            why += f"\nwrote {strangers} beside its folder"
    return Failure(area.name, seed, what, why) if why else None


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TooLong

    # Processor time, since a machine may be busy; and the clock, since a call may wait for what never comes.
    old = [signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), old, strict=True):
            signal.signal(number, handler)

"""`python -m tests.fuzz.kills --runs N --model NAME`: end `teal dump` at random moments, and go on with --resume.

A dump is ended by SIGKILL, SIGTERM and SIGINT in turn, while it decodes, commits, or opens its store, and resumed
until it is complete; then another one is begun, until N runs were ended. After each end the store must verify and hold
every committed block; each that is complete must equal, byte for byte, the store of a run that nobody ended. Exits 1 if
not.

Every run is a process of its own, forked from one that has imported everything and computed nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"

from fixtures_store import digest

from teal_cli.app import main as teal
from teal_cli.runs import dump
from teal_cli.store.header import StoreHeader
from teal_cli.store.reader import open_store
from teal_cli.store.verify import Problem, verify
from teal_cli.store.writer import StoreWriter

SIGNALS: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS: Final = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 130}
BLOCK: Final = 16
"""Tokens of a block: commits come often, as they do with a large model."""
PATIENCE: Final = 300.0


@dataclass
class Child:
    """`teal ARGUMENTS` in a forked process.

    Attributes:
        opens: readable once the store is about to be made or opened, and at the end of the process.
        said: the file that has its standard error.
        code: exit code, negative for a signal; None while it runs.
    """

    pid: int
    opens: int
    said: Path
    code: int | None = None

    @classmethod
    def start(cls, said: Path, *arguments: object) -> Child:
        """Forks; the child never comes back from here."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writer)
            return cls(pid, reader, said)
        code = 70
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a child of a job in the background
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            _announce(writer)
            code = teal([str(argument) for argument in arguments])
        finally:
            os._exit(code)

    def wait_opening(self) -> None:
        """Waits until it opens the store, or is over."""
        select.select([self.opens], [], [], PATIENCE)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code; it must come in time."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                os.close(self.opens)
            elif time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"a run had not ended after {seconds:.0f} s")
            else:
                time.sleep(0.005)
        return self.code


def _announce(pipe: int) -> None:
    """Small blocks, and a byte into a pipe when a store is made or opened."""

    def header(*arguments: Any, **options: Any) -> StoreHeader:
        return StoreHeader(*arguments, **options, block_tokens=BLOCK)

    def telling(open_writer: Callable[..., StoreWriter]) -> Callable[..., StoreWriter]:
        def told(*arguments: Any, **options: Any) -> StoreWriter:
            os.write(pipe, b".")
            return open_writer(*arguments, **options)

        return told

    dump.StoreHeader = header  # type: ignore[assignment,misc]
    for name in ("create", "resume"):
        setattr(StoreWriter, name, staticmethod(telling(getattr(StoreWriter, name))))


@dataclass
class Result:
    """What came of it: runs ended by each signal, stores that became whole, and what was wrong."""

    ended: Counter[str] = field(default_factory=Counter)
    stores: int = 0
    wrong: list[str] = field(default_factory=list)


def end_runs(options: list[object], folder: Path, runs: int, seed: int) -> Iterator[Result]:
    """Ends runs of `teal dump OPTIONS`; the same Result after each.

    Args:
        options: of a dump, but its output.
        folder: to work in.
        seed: of the moments.
    """
    whole, broken, said = folder / "whole.zarr", folder / "broken.zarr", folder / "stderr"
    child = Child.start(said, "dump", *options, "-q", "-o", whole)
    child.wait_opening()
    opened = time.monotonic()
    assert child.wait() == 0, said.read_text()
    span = time.monotonic() - opened
    expected, chance, result = digest(whole), random.Random(seed), Result()
    while result.ended.total() < runs or broken.exists():
        number = SIGNALS[result.ended.total() % len(SIGNALS)]
        more = ["--resume"] if broken.exists() else []
        before = committed(broken) if more else {}
        child = Child.start(said, "dump", *options, "-q", "-o", broken, *more)
        if result.ended.total() < runs:
            child.wait_opening()
            time.sleep(chance.uniform(0, span / 4))
            os.kill(child.pid, number)
        code = child.wait()
        if code == 0:
            result.stores += 1
            if digest(broken) != expected:
                result.wrong.append("a store that was resumed is not the one of a run that nobody ended")
            shutil.rmtree(broken)
        elif code != ENDS[number]:
            result.wrong.append(f"{signal.Signals(number).name}: exit code {code}: {said.read_text()}")
            return
        else:
            result.ended[signal.Signals(number).name] += 1
            result.wrong += [f"{signal.Signals(number).name}: {text}" for text in damage(broken, before)]
        yield result


def committed(store: Path) -> dict[str, int]:
    """Level -> tokens that are committed."""
    opened = open_store(store)
    return {name: len(opened.level(name)) for name in opened.levels}


def damage(store: Path, before: dict[str, int]) -> list[str]:
    """What is wrong with a store whose run was ended; `before` is what was committed when the run began."""
    if not store.exists():
        return ["the store is gone"] if before else []
    wrong = [str(event) for event in verify(store, allow_incomplete=True) if isinstance(event, Problem)]
    now = committed(store)
    return wrong + [
        f"{name} had {count} tokens and has {now[name]}"
        for name, count in before.items()
        if now[name] < count // BLOCK * BLOCK
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--model", required=True, help="a calibrated model of $TEAL_HOME")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--tokens", type=int, default=60, help="of each of three prompts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result = Result()
    with tempfile.TemporaryDirectory() as name:
        prompts = Path(name, "prompts.txt")
        prompts.write_text("The quick brown fox\ndef keep(x, t):\nSparse activations\n")
        options = [
            "-m",
            arguments.model,
            "--backend",
            arguments.backend,
            "-s",
            "0.5,0.9",
            "--prompts",
            prompts,
            "--max-new-tokens",
            arguments.tokens,
        ]
        for result in end_runs([*options, "--ignore-eos", "--seed", 1], Path(name), arguments.runs, arguments.seed):
            sys.stderr.write(f"\r{result.ended.total()} runs, {result.stores} stores, {len(result.wrong)} failures")
    ended = ", ".join(f"{name} {count}" for name, count in sorted(result.ended.items()))
    sys.stdout.write(f"{ended}; {result.stores} stores became whole; {len(result.wrong)} failures\n")
    sys.stdout.writelines(f"{text}\n" for text in result.wrong)
    return 1 if result.wrong or result.ended.total() < arguments.runs else 0


if __name__ == "__main__":
    sys.exit(main())

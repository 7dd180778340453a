"""What the ranks of a job tell each other: counters and short texts in the job's own TCPStore.

torchrun's agent keeps that store, so it outlives ranks that are restarted; keys have the number of the attempt in them.
No process group is made: ranks never wait for each other's tensors.
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Protocol

from teal_cli.errors import TealError, UsageError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_POLL: Final = timedelta(seconds=2)
_MEET: Final = timedelta(minutes=5)
_FAILED: Final = "failed"


class Board(Protocol):
    """What ranks share.

    Attributes:
        rank, size: of this process, and how many there are.
        attempt: how often the job has been restarted.
    """

    rank: int
    size: int
    attempt: int

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which begins at 0, and return what it is now."""
        ...

    def put(self, key: str, text: str) -> None:
        """Write a text for all to read."""
        ...

    def get(self, key: str) -> str:
        """A text, once somebody has written it.

        Raises:
            TealError: another rank has failed, or the store cannot be reached any more.
        """
        ...


class LocalBoard:
    """The board of a process that is alone."""

    rank, size, attempt = 0, 1, 0

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._texts: dict[str, str] = {}

    def add(self, key: str, amount: int) -> int:
        self._counts[key] = self._counts.get(key, 0) + amount
        return self._counts[key]

    def put(self, key: str, text: str) -> None:
        self._texts[key] = text

    def get(self, key: str) -> str:
        return self._texts[key]


class StoreBoard:
    """The board of one of several ranks, over a store of torch.distributed."""

    def __init__(self, store: Store, rank: int, size: int, attempt: int = 0) -> None:
        from torch._C._distributed_c10d import PrefixStore

        self._store = PrefixStore(f"teal/{attempt}", store)
        self.rank, self.size, self.attempt = rank, size, attempt

    def add(self, key: str, amount: int) -> int:
        try:
            return int(self._store.add(key, amount))
        except RuntimeError as error:
            raise _lost(error) from error

    def put(self, key: str, text: str) -> None:
        try:
            self._store.set(key, text)
        except RuntimeError as error:
            raise _lost(error) from error

    def get(self, key: str) -> str:
        from torch.distributed import DistNetworkError

        while True:
            try:
                self._store.wait([key], _POLL)
                return bytes(self._store.get(key)).decode()
            except DistNetworkError as error:
                raise _lost(error) from error
            except RuntimeError as error:  # not there yet
                self._check(error)

    def _check(self, cause: RuntimeError) -> None:
        try:
            if self._store.check([_FAILED]):
                raise TealError(bytes(self._store.get(_FAILED)).decode()) from cause
        except RuntimeError as error:
            raise _lost(error) from error


def _lost(error: RuntimeError) -> TealError:
    return TealError(
        f"the other ranks cannot be reached any more: {str(error).splitlines()[0][:200]}",
        hint="what is committed stays: run the same command with --resume, with any number of ranks",
    )


def report_failure(board: Board, error: BaseException) -> None:
    """Let ranks that wait know that this one has failed."""
    with suppress(TealError):  # those that cannot be reached have noticed
        board.put(_FAILED, f"rank {board.rank} failed: {error}")


def rank_of_job() -> int:
    """This process's rank, 0 where it is alone; reads the environment only."""
    found = os.environ.get("RANK", "0")
    return int(found) if found.isdigit() else 0


def open_board() -> Board:
    """The board of the job that torchrun started this process for; alone, that of one process.

    Raises:
        UsageError: the variables that torchrun sets are not all there, or not numbers.
        TealError: the other ranks cannot be reached.
    """
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if not os.environ.get(name)]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        return LocalBoard()
    hint = "start ranks with `torchrun --nproc-per-node N -m teal_cli dump ...`, or unset RANK and WORLD_SIZE"
    if missing:
        raise UsageError(f"this is a rank of a job, but {' and '.join(missing)} is not set", hint=hint)
    if not all(os.environ[name].isdigit() for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")):
        raise UsageError("RANK, WORLD_SIZE and MASTER_PORT must be numbers", hint=hint)
    if int(os.environ["WORLD_SIZE"]) == 1:
        return LocalBoard()
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=_MEET))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TealError(f"the ranks do not meet at {where}: {str(error).splitlines()[0][:200]}", hint=hint) from error
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return StoreBoard(store, rank, size, int(restarts) if restarts.isdigit() else 0)

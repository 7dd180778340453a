"""A disk that refuses, at twenty moments each: the writer says so, and the store ends whole and equal."""

from __future__ import annotations

import errno
import io
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from fixtures_cli import Teal
from fixtures_store import digest, feed, header, levels

from teal_cli import open_store
from teal_cli.errors import TealError
from teal_cli.store.verify import Problem, verify
from teal_cli.store.writer import StoreWriter

TOKENS = 40
POINTS = 20


def write(path: Path) -> None:
    """The whole store, or what is missing of it."""
    made = levels(TOKENS, (0.5,))
    kind = StoreWriter.resume if path.exists() else StoreWriter.create
    with kind(path, header(), made) as writer:
        feed(writer.level(0.5), TOKENS)
        writer.level(0.5).finish()
        writer.complete()


@contextmanager
def refusing(number: int, at: int) -> Iterator[list[str]]:
    """Every file opened for writing from the one with index `at` on is refused with errno `number`."""
    opened: list[str] = []
    sound = io.open

    def open_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wxa+"):
            opened.append(str(file))
            if len(opened) > at:
                raise OSError(number, os.strerror(number), str(file))
        return sound(file, mode, *arguments, **options)

    with mock.patch.object(io, "open", open_file):
        yield opened


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("whole") / "out.zarr"
    write(path)
    return dict(digest(path))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
def test_a_disk_that_refuses(tmp_path: Path, whole: dict[str, str], number: int) -> None:
    with refusing(number, 10**9) as opened:
        write(tmp_path / "counted.zarr")
    for at in np.linspace(0, len(opened) - 1, POINTS, dtype=int):
        path = tmp_path / f"{at}.zarr"
        with refusing(number, at), pytest.raises(TealError) as caught:
            write(path)
        assert caught.value.hint
        if path.exists():
            assert [event for event in verify(path, allow_incomplete=True) if isinstance(event, Problem)] == []
        write(path)
        assert digest(path) == whole
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_disk_that_refuses_a_run_that_goes_on(tmp_path: Path, whole: dict[str, str]) -> None:
    for at in range(POINTS):
        path = tmp_path / f"{at}.zarr"
        with StoreWriter.create(path, header(), levels(TOKENS, (0.5,))) as writer:
            feed(writer.level(0.5), 21)
        with refusing(errno.ENOSPC, at), pytest.raises(TealError):
            write(path)
        write(path)
        assert digest(path) == whole


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Lets this process open no more files."""
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_descriptors_left(tmp_path: Path, teal: Teal, whole: dict[str, str]) -> None:
    path = tmp_path / "out.zarr"
    with pytest.raises(TealError, match="Too many open files") as caught:
        with StoreWriter.create(path, header(), levels(TOKENS, (0.5,))) as writer:
            feed(writer.level(0.5), 21)
            writer.level(0.5).flush()
            with no_descriptors():
                feed(writer.level(0.5), TOKENS)
                writer.level(0.5).finish()
    assert "ulimit -n" in str(caught.value.hint)
    with no_descriptors():
        run = teal("store", "info", path)
    assert run.code in (1, 2)
    assert "Traceback" not in run.err
    assert len(open_store(path).level(0.5)) >= 21
    write(path)
    assert digest(path) == whole

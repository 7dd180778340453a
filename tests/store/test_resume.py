"""Killed, interrupted, full, locked, replaced: a store is never worse than its last commit."""

from __future__ import annotations

import errno
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from fixtures_store import dense, digest, feed, header, levels, spawn, write_store

from teal_cli import open_store
from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.store import layout, shards
from teal_cli.store.verify import Problem, verify
from teal_cli.store.writer import StoreWriter


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("whole") / "out.zarr"
    write_store(path)
    return dict(digest(path))


@pytest.mark.parametrize("seed", range(3))
def test_killed_and_resumed_is_the_same_store(tmp_path: Path, uninterrupted: dict[str, str], seed: int) -> None:
    path = tmp_path / "out.zarr"
    moments = random.Random(seed)
    process = spawn(path, "--pause", "0.001")
    time.sleep(moments.uniform(0.0, 0.4))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    committed = {name: len(open_store(path).level(name)) for name in open_store(path).levels}
    assert [event for event in verify(path, allow_incomplete=True) if isinstance(event, Problem)] == []

    made = levels()
    with StoreWriter.resume(path, header(), made) as writer:
        for level in made:
            opened = writer.level(level.name)
            assert opened.committed <= committed[level.name]
            assert opened.complete or opened.committed % 16 == 0
            feed(opened, 100)
            opened.finish()
        writer.complete()
    assert digest(path) == uninterrupted


def test_resuming_after_an_interruption_floors_to_a_block(tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    path = tmp_path / "out.zarr"
    with pytest.raises(KeyboardInterrupt), StoreWriter.create(path, header(), levels()) as writer:
        feed(writer.level(0.5), 37)
        raise KeyboardInterrupt
    (path / "s0.50/mlp_in/mask/c/0/3").mkdir(parents=True)
    (path / "s0.50/mlp_in/mask/c/0/3/0.abc.partial").write_bytes(b"half")
    with StoreWriter.resume(path, header(), levels()) as writer:
        level = writer.level(0.5)
        assert (level.committed, level.rows) == (32, 32)
        assert level.committed_tokens()["position"].tolist() == [5 + token % 7 for token in range(32)]
        assert not list(path.rglob("*.partial"))
        assert len(open_store(path).level(0.5)) == 32
        for target in (0.5, 0.9):
            feed(writer.level(target), 100)
            writer.level(target).finish()
        writer.complete()
    assert digest(path) == uninterrupted


def test_resuming_a_complete_store_changes_nothing(tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    path = tmp_path / "out.zarr"
    write_store(path)
    with StoreWriter.resume(path, header(), levels()) as writer:
        assert all(writer.level(target).complete for target in (0.5, 0.9))
        writer.complete()
    assert digest(path) == uninterrupted


def test_resuming_with_other_settings_names_them(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    write_store(path, 20)
    before = digest(path)
    other = levels(20)
    other[1].thresholds[2, 3] += 1e-6
    for wrong_header, wrong_levels, names in (
        (header(seed=1, model="else"), levels(20), "model, seed"),
        (header(config_sha256="1" * 64), levels(20), "config_sha256"),
        (header(), levels(21), r"s0\.50 max_tokens, s0\.90 max_tokens"),
        (header(), other, r"s0\.90 thresholds"),
        (header(), levels(20)[:1], "levels"),
    ):
        with pytest.raises(UsageError, match=f"what differs: {names}") as caught:
            StoreWriter.resume(path, wrong_header, wrong_levels)
        assert caught.value.hint
    assert digest(path) == before
    with pytest.raises(NotFoundError):
        StoreWriter.resume(tmp_path / "nothing", header(), levels())


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    with StoreWriter.create(path, header(), levels()):
        for again in (
            lambda: StoreWriter.resume(path, header(), levels()),
            lambda: StoreWriter.create(path, header(), levels(), force=True),
        ):
            with pytest.raises(UsageError, match="another process is writing"):
                again()
    with StoreWriter.resume(path, header(), levels()):
        pass


def test_occupied_output(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    write_store(path, 20)
    before = digest(path)
    with pytest.raises(UsageError, match="exists") as caught:
        StoreWriter.create(path, header(), levels())
    assert "--resume" in str(caught.value.hint)
    with pytest.raises(UsageError, match="twice"):
        StoreWriter.create(path, header(), levels() + levels(), force=True)
    assert digest(path) == before

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter").write_text("years of work")
    with pytest.raises(UsageError, match="not a teal store"):
        StoreWriter.create(other, header(), levels(), force=True)
    assert (other / "chapter").read_text() == "years of work"

    with StoreWriter.create(path, header(), levels(), force=True):
        assert len(open_store(path).level(0.5)) == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.zarr", "thesis"]


def test_force_keeps_the_old_store_if_the_new_one_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.zarr"
    write_store(path, 20)
    before = digest(path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(layout, "create_level", full)
    with pytest.raises(TealError, match=r"No space left on device; [\d,]+ MB are free"):
        StoreWriter.create(path, header(), levels(), force=True)
    assert digest(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.zarr"]


def test_full_disk_leaves_a_store_that_resumes(tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    """A limit on the size of files stands in for the disk: the kernel refuses with EFBIG just as with ENOSPC."""
    path = tmp_path / "out.zarr"
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(TealError, match=r"refused more data .* MB are free") as caught:
            with StoreWriter.create(path, header(), levels()) as writer:
                feed(writer.level(0.5), 35)
                writer.level(0.5).flush()
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
                feed(writer.level(0.5), 100)
                writer.level(0.5).finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "--resume" in str(caught.value.hint)
    seen = open_store(path).level(0.5)
    assert len(seen) == 35
    np.testing.assert_array_equal(seen.site(0, "mlp_mid")[:], dense(levels()[0], "mlp_mid", 0, 35))
    with StoreWriter.resume(path, header(), levels()) as writer:
        for target in (0.5, 0.9):
            feed(writer.level(target), 100)
            writer.level(target).finish()
        writer.complete()
    assert digest(path) == uninterrupted


@pytest.mark.parametrize("leave", ["by an exception", "quietly"])
def test_nothing_is_committed_after_a_block_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave: str
) -> None:
    path = tmp_path / "out.zarr"
    calls = 0
    replace = shards._replace

    def fails_once(*arguments: object, **options: bool) -> None:
        nonlocal calls
        calls += 1
        if calls == 18:  # in the second block
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "_replace", fails_once)
    with pytest.raises(TealError, match="No space left"), StoreWriter.create(path, header(), levels()) as writer:
        feed(writer.level(0.5), 40 if leave == "quietly" else 100)
    assert len(open_store(path).level(0.5)) == 16


def test_no_lock_is_left_by_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    process = spawn(path, "--pause", "0.05")
    with pytest.raises(UsageError, match="another process"):
        StoreWriter.resume(path, header(), levels())
    process.kill()
    process.communicate()
    with StoreWriter.resume(path, header(), levels()):
        pass
    shutil.rmtree(path)

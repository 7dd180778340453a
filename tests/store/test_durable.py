"""`durable`: whatever moment the power goes, the disk has every commit. The disk is played by what was synced."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fixtures_store import digest, feed, header, levels, write_store

from teal_cli import open_store
from teal_cli.store import layout
from teal_cli.store.verify import Problem, verify
from teal_cli.store.writer import StoreWriter


@dataclass
class Disk:
    """What a disk has for certain: the bytes of files, and the names in folders, as of their last fsync.

    Attributes:
        names_at_once: the disk has every name as soon as it is given, as a file system may that writes names first.
    """

    names_at_once: bool
    bytes_of: dict[int, bytes] = field(default_factory=dict)
    names_in: dict[int, dict[str, int]] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)

    def sync(self, descriptor: int) -> None:
        """Stands for os.fsync."""
        self.held.append(os.dup(descriptor))  # so that no later file gets its inode
        found = os.fstat(descriptor)
        place = f"/proc/self/fd/{descriptor}"
        if stat.S_ISDIR(found.st_mode):
            self.names_in[found.st_ino] = {entry.name: entry.inode() for entry in os.scandir(place)}
        else:
            self.bytes_of[found.st_ino] = Path(place).read_bytes()

    def close(self) -> None:
        """Lets the inodes go."""
        for descriptor in self.held:
            os.close(descriptor)

    def after_power_loss(self, folder: Path, target: Path, inode: int | None = None) -> None:
        """Writes to `target` what the disk has of a folder."""
        target.mkdir()
        names = self.names_in.get(inode or folder.stat().st_ino, {})
        if self.names_at_once:
            names = {entry.name: entry.inode() for entry in os.scandir(folder)}
        for name, number in names.items():
            if number in self.names_in or (folder / name).is_dir():
                self.after_power_loss(folder / name, target / name, number)
            else:
                (target / name).write_bytes(self.bytes_of.get(number, b""))


@pytest.mark.parametrize("names_at_once", [False, True])
def test_no_loss_of_power_costs_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names_at_once: bool) -> None:
    store, disk, chance = tmp_path / "out.zarr", Disk(names_at_once), random.Random(0)
    promised: dict[str, int] = {}
    set_attributes = layout.set_attributes
    losses = itertools.count()

    def promise(path: Path, group: str, changes: dict[str, Any], *, sync: bool) -> None:
        if not group:  # the store itself
            return set_attributes(path, group, changes, sync=sync)
        tokens = changes.get("tokens_committed", promised.get(group, 0))
        promised[group] = min(tokens, promised.get(group, 0))  # a resumed run takes rows back
        set_attributes(path, group, changes, sync=sync)
        promised[group] = tokens
        return None

    def sync(descriptor: int) -> None:
        disk.sync(descriptor)
        # Zarr's own writes come from its event loop, where no store can be read.
        if promised and asyncio._get_running_loop() is None and chance.random() < 0.05:
            lost = tmp_path / f"lost-{next(losses)}"
            disk.after_power_loss(store, lost)
            assert [event for event in verify(lost, allow_incomplete=True) if isinstance(event, Problem)] == []
            for name, count in promised.items():
                assert len(open_store(lost).level(name)) >= count
            shutil.rmtree(lost)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(layout, "set_attributes", promise)
    try:
        with StoreWriter.create(store, header(), levels(), durable=True) as writer:
            feed(writer.level(0.5), 21)
        with StoreWriter.resume(store, header(), levels(), durable=True) as writer:
            for target in (0.5, 0.9):
                feed(writer.level(target), 40)
                writer.level(target).finish()
            writer.complete()
        disk.after_power_loss(store, tmp_path / "last")
    finally:
        disk.close()
    assert next(losses) > 5
    assert digest(tmp_path / "last") == digest(store)


def test_without_it_nothing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: int) -> None:
        raise AssertionError("fsync")

    monkeypatch.setattr(os, "fsync", never)
    write_store(tmp_path / "out.zarr", 20)

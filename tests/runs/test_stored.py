"""A store knows its own run: what `--resume` with nothing else goes on with, and what `--like` repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
from fixtures_cli import Teal
from fixtures_store import digest

from teal_cli import open_store
from teal_cli.store.writer import LevelWriter

pytestmark = pytest.mark.usefixtures("ready")
SMALL = ("-s", "0.5,0.9", "-d", "python-docs", "-n", 2, "--prompt-tokens", 8, "--max-new-tokens", 9, "--ignore-eos",
         "--temperature", 0.7, "--seed", 5, "--dtype", "bfloat16", "--backend", "reference")  # fmt: skip


def stopped_after(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once that many rows are written."""
    add, count = LevelWriter.add, 0

    def counted(self: LevelWriter, *told: Any, **columns: float) -> None:
        nonlocal count
        add(self, *told, **columns)
        count += 1
        if count == rows:
            raise KeyboardInterrupt

    monkeypatch.setattr(LevelWriter, "add", counted)


def test_resume_needs_nothing_else(teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole.zarr", tmp_path / "broken.zarr"
    assert teal("dump", *SMALL, "-o", whole).code == 0
    with monkeypatch.context() as patch:
        stopped_after(20, patch)
        stopped = teal("dump", *SMALL, "-o", broken)
    assert stopped.code == 130
    assert f"teal dump --resume -o {broken}" in " ".join(stopped.err.split())
    resumed = teal("dump", "--resume", "-o", broken)
    assert resumed.code == 0, resumed.err
    assert digest(broken) == digest(whole)
    assert open_store(whole).state.digest


def test_like_repeats_a_run_and_gives_the_same_digest(teal: Teal, tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("first.zarr", "again.zarr", "other.zarr"))
    assert teal("dump", *SMALL, "-o", first).code == 0
    assert teal("dump", "--like", first, "-o", again).code == 0
    assert open_store(again).state.digest == open_store(first).state.digest
    assert open_store(first).state.digest in teal("store", "info", first).out
    assert teal("dump", "--like", first, "-s", "0.9", "-n", 1, "-o", other).code == 0
    changed = open_store(other)
    assert changed.levels == ("s0.90",)
    assert changed.header.prompts["count"] == 1
    assert changed.header.prompts["texts"][0] == open_store(first).header.prompts["texts"][0]
    assert changed.header.seed == 5
    assert teal("dump", "--like", first, "--resume", "-o", again).code == 2


def test_like_repeats_a_run_behind_a_url(teal: Teal, tmp_path: Path) -> None:
    first, again, url = tmp_path / "first.zarr", tmp_path / "again.zarr", "memory://bucket/first.zarr"
    assert teal("dump", *SMALL, "-o", first).code == 0
    fsspec.filesystem("memory").put(str(first), "/bucket/first.zarr", recursive=True)
    ran = teal("dump", "--like", url, "-o", again)
    assert ran.code == 0, ran.err
    assert open_store(again).state.digest == open_store(first).state.digest
    ran = teal("dump", "--like", "memory://bucket/none.zarr", "-o", tmp_path / "none.zarr")
    assert (ran.code, "memory://bucket/none.zarr" in ran.err) == (3, True)
    ran = teal("dump", "--resume", "-o", url)
    assert (ran.code, "is a URL" in ran.err, f"teal store copy FOLDER -o {url}" in " ".join(ran.err.split())) == (
        2,
        True,
        True,
    )


def test_an_interrupted_generation_is_resumed_by_dump(
    teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("generate", "-p", "The quick", "-s", 0.5, "--max-new-tokens", 15, "--ignore-eos", "--seed", 3, "--dump")
    whole, broken = tmp_path / "whole.zarr", tmp_path / "broken.zarr"
    assert teal(*options, whole).code == 0
    with monkeypatch.context() as patch:
        stopped_after(6, patch)
        stopped = teal(*options, broken)
    assert stopped.code == 130
    assert f"teal dump --resume -o {broken}" in " ".join(stopped.err.split())
    assert teal("dump", "--resume", "-o", broken).code == 0
    assert digest(broken) == digest(whole)


@pytest.mark.parametrize(("option", "value"), [("--seed", 6), ("--max-new-tokens", 10), ("-s", 0.5), ("-n", 3)])
def test_what_is_given_is_held_against_the_store(teal: Teal, tmp_path: Path, option: str, value: object) -> None:
    store = tmp_path / "out.zarr"
    assert teal("dump", *SMALL, "-o", store).code == 0
    before = digest(store)
    refused = teal("dump", "--resume", "-o", store, option, value)
    assert refused.code == 2
    assert "other settings; what differs" in " ".join(refused.err.split())
    assert digest(store) == before

"""Ctrl-C in whatever takes long: it says what is kept, exits with 130, and the next run goes on or starts clean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures_cli import Result, Teal
from fixtures_ranks import together
from fixtures_store import write_store
from fixtures_tiny import make_tiny

from teal_cli import open_store
from teal_cli.ui import progress

Stopped = Callable[..., Result]
FORCED = ("dump", "-d", "python-docs", "-n", 8, "--prompt-tokens", 8, "--max-new-tokens", 20, "-s", "0.5,0.9", "-o",
          "out.zarr", "--ignore-eos")  # fmt: skip


@pytest.fixture
def stopped(teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stopped:
    """Run a command in an empty folder until a task has done more than so much; Ctrl-C comes there."""
    monkeypatch.chdir(tmp_path)
    update = progress._LineTask.update

    def run(task: str, done: int, *command: object) -> Result:
        def stopping(self: progress._LineTask, **known: float) -> None:
            update(self, **known)  # type: ignore[arg-type]
            if self._state.text.startswith(task) and self._state.done > done:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(progress._LineTask, "update", stopping)
            result = teal(*command)
        assert result.code == 130, result.err
        assert result.err.splitlines()[-1] == "error: interrupted"
        assert "Traceback" not in result.err
        return result

    return run


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("follow", ["text", "dense"])
def test_a_forced_dump_goes_on(stopped: Stopped, teal: Teal, tmp_path: Path, follow: str) -> None:
    assert teal(*FORCED[:-2], "whole.zarr", "--ignore-eos", "--follow", follow).code == 0
    result = stopped("Writing", 0, *FORCED, "--follow", follow)
    assert "stopped; what is complete is in out.zarr, and `teal dump --resume -o out.zarr` goes on" in result.err
    assert not open_store("out.zarr").complete
    assert teal("dump", "--resume", "-o", "out.zarr").code == 0
    assert open_store("out.zarr").state.digest == open_store("whole.zarr").state.digest


@pytest.mark.usefixtures("ready")
def test_before_there_is_a_store_nothing_is_said_to_be_kept(stopped: Stopped, teal: Teal, tmp_path: Path) -> None:
    """The dense model decodes first what all levels are fed."""
    result = stopped("Decoding densely", 3, *FORCED, "--follow", "dense")
    assert "stopped before there were rows; nothing was written to out.zarr" in result.err
    assert "--resume" not in result.err
    assert not (tmp_path / "out.zarr").exists()
    assert teal(*FORCED, "--follow", "dense").code == 0


def test_a_copy_goes_on(stopped: Stopped, teal: Teal) -> None:
    write_store(Path("one.zarr"), 40)
    copy = ("store", "copy", "one.zarr", "-o", "two.zarr")
    result = stopped("Copying", 0, *copy)
    assert "stopped; what has arrived is kept, and the same command goes on" in result.err
    assert not Path("two.zarr").exists()
    again = teal(*copy, "--json").json
    assert 0 < again["moved"] < again["bytes"]
    assert open_store("two.zarr").state.digest == open_store("one.zarr").state.digest


# Threads that end together undo each other's warnings.catch_warnings.
@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_a_merge_goes_on(stopped: Stopped, teal: Teal) -> None:
    assert together(Path("many.zarr"), 2) == [None] * 2
    merge = ("store", "merge", "many.zarr", "-o", "one.zarr")
    result = stopped("Merging", 0, *merge)
    assert "stopped; what is merged is in one.zarr, and the same command with --resume goes on" in result.err
    refused = teal(*merge)
    assert (refused.code, "a merge that was cut off goes on with --resume" in refused.err) == (2, True)
    assert teal(*merge, "--resume").code == 0
    assert teal("store", "verify", "one.zarr").code == 0


@pytest.mark.usefixtures("ready")
def test_quantising_goes_on(stopped: Stopped, teal: Teal) -> None:
    command = ("quantize", "tiny", "--to", "int8", "--name", "small")
    result = stopped("Quantising", 0, *command)
    assert "stopped; the layers that are done are kept, and the same command goes on" in result.err
    assert [model["name"] for model in teal("models", "ls", "--json").json["models"]] == ["tiny"]
    assert teal(*command).code == 0
    assert teal("models", "verify", "small").code == 0


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("allocation", ["greedy", "fisher"])
def test_a_plan_goes_on_or_starts_again(stopped: Stopped, teal: Teal, allocation: str) -> None:
    make = ("plan", "make", "-s", 0.5, "--allocation", allocation, "--tokens", 128, "--seq-len", 64, "--sparse-from", 8)
    result = stopped("Allocating" if allocation == "greedy" else "Gradients", 0, *make)
    kept = "stopped; the layers that were searched are kept, and the same command goes on" in result.err
    assert kept == (allocation == "greedy")
    assert teal("plan", "ls", "--json").json["plans"] == []
    assert teal(*make).code == 0
    assert len(teal("plan", "ls", "--json").json["plans"]) == 1


def test_a_download_goes_on(stopped: Stopped, teal: Teal, tmp_path: Path) -> None:
    make_tiny(tmp_path / "model")
    result = stopped("Hashing", 0, "download", tmp_path / "model", "--name", "mine")
    assert "stopped; what was fetched is kept, and the same command goes on" in result.err
    assert teal("models", "ls", "--json").json["models"] == []
    assert teal("download", tmp_path / "model", "--name", "mine").code == 0

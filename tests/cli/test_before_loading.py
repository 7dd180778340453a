"""What can be known before weights are read is told before: here the weights cannot be read at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures_cli import Teal
from fixtures_tiny import make_tiny

from teal_cli.registry.download import fetch
from teal_cli.registry.registry import Registry


@pytest.fixture(scope="module")
def broken_home(ready_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A $TEAL_HOME whose model "tiny" has a calibration, and weights that are no weights."""
    folder = make_tiny(tmp_path_factory.mktemp("broken") / "model")
    registry = Registry(folder.parent / "home")
    fetch(str(folder), registry=registry, name="tiny")
    shutil.copytree(ready_home / "models/tiny/calibrations", registry.home / "models/tiny/calibrations")
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    return registry.home


@pytest.fixture
def broken(broken_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teal: Teal) -> Callable[..., str]:
    """Run a command in an empty folder; what it says, where it must fail."""
    monkeypatch.setenv("TEAL_HOME", str(broken_home))
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> str:
        result = teal(*args)
        assert result.code in (1, 2, 3), result.err
        return result.err

    return run


GENERATE = ("generate", "-p", "The quick")
DUMP = ("dump", "-d", "python-docs", "-n", 1, "--prompt-tokens", 8, "-o", "out.zarr")
EVAL = ("eval", "-d", "python-docs", "-n", 1, "--window", 32)
PLAN = ("plan", "make", "--allocation", "fisher", "--tokens", 128, "--seq-len", 64, "--sparse-from", 8)
CALIBRATE = ("calibrate", "-n", 1, "--seq-len", 32)
CHECK = ("calibrations", "check", "-n", 1, "--seq-len", 32)


@pytest.mark.parametrize("args", [
    GENERATE, DUMP, (*DUMP, "--dry-run"), EVAL, PLAN, (*CALIBRATE, "-d", "python-docs"), (*CHECK, "python-docs"),
    ("quantize", "--to", "int8"), ("bench", "decode", "--quick"),
], ids=lambda args: "-".join(map(str, args[:2])))  # fmt: skip
def test_weights_that_cannot_be_read(broken: Callable[..., str], args: tuple[object, ...]) -> None:
    assert "model.safetensors is truncated or damaged" in broken(*args)


@pytest.mark.parametrize(("args", "says"), [
    (("generate", "-p", ""), "prompt is empty"),
    (("generate", "-p", "x " * 300), "context of 256"),
    ((*GENERATE, "--max-new-tokens", 300), "context of 256"),
    ((*GENERATE, "--chat"), "no chat template"),
    ((*GENERATE, "-c", "another"), "no calibration called 'another'"),
    ((*GENERATE, "--plan", "another"), "no plan called 'another'"),
    ((*GENERATE, "--dump", "here"), "not a teal store"),
    ((*DUMP, "-d", "python-dogs"), "did you mean python-docs"),
    ((*DUMP, "--prompt-tokens", 100000), "--prompt-tokens"),
    (("dump", "--prompts", "nowhere.txt", "-o", "x.zarr"), "no file nowhere.txt"),
    ((*DUMP, "--max-new-tokens", 1), "at least 2 new tokens"),
    ((*DUMP, "--max-new-tokens", 400), "context of 256"),
    ((*DUMP, "-c", "another"), "no calibration called 'another'"),
    ((*DUMP, "--plan", "another"), "no plan called 'another'"),
    ((*DUMP, "-o", "here"), "not a teal store"),
    ((*DUMP, "--resume"), "no store at"),
    ((*DUMP, "-s", "0.5:0.4:0.1"), "holds no levels"),
    ((*EVAL, "-d", "nothing.txt"), "nothing.txt"),
    ((*EVAL, "--window", 400), "context of 256"),
    ((*EVAL, "--plan", "another"), "no plan called 'another'"),
    ((*EVAL, "-o", "here"), "here is a folder"),
    ((*EVAL, "-o", "there.json", "--resume"), "no evaluation at there.json"),
    ((*EVAL, "--sparse-from", "x"), "is no position"),
    ((*PLAN, "-d", "python-dogs"), "did you mean python-docs"),
    ((*PLAN, "--seq-len", 400, "--tokens", 800), "context of 256"),
    ((*PLAN, "--name", "a/b"), "a/b"),
    ((*CALIBRATE, "-d", "python-dogs"), "did you mean python-docs"),
    ((*CALIBRATE, "-d", "python-docs", "--seq-len", 400), "context of 256"),
    ((*CALIBRATE, "-d", "python-docs", "--name", "a/b"), "a/b"),
    ((*CHECK, "python-docs", "-c", "another"), "no calibration called 'another'"),
    (("quantize", "--to", "int4", "--group", 48), "48"),
    (("quantize", "--to", "int4", "--name", "A/B"), "A/B"),
    (("bench", "decode", "--quick", "-c", "another"), "no calibration called 'another'"),
    (("bench", "decode", "--quick", "--prompt-tokens", 256), "context of 256"),
])  # fmt: skip
def test_a_mistake_is_told_first(
    broken: Callable[..., str], tmp_path: Path, args: tuple[object, ...], says: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("mine")
    err = broken(*args)
    assert says in err
    assert "Loading" not in err
    assert "Calibrating" not in err


def test_a_resumed_store_of_other_settings_is_told_first(
    teal: Teal, ready: Path, broken_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("dump", "-d", "python-docs", "-n", 1, "--prompt-tokens", 8, "--max-new-tokens", 4, "-o",
                tmp_path / "out.zarr")  # fmt: skip
    assert teal(*settings, "-s", 0.5).code == 0
    monkeypatch.setenv("TEAL_HOME", str(broken_home))
    other = teal(*settings, "-s", 0.5, "--prompt-tokens", 9, "--resume")
    assert (other.code, "other settings" in other.err, "Loading" in other.err) == (2, True, False)


def test_room_on_the_disk_is_looked_at_first(broken: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal_cli.files.free_space", lambda path: 10)
    for args in (DUMP, (*GENERATE, "--dump", "out.zarr")):
        err = broken(*args)
        assert "10 B free" in err
        assert "ask for fewer rows" in err

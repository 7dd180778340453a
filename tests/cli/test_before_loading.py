"""What can be known before weights are read is told before: here the weights cannot be read at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import zarr
from fixtures_cli import Teal
from fixtures_store import write_store
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
    (("compare", "-p", ""), "has no tokens"),
    (("compare", "-p", "x", "-s", "0"), "nothing to compare"),
    (("compare", "-d", "python-dogs"), "did you mean python-docs"),
    (("chat",), "no chat template"),
    (("chat", "--plan", "another"), "no plan called 'another'"),
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
    assert "Comparing" not in err


@pytest.mark.parametrize(("options", "says"), [
    (("--system", "word " * 60, "--context", 40), "the context of 40 tokens has no room for a message"),
    (("--system", "\udc80"), "half of a surrogate pair"),
    (("-c", "another"), "no calibration called 'another'"),
])  # fmt: skip
@pytest.mark.usefixtures("talker")
def test_a_conversation_that_cannot_begin(
    teal: Teal, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], says: str
) -> None:
    monkeypatch.setattr("teal_cli.commands.chat.load", lambda *_: pytest.fail("it was loaded"))
    run = teal("chat", "-m", "talker", *options)
    assert run.code in (2, 3), run.err
    assert says in run.err
    assert "hint:" in run.err


def test_rows_that_cannot_be_computed_again_are_told_before_all_is_read(
    teal: Teal, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify --replay`: the model is looked for before a byte is checked, and its weights are read last."""
    store = tmp_path / "out.zarr"
    assert teal("dump", "-d", "python-docs", "-n", 1, "--prompt-tokens", 8, "--max-new-tokens", 4, "-s", 0.5, "-o",
                store).code == 0  # fmt: skip
    monkeypatch.setattr("teal_cli.commands.store.load", lambda *_: pytest.fail("it was loaded"))
    entry = ready / "models" / "tiny"
    entry.rename(tmp_path / "tiny")
    run = teal("store", "verify", store, "--replay", 2)
    assert (run.code, "Verifying" in run.err) == (3, False)
    assert "the store's model tiny is not here" in run.err
    (tmp_path / "tiny").rename(entry)
    header = zarr.open_group(store, mode="r+", use_consolidated=False)
    header.attrs["teal"] = {**dict(header.attrs["teal"]), "prompts": {"count": 1}}  # type: ignore[dict-item]
    run = teal("store", "verify", store, "--replay", 2)
    assert (run.code, "Verifying" in run.err) == (1, False), run.err
    assert "rows cannot be computed again" in run.err


def test_what_refuses_its_arguments_announces_nothing(teal: Teal, tmp_path: Path) -> None:
    store = tmp_path / "one.zarr"
    write_store(store, 8)
    for args in (("merge", store, "-o", tmp_path / "x"), ("copy", store, "-o", store),
                 ("convert", store, "-o", store / "x"), ("verify", tmp_path / "nowhere")):  # fmt: skip
        run = teal("store", *args)
        assert run.code in (2, 3), run.err
        assert run.err.startswith("error: "), run.err


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


@pytest.mark.parametrize(
    "args",
    [
        ("eval", "-d", "nowhere.txt"),
        ("calibrate", "-d", "nowhere.txt"),
        ("calibrations", "check", "nowhere.txt"),
        ("calibrations", "import", "nowhere"),
        ("plan", "import", "nowhere"),
        ("download", "./nowhere"),
        ("quantize", "--to", "int3"),
        ("quickstart", "-o", "/proc/none/x.zarr"),
    ],
    ids=lambda args: "-".join(args[:2]),
)
def test_a_mistake_is_one_sentence_and_a_hint(broken: Callable[..., str], args: tuple[str, ...]) -> None:
    error, hint = broken(*args).splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("  hint: ")

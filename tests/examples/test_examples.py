"""The examples and the README's Python, run on a tiny model."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import teal_cli

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store(ready: Path, tmp_path: Path) -> Path:
    path = tmp_path / "teal-quickstart.zarr"
    session = teal_cli.open_session("tiny", dtype="float32")
    prompts = ("one two three", "four five six")
    teal_cli.dump(session, path, prompts=prompts, max_new_tokens=9, temperature=0, ignore_eos=True)
    return path


def test_decode(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("decode").main("tiny", "one two three")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in lines[:2]] == ["dense", "sparse"]
    assert "tokens are the same" in lines[2]


def test_spmv(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("spmv").main(str(store))
    replayed, rows, *products = capsys.readouterr().out.splitlines()
    assert replayed == "4 of 4 random rows came out again bit for bit"
    assert rows.startswith("16 rows of 100 channels")
    assert [line.partition(":")[0] for line in products] == ["scipy", "teal_kernels"]
    assert all(float(line.split()[-1]) < 1e-4 for line in products)


def test_density(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("density").main(str(store), str(tmp_path / "density.png"))
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    level = teal_cli.open_store(store).level(0.5)
    kept = np.mean([(level.projection(layer, "gate")[:] != 0).mean() for layer in range(level.store.header.layers)])
    assert shown["gate"] == f"{kept:.1%}"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # SCALE-Sim leaves files open
def test_simulate(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("simulate").main(str(store), str(tmp_path / "scalesim"))
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        f"layer_0_{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    for line in lines:
        _, _, dense, sparse = line.split()
        assert 0 < int(sparse) <= int(dense)
    _, ratio, dense, sparse = lines[-1].split()
    assert int(sparse) < int(dense), f"{ratio} of 100 channels fill fewer passes over 32 rows"


def test_overlap(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("overlap").main(str(store))
    assert len(capsys.readouterr().out.splitlines()) == 1 + 3


def test_the_readmes_python_runs(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every indented block of the README that begins with `import teal_cli`, in order, in one namespace."""
    monkeypatch.chdir(store.parent)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^    .*\n|^\n)+", text, re.MULTILINE)
    code = [block for block in blocks if block.lstrip("\n").startswith("    import teal_cli")]
    assert len(code) >= 2
    for block in code:
        source = "\n".join(line[4:] for line in block.strip("\n").splitlines())
        exec(compile(source.replace("smollm2-135m", "tiny"), "README.md", "exec"), {})


def test_the_library_calibrates(ready: Path) -> None:
    made = teal_cli.calibrate("tiny", num_sequences=1, seq_len=48, name="mine")
    assert made.id == "mine"
    assert made.provenance.tokens == 48
    store = teal_cli.open_store  # the face has what it says, and no more
    assert callable(store)
    assert set(teal_cli.__all__) <= set(dir(teal_cli))
    assert np.isfinite(made.threshold(0, "attn_in", 0.5))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = teal_cli.nonsense

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


def test_sparse_matrix(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("sparse_matrix").main(str(store))
    out = capsys.readouterr().out
    assert "16 rows of 100 channels" in out
    assert float(out.split()[-1]) < 1e-4


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

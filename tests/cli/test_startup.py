"""What starting costs: no command line action that only talks may import what only computing needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures_cli import HEAVY

from teal_cli.app import COMMANDS

RUN = """
import sys
from teal_cli.app import main
try:
    code = main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
sys.stderr.write("\\n" + "\\n".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def imported(*args: str, env: dict[str, str]) -> tuple[str, set[str]]:
    """(stdout, top-level modules imported) of one run in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", RUN, *args],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=True,
    )
    return result.stdout, set(result.stderr.splitlines())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home" / "models" / "smollm2-135m"
    folder.mkdir(parents=True)
    entry = {"name": "smollm2-135m", "size_bytes": 269_000_000, "family": "llama", "dtype": "bfloat16"}
    (folder / "model.json").write_text(json.dumps(entry))
    return tmp_path / "home"


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["dokter"], []])
def test_talking_imports_nothing_heavy(home: Path, args: list[str]) -> None:
    _, modules = imported(*args, env={"TEAL_HOME": str(home)})
    assert not modules & (HEAVY | {"rich"})


@pytest.mark.parametrize("command", [entry.name for entry in COMMANDS])
def test_help_of_a_command_imports_nothing_heavy(home: Path, command: str) -> None:
    out, modules = imported(command, "--help", env={"TEAL_HOME": str(home)})
    assert out.startswith(f"Usage: teal {command}")
    assert not modules & HEAVY


def complete(shell: str, line: str) -> dict[str, str]:
    """The environment in which a shell asks for completions of the last word of `line`."""
    words = line.split(" ")
    return {
        "_TEAL_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completing_a_model_imports_nothing_heavy(home: Path, shell: str) -> None:
    out, modules = imported(env={"TEAL_HOME": str(home), **complete(shell, "teal generate -m smol")})
    assert "smollm2-135m" in out
    assert shell == "bash" or "269 MB, llama, bfloat16" in out
    assert not modules & (HEAVY | {"pydantic", "rich"})

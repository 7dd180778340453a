"""A machine that is not as it should be: no home, no room for caches, a clock set back, two of everything at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fixtures_cli import Teal
from fixtures_gguf import write_gguf
from fixtures_hub import Hub, model_files
from fixtures_store import digest
from fixtures_tiny import make_tiny

from teal_cli.registry.download import fetch
from teal_cli.registry.registry import Registry

SMALL = ("--ignore-eos", "--max-new-tokens", 12)
PLAIN = ("--backend", "reference")
"""In processes of their own: nothing is compiled, which takes long where caches are cold or cannot be."""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `teal ARGS` as a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: object, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "teal_cli", *map(str, arguments)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def all_end(processes: Sequence[subprocess.Popen[str]], seconds: float = 120) -> list[str]:
    """What processes print that end well."""
    out = []
    for process in processes:
        said, err = process.communicate(timeout=seconds)
        assert process.returncode == 0, err
        out.append(said)
    return out


# ---------------------------------------------------------------- homes
def test_no_home_anywhere(ready: Path, tmp_path: Path) -> None:
    """No $HOME and no entry of the user in /etc/passwd, as in many containers."""
    program = """
import os, pwd, sys
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
from teal_cli.app import main
decode = ["-p", "The", "--temperature", "0", "--max-new-tokens", "4", "--backend", "reference"]
for arguments in (["models", "ls"], ["generate", *decode]):
    assert main(arguments) == 0, arguments
del os.environ["TEAL_HOME"]
sys.exit(main(["models", "ls"]))
"""
    env = {name: value for name, value in os.environ.items() if name != "HOME" and not name.startswith("XDG_")}
    done = subprocess.run([sys.executable, "-c", program], env=env | {"TMPDIR": str(tmp_path)}, cwd=tmp_path,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "this user has no home folder" in done.stderr


@pytest.mark.parametrize("home", ["/proc/teal", "/dev/null/teal"])
def test_a_home_that_cannot_be_made(teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    checkpoint = make_tiny(tmp_path / "checkpoint")
    monkeypatch.setenv("TEAL_HOME", home)
    assert teal("models", "ls").code == 0
    for arguments in (("download", checkpoint), ("download", "nowhere/nothing", "--offline")):
        run = teal(*arguments)
        assert run.code in (1, 2, 3), run
        assert run.err.startswith("error: ")
    assert teal("models", "rm", "tiny", "--yes").code == 3


def test_caches_that_cannot_be_made(ready: Path, start: Start, tmp_path: Path) -> None:
    nowhere = dict.fromkeys(("HF_HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "TEAL_KERNEL_CACHE"), "/proc/teal")
    store = tmp_path / "out.zarr"
    options = ("-s", 0.5, "-d", "python-docs", "-n", 1, "--prompt-tokens", 8, *SMALL, *PLAIN)
    all_end([start("dump", *options, "-o", store, **nowhere)])
    all_end([start("store", "verify", store, **nowhere)])


# ---------------------------------------------------------------- time
def test_a_clock_that_runs_backwards(ready: Path, teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("dump", "-s", 0.5, "-d", "python-docs", "-n", 1, "--prompt-tokens", 8, *SMALL, "-o")
    assert teal(*options, tmp_path / "before.zarr").code == 0
    days = count(1)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86400 * next(days))
    assert teal(*options, tmp_path / "after.zarr").code == 0
    assert teal("calibrate", "-d", "python-docs", "-n", 1, "--seq-len", 32, "--name", "later").code == 0
    assert {entry["id"] for entry in teal("calibrations", "ls", "--json").json["calibrations"]} >= {"later"}
    for options in (("models", "ls"), ("generate", "-p", "The", *SMALL), ("store", "verify", tmp_path / "after.zarr")):
        assert teal(*options).code == 0
    assert digest(tmp_path / "after.zarr") == digest(tmp_path / "before.zarr")


# ---------------------------------------------------------------- two at once
def test_two_downloads_of_one_model(start: Start, hub_server: Hub, hub_env: Any) -> None:
    size = 11 << 20
    hub_server.add("org/Tiny", model_files(rows=2 * size // 128))
    hub_server.hold, hub_server.hold_after = threading.Event(), size
    both = [start("download", "org/Tiny", "--json", **hub_env()) for _ in range(2)]
    blobs = Path(hub_env()["HF_HOME"], "hub/models--org--Tiny/blobs")
    deadline = time.monotonic() + 120
    while not any(file.stat().st_size for file in blobs.glob("*.teal-partial")):
        ended = [process.communicate() for process in both if process.poll() is not None]
        assert not ended, f"no transfer began; {ended} {hub_server.requests}"
        assert time.monotonic() < deadline, f"no transfer began; {hub_server.requests}"
        time.sleep(0.02)
    hub_server.hold.set()
    hub_server.hold = None
    assert {json.loads(out)["name"] for out in all_end(both)} == {"tiny"}
    assert json.loads(all_end([start("models", "verify", "tiny", "--json", **hub_env())])[0])["ok"] is True
    assert Registry(Path(hub_env()["TEAL_HOME"])).names() == ("tiny",)


def test_a_model_that_is_removed_while_it_decodes(teal: Teal, start: Start, teal_home: Path, tmp_path: Path) -> None:
    """Its weights lie in the registry, and go."""
    file = write_gguf(make_tiny(tmp_path / "checkpoint", "llama2"), tmp_path / "tiny.gguf")
    entry = fetch(str(file), registry=Registry(teal_home), name="mine")
    options = ("-m", "mine", "-p", "The quick", "-s", 0, "--temperature", 0, "--ignore-eos", "--max-new-tokens", 120,
               *PLAIN)  # fmt: skip
    [expected] = all_end([start("generate", *options)])
    process = start("generate", *options)
    assert process.stdout is not None
    first = process.stdout.read(1)  # decoding has begun
    assert teal("models", "rm", "mine", "--yes").code == 0
    assert not entry.path.exists()
    assert first + process.stdout.read() == expected
    assert process.wait(60) == 0
    assert teal("generate", *options).code == 3


def test_two_runs_at_once(ready: Path, start: Start, tmp_path: Path) -> None:
    options = ("-p", "The quick", "--seed", 3, *SMALL, *PLAIN)
    both = [start("generate", *options, "--dump", tmp_path / f"{number}.zarr", "--json") for number in range(2)]
    texts = {json.loads(out)["text"] for out in all_end(both)}
    assert len(texts) == 1
    assert digest(tmp_path / "0.zarr") == digest(tmp_path / "1.zarr")

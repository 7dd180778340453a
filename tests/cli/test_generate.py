"""`teal generate` as a user meets it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fixtures_cli import Teal, interruptible

from teal_cli import open_store
from teal_cli.registry.registry import Registry

pytestmark = pytest.mark.usefixtures("ready")
Tiny = Callable[[str], Path]
GREEDY = ("--temperature", 0, "--ignore-eos", "--max-new-tokens", 12)


def test_text_goes_to_stdout_and_figures_to_stderr(teal: Teal) -> None:
    run = teal("generate", "-p", "The quick", *GREEDY)
    assert run.code == 0
    assert run.out.strip()
    assert "tok/s" not in run.out
    assert "tok/s" in run.err
    assert "50% wanted" in " ".join(run.err.split())


def test_json_is_one_whole_object(teal: Teal, tmp_path: Path) -> None:
    run = teal("generate", "-p", "The quick", *GREEDY, "--json", "--dump", tmp_path / "out.zarr")
    result = run.json
    assert set(result) == {"model", "calibration", "plan", "prompt", "text", "prompt_ids", "token_ids", "sparsity",
                           "backend", "device", "dtype", "seed", "timings", "store"}  # fmt: skip
    assert set(result["timings"]) == {"load_s", "prefill_s", "decode_s", "tokens_per_s", "effective_gbps"}
    assert len(result["token_ids"]) == 12
    assert set(result["sparsity"]["per_projection"]) == set("qkvo") | {"gate", "up", "down"}
    assert abs(result["sparsity"]["realised"] - 0.5) < 0.15
    assert result["store"] == str(tmp_path / "out.zarr")


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9])
def test_a_dump_changes_no_token_and_holds_every_step(teal: Teal, tmp_path: Path, sparsity: float) -> None:
    options = ("-p", "The quick", "-s", sparsity, "--seed", 3, "--ignore-eos", "--max-new-tokens", 30, "--json")
    without = teal("generate", *options).json
    with_dump = teal("generate", *options, "--dump", tmp_path / "out.zarr").json
    assert with_dump["token_ids"] == without["token_ids"]
    assert with_dump["sparsity"] == without["sparsity"]
    level = open_store(tmp_path / "out.zarr").level(sparsity)
    assert list(level.tokens.token_id) == without["token_ids"][:-1]
    assert set(level.tokens.phase) == {1}
    assert teal("store", "verify", tmp_path / "out.zarr").code == 0
    dropped = dict(zip(without["sparsity"]["per_projection"], level.realised().mean(0), strict=True))
    for projection, share in without["sparsity"]["per_projection"].items():
        assert dropped[projection] == pytest.approx(share, abs=1e-9)


def test_the_prompt_may_come_from_standard_input(teal: Teal, monkeypatch: pytest.MonkeyPatch) -> None:
    given = teal("generate", "-p", "The quick", *GREEDY, "--json").json["token_ids"]
    monkeypatch.setattr("sys.stdin", io.StringIO("The quick"))
    assert teal("generate", *GREEDY, "--json").json["token_ids"] == given


@pytest.mark.parametrize("length", [1, 3, 6])
def test_a_stop_text_ends_the_text_before_itself(teal: Teal, length: int) -> None:
    """Cut out of the free text across the boundaries of tokens."""
    options = ("generate", "-p", "The quick", "--temperature", 0, "--ignore-eos", "--max-new-tokens", 40)
    free = teal(*options, "--json").json
    stop = free["text"][10 : 10 + length]
    end = free["text"].index(stop)
    stopped = teal(*options, "--stop", "never there", "--stop", stop, "--json").json
    assert stopped["text"] == free["text"][:end]
    assert stopped["token_ids"] == free["token_ids"][: len(stopped["token_ids"])]
    assert len(stopped["token_ids"]) < 40
    assert teal(*options, "--stop", stop).out == free["text"][:end] + "\n"
    assert teal(*options, "--stop", free["text"][-1] + "!").out == free["text"] + "\n"


def test_the_first_prompts_of_a_file(teal: Teal, tmp_path: Path) -> None:
    """Drawn as a dump of the same file draws them."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("The quick\ndef keep\nDecoding one\n")
    sampled = ("--temperature", 1.5, "--seed", 3, "--ignore-eos", "--max-new-tokens", 9)
    found = teal("generate", "--prompts", prompts, "-n", 2, *sampled, "--json").json["generations"]
    assert [one["prompt"] for one in found] == ["The quick", "def keep"]
    assert teal("dump", "--prompts", prompts, "-n", 2, "-s", 0.5, "-o", tmp_path / "out.zarr", *sampled).code == 0
    level = open_store(tmp_path / "out.zarr").level(0.5)
    for index, one in enumerate(found):
        assert one["token_ids"][:-1] == level.tokens.token_id[level.rows(index)].tolist()
    run = teal("generate", "--prompts", prompts, *sampled)
    assert run.out.startswith(f"{found[0]['text']}\n{found[1]['text']}\n")
    assert "3/3  Decoding one" in run.err
    assert re.search(r"tok/s\s+dropped", run.err)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("-p", "x", "--prompts", "p.txt"), 2, "exclude each other"),
        (("-p", "x", "-n", 2), 2, "--prompts FILE"),
        (("--prompts", "p.txt"), 3, "no file p.txt"),
        (("--prompts", "p.txt", "--dump", "o.zarr"), 2, "teal dump --prompts FILE"),
        (("-p", "x", "--dump", "o.zarr", "--stop", "x"), 2, "either --dump or --stop"),
        (("-p", "x", "--stop", ""), 2, "stop text is empty"),
    ],
)
def test_what_does_not_go_together(
    teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = teal("generate", *options)
    assert (run.code, run.out) == (code, "")
    assert says in run.err
    assert not (tmp_path / "o.zarr").exists()


def test_a_seed_repeats_itself_and_none_is_a_new_one(teal: Teal) -> None:
    sampled = ("-p", "The quick", "--temperature", 1.5, "--top-k", 0, "--ignore-eos", "--json")
    first, again = (teal("generate", *sampled, "--seed", 5).json for _ in range(2))
    assert first["token_ids"] == again["token_ids"]
    assert teal("generate", *sampled).json["seed"] != teal("generate", *sampled).json["seed"]


def test_sampled_tokens_do_not_depend_on_the_backend(teal: Teal) -> None:
    sampled = ("-p", "The quick", "--top-p", 0.9, "--seed", 3, "--ignore-eos", "--dtype", "float32", "--json")
    numba, plain = (teal("generate", *sampled, "--backend", name).json["token_ids"] for name in ("numba", "reference"))
    assert numba == plain
    assert teal("generate", *sampled, "--top-p", 0.2).json["token_ids"] != plain


def test_a_tiny_temperature_is_greedy_and_no_defect_of_the_model(teal: Teal) -> None:
    tokens = [
        teal("generate", "-p", "The quick", *GREEDY, "--json", "--temperature", temperature).json["token_ids"]
        for temperature in (0, 1e-40)
    ]
    assert tokens[0] == tokens[1]


def test_backends_give_the_same_tokens(teal: Teal) -> None:
    tokens = [
        teal("generate", "-p", "The quick", *GREEDY, "--dtype", "float32", "--backend", backend, "--json").json[
            "token_ids"
        ]
        for backend in ("auto", "cpu", "reference")
    ]
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("-p", "x", "-m", "tinny"), 3, "did you mean tiny"),
        (("-p", "x", "-s", 1), 2, "outside [0, 1)"),
        (("-p", "x", "-s", -0.1), 2, "outside [0, 1)"),
        (("-p", "x", "--backend", "triton"), 5, "needs a GPU"),
        (("-p", "x", "--backend", "cuda"), 2, "not one of"),
        (("-p", "x", "--device", "cuda:7"), 5, "no device cuda:7"),
        (("-p", "x", "--dtype", "int8"), 2, "not one of"),
        (("-p", "x", "--top-p", 0), 2, "outside (0, 1]"),
        (("-p", "x", "--temperature", 1e39), 2, "temperature must be"),
        (("-p", ""), 2, "prompt is empty"),
        (("-p", "x " * 400), 2, "context of 256"),
        (("-p", "x", "--max-new-tokens", 0), 2, "--max-new-tokens"),
        (("-p", "x", "--max-new-tokens", 300), 2, "context of 256"),
        (("-p", "x", "--chat"), 2, "no chat template"),
        (("-p", "x", "-c", "another"), 3, "another"),
        (("-p", "x", "--sparsty", 0.5), 2, "--sparsity"),
    ],
)
def test_bad_input_is_one_sentence_with_a_hint_and_an_exit_code(
    teal: Teal, options: tuple[object, ...], code: int, says: str
) -> None:
    run = teal("generate", *options)
    assert run.code == code
    assert run.out == ""
    assert says in " ".join(run.err.split())
    assert "hint:" in run.err
    assert "Traceback" not in run.err


def test_a_store_that_is_there_stays_as_it_is(teal: Teal, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    assert teal("generate", "-p", "The quick", *GREEDY, "--dump", store).code == 0
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    refused = teal("generate", "-p", "def keep", *GREEDY, "--dump", store)
    assert refused.code == 2
    assert "--force" in refused.err
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    assert teal("generate", "-p", "def keep", *GREEDY, "--dump", store, "--force").code == 0
    assert open_store(store).header.prompts["texts"] == ["def keep"]


def test_a_folder_that_is_no_store_is_never_replaced(teal: Teal, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    assert teal("generate", "-p", "x", *GREEDY, "--dump", tmp_path / "thesis", "--force").code == 2
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_calibration_of_another_model_is_refused(teal: Teal, tiny: Tiny) -> None:
    assert teal("download", tiny("qwen3"), "--name", "other").code == 0
    run = teal("generate", "-m", "other", "-p", "x", "-c", Registry().find_calibration("tiny"))
    assert run.code == 2
    assert "another model" in run.err


def test_a_model_without_calibration_says_how_to_make_one(teal: Teal, tiny: Tiny) -> None:
    assert teal("download", tiny("qwen3"), "--name", "other").code == 0
    run = teal("generate", "-m", "other", "-p", "x")
    assert run.code == 3
    assert "teal calibrate" in run.err
    assert teal("generate", "-m", "other", "-p", "The", "-s", 0, *GREEDY).code == 0


SLOWLY = """
import itertools, sys, time
from teal_cli.app import main
from teal_cli.decoding.decoder import Decoder
count = itertools.count()
def slowed(step):
    def slow(*given):
        if next(count) == 5:
            print("READY", file=sys.stderr, flush=True)
        time.sleep(0.1)
        return step(*given)
    return slow
Decoder._follow = slowed(Decoder._follow)
sys.exit(main(sys.argv[1:]))
"""


def test_interrupted_it_leaves_a_store_that_reads(ready: Path, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    settings = ["-p", "The quick", "--ignore-eos", "--max-new-tokens", "240", "--dump", str(store)]
    command = [sys.executable, "-c", SLOWLY, "generate", *settings]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    )
    assert process.stderr is not None
    assert any("READY" in line for line in process.stderr), "it ended before it was interrupted"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    opened = open_store(store)
    assert not opened.complete
    level = opened.level(0.5)
    assert np.asarray(level.site(0, "mlp_in")[:]).shape == (len(level), 72)


def on_a_terminal() -> None:
    """Make the pseudo-terminal on standard input the one that Ctrl-C is typed at."""
    interruptible()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def stopped_by_ctrl_c(*options: str, stdout: int | None = None) -> tuple[subprocess.Popen[str], str]:
    """Run `generate` on a pseudo-terminal and type Ctrl-C once it decodes; the process, and what the terminal shows."""
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-c", SLOWLY, "generate", "-p", "The quick", "--ignore-eos", "--max-new-tokens", "240"]
    process = subprocess.Popen(
        [*command, *options], stdin=terminal, stdout=terminal if stdout is None else stdout, stderr=terminal,
        text=True, start_new_session=True, preexec_fn=on_a_terminal,
    )  # fmt: skip
    os.close(terminal)
    shown, typed = "", False
    with suppress(OSError):  # what Linux says where all users of a terminal have gone
        while chunk := os.read(keyboard, 4096):
            shown += chunk.decode(errors="replace")
            if "READY" in shown and not typed:
                os.write(keyboard, b"\x03")
                typed = True
    os.close(keyboard)
    return process, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def test_ctrl_c_on_a_terminal_ends_the_line_and_tells_the_figures(ready: Path) -> None:
    process, shown = stopped_by_ctrl_c()
    assert process.wait(timeout=60) == 130, shown
    lines = shown.splitlines()
    figures = re.match(r"([\d.]+) tok/s over (\d+) steps, ", next(line for line in lines if "tok/s" in line))
    assert figures, shown
    assert float(figures[1]) > 0
    assert 5 <= int(figures[2]) < 239
    realised = re.search(r"50% wanted, ([\d.]+)% realised", " ".join(shown.split()))
    assert realised, shown
    assert 30 < float(realised[1]) < 70
    assert lines[-1] == "error: interrupted"
    assert "Traceback" not in shown


def test_ctrl_c_keeps_json_whole(ready: Path) -> None:
    process, shown = stopped_by_ctrl_c("--json", stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as printed:
        result = json.loads(printed.read())
    assert process.wait(timeout=60) == 130, shown
    assert 6 <= len(result["token_ids"]) < 240
    last = shown.splitlines()[-1].removeprefix("^C")  # as the terminal echoes it
    assert json.loads(last)["error"]["message"] == "interrupted"

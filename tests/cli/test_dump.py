"""`teal dump` as a user meets it, and the promise that an interrupted run can be taken up."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from fixtures_cli import Teal, interruptible

from teal_cli import open_store
from teal_cli.passes.crew import crew
from teal_cli.runs.board import Board
from teal_cli.runs.dump import Dump, Following
from teal_cli.runs.recipe import KEYS, load_recipe, shipped_recipes
from teal_cli.store.schema import parse_levels
from teal_cli.store.writer import LevelWriter

pytestmark = pytest.mark.usefixtures("ready")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    lines = ["The quick brown fox", "def keep(x, t):", "Sparse activations"]
    file.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    return file


def small(prompts: Path, store: Path) -> tuple[object, ...]:
    return ("dump", "-s", "0,0.5,0.9", "--prompts", prompts, "--max-new-tokens", 20, "--ignore-eos", "-o", store)


def arrays(store: Path) -> dict[str, np.ndarray]:
    """Every array of a store as Zarr itself reads it."""
    group = zarr.open_group(store, mode="r")
    return {
        name: np.asarray(array[...]) for name, array in group.members(max_depth=None) if isinstance(array, zarr.Array)
    }


def test_a_dataset_of_levels_and_prompts(teal: Teal, prompts: Path, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    result = teal(*small(prompts, store), "--json").json
    assert result["new_rows"] == 3 * 3 * 19
    opened = open_store(store)
    assert opened.complete
    assert list(opened.levels) == ["s0.00", "s0.50", "s0.90"]
    assert opened.header.prompts["texts"][1] == "def keep(x, t):"
    for name in opened.levels:
        tokens = opened.level(name).tokens
        assert np.bincount(tokens.sequence).tolist() == [19, 19, 19]
        for sequence in range(3):
            start = len(opened.header.prompts["token_ids"][sequence])
            rows = opened.level(name).rows(sequence)
            assert tokens.position[rows].tolist() == list(range(start, start + 19))
    assert teal("store", "verify", store).code == 0


def test_a_dataset_that_is_a_little_short_is_told(teal: Teal, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for index in range(4):
        (text / f"{index}.txt").write_text("The quick brown fox jumps over the lazy dog. " * 8)
    some = ("-d", text, "--max-new-tokens", 4, "--prompt-tokens", 8, "-s", 0.5)
    run = teal("dump", *some, "-n", 6, "-o", tmp_path / "out.zarr")
    assert run.code == 0, run.err
    assert f"{text} has text for 4 of 6 prompts" in " ".join(run.err.split())
    compared = " ".join(teal("compare", *some, "-n", 6).err.split())
    assert compared.count(f"{text} has text for 4 of 6 prompts") == 1
    assert teal("dump", *some, "-n", 9, "-o", tmp_path / "more.zarr").code == 2
    enough = teal("dump", *some, "-n", 4, "-o", tmp_path / "all.zarr")
    assert (enough.code, "has text for" in enough.err) == (0, False)
    tokens = teal("calibrate", "-d", text, "-n", 1000, "--seq-len", 64, "--name", "short", "--json")
    assert tokens.code == 2
    fits = int(re.findall(r"--num-sequences (\d+)", tokens.error["hint"])[0])
    made = teal("calibrate", "-d", text, "-n", fits + 1, "--seq-len", 64, "--name", "short")
    assert made.code == 0, made.err
    assert f"has text for {fits} of {fits + 1} sequences" in " ".join(made.err.split())


def test_the_rows_are_those_of_generate(teal: Teal, prompts: Path, tmp_path: Path) -> None:
    """A dump of many is many dumps of one: sequence 0 has the random stream that `generate` has."""
    teal(*small(prompts, tmp_path / "many.zarr"), "--seed", 4)
    teal("generate", "-p", "The quick brown fox", "-s", 0.5, "--max-new-tokens", 20, "--ignore-eos", "--seed", 4,
         "--dump", tmp_path / "one.zarr")  # fmt: skip
    many, one = (open_store(tmp_path / name).level(0.5) for name in ("many.zarr", "one.zarr"))
    assert many.tokens.token_id[:19].tolist() == one.tokens.token_id.tolist()
    for layer in range(3):
        np.testing.assert_array_equal(many.site(layer, "mlp_mid")[:19], one.site(layer, "mlp_mid")[:])


@pytest.mark.parametrize("follow", ["free", "dense", "text"])
def test_dry_run_writes_nothing_and_is_near_the_truth(teal: Teal, prompts: Path, tmp_path: Path, follow: str) -> None:
    store, source = tmp_path / "out.zarr", ("--prompts", prompts)
    if follow == "text":
        source = ("-d", "python-docs", "-n", "3", "--prompt-tokens", "8")
    arguments = ("dump", "-s", "0,0.5,0.9", *source, "--max-new-tokens", 70, "--ignore-eos", "-o", store)
    estimate = teal(*arguments, "--follow", follow, "--dry-run", "--json").json
    assert not store.exists()
    assert estimate["rows"] == 3 * 3 * 69
    passed = crew(torch.device("cpu"))
    at_once = 1 if follow == "free" or passed is None else min(3, passed.size)  # a sequence on each core
    assert estimate["sampled_rows"] == at_once * 3 * 32
    assert 0 < estimate["seconds_low"] <= estimate["seconds"] <= estimate["seconds_high"]
    assert set(estimate) >= {"store_bytes", "free_bytes", "levels", "prompts"}
    assert teal(*arguments, "--follow", follow).code == 0
    written = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert estimate["store_bytes"] == pytest.approx(written, rel=0.3)


def test_the_time_of_a_run_has_what_is_decoded_first(
    teal: Teal, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a dry run counts it: with --follow dense the dense model decodes before there are rows."""
    decoding = Dump._follow_dense

    def slower(self: Dump, board: Board) -> Iterator[Following]:
        time.sleep(1.5)
        yield from decoding(self, board)

    monkeypatch.setattr(Dump, "_follow_dense", slower)
    result = teal(*small(prompts, tmp_path / "out.zarr"), "--follow", "dense", "--json").json
    assert result["seconds"] > 1.5
    assert result["rows_per_s"] == pytest.approx(result["new_rows"] / result["seconds"])


@pytest.mark.parametrize("follow", ["free", "dense"])
def test_progress_moves_with_every_row_that_is_decoded(
    teal: Teal, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follow: str
) -> None:
    monkeypatch.setattr("teal_cli.ui.progress.LINE_EVERY_S", 0.0)
    run = teal(*small(prompts, tmp_path / "out.zarr"), "--follow", follow)
    assert run.code == 0
    done = [int(count) for count in re.findall(r"s0\.\d\d: (\d+)/171 rows", run.err)]
    assert sorted(set(done)) == [*(range(1, 172) if follow == "free" else range(19, 172, 19))]
    assert done == sorted(done)
    fed = [int(count) for count in re.findall(r"Decoding densely: (\d+)/60 tokens", run.err)]
    assert fed == ([] if follow == "free" else [*range(1, 61), 60])


def test_a_resumed_run_goes_on_counting(teal: Teal, prompts: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Rows that were there count as done, and not for the rate."""
    from teal_cli.runs.job import Decoding

    store, write = tmp_path / "out.zarr", Decoding.write
    monkeypatch.setattr("teal_cli.store.header.block_tokens", lambda channels, itemsize: 16)

    def cut_off(
        self: Decoding, levels: Sequence[LevelWriter], sequences: Sequence[int], held: Mapping[str, np.ndarray]
    ) -> Iterator[int]:
        for number, new in enumerate(write(self, levels, sequences, held)):
            if levels[0].name == "s0.50" and sequences[0] == 1 and number == 9:
                raise KeyboardInterrupt
            yield new

    with monkeypatch.context() as patch:
        patch.setattr(Decoding, "write", cut_off)
        assert teal(*small(prompts, store)).code == 130
    monkeypatch.setattr("teal_cli.ui.progress.LINE_EVERY_S", 0.0)
    run = teal("dump", "--resume", "-o", store)
    assert run.code == 0, run.err
    done = [int(count) for count in re.findall(r": (\d+)/171 rows", run.err)]
    assert done[0] == 3 * 19 + 16 + 1, "of s0.50 the rows of a whole block"
    assert done[-1] == 171


def test_resuming_what_is_complete_changes_nothing(teal: Teal, prompts: Path, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    assert teal(*small(prompts, store)).code == 0
    before = arrays(store)
    result = teal(*small(prompts, store), "--resume", "--json").json
    assert result["new_rows"] == 0
    for name, values in arrays(store).items():
        np.testing.assert_array_equal(values, before[name])


@pytest.mark.parametrize("follow", ["free", "dense"])
def test_resuming_what_is_complete_loads_nothing(
    teal: Teal, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follow: str
) -> None:
    store = tmp_path / "out.zarr"
    assert teal(*small(prompts, store), "--follow", follow).code == 0
    monkeypatch.setattr("teal_cli.commands.dump.load", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr("teal_cli.runs.session.Session.load", lambda *_: pytest.fail("it was loaded"))
    run = teal("dump", "--resume", "-o", store)
    assert run.code == 0, run.err
    assert "nothing was left to write" in run.out
    other = teal("dump", "--resume", "-o", store, "--max-new-tokens", 21)
    assert (other.code, "what differs: max_new_tokens" in other.err) == (2, True)


def test_a_store_from_before_there_was_a_top_p_resumes(teal: Teal, prompts: Path, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    assert teal(*small(prompts, store)).code == 0
    group = zarr.open_group(store, mode="r+", use_consolidated=False)
    attributes = dict(group.attrs["teal"])
    assert attributes["sampling"].pop("top_p") == 1.0
    group.attrs["teal"] = attributes
    assert teal(*small(prompts, store), "--resume").code == 0
    assert teal(*small(prompts, store), "--resume", "--top-p", 0.9).code == 2


@pytest.mark.parametrize("change", [("--seed", 9), ("--temperature", 0), ("-s", "0,0.5"), ("--max-new-tokens", 21),
                                    ("--dtype", "bfloat16"), ("--backend", "reference")])  # fmt: skip
def test_resuming_with_other_settings_is_refused(
    teal: Teal, prompts: Path, tmp_path: Path, change: Sequence[object]
) -> None:
    store = tmp_path / "out.zarr"
    assert teal(*small(prompts, store)).code == 0
    run = teal(*small(prompts, store), *change, "--resume")
    assert run.code == 2
    assert "other settings" in run.err
    assert open_store(store).complete


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("-s", "0.5"), 2, "name it with -o"),
        (("-s", "half", "-o", "x.zarr"), 2, "levels look like"),
        (("-s", "0.5:1.0:0.1", "-o", "x.zarr"), 2, "below 1"),
        (("-o", "x.zarr", "--resume", "--force"), 2, "exclude each other"),
        (("-o", "x.zarr", "--resume", "-d", "python-docs", "--prompt-tokens", 8, "-n", 1), 3, "no store"),
        (("-o", "x.zarr", "--prompts", "nowhere.txt"), 3, "no file nowhere.txt"),
        (("-o", "x.zarr", "-d", "wikitxt"), 3, "wikitext"),
        (("-o", "x.zarr", "-r", "swep"), 3, "did you mean sweep"),
        (("-o", "x.zarr", "-d", "python-docs", "--prompt-tokens", 100000), 2, "--prompt-tokens"),
        (("-o", "x.zarr", "-d", "python-docs", "--prompt-tokens", 250, "-n", 1), 2, "context of 256"),
        (("-o", "x.zarr", "--max-new-tokens", 1, "-d", "python-docs"), 2, "--max-new-tokens"),
    ],
)
def test_bad_input(teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], code: int,
                   says: str) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run = teal("dump", *options)
    assert run.code == code, run.err
    assert says in " ".join(run.err.split())
    assert "hint:" in run.err
    assert "Traceback" not in run.err
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no prompts"),
        ('{"prompt": "a"}\nnot json\n', "line 2"),
        ('{"question": "a"}\n', "'prompt' or 'text'"),
        ('{"prompt": "a"}\n', "fewer than the 3"),
    ],
)
def test_a_bad_file_of_prompts_is_named(teal: Teal, tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    run = teal("dump", "--prompts", file, "-n", 3, "-o", tmp_path / "out.zarr")
    assert run.code == 2
    assert says in " ".join(run.err.split())


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_whole(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_levels(recipe["levels"])
    assert set(recipe) <= set(KEYS)
    assert {"about", "levels", "dataset", "num_sequences", "max_new_tokens"} <= set(recipe)


@pytest.mark.parametrize("options", [("--recipe",), ("-r", "-o", "out.zarr"), ("--json", "--recipe")])
def test_recipes_are_listed(teal: Teal, options: tuple[str, ...]) -> None:
    run = teal("dump", *options)
    assert run.code == 0, run.err
    if "--json" in options:
        assert set(run.json["recipes"]) == set(shipped_recipes())
        assert all(run.json["recipes"].values())
    else:
        heading, *rows = run.out.splitlines()
        assert heading.split() == ["recipe", "about"]
        assert [row.split()[0] for row in rows] == shipped_recipes()


def test_a_recipe_gives_what_the_command_line_does_not(teal: Teal, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    options = ("-r", "offline", "-n", 1, "--prompt-tokens", 16, "--max-new-tokens", 5, "-o", store)
    assert teal("dump", *options).code == 0
    opened = open_store(store)
    assert list(opened.levels) == ["s0.50", "s0.90"]
    assert opened.header.sampling["temperature"] == 0
    assert opened.header.prompts["count"] == 1


def test_a_recipe_stands_above_files_and_variables(teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('levels = "0.5"\nmax_new_tokens = 5\ntemperature = 0\n')
    monkeypatch.setenv("TEAL_DUMP_MAX_NEW_TOKENS", "7")
    monkeypatch.setenv("TEAL_DUMP_NUM_SEQUENCES", "2")
    options = ("-r", recipe, "-d", "python-docs", "--prompt-tokens", 8, "-o", tmp_path / "out.zarr", "--json")
    assert teal("dump", *options).json["new_rows"] == 2 * 4


@pytest.mark.parametrize(
    ("content", "says"),
    [("levls = 1", "unknown key 'levls'"), ("top_p = 0", "top_p = 0, which is outside (0, 1]"), ("levels = 1", "text")],
)
def test_a_bad_recipe_is_named(teal: Teal, tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "mine.toml").write_text(content)
    run = teal("dump", "-r", tmp_path / "mine.toml", "-o", tmp_path / "out.zarr")
    assert run.code == 2
    assert says in run.err
    assert "mine.toml" in run.err


SMALL_BLOCKS = """
import sys
from teal_cli.app import main
from teal_cli.store import header
header.block_tokens = lambda channels, itemsize: 16  # commits come often, as they do with a large model
sys.exit(main(sys.argv[1:]))
"""


def run_dump(prompts: Path, store: Path, *options: str) -> subprocess.Popen[str]:
    settings = [*map(str, small(prompts, store)), "--max-new-tokens", "80", "--seed", "1"]
    command = [sys.executable, "-c", SMALL_BLOCKS, "--quiet", *settings, *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    )


def finished(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_again_and_again_it_ends_as_if_it_had_not_been(prompts: Path, tmp_path: Path, kind: int) -> None:
    """Kills come at random moments of decoding and commits."""
    whole, broken = tmp_path / "whole.zarr", tmp_path / "broken.zarr"
    finished(run_dump(prompts, whole))
    moments = random.Random(int(kind))
    interrupted = 0
    for _ in range(3):
        process = run_dump(prompts, broken, *(["--resume"] if broken.exists() else []))
        deadline = time.monotonic() + 60
        while not broken.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.8))
        process.send_signal(kind)
        process.communicate(timeout=60)
        interrupted += process.returncode != 0
    assert interrupted, "every run was over before it was killed"
    finished(run_dump(prompts, broken, "--resume"))
    expected = arrays(whole)
    got = arrays(broken)
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)

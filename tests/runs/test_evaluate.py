"""`teal eval` against transformers' own model with masking hooks, on the same windows; and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_cli import Teal
from reference_model import log_probabilities

from teal_cli.data.sources import Source, open_source
from teal_cli.data.tokenizer import load_tokenizer
from teal_cli.data.windows import cut
from teal_cli.errors import UsageError
from teal_cli.passes.score import Score, standard_error
from teal_cli.registry.registry import Registry
from teal_cli.runs.evaluate import parse_sparse_from
from teal_cli.sparsity.calibration import Calibration
from teal_cli.sparsity.plan import uniform_plan

WINDOW, START = 24, 5


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Three documents of prose, none of them the calibration's."""
    folder = tmp_path / "prose"
    folder.mkdir()
    for index, words in enumerate(("the quick brown fox jumps over the dog", "a store of rows", "zinc and copper")):
        (folder / f"{index}.txt").write_text(" ".join([words] * (6 - index)), encoding="utf-8")
    return folder


def mean_nll(found: list[torch.Tensor], targets: list[np.ndarray]) -> float:
    sums = [-p[-len(t) :].gather(1, torch.from_numpy(t)[:, None]).sum() for p, t in zip(found, targets, strict=True)]
    return float(sum(sums)) / sum(map(len, targets))


@pytest.mark.parametrize("convention", ["window", "document"])
def test_it_equals_transformers_with_masking_hooks(ready: Path, text: Path, teal: Teal, convention: str) -> None:
    arguments = ("eval", "-m", "tiny", "-d", text, "-s", "0,0.5", "--dtype", "float32", "--json", "-n", 3)
    ran = teal(*arguments, "--window", WINDOW, "--sparse-from", START, "--convention", convention)
    assert ran.code == 0, ran.err
    entry = Registry().get("tiny")
    tokenizer = load_tokenizer(entry.path)
    windows = cut(open_source(str(text)), tokenizer, convention=convention, count=3, length=WINDOW)
    inputs = [window.inputs for window in windows.windows]
    targets = [window.targets for window in windows.windows]
    plan = uniform_plan(Calibration.load(Registry().find_calibration("tiny")), 0.5)
    dense = log_probabilities(entry.path, inputs, None, START)
    sparse = log_probabilities(entry.path, inputs, plan.thresholds, START)
    first, second = ran.json["levels"]
    assert first["nll"] == pytest.approx(mean_nll(dense, targets), rel=1e-4)
    assert second["nll"] == pytest.approx(mean_nll(sparse, targets), rel=1e-4)
    assert second["perplexity"] == pytest.approx(math.exp(second["nll"]))
    tails = [(p[-len(t) :], q[-len(t) :]) for p, q, t in zip(dense, sparse, targets, strict=True)]
    kl = sum(float((p.exp() * (p - q)).sum()) for p, q in tails) / ran.json["tokens"]
    same = sum(int((p.argmax(-1) == q.argmax(-1)).sum()) for p, q in tails) / ran.json["tokens"]
    assert second["kl"] == pytest.approx(kl, rel=1e-3)
    assert second["top1"] == pytest.approx(same, abs=1.5 / ran.json["tokens"])
    assert (first["realised"], first["kl"], first["top1"]) == (0.0, 0.0, 1.0)
    assert 0.3 < second["realised"] < 0.7
    if convention == "document":
        texts = [file.read_text(encoding="utf-8") for file in sorted(text.iterdir())]
        nll = first["nll"] * ran.json["tokens"]
        assert first["word_perplexity"] == pytest.approx(math.exp(nll / sum(len(re.split(r"\s+", t)) for t in texts)))
        assert first["bits_per_byte"] == pytest.approx(nll / sum(len(t.encode()) for t in texts) / math.log(2))


class Letters:
    """A tokenizer of one token a letter."""

    bos_token_id = 0
    eos_token_id = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [0] * add_special_tokens + [ord(letter) for letter in text]


def source(*documents: str) -> Source:
    return Source("letters", None, "\n\n", lambda: iter(documents))


def test_windows_do_not_overlap_and_score_all_but_the_first() -> None:
    found = cut(source("abcdefg", "hij"), Letters(), convention="window", count=9, length=5)
    joined = [ord(letter) for letter in "abcdefg\n\nhij\n\n"]
    assert [window.inputs.tolist() for window in found.windows] == [[0, *joined[at : at + 3]] for at in (0, 4, 8)]
    assert [window.targets.tolist() for window in found.windows] == [joined[at : at + 4] for at in (0, 4, 8)]
    assert found.tokens == 12


def test_documents_score_every_token_once() -> None:
    """As lm-evaluation-harness does it: the last window is filled up with what stands before it."""
    found = cut(source("abcdefg", "", "hij"), Letters(), convention="document", count=9, length=3)
    a, b, c, d, e, f, g = map(ord, "abcdefg")
    expected = [([0, a, b], [a, b, c]), ([c, d, e], [d, e, f]), ([d, e, f], [g])]
    assert [(w.inputs.tolist(), w.targets.tolist()) for w in found.windows[:3]] == expected
    assert list(found.units) == [0, 0, 0, 1]
    assert (found.words, found.bytes, found.tokens) == (2, 10, 10)


def test_standard_error_is_that_of_clusters() -> None:
    """For units of one length it is the standard error of their means."""
    means = np.array([1.0, 2.0, 4.0])
    scores = [Score(10, 10 * mean, 0.0, 0) for mean in means]
    assert standard_error(scores, range(3)) == pytest.approx(means.std(ddof=1) / math.sqrt(3))
    assert standard_error(scores[:1], [0]) is None


@pytest.mark.parametrize(("value", "meant"), [("64", 64), ("0", 0), ("half", 0.5), ("0.01", 0.01)])
def test_sparse_from(value: str, meant: float) -> None:
    assert parse_sparse_from(value) == meant


@pytest.mark.parametrize("value", ["-1", "1.5", "most", "nan", "1e9", "inf"])
def test_sparse_from_refuses(value: str) -> None:
    with pytest.raises(UsageError, match="is no position"):
        parse_sparse_from(value)


def test_it_goes_on_where_it_stopped(ready: Path, text: Path, teal: Teal, tmp_path: Path) -> None:
    """Windows that a file holds are not run again, and the end is the same; levels can be added."""
    arguments = ("eval", "-m", "tiny", "-d", text, "--dtype", "float32", "--json", "-n", 3, "--window", WINDOW)
    whole = teal(*arguments, "-s", "0,0.5", "-o", tmp_path / "whole.json")
    assert whole.code == 0, whole.err
    state = json.loads((tmp_path / "whole.json").read_text())
    assert state["complete"]
    for sums in state["sums"].values():
        del sums["scores"]["2"]
    (tmp_path / "part.json").write_text(json.dumps({**state, "complete": False}))
    resumed = teal(*arguments, "-s", "0,0.5", "-o", tmp_path / "part.json", "--resume")
    assert resumed.code == 0, resumed.err
    for ours, theirs in zip(resumed.json["levels"], whole.json["levels"], strict=True):
        assert ours["nll"] == theirs["nll"]
        assert ours["kl"] == theirs["kl"]
    more = teal(*arguments, "-s", "0,0.25,0.5", "-o", tmp_path / "whole.json", "--resume")
    assert more.json["levels"][2] == whole.json["levels"][1]


def test_bad_input(ready: Path, text: Path, teal: Teal, tmp_path: Path) -> None:
    arguments = ("eval", "-m", "tiny", "-d", text, "--window", WINDOW)
    for extra, code, said in (
        (("-s", "0.5", "--plan", "p"), 2, "a plan says its own sparsity"),
        (("--plan", "p"), 3, "has no plan called 'p'"),
        (("--window", 4096), 2, "not even one sequence fits; lower --window to"),
        (("--sparse-from", "often"), 2, "is no position"),
        (("--resume",), 2, "nothing to resume"),
        (("-o", tmp_path / "none.json", "--resume"), 3, "no evaluation"),
        (("-o", tmp_path / "nowhere" / "found.json"), 3, "there is no folder"),
    ):
        ran = teal(*arguments, *extra)
        assert ran.code == code, ran.err
        assert said in " ".join(ran.err.split())
    made = tmp_path / "made.json"
    assert teal(*arguments, "-s", "0", "-o", made).code == 0
    assert "exists" in teal(*arguments, "-s", "0", "-o", made).err
    other = teal(*arguments, "-s", "0", "-o", made, "--resume", "--sparse-from", "half")
    assert (other.code, "what differs: sparse_from" in other.err) == (2, True)
    made.write_text("[]")
    assert "is no evaluation of teal" in teal(*arguments, "-s", "0", "-o", made, "--resume").err


def test_the_calibrations_own_text_is_told(ready: Path, teal: Teal) -> None:
    ran = teal("eval", "-m", "tiny", "-d", "python-docs", "--split", "train", "-n", 1, "--window", 64, "-s", "0.5")
    assert ran.code == 0, ran.err
    assert "this is the text that the calibration" in ran.err

"""teal in lm-evaluation-harness: against the harness's own `hf` model, and transformers with masking hooks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_cli import Teal
from reference_model import log_probabilities

from teal_cli.errors import NotFoundError, UsageError
from teal_cli.registry.registry import Registry
from teal_cli.sparsity.calibration import Calibration
from teal_cli.sparsity.plan import uniform_plan

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from teal_cli.runs.harness import TealLM

PAIRS = [
    ("The quick brown fox", " jumps over"),
    ("The quick brown fox", " jumps under"),
    ("The quick ", "fox"),  # the space goes to the continuation
    ("", "Sparse activations"),
    ("Decoding one token at a time " * 12, "reads"),  # longer than the context: cut on the left
]
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 5, "keep"]
LENGTH = 40


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def teal_model(**given: Any) -> TealLM:
    return TealLM("tiny", dtype="float32", max_length=LENGTH, **given)


def plan_thresholds(level: float) -> np.ndarray:
    return uniform_plan(Calibration.load(Registry().find_calibration("tiny")), level).thresholds


def test_dense_equals_the_harness_own_model(ready: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    ours = teal_model()
    theirs = HFLM(pretrained=str(Registry().get("tiny").path), dtype="float32", device="cpu", max_length=LENGTH)
    pairs, texts = requests("loglikelihood", PAIRS), requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    for (score, greedy), (wanted, wanted_greedy) in zip(
        ours.loglikelihood(pairs, disable_tqdm=True), theirs.loglikelihood(pairs, disable_tqdm=True), strict=True
    ):
        assert score == pytest.approx(wanted, rel=1e-4)
        assert greedy == wanted_greedy
    found = ours.loglikelihood_rolling(texts, disable_tqdm=True)
    assert found == pytest.approx(theirs.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-4)
    wanted = {"until": ["x"], "max_gen_toks": 9, "do_sample": False}
    prompts = requests("generate_until", [(context or "The", wanted) for context, _ in PAIRS])
    assert ours.generate_until(prompts, disable_tqdm=True) == theirs.generate_until(prompts, disable_tqdm=True)


@pytest.mark.parametrize(("sparse_from", "start"), [(None, None), ("0", 0), ("3", 3), ("half", 0.5)])
def test_scores_equal_transformers_with_masking_hooks(
    ready: Path, sparse_from: str | None, start: float | None
) -> None:
    ours = teal_model(sparsity=0.5, sparse_from=sparse_from)
    path, thresholds = Registry().get("tiny").path, plan_thresholds(0.5)
    found = ours.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(PAIRS, found, strict=True):
        if context:
            before, after = ours._encode_pair(context, continuation)
        else:
            before, after = [ours.prefix_token_id], ours.tok_encode(continuation)
        inputs = np.array([*before, *after][-(LENGTH + 1) : -1])
        first = len(inputs) - len(after) + 1 if start is None else start if start >= 1 else int(start * len(inputs))
        predicted = log_probabilities(path, [inputs], thresholds, int(first))[0][-len(after) :]
        assert score == pytest.approx(float(predicted[range(len(after)), after].sum()), rel=1e-4, abs=1e-4)
        assert greedy == (predicted.argmax(-1).tolist() == after)
    info = ours.get_model_info()
    assert info["teal_target"] == 0.5
    assert 0.3 < info["teal_realised"] < 0.7


def test_texts_are_scored_as_eval_scores_documents(ready: Path, teal: Teal, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXTS[0], encoding="utf-8")
    ran = teal(
        *("eval", "-m", "tiny", "-d", tmp_path / "text.txt", "-s", 0.5, "--dtype", "float32", "--json"),
        *("--convention", "document", "--window", LENGTH, "--sparse-from", 7),
    )
    assert ran.code == 0, ran.err
    ours = teal_model(sparsity=0.5, sparse_from=7)
    (found,) = ours.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXTS[0],)]), disable_tqdm=True)
    assert -found == pytest.approx(ran.json["levels"][0]["nll"] * ran.json["tokens"], rel=1e-5)


@pytest.mark.parametrize(("sparse_from", "start"), [(None, None), ("0", 0), ("2", 2)])
@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_texts_are_decoded_sparsely(ready: Path, sparse_from: str | None, start: int | None, backend: str) -> None:
    """Every token is the most likely one of transformers with masking hooks, sparse from the same position on."""
    ours = teal_model(sparsity=0.5, sparse_from=sparse_from, backend=backend)
    prompt = ours.tok_encode("The quick brown fox")
    wanted = {"until": [], "max_gen_toks": 8}
    (text,) = ours.generate_until(requests("generate_until", [("The quick brown fox", wanted)]), disable_tqdm=True)
    first = len(prompt) if start is None else start
    ids = list(prompt)
    for _ in range(8):
        predicted = log_probabilities(Registry().get("tiny").path, [np.array(ids)], plan_thresholds(0.5), first)
        ids.append(int(predicted[0][-1].argmax()))
    assert text == ours.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_generation_stops_at_a_word_and_draws_with_a_seed(ready: Path) -> None:
    ours, again = teal_model(sparsity=0.5, seed=3), teal_model(sparsity=0.5, seed=3)
    drawn = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", [("The", drawn), ("The", drawn)])
    first, second = ours.generate_until(asked, disable_tqdm=True)
    assert [first, second] == again.generate_until(asked, disable_tqdm=True)
    assert first != second
    stop = first[len(first) // 2]
    (cut,) = ours.generate_until(requests("generate_until", [("The", {**drawn, "until": stop})]), disable_tqdm=True)
    assert cut == first.partition(stop)[0]


def test_bad_input(ready: Path) -> None:
    for given, error, said in (
        ({"sparsity": 0.5, "plan": "p"}, UsageError, "a plan says its own sparsity"),
        ({"plan": "p"}, NotFoundError, "has no plan called 'p'"),
        ({"sparsity": 0.5, "sparse_from": "often"}, UsageError, "is no position"),
    ):
        with pytest.raises(error, match=said):
            teal_model(**given)
    model = teal_model()
    with pytest.raises(UsageError, match="no chat template"):
        model.apply_chat_template([{"role": "user", "content": "x"}])
    for given, said in (
        ({"max_gen_toks": LENGTH}, "leave no room"),
        ({"repetition_penalty": 2.0}, "cannot generate with repetition_penalty"),
    ):
        with pytest.raises(UsageError, match=said):
            model.generate_until(requests("generate_until", [("The", given)]), disable_tqdm=True)


def test_one_token_answers_are_told_not_to_be_sparse(ready: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = teal_model(sparsity=0.5)
    one = next(text for text in (".", ",", "a") if len(model.tok_encode(text)) == 1)
    model.loglikelihood(requests("loglikelihood", [("(", one)]), disable_tqdm=True)
    assert "nothing was sparse" in caplog.text


TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
output_type: {kind}
metric_list:
  - metric: {metric}
    aggregation: {aggregation}
    higher_is_better: true
"""


@pytest.mark.slow  # lm_eval reads every task it ships
def test_the_command_runs_local_tasks(ready: Path, tmp_path: Path) -> None:
    documents = [
        {"question": "The quick brown", "choices": [" fox jumps", " dog rests"], "gold": 0},
        {"question": "Sparse", "choices": [" columns", " activations"], "gold": 1},
    ]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    file = tmp_path / "documents.jsonl"
    (tmp_path / "choice.yaml").write_text(
        TASK.format(name="choice", file=file, kind="multiple_choice", metric="acc", aggregation="mean")
    )
    given = ["--model_args", "model=tiny,sparsity=0.5,dtype=float32", "--tasks", "choice", "--include_path", tmp_path]
    ran = subprocess.run(
        [sys.executable, "-m", "teal_cli", "lm-eval", "--json", "--model", "teal", *map(str, given)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    ours = TealLM("tiny", dtype="float32", sparsity=0.5)
    pairs = [(d["question"], " " + choice.strip()) for d in documents for choice in d["choices"]]
    scores = [score for score, _ in ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]
    right = [scores[0] > scores[1], scores[3] > scores[2]]
    assert result["results"]["choice"]["acc,none"] == np.mean(right)
    assert result["config"]["teal_target"] == 0.5


@pytest.mark.slow  # as above
def test_what_the_harness_refuses_is_a_sentence(ready: Path, teal: Teal) -> None:
    ran = teal("lm-eval", "--model", "teal", "--model_args", "model=tiny", "--tasks", "no-such-task")
    assert ran.code == 2
    assert "lm_eval: Tasks not found: no-such-task" in ran.err
    assert "teal lm-eval ls tasks" in ran.err


def test_the_harness_finds_teal_by_its_entry_point() -> None:
    (found,) = entry_points(group="lm_eval.models", name="teal")
    assert found.load() is TealLM


def test_without_the_harness_it_is_told_what_to_install(teal: Teal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    ran = teal("lm-eval", "--model", "teal", "--tasks", "choice")
    assert ran.code == 1
    assert "lm-evaluation-harness is not installed" in ran.err
    assert "teal-cli[eval]" in ran.err

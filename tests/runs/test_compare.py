"""`teal compare` against `teal generate` and transformers with masking hooks; and its page, by a strict HTML parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import html5lib
import numpy as np
import pytest
from fixtures_cli import Teal
from reference_model import log_probabilities

from teal_cli.plots.page import text
from teal_cli.registry.registry import Registry
from teal_cli.sparsity.calibration import Calibration
from teal_cli.sparsity.plan import uniform_plan

PROMPTS = ("The quick brown fox", "def keep(x, t): <b>&amp;")
NEW = 9
COMMON = ("-m", "tiny", "--dtype", "float32", "--max-new-tokens", NEW)


def compared(teal: Teal, *extra: object) -> Any:
    prompts = [given for prompt in PROMPTS for given in ("-p", prompt)]
    ran = teal("compare", *COMMON, "-s", "0.25,0.6", *prompts, "--ignore-eos", "--json", *extra)
    assert ran.code == 0, ran.err
    return ran.json


def test_texts_are_those_of_generate(ready: Path, teal: Teal) -> None:
    found = compared(teal)
    assert [level["sparsity"] for level in found["levels"]] == [0.25, 0.6]
    for prompt, told in zip(PROMPTS, found["prompts"], strict=True):
        answers = [told["dense"], *(level["answer"] for level in told["levels"])]
        for sparsity, answer in zip((0, 0.25, 0.6), answers, strict=True):
            alone = teal("generate", *COMMON, "-s", sparsity, "-p", prompt, "-t", 0, "--ignore-eos", "--json").json
            assert answer["token_ids"] == alone["token_ids"]
            assert answer["text"] == alone["text"] == "".join(answer["pieces"])
        dense = told["dense"]["token_ids"]
        for level in told["levels"]:
            ours = level["answer"]["token_ids"]
            same = [a == b for a, b in zip(dense, ours, strict=True)]
            assert level["agreement"] == pytest.approx(np.mean(same))
            assert level["parts_at"] == (same.index(False) if False in same else None)
            common = [token for token, differs in zip(ours, level["differs"], strict=True) if not differs]
            rest = iter(dense)
            assert all(token in rest for token in common), "what is not marked stands in the dense text, in order"
            assert all(level["differs"][: level["parts_at"]]) is (level["parts_at"] == 0)


def test_steps_equal_transformers_with_masking_hooks(ready: Path, teal: Teal) -> None:
    found = compared(teal)
    path, calibration = Registry().get("tiny").path, Calibration.load(Registry().find_calibration("tiny"))
    for number, target in enumerate((0.25, 0.6)):
        kl, same = [], []
        for told in found["prompts"]:
            start = len(told["prompt_ids"])
            fed = np.array([*told["prompt_ids"], *told["dense"]["token_ids"][:-1]])
            dense = log_probabilities(path, [fed], None, 0)[0][start:]
            sparse = log_probabilities(path, [fed], uniform_plan(calibration, target).thresholds, start)[0][start:]
            wanted = (dense.exp() * (dense - sparse)).sum(-1)
            assert told["levels"][number]["kl"] == pytest.approx(wanted.tolist(), rel=1e-3, abs=1e-5)
            assert told["levels"][number]["same"] == (dense.argmax(-1) == sparse.argmax(-1)).tolist()
            kl += wanted.tolist()
            same += told["levels"][number]["same"]
        level = found["levels"][number]
        assert level["kl"] == pytest.approx(np.mean(kl), rel=1e-3)
        assert level["top1"] == pytest.approx(np.mean(same))
        assert abs(level["realised"] - target) < 0.2
        assert level["agreement"] == pytest.approx(
            np.mean([p["levels"][number]["agreement"] for p in found["prompts"]])
        )


def test_an_answer_that_ends_first_parts_there(ready: Path, teal: Teal) -> None:
    """Drawn tokens meet the end of sequence sooner or later; a level that is dense in all but name never parts."""
    found = teal("compare", *COMMON, "-s", "0.000001", "-p", "The", "-t", 1, "--seed", 5, "--json").json
    (level,) = found["prompts"][0]["levels"]
    assert (level["parts_at"], level["agreement"], any(level["differs"])) == (None, 1.0, False)
    assert found["levels"][0]["kl"] < 1e-6
    assert found["levels"][0]["parts_at"] is None


def test_the_page_is_valid_and_whole(ready: Path, teal: Teal, tmp_path: Path) -> None:
    found = compared(teal, "-o", tmp_path / "page.html")
    assert found["page"] == str(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)
    assert tree.find(".//meta[@name='viewport']") is not None
    assert not [e for e in tree.iter() if {"src", "href"} & {str(name) for name in e.attrib}], "it needs no network"
    assert [quote.text for quote in tree.iter("blockquote")] == list(PROMPTS)
    for section, told in zip(tree.iter("section"), found["prompts"], strict=True):
        texts = section.findall(".//article/p[@class='text']")
        answers = [told["dense"], *(level["answer"] for level in told["levels"])]
        for shown, answer in zip(texts, answers, strict=True):
            assert "".join(shown.itertext()) == html5lib_text(answer["text"])
        for shown, level in zip(texts[1:], told["levels"], strict=True):
            pieces = zip(level["answer"]["pieces"], level["differs"], strict=True)
            marked = "".join(piece for piece, differs in pieces if differs)
            assert "".join(mark.text or "" for mark in shown.iter("mark")) == html5lib_text(marked)
    assert "exists" in teal("compare", *COMMON, "-p", "x", "-o", tmp_path / "page.html").err


def html5lib_text(value: str) -> str:
    """What a parser reads of `text`."""
    return "".join(html5lib.parseFragment(f"<p>{text(value)}</p>", namespaceHTMLElements=False).itertext())


def test_text_of_any_kind_is_valid_html() -> None:
    for code in [*range(0x200), 0x2028, 0xD800, 0xFDD1, 0xFFFE, 0xFFFF, 0x1F600, 0x1FFFF]:
        whole = f"<!DOCTYPE html><html lang='en'><head><title>x</title></head><body>a{text(chr(code))}b</body></html>"
        html5lib.HTMLParser(strict=True).parse(whole)


def test_it_is_shown_on_a_terminal(ready: Path, teal: Teal) -> None:
    ran = teal("compare", *COMMON, "-s", "0.6", "-p", PROMPTS[0], "--ignore-eos")
    assert ran.code == 0, ran.err
    assert PROMPTS[0] in ran.out
    assert "KL to dense" in ran.out


def test_bad_input(ready: Path, teal: Teal, tmp_path: Path) -> None:
    for extra, code, said in (
        (("-s", "0", "-p", "x"), 2, "nothing to compare"),
        (("-s", "0.5", "--plan", "p", "-p", "x"), 2, "a plan says its own sparsity"),
        (("--plan", "p", "-p", "x"), 3, "has no plan called 'p'"),
        (("-p", ""), 2, "has no tokens"),
        (("-p", "x", "-d", "python-docs"), 2, "exclude each other"),
        (("-p", "x" * 4000), 2, "do not fit the context"),
        (("-p", "x", "-o", tmp_path / "no" / "page.html"), 3, "there is no folder"),
        (("-p", "x", "-o", tmp_path / "page.png"), 2, "end it in .html"),
    ):
        ran = teal("compare", *COMMON, *extra)
        assert ran.code == code, ran.err
        assert said in ran.err

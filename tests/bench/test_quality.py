"""What benchmarks/quality.py makes of the committed results: panels of an earlier run stay as they were."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "quality"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("quality", ROOT / "benchmarks" / "quality.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quality", module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_committed_table_is_that_of_the_committed_results(quality: Any) -> None:
    found = list(quality.earlier(COMMITTED, []))
    table = quality.table(found).strip()
    text = (COMMITTED / "README.md").read_text(encoding="utf-8")
    assert len(found) == 4
    assert all(panel in text for panel in table.split("\n\n"))


def test_models_of_this_run_replace_their_earlier_panels(quality: Any, tmp_path: Path) -> None:
    shutil.copy(COMMITTED / "quality.json", tmp_path)
    panels = json.loads((tmp_path / "quality.json").read_text())["panels"]
    models = list(dict.fromkeys(panel["model"] for panel in panels))
    assert [panel.model for panel in quality.earlier(tmp_path, models[:1])] == [models[1]] * 2
    assert list(quality.earlier(tmp_path / "empty", [])) == []


def test_articles_come_without_their_markup(quality: Any) -> None:
    """Links, templates, tables, pictures and references go; words, in the order they had, stay. Redirects are none."""
    first = (
        "{{Infobox|name={{lang|el|a}}|x=1}}'''Anarchism''' is a [[political philosophy|philosophy]] of [[liberty]]."
        "&lt;ref name=&quot;a&quot;&gt;A &amp;amp; B&lt;/ref&gt;&lt;ref name=&quot;b&quot; /&gt; It began"
        "&lt;!-- when? --&gt; early.\n[[File:flag.png|thumb|The [[flag]] of it]]\n\n\n== History ==\n"
        "{| class=&quot;t&quot;\n| 1 || 2\n|}\nSee [http://example.org a page].\n\n== See also ==\n* [[Nothing]]\n"
    )
    pages = "".join(f'<page><text bytes="9">{text}</text></page>' for text in (first, "#REDIRECT [[A]]", "B."))
    plain = "Anarchism is a philosophy of liberty. It began early.\n\n History \n\nSee a page."
    assert quality.articles(pages, 1) == f"{plain}\n\nB."
    assert quality.articles(pages, 2) == f"{plain}\n\nB."
    assert quality.articles(pages, 3) == plain

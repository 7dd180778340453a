"""The documentation site is made, says what the code says, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import posixpath
import re
from pathlib import Path
from types import ModuleType

import pytest
from fixtures_store import HEADER

import teal_cli
from teal_cli.store.header import StoreHeader
from teal_cli.store.layout import level_arrays
from teal_kernels.spec import SITES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs/make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(make: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("site")
    make.main(str(out))
    return {str(file.relative_to(out)): file.read_text(encoding="utf-8") for file in out.rglob("*.html")}


def test_links_lead_somewhere(pages: dict[str, str]) -> None:
    ids = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    for name, html in pages.items():
        for link in re.findall(r'href="([^"]+)"', html):
            if link.startswith(("http:", "https:")):
                continue
            page, _, anchor = link.partition("#")
            page = posixpath.normpath(posixpath.join(posixpath.dirname(name), page)) if page else name
            assert page in pages, f"{name} links to {link}"
            assert not anchor or anchor in ids[page], f"{name} links to {link}"


def test_the_interface_is_there_with_its_docstrings(make: ModuleType, pages: dict[str, str]) -> None:
    files = {f"{name.replace('.', '/')}.html" for name in make.MODULES}
    assert files <= set(pages)
    face = pages["teal_cli.html"]
    for name in set(teal_cli.__all__) - {"__version__"}:
        assert f'id="{name}"' in face
    assert "max_new_tokens" in face
    assert "how many sequences of how many tokens" in face
    assert files <= set(re.findall(r'href="([^"]+)"', pages["index.html"]))


def test_the_schema_is_all_there(pages: dict[str, str]) -> None:
    html = pages["schema.html"]
    for name, spec in level_arrays(HEADER, 10, centre=SITES[:1], scale=SITES[:1]).items():
        assert f"<td>{name}</td><td>{spec.dtype.name}</td><td>{', '.join(spec.dimensions)}</td>" in html
    for name in StoreHeader.__dataclass_fields__:
        assert name in html
    assert "zstd, crc32c" in html


def test_the_readme_and_the_workflow_know_it() -> None:
    assert "docs/make.py" in (ROOT / ".github/workflows/docs.yml").read_text(encoding="utf-8")
    assert "docs/make.py" in (ROOT / "README.md").read_text(encoding="utf-8")

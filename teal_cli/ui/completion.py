"""What the shell offers after TAB: models with their sizes, calibrations, datasets, levels of a store, fixed choices.

Runs at every TAB, so it reads small JSON and TOML files and imports nothing heavy; a broken file is skipped,
since a completion must never print an error into the prompt. What the files mean is the registry's and the
store's business; only the few fields that are shown are known here.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from teal_cli.errors import TealError
from teal_cli.files import readable_size
from teal_cli.settings import BACKENDS, DTYPES, configs, teal_home
from teal_kernels.spec import SITE_PROJECTIONS

DEVICES = ("auto", "cpu", "cuda", "cuda:0")
WIDTHS = ("int8", "int4")
SPARSITIES = ("0", "0.25", "0.40", "0.50", "0.65", "0.75", "0.90")

Items = list[tuple[str, str]]
"""(value, help) pairs; the shell shows the help where it can."""


def models(incomplete: str) -> Items:
    """Names in the registry, with size and family."""
    items = []
    for path in _registered("*/model.json"):
        entry = _read_json(path)
        items.append((path.parent.name, _join(_size(entry.get("size_bytes")), entry.get("family"), entry.get("dtype"))))
    return _matching(items, incomplete)


def catalog(incomplete: str) -> Items:
    """Names that `teal download` knows, with their source."""
    items = []
    for name, entry in _shipped("models"):
        items.append((name, _join(_size(entry.get("size_bytes")), entry.get("about"), entry.get("hub"))))
    return _matching(items, incomplete)


def calibrations(ctx: typer.Context, incomplete: str) -> Items:
    """Calibrations of the model that the line names so far, or of every model."""
    return _calibrations(ctx.params.get("model") or _argument(ctx, "name"), incomplete)


def calibration_ids(ctx: typer.Context, incomplete: str) -> Items:
    """As `calibrations`, where the arguments of the line are calibrations."""
    return _calibrations(ctx.params.get("model"), incomplete)


def _calibrations(model: str | None, incomplete: str) -> Items:
    items = []
    for path in _registered(f"{model or '*'}/calibrations/*/calibration.json"):
        entry = _read_json(path)
        items.append((path.parent.name, _join(path.parents[2].name, entry.get("dataset"), entry.get("dtype"))))
    return _matching(items, incomplete)


def plans(ctx: typer.Context, incomplete: str) -> Items:
    """Plans of the model named so far, or of every model."""
    model = _argument(ctx, "model")
    items = [(path.parent.name, path.parents[2].name) for path in _registered(f"{model or '*'}/plans/*/plan.json")]
    return _matching(items, incomplete)


def datasets(incomplete: str) -> Items:
    """Names of the shipped calibration sets."""
    items = [(name, str(entry.get("description", ""))) for name, entry in _shipped("calibrate")]
    return _matching(items, incomplete)


def recipes(incomplete: str) -> Items:
    """Names of the shipped dump recipes."""
    return _matching([(name, str(entry.get("about", ""))) for name, entry in _shipped("dump")], incomplete)


def levels(ctx: typer.Context, incomplete: str) -> Items:
    """Levels of the store that the line names."""
    store = _argument(ctx, "store")
    items = []
    for path in [] if store is None else sorted(Path(store).glob("*/zarr.json")):
        attrs = _read_json(path).get("attributes", {}).get("teal", {})
        if "tokens_committed" in attrs:
            items.append((path.parent.name, f"{attrs['tokens_committed']} tokens"))
    return _matching(items, incomplete)


def sparsities(incomplete: str) -> Items:
    return _matching([(value, "") for value in SPARSITIES], incomplete)


def sites(incomplete: str) -> Items:
    """The input vectors of a layer, with the projections that read them."""
    return _matching([(site, f"feeds {', '.join(group)}") for site, group in SITE_PROJECTIONS.items()], incomplete)


def dtypes(incomplete: str) -> Items:
    return _matching([(value, "") for value in DTYPES], incomplete)


def widths(incomplete: str) -> Items:
    return _matching([(value, "") for value in WIDTHS], incomplete)


def head_widths(incomplete: str) -> Items:
    return _matching([(value, "") for value in (*WIDTHS, "none")], incomplete)


def devices(incomplete: str) -> Items:
    return _matching([(value, "") for value in DEVICES], incomplete)


def backends(incomplete: str) -> Items:
    return _matching([(value, "") for value in BACKENDS], incomplete)


def hurry() -> None:
    """Spare a TAB what typer does for a run: values checked by pydantic (0.1 s to import), help rendered as rich markup
    (another 0.1 s). Completion needs words only, and our help holds no markup.

    These are typer's own affairs; where a version of it has them elsewhere, completion is slower and nothing more.
    """
    from typer import _completion_classes, core

    if hasattr(_completion_classes, "_sanitize_help_text"):
        _completion_classes._sanitize_help_text = lambda text: text
    if hasattr(core, "_TyperParameter"):
        core._TyperParameter.process_value = lambda self, ctx, value: value  # type: ignore[method-assign]


def _argument(ctx: typer.Context, name: str) -> str | None:
    """A positional argument given so far. While an option at the end still lacks its value, click has not assigned
    the arguments to their names yet and keeps them aside."""
    return ctx.params.get(name) or next(iter(ctx.args), None)


def _registered(pattern: str) -> list[Path]:
    """Files of the registry, in order of their names; none where there is no registry."""
    try:
        return sorted((teal_home() / "models").glob(pattern))
    except TealError:
        return []


def _matching(items: Items, incomplete: str) -> Items:
    return [item for item in items if item[0].startswith(incomplete)]


def _shipped(folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, content) of every TOML file in configs/<folder>."""
    root = configs() / folder
    if not root.is_dir():
        return
    for file in sorted(root.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".toml"):
            try:
                yield file.name.removesuffix(".toml"), tomllib.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _join(*parts: object) -> str:
    return ", ".join(str(part) for part in parts if part)


def _size(size: object) -> str:
    return readable_size(size, short=True) if isinstance(size, (int, float)) else ""

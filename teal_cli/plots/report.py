"""`teal store report`: what is known of a store as one HTML page, its pictures within it."""

from __future__ import annotations

from collections.abc import Iterable

from teal_cli.files import readable_size
from teal_cli.plots.page import facts as listed
from teal_cli.plots.page import page, table, text
from teal_cli.plots.panels import KINDS, Facts, svg_of
from teal_cli.store.reader import describe
from teal_kernels.spec import PROJECTIONS

_NUMBERS = (
    ("kept", ("density",), ".1%"),
    ("2:4 fit", ("nm", "2:4", "fit"), ".1%"),
    ("4:8 fit", ("nm", "4:8", "fit"), ".1%"),
    ("blocks of 16", ("blocks", "16"), ".1%"),
    ("overlap 1", ("overlap", "1"), ".1%"),
    ("overlap 8", ("overlap", "8"), ".1%"),
    ("union of 4", ("union", "4"), ".1%"),
    ("4 sequences", ("union_across", "4"), ".1%"),
    ("imbalance of 8", ("imbalance", "8"), ".2f"),
)

_MEANS = "Means over layers; docs/statistics.md has the definitions, <code>teal store stats --json</code> every layer."


def report_page(facts: Facts) -> str:
    """The page, as HTML."""
    store = facts.store
    found, attrs = describe(store), store.attrs
    about = [
        ("model", f"{attrs['model']}, revision {attrs.get('model_revision') or 'unknown'}"),
        ("calibration", attrs.get("calibration") or "none: every level is dense"),
        ("computed", f"{attrs['dtype']}, {attrs['backend']} backend, seed {attrs['seed']}"),
        ("schema", f"{attrs['schema']}, written by teal {attrs['teal_version']}"),
        ("size", f"{readable_size(found.bytes)} in {found.files} files"),
        ("digest", attrs.get("digest") or "none"),
        ("complete", "yes" if store.complete else "no"),
    ]
    levels = [
        (level.name, level.allocation, f"{level.tokens:,}", f"{level.sequences:,}", "yes" if level.complete else "no")
        for level in found.levels
    ]
    parts = [
        listed(about),
        "<h2>Levels</h2>",
        table(("level", "allocation", "tokens", "sequences", "complete"), levels),
        *_pictures(facts),
        "<h2>Masks in numbers</h2>",
        table(("level", "projection", *(name for name, *_ in _NUMBERS)), _numbers(facts)),
        f'<p class="soft">{_MEANS}</p>',
        "<h2>Sizes</h2>",
        table(("level", "site", "dropped", "stored", "of dense", "of CSR", "of the entropy bound"), _sizes(facts)),
    ]
    return page(f"teal store: {store.path.name}", parts)


def _pictures(facts: Facts) -> Iterable[str]:
    for name, kind in KINDS.items():
        yield f'<section id="{name}"><h2>{text(kind.name)}</h2><p class="soft">{text(kind.about)}</p>'
        panels = kind.panels(facts)
        yield f'<div class="beside{"" if len(panels) == 3 else " pictures"}">'  # three in a row, or two
        for number, panel in enumerate(panels):
            svg = svg_of(panel, f"{name}{number}")
            label = text(f"{kind.name}: {panel.title}")
            named = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
            yield f'<figure class="picture">{named}</figure>'
        yield "</div></section>"


def _numbers(facts: Facts) -> Iterable[list[str]]:
    for level in dict.fromkeys(level for level, *_ in facts.rows):
        for projection in PROJECTIONS:
            values = [facts.mean(level, (projection,), *keys) for _, keys, _ in _NUMBERS]
            shown = ["-" if v is None else format(v, form) for v, (*_, form) in zip(values, _NUMBERS, strict=True)]
            yield [level, projection, *shown]


def _sizes(facts: Facts) -> Iterable[list[str]]:
    for found in facts.sites:
        site = found.site
        shares = dict.fromkeys(f"{share:.1%}" for share in site.realised.values())
        yield [
            site.level,
            site.site,
            " ".join(shares),
            readable_size(site.stored_bytes),
            f"{site.stored_bytes / site.dense_bytes:.1%}",
            f"{site.stored_bytes / site.csr_bytes:.1%}",
            f"{site.to_bound:.3f}",
        ]

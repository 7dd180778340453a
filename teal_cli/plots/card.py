"""The card of a store that is published as a dataset: README.md and a picture.

What it says comes from the store itself and from what was measured of it; of the hub it knows the address alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from teal_cli.errors import counted
from teal_cli.files import readable_size
from teal_cli.plots.panels import Facts
from teal_cli.plots.store import draw
from teal_cli.store.publish import CARD
from teal_cli.store.reader import StoreInfo, describe
from teal_kernels.spec import PROJECTIONS

PICTURE: Final = "teal-store.png"
_TAGS: Final = ("teal", "activations", "activation-sparsity", "zarr")


def card_files(facts: Facts, url: str) -> dict[str, bytes]:
    """Path in the dataset -> content, of the card and what it shows.

    Args:
        url: where the store is to be opened, such as hf://datasets/ORG/NAME.
    """
    return {CARD: card(facts, url).encode(), PICTURE: _picture(facts)}


def card(facts: Facts, url: str) -> str:
    """README.md, with the metadata that the hub reads at its head."""
    found, attrs = describe(facts.store), facts.store.attrs
    name = url.rpartition("/")[2]
    parts = [
        _metadata(name),
        f"# {name}",
        _what(facts, found),
        f"![Magnitudes of kept entries, and how far each layer is from its target]({PICTURE})",
        "## Open it",
        *_opening(url, name, facts),
        "## Provenance",
        _table(("", ""), _provenance(attrs, found)),
        "## Levels",
        _table(
            ("level", "target", "allocation", "tokens", "sequences"),
            (
                (v.name, f"{v.target:.1%}", _code(v.allocation), f"{v.tokens:,}", f"{v.sequences:,}")
                for v in found.levels
            ),
        ),
        "## Densities",
        "Share of entries that is kept, mean over layers.",
        _table(("level", *PROJECTIONS), _densities(facts)),
        "## Sizes",
        _table(("level", "stored", "of dense", "of the entropy bound"), _sizes(facts)),
    ]
    return "\n\n".join(parts) + "\n"


def _what(facts: Facts, found: StoreInfo) -> str:
    header, rows = facts.store.header, max((level.tokens for level in found.levels), default=0)
    return (
        f"Sparsified activations of {_code(header.model)}, collected by `teal` while it ran: what flowed into each "
        f"projection (q, k, v, o, gate, up, down) of all {header.layers} layers, token by token, at "
        f"{counted(len(found.levels), 'sparsity level')}, up to {rows:,} tokens each. An entry x is kept where its "
        "score, by default |x|, is above the level's threshold "
        "([TEAL, arXiv 2408.14690](https://arxiv.org/abs/2408.14690)); the "
        "others are exactly 0."
    )


def _metadata(name: str) -> str:
    values: dict[str, Any] = {"pretty_name": name, "tags": list(_TAGS), "viewer": False}
    return "\n".join(("---", *(f"{key}: {json.dumps(value)}" for key, value in values.items()), "---"))


def _opening(url: str, name: str, facts: Facts) -> Iterable[str]:
    level = facts.sparse[0]
    yield (
        f"```python\nimport teal_cli                          # pip install 'teal-cli[remote]'\n\n"
        f'store = teal_cli.open_store("{url}")   # reads what is asked for, no more\n'
        f'level = store.level("{level}")\n'
        'rows = level.projection(0, "down")[0:16]      # float32 [token, channel], dropped entries are 0\n'
        "level.tokens.token_id, level.thresholds\n```"
    )
    yield (
        f"```python\nimport xarray                            # pip install 'teal-cli[remote,xarray]'\n\n"
        f'dataset = xarray.open_dataset("{url}", engine="teal", level="{level}")\n```'
    )
    yield f"```shell\nteal store copy {url} -o {name}.zarr && teal store verify {name}.zarr\n```"
    yield "The arrays are plain Zarr v3, so that any Zarr reader opens them, too."


def _provenance(attrs: Mapping[str, Any], found: StoreInfo) -> Iterable[Sequence[str]]:
    prompts = attrs["prompts"]
    known = {key: value for key, value in prompts.items() if isinstance(value, str | int | float)}
    yield "model", f"{_code(attrs['model'])}, revision {_code(attrs['model_revision'] or 'unknown')}"
    yield "configuration", f"sha256 {_code(attrs['config_sha256'])}"
    yield "calibration", _code(attrs["calibration"]) if attrs["calibration"] else "none: every level is dense"
    yield "plan, criterion", f"{_code(attrs.get('plan') or 'uniform')}, {_code(attrs.get('criterion', {}).get('name'))}"
    yield "computed", f"{attrs['dtype']}, {_code(attrs['backend'])} backend"
    yield "prompts", f"{found.prompts or 'unknown'} {_code(json.dumps(known))}"
    yield "sampling", f"seed {attrs['seed']}, {_code(json.dumps(attrs['sampling']))}"
    yield "schema", f"{_code(attrs['schema'])}, written by teal {attrs['teal_version']}"
    yield "size", f"{readable_size(found.bytes)} in {found.files} files"
    yield "digest", _code(attrs["digest"])


def _densities(facts: Facts) -> Iterable[Sequence[str]]:
    for level in dict.fromkeys(level for level, *_ in facts.rows):
        means = (facts.mean(level, (projection,), "density") for projection in PROJECTIONS)
        yield [level, *("-" if mean is None else f"{mean:.1%}" for mean in means)]


def _sizes(facts: Facts) -> Iterable[Sequence[str]]:
    for level in dict.fromkeys(found.site.level for found in facts.sites):
        sites = [found.site for found in facts.sites if found.site.level == level]
        stored = sum(site.stored_bytes for site in sites)
        dense, bound = (
            sum(values) for values in zip(*((s.dense_bytes, s.stored_bytes / s.to_bound) for s in sites), strict=True)
        )
        yield level, readable_size(stored), f"{stored / dense:.1%}", f"{stored / bound:.3f}"


def _picture(facts: Facts) -> bytes:
    """Kept entries of a middle layer, and realised sparsity of all."""
    with TemporaryDirectory() as folder:
        file = Path(folder, PICTURE)
        draw(facts.store, file, layer=facts.store.header.layers // 2, site="mlp_mid", levels=facts.levels)
        return file.read_bytes()


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (headings, ["---"] * len(headings), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(value: object) -> str:
    """Text of a store as code within a table: nothing in it is Markdown, nor ends the cell."""
    text = " ".join(str(value).split())
    ticks = "`" * (1 + max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}".replace("|", "\\|")

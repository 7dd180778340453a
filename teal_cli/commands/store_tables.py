"""The tables that `teal store stats` shows. No command by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from teal_cli.ui.table import show_table

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.store.measures import Row
    from teal_cli.store.stats import Measured, SiteStats


def show_stats(console: Console, found: Sequence[Measured]) -> None:
    """Sizes per site, then the masks of each level and projection, averaged over layers."""
    headings = (
        "level",
        "site",
        "dropped",
        ">B/elem",
        ">/dense",
        ">/CSR",
        ">/bound",
        ">channels",
        ">overlap",
        ">chance",
    )
    show_table(console, headings, [_size(measured.site) for measured in found], keys=2)
    console.print(
        "\ndropped: realised, one figure per projection where they differ. bound: order-0 entropy of mask and values."
        "\nchannels: how often a channel is kept, 5th to 95th percentile. overlap: kept entries that the token before"
        "\nkept too; chance: the same for independent tokens.\n",
        style="dim",
    )
    masks = ("level", "projection", ">kept", ">2:4 fit", ">4:8 fit", ">block 16", ">overlap 8", ">union 4",
             ">across 4", ">imbalance 8", ">bits/entry")  # fmt: skip
    show_table(console, masks, [_mask(rows) for rows in _by_projection(found)], keys=2)
    console.print(
        "\nMeans over layers. fit: kept entries that N:M holds. block 16: aligned blocks of 16 channels that keep any."
        "\nunion 4: kept by any of 4 tokens, of one sequence or across. imbalance 8: largest of 8 parts over the mean."
        "\nbits: entropy of the mask. --json and --output have every layer and all statistics (docs/statistics.md).",
        style="dim",
    )


def _size(site: SiteStats) -> list[object]:
    shares = list(dict.fromkeys(f"{share:.1%}" for share in site.realised.values()))
    return [
        site.level,
        site.site,
        " ".join(shares),
        f"{site.bytes_per_element:.3f}",
        f"{site.stored_bytes / site.dense_bytes:.1%}",
        f"{site.stored_bytes / site.csr_bytes:.1%}",
        f"{site.to_bound:.3f}",
        f"{site.channel_keep[0]:.0%}-{site.channel_keep[-1]:.0%}",
        "" if site.overlap is None else f"{site.overlap:.1%}",
        f"{site.overlap_by_chance:.1%}",
    ]


def _by_projection(found: Sequence[Measured]) -> list[list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for measured in found:
        for row in measured.rows:
            groups.setdefault((row.level, row.projection), []).append(row)
    return list(groups.values())


def _mask(rows: Sequence[Row]) -> list[object]:
    values = [row.values() for row in rows]

    def mean(*keys: str, form: str = ".1%") -> str:
        numbers = []
        for value in values:
            for key in keys:
                value = value[key]
            if value is not None:
                numbers.append(float(value))  # type: ignore[arg-type]
        return format(sum(numbers) / len(numbers), form) if numbers else ""

    first = values[0]
    entropy = sum(value["bits"]["entropy"] for value in values) / len(values) / first["channels"]
    return [
        first["level"], first["projection"], mean("density"), mean("nm", "2:4", "fit"), mean("nm", "4:8", "fit"),
        mean("blocks", "16"), mean("overlap", "8"), mean("union", "4"), mean("union_across", "4"),
        mean("imbalance", "8", form=".2f"), f"{entropy:.3f}",
    ]  # fmt: skip

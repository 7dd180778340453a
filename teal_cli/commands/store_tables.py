"""What `teal store info`, `verify` and `stats` show. No command by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from teal_cli.errors import counted
from teal_cli.files import readable_size
from teal_cli.ui.table import short_hash, show_fields, show_table, show_text

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.runs.replay import Replayed
    from teal_cli.store.measures import Row
    from teal_cli.store.reader import StoreInfo
    from teal_cli.store.stats import Measured, SiteStats


_SHOWN_PROBLEMS: Final = 10
_SIZES: Final = (
    "dropped: realised, one figure per projection where they differ. bound: order-0 entropy of mask and values.",
    "channels: how often a channel is kept, 5th to 95th percentile.",
    "overlap: kept entries that the token before kept too; chance: the same for independent tokens.",
)
_MASKS: Final = (
    "Means over layers. fit: kept entries that N:M holds. block 16: aligned blocks of 16 channels that keep any.",
    "union 4: kept by any of 4 tokens, of one sequence or across. imbalance 8: largest of 8 parts over the mean.",
    "bits: entropy of the mask. --json and --output have every layer and all statistics (docs/statistics.md).",
)


def show_info(console: Console, found: StoreInfo, prompt: str | None) -> None:
    """Where a store comes from, its levels, and the prompts that hold a text that was looked for."""
    about: Mapping[str, Any] = found.attributes
    console.print(found.path, style="bold", markup=False, soft_wrap=True)
    prompts = "" if found.prompts is None else f", {counted(found.prompts, 'prompt')}"
    schema = (
        f"{about['schema']}, {counted(about['layers'], 'layer')}, values {about['value_dtype']}, "
        f"blocks of {counted(about['block_tokens'], 'token')}, teal {about['teal_version']}"
    )
    fields = {
        "model": f"{about['model']} ({short_hash(about['model_revision']) or 'no revision'})",
        "calibration": about["calibration"] or "none: every level is dense",
        "computed": f"{about['dtype']} on the {about['backend']} backend, seed {about['seed']}{prompts}",
        "schema": schema,
        **({"parts": ", ".join(found.parts)} if found.parts else {}),
        "size": f"{readable_size(found.bytes)} in {counted(found.files, 'file')}",
        "digest": about.get("digest") or "none",
        "complete": "yes" if about["complete"] else "no; `teal dump --resume` goes on",
    }
    show_fields(console, fields)
    console.print()
    rows = []
    for level in found.levels:
        state = "yes" if level.complete else f"no, of at most {level.max_tokens:,}"
        rows.append((level.name, level.allocation, f"{level.tokens:,}", f"{level.sequences:,}", state))
    show_table(console, ("level", "allocation", ">tokens", ">sequences", "complete"), rows)
    if prompt is not None:
        for match in found.matches:
            where = ", ".join(f"{level} {start}:{stop}" for level, (start, stop) in match.rows.items()) or "no rows yet"
            console.print(f"sequence {match.sequence}: tokens {where}", markup=False)
        if not found.matches:
            console.print("no prompt contains that text", markup=False)


def show_verified(console: Console, found: dict[str, Any], again: list[Replayed]) -> None:
    """What `verify` read, what it found wrong, and how rows came out that were computed again."""
    store, problems = found["store"], found["problems"]
    if again:
        equal, worst = sum(row.equal for row in again), max(row.error for row in again)
        rest = "" if equal == len(again) else f"; the others follow from what is before them within {worst:.1e}"
        console.print(f"{counted(len(again), 'row')} computed again: {equal} bit for bit{rest}", markup=False)
    if not problems:
        console.print(
            f"{store}: whole. {counted(found['blocks'], 'block')} of sites read, nothing wrong.", markup=False
        )
        return
    console.print(f"{store}: {counted(len(problems), 'problem')}", markup=False)
    for problem in problems[:_SHOWN_PROBLEMS]:
        console.print(f"  {problem}", markup=False)
    if len(problems) > _SHOWN_PROBLEMS:
        console.print(f"  and {len(problems) - _SHOWN_PROBLEMS:,} more (--json lists them all)", markup=False)


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
    console.print()
    for line in _SIZES:
        show_text(console, line, "dim")
    console.print()
    masks = ("level", "projection", ">kept", ">2:4 fit", ">4:8 fit", ">block 16", ">overlap 8", ">union 4",
             ">across 4", ">imbalance 8", ">bits/entry")  # fmt: skip
    show_table(console, masks, [_mask(rows) for rows in _by_projection(found)], keys=2)
    console.print()
    for line in _MASKS:
        show_text(console, line, "dim")


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

"""A comparison as one HTML page: texts beside each other, differing tokens marked, the divergence of each step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from teal_cli.plots.page import page, table, text
from teal_cli.runs.compare import Answer, Comparison, LevelAnswer, LevelSummary, PromptComparison

HEADINGS = ("level", "dropped", "same tokens", "prompts that part", "part at token", "KL to dense", "same top-1")


_LEGEND = (
    '<p class="soft">Same tokens: at the same place as in the dense text. KL (in nats) and top-1: of steps that are '
    "fed the dense model's tokens. <mark>Marked</mark> tokens differ from the dense text, once what both have in "
    "common is laid side by side.</p>"
)


def cells(level: LevelSummary, prompts: int) -> tuple[str, ...]:
    """A row of the table of levels, under `HEADINGS`."""
    return (
        level.label,
        f"{level.realised:.1%}",
        f"{level.agreement:.1%}",
        f"{level.parted} of {prompts}",
        "-" if level.parts_at is None else f"{level.parts_at + 1:g}",
        f"{level.kl:.4f}",
        f"{level.top1:.1%}",
    )


def runs(answer: Answer, differs: Sequence[bool]) -> list[tuple[bool, str]]:
    """The text of an answer cut where what differs begins and ends."""
    pairs = groupby(zip(differs, answer.pieces, strict=True), key=lambda pair: pair[0])
    return [(marked, "".join(piece for _, piece in group)) for marked, group in pairs]


def compare_page(found: Comparison) -> str:
    """The page, as HTML."""
    drawn = "greedy" if found.temperature == 0 else f"temperature {found.temperature:g}, seed {found.seed}"
    made = f"calibration {found.calibration}, " if found.calibration else ""
    parts = [
        f'<p class="soft">{text(f"{made}{found.dtype}, {found.backend} on {found.device}, {drawn}")}</p>',
        table(HEADINGS, (cells(level, len(found.prompts)) for level in found.levels)),
        _LEGEND,
    ]
    parts += [_section(found, number, prompt) for number, prompt in enumerate(found.prompts, 1)]
    return page(f"teal compare: {found.model}", parts)


def _section(found: Comparison, number: int, prompt: PromptComparison) -> str:
    columns = [f'<article><h3>dense</h3><p class="text">{text(prompt.dense.text)}</p></article>']
    highest = max((value for level in prompt.levels for value in level.kl), default=0.0)
    columns += [
        _level(summary.label, level, highest) for summary, level in zip(found.levels, prompt.levels, strict=True)
    ]
    return "\n".join(
        (
            "<section>",
            f'<h2>Prompt {number}</h2><blockquote class="text">{text(prompt.prompt)}</blockquote>',
            '<div class="beside">',
            *columns,
            "</div>",
            "</section>",
        )
    )


def _level(label: str, level: LevelAnswer, highest: float) -> str:
    marked = "".join(
        f"<mark>{text(piece)}</mark>" if differs else text(piece)
        for differs, piece in runs(level.answer, level.differs)
    )
    where = "does not part from it" if level.parts_at is None else f"parts at token {level.parts_at + 1}"
    said = f"{where}; {level.agreement:.0%} the same tokens"
    return (
        f'<article><h3>{text(label)}</h3><p class="soft">{text(said)}</p>'
        f'<p class="text">{marked}</p>{_bars(level, highest)}</article>'
    )


def _bars(level: LevelAnswer, highest: float) -> str:
    """KL of each step as a small picture; hollow where the most likely token is another one."""
    if not level.kl or not highest:
        return ""
    width, height = 4 * len(level.kl), 40
    bars = []
    for step, (value, same) in enumerate(zip(level.kl, level.same, strict=True)):
        tall = max(0.5, height * value / highest)
        fill = "currentColor" if same else "none"
        bars.append(
            f'<rect x="{4 * step + 0.5:g}" y="{height - tall:.2f}" width="3" height="{tall:.2f}" fill="{fill}" '
            f'stroke="currentColor" stroke-width="0.5"><title>step {step + 1}: {value:.4f} nats</title></rect>'
        )
    mean = sum(level.kl) / len(level.kl)
    return (
        f'<figure><svg viewBox="0 0 {width} {height + 1}" width="{width}" height="{height + 1}" '
        f'preserveAspectRatio="none" role="img" aria-label="KL to dense of each step">{"".join(bars)}</svg>'
        f"<figcaption>KL to dense, step by step; mean {mean:.4f}, highest {max(level.kl):.3f} nats; hollow: another "
        "token is the most likely</figcaption></figure>"
    )

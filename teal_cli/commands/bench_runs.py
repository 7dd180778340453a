"""What the commands of `teal bench` share: what was asked for is read, what is measured opened, the run
shown, its result kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from teal_cli import settings
from teal_cli.errors import UsageError
from teal_cli.ui.output import Output
from teal_cli.ui.progress import progress

if TYPE_CHECKING:
    import torch

    from teal_cli.bench.rows import Progress, Row
    from teal_cli.bench.shapes import MatrixShape
    from teal_cli.bench.subjects import Subject
    from teal_cli.runs.session import Session


def open_model(
    out: Output,
    model: str | None,
    device: str,
    calibration: str | None,
    chosen: dict[str, Any],
    asked: dict[str, Any],
    *,
    calibrated: bool = True,
) -> Session:
    """The model, with its calibration where it needs one; both names go into `asked`, which the result records."""
    from teal_cli.runs.session import open_session

    session = open_session(model, device=device, calibration=calibration, **chosen, load=False)
    asked["model"] = session.entry.name
    if calibrated:
        out.note(f"calibration {session.calibration.id} of {session.entry.name}")
        asked["calibration"] = session.calibration.id
    for note in session.notes:
        out.note(note)
    return session


def open_stack(
    parsed: tuple[str, Any, int],
    device: torch.device,
    levels: tuple[float, ...],
    prompt_tokens: int,
    seed: int,
    chosen: dict[str, Any],
) -> Subject:
    from teal_cli.bench.subjects import stack
    from teal_cli.runs.session import DTYPES

    dtype, backend = DTYPES[chosen["dtype"] or "bfloat16"], chosen["backend"]
    backend = None if backend == "auto" else backend
    return stack(*parsed, levels, prompt_tokens, dtype=dtype, device=device, backend=backend, seed=seed)


def finish(
    out: Output,
    command: str,
    device: torch.device,
    asked: dict[str, Any],
    runs: Iterable[Iterable[Progress | Row]],
    path: Path | None,
    unit: str,
) -> None:
    """Measure, show, write; exit 1 if a check failed."""
    from teal_cli.bench.machine import describe
    from teal_cli.bench.results import Result, save
    from teal_cli.bench.rows import Progress
    from teal_cli.bench.tables import show

    machine = describe(device)
    rows: list[Row] = []
    with progress(out) as bars:
        task = bars.task("Measuring bandwidth", unit=unit)
        for run in runs:
            for event in run:
                if isinstance(event, Progress):
                    task.update(done=event.done, total=event.total, text=event.text)
                else:
                    rows.append(event)
    result = Result(command, machine, asked, rows)
    if path is not None:
        save(result, path)
    out.result(result.as_dict(), lambda console: show(console, result))
    if path is not None:
        out.note(f"written to {path}; `teal plot bench {path} -o bench.png` draws it")
    if result.failed:
        out.warn(f"{len(result.failed)} of {len(rows)} rows failed their check and have no time")
        raise typer.Exit(1)


def asked_matrices(shapes: str | None, model: str | None, replayed: str | None) -> list[MatrixShape]:
    """The matrices that --shapes and --model name; those of the model of a store, where only that is given."""
    from teal_cli.bench.shapes import matrices_of, merge, parse_shapes
    from teal_cli.model.config import load_config
    from teal_cli.registry.registry import Registry

    matrices = parse_shapes(shapes) if shapes else []
    if model or (replayed and not shapes):
        entry = Registry().get(model or replayed)
        matrices += matrices_of(entry.name, load_config(entry.path))
    return merge(matrices) or parse_shapes("all")


def asked_dtypes(text: str) -> list[str]:
    """The names that --dtype lists."""
    try:
        return [settings.dtype(name.strip()) for name in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--dtype {text!r} {error}", hint="e.g. --dtype bfloat16,float16") from None


def asked_levels(text: str | None, available: tuple[float, ...] | None) -> tuple[float, ...]:
    """The sparsities above 0 that were asked for; of a store, those that it has."""
    from teal_cli.store.schema import parse_levels

    wanted = tuple(level for level in parse_levels(text) if level > 0) if text else available or ()
    if not wanted:
        raise UsageError("there is no sparsity above 0 to measure", hint="dense is measured always; try -s 0.5")
    missing = [level for level in wanted if available is not None and level not in available]
    if missing:
        raise UsageError(
            f"the store has no level {missing[0]:.2f}", hint=f"it has {', '.join(map(str, available or ()))}"
        )
    return wanted

"""`teal doctor`: look at everything, show it as a list."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from teal_cli.ui.options import JsonOption, OfflineOption, QuietOption
from teal_cli.ui.output import output
from teal_cli.ui.table import beside

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.commands.health import Finding

_INDENT = 30
"""Columns before what was found; a longer name takes its own room."""
_MARKS = {"ok": "[green]ok[/green]  ", "warn": "[yellow]warn[/yellow]", "fail": "[red]fail[/red]"}


def doctor(*, offline: OfflineOption, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """What this machine can do, and what is missing.

    Looks at versions, settings, storage, devices, kernels (each is run against exact arithmetic), models and
    the network. Exits 0 if everything essential works, 5 if a device or a kernel does not, 1 otherwise.

    Examples:
        teal doctor
        teal doctor --offline --json
    """
    from teal_cli.commands.health import examine, summary

    out = output(json, quiet)
    findings: list[Finding] = []
    area = ""
    for finding in examine(offline=offline):
        findings.append(finding)
        if not out.json:
            _show(out.console, finding, heading=finding.area != area)
            area = finding.area
    sound, code = summary(findings)

    def verdict(console: Console) -> None:
        warnings = sum(finding.status == "warn" for finding in findings)
        failures = sum(finding.status == "fail" for finding in findings)
        counts = f" (failed: {failures}, warnings: {warnings})" if failures or warnings else ""
        console.print(f"\n{'Everything essential works' if sound else 'Something essential is broken'}{counts}.")

    out.result({"ok": sound, "exit_code": code, "findings": findings}, verdict)
    if code:
        raise typer.Exit(code)


def _show(console: Console, finding: Finding, *, heading: bool) -> None:
    if heading:
        console.print(f"\n[bold]{finding.area}[/bold]")
    console.print(f"  {_MARKS[finding.status]} ", end="")
    indent = max(_INDENT, 7 + len(finding.name) + 1)
    first, *rest = beside(console, indent, finding.detail)
    console.print(f"{finding.name:<{indent - 8}} {first}", markup=False, soft_wrap=True)
    for line in rest:
        console.print(f"{'':{indent}}{line}", markup=False, soft_wrap=True)
    for line in beside(console, _INDENT, finding.hint) if finding.hint else ():
        console.print(f"{'':{_INDENT}}{line}", style="dim", markup=False, soft_wrap=True)

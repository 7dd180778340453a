"""What commands that decode share: opening a session, and the line that says what a result was made with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teal_cli.ui.output import Output
from teal_cli.ui.progress import progress

if TYPE_CHECKING:
    from teal_cli.runs.session import Session


def opened(
    out: Output,
    *,
    model: str | None,
    dtype: str | None,
    device: str,
    backend: str,
    calibration: str | None,
) -> Session:
    """The session that these options ask for. Raises as `open_session`."""
    from teal_cli.decoding.steps import compile_step, must_compile
    from teal_cli.runs.session import open_session

    with progress(out) as bars:
        task = bars.task("Loading the model", unit="layers")
        session = open_session(
            model,
            dtype=dtype,
            device=device,
            backend=backend,
            calibration=calibration,
            progress=lambda done, total: task.update(done=done, total=total),
        )
        if must_compile(session.backend, session.model):
            compiling = bars.task("Compiling the decode step for this processor, once", total=1, unit="steps")
            compile_step(session.model)
            compiling.update(done=1)
        return session


def made_with(model: str, calibration: str | None, *plans: str | None) -> str:
    """Which plans and calibration of which model a result came from, in one line.

    Args:
        calibration: None on the dense path.
        plans: names; None stands for a uniform plan.
    """
    named = [f"plan {plan}" for plan in plans if plan is not None]
    named += [f"calibration {calibration}"] if calibration is not None else []
    return f"{', '.join(named)} of {model}" if named else f"dense, {model}"

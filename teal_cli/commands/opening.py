"""Opening a session for a command: options in, a bar while the model loads. No command by itself."""

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
        if must_compile(session.backend, session.model.dtype):
            compiling = bars.task("Compiling the decode step for this processor, once", total=1, unit="steps")
            compile_step(session.model.dtype)
            compiling.update(done=1)
        return session

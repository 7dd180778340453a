"""Opening a session for a command: options and settings in, a bar while the model loads. No command by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teal_cli.settings import Settings
from teal_cli.ui.output import Output
from teal_cli.ui.progress import progress

if TYPE_CHECKING:
    from teal_cli.runs.session import Session


def opened(
    out: Output,
    given: Settings,
    *,
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    backend: str | None = None,
    calibration: str | None = None,
) -> Session:
    """The session that these options ask for; what is None comes from the settings. Raises as `open_session`."""
    from teal_cli.decoding.steps import compile_step, must_compile
    from teal_cli.runs.session import open_session

    with progress(out) as bars:
        task = bars.task("Loading the model", unit="layers")
        session = open_session(
            given.pick("model", model),
            dtype=given.pick("dtype", dtype),
            device=given.pick("device", device),
            backend=given.pick("backend", backend),
            calibration=given.pick("calibration", calibration),
            progress=lambda done, total: task.update(done=done, total=total),
        )
        if must_compile(session.backend, session.model.dtype):
            compiling = bars.task("Compiling the decode step for this processor, once", total=1, unit="steps")
            compile_step(session.model.dtype)
            compiling.update(done=1)
        return session

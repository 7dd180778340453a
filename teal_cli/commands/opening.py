"""What commands that decode share: loading the model, and the line that says what a result was made with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from teal_cli.ui.output import Output
from teal_cli.ui.progress import Bars, progress

if TYPE_CHECKING:
    from teal_cli.runs.session import Session


def opened(
    out: Output, *, model: str | None, dtype: str | None, device: str, backend: str, calibration: str | None
) -> Session:
    """A session with its weights, where nothing more can be checked before them. Raises as `open_session`."""
    from teal_cli.runs.session import open_session

    session = open_session(model, dtype=dtype, device=device, backend=backend, calibration=calibration, load=False)
    load(out, session)
    return session


def load(out: Output, session: Session, *, decodes: bool = True) -> None:
    """Read the weights, and compile where this processor has no step yet; called once all else is known to be right.

    Args:
        decodes: whether a step is needed.

    Raises:
        TealError: the checkpoint is damaged.
    """
    from teal_cli.decoding.steps import compile_step, must_compile

    with progress(out) as bars:
        model = session.load(loading(bars, session.entry.size_bytes))
        if decodes and must_compile(session.backend, model):
            compiling = bars.task("Compiling the decode step for this processor, once", total=1, unit="steps")
            compiling.update(done=0)
            compile_step(model)
            compiling.update(done=1)


def loading(bars: Bars, size: int) -> Callable[[int, int], None]:
    """What to call with (layers loaded, layers): a bar of bytes, from the first layer on.

    Args:
        size: bytes of the model's files.
    """
    task = bars.task("Loading the model", total=size, unit="B")

    def loaded(done: int, layers: int) -> None:
        task.update(done=size * done / layers)

    return loaded


def made_with(model: str, calibration: str | None, *plans: str | None) -> str:
    """Which plans and calibration of which model a result came from, in one line.

    Args:
        calibration: None on the dense path.
        plans: names; None stands for a uniform plan.
    """
    named = [f"plan {plan}" for plan in plans if plan is not None]
    named += [f"calibration {calibration}"] if calibration is not None else []
    return f"{', '.join(named)} of {model}" if named else f"dense, {model}"

"""What can be asked of `teal plan make`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from teal_cli.checks import check_sparsity
from teal_cli.errors import UsageError
from teal_cli.sparsity.criterion import MAGNITUDE, TOPK

DEFAULT_TOKENS: Final = {"uniform": 4096, "greedy": 4096, "fisher": 4096, "learned": 327_680}
"""The allocations there are, and of how many tokens each makes a plan where no number is asked for."""


@dataclass(frozen=True)
class PlanRequest:
    """What plans to make.

    Attributes:
        targets: of sparsity over the model, each in (0, 1) and once: a plan each.
        name: of the plan, where there is one target; None makes a name.
        model, calibration: as `Registry` finds them; None takes the default ones.
        allocation: one of `DEFAULT_TOKENS`. criterion: one of `CRITERIA`.
        closed_loop: thresholds from what the sparse model computes.
        dataset, split: text for gradients, scores and the check; None takes the calibration's.
        tokens: about how many, 0 for as many as the allocation needs; seq_len: of each sequence.
        start: rows from this position on are what decoding makes sparse.
        seed: of labels drawn from the model.
        dtype: to compute in; None takes the checkpoint's own, but float32 for float16, in which gradients vanish, and
            for greedy, whose block errors are small beside what bfloat16 rounds off a residual stream.
        device: as `choose_device` takes it.
        force: replace a plan of that name.
    """

    targets: tuple[float, ...]
    name: str | None = None
    model: str | None = None
    calibration: str | None = None
    allocation: str = "uniform"
    criterion: str = MAGNITUDE
    closed_loop: bool = False
    dataset: str | None = None
    split: str | None = None
    tokens: int = 0
    seq_len: int = 512
    start: int = 64
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    force: bool = False

    def check(self) -> None:
        """Refuse what cannot be asked together.

        Raises:
            UsageError: it cannot.
        """
        for target in self.targets:
            check_sparsity(target)
        if 0 in self.targets:
            raise UsageError("a plan at sparsity 0 drops nothing", hint="use --sparsity 0 where a plan is asked for")
        if self.name is not None and len(self.targets) > 1:
            raise UsageError(
                f"one name for {len(self.targets)} plans", hint="leave --name away: each is named after its target"
            )
        if self.closed_loop and self.criterion == TOPK:
            raise UsageError(
                "topk drops as much of any row, so there is no loop to close", hint="leave --closed-loop away"
            )
        if self.allocation == "learned" and (self.closed_loop or self.criterion != MAGNITUDE):
            raise UsageError(
                "learned thresholds are of magnitudes, and of what the sparse model computes",
                hint="leave --criterion and --closed-loop away",
            )

    @property
    def needs_text(self) -> bool:
        """Whether the calibration alone does not give the plans."""
        return self.allocation != "uniform" or self.criterion != MAGNITUDE or self.closed_loop

    def names(self) -> dict[float, str]:
        """Target -> name of its plan."""
        parts = [self.allocation]
        parts += [self.criterion] * (self.criterion != MAGNITUDE) + ["closed"] * self.closed_loop
        return {target: self.name or f"{'-'.join(parts)}-{target:g}" for target in self.targets}

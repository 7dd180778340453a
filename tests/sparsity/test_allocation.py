"""Spending a budget over convex and other losses."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from teal_cli.sparsity.allocation import spend

LEVELS = np.round(np.arange(0.0, 1.0, 0.05), 4)


def problem(seed: int, projections: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    losses = np.cumsum(generator.exponential(size=(projections, len(LEVELS))), axis=1)
    return losses, generator.integers(1, 20, projections).astype(float)


def value(losses: np.ndarray, found: np.ndarray) -> float:
    """Loss of a choice on the lower convex hull, by linear programming over mixtures of levels."""
    total = 0.0
    for loss, level in zip(losses, found, strict=True):
        best = linprog(loss, A_eq=[np.ones_like(LEVELS), LEVELS], b_eq=[1.0, level], bounds=(0, None))
        total += best.fun
    return total


@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(0.05, 0.9))
def test_it_meets_the_budget_and_is_the_optimum(seed: int, projections: int, target: float) -> None:
    losses, weights = problem(seed, projections)
    found = spend(losses, LEVELS, weights, target, lowest=np.zeros(projections), highest=np.full(projections, 0.95))
    assert np.isclose((found * weights).sum(), target * weights.sum())
    # The relaxed problem as one linear programme: mixtures of levels of every projection under the shared budget.
    count = len(LEVELS)
    sums = np.kron(np.eye(projections), np.ones(count))
    budget = (weights[:, None] * LEVELS).ravel()
    best = linprog(
        losses.ravel(), A_eq=[*sums, budget], b_eq=[*np.ones(projections), target * weights.sum()], bounds=(0, None)
    )
    assert value(losses, found) <= best.fun * (1 + 1e-6) + 1e-9


def test_bounds_hold() -> None:
    losses, weights = problem(1, 4)
    losses[0] = 0  # free to drop, but for the bound
    found = spend(losses, LEVELS, weights, 0.5, lowest=np.full(4, 0.35), highest=np.full(4, 0.65))
    assert found[0] == 0.65
    assert ((found >= 0.35) & (found <= 0.65)).all()


def test_an_unreachable_budget_gives_the_bounds() -> None:
    losses, weights = problem(2, 3)
    assert (spend(losses, LEVELS, weights, 0.9, lowest=np.zeros(3), highest=np.full(3, 0.5)) == 0.5).all()

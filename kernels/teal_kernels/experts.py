"""The MLPs of a mixture of experts, as the two matrices of an ordinary MLP that differ from token to token.

A token passes k of E experts. Put side by side, their gates and ups are one matrix [hidden, 2 k width], and their
downs, each times the weight that the router gives it, one under the other, are one matrix [k width, hidden]. So a layer
has the four sites that every layer has, and the vector at `mlp_mid` is that of the first of the token's experts, then
of the second, and so on. Only experts that a token passes are read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NoReturn, Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from teal_kernels.matrix import FloatMatrix, Matrix

EXPERT: Final = "expert"
"""Beside the sites, what rows have of a token's experts."""

Multiply = Callable[[Tensor, Matrix], Tensor]
"""(x [n, K], matrix [K, N]) -> [n, N]."""


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts tokens pass.

    Attributes:
        experts: int64 [S, k], the experts of each token in ascending order.
        weights: [S, k], what their outputs are multiplied by, in the dtype of the vectors.
    """

    experts: Tensor
    weights: Tensor

    @cached_property
    def groups(self) -> list[tuple[int, Tensor, Tensor]]:
        """(expert, tokens, places): of every expert that a token passes, int64 [n], its tokens and where in them it
        stands; experts ascending."""
        found = []
        for expert in self.experts.unique().tolist():
            tokens, places = torch.where(self.experts == expert)
            found.append((expert, tokens, places))
        return found


def expert_limits(table: Tensor, routing: Routing, width: int) -> Tensor:
    """What the vectors between the two halves of tokens' experts are compared with.

    Args:
        table: float32 [E], a threshold for each expert of the layer.
        width: of an expert.

    Returns:
        float32 [S, k width].
    """
    return table[routing.experts].repeat_interleave(width, -1)


def route(x: Tensor, router: Tensor, k: int, *, normalised: bool) -> Routing:
    """The k experts of each token that the router finds likeliest.

    Args:
        x: [S, hidden], as the experts read it before anything is dropped.
        router: [E, hidden].
        normalised: the weights of a token's experts sum to one; otherwise they are its probabilities among all experts.
    """
    weights, experts = linear(x, router).float().softmax(-1).topk(k)
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    experts, order = experts.sort(-1)
    return Routing(experts, weights.gather(-1, order).to(x.dtype))


class Experts(Matrix):
    """One matrix of every expert of a layer; `routed` makes of it the matrix that tokens are multiplied by.

    Args:
        data: [E, K, N] contiguous, floats.
        segments: output widths of the projections of one expert, equal, sum N.
        count: k, how many experts a token passes.
    """

    routing: Routing | None = None

    def __init__(self, data: Tensor, segments: Sequence[int], count: int) -> None:
        self.data, self.count = data, count
        self.each = tuple(FloatMatrix(matrix, tuple(segments)) for matrix in data)
        self.dtype, self.kind = data.dtype, self.each[0].kind

    def routed(self, routing: Routing) -> Self:
        """The same memory, for tokens whose experts are known."""
        matrix = copy(self)
        matrix.routing = routing
        return matrix

    @abstractmethod
    def product(self, x: Tensor, multiply: Multiply) -> Tensor:
        """x [S, K] times the matrix of its token -> [S, N]; `multiply` is called for each expert that has tokens."""

    def dense(self, x: Tensor, projection: int | None = None) -> Tensor:
        return self.product(x, lambda part, matrix: matrix.dense(part, projection))

    @property
    def known(self) -> Routing:
        """The experts of the tokens.

        Raises:
            ValueError: nobody said which they are.
        """
        if self.routing is None:
            raise ValueError("a mixture of experts is a matrix only for tokens whose experts are known")
        return self.routing

    def tensor(self) -> NoReturn:
        raise ValueError("a mixture of experts has a matrix for each token, not one for all")

    def rows(self, index: Tensor | slice) -> NoReturn:
        self.tensor()

    def dense_transposed(self, x: Tensor) -> NoReturn:
        self.tensor()


class ExpertInputs(Experts):
    """gate and up of the experts: [hidden, 2 k width], all gates and then all ups."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[1], sum(self.segments)

    @property
    def segments(self) -> tuple[int, ...]:  # type: ignore[override]  # a matrix of no experts has a plain attribute
        return tuple(self.count * width for width in self.each[0].segments)

    @property
    def row_bytes(self) -> tuple[int, ...]:
        return tuple(self.count * size for size in self.each[0].row_bytes)

    def product(self, x: Tensor, multiply: Multiply) -> Tensor:
        width = self.each[0].segments[0]
        out: Tensor | None = None
        for expert, tokens, places in self.known.groups:
            found = multiply(x[tokens], self.each[expert]).unflatten(1, (-1, width))
            if out is None:
                out = found.new_zeros(len(x), found.shape[1], self.count, width)
            out[tokens, :, places] = found
        assert out is not None
        return out.flatten(1)


class ExpertOutputs(Experts):
    """down of the experts, times the weights of the router: [k width, hidden]."""

    @property
    def width(self) -> int:
        """Of one expert, between its two halves."""
        return self.data.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.count * self.width, self.data.shape[2]

    @property
    def segments(self) -> tuple[int, ...]:  # type: ignore[override]  # as above
        return self.each[0].segments

    @property
    def row_bytes(self) -> tuple[int, ...]:
        return self.each[0].row_bytes

    def product(self, x: Tensor, multiply: Multiply) -> Tensor:
        routing, parts = self.known, x.unflatten(1, (self.count, -1))
        out = x.new_zeros(len(x), self.data.shape[2])
        for expert, tokens, places in routing.groups:
            found = multiply(parts[tokens, places], self.each[expert])
            out.index_add_(0, tokens, found * routing.weights[tokens, places, None])
        return out


def experts_of(matrix: Matrix) -> Tensor | None:
    """Whose parts the rows have that a matrix is multiplied by, int64 [S, k]; None where they are nobody's."""
    return matrix.known.experts if isinstance(matrix, ExpertOutputs) else None

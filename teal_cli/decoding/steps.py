"""One decode step, in the ways this machine has: all take a token and a position and return logits.

A step owns the choice of kernels and the count of what was kept; the key/value cache it writes is shared with the dense
prefill. It also says what chooses the next token, since a graph can do that on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.decoding.projector import DenseProjector, Rows, SparseProjector, empty_rows, first_rows
from teal_cli.decoding.sampling import Sampler, Sampling, nan_logits
from teal_cli.model.config import ModelConfig
from teal_cli.model.transformer import KVCache, Transformer
from teal_kernels.backends import (
    BACKENDS,
    CPU,
    NUMBA,
    REFERENCE,
    BackendError,
    backend_problem,
    choose_backend,
    triton_problem,
)
from teal_kernels.ops.threshold.reference import row_thresholds
from teal_kernels.spec import PROJECTIONS, SITES, columns
from teal_kernels.steps.cpu.compiled import is_compiled, load
from teal_kernels.steps.cpu.layout import MOST_STOPS
from teal_kernels.steps.spec import StepSpec
from teal_kernels.thresholds import Thresholds

TRITON_GRAPH: Final = "triton-graph"


Choose = Callable[[Tensor, int], int]
"""Logits float32 [vocab], and the position of the token that they follow -> a token id. Raises TealError where the
logits hold NaN."""


class Step(Protocol):
    """A decode step of a model under one plan."""

    backend: str
    """What runs, as shown to the user."""

    def __call__(self, token: int, position: int, rows: Rows | None = None) -> Tensor:
        """Run one token through the model.

        Args:
            token: the id that is fed.
            position: its place in the sequence, and in the cache.
            rows: where to leave the vectors that the kernels consumed, site -> [layers, K]; None to leave them nowhere.

        Returns:
            Logits, float32 [vocab].
        """
        ...

    def sampler(self, sampling: Sampling, sequence: int) -> Choose:
        """What chooses the tokens of a sequence that begins: from the logits of its prefill, then of its steps."""
        ...

    def follow(
        self,
        token: int,
        position: int,
        choose: Choose,
        count: int,
        stop: Collection[int],
        rows: Rows | None = None,
    ) -> list[int]:
        """Run a token, then those that are chosen: at least one and up to `count` chosen tokens.

        Args:
            choose: of `sampler`.
            stop: tokens after which no further one is chosen.
            rows: as of a step, one for each: site -> [layers, count, K].
        """
        ...

    def take_back(self, count: int) -> None:
        """Count the last steps of `follow` as not done: nobody has taken their tokens."""
        ...

    def kept(self) -> NDArray[np.int64] | None:
        """Kept entries summed over the steps so far, int64 [layers, 7]; None for a dense step, which keeps all."""
        ...


def _chosen(
    step: Callable[[int, int, Rows | None], Tensor], token: int, position: int, choose: Choose, rows: Rows | None
) -> int:
    """The token after one step, whose row is the first of `rows`."""
    return choose(step(token, position, rows and first_rows(rows)), position)


class _OneAtATime(ABC):
    """`follow` of a step that needs each token from outside."""

    @abstractmethod
    def __call__(self, token: int, position: int, rows: Rows | None = None) -> Tensor: ...

    def follow(
        self,
        token: int,
        position: int,
        choose: Choose,
        count: int,
        stop: Collection[int],
        rows: Rows | None = None,
    ) -> list[int]:
        return [_chosen(self, token, position, choose, rows)]

    def take_back(self, count: int) -> None:
        raise ValueError("steps come one at a time here, so that none is left over")


class PlainStep(_OneAtATime):
    """The step as PyTorch operators, one after the other, with a sparse kernel at each site.

    Args:
        model: the weights.
        cache: keys and values; prefill has filled it up to the first position.
        thresholds: what entries are compared with; None for the dense step.
        backend: the `teal_kernels.ops.sparse_gemv` backend; unused by the dense step.
    """

    def __init__(self, model: Transformer, cache: KVCache, thresholds: Thresholds | None, backend: str) -> None:
        self._model, self._cache = model, cache
        self._projector: SparseProjector | DenseProjector
        self._counter: KeptCounter | None = None
        if thresholds is None:
            self.backend = "torch"
            self._projector = DenseProjector()
        else:
            self.backend = backend
            self._scratch = empty_rows(model.config, model.dtype, model.device)
            self._projector = SparseProjector(model.config, thresholds, backend, model.device, self._scratch)
            self._counter = KeptCounter(model.config, thresholds, model.device)

    def __call__(self, token: int, position: int, rows: Rows | None = None) -> Tensor:
        projector = self._projector
        projector.rows = self._scratch if rows is None and self._counter else rows
        tokens = torch.tensor([token], device=self._model.device)
        logits = self._model.forward(tokens, position, self._cache, projector)
        if self._counter and projector.rows is not None:
            self._counter.add(projector.rows)
        return logits

    def sampler(self, sampling: Sampling, sequence: int) -> Choose:
        return Sampler(sampling, sequence=sequence)

    def kept(self) -> NDArray[np.int64] | None:
        return self._counter.counts() if self._counter else None


class NumbaStep:
    """The whole step compiled for this processor; see `teal_kernels.steps.cpu`. Arguments as for `PlainStep`.

    Raises:
        CpuStepUnavailableError: no numba, or a processor without the needed instructions.
    """

    def __init__(self, model: Transformer, cache: KVCache, thresholds: Thresholds | None) -> None:
        from teal_kernels.steps.cpu.op import CpuStep

        self.backend = NUMBA
        self._step = CpuStep(
            _spec(model), model.layers, model.embedding, model.final_norm, model.lm_head,
            model.rope.tables(cache.max_tokens), cache.k, cache.v, thresholds=thresholds,
        )  # fmt: skip
        self._cache, self._sparse = cache, thresholds is not None

    def __call__(self, token: int, position: int, rows: Rows | None = None) -> Tensor:
        self._cache.check_room(position, 1)
        logits = self._step.step(token, position, rows)
        self._cache.length = position + 1
        return logits

    def sampler(self, sampling: Sampling, sequence: int) -> Choose:
        return Sampler(sampling, sequence=sequence)

    def follow(
        self,
        token: int,
        position: int,
        choose: Choose,
        count: int,
        stop: Collection[int],
        rows: Rows | None = None,
    ) -> list[int]:
        if not isinstance(choose, Sampler) or len(stop) > MOST_STOPS:
            return [_chosen(self, token, position, choose, rows)]
        self._cache.check_room(position, count)
        bits = [choose.bits(position + i) for i in range(count)]
        chosen = self._step.steps(token, position, count, choose.rule, bits, stop, rows)
        if not chosen:
            raise nan_logits()
        self._cache.length = position + len(chosen)
        return chosen

    def take_back(self, count: int) -> None:
        self._step.take_back(count)

    def kept(self) -> NDArray[np.int64] | None:
        return self._step.kept() if self._sparse else None


class GraphStep(_OneAtATime):
    """The whole step as one CUDA graph of Triton kernels; see `teal_kernels.steps.gpu`. Arguments as for `PlainStep`.

    Args:
        sparsity: about how much the thresholds drop; chooses among tuned configurations.
    """

    def __init__(self, model: Transformer, cache: KVCache, thresholds: Thresholds | None, sparsity: float) -> None:
        from teal_kernels.steps.gpu.op import GpuStep

        self.backend = TRITON_GRAPH
        self._step = GpuStep(
            _spec(model), model.layers, model.embedding, model.final_norm, model.lm_head,
            model.rope.tables(cache.max_tokens), cache.k, cache.v,
            thresholds=thresholds, ring_slots=1, sparsity=sparsity,
        )  # fmt: skip
        self._cache = cache

    def __call__(self, token: int, position: int, rows: Rows | None = None) -> Tensor:
        self._cache.check_room(position, 1)
        logits = self._step.step(token, position)
        self._cache.length = position + 1
        if rows is not None:
            for site, ring in self._step.ring.items():
                rows[site].copy_(ring[:, 0], non_blocking=True)
        return logits.float()

    def sampler(self, sampling: Sampling, sequence: int) -> Choose:
        """Choose within the graph: reading one number a token leaves less time in which the GPU waits."""
        step = self._step
        step.sample(sampling, sequence)
        prefill = True

        def choose(logits: Tensor, position: int) -> int:
            nonlocal prefill
            if prefill:
                step.choose(logits, position)
                prefill = False
            token = step.chosen()
            if token is None:
                raise nan_logits()
            return token

        return choose

    def kept(self) -> NDArray[np.int64] | None:
        return self._step.kept()


def _spec(model: Transformer) -> StepSpec:
    config = model.config
    return StepSpec(
        config.hidden, config.intermediate, config.heads, config.kv_heads, config.head_dim, config.vocab,
        config.norm_eps, config.sliding_windows, model.rope.of_layer, config.traits,
    )  # fmt: skip


def open_step(model: Transformer, cache: KVCache, thresholds: Thresholds | None, backend: str, sparsity: float) -> Step:
    """The step that `choose_step` named.

    Raises:
        BackendError: as `check_step`; or the model is a mixture of experts, and the backend takes none.
    """
    check_step(thresholds, backend)
    if model.config.mixture is not None and backend in (NUMBA, TRITON_GRAPH):
        raise BackendError(f"backend {backend!r} cannot run a mixture of experts; {REFERENCE}, {CPU}, triton can")
    if backend == NUMBA:
        return NumbaStep(model, cache, thresholds)
    if backend == TRITON_GRAPH:
        return GraphStep(model, cache, thresholds, sparsity)
    return PlainStep(model, cache, thresholds, backend)


def check_step(thresholds: Thresholds | None, backend: str) -> None:
    """Refuse thresholds of a criterion that a backend does not run.

    Raises:
        BackendError: the message names the backends that do.
    """
    if thresholds is not None and thresholds.centre and backend in (NUMBA, TRITON_GRAPH):
        others = ", ".join(name for name in BACKENDS if name != NUMBA)
        raise BackendError(f"backend {backend!r} cannot run a criterion with a centre; {others} can")
    if thresholds is not None and thresholds.ranked and backend not in (REFERENCE, CPU):
        raise BackendError(f"backend {backend!r} cannot run a fixed count per row; {REFERENCE}, {CPU} can")


def choose_step(device: torch.device, requested: str | None, *, mixture: bool = False) -> tuple[str, str | None]:
    """Which step will run: the fastest that works on the device, or the one that was asked for.

    Args:
        device: of the weights.
        mixture: the model is a mixture of experts, which no whole step takes.
        requested: "triton-graph", "triton", "numba", "cpu" or "reference"; None for the fastest.

    Returns:
        The step's name, and why it is not the fastest kind, if it is not and nobody asked for it.

    Raises:
        BackendError: the requested one is unknown or cannot run here; the message says why.
    """
    whole = NUMBA if device.type == "cpu" else TRITON_GRAPH
    if requested is None:
        problem = f"{whole} takes no mixture of experts" if mixture else step_problem(whole, device)
        return (whole, None) if problem is None else (choose_backend(device.type), problem)
    if requested not in (NUMBA, TRITON_GRAPH):
        return choose_backend(device.type, requested), None
    problem = "it takes no mixture of experts" if mixture else step_problem(requested, device)
    if problem is not None:
        raise BackendError(f"backend {requested!r} cannot be used here: {problem}")
    return requested, None


def step_problem(whole: str, device: torch.device) -> str | None:
    """Why a whole-step backend cannot run on a device; None where it can."""
    return triton_problem(device.type) if whole == TRITON_GRAPH else backend_problem(whole, device.type)


def must_compile(backend: str, model: Transformer) -> bool:
    """Whether the first step of a backend waits some ten seconds for a compiler that `compile_step` can run before."""
    return backend == NUMBA and not is_compiled(model.dtype, _packed_bits(model))


def compile_step(model: Transformer) -> None:
    """Compile the numba step for such a model and this processor, and keep it on disk."""
    load(model.dtype, _packed_bits(model))


def _packed_bits(model: Transformer) -> frozenset[int]:
    from teal_kernels.steps.cpu.op import step_bits

    return step_bits(model.layers, model.embedding, model.lm_head)


class KeptCounter:
    """Counts, per layer and projection, the entries that a step kept; stays on the device until asked."""

    def __init__(self, config: ModelConfig, thresholds: Thresholds, device: torch.device) -> None:
        self._counts = torch.zeros(config.layers, len(PROJECTIONS), dtype=torch.int64, device=device)
        self._ranked = thresholds.ranked
        self._limits: dict[str, Tensor | None] = {}
        """Per site [layers, P, 1 or K]; None where the row was cut at the one threshold already."""
        for site in SITES:
            limits = np.stack([thresholds.site(layer, site) for layer in range(config.layers)])
            limits = limits.reshape(*limits.shape[:2], -1)
            same = bool((limits == limits[:, :1]).all())
            self._limits[site] = None if same else torch.tensor(limits, device=device)

    def add(self, rows: Rows) -> None:
        for site, limits in self._limits.items():
            counts = self._counts[:, columns(site)]
            if limits is None:
                counts += torch.count_nonzero(rows[site], dim=1)[:, None]
                continue
            if self._ranked:
                limits = row_thresholds(rows[site], limits[..., 0])[..., None]
            magnitude = rows[site].float().abs()[:, None]
            counts += ((magnitude > limits) & (magnitude > 0)).sum(2)

    def counts(self) -> NDArray[np.int64]:
        return self._counts.cpu().numpy().copy()

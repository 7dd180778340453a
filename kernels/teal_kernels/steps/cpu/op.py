"""CpuStep: one decode step of a whole model, compiled for this processor.

Checks what it is given, turns tensors into addresses, and runs step.py on a team of threads. It does not load
models, sample tokens or prefill: the caller shares the same weights and the same key-value cache with its own
prefill.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_kernels.matrix import Matrix
from teal_kernels.packed import PackedMatrix
from teal_kernels.packing import UNIT as PACKED_UNIT
from teal_kernels.parts.sample.reference import SamplingRule, top_p_bits
from teal_kernels.spec import SITES, columns
from teal_kernels.steps.cpu.compiled import KINDS, codes, load
from teal_kernels.steps.cpu.layout import (
    ALL,
    CHOSEN,
    EMBEDDING,
    FIELDS,
    HEAD,
    MOST_STOPS,
    MOST_TOKENS,
    NONE,
    RELEASED,
    TABLE_UNITS,
    WANTED,
    Cache,
    Codes,
    Shape,
    Shared,
    Token,
    Weights,
)
from teal_kernels.steps.cpu.matrices import address, limit_places, packed_bits, packed_fields
from teal_kernels.steps.cpu.team import Team
from teal_kernels.steps.spec import (
    MATRICES,
    OPTIONAL,
    LayerTensors,
    StepSpec,
    check_thresholds,
    layer_shapes,
    traits_in,
)
from teal_kernels.thresholds import Thresholds

EVERYWHERE = 1 << 62
"""The window of a layer that has none."""


def default_threads() -> int:
    """Physical cores that this process may use, as torch counts them: with more threads memory is no faster."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, torch.get_num_threads()))


def step_bits(layers: Iterable[LayerTensors], *tables: Matrix) -> frozenset[int]:
    """Bits of the codes of the packed matrices of a model, its embedding and its head: what `compiled.load` compiles a
    step for."""
    return packed_bits((*(getattr(layer, name) for layer in layers for name in MATRICES), *tables))


class CpuStep:
    """A decode step of one model under one plan.

    Args:
        spec: its dimensions.
        layers: its layers, bfloat16, float16 or float32, contiguous, on the CPU. Each matrix may be of floats or
            packed (int8, int4). Nothing is copied.
        embedding, final_norm, lm_head: [vocab, hidden], [hidden], [vocab, hidden]; a tied head is the embedding
            itself. Embedding and head may be packed, too.
        rope: cos and sin [tables, max_tokens, head_dim] in the model's dtype, the rotation's sign folded into sin:
            rotated = x * cos + swap_halves(x) * sin, rounded after each product and after the sum.
        keys, values: the cache, [layers, kv_heads, max_tokens, head_dim], the last two axes contiguous; positions
            before the step's must be filled.
        thresholds: what entries are compared with: those with |x| <= t are dropped. None for the dense step. A centre
            is not supported.
        threads: default `default_threads()`. Results are the same from run to run for the same number.

    Raises:
        CpuStepUnavailableError: no numba, or a processor without the needed instructions.
        ValueError: a tensor has the wrong shape, dtype, layout or device; the message names it.
    """

    def __init__(
        self,
        spec: StepSpec,
        layers: Sequence[LayerTensors],
        embedding: Matrix,
        final_norm: Tensor,
        lm_head: Matrix,
        rope: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        *,
        thresholds: Thresholds | None = None,
        threads: int | None = None,
    ) -> None:
        self.spec = spec
        self.dtype = embedding.dtype
        if self.dtype not in KINDS:
            raise ValueError(f"a compiled decode step works in bfloat16, float16 or float32, not {self.dtype}")
        if len(layers) != len(spec.windows):
            raise ValueError(f"{len(layers)} layers were given, {len(spec.windows)} are described")
        bits = step_bits(layers, embedding, lm_head)
        step = load(self.dtype, bits)
        size = threads or default_threads()
        shape = Shape(len(layers), spec.hidden, spec.intermediate, spec.heads, spec.kv_heads, spec.head_dim, spec.vocab)
        kind = np.empty(0, KINDS[self.dtype])
        weights = self._addresses(layers, (embedding, final_norm, lm_head), step, codes(bits))
        row_bytes = [max(sum(getattr(layer, name).row_bytes) for layer in layers) for name in MATRICES]
        shared = self._with_thresholds(step.shared_buffers(kind, size, shape, row_bytes), thresholds)
        padded = PACKED_UNIT * max(int(weights.units.max()), int(weights.tables[:, TABLE_UNITS].max()))
        own = [step.own_buffers(thread, size, shape, padded) for thread in range(size)]
        self._max_tokens = keys.shape[2] if keys.dim() == 4 else 0
        self._row_bytes = spec.head_dim * self.dtype.itemsize
        self._rope = self._rope_addresses(rope)
        weights.ropes[:] = np.array(spec.rope_of_layer, np.int64) * (self._max_tokens * self._row_bytes)
        self._cache = self._cache_addresses(keys, values)
        self._kept_alive = (tuple(layers), embedding, final_norm, lm_head, rope, keys, values)
        self._shared, self._captures = shared, False
        self._kept = np.zeros((len(layers), 7), np.int64)
        self._kept_of_call = np.zeros((0, len(layers), 7), np.int64)
        self._logits = torch.from_numpy(shared.logits)
        self._team = Team(size, shared.control, step.release, lambda i: step.run(kind, own[i], shape, weights, shared))

    def step(
        self,
        token: int,
        position: int,
        rows: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Runs one token through the model; its key and value enter the cache at `position`.

        Args:
            rows: site -> [layers, K] in the model's dtype, any stride between layers: receives what entered each site's
                product, thresholded at the lowest threshold of its projections.

        Returns:
            float32 [vocab], in memory that the next step overwrites.

        Raises:
            ValueError: token or position out of range, rows of another shape or dtype.
        """
        self._run(token, position, rows and {site: x[:, None] for site, x in rows.items()})
        return self._logits

    def _run(self, token: int, position: int, rows: Mapping[str, Tensor] | None) -> None:
        """A step, and those that follow from it by `Shared.draw`; rows: site -> [layers, steps, K]."""
        if not 0 <= token < self.spec.vocab:
            raise ValueError(f"token {token} is not in a vocabulary of {self.spec.vocab}")
        if not 0 <= position < self._max_tokens:
            raise ValueError(f"position {position} is outside the cache of {self._max_tokens}")
        if rows is not None or self._captures:
            self._point_to(rows)
        cos, sin = (table + position * self._row_bytes for table in self._rope)
        self._shared.order[:] = (*Token(token, position, cos, sin), *self._cache)
        try:
            self._team.run()
        except BaseException:
            self._shared.kept.fill(0)
            raise
        self._count()

    def steps(
        self,
        token: int,
        position: int,
        count: int,
        rule: SamplingRule,
        bits: Sequence[int],
        stop: Collection[int] = (),
        rows: Mapping[str, Tensor] | None = None,
    ) -> list[int]:
        """Runs a token, then those that are chosen, one step each, without Python in between.

        Args:
            count: how many tokens are chosen, 1 to MOST_TOKENS.
            rule, bits: how, and the random bits of each token; a greedy rule needs none.
            stop: at most MOST_STOPS tokens, after which no further one is chosen.
            rows: as of `step`, of `count` steps: site -> [layers, count, K], any strides between layers and steps.

        Returns:
            What was chosen. Fewer than `count` after a token of `stop`, or where the next logits hold NaN, or have no
            finite peak that a draw needs; so it may be empty.

        Raises:
            ValueError: as `step`, and too many tokens.
        """
        if not 0 < count <= MOST_TOKENS or len(stop) > MOST_STOPS:
            raise ValueError(f"{count} tokens and {len(stop)} stops are more than {MOST_TOKENS} and {MOST_STOPS}")
        if position + count > self._max_tokens:
            raise ValueError(f"position {position + count - 1} is outside the cache of {self._max_tokens}")
        draw = self._shared.draw
        draw.numbers[:] = count, 0, len(stop), rule.greedy, rule.top_k, rule.top_p < 1, self._row_bytes
        draw.temperature[0] = rule.temperature
        draw.bits[: len(bits)] = bits
        draw.bits[-1] = min(top_p_bits(rule.top_p), 2**64 - 1)
        draw.stops[: len(stop)] = list(stop)
        try:
            self._run(token, position, rows)
            chosen: list[int] = draw.tokens[: draw.numbers[CHOSEN]].tolist()
        finally:
            draw.numbers[WANTED] = draw.numbers[CHOSEN] = 0
        if chosen[-1] < 0:
            self.take_back(1)
            return chosen[:-1]
        return chosen

    def kept(self) -> NDArray[np.int64]:
        """How many entries of each projection's input were kept, summed over all steps so far: [layers, 7]."""
        return self._kept.copy()

    def take_back(self, count: int) -> None:
        """Count the last steps of the last call no more, as many as nobody has use for."""
        self._kept -= self._kept_of_call[len(self._kept_of_call) - count :].sum(0)
        self._kept_of_call = self._kept_of_call[: len(self._kept_of_call) - count]

    def _count(self) -> None:
        """Take over what the steps of a call have kept."""
        count = max(1, int(self._shared.draw.numbers[CHOSEN]))
        places = (int(self._shared.control[RELEASED]) - 1 - np.arange(count)[::-1]) % MOST_TOKENS
        self._kept_of_call = self._shared.kept[places]
        self._kept += self._kept_of_call.sum(0)
        self._shared.kept[places] = 0

    @property
    def threads(self) -> int:
        """How many threads run a step."""
        return self._team.size

    def close(self) -> None:
        """Ends the threads. Done by itself when the object is no longer referenced."""
        self._team.close()

    def _addresses(
        self,
        layers: Sequence[LayerTensors],
        ends: tuple[Matrix, Tensor, Matrix],
        step: ModuleType,
        packed_codes: Codes,
    ) -> Weights:
        spec, shapes = self.spec, layer_shapes(self.spec)
        table = np.full((len(layers), len(shapes)), NONE, np.int64)
        packed, units = np.zeros((len(layers), 4, FIELDS), np.int64), np.zeros((len(layers), 4, 4), np.int64)
        for i, layer in enumerate(layers):
            for j, (name, shape) in enumerate(shapes.items()):
                tensor = getattr(layer, name)
                if name in MATRICES:
                    site = SITES.index(MATRICES[name])
                    table[i, j] = address(tensor, "the compiled step")
                    packed[i, site], units[i, site] = packed_fields(tensor)
                    if isinstance(tensor, PackedMatrix):
                        self._check_packed(f"layer {i}, {name}", tensor, shape, spec.segments(SITES[site]))
                        continue
                    tensor = tensor.tensor()
                if tensor is not None or name not in OPTIONAL:
                    self._check(f"layer {i}, {name}", tensor, shape)
                    table[i, j] = tensor.data_ptr()
        embedding, final_norm, lm_head = ends
        self._check("final_norm", final_norm, (spec.hidden,))
        tables = step.no_tables()
        tables[EMBEDDING] = self._table("embedding", embedding)
        tables[HEAD] = self._table("lm_head", lm_head)
        return Weights(
            table,
            np.array([EVERYWHERE if window is None else window for window in spec.windows], np.int64),
            np.zeros(len(layers), np.int64),
            step.site_edges(spec),
            packed,
            units,
            tables,
            packed_codes,
            *step.numbers(traits_in(spec.traits, self.dtype), spec.norm_eps, spec.head_dim),
            *(tensor.data_ptr() for tensor in (embedding.data, final_norm, lm_head.data)),
        )

    def _table(self, name: str, table: Matrix) -> tuple[int, ...]:
        """Check an embedding or a head; its row of `Weights.tables`."""
        shape = self.spec.vocab, self.spec.hidden
        if isinstance(table, PackedMatrix):
            self._check_packed(name, table, shape, shape[1:])
        else:
            self._check(name, table.tensor(), shape)
        fields, units = packed_fields(table)
        return *fields, units[1]

    def _with_thresholds(self, shared: Shared, thresholds: Thresholds | None) -> Shared:
        if thresholds is None:
            shared.thresholds.fill(ALL)
            return shared
        check_thresholds(self.spec, thresholds)
        shared.thresholds[:] = thresholds.table
        limits: list[NDArray[np.float32]] = []
        filled = 0
        for layer in range(thresholds.layers):
            for number, site in enumerate(SITES):
                if site not in thresholds.scale:
                    continue
                own = thresholds.site(layer, site)
                width = own.shape[1]
                shared.limit_of[layer, columns(site)] = limit_places(own, filled)
                shared.lowest_of[layer, number] = filled + own.size
                limits += [own.ravel(), thresholds.lowest(layer, site)]
                filled += own.size + width
        return shared._replace(limits=np.concatenate(limits)) if limits else shared

    def _rope_addresses(self, rope: tuple[Tensor, Tensor]) -> tuple[int, int]:
        for name, table in zip(("cos", "sin"), rope, strict=True):
            self._check(name, table, (1 + max(self.spec.rope_of_layer), self._max_tokens, self.spec.head_dim))
        return rope[0].data_ptr(), rope[1].data_ptr()

    def _cache_addresses(self, keys: Tensor, values: Tensor) -> Cache:
        spec, size = self.spec, self.dtype.itemsize
        shape = (len(spec.windows), spec.kv_heads, self._max_tokens, spec.head_dim)
        for name, tensor in (("keys", keys), ("values", values)):
            self._check(name, tensor, shape, contiguous=False)
            if tensor.stride()[2:] != (spec.head_dim, 1):
                raise ValueError(f"{name}: positions of one head must lie together")
        if keys.stride() != values.stride():
            raise ValueError("keys and values must have the same strides")
        return Cache(keys.data_ptr(), values.data_ptr(), keys.stride(0) * size, keys.stride(1) * size)

    def _point_to(self, rows: Mapping[str, Tensor] | None) -> None:
        """Set where the step writes captured rows, if anywhere."""
        table = self._shared.rows
        table.fill(NONE)
        self._captures = rows is not None
        if rows is not None:
            steps = max(1, int(self._shared.draw.numbers[WANTED]))
            for i, site in enumerate(SITES):
                tensor, shape = rows[site], (len(self.spec.windows), steps, self.spec.channels(site))
                self._check(f"rows[{site!r}]", tensor, shape, contiguous=False)
                if tensor.stride(2) != 1:
                    raise ValueError(f"rows[{site!r}]: the channels of a layer must lie together")
                table[i] = tensor.data_ptr(), tensor.stride(0) * tensor.itemsize, tensor.stride(1) * tensor.itemsize

    def _check_packed(self, name: str, matrix: PackedMatrix, shape: tuple[int, ...], widths: tuple[int, ...]) -> None:
        if matrix.shape != shape or matrix.segments != widths or matrix.dtype != self.dtype:
            raise ValueError(
                f"{name} must multiply {self.dtype} by {list(shape)} of {widths} columns, not {matrix.dtype} by "
                f"{list(matrix.shape)} of {matrix.segments}"
            )
        if matrix.device.type != "cpu":
            raise ValueError(f"{name} must lie on the CPU, not on {matrix.device}")

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...], *, contiguous: bool = True) -> None:
        """The compiled code trusts addresses, so nothing may reach it unchecked."""
        if tuple(tensor.shape) != shape or tensor.dtype != self.dtype or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be {self.dtype} {list(shape)} on the CPU, not {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}"
            )
        if contiguous and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")

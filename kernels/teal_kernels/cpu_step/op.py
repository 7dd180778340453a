"""CpuStep: one decode step of a whole model, compiled for this processor.

Checks what it is given, turns tensors into addresses, and runs step.py on a team of threads. It does not load
models, sample tokens or prefill: the caller shares the same weights and the same key-value cache with its own
prefill.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_kernels.cpu_step.compiled import KINDS, load
from teal_kernels.cpu_step.layout import ALL, NONE, Cache, Shape, Shared, Token, Weights
from teal_kernels.cpu_step.spec import OPTIONAL, PROJECTIONS, SITES, LayerTensors, Rotation, StepSpec, layer_shapes
from teal_kernels.cpu_step.team import Team

EVERYWHERE = 1 << 62
"""The window of a layer that has none."""


def default_threads() -> int:
    """Physical cores that this process may use, as torch counts them: more threads only wait for the same memory."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, torch.get_num_threads()))


class CpuStep:
    """A decode step of one model.

    Args:
        spec: its dimensions.
        layers: its layers, bfloat16, float16 or float32, contiguous, on the CPU. Nothing is copied.
        embedding, final_norm, lm_head: [vocab, hidden], [hidden], [vocab, hidden]; a tied head is the embedding
            itself.
        rope: cos and sin of a position.
        keys, values: the cache, [layers, kv_heads, max_tokens, head_dim], the last two axes contiguous; positions
            before the step's must be filled. `use_cache` replaces it.
        threads: default `default_threads()`. Results are the same from run to run for the same number.

    Raises:
        CpuStepUnavailableError: no numba, or a processor without the needed instructions.
        ValueError: a tensor has the wrong shape, dtype, layout or device; the message names it.
    """

    def __init__(
        self,
        spec: StepSpec,
        layers: Sequence[LayerTensors],
        embedding: Tensor,
        final_norm: Tensor,
        lm_head: Tensor,
        rope: Rotation,
        keys: Tensor,
        values: Tensor,
        *,
        threads: int | None = None,
    ) -> None:
        self.spec = spec
        self.dtype = embedding.dtype
        if self.dtype not in KINDS:
            raise ValueError(f"a compiled decode step works in bfloat16, float16 or float32, not {self.dtype}")
        if len(layers) != len(spec.windows):
            raise ValueError(f"{len(layers)} layers were given, {len(spec.windows)} are described")
        self._compiled = load(self.dtype)
        self._kind = np.empty(0, KINDS[self.dtype])
        self._rope = rope
        self._team = Team(threads or default_threads())
        self._shape = Shape(
            len(layers), spec.hidden, spec.intermediate, spec.heads, spec.kv_heads, spec.head_dim, spec.vocab
        )
        self._weights = self._addresses(layers, embedding, final_norm, lm_head)
        self._kept_alive = (tuple(layers), embedding, final_norm, lm_head)
        self._shared = _shared(spec, self._team)
        self._own = [self._compiled.own_buffers(i, self._team.size, self._shape) for i in range(self._team.size)]
        self._dense = np.full((len(layers), PROJECTIONS), ALL)
        self.use_cache(keys, values)

    def use_cache(self, keys: Tensor, values: Tensor) -> None:
        """Decodes into another cache from now on; see `keys`, `values` of the class."""
        spec, size = self.spec, self.dtype.itemsize
        for name, tensor in (("keys", keys), ("values", values)):
            room = tensor.shape[2] if tensor.dim() == 4 else 0
            self._check(name, tensor, (len(spec.windows), spec.kv_heads, room, spec.head_dim), contiguous=False)
            if tensor.stride()[2:] != (spec.head_dim, 1):
                raise ValueError(f"{name}: positions of one head must lie together")
        if keys.stride() != values.stride() or keys.shape != values.shape:
            raise ValueError("keys and values must have the same shape and strides")
        self._max_tokens = keys.shape[2]
        self._cache = Cache(keys.data_ptr(), values.data_ptr(), keys.stride(0) * size, keys.stride(1) * size)
        self._cached = (keys, values)

    def step(
        self,
        token: int,
        position: int,
        thresholds: NDArray[np.float32] | None = None,
        rows: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Runs one token through the model; its key and value enter the cache at `position`.

        Args:
            thresholds: float32 [layers, 7], q k v o gate up down, none negative: entries with |x| <= t are dropped.
                None is the dense step.
            rows: site -> [layers, K] in the model's dtype, any stride between layers: receives what entered each site's
                product, thresholded at the lowest threshold of its projections.

        Returns:
            float32 [vocab], new memory.

        Raises:
            ValueError: token or position out of range, thresholds or rows of another shape or dtype.
        """
        if not 0 <= token < self.spec.vocab:
            raise ValueError(f"token {token} is not in a vocabulary of {self.spec.vocab}")
        if not 0 <= position < self._max_tokens:
            raise ValueError(f"position {position} is outside the cache of {self._max_tokens}")
        if thresholds is None:
            thresholds = self._dense
        elif thresholds.shape != self._dense.shape or thresholds.dtype != np.float32 or not (thresholds >= 0).all():
            raise ValueError(f"thresholds must be float32 {list(self._dense.shape)} and not negative")
        cos, sin = self._rope(position)
        self._check("cos", cos.view(-1), (self.spec.head_dim,))
        self._check("sin", sin.view(-1), (self.spec.head_dim,))
        record = Token(
            token,
            position,
            cos.data_ptr(),
            sin.data_ptr(),
            np.ascontiguousarray(thresholds),
            self._row_addresses(rows),
        )
        shared = self._shared._replace(logits=np.empty(self.spec.vocab, np.float32))

        def part(thread: int, rounds: int) -> None:
            own = self._own[thread]
            self._compiled.run(self._kind, own, rounds, self._shape, self._weights, self._cache, record, shared)

        self._team.run(part)
        return torch.from_numpy(shared.logits)

    @property
    def threads(self) -> int:
        """How many threads run a step."""
        return self._team.size

    def close(self) -> None:
        """Ends the threads. Done by itself when the object is no longer referenced."""
        self._team.close()

    def _addresses(
        self, layers: Sequence[LayerTensors], embedding: Tensor, final_norm: Tensor, lm_head: Tensor
    ) -> Weights:
        spec, shapes = self.spec, layer_shapes(self.spec)
        table = np.full((len(layers), len(shapes)), NONE, np.int64)
        for i, layer in enumerate(layers):
            for j, (name, shape) in enumerate(shapes.items()):
                tensor = getattr(layer, name)
                if tensor is not None or name not in OPTIONAL:
                    self._check(f"layer {i}, {name}", tensor, shape)
                    table[i, j] = tensor.data_ptr()
        self._check("embedding", embedding, (spec.vocab, spec.hidden))
        self._check("final_norm", final_norm, (spec.hidden,))
        self._check("lm_head", lm_head, (spec.vocab, spec.hidden))
        return Weights(
            table,
            np.array([EVERYWHERE if window is None else window for window in spec.windows], np.int64),
            np.float32(spec.norm_eps),
            embedding.data_ptr(),
            final_norm.data_ptr(),
            lm_head.data_ptr(),
        )

    def _row_addresses(self, rows: Mapping[str, Tensor] | None) -> NDArray[np.int64]:
        table = np.zeros((len(SITES), 2), np.int64)
        if rows is not None:
            for i, (site, channels) in enumerate(zip(SITES, self.spec.channels(), strict=True)):
                tensor = rows[site]
                self._check(f"rows[{site!r}]", tensor, (len(self.spec.windows), channels), contiguous=False)
                if tensor.stride(1) != 1:
                    raise ValueError(f"rows[{site!r}]: the channels of a layer must lie together")
                table[i] = tensor.data_ptr(), tensor.stride(0) * tensor.itemsize
        return table

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...], *, contiguous: bool = True) -> None:
        """The compiled code trusts addresses, so nothing may reach it unchecked."""
        if tuple(tensor.shape) != shape or tensor.dtype != self.dtype or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be {self.dtype} {list(shape)} on the CPU, not {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}"
            )
        if contiguous and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")


def _shared(spec: StepSpec, team: Team) -> Shared:
    from teal_kernels.cpu_step.attention import parts_for

    parts = parts_for(team.size, spec.kv_heads)
    softmax = np.zeros((spec.heads, parts), np.float32)
    return Shared(
        np.zeros(spec.hidden, np.float32),
        np.zeros(spec.qkv_width, np.float32),
        softmax,
        np.zeros_like(softmax),
        np.zeros((spec.heads, parts, spec.head_dim), np.float32),
        np.zeros(spec.intermediate, np.float32),
        np.zeros(0, np.float32),
        team.arrivals,
    )

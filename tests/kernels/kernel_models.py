"""Tiny random decoders in the shape `GpuStep` takes, and a context to decode in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from teal_kernels.matrix import FloatMatrix, Matrix
from teal_kernels.packed import PackedMatrix
from teal_kernels.packing import RowLayout, quantize
from teal_kernels.spec import SITE_PROJECTIONS
from teal_kernels.steps.spec import MATRICES, StepSpec
from teal_kernels.thresholds import Thresholds
from teal_kernels.traits import LLAMA, Traits


@dataclass(frozen=True)
class Layer:
    """One layer's tensors; see `teal_kernels.steps.spec.LayerTensors`."""

    attn_norm: Tensor | None
    qkv: FloatMatrix
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    attn_out: FloatMatrix
    o_bias: Tensor | None
    mlp_norm: Tensor | None
    gate_up: FloatMatrix
    down: FloatMatrix
    attn_post_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None


@dataclass(frozen=True)
class Model:
    """Everything a step needs, with `length` positions of the cache filled at random."""

    spec: StepSpec
    layers: list[Layer]
    ends: tuple[FloatMatrix, Tensor, FloatMatrix]
    rope: tuple[Tensor, Tensor]
    keys: Tensor
    values: Tensor

    def arguments(self) -> tuple:
        """The positional arguments of `GpuStep`; cache tensors are copies, so that runs do not disturb each other."""
        return self.spec, self.layers, *self.ends, self.rope, self.keys.clone(), self.values.clone()


def rope_table(positions: int, head_dim: int, dtype: torch.dtype, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin [1, positions, head_dim], the sign folded into sin."""
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(positions)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype)[None], torch.cat((-sin, sin), -1).to(dtype)[None]


def tiny_model(
    dtype: torch.dtype,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    hidden: int = 48,
    intermediate: int = 80,
    windows: tuple[int | None, ...] = (None, None),
    biases: bool = False,
    qk_norm: bool = False,
    norms_before: bool = True,
    norms_after: bool = False,
    ropes: tuple[int, ...] = (),
    traits: Traits = LLAMA,
    max_tokens: int = 40,
    device: str = "cpu",
) -> Model:
    """A decoder with random weights of the scale that keeps activations near 1."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale + shift).to(dtype).to(device)

    spec = StepSpec(hidden, intermediate, heads, kv_heads, head_dim, 67, 1e-5, windows, ropes, traits)

    def norm(size: int, wanted: bool = True) -> Tensor | None:
        return random(size, scale=0.1, shift=1.0 - traits.norm_offset) if wanted else None

    qkv, q = spec.qkv_width, spec.query_width
    layers = [
        Layer(
            attn_norm=norm(hidden, norms_before),
            qkv=FloatMatrix(random(hidden, qkv, scale=hidden**-0.5), spec.segments("attn_in")),
            qkv_bias=random(qkv, scale=0.3) if biases else None,
            q_norm=norm(head_dim * (heads if traits.wide_head_norms else 1), qk_norm),
            k_norm=norm(head_dim * (kv_heads if traits.wide_head_norms else 1), qk_norm),
            attn_out=FloatMatrix(random(q, hidden, scale=q**-0.5)),
            o_bias=random(hidden, scale=0.3) if biases else None,
            mlp_norm=norm(hidden, norms_before),
            gate_up=FloatMatrix(random(hidden, 2 * intermediate, scale=hidden**-0.5), spec.segments("mlp_in")),
            down=FloatMatrix(random(intermediate, hidden, scale=intermediate**-0.5)),
            attn_post_norm=norm(hidden, norms_after),
            mlp_post_norm=norm(hidden, norms_after),
        )
        for _ in windows
    ]
    embedding, final_norm = FloatMatrix(random(67, hidden)), norm(hidden)
    cache = random(2, len(windows), kv_heads, max_tokens, head_dim)
    bases = (10000.0, 100.0)[: 1 + max(ropes, default=0)]
    tables = [rope_table(max_tokens, head_dim, dtype, base) for base in bases]
    cos, sin = (torch.cat(halves).to(device) for halves in zip(*tables, strict=True))
    return Model(spec, layers, (embedding, final_norm, embedding), (cos, sin), cache[0], cache[1])


def packed(weight: Tensor, segments: tuple[int, ...], bits: int, group: int, dtype: torch.dtype) -> PackedMatrix:
    """A weight [K, N] rounded on the CPU, where it lies."""
    layout = RowLayout(bits, group, segments)
    return PackedMatrix(quantize(weight.cpu(), layout).to(weight.device), layout, dtype)


def packed_model(model: Model, bits: int, head: bool = True) -> Model:
    """The same model with packed matrices in groups of 64; `head`: embedding and head, too."""

    def pack(matrix: Matrix) -> PackedMatrix:
        weight = matrix.tensor()
        return packed(weight, matrix.segments, bits, 64, weight.dtype)

    layers = [replace(layer, **{name: pack(getattr(layer, name)) for name in MATRICES}) for layer in model.layers]
    embedding, norm, _ = model.ends
    table = pack(embedding) if head else embedding
    return replace(model, layers=layers, ends=(table, norm, table))


def plan(layers: int, values: tuple[float, ...] = (0.4, 0.6, 0.5, 0.2, 0.7, 0.5, 0.1)) -> Thresholds:
    """Thresholds different for projections that share a site."""
    return Thresholds(np.tile(np.array(values, np.float32), (layers, 1)))


def scaled(thresholds: Thresholds, spec: StepSpec, seed: int = 3) -> Thresholds:
    """The same under a made-up criterion: every projection weighs every channel, some by zero, by a factor of its own,
    but for `attn_out`, which has one threshold."""
    random = np.random.default_rng(seed)
    scale = {}
    for site in ("attn_in", "mlp_in", "mlp_mid"):
        shape = thresholds.layers, len(SITE_PROJECTIONS[site]), spec.channels(site)
        factors = random.uniform(0.5, 2, shape).astype(np.float32)
        factors[random.random(shape) < 0.05] = 0
        scale[site] = factors
    scale["mlp_in"][:, 1] = scale["mlp_in"][:, 0]
    return Thresholds(thresholds.table, scale)

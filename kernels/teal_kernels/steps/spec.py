"""What the compiled decode step needs to know of a model: its dimensions and its tensors, nothing of where they
come from.

Plain data, without numba, so that a caller may describe a step on a machine that cannot run one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch
from torch import Tensor

from teal_kernels.matrix import Matrix
from teal_kernels.spec import PROJECTIONS, SITES, Geometry
from teal_kernels.thresholds import Thresholds
from teal_kernels.traits import LLAMA, Traits


@dataclass(frozen=True, slots=True)
class StepSpec(Geometry):
    """Dimensions of a decoder.

    Attributes:
        vocab: rows of embedding and head.
        norm_eps: epsilon of every RMSNorm.
        windows: per layer, how many positions a token attends to, its own included; None for all.
        ropes: per layer, which of the rotary tables it takes; empty: the first, for all layers.
        traits: what is computed between the matrices.
    """

    vocab: int
    norm_eps: float
    windows: tuple[int | None, ...]
    ropes: tuple[int, ...] = ()
    traits: Traits = LLAMA

    @property
    def rope_of_layer(self) -> tuple[int, ...]:
        """Per layer, its rotary table."""
        return self.ropes or (0,) * len(self.windows)

    @property
    def qkv_width(self) -> int:
        """Columns of the fused q, k, v matrix."""
        return self.query_width + 2 * self.kv_width


class LayerTensors(Protocol):
    """One layer. Matrices are input-major, [K, N] contiguous: channel k of the input is row k.

    attn_norm, mlp_norm [hidden] or None, of the norm before the half layer; attn_post_norm, mlp_post_norm [hidden] or
    None, of the one after it; qkv [hidden, Nq + 2 Nkv]; qkv_bias [Nq + 2 Nkv] or None; q_norm, k_norm [head_dim], or
    [Nq] and [Nkv] with `wide_head_norms`, or None; attn_out [Nq, hidden]; o_bias [hidden] or None; gate_up
    [hidden, 2 intermediate]; down [intermediate, hidden].
    """

    @property
    def attn_norm(self) -> Tensor | None: ...
    @property
    def qkv(self) -> Matrix: ...
    @property
    def qkv_bias(self) -> Tensor | None: ...
    @property
    def q_norm(self) -> Tensor | None: ...
    @property
    def k_norm(self) -> Tensor | None: ...
    @property
    def attn_out(self) -> Matrix: ...
    @property
    def o_bias(self) -> Tensor | None: ...
    @property
    def mlp_norm(self) -> Tensor | None: ...
    @property
    def gate_up(self) -> Matrix: ...
    @property
    def down(self) -> Matrix: ...
    @property
    def attn_post_norm(self) -> Tensor | None: ...
    @property
    def mlp_post_norm(self) -> Tensor | None: ...


def layer_shapes(spec: StepSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a layer, in the order in which the compiled step finds their addresses."""
    return {
        "attn_norm": (spec.hidden,),
        "qkv": (spec.hidden, spec.qkv_width),
        "qkv_bias": (spec.qkv_width,),
        "q_norm": (spec.head_dim * (spec.heads if spec.traits.wide_head_norms else 1),),
        "k_norm": (spec.head_dim * (spec.kv_heads if spec.traits.wide_head_norms else 1),),
        "attn_out": (spec.query_width, spec.hidden),
        "o_bias": (spec.hidden,),
        "mlp_norm": (spec.hidden,),
        "gate_up": (spec.hidden, 2 * spec.intermediate),
        "down": (spec.intermediate, spec.hidden),
        "attn_post_norm": (spec.hidden,),
        "mlp_post_norm": (spec.hidden,),
    }


def traits_in(traits: Traits, dtype: torch.dtype) -> Traits:
    """The traits with the scale of the embedding as the dtype can represent it."""
    return replace(traits, embedding_scale=torch.tensor(traits.embedding_scale, dtype=dtype).item())


OPTIONAL: Final = frozenset({
    "attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm", "q_norm", "k_norm", "qkv_bias", "o_bias",
})  # fmt: skip

MATRICES: Final = {"qkv": "attn_in", "attn_out": "attn_out", "gate_up": "mlp_in", "down": "mlp_mid"}
"""The matrices of a layer, and the site that each multiplies."""


def check_thresholds(spec: StepSpec, thresholds: Thresholds) -> None:
    """Refuse what a compiled step cannot compare with.

    Raises:
        ValueError: another number of layers or channels than the model's, a centre, or ranks for scores.
    """
    if thresholds.layers != len(spec.windows):
        raise ValueError(f"thresholds must be float32 {[len(spec.windows), len(PROJECTIONS)]} and not negative")
    thresholds.check_widths({site: spec.channels(site) for site in SITES})
    if thresholds.centre:
        raise ValueError("a compiled step cannot take a centre from its vectors")
    if thresholds.ranked:
        raise ValueError("a compiled step cannot rank the entries of its vectors")

"""What the compiled decode step needs to know of a model: its dimensions and its tensors, nothing of where they
come from.

Plain data, without numba, so that a caller may describe a step on a machine that cannot run one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

from teal_kernels.spec import Geometry


@dataclass(frozen=True, slots=True)
class StepSpec(Geometry):
    """Dimensions of a decoder.

    Attributes:
        vocab: rows of embedding and head.
        norm_eps: epsilon of every RMSNorm.
        windows: per layer, how many positions a token attends to, its own included; None for all.
    """

    vocab: int
    norm_eps: float
    windows: tuple[int | None, ...]

    @property
    def qkv_width(self) -> int:
        """Columns of the fused q, k, v matrix."""
        return self.query_width + 2 * self.kv_width


class LayerTensors(Protocol):
    """One layer. Matrices are input-major, [K, N] contiguous: channel k of the input is row k.

    attn_norm, mlp_norm [hidden]; qkv [hidden, Nq + 2 Nkv]; qkv_bias [Nq + 2 Nkv] or None; q_norm, k_norm [head_dim] or
    None; attn_out [Nq, hidden]; o_bias [hidden] or None; gate_up [hidden, 2 intermediate]; down [intermediate, hidden].
    """

    @property
    def attn_norm(self) -> Tensor: ...
    @property
    def qkv(self) -> Tensor: ...
    @property
    def qkv_bias(self) -> Tensor | None: ...
    @property
    def q_norm(self) -> Tensor | None: ...
    @property
    def k_norm(self) -> Tensor | None: ...
    @property
    def attn_out(self) -> Tensor: ...
    @property
    def o_bias(self) -> Tensor | None: ...
    @property
    def mlp_norm(self) -> Tensor: ...
    @property
    def gate_up(self) -> Tensor: ...
    @property
    def down(self) -> Tensor: ...


def layer_shapes(spec: StepSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a layer, in the order in which the compiled step finds their addresses."""
    return {
        "attn_norm": (spec.hidden,),
        "qkv": (spec.hidden, spec.qkv_width),
        "qkv_bias": (spec.qkv_width,),
        "q_norm": (spec.head_dim,),
        "k_norm": (spec.head_dim,),
        "attn_out": (spec.query_width, spec.hidden),
        "o_bias": (spec.hidden,),
        "mlp_norm": (spec.hidden,),
        "gate_up": (spec.hidden, 2 * spec.intermediate),
        "down": (spec.intermediate, spec.hidden),
    }


OPTIONAL: Final = frozenset({"qkv_bias", "q_norm", "k_norm", "o_bias"})

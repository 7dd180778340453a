"""How a model computes what lies between the matrices of its layers, where that differs from Llama.

Plain data: `steps`, `parts` and the transformer in plain PyTorch all read it, and nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SILU: Final = "silu"
GELU_TANH: Final = "gelu_tanh"
ACTIVATIONS: Final = (SILU, GELU_TANH)


@dataclass(frozen=True, slots=True)
class Traits:
    """The defaults are Llama's.

    Which norm weights a layer has decides where its norms are: before attention and MLP, after them, or both.

    Attributes:
        norm_offset: added to the weight of every norm: Gemma stores w - 1.
        norm_rounds_once: normalise, multiply by the weight in float32, then round to the model's dtype; otherwise the
            normalised vector is rounded before it is multiplied, and the product again.
        wide_head_norms: the norms of q and k take all heads as one vector; otherwise each head is a vector.
        activation: of the gate, one of `ACTIVATIONS`.
        attention_scale: factor on the scores; None is head_dim ** -0.5.
        score_cap: scores become cap * tanh(score / cap); None leaves them.
        embedding_scale: factor on the embedding of a token, rounded to the model's dtype.
        residual_scale: factor on what attention and MLP add to the residual stream.
        logit_scale: factor on the logits.
        logit_cap: as `score_cap`, after the factor.
    """

    norm_offset: float = 0.0
    norm_rounds_once: bool = False
    wide_head_norms: bool = False
    activation: str = SILU
    attention_scale: float | None = None
    score_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None


LLAMA: Final = Traits()

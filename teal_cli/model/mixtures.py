"""What families with a mixture of experts add to their row of `families`: tensors, and how many experts there are.

As in `families`, nothing is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

Hf = Any
Name = tuple[str, str]

_EXPERTS: Final[dict[str, Name]] = {
    "router": ("mlp.gate.weight", "ffn_gate_inp.weight"),
    "gate": ("mlp.experts.{}.gate_proj.weight", "ffn_gate_exps.weight"),
    "up": ("mlp.experts.{}.up_proj.weight", "ffn_up_exps.weight"),
    "down": ("mlp.experts.{}.down_proj.weight", "ffn_down_exps.weight"),
}
_MIXTRAL_EXPERTS: Final[dict[str, Name]] = {
    "router": ("block_sparse_moe.gate.weight", "ffn_gate_inp.weight"),
    "gate": ("block_sparse_moe.experts.{}.w1.weight", "ffn_gate_exps.weight"),
    "up": ("block_sparse_moe.experts.{}.w3.weight", "ffn_up_exps.weight"),
    "down": ("block_sparse_moe.experts.{}.w2.weight", "ffn_down_exps.weight"),
}
_STACKED_EXPERTS: Final[dict[str, Name]] = {
    "router": ("block_sparse_moe.router.layer.weight", "ffn_gate_inp.weight"),
    "gate": ("block_sparse_moe.input_linear.weight", "ffn_gate_exps.weight"),
    "up": ("block_sparse_moe.input_linear.weight", "ffn_up_exps.weight"),
    "down": ("block_sparse_moe.output_linear.weight", "ffn_down_exps.weight"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The layers of a model whose MLP is one of several for each token.

    Attributes:
        experts: how many a layer has.
        routed: how many of them a token passes.
        width: of an expert, between its two halves.
        normalised: the weights of a token's experts sum to one.
        layers: of every layer, whether it has experts; the others have an MLP as wide as a token's experts together.
    """

    experts: int
    routed: int
    width: int
    normalised: bool
    layers: tuple[bool, ...]


def _mixtral(hf: Hf) -> Mixture:
    return Mixture(
        experts=hf.num_local_experts,
        routed=hf.num_experts_per_tok,
        width=hf.intermediate_size,
        normalised=True,
        layers=(True,) * hf.num_hidden_layers,
    )


def _qwen3_moe(hf: Hf) -> Mixture:
    dense, step = hf.mlp_only_layers, hf.decoder_sparse_step
    return Mixture(
        experts=hf.num_experts,
        routed=hf.num_experts_per_tok,
        width=hf.moe_intermediate_size,
        normalised=bool(hf.norm_topk_prob),
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(hf.num_hidden_layers)),
    )


def _olmoe(hf: Hf) -> Mixture:
    return replace(_mixtral(hf), normalised=bool(hf.norm_topk_prob))


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureFamily:
    """One row.

    Attributes:
        tensors: the parts that a layer with experts has in place of its MLP's, as `Family.layer`: `router`, and what
            each expert has. `{}` stands for the expert's number; a name without it holds all experts, [E, rows, K].
        numbers: of a config.
    """

    tensors: dict[str, Name]
    numbers: Callable[[Hf], Mixture]


MIXTURES: Final[Mapping[str, MixtureFamily]] = {
    "mixtral": MixtureFamily(tensors=_MIXTRAL_EXPERTS, numbers=_mixtral),
    "qwen3_moe": MixtureFamily(tensors=_EXPERTS, numbers=_qwen3_moe),
    "olmoe": MixtureFamily(tensors=_EXPERTS, numbers=_olmoe),
    "granitemoe": MixtureFamily(tensors=_STACKED_EXPERTS, numbers=_mixtral),
}
"""`model_type` of config.json -> its row."""

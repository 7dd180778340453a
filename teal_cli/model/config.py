"""What teal needs to know of a checkpoint's config.json, checked once and frozen.

transformers reads the file, because it knows every older spelling of it; this module decides what teal can run
and turns it into plain numbers. It knows nothing of tensors: `weights` checks the files against these numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Final

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.files import read_json
from teal_cli.model.families import FAMILIES, Family
from teal_cli.model.fp8 import fp8_of
from teal_cli.model.mixtures import MIXTURES, Mixture
from teal_kernels.spec import SITE_PROJECTIONS, Geometry
from teal_kernels.traits import GELU_TANH, SILU, Traits

SUPPORTED_ROPE: Final[tuple[str, ...]] = ("default", "linear", "llama3", "yarn", "longrope")
SUPPORTED_DTYPES: Final[tuple[str, ...]] = ("bfloat16", "float16", "float32")

SUPPORTED_ACTIVATIONS: Final[dict[str, str]] = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH}
"""What transformers calls it -> what it is in `Traits`."""

_HINT = "check the model with `teal models verify NAME`, or fetch it again with `teal download --force`"


@dataclass(frozen=True, slots=True)
class Rope:
    """How a layer rotates q and k.

    Attributes:
        layer_type: whose parameters it takes from `rope_parameters` of the config; None: there is one set for all.
        rotates: whether it rotates at all; some layers of some families do not.
    """

    layer_type: str | None
    rotates: bool


@dataclass(frozen=True, slots=True)
class ModelConfig(Geometry):
    """The shape of one decoder-only transformer. In a mixture of experts a token's experts are one MLP as wide as they
    are together: that is `intermediate`.

    Attributes:
        family: `model_type` of config.json, one of `FAMILIES`.
        context: the longest sequence the positions are made for, in tokens.
        ropes: per layer, its rotation.
        rotary_dim: how many channels of a head are rotated; a checkpoint has them first.
        rope_switch: a sequence of more tokens is rotated by other frequencies throughout (longrope); None: all alike.
        traits: what is computed between the matrices.
        sliding_windows: per layer, how many positions a token attends to, itself included; None means all.
        qkv_bias: q, k and v have a bias.
        o_bias: o has one.
        qk_norm: each head of q and k passes an RMSNorm before the rotation.
        mixture: the experts of its layers; None where every token passes the same MLP.
        tied: the config says that the output head is the embedding.
        eos_ids: tokens that end a sequence; empty if the checkpoint names none.
        torch_dtype: the dtype the checkpoint asks to be run in, one of `SUPPORTED_DTYPES`.
        hf: transformers' own config, for its rotary functions and for comparisons.
    """

    family: str
    layers: int
    vocab: int
    context: int
    norm_eps: float
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    ropes: tuple[Rope, ...]
    rotary_dim: int
    rope_switch: int | None
    traits: Traits
    mixture: Mixture | None
    tied: bool
    eos_ids: tuple[int, ...]
    bos_id: int | None
    torch_dtype: str
    hf: Any

    def layer_entries(self, index: int) -> int:
        """Entries of the matrices of a layer, those of all its experts."""
        sizes, mixture = self.projection_sizes(), self.mixture
        if mixture is None or not mixture.layers[index]:
            return sum(sizes.values())
        mlp = sum(sizes[projection] for site in ("mlp_in", "mlp_mid") for projection in SITE_PROJECTIONS[site])
        return sum(sizes.values()) + mlp // mixture.routed * (mixture.experts - mixture.routed)


_SIZES: Final = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 20,
    "num_key_value_heads": 1 << 20,
    "head_dim": 1 << 20,
    "hidden_size": 1 << 24,
    "intermediate_size": 1 << 24,
    "moe_intermediate_size": 1 << 24,
    "num_experts": 1 << 15,
    "num_local_experts": 1 << 15,
    "num_experts_per_tok": 1 << 15,
    "decoder_sparse_step": 10_000,
    "vocab_size": 1 << 28,
    "max_position_embeddings": 1 << 31,
}
"""Most of each number in a config.json; no model is near them, and a file with more is damaged or means harm."""


_ROPE_NUMBERS: Final = {
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
}


def load_config(path: str | Path) -> ModelConfig:
    """Reads `config.json` (and `generation_config.json`, if there) of a checkpoint folder.

    Raises:
        NotFoundError: there is no config.json.
        UsageError: an architecture, rotary type, activation or storage that teal does not run; it is named.
        TealError: the file is not a valid config.
    """
    folder = Path(path)
    raw = _read_json(folder / "config.json")
    if raw is None:
        raise NotFoundError(
            f"{folder} is not a checkpoint: it has no config.json",
            hint="give a folder in Hugging Face format, or `teal download` a model",
        )
    _refuse_unsupported(raw)
    _check_sizes(raw, folder)
    hf = _load_hf(folder)
    family = FAMILIES[hf.model_type]
    _refuse_unsupported_parts(family, hf)
    mixture = _mixture(hf, folder)
    heads: int = hf.num_attention_heads
    head_dim: int = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    config = ModelConfig(
        family=hf.model_type,
        layers=hf.num_hidden_layers,
        hidden=hf.hidden_size,
        intermediate=hf.intermediate_size if mixture is None else mixture.routed * mixture.width,
        heads=heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        vocab=hf.vocab_size,
        context=hf.max_position_embeddings,
        norm_eps=hf.rms_norm_eps,
        sliding_windows=family.windows(hf),
        qkv_bias=family.qkv_bias(hf),
        o_bias=family.o_bias(hf),
        qk_norm="q_norm" in family.layer,
        ropes=_ropes(family, hf),
        rotary_dim=int(head_dim * family.rotary_share(hf)),
        rope_switch=_rope_switch(family, hf),
        traits=_traits(family, hf),
        mixture=mixture,
        tied=bool(hf.tie_word_embeddings),
        eos_ids=_eos_ids(hf, _read_json(folder / "generation_config.json") or {}),
        bos_id=hf.bos_token_id,
        torch_dtype=_dtype_name(hf),
        hf=hf,
    )
    _check_shape(config, folder)
    return config


def refuse_mixture(config: ModelConfig, what: str, hint: str) -> None:
    """Refuse a mixture of experts where something is not made for it.

    Args:
        what: what cannot be done, as the subject of a sentence.

    Raises:
        UsageError: the model is one.
    """
    if config.mixture is not None:
        title = FAMILIES[config.family].title
        raise UsageError(f"{what} takes no mixture of experts, which {title} is", hint=hint)


def _read_json(file: Path) -> Mapping[str, Any] | None:
    """The object in a JSON file, or None where there is no such file."""
    try:
        value = read_json(file)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise TealError(f"{file} cannot be read: {error}", hint=_HINT) from error
    if not isinstance(value, dict):
        raise TealError(f"{file} does not hold a JSON object", hint=_HINT)
    return value


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Refuses by the file alone, before transformers meets a model that it may not know either."""
    supported = ", ".join(FAMILIES)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        architectures = raw.get("architectures")
        known = architectures if isinstance(architectures, list) else []
        named = ", ".join(map(str, known)) or "no architecture named"
        raise UsageError(
            f"the architecture {family!r} ({named}) is not supported; teal runs {supported}",
            hint="choose a model of one of these families",
        )
    try:
        fp8_of(raw)
    except ValueError as error:
        raise UsageError(str(error), hint="choose the unquantised checkpoint of the same model") from error


def _check_sizes(raw: Mapping[str, Any], folder: Path) -> None:
    """Bounds on what transformers would make lists of, or divide by."""
    for name, most in _SIZES.items():
        size = raw.get(name, 1)
        if size is None and name in ("head_dim", "num_key_value_heads"):
            continue
        if type(size) is not int or not 1 <= size <= most:
            raise TealError(
                f"{folder / 'config.json'} is not a valid config: {name} must be 1 to {most:,}, not {str(size)[:40]}",
                hint=_HINT,
            )


def _load_hf(folder: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise TealError(f"{folder / 'config.json'} is not a valid config: {reason.strip()}", hint=_HINT) from error


def _refuse_unsupported_parts(family: Family, hf: Any) -> None:
    activation = family.activation(hf)
    if activation not in SUPPORTED_ACTIVATIONS:
        raise UsageError(
            f"the activation {activation!r} is not supported; teal runs {', '.join(SUPPORTED_ACTIVATIONS)}",
            hint="choose a model whose MLP uses one of these",
        )
    if refused := family.refused(hf):
        raise UsageError(f"the checkpoint has {refused}, which teal does not support", hint="choose a model without it")
    if getattr(hf, "mlp_bias", False):
        raise UsageError(
            "the checkpoint has biases in its MLP (mlp_bias), which teal does not support",
            hint="choose a model without mlp_bias",
        )
    for layer_type in {rope.layer_type for rope in _ropes(family, hf)}:
        rope = rope_parameters(hf, layer_type)
        kind = rope.get("rope_type", "default")
        if kind not in SUPPORTED_ROPE:
            raise UsageError(
                f"the rotary embedding {kind!r} is not supported; teal runs {', '.join(SUPPORTED_ROPE)}",
                hint="choose a model with one of these rope types",
            )
        for name in _ROPE_NUMBERS & rope.keys():
            number = rope[name]
            if number is not None and (type(number) not in (int, float) or not 0 < number < inf):
                raise TealError(
                    f"the config.json is not a valid config: {name} of its rotary embedding must be a positive number, "
                    f"not {str(number)[:40]}",
                    hint=_HINT,
                )
        if rope.get("partial_rotary_factor", 1.0) != family.rotary_share(hf):
            raise UsageError(
                f"a partial rotary embedding ({rope['partial_rotary_factor']} of each head) is not supported",
                hint="choose a model that rotates whole heads",
            )


def rope_parameters(hf: Any, layer_type: str | None) -> Mapping[str, Any]:
    """The rotary parameters of one type of layers, or of all (None), in a config of transformers."""
    parameters: Mapping[str, Any] = hf.rope_parameters if layer_type is None else hf.rope_parameters[layer_type]
    return parameters


def _ropes(family: Family, hf: Any) -> tuple[Rope, ...]:
    by_type = any(isinstance(value, Mapping) for value in hf.rope_parameters.values())
    types = hf.layer_types if by_type else (None,) * hf.num_hidden_layers
    return tuple(map(Rope, types, family.rotates(hf)))


def _rope_switch(family: Family, hf: Any) -> int | None:
    every = (rope_parameters(hf, rope.layer_type) for rope in _ropes(family, hf))
    return next((x["original_max_position_embeddings"] for x in every if x.get("rope_type") == "longrope"), None)


def _longrope_problem(config: ModelConfig) -> str | None:
    """What transformers only warns of, or fails at without a word."""
    pairs = config.rotary_dim // 2
    for layer_type in {rope.layer_type for rope in config.ropes}:
        rope = rope_parameters(config.hf, layer_type)
        if rope.get("rope_type") != "longrope":
            continue
        for name in ("short_factor", "long_factor"):
            numbers = rope[name]
            if not isinstance(numbers, list) or [type(x) in (int, float) for x in numbers] != [True] * pairs:
                return f"{name} of its rotary embedding must be {pairs} numbers"
        switch = rope["original_max_position_embeddings"]
        if type(switch) is not int or switch < 2 or switch != config.rope_switch:
            return f"original_max_position_embeddings must be one number of at least 2, not {switch}"
    return None


def _mixture(hf: Any, folder: Path) -> Mixture | None:
    if hf.model_type not in MIXTURES:
        return None
    mixture = MIXTURES[hf.model_type].numbers(hf)
    if not any(mixture.layers):
        return None
    if mixture.routed > mixture.experts:
        raise TealError(
            f"{folder / 'config.json'} is not a valid config: a token passes {mixture.routed} of {mixture.experts} "
            "experts",
            hint=_HINT,
        )
    wide = mixture.routed * mixture.width
    if not all(mixture.layers) and hf.intermediate_size != wide:
        raise UsageError(
            f"some layers have experts and others an MLP of width {hf.intermediate_size}, and teal takes them only as "
            f"wide as a token's {mixture.routed} experts of {mixture.width} together",
            hint="choose a model whose layers all have experts, or whose MLPs are as wide as its routed experts",
        )
    return mixture


def _traits(family: Family, hf: Any) -> Traits:
    return Traits(
        norm_offset=family.norm_offset,
        norm_rounds_once=family.norm_rounds_once,
        wide_head_norms=family.wide_head_norms,
        activation=SUPPORTED_ACTIVATIONS[family.activation(hf)],
        attention_scale=family.attention_scale(hf),
        score_cap=family.score_cap(hf),
        embedding_scale=family.embedding_scale(hf),
        residual_scale=family.residual_scale(hf),
        logit_scale=family.logit_scale(hf),
        logit_cap=family.logit_cap(hf),
    )


def _eos_ids(hf: Any, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """generation_config.json wins: instruction models often name their end-of-turn token only there."""
    eos = generation.get("eos_token_id", hf.eos_token_id)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (eos,)


def _dtype_name(hf: Any) -> str:
    """The dtype the config asks for; one that names none means float32."""
    name = str(hf.dtype).removeprefix("torch.")
    return name if name in SUPPORTED_DTYPES else "float32"


def _check_shape(config: ModelConfig, folder: Path) -> None:
    """Numbers that no tensor can contradict later on."""
    problem = None
    if config.heads % config.kv_heads:
        problem = f"{config.heads} attention heads are not a multiple of {config.kv_heads} key-value heads"
    elif config.head_dim % 2:
        problem = f"the head size {config.head_dim} is odd"
    elif config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim:
        problem = f"{config.rotary_dim} of {config.head_dim} channels of a head cannot be rotated in pairs"
    elif len(config.sliding_windows) != config.layers:
        problem = f"it names {len(config.sliding_windows)} layer types for {config.layers} layers"
    else:
        problem = _longrope_problem(config)
    if problem:
        raise TealError(f"{folder / 'config.json'} is not a valid config: {problem}", hint=_HINT)

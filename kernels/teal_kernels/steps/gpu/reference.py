"""The decode step in plain PyTorch, put together from the references of its parts: what `GpuStep` must compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from teal_kernels.matrix import Matrix
from teal_kernels.ops.sparse_gemv.reference import sparse_gemv_reference
from teal_kernels.ops.threshold.reference import threshold_reference
from teal_kernels.parts.attention.reference import attention_reference
from teal_kernels.parts.norm.reference import add_partials_reference, rms_norm_reference
from teal_kernels.parts.rope.reference import qkv_reference
from teal_kernels.parts.swiglu.reference import swiglu_reference
from teal_kernels.spec import SITES
from teal_kernels.steps.spec import LayerTensors, StepSpec, traits_in
from teal_kernels.thresholds import Thresholds


def gpu_step_reference(
    spec: StepSpec,
    layers: Sequence[LayerTensors],
    ends: tuple[Matrix, Tensor, Matrix],
    rope: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    thresholds: Thresholds | None,
    token: int,
    position: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [vocab] of one step, and per site the vectors [layers, K] that its products consumed.

    Arguments as for `GpuStep`; `ends` are embedding, final norm and head. The cache is written.
    """
    rows: dict[str, list[Tensor]] = {site: [] for site in SITES}

    def product(i: int, site: str, x: Tensor, matrix: Matrix) -> Tensor:
        weight = matrix.tensor()
        if thresholds is None:
            rows[site].append(x)
            return (x.float() @ weight.float()).to(x.dtype)[None]
        own = torch.from_numpy(thresholds.site(i, site)).to(x.device)
        rows[site].append(threshold_reference(x, torch.from_numpy(thresholds.lowest(i, site)).to(x.device)))
        return sparse_gemv_reference(x, weight, own, spec.segments(site))[None]

    eps, traits = spec.norm_eps, traits_in(spec.traits, ends[0].dtype)
    hidden = ends[0].rows(torch.tensor([token], device=ends[0].device))[0] * traits.embedding_scale
    for i, w in enumerate(layers):
        cos, sin = (table[spec.rope_of_layer[i], position] for table in rope)
        x = rms_norm_reference(hidden, w.attn_norm, eps, traits)
        qkv = product(i, "attn_in", x, w.qkv)
        norms = None if w.q_norm is None or w.k_norm is None else (w.q_norm, w.k_norm)
        q, k, v = qkv_reference(qkv, spec.heads, spec.kv_heads, cos, sin, w.qkv_bias, norms, eps, traits)
        keys[i, :, position], values[i, :, position] = k, v
        x = attention_reference(q, keys[i], values[i], position + 1, spec.windows[i], traits)
        out = product(i, "attn_out", x, w.attn_out)
        hidden = add_partials_reference(hidden, out, w.o_bias, w.attn_post_norm, eps, traits)
        x = rms_norm_reference(hidden, w.mlp_norm, eps, traits)
        gate_up = product(i, "mlp_in", x, w.gate_up)
        x = swiglu_reference(gate_up, hidden.dtype, traits.activation)
        out = product(i, "mlp_mid", x, w.down)
        hidden = add_partials_reference(hidden, out, None, w.mlp_post_norm, eps, traits)
    logits = linear(rms_norm_reference(hidden, ends[1], eps, traits), ends[2].tensor()) * traits.logit_scale
    if traits.logit_cap is not None:
        logits = torch.tanh(logits / traits.logit_cap) * traits.logit_cap
    return logits, {site: torch.stack(vectors) for site, vectors in rows.items()}

"""transformers' own model as the judge of ours: the same tokens through both, logits and linear inputs side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from teal_cli.model.transformer import Transformer, dense
from teal_cli.sparsity.plan import Plan
from teal_kernels.matrix import Matrix
from teal_kernels.spec import PROJECTION_INDEX, PROJECTION_SITE, PROJECTIONS, SITE_PROJECTIONS, columns

PROMPT, TOTAL = 13, 24  # both beyond the tiny models' sliding window of 8
MODULES = {
    **dict.fromkeys("qkvo", "self_attn"),
    **dict.fromkeys(("gate", "up", "down"), "mlp"),
}


def unfused(model: Any) -> Any:
    """transformers' model with a linear layer for each projection, so that each can be watched by its name; in a
    mixture of experts with what stands for it: see `SplitExperts`."""
    config = model.config
    for layer in model.model.layers:
        block = layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp
        if hasattr(block, "experts"):
            block.experts = SplitExperts(block.experts, block)
            layer.mlp = block
    kv = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    for layer in model.model.layers:
        for parent, name, widths in (
            (layer.self_attn, "qkv_proj", {"q": config.hidden_size, "k": kv, "v": kv}),
            (layer.mlp, "gate_up_proj", dict.fromkeys(("gate", "up"), config.intermediate_size)),
        ):
            if hasattr(parent, name) and not hasattr(parent, "experts"):
                setattr(parent, name, Split(parent, getattr(parent, name).weight, widths))
    return model


class SplitExperts(torch.nn.Module):
    """transformers' experts of a layer, one token at a time, reading what passes three modules of its MLP that do
    nothing: `gate_proj` and `up_proj` the token's vector, `down_proj` the vectors between the two halves of its
    experts, by their numbers, one after the other."""

    def __init__(self, experts: Any, block: torch.nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down, self.act = experts.gate_up_proj, experts.down_proj, experts.act_fn
        self.taps = [torch.nn.Identity() for _ in range(3)]
        self.seen: list[Tensor] = []
        """Of each call the experts of its tokens, [S, k] ascending."""
        for name, tap in zip(("gate_proj", "up_proj", "down_proj"), self.taps, strict=True):
            block.add_module(name, tap)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        order = experts.argsort(-1)
        experts, weights = experts.gather(-1, order), weights.gather(-1, order)
        self.seen.append(experts)
        gate, up = (tap(x[None])[0] for tap in self.taps[:2])
        gates, ups = self.gate_up.chunk(2, dim=1)
        pairs = list(zip(experts.tolist(), range(len(x)), strict=True))
        mid = torch.stack([torch.cat([self.act(gates[e] @ gate[t]) * (ups[e] @ up[t]) for e in es]) for es, t in pairs])
        mid = self.taps[2](mid[None])[0].unflatten(1, (experts.shape[1], -1))
        return torch.stack(
            [sum(weights[t, j] * (self.down[e] @ mid[t, j]) for j, e in enumerate(es)) for es, t in pairs]
        ).to(x.dtype)


class Split(torch.nn.Module):
    """x @ weight.T by parts, each a linear layer of `parent`."""

    def __init__(self, parent: torch.nn.Module, weight: Tensor, widths: dict[str, int]) -> None:
        super().__init__()
        self.parts = []
        for name, rows in zip(widths, weight.split(tuple(widths.values())), strict=True):
            linear = torch.nn.Linear(rows.shape[1], len(rows), bias=False)
            linear.weight = torch.nn.Parameter(rows)
            parent.add_module(f"{name}_proj", linear)
            self.parts.append(linear)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def reference(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return unfused(AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval())


def tokens_for(vocab: int, count: int = TOTAL) -> Tensor:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(7))


def watch(model: Any) -> dict[tuple[int, str], list[Tensor]]:
    """(layer, projection) -> what each call of that linear layer of transformers' model read, [S, K]."""
    seen: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    for index, layer in enumerate(model.model.layers):
        for name, parent in MODULES.items():
            linear = getattr(getattr(layer, parent), f"{name}_proj")
            linear.register_forward_pre_hook(lambda _, args, key=(index, name): seen[key].append(args[0][0].clone()))
    return seen


class Recorder:
    """A `Project` that remembers its inputs."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, str], list[Tensor]] = defaultdict(list)

    def __call__(self, layer: int, site: str, x: Tensor, matrix: Matrix) -> Tensor:
        self.seen[layer, site].append(x.clone())
        return dense(layer, site, x, matrix)


def relative_rms(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())


def assert_same_inputs(ours: Recorder, theirs: dict[tuple[int, str], list[Tensor]], limit: float) -> None:
    """Row by row, so that one bad token among many good ones is seen."""
    for (layer, site), xs in ours.seen.items():
        rows = torch.cat(xs)
        for projection in SITE_PROJECTIONS[site]:
            for row, expected in zip(rows, torch.cat(theirs[layer, projection]), strict=True):
                assert relative_rms(row, expected) < limit, (layer, projection)


@torch.inference_mode()
def run_theirs(model: Any, tokens: Tensor) -> Tensor:
    """Logits [steps + 1, vocab] of a prefill of PROMPT tokens and one step for each token after it."""
    out = model(tokens[None, :PROMPT], use_cache=True)
    logits = [out.logits[0, -1]]
    for token in tokens[PROMPT:]:
        out = model(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0, -1])
    return torch.stack(logits).float()


def run_ours(model: Transformer, tokens: Tensor, project: Any = dense, chunk: int = PROMPT) -> Tensor:
    cache = model.cache(len(tokens))
    for start in range(0, PROMPT, chunk):
        last = model.forward(tokens[start : min(start + chunk, PROMPT)], start, cache, project)
    logits = [last]
    logits += [model.forward(tokens[i : i + 1], i, cache, project) for i in range(PROMPT, len(tokens))]
    return torch.stack(logits)


Keep = Callable[[int, int, str, Tensor], Tensor]
"""(row, layer, projection, x [S, K] at its sparse positions) -> what the projection reads of it."""


def kept_by(plan: Plan) -> Keep:
    """What a plan keeps, straight from the definition of a score."""

    def keep(row: int, layer: int, projection: str, x: Tensor) -> Tensor:
        site, column, scoring = PROJECTION_SITE[projection], PROJECTION_INDEX[projection], plan.scoring
        centre = torch.from_numpy(scoring.centre[site][layer]) if site in scoring.centre else torch.zeros(x.shape[1])
        score = (x - centre).abs()
        if scoring.criterion == "topk":
            score = 1.0 + (score[:, None, :] < score[:, :, None]).sum(-1)
        if site in scoring.scale:
            score = score * torch.from_numpy(scoring.scale[site][layer, column - columns(site).start])
        return torch.where(score > float(plan.thresholds[layer, column]), x, centre)

    return keep


@torch.no_grad()
def masked_logits(path: Path, rows: Sequence[np.ndarray], keep: Keep | None, start: int) -> list[Tensor]:
    """transformers' float32 logits [S, vocab] of each row of token ids; every linear layer reads what `keep` leaves of
    its input at positions from `start` on. None is the dense model."""
    model = unfused(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval())
    running = 0

    def hook(_: Any, inputs: tuple[Tensor], layer: int, projection: str) -> tuple[Tensor]:
        x = inputs[0].clone()
        if keep is not None and x.shape[1] > start:
            x[0, start:] = keep(running, layer, projection, x[0, start:])
        return (x,)

    for layer, module in enumerate(model.model.layers):
        for projection in PROJECTIONS:
            linear = getattr(getattr(module, MODULES[projection]), f"{projection}_proj")
            linear.register_forward_pre_hook(partial(hook, layer=layer, projection=projection))
    found = []
    for running, row in enumerate(rows):  # noqa: B007 - hooks read it
        found.append(model(torch.from_numpy(row)[None]).logits[0])
    return found


def log_probabilities(path: Path, rows: list[np.ndarray], thresholds: np.ndarray | None, start: int) -> list[Tensor]:
    """transformers' log-probabilities of each sequence; entries with |x| <= t zeroed at positions from `start` on."""

    def keep(row: int, layer: int, projection: str, x: Tensor) -> Tensor:
        assert thresholds is not None
        return torch.where(x.abs() > float(thresholds[layer, PROJECTION_INDEX[projection]]), x, 0.0)

    found = masked_logits(path, rows, None if thresholds is None else keep, start)
    return [logits.double().log_softmax(-1) for logits in found]

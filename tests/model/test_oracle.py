"""Our transformer against transformers' own: logits, and the inputs of all linear layers."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from teal_cli.model.sites import SITE_PROJECTIONS
from teal_cli.model.transformer import Transformer, attend_alone, block, dense
from teal_cli.model.weights import Checkpoint

PROMPT, TOTAL = 13, 24  # both beyond the tiny models' sliding window of 8
MODULES = {
    **dict.fromkeys("qkvo", "self_attn"),
    **dict.fromkeys(("gate", "up", "down"), "mlp"),
}


def reference(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


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

    def __call__(self, layer: int, site: str, x: Tensor, weight: Tensor) -> Tensor:
        self.seen[layer, site].append(x.clone())
        return dense(layer, site, x, weight)


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


def test_logits_and_linear_inputs_agree(tiny_model: Path) -> None:
    ours, theirs = Transformer.from_checkpoint(tiny_model), reference(tiny_model)
    tokens = tokens_for(ours.config.vocab)
    seen, recorder = watch(theirs), Recorder()
    mine, expected = run_ours(ours, tokens, recorder), run_theirs(theirs, tokens)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    assert len(recorder.seen) == 4 * ours.config.layers
    assert_same_inputs(recorder, seen, 1e-4)


def test_prefill_in_pieces_equals_prefill_at_once(tiny_family: Path) -> None:
    ours = Transformer.from_checkpoint(tiny_family)
    tokens = tokens_for(ours.config.vocab)
    torch.testing.assert_close(run_ours(ours, tokens, chunk=5), run_ours(ours, tokens), rtol=1e-4, atol=1e-4)


def test_every_position_of_a_sequence_agrees(tiny_family: Path) -> None:
    ours, theirs = Transformer.from_checkpoint(tiny_family), reference(tiny_family)
    tokens = tokens_for(ours.config.vocab)
    with torch.inference_mode():
        expected = theirs(tokens[None]).logits[0]
    logits = ours.logits(ours.states(tokens, 0, ours.cache(len(tokens))))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_layer_by_layer_without_a_cache_equals_the_model(tiny_family: Path) -> None:
    """The way calibration runs: one layer loaded at a time."""
    checkpoint, ours = Checkpoint(tiny_family), Transformer.from_checkpoint(tiny_family)
    config = checkpoint.config
    tokens = tokens_for(config.vocab)
    hidden = checkpoint.embedding(torch.float32)[tokens]
    rope, attend = ours.rope.at(0, len(tokens)), attend_alone(config)
    for index in range(config.layers):
        hidden = block(config, index, checkpoint.layer(index, torch.float32), hidden, rope, attend)
    torch.testing.assert_close(hidden, ours.states(tokens, 0, ours.cache(len(tokens))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(tiny_family: Path, dtype: torch.dtype) -> None:
    ours, theirs = Transformer.from_checkpoint(tiny_family, dtype), reference(tiny_family, dtype)
    tokens = tokens_for(ours.config.vocab)
    seen, recorder = watch(theirs), Recorder()
    mine, expected = run_ours(ours, tokens, recorder), run_theirs(theirs, tokens)
    limit = 0.05 if dtype == torch.bfloat16 else 0.01
    assert relative_rms(mine, expected) < limit
    assert_same_inputs(recorder, seen, 2 * limit)


def test_rewinding_the_cache_gives_the_same_logits(tiny_family: Path) -> None:
    ours = Transformer.from_checkpoint(tiny_family)
    tokens = tokens_for(ours.config.vocab)
    cache = ours.cache(len(tokens))
    ours.forward(tokens[:PROMPT], 0, cache)
    first = ours.forward(tokens[PROMPT : PROMPT + 1], PROMPT, cache)
    ours.forward(tokens[PROMPT + 1 :], PROMPT + 1, cache)
    cache.length = PROMPT
    assert torch.equal(ours.forward(tokens[PROMPT : PROMPT + 1], PROMPT, cache), first)

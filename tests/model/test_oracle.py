"""Our transformer against transformers' own on tiny models of every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference_model import (
    PROMPT,
    Recorder,
    assert_same_inputs,
    reference,
    relative_rms,
    run_ours,
    run_theirs,
    tokens_for,
    watch,
)

from teal_cli.model.transformer import Transformer, attend_alone, block, embed
from teal_cli.model.weights import Checkpoint


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
    hidden = embed(config, checkpoint.embedding(torch.float32), tokens)
    rope, attend = ours.rope.at(0, len(tokens)), attend_alone(config)
    for index in range(config.layers):
        hidden = block(config, index, checkpoint.layer(index, torch.float32), hidden, rope[index], attend)
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

"""Our transformer against transformers' own on a real model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from reference_model import PROMPT, Recorder, assert_same_inputs, reference, relative_rms, run_ours, run_theirs, watch
from torch import Tensor
from transformers import AutoTokenizer

from teal_cli.model.transformer import Transformer

if TYPE_CHECKING:
    from teal_cli.registry.registry import ModelEntry

TEXT = "The sea was calm that morning, and the old fisherman rowed out past the lighthouse, as he had done every day"


@pytest.fixture(scope="module")
def tokens(smollm2: ModelEntry) -> Tensor:
    ids: Tensor = AutoTokenizer.from_pretrained(smollm2.path)(TEXT, return_tensors="pt").input_ids[0]
    assert len(ids) > PROMPT + 5
    return ids


def test_logits_and_linear_inputs_agree(smollm2: ModelEntry, tokens: Tensor) -> None:
    ours, theirs = Transformer.from_checkpoint(smollm2.path, torch.float32), reference(smollm2.path)
    seen, recorder = watch(theirs), Recorder()
    mine, expected = run_ours(ours, tokens, recorder), run_theirs(theirs, tokens)
    assert relative_rms(mine, expected) < 1e-5
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(mine.argmax(-1), expected.argmax(-1))
    assert_same_inputs(recorder, seen, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(smollm2: ModelEntry, tokens: Tensor, dtype: torch.dtype) -> None:
    """No further from float32 than transformers is itself, give or take a quarter."""
    exact = run_ours(Transformer.from_checkpoint(smollm2.path, torch.float32), tokens)
    theirs = run_theirs(reference(smollm2.path, dtype), tokens)
    ours = run_ours(Transformer.from_checkpoint(smollm2.path, dtype), tokens)
    assert relative_rms(ours, exact) < 1.25 * relative_rms(theirs, exact)

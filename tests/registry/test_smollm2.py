"""The real model, end to end: the wheel's GGUF against llama.cpp's tokens and what transformers loads."""

from __future__ import annotations

import json

import pytest

from teal_cli.registry.registry import ModelEntry
from teal_cli.registry.verify import verify


def test_it_is_registered_as_it_is(smollm2: ModelEntry) -> None:
    assert (smollm2.architecture, smollm2.family, smollm2.dtype) == ("LlamaForCausalLM", "llama", "bfloat16")
    assert smollm2.parameters == 134_515_008
    assert smollm2.context == 8192

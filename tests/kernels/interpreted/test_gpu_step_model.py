"""The GPU step, interpreted, on checkpoints of every family: the logits and rows of a step by operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_cases import relative_error
from kernel_models import plan

from teal_cli.decoding.decoder import Decoder
from teal_cli.decoding.projector import DenseProjector, SparseProjector, empty_rows
from teal_cli.decoding.sampling import Sampling
from teal_cli.decoding.steps import TRITON_GRAPH, open_step
from teal_cli.errors import TealError
from teal_cli.model.transformer import Transformer
from teal_kernels.steps.gpu.op import GpuStep
from teal_kernels.steps.spec import StepSpec

PROMPT = (3, 50, 17, 200, 99, 4, 31, 8, 77, 120, 5)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_agrees_with_the_transformer(tiny_family, sparse):
    model = Transformer.from_checkpoint(tiny_family, torch.float32)
    config = model.config
    cache = model.cache(32)
    model.forward(torch.tensor(PROMPT), 0, cache)
    spec = StepSpec(
        hidden=config.hidden,
        intermediate=config.intermediate,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab,
        norm_eps=config.norm_eps,
        windows=config.sliding_windows,
        ropes=model.rope.of_layer,
        traits=config.traits,
    )
    thresholds = plan(config.layers) if sparse else None
    rope = model.rope.tables(32)
    ends = model.embedding, model.final_norm, model.lm_head
    keys, values = cache.kv.clone().unbind(1)
    step = GpuStep(spec, model.layers, *ends, rope, keys, values, thresholds=thresholds, ring_slots=4)

    rows = empty_rows(config, model.dtype, model.device)
    if thresholds is None:
        project = DenseProjector()
        project.rows = rows
    else:
        project = SparseProjector(config, thresholds, "reference", model.device, rows)
    for i, token in enumerate((7, 160)):
        position = len(PROMPT) + i
        wanted = model.forward(torch.tensor([token]), position, cache, project)
        assert relative_error(step.step(token, position), wanted) < 1e-5
        for site, vectors in rows.items():
            got = step.ring[site][:, i]
            assert relative_error(got, vectors) < 1e-5, site
            assert np.mean(((got == 0) != (vectors == 0)).numpy()) < 0.002, site


def decode(model, sampling, sequences, prompt=PROMPT):
    cache = model.cache(40)
    decoder = Decoder(model, cache, open_step(model, cache, plan(model.config.layers), TRITON_GRAPH, 0.5))
    return [
        list(decoder.generate(prompt, max_new_tokens=6, sampling=sampling, sequence=sequence)) for sequence in sequences
    ]


def test_a_sequence_comes_out_the_same_whatever_went_before(tiny):
    model = Transformer.from_checkpoint(tiny("llama3"), torch.float32)
    sampling = Sampling(temperature=1.5, top_k=50, seed=3)
    first, second, again = decode(model, sampling, (0, 1, 0))
    assert first == again
    assert first != second
    assert decode(model, sampling, (1,)) == [second]
    assert decode(model, Sampling(temperature=1.5, top_k=50, seed=4), (0,)) != [first]


def test_a_history_in_the_cache_is_that_of_a_whole_prefill(tiny):
    model = Transformer.from_checkpoint(tiny("llama3"), torch.float32)
    more, answers = (9, 41, 250), []
    for keep in (True, False):
        cache = model.cache(40)
        decoder = Decoder(model, cache, open_step(model, cache, None, TRITON_GRAPH, 0.0))
        ids = list(PROMPT)
        ids += decoder.generate(PROMPT, max_new_tokens=5, sampling=Sampling(temperature=0))
        ids += more
        cached = cache.length if keep else 0
        answers.append(list(decoder.generate(ids, max_new_tokens=5, sampling=Sampling(temperature=0), cached=cached)))
        assert decoder.tally.prompt_tokens == len(PROMPT) + (1 + len(more) if keep else len(ids))
    assert answers[0] == answers[1]


def test_greedy_takes_what_the_logits_say(tiny):
    model = Transformer.from_checkpoint(tiny("llama3"), torch.float32)
    cache = model.cache(40)
    step = open_step(model, cache, plan(model.config.layers), TRITON_GRAPH, 0.5)
    token = int(model.forward(torch.tensor(PROMPT), 0, cache).argmax())
    tokens = [token]
    for position in range(len(PROMPT), len(PROMPT) + 5):
        token = int(step(token, position).argmax())
        tokens.append(token)
    assert decode(model, Sampling(temperature=0), (0,)) == [tokens]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_end_the_sequence(tiny, temperature):
    model = Transformer.from_checkpoint(tiny("llama3"), torch.float32)
    model.final_norm.fill_(torch.nan)
    with pytest.raises(TealError, match="NaN"):
        decode(model, Sampling(temperature=temperature), (0,))

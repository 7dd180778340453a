from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teal_cli.decoding.sampling import Sampler, Sampling
from teal_cli.errors import TealError, UsageError


def test_zero_temperature_takes_the_most_likely_token():
    logits = torch.randn(100)
    assert Sampler(Sampling(temperature=0))(logits) == int(logits.argmax())


def test_top_one_is_greedy():
    logits = torch.randn(100)
    assert Sampler(Sampling(temperature=3.0, top_k=1))(logits) == int(logits.argmax())


@given(top_k=st.integers(1, 20), seed=st.integers(0, 2**40), sequence=st.integers(0, 1000))
def test_only_the_top_k_are_drawn(top_k, seed, sequence):
    logits = torch.linspace(-3, 3, 20)
    token = Sampler(Sampling(temperature=1.0, top_k=top_k, seed=seed), sequence=sequence)(logits)
    assert 20 - top_k <= token < 20


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, math.log(3.0)])
    sampler = Sampler(Sampling(temperature=1.0, top_k=0, seed=1))
    share = sum(sampler(logits) for _ in range(4000)) / 4000
    assert share == pytest.approx(0.75, abs=0.03)


def test_the_stream_depends_on_seed_and_sequence_alone():
    logits = torch.zeros(1000)

    def draw(seed, sequence):
        sampler = Sampler(Sampling(temperature=1.0, top_k=0, seed=seed), sequence=sequence)
        return [sampler(logits) for _ in range(8)]

    assert draw(5, 2) == draw(5, 2)
    assert len({tuple(draw(seed, sequence)) for seed in range(3) for sequence in range(3)}) == 9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_refused(temperature):
    logits = torch.tensor([1.0, float("nan"), 2.0])
    with pytest.raises(TealError, match="NaN"):
        Sampler(Sampling(temperature=temperature))(logits)


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"seed": -3}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UsageError):
        Sampling(**settings)

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from teal_cli.decoding.sampling import Sampler, Sampling
from teal_cli.errors import TealError, UsageError
from teal_kernels.parts.sample.reference import philox, random_bits


def test_zero_temperature_takes_the_most_likely_token():
    logits = torch.randn(100)
    assert Sampler(Sampling(temperature=0))(logits, 3) == int(logits.argmax())


def test_top_one_is_greedy():
    logits = torch.randn(100)
    assert Sampler(Sampling(temperature=3.0, top_k=1))(logits, 3) == int(logits.argmax())


@given(top_k=st.integers(1, 20), seed=st.integers(0, 2**40), sequence=st.integers(0, 1000))
def test_only_the_top_k_are_drawn(top_k, seed, sequence):
    logits = torch.linspace(-3, 3, 20)
    token = Sampler(Sampling(temperature=1.0, top_k=top_k, seed=seed), sequence=sequence)(logits, 3)
    assert 20 - top_k <= token < 20


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, math.log(3.0)])
    sampler = Sampler(Sampling(temperature=1.0, top_k=0, seed=1))
    share = sum(sampler(logits, position) for position in range(4000)) / 4000
    assert share == pytest.approx(0.75, abs=0.03)


def test_the_stream_depends_on_seed_and_sequence_alone():
    logits = torch.zeros(1000)

    def draw(seed, sequence):
        sampler = Sampler(Sampling(temperature=1.0, top_k=0, seed=seed), sequence=sequence)
        return [sampler(logits, position) for position in range(8)]

    assert draw(5, 2) == draw(5, 2)
    assert len({tuple(draw(seed, sequence)) for seed in range(3) for sequence in range(3)}) == 9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_refused(temperature):
    logits = torch.tensor([1.0, float("nan"), 2.0])
    with pytest.raises(TealError, match="NaN"):
        Sampler(Sampling(temperature=temperature))(logits, 3)


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 9e-6])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.tensor([1.0, 2.0, 2.0, -torch.inf])
    assert Sampler(Sampling(temperature=temperature))(logits, 3) == 1


@pytest.mark.parametrize("temperature", [1e-5, 3e-5, 1e38])
def test_extreme_temperatures_draw(temperature):
    logits = torch.tensor([1.0, 2.0, 2.0, -torch.inf])
    drawn = {Sampler(Sampling(temperature=temperature))(logits, position) for position in range(50)}
    assert drawn == ({1, 2} if temperature < 1 else {0, 1, 2})


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(key, counter, words):
    """The known answers of Random123, the authors' own library."""
    assert philox(key, counter) == words


@given(
    logits=st.lists(st.sampled_from([-1e3, -2.0, 0.0, 0.5, 0.5, 1.0, 1.25]), min_size=2, max_size=40),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1.0),
    position=st.integers(0, 2**40),
)
def test_candidates_and_draw_are_those_of_sorted_probabilities(logits, top_k, top_p, position):
    """Against float64 arithmetic of numpy, by the definition: groups of equal logits, the likeliest first."""
    x = np.array(logits)
    weights = np.exp((x - x.max()) / 0.7)
    ranked = np.sort(x)[::-1]
    kept = x >= (ranked[top_k - 1] if 0 < top_k < len(x) else -np.inf)
    total = weights[kept].sum()
    above = np.array([weights[x > value].sum() for value in x])
    assume(top_k != 1 and not np.isclose(above, top_p * total, rtol=1e-6, atol=0).any())
    kept &= above < top_p * total
    cumulative = np.cumsum(np.where(kept, weights, 0.0))
    target = random_bits(7, 2, position) / 2**64 * cumulative[-1]
    assume(not np.isclose(cumulative, target, rtol=1e-6).any())
    wanted = int((cumulative <= target).sum())
    rule = Sampling(0.7, top_k, top_p, seed=7)
    assert Sampler(rule, sequence=2)(torch.tensor(logits), position) == wanted


def test_top_p_draws_the_fewest_that_reach_it():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    for top_p, wanted in {0.35: {1}, 0.65: {1, 3}, 0.85: {1, 2, 3}, 1.0: {0, 1, 2, 3}}.items():
        sampler = Sampler(Sampling(1.0, 0, top_p))
        assert {sampler(logits, position) for position in range(300)} == wanted


@pytest.mark.parametrize(
    "settings",
    [
        *({"temperature": temperature} for temperature in (-1.0, float("nan"), float("inf"), 1e39)),
        *({"top_p": top_p} for top_p in (0.0, -0.1, 1.1, float("nan"))),
        {"top_k": -1},
        {"seed": -3},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UsageError):
        Sampling(**settings)

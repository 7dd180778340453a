"""A prompt whose beginning is in the cache: only what is new is prefilled, and nothing comes out differently."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_tiny import TINY_FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from teal_cli.decoding.decoder import Decoder
from teal_cli.decoding.projector import Rows
from teal_cli.decoding.sampling import Sampling
from teal_cli.decoding.steps import Choose, open_step
from teal_cli.model.transformer import Transformer
from teal_kernels.thresholds import Thresholds

GREEDY = Sampling(temperature=0)
TURNS = ([5, 9, 17, 3, 60, 41, 8, 100, 7], [12], [200, 31, 4, 77, 120, 5, 88, 9, 10, 11, 6])
"""What the user says in turn: longer than the sliding windows of 8, one token, longer again."""
BACKENDS = ("numba", "cpu", "reference")


class Watched:
    """A step that keeps the logits of every token that was chosen, the prefill's too."""

    def __init__(self, decoder: Decoder) -> None:
        self._step, self.backend = decoder.step, decoder.step.backend
        self.logits: list[Tensor] = []
        self.kept = self._step.kept
        decoder.step = self

    def __call__(self, *args: object) -> Tensor:
        return self._step(*args)  # type: ignore[arg-type]

    def follow(
        self, token: int, position: int, choose: Choose, count: int, stop: Collection[int], rows: Rows | None = None
    ) -> list[int]:
        return [choose(self(token, position), position)]

    def sampler(self, sampling: Sampling, sequence: int) -> Choose:
        inner = self._step.sampler(sampling, sequence)

        def choose(logits: Tensor, position: int) -> int:
            self.logits.append(logits.clone())
            return inner(logits, position)

        return choose


def decoder(model: Transformer, backend: str, thresholds: np.ndarray | None = None) -> Decoder:
    cache = model.cache(128)
    compared = None if thresholds is None else Thresholds(thresholds)
    return Decoder(model, cache, open_step(model, cache, compared, backend, 0.5))


def converse(talker: Decoder, *, keep: bool) -> tuple[list[int], list[list[int]]]:
    """All turns, each answered by six tokens; with `keep`, what the cache holds is not prefilled again."""
    ids: list[int] = []
    answers = []
    for said in TURNS:
        ids += said
        cached = talker.cache.length if keep else 0
        answers.append(list(talker.generate(ids, max_new_tokens=6, sampling=GREEDY, cached=cached)))
        ids += answers[-1]
    return ids, answers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_a_kept_history_is_the_whole_conversation_prefilled(
    tiny: Callable[[str], Path], name: str, backend: str
) -> None:
    model = Transformer.from_checkpoint(tiny(name), torch.float32)
    kept, whole = decoder(model, backend), decoder(model, backend)
    watched = [Watched(kept), Watched(whole)]
    assert converse(kept, keep=True) == converse(whole, keep=False)
    ours, theirs = (torch.stack(step.logits) for step in watched)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    # Each later turn feeds what was said, and the last token of the answer before it, which no step was fed.
    assert kept.tally.prompt_tokens == sum(map(len, TURNS)) + len(TURNS) - 1
    assert whole.tally.prompt_tokens > 2 * kept.tally.prompt_tokens


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_transformers_says_the_same(tiny: Callable[[str], Path], name: str) -> None:
    """Its logits over the whole conversation at once: every token of every answer is its most likely one."""
    talker = decoder(Transformer.from_checkpoint(tiny(name), torch.float32), "numba")
    ids, answers = converse(talker, keep=True)
    reference = AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = reference.eval()(torch.tensor([ids])).logits[0]
    end = 0
    for said, answer in zip(TURNS, answers, strict=True):
        begin = end + len(said)
        end = begin + len(answer)
        for place in range(begin, end):
            assert float(logits[place - 1].max() - logits[place - 1][ids[place]]) < 1e-3


def test_sparse_backends_agree_over_a_conversation(tiny: Callable[[str], Path]) -> None:
    model = Transformer.from_checkpoint(tiny("llama3"), torch.float32)
    thresholds = np.random.default_rng(0).uniform(0.05, 0.6, (3, 7)).astype(np.float32)
    numba, cpu, reference = (converse(decoder(model, backend, thresholds), keep=True) for backend in BACKENDS)
    assert numba == cpu == reference
    # The history holds what sparse steps left, which a prefill of the whole conversation would not.
    assert numba != converse(decoder(model, "reference", thresholds), keep=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_figures_begin_anew(tiny: Callable[[str], Path], backend: str) -> None:
    model = Transformer.from_checkpoint(tiny("llama3"), torch.float32)
    thresholds = np.full((3, 7), 0.4, np.float32)
    talker, fresh = decoder(model, backend, thresholds), decoder(model, backend, thresholds)
    prompt = list(TURNS[0])
    for one in (talker, fresh):
        list(one.generate(prompt, max_new_tokens=9, sampling=GREEDY))
    first = fresh.realised()
    talker.count_anew()
    assert not talker.realised().any()
    assert talker.realised_share() == 0
    list(talker.generate(prompt, max_new_tokens=9, sampling=GREEDY))
    np.testing.assert_array_equal(talker.realised(), first)
    assert (talker.tally.steps, talker.tally.prompt_tokens) == (8, len(prompt))


@pytest.mark.parametrize("cached", [-1, 3, 9])
def test_what_the_cache_cannot_hold_is_a_defect(tiny: Callable[[str], Path], cached: int) -> None:
    talker = decoder(Transformer.from_checkpoint(tiny("llama3"), torch.float32), "cpu")
    list(talker.generate([1, 2], max_new_tokens=1, sampling=GREEDY))
    with pytest.raises(ValueError, match="cannot be in a cache"):
        next(talker.generate(list(TURNS[0]), max_new_tokens=1, sampling=GREEDY, cached=cached))

"""A model that rotates longer sequences otherwise never compares keys of the one rotation with queries of the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures_tiny import make_tiny
from transformers import AutoModelForCausalLM

from teal_cli.decoding.decoder import Decoder
from teal_cli.decoding.sampling import Sampling
from teal_cli.decoding.steps import PlainStep
from teal_cli.errors import UsageError
from teal_cli.model.transformer import Transformer
from teal_cli.passes.forward import check_tokens

GREEDY = Sampling(temperature=0)
SWITCH = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("longrope"), "phi3", original_max_position_embeddings=SWITCH)


@pytest.fixture
def decoder(folder: Path) -> Decoder:
    model = Transformer.from_checkpoint(folder)
    cache = model.cache(64)
    return Decoder(model, cache, PlainStep(model, cache, None, "reference"))


def test_tables_change_where_a_step_does(decoder: Decoder) -> None:
    rope = decoder.model.rope
    cos, sin = rope.tables(20)
    for position in (0, SWITCH - 1, SWITCH, 19):
        ours = rope.at(position, 1)[0]
        assert torch.equal(cos[0, position], ours[0][0, 0])
        assert torch.equal(sin[0, position], ours[1][0, 0])
    assert not torch.equal(rope.at(0, SWITCH)[0][0], rope.at(0, SWITCH + 1)[0][0][:SWITCH])
    assert rope.tables(SWITCH - 3)[0].shape == (1, SWITCH - 3, 12)


def test_a_text_may_end_at_the_switch_or_begin_above_it_but_not_pass_it(decoder: Decoder) -> None:
    assert len(list(decoder.generate(range(4, 12), max_new_tokens=3, sampling=GREEDY))) == 3
    assert len(list(decoder.generate(range(4, 15), max_new_tokens=6, sampling=GREEDY))) == 6
    with pytest.raises(UsageError, match=r"from 8 to 11 tokens pass 10.*longrope"):
        next(decoder.generate(range(8), max_new_tokens=4, sampling=GREEDY))
    with pytest.raises(UsageError, match=r"from 10 to 12 tokens pass 10"):
        next(decoder.generate(range(12), max_new_tokens=1, sampling=GREEDY, dense=10))


def test_a_history_that_grows_over_the_switch_is_computed_again(decoder: Decoder, folder: Path) -> None:
    """As transformers' generate drops its cache there."""
    said = [5, 9, 3, 200, 17, 8]
    ids = said + list(decoder.generate(said, max_new_tokens=2, sampling=GREEDY)) + [44, 71, 30, 31]
    answer = list(decoder.generate(ids, max_new_tokens=4, sampling=GREEDY, cached=decoder.cache.length))
    assert decoder.tally.prompt_tokens == len(said) + len(ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert answer == expected[0, len(ids) :].tolist()


def test_a_pass_has_sequences_of_one_rotation(decoder: Decoder) -> None:
    rows = [torch.arange(n).numpy() for n in (SWITCH, SWITCH + 1)]
    for row in rows:
        check_tokens(decoder.model.config, [row])
    with pytest.raises(UsageError, match=r"10 and of 11 tokens cannot share a pass"):
        check_tokens(decoder.model.config, rows)

"""A conversation: what is prefilled, what stays, and what it says of itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from teal_cli.decoding.sampling import Sampling
from teal_cli.errors import NotFoundError, UsageError
from teal_cli.registry.registry import Registry
from teal_cli.runs.calibrate import Text
from teal_cli.runs.chat import Chat, ChatRequest
from teal_cli.runs.evaluate import EvalRequest, Evaluate, Evaluation
from teal_cli.runs.session import Session, open_session

pytestmark = pytest.mark.usefixtures("talker")
REQUEST = ChatRequest(0.0, None, Sampling(temperature=0), max_new_tokens=12)
SAID = ("The quick brown fox.", "keep(x, t)", "Why?")


@pytest.fixture
def session() -> Session:
    return open_session("talker", dtype="float32", backend="cpu")


def fresh(session: Session, messages: list[dict[str, str]], tokens: int = 12) -> str:
    """The answer of a decoder that prefills the whole conversation."""
    level = session.levels((0.0,))[0]
    ids = session.encode_chat(messages)
    decoder = session.decoder(level.plan, session.cache(len(ids) + tokens))
    return session.decode(list(decoder.generate(ids, max_new_tokens=tokens, sampling=REQUEST.sampling)))


def test_only_what_is_new_is_prefilled_and_the_answers_are_the_same(session: Session) -> None:
    talk = Chat(session, REQUEST)
    for turn, text in enumerate(SAID):
        before = talk.used
        answer = "".join(talk.say(text))
        assert answer == fresh(session, talk.messages[: 2 * turn + 1])
        figures = talk.answers[-1]
        whole = len(session.encode_chat(talk.messages[: 2 * turn + 1]))
        assert (figures.kept, figures.prefilled) == (before, whole - before)
        assert talk.used == whole + figures.tokens - 1
        assert (figures.text, figures.tokens, figures.end) == (answer, 12, "length")
        assert figures.tokens_per_s > 0
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 3


def test_an_answer_that_is_left_stays_as_far_as_it_was_said(session: Session) -> None:
    talk = Chat(session, REQUEST)
    pieces = talk.say(SAID[0])
    said = next(pieces) + next(pieces) + next(pieces)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": said}
    assert (talk.answers[-1].tokens, talk.answers[-1].end) == (3, "stopped")
    before = talk.used
    assert "".join(talk.say(SAID[1])) == fresh(session, talk.messages[:3])
    assert talk.answers[-1].kept == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_got_no_answer_is_taken_back(
    session: Session, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    talk = Chat(session, REQUEST)
    list(talk.say(SAID[0]))
    messages = list(talk.messages)
    with monkeypatch.context() as broken:
        broken.setattr(session.model, "forward", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(error):
            list(talk.say(SAID[1]))
    assert talk.messages == messages
    assert len(talk.answers) == 1
    assert "".join(talk.say(SAID[2])) == fresh(session, talk.messages[:3])


def test_a_history_that_reads_differently_is_prefilled_from_there(session: Session) -> None:
    """As where a template trims an answer, or the tokenizer would have written it otherwise."""
    talk = Chat(session, REQUEST)
    list(talk.say(SAID[0]))
    before = talk.used
    talk.messages[-1]["content"] = talk.messages[-1]["content"][:2] + "x" + talk.messages[-1]["content"][3:]
    assert "".join(talk.say(SAID[1])) == fresh(session, talk.messages[:3])
    assert talk.answers[-1].kept == before - 11 + 2


def test_the_model_ends_an_answer(session: Session) -> None:
    talk = Chat(session, REQUEST)
    third = list(talk.say(SAID[0]))[2]
    (token,) = session.tokenizer.encode(third)
    session.config = replace(session.config, eos_ids=(token,))
    talk.reset()
    answer = "".join(talk.say(SAID[0]))
    assert talk.answers[-1].end == "ended"
    assert answer.endswith(third)
    assert len(answer) <= 3


def test_a_full_context_says_so(session: Session) -> None:
    prompt = len(session.encode_chat([{"role": "user", "content": "B"}]))
    talk = Chat(session, replace(REQUEST, context=prompt + 4))
    assert len("".join(talk.say("B"))) == 5
    assert talk.answers[-1].end == "context"
    with pytest.raises(UsageError, match=f"context of {prompt + 4} tokens is full") as error:
        list(talk.say("C"))
    assert "/reset" in str(error.value.hint)
    assert len(talk.messages) == 2
    talk.reset()
    assert len("".join(talk.say("B"))) == 5


def test_a_level_is_changed_and_the_history_stays(session: Session) -> None:
    talk = Chat(session, REQUEST)
    list(talk.say(SAID[0]))
    talk.use(0.4)
    list(talk.say(SAID[1]))
    dense, sparse = talk.answers
    assert (dense.level, dense.realised, sparse.level) == ("0", 0.0, "0.4")
    assert sparse.realised == pytest.approx(0.4, abs=0.15)
    assert sparse.kept > dense.prefilled
    with pytest.raises(NotFoundError, match="no plan"):
        talk.use(0.0, "another")
    assert talk.level.label == "0.4"


def test_a_conversation_repeats_itself_and_the_next_one_does_not(session: Session) -> None:
    drawn = replace(REQUEST, sampling=Sampling(temperature=1.0, top_k=8, seed=5))
    talk, again = Chat(session, drawn), Chat(session, drawn)
    first = "".join(talk.say(SAID[0]))
    assert first == "".join(again.say(SAID[0]))
    talk.reset()
    assert first != "".join(talk.say(SAID[0]))


def test_a_system_message_comes_first_and_survives_a_reset(session: Session) -> None:
    talk = Chat(session, replace(REQUEST, system="Be brief."))
    list(talk.say(SAID[0]))
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    assert "".join(talk.say(SAID[0])) == fresh(session, talk.messages[:2])


def test_what_is_saved_says_what_it_was_made_with(session: Session, tmp_path: Path) -> None:
    talk = Chat(session, replace(REQUEST, sparsity=0.5))
    list(talk.say(SAID[0]))
    talk.save(tmp_path / "talk.json")
    found = json.loads((tmp_path / "talk.json").read_text())
    assert found["schema"] == "teal-chat/1"
    assert (found["model"], found["calibration"]) == ("talker", session.calibration.id)
    assert found["messages"] == talk.messages
    assert found["answers"][0]["text"] == talk.messages[-1]["content"]
    with pytest.raises(UsageError, match="exists"):
        talk.save(tmp_path / "talk.json")


def evaluated(*sparsities: float) -> Evaluation:
    text = Text("python-docs", num_sequences=2, seq_len=96)
    job = Evaluate(Registry(), EvalRequest(text, sparsities, model="talker", dtype="float32"))
    *_, result = job.run(job.open_layers())
    assert isinstance(result, Evaluation)
    return result


def test_what_a_level_costs_is_known_from_an_evaluation(session: Session) -> None:
    talk = Chat(session, replace(REQUEST, sparsity=0.9))
    assert talk.known_cost() is None
    sparse = evaluated(0.9)
    assert talk.known_cost() is None  # the dense model was not evaluated on that text
    dense = evaluated(0.0)
    cost = talk.known_cost()
    assert cost is not None
    assert cost.increase == pytest.approx(sparse.levels[0].perplexity / dense.levels[0].perplexity - 1)
    assert (cost.dataset, cost.tokens) == ("python-docs", dense.tokens)
    talk.use(0.5)
    assert talk.known_cost() is None
    (file,) = (session.entry.home / "evaluations").iterdir()
    file.write_text("damaged")
    talk.use(0.9)
    assert talk.known_cost() is None


def test_threads_do_not_pile_up(session: Session) -> None:
    """A level that is left takes its threads along."""
    import threading

    numba = open_session("talker", dtype="float32", backend="numba")
    talk = Chat(numba, REQUEST)
    before = threading.active_count()
    for sparsity in (0.3, 0.5, 0.7):
        talk.use(sparsity)
        list(talk.say("B"))
    assert threading.active_count() <= before + torch.get_num_threads()

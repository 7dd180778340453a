"""What a foreign tokenizer and a foreign chat template may do to a session: be refused with a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teal_cli import open_session
from teal_cli.errors import TealError, UsageError
from teal_cli.registry.download import fetch
from teal_cli.registry.registry import Registry


@pytest.fixture
def model(tiny: Callable[[str], Path], teal_home: Path, tmp_path: Path) -> Path:
    """The checkpoint of the registered model "mine", to be changed."""
    folder = shutil.copytree(tiny("llama3"), tmp_path / "checkpoint")
    fetch(str(folder), registry=Registry(teal_home), name="mine")
    return Path(folder)


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{% for m in messages %}",
        "{{ messages[7].content }}",
        "{{ messages | nothing }}",
    ],
)
def test_a_chat_template_that_fails_or_is_stopped(model: Path, template: str) -> None:
    for old in model.glob("chat_template*"):
        old.unlink()
    change(model / "tokenizer_config.json", lambda found: found.update(chat_template=template))
    session = open_session("mine")
    with pytest.raises(TealError, match=r"^the chat template of mine fails: ") as caught:
        session.encode("hello", chat=True)
    assert "--chat" in str(caught.value.hint)
    assert session.encode("hello"), "without it the model is of use"


def test_no_chat_template(model: Path) -> None:
    with pytest.raises(UsageError, match="mine has no chat template"):
        open_session("mine").encode("hello", chat=True)


def test_a_token_beyond_the_vocabulary(model: Path) -> None:
    far = {"id": 10**6, "content": "<far>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
           "normalized": False}  # fmt: skip
    change(model / "tokenizer.json", lambda found: found["added_tokens"].append(far))
    change(model / "tokenizer.json", lambda found: found["model"]["vocab"].update({"<far>": 10**6}))
    session = open_session("mine")
    assert session.encode("near")
    with pytest.raises(TealError, match=r"the tokenizer of mine gives the token 1000000; the model has \d+"):
        session.encode("near <far>")

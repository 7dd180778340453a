"""`teal chat` as a user meets it: from a pipe, and typed on a terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures_cli import Result, Teal

from teal_cli.registry.registry import Registry
from teal_cli.runs.costs import record_costs
from teal_cli.runs.plans import levels_of
from teal_cli.sparsity.calibration import Calibration

SHORT = ("chat", "-m", "talker", "--temperature", 0, "--max-new-tokens", 6)

SLOW = """
import sys, time
from teal_cli.app import main
from teal_cli.decoding.decoder import Decoder
step = Decoder._follow
def slower(*args):
    time.sleep(0.05)
    return step(*args)
Decoder._follow = slower
sys.exit(main(sys.argv[1:]))
"""
"""`teal` with a step that leaves time for Ctrl-C."""


@pytest.fixture
def say(teal: Teal, monkeypatch: pytest.MonkeyPatch):
    """Run `teal chat` with these lines on its standard input."""

    def run(*lines: str, options: tuple[object, ...] = ()) -> Result:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return teal(*SHORT, *options)

    return run


@pytest.mark.usefixtures("talker")
def test_answers_go_to_stdout_and_figures_to_stderr(say) -> None:
    run = say("Hello", "", "/sparsity 0.4", "And now?", "/stats")
    assert run.code == 0
    answers = run.out.splitlines()
    assert [len(answer) for answer in answers] == [6, 6]
    figures = re.findall(r"\[[\d.]+ tok/s, 6 tokens; ([\d.]+)% dropped of (\d+)%; prefill (\d+) .* (\d+) were", run.err)
    assert [target for _, target, _, _ in figures] == ["50", "40"]
    assert all(abs(float(dropped) - float(target)) < 15 for dropped, target, _, _ in figures)
    assert int(figures[0][3]) == 0
    assert int(figures[1][3]) == int(figures[0][2]) + 5
    assert re.search(r"0\.4 .* length\n", run.err), "the table of /stats"


@pytest.mark.usefixtures("talker")
def test_json_is_the_conversation(say, tmp_path: Path) -> None:
    run = say("Hello", "/stats", "/help", f"/save {tmp_path / 'talk.json'}", "More", options=("--json",))
    assert run.err == ""
    assert [message["role"] for message in run.json["messages"]] == ["user", "assistant"] * 2
    assert len(run.json["answers"]) == 2
    assert json.loads((tmp_path / "talk.json").read_text())["messages"] == run.json["messages"][:2]


@pytest.mark.usefixtures("talker")
def test_quiet_says_the_answers_alone(say) -> None:
    run = say("Hello", options=("-q",))
    assert (run.code, run.err, len(run.out)) == (0, "", 7)


@pytest.mark.usefixtures("talker")
def test_a_level_that_is_known_to_cost_much_is_told(say) -> None:
    registry = Registry()
    entry, calibration = registry.get("talker"), Calibration.load(registry.find_calibration("talker", None))
    dense, half, most = (level.key for level in levels_of(entry, 3, (0.0, 0.5, 0.9), (), calibration))
    record_costs(entry, {"window": 96}, "wikitext", 8184, {dense: 20.0, half: 21.9, most: 26.2})
    assert "0.9 costs 31% in perplexity on wikitext, by `teal eval` over 8,184 tokens" in say("/sparsity 0.9").err
    assert "in perplexity" not in say("/sparsity 0.5").err


@pytest.mark.usefixtures("talker")
@pytest.mark.parametrize(
    ("line", "says", "code"),
    [
        ("/sparsity 1", "outside [0, 1)", 2),
        ("/sparsity", "must be a number", 2),
        ("/plan", "which plan", 2),
        ("/plan another", "no plan called 'another'", 3),
        ("/save", "/save FILE.json", 2),
        ("/sparsty 0.5", "did you mean /sparsity", 2),
    ],
)
def test_a_mistake_ends_a_script(say, line: str, says: str, code: int) -> None:
    run = say(line, "Hello")
    assert (run.code, run.out) == (code, "")
    assert says in run.err
    assert "hint:" in run.err


@pytest.mark.usefixtures("talker")
def test_a_full_context_is_a_clear_sentence(say) -> None:
    run = say("Hello", options=("--context", 40, "--max-new-tokens", 100))
    assert run.code == 0
    assert "the context of 40 tokens is full; /reset begins a new conversation" in run.err
    run = say("Hello " * 40, options=("--context", 40))
    assert run.code == 2
    assert "the context of 40 tokens is full" in run.err


@pytest.mark.usefixtures("ready")
def test_a_model_without_a_template_is_refused_before_it_is_loaded(teal: Teal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal_cli.commands.chat.load", lambda *_: pytest.fail("it was loaded"))
    run = teal("chat", "-m", "tiny")
    assert run.code == 2
    assert "tiny has no chat template" in run.err
    assert "`teal generate -m tiny` without --chat" in run.err


class Terminal:
    """`teal chat` on a pseudo-terminal: types keys and waits for what must appear."""

    def __init__(self, *args: object, home: Path) -> None:
        self._main, child = pty.openpty()
        termios.tcsetwinsize(child, (24, 100))
        env = {**os.environ, "TEAL_HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *map(str, args)],
            stdin=child, stdout=child, stderr=child, env=env, start_new_session=True, preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(child)
        self.seen = ""

    def wait_for(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        """Read until the pattern has appeared after what was waited for before."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self._main], [], [], max(0.0, until - time.monotonic()))
            data = b""
            if ready:
                try:
                    data = os.read(self._main, 4096)
                except OSError:  # Linux says so at the end
                    data = b""
            if not data:
                pytest.fail(f"{pattern!r} did not come; the terminal shows {self.seen!r}")
            self.seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.seen + data.decode("utf-8", "replace"))
        self.seen = self.seen[found.end() :]
        return found

    def type(self, keys: str) -> None:
        os.write(self._main, keys.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)


def _own_terminal() -> None:
    """In the child: the terminal is its controlling one, so that Ctrl-C reaches it, and Ctrl-C means what it should."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(talker: Path) -> Iterator[Any]:
    opened: list[Terminal] = []

    def start(*args: object) -> Terminal:
        opened.append(Terminal(*args, home=talker))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_session_on_a_terminal(terminal, tmp_path: Path) -> None:
    chat = terminal("chat", "-m", "talker", "--temperature", 0, "--max-new-tokens", 100, "--backend", "cpu")
    chat.wait_for("Ctrl-D leaves")
    chat.wait_for(">")
    chat.type("Hello there\r")
    said = chat.wait_for("[B-Z]{3,}")  # the answer has begun
    chat.type("\x03")
    first = chat.wait_for(
        r"tok/s, (\d+) tokens; [\d.]+% dropped of 50%; prefill (\d+) tokens in [\d.]+ s, 0 were there"
    )
    chat.wait_for("stopped; what was said stays")
    chat.wait_for(">")
    chat.type("/sparsty 0.4\r")
    chat.wait_for("did you mean /sparsity")
    chat.wait_for(">")
    chat.type("/spars\t")  # TAB completes the command
    chat.wait_for("ity")
    chat.type(" 0.4\r")
    chat.wait_for("from here on calibration .* of talker, 40%")
    chat.wait_for(">")
    chat.type("\x03")
    chat.wait_for("Ctrl-D or /exit leaves")
    chat.wait_for(">")
    chat.type("\x1b[A\x1b[A\x1b[A\r")  # three lines up: the first message again
    chat.wait_for("[B-Z]{3,}")
    chat.type("\x03")
    second = chat.wait_for(r"dropped of 40%; prefill \d+ tokens in [\d.]+ s, (\d+) were there")
    assert int(second[1]) == int(first[2]) + int(first[1]) - 1, "the history is in the cache"
    chat.wait_for(">")
    chat.type(f"/save {tmp_path / 'talk.json'}\r")
    chat.wait_for("4 messages written")
    chat.wait_for(">")
    chat.type("\x04")
    assert chat.process.wait(60) == 0
    found = json.loads((tmp_path / "talk.json").read_text())
    user, answer, again, _ = (message["content"] for message in found["messages"])
    assert (user, again) == ("Hello there", "Hello there")
    assert said[0] in answer
    assert [figures["end"] for figures in found["answers"]] == ["stopped", "stopped"]
    assert [figures["level"] for figures in found["answers"]] == ["0.5", "0.4"]

"""Fork after a generate, spawn, and multiprocessing with both: what the parent opened works in a child, and what it
opens itself; and two threads decode where all but one core are taken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import multiprocessing, os, sys
import torch

def text(session=None):
    from teal_cli import generate, open_session
    session = session or open_session("tiny")
    return generate(session, "def keep(x, t):" * 4, sparsity=0.5, max_new_tokens=12, temperature=0).text

def forked(work):
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writer, work().encode())
        finally:
            os._exit(0)
    os.close(writer)
    assert os.waitpid(pid, 0)[1] == 0
    return os.fdopen(reader, "rb").read().decode()

if __name__ == "__main__":
    from teal_cli import open_session

    torch.set_num_threads(2)
    session = open_session("tiny")
    expected = text(session)
    assert torch.ones(512, 512) @ torch.ones(512, 512) is not None
    assert forked(lambda: text(session)) == expected, "a session of the parent"
    assert forked(text) == expected, "a session of its own"
    assert forked(lambda: forked(lambda: text(session))) == expected, "a child of a child"
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(text) == expected, method
    assert text(session) == expected, "the parent goes on"
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    assert text(session) == expected, "one core for all threads"
    sys.stdout.write("done")
"""


@pytest.mark.slow
def test_children_decode_as_their_parent(ready: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, program], env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True,
                          text=True, timeout=240, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done"), done.stderr

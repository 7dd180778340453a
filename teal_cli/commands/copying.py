"""`teal store copy`: to a folder, to a URL, or to the hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from teal_cli.commands.gathering import gathered
from teal_cli.errors import UsageError
from teal_cli.files import readable_size
from teal_cli.ui.interrupts import when_stopped
from teal_cli.ui.output import Output
from teal_cli.ui.progress import progress

if TYPE_CHECKING:
    from teal_cli.store.digest import Digested
    from teal_cli.store.whole import Moved


def copied(out: Output, source: Path, target: Path, *, private: bool, force: bool) -> None:
    """Copy, and say what came of it. Raises as `copy`, `send` and `Publication`."""
    from teal_cli.store.copy import copy
    from teal_cli.store.publish import repository_of
    from teal_cli.store.reader import open_store
    from teal_cli.store.remote import Remote, place_of
    from teal_cli.store.send import send

    place = place_of(target)
    repo = repository_of(place) if isinstance(place, Remote) else None
    if private and repo is None:
        raise UsageError("--private is for a dataset of the hub", hint="-o hf://datasets/ORG/NAME")
    more: dict[str, str] = {}
    if repo is not None:
        last, more["commit"] = _published(out, source, repo, private=private, force=force)
    elif isinstance(place, Remote):
        last = _moved(out, send(source, place, force=force))
    else:
        last = _moved(out, copy(source, place, force=force))
    payload = {
        "store": str(place_of(source)),
        "output": str(place),
        "bytes": last.total,
        "moved": last.moved,
        "digest": open_store(place if isinstance(place, Path) else source).state.digest,
        **more,
    }
    out.result(payload, lambda console: console.print(f"{readable_size(last.total)} in {place}", markup=False))


def _published(out: Output, source: Path, repo: str, *, private: bool, force: bool) -> tuple[Moved, str]:
    from teal_cli.plots.card import card_files
    from teal_cli.plots.style import check_picture
    from teal_cli.store.publish import Publication
    from teal_cli.store.reader import open_store

    publication = Publication(source, repo, private=private, force=force)
    card: dict[str, bytes] = {}
    if publication.check():
        check_picture(Path("card.png"))
        card = card_files(gathered(out, open_store(source)), publication.url)
    commit: list[str] = []

    def moves() -> Iterable[Moved]:
        for event in publication.push(card):
            if isinstance(event, str):
                commit.append(event)
            else:
                yield event

    return _moved(out, moves()), commit[0]


def _moved(out: Output, events: Iterable[Moved | Digested]) -> Moved:
    from teal_cli.store.whole import Moved

    last = None
    kept = "what has arrived is kept, and the same command goes on"
    with progress(out) as bars, when_stopped(out.warn, kept):
        copying, checking = bars.task("Copying", unit="B"), bars.task("Comparing the digest", unit="arrays")
        for event in events:
            if isinstance(event, Moved):
                last = event
                copying.update(done=event.done, total=event.total)
            else:
                checking.update(done=event.done, total=event.total)
    assert last is not None, "a store has files"
    return last

"""Runs huggingface_hub's snapshot_download in a thread and yields the bytes that have arrived.

The library reports to a tqdm class of the caller's choice; ours draws nothing, counts, and is also the way to
stop: once the caller has gone (Ctrl-C), the next update raises in the thread that downloads.
"""

from __future__ import annotations

import glob
import io
from collections.abc import Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Final

from teal_cli.registry.events import Progress
from teal_cli.registry.sources.base import Plan

_WORKERS: Final = 4


class _Stopped(BaseException):
    """The consumer has gone; not an Exception, so that no retry loop of the library catches it."""


def transfer(repo: str, plan: Plan, token: str | None) -> Iterator[Progress]:
    """Download the planned files that the cache lacks.

    Yields:
        Progress of stage "download", in bytes of all planned files; those that were here already count as
        done.

    Raises:
        Exception: whatever snapshot_download raises.
    """
    from huggingface_hub import snapshot_download

    total = plan.total_bytes
    present = sum(file.size or 0 for file in plan.files if file.present)
    reports: SimpleQueue[int | BaseException | None] = SimpleQueue()
    stop = Event()

    def work() -> None:
        try:
            snapshot_download(
                repo,
                revision=plan.revision,
                token=token,
                allow_patterns=[glob.escape(file.path) for file in plan.files],
                max_workers=_WORKERS,
                tqdm_class=_counting_bar(reports, stop),
            )
            reports.put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            reports.put(error)

    thread = Thread(target=work, name="teal-download", daemon=True)
    thread.start()
    try:
        yield Progress("download", present, total)
        while (report := reports.get()) is not None:
            if isinstance(report, BaseException):
                raise report
            done = present + report
            yield Progress("download", done if total is None else min(done, total), total)
        yield Progress("download", total or present, total)
    finally:
        stop.set()
        thread.join(timeout=2.0)


def _counting_bar(reports: SimpleQueue[int | BaseException | None], stop: Event) -> type[Any]:
    """A tqdm class that puts the bytes of the furthest byte bar into `reports`.

    Releases differ in how many bars they open: one of bytes, or one for bytes received and one for bytes
    written; and one that counts files, which is ignored.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    class CountingBar(tqdm):
        monitor_interval = 0  # no thread that redraws

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._counts = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})

        def display(self, *args: Any, **kwargs: Any) -> None:
            """Draws nothing."""

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise _Stopped
            shown = super().update(n)
            if self._counts:
                reports.put(int(self.n))
            return shown

    return CountingBar

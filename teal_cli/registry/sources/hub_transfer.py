"""Brings a repository's files into the hub's cache, in threads, and yields the bytes that have arrived.

huggingface_hub begins a file anew in each process, so an interruption at 9 of 10 GB would cost 9 GB. Large files are
therefore fetched here, into a partial file beside the blob that it becomes: the same library's `http_get` appends to
it, its sha256 is checked, and one rename makes it the blob. snapshot_download then finds the blobs, fetches the
small files and links everything; it alone knows how the cache is laid out beyond `blobs/<sha256>`.
"""

from __future__ import annotations

import glob
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, Final

from teal_cli.errors import TealError
from teal_cli.files import sha256_of
from teal_cli.registry.events import Plan, PlannedFile, Progress

_WORKERS: Final = 4
_PATIENCE_S: Final = 1.0


class _StoppedError(BaseException):
    """The consumer has gone; not an Exception, so that no retry loop of the library catches it."""


def transfer(repo: str, plan: Plan, hashes: dict[str, str], token: str | None) -> Iterator[Progress]:
    """Download the planned files that the cache lacks; what an earlier, interrupted call has fetched is kept.

    Args:
        repo: "org/repo".
        plan: whose revision is a commit.
        hashes: sha256 of the large files.
        token: None for the one that is stored.

    Yields:
        Progress of stage "download", in bytes of all planned files; those that were here already count as done.

    Raises:
        Exception: whatever huggingface_hub raises.
        TealError: a file arrived altered.
    """
    reports: SimpleQueue[int | BaseException | None] = SimpleQueue()
    stop = Event()
    pending: SimpleQueue[PlannedFile] = SimpleQueue()
    for file in plan.files:
        if not file.present and file.path in hashes and _by_http(file):
            pending.put(file)

    def fetch_blobs() -> None:
        try:
            while not stop.is_set():
                file = pending.get_nowait()
                _fetch_blob(repo, plan, file, hashes[file.path], token, stop, reports.put)
        except Empty:
            return
        except BaseException as error:  # handed to the consumer, which raises the first one
            stop.set()
            reports.put(error)

    def work() -> None:
        _join(_start(fetch_blobs, pending.qsize()))
        if stop.is_set():
            return
        try:
            _fetch_rest(repo, plan, token, stop)
            reports.put(None)
        except BaseException as error:
            reports.put(error)

    total = plan.total_bytes
    done = sum(file.size or 0 for file in plan.files if file.present)
    threads = _start(work, 1)
    try:
        yield Progress("download", done, total)
        while (report := reports.get()) is not None:
            if isinstance(report, BaseException):
                raise report
            done += report
            yield Progress("download", done, total)
        yield Progress("download", done if total is None else total, total)
    finally:
        stop.set()
        _join(threads, timeout=_PATIENCE_S)


def _start(work: Callable[[], None], wanted: int) -> list[Thread]:
    """Threads that do not keep the interpreter alive: a stalled connection must not outlive Ctrl-C."""
    threads = [Thread(target=work, name="teal-download", daemon=True) for _ in range(min(wanted, _WORKERS))]
    for thread in threads:
        thread.start()
    return threads


def _join(threads: list[Thread], timeout: float | None = None) -> None:
    for thread in threads:
        thread.join(timeout)


def _by_http(file: PlannedFile) -> bool:
    """Whether plain HTTP may fetch it: the hub serves larger files through xet only."""
    from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE

    return file.size is not None and file.size <= MAX_HTTP_DOWNLOAD_SIZE


def _fetch_blob(
    repo: str,
    plan: Plan,
    file: PlannedFile,
    sha256: str,
    token: str | None,
    stop: Event,
    report: Callable[[int], None],
) -> None:
    """Complete one blob of the cache, under the lock that huggingface_hub itself takes for it."""
    from filelock import FileLock
    from huggingface_hub import hf_hub_url
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    folder = repo_folder_name(repo_id=repo, repo_type="model")
    blob = Path(HF_HUB_CACHE) / folder / "blobs" / sha256
    lock = Path(HF_HUB_CACHE) / ".locks" / folder / f"{sha256}.lock"
    for parent in (blob.parent, lock.parent):
        parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{sha256}.teal-partial")
    with FileLock(lock):
        if blob.exists():  # the same weights under another revision, or another process was quicker
            report(file.size or 0)
            return
        with partial.open("ab", buffering=0) as target:
            http_get(
                hf_hub_url(repo, file.path, revision=plan.revision),
                target,
                resume_size=target.tell(),
                headers=build_hf_headers(token=token, library_name="teal"),
                expected_size=file.size,
                tqdm_class=_counting_bar(stop, report),
            )
        if sha256_of(partial) != sha256:
            partial.unlink()
            raise TealError(f"{file.path} of {repo} arrived altered", hint="run the same command again")
        partial.replace(blob)


def _fetch_rest(repo: str, plan: Plan, token: str | None, stop: Event) -> None:
    """Small files, files too large for HTTP, and the links from the snapshot to all blobs."""
    from huggingface_hub import snapshot_download

    snapshot_download(
        repo,
        revision=plan.revision,
        token=token,
        allow_patterns=[glob.escape(file.path) for file in plan.files],
        max_workers=_WORKERS,
        tqdm_class=_counting_bar(stop, lambda count: None),
    )


def _counting_bar(stop: Event, report: Callable[[int], None]) -> type[Any]:
    """A tqdm class that draws nothing, reports what is added, and raises once the consumer has gone."""
    from tqdm import tqdm

    class CountingBar(tqdm):
        monitor_interval = 0  # no thread that redraws

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})
            if self.n:  # what an earlier call had fetched
                report(int(self.n))

        def display(self, *args: Any, **kwargs: Any) -> None:
            """Draws nothing."""

        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise _StoppedError
            report(int(n or 0))
            return super().update(n)

    return CountingBar

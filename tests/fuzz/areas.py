"""What is fuzzed: stores, those of mixtures, unfinished ones, texts of levels, prompts, calibrations and registries,
checkpoints, GGUF files and wheels."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from fixtures_gguf import make_wheel, write_gguf
from fixtures_store import SEQUENCE_TOKENS, dense, digest, feed, header, levels
from fixtures_tiny import make_tiny
from fuzz.harness import Area
from fuzz.mutations import HOSTILE, damage_file

from teal_cli import open_store
from teal_cli.errors import TealError
from teal_cli.store.header import LevelHeader
from teal_cli.store.reader import Level
from teal_cli.store.verify import Problem, verify
from teal_cli.store.writer import StoreWriter
from teal_kernels.spec import SITES

TOKENS = 20


def teal(*arguments: object) -> int:
    """`teal` in this process; its exit code. What `main` does not turn into a sentence comes through."""
    from teal_cli.app import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main([str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------------------ stores
def _make_store(folder: Path) -> None:
    """Two blocks of one level."""
    made = levels(TOKENS, (0.5,))
    with StoreWriter.create(folder, header(), made) as writer:
        feed(writer.level(0.5), TOKENS)
        writer.level(0.5).finish()
        writer.complete()
    assert teal("store", "verify", folder) == 0


def _use_store(store: Path, out: Path, chance: random.Random) -> None:
    """What the reader returns is what was written, and `verify` finds every change."""
    call = chance.choice([("info",), ("stats",), ("convert", "-o", out / "npz", "--names", "q")])
    assert teal("store", call[0], store, *call[1:]) in (0, 1, 2, 3)
    assert teal("store", "verify", store) in (1, 2, 3), "verify found nothing"
    _compare(open_store(store).level(0.5), levels(TOKENS)[0])


def _compare(level: Level, head: LevelHeader) -> None:
    for check in (
        lambda: np.testing.assert_array_equal(level.thresholds, head.thresholds),
        lambda: np.testing.assert_array_equal(level.tokens.sequence, np.arange(TOKENS) // SEQUENCE_TOKENS),
        lambda: np.testing.assert_array_equal(level.tokens.token_id, 7 * np.arange(TOKENS) % 49152),
    ):
        with contextlib.suppress(TealError):
            check()
    for site in SITES:
        with contextlib.suppress(TealError):
            found = np.asarray(level.site(1, site)[:])
            np.testing.assert_array_equal(found, dense(head, site, 1, TOKENS))


def _make_unfinished(folder: Path) -> None:
    with StoreWriter.create(folder, header(), levels(TOKENS * 2, (0.5,))) as writer:
        feed(writer.level(0.5), TOKENS)


def _use_unfinished(store: Path, out: Path, chance: random.Random) -> None:
    """Resumed, it ends as if nothing had happened, or is refused."""
    made = levels(TOKENS * 2, (0.5,))
    with StoreWriter.resume(store, header(), made) as writer:
        for level in made:
            feed(writer.level(level.name), TOKENS * 2)
            writer.level(level.name).finish()
        writer.complete()
    problems = [str(event) for event in verify(store) if isinstance(event, Problem)]
    if not problems:
        with StoreWriter.create(out / "whole", header(), made) as writer:
            feed(writer.level(0.5), TOKENS * 2)
            writer.level(0.5).finish()
            writer.complete()
        whole, found = digest(out / "whole"), digest(store)
        assert {k: v for k, v in found.items() if "/c/" in k} == {k: v for k, v in whole.items() if "/c/" in k}


# ------------------------------------------------------------------------------------------------ mixtures
_WHOLE: dict[str, np.ndarray] = {}
"""What the sound store of a mixture of experts holds, by the name of `_arrays`."""


def _make_mixture(folder: Path) -> None:
    """A dump of a tiny mixture of experts at one level."""
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, TEAL_HOME=f"{name}/home"):
        checkpoint = make_tiny(Path(name, "checkpoint"), "olmoe")
        text = ("-d", "python-docs", "-n", 1)
        assert teal("download", checkpoint, "--name", "tiny") == 0
        assert teal("calibrate", "-m", "tiny", *text, "--seq-len", 64) == 0
        cut = ("--prompt-tokens", 8, "--max-new-tokens", TOKENS + 1, "--ignore-eos")
        assert teal("dump", "-m", "tiny", "-s", "0.5", *text, *cut, "-o", folder) == 0
    _WHOLE.update({name: read() for name, read in _arrays(open_store(folder).level(0.5)).items()})


def _arrays(level: Level) -> dict[str, Callable[[], np.ndarray]]:
    found: dict[str, Callable[[], np.ndarray]] = {"thresholds of experts": lambda: np.asarray(level.expert_thresholds)}
    for layer in range(3):
        found[f"experts {layer}"] = lambda layer=layer: np.asarray(level.experts(layer)[:])
        for site in SITES:
            found[f"{site} {layer}"] = lambda layer=layer, site=site: np.asarray(level.site(layer, site)[:])
    return found


def _use_mixture(store: Path, out: Path, chance: random.Random) -> None:
    """As of a plain store: what is read is what was written, and `verify` finds every change."""
    call = chance.choice([("info",), ("stats",), ("convert", "-o", out / "npz", "--names", "down")])
    assert teal("store", call[0], store, *call[1:]) in (0, 1, 2, 3)
    assert teal("store", "verify", store) in (1, 2, 3), "verify found nothing"
    for name, read in _arrays(open_store(store).level(0.5)).items():
        with contextlib.suppress(TealError):
            np.testing.assert_array_equal(read(), _WHOLE[name], err_msg=name)


# ------------------------------------------------------------------------------------------------ texts
def _make_text(folder: Path) -> None:
    folder.mkdir()
    (folder / "prompts.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n')


def _damage_levels(folder: Path, chance: random.Random) -> str:
    pieces = [
        "0",
        "1",
        "0.5",
        "-0.0",
        ":",
        ",",
        ".",
        "e",
        "-",
        "9",
        "1e-9",
        "1e999999",
        "nan",
        "inf",
        "0.01",
        " ",
        "\u0660",
    ]
    text = "".join(chance.choice(pieces) for _ in range(chance.randrange(1, 9)))
    (folder / "levels").write_text(text)
    return repr(text)


def _use_levels(folder: Path, out: Path, chance: random.Random) -> None:
    from teal_cli.store.schema import MAX_LEVELS, level_name, parse_levels

    found = parse_levels((folder / "levels").read_text())
    assert 1 <= len(found) <= MAX_LEVELS
    assert len({level_name(level) for level in found}) == len(found)


def _damage_prompts(folder: Path, chance: random.Random) -> str:
    lines = [json.dumps({"prompt": chance.choice(HOSTILE)}) for _ in range(3)]
    lines.append(
        chance.choice(["[" * 100_000, "\ufeff{}", '{"prompt": "\\ud800"}', "\u2028", '{"prompt": "a\u2028b"}'])
    )
    chance.shuffle(lines)
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    if chance.random() < 0.3:
        at = chance.randrange(len(data))
        data = data[:at] + chance.randbytes(3) + data[at:]
    (folder / "prompts.jsonl").write_bytes(data)
    return repr(data[:60])


def _use_prompts(folder: Path, out: Path, chance: random.Random) -> None:
    from teal_cli.data.prompts import PromptSource

    file = chance.choice([folder / "prompts.jsonl", folder, folder / ("x" * 300), folder / "none\0.txt"])
    for prompt in PromptSource(file=file).read(lambda text: list(text.encode()), lambda ids: ""):
        assert prompt.token_ids


# ------------------------------------------------------------------------------------------------ models
@contextlib.contextmanager
def _home(folder: Path) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"TEAL_HOME": str(folder), "XDG_CONFIG_HOME": str(folder / "none")}):
        yield


def _make_home(folder: Path) -> None:
    import torch

    from teal_cli.registry.download import fetch
    from teal_cli.registry.registry import Registry
    from teal_cli.runs.calibrate import Text, calibrate

    checkpoint = make_tiny(folder / "checkpoint")
    registry = Registry(folder / "home")
    for name in ("tiny", "other"):
        fetch(str(checkpoint), registry=registry, name=name)
    for _ in calibrate(registry, "tiny", Text("python-docs", num_sequences=1, seq_len=32), device=torch.device("cpu")):
        pass
    record = folder / "home/models/tiny/model.json"
    record.write_text(record.read_text().replace(str(checkpoint), "CHECKPOINT"))


def _damage_home(folder: Path, chance: random.Random) -> str:
    from fuzz.mutations import mutate

    return mutate(folder / "home" / "models" / "tiny", chance)


def _use_home(folder: Path, out: Path, chance: random.Random) -> None:
    """One damaged entry hides no other; a damaged calibration is refused or as it was."""
    with _home(folder / "home"):
        assert teal("models", "ls") == 0
        assert teal("models", "info", "other") == 0
        assert teal("models", "info", "tiny") in (0, 1, 2, 3)
        from teal_cli.registry.registry import Registry
        from teal_cli.sparsity.calibration import Calibration
        from teal_cli.sparsity.plan import uniform_plan

        plan = uniform_plan(Calibration.load(Registry().find_calibration("tiny", None)), 0.5)
        assert np.isfinite(plan.thresholds).all()


def _make_checkpoint(folder: Path) -> None:
    make_tiny(folder)


def _use_checkpoint(folder: Path, out: Path, chance: random.Random) -> None:
    """It decodes, or is refused with a sentence."""
    import torch

    from teal_cli.model.transformer import Transformer

    model = Transformer.from_checkpoint(folder, torch.float32, torch.device("cpu"))
    assert model.config.layers >= 1


# ------------------------------------------------------------------------------------------------ GGUF and wheels
def _make_gguf(folder: Path) -> None:
    folder.mkdir()
    write_gguf(make_tiny(folder / "checkpoint", "llama2"), folder / "tiny.gguf")
    shutil.rmtree(folder / "checkpoint")
    _download(str(folder / "tiny.gguf"), folder / "checked")
    shutil.rmtree(folder / "checked")


def _damage_gguf(folder: Path, chance: random.Random) -> str:
    """A number of the header, where most of them are; or the file as a whole."""
    file = folder / "tiny.gguf"
    if chance.random() < 0.2:
        return damage_file(file, chance)
    data = bytearray(file.read_bytes())
    keys = [
        match.start() for match in re.finditer(rb"general\.|llama\.|tokenizer\.|blk\.|token_embd|output_norm", data)
    ]
    at = chance.choice([4, 8, 16, *keys]) + chance.randrange(-8, 64)
    new = chance.choice([chance.randbytes(1), b"\0", b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**40), b"\x01"])
    data[max(0, at) : max(0, at) + len(new)] = new
    file.write_bytes(data)
    return f"{new!r} at {at}"


def _use_gguf(folder: Path, out: Path, chance: random.Random) -> None:
    """It becomes a model that loads, or is refused and leaves nothing."""
    _download(str(folder / "tiny.gguf"), out)


def _download(source: str, out: Path) -> None:
    import torch

    from teal_cli.model.transformer import Transformer
    from teal_cli.registry.download import fetch
    from teal_cli.registry.registry import Registry

    registry = Registry(out / "home")
    try:
        entry = fetch(source, registry=registry, name="tiny")
    except TealError:
        assert registry.names() == ()
        assert not list((registry.home / "staging").glob("*/checkpoint/config.json")), (
            "what is refused is no checkpoint"
        )
        raise
    Transformer.from_checkpoint(entry.path, torch.float32, torch.device("cpu"))


def _make_wheel(folder: Path) -> None:
    _make_gguf(folder)
    data = (folder / "tiny.gguf").read_bytes()
    (folder / "tiny.gguf").unlink()
    pieces = {number: data[number * len(data) // 2 : (number + 1) * len(data) // 2] for number in range(2)}
    make_wheel(folder, {"tiny_model/tiny.gguf": data})
    for number, piece in pieces.items():
        make_wheel(folder, {f"x/tiny.gguf.part{number}": piece}, name=f"pieces_part{number}")
    total = f"{hashlib.sha256(data).hexdigest()}  tiny.gguf\n".encode()
    requires = tuple(f"pieces-part{number}==1.0" for number in pieces)
    make_wheel(folder, {"x/SHA256SUMS": total}, name="pieces", requires=requires)


def _damage_wheel(folder: Path, chance: random.Random) -> str:
    """A member, the directory of members, or the file as a whole."""
    file = chance.choice(sorted(folder.glob("*.whl")))
    if chance.random() < 0.4:
        return f"{file.name}: {damage_file(file, chance)}"
    data = bytearray(file.read_bytes())
    if chance.random() < 0.5:
        place = chance.choice([match.start() for match in re.finditer(rb"PK\x01\x02|PK\x03\x04|PK\x05\x06", data)])
        at = min(place + chance.randrange(46), len(data) - 1)
        data[at] = chance.randrange(256)
        file.write_bytes(data)
        return f"{file.name}: byte {at} changed"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {item.filename: archive.read(item) for item in archive.infolist()}
    name = chance.choice(sorted(members))
    new = chance.choice(["../../x.gguf", "/x.gguf", "x/other.gguf", "x.gguf.part7", "x/\ud7ff", "x" * 300, name])
    text = chance.choice(
        [b"Requires-Dist: pieces-part99999999999==1\n", b"Requires-Dist: pieces-part1\n", b"\xff", b""]
    )
    members[new] = members.pop(name) if new != name else text
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return f"{file.name}: {name} is now {new!r:.40}"


def _use_wheel(folder: Path, out: Path, chance: random.Random) -> None:
    """As a GGUF; pip only copies the wheel, whose name says what it is."""
    from teal_cli.registry.sources import pip, wheel

    def copied(spec: str, target: Path, *, offline: bool) -> Iterator[Any]:
        name, _, version = spec.partition("==")
        found = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        if not found.is_file():
            raise pip.pip_error(spec, "No matching distribution found")
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(found, target)
        yield from ()

    with mock.patch.object(wheel, "fetch_wheel", copied):
        _download(f"wheel:{chance.choice(['tiny-model', 'pieces'])}==1.0", out)


AREAS = (
    Area("store", _make_store, _use_store, weight=6),
    Area("mixture store", _make_mixture, _use_mixture, weight=1),
    Area("unfinished store", _make_unfinished, _use_unfinished, weight=2),
    Area("levels", _make_text, _use_levels, _damage_levels, weight=4),
    Area("prompts", _make_text, _use_prompts, _damage_prompts, weight=4),
    Area("registry", _make_home, _use_home, _damage_home, weight=3),
    Area("checkpoint", _make_checkpoint, _use_checkpoint, weight=2),
    Area("gguf", _make_gguf, _use_gguf, _damage_gguf, weight=2),
    Area("wheel", _make_wheel, _use_wheel, _damage_wheel, weight=2),
)

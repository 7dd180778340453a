"""Ways to damage a folder: seeded, one file at a time, with words that say what was done."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**32 - 1, 2**40, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "\ud800", "../../x", "s0.51", "x" * 300, [], [[]], {}, [0] * 5, {"x": 1}, [None],
)  # fmt: skip


def mutate(folder: Path, chance: random.Random) -> str:
    """Damages one file below a folder and says how."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    plain = [file for file in files if file.suffix == ".json"]
    if plain and chance.random() < 0.6:
        file = chance.choice(plain)
        how = _json(file, chance)
    else:
        file = chance.choice(files)
        how = damage_file(file, chance)
    return f"{file.relative_to(folder)}: {how}"


def damage_file(file: Path, chance: random.Random) -> str:
    """Damages a file, whatever is in it, and says how."""
    data = file.read_bytes()
    kind = chance.choice(["flip", "cut", "extend", "zero", "remove", "folder", "loop", "swap"])
    if kind == "flip" and data:
        at = chance.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :])
        return f"bit of byte {at} of {len(data)} flipped"
    if kind == "cut" and data:
        keep = chance.randrange(len(data))
        file.write_bytes(data[:keep])
        return f"cut to {keep} of {len(data)} bytes"
    if kind == "extend":
        file.write_bytes(data + chance.randbytes(7))
        return "7 bytes more"
    if kind == "zero":
        file.write_bytes(b"\0" * max(1, len(data)))
        return "zeros"
    if kind == "swap":
        others = [other for other in file.parent.iterdir() if other.is_file() and other != file]
        if others:
            other = chance.choice(sorted(others))
            shutil.copyfile(other, file)
            return f"a copy of {other.name}"
    file.unlink()
    if kind == "folder":
        file.mkdir()
        return "a folder in its place"
    if kind == "loop":
        file.symlink_to(file.name)
        return "a link to itself"
    return "removed"


def _json(file: Path, chance: random.Random) -> str:
    try:
        value = json.loads(file.read_bytes())
    except ValueError:
        return damage_file(file, chance)
    kind = chance.random()
    if kind < 0.05:
        file.write_text("[" * 100_000 + "]" * 100_000)
        return "100,000 brackets"
    if kind < 0.1:
        new = chance.choice(HOSTILE)
        file.write_text(json.dumps(new))
        return f"the whole is {new!r:.40}"
    place, parent, key = _somewhere(value, chance)
    if parent is None:
        file.write_text("")
        return "empty"
    if kind < 0.25:
        del parent[key]
        how = f"{place} removed"
    else:
        new = chance.choice([choice for choice in HOSTILE if repr(choice) != repr(parent[key])])
        how = f"{place} is {new!r:.40}, was {parent[key]!r:.40}"
        parent[key] = new
    file.write_text(json.dumps(value))
    return how


def _somewhere(value: Any, chance: random.Random) -> tuple[str, Any, Any]:
    """A place in a JSON value: its path, and the object or list and the key that lead to it."""
    path, parent, key = "", None, None
    while isinstance(value, (dict, list)) and value and (parent is None or chance.random() < 0.8):
        parent = value
        key = chance.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
        path, value = f"{path}/{key}", value[key]
    return path, parent, key

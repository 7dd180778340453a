"""What the registry knows about one model: the content of its model.json, and where its calibrations are.

A record and its JSON, nothing else: it neither reads weights nor decides anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Final

SCHEMA: Final = 1


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: path relative to its folder, bytes, hex sha256 of its content."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ModelEntry:
    """One registered model.

    Attributes:
        name: the name in the registry.
        source: "hub:org/repo", "folder:/path", "gguf:/path/file.gguf" "wheel:NAME==VERSION" or
            "quantized:PARENT".
        revision: the hub's commit hash, or "sha256:..." of a GGUF or of a folder's files.
        path: folder that transformers' from_pretrained loads: the hub's cache, the user's folder, or one of
            ours.
        architecture: e.g. "LlamaForCausalLM".
        family: e.g. "llama"; one of `families.FAMILIES`.
        dtype: dtype of most weights, as torch names it: "bfloat16", "float16", "float32".
        parameters: number of stored weights.
        size_bytes: bytes of `files`.
        files: every file that belongs to the checkpoint.
        context: longest sequence, in tokens.
        created: ISO 8601 time of registration, UTC.
        home: the model's own folder in the registry (model.json, calibrations/).
        parent: of a quantised model, the one that it was made of; its calibrations and plans serve.
        bits_per_weight: of a quantised model, the mean over all weights, scales and padding included.
        stored: "fp8" where most weights are 8-bit floats that become `dtype` as they are read, else None.
    """

    name: str
    source: str
    revision: str
    path: Path
    architecture: str
    family: str
    dtype: str
    parameters: int
    size_bytes: int
    files: tuple[FileRecord, ...]
    context: int
    created: str
    home: Path
    parent: str | None = None
    bits_per_weight: float | None = None
    stored: str | None = None

    @property
    def homes(self) -> tuple[Path, ...]:
        """Where its calibrations and plans lie: its own folder, and its parent's."""
        return (self.home,) if self.parent is None else (self.home, self.home.parent / self.parent)

    @property
    def kind(self) -> str:
        """Which source it came from: hub, folder, gguf, wheel or quantized."""
        return self.source.partition(":")[0]

    @property
    def calibrations(self) -> tuple[str, ...]:
        """The ids of the calibrations that serve this model, sorted; one that is being written is not there yet."""
        ids = {file.parent.name for home in self.homes for file in home.glob("calibrations/*/calibration.json")}
        return tuple(sorted(name for name in ids if not name.startswith(".")))

    def to_json(self) -> dict[str, Any]:
        """The content of model.json; a path inside the model's own folder is relative: $TEAL_HOME can move."""
        value = {"schema": SCHEMA, **asdict(self)}
        del value["home"], value["name"]
        value["path"] = str(self.path.relative_to(self.home)) if self.path.is_relative_to(self.home) else str(self.path)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any], home: Path) -> ModelEntry:
        """Read back `to_json`; the name is the folder's.

        Raises:
            KeyError, TypeError, ValueError: not such a file.
        """
        if value["schema"] != SCHEMA:
            raise ValueError(f"schema {value['schema']}, not {SCHEMA}")
        given = set(cls.__dataclass_fields__) - {"home", "name", "path", "files", "parent", "bits_per_weight", "stored"}
        fields = {key: value[key] for key in given}
        numbers = ("parameters", "size_bytes", "context")
        for key, field in fields.items():
            if type(field) is not (int if key in numbers else str):
                raise ValueError(f"{key} is of the wrong type")
        if any(not 0 <= fields[key] < 1 << 63 for key in numbers):
            raise ValueError("a number is out of range")
        parent, bits = value.get("parent"), value.get("bits_per_weight")
        if parent is not None and (type(parent) is not str or Path(parent).name != parent):
            raise ValueError("parent names no model")
        if type(bits) is not (type(None) if parent is None else float) or not isfinite(bits or 0.0):
            raise ValueError("bits_per_weight is of the wrong type")
        if value.get("stored") not in (None, "fp8"):
            raise ValueError("stored is neither null nor fp8")
        fields |= {"parent": parent, "bits_per_weight": bits, "stored": value.get("stored")}
        files = tuple(FileRecord(**file) for file in value["files"])
        if not all((type(f.path), type(f.size), type(f.sha256)) == (str, int, str) for f in files):
            raise ValueError("files is of the wrong type")
        return cls(name=home.name, home=home, path=home / value["path"], files=files, **fields)

"""What makes a checkpoint: which files of a listing are needed, what config.json and headers say, and whether all are
intact; and the refusal of an architecture that teal does not decode, before any weights are downloaded.

Reads config.json, safetensors headers and indexes; a weight only to hash it. Knows nothing of where a listing comes
from.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from teal_cli import files
from teal_cli.errors import TealError, UsageError
from teal_cli.files import read_chunks, readable_size
from teal_cli.model import fp8
from teal_cli.model.families import FAMILIES
from teal_cli.registry.entry import FileRecord, ModelEntry
from teal_cli.registry.events import Problem, Progress, Verified

CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_SMALL: Final = frozenset({
    CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
})  # fmt: skip
_TOKENIZERS: Final = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json"})
_PICKLES: Final = (".bin", ".pth", ".pt", ".ckpt")
_DTYPES: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

ARCHITECTURES: Final[dict[str, str]] = {row.architecture: family for family, row in FAMILIES.items()}
"""The class that config.json names -> the family."""


def select_files(names: Collection[str], where: str) -> list[str]:
    """The files of a checkpoint that teal and transformers need, out of all that a folder holds.

    Weights are taken once, as safetensors: .bin, .pth, original/, consolidated.safetensors, onnx/ and GGUF
    copies of the same weights are left out, which for Llama-2-7B is half of the repository.

    Args:
        names: relative paths.
        where: the repository or folder, for messages.

    Raises:
        UsageError: no config.json, or no safetensors weights.
    """
    if CONFIG not in names:
        raise UsageError(
            f"{where} holds no config.json, so it is not a checkpoint that teal can load",
            hint="a checkpoint folder holds config.json, model*.safetensors and tokenizer files",
        )
    shards = sorted(name for name in names if _SHARD.fullmatch(name))
    if INDEX in names and shards:
        weights = [INDEX, *shards]
    elif SINGLE in names:
        weights = [SINGLE]
    else:
        raise _no_safetensors(names, where)
    return sorted(name for name in names if name in _SMALL) + weights


def _no_safetensors(names: Collection[str], where: str) -> UsageError:
    if any(name.endswith(_PICKLES) for name in names):
        return UsageError(
            f"{where} holds its weights only as pickle files (.bin, .pth), which can run code when loaded",
            hint="look for a safetensors branch (--revision refs/pr/N), or load it where you trust it with "
            "transformers and save_pretrained() it to a folder, then: `teal download FOLDER`",
        )
    if any(name.endswith(".gguf") for name in names):
        return UsageError(
            f"{where} holds only GGUF files",
            hint="fetch one (`hf download REPO FILE.gguf --local-dir .`), then: `teal download FILE.gguf`",
        )
    return UsageError(
        f"{where} holds no model.safetensors, nor shards of one with an index",
        hint="teal reads weights from model.safetensors or model-00001-of-0000N.safetensors with its index",
    )


def has_tokenizer(names: Collection[str]) -> bool:
    """Whether a tokenizer is among these files."""
    return not _TOKENIZERS.isdisjoint(names)


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        TealError: not readable, or not an object.
    """
    try:
        value = files.read_json(path)
    except (OSError, ValueError) as error:
        raise TealError(f"{path} cannot be read: {error}", hint="fetch the model again") from error
    if not isinstance(value, dict):
        raise TealError(f"{path} does not hold a JSON object", hint="fetch the model again")
    return value


def unsupported(architecture: str, where: str) -> UsageError:
    """The one refusal of a model that teal cannot decode, naming it and those that it can."""
    titles = ", ".join(row.title for row in FAMILIES.values())
    return UsageError(
        f"{where} has the architecture {architecture}, which teal does not support",
        hint=f"supported are {', '.join(ARCHITECTURES)}: {titles}",
    )


def architecture_of(config: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Architecture and family of a config.json.

    Args:
        config: the parsed config.json.
        where: the model's name, for the message.

    Returns:
        The class name and the family, e.g. ("LlamaForCausalLM", "llama").

    Raises:
        UsageError: the architecture is none of `ARCHITECTURES`.
    """
    named = config.get("architectures")
    model_type = config.get("model_type")
    if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str):
        architecture = named[0]
    else:  # a config without "architectures" is told by its model_type
        by_family = {family: name for name, family in ARCHITECTURES.items()}
        architecture = by_family.get(str(model_type), str(model_type))
    if architecture not in ARCHITECTURES:
        raise unsupported(architecture, where)
    return architecture, ARCHITECTURES[architecture]


def context_of(config: dict[str, Any]) -> int:
    """The longest sequence that a config.json allows, in tokens."""
    return int(config.get("max_position_embeddings", 2048))


@dataclass(frozen=True)
class Weights:
    """What config.json and the headers of all safetensors files say.

    Attributes:
        dtype: of most weights, as torch names it; of fp8 weights, what they become.
        parameters: number of weights, scales not counted.
        stored: as in `ModelEntry`.
    """

    dtype: str
    parameters: int
    stored: str | None = None


def inspect_weights(folder: Path, files: Collection[str]) -> Weights:
    """Read the safetensors headers of a checkpoint, and hold them against the files' sizes and the index.

    Raises:
        TealError: a file is truncated or malformed, or a shard that the index names is missing.
        UsageError: the weights are quantised in a way that teal does not read.
    """
    if INDEX in files:
        named = set(read_json(folder / INDEX).get("weight_map", {}).values())
        missing = sorted(named - set(files))
        if missing:
            raise TealError(
                f"{folder} lacks {len(missing)} of {len(named)} weight files, the first is {missing[0]}",
                hint="fetch the missing files, or run the download again",
            )
    counts: Counter[str] = Counter()
    for name in files:
        if name.endswith(".safetensors"):
            counts.update(_header_counts(folder / name))
    if not counts:
        raise TealError(f"{folder} holds no weights", hint="fetch the model again")
    dtype = counts.most_common(1)[0][0]
    if dtype == fp8.STORED and _scaled(folder):
        config = read_json(folder / CONFIG)
        asked = str(config.get("dtype", config.get("torch_dtype")))
        return Weights(asked if asked in _DTYPES.values() else "bfloat16", sum(counts.values()), stored="fp8")
    if dtype not in _DTYPES:
        raise UsageError(
            f"{folder} holds {dtype} weights, which teal does not decode",
            hint="use a checkpoint in bfloat16, float16 or float32",
        )
    return Weights(_DTYPES[dtype], sum(counts.values()))


def _scaled(folder: Path) -> bool:
    """Whether config.json says how fp8 weights are scaled."""
    try:
        return fp8.fp8_of(read_json(folder / CONFIG)) is not None
    except ValueError as error:
        raise UsageError(str(error), hint="use a checkpoint in bfloat16, float16 or float32") from error


def _header_counts(path: Path) -> Counter[str]:
    """Number of weights by dtype in one safetensors file, whose size must be what its header says."""
    size = path.stat().st_size
    counts: Counter[str] = Counter()
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length) if length < size else b"")
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        for name, tensor in tensors.items():
            if not name.endswith(fp8.SCALES):
                counts[tensor["dtype"]] += math.prod(tensor["shape"])
        expected = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise truncated(path, "its header cannot be read") from error
    if size != expected:
        raise truncated(path, f"its header asks for {expected} bytes and there are {size}")
    return counts


def truncated(path: Path, detail: str) -> TealError:
    """The error for a weight file that is cut short or malformed."""
    return TealError(
        f"{path.name} in {path.parent} is truncated or damaged: {detail}",
        hint="fetch it again: `teal download MODEL --force`",
    )


def verify(entry: ModelEntry) -> Iterator[Progress | Verified]:
    """Check every file of a model.

    Yields:
        Progress of stage "verify", in bytes read; last what was found.
    """
    by_size = {file.path: _size_problem(entry, file) for file in entry.files}
    done, total = 0, sum(file.size for file in entry.files if by_size[file.path] is None)
    problems = []
    for file in entry.files:
        problem = by_size[file.path]
        if problem is None:
            digest = hashlib.sha256()
            for chunk in read_chunks(entry.path / file.path):
                digest.update(chunk)
                done += len(chunk)
                yield Progress("verify", done, total)
            if digest.hexdigest() != file.sha256:
                problem = Problem(file.path, "altered", f"sha256 {digest.hexdigest()[:12]}, not {file.sha256[:12]}")
        if problem is not None:
            problems.append(problem)
    yield Verified(tuple(problems))


def _size_problem(entry: ModelEntry, file: FileRecord) -> Problem | None:
    path = entry.path / file.path
    if not path.is_file():
        return Problem(file.path, "missing", f"not in {entry.path}")
    size = path.stat().st_size
    if size == file.size:
        return None
    kept, expected = readable_size(size), readable_size(file.size)
    return Problem(file.path, "size", f"{kept} ({size} bytes), not {expected} ({file.size} bytes)")

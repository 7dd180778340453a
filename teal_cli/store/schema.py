"""The schema `teal-activations/2`: names, data types and sizes of everything inside a store.

A store is a Zarr v3 group; each *level* (one sparsity target) is a group in it, each *site* (one distinct
input vector of a layer) a group in the level. Rows are kept as a bitmap plus packed kept values, in blocks of
T tokens. This file holds the constants and the pure functions that writer, reader and checks agree on; it
opens no file and knows no Zarr.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import numpy as np

from teal_cli.checks import check_sparsity
from teal_cli.errors import UsageError

SCHEMA: Final = "teal-activations/2"
# Without criterion, plan, run, columns, levels and digest; still read and resumed.
SCHEMA_1: Final = "teal-activations/1"
# One root over the stores that several ranks wrote, see `collection`.
COLLECTION: Final = "teal-collection/1"
SCHEMAS: Final = (SCHEMA_1, SCHEMA, COLLECTION)
COMPARE: Final = "abs(x) > t"
BITORDER: Final = "little"

# What a store calls the data type of its values -> how the array holds them. Zarr has no bfloat16: its bits
# are kept.
VALUE_DTYPES: Final[dict[str, np.dtype]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}

NEVER_WRITTEN: Final = 0xFFFFFFFF  # fill of row_nnz and of the token columns: a row that no one wrote says so
PHASE_NEVER: Final = 0xFF
NO_EXPERT: Final = 0xFFFF  # of a layer whose tokens all pass the same MLP, and of a row that no one wrote

EXPERT_SITE: Final = "mlp_mid"
"""Where a row of a mixture of experts is the vectors of the token's experts, one after the other."""
EXPERT_ARRAY: Final = f"{EXPERT_SITE}/expert"
EXPERT_THRESHOLDS: Final = f"{EXPERT_SITE}/expert_thresholds"

# phase of a row: how its token came to be fed. Stored as uint8 with CF attributes flag_values and
# flag_meanings.
PHASES: Final[dict[str, int]] = {"prefill": 0, "decode": 1, "forced": 2}

TOKEN_COLUMNS: Final[dict[str, np.dtype]] = {
    "token_id": np.dtype("<u4"),
    "position": np.dtype("<u4"),
    "sequence": np.dtype("<u4"),
    "phase": np.dtype("u1"),
}
# Columns that a store has only if its header lists them. logprob: of the token that follows, natural logarithm.
OPTIONAL_COLUMNS: Final[dict[str, np.dtype]] = {"logprob": np.dtype("<f4")}
COLUMN_FILLS: Final[dict[str, float]] = dict.fromkeys(TOKEN_COLUMNS, NEVER_WRITTEN) | {
    "phase": PHASE_NEVER,
    "logprob": float("nan"),
}

# What a header may say at most; a model or a run beyond them is refused when the store is made.
MAX_LAYERS: Final = 10_000
MAX_CHANNELS: Final = 1 << 24
MAX_TOKENS: Final = (1 << 32) - 2  # of a level: token indices are uint32, the last of them means "never written"
MAX_BLOCK_BYTES: Final = 1 << 31  # of one layer's values: what the codec can hold
MAX_LEVELS: Final = 1000
_MAX_LEVEL_DIGITS: Final = 40

# Compression: what the arrays declare, and what the writer does.
# values: blosc with zstd and byte shuffle; mask, row_nnz and the token columns: zstd.
ZSTD_LEVEL: Final = 1
BLOSC_BLOCKSIZE: Final = 1 << 20

MIN_BLOCK_BYTES: Final = 256 * 1024
TOKEN_CHUNK_ROWS: Final = 4096  # token columns are narrow: larger chunks than a block keep their files few

_PART: Final = re.compile(r"part-\d{5}")
_LEVEL: Final = re.compile(r"s(0\.\d{2,})")
_LEVELS_HINT: Final = "levels look like 0.5, or 0.25,0.5,0.9, or 0.50:0.95:0.05 (start:stop:step, both ends in it)"


def level_name(target: float) -> str:
    """Name of the group for one sparsity target: two decimals, more only where two cannot say it (0.5 -> `s0.50`).

    Raises:
        UsageError: target outside [0, 1).
    """
    check_sparsity(target)
    short = f"{target:.2f}"
    # repr() is the shortest text that reads back as the same float; 1e-05 and the like are spelled out.
    text = short if float(short) == target else np.format_float_positional(target, unique=True)
    return f"s{text}"


def part_name(number: int) -> str:
    """Folder of a part of a collection, e.g. `part-00000`."""
    return f"part-{number:05d}"


def is_part_name(name: str) -> bool:
    """Whether this is how `part_name` writes a number."""
    return _PART.fullmatch(name) is not None


def parse_level(name: str | float) -> float:
    """The sparsity target of a level given as its name (`s0.50`), as text (`0.5`) or as a number.

    Raises:
        UsageError: not a level name and not a number in [0, 1).
    """
    try:
        match = _LEVEL.fullmatch(name) if isinstance(name, str) else None
        target = float(match.group(1)) if match else float(name)
    except ValueError:
        raise UsageError(f"{name!r} names no level", hint="write s0.50 or 0.5") from None
    level_name(target)
    return target


def parse_levels(text: str) -> tuple[float, ...]:
    """Read levels, in rising order and each once.

    Decimal arithmetic, so that 0.50:0.95:0.05 has ten levels and the last one is 0.95.

    Raises:
        UsageError: text that is no level, a level outside [0, 1), a step that leads nowhere, more than
            `MAX_LEVELS` levels.
    """
    levels: set[float] = set()
    for part in text.split(","):
        levels.update(float(level) + 0.0 for level in _expand_range(part.strip(), text))  # -0.0 becomes 0.0
    for level in sorted(levels):
        check_sparsity(level, hint=_LEVELS_HINT)
    if len(levels) > MAX_LEVELS or any(len(level_name(level)) > _MAX_LEVEL_DIGITS for level in levels):
        raise UsageError(f"a store takes {MAX_LEVELS} levels of {_MAX_LEVEL_DIGITS} digits at most", hint=_LEVELS_HINT)
    return tuple(sorted(levels))


def _expand_range(part: str, text: str) -> list[Decimal]:
    try:
        numbers = [Decimal(number.strip()) for number in part.split(":")]
        if not all(number.is_finite() for number in numbers):
            raise InvalidOperation
    except InvalidOperation:
        raise UsageError(f"cannot read the sparsity levels {text!r}", hint=_LEVELS_HINT) from None
    for number in numbers[:2]:
        if not 0 <= number <= 1:  # before anything is counted with it: 1e999999 is a number too
            check_sparsity(number, hint=_LEVELS_HINT)
    if len(numbers) == 1:
        return numbers
    if len(numbers) != 3:
        raise UsageError(f"a range of levels needs start:stop:step, not {part!r}", hint=_LEVELS_HINT)
    start, stop, step = numbers
    if step <= 0 or stop < start:
        raise UsageError(f"the range {part!r} holds no levels", hint=_LEVELS_HINT)
    if stop - start >= step * MAX_LEVELS:
        raise UsageError(f"the range {part!r} holds more than {MAX_LEVELS} levels", hint=_LEVELS_HINT)
    return [start + i * step for i in range(int((stop - start) / step) + 1)]


def block_tokens(channels: Iterable[int], itemsize: int) -> int:
    """Tokens per block T: the smallest power of two for which T*K*itemsize >= 256 KiB at every site.

    Args:
        channels: K of every site.
        itemsize: bytes of one stored value (2 or 4).
    """
    needed = -(-MIN_BLOCK_BYTES // (min(channels) * itemsize))
    return int(1 << (needed - 1).bit_length()) if needed > 1 else 1


def mask_bytes(channels: int) -> int:
    """Bytes of one row of the bitmap: ceil(K/8)."""
    return -(-channels // 8)


def blocks_of(tokens: int, block: int) -> int:
    """Blocks that hold this many tokens, the last one perhaps partial."""
    return -(-tokens // block)


def token_chunk(block: int) -> int:
    """Rows per chunk of the token columns: a whole number of blocks, about 4096 rows or more."""
    return block * blocks_of(TOKEN_CHUNK_ROWS, block)


def take(found: Mapping[str, Any], name: str, kind: type | tuple[type, ...], *, optional: bool = False) -> Any:
    """A field of a JSON object.

    Raises:
        ValueError: it is missing or of another type (a bool is no number).
    """
    if name not in found:
        raise ValueError(f"{name} is missing")
    value = found[name]
    if optional and value is None:
        return value
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {str(value)[:40]!r}, which is of the wrong type")
    return value


def items(found: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """A field that is a list of one type; raises as `take`."""
    values = take(found, name, list)
    if not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
        raise ValueError(f"{name} has an entry of the wrong type")
    return list(values)


def flags(found: Mapping[str, Any], name: str) -> list[bool]:
    """A field that is a list of true and false; raises as `take`."""
    values = take(found, name, list)
    if not all(isinstance(value, bool) for value in values):
        raise ValueError(f"{name} has an entry of the wrong type")
    return list(values)


@dataclass(frozen=True)
class StoredMixture:
    """The experts of a store's model.

    Attributes:
        experts: of a layer.
        routed: how many of them a token passes.
        layers: bool [layers], which layers have experts.
    """

    experts: int
    routed: int
    layers: tuple[bool, ...]

    def check(self, layers: int, channels: int) -> None:
        """Raises ValueError where the numbers do not fit each other, or a model of so many layers and channels."""
        if not 1 <= self.routed <= self.experts < NO_EXPERT or channels % self.routed or len(self.layers) != layers:
            raise ValueError(f"mixture is {self}, which does not fit {layers} layers of {channels} channels")

    @classmethod
    def from_attributes(cls, found: Any) -> StoredMixture:
        """Raises ValueError as `take`."""
        if not isinstance(found, dict):
            raise ValueError("mixture is of the wrong type")
        return cls(take(found, "experts", int), take(found, "routed", int), tuple(flags(found, "layers")))

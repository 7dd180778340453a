"""Where a value comes from: command line > recipe > TEAL_* variable > ./teal.toml > user config > shipped defaults.

Every setting has one entry in `KEYS`, which also checks it, wherever it comes from; every resolved value carries its
source. `ui.lazy` hands what is found here to the options of a command, through the parser's default map; no command
asks for a setting itself. This file knows the names and kinds of settings, not what they do. It imports nothing heavy.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from teal_cli.checks import OUTSIDE, closest, is_sparsity, meant_sparsity
from teal_cli.errors import UsageError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

DTYPES: Final = ("bfloat16", "float16", "float32")
BACKENDS: Final = ("auto", "triton-graph", "triton", "numba", "cpu", "reference")

_DTYPE_ALIASES: Final = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
_NOT_SETTINGS: Final = {"TEAL_HOME"}
"""Variables of teal that are not settings."""


class RefusedError(ValueError):
    """A value that a check refuses, with a hint of its own."""

    def __init__(self, problem: str, *, hint: str) -> None:
        super().__init__(problem)
        self.hint = hint


# ---------------------------------------------------------------- checks
# Each takes what TOML, a variable or an option gave, and returns the value or raises ValueError saying what
# is wrong with it.
def text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be text")
    return value


def switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    words = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError("must be true or false")
    return words[value.lower()]


def integer(lowest: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"-?\d+", value.strip()):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ValueError(f"must be a whole number of at least {lowest}")
        return value

    return check


def one_of(*words: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if value not in words:
            raise ValueError(f"is not one of {', '.join(words)}")
        return str(value)

    return check


def number(value: object) -> float:
    if isinstance(value, (bool, dict, list)):
        raise ValueError("must be a number")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError("must be a number") from None


def sparsity(value: object) -> float:
    part = number(value)
    if not is_sparsity(part):
        raise RefusedError(OUTSIDE, hint=meant_sparsity(part) + "0.5 drops half of every input")
    return part


def top_p(value: object) -> float:
    share = number(value)
    if not 0.0 < share <= 1.0:
        raise ValueError("is outside (0, 1]: 1 is all tokens")
    return share


def temperature(value: object) -> float:
    degrees = number(value)
    if not 0.0 <= degrees < float("inf"):
        raise ValueError("must be 0 (greedy) or more")
    return degrees


def dtype(value: object) -> str:
    name = _DTYPE_ALIASES.get(str(value), str(value))
    if name not in DTYPES:
        raise ValueError(f"is not one of {', '.join(DTYPES)}")
    return name


def device(value: object) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(value)):
        raise ValueError("is not a device: take auto, cpu, cuda or cuda:N")
    return str(value)


def backend(value: object) -> str:
    if value not in BACKENDS:
        raise ValueError(f"is not one of {', '.join(BACKENDS)}")
    return str(value)


# ---------------------------------------------------------------- the settings
class Key(NamedTuple):
    check: Callable[[object], Any]
    help: str


KEYS: Final[dict[str, Key]] = {
    "model": Key(text, "model to use where none is named; else the registry's default"),
    "sparsity": Key(sparsity, "part of every input that generate drops"),
    "calibration": Key(text, "calibration to use; else the default one of the model"),
    "dtype": Key(dtype, "dtype to compute in; else the checkpoint's"),
    "device": Key(device, "device to compute on"),
    "backend": Key(backend, "sparse kernels to use"),
    "seed": Key(integer(0), "seed of the sampling; else a new one each time"),
    "offline": Key(switch, "never reach for the network"),
    "generate.max_new_tokens": Key(integer(1), "tokens to generate"),
    "generate.temperature": Key(temperature, "0 is greedy"),
    "generate.top_k": Key(integer(0), "sample among the K most likely; 0 among all"),
    "generate.top_p": Key(top_p, "and among the fewest whose probability reaches P"),
    "calibrate.dataset": Key(text, "text to calibrate on"),
    "calibrate.num_sequences": Key(integer(1), "sequences to calibrate on"),
    "calibrate.seq_len": Key(integer(1), "tokens of each sequence"),
    "dump.levels": Key(text, "sparsity levels, LOW:HIGH:STEP or a list"),
    "dump.dataset": Key(text, "where the prompts come from"),
    "dump.num_sequences": Key(integer(1), "prompts to take"),
    "dump.max_new_tokens": Key(integer(1), "tokens to generate for each prompt"),
}


class Value(NamedTuple):
    """A setting as resolved, and where from: "command line", the variable's name, the file's path, or "default"."""

    value: Any
    source: str


@dataclass(frozen=True)
class Settings:
    """All settings below the command line, resolved; a key that nobody set is absent."""

    values: Mapping[str, Value]

    def pick(self, key: str, given: Any = None) -> Any:
        """The option's value if it was given, else the setting's, else None."""
        return self.resolve(key, given).value

    def resolve(self, key: str, given: Any = None) -> Value:
        """`pick` with the source."""
        KEYS[key]  # a misspelt key is a defect of ours: KeyError
        if given is not None:
            return Value(given, "command line")
        return self.values.get(key, Value(None, "unset"))


def load(env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Settings:
    """Resolve every setting below the command line.

    Args:
        env: the environment; the process's own if None.
        cwd: the folder whose teal.toml counts; the current one if None.

    Raises:
        UsageError: a file is not TOML, holds an unknown setting, or a value anywhere is not acceptable.
    """
    env = os.environ if env is None else env
    values: dict[str, Value] = {}
    shipped = configs() / "defaults.toml"
    for key, value in _flat(tomllib.loads(shipped.read_text(encoding="utf-8"))):
        values[key] = Value(KEYS[key].check(value), "default")
    for path in (user_config(), (cwd or Path()) / "teal.toml"):
        if path is not None and path.is_file():
            values.update(_from_file(path))
    for key in KEYS:
        if raw := env.get(variable(key)):
            values[key] = Value(_checked(key, raw, variable(key)), variable(key))
    return Settings(values)


def variable(key: str) -> str:
    """`generate.top_k` -> `TEAL_GENERATE_TOP_K`."""
    return "TEAL_" + key.upper().replace(".", "_")


def unknown_variables(env: Mapping[str, str] | None = None) -> list[str]:
    """TEAL_* variables that set nothing: misspelt ones."""
    known = {variable(key) for key in KEYS} | _NOT_SETTINGS
    return sorted(
        name for name in (os.environ if env is None else env) if name.startswith("TEAL_") and name not in known
    )


def _from_file(path: Path) -> Iterator[tuple[str, Value]]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    for key, value in _flat(content):
        if key not in KEYS:
            meant = closest(key, KEYS)
            hint = f"did you mean {meant[0]!r}?" if meant else f"the settings are {', '.join(KEYS)}"
            raise UsageError(f"{path} has an unknown setting {key!r}", hint=hint)
        yield key, Value(_checked(key, value, str(path)), str(path))


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _checked(key: str, value: object, source: str) -> Any:
    try:
        return KEYS[key].check(value)
    except ValueError as error:
        where = f"unset {source}" if source == variable(key) else f"remove it from {source}"
        hint = getattr(error, "hint", None) or f"correct it, or {where} to have the default"
        raise UsageError(f"{key} = {value!r} in {source} {error}", hint=hint) from None


# ---------------------------------------------------------------- places
def configs() -> Traversable:
    """The shipped `configs/` folder: `configs() / "models"` is a folder of TOML files, in a wheel as in a checkout."""
    from importlib.resources import files

    try:
        return files("teal_cli.configs")
    except ModuleNotFoundError:  # a checkout on PYTHONPATH that nobody installed
        return Path(__file__).parent.parent / "configs"


def teal_home() -> Path:
    """The folder that holds the registry: `$TEAL_HOME`, else the user's data folder of this platform.

    Raises:
        UsageError: the user has no home folder and the environment names none, or what it names cannot be one.
    """
    if home := os.environ.get("TEAL_HOME"):
        path = Path(home).expanduser()
        for place in (path, *path.parents):
            if place.is_file():
                raise UsageError(f"TEAL_HOME cannot be a folder: {place} is a file", hint="set TEAL_HOME to a folder")
        return path
    from platformdirs import user_data_path

    try:
        return user_data_path("teal", appauthor=False)
    except RuntimeError:
        raise UsageError("this user has no home folder", hint="set TEAL_HOME to a folder for models") from None


def user_config() -> Path | None:
    """The user's own settings, for every folder: `config.toml` in the platform's config folder; None without a home."""
    from platformdirs import user_config_path

    try:
        return user_config_path("teal", appauthor=False) / "config.toml"
    except RuntimeError:
        return None

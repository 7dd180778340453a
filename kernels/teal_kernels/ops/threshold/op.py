"""`threshold(x, t)`: zero what does not exceed t. Checks, device dispatch, registration as
`torch.ops.teal.threshold`."""

from __future__ import annotations

import torch
from torch import Tensor

from teal_kernels.backends import REFERENCE, TRITON, choose_backend
from teal_kernels.configs import EXACT
from teal_kernels.ops.threshold.reference import threshold_reference

_BLOCK = 1024


def _threshold_triton(x: Tensor, threshold: Tensor) -> Tensor:
    from teal_kernels.ops.threshold.kernel import threshold_kernel

    flat = x.contiguous()
    out = torch.empty_like(flat)
    size = flat.numel()
    if size:
        threshold_kernel[(-(-size // _BLOCK),)](
            flat, threshold, out, size, len(threshold), BLOCK=_BLOCK, PER_CHANNEL=len(threshold) > 1, num_warps=4,
            **EXACT,
        )  # fmt: skip
    return out


def _threshold(x: Tensor, threshold: Tensor, backend: str) -> Tensor:
    return _threshold_triton(x, threshold) if backend == TRITON else threshold_reference(x, threshold)


def _threshold_fake(x: Tensor, threshold: Tensor, backend: str) -> Tensor:
    return torch.empty_like(x)


_LIBRARY = torch.library.Library("teal", "FRAGMENT")
_LIBRARY.define("threshold(Tensor x, Tensor threshold, str backend) -> Tensor")
_LIBRARY.impl("threshold", _threshold, "CompositeExplicitAutograd")
torch.library.register_fake("teal::threshold", _threshold_fake, lib=_LIBRARY)


def threshold(x: Tensor, t: float | Tensor, *, backend: str | None = None) -> Tensor:
    """Zero the entries of `x` with `|x| <= t`; the comparison is made in float32.

    Args:
        x: float16, bfloat16 or float32, any shape.
        t: the threshold, not negative: a float, or a float32 tensor of one element on the device of `x` (a
            tensor costs no copy to the device, so a decode step should pass one), or of one per channel, [K], where
            K is the last axis of `x`.
        backend: "reference" or "triton"; by default triton on a GPU, the reference elsewhere.

    Returns:
        The shape and dtype of `x`; kept entries keep their bits, the others are +0.0.

    Raises:
        TypeError: `x` is not floating point.
        BackendError: the backend does not exist or cannot run on the device of `x`.
    """
    if not x.is_floating_point():
        raise TypeError(f"threshold needs a floating point tensor, got {x.dtype}")
    if not isinstance(t, Tensor):
        t = torch.tensor([t], dtype=torch.float32, device=x.device)
    elif t.dtype != torch.float32 or t.device != x.device or (t.numel() != 1 and t.shape != x.shape[-1:]):
        raise ValueError(
            f"a threshold tensor has one float32 element on {x.device}, or one per channel; "
            f"got {t.dtype} {tuple(t.shape)} on {t.device}"
        )
    name = choose_backend(x.device.type, backend)
    return torch.ops.teal.threshold(x, t.reshape(-1), name if name == TRITON else REFERENCE)

"""Weights side by side on large pages."""

from __future__ import annotations

import gc
import mmap
import weakref
from pathlib import Path

import pytest
import torch

from teal_cli.model import memory
from teal_cli.model.memory import WeightMemory, give_back_freed


def test_tensors_do_not_touch_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_SLAB", 4096)
    room = WeightMemory()
    shapes = [(3, 5), (1,), (40, 40), (7, 64), (100, 30), (0, 4)]  # within a slab, over its end, larger than one
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    tensors = [room.empty(*shape, dtype=dtypes[i % 3]).fill_(i) for i, shape in enumerate(shapes)]
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.dtype == dtypes[i % 3]
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert (tensor == i).all()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE

    blocks = [torch.ones(16 << 10) for _ in range(2048)]  # 64 KiB each, 128 MiB: too small to be mapped by themselves
    del blocks[::2]  # holes between the others, which stay
    gc.collect()
    before = resident()
    give_back_freed()
    assert hasattr(memory._LIBC, "malloc_trim") == (before - resident() > 32 << 20)


def test_a_slab_begins_at_a_large_page_and_is_freed() -> None:
    room = WeightMemory()
    tensor = room.empty(8, dtype=torch.float32)
    assert tensor.data_ptr() % (2 << 20) == 0
    storage = weakref.ref(tensor.untyped_storage())
    del room, tensor
    gc.collect()
    assert storage() is None

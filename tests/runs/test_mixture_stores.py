"""Stores of mixtures of experts: what a dump holds is judged by transformers, resumed, verified and repeated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from oracle import assert_agrees, calibrated, prompt_file
from torch.distributed import HashStore

from teal_cli.data.prompts import PromptSource
from teal_cli.decoding.sampling import Sampling
from teal_cli.errors import UsageError
from teal_cli.registry.download import fetch
from teal_cli.runs.board import StoreBoard
from teal_cli.runs.dump import Dump, DumpRequest
from teal_cli.runs.session import open_session
from teal_cli.store.merge import merge
from teal_cli.store.reader import open_store
from teal_cli.store.schema import EXPERT_ARRAY, NO_EXPERT
from teal_cli.store.verify import Problem, verify
from teal_cli.store.xarray import TealBackendEntrypoint

LEVELS = (0.0, 0.5, 0.9)


def a_dump(folder: Path, *, count: int = 2, new: int = 12, levels: tuple[float, ...] = LEVELS, **how: str) -> Dump:
    texts = ("The quick brown fox", "def keep", "Sparse activations")[:count]
    prompts = PromptSource(file=prompt_file(folder, *texts))
    session = open_session("tiny", dtype="float32", device="cpu")
    return Dump(session, DumpRequest(levels, prompts, new, Sampling(temperature=0), ignore_eos=True, **how))


def problems(path: Path) -> list[str]:
    return [str(event) for event in verify(path) if isinstance(event, Problem)]


@pytest.mark.parametrize("name", ["qwen3-moe", "granite-moe"])
def test_transformers_judges_a_dump(name: str, tiny: Callable[[str], Path], teal_home: Path, tmp_path: Path) -> None:
    fetch(str(tiny(name)), name="tiny")
    calibrated("tiny", 2, 96)
    dump, out = a_dump(tmp_path), tmp_path / "out.zarr"
    for _ in dump.run(out):
        pass
    assert_agrees(dump, out)
    assert problems(out) == []
    store = open_store(out)
    assert store.header.mixture is not None
    level = store.level(0.5)
    assert level.expert_thresholds.shape == (3, store.header.mixture.experts)
    dataset = xr.open_dataset(out, engine=TealBackendEntrypoint, level=0.5)
    assert dataset["expert"].dims == ("layer", "token", "place")
    for layer, mixed in enumerate(store.header.mixture.layers):
        assert (level.stored_experts(layer) == NO_EXPERT).all() != mixed
        if not mixed:
            with pytest.raises(UsageError, match=f"layer {layer} of tiny has no experts"):
                level.experts(layer)
        elif (level.expert_thresholds[layer] > 0).all():
            assert len(set(level.expert_thresholds[layer].tolist())) > 1, "each has its own"


@pytest.mark.filterwarnings("ignore:Consolidated metadata")  # what hides it is no hiding place between threads
def test_a_dump_that_was_cut_off_or_shared_out_becomes_the_same_store(
    tiny: Callable[[str], Path], teal_home: Path, tmp_path: Path
) -> None:
    fetch(str(tiny("qwen3-moe")), name="tiny")
    calibrated("tiny", 1, 64)
    whole, cut = tmp_path / "whole.zarr", tmp_path / "cut.zarr"
    kinds = {"follow": "dense", "prefill": "dense"}
    for _ in a_dump(tmp_path, count=3, levels=(0.5,), **kinds).run(whole):
        pass
    run = a_dump(tmp_path, count=3, levels=(0.5,), **kinds).run(cut)
    for _ in run:
        if cut.exists():
            break
    run.close()
    assert not open_store(cut).complete
    for _ in a_dump(tmp_path, count=3, levels=(0.5,), **kinds).run(cut, resume=True):
        pass
    assert problems(whole) == problems(cut) == []
    first, second = (open_store(path).level(0.5) for path in (whole, cut))
    for layer in range(3):
        np.testing.assert_array_equal(first.stored_experts(layer), second.stored_experts(layer))
        np.testing.assert_array_equal(
            np.asarray(first.site(layer, "mlp_mid")), np.asarray(second.site(layer, "mlp_mid"))
        )
    parts, merged, board = tmp_path / "parts.zarr", tmp_path / "merged.zarr", HashStore()
    runs = [a_dump(tmp_path, count=3, levels=(0.5,), **kinds).run(parts, board=StoreBoard(board, i, 2)) for i in (0, 1)]
    raised: list[BaseException] = []

    def drive(run: Iterator[object]) -> None:
        try:
            list(run)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=drive, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == []
    assert problems(parts) == []
    joined = open_store(parts).level(0.5)
    np.testing.assert_array_equal(joined.experts(0), first.experts(0))
    for _ in merge(open_store(parts), merged):
        pass
    assert open_store(merged).state.digest == open_store(whole).state.digest


def test_verify_knows_whose_a_row_is(tiny: Callable[[str], Path], teal_home: Path, tmp_path: Path) -> None:
    fetch(str(tiny("mixtral")), name="tiny")
    calibrated("tiny", 2, 96)
    out = tmp_path / "out.zarr"
    for _ in a_dump(tmp_path, levels=(0.5,)).run(out):
        pass
    assert problems(out) == []
    array = zarr.open_array(out / "s0.50" / EXPERT_ARRAY, mode="r+")
    found, thresholds = np.asarray(array[:]), open_store(out).level(0.5).expert_thresholds
    swapped = found.copy()
    swapped[1] = np.sort(np.argsort(-thresholds[1])[: found.shape[2]])  # those that drop most
    array[:] = swapped
    assert any("layer 1: a kept value is not above the threshold of its expert" in p for p in problems(out))
    array[:] = found[..., ::-1]
    assert any("no experts of a token" in p for p in problems(out))
    array[:] = found
    assert problems(out) == []

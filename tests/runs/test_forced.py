"""Dumps in which every level is fed the same tokens, against transformers' own model under teacher forcing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_cli import Teal
from hypothesis import given
from hypothesis import strategies as st
from oracle import reference_model
from reference_model import MODULES, relative_rms

from teal_cli import open_store
from teal_cli.registry.registry import Registry
from teal_cli.runs.forced import Place
from teal_cli.store.reader import Level
from teal_cli.store.schema import PHASES
from teal_kernels.spec import PROJECTION_INDEX

PROMPT, NEW = 6, 9


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "prose"
    folder.mkdir()
    for index, words in enumerate(("the quick brown fox jumps over the dog", "rows of a store, and zinc and copper")):
        (folder / f"{index}.txt").write_text(" ".join([words] * 4), encoding="utf-8")
    return folder


def dump(teal: Teal, text: Path, path: Path, *extra: object) -> None:
    arguments = ("dump", "-m", "tiny", "-d", text, "-n", 2, "--prompt-tokens", PROMPT, "--max-new-tokens", NEW)
    ran = teal(*arguments, "-s", "0,0.5", "--dtype", "float32", "--ignore-eos", "-o", path, *extra)
    assert ran.code == 0, ran.err


@torch.no_grad()
def forced(path: Path, prompt: list[int], fed: list[int], thresholds: np.ndarray) -> tuple[dict[Any, Any], Any]:
    """(layer, projection) -> masked inputs of transformers' linear layers at the fed tokens; log-probabilities."""
    model, seen = reference_model(path), {}
    for index, layer in enumerate(model.model.layers):
        for projection, parent in MODULES.items():
            t = float(thresholds[index, PROJECTION_INDEX[projection]])

            def hook(module: Any, inputs: Any, key: Any = (index, projection), t: float = t) -> tuple[torch.Tensor]:
                x = inputs[0].clone()
                x[:, len(prompt) :][x[:, len(prompt) :].abs() <= t] = 0
                seen[key] = x[0, len(prompt) :]
                return (x,)

            getattr(getattr(layer, parent), f"{projection}_proj").register_forward_pre_hook(hook)
    logits = model(torch.tensor([prompt + fed])).logits[0, len(prompt) :]
    return seen, logits.double().log_softmax(-1)


def assert_is_teacher_forced(level: Level, path: Path, prompts: dict[str, Any]) -> None:
    for sequence, (prompt, following) in enumerate(zip(prompts["token_ids"], prompts["following"], strict=True)):
        rows = level.rows(sequence)
        assert list(level.tokens.token_id[rows]) == following[:-1]
        assert list(level.tokens.position[rows]) == list(range(len(prompt), len(prompt) + len(following) - 1))
        assert (level.tokens.phase[rows] == PHASES["forced"]).all()
        seen, chances = forced(path, prompt, following[:-1], level.thresholds)
        for (layer, projection), expected in seen.items():
            found = torch.from_numpy(np.array(level.projection(layer, projection)[rows]))
            assert relative_rms(found, expected) < 1e-4, (layer, projection)
        wanted = chances.gather(1, torch.tensor(following[1:])[:, None])[:, 0].numpy()
        assert level.tokens.logprob is not None
        np.testing.assert_allclose(level.tokens.logprob[rows], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("follow", ["text", "dense"])
def test_rows_are_those_of_transformers_under_teacher_forcing(
    ready: Path, teal: Teal, text: Path, tmp_path: Path, follow: str
) -> None:
    path = tmp_path / "store.zarr"
    dump(teal, text, path, "--follow", follow)
    assert teal("store", "verify", path).code == 0
    store = open_store(path)
    assert store.header.backend == "pass"
    prompts = dict(store.header.prompts)
    assert [len(ids) for ids in prompts["following"]] == [NEW, NEW]
    for target in (0, 0.5):
        assert_is_teacher_forced(store.level(target), Registry().get("tiny").path, prompts)


def test_following_dense_at_level_0_gives_the_dense_rows(ready: Path, teal: Teal, text: Path, tmp_path: Path) -> None:
    dump(teal, text, tmp_path / "free.zarr", "--temperature", 0)
    dump(teal, text, tmp_path / "dense.zarr", "--temperature", 0, "--follow", "dense")
    free, dense = (open_store(tmp_path / name).level(0) for name in ("free.zarr", "dense.zarr"))
    assert list(free.tokens.token_id) == list(dense.tokens.token_id)
    for layer in range(3):
        for site in ("attn_in", "attn_out", "mlp_in", "mlp_mid"):
            ours, theirs = (torch.from_numpy(np.array(level.site(layer, site)[:])) for level in (dense, free))
            assert relative_rms(ours, theirs) < 1e-4


def test_the_text_is_the_datasets(ready: Path, teal: Teal, text: Path, tmp_path: Path) -> None:
    dump(teal, text, tmp_path / "store.zarr", "--follow", "text")
    store = open_store(tmp_path / "store.zarr")
    tiny = reference_tokenizer()
    for index, file in enumerate(sorted(text.iterdir())):
        ids = store.header.prompts["token_ids"][index] + store.header.prompts["following"][index]
        assert ids == tiny(file.read_text(encoding="utf-8"))[: PROMPT + NEW]


def reference_tokenizer() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Registry().get("tiny").path)
    return lambda text: tokenizer(text).input_ids


@pytest.mark.parametrize("follow", ["text", "dense"])
def test_an_interrupted_run_goes_on(
    ready: Path, teal: Teal, text: Path, tmp_path: Path, follow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second level, it ends with the arrays of an uninterrupted one, with no other option."""
    from teal_cli.runs import forced as module

    whole, path = tmp_path / "whole.zarr", tmp_path / "store.zarr"
    dump(teal, text, whole, "--follow", follow)
    add, calls = module._add, []

    def interrupted(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return add(*arguments)

    monkeypatch.setattr(module, "_add", interrupted)
    arguments = ("dump", "-m", "tiny", "-d", text, "-n", 2, "--prompt-tokens", PROMPT, "--max-new-tokens", NEW)
    stopped = teal(*arguments, "-s", "0,0.5", "--dtype", "float32", "--ignore-eos", "-o", path, "--follow", follow)
    assert stopped.code == 130
    monkeypatch.setattr(module, "_add", add)
    resumed = teal("dump", "--resume", "-o", path)
    assert resumed.code == 0, resumed.err
    assert teal("store", "verify", path).code == 0
    ours, theirs = open_store(path), open_store(whole)
    for target in (0, 0.5):
        for name in ("token_id", "position", "sequence", "phase", "logprob"):
            assert (ours.level(target).tokens[name] == theirs.level(target).tokens[name]).all()
        for layer in range(3):
            for site in ("attn_in", "mlp_mid"):
                a, b = (np.array(store.level(target).site(layer, site)[:]) for store in (ours, theirs))
                assert (a == b).all()


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 6), st.data())
def test_rows_go_to_their_place_in_whatever_blocks_it_lies(sizes: list[int], skipped: int, data: Any) -> None:
    parts = [{"site": torch.full((2, size, 3), torch.nan)} for size in sizes]
    place, rows = Place(parts, skipped), skipped + sum(sizes)
    wanted = torch.arange(2.0 * rows * 3).view(2, rows, 3)
    cut = data.draw(st.integers(0, rows))
    for layer in range(2):
        for begin, stop in ((0, cut), (cut, rows)):
            place.put("site", layer, begin, wanted[layer, begin:stop])
    found = torch.cat([part["site"] for part in parts], dim=1) if parts else wanted[:, :0]
    assert torch.equal(found, wanted[:, skipped:])


def test_a_file_of_prompts_has_no_text_to_follow(ready: Path, teal: Teal, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two three\n")
    ran = teal("dump", "-m", "tiny", "--prompts", prompts, "--follow", "text", "-s", "0.5", "-o", tmp_path / "s.zarr")
    assert (ran.code, "has no text that follows" in ran.err) == (2, True)


def test_one_layer_at_a_time_gives_the_same_bytes(
    ready: Path, teal: Teal, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from teal_cli.model.transformer import Transformer
    from teal_cli.passes import layers

    stores = [tmp_path / f"{name}.zarr" for name in ("whole", "layers", "chosen", "small")]
    dump(teal, text, stores[0], "--follow", "text", "--prefill", "dense", "--resident")

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr(Transformer, "from_checkpoint", refused)
    dump(teal, text, stores[1], "--follow", "text", "--prefill", "dense", "--layer-by-layer")
    for store, free in ((stores[2], 1 << 17), (stores[3], 1)):  # too little for the model; for two sequences at a time
        monkeypatch.setattr(layers, "available_bytes", lambda device, free=free: free)
        monkeypatch.setattr(module(), "available_bytes", lambda device, free=free: free)
        dump(teal, text, store, "--follow", "text", "--prefill", "dense")
    assert len({open_store(store).state.digest for store in stores}) == 1
    estimate = teal(
        "dump", "--like", stores[0], "-o", tmp_path / "x.zarr", "--layer-by-layer", "--dry-run", "--json"
    ).json
    assert estimate["rows"] == 2 * 2 * (PROMPT + NEW - 1)


def module() -> Any:
    from teal_cli.runs import forced as found

    return found


def test_one_layer_at_a_time_cannot_decode(ready: Path, teal: Teal, tmp_path: Path) -> None:
    for follow in ("free", "dense"):
        ran = teal("dump", "-m", "tiny", "-s", "0.5", "--follow", follow, "--layer-by-layer", "-o", tmp_path / "s.zarr")
        assert (ran.code, "--layer-by-layer cannot decode" in ran.err) == (2, True)

"""`teal bench` and `teal plot` as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures_cli import Teal
from fixtures_gguf import write_gguf

KERNELS = ("bench", "kernels", "--shapes", "96x64", "--dtype", "bf16", "-s", 0.5, "--rounds", 2, "--device", "cpu")
DECODE = ("bench", "decode", "-s", 0.5, "--rounds", 2, "--tokens", 4, "--prompt-tokens", 6, "--device", "cpu",
          "--backend", "cpu")  # fmt: skip


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bandwidth and copies at a size that takes no time; what is measured does not matter here."""
    for module in ("bandwidth", "inputs"):
        monkeypatch.setattr(f"teal_cli.bench.{module}.cache_bytes", lambda device: 1 << 16)
    monkeypatch.setattr("teal_cli.bench.bandwidth._LEAST", 1 << 16)
    monkeypatch.setattr("teal_cli.bench.inputs._LEAST_POOL", 1 << 16)


def test_kernels_to_a_file_and_a_picture(teal: Teal, tmp_path: Path) -> None:
    file, picture = tmp_path / "r.json", tmp_path / "r.png"
    shown = teal(*KERNELS, "--output", file)
    assert shown.code == 0, shown.err
    assert "x dense" in shown.out
    assert "memory reads at" in shown.out
    found = json.loads(file.read_text())
    assert found["schema"] == "teal-bench/1"
    assert found["command"] == "kernels"
    assert found["settings"]["sparsities"] == [0.5]
    assert {"device", "cores", "memory_bytes", "versions", "load"} <= set(found["machine"])
    assert {row["product"] for row in found["rows"]} >= {"torch [N,K]", "cpu"}
    again = teal(*KERNELS, "--output", file)
    assert again.code == 2
    assert "--force" in again.err
    pytest.importorskip("matplotlib")
    assert teal("plot", "bench", file, "-o", picture, "--json").json["picture"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert teal("plot", "bench", file, "-o", picture).code == 2
    assert teal("plot", "bench", file, "-o", picture, "--force").code == 0


def test_kernels_as_json_is_what_the_file_holds(teal: Teal, tmp_path: Path) -> None:
    run = teal(*KERNELS, "--output", tmp_path / "r.json", "--json")
    assert run.json == json.loads((tmp_path / "r.json").read_text())


def test_tuning_is_for_gpus(teal: Teal) -> None:
    run = teal(*KERNELS, "--tune")
    assert run.code == 5
    assert "nothing to tune on cpu" in run.err


def test_tuning_comes_first_and_says_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from teal_cli.bench import kernels, tuning
    from teal_cli.bench.rows import Progress
    from teal_cli.bench.shapes import parse_shapes

    asked: list[tuple[int, tuple[int, ...], torch.dtype]] = []

    def search(shapes, dtype, device):
        for inputs, segments in shapes:
            asked.append((inputs, segments, dtype))
            yield tuning.Tuned(inputs, sum(segments), "bfloat16", 0.5, tuning.GemvConfig(64, 64, 4), 2e-5, 3e-5)

    monkeypatch.setattr(tuning, "tune", search)
    request = kernels.KernelRequest(
        parse_shapes("96x64,64x96"), (torch.bfloat16, torch.float16, torch.float32), (0.5,), torch.device("cuda"), 2
    )
    events = list(kernels._tune(request))
    assert asked == [(96, (64,), torch.float16), (64, (96,), torch.float16), (96, (64,), torch.float32),
                     (64, (96,), torch.float32)]  # fmt: skip
    assert isinstance(events[-1], Progress)
    assert events[-1].text == "Tuned 64x96 bfloat16 at 50%: 1.50x"


def test_a_failed_check_is_said_and_exits_with_1(teal: Teal, monkeypatch: pytest.MonkeyPatch) -> None:
    from teal_kernels.ops.sparse_gemv import prepared

    monkeypatch.setattr(prepared, "sparse_gemv", lambda x, weight, *_, **__: x.new_zeros(weight.shape[1]))
    run = teal(*KERNELS)
    assert run.code == 1
    line = next(line for line in run.out.splitlines() if " cpu " in line)
    assert "failed: error 1, allowed" in line
    assert "1 of " in run.err


@pytest.mark.usefixtures("ready")
def test_decode_of_a_model_with_all_its_peers(teal: Teal, tmp_path: Path) -> None:
    run = teal(*DECODE, "--no-dump", "--output", tmp_path / "r.json", "--json")
    assert run.code == 0, run.err
    rows = {(row["engine"], row["sparsity"]): row for row in run.json["rows"]}
    assert set(rows) == {("torch", 0.0), ("teal", 0.0), ("teal", 0.5), ("transformers", 0.0)}
    assert set(rows["teal", 0.5]["faster_than"]) == {"torch", "dense", "transformers"}
    assert {row["check"] for row in run.json["rows"]} == {"passed"}
    assert "tok/s" in teal(*DECODE, "--no-dump", "--no-transformers").out


def test_decode_of_a_stack_needs_no_model(teal: Teal, monkeypatch: pytest.MonkeyPatch) -> None:
    from teal_cli.bench import shapes

    tiny = shapes.ModelShape(64, 96, 4, 2, 16, "llama", 4, 320, 64, 1e4)
    monkeypatch.setitem(shapes.MODEL_SHAPES, "tiny", tiny)
    run = teal(*DECODE, "--stack", "tiny:1", "--stack", "tiny", "--dtype", "float32", "--json")
    assert run.code == 0, run.err
    assert {(row["model"], row["layers"]) for row in run.json["rows"]} == {("tiny:1", 1), ("tiny:4", 4)}
    assert sum(row["dump"] for row in run.json["rows"]) == 2


@pytest.mark.usefixtures("ready")
def test_decode_and_prefill_of_a_quantised_model(teal: Teal, tmp_path: Path) -> None:
    missing = teal(*DECODE, "--no-dump", "--weights", "int4", "--no-transformers")
    assert missing.code == 3
    assert "teal quantize tiny --to int4" in missing.err
    assert "not int3" in teal(*DECODE, "--weights", "int3").err
    assert teal("quantize", "tiny", "--to", "int4").code == 0
    alone = teal(*DECODE, "-m", "tiny-int4", "--no-dump", "--json")
    assert alone.code == 0, alone.err
    assert {row["weights"] for row in alone.json["rows"]} == {"int4"}
    options = ("--no-dump", "--no-transformers", "--with-quality", "--dataset", "python-docs", "--busy", 1)
    both = teal(*DECODE, *options, "--weights", "int4", "--json", "-o", tmp_path / "r.json")
    assert both.code == 0, both.err
    assert {row["model"] for row in both.json["rows"]} == {"tiny", "tiny-int4"}
    scored = {(row["weights"], row["sparsity"]): row["perplexity"] for row in both.json["rows"] if not row["busy"]}
    assert len({round(value, 3) for value in scored.values()}) == 4, "each level of each model by itself"
    assert {row["busy"] for row in both.json["rows"]} == {0, 1}
    prefill = teal("bench", "prefill", "--tokens", 12, "--rounds", 2, "--device", "cpu", "--weights", "int4", "--json")
    assert prefill.code == 0, prefill.err
    found = [(row["engine"], row["weights"], row["check"]) for row in prefill.json["rows"]]
    assert found == [("teal tiny", "float32", "passed"), ("teal tiny-int4", "int4", "passed"),
                     ("transformers", "float32", "passed")]  # fmt: skip
    shown = teal("bench", "prefill", "--tokens", 12, "--rounds", 2, "--device", "cpu", "--no-transformers").out
    assert "tok/s" in shown


LLAMA_CPP = '''
"""Stands in for the binding: decodes by our own model, which `answer` names."""
import os

def llama_supports_gpu_offload():
    return False

class Llama:
    def __init__(self, path, **options):
        assert os.path.isfile(path) and options["n_gpu_layers"] == 0 and options["n_threads"] >= 1

    def n_vocab(self):
        return int(os.environ["FAKE_VOCAB"])

    def generate(self, prompt, temp):
        assert temp == 0.0
        yield from map(int, os.environ["FAKE_TOKENS"].split())
'''


@pytest.mark.usefixtures("ready")
def test_llama_cpp(teal: Teal, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from teal_cli.bench.subjects import registered
    from teal_cli.decoding.decoder import Decoder
    from teal_cli.decoding.sampling import Sampling
    from teal_cli.runs.session import open_session

    session = open_session(backend="cpu")
    prompt = registered(session, (), 6).prompt
    decoder: Decoder = session.decoder(session.plan(0.0), session.cache(20))
    tokens = list(decoder.generate(prompt, max_new_tokens=4, sampling=Sampling(0.0, 0)))
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FAKE_VOCAB", "320")
    monkeypatch.setenv("FAKE_TOKENS", " ".join(map(str, tokens)))
    gguf = write_gguf(tiny("llama3"), tmp_path / "tiny.gguf")
    options = (*DECODE, "--no-dump", "--no-transformers", "--gguf", gguf, "--json")
    rows = {row["engine"]: row for row in teal(*options).json["rows"]}
    theirs = rows["llama.cpp tiny.gguf"]
    assert theirs["check"] == "passed"
    assert theirs["p50"] > 0
    assert theirs["bytes"] > 0
    assert "llama.cpp tiny.gguf" in rows["teal"]["faster_than"]
    monkeypatch.setenv("FAKE_TOKENS", " ".join(map(str, [(token + 100) % 320 for token in tokens])))
    run = teal(*options)
    assert run.code == 1
    assert next(row for row in run.json["rows"] if row["engine"].startswith("llama"))["p50"] is None
    monkeypatch.setenv("FAKE_VOCAB", "7")
    assert "same model" in teal(*options).error["hint"]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("kernels", "--shapes", "lama-2-7b"), 2, "did you mean llama-2-7b"),
        (("kernels", "--shapes", "96x64", "--dtype", "int8"), 2, "bfloat16, float16, float32"),
        (("kernels", "--shapes", "96x64", "-s", "1.5"), 2, "below 1"),
        (("kernels", "--shapes", "96x64", "-s", "0"), 2, "dense is measured always"),
        (("kernels", "--replay", "nowhere.zarr"), 3, "nowhere.zarr"),
        (("kernels", "--shapes", "96x64", "--output", "no/where.json"), 3, "no folder"),
        (("kernels", "--model", "nobody"), 3, "nobody"),
        (("kernels", "--shapes", "96x64", "--device", "cuda:99"), 5, "no device cuda:99"),
        (("decode", "--stack", "lama-2-7b:2"), 2, "did you mean llama-2-7b"),
        (("decode", "--stack", "llama-2-7b:none"), 2, "SHAPE:LAYERS"),
        (("decode",), 3, "teal download"),
        (("decode", "--gguf", "nowhere.gguf"), 5, "pip install"),
    ],
)
def test_bad_input(teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], code: int,
                   says: str) -> None:  # fmt: skip
    import importlib.util

    monkeypatch.chdir(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llama_cpp" else found(name, *rest)
    )
    run = teal("bench", *args)
    assert run.code == code, run.err
    assert says in " ".join(run.err.split())
    assert "hint:" in run.err
    assert "Traceback" not in run.err
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("command", [KERNELS, (*DECODE, "--no-transformers")], ids=["kernels", "decode"])
def test_ctrl_c_leaves_nothing_behind(
    teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...]
) -> None:
    """It comes while something is timed; with decode, while a temporary store is open."""
    from teal_cli.bench import engines, kernels

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(engines.tempfile, "tempdir", str(folder))
    monkeypatch.setattr(kernels, "interleave", interrupt)
    monkeypatch.setattr("teal_cli.store.writer.LevelWriter.add", interrupt)
    file = tmp_path / "r.json"
    run = teal(*command, "--output", file)
    assert run.code == 130, run.err
    assert "Traceback" not in run.err
    assert not file.exists()
    assert not list(tmp_path.glob(".r.json*"))
    assert not list(folder.iterdir())

"""Plans made, judged and kept: gradients against transformers' autograd, allocations, criteria, and the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_cli import Teal
from fixtures_tiny import VOCAB
from oracle import reference_model
from reference_model import MODULES, relative_rms

from teal_cli import open_store
from teal_cli.model.transformer import Transformer
from teal_cli.model.weights import Checkpoint
from teal_cli.passes.closed_loop import close_loop
from teal_cli.passes.fisher import LEVELS, FisherLosses
from teal_cli.passes.forward import Sparse, forward
from teal_cli.passes.gradients import draw, gradients, label_errors
from teal_cli.passes.judge import realised_bytes
from teal_cli.passes.layers import ResidentLayers, StreamedLayers
from teal_cli.registry.registry import Registry
from teal_cli.runs.plan_request import DEFAULT_TOKENS
from teal_cli.runs.plans import find_plan
from teal_cli.sparsity.criterion import Scoring
from teal_cli.sparsity.plan import Plan
from teal_kernels.spec import PROJECTION_INDEX, PROJECTION_SITE, PROJECTIONS, columns

CPU = torch.device("cpu")
SMALL = ("--tokens", 128, "--seq-len", 32, "--sparse-from", 4, "-d", "python-docs")


def transformers_gradients(path: Path, tokens: np.ndarray, seed: int) -> dict[tuple[int, str], tuple[Any, Any]]:
    """(x, g) of every projection by autograd through transformers' model, labels drawn as `gradients` says."""
    model, seen = reference_model(path), {}
    for index, layer in enumerate(model.model.layers):
        for projection, parent in MODULES.items():

            def hook(module: Any, inputs: Any, key: tuple[int, str] = (index, projection)) -> tuple[torch.Tensor]:
                read = inputs[0].view_as(inputs[0])
                read.retain_grad()
                seen[key] = read
                return (read,)

            getattr(getattr(layer, parent), f"{projection}_proj").register_forward_pre_hook(hook)
    embedded = model.model.embed_tokens(torch.from_numpy(tokens)[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits[0]
    stream = np.random.SeedSequence([seed, 0]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    generator = torch.Generator().manual_seed(int(stream))
    labels = draw(logits.detach().float().softmax(-1), generator)
    torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum").backward()
    return {key: (read.detach()[0], read.grad[0]) for key, read in seen.items()}


@pytest.mark.parametrize("streamed", [False, True])
def test_gradients_are_those_of_transformers(tiny_family: Path, streamed: bool) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCAB, 16)
    expected = transformers_gradients(tiny_family, tokens, seed=3)
    found: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def visit(layer: int, projection: str, sequence: int, x: torch.Tensor, g: torch.Tensor) -> None:
        found[layer, projection] = (x, g)

    resident = ResidentLayers(Transformer.from_checkpoint(tiny_family, torch.float32))
    layers = StreamedLayers(Checkpoint(tiny_family), torch.float32, CPU) if streamed else resident
    events = list(gradients(layers, [tokens], visit, label_errors(layers.config, 3)))
    assert events[-1].done == events[-1].total
    assert found.keys() == expected.keys()
    for key, (x, g) in expected.items():
        assert relative_rms(found[key][0], x) < 1e-4, key
        assert relative_rms(found[key][1], g) < 1e-3, key


def test_fisher_losses_are_the_sums_over_dropped_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(20, 12, generator=generator), torch.randn(20, 12, generator=generator)
    limits = np.tile(np.linspace(-1e-3, 3, len(LEVELS), dtype=np.float32), (1, len(PROJECTIONS), 1))
    collector = FisherLosses(limits, Scoring(), start=4)
    collector.visit(0, "o", 0, x, g)
    losses = collector.losses()[0, PROJECTIONS.index("o")]
    previous = 0.0
    for index, limit in enumerate(limits[0, 0]):
        errors = ((x * g) * (x.abs() <= float(limit)))[4:].sum(1).double().numpy() ** 2
        previous = max(previous, float(np.minimum(errors, np.quantile(errors, 0.95)).mean()))
        assert losses[index] == pytest.approx(previous, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_levels_by_the_bits_of_a_magnitude_are_those_of_a_search(dtype: torch.dtype) -> None:
    """Limits on the grid of magnitudes, between them, repeated, and one that drops nothing."""
    generator = torch.Generator().manual_seed(1)
    x, g = torch.randn(20, 12, generator=generator).to(dtype), torch.randn(20, 12, generator=generator)
    limits = np.sort(np.append(x.float().abs().flatten().numpy()[: len(LEVELS) - 3], [-1.0, 0.5003, 0.5003]))
    tables = np.tile(limits.astype(np.float32), (1, len(PROJECTIONS), 1))
    short, wide = FisherLosses(tables, Scoring(), start=0), FisherLosses(tables, Scoring(), start=0)
    short.visit(0, "o", 0, x, g)
    wide.visit(0, "o", 0, x.float(), g)
    assert np.array_equal(short.losses(), wide.losses())


def test_fisher_losses_of_a_fixed_count_are_those_of_the_smallest_entries() -> None:
    generator = torch.Generator().manual_seed(2)
    x, g = torch.randn(20, 12, generator=generator), torch.randn(20, 12, generator=generator)
    counts = np.tile(np.minimum(np.arange(len(LEVELS)), 11).astype(np.float32), (1, len(PROJECTIONS), 1))
    collector = FisherLosses(counts, Scoring("topk"), start=0)
    collector.visit(0, "o", 0, x, g)
    order = x.abs().argsort(1)
    products = (x * g).gather(1, order).cumsum(1).double().numpy() ** 2
    found, expected = collector.losses()[0, PROJECTIONS.index("o")], 0.0
    assert found[0] == 0
    for count in range(1, 12):
        errors = products[:, count - 1]
        expected = max(expected, float(np.minimum(errors, np.quantile(errors, 0.95)).mean()))
        assert found[count] == pytest.approx(expected, rel=1e-3)


def test_labels_are_drawn_by_their_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2]).repeat(20_000, 1)
    labels = draw(probabilities, torch.Generator().manual_seed(5))
    shares = torch.bincount(labels, minlength=4) / len(labels)
    torch.testing.assert_close(shares, probabilities[0], rtol=0, atol=0.01)
    assert shares[1] == 0


def test_greedy_goes_on_after_the_last_layer(ready: Path, teal: Teal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its third layer and started again, it searches that layer only and ends with the same plan."""
    from teal_cli.passes import greedy as module

    arguments = ("plan", "make", "-m", "tiny", "--allocation", "greedy", *SMALL)
    assert teal(*arguments, "--name", "whole").code == 0
    searched: list[int] = []
    search = module._Block.levels

    def levels(self: Any, weights: Any, targets: Any) -> Any:
        searched.append(self._index)
        if len(searched) == 3:
            raise KeyboardInterrupt
        return search(self, weights, targets)

    monkeypatch.setattr(module._Block, "levels", levels)
    assert teal(*arguments, "--name", "part").code == 130
    resumed = teal(*arguments, "--name", "part")
    assert resumed.code == 0, resumed.err
    assert searched == [0, 1, 2, 2]
    assert "went on after layer 1" in resumed.err
    whole, part = (find_plan(Registry().get("tiny"), name).plan.to_json() for name in ("whole", "part"))
    assert part == whole
    assert [file.name for file in (Registry().get("tiny").home / "plans").iterdir() if file.is_file()] == []


def test_one_search_finds_the_plan_of_every_target(ready: Path, teal: Teal) -> None:
    options = ("--allocation", "greedy", "--tokens", 64, *SMALL[2:], "--json")
    together = teal("plan", "make", "-m", "tiny", "-s", "0.3,0.55", *options)
    assert together.code == 0, together.err
    plans = together.json["plans"]
    assert [plan["name"] for plan in plans] == ["greedy-0.3", "greedy-0.55"]
    for plan in plans:
        alone = teal("plan", "make", "-m", "tiny", "-s", plan["sparsity"], "--name", "alone", "--force", *options).json
        assert alone["levels"] == plan["levels"]
        assert alone["thresholds"] == plan["thresholds"]
        assert alone["made"]["candidates"] == plan["made"]["candidates"]
    assert teal("plan", "make", "-m", "tiny", "-s", "0.3,0.55", "--name", "both").code == 2


def test_a_closed_loop_drops_what_it_says(tiny: Callable[[str], Path]) -> None:
    path = tiny("llama3")
    layers = ResidentLayers(Transformer.from_checkpoint(path, torch.float32))
    tokens = [np.random.default_rng(i).integers(0, VOCAB, 64) for i in range(3)]
    levels = np.random.default_rng(1).uniform(0.3, 0.9, (layers.config.layers, len(PROJECTIONS)))
    plan = Plan(0.6, "uniform", levels, np.zeros(levels.shape, np.float32), None)
    *_, thresholds = close_loop(layers, tokens, plan, 8)
    assert isinstance(thresholds, np.ndarray)
    kept = np.zeros(levels.shape, np.int64)
    closed = Plan(0.6, "uniform", levels, thresholds, None)
    for _ in forward(layers, tokens, [Sparse(closed, 8, kept)]):
        pass
    rows = 3 * (64 - 8)
    assert np.abs(1 - kept / (rows * np.array(layers.config.inputs())) - levels).max() < 0.02
    sizes = np.array(list(layers.config.projection_sizes().values()))
    assert realised_bytes(layers.config, kept, rows) == pytest.approx(
        (levels * sizes).sum() / (3 * sizes.sum()), abs=0.02
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--allocation", "uniform"),
        ("--allocation", "fisher"),
        ("--allocation", "greedy"),
        ("--allocation", "fisher", "--criterion", "wina"),
        ("--allocation", "uniform", "--criterion", "centred"),
        ("--allocation", "uniform", "--closed-loop"),
        ("--allocation", "fisher", "--criterion", "topk"),
        ("--allocation", "greedy", "--criterion", "topk"),
        ("--allocation", "learned"),
    ],
    ids=" ".join,
)
def test_every_kind_is_made_and_evaluated(ready: Path, teal: Teal, arguments: tuple[str, ...]) -> None:
    made = teal("plan", "make", "-m", "tiny", "-s", 0.5, "--name", "mine", *arguments, *SMALL, "--json")
    assert made.code == 0, made.err
    named = find_plan(Registry().get("tiny"), "mine")
    assert named.plan.thresholds.shape == named.plan.sparsity.shape == (3, 7)
    assert made.json["levels"]["q"] == named.plan.sparsity[:, 0].tolist()
    if candidates := made.json["made"].get("candidates"):
        best = min(candidates.values(), key=lambda found: found["kl"])
        assert made.json["made"]["kl_to_uniform"] <= 1.0
        assert best["realised"] == pytest.approx(0.5, abs=0.05)
    assert "fewer than" not in made.err
    found = teal("eval", "-m", "tiny", "--plan", "mine", "-d", "python-docs", "-n", 1, "--window", 96, "--json")
    assert found.code == 0, found.err
    (level,) = found.json["levels"]
    assert level["plan"] == "mine"
    assert 0.3 < level["realised"] < 0.75


def test_the_same_settings_make_the_same_plan(ready: Path, teal: Teal) -> None:
    arguments = ("plan", "make", "-m", "tiny", "-s", 0.5, *SMALL, "--json")
    first, second = (teal(*arguments, "--name", name) for name in ("a", "b"))
    assert first.json["thresholds"] == second.json["thresholds"]


def test_plans_are_listed_shown_and_removed(ready: Path, teal: Teal) -> None:
    assert teal("plan", "make", "-m", "tiny", "-s", 0.4, "--allocation", "uniform").code == 0
    (listed,) = teal("plan", "ls", "-m", "tiny", "--json").json["plans"]
    assert (listed["name"], listed["sparsity"]) == ("uniform-0.4", 0.4)
    shown = teal("plan", "show", "uniform-0.4", "-m", "tiny")
    assert "40%" in shown.out
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    again = teal("plan", "make", "-m", "tiny", "-s", 0.4, "--allocation", "uniform")
    assert (again.code, "replace it with --force" in again.err) == (2, True)
    assert teal("plan", "make", "-m", "tiny", "-s", 0.4, "--allocation", "uniform", "--force").code == 0
    wrong = teal("plan", "rm", "uniform-0.5", "-m", "tiny")
    assert (wrong.code, "did you mean uniform-0.4?" in wrong.err) == (3, True)
    assert teal("plan", "rm", "uniform-0.4", "-m", "tiny").code == 0
    assert teal("plan", "ls", "-m", "tiny", "--json").json["plans"] == []


def test_a_damaged_plan_is_told_and_hides_no_other(ready: Path, teal: Teal) -> None:
    for name in ("good", "bad"):
        assert teal("plan", "make", "-m", "tiny", "--allocation", "uniform", "--name", name).code == 0
    arrays = Registry().get("tiny").home / "plans" / "bad" / "scoring.npz"
    arrays.write_bytes(arrays.read_bytes() + b"x")
    listed = teal("plan", "ls", "-m", "tiny")
    assert listed.code == 0
    assert "good" in listed.out
    assert "bad is damaged" in listed.err
    assert teal("eval", "-m", "tiny", "--plan", "bad", "-d", "python-docs").code == 1


@pytest.mark.parametrize(
    ("extra", "code", "said"),
    [
        (("-s", 0), 2, "drops nothing"),
        (("-s", 1), 2, "outside [0, 1)"),
        (("--name", "../x"), 2, "cannot be the name of a plan"),
        (("--allocation", "fisher", "--seq-len", 32, "--sparse-from", 64), 2, "have no row after 64"),
        (("--allocation", "fisher", "--tokens", 100_000_000), 2, "has only"),
        (("--criterion", "topk", "--closed-loop"), 2, "there is no loop to close"),
        (("--allocation", "learned", "--criterion", "wina"), 2, "learned thresholds are of magnitudes"),
        (("--allocation", "learned", "--closed-loop"), 2, "learned thresholds are of magnitudes"),
        (("-c", "none"), 3, "no calibration called 'none'"),
    ],
)
def test_bad_input(ready: Path, teal: Teal, extra: tuple[object, ...], code: int, said: str) -> None:
    ran = teal("plan", "make", "-m", "tiny", *extra)
    assert ran.code == code, ran.err
    assert said in ran.err


def test_a_text_that_is_too_short_says_how_many_tokens_fit(ready: Path, teal: Teal, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of a text" for number in range(300)), encoding="utf-8")
    make = ("plan", "make", "-m", "tiny", "--allocation", "fisher", "-d", text, "--seq-len", 96)
    ran = teal(*make, "--tokens", 1_000_000)
    assert ran.code == 2
    fits = int(" ".join(ran.err.split()).split("the most that fits is --tokens ")[1].split()[0])
    assert teal(*make, "--tokens", fits + 96).code == 2
    assert teal(*make, "--tokens", fits).code == 0
    text.write_text("a line", encoding="utf-8")
    ran = teal(*make, "--force")
    assert (ran.code, "lower --seq-len, or name more text" in " ".join(ran.err.split())) == (2, True)


def test_a_plan_of_another_model_is_refused(ready: Path, teal: Teal, tiny: Callable[[str], Path]) -> None:
    assert teal("plan", "make", "-m", "tiny", "--allocation", "uniform", "--name", "mine").code == 0
    assert teal("download", tiny("qwen3"), "--name", "other").code == 0
    folder = Registry().get("tiny").home / "plans" / "mine"
    ran = teal("eval", "-m", "other", "--plan", folder, "-d", "python-docs")
    assert (ran.code, "was made for tiny, not for other" in ran.err) == (2, True)


def test_import_of_teals_lookup(ready: Path, teal: Teal, tmp_path: Path) -> None:
    header = "Effective Sparsity,Activation Error,Baseline Error,q,k,v,o,gate,up,down\n"
    sizes = np.array(list(Checkpoint(Registry().get("tiny").path).config.projection_sizes().values()), float)
    shares = sizes / sizes.sum()
    told = shares.copy()
    told[0] *= 2  # a table of shares that is wrong about q
    for layer in range(3):
        (tmp_path / "lookup" / f"layer-{layer}").mkdir(parents=True)
        rows, levels = [], np.zeros(7)
        for step in range(7 * 18):
            levels[step % 7] += 0.05
            rows.append(",".join(map(str, (float(levels @ told), 0.0, 0.0, *levels))))
        (tmp_path / "lookup" / f"layer-{layer}" / "results.csv").write_text(header + "\n".join(rows))
    ran = teal("plan", "import", tmp_path, "-m", "tiny", "-s", 0.5, "--json")
    assert ran.code == 0, ran.err
    assert f"TEAL's table gives q {told[0]:.1%} of a block, and in this model it has {shares[0]:.1%}" in ran.err
    levels = np.array([ran.json["levels"][name] for name in PROJECTIONS]).T
    assert ((levels @ shares >= 0.5 - 1e-9) & (levels @ shares < 0.56)).all()
    (tmp_path / "lookup" / "layer-1" / "results.csv").write_text("nonsense\nmore\n")
    assert "is not one of TEAL's results.csv" in teal("plan", "import", tmp_path, "-m", "tiny", "--name", "x").err


def test_generate_and_dump_take_a_plan(ready: Path, teal: Teal, tmp_path: Path) -> None:
    """The masks of a dump are the plan's; resumed and repeated, it is the same plan."""
    made = teal("plan", "make", "-m", "tiny", "-s", 0.5, "--name", "mine", "--criterion", "wina", *SMALL)
    assert made.code == 0, made.err
    ran = teal("generate", "-m", "tiny", "--plan", "mine", "-p", "one two", "--max-new-tokens", 6, "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["plan"], ran.json["sparsity"]["target"]) == ("mine", 0.5)
    path = tmp_path / "store.zarr"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two three\nfour five six\n")
    arguments = (
        "dump",
        "-m",
        "tiny",
        "--prompts",
        prompts,
        "--max-new-tokens",
        8,
        "--ignore-eos",
        "--dtype",
        "float32",
    )
    ran = teal(*arguments, "--plan", "mine", "-o", path)
    assert ran.code == 0, ran.err
    assert teal("store", "verify", path).code == 0
    store = open_store(path)
    assert (store.header.plan, store.header.criterion["name"]) == ("mine", "wina")
    plan = find_plan(Registry().get("tiny"), "mine").plan
    level = store.level(0.5)
    for projection, column in PROJECTION_INDEX.items():
        site = PROJECTION_SITE[projection]
        place = column - columns(site).start
        for layer in range(plan.layers):
            limits = plan.applied().site(layer, site)[place]
            rows = np.asarray(level.projection(layer, projection)[:])
            assert (np.abs(rows[rows != 0]) > np.broadcast_to(limits, rows.shape)[rows != 0]).all()
    assert teal("dump", "--resume", "-o", path).code == 0
    tried = teal(*arguments, "--plan", "mine", "-o", tmp_path / "other.zarr", "--dry-run", "--json")
    assert (tried.json["levels"], tried.json["plans"]) == ([0.5], ["mine"])
    again = teal("dump", "--like", path, "-o", tmp_path / "again.zarr")
    assert again.code == 0, again.err
    assert open_store(tmp_path / "again.zarr").header.plan == "mine"
    both = teal(*arguments, "--plan", "mine", "-s", "0.5", "-o", tmp_path / "both.zarr")
    assert (both.code, "a plan says its own sparsity" in both.err) == (2, True)


def test_a_plan_that_cannot_be_written_leaves_the_old_one(
    ready: Path, teal: Teal, monkeypatch: pytest.MonkeyPatch
) -> None:
    from teal_cli.sparsity import named as module

    arguments = ("plan", "make", "-m", "tiny", "--allocation", "uniform", "--name", "mine")
    assert teal(*arguments, "-s", 0.4).code == 0

    def refused(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_json", refused)
        assert teal(*arguments, "-s", 0.6, "--force").code == 1
    assert [plan["sparsity"] for plan in teal("plan", "ls", "-m", "tiny", "--json").json["plans"]] == [0.4]


def test_help_says_how_many_tokens_are_usual(teal: Teal) -> None:
    shown = " ".join(teal("plan", "make", "--help").out.replace("│", " ").split())
    learned = DEFAULT_TOKENS["learned"]
    assert {count for name, count in DEFAULT_TOKENS.items() if name != "learned"} == {4096}
    assert f"[default: 4096; learned: {learned}; x>=2]" in shown

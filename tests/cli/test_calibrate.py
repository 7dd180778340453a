"""`teal calibrate` as it is typed, on a tiny model."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures_cli import Teal
from fixtures_tiny import make_tiny
from reference_teal import expected, write_layer

from teal_cli.passes.forward import Advance
from teal_cli.passes.observe import observe
from teal_cli.registry.registry import Registry
from teal_cli.runs import calibrate as library
from teal_cli.sparsity.calibration import Calibration
from teal_cli.sparsity.plan import uniform_plan

SMALL = ("--num-sequences", 3, "--seq-len", 64)


@pytest.fixture
def model(teal: Teal, tiny: Callable[[str], Path]) -> str:
    """A tiny model in this test's registry."""
    assert teal("download", tiny("llama3"), "--name", "tiny").code == 0
    return "tiny"


def made(home: Path) -> list[str]:
    """What lies in the calibrations folder, hidden things included."""
    folder = home / "models" / "tiny" / "calibrations"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_calibrating_on_the_text_that_python_carries(teal: Teal, teal_home: Path, model: str) -> None:
    done = teal("calibrate", "-d", "python-docs", *SMALL, "--json")
    assert done.code == 0, done.err
    answer = done.json
    assert answer["id"].startswith("python-docs-192-fp32-")
    assert (answer["dataset"], answer["split"], answer["tokens"]) == ("python-docs", "train", 3 * 64)
    assert (answer["dtype"], answer["device"], answer["reused"]) == ("float32", "cpu", False)
    assert len(answer["fingerprint"]) == len(answer["config_sha256"]) == 64
    assert set(answer["versions"]) == {"python", "teal", "torch", "transformers", "datasets"}
    assert answer["seconds"] > 0
    assert answer["peak_memory_bytes"] > answer["computed_peak_bytes"] > 0
    means = answer["mean_thresholds"]
    assert means["0.25"]["mlp_mid"] < means["0.50"]["mlp_mid"] < means["0.90"]["mlp_mid"]
    assert made(teal_home) == [answer["id"]]
    found = Calibration.load(Registry().find_calibration(model))
    assert (found.id, found.layers, found.rule) == (answer["id"], 3, "magnitude")


def test_for_people(teal: Teal, model: str) -> None:
    done = teal("calibrate", "-m", model, "-d", "python-docs", *SMALL)
    assert done.code == 0, done.err
    for part in ("attn_in", "mlp_mid", "192 tokens of python-docs", "is ready", "teal generate -m tiny"):
        assert part in done.out
    assert "Calibrating on python-docs" in done.err
    done = teal("calibrations", "check", "python-docs", "-m", model, *SMALL)
    assert done.code == 0, done.err
    for part in ("python-docs (test)", "25%", "90%", "points"):
        assert part in done.out
    assert "Checking on python-docs" in done.err


def test_the_same_again_is_not_made_twice(teal: Teal, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = teal("calibrate", "-d", "python-docs", *SMALL, "--json").json
    monkeypatch.setattr(library, "observe", lambda *_: pytest.fail("it ran again"))
    again = teal("calibrate", "-d", "python-docs", *SMALL, "--json").json
    assert again == first | {"reused": True}


def test_force_makes_it_again(teal: Teal, teal_home: Path, model: str) -> None:
    first = teal("calibrate", "-d", "python-docs", *SMALL, "--json").json
    again = teal("calibrate", "-d", "python-docs", *SMALL, "--force", "--json").json
    assert (again["id"], again["reused"]) == (first["id"], False)
    assert made(teal_home) == [first["id"]]


def test_another_dtype_is_another_calibration(teal: Teal, teal_home: Path, model: str) -> None:
    ids = {
        teal("calibrate", "-d", "python-docs", *SMALL, "--dtype", dtype, "--json").json["id"]
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert made(teal_home) == sorted(ids)
    assert len(ids) == 3


def test_a_name_that_another_one_has(teal: Teal, teal_home: Path, model: str) -> None:
    assert teal("calibrate", "-d", "python-docs", *SMALL, "--name", "mine").code == 0
    assert teal("calibrate", "-d", "python-docs", *SMALL, "--name", "mine").code == 0
    other = teal("calibrate", "-d", "python-docs", "--split", "test", *SMALL, "--name", "mine", "--json")
    assert other.code == 2
    assert other.error["message"] == "there is another calibration called mine, of python-docs"
    assert "--force" in other.error["hint"]
    forced = teal("calibrate", "-d", "python-docs", "--split", "test", *SMALL, "--name", "mine", "--force", "--json")
    assert (forced.json["split"], made(teal_home)) == ("test", ["mine"])


def test_checking_one_that_is_there(teal: Teal, teal_home: Path, model: str, tmp_path: Path) -> None:
    teal("calibrate", "-d", "python-docs", *SMALL, "--name", "mine")
    (tmp_path / "other.txt").write_text("Sparse activations let half of the columns rest. " * 40)
    done = teal("calibrations", "check", tmp_path / "other.txt", "-c", "mine", *SMALL, "--json")
    assert done.code == 0, done.err
    check = done.json
    assert set(check) == {"model", "calibration", "dataset", "split", "fingerprint", "tokens", "levels"}
    assert (check["calibration"], check["split"]) == ("mine", None)
    assert [level["target"] for level in check["levels"]] == [0.25, 0.4, 0.5, 0.65, 0.9]
    for level in check["levels"]:
        assert abs(level["mean"] - level["target"]) < 0.2
        assert len(level["pairs"]) == 3 * 4
        assert {"layer", "site", "target", "sparsity"} == set(level["pairs"][0])
    assert made(teal_home) == ["mine"]


def test_a_check_on_the_very_text_is_exact_and_says_so(teal: Teal, model: str) -> None:
    teal("calibrate", "-d", "python-docs", *SMALL, "--dtype", "bfloat16", "--name", "mine")
    done = teal("calibrations", "check", "python-docs", "-c", "mine", "--split", "train", *SMALL)
    assert "is the very text that mine was made from" in done.err
    check = teal("calibrations", "check", "python-docs", "-c", "mine", "--split", "train", *SMALL, "--json").json
    for level in check["levels"]:
        assert level["target"] <= level["mean"] < level["target"] + 0.01


class TestImport:
    @pytest.fixture
    def teals(self, teal: Teal, tmp_path: Path) -> Path:
        """TEAL's histograms of one layer, and a model of one layer with vectors of the same proportions."""
        make_tiny(tmp_path / "model", "llama3", num_hidden_layers=1, hidden_size=72, intermediate_size=252)
        assert teal("download", tmp_path / "model", "--name", "tiny").code == 0
        write_layer(tmp_path / "histograms" / "layer-0")
        return tmp_path / "histograms"

    def test_thresholds_are_teals(self, teal: Teal, teal_home: Path, teals: Path) -> None:
        done = teal("calibrations", "import", teals, "-m", "tiny", "--json")
        assert done.code == 0, done.err
        assert (done.json["rule"], done.json["dtype"], done.json["layers"]) == ("teal", None, 1)
        found = Calibration.load(Registry().find_calibration("tiny"))
        for site, sparsity, threshold in expected():
            assert uniform_plan(found, sparsity).site_threshold(0, site) == pytest.approx(threshold, rel=1e-5)

    def test_both_rules_beside_each_other(self, teal: Teal, teal_home: Path, teals: Path) -> None:
        first = teal("calibrations", "import", teals, "--json").json
        second = teal("calibrations", "import", teals, "--rule", "abs", "--json").json
        assert teal("calibrations", "import", teals, "--json").json == first | {"reused": True}
        assert sorted((first["id"], second["id"])) == made(teal_home)
        assert second["id"].startswith("teal-abs-")
        half = [answer["mean_thresholds"]["0.50"]["mlp_in"] for answer in (first, second)]
        assert half[0] != half[1]
        assert half[0] == pytest.approx(half[1], rel=0.05)

    def test_checking_it(self, teal: Teal, teals: Path) -> None:
        made = teal("calibrations", "import", teals, "--json").json
        done = teal("calibrations", "check", "python-docs", *SMALL, "--json")
        assert done.code == 0, done.err
        assert done.json["calibration"] == made["id"]

    def test_another_number_of_layers(self, teal: Teal, teal_home: Path, teals: Path) -> None:
        shutil.copytree(teals / "layer-0", teals / "layer-1")
        done = teal("calibrations", "import", teals, "--json")
        assert (done.code, "has 2 layers, but tiny has 1" in done.error["message"]) == (2, True)
        assert made(teal_home) == []

    def test_vectors_of_other_widths(self, teal: Teal, teal_home: Path, teals: Path, tmp_path: Path) -> None:
        make_tiny(tmp_path / "other", "llama3", num_hidden_layers=1)
        teal("download", tmp_path / "other", "--name", "other")
        done = teal("calibrations", "import", teals, "-m", "other", "--json")
        assert (done.code, "other widths" in done.error["message"]) == (1, True)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("-d", "wikitxt"), 3, "no dataset 'wikitxt'"),
        (("-d", "nowhere.txt"), 3, "no file nowhere.txt"),
        (("-d", "python-docs", "--split", "dev"), 3, "no split 'dev'"),
        (("-d", "python-docs", "-n", 100_000, "--seq-len", 64), 2, "has only"),
        (("-d", "python-docs", "--seq-len", 257), 2, "context of 256"),
        (("-d", "python-docs", "--name", "../mine"), 2, "cannot be the name"),
        (("-m", "tyny", "-d", "python-docs"), 3, "tyny"),
    ],
)
def test_bad_input(
    teal: Teal, teal_home: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    args: tuple[Any, ...], code: int, says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done = teal("calibrate", *args, "--json")
    assert done.code == code, done.err
    assert says in f"{done.error['message']} {done.error['hint']}"
    assert done.out == ""
    assert made(teal_home) == []


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("import", "nowhere"), 3, "no folder"),
        (("import",), 2, "DIR"),
        (("check",), 2, "DATASET"),
        (("check", "python-docs", "-c", "mine"), 3, "mine"),
        (("check", "wikitxt"), 3, "no calibration yet"),
        (("info",), 3, "no calibration yet"),
        (("rm", "mine"), 3, "mine"),
        (("default", "mine"), 3, "mine"),
    ],
)
def test_bad_input_of_the_group(
    teal: Teal, teal_home: Path, model: str, args: tuple[Any, ...], code: int, says: str
) -> None:
    done = teal("calibrations", *args, "--json")
    assert done.code == code, done.err
    assert says in f"{done.error['message']} {done.error['hint']}"
    assert (done.out, made(teal_home)) == ("", [])


class TestDefault:
    """What is used where no calibration is named."""

    @pytest.fixture
    def two(self, teal: Teal, model: str) -> str:
        for name, split in (("first", "train"), ("second", "test")):
            assert teal("calibrate", "-d", "python-docs", "--split", split, *SMALL, "--name", name).code == 0
        return model

    def used(self, teal: Teal) -> tuple[str, str]:
        run = teal("generate", "-p", "The", "--max-new-tokens", 3)
        assert run.code == 0, run.err
        shown = " ".join(run.err.split())
        return teal("generate", "-p", "The", "--max-new-tokens", 3, "--json").json["calibration"], shown

    def test_it_is_the_first_until_another_is_chosen(self, teal: Teal, two: str) -> None:
        calibration, shown = self.used(teal)
        assert calibration == "first"
        assert "second is newer: `teal calibrations default second -m tiny`" in shown
        assert "calibration first of tiny" in shown
        assert teal("calibrations", "default", "second").out == "second\n"
        calibration, shown = self.used(teal)
        assert (calibration, "newer" in shown) == ("second", False)
        assert teal("calibrations", "default", "first").code == 0
        assert self.used(teal)[0] == "first"

    def test_a_prefix_says_what_it_matched(self, teal: Teal, two: str) -> None:
        run = teal("generate", "-p", "The", "--max-new-tokens", 3, "-c", "sec")
        assert "calibration second, which 'sec' stands for" in " ".join(run.err.split())

    def test_a_registry_without_a_record_takes_the_newest_and_keeps_it(
        self, teal: Teal, teal_home: Path, two: str
    ) -> None:
        (teal_home / "models" / "tiny" / "default_calibration.json").unlink()
        assert teal("calibrations", "default", "--json").json["default"] == "second"
        assert teal("calibrate", "-d", "python-docs", *SMALL, "--dtype", "bfloat16", "--name", "third").code == 0
        assert teal("calibrations", "default", "--json").json["default"] == "second"

    def test_listed_inspected_and_removed(self, teal: Teal, two: str) -> None:
        listed = teal("calibrations", "ls", "--json").json
        assert [(c["id"], c["default"]) for c in listed["calibrations"]] == [("first", True), ("second", False)]
        assert "first (default)" in teal("calibrations", "ls").out
        info = teal("calibrations", "info", "--json").json
        assert (info["id"], info["default"], info["tokens"]) == ("first", True, 192)
        assert "attn_in" in teal("calibrations", "info", "sec").out
        removed = teal("calibrations", "rm", "first")
        assert (removed.out, "is now second" in removed.err) == ("removed first\n", True)
        assert teal("calibrations", "ls", "--json").json["default"] == "second"
        assert self.used(teal)[0] == "second"

    def test_two_compared(self, teal: Teal, two: str) -> None:
        found = teal("calibrations", "compare", "first", "second", "--json").json
        a, b = (Calibration.load(Registry().find_calibration("tiny", name)) for name in ("first", "second"))
        assert len(found["thresholds"]) == 4 * 4
        for row in found["thresholds"]:
            ratios = [
                b.threshold(layer, row["site"], row["sparsity"]) / a.threshold(layer, row["site"], row["sparsity"])
                for layer in range(3)
            ]
            assert row["ratio"] == pytest.approx(sorted(ratios)[1])
            assert row["furthest"] == pytest.approx(max(abs(ratio - 1) for ratio in ratios))
        assert "second/first" in teal("calibrations", "compare", "first", "second").out
        same = teal("calibrations", "compare", "first", "first", "--json").json["thresholds"]
        assert {(row["ratio"], row["furthest"]) for row in same} == {(1.0, 0.0)}


def test_a_calibration_of_another_model(teal: Teal, teal_home: Path, model: str, tiny: Callable[[str], Path]) -> None:
    teal("calibrate", "-m", model, "-d", "python-docs", *SMALL, "--name", "mine")
    teal("download", tiny("qwen3"), "--name", "other")
    folder = Registry().find_calibration(model, "mine")
    done = teal("calibrations", "check", "python-docs", "-m", "other", "-c", folder, *SMALL, "--json")
    assert (done.code, "made for another model: tiny" in done.error["message"]) == (2, True)


def test_an_interruption_leaves_nothing_behind(
    teal: Teal, teal_home: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Iterator[Advance]:
        for event in observe(*args):
            assert isinstance(event, Advance)
            yield event
            raise KeyboardInterrupt

    monkeypatch.setattr(library, "observe", interrupted)
    done = teal("calibrate", "-d", "python-docs", *SMALL)
    assert (done.code, done.out) == (130, "")
    assert made(teal_home) == []


# A child of a background job inherits an ignored SIGINT; a shell's foreground job does not.
_AS_IN_A_SHELL = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from teal_cli.app import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_ends_it_in_a_moment(teal: Teal, teal_home: Path, model: str) -> None:
    """A real SIGINT to a real process, amid a calibration that would take minutes."""
    process = subprocess.Popen(
        [sys.executable, "-c", _AS_IN_A_SHELL, "calibrate", "-d", "python-docs", "-n", "1000", "--seq-len", "250"],
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert "Calibrating" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert made(teal_home) == []

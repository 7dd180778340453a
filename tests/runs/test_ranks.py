"""A dump by several ranks: the rows of one rank, whoever is killed and whenever, read as one store."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import fixtures_ranks
import numpy as np
import pytest
from fixtures_cli import Teal
from fixtures_ranks import ROWS, SEQUENCES, alone, together
from fixtures_store import LAYERS, TARGETS, digest, levels

from teal_cli import open_store
from teal_cli.errors import TealError, UsageError
from teal_cli.runs.board import open_board
from teal_cli.store import layout
from teal_cli.store.export import convert
from teal_cli.store.merge import merge
from teal_cli.store.reader import describe
from teal_cli.store.selection import select
from teal_cli.store.stats import measure
from teal_cli.store.verify import Problem, verify
from teal_cli.store.writer import StoreWriter
from teal_kernels.spec import SITES

# Threads that end together undo each other's warnings.catch_warnings.
pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "out.zarr"
    alone(path)
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts") / "out.zarr"
    assert together(path, 3) == [None] * 3
    return path


def problems(path: Path, **options: bool) -> list[str]:
    return [str(event) for event in verify(path, **options) if isinstance(event, Problem)]


def assert_same_rows(found: Path, expected: Path) -> None:
    ours, theirs = open_store(found), open_store(expected)
    assert ours.levels == theirs.levels
    for target in TARGETS:
        a, b = ours.level(target), theirs.level(target)
        for name in ("token_id", "position", "sequence", "phase"):
            np.testing.assert_array_equal(a.tokens[name], b.tokens[name])
        for site in SITES:
            for layer in range(LAYERS):
                np.testing.assert_array_equal(np.asarray(a.site(layer, site)), np.asarray(b.site(layer, site)))
                np.testing.assert_array_equal(a.site(layer, site).row_nnz, b.site(layer, site).row_nnz)


def test_several_ranks_give_the_rows_of_one(single: Path, parts: Path) -> None:
    assert_same_rows(parts, single)
    assert problems(parts) == []
    opened = open_store(parts)
    assert opened.complete
    assert opened.level(0.5).complete
    assert sum(len(part.level(0.5)) for part in opened.parts) == ROWS


def test_a_collection_reads_like_a_store(single: Path, parts: Path, tmp_path: Path) -> None:
    ours, theirs = open_store(parts), open_store(single)
    a, b = ours.level(0.9), theirs.level(0.9)
    assert a.rows(5) == b.rows(5)
    np.testing.assert_array_equal(a.projection(1, "k")[20:61:3], b.projection(1, "k")[20:61:3])
    np.testing.assert_array_equal(
        a.site(2, "mlp_mid").csr(slice(9, 77)).data, b.site(2, "mlp_mid").csr(slice(9, 77)).data
    )
    np.testing.assert_array_equal(a.realised(), b.realised())
    rows = [[row.values() for event in measure(store, store.levels) for row in event.rows] for store in (ours, theirs)]
    assert rows[0] == rows[1]
    for name, store in (("ours", ours), ("theirs", theirs)):
        for _ in convert(store, tmp_path / name, "npz", select(store, names=("q", "mlp_mid"))):
            pass
    for file in (tmp_path / "theirs").rglob("*.npz"):
        with np.load(file) as x, np.load(tmp_path / "ours" / file.relative_to(tmp_path / "theirs")) as y:
            assert all((x[key] == y[key]).all() for key in x.files)
    xarray = pytest.importorskip("xarray")
    data = [xarray.open_dataset(path, engine="teal", level=0.5) for path in (parts, single)]
    np.testing.assert_array_equal(data[0].down.values, data[1].down.values)


def test_describing_a_collection(teal: Teal, parts: Path) -> None:
    shown = teal("store", "info", parts, "--prompt", "prompt 3")
    assert shown.code == 0
    for text in ("part-00000, part-00001, part-00002", "teal-collection/1", "sequence 3: tokens s0.50 21:28"):
        assert text in shown.out
    assert describe(open_store(parts)).levels[0].sequences == SEQUENCES
    assert teal("store", "verify", parts).code == 0


def test_a_merged_collection_is_the_store_of_one_rank(teal: Teal, single: Path, parts: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged.zarr"
    found = teal("store", "merge", parts, "-o", merged, "--json")
    assert found.code == 0, found.err
    assert found.json["digest"] == open_store(single).state.digest
    assert digest(merged) == digest(single)
    assert teal("store", "merge", parts, "-o", merged).code == 2
    assert teal("store", "merge", single, "-o", tmp_path / "x.zarr").code == 2
    assert teal("store", "merge", parts, "-o", parts / "x.zarr").code == 2


def test_an_interrupted_merge_goes_on(single: Path, parts: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged.zarr"
    for event in merge(open_store(parts), target):
        if event.done > ROWS:
            break
    assert not open_store(target).complete
    for _ in merge(open_store(parts), target, resume=True):
        pass
    assert digest(target) == digest(single)


@pytest.mark.parametrize("seed", range(6))
def test_ranks_that_fail_are_resumed_by_any_number(tmp_path: Path, single: Path, seed: int) -> None:
    """Each time a rank fails at a random row; then more, fewer or as many ranks go on."""
    moments, path = random.Random(seed), tmp_path / "out.zarr"
    for attempt, size in enumerate((2, moments.choice((1, 2, 3)), moments.choice((1, 2, 4)))):
        dying, left = moments.randrange(size), moments.randrange(2 * ROWS // size)

        def before(rank: int, sequence: int, dying: int = dying) -> None:
            nonlocal left
            if rank == dying:
                left -= 1
                if left < 0:
                    raise ValueError("killed")

        raised = together(path, size, resume=attempt > 0 and path.exists(), before=before)
        assert all(error is None or "killed" in str(error) for error in raised)
        assert problems(path, allow_incomplete=True) == []
    assert together(path, 2, resume=True) == [None, None]
    assert problems(path) == []
    assert_same_rows(path, single)


@pytest.mark.slow
@pytest.mark.parametrize("die", [20, 70])
def test_torchrun_restarts_a_rank_that_was_killed(tmp_path: Path, single: Path, die: int) -> None:
    path = tmp_path / "out.zarr"
    launched = ["torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--standalone"]
    command = [sys.executable, "-m", *launched, fixtures_ranks.__file__, str(path), "--die", str(die)]
    ran = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, ran.stderr
    assert "exitcode: -9" in ran.stderr
    assert problems(path) == []
    assert_same_rows(path, single)


@pytest.mark.slow
@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("follow", ["free", "dense"])
def test_a_dump_by_two_ranks_has_the_digest_of_one(
    teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follow: str
) -> None:
    both, one, merged = (tmp_path / name for name in ("both.zarr", "one.zarr", "merged.zarr"))
    options = ["dump", "-s", "0.5,0.9", "-d", "python-docs", "-n", "3", "--prompt-tokens", "8", "--max-new-tokens", "9",
               "--backend", "reference", "--follow", follow]  # fmt: skip
    launched = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "teal_cli"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # another number of threads may add in another order
    for command, path, ranks in ((launched, both, 2), (["-m", "teal_cli"], one, 1)):
        command = [sys.executable, *command, *options, "-o", str(path), "--json"]
        ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert ran.returncode == 0, ran.stderr
        said = json.loads(ran.stdout)
        assert (said["prompts"], said["ranks"]) == (3, ranks)  # one rank talks
    assert problems(both) == []
    assert teal("store", "merge", both, "-o", merged, "--json").json["digest"] == open_store(one).state.digest
    with monkeypatch.context() as patch:
        patch.setattr("teal_cli.commands.dump.load", lambda *_, **__: pytest.fail("it was loaded"))
        resumed = teal("dump", "--resume", "-o", both, "--json")
        assert (resumed.code, resumed.json["new_rows"]) == (0, 0)
    shutil.rmtree(both / "part-00001")
    resumed = teal("dump", "--resume", "-o", both, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["new_rows"] > 0
    assert teal("store", "merge", both, "-o", merged, "-f", "--json").json["digest"] == open_store(one).state.digest


def test_what_is_wrong_with_a_collection_is_named(teal: Teal, parts: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    shutil.copytree(parts, path)
    (path / "part-00001").rename(tmp_path / "away")
    for command in ("info", "verify", "stats"):
        ran = teal("store", command, path)
        assert (ran.code, "part-00001 of the collection" in ran.err, "is missing" in ran.err) == (1, True, True)
        assert "`teal dump --resume` writes its rows again" in " ".join(ran.err.split())
    ran = teal("store", "copy", path, "-o", tmp_path / "copy.zarr")
    assert (ran.code, "part-00001 of the collection" in ran.err, "is missing" in ran.err) == (1, True, True)
    shutil.copytree(path / "part-00000", path / "part-00001")
    assert any("both have sequence" in problem for problem in problems(path))
    with pytest.raises(TealError, match="part-00000 and part-00001 both have sequence"):
        open_store(path).level(0.5)
    layout.set_attributes(path, "part-00001", {"seed": 9})
    with pytest.raises(TealError, match=r"part-00001 of the collection .* what differs: seed"):
        open_store(path)
    ran = teal("store", "copy", path, "-o", tmp_path / "copy.zarr")
    assert (ran.code, "what differs: seed" in ran.err) == (1, True)
    assert not [entry for entry in tmp_path.iterdir() if "copy" in entry.name]


def test_a_lost_sequence_and_a_changed_root_are_found(parts: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    shutil.copytree(parts, path)
    layout.set_attributes(path, "", {"seed": 0, "teal_version": "9"})
    assert any("the digest is" in problem for problem in problems(path))
    layout.set_attributes(path, "", {"parts": ["part-00000", "part-00002"]})
    assert any("no part has sequence" in problem for problem in problems(path))


def test_a_collection_is_not_written_as_one_store(teal: Teal, parts: Path, single: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a collection"):
        StoreWriter.resume(parts, open_store(single).header, levels(ROWS))
    raised = together(single, 2, resume=True)
    assert any("one store, not a collection" in str(error) for error in raised)
    ran = teal("dump", "--resume", "-o", parts / "part-00000")
    assert (ran.code, "is a part of a collection" in ran.err) == (2, True)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"])
def test_torchrun_without_rendezvous(teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    ran = teal("dump", "-s", "0.5", "-d", "python-docs", "-o", tmp_path / "out.zarr")
    assert (ran.code, f"{missing} is not set" in " ".join(ran.err.split())) == (2, True), ran.err
    assert not (tmp_path / "out.zarr").exists()


def test_a_process_alone_has_a_board_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    board = open_board()
    assert (board.rank, board.size, board.add("n", 2), board.add("n", 1)) == (0, 1, 2, 3)
    board.put("text", json.dumps([1]))
    assert board.get("text") == "[1]"

"""Results as files and as pictures."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures_bench import DECODES, KERNELS

from teal_cli.bench.machine import describe
from teal_cli.bench.results import Result, load, save
from teal_cli.bench.rows import Row
from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.files import check_new_file
from teal_cli.plots.bench import draw

PNG = b"\x89PNG\r\n"


def result(rows: list[Row]) -> Result:
    return Result("kernels", describe(torch.device("cpu")), {"rounds": 3}, rows)


@pytest.mark.parametrize("rows", [KERNELS, DECODES])
def test_what_is_written_reads_back(tmp_path: Path, rows: list[Row]) -> None:
    file = tmp_path / "r.json"
    save(result(rows), file)
    found = load(file)
    assert json.loads(json.dumps(found.as_dict())) == json.loads(file.read_text())
    assert found.rows == rows
    assert len(found.failed) == 1
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("rows", [KERNELS, DECODES])
def test_a_picture_is_written(tmp_path: Path, rows: list[Row]) -> None:
    pytest.importorskip("matplotlib")
    draw(result(rows), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)
    draw(result(rows[:2]), tmp_path / "p.svg")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.png", "p.svg"]


def test_pictures_without_dense_or_of_many_panels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    many = [replace(row, outputs=outputs) for outputs in range(64, 384, 64) for row in KERNELS[1:4]]  # type: ignore[type-var]
    draw(result(many), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no picture"):
        draw(result(KERNELS), tmp_path / "p.txt")
    with pytest.raises(UsageError, match="nothing to draw"):
        draw(result([KERNELS[-1]]), tmp_path / "p.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TealError, match="matplotlib") as error:
        draw(result(KERNELS), tmp_path / "p.png")
    assert error.value.hint is not None
    assert "teal-cli[plot]" in error.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (None, NotFoundError),
        ("not json", UsageError),
        ("[1]", UsageError),
        ('{"schema": "teal-bench/9"}', UsageError),
        ('{"schema": "teal-bench/1", "rows": [{"kind": "kernel"}]}', TealError),
        ('{"schema": "teal-bench/1"}', TealError),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: str | None, kind: type[TealError]) -> None:
    file = tmp_path / "r.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(kind) as error:
        load(file)
    assert error.value.hint


def test_a_target_is_looked_at_before_anything_is_measured(tmp_path: Path) -> None:
    check_new_file(tmp_path / "new.json", force=False)
    (tmp_path / "old.json").touch()
    with pytest.raises(UsageError):
        check_new_file(tmp_path / "old.json", force=False)
    check_new_file(tmp_path / "old.json", force=True)
    with pytest.raises(UsageError):
        check_new_file(tmp_path, force=True)
    with pytest.raises(NotFoundError):
        check_new_file(tmp_path / "no" / "r.json", force=False)

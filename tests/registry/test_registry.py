"""Names, defaults, removal, calibrations, folders: the registry without a network."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixtures_cli import Teal
from fixtures_hub import model_files, safetensors
from hypothesis import given
from hypothesis import strategies as st

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.files import disk_errors, require_space, write_json
from teal_cli.model.families import FAMILIES
from teal_cli.registry import catalog
from teal_cli.registry.catalog import check_name, name_from
from teal_cli.registry.checkpoint import ARCHITECTURES
from teal_cli.registry.download import download, fetch
from teal_cli.registry.entry import ModelEntry
from teal_cli.registry.registry import Registry
from teal_cli.registry.resolve import Options


@pytest.fixture
def registry(teal_home: Path) -> Registry:
    return Registry(teal_home)


def write_folder(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    for name, data in (model_files() if files is None else files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def three(registry: Registry, tmp_path: Path) -> Registry:
    for name in ("alpha-7b", "alpha-13b", "beta"):
        fetch(str(write_folder(tmp_path / name)), registry=registry)
    return registry


# ---------------------------------------------------------------- folders
def test_a_folder_is_pointed_at(registry: Registry, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "My Model")
    entry = fetch(str(folder), registry=registry)
    assert (entry.name, entry.path, entry.kind) == ("my-model", folder, "folder")
    assert entry.revision.startswith("sha256:")
    assert "pytorch_model.bin" not in {file.path for file in entry.files}
    assert json.loads((entry.home / "model.json").read_text())["path"] == str(folder)
    assert registry.remove("my-model") == entry
    assert folder.joinpath("config.json").exists(), "the user's folder is never touched"


def test_the_fingerprint_of_a_folder_is_of_its_content(registry: Registry, tmp_path: Path) -> None:
    one, two = (fetch(str(write_folder(tmp_path / name)), registry=registry) for name in ("one", "two"))
    three = fetch(str(write_folder(tmp_path / "three", model_files(fill=8))), registry=registry)
    assert one.revision == two.revision != three.revision


@pytest.mark.parametrize(("files", "match"), [
    ({"readme": b""}, "no config.json"),
    ({"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "pytorch_model.bin": b"x"}, "pickle"),
    ({"config.json": b'{"architectures": ["LlamaForCausalLM"]}'}, "no model.safetensors"),
    (model_files("JambaForCausalLM"), "JambaForCausalLM"),
    (model_files() | {"config.json": b'{"model_type": "t5"}'}, "t5"),
    (model_files() | {"config.json": b"{not json"}, "cannot be read"),
    (model_files() | {"config.json": b"[]"}, "JSON object"),
    (model_files() | {"model.safetensors": safetensors({"t": [8, 8]})[:-1]}, "truncated"),
    (model_files() | {"model.safetensors": safetensors({"t": [8, 8]})[:20]}, "truncated"),
    (model_files() | {"model.safetensors": b""}, "truncated"),
    (model_files() | {"model.safetensors": b"not safetensors at all, but long enough"}, "truncated"),
    (model_files() | {"model.safetensors": safetensors({"t": [8, 8]}, "F8_E4M3")}, "F8_E4M3"),
])  # fmt: skip
def test_folders_that_are_no_model(registry: Registry, tmp_path: Path, files: dict[str, bytes], match: str) -> None:
    with pytest.raises(TealError, match=match) as refused:
        fetch(str(write_folder(tmp_path / "m", files)), registry=registry)
    assert refused.value.hint
    assert registry.names() == ()


def test_a_model_type_without_architectures_is_enough(registry: Registry, tmp_path: Path) -> None:
    files = model_files() | {"config.json": b'{"model_type": "qwen3", "max_position_embeddings": 9}'}
    entry = fetch(str(write_folder(tmp_path / "m", files)), registry=registry)
    assert (entry.architecture, entry.family, entry.context) == ("Qwen3ForCausalLM", "qwen3", 9)


def test_no_such_folder(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no file or folder"):
        fetch(str(tmp_path / "absent"), registry=registry)


def test_two_models_cannot_have_one_name(registry: Registry, tmp_path: Path) -> None:
    first = fetch(str(write_folder(tmp_path / "a" / "m")), registry=registry)
    other = str(write_folder(tmp_path / "b" / "m"))
    with pytest.raises(UsageError, match="already the name") as refused:
        fetch(other, registry=registry)
    assert "--name" in refused.value.hint
    assert registry.get("m") == first
    assert fetch(other, registry=registry, name="m2").name == "m2"
    list(download(other, registry=registry, options=Options(force=True)))
    assert registry.get("m").source.endswith("/b/m")


# ---------------------------------------------------------------- names
def test_names(three: Registry) -> None:
    assert [entry.name for entry in three.list()] == ["alpha-13b", "alpha-7b", "beta"]
    assert three.get("beta").name == three.get("be").name == three.get("BETA").name == "beta"
    assert three.get("alpha-7").name == "alpha-7b"
    with pytest.raises(UsageError, match="alpha-13b, alpha-7b"):
        three.get("alpha")
    with pytest.raises(NotFoundError, match="'betta'") as missing:
        three.get("betta")
    assert "did you mean beta" in missing.value.hint
    with pytest.raises(NotFoundError, match="not on this machine") as missing:
        three.get("meta-llama/Llama-2-7b-hf")
    assert "`teal download llama-2-7b`" in missing.value.hint


def test_the_first_model_becomes_the_default(three: Registry) -> None:
    assert three.default == "alpha-7b"
    assert three.get().name == "alpha-7b"
    assert three.set_default("be").name == "beta"
    assert three.get().name == "beta"
    with pytest.raises(NotFoundError):
        three.set_default("gamma")


def test_removing_the_default(three: Registry) -> None:
    three.remove("alpha-7b")
    assert three.default is None
    with pytest.raises(NotFoundError, match="no default") as missing:
        three.get()
    assert "teal models default" in missing.value.hint
    three.set_default("beta")
    three.remove("beta")
    assert three.default == "alpha-13b", "the only one left"
    three.remove("alpha-13b")
    with pytest.raises(NotFoundError) as missing:
        three.get()
    assert "teal download" in missing.value.hint
    assert not list((three.home / "models").iterdir())


@given(st.text(max_size=60))
def test_a_name_can_be_made_of_any_text(text: str) -> None:
    made = name_from(text)
    assert check_name(made) == made


@pytest.mark.parametrize("name", ["", "..", "a/b", "Upper", "-x", "a b", "x" * 200])
def test_names_that_no_folder_should_have(name: str, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        fetch(str(write_folder(tmp_path / "m")), registry=registry, name=name)


# ---------------------------------------------------------------- calibrations
def test_calibrations(three: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no calibration") as missing:
        three.find_calibration("beta")
    assert "`teal calibrate -m beta`" in missing.value.hint
    for age, name in enumerate(("wiki-2", "wiki-1")):
        folder = three.calibration_dir("beta", name)
        folder.mkdir(parents=True)
        (folder / "calibration.json").write_text("{}")
        os.utime(folder / "calibration.json", (1000 - age, 1000 - age))
    (three.calibration_dir("beta", "unfinished")).mkdir()
    partial = three.calibration_dir("beta", ".wiki-3.partial")
    partial.mkdir()
    (partial / "calibration.json").write_text("{}")
    assert three.get("beta").calibrations == ("wiki-1", "wiki-2")
    assert three.find_calibration("beta").name == "wiki-2", "the newest"
    assert three.find_calibration("beta", "wiki-1").name == "wiki-1"
    with pytest.raises(UsageError):
        three.find_calibration("beta", "wiki")
    with pytest.raises(NotFoundError, match="'c4'") as missing:
        three.find_calibration("beta", "c4")
    assert "wiki-1, wiki-2" in missing.value.hint
    elsewhere = tmp_path / "elsewhere"
    three.calibration_dir("beta", "wiki-1").rename(elsewhere)
    assert three.find_calibration("beta", str(elsewhere)) == elsewhere


def test_a_derived_model_follows_its_parents_default(three: Registry) -> None:
    for age, name in enumerate(("chosen", "older")):
        folder = three.calibration_dir("beta", name)
        folder.mkdir(parents=True)
        (folder / "calibration.json").write_text("{}")
        os.utime(folder / "calibration.json", (1000 - age, 1000 - age))
    beta = three.get("beta")
    three.add(replace(beta, name="beta-int8", home=three.model_home("beta-int8"), parent="beta", bits_per_weight=8.5))
    three.set_default_calibration("beta", "older")
    assert three.find_calibration("beta-int8") == three.calibration_dir("beta", "older")
    three.set_default_calibration("beta-int8", "chosen")
    assert three.find_calibration("beta-int8").name == "chosen"
    assert three.find_calibration("beta").name == "older"
    with pytest.raises(UsageError, match="belongs to beta"):
        three.remove_calibration("beta-int8", "chosen")
    assert three.remove_calibration("beta", "old") == "older"
    assert three.find_calibration("beta").name == "chosen"


# ---------------------------------------------------------------- files
def test_an_entry_survives_its_json(three: Registry) -> None:
    for entry in three.list():
        assert ModelEntry.from_json(json.loads(json.dumps(entry.to_json())), entry.home) == entry


@pytest.mark.parametrize("change", [{"bits_per_weight": "x"}, {"bits_per_weight": 8.5}, {"parent": "alpha-7b"},
                                    {"parent": "../alpha-7b", "bits_per_weight": 8.5}, {"parent": 1},
                                    {"parent": "alpha-7b", "bits_per_weight": float("nan")}])  # fmt: skip
def test_a_record_that_is_half_of_a_quantised_model_is_told(
    three: Registry, teal: Teal, change: dict[str, Any]
) -> None:
    file = three.home / "models" / "beta" / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(TealError, match=r"model\.json is damaged"):
        three.get("beta")
    assert teal("models", "ls").code == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 99}', '{"schema": 1}'])
def test_a_damaged_record_is_told(three: Registry, content: str) -> None:
    (three.home / "models" / "beta" / "model.json").write_text(content)
    with pytest.raises(TealError, match=r"model\.json is damaged") as damaged:
        three.get("beta")
    assert damaged.value.hint
    assert three.get("alpha-7b").name == "alpha-7b"


def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(TealError, match=r"free, and .* are needed"):
        require_space(tmp_path / "not" / "yet" / "there", 1 << 60)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up(tmp_path: Path, code: int) -> None:
    with pytest.raises(TealError, match="is full") as full, disk_errors(tmp_path):
        try:
            raise OSError(code, os.strerror(code))
        except OSError as error:
            raise RuntimeError("wrapped by a library") from error
    assert "goes on where it stopped" in full.value.hint


# ---------------------------------------------------------------- catalog
@pytest.mark.parametrize("model", catalog.catalog().values(), ids=lambda model: model.name)
def test_the_catalog_is_consistent(model: catalog.CatalogModel) -> None:
    assert check_name(model.name) == model.name
    assert model.family in FAMILIES
    assert 2 * model.parameters <= model.size_bytes < 3 * model.parameters
    assert model.hub.count("/") == 1
    for name in (model.name, model.hub, model.hub.upper(), *model.aliases):
        assert catalog.find(name) is model, "no two models share a name"


def test_families_and_architectures_match() -> None:
    named = (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "gemma2", "granite", "smollm3", "olmo2", "olmo3",
        "phi3", "mixtral", "qwen3_moe", "olmoe", "granitemoe",
    )  # fmt: skip
    assert tuple(FAMILIES) == named
    assert len(ARCHITECTURES) == len(FAMILIES)

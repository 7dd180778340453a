"""Where a setting's value comes from, and what a wrong one says."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures_cli import Teal

from teal_cli import settings
from teal_cli.errors import UsageError


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's config.toml, not yet there."""
    path = tmp_path / "user" / "config.toml"
    path.parent.mkdir()
    monkeypatch.setattr(settings, "user_config", lambda: path)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder whose teal.toml counts."""
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def test_each_source_beats_the_ones_below_it(user: Path, project: Path) -> None:
    key = "generate.top_k"
    resolved = settings.load({}, project).resolve(key)
    assert resolved == (200, "default")
    user.write_text("[generate]\ntop_k = 3\n")
    assert settings.load({}, project).resolve(key) == (3, str(user))
    (project / "teal.toml").write_text("generate.top_k = 2\n")
    assert settings.load({}, project).resolve(key) == (2, str(project / "teal.toml"))
    env = {"TEAL_GENERATE_TOP_K": "1"}
    assert settings.load(env, project).resolve(key) == (1, "TEAL_GENERATE_TOP_K")
    assert settings.load(env, project).resolve(key, 0) == (0, "command line")
    assert settings.load(env, project).pick(key, 0) == 0


def test_unset_is_none(user: Path, project: Path) -> None:
    assert settings.load({}, project).resolve("model") == (None, "unset")


def test_a_misspelt_key_in_our_own_code_is_a_defect(user: Path, project: Path) -> None:
    with pytest.raises(KeyError):
        settings.load({}, project).pick("generate.topk")


def test_shipped_defaults_are_known_settings(user: Path, project: Path) -> None:
    values = settings.load({}, project).values
    assert values
    assert set(values) <= set(settings.KEYS)
    assert {value.source for value in values.values()} == {"default"}


@pytest.mark.parametrize(
    ("content", "sentence", "hint"),
    [
        ("sparsty = 0.5", "unknown setting 'sparsty'", "did you mean 'sparsity'?"),
        ("[generate]\ntopk = 1", "unknown setting 'generate.topk'", "did you mean 'generate.top_k'?"),
        ("sparsity = ", "is not valid TOML", None),
        ("sparsity = 1.0", "sparsity = 1.0 in", None),
        ('sparsity = "half"', "must be a number", None),
        ("seed = true", "must be a whole number of at least 0", None),
        ("seed = -1", "must be a whole number of at least 0", None),
        ('dtype = "int8"', "is not one of bfloat16, float16, float32", None),
        ('device = "gpu"', "is not a device", None),
        ("model = 3", "must be text", None),
        ("sparsity = [0.5]", "must be a number", None),
        ("generate = 3", "unknown setting 'generate'", None),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_it(
    user: Path, project: Path, content: str, sentence: str, hint: str | None
) -> None:
    file = project / "teal.toml"
    file.write_text(content)
    with pytest.raises(UsageError) as caught:
        settings.load({}, project)
    assert sentence in caught.value.message
    assert str(file) in caught.value.message
    assert "\n" not in caught.value.message
    if hint:
        assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("name", "raw", "key", "value"),
    [
        ("TEAL_SPARSITY", "0.65", "sparsity", 0.65),
        ("TEAL_DTYPE", "bf16", "dtype", "bfloat16"),
        ("TEAL_DEVICE", "cuda:1", "device", "cuda:1"),
        ("TEAL_OFFLINE", "yes", "offline", True),
        ("TEAL_OFFLINE", "0", "offline", False),
        ("TEAL_SEED", "7", "seed", 7),
    ],
)
def test_variables_are_read_as_what_they_mean(
    user: Path, project: Path, name: str, raw: str, key: str, value: object
) -> None:
    assert settings.load({name: raw}, project).resolve(key) == (value, name)


@pytest.mark.parametrize("raw", ["nan", "inf", "-0.1", "1", "half"])
def test_a_sparsity_outside_its_range_is_refused(user: Path, project: Path, raw: str) -> None:
    with pytest.raises(UsageError, match="TEAL_SPARSITY"):
        settings.load({"TEAL_SPARSITY": raw}, project)


def test_a_refused_value_says_what_to_do(user: Path, project: Path) -> None:
    with pytest.raises(UsageError, match="bfloat16, float16, float32") as variable:
        settings.load({"TEAL_DTYPE": "foo"}, project)
    assert variable.value.hint == "correct it, or unset TEAL_DTYPE to have the default"
    file = project / "teal.toml"
    file.write_text('dtype = "foo"')
    with pytest.raises(UsageError, match="bfloat16, float16, float32") as line:
        settings.load({}, project)
    assert line.value.hint == f"correct it, or remove it from {file} to have the default"


def test_misspelt_variables_are_found() -> None:
    env = {"TEAL_SPARSTY": "0.5", "TEAL_SPARSITY": "0.5", "TEAL_HOME": "/", "PATH": "/"}
    assert settings.unknown_variables(env) == ["TEAL_SPARSTY"]


@pytest.mark.parametrize("key", settings.KEYS)
def test_every_setting_is_described_and_has_a_variable_of_its_own(key: str) -> None:
    assert settings.KEYS[key].help
    assert [other for other in settings.KEYS if settings.variable(other) == settings.variable(key)] == [key]


def test_a_broken_file_stops_a_command_with_2(teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teal.toml").write_text("sparsty = 0.5")
    result = teal("generate", "--prompt", "a")
    assert result.code == 2
    assert result.err == "error: teal.toml has an unknown setting 'sparsty'\n  hint: did you mean 'sparsity'?\n"


def test_home_follows_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAL_HOME", "~/elsewhere")
    assert settings.teal_home() == Path.home() / "elsewhere"


@pytest.mark.parametrize("below", ["", "models"])
def test_a_home_that_is_a_file_is_refused(
    teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TEAL_HOME", str(tmp_path / "file" / below))
    for command in (("models", "ls"), ("generate", "-p", "x"), ("download", "smollm2-135m")):
        run = teal(*command)
        assert run.code == 2, run.err
        assert f"{tmp_path / 'file'} is a file" in run.err
        assert "hint: set TEAL_HOME to a folder" in run.err


def test_configs_are_found_without_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    installed = {file.name for file in settings.configs().iterdir()}
    monkeypatch.setattr("importlib.resources.files", missing)
    assert {file.name for file in settings.configs().iterdir()} == installed
    assert "defaults.toml" in installed


def test_help_shows_what_an_option_is_set_to_and_by_what(
    teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")

    def line(option: str) -> str:
        return next(line for line in teal("generate", "--help").out.splitlines() if option in line)

    assert line("--temperature").endswith("[TEAL_GENERATE_TEMPERATURE; default: 0.8]")
    (tmp_path / "teal.toml").write_text("generate.temperature = 0.25\n")
    assert line("--temperature").endswith("[TEAL_GENERATE_TEMPERATURE; default: 0.25]")
    monkeypatch.setenv("TEAL_GENERATE_TEMPERATURE", "0.75")
    assert line("--temperature").endswith("[TEAL_GENERATE_TEMPERATURE; default: 0.75]")
    (tmp_path / "teal.toml").write_text("sparsty = 0.5")
    assert "--temperature" in line("--temperature")  # help is there beside a broken file


@pytest.mark.parametrize(
    ("variable", "option", "wanted"),
    [(None, (), 4), ("3", (), 3), ("3", ("--max-new-tokens", 2), 2)],
    ids=["file", "variable", "command line"],
)
def test_a_command_takes_each_setting_from_the_first_source_that_has_it(
    teal: Teal, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None,
    option: tuple[object, ...], wanted: int,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teal.toml").write_text("[generate]\nmax_new_tokens = 4\n")
    if variable:
        monkeypatch.setenv("TEAL_GENERATE_MAX_NEW_TOKENS", variable)
    run = teal("generate", "-p", "The quick", "-s", 0, "--ignore-eos", "--json", *option)
    assert len(run.json["token_ids"]) == wanted


@pytest.mark.parametrize(
    "command", ["generate", "dump", "calibrate", "bench decode", "doctor", "download", "quickstart"]
)
def test_every_option_of_a_setting_names_its_variable_and_where_its_default_comes_from(
    teal: Teal, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    words = " ".join(teal(*command.split(), "--help").out.split())
    variables = [settings.variable(key) for key in settings.KEYS if f"[{settings.variable(key)}" in words]
    assert variables
    for variable in variables:
        assert f"[{variable}; default: " in words or variable == "TEAL_OFFLINE"

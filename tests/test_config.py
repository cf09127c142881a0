"""Configuration: precedence, errors and their messages, and saving and loading."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import code_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mopefuse.config.method_defaults import OFFICIAL
from mopefuse.config.recipe import parse_set, read_recipe, read_yaml, resolve, saved_config, to_yaml
from mopefuse.config.schema import build_config, known_keys
from mopefuse.errors import CheckpointError, ConfigError

BASE = {"main": "tiny:vision", "comp": "tiny:text"}


def refused(**values: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build_config(BASE | values)
    return caught.value


def recipe(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# -- precedence


def test_set_wins_over_flags_over_the_recipe_over_a_saved_run_over_defaults(tmp_path: Path) -> None:
    file = str(recipe(tmp_path, "main: tiny:vision\ncomp: tiny:text\ntrain: {epochs: 2, lr: 2e-3, clip: 2.0}\nseed: 2\n"))
    saved = build_config(BASE | {"train": {"epochs": 1, "lr": 1e-3, "clip": 9.0, "batch_size": 1}, "seed": 1})
    flags = {"train.epochs": 3, "train.lr": 3e-3, "train.batch_size": None}
    got = resolve(recipe=file, flags=flags, sets=["train.epochs=4"], saved=saved)
    assert (got.train.epochs, got.train.lr, got.train.clip, got.train.batch_size) == (4, 3e-3, 2.0, 1)
    assert (got.seed, got.train.weight_decay) == (2, build_config(BASE).train.weight_decay)


def test_the_last_of_several_sets_wins_and_neighbours_stay() -> None:
    assert parse_set(["train.epochs=1", "train.lr=1e-2", "train.epochs=2"]) == {"train": {"epochs": 2, "lr": 0.01}}


def test_compat_official_sets_defaults_that_explicit_settings_override() -> None:
    assert build_config(BASE | {"compat": "official"}).prompts.experts == OFFICIAL["prompts"]["experts"]
    assert build_config(BASE | {"compat": "official", "prompts": {"experts": 3}}).prompts.experts == 3
    assert build_config(BASE | {"compat": "official", "prompts": {"experts": 3}}).prompts.gate == "none"


def test_a_shipped_recipe_is_found_by_its_name() -> None:
    assert resolve(recipe="digit-questions/demo").main == "tiny:vision-single"
    with pytest.raises(ConfigError, match="digit-questions/demo"):
        resolve(recipe="digit-question/demo")


# -- errors


@pytest.mark.parametrize(
    ("values", "name", "nearest"),
    [
        ({"sead": 1}, "sead", "seed"),
        ({"train": {"epoch": 1}}, "train.epoch", "train.epochs?"),
        ({"prompts": {"expert": 1}}, "prompts.expert", "prompts.experts?"),
        ({"router": {"topm": 1}}, "router.topm", "router.top_m?"),
        ({"lr": 1}, "lr", "train.lr?"),
        ({"layers": 1}, "layers", "prompts.layers, pmf.layers, segmentation.layers?"),
        ({"epoch": 1}, "epoch", "train.epochs?"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(values: dict[str, Any], name: str, nearest: str) -> None:
    error = refused(**values)
    assert f"unknown setting {name} " in error.what
    assert f"did you mean {nearest}" in error.what


def test_an_invalid_value_is_an_error_with_its_flag_and_a_suggestion() -> None:
    flags = {"main": "tiny:vision", "comp": "tiny:text", "prompts.gate": "zeros", "train.batch_size": 8}
    with pytest.raises(ConfigError) as caught:
        resolve(flags=flags)
    assert (caught.value.what, caught.value.fix) == (
        "--gate: got 'zeros'; needs 'none' or 'zero'", "did you mean zero?"
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"^prompts.gate: got 'nones'.* fix: did you mean none\?"):
        resolve(flags=flags, sets=["prompts.gate=nones"])
    with pytest.raises(ConfigError, match=r"--batch: got 0; needs at least 1 · fix: correct these settings"):
        resolve(flags=flags | {"train.batch_size": 0})


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("prompts", "experts", 0, "needs at least 1"),
        ("prompts", "experts", -3, "needs at least 1"),
        ("prompts", "experts", 4.7, "needs a whole number"),
        ("prompts", "experts", True, "true and false"),
        ("prompts", "experts", "many", "needs a whole number"),
        ("prompts", "dropout", 1.0, "needs less than 1"),
        ("prompts", "dropout", -0.1, "needs at least 0"),
        ("prompts", "layers", "last:0", "last:1/N"),
        ("prompts", "layers", "some", "last:1/N"),
        ("prompts", "layers", [0, 0], "distinct"),
        ("prompts", "layers", [-1], "0 for the first layer"),
        ("prompts", "layers", [], "0 for the first layer"),
        ("prompts", "layers", 3, "got 3"),
        ("router", "temperature", 0, "needs more than 0"),
        ("router", "top_m", 0, "needs at least 1"),
        ("train", "lr", float("nan"), "needs a finite number"),
        ("train", "lr", float("inf"), "needs a finite number"),
        ("train", "lr", 0, "needs more than 0"),
        ("train", "batch_size", 0, "needs at least 1"),
        ("train", "epochs", -1, "needs at least 0"),
        ("data", "max_pixels", 10**9, "needs at most 89000000"),
        ("data", "cache_images", "perhaps", "needs true or false"),
    ],
)
def test_a_value_out_of_bounds_is_an_error_with_its_path(section: str, key: str, value: Any, message: str) -> None:
    error = refused(**{section: {key: value}})
    assert f"{section}.{key}: got " in error.what
    assert message in error.what


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 1.5, True])
def test_a_seed_that_no_generator_takes_is_refused(seed: Any) -> None:
    assert "seed" in refused(seed=seed).what


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu ", "CPU"])
def test_an_impossible_device_is_refused(device: str) -> None:
    assert "device" in refused(device=device).what


def test_routing_to_more_experts_than_there_are_names_both_numbers() -> None:
    error = refused(router={"top_m": 5}, prompts={"experts": 3})
    assert "5" in error.what
    assert "3" in error.what
    assert build_config(BASE | {"router": {"top_m": 3}, "prompts": {"experts": 3}}).router.top_m == 3


def test_one_expert_is_valid() -> None:
    assert build_config(BASE | {"prompts": {"experts": 1}}).prompts.experts == 1


def test_all_problems_are_reported_at_once() -> None:
    error = refused(seed=-1, prompts={"experts": 0}, train={"epoch": 1})
    assert all(name in error.what for name in ("seed", "prompts.experts", "train.epoch"))


def test_a_missing_encoder_is_an_error_that_explains_it() -> None:
    with pytest.raises(ConfigError, match="main is missing"):
        build_config({"comp": "tiny:text"})


def test_a_very_long_value_gives_a_short_message() -> None:
    assert len(str(refused(seed="9" * 4000))) < 400


# -- --set


@pytest.mark.parametrize(
    ("text", "named", "fix"),
    [
        ("train.lr", "train.lr has no value", "--set train.lr=VALUE"),
        ("train.lr=", "train.lr has no value", "--set train.lr=VALUE"),
        ("train.lrr=1", "train.lrr", "lr"),
        ("trian.lr=1", "trian", "train"),
        ("train.lr.x=1", "train.lr.x", ""),
        ("train=1", "train is a section", "epochs"),
        ("=1", "unknown setting", "data"),
        ("prompts.experts=[1", "not a valid recipe", "correct"),
    ],
)
def test_a_malformed_set_is_an_error_with_its_path_and_the_syntax(text: str, named: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_set([text])
    assert named in caught.value.what
    assert fix in caught.value.fix


def test_a_set_of_the_wrong_type_is_an_error_with_path_type_and_value() -> None:
    with pytest.raises(ConfigError, match=r"train\.lr: got 'fast'; needs a number"):
        resolve(flags=BASE, sets=["train.lr=fast"])


# -- YAML


@pytest.mark.parametrize(
    ("text", "problem", "place"),
    [
        ("main: x\na: !!python/object:os.system ls", "tags", ":2:4"),
        ("a: !!python/object/apply:os.system [ls]", "tags", ":1:4"),
        ("a: !own x", "tags", ":1:4"),
        ("a: !!bool x", "tags", ":1:4"),
        ("a: &x [1]\nb: *x", "aliases", ":2:4"),
        ("seed: 1\nseed: 2", "'seed' appears twice", ":2:1"),
        ("train: {lr: 1, lr: 2}", "'lr' appears twice", ":1:16"),
        ("train:\n\tlr: 1", "tab", ":2:1"),
        ("? [a]\n: b", "key", ":1:3"),
        ("train: {lr: 1", "expected", ":1:"),
        ("a: 1\nb: \x00", "not allowed", ":2:4"),
        ("- 1\n- 2", "mapping", ""),
        ("just words", "mapping", ""),
        (b"a: \xff", "cannot read the recipe", ""),
        ("a: " + "9" * 5000, "digits", ""),
        ("a: " + "[" * 1000, "not a valid recipe", ""),
    ],
)
def test_yaml_that_is_not_plain_data_is_refused_with_its_line(
    tmp_path: Path, text: str | bytes, problem: str, place: str
) -> None:
    path = recipe(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    assert problem in caught.value.what
    assert f"{path}{place}" in caught.value.where


def test_an_unreadable_saved_configuration_is_reported_as_a_damaged_run(tmp_path: Path) -> None:
    path = recipe(tmp_path, b"a: \xff")
    with pytest.raises(CheckpointError, match="is damaged: ") as caught:
        saved_config(path)
    assert (caught.value.code, caught.value.where) == ("MF-CKPT-03", str(path))
    path.write_text(to_yaml(resolve(flags=BASE)))
    assert saved_config(path) == resolve(flags=BASE)


def test_a_yaml_tag_that_would_run_python_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(ConfigError):
        read_yaml(f"a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]", "x")
    assert not canary.exists()


def test_yaml_aliases_that_would_expand_exponentially_are_refused() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))
    with pytest.raises(ConfigError, match="aliases"):
        read_yaml(bomb, "x")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1.5", 1.5), (".5", 0.5), ("-2", -2), ("0", 0), ("true", True), ("null", None), ("~", None),
        ("no", "no"), ("off", "off"), ("yes", "yes"), ("1:30", "1:30"), ("012", "012"), ("0x10", "0x10"),
        ("2020-01-01", "2020-01-01"), ("1_000", "1_000"), ("=", "="), ("'1'", "1"), ("٣", "٣"),
    ],
)  # fmt: skip
def test_ambiguous_yaml_scalars_are_not_numbers(text: str, value: Any) -> None:
    got = read_yaml(f"a: {text}", "x")["a"]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeffseed: 3\n", "seed: 3\r\n"])
def test_an_empty_recipe_a_bom_and_crlf_are_accepted(tmp_path: Path, text: str) -> None:
    assert read_recipe(recipe(tmp_path, text)) in ({}, {"seed": 3})


def test_a_missing_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match="recipe not found"):
        resolve(recipe="nowhere.yaml")


@settings(deadline=None)
@given(st.binary(max_size=200))
@example(b"main: [")
@example(b"? {a: b}\n: c")
@example(b"%YAML 9.9\n---\na: 1")
@example(b"main: tiny:vision\ncomp: tiny:text\n1: 2\n")
@example(b"main: tiny:vision\ncomp: tiny:text\n? \n: 2\n")
@example(b"prompts: {layers: {a: 1}}")
@example(b"compat: [official]")
def test_any_bytes_give_a_configuration_or_a_mopefuse_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = recipe(tmp_path_factory.getbasetemp(), content)
    assert re.fullmatch(r"|MF-CFG-\d+", code_of(lambda: resolve(recipe=str(path))))


_yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.sampled_from(known_keys(())), _yaml_values, max_size=4))
def test_any_values_give_a_configuration_or_a_mopefuse_error(values: dict[str, Any]) -> None:
    assert code_of(lambda: build_config(BASE | values)) in ("", "MF-CFG-01")


# -- saving and loading

_surprises = ["1e3", "no", "null", "~", "1:30", "0x1", " a", "a: b", "#", "'", "true", "1.", "\u2028"]
_words = st.text(max_size=12) | st.sampled_from(_surprises)
_positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
_configs = st.fixed_dictionaries(
    {"main": _words, "comp": _words},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "compat": st.sampled_from(["none", "official"]),
        "prompts": st.fixed_dictionaries(
            {},
            optional={
                "layers": st.sampled_from(["all", "last:3"]) | st.lists(st.integers(0, 40), min_size=1, unique=True),
                "static": st.none() | st.integers(0, 99),
                "init": st.none() | _positive,
                "dropout": st.floats(0, 1, exclude_max=True),
            },
        ),
        "data": st.fixed_dictionaries({}, optional={"path": st.none() | _words, "cache_features": st.booleans()}),
        "train": st.fixed_dictionaries({}, optional={"lr": _positive, "weight_decay": st.floats(0, 1e300)}),
    },
)


@settings(deadline=None, max_examples=30)
@given(_configs)
@example(BASE | {"main": "\x85", "comp": "Jörg 🙂"})
def test_a_configuration_survives_a_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    config = build_config(values)
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert build_config(read_recipe(path)) == config

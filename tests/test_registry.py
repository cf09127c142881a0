"""From names to implementations: specs as users type them, and entry points of installed distributions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from typing import Any

import pytest
from conftest import call
from hypothesis import example, given
from hypothesis import strategies as st

from mopefuse.core import registry
from mopefuse.core.registry import DATASETS, ENCODERS, FUSION, Spec, available, load, parse_spec
from mopefuse.encoders import create_encoder
from mopefuse.errors import ConfigError, MopefuseError, Notice, PluginError


@pytest.mark.parametrize(
    ("text", "scheme", "name", "options"),
    [
        ("timm:vit_base_patch16_224.augreg_in21k", "timm", "vit_base_patch16_224.augreg_in21k", {}),
        ("hf:google-bert/bert-base-uncased@86b5e09", "hf", "google-bert/bert-base-uncased@86b5e09", {}),
        ("hf:/a folder/with:colon=and+plus&and", "hf", "/a folder/with:colon=and+plus&and", {}),
        ("hf:C:\\models\\bert", "hf", "C:\\models\\bert", {}),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k#visual", "open_clip", "ViT-B-32/laion2b_s34b_b79k#visual", {}),
        ("tiny:vision?pretrained=false&pool=mean", "tiny", "vision", {"pretrained": "false", "pool": "mean"}),
        ("timm:x?weights=/a/b=c.safetensors", "timm", "x", {"weights": "/a/b=c.safetensors"}),
        ("  tiny:text\n", "tiny", "text", {}),
    ],
)
def test_specs_are_parsed(text: str, scheme: str, name: str, options: dict[str, str]) -> None:
    spec = parse_spec(text)
    assert (spec.scheme, spec.name, spec.options) == (scheme, name, options)
    assert str(spec) == text.strip()


@pytest.mark.parametrize("text", ["", "vit_base", ":vit", "timm:", "?a=b", "timm?a:b"])
def test_a_spec_without_scheme_and_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an encoder") as caught:
        parse_spec(text)
    assert "scheme:name" in caught.value.fix


@pytest.mark.parametrize("text", ["tiny:v?", "tiny:v?a", "tiny:v?a=", "tiny:v?=b", "tiny:v?a=1&a=2", "tiny:v?a=1&"])
def test_spec_options_must_be_distinct_pairs(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the option"):
        parse_spec(text)


@given(st.text())
@example("a:b?c=d&e=f=g")
@example("~0")
@example("0" * 300)
def test_any_text_is_an_error_or_a_spec_that_survives_a_round_trip(text: str) -> None:
    try:
        spec = parse_spec(text)
    except MopefuseError:
        return
    assert parse_spec(str(spec)) == spec


# -- entry points


def test_built_ins_are_registered_like_plugins() -> None:
    assert {"timm", "hf", "open_clip", "tiny"} <= available(ENCODERS).keys()
    assert {"conditional", "late-concat", "main-only", "comp-only"} <= available(FUSION).keys()
    assert "digit-questions" in available(DATASETS)
    assert load(FUSION, "conditional").__name__ == "ConditionalFusion"


def test_listing_imports_no_encoder_and_no_torch() -> None:
    code = (
        "import sys; from mopefuse.core.registry import *; "
        "names = [*available(ENCODERS), *available(FUSION), *available(DATASETS)]; "
        "loaded = [m for m in sys.modules if m.startswith(('torch', 'timm', 'numpy', 'pydantic', 'mopefuse.'))]; "
        "print(len(names), [m for m in loaded if m.split('.')[:2] not in (['mopefuse', 'core'], ['mopefuse', 'errors'])])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, _, loaded = done.stdout.partition(" ")
    assert int(count) >= 9
    assert loaded.strip() == "[]"


class Installed(Distribution):
    """A distribution that exists only in this test."""

    def __init__(self, name: str) -> None:
        self._called = name

    @property
    def name(self) -> str:
        return self._called

    def read_text(self, filename: str) -> str | None:
        return None

    def locate_file(self, path: Any) -> Any:
        return path


def claim(owner: str, name: str, value: str, group: str = ENCODERS) -> EntryPoint:
    point = EntryPoint(name, value, group)
    vars(point).update(dist=Installed(owner))
    return point


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Install]:
    """Put entry points in front of the installed ones."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "plug_fails.py").write_text("raise RuntimeError('no such device')")
    (tmp_path / "plug_exits.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "plug_works.py").write_text("class Encoder: pass")
    real = registry.entry_points

    def install(*points: EntryPoint) -> None:
        def listed(group: str) -> list[EntryPoint]:
            ours = [point for point in real(group=group) if registry.distribution(point) == registry.OURS]
            return [*(point for point in points if point.group == group), *ours]

        monkeypatch.setattr(registry, "entry_points", listed)
        available.cache_clear()
        registry._warn_of_shadowed.cache_clear()

    yield install
    monkeypatch.undo()
    available.cache_clear()


def test_a_plugin_is_found_and_loaded_by_its_name(install: Install) -> None:
    install(claim("mopefuse-audio", "audio", "plug_works:Encoder"))
    assert load(ENCODERS, "audio").__name__ == "Encoder"


def test_a_built_in_takes_precedence_over_a_plugin_of_the_same_name(install: Install) -> None:
    install(claim("mopefuse-evil", "tiny", "plug_fails:X"))
    with pytest.warns(Notice, match="'tiny' is used; for that of mopefuse-evil, write mopefuse-evil:tiny") as caught:
        assert [load(ENCODERS, "tiny").__name__ for _ in range(3)] == ["TinyEncoder"] * 3
    assert len(caught) == 1
    assert [registry.distribution(point) for point in available(ENCODERS)["tiny"]] == ["mopefuse", "mopefuse-evil"]


def test_a_clash_is_an_error_with_both_distributions_only_when_the_name_is_used(install: Install) -> None:
    install(claim("one", "audio", "plug_works:Encoder"), claim("two", "audio", "plug_works:Other"))
    assert load(ENCODERS, "tiny").__name__ == "TinyEncoder"
    with pytest.raises(PluginError, match=r"(?=.*one)(?=.*two)") as caught:
        load(ENCODERS, "audio")
    assert caught.value.exit_code == 9


@pytest.mark.parametrize(
    ("text", "scheme", "name"),
    [
        ("audio:small", "audio:audio", "small"),
        ("audio:audio:small", "audio:audio", "small"),
        ("audio:audio:audio:small", "audio:audio", "audio:small"),
        ("audio:other:small", "audio:audio", "other:small"),
        ("Mopefuse_X:y:z?a=b", "mopefuse-x:y", "z"),
        ("y:z:z", "mopefuse-x:y", "z:z"),
        ("hf:C:\\models", "hf", "C:\\models"),
        ("mopefuse:tiny:vision", "tiny", "vision"),
        ("absent:y:z", "absent:y", "z"),
        ("absent:y", "absent", "y"),
        ("absent::y", "absent", ":y"),
        ("absent:y:", "absent", "y:"),
    ],
)
def test_a_spec_may_name_its_distribution(install: Install, text: str, scheme: str, name: str) -> None:
    """A built-in scheme is never a distribution; a distribution that provides a scheme of its own name can be addressed both
    ways."""
    install(claim("audio", "audio", "a:A"), claim("mopefuse-x", "y", "a:A"), claim("hf", "C", "a:A"))
    spec = parse_spec(text)
    assert (spec.scheme, spec.name) == (scheme, name)
    assert parse_spec(str(spec)) == spec


def test_the_same_module_in_two_distributions_is_a_clash(install: Install) -> None:
    install(claim("one", "audio", "plug_works:Encoder"), claim("two", "audio", "plug_works:Encoder"))
    with pytest.raises(PluginError, match="one and two") as caught:
        load(ENCODERS, "audio")
    assert caught.value.fix == "write one:audio:NAME or two:audio:NAME"
    assert load(ENCODERS, "two:audio").__name__ == "Encoder"


def test_an_entry_point_that_is_listed_twice_is_not_a_clash(install: Install) -> None:
    point = claim("one", "audio", "plug_works:Encoder")
    install(point, point)
    assert load(ENCODERS, "audio").__name__ == "Encoder"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("plug_fails:X", "no such device"),
        ("plug_exits:X", "SystemExit"),
        ("plug_works:Missing", "Missing"),
        ("plug_absent:X", "plug_absent"),
    ],
)
def test_a_broken_plugin_is_an_error_with_its_distribution_only_when_it_is_used(
    install: Install, value: str, message: str
) -> None:
    install(claim("mopefuse-broken", "broken", value))
    listed = call("encoders")
    assert listed.returncode == 0
    assert "mopefuse-broken" in listed.stdout
    done = call("encoders", "inspect", "broken:x")
    assert done.returncode == 9
    assert done.stderr.startswith("error[MF-PLUG-02]")
    assert message in done.stderr
    assert "mopefuse-broken" in done.stderr


@pytest.mark.parametrize(("group", "name", "near"), [(ENCODERS, "tmm", "timm"), (FUSION, "conditonal", "conditional")])
def test_an_unknown_name_gets_a_suggestion(group: str, name: str, near: str) -> None:
    with pytest.raises(MopefuseError, match=f"unknown .*{name}") as caught:
        load(group, name)
    assert near in caught.value.fix


def test_specs_compare_by_value() -> None:
    assert Spec("a", "b", {"c": "d"}) == parse_spec("a:b?c=d")


@pytest.mark.parametrize(
    ("number", "message"), [(12, "the plugin acme failed to create x: KeyError: 'no'"), (13, "returned a dict")]
)
def test_an_encoder_that_a_plugin_fails_to_create_is_a_plugin_error(
    number: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {12: "no", 13: "spec"}[number]
    monkeypatch.setattr(registry, "load", lambda group, name: lambda spec: {"spec": {}}[key])
    with pytest.raises(PluginError, match=message) as caught:
        create_encoder("acme:toy:x")
    assert caught.value.number == number and "acme" in caught.value.fix


def test_a_mopefuse_error_raised_by_a_plugin_is_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(spec: Spec) -> None:
        raise ConfigError(1, "of its own")

    monkeypatch.setattr(registry, "load", lambda group, name: refuse)
    with pytest.raises(ConfigError, match="of its own"):
        create_encoder("acme:toy:x")

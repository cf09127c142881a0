"""The errors that a user can cause: their codes, their form, and the page that lists them."""

from __future__ import annotations

import pickle
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from mopefuse import errors
from mopefuse.core import error_codes
from mopefuse.errors import ConfigError, DataError, Interrupted, MopefuseError, did_you_mean

ROOT = Path(__file__).resolve().parents[1]
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MopefuseError)]


def test_every_family_has_its_own_name_and_exit_code() -> None:
    fixed = [kind for kind in KINDS if kind is not Interrupted]
    assert sorted({kind.exit_code for kind in fixed}) == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert len({kind.family for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize(
    ("where", "fix", "expected"),
    [
        ("b.jsonl:3", "mend it", "a is wrong · b.jsonl:3 · fix: mend it"),
        ("", "mend it", "a is wrong · fix: mend it"),
        ("b.jsonl:3", "", "a is wrong · b.jsonl:3"),
        ("", "", "a is wrong"),
    ],
)
def test_an_error_has_what_where_and_a_fix(where: str, fix: str, expected: str) -> None:
    error = DataError(7, "a is wrong", where=where, fix=fix)
    assert str(error) == expected
    assert error.as_dict() == {"code": "MF-DATA-07", "exit": 4, "message": "a is wrong", "where": where, "hint": fix}


@pytest.mark.parametrize("error", [ConfigError(1, "what", where="where", fix="fix"), Interrupted(15, "what", fix="fix")])
def test_an_error_survives_pickling(error: MopefuseError) -> None:
    there = pickle.loads(pickle.dumps(error))  # noqa: S301 (as a data worker sends it)
    assert type(there) is type(error)
    assert there.as_dict() == error.as_dict()


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
def test_a_stop_has_the_exit_code_of_its_signal(number: int, code: int) -> None:
    assert Interrupted(number, "stopped", fix="").exit_code == code


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("epoch", ["epochs", "lr"], "did you mean epochs?"),
        ("zzz", ["b", "a"], "use one of a, b"),
        ("zzz", [str(i) for i in range(10, 30)], "use one of 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, …"),
        ("zzz", [], ""),
    ],
)
def test_similar_names_or_all_names_are_suggested(name: str, known: list[str], expected: str) -> None:
    assert did_you_mean(name, known) == expected


# -- docs/errors.md


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "errors_page.py"))


def test_the_page_lists_exactly_the_codes_of_the_source(script: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(MF-\w+-\d+)` \| (\d+) \|", page, re.MULTILINE)
    in_source = [(code, str(number)) for code, (number, _) in script["codes"]().items()]
    assert listed == in_source, "run: python scripts/errors_page.py"


def test_the_page_has_every_exit_code(script: dict[str, Any]) -> None:
    table = script["HEAD"]
    for kind in KINDS:
        assert re.search(rf"^\| {kind.exit_code} \|", table, re.MULTILINE)


def test_the_page_script_finds_every_code_that_is_raised(script: dict[str, Any]) -> None:
    """An independent check: finds every constant that follows the name of an error class in the source text."""
    kinds = {kind.__name__: kind.family for kind in KINDS if kind not in (MopefuseError, Interrupted)}
    found = set()
    for path in (ROOT / "mopefuse").rglob("*.py"):
        for name, enum, constant in re.findall(r"\b(\w+Error)\(\s*(\w+Code)\.(\w+)\b", path.read_text(encoding="utf-8")):
            code = getattr(error_codes, enum)[constant]
            assert code.text == f"MF-{kinds[name]}-{int(code):02d}", f"{path.name}: {enum} in {name}"
            found.add(code.text)
    assert found <= script["codes"]().keys()
    assert len(found) > 50


def test_errors_use_named_constants_and_every_constant_is_used() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "mopefuse").rglob("*.py"))
    assert re.findall(r"\b\w+Error\(\s*\d+\b", source) == []
    enums = [kind for kind in vars(error_codes).values() if isinstance(kind, type) and issubclass(kind, error_codes.ErrorCode)]
    constants = {f"{enum.__name__}.{code.name}" for enum in enums for code in enum}
    assert constants == set(re.findall(r"\b\w+Code\.[A-Z][A-Z0-9_]+\b", source))

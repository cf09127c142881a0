"""The README is short, and its code works as shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_cases import ROOT, blocks, commands, furnish_for_readme, run_page

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_fits_in_150_lines_and_starts_with_what_mopefuse_is() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    first_screen = "\n".join(lines[:24])
    assert "classifier" in first_screen
    assert "pip install mopefuse" in first_screen


def test_installing_comes_first_then_the_two_targets_of_make() -> None:
    first = commands(README)[:3]
    assert first == [["pip", "install", "mopefuse"], ["make", "demo"], ["make", "test"]]
    makefile = (ROOT / "Makefile").read_text()
    for target, recipe in (("demo", "mopefuse demo --overwrite"), ("test", "python -m pytest")):
        assert re.search(rf"^{target}: \$\(INSTALLED\)\n(\t.*\n)*?\t.*{re.escape(recipe)}", makefile, re.MULTILINE), target


def test_the_five_minutes_start_with_the_data_check_and_the_simplest_baseline() -> None:
    own = [words[1:] for words in commands(README) if words[0] == "mopefuse"]
    assert own[0][:3] == ["data", "check", "products.csv"]
    assert own[1][0] == "train"
    assert "linear" in own[1]
    assert [words[0] for words in own[2:]] == ["train", "compare", "report", "predict", "export"]


@pytest.mark.process
def test_every_command_and_every_piece_of_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe,) = blocks(README, "yaml")
    monkeypatch.chdir(furnish_for_readme(tmp_path, recipe))
    assert run_page(README) >= 7
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 6


def test_every_link_and_picture_exists() -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", README)
    assert len(targets) > 20
    assert [target for target in targets if not (ROOT / target).exists()] == []
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings

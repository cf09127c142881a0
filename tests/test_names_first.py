"""Errors in the command itself are reported before any data are read, with the flag that fixes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import call
from encoder_cases import save_hf

from mopefuse.training import plan, swap


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was read of the data; nothing, if the test passes."""
    reads: list[object] = []
    for module in (plan, swap):
        monkeypatch.setattr(module, "load_data", lambda *args, **how: reads.append(args) or pytest.fail("data were read"))
    return reads


WRONG = {
    ("--main", "tiny:visoin", "--comp", "tiny:text"): (5, "tiny:visoin", "--main", "did you mean tiny:vision"),
    ("--main", "timm:vit_bose", "--comp", "tiny:text"): (5, "vit_bose", "--main", "did you mean vit_base"),
    ("--main", "timm:vit_base_patch16_224.nope", "--comp", "tiny:text"): (5, "nope", "--main", "fix:"),
    ("--main", "tiny:vision", "--comp", "hf:./nowhere"): (5, "folder not found: ./nowhere", "--comp", "check the path"),
    ("--main", "tiny:vision", "--comp", "hf:nobody?pretrained=false"): (5, "nobody", "--comp", "pretrained=false"),
    ("--main", "tiny:vision", "--comp", "open_clip:ViT-X#text"): (5, "ViT-X", "--comp", "did you mean"),
    ("--main", "tiny:vision", "--comp", "open_clip:ViT-B-32"): (5, "names no tower", "--comp", "#text"),
    ("--main", "tiny:vision", "--comp", "tiny:text", "--comp", "tiny:txt"): (5, "tiny:txt", "--comp", "did you mean tiny:text"),
    ("--main", "tiny:vision", "--comp", "hff:bert"): (5, "hff", "--comp", "did you mean hf"),
    ("--main", "tiny:vision", "--comp", "bert"): (3, "'bert' is not an encoder", "--comp", "write --comp scheme:name"),
    ("--main", "tiny:vision", "--comp", "tiny:text", "--method", "condtional"): (3, "condtional", "", "mean conditional"),
}


@pytest.mark.parametrize("flags", WRONG, ids=lambda flags: flags[-1])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["train", "dry run"])
def test_an_unknown_name_is_an_error_before_data_are_read(
    flags: tuple[str, ...], dry: tuple[str, ...], unread: list[object], pairs: Path, tmp_path: Path
) -> None:
    code, what, where, fix = WRONG[flags]
    done = call("train", *flags, "--data", pairs, "--out", tmp_path / "run", *dry)
    assert done.returncode == code, done.stderr
    assert all(part in done.stderr for part in (what, where, fix)), done.stderr
    assert len(done.stderr.splitlines()) == 1 and not unread


def test_a_folder_without_a_model_is_an_error_before_data_are_read(unread: list[object], pairs: Path, tmp_path: Path) -> None:
    (empty := tmp_path / "my-bert").mkdir()
    done = call("train", "--main", "tiny:vision", "--comp", f"hf:{empty}", "--data", pairs, "--out", tmp_path / "run")
    assert (done.returncode, unread) == (5, []), done.stderr
    assert f"{empty} has no config.json" in done.stderr and "--comp" in done.stderr


def test_swap_encoder_reports_an_unknown_name_before_data_are_read(trained: Path, unread: list[object], tmp_path: Path) -> None:
    done = call("swap-encoder", trained, "--comp", "tiny:txt", "-o", tmp_path / "new")
    assert done.returncode == 5 and "--comp" in done.stderr and "did you mean tiny:text" in done.stderr and not unread


@pytest.mark.parametrize("flag", ["--main", "--comp"])
def test_a_folder_without_a_scheme_gives_a_hint_about_the_spec(
    flag: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_hf("bert", tmp_path / "my-bert")
    encoders = {"--main": "tiny:vision", "--comp": "tiny:text", flag: "my-bert"}
    words = [word for pair in encoders.items() for word in pair]
    done = call("train", *words, "--data", pairs, "--out", tmp_path / "run")
    assert done.returncode == 3 and f"fix: write {flag} hf:my-bert" in done.stderr
    words = ["hf:my-bert" if word == "my-bert" else word for word in words]
    done = call("train", *words, "--data", pairs, "--out", tmp_path / "other", "--dry-run")
    assert done.returncode == 0, done.stderr


def test_a_missing_encoder_is_an_error_that_names_its_flag(pairs: Path, tmp_path: Path) -> None:
    done = call("train", "--main", "tiny:vision", "--data", pairs)
    assert done.returncode == 3 and "--comp is missing (complementary encoder" in done.stderr
    assert done.stderr.endswith("fix: add --comp hf:bert-base\n") and "Union" not in done.stderr
    done = call("train", "--data", pairs)
    assert "--main is missing" in done.stderr and "fix: add --main timm:vit_base --comp hf:bert-base" in done.stderr
    (tmp_path / "recipe.yaml").write_text("main: tiny:vision\ncomp: 5\n")
    done = call("train", "--recipe", tmp_path / "recipe.yaml", "--data", pairs)
    assert done.returncode == 3 and "comp: " in done.stderr and "--comp" not in done.stderr

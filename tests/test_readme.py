"""Every command and every piece of Python in the README runs as it stands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import make_pairs, run_cli, torchrun

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOWNLOADS = "# downloads"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.strip() for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def test_the_readme_has_commands() -> None:
    assert len([c for c in commands() if c.startswith("mopefuse ")]) >= 10
    assert len(blocks("python")) >= 1


def test_make_targets_run_the_commands_that_the_readme_shows() -> None:
    makefile = (ROOT / "Makefile").read_text()
    made = [words_of(command) for command in commands() if command.startswith("make ")]
    assert made == [["make", "demo"], ["make", "test"]]
    for target, does in (("demo", "mopefuse demo --overwrite"), ("test", "python -m pytest")):
        assert re.search(rf"^{target}: \$\(INSTALLED\)\n\t\$\(BIN\)/{re.escape(does)}( -.*)?$", makefile, re.MULTILINE), target


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's commands find what they name."""
    from transformers import BertConfig, BertModel

    root = tmp_path_factory.mktemp("readme")
    make_pairs(root / "my-pairs")
    make_pairs(root / "photos", counts={"train": 30})
    rows = [json.loads(line) for line in (root / "photos" / "train.jsonl").read_text().splitlines()]
    lines = [f'{row["text"]},{row["img"]},{row["label"]}' for row in rows]
    (root / "products.csv").write_text("\n".join(["title,photo,category", *lines]) + "\n")
    for name in ("poster.jpg", "shoe.jpg"):
        shutil.copy(root / "my-pairs" / "images" / "train-0.png", root / name)
    (study,) = [block for block in blocks("yaml") if "cells:" in block]
    (root / "my-study.yaml").write_text(study)
    small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=200)
    BertModel(small).save_pretrained(root / "my-bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"what is the red green blue digit".split()]
    (root / "my-bert" / "vocab.txt").write_text("\n".join(words))
    (root / "my-bert" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return root


def test_every_command_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one folder. Training is cut short; what downloads must say what to do without a network."""
    monkeypatch.chdir(workplace)
    for command in commands():
        words = words_of(command)
        if words[0] in ("make", "pip", "git", "cd"):
            continue
        short = ["--set", "train.max_steps=3", "--device", "cpu"] if "train" in words and "--resume" not in words else []
        if words[0] == "torchrun":
            assert words[1:5] == ["--nproc-per-node", "2", "-m", "mopefuse"], command
            done = torchrun(2, *words[5:], *short)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            continue
        assert words[0] == "mopefuse", command
        if words[1] == "demo":
            short = ["--steps", "3"]
        done = run_cli(*words[1:], *short, HF_HUB_OFFLINE="1", HF_HOME=str(workplace / "empty-cache"))
        expected = 5 if DOWNLOADS in command else 0
        assert done.returncode == expected, f"{command}\n{done.stdout}\n{done.stderr}"
        assert expected == 0 or "fix:" in done.stderr


def test_every_piece_of_python_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_the_picture_is_there() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)

"""Helpers for tests of the README and the documentation: the code blocks of a page, and a folder with what its commands
name."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import call, make_pairs, short_start, torchrun, write_rows

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOT_OURS = ("make", "pip", "git", "cd", ".venv/bin/python")


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Return the words of every command in the `sh` blocks of a page, in order."""
    lines = [line.strip() for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words: list[str]) -> None:
    """Run one command in this process. Training is cut to three steps, and the simple models before it to a few."""
    trains = ("train" in words and "--resume" not in words) or words[1] == "study"
    short = ["--set", "device=cpu", "--set", "train.max_steps=3", "--set", "linear.strengths=[1]"] if trains else []
    if words[1] == "study" and "--dry-run" not in words:
        short += ["--set", "warm_start=none"]  # its cells are other processes, where starts are not short
    if words[0] == "torchrun":
        assert words[1:5] == ["--nproc-per-node", "2", "-m", "mopefuse"], words
        done = torchrun(2, *words[5:], *short)
    else:
        assert words[0] == "mopefuse", words
        with short_start(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("mopefuse.fusion.mlp_fit._MAX_EPOCHS", 3)
            done = call(*words[1:], *short)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"


def run_page(text: str) -> int:
    """Run the commands of a page and then its Python, in the current folder; return the number of commands."""
    own = [words for words in commands(text) if words[0] not in NOT_OURS]
    for words in own:
        run_command(words)
    for block in blocks(text, "python"):
        exec(compile(block, "a page", "exec"), {})
    return len(own)


def furnish(root: Path) -> Path:
    """Write to a folder everything that pages name: tables, images, an encoder."""
    make_pairs(root / "my-pairs")
    make_pairs(root / "multi", multi=True)
    make_pairs(root / "photos", counts={"train": 40})
    rows = [json.loads(line) for line in (root / "photos" / "train.jsonl").read_text().splitlines()]
    _write_csv(root / "products.csv", "title,photo,category", [(row["text"], row["img"], row["label"]) for row in rows])
    several = [(row["text"], f"photos/{row['img']}", "|".join({row["label"], rows[0]["label"]})) for row in rows]
    _write_csv(root / "movies.csv", "text,img,label", several)
    with_gaps(root / "my-pairs", root / "gaps")
    for name in ("poster.jpg", "shoe.jpg"):
        shutil.copy(root / "my-pairs" / "images" / "train-0.png", root / name)
    _save_bert(root / "my-bert")
    return root


def furnish_for_readme(root: Path, recipe: str) -> Path:
    """Write the table, images and recipe of the README's five minutes."""
    make_pairs(root / "photos", counts={"train": 40})
    rows = [json.loads(line) for line in (root / "photos" / "train.jsonl").read_text().splitlines()]
    lines = [(row["text"], f"photos/{row['img']}", row["label"]) for row in rows]
    _write_csv(root / "products.csv", "text,img,label", lines)
    _write_csv(root / "new-products.csv", "text,img", [line[:2] for line in lines[:5]])
    shutil.copy(root / "photos" / "images" / "train-0.png", root / "poster.jpg")
    (root / "products.yaml").write_text(recipe)
    return root


def with_gaps(source: Path, target: Path) -> None:
    """Copy a data set without the text of every fourth row."""
    shutil.copytree(source, target)
    for table in target.glob("*.jsonl"):
        rows = [json.loads(line) for line in table.read_text().splitlines()]
        write_rows(table, [row | ({"text": None} if number % 4 == 0 else {}) for number, row in enumerate(rows)])


def _write_csv(path: Path, header: str, rows: list[tuple[str, ...]]) -> None:
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")


def _save_bert(folder: Path) -> None:
    """Save a small random BERT with a tokenizer."""
    import transformers

    small = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=200
    )
    transformers.BertModel(small).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"what is the red green blue digit".split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')

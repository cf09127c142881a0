"""Rows of MM-IMDB and SNLI-VE compared with rows worked out by hand, and how validation rows are held out of training rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from prepare_cases import (
    MM_IMDB_ROWS,
    MM_IMDB_SKIPPED,
    SNLI_VE_ROWS,
    SNLI_VE_SKIPPED,
    TRAIN_ROWS,
    food101,
    mm_imdb,
    rows_of,
    skipped_in,
    snli_ve,
)

from mopefuse.data.prepare import prepare
from mopefuse.data.sets.food101 import Food101
from mopefuse.data.sets.mm_imdb import MMIMDb
from mopefuse.data.sets.snli_ve import SNLIVE
from mopefuse.errors import DataError

# -- MM-IMDB


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_mm_imdb_rows_have_the_longest_plot_and_the_genres(split: str, tmp_path: Path) -> None:
    prepare(MMIMDb, mm_imdb(tmp_path / "source"), tmp_path / "made")
    expected = [
        {"id": identity, "text": text, "img": f"dataset/{identity}.jpeg", "label": genres}
        for identity, text, genres in MM_IMDB_ROWS[split]
    ]
    assert rows_of(tmp_path / "made", split) == expected
    assert skipped_in(tmp_path / "made") == MM_IMDB_SKIPPED
    labels = (tmp_path / "made" / "labels.txt").read_text().split("\n")
    assert (len(labels), labels[0], labels[6], labels[10]) == (24, "Action", "Documentary", "Film-Noir")
    assert labels[-2:] == ["Western", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[]", "contains a list"),
        (b'{"train": [], "test": []}', "has no list 'dev'"),
        (b'{"train": [133093], "dev": [], "test": []}', "has '133093' in 'train', which cannot be the id of a film"),
        (b'{"train": ["../../etc/passwd"], "dev": [], "test": []}', "which cannot be the id of a film"),
        (b'{"train": [null], "dev": [], "test": []}', "has 'None' in 'train'"),
    ],
)
def test_an_unreadable_split_file_is_an_error(content: bytes, message: str, tmp_path: Path) -> None:
    (mm_imdb(tmp_path / "source") / "split.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepare(MMIMDb, tmp_path / "source", tmp_path / "made")
    assert caught.value.code == "MF-DATA-65" and message in caught.value.what


# -- SNLI-VE


@pytest.mark.parametrize("premise", [False, True])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_snli_ve_rows_have_the_hypothesis_with_or_without_the_caption(split: str, premise: bool, tmp_path: Path) -> None:
    prepare(SNLIVE, snli_ve(tmp_path / "source"), tmp_path / "made", {"premise": premise})
    expected = [
        {
            "id": identity,
            "text": f"A man rides. {text}" if premise else text,
            "img": f"flickr30k_images/{image}.jpg",
            "label": label,
        }
        for identity, text, image, label in SNLI_VE_ROWS[split]
        if not (premise and text == "No caption.")
    ]
    assert rows_of(tmp_path / "made", split) == expected
    without_caption = [("snli_ve_train.jsonl", 12, "no premise")] if premise else []
    assert sorted(skipped_in(tmp_path / "made")) == sorted(SNLI_VE_SKIPPED + without_caption)
    assert (tmp_path / "made" / "labels.txt").read_text() == "entailment\nneutral\ncontradiction\n"


def test_an_id_that_looks_like_a_generated_one_stays_unique(tmp_path: Path) -> None:
    source = snli_ve(tmp_path / "source")
    row = {"gold_label": "neutral", "sentence2": "x", "Flickr30K_ID": "100"}
    lines = [row | {"pairID": "train-2"}, row, row | {"pairID": "train-2"}]
    (source / "snli_ve_train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prepare(SNLIVE, source, tmp_path / "made")
    assert [row["id"] for row in rows_of(tmp_path / "made", "train")] == ["train-2", "train-2+", "train-3"]


def test_the_photographs_may_be_in_the_subfolder_of_their_archive(tmp_path: Path) -> None:
    source = snli_ve(tmp_path / "source")
    (source / "flickr30k_images").rename(source / "flickr30k-images")
    prepare(SNLIVE, source, tmp_path / "made")
    assert rows_of(tmp_path / "made", "test")[0]["img"] == "flickr30k-images/100.jpg"


# -- holding out


def test_training_and_held_out_rows_together_are_all_rows(tmp_path: Path) -> None:
    source = food101(tmp_path / "source")
    prepare(Food101, source, tmp_path / "made", {"val": 4, "seed": 1})
    train, val = rows_of(tmp_path / "made", "train"), rows_of(tmp_path / "made", "val")
    assert Counter(row["label"] for row in val) == {"apple_pie": 2, "beignets": 1, "miso_soup": 1}
    assert sorted(row["id"] for row in train + val) == sorted(TRAIN_ROWS)
    titles = (source / "texts/train_titles.csv").read_bytes().split(b"\r\n")
    first, again = titles[0], titles[12]
    others = [line for line in titles if line not in (first, again)]
    (source / "texts/train_titles.csv").write_bytes(b"\r\n".join([first, again, *others[::-1]]))
    prepare(Food101, source, tmp_path / "reordered", {"val": 4, "seed": 1})
    assert rows_of(tmp_path / "reordered", "val") == val
    assert rows_of(tmp_path / "reordered", "train") == train

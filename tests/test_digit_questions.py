"""Claims about the digit questions data set."""

import filecmp
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mopefuse.data.sets import digit_questions as dq
from mopefuse.errors import DataError

COUNTS = {"train": 60, "val": 20, "test": 240}
CELLS = [np.s_[:8, :8], np.s_[:8, 8:], np.s_[8:, :8], np.s_[8:, 8:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "made"
    assert dq.make(folder, seed=3, **COUNTS) == COUNTS
    return folder


def rows(folder: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read_cell(pixels: np.ndarray, split: str) -> tuple[str, str]:
    """Find colour and digit of a painted cell by comparing its pixels with all handwriting of the split."""
    channels = "".join("rgb"[channel] for channel in np.flatnonzero(pixels.reshape(-1, 3).any(axis=0)))
    _, values, digits = dq.handwriting(split)
    found = set(digits[(values * 255.0 // 16 == pixels.max(axis=-1)).all(axis=(1, 2))].tolist())
    assert len(found) == 1
    return {"r": "red", "g": "green", "b": "blue", "rg": "yellow"}[channels], str(found.pop())


def asked_cell(text: str, colours: list[str]) -> int:
    vertical = {"top": 0, "upper": 0, "bottom": 2, "lower": 2}
    horizontal = {"left": 0, "right": 1}
    words = text.replace("?", " ").replace(";", " ").replace(":", " ").replace(",", " ").split()
    for colour in colours:
        if colour in words:
            return colours.index(colour)
    return sum(places[word] for places in (vertical, horizontal) for word in words if word in places)


@pytest.mark.parametrize("split", dq.SPLITS)
def test_the_label_is_the_digit_that_the_text_asks_for(folder: Path, split: str) -> None:
    for row in rows(folder, split)[:40]:
        pixels = np.asarray(Image.open(folder / row["img"]))
        assert pixels.shape == (16, 16, 3)
        cells = [read_cell(pixels[cell], split) for cell in CELLS]
        colours = [colour for colour, _ in cells]
        assert len(set(colours)) == len({digit for _, digit in cells}) == 4
        assert row["label"] == cells[asked_cell(row["text"], colours)][1]


def test_rows_have_the_native_format(folder: Path) -> None:
    for split, count in COUNTS.items():
        found = rows(folder, split)
        assert len(found) == len({row["id"] for row in found}) == count
        assert all(list(row) == ["id", "text", "img", "label"] and (folder / row["img"]).is_file() for row in found)
    about = json.loads((folder / "dataset.json").read_text())
    assert (about["seed"], about["rows"]) == (3, COUNTS)


def test_no_handwriting_is_in_two_splits() -> None:
    parts = {split: dq.handwriting(split)[0].tolist() for split in dq.SPLITS}
    assert sorted(sample for part in parts.values() for sample in part) == list(range(1797))
    for split in dq.SPLITS:
        used = dq.compose(split, 200, seed=0).samples_N4
        assert set(used.ravel().tolist()) <= set(parts[split])
        assert set(dq.handwriting(split)[2].tolist()) == set(range(10))


def test_composition_agrees_with_its_samples() -> None:
    made = dq.compose("val", 100, seed=1)
    lookup = dict(zip(*(part.tolist() for part in (dq.handwriting("val")[0], dq.handwriting("val")[2])), strict=True))
    assert [[lookup[sample] for sample in four] for four in made.samples_N4.tolist()] == made.digits_N4.tolist()


def test_only_the_test_split_has_the_unseen_templates() -> None:
    unseen = [text.split("{}") for kind in dq.TEST_ONLY_TEMPLATES.values() for text in kind]

    def share(split: str) -> float:
        texts = [question.text for question in dq.compose(split, 2000, seed=0).questions]
        return sum(any(text.startswith(a) and text.endswith(b) for a, b in unseen) for text in texts) / len(texts)

    assert share("train") == share("val") == 0
    assert 0.15 < share("test") < 0.35
    for kind, templates in dq.TEST_ONLY_TEMPLATES.items():
        assert not set(templates) & set(dq.TRAIN_TEMPLATES[kind])


def test_neither_modality_alone_determines_the_label() -> None:
    made = dq.compose("train", 8000, seed=0)
    labels = np.array([question.label for question in made.questions])
    assert np.bincount(labels, minlength=10).max() / len(labels) < 0.12
    four = made.digits_N4[[question.image for question in made.questions]]
    assert (four == labels[:, None]).mean(axis=0) == pytest.approx(0.25, abs=0.02)
    kinds: dict[str, list[int]] = {}
    for question in made.questions:
        kinds.setdefault(question.text, []).append(question.label)
    assert sum(np.bincount(labels_N).max() for labels_N in kinds.values()) / len(labels) < 0.2


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(folder: Path, tmp_path: Path) -> None:
    dq.make(tmp_path / "again", seed=3, **COUNTS)
    assert files(tmp_path / "again") == files(folder)
    assert filecmp.cmpfiles(folder, tmp_path / "again", files(folder), shallow=False)[0] == files(folder)
    dq.make(tmp_path / "other", seed=4, **COUNTS)
    assert rows(tmp_path / "other", "train") != rows(folder, "train")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]  # nothing temporary is left


def test_generating_it_again_in_place_changes_nothing(folder: Path) -> None:
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    assert dq.make(folder, seed=3, **COUNTS) == COUNTS
    assert {name: (folder / name).stat().st_mtime_ns for name in files(folder)} == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    dq.make(tmp_path, train=1, val=1, test=1)
    assert len(rows(tmp_path, "train")) == 1


def test_another_folder_is_refused_and_left_alone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a different data set"):
        dq.make(folder, seed=4, **COUNTS)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not empty"):
        dq.make(tmp_path)
    assert files(tmp_path) == ["thesis.txt"]
    with pytest.raises(DataError, match="not empty"):
        dq.make(tmp_path / "thesis.txt")
    dq.make(tmp_path / "made", train=4, val=4, test=4)
    (tmp_path / "made" / "train.jsonl").write_text("changed")
    with pytest.raises(DataError, match="changed, added or removed"):
        dq.make(tmp_path / "made", train=4, val=4, test=4)


def test_impossible_counts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one row"):
        dq.make(tmp_path / "none", train=0)

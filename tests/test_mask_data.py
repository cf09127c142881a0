"""Data sets of masks: ids that are a mistake, labels that are no masks, notices, and evaluation on other masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call, code_of
from PIL import Image
from test_segmentation import SPECS, write_scenes

from mopefuse.config.schema import Data, build_config
from mopefuse.data.load import load_data
from mopefuse.errors import DataError, Notice
from mopefuse.runs.load import with_labels
from mopefuse.tasks.segmentation import Segmentation


def change_masks(folder: Path, change: Callable[[np.ndarray[Any, Any]], None], which: str = "*") -> None:
    """Change the ids in some masks."""
    for file in sorted((folder / "masks").glob(f"{which}.png")):
        ids = np.array(Image.open(file))
        change(ids)
        Image.fromarray(ids).save(file)


def refused(folder: Path, **settings: Any) -> DataError:
    with pytest.raises(DataError) as error:
        load_data(Data(path=str(folder), **settings))
    return error.value


# -- ids


@pytest.mark.parametrize(("ids", "stray"), [((0, 255), 254), ((0, 255), 17), ((0, 255), 1), ((0, 1), 17)])
def test_a_stray_pixel_does_not_make_an_object_a_class(ids: tuple[int, int], stray: int, tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, ids)

    def stain(mask: np.ndarray[Any, Any]) -> None:
        mask[3, 3] = stray

    change_masks(folder, stain, "train-5")
    error = refused(folder)
    assert error.code == "MF-DATA-404" and f"the ids 0 and {ids[1]}, and 1 of 12 also {stray}" in error.what
    assert error.where == "train.jsonl:6, masks/train-5.png"
    (folder / "labels.txt").write_text("".join(f"class {number}\n" for number in range(255)))
    assert len(load_data(Data(path=str(folder))).labels) == 255, "as the message says"


def test_smoothed_masks_are_recognised(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, (0, 255))

    def smooth(mask: np.ndarray[Any, Any]) -> None:
        mask[1::4, 1::4] = np.arange(8) * 33 + 1

    change_masks(folder, smooth)
    error = refused(folder)
    assert "as if they were smoothed" in error.what and "nearest neighbour" in error.fix
    report = json.loads(call("data", "check", folder, "--json").stdout)
    assert report["kinds"] == {"unintended-ids": 1} and "smoothed" in report["problems"][0]["message"]


@pytest.mark.parametrize("ids", [(0, 1, 2), (0, 1, 2, 255), (0, 3, 7, 255), (0, 1, 3)])
def test_classes_are_accepted_and_gaps_are_named(ids: tuple[int, ...], tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, ids)
    data = load_data(Data(path=str(folder)))
    known = [one for one in ids if one != 255]
    assert len(data.labels) == known[-1] + 1 and not data.task.marks_object
    gaps = [notice for notice in data.notices if "classes occur in none of train" in notice]
    assert len(gaps) == (len(known) <= known[-1])
    report = json.loads(call("data", "check", folder, "--json").stdout)
    assert report["kinds"] == ({"unused-class-ids": 1} if gaps else {})
    if gaps:
        assert f"masks have the ids {', '.join(map(str, known[:-1]))} and {known[-1]} only" in gaps[0]
        (folder / "labels.txt").write_text("".join(f"class {number}\n" for number in range(known[-1] + 1)))
        assert not load_data(Data(path=str(folder))).notices


def test_a_rare_class_is_accepted(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, (0, 1))

    def stain(mask: np.ndarray[Any, Any]) -> None:
        mask[3, 3] = 2

    change_masks(folder, stain, "train-5")
    assert load_data(Data(path=str(folder))).labels == ("0", "1", "2")


def test_masks_in_which_no_object_counts_are_refused(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, (0, 1))
    error = refused(folder, ignore_index=1)
    assert error.code == "MF-DATA-07" and "ids 0 and 1, of which data.ignore_index=1 leaves 0" in error.what
    assert error.fix == "remove data.ignore_index"

    def clear(mask: np.ndarray[Any, Any]) -> None:
        mask[:] = 0

    change_masks(folder, clear, "train-*")
    error = refused(folder)
    assert error.what == "masks of train have the id 0 only, so there is nothing to learn" and "with 1 or 255" in error.fix
    assert json.loads(call("data", "check", folder, "--json").stdout)["kinds"] == {"one-class": 1}


# -- labels that are no masks


def relabel(folder: Path, split: str, labels: dict[int, Any]) -> None:
    file = folder / f"{split}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [{**row, "label": labels.get(number, row["label"])} for number, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_label_that_is_no_mask_is_the_mistake(split: str, tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, (0, 1))
    relabel(folder, split, {2: "a cat"})
    error = refused(folder)
    assert "a cat" in error.what and error.where.startswith(f"{split}.jsonl:3")


def test_a_split_without_rows_does_not_make_masks_classes(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, (0, 1))
    (folder / "test.jsonl").write_text("")
    assert refused(folder).what == "the test split has no rows"


def test_labels_of_another_split_that_are_no_masks_are_named(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, (0, 1))
    relabel(folder, "val", dict.fromkeys(range(4), "cat"))
    error = refused(folder)
    assert error.what == "the labels of val are not paths of masks, as those of train are, such as 'cat'"


def test_labels_that_are_no_files_are_not_searched_in_another_folder(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, (0, 1))
    relabel(folder, "train", {number: f"{number}.5" for number in range(12)})
    error = refused(folder, task="segmentation")
    assert error.what == "labels are not paths of masks (PNG files), such as 0.5"
    assert error.fix == "name the column of the masks with --label-col"


def test_a_mask_of_another_shape_is_a_notice_of_training(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, (0, 1))
    Image.new("L", (24, 32)).save(folder / "masks" / "val-1.png")
    (notice,) = load_data(Data(path=str(folder))).notices
    assert notice.startswith("1 mask has another shape than its image and is stretched to fit; the first, val.jsonl:2: ")


# -- settings and evaluation


def test_settings_and_notices_are_in_the_words_of_masks(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "data", (0, 1, 2, 4))
    train = ("train", *SPECS, "--data", folder, "--out", tmp_path / "run", "--epochs", "1", "--batch", "8", "--experts", "2")
    done = call(*train, "--warm-start", "linear")
    assert done.returncode == 3 and "· --warm-start · fix: remove --warm-start" in done.stderr, done.stderr
    done = call(*train, "--threshold", "tuned", "--layers", "last:3", "--cache-prefix", "on")
    assert "--threshold tuned has no effect: labels are masks" in done.stderr, done.stderr
    assert "train: 1 distinct text encoded once by" in done.stderr, "all texts are the same"
    assert "the first of 4 layers of" in done.stderr and "for 12 distinct images" in done.stderr
    assert "test: 1 class has no pixel; mean IoU is averaged over the others" in done.stderr


def trained_on(folder: Path) -> dict[str, Any]:
    data = load_data(Data(path=str(folder)))
    task = data.task.fitted(data.sparse_targets("train"), build_config({"main": "tiny:vision", "comp": "tiny:text"}))
    return {"labels": list(data.labels), "task": task.facts()}


def with_named_objects(folder: Path) -> Path:
    """The object of a row is the class that its text names."""
    write_scenes(folder, (0, 1, 2))
    (folder / "labels.txt").write_text("sky\nroad\ncar\n")
    for split in ("train", "val", "test"):
        file = folder / f"{split}.jsonl"
        file.write_text(file.read_text().replace("a street", "car"))
    return folder


def test_an_object_is_found_however_other_masks_mark_it(tmp_path: Path) -> None:
    folders = [
        write_scenes(tmp_path / "1", (0, 1)),
        write_scenes(tmp_path / "255", (0, 255)),
        with_named_objects(tmp_path / "n"),
    ]
    for trained in map(trained_on, folders):
        for folder, names in zip(folders, ((), (), ("sky", "road", "car")), strict=True):
            data = with_labels(load_data(Data(path=str(folder))), trained, "test")
            assert isinstance(data.task, Segmentation) and data.task.names == names
            wanted = {1: 1, 255: 255}.get(int(folder.name) if folder.name.isdigit() else 2, 2)
            ids = np.stack([np.array(Image.open(folder / row.labels[0])) for row in data.splits["test"].rows])
            assert np.array_equal(data.targets("test").numpy() == 1, ids == wanted)


def test_a_model_is_not_evaluated_on_masks_of_another_kind(tmp_path: Path) -> None:
    scenes, objects = write_scenes(tmp_path / "scenes", (0, 1, 2)), write_scenes(tmp_path / "objects", (0, 255))
    for one, other in ((scenes, objects), (objects, scenes)):
        data = load_data(Data(path=str(other)))
        assert code_of(lambda data=data, one=one: with_labels(data, trained_on(one), "test")) == "MF-DATA-05"
    two = load_data(Data(path=str(write_scenes(tmp_path / "two", (0, 1)))))
    with pytest.warns(Notice, match="masks have the ids 0 and 1 only, which are read as the classes 0 and 1"):
        assert not with_labels(two, trained_on(scenes), "test").task.marks_object


def test_a_check_does_not_rank_classes_that_are_in_as_many_masks(tmp_path: Path) -> None:
    assert "most frequent" not in call("data", "check", write_scenes(tmp_path, (0, 1))).stdout


# -- prepared from folders


def write_source(folder: Path, images: str, masks: str, name: str = "street_{}.png", colours: bool = False) -> Path:
    """Six images and masks with the classes 0 and 1, as a data set is distributed."""
    (folder / images).mkdir(parents=True)
    (folder / masks).mkdir(parents=True)
    for number in range(6):
        ids = np.zeros((12, 16), np.uint8)
        ids[number:, 4:] = 1
        Image.fromarray(np.full((12, 16, 3), 40 * number, np.uint8)).save(folder / images / name.format(number))
        mask = Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], axis=-1)) if colours else Image.fromarray(ids)
        mask.save(folder / masks / name.format(number))
    return folder


def prepared(source: Path, out: Path) -> tuple[Any, set[str]]:
    """What `data prepare scenes` did, and the texts of the rows."""
    done = call("data", "prepare", "scenes", source, out)
    tables = out.glob("*.jsonl")
    return done, {
        json.loads(line)["text"] for file in tables if file.stem != "skipped" for line in file.read_text().splitlines()
    }


def test_ids_have_the_names_in_the_file_of_classes(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "images", "masks")
    (source / "classes.txt").write_text("grass\ncow\n")
    done, texts = prepared(source, tmp_path / "out")
    assert done.returncode == 0 and texts == {"grass", "cow"}, done.stderr


@pytest.mark.parametrize(("name", "noticed"), [("street_{}.png", True), ("0016E5_{}.png", False)], ids=["others", "CamVid"])
def test_ids_without_names_are_those_of_camvid_and_a_notice_says_so(name: str, noticed: bool, tmp_path: Path) -> None:
    done, texts = prepared(write_source(tmp_path / "source", "train", "trainannot", name), tmp_path / "out")
    assert done.returncode == 0 and texts == {"sky", "building"}, done.stderr
    assert ("there is no classes.txt" in done.stderr) == noticed, done.stderr


def test_coloured_masks_are_named_as_the_reason(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "images", "masks", colours=True)
    (source / "classes.txt").write_text("grass\ncow\n")
    done, _ = prepared(source, tmp_path / "out")
    assert done.returncode == 4 and "mask has colours instead of class ids (4)" in done.stderr, done.stderr
    assert "correct these files" in done.stderr

"""Every kind of bad data that occurs in practice, by its number in the list of faults, tested on the command line.

Each case changes one thing in a valid data set and gives the exit code and the message of training.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, call, make_pairs, ranks, thinned, write_rows
from PIL import Image

from mopefuse.config.schema import Data
from mopefuse.data.bad_rows import _allow
from mopefuse.data.load import load_data
from mopefuse.encoders.base import create_encoder

Change = Callable[[Path], object]
IMAGE = "images/train-3.png"  # of train.jsonl:4


def image(content: bytes) -> Change:
    return lambda root: (root / IMAGE).write_bytes(content)


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> Change:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return image(buffer.getvalue())


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def cut(kind: str) -> Change:
    buffer = io.BytesIO()
    noise().save(buffer, kind)
    return image(buffer.getvalue()[:-300])


def chunk(kind: bytes, body: bytes) -> bytes:
    """Make a chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header_only(width: int, height: int) -> Change:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return image(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def text_bomb(root: Path) -> None:
    text = chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"\0" * 100_000_000, 9))
    buffer = io.BytesIO()
    noise().save(buffer, "PNG")
    whole = buffer.getvalue()
    (root / IMAGE).write_bytes(whole[:33] + text + whole[33:])


def rows_of(root: Path, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]


def row(split: str = "train", line: int = 4, **fields: Any) -> Change:
    def change(root: Path) -> None:
        rows = rows_of(root, split)
        rows[line - 1] |= fields
        write_rows(root / f"{split}.jsonl", rows)

    return change


def raw(line: bytes, number: int = 4) -> Change:
    """Replace a line of train.jsonl."""

    def change(root: Path) -> None:
        lines = (root / "train.jsonl").read_bytes().splitlines()
        lines[number - 1] = line
        (root / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    return change


def whole(rewrite: Callable[[bytes], bytes]) -> Change:
    return lambda root: (root / "train.jsonl").write_bytes(rewrite((root / "train.jsonl").read_bytes()))


def special(kind: str) -> Change:
    def change(root: Path) -> None:
        (root / IMAGE).unlink()
        if kind == "pipe":
            os.mkfifo(root / IMAGE)
        elif kind == "folder":
            (root / IMAGE).mkdir()
        else:
            row(img="/dev/zero")(root)

    return change


def other_case(root: Path) -> None:
    (root / IMAGE).rename(root / IMAGE.replace("train-3.png", "TRAIN-3.PNG"))


def every_label(label: str, *splits: str) -> Change:
    def change(root: Path) -> None:
        for split in splits:
            write_rows(root / f"{split}.jsonl", [entry | {"label": label} for entry in rows_of(root, split)])

    return change


def renamed(root: Path) -> None:
    rows = [{"id": r["id"], "caption": r["text"], "image": r["img"], "label": r["label"]} for r in rows_of(root)]
    write_rows(root / "train.jsonl", rows)


def copied(root: Path) -> None:
    """The test split has an image and a text of train."""
    (root / "images" / "test-2.png").write_bytes((root / IMAGE).read_bytes())
    write_rows(root / "train.jsonl", [entry | {"text": f"text of {entry['id']}"} for entry in rows_of(root)])
    row("test", 2, text="text of train-4")(root)


def animation(kind: str) -> Change:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


exif = Image.Exif()
exif[0x0112] = 6
AT = "train.jsonl:4"
ACCEPTED, DATA = 0, 4

CASES: list[tuple[str, Change, int, list[str]]] = [
    ("missing", lambda root: (root / IMAGE).unlink(), DATA, ["MF-DATA-11", f"image not found: {IMAGE}", f"{AT}, id train-3"]),
    ("missing, other case", other_case, DATA, ["image not found", "TRAIN-3.PNG", "upper and lower case"]),
    ("no image empty", image(b""), DATA, ["not a readable image (it is empty)", AT]),
    ("no image HTML", image(b"<!DOCTYPE html><p>404"), DATA, ["not a readable image (looks like HTML)"]),
    ("no image SVG", image(b"<svg xmlns='x'/>"), DATA, ["looks like SVG"]),
    ("truncated JPEG", cut("JPEG"), DATA, ["MF-DATA-13", "truncated", AT]),
    ("truncated PNG", cut("PNG"), DATA, ["MF-DATA-13", AT]),
    ("20,000 pixels wide", header_only(20_000, 20_000), DATA, ["MF-DATA-12", "400,000,000 pixels", AT]),
    ("100 million pixels", header_only(10_000, 10_000), DATA, ["MF-DATA-12", "10000 x 10000"]),
    ("mode CMYK", saved(Image.new("CMYK", (8, 8)), "JPEG"), ACCEPTED, []),
    ("mode P", saved(Image.new("P", (8, 8)), transparency=0), ACCEPTED, []),
    ("mode L", saved(Image.new("L", (8, 8))), ACCEPTED, []),
    ("mode 1", saved(Image.new("1", (8, 8))), ACCEPTED, []),
    ("mode LA", saved(Image.new("LA", (8, 8))), ACCEPTED, []),
    ("mode RGBA", saved(Image.new("RGBA", (8, 8))), ACCEPTED, []),
    ("mode I;16", saved(Image.new("I;16", (8, 8))), ACCEPTED, []),
    ("animation GIF", animation("GIF"), ACCEPTED, [f"1 image is animated, such as {IMAGE}: only its first frame is read"]),
    ("animation WebP", animation("WEBP"), ACCEPTED, ["its first frame is read"]),
    ("EXIF orientation", saved(noise(), "JPEG", exif=exif), ACCEPTED, []),
    ("size 1 x 1", saved(noise(1, 1)), ACCEPTED, []),
    ("size 1 x 5000", saved(noise(1, 5000)), ACCEPTED, []),
    ("format TIFF", saved(noise(), "TIFF"), DATA, ["MF-DATA-14", "of the format TIFF, which is not enabled", AT]),
    ("format PSD", image(b"8BPS\0\1"), DATA, ["MF-DATA-14", "PSD"]),
    ("format PDF", image(b"%PDF-1.7"), DATA, ["MF-DATA-14", "PDF"]),
    ("format FITS", image(b"SIMPLE  =                    T"), DATA, ["MF-DATA-14", "FITS"]),
    ("format EPS", image(b"%!PS-Adobe-3.0 EPSF-3.0"), DATA, ["MF-DATA-14", "PostScript"]),
    ("text bomb", text_bomb, DATA, ["MF-DATA-13", AT]),
    ("special file pipe", special("pipe"), DATA, ["MF-DATA-15", "not a regular file", AT]),
    ("special file folder", special("folder"), DATA, ["MF-DATA-15", "not a regular file", AT]),
    ("special file device", special("device"), DATA, ["MF-SEC-01", AT]),
    ("bad JSON", raw(b'{"id": "x", nonsense'), DATA, ["MF-DATA-03", f"{AT} is not JSON (column 13"]),
    ("a list", raw(b"[1, 2]"), DATA, [f"{AT} is a list, expected an object"]),
    ("byte order mark", whole(lambda content: b"\xef\xbb\xbf" + content), ACCEPTED, []),
    ("not UTF-8", raw(b'{"id": "\xe9"}'), DATA, [f"{AT} is not UTF-8 (byte 0xe9 at 9)", "iconv -f latin1"]),
    ("JSON NaN", raw(b'{"id": NaN}'), DATA, [f"{AT} has NaN"]),
    ("JSON twice", raw(b'{"id": "1", "id": "2"}'), DATA, [f"{AT} has a key twice"]),
    ("content UTF-16", whole(lambda content: content.decode().encode("utf-16")), DATA, ["MF-DATA-08", "this is UTF-16"]),
    ("content gzip", whole(gzip.compress), DATA, ["MF-DATA-08", "this is gzip"]),
    ("content Parquet", whole(lambda content: b"PAR1" + content), DATA, ["MF-DATA-08", "this is Parquet"]),
    ("line ends", whole(lambda c: b"\r\n\r\n".join(c.splitlines()).replace(b"the red", "the\u2028red".encode())), ACCEPTED, []),
    ("text empty", row(text=""), ACCEPTED, []),
    ("text white space", row(text=" \t\n"), ACCEPTED, []),
    ("very long text", row(text="word " * 2_000_000), ACCEPTED, []),
    ("control characters", row(text="a\ud800b\0c\x07"), ACCEPTED, []),
    ("text is null", row(text=None), DATA, [f"{AT} text is null", "data.allow_missing_text=true"]),
    ("text is number", row(text=3), DATA, [f"{AT} text is a number"]),
    ("text is list", row(text=["a"]), DATA, [f"{AT} text is a list"]),
    ("columns", renamed, DATA, ["has no text or img; found caption, id, image, label", "--text-col caption --image-col image"]),
    ("unknown", row("val", 2, label="unheard"), DATA, ["unheard (1) · val.jsonl:2, id val-1", "correct them", "labels.txt"]),
    ("unknown, a typo", row("val", 2, label="aa"), DATA, ["aa (1; did you mean a?) · val.jsonl:2"]),
    ("label type", row(label=0), DATA, [f"{AT} label is a number, expected a string", "quote it"]),
    ("label type no", row(label=False), DATA, [f"{AT} label is a boolean", "quote it"]),
    ("label type list", row(label=["a"]), DATA, ["MF-DATA-05", "some labels are strings and some are lists", AT]),
    ("no samples", every_label("a", "val", "test"), ACCEPTED, ["2 labels have no sample; macro-F1 is"]),
    ("one class", every_label("a", "train", "val", "test"), DATA, ["MF-DATA-07", "a classifier needs at least two"]),
    ("split empty", whole(lambda content: b"\n"), DATA, ["MF-DATA-04", "the train split has no rows"]),
    ("split missing", lambda root: (root / "val.jsonl").unlink(), DATA, ["the val split is missing", "--val-fraction"]),
    ("duplicate id", row(id="train-0"), DATA, [f"{AT} duplicate id 'train-0', first used on line 1"]),
    ("leak", copied, ACCEPTED, ["1 image of test is also in train", "1 text of test is also in train"]),
    ("path outside", row(img="../../etc/passwd"), DATA, ["MF-SEC-01", "the image path is outside the data folder", AT]),
]


@pytest.mark.parametrize(
    ("change", "exit_code", "message"), thinned([case[1:] for case in CASES], step=3), ids=[case[0] for case in CASES]
)
def test_bad_data_end_training_with_the_right_error(
    tmp_path: Path, change: Change, exit_code: int, message: list[str]
) -> None:
    root = make_pairs(tmp_path / "data")
    change(root)
    done = call("train", *TINY, "--data", root, "--out", tmp_path / "run", "--steps", "1")
    assert done.returncode == exit_code, done.stderr
    assert [part for part in message if part not in done.stderr] == []
    assert "Traceback" not in done.stderr


def test_every_case_has_a_unique_name() -> None:
    """Otherwise, two cases of the same name could not be told apart in a list of failures."""
    assert len({case[0] for case in CASES}) == len(CASES)


HOSTILE = ["日本", "עברית", "🙂", "<script>alert(1)</script>", "=1+1", "İ", "a\tb", '"quoted"', "100%"]


def test_labels_in_any_script_are_preserved(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data", counts={"train": 18, "val": 9, "test": 9})
    for split in ("train", "val", "test"):
        rows = rows_of(root, split)
        write_rows(root / f"{split}.jsonl", [entry | {"label": HOSTILE[i % 9]} for i, entry in enumerate(rows)])
    done = call("train", *TINY, "--data", root, "--out", tmp_path / "run", "--steps", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert [entry["label"] for entry in json.loads(done.stdout)["per_label"]] == sorted(HOSTILE)
    first = json.loads((tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert (first["true"], set(first["probabilities"])) == (HOSTILE[0], set(HOSTILE))
    assert call("eval", tmp_path / "run").returncode == 0


def test_a_multi_label_row_without_labels_is_a_sample(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data", multi=True)
    row(label=[])(root)
    row("test", 1, label=[])(root)
    done = call("train", *TINY, "--data", root, "--out", tmp_path / "run", "--steps", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]["test"] == 7


def test_strict_refuses_leaks(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data")
    copied(root)
    done = call("train", *TINY, "--data", root, "--out", tmp_path / "run", "--steps", "1", "--strict")
    assert done.returncode == 4
    assert "MF-DATA-27" in done.stderr


def test_empty_texts_are_counted_and_are_not_leaks(tmp_path: Path) -> None:
    make_pairs(tmp_path)
    for split in ("train", "val"):
        lines = (tmp_path / f"{split}.jsonl").read_text().splitlines()
        rows = [json.loads(line) | {"text": f"text {number} of {split}"} for number, line in enumerate(lines)]
        write_rows(tmp_path / f"{split}.jsonl", [rows[0] | {"text": ""}, rows[1] | {"text": " "}, *rows[2:]])
    notices = load_data(Data(path=str(tmp_path))).notices
    assert notices == tuple(
        f"{split}: 2 texts are empty; to treat them as missing, add --on-missing absent" for split in ("train", "val")
    )


def test_phrases_that_repeat_in_every_split_are_not_leaks(tmp_path: Path) -> None:
    done = call("train", *TINY, "--data", make_pairs(tmp_path / "data"), "--out", tmp_path / "run", "--steps", "1", "--strict")
    assert done.returncode == 0, done.stderr


@pytest.mark.process
def test_a_split_smaller_than_the_processes_is_evaluated_exactly(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data", counts={"train": 6, "val": 3, "test": 1})
    found = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        done = ranks(processes, "train", *TINY, "--data", str(root), "--out", str(run), "--steps", "1", "--json")
        assert done.returncode == 0, done.stderr
        assert len((run / "predictions.jsonl").read_text().splitlines()) == 1
        found.append(json.loads(done.stdout)["splits"]["test"]["accuracy"])
    assert found[0] == found[1]


def test_other_image_folders_are_read_if_they_are_named(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data")
    noise().save(tmp_path / "else.png")
    row(img=str(tmp_path / "else.png"))(root)
    options = ("train", *TINY, "--data", root, "--steps", "1")
    assert call(*options, "--out", tmp_path / "no").returncode == 4
    done = call(*options, "--out", tmp_path / "yes", "--image-root", tmp_path)
    assert done.returncode == 0, done.stderr


def test_bad_rows_are_skipped_on_request_up_to_a_limit(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data")
    image(b"")(root)
    raw(b"{", 7)(root)
    options = ("train", *TINY, "--data", root, "--steps", "1", "--on-bad", "skip")
    few = call(*options, "--out", tmp_path / "few")
    assert few.returncode == 4
    assert "2 of 12 rows are bad; at most a fraction of 0.01 may be skipped" in few.stderr
    done = call(*options, "--out", tmp_path / "run", "--set", "data.max_bad_fraction=0.2")
    assert done.returncode == 0, done.stderr
    assert "train: 2 bad rows skipped; the first: train.jsonl:4, id train-3" in done.stderr
    skipped = json.loads((tmp_path / "run" / "manifest.json").read_text())["skipped"]
    assert [entry[:10] for entry in skipped["train"]] == ["MF-DATA-13", "MF-DATA-03"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]["train"] == 10
    noise().save(root / IMAGE)
    resumed = call("train", "--out", tmp_path / "run", "--resume", "--epochs", "1")
    assert resumed.returncode == 4, "skipped rows are part of the fingerprint"


def test_a_path_outside_its_root_is_never_skipped(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data")
    row(img="../secret.png")(root)
    options = ("--on-bad", "skip", "--set", "data.max_bad_fraction=0.9")
    done = call("train", *TINY, "--data", root, "--out", tmp_path / "run", "--steps", "1", *options)
    assert done.returncode == 4
    assert "MF-SEC-01" in done.stderr


def test_all_bad_rows_are_reported_and_not_only_the_first(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data")
    (root / IMAGE).unlink()
    row("train", 9, text=None)(root)
    raw(b"{", 7)(root)
    done = call("train", *TINY, "--data", root, "--out", tmp_path / "run", "--steps", "1")
    assert "3 bad rows: train.jsonl:4, id train-3: image not found" in done.stderr
    assert "train.jsonl:7 is not JSON" in done.stderr
    assert "train.jsonl:9 text is null" in done.stderr


def test_an_image_that_becomes_unreadable_during_training_is_an_error_with_its_sample(pairs: Path, tmp_path: Path) -> None:
    from mopefuse.config.schema import Data
    from mopefuse.data.collate import Samples
    from mopefuse.data.load import load_data
    from mopefuse.errors import DataError

    root = make_pairs(tmp_path / "data")
    data, encoder = load_data(Data(path=str(root))), create_encoder("tiny:vision")
    image(b"")(root)
    samples = Samples(data, "train", {"main": ("image", encoder.preprocess)}, Data())
    with pytest.raises(DataError) as caught:
        list(samples.batches([[(0, 3)]]))
    assert (caught.value.code, caught.value.where) == ("MF-DATA-13", "train.jsonl:4, id train-3")


@pytest.mark.parametrize("characters", [100_000, 10_000_000])
def test_a_very_long_text_is_prepared_quickly(characters: int) -> None:
    import time

    preprocess = create_encoder("tiny:text").preprocess
    text = "what is the red digit " * (characters // 22)
    began = time.process_time()
    inputs = preprocess.batch([preprocess.item(text)])
    assert time.process_time() - began < 0.5
    assert inputs["ids"].shape[1] == preprocess.describe()["max_tokens"]




@pytest.mark.parametrize(("bad", "total"), [(1, 3), (1, 12), (29, 100), (57, 100), (29, 50), (7, 700), (99, 100)])
def test_the_fraction_that_a_message_suggests_is_enough(bad: int, total: int) -> None:
    text = _allow(bad, total, Data(max_bad_fraction=0.0), "--on-bad skip")
    share = float(text.partition("max_bad_fraction=")[2].split()[0]) if text else 1.0
    assert bad <= share * total and (share == 1.0 or share <= bad / total + 0.0101)

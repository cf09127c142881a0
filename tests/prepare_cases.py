"""Small folders in the layouts in which the owners of data sets distribute them, with oddities that occur in practice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

TRAIN_TITLES = rb"""apple_pie_1.jpg,My Apple Pie Recipe,apple_pie
apple_pie_2.jpg,Pie, with sugar, and spice,apple_pie
apple_pie_3.jpg,"[[""Dad's Apple Pie | Cook's Corner""]]",apple_pie
apple_pie_4.jpg,"[[""Dad's Apple Pie",apple_pie
apple_pie_5.jpg,"A ""very"" good pie",apple_pie
apple_pie_6.jpg,Cr\xc3\xa8me Pie \xe2\x84\xa2,apple_pie
apple_pie_7.jpg,Salt &amp; Sugar &#8211; Mom&amp;rsquo;s,apple_pie
apple_pie_8.jpg,"A quote that never ends,apple_pie
apple_pie_9.jpg,"[[""Pie | \t\t\tLet\'s bake""]]",apple_pie
apple_pie_10.jpg,The Last "Pie",apple_pie
apple_pie_11.jpg

apple_pie_1.jpg,The same picture again,apple_pie
apple_pie_99.jpg,Nobody took a picture,apple_pie
beignets_1.jpg,Beignets,beignets
beignets_2.jpg,A class of its own,apple_pie
beignets_3.jpg,Beignets \xe9 la carte,beignets
beignets_4.jpg, Caf<e9> ,beignets
beignets_5.jpg,,beignets
beignets_50.jpg,In train and in test,beignets
miso_soup_1.jpg,Miso 1,miso_soup
miso_soup_2.jpg,Miso 2,miso_soup
miso_soup_3.jpg,Miso 3,miso_soup
miso_soup_4.jpg,Miso 4,miso_soup
""".replace(b"\n", b"\r\n").replace(b"<e9>", b"\xe9")

TRAIN_ROWS = {  # id: (title, title when cleaned), worked out by hand
    "apple_pie_1": ("My Apple Pie Recipe", "my apple pie recipe"),
    "apple_pie_10": ('The Last "Pie"', "the last pie"),
    "apple_pie_2": ("Pie, with sugar, and spice", "pie with sugar and spice"),
    "apple_pie_3": ("Dad's Apple Pie | Cook's Corner", "dad s apple pie cook s corner"),
    "apple_pie_4": ("Dad's Apple Pie", "dad s apple pie"),
    "apple_pie_5": ('A "very" good pie', "a very good pie"),
    "apple_pie_6": ("Crème Pie ™", "crème pie"),
    "apple_pie_7": ("Salt & Sugar – Mom’s", "salt sugar mom s"),
    "apple_pie_9": ("Pie | Let's bake", "pie let s bake"),
    "beignets_1": ("Beignets", "beignets"),
    "beignets_3": ("Beignets é la carte", "beignets é la carte"),
    "beignets_5": ("", ""),
    "miso_soup_1": ("Miso 1", "miso 1"),
    "miso_soup_2": ("Miso 2", "miso 2"),
    "miso_soup_3": ("Miso 3", "miso 3"),
    "miso_soup_4": ("Miso 4", "miso 4"),
}
TRAIN_SKIPPED = [
    ("texts/train_titles.csv", 8, "quote not closed"),
    ("texts/train_titles.csv", 11, "fewer than three fields"),
    ("texts/train_titles.csv", 13, "duplicate image"),
    ("texts/train_titles.csv", 16, "image name does not start with its class"),
    ("texts/train_titles.csv", 18, "not UTF-8"),
    ("images/train/apple_pie/notes.html", None, "not a .jpg file"),
    ("images/train/beignets/beignets_50.jpg", None, "duplicate image"),
    ("images/train/beignets/waffles_1.jpg", None, "image name does not start with its class"),
    ("images/train/miso_soup/miso_soup_77.jpg", None, "image has no text"),
    ("images/train/stray.jpg", None, "not in the folder of a class"),
    ("texts/train_titles.csv", 14, "text has no image"),
]
TEST_TITLES = b"""apple_pie_20.jpg,Pie,apple_pie
beignets_50.jpg,In train and in test,beignets
miso_soup_20.jpg,Soup,miso_soup
"""
TEST_ROWS = {
    "apple_pie_20": ("Pie", "pie"),
    "beignets_50": ("In train and in test", "in train and in test"),
    "miso_soup_20": ("Soup", "soup"),
}


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_bytes().split(b"\n") if line]


def skipped_in(folder: Path) -> list[tuple[str, int | None, str]]:
    lines = (folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["file"], row["line"], row["reason"]) for row in map(json.loads, lines)]


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (shade % 256, 3 * shade % 256, 7 * shade % 256)).save(path, format="JPEG")


def food101(root: Path, *, titles: bool = True, pages: bool = False) -> Path:
    """Write sixteen usable training pairs (9 apple pies, 3 beignets, 4 soups) and three test pairs in three classes."""
    train = [f"apple_pie_{i}" for i in range(1, 12)] + [f"beignets_{i}" for i in (1, 2, 3, 4, 5, 50)]
    train += [f"miso_soup_{i}" for i in (1, 2, 3, 4, 77)]
    for split, names in (("train", train), ("test", list(TEST_ROWS))):
        for shade, name in enumerate(names):
            picture(root / "images" / split / name.rpartition("_")[0] / f"{name}.jpg", 11 * shade)
    picture(root / "images/train/beignets/waffles_1.jpg", 200)
    picture(root / "images/train/stray.jpg", 201)
    (root / "images/train/apple_pie/notes.html").write_text("<p>no picture")
    (root / "images/train/apple_pie/.hidden").write_text("not looked at")
    if titles:
        (root / "texts").mkdir()
        (root / "texts/train_titles.csv").write_bytes(TRAIN_TITLES)
        (root / "texts/test_titles.csv").write_bytes(TEST_TITLES)
    if pages:
        for name in (*TRAIN_ROWS, *TEST_ROWS):
            page = root / "texts_txt" / name.rpartition("_")[0] / f"{name}.txt"
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(f"<b>{name}</b>\nbake &amp; eat", encoding="utf-8")
        (root / "texts_txt/apple_pie/apple_pie_98.txt").write_text("no picture of it")
        (root / "texts_txt/apple_pie/apple_pie_8.txt").write_bytes(b"caf\xe9")
    return root


def mm_imdb(root: Path) -> Path:
    """Write five usable training films, two validation films and two test films, in the layout of the archive."""
    films: dict[str, Any] = {
        "0000001": {"plot": ["short", "the longest plot of all"], "genres": ["Drama", "Film-Noir"], "title": "A"},
        "0000002": {"plot": "one string", "genres": ["Comedy", "Comedy"]},
        "0000003": {"plot": ["first of two", "other of two"], "genres": ["Sci-Fi"]},
        "0000004": {"plot": ["news"], "genres": ["Drama", "News", "Talk-Show"]},
        "0000005": {"plot": [], "genres": ["Drama"]},
        "0000006": {"genres": ["Drama"]},
        "0000007": {"plot": ["no genres"], "genres": []},
        "0000008": {"plot": ["no poster"], "genres": ["War"]},
        "0000010": {"plot": ["été ☃\ud800"], "genres": ["Music", "Musical"]},
        "0000011": {"plot": ["eleven"], "genres": ["Adult"]},
        "0000012": {"plot": ["twelve", 12, None], "genres": ["Horror"]},
        "0000013": {"plot": ["thirteen"], "genres": ["News"]},
        "0000021": {"plot": ["dev 1"], "genres": ["Drama"]},
        "0000022": {"plot": ["dev 2"], "genres": ["Western", "Action"]},
        "0000031": {"plot": ["test 1"], "genres": ["Drama"]},
        "0000032": {"plot": ["test 2"], "genres": ["Sport"]},
    }
    for shade, (identity, film) in enumerate(films.items()):
        if identity != "0000008":
            picture(root / "dataset" / f"{identity}.jpeg", 13 * shade)
        (root / "dataset" / f"{identity}.json").write_text(json.dumps(film), encoding="utf-8")
    picture(root / "dataset" / "0000009.jpeg", 99)
    (root / "dataset" / "0000014.json").write_bytes(b'{"plot": ["\xff"]}')
    train = [f"{i:07d}" for i in range(1, 15)] + ["0000001"]
    splits = {"train": train, "dev": ["0000021", "0000022"], "test": ["0000031", "0000032"]}
    (root / "split.json").write_text(json.dumps(splits))
    return root


MM_IMDB_ROWS = {
    "train": [
        ("0000001", "the longest plot of all", ["Drama", "Film-Noir"]),
        ("0000002", "one string", ["Comedy"]),
        ("0000003", "first of two", ["Sci-Fi"]),
        ("0000010", "été ☃\ufffd", ["Music", "Musical"]),
        ("0000012", "twelve", ["Horror"]),
    ],
    "val": [("0000021", "dev 1", ["Drama"]), ("0000022", "dev 2", ["Western", "Action"])],
    "test": [("0000031", "test 1", ["Drama"]), ("0000032", "test 2", ["Sport"])],
}
MM_IMDB_SKIPPED = [
    ("dataset/0000004.json", None, "genre News"),
    ("dataset/0000005.json", None, "no plot"),
    ("dataset/0000006.json", None, "no plot"),
    ("dataset/0000007.json", None, "no genres"),
    ("dataset/0000008.json", None, "no image"),
    ("dataset/0000009.json", None, "missing JSON file"),
    ("dataset/0000011.json", None, "genre Adult"),
    ("dataset/0000013.json", None, "genre News"),
    ("dataset/0000014.json", None, "JSON file cannot be read"),
    ("dataset/0000001.json", None, "duplicate id"),
]


def pair(image: Any, hypothesis: Any, label: Any, pair_id: Any = None, premise: Any = "A man rides.") -> dict[str, Any]:
    """Make a row of SNLI-VE with all of its columns."""
    row = {
        "annotator_labels": [label],
        "captionID": f"{image}#0",
        "gold_label": label,
        "pairID": pair_id,
        "sentence1": premise,
        "sentence1_binary_parse": "( A man )",
        "sentence2": hypothesis,
        "Flickr30K_ID": image,
    }
    return {key: value for key, value in row.items() if value is not None}


def snli_ve(root: Path) -> Path:
    """Write six usable training rows on three photographs, and three rows each for validation and test."""
    train = [
        pair("100", "He sleeps.", "contradiction", "100.jpg#0r1c"),
        pair("100.jpg", "A man moves.", "entailment", "100.jpg#0r1e"),
        pair(200, "He is late.", "neutral", "100.jpg#0r1e"),
        pair("200", "No id.", "neutral"),
        pair("300", "No label.", "-", "300.jpg#0r1c"),
        pair("300", "Empty label.", "", "300.jpg#0r1d"),
        pair("300", "Absent label.", None, "300.jpg#0r1e"),
        pair("300", "Odd label.", "maybe", "300.jpg#0r1f"),
        pair("999", "No photograph.", "neutral", "999.jpg#0r1n"),
        pair("300", None, "neutral", "300.jpg#0r1g"),
        pair("../300", "A way out.", "neutral", "300.jpg#0r1h"),
        pair("300", "No caption.", "entailment", "300.jpg#1r1e", premise=None),
        pair("300", "Separated\u2028by a line.", "contradiction", "300.jpg#1r1c"),
    ]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in train]
    lines += [b"", b'{"gold_label": ', b"[1, 2]", b'{"sentence2": "\xff"}']
    root.mkdir(parents=True)
    (root / "snli_ve_train.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    for split in ("dev", "test"):
        labels = ("entailment", "neutral", "contradiction")
        rows = [pair("100", f"{split} {label}", label, f"{split}#{label}") for label in labels]
        (root / f"snli_ve_{split}.jsonl").write_text("".join(json.dumps(row) + "\r\n" for row in rows), newline="")
    for image in (100, 200, 300, 400):
        picture(root / "flickr30k_images" / f"{image}.jpg", image)
    return root


SNLI_VE_ROWS = {
    "train": [
        ("100.jpg#0r1c", "He sleeps.", "100", "contradiction"),
        ("100.jpg#0r1e", "A man moves.", "100", "entailment"),
        ("train-3", "He is late.", "200", "neutral"),
        ("train-4", "No id.", "200", "neutral"),
        ("300.jpg#1r1e", "No caption.", "300", "entailment"),
        ("300.jpg#1r1c", "Separated\u2028by a line.", "300", "contradiction"),
    ],
    "val": [(f"dev#{label}", f"dev {label}", "100", label) for label in ("entailment", "neutral", "contradiction")],
    "test": [(f"test#{label}", f"test {label}", "100", label) for label in ("entailment", "neutral", "contradiction")],
}
SNLI_VE_SKIPPED = [
    ("snli_ve_train.jsonl", 5, "no gold label"),
    ("snli_ve_train.jsonl", 6, "no gold label"),
    ("snli_ve_train.jsonl", 7, "no gold label"),
    ("snli_ve_train.jsonl", 8, "unknown gold label"),
    ("snli_ve_train.jsonl", 9, "no image"),
    ("snli_ve_train.jsonl", 10, "no hypothesis"),
    ("snli_ve_train.jsonl", 11, "no Flickr30K_ID"),
    ("snli_ve_train.jsonl", 15, "not JSON"),
    ("snli_ve_train.jsonl", 16, "not a JSON object"),
    ("snli_ve_train.jsonl", 17, "not UTF-8"),
]

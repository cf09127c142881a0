"""What `data check` reports about labels, images and texts, compared with counts by hand; what it caches, and what it never
opens."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from check_cases import folder, kinds, line, report, save, stdout_json, write
from conftest import call, code_of, make_pairs, matrix

from mopefuse.config.schema import Data
from mopefuse.data import summary
from mopefuse.data.check import check
from mopefuse.data.findings import file_findings
from mopefuse.encoders.base import create_encoder
from mopefuse.encoders.preprocess import TextPreprocess
from mopefuse.report.tokens import measure, tokens_of

# -- labels


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (b"a\nb\na\n", {"bad-labels-file": 1}),
        (b"a\nb\xff\n", {"bad-labels-file": 1}),
        (b"a\n", {"one-class": 1, "unknown-label": 3}),
        (b"a\nb\n", {}),
        (b"a\nb\nc\n", {"absent-label": 3}),
    ],
    ids=["twice", "bytes", "one", "right", "one that no row has"],
)
def test_labels_come_from_the_labels_file(tmp_path: Path, listed: bytes, expected: dict[str, int]) -> None:
    root = folder(tmp_path / "data")
    (root / "labels.txt").write_bytes(listed)
    assert kinds(root) == expected
    (root / "labels.txt").rename(tmp_path / "names")
    assert kinds(root) == {}
    assert kinds(root, labels=str(tmp_path / "names")) == expected


def test_a_missing_labels_file_is_an_error(tmp_path: Path) -> None:
    assert kinds(folder(tmp_path), labels=str(tmp_path / "nowhere")) == {"bad-labels-file": 1}


def test_unknown_labels_are_counted_and_absent_ones_are_named(tmp_path: Path) -> None:
    root = folder(tmp_path)
    write(root / "val.jsonl", line("v1", "3.png", "x"), line("v2", "3.png", "y"), line("v3", "3.png", "x"))
    found = [(each.kind, each.where, each.message) for each in report(root).findings]
    assert found == [
        ("unknown-label", "val.jsonl:1", "the label 'x' does not occur in train (in 2 rows)"),
        ("unknown-label", "val.jsonl:2", "the label 'y' does not occur in train (in 1 row)"),
        ("absent-label", "val.jsonl", "no row of val has the label 'a'"),
        ("absent-label", "val.jsonl", "no row of val has the label 'b'"),
    ]


def test_a_single_class_is_an_error_and_does_not_hide_other_problems(tmp_path: Path) -> None:
    root = folder(tmp_path)
    write(root / "train.jsonl", line("t1"), line("t2", "2.png"), "{")
    assert kinds(root) == {"bad-json": 1, "one-class": 1, "unknown-label": 2}


def test_a_label_is_known_although_the_image_of_its_only_row_is_bad(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "2.png").unlink()
    assert kinds(root) == {"missing-image": 1}


def test_an_empty_split_is_reported(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "val.jsonl").write_text("\n \n")
    assert kinds(root) == {"empty-split": 1}


def test_label_balance_matches_a_count_by_hand(tmp_path: Path) -> None:
    root = folder(tmp_path)
    write(root / "train.jsonl", *(line(f"t{i}", label=["a"] if i < 5 else ["a", "b"]) for i in range(7)), line("t7", label=[]))
    for name in ("val", "test"):
        write(root / f"{name}.jsonl", line(f"{name}1", "3.png", ["b"]))
    found = report(root).as_dict(0)
    assert found["labels"]["balance"] == {"a": {"train": 7, "val": 0, "test": 0}, "b": {"train": 2, "val": 1, "test": 1}}
    assert found["labels"]["most_frequent"] == {"label": "a", "rows": 7}
    assert found["labels"]["rarest"] == {"label": "b", "rows": 2}
    assert found["labels"]["ratio"] == 3.5
    assert found["splits"]["train"]["rows_without_label"] == 1


def test_with_many_labels_thirty_are_shown_and_all_are_in_json(tmp_path: Path) -> None:
    root = folder(tmp_path)
    rows = [line(f"t{i}", label=f"label-{i % 40:02d}") for i in range(100)]
    for name in ("train", "val", "test"):
        write(root / f"{name}.jsonl", *(row.replace("t", name, 1) for row in rows))
    shown = [text for text in call("data", "check", root).stdout.splitlines() if text.startswith("label-")]
    assert (len(shown), shown[0].split(), shown[-1].split()) == (30, ["label-00", "3", "3", "3"], ["label-39", "2", "2", "2"])
    assert len(stdout_json(call("data", "check", root, "--json"))["labels"]["balance"]) == 40


# -- images and the cache


def test_an_image_that_is_slow_to_decode_gives_a_warning(pairs: Path) -> None:
    index = next(iter(report(pairs).indexes.values()))
    images = index.files["image"]
    images.infos = [look._replace(milliseconds=2001 if i == 3 else 2000) for i, look in enumerate(images.infos)]
    (found,) = file_findings(index, (pairs,))
    assert (found.kind, found.image, found.id) == ("slow-image", "images/train-3.png", "train-3")


@pytest.mark.parametrize(
    ("size", "expected"), [((16, 160), {}), ((15, 16), {"tiny-image": 1}), ((16, 161), {"strip-image": 1})]
)
def test_warnings_about_small_and_narrow_images_start_at_the_limits(
    tmp_path: Path, size: tuple[int, int], expected: dict[str, int]
) -> None:
    root = folder(tmp_path)
    save(root / "1.png", size, seed=5)
    assert kinds(root) == expected


def test_a_second_pass_comes_from_the_cache_and_a_fresh_one_does_not(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data")
    first, second, fresh = report(root), report(root), check(Data(path=str(root)), fresh=True)
    assert [(each.from_cache, each.files_read) for each in (first, second, fresh)] == [(False, 25), (True, 0), (False, 25)]
    assert (first.files_per_second or 0) > 0
    assert second.files_per_second is None
    (root / "images/val-2.png").write_bytes(b"")
    changed = report(root)
    assert (changed.from_cache, changed.files_read, changed.errors) == (False, 1, 1)
    assert "in the cache" in call("data", "check", root).stdout
    assert "in the cache" not in call("data", "check", root, "--fresh").stdout


_OPENED: list[str] | None = None


def _record_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _OPENED is not None:
        _OPENED.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else "")


sys.addaudithook(_record_opened)


@pytest.mark.parametrize("outside", ["../secret.png", "{root}/secret.png", "link.png"])
def test_a_file_outside_the_root_is_an_error_with_its_line_and_never_opened(tmp_path: Path, outside: str) -> None:
    global _OPENED
    secret = save(tmp_path / "secret.png", seed=9)
    root = folder(tmp_path / "data", val=(line("v3", outside.format(root=tmp_path)),))
    (root / "link.png").symlink_to(secret)
    _OPENED = []
    try:
        done = call("data", "check", root, "--html", tmp_path / "page.html", "--json")
        call("data", "preview", root, "--split", "val", "-o", tmp_path / "sheet.html")
        opened = _OPENED
    finally:
        _OPENED = None
    assert [(each["code"], each["where"]) for each in stdout_json(done)["problems"]] == [("MF-SEC-01", "val.jsonl:3")]
    assert done.returncode == 4
    assert any(name.endswith("1.png") for name in opened), "opened files are recorded"
    assert not [name for name in opened if "secret" in name or "link.png" in name]


def test_another_root_is_allowed_by_its_flag(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", val=(line("v3", f"{tmp_path}/other/9.png"),))
    save(tmp_path / "other/9.png", seed=9)
    assert call("data", "check", root).returncode == 4
    assert call("data", "check", root, "--image-root", tmp_path / "other").returncode == 0


# -- texts


def test_a_check_replaces_the_characters_that_encoders_replace() -> None:
    preprocess = TextPreprocess(lambda texts, most: texts == ["a"] or pytest.fail("not yet"), 1)
    for number in range(0x110000):
        character = chr(number)
        assert bool(summary.REPLACED.match(character)) == (preprocess.item(character) == "\ufffd" != character), hex(number)


def test_lengths_without_an_encoder_are_words_and_an_estimate(tmp_path: Path) -> None:
    root = folder(tmp_path)
    words = (1, 2, 59, 60, 393, 394)  # 77 / 1.3 = 59.2, 512 / 1.3 = 393.8
    write(root / "train.jsonl", *(line(f"t{n}", label="ab"[n % 2], text="w " * n) for n in words))
    (root / "val.jsonl").unlink()
    (root / "test.jsonl").unlink()
    found = report(root).as_dict(0)["texts"]
    assert found["words"] == {"median": 60, "p95": 394, "longest": 394}
    assert found["characters"]["longest"] == 788
    assert found["estimate"] == {"tokens_per_word": 1.3, "share_over": {"77": 3 / 6, "512": 1 / 6}}
    assert (found["total"], found["measured"], found["sampled"]) == (6, 6, False)


def test_lengths_with_an_encoder_are_its_tokens_and_truncations(tmp_path: Path) -> None:
    root = folder(tmp_path)
    rows = [line(f"t{n}", label="ab"[n % 2], text=" ".join(["word"] * n)) for n in (1, 10, 31, 32, 40)]  # plus a [CLS] each
    write(root / "train.jsonl", *rows)
    (root / "val.jsonl").unlink()
    (root / "test.jsonl").unlink()
    found = stdout_json(call("data", "check", root, "--encoder", "tiny:text", "--json"))["texts"]
    assert (found["encoder"], found["limit"]) == ("tiny:text", 32)
    assert found["tokens"] == {"median": 32, "p95": 39, "longest": 41}
    assert found["cut"] == {"texts": 2, "share": 2 / 5}
    done = call("data", "check", root, "--encoder", "tiny:text", "--val-fraction", "0.2")
    assert "tiny:text reads 32 tokens and truncates 2 of the measured texts (40.0 %)" in done.stdout


@pytest.mark.parametrize(
    "spec",
    matrix(["tiny:text", "hf:bert-base?pretrained=false", "open_clip:vit-b-32-text?pretrained=false"], ["tiny:text"]),
)
def test_a_text_with_one_token_too_many_is_truncated(spec: str) -> None:
    preprocess = create_encoder(spec).preprocess
    assert isinstance(preprocess, TextPreprocess)
    most = preprocess.max_tokens
    special = measure(preprocess, ["cat"])[0][0] - 1
    for words, is_cut in ((1, False), (most - special, False), (most - special + 1, True), (most * 40, True)):
        (tokens, cut), (alone, _) = measure(preprocess, [" ".join(["cat"] * words), "cat"])
        assert (cut, alone) == (is_cut, special + 1)
        assert tokens == words + special if not is_cut else tokens >= most


def test_an_image_encoder_counts_no_tokens() -> None:
    assert code_of(lambda: tokens_of("tiny:vision")) == "MF-DATA-85"


def test_with_very_many_texts_an_even_sample_is_measured_and_all_are_read(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "MAX_TEXTS", 5)
    root = folder(tmp_path)
    write(root / "train.jsonl", *(line(f"t{n}", label="ab"[n % 2], text="w" * n) for n in range(17)))
    found = report(root)
    assert found.texts.characters_T[:4] == [0, 5, 10, 15]  # of 21 texts
    assert kinds(root) == {"empty-text": 1}
    done = call("data", "check", root)
    assert "texts, an evenly spaced sample of 5 of 21:" in done.stdout

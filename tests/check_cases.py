"""Data for tests of `data check`: a data set with every kind of problem and the expected findings, and a small valid one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mopefuse.config.schema import Data
from mopefuse.data.check import Report, check

MAX_PIXELS = 12_000
HOSTILE = '<script>alert("x")</script>'
ATTRIBUTE = '" onmouseover="alert(1)'
ESCAPE = "\x1b[31m"


def save(path: Path, size: tuple[int, int] = (24, 24), seed: int = 0, **options: Any) -> Path:
    """Save an image of noise of `size` (width, height); the same seed gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


def line(identity: str, img: str = "1.png", label: Any = "a", text: Any = None, **more: Any) -> str:
    """Make a row; if no text is given, its text is unique."""
    row = {"id": identity, "text": f"text of {identity}" if text is None else text, "img": img, "label": label}
    return json.dumps(row | more)


def report(path: Path, **options: Any) -> Report:
    return check(Data(path=str(path), **options))


def kinds(path: Path, **options: Any) -> dict[str, int]:
    return {kind: len(found) for kind, found in report(path, **options).by_kind().items()}


def stdout_json(done: subprocess.CompletedProcess[str]) -> Any:
    """Parse stdout as a single JSON value."""
    return json.loads(done.stdout)


def write(path: Path, *lines: str | bytes) -> None:
    """Write lines, and the image that rows name by default."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((text if isinstance(text, bytes) else text.encode()) + b"\n" for text in lines))
    for number in (1, 2):
        if not (path.parent / f"{number}.png").exists():
            save(path.parent / f"{number}.png", seed=number)


def folder(root: Path, *, val: tuple[str, ...] = ()) -> Path:
    """Write two valid training rows with two labels, and a valid validation split of other rows."""
    write(root / "train.jsonl", line("t1"), line("t2", "2.png", "b"))
    save(root / "3.png", seed=3)
    write(root / "val.jsonl", line("v1", "3.png"), line("v2", "3.png", "b"), *val)
    write(root / "test.jsonl", line("e1", "3.png"), line("e2", "3.png", "b"))
    return root


def make_broken(root: Path) -> Path:
    """Write every kind of problem that a folder of JSON lines can have, except those of whole splits that exclude each
    other."""
    images = root / "data"
    for number in range(1, 7):
        save(images / f"{number}.png", seed=number)
    save(images / "copy-of-1.png", seed=1)
    whole = save(images / "whole.png", seed=7).read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "page.jpg").write_bytes(b"<!doctype html><p>404")
    (images / "nothing.jpg").write_bytes(b"")
    (images / "words.jpg").write_bytes(b"hello, I am no image")
    save(images / "scan.tiff", seed=8).rename(images / "scan.png")
    save(images / "huge.png", (200, 100))
    save(images / "tiny.png", (8, 30), seed=9)
    save(images / "strip.png", (20, 300), seed=10)
    save(images / "moving.gif", seed=11, save_all=True, append_images=[Image.new("RGB", (24, 24), "red")])
    (images / "folder.png").mkdir()
    save(root / "secret.png", seed=12)
    train = [
        line("t1").encode(),
        line("t2", "2.png", "b").encode(),
        line("t3", "3.png", HOSTILE).encode(),
        b'{"id": "t4",,}',
        b'{"id": "t5", "text": "caf\xe9"}',
        b"[1, 2]",
        b'{"id": "t7", "text": "x", "img": "1.png"}',
        line("t8").replace('"text of t8"', "null").encode(),
        line("t9", label="").encode(),
        line("t1").encode(),
        line("t11", extra=float("nan")).encode(),
        line("t12", label="\ud800").encode(),
        line("t13", "gone.png").encode(),
        line("t14", "gone.png", "b").encode(),
        line("t15", "cut.png").encode(),
        line("t16", "huge.png").encode(),
        line("t17", "page.jpg").encode(),
        line("t18", "nothing.jpg").encode(),
        line("t19", "scan.png").encode(),
        line("t20", "folder.png").encode(),
        line("t21", "../secret.png").encode(),
        line("t22", "tiny.png").encode(),
        line("t23", "strip.png").encode(),
        line("t24", "moving.gif").encode(),
        line("t25", text=" \t").encode(),
        line(f"t26{ATTRIBUTE}", text=f"nul \x00 half \ud800 {HOSTILE}{ESCAPE}").encode(),
        line("t27", "words.jpg").encode(),
        line("t28", "4.png", ["a"]).encode(),
        line("t29", label=29).encode(),
    ]
    val = [
        line("v1", "copy-of-1.png").encode(),
        line("v2", "5.png", "b", text="text of t2").encode(),
        line("v3", "6.png", "zebra").encode(),
        line("t3", "6.png", "zebra", "another").encode(),
    ]
    (images / "train.jsonl").write_bytes(b"\n".join(train) + b"\n")
    (images / "val.jsonl").write_bytes(b"\n".join(val) + b"\n")
    return images


BROKEN = [  # kind, severity, code, split, where, id, rows
    ("unsafe-path", "error", "MF-SEC-01", "train", "train.jsonl:21", "t21", 1),
    ("bad-json", "error", "MF-DATA-03", "train", "train.jsonl:4", "", 1),
    ("bad-json", "error", "MF-DATA-03", "train", "train.jsonl:11", "", 1),
    ("bad-encoding", "error", "MF-DATA-03", "train", "train.jsonl:5", "", 1),
    ("not-an-object", "error", "MF-DATA-03", "train", "train.jsonl:6", "", 1),
    ("missing-column", "error", "MF-DATA-03", "train", "train.jsonl:7", "", 1),
    ("missing-text", "error", "MF-DATA-03", "train", "train.jsonl:8", "", 1),
    ("wrong-type", "error", "MF-DATA-03", "train", "train.jsonl:29", "", 1),
    ("empty-label", "error", "MF-DATA-03", "train", "train.jsonl:9", "", 1),
    ("half-character", "error", "MF-DATA-03", "train", "train.jsonl:12", "", 1),
    ("duplicate-id", "error", "MF-DATA-03", "train", "train.jsonl:10", "t1", 1),
    ("mixed-labels", "error", "MF-DATA-05", "train", "train.jsonl:28", "t28", 1),
    ("unknown-label", "error", "MF-DATA-06", "val", "val.jsonl:3", "v3", 2),
    ("missing-image", "error", "MF-DATA-11", "train", "train.jsonl:13", "t13", 2),
    ("not-a-file", "error", "MF-DATA-15", "train", "train.jsonl:20", "t20", 1),
    ("empty-image", "error", "MF-DATA-13", "train", "train.jsonl:18", "t18", 1),
    ("truncated-image", "error", "MF-DATA-13", "train", "train.jsonl:15", "t15", 1),
    ("wrong-format-image", "error", "MF-DATA-13", "train", "train.jsonl:17", "t17", 1),
    ("wrong-format-image", "error", "MF-DATA-14", "train", "train.jsonl:19", "t19", 1),
    ("unreadable-image", "error", "MF-DATA-13", "train", "train.jsonl:27", "t27", 1),
    ("huge-image", "error", "MF-DATA-12", "train", "train.jsonl:16", "t16", 1),
    ("missing-test", "warning", "", "test", "{data}", "", 1),
    ("leaked-image", "warning", "", "val", "val.jsonl:1", "v1", 1),
    ("leaked-text", "warning", "", "val", "val.jsonl:2", "v2", 1),
    ("id-in-two-splits", "warning", "", "val", "val.jsonl:4", "t3", 1),
    ("absent-label", "warning", "", "val", "val.jsonl", "", 1),
    ("empty-text", "warning", "", "train", "train.jsonl:25", "t25", 1),
    ("replaced-characters", "warning", "", "train", "train.jsonl:26", f"t26{ATTRIBUTE}", 1),
    ("tiny-image", "warning", "", "train", "train.jsonl:22", "t22", 1),
    ("strip-image", "warning", "", "train", "train.jsonl:23", "t23", 1),
    ("animated-image", "warning", "", "train", "train.jsonl:24", "t24", 1),
]

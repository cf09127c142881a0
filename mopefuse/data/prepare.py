"""Convert a data set from the files that its owners distribute to the native row format, without network access.

A data set is a subclass of `Source`, in one module and with one entry point of the group ``mopefuse.datasets``. It yields a
`Sample` or a `Skip` for everything that it finds; `prepare` does what all data sets have in common and records every skip.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from mopefuse import __version__
from mopefuse.core.artifact import dump_json, sha256
from mopefuse.core.atomic_files import remove_leftovers, sync
from mopefuse.core.error_codes import DataCode
from mopefuse.core.regular_files import read_regular
from mopefuse.data._source import Sample, Skip, Source, is_file_name
from mopefuse.data._source_files import SourceFolder, format_checksums, import_images, summarise_files
from mopefuse.data.options import Option, with_options
from mopefuse.data.subsets import hold_out
from mopefuse.errors import DataError

__all__ = ["Advance", "Option", "Sample", "Skip", "Source", "is_file_name", "prepare", "with_options"]

Advance = Callable[[str, int, int], None]
"""Called with (stage, amount done, total amount); the total is an estimate and never less than what is done."""

ABOUT, SKIPPED, SUMS = "dataset.json", "skipped.jsonl", "SHA256SUMS"
_IDENTITY = ("dataset", "version", "options", "images", "source")
_EVERY = 1000  # rows between two calls of `Advance`
_SURROGATE = re.compile("[\ud800-\udfff]")


def prepare(
    kind: type[Source],
    source: Path,
    dest: Path,
    options: Mapping[str, Any] | None = None,
    *,
    images: str = "link",
    advance: Advance = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Write ``{train,val,test}.jsonl``, the images that they name, and a record of what was skipped.

    Also written: labels.txt if the data set has a fixed list of labels, skipped.jsonl (file, line and reason of each skip),
    SHA256SUMS (of every file of `source` that was used; ``sha256sum --check`` reads it there) and dataset.json. The folder
    is created completely or not at all.

    Args:
        source: folder with the files as they were distributed; it is only read.
        dest: must be new or empty, or the result of the same preparation (then nothing is written).
        options: options of the data set, by name; see `Source.declared_options`.
        images: "link" (hard links, or copies where the file system does not support them) or "copy".
        advance: called with the progress.

    Returns:
        The content of dataset.json, and whether files were written as "written".

    Raises:
        DataError: files are missing or cannot be read, an option does not fit, a split has no rows, or `dest` is taken.
        UnsafePathError: a link leads outside `source`.
        OSError: `dest` cannot be written; nothing is left of it.
    """
    if images not in ("link", "copy"):
        raise DataError(DataCode.BAD_PREPARE_OPTION, f"--images cannot be {images!r}", where="--images", fix="use link or copy")
    folder, target = SourceFolder(source), Path(dest).resolve()
    if target.is_relative_to(folder.root):
        what, fix = "the destination is inside the source folder", "choose a folder outside it"
        raise DataError(DataCode.TARGET_INSIDE_SOURCE, what, where=str(target), fix=fix)
    reader = kind(folder, options or {})
    identity = {
        "dataset": kind.name,
        "version": kind.version,
        "options": reader.options,
        "images": images,
        "source": summarise_files(folder.root, kind.inputs),
    }
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        return {**_read_same(target, identity), "written": False}
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    building = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        about = identity | _Build(reader, building, advance).run(link=images == "link")
        (building / ABOUT).write_text(dump_json(about), encoding="utf-8")
        for path in (*building.glob("*.*"), building / SUMS, building):
            sync(path)
        os.replace(building, target)
        sync(target.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return {**about, "written": True}


class _Build:
    """Writes a prepared data set into an empty folder."""

    def __init__(self, reader: Source, root: Path, advance: Advance) -> None:
        self.reader, self.root, self.advance = reader, root, advance
        self.ids: set[str] = set()
        self.images: dict[str, Path | None] = {}
        self.counts: dict[str, int] = {}
        self.labels: set[str] = set(reader.labels)
        self.skipped: Counter[str] = Counter()
        self.training: list[tuple[str, str]] = []  # (id, label) of rows that may be held out, in the order of the file

    def run(self, *, link: bool) -> dict[str, Any]:
        """Write everything except dataset.json; returns its content."""
        reader = self.reader
        self.root.mkdir()
        with (self.root / SKIPPED).open("w", encoding="utf-8", newline="\n") as skips:
            for split in reader.splits:
                self._split(split, skips)
        if "val" not in reader.splits:
            self._hold_out()
        found = {name: path for name, path in self.images.items() if path is not None}
        placed = import_images(found, self.root, link=link, advance=lambda done: self.advance("images", done, len(found)))
        if placed.linked < len(found):
            os.sync()
        if reader.labels:
            (self.root / "labels.txt").write_text("".join(f"{label}\n" for label in reader.labels), encoding="utf-8")
        sums = format_checksums(reader.folder.sums | placed.sums)
        (self.root / SUMS).write_text(sums, encoding="utf-8", errors="surrogateescape", newline="\n")
        tables = sorted(path for path in self.root.iterdir() if path.is_file())
        published = {group: {"rows": rows, "by": author} for group, (rows, author) in reader.published.items()}
        return {
            "mopefuse": __version__,
            "text": reader.text,
            "seed": reader.options.get("seed"),
            "rows": self.counts,
            "published": published,
            "difference": {group: self._rows(group) - rows for group, (rows, _) in reader.published.items()},
            "labels": len(self.labels),
            "skipped": dict(sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))),
            "image_files": {"linked": placed.linked, "copied": len(found) - placed.linked, "bytes": placed.size},
            "sha256": {path.name: sha256(path) for path in tables},
            "content": summarise_files(self.root, os.listdir(self.root)),
        }

    def _rows(self, group: str) -> int:
        return sum(self.counts[split] for split in group.split("+"))

    def _split(self, split: str, skips: TextIO) -> None:
        published = next((rows for group, (rows, _) in self.reader.published.items() if group.split("+")[0] == split), 0)
        held_out, kept, seen = "val" not in self.reader.splits and split == "train", 0, 0
        with (self.root / f"{split}.jsonl").open("wb") as table:
            for seen, found in enumerate(self.reader.rows(split), start=1):
                if seen % _EVERY == 1:
                    self.advance(split, seen, max(published, seen))
                skip = found if isinstance(found, Skip) else self._check(found)
                if skip is not None:
                    self._skip(skip, skips)
                elif isinstance(found, Sample):
                    table.write(_line(found))
                    if not self.reader.label_is_mask:
                        self.labels.update([found.label] if isinstance(found.label, str) else found.label)
                    if held_out:
                        self.training.append((found.id, str(found.label)))
                    kept += 1
        self.advance(split, seen, seen)
        self.counts[split] = kept
        if not kept:
            most = ", ".join(f"{reason} ({number})" for reason, number in self.skipped.most_common(3))
            what = f"no row of the {split} split can be used" + (f"; skipped so far: {most}" if most else "")
            raise DataError(
                DataCode.SOURCE_INCOMPLETE,
                what,
                where=str(self.reader.folder.root),
                fix=f"{'correct these files; ' if most else ''}the folder must contain {self.reader.layout}",
            )

    def _check(self, sample: Sample) -> Skip | None:
        """Check a sample, and record its id and image.

        Returns:
            Why it cannot be a row, or None.
        """
        if sample.id in self.ids:
            return Skip("duplicate id", sample.file, sample.line)
        if sample.img not in self.images:
            if _SURROGATE.search(sample.id + sample.img):
                return Skip("file name is not UTF-8", sample.file, sample.line)
            self.images[sample.img] = self.reader.folder.path(sample.img)
        if self.images[sample.img] is None:
            return Skip("no image", sample.file, sample.line)
        if self.reader.label_is_mask and isinstance(sample.label, str) and sample.label not in self.images:
            self.images[sample.label] = self.reader.folder.path(sample.label)
        self.ids.add(sample.id)
        return None

    def _skip(self, skip: Skip, skips: TextIO) -> None:
        reason = _SURROGATE.sub("\ufffd", skip.reason)
        self.skipped[reason] += 1
        skips.write(json.dumps({"file": skip.file, "line": skip.line, "reason": reason}) + "\n")

    def _hold_out(self) -> None:
        """Move rows of train.jsonl to val.jsonl: as many as the option ``val`` specifies.

        If the option is not given and training has less than four times its default, a fifth is held out.
        """
        ids, labels = [identity for identity, _ in self.training], [(label,) for _, label in self.training]
        number = self.reader.options["val"]
        if "val" not in self.reader.given and len(ids) < 4 * number:
            number = max(1, len(ids) // 5)
        _, held = hold_out(ids, labels, number, self.reader.options["seed"])
        if not 0 < 4 * number <= len(ids) or len(held) != number:
            classes = len(set(labels))
            what = f"{number:,} validation pairs cannot be held out of {len(ids):,} training pairs of {classes} classes"
            fix = f"pass --val {max(1, len(ids) // 5)}" if len(ids) > 4 else "add more training pairs"
            raise DataError(DataCode.CANNOT_HOLD_OUT, what, where="--val", fix=fix)
        chosen = {ids[row] for row in held}
        whole = (self.root / "train.jsonl").rename(self.root / "whole")
        parts = (self.root / "train.jsonl").open("wb"), (self.root / "val.jsonl").open("wb")
        with whole.open("rb") as rows, parts[0] as train, parts[1] as val:
            for identity, row in zip(ids, rows, strict=True):
                (val if identity in chosen else train).write(row)
        whole.unlink()
        self.counts = {"train": self.counts.pop("train") - len(chosen), "val": len(chosen), **self.counts}


def _line(sample: Sample) -> bytes:
    """Format a row as JSON. Lone surrogates, which UTF-8 cannot encode, become U+FFFD."""
    row = {"id": sample.id, "text": sample.text, "img": sample.img, "label": sample.label}
    text = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text).encode("utf-8")


def _read_same(target: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Read dataset.json of an earlier preparation.

    Raises:
        DataError: `target` is not exactly the preparation that `identity` describes.
    """
    fix = "choose a new folder, or remove this one"
    try:
        about = json.loads(read_regular(target / ABOUT).decode("utf-8"))
        same = {key: about[key] for key in _IDENTITY} == identity
        tables, content = dict(about["sha256"]), about["content"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise DataError(DataCode.PREPARED_FOLDER_NOT_EMPTY, "the folder is not empty", where=str(target), fix=fix) from None
    if not same:
        known = {key: about[key] for key in _IDENTITY}
        differing = ", ".join(key for key in _IDENTITY if known[key] != identity[key])
        what = f"the folder has a data set that was prepared differently (in: {differing})"
        raise DataError(DataCode.PREPARED_OTHERWISE, what, where=str(target / ABOUT), fix=fix)
    names = [name for name in os.listdir(target) if name != ABOUT and not name.startswith(".")]
    unchanged = all((target / name).is_file() and sha256(target / name) == digest for name, digest in tables.items())
    if not unchanged or summarise_files(target, names) != content:
        raise DataError(
            DataCode.PREPARED_DATA_CHANGED, "files of this data set were changed, added or removed", where=str(target), fix=fix
        )
    return dict(about)

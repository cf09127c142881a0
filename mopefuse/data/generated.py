"""Writes generated data sets: folders that name, in ``dataset.json``, the arguments from which the same bytes follow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mopefuse.core.atomic_files import replace_atomically
from mopefuse.core.error_codes import DataCode
from mopefuse.core.regular_files import read_regular
from mopefuse.errors import DataError


def write_generated(folder: Path, about: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """Write a generated data set, unless the folder already contains it.

    Args:
        folder: must be new or empty, or already contain the same data set.
        about: what determines the data set; written to ``dataset.json`` with a checksum of the files.
        write: writes everything else into an empty folder.

    Raises:
        DataError: the folder contains something else, or its files were changed.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _check_same(folder, about)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(folder) as building:
        write(building)
        facts = {**about, "sha256": digest_of(building)}
        (building / "dataset.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def digest_of(folder: Path) -> str:
    """SHA-256 over the names and bytes of all files except ``dataset.json``."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "dataset.json"):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _check_same(folder: Path, about: Mapping[str, Any]) -> None:
    """Check that `folder` is exactly the data set that `about` describes.

    Raises:
        DataError: it is not.
    """
    fix = "choose a new folder, or remove this one"
    try:
        found = json.loads(read_regular(folder / "dataset.json").decode("utf-8"))
    except (OSError, ValueError):
        raise DataError(DataCode.MADE_FOLDER_NOT_EMPTY, "the folder is not empty", where=str(folder), fix=fix) from None
    if not isinstance(found, dict) or {key: found.get(key) for key in about} != about:
        raise DataError(
            DataCode.OTHER_MADE_DATA, "the folder contains a different data set", where=str(folder / "dataset.json"), fix=fix
        )
    if found.get("sha256") != digest_of(folder):
        raise DataError(
            DataCode.MADE_DATA_CHANGED, "files of this data set were changed, added or removed", where=str(folder), fix=fix
        )

"""Where a trained model is: a run, an adapter or a bundle, in a folder or on the hub (``hf-hub:repo/name@revision``)."""

from __future__ import annotations

import shutil
from pathlib import Path

from mopefuse import cache
from mopefuse.adapter import KIND as ADAPTER
from mopefuse.adapter import AdapterFolder
from mopefuse.checkpoint import MANIFEST, listed_files, read_json
from mopefuse.errors import CheckpointError, ResourceError
from mopefuse.run import RunFolder

PREFIX = "hf-hub:"


def locate(path: str | Path) -> Path:
    """The folder that a path means; what is on the hub is fetched once, and kept.

    Raises:
        EncoderError: the hub cannot be reached, or has no such repository. CheckpointError: the repository holds something
            else, or names files outside itself. ResourceError: there is no place to keep it.
    """
    text = str(path)
    if not text.startswith(PREFIX):
        return Path(path)
    from mopefuse.encoders import _hub

    repo, _, revision = text.removeprefix(PREFIX).partition("@")
    manifest = _hub.fetch(repo, MANIFEST, revision or None, where=text)
    if manifest is None:
        raise CheckpointError(1, f"{repo} holds no model of mopefuse", where=text, fix="name a repository that mopefuse pushed")
    key = cache.key_of(repo, manifest.parent.name)
    names = listed_files(read_json(manifest), Path(key))
    if found := cache.find("models", key, thorough=False):
        return found[0] / "model"

    def write(folder: Path) -> None:
        for name in (MANIFEST, *names):
            fetched = _hub.fetch(repo, name, revision or None, where=text)
            if fetched is None:
                raise CheckpointError(2, f"{repo} lacks {name}, which its manifest names", where=text, fix="tell its owner")
            target = folder / "model" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched, target)

    kept = cache.keep("models", key, write, {"what": text})
    if kept is None:
        raise ResourceError(10, f"{repo} cannot be kept", where=text, fix="set MOPEFUSE_CACHE to a folder that can be written")
    return kept / "model"


def kind_of(folder: Path) -> str:
    """``run``, ``adapter`` or ``bundle``, as the manifest of a folder says; empty if it has none."""
    file = folder / MANIFEST
    return str(read_json(file).get("kind", "")) if file.is_file() else ""


def trained(path: str | Path) -> RunFolder:
    """A run or an adapter, whichever a folder is.

    Raises:
        CheckpointError: there is no such folder, or it is a bundle, which holds a graph and no model; or as `locate`.
    """
    folder = locate(path)
    if not folder.is_dir():
        raise CheckpointError(4, f"there is no run {path}", fix="name a folder that mopefuse train or export wrote")
    kind = kind_of(folder)
    if kind == "bundle":
        fix = "name the run that it was exported from"
        raise CheckpointError(10, "a bundle can only be asked and evaluated", where=str(path), fix=fix)
    return AdapterFolder(folder) if kind == ADAPTER else RunFolder(folder)

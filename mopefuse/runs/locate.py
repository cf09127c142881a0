"""Where a trained model is: a run, an adapter or a bundle, in a folder or on the hub (``hf-hub:repo/name@revision``)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mopefuse.core import cache
from mopefuse.core.artifact import MANIFEST, listed_files, read_json, verify
from mopefuse.errors import CheckpointError, EncoderError, ResourceError
from mopefuse.runs.adapter import KIND as ADAPTER
from mopefuse.runs.adapter import AdapterFolder
from mopefuse.runs.folder import RunFolder

PREFIX = "hf-hub:"


def locate(path: str | Path) -> Path:
    """The folder that a path means; what is on the hub is fetched once, whole and of one commit, and kept.

    Raises:
        EncoderError: the hub cannot be reached, or has no such repository. CheckpointError: the repository holds something
            else, names files outside itself, or lacks or changed one. ResourceError: there is no place to keep it.
    """
    text = str(path)
    if not text.startswith(PREFIX):
        return Path(path)
    repo, _, revision = text.removeprefix(PREFIX).partition("@")
    manifest = _fetch(repo, MANIFEST, revision or None, text)
    if manifest is None:
        raise _no_model(repo, text)
    commit = manifest.parent.name
    key = cache.key_of(repo, commit)
    with _said_of(text):
        names = listed_files(read_json(manifest), Path(text))
    if found := cache.find("models", key, thorough=False):
        return found[0] / "model"

    def write(folder: Path) -> None:
        for name in (MANIFEST, *names):
            fetched = _fetch(repo, name, commit, text)
            if fetched is None:
                raise CheckpointError(2, f"{repo} lacks {name}, which its manifest names", where=text, fix="tell its owner")
            target = folder / "model" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched, target)
        kind = kind_of(folder / "model")
        if kind not in (ADAPTER, "bundle"):
            raise _no_model(repo, text)
        with _said_of(text):
            verify(folder / "model", kind=kind)

    kept = cache.keep("models", key, write, {"what": text})
    if kept is None:
        raise ResourceError(10, f"{repo} cannot be kept", where=text, fix="set MOPEFUSE_CACHE to a folder that can be written")
    return kept / "model"


def _fetch(repo: str, name: str, revision: str | None, where: str) -> Path | None:
    """As `_hub.fetch`, with advice for models in place of that for encoders where there is no way to the hub."""
    from mopefuse.core import error_numbers as _numbers
    from mopefuse.core import hub as _hub

    try:
        return _hub.fetch(repo, name, revision, where=where)
    except EncoderError as error:
        if error.number in (_numbers.OFFLINE, _numbers.UNREACHABLE):
            error.fix = "go online, or name a folder with a copy of it"
        raise


def _no_model(repo: str, where: str) -> CheckpointError:
    return CheckpointError(1, f"{repo} holds no model of mopefuse", where=where, fix="name a repository that mopefuse pushed")


@contextmanager
def _said_of(where: str) -> Iterator[None]:
    """What is wrong with a fetched file is said of its repository, not of a folder that nobody knows."""
    try:
        yield
    except CheckpointError as error:
        error.where = where
        if error.number == 2:
            error.fix = "name another revision, or tell its owner"
        raise


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

"""Find a trained model: a run, an adapter or a bundle, in a folder or on the hub (``hf-hub:repo/name@revision``)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mopefuse.core import cache
from mopefuse.core.artifact import MANIFEST, listed_files, read_json, verify
from mopefuse.core.error_codes import CheckpointCode, EncoderCode, ResourceCode
from mopefuse.errors import CheckpointError, EncoderError, ResourceError
from mopefuse.runs.adapter_folder import KIND as ADAPTER
from mopefuse.runs.adapter_folder import AdapterFolder
from mopefuse.runs.folder import RunFolder

PREFIX = "hf-hub:"


def locate(path: str | Path) -> Path:
    """The local folder of a model; a model on the hub is downloaded once per commit and cached.

    Raises:
        EncoderError: the hub cannot be reached, or has no such repository.
        CheckpointError: the repository does not hold a model, its manifest names files outside it, or a file is missing or
            was changed.
        ResourceError: the cache cannot be written.
    """
    text = str(path)
    if not text.startswith(PREFIX):
        return Path(path)
    repo, _, revision = text.removeprefix(PREFIX).partition("@")
    manifest = _fetch(repo, MANIFEST, revision or None, text)
    if manifest is None:
        raise _no_model(repo, text)
    commit = manifest.parent.name
    key = cache.make_key(repo, commit)
    with _errors_name(text):
        names = listed_files(read_json(manifest), Path(text))
    if found := cache.find("models", key, thorough=False):
        return found[0] / "model"

    def write(folder: Path) -> None:
        for name in (MANIFEST, *names):
            fetched = _fetch(repo, name, commit, text)
            if fetched is None:
                what = f"{repo} lacks {name}, which its manifest lists"
                raise CheckpointError(CheckpointCode.FILE_DAMAGED, what, where=text, fix="report this to its owner")
            target = folder / "model" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched, target)
        kind = get_kind(folder / "model")
        if kind not in (ADAPTER, "bundle"):
            raise _no_model(repo, text)
        with _errors_name(text):
            verify(folder / "model", kind=kind)

    kept = cache.store("models", key, write, {"what": text})
    if kept is None:
        raise ResourceError(
            ResourceCode.MODEL_CACHE_NOT_WRITABLE,
            f"{repo} cannot be cached",
            where=text,
            fix="set MOPEFUSE_CACHE to a writable folder",
        )
    return kept / "model"


def _fetch(repo: str, name: str, revision: str | None, where: str) -> Path | None:
    """`mopefuse.core.hub.fetch`, with a fix that suits models rather than encoders if the hub cannot be reached."""
    from mopefuse.core import hub

    try:
        return hub.fetch(repo, name, revision, where=where)
    except EncoderError as error:
        if error.number in (EncoderCode.OFFLINE, EncoderCode.UNREACHABLE):
            error.fix = "go online, or pass a folder with a copy of the model"
        raise


def _no_model(repo: str, where: str) -> CheckpointError:
    fix = "pass a repository written by mopefuse push"
    return CheckpointError(CheckpointCode.NOT_OURS, f"{repo} does not hold a mopefuse model", where=where, fix=fix)


@contextmanager
def _errors_name(where: str) -> Iterator[None]:
    """Errors about a downloaded file name its repository, not the cache folder."""
    try:
        yield
    except CheckpointError as error:
        error.where = where
        if error.number == CheckpointCode.FILE_DAMAGED:
            error.fix = "choose a different revision, or report this to its owner"
        raise


def get_kind(folder: Path) -> str:
    """``run``, ``adapter`` or ``bundle``, according to the manifest of a folder; empty without a manifest."""
    file = folder / MANIFEST
    return str(read_json(file).get("kind", "")) if file.is_file() else ""


def find_run(path: str | Path) -> RunFolder:
    """The run or adapter in a folder or on the hub.

    Raises:
        CheckpointError: there is no such folder, or it is a bundle, which holds a graph and not a model; or see `locate`.
    """
    folder = locate(path)
    if not folder.is_dir():
        raise CheckpointError(
            CheckpointCode.NOT_FOUND, f"run not found: {path}", fix="pass a folder written by mopefuse train or mopefuse export"
        )
    kind = get_kind(folder)
    if kind == "bundle":
        fix = "pass the run that it was exported from"
        raise CheckpointError(
            CheckpointCode.BUNDLE_NOT_TRAINABLE,
            "a bundle can only be evaluated and used for predictions",
            where=str(path),
            fix=fix,
        )
    return AdapterFolder(folder) if kind == ADAPTER else RunFolder(folder)

"""Upload a trained model to the Hugging Face hub: a run as an adapter, an export unchanged.

New repositories are private unless `public` is set, which is also required to write to a public repository.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from mopefuse.config.encoder_sides import specs
from mopefuse.core.artifact import MANIFEST, verify
from mopefuse.core.error_codes import CheckpointCode, ConfigCode, EncoderCode
from mopefuse.core.registry import parse_spec
from mopefuse.errors import CheckpointError, ConfigError, EncoderError, MopefuseError
from mopefuse.runs.adapter_folder import AdapterFolder
from mopefuse.runs.locate import PREFIX, find_run, get_kind, locate

_SECONDS = 10.0  # for the first response of the hub


@dataclass(frozen=True)
class Upload:
    """An upload that is ready to be sent.

    Args:
        files: name to bytes.
        private: whether the repository is, or will be, private.
        there: whether it exists; None if the hub could not be reached.
        local: specs of encoders that are folders on this machine, which others cannot load.
    """

    repo: str
    folder: Path
    files: dict[str, int]
    private: bool
    there: bool | None
    local: tuple[str, ...]


@contextmanager
def prepare_upload(
    run: Path, repo: str, *, checkpoint: str = "best", public: bool = False, offline: bool = False
) -> Iterator[Upload]:
    """Prepare the upload of a run, an adapter or a bundle to `repo`; nothing is sent yet.

    Args:
        offline: continue if the hub cannot be reached, without knowing whether the repository exists.

    Raises:
        ConfigError: `repo` is not the name of a repository, or the repository is public and `public` was not set.
        CheckpointError: the folder is damaged. EncoderError: the hub cannot be reached or denies access.
    """
    name = repo.removeprefix(PREFIX)
    if name.count("/") != 1:
        raise ConfigError(
            ConfigCode.BAD_REPOSITORY_NAME,
            f"{repo!r} is not the name of a repository",
            where="push",
            fix="write organisation/name",
        )
    folder = locate(run)
    kind = _export_kind(folder, checkpoint)
    try:
        there, private = _repository_state(name)
    except EncoderError as error:
        if not offline or error.number != EncoderCode.HUB_UNREACHABLE_ON_PUSH:
            raise
        there, private = None, False
    if there and not private and not public:
        raise ConfigError(
            ConfigCode.REPOSITORY_IS_PUBLIC,
            f"{name} is public",
            where="push",
            fix="add --public, or choose a different repository",
        )
    with tempfile.TemporaryDirectory() as temporary:
        if not kind:
            from mopefuse.export.export import export

            folder, kind = Path(temporary) / name.partition("/")[2], "adapter"
            export(run, folder, form="adapter", checkpoint=checkpoint)
        names = [MANIFEST, *verify(folder, kind=kind, thorough=False)["files"]]
        sizes = {file: (folder / file).stat().st_size for file in sorted(names)}
        yield Upload(
            repo=name,
            folder=folder,
            files=sizes,
            private=private if there else not public,
            there=there,
            local=_local(folder) if kind == "adapter" else (),
        )


def _local(adapter: Path) -> tuple[str, ...]:
    config = AdapterFolder(adapter).config()
    places = {spec: parse_spec(spec).name.partition("#")[0] for spec in specs(config).values() if spec}
    return tuple(spec for spec, place in places.items() if os.path.isdir(os.path.expanduser(place)))


def _export_kind(folder: Path, checkpoint: str) -> str:
    """``adapter`` or ``bundle`` for an export, after its files were verified; empty for a run."""
    kind = get_kind(folder)
    if kind not in ("adapter", "bundle"):
        find_run(folder).config()
        return ""
    verify(folder, kind=kind)
    if checkpoint != "best":
        what = f"an export has no checkpoint {checkpoint}"
        raise CheckpointError(CheckpointCode.NOT_FOUND, what, where=str(folder), fix="remove --checkpoint")
    return kind


def _repository_state(repo: str) -> tuple[bool | None, bool]:
    """Whether a repository exists (None if unknown), and whether it is private."""
    try:
        return True, bool(HfApi().repo_info(repo, timeout=_SECONDS).private)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:  # without access, the hub does not reveal whether the repository exists
            raise _explain(error, repo) from error
        return False, False
    except Exception as error:  # the call only uses the network, so any other error is a connection error
        raise _explain(error, repo) from error


def send(parcel: Upload) -> str:
    """Send a prepared upload in one commit, and return the address of the repository.

    Raises:
        EncoderError: the hub cannot be reached, or denies write access.
    """
    api = HfApi()
    try:
        if not parcel.there:
            api.create_repo(parcel.repo, private=parcel.private, exist_ok=True)
        done = api.upload_folder(
            repo_id=parcel.repo,
            folder_path=parcel.folder,
            allow_patterns=list(parcel.files),
            commit_message="Upload model trained with mopefuse",
        )
    except Exception as error:  # as above
        raise _explain(error, parcel.repo) from error
    return str(done.repo_url if hasattr(done, "repo_url") else done)


def _explain(error: Exception, repo: str) -> MopefuseError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return ConfigError(
            ConfigCode.BAD_REPOSITORY_NAME,
            f"{repo!r} is not the name of a repository",
            where="push",
            fix="write organisation/name",
        )
    if status in (401, 403):
        fix = "set HF_TOKEN to a token with write permission"
        return EncoderError(
            EncoderCode.HUB_WRITE_FORBIDDEN,
            f"you do not have write access to {repo} on the hub (HTTP {status})",
            where="push",
            fix=fix,
        )
    if isinstance(error, HfHubHTTPError) and status is not None:
        return EncoderError(
            EncoderCode.HUB_FAILED, f"the hub returned an error for {repo} (HTTP {status})", where="push", fix="try again later"
        )
    return EncoderError(
        EncoderCode.HUB_UNREACHABLE_ON_PUSH,
        f"the hub cannot be reached ({type(error).__name__})",
        where="push",
        fix="go online, and unset HF_HUB_OFFLINE",
    )

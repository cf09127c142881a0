"""Files of hub repositories: from the local cache, or downloaded and verified, with an error for each kind of failure.

Cached files are used even if the repository has changed since, so that a run always gets the same encoder and works without
a network. Only error classes of `huggingface_hub.errors` are distinguished, not those of the transport below it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mopefuse.core.artifact import sha256
from mopefuse.core.encoder_aliases import ALIASES
from mopefuse.core.error_codes import EncoderCode, ResourceCode
from mopefuse.errors import EncoderError, MopefuseError, ResourceError, similar_names

_TIMEOUT = 3.0  # seconds for the hub's first response
_SHA256_DIGITS = 64
_ELSEWHERE = (
    "create it once on a connected machine and copy its cache (HF_HOME), or use a local folder or ?weights=file, "
    "or add ?pretrained=false for random weights"
)


def fetch(repo: str, filename: str, revision: str | None = None, *, where: str) -> Path | None:
    """Fetch one file of a repository and return its path; None if the repository has no such file.

    Args:
        where: the spec of the encoder, for messages.

    Raises:
        EncoderError: offline, unreachable, gated, not visible, missing or a broken download, each with its own number.
        ResourceError: the cache is not writable.
    """
    try:
        cached = try_to_load_from_cache(repo, filename, revision=revision)
    except HFValidationError as error:
        raise EncoderError(
            EncoderCode.NOT_FOUND, f"{repo!r} is not the name of a repository", where=where, fix="write organisation/name"
        ) from error
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None:  # cached as not existing
        return None
    try:
        metadata = get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision), timeout=_TIMEOUT)
    except EntryNotFoundError:
        return None
    except Exception as error:  # the call only uses the network, so any other error is a connection error
        raise convert_hub_error(error, repo, revision, where) from error
    path = _download(repo, filename, revision, where)
    _verify(path, metadata.etag, where)
    return path


def _download(repo: str, filename: str, revision: str | None, where: str) -> Path:
    try:
        return Path(hf_hub_download(repo, filename, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise convert_hub_error(error, repo, revision, where) from error
    except OSError as error:
        raise ResourceError(
            ResourceCode.HUB_CACHE_NOT_WRITABLE,
            f"cannot write {filename} of {repo} to {error.filename or HF_HUB_CACHE}: {error.strerror or error}",
            where=where,
            fix="free space there, or set HF_HOME to a folder that can be written",
        ) from error
    except Exception as error:
        raise EncoderError(
            EncoderCode.BROKEN_DOWNLOAD,
            f"the download of {filename} of {repo} was interrupted: {error}",
            where=where,
            fix="try again; the download resumes",
        ) from error


def _verify(path: Path, etag: str | None, where: str) -> None:
    """Compare a large file with the hub's sha256 (the etag of such files), and remove the file if they differ."""
    if etag is None or len(etag) != _SHA256_DIGITS:
        return
    found = sha256(path)
    if found != etag:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise EncoderError(
            EncoderCode.BROKEN_DOWNLOAD,
            f"{path.name} has sha256 {found[:12]}… instead of {etag[:12]}…, and was removed",
            where=where,
            fix="try again",
        )


def fetch_all(repo: str, filenames: Iterable[str], revision: str | None = None, *, where: str) -> None:
    """Fetch those of `filenames` that the repository has. If the hub is unreachable, cached files suffice.

    Raises:
        EncoderError, ResourceError: see `fetch`.
    """
    for filename in filenames:
        try:
            fetch(repo, filename, revision, where=where)
        except EncoderError as error:
            if error.code not in (_code(EncoderCode.OFFLINE), _code(EncoderCode.UNREACHABLE)):
                raise
            return


def fetch_safetensors(repo: str, revision: str | None = None, *, where: str) -> Path:
    """Fetch ``model.safetensors`` of a repository, or all its parts, and return the path of the file or of the index.

    Raises:
        EncoderError: the repository has no safetensors weights, or see `fetch`.
    """
    whole = fetch(repo, "model.safetensors", revision, where=where)
    if whole is not None:
        return whole
    index = fetch(repo, "model.safetensors.index.json", revision, where=where)
    if index is None:
        raise no_safetensors_error(repo, where)
    for part in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
        if fetch(repo, part, revision, where=where) is None:
            raise EncoderError(
                EncoderCode.BROKEN_DOWNLOAD,
                f"{repo} lacks {part}, which is listed in its index",
                where=where,
                fix="use a different revision: NAME@REVISION",
            )
    return index


def no_safetensors_error(name: str, where: str) -> EncoderError:
    """Build the error for a repository or folder without safetensors weights."""
    return EncoderError(
        EncoderCode.NO_SAFETENSORS,
        f"{name} has no safetensors weights; other formats (.bin, .pt) are pickles and could run code",
        where=where,
        fix="use a revision with model.safetensors, or convert the weights where you trust them",
    )


def convert_hub_error(error: Exception, repo: str, revision: str | None, where: str) -> MopefuseError:
    """Convert an error of a request to the hub to one of mopefuse."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    number, what, fix = _meaning(error, status, repo, revision)
    if "/" not in repo and (near := similar_names(repo, ALIASES["hf"], most=2)):  # no organisation: probably an alias
        fix = f"did you mean {', '.join(f'hf:{name}' for name in near)}? Otherwise {fix}"
    return EncoderError(number, what, where=where, fix=fix)


def _meaning(error: Exception, status: int | None, repo: str, revision: str | None) -> tuple[int, str, str]:
    if isinstance(error, GatedRepoError):
        return EncoderCode.GATED, f"{repo} is gated", "accept its terms on its page, then set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError) and status == 401:
        return (
            EncoderCode.NOT_VISIBLE,
            f"repository {repo} not found, or it is private and no token was given",
            "check the spelling, or set HF_TOKEN",
        )
    if isinstance(error, RepositoryNotFoundError):
        return EncoderCode.NOT_FOUND, f"repository {repo} not found, or your token has no access to it", "check the spelling"
    if isinstance(error, RevisionNotFoundError):
        return (
            EncoderCode.NO_REVISION,
            f"{repo} has no revision {revision or 'main'!r}",
            "use a branch, a tag or a full commit after the @",
        )
    if isinstance(error, OfflineModeIsEnabled):
        return EncoderCode.OFFLINE, f"{repo} is not in the local cache, and HF_HUB_OFFLINE=1 forbids the network", _ELSEWHERE
    if isinstance(error, HfHubHTTPError) and status == 401:
        return EncoderCode.BAD_TOKEN, f"the hub does not accept your token for {repo}", "renew HF_TOKEN, or unset it"
    if isinstance(error, HfHubHTTPError) and status == 403:
        return (
            EncoderCode.FORBIDDEN,
            f"your token has no permission to read {repo}",
            "set HF_TOKEN to a token with read permission",
        )
    if isinstance(error, HfHubHTTPError):
        return EncoderCode.HUB_FAILED, f"the hub returned an error for {repo} (HTTP {status})", "try again later"
    return (
        EncoderCode.UNREACHABLE,
        f"{repo} is not in the local cache, and the hub cannot be reached ({type(error).__name__})",
        _ELSEWHERE,
    )


def _code(number: int) -> str:
    return EncoderError(number, "").code

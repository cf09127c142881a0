"""Folders and files here and in object stores, by path or URL, through fsspec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mopefuse.core.error_codes import ConfigCode, DataCode, PackageCode
from mopefuse.errors import ConfigError, DataError, MopefuseError, PackageError

FileSystem = Any  # fsspec.AbstractFileSystem, which has no types


def is_url(path: str) -> bool:
    """Whether a path names a place in an object store."""
    return "://" in path


def open_storage(url: str) -> tuple[FileSystem, str]:
    """The file system of a path or URL, and the path in it without a slash at the end.

    Raises:
        PackageError: the package for this kind of URL is not installed. ConfigError: there is no such kind.
    """
    from fsspec.core import url_to_fs

    try:
        found, path = url_to_fs(url)
    except ImportError as error:
        what = f"{url.partition('://')[0]}:// needs {error.name or str(error).removeprefix('Install ').partition(' ')[0]}"
        fix = 'pip install "mopefuse[remote]" for s3://, or the package that fsspec names for other stores'
        raise PackageError(PackageCode.PACKAGE_MISSING, what, where=url, fix=fix) from None
    except ValueError as error:
        fix = "use a local path or a URL such as s3://bucket/folder"
        raise ConfigError(ConfigCode.BAD_PREDICT_INPUT, f"{error}", where=url, fix=fix) from None
    return found, path.rstrip("/") or path


def full_name(storage: FileSystem, path: str) -> str:
    """A path in a file system as it is written in a plan: a URL, or a local path."""
    return path if is_local(storage) else str(storage.unstrip_protocol(path))


def is_local(storage: FileSystem) -> bool:
    """Whether files are on a disk of this machine."""
    return "file" in ([storage.protocol] if isinstance(storage.protocol, str) else storage.protocol)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn any error of a file system while a file is read into one that names it.

    Raises:
        DataError: see the message.
    """
    try:
        yield
    except (MopefuseError, MemoryError):
        raise
    except FileNotFoundError:
        raise DataError(DataCode.TABLE_UNREADABLE, "the file is gone", where=name, fix="restore it, and start again") from None
    except Exception as error:  # the libraries of object stores have errors of their own
        reason = str(error).partition("\n")[0] or type(error).__name__
        fix = "check the path, the credentials and the connection; for S3, AWS_ENDPOINT_URL names the server"
        raise DataError(DataCode.TABLE_UNREADABLE, f"cannot read: {reason}", where=name, fix=fix) from None

"""Files that rows name: they are checked when the index is built, and read when a sample is used.

A modality whose values are files is a subclass of `Files`, which defines how a file is decoded and checked.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from mopefuse.core.error_codes import DataCode, PathCode
from mopefuse.modalities.base import Modality
from mopefuse.modalities.file_source import FileSource, Stamp, as_source

if TYPE_CHECKING:  # bundles run without pydantic
    from mopefuse.config.schema import Data as DataConfig

MISSING = DataCode.FILE_NOT_FOUND.text
_KINDS = {PathCode.OUTSIDE_ROOT.text: "unsafe-path", MISSING: "missing-file", DataCode.NOT_A_REGULAR_FILE.text: "not-a-file"}


class FileInfo(NamedTuple):
    """The result of checking a file.

    Args:
        size, mtime: its `Stamp`; the size is -1 if there is no file.
        width, height: size of a picture, in pixels.
        milliseconds: time that decoding took.
        digest: digest of its content, 16 bytes.
        ids: of a mask, which ids occur: 256 bits.
        code, what, fix: parts of the error; empty if the file can be read.
    """

    size: int = -1
    mtime: int = 0
    width: int = 0
    height: int = 0
    animated: bool = False
    milliseconds: int = 0
    digest: bytes = b""
    ids: bytes = b""
    code: str = ""
    what: str = ""
    fix: str = ""

    @property
    def stamp(self) -> Stamp:
        """Changes whenever the file does."""
        return Stamp(self.size, self.mtime)


class Files(Modality):
    """A modality whose values are files, named by paths relative to the data root."""

    is_file: ClassVar[bool] = True
    leak_kind: ClassVar[str] = "leaked-file"

    @abstractmethod
    def decode(self, content: bytes, name: str, *, where: str, config: DataConfig) -> Any:
        """Decode the content of a file for an encoder's preprocessing.

        Args:
            name: name of the file in the row, for messages. where: file, line and id of the row.

        Raises:
            DataError: the file is damaged, of another format, or too large.
        """

    def inspect(self, content: bytes, name: str, config: DataConfig) -> FileInfo:
        """Check, as cheaply as possible, whether `decode` can read a file; size, times and digest are filled in later.

        Raises:
            DataError: `decode` cannot read it.
        """
        self.decode(content, name, where="", config=config)
        return FileInfo()

    def limits(self, config: DataConfig) -> tuple[object, ...]:
        """The settings that decide the result of `inspect`."""
        return ()

    def findings(self, name: str, info: FileInfo) -> Iterator[tuple[str, str, str]]:
        """Yield the findings of a data check about a file, as (kind, message, hint); see `mopefuse.data.findings.KINDS`."""
        if info.code:
            yield _KINDS.get(info.code, "unreadable-file"), info.what, info.fix

    def read(self, value: str, files: FileSource | Sequence[Path], *, where: str, config: DataConfig) -> Any:
        """See `Modality.read`."""
        content = as_source(files).read(value, where=where, what=self.name)
        return self.decode(content, value, where=where, config=config)


def processor_count() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

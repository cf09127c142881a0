"""The base class of readers of data sets in their original form."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from mopefuse.core.error_codes import DataCode
from mopefuse.data._source_files import SourceFolder
from mopefuse.data.options import Option, complete
from mopefuse.errors import DataError

_FILE_NAME = re.compile("[^/\\\\\0\ud800-\udfff]+")


class Sample(NamedTuple):
    """A row to be written, and the file and line it comes from. `img` is a name in the source and in the prepared folder."""

    id: str
    text: str
    img: str
    label: str | list[str]
    file: str
    line: int | None = None


class Skip(NamedTuple):
    """Something that cannot become a row: the reason, one of a few so that they can be counted, and the place."""

    reason: str
    file: str
    line: int | None = None


class Source(ABC):
    """A reader of one data set's files.

    Attributes:
        name: name of the entry point.
        version: version of the preparation; it is increased when the same files give different rows.
        inputs: names of the files and folders that are read, directly below the source folder.
        layout: the files that it needs, for messages.
        published: number of rows by split, or by a sum of splits (``train+val``), and who published it.
        declared_options: the options that it takes; on the command line they are ``--<name>``.
        labels: in their order, if the data set has a fixed list; written to labels.txt.
        label_is_mask: whether the label of a row is the name of a mask in the source, and `labels` are the names of its ids.
        splits: that `rows` can read. Without "val", the option ``val`` is the number of rows of "train" to hold out.
        folder: the source folder.
        given: the options that the user gave.
        options: all options; a reader may fill in what depends on the files.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    inputs: ClassVar[tuple[str, ...]]
    layout: ClassVar[str]
    published: ClassVar[Mapping[str, tuple[int, str]]] = {}
    declared_options: ClassVar[tuple[Option, ...]] = ()
    labels: tuple[str, ...] = ()
    label_is_mask: ClassVar[bool] = False
    splits: tuple[str, ...] = ("train", "val", "test")

    def __init__(self, folder: SourceFolder, options: Mapping[str, Any]) -> None:
        """Check that the files exist; rows are not read yet.

        Raises:
            DataError: files are missing, or an option does not fit.
        """
        self.folder = folder
        self.given = dict(options)
        self.options = complete(self.name, self.declared_options, options)

    @abstractmethod
    def rows(self, split: str) -> Iterator[Sample | Skip]:
        """Yield everything in a split, in an order that depends only on the files."""

    @property
    @abstractmethod
    def text(self) -> str:
        """Describe the text of a row, for dataset.json."""

    def incomplete(self, missing: str) -> DataError:
        """The error for a missing part of `layout`."""
        names = self.folder.names()
        has = ", ".join(names[:12]) + (", …" if len(names) > 12 else "") if names else "nothing"
        return DataError(
            DataCode.SOURCE_FILE_MISSING,
            f"{missing} not found; the folder contains {has}",
            where=str(self.folder.root),
            fix=f"the folder must contain {self.layout}",
        )


def is_file_name(text: object) -> bool:
    """Whether a value is a valid name of a file, without a path to another folder."""
    return isinstance(text, str) and _FILE_NAME.fullmatch(text) is not None and text not in (".", "..")

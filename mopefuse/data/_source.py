"""The base class of readers of data sets in their original form."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from mopefuse.core.error_codes import DataCode
from mopefuse.data._source_files import SourceFolder
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
        version: version of the preparation; raised when the same files give different rows.
        inputs: names of the files and folders that are read, directly below the source folder.
        layout: the files that it needs, for messages.
        published: number of rows by split, or by a sum of splits (``train+val``), and who published it.
        defaults: the options and their default values; on the command line they are ``--<option>``.
        labels: in their order, if the data set has a fixed list; written to labels.txt.
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
    defaults: ClassVar[Mapping[str, Any]] = {}
    labels: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")

    def __init__(self, folder: SourceFolder, options: Mapping[str, Any]) -> None:
        """Check that the files exist; rows are not read yet.

        Raises:
            DataError: files are missing, or an option does not fit.
        """
        self.folder = folder
        self.given = dict(options)
        self.options = complete(type(self), options)

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
            f"there is no {missing}; the folder contains {has}",
            where=str(self.folder.root),
            fix=f"provide {self.layout}",
        )


def complete(kind: type[Source], options: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the options of a reader with its defaults.

    Raises:
        DataError: an option is unknown, or its value has the wrong type.
    """
    known = ", ".join(f"--{key}" for key in kind.defaults)
    for key, value in options.items():
        if key not in kind.defaults:
            fix = f"remove it; {kind.name} has the options {known}" if known else f"remove it; {kind.name} has no options"
            raise DataError(DataCode.UNKNOWN_PREPARE_OPTION, f"{kind.name} has no option --{key}", where=f"--{key}", fix=fix)
        default = kind.defaults[key]
        expected = str if default is None else type(default)
        if type(value) is not expected:
            fix = f"give {'text' if expected is str else 'a number' if expected is int else 'true or false'}"
            raise DataError(DataCode.BAD_PREPARE_OPTION, f"--{key} cannot be {value!r}", where=f"--{key}", fix=fix)
    return {**kind.defaults, **options}


def is_file_name(text: object) -> bool:
    """Whether a value is a valid name of a file, without a path to another folder."""
    return isinstance(text, str) and _FILE_NAME.fullmatch(text) is not None and text not in (".", "..")

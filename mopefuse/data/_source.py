"""A data set as its owners distribute it: what each reader of one says about itself, and what it yields."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from mopefuse.data._source_files import SourceFolder
from mopefuse.errors import DataError

_FILE_NAME = re.compile("[^/\\\\\0\ud800-\udfff]+")


class Sample(NamedTuple):
    """One row to be, and where it comes from. `img` is a name in the source folder, and the same in the prepared one."""

    id: str
    text: str
    img: str
    label: str | list[str]
    file: str
    line: int | None = None


class Skip(NamedTuple):
    """Something that became no row: why, and where it is. Reasons are few, so that they can be counted."""

    reason: str
    file: str
    line: int | None = None


class Source(ABC):
    """A reader of one data set's files.

    Attributes:
        name: of the entry point.
        version: of the preparation; raised when the same files give other rows.
        inputs: what is read, by its name directly below the source folder.
        layout: the files that it needs, for messages.
        published: rows by split, or by splits added up (``train+val``), and who says so.
        defaults: the options it understands and their values; the flags of the command line are ``--<option>``.
        labels: the labels in their order, where the data set has a fixed list; written to labels.txt.
        splits: what `rows` is asked for. Without "val", as many rows of "train" as the option ``val`` says are held out.
        folder: the source folder.
        asked: what the user said.
        options: `defaults` with that; a reader may fill in what depends on the files.
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
        """Look whether the files are there; read no rows yet.

        Raises:
            DataError: files are missing, or an option does not fit.
        """
        self.folder = folder
        self.asked = dict(options)
        self.options = complete(type(self), options)

    @abstractmethod
    def rows(self, split: str) -> Iterator[Sample | Skip]:
        """Everything that a split has, in an order that depends on nothing but the files."""

    @property
    @abstractmethod
    def text(self) -> str:
        """What the text of a row is, for dataset.json."""

    def incomplete(self, missing: str) -> DataError:
        """The error that something of `layout` is not there."""
        there = self.folder.names()
        has = ", ".join(there[:12]) + (", …" if len(there) > 12 else "") if there else "nothing"
        return DataError(
            63, f"there is no {missing}; the folder has {has}", where=str(self.folder.root), fix=f"provide {self.layout}"
        )


def complete(kind: type[Source], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a reader: its defaults with what was said.

    Raises:
        DataError: it does not understand an option, or the value is of another type.
    """
    known = ", ".join(f"--{key}" for key in kind.defaults)
    for key, value in options.items():
        if key not in kind.defaults:
            fix = f"leave it out; {kind.name} understands {known}" if known else f"leave it out; {kind.name} has no options"
            raise DataError(60, f"{kind.name} does not understand --{key}", where=f"--{key}", fix=fix)
        default = kind.defaults[key]
        expected = str if default is None else type(default)
        if type(value) is not expected:
            fix = f"give {'text' if expected is str else 'a number' if expected is int else 'true or false'}"
            raise DataError(61, f"--{key} cannot be {value!r}", where=f"--{key}", fix=fix)
    return {**kind.defaults, **options}


def is_file_name(text: object) -> bool:
    """Whether a value can be the name of one file: no way to another folder, no characters that names cannot have."""
    return isinstance(text, str) and _FILE_NAME.fullmatch(text) is not None and text not in (".", "..")

"""Checks that every modality must pass; `mopefuse.testing.modality` lists the claims."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np

from mopefuse.config.schema import Data
from mopefuse.errors import MopefuseError
from mopefuse.modalities.base import BY_POSITION, Modality, from_arguments
from mopefuse.modalities.files import Files

_DAMAGED = ("", "no value", "\0", "\ud800", "-1e999 nan", "[", "9" * 5000)
Equal = Callable[[Any, Any], bool]
_OTHER_OBJECTS = (object(), {"a": 1}, {1, 2}, 3.5j)


class ModalityChecks:
    """One modality, and values of it as they are stored in rows."""

    def __init__(self, modality: Modality, values: Sequence[str], root: Path, equal: Equal) -> None:
        self.modality, self.values, self.root, self.equal = modality, [*values], root, equal
        self.config = Data()

    def message(self, what: str) -> str:
        """Describe a fault, naming the modality."""
        return f"{self.modality.name}: {what}"

    def read(self, value: str) -> Any:
        """A value of a row, as encoders get it."""
        return self.modality.read(value, [self.root], where="row", config=self.config)

    def attributes(self) -> None:
        """The attributes that messages use are texts."""
        for name in ("plural", "value_description", "type_fix"):
            text = getattr(self.modality, name)
            assert isinstance(text, str) and text, self.message(f"{name} is {text!r}, expected words for messages")
        name = self.modality.name
        assert name.isidentifier(), self.message(f"its name is {name!r}, expected letters, digits and _")

    def examples(self) -> None:
        """`examples` and `blank_value` return values that are accepted."""
        examples = self.modality.examples()
        assert len(examples) >= 2, self.message(f"examples() gives {len(examples)} values, expected at least 2")
        for value in (*examples, self.modality.blank_value()):
            kind = type(value).__name__
            what = f"accepts() refuses a {kind} of its own examples() or blank_value()"
            assert self.modality.accepts(value), self.message(what)

    def single_and_lists(self) -> None:
        """A list of values is treated as a list, even with a single element."""
        examples = self.modality.examples()
        for values in (examples, tuple(examples), examples[:1]):
            what = f"is_single() takes a {type(values).__name__} of values for one value"
            assert not self.modality.is_single(values), self.message(what)
            found = from_arguments((None,) * len(BY_POSITION), {self.modality.name: values})[self.modality.name]
            assert len(found) == len(values), self.message(f"{len(values)} values become {len(found)}")

    def other_objects_are_refused(self) -> None:
        """Objects that are not values are not accepted, or raise a MopefuseError when they are prepared."""
        for value in _OTHER_OBJECTS:
            if self.modality.accepts(value):
                kind = type(value).__name__
                refused = self.refuses(partial(self.modality.prepare, value, where="sample 0"), f"prepare() of a {kind}")
                assert refused, self.message(f"accepts() and prepare() accept a {kind} as a value")

    def refuses(self, action: Callable[[], object], what: str) -> bool:
        """Whether an action raises a `MopefuseError`; one without a fix, or any other exception, is a fault."""
        try:
            action()
        except MopefuseError as error:
            if not error.fix:
                raise AssertionError(self.message(f"{what} raises an error without a fix: {error}")) from error
            return True
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(self.message(f"{what} raises a {kind}, expected a MopefuseError: {error}")) from error
        return False

    def reading(self) -> None:
        """Reading a value twice gives the same value, and this value is accepted."""
        for value in self.values:
            first = self.read(value)
            assert self.equal(first, self.read(value)), self.message(f"reading {value!r:.60} twice gives two results")
            assert self.modality.accepts(first), self.message(f"accepts() refuses what read() gives for {value!r:.60}")

    def prepares_as_it_reads(self) -> None:
        """prepare() leaves the result of read() unchanged."""
        for value in self.values:
            read = self.read(value)
            found = self.modality.prepare(read, where="sample 0")
            assert self.equal(found, read), self.message(f"prepare() changes what read() gives for {value!r:.60}")

    def workers(self) -> None:
        """The modality and its values can be pickled."""
        for what, value in (("the modality", self.modality), ("a value", [self.read(value) for value in self.values])):
            try:
                ForkingPickler.dumps(value)
            except Exception as error:
                raise AssertionError(self.message(f"{what} cannot be handed to a data worker: {error}")) from error

    def damaged(self) -> None:
        """Meaningless values are read, or raise a MopefuseError."""
        for value in _DAMAGED:
            self.refuses(partial(self.read, value), f"read() of {value!r:.20}")


class FileChecks(ModalityChecks):
    """A modality whose values are files in a folder."""

    modality: Files

    def prepares_as_it_reads(self) -> None:
        """Reading a file by its path gives the same value as reading its row."""
        super().prepares_as_it_reads()
        for value in self.values:
            path = self.root / value
            for given in (path, str(path)):
                assert self.modality.is_single(given) and self.modality.accepts(given), self.message(
                    f"is_single() or accepts() refuses a {type(given).__name__}, the path of a file"
                )
                found = self.modality.prepare(given, where="sample 0")
                assert self.equal(found, self.read(value)), self.message(
                    f"prepare() of the path of {value} is not what read() gives"
                )

    def damaged(self) -> None:
        """Read or reject damaged values, including files that are empty, cut short, or of another kind."""
        super().damaged()
        whole = (self.root / self.values[0]).read_bytes()
        damaged = {"an empty file": b"", "a page of HTML": b"<!doctype html>", "half a file": whole[: len(whole) // 2]}
        for what, content in damaged.items():
            refused = self.refuses(partial(self.inspect, content), f"inspect() at {what}")
            assert refused, self.message(f"inspect() accepts {what} as a value")

    def inspect(self, content: bytes) -> None:
        """See `Files.inspect`."""
        self.modality.inspect(content, "file", self.config)

    def decode(self, content: bytes) -> Any:
        """See `Files.decode`."""
        return self.modality.decode(content, "file", where="row", config=self.config)

    def no_pickle(self) -> None:
        """A pickle, and an array of objects in numpy's format, are not loaded."""
        array = io.BytesIO()
        np.save(array, np.array([_Trap()], dtype=object), allow_pickle=True)
        for content in (bytes(ForkingPickler.dumps(_Trap())), array.getvalue()):
            _Trap.loaded = False
            for action in (self.inspect, self.decode):
                with suppress(MopefuseError):
                    action(content)
            assert not _Trap.loaded, self.message("a file with a pickle in it ran code of its own")

    def stays_inside(self) -> None:
        """Paths that leave the folder, do not exist, or name a folder are rejected."""
        for value in ("../elsewhere", str((self.root / self.values[0]).resolve()), "not-there", "."):
            refused = self.refuses(partial(self.read, value), f"read() of the path {value!r:.60}")
            assert refused, self.message(f"read() takes the path {value!r}")

    def inspects_whole_files(self) -> None:
        """Undamaged files pass `inspect`."""
        for value in self.values:
            try:
                self.inspect((self.root / value).read_bytes())
            except MopefuseError as error:
                raise AssertionError(self.message(f"inspect() refuses {value}, which decode() reads: {error}")) from error


class _Trap:
    """Records that it was unpickled."""

    loaded = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _record_unpickling, ()


def _record_unpickling() -> _Trap:
    _Trap.loaded = True
    return _Trap()


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal: of arrays and images, all elements."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__array__") or hasattr(one, "__array_interface__"):
        return type(one) is type(other) and np.array_equal(np.asarray(one), np.asarray(other))
    return bool(one == other)

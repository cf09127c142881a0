"""The errors that a user can cause: what happened, where, and what to do about it.

One class per exit code. A message is never a traceback: the command line converts a `MopefuseError` once, at its edge
(`mopefuse.cli.app`), into ``error[MF-DATA-11]: <what> · <where> · fix: <one action>`` and the exit code of its class.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class MopefuseError(Exception):
    """Something that a user can cause and can mend.

    Args:
        number: stable within the family; `code` is ``MF-<family>-<number>``.
        what: what is wrong, with the offending value.
        where: file and line, sample id, or configuration path; empty if there is no place to name.
        fix: one action that mends it.
    """

    family = "INT"
    exit_code = 1

    def __init__(self, number: int, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.number = number
        self.code = f"MF-{self.family}-{number:02d}"
        self.what, self.where, self.fix = what, where, fix

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), vars(self))

    def __str__(self) -> str:
        parts = [self.what, self.where, f"fix: {self.fix}" if self.fix else ""]
        return " · ".join(part for part in parts if part)

    def as_dict(self) -> dict[str, object]:
        """The body of ``--json`` output: ``{"code", "exit", "message", "where", "hint"}``."""
        return {
            "code": self.code,
            "exit": self.exit_code,
            "message": self.what,
            "where": self.where,
            "hint": self.fix,
        }


def _rebuild(kind: type[MopefuseError], facts: dict[str, Any]) -> MopefuseError:
    """An error that came from another process."""
    error = kind.__new__(kind, facts["what"])
    vars(error).update(facts)
    return error


class ConfigError(MopefuseError):
    """A recipe, flag or ``--set`` value is invalid."""

    family, exit_code = "CFG", 3


class DataError(MopefuseError):
    """A row, image or split is invalid."""

    family, exit_code = "DATA", 4


class UnsafePathError(DataError):
    """A path in the data leads out of the data folder."""

    family = "SEC"


class EncoderError(MopefuseError):
    """An encoder is unknown, unreachable, or unsuitable for the part it was given."""

    family, exit_code = "ENC", 5


class PackageError(EncoderError):
    """An installed package is missing or does not fit another."""

    family = "ENV"


class CheckpointError(MopefuseError):
    """A run, checkpoint or weights file is damaged, unsafe, or belongs to other encoders."""

    family, exit_code = "CKPT", 6


class ResourceError(MopefuseError):
    """Disk, memory or a process ran out."""

    family, exit_code = "RES", 7


class NumericError(MopefuseError):
    """A number that must be finite is not."""

    family, exit_code = "NUM", 8


class PluginError(MopefuseError):
    """An installed plugin cannot be used."""

    family, exit_code = "PLUG", 9


class GateError(MopefuseError):
    """A quality gate (`eval --min`) was not met."""

    family, exit_code = "GATE", 10


class Interrupted(MopefuseError):
    """Training was asked to stop, and did so after publishing a checkpoint.

    Args:
        signal_number: 2 (Ctrl-C) gives exit code 130, 15 (SIGTERM) gives 143.
    """

    family = "STOP"

    def __init__(self, signal_number: int, what: str, *, fix: str) -> None:
        super().__init__(signal_number, what, fix=fix)
        self.exit_code = 128 + signal_number


class Notice(UserWarning):
    """Something that a user should know and need not mend; the command line prints it as one line."""


def nearest(name: str, known: Iterable[str], *, most: int = 3) -> list[str]:
    """The names that are nearly `name`, nearest first; none where none is."""
    return difflib.get_close_matches(name, sorted(known), n=most, cutoff=0.55)


def did_you_mean(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """``did you mean a, b?`` for the names nearest to `name`; what there is where none is near; empty for no names."""
    names = sorted(known)
    near = nearest(name, names, most=most)
    if near:
        return f"did you mean {', '.join(near)}?"
    return f"there are {', '.join(names[:12])}{', …' if len(names) > 12 else ''}" if names else ""


def data_error(code: str, what: str, *, where: str = "", fix: str = "") -> DataError:
    """The error of a row or image that a code stands for, where only the code was kept."""
    _, family, number = code.split("-")
    kind = UnsafePathError if family == UnsafePathError.family else DataError
    return kind(int(number), what, where=where, fix=fix)

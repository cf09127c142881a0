"""Errors that a user can cause: what is wrong, where, and how to fix it.

One class per family of codes, each with its exit code. The command line converts a `MopefuseError` in one place
(`mopefuse.cli.app`) into ``error[MF-DATA-11]: <what> · <where> · fix: <one action>``, without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class MopefuseError(Exception):
    """An error that a user can cause and fix.

    Args:
        number: stable within the family; `code` is ``MF-<family>-<number>``.
        what: what is wrong, including the offending value.
        where: file and line, sample id, or configuration path; empty if no place can be named.
        fix: one action that fixes it.
    """

    family = "INT"
    exit_code = 1

    def __init__(self, number: int, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.number = number
        self.code = f"MF-{self.family}-{number:02d}"
        self.what, self.where, self.fix = what, where, fix

    def __reduce__(self) -> tuple[object, ...]:
        return _unpickle, (type(self), vars(self))

    def __str__(self) -> str:
        parts = [self.what, self.where, f"fix: {self.fix}" if self.fix else ""]
        return " · ".join(part for part in parts if part)

    def as_dict(self) -> dict[str, object]:
        """Convert to the body of ``--json`` output: ``{"code", "exit", "message", "where", "hint"}``."""
        return {
            "code": self.code,
            "exit": self.exit_code,
            "message": self.what,
            "where": self.where,
            "hint": self.fix,
        }


def _unpickle(kind: type[MopefuseError], attributes: dict[str, Any]) -> MopefuseError:
    """Restore an error that was pickled, for example in a data worker."""
    error = kind.__new__(kind, attributes["what"])
    vars(error).update(attributes)
    return error


class ConfigError(MopefuseError):
    """A recipe, flag or ``--set`` value is invalid."""

    family, exit_code = "CFG", 3


class DataError(MopefuseError):
    """A row, image or split is invalid."""

    family, exit_code = "DATA", 4


class UnsafePathError(DataError):
    """A path in the data is outside the data folder."""

    family = "SEC"


class EncoderError(MopefuseError):
    """An encoder is unknown, unreachable, or unsuitable for its side."""

    family, exit_code = "ENC", 5


class PackageError(EncoderError):
    """A package is missing, or does not match another."""

    family = "ENV"


class CheckpointError(MopefuseError):
    """A run, checkpoint or weights file is damaged, unsafe, or incompatible."""

    family, exit_code = "CKPT", 6


class ResourceError(MopefuseError):
    """Disk space or memory ran out, or a process was killed."""

    family, exit_code = "RES", 7


class NumericError(MopefuseError):
    """A value that must be finite is NaN or infinite."""

    family, exit_code = "NUM", 8


class PluginError(MopefuseError):
    """An installed plugin cannot be used."""

    family, exit_code = "PLUG", 9


class GateError(MopefuseError):
    """A quality gate (`eval --min`) was not met."""

    family, exit_code = "GATE", 10


class RequestError(MopefuseError):
    """A request to a server of models cannot be answered, or the server cannot be started or reached."""

    family, exit_code = "REQ", 11


class Interrupted(MopefuseError):
    """Training was stopped by a signal, after publishing a checkpoint.

    Args:
        signal_number: 2 (Ctrl-C) gives exit code 130, 15 (SIGTERM) gives 143.
    """

    family = "STOP"

    def __init__(self, signal_number: int, what: str, *, fix: str) -> None:
        super().__init__(signal_number, what, fix=fix)
        self.exit_code = 128 + signal_number


_KINDS = (
    ConfigError, DataError, UnsafePathError, EncoderError, PackageError, CheckpointError, ResourceError, NumericError,
    PluginError, GateError, RequestError, MopefuseError,
)  # fmt: skip


class Notice(UserWarning):
    """A warning that needs no action; the command line prints it as one line."""


def similar_names(name: str, known: Iterable[str], *, most: int = 3) -> list[str]:
    """Known names similar to `name`, most similar first, at most `most`; none that is far less similar than the first."""
    near = difflib.get_close_matches(name, sorted(known), n=most, cutoff=0.55)
    similarity = [difflib.SequenceMatcher(None, name, other).ratio() for other in near]
    return [other for other, ratio in zip(near, similarity, strict=True) if ratio > similarity[0] - 0.15]


def did_you_mean(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Suggest the known names similar to `name`, as ``did you mean a, b?``; all names if none is similar."""
    names = sorted(known)
    near = similar_names(name, names, most=most)
    if near:
        return f"did you mean {', '.join(near)}?"
    return f"use one of {', '.join(names[:12])}{', …' if len(names) > 12 else ''}" if names else ""


def error_from_dict(body: Mapping[str, Any]) -> MopefuseError:
    """Build an error from what `MopefuseError.as_dict` returned; the exit code follows from the family.

    Raises:
        KeyError, TypeError, ValueError: it is not such a body.
    """
    _, family, number = body["code"].split("-")
    kinds: dict[str, type[MopefuseError]] = {kind.family: kind for kind in _KINDS}
    what, where, fix = (str(body[key]) for key in ("message", "where", "hint"))
    return kinds[family](int(number), what, where=where, fix=fix)


def data_error(code: str, what: str, *, where: str = "", fix: str = "") -> DataError:
    """Build the error of a row or file from its code, as stored in an index."""
    _, family, number = code.split("-")
    kind = UnsafePathError if family == UnsafePathError.family else DataError
    return kind(int(number), what, where=where, fix=fix)

"""The options that a data set declares in its own code, for the command line and for Python.

A subclass of `mopefuse.data.prepare.Source` lists them as `declared_options`, a function that generates a data set with the
decorator `with_options`. On the command line each is ``--<name>``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mopefuse.core.error_codes import DataCode
from mopefuse.errors import DataError, similar_names

_Made = TypeVar("_Made", bound=Callable[..., Any])
_FIXES = {str: "use a text value", int: "use an integer", bool: "use true or false"}


@dataclass(frozen=True)
class Option:
    """An option of a data set.

    Args:
        name: letters, digits and underscores, which are hyphens on the command line.
        default: determines the type, which is text, a whole number or a truth value; text if it is None.
        help: one sentence.
        choices: the only texts that are allowed; empty if any is.
        minimum: the smallest number that is allowed on the command line.
    """

    name: str
    default: str | int | bool | None
    help: str
    choices: tuple[str, ...] = ()
    minimum: int | None = None

    @property
    def kind(self) -> type[str] | type[int] | type[bool]:
        """The type of its values."""
        return str if self.default is None else type(self.default)

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return f"--{self.name.replace('_', '-')}"

    def check(self, value: Any) -> None:
        """Check a value.

        Raises:
            DataError: it has the wrong type, or is none of the choices.
        """
        fix = ""
        if type(value) is not self.kind:
            fix = _FIXES[self.kind]
        elif self.choices and value not in self.choices:
            fix = f"use {' or '.join(self.choices)}"
        if fix:
            raise DataError(DataCode.BAD_PREPARE_OPTION, f"{self.flag} cannot be {value!r}", where=self.flag, fix=fix)


def with_options(*options: Option) -> Callable[[_Made], _Made]:
    """Declare the options of a function that generates a data set; it gets those that are given as keyword arguments."""

    def declare(function: _Made) -> _Made:
        function.declared_options = options  # type: ignore[attr-defined]
        return function

    return declare


def declared_options(data_set: Any) -> tuple[Option, ...]:
    """The options of a subclass of `Source`, or of a function that generates a data set."""
    return tuple(getattr(data_set, "declared_options", ()))


def complete(name: str, options: Iterable[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options that were given, and complete them with the defaults.

    Args:
        name: name of the data set. options: the options that it declares.

    Raises:
        DataError: an option is unknown, or its value is not valid.
    """
    known = {option.name: option for option in options}
    for key, value in given.items():
        if key not in known:
            raise unknown_option(name, f"--{key.replace('_', '-')}", known.values())
        known[key].check(value)
    return {**{key: option.default for key, option in known.items()}, **given}


def unknown_option(name: str, flag: str, options: Iterable[Option], others: Iterable[str] = ()) -> DataError:
    """The error for a flag that a data set does not have, with the most similar one or all that it has.

    Args:
        others: flags of the command that are not options of the data set.
    """
    flags = [option.flag for option in options]
    near = similar_names(flag, {*flags, *others}, most=1)
    if near:
        fix = f"did you mean {near[0]}?"
    else:
        fix = f"remove {flag}; {name} has the options {', '.join(flags)}" if flags else f"remove {flag}; {name} has no options"
    return DataError(DataCode.UNKNOWN_PREPARE_OPTION, f"{name} has no option {flag}", where=flag, fix=fix)

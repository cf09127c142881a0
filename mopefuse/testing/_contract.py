"""Contracts and their parts: each part has a claim, a check that raises an AssertionError, and a fix for what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mopefuse.errors import MopefuseError


class Part(NamedTuple):
    """One part of a contract.

    Args:
        claim: the property to hold. check: raises an AssertionError that states what is broken and where. fix: what to change.
    """

    claim: str
    check: Callable[[], None]
    fix: str

    def fault(self) -> tuple[str, Exception | None]:
        """How the claim is broken, and the exception that showed it; empty and None if it holds."""
        try:
            self.check()
        except AssertionError as broken:
            return f"{broken} · fix: {self.fix}", broken
        except Exception as error:  # plugin code can raise any exception
            reason = str(error) if isinstance(error, MopefuseError) else f"{type(error).__name__}: {error}"
            return f"unexpected error while checking that it {self.claim}: {reason} · fix: {self.fix}", error
        return "", None


def enforce(parts: Sequence[Part]) -> None:
    """Check all parts in order.

    Raises:
        AssertionError: the first part that is broken: what, where, and how to fix it.
    """
    for part in parts:
        message, cause = part.fault()
        if message:
            raise AssertionError(message) from cause


def faults(parts: Sequence[Part]) -> Iterator[tuple[str, str]]:
    """Every claim, with how it is broken; empty if it holds."""
    for part in parts:
        yield part.claim, part.fault()[0]

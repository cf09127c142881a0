"""Sequences whose items are made when they are used."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar, overload

Item = TypeVar("Item", covariant=True)


class LazySequence(Sequence[Item]):
    """A sequence that makes an item when it is accessed; subclasses define `at` and ``__len__``."""

    @abstractmethod
    def at(self, number: int) -> Item:
        """Make the item at a place, from 0 to the length."""

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        numbers = range(len(self))[index]
        return self.at(numbers) if isinstance(numbers, int) else [self.at(number) for number in numbers]

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return other is self or (len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True)))

    __hash__ = None  # type: ignore[assignment]

"""The modality text; its values are stored in the rows."""

from __future__ import annotations

from typing import Any, ClassVar

from mopefuse.modalities.base import Modality


class Texts(Modality):
    """Texts, used as they are in the row."""

    plural: ClassVar[str] = "texts"
    value_description: ClassVar[str] = "a string"
    leak_kind: ClassVar[str] = "leaked-text"
    type_fix: ClassVar[str] = "pass texts as strings"
    common_columns: ClassVar[tuple[str, ...]] = (
        "caption", "title", "name", "sentence", "description", "content", "plot", "review", "body",
    )  # fmt: skip

    def blank_value(self) -> str:
        """An empty text."""
        return ""

    def examples(self) -> list[Any]:
        """Short, empty and longer texts."""
        longer = "the quick brown fox jumps over the lazy dog, and then over the dog's friend; both of them keep on sleeping"
        return ["A photo of two cats.", "", "no", longer]

    def accepts(self, value: Any) -> bool:
        """Accepts strings."""
        return isinstance(value, str)

    def normalise(self, value: str) -> str:
        """Convert to lower case and single spaces."""
        return " ".join(value.casefold().split())

"""How a page shows a row: its image, its texts, and the names of other files."""

from __future__ import annotations

from mopefuse.data.base import Row
from mopefuse.modalities.base import get_modality
from mopefuse.modalities.file_source import FileSource
from mopefuse.report.data_pictures import Picture, picture


def text_of(row: Row) -> str:
    """The texts of a row, one after the other; empty if it has none."""
    return "\n".join(value for name, value in row.values.items() if value and not get_modality(name).is_file)


def picture_name(row: Row) -> str:
    """The file of the row's picture; empty if it has none."""
    return next((value for name, value in row.values.items() if value and get_modality(name).is_picture), "")


def other_files(row: Row) -> list[str]:
    """The values of a row other than texts and the image: files, each with its modality."""
    return [
        f"{name}: {value}"
        for name, value in row.values.items()
        if value and get_modality(name).is_file and not get_modality(name).is_picture
    ]


def picture_of(
    row: Row, files: FileSource, *, max_pixels: int, place: str = "", text: str = "", mask: str = ""
) -> Picture:
    """The picture of a row; otherwise a description of its error, or the names of the row's other files."""
    name = picture_name(row)
    if name:
        return picture(files, name, max_pixels=max_pixels, place=place, text=text, mask=mask)
    names = ", ".join(other_files(row))
    return Picture(names, instead=names or "no picture", place=place, text=text)

"""The rows of a data set before they are checked, whatever they are stored in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mopefuse.modalities.file_source import FileSource


class TableRow(NamedTuple):
    """One row before it is checked.

    Args:
        value: the object, or a message if it could not be parsed.
        start, stop: place of the row in `Table.content`, in bytes.
    """

    line: int
    value: dict[str, Any] | str
    start: int = 0
    stop: int = 0


class Table(NamedTuple):
    """The rows of a file, a folder of images or several shards.

    Args:
        file: its name, for messages. digest: digest of its content.
        content: content of a file of JSON lines; None for other formats, whose rows are converted to JSON lines.
        files: the files that are stored with the rows; None if rows only name files.
        batches: the rows as Arrow tables, if the format has columns: the same values as in `rows`.
    """

    file: str
    digest: str
    rows: Callable[[], Iterator[TableRow]]
    content: bytes | None = None
    files: FileSource | None = None
    batches: Callable[[], Iterator[Any]] | None = None


class _InvalidJson(ValueError):
    """JSON that the parser accepts but rows must not contain."""


def parse_json_line(line: bytes) -> dict[str, Any] | str:
    """Parse a line of JSON; returns the object, or a message if it is not one."""
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_refuse_duplicate_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        place = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
        return f"is not UTF-8 ({place}); convert the file to UTF-8, for example with iconv -f latin1 -t utf-8"
    except _InvalidJson as error:
        return str(error)
    except json.JSONDecodeError as error:
        return f"is not JSON (column {error.colno}: {error.msg})"
    except RecursionError:
        return "is nested too deeply"
    except ValueError:
        return "has a number with too many digits"
    return value if isinstance(value, dict) else f"is a {type(value).__name__}, expected an object"


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _InvalidJson("has a key twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise _InvalidJson(f"has {name}, which is not JSON")

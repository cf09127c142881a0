"""Messages between the server and its workers: a header of JSON, then the contents of files as they are. No pickle.

A frame is two lengths (header and number of parts), the length of each part, the header and the parts.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mopefuse.errors import MopefuseError, error_from_dict
from mopefuse.serving.engine.request import Answer, Request

PREFIX = struct.Struct(">II")
Frame = tuple[dict[str, Any], list[bytes]]
"""A header and its parts."""


def pack(header: Mapping[str, Any], parts: Sequence[bytes] = ()) -> list[bytes]:
    """A frame in pieces, to be written one after the other."""
    text = json.dumps(header, separators=(",", ":")).encode()
    lengths = struct.pack(f">{len(parts)}Q", *map(len, parts))
    return [PREFIX.pack(len(text), len(parts)) + lengths + text, *parts]


def read_frame(read: Callable[[int], bytes]) -> Frame | None:
    """Read a frame; None at the end of the stream.

    Args:
        read: returns exactly so many bytes, fewer at the end.
    """
    prefix = read(PREFIX.size)
    if len(prefix) < PREFIX.size:
        return None
    length, count = PREFIX.unpack(prefix)
    sizes = struct.unpack(f">{count}Q", read(8 * count))
    header = json.loads(read(length))
    return header, [read(size) for size in sizes]


# -- requests


def pack_requests(number: int, requests: Sequence[Request]) -> list[bytes]:
    """The frame of a batch."""
    parts: list[bytes] = []
    rows = []
    for request in requests:
        values: dict[str, Any] = {}
        for name, value in request.values.items():
            if isinstance(value, bytes):
                parts.append(value)
                values[name] = len(parts) - 1  # a number is that of a part
            else:
                values[name] = value
        rows.append({"model": request.model, "values": values, "top": request.top, "routing": request.routing})
    return pack({"kind": "batch", "number": number, "requests": rows}, parts)


def unpack_requests(frame: Frame) -> list[Request]:
    """The inverse of `pack_requests`."""
    header, parts = frame
    return [
        Request(
            row["model"],
            {name: parts[value] if isinstance(value, int) else value for name, value in row["values"].items()},
            row["top"],
            row["routing"],
        )
        for row in header["requests"]
    ]


# -- answers


def answer_to_json(answer: Answer) -> dict[str, Any]:
    """An answer as a frame holds it."""
    return {"error": answer.as_dict()} if isinstance(answer, MopefuseError) else {"prediction": answer}


def answer_from_json(value: Mapping[str, Any]) -> Answer:
    """The inverse of `answer_to_json`."""
    return error_from_dict(value["error"]) if "error" in value else dict(value["prediction"])

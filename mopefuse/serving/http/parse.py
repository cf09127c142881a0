"""The body of ``POST /predict``: one row, or several, as JSON or as a form, become requests.

A mistake in the body as a whole is an error of the whole body; one in a row is the answer to that row.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import MopefuseError, RequestError, did_you_mean
from mopefuse.modalities import base as modality
from mopefuse.serving.engine.request import Request

_OPTIONS = ("model", "top", "routing", "id")
_SHARED = ("model", "top", "routing", "rows")
_URL = "_url"

Resolve = Callable[[str | None], str]
"""Converts the name of a model in a request, or none, to that of a model that is served; raises a RequestError."""


@dataclass(frozen=True)
class Row:
    """One row of a body.

    Attributes:
        id: what the client called it, if it did; returned as it is.
        request: what is to be predicted; None if the row is wrong. error: why it is.
        urls: by modality, addresses of files that have yet to be read.
    """

    id: str | int | float | None = None
    request: Request | None = None
    error: MopefuseError | None = None
    urls: Mapping[str, str] = field(default_factory=dict)

    def with_files(self, files: Mapping[str, bytes]) -> Row:
        """The row with the files that were read from its `urls`."""
        assert self.request is not None
        return replace(self, request=replace(self.request, values={**self.request.values, **files}), urls={})


@dataclass(frozen=True)
class Body:
    """The rows of a body, and whether it is one row by itself."""

    rows: list[Row]
    single: bool


def parse_json(content: bytes, resolve: Resolve, *, max_rows: int) -> Body:
    """Parse a body of JSON.

    Raises:
        RequestError: it is not JSON, not an object of the expected form, has too many rows, or is a single row with a mistake.
    """
    body = _load(content)
    if not isinstance(body, dict):
        _refuse(f"the body is {_kind(body)}, not an object", fix='send {"text": "...", "image": "<base64>"}')
    if "rows" not in body:
        return Body([_row(body, {}, resolve)], single=True)
    rows = body["rows"]
    if not isinstance(rows, list) or not rows:
        _refuse(f"rows is {_kind(rows) if rows != [] else 'an empty list'}, not a list of rows", where="rows")
    if len(rows) > max_rows:
        what = f"{len(rows):,} rows in one request, and at most {max_rows:,} are allowed"
        fix = "send them in several requests, or start the server with a larger --max-rows"
        raise RequestError(RequestCode.TOO_MANY_ROWS, what, where="rows", fix=fix)
    for name in body:
        if name not in _SHARED:
            fix = f"move {name} into the rows" if name in _known_names() else did_you_mean(name, _SHARED)
            _refuse(f"unexpected {name!r} next to rows", where=name, fix=fix)
    shared = {name: value for name, value in body.items() if name != "rows"}
    _options(shared)
    return Body([_row_or_error(row, number, shared, resolve) for number, row in enumerate(rows)], single=False)


def parse_form(fields: Mapping[str, str | bytes], resolve: Resolve) -> Body:
    """Parse the fields of a form: one row.

    Args:
        fields: texts, and the contents of files.

    Raises:
        RequestError: a field is unknown, or of the wrong kind.
    """
    row: dict[str, Any] = {name: value for name, value in fields.items() if value != b""}  # a file that was not chosen
    if isinstance(row.get("model"), str) and not row["model"]:
        del row["model"]
    if "top" in row:
        row["top"] = _number(row["top"])
    if "routing" in row:
        row["routing"] = _flag(row["routing"])
    return Body([_row(row, {}, resolve, encoded=False)], single=True)


def _load(content: bytes) -> Any:
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        _refuse("the body is not UTF-8", fix="send JSON, or a file as multipart/form-data")
    except RecursionError:
        _refuse("the body is nested too deeply")
    except ValueError as error:
        place = f"line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "body"
        what = error.msg if isinstance(error, json.JSONDecodeError) else "a number is too long"
        _refuse(f"the body is not JSON: {what}", where=place, fix="send an object of JSON, or a form as multipart/form-data")


def _refuse_constant(name: str) -> NoReturn:
    _refuse(f"{name} is not JSON", fix="use null for a missing value")


def _row_or_error(row: Any, number: int, shared: Mapping[str, Any], resolve: Resolve) -> Row:
    try:
        if not isinstance(row, dict):
            _refuse(f"row {number} is {_kind(row)}, not an object", fix='send {"text": "...", "image": "<base64>"}')
        return _row(row, shared, resolve)
    except MopefuseError as error:
        given = row.get("id") if isinstance(row, dict) else None
        return Row(id=given if _is_id(given) else None, error=error)


def _row(row: Mapping[str, Any], shared: Mapping[str, Any], resolve: Resolve, *, encoded: bool = True) -> Row:
    """One row.

    Args:
        encoded: whether files are in base64, as in JSON.
    """
    values: dict[str, str | bytes | None] = {}
    urls: dict[str, str] = {}
    for name, value in row.items():
        if name in _OPTIONS:
            continue
        kind = name.removesuffix(_URL)
        if kind not in modality.modality_names():
            _refuse(f"unknown field {name!r}", where=name, fix=did_you_mean(name, _known_names()))
        is_file = modality.get_modality(kind).is_file
        if name != kind:
            urls[kind] = _url(name, value, is_file=is_file)
        elif value is None:
            values[name] = None
        else:
            values[name] = _file(name, value, encoded=encoded) if is_file else _text(name, value)
    if both := next((name for name in urls if values.get(name) is not None), ""):
        _refuse(f"both {both} and {both}{_URL} were sent", where=both, fix="send one of them")
    options = {**shared, **{name: row[name] for name in _OPTIONS if row.get(name) is not None}}
    _options(options)
    if not values and not urls:
        _refuse("the row has no values", fix='add "text" or "image"')
    model = resolve(options.get("model"))
    request = Request(model, values, options.get("top"), bool(options.get("routing")))
    return Row(options.get("id"), request, urls=urls)


def _options(options: Mapping[str, Any]) -> None:
    """Check what is not a value of a modality."""
    model, top, routing = options.get("model"), options.get("top"), options.get("routing")
    if model is not None and not isinstance(model, str):
        _refuse(f"model is {_kind(model)}, not a name", where="model")
    if top is not None and (type(top) is not int or top < 1):
        _refuse("top must be a whole number, at least 1", where="top", fix="use 1 or more")
    if routing is not None and not isinstance(routing, bool):
        _refuse("routing must be true or false", where="routing")
    if not _is_id(options.get("id")):
        _refuse("id must be a text or a finite number", where="id")


def _is_id(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, str | int) and not isinstance(value, bool))


def _text(name: str, value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            _refuse(f"{name} is not UTF-8", where=name, fix=f"send {name} as a text")
    if not isinstance(value, str):
        _refuse(f"{name} is {_kind(value)}, not a text", where=name, fix=f"send {name} as a text, or null if there is none")
    return value


def _file(name: str, value: Any, *, encoded: bool) -> bytes:
    if isinstance(value, bytes):
        return value
    fix = f"send the content of the file in base64, or its address as {name}{_URL}"
    if not isinstance(value, str):
        _refuse(f"{name} is {_kind(value)}, not a file in base64", where=name, fix=fix)
    if not encoded:
        _refuse(f"{name} was sent as a text, not as a file", where=name, fix=f"send it as a file, as curl -F {name}=@FILE does")
    if value.startswith(("https:", "http:")):
        _refuse(f"{name} is an address, not a file in base64", where=name, fix=f"send it as {name}{_URL}")
    text = value
    if value[:5].lower() == "data:":
        head, comma, text = value.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            _refuse(f"{name} is a data URL without base64", where=name, fix="send data:image/png;base64,...")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        _refuse(f"{name} is not base64", where=name, fix=fix)


def _url(name: str, value: Any, *, is_file: bool) -> str:
    if not is_file:
        _refuse(f"unknown field {name!r}", where=name, fix=did_you_mean(name, _known_names()))
    if not isinstance(value, str):
        _refuse(f"{name} is {_kind(value)}, not an address", where=name)
    return value


def _number(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        _refuse("top must be a whole number, at least 1", where="top", fix="use 1 or more")


def _flag(value: Any) -> bool:
    known = {"true": True, "1": True, "on": True, "false": False, "0": False, "": False}
    text = value.lower() if isinstance(value, str) else None
    if text not in known:
        _refuse("routing must be true or false", where="routing")
    return known[text]


def _known_names() -> list[str]:
    return [*_OPTIONS, *modality.modality_names(), "image_url"]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "a file")


def _refuse(what: str, *, where: str = "body", fix: str = "see /docs for an example") -> NoReturn:
    """Refuse a body or a row.

    Raises:
        RequestError: always.
    """
    raise RequestError(RequestCode.BAD_REQUEST, what, where=where, fix=fix)

"""A client of `mopefuse serve` with the arguments and results of `mopefuse.load(...).predict`. It imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from mopefuse.core.argument_names import python_names
from mopefuse.core.dependencies import require
from mopefuse.core.error_codes import ConfigCode, RequestCode
from mopefuse.errors import ConfigError, MopefuseError
from mopefuse.modalities import base as modality
from mopefuse.serving.client_values import Row, content_of, encode_rows, expected_form, read_prediction
from mopefuse.serving.server_settings import ServerSettings

_TOO_LARGE = 413
_ENVELOPE = 4096  # bytes of a body besides its rows


class Client:
    """Predicts with the models of a server, see `mopefuse serve`. Several threads may share one.

    Args:
        url: address of the server, such as ``http://127.0.0.1:8000``.
        api_key: the server's key; default: the environment variable MOPEFUSE_API_KEY.
        model: name of the model for calls that name none; not needed if the server has only one.
        timeout: seconds to wait for the server, for each request.
        retries: how often a request is sent again if the server is busy or cannot be reached, which is safe because predictions
            have no side effects. The wait is the one that the server asks for, at most a minute, or grows from 0.25 seconds.

    Raises:
        PackageError: httpx is not installed.
        RequestError: `url` is not an address, or `api_key` cannot be sent.
    """

    def __init__(
        self, url: str, api_key: str | None = None, model: str | None = None, timeout: float = 30.0, retries: int = 3
    ) -> None:
        require("httpx", extra="serve", what="mopefuse.Client")
        from mopefuse.serving.client_connection import Connection

        key = os.environ.get("MOPEFUSE_API_KEY", "") if api_key is None else api_key
        self.model = model
        self._connection = Connection(url, key.strip(), timeout, retries)
        self._most_rows, self._most_bytes = ServerSettings.max_rows, ServerSettings().max_body - _ENVELOPE

    def predict(
        self,
        images: Any = None,
        texts: Any = None,
        *,
        model: str | None = None,
        top: int | None = None,
        routing: bool = False,
        errors: str = "raise",
        **more: Any,
    ) -> list[Any]:
        """The prediction for each sample, with the arguments and results of `mopefuse.inference.predict.Predictor.predict`.

        Files are sent as they are, arrays and PIL images as PNG. Samples are sent in as many requests as the server's limits
        require.

        Args:
            images, texts, more: values by modality. top: number of labels in "probabilities". routing: whether to add the
                weights of the experts.
            model: name of the model; default: that of the client.
            errors: "raise" raises the error of the first sample that cannot be predicted; "return" has each such error, a
                `MopefuseError`, in place of the prediction.

        Raises:
            DataError: a value cannot be read, or one is missing that the model needs; unequal numbers of values.
            ConfigError: `top` is less than 1, or `errors` is something else.
            RequestError: the server cannot be reached, refuses the key, or has no such model; see docs/errors.md.
        """
        if top is not None and top < 1:
            what = f"top must be at least 1, got {top}"
            raise ConfigError(ConfigCode.BAD_TOP_COUNT, what, where="predict", fix="use 1 or more")
        if errors not in ("raise", "return"):
            what = f"unknown value {errors!r}"
            raise ConfigError(ConfigCode.UNKNOWN_NAME, what, where="errors", fix="use raise or return")
        with python_names():
            values = modality.from_arguments((images, texts), more)
            modality.count_samples(values)
            modality.require_types(values)
        shared = {"model": self.model if model is None else model, "top": top, "routing": routing or None}
        shared = {name: value for name, value in shared.items() if value is not None}
        found: list[Any] = []
        for one in self._predictions(encode_rows(values), shared):
            if isinstance(one, MopefuseError) and errors == "raise":
                raise one
            found.append(one)
        return found

    def models(self) -> list[dict[str, Any]]:
        """What the server says of each of its models: "name", "task", "method", "labels", "modalities".

        Raises:
            RequestError: see `predict`.
        """
        response = self._connection.send("GET", "/models")
        with expected_form(response):
            models: list[dict[str, Any]] = content_of(response)["models"]
        return models

    def ready(self) -> bool:
        """Whether the server can be reached and has loaded its models."""
        return self._connection.is_ready()

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # -- requests

    def _predictions(self, rows: Iterable[Row], shared: Mapping[str, Any]) -> Iterator[Any]:
        """The prediction of each row, or its error.

        Args:
            shared: what is the same for all rows, such as the model.
        """
        for chunk in self._chunks(rows):
            sent = [(number, row) for number, row in chunk if isinstance(row, str)]
            found = iter(self._predict(sent, shared) if sent else ())
            for _, row in chunk:
                yield row if isinstance(row, MopefuseError) else next(found)

    def _chunks(self, rows: Iterable[Row]) -> Iterator[list[tuple[int, Row]]]:
        """The rows with their numbers, as many together as the server takes in one request."""
        chunk: list[tuple[int, Row]] = []
        size = 0
        for number, row in enumerate(rows):
            length = len(row) + 1 if isinstance(row, str) else 0
            if chunk and (len(chunk) >= self._most_rows or size + length > self._most_bytes):
                yield chunk
                chunk, size = [], 0
            chunk.append((number, row))
            size += length
        if chunk:
            yield chunk

    def _predict(self, rows: Sequence[tuple[int, str]], shared: Mapping[str, Any]) -> list[Any]:
        """The prediction of each row, or its error; from several requests if the server refuses one for its size.

        Its limits are not known beforehand; what is learned of them is kept for later requests.
        """
        body = _body([row for _, row in rows], shared)
        response = self._connection.send("POST", "/predict", body)
        if response.status_code == _TOO_LARGE and len(rows) > 1:
            half = len(rows) // 2
            if RequestCode.TOO_MANY_ROWS.text in response.text:
                self._most_rows = min(self._most_rows, half)
            else:
                self._most_bytes = min(self._most_bytes, len(body) // 2)
            return self._predict(rows[:half], shared) + self._predict(rows[half:], shared)
        with expected_form(response):
            answers = content_of(response)["predictions"]
            return [read_prediction(answer, number) for (number, _), answer in zip(rows, answers, strict=True)]


def _body(rows: Sequence[str], shared: Mapping[str, Any]) -> bytes:
    """The body of a request, of rows that are JSON already."""
    fields = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in shared.items()]
    fields.append('"rows": [' + ",".join(rows) + "]")
    return ("{" + ", ".join(fields) + "}").encode()

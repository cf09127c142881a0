"""What a client sends for a sample, and what it makes of an answer. Nothing here needs torch."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopefuse.core.error_codes import DataCode, RequestCode
from mopefuse.errors import DataError, MopefuseError, RequestError, error_from_dict
from mopefuse.inference.predict import Prediction
from mopefuse.modalities import base as modality
from mopefuse.modalities.file_source import read_content, regular_file
from mopefuse.modalities.masks import decode_runs

if TYPE_CHECKING:
    import httpx

Row = str | MopefuseError
"""A sample as an object of JSON, or why it cannot be sent."""

_OF_THE_CALL = (RequestCode.NO_SUCH_MODEL.text, RequestCode.MODEL_NOT_NAMED.text)


def encode_rows(values: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    """The samples as the server reads them, one after the other, so that not all files are in memory at once.

    Args:
        values: by modality, the values of all samples; see `mopefuse.modalities.base.from_arguments`.
    """
    for number, sample in enumerate(zip(*values.values(), strict=True)):
        where = f"sample {number}"
        try:
            yield json.dumps({name: _encode(name, value, where) for name, value in zip(values, sample, strict=True)})
        except MopefuseError as error:
            yield error


def _encode(name: str, value: Any, where: str) -> str | None:
    """A value as JSON can hold it: a text, or the content of a file in base64."""
    kind = modality.get_modality(name)
    if value is None or (isinstance(value, str) and not kind.is_file):
        return value
    if kind.is_file and isinstance(value, str | Path):
        file = regular_file(Path(value), str(value), where=where, what=name)
        content = read_content(file, str(value), where)
    elif kind.is_picture:
        buffer = io.BytesIO()
        kind.prepare(value, where=where).save(buffer, "PNG", compress_level=1)
        content = buffer.getvalue()
    else:
        what = f"{name} cannot be sent as {type(value).__name__}"
        fix = "pass the path of a file" if kind.is_file else "pass a string"
        raise DataError(DataCode.WRONG_VALUE_KIND, what, where=where, fix=fix)
    return base64.b64encode(content).decode()


def read_prediction(answer: Mapping[str, Any], number: int) -> Prediction | MopefuseError:
    """The prediction for a sample as `mopefuse.inference.predict.Predictor` returns it, or the error of the sample.

    Args:
        answer: what the server sent. number: of the sample among those of the call, for the message.

    Raises:
        RequestError: the server does not know the model, so that no sample can be predicted.
        KeyError, TypeError, ValueError: it is not an answer.
    """
    if "error" in answer:
        error = read_error(answer["error"])
        if error.code in _OF_THE_CALL:
            raise error
        error.where = f"sample {number}, {error.where}" if error.where else f"sample {number}"
        return error
    found = {name: value for name, value in answer.items() if name != "model"}
    if "mask" in found:
        found["mask"] = decode_runs(found["mask"])
    return found


def read_error(body: Mapping[str, Any]) -> MopefuseError:
    """The error that a server sent, of the class that `mopefuse` itself raises for it.

    Raises:
        KeyError, TypeError, ValueError: it is not an error of mopefuse.
    """
    error = error_from_dict(body)
    if error.code == RequestCode.BAD_KEY.text:
        error.where, error.fix = "api_key", "pass api_key, or set MOPEFUSE_API_KEY"
    return error


def content_of(response: httpx.Response) -> Any:
    """What a server sent.

    Raises:
        MopefuseError: it sent an error. KeyError, TypeError, ValueError: it is not a server of mopefuse.
    """
    content = response.json()
    if response.status_code != 200:
        raise read_error(content["error"])
    return content


@contextmanager
def expected_form(response: httpx.Response) -> Iterator[None]:
    """A context in which a response is read.

    Raises:
        RequestError: it is not one of mopefuse.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"the answer, with status {response.status_code}, is not one of mopefuse serve"
        fix = "check that this is the address of mopefuse serve, of the same version"
        raise RequestError(RequestCode.SERVER_FAILED, what, where=str(response.request.url), fix=fix) from error

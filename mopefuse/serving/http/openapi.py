"""The description of the HTTP interface (OpenAPI 3.1), with examples for the models that are served."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from functools import cache
from typing import Any

from PIL import Image

from mopefuse import __version__
from mopefuse.errors import MopefuseError
from mopefuse.modalities import base as modality
from mopefuse.serving.engine.catalogue import Catalogue

_TEXT = "a red car in front of a house"
_ERRORS = """An error, as `error` and in the log under `request_id`. Its status:

- 400: the body cannot be understood; 408: it does not arrive
- 401: the key is missing or wrong
- 403, 422: a value cannot be read, or one is missing that the model needs
- 404: there is no such model
- 413: the body, the image, or the number of rows is too large
- 429: too many requests are waiting; send it again after `Retry-After` seconds
- 503, 504: the server is shutting down, or could not compute the request, or not in time
"""


def describe(catalogue: Catalogue, *, has_key: bool) -> dict[str, Any]:
    """The description.

    Args:
        has_key: whether clients need a key; then the description, which anyone can read, names no model.
    """
    model, modalities = _example_model(catalogue)
    row = {name: _example(name) for name in modalities}
    if model and not has_key:
        row = {"model": model, **row}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "mopefuse", "version": __version__, "description": "Predictions of multimodal classifiers."},
        "paths": {
            "/predict": {"post": _predict(row, modalities)},
            "/models": {"get": _get("The models that are served", "Their names, tasks, labels and modalities.")},
            "/models/{name}": {"get": _get("One model", "Its task, labels and modalities.") | {"parameters": [_NAME]}},
            "/health": {"get": _get("Whether the process lives", "It does.")},
            "/ready": {"get": _get("Whether requests are taken", "They are; 503 while models are loaded, or at the end.")},
            "/metrics": {"get": _get("Metrics for Prometheus", "Counts and histograms as text.")},
        },
        "components": {"schemas": {"Row": _row_schema(modalities), "Error": _ERROR}},
    }
    if has_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _example_model(catalogue: Catalogue) -> tuple[str, list[str]]:
    """The first model that can be read, with its modalities."""
    for name, entry in sorted(catalogue.entries().items()):
        try:
            return name, list(entry.facts["modalities"])
        except MopefuseError:
            continue
    return "", list(modality.BY_POSITION)


@cache
def _example(name: str) -> str:
    """An example of a value."""
    kind = modality.get_modality(name)
    if kind.is_picture:
        picture = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
        content = io.BytesIO()
        picture.save(content, "PNG")
        return base64.b64encode(content.getvalue()).decode()
    return "<base64>" if kind.is_file else _TEXT


def _predict(row: Mapping[str, Any], modalities: list[str]) -> dict[str, Any]:
    several = {"rows": [{"id": 1, **row}, {"id": 2, **row}], "top": 3}
    form = {"model": {"type": "string"}, "top": {"type": "integer"}, "routing": {"type": "boolean"}}
    for name in modalities:
        binary = {"type": "string", "contentMediaType": "application/octet-stream", "format": "binary"}
        form[name] = binary if modality.get_modality(name).is_file else {"type": "string"}
    return {
        "tags": ["predictions"],
        "summary": "Predict one row, or several",
        "description": "One row is an object by itself; several are a list in `rows`, whose mistakes do not affect each other.",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/Row"},
                    "examples": {
                        "one row": {"value": {**row, "top": 3}},
                        "several rows": {"value": several},
                    },
                },
                "multipart/form-data": {"schema": {"type": "object", "properties": form}},
            },
        },
        "responses": {
            "200": {
                "description": "The prediction, or a list of them in `predictions`.",
                "content": {"application/json": {"schema": {"type": "object"}}},
            },
            "default": {
                "description": _ERRORS,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }


def _row_schema(modalities: list[str]) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "model": {"type": "string", "description": "Name of the model; may be left out if there is only one."},
        "top": {"type": "integer", "minimum": 1, "description": "Only so many probabilities, the largest first."},
        "routing": {"type": "boolean", "description": "Also return the weights of the prompt experts."},
        "id": {"type": "string", "description": "Returned as it is; a text or a number."},
    }
    for name in modalities:
        is_file = modality.get_modality(name).is_file
        what = "The content of the file in base64, or a data URL." if is_file else "A text."
        properties[name] = {"type": "string", "description": what}
        if is_file:
            properties[f"{name}_url"] = {"type": "string", "description": "Its address instead, if the server allows that."}
    return {"type": "object", "properties": properties}


def _get(summary: str, description: str) -> dict[str, Any]:
    return {"tags": ["server"], "summary": summary, "responses": {"200": {"description": description}}}


_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
_STRINGS = {name: {"type": "string"} for name in ("code", "message", "where", "hint")}
_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "object", "properties": _STRINGS}, "request_id": {"type": "string"}},
}

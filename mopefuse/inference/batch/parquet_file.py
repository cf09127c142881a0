"""Predictions as a Parquet file with the same columns in every partition."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from mopefuse.core.error_codes import ConfigCode
from mopefuse.errors import ConfigError
from mopefuse.inference.predict import Prediction
from mopefuse.tasks.base import Task
from mopefuse.tasks.regression import Regression


def schema_of(task: Task, labels: Sequence[str]) -> Any:
    """The columns of a task, as a pyarrow schema: ``id``, what is predicted, ``routing`` and ``error``.

    Raises:
        ConfigError: it is not known how the predictions of the task become columns.
    """
    import pyarrow as arrow

    text, number = arrow.string(), arrow.float64()
    probabilities = ("probabilities", arrow.map_(text, number))
    by_task: dict[str, list[tuple[str, Any]]] = {
        "single-label": [("label", text), probabilities],
        "multi-label": [("labels", arrow.list_(text)), probabilities],
        "segmentation": [("mask", text)],
        "retrieval": [("ranked", arrow.list_(arrow.struct([("id", text), ("score", number)])))],
    }
    if isinstance(task, Regression):
        kinds = {"value": number} | ({"quantiles": arrow.map_(text, number)} if len(task.quantiles) > 1 else {})
        by_task[task.name] = [(name, kind if len(labels) == 1 else arrow.map_(text, kind)) for name, kind in kinds.items()]
    if task.name not in by_task:
        what = f"there are no columns for predictions of the task {task.name}"
        raise ConfigError(ConfigCode.BATCH_OPTION, what, where="--format parquet", fix="use --format jsonl")
    error = arrow.struct([("code", text), ("exit", arrow.int32()), *((name, text) for name in ("message", "where", "hint"))])
    routing = arrow.list_(arrow.list_(number))
    return arrow.schema([("id", text), *by_task[task.name], ("routing", routing), ("error", error)])


def to_parquet(predictions: Sequence[Prediction], task: Task, labels: Sequence[str]) -> bytes:
    """Predictions as the content of a Parquet file."""
    import pyarrow as arrow
    from pyarrow import parquet

    schema = schema_of(task, labels)
    rows = [{name: _pairs(one.get(name), schema.field(name).type) for name in schema.names} for one in predictions]
    file = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows, schema), file, compression="zstd")
    return file.getvalue()


def _pairs(value: Any, kind: Any) -> Any:
    """A mapping as the list of pairs that pyarrow wants for a map."""
    import pyarrow as arrow

    if value is None or not arrow.types.is_map(kind):
        return value
    return [(name, _pairs(inner, kind.item_type)) for name, inner in value.items()]

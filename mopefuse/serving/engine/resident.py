"""A loaded model, what predicts its samples, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mopefuse.core.error_codes import DataCode
from mopefuse.errors import DataError
from mopefuse.inference.predict import Model, ModelFacts, Prediction, describe
from mopefuse.serving.engine.catalogue import Entry
from mopefuse.tasks.base import Task


@dataclass(frozen=True)
class Value:
    """One input, decoded.

    Attributes:
        key: digest of its content.
    """

    decoded: Any
    key: bytes


Values = Mapping[str, Value | None]
"""The values of one sample, by each modality that its model reads; None for a missing one."""


@dataclass(frozen=True)
class Outcome:
    """What a model returns for one sample.

    Attributes:
        decoded: what `Task.decode` returns for it, (N,) or more axes. routing: weights (routed layers, experts), or None.
    """

    decoded: NDArray[Any]
    routing: NDArray[Any] | None


@dataclass(frozen=True)
class Facts:
    """See `mopefuse.inference.predict.ModelFacts`."""

    labels: tuple[str, ...]
    task: Task
    thresholds: Sequence[float]
    modalities: tuple[str, ...]
    optional_modalities: tuple[str, ...]
    empty_is_missing: bool

    @classmethod
    def of(cls, model: ModelFacts) -> Facts:
        """The facts of a model."""
        return cls(**{name: getattr(model, name) for name in cls.__dataclass_fields__})


class Executor(Protocol):
    """Predicts samples of one or several models together. Several threads may share one."""

    def run(self, samples: Sequence[tuple[Resident, Values]]) -> list[Outcome]:
        """The outcome of each sample, in their order."""


@dataclass(frozen=True, eq=False)
class Resident:
    """A loaded model.

    Attributes:
        entry: the version that was loaded. model: its labels, task, thresholds and modalities.
        executor: what predicts its samples. weights: what the executor needs of it.
    """

    entry: Entry
    model: ModelFacts
    executor: Executor
    weights: Any = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that it reads."""
        return self.model.modalities

    @property
    def empty_is_missing(self) -> bool:
        """Whether an empty text counts as missing."""
        return self.model.empty_is_missing

    def require(self, values: Values) -> None:
        """Refuse a sample without a modality that the model needs, or without any value.

        Raises:
            DataError: see above.
        """
        missing = [name for name in self.modalities if values[name] is None]
        needed = [name for name in missing if name not in self.model.optional_modalities]
        if needed or len(missing) == len(self.modalities):
            lacking = (needed or missing)[0]
            what = f"the request has no {lacking}, and {self.entry.name} cannot predict without it"
            raise DataError(DataCode.MODALITY_REQUIRED, what, where=lacking, fix=f'add "{lacking}"')

    def describe(self, outcome: Outcome, values: Values, top: int | None, routing: bool) -> Prediction:
        """The prediction for a sample."""
        found = describe(self.model, outcome.decoded, _decoded(values), top)
        if routing and outcome.routing is not None:
            found["routing"] = outcome.routing.tolist()
        return found


def _decoded(values: Values) -> dict[str, Any]:
    return {name: None if value is None else value.decoded for name, value in values.items()}


class Alone:
    """Predicts samples of one model, a run or a bundle, by its own forward pass.

    Args:
        encoders: what other models share with it, which are kept as long as it is.
    """

    def __init__(self, model: Model, encoders: object = None) -> None:
        self.model, self.encoders = model, encoders

    def run(self, samples: Sequence[tuple[Resident, Values]]) -> list[Outcome]:
        """See `Executor.run`."""
        decoded = [_decoded(values) for _, values in samples]
        values = {name: [sample[name] for sample in decoded] for name in self.model.modalities}
        decoded_BN, routing = self.model.predict_decoded(values)
        each = [None] * len(samples) if routing is None else [np.asarray(weights) for weights in routing]
        return [Outcome(*outcome) for outcome in zip(decoded_BN, each, strict=True)]

"""Predict labels for new pairs from a file, a stream or Python, in input order; an invalid pair gives an error instead.

Nothing here needs torch; loading a trained run imports it.

Shapes: B batch, N labels.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.encoder_sides import Comp
from mopefuse.config.recipe import changed_data, saved_config
from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.dependencies import not_installed
from mopefuse.core.error_codes import CheckpointCode, ConfigCode, DataCode, NumericCode
from mopefuse.core.formatting import json_text, spreadsheet_cell
from mopefuse.errors import CheckpointError, ConfigError, DataError, NumericError
from mopefuse.inference.bundle import Bundle
from mopefuse.inference.mask_files import MaskWriter
from mopefuse.inference.pairs import Pair
from mopefuse.modalities import base as modality
from mopefuse.modalities.masks import encode_runs
from mopefuse.runs.locate import find_run, get_kind, locate
from mopefuse.tasks.base import Array, Task
from mopefuse.tasks.segmentation import Segmentation

Prediction = dict[str, Any]


class ModelFacts(Protocol):
    """What describes a trained model, besides its weights."""

    @property
    def labels(self) -> tuple[str, ...]:
        """In the order of the logits."""

    @property
    def task(self) -> Task:
        """What a label is."""

    @property
    def thresholds(self) -> Sequence[float]:
        """Probability from which each label is predicted (multi-label)."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that its encoders read."""

    @property
    def optional_modalities(self) -> tuple[str, ...]:
        """Those of them that it can predict without."""

    @property
    def empty_is_missing(self) -> bool:
        """Whether empty texts counted as missing in its training."""


class Model(ModelFacts, Protocol):
    """A trained run or an exported bundle."""

    @property
    def digest(self) -> str:
        """Digest of everything that a prediction depends on, except the values and the device."""

    @property
    def collate(self) -> Callable[..., Any]:
        """Prepares values, by the names of arguments, as a batch for `predict_batch`."""

    def predict_batch(self, batch: Any) -> tuple[Array, list[Any] | None]:
        """What `Task.decode` returns (B, N), and the routing weights of each sample (routed layers, experts) or None."""

    def predict_decoded(self, values: Mapping[str, Sequence[Any]]) -> tuple[Array, list[Any] | None]:
        """The same for values by modality, B of each."""


@runtime_checkable
class Embedder(Model, Protocol):
    """A model that embeds the values of each modality by themselves, such as one that was trained for retrieval.

    Attributes:
        embedding_key: digest of everything that an embedding depends on, except the value.
    """

    embedding_key: str

    def embed(self, name: str, values: Sequence[Any]) -> NDArray[np.float32]:
        """Embeddings (B, E) of the values of the modality `name`, of length 1."""


@dataclass(frozen=True)
class Predictor:
    """Predicts labels of samples with a loaded model; made by `mopefuse.load`. Several threads may share one."""

    model: Model

    def predict(
        self,
        images: Any = None,
        texts: Any = None,
        *,
        top: int | None = None,
        routing: bool = False,
        **more: Any,
    ) -> list[Prediction]:
        """The prediction for each sample: ``{"label" | "labels", "probabilities": {label: p}}`` or ``{"value": number}``, or
        ``{"mask": array}``, the class of each pixel of the image, uint8 (height, width).

        Args:
            images: PIL images of any mode, paths of files, or arrays of uint8 (height, width, 3); they are prepared as the
                files of a data set are. texts: one for each image. more: values of other modalities, by name
                (``audio=[...]``). Modalities that the model does not read may be left out; None in a list is a sample
                without a value; a single value is treated as a list of one.
            top: number of labels in "probabilities", the most likely first; default all.
            routing: whether to add the weights of the experts, a list for each routed layer.

        Raises:
            DataError: unequal numbers of values, or a value that is not of its modality.
            ConfigError: `top` is less than 1.
        """
        if top is not None and top < 1:
            raise ConfigError(
                ConfigCode.BAD_TOP_COUNT, f"top must be at least 1, got {top}", where="predict", fix="use 1 or more"
            )
        values = modality.from_arguments((images, texts), more)
        if not modality.count_samples(values):
            return []
        _require(values, self.model)
        if isinstance(self.model.task, Segmentation):
            picture = modality.picture_among(self.model.modalities)
            values = {**values, picture: modality.prepare_values(picture, values[picture])}  # their sizes are needed
        samples = [dict(zip(values, sample, strict=True)) for sample in zip(*values.values(), strict=True)]
        return self._describe(self.model.predict_decoded(values), samples, top, routing)

    def predict_batch(self, batch: Any, count: int, *, top: int | None = None, routing: bool = False) -> list[Prediction]:
        """The predictions for what ``model.collate`` returned for `count` samples; not of segmentation. See `predict`."""
        return self._describe(self.model.predict_batch(batch), [{}] * count, top, routing)

    def _describe(
        self, outputs: tuple[Array, list[Any] | None], samples: Sequence[Mapping[str, Any]], top: int | None, routing: bool
    ) -> list[Prediction]:
        decoded_BN, weights_BLK = outputs
        if not np.isfinite(decoded_BN).all():
            raise NumericError(
                NumericCode.PREDICTION_NOT_FINITE,
                "the model's prediction is NaN or infinite",
                fix="train again, or use a different --checkpoint",
            )
        both = zip(decoded_BN, samples, strict=True)
        predictions = [describe(self.model, decoded, sample, top) for decoded, sample in both]
        if routing and weights_BLK is not None:
            for each, weights_LK in zip(predictions, weights_BLK, strict=True):
                each["routing"] = weights_LK
        return predictions

    def embed(self, images: Any = None, texts: Any = None, **more: Any) -> NDArray[np.float32]:
        """The embeddings (B, E) of values of one modality, of length 1; the dot product of two is the score of a pair.

        Args:
            images, texts, more: values of one modality, see `predict`.

        Raises:
            DataError: no values, those of several modalities, or a value that is not of its modality.
            ConfigError: the model was not trained for retrieval.
        """
        if not isinstance(self.model, Embedder) or not self.model.task.compares_samples:
            what, fix = f"the model was trained for the task {self.model.task}, and has no embeddings", "use predict"
            raise ConfigError(ConfigCode.NO_EMBEDDINGS, what, where="embed", fix=fix)
        values = modality.from_arguments((images, texts), more)
        if len(values) != 1:
            what = f"expected values of one modality, got {' and '.join(values) or 'none'}"
            raise DataError(DataCode.BAD_VALUES, what, where="embed", fix="pass images or texts")
        name, given = next(iter(values.items()))
        if name not in self.model.modalities:
            what = f"the model reads {' and '.join(self.model.modalities)}, not {name}"
            raise DataError(DataCode.WRONG_VALUE_KIND, what, where="embed", fix=f"pass {self.model.modalities[0]} values")
        return self.model.embed(name, given)


def describe(model: ModelFacts, decoded: Array, values: Mapping[str, Any], top: int | None = None) -> Prediction:
    """The prediction for a sample.

    Args:
        decoded: what `Task.decode` returned for it, (N,), of masks (N, h, w). values: by modality; a picture as a PIL image.
    """
    task = model.task
    if not isinstance(task, Segmentation):
        return task.predict(decoded.tolist(), model.labels, model.thresholds, top)
    image = values[modality.picture_among(model.modalities)]
    return {"mask": task.mask_of(decoded, (image.height, image.width))}


def _require(values: Mapping[str, Sequence[Any]], model: Model) -> None:
    """Refuse samples that lack a modality that the model needs, or all modalities."""
    read = {name: each for name, each in values.items() if name in model.modalities}
    for number, sample in enumerate(zip(*read.values(), strict=True)):
        missing = [name for name, value in zip(read, sample, strict=True) if value is None]
        needed = [name for name in missing if name not in model.optional_modalities]
        if needed or (missing and len(missing) == len(read)):
            what = f"sample {number} has no {' and no '.join(needed or missing)}, and the model was not trained to handle that"
            raise DataError(
                DataCode.MODALITY_REQUIRED,
                what,
                fix="remove the sample, or train with --modality-dropout (or --either, if the main modality is missing)",
            )


def load(
    path: str | Path, *, checkpoint: str = "best", device: str = "auto", main: str | None = None, comp: Comp = None
) -> Predictor:
    """Load a trained run, an adapter or an exported bundle to predict with; ``hf-hub:repo/name`` is downloaded first.

    Args:
        checkpoint: for a run: "best", "last" or "step-N".
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:N" or "mps".
        main, comp: specs of the encoders, if the same weights have other names on this machine; of several complementary
            encoders as in ``["2=SPEC"]`` or ``["text=SPEC"]``.

    Raises:
        CheckpointError: there is no such run, or its encoders are not those that it was trained with.
        ConfigError: an option that does not apply to a bundle, which contains its encoders.
        PackageError: torch or a library of encoders, which a run or an adapter needs, is not installed.
    """
    folder = locate(path)
    if not folder.is_dir():
        raise CheckpointError(
            CheckpointCode.NOT_FOUND, f"run not found: {path}", fix="pass a folder written by mopefuse train or mopefuse export"
        )
    if get_kind(folder) == "bundle":
        if checkpoint != "best" or main or comp:
            fix = "remove --checkpoint, --main and --comp"
            raise ConfigError(
                ConfigCode.MODEL_WITHOUT_ENCODERS,
                "checkpoint and encoders of a bundle cannot be changed",
                where=str(path),
                fix=fix,
            )
        return Predictor(Bundle(folder, device))
    try:
        from mopefuse.inference.run_model import RunModel
    except ImportError as error:  # if only the runtime of bundles is installed
        raise not_installed(error) or error from error

    return Predictor(RunModel(folder, checkpoint, device, main=main, comp=comp))


def input_settings(path: str | Path, changes: Mapping[str, Any] | None = None) -> DataConfig:
    """The settings to read samples for a model with: the columns of its training data.

    Args:
        path: path of the model, see `load`.
        changes: settings of `data` by name that override those; see `mopefuse.config.recipe.changed_data`.

    Raises:
        CheckpointError: there is no such model. ConfigError: one of `changes` is not a setting.
    """
    folder = locate(path)
    if get_kind(folder) == "bundle":
        saved = saved_config(folder / "config.yaml").data
    else:
        saved = find_run(folder).config().data
    return changed_data(saved.model_copy(update={"path": None, "on_missing": "error"}), changes or {})


def predict_pairs(
    predictor: Predictor,
    pairs: Iterable[Pair],
    *,
    batch: int = 32,
    top: int | None = None,
    routing: bool = False,
    strict: bool = False,
    masks: MaskWriter | None = None,
) -> Iterator[Prediction]:
    """A prediction for each pair, in their order; ``{"id", "error": {...}}`` for an invalid pair.

    Args:
        batch: pairs in one forward pass. masks: writes predicted masks to files; None for masks in the predictions.

    Raises:
        MopefuseError: with `strict`, the error of the first invalid pair.
    """
    pairs = iter(pairs)
    while group := list(islice(pairs, batch)):
        good = [pair for pair in group if pair.error is None]
        values = {name: [pair.values[name] for pair in good] for name in (good[0].values if good else ())}
        predictions = iter(predictor.predict(**modality.to_arguments(values), top=top, routing=routing))
        for pair in group:
            if pair.error is not None and strict:
                raise pair.error
            found: Prediction = {"error": pair.error.as_dict()} if pair.error is not None else next(predictions)
            if masks is not None and "mask" in found:
                found["mask"] = masks.write(pair.id, pair.values[modality.picture_among(pair.values)], found["mask"])
            yield {"id": pair.id, **as_json(found)}


def as_json(prediction: Prediction) -> Prediction:
    """A prediction as JSON can hold it: a mask as runs, see `mopefuse.modalities.masks.encode_runs`."""
    mask = prediction.get("mask")
    return {**prediction, "mask": encode_runs(mask)} if isinstance(mask, np.ndarray) else prediction


# -- writing predictions


def as_jsonl(predictions: Iterable[Prediction]) -> Iterator[str]:
    """One line of JSON for each prediction."""
    return (json_text(one) + "\n" for one in predictions)


def as_csv(predictions: Iterable[Prediction], model: Model) -> Iterator[str]:
    """A header, then id, what is predicted (labels separated by ``|``, and the probability of each), and the error."""
    yield _csv_line(["id", *model.task.table_header(model.labels), "error"])
    for one in predictions:
        error = one["error"]["message"] if "error" in one else ""
        yield _csv_line([one["id"], *model.task.table_cells(one, model.labels), error])


def _csv_line(cells: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(map(spreadsheet_cell, cells))
    return text.getvalue()

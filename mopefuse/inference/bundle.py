"""Predict with an exported bundle, without torch: it needs only onnxruntime, tokenizers, Pillow and numpy.

``Bundle(folder)`` compares every file with the manifest before it opens one. `mopefuse.load` and ``mopefuse predict`` use
it; your own program can, too. Preprocessing is that of training, pixel for pixel and token for token.

Shapes: B batch, N labels, L tokens, K experts, H, W of the main or complementary encoder's images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mopefuse.core import cache
from mopefuse.core.artifact import verify
from mopefuse.core.dependencies import convert_error
from mopefuse.core.error_codes import CheckpointCode, DataCode, NumericCode
from mopefuse.errors import CheckpointError, DataError, NumericError
from mopefuse.inference.bundle_manifest import read_labels, read_preprocess
from mopefuse.inference.bundle_runtime import EXPORT_AGAIN, Array, Runner, load_runner
from mopefuse.inference.bundle_tokens import load_tokenizer
from mopefuse.modalities import base as modality
from mopefuse.modalities import pixels

KIND = "bundle"
MODELS = {"onnx": "model.onnx", "pt2": "model.pt2"}


class Bundle:
    """A folder that ``mopefuse export`` wrote.

    Args:
        device: "auto" (a GPU if the installed runtime supports one, else the CPU), "cpu", "cuda" or "cuda:N".
        threads: threads of onnxruntime; None for its default.
        manifest: manifest of a bundle that is still being made.

    Raises:
        CheckpointError: not a bundle, or a file differs from what was exported. PackageError: a missing package.
        ConfigError: there is no such device.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "auto",
        *,
        threads: int | None = None,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.manifest = folder, manifest or _verified(folder)
        file = folder / MODELS[self.manifest["model"]]
        self.labels, self.task, thresholds = read_labels(folder)
        self.thresholds: Sequence[float] = list(thresholds)
        self.sides, self.empty_is_missing = read_preprocess(folder)
        self.modalities = tuple(dict.fromkeys(how["modality"] for how in self.sides.values()))
        needed = {how["modality"] for how in self.sides.values() if not how.get("optional")}
        self.optional_modalities = tuple(name for name in self.modalities if name not in needed)
        texts = {side: how for side, how in self.sides.items() if how["modality"] == "text"}
        for how in texts.values() if "files" in self.manifest else ():  # a bundle that is being made has none yet
            if (name := how["tokenizer"].get("file")) is not None and name not in self.manifest["files"]:
                raise CheckpointError(
                    CheckpointCode.CONTENT_DAMAGED,
                    f"the tokenizer {name} is not in the manifest",
                    where=str(folder),
                    fix=EXPORT_AGAIN,
                )
        self._tokenize = {side: load_tokenizer(how, folder) for side, how in texts.items()}
        self._run: Runner = load_runner(file, device, threads)

    def collate(self, images: Any = None, texts: Any = None, **more: Any) -> dict[str, Array]:
        """Prepare images and texts as inputs of the graph.

        Args:
            images, texts, more: as in `mopefuse.inference.predict.Predictor.predict`.

        Raises:
            DataError: unequal numbers of values, a value that is not of its modality, or None where a value is needed.
        """
        values = modality.from_arguments((images, texts), more)
        modality.count_samples(values)
        modality.require_types(values)
        values |= {name: modality.prepare_values(name, values[name]) for name in self.modalities if name in values}
        inputs: dict[str, Array] = {}
        for side, how in self.sides.items():
            given = modality.require_values(how["modality"], values, "the bundle")
            if how.get("optional"):
                inputs[f"{side}_missing"] = np.array([value is None for value in given], dtype=np.bool_)
            elif any(value is None for value in given):
                what = f"a sample has no {how['modality']}, and the model was not trained to handle that"
                raise DataError(DataCode.MODALITY_REQUIRED, what, where=side, fix="remove the sample")
            own = modality.fill_missing(how["modality"], given)
            if how["modality"] == "image":
                resize = how["resize"] if isinstance(how["resize"], int) else (how["resize"][0], how["resize"][1])
                shrunk = [pixels.shrink(image, resize, how["interpolation"]) for image in own]
                inputs[f"{side}_pixels"] = np.stack([pixels.centre(one, (how["size"][0], how["size"][1])) for one in shrunk])
            else:
                inputs[f"{side}_ids"], inputs[f"{side}_mask"] = self._tokenize[side](own)
        return inputs

    def run(self, inputs: Mapping[str, Array]) -> tuple[Array, Array | None]:
        """Logits (B, N), and routing (B, routed layers, K) if it was exported.

        Args:
            inputs: ``<side>_pixels`` (B, H, W, 3) of uint8; ``<side>_ids`` (B, L) of int64 and ``<side>_mask`` (B, L),
                True where a token is real; ``<side>_missing`` (B,) of sides that a sample may lack, True where it does.
                `collate` makes them.

        Raises:
            DataError: an input is missing, has another type or shape, or has a token outside the encoder's vocabulary.
            CheckpointError: labels.json does not fit the graph. NumericError: the logits are not finite.
        """
        self.check(inputs)
        names = [name for side, how in self.sides.items() for name, _, _ in _expected(side, how)]
        in_order = sorted(names, key=lambda name: name.endswith("_missing"))
        outputs = self._outputs({name: np.ascontiguousarray(inputs[name]) for name in in_order})  # as the graph was traced
        if outputs[0].shape[1] != (wanted := self.task.outputs(self.labels)):
            what = f"the graph has {outputs[0].shape[1]} outputs, and labels.json describes {wanted}"
            raise CheckpointError(CheckpointCode.CONTENT_DAMAGED, what, where=str(self.folder), fix=EXPORT_AGAIN)
        if not np.isfinite(outputs[0]).all():
            raise NumericError(
                NumericCode.PREDICTION_NOT_FINITE,
                "the model's prediction is NaN or infinite",
                where=str(self.folder),
                fix=EXPORT_AGAIN,
            )
        return outputs[0], outputs[1] if len(outputs) > 1 else None

    def _outputs(self, inputs: dict[str, Array]) -> Sequence[Array]:
        """The outputs of the graph, arrays of floats: (B, N) and, if routing was exported, (B, routed layers, K).

        Raises:
            CheckpointError: the graph cannot be run, or has other outputs. ResourceError: out of memory.
        """
        try:
            outputs = self._run(inputs)
        except Exception as error:  # a damaged graph fails in whichever operator it reaches
            if (known := convert_error(error)) is not None:
                raise known from error
            reason = str(error).partition("\n")[0]
            what = f"the graph cannot be run: {reason}"
            raise CheckpointError(CheckpointCode.GRAPH_FAILED, what, where=str(self.folder), fix=EXPORT_AGAIN) from error
        batch = len(next(iter(inputs.values())))
        dims = [(output.ndim, len(output) if output.ndim else 0, output.dtype.kind) for output in outputs]
        logits = (self.task.output_axes, batch, "f")
        if dims not in ([logits], [logits, (3, batch, "f")]):
            what = "the graph's outputs are not logits (and routing) of the expected shape"
            raise CheckpointError(CheckpointCode.GRAPH_FAILED, what, where=str(self.folder), fix=EXPORT_AGAIN)
        return outputs

    def predict_decoded(self, values: Mapping[str, Sequence[Any]]) -> tuple[Array, list[Any] | None]:
        """Decoded outputs (B, N) and routing; see `mopefuse.inference.predict.Model`."""
        return self.predict_batch(self.collate(**modality.to_arguments(values)))

    def predict_batch(self, batch: Mapping[str, Array]) -> tuple[Array, list[Any] | None]:
        """See `mopefuse.inference.predict.Model`."""
        outputs_BN, routing = self.run(batch)
        return self.task.decode(outputs_BN), None if routing is None else routing.tolist()

    @property
    def embedding_key(self) -> str:
        """See `mopefuse.inference.predict.Embedder`."""
        return self.digest

    @property
    def digest(self) -> str:
        """See `mopefuse.inference.predict.Model`."""
        return cache.make_key(*sorted(map(str, self.manifest["files"].items())))

    def embed(self, name: str, values: Sequence[Any]) -> Array:
        """Embeddings (B, E) of values of one modality; see `mopefuse.inference.predict.Embedder`.

        The graph embeds both values of a pair, so the other one is blank here.
        """
        blanks = {other: [modality.get_modality(other).blank_value()] * len(values) for other in self.modalities}
        outputs_BN, _ = self.run(self.collate(**modality.to_arguments({**blanks, name: values})))
        both = np.split(outputs_BN.astype(np.float32), 2, axis=1)
        embedding_BE = both[[how["modality"] for how in self.sides.values()].index(name)]
        return np.asarray(embedding_BE / np.linalg.norm(embedding_BE, axis=1, keepdims=True))

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Refuse inputs that the graph would refuse with an obscure message, or not at all.

        Raises:
            DataError: see `run`.
        """
        shapes = {name: (how, own, kind) for side, how in self.sides.items() for name, own, kind in _expected(side, how)}
        if inputs.keys() != shapes.keys():
            raise DataError(
                DataCode.WRONG_INPUT_NAMES,
                f"wrong inputs: got {', '.join(sorted(inputs))}",
                fix=f"pass {', '.join(sorted(shapes))}, such as those that `collate` returns",
            )
        batch = len(next(iter(inputs.values())))
        for name, array in inputs.items():
            how, shape, kind = shapes[name]
            fits = array.ndim == len(shape) and all(want in (0, have) for have, want in zip(array.shape, shape, strict=True))
            if array.dtype != kind or not fits or not batch or len(array) != batch:
                wanted = "x".join(str(side) if side else "L" for side in shape[1:])
                what = f"{name} is {array.dtype} of shape {'x'.join(map(str, array.shape))}"
                fix = f"pass {np.dtype(kind)} of shape Bx{wanted}, with the same batch size B >= 1 in all inputs"
                raise DataError(DataCode.WRONG_INPUT_SHAPE, what, where=name, fix=fix)
            if name.endswith("_ids"):
                _check_ids(name, array, inputs[name.replace("_ids", "_mask")], how)


def _verified(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, after all its files were compared with it."""
    manifest = verify(folder, kind=KIND)
    if manifest.get("model") not in [*MODELS]:  # a list, as the value may not be hashable
        raise CheckpointError(
            CheckpointCode.CONTENT_DAMAGED, "the manifest lists no model", where=str(folder), fix=EXPORT_AGAIN
        )
    missing = {"labels.json", "preprocess.json", MODELS[manifest["model"]]} - manifest["files"].keys()
    if missing:
        raise CheckpointError(
            CheckpointCode.CONTENT_DAMAGED, f"the manifest lists no {min(missing)}", where=str(folder), fix=EXPORT_AGAIN
        )
    return manifest


def _expected(side: str, how: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...], type]]:
    """(name, shape with 0 for any, type) of the inputs of a side."""
    missing = [(f"{side}_missing", (0,), np.bool_)] if how.get("optional") else []
    if how["modality"] == "image":
        return [(f"{side}_pixels", (0, *how["size"], 3), np.uint8), *missing]
    length = how.get("length") or 0
    return [(f"{side}_ids", (0, length), np.int64), (f"{side}_mask", (0, length), np.bool_), *missing]


def _check_ids(name: str, ids_BL: Array, mask_BL: Array, how: Mapping[str, Any]) -> None:
    most, length = how["vocabulary"], how.get("length") or how["max_tokens"]
    if ids_BL.shape != mask_BL.shape or not 1 <= ids_BL.shape[1] <= length or not mask_BL.any(axis=1).all():
        what = f"{name} of shape {ids_BL.shape} does not match its mask, or does not have 1 to {length} tokens"
        raise DataError(
            DataCode.MASK_MISMATCH, what, where=name, fix="pass ids and mask of the same shape, with a real token in each row"
        )
    if ids_BL.min() < 0 or (most and ids_BL.max() >= most):
        what = f"{name} has the token {ids_BL.max() if ids_BL.min() >= 0 else ids_BL.min()}; valid ids are 0 to {most - 1}"
        raise DataError(DataCode.TOKEN_OUT_OF_RANGE, what, where=name, fix="use the tokenizer of the bundle (`collate`)")


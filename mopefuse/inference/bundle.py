"""An exported bundle as something to ask, without torch: onnxruntime, tokenizers, Pillow and numpy are all it needs.

``Bundle(folder)`` checks every file against the manifest before it opens one. `mopefuse.load` and ``mopefuse predict`` use
it; so can a program of yours. Preprocessing is that of training, pixel for pixel and token for token.

Shapes: B batch, N labels, L tokens, K experts, H, W of the main or complementary encoder's images.
"""

from __future__ import annotations

import html
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopefuse.core.artifact import verify
from mopefuse.core.dependencies import mendable
from mopefuse.errors import CheckpointError, ConfigError, DataError, Notice, NumericError, PackageError
from mopefuse.inference.bundle_facts import read_labels, read_preprocess
from mopefuse.modalities import base as modality
from mopefuse.modalities import pixels, tokens

KIND = "bundle"
MODELS = {"onnx": "model.onnx", "pt2": "model.pt2"}
Array = NDArray[Any]
Runner = Callable[[dict[str, Array]], Sequence[Array]]

_AGAIN = "export the run again"
_QUOTES = {0x2018: "'", 0x2019: "'", 0x201A: "'", 0x201B: "'", 0x201C: '"', 0x201D: '"', 0x201E: '"', 0x201F: '"'}
_LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
_WIDE = {0x3000: " "} | {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}


class Bundle:
    """A folder that ``mopefuse export`` wrote.

    Args:
        device: ``auto`` (a GPU that the installed runtime knows, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: of onnxruntime; None leaves it to choose.
        manifest: of a bundle that is being made and is not yet published.

    Raises:
        CheckpointError: no bundle, or a file of it is not what was exported. PackageError: a missing package.
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
        self.labels, self.multi_label, thresholds = read_labels(folder)
        self.thresholds: Sequence[float] = list(thresholds)
        self.sides, self.empty_is_missing = read_preprocess(folder)
        self.modalities = tuple(dict.fromkeys(how["modality"] for how in self.sides.values()))
        needed = {how["modality"] for how in self.sides.values() if not how.get("may_lack")}
        self.may_lack = tuple(name for name in self.modalities if name not in needed)
        texts = {side: how for side, how in self.sides.items() if how["modality"] == "text"}
        for how in texts.values() if "files" in self.manifest else ():  # a bundle that is being made has none yet
            if (name := how["tokenizer"].get("file")) is not None and name not in self.manifest["files"]:
                raise CheckpointError(3, f"the tokenizer {name} is not in the manifest", where=str(folder), fix=_AGAIN)
        self._tokenize = {side: _tokenizer(how, folder) for side, how in texts.items()}
        self._run: Runner = (_onnx if file.suffix == ".onnx" else _pt2)(file, device, threads)

    def collate(self, images: Any = None, texts: Any = None, **more: Any) -> dict[str, Array]:
        """Images and texts, as `mopefuse.inference.predict.Predictor.predict` takes them,
        as the graph's inputs; None where a sample has none, and the graph can do without.

        Raises:
            DataError: not as many of one as of another, something that is no image or no text, or None where something is
                needed.
        """
        values = modality.named((images, texts), more)
        modality.count_of(values)
        modality.require_kinds(values)
        values |= {name: modality.prepared(name, values[name]) for name in self.modalities if name in values}
        inputs: dict[str, Array] = {}
        for side, how in self.sides.items():
            given = modality.require_given(how["modality"], values, "the bundle")
            if how.get("may_lack"):
                inputs[f"{side}_missing"] = np.array([value is None for value in given], dtype=np.bool_)
            elif any(value is None for value in given):
                what = f"a sample has no {how['modality']}, and the model was not trained to do without"
                raise DataError(100, what, where=side, fix="leave it out")
            own = modality.or_nothing(how["modality"], given)
            if how["modality"] == "image":
                resize = how["resize"] if isinstance(how["resize"], int) else (how["resize"][0], how["resize"][1])
                shrunk = [pixels.shrink(image, resize, how["interpolation"]) for image in own]
                inputs[f"{side}_pixels"] = np.stack([pixels.centre(one, (how["size"][0], how["size"][1])) for one in shrunk])
            else:
                inputs[f"{side}_ids"], inputs[f"{side}_mask"] = self._tokenize[side](own)
        return inputs

    def run(self, inputs: Mapping[str, Array]) -> tuple[Array, Array | None]:
        """Logits (B, N), and routing (B, routed layers, K) where it was exported, of raw inputs.

        Args:
            inputs: ``<side>_pixels`` (B, H, W, 3) of uint8; ``<side>_ids`` (B, L) of int64 and ``<side>_mask`` (B, L),
                True where a token is real; ``<side>_missing`` (B,) of sides that a sample may have nothing for, True where
                that is so. `collate` makes them.

        Raises:
            DataError: a missing input, or one of another type or shape, or a token that the encoder does not know.
            CheckpointError: labels.json does not fit the graph. NumericError: the answer is not finite.
        """
        self.check(inputs)
        names = [name for side, how in self.sides.items() for name, _, _ in _expected(side, how)]
        in_order = sorted(names, key=lambda name: name.endswith("_missing"))
        outputs = self._outputs({name: np.ascontiguousarray(inputs[name]) for name in in_order})  # as the graph was traced
        if outputs[0].shape[1:] != (len(self.labels),):
            what = f"the graph answers for {outputs[0].shape[-1]} labels, labels.json has {len(self.labels)} labels"
            raise CheckpointError(3, what, where=str(self.folder), fix=_AGAIN)
        if not np.isfinite(outputs[0]).all():
            raise NumericError(3, "the model's answer is not finite", where=str(self.folder), fix=_AGAIN)
        return outputs[0], outputs[1] if len(outputs) > 1 else None

    def _outputs(self, inputs: dict[str, Array]) -> Sequence[Array]:
        """One or two arrays of floats: (B, N), and (B, routed layers, K) if there are two.

        Raises:
            CheckpointError: the graph cannot be run, or gives something else. ResourceError: out of memory.
        """
        try:
            outputs = self._run(inputs)
        except Exception as error:  # a damaged graph fails in whichever operator it reaches
            if (known := mendable(error)) is not None:
                raise known from error
            reason = str(error).partition("\n")[0]
            raise CheckpointError(200, f"the graph cannot be run: {reason}", where=str(self.folder), fix=_AGAIN) from error
        batch = len(next(iter(inputs.values())))
        dims = [(output.ndim, len(output) if output.ndim else 0, output.dtype.kind) for output in outputs]
        if dims not in ([(2, batch, "f")], [(2, batch, "f"), (3, batch, "f")]):
            what = "the graph does not give the logits of each sample, and their routing"
            raise CheckpointError(200, what, where=str(self.folder), fix=_AGAIN)
        return outputs

    def say(self, values: Mapping[str, Sequence[Any]]) -> tuple[list[list[float]], list[Any] | None]:
        """Probabilities (B, N) and routing; see `mopefuse.inference.predict.Model`."""
        logits_BN, routing = self.run(self.collate(**modality.by_argument(values)))
        p_BN: list[list[float]] = probabilities(logits_BN, multi_label=self.multi_label).tolist()
        return p_BN, None if routing is None else routing.tolist()

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Refuse, in plain words, what the graph would refuse in its own, or not at all.

        Raises:
            DataError: see `run`.
        """
        shapes = {name: (how, own, kind) for side, how in self.sides.items() for name, own, kind in _expected(side, how)}
        if inputs.keys() != shapes.keys():
            raise DataError(
                87, f"the inputs are {', '.join(sorted(inputs))}", fix=f"give {', '.join(sorted(shapes))}, as `collate` does"
            )
        batch = len(next(iter(inputs.values())))
        for name, array in inputs.items():
            how, shape, kind = shapes[name]
            fits = array.ndim == len(shape) and all(want in (0, have) for have, want in zip(array.shape, shape, strict=True))
            if array.dtype != kind or not fits or not batch or len(array) != batch:
                wanted = "x".join(str(side) if side else "L" for side in shape[1:])
                what = f"{name} is {array.dtype} of shape {'x'.join(map(str, array.shape))}"
                raise DataError(88, what, where=name, fix=f"give {np.dtype(kind)} of shape Bx{wanted}, B from 1, alike in all")
            if name.endswith("_ids"):
                _check_ids(name, array, inputs[name.replace("_ids", "_mask")], how)


def _verified(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle whose files are those that were exported, and all there."""
    manifest = verify(folder, kind=KIND)
    if manifest.get("model") not in [*MODELS]:  # a list, as it may be something that cannot be hashed
        raise CheckpointError(3, "the manifest names no model", where=str(folder), fix=_AGAIN)
    missing = {"labels.json", "preprocess.json", MODELS[manifest["model"]]} - manifest["files"].keys()
    if missing:
        raise CheckpointError(3, f"the manifest names no {min(missing)}", where=str(folder), fix=_AGAIN)
    return manifest


def _expected(side: str, how: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...], type]]:
    """(name, shape with 0 for any, type) of the inputs of a side."""
    missing = [(f"{side}_missing", (0,), np.bool_)] if how.get("may_lack") else []
    if how["modality"] == "image":
        return [(f"{side}_pixels", (0, *how["size"], 3), np.uint8), *missing]
    length = how.get("length") or 0
    return [(f"{side}_ids", (0, length), np.int64), (f"{side}_mask", (0, length), np.bool_), *missing]


def _check_ids(name: str, ids_BL: Array, mask_BL: Array, how: Mapping[str, Any]) -> None:
    most, length = how["vocabulary"], how.get("length") or how["max_tokens"]
    if ids_BL.shape != mask_BL.shape or not 1 <= ids_BL.shape[1] <= length or not mask_BL.any(axis=1).all():
        what = f"{name} of shape {ids_BL.shape} does not go with its mask, or has other than 1 to {length} tokens"
        raise DataError(89, what, where=name, fix="give ids and mask of one shape, with a real token in each row")
    if ids_BL.min() < 0 or (most and ids_BL.max() >= most):
        what = f"{name} has the token {ids_BL.max() if ids_BL.min() >= 0 else ids_BL.min()}; the encoder knows 0 to {most - 1}"
        raise DataError(90, what, where=name, fix="use the tokenizer of the bundle (`collate`)")


def probabilities(logits_BN: Array, *, multi_label: bool) -> Array:
    """Softmax over the labels, or a sigmoid of each."""
    logits_BN = logits_BN.astype(np.float64)
    if multi_label:
        small = np.exp(-np.abs(logits_BN))
        return np.asarray(np.where(logits_BN >= 0, 1, small) / (1 + small))
    odds = np.exp(logits_BN - logits_BN.max(axis=-1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=-1, keepdims=True))


# -- running


def _onnx(file: Path, device: str, threads: int | None) -> Runner:
    try:
        import onnxruntime
    except ImportError as error:
        raise PackageError(
            1, f"onnxruntime cannot be imported: {error}", where=str(file), fix='pip install "mopefuse[runtime]"'
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    providers = _providers(device)
    try:
        session = onnxruntime.InferenceSession(file, options, providers=providers)
    except Exception as error:  # onnxruntime's own errors have no common class
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            9, f"onnxruntime cannot load {file.name}: {reason}", where=str(file), fix=_AGAIN
        ) from None
    used = {value.name for value in session.get_inputs()}  # a graph may have no use for a mask
    return lambda inputs: session.run(None, {name: array for name, array in inputs.items() if name in used})


def _providers(device: str) -> list[Any]:
    import onnxruntime

    there = onnxruntime.get_available_providers()
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (kind == "cuda" and "CUDAExecutionProvider" not in there):
        names = ", ".join(there)
        raise ConfigError(
            41, f"onnxruntime has no device {device} (it has {names})", where="device", fix="use --device auto or cpu"
        )
    cuda = [("CUDAExecutionProvider", {"device_id": int(number or 0)})]
    return [*(cuda if kind != "cpu" and "CUDAExecutionProvider" in there else []), "CPUExecutionProvider"]


def _pt2(file: Path, device: str, threads: int | None) -> Runner:
    try:
        import torch
    except ImportError:
        raise PackageError(
            1, "a pt2 bundle needs torch", where=str(file), fix="pip install torch, or export with --format onnx"
        ) from None
    from mopefuse.core import device as devices
    from mopefuse.inference.pt2 import load_pt2

    target = devices.resolve(device)
    module = load_pt2(file, target)

    def run(inputs: dict[str, Array]) -> list[Array]:
        devices.flush_denormals(target)
        with torch.no_grad():
            outputs = module({name: torch.from_numpy(array).to(target) for name, array in inputs.items()})
        return [output.cpu().numpy() for output in outputs]

    return run


# -- tokens


def _tokenizer(how: Mapping[str, Any], folder: Path) -> Callable[[Sequence[str]], tuple[Array, Array]]:
    """From texts to ids and mask (B, L), as preprocess.json describes it."""
    own, most = how["tokenizer"], how["max_tokens"]
    rows = _rows(own, folder, most)

    def tokenize(texts: Sequence[str]) -> tuple[Array, Array]:
        return tokens.pad(rows([tokens.readable(text, most) for text in texts]), own["pad_id"], how.get("length"))

    return tokenize


def _rows(own: Mapping[str, Any], folder: Path, most: int) -> Callable[[Sequence[str]], list[list[int]]]:
    kinds: dict[str, type[tokens.Words] | type[tokens.Hashing]] = {"words": tokens.Words, "hashing": tokens.Hashing}
    if own["kind"] in kinds:
        splitter = kinds[own["kind"]](**{name: value for name, value in own.items() if name != "kind"})
        return lambda texts: splitter.rows(texts, most)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise PackageError(
            1, "tokenizers is not installed", where=str(folder), fix='pip install "mopefuse[runtime]"'
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(folder / own["file"]))
    except Exception as error:  # the library raises plain exceptions
        raise CheckpointError(
            9, f"{own['file']} cannot be read: {error}", where=str(folder), fix=_AGAIN
        ) from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(most, direction=own["cut"])
    clean = _clip_text() if own.get("clean") == "clip" else str

    def rows(texts: Sequence[str]) -> list[list[int]]:
        return [_until(encoded.ids, own.get("end_id")) for encoded in tokenizer.encode_batch([clean(t) for t in texts])]

    return rows


def _until(ids: list[int], end_id: int | None) -> list[int]:
    return ids if end_id not in ids else ids[: ids.index(end_id) + 1]


def _clip_text() -> Callable[[str], str]:
    """CLIP's own cleaning of texts: repaired by ftfy, HTML entities read, single spaces, lower case.

    Without ftfy, what it does to well-encoded text is done here, and a warning tells once of text that may need more.
    """
    repair: Callable[[str], str] = _repaired
    if find_spec("ftfy") is not None:
        from ftfy import fix_text

        repair = fix_text
    return lambda text: " ".join(html.unescape(html.unescape(repair(text))).split()).lower()


def _repaired(text: str) -> str:
    if not text.isascii():
        warnings.warn("ftfy is not installed: text in a broken encoding is not repaired as in training", Notice, stacklevel=2)
    return unicodedata.normalize("NFC", text.translate(_QUOTES | _LIGATURES | _WIDE))

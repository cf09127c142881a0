"""Make a bundle: one graph and everything needed to run it, compared with the model before it is published.

Its inputs must equal those of training bit for bit, and its logits nearly those of the model, for single pairs and batches,
with short, long and padded texts.

Shapes: B batch, N labels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mopefuse.config.recipe import to_yaml
from mopefuse.config.schema import RunConfig
from mopefuse.core.artifact import dump_json
from mopefuse.core.error_codes import ConfigCode, EncoderCode, GateCode, NumericCode
from mopefuse.data.load import load_data
from mopefuse.errors import ConfigError, EncoderError, GateError, NumericError
from mopefuse.evaluation.bundle_split import bundle_outputs
from mopefuse.evaluation.scoring import score
from mopefuse.export import graph
from mopefuse.export.model_card import model_card
from mopefuse.fusion.base import Fusion
from mopefuse.inference.bundle import KIND, MODELS, Bundle
from mopefuse.inference.bundle_runtime import Array
from mopefuse.inference.predict import Predictor, as_json
from mopefuse.inference.pt2 import save_pt2
from mopefuse.runs.load import Loaded

TOLERANCE = 1e-4  # for logits, in float32
INT8_TOLERANCE = 1e-2  # for the example on another machine, whose 8-bit arithmetic may differ
EXAMPLE_TEXT = "an example"
_REPEATS = 9  # number of timed forward passes

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Parity:
    """How closely a graph agrees with the model that it was made from, over all probes.

    Args:
        outputs: what a model returns, in words. max_difference: largest absolute difference of them.
        labels_agree: share of probes with the same prediction.
        milliseconds: median time of one pair, by "graph" and "model", with the same number of threads.
    """

    outputs: str
    max_difference: float
    labels_agree: float
    probes: int
    threads: int
    milliseconds: dict[str, float]


def without_data_path(config: RunConfig) -> RunConfig:
    """`config` without the location of its data, which stays private."""
    return config.model_copy(update={"data": config.data.model_copy(update={"path": None, "image_roots": ()})})


class Maker:
    """Writes and checks one bundle; `manifest` is complete when `write` has returned."""

    def __init__(
        self, loaded: Loaded, facts: dict[str, Any], form: str, *, routing: bool, int8: bool, name: str, notice: Notice
    ) -> None:
        self.loaded, self.facts, self.form, self.int8, self.name, self.notice = loaded, facts, form, int8, name, notice
        self.config = without_data_path(loaded.config)
        self.graph = graph.Graph(loaded.model, routing=routing)
        self.command = f"mopefuse export RUN --format {form}{' --routing' * routing}{' --int8' * int8} -o OUT"
        self.manifest: dict[str, Any] = {"kind": KIND, "model": form}
        self.parity: Parity | None = None

    def write(self, folder: Path) -> None:
        """Write all files of the bundle into `folder`; an error is raised before anything is published."""
        sides, empty = describe(self.loaded.model, folder), self.config.data.on_missing != "error"
        (folder / "preprocess.json").write_text(dump_json({"sides": sides, "empty_is_missing": empty}), encoding="utf-8")
        labels = {"labels": self.facts["labels"], "task": self.facts["task"]}
        labels["thresholds"] = self.facts["progress"]["thresholds"]
        (folder / "labels.json").write_text(dump_json(labels), encoding="utf-8")
        (folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        images, texts = probe_pairs(sides)
        self._check_routing(images, texts)
        self.notice("tracing the model")
        lengths, example = graph.fixed_lengths(sides), self.graph.collate(images[:3], texts[:3])
        program = graph.trace(self.graph, example, lengths)
        file = folder / MODELS[self.form]
        self.notice(f"writing {file.name}")
        if self.form == "onnx":
            graph.save_onnx(program, self.graph, example, lengths, file)
        else:
            save_pt2(program, file)
        del program
        self.notice("comparing its predictions with the model's")
        bundle = Bundle(folder, "cpu", threads=torch.get_num_threads(), manifest=self.manifest)
        self.parity = compare(self.graph, bundle, images, texts)
        self.manifest["parity"] = asdict(self.parity)
        if self.int8:
            bundle = self._quantise(bundle, file)
        self._write_example(folder, bundle)
        self._write_card(folder)

    def _check_routing(self, images: Sequence[Any], texts: Sequence[Any]) -> None:
        if not self.graph.routing:
            return
        with torch.no_grad():
            output = self.loaded.model(self.loaded.model.collate(images[:1], texts[:1]))
        if output.routing_BLK is None:
            raise ConfigError(ConfigCode.NO_ROUTING, "this model has no routing", where="--routing", fix="remove --routing")

    def _quantise(self, bundle: Bundle, file: Path) -> Bundle:
        self.notice("evaluating the validation split")
        config = self.loaded.config.data
        data = replace(load_data(config, require=("val",)), task=bundle.task)
        known: dict[str, Any] = {"thresholds": self.loaded.thresholds, "distributed_outputs": False}
        before = score(bundle_outputs(bundle, data, "val", config), data, "val", **known).metrics
        graph.quantise(file)
        small = Bundle(bundle.folder, "cpu", threads=torch.get_num_threads(), manifest=self.manifest)
        self.notice("evaluating it again, in 8 bits")
        after = score(bundle_outputs(small, data, "val", config), data, "val", **known).metrics
        self.manifest["int8"] = {"before": before, "after": after}
        return small

    def _write_example(self, folder: Path, bundle: Bundle) -> None:
        """Write a synthetic pair and the bundle's prediction for it, for `mopefuse export verify`."""
        image = _gradient(64, 48)
        image.save(folder / "example.png")
        logits_BN, _ = bundle.run(bundle.collate([image], [EXAMPLE_TEXT]))
        example = {
            "image": "example.png",
            "text": EXAMPLE_TEXT,
            "logits": logits_BN[0].tolist(),
            "prediction": as_json(Predictor(bundle).predict([image], [EXAMPLE_TEXT])[0]),
            "tolerance": (INT8_TOLERANCE if self.int8 else TOLERANCE) * _unit(logits_BN, bundle),
        }
        (folder / "example.json").write_text(dump_json(example), encoding="utf-8")

    def _write_card(self, folder: Path) -> None:
        assert self.parity is not None
        found = f"{self.parity.max_difference:.2g}, in {self.parity.probes} probes"
        checks = {f"largest difference of its {self.parity.outputs} from the model's": found}
        for when, metrics in (self.manifest.get("int8") or {}).items():
            name = self.loaded.model.task.metric
            checks[f"validation {name} {when} 8-bit weights"] = f"{metrics[name]:.4f}"
        card = model_card(self.facts, title=self.name, form=self.form, checks=checks, command=self.command)
        (folder / "README.md").write_text(card, encoding="utf-8")


def describe(model: Fusion, folder: Path) -> dict[str, dict[str, Any]]:
    """The preprocessing of each side, for preprocess.json; tokenizers are written into `folder`.

    Raises:
        EncoderError: the preprocessing of an encoder cannot be described.
    """
    sides: dict[str, dict[str, Any]] = {}
    for side, (modality, preprocess) in model.readers().items():
        how, save = preprocess.describe(), getattr(preprocess, "save", None)
        known = {"image": {"size", "resize", "interpolation"}, "text": {"max_tokens"}}.get(modality, {"unknown"})
        if not known <= how.keys() or (modality == "text" and save is None):
            raise EncoderError(
                EncoderCode.PREPROCESSING_NOT_EXPORTABLE,
                f"the preprocessing of {model.encoder(side).spec} cannot be exported",
                fix="use --format adapter",
            )
        if save is not None:
            file = folder / f"{side}-tokenizer.json"
            how |= {"tokenizer_name": how["tokenizer"], "vocabulary": getattr(preprocess, "vocabulary", 0)}
            how["length"] = getattr(preprocess, "length", None)
            how["tokenizer"] = {**save(file), **({"file": file.name} if file.exists() else {})}
        sides[side] = how | {"optional": side in model.optional_sides}
    return sides


def probe_pairs(sides: Mapping[str, Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Seven pairs to compare with: images of several shapes; texts that are empty, short, of other scripts, or too long for
    any encoder; None for some values if the model can predict without them."""
    rng = np.random.default_rng(0)
    sizes = [(64, 48), (48, 64), (333, 250), (16, 16), (300, 20), (224, 224), (31, 97)]
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    images[2] = _gradient(333, 250)
    longest = max((how["max_tokens"] for how in sides.values() if how["modality"] == "text"), default=1)
    words = "the quick brown fox, jumps over 12 lazy dogs; isn't it? "
    middle = words * max(1, min(longest, 128) // 32)
    other = "Größe 42 – “très” bon café &amp; 日本語"
    texts = ["a small red shoe", "", words, other, middle, words * longest, "what is the top left digit?"]
    found: dict[str, list[Any]] = {"image": [*images], "text": [*texts]}
    for number, how in enumerate(sides.values()):
        if how["optional"]:
            found[how["modality"]][3 + number % 4] = None
    return found["image"], found["text"]


def _gradient(width: int, height: int) -> Image.Image:
    row, column = np.mgrid[0:height, 0:width]
    channels = (255 * column // width, 255 * row // height, 255 * (row + column) // (width + height))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def compare(made: graph.Graph, bundle: Bundle, images: Sequence[Any], texts: Sequence[Any]) -> Parity:
    """Compare the bundle with the model at batch sizes 1, 2 and 7: inputs must be equal, and logits within a tolerance.

    Raises:
        GateError: inputs differ, or logits differ by more than `TOLERANCE`.
    """
    groups = [[i] for i in range(7)] + [[0, 1], [1, 5], [3, 6], [*range(7)]]
    worst, agree, routed = 0.0, 0, 0.0
    for group in groups:
        own = made.collate([images[i] for i in group], [texts[i] for i in group])
        theirs = bundle.collate([images[i] for i in group], [texts[i] for i in group])
        for name, tensor in own.items():
            if not np.array_equal(tensor.numpy(), theirs[name]):
                where, what = f"inputs {group}", f"{name} of the bundle differs from training for the same pair"
                raise GateError(GateCode.EXPORT_DIFFERS, what, where=where, fix="use --format adapter, and report this bug")
        with torch.no_grad():
            wanted = [output.numpy() for output in made(own)]
        found = bundle.run(theirs)
        worst = max(worst, _difference(found[0], wanted[0]) / _unit(wanted[0], bundle))
        routed = max(routed, 0.0 if found[1] is None else _difference(found[1], wanted[1]))
        changed_B = bundle.task.changed(torch.from_numpy(found[0]), torch.from_numpy(wanted[0]), bundle.thresholds)
        agree += int((~changed_B).sum())
    count = sum(map(len, groups))
    if not max(worst, routed) <= TOLERANCE:
        what = f"the exported graph's outputs differ by {max(worst, routed):.2g}, more than {TOLERANCE:g}"
        where = f"{agree} of {count} predictions agree"
        raise GateError(GateCode.EXPORT_DIFFERS, what, where=where, fix="use --format adapter, and report this bug")
    return Parity(
        outputs="standardised values" if bundle.task.label_kind == "number" else "logits",
        max_difference=worst,
        labels_agree=agree / count,
        probes=count,
        threads=torch.get_num_threads(),
        milliseconds=_times(made, bundle, images[:1], texts[:1]),
    )


def _unit(outputs_BN: Array, bundle: Bundle) -> float:
    """In what differences are measured: 1, or the largest number in embeddings, which are multiplied by a learned scale."""
    return max(1.0, float(np.abs(outputs_BN).max())) if bundle.task.compares_samples else 1.0


def _difference(found: Array, wanted: Array) -> float:
    if not np.isfinite(wanted).all():
        raise NumericError(
            NumericCode.PREDICTION_NOT_FINITE,
            "the model's prediction is NaN or infinite",
            where="probes",
            fix="use a different --checkpoint",
        )
    return float(np.abs(found - wanted).max())


def _times(made: graph.Graph, bundle: Bundle, images: Sequence[Any], texts: Sequence[Any]) -> dict[str, float]:
    """Median milliseconds of one pair without its preprocessing, graph and model in turn."""
    own, theirs = made.collate(images, texts), bundle.collate(images, texts)
    taken: dict[str, list[float]] = {"graph": [], "model": []}
    with torch.inference_mode():
        for _ in range(_REPEATS):
            for name, action in (("graph", lambda: bundle.run(theirs)), ("model", lambda: made(own))):
                begun = time.perf_counter()
                action()
                taken[name].append(1e3 * (time.perf_counter() - begun))
    return {name: statistics.median(values[1:]) for name, values in taken.items()}

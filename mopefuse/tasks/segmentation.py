"""Segmentation: the label of a sample is a mask, which has a class for each pixel.

Masks have class ids, or they mark what a text names: then there are two classes, background and object. A model predicts a
coarse map for each class, which is enlarged bilinearly to the size at which masks are compared. The loss is cross-entropy plus
the Dice loss (Milletari et al., V-Net, https://arxiv.org/abs/1606.04797).

Shapes: B samples of a batch, S of a split, N classes, h and w of a predicted map, H and W of a mask, P its pixels, U names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mopefuse.core.error_codes import ConfigCode, DataCode
from mopefuse.core.formatting import json_text
from mopefuse.errors import ConfigError, DataError
from mopefuse.metrics.names import IGNORED
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds
from mopefuse.modalities.masks import encode_runs
from mopefuse.tasks.base import Array, Labelled, Task, TrainingTargets

if TYPE_CHECKING:
    from torch import Tensor

    from mopefuse.config.schema import RunConfig
    from mopefuse.metrics.masks import MaskOutcome, MaskTally

OBJECT = ("background", "object")
"""The classes of masks that mark what a text names."""
LARGEST = 224
"""Default of the longer side, in pixels, at which masks are compared."""
_CHANGED = 0.01  # share of pixels that must differ for a mask to count as changed


class Segmentation(Task):
    """A class for each pixel; targets are class ids (B, H, W), uint8, and `IGNORED` where a pixel does not count.

    Args:
        size: (H, W), in pixels; empty before training. ignored: the id in masks that does not count.
        foreground: the id that marks the object, in masks that mark one; None for masks with class ids.
        names: names of the ids in masks, if the text of a sample names the class that is its object.
        dice: weight of the Dice loss.
    """

    name, metric, metric_title = "segmentation", "miou", "mean IoU"
    metrics = ("miou", "pixel_accuracy")
    more_metrics = ("overall_iou",)
    label_kind = "mask"
    output_axes = 4
    rival = "late-concat"
    methods = "mopefuse.fusion.segmentation"
    linear_name = "linear decoder"

    def __init__(
        self,
        size: Sequence[int] = (),
        *,
        ignored: int = IGNORED,
        foreground: int | None = None,
        names: Sequence[str] = (),
        dice: float = 1.0,
    ) -> None:
        self.size, self.ignored, self.foreground = tuple(size), ignored, foreground
        self.names, self.dice = tuple(names), dice

    @property
    def marks_object(self) -> bool:
        """Whether masks mark one object each, instead of having class ids."""
        return self.foreground is not None or bool(self.names)

    def facts(self) -> dict[str, Any]:
        """See `Task.facts`."""
        how = {"ignored": self.ignored, "foreground": self.foreground, "names": list(self.names), "dice": self.dice}
        return {"name": self.name, "size": list(self.size), **how}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Segmentation:
        """See `Task.from_facts`."""
        height, width = map(int, facts["size"])
        ignored, dice, names = int(facts["ignored"]), float(facts["dice"]), [str(name) for name in facts["names"]]
        foreground = None if facts["foreground"] is None else int(facts["foreground"])
        if height < 1 or width < 1 or dice < 0 or foreground not in (None, 1, IGNORED):
            raise ValueError("its size, classes and loss do not fit each other")
        return cls((height, width), ignored=ignored, foreground=foreground, names=names, dice=dice)

    def fitted(self, targets: TrainingTargets, config: RunConfig) -> Segmentation:
        """The same task with the size at which masks are compared, and the loss."""
        if config.train.class_weights == "balanced":
            what = "labels are masks, and classes of pixels cannot be balanced"
            raise ConfigError(ConfigCode.SETTING_OF_OTHER_TASK, what, where="--class-weights", fix="remove --class-weights")
        if config.warm_start == "linear":
            what = "a decoder of masks has no linear model to start from"
            raise ConfigError(ConfigCode.SETTING_OF_OTHER_TASK, what, where="--warm-start", fix="remove --warm-start")
        how = config.segmentation
        task = self.changed_to(size=how.size) if how.size else self.with_statistics(targets.numbers())
        return task.changed_to(dice=how.dice)

    def with_statistics(self, numbers: Array) -> Segmentation:
        """The same task with the size of most masks, but at most `LARGEST`.

        Args:
            numbers: height and width of each mask (S, 2).
        """
        sizes, counts = np.unique(numbers, axis=0, return_counts=True)
        height, width = sizes[counts.argmax()].tolist()
        scale = min(1.0, LARGEST / max(height, width))
        return self.changed_to(size=(max(1, round(scale * height)), max(1, round(scale * width))))

    def adapted_to(self, found: Task) -> Segmentation:
        """The same task for other data, whose masks may use other ids for the object and for pixels that do not count.

        What marks an object, an id or the name in the text, is that of the other data.
        """
        if not isinstance(found, Segmentation):
            return self
        marks = found if self.marks_object else self
        return self.changed_to(ignored=found.ignored, foreground=marks.foreground, names=marks.names)

    def changed_to(self, **changes: Any) -> Segmentation:
        """A copy with other arguments."""
        how = {**self.facts(), **changes}
        how.pop("name")
        return Segmentation(how.pop("size"), **how)

    def describe(self, labels: Sequence[str]) -> str:
        """See `Task.describe`."""
        return "masks of what each text names" if self.marks_object else f"masks of {len(labels)} classes"

    # -- data

    def encode(self, names: Sequence[str], known: Sequence[str]) -> Array:
        """The positions (U,) of mask files; the files are read by `mopefuse.data.masks.MaskTargets`."""
        return np.arange(len(names))

    def targets(self, start_B1: Array, number_Z: Array, count: int) -> Tensor:
        """Not used: the targets of a split are `mopefuse.data.masks.MaskTargets`."""
        raise NotImplementedError("masks are read from files")

    def unknown_labels(self, names: Iterable[str], known: Sequence[str]) -> list[str]:
        """None: labels are names of files, which are checked when they are read."""
        return []

    def as_written(self, labels: Sequence[Any]) -> Any:
        """The only label."""
        return labels[0]

    def to_classes(self, ids: Array, wanted: int | None = None) -> Array:
        """Convert the ids in a mask to classes, uint8.

        Args:
            wanted: with `names`, the id that is the object of the sample.
        """
        if wanted is not None:
            classes = (ids == wanted).astype(np.uint8)
        elif self.foreground == IGNORED:
            return np.asarray(ids == IGNORED, dtype=np.uint8)
        else:
            classes = ids.copy()
        classes[ids == self.ignored] = IGNORED
        return np.asarray(classes)

    def check_label(self, label: Any, count: int, where: str) -> None:
        """See `Task.check_label`."""
        if not (isinstance(label, np.ndarray) and label.ndim == 2 and label.dtype == np.uint8):
            what, fix = f"the label is {label!r:.60}, expected a mask", "pass class ids as uint8 of shape (height, width)"
            raise DataError(DataCode.INVALID_LABEL_VALUE, what, where=where, fix=fix)

    def stack_labels(self, labels: Sequence[Any], count: int) -> Tensor:
        """The classes (B, H, W) of masks of any size."""
        import torch

        from mopefuse.modalities.masks import resized

        size = self.size or labels[0].shape
        return torch.from_numpy(np.stack([resized(label, size) for label in labels]))

    # -- training

    def loss(self, outputs_BN: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cross-entropy plus weighted Dice loss (B,), each over the pixels that count; 0 for a sample without any.

        Dice is averaged over the classes of a sample; if masks mark an object, it is that of the object.
        """
        import torch
        from torch.nn import functional as F

        logits_BNHW = self.enlarged(outputs_BN, targets).float()
        counts_BHW = targets != IGNORED
        target_BHW = torch.where(counts_BHW, targets, 0).long()
        entropy_BHW = F.cross_entropy(logits_BNHW, target_BHW, reduction="none") * counts_BHW
        loss_B = entropy_BHW.flatten(1).sum(dim=1) / counts_BHW.flatten(1).sum(dim=1).clamp(min=1)
        if not self.dice:
            return loss_B
        true_BNP = F.one_hot(target_BHW, logits_BNHW.shape[1]).movedim(-1, 1).flatten(2) * counts_BHW.flatten(1)[:, None]
        predicted_BNP = logits_BNHW.softmax(dim=1).flatten(2) * counts_BHW.flatten(1)[:, None]
        both_BN, size_BN = (predicted_BNP * true_BNP).sum(dim=-1), true_BNP.sum(dim=-1)
        dice_BN = 1 - (2 * both_BN + 1) / (predicted_BNP.sum(dim=-1) + size_BN + 1)
        present_BN = (size_BN > 0).float()
        if self.marks_object:
            present_BN = F.pad(torch.ones_like(present_BN[:, 1:]), (1, 0)) * counts_BHW.flatten(1).any(dim=1)[:, None]
        return loss_B + self.dice * (dice_BN * present_BN).sum(dim=1) / present_BN.sum(dim=1).clamp(min=1)

    def enlarged(self, outputs_BN: Tensor, like: Tensor | None = None) -> Tensor:
        """Predicted maps (B, N, h, w) at the size (H, W) of targets; (B, N) stands for maps of one value.

        Args:
            like: targets of the wanted size; None for that of the task.
        """
        from torch.nn import functional as F

        maps = outputs_BN[..., None, None] if outputs_BN.ndim == 2 else outputs_BN
        size = tuple(like.shape[-2:]) if like is not None else self.size
        if not len(maps) or tuple(maps.shape[-2:]) == size:
            return maps
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)

    def average(self, each: Sequence[Tensor]) -> Tensor:
        """Log of the mean probabilities."""
        import torch

        return torch.stack([one.softmax(dim=1) for one in each]).mean(dim=0).clamp(min=1e-12).log()

    # -- evaluation

    def tally(self, samples: int, outputs: int) -> MaskTally:
        """See `Task.tally`."""
        from mopefuse.metrics.masks import MaskTally

        return MaskTally(samples, outputs, self.classes, self.loss, marks_object=self.marks_object)

    def classes(self, outputs_BN: Tensor, targets: Tensor | None = None) -> Tensor:
        """The predicted class of each pixel (B, H, W)."""
        return self.enlarged(outputs_BN, targets).argmax(dim=1)

    def outcome(self, outputs_SN: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD) -> MaskOutcome:
        """See `Task.outcome`."""
        return self.count(outputs_SN, targets).outcome()

    def count(self, outputs_SN: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD) -> MaskTally:
        """See `Task.count`."""
        import torch

        tally = self.tally(*outputs_SN.shape[:2])
        for index_B in torch.arange(len(outputs_SN)).split(64):
            tally.add(index_B, outputs_SN[index_B], targets[index_B])
        return tally

    def changed(self, before_SN: Tensor, after_SN: Tensor, thresholds: Thresholds = THRESHOLD) -> Tensor:
        """Whether (S,) more than 1 % of the pixels of a mask have another class."""
        differ = self.classes(before_SN) != self.classes(after_SN)
        return differ.flatten(1).float().mean(dim=1) > _CHANGED

    def constant(self, counts: Mapping[str, int], labels: Sequence[str]) -> tuple[str, Tensor]:
        """The most frequent class everywhere, see `Task.constant`; of masks that mark an object, the object."""
        import torch

        chosen = 1 if self.marks_object else max(range(len(labels)), key=lambda number: counts.get(labels[number], 0))
        outputs_N = torch.zeros(len(labels))
        outputs_N[chosen] = 1.0
        return f"{labels[chosen]} everywhere", outputs_N

    # -- predictions

    def decode(self, outputs_BN: Array) -> Array:
        """The probability (B, N, h, w) of each class."""
        exponentials = np.exp(outputs_BN - outputs_BN.max(axis=1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))

    def predict(
        self, decoded_N: Any, labels: Sequence[str], thresholds: Sequence[float], top: int | None = None
    ) -> dict[str, Any]:
        """``{"mask": runs}`` at the size of the task, see `mopefuse.modalities.masks.encode_runs`."""
        return {"mask": encode_runs(self.mask_of(decoded_N, self.size))}

    def mask_of(self, probability_Nhw: Array, size: Sequence[int]) -> Array:
        """The class of each pixel (H, W), uint8, for a picture of `size`, (height, width)."""
        height, width = size
        enlarged = [
            np.asarray(Image.fromarray(np.float32(each)).resize((width, height), Image.Resampling.BILINEAR))
            for each in probability_Nhw
        ]
        return np.asarray(np.argmax(enlarged, axis=0), dtype=np.uint8)

    def table_header(self, labels: Sequence[str]) -> list[str]:
        """See `Task.table_header`."""
        return ["mask"]

    def table_cells(self, prediction: Mapping[str, Any], labels: Sequence[str]) -> list[Any]:
        """See `Task.table_cells`."""
        return [prediction.get("mask", "")]

    def collect(
        self, index_B: Tensor, outputs_BN: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD
    ) -> tuple[Tensor, ...]:
        """Positions of the samples (B,), predicted classes (B H W), and counts of pixels (B 3 N), see `MaskTally`."""
        import torch

        from mopefuse.metrics.masks import count_pixels

        if not len(index_B):
            return index_B, torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.long)
        classes = self.classes(outputs_BN, targets)
        counts = count_pixels(classes, targets, outputs_BN.shape[1])
        return index_B, classes.byte().flatten(), counts.flatten()

    def prediction_lines(
        self, parts: Iterable[Sequence[Tensor]], rows: Sequence[Labelled], labels: Sequence[str]
    ) -> Iterator[str]:
        """``{"id", "mask", "pixels", "true"}``, see `mopefuse.modalities.masks.encode_runs`; `Task.prediction_lines`.

        "pixels" has, by class, how many pixels are correctly predicted, predicted, and true.
        """
        found: list[tuple[int, Array, list[list[int]]]] = []
        for index_B, classes, counts in parts:
            for number, index in enumerate(index_B.tolist()):
                mask = classes.reshape(len(index_B), *self.size)[number].numpy()
                found.append((index, mask, counts.reshape(len(index_B), 3, len(labels))[number].T.tolist()))
        for index, mask, counts_N3 in sorted(found, key=lambda one: one[0]):
            pixels = {label: counts for label, counts in zip(labels, counts_N3, strict=True) if any(counts)}
            line = {"id": rows[index].id, "mask": encode_runs(mask), "pixels": pixels, "true": rows[index].labels[0]}
            yield json_text(line) + "\n"

    def read_outcome(self, lines: Iterable[tuple[int, Mapping[str, Any]]], samples: int, labels: Sequence[str]) -> MaskOutcome:
        """See `Task.read_outcome`."""
        from mopefuse.metrics.masks import MaskOutcome

        position = {label: number for number, label in enumerate(labels)}
        counts_S3N = np.zeros((samples, 3, len(labels)))
        for sample, line in lines:
            for label, counts in line["pixels"].items():
                counts_S3N[sample, :, position[label]] = counts
        return MaskOutcome(counts_S3N, marks_object=self.marks_object)

"""Sections of the page of a segmentation: IoU of each class, and images with predicted and true masks.

Shapes: S samples of the split, H and W of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mopefuse.core.formatting import percent
from mopefuse.inference.mask_files import overlay, palette
from mopefuse.metrics.names import IGNORED, write_metric
from mopefuse.modalities.base import picture_among
from mopefuse.report.pages import Section, fragment, thumbnail
from mopefuse.report.run_data import RunFacts
from mopefuse.tasks.segmentation import Segmentation

_EXAMPLES, _WORST = 8, 8
_SIDE = 160  # pixels; smaller pictures are enlarged to it


def sections(facts: RunFacts) -> list[Section]:
    """Everything on the predictions of a segmentation."""
    return [scores(facts), examples(facts), mistakes(facts)]


def scores(facts: RunFacts) -> Section:
    """IoU, precision and recall of the pixels of each class, with its colour."""
    found = facts.task.count(facts.logits_SN, facts.targets).per_label(facts.labels)
    rows = [
        [row["label"], *(write_metric(name, row[name]) for name in ("iou", "precision", "recall")), f"{row['support']:,}"]
        for row in found
    ]
    table = fragment("table", ["class", "IoU", "precision", "recall", "true pixels"], rows)
    return Section("scores", "Classes", fragment("colours", _colours(facts)) + table, half=True)


def _colours(facts: RunFacts) -> list[tuple[str, str]]:
    colours = palette(max(2, len(facts.labels)))
    return [(label, "#{:02x}{:02x}{:02x}".format(*colours[number])) for number, label in enumerate(facts.labels) if number]


def examples(facts: RunFacts) -> Section:
    """Some samples, evenly spaced by their IoU."""
    order = _scores(facts).argsort().tolist()
    places = np.linspace(0, len(order) - 1, min(len(order), _EXAMPLES)).astype(int)
    return Section("examples", "Examples, from the worst to the best", _masks(facts, [order[place] for place in places]))


def mistakes(facts: RunFacts) -> Section:
    """The samples with the lowest IoU."""
    order = _scores(facts).argsort(stable=True)[:_WORST].tolist()
    return Section("mistakes", "Lowest IoU", _masks(facts, order))


def _scores(facts: RunFacts) -> Tensor:
    return facts.task.count(facts.logits_SN, facts.targets).by_sample()


def _masks(facts: RunFacts, numbers: Sequence[int]) -> Any:
    return fragment("masks", [_card(facts, number) for number in numbers])


def _card(facts: RunFacts, number: int) -> dict[str, Any]:
    """A sample: its text, its image, and the predicted and the true mask on it."""
    task, card = facts.task, facts.card(number)
    assert isinstance(task, Segmentation)
    true = facts.targets[number]
    predicted = task.classes(facts.logits_SN[number : number + 1], true[None])[0].byte().numpy()
    row, split = facts.row(number), facts.data.splits[facts.split]
    image = facts.data.read(split, row, picture_among(facts.data.modalities), facts.config.data)
    shown = image.resize(_shown_size(image), Image.Resampling.NEAREST if max(image.size) < _SIDE else Image.Resampling.BICUBIC)
    pictures = [("as it is", thumbnail(shown))]
    for name, mask in (("predicted", predicted), ("true", np.where(true.numpy() == IGNORED, 0, true.numpy()))):
        large = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(shown.size, Image.Resampling.NEAREST))
        pictures.append((name, thumbnail(overlay(shown, large, len(facts.labels)))))
    iou = percent(float(facts.task.count(facts.logits_SN[number : number + 1], true[None]).by_sample()[0]))
    return {"id": card["id"], "text": card["text"], "place": card["picture"].place, "iou": iou, "pictures": pictures}


def _shown_size(image: Image.Image) -> tuple[int, int]:
    scale = max(1, round(_SIDE / max(image.size)))
    return image.width * scale, image.height * scale

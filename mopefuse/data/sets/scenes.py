"""Scenes: images with a mask of class ids each, as CamVid, prepared so that a text names the class to find.

G. Brostow, J. Fauqueur, R. Cipolla, "Semantic object classes in video: a high-definition ground truth database", Pattern
Recognition Letters 30, 2009. The 11 classes and the folders ``train``, ``trainannot``, ... are those of the version for SegNet
(V. Badrinarayanan, A. Kendall, R. Cipolla, https://arxiv.org/abs/1511.00561), in whose masks 11 is the id of void.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, ClassVar

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import DataCode
from mopefuse.data._source_files import SourceFolder
from mopefuse.data.prepare import Option, Sample, Skip, Source
from mopefuse.data.subsets import random_order
from mopefuse.errors import DataError, Notice
from mopefuse.modalities.masks import MASKS, ids_in

CAMVID = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
_SEQUENCES = re.compile(r"(0001TP|0006R0|0016E5|Seq05VD)_")  # how the names of CamVid's files begin
SPLITS = ("train", "val", "test")
_SHARES = {"val": 0.1, "test": 0.2}  # held out by the seed, if nothing names the splits
_MASKS = ("masks", "labels", "annotations")
_NAMES = ("classes.txt", "labels.txt", "codes.txt")
_LISTS = {"train": ("train.txt",), "val": ("val.txt", "valid.txt"), "test": ("test.txt",)}
_ENDINGS = ("", "_P", "_L", "_mask")  # of the name of a mask, after that of its image


class Scenes(Source):
    """Folders of images and of masks with the same names, and a file with the names of the classes, one per line.

    Either ``train`` and ``trainannot``, ``val`` and ``valannot``, ..., or ``images`` and ``masks``, each with a folder for each
    split, or without; then ``train.txt``, ``val.txt`` and ``test.txt`` list the images, or they are divided at random.
    """

    name: ClassVar[str] = "scenes"
    inputs: ClassVar[tuple[str, ...]] = (
        *SPLITS, *(f"{split}annot" for split in SPLITS), "images", *_MASKS, *_NAMES,
        *(name for names in _LISTS.values() for name in names),
    )  # fmt: skip
    layout: ClassVar[str] = "images/ and masks/, or train/ and trainannot/ and so on, and classes.txt"
    declared_options: ClassVar[tuple[Option, ...]] = (
        Option("whole", False, "One row per image, whose text lists all classes; default: one for each class in its mask."),
        Option("seed", 0, "Random seed of the splits, if nothing names them.", minimum=0),
    )
    label_is_mask: ClassVar[bool] = True

    def __init__(self, folder: SourceFolder, options: Mapping[str, Any]) -> None:
        """See `Source`."""
        super().__init__(folder, options)
        self.labels = self._class_names()
        self._pairs = {split: self._find_pairs(split) for split in SPLITS}
        if not self._pairs["train"]:
            raise self.incomplete("folder trainannot or masks")
        if not self._pairs["val"]:
            self._hold_out()
        self.splits = tuple(split for split in SPLITS if self._pairs[split])

    @property
    def text(self) -> str:
        """What a text is."""
        return "all class names" if self.options["whole"] else "the name of a class"

    def _class_names(self) -> tuple[str, ...]:
        for name in _NAMES:
            if self.folder.path(name) is not None:
                return tuple(line.decode("utf-8", "replace").strip() for _, line in self.folder.lines(name))
        if masks := self.folder.names("trainannot"):
            if not all(map(_SEQUENCES.match, masks)):
                named = ", ".join(f"{number} {name}" for number, name in enumerate(CAMVID[:3]))
                what = f"there is no classes.txt, so class ids are taken for those of CamVid ({named}, ...)"
                what += "; if they are not, write the names of yours to classes.txt, one per line"
                warnings.warn(what, Notice, stacklevel=2)
            return CAMVID
        raise self.incomplete("classes.txt")

    def _find_pairs(self, split: str) -> list[tuple[str, str]]:
        """Images of a split, each with its mask, sorted by name."""
        masks = next((name for name in _MASKS if self.folder.names(name)), "")
        places = [(split, f"{split}annot"), *([(f"images/{split}", f"{masks}/{split}")] if masks else [])]
        for images, own_masks in places:
            if self.folder.names(own_masks):
                return self._match(images, own_masks)
        listed = next((name for name in _LISTS[split] if self.folder.path(name) is not None), None)
        pairs = self._match("images", masks) if masks else []
        if listed is None:
            return pairs if split == "train" and not self._has_lists() else []
        named = {PurePosixPath(line.split()[0].decode("utf-8", "replace")).stem for _, line in self.folder.lines(listed)}
        return [pair for pair in pairs if PurePosixPath(pair[0]).stem in named]

    def _has_lists(self) -> bool:
        return any(self.folder.path(name) is not None for names in _LISTS.values() for name in names)

    def _match(self, images: str, masks: str) -> list[tuple[str, str]]:
        known = {PurePosixPath(name).stem: name for name in self.folder.names(masks)}
        found = []
        for name in self.folder.names(images):
            stem = PurePosixPath(name).stem
            mask = next((known[stem + ending] for ending in _ENDINGS if stem + ending in known), f"{stem}.png")
            found.append((f"{images}/{name}", f"{masks}/{mask}"))
        return found

    def _hold_out(self) -> None:
        """Move images of train to val, and to test if there is none."""
        pairs = self._pairs["train"]
        order = random_order([image for image, _ in pairs], self.options["seed"])
        for split, share in _SHARES.items():
            if not self._pairs[split]:
                count = max(1, round(share * len(pairs)))
                chosen, order = order[:count], order[count:]
                self._pairs[split] = [pairs[number] for number in sorted(chosen)]
        self._pairs["train"] = [pairs[number] for number in sorted(order)]

    def rows(self, split: str) -> Iterator[Sample | Skip]:
        """Yield a row for each class in each mask, or for each mask; image by image."""
        for image, mask in self._pairs[split]:
            stem = f"{split}-{PurePosixPath(image).stem}"
            if self.folder.path(mask) is None:
                yield Skip("no mask", image)
                continue
            try:
                info = MASKS.inspect(self.folder.read(mask), mask, DataConfig())
            except DataError as error:
                coloured = error.number == DataCode.MASK_WITH_COLOURS
                yield Skip("mask has colours instead of class ids" if coloured else "mask cannot be read", mask)
                continue
            if self.options["whole"]:
                yield Sample(id=stem, text=", ".join(self.labels), img=image, label=mask, file=mask)
                continue
            for number in ids_in(info):
                if number < len(self.labels):
                    label = self.labels[number]
                    yield Sample(id=f"{stem}-{label}", text=label, img=image, label=mask, file=mask)

"""SNLI-VE: photographs with a sentence that follows from them, contradicts them, or does neither.

N. Xie, F. Lai, D. Doran, A. Kadav, "Visual entailment: a novel task for fine-grained image understanding", 2019,
https://arxiv.org/abs/1901.06706. Its captions (premises) and sentences (hypotheses) are SNLI's, its photographs Flickr30k's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from mopefuse.data._source_files import SourceFolder
from mopefuse.data.prepare import Option, Sample, Skip, Source, is_file_name

LABELS = ("entailment", "neutral", "contradiction")
_OF_SPLIT = {"train": "train", "val": "dev", "test": "test"}  # our names to those of the data set
_IMAGES = ("flickr30k_images", "flickr30k-images")
_AUTHOR = "the authors of SNLI-VE"


class Pair(NamedTuple):
    """The content of one line; `id` is its pairID, "" if that is missing or not valid."""

    id: str
    text: str
    image: str
    label: str


def read_pair(line: bytes, *, premise: bool = False) -> Pair | str:
    """Parse one line of ``snli_ve_*.jsonl``; returns the reason if it is not valid.

    Args:
        premise: whether the caption (sentence1) and a space come before the hypothesis (sentence2).
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(row, dict):
        return "not a JSON object"
    label = row.get("gold_label")
    if label in (None, "", "-"):
        return "no gold label"
    if label not in LABELS:
        return "unknown gold label"
    sentences = [row.get(key) for key in (("sentence1", "sentence2") if premise else ("sentence2",))]
    if not isinstance(sentences[-1], str) or not sentences[-1].strip():
        return "no hypothesis"
    if not isinstance(sentences[0], str) or not sentences[0].strip():
        return "no premise"
    photograph = row.get("Flickr30K_ID")
    image = str(photograph) if type(photograph) is int else photograph
    if not isinstance(image, str) or not is_file_name(image):
        return "no Flickr30K_ID"
    identity = row.get("pairID")
    return Pair(
        id=identity if isinstance(identity, str) and identity.isprintable() else "",
        text=" ".join(str(sentence) for sentence in sentences),
        image=f"{image.removesuffix('.jpg')}.jpg",
        label=label,
    )


class SNLIVE(Source):
    """``snli_ve_{train,dev,test}.jsonl`` and the folder of Flickr30k's photographs.

    The text is the hypothesis; with the option ``premise``, the caption comes before it. The id is the pairID; if that
    is missing or repeated, it is ``<split>-<line>``.
    """

    name: ClassVar[str] = "snli-ve"
    inputs: ClassVar[tuple[str, ...]] = (*(f"snli_ve_{original}.jsonl" for original in _OF_SPLIT.values()), *_IMAGES)
    layout: ClassVar[str] = "snli_ve_{train,dev,test}.jsonl and flickr30k_images/<Flickr30K_ID>.jpg"
    published: ClassVar[Mapping[str, tuple[int, str]]] = {
        "train": (529_527, _AUTHOR),
        "val": (17_858, _AUTHOR),
        "test": (17_901, _AUTHOR),
    }
    declared_options: ClassVar[tuple[Option, ...]] = (Option("premise", False, "Put the caption before the hypothesis."),)
    labels = LABELS

    def __init__(self, folder: SourceFolder, options: Mapping[str, Any]) -> None:
        """See `Source`."""
        super().__init__(folder, options)
        for original in _OF_SPLIT.values():
            if folder.path(f"snli_ve_{original}.jsonl") is None:
                raise self.incomplete(f"snli_ve_{original}.jsonl")
        self._images = next((name for name in _IMAGES if folder.names(name)), "")
        if not self._images:
            raise self.incomplete(f"folder {_IMAGES[0]}")
        self._ids: set[str] = set()

    @property
    def text(self) -> str:
        """The sentences that are used."""
        return "premise and hypothesis" if self.options["premise"] else "hypothesis"

    def rows(self, split: str) -> Iterator[Sample | Skip]:
        """Yield pairs in the order of the file, with one line in memory."""
        file, premise = f"snli_ve_{_OF_SPLIT[split]}.jsonl", self.options["premise"]
        for number, line in self.folder.lines(file):
            pair = read_pair(line, premise=premise)
            if isinstance(pair, str):
                yield Skip(pair, file, number)
                continue
            identity = pair.id if pair.id and pair.id not in self._ids else f"{split}-{number}"
            while identity in self._ids:  # a pairID looks like a generated id
                identity += "+"
            self._ids.add(identity)
            image = f"{self._images}/{pair.image}"
            yield Sample(id=identity, text=pair.text, img=image, label=pair.label, file=file, line=number)

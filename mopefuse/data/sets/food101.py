"""UPMC Food-101: photographs of 101 dishes with the web pages that they were found on, labelled with the dish.

X. Wang, D. Kumar, N. Thome, M. Cord, F. Precioso, "Recipe recognition with large multimodal food dataset", ICMEW 2015.
The text of an image is its web page (``texts_txt``) or the title of the page (``train_titles.csv``, ``test_titles.csv``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from mopefuse.core.error_codes import DataCode
from mopefuse.data._source_files import SourceFolder
from mopefuse.data.prepare import Option, Sample, Skip, Source
from mopefuse.data.sets._food101_text import OddRow, clean, read_title
from mopefuse.errors import DataError

_ON_DISK = "files found on disk"


class Food101(Source):
    """``images/{train,test}/<label>/<label>_<number>.jpg`` with a text each; 5,000 training pairs become the val split.

    An image that is in both train and test stays in test.
    """

    name: ClassVar[str] = "food101"
    inputs: ClassVar[tuple[str, ...]] = ("images", "texts_txt", "texts", "train_titles.csv", "test_titles.csv")
    layout: ClassVar[str] = (
        "images/{train,test}/<label>/*.jpg, and texts_txt/<label>/<image name>.txt or texts/{train,test}_titles.csv"
    )
    published: ClassVar[Mapping[str, tuple[int, str]]] = {
        "train+val": (67_972, _ON_DISK),
        "test": (22_716, _ON_DISK),
        "train+val+test": (90_840, "papers"),
    }
    declared_options: ClassVar[tuple[Option, ...]] = (
        Option("text", None, "Text to use. Default: the only one that the files have.", choices=("page", "title")),
        Option("clean", False, "Keep only the words of a text, in lower case."),
        Option("val", 5000, "Rows to hold out as val; if it is not given and there are few rows, a fifth of them.", minimum=1),
        Option("seed", 0, "Random seed of the held-out rows.", minimum=0),
    )
    splits = ("train", "test")

    def __init__(self, folder: SourceFolder, options: Mapping[str, Any]) -> None:
        """See `Source`."""
        super().__init__(folder, options)
        for split in self.splits:
            if not folder.names(f"images/{split}"):
                raise self.incomplete(f"images/{split}")
        self._requested_text = self.options["text"]
        self.options["text"] = self._choose_text(self._requested_text)
        self._pages_used: set[str] = set()

    def _choose_text(self, requested: str | None) -> str:
        """Choose the text that was requested, or the only one that exists."""
        available = ["page"] if self.folder.names("texts_txt") else []
        available += ["title"] if all(self._titles_file(split) for split in self.splits) else []
        if not available or (requested and requested not in available):
            needed = {"page": "texts_txt", "title": "train_titles.csv and test_titles.csv"}
            raise self.incomplete(needed[requested] if requested else " and no ".join(needed.values()))
        if not requested and len(available) > 1:
            what = "each image has two texts, its page and the title of the page"
            raise DataError(
                DataCode.TWO_TEXTS_PER_IMAGE, what, where=str(self.folder.root), fix="choose one: --text page or --text title"
            )
        return requested or available[0]

    def _titles_file(self, split: str) -> str | None:
        names = (f"texts/{split}_titles.csv", f"{split}_titles.csv")
        return next((name for name in names if self.folder.path(name)), None)

    @property
    def text(self) -> str:
        """Describe which text is used: the page or its title."""
        kind = {"page": "text of the page", "title": "title of the page"}[self.options["text"]]
        return f"{kind} ({'requested' if self._requested_text else 'the only text available'})"

    def rows(self, split: str) -> Iterator[Sample | Skip]:
        """Yield rows by label, then by image name."""
        if self.options["text"] == "page":
            yield from self._with_pages(split)
        else:
            yield from self._with_titles(split)

    def _images(self, split: str) -> Iterator[tuple[str, str, str] | Skip]:
        """Yield (label, image name, path) of every image, and a skip for every other file."""
        tests = self.folder.names("images/test") if split == "train" else []
        tested = {name for label in tests for name in self.folder.names(f"images/test/{label}")}
        for label in self.folder.names(f"images/{split}"):
            folder = f"images/{split}/{label}"
            if self.folder.path(folder):
                yield Skip("not in the folder of a class", folder)
            for name in self.folder.names(folder):
                path = f"{folder}/{name}"
                if not name.lower().endswith(".jpg"):
                    yield Skip("not a .jpg file", path)
                elif not name.startswith(f"{label}_"):
                    yield Skip("image name does not start with its class", path)
                elif name in tested:
                    yield Skip("duplicate image", path)
                else:
                    yield label, name, path

    def _sample(self, text: str, label: str, name: str, path: str) -> Sample:
        text = clean(text) if self.options["clean"] else text
        return Sample(id=name[:-4], text=text, img=path, label=label, file=path)

    def _with_titles(self, split: str) -> Iterator[Sample | Skip]:
        file = self._titles_file(split) or ""
        titles: dict[tuple[str, str], tuple[int, str]] = {}
        odd_rows: set[str] = set()  # images named in a line that was already skipped
        odd_images: set[str] = set()  # images that were already skipped
        for number, line in self.folder.lines(file):
            row = read_title(line)
            if isinstance(row, OddRow):
                odd_rows.add(row.image)
                yield Skip(row.reason, file, number)
            elif (row.label, row.image) in titles:
                yield Skip("duplicate image", file, number)
            else:
                titles[row.label, row.image] = number, row.title
        for image in self._images(split):
            if isinstance(image, Skip):
                odd_images.add(image.file.rpartition("/")[2])
                yield image
                continue
            label, name, path = image
            _, title = titles.pop((label, name), (0, None))
            if title is not None:
                yield self._sample(title, label, name, path)
            elif name not in odd_rows:
                yield Skip("image has no text", path)
        for (_, name), (number, _) in titles.items():
            if name not in odd_images:
                yield Skip("text has no image", file, number)

    def _with_pages(self, split: str) -> Iterator[Sample | Skip]:
        for image in self._images(split):
            path = image.file if isinstance(image, Skip) else image[2]
            place = path.removeprefix("images/").rpartition(".")[0] + ".txt"
            places = (f"texts_txt/{place}", f"texts_txt/{place.partition('/')[2]}")
            page = next((place for place in places if self.folder.path(place)), None)
            if page is not None:
                self._pages_used.add(page)
            if isinstance(image, Skip) or page is None:
                yield image if isinstance(image, Skip) else Skip("image has no text", path)
                continue
            try:
                text = self.folder.read(page).decode("utf-8-sig")
            except UnicodeDecodeError:
                yield Skip("not UTF-8", page)
                continue
            yield self._sample(text, *image)
        if split == self.splits[-1]:
            yield from self._unused_pages("texts_txt", 3)

    def _unused_pages(self, folder: str, depth: int) -> Iterator[Skip]:
        for name in self.folder.names(folder):
            path = f"{folder}/{name}"
            if depth > 1 and self.folder.path(path) is None:
                yield from self._unused_pages(path, depth - 1)
            elif path not in self._pages_used:
                yield Skip("text has no image", path)

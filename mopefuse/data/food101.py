"""UPMC Food-101: photographs of 101 dishes with the web pages they were found on, labelled with the dish.

X. Wang, D. Kumar, N. Thome, M. Cord, F. Precioso, "Recipe recognition with large multimodal food dataset", ICMEW 2015.
The text of an image is its page (``texts_txt``) or the page's title (``train_titles.csv``, ``test_titles.csv``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from mopefuse.data._food101_text import OddRow, clean, read_title
from mopefuse.data._source_files import SourceFolder
from mopefuse.data.prepare import Sample, Skip, Source
from mopefuse.errors import DataError

_ON_DISK = "files found on disk"


class Food101(Source):
    """``images/{train,test}/<label>/<label>_<number>.jpg`` with a text each; 5,000 training pairs become the val split.

    An image that train and test both have stays in test. Options: ``text`` (page or title), ``clean``, ``val`` (rows to
    hold out), ``seed`` (of the rows that are held out).
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
    defaults: ClassVar[Mapping[str, Any]] = {"text": None, "clean": False, "val": 5000, "seed": 0}
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    def __init__(self, folder: SourceFolder, options: Mapping[str, Any]) -> None:
        """See `Source`."""
        super().__init__(folder, options)
        for split in self.splits:
            if not folder.names(f"images/{split}"):
                raise self.incomplete(f"images/{split}")
        self._asked = self.options["text"]
        self.options["text"] = self._choose(self._asked)
        self._pages_used: set[str] = set()

    def _choose(self, asked: str | None) -> str:
        """Which text: the one that was asked for, or the only one there is."""
        there = ["page"] if self.folder.names("texts_txt") else []
        there += ["title"] if all(self._titles_file(split) for split in self.splits) else []
        if asked not in (None, "page", "title"):
            raise DataError(61, f"--text cannot be {asked!r}", where="--text", fix="write page or title")
        if not there or (asked and asked not in there):
            needed = {"page": "texts_txt", "title": "train_titles.csv and test_titles.csv"}
            raise self.incomplete(needed[asked] if asked else " and no ".join(needed.values()))
        if not asked and len(there) > 1:
            what = "there are two texts for each image, its page and the page's title"
            raise DataError(64, what, where=str(self.folder.root), fix="say which: --text page or --text title")
        return asked or there[0]

    def _titles_file(self, split: str) -> str | None:
        names = (f"texts/{split}_titles.csv", f"{split}_titles.csv")
        return next((name for name in names if self.folder.path(name)), None)

    @property
    def text(self) -> str:
        """The page or its title, and who chose."""
        kind = {"page": "text of the page", "title": "title of the page"}[self.options["text"]]
        return f"{kind} ({'asked for' if self._asked else 'the only text there'})"

    def rows(self, split: str) -> Iterator[Sample | Skip]:
        """By label, then by image name."""
        if self.options["text"] == "page":
            yield from self._with_pages(split)
        else:
            yield from self._with_titles(split)

    def _images(self, split: str) -> Iterator[tuple[str, str, str] | Skip]:
        """(label, image name, its path) of every image; what is none is skipped."""
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
                    yield Skip("image name not of the class", path)
                elif name in tested:
                    yield Skip("image twice", path)
                else:
                    yield label, name, path

    def _sample(self, text: str, label: str, name: str, path: str) -> Sample:
        return Sample(name[:-4], clean(text) if self.options["clean"] else text, path, label, path)

    def _with_titles(self, split: str) -> Iterator[Sample | Skip]:
        file = self._titles_file(split) or ""
        titles: dict[tuple[str, str], tuple[int, str]] = {}
        odd_rows: set[str] = set()  # images that are named in a line that is listed already
        odd_images: set[str] = set()  # images that are listed already
        for number, line in self.folder.lines(file):
            row = read_title(line)
            if isinstance(row, OddRow):
                odd_rows.add(row.image)
                yield Skip(row.reason, file, number)
            elif (row.label, row.image) in titles:
                yield Skip("image twice", file, number)
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
                yield Skip("image without text", path)
        for (_, name), (number, _) in titles.items():
            if name not in odd_images:
                yield Skip("text without image", file, number)

    def _with_pages(self, split: str) -> Iterator[Sample | Skip]:
        for image in self._images(split):
            path = image.file if isinstance(image, Skip) else image[2]
            place = path.removeprefix("images/").rpartition(".")[0] + ".txt"
            places = (f"texts_txt/{place}", f"texts_txt/{place.partition('/')[2]}")
            page = next((place for place in places if self.folder.path(place)), None)
            if page is not None:
                self._pages_used.add(page)
            if isinstance(image, Skip) or page is None:
                yield image if isinstance(image, Skip) else Skip("image without text", path)
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
                yield Skip("text without image", path)

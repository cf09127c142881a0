"""MM-IMDB: films with a plot, a poster and one or more of 23 genres.

J. Arevalo, T. Solorio, M. Montes-y-Gomez, F. Gonzalez, "Gated multimodal units for information fusion", 2017,
https://arxiv.org/abs/1702.01992.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from mopefuse.core.error_codes import DataCode
from mopefuse.data._source_files import SourceFolder
from mopefuse.data.prepare import Sample, Skip, Source, is_file_name
from mopefuse.errors import DataError

GENRES = tuple(
    "Action Adventure Animation Biography Comedy Crime Documentary Drama Family Fantasy Film-Noir History Horror Music "
    "Musical Mystery Romance Sci-Fi Short Sport Thriller War Western".split()
)
_OF_SPLIT = {"train": "train", "val": "dev", "test": "test"}  # our names to those of the data set
_AUTHOR = "MMBT's filter"


class MMIMDb(Source):
    """``split.json`` names the films of each split, ``dataset/<id>.json`` and ``dataset/<id>.jpeg`` hold them.

    The text is the longest plot (the first of equally long ones). A film with a genre other than these 23 is
    skipped, and counted by the first such genre.
    """

    name: ClassVar[str] = "mm-imdb"
    inputs: ClassVar[tuple[str, ...]] = ("split.json", "dataset")
    layout: ClassVar[str] = "split.json, dataset/<id>.json and dataset/<id>.jpeg"
    published: ClassVar[Mapping[str, tuple[int, str]]] = {
        "train": (15_552, _AUTHOR),
        "val": (2_608, _AUTHOR),
        "test": (7_799, _AUTHOR),
    }
    labels = GENRES

    def __init__(self, folder: SourceFolder, options: Mapping[str, Any]) -> None:
        """See `Source`. Reads split.json."""
        super().__init__(folder, options)
        for name, found in (("split.json", folder.path("split.json")), ("folder dataset", folder.names("dataset"))):
            if not found:
                raise self.incomplete(name)
        self._films = self._read_splits()

    @property
    def text(self) -> str:
        """The plot that is used."""
        return "longest plot"

    def _read_splits(self) -> dict[str, list[str]]:
        try:
            found = json.loads(self.folder.read("split.json").decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            problem = f"is not JSON ({error})" if isinstance(error, json.JSONDecodeError) else "cannot be read as JSON"
            raise self._bad_splits(problem) from None
        if not isinstance(found, dict):
            raise self._bad_splits(f"contains a {type(found).__name__}, not an object")
        films: dict[str, list[str]] = {}
        for split, original in _OF_SPLIT.items():
            ids = found.get(original)
            if not isinstance(ids, list):
                raise self._bad_splits(f"has no list {original!r}")
            for identity in ids:
                if not is_file_name(identity):
                    raise self._bad_splits(f"has {str(identity)[:40]!r} in {original!r}, which cannot be the id of a film")
            films[split] = ids
        return films

    def _bad_splits(self, problem: str) -> DataError:
        fix = 'write {"train": [ids], "dev": [ids], "test": [ids]}, ids as strings'
        return DataError(DataCode.BAD_SPLIT_JSON, f"split.json {problem}", where=str(self.folder.root / "split.json"), fix=fix)

    def rows(self, split: str) -> Iterator[Sample | Skip]:
        """Yield films in the order of split.json."""
        return map(self._film, self._films[split])

    def _film(self, identity: str) -> Sample | Skip:
        file = f"dataset/{identity}.json"
        if self.folder.path(file) is None:
            return Skip("missing JSON file", file)
        try:
            film = json.loads(self.folder.read(file).decode("utf-8-sig"))
        except (ValueError, RecursionError):
            film = None
        if not isinstance(film, dict):
            return Skip("JSON file cannot be read", file)
        genres = film.get("genres")
        if not isinstance(genres, list) or not genres or not all(isinstance(genre, str) for genre in genres):
            return Skip("no genres", file)
        other = next((genre for genre in genres if genre not in GENRES), None)
        if other is not None:
            return Skip(f"genre {other[:40]}", file)
        value = film.get("plot")
        plots = [plot for plot in (value if isinstance(value, list) else [value]) if isinstance(plot, str)]
        plot = max(plots, key=len, default="")
        if not plot.strip():
            return Skip("no plot", file)
        image, labels = f"dataset/{identity}.jpeg", list(dict.fromkeys(genres))
        return Sample(id=identity, text=plot, img=image, label=labels, file=file)

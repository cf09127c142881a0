"""Write the training data of a matcher: pairs of a retrieval run and, for each, the most similar values that are no partners.

A matcher is an ordinary classifier of pairs, with the labels `MATCH` and `OTHER`, that re-ranks what the run finds.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from mopefuse.config.encoder_sides import specs
from mopefuse.config.schema import Data as DataConfig
from mopefuse.config.schema import RunConfig
from mopefuse.core.atomic_files import replace_atomically, write_lines
from mopefuse.core.error_codes import ConfigCode, DataCode
from mopefuse.core.formatting import json_text
from mopefuse.data.base import SPLITS, DataSet, Split
from mopefuse.data.columns import get_column
from mopefuse.errors import ConfigError, DataError
from mopefuse.evaluation.split import run_split
from mopefuse.fusion.retrieval import SIDES
from mopefuse.inference.rerank import MATCH, OTHER
from mopefuse.metrics.reranking import hard_negatives
from mopefuse.modalities.base import get_modality
from mopefuse.modalities.file_source import Folders
from mopefuse.modalities.files import Files
from mopefuse.runs.load import OpenRun, open_run

_SPARE = 100  # further candidates, if the values of the best ones already are in enough negatives
Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Draw:
    """How negatives are drawn: `count` for each pair, from the `among` best candidates that are no partners.

    If the values of these are in enough negatives already, the next ones are taken.
    """

    count: int = 1
    among: int = 20
    seed: int = 0


def write_candidates(
    run: Path,
    out: Path,
    *,
    how: Draw = Draw(),
    checkpoint: str = "best",
    device: str = "auto",
    advance: Advance = lambda what, done, total: None,
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Write ``train.jsonl``, ``val.jsonl`` and ``test.jsonl``, of the splits that the run's data have.

    Each pair is a row with the label `MATCH`. Rows with the label `OTHER` follow it, in which the value of either modality is
    exchanged for one that the run ranks high; see `assign_negatives`.

    Args:
        out: must be new or empty.
        advance: called with a name of what is done, and the progress.

    Returns:
        The rows of each split by label, and the arguments of the command that trains a matcher.

    Raises:
        ConfigError: the run was not trained for retrieval. DataError: `out` is not empty, or a split has a single pair.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fix = "choose a new folder, or remove this one"
        what = "the folder is not empty" if out.is_dir() else "this is a file"
        raise DataError(DataCode.MADE_FOLDER_NOT_EMPTY, what, where=str(out), fix=fix)
    opened = open_run(run, None, checkpoint=checkpoint, device=device, advance=partial(advance, "checking files"))
    opened.notice_changes(*opened.data.splits)
    data = opened.data
    if not data.task.compares_samples:
        what, fix = f"the run was trained for the task {data.task}", "pass a run of mopefuse train --task retrieval"
        raise ConfigError(ConfigCode.CANNOT_RERANK, what, where=str(run), fix=fix)
    counts: dict[str, dict[str, int]] = {}
    with replace_atomically(out.resolve()) as building:
        building.mkdir()
        copies = None if isinstance(data.files, Folders) else _Copies(building, data)
        for name in (name for name in SPLITS if name in data.splits):
            pairs = _pairs(opened, name, how, partial(advance, name))
            write_lines(building / f"{name}.jsonl", _lines(opened, name, pairs, copies))
            matches = sum(main == comp for main, comp in pairs)
            counts[name] = {MATCH: matches, OTHER: len(pairs) - matches}
    roots = [root.resolve() for root in data.files.roots] if isinstance(data.files, Folders) else []
    return counts, train_command(run, out, opened.config, roots)


def train_command(run: Path, out: Path, config: RunConfig, roots: Sequence[Path]) -> list[str]:
    """The arguments of ``mopefuse train`` for a matcher with the encoders of the run.

    Args:
        roots: the folders of the files that rows name.
    """
    encoders = [part for side, spec in specs(config).items() for part in (f"--{side}", str(spec))]
    folders = [part for root in roots for part in ("--image-root", str(root))]
    return ["mopefuse", "train", "--data", str(out), *folders, *encoders, "--out", f"{str(run).rstrip('/')}-matcher"]


def _pairs(opened: OpenRun, split: str, how: Draw, advance: Callable[[int, int], None]) -> list[tuple[int, int]]:
    """The rows of the main and the complementary value of each pair: equal ones, and then hard negatives of these.

    Raises:
        DataError: no value of the split is a negative of another.
    """
    data, found = opened.data, opened.data.splits[split]
    outputs_SN = run_split(opened.model, data, split, opened.config, opened.device, advance=advance).logits_SN
    both, key_Sk = outputs_SN.float().chunk(2, dim=-1), data.targets(split)
    keys = [found.keys[opened.model.encoder(side).modality].tolist() for side in SIDES]
    draw = random.Random(f"{split} {how.seed}")
    best = [hard_negatives(query, gallery, key_Sk, how.among + _SPARE) for query, gallery in (both, both[::-1])]
    drawn = [[shuffle_first(places, how.among, draw) for places in of_side] for of_side in best]
    negatives = assign_negatives(drawn, keys, how.count)
    if not any(negatives):
        what = f"no value of {split} can be exchanged for one of another pair"
        raise DataError(DataCode.EMPTY_SPLIT, what, where=split, fix="use a run with more pairs in each split")
    return [pair for number, others in enumerate(negatives) for pair in ((number, number), *others)]


def shuffle_first(places: Sequence[int], count: int, draw: random.Random) -> list[int]:
    """Bring the first `count` into a random order: if only the best became negatives, a high score would reveal them."""
    first = [*places[:count]]
    draw.shuffle(first)
    return [*first, *places[count:]]


def assign_negatives(
    best: Sequence[Sequence[Sequence[int]]], keys: Sequence[Sequence[bytes]], count: int
) -> list[list[tuple[int, int]]]:
    """For each pair, up to `count` negatives: rows of the main and the complementary value.

    By turns, the complementary or the main value is exchanged for the first that is left. No value occurs in more than `count`
    negatives for each of its pairs: otherwise those that resemble many would be known as negatives without the other value.

    Args:
        best: candidates of each main value, and of each complementary one, that are no partners.
        keys: of the main values, and of the complementary ones; equal values have equal keys.
    """
    pairs = range(len(keys[0]))
    negatives: list[list[tuple[int, int]]] = [[] for _ in pairs]
    seen = {*zip(*keys, strict=True)}
    left = [Counter({key: count * times for key, times in Counter(of_side).items()}) for of_side in keys]
    turns = [(number, (number + turn) % 2) for turn in range(count) for number in pairs]  # which side is kept
    for number, kept in turns:
        left[kept][keys[kept][number]] -= 1
    for rank in range(max((len(places) for of_side in best for places in of_side), default=0)):
        waiting = []
        for number, kept in turns:
            other = 1 - kept
            place = best[kept][number][rank] if rank < len(best[kept][number]) else -1
            pair = (number, place) if kept == 0 else (place, number)
            key = keys[0][pair[0]], keys[1][pair[1]]
            if place < 0 or left[other][key[other]] < 1 or key in seen:
                waiting.append((number, kept))
                continue
            left[other][key[other]] -= 1
            seen.add(key)
            negatives[number].append(pair)
        turns = waiting
    return negatives


def _lines(opened: OpenRun, split: str, pairs: Sequence[tuple[int, int]], copies: _Copies | None) -> Iterator[str]:
    """The rows of a split, as lines of JSON."""
    found, modalities = opened.data.splits[split], [opened.model.encoder(side).modality for side in SIDES]
    for number, places in enumerate(pairs):
        row: dict[str, Any] = {"id": f"{split}-{number:06d}"}
        for modality, place in zip(modalities, places, strict=True):
            value = found.rows[place].values[modality]
            if isinstance(get_modality(modality), Files):
                value = copies.name(found, place, modality) if copies is not None else _plain_name(opened.data, str(value))
            row[get_column(modality, DataConfig())] = value
        yield json_text(row | {"label": MATCH if places[0] == places[1] else OTHER}) + "\n"


def _plain_name(data: DataSet, name: str) -> str:
    """The name of a file from another folder: as it is, or the path if it leaves its own folder and returns to another."""
    if ".." not in PurePosixPath(name).parts or not isinstance(data.files, Folders):
        return name
    return str(data.files.path(name, where="", what="file").resolve())


class _Copies:
    """Copies of files that are in shards or on another machine, each content once."""

    def __init__(self, folder: Path, data: DataSet) -> None:
        self._folder, self._data = folder, data
        (folder / "files").mkdir()

    def name(self, split: Split, number: int, modality: str) -> str:
        """The name of the copy of a row's file, which is made if necessary."""
        row = split.rows[number]
        source = str(row.values[modality])
        name = f"files/{split.keys[modality][number].hex()}{PurePosixPath(source).suffix}"
        if not (self._folder / name).exists():
            (self._folder / name).write_bytes(self._data.files.read(source, where=split.where(row), what=modality))
        return name

"""Say what new pairs are: from a file, a stream or Python, in their order, with an error where a pair is none.

Nothing here needs torch; a trained run brings it when it is loaded.

Shapes: B batch, N labels.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from mopefuse.config.recipe import changed_data, read_saved
from mopefuse.config.schema import Data as DataConfig
from mopefuse.config.schema import build_config
from mopefuse.config.sides import Comp
from mopefuse.core.dependencies import not_installed
from mopefuse.core.formatting import json_text, spreadsheet_cell
from mopefuse.data.columns import Layout, in_order
from mopefuse.data.rows import NoRow, check_input
from mopefuse.data.tables import Found, find_tables, json_line
from mopefuse.errors import CheckpointError, ConfigError, DataError, MopefuseError, NumericError
from mopefuse.inference.bundle import Bundle
from mopefuse.modalities import base as modality
from mopefuse.runs.locate import kind_of, locate, trained

Answer = dict[str, Any]


class Model(Protocol):
    """What can be asked: a trained run or an exported bundle.

    Attributes:
        modalities: that its encoders read. may_lack: those of them that it was trained to do without.
        empty_is_missing: whether it was trained with empty texts as missing ones.
    """

    labels: tuple[str, ...]
    multi_label: bool
    thresholds: Sequence[float]
    modalities: tuple[str, ...]
    may_lack: tuple[str, ...]
    empty_is_missing: bool

    def say(self, values: Mapping[str, Sequence[Any]]) -> tuple[list[list[float]], list[Any] | None]:
        """Probabilities (B, N), and the routing of each sample, layers by experts, where the model routes; values by
        modality."""


@dataclass(frozen=True)
class Predictor:
    """A model that is asked about samples; `mopefuse.load` makes one."""

    model: Model

    def predict(
        self,
        images: Any = None,
        texts: Any = None,
        *,
        top: int | None = None,
        routing: bool = False,
        **more: Any,
    ) -> list[Answer]:
        """What each sample is: ``{"label" | "labels", "probabilities": {label: p}}``.

        Args:
            images: PIL images of any mode, paths of files, or arrays of uint8 (height, width, 3); they are prepared as the
                files of a data set are. texts: as many. more: as many of other modalities, by name (``audio=[...]``). What
                the model does not read may be left out; None in a list is a sample that has none; one value alone is a list
                of one.
            top: most labels in "probabilities", the likeliest first; default all.
            routing: add the weights of the experts, a list for each routed layer.

        Raises:
            DataError: not as many of one as of another, or something that is no image or no text.
            ConfigError: `top` is less than 1.
        """
        if top is not None and top < 1:
            raise ConfigError(300, f"top is {top}: at least one label is answered", where="predict", fix="name 1 or more")
        values = modality.named((images, texts), more)
        if not modality.count_of(values):
            return []
        _require(values, self.model)
        said, routed = self.model.say(values)
        if not all(map(isfinite, chain.from_iterable(said))):
            raise NumericError(3, "the model's answer is not finite", fix="train again, or use another checkpoint")
        answers = [answer(p_N, self.model, top) for p_N in said]
        if routing and routed is not None:
            for one, weights in zip(answers, routed, strict=True):
                one["routing"] = weights
        return answers


def _require(values: Mapping[str, Sequence[Any]], model: Model) -> None:
    """Refuse samples without what the model needs, or with nothing."""
    read = {name: each for name, each in values.items() if name in model.modalities}
    for number, sample in enumerate(zip(*read.values(), strict=True)):
        missing = [name for name, value in zip(read, sample, strict=True) if value is None]
        needed = [name for name in missing if name not in model.may_lack]
        if needed or (missing and len(missing) == len(read)):
            what = f"sample {number} has no {' and no '.join(needed or missing)}, and the model was not trained to do without"
            raise DataError(100, what, fix="leave it out, or train with --modality-dropout, for the main encoder with --either")


def answer(p_N: Sequence[float], model: Model, top: int | None) -> Answer:
    """A prediction from probabilities."""
    likeliest = sorted(range(len(p_N)), key=lambda i: (-p_N[i], i))[:top]
    probabilities = {model.labels[i]: round(p_N[i], 6) for i in likeliest}
    if model.multi_label:
        chosen = [label for label, p, least in zip(model.labels, p_N, model.thresholds, strict=True) if p >= least]
        return {"labels": chosen, "probabilities": probabilities}
    return {"label": model.labels[likeliest[0]], "probabilities": probabilities}


def load(
    path: str | Path, *, checkpoint: str = "best", device: str = "auto", main: str | None = None, comp: Comp = None
) -> Predictor:
    """A trained run, an adapter or an exported bundle to ask; ``hf-hub:repo/name`` is fetched first.

    Args:
        checkpoint: of a run: best, last or step-N.
        main, comp: specs of the encoders, where the weights that the run was trained with go by other names here; of several
            complementary ones as in ``["2=SPEC"]`` or ``["text=SPEC"]``.

    Raises:
        CheckpointError: there is none, or its encoders are not those that it was trained with.
        ConfigError: an option that a bundle, which has its encoders inside, cannot have.
        PackageError: a run or an adapter, and torch or another library of encoders is not installed.
    """
    folder = locate(path)
    if not folder.is_dir():
        raise CheckpointError(4, f"there is no run {path}", fix="name a folder that mopefuse train or export wrote")
    if kind_of(folder) == "bundle":
        if checkpoint != "best" or main or comp:
            fix = "leave --checkpoint, --main and --comp out"
            raise ConfigError(70, "a bundle has one set of weights, encoders included", where=str(path), fix=fix)
        return Predictor(Bundle(folder, device))
    try:
        from mopefuse.inference.run_model import RunModel
    except ImportError as error:  # where only the runtime of bundles is installed
        raise not_installed(error) or error from error

    return Predictor(RunModel(folder, checkpoint, device, main=main, comp=comp))


def input_settings(path: str | Path, changes: Mapping[str, Any] | None = None) -> DataConfig:
    """How to read samples for a model: with the columns that its training data had.

    Args:
        path: of the model, see `load`.
        changes: settings of `data` by name, which win; see `mopefuse.config.recipe.changed_data`.

    Raises:
        CheckpointError: there is no such model. ConfigError: one of `changes` is no setting.
    """
    folder = locate(path)
    if kind_of(folder) == "bundle":
        saved = build_config(read_saved(folder / "config.yaml"), source=str(folder)).data
    else:
        saved = trained(folder).config().data
    return changed_data(saved.model_copy(update={"path": None, "on_missing": "error"}), changes or {})


# -- pairs from files


@dataclass(frozen=True)
class Pair:
    """One line of the input: what it says of each modality that the model reads, or why it is none."""

    id: str
    values: Mapping[str, Any] = field(default_factory=dict)
    error: MopefuseError | None = None


def read_pairs(
    source: Path | Iterable[bytes],
    config: DataConfig,
    modalities: Sequence[str],
    may_lack: Sequence[str] = (),
    *,
    empty_is_missing: bool = False,
) -> Iterator[Pair]:
    """The samples of a table, or of lines of JSON as they come; files are relative to the table's folder.

    Args:
        modalities: that are read; others need not be there.
        may_lack: those of them that a row need not have; a row that has nothing at all is none.
        empty_is_missing: whether it has none of what is empty.

    Raises:
        DataError: no such file, or one that is no table.
    """
    if isinstance(source, Path):
        if not source.is_file():
            raise DataError(28, f"there is no file {source}", fix="name a .jsonl, .csv, .tsv or .parquet file, or - for stdin")
        table = find_tables(source, config)[""]
        root, file, rows = source.parent, table.file, table.rows()
    else:
        root, file = Path(), "stdin"
        rows = (Found(number, json_line(line)) for number, line in enumerate(source, start=1) if line.strip())
    roots = (root, *map(Path, config.image_roots))
    needed = [name for name in modalities if name not in may_lack]
    layouts = [Layout.of(in_order(needed), config)] if needed else []
    if may_lack:
        lenient = Layout.of(in_order(modalities), config.model_copy(update={"on_missing": "absent"}))
        layouts.append(replace(lenient, empty_is_missing=empty_is_missing))
    for found in rows:
        yield _pair(found, file, roots, layouts, config)


def _pair(found: Found, file: str, roots: Sequence[Path], layouts: Sequence[Layout], config: DataConfig) -> Pair:
    where, identity = f"{file}:{found.line}", str(found.line)
    try:
        if isinstance(found.value, str):
            raise NoRow(found.value)
        values: dict[str, Any] = {}
        for layout in layouts:
            identity, said = check_input(found.value, found.line, layout)
            values = {**said, **values}  # what the first says of what is needed stays
        place = f"{where}, id {identity}"
        for name, value in values.items():
            if value is not None:
                values[name] = modality.of(name).read(value, roots, where=place, config=config)
        return Pair(identity, values)
    except NoRow as error:
        named = "name the column that has it with --text-col, --image-col or --column, or remove the row"
        fix = named if str(error).startswith(("has no ", "has none of ")) else "correct or remove it"
        return Pair(identity, error=DataError(3, f"{where} {error}", where=where, fix=fix))
    except MopefuseError as error:
        return Pair(identity, error=error)


def predict_pairs(
    predictor: Predictor,
    pairs: Iterable[Pair],
    *,
    batch: int = 32,
    top: int | None = None,
    routing: bool = False,
    strict: bool = False,
) -> Iterator[Answer]:
    """An answer for each pair, in their order; ``{"id", "error": {...}}`` for what is no pair.

    Raises:
        MopefuseError: with `strict`, the first thing that is no pair.
    """
    pairs = iter(pairs)
    while group := list(islice(pairs, batch)):
        good = [pair for pair in group if pair.error is None]
        values = {name: [pair.values[name] for pair in good] for name in (good[0].values if good else ())}
        said = iter(predictor.predict(**modality.by_argument(values), top=top, routing=routing))
        for pair in group:
            if pair.error is not None and strict:
                raise pair.error
            yield {"id": pair.id, **({"error": pair.error.as_dict()} if pair.error is not None else next(said))}


# -- answers to files


def as_jsonl(answers: Iterable[Answer]) -> Iterator[str]:
    """One JSON object a line."""
    return (json_text(one) + "\n" for one in answers)


def as_csv(answers: Iterable[Answer], labels: Sequence[str]) -> Iterator[str]:
    """A header, then id, label (labels separated by ``|``), the probability of each label, and the error."""
    yield _csv_line(["id", "label", *(f"p({label})" for label in labels), "error"])
    for one in answers:
        chosen = "|".join(one["labels"]) if "labels" in one else one.get("label", "")
        said: Mapping[str, float] = one.get("probabilities", {})
        error = one["error"]["message"] if "error" in one else ""
        yield _csv_line([one["id"], chosen, *(said.get(label, "") for label in labels), error])


def _csv_line(cells: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(map(spreadsheet_cell, cells))
    return text.getvalue()

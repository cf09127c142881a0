"""``mopefuse predict``."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from mopefuse.cli import _predict_tables as tables
from mopefuse.cli.settings import Settings, data_section
from mopefuse.cli.shared_options import Checkpoint, Device, Model, OtherComp, OtherMain, Rerank
from mopefuse.core.error_codes import ConfigCode, DataCode

if TYPE_CHECKING:
    from mopefuse.config.schema import Data
    from mopefuse.inference.mask_files import MaskWriter
    from mopefuse.inference.pairs import Pair
    from mopefuse.inference.predict import Model as LoadedModel
    from mopefuse.inference.predict import Prediction, Predictor


_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def predict(
    run: Model,
    inputs: tables.Inputs = None,
    *,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead of INPUT: the image of a single row, usually with --text.")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="The text of that row.")] = None,
    out: tables.Out = None,
    top: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Write only the N most probable labels, or N rows of the gallery.")
    ] = None,
    gallery: Annotated[Path | None, typer.Option(metavar="TABLE", help="Retrieval: table of the rows to rank.")] = None,
    gallery_of: Annotated[str | None, typer.Option(metavar="MODALITY", help="What to rank, if it is not clear.")] = None,
    rerank: Rerank = None,
    routing: Annotated[bool, typer.Option("--routing", help="Also write the weights of the prompt experts.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be read.")] = False,
    batch: Annotated[int, typer.Option(min=1, max=1_000_000, help="Rows per batch.")] = 32,
    checkpoint: Checkpoint = "best",
    device: Device = "auto",
    main: OtherMain = None,
    comp: OtherComp = None,
    engine: tables.Engine = None,
    workers: tables.Workers = None,
    form: tables.Format = None,
    partition_rows: tables.PartitionRows = None,
    ray_address: tables.RayAddress = None,
    overwrite: tables.Overwrite = False,
    as_json: tables.AsJson = False,
    settings: Settings,
) -> None:
    """Predict labels for new rows.

    Writes one line of JSON (or CSV) per row, with the predicted label and probabilities, in input order. Column names
    that you omit are taken from the run. A model for retrieval ranks the rows of --gallery for each row. With --engine,
    any number of tables become a folder of files, one for every 10,240 rows; the same command continues after a stop.

    \b
    Examples:
      mopefuse predict runs/first new.jsonl -o predictions.csv
      mopefuse predict runs/first --image photo.jpg --text "a red car"
      mopefuse predict runs/first tables/ -o predictions/ --engine local
    """
    how = tables.ModelOptions(str(run), checkpoint, device, main, comp, top, routing, batch, gallery, gallery_of, rerank)
    many = tables.BatchOptions(engine, inputs or [], out, workers, form, partition_rows, ray_address, overwrite, as_json)
    if many.are_given():
        many.refuse({"--image": image, "--text": text, "--strict": strict, "--rerank": rerank})
        return tables.predict_tables(many, how, settings)
    given = _Rows(inputs[0] if inputs else None, image, text)
    file = None if out is None else Path(out)
    _check(given, file, gallery, run)
    _predict_rows(given, file, how, strict, settings)


class _Rows(NamedTuple):
    """The table to predict, or the values of a single row."""

    source: str | None
    image: Path | None
    text: str | None


def _predict_rows(given: _Rows, file: Path | None, how: tables.ModelOptions, strict: bool, settings: Settings) -> None:
    from mopefuse.cli._gallery import find_gallery, find_reranker
    from mopefuse.inference.gallery import rank_pairs
    from mopefuse.inference.predict import input_settings, load, predict_pairs

    predictor = load(how.run, checkpoint=how.checkpoint, device=how.device, main=how.main, comp=how.comp)
    config = input_settings(how.run, data_section(settings))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    found, query = find_gallery(predictor, how.gallery, how.gallery_of, _queries(given), config, how.batch)
    pairs = islice(_pairs(given, config, predictor.model, only=query), rank, None, world)
    options: dict[str, Any] = {"batch": how.batch, "top": how.top, "strict": strict}
    if how.rerank is not None:
        options["reranker"] = find_reranker(predictor, how, config, query)
    if found is None:
        options |= {"routing": how.routing, "masks": _mask_writer(predictor, file)}
    predict_all = predict_pairs if found is None else partial(rank_pairs, gallery=found)
    predictions: Iterable[Prediction] = predict_all(predictor, pairs, **options)
    if world > 1:
        predictions = _gather(predictions, how.batch)
        if rank:
            deque(predictions, maxlen=0)
            return
    _note_top(how.top, predictor.model)
    errors: list[dict[str, str]] = []
    count = _write(predictions, file, predictor, errors)
    _summarise(count, errors, str(given.source))


def _mask_writer(predictor: Predictor, out: Path | None) -> MaskWriter | None:
    """Writes masks to a folder next to the file of predictions; None if there are none, or no file."""
    from mopefuse.inference.mask_files import MaskWriter

    if out is None or predictor.model.task.label_kind != "mask":
        return None
    return MaskWriter(out.with_name(f"{out.stem}-masks"), predictor.model.labels)


def _check(given: _Rows, out: Path | None, gallery: Path | None, run: Path) -> None:
    """Refuse input that is missing or of the wrong kind, and a file that cannot be written, before torch is imported."""
    from mopefuse.core.atomic_files import check_file
    from mopefuse.errors import ConfigError
    from mopefuse.runs.locate import get_kind

    source = given.source
    if (source is None) == (given.image is None and given.text is None):
        what = "no input given" if source is None else "both INPUT and --image or --text given"
        raise ConfigError(ConfigCode.NOT_ONE_INPUT, what, where="predict", fix="pass a table, or --image and --text")
    if out is not None and out.suffix not in (".jsonl", ".csv"):
        raise ConfigError(
            ConfigCode.UNKNOWN_OUTPUT_SUFFIX,
            f"{out.name} is neither .jsonl nor .csv",
            where="--out",
            fix="use a file name that ends in .jsonl or .csv",
        )
    if out is not None:
        check_file(out)
    if gallery is not None and not gallery.is_file():
        what = f"{gallery} is a folder" if gallery.is_dir() else f"file not found: {gallery}"
        raise ConfigError(ConfigCode.BAD_PREDICT_INPUT, what, where="--gallery", fix="pass a table of the rows to rank")
    if source is None or source == "-":
        return
    path = Path(source)
    if not path.is_file():
        what, fix = f"file not found: {source}", "pass a table of rows, or - for stdin"
        if path.is_dir():
            swapped = get_kind(path) and run.is_file()
            fix = f"write the model first: mopefuse predict {source} {run}" if swapped else _table_in(path)
            what = f"{source} is a folder"
        raise ConfigError(ConfigCode.BAD_PREDICT_INPUT, what, where="predict", fix=fix)
    if path.suffix.lower() in _IMAGES:
        fix = f"write --image {source} --text TEXT"
        raise ConfigError(ConfigCode.INPUT_IS_AN_IMAGE, f"{source} is an image, not a table of rows", where="predict", fix=fix)


def _note_top(top: int | None, model: LoadedModel) -> None:
    """Print a notice if there are neither probabilities nor candidates to choose from."""
    from mopefuse.cli._render import err

    if top is not None and not (model.task.is_classification or model.task.compares_samples):
        err().print(f"--top has no effect: the task is {model.task}", markup=False)


def _summarise(count: int, errors: list[dict[str, str]], source: str) -> None:
    """Print how many rows were predicted.

    Raises:
        DataError: none could be.
    """
    from mopefuse.cli._render import err
    from mopefuse.core.formatting import several
    from mopefuse.errors import DataError
    from mopefuse.modalities.files import MISSING

    rows = several(count, "row")
    if errors and len(errors) == count:
        what = f"could not read any of {rows}; first error: {errors[0]['message']}"
        all_missing = {error["code"] for error in errors} == {MISSING}
        fix = "add --image-root DIR, the folder of the files" if all_missing else errors[0]["hint"]
        raise DataError(DataCode.NO_ROW_READABLE, what, where=source, fix=fix or "pass a table of rows")
    if errors:
        rows += f", {len(errors)} of which could not be read (see the field error); first error: {errors[0]['message']}"
    err().print(rows, markup=False)


def _queries(given: _Rows) -> Path | list[str]:
    """The table of queries, or the modalities of a single one; none are known of rows from stdin."""
    if given.source not in (None, "-"):
        return Path(given.source or "")
    return [name for name, value in (("image", given.image), ("text", given.text)) if value is not None]


def _pairs(rows: _Rows, config: Data, model: LoadedModel, only: str | None = None) -> Iterable[Pair]:
    """The rows to predict, from a table, from stdin, or from ``--image`` and ``--text``.

    Args:
        only: the modality to read; by default those of the model.
    """
    from mopefuse.errors import DataError
    from mopefuse.inference.pairs import Pair, read_pairs
    from mopefuse.modalities.image import open_image

    source, image, text = rows
    if only is not None and source is not None:
        return read_pairs(sys.stdin.buffer if source == "-" else Path(source), config, [only])
    if source is not None:
        place, empty = sys.stdin.buffer if source == "-" else Path(source), model.empty_is_missing
        return read_pairs(place, config, model.modalities, model.optional_modalities, empty_is_missing=empty)
    given: dict[str, Any] = {}
    if image is not None:
        given["image"] = open_image([image.absolute().parent], image.name, where="--image", max_pixels=config.max_pixels)
    if text is not None and (text.strip() or not model.empty_is_missing):
        given["text"] = text
    for name, flag in (("image", "--image FILE"), ("text", "--text TEXT")):
        if only is None and name in model.modalities and name not in model.optional_modalities and name not in given:
            what = f"the row has no {name}, and the model cannot predict without it"
            raise DataError(DataCode.MODALITY_REQUIRED, what, where="predict", fix=f"add {flag}")
    return [Pair(image.name if image else "text", {name: given.get(name) for name in ([only] if only else model.modalities)})]


def _gather(predictions: Iterable[Prediction], batch: int) -> Iterator[Prediction]:
    """Yield the predictions of all processes in the order of the input in the main process, and nothing in the others.

    Process r of W predicts rows r, r + W, r + 2W, ..., and hands over `batch` predictions at a time.
    """
    import torch

    from mopefuse.core import distributed

    own = iter(predictions)
    with distributed.process_group():
        while True:
            part = list(islice(own, batch))
            if not distributed.max_over_processes(len(part), torch.device("cpu")):
                return
            sent = torch.frombuffer(bytearray(json.dumps(part).encode()), dtype=torch.uint8)
            parts = [json.loads(bytes(text.numpy())) for (text,) in distributed.send_to_main([sent])]
            yield from (each[turn] for turn in range(batch) for each in parts if turn < len(each))


def _write(predictions: Iterable[Prediction], out: Path | None, predictor: Predictor, errors: list[dict[str, str]]) -> int:
    """Write predictions as they come, collect their errors, and return how many there are."""
    from mopefuse.cli._render import err
    from mopefuse.core.atomic_files import write_lines
    from mopefuse.inference.predict import as_csv, as_jsonl

    done = 0

    def counted() -> Iterator[Prediction]:
        nonlocal done
        for done, one in enumerate(predictions, start=1):
            if "error" in one:
                errors.append(one["error"])
            if done % 100 == 0:
                status.update(f"predicting: {done}")
            yield one

    lines = as_csv(counted(), predictor.model) if out is not None and out.suffix == ".csv" else as_jsonl(counted())
    with err().status("predicting") as status:
        if out is not None:
            write_lines(out, lines)
            return done
        for line in lines:
            sys.stdout.write(line)
            sys.stdout.flush()
    return done


def _table_in(folder: Path) -> str:
    """How to predict from a folder: one of its tables by name, or all of them."""
    from mopefuse.data.tables import SUFFIXES

    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    chosen = next((path for path in tables if path.stem.startswith("test")), next(iter(tables), None))
    return f"pass a table in it, such as {chosen}" if chosen else "pass a table of rows"

"""``mopefuse predict``."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopefuse.cli import columns

if TYPE_CHECKING:
    from mopefuse.config.schema import Data
    from mopefuse.inference.predict import Answer, Model, Pair, Predictor


_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def predict(
    run: Annotated[Path, typer.Argument(metavar="MODEL", help="Run, adapter or bundle: a folder, or hf-hub:repo/name.")],
    source: Annotated[str | None, typer.Argument(metavar="[INPUT]", help="JSON lines, CSV, ... of pairs; - for stdin.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write, .jsonl or .csv; default stdout.")] = None,
    image: Annotated[Path | None, typer.Option(help="A single image, with --text; alone if the model does without.")] = None,
    text: Annotated[str | None, typer.Option(help="The text of a single image.")] = None,
    top: Annotated[int | None, typer.Option(min=1, max=10**9, help="Only the likeliest labels.")] = None,
    routing: Annotated[bool, typer.Option("--routing", help="Add the weights of the experts that were used.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be read.")] = False,
    batch: Annotated[int, typer.Option(min=1, max=1_000_000, help="Pairs at a time.")] = 32,
    checkpoint: Annotated[str, typer.Option(help="best, last or step-N.")] = "best",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    main: Annotated[str | None, typer.Option(help="Where the main encoder's weights go by another name here.")] = None,
    comp: Annotated[list[str] | None, typer.Option(help="Where the complementary one's do; of several 2=SPEC.")] = None,
    text_col: columns.TextCol = None,
    image_col: columns.ImageCol = None,
    column: columns.Column = None,
    id_col: columns.IdCol = None,
    image_root: columns.ImageRoot = None,
) -> None:
    """Say what new pairs are.

    Their labels and probabilities, one line for each, in the order of the input.
    """
    from mopefuse.cli._render import err
    from mopefuse.core.artifact import check_file
    from mopefuse.errors import ConfigError, DataError
    from mopefuse.inference.predict import input_settings, load, predict_pairs
    from mopefuse.modalities.files import MISSING

    if (source is None) == (image is None and text is None):
        raise ConfigError(64, "there is not one input", where="predict", fix="name a file, or give --image and --text")
    if out is not None and out.suffix not in (".jsonl", ".csv"):
        raise ConfigError(65, f"{out.name} is neither .jsonl nor .csv", where="--out", fix="name a file of one of them")
    if out is not None:
        check_file(out)
    if isinstance(source, str) and source != "-" and not Path(source).is_file():
        what, fix = f"there is no file {source}", "name a file of pairs, or - for stdin"
        if Path(source).is_dir():
            what, fix = f"{source} is a folder", f"name a file of pairs in it, as {Path(source) / 'test.jsonl'}"
        raise ConfigError(66, what, where="predict", fix=fix)
    if source is not None and Path(source).suffix.lower() in _IMAGES:
        fix = f"add --image in front of it, and --text TEXT: --image {source}"
        raise ConfigError(302, f"{source} is an image, not a file of pairs", where="predict", fix=fix)
    flags = columns.settings(text=text_col, image=image_col, others=column, identity=id_col, roots=image_root)
    predictor = load(run, checkpoint=checkpoint, device=device, main=main, comp=comp)
    config = input_settings(run, {path.removeprefix("data."): value for path, value in flags.items()})
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    pairs = islice(_pairs(source, image, text, config, predictor.model), rank, None, world)
    answers: Iterable[Answer] = predict_pairs(predictor, pairs, batch=batch, top=top, routing=routing, strict=strict)
    if world > 1:
        answers = _gathered(answers, batch)
        if rank:
            deque(answers, maxlen=0)
            return
    errors: list[dict[str, str]] = []
    count = _write(answers, out, predictor, errors)
    said = f"{count} pair{'s' if count != 1 else ''}"
    if errors and len(errors) == count:
        what = f"none of {said} could be read, the first as: {errors[0]['message']}"
        gone = {error["code"] for error in errors} == {MISSING}
        fix = "name the folder that the files are in with --image-root DIR" if gone else errors[0]["hint"]
        raise DataError(101, what, where=str(source), fix=fix or "name a file of pairs")
    if errors:
        said += f", {len(errors)} of them could not be read: see their error; the first: {errors[0]['message']}"
    err().print(said, markup=False)


def _pairs(
    source: str | None, image: Path | None, text: str | None, config: Data, model: Model
) -> Iterable[Pair]:
    from mopefuse.errors import DataError
    from mopefuse.inference.predict import Pair, read_pairs
    from mopefuse.modalities.image import open_image

    if source is not None:
        place, empty = sys.stdin.buffer if source == "-" else Path(source), model.empty_is_missing
        return read_pairs(place, config, model.modalities, model.may_lack, empty_is_missing=empty)
    given: dict[str, Any] = {}
    if image is not None:
        given["image"] = open_image([image.absolute().parent], image.name, where=str(image), max_pixels=config.max_pixels)
    if text is not None and (text.strip() or not model.empty_is_missing):
        given["text"] = text
    for name, flag in (("image", "--image FILE"), ("text", "--text TEXT")):
        if name in model.modalities and name not in model.may_lack and name not in given:
            what = f"the pair has no {name}, and the model was not trained to do without"
            raise DataError(100, what, where="predict", fix=f"add {flag}")
    return [Pair(image.name if image else "text", {name: given.get(name) for name in model.modalities})]


def _gathered(answers: Iterable[Answer], batch: int) -> Iterator[Answer]:
    """The answers of all processes, in the order of the input; nothing in processes but the main one.

    Each process answers every so-manyth pair, and hands over `batch` answers at a time.
    """
    import torch

    from mopefuse.core import distributed

    own = iter(answers)
    with distributed.joined():
        while True:
            part = list(islice(own, batch))
            if not distributed.largest(len(part), torch.device("cpu")):
                return
            sent = torch.frombuffer(bytearray(json.dumps(part).encode()), dtype=torch.uint8)
            parts = [json.loads(bytes(text.numpy())) for (text,) in distributed.to_main([sent])]
            yield from (each[turn] for turn in range(batch) for each in parts if turn < len(each))


def _write(answers: Iterable[Answer], out: Path | None, predictor: Predictor, errors: list[dict[str, str]]) -> int:
    """Write answers as they come, collect what the errors among them say, and count them all."""
    from mopefuse.cli._render import err
    from mopefuse.core.artifact import write_lines
    from mopefuse.inference.predict import as_csv, as_jsonl

    done = 0

    def counted() -> Iterator[Answer]:
        nonlocal done
        for done, one in enumerate(answers, start=1):
            if "error" in one:
                errors.append(one["error"])
            if done % 100 == 0:
                status.update(f"predicting: {done}")
            yield one

    labels = predictor.model.labels
    lines = as_csv(counted(), labels) if out is not None and out.suffix == ".csv" else as_jsonl(counted())
    with err().status("predicting") as status:
        if out is not None:
            write_lines(out, lines)
            return done
        for line in lines:
            sys.stdout.write(line)
            sys.stdout.flush()
    return done

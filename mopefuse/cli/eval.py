"""``mopefuse eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopefuse.cli import columns

if TYPE_CHECKING:
    from mopefuse.evaluation.missing_shares import Shares

_SPLITS = ("train", "val", "test")


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="MODEL", help="Run, adapter or bundle: a folder, or hf-hub:repo/name.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    data: Annotated[Path | None, typer.Option(help="Other data with the same labels: a folder or a table.")] = None,
    checkpoint: Annotated[str, typer.Option(help="best, last or step-N.")] = "best",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write predictions here; default: into the run.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    main: Annotated[str | None, typer.Option(help="Where the main encoder's weights go by another name here.")] = None,
    comp: Annotated[list[str] | None, typer.Option(help="Where the complementary one's do; of several 2=SPEC.")] = None,
    missing: Annotated[
        list[str] | None, typer.Option(help="Take a modality away: text=0.7 from 70 % of the samples; grid for a table.")
    ] = None,
    missing_seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of which samples lack it.")] = 0,
    min_: Annotated[list[str] | None, typer.Option("--min", help="Gate: accuracy=0.8; exit code 10 below it.")] = None,
    text_col: columns.TextCol = None,
    image_col: columns.ImageCol = None,
    column: columns.Column = None,
    label_col: columns.LabelCol = None,
    id_col: columns.IdCol = None,
    split_col: columns.SplitCol = None,
    label_sep: columns.LabelSep = None,
    image_root: columns.ImageRoot = None,
    on_missing: Annotated[
        str | None, typer.Option(help="What a row of --data without a modality is: error, skip or absent; as in training.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Evaluate a run: metrics, labels, predictions.

    Deterministic; no sample depends on its batch. Predictions go into the run, or where --out says, a line for each sample;
    with more than 100 labels a line has the probabilities of the 20 most probable, of the predicted and of the true ones.
    """
    from mopefuse.core.artifact import check_file
    from mopefuse.errors import ConfigError, did_you_mean
    from mopefuse.evaluation.missing_shares import parse
    from mopefuse.metrics.gates import check_gates, parse_gates
    from mopefuse.runs.folder import RunFolder
    from mopefuse.runs.locate import kind_of, locate, trained

    gates = parse_gates(min_ or ())
    asked = parse(missing) if missing else []
    if asked is None and (out or gates):
        fix = "leave it out, or give one share, as text=0.7"
        raise ConfigError(153, "a grid has many results", where="--out" if out else "--min", fix=fix)
    read = columns.settings(
        text=text_col,
        image=image_col,
        others=column,
        label=label_col,
        identity=id_col,
        split=split_col,
        separator=label_sep,
        roots=image_root,
        labels=None,
    )
    read["data.on_missing"] = on_missing
    layout = {path.removeprefix("data."): value for path, value in read.items() if value is not None}
    if layout and data is None:
        what = "a run's own data are read as they were in training"
        raise ConfigError(154, what, where=", ".join(layout), fix="leave it out, or name other data with --data")
    if split not in _SPLITS:
        raise ConfigError(53, f"there is no split {split!r}", where="--split", fix=did_you_mean(split, _SPLITS))
    folder = locate(run)
    if kind_of(folder) != "bundle":
        trained(folder).config()
    if out is not None:
        check_file(out)
    from mopefuse.cli._render import err
    from mopefuse.core import distributed
    from mopefuse.evaluation.evaluate import evaluate as run_evaluation

    how: dict[str, Any] = {"split": split, "data": data, "layout": layout, "checkpoint": checkpoint, "device": device}
    how |= {"main": main, "comp": comp}
    if missing:
        _evaluate_missing(run, asked, how | {"seed": missing_seed}, gates, out, json=json)
        return
    own = split == "test" and data is None and checkpoint == "best"
    predictions = out
    if out is None and kind_of(folder) == "run":
        predictions = RunFolder(folder).predictions_file if own else folder / f"predictions-{split}-{checkpoint}.jsonl"
    with distributed.joined(), err().status(f"evaluating {split}") as status:
        told = lambda done, total: status.update(f"evaluating {split}: {done}/{total}")  # noqa: E731
        found = run_evaluation(run, **how, predictions=predictions, advance=told)
    if not distributed.is_main():
        return
    if not json:
        _print(run, found.split, found.metrics, found.per_label, predictions)
        check_gates(found.metrics, gates)
        return
    facts = {
        "run": str(run),
        "split": split,
        "metrics": found.metrics,
        "per_label": found.per_label,
        "predictions": str(predictions) if predictions else None,
    }
    _print_gated(found.metrics, gates, facts)


def _print_gated(metrics: dict[str, float], gates: dict[str, float], facts: dict[str, Any]) -> None:
    """One JSON object, and the exit code of a gate that does not hold."""
    from mopefuse.cli._render import print_json
    from mopefuse.errors import GateError
    from mopefuse.metrics.gates import check_gates

    try:
        check_gates(metrics, gates)
    except GateError as error:
        print_json({"ok": False, "error": error.as_dict(), **facts})
        raise typer.Exit(error.exit_code) from None
    print_json({"ok": True, **facts})


def _evaluate_missing(
    run: Path, asked: list[Shares] | None, how: dict[str, Any], gates: dict[str, float], out: Path | None, *, json: bool
) -> None:
    from mopefuse.cli._missing_display import show
    from mopefuse.cli._render import err
    from mopefuse.core import distributed
    from mopefuse.evaluation.missing import evaluate_missing
    from mopefuse.metrics.gates import check_gates

    with distributed.joined(), err().status("loading") as status:
        told = lambda what, done, total: status.update(f"{what}: {done}/{total}")  # noqa: E731
        found = evaluate_missing(run, asked, **how, predictions=out, advance=told)
    if not distributed.is_main():
        return
    last = found.cells[-1]
    if json:
        facts = {key: value for key, value in found.as_dict().items() if key != "orders"}
        _print_gated(last.metrics, gates, {"run": str(run), **facts, "metrics": last.metrics})
        return
    show(str(run), found)
    check_gates(last.metrics, gates)


def _print(
    run: Path, split: str, metrics: dict[str, float], per_label: list[dict[str, object]], predictions: Path | None
) -> None:
    from mopefuse.cli._render import out, percent, table

    support = sum(int(str(row["support"])) for row in per_label)
    rows = [[str(row["label"]), *(percent(float(str(row[key]))) for key in ("precision", "recall", "f1"))] for row in per_label]
    for row, facts in zip(rows, per_label, strict=True):
        row.append(str(facts["support"]))
    table(f"{run}, {split}", ["label", "precision", "recall", "f1", "support"], rows)
    plain = ("loss", "absent_labels")
    shown = [[name, f"{value:.4g}" if name in plain else percent(value)] for name, value in metrics.items()]
    table(f"{split}: {support} labels given", ["metric", "value"], shown)
    if predictions is not None:
        out().print(f"predictions: {predictions}", markup=False)

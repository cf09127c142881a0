"""``mopefuse eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_SPLITS = ("train", "val", "test")


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="MODEL", help="Run, adapter or bundle: a folder, or hf-hub:repo/name.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    data: Annotated[Path | None, typer.Option(help="Another data folder with the same labels.")] = None,
    checkpoint: Annotated[str, typer.Option(help="best, last or step-N.")] = "best",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write predictions here; default: into the run.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    main: Annotated[str | None, typer.Option(help="Where the main encoder's weights go by another name here.")] = None,
    comp: Annotated[list[str] | None, typer.Option(help="Where the complementary one's do; of several 2=SPEC.")] = None,
    min_: Annotated[list[str] | None, typer.Option("--min", help="Gate: accuracy=0.8; exit code 10 below it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Evaluate a run: metrics, a table by label, predictions.jsonl. Deterministic; no sample depends on its batch."""
    from mopefuse.errors import ConfigError, GateError, did_you_mean
    from mopefuse.gates import check_gates, parse_gates
    from mopefuse.run import RunFolder
    from mopefuse.source import kind_of, locate, trained

    gates = parse_gates(min_ or ())
    if split not in _SPLITS:
        raise ConfigError(53, f"there is no split {split!r}", where="--split", fix=did_you_mean(split, _SPLITS))
    folder = locate(run)
    if kind_of(folder) != "bundle":
        trained(folder).config()
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(54, f"there is no folder {out.parent}", where="--out", fix="make it, or name another file")
    from mopefuse import distributed
    from mopefuse.cli._render import err, print_json
    from mopefuse.evaluate import evaluate as run_evaluation
    from mopefuse.evaluate import write_predictions

    with distributed.joined(), err().status(f"evaluating {split}") as status:
        found = run_evaluation(
            run,
            split=split,
            data=data,
            checkpoint=checkpoint,
            device=device,
            main=main,
            comp=comp,
            advance=lambda done, total: status.update(f"evaluating {split}: {done}/{total}"),
        )
    if not distributed.is_main():
        return
    own = split == "test" and data is None and checkpoint == "best"
    predictions = out
    if out is None and kind_of(folder) == "run":
        predictions = RunFolder(folder).predictions_file if own else folder / f"predictions-{split}-{checkpoint}.jsonl"
    if predictions is not None:
        write_predictions(predictions, found.predictions)
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
    try:
        check_gates(found.metrics, gates)
    except GateError as error:
        print_json({"ok": False, "error": error.as_dict(), **facts})
        raise typer.Exit(error.exit_code) from None
    print_json({"ok": True, **facts})


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

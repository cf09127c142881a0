"""``mopefuse eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopefuse.cli.settings import Settings, data_section
from mopefuse.cli.shared_options import Checkpoint, Device, Json, Model, OtherComp, OtherMain, Rerank, Split, read_data_path
from mopefuse.core.error_codes import ConfigCode

if TYPE_CHECKING:
    from mopefuse.evaluation.missing_shares import Shares
    from mopefuse.evaluation.quality_gates import Gates

Missing = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODALITY=FRACTION|grid",
        help="Remove a modality from a fraction of the samples (text=0.7); grid: measure several fractions.",
    ),
]
_SPLITS = ("train", "val", "test")


def evaluate(
    run: Model,
    *,
    split: Split = "test",
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Evaluate on other data with the same labels.", parser=read_data_path)
    ] = None,
    checkpoint: Checkpoint = "best",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="File for the predictions. Default: in the run folder.")
    ] = None,
    min_: Annotated[
        list[str] | None,
        typer.Option("--min", metavar="METRIC=VALUE", help="Exit with code 10 if a metric is below VALUE. Repeatable."),
    ] = None,
    max_: Annotated[
        list[str] | None,
        typer.Option("--max", metavar="METRIC=VALUE", help="Exit with code 10 if an error (mae, loss, ...) is above VALUE."),
    ] = None,
    missing: Missing = None,
    missing_seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed of --missing.")] = 0,
    rerank: Rerank = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, max=10**6, help="Candidates that --rerank re-ranks for each query. Default: 20.")
    ] = None,
    device: Device = "auto",
    main: OtherMain = None,
    comp: OtherComp = None,
    json: Json = False,
    settings: Settings,
) -> None:
    """Evaluate a run: metrics, and a prediction for every sample.

    Results do not depend on the batch size. Predictions are one line of JSON per sample; with more than 100 labels, each
    line has only the probabilities of the 20 most probable labels and of the predicted and true ones. Column options that
    you omit default to those of the run. --rerank chooses the weight of a matcher on the validation split, and stores it
    in RUN for predict.

    \b
    Example:
      mopefuse eval runs/first --split val --min accuracy=0.8
    """
    from mopefuse.evaluation.missing_shares import parse_shares
    from mopefuse.evaluation.quality_gates import parse_gates

    gates = parse_gates(min_ or (), max_ or ())
    shares = parse_shares(missing) if missing else []
    layout = data_section(settings)
    _check(run, split, data, settings, out, single=shares is not None, gated=bool(gates))
    options: dict[str, Any] = {"split": split, "data": data, "layout": layout, "checkpoint": checkpoint, "device": device}
    options |= {"main": main, "comp": comp}
    _check_rerank(rerank, candidates, missing)
    if rerank is not None:
        options |= {"candidates": candidates or 20, "predictions": out or _predictions_file(run, options, reranked=True)}
        _evaluate_reranked(run, rerank, options, gates, json=json)
    elif missing:
        _evaluate_missing(run, shares, options | {"seed": missing_seed}, gates, out, json=json)
    else:
        _evaluate(run, options, gates, out, json=json)


def _check(
    run: Path, split: str, data: Path | None, settings: Settings, out: Path | None, *, single: bool, gated: bool
) -> None:
    """Check the options before torch is imported.

    Args:
        single: whether there is one result, not a grid of them. gated: whether a metric must be reached.
    """
    from mopefuse.config.flags import flag_of
    from mopefuse.core.atomic_files import check_file
    from mopefuse.errors import ConfigError, did_you_mean
    from mopefuse.runs.locate import find_run, get_kind, locate

    if not single and (out or gated):
        fix = "remove this flag, or use a single fraction, such as --missing text=0.7"
        raise ConfigError(
            ConfigCode.GRID_HAS_NO_SINGLE_RESULT,
            "--out and --min need a single result, but --missing grid gives several",
            where="--out" if out else "--min",
            fix=fix,
        )
    if settings and data is None:
        what = "column options apply only to --data"
        fix = "remove them, or add --data DIR"
        raise ConfigError(ConfigCode.COLUMNS_OF_OWN_DATA, what, where=", ".join(map(flag_of, settings)), fix=fix)
    if split not in _SPLITS:
        raise ConfigError(
            ConfigCode.NO_SUCH_SPLIT, f"unknown split {split!r}", where="--split", fix=did_you_mean(split, _SPLITS)
        )
    folder = locate(run)
    if get_kind(folder) != "bundle":
        find_run(folder).config()
    if out is not None:
        check_file(out)


def _evaluate(run: Path, options: dict[str, Any], gates: Gates, out: Path | None, *, json: bool) -> None:
    from mopefuse.cli._render import err
    from mopefuse.core import distributed
    from mopefuse.evaluation.evaluate import evaluate as run_evaluation
    from mopefuse.evaluation.quality_gates import check_gates

    split = options["split"]
    file = out or _predictions_file(run, options)
    with distributed.process_group(), err().status(f"evaluating {split}") as status:
        advance = lambda done, total: status.update(f"evaluating {split}: {done}/{total}")  # noqa: E731
        found = run_evaluation(run, **options, predictions=file, advance=advance)
    if not distributed.is_main():
        return
    if not json:
        _print(run, found.split, found.metrics, found.per_label, found.predictions)
        check_gates(found.metrics, gates)
        return
    facts = {"run": str(run), "split": split, "metrics": found.metrics, "per_label": found.per_label}
    _print_gated(found.metrics, gates, {**facts, "predictions": str(found.predictions) if found.predictions else None})


def _predictions_file(run: Path, options: dict[str, Any], *, reranked: bool = False) -> Path | None:
    """The file in a run for its predictions, or the re-ranked ones; None for anything but a run."""
    from mopefuse.runs.folder import RunFolder
    from mopefuse.runs.locate import get_kind, locate

    folder = locate(run)
    if get_kind(folder) != "run":
        return None
    split, checkpoint = options["split"], options["checkpoint"]
    if split == "test" and options["data"] is None and checkpoint == "best" and not reranked:
        return RunFolder(folder).predictions_file
    return folder / f"predictions-{split}-{checkpoint}{'-reranked' if reranked else ''}.jsonl"


def _print_gated(metrics: dict[str, float], gates: Gates, facts: dict[str, Any]) -> None:
    """Print one JSON object, and exit with code 10 if a metric is below its gate."""
    from mopefuse.cli._render import print_json
    from mopefuse.errors import GateError
    from mopefuse.evaluation.quality_gates import check_gates

    try:
        check_gates(metrics, gates)
    except GateError as error:
        print_json({"ok": False, "error": error.as_dict(), **facts})
        raise typer.Exit(error.exit_code) from None
    print_json({"ok": True, **facts})


def _evaluate_missing(
    run: Path, shares: list[Shares] | None, options: dict[str, Any], gates: Gates, out: Path | None, *, json: bool
) -> None:
    from mopefuse.cli._missing_display import show
    from mopefuse.cli._render import err
    from mopefuse.core import distributed
    from mopefuse.evaluation.missing_modalities import evaluate_missing
    from mopefuse.evaluation.quality_gates import check_gates

    with distributed.process_group(), err().status("loading") as status:
        advance = lambda what, done, total: status.update(f"{what}: {done}/{total}")  # noqa: E731
        found = evaluate_missing(run, shares, **options, predictions=out, advance=advance)
    if not distributed.is_main():
        return
    last = found.cells[-1]
    if json:
        facts = {key: value for key, value in found.as_dict().items() if key != "orders"}
        _print_gated(last.metrics, gates, {"run": str(run), **facts, "metrics": last.metrics})
        return
    show(str(run), found)
    check_gates(last.metrics, gates)


def _check_rerank(rerank: Path | None, candidates: int | None, missing: list[str] | None) -> None:
    """Check the options of re-ranking together."""
    from mopefuse.errors import ConfigError

    if candidates is not None and rerank is None:
        what, fix = "there is no matcher to re-rank candidates", "add --rerank MATCHER, or remove --candidates"
        raise ConfigError(ConfigCode.CANNOT_RERANK, what, where="--candidates", fix=fix)
    if rerank is not None and missing:
        what, fix = "re-ranking needs both values of every pair", "remove --missing or --rerank"
        raise ConfigError(ConfigCode.CANNOT_RERANK, what, where="--missing", fix=fix)


def _evaluate_reranked(run: Path, matcher: Path, options: dict[str, Any], gates: Gates, *, json: bool) -> None:
    from mopefuse.cli._render import err, out, table
    from mopefuse.core import distributed
    from mopefuse.evaluation.quality_gates import check_gates
    from mopefuse.evaluation.rerank import evaluate_reranked
    from mopefuse.metrics.names import write_metric

    with distributed.process_group(), err().status("loading") as status:
        advance = lambda what, done, total: status.update(f"{what}: {done}/{total}")  # noqa: E731
        found = evaluate_reranked(run, matcher, **options, advance=advance)
    if not distributed.is_main():
        return
    stored = vars(found.stored)
    if json:
        facts = {"run": str(run), "split": found.split, "metrics": found.metrics, "without": found.without}
        facts |= {"predictions": str(found.predictions), "rerank": {"matcher": str(matcher), **stored}}
        _print_gated(found.metrics, gates, facts)
        return
    both = zip(found.without.items(), found.metrics.values(), strict=True)
    rows = [[name, write_metric(name, before), write_metric(name, after)] for (name, before), after in both]
    table(f"{run}, {found.split}", ["metric", "first stage", "re-ranked"], rows)
    if not found.stored.weight:
        out().print("weight 0: no weight is better on val by more than noise, so predict --rerank changes nothing")
    else:
        what = f"the {found.stored.candidates} best candidates are re-ranked"
        out().print(f"weight {found.stored.weight:g}, chosen on val; {what}")
    out().print(f"predictions: {found.predictions}", markup=False)
    check_gates(found.metrics, gates)


def _print(
    run: Path, split: str, metrics: dict[str, float], per_label: list[dict[str, object]], predictions: Path | None
) -> None:
    from mopefuse.cli._render import out, table
    from mopefuse.metrics.names import write_metric

    support = sum(int(str(row["support"])) for row in per_label)
    names = [name for name in per_label[0] if name not in ("label", "support", "lowest", "highest")]
    rows = [
        [str(row["label"]), *(write_metric(name, float(str(row[name]))) for name in names), str(row["support"])]
        for row in per_label
    ]
    table(f"{run}, {split}", ["label", *names, "support"], rows)
    shown = [[name, write_metric(name, value)] for name, value in metrics.items()]
    what = "pixels" if "iou" in per_label[0] else "labels"
    table(f"{split}: {support:,} true {what}", ["metric", "value"], shown)
    if predictions is not None:
        out().print(f"predictions: {predictions}", markup=False)

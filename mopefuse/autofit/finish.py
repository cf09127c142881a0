"""Calibrate the chosen candidate, make the folder its run, and test it once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mopefuse.autofit.calibration import Calibration, calibrate, fold_temperature
from mopefuse.autofit.candidates import CANDIDATES, REGRESSIONS
from mopefuse.autofit.context import Context
from mopefuse.autofit.cross_validation import average
from mopefuse.autofit.leaderboard import Leaderboard, Line, reading
from mopefuse.autofit.scores import Estimate, Judge, Predictions
from mopefuse.autofit.state import CROSS_VALIDATED, VALIDATED
from mopefuse.autofit.tryouts import head_name
from mopefuse.core.artifact import dump_json
from mopefuse.core.atomic_files import write_atomically
from mopefuse.evaluation.outputs import BatchOutput
from mopefuse.evaluation.scoring import Evaluation, score
from mopefuse.evaluation.split import run_split, split_metrics
from mopefuse.runs.load import Loaded, load_model
from mopefuse.tasks.classification import Classification

_ENSEMBLE = 3  # candidates that are averaged


def finish(context: Context, leader: str, chosen: str) -> Leaderboard:
    """Calibrate and publish the chosen candidate, test it once, and write the leaderboard.

    Args:
        leader: the candidate that cross-validation chose, which others are compared with.
    """
    source = context.folder.candidate_run(chosen)
    which = source.config().train.select
    loaded = load_model(source, which, context.device)
    # 1. The temperature becomes part of the weights.
    calibration = _calibrate(context, chosen)
    if calibration is not None and not fold_temperature(loaded.model.head, calibration.temperature):
        calibration = None
    # 2. The folder becomes the run.
    assert loaded.step is not None
    progress = {"progress": source.checkpoint(which)[1]["progress"]}
    context.folder.publish(source, loaded.model.trainable_state_dict(), loaded.step, progress)
    # 3. One test.
    evaluation, logits_SN = _evaluate(context, loaded, "test")
    targets = context.data.targets("test")
    predicted = Predictions(torch.arange(len(targets)), logits_SN)
    test_score = Judge(context.data.task, targets, context.data.outputs).score(predicted)
    board = Leaderboard(
        lines=_lines(context, leader, chosen),
        metric=context.judge.metric,
        choices=context.choices,
        elapsed=context.budget.elapsed,
        budget=context.budget.total,
        calibration=calibration,
        ensemble=_ensemble(context, chosen),
        test=evaluation.metrics,
        test_score=test_score,
    )
    board.write(context.folder.path)
    # 4. The result of the run.
    _, val_logits_SN = _evaluate(context, loaded, "val")
    result = {
        **source.result(),
        "metrics": {"val": split_metrics(val_logits_SN, context.data, "val"), "test": evaluation.metrics},
        "per_label": evaluation.per_label,
        "fit": {"headline": board.headline, "selected": chosen, "calibration": board.as_dict()["calibration"]},
    }
    write_atomically(context.folder.run.metrics_file, dump_json(result))
    return board


def _calibrate(context: Context, chosen: str) -> Calibration | None:
    """Choose the temperature by the out-of-sample predictions of a candidate; None for a model without probabilities."""
    if not isinstance(context.data.task, Classification):
        return None
    cross_validated = context.folder.entries[chosen].state == CROSS_VALIDATED
    names = [head_name(side) for side in context.modality_of] if chosen == "linear-average" else [chosen]
    found = [context.folder.predictions(name) for name in names]
    targets = context.judge.targets[found[0].rows_K]
    basis = "cross-validation" if cross_validated else "validation"
    return calibrate(context.data.task, [one.logits_KN for one in found], targets, basis)


def _evaluate(context: Context, loaded: Loaded, split: str) -> tuple[Evaluation, Tensor]:
    """Metrics and logits (S, N) of a split; the predictions for test are written."""
    outputs = run_split(loaded.model, context.data, split, loaded.config, context.device)
    each = [BatchOutput(torch.arange(len(outputs.logits_SN)), outputs.logits_SN)]
    file = context.folder.run.predictions_file if split == "test" else None
    return score(each, context.data, split, loaded.thresholds, predictions=file), outputs.logits_SN


def _lines(context: Context, leader: str, chosen: str) -> list[Line]:
    """The lines of the leaderboard, from cheap to expensive."""
    lines, judge, load = [], context.judge, context.folder.predictions
    known = [one.name for one in REGRESSIONS if one.reads == "both"]
    regression = max((load(name) for name in known), key=judge.value)
    for name in [name for name in CANDIDATES if name in context.folder.entries]:
        entry = context.folder.entries[name]
        line = Line(entry, chosen=name == chosen, leader=name == leader)
        if entry.is_scored:
            found, trained = load(name), entry.state == VALIDATED
            gain = judge.difference(found, context.on_val(leader) if trained else load(leader))
            over = None if trained else judge.difference(found, regression)
            line = replace(line, score=judge.score(found), gain=gain, over_regression=over)
        lines.append(line)
    return lines


def _ensemble(context: Context, chosen: str) -> dict[str, Estimate]:
    """The gain of averaging the best few cross-validated candidates over the chosen one, by their names."""
    whole = context.predictions(CROSS_VALIDATED)
    rows = max(len(found.rows_K) for found in whole.values())
    whole = {name: found for name, found in whole.items() if len(found.rows_K) == rows}
    best = sorted(whole, key=lambda name: -context.judge.value(whole[name]))[:_ENSEMBLE]
    if len(best) < 2:
        return {}
    mean = average([whole[name] for name in best], context.data.task)
    entries = [context.folder.entries[name] for name in best]
    names = ", ".join(f"{reading(entry.reads)}: {entry.title}" for entry in entries)
    theirs = whole.get(chosen)
    return {names: context.judge.difference(mean, theirs)} if theirs is not None else {}

"""Try candidates: cross-validate those on frozen features, train and validate the others."""

from __future__ import annotations

import time
from typing import Any

from mopefuse.autofit.candidates import NETWORKS, REGRESSIONS, TRAINED, Candidate
from mopefuse.autofit.context import Context
from mopefuse.autofit.cross_validation import (
    FoldClock,
    average,
    cross_validate_network,
    cross_validate_regressions,
    fit_on_train,
    fit_settings,
)
from mopefuse.autofit.listener import CandidateListener, OutOfTime
from mopefuse.autofit.scores import Predictions
from mopefuse.autofit.state import CROSS_VALIDATED, FAILED, SKIPPED, VALIDATED, Entry
from mopefuse.config.encoder_sides import is_comp
from mopefuse.core.formatting import duration
from mopefuse.errors import Interrupted, MopefuseError
from mopefuse.evaluation.split import run_split
from mopefuse.fusion.build import build_model
from mopefuse.fusion.mlp_fit import NetworkSettings
from mopefuse.runs.load import load_model
from mopefuse.training.listener import Listener
from mopefuse.training.train import train
from mopefuse.training.trainer import Start

_REGRESSION_SHARE, _NETWORK_SHARE, _VARIANT_SHARE = 0.25, 0.4, 0.2  # of the time left: regressions, MLP, each variant of it
_MAX_ITER = 100  # of a regression in cross-validation, which needs no further digits


def try_regressions(context: Context) -> None:
    """Cross-validate all regressions."""
    if all(context.is_done(candidate) for candidate in REGRESSIONS):
        return
    linear = f"{context.data.task.linear_name}s"
    context.listener.on_phase(f"cross-validation of {linear}", context.budget)
    began = time.monotonic()
    sides = tuple(context.modality_of)
    groups: dict[str, tuple[str, ...]] = {head_name(side): (side,) for side in sides}
    groups |= {"linear-comp": tuple(filter(is_comp, sides)), "linear-concat": sides}
    config = REGRESSIONS[-1].config(context.values, {"linear": {"max_iter": _MAX_ITER}})
    clock = FoldClock(linear, context.budget, context.listener, _REGRESSION_SHARE)
    how = fit_settings(context.features, context.data.outputs, config)
    found = cross_validate_regressions(context.features, how, groups, clock)
    heads = [found[head_name(side)] for side in sides]
    strengths = {name: [one.strength] for name, one in found.items()} | {"linear-average": [one.strength for one in heads]}
    predictions = {name: one.predictions for name, one in found.items()}
    predictions["linear-average"] = average([one.predictions for one in heads], context.data.task)
    for side in sides:
        context.folder.save_predictions(head_name(side), found[head_name(side)].predictions)
    seconds = round((time.monotonic() - began) / len(REGRESSIONS), 2)
    for candidate in REGRESSIONS:
        title = candidate.title_for(context.data.task)
        entry = Entry(candidate.name, title, context.reads(candidate), CROSS_VALIDATED, seconds=seconds)
        entry.strengths, entry.trainable = strengths[candidate.name], _count_trainable(context, candidate)
        context.record(entry, predictions[candidate.name])


def head_name(side: str) -> str:
    """The name of the predictions of a regression on one side."""
    return "linear-main" if side == "main" else f"head-{side}"


def _count_trainable(context: Context, candidate: Candidate) -> int:
    return sum(build_model(candidate.config(context.values), context.data.outputs, context.data.task).breakdown().values())


def try_network(context: Context, candidate: Candidate) -> None:
    """Cross-validate a method that is trained on frozen features."""
    if context.is_done(candidate):
        return
    context.listener.on_phase(f"cross-validation of {candidate.title}", context.budget)
    entry = Entry(candidate.name, candidate.title, context.reads(candidate), CROSS_VALIDATED)
    share = _NETWORK_SHARE if candidate is NETWORKS[0] else _VARIANT_SHARE
    clock = FoldClock(candidate.title, context.budget, context.listener, share)
    config = candidate.config(context.values)
    how = fit_settings(context.features, context.data.outputs, config)
    network = NetworkSettings(config.head_hidden, config.mlp.dropout, config.seed)
    found = cross_validate_network(context.features, how, network, clock)
    entry.seconds = round(clock.seconds, 2)
    if found is None:
        entry.state, entry.note = SKIPPED, f"one fold takes longer than {100 * share:g} % of the time left"
        context.record(entry)
        return
    entry.trainable = _count_trainable(context, candidate)
    entry.epochs = found.epochs
    context.record(entry, found.predictions)


def train_leader(context: Context, candidate: Candidate) -> None:
    """Train the candidate that cross-validation chose as a run, with the C that it chose, and predict validation.

    A finished run is kept.
    """
    run, entry = context.folder.candidate_run(candidate.name), context.folder.entries[candidate.name]
    if not run.metrics_file.is_file():
        context.listener.on_phase(f"training {candidate.title_for(context.data.task)}", context.budget)
        start: Start | None = None
        more: dict[str, Any] = {"linear": {"strengths": sorted(set(entry.strengths))}} if entry.strengths else {}
        if entry.epochs:  # fitted in memory, several times as fast as step by step
            start, more = _fit_network(context, candidate, entry.epochs), {"train": {"epochs": 0}}
        config = candidate.config(context.values, more)
        train(config, run.path, overwrite=run.exists(), start=start, listener=Listener(), test=False)
    context.folder.save_predictions(f"{candidate.name}-val", _validation_predictions(context, candidate))


def _fit_network(context: Context, candidate: Candidate, epochs: int) -> Start:
    """The weights of an MLP that is fitted on train."""
    config, labels = candidate.config(context.values), context.data.outputs
    network = NetworkSettings(config.head_hidden, config.mlp.dropout, config.seed)
    fitted = fit_on_train(context.features, fit_settings(context.features, labels, config), network, epochs)
    return Start(build_model(config, labels).trainable_state_dict() | fitted)


def try_trained(context: Context, candidate: Candidate, leader: str) -> None:
    """Train a candidate and score it on validation, if there is time.

    Args:
        leader: the candidate to beat.
    """
    if context.is_done(candidate):
        return
    entry = Entry(candidate.name, candidate.title_for(context.data.task), context.reads(candidate), SKIPPED)
    if context.budget.left <= _start_seconds(context, candidate):
        entry.note = f"too little time left of {duration(context.budget.total)}"
        context.record(entry)
        return
    context.listener.on_phase(f"training {candidate.title_for(context.data.task)}", context.budget)
    began = time.monotonic()
    listener = _listener(context, leader)
    run = context.folder.candidate_run(candidate.name)
    try:
        more = {"linear": {"strengths": context.folder.entries["linear-concat"].strengths}}  # of the warm start
        config = candidate.config(context.values, more)
        result = train(config, run.path, resume=run.can_resume(), overwrite=not run.can_resume(), listener=listener, test=False)
        entry.state, entry.note, entry.trainable = VALIDATED, listener.reason, result["parameters"]["trainable"]
        found = _validation_predictions(context, candidate)
    except Interrupted:
        raise
    except OutOfTime as reason:
        entry.note, found = f"no time: {reason}", None
    except MopefuseError as error:
        entry.state, entry.note, found = FAILED, error.what, None
    entry.seconds = round(time.monotonic() - began, 2)
    context.record(entry, found)


def _start_seconds(context: Context, candidate: Candidate) -> float:
    """Estimate how long the warm start of a candidate takes.

    It fits the same regressions, the first MLP and cross-attention again.
    """
    if "warm_start" not in candidate.changes:
        return 0.0
    entries = context.folder.entries
    return sum(entries[one.name].seconds for one in (*REGRESSIONS, NETWORKS[0], TRAINED[0]) if one.name in entries)


def _listener(context: Context, leader: str) -> CandidateListener:
    """A listener that knows what the leader scores on validation."""
    to_beat, metric = context.judge.score(context.on_val(leader)), context.judge.metric
    share = len(context.data.splits["test"].rows) / len(context.features.val_rows)
    return CandidateListener(context.listener, context.budget, metric=metric, to_beat=to_beat, tested_share=share)


def _validation_predictions(context: Context, candidate: Candidate) -> Predictions:
    run = context.folder.candidate_run(candidate.name)
    loaded = load_model(run, run.config().train.select, context.device)
    outputs = run_split(loaded.model, context.data, "val", loaded.config, context.device)
    return Predictions(context.features.val_rows, outputs.logits_SN)

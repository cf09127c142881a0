"""Try candidates: cross-validate those on frozen features, train and validate the others."""

from __future__ import annotations

import time
from typing import Any

import torch

from mopefuse.autofit.candidates import REGRESSIONS, Candidate
from mopefuse.autofit.context import Context
from mopefuse.autofit.cross_validation import FoldClock, average, cross_validate_network, cross_validate_regressions
from mopefuse.autofit.listener import CandidateListener
from mopefuse.autofit.scores import Estimate, Predictions
from mopefuse.autofit.state import CROSS_VALIDATED, FAILED, SKIPPED, VALIDATED, Entry
from mopefuse.config.sides import is_comp
from mopefuse.core.formatting import duration
from mopefuse.errors import Interrupted, MopefuseError, ResourceError
from mopefuse.evaluation.split import run_split
from mopefuse.fusion.build import build_model
from mopefuse.runs.load import load_model
from mopefuse.training.listener import Listener
from mopefuse.training.train import train

_REGRESSION_SHARE, _NETWORK_SHARE = 0.3, 0.25  # of the time left, for the regressions and for each network
_PROMPTED = 4  # last layers that are prompted: the output of those before is computed once


def try_regressions(context: Context) -> None:
    """Cross-validate all regressions."""
    if all(context.is_done(candidate) for candidate in REGRESSIONS):
        return
    context.listener.on_phase("cross-validation of logistic regressions", context.budget)
    began, multi = time.monotonic(), context.data.multi_label
    sides = tuple(context.modality_of)
    groups = {head_name(side): (side,) for side in sides}
    groups |= {"linear-main": ("main",), "linear-comp": tuple(filter(is_comp, sides)), "linear-concat": sides}
    config = REGRESSIONS[-1].config(context.values)
    clock = FoldClock("logistic regressions", context.budget, context.listener, _REGRESSION_SHARE)
    found = cross_validate_regressions(context.features, context.data, config, groups, clock)
    heads = [found[head_name(side)] for side in sides]
    strengths = {name: [one.strength] for name, one in found.items()} | {"linear-average": [one.strength for one in heads]}
    predictions = {name: one.predictions for name, one in found.items()}
    predictions["linear-average"] = average([one.predictions for one in heads], multi_label=multi)
    for side in sides:
        context.folder.save_predictions(head_name(side), found[head_name(side)].predictions)
    seconds = round((time.monotonic() - began) / len(REGRESSIONS), 2)
    for candidate in REGRESSIONS:
        entry = Entry(candidate.name, candidate.title, context.reads(candidate), CROSS_VALIDATED, seconds=seconds)
        entry.strengths, entry.trainable = strengths[candidate.name], _count_trainable(context, candidate)
        context.record(entry, predictions[candidate.name])


def head_name(side: str) -> str:
    """The name of the predictions of one of the regressions that are averaged."""
    return f"head-{side}"


def _count_trainable(context: Context, candidate: Candidate) -> int:
    return sum(build_model(candidate.config(context.values), len(context.data.labels)).breakdown().values())


def try_network(context: Context, candidate: Candidate) -> None:
    """Cross-validate a method that is trained on frozen features."""
    if context.is_done(candidate):
        return
    context.listener.on_phase(f"cross-validation of {candidate.title}", context.budget)
    entry = Entry(candidate.name, candidate.title, context.reads(candidate), CROSS_VALIDATED)
    clock = FoldClock(candidate.title, context.budget, context.listener, _NETWORK_SHARE)
    config = candidate.config(context.values)
    found = cross_validate_network(context.features, context.data, config, context.device, clock)
    entry.seconds = round(clock.seconds, 2)
    if found is None:
        entry.state, entry.note = SKIPPED, "one fold takes longer than a quarter of the time left"
        context.record(entry)
        return
    entry.trainable = _count_trainable(context, candidate)
    context.record(entry, found)


def train_chosen(context: Context, name: str, candidate: Candidate) -> None:
    """Train a cross-validated candidate as a run, with the C that cross-validation chose; a finished run is kept."""
    run, entry = context.folder.candidate_run(name), context.folder.entries[name]
    if entry.state != CROSS_VALIDATED or run.metrics_file.is_file():
        return
    context.listener.on_phase(f"training {candidate.title}", context.budget)
    more = {"linear": {"strengths": sorted(set(entry.strengths))}} if entry.strengths else {}
    train(candidate.config(context.values, more), run.path, resume=run.exists(), listener=Listener(), test=False)


def try_trained(context: Context, candidate: Candidate, leader: str, reserve: float) -> None:
    """Train a candidate and score it on validation, if there is time.

    Args:
        leader: the candidate to beat. reserve: seconds to keep for the rest of the fit.
    """
    if context.is_done(candidate):
        return
    entry = Entry(candidate.name, candidate.title, context.reads(candidate), SKIPPED)
    if context.budget.left <= reserve:
        entry.note = f"no time left of {duration(context.budget.total)}"
        context.record(entry)
        return
    context.listener.on_phase(f"training {candidate.title}", context.budget)
    began = time.monotonic()
    listener = _listener(context, leader, reserve)
    run = context.folder.candidate_run(candidate.name)
    try:
        config = candidate.config(context.values, _prompted_layers(context, candidate))
        result = train(config, run.path, resume=run.can_resume(), overwrite=not run.can_resume(), listener=listener, test=False)
        entry.state, entry.note, entry.trainable = VALIDATED, listener.reason, result["parameters"]["trainable"]
        found = _validation_predictions(context, candidate)
    except (Interrupted, ResourceError):
        raise
    except MopefuseError as error:
        entry.state, entry.note, found = FAILED, error.what, None
    entry.seconds = round(time.monotonic() - began, 2)
    context.record(entry, found)


def _listener(context: Context, leader: str, reserve: float) -> CandidateListener:
    """A listener that knows what the leader scores on validation."""
    found, val_rows = context.folder.predictions(leader), context.features.val_rows
    on_val_K = torch.isin(found.rows_K, val_rows)
    predicted = Predictions(found.rows_K[on_val_K], found.logits_KN[on_val_K])
    to_beat = context.judge.score(predicted) if on_val_K.any() else Estimate(0.0, 0.0, 0)
    share = len(context.data.splits["test"].rows) / len(val_rows)
    return CandidateListener(context.listener, context.budget, to_beat=to_beat, tested_share=share, reserve=reserve)


def _prompted_layers(context: Context, candidate: Candidate) -> dict[str, Any]:
    """Prompt the last layers only, unless the user chose the layers."""
    if "layers" in context.values.get("prompts", {}):
        return {}
    layers = context.layers["comp" if candidate.swapped else "main"]
    return {"prompts": {"layers": f"last:{_PROMPTED}"}} if layers > _PROMPTED else {}


def _validation_predictions(context: Context, candidate: Candidate) -> Predictions:
    loaded = load_model(context.folder.candidate_run(candidate.name), "best", context.device)
    outputs = run_split(loaded.model, context.data, "val", loaded.config, context.device)
    return Predictions(context.features.val_rows, outputs.logits_SN)

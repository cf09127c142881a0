"""Find the best model for a table: try the candidates from cheap to expensive, choose with uncertainty, calibrate, test once.

A fit that was interrupted continues with ``resume``: features are cached, finished candidates are kept, and an unfinished one
resumes from its last checkpoint.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mopefuse.autofit.budget import Budget
from mopefuse.autofit.candidates import CANDIDATES, NETWORKS, TRAINED
from mopefuse.autofit.context import Context
from mopefuse.autofit.features import compute_features
from mopefuse.autofit.finish import finish
from mopefuse.autofit.leaderboard import Leaderboard
from mopefuse.autofit.listener import FitListener
from mopefuse.autofit.scores import Judge
from mopefuse.autofit.setup import choose_data, choose_encoders, data_values
from mopefuse.autofit.state import FitFolder, require_one_process
from mopefuse.autofit.tryouts import train_leader, try_network, try_regressions, try_trained
from mopefuse.config.recipe import parse_set
from mopefuse.config.setting_paths import merge, nest
from mopefuse.core import device as devices
from mopefuse.core.error_codes import ConfigCode
from mopefuse.errors import ConfigError, Interrupted
from mopefuse.training.plan import Prepared, prepare


@dataclass(frozen=True)
class FitResult:
    """The result of a fit: the folder, which is an ordinary run, and the leaderboard."""

    run: Path
    leaderboard: Leaderboard

    @property
    def headline(self) -> str:
        """What each modality and method contributed."""
        return self.leaderboard.headline


def fit(
    data: Path,
    out: Path,
    *,
    budget: float,
    settings: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    listener: FitListener | None = None,
) -> FitResult:
    """Find the best model for `data` within a budget, and write it to `out` as a run.

    Args:
        data: folder or table. budget: seconds of wall time.
        settings: settings of all candidates by dotted path; columns, splits and encoders are found if they are not named.
        sets: further settings, as ``--set`` takes them.

    Raises:
        MopefuseError: see docs/errors.md. Interrupted: Ctrl-C or SIGTERM; continue with `resume`.
    """
    listener = listener or FitListener()
    require_one_process()
    folder = FitFolder(out)
    with folder.claimed(resume=resume, overwrite=overwrite) as notice:
        if notice:
            listener.on_notice(notice)
        spending = Budget(budget, folder.spent)
        try:
            context = _set_up(data, folder, spending, listener, dict(settings or {}), sets)
            return FitResult(folder.path, _try_all(context))
        except KeyboardInterrupt:
            raise Interrupted(signal.SIGINT, "finished candidates are kept", fix=_CONTINUE) from None
        except Interrupted as stopped:
            stopped.fix = _CONTINUE
            raise
        finally:
            if folder.settings:
                folder.save(spending.elapsed)


_CONTINUE = "run the same command with --resume to continue"


def _set_up(
    data: Path, folder: FitFolder, budget: Budget, listener: FitListener, settings: dict[str, Any], sets: Sequence[str]
) -> Context:
    """Find columns, splits and encoders, and compute the features."""
    listener.on_phase("checking the data", budget)
    given = parse_set(sets)
    for path, value in settings.items():
        given = merge(nest(path, value), given)
    columns = {f"data.{name}": value for name, value in given.get("data", {}).items()}
    section, choices = choose_data(data, columns)
    specs, lines = choose_encoders(given.get("main"), given.get("comp"))
    values = {**given, **specs, "data": data_values(section)}
    folder.begin(values)
    folder.save(budget.elapsed)
    for line in (*choices, *lines):
        listener.on_notice(line)
    device = devices.resolve(values.get("device", "auto"))
    prepared = _prepared(values, listener, device)
    listener.on_phase("features of the frozen encoders", budget)
    features = compute_features(prepared, device, listener, budget)
    model = prepared.model
    return Context(
        folder=folder,
        budget=budget,
        listener=listener,
        values=values,
        choices=[*choices, *lines],
        device=device,
        data=prepared.data,
        modality_of={side: model.encoder(side).modality for side in model.uses},
        features=features,
        judge=Judge(features.task, features.targets, prepared.data.outputs),
    )


def _prepared(values: dict[str, Any], listener: FitListener, device: torch.device) -> Prepared:
    """Data and model of the simplest candidate.

    Raises:
        ConfigError: there is no such candidate for the task of the data.
    """
    try:
        return prepare(CANDIDATES["linear-concat"].config(values), listener, device)
    except ConfigError as error:
        if error.code != ConfigCode.METHOD_OF_OTHER_TASK.text:
            raise
        what = "mopefuse fit tries methods for classes and numbers, and the labels are neither"
        raise ConfigError(ConfigCode.FIT_OF_OTHER_TASK, what, where="fit", fix="use mopefuse train") from None


def _try_all(context: Context) -> Leaderboard:
    """Try all candidates, and finish the chosen one."""
    try_regressions(context)
    for candidate in NETWORKS:
        try_network(context, candidate)
    leader = context.leader()
    train_leader(context, CANDIDATES[leader])  # from here on there is a model, even if time runs out
    for candidate in [one for one in TRAINED if not one.swapped or isinstance(context.values["comp"], str)]:
        try_trained(context, candidate, leader)
    context.listener.on_phase("calibration and test", context.budget)
    return finish(context, leader, context.choose(leader))

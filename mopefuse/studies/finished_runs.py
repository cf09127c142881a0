"""The finished runs of a comparison: their settings, metrics and predictions, read from their folders and checked.

Shapes: S samples of the test split, N labels.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mopefuse.core.error_codes import CheckpointCode, ConfigCode
from mopefuse.core.regular_files import open_regular
from mopefuse.errors import CheckpointError, ConfigError
from mopefuse.metrics.bootstrap import Outcome
from mopefuse.runs.folder import RunFolder
from mopefuse.studies.study_file import distinguishing_settings
from mopefuse.tasks.base import Task, task_from_facts

_EVALUATE_AGAIN = "write it again with mopefuse eval"


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as its files describe it.

    Args:
        identity: settings that distinguish it from runs of other settings, regardless of the seed.
        data: fingerprint of each split. result: the content of metrics.json.
    """

    path: Path
    seed: int
    identity: dict[str, Any]
    data: dict[str, Any]
    task: Task
    labels: tuple[str, ...]
    result: dict[str, Any]


def select_finished(folders: Iterable[Path]) -> tuple[list[tuple[str, Path]], list[str]]:
    """Find the runs that are finished; if none is, all runs.

    Returns:
        Name and folder of each, and a notice for each folder that is left out.

    Raises:
        CheckpointError: a folder does not exist, or none is a run.
    """
    runs, notices = [], []
    for path in folders:
        if RunFolder(path).exists():
            runs.append((str(path), path))
        elif path.exists():
            notices.append(f"left out: {path} is not a run")
        else:
            raise _not_a_run(path)
    if not runs:
        raise _not_a_run(path)
    finished = [(name, path) for name, path in runs if RunFolder(path).metrics_file.is_file()]
    if not finished:
        return runs, notices
    notices += [f"left out: {name} is not finished" for name, path in runs if (name, path) not in finished]
    return finished, notices


def _not_a_run(path: Path) -> CheckpointError:
    return CheckpointError(
        CheckpointCode.NOT_FOUND, f"{path} is neither a run nor a study", where=str(path), fix="pass folders of finished runs"
    )


def select_same_data(
    named: Sequence[tuple[str, Path]], against: str | None = None
) -> tuple[list[tuple[str, Path]], list[str]]:
    """Find the largest group of runs that were tested on the same samples and labels, or the group of the run `against`.

    Args:
        named: name and folder of each run.

    Returns:
        Name and folder of each run of that group, and a notice for each other run. All runs if no two of them belong to one
        group, which `require_same_test` refuses.
    """
    groups: dict[tuple[str, str], list[tuple[str, Path]]] = {}
    for name, path in named:
        facts = RunFolder(path).manifest()
        groups.setdefault((str(facts["labels"]), str(facts["data"].get("test"))), []).append((name, path))
    of_baseline = (group for group in groups.values() if against and any(path == Path(against) for _, path in group))
    kept = next(of_baseline, max(groups.values(), key=len))
    if len(groups) < 2 or len(kept) < 2:
        return list(named), []
    labels, _ = next(key for key, group in groups.items() if group is kept)
    notices = [
        f"left out: {name} was tested on different {'labels' if key[0] != labels else 'samples'} from {kept[0][0]}"
        for key, group in groups.items()
        if group is not kept
        for name, _ in group
    ]
    return kept, notices


def read_finished(named: Sequence[tuple[str, Path]]) -> list[FinishedRun]:
    """Read runs, given by name (for messages) and folder.

    Raises:
        ConfigError: some are not finished, or have no test split. CheckpointError: damaged files.
    """
    unfinished = [name for name, path in named if not RunFolder(path).metrics_file.is_file()]
    if unfinished:
        shown = "; ".join(unfinished[:8]) + (f"; and {len(unfinished) - 8} more" if len(unfinished) > 8 else "")
        raise ConfigError(
            ConfigCode.RUNS_NOT_FINISHED,
            f"not finished: {shown}",
            where="compare",
            fix="finish them, or leave them out",
        )
    return [_read(path) for _, path in named]


def _read(path: Path) -> FinishedRun:
    run = RunFolder(path)
    config, manifest, result = run.config(), run.manifest(), run.result()
    missing = [key for key in ("metrics", "parameters", "seconds", "peak_memory_bytes", "rows") if key not in result]
    if missing:
        what = f"metrics.json is damaged: {missing[0]} is missing"
        raise CheckpointError(CheckpointCode.CONTENT_DAMAGED, what, where=str(path), fix="run mopefuse train with --resume")
    if not (result["metrics"] or {}).get("test"):
        raise ConfigError(
            ConfigCode.NOTHING_TO_COMPARE,
            f"{path} has no test metrics",
            where=str(path),
            fix="compare runs on data with a test split",
        )
    start = "a trained model" if manifest.get("start") else "scratch"
    return FinishedRun(
        path=path,
        seed=config.seed,
        identity={**distinguishing_settings(config), "start": start},
        data=manifest["data"],
        task=task_from_facts(manifest["task"]),
        labels=tuple(manifest["labels"]),
        result=result,
    )


def require_same_test(runs: Sequence[FinishedRun]) -> None:
    """Check that all runs were tested on the same samples and labels.

    Raises:
        ConfigError: they were not.
    """
    for run in runs[1:]:
        for what in ("labels", "samples"):  # in this order: if labels differ, so do samples
            ours, first = (r.labels if what == "labels" else r.data.get("test") for r in (run, runs[0]))
            if ours != first:
                both = f"{runs[0].path} and {run.path} were tested on different {what}"
                raise ConfigError(ConfigCode.RUNS_NOT_COMPARABLE, both, where="compare", fix="compare runs on the same data")


def group_by_settings(runs: Sequence[FinishedRun]) -> tuple[list[tuple[str, list[FinishedRun]]], list[str]]:
    """Group the runs that differ only in their seed; a run that repeats settings and seed of an earlier one is left out.

    Returns:
        A unique name and the runs of each group, and a notice for each run that is left out.
    """
    groups: dict[str, list[FinishedRun]] = {}
    notices = []
    for run in runs:
        group = groups.setdefault(json.dumps(run.identity, sort_keys=True), [])
        twin = next((other for other in group if other.seed == run.seed), None)
        if twin is not None:
            notices.append(f"left out: {run.path} has the same settings and seed as {twin.path}")
        else:
            group.append(run)
    named = [(_common_name([run.path for run in group]), group) for group in groups.values()]
    names = [name for name, _ in named]
    return [(name if names.count(name) == 1 else str(group[0].path), group) for name, group in named], notices


def _common_name(paths: Sequence[Path]) -> str:
    """Strip the seed: ``text`` for runs/text-0 and runs/text-1, or for runs/text/seed-0."""
    places = [path.absolute() for path in paths]
    names = [place.parent.name if re.fullmatch(r"seed-\d+", place.name) else place.name for place in places]
    stripped = {re.sub(r"[-_.]?(seed|s)?[-_.]?\d+$", "", name) for name in names}
    return stripped.pop() or names[0] if len(set(names)) > 1 and len(stripped) == 1 else names[0]


# -- predictions


def _read_predictions(run: FinishedRun) -> Iterator[dict[str, Any]]:
    """The lines of predictions.jsonl, each with an id."""
    file = RunFolder(run.path).predictions_file
    try:
        with io.TextIOWrapper(open_regular(file), encoding="utf-8", newline="\n") as lines:
            for line in filter(str.strip, lines):
                row = json.loads(line)
                hash(row["id"])
                yield row
    except FileNotFoundError:
        raise CheckpointError(
            CheckpointCode.NOT_FOUND, f"file not found: {file.name}", where=str(run.path), fix=_EVALUATE_AGAIN
        ) from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(run, error) from None


def sample_ids(run: FinishedRun) -> list[str]:
    """The ids of the samples (S,) that a run has predictions of."""
    return [row["id"] for row in _read_predictions(run)]


def read_outcome(run: FinishedRun, ids: Sequence[str]) -> Outcome:
    """Read the predictions for the samples `ids`, in this order.

    Raises:
        ConfigError: the run has predictions for other samples. CheckpointError: predictions are missing or damaged.
    """
    sample_of = {identity: sample for sample, identity in enumerate(ids)}
    seen_S = np.zeros(len(ids), dtype=np.bool_)

    def lines() -> Iterator[tuple[int, dict[str, Any]]]:
        for row in _read_predictions(run):
            sample = sample_of.get(row["id"], -1)
            if sample < 0 or seen_S[sample]:
                raise _other_samples(run)
            seen_S[sample] = True
            yield sample, row

    try:
        outcome: Outcome = run.task.read_outcome(lines(), len(ids), run.labels)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(run, error) from None
    if not seen_S.all():
        raise _other_samples(run)
    return outcome


def _damaged(run: FinishedRun, error: Exception) -> CheckpointError:
    what = f"predictions.jsonl is damaged: {error}"
    return CheckpointError(CheckpointCode.CONTENT_DAMAGED, what, where=str(run.path), fix=_EVALUATE_AGAIN)


def _other_samples(run: FinishedRun) -> ConfigError:
    return ConfigError(
        ConfigCode.RUNS_NOT_COMPARABLE,
        f"{run.path} has predictions for other samples",
        where=str(run.path),
        fix=_EVALUATE_AGAIN,
    )

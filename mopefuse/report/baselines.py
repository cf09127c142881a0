"""Simple baselines next to a run's own score: the majority class, and simpler methods that were run on the same data.

Nothing is trained here: other scores are read from the finished runs in the same folder, and in the same study.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

from mopefuse.config.encoder_sides import specs
from mopefuse.config.schema import RunConfig
from mopefuse.data.base import DataSet
from mopefuse.errors import MopefuseError
from mopefuse.runs.folder import RunFolder
from mopefuse.studies.compare import has_result, study_facts
from mopefuse.studies.study_file import STUDY_FILE
from mopefuse.tasks.base import get_task

SIMPLER = ("linear", "mlp", "late-concat", "main-only", "comp-only")
"""Methods that a fusion method has to beat."""
_MAX_FOLDERS = 200  # maximum number of folders next to a run that are examined
_MAX_ABOVE = 3  # number of folders above a run that may be the folder of its study


@dataclass(frozen=True)
class Baseline:
    """Runs of a simpler method on the data of a run.

    Args:
        what: the method and its encoders. scores: score of each run, in 0..1. folders: folders of these runs.
    """

    what: str
    scores: tuple[float, ...]
    folders: tuple[str, ...]

    @property
    def score(self) -> float:
        """The mean over the runs."""
        return fmean(self.scores)


def find_baselines(run: RunFolder, split: str, metric: str) -> tuple[Baseline, ...]:
    """Simpler methods whose finished runs, on the same split, are next to a run or belong to its study; the best first."""
    mine, found = run.manifest(), dict[str, list[tuple[float, str]]]()
    for folder in dict.fromkeys((*_beside(run.path), *_of_study(run.path))):
        try:
            other = RunFolder(folder)
            if folder == run.path.resolve() or not other.exists() or not other.metrics_file.is_file():
                continue
            config, theirs = other.config(), other.manifest()
            if config.method not in SIMPLER or theirs["data"].get(split) != mine["data"].get(split):
                continue
            score = (other.result().get("metrics") or {}).get(split, {}).get(metric)
            if theirs["labels"] == mine["labels"] and isinstance(score, int | float):
                found.setdefault(_what(config), []).append((float(score), str(folder)))
        except (MopefuseError, OSError, KeyError, AttributeError):
            continue  # a damaged run next to this one must not prevent the page
    baselines = [Baseline(what, *(tuple(each) for each in zip(*runs, strict=True))) for what, runs in found.items()]
    return tuple(sorted(baselines, key=lambda one: -one.score))


def _beside(run: Path) -> Iterator[Path]:
    try:
        yield from islice((path for path in sorted(run.resolve().parent.iterdir()) if path.is_dir()), _MAX_FOLDERS)
    except OSError:
        return


def _of_study(run: Path) -> Iterator[Path]:
    for folder in run.resolve().parents[:_MAX_ABOVE]:
        if (folder / STUDY_FILE).is_file():
            try:
                cells = study_facts(folder)["cells"]
            except MopefuseError:
                return
            yield from ((folder / cell["run"]).resolve() for cell in cells if has_result(folder, cell))
            return


def _what(config: RunConfig) -> str:
    named = specs(config)
    if config.method == "linear":
        features = {"main": "main", "comp": "comp"}.get(config.linear.features)
        used = [spec for side, spec in named.items() if features is None or side.startswith(features)]
        return f"{get_task(config.data.task or 'single-label').linear_name} on {' and '.join(used)}"
    return f"{config.method} with {' and '.join(spec for spec in named.values() if spec)}"


def constant_score(data: DataSet, split: str, metric: str) -> tuple[str, float] | None:
    """The best prediction that is the same for all rows, in words, and its score on a split.

    None if the training rows are not there.
    """
    counts = data.sparse_targets("train").label_counts() if "train" in data.splits else {}
    if not counts:
        return None
    words, outputs_N = data.task.constant(counts, data.labels)
    outputs_SN = outputs_N.expand(len(data.splits[split].rows), -1)
    return words, data.task.compute(outputs_SN, data.targets(split))[metric]


def command_for(config: RunConfig) -> str:
    """The command that measures the simplest baseline on the data and with the encoders of a run."""
    comp = config.comp if isinstance(config.comp, str) else (config.comp or ("",))[0]
    rival = get_task(config.data.task or "single-label").rival
    parts = ["mopefuse", "train", "--method", rival, "--main", config.main, "--comp", comp]
    return shlex.join([*parts, "--data", str(config.data.path or "DATA"), "--out", "RUN"])

"""Print the results of ``mopefuse bench`` as tables, or convert them for ``--json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mopefuse.bench.pair import Line, PairBench
from mopefuse.bench.scale import Point
from mopefuse.bench.timing import Times
from mopefuse.cli._render import count, err, size, table


def show_pair(pair: PairBench) -> None:
    """Print a table on stdout, and on stderr why values are missing."""
    weights = len({line.encoders for line in pair.lines if line.encoders}) > 1
    columns = ["variant", "step", "samples/s", "x floor", "prediction", "x floor", "memory", "trained", "artifact"]
    columns += ["encoders"] if weights else []
    rows = [
        [
            line.name, _time(line.train), _speed(line.train, pair.batch), _ratio(pair, line), _time(line.infer),
            _ratio(pair, line, infer=True), size(line.memory) if line.memory is not None else "-",
            count(line.trainable) if line.trainable else "-", size(line.artefact) if line.artefact else "-",
            *([size(line.encoders) if line.encoders else "-"] if weights else []),
        ]
        for line in pair.lines
    ]  # fmt: skip
    facts = f"batch {pair.batch}, {pair.text_length} tokens, {pair.precision} on {pair.device}, weights {size(pair.weights)}"
    table(f"{pair.config.main} with {pair.config.comp}; {facts}", columns, rows)
    if pair.disturbed_share > 0.5:
        what = f"in {100 * pair.disturbed_share:.0f} % of the repetitions, other processes used the CPU"
        err().print(f"{what}; measure again before you rely on these numbers", style="yellow")
    for line in pair.lines:
        if line.why_not:
            err().print(f"{line.name}: {line.why_not}", markup=False)


def pair_as_dict(pair: PairBench) -> dict[str, Any]:
    """All numbers, in seconds and bytes."""
    return {
        "main": pair.config.main,
        "comp": pair.config.comp,
        "batch": pair.batch,
        "text_length": pair.text_length,
        "device": pair.device,
        "precision": pair.precision,
        "versions": dict(pair.versions),
        "weights_bytes": pair.weights,
        "disturbed": pair.disturbed_share,
        "rows": [
            {
                "name": line.name,
                "train": None if line.train is None else times_as_dict(line.train),
                "infer": None if line.infer is None else times_as_dict(line.infer),
                "samples_per_second": None if line.train is None else pair.batch / line.train.median,
                "train_of_floor": pair.ratio(line.name),
                "infer_of_floor": pair.ratio(line.name, infer=True),
                "memory_bytes": line.memory,
                "trainable": line.trainable,
                "artefact_bytes": line.artefact,
                "encoder_bytes": line.encoders,
                "artefact_of_weights": line.artefact / pair.weights,
                "why_not": line.why_not or None,
            }
            for line in pair.lines
        ],
        "ratios": {name: value for name, value in pair.ratios().items() if value is not None},
    }


def times_as_dict(times: Times) -> dict[str, Any]:
    """Median and spread of the valid repetitions, and every repetition with the fraction of its CPU time that was stolen."""
    every = {"seconds": list(times.by_round.values()), "stolen": [round(fraction, 4) for fraction in times.stolen.values()]}
    return {"median": times.median, "spread": times.spread, **every}


def show_times(title: str, found: Mapping[str, Times], per_second: Mapping[str, str] | None = None) -> None:
    """Print a row for each measurement; with `per_second`, also that column."""
    columns = ["", "time", *(["per second"] if per_second else [])]
    table(title, columns, [[name, _time(times), *([per_second[name]] if per_second else [])] for name, times in found.items()])


def show_scale(title: str, found: Sequence[Point]) -> None:
    """Print a row for each setting."""
    rows = [
        [f"{point.axis} {point.value}", _time(point.step), _time(point.floor), f"{point.ratio:.3f}"] for point in found
    ]
    table(title, ["", "step", "floor", "x floor"], rows)


def point_as_dict(point: Point) -> dict[str, Any]:
    """A setting and its times, as plain values."""
    times = {"step": times_as_dict(point.step), "floor": times_as_dict(point.floor)}
    return {"axis": point.axis, "value": point.value, **times, "of_floor": point.ratio}


def _time(times: Times | None) -> str:
    return f"{1000 * times.median:.1f} ms ± {100 * times.spread:.0f} %" if times else "-"


def _speed(times: Times | None, batch: int) -> str:
    return f"{batch / times.median:.3g}" if times else "-"


def _ratio(pair: PairBench, line: Line, *, infer: bool = False) -> str:
    ratio = pair.ratio(line.name, infer=infer)
    return "-" if ratio is None else f"{ratio:.3f}"

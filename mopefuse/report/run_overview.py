"""The top of a run's page: its main numbers, the task, and whether the model uses each modality."""

from __future__ import annotations

from shlex import quote
from urllib.parse import quote as url_quote

from mopefuse.config.encoder_sides import is_comp
from mopefuse.core.formatting import percent
from mopefuse.metrics.names import in_per_cent, write_metric, write_number
from mopefuse.report.bars import bars
from mopefuse.report.chart import shorten
from mopefuse.report.pages import Section, fragment
from mopefuse.report.run_data import RunFacts
from mopefuse.report.settings import changed_settings

_TRY_AT = "http://127.0.0.1:8000/?model="  # where `mopefuse serve` listens by default
_LABELS = 120  # characters of the list of labels
_LISTED = frozenset({"main", "comp", "method", "data.path"})  # settings with a separate line
_CONDITIONS = {
    "as is": "as is",
    "shuffled": "another sample's {}",
    "blank": "no {}",
    "static": "without static prompts",
    "dynamic": "without dynamic prompts",
    "mapped": "without mapped prompts",
    "film": "without FiLM",
}


def tiles(facts: RunFacts) -> list[tuple[str, str]]:
    """The numbers on top of the page."""
    found = [
        (f"{facts.split} {name.replace('_', ' ')}", write_metric(name, facts.metrics[name]))
        for name in (*facts.task.metrics, "auroc", "average_precision")
        if name != "f1_samples" and name in facts.metrics
    ]
    if facts.task.is_classification:
        found.append((f"{facts.split} calibration error", percent(facts.calibration.error)))
    parameters = facts.result.get("parameters")
    if parameters:
        share = parameters["trainable"] / max(1, parameters["total"])
        found.append((f"trained parameters, {percent(share)} of all", f"{parameters['trainable']:,}"))
    return found


def task(facts: RunFacts) -> Section:
    """Data, labels, encoders, counts, and the settings that were chosen."""
    counts = facts.result.get("rows") or {name: len(split.rows) for name, split in facts.data.splits.items()}
    rows: list[tuple[str, str]] = [
        ("data", str(facts.data.root)),
        ("rows", ", ".join(f"{name} {count:,}" for name, count in counts.items())),
        ("task", str(facts.task)),
        ("labels", f"{facts.task.describe(facts.labels)}: {shorten(', '.join(facts.labels), _LABELS)}"),
        ("method", facts.config.method),
    ]
    for side, encoder in facts.manifest["encoders"].items():
        about = f"{encoder.get('spec', '')} ({encoder.get('modality', '')}, {encoder.get('layers', '?')} layers)"
        rows.append(("complementary encoder" if is_comp(side) else f"{side} encoder", about))
    if facts.path:
        address = _TRY_AT + url_quote(facts.name, safe="")
        rows.append(("try it", fragment("try_it", f"mopefuse serve {quote(facts.path)}", address)))
    body = fragment("rows", rows) + fragment("settings", changed_settings(facts.config, facts.derive, hidden=_LISTED))
    return Section("task", "The task", body, half=True)


def audit(facts: RunFacts) -> Section | None:
    """Whether the model uses each modality."""
    if facts.audit is None:
        return None
    found, name = facts.audit, facts.main_metric
    rows = found["conditions"]
    lines = [
        {
            "name": _CONDITIONS.get(row["name"], f"without {row['name']}").format(row["modality"]),
            "value": write_metric(name, row["metrics"][name]),
            "lost": write_number(name, row["lost"]),
            "interval": [write_number(name, row[end], signed=True) for end in ("low", "high")],
            "changed": row["changed"],
            "first": row["name"] == "as is",
        }
        for row in rows
    ]
    whole = found["samples"] == found["total"]
    samples = f"all {found['samples']:,}" if whole else f"{found['samples']:,} of {found['total']:,}"
    chart = bars(
        "audit",
        f"{name} without an input or a prompt",
        [(line["name"], row["metrics"][name]) for line, row in zip(lines, rows, strict=True)],
        across=name,
        shown=lambda value: write_metric(name, value),
        against=rows[0]["metrics"][name],
    )
    titles = {"score": facts.task.metric_title, "lost": "points lost" if in_per_cent(name) else "lost"}
    body = fragment("audit", found, lines, chart, samples=samples, split=facts.split, metric=name, **titles)
    inputs = " and the ".join(filter(None, (found["modality"], found["main"])))
    return Section("audit", f"Does the model use the {inputs}?", body, (chart,))

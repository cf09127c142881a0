"""Print a data check: splits, problems by kind, labels with their warnings, texts, and a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mopefuse.cli._render import out, size, table
from mopefuse.core.formatting import several, visible
from mopefuse.data.check import Report
from mopefuse.data.columns import has_labels
from mopefuse.data.findings import Finding
from mopefuse.modalities.base import get_modality
from mopefuse.modalities.masks import MASKS
from mopefuse.report.data_check import check_page, describe_count, describe_truncation
from mopefuse.report.pages import write

_MAX_LABELS = 30
_MAX_OF_A_KIND = 5  # problems that are listed one by one
_ABOUT_LABELS = ("absent-label", "joined-labels", "label-variants", "misspelt-label", "numeric-labels", "rare-labels")
_COLOURS = {"error": "red", "warning": "yellow"}


def write_page(report: Report, folder: Path, page: Path) -> None:
    """Write the page of a check."""
    columns, splits = _columns(report), _splits(report)
    write(page, check_page(report, name=str(folder), summary=_summary(report), columns=columns, splits=splits))


def show(report: Report, folder: Path, page: Path | None) -> None:
    """Print a report."""
    console = out()
    table(str(folder), ["split", *_columns(report)], _splits(report))
    if report.trained:
        console.print()
        rows = [[name, *(f"{count:,}" for count in facts.values())] for name, facts in report.trained.items()]
        table("as used in training, after splitting and subsampling", ["split", "rows", "labels"], rows)
    groups = report.by_kind()
    if groups:
        console.print()
        rows = [
            [kind, found[0].severity, f"{len(found):,}", visible(found[0].place), visible(report.fix(kind))]
            for kind, found in groups.items()
        ]
        table("problems", ["kind", "severity", "count", "first", "what to do"], rows, left=(0, 1, 3, 4))
    _list(report, {kind: found for kind, found in groups.items() if kind not in _ABOUT_LABELS})
    console.print()
    if report.numbers:
        _show_numbers(report)
    elif has_labels(report.config):
        _show_labels(report)
    about_labels = {kind: found for kind, found in groups.items() if kind in _ABOUT_LABELS}
    _list(report, about_labels, "suspicious labels:")
    console.print()
    _show_texts(report)
    console.print()
    console.print(_summary(report), markup=False)
    if page is not None:
        console.print(f"page: {page}", markup=False)
    console.print(f"{several(report.errors, 'error')}, {several(report.warnings, 'warning')}", markup=False)


def _list(report: Report, groups: Mapping[str, Sequence[Finding]], heading: str = "") -> None:
    """Print the first findings of each kind, one per line, with what to do if that is not the same for all of the kind."""
    console = out()
    if groups:
        console.print()
    if groups and heading:
        console.print(heading, style="bold", markup=False)
    for kind, found in groups.items():
        common = report.fix(kind)
        for finding in found[:_MAX_OF_A_KIND]:
            own = f" ({visible(finding.fix)})" if finding.fix != common else ""
            text = f"{finding.severity}: {visible(finding.place)}: {visible(finding.message)}{own}"
            console.print(text, style=_COLOURS[finding.severity], markup=False)
        if len(found) > _MAX_OF_A_KIND:
            rest = len(found) - _MAX_OF_A_KIND
            console.print(f"         and {rest:,} more of {kind}; --html FILE or --json lists them", markup=False)


def _files(report: Report) -> list[str]:
    masks = [MASKS.plural] if report.task == "segmentation" else []
    return [get_modality(name).plural for name in report.modalities if get_modality(name).is_file] + masks


def _columns(report: Report) -> list[str]:
    return ["rows", "bad rows", *_files(report), "labels", "pixels", "size"]


def _splits(report: Report) -> list[list[str]]:
    rows = []
    for name, facts in report.splits.items():
        sides = [" x ".join(map(str, facts["pixels"][which])) for which in ("smallest", "largest")] if facts["pixels"] else []
        pixels = " to ".join(dict.fromkeys(sides)) or "-"
        counts = [f"{facts[key]:,}" for key in ("rows", "bad_rows", *_files(report), "labels")]
        rows.append([name, *counts, pixels, size(facts["bytes"])])
    return rows


def _show_labels(report: Report) -> None:
    names, counts = list(report.splits), list(report.balance.items())
    shown: Sequence[tuple[str, dict[str, int]]] = counts
    if len(counts) > _MAX_LABELS:
        half = _MAX_LABELS // 2
        shown = [*counts[:half], *counts[-half:]]
    rows = [[visible(label), *(f"{count[name]:,}" for name in names)] for label, count in shown]
    noun = "classes, and the masks that have them" if report.task == "segmentation" else "labels"
    kind = ", several per row" if report.task == "multi-label" else ""
    part = f", the {_MAX_LABELS // 2} most frequent and rarest" if len(counts) > _MAX_LABELS else ""
    table(f"{len(counts):,} {noun}{kind}{part}", ["label", *names], rows)
    found = report.extremes
    if found["ratio"] and not (report.task == "segmentation" and found["ratio"] == 1):
        most, least = (f"{visible(found[which]['label'])} ({found[which]['rows']:,})" for which in ("most_frequent", "rarest"))
        text = f"{found['of']}: most frequent {most}, rarest {least}, ratio {found['ratio']:.3g}"
        out().print(text, markup=False)


def _show_numbers(report: Report) -> None:
    found = [(split, target, numbers) for split, each in report.numbers.items() for target, numbers in each.items()]
    columns = [name.replace("_", " ") for name in found[0][2]]
    rows = [[split, visible(target), *(f"{value:,.5g}" for value in numbers.values())] for split, target, numbers in found]
    table("labels are numbers (task regression)", ["split", "target", *columns], rows, left=(0, 1))


def _show_texts(report: Report) -> None:
    facts = report.texts.as_dict()
    lengths = [
        [unit, *(f"{facts[unit][which]:,}" for which in ("median", "p95", "longest"))]
        for unit in ("tokens", "words", "characters")
        if unit in facts
    ]
    table(f"texts, {describe_count(facts)}", ["length in", "median", "95 % up to", "longest"], lengths)
    if lengths:
        out().print(describe_truncation(facts), markup=False)


def _summary(report: Report) -> str:
    """How many files were read, and how fast."""
    if report.from_cache:
        return f"all files were in the cache, read in {report.seconds:.2f} s; --fresh reads every file again"
    what = " and ".join(_files(report)) or "files"
    rate = f" ({report.files_per_second:,.0f} {what}/s)" if report.files_per_second else ""
    total = sum(len(each.names) for index in report.indexes.values() for each in index.files.values())
    part = f"{report.files_read:,} of {total:,}" if report.files_read < total else f"{report.files_read:,}"
    return f"{part} {what} in {report.seconds:.2f} s{rate}"

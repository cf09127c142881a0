"""The page of a data check: counts, problems by kind, labels, lengths, sizes, and examples of the worst problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from mopefuse.data.check import Report
from mopefuse.data.findings import Finding
from mopefuse.data.summary import TOKENS_PER_WORD
from mopefuse.modalities.base import get_modality
from mopefuse.report.bars import histogram, sizes
from mopefuse.report.chart import Chart, require_charts
from mopefuse.report.data_pictures import Picture, first_bytes
from mopefuse.report.pages import dump, render
from mopefuse.report.row_values import picture_of, text_of

_MAX_OFFENDERS = 60
_MAX_LISTED = 200  # maximum number of findings per kind
_MAX_LABELS = 30  # before the rest is folded
_MAX_FOLDED = 2000
_LATER = ("val", "test")
_TEXT = 600  # characters of a text next to a picture
_DAMAGED = ("truncated-image", "empty-image", "wrong-format-image", "unreadable-image")
_SHOWN = (  # kinds for which it helps to see the image
    *_DAMAGED,
    "huge-image",
    "leaked-image",
    "leaked-text",
    "tiny-image",
    "strip-image",
    "animated-image",
    "slow-image",
)


@dataclass(frozen=True)
class Example:
    """A finding with its pictures; two where two rows have something in common."""

    kind: str
    severity: str
    message: str
    place: str
    pictures: tuple[Picture, ...]  # without images that cannot be decoded
    bytes: tuple[tuple[str, str], ...] = ()  # the beginning of a file, in hex and as text


def check_page(report: Report, *, name: str, summary: str, columns: Sequence[str], splits: Sequence[Sequence[str]]) -> str:
    """The page, as HTML.

    Args:
        name: name of the data set. summary: summary of the check.
        columns, splits: a table with a row for each split, its name first.

    Raises:
        PackageError: the extra `report` is not installed.
    """
    require_charts("the page of a data check")
    lengths, images = _lengths(report), _sizes(report)
    ratio = report.extremes["ratio"]
    return render(
        "check.html",
        [chart for chart in (lengths, images) if chart is not None],
        data=name,
        summary=summary,
        errors=report.errors,
        warnings=report.warnings,
        tiles=_tiles(report),
        columns=columns,
        splits=splits,
        kinds=_kinds(report),
        balance=_balance(report),
        numbers=[
            (split, target, found.values()) for split, each in report.numbers.items() for target, found in each.items()
        ],
        later=[split for split in _LATER if split in report.splits],
        several=report.task == "multi-label",
        ratio=f"{ratio:.3g}" if ratio else "",
        texts=_texts(report),
        lengths=lengths,
        sizes=images,
        examples=[_example(report, finding) for finding in _worst(report)],
    )


def _kinds(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "name": kind,
            "severity": found[0].severity,
            "count": len(found),
            "first": found[0].place,
            "fix": report.fix(kind),
            "listed": found[:_MAX_LISTED],
        }
        for kind, found in report.by_kind().items()
    ]


def _lengths(report: Report) -> Chart | None:
    values = report.texts.tokens_T or report.texts.words_T
    unit, limit = _unit(report), report.texts.limit
    return histogram("lengths", "text lengths", values, unit=unit, what="measured text", limit=limit)


def _sizes(report: Report) -> Chart | None:
    files = (each for index in report.indexes.values() for each in index.files.values())
    found = ((look.width, look.height) for each in files for look in each.infos if look.width)
    return sizes("sizes", "how large images are", found)


def _tiles(report: Report) -> list[tuple[str, str]]:
    files = [get_modality(name).plural for name in report.modalities if get_modality(name).is_file]
    names = ("rows", "bad_rows", *files, "bytes")
    totals = {name: sum(facts[name] for facts in report.splits.values()) for name in names}
    return [
        ("rows", f"{totals['rows']:,}"),
        ("bad rows", f"{totals['bad_rows']:,}"),
        *((name, f"{totals[name]:,}") for name in files),
        *([] if report.numbers else [("labels", f"{len(report.balance):,}")]),
        *[(f"MB of {' and '.join(files)}", f"{totals['bytes'] / 1e6:,.1f}")][: len(files)],
    ]


def _unit(report: Report) -> str:
    return "tokens" if report.texts.tokens_T else "words"


def describe_count(facts: Mapping[str, Any]) -> str:
    """Describe how many texts were measured; `facts` are those of `Texts.as_dict`."""
    if facts["sampled"]:
        return f"an evenly spaced sample of {facts['measured']:,} of {facts['total']:,}"
    return f"all {facts['measured']:,}"


def describe_truncation(facts: Mapping[str, Any]) -> str:
    """Describe what an encoder truncates, or estimate it; `facts` are those of `Texts.as_dict`, some texts measured."""
    if "cut" in facts:
        cut = f"{facts['cut']['texts']:,} of the measured texts ({100 * facts['cut']['share']:.1f} %)"
        return f"{facts['encoder']} reads {facts['limit']:,} tokens and truncates {cut}"
    over = ", ".join(f"{100 * share:.1f} % over {limit}" for limit, share in facts["estimate"]["share_over"].items())
    return f"estimated at {TOKENS_PER_WORD} tokens per word: {over} tokens; --encoder SPEC counts them"


def _texts(report: Report) -> str:
    facts = report.texts.as_dict()
    if not facts["measured"]:
        return "none"
    unit = _unit(report)
    lengths = facts[unit]
    measured = f"median {lengths['median']:,}, 95 % up to {lengths['p95']:,}, longest {lengths['longest']:,} {unit}"
    return f"{describe_count(facts)}: {measured}; {describe_truncation(facts)}"


def _balance(report: Report) -> list[list[dict[str, Any]]]:
    """Labels with their fraction of each split; labels beyond a limit are in a second group."""
    totals = {split: sum(counts[split] for counts in report.balance.values()) for split in report.splits}
    shares = {
        label: {split: counts[split] / max(1, totals[split]) for split in totals} for label, counts in report.balance.items()
    }
    highest = max((share for by_split in shares.values() for share in by_split.values()), default=0) or 1
    labels = [
        {
            "name": label,
            "bars": [(split, round(100 * share / highest, 2)) for split, share in shares[label].items()],
            "rows": " / ".join(f"{number:,}" for number in counts.values()),
        }
        for label, counts in report.balance.items()
    ]
    groups = [labels[:_MAX_LABELS], labels[_MAX_LABELS:_MAX_FOLDED]]
    return [group for group in groups if group]


# -- the worst


def _worst(report: Report) -> list[Finding]:
    """Findings to show, alternating between kinds, so that a frequent kind does not hide the others."""
    groups = [found for kind, found in report.by_kind().items() if kind in _SHOWN]
    turns = [finding for turn in zip_longest(*groups) for finding in turn if finding is not None]
    chosen = set(map(id, turns[:_MAX_OFFENDERS]))
    return [finding for finding in report.findings if id(finding) in chosen]


def _example(report: Report, finding: Finding) -> Example:
    pictures = []
    if finding.kind not in (*_DAMAGED, "huge-image"):
        pictures.append(_picture_of(report, finding.split, finding.row))
    if finding.twin >= 0:
        pictures.append(_picture_of(report, "train", finding.twin))
    head = first_bytes(report.files, finding.image) if finding.kind in _DAMAGED else b""
    return Example(finding.kind, finding.severity, finding.message, finding.place, tuple(pictures), tuple(dump(head)))


def _picture_of(report: Report, split: str, number: int) -> Picture:
    row = report.row(split, number)
    place, text = f"{report.indexes[split].file}:{row.line}, id {row.id}", text_of(row)[:_TEXT]
    return picture_of(row, report.files, max_pixels=report.config.max_pixels, place=place, text=text)

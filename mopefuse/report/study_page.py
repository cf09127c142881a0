"""The page of a study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from markupsafe import Markup

from mopefuse.config.schema import RunConfig
from mopefuse.config.setting_paths import flatten
from mopefuse.metrics.names import write_metric
from mopefuse.prompts.stack import fill_prompt_lengths
from mopefuse.report import study_charts
from mopefuse.report.comparison import cells, notes
from mopefuse.report.pages import Section, fragment, sections_page
from mopefuse.report.settings import changed_settings, format_setting
from mopefuse.report.study_data import StudyFacts
from mopefuse.runs.folder import RunFolder
from mopefuse.studies.compare import Comparison
from mopefuse.training.optimizer import with_learning_rates

_OF_ENCODERS = frozenset({"prompts.init", "pmf.bottleneck", "tune"})  # filled in from encoders, which are not loaded here


def sections(facts: StudyFacts) -> list[Section]:
    """Everything on a study, in the order of the page."""
    comparison = facts.comparison
    found = [_table(comparison), *study_charts.sections(facts, comparison)] if comparison else []
    return [*found, _missing(facts), _settings(facts)]


def study_page(facts: StudyFacts, parts: list[Section]) -> str:
    """The page, as HTML.

    Args:
        parts: from `sections`.
    """
    labels = {cell["label"] for cell in facts.cells}
    summary = f"A study of {_number(len(labels), 'row')} and {_number(len(facts.cells), 'run')}"
    return sections_page(facts.name, summary, _tiles(facts), parts, pill="study", notes=remarks(facts))


def remarks(facts: StudyFacts) -> list[str]:
    """What a reader must know first."""
    found = []
    if facts.unfinished:
        failed = sum(len(group.seeds) for group in facts.missing if group.state == "failed")
        why = f", of which {failed} failed" if failed else ""
        found.append(
            f"This study is not finished: {facts.unfinished} of {_number(len(facts.cells), 'run')} have no result{why}. "
            "The table covers finished runs; what is missing, and why, is listed below."
        )
    if facts.comparison is None:
        return [*found, "No run is finished, so there is nothing to compare yet."]
    rows = facts.comparison.rows
    if len({len(row.runs) for row in rows}) > 1:
        found.append("Rows have different numbers of seeds; see column n.")
    if all(len(row.runs) == 1 for row in rows):
        found.append("Each row is a single run, so the variation between seeds is unknown.")
    return found + list(facts.comparison.notices)


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _tiles(facts: StudyFacts) -> list[tuple[str, str]]:
    done = len(facts.cells) - facts.unfinished
    found = [("runs with a result", f"{done:,} of {len(facts.cells):,}")]
    if facts.comparison is None:
        return found
    comparison = facts.comparison
    best = [row for row in comparison.rows if row.label in comparison.best("test", comparison.metric)]
    if best:
        which = "best test" if comparison.chosen is None else "test"
        name = f"{which} {comparison.metric.replace('_', ' ')}, of {best[0].label}"
        if comparison.chosen is not None:
            name += ", selected on validation"
        found.insert(0, (name, write_metric(comparison.metric, facts.score(best[0]).mean)))
        found.append((f"trained parameters of {'the best' if comparison.chosen is None else 'that'}", f"{best[0].trainable:,}"))
    return [*found, ("test samples", f"{comparison.samples:,}")]


def _table(comparison: Comparison) -> Section:
    columns, lines = cells(comparison, ("test",), lambda text: Markup("<b>{}</b>").format(text))
    below = notes(replace(comparison, notices=()))
    bold = "the best of a column" if comparison.chosen is None else "the trial selected on validation"
    below[0] = f"Bold marks {bold}. {below[0]}"
    return Section("comparison", "Comparison", fragment("table", columns, lines, notes=below))


def _missing(facts: StudyFacts) -> Section:
    if not facts.unfinished:
        text = Markup("<p>Nothing is missing: all {} have a result.</p>").format(_number(len(facts.cells), "run"))
        return Section("missing", "What is missing", text)
    lines = [(group.label, ", ".join(map(str, group.seeds)), group.state, group.why, group.fix) for group in facts.missing]
    return Section("missing", "What is missing", fragment("table", ["row", "seeds", "state", "why", "what to do"], lines, 5))


def _settings(facts: StudyFacts) -> Section:
    """The settings that all rows share, and those that each row changes."""
    seeds = dict.fromkeys(cell.get("seed") for cell in facts.cells)
    rows = [("folder", str(facts.folder)), ("seeds", ", ".join(map(str, seeds)))]
    rows.append(("baseline", str(facts.study.get("baseline") or "none")))
    if facts.comparison is not None:
        against = f", against {facts.comparison.against}" if facts.comparison.against else ""
        rows += [("compared", f"{facts.comparison.metric}{against}"), *_circumstances(facts.comparison)]
    rows.append(("written by", f"mopefuse {facts.study.get('mopefuse', 'of an unknown version')}"))
    return Section("settings", "Settings", fragment("rows", rows) + _common(facts) + _own(facts))


def _circumstances(comparison: Comparison) -> list[tuple[str, str]]:
    """Rows of data, machines and software, which may differ between runs."""
    results = [RunFolder(path).result() for row in comparison.rows for path in row.runs]
    counts = [", ".join(f"{split} {count:,}" for split, count in result["rows"].items()) for result in results]
    versions = [", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items()) for result in results]
    devices = [str(result.get("device", "")) for result in results]
    named = (("data", counts), ("device", devices), ("software", versions))
    return [(name, "; ".join(filter(None, dict.fromkeys(each)))) for name, each in named if any(each)]


def _common(facts: StudyFacts) -> Markup:
    """The chosen settings that all started rows share."""
    if not facts.started_rows:
        return Markup("")
    first, *others = (flatten(config.model_dump(mode="json")) for config, _ in facts.started_rows)
    shared = {path for path, value in first.items() if all(other.get(path, value) == value for other in others)}
    config, modality_of = facts.started_rows[0]
    chosen = changed_settings(config, lambda open_: _filled_in(open_, modality_of))
    found = [setting for setting in chosen if setting[0] in shared - {"seed", *_OF_ENCODERS}]
    return fragment("settings", found, "Settings of all rows that are not defaults")


def _filled_in(config: RunConfig, modality_of: Mapping[str, str]) -> RunConfig:
    """A configuration with the settings that follow from the modalities of its encoders filled in, as in a run."""
    if "main" in modality_of:
        config = config.model_copy(update={"prompts": fill_prompt_lengths(config.prompts, modality_of["main"])})
    tuned = list(modality_of) if config.tune == "full" else []
    fitted = config.method == "linear" or config.warm_start != "none"
    return with_learning_rates(config, modality_of, tuned, fitted=fitted)


def _own(facts: StudyFacts) -> Markup:
    """The settings that the study changes in each row."""
    each = {cell["label"]: cell.get("settings") or {} for cell in facts.cells}
    paths = list(dict.fromkeys(path for settings in each.values() for path in settings))
    if not paths:
        return Markup("")
    lines = [
        [label, *(format_setting(found[path]) if path in found else "" for path in paths)] for label, found in each.items()
    ]
    note = "An empty cell means the setting of all rows, or the default."
    table = fragment("table", ["row", *paths], lines, notes=[note])
    return Markup("<h3>What each row sets</h3>") + table

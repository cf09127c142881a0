"""Refuse or skip the bad rows of a split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import DataCode
from mopefuse.core.formatting import several
from mopefuse.data.base import Problem
from mopefuse.data.findings import KINDS, fix_of_missing, kind_of_row, lack_columns
from mopefuse.data.guess_columns import suggest_columns
from mopefuse.data.index import Index
from mopefuse.errors import DataError, data_error
from mopefuse.modalities.file_source import FileSource
from mopefuse.modalities.masks import NAME as MASK
from mopefuse.modalities.masks import any_png, file_kind

_MAX_LISTED = 20


def skip_bad_rows(index: Index, source: FileSource, root: Path, config: DataConfig, *, may_skip: bool) -> tuple[Problem, ...]:
    """Find the bad rows that may be skipped.

    Args:
        source: where the files are. root: the data folder, for messages.
        may_skip: whether the user can set `data.on_bad`, for messages.

    Raises:
        DataError: there are bad rows, and they may not be skipped or are too many.
        UnsafePathError: a path leads outside its root.
    """
    problems = index.problems()
    if not problems:
        return ()
    unsafe = [problem for problem in problems if problem.code.startswith("MF-SEC")]
    where, total = str(root / index.file), len(index.lines_S) + len(index.row_problems)
    for modality, files in index.files.items() if not unsafe else ():
        if files.all_missing():
            fix = fix_of_missing(modality, source, files)
            if modality == MASK and not any_png(files.names):
                what = f"labels are not paths of masks (PNG files), such as {files.names[0]:.60}"
                raise DataError(DataCode.FILE_NOT_FOUND, what, where=where, fix=fix)
            what = f"none of the {len(files.names):,} {file_kind(modality).plural} exist; first missing: {files.names[0]}"
            raise DataError(DataCode.FILE_NOT_FOUND, what, where=where, fix=fix)
    if config.on_bad == "skip" and not unsafe:
        if len(problems) <= config.max_bad_fraction * total:
            return tuple(problems)
        what = f"{len(problems)} of {total} rows are bad; at most a fraction of {config.max_bad_fraction:g} may be skipped"
        fix = f"correct them{_allow(len(problems), total, config) if may_skip else ''}"
        raise DataError(DataCode.TOO_MANY_BAD_ROWS, f"{what}: {_join(problems)}", where=where, fix=fix)
    shown = unsafe or problems
    first = shown[0]
    if len(problems) == 1 and first.file:
        skip = _allow(1, total, config, "--on-bad skip") if may_skip and not unsafe else ""
        raise data_error(first.code, first.what, where=first.where, fix=f"{first.fix}{skip}")
    code = first.code if len({problem.code for problem in shown}) == 1 else DataCode.BAD_ROW.text
    columns = suggest_columns(config) if may_skip and lack_columns(index) else ""
    fix = first.fix if unsafe else columns or f"{_common_fix(problems)}; mopefuse data check --json lists all"
    raise data_error(code, f"{several(len(shown), 'bad row')}: {_join(shown)}", where=where, fix=fix)


def _allow(bad: int, total: int, config: DataConfig, flag: str = "") -> str:
    """How to leave out some bad rows, with a flag and the fraction that must be allowed; empty if all are bad."""
    share = (100 * bad // total + 1) / 100  # more than enough, whatever the rounding
    more = f"--set data.max_bad_fraction={share:g}" if bad > config.max_bad_fraction * total else ""
    flags = " ".join(filter(None, (flag, more)))
    return f", or add {flags} to leave {'the row' if bad == 1 else 'them'} out" if share < 1 else ""


def _join(problems: Sequence[Problem]) -> str:
    """Join problems in one line; those with the same text are given once, with their number."""
    by_text: dict[str, list[Problem]] = {}
    for problem in problems:
        by_text.setdefault(problem.what, []).append(problem)
    shown = list(by_text.values())[:_MAX_LISTED]
    listed = [f"{same[0]}" + (f" (and {len(same) - 1:,} similar)" if len(same) > 1 else "") for same in shown]
    rest = len(problems) - sum(map(len, shown))
    return "; ".join([*listed, *([f"and {rest:,} more"] if rest else [])])


def _common_fix(problems: Sequence[Problem]) -> str:
    """The fix of all problems, if they have the same."""
    fixes = {problem.fix or KINDS[kind_of_row(problem.what)].fix for problem in problems}
    return fixes.pop() if len(fixes) == 1 else "correct or remove them"

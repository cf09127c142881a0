"""Write the tables of docs/results.md from the folders of studies and runs.

    python scripts/results_page.py FOLDER [--page docs/results.md]

A table stands between two comments, ``<!-- table: NAME -->`` and ``<!-- end -->``, and is made from FOLDER/NAME: a study, or a
folder of runs. Tables whose folder does not exist are left as they are. Runs that differ in their seed only are one row:
the metric as mean and sample standard deviation, the share of parameters that is trained, and minutes of training.
``<!-- routing: NAME -->`` has what the runs logged about their experts instead.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from statistics import mean

from mopefuse.metrics.names import write_number
from mopefuse.runs.folder import RunFolder
from mopefuse.studies.compare import Comparison, Row, Spread, compare
from mopefuse.studies.study_file import STUDY_FILE

TABLE = re.compile(r"(<!-- (table|routing): ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def mean_and_deviation(metric: str, spread: Spread) -> str:
    """Mean and standard deviation of a metric; a single value as it is."""
    mean = write_number(metric, spread.mean)
    return mean if spread.std is None else f"{mean} ± {write_number(metric, spread.std)}"


def cells(row: Row, metric: str, *, best: bool) -> list[str]:
    """The cells of a row of the table."""
    score = mean_and_deviation(metric, row.metrics["test"][metric])
    share = f"{100 * row.trainable / row.total:.2f} %"
    return [row.label, f"**{score}**" if best else score, str(len(row.seeds)), share, f"{row.seconds.mean / 60:.1f}"]


def results(comparison: Comparison) -> str:
    """Make the table of a comparison."""
    metric = comparison.metric
    best = comparison.best("test", metric)
    head = ["method", f"test {metric.replace('_', ' ')}", "runs", "trained", "minutes"]
    return markdown([head, *(cells(row, metric, best=row.label in best) for row in comparison.rows)])


def routing(comparison: Comparison) -> str:
    """Make the table of the experts' load at the last validation of training; rows without experts are left out."""
    rows = [["method", "entropy of the load", "unused experts"]]
    for row in comparison.rows:
        logs = [RunFolder(run).read_log() for run in row.runs]
        last = [next((line["routing"] for line in reversed(log) if line.get("routing")), None) for log in logs]
        found = [each for each in last if each is not None]
        if found:
            entropy, unused = (mean(each[name] for each in found) for name in ("entropy", "unused_share"))
            rows.append([row.label, f"{entropy:.2f}", f"{unused:.0%}"])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """Format rows, of which the first is the header."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def compared(folder: Path) -> Comparison:
    """Compare the runs of a study, or all finished runs in a folder."""
    if (folder / STUDY_FILE).is_file():
        return compare([folder], allow_unfinished=True)
    return compare([run for run in sorted(folder.iterdir()) if run.is_dir()])


def main() -> None:
    """Replace the tables of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the studies, each named like its table")
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    arguments = parser.parse_args()

    def table(found: re.Match[str]) -> str:
        folder, make = arguments.folder / found[3], {"table": results, "routing": routing}[found[2]]
        return f"{found[1]}{make(compared(folder))}{found[4]}" if folder.is_dir() else found[0]

    page = arguments.page.read_text(encoding="utf-8")
    arguments.page.write_text(TABLE.sub(table, page), encoding="utf-8")


if __name__ == "__main__":
    main()

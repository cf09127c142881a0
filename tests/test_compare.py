"""Comparisons: every number is recomputed here from the files of the runs, and runs that cannot be compared are refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, call, make_pairs

from mopefuse.errors import MopefuseError
from mopefuse.studies.compare import Row, Spread, compare

COUNTS = {"train": 12, "val": 6, "test": 40}


def train(data: Path, out: Path, *more: object) -> Path:
    done = call("train", *TINY, "--data", data, "--out", out, "--steps", "3", "--lr", "0.01", *more)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/full-0, full-1, full-2 and text-0, text-1; tests must not change them."""
    root = tmp_path_factory.mktemp("compare")
    data = make_pairs(root / "data", counts=COUNTS)
    for seed in (0, 1, 2):
        train(data, root / f"full-{seed}", "--seed", seed)
    for seed in (0, 1):
        train(data, root / f"text-{seed}", "--seed", seed, "--method", "comp-only")
    return root


def runs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != "data")


def stored(run: Path) -> Any:
    return json.loads((run / "metrics.json").read_text())


def test_runs_that_differ_only_in_their_seed_are_one_row(folder: Path) -> None:
    found = compare(runs(folder))
    assert [(row.label, row.seeds) for row in found.rows] == [("full", (0, 1, 2)), ("text", (0, 1))]
    assert found.rows[1].settings["method"] == "comp-only"
    assert "seed" not in found.rows[1].settings
    assert found.metric == "accuracy"


def test_every_number_matches_the_files_of_the_runs(folder: Path) -> None:
    for row in compare(runs(folder)).rows:
        results = [stored(path) for path in row.runs]
        for split in ("val", "test"):
            assert list(row.metrics[split]) == ["accuracy", "f1_macro"]
            for name, spread in row.metrics[split].items():
                values = [result["metrics"][split][name] for result in results]
                assert spread.values == tuple(values)
                assert spread.mean == pytest.approx(statistics.mean(values))
                assert spread.std == pytest.approx(statistics.stdev(values))
        assert (row.trainable, row.total) == tuple(results[0]["parameters"][key] for key in ("trainable", "total"))
        assert row.seconds.mean == pytest.approx(statistics.mean(result["seconds"] for result in results))
        assert row.peak_memory == max(result["peak_memory_bytes"] for result in results)


def test_the_difference_matches_the_means_and_the_predictions(folder: Path) -> None:
    found = compare(runs(folder), against="text")
    full, text = found.rows
    assert text.versus is None
    assert full.versus is not None
    assert full.versus.value == pytest.approx(full.metrics["test"]["accuracy"].mean - text.metrics["test"]["accuracy"].mean)
    lines = [json.loads(line) for line in (full.runs[0] / "predictions.jsonl").read_text().splitlines()]
    right = sum(line["label"] == line["true"] for line in lines) / len(lines)
    assert full.metrics["test"]["accuracy"].values[0] == pytest.approx(right)
    macro = compare(runs(folder), against="text", metric="f1_macro").rows[0].versus
    assert macro is not None
    assert macro.value == pytest.approx(full.metrics["test"]["f1_macro"].mean - text.metrics["test"]["f1_macro"].mean)


def test_the_order_of_predictions_does_not_matter(folder: Path, tmp_path: Path) -> None:
    for run in runs(folder):
        shutil.copytree(run, tmp_path / run.name)
    file = tmp_path / "text-1" / "predictions.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    a, b = (compare(runs(root), against="text").rows[0].versus for root in (folder, tmp_path))
    assert a == b


def test_a_row_may_be_named_by_one_of_its_runs(folder: Path) -> None:
    assert compare(runs(folder), against=str(folder / "text-1")).against == "text"


def test_a_single_run_has_no_deviation() -> None:
    assert Spread((0.5,)).std is None
    assert Spread((0.0, 1.0)).std == pytest.approx(0.5**0.5)


def test_multi_label_runs_are_compared_by_macro_f1(multi_pairs: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        train(multi_pairs, tmp_path / name, "--set", f"train.lr=0.0{1 + seed}")
    found = compare([tmp_path / "a", tmp_path / "b"], against="a")
    assert (found.metric, found.metrics) == ("f1_macro", ["f1_macro", "f1_micro", "f1_samples"])
    for metric in found.metrics:
        a, b = compare([tmp_path / "a", tmp_path / "b"], against="a", metric=metric).rows
        assert b.versus is not None
        assert b.versus.value == pytest.approx(b.metrics["test"][metric].mean - a.metrics["test"][metric].mean, abs=1e-9)


# -- refusals


def refused(*paths: Path, **more: Any) -> MopefuseError:
    with pytest.raises(MopefuseError) as error:
        compare(paths, **more)
    assert error.value.fix
    return error.value


def test_runs_tested_on_other_data_are_refused(folder: Path, tmp_path: Path) -> None:
    other = train(make_pairs(tmp_path / "data", counts=COUNTS | {"test": 39}), tmp_path / "other")
    error = refused(folder / "full-0", other)
    assert error.code == "MF-CFG-84"
    assert str(other) in error.what


def test_unfinished_runs_and_other_files_are_left_out_with_a_notice(folder: Path, tmp_path: Path) -> None:
    """Everything that `runs/*` may match: a run in progress, one that failed before it was a run, a file."""
    shutil.copytree(folder / "full-1", tmp_path / "half")
    (tmp_path / "half" / "metrics.json").unlink()
    failed = call("train", *TINY, "--data", tmp_path / "no data", "--out", tmp_path / "failed")
    assert (failed.returncode, (tmp_path / "failed").is_dir()) == (4, True)
    (tmp_path / "notes.txt").touch()
    paths = [folder / "full-0", *sorted(tmp_path.iterdir())]
    found = compare(paths)
    assert [row.runs for row in found.rows] == [(folder / "full-0",)]
    assert found.notices == (
        f"left out: {tmp_path / 'failed'} is not a run",
        f"left out: {tmp_path / 'notes.txt'} is not a run",
        f"left out: {tmp_path / 'half'} is not finished",
    )
    assert "half is not finished" in call("compare", *paths).stderr
    assert json.loads(call("compare", *paths, "--json").stdout)["notices"] == list(found.notices)


def test_comparing_only_unfinished_runs_is_an_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "full-1", tmp_path / "half")
    (tmp_path / "half" / "metrics.json").unlink()
    error = refused(tmp_path, tmp_path / "half")
    assert (error.code, error.what) == ("MF-CFG-83", f"not finished: {tmp_path / 'half'}")
    assert refused(tmp_path).code == "MF-CKPT-04"


def test_a_missing_path_is_refused(folder: Path, tmp_path: Path) -> None:
    assert refused(folder / "full-0", tmp_path / "nowhere").code == "MF-CKPT-04"


def test_a_repeated_run_counts_once_and_a_copy_is_left_out_with_a_notice(folder: Path, tmp_path: Path) -> None:
    assert compare([folder / "full-0", folder / "full-0"]).rows[0].seeds == (0,)
    shutil.copytree(folder / "full-0", copy := tmp_path / "copy")
    found = compare([folder / "full-0", copy, folder / "full-1"])
    assert [row.seeds for row in found.rows] == [(0, 1)]
    assert found.notices == (f"left out: {copy} has the same settings and seed as {folder / 'full-0'}",)


def test_a_swapped_run_and_one_from_scratch_are_two_rows(folder: Path, tmp_path: Path) -> None:
    new = tmp_path / "swapped"
    done = call("swap-encoder", folder / "full-0", "--comp", "tiny:text?pool=cls", "-o", new, "--epochs", "1")
    assert done.returncode == 0, done.stderr
    found = compare([folder / "full-0", *sorted(tmp_path.iterdir())])
    assert [row.label for row in found.rows] == ["full-0", "swapped", "swapped-scratch"]
    assert [row.settings["start"] for row in found.rows] == ["scratch", "a trained model", "scratch"]


def test_runs_with_different_labels_are_refused_with_that_reason(folder: Path, tmp_path: Path) -> None:
    data = make_pairs(tmp_path / "data", counts=COUNTS)
    for file in data.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({**row, "label": row["label"].upper()}) + "\n" for row in rows))
    assert "different labels" in refused(folder / "full-0", train(data, tmp_path / "other")).what


def test_unknown_rows_and_metrics_are_refused_with_a_suggestion(folder: Path) -> None:
    error = refused(*runs(folder), against="ful")
    assert (error.code, error.fix) == ("MF-CFG-85", "did you mean full?")
    error = refused(*runs(folder), metric="f1_micro")
    assert (error.code, error.fix) == ("MF-CFG-86", "did you mean f1_macro?")


DAMAGED = ("{", '{"label": "a"}', '{"id": "test-0"}', "[]", '{"id": "test-0", "label": "zzz", "true": "a"}')


@pytest.mark.parametrize("line", DAMAGED)
def test_damaged_predictions_are_refused(folder: Path, tmp_path: Path, line: str) -> None:
    for run in runs(folder):
        shutil.copytree(run, tmp_path / run.name)
    file = tmp_path / "full-1" / "predictions.jsonl"
    _, *rest = file.read_text().splitlines()
    file.write_text("\n".join([line, *rest]))
    assert refused(*runs(tmp_path), against="text").code == "MF-CKPT-03"
    for other in (rest, [*rest, rest[0]], [rest[0], *rest]):
        file.write_text("\n".join(other))
        assert refused(*runs(tmp_path), against="text").code == "MF-CFG-84", "one is missing, or occurs twice"
    file.unlink()
    assert refused(*runs(tmp_path), against="text").code == "MF-CKPT-04"


# -- formats


def test_markdown_has_the_best_in_bold(folder: Path) -> None:
    done = call("compare", *runs(folder), "--against", "text", "--format", "markdown", "--val")
    head, rule, full, text = [line for line in done.stdout.splitlines() if line.startswith("|")]
    columns = ["method", "n", "val accuracy", "val f1_macro", "accuracy", "f1_macro", "trainable", "share", "time", "memory"]
    assert head.strip("| ").split(" | ")[:-2] == columns
    assert rule.count("--") == head.count("|") - 1
    rows = compare(runs(folder)).rows
    best = max(rows, key=lambda row: row.metrics["test"]["accuracy"].mean)
    for line, row in ((full, rows[0]), (text, rows[1])):
        spread = row.metrics["test"]["accuracy"]
        assert spread.std is not None
        table = f"{100 * spread.mean:.1f} ± {100 * spread.std:.1f}"
        tie = spread.mean == best.metrics["test"]["accuracy"].mean
        assert line.split(" | ")[4] == (f"**{table}**" if tie else table)


def test_csv_has_every_number_in_full(folder: Path, tmp_path: Path) -> None:
    done = call("compare", *runs(folder), "--against", "text", "--format", "csv", "-o", tmp_path / "table.csv")
    assert (done.returncode, done.stdout) == (0, "")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    for line, row in zip(rows, compare(runs(folder), against="text").rows, strict=True):
        assert float(line["test_accuracy_mean"]) == row.metrics["test"]["accuracy"].mean
        assert float(line["test_f1_macro_std"]) == row.metrics["test"]["f1_macro"].std
        assert (line["difference"] or None) == (str(row.versus.value) if row.versus else None)


def test_json_has_every_seed(folder: Path) -> None:
    result = json.loads(call("compare", *runs(folder), "--against", "text", "--json").stdout)
    assert result == json.loads(call("compare", *runs(folder), "--against", "text", "--format", "json").stdout)
    assert result["rows"][0]["metrics"]["test"]["accuracy"]["values"] == [
        stored(path)["metrics"]["test"]["accuracy"] for path in runs(folder)[:3]
    ]
    assert result["rows"][0]["versus"]["p"] == compare(runs(folder), against="text").rows[0].versus.p


def test_latex_and_csv_escape_labels(folder: Path) -> None:
    from dataclasses import replace

    from mopefuse.cli._compare_display import as_csv, as_latex, as_markdown

    found = compare(runs(folder))
    rows: list[Row] = [replace(found.rows[0], label="=5 % & a_b|c<d"), found.rows[1]]
    notices = ("left out: x: two\nlines",)
    found = replace(found, rows=tuple(rows), notices=notices)
    latex = as_latex(found, ("test",))
    assert r"=5 \% \& a\_b$|$c$<$d & 3" in latex
    assert latex.splitlines()[-1] == "% left out: x: two lines"
    assert latex.count(r"\textbf{") >= 2
    assert all(line.count("&") - line.count(r"\&") == 7 for line in latex.splitlines() if line.endswith(r"\\"))
    against = replace(compare(runs(folder), against="text"), against="=5 %")
    assert "'=5 %" in as_csv(found, ("test",))
    assert ",=5 %," not in as_csv(against, ("test",))
    assert r"a_b\|c" in as_markdown(found, ("test",))


def test_the_table_is_plain_when_piped(folder: Path) -> None:
    done = call("compare", *runs(folder), "--against", "text")
    assert done.returncode == 0
    assert done.stdout.splitlines()[1].split()[:4] == ["method", "n", "accuracy", "f1_macro"]
    assert "paired bootstrap" in done.stderr


@pytest.mark.parametrize(
    ("more", "code"), [(("--format", "html"), "MF-CFG-88"), (("-o", f"{__file__}/table.md"), "MF-CFG-54")]
)
def test_unknown_formats_and_invalid_paths_are_refused(folder: Path, more: tuple[str, ...], code: str) -> None:
    done = call("compare", *runs(folder), *more)
    assert (done.returncode, code in done.stderr) == (3, True)


def test_if_runs_were_tested_on_different_data_the_largest_group_is_compared(folder: Path, tmp_path: Path) -> None:
    fewer = train(make_pairs(tmp_path / "fewer", counts=COUNTS | {"test": 39}), tmp_path / "runs" / "fewer")
    multi = train(make_pairs(tmp_path / "multi", multi=True, counts=COUNTS), tmp_path / "runs" / "multi")
    named = [fewer, folder / "full-0", multi, folder / "text-0"]
    done = call("compare", *named, "--json")
    found = json.loads(done.stdout)
    assert [row["label"] for row in found["rows"]] == ["full-0", "text-0"]
    first = folder / "full-0"
    assert found["notices"] == [
        f"left out: {fewer} was tested on different samples from {first}",
        f"left out: {multi} was tested on different samples from {first}",
    ]
    assert f"left out: {fewer} was tested on different samples" in call("compare", *named).stderr
    assert list(compare(named).notices) == found["notices"], "the command line gives the same result"
    twice = train(tmp_path / "fewer", tmp_path / "runs" / "twice", "--seed", "1")
    found = json.loads(call("compare", *named, twice, folder / "text-1", "--against", fewer, "--json").stdout)
    assert [run for row in found["rows"] for run in row["runs"]] == [str(fewer), str(twice)], "the baseline's group"


def test_runs_on_different_data_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    other = train(make_pairs(tmp_path / "data", counts=COUNTS | {"test": 39}), tmp_path / "other")
    done = call("compare", folder / "full-0", other)
    assert done.returncode == 3 and "MF-CFG-84" in done.stderr

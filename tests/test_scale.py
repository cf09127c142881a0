"""Many rows and many labels: nothing holds rows times labels, and results computed piece by piece are the same."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, call, ranks
from hypothesis import given
from hypothesis import strategies as st
from tasks_of import MULTI, SINGLE, task_of
from torch import Tensor

from mopefuse.config.schema import Data
from mopefuse.data.base import DataSet
from mopefuse.data.labels import Labels, Targets
from mopefuse.data.load import load_data
from mopefuse.errors import NumericError, ResourceError
from mopefuse.evaluation import logit_spool
from mopefuse.evaluation.logit_spool import Spool
from mopefuse.evaluation.outputs import BatchOutput
from mopefuse.evaluation.scoring import score
from mopefuse.evaluation.split import run_split
from mopefuse.metrics.thresholds import tuned_thresholds
from mopefuse.report import run_report as reporting
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.load import load_model
from mopefuse.tasks.classification import KEPT, MAX_LABELS

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_large_data.py"
MANY = 150  # labels; more than the number whose probabilities are all written


def make(out: Path, **shape: Any) -> Path:
    found = importlib.util.spec_from_file_location("make_large_data", SCRIPT)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    module.make(out, **shape)
    return out


# -- labels and targets

rows_of_labels = st.lists(st.lists(st.sampled_from("abcde"), max_size=4, unique=True).map(tuple), max_size=12)


@given(rows_of_labels, st.data())
def test_labels_are_a_sequence_with_the_labels_of_each_row(rows: list[tuple[str, ...]], draw: Any) -> None:
    labels = Labels.from_rows(rows)
    assert list(labels) == rows == [labels[number] for number in range(len(labels))]
    picked = draw.draw(st.lists(st.integers(0, len(rows) - 1))) if rows else []
    assert list(labels.take(np.array(picked, dtype=np.int64))) == [rows[number] for number in picked]
    assert list(labels[1:3]) == rows[1:3]
    assert labels.counts() == {name: sum(name in row for row in rows) for name in "abcde" if any(name in row for row in rows)}
    assert labels.first_rows() == {name: next(i for i, row in enumerate(rows) if name in row) for name in labels.counts()}
    assert labels.count_unlabelled() == rows.count(())


def test_labels_of_many_rows_keep_their_order() -> None:
    rows = [tuple(str(number)[: number % 4]) for number in range(9_000)]
    assert list(Labels.from_rows(rows)) == rows


@given(rows_of_labels.filter(len))
def test_targets_of_some_rows_or_labels_are_parts_of_the_dense_targets(rows: list[tuple[str, ...]]) -> None:
    known = "edcbaz"
    targets = Targets(Labels.from_rows(rows), known, MULTI)
    expected_SN = torch.tensor([[float(label in row) for label in known] for row in rows])
    assert targets.dense().equal(expected_SN)
    index_B = torch.tensor([len(rows) - 1, 0, 0])
    assert targets[index_B].equal(expected_SN[index_B])
    assert targets.columns(1, 4).equal(expected_SN[:, 1:4])
    assert targets.counts().tolist() == expected_SN.sum(dim=0).tolist()


def test_the_memory_of_targets_grows_with_the_labels_that_rows_have() -> None:
    """Dense targets of 200,000 rows and 1,000 labels would take 800 MB."""
    labels = Labels([str(n) for n in range(1_000)], np.arange(0, 400_001, 2), np.arange(400_000, dtype=np.int32) % 1_000)
    tracemalloc.start()
    targets = Targets(labels, labels.names, MULTI)
    assert targets[torch.arange(64)].sum() == 128
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


# -- metrics and predictions, batch by batch


@pytest.fixture(scope="module", params=[False, True], ids=["single", "multi"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = make(tmp_path_factory.mktemp("large") / "data", rows=600, labels=MANY, multi_label=request.param)
    return load_data(Data(path=str(folder)))


def logits_of(data: DataSet, split: str) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    targets = data.sparse_targets(split)
    towards_SN = torch.zeros(len(targets), MANY)
    for sample, label in enumerate(data.splits[split].labels):
        towards_SN[sample, [data.labels.index(name) for name in label][: sample % 3]] = 4
    return torch.randn(len(targets), MANY, generator=draw) + towards_SN - 2


def batches(logits_SN: Tensor, sizes: Sequence[int]) -> Iterator[BatchOutput]:
    for index_B in torch.arange(len(logits_SN)).split(list(sizes)):
        yield BatchOutput(index_B, logits_SN[index_B])


def test_metrics_of_batches_equal_those_of_the_whole_split(large: DataSet, tmp_path: Path) -> None:
    logits_SN, targets = logits_of(large, "train"), large.targets("train")
    sizes = [7, 1, 200, len(targets) - 208]
    multi = large.task == MULTI
    thresholds = [0.2 + 0.004 * label for label in range(MANY)] if multi else 0.5
    found = score(batches(logits_SN, sizes), large, "train", thresholds, predictions=tmp_path / "p.jsonl")
    assert found.metrics == task_of(multi).compute(logits_SN, targets, thresholds=thresholds)
    assert found.per_label == large.task.count(logits_SN, targets, thresholds).per_label(large.labels)
    assert 0 < found.metrics["f1_macro"] < 1, "some predictions are right"


def test_metrics_of_blocks_of_labels_equal_those_of_all_labels() -> None:
    draw = torch.Generator().manual_seed(1)
    logits_SN, targets_SN = torch.randn(50, 9, generator=draw), (torch.rand(50, 9, generator=draw) < 0.3).float()
    thresholds = torch.rand(9, generator=draw).tolist()
    tally = MULTI.tally(50, 9)
    for first in (4, 0, 8):
        last = min(first + 4, 9)
        part = (logits_SN[:, first:last], targets_SN[:, first:last], thresholds[first:last])
        tally.add(torch.arange(50), *part, first=first)
    expected = MULTI.compute(logits_SN, targets_SN, thresholds=thresholds)
    assert tally.metrics() == expected | {"loss": pytest.approx(expected["loss"])}


def test_with_many_labels_the_most_probable_predicted_and_true_ones_are_written(large: DataSet, tmp_path: Path) -> None:
    logits_SN, targets = logits_of(large, "val"), large.targets("val")
    found = score(batches(logits_SN, [len(targets)]), large, "val", predictions=tmp_path / "p.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [row.id for row in large.splits["val"].rows]
    p_SN = task_of(large.task == MULTI).probabilities(logits_SN)
    multi = large.task == MULTI
    key = "labels" if multi else "label"
    for line, row, p_N in zip(lines, large.splits["val"].rows, p_SN, strict=True):
        assert line["true"] == (list(row.labels) if multi else row.labels[0])
        most_probable = {large.labels[number]: round(float(p_N[number]), 6) for number in p_N.argsort(descending=True)[:KEPT]}
        chosen = {large.labels[number] for number in (p_N >= 0.5).nonzero().flatten()} if multi else {line["label"]}
        assert (set(line[key]) if multi else {line[key]}) == chosen
        assert line["probabilities"].keys() == most_probable.keys() | chosen | set(row.labels)
        assert most_probable.items() <= line["probabilities"].items()
        assert [*line["probabilities"].values()] == sorted(line["probabilities"].values(), reverse=True)
    if not multi:
        assert found.metrics["accuracy"] == np.mean([line["label"] == line["true"] for line in lines])
        losses = [-math.log(line["probabilities"][line["true"]]) for line in lines]
        assert found.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-3)


def test_a_prediction_that_is_not_finite_is_refused_and_nothing_is_written(large: DataSet, tmp_path: Path) -> None:
    logits_SN = logits_of(large, "val")
    logits_SN[3, 2] = math.nan
    with pytest.raises(NumericError, match=f"on 1 of {len(logits_SN)} samples"):
        score(batches(logits_SN, [10, len(logits_SN) - 10]), large, "val", predictions=tmp_path / "p.jsonl")
    assert not [*tmp_path.iterdir()]


def test_logits_spooled_to_a_file_equal_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_SN = torch.randn(37, 11, generator=torch.Generator().manual_seed(0))
    blocks = {}
    for where, limit in (("memory", 4 * 37 * 11), ("file", 4 * 37 * 11 - 1)):
        monkeypatch.setattr(logit_spool, "IN_MEMORY", limit)
        monkeypatch.setattr(logit_spool, "BLOCK", 4 * 37 * 4)
        with Spool(37, 11, tmp_path) as waiting:
            for part in logits_SN.split(5):
                waiting.add(part)
            blocks[where] = list(waiting.blocks())
            assert (waiting._file is None) == (where == "memory")
    assert [first for first, _ in blocks["file"]] == [0, 4, 8]
    for (first, one_Sn), (_, other_Sn) in zip(blocks["memory"], blocks["file"], strict=True):
        assert one_Sn.equal(other_Sn) and one_Sn.equal(logits_SN[:, first : first + 4])
    assert not [*tmp_path.iterdir()], "the file has no name"


def test_a_full_disk_while_logits_are_spooled_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_spool, "IN_MEMORY", 8)
    monkeypatch.setattr(logit_spool, "BLOCK", 8)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Spool(4, 3, tmp_path) as waiting:
        monkeypatch.setattr(waiting, "_file", type("Full", (), {"seek": full, "close": lambda self: None, "write": full})())
        with pytest.raises(ResourceError, match="No space left"):
            waiting.add(torch.zeros(4, 3))


# -- on the command line


@pytest.fixture(scope="module", params=[False, True], ids=["single", "multi"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on many labels, and its data; multi-label data are trained by two processes, with tuned thresholds."""
    root = tmp_path_factory.mktemp("trained")
    data = make(root / "data", rows=600, labels=MANY, multi_label=request.param)
    command = ["train", "--data", str(data), "--out", str(root / "run"), *TINY, "--batch", "16", "--steps", "3", "--json"]
    done = ranks(2, *command, "--set", "train.threshold=tuned") if request.param else call(*command)
    assert done.returncode == 0, done.stderr
    return root / "run", data


def test_thresholds_tuned_by_two_processes_equal_those_tuned_on_all_logits(trained: tuple[Path, Path]) -> None:
    run, where = trained
    loaded, data = load_model(RunFolder(run), "best", torch.device("cpu")), load_data(Data(path=str(where)))
    logits_SN = run_split(loaded.model, data, "val", loaded.config, torch.device("cpu")).logits_SN
    saved = json.loads((run / "metrics.json").read_text())
    if data.task == MULTI:
        best = tuned_thresholds(logits_SN, data.targets("val"))
        assert list(saved["thresholds"].values()) == pytest.approx(best, abs=1e-6)
    multi = data.task == MULTI
    again = task_of(multi).compute(logits_SN, data.targets("val"), thresholds=loaded.thresholds)
    assert saved["metrics"]["val"] == pytest.approx(again, abs=1e-5)


def test_two_processes_evaluate_and_write_the_same_as_one(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = trained
    results = {}
    for processes in (1, 2):
        out = tmp_path / f"{processes}.jsonl"
        command = ["eval", str(run), "--split", "test", "--data", str(data), "-o", str(out), "--json"]
        done = call(*command) if processes == 1 else ranks(processes, *command)
        assert done.returncode == 0, done.stderr
        results[processes] = json.loads(done.stdout)
    assert results[1]["metrics"] == results[2]["metrics"] and results[1]["per_label"] == results[2]["per_label"]
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert MAX_LABELS < MANY


def test_the_page_of_a_large_split_covers_a_sample_of_it(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = trained
    monkeypatch.setattr(reporting, "MAX_PROBABILITIES", 9 * MANY)
    done = reporting.report(run, out=tmp_path / "page.html", device="cpu", audit=False)
    assert "9 of 30 samples" in done.notes[-1]
    monkeypatch.setattr(reporting, "MAX_PROBABILITIES", 30 * MANY)
    whole = reporting.report(run, out=tmp_path / "page.html", device="cpu", audit=False)
    assert "of 30 samples" not in " ".join(whole.notes)
    saved = json.loads((run / "metrics.json").read_text())["metrics"]["test"]
    assert whole.metrics == pytest.approx(saved) and done.metrics["loss"] != whole.metrics["loss"]


_PEAK = """
import resource, sys
from pathlib import Path
import torch
from mopefuse.evaluation.outputs import BatchOutput
from mopefuse.evaluation.scoring import score
from mopefuse.config.schema import Data
from mopefuse.data.load import load_data

data = load_data(Data(path=sys.argv[1]))
count, peak = len(data.splits["train"].rows), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def answers(many):
    draw = torch.Generator().manual_seed(0)
    for index_B in torch.arange(count).split(64)[:many]:
        yield BatchOutput(index_B, torch.randn(len(index_B), len(data.labels), generator=draw) - 4)

score(answers(20), data, "train", predictions=Path(sys.argv[2]))
before = peak()
score(answers(None), data, "train", predictions=Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.soak
@pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])
def test_the_memory_of_evaluation_does_not_grow_with_rows_times_labels(multi_label: bool, tmp_path: Path) -> None:
    """All logits of 9,000 rows and 2,000 labels take 72 MB, dense targets another 72, and Python objects 20 times that."""
    make(tmp_path / "data", rows=10_000, labels=2_000, multi_label=multi_label)
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "data"), str(tmp_path / "p.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40, f"{done.stdout} MB more for 140 batches than for 20"


def test_with_equal_probabilities_the_written_label_is_the_one_that_is_scored() -> None:
    """Logits of an untrained model differ by less than printed probabilities can show."""
    logits_BN = torch.tensor([[0.0, 1e-9, -1e-9], [1e-9, 0.0, 2e-9]])
    assert logits_BN.softmax(dim=-1).argmax(dim=-1).tolist() == [0, 0]
    targets_B = torch.tensor([1, 2])
    _, _, label_Z, _, chosen_Z = SINGLE.collect(torch.arange(2), logits_BN, targets_B)
    assert label_Z[chosen_Z].tolist() == [1, 2]
    assert SINGLE.compute(logits_BN, targets_B)["accuracy"] == 1.0

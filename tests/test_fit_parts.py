"""The parts of `mopefuse fit`: the choice between candidates, folds, calibration, the budget, and guessed columns."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import code_of, make_pairs, write_rows
from PIL import Image
from tasks_of import SINGLE, task_of
from torch import Tensor, nn

from mopefuse.autofit.budget import Budget, parse_budget
from mopefuse.autofit.calibration import calibrate, fold_temperature
from mopefuse.autofit.cross_validation import FoldClock, cross_validate_network, cross_validate_regressions, fit_settings
from mopefuse.autofit.features import FOLDS, Features, _PaceCheck, compute_features
from mopefuse.autofit.listener import CandidateListener, FitListener, OutOfTime
from mopefuse.autofit.scores import Estimate, Judge, Predictions, choose, choose_leader
from mopefuse.autofit.setup import choose_data
from mopefuse.config.schema import Data, build_config
from mopefuse.data.guess_columns import guess_columns
from mopefuse.fusion.mlp_fit import NetworkSettings
from mopefuse.fusion.wide_head import WideHead
from mopefuse.training.listener import Listener, Progress
from mopefuse.training.plan import prepare
from mopefuse.training.train import train

S, N = 200, 3


def predictions(classes: Tensor, rows: Tensor | None = None) -> Predictions:
    """Predictions that are certain of these classes."""
    rows = torch.arange(len(classes)) if rows is None else rows
    return Predictions(rows, 10.0 * torch.nn.functional.one_hot(classes, N).float())


def spoiled(targets: Tensor, wrong: Sequence[int]) -> Predictions:
    """Predictions that are right except for some samples."""
    classes = targets.clone()
    classes[list(wrong)] = (classes[list(wrong)] + 1) % N
    return predictions(classes)


TARGETS = torch.arange(S) % N


# -- scores and the choice


def test_a_score_and_its_standard_error_are_those_of_a_proportion() -> None:
    found = Judge(SINGLE, TARGETS, N).score(spoiled(TARGETS, range(40)))
    assert found.value == pytest.approx(0.8) and found.rows == S
    assert found.error == pytest.approx((0.8 * 0.2 / S) ** 0.5, rel=0.15)


def test_a_difference_is_paired_on_the_samples_that_both_predicted() -> None:
    judge, ours = Judge(SINGLE, TARGETS, N), spoiled(TARGETS, range(40))
    half = torch.arange(0, S, 2)
    theirs = Predictions(half, ours.logits_KN[half])
    assert judge.difference(ours, theirs) == Estimate(0.0, 0.0, S // 2)
    better = judge.difference(spoiled(TARGETS, range(30)), ours)
    assert better.value == pytest.approx(0.05) and better.error == pytest.approx((0.05 * 0.95 / S) ** 0.5, rel=0.15)


def test_the_simpler_candidate_is_chosen_within_noise_and_the_dearer_one_beyond_it() -> None:
    judge, simple = Judge(SINGLE, TARGETS, N), spoiled(TARGETS, range(40))
    same = spoiled(TARGETS, range(100, 139))  # one more is right, but on other samples
    better = spoiled(TARGETS, range(20))
    assert choose_leader(judge, {"simple": simple, "same": same}) == "simple"
    assert choose_leader(judge, {"simple": simple, "same": same, "better": better}) == "better"


def test_a_candidate_that_selected_its_step_on_validation_must_be_better_by_two_standard_errors() -> None:
    judge, leader = Judge(SINGLE, TARGETS, N), spoiled(TARGETS, range(40))
    three_more, many_more = spoiled(TARGETS, range(37)), spoiled(TARGETS, range(20))  # 1.7 and 4.7 standard errors
    assert choose(judge, "leader", leader, {"prompts": three_more}) == "leader"
    assert choose(judge, "leader", leader, {"prompts": many_more}) == "prompts"


# -- cross-validation


def make_features(*, targets: Tensor | None = None, groups: Sequence[bytes] | None = None) -> Features:
    """The sign of a product of one feature of each side decides between two classes."""
    draw = torch.Generator().manual_seed(0)
    tables = {side: torch.randn(S, 2, generator=draw) for side in ("main", "comp")}
    classes = (tables["main"][:, 0] * tables["comp"][:, 0] > 0).long()
    rows = tuple(groups) if groups else tuple(f"{row}".encode() for row in range(S))
    targets = classes if targets is None else targets
    return Features(tables, {}, targets, task_of(targets.ndim == 2), rows, train_rows=S - 50)


def clock(share: float = 1.0) -> FoldClock:
    return FoldClock("test", Budget(10_000.0), FitListener(), share)


def settings(features: Features, strengths: tuple[float, ...] = (0.01, 1.0)) -> Any:
    config = build_config({"main": "", "comp": "", "linear": {"strengths": strengths, "max_iter": 50}})
    return fit_settings(features, 2, config)


def test_every_sample_is_held_out_once_with_its_whole_group() -> None:
    groups = [f"image {row // 4}".encode() for row in range(S)]
    features = make_features(groups=groups)
    folds = list(features.folds())
    assert len(folds) == FOLDS and torch.cat([held for _, held in folds]).sort().values.tolist() == list(range(S))
    for kept, held in folds:
        assert not {groups[row] for row in kept.tolist()} & {groups[row] for row in held.tolist()}
        assert 30 <= len(held) <= 50


def test_folds_have_about_the_same_share_of_each_class() -> None:
    targets = torch.tensor([0] * 150 + [1] * 50)
    counts = [int(targets[held].sum()) for _, held in make_features(targets=targets).folds()]
    assert counts == [10] * FOLDS


def test_a_held_out_label_does_not_affect_its_prediction() -> None:
    features = make_features()
    _, held = next(iter(features.folds()))
    changed = features.targets.clone()
    changed[held] = 1 - changed[held]
    other = replace(features, targets=changed)
    vars(other)["held_out"] = features.held_out  # the same folds, although they depend on the labels
    once = FoldClock("test", Budget(0.0), FitListener(), 1.0)  # time for one fold
    groups, how = {"both": ("main", "comp")}, settings(features, strengths=(1.0,))
    before, after = (cross_validate_regressions(each, how, groups, once)["both"].predictions for each in (features, other))
    assert before.rows_K.tolist() == held.tolist()
    assert torch.equal(before.logits_KN, after.logits_KN)


def test_a_network_finds_what_a_regression_cannot() -> None:
    features = make_features()
    how, judge = settings(features), Judge(SINGLE, features.targets, 2)
    linear = cross_validate_regressions(features, how, {"both": ("main", "comp")}, clock())["both"]
    network = cross_validate_network(features, how, NetworkSettings(64, 0.0, 0), clock())
    assert network is not None and len(network.predictions.rows_K) == S
    assert judge.value(network.predictions) > judge.value(linear.predictions) + 0.2


def test_without_time_a_network_is_not_trained_at_all() -> None:
    features = make_features()
    assert cross_validate_network(features, settings(features), NetworkSettings(8, 0.0, 0), clock(share=0.0)) is None


# -- calibration


def overconfident(heads: int) -> tuple[list[Tensor], Tensor]:
    """Logits three times as large as those that the labels are drawn from."""
    draw = torch.Generator().manual_seed(0)
    each = [2 * torch.randn(4000, N, generator=draw) for _ in range(heads)]
    mean = each[0] if heads == 1 else SINGLE.average(each)
    targets = torch.multinomial(mean.softmax(dim=-1), 1, generator=draw)[:, 0]
    return [3 * logits for logits in each], targets


@pytest.mark.parametrize("heads", [1, 2])
def test_the_temperature_undoes_overconfidence(heads: int) -> None:
    logits, targets = overconfident(heads)
    found = calibrate(SINGLE, logits, targets, "validation")
    assert found.temperature == pytest.approx(3.0, rel=0.1)
    assert found.loss_after < found.loss_before and found.error_after < 0.03 < found.error_before


def test_calibrated_predictions_are_left_as_they_are() -> None:
    logits, targets = overconfident(1)
    assert calibrate(SINGLE, [logits[0] / 3], targets, "validation").temperature == pytest.approx(1.0, rel=0.1)


HEADS = {
    "linear": nn.Linear(5, N),
    "one hidden layer": nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, N)),
    "wide": WideHead(5, 4, N),
}


@pytest.mark.parametrize("name", HEADS)
def test_folding_divides_the_logits(name: str) -> None:
    head, feature_BF = HEADS[name].eval(), torch.randn(6, 5)
    before = head(feature_BF)
    assert fold_temperature(head, 2.5)
    assert torch.allclose(head(feature_BF), before / 2.5, atol=1e-6)


def test_a_head_of_unknown_form_is_not_scaled() -> None:
    assert not fold_temperature(nn.Sequential(nn.Linear(5, N), nn.Tanh()), 2.0)


# -- budget


@pytest.mark.parametrize(("text", "seconds"), [("10m", 600), ("90s", 90), ("1.5h", 5400), (45, 45), ("2 m", 120)])
def test_a_budget_has_a_unit(text: str | float, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "45", "0m", "-1m", "10d", "1e3", "nan"])
def test_other_budgets_are_refused(text: str) -> None:
    assert code_of(lambda: parse_budget(text)) == "MF-CFG-390"


@pytest.mark.parametrize(("times", "stops"), [(1.0, False), (3.0, True)])
def test_encoding_that_takes_longer_than_the_budget_is_stopped_early(
    monkeypatch: pytest.MonkeyPatch, times: float, stops: bool
) -> None:
    """Ten seconds for 20 of 100 values: 50 in all, or 150 if there are three times as many rows; the budget is 100."""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    check = _PaceCheck("encoding", Listener(), Budget(100.0), times)
    now += 10.0
    assert code_of(lambda: check(20, 100)) == ("MF-RES-390" if stops else "")


def test_the_pace_of_encoding_is_that_of_distinct_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_pairs(tmp_path / "data", counts={"train": 4, "val": 2, "test": 2})
    times: dict[str, float] = {}

    class Recorder(_PaceCheck):
        def __init__(self, what: str, listener: Listener, budget: Budget, times_: float) -> None:
            super().__init__(what, listener, budget, times_)
            times[what] = times_

    monkeypatch.setattr("mopefuse.autofit.features._PaceCheck", Recorder)
    rows = [json.loads(line) for line in (root / "test.jsonl").read_text().splitlines()]
    many = [row | {"id": f"{row['id']}-{n}", "text": f"question {n}"} for row in rows for n in range(50)]
    write_rows(root / "test.jsonl", many)
    settings = {"main": "tiny:vision", "comp": "tiny:text", "method": "linear", "data": {"path": str(root)}}
    compute_features(prepare(build_config(settings), Listener()), torch.device("cpu"), Listener(), Budget(1e6))
    assert times["vision on train"] == pytest.approx(8 / 4), "100 rows of test have two images"
    assert times["text on train"] == pytest.approx((3 + 50) / 3), "and fifty texts"


def candidate_listener(seconds: float) -> CandidateListener:
    to_beat = Estimate(0.9, 0.01, 100)
    return CandidateListener(FitListener(), Budget(seconds), metric="accuracy", to_beat=to_beat, tested_share=1.0)


def test_training_ends_when_the_budget_is_spent() -> None:
    for seconds, stops in ((1000.0, False), (1.0, True)):  # of one second, two are reserved
        found = candidate_listener(seconds)
        found.on_step(Progress(step=1), 100, 0.0, 0.0)
        assert found.should_stop(Progress(step=1), 100) is stops
        assert ("budget" in found.reason) is stops


@pytest.mark.parametrize(("step", "best", "stops"), [(60, 0.5, True), (40, 0.5, False), (60, 0.89, False)])
def test_training_ends_at_half_of_the_steps_if_it_is_hopelessly_behind(step: int, best: float, stops: bool) -> None:
    found = candidate_listener(1000.0)
    found.on_step(Progress(step=1), 100, 0.0, 0.0)
    found.on_validation(Progress(step=step), {}, best=True)
    assert found.should_stop(Progress(step=step, best=best), 100) is stops


def test_a_preparation_that_would_not_end_in_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    found = candidate_listener(100.0)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    found.on_data_progress("encoding", 1, 1000)
    now += 10.0
    with pytest.raises(OutOfTime, match="encoding"):
        found.on_data_progress("encoding", 11, 1000)  # one second each


class StopsAtStep2(Listener):
    def should_stop(self, progress: Progress, total: int) -> bool:
        return progress.step == 2


def test_a_listener_can_end_training_and_the_test_can_be_left_out(pairs: Path, tmp_path: Path) -> None:
    specs = {"main": "tiny:vision", "comp": "tiny:text", "device": "cpu", "method": "late-concat"}
    config = build_config({**specs, "data": {"path": str(pairs)}, "train": {"batch_size": 4, "epochs": 3}})
    result = train(config, tmp_path / "run", listener=StopsAtStep2(), test=False)
    assert result["steps"] == 2 and result["metrics"]["val"] and result["metrics"]["test"] is None
    assert not (tmp_path / "run" / "predictions.jsonl").exists()


# -- guessed columns


def write_table(root: Path, columns: dict[str, Sequence[str]], *, folder: str = "") -> Path:
    """A CSV with these columns, whose cells repeat, and an image for each path in a column that ends in .png."""
    count = 24
    cells = {name: [values[row % len(values)] for row in range(count)] for name, values in columns.items()}
    for values in cells.values():
        for cell in [cell for cell in values if cell.endswith(".png")]:
            (root / folder / cell).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(root / folder / cell)
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(cells)
        writer.writerows(zip(*cells.values(), strict=True))
    return root / "table.csv"


PHOTOS = [f"{row}.png" for row in range(24)]
NOTES = [f"note number {row}" for row in range(24)]
KINDS = ["shoe", "hat"]


def guess(path: Path, **named: Any) -> dict[str, Any]:
    return guess_columns(Data(path=str(path), **named)).settings


def test_columns_are_found_by_their_contents(tmp_path: Path) -> None:
    table = write_table(tmp_path, {"sku": [f"{row}" for row in range(24)], "note": NOTES, "shot": PHOTOS, "kind": KINDS})
    assert guess(table) == {"img_col": "shot", "text_col": "note", "label_col": "kind"}


def test_files_in_a_folder_beside_the_table_are_found(tmp_path: Path) -> None:
    table = write_table(tmp_path, {"note": NOTES, "shot": PHOTOS, "kind": KINDS}, folder="pictures")
    assert guess(table)["image_roots"] == (str(tmp_path / "pictures"),)


def test_the_longest_text_is_used_and_a_split_column_recognised(tmp_path: Path) -> None:
    texts = {"brief": NOTES, "long": [f"a much longer text than that, number {row}" for row in range(24)]}
    table = write_table(tmp_path, {**texts, "shot": PHOTOS, "kind": KINDS, "part": ["train", "train", "test"]})
    found = guess(table)
    assert (found["text_col"], found["split_col"]) == ("long", "part")
    assert "text: column long (the longest; --text-col NAME selects another)" in guess_columns(Data(path=str(table))).reasons
    config, lines = choose_data(table, {})
    assert config.val_fraction == 0.1 and config.test_fraction is None and any("val: 10 %" in line for line in lines)


def test_columns_that_are_named_or_have_a_default_name_are_kept(tmp_path: Path) -> None:
    table = write_table(tmp_path, {"text": NOTES, "img": PHOTOS, "label": KINDS, "other": ["x", "y", "z"]})
    assert guess(table) == {} and guess(table, label_col="other") == {}


def test_words_are_labels_rather_than_numbers_are(tmp_path: Path) -> None:
    table = write_table(tmp_path, {"note": NOTES, "shot": PHOTOS, "kind": KINDS, "stars": ["1", "2", "3"]})
    assert guess(table)["label_col"] == "kind"


@pytest.mark.parametrize(
    ("columns", "code", "flag"),
    [
        ({"note": NOTES, "shot": PHOTOS, "kind": KINDS, "make": ["x", "y", "z"]}, "MF-DATA-391", "--label-col"),
        ({"note": NOTES, "remark": NOTES, "shot": PHOTOS, "kind": KINDS}, "MF-DATA-391", "--text-col"),
        ({"note": NOTES, "shot": PHOTOS, "other": PHOTOS, "kind": KINDS}, "MF-DATA-391", "--image-col"),
        ({"note": NOTES, "shot": PHOTOS}, "MF-DATA-390", "--label-col"),
        ({"note": NOTES, "kind": KINDS}, "MF-DATA-390", "--image-col"),
        ({"shot": PHOTOS, "kind": KINDS}, "MF-DATA-390", "--text-col"),
        ({"note": NOTES, "shot": ["lost/a.jpg", "lost/b.jpg"], "kind": KINDS}, "MF-DATA-390", "--image-root"),
    ],
)
def test_what_is_not_clear_is_asked_for_by_its_flag(tmp_path: Path, columns: Any, code: str, flag: str) -> None:
    with pytest.raises(Exception, match="column") as caught:
        guess(write_table(tmp_path, columns))
    assert getattr(caught.value, "code", "") == code and flag in str(caught.value)


def test_a_path_that_leaves_the_folder_is_not_a_file(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    write_table(tmp_path, {"shot": PHOTOS})
    table = write_table(inside, {"note": NOTES, "kind": KINDS, "shot": [f"../{row}.jpg" for row in range(24)]})
    for row in range(24):
        (tmp_path / f"{row}.jpg").write_bytes(b"")
    assert code_of(lambda: guess(table)) == "MF-DATA-390"

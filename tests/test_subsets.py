"""Held-out rows and subsets: balanced by class, the same for the same seed, regardless of the order of the file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, call, make_pairs, write_rows
from hypothesis import given
from hypothesis import strategies as st
from tasks_of import MULTI, SINGLE, task_of

from mopefuse.config.schema import Data, build_config
from mopefuse.data.load import load_data
from mopefuse.data.subsets import apportion, choose_few, hold_out
from mopefuse.errors import ConfigError
from mopefuse.fusion.base import Output
from mopefuse.training.losses import task_loss

IDS = [f"row-{number}" for number in range(60)]
ROWS_OF_TWO = [("often",) if number % 6 else ("rare",) for number in range(60)]  # 50 and 10


def drawn(rows: Any, labels: Any = ROWS_OF_TWO) -> Counter[str]:
    return Counter(label for row in rows for label in labels[row])


@given(st.lists(st.integers(2, 1000), min_size=1, max_size=9), st.floats(0, 0.5))
def test_apportioned_counts_are_whole_and_closest_to_proportional(counts: list[int], share: float) -> None:
    total = int(share * sum(counts))
    parts = apportion(counts, total)
    assert sum(parts) == total
    assert all(abs(part - count * total / sum(counts)) < 1 for part, count in zip(parts, counts, strict=True))


def test_apportioned_counts_match_a_computation_by_hand() -> None:
    """10 of 80: 5.0 of 40, 3.125 of 25, 1.75 of 14, 0.125 of 1; the remaining one goes to the 14."""
    assert apportion([40, 25, 14, 1], 10) == [5, 3, 2, 0]
    assert apportion([1, 1, 2], 2) == [0, 0, 1], "each class keeps one"
    assert apportion([3, 3], 3) == [2, 1], "earlier ones win ties"


def test_each_class_gets_its_shots() -> None:
    assert drawn(choose_few(IDS, ROWS_OF_TWO, 0, shots=4, fraction=None)) == {"often": 4, "rare": 4}
    assert drawn(choose_few(IDS, ROWS_OF_TWO, 0, shots=30, fraction=None)) == {"often": 30, "rare": 10}


def test_a_fraction_applies_to_each_class_and_keeps_at_least_one_row() -> None:
    assert drawn(choose_few(IDS, ROWS_OF_TWO, 0, shots=None, fraction=0.5)) == {"often": 25, "rare": 5}
    assert drawn(choose_few(IDS, ROWS_OF_TWO, 0, shots=None, fraction=0.01)) == {"often": 1, "rare": 1}
    assert choose_few(IDS, ROWS_OF_TWO, 0, shots=None, fraction=1.0) == list(range(60))


def test_in_multi_label_data_each_label_gets_its_shots() -> None:
    labels = [tuple(name for bit, name in enumerate("abcd") if number >> bit & 1) for number in range(60)]
    found = drawn(choose_few(IDS, labels, 3, shots=5, fraction=None), labels)
    assert set(found) == set("abcd")
    assert min(found.values()) >= 5
    assert len([row for row in choose_few(IDS, labels, 3, shots=5, fraction=None) if labels[row]]) <= 20


MIXED = [tuple(name for bit, name in enumerate("abc") if number >> bit & 1) for number in range(64)]  # 8 without a label
MANY = [f"row-{number}" for number in range(64)]


def test_a_fraction_applies_to_rows_without_labels() -> None:
    def unlabelled(rows: list[int]) -> int:
        return sum(not MIXED[row] for row in rows)

    assert choose_few(MANY, MIXED, 0, shots=None, fraction=1.0) == list(range(64))
    assert unlabelled(choose_few(MANY, MIXED, 0, shots=None, fraction=0.5)) == 4
    assert unlabelled(choose_few(MANY, MIXED, 0, shots=None, fraction=0.01)) == 1
    assert unlabelled(choose_few(MANY, MIXED, 0, shots=3, fraction=None)) == 3
    assert unlabelled(choose_few(MANY, MIXED, 0, shots=30, fraction=None)) == 8


def test_rows_without_labels_are_held_out_in_proportion() -> None:
    kept, held = hold_out(MANY, MIXED, 32, 0)
    assert sum(not MIXED[row] for row in held) == sum(not MIXED[row] for row in kept) == 4


def test_a_run_on_a_fraction_of_1_has_every_row(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data", multi=True)  # every eighth row of it has no label
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    write_rows(root / "train.jsonl", [row | {"label": row["label"] if i % 3 else []} for i, row in enumerate(rows)])
    every = load_data(Data(path=str(root))).splits["train"]
    assert sum(not labels for labels in every.labels) >= 4
    assert [*load_data(Data(path=str(root), fraction=1.0)).splits["train"].labels] == [*every.labels]


@pytest.mark.parametrize("seed", range(3))
def test_the_selection_depends_on_seed_and_rows_but_not_on_their_order(seed: int) -> None:
    chosen = {IDS[row] for row in choose_few(IDS, ROWS_OF_TWO, seed, shots=6, fraction=None)}
    backwards = {IDS[::-1][row] for row in choose_few(IDS[::-1], ROWS_OF_TWO[::-1], seed, shots=6, fraction=None)}
    assert chosen == backwards
    assert chosen != {IDS[row] for row in choose_few(IDS, ROWS_OF_TWO, seed + 1, shots=6, fraction=None)}
    _, held = hold_out(IDS, ROWS_OF_TWO, 12, seed)
    _, held_backwards = hold_out(IDS[::-1], ROWS_OF_TWO[::-1], 12, seed)
    assert {IDS[row] for row in held} == {IDS[::-1][row] for row in held_backwards}


def test_more_shots_include_fewer_shots() -> None:
    fewer, more = (set(choose_few(IDS, ROWS_OF_TWO, 0, shots=shots, fraction=None)) for shots in (3, 9))
    assert fewer < more


def test_held_out_rows_are_proportional_and_the_rest_is_kept() -> None:
    kept, held = hold_out(IDS, ROWS_OF_TWO, 12, 0)
    assert drawn(held) == {"often": 10, "rare": 2}
    assert sorted([*kept, *held]) == list(range(60))


def test_rows_of_one_image_stay_in_one_split() -> None:
    groups = [f"image-{number // 4}" for number in range(60)]
    kept, held = hold_out(groups, ROWS_OF_TWO, 16, 0)
    assert {groups[row] for row in kept} & {groups[row] for row in held} == set()
    assert 12 <= len(held) <= 20


def test_nothing_is_held_out_of_a_class_with_one_row() -> None:
    labels = [*ROWS_OF_TWO[:59], ("only",)]
    for count in (1, 12, 50):
        kept, _ = hold_out(IDS, labels, count, 0)
        assert set(drawn(kept, labels)) == {"often", "rare", "only"}


def test_shots_and_fraction_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="set only one"):
        build_config({"main": "a:b", "comp": "a:b", "data": {"shots": 1, "fraction": 0.5}})


def test_a_few_shot_run_records_its_rows_and_does_not_change_val_or_test(pairs: Path, tmp_path: Path) -> None:
    done = call("train", *TINY, "--data", pairs, "--out", tmp_path / "run", "--shots", 2, "--steps", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == {"train": 6, "val": 6, "test": 7}
    ids = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert list(ids) == ["train"]
    assert ids["train"] == [row.id for row in load_data(Data(path=str(pairs), shots=2)).splits["train"].rows]
    assert Counter(row.labels for row in load_data(Data(path=str(pairs), shots=2)).splits["train"].rows) == {
        ("a",): 2, ("b",): 2, ("c",): 2,
    }  # fmt: skip


# -- rare classes in the loss


def test_balanced_weights_equal_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    targets = torch.tensor([0] * 7 + [1] * 2 + [2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=targets.numpy())
    counts_N = targets.bincount()
    assert SINGLE.class_weights(counts_N, 10).tolist() == pytest.approx(expected.tolist())
    several = torch.nn.functional.one_hot(targets, 3).float()
    for label in range(3):
        negative, positive = compute_class_weight("balanced", classes=np.arange(2), y=several[:, label].int().numpy())
        assert MULTI.class_weights(counts_N, 10)[:, label].tolist() == pytest.approx([positive, negative])


def test_a_class_without_samples_has_weight_one_and_does_not_affect_others() -> None:
    assert SINGLE.class_weights(torch.tensor([3, 0, 1]), 4).tolist() == pytest.approx([4 / 6, 1, 2])
    assert MULTI.class_weights(torch.tensor([1, 0]), 2).tolist() == [[1, 1], [1, 0.5]]


@pytest.mark.parametrize("multi", [False, True])
def test_each_class_contributes_equally_to_a_balanced_loss(multi: bool) -> None:
    """At equal logits, the loss of every sample is the same, so a class contributes its weight times its number of samples."""
    targets = torch.tensor([0] * 8 + [1] * 2)
    labels = torch.nn.functional.one_hot(targets, 2).float() if multi else targets
    weights = task_of(multi).class_weights(targets.bincount(), len(targets))

    def loss(rows: slice) -> float:
        output = Output(torch.zeros(len(labels[rows]), 2))
        batch = type("Batch", (), {"targets": labels[rows]})()
        return float(task_loss(output, batch, task_of(multi), weights))

    assert loss(slice(0, 8)) == pytest.approx(loss(slice(8, 10)))
    assert loss(slice(0, 10)) == pytest.approx(10 * torch.tensor(2.0).log().item())


@pytest.mark.parametrize("multi", [False, True])
def test_a_run_with_balanced_weights_and_tuned_thresholds_resumes_and_evaluates_with_them(
    multi: bool, tmp_path: Path
) -> None:
    root = make_pairs(tmp_path / "data", multi=multi)
    options = ("--class-weights", "balanced", "--threshold", "tuned", "--set", "train.checkpoint_every=1")
    done = call("train", *TINY, *options, "--data", root, "--out", tmp_path / "run", "--epochs", 2, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    again = call("eval", tmp_path / "run", "--json")
    assert json.loads(again.stdout)["metrics"] == result["splits"]["test"]
    assert set(result["per_label"][0]) == {"label", "precision", "recall", "f1", "support"}
    if not multi:
        assert result["thresholds"] is None
        return
    assert set(result["thresholds"]) == {"a", "b", "c"}
    assert set(result["thresholds"].values()) != {0.5}
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    for row in predictions:
        expected = [name for name, p in row["probabilities"].items() if p >= result["thresholds"][name]]
        assert row["labels"] == expected


def test_class_weights_change_the_trained_model(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data")
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    write_rows(root / "train.jsonl", [row | {"label": "a" if number else "b"} for number, row in enumerate(rows)])
    (root / "labels.txt").write_text("a\nb\nc\n")
    log = {}
    for kind in ("none", "balanced"):
        run = tmp_path / kind
        done = call("train", *TINY, "--class-weights", kind, "--data", root, "--out", run, "--steps", 3)
        assert done.returncode == 0, done.stderr
        log[kind] = (run / "metrics.jsonl").read_text()
    assert log["none"] != log["balanced"]

"""What a run's page shows about its settings, and the simple baselines next to its score."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PLAIN_SETTINGS, TINY, call
from report_cases import facts_of
from study_cases import Made, change, make_study
from test_data_pages import Page

from mopefuse.report import run_baselines
from mopefuse.report.baselines import command_for, find_baselines
from mopefuse.report.run_report import report
from mopefuse.runs.folder import RunFolder


@pytest.fixture
def run(reported: Path) -> Path:
    """A run of two steps with its page; tests must not change it."""
    return reported


# -- settings


def chosen(run: Path) -> dict[str, str]:
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    found = re.findall(r"<code>([a-z_.]+)</code><br>(.*?) <span", (run / "report.html").read_text(encoding="utf-8"))
    assert "Settings that are not defaults" in page.text
    return dict(found)


def test_only_settings_chosen_by_the_user_are_listed(run: Path, pairs: Path, tmp_path: Path) -> None:
    own = {"device": "cpu", "prompts.experts": "2", "train.batch_size": "4", "train.max_steps": "2"}
    assert chosen(run) == PLAIN_SETTINGS | own
    flags = ("--set", "train.lr=0.01", "--set", "prompts.static=3", "--set", "prompts.dynamic=6")
    assert call("train", *TINY, "--data", pairs, "--out", tmp_path / "run", "--steps", "2", *flags).returncode == 0
    report(tmp_path / "run", device="cpu", audit=False)
    own = {name: value for name, value in chosen(tmp_path / "run").items() if name not in chosen(run)}
    assert own == {"train.lr": "0.01", "prompts.static": "3"}, "other rates follow lr, and 6 is the default of dynamic"


# -- baselines


def test_a_run_is_compared_with_the_majority_class_and_more_baselines_are_suggested(run: Path) -> None:
    logits_SN = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 1, 1, 0, 0]), 3).float()
    facts = facts_of(run, logits_SN=logits_SN)
    text = Page(str(run_baselines.baselines(facts).body)).text
    assert "always “a”, the most frequent label in training" in text, "a, b and c are equally frequent in training"
    assert "42.9 %" in text and "+28.6 points" in text, "3 of 7, and 5 of 7 are right"
    assert command_for(facts.config) in text
    assert "--method linear" in text and "--main tiny:vision --comp tiny:text" in text


def test_finished_simpler_runs_next_to_a_run_are_its_baselines(trained: Path, tmp_path: Path) -> None:
    def beside(name: str, method: str, score: float, **facts: Any) -> None:
        shutil.copytree(trained, tmp_path / name)
        config = (tmp_path / name / "config.yaml").read_text().replace("method: conditional", f"method: {method}")
        (tmp_path / name / "config.yaml").write_text(config)
        result = json.loads((trained / "metrics.json").read_text())
        result["metrics"]["test"]["accuracy"] = score
        (tmp_path / name / "metrics.json").write_text(json.dumps(result))
        manifest = json.loads((trained / "manifest.json").read_text()) | facts
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))

    shutil.copytree(trained, tmp_path / "mine")
    beside("linear-0", "linear", 0.5)
    beside("linear-1", "linear", 0.7)
    beside("late", "late-concat", 0.4)
    beside("other", "mmbt", 0.9)
    beside("other-data", "main-only", 0.9, data={"train": "x", "val": "x", "test": "x"})
    beside("unfinished", "main-only", 0.9)
    (tmp_path / "unfinished" / "metrics.json").unlink()
    beside("damaged", "main-only", 0.9)
    (tmp_path / "damaged" / "metrics.json").write_text("{")
    found = find_baselines(RunFolder(tmp_path / "mine"), "test", "accuracy")
    assert [(one.what, one.scores) for one in found] == [
        ("logistic regression on tiny:vision and tiny:text", (0.5, 0.7)),
        ("late-concat with tiny:vision and tiny:text", (0.4,)),
    ]  # fmt: skip
    text = Page(str(run_baselines.baselines(facts_of(tmp_path / "mine", baselines=found)).body)).text
    assert "mean of 2 runs" in text and "60.0 %" in text and "No simpler method" not in text


def test_runs_of_the_same_study_are_baselines(trained: Path, tmp_path: Path) -> None:
    rows = [Made("full", {}, [0.6], {}), Made("simple", {"method": "linear"}, [0.5], {})]
    study = make_study(trained, tmp_path / "made", rows)
    found = find_baselines(RunFolder(study / "cells/row-0/seed-0"), "test", "accuracy")
    assert [one.scores for one in found] == [(0.5,)]
    change(study, 1, state="stopped")
    assert find_baselines(RunFolder(study / "cells/row-0/seed-0"), "test", "accuracy") == ()


def test_a_warm_start_is_compared_with_its_initial_regression(run: Path) -> None:
    facts = facts_of(run)
    config = facts.config.model_copy(update={"warm_start": "linear"})
    log = [{"step": 0, "val": {"accuracy": 0.5}}, {"step": 2, "val": {"accuracy": 0.75}}]
    text = Page(str(run_baselines.baselines(replace(facts, config=config, log=log)).body)).text
    assert "Step 0 is a logistic regression" in text
    assert "Its accuracy on validation was 50.0 %; that of step 2 is 75.0 %" in text
    table = [{"name": "MLP on main and comp", "score": 0.5, "loss": 1.0}, {"name": "one", "score": 0.25, "loss": 1.0}]
    facts = replace(facts, config=config, log=log, result={**facts.result, "start": {"samples": 1234, "baselines": table}})
    text = Page(str(run_baselines.baselines(facts).body)).text
    assert "on 1,234 held-out samples: MLP on main and comp 50.0 %, one 25.0 %." in text
    read = {"name": "cross-attention", "score": 0.625, "best_other": 0.5}
    for best, expected in (("cross-attention", "It is step 0."), ("one", "so step 0 is one.")):
        start = {**facts.result["start"], "best": best, "cross_attention": read}
        text = Page(str(run_baselines.baselines(replace(facts, result={**facts.result, "start": start})).body)).text
        assert "Cross-attention: 62.5 % on validation, the best of the others 50.0 %." in text and expected in text
    text = Page(str(run_baselines.baselines(replace(facts, step=0)).body)).text
    assert "Its accuracy on validation is 50.0 %. No later step was better by more than noise" in text
    facts = facts_of(run)
    assert "Training started from" not in Page(str(run_baselines.baselines(replace(facts, log=log)).body)).text

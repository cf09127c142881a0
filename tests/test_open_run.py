"""A run is opened in one way, with its model, its data set and the split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import call
from test_layers import FILES, name_of

from mopefuse.errors import CheckpointError, ConfigError, DataError
from mopefuse.runs.load import open_run

LOAD_A_MODEL_WITHOUT_DATA = {"training.swap", "export.export", "inference.load_model", "inference.run_model"}
HAVE_THE_DATA = {"autofit.finish", "autofit.tryouts", "evaluation.rerank"}


def test_code_that_needs_model_and_data_uses_open_run() -> None:
    users = {name_of(file) for file in FILES if "load_model(" in file.read_text() and name_of(file) != "runs.load"}
    assert users == LOAD_A_MODEL_WITHOUT_DATA | HAVE_THE_DATA
    users = {name_of(file) for file in FILES if "open_run(" in file.read_text()} - {"runs.load"}
    evaluations = {f"evaluation.{name}" for name in ("evaluate", "audit", "candidates", "missing_modalities", "rerank")}
    assert users == {*evaluations, "report.run_report"}


def test_the_split_defaults_to_test_or_validation(trained: Path, pairs: Path, tmp_path: Path) -> None:
    opened = open_run(trained, device="cpu")
    assert (opened.split, opened.folder.path, str(opened.device)) == ("test", trained, "cpu")
    assert opened.step == json.loads((trained / "metrics.json").read_text())["selected_step"]
    assert not opened.model.training and opened.data.labels == tuple(opened.manifest["labels"])
    assert open_run(trained, "val", device="cpu").split == "val"
    assert open_run(trained, None, device="cpu").split == "test"
    copy = shutil.copytree(pairs, tmp_path / "copy")
    (copy / "test.jsonl").unlink()
    opened = open_run(trained, None, copy, device="cpu")
    assert opened.split == "val" and Path(str(opened.data.root)) == copy
    with pytest.raises(DataError, match="test"):
        open_run(trained, "test", copy, device="cpu")


def test_an_adapter_can_be_opened_only_with_data(trained: Path, pairs: Path, tmp_path: Path) -> None:
    assert call("export", trained, "--format", "adapter", "-o", tmp_path / "adapter").returncode == 0
    assert open_run(tmp_path / "adapter", data=pairs, device="cpu").step is None
    with pytest.raises(ConfigError, match="no data set was given"):
        open_run(tmp_path / "adapter", device="cpu")
    with pytest.raises(CheckpointError, match="run not found"):
        open_run(tmp_path / "nowhere", device="cpu")

"""Training: exact resume after any interruption, the same results with several processes, and selection on validation only."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PLAIN, make_pairs, matrix, plain_config
from forks import end_of, fork, has_ended

from mopefuse.core.tensor_files import read_tensors
from mopefuse.errors import ConfigError, DataError, Interrupted, MopefuseError, NumericError
from mopefuse.runs.folder import RunFolder
from mopefuse.training.listener import Listener, Progress
from mopefuse.training.resume import merge_resumed
from mopefuse.training.train import train
from mopefuse.training.trainer import Trainer

BASE: dict[str, Any] = {
    "main": "tiny:vision",
    "comp": "tiny:text",
    "seed": 5,
    "device": "cpu",
    "prompts": {"static": 2, "dynamic": 2, "experts": 4},
    "train": {"epochs": 3, "batch_size": 6, "lr": 1e-2, "log_every": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs") / "data", counts={"train": 20, "val": 7, "test": 5})


def config(data: Path, /, **changed: Any) -> Any:
    values = json.loads(json.dumps(BASE)) | {"data": {"path": str(data)}}
    for path, value in changed.items():
        section, _, key = path.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return plain_config(values)


class StopAt(Listener):
    """Request a stop in the middle of a step, as Ctrl-C and SIGTERM do."""

    def __init__(self, step: int, number: int) -> None:
        self.at, self.number, self.losses = step, number, []

    def on_step(self, progress: Progress, total: int, loss: float, lr: float) -> None:
        self.losses.append(loss)
        if progress.step == self.at:
            os.kill(os.getpid(), self.number)


def weights(run: Path) -> dict[str, torch.Tensor]:
    path, _ = RunFolder(run).checkpoint("last")
    return read_tensors(path / "weights.safetensors") | {
        f"optimizer/{k}": v for k, v in read_tensors(path / "optimizer.safetensors").items()
    }


def log(run: Path) -> list[dict[str, Any]]:
    return RunFolder(run).read_log()


def assert_same_run(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert log(one) == log(other)
    assert (one / "predictions.jsonl").read_text() == (other / "predictions.jsonl").read_text()


AUGMENTED = {"data__augment": "randaugment", "comp_tuning__mode": "prompts"}


@pytest.mark.parametrize(
    "changed", matrix([{}, AUGMENTED, {"router__kind": "joint", "train__accumulate": 2}], [AUGMENTED]), ids=str
)
@pytest.mark.parametrize(
    ("step", "number", "code"),
    [
        (1, signal.SIGINT, 130),
        (5, signal.SIGTERM, 143),
        pytest.param(4, signal.SIGINT, 130, marks=pytest.mark.matrix),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    data: Path, tmp_path: Path, changed: dict[str, Any], step: int, number: int, code: int
) -> None:
    settings = config(data, **changed)
    train(settings, tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"step {step} of 12") as stopped:
        train(settings, tmp_path / "parts", listener=StopAt(step, number))
    assert stopped.value.exit_code == code
    assert weights(tmp_path / "parts").keys() == weights(tmp_path / "whole").keys()
    assert not (tmp_path / "parts" / "metrics.json").exists()
    train(settings, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    losses = [line["loss"] for line in log(tmp_path / "whole") if "loss" in line]
    assert len(set(losses)) == 12, "otherwise the test could not show a difference"


def test_the_number_of_workers_does_not_affect_the_result(data: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        train(config(data, data__augment="randaugment", data__workers=workers), tmp_path / str(workers))
    assert_same_run(tmp_path / "0", tmp_path / "2")


def test_ctrl_c_during_the_final_test_loses_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(data), tmp_path / "whole")
    with monkeypatch.context() as now:
        now.setattr(Trainer, "test", lambda trainer: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted, match="its checkpoint has been saved") as stopped:
            train(config(data), tmp_path / "parts")
    assert (stopped.value.exit_code, stopped.value.fix) == (130, "continue with --resume")
    train(config(data), tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def start_fork(settings: Any, run: Path) -> int:
    """Train in a forked child and return its process id. Its exit code is 0 if training finished."""
    return fork(lambda: train(settings, run, resume=True))


def test_a_child_that_fails_shows_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    child = start_fork(config(tmp_path / "nowhere"), tmp_path / "run")
    assert end_of(child) == 4
    printed = capfd.readouterr().err
    assert "Traceback" in printed and "DataError" in printed


def wait_for_lines(file: Path, count: int, child: int) -> None:
    """Wait until a file has this many lines, or the process has ended, so that the speed of the machine does not matter."""
    while not has_ended(child):
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)


@pytest.mark.soak
def test_a_run_killed_at_random_moments_and_resumed_is_equal_bit_for_bit(data: Path, tmp_path: Path) -> None:
    settings = config(data, train__epochs=15, train__evals_per_epoch=2, data__augment="flip", train__checkpoint_every=1)
    train(settings, tmp_path / "whole")
    moments = random.Random(0)
    kills_by_step = []
    for _ in range(200):
        child = start_fork(settings, tmp_path / "parts")
        if len(kills_by_step) < 25:
            wait_for_lines(tmp_path / "parts" / "metrics.jsonl", (kills_by_step or [0])[-1] + moments.randint(0, 4), child)
            time.sleep(moments.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
        status = end_of(child)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills_by_step.append(len(log(tmp_path / "parts")))
    assert len(kills_by_step) >= 10, "it finished before it could be killed often enough"
    assert len(set(kills_by_step)) >= 4, "the kills did not hit different moments of training"
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def command(data: Path, out: Path, *more: str) -> list[str]:
    sets = ["prompts.static=2", "prompts.dynamic=2", "prompts.experts=4", "train.log_every=1"]
    return [
        *("train", "--main", "tiny:vision", "--comp", "tiny:text", "--data", str(data), "--out", str(out), "--device", "cpu"),
        *("--epochs", "2", "--batch", "9", "--lr", "0.01", "--seed", "5", *PLAIN),
        *(argument for setting in sets for argument in ("--set", setting)),
        *more,
    ]


def test_the_checkpoint_is_selected_on_validation_and_never_on_test(data: Path, tmp_path: Path) -> None:
    result = train(config(data, train__evals_per_epoch=2), tmp_path / "run")
    validated = {line["step"]: line["val"]["accuracy"] for line in log(tmp_path / "run") if "val" in line}
    best = max(validated.values())
    assert result["selected_step"] == min(step for step, value in validated.items() if value == best)
    assert result["metrics"]["val"]["accuracy"] == best
    assert len(validated) == 6
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    accuracy = sum(row["label"] == row["true"] for row in rows) / len(rows)
    assert result["metrics"]["test"]["accuracy"] == pytest.approx(accuracy)
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4) for row in rows)


def test_patience_stops_training_early_also_after_resuming(data: Path, tmp_path: Path) -> None:
    settings = config(data, train__patience=1, train__epochs=50, train__lr=1e-6)
    result = train(settings, tmp_path / "run")
    assert result["steps"] < 50 * 4
    again = train(settings, tmp_path / "run", resume=True)
    assert again["steps"] == result["steps"]


def test_multi_label_training_reports_three_f1_scores_and_predicted_labels(tmp_path: Path) -> None:
    data = make_pairs(tmp_path / "data", multi=True)
    result = train(config(data), tmp_path / "run")
    assert {"f1_micro", "f1_macro", "f1_samples"} <= result["metrics"]["test"].keys()
    for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["labels"] == [label for label, p in row["probabilities"].items() if p >= 0.5]


def test_a_finished_run_is_not_trained_again_until_it_is_given_more_epochs(data: Path, tmp_path: Path) -> None:
    class Notices(Listener):
        def __init__(self) -> None:
            self.texts: list[str] = []

        def on_notice(self, text: str) -> None:
            self.texts.append(text)

    train(config(data), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.json").read_text()
    notices = Notices()
    train(config(data), tmp_path / "run", resume=True, listener=notices)
    assert any("already finished at step 12" in text for text in notices.texts)
    assert (tmp_path / "run" / "metrics.json").read_text() == before
    more = train(config(data, train__epochs=4, train__lr=1e-2), tmp_path / "run", resume=True, listener=notices)
    assert more["steps"] == 16
    assert any("train.epochs: 3 -> 4" in text for text in notices.texts)


def finished_after(data: Path, run: Path, first: dict[str, Any], then: dict[str, Any]) -> tuple[int, list[str]]:
    """Train, resume with other settings; return the steps of the resumed run, and its notices about steps."""
    notices: list[str] = []
    listener = Listener()
    listener.on_notice = notices.append  # type: ignore[method-assign]
    train(config(data, **first), run)
    result = train(config(data, **first, **then), run, resume=True, listener=listener)
    return result["steps"], [text for text in notices if text.startswith(("--steps", "already"))]


def test_more_steps_than_the_epochs_allow_name_the_flag_that_adds_steps(data: Path, tmp_path: Path) -> None:
    """4 steps per epoch: both --steps and --epochs are limits."""
    steps, notices = finished_after(data, tmp_path / "a", {"train__epochs": 1}, {"train__max_steps": 10})
    assert steps == 4
    assert notices == [
        "--steps 10 is never reached: --epochs 1 ends after 4 steps; raise --epochs to 3",
        "already finished at step 4; raise --epochs to continue",
    ]
    both = {"train__epochs": 1, "train__max_steps": 4}
    assert finished_after(data, tmp_path / "b", both, {}) == (
        4,
        ["already finished at step 4; raise --epochs and --steps to continue"],
    )
    cut = {"train__epochs": 3, "train__max_steps": 2}
    assert finished_after(data, tmp_path / "c", cut, {}) == (2, ["already finished at step 2; raise --steps to continue"])


def test_a_new_run_warns_if_steps_exceed_the_epochs(data: Path, tmp_path: Path) -> None:
    for settings, warnings in (({"train__max_steps": 20}, 1), ({"train__max_steps": 12}, 0), ({}, 0)):
        notices: list[str] = []
        listener = Listener()
        listener.on_notice = notices.append  # type: ignore[method-assign]
        result = train(config(data, **settings), tmp_path / str(settings.get("train__max_steps")), listener=listener)
        assert result["steps"] == 12
        assert sum(text.startswith("--steps 20 is never reached: --epochs 3 ends after 12") for text in notices) == warnings


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"seed": 6}, "seed"), ({"prompts__experts": 5}, "experts"), ({"train__lr": 1.0}, "lr"), ({"main": "tiny:text"}, "main")],
)
def test_a_resumed_run_cannot_become_another(data: Path, changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        merge_resumed(config(data), config(data, **changed))


def test_a_run_cannot_be_resumed_with_other_data(data: Path, tmp_path: Path) -> None:
    copy = make_pairs(tmp_path / "data")
    with pytest.raises(Interrupted):
        train(config(copy), tmp_path / "run", listener=StopAt(1, signal.SIGINT))
    with (copy / "val.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="have changed since the run began"):
        train(config(copy), tmp_path / "run", resume=True)


def test_a_run_cannot_be_resumed_with_other_encoder_weights(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(config(data), tmp_path / "run", listener=StopAt(1, signal.SIGINT))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    manifest["encoders"]["main"]["fingerprint"] = "0" * 16
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MopefuseError, match="not those that the run was trained with") as refused:
        train(config(data), tmp_path / "run", resume=True)
    assert refused.value.exit_code == 6


def test_a_run_cannot_be_resumed_with_labels_in_another_order(tmp_path: Path) -> None:
    data = make_pairs(tmp_path / "data")
    (data / "labels.txt").write_text("a\nb\nc\n")
    with pytest.raises(Interrupted):
        train(config(data), tmp_path / "run", listener=StopAt(1, signal.SIGINT))
    (data / "labels.txt").write_text("b\na\nc\n")
    with pytest.raises(DataError, match="have changed since the run began"):
        train(config(data), tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["labels"] == ["a", "b", "c"]


def test_a_model_that_diverged_in_the_last_step_is_never_selected(data: Path, tmp_path: Path) -> None:
    """The loss of the last step was finite, but the resulting weights are not."""
    with pytest.raises(NumericError, match="not finite on") as refused:
        train(config(data, train__lr=1e20, train__max_steps=1), tmp_path / "run")
    assert refused.value.exit_code == 8
    assert RunFolder(tmp_path / "run").best_step() is None
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulation_equals_the_whole_batch_at_once(data: Path, tmp_path: Path, parts: int) -> None:
    """This includes the importance loss, which uses the load of the whole batch, as a part alone is never balanced."""
    still = {"router__noise": False, "prompts__dropout": 0.0, "router__importance_weight": 10.0, "train__max_steps": 3}
    train(config(data, **still), tmp_path / "whole")
    train(config(data, **still, train__accumulate=parts), tmp_path / "parts")
    whole, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in (name for name in whole if name.endswith("exp_avg")):
        difference = (whole[name] - other[name]).norm() / whole[name].norm().clamp(min=1e-9)
        assert difference < 1e-3, f"{name}: {difference:.1e}"
    for a, b in zip(log(tmp_path / "whole"), log(tmp_path / "parts"), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4)


@pytest.mark.process
def test_a_group_signal_does_not_kill_the_data_workers(data: Path, tmp_path: Path) -> None:
    """systemd and SLURM signal every process of a job."""
    arguments = command(data, tmp_path / "run", "--workers", "2", "--epochs", "500")
    process = subprocess.Popen(
        [sys.executable, "-m", "mopefuse", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    while process.poll() is None and len(log(tmp_path / "run")) < 5:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "stopped: at step" in stderr
    assert RunFolder(tmp_path / "run").latest() is not None


def test_a_log_of_a_killed_run_without_a_checkpoint_is_not_appended_to(data: Path, tmp_path: Path) -> None:
    child = start_fork(config(data, train__epochs=2000), tmp_path / "run")
    while not any(line["step"] >= 2 for line in log(tmp_path / "run")):
        assert not has_ended(child), "training failed"
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(config(data, train__epochs=2000, train__max_steps=3), tmp_path / "run", resume=True)
    steps = [line["step"] for line in log(tmp_path / "run") if "loss" in line]
    assert steps == [1, 2, 3]


def test_validation_logs_expert_usage_and_warns_of_collapse_once(data: Path, tmp_path: Path) -> None:
    """A collapsed router gives a notice."""
    train(config(data), tmp_path / "run")
    routing = [line["routing"] for line in log(tmp_path / "run") if "val" in line]
    assert len(routing) == 3
    assert all(0 < found["entropy"] <= 1 and 0 <= found["unused_share"] < 1 for found in routing)
    for found in routing:
        assert len(found["usage"]) == 4 and {round(sum(row), 3) for row in found["usage"]} == {1.0}


def test_settings_that_a_method_does_not_use_are_reported(data: Path, tmp_path: Path) -> None:
    class Notices(Listener):
        def __init__(self) -> None:
            self.texts: list[str] = []

        def on_notice(self, text: str) -> None:
            self.texts.append(text)

    notices = Notices()
    train(config(data, method="late-concat", prompts__experts=3), tmp_path / "run", listener=notices)
    assert [text for text in notices.texts if "settings" in text] == ["late-concat does not use the settings of prompts"]


def test_the_saved_configuration_is_complete(data: Path, tmp_path: Path) -> None:
    values = {key: value for key, value in BASE.items() if key != "prompts"} | {"data": {"path": str(data)}}
    values["train"] = {"epochs": 1}
    train(plain_config(values), tmp_path / "run")
    saved = RunFolder(tmp_path / "run").config()
    assert (saved.prompts.static, saved.prompts.dynamic) == (6, 6)
    assert saved.prompts.init == pytest.approx((6 / (3 * 4**2 + 96)) ** 0.5)
    assert (saved.train.lr, saved.train.lr_comp) == (4e-4, 5e-4)


def test_each_side_has_its_own_learning_rate(data: Path, tmp_path: Path) -> None:
    settings = config(data, comp_tuning__mode="prompts", train__lr=1e-2, train__lr_comp=1e-9, train__weight_decay=0.0)
    train(settings, tmp_path / "slow")
    train(config(data, comp_tuning__mode="prompts", train__lr=1e-2, train__weight_decay=0.0), tmp_path / "same")
    spread = {}
    for name in ("slow", "same"):
        state = weights(tmp_path / name)
        spread[name] = state["comp_stack.layers.0.gate_H"].abs().max()
    assert spread["slow"] < 1e-6 < spread["same"]


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    """After the data are fixed, the same command runs: there is nothing to lose or to resume."""
    data = make_pairs(tmp_path / "data")
    image = (data / "images" / "train-3.png").read_bytes()
    (data / "images" / "train-3.png").unlink()
    with pytest.raises(DataError, match=r"train-3\.png"):
        train(config(data), tmp_path / "run")
    (data / "images" / "train-3.png").write_bytes(image)
    for name, resume in (("run", False), ("other", True)):
        if resume:
            shutil.copytree(tmp_path / "run", tmp_path / name)
            shutil.rmtree(tmp_path / name / "checkpoints")
            (tmp_path / name / "metrics.json").unlink()
        train(config(data), tmp_path / name, resume=resume)
        assert [line["step"] for line in log(tmp_path / name) if "loss" in line] == [1, 2, 3, 4, 5, 6]

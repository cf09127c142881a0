"""The command line as users see it: exit codes, one line per error, only JSON on stdout with --json, reproducible results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import COUNTS, TINY, call, make_pairs, run_cli, write_rows
from typer.testing import CliRunner

from mopefuse.cli.app import app
from mopefuse.core import atomic_files, doctor
from mopefuse.core.tensor_files import read_tensors

MODULES = "print(*sys.modules, file=sys.stderr)"


def modules_of(*args: object) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run a command in a separate process and return the modules that it imported."""
    code = f"import sys\nsys.argv[0] = 'mopefuse'\nfrom mopefuse.cli.app import main\ntry: main()\nfinally: {MODULES}"
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)
    return done, set(done.stderr.splitlines()[-1].split())


def train(data: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return call("train", *TINY, "--data", data, "--out", out, "--steps", "2", *more)


def stdout_json(done: subprocess.CompletedProcess[str]) -> Any:
    """Parse stdout as a single JSON value."""
    return json.loads(done.stdout)


# -- what is imported


@pytest.mark.parametrize("args", [("--help",), ("train", "--help"), ("eval", "--help"), ("--version",), ("encoders",)])
def test_help_and_lists_import_no_heavy_library(args: tuple[str, ...]) -> None:
    done, modules = modules_of(*args)
    assert done.returncode == 0
    assert done.stdout
    heavy = {"torchvision", "timm", "transformers", "open_clip", "sklearn", "peft", "optuna"}
    heavy |= {"mopefuse.encoders.tiny"}
    if args[0] not in ("train", "eval"):  # whose help comes from the schema
        heavy |= {"mopefuse.config.schema"}
    if args != ("encoders",):
        heavy |= {"torch", "numpy"}
    assert not modules & heavy


@pytest.mark.process
def test_a_run_imports_no_library_that_its_encoders_do_not_need(pairs: Path) -> None:
    done, modules = modules_of("train", *TINY, "--data", str(pairs), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not modules & {"torchvision", "timm", "transformers", "open_clip", "sklearn", "torch._dynamo", "peft"}


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("train", "--main", "x:y", "--comp", "x:y", "--set", "train.epochs=-1"), 3),
        (("train", "--main", "x:y", "--comp", "x:y", "--set", "train.epoch=1"), 3),
        (("train", "--comp", "x:y"), 3),
        (("train", "--resume"), 3),
        (("train", "--recipe", "nowhere.yaml"), 3),
        (("eval", "nowhere"), 6),
        (("eval", "nowhere", "--split", "tset"), 3),
    ],
)
def test_obvious_mistakes_are_errors_before_torch_is_imported(args: tuple[str, ...], code: int) -> None:
    done, modules = modules_of(*args)
    assert done.returncode == code
    assert "error[MF-" in done.stderr
    assert "torch" not in modules


# -- exit codes and messages


@pytest.mark.parametrize(
    ("args", "code", "start"),
    [
        (("fly",), 2, "Usage"),
        (("train", "--epochs", "many"), 2, "Usage"),
        (("train", *TINY, "--set", "train.lr"), 3, "error[MF-CFG-05]"),
        (("encoders", "inspect", "tiny:visoin"), 5, "error[MF-ENC-51]"),
        (("eval", "{tmp}"), 6, "error[MF-CKPT-04]"),
    ],
)
def test_a_process_ends_with_the_exit_code_of_its_error(tmp_path: Path, args: tuple[str, ...], code: int, start: str) -> None:
    done = run_cli(*(arg.format(tmp=tmp_path) for arg in args))
    assert done.returncode == code
    assert done.stderr.startswith(start)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_an_error_is_one_line_with_what_where_and_fix(tmp_path: Path) -> None:
    done = call("train", *TINY, "--set", "trian.lr=1")
    assert done.stderr == "error[MF-CFG-06]: unknown setting trian · --set trian.lr · fix: did you mean train?\n"


@pytest.mark.parametrize(
    ("args", "code", "number"),
    [
        (("train", *TINY, "--set", "train.lrr=1"), "MF-CFG-06", 3),
        (("train", *TINY, "--data", "nowhere"), "MF-DATA-01", 4),
        (("encoders", "inspect", "tiny:x"), "MF-ENC-51", 5),
        (("eval", "nowhere"), "MF-CKPT-04", 6),
        (("fly",), "MF-USE-01", 2),
    ],
)
def test_with_json_an_error_is_one_object_and_nothing_else(
    args: tuple[str, ...], code: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*args, "--json")
    assert done.returncode == number
    value = stdout_json(done)
    assert value["ok"] is False
    assert value["error"].keys() == {"code", "exit", "message", "where", "hint"}
    assert (value["error"]["code"], value["error"]["exit"]) == (code, number)


def test_a_bug_is_one_line_and_a_log_with_the_traceback_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "examine", broken)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOPEFUSE_DEBUG", "")
    done = call("doctor")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("internal error: RuntimeError: two · ")
    assert "in broken" in (tmp_path / "crash.log").read_text()
    assert "Traceback" in call("--debug", "doctor").stderr
    assert stdout_json(call("doctor", "--json"))["error"]["code"] == "MF-INT-00"


@pytest.mark.parametrize(
    ("error", "code"), [(MemoryError(), 7), (OSError(28, "No space left"), 7), (PermissionError(13, "denied", "x"), 3)]
)
def test_a_lack_of_system_resources_is_not_a_bug(error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr(doctor, "examine", broken)
    done = call("doctor")
    assert done.returncode == code
    assert done.stderr.startswith("error[MF-")


# -- train


def test_training_writes_a_run_and_prints_its_result(trained: Path, pairs: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "checkpoints", "config.yaml", "manifest.json", "metrics.json", "metrics.jsonl", "predictions.jsonl",
    }  # fmt: skip
    result = json.loads((trained / "metrics.json").read_text())
    assert (result["steps"], result["rows"]) == (2, {"train": 12, "val": 6, "test": 7})
    rows = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"test-{i}" for i in range(7)]


def test_train_json_is_one_object(multi_pairs: Path, tmp_path: Path) -> None:
    done = train(multi_pairs, tmp_path / "run", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert {"f1_micro", "f1_macro", "f1_samples"} <= stdout_json(done)["metrics"].keys()


@pytest.mark.parametrize(
    ("name", "counts", "batch"),
    [
        ("batch of one", {"train": 3, "val": 2, "test": 2}, 1),
        ("last batch of one", {"train": 5, "val": 5, "test": 5}, 4),
        ("batch larger than the data", {"train": 3, "val": 1, "test": 1}, 64),
    ],
)
def test_any_batch_size_trains_and_counts_every_sample_once(
    tmp_path: Path, name: str, counts: dict[str, int], batch: int
) -> None:
    data = make_pairs(tmp_path / "data", counts=counts)
    done = call("train", *TINY, "--data", data, "--out", tmp_path / "run", "--batch", batch, "--epochs", 1, "--json")
    assert done.returncode == 0, done.stderr
    result = stdout_json(done)
    assert result["steps"] == -(-counts["train"] // batch)
    assert sum(row["support"] for row in result["per_label"]) == counts["test"]


def test_without_any_prompt_it_trains_a_linear_probe(pairs: Path, tmp_path: Path) -> None:
    done = train(pairs, tmp_path / "run", "--static", 0, "--dynamic", 0, "--mapped", 0, "--json")
    assert done.returncode == 0, done.stderr
    assert [part for part, number in stdout_json(done)["parameters"]["by_part"].items() if number] == ["head"]


def test_a_loss_that_is_not_finite_stops_training_and_is_never_selected(pairs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("--set", "train.schedule=constant", "--set", "train.checkpoint_every=1", "--set", "train.log_every=1")
    done = call("train", *TINY, "--data", pairs, "--out", run, "--epochs", 9, "--lr", 1e20, *settings)
    assert done.returncode == 8
    assert "error[MF-NUM-01]: loss is" in done.stderr
    facts = json.loads((run / "nonfinite.json").read_text())
    assert facts["ids"]
    assert facts["lr"] == 1e20
    last = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    assert last == facts["step"] - 1
    kept = read_tensors(run / "checkpoints" / f"step-{last}" / "weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert call("eval", run, "--checkpoint", "last").returncode == 8, "finite weights of 1e20 do not give finite predictions"
    best = run / "checkpoints" / "best"
    assert not best.exists() or int(best.read_text().strip()[5:]) < facts["step"]
    assert "NaN" not in (run / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("more", "code"), [((), 3), (("--overwrite", "--resume"), 3), (("--overwrite",), 0), (("--resume",), 0)]
)
def test_an_existing_run_is_overwritten_only_on_request(
    trained: Path, pairs: Path, tmp_path: Path, more: tuple[str, ...], code: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = train(pairs, run, *more)
    assert done.returncode == code, done.stderr
    if code:
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    if more == ("--resume",):
        assert "already finished at step 2" in done.stderr


def test_a_dry_run_writes_nothing(pairs: Path, tmp_path: Path) -> None:
    done = train(pairs, tmp_path / "run", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert stdout_json(done)["rows"] == {"train": 12, "val": 6, "test": 7}
    assert list(tmp_path.iterdir()) == []


def test_bad_data_is_an_error_that_lists_every_line(tmp_path: Path) -> None:
    data = make_pairs(tmp_path / "data")
    write_rows(data / "train.jsonl", [{"id": 1, "text": None, "img": "a", "label": "a"}, []])
    done = train(data, tmp_path / "run")
    assert done.returncode == 4
    assert "2 bad rows: train.jsonl:1 text is null, expected a string" in done.stderr
    assert "; train.jsonl:2 is a list" in done.stderr


def test_a_missing_image_is_an_error_with_its_row(tmp_path: Path) -> None:
    data = make_pairs(tmp_path / "data")
    (data / "images" / "train-7.png").unlink()
    done = train(data, tmp_path / "run")
    assert done.returncode == 4
    assert "image not found: images/train-7.png · train.jsonl:8, id train-7 · fix: add the file" in done.stderr


# -- eval


def test_eval_is_deterministic_and_equals_the_metrics_of_training(trained: Path, tmp_path: Path) -> None:
    done = [call("eval", trained, "--out", tmp_path / f"{i}.jsonl", "--json") for i in range(2)]
    one, two = stdout_json(done[0]), stdout_json(done[1])
    assert one.pop("predictions") != two.pop("predictions")
    assert one == two
    assert one["metrics"] == json.loads((trained / "metrics.json").read_text())["metrics"]["test"]
    contents = {(tmp_path / f"{i}.jsonl").read_bytes() for i in range(2)}
    assert contents == {(trained / "predictions.jsonl").read_bytes()}


def test_eval_on_changed_data_says_so_and_keeps_the_predictions_of_the_run(pairs: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(pairs, data)
    assert call("train", *TINY, "--method", "linear", "--data", data, "--out", run).returncode == 0
    before = (run / "predictions.jsonl").read_bytes()
    assert "have changed" not in call("eval", run).stderr
    with (data / "test.jsonl").open("a") as table:
        table.write(json.dumps({"id": "new", "text": "t", "img": "images/test-0.png", "label": "a"}) + "\n")
    done = call("eval", run, "--json")
    assert "the test data have changed since the run was trained" in done.stderr
    assert (run / "predictions.jsonl").read_bytes() == before
    other = run / "predictions-test-changed.jsonl"
    assert stdout_json(done)["predictions"] == str(other) and len(other.read_text().splitlines()) == COUNTS["test"] + 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_any_split_can_be_evaluated(trained: Path, split: str, tmp_path: Path) -> None:
    done = call("eval", trained, "--split", split, "--out", tmp_path / "p.jsonl", "--json")
    assert (done.returncode, stdout_json(done)["split"]) == (0, split)


def test_a_gate_passes_if_it_is_met_and_fails_otherwise(trained: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "p.jsonl")
    assert call("eval", trained, *out, "--min", "accuracy=0").returncode == 0
    done = call("eval", trained, *out, "--min", "accuracy=0", "--min", "f1_macro=1.01")
    assert done.returncode == 10
    assert done.stderr.startswith("error[MF-GATE-01]: f1_macro is ")
    assert "accuracy" in done.stdout
    done = call("eval", trained, *out, "--min", "f1_macro=1.01", "--json")
    assert done.returncode == 10
    assert stdout_json(done)["ok"] is False
    assert stdout_json(done)["error"]["code"] == "MF-GATE-01"
    assert "accuracy" in stdout_json(done)["metrics"]


@pytest.mark.parametrize("gate", ["accuracy", "accuracy=", "accuracy=much", "acuracy=0.5"])
def test_a_malformed_gate_is_a_configuration_error(trained: Path, tmp_path: Path, gate: str) -> None:
    done = call("eval", trained, "--out", tmp_path / "p.jsonl", "--min", gate)
    assert done.returncode == 3
    assert "accuracy" in done.stderr


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (("--device", "gpu"), 3),
        (("--device", "cuda:99"), 3),
        (("--out", "/dev/null/p.jsonl"), 3),
        (("--out", "{tmp}"), 3),
        (("--checkpoint", "step-99"), 6),
        (("--data", "{tmp}"), 4),
    ],
)
def test_eval_refuses_invalid_options(trained: Path, tmp_path: Path, more: tuple[str, ...], code: int) -> None:
    done = call("eval", trained, *(arg.format(tmp=tmp_path) for arg in more))
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error[MF-")


def test_ctrl_c_in_eval_leaves_no_partial_file(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def interrupted(path: Path) -> None:  # the file is written but not yet renamed into place
        written.append(path.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_files, "sync", interrupted)
    done = call("eval", trained, "--out", tmp_path / "p.jsonl")
    assert written
    assert (done.returncode, done.stdout) == (130, "")
    assert list(tmp_path.iterdir()) == []


# -- other commands


def test_encoders_are_listed_and_inspected() -> None:
    listed = stdout_json(call("encoders", "--json"))
    assert {"timm", "hf", "open_clip", "tiny"} <= {scheme["scheme"] for scheme in listed["schemes"]}
    facts = stdout_json(call("encoders", "inspect", "tiny:vision", "--json"))
    assert (facts["modality"], facts["layers"]) == ("image", len(facts["widths"]))
    assert facts["use"] == "main or comp"
    plain = call("encoders", "inspect", "tiny:vision").stdout
    assert f"fingerprint    {facts['fingerprint']}" in plain


def test_generated_data_depend_only_on_the_seed(tmp_path: Path) -> None:
    done = call("data", "make", "digit-question", tmp_path / "a")
    assert done.returncode == 3
    assert "digit-questions" in done.stderr
    assert call("data", "make", "digit-questions", tmp_path / "a", "--seed", "-1").returncode == 2


def test_doctor_reports_what_works_and_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_problems_of", lambda *plugin: [])  # depends on what is installed here; see test_plugins.py
    monkeypatch.setattr(doctor, "_DEVICES", "print('cpu')")
    monkeypatch.setattr(doctor, "_CHECKS", {"json": ("import json", "json is broken")})
    done = call("doctor", "--json")
    found = stdout_json(done)
    assert (done.returncode, found["ok"], found["problems"]) == (0, True, [])
    assert found["machine"]["json"] == "works"
    assert found["machine"]["devices"] == "cpu"
    assert found["plugins"]["encoders: tiny"] == "mopefuse"
    checks = {"exit": ("import os; os._exit(3)", "a"), "raise": ("import no_such_module", "b"), "hang": ("while 1: pass", "c")}
    monkeypatch.setattr(doctor, "_CHECKS", checks)
    monkeypatch.setattr(doctor, "_TIMEOUT", 1)
    done = call("doctor")
    assert done.returncode == 5
    missing = "b (ModuleNotFoundError: No module named 'no_such_module')"
    for problem in ("a (exit code 3)", missing, "c (no result within 1 seconds)"):
        assert f"problem: {problem}" in done.stdout


def test_tensorboard_logs_into_a_new_run(pairs: Path, tmp_path: Path) -> None:
    done = train(pairs, tmp_path / "run", "--tensorboard")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


def test_a_dry_run_shows_encoder_inputs_and_trainable_parameters(pairs: Path) -> None:
    done = call("train", *TINY, "--data", pairs, "--dry-run")
    assert done.returncode == 0, done.stderr
    seen = ("tiny:vision  (image, 16 x 16)", "tiny:text  (text, truncated to 32 tokens)")
    assert [line for line in (*seen, "prompt experts", "estimated memory") if line not in done.stdout] == []
    found = stdout_json(call("train", *TINY, "--data", pairs, "--dry-run", "--json"))
    assert found["ok"] is True
    assert found["parameters"]["trainable"] == sum(found["parameters"]["by_part"].values())
    assert not [value for value in found["config"]["prompts"].values() if value is None], "every default is written out"


@pytest.mark.parametrize("group", [(), ("data",), ("encoders",), ("plugins",), ("bench",)])
def test_no_help_text_is_truncated_at_80_columns(group: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, commands = CliRunner().invoke(app, [*group, "--help"]).stdout.split("Commands:\n")
    assert len(commands.splitlines()) > 1 and "..." not in commands

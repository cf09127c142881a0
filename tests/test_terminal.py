"""Output in every environment: terminals of any width, pipes, closed readers, encodings, and a stopped training run."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, call, run_cli


def train(data: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return call("train", *TINY, "--data", data, "--out", out, "--steps", "2", *more)


def stdout_json(done: subprocess.CompletedProcess[str]) -> Any:
    """Parse stdout as a single JSON value."""
    return json.loads(done.stdout)


def test_a_reader_that_stops_reading_is_not_an_error(trained: Path) -> None:
    for args in (("encoders",), ("--help",)):
        process = subprocess.Popen(
            [sys.executable, "-m", "mopefuse", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() in (0, 141)


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"COLUMNS": "20", "TERM": "dumb", "NO_COLOR": "1"},
    ],
    ids=["C locale", "ascii", "latin-1", "narrow and dumb"],
)
def test_an_error_is_readable_everywhere(environment: dict[str, str]) -> None:
    done = run_cli("train", "--recipe", "日本.yaml", **environment)
    assert done.returncode == 3
    assert done.stderr.startswith("error[MF-CFG-03]: recipe not found: ")
    assert "Traceback" not in done.stderr
    assert "\ufffd" not in done.stderr
    done = run_cli("train", "--recipe", "日本.yaml", "--json", **environment)
    assert "日本" in stdout_json(done)["error"]["message"] or "\\udc" in done.stdout


def test_labels_that_the_terminal_cannot_show_are_escaped(trained: Path, tmp_path: Path) -> None:
    code = (
        "from mopefuse.cli import app; from mopefuse.cli._render import table\n"
        "app.app = lambda: table('', ['日'], [['é']])\n"
        "app.main()"
    )
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=ascii_only, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, [":", "\\u65e5", "\\xe9"])


def in_terminal(*args: str, **environment: str) -> str:
    """Return what a command shows in a terminal."""
    here, there = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mopefuse", *args], stdout=there, stderr=there, env=os.environ | environment
    )
    os.close(there)
    shown = b""
    while select.select([here], [], [], 60)[0]:
        try:
            more = os.read(here, 65536)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        shown += more
    os.close(here)
    assert process.wait() == 0
    return shown.decode()


@pytest.mark.parametrize(
    "environment",
    [{"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb", "PYTHONIOENCODING": "ascii"}],
    ids=["dumb", "no colour", "ascii"],
)
def test_output_fits_a_terminal_of_twenty_columns(environment: dict[str, str]) -> None:
    shown = in_terminal("encoders", COLUMNS="20", **environment)
    assert "open_clip" in "".join(shown.split()) or "open_c" in shown
    assert "\x1b[3" not in shown, "colour although it is disabled"
    if "PYTHONIOENCODING" in environment:
        assert shown.isascii()


def test_output_to_a_pipe_has_no_control_characters(pairs: Path, tmp_path: Path) -> None:
    done = train(pairs, tmp_path / "run")
    assert "\x1b" not in done.stdout + done.stderr
    assert "validation" in done.stderr
    assert "accuracy" in done.stdout


def test_a_stopped_run_prints_the_resume_command_and_resumes(pairs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def stop() -> None:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:  # the first step is made
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    done = call("train", *TINY, "--data", pairs, "--out", run, "--epochs", 100_000)
    stopper.join()
    assert done.returncode == 143
    message = r"^stopped: at step (\d+) of 300000, its checkpoint has been saved · fix: continue with --resume$"
    step = re.search(message, done.stderr, re.MULTILINE)
    assert step, done.stderr
    assert (run / "checkpoints" / f"step-{step[1]}" / "manifest.json").exists()
    assert not (run / ".lock").exists()
    done = call("train", *TINY, "--data", pairs, "--out", run, "--resume", "--steps", int(step[1]) + 1)
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {step[1]}" in done.stderr

"""Shared fixtures and helpers: tiny data sets in the native format, a trained run, and two ways to call the command line."""

from __future__ import annotations

import atexit
import functools
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import typer.main
from chromium import BROWSER, Chromium
from filelock import FileLock
from hypothesis import settings
from PIL import Image
from warm import Server

from mopefuse.config.schema import RunConfig, build_config
from mopefuse.errors import MopefuseError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MOPEFUSE_FLUSH_DENORMALS", "0")  # commands run in this process, and hypothesis draws such numbers
_CACHE = tempfile.TemporaryDirectory(prefix="mopefuse-cache-")
os.environ["MOPEFUSE_CACHE"] = _CACHE.name  # of all tests, and gone with them
typer.main.get_command = functools.cache(typer.main.get_command)  # otherwise every `call` builds all commands anew
os.fsync = lambda file: None  # no test outlives the machine, and some disks take long
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: threads of several workers slow each other many times over
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job of the background, and what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

pytest.register_assert_rewrite("artefact_cases", "families", "plugin_cases")  # modules of helpers with fixtures

LABELS = ("a", "b", "c")
COUNTS = {"train": 12, "val": 6, "test": 7}
PLAIN = ("--compat", "paper", "--gate", "zero", "--set", "head_norm=layer")
"""Gated prompts in every layer, without warm start, FiLM and a head on all features, for tests of anything but these."""
PLAIN_SETTINGS = {"compat": "paper", "prompts.gate": "zero", "head_norm": "layer"}
"""The same, by dotted path."""
TINY = ("--main", "tiny:vision", "--comp", "tiny:text", "--device", "cpu", "--experts", "2", "--batch", "4", *PLAIN)

Cli = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU if there is none."""
    for item in items if not torch.cuda.is_available() else ():
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def matrix(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Parametrize with all values, of which the quick tier runs only those in `quick`."""
    cases = list(cases)
    assert all(case in cases for case in quick), "a value in `quick` is not among the values"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.matrix) for case in cases]


def thinned(rows: Iterable[tuple[Any, ...]], step: int) -> list[Any]:
    """Parametrize with rows of several names, of which the quick tier runs every `step`-th."""
    marks = pytest.mark.matrix
    return [row if number % step == 0 else pytest.param(*row, marks=marks) for number, row in enumerate(rows)]


def plain_config(values: dict[str, Any]) -> RunConfig:
    """Build the configuration of a run with the settings of `PLAIN`, unless `values` has others."""
    prompts = {"gate": "zero", **values.get("prompts", {})}
    return build_config({"compat": "paper", "head_norm": "layer", **values, "prompts": prompts})


def make_pairs(root: Path, *, multi: bool = False, counts: dict[str, int] = COUNTS) -> Path:
    """Make a data set of 16 x 16 images and short texts; every label occurs in every split."""
    rng = np.random.default_rng(7)
    (root / "images").mkdir(parents=True)
    for split, count in counts.items():
        rows = []
        for i in range(count):
            image = f"images/{split}-{i}.png"
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / image)
            label: Any = [name for bit, name in enumerate(LABELS) if (i + 1) >> bit & 1] if multi else LABELS[i % 3]
            colour = ("red", "green", "blue")[i % 3]
            rows.append({"id": f"{split}-{i}", "text": f"what is the {colour} digit", "img": image, "label": label})
        write_rows(root / f"{split}.jsonl", rows)
    return root


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write one JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-label data set; tests must not change it."""
    return make_pairs(tmp_path_factory.mktemp("data") / "single")


@pytest.fixture(scope="session")
def multi_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multi-label data set; tests must not change it."""
    return make_pairs(tmp_path_factory.mktemp("data") / "multi", multi=True)


@pytest.fixture(scope="session")
def trained(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on `pairs`; tests must not change it."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    done = call("train", *TINY, "--data", pairs, "--out", run, "--steps", "2")
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="session")
def reported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `trained` with its report; tests must not change it."""
    from mopefuse.report.run_report import report

    copy = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("missing-*"))
    report(copy, device="cpu")
    return copy


@pytest.fixture(scope="session")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX bundle of `trained`, with routing; tests must not change it. It takes many seconds, so all workers share one."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = root / "exported" / "bundle"
    with FileLock(root / "exported.lock"):
        if not out.exists():
            done = call("export", trained, "-o", out, "--routing")
            assert done.returncode == 0, done.stderr
    return out


@contextmanager
def short_start() -> Iterator[None]:
    """Fit each model of a warm start once and in few steps, for tests of anything but the start: otherwise it takes seconds.

    It holds for trainings in this process.
    """
    with pytest.MonkeyPatch.context() as changes:
        changes.setattr("mopefuse.fusion.baselines._MANY_HELD_OUT", 1)  # no cross-validation
        changes.setattr("mopefuse.fusion.mlp_fit._STEPS", (20, 20_000))
        changes.setattr("mopefuse.fusion.token_reader_fit._STEPS", (20, 10_000))
        yield


@pytest.fixture(scope="module")
def short_starts() -> Iterator[None]:
    """`short_start` for all tests of a module, and for its fixtures that use this one."""
    with short_start():
        yield


def code_of(action: Callable[[], object]) -> str:
    """Return the code of the error that an action raises, empty if it raises none. Any other exception is passed on."""
    try:
        action()
    except MopefuseError as error:
        return error.code
    return ""


@functools.cache
def warm_server() -> Server:
    """Forks processes; started by the first test that needs it."""
    server = Server()
    atexit.register(server.close)
    return server


def run_cli(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a separate process, with these variables in its environment.

    It is forked from one that has imported the libraries, unless a variable may be one that Python or a library reads when it
    starts.
    """
    if any(name != "PYTHONPATH" and not name.startswith("MOPEFUSE_") for name in environment):
        return start_cli(*args, **environment)
    return warm_server().run(["-m", "mopefuse", *map(str, args)], [environment], timeout=120)


def start_cli(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a newly started Python process."""
    return subprocess.run(
        [sys.executable, "-m", "mopefuse", *map(str, args)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | environment,
        timeout=120,
        check=False,
    )


def call(*args: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process: the same `main`, without the seconds for importing torch."""
    from mopefuse.cli.app import main

    command = ["mopefuse", *map(str, args)]
    out, err, code = io.StringIO(), io.StringIO(), None
    with patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
    assert isinstance(code, int), "the command line always ends with an exit code"
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def ranks(
    processes: int, *arguments: object, program: Sequence[str] = ("-m", "mopefuse"), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Do the same as `torchrun` without its launcher, in processes forked from one that has imported the libraries.

    Args:
        environment: more variables of the processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    shared |= {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment for rank in range(processes)]
    return warm_server().run([*program, *map(str, arguments)], environments)


def torchrun(
    processes: int, *arguments: str, program: Sequence[str] = ("-m", "mopefuse")
) -> subprocess.CompletedProcess[str]:
    """Run the command line, or another program, in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, *program, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if BROWSER is None:
        pytest.skip("there is no Chromium to look at the page with: apt-get install chromium")
    chromium = Chromium(tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()

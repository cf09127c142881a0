"""Irregular files are rejected immediately wherever a run is read: nothing waits for the other end of a pipe."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import call, matrix

from mopefuse.core.regular_files import open_regular, read_regular


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.mkdir()


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


KINDS = [as_pipe, as_folder, as_device, as_dangling_link]


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """Interrupts and fails a test that waits for a pipe."""

    def wake(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


READERS: dict[str, Callable[[Path, Path], list[object]]] = {
    "eval": lambda run, other: ["eval", run],
    "compare": lambda run, other: ["compare", run, other, "--against", run],
    "report": lambda run, other: ["report", run, "--no-audit"],
    "resume": lambda run, other: ["train", "--resume", "--out", run, "--steps", "3"],
    "adapter": lambda run, other: ["export", run, "--format", "adapter", "-o", run.with_name("adapter")],
}
READ_BY = {
    "config.yaml": READERS.keys(),
    "manifest.json": READERS.keys(),
    "metrics.json": ("compare", "report", "resume"),
    "metrics.jsonl": ("report", "resume"),
    "predictions.jsonl": ("compare",),
    "checkpoints/best": ("eval", "adapter"),
    "checkpoints/step-2/manifest.json": ("eval", "report", "resume"),
    "checkpoints/step-2/weights.safetensors": ("eval", "report", "resume"),
}


@pytest.mark.parametrize("put", matrix(KINDS, list(KINDS)[:1]), ids=lambda put: put.__name__)
@pytest.mark.parametrize("name", READ_BY)
def test_a_run_with_an_irregular_file_is_refused(
    trained: Path, tmp_path: Path, name: str, put: Callable[[Path], None]
) -> None:
    for reader in READ_BY[name]:
        run = tmp_path / reader / "run"
        shutil.copytree(trained, run)
        other = run.with_name("other")
        shutil.copytree(trained, other)
        (run / name).unlink()
        put(run / name)
        if put is as_dangling_link and name in ("metrics.jsonl", "metrics.json"):
            continue  # as if the run had no log yet, or were not finished
        done = call(*READERS[reader](run, other))
        assert done.returncode in (3, 6), f"{reader}: {done.stderr}"
        assert "Traceback" not in done.stderr and "fix: " in done.stderr


@pytest.mark.parametrize("put", KINDS, ids=lambda put: put.__name__)
@pytest.mark.parametrize("command", [("train", "--recipe"), ("study",)], ids=" ".join)
def test_a_recipe_or_study_that_is_not_a_file_is_refused(
    tmp_path: Path, command: tuple[str, ...], put: Callable[[Path], None]
) -> None:
    put(tmp_path / "settings.yaml")
    done = call(*command, tmp_path / "settings.yaml", "--out", tmp_path / "out")
    assert (done.returncode, "MF-CFG-03" in done.stderr) == (3, True), done.stderr


def test_a_lock_that_is_a_pipe_is_taken_over(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    os.mkfifo(tmp_path / "run" / ".lock")
    assert call("train", "--resume", "--out", tmp_path / "run", "--steps", "3").returncode == 0


@pytest.mark.parametrize("put", KINDS, ids=lambda put: put.__name__)
def test_only_regular_files_are_opened(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "file")
    with pytest.raises(OSError, match=r"regular file|folder|No such file"):
        open_regular(tmp_path / "file")


def test_a_socket_is_not_opened_and_a_link_to_a_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(Path("socket"))
    Path("file").write_bytes(b"content")
    Path("link").symlink_to("file")
    assert read_regular(Path("link")) == b"content"


def test_a_file_that_becomes_a_pipe_while_it_is_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"content")
    status = (tmp_path / "file").stat()
    (tmp_path / "file").unlink()
    os.mkfifo(tmp_path / "file")
    open_files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    monkeypatch.setattr(os, "stat", lambda path: status)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "file")
    assert not open_files or len(os.listdir("/proc/self/fd")) == open_files

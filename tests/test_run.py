"""The folder of a run: who may write to it, what it stores, and what it returns."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from test_checkpoint import save, started

from mopefuse.config.schema import build_config
from mopefuse.core.atomic_files import start_time
from mopefuse.core.folder_lock import FolderLock
from mopefuse.errors import CheckpointError, ConfigError, ResourceError
from mopefuse.runs.folder import RunFolder

CONFIG = build_config({"main": "tiny:vision", "comp": "tiny:text"})
Write = Callable[[Path], None]


# -- a run's folder
def test_preparing_an_absent_or_empty_folder_succeeds_and_is_idempotent(tmp_path: Path) -> None:
    for path in (tmp_path / "deep" / "run", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        run = RunFolder(path)
        run.prepare(resume=False, overwrite=False)
        run.lock()
        run.prepare(resume=False, overwrite=False)
        assert run.checkpoints.is_dir()
        assert not run.exists()


def test_a_folder_with_a_run_is_refused_and_not_changed(tmp_path: Path) -> None:
    save(started(tmp_path / "run"), 1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="not empty") as caught:
        RunFolder(tmp_path / "run").prepare(resume=False, overwrite=False)
    assert caught.value.code == "MF-CFG-23"
    assert "--resume" in caught.value.fix
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_folder_that_is_not_a_run_is_neither_deleted_nor_written_to(tmp_path: Path, flag: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not a mopefuse run") as caught:
        RunFolder(tmp_path).prepare(resume=flag == "resume", overwrite=flag == "overwrite")
    assert (caught.value.code, caught.value.where) == ("MF-CFG-22", f"--{flag}")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwrite_empties_a_run_even_through_a_link(tmp_path: Path) -> None:
    save(started(tmp_path / "run"), 1, best=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    RunFolder(tmp_path / "alias").prepare(resume=False, overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]
    assert (tmp_path / "alias").is_symlink()
    assert (tmp_path / "precious").is_dir()


def test_overwrite_and_resume_together_are_refused(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    with pytest.raises(ConfigError, match="contradict"):
        run.prepare(resume=True, overwrite=True)
    assert run.exists()


def test_an_unwritable_folder_is_an_early_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not writable") as caught:
        RunFolder(tmp_path / "file" / "run").prepare(resume=False, overwrite=False)
    assert caught.value.code == "MF-CFG-21"


def test_a_read_only_folder_is_an_error(tmp_path: Path) -> None:
    """As a user who is subject to permissions, unlike root."""
    tmp_path.chmod(0o755)
    (tmp_path / "run").mkdir(mode=0o555)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from mopefuse.runs.folder import RunFolder; from mopefuse.errors import ConfigError\n"
        "run = RunFolder(Path('run'))\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "try: run.prepare(resume=False, overwrite=False)\n"
        "except ConfigError as error: print(error.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "MF-CFG-21"


# -- the lock


def lock_of(run: RunFolder, pid: int, host: str = "") -> None:
    (run.path / ".lock").write_text(json.dumps({"pid": pid, "host": host or socket.gethostname()}))


def test_every_writing_method_respects_the_lock_of_a_running_process(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    lock_of(run, os.getppid())
    with pytest.raises(ConfigError, match=f"process {os.getppid()} on {socket.gethostname()}") as caught:
        run.lock()
    assert caught.value.code == "MF-CFG-24"
    for resume in (True, False):
        with pytest.raises(ConfigError, match="is already writing to this run"):
            run.prepare(resume=resume, overwrite=not resume)
    assert run.exists()


def test_the_lock_of_another_machine_is_respected(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    lock_of(run, 1, "elsewhere")
    with pytest.raises(ConfigError, match="on elsewhere") as caught:
        run.lock()
    assert ".lock" in caught.value.fix


def test_the_lock_of_a_dead_process_is_taken_over_with_a_notice(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid in (gone.pid, os.getpid()):  # process ids repeat: the first process of every container has the same one
        lock_of(run, pid)
        assert str(pid) in run.lock()
        run.unlock()
    assert run.lock() == ""


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "1"}', '{"pid": true, "host": "x"}'])
def test_a_damaged_lock_is_taken_over(tmp_path: Path, content: str) -> None:
    run = started(tmp_path / "run")
    (run.path / ".lock").write_text(content)
    assert "took over" in run.lock()


def test_a_lock_that_was_just_created_is_waited_for(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    (run.path / ".lock").touch()
    owner = threading.Timer(0.02, lambda: lock_of(run, os.getppid()))
    owner.start()
    with pytest.raises(ConfigError, match="is already writing to this run"):
        run.lock()
    owner.join()


def test_locking_removes_leftovers_of_a_killed_process(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    (run.checkpoints / f"step-9.tmp-{os.getpid()}").mkdir()
    (run.path / f"config.yaml.tmp-{os.getpid()}").touch()
    run.lock()
    assert not [path for path in run.path.rglob("*") if ".tmp-" in path.name]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_finished_by_another_process_before_locking_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    run = RunFolder(tmp_path / "run")
    take = FolderLock.take

    def late(lock: FolderLock) -> str:
        save(started(run.path), 1)
        return take(lock)

    monkeypatch.setattr(FolderLock, "take", late)
    if overwrite:
        run.claim(resume=False, overwrite=True)
        assert not run.exists() and run._lock.is_ours()
    else:
        with pytest.raises(ConfigError, match="not empty"):
            run.claim(resume=False, overwrite=False)
        assert run.exists() and not run._lock.file.exists()


# -- configuration, log, checkpoints


def test_a_run_returns_its_configuration(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    assert run.config() == CONFIG
    assert run.manifest()["labels"] == ["a"]
    with pytest.raises(CheckpointError, match="is not a run"):
        RunFolder(tmp_path).config()


def test_the_log_is_rewound_to_a_step_without_an_incomplete_last_line(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    for step in (1, 2, 3, 4):
        run.log({"step": step, "loss": float("nan") if step == 1 else 0.5})
    with run.log_file.open("ab") as file:
        file.write(b'{"step": 5, "lo\xc3')
    assert [line["step"] for line in run.read_log()] == [1, 2, 3, 4]
    assert run.read_log()[0]["loss"] is None
    run.rewind_log(2)
    assert [line["step"] for line in run.read_log()] == [1, 2]
    run.log({"step": 3})
    assert [line["step"] for line in run.read_log()] == [1, 2, 3]


@pytest.mark.parametrize("line", ["3", '"x"', "{}", '{"step": "1"}', "null"])
def test_a_log_is_read_up_to_the_first_foreign_line(tmp_path: Path, line: str) -> None:
    run = started(tmp_path / "run")
    run.log_file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    run.rewind_log(9)
    assert [line["step"] for line in run.read_log()] == [1]


def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    for step in (2, 9, 10, 11):
        save(run, step, best=step == 9)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["best", "step-11", "step-9"]
    assert [run.checkpoint(which)[1]["step"] for which in ("best", "last", "step-9")] == [9, 11, 9]


def test_the_newest_checkpoint_has_the_highest_step_regardless_of_file_times(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    save(run, 9, best=True)
    save(run, 10)
    os.utime(run.checkpoints / "step-9", (2**31, 2**31))
    latest = run.latest()
    assert latest is not None
    assert latest[1]["step"] == 10


def test_a_damaged_newest_checkpoint_is_skipped_on_resume_and_an_error_if_requested(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    save(run, 1, best=True)
    save(run, 2)
    (run.checkpoints / "step-2" / "weights.safetensors").write_bytes(b"x")
    latest = run.latest()
    assert latest is not None
    assert latest[1]["step"] == 1
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        run.checkpoint("last")


@pytest.mark.parametrize("which", ["step-7", "best", "last", "../checkpoints/step-1", "", "step-01", "step-²"])
def test_a_missing_checkpoint_is_an_error_that_names_existing_ones(tmp_path: Path, which: str) -> None:
    run = started(tmp_path / "run")
    if which not in ("best", "last"):
        save(run, 1)
    with pytest.raises(CheckpointError, match="checkpoint not found") as caught:
        run.checkpoint(which)
    assert ("step-1" if which not in ("best", "last") else "train the run") in caught.value.fix


def test_a_damaged_best_file_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    save(run, 1)
    (run.checkpoints / "best").write_bytes(b"\xff\n")
    with pytest.raises(CheckpointError, match="best is damaged"):
        run.checkpoint("best")


def test_the_lock_of_a_zombie_process_is_taken_over(tmp_path: Path) -> None:
    """As in a container whose first process does not reap orphans: the process id remains, as a zombie."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    folder = RunFolder(tmp_path / "run")
    folder.prepare(resume=False, overwrite=False)
    owner = {"pid": process.pid, "host": socket.gethostname(), "born": start_time(process.pid)}
    (tmp_path / "run" / ".lock").write_text(json.dumps(owner))
    with pytest.raises(ConfigError, match="is already writing to this run"):
        folder.lock()
    os.kill(process.pid, signal.SIGKILL)
    assert str(process.pid) in folder.lock()
    process.wait()


def test_a_reused_process_id_is_not_mistaken_for_the_owner(tmp_path: Path) -> None:
    if not start_time(os.getpid()):
        pytest.skip("this system does not say when a process began")
    folder = RunFolder(tmp_path / "run")
    folder.prepare(resume=False, overwrite=False)
    owner = {"pid": os.getppid(), "host": socket.gethostname(), "born": "1"}
    (tmp_path / "run" / ".lock").write_text(json.dumps(owner))
    assert "took over" in folder.lock()


_CONTENDER = """
import sys, time
from pathlib import Path
from mopefuse.core import folder_lock
from mopefuse.errors import ConfigError
raise_if_locked = folder_lock.FolderLock.raise_if_locked
def slowly(self):
    owner = raise_if_locked(self)
    time.sleep(0.3)
    return owner
folder_lock.FolderLock.raise_if_locked = slowly
print("ready", flush=True)
sys.stdin.readline()
try:
    folder_lock.FolderLock(Path(sys.argv[1])).take()
    print("has it", flush=True)
except ConfigError as error:
    print(error.code, flush=True)
sys.stdin.readline()
"""


def test_only_one_of_several_processes_takes_over_a_stale_lock(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock_of(started(tmp_path / "run"), gone.pid)
    command = [sys.executable, "-c", _CONTENDER, str(tmp_path / "run")]
    contenders = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outcomes = []
    for _ in range(2):  # all are ready, then all have tried to lock
        for each in contenders:
            assert each.stdout is not None
            outcomes.append(each.stdout.readline().strip())
        for each in contenders:
            assert each.stdin is not None
            each.stdin.write("\n")
            each.stdin.flush()
    for each in contenders:
        each.communicate(timeout=60)
    assert sorted(outcomes) == ["MF-CFG-24", "MF-CFG-24", "has it", "ready", "ready", "ready"]


# -- a folder that disappears while it is written to


def locked(path: Path) -> RunFolder:
    run = started(path)
    run.lock()
    return run


WRITES = {"log": lambda run: run.log({"step": 1}), "save": lambda run: save(run, 1)}


@pytest.mark.parametrize("write", WRITES)
def test_a_removed_folder_is_an_error_and_not_recreated(tmp_path: Path, write: str) -> None:
    run = locked(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ResourceError, match="the run folder is gone") as caught:
        WRITES[write](run)
    assert (caught.value.code, caught.value.exit_code) == ("MF-RES-251", 7)
    run.unlock()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("write", WRITES)
def test_a_folder_taken_over_by_another_process_is_not_changed(tmp_path: Path, write: str) -> None:
    run = locked(tmp_path / "run")
    lock_of(run, os.getppid())
    with pytest.raises(ResourceError, match="another process has taken over"):
        WRITES[write](run)
    run.unlock()
    assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getppid(), "it belongs to another process"


# -- a process that ends before the folder is a run


def test_leftovers_of_an_unfinished_start_do_not_block_a_new_run(tmp_path: Path) -> None:
    """After a kill between configuration and manifest, the lock shows that the files belong to mopefuse."""
    run = RunFolder(tmp_path / "run")
    run.prepare(resume=False, overwrite=False)
    run.lock()
    run.config_file.write_text("half")
    run.save_initial_weights(lambda folder: None, {})
    (tmp_path / "run" / "manifest.json.tmp-1").touch()
    again = RunFolder(tmp_path / "run")
    again.prepare(resume=False, overwrite=False)
    with pytest.raises(ConfigError, match="interrupted before its initial weights were saved") as caught:
        again.prepare(resume=True, overwrite=False)
    assert "swap-encoder" in caught.value.fix
    (tmp_path / "run" / ".lock").unlink()
    with pytest.raises(ConfigError, match="not empty"):
        again.prepare(resume=False, overwrite=False)


def test_an_error_before_the_folder_is_a_run_does_not_block_a_new_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.prepare(resume=False, overwrite=False)
    run.lock()
    run.config_file.write_text("half")
    run.abandon()
    run.unlock()
    assert not [*run.path.iterdir()], "nor any other command that needs an empty folder"
    run.prepare(resume=False, overwrite=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_a_run_is_not_removed_as_leftovers(tmp_path: Path) -> None:
    run = locked(tmp_path / "run")
    run.abandon()
    assert run.config() == CONFIG

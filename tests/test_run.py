"""The folder of a run and what is published into it: whole or not at all, only ours, and never a pickle."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import code_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mopefuse import checkpoint
from mopefuse.checkpoint import FORMAT, publish, read_json, read_tensors, sweep, verify, write_atomically, write_tensors
from mopefuse.config import build_config
from mopefuse.errors import CheckpointError, ConfigError, ResourceError
from mopefuse.run import RunFolder

CONFIG = build_config({"main": "tiny:vision", "comp": "tiny:text"})
Write = Callable[[Path], None]


def writes(content: str = "content") -> Write:
    return lambda folder: (folder / "file").write_text(content) and None


def published(folder: Path, content: str = "content") -> Path:
    publish(folder, writes(content), {"kind": "thing"})
    return folder


def started(path: Path) -> RunFolder:
    run = RunFolder(path)
    run.prepare(resume=False, overwrite=False)
    run.start(CONFIG, {"labels": ["a"]})
    return run


def save(run: RunFolder, step: int, *, best: bool = False) -> None:
    run.save(step, lambda folder: write_tensors(folder / "weights.safetensors", {"step": torch.tensor(step)}), {})
    if best:
        run.set_best(step)


def refused(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        verify(folder, kind="thing")
    return caught.value


def change_manifest(folder: Path, **changed: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(read_json(folder / "manifest.json") | changed))


# -- published whole


def test_what_is_published_is_verified_with_its_facts(tmp_path: Path) -> None:
    publish(tmp_path / "a", writes(), {"kind": "thing", "number": 3})
    manifest = verify(tmp_path / "a", kind="thing")
    assert (manifest["number"], manifest["format"], list(manifest["files"])) == (3, FORMAT, ["file"])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_publishing_again_replaces(tmp_path: Path) -> None:
    published(tmp_path / "a", "old")
    published(tmp_path / "a", "new")
    verify(tmp_path / "a", kind="thing")
    assert (tmp_path / "a" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from mopefuse import checkpoint
at, folder = sys.argv[1], Path(sys.argv[2])
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
rename = Path.rename
def renamed(self, target):
    if at == "first rename" or (at == "second rename" and ".tmp-old-" not in str(target)):
        die()
    return rename(self, target)
Path.rename = renamed
def write(temporary):
    (temporary / "file").write_text("new")
    if at == "write":
        die()
checkpoint.publish(folder, write, {"kind": "thing"})
"""


@pytest.mark.parametrize("at", ["write", "first rename", "second rename"])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_kill_while_publishing_leaves_what_was_there(tmp_path: Path, at: str, before: str | None) -> None:
    folder = tmp_path / "a"
    if before:
        published(folder, before)
    done = subprocess.run([sys.executable, "-c", _KILLED, at, str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert any(".tmp-" in path.name for path in tmp_path.iterdir()), "it was killed too late to show anything"
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if before else [])
    if before:
        verify(folder, kind="thing")
        assert (folder / "file").read_text() == before


_LOOP = """
import sys
from pathlib import Path
from mopefuse.run import RunFolder
run = RunFolder(Path(sys.argv[1]))
for step in range(1, 10**6):
    run.save(step, lambda folder: (folder / "file").write_bytes(b"x" * 50_000), {})
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_of_a_save_loop_leaves_the_newest_whole(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    for moment in range(5):
        process = subprocess.Popen([sys.executable, "-c", _LOOP, str(run.path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "1"
        time.sleep(0.0037 * moment)
        process.kill()
        told = [1, *map(int, process.stdout.read().split())]
        process.wait()
        run.lock()
        latest = run.latest()
        assert latest is not None
        assert latest[1]["step"] in (told[-1], told[-1] + 1)
        assert not list(run.checkpoints.glob("*.tmp-*"))
        run.unlock()
        for path in run.checkpoints.glob("step-*"):  # the next loop begins at step 1
            path.rename(tmp_path / f"{moment}-{path.name}")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_told_with_what_is_free_and_keeps_what_was_there(tmp_path: Path, code: int) -> None:
    published(tmp_path / "a", "old")

    def write(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise OSError(code, os.strerror(code))

    with pytest.raises(ResourceError, match=rf"cannot write a: {os.strerror(code)} \(free [\d.]+ MB\)") as caught:
        publish(tmp_path / "a", write, {"kind": "thing"})
    assert ("space" in caught.value.fix) == (code != errno.EIO)
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_tensors_that_cannot_be_written_to_the_end_are_told_in_our_words(tmp_path: Path) -> None:
    """A limit on the size of files fails in the middle of the write, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(ResourceError, match=r"cannot write a: File too large \(free"):
            publish(tmp_path / "a", lambda to: write_tensors(to / "w", {"w": torch.zeros(100_000)}), {"kind": "thing"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_log_or_text_that_cannot_be_written_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(tmp_path / "run")
    run.log_file.mkdir()
    with pytest.raises(ResourceError, match=r"metrics\.jsonl"):
        run.log({"step": 1})
    write_atomically(tmp_path / "text", "old")
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(ResourceError, match="text: No space left"):
        write_atomically(tmp_path / "text", "new")
    assert (tmp_path / "text").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "text"]


def test_sweeping_spares_what_a_living_process_writes_and_what_is_not_ours(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    kept = {f"a.tmp-{os.getppid()}", "notes.tmp-mine", "b", "b.tmp"}
    for name in kept | {f"c.tmp-{gone.pid}", f"d.tmp-{os.getpid()}"}:
        (tmp_path / name).touch()
    assert sweep(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == kept


# -- damaged or tampered with


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = published(tmp_path / "a")
    content = bytearray((folder / "file").read_bytes())
    content[3] ^= 1
    (folder / "file").write_bytes(content)
    error = refused(folder)
    assert (error.code, error.exit_code) == ("MF-CKPT-02", 6)
    assert "file is not what was published" in error.what


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: (a / "file").unlink(), "not what was published"),
        (lambda a: (a / "file").write_text("content and more"), "not what was published"),
        (lambda a: (a / "manifest.json").unlink(), "no manifest.json"),
        (lambda a: (a / "manifest.json").write_text("{"), "damaged"),
        (lambda a: (a / "manifest.json").write_text("[]"), "damaged"),
        (lambda a: (a / "manifest.json").write_bytes(b"\xff"), "damaged"),
        (lambda a: change_manifest(a, kind="other"), "not a thing"),
        (lambda a: change_manifest(a, format="1"), "not a thing"),
        (lambda a: change_manifest(a, format=True), "not a thing"),
        (lambda a: change_manifest(a, files=None), "names no files"),
        (lambda a: change_manifest(a, files={"file": None}), "not what was published"),
        (lambda a: change_manifest(a, files={"file": {"size": 10**10}}), "not what was published"),
        (lambda a: (a / "extra.safetensors").write_text("x"), "extra.safetensors is not in the manifest"),
    ],
)
def test_a_folder_that_is_not_as_published_does_not_exist(tmp_path: Path, change: Callable[[Path], Any], said: str) -> None:
    folder = published(tmp_path / "a")
    change(folder)
    error = refused(folder)
    assert said in error.what
    assert error.exit_code == 6


@pytest.mark.parametrize(
    "name", ["../secret", "x/../../secret", "{out}/secret", "link", "folder/secret", "", ".", "a\0b", "..\\secret"]
)
def test_a_manifest_cannot_name_what_is_outside(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published(tmp_path / "a")
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder").symlink_to(tmp_path)
    facts = {"size": 6, "sha256": checkpoint.sha256(tmp_path / "secret")}
    change_manifest(folder, files={name.format(out=tmp_path): facts})
    monkeypatch.setattr(checkpoint, "sha256", lambda path: pytest.fail(f"{path} was read"))
    assert "outside its folder" in refused(folder).what


def test_a_newer_format_is_told_with_both_numbers(tmp_path: Path) -> None:
    change_manifest(published(tmp_path / "a"), format=FORMAT + 1)
    error = refused(tmp_path / "a")
    assert f"format {FORMAT + 1}" in error.what
    assert f"up to {FORMAT}" in error.what
    assert "upgrade" in error.fix


_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.binary(max_size=100) | st.dictionaries(st.sampled_from(["kind", "format", "files"]), _json_values))
@example({"kind": "thing", "format": 1, "files": {"\ud800": {}}})
@example({"kind": "thing", "format": 1, "files": {"x" * 5000: {}}})
@example(b"[" * 5000)
def test_any_manifest_is_verified_or_refused(
    tmp_path_factory: pytest.TempPathFactory, manifest: bytes | dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-manifest"
    folder.mkdir(exist_ok=True)
    content = manifest if isinstance(manifest, bytes) else json.dumps({"kind": "thing", "format": 1} | manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    assert re.fullmatch(r"|MF-CKPT-\d+", code_of(lambda: verify(folder, kind="thing")))


# -- tensors


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def pickled(value: Any) -> bytes:
    return pickle.dumps(value)


def zipped(value: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value))
    return buffer.getvalue()


@pytest.mark.parametrize("pack", [pickled, zipped])
def test_a_pickle_is_refused_by_its_first_bytes_and_runs_nothing(tmp_path: Path, pack: Callable[[Any], bytes]) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "weights.safetensors").write_bytes(pack(Canary(canary)))
    with pytest.raises(CheckpointError, match="this is a pickle") as caught:
        read_tensors(tmp_path / "weights.safetensors")
    assert caught.value.exit_code == 6
    assert not canary.exists()
    pickle.loads(pickled(Canary(canary)))  # noqa: S301 (the canary sings: the test could have failed)
    assert canary.exists()


@pytest.mark.parametrize("padding", range(0, 256, 8))
def test_no_safetensors_file_is_taken_for_a_pickle(tmp_path: Path, padding: int) -> None:
    """The first byte is the low byte of the header's length, so every multiple of 8 must pass."""
    path, name = tmp_path / "weights.safetensors", "n" * padding
    write_tensors(path, {name: torch.arange(3)})
    assert read_tensors(path)[name].tolist() == [0, 1, 2]


def test_first_bytes_of_all_kinds_were_tried(tmp_path: Path) -> None:
    seen = set()
    for padding in range(0, 256, 8):
        write_tensors(tmp_path / "w", {"n" * padding: torch.arange(3)})
        seen.add((tmp_path / "w").read_bytes()[0])
    assert 0x80 in seen


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:5],
        lambda whole: whole + b"junk",
        lambda whole: b"",
        lambda whole: (200_000_000).to_bytes(8, "little") + whole[8:],
        lambda whole: (2**64 - 1).to_bytes(8, "little") + whole[8:],
        lambda whole: whole.replace(b"[0,24]", b"[8,32]"),
    ],
    ids=["half", "five bytes", "junk at the end", "empty", "200 MB of header", "endless header", "shifted"],
)
def test_damaged_safetensors_are_refused_in_our_words(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {"a": torch.arange(3), "b": torch.ones(2)})
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is damaged"):
        read_tensors(path)


@settings(deadline=None)
@given(st.binary(max_size=120))
@example((24).to_bytes(8, "little") + b'{"a":{"dtype":"I64"}}   ')
@example((2).to_bytes(8, "little") + b"[]")
def test_any_bytes_are_tensors_or_a_checkpoint_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    assert code_of(lambda: read_tensors(path)) in ("", "MF-CKPT-02", "MF-CKPT-06")


def test_tensors_come_back_as_written(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4, 6)[:, ::2], "b": torch.tensor(3, dtype=torch.int64), "c": torch.empty(0)}
    write_tensors(tmp_path / "w", tensors)
    back = read_tensors(tmp_path / "w")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


# -- a run's folder


def test_a_new_run_takes_an_absent_or_empty_folder_and_twice_is_once(tmp_path: Path) -> None:
    for path in (tmp_path / "deep" / "run", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        run = RunFolder(path)
        run.prepare(resume=False, overwrite=False)
        run.lock()
        run.prepare(resume=False, overwrite=False)
        assert run.checkpoints.is_dir()
        assert not run.exists()


def test_a_folder_with_something_in_it_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    started(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="not empty") as caught:
        RunFolder(tmp_path / "run").prepare(resume=False, overwrite=False)
    assert caught.value.code == "MF-CFG-23"
    assert "--resume" in caught.value.fix
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_folder_that_is_not_a_run_is_neither_deleted_nor_written_to(tmp_path: Path, flag: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not a run of mopefuse") as caught:
        RunFolder(tmp_path).prepare(resume=flag == "resume", overwrite=flag == "overwrite")
    assert (caught.value.code, caught.value.where) == ("MF-CFG-22", f"--{flag}")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwrite_empties_a_run_also_behind_a_link(tmp_path: Path) -> None:
    save(started(tmp_path / "run"), 1, best=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    RunFolder(tmp_path / "alias").prepare(resume=False, overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]
    assert (tmp_path / "alias").is_symlink()
    assert (tmp_path / "precious").is_dir()


def test_overwrite_and_resume_contradict_each_other(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    with pytest.raises(ConfigError, match="contradict"):
        run.prepare(resume=True, overwrite=True)
    assert run.exists()


def test_a_folder_that_cannot_be_written_is_told_before_anything_slow(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not writable") as caught:
        RunFolder(tmp_path / "file" / "run").prepare(resume=False, overwrite=False)
    assert caught.value.code == "MF-CFG-21"


def test_a_read_only_folder_is_told(tmp_path: Path) -> None:
    """As somebody whom permissions bind, which root is not."""
    tmp_path.chmod(0o755)
    (tmp_path / "run").mkdir(mode=0o555)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from mopefuse.run import RunFolder; from mopefuse.errors import ConfigError\n"
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


def test_the_lock_of_a_living_process_is_respected_by_all_that_write(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    lock_of(run, os.getppid())
    with pytest.raises(ConfigError, match=f"process {os.getppid()} on {socket.gethostname()}") as caught:
        run.lock()
    assert caught.value.code == "MF-CFG-24"
    for resume in (True, False):
        with pytest.raises(ConfigError, match="is writing this run"):
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
    for pid in (gone.pid, os.getpid()):  # one's own number can come back, as every first process of a container has it
        lock_of(run, pid)
        assert str(pid) in run.lock()
        run.unlock()
    assert run.lock() == ""


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "1"}', '{"pid": true, "host": "x"}'])
def test_a_damaged_lock_is_taken_over(tmp_path: Path, content: str) -> None:
    run = started(tmp_path / "run")
    (run.path / ".lock").write_text(content)
    assert "took over" in run.lock()


def test_a_lock_that_has_just_been_made_is_waited_for(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    (run.path / ".lock").touch()
    owner = threading.Timer(0.02, lambda: lock_of(run, os.getppid()))
    owner.start()
    with pytest.raises(ConfigError, match="is writing this run"):
        run.lock()
    owner.join()


def test_locking_sweeps_what_a_killed_process_left(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    (run.checkpoints / f"step-9.tmp-{os.getpid()}").mkdir()
    (run.path / f"config.yaml.tmp-{os.getpid()}").touch()
    run.lock()
    assert not [path for path in run.path.rglob("*") if ".tmp-" in path.name]


# -- configuration, log, checkpoints


def test_a_run_gives_its_configuration_back(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    assert run.config() == CONFIG
    assert run.manifest()["labels"] == ["a"]
    with pytest.raises(CheckpointError, match="is not a run"):
        RunFolder(tmp_path).config()


def test_the_log_is_rewound_to_a_step_and_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
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
def test_a_log_with_lines_of_somebody_else_is_read_up_to_them(tmp_path: Path, line: str) -> None:
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


def test_the_newest_is_the_one_of_most_steps_whatever_the_clock_says(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    save(run, 9, best=True)
    save(run, 10)
    os.utime(run.checkpoints / "step-9", (2**31, 2**31))
    latest = run.latest()
    assert latest is not None
    assert latest[1]["step"] == 10


def test_a_damaged_newest_is_passed_over_by_resume_and_named_to_who_asks_for_it(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    save(run, 1, best=True)
    save(run, 2)
    (run.checkpoints / "step-2" / "weights.safetensors").write_bytes(b"x")
    latest = run.latest()
    assert latest is not None
    assert latest[1]["step"] == 1
    with pytest.raises(CheckpointError, match="not what was published"):
        run.checkpoint("last")


@pytest.mark.parametrize("which", ["step-7", "best", "last", "../checkpoints/step-1", "", "step-01", "step-²"])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, which: str) -> None:
    run = started(tmp_path / "run")
    if which not in ("best", "last"):
        save(run, 1)
    with pytest.raises(CheckpointError, match="there is no checkpoint") as caught:
        run.checkpoint(which)
    assert ("step-1" if which not in ("best", "last") else "none") in caught.value.fix


def test_a_damaged_best_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    save(run, 1)
    (run.checkpoints / "best").write_bytes(b"\xff\n")
    with pytest.raises(CheckpointError, match="best is damaged"):
        run.checkpoint("best")

"""Artifacts exist completely or not at all, and their content is verified before it is used."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
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

from mopefuse.config.schema import build_config
from mopefuse.core import artifact as checkpoint
from mopefuse.core import atomic_files
from mopefuse.core.artifact import FORMAT, publish, read_json, verify
from mopefuse.core.atomic_files import remove_leftovers, write_atomically
from mopefuse.core.tensor_files import read_tensors, write_tensors
from mopefuse.errors import CheckpointError, ResourceError
from mopefuse.runs.folder import RunFolder

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
    facts = {"mopefuse": "0.1.0", "method": "conditional", "labels": ["a"], "task": {"name": "single-label"}}
    run.start(CONFIG, facts | {"encoders": {}, "data": {}, "plugins": []})
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


# -- atomic publishing


def test_a_published_folder_is_verified_with_its_facts(tmp_path: Path) -> None:
    publish(tmp_path / "a", writes(), {"kind": "thing", "number": 3})
    manifest = verify(tmp_path / "a", kind="thing")
    assert (manifest["number"], manifest["format"], list(manifest["files"])) == (3, FORMAT, ["file"])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_publishing_again_replaces_the_folder(tmp_path: Path) -> None:
    published(tmp_path / "a", "old")
    published(tmp_path / "a", "new")
    verify(tmp_path / "a", kind="thing")
    assert (tmp_path / "a" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from mopefuse.core import artifact as checkpoint
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
def test_a_kill_while_publishing_leaves_the_earlier_folder(tmp_path: Path, at: str, before: str | None) -> None:
    folder = tmp_path / "a"
    if before:
        published(folder, before)
    done = subprocess.run([sys.executable, "-c", _KILLED, at, str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert any(".tmp-" in path.name for path in tmp_path.iterdir()), "the process was killed too late"
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if before else [])
    if before:
        verify(folder, kind="thing")
        assert (folder / "file").read_text() == before


_LOOP = """
import sys
from pathlib import Path
from mopefuse.runs.folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
for step in range(1, 10**6):
    run.save(step, lambda folder: (folder / "file").write_bytes(b"x" * 50_000), {})
    print(step, flush=True)
"""


@pytest.mark.soak
def test_a_kill_at_any_moment_of_a_save_loop_leaves_the_latest_checkpoint_complete(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    for moment in range(5):
        process = subprocess.Popen([sys.executable, "-c", _LOOP, str(run.path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "1"
        time.sleep(0.0037 * moment)
        process.kill()
        steps = [1, *map(int, process.stdout.read().split())]
        process.wait()
        run.lock()
        latest = run.latest()
        assert latest is not None
        assert latest[1]["step"] in (steps[-1], steps[-1] + 1)
        assert not list(run.checkpoints.glob("*.tmp-*"))
        run.unlock()
        for path in run.checkpoints.glob("step-*"):  # the next loop starts at step 1
            path.rename(tmp_path / f"{moment}-{path.name}")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_an_error_with_the_free_space_and_keeps_existing_files(tmp_path: Path, code: int) -> None:
    published(tmp_path / "a", "old")

    def write(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise OSError(code, os.strerror(code))

    with pytest.raises(ResourceError, match=rf"cannot write a: {os.strerror(code)} \(free [\d.]+ MB\)") as caught:
        publish(tmp_path / "a", write, {"kind": "thing"})
    assert ("space" in caught.value.fix) == (code != errno.EIO)
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_tensors_that_cannot_be_written_completely_are_a_resource_error(tmp_path: Path) -> None:
    """A limit on the file size fails in the middle of the write, as a full disk does."""
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
    monkeypatch.setattr(atomic_files, "sync", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(ResourceError, match="text: No space left"):
        write_atomically(tmp_path / "text", "new")
    assert (tmp_path / "text").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "text"]


def test_cleanup_keeps_files_of_running_processes_and_of_users(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    kept = {f"a.tmp-{os.getppid()}", "notes.tmp-mine", "b", "b.tmp"}
    for name in kept | {f"c.tmp-{gone.pid}", f"d.tmp-{os.getpid()}"}:
        (tmp_path / name).touch()
    assert remove_leftovers(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == kept


# -- damaged or tampered with


def test_a_flipped_bit_is_detected(tmp_path: Path) -> None:
    folder = published(tmp_path / "a")
    content = bytearray((folder / "file").read_bytes())
    content[3] ^= 1
    (folder / "file").write_bytes(content)
    error = refused(folder)
    assert (error.code, error.exit_code) == ("MF-CKPT-02", 6)
    assert "file has changed since it was written" in error.what


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a / "file").unlink(), "has changed since it was written"),
        (lambda a: (a / "file").write_text("content and more"), "has changed since it was written"),
        (lambda a: (a / "manifest.json").unlink(), "file not found: manifest.json"),
        (lambda a: (a / "manifest.json").write_text("{"), "damaged"),
        (lambda a: (a / "manifest.json").write_text("[]"), "damaged"),
        (lambda a: (a / "manifest.json").write_bytes(b"\xff"), "damaged"),
        (lambda a: change_manifest(a, kind="other"), "not a mopefuse thing"),
        (lambda a: change_manifest(a, format="1"), "not a mopefuse thing"),
        (lambda a: change_manifest(a, format=True), "not a mopefuse thing"),
        (lambda a: change_manifest(a, files=None), "lists no files"),
        (lambda a: change_manifest(a, files={"file": None}), "has changed since it was written"),
        (lambda a: change_manifest(a, files={"file": {"size": 10**10}}), "has changed since it was written"),
        (lambda a: (a / "extra.safetensors").write_text("x"), "extra.safetensors is not listed in the manifest"),
    ],
)
def test_a_folder_that_differs_from_its_manifest_is_rejected(
    tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    folder = published(tmp_path / "a")
    change(folder)
    error = refused(folder)
    assert message in error.what
    assert error.exit_code == 6


@pytest.mark.parametrize(
    "name", ["../secret", "x/../../secret", "{out}/secret", "link", "folder/secret", "", ".", "a\0b", "..\\secret"]
)
def test_a_manifest_cannot_name_files_outside_the_folder(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published(tmp_path / "a")
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "folder").symlink_to(tmp_path)
    facts = {"size": 6, "sha256": checkpoint.sha256(tmp_path / "secret")}
    change_manifest(folder, files={name.format(out=tmp_path): facts})
    monkeypatch.setattr(checkpoint, "sha256", lambda path: pytest.fail(f"{path} was read"))
    assert "outside its folder" in refused(folder).what


def test_a_newer_format_is_an_error_with_both_versions(tmp_path: Path) -> None:
    change_manifest(published(tmp_path / "a"), format=FORMAT + 1)
    error = refused(tmp_path / "a")
    assert f"format {FORMAT + 1}" in error.what
    assert f"formats up to {FORMAT}" in error.what
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
def test_any_manifest_is_accepted_or_refused_without_a_crash(
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
def test_a_pickle_is_refused_by_its_first_bytes_and_not_executed(tmp_path: Path, pack: Callable[[Any], bytes]) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "weights.safetensors").write_bytes(pack(Canary(canary)))
    with pytest.raises(CheckpointError, match="this is a pickle") as caught:
        read_tensors(tmp_path / "weights.safetensors")
    assert caught.value.exit_code == 6
    assert not canary.exists()
    pickle.loads(pickled(Canary(canary)))  # noqa: S301 (the canary sings: the test could have failed)
    assert canary.exists()


@pytest.mark.parametrize("padding", range(0, 256, 8))
def test_no_safetensors_file_is_mistaken_for_a_pickle(tmp_path: Path, padding: int) -> None:
    """The first byte is the low byte of the header length, so every multiple of 8 must pass."""
    path, name = tmp_path / "weights.safetensors", "n" * padding
    write_tensors(path, {name: torch.arange(3)})
    assert read_tensors(path)[name].tolist() == [0, 1, 2]


def test_the_property_test_covers_first_bytes_of_all_kinds(tmp_path: Path) -> None:
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
def test_damaged_safetensors_are_a_checkpoint_error(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
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


def test_tensors_survive_a_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4, 6)[:, ::2], "b": torch.tensor(3, dtype=torch.int64), "c": torch.empty(0)}
    write_tensors(tmp_path / "w", tensors)
    back = read_tensors(tmp_path / "w")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)

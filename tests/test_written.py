"""Files that commands write: in new folders, with the right permissions, without a network, on a full disk, and without
torch."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, call, run_cli, start_cli
from test_export import reseal

from mopefuse import cli
from mopefuse.core import atomic_files


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """A copy of a bundle that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


# -- without torch


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which torch is not installed."""
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    here = Path(cli.__file__).parents[2]
    return {"PYTHONPATH": f"{tmp_path / 'none'}{os.pathsep}{here}"}


@pytest.mark.process
def test_without_torch_loading_a_run_is_an_error_with_the_package_to_install(
    without_torch: dict[str, str], trained: Path, exported: Path, pairs: Path, tmp_path: Path
) -> None:
    table = pairs / "test.jsonl"
    assert start_cli("predict", exported, table, **without_torch).returncode == 0
    encoders = ("--main", "tiny:vision", "--comp", "tiny:text")
    for command in (("predict", trained, table), ("train", *encoders, "--data", pairs, "--out", tmp_path / "run")):
        done = start_cli(*command, **without_torch)
        assert done.returncode == 5, done.stderr
        assert done.stderr == "error[MF-ENV-01]: torch is not installed · fix: pip install mopefuse\n"


# -- the example of a bundle


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 50], ids=["empty", "cut", "damaged"])
def test_a_damaged_example_image_is_an_error(content: bytes, copy: Path) -> None:
    (copy / "example.png").write_bytes(content)
    reseal(copy)
    done = call("export", "verify", copy)
    assert done.returncode == 6 and "MF-CKPT-02" in done.stderr and "example.png" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        *({"image": path} for path in ("../secret.png", "/etc/passwd")),
        *({"logits": value} for value in ("x", [1.0])),
        *({key: None} for key in ("tolerance", "text")),
    ],
    ids=str,
)
def test_an_invalid_example_is_an_error(change: dict[str, Any], copy: Path, tmp_path: Path) -> None:
    shutil.copy(copy / "example.png", tmp_path / "secret.png")
    example = json.loads((copy / "example.json").read_text())
    example = {key: value for key, value in (example | change).items() if value is not None}
    (copy / "example.json").write_text(json.dumps(example))
    reseal(copy)
    done = call("export", "verify", copy)
    assert done.returncode == 6 and "example" in done.stderr and "Traceback" not in done.stderr


# -- missing folders


def test_missing_parent_folders_are_created(trained: Path, pairs: Path, tmp_path: Path) -> None:
    table, deep = pairs / "test.jsonl", tmp_path / "a" / "b"
    commands: list[tuple[Path, tuple[object, ...]]] = [
        (deep / "1" / "adapter", ("export", trained, "--format", "adapter", "-o")),
        (deep / "2" / "predictions.csv", ("predict", trained, table, "-o")),
        (deep / "3" / "predictions.jsonl", ("eval", trained, "-o")),
        (deep / "4" / "table.md", ("compare", trained, "--format", "markdown", "-o")),
        (deep / "5" / "page.html", ("report", trained, "--out")),
        (deep / "6" / "page.html", ("data", "check", pairs, "--html")),
        (deep / "7" / "page.html", ("data", "preview", pairs, "--out")),
    ]
    for written, command in commands:
        done = call(*command, written)
        assert done.returncode == 0, done.stderr
        assert written.exists()
    (tmp_path / "file").write_text("")
    for written, command in commands:
        done = call(*command, tmp_path / "file" / written.name)
        assert done.returncode == 3 and "MF-CFG-54" in done.stderr, done.stderr
        assert f"{tmp_path / 'file'} is not a folder" in done.stderr


# -- without a network


@pytest.mark.process
@pytest.mark.parametrize(
    "network", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["off", "no way"]
)
def test_a_dry_run_of_push_works_without_a_network(network: dict[str, str], trained: Path) -> None:
    done = run_cli("push", trained, "org/model", "--dry-run", "--json", **network)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "weights.safetensors" in result["files"] and result["private"] and result["url"] is None
    assert "the hub cannot be reached to see whether it exists" in done.stderr
    assert run_cli("push", trained, "org/model", "--yes", **network).returncode == 5
    assert run_cli("push", trained, "no name", "--dry-run", **network).returncode == 3


# -- permissions


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.process
@pytest.mark.usefixtures("umask")
def test_every_file_follows_the_umask(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    assert call("train", *TINY, "--data", pairs, "--out", run, "--steps", "2", "--cache-images").returncode == 0
    for form in ("adapter", "onnx"):
        assert call("export", run, "--format", form, "-o", tmp_path / form).returncode == 0
    assert call("predict", run, pairs / "test.jsonl", "-o", tmp_path / "predictions.csv").returncode == 0
    assert call("report", run).returncode == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".onnx", ".json", ".csv", ".html"}
    assert [(path.name, oct(path.stat().st_mode & 0o777)) for path in files if path.stat().st_mode & 0o777 != 0o640] == []


# -- a full disk


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every atomic write fails as on a full disk."""

    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(atomic_files, "sync", fail)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.process
def test_a_full_disk_is_an_error_with_a_fix_that_fits_the_command(trained: Path, pairs: Path, tmp_path: Path) -> None:
    commands: list[tuple[object, ...]] = [
        ("predict", trained, pairs / "test.jsonl", "-o", tmp_path / "predictions.csv"),
        ("export", trained, "--format", "adapter", "-o", tmp_path / "adapter"),
        ("report", trained, "--out", tmp_path / "page.html"),
        ("eval", trained, "-o", tmp_path / "predictions.jsonl"),
        ("compare", trained, "-o", tmp_path / "table.txt"),
    ]
    for command in commands:
        done = call(*command)
        assert done.returncode == 7 and "MF-RES-01" in done.stderr, done.stderr
        assert "fix: free space, and run the command again" in done.stderr and "--resume" not in done.stderr
    done = call("train", *TINY, "--data", pairs, "--out", tmp_path / "run", "--steps", "2")
    assert done.returncode == 7 and "fix: free space and continue with --resume" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_on_a_full_disk_no_partial_files_are_left(trained: Path, pairs: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"this machine does not let a disk be mounted: {mounted.stderr.decode().strip()}")
    try:
        for command in (
            ("export", trained, "--format", "adapter", "-o", small / "adapter"),
            ("report", trained, "--out", small / "page.html"),
        ):
            done = call(*command)
            assert done.returncode == 7 and "--resume" not in done.stderr, done.stderr
            assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)

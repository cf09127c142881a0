"""Runs and adapters to damage: copies of undamaged ones, ways to damage them, and what a refusal looks like."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, call

from mopefuse.core.artifact import sha256

WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
Done = subprocess.CompletedProcess[str]
Predict = Callable[..., Done]
Bytes = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Artefact:
    """A copy of a run or of an adapter.

    Args:
        weights: the folder of its best weights, and of the manifest that vouches for them.
facts: the file with the facts about the model.
    """

    path: Path
    weights: Path
    facts: Path

    @property
    def is_run(self) -> bool:
        return self.weights != self.path

    def others(self) -> list[str]:
        """The checkpoints other than the best."""
        return [path.name for path in self.weights.parent.glob("step-*") if path != self.weights] if self.is_run else []

    def rewrite(self, name: str, change: Bytes, *, sealed: bool = False) -> None:
        """Change the bytes of a file next to the weights; if `sealed`, update the manifest to match."""
        file = self.weights / name
        before = file.read_bytes()
        after = change(before)
        assert after != before, "nothing was changed"
        file.write_bytes(after)
        if sealed:
            self.seal()

    def seal(self) -> None:
        """Update the manifest next to the weights to match the files that it lists."""
        manifest = read(self.weights / MANIFEST)
        for name, facts in manifest["files"].items():
            facts |= {"sha256": sha256(self.weights / name), "size": (self.weights / name).stat().st_size}
        write(self.weights / MANIFEST, manifest)

    def config(self, old: str, new: str) -> None:
        """Change a line of config.yaml."""
        text = (self.path / "config.yaml").read_text()
        assert text.count(f"{old}\n") == 1
        (self.path / "config.yaml").write_text(text.replace(f"{old}\n", f"{new}\n"))
        if not self.is_run:
            self.seal()


def copy_run(run: Path, to: Path) -> Artefact:
    shutil.copytree(run, to)
    best = (to / "checkpoints" / "best").read_text().strip()
    return Artefact(to, to / "checkpoints" / best, to / MANIFEST)


def copy_adapter(adapter: Path, to: Path) -> Artefact:
    shutil.copytree(adapter, to)
    return Artefact(to, to, to / "model.json")


def read(file: Path) -> dict[str, Any]:
    value = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def tree(path: Path) -> dict[str, str]:
    """Return the digests of all files."""
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def ask(model: Path, image: Path, *options: object) -> Done:
    return call("predict", model, "--image", image, "--text", "what is the red digit", "--device", "cpu", *options)


def resume(path: Path, steps: int = 5, **more: object) -> Done:
    options = [word for key, value in more.items() for word in (f"--{key}", value)]
    return call("train", "--resume", "--out", path, "--steps", steps, *options)


def refused(done: Done, code: str, *parts: str, exit_code: int = 6, fix: str = "") -> None:
    """Check that a refusal is one line with the code, the problem and the fix; nothing on stdout, no traceback."""
    line = done.stderr.splitlines()[-1] if done.stderr else ""
    assert (done.returncode, line[: line.find("]") + 1]) == (exit_code, f"error[{code}]"), done.stderr
    what, _, mend = line.partition(" · fix: ")
    for part in parts:
        assert part in what, line
    assert mend and fix in mend, line
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


# -- fixtures, for test modules that list this one in `pytest_plugins`


@pytest.fixture(scope="session")
def whole_run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints; tests must not change it."""
    path = tmp_path_factory.mktemp("artefacts") / "run"
    done = call("train", *TINY, "--data", pairs, "--out", path, "--steps", "4")
    assert done.returncode == 0, done.stderr
    assert len(list(path.glob("checkpoints/step-*"))) == 2
    return path


@pytest.fixture(scope="session")
def whole_adapter(whole_run: Path) -> Path:
    """An adapter of `whole_run`; tests must not change it."""
    done = call("export", whole_run, "--format", "adapter", "-o", whole_run.parent / "adapter")
    assert done.returncode == 0, done.stderr
    return whole_run.parent / "adapter"


@pytest.fixture
def of_run(whole_run: Path, tmp_path: Path) -> Artefact:
    return copy_run(whole_run, tmp_path / "run")


@pytest.fixture
def of_adapter(whole_adapter: Path, tmp_path: Path) -> Artefact:
    return copy_adapter(whole_adapter, tmp_path / "adapter")


@pytest.fixture(params=["run", "adapter"])
def artefact(request: pytest.FixtureRequest) -> Artefact:
    """A copy that a test may damage."""
    found = request.getfixturevalue(f"of_{request.param}")
    assert isinstance(found, Artefact)
    return found


@pytest.fixture
def predict(pairs: Path) -> Predict:
    """A function that predicts one pair with a model and checks that no file of the model changes."""

    def checked(model: Path, *options: object) -> Done:
        before = tree(model)
        done = ask(model, pairs / "images/val-0.png", *options)
        assert tree(model) == before
        return done

    return checked


# -- ways to damage files


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Canary(canary))


def overlapping(whole: bytes) -> bytes:
    """Move the last tensor eight bytes towards the start, so that it overlaps the one before it."""
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [place - 8 for place in header[last]["data_offsets"]]
    text = json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + size :]


def flipped(whole: bytes) -> bytes:
    """Flip one bit of the last value."""
    return whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]


# -- which files are opened


_opened: list[str] | None = None


def _record_opened(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(args[0]))


sys.addaudithook(_record_opened)  # the hook stays installed, but records only within `opened`


@contextmanager
def opened() -> Iterator[list[str]]:
    """A list of every path that Python opens."""
    global _opened
    _opened = names = []
    try:
        yield names
    finally:
        _opened = None

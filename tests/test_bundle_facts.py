"""JSON files of a bundle with changed values: refused with a clear message, or harmless."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from conftest import call
from PIL import Image
from test_export import reseal

from mopefuse.errors import CheckpointError, MopefuseError
from mopefuse.export.verify import verify_export
from mopefuse.inference import bundle as predictor
from mopefuse.inference.bundle import Bundle
from mopefuse.inference.predict import Predictor

FILES = ("labels.json", "preprocess.json", "example.json")
LEAVE_OUT = object()
OTHERS = (None, [], {}, "", "x", True, -1, 0, 1.5, 10**30, 10**400, float("inf"), [[]], ["x"], {"x": 1}, [1], LEAVE_OUT)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Return the paths of all values; of long lists only the first three."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from places(one, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    changed = deepcopy(value)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    if new is LEAVE_OUT:
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return changed


@pytest.mark.parametrize("file", FILES)
def test_an_invalid_value_in_a_bundle_file_never_causes_an_internal_error(
    file: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    before = json.loads((bundle / file).read_text())
    manifest = json.loads((bundle / "manifest.json").read_text())
    run = Bundle(bundle)._run
    monkeypatch.setattr(predictor, "load_runner", lambda *args: run)
    monkeypatch.setattr(predictor, "_verified", lambda folder: manifest)
    refused = tried = 0
    for path in places(before):
        for new in OTHERS:
            (bundle / file).write_text(json.dumps(put(before, path, new)))
            tried += 1
            try:
                verify_export(bundle)
                Predictor(Bundle(bundle)).predict([Image.new("RGB", (40, 30))], ["a cat"])
            except MopefuseError:
                refused += 1
    assert refused > tried / 3


@pytest.mark.parametrize(
    ("file", "path", "new", "message"),
    [
        ("labels.json", ("labels",), "abc", "labels.json is damaged: labels has a wrong value"),
        ("labels.json", ("thresholds",), [0.5], "labels.json is damaged: 1 thresholds of"),
        ("preprocess.json", ("sides", "main", "size"), [10**6, 10**6], "preprocess.json: main is damaged: size has a wrong"),
        ("preprocess.json", ("sides", "main"), ["image"], "preprocess.json: main is damaged: it is not a JSON object"),
        ("preprocess.json", ("sides", "comp", "max_tokens"), 10**20, "preprocess.json: comp is damaged: max_tokens has"),
        ("preprocess.json", ("sides", "comp", "tokenizer", "words"), 5, "tokenizer is damaged: words has a wrong value"),
        ("example.json", ("tolerance",), 10**400, "example.json is damaged"),
    ],
)
def test_a_damaged_bundle_file_gives_exit_code_6(
    file: str, path: tuple[str, ...], new: Any, message: str, exported: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    (bundle / file).write_text(json.dumps(put(json.loads((bundle / file).read_text()), path, new)))
    reseal(bundle)
    done = call("export", "verify", bundle)
    assert done.returncode == 6 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_tokenizer_file_must_be_listed_in_the_manifest(exported: Path, tmp_path: Path) -> None:
    """A file in the folder that is not listed could be anything, even a pipe."""
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    how = json.loads((bundle / "preprocess.json").read_text())
    saved = {"kind": "file", "file": "other.json", "cut": "right", "pad_id": 0}
    (bundle / "preprocess.json").write_text(json.dumps(put(how, ("sides", "comp", "tokenizer"), saved)))
    reseal(bundle)
    with pytest.raises(CheckpointError, match=r"the tokenizer other.json is not in the manifest"):
        Bundle(bundle)


def test_a_manifest_with_an_invalid_model_name_is_refused(exported: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "model": ["onnx"]}))
    with pytest.raises(CheckpointError, match="lists no model"):
        Bundle(bundle)

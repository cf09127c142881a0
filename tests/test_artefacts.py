"""Artifacts that are damaged, tampered with or for other encoders, by number in the list of faults, tested on the command line.

Each case damages a copy of a run or an adapter; `test_an_undamaged_artefact_loads` is the control for all of them.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from artefact_cases import (
    MANIFEST,
    WEIGHTS,
    Artefact,
    Bytes,
    Predict,
    ask,
    flipped,
    opened,
    overlapping,
    pickled,
    read,
    refused,
    resume,
    write,
)  # fmt: skip
from conftest import TINY, call, start_cli
from safetensors.torch import load_file, save_file

from mopefuse.core import artifact as checkpoint

pytest_plugins = ["artefact_cases"]
SEALED = pytest.mark.parametrize("sealed", [False, True], ids=["as it is", "with a manifest that fits"])


def test_an_undamaged_artefact_loads(artefact: Artefact, predict: Predict) -> None:
    done = predict(artefact.path)
    assert (done.returncode, set(json.loads(done.stdout)["probabilities"])) == (0, {"a", "b", "c"})
    artefact.seal()
    assert predict(artefact.path).stdout == done.stdout


# -- torch and torchvision that do not match


@pytest.mark.process
def test_F_72_a_torchvision_that_does_not_match_torch_is_reported_with_both_versions(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    fails = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(fails)
    augmented = ("--data", pairs, "--set", "data.augment=flip")
    done = start_cli("train", *TINY, *augmented, "--out", tmp_path / "run", PYTHONPATH=str(tmp_path))
    both = f"torchvision {version('torchvision')} does not match torch {version('torch')}"
    refused(done, "MF-ENV-02", both, exit_code=5, fix="pip install")
    assert "Traceback" not in done.stderr


# -- pickles in place of weights


@SEALED
def test_F_73_a_pickle_in_place_of_weights_runs_nothing(
    artefact: Artefact, predict: Predict, sealed: bool, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    artefact.rewrite(WEIGHTS, lambda whole: pickled(canary), sealed=sealed)
    done = predict(artefact.path)
    refused(done, *(("MF-CKPT-06", "this is a pickle") if sealed else ("MF-CKPT-02", WEIGHTS)))
    assert not canary.exists()
    pickle.loads((artefact.weights / WEIGHTS).read_bytes())  # noqa: S301
    assert canary.exists(), "the canary does run when it is unpickled"


def test_F_73_a_pickle_in_place_of_the_optimizer_state_runs_nothing(of_run: Artefact, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for folder in of_run.weights.parent.glob("step-*"):
        one = Artefact(of_run.path, folder, of_run.facts)
        one.rewrite("optimizer.safetensors", lambda whole: pickled(canary), sealed=True)
    refused(resume(of_run.path), "MF-CKPT-06", "this is a pickle", "optimizer.safetensors")
    assert not canary.exists()


def test_F_73_a_pickle_as_weights_of_an_encoder_runs_nothing(tmp_path: Path) -> None:
    import timm

    spec = "timm:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1&pretrained=false"
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=0)
    save_file(model.state_dict(), tmp_path / "good.safetensors")
    torch.save(model.state_dict(), tmp_path / "zip.safetensors")
    for name in ("evil.safetensors", "evil.pt"):
        (tmp_path / name).write_bytes(pickled(tmp_path / "canary"))
    for name in ("evil.safetensors", "evil.pt", "zip.safetensors"):
        done = call("encoders", "inspect", f"{spec}&weights={tmp_path / name}")
        refused(done, "MF-CKPT-06", "this is a pickle", name, fix="safetensors")
    assert not (tmp_path / "canary").exists()
    assert call("encoders", "inspect", f"{spec}&weights={tmp_path / 'good.safetensors'}").returncode == 0


# -- damaged weights


@SEALED
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda whole: whole[: len(whole) // 2], id="truncated"),
        pytest.param(overlapping, id="overlapping tensors"),
        pytest.param(lambda whole: (200_000_000).to_bytes(8, "little") + whole[8:], id="200 MB of header"),
        pytest.param(lambda whole: whole + b"junk", id="trailing junk"),
        pytest.param(lambda whole: b"", id="empty"),
    ],
)
def test_damaged_weights_are_refused_and_the_other_checkpoint_is_suggested(
    artefact: Artefact, damage: Bytes, sealed: bool, predict: Predict
) -> None:
    artefact.rewrite(WEIGHTS, damage, sealed=sealed)
    done = predict(artefact.path)
    message = f"{WEIGHTS} is damaged: " if sealed else f"{WEIGHTS} has changed since it was written (sha256 differs)"
    refused(done, "MF-CKPT-02", message, str(artefact.weights), fix="checkpoint")
    for other in artefact.others():
        assert sealed or f"use --checkpoint {other}" in done.stderr
        assert predict(artefact.path, "--checkpoint", other).returncode == 0


def test_F_74_resuming_skips_a_damaged_checkpoint_but_never_starts_from_scratch(of_run: Artefact) -> None:
    (newest,) = of_run.weights.parent.glob("step-4")
    (newest / WEIGHTS).write_bytes(b"")
    kept = of_run.path.with_name("kept")
    shutil.copytree(of_run.path, kept)
    done = resume(of_run.path)
    assert done.returncode == 0 and "the checkpoint step-4 is damaged; step-3 is used" in done.stderr
    (kept / "checkpoints" / "step-3" / WEIGHTS).write_bytes(b"")
    refused(resume(kept), "MF-CKPT-02", "step-4", fix="start a new run")
    assert sorted(path.name for path in kept.glob("checkpoints/step-*")) == ["step-3", "step-4"]


def test_F_75_a_flipped_bit_in_the_weights_is_detected(artefact: Artefact, predict: Predict) -> None:
    artefact.rewrite(WEIGHTS, flipped)
    assert load_file(artefact.weights / WEIGHTS), "safetensors alone accepts it"
    refused(predict(artefact.path), "MF-CKPT-02", f"{WEIGHTS} has changed since it was written (sha256 differs)")


@pytest.mark.parametrize("name", ["config.yaml", "model.json", "README.md"])
def test_F_75_a_flipped_bit_in_any_file_of_an_adapter_is_detected(of_adapter: Artefact, name: str, predict: Predict) -> None:
    of_adapter.rewrite(name, flipped)
    refused(predict(of_adapter.path), "MF-CKPT-02", f"{name} has changed since it was written (sha256 differs)")


# -- edited manifests


DAMAGED = {"labels": 7, "task": "no", "encoders": ["tiny:vision"], "plugins": True}
NEEDED = ("mopefuse", "method", "labels", "task", "encoders", "data")


@pytest.mark.parametrize(
    ("code", "message", "changed"),
    [
        pytest.param("MF-CKPT-03", "the labels of the run", {"labels": ["a", "b", "d"]}, id="a label renamed"),
        pytest.param("MF-CKPT-03", "the labels of the run", {"labels": ["b", "a", "c"]}, id="labels permuted"),
        pytest.param("MF-CKPT-03", "the labels of the run", {"labels": ["a", "b"]}, id="fewer labels"),
        pytest.param("MF-CKPT-03", "the task of the run", {"task": {"name": "multi-label"}}, id="several labels"),
        pytest.param("MF-CKPT-03", "the encoders of the run", {"encoders.main.spec": "tiny:vision-b"}, id="spec"),
        pytest.param("MF-CKPT-08", "expected 0123", {"encoders.main.fingerprint": "0123"}, id="fingerprint"),
        pytest.param("MF-CKPT-08", "expected None", {"encoders.comp.fingerprint": None}, id="no fingerprint"),
        *(pytest.param("MF-CKPT-03", f"damaged: {key}: ", {key: bad}, id=f"{key} {bad}") for key, bad in DAMAGED.items()),
        *(pytest.param("MF-CKPT-03", f"damaged: {key}: ", {key: ...}, id=f"no {key}") for key in NEEDED),
    ],
)
def test_an_edited_manifest_is_refused(
    artefact: Artefact, code: str, message: str, changed: dict[str, Any], predict: Predict
) -> None:
    """A run's manifest is compared with its checkpoint; an adapter's with its digest or, where that matches too, checked for
    plausibility."""
    facts = read(artefact.facts)
    for path, value in changed.items():
        *sections, key = path.split(".")
        holder = facts
        for section in sections:
            holder = holder[section]
        holder[key] = value
        if value is ...:
            del holder[key]
    write(artefact.facts, facts)
    if artefact.is_run:
        refused(predict(artefact.path), code, message)
        return
    refused(predict(artefact.path), "MF-CKPT-02", "model.json has changed since it was written")
    if code == "MF-CKPT-08" or "damaged" in message:
        artefact.seal()
        refused(predict(artefact.path), code, message)


def test_F_76_fewer_labels_than_head_outputs_are_refused_even_with_valid_digests(
    of_adapter: Artefact, predict: Predict
) -> None:
    write(of_adapter.facts, read(of_adapter.facts) | {"labels": ["a", "b"]})
    of_adapter.seal()
    refused(predict(of_adapter.path), "MF-CKPT-05", "the weights do not fit the model: head.")


@pytest.mark.parametrize("how", ["up", "absolute", "link"])
def test_F_76_no_file_outside_the_artefact_is_opened(artefact: Artefact, how: str, pairs: Path, tmp_path: Path) -> None:
    """The digest matches, so only the location can be wrong."""
    canary = tmp_path / "canary"
    canary.write_text("tweet")
    (artefact.weights / "canary").symlink_to(canary)
    name = {"up": os.path.relpath(canary, artefact.weights), "absolute": str(canary), "link": "canary"}[how]
    manifest = read(artefact.weights / MANIFEST)
    manifest["files"] = {name: {"sha256": checkpoint.sha256(canary), "size": 5}} | manifest["files"]
    write(artefact.weights / MANIFEST, manifest)
    with opened() as names:
        refused(ask(artefact.path, pairs / "images/val-0.png"), "MF-CKPT-03", "outside its folder")
    assert str(artefact.weights / MANIFEST) in names, "opened files are recorded"
    assert not [found for found in names if "canary" in found]


@pytest.mark.parametrize("name", [WEIGHTS, "more.safetensors"])
def test_F_76_a_wrong_declared_size_of_10_gb_is_refused(artefact: Artefact, name: str, predict: Predict) -> None:
    manifest = read(artefact.weights / MANIFEST)
    manifest["files"][name] = {"sha256": "0" * 64, "size": 10**10}
    write(artefact.weights / MANIFEST, manifest)
    refused(predict(artefact.path), "MF-CKPT-02", f"{name} has changed since it was written")


# -- other encoders, weights that are not finite


@pytest.mark.parametrize("side", ["main", "comp"])
@pytest.mark.parametrize("how", ["option", "config.yaml"])
def test_F_77_an_encoder_with_other_weights_is_refused(artefact: Artefact, side: str, how: str, predict: Predict) -> None:
    """The prompts' tensors would fit it."""
    old = {"main": "tiny:vision", "comp": "tiny:text"}[side]
    other = f"{old}-b"
    if how == "config.yaml":
        artefact.config(f"{side}: {old}", f"{side}: {other}")
    done = predict(artefact.path, *([f"--{side}", other] if how == "option" else []))
    refused(done, "MF-CKPT-08", f"the weights of {other} are not those that", fix="mopefuse swap-encoder")
    assert predict(artefact.path, f"--{side}", old).returncode == 0


def test_F_77_an_encoder_with_another_width_is_refused(artefact: Artefact, predict: Predict, tmp_path: Path) -> None:
    from encoder_cases import save_hf

    save_hf("bert", tmp_path / "bert")
    refused(predict(artefact.path, "--comp", f"hf:{tmp_path / 'bert'}"), "MF-CKPT-08", "the weights of hf:", fix="swap-encoder")


def test_F_77_the_same_weights_under_another_name_are_accepted(artefact: Artefact, predict: Predict) -> None:
    first = predict(artefact.path)
    again = predict(artefact.path, "--main", "tiny:vision?pretrained=true", "--comp", "tiny:text?pretrained=true")
    assert (again.returncode, again.stdout) == (0, first.stdout)
    other = predict(artefact.path, "--comp", "tiny:text?pool=cls")
    refused(other, "MF-CKPT-08", "has different options", fix="swap-encoder")


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("part", ["static", "experts", "router", "head"])
def test_F_78_prompts_that_are_not_finite_are_refused(artefact: Artefact, part: str, value: str, predict: Predict) -> None:
    def change(whole: bytes) -> bytes:
        tensors = load_file(artefact.weights / WEIGHTS)
        name = next(name for name in tensors if part in name)
        tensors[name].view(-1)[0] = float(value)
        save_file(tensors, artefact.weights / WEIGHTS)
        return (artefact.weights / WEIGHTS).read_bytes()

    artefact.rewrite(WEIGHTS, change, sealed=True)
    refused(predict(artefact.path), "MF-CKPT-05", part, "has values that are not finite", fix="checkpoint")
    for other in artefact.others():
        assert predict(artefact.path, "--checkpoint", other).returncode == 0

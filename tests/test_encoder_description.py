"""An encoder is more than its weights: everything that changes its features changes its description, and runs notice."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import call, make_pairs, write_rows
from encoder_cases import WORDS, add_open_clip_models, edit_config, save_hf

from mopefuse.config.schema import Data, build_config
from mopefuse.data.feature_cache import split_features
from mopefuse.data.load import load_data
from mopefuse.encoders import description as _description
from mopefuse.encoders.base import create_encoder
from mopefuse.errors import CheckpointError, Notice
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.load import load_model
from mopefuse.runs.locate import find_run
from mopefuse.training.train import train

CPU = torch.device("cpu")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def pooling(folder: Path) -> None:
    edit(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)


def other_word(folder: Path) -> None:
    """A tokenizer with the ids of two words swapped."""
    text = (folder / "tokenizer.json").read_text()
    first, second = (json.loads(text)["model"]["vocab"][word] for word in WORDS[:2])
    values = json.loads(text)
    values["model"]["vocab"] |= {WORDS[0]: second, WORDS[1]: first}
    (folder / "tokenizer.json").write_text(json.dumps(values))


def processor(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "preprocessor_config.json", **changes)


CHANGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "pooling": ("bert", pooling, "model.pool: was"),
    "activation of a text encoder": ("bert", lambda folder: edit_config(folder, hidden_act="relu"), "model.hidden_act: was"),
    "heads of a text encoder": ("bert", lambda folder: edit_config(folder, num_attention_heads=2), "num_attention_heads: was"),
    "epsilon": ("bert", lambda folder: edit_config(folder, layer_norm_eps=1e-2), "model.layer_norm_eps: was"),
    "most tokens": ("bert", lambda folder: edit(folder / "sentence_bert_config.json", max_seq_length=3), "max_tokens: was"),
    "vocabulary": ("bert", other_word, "preprocess.tokenizer."),
    "activation of an image encoder": ("vit", lambda folder: edit_config(folder, hidden_act="relu"), "model.hidden_act: was"),
    "heads of an image encoder": ("vit", lambda folder: edit_config(folder, num_attention_heads=2), "num_attention_heads: was"),
    "mean": ("vit", processor(image_mean=[0.1, 0.2, 0.3]), "preprocess.mean: was"),
    "deviation": ("vit", processor(image_std=[0.1, 0.2, 0.3]), "preprocess.std: was"),
    "interpolation": ("vit", processor(resample=3), "preprocess.interpolation: was"),
    "size of the crop": (
        "vit",
        processor(size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32, "width": 32}),
        "preprocess.resize: was",
    ),
}  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A BERT as sentence-transformers saves it, and a ViT."""
    save_hf("bert", tmp_path / "bert")
    save_hf("vit", tmp_path / "vit")
    (tmp_path / "bert" / "modules.json").write_text("[{}]")
    (tmp_path / "bert" / "1_Pooling").mkdir()
    (tmp_path / "bert" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (tmp_path / "bert" / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    return {"bert": tmp_path / "bert", "vit": tmp_path / "vit"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pairs whose texts are in the vocabulary of the encoders."""
    root = make_pairs(tmp_path / "pairs")
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]
        words = " ".join(WORDS)
        write_rows(root / f"{split}.jsonl", [row | {"text": words[: 1 + 7 * number]} for number, row in enumerate(rows)])
    return root


def settings(data: Path, folders: dict[str, Path], **more: Any) -> Any:
    values = {
        "main": f"hf:{folders['vit']}", "comp": f"hf:{folders['bert']}", "method": "late-concat", "device": "cpu",
        "data": {"path": str(data)}, "train": {"epochs": 1, "batch_size": 4}, **more,
    }  # fmt: skip
    return build_config(values)


@pytest.mark.parametrize(("kind", "change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_change_to_an_encoder_is_named_and_recomputes_its_features(
    folders: dict[str, Path], data: Path, kind: str, change: Callable[[Path], None], message: str
) -> None:
    pairs, config = load_data(Data(path=str(data))), settings(data, folders)
    spec = f"hf:{folders[kind]}"
    before = create_encoder(spec)
    every = torch.arange(12)
    kept = split_features(before, pairs, "train", config, CPU)[every]
    change(folders[kind])
    now = create_encoder(spec)
    assert now.fingerprint() == before.fingerprint(), "the weights are the same"
    assert any(message in text for text in _description.differences(before.describe(), now.describe()))
    found = split_features(now, pairs, "train", config, CPU)
    assert "read from" not in found.origin
    assert not torch.allclose(found[every], kept, atol=1e-4)


@pytest.mark.process
def test_a_run_is_not_loaded_with_a_different_encoder(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    run, adapter = tmp_path / "run", tmp_path / "adapter"
    train(settings(data, folders), run)
    assert call("export", run, "-o", adapter, "--format", "adapter").returncode == 0
    recorded = json.loads((run / "manifest.json").read_text())["encoders"]["comp"]
    assert recorded["description"]["model"]["pool"] == "mean"
    assert recorded["digest"] == _description.digest(recorded["description"])
    assert str(tmp_path) not in json.dumps(recorded["description"])
    saved = {name: shutil.copytree(folder, tmp_path / f"{name} as it was") for name, folder in folders.items()}
    for name in ("pooling", "vocabulary", "heads of an image encoder", "mean"):
        kind, change, message = CHANGES[name]
        change(folders[kind])
        for model in (run, adapter):
            done = call("eval", model, "--data", data, "--device", "cpu")
            assert done.returncode == 6, done.stderr
            assert "MF-CKPT-220" in done.stderr and message in done.stderr and "fix: restore" in done.stderr
        shutil.rmtree(folders[kind])
        shutil.copytree(saved[kind], folders[kind])
    assert call("eval", run, "--device", "cpu").returncode == 0, "as it was"


def test_a_tuned_encoder_is_checked_too(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    train(settings(data, folders, tune="full"), tmp_path / "run")
    edit_config(folders["bert"], hidden_act="relu")
    with pytest.raises(CheckpointError, match=r'model.hidden_act: was "gelu", is "relu"'):
        load_model(find_run(tmp_path / "run"), "best", CPU)


def test_a_resumed_run_checks_its_encoders(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    config = settings(data, folders)
    train(config, tmp_path / "run")
    pooling(folders["bert"])
    with pytest.raises(CheckpointError, match=r'model.pool: was "mean", is "cls"'):
        train(config, tmp_path / "run", resume=True)


def test_another_library_version_gives_a_notice_and_recomputes_features(
    folders: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(data, folders)
    train(config, tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(RunFolder(tmp_path / "run"), "best", CPU)
    installed = _description._installed
    newer = lambda name: "99.0" if name == "transformers" else installed(name)  # noqa: E731
    monkeypatch.setattr(_description, "_installed", newer)
    with pytest.warns(Notice, match=r"other library versions \(transformers .*, now 99.0\)"):
        load_model(RunFolder(tmp_path / "run"), "best", CPU)
    encoder = create_encoder(f"hf:{folders['bert']}")
    assert "read from" not in split_features(encoder, load_data(Data(path=str(data))), "train", config, CPU).origin


def test_with_another_library_version_only_common_fields_are_compared() -> None:
    before = {"model": {"act": "gelu", "old": 1}, "preprocess": {"tokenizer": {"state": "a", "examples": "b"}}}
    now: dict[str, Any] = {"model": {"act": "gelu", "new": 2}, "preprocess": {"tokenizer": {"state": "c", "examples": "b"}}}
    same, other = {"libraries": {"transformers": "5"}}, {"libraries": {"transformers": "6"}}
    assert _description.differences(before | same, now | other) == []
    assert len(_description.differences(before | same, now | same)) == 3
    now["model"]["act"] = "relu"
    assert _description.differences(before | same, now | other) == ['model.act: was "gelu", is "relu"']


def test_a_description_does_not_depend_on_where_the_encoder_is_stored(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind, folder in folders.items():
        copy = shutil.copytree(folder, tmp_path / "elsewhere" / kind)
        assert create_encoder(f"hf:{folder}").describe() == create_encoder(f"hf:{copy}").describe()
    transformers.AutoModel.from_pretrained(folders["vit"]).save_pretrained(tmp_path / "again")
    transformers.AutoImageProcessor.from_pretrained(folders["vit"]).save_pretrained(tmp_path / "again")
    assert create_encoder(f"hf:{folders['vit']}").digest() == create_encoder(f"hf:{tmp_path / 'again'}").digest()


VIT = "timm:vit_tiny_patch16_224?pretrained=false&depth=1"
CLIP = "open_clip:mopefuse-tiny#{}?pretrained=false"


@pytest.mark.parametrize(
    ("spec", "option", "message"),
    [
        ("tiny:text?pretrained=false", "pool=cls", "model.pool"),
        (VIT, "pool=avg", "model.pool"),
        (VIT, "mean=0.1", "preprocess.mean"),
        (VIT, "num_heads=6", "model.num_heads"),
        (VIT, "size=32", "preprocess.size"),
        (CLIP.format("text"), "max_tokens=7", "preprocess.max_tokens"),
        (CLIP.format("visual"), "force_quick_gelu=true", "model.quick_gelu"),
        (CLIP.format("visual"), "size=64", "preprocess.size"),
    ],
)
def test_options_that_change_the_computation_are_described(tmp_path: Path, spec: str, option: str, message: str) -> None:
    add_open_clip_models(tmp_path)
    one, two = create_encoder(spec), create_encoder(f"{spec}&{option}")
    found = _description.differences(one.describe(), two.describe())
    assert any(text.startswith(message) for text in found), found
    assert one.describe()["libraries"].keys() >= {"mopefuse", "torch"}

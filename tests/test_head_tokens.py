"""`head_features: tokens`: the head of the conditional method also takes what cross-attention reads from output tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call, make_pairs, matrix
from run_cases import check_eval_report_and_export
from test_fusion import PAIRS, TEXTS, build, images

import mopefuse
from mopefuse.config.schema import Data
from mopefuse.core.tensor_files import read_tensors
from mopefuse.data.load import load_data
from mopefuse.data.token_cache import split_tokens
from mopefuse.encoders import frozen
from mopefuse.errors import ConfigError
from mopefuse.fusion import baselines
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.load import load_model

CPU = torch.device("cpu")
NO_PROMPTS = {"prompts": {"static": 0, "dynamic": 0, "mapped": 0, "film": False}}
SPECS = ("--main", "tiny:vision", "--comp", "tiny:text")
pytestmark = pytest.mark.usefixtures("short_starts")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs") / "data", counts={"train": 30, "val": 9, "test": 6})


@pytest.mark.parametrize(("main", "comp"), PAIRS)
@pytest.mark.parametrize("stack", [NO_PROMPTS, {}], ids=["without prompts", "untrained prompts"])
def test_its_limit_is_the_method_cross_attention(main: str, comp: str, stack: dict[str, Any]) -> None:
    model = build(main, comp, head_features="tokens", head_hidden=8, warm_start="auto", **stack).eval()
    rival = build(main, comp, method="cross-attention", head_hidden=8).eval()
    names = {"hidden.weight": "0.weight", "hidden.bias": "0.bias", "output.weight": "2.weight", "output.bias": "2.bias"}
    state = model.trainable_state_dict()
    for name, value in rival.trainable_state_dict().items():
        if name.startswith(("reader.", "standard.")):
            state[name] = value
    state |= {f"head.{ours}": rival.trainable_state_dict()[f"head.{theirs}"] for ours, theirs in names.items()}
    state |= {name: torch.zeros_like(state[name]) for name in ("head.linear.weight", "head.linear.bias")}
    model.load_trainable_state_dict(state)
    batch = model.collate(images(4), TEXTS[:4])
    with torch.no_grad():
        ours, theirs = model(batch).logits, rival(rival.collate(images(4), TEXTS[:4])).logits
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert theirs.std() > 0.01, "constant logits could not show a difference"
        model.reader.offset_QW += 1
        assert not torch.allclose(model(batch).logits, theirs, atol=1e-4)


def test_it_is_the_default_for_an_encoder_with_tokens() -> None:
    model = mopefuse.build_fusion("tiny:vision", "tiny:text", 3)
    assert model.config.head_features == "tokens" and "cross-attention" in model.breakdown()
    papers = mopefuse.build_fusion("tiny:vision", "tiny:text", 3, compat="paper")
    assert papers.config.head_features == "main" and "cross-attention" not in papers.breakdown()
    with pytest.raises(ConfigError, match="head_features is tokens, which flamingo does not support"):
        mopefuse.build_fusion("tiny:vision", "tiny:text", 3, method="flamingo", head_features="tokens")


def test_a_cache_too_small_for_tokens_is_noticed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-attention is then not among the models of the warm start."""
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))  # that of other tests may have the tokens already
    small = ("--set", "data.cache_prefix_limit=1e-6", "--epochs", "1", "--cache-prefix", "off")
    done = call("train", *SPECS, *map(str, ("--data", data, "--out", tmp_path / "run")), *small)
    assert done.returncode == 0, done.stderr
    wanted = "cross-attention is not among the models compared at the start, because the output tokens are not cached: they"
    assert wanted in " ".join(done.stderr.split()) and "add --set data.cache_prefix_limit=" in done.stderr
    assert "cross_attention" not in (tmp_path / "run" / "start.json").read_text()


def only_cross_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cross-attention always be the best baseline."""
    monkeypatch.setattr(baselines, "is_probably_better", lambda one, other: True)


@pytest.mark.parametrize("precision", matrix(["float16", "float32"], ["float32"]))
def test_step_0_equals_the_fitted_cross_attention(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    only_cross_attention(monkeypatch)
    fitted: list[torch.Tensor] = []
    fit = baselines.fit_reading

    def spy(*args: Any) -> Any:
        for model, logits_SN in fit(*args):
            fitted.append(logits_SN)
            yield model, logits_SN

    monkeypatch.setattr(baselines, "fit_reading", spy)
    out = tmp_path / "run"
    done = call("train", *SPECS, "--data", data, "--out", out, "--epochs", 0, "--set", f"data.prefix_precision={precision}")
    assert done.returncode == 0, done.stderr
    facts = json.loads((out / "start.json").read_text(encoding="utf-8"))
    assert facts["best"] == facts["trained_from"] == "cross-attention to the output tokens of main"
    actual = load_data(Data(path=str(data))).targets("val")
    best = min(fitted, key=lambda logits_SN: float(torch.nn.functional.cross_entropy(logits_SN, actual)))
    model = mopefuse.load_model(out)
    rows = [json.loads(line) for line in (data / "val.jsonl").read_text().splitlines()]
    with torch.no_grad():
        found = model(model.collate([data / row["img"] for row in rows], [row["text"] for row in rows])).logits
    torch.testing.assert_close(found, best, atol=1e-4 if precision == "float32" else 0.02, rtol=0)
    score = float((best.argmax(dim=1) == actual).double().mean())
    assert facts["cross_attention"]["score"] == pytest.approx(score)


def test_a_run_that_starts_there_resumes_exactly(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_cross_attention(monkeypatch)
    options = (*SPECS, "--data", data, "--set", "train.schedule=constant", "--set", "train.warmup=0")
    for out, epochs, more in (("whole", 2, ()), ("parts", 1, ()), ("parts", 2, ("--resume",))):
        assert call("train", *options, "--out", tmp_path / out, "--epochs", epochs, *more).returncode == 0
    whole, parts = (
        read_tensors(RunFolder(tmp_path / name).checkpoint("last")[0] / "weights.safetensors") for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    start = read_tensors(RunFolder(tmp_path / "whole").checkpoint("step-0")[0] / "weights.safetensors")
    assert not torch.equal(whole["reader.key.weight"], start["reader.key.weight"])


@pytest.mark.matrix
def test_a_run_that_starts_there_is_an_ordinary_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_cross_attention(monkeypatch)
    assert call("train", *SPECS, "--data", data, "--out", tmp_path / "run", "--epochs", 1).returncode == 0
    check_eval_report_and_export(tmp_path / "run", tmp_path)


def test_images_are_encoded_once_for_prefixes_pooled_features_and_tokens(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))
    encoded: list[int] = []
    chunks = frozen._chunks

    def count(encoder: Any, inputs: Any) -> Any:
        if encoder.modality == "image":
            encoded.append(len(next(iter(inputs.values()))))  # 1 for the blank image by which an encoder is tried out
        return chunks(encoder, inputs)

    monkeypatch.setattr(frozen, "_chunks", count)
    assert call("train", *SPECS, "--data", data, "--out", tmp_path / "run", "--epochs", 0).returncode == 0
    assert sorted(number for number in encoded if number > 1) == [9, 30], "the training and validation images"
    loaded = load_model(RunFolder(tmp_path / "run"), "step-0", CPU)
    tokens = split_tokens(loaded.model.encoder("main"), load_data(loaded.config.data), "train", loaded.config, CPU)
    assert not isinstance(tokens, str) and tokens.origin == "read from the cache"


def test_without_space_for_tokens_only_the_pooled_features_are_compared(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))
    limit = ("--set", "data.cache_prefix_limit=1e-9")
    assert call("train", *SPECS, "--data", data, "--out", tmp_path / "run", "--epochs", 0, *limit).returncode == 0
    facts = json.loads((tmp_path / "run" / "start.json").read_text(encoding="utf-8"))
    assert "cross_attention" not in facts and len(facts["baselines"]) == 5


def test_a_linear_head_starts_as_a_regression_that_ignores_the_tokens(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("train", *SPECS, "--data", data, "--out", out, "--epochs", 0, "--head-hidden", 0).returncode == 0
    weights = read_tensors(RunFolder(out).checkpoint()[0] / "weights.safetensors")
    assert weights["head.weight"].shape[1] > 192 and not weights["head.weight"][:, 192:].any()
    assert weights["head.weight"][:, :192].any() and "reader.key.weight" in weights

"""Training starts at the first prompted layer: the tokens that enter it are computed once per sample and cached."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, code_of, make_pairs, matrix, plain_config, ranks, write_rows

from mopefuse.config.schema import Data, RunConfig
from mopefuse.core import cache
from mopefuse.core.artifact import sha256
from mopefuse.data.base import DataSet
from mopefuse.data.collate import Samples
from mopefuse.data.load import load_data
from mopefuse.data.prefix_cache import Prefixes, split_prefixes
from mopefuse.encoders.base import Prefix, create_encoder
from mopefuse.encoders.tiny import TinyEncoder
from mopefuse.errors import ConfigError, Interrupted
from mopefuse.runs.folder import RunFolder
from mopefuse.training.listener import Listener
from mopefuse.training.plan import plan
from mopefuse.training.swap import swap_encoder
from mopefuse.training.train import train

CPU = torch.device("cpu")
COUNTS = {"train": 16, "val": 6, "test": 5}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_texts(tmp_path_factory.mktemp("prefixes") / "data")


def make_texts(root: Path) -> Path:
    """Pairs with texts of different lengths."""
    make_pairs(root, counts=COUNTS)
    for split in COUNTS:
        rows = [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]
        texts = [" ".join(["red digit is"] * (1 + number % 4)) + f" {number}" for number in range(len(rows))]
        write_rows(root / f"{split}.jsonl", [row | {"text": text} for row, text in zip(rows, texts, strict=True)])
    return root


def settings(root: Path, prefix: str = "on", **more: Any) -> RunConfig:
    """Images as main, prompts in the last of four layers; keys of `more` are ``section__key``."""
    values: dict[str, Any] = {
        "main": "tiny:vision", "comp": "tiny:text", "device": "cpu",
        "prompts": {"experts": 2, "layers": "last:1"},
        "data": {"path": str(root), "cache_prefix": prefix, "prefix_precision": "float32"},
        "train": {"batch_size": 5, "epochs": 2, "lr": 0.01, "log_every": 1},
    }  # fmt: skip
    for name, value in more.items():
        section, _, key = name.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return plain_config(values)


COURSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "text as main": {"main": "tiny:text", "comp": "tiny:vision"},
    "FiLM": {"prompts__film": True, "prompts__mapped": 0, "prompts__dynamic": 0, "prompts__static": 0},
    "joint router": {"router": {"kind": "joint"}, "train__accumulate": 2},
    "warm start": {"warm_start": "linear"},
    "Flamingo": {"method": "flamingo"},
    "recomputed activations": {"train__checkpoint_activations": True},
    "workers": {"data__workers": 2},
    "modality dropout": {"train__modality_dropout": 0.4},
}


class Notices(Listener):
    """Collects the notices for the user."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_notice(self, text: str) -> None:
        self.texts.append(text)

    @property
    def about_prefixes(self) -> list[str]:
        return [text for text in self.texts if "layers" in text]


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_course(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """The same training and validation losses at every step, up to rounding."""
    first, second = log(one), log(other)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for left, right in zip(first, second, strict=True):
        if "loss" in left:
            assert left["loss"] == pytest.approx(right["loss"], abs=tolerance)
        else:
            assert left["val"] == pytest.approx(right["val"], abs=tolerance)


def prefixes(root: Path, encoder: str = "tiny:vision", layer: int = 3, split: str = "train", **how: Any) -> Prefixes:
    config = settings(root, **how)
    return split_prefixes(create_encoder(encoder), layer, load_data(Data(path=str(root))), split, config, CPU)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modality of each value that is read from the data."""
    found: list[str] = []
    own = DataSet.read

    def count(self: DataSet, split: Any, row: Any, modality: str, config: Any) -> Any:
        found.append(modality)
        return own(self, split, row, modality, config)

    monkeypatch.setattr(DataSet, "read", count)
    return found


@pytest.fixture
def layers_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(encoder, layer) of every layer of a tiny encoder that runs."""
    found: list[tuple[str, int]] = []
    own = TinyEncoder._run_block

    def count(self: TinyEncoder, block: Any, *rest: Any) -> Any:
        found.append((self.spec.name, list(self.blocks).index(block)))
        return own(self, block, *rest)

    monkeypatch.setattr(TinyEncoder, "_run_block", count)
    return found


# -- the same run at less cost


@pytest.mark.parametrize("name", matrix(COURSES, ["plain", "text as main", "FiLM"]))
def test_a_run_with_the_cache_equals_one_without_it(data: Path, tmp_path: Path, name: str) -> None:
    more = COURSES[name]
    results = {setting: train(settings(data, setting, **more), tmp_path / setting) for setting in ("on", "off")}
    assert_same_course(tmp_path / "on", tmp_path / "off")
    for split in ("val", "test"):
        assert results["on"]["metrics"][split] == pytest.approx(results["off"]["metrics"][split], abs=1e-5)


@pytest.mark.matrix
def test_a_compiled_run_equals_an_uncompiled_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise and dropout, which compiled code draws from its own generator, and without C++, which test_compile has."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    texts = {"main": "tiny:text", "comp": "tiny:vision", "train__epochs": 1, "prompts__dropout": 0.0, "router__noise": False}
    for compiled in (True, False):
        train(settings(data, "on", **texts, train__compile=compiled), tmp_path / str(compiled))
    assert_same_course(tmp_path / "True", tmp_path / "False")


def test_multi_label_rows_and_rows_with_gaps_use_the_cache(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data", multi=True, counts=COUNTS)
    for split in COUNTS:
        rows = [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]
        removed: tuple[dict[str, None], ...] = ({}, {"img": None}, {"text": None}, {})
        write_rows(root / f"{split}.jsonl", [row | removed[number % 4] for number, row in enumerate(rows)])
    for main, comp in (("tiny:vision", "tiny:text"), ("tiny:text", "tiny:vision")):
        more = {"main": main, "comp": comp, "either": True, "data__on_missing": "absent"}
        layers = {"prompts__layers": "last:1"}
        for setting in ("on", "off"):
            train(settings(root, setting, **more, **layers), tmp_path / f"{main}-{setting}")
        assert_same_course(tmp_path / f"{main}-on", tmp_path / f"{main}-off")


def test_half_precision_is_close_but_not_equal(data: Path, tmp_path: Path) -> None:
    train(settings(data, "on", data__prefix_precision="float16"), tmp_path / "half")
    train(settings(data, "off"), tmp_path / "off")
    assert_same_course(tmp_path / "half", tmp_path / "off", tolerance=0.01)
    half, whole = prefixes(data, data__prefix_precision="float16"), prefixes(data)
    assert half[torch.arange(4)].dtype == torch.float16
    assert half.size * 2 == whole.size == 16 * 17 * 96 * 4
    with pytest.raises(AssertionError):
        assert_same_course(tmp_path / "half", tmp_path / "off", tolerance=0)


def test_early_layers_run_once_for_each_sample_and_not_in_training(
    data: Path, tmp_path: Path, layers_run: list[tuple[str, int]]
) -> None:
    config = settings(data, train__epochs=3)
    trained = tmp_path / "first"
    train(config, trained)
    early = [layer for name, layer in layers_run if name == "vision" and layer < 3]
    # The estimate, 16 and 6 images in one part each, and the test of the whole model.
    assert sorted(early) == sorted([0, 1, 2] * (1 + 1 + 1 + 1))
    layers_run.clear()
    train(config, tmp_path / "second")
    assert sorted(layer for name, layer in layers_run if name == "vision" and layer < 3) == sorted([0, 1, 2] * 2)
    assert log(trained) == log(tmp_path / "second")


@pytest.mark.parametrize("start", ["none", "linear"])
def test_no_image_is_opened_in_training_or_in_a_second_run(data: Path, tmp_path: Path, reads: list[str], start: str) -> None:
    """The pooled features of a warm start are computed along with the outputs of early layers."""
    train(settings(data, train__epochs=3, warm_start=start), tmp_path / "first")
    assert reads.count("image") == sum(COUNTS.values()), "each image once, and those of the test split in the final test"
    reads.clear()
    train(settings(data, train__epochs=3, prompts__experts=3, warm_start=start), tmp_path / "second")
    assert reads.count("image") == COUNTS["test"]


def test_a_resumed_run_is_equal_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """It was started with `auto`, which became `on`; the second part sets nothing, or `auto` again."""
    config = settings(data, "auto", data__prefix_precision="float16", train__checkpoint_every=3)
    whole = tmp_path / "whole"
    train(config, whole)
    assert RunFolder(whole).config().data.cache_prefix == "on"

    class Stop(Notices):
        def on_step(self, progress: Any, total: int, loss: float, lr: float) -> None:
            if progress.step == 3:
                os.kill(os.getpid(), 15)

    parts = tmp_path / "parts"
    with pytest.raises(Interrupted):
        train(config, parts, listener=Stop())
    train(config, parts, resume=True)
    assert (parts / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert log(parts) == log(whole)
    for change in ({"cache_prefix": "off"}, {"prefix_precision": "float32"}):
        changed = config.model_copy(update={"data": config.data.model_copy(update=change)})
        assert code_of(lambda changed=changed: train(changed, parts, resume=True)) == "MF-CFG-32"  # type: ignore[misc]


@pytest.mark.process
def test_two_processes_equal_one(data: Path, tmp_path: Path) -> None:
    common = [*TINY, "--data", data, "--layers", "last:1", "--steps", 4, "--cache-prefix", "on"]
    common += ["--set", "data.prefix_precision=float32", "--set", "prompts.dropout=0", "--set", "router.noise=false"]
    for processes in (2, 1):
        os.environ["MOPEFUSE_CACHE"] = str(tmp_path / f"cache-{processes}")
        done = ranks(processes, "train", *common, "--out", tmp_path / str(processes))
        assert done.returncode == 0, done.stderr
        assert "ran once for 16 distinct images" in done.stderr + done.stdout
    assert_same_course(tmp_path / "2", tmp_path / "1")
    shards = list((tmp_path / "cache-2").glob("prefixes/*/*"))
    assert len(shards) == 4, "each process computed a part of both splits"


def test_a_swapped_run_decides_again_whether_to_use_the_cache(data: Path, tmp_path: Path) -> None:
    train(settings(data, "auto", train__epochs=1), tmp_path / "run")
    assert RunFolder(tmp_path / "run").config().data.cache_prefix == "on"
    swap_encoder(tmp_path / "run", tmp_path / "new", comp="tiny:text-b", settings={"data": {"augment": "flip"}})
    assert RunFolder(tmp_path / "new").config().data.cache_prefix == "off"


# -- whether it is used


@pytest.mark.parametrize(
    ("more", "fix"),
    [
        ({"prompts__layers": "all"}, "--layers last:N"),
        ({"method": "late-concat"}, "--layers last:N"),
        ({"data__cache_features": False}, "--set data.cache_features=true"),
        ({"data__augment": "flip"}, "--set data.augment=none"),
        ({"either": True, "train__modality_dropout": 0.2}, "--modality-dropout"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_if_early_layers_change_the_cache_is_not_used(data: Path, tmp_path: Path, more: dict[str, Any], fix: str) -> None:
    for action in (lambda: train(settings(data, "on", **more), tmp_path / "on"), lambda: plan(settings(data, "on", **more))):
        with pytest.raises(ConfigError) as raised:
            action()
        assert (raised.value.code, raised.value.where) == ("MF-CFG-360", "--cache-prefix")
        assert fix in raised.value.fix
    train(settings(data, "auto", **more, train__epochs=0), tmp_path / "auto")
    assert RunFolder(tmp_path / "auto").config().data.cache_prefix != "on"
    assert all(kind != "prefixes" for kind, *_ in cache.entries())


def test_an_encoder_that_ignores_the_prefix_is_not_cached(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example a plugin's that ignores `start`: it would be trained on blank images."""
    monkeypatch.setattr(TinyEncoder, "_resume", lambda self, x_BLD: (0, x_BLD))
    assert code_of(lambda: train(settings(data, "on"), tmp_path / "on")) == "MF-CFG-360"
    for setting in ("auto", "off"):
        train(settings(data, setting), tmp_path / setting)
    assert log(tmp_path / "auto") == log(tmp_path / "off")


def test_beyond_the_limit_the_cache_is_off_with_a_notice(data: Path, tmp_path: Path, reads: list[str]) -> None:
    notices = Notices()
    train(settings(data, "auto", data__cache_prefix_limit=1e-4), tmp_path / "auto", listener=notices)
    (notice,) = notices.about_prefixes
    assert "144 kB" in notice and "0.0001 GiB" in notice and "--set data.cache_prefix_limit=0.00015" in notice, notice
    assert "--cache-prefix off" in notice
    assert RunFolder(tmp_path / "auto").config().data.cache_prefix == "off"
    assert reads.count("image") > sum(COUNTS.values())
    assert code_of(lambda: train(settings(data, data__cache_prefix_limit=1e-4), tmp_path / "on")) == "MF-RES-360"
    notices = Notices()
    train(settings(data, "auto", data__cache_prefix_limit=0.00015), tmp_path / "enough", listener=notices)
    assert "16 distinct images, 104 kB in float32, kept in the cache" in notices.about_prefixes[0]


def test_the_cache_uses_at_most_half_of_the_free_space(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 200_000

    monkeypatch.setattr("mopefuse.training.start_layer.shutil.disk_usage", lambda _: Usage)
    assert code_of(lambda: train(settings(data), tmp_path / "run")) == "MF-RES-360"
    Usage.free = 400_000
    train(settings(data, train__epochs=0), tmp_path / "run")
    Usage.free = 0
    train(settings(data, train__epochs=0), tmp_path / "again")


def test_if_the_cache_cannot_be_written_it_is_off_or_an_error(data: Path, tmp_path: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "prefixes").write_text("")
    assert code_of(lambda: train(settings(data), tmp_path / "on")) == "MF-RES-361"
    notices = Notices()
    train(settings(data, "auto"), tmp_path / "auto", listener=notices)
    assert "cannot be kept in the cache" in notices.about_prefixes[0] and "MOPEFUSE_CACHE" in notices.about_prefixes[0]
    train(settings(data, "off"), tmp_path / "off")
    assert log(tmp_path / "auto") == log(tmp_path / "off")


def test_values_beyond_float16_turn_the_cache_off(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = TinyEncoder.compute_prefix
    monkeypatch.setattr(
        TinyEncoder, "compute_prefix", lambda *what: own(*what)._replace(tokens_BLD=1e6 * own(*what).tokens_BLD)
    )
    half = {"data__prefix_precision": "float16"}
    assert code_of(lambda: train(settings(data, **half), tmp_path / "on")) == "MF-NUM-360"
    notices = Notices()
    train(settings(data, "auto", **half), tmp_path / "auto", listener=notices)
    assert "too large for float16" in notices.about_prefixes[0] and "data.prefix_precision=float32" in notices.about_prefixes[0]
    assert RunFolder(tmp_path / "auto").config().data.cache_prefix == "off"


# -- what is stored


def test_texts_are_stored_without_padding_and_padded_in_a_batch(data: Path) -> None:
    found, encoder = prefixes(data, "tiny:text", layer=1), create_encoder("tiny:text")
    pairs = load_data(Data(path=str(data)))
    lengths = [2 + 3 * (1 + number % 4) for number in range(COUNTS["train"])]
    assert found.size == sum(lengths) * 96 * 4
    samples = Samples(pairs, "train", {"main": ("text", encoder.preprocess)}, Data(), prefixes={"main": found})
    for index in ([0, 4, 8], [0, 1, 2, 3], [3, 3]):
        batch = samples.batch([samples[(0, number)] for number in index])
        assert batch.inputs["main"]["mask"].sum(dim=1).tolist() == [lengths[number] for number in index]  # type: ignore[union-attr]
        assert batch.prefixes["main"].shape == (len(index), max(lengths[number] for number in index), 96)  # type: ignore[union-attr]
        inputs = batch.inputs["main"]  # type: ignore[union-attr]
        with torch.no_grad():
            whole = encoder.encode(inputs)
            continued = encoder.encode(inputs, start=Prefix(1, batch.prefixes["main"]))  # type: ignore[union-attr]
        torch.testing.assert_close(continued.pooled_BC, whole.pooled_BC, atol=1e-5, rtol=1e-5)
        padding = batch.prefixes["main"][~inputs["mask"]]  # type: ignore[union-attr]
        assert (padding == 0).all()


def test_a_batch_is_moved_and_divided_together_with_its_prefixes(data: Path) -> None:
    encoder = create_encoder("tiny:vision")
    readers = {"main": ("image", encoder.preprocess)}
    samples = Samples(load_data(Data(path=str(data))), "train", readers, Data(), prefixes={"main": prefixes(data)})
    batch = samples.batch([samples[(0, number)] for number in range(5)])
    parts = [batch.to("cpu").part(number, 2) for number in range(2)]  # type: ignore[union-attr]
    assert [len(part.prefixes["main"]) for part in parts] == [3, 2]
    assert torch.equal(torch.cat([part.prefixes["main"] for part in parts]), batch.prefixes["main"])  # type: ignore[union-attr]
    pixels = batch.inputs["main"]["pixels"]  # type: ignore[union-attr]
    assert pixels.shape == (5, 16, 16, 3) and pixels.is_contiguous(), "an expanded tensor cannot be pinned"


def test_another_layer_precision_or_encoder_has_another_key(data: Path, folder: Path) -> None:
    prefixes(data)
    for number, change in enumerate(({"layer": 2}, {"data__prefix_precision": "float16"}, {"encoder": "tiny:vision-b"}), 2):
        assert prefixes(data, **change).origin == "kept in the cache"  # type: ignore[arg-type]
        assert len(list(folder.glob("prefixes/*"))) == number
    assert prefixes(data).origin == "read from the cache"


def test_a_damaged_shard_is_computed_again(data: Path, folder: Path) -> None:
    every = torch.arange(COUNTS["train"])
    expected = prefixes(data, "tiny:text", 1)[every]
    for name in ("values.bin", "ends.bin", "keys.bin", "manifest.json"):
        (shard,) = folder.glob("prefixes/*/*")
        content = bytearray((shard / name).read_bytes())
        content[3] ^= 1
        (shard / name).write_bytes(content)
        found = prefixes(data, "tiny:text", 1)
        assert found.origin == "kept in the cache", name
        assert torch.equal(found[every], expected)
        shutil.rmtree(shard)


@pytest.mark.parametrize("ends", [[-5, 1], [4, 2], [0, 0], [2**60], [1], []], ids=str)
def test_a_shard_with_impossible_ends_is_not_read(data: Path, folder: Path, ends: list[int]) -> None:
    """Its digests are correct, as if someone else had written it."""
    every = torch.arange(COUNTS["train"])
    expected = prefixes(data, "tiny:text", 1)[every]
    (shard,) = folder.glob("prefixes/*/*")
    count = len((shard / "keys.bin").read_bytes()) // 16
    forged = [*ends, *range(max(ends) + 1, max(ends) + count)][:count] if len(ends) == 1 else (ends * count)[:count]
    np.array(forged, dtype=np.int64).tofile(shard / "ends.bin")
    manifest = json.loads((shard / "manifest.json").read_text())
    manifest["files"]["ends.bin"] = {"sha256": sha256(shard / "ends.bin"), "size": 8 * len(forged)}
    (shard / "manifest.json").write_text(json.dumps(manifest))
    found = prefixes(data, "tiny:text", 1)
    assert found.origin == "kept in the cache"
    assert torch.equal(found[every], expected)

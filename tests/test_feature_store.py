"""Features are stored by content, one store per encoder: shared by all data, safe with several processes, never stale."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, call, make_pairs, ranks, write_rows

from mopefuse.config.schema import Data, build_config
from mopefuse.core import artifact as checkpoint
from mopefuse.core import cache
from mopefuse.data import feature_cache as module
from mopefuse.data.feature_cache import split_features
from mopefuse.data.feature_shards import FeatureStore, Mapped
from mopefuse.data.load import load_data
from mopefuse.encoders.base import create_encoder, run_frozen
from mopefuse.encoders.frozen import encode_pooled
from mopefuse.training.train import train

CPU = torch.device("cpu")
COUNTS = {"train": 40, "val": 10, "test": 10}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = make_pairs(tmp_path / "data", counts=COUNTS)
    for split in COUNTS:
        rows = [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]
        words = [" ".join(["red digit is the"] * (1 + number % 7)) + f" {split} {number}" for number in range(len(rows))]
        write_rows(root / f"{split}.jsonl", [row | {"text": text} for row, text in zip(rows, words, strict=True)])
    return root


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of samples that each call has encoded."""
    counts: list[int] = []

    def count(encoder: Any, inputs: Any) -> torch.Tensor:
        counts.append(len(next(iter(inputs.values()))))
        return encode_pooled(encoder, inputs)

    monkeypatch.setattr(module, "encode_pooled", count)
    return counts


def settings(root: Path, **how: Any) -> Any:
    values = {
        "main": "tiny:vision", "comp": "tiny:text", "device": "cpu", "method": "linear",
        "data": {"path": str(root), **how}, "train": {"batch_size": 8},
    }  # fmt: skip
    return build_config(values)


def features(root: Path, encoder: str = "tiny:text", split: str = "train", **how: Any) -> module.Features:
    return split_features(create_encoder(encoder), load_data(Data(path=str(root), **how)), split, settings(root), CPU)


def rows(found: module.Features, count: int) -> torch.Tensor:
    return found[torch.arange(count)]


def store_of(encoder: str = "tiny:text") -> FeatureStore:
    one = create_encoder(encoder)
    store = FeatureStore(module.encoder_key(one, settings(Path()), CPU), one.feature_width)
    store.refresh()
    return store


# -- computing


def test_with_another_fraction_split_or_data_set_only_new_features_are_computed(
    data: Path, tmp_path: Path, encoded: list[int]
) -> None:
    half = load_data(Data(path=str(data), fraction=0.5))
    config, encoder = settings(data), create_encoder("tiny:text")
    some = len(np.unique(half.splits["train"].keys["text"]))
    first = split_features(encoder, half, "train", config, CPU)
    assert (sum(encoded), first.origin) == (some, "kept in the cache")
    whole = features(data)
    assert (sum(encoded), first.different) == (40, some)
    assert whole.origin == f"{40 - some} of them computed and kept in the cache, the others read from it"
    for share in (None, 0.3, 0.9):
        assert "read from" in features(data, fraction=share).origin
    same = shutil.copytree(data, tmp_path / "elsewhere")
    lines = (same / "train.jsonl").read_text().splitlines()
    (same / "train.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    turned = features(same)
    assert ("read from" in turned.origin, sum(encoded)) == (True, 40)
    assert torch.equal(rows(turned, 40), rows(whole, 40).flip(0))


def test_a_second_run_with_another_fraction_computes_no_features(data: Path, tmp_path: Path, encoded: list[int]) -> None:
    train(settings(data), tmp_path / "whole")
    assert sum(encoded) == 2 * sum(COUNTS.values()), "of both encoders"
    encoded.clear()
    train(settings(data, fraction=0.4), tmp_path / "less")
    train(settings(data, fraction=0.7), tmp_path / "more")
    assert encoded == []


def test_a_feature_belongs_to_its_sample_in_any_batch(data: Path) -> None:
    for name in ("tiny:text", "tiny:vision"):
        found, encoder = rows(features(data, name), 40), create_encoder(name)
        values = load_data(Data(path=str(data)))
        for number, row in enumerate(values.splits["train"].rows):
            value = values.read(values.splits["train"], row, encoder.modality, Data())
            alone = run_frozen(encoder, encoder.preprocess.batch([encoder.preprocess.item(value)])).pooled_BC
            torch.testing.assert_close(found[number : number + 1], alone, atol=1e-5, rtol=0)


def test_texts_are_encoded_in_batches_of_similar_length_with_little_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = create_encoder("tiny:text")
    texts = ["red digit " * (1 if number % 10 else 12) for number in range(640)]
    inputs = encoder.preprocess.batch([encoder.preprocess.item(text) for text in texts])
    shapes: list[tuple[int, ...]] = []
    own = encoder.encode

    def spy(some: Any) -> Any:
        shapes.append(tuple(some["ids"].shape))
        return own(some)

    monkeypatch.setattr(encoder, "encode", spy)
    pooled_BC = encode_pooled(encoder, inputs)
    assert sorted({length for _, length in shapes}) == [3, 25]
    assert sum(count * length for count, length in shapes) < 0.4 * inputs["ids"].numel()
    assert len(shapes) == 20
    monkeypatch.undo()
    torch.testing.assert_close(pooled_BC, run_frozen(encoder, inputs).pooled_BC, atol=1e-5, rtol=0)


def test_large_inputs_are_encoded_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = create_encoder("tiny:vision")
    sizes: list[int] = []
    own = run_frozen

    def spy(one: Any, some: Any) -> Any:
        sizes.append(len(some["pixels"]))
        return own(one, {"pixels": some["pixels"][:, :16, :16]})

    monkeypatch.setattr("mopefuse.encoders.frozen.run_frozen", spy)
    encode_pooled(encoder, {"pixels": torch.zeros(30, 518, 518, 3, dtype=torch.uint8)})
    assert max(sizes) == 11, "pixels of 64 images of 224 x 224"
    sizes.clear()
    encode_pooled(encoder, {"pixels": torch.zeros(130, 16, 16, 3, dtype=torch.uint8)})
    assert sizes == [32, 32, 32, 32, 2]


# -- storing


def test_shards_are_published_during_the_computation(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 8)
    monkeypatch.setattr(module, "_SHARD_BYTES", 16 * 96 * 4)
    whole = features(data)
    assert [len(shard.keys) for shard in store_of().shards] == [16, 16, 8]
    assert torch.equal(rows(features(data), 40), rows(whole, 40))
    monkeypatch.setattr(module, "_SHARD_SECONDS", 0.0)
    features(data, split="val")
    assert [len(shard.keys) for shard in store_of().shards] == [16, 16, 8, 8, 2]


def test_rows_of_several_shards_are_read_in_any_order(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rows(features(data), 40)
    shutil.rmtree(os.environ["MOPEFUSE_CACHE"])
    for share in (0.2, 0.5, 0.8):
        features(data, fraction=share)
    found = features(data)
    assert len(store_of().shards) == 4
    index_B = torch.tensor([39, 0, 7, 7, 21, 3])
    torch.testing.assert_close(found[index_B], whole[index_B], atol=1e-5, rtol=0)
    assert found[torch.tensor([], dtype=torch.long)].shape == (0, 96)


def test_only_a_damaged_shard_is_computed_again(data: Path, folder: Path, encoded: list[int]) -> None:
    features(data, fraction=0.5)
    before = rows(features(data), 40)
    first, second = sorted(folder.glob("features/*/*"))
    damaged = {"values.bin": 5, "keys.bin": 3, "manifest.json": 0}
    for name, at in damaged.items():
        encoded.clear()
        lost = len(np.fromfile(first / "keys.bin", dtype="S16"))
        content = bytearray((first / name).read_bytes())
        content[at] ^= 1
        (first / name).write_bytes(content)
        found = features(data)
        assert sum(encoded) == lost
        torch.testing.assert_close(rows(found, 40), before, atol=1e-5, rtol=0)
        assert "read from" in features(data).origin
        shutil.rmtree(first)
        first = max(folder.glob("features/*/*"))
    assert second.exists()


def test_a_process_verifies_the_digests_of_a_shard_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    sha256 = checkpoint.sha256

    def count(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    monkeypatch.setattr(checkpoint, "sha256", count)
    features(data)
    assert hashed.count("values.bin") == 2  # once when published, once when read
    hashed.clear()
    assert "read from" in features(data).origin
    assert "values.bin" not in hashed


def test_a_store_may_be_cleared_while_it_is_used_or_filled(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = features(data)
    expected = rows(found, 40)
    cache.clear()
    assert torch.equal(rows(found, 40), expected), "mapped files stay readable"
    own = FeatureStore.append

    def append_and_lose(self: FeatureStore, *what: Any) -> bool:
        kept = own(self, *what)
        cache.clear()
        return kept

    monkeypatch.setattr(FeatureStore, "append", append_and_lose)
    found = features(data)
    assert found.origin == "kept in memory"
    torch.testing.assert_close(rows(found, 40), expected, atol=1e-5, rtol=0)


def test_without_disk_space_features_are_kept_in_memory(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rows(features(data), 40)
    cache.clear()
    features(data, fraction=0.5)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mopefuse.core.atomic_files.sync", full)
    found = features(data)
    assert found.origin == "kept in memory"
    torch.testing.assert_close(rows(found, 40), expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; a file in the folder's place is tested below")
def test_a_read_only_cache_folder_keeps_features_in_memory(data: Path, folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o500)
    assert features(data).origin == "kept in memory"


def test_a_file_in_place_of_the_store_keeps_features_in_memory(data: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "features").write_text("")
    assert features(data).origin == "kept in memory"


def test_a_mapped_table_is_pickled_by_its_path(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    values.tofile(tmp_path / "values.bin")
    sent = pickle.dumps(Mapped(tmp_path / "values.bin", (4, 3)))
    assert len(sent) < 500
    assert np.array_equal(pickle.loads(sent)[np.array([3, 0])], values[[3, 0]])  # noqa: S301


# -- several processes


def test_two_processes_that_compute_the_same_feature_use_the_first_published(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process publishes slightly different features for half of the samples while this one computes."""
    pairs = load_data(Data(path=str(data)))
    keys = np.unique(pairs.splits["train"].keys["text"])
    theirs = np.full((20, 96), 7, dtype=np.float32)
    own = FeatureStore.append

    def be_overtaken(self: FeatureStore, *what: Any) -> bool:
        monkeypatch.setattr(FeatureStore, "append", own)
        assert own(self, keys[:20], theirs, {})
        return own(self, *what)

    monkeypatch.setattr(FeatureStore, "append", be_overtaken)
    mine = rows(features(data), 40)
    assert int((mine == 7).all(dim=1).sum()) == 20
    assert torch.equal(rows(features(data), 40), mine), "and so do later runs"


SCRIPT = """
import os, sys, time, torch
from pathlib import Path
data, out, cache, seconds, noise, tests = sys.argv[1:]
sys.path.insert(0, tests)
from mopefuse.data import feature_cache as module
from test_feature_store import features, rows
os.environ["MOPEFUSE_CACHE"] = cache  # conftest has one of its own
module._VALUES_AT_ONCE, module._SHARD_BYTES = 4, 8 * 96 * 4
own = module.encode_pooled
def slow(*what):
    time.sleep(float(seconds))
    return own(*what) + float(noise)
module.encode_pooled = slow
torch.save(rows(features(Path(data)), 40), out)
"""


def start(data: Path, out: Path, seconds: float, noise: float = 0.0) -> subprocess.Popen[bytes]:
    """Compute the features of the training split in another process, slowly, with a marker on its values."""
    tests, folder = str(Path(__file__).parent), os.environ["MOPEFUSE_CACHE"]
    arguments = [sys.executable, "-c", SCRIPT, str(data), str(out), folder, str(seconds), str(noise), tests]
    return subprocess.Popen(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.process
def test_concurrent_processes_agree_bit_for_bit(data: Path, tmp_path: Path) -> None:
    load_data(Data(path=str(data)))  # the index
    processes = [start(data, tmp_path / f"{number}.pt", 1.0, number / 1000) for number in range(3)]
    assert [process.wait(300) for process in processes] == [0, 0, 0]
    found = [torch.load(tmp_path / f"{number}.pt") for number in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(rows(features(data), 40), found[0])
    keys = np.concatenate([shard.keys for shard in store_of().shards])
    assert len(keys) > len(np.unique(keys)) == 40, "both processes did compute the same samples"


@pytest.mark.process
def test_a_killed_process_leaves_its_published_shards_and_no_partial_files(
    data: Path, tmp_path: Path, folder: Path, encoded: list[int]
) -> None:
    load_data(Data(path=str(data)))
    process = start(data, tmp_path / "never.pt", 0.5)
    while not list(folder.glob("features/*/0*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (entry,) = folder.glob("features/*")
    (entry / f"part.tmp-0-{process.pid}").mkdir()  # as if it had been killed while writing
    published = sum(len(shard.keys) for shard in store_of().shards)
    assert 0 < published < 40
    features(data)
    assert sum(encoded) == 40 - published
    assert [path.name for path in entry.iterdir() if not path.name.isdecimal()] == []


def test_ranks_compute_each_sample_once_and_use_the_same_values(data: Path, tmp_path: Path, folder: Path) -> None:
    for name in ("one", "two"):
        done = ranks(2, "train", *TINY, "--data", str(data), "--out", str(tmp_path / name), "--steps", "2")
        assert done.returncode == 0, done.stderr
    store = store_of()
    keys = np.concatenate([shard.keys for shard in store.shards])
    assert len(keys) == len(np.unique(keys)) == sum(COUNTS.values())
    assert len(store.shards) == 6, "one per rank and split"
    logs = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "two")]
    assert logs[0] == logs[1], "computed or read"


@pytest.mark.process
def test_ranks_without_a_common_cache_use_the_same_values(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = ranks(2, "train", *TINY, "--data", str(data), "--out", str(tmp_path / "with"), "--steps", "2")
    assert done.returncode == 0, done.stderr
    os.environ["MOPEFUSE_CACHE"] = str(tmp_path / "file" / "none")
    done = ranks(2, "train", *TINY, "--data", str(data), "--out", str(tmp_path / "without"), "--steps", "2")
    assert done.returncode == 0, done.stderr
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        for name in ("with", "without")
    )
    for mine, theirs in zip(one, two, strict=True):
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-4)


# -- many samples


@pytest.mark.soak
def test_a_million_samples_are_looked_up_in_little_memory(tmp_path: Path) -> None:
    count, width = 1_000_000, 8
    keys = np.random.default_rng(0).integers(0, 256, (count, 16), dtype=np.uint8).view("S16").ravel()
    store = FeatureStore("many", width)
    for part in range(4):
        some = keys[part::4]
        store.append(some, np.full((len(some), width), part, dtype=np.float32), {})
    tracemalloc.start()
    began = time.perf_counter()
    store.refresh()
    found = store.find(keys)
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.known_U.all()
    assert np.array_equal(found.shard_U, np.arange(count) % 4)
    assert np.array_equal(store.shards[1].keys[found.row_U[1::4][:100]], keys[1::4][:100])
    assert peak < 200 * count, "bytes for each sample"
    assert seconds < 60


# -- on the command line


def test_the_cache_lists_encoders_and_how_many_samples_are_known(data: Path, tmp_path: Path) -> None:
    train(settings(data), tmp_path / "run")
    found = json.loads(call("data", "cache", "--json").stdout)["entries"]
    listed = {entry["encoder"]: entry["rows"] for entry in found if entry["kind"] == "features"}
    assert listed == {"tiny:text": 60, "tiny:vision": 60}
    (shown,) = [line for line in call("data", "cache").stdout.splitlines() if "features" in line]
    assert shown.split()[3:5] == ["2", "120"]
    assert call("data", "cache", "--clear").returncode == 0
    assert list(cache.entries()) == []


def test_evaluation_reads_what_training_computed(data: Path, tmp_path: Path, encoded: list[int]) -> None:
    train(settings(data), tmp_path / "run")
    encoded.clear()
    done = call("eval", tmp_path / "run", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert encoded == []
    before = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert json.loads(done.stdout)["metrics"] == before["metrics"]["test"]

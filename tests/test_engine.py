"""The engine of a server: many threads, models that come and go, little memory, damaged requests."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FAKE, autocast, move
from PIL import Image
from test_shared_pair import SHARED, assert_equal, expected, picture, randomised, samples, save

import mopefuse
from mopefuse.errors import MopefuseError, RequestError, ResourceError
from mopefuse.fusion.conditional import ConditionalFusion
from mopefuse.serving.engine.adapter_weights import take_weights
from mopefuse.serving.engine.catalogue import Catalogue
from mopefuse.serving.engine.content_cache import ContentCache
from mopefuse.serving.engine.engine import Engine, EngineSettings
from mopefuse.serving.engine.request import Request
from mopefuse.serving.engine.resident import Facts, Resident, Value
from mopefuse.serving.engine.shared_pair import SharedPair

NAMES = ("default", "experts", "no-film", "reader", "absent")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("adapters")
    save(where, {name: SHARED[name] for name in NAMES})
    return where


def engine_of(folder: Path, **settings: Any) -> Engine:
    return Engine(EngineSettings(adapters=str(folder), **settings))


def test_answers_to_many_threads_are_those_of_each_model_alone(folder: Path) -> None:
    engine = engine_of(folder, resident=3)  # so that models are loaded and dropped all the time
    requests = [samples(NAMES, each=2, seed=seed) for seed in range(8)]
    wanted = {id(request): expected(folder, request) for batch in requests for request in batch}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(engine.predict, requests * 3))
    for batch, found in zip(requests * 3, answers, strict=True):
        for request, answer in zip(batch, found, strict=True):
            assert_equal(answer, wanted[id(request)])
    stats = engine.stats()
    assert stats["models_resident"] <= 3 and stats["model_loads"] > 5 and stats["batches_failed"] == 0


def test_models_come_and_go(folder: Path, tmp_path: Path) -> None:
    served = tmp_path / "served"
    shutil.copytree(folder / "default", served / "first")
    engine = engine_of(served)
    request = Request("first", {"image": picture(0), "text": "read the red digit"})
    assert isinstance(engine.predict([request])[0], dict)
    (missing,) = engine.predict([Request("second", request.values)])
    assert isinstance(missing, RequestError) and missing.code == "MF-REQ-01" and "did you mean" not in missing.what
    shutil.copytree(folder / "experts", tmp_path / "second")
    (tmp_path / "second").rename(served / "second")
    assert isinstance(engine.predict([Request("second", request.values)])[0], dict), "found at once, without a restart"
    held = engine._models.get(engine.catalogue.find("first"))
    shutil.rmtree(served / "first")
    engine.catalogue._scanned = 0.0
    (gone,) = engine.predict([request])
    assert isinstance(gone, RequestError) and gone.code == "MF-REQ-01"
    text = Value("read the red digit", b"1")
    image = engine._decoded("image", picture(0))
    assert held.executor.run([(held, {"image": image, "text": text})]), "a request that was accepted before is still answered"


def test_a_replaced_model_is_loaded_again(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "default", tmp_path / "one")
    engine = engine_of(tmp_path)
    request = Request("one", {"image": picture(0), "text": "read the red digit"}, routing=True)
    before = engine.predict([request])[0]
    mopefuse.save_adapter(randomised(99), tmp_path / "one", labels=["a", "b", "c", "d"], overwrite=True)
    engine.catalogue._scanned = 0.0
    after = engine.predict([request])[0]
    assert before != after
    assert_equal(after, expected(tmp_path, request))


def test_folders_that_are_no_models_are_not_served(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "default", tmp_path / "good")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    (tmp_path / "file.txt").write_text("no model")
    catalogue = Catalogue(adapters=tmp_path)
    assert [*catalogue.entries()] == ["good"]
    assert catalogue.find(None).name == "good", "the only model needs no name"


def test_names_of_models(folder: Path) -> None:
    one, other = str(folder / "default"), str(folder / "experts")
    assert [*Catalogue([one, f"mine={other}"]).entries()] == ["default", "mine"]
    with pytest.raises(RequestError, match="two models are called default"):
        Catalogue([one, f"default={other}"])
    with pytest.raises(RequestError, match="no model was given"):
        Catalogue()
    with pytest.raises(MopefuseError, match="neither a run"):
        Catalogue([str(folder)])
    with pytest.raises(RequestError, match="names no model, and 2 are served"):
        Catalogue([one, other]).find(None)


def test_a_damaged_model_is_an_error_of_its_requests_only(folder: Path, tmp_path: Path) -> None:
    for name in ("default", "experts"):
        shutil.copytree(folder / name, tmp_path / name)
    weights = tmp_path / "experts" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    bad, good = engine_of(tmp_path).predict(samples(["experts"], each=1) + samples(["default"], each=1))
    assert isinstance(bad, MopefuseError) and bad.code.startswith("MF-CKPT")
    assert isinstance(good, dict)


def test_damaged_values_are_errors_of_their_requests_only(folder: Path) -> None:
    good = {"image": picture(0), "text": "read the red digit"}
    requests = [
        Request("default", good),
        Request("default", {**good, "image": b"no image"}),
        Request("default", {**good, "image": "a text"}),
        Request("default", {**good, "text": b"bytes"}),
        Request("default", {"text": "no image"}),
        Request("default", good, top=0),
        Request("default", {**good, "image": _bomb()}),
        Request("default", good),
    ]
    answers = engine_of(folder).predict(requests)
    codes = [answer.code if isinstance(answer, MopefuseError) else "" for answer in answers]
    assert codes == ["", "MF-DATA-13", "MF-DATA-92", "MF-DATA-92", "MF-DATA-100", "MF-REQ-03", "MF-DATA-12", ""]
    assert answers[0] == answers[-1]


def _bomb() -> bytes:
    """A PNG of a few bytes that claims 40,000 x 40,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("limit", "answered"), [(8, 12), (4, 0)], ids=["halves-fit", "halves-do-not"])
def test_a_batch_that_does_not_fit_is_split_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int, answered: int
) -> None:
    sizes: list[int] = []
    run = SharedPair.run

    def small_memory(pair: SharedPair, batch: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(pair, batch)

    monkeypatch.setattr(SharedPair, "run", small_memory)
    answers = engine_of(folder).predict(samples(["default", "experts"], each=6))
    assert sizes == [12, 6, 6]
    assert sum(isinstance(answer, dict) for answer in answers) == answered
    assert all(isinstance(answer, dict | ResourceError) for answer in answers)


def test_an_unexpected_error_is_attributed_to_its_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = SharedPair.run

    def fails(pair: SharedPair, batch: Any) -> Any:
        if any(values["text"].decoded == "fail" for _, values in batch):
            raise ZeroDivisionError("secret")
        return run(pair, batch)

    monkeypatch.setattr(SharedPair, "run", fails)
    requests = samples(["default"], each=3)
    requests.insert(1, Request("default", {"image": picture(0), "text": "fail"}))
    answers = engine_of(folder).predict(requests)
    assert [isinstance(answer, dict) for answer in answers] == [True, False, True, True]
    assert isinstance(answers[1], RequestError) and answers[1].code == "MF-REQ-14"
    assert "secret" not in str(answers[1]) and "secret" in caplog.text


def test_a_prediction_that_is_not_finite_is_an_error(folder: Path, tmp_path: Path) -> None:
    model = randomised(0)
    with torch.no_grad():
        model.head.linear.bias.fill_(3e38)
        model.head.output.bias.fill_(3e38)
    mopefuse.save_adapter(model, tmp_path / "huge", labels=["a", "b", "c", "d"])
    (answer,) = engine_of(tmp_path).predict(samples(["huge"], each=1))
    assert isinstance(answer, MopefuseError) and answer.code == "MF-NUM-03"


def test_the_cache_keeps_to_its_limit_and_computes_each_value_once() -> None:
    cache = ContentCache(10 * (400 + 200))
    computed: list[int] = []

    def compute(positions: list[int]) -> torch.Tensor:
        computed.extend(keys[at] for at in positions)
        return torch.stack([torch.full((100,), float(keys[at])) for at in positions])

    keys = [1, 2, 1, 3]
    assert [int(value[0]) for value in cache.get_all(keys, compute)] == [1, 2, 1, 3]
    assert sorted(computed) == [1, 2, 3]
    keys = [1, 2, 3]
    cache.get_all(keys, compute)
    assert len(computed) == 3 and cache.bytes == 3 * 600
    keys = list(range(100, 120))
    cache.get_all(keys, compute)
    assert cache.bytes == 10 * 600
    keys = [1]
    cache.get_all(keys, compute)
    assert computed[-1] == 1, "the oldest entries made room"
    assert ContentCache(0).get_all([5], lambda at: torch.ones(1, 2))[0].tolist() == [1, 1]


def test_two_threads_load_a_model_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(folder)
    barrier = threading.Barrier(4)

    def ask() -> Any:
        barrier.wait()
        return engine.predict(samples(["default"], each=1))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.stats()["model_loads"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_mixed_batch_on_a_gpu_has_the_right_types(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in SHARED if SHARED[name].get("gate") != "none"]
    models = [randomised(seed, **SHARED[name]) for seed, name in enumerate(names)]
    encoders = models[0].encoders
    with FAKE, torch.inference_mode():
        for model in models:
            move(model)
        rows = []
        for number, model in enumerate(models):
            assert isinstance(model, ConditionalFusion)
            facts = Facts(("a",) * model.num_labels, model.task, (), ("image", "text"), (), False)
            resident = Resident(None, facts, None, take_weights(model, precision))  # type: ignore[arg-type]
            image = Image.new("RGB", (40, 40))
            rows += [(resident, {"image": Value(image, bytes([number])), "text": Value("red", b"1")})] * 2
        width = encoders["comp"].feature_width  # its number of tokens depends on values, which fake tensors do not have
        psi_BC = torch.ones(len(rows), width, device="cuda")
        monkeypatch.setattr(SharedPair, "_psi", lambda *arguments: psi_BC)
        pair = SharedPair(encoders, torch.device("cuda"), ContentCache(10**6), "")
        context = autocast(torch.bfloat16) if precision == "bf16" else torch.inference_mode()
        with context:
            logits, families = pair._forward(rows, joint=False, precision=precision)
    assert sum(len(numbers) for numbers, _ in logits) == len(rows)
    assert all(of_rows.is_cuda and of_rows.dtype == torch.float32 for _, of_rows in logits)
    assert {family.routing_BNK.dtype for family in families if family.routing_BNK is not None} == {torch.float32}


@pytest.mark.parametrize("name", ["..", "../default", "a/b", ".hidden", "", "x" * 300, "a\0b"])
def test_a_name_never_leaves_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    served = tmp_path / "served"
    served.mkdir()
    shutil.copytree(folder / "default", tmp_path / "default")
    shutil.copytree(folder / "default", served / ".hidden")
    with pytest.raises(RequestError, match="is served"):
        Catalogue(adapters=served).find(name)


@pytest.mark.parametrize("order", [("default", "lora"), ("lora", "default")], ids=" first, then ".join)
def test_a_tuned_encoder_is_not_shared(tmp_path: Path, order: tuple[str, str]) -> None:
    save(tmp_path, {"default": {}, "lora": {"comp_tuning": {"mode": "lora"}}})
    engine = engine_of(tmp_path)
    for name in (*order, *order):
        (request,) = samples([name], each=1)
        assert_equal(engine.predict([request])[0], expected(tmp_path, request))
    residents = [engine._models.get(engine.catalogue.find(name)) for name in ("default", "lora")]
    with pytest.raises(AssertionError, match="other models use"):
        residents[0].executor.encoders["comp"].tune()  # type: ignore[attr-defined]


def test_models_of_different_precision_do_not_share_features(tmp_path: Path) -> None:
    layers = {"layers": "last:2"}
    save(tmp_path, {"fp32": layers, "bf16": {**layers, "train": {"precision": "bf16"}}})
    requests = {name: [Request(name, one.values) for one in samples(["fp32"], each=4)] for name in ("fp32", "bf16")}
    for order in (("fp32", "bf16"), ("bf16", "fp32")):
        engine = engine_of(tmp_path)
        answers = {name: engine.predict(requests[name]) for name in order}
        for request, answer in zip(requests["fp32"], answers["fp32"], strict=True):
            assert_equal(answer, expected(tmp_path, request))
        assert answers["bf16"] == engine_of(tmp_path).predict(requests["bf16"])


def test_large_images_are_predicted_in_portions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopefuse.serving.engine.engine._PIXELS_AT_ONCE", 40 * 40 * 3)
    sizes: list[int] = []
    run = SharedPair.run

    def count(pair: SharedPair, batch: Any) -> Any:
        sizes.append(len(batch))
        return run(pair, batch)

    monkeypatch.setattr(SharedPair, "run", count)
    requests = samples(["default", "experts"], each=5)
    for request, answer in zip(requests, engine_of(folder).predict(requests), strict=True):
        assert_equal(answer, expected(folder, request))
    assert sizes == [4, 4, 2]


def test_a_batch_of_more_models_than_are_kept_loads_each_once(folder: Path) -> None:
    engine = engine_of(folder, resident=1)
    requests = samples(["default", "experts"], each=8)
    assert all(isinstance(answer, dict) for answer in engine.predict(requests))
    assert engine.stats()["model_loads"] == 2


def test_an_unknown_name_costs_little_among_many_models(folder: Path, tmp_path: Path) -> None:
    for number in range(200):
        served = tmp_path / f"{'a long name of a model ' * 5}{number}"
        served.mkdir()
        shutil.copy(folder / "default" / "manifest.json", served)
    catalogue = Catalogue(adapters=tmp_path)
    began = time.process_time()
    for number in range(64):
        with pytest.raises(RequestError, match="is served"):
            catalogue.find(f"{'a long name of the model ' * 4}{number}")
    assert time.process_time() - began < 1

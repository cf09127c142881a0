"""One loaded model used by several threads at once: every thread gets the same results as alone."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from conftest import call as command
from conftest import matrix
from encoder_cases import TIMM, save_hf
from families import FAMILIES, QUICK
from test_encoders import SENTENCES
from test_fusion import TEXTS, build, images, open_gates
from torch import Tensor

import mopefuse
from mopefuse.core import device as devices
from mopefuse.core import registry
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, Inputs, InsertedTokens, Prompt, create_encoder
from mopefuse.fusion.base import Fusion

pytest_plugins = ["families"]
THREADS = 4


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    """Let threads take turns within a call, so that a race shows after a few of them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def in_threads(call: Callable[[int], Any], calls: int) -> list[list[Any]]:
    """Return the results of `call(thread number)` for each thread; all threads start together."""
    start = Barrier(THREADS)

    def work(thread: int) -> list[Any]:
        start.wait()
        return [call(thread) for _ in range(calls)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(THREADS)))


def wrong(found: Sequence[Sequence[Any]], alone: Sequence[Any], same: Callable[[Any, Any], bool]) -> int:
    """Count the results in threads that differ from those computed alone."""
    return sum(not same(one, expected) for results, expected in zip(found, alone, strict=True) for one in results)


# -- encoders


def _samples(thread: int) -> int:
    """Batches of two sizes: using another thread's prompts is an error between sizes, and goes unnoticed within one."""
    return 1 + thread // 2


def inputs_of(encoder: Encoder, thread: int) -> Inputs:
    if encoder.modality == "text":
        texts = [SENTENCES[(thread + i) % len(SENTENCES)] for i in range(_samples(thread))]
        return encoder.preprocess.batch([encoder.preprocess.item(text) for text in texts])
    height, width = encoder.preprocess.size  # type: ignore[attr-defined]
    random = torch.Generator().manual_seed(thread)
    return {"pixels": torch.randn(_samples(thread), 3, height, width, generator=random)}


def prompted(encoder: Encoder, thread: int, *, gated: bool, insert: bool) -> Callable[[], Tensor]:
    """A call with inputs, prompts and inserted tokens of one thread."""
    inputs, random = inputs_of(encoder, thread), torch.Generator().manual_seed(10 + thread)
    prompts = [torch.randn(_samples(thread), 2 + thread, width, generator=random) for width in encoder.widths]
    gates = [torch.full((heads,), 0.5 + 0.1 * thread) for heads in encoder.heads]
    ahead = torch.randn(_samples(thread), 1 + thread, encoder.widths[0], generator=random)

    def prompt_at(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt | None:
        if insert and layer == 1:
            encoder.run_layer(0, tokens_BLD, mask_BL, Prompt(prompts[0]))  # like `pmf`
        if layer % 2 and thread % 2:
            return None
        return Prompt(prompts[layer], gates[layer] if gated else None)

    def call() -> Tensor:
        with torch.no_grad():
            return encoder.encode(inputs, prompt_at, InsertedTokens(ahead, blind=thread % 2) if insert else None).pooled_BC

    return call


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("family", matrix([*FAMILIES, "tiny-vision", "tiny-text"], [*QUICK, "tiny-text"]))
def test_threads_can_share_an_encoder(family: str, gated: bool, encoders: Mapping[str, Encoder]) -> None:
    encoder = encoders[family] if family in encoders else create_encoder(family.replace("-", ":"))
    calls = [prompted(encoder, thread, gated=gated, insert=encoder.supports_inserted_tokens) for thread in range(THREADS)]
    alone = [call() for call in calls]
    assert wrong(in_threads(lambda thread: calls[thread](), 8), alone, torch.equal) == 0


def test_an_encoder_is_reentrant() -> None:
    """The encoder is called within its own `prompt_at`; the outer call continues undisturbed."""
    encoder = create_encoder("tiny:vision")
    inputs, other = inputs_of(encoder, 0), prompted(encoder, 3, gated=True, insert=True)
    prompts = [torch.randn(1, 2, width) for width in encoder.widths]

    def prompt_at(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt:
        other()
        return Prompt(prompts[layer])

    expected = encoder.encode(inputs, lambda layer, tokens, mask: Prompt(prompts[layer])).pooled_BC
    assert torch.equal(encoder.encode(inputs, prompt_at).pooled_BC, expected)


def test_a_tokenizer_is_set_up_before_threads_use_it(tmp_path: Path) -> None:
    """Some versions of the library do not allow truncation to be changed while another thread uses the tokenizer."""
    save_hf("bert", tmp_path / "bert")
    preprocess = create_encoder(f"hf:{tmp_path / 'bert'}").preprocess
    tokenizer = preprocess.tokenize.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    before = tokenizer.truncation, tokenizer.padding
    assert before[0] is not None
    preprocess.batch(SENTENCES)
    assert (tokenizer.truncation, tokenizer.padding) == before


# -- models

METHODS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in registry.available(registry.FUSION)},
    "conditional, joint router, prompts in both": {"router": {"kind": "joint"}, "comp_tuning": {"mode": "prompts"}},
    "conditional, either": {"either": True},
}


def collated(model: Fusion, thread: int) -> Batch:
    count = _samples(thread)
    return model.collate(images(5)[thread : thread + count], TEXTS[thread : thread + count])


@pytest.mark.parametrize("gate", ["none", "zero"])
@pytest.mark.parametrize("method", matrix(METHODS, ["conditional", "pmf", "p-mmbt"]))
def test_threads_can_share_a_model(method: str, gate: str) -> None:
    text_first = method in ("mmbt", "p-mmbt")
    main, comp = ("tiny:text", "tiny:vision") if text_first else ("tiny:vision", "tiny:text")
    model = build(main, comp, prompts={"gate": gate}, **METHODS[method])
    open_gates(model)

    @torch.no_grad()
    def call(thread: int) -> Tensor:
        return model(collated(model, thread)).logits

    alone = [call(thread) for thread in range(THREADS)]
    assert wrong(in_threads(call, 10), alone, torch.equal) == 0


@torch.no_grad()
def test_prompts_omitted_in_one_thread_are_present_in_others() -> None:
    model = build()
    open_gates(model)

    def call(thread: int) -> Tensor:
        with model.without_prompts("static") if thread % 2 else nullcontext():
            return model(collated(model, thread)).logits

    alone = [call(thread) for thread in range(THREADS)]
    assert not torch.equal(alone[1], model(collated(model, 1)).logits)
    assert wrong(in_threads(call, 20), alone, torch.equal) == 0


# -- trained models


@pytest.fixture(scope="module")
def run_of_libraries(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose encoders are timm and transformers models."""
    folder = tmp_path_factory.mktemp("libraries")
    save_hf("bert", folder / "bert")
    flags = ("--main", f"timm:{TIMM['swin-padded']}", "--comp", f"hf:{folder / 'bert'}", "--device", "cpu", "--experts", "2")
    done = command("train", *flags, "--data", pairs, "--out", folder / "run", "--steps", "2")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize(
    "kind", matrix(["run", "run of libraries", "adapter", "onnx"], ["run"])
)
def test_threads_can_share_a_loaded_model(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run: Path = request.getfixturevalue("run_of_libraries" if kind == "run of libraries" else "trained")
    if not kind.startswith("run"):
        done = command("export", run, "-o", tmp_path / kind, "--format", kind)
        assert done.returncode == 0, done.stderr
    predictor = mopefuse.load(run if kind.startswith("run") else tmp_path / kind, device="cpu")

    def call(thread: int) -> list[dict[str, Any]]:
        count = _samples(thread)
        return predictor.predict(images(5)[thread : thread + count], TEXTS[thread : thread + count])

    alone = [call(thread) for thread in range(THREADS)]
    assert len({str(predictions) for predictions in alone}) == THREADS
    assert wrong(in_threads(call, 100), alone, operator.eq) == 0


def test_denormal_numbers_are_flushed_in_every_thread(monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    """The setting is specific to each thread."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: float(torch.tensor([1e-39]) * 0.5)).result() > 0  # this starts the thread, before the model
        monkeypatch.setenv(devices.FLUSH, "1")
        predictor = mopefuse.load(trained, device="cpu")
        try:
            pool.submit(predictor.predict, images(1), TEXTS[:1]).result()
            assert pool.submit(lambda: float(torch.tensor([1e-39]) * 0.5)).result() == 0
        finally:
            torch.set_flush_denormal(False)


def test_threads_can_build_models_concurrently() -> None:
    """Random weights, such as those of an untrained encoder, are drawn from one generator of the process."""
    spec = "timm:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2&embed_dim=48&pretrained=false"
    expected = build(spec, "tiny:text").encoder("main").fingerprint()
    found = in_threads(lambda thread: build(spec, "tiny:text").encoder("main").fingerprint(), 3)
    assert wrong(found, [expected] * THREADS, operator.eq) == 0

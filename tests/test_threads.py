"""One loaded model, used by several threads at once: every thread gets what it would get alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from test_encoders import FAMILIES, SENTENCES, cases, encoders  # noqa: F401 (fixtures)
from torch import Tensor

from mopefuse.encoders._base import Encoder, Inputs, Insert, Prompt, create_encoder

THREADS = 4


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    """Threads take turns every few microseconds, so that a race shows within few calls."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(call: Callable[[int], Any], calls: int) -> list[list[Any]]:
    """What `call(number of the thread)` gives each time, for each thread; all threads begin together."""
    start = Barrier(THREADS)

    def work(thread: int) -> list[Any]:
        start.wait()
        return [call(thread) for _ in range(calls)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(THREADS)))


def wrong(found: Sequence[Sequence[Any]], alone: Sequence[Any], same: Callable[[Any, Any], bool]) -> int:
    """How many of the results in threads differ from those alone."""
    return sum(not same(one, expected) for results, expected in zip(found, alone, strict=True) for one in results)


# -- encoders


def _samples(thread: int) -> int:
    """Batches of two sizes: taking another thread's prompts is an error between sizes, and goes unnoticed within one."""
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
            encoder.run_layer(0, tokens_BLD, mask_BL, Prompt(prompts[0]))  # as `pmf` does
        if layer % 2 and thread % 2:
            return None
        return Prompt(prompts[layer], gates[layer] if gated else None)

    def call() -> Tensor:
        with torch.no_grad():
            return encoder.encode(inputs, prompt_at, Insert(ahead, blind=thread % 2) if insert else None).pooled_BC

    return call


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("family", [*FAMILIES, "tiny-vision", "tiny-text"])
def test_threads_share_an_encoder(family: str, gated: bool, encoders: dict[str, Encoder]) -> None:  # noqa: F811
    encoder = encoders[family] if family in encoders else create_encoder(family.replace("-", ":"))
    calls = [prompted(encoder, thread, gated=gated, insert=encoder.insertable) for thread in range(THREADS)]
    alone = [call() for call in calls]
    assert wrong(in_threads(lambda thread: calls[thread](), 8), alone, torch.equal) == 0

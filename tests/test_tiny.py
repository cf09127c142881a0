"""Claims about the tiny encoders that are part of the package."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mopefuse.data.sets import digit_questions as dq
from mopefuse.encoders import tiny
from mopefuse.encoders.attention import Prompt
from mopefuse.encoders.base import Encoder, Inputs, create_encoder
from mopefuse.errors import EncoderError
from mopefuse.testing import check_encoder

SPECS = ("tiny:vision", "tiny:text")
TEXTS = [
    "what is the green number?",
    "read it",
    "a zebra: the digit, painted in red, at the bottom left of the picture",
]


def encoder_and_batch(spec: str) -> tuple[Encoder, Inputs]:
    encoder = create_encoder(spec)
    if encoder.modality == "text":
        values = [encoder.preprocess.item(text) for text in TEXTS]
    else:
        made = dq.compose("val", 12, seed=0)
        lookup = {index: value for index, value in zip(*dq.handwriting("val")[:2], strict=True)}
        pixels = torch.tensor([[lookup[sample].tolist() for sample in four] for four in made.samples_N4]).numpy()
        values = [encoder.preprocess.item(Image.fromarray(image)) for image in dq.paint(pixels, made.colours_N4)]
    return encoder, encoder.preprocess.finish(encoder.preprocess.batch(values))


def prompts(encoder: Encoder, batch: int, length: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, length, width, generator=generator) for width in encoder.widths]


@torch.no_grad()
def with_inserted_tokens(encoder: tiny.TinyEncoder, inputs: Inputs, prompts: list[Tensor]) -> Tensor:
    """The papers' definition, computed by hand: prompts are tokens in front of the others, dropped after each block."""
    x, mask = encoder.embed(inputs)
    real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    for block, prompt in zip(encoder.blocks, prompts, strict=True):
        length = prompt.shape[1]
        both = torch.cat([prompt, x], dim=1)
        qkv = block.qkv(block.norm1(both)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = qkv[0] @ qkv[1].transpose(-1, -2) / qkv.shape[-1] ** 0.5
        scores = scores.masked_fill(~F.pad(real, (length, 0), value=True)[:, None, None], float("-inf"))
        both = both + block.proj((scores.softmax(dim=-1) @ qkv[2]).transpose(1, 2).flatten(2))
        both = both + block.fc2(F.gelu(block.fc1(block.norm2(both))))
        x = both[:, length:]
    return encoder.norm(x)


@pytest.mark.parametrize("spec", SPECS)
def test_the_encoders_are_tiny(spec: str) -> None:
    assert sum(parameter.numel() for parameter in create_encoder(spec).parameters()) < 600_000


def test_the_packaged_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in Path(str(tiny.WEIGHTS)).iterdir() if path.is_file()) < 4_000_000


@pytest.mark.parametrize("spec", SPECS)
def test_keys_and_values_equal_inserted_tokens(spec: str) -> None:
    encoder, inputs = encoder_and_batch(spec)
    given = prompts(encoder, batch=3)
    tokens = encoder.encode(inputs, lambda layer, tokens, mask: Prompt(given[layer])).tokens_BLD
    real = inputs.get("mask", torch.ones(tokens.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(tokens[real], with_inserted_tokens(encoder, inputs, given)[real], atol=2e-5, rtol=1e-5)
    assert (tokens - encoder.encode(inputs).tokens_BLD)[real].abs().mean() > 0.01


@pytest.mark.parametrize("spec", SPECS)
def test_no_prompt_and_a_zero_gate_leave_the_encoder_unchanged_bit_for_bit(spec: str) -> None:
    encoder, inputs = encoder_and_batch(spec)
    given, bare = prompts(encoder, batch=3), encoder.encode(inputs)
    for prompt_at in (lambda layer, *_: None, lambda layer, *_: Prompt(given[layer], torch.zeros(encoder.heads[layer]))):
        for got, expected in zip(encoder.encode(inputs, prompt_at)[:2], bare[:2], strict=True):
            assert torch.equal(got, expected)
    opened = encoder.encode(inputs, lambda layer, *_: Prompt(given[layer], torch.ones(encoder.heads[layer])))
    assert not torch.allclose(opened.pooled_BC, bare.pooled_BC)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("spec", [*SPECS, "tiny:vision?pool=mean", "tiny:text?pool=cls", "tiny:vision?pool=cls+mean"])
def test_a_sample_does_not_depend_on_its_batch(spec: str, gated: bool) -> None:
    encoder, inputs = encoder_and_batch(spec)
    given = prompts(encoder, batch=3)

    def pooled(inputs: Inputs, rows: slice) -> Tensor:
        gates = [torch.linspace(-1, 1, heads) if gated else None for heads in encoder.heads]
        return encoder.encode(inputs, lambda layer, *_: Prompt(given[layer][rows], gates[layer])).pooled_BC

    batched = pooled(inputs, slice(None))
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        if "mask" in alone:
            alone = {name: value[:, : int(alone["mask"].sum())] for name, value in alone.items()}
        single = pooled(alone, slice(row, row + 1))
        torch.testing.assert_close(single, batched[row : row + 1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_every_layer_requests_its_prompt_once_with_its_tokens(spec: str) -> None:
    encoder, inputs = encoder_and_batch(spec)
    requests: list[tuple[int, tuple[int, ...]]] = []
    encoder.encode(inputs, lambda layer, tokens, mask: requests.append((layer, tuple(tokens.shape))))
    length = encoder.encode(inputs).tokens_BLD.shape[1]
    assert requests == [(layer, (3, length, width)) for layer, width in enumerate(encoder.widths)]


def test_gradients_reach_prompts_but_no_frozen_weights() -> None:
    encoder, inputs = encoder_and_batch("tiny:vision")
    given = [prompt.requires_grad_() for prompt in prompts(encoder, batch=3)]
    encoder.encode(inputs, lambda layer, *_: Prompt(given[layer])).pooled_BC.sum().backward()
    assert all(prompt.grad is not None and prompt.grad.abs().sum() > 0 for prompt in given)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_texts_are_lower_cased_split_truncated_and_unknown_words_marked() -> None:
    ids, mask = tiny.tokenize(["The RED digit?", "xylophone", "", "read " * 50], tiny.MAX_TOKENS)
    known = tiny.vocabulary()
    assert ids[0, :5].tolist() == [tiny.CLS, known["the"], known["red"], known["digit"], known["?"]]
    assert ids[1, 1] == tiny.UNKNOWN
    assert mask.sum(dim=1).tolist() == [5, 2, 1, tiny.MAX_TOKENS]
    assert list(known)[:4] == ["<pad>", "<cls>", "<mask>", "<unk>"]


def test_the_vocabulary_covers_every_question() -> None:
    texts = {question.text for split in dq.SPLITS for question in dq.compose(split, 2000, seed=0).questions}
    assert not (tiny.tokenize(sorted(texts), 99)[0] == tiny.UNKNOWN).any()


def test_pretrained_false_gives_random_weights() -> None:
    for spec in SPECS:
        assert create_encoder(spec).fingerprint() == create_encoder(spec).fingerprint()
        untrained = create_encoder(f"{spec}?pretrained=false").fingerprint()
        assert untrained not in (
            create_encoder(spec).fingerprint(),
            create_encoder(f"{spec}?pretrained=false").fingerprint(),
        )


@pytest.mark.parametrize(
    ("spec", "code", "hint"),
    [
        ("tiny:visoin", "MF-ENC-51", "vision"),
        ("tiny:text?pol=mean", "MF-ENC-52", "pool"),
        ("tiny:text?pool=max", "MF-ENC-53", "pool=mean"),
        ("tiny:text?pretrained=maybe", "MF-ENC-22", "maybe"),
    ],
)
def test_unknown_names_and_options_are_refused(spec: str, code: str, hint: str) -> None:
    with pytest.raises(EncoderError) as refusal:
        create_encoder(spec)
    assert refusal.value.code == code
    assert hint in str(refusal.value)


def test_damaged_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiny, "WEIGHTS", tmp_path)
    with pytest.raises(EncoderError, match="cannot load the weights"):
        create_encoder("tiny:vision")
    (tmp_path / "tiny-vision.safetensors").write_bytes(b"not tensors")
    with pytest.raises(EncoderError, match="reinstall"):
        create_encoder("tiny:vision")


@pytest.mark.parametrize("spec", SPECS)
def test_tiny_encoders_satisfy_the_contract(spec: str) -> None:
    assert check_encoder(spec).supports_inserted_tokens

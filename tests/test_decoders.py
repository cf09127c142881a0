"""Language models as text encoders: causal, with rotary positions, and with tokenizers that have neither padding nor special
tokens."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import TINY, call, make_pairs, ranks
from encoder_cases import sharpen
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from mopefuse.encoders._hf_text import padding_id
from mopefuse.encoders.base import Encoder, Prompt, create_encoder
from mopefuse.errors import MopefuseError
from mopefuse.testing import check_encoder

END = 1  # id of the end of a text
QWEN = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "vocab_size": 300, "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": END, "pad_token_id": None,
}  # fmt: skip
SENTENCES = ["a photo of two cats", "no", "the quick brown fox jumps over the lazy dog", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model as it is published: with its head, in bfloat16, and a tokenizer that would pad on the left."""
    root = tmp_path_factory.mktemp("qwen")
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN))
    sharpen(model)
    model.bfloat16().save_pretrained(root)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<|start|>", "<|endoftext|>"], initial_alphabet=letters)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", padding_side="left")
    fast.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return create_encoder(f"hf:{folder}")


def prompts(encoder: Encoder, count: int = 4) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(count, 5, width, generator=random) for width in encoder.widths]


def test_it_satisfies_the_contract_also_with_an_empty_text(encoder: Encoder) -> None:
    check_encoder(encoder, SENTENCES)
    assert len(encoder.widths) == 3


def test_it_is_the_model_without_head_in_float32_pooled_at_the_last_token(encoder: Encoder, folder: Path) -> None:
    plain = transformers.Qwen2Model.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = encoder.preprocess.batch(SENTENCES)
    with torch.no_grad():
        ours = encoder.encode(inputs)
        for row, mask in enumerate(inputs["mask"]):
            alone = plain(input_ids=inputs["ids"][row : row + 1, mask]).last_hidden_state
            torch.testing.assert_close(ours.pooled_BC[row], alone[0, -1])
    assert ours.pooled_BC.dtype == torch.float32


def test_padding_is_on_the_right_and_the_end_of_a_text_stands_for_it(encoder: Encoder) -> None:
    inputs = encoder.preprocess.batch(SENTENCES)
    lengths = inputs["mask"].sum(dim=1)
    assert inputs["mask"][:, 0].all() and lengths[2] > lengths[0] > lengths[1]
    assert not (inputs["ids"][:3] == END)[inputs["mask"][:3]].any(), "no text ends with it, as this tokenizer adds nothing"
    assert lengths[3] == 1 and inputs["ids"][3, 0] == END, "an empty text is one token"
    assert (inputs["ids"][~inputs["mask"]] == END).all()


def test_prompts_are_seen_by_every_token_and_tokens_by_later_ones_only(encoder: Encoder) -> None:
    given = prompts(encoder, 1)
    one, other = (encoder.preprocess.batch([text]) for text in ("a photo of two cats", "a photo of two dogs"))
    with torch.no_grad():
        plain = encoder.encode(one).tokens_BLD
        prompted, changed = (encoder.encode(x, lambda at, *more: Prompt(given[at])).tokens_BLD for x in (one, other))
    assert ((prompted - plain).abs().amax(dim=(0, 2)) > 1e-3).all(), "also by the first"
    torch.testing.assert_close(prompted[:, :3], changed[:, :3])
    assert (prompted[:, -1] - changed[:, -1]).abs().max() > 1e-3


def test_prompt_tokens_have_no_position_so_their_order_has_no_effect(encoder: Encoder) -> None:
    inputs, given = encoder.preprocess.batch(SENTENCES), prompts(encoder)
    with torch.no_grad():
        in_order = encoder.encode(inputs, lambda at, *more: Prompt(given[at])).pooled_BC
        reversed_ = encoder.encode(inputs, lambda at, *more: Prompt(given[at].flip(1))).pooled_BC
    torch.testing.assert_close(in_order, reversed_, atol=1e-4, rtol=1e-4)


def test_texts_are_truncated_to_512_tokens_unless_another_length_is_set(encoder: Encoder, folder: Path) -> None:
    assert encoder.preprocess.describe()["max_tokens"] == 512
    assert create_encoder(f"hf:{folder}?max_tokens=2048").preprocess.describe()["max_tokens"] == 2048
    with pytest.raises(MopefuseError, match="from 2 to 2048"):
        create_encoder(f"hf:{folder}?max_tokens=4096")


def test_options_that_make_no_sense_are_refused(folder: Path) -> None:
    with pytest.raises(MopefuseError, match="pool=cls is not supported") as caught:
        create_encoder(f"hf:{folder}?pool=cls")
    assert caught.value.fix == "use last or mean"
    with pytest.raises(MopefuseError, match="weights are loaded in float32") as caught:
        create_encoder(f"hf:{folder}?dtype=bfloat16")
    assert "quantize=int8" in caught.value.fix


@pytest.mark.parametrize(
    ("configured", "pad", "end", "expected"),
    [(3, 4, 5, 3), (None, 4, 5, 4), (-1, None, 5, 5), (None, 64, 5, 5), (None, None, None, 0)],
)
def test_padding_is_the_first_id_that_is_named_and_in_the_vocabulary(
    configured: int | None, pad: int | None, end: int | None, expected: int
) -> None:
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=end)
    assert padding_id({"pad_token_id": configured, "vocab_size": 64}, tokenizer) == expected


@pytest.mark.parametrize("side", ["main", "comp"])
def test_a_quantised_language_model_is_trained_with_and_loaded_again(side: str, folder: Path, tmp_path: Path) -> None:
    data, run, spec = make_pairs(tmp_path / "data"), tmp_path / "run", f"hf:{folder}?quantize=int8"
    specs = {"main": "tiny:vision", "comp": "tiny:vision", side: spec}
    options = ("--set", "prompts.layers=last:1", "--set", "data.cache_prefix=on", "--steps", "3", *TINY[4:])
    pair = ("--main", specs["main"], "--comp", specs["comp"])
    done = call("train", *pair, "--data", data, "--out", run, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "manifest.json").read_text())["encoders"][side]["description"]["model"]["quantize"] == "int8"
    files = [tmp_path / f"{name}.csv" for name in "ab"]
    for file in files:
        assert call("predict", run, data / "test.jsonl", "-o", file, "--device", "cpu").returncode == 0
    assert files[0].read_text() == files[1].read_text() and files[0].read_text().count("\n") == 8


@pytest.mark.process
def test_a_sharded_quantised_language_model_is_trained_with_as_a_whole_one(folder: Path, tmp_path: Path) -> None:
    """Both sides in two processes, with the outputs of early layers cached."""
    data = make_pairs(tmp_path / "data")
    options = ["--layers", "last:1", "--cache-prefix", "on", "--warm-start", "none", "--batch", "5", "--steps", "4"]
    options += ["--main", f"hf:{folder}?quantize=int8", "--comp", "tiny:vision?quantize=int8", "--device", "cpu"]
    for name, more in (("whole", []), ("sharded", ["--shard-encoders", "both"])):
        own = str(tmp_path / "cache" / name)
        done = ranks(2, "train", *options, *more, "--data", data, "--out", tmp_path / name, MOPEFUSE_CACHE=own)
        assert done.returncode == 0, done.stderr
    whole, sharded = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "sharded"))
    assert whole == sharded
    assert call("eval", tmp_path / "sharded", "--json").returncode == 0

"""`condition: tokens`: mapped prompts from the output tokens of the complementary encoder, of which psi is the limit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, call, code_of, plain_config, ranks, write_rows
from test_fusion import TEXTS, build, images, open_gates
from test_prefix_cache import Notices, assert_same_course, log, make_texts
from torch import Tensor

from mopefuse.core import cache
from mopefuse.core.precision import normalize_feature
from mopefuse.data.base import Batch
from mopefuse.data.load import load_data
from mopefuse.data.token_cache import split_tokens
from mopefuse.encoders._window_attention import attend_in_windows
from mopefuse.encoders.attention import attend
from mopefuse.encoders.base import Encoder, create_encoder
from mopefuse.encoders.tiny import TinyEncoder
from mopefuse.errors import ConfigError, EncoderError, Interrupted
from mopefuse.evaluation.audit import audit
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.conditional import ConditionalFusion
from mopefuse.prompts.resampler import ConditionTokens
from mopefuse.testing import check_encoder, check_fusion
from mopefuse.training.swap import swap_encoder
from mopefuse.training.train import train

pytest_plugins = ["families"]
CPU = torch.device("cpu")
RESAMPLED, ALL = {"condition": "tokens"}, {"condition": "tokens", "condition_tokens": 0}
KINDS = pytest.mark.parametrize("prompts", [RESAMPLED, ALL], ids=["resampled", "all"])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_texts(tmp_path_factory.mktemp("tokens") / "data")


def opened(main: str = "tiny:vision", comp: Any = "tiny:text", **options: Any) -> Fusion:
    """A model whose prompts have an effect."""
    model = build(main, comp, **options)
    open_gates(model)
    return model


def with_tokens(model: Fusion, batch: Batch, values_BLC: Tensor, mask_BL: Tensor) -> Tensor:
    """Logits for given condition tokens."""
    features = {"comp": torch.zeros(len(values_BLC), 96)}
    tokens = {"comp": {"values_BLC": values_BLC, "mask_BL": mask_BL}}
    with torch.no_grad():
        return model(replace(batch, features=features, tokens=tokens)).logits


def settings(root: Path, **more: Any) -> Any:
    """Texts condition images; keys of `more` are ``section__key``."""
    values: dict[str, Any] = {
        "main": "tiny:vision", "comp": "tiny:text", "device": "cpu",
        "prompts": {"experts": 2, "layers": "last:1", "condition": "tokens", "condition_tokens": 3},
        "data": {"path": str(root), "cache_prefix": "off", "prefix_precision": "float32"},
        "train": {"batch_size": 5, "epochs": 2, "lr": 0.01, "log_every": 1},
    }  # fmt: skip
    for name, value in more.items():
        section, _, key = name.partition("__")
        if key:
            values[section][key] = value
        else:
            values[name] = value
    return plain_config(values)


# -- masked prompts


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_masked_prompt_tokens_are_as_good_as_absent(gated: bool, mask: str | None) -> None:
    """Computed for each sample with its own tokens only; the contract of encoders has the same for every family."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    prompt_k, prompt_v = torch.randn(2, 2, 2, 3, 4)
    prompt_mask = torch.tensor([[True, False, False], [True, False, True]])
    gate = torch.tensor([0.3, -0.8]) if gated else None
    given = None if mask is None else torch.tensor([True] * 4 + [False]).expand(2, 1, 1, 5)
    given = torch.randn(2, 2, 5, 5) if mask == "additive" else given
    together = attend(q, k, v, prompt_k, prompt_v, gate_H=gate, mask=given, prompt_mask_BP=prompt_mask)
    for index in range(2):
        one, own = slice(index, index + 1), prompt_mask[index]
        alone = attend(
            q[one], k[one], v[one], prompt_k[one][:, :, own], prompt_v[one][:, :, own], gate_H=gate,
            mask=None if given is None else given[one],
        )  # fmt: skip
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("gated", [True, False])
def test_windows_of_an_image_share_its_mask_in_both_directions(gated: bool) -> None:
    """Values and gradients of two images of three windows each, against each image with its own prompt tokens alone."""
    torch.manual_seed(0)
    qkv = torch.randn(6, 4, 3 * 8, requires_grad=True)
    keys, values = (torch.randn(2, 2, 3, 4, requires_grad=True) for _ in range(2))
    prompt_mask = torch.tensor([[False, True, True], [True, False, False]])
    how: dict[str, Any] = {"gate_H": torch.tensor([0.3, -0.8]) if gated else None, "scale": 0.5}
    how |= {"bias_1HLL": torch.randn(1, 2, 4, 4), "mask_WLL": torch.randn(3, 4, 4)}
    together = attend_in_windows(qkv, keys, values, prompt_mask_BP=prompt_mask, **how)
    parts = [
        attend_in_windows(qkv[3 * i : 3 * i + 3], keys[i : i + 1, :, own], values[i : i + 1, :, own], **how)
        for i, own in enumerate(prompt_mask)
    ]
    torch.testing.assert_close(together, torch.cat(parts))
    found = torch.autograd.grad(together.sin().sum(), (qkv, keys, values))
    expected = torch.autograd.grad(torch.cat(parts).sin().sum(), (qkv, keys, values))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_contract_finds_an_encoder_that_ignores_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    own = TinyEncoder._run_block
    without = lambda prompt: prompt and prompt._replace(mask_BP=None)  # noqa: E731
    monkeypatch.setattr(TinyEncoder, "_run_block", lambda self, block, x, mask, p: own(self, block, x, mask, without(p)))
    with pytest.raises(AssertionError, match=r"masked tokens of prompts have an effect on sample 0.*prompt_mask_BP"):
        check_encoder("tiny:text")


# -- limits and independence


@pytest.mark.parametrize("gate", ["zero", "none"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_token_equal_to_psi_is_the_pooled_condition(gate: str, count: int) -> None:
    """Of all tokens, or one resampled, to the bit. Three equal tokens are one in a softmax without other prompts."""
    lengths = {} if count < 2 else {"static": 0, "dynamic": 0}
    gates = {"gate": gate} if count < 2 else {"gate": "zero"}
    pooled = opened(**lengths, **gates)
    tokens = opened(condition="tokens", condition_tokens=count, **lengths, **gates)
    state = {name.replace("stack.trunk.", "stack.resamplers.comp.trunk."): t for name, t in pooled.state_dict().items()}
    assert set(tokens.load_state_dict(state, strict=False).missing_keys) <= {
        "stack.resamplers.comp.queries_Rh", "stack.resamplers.comp.key.weight"
    }  # fmt: skip
    batch = pooled.collate(images(4), TEXTS[:4])
    with torch.no_grad():
        psi_BC = pooled.psi("comp", batch)  # type: ignore[operator]
        features = {"comp": psi_BC}
        given = {"values_BLC": normalize_feature(psi_BC)[:, None], "mask_BL": torch.ones(4, 1, dtype=torch.bool)}
        found = tokens(replace(batch, features=features, tokens={"comp": given})).logits
        expected = pooled(batch).logits
        assert not torch.equal(expected, pooled(replace(batch, features={"comp": psi_BC.flip(0)})).logits)
    if count < 2:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected)


def test_resampled_tokens_match_the_definition() -> None:
    """For one sample without padding: softmax of queries times projected keys, over what the trunk makes of each token."""
    stack = build(**RESAMPLED).stack  # type: ignore[union-attr]
    resampler, values_LC = stack.resamplers["comp"], torch.randn(5, 96)  # type: ignore[union-attr, index]
    found, mask = resampler(ConditionTokens(values_LC[None], None))  # type: ignore[operator]
    each_Lh = torch.stack([resampler.trunk(value_C) for value_C in values_LC])  # type: ignore[operator, union-attr]
    key_Lh = each_Lh @ resampler.key.weight.T  # type: ignore[union-attr, operator]
    weights_RL = torch.softmax(resampler.queries_Rh @ key_Lh.T / 80**0.5, dim=1)  # type: ignore[union-attr, operator]
    assert mask is None and found.shape == (1, 8, 80)
    torch.testing.assert_close(found[0], weights_RL @ each_Lh)
    assert not torch.allclose(found[0, 0], found[0, 1], atol=1e-3), "each query reads something of its own"


@KINDS
def test_padding_has_no_effect(prompts: dict[str, Any]) -> None:
    model = opened(**prompts)
    batch = model.collate(images(3), TEXTS[:3])
    torch.manual_seed(0)
    values_BLC, mask_BL = torch.randn(3, 6, 96), torch.arange(6) < torch.tensor([[6], [2], [1]])
    expected = with_tokens(model, batch, values_BLC, mask_BL)
    other = torch.where(mask_BL[..., None], values_BLC, torch.randn(3, 6, 96))
    assert torch.equal(with_tokens(model, batch, other, mask_BL), expected)
    longer = with_tokens(model, batch, F.pad(values_BLC, (0, 0, 0, 9), value=3.0), F.pad(mask_BL, (0, 9)))
    torch.testing.assert_close(longer, expected)
    assert not torch.allclose(with_tokens(model, batch, values_BLC, torch.ones_like(mask_BL)), expected, atol=1e-4)


@KINDS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "none"},
        {"mapped": 2, "comp": ["tiny:text", "tiny:vision-b"]},
        {"main": "tiny:text", "comp": "tiny:vision"},
        {"comp_tuning": {"mode": "prompts"}, "film": True},
    ],
    ids=str,
)
def test_a_sample_does_not_depend_on_its_batch(prompts: dict[str, Any], options: dict[str, Any]) -> None:
    model = opened(**prompts, **options)
    together = model(model.collate(images(5), TEXTS)).logits
    for i, (image, text) in enumerate(zip(images(5), TEXTS, strict=True)):
        alone = model(model.collate([image], [text])).logits[0]
        torch.testing.assert_close(alone, together[i], atol=1e-5, rtol=1e-5)


@KINDS
@pytest.mark.parametrize("more", [{}, {"dynamic": 0, "mapped": 2}], ids=["routed", "tokens alone"])
def test_the_method_keeps_its_contract(prompts: dict[str, Any], more: dict[str, Any]) -> None:
    """Without routing nothing reads psi, so that there is no absent psi either."""
    model = check_fusion("conditional", settings={"prompts": {"experts": 2, **prompts, **more}})
    assert model.reads_tokens == model.frozen == ("comp",)
    assert "other" not in model.breakdown() and model.breakdown()["resampler"] > 0


@KINDS
def test_a_sample_without_the_modality_has_the_learned_token_alone(prompts: dict[str, Any]) -> None:
    """Whatever stands in its place: a blank text is one token, and padded with those of the longest text."""
    model = opened(**prompts, data={"on_missing": "absent"})
    resampler = model.stack.resamplers["comp"]  # type: ignore[union-attr, index]
    with torch.no_grad():
        model.absent["comp"].normal_()
        resampler.absent_C.normal_()  # type: ignore[union-attr, operator]
    batch = model.collate(images(3), [TEXTS[0], None, TEXTS[2]])
    missing = batch.missing["comp"]
    values_BLC, mask_BL = torch.randn(3, 7, 96), torch.ones(3, 7, dtype=torch.bool)
    values_BLC[1, 0] = resampler.absent_C.detach()  # type: ignore[union-attr, operator]
    mask_BL[1, 1:] = False
    expected = with_tokens(model, batch, values_BLC, mask_BL)
    found = with_tokens(model, batch, torch.where(missing[:, None, None], 5.0, values_BLC), torch.ones(3, 7).bool())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model(batch).logits[1], expected[1], atol=1e-5, rtol=1e-5)
    model(batch).logits.sum().backward()
    assert resampler.absent_C.grad.abs().sum() > 0  # type: ignore[union-attr]


# -- refusals


def test_an_encoder_without_tokens_is_refused() -> None:
    encoders = {"main": create_encoder("tiny:vision"), "comp": create_encoder("tiny:text")}
    encoders["comp"].token_width = 0
    with pytest.raises(EncoderError, match="tiny:text does not provide its tokens") as raised:
        ConditionalFusion(plain_config({"main": "a:1", "comp": "b:2", "prompts": RESAMPLED}), encoders, 2)
    assert raised.value.where == "--condition tokens" and "--condition pooled" in raised.value.fix


def test_tokens_without_mapped_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="condition is tokens, but mapped is 0"):
        build(**RESAMPLED, mapped=0)


def test_towers_of_clip_provide_their_tokens(encoders: Mapping[str, Encoder]) -> None:
    """Of the width that they declare, as the contract of encoders has it."""
    for family in ("open_clip-visual", "open_clip-text"):
        assert encoders[family].token_width == encoders[family].widths[-1]


# -- runs


def test_tokens_are_cached_without_padding_and_give_what_the_encoder_gives(data: Path, folder: Path) -> None:
    encoder, config = create_encoder("tiny:text"), settings(data)
    table = split_tokens(encoder, load_data(config.data), "train", config, CPU)
    assert not isinstance(table, str)
    lengths = [2 + 3 * (1 + number % 4) for number in range(16)]
    assert table.size == sum(lengths) * 96 * 4 and table.origin == "kept in the cache"
    index = torch.tensor([5, 2, 5])
    texts = [row.values["text"] or "" for row in load_data(config.data).splits["train"].rows]
    found = table[index]
    assert found["mask_BL"].sum(dim=1).tolist() == [lengths[number] for number in index.tolist()]
    for values_LC, mask_L, number in zip(found["values_BLC"], found["mask_BL"], index.tolist(), strict=True):
        encoded = encoder.encode(encoder.preprocess.batch([encoder.preprocess.item(texts[number])]))
        torch.testing.assert_close(values_LC[mask_L], normalize_feature(encoded.tokens_BLD[0]).detach(), atol=1e-5, rtol=1e-5)
        assert (values_LC[~mask_L] == 0).all()
    assert split_tokens(encoder, load_data(config.data), "train", config, CPU).origin == "read from the cache"  # type: ignore[union-attr]
    assert [kind for kind, *_ in cache.entries()].count("tokens") == 1


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"prompts__condition_tokens": 0, "prompts__dropout": 0.0, "train__modality_dropout": 0.3, "train__accumulate": 2},
        pytest.param({"comp": ["tiny:text", "tiny:vision-b"], "prompts__film": True}, marks=pytest.mark.matrix),
        pytest.param({"main": "tiny:text", "comp": "tiny:vision", "warm_start": "linear"}, marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_a_run_with_cached_tokens_takes_the_course_of_one_without(
    data: Path, tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of all tokens without dropout: a dropped text still pads its batch where it is cached, not where it is blank."""
    train(settings(data, **more), tmp_path / "cached")
    train(settings(data, **more, data__cache_features=False), tmp_path / "plain")
    assert_same_course(tmp_path / "cached", tmp_path / "plain")
    ran: list[str] = []
    own = TinyEncoder._encode
    monkeypatch.setattr(TinyEncoder, "_encode", lambda self, inputs: ran.append(self.modality) or own(self, inputs))
    train(settings(data, **more), tmp_path / "again")
    if "comp" not in more:
        assert "text" not in ran, "nothing runs the complementary encoder any more"
    assert log(tmp_path / "again") == log(tmp_path / "cached")


def test_half_precision_is_close_and_beyond_the_limit_nothing_is_cached(data: Path, tmp_path: Path) -> None:
    train(settings(data, data__prefix_precision="float16"), tmp_path / "half")
    heard = Notices()
    train(settings(data, data__cache_prefix_limit=1e-6), tmp_path / "live", listener=heard)
    assert_same_course(tmp_path / "half", tmp_path / "live", tolerance=0.01)
    (notice,) = [text for text in heard.texts if text.startswith("train: output tokens")]
    assert "computed in every step" in notice and "--set data.cache_prefix_limit=" in notice
    enough = float(notice.split("cache_prefix_limit=")[1])
    heard = Notices()
    train(settings(data, data__cache_prefix_limit=enough), tmp_path / "cached", listener=heard)
    assert any("train: output tokens of tiny:text take" in text and "kept in the cache" in text for text in heard.texts)


def test_a_resumed_run_is_equal_to_the_bit(data: Path, tmp_path: Path) -> None:
    config = settings(data, data__prefix_precision="float16", train__checkpoint_every=3)
    train(config, tmp_path / "whole")

    class Stop(Notices):
        def on_step(self, progress: Any, total: int, loss: float, lr: float) -> None:
            if progress.step == 3:
                os.kill(os.getpid(), 15)

    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", listener=Stop())
    train(config, tmp_path / "parts", resume=True)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    other = settings(data, prompts__condition="pooled")
    assert code_of(lambda: train(other, tmp_path / "parts", resume=True)) == "MF-CFG-32"


@pytest.mark.process
def test_two_processes_equal_one(data: Path, tmp_path: Path) -> None:
    common = [*TINY, "--data", data, "--layers", "last:1", "--steps", 4, "--condition", "tokens"]
    common += ["--set", "data.prefix_precision=float32", "--set", "prompts.dropout=0", "--set", "router.noise=false"]
    for processes in (2, 1):
        os.environ["MOPEFUSE_CACHE"] = str(tmp_path / f"cache-{processes}")
        done = ranks(processes, "train", *common, "--set", "train.log_every=1", "--out", tmp_path / str(processes))
        assert done.returncode == 0, done.stderr
    assert_same_course(tmp_path / "2", tmp_path / "1")
    assert len(list((tmp_path / "cache-2").glob("tokens/*/*"))) == 2, "each process computed its share"


def test_an_audit_shuffles_and_blanks_the_tokens(data: Path, tmp_path: Path) -> None:
    """Cached or not, with the same effect; nothing but the tokens depends on the text."""
    alone = {"prompts__dynamic": 0, "prompts__static": 0, "prompts__gate": "none", "train__lr": 0.1}
    losses = []
    for number, cached in enumerate((True, False)):
        run = tmp_path / f"run-{number}"
        train(settings(data, **alone, data__cache_features=cached), run)
        found = audit(run, split="train", device="cpu")
        assert [one.name for one in found.conditions] == ["as is", *["shuffled", "blank"] * 2, "mapped"]
        logits = [one.logits_SN for one in found.conditions]
        assert all((logits[0] - one).abs().max() > 1e-4 for one in logits[1:])
        losses.append(torch.stack(logits))
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-3)


def test_a_swapped_encoder_keeps_queries_and_mappers(data: Path, tmp_path: Path) -> None:
    train(settings(data, train__epochs=1), tmp_path / "run")
    swap = swap_encoder(tmp_path / "run", tmp_path / "new", comp="tiny:text-b")
    origins = {entry.name: entry.origin for entry in swap.transferred if "resampler" in entry.name or "mapper" in entry.name}
    new = {name for name, origin in origins.items() if origin == "new"}
    assert new == {f"stack.resamplers.comp.trunk.0.{kind}" for kind in ("weight", "bias")}
    assert set(origins.values()) == {"new", "kept"} and "stack.resamplers.comp.queries_Rh" in origins


@pytest.mark.matrix
@pytest.mark.parametrize(("form", "count"), [("onnx", 3), ("pt2", 0)])
def test_a_bundle_predicts_as_the_run_does(data: Path, tmp_path: Path, form: str, count: int) -> None:
    """For texts of any length and for rows without one, alone and padded to the longest."""
    config = settings(data, prompts__condition_tokens=count, train__modality_dropout=0.3, train__lr=0.05)
    train(config, tmp_path / "run")
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    texts = ["the", "the red digit " * 5, None, "the red digit", "digit " * 9]
    table = data / f"lengths-{form}-{count}.jsonl"
    write_rows(table, [row | {"text": text} for row, text in zip(rows, texts, strict=True)])
    done = call("export", tmp_path / "run", "-o", tmp_path / "bundle", "--format", form)
    assert done.returncode == 0, done.stderr
    found = []
    for model in ("run", "bundle"):
        for batch in ("1", "5"):
            done = call("predict", tmp_path / model, table, "-o", tmp_path / "out.jsonl", "--batch", batch)
            assert done.returncode == 0, done.stderr
            lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
            found.append(torch.tensor([list(line["probabilities"].values()) for line in lines]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-3)

"""What `mopefuse bench` measures is what it claims to measure, and every row has its numbers. No test checks how fast anything
is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import plain_config, run_cli

from mopefuse.bench import inserted_tokens, memory, scale
from mopefuse.bench.pair import PairBench, bench_pair, build_quantized, random_batch
from mopefuse.bench.timing import Times, Turns
from mopefuse.bench.variants import FLOOR, QUARTER, Subject, Variant, build_encoders, conditional, variants
from mopefuse.cli.bench import PAIRS
from mopefuse.config.schema import RunConfig
from mopefuse.encoders._prompted import PromptedEncoder
from mopefuse.encoders.base import Encoder, create_encoder
from mopefuse.encoders.tiny import TinyEncoder
from mopefuse.errors import ResourceError
from mopefuse.fusion._static_prompts import build_static_stack

CPU = torch.device("cpu")
TINY = {"main": "tiny:vision", "comp": "tiny:text", "device": "cpu"}
MAINS = {
    "tiny": "tiny:vision",
    "timm-vit": "timm:vit_tiny_patch16_224?pretrained=false&img_size=32&depth=2",
    "timm-swin": "timm:swin_tiny_patch4_window7_224?pretrained=false&img_size=64&window_size=4&depths=2,2&num_heads=2,4"
    "&embed_dim=16",
    "hf-bert": "hf:bert-base?pretrained=false&num_hidden_layers=2&hidden_size=32&num_attention_heads=2&intermediate_size=64",
}


def prepared(config: dict[str, Any], variant: Variant) -> Subject:
    built = plain_config(config)
    encoders = build_encoders(built, CPU)
    return Subject(variant, built, encoders, random_batch(encoders, 3, 6, CPU), CPU)


@pytest.mark.parametrize("main", MAINS)
def test_inserted_tokens_equal_keys_and_values(main: str) -> None:
    comp = "tiny:text" if main != "hf-bert" else "tiny:vision"
    variant = Variant("one", {"prompts": {"experts": 4, "gate": "none", "init": 0.5, "dropout": 0.0}})
    subject = prepared({"main": MAINS[main], "comp": comp, "device": "cpu"}, variant)
    model = subject.model.eval()
    with torch.no_grad():
        as_keys = model(subject.batch).logits
        with inserted_tokens.as_tokens(subject.encoders["main"]):
            as_tokens = model(subject.batch).logits
        after = model(subject.batch).logits
        bare = model.classify(subject.encoders["main"].encode(subject.batch.inputs["main"]).pooled_BC)
    torch.testing.assert_close(as_tokens, as_keys, rtol=1e-4, atol=1e-5)
    assert torch.equal(after, as_keys)
    assert (as_keys - bare).abs().max() > 1e-3  # the prompts have an effect


def test_only_inserted_tokens_pass_through_the_output_projection() -> None:
    encoder = create_encoder(MAINS["timm-swin"])
    assert isinstance(encoder, PromptedEncoder)
    rows: list[int] = []
    encoder._slots[0].block.attn.proj.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[1]))  # type: ignore[union-attr]
    stack = build_static_stack(plain_config({**TINY, "prompts": {"static": 3, "gate": "none"}}).prompts, encoder)
    batch = {"pixels": torch.zeros(2, 64, 64, 3, dtype=torch.uint8)}
    prompts = stack.condition({})
    encoder.encode(batch, prompts)
    with inserted_tokens.as_tokens(encoder):
        encoder.encode(batch, prompts)
    assert rows == [16, 19]


def test_an_encoder_that_cannot_take_tokens_has_a_reason_instead_of_times() -> None:
    encoder = create_encoder("open_clip:ViT-B-32#visual?pretrained=false&force_image_size=64")
    assert "does not support prompts as tokens" in inserted_tokens.why_not_insertable(encoder)


def test_all_cached_runs_only_the_prompted_layers() -> None:
    (variant,) = (one for one in variants((4,)) if one.name == QUARTER)
    subject = prepared(TINY, variant)
    assert isinstance(subject.encoders["main"], TinyEncoder)
    runs: list[int] = []
    for number, block in enumerate(subject.encoders["main"].blocks):
        block.register_forward_hook(lambda *_, number=number: runs.append(number))
    subject.step()
    assert runs == [3]
    subject.model.eval()
    with torch.no_grad():
        found = subject.model(subject.batch).logits
        whole = subject.model(replace(subject.batch, prefixes={})).logits
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-2)


def test_the_floor_runs_both_encoders_and_backpropagates_to_the_first_layer() -> None:
    subject = prepared(TINY, Variant(FLOOR, bare=True))
    reached: list[bool] = []
    main = subject.encoders["main"]
    first = main.blocks[0]
    assert isinstance(first, torch.nn.Module)
    first.register_full_backward_hook(lambda module, inward, outward: reached.append(inward[0] is not None))
    calls: list[Encoder] = []
    for encoder in subject.encoders.values():
        encoder.register_forward_hook(lambda module, args, out: calls.append(module))
        plain = encoder._encode
        encoder._encode = lambda inputs, plain=plain, encoder=encoder: (calls.append(encoder), plain(inputs))[1]  # type: ignore[method-assign]
    subject.step()
    assert reached == [True]
    assert calls == [subject.encoders["comp"], main]
    assert all(parameter.grad is None for parameter in subject.model.parameters())


def test_a_benchmark_step_equals_a_training_step() -> None:
    subject = prepared(TINY, Variant("one", {"prompts": {"experts": 2}}))
    before = {name: p.detach().clone() for name, p in subject.model.named_trainable_parameters().items()}
    subject.step()
    moved = {name for name, p in subject.model.named_trainable_parameters().items() if not torch.equal(p, before[name])}
    assert "head.weight" in moved
    assert all(p.grad is None for name, p in subject.model.named_parameters() if name not in before)


def test_a_method_is_measured_with_its_defaults() -> None:
    model = prepared(TINY, Variant("mlp", {"method": "mlp"})).model
    assert model.config.head_hidden == model.head[0].out_features == 512


def test_ratios_compare_times_of_the_same_round() -> None:
    floor, other = Times({0: 1.0, 1: 10.0, 2: 1.0}), Times({0: 2.0, 1: 20.0})
    assert other.ratio_to(floor) == 2.0
    assert Times.from_seconds([1.0, 2.0, 3.0, 4.0, 100.0]).median == 3.0


def test_disturbed_rounds_are_not_counted_unless_all_are_disturbed() -> None:
    floor, other = Times({0: 1.0, 1: 1.0, 2: 5.0}, {0: 0.0, 1: 0.05, 2: 0.4}), Times({0: 2.0, 1: 3.0, 2: 5.0}, {1: 0.06})
    assert floor.seconds == (1.0, 1.0) and other.seconds == (2.0, 5.0)
    assert other.ratio_to(floor) == 2.0
    assert Times({0: 1.0, 1: 3.0}, {0: 0.5, 1: 0.5}).median == 2.0


def test_calls_alternate_and_some_are_timed_more_often() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}  # type: ignore[misc]
    times = Turns(CPU, rounds=2, often=("ab", "bc", "xa"), more=2, warm_up=1).time(calls)
    assert "".join(order) == "abc" + "abc" + "ba" + "cb" + "bca" + "ab" + "bc"
    assert {name: len(each.by_round) for name, each in times.items()} == {"a": 4, "b": 6, "c": 4}
    assert all(each.stolen.keys() == each.by_round.keys() for each in times.values())


@pytest.fixture(scope="module")
def found() -> PairBench:
    config = plain_config({**TINY, "train": {"precision": "fp32"}})
    return bench_pair(config, batch=2, text_length=6, experts=(4, 16), methods=("linear", "mmbt"), rounds=1, more=1)


@pytest.mark.process
def test_every_row_has_every_number(found: PairBench) -> None:
    names = [variant.name for variant in variants((4, 16), ("linear", "mmbt"))]
    assert [line.name for line in found.lines] == names
    assert len(names) == 14
    for line in found.lines:
        assert (line.train is None) == (line.name == "linear"), line.name
        assert line.why_not == ""
    floor = found.line(FLOOR).train
    assert floor is not None and len(floor.by_round) == 2 and floor.seconds
    assert all(value is not None and value > 0 for value in found.ratios().values())


@pytest.mark.process
def test_parameters_and_bytes_are_those_that_a_run_trains_and_saves(found: PairBench) -> None:
    subject = prepared(TINY, Variant("one", {"prompts": {"experts": 4}}))
    line = found.line(conditional(4))
    assert line.trainable == sum(p.numel() for p in subject.model.trainable_parameters())
    assert line.artefact == sum(t.numel() * t.element_size() for t in subject.model.trainable_state_dict().values())
    assert found.line(FLOOR).trainable == found.line(FLOOR).artefact == 0
    assert found.line("late-concat, fine-tuned").artefact > found.weights


@pytest.mark.process
def test_quantised_encoders_have_rows_with_the_bytes_of_their_weights() -> None:
    options: dict[str, Any] = {"quantize": ("int8", "nf4"), "infer": False, "with_memory": False}
    found = bench_pair(plain_config(TINY), batch=2, text_length=6, experts=(4,), rounds=1, more=0, **options)
    plain, *others = (found.line(f"{conditional(4)}{kind}") for kind in ("", ", int8 encoders", ", nf4 encoders"))
    assert plain.encoders == found.weights
    assert [line.encoders for line in others] == [encoder_bytes("int8"), encoder_bytes("nf4")]
    assert all(line.encoders < plain.encoders / 2 and line.train and line.trainable == plain.trainable for line in others)


def test_encoders_that_cannot_be_quantised_have_a_reason_instead_of_times() -> None:
    config = plain_config({**TINY, "comp": "timm:resnet18?pretrained=false"})
    found, faults = build_quantized(config, ("int8",), CPU)
    assert not found and "has no linear layers" in faults["int8"]


def encoder_bytes(kind: str) -> int:
    pair = [create_encoder(f"{spec}?quantize={kind}") for spec in (TINY["main"], TINY["comp"])]
    return sum(p.numel() * p.element_size() for encoder in pair for p in encoder.parameters())


def _hold(shared: int, case: int) -> int:
    return memory.memory_growth(CPU, lambda: torch.ones(case * 2**20 // 4).sum())


def _build() -> int:
    return 0


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be set back")
def test_memory_is_the_peak_of_a_call() -> None:
    small, large, again = memory.in_fresh_processes(_build, _hold, (20, 200, 20))
    assert 20 <= small / 2**20 < 40
    assert 200 <= large / 2**20 < 220
    assert abs(again - small) < 8 * 2**20


def _fail(shared: int, case: int) -> int:
    if case:
        os._exit(9)
    raise ValueError("as it is")


@pytest.mark.process
def test_a_failed_or_killed_process_is_an_error() -> None:
    with pytest.raises(ValueError, match="as it is"):
        list(memory.in_fresh_processes(_build, _fail, (0,)))
    with pytest.raises(ResourceError, match="was killed"):
        list(memory.in_fresh_processes(_build, _fail, (1,)))


def mopefuse(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_cli("bench", *arguments)


@pytest.mark.process
def test_the_command_prints_one_object_with_both_ratios() -> None:
    done = mopefuse(
        "--main", "tiny:vision", "--comp", "tiny:text", "--experts", "2", "--rounds", "1", "--more", "0", "--batch", "2",
        "--no-memory", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (pair,) = json.loads(done.stdout)["pairs"]
    rows = {row["name"]: row for row in pair["rows"]}
    assert rows["floor"]["train_of_floor"] == rows["floor"]["infer_of_floor"] == 1
    assert rows["conditional, k = 2"]["train"]["seconds"]
    assert rows["conditional, k = 2"]["memory_bytes"] is None
    assert pair["device"].startswith("cpu") and pair["precision"] == "fp32" and pair["versions"]["torch"]


@pytest.mark.process
def test_with_train_or_infer_alone_only_that_is_measured() -> None:
    done = mopefuse("--main", "tiny:vision", "--comp", "tiny:text", "--experts", "2", "--rounds", "1", "--more", "0", "--infer")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("conditional, k = 2")).split()
    assert row[4] == "-"
    assert "ms" in row


def test_the_default_pairs_are_those_of_the_documentation() -> None:
    assert PAIRS == (("timm:vit_base", "hf:bert-base"), ("timm:swin_base", "hf:bert-base"))
    for pair in PAIRS:
        RunConfig(main=pair[0], comp=pair[1])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--experts", "many"), "MF-CFG-130"),
        (("--experts", "0"), "MF-CFG-130"),
        (("--main", "timm:resnet18", "--comp", "tiny:text"), "MF-ENC-21"),
        (("--main", "tiny:vision", "--comp", "tiny:text", "--method", "pnf"), "MF-CFG"),
        (("--main", "tiny:vision", "--comp", "tiny:text", "--quantize", "int4"), "MF-ENC-24"),
        (("ddp", "--processes", "two"), "MF-CFG-130"),
    ],
)
def test_invalid_arguments_are_refused(arguments: tuple[str, ...], code: str) -> None:
    done = mopefuse(*arguments)
    assert done.returncode in (3, 4, 5), done.stderr
    assert code in done.stderr
    assert "Traceback" not in done.stderr


def test_images_are_timed_decoded_and_from_the_cache() -> None:
    done = mopefuse("loader", "--main", "tiny:vision", "--images", "8", "--side", "32", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["decoded"]["images_per_second"] > 0 and found["cached"]["images_per_second"] > 0


@pytest.mark.process
def test_start_up_is_timed_for_help_version_and_errors() -> None:
    done = mopefuse("startup", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    commands = {"mopefuse --help", "mopefuse --version", "a usage error", "a configuration error"}
    assert commands <= json.loads(done.stdout)["seconds"].keys()


@pytest.mark.process
def test_scaling_is_measured_along_every_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = {"experts": (1, 4), "prompt tokens": (2, 12), "batch": (1, 2), "text length": (4, 8)}
    monkeypatch.setattr(scale, "AXES", axes)
    points = scale.bench_scale(plain_config(TINY), batch=2, text_length=6, rounds=1)
    wanted = [(axis, value) for axis, values in axes.items() for value in values]
    assert [(point.axis, point.value) for point in points] == wanted
    assert all(point.ratio > 0 for point in points)


@pytest.mark.process
def test_a_batch_is_divided_among_processes() -> None:
    pair = ("--main", "tiny:vision", "--comp", "tiny:text")
    done = mopefuse("ddp", *pair, "--batch", "4", "--rounds", "1", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"].keys() == {"1", "2"}

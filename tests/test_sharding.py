"""Encoders sharded over processes: the same features, gradients and runs as with whole encoders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import call, make_pairs, matrix, plain_config, ranks
from encoder_cases import TIMM, every_spec
from test_train import log, weights

from mopefuse.errors import ConfigError
from mopefuse.runs.folder import RunFolder
from mopefuse.training.plan import plan

FEW = ("tiny: text", "timm: vit")
MORE = (
    "hf: bert", "timm: resnet", "hf: albert",
    "hf: llama", "hf: swin", "hf: deberta-v2", "timm: swinv2", "timm: beit-shared", "timm: eva02",
    "open_clip: visual tower", "open_clip: text tower", "open_clip: siglip-visual tower",
)  # fmt: skip
"""Layers that share weights, several stages, weights beside the layers, attention that reads its weights directly."""


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("encoders")
    return folder, every_spec(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs") / "data", counts={"train": 20, "val": 7, "test": 5})


@pytest.mark.parametrize("names", matrix([FEW, MORE], [FEW]), ids=["few", "more"])
def test_a_sharded_encoder_equals_a_whole_one(
    tmp_path: Path, names: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """Features, gradients of prompts, recomputed layers, bf16 and prefixes; processes run it different numbers of times."""
    few = {"tiny: text": "tiny:text", "timm: vit": f"timm:{TIMM['vit']}"}
    folder, every = (tmp_path, few) if names == FEW else request.getfixturevalue("specs")
    (folder / "specs.json").write_text(json.dumps({name: every[name] for name in names}))
    done = ranks(2 if names == FEW else 3, folder, program=(str(Path(__file__).with_name("sharded_program.py")),))
    assert done.returncode == 0, done.stderr


def command(data: Path, out: Path, *more: str) -> list[str]:
    """Train the default method without dropout, which depends on the number of processes."""
    sets = "prompts.dropout=0 prompts.token_dropout=0 router.noise=false head_dropout=0 train.log_every=1".split()
    plain = [part for one in sets for part in ("--set", one)]
    fixed = ["train", "--device", "cpu", "--batch", "9", "--epochs", "2", "--experts", "4"]
    return [*fixed, "--data", str(data), "--out", str(out), *plain, *more]


def assert_equal_runs(one: Path, other: Path, *, exact: bool) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    differ = [name for name in a if not torch.equal(a[name], b[name])]
    if exact:
        assert not differ
    else:  # together and by norm, since AdamW turns the rounding of a gradient close to 0 into a full step
        flat = [torch.cat([run[name].flatten() for name in a if "optimizer/" not in name]) for run in (a, b)]
        difference = float((flat[0] - flat[1]).norm() / flat[0].norm())
        assert difference < 1e-3, f"{difference:.1e}"
    for line, same in zip(log(one), log(other), strict=True):
        assert line.keys() == same.keys()
        if "loss" in line:
            assert line["loss"] == pytest.approx(same["loss"], abs=0 if exact else 1e-5)


@pytest.mark.process
@pytest.mark.parametrize("kind", ["cached", "libraries"])
def test_sharded_runs_equal_whole_ones(
    data: Path, tmp_path: Path, specs: tuple[Path, dict[str, str]], kind: str
) -> None:
    """Nothing divides evenly: 20 samples in batches of 9, validation on 7, a test on 5.

    With `cached`, features, tokens and the outputs of early layers are; with `libraries`, both encoders run in every step, with
    prompts in all layers of main and in comp.
    """
    if kind == "cached":
        runs = {"whole": 2, "sharded": 2}
        more = ["--main", "tiny:vision", "--comp", "tiny:text", "--cache-prefix", "on", "--condition", "tokens"]
        more += ["--warm-start", "linear", "--head-features", "all", "--head-hidden", "0"]
    else:
        runs = {"one": 1, "sharded-two": 2, "sharded": 4}
        more = ["--main", specs[1]["timm: vit"], "--comp", specs[1]["hf: bert"], "--comp-tuning", "prompts", "--layers", "all"]
        more += ["--head-features", "all", "--film"]
        more += ["--set", "train.accumulate=2", "--set", "train.checkpoint_activations=true"]
    for name, processes in runs.items():
        sharded = ["--shard-encoders", "both"] if "sharded" in name else []
        done = ranks(processes, *command(data, tmp_path / name, *more, *sharded), MOPEFUSE_CACHE=str(tmp_path / "cache" / name))
        assert done.returncode == 0, done.stderr
        as_many = next(other for other in ("whole", "one") if runs.get(other) == processes or other == "one")
        assert_equal_runs(tmp_path / as_many, tmp_path / name, exact=runs[as_many] == processes)
    # one process evaluates the run, and continues it
    evaluated = call("eval", tmp_path / "sharded", "--device", "cpu", "--json")
    metrics = json.loads((tmp_path / "sharded" / "metrics.json").read_text())["metrics"]["test"]
    assert json.loads(evaluated.stdout)["metrics"] == pytest.approx(metrics, abs=1e-4), evaluated.stderr
    longer = call("train", "--resume", "--out", tmp_path / "sharded", "--epochs", "3")
    assert longer.returncode == 0, longer.stderr
    assert RunFolder(tmp_path / "sharded").result()["processes"] == 1


@pytest.mark.parametrize(
    ("changed", "fix"),
    [
        ({"comp_tuning": {"mode": "lora"}, "train": {"shard": "both"}}, "use --shard-encoders main"),
        ({"comp_tuning": {"mode": "full"}, "train": {"shard": "comp"}}, "remove --shard-encoders"),
        ({"train": {"shard": "main", "compile": True}}, "remove train.compile, or --shard-encoders"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_training(data: Path, changed: dict[str, object], fix: str) -> None:
    config = plain_config({"main": "tiny:vision", "comp": "tiny:text", "data": {"path": str(data)}, **changed})
    with pytest.raises(ConfigError) as caught:
        plan(config)
    assert (caught.value.code, caught.value.fix) == ("MF-CFG-361", fix)


def test_one_process_says_that_it_cannot_shard(data: Path, tmp_path: Path) -> None:
    more = ["--shard-encoders", "both", "--warm-start", "none", "--steps", "1"]
    done = call(*command(data, tmp_path / "run", "--main", "tiny:vision", "--comp", "tiny:text", *more))
    assert done.returncode == 0, done.stderr
    assert "--shard-encoders has no effect in one process" in done.stderr
